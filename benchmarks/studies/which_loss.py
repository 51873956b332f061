"""Every loss of the package, each in addition to the labels, with the same budget and over several seeds: the tables of
the tutorial `which_loss`.

    python benchmarks/accuracy.py which_loss [--data digits] [--seeds 8] [--epochs 20] [--only SoftTarget RKD]
        [--weight-by paper auto] [--runs FILE] [--out FILE] [--folder FOLDER] [--quick]

One row for each run: seed, loss, where its weight comes from (`paper`, `auto`, or `rising`, which is 'auto' with a
schedule from 0 to 1), the weight, accuracy in percent of the test images, seconds of processor time, and why not
where a loss does not fit this task. Rows of `--out` for losses and weights that are not measured now are kept.
`--runs` keeps the runs in a file of `kd_compare`, from which a stopped sweep goes on; delete rows to have them made
again. `--quick` runs one seed for two epochs, to see that it works.

Each loss has the default weight of its page, or weight='auto', and the task a weight of 1: nothing is tuned. Teacher
and student have the same channels, so that losses that compare features element by element take part without an
adapter; the student's convolutions are separable, it has a sixth of the weights.

`digits` (`which_loss.csv`): the teacher learned from 1000 labels, the students from 200; 797 test digits. `fashion`
(`which_loss_fashion.csv`): Fashion-MNIST at 14x14 pixels, shifted and flipped at random; the teacher learned from
10,000 labels, the students from 1000; 10,000 test images. `pictures` (`which_loss_pictures.csv`): color pictures of
emoji, the half `report` of `pictures.py`; the teacher is a pretrained network that was fine-tuned on the students'
1,142 pictures; 13 epochs (455 steps). Its maps have other channels than the student's: a loss that needs equal ones
gets an adapter.

The classifier is a convolution before the mean, as `CATKD` needs it. `SRRL` and `SimKD` need a linear one: they get
the same function with the mean first; networks for pictures have a linear one. `SimKD` is measured with its projector
and the teacher's classifier, which belong to its student."""
import argparse, sys
from functools import cache, partial
from pathlib import Path
import pandas as pd
import torch
from fastai.basics import Callback, CrossEntropyLossFlat, Learner, Metric, accuracy, noop, set_seed
from fastai.callback.schedule import SchedCos  # its module gives Learner its fit_one_cycle
import kd_fastai.losses as losses
import pictures
from kd_fastai.report.compare import kd_compare
from kd_fastai.callback import KnowledgeDistillationCallback, Term
from kd_fastai.losses.facts import get_loss_info, loss_args, loss_name
from kd_fastai.demo import digits, fashion
from nets import linear_head, three_stages
from sweep import TABLES, NoValidation

ERRORS = TypeError,ValueError,RuntimeError,FloatingPointError,NotImplementedError
FIELDS = ['seed','loss','weight_by','weight','accuracy','seconds','why_not']
WEIGHT_BY,RISING = ['paper','auto','rising'],SchedCos(0, 1)
LABELS = {'digits': 200, 'fashion': 1000, 'pictures': 1142}
EPOCHS = {'digits': 20, 'fashion': 20, 'pictures': 13}
OTHER = {'regression': {'BoundedRegression'}}                            # losses for other tasks
LINEAR = {'SRRL','SimKD'}                                                # ask for a linear classifier
# what a loss compares, if not maps of several stages
PLACES = {**dict.fromkeys(('PKT','RKD','DarkRank','CorrelationCongruence','SRD'), 'last'), # relations of samples
          **dict.fromkeys(('ActivationBoundaries','PartialL2','OFD'), 'norms'),            # before the ReLU
          **dict.fromkeys(('CRD','CRDBank','ITRD','SRRL','SimKD'), 'last'),                # what the classifier reads
          'CATKD': 'classes'}                                                              # a map for each class
