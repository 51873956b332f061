"""Do the pilots of `kd_shrink` predict full training runs?

    python benchmarks/shrink.py [--seeds 3] [--epochs 16] [--labels 300]

All candidates of the family of a small residual network are trained with distillation for 1, 2, 4 and 8 epochs and in
full. Pilots and full runs have other seeds. `benchmarks/tables/shrink.csv` has a row for each pilot length: Spearman's
rank correlation of the mean accuracies, whether the pilots' best candidate is the best in full, and by how many points
it is below the best. `benchmarks/tables/shrink_runs.csv` has the mean accuracies."""
import argparse
from pathlib import Path
import pandas as pd
import torch
from scipy.stats import spearmanr
from torch import nn
from torchvision.models.resnet import BasicBlock
from fastai.basics import CrossEntropyLossFlat, Learner, accuracy, set_seed
from kd_fastai.all import KDReport  # noqa: F401  gives Learner its methods
from kd_fastai.demo import digits
from kd_fastai.report.measure import latency, multiply_adds
from kd_fastai.report.runs import RunTable, TrainRun, run_all
from kd_fastai.report.scores import first_batch
from kd_fastai.report.candidates import family
from kd_fastai.report.shrink import FINAL, student_learner

TABLES = Path(__file__).parent/'tables'
PILOTS = 1,2,4,8

def learner(dls, model):
    return Learner(dls, model, lr=1e-2, metrics=accuracy, loss_func=CrossEntropyLossFlat())

def teacher():
    "A residual network that learned from all digits"
    set_seed(0)
    blocks = nn.Sequential(*[BasicBlock(32, 32) for _ in range(2)])
    net = nn.Sequential(nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), blocks,
                        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))
    learn = learner(digits(), net)
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(8)
    return learn

def agreement(means, full):
    "How well the ranks of pilots agree with those of full runs"
    chosen = means.idxmax()
    return dict(spearman=spearmanr(means, full).statistic, same_best=chosen==full.idxmax(),
                points_below_best=100*(full.max()-full[chosen]))

def main():
    p = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    p.add_argument('--seeds', type=int, default=3)
    p.add_argument('--epochs', type=int, default=16)
    p.add_argument('--labels', type=int, default=300)
    p.add_argument('--runs', type=Path, help='csv of the runs, from which a stopped benchmark continues')
    a = p.parse_args()
    torch.set_num_threads(1)
    source = teacher()
    xb = first_batch(source.dls.valid)[:1]
    makers,data = family(source.model, xb),digits(a.labels)
    method,base = dict(teacher=source),learner(data, source.model)
    lengths = {**dict.fromkeys(PILOTS, 0), a.epochs: FINAL}
    tasks = [dict(name=f'{n}: distilled', make_learner=lambda seed, f=f: student_learner(base, f), method=method,
                  seed=start+s, epochs=e)
             for e,start in lengths.items() for s in range(a.seeds) for n,f in makers.items()]
    with RunTable(a.runs).kept() as table:
        run_all(TrainRun(), tasks, table, progress=False)
        runs = table.read()
    means = runs.pivot_table(index='method', columns='epochs', values='accuracy')
    means.index = means.index.str.replace(': distilled', '')
    rows = [dict(pilot_epochs=e, candidates=len(means), seeds=a.seeds, **agreement(means[e], means[a.epochs]))
            for e in PILOTS]
    pd.DataFrame(rows).round(3).to_csv(TABLES/'shrink.csv', index=False)
    nets = {n: f() for n,f in makers.items()}
    means['ms'] = pd.Series(latency(nets, xb))
    means['multiply_adds'] = pd.Series({n: multiply_adds(m, xb) for n,m in nets.items()})
    means.round(4).to_csv(TABLES/'shrink_runs.csv')
    print(pd.DataFrame(rows), means, f'teacher {source.validate()[1]:.4f}', sep='\n')

if __name__=='__main__': main()
