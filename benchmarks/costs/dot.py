"""What DOT costs: time of an epoch with and without it, as a ratio.

    python benchmarks/cost.py dot [--rounds 30]

Both Learners have the same student, teacher (twice as wide), `SoftTarget` and SGD with momentum, on the digits, and
take turns epoch by epoch. Ratios are medians over rounds, with quartiles."""
import argparse
from functools import partial
import torch
from fastai.basics import SGD, CrossEntropyLossFlat, Learner, noop, set_seed
from fastai.callback.progress import ProgressCallback
from clock import ms, ratio, take_turns, write
from kd_fastai.callback import KnowledgeDistillationCallback
from kd_fastai.demo import digits, small_net
from kd_fastai.methods.dot import DOT
from kd_fastai.losses import SoftTarget

def make_learner(width, bs, *cbs):
    "A Learner of the student, with its teacher"
    set_seed(0)
    kd = KnowledgeDistillationCallback(small_net(2*width), SoftTarget)
    learn = Learner(digits(bs=bs), small_net(width), loss_func=CrossEntropyLossFlat(), opt_func=partial(SGD, mom=0.9),
                    cbs=[kd, *cbs])
    learn.remove_cb(ProgressCallback)
    learn.logger = noop
    return learn

def measure(width, bs, rounds):
    "One row: milliseconds of an epoch's training, and their ratio"
    methods = {'plain': make_learner(width, bs), 'DOT': make_learner(width, bs, DOT())}
    times = take_turns({n: partial(o.fit, 1, 1e-2) for n,o in methods.items()}, rounds, warm=2)
    middle,low,high = ratio(times, 'DOT', 'plain')
    return {'width of student': width, 'batch': bs, 'plain ms': ms(times['plain']), 'DOT ms': ms(times['DOT']),
            'ratio': middle, 'lower quartile': low, 'upper quartile': high}

def main(rounds=30):
    "Measure and write the table"
    rows = [measure(width, bs, rounds) for width,bs in ((8,20), (32,100))]
    return write('dot', rows, "An epoch with DOT, and its validation, compared with one without, on 1000 digits.")

if __name__=='__main__':
    p = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    p.add_argument('--rounds', type=int, default=30)
    a = p.parse_args()
    torch.set_num_threads(1)
    main(a.rounds)
