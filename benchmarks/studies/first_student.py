"""The networks of the tutorial *lesson* over many seeds: the spread within which its numbers are to be expected.

    python benchmarks/accuracy.py first_student [--seeds 20] [--epochs 20] [--runs FILE]
        [--out benchmarks/tables/first_student.csv]

One row for each seed: accuracy in percent of 797 test digits of the teacher and of three students on the page's own 200
digits. The seed is that of the initial weights and batches, the teacher's too. `--runs` keeps the runs in a file,
from which a stopped measurement goes on."""
import argparse
from functools import cache, partial
from pathlib import Path
import torch
from fastai.basics import CrossEntropyLossFlat, Learner, accuracy
from kd_fastai.report.compare import kd_compare
from sweep import TABLES
from kd_fastai.demo import digits, recipes, score, small_net, train

@cache
def teacher(seed): return train(digits(), 32, 10, seed)

def make_learner(seed):
    learn = Learner(digits(200), small_net(8), lr=1e-2, metrics=accuracy, loss_func=CrossEntropyLossFlat())
    learn.seed = seed
    return learn

def method(name, learn):
    "The callback of one of the demo's recipes, with this seed's teacher"
    make = recipes(teacher(learn.seed).model, learn.dls.one_batch()[0])[name]
    return make and make(learn)

def main():
    p = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    p.add_argument('--seeds', type=int, default=20)
    p.add_argument('--epochs', type=int, default=20)
    p.add_argument('--runs', type=Path)
    p.add_argument('--out', type=Path, default=TABLES/'first_student.csv')
    a = p.parse_args()
    torch.set_num_threads(1)
    methods = {n: partial(method, n) for n in recipes(None, None)}
    res = kd_compare(make_learner, methods, a.seeds, a.epochs, csv=a.runs, rounds=0)
    table = res.runs.pivot(index='seed', columns='method', values='accuracy')[[*methods]].mul(100)
    table.insert(0, 'teacher', [score(teacher(s)) for s in table.index])
    table.round(2).to_csv(a.out)
    print(res)

if __name__=='__main__': main()
