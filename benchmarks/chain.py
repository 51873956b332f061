"""Prune a trained student, then train it on with the same budget: on the labels alone, or with the teacher. What does
distillation recover?

    python benchmarks/chain.py [--seeds 8] [--epochs 10] [--amount 0.8] [--runs FILE] [--quick]

Every seed has its own labels and its own student, trained alone for 20 epochs. The same share of the smallest
weights of all its convolutions and of its head is set to zero (`torch.nn.utils.prune`), and stays zero. The teacher
learned from 1000 digits, the students from 200. Writes `benchmarks/tables/chain.csv`."""
import argparse
from functools import cache, partial
from pathlib import Path
import torch
from torch import nn
from torch.nn.utils import prune
from fastai.basics import CrossEntropyLossFlat, Learner, accuracy
from kd_fastai.callback import KnowledgeDistillationCallback
from kd_fastai.compare import kd_compare
from kd_fastai.demo import digits, small_net, train
from kd_fastai.losses import SoftTarget

AMOUNT = 0.8

@cache
def teacher(): return train(digits(), 32, 10, seed=0).model

@cache
def student(seed): return train(digits(200, seed), 8, 20, seed).model.state_dict()

def make_learner(seed):
    "A Learner with the trained student"
    learn = Learner(digits(200, seed), small_net(8), lr=3e-3, metrics=accuracy, loss_func=CrossEntropyLossFlat())
    learn.model.load_state_dict(student(seed))
    return learn

def prune_student(learn):
    "Set the smallest weights to zero; a mask keeps them there"
    parts = [(m, 'weight') for m in learn.model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    prune.global_unstructured(parts, prune.L1Unstructured, amount=AMOUNT)

def fine_tuned(learn): prune_student(learn)

def distilled(learn, weight=0.9, task_weight=0.1):
    prune_student(learn)
    return KnowledgeDistillationCallback(teacher(), partial(SoftTarget, T=4), weight=weight, task_weight=task_weight)

WAYS = {'pruned, fine-tuned': fine_tuned, 'pruned, distilled back': distilled,
        'pruned, both': partial(distilled, weight=0.5, task_weight=0.5), 'not pruned, trained on': None}

def main():
    global AMOUNT
    p = argparse.ArgumentParser(description=__doc__.split('\n\n')[0])
    p.add_argument('--seeds', type=int, default=8)
    p.add_argument('--epochs', type=int, default=10)
    p.add_argument('--amount', type=float, default=AMOUNT)
    p.add_argument('--runs', type=Path)
    p.add_argument('--quick', action='store_true')
    p.add_argument('--out', type=Path, default=Path(__file__).parent/'tables/chain.csv')
    a = p.parse_args()
    if a.quick: a.seeds,a.epochs,a.out = 2,1,Path('chain_quick.csv')
    AMOUNT = a.amount
    torch.set_num_threads(1)
    res = kd_compare(make_learner, WAYS, a.seeds, a.epochs, teacher=teacher(), csv=a.runs, rounds=0)
    res.table.drop(columns=['seconds','kb']).round(4).to_csv(a.out, index_label='way')
    print(res)

if __name__=='__main__': main()
