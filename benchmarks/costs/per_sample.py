"""Time of the values of single samples, forward and backward, as a ratio to the plain loss.

    python benchmarks/cost.py per_sample [--rounds 200] [--batch 64 256] [--classes 100 1000] [--channels 64]
        [--only Logits]

For each loss that is a mean over samples: the loss, and the mean of its `per_sample` values, weighted sample by
sample. Both take turns on the same inputs, those of `losses`; ratios are medians over rounds, with quartiles. Losses
on predictions are written by `mean_of_samples`; the others are vectorized by `torch.func.vmap`."""
import argparse
from functools import partial
import torch
from clock import ms, ratio, take_turns, write
from costs.losses import LOSSES, inputs, step, students
from kd_fastai.losses.facts import has_sample_values, loss_args, per_sample

def uses_features(name): return 'fm_s' in loss_args(LOSSES[name]).accepted

def measure(name, B, C, rounds):
    "One row: milliseconds of the plain loss and of the weighted values, and their ratio"
    torch.manual_seed(0)
    f,x,w = LOSSES[name],inputs(name, B, C, classes=C),torch.rand(B)
    leaves = students(x)
    methods = {'plain': partial(f, **x), 'values': lambda: w@per_sample(f)(**x)/B}
    times = take_turns({k: partial(step, v, leaves) for k,v in methods.items()}, rounds)
    middle,low,high = ratio(times, 'values', 'plain')
    return {'loss': name, 'B': B, 'C': C, 'plain ms': ms(times['plain']), 'values ms': ms(times['values']),
            'ratio': middle, 'lower quartile': low, 'upper quartile': high}

def main(rounds=200, batch=(64,256), classes=(100,1000), channels=(64,), only=None):
    "Measure and write the table"
    names = [n for n in only or LOSSES if has_sample_values(LOSSES[n])]
    rows = [measure(n, B, C, rounds//10 if uses_features(n) else rounds) for n in names for B in batch
            for C in (channels if uses_features(n) else classes)]
    return write('per_sample', rows, "Weighted values of samples compared with the plain loss, forward and backward.")

if __name__=='__main__':
    p = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    p.add_argument('--rounds', type=int, default=200)
    p.add_argument('--batch', type=int, nargs='+', default=[64,256])
    p.add_argument('--classes', type=int, nargs='+', default=[100,1000])
    p.add_argument('--channels', type=int, nargs='+', default=[64])
    p.add_argument('--only', nargs='*', choices=LOSSES)
    torch.set_num_threads(1)
    main(**vars(p.parse_args()))
