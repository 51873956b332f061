"""How the cost of a step grows: with the batch, the layers looked at, their channels, and the number of classes.

    python benchmarks/cost.py scale [--rounds 7]

One thing grows, the others stay at 32 images of 32x32, one layer, 64 channels and 100 classes. Teacher and student
are alike, so that neither hides the other."""
import argparse
import torch
from fastai.basics import set_seed
from kd_fastai.all import Attention, CachedTeacher, KnowledgeDistillationCallback, SoftTarget, Term
from clock import ms, peak_mib, take_turns, write
from costs.step import fastai_step
from nets import plain

def measure(batch=32, layers=1, channels=64, classes=100, topk=None, rounds=7):
    "A step's milliseconds and MiB, by part and by method"
    set_seed(0)
    teacher,student,x,y = (plain(channels, classes).eval(),plain(channels, classes),torch.randn(batch,3,32,32),
                           torch.randint(classes, (batch,)))
    def kd(t):
        return fastai_step(student, x, y,
                           [KnowledgeDistillationCallback(t, [SoftTarget, *[Term(Attention, 100.)]*bool(layers)],
                                                          [str(i) for i in range(layers)] or None)])
    def ask():
        with torch.no_grad(): teacher(x)
    fs = {'baseline': fastai_step(student, x, y), 'teacher forward': ask, 'distilled': kd(teacher),
          'distilled, cached': kd(CachedTeacher(teacher, topk=topk))}
    times = take_turns(fs, rounds, warm=2)
    return {**{f'ms {n}': ms(t) for n,t in times.items()},
            **{f'MiB {n}': peak_mib(fs[n]) for n in ('baseline','distilled','distilled, cached')}}

GROWTH = dict(batch=[8,32,128], layers=[0,1,2,3], channels=[16,64,128,256], classes=[10,1000,10000,100000])

def main(rounds=7):
    "Measure, and write the table"
    def row(what, n):
        return {'grows': what, 'to': n, **measure(**{what: n}, topk=5 if what=='classes' else None, rounds=rounds)}
    write('scale', [row(what, n) for what,ns in GROWTH.items() for n in ns],
          'What a step costs as one thing grows. Where classes grow, the cache keeps the 5 likeliest of them.')
    return []

if __name__=='__main__':
    p = argparse.ArgumentParser(description=__doc__.split('\n')[0]); p.add_argument('--rounds', type=int, default=7)
    torch.set_num_threads(1)
    main(p.parse_args().rounds)
