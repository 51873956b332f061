"""Which terms and weights should `learn.distill(teacher)` have? Baselines and students with a teacher, in several
regimes of digits and of Fashion-MNIST (14x14 pixels), where the teacher has more labels than the student.

    python benchmarks/defaults.py [--regimes ...] [--seeds 5] [--methods ...] [--folder FOLDER]

Runs go to `tables/defaults_runs.csv`, which is completed, and their comparison to `tables/defaults.csv`."""
import argparse, time
from functools import cache
from pathlib import Path
import pandas as pd
import torch
from fastai.basics import *
from fastai.callback.schedule import ParamScheduler  # gives Learner its fit_one_cycle  # noqa: F401
from kd_fastai.all import *
from kd_fastai.demo import digits, fashion, small_net
from sweep import TABLES
from pictures import Follow, feature, falling, fit, rising, soft, write_table

# data, labels, epochs, batch size
REGIMES = {'digits short': ('digits', 200, 5, 20), 'digits': ('digits', 200, 20, 20),
           'digits long': ('digits', 200, 80, 20), 'digits 50': ('digits', 50, 100, 20),
           'fashion 300, 24 steps': ('fashion', 300, 4, 50), 'fashion 300, 240 steps': ('fashion', 300, 40, 50),
           'fashion 300, 720 steps': ('fashion', 300, 120, 50),
           'fashion 3000, 240 steps': ('fashion', 3000, 4, 50), 'fashion 3000, 720 steps': ('fashion', 3000, 12, 50)}

def data(name, labels, seed, bs, folder):
    if name=='digits': return digits(labels, seed, bs)
    return fashion(labels, seed, bs, augment=False, size=14, test=4000, folder=folder)

@cache
def teacher(name, folder):
    set_seed(0, reproducible=True)
    learn = Learner(data(name, None if name=='digits' else 10_000, 100, 50, folder), small_net(32),
                    loss_func=CrossEntropyLossFlat(), metrics=accuracy)
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(10, 1e-2)
    return learn.model.eval()

def last(schedule, loss=CosineSmoothL1): return feature(schedule, '>', loss)

def kd(terms, *cbs, task_weight=1.):
    "A method: the terms, and other callbacks"
    def train(learn, teacher, epochs):
        fit(learn, epochs, [KnowledgeDistillationCallback(teacher, terms(), task_weight=task_weight), *cbs])
    return train

def with_layers(learn, teacher, epochs):
    "`learn.distill` with the layers that it finds"
    learn.distill(teacher, layers='auto')
    fit(learn, epochs, [])

def started(share, method):
    "A method that begins with the teacher's features, without labels, for a share of the epochs"
    def train(learn, teacher, epochs):
        n = round(share*epochs)
        learn.kd_pretrain(teacher, n)
        method(learn, teacher, epochs-n)
    return train

METHODS = {
    'baseline': lambda learn, teacher, epochs: fit(learn, epochs, []),
    'distill': kd(lambda: [Term(SoftTarget, T=4)]),
    'distill, layers': with_layers,
    'soft rising': kd(lambda: [soft(rising())]),
    'soft adapt': kd(lambda: [soft(None)], Follow()),
    'soft adapt rising': kd(lambda: [soft(rising())], Follow()),
    'soft adapt rising cap 10': kd(lambda: [soft(rising())], Follow(10.)),
    'soft adapt rising slow': kd(lambda: [soft(rising())], Follow(speed=.02)),
    'start third, soft rising': started(1/3, kd(lambda: [soft(rising())])),
    'soft .9/.1': kd(lambda: [Term(SoftTarget, .9, T=4)], task_weight=.1),
    'F x3 falling': kd(lambda: [last(falling(3))]),
    'F x3 falling, soft rising': kd(lambda: [last(falling(3)), soft(rising())]),
    'F x3 falling, soft adapt rising': kd(lambda: [last(falling(3)), soft(rising())], Follow()),
    'F x10 falling, soft adapt rising': kd(lambda: [last(falling(10)), soft(rising())], Follow()),
}

def run(regime, method, seed, folder):
    "Train one student. Returns its row"
    name,labels,epochs,bs = REGIMES[regime]
    t = teacher(name, folder)
    set_seed(seed, reproducible=True)
    learn = Learner(data(name, labels, seed, bs, folder), small_net(8), lr=1e-2, loss_func=CrossEntropyLossFlat(),
                    metrics=accuracy)
    set_seed(seed, reproducible=True)
    began = time.process_time()
    with learn.no_bar(), learn.no_logging(): METHODS[method](learn, t, epochs)
    took = time.process_time()-began
    with learn.no_bar(), learn.no_logging(): loss,acc = learn.validate()
    return dict(regime=regime, method=method, seed=seed, accuracy=acc, valid_loss=loss, seconds=round(took, 1))

def main():
    p = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    p.add_argument('--regimes', nargs='*', default=[*REGIMES], choices=[*REGIMES])
    p.add_argument('--seeds', type=int, default=5)
    p.add_argument('--methods', nargs='*', default=[*METHODS])
    p.add_argument('--folder', type=Path)
    p.add_argument('--file', type=Path, default=TABLES/'defaults_runs.csv')
    a = p.parse_args()
    torch.set_num_threads(1)
    for regime in a.regimes:
        for seed in range(a.seeds):
            runs = pd.read_csv(a.file) if a.file.exists() else pd.DataFrame(columns=['regime','method','seed'])
            done = {*zip(runs.regime, runs.method, runs.seed)}
            rows = [run(regime, w, seed, a.folder) for w in a.methods if (regime,w,seed) not in done]
            pd.concat([o for o in (runs, pd.DataFrame(rows)) if len(o)]).to_csv(a.file, index=False)
    write_table(pd.read_csv(a.file), ['regime'], a.file.with_name('defaults.csv'))

if __name__=='__main__': main()