SMALL = dict(maps=['1','2'], last=['2'], norms=['1.norm','2.norm'], classes=['cam'])
LAYERS = {'digits': SMALL, 'fashion': SMALL,
          'pictures': dict(maps=[('1','early'),('4','late')], last=[('5','last')],
                           norms=[('1.4','early'),('4.4','late')], classes=['>maps:'])}

def layers(loss, data='digits'):
    "The layers that a loss compares, or None for a loss on predictions"
    if 'fm_s' not in loss_args(loss).accepted: return None
    return LAYERS[data][PLACES.get(loss_name(loss), 'maps')]

def adapt(loss, data):
    "Adapters for features of other channels, where a loss has none of its own"
    is_map = layers(loss, data) is not None and get_loss_info(loss).must_match in ('shape','channels')
    return 'auto' if data=='pictures' and is_map else None

class TermWeight(Metric):
    "The weight of the only term, with its schedule at the end, as a column of the runs; 0 for the baseline"
    get,name = None,'weight'
    def reset(self): pass
    def accumulate(self, learn): pass
    @property
    def value(self): return self.get() if self.get else 0.
    def of(self, kd):
        "Report the weight of this callback's term. Metrics are copied, functions are not"
        def get():
            (term,) = kd.terms
            return kd.weights[term.name]*term.schedule_at(1.)
        self.get = get
        return kd

def fashion14(labels, seed, folder=None, **kwargs):
    "Small images of Fashion-MNIST"
    return fashion(labels, seed, size=14, folder=folder, **kwargs)

def student_data(data, seed, folder=None):
    "What a student learns from, and is tested on"
    return digits(LABELS[data], seed) if data=='digits' else fashion14(LABELS[data], seed, folder)

def make_learner(data, folder, seed):
    "A Learner with the thin student"
    if data=='pictures': return pictures.make_learner(student_pictures(), 'separable', seed, [accuracy, TermWeight()])
    return Learner(student_data(data, seed, folder), three_stages(True), lr=1e-2, loss_func=CrossEntropyLossFlat(),
                   metrics=[accuracy, TermWeight()])

@cache
def student_pictures():
    "The pictures of the half `report`, in 32x32 pixels"
    return pictures.prepared('report', LABELS['pictures'], 32)

@cache
def teacher(epochs, data='digits', folder=None):
    "The trained teacher"
    set_seed(0, reproducible=True)
    dls = digits() if data=='digits' else fashion14(10_000, 100, folder)
    learn = Learner(dls, three_stages(False), loss_func=CrossEntropyLossFlat(), metrics=accuracy)
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(epochs, 1e-2)
    return learn

@cache
def trained(epochs, data, folder=None):
    "The teacher's model, and its accuracy"
    if data=='pictures':
        model = pictures.Staged(*pictures.tuned('report', LABELS[data]))
        return model,student_pictures()['scores']['valid']['accuracy']
    learn = teacher(epochs, data, folder)
    with learn.no_bar(), learn.no_logging(): return learn.model,learn.validate()[1]

def all_losses():
    "Every loss that has facts: a function, or a class that makes a loss with weights of its own"
    return {n:f for n,f in vars(losses).items() if callable(f) and get_loss_info(f)}

class DeployedStudent(Callback):
    "Validate the student of `SimKD` with its projector and the teacher's classifier, which belong to it"
    def __init__(self, loss): self.loss = loss
    def after_fit(self): self.learn.model = self.loss.student(self.learn.model)

def fit(learn, epochs, cbs): learn.fit_one_cycle(epochs, cbs=[*cbs, NoValidation()])

