"""What worker processes save in `kd_compare`: time of one comparison in this process, and in two.

    python benchmarks/cost.py compare [--epochs 40] [--rounds 2]

Eight seeds of two methods on the digits. New workers start in each round: it takes some seconds, in which
they import PyTorch and fastai, and counts."""
import argparse
from functools import partial
import torch
from fastai.basics import CrossEntropyLossFlat, Learner, accuracy, set_seed
from joblib.externals.loky import get_reusable_executor
from clock import ratio, take_turns, target, write
from kd_fastai.all import kd_compare
from kd_fastai.demo import digits, small_net

def make_learner(seed):
    "A student of 300 labels"
    set_seed(seed)
    return Learner(digits(labels=300, seed=seed), small_net(16), loss_func=CrossEntropyLossFlat(), metrics=accuracy)

def compare(teacher, epochs, workers):
    "One comparison"
    kd_compare(make_learner, {'baseline': None, 'distill': {}}, 8, epochs, teacher=teacher, rounds=0, workers=workers,
               progress=False)
    if workers: get_reusable_executor().shutdown()

def main(epochs=40, rounds=2):
    "Measure and write the table"
    set_seed(0)
    teacher = small_net(24)
    times = take_turns({n: partial(compare, teacher, epochs, n) for n in (0,2)}, rounds, warm=0)
    middle,low,high = ratio(times, 0, 2)
    row = {'epochs': epochs, 'one process, s': min(times[0]), 'two, s': min(times[2]), 'times faster': middle,
           'lower quartile': low, 'upper quartile': high}
    write('compare_workers', [row], 'A comparison in one process and in two: seconds, and how many times faster.')
    return [target('comparison in two processes to one', ratio(times, 2, 0), 1/1.7)]

if __name__=='__main__':
    p = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    p.add_argument('--epochs', type=int, default=40); p.add_argument('--rounds', type=int, default=2)
    a = p.parse_args()
    torch.set_num_threads(1)
    print(main(a.epochs, a.rounds))
