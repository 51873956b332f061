"""Every loss of the package on the digits, alone beside the labels, with the same budget and over several seeds: the table of the tutorial `which_loss`.

    python benchmarks/which_loss.py [--seeds 8] [--epochs 20] [--only SoftTarget RKD] [--out benchmarks/which_loss.csv] [--quick]

One row a run: seed, loss, weight, accuracy in percent of 797 test digits, seconds of processor time, and why not where a loss does not fit this task. Runs that the file has already are not
repeated, so that a stopped sweep goes on where it was; delete rows to have them made again. `--quick` runs one seed for two epochs, to see that it works.

Each loss has its default weight beside a task weight of 1: nothing is tuned. Teacher and student have the same channels, so that losses that compare features element by element take part without
an adapter; the student's convolutions are separable, it has a sixth of the weights. The teacher learned from 1000 labels, the students from 200.

The classifier is a convolution before the mean, as `CATKD` needs it. `SRRL` and `SimKD` need a linear one: they get the same function with the mean first. `SimKD` is measured with its projector and the
teacher's classifier, which belong to its student."""
import argparse, csv, sys, time
from collections import OrderedDict
from pathlib import Path
import torch
from torch import nn
from fastai.basics import CrossEntropyLossFlat, Learner, accuracy, noop, set_seed
from fastai.callback.schedule import ParamScheduler  # also gives Learner its fit_one_cycle
import kd_fastai.losses as losses
from kd_fastai.callback import KnowledgeDistillationCallback, Term
from kd_fastai.info import get_loss_info
from kd_fastai.signature import loss_args
from kd_fastai.demo import digits

FIELDS = 'seed','loss','weight','accuracy','seconds','why_not'
WIDTH,LABELS = 16,200
MAPS,LAST = ['1','2'],['2']
OTHER = {'regression': {'BoundedRegression'}}                            # losses for other tasks
LINEAR = {'SRRL','SimKD'}                                                # ask for a linear classifier
LAYERS = {**dict.fromkeys(('PKT','RKD','DarkRank','CorrelationCongruence','SRD'), LAST),  # relations of samples: the last maps
          **dict.fromkeys(('ActivationBoundaries','PartialL2','OFD'), ['1.norm','2.norm']), # before the ReLU
          **dict.fromkeys(('CRD','CRDBank','ITRD','SRRL','SimKD'), LAST),                # embeddings of samples, what the classifier reads
          'CATKD': ['cam']}                                                               # a map for each class

def conv(ni, nf, stride, thin):
    "A convolution with normalisation; a thin one is separable"
    return (nn.Sequential(nn.Conv2d(ni, ni, 3, stride, 1, groups=ni, bias=False), nn.Conv2d(ni, nf, 1, bias=False)) if thin
            else nn.Conv2d(ni, nf, 3, stride, 1, bias=False))

def net(thin):
    "Three stages of 8x8, 4x4 and 2x2, a map for each class, and its mean"
    def stage(ni, nf, stride): return nn.Sequential(OrderedDict(conv=conv(ni, nf, stride, thin), norm=nn.BatchNorm2d(nf), act=nn.ReLU()))
    w = WIDTH
    return nn.Sequential(OrderedDict({'0': stage(1, w, 1), '1': stage(w, 2*w, 2), '2': stage(2*w, 4*w, 2),
                                      'cam': nn.Conv2d(4*w, 10, 1), 'pool': nn.AdaptiveAvgPool2d(1), 'flat': nn.Flatten()}))

def linear(model):
    "The same function with the mean before the classifier, which then is a linear layer of the same weights"
    *stages,cam,pool,flat = model
    fc = nn.Linear(cam.in_channels, cam.out_channels)
    fc.load_state_dict({'weight': cam.weight.flatten(1), 'bias': cam.bias})
    return nn.Sequential(*stages, pool, flat, fc)

def train(dls, thin, epochs, seed, cbs=None, head=noop):
    "The Learner, and seconds of processor time"
    set_seed(seed, reproducible=True)
    learn = Learner(dls, head(net(thin)), loss_func=CrossEntropyLossFlat(), metrics=accuracy)
    start = time.process_time()
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(epochs, 1e-2, cbs=cbs)
    return learn,time.process_time()-start

def percent(learn):
    "Accuracy in percent"
    with learn.no_bar(), learn.no_logging(): return round(100*learn.validate()[1], 2)

def all_losses():
    "Every loss that has facts: a function, or a class that makes a loss with weights of its own"
    return {n:f for n,f in vars(losses).items() if callable(f) and get_loss_info(f)}

def distillation(name, loss, teacher):
    "The callback for one loss at its default weight. Raises what does not fit"
    if isinstance(loss, type): loss = loss(n_data=LABELS) if name=='CRDBank' else loss()
    layers = LAYERS.get(name, MAPS) if 'fm_s' in loss_args(loss).accepted else None
    return KnowledgeDistillationCallback(teacher, Term(loss, weight=get_loss_info(loss).weight, layers=layers))

def run(name, loss, teacher, seed, epochs):
    "One row"
    row = dict(seed=seed, loss=name, weight='' if loss is None else get_loss_info(loss).weight)
    task = next((t for t,names in OTHER.items() if name in names), None)
    if task: return dict(row, why_not=f'for {task}')
    try:
        head = linear if name in LINEAR else noop
        cbs = loss and distillation(name, loss, head(teacher))
        learn,seconds = train(digits(LABELS, seed), True, epochs, seed, cbs, head)
        if name=='SimKD': learn.model = cbs.terms[0].loss.student(learn.model)  # with its projector and the teacher's classifier
    except (TypeError, ValueError, RuntimeError, FloatingPointError, NotImplementedError) as e: return dict(row, why_not=f'{type(e).__name__}: {e}'.split('\n')[0][:200])
    return dict(row, accuracy=percent(learn), seconds=round(seconds, 2))

def done(path):
    "The runs that a file has"
    return {(int(o['seed']),o['loss']) for o in csv.DictReader(path.open())} if path.exists() else set()

def main():
    p = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    p.add_argument('--seeds', type=int, default=8); p.add_argument('--epochs', type=int, default=20)
    p.add_argument('--only', nargs='*', default=[]); p.add_argument('--out', type=Path, default=Path(__file__).with_suffix('.csv')); p.add_argument('--quick', action='store_true')
    a = p.parse_args()
    if a.quick: a.seeds,a.epochs,a.out = 1,2,Path('which_loss_quick.csv')
    if unknown := {*a.only}-{*all_losses()}: sys.exit(f"No such loss: {', '.join(sorted(unknown))}. There are {', '.join(all_losses())}")
    torch.set_num_threads(1)
    ways = {'student alone': None, **{n:f for n,f in all_losses().items() if not a.only or n in a.only}}
    have,new = done(a.out),not a.out.exists()
    teacher,_ = train(digits(), False, 2 if a.quick else 10, 0)
    with a.out.open('a', newline='') as f:
        w = csv.DictWriter(f, FIELDS, lineterminator='\n')
        if new: w.writeheader()
        if (0,'teacher') not in have: w.writerow(dict(seed=0, loss='teacher', accuracy=percent(teacher)))
        for seed in range(a.seeds):
            for name,loss in ways.items():
                if (seed,name) in have: continue
                w.writerow(row := run(name, loss, teacher.model, seed, a.epochs)); f.flush()
                print(*(v for v in row.values() if v!=''), flush=True)

if __name__=='__main__': main()
