"""The networks of the tutorial `first_student` over many seeds: the spread within which its numbers are to be expected.

    python benchmarks/first_student.py [--seeds 20] [--out benchmarks/first_student.csv]

One row a seed: accuracy in percent of 797 test digits of the teacher and of three students on the page's own 200 digits. The seed is that of the initial weights, the teacher's too."""
import argparse, csv
from pathlib import Path
import torch
from kd_fastai.demo import digits, recipes, score, train

def row(seed, student_epochs=20, teacher_epochs=10):
    "A teacher, and a student of each kind"
    teacher = train(digits(), 32, teacher_epochs, seed)
    dls = digits(200)
    learners = {'teacher': teacher, **{n: train(dls, 8, student_epochs, seed, kd) for n,kd in recipes(teacher.model, dls.one_batch()[0]).items()}}
    return {'seed': seed, **{n: round(score(o), 2) for n,o in learners.items()}}

def main():
    p = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    p.add_argument('--seeds', type=int, default=20); p.add_argument('--out', type=Path, default=Path(__file__).with_suffix('.csv'))
    a = p.parse_args()
    torch.set_num_threads(1)
    with a.out.open('w', newline='') as f:
        for seed in range(a.seeds):
            r = row(seed)
            if not seed: (w := csv.DictWriter(f, r, lineterminator='\n')).writeheader()
            w.writerow(r); f.flush(); print(*r.values(), flush=True)

if __name__=='__main__': main()