def distillation(data, name, weight_by, get_teacher, learn):
    "The callbacks for one loss at its default weight, or at 'auto'. Raises what does not fit"
    loss,head = all_losses()[name],linear_head if name in LINEAR and data!='pictures' else noop
    if isinstance(loss, type): loss = loss(n_data=len(learn.dls.train_ds)) if name=='CRDBank' else loss()
    learn.model = head(learn.model)
    weight = get_loss_info(loss).weight if weight_by=='paper' else 'auto'
    schedule = RISING if weight_by=='rising' else None
    term = Term(loss, weight, layers(loss, data), adapt=adapt(loss, data), schedule=schedule)
    kd = KnowledgeDistillationCallback(head(get_teacher()[0]), term, teacher_inputs=teacher_inputs(data))
    learn.metrics[1].of(kd)
    return [kd, DeployedStudent(loss)] if name=='SimKD' else kd

def teacher_inputs(data):
    "Pictures have a key, by which the teacher finds what was recorded"
    return int(data=='pictures')

def rows(runs):
    "The rows of the page's file"
    res = runs.rename(columns=dict(error='why_not')).reindex(columns=[*FIELDS, 'method'])
    res[['loss','weight_by']] = res.method.str.extract(r'^(.*?)(?: (paper|auto|rising))?$')
    res['weight'] = res.weight.where(res.weight_by.notna()).map('{:.4g}'.format, na_action='ignore')
    res['accuracy'] = res.accuracy.mul(100).round(2)
    return res[FIELDS]

def kept_rows(file, made):
    "The rows of an earlier file for losses and weights that are not among `made`"
    if not file.exists(): return pd.DataFrame(columns=FIELDS)
    old = pd.read_csv(file, dtype={'weight': str}).dropna(subset='weight_by')
    again = {*zip(made.loss, made.weight_by)}
    return old[[o not in again for o in zip(old.loss, old.weight_by)]]

def main():
    p = argparse.ArgumentParser(description=__doc__.split('\n\n')[0])
    p.add_argument('--data', choices=[*LABELS], default='digits')
    p.add_argument('--folder', type=Path, help='of Fashion-MNIST')
    p.add_argument('--seeds', type=int, default=8)
    p.add_argument('--epochs', type=int)
    p.add_argument('--only', nargs='*', default=[])
    p.add_argument('--weight-by', nargs='*', default=['paper','auto'], choices=WEIGHT_BY)
    p.add_argument('--runs', type=Path)
    p.add_argument('--out', type=Path)
    p.add_argument('--quick', action='store_true')
    a = p.parse_args()
    if a.out is None:
        a.out = TABLES/('which_loss.csv' if a.data=='digits' else f'which_loss_{a.data}.csv')
    a.epochs = a.epochs or EPOCHS[a.data]
    if a.quick: a.seeds,a.epochs,a.out = 1,2,Path('which_loss_quick.csv')
    if unknown := {*a.only}-{*all_losses()}:
        sys.exit(f"No such loss: {', '.join(sorted(unknown))}. There are {', '.join(all_losses())}")
    torch.set_num_threads(1)
    task = {n: t for t,names in OTHER.items() for n in names}
    names = [n for n in all_losses() if n not in task and (not a.only or n in a.only)]
    get_teacher = partial(trained, 2 if a.quick else 10, a.data, a.folder)
    methods = {f'{n} {by}': partial(distillation, a.data, n, by, get_teacher) for n in names for by in a.weight_by}
    res = kd_compare(partial(make_learner, a.data, a.folder), {'baseline': None, **methods}, a.seeds, a.epochs,
                     csv=a.runs, fit=fit, rounds=0, catch=ERRORS, teacher_inputs=teacher_inputs(a.data), progress=False)
    first = pd.DataFrame([dict(seed=0, loss='teacher', accuracy=round(100*get_teacher()[1], 2))])
    left_out = pd.DataFrame([dict(seed=s, loss=n, why_not=f'for {task[n]}') for s in range(a.seeds) for n in task])
    made = rows(res.runs)
    parts = [first, made, kept_rows(a.out, made), left_out]
    pd.concat(parts).reindex(columns=FIELDS).to_csv(a.out, index=False)
    print(res)

if __name__=='__main__': main()
