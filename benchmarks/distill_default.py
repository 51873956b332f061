"""Which temperature and strength should `learn.distill(teacher)` have? Students alone and with `SoftTarget`, in several
regimes on the digits of `which_loss` (to choose) and on Fashion-MNIST (to check).

    python benchmarks/distill_default.py [--seeds 3] [--ways T=2 T=4] [--fashion FOLDER]

`--fashion` is the folder with the original files of Fashion-MNIST; then only that regime is measured. The runs are
written to `benchmarks/tables/distill_default.csv`; others that it has are kept."""
import argparse
from functools import partial
import pandas as pd
import torch
from fastai.basics import CrossEntropyLossFlat, Learner, accuracy
from kd_fastai.callback import KnowledgeDistillationCallback, Term
from kd_fastai.compare import comparison_table, kd_compare
from kd_fastai.demo import digits, small_net
from kd_fastai.losses import SoftTarget
import auto_ratio, which_loss

FILE = auto_ratio.TABLES/'distill_default.csv'
# temperature, and a factor of the weight that was found
WAYS = {'T=2': (2, 1.), 'T=4': (4, 1.), 'T=4, a third': (4, 1/3)}
REGIMES = {  # labels, epochs, student
    'few labels': (200, 20, 'thin'), 'short': (200, 5, 'thin'), 'many labels': (800, 5, 'thin'),
    'other architecture': (200, 20, 'small')}

def make_learner(labels, student, seed):
    "A student of the digits"
    net = which_loss.net(True) if student=='thin' else small_net(8)
    return Learner(digits(labels, seed), net, lr=1e-2, loss_func=CrossEntropyLossFlat(), metrics=accuracy)

def make_fashion(folder, seed):
    "A student of Fashion-MNIST"
    dls = auto_ratio.fashion(folder, auto_ratio.LABELS, seed)
    return Learner(dls, which_loss.net(True), lr=1e-2, loss_func=CrossEntropyLossFlat(), metrics=accuracy)

def distill(teacher, T, factor, learn):
    "The callback that `learn.distill` attaches, at this temperature and strength"
    return KnowledgeDistillationCallback(teacher, Term(SoftTarget, 'auto', T=T, schedule=lambda _: factor))

def measure(name, make, epochs, teacher, seeds, names):
    "The runs of a regime"
    ways = {'student alone': None, **{n: partial(distill, teacher.model, *WAYS[n]) for n in names}}
    runs = kd_compare(make, ways, seeds, epochs, rounds=0, progress=False).runs
    print(name, comparison_table(runs, 'accuracy')[['mean','gain','low','high']].round(4), sep='\n', flush=True)
    return runs.assign(regime=name)[['regime','seed','way','epochs','accuracy']]

def main():
    p = argparse.ArgumentParser(description=__doc__.split('\n\n')[0])
    p.add_argument('--seeds', type=int, default=3)
    p.add_argument('--ways', nargs='*', default=[*WAYS])
    p.add_argument('--fashion')
    a = p.parse_args()
    torch.set_num_threads(1)
    if a.fashion is None:
        teacher = which_loss.teacher(10)
        made = [measure(n, partial(make_learner, labels, student), epochs, teacher, a.seeds, a.ways)
                for n,(labels,epochs,student) in REGIMES.items()]
    else:
        teacher = auto_ratio.fashion_teacher(a.fashion)
        made = [measure('Fashion-MNIST', partial(make_fashion, a.fashion), auto_ratio.EPOCHS, teacher, a.seeds,
                        a.ways)]
    made = pd.concat(made)
    if FILE.exists():
        old = pd.read_csv(FILE)
        made = pd.concat([made, old]).drop_duplicates(['regime','seed','way'])
    made.sort_values(['regime','seed','way']).to_csv(FILE, index=False)

if __name__=='__main__': main()
