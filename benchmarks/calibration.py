"""How often does `kd_compare` call a method better or worse that does not differ from the baseline?

    python benchmarks/calibration.py [--draws 2000] [--pool 120] [--runs FILE] [--quick]

Simulated: the scores of a seed share a normal part, each method adds its own, and all are rounded to 1/797 as an
accuracy is. Real: students of 100 digits that differ only in the order of batches, and such with a teacher of random
weights at a weight of 1e-3. The real runs are a pool of seeds from which each comparison draws its own without
replacement. `--runs` keeps them in a file, from which a stopped measurement goes on. Writes
`benchmarks/tables/compare_calibration.csv`."""
import argparse
from pathlib import Path
import numpy as np
import pandas as pd
import torch
from fastai.basics import Callback, CrossEntropyLossFlat, Learner, accuracy
from kd_fastai.callback import KnowledgeDistillationCallback
from kd_fastai.report.compare import kd_compare, paired_interval
from kd_fastai.demo import digits, small_net
from kd_fastai.losses import SoftTarget
from sweep import TABLES

LEVEL = 0.95

def verdicts(scores):
    "Verdicts of all columns but the first against it"
    return [paired_interval(scores[w]-scores.iloc[:,0], LEVEL, scores.shape[1]-1)['verdict']
            for w in scores.columns[1:]]

def rates(task, draw, seeds, methods, draws):
    "A row of the table: shares of comparisons with a false verdict"
    said = [verdicts(draw()) for _ in range(draws)]
    return dict(task=task, seeds=seeds, methods=methods, comparisons=draws,
                false_better=np.mean(['better' in o for o in said]),
                false_verdict=np.mean([{*o}!={'undecided'} for o in said]), at_most=round(1-LEVEL, 4))

def simulated(g, seeds, methods, shared=0.02, own=0.01):
    "Rounded scores of methods that do not differ"
    scores = 0.92+shared*g.standard_normal((seeds,1))+own*g.standard_normal((seeds,methods+1))
    return pd.DataFrame((scores*797).round()/797)

class OtherOrder(Callback):
    "Draw another order of batches"
    def __init__(self, offset): self.offset = offset
    def before_fit(self): self.dls.train.rng.seed(1000*self.offset+self.dls.train.rng.randrange(10**6))

def make_learner(seed):
    return Learner(digits(100, seed), small_net(4), lr=3e-2, metrics=accuracy, loss_func=CrossEntropyLossFlat())

def noise(learn):
    "A teacher that knows nothing, too light to harm, and another order of batches"
    kd = KnowledgeDistillationCallback(small_net(4), SoftTarget, weight=1e-3)
    return [kd, OtherOrder(3)]

def main():
    p = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    p.add_argument('--draws', type=int, default=2000)
    p.add_argument('--pool', type=int, default=120)
    p.add_argument('--runs', type=Path)
    p.add_argument('--quick', action='store_true')
    p.add_argument('--out', type=Path, default=TABLES/'compare_calibration.csv')
    a = p.parse_args()
    if a.quick: a.draws,a.pool,a.out = 20,6,Path('compare_calibration_quick.csv')
    torch.set_num_threads(1)
    g = np.random.default_rng(0)
    rows = [rates('simulated', lambda n=n, w=w: simulated(g, n, w), n, w, a.draws)
            for n,w in ((3,1), (5,1), (5,3), (5,10), (10,3))]
    methods = {'baseline': None, 'order 1': lambda learn: OtherOrder(1), 'order 2': lambda learn: OtherOrder(2),
            'noise teacher': noise}
    runs = kd_compare(make_learner, methods, a.pool, epochs=8, rounds=0, csv=a.runs).runs
    pool = runs.pivot(index='seed', columns='method', values='accuracy')[[*methods]]
    rows.append(rates('real digits', lambda: pool.sample(5, random_state=g), 5, 3, a.draws))
    pd.DataFrame(rows).to_csv(a.out, index=False)
    print(pd.DataFrame(rows).to_string())

if __name__=='__main__': main()
