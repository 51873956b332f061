"""Which temperature and strength should `learn.distill(teacher)` have? Students without and with `SoftTarget`, in
several regimes of digits (to choose) and of Fashion-MNIST (to check what was chosen).

    python benchmarks/accuracy.py distill_default [--data digits] [--seeds 8] [--methods T=2 T=4] [--regimes short]
        [--runs FOLDER] [--folder FOLDER]

If a regime does not say otherwise, its networks are those of `which_loss`, with 200 labels (digits) or 1000
(Fashion-MNIST, 14x14 pixels) for 20 epochs. `unlabeled too`: distilled students also see three times as many images
without a label, in the same number of steps.

The runs are written to `benchmarks/tables/distill_default.csv`, in the place of those of the same regimes. `--runs`
keeps them in files of `kd_compare`, from which a stopped sweep goes on."""
import argparse, tempfile
from functools import partial
from pathlib import Path
import pandas as pd
import torch
from fastai.basics import CrossEntropyLossFlat, Learner, accuracy
from fastai.callback.schedule import SchedCos, SchedNo, SchedPoly
from kd_fastai.callback import KnowledgeDistillationCallback, Term
from kd_fastai.report.compare import comparison_table, kd_compare
from kd_fastai.demo import digits, small_net
from kd_fastai.losses import SoftTarget
from nets import three_stages
from studies import funmatch, which_loss
from sweep import TABLES, replace_rows

FILE = TABLES/'distill_default.csv'
# temperature, and a schedule that multiplies the weight that was found
ALL,THIRD,RISING,LATE = SchedNo(1, 1),SchedNo(1/3, 1/3),SchedCos(0, 1),SchedPoly(0, 1, 2)
METHODS = {'T=1': (1, ALL), 'T=2': (2, ALL), 'T=4': (4, ALL), 'T=2, a third': (2, THIRD), 'T=4, a third': (4, THIRD),
        'T=2, rising': (2, RISING), 'T=4, rising': (4, RISING), 'T=4, rising late': (4, LATE)}
UNKNOWN,MORE = -100,3
# labels (times those of the data) and epochs
REGIMES = {'few labels': (1, 20), 'long': (1, 80), 'short': (1, 5), 'many labels': (4.5, 20),
           'many labels, short': (4.5, 5), 'other augmentation': (1, 20), 'other architecture': (1, 20),
           'unlabeled too': (1, 20), 'unlabeled too, long': (1, 80)}

def make_data(data, folder, labels, seed, other_augmentation=False):
    "Digits are shifted if the augmentation is the other one, Fashion-MNIST is not"
    if data=='fashion': return which_loss.fashion14(labels, seed, folder, augment=not other_augmentation)
    return funmatch.shifted(labels, seed, 20) if other_augmentation else digits(labels, seed)

def make_learner(data, folder, regime, seed):
    "A student of a regime"
    labels = int(which_loss.LABELS[data]*REGIMES[regime][0])
    dls = make_data(data, folder, labels, seed, regime=='other augmentation')
    net = small_net(8) if regime=='other architecture' else three_stages(True)
    learn = Learner(dls, net, lr=1e-2, loss_func=CrossEntropyLossFlat(), metrics=accuracy)
    learn.more = make_data(data, folder, (1+MORE)*labels, seed) if 'unlabeled' in regime else None
    return learn

def add_unlabeled(learn):
    "Add images without a label to the training data"
    (x,y),(more,_) = learn.dls.train_ds.tensors,learn.more.train_ds.tensors
    n = MORE*len(y)
    learn.more.train_ds.tensors = torch.cat([x, more[:n]]),torch.cat([y, y.new_full((n,), UNKNOWN)])
    learn.dls = learn.more

def distill(teacher, T, schedule, learn):
    "The callback that `learn.distill` attaches, at this temperature and strength"
    if learn.more is not None: add_unlabeled(learn)
    return KnowledgeDistillationCallback(teacher, Term(SoftTarget, 'auto', T=T, schedule=schedule))

def fit(learn, epochs, cbs):
    "Train. With unlabeled images an epoch is longer, and there are fewer of them"
    has_more = learn.more is not None and learn.dls is learn.more
    which_loss.fit(learn, epochs//(1+MORE) if has_more else epochs, cbs)

def measure(regime, names, a, runs):
    "The runs of a regime"
    teacher = which_loss.teacher(10, a.data, a.folder)
    methods = {'baseline': None, **{n: partial(distill, teacher.model, *METHODS[n]) for n in names}}
    file = Path(runs)/f"{a.data}_{regime.replace(' ', '_').replace(',', '')}.csv"
    res = kd_compare(partial(make_learner, a.data, a.folder, regime), methods, a.seeds, REGIMES[regime][1], csv=file,
                     fit=fit, rounds=0, progress=False).runs
    print(regime, comparison_table(res, 'accuracy')[['mean','gain','low','high']].round(4), sep='\n', flush=True)
    columns = ['data','regime','seed','method','epochs','accuracy']
    return res.assign(data=a.data, regime=regime)[columns]

def write(made):
    "Write the runs, and keep those of other regimes"
    replace_rows(FILE, made, ['data','regime']).round(5).to_csv(FILE, index=False)

def main():
    p = argparse.ArgumentParser(description=__doc__.split('\n\n')[0])
    p.add_argument('--data', choices=['digits','fashion'], default='digits')
    p.add_argument('--folder', type=Path, help='of Fashion-MNIST')
    p.add_argument('--seeds', type=int, default=8)
    p.add_argument('--methods', nargs='*', default=[*METHODS])
    p.add_argument('--regimes', nargs='*', default=[*REGIMES])
    p.add_argument('--runs', type=Path)
    a = p.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as d:
        write(pd.concat([measure(r, a.methods, a, a.runs or d) for r in a.regimes]))

if __name__=='__main__': main()
