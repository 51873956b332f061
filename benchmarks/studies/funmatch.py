"""Function matching on digits with shifts: same views, MixUp, no labels, a long schedule. The table of the tutorial
`funmatch`.

    python benchmarks/accuracy.py funmatch [--seeds 5] [--epochs 30] [--patience 1 5 20]
        [--out benchmarks/tables/funmatch.csv] [--quick]

One row for each run of `kd_compare`: seed, method, accuracy on 797 test digits. The teacher (width 16) learned from
1000 digits, the students (width 8) see 200. Every batch is shifted by up to two pixels in each direction. A method
ends in its patience: `5x` trains five times as many epochs. Nothing is tuned: the only loss is SoftTarget at T=1. A
stopped run goes on from its file. `--quick` runs one seed for two epochs, to see that it works."""
import argparse
from functools import cache, partial
from pathlib import Path
import torch
from fastai.basics import CrossEntropyLossFlat, ItemTransform, Learner, Pipeline, accuracy, set_seed
from fastai.callback.all import MixUp
from kd_fastai.callback import KnowledgeDistillationCallback
from kd_fastai.report.compare import kd_compare
from kd_fastai.demo import digits, small_net
from kd_fastai.losses import SoftTarget
from kd_fastai.objective import Term
from sweep import TABLES, NoValidation

LABELS,BATCH,PIXELS = 200,50,2

class Shift(ItemTransform):
    "Shift each image of a batch by up to `n` pixels in each direction; the border is repeated"
    def __init__(self, n=PIXELS): self.n = n
    def encodes(self, b):
        x,y = b
        size,steps = x.shape[-1],torch.randint(-self.n, self.n+1, (2,len(x),1,1))
        rows,cols = ((torch.arange(size)+s).clamp(0, size-1) for s in steps)
        return x[torch.arange(len(x))[:,None,None], 0, rows.mT, cols][:,None],y

def shifted(labels, seed, bs):
    "Digits whose training batches are shifted"
    dls = digits(labels, seed, bs=bs)
    dls.train.after_batch = Pipeline([Shift()])
    return dls

def make_learner(seed, width=8, labels=LABELS):
    "A Learner of the student"
    return Learner(shifted(labels, seed, BATCH), small_net(width), lr=1e-2, loss_func=CrossEntropyLossFlat(),
                   metrics=accuracy)

@cache
def teacher(epochs):
    "The trained teacher"
    set_seed(0, reproducible=True)
    learn = make_learner(0, width=16, labels=None)
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(epochs, 1e-2)
    return learn

def labels(learn, patience):
    "Train on labels"
    learn.patience = patience

def funmatch(learn, patience, mixup=True, teacher_epochs=30):
    "Match the teacher's function on the very inputs of the student; a share of 0 to 1 is a Beta distribution at 1"
    learn.patience = patience
    kd = KnowledgeDistillationCallback(teacher(teacher_epochs), Term(SoftTarget, 1., T=1), task_weight=0.)
    return [kd, MixUp(1.)] if mixup else [kd]

def fit(learn, epochs, cbs):
    "Train as long as the method says"
    learn.fit_one_cycle(epochs*learn.patience, 1e-2, cbs=[*cbs, NoValidation()])

def main():
    p = argparse.ArgumentParser(description=__doc__.split('\n\n')[0])
    p.add_argument('--seeds', type=int, default=5)
    p.add_argument('--epochs', type=int, default=30)
    p.add_argument('--patience', type=int, nargs='+', default=[1,5,20])
    p.add_argument('--out', type=Path, default=TABLES/'funmatch.csv')
    p.add_argument('--quick', action='store_true')
    a = p.parse_args()
    if a.quick: a.seeds,a.epochs,a.patience,a.out = 1,2,[1,2],Path('funmatch_quick.csv')
    torch.set_num_threads(1)
    makers = {'labels': labels, 'FunMatch': funmatch, 'FunMatch without MixUp': partial(funmatch, mixup=False)}
    methods = {f'{n}, {k}x': partial(f, patience=k) for k in a.patience for n,f in makers.items()}
    res = kd_compare(make_learner, methods, a.seeds, a.epochs, csv=a.out, fit=fit, rounds=0, progress=False)
    score = teacher(30)
    with score.no_bar(), score.no_logging(): print(f'teacher: {score.validate()[1]:.4f}')
    print(res)

if __name__=='__main__': main()
