"""Which student? `kd_shrink` on color pictures, and whether its short pilots predict full training runs.

    python benchmarks/shrink.py pilots [--data digits|fashion]
    python benchmarks/shrink.py student --seeds 5
    python benchmarks/shrink.py student --half report
    python benchmarks/shrink.py slices

The color pictures, the teacher (a fine-tuned EfficientNet-Lite0) and the views of each picture are those of
`pictures.py`. `kd_shrink` was made on its half `choose`. The rule by which it chooses was fixed before its first run on
the half `report`, which was the only one. So was the number of seeds: on `choose`, 5 left the comparison with the
hand-picked network open, and 8 would decide if the mean difference stays. Pilots and full runs have other seeds.

`pilots` trains all candidates for 2, 4 and 8 epochs and in full, which is 12: Spearman's rank correlation of the
mean accuracies, whether the pilots' best candidate is the best in full, by how many points it is below the best, and
how often a pilot of one seed chooses the best. `student` shrinks the teacher to a tenth of its latency, and compares
the result with a network of equal latency that was chosen by hand and trained without a teacher. With
`--first-seed 20` it is a second run from other seeds. `slices` trains
copies of the teacher that begin from its weights, and from new ones."""
import argparse, os
os.environ.setdefault('OMP_NUM_THREADS', '1')
from functools import partial
import pandas as pd
import torch
from scipy.stats import spearmanr
from torch import nn
from torchvision.models.resnet import BasicBlock
from fastai.basics import CrossEntropyLossFlat, DataLoaders, Learner, L, accuracy, set_seed
from kd_fastai.report.report import KDReport  # noqa: F401  gives Learner its methods
from kd_fastai.demo import digits, fashion
from kd_fastai.report.candidates import family
from kd_fastai.report.compare import comparison_table, paired_interval
from kd_fastai.report.runs import RunTable, TrainRun, run_all
from kd_fastai.report.scores import first_batch
from kd_fastai.report.shrink import FINAL, fits_budget, measure_candidates, student_learner
from data import lite0
from sweep import NoValidation, TABLES

PILOTS,EPOCHS,SEEDS,BATCH = (2,4,8),12,3,32

# --- data and teachers

def pictures_teacher(half='choose', labels=1142):
    "The fine-tuned EfficientNet-Lite0 with its data"
    from pictures import FOLDER, batches, random_view, recorded
    o = recorded(half, labels)
    net = lite0(9)
    net.load_state_dict(torch.load(FOLDER/f'{half}_{labels}_weights.pt'))
    dls = DataLoaders(batches(o['views'], o['y'], tfm=random_view), batches(*o['valid'], bs=256, shuffle=False))
    return learner(dls, net)

def digits_teacher():
    "A residual network that learned from all digits; its students learn from 300"
    set_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), BasicBlock(32, 32),
                        BasicBlock(32, 32), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))
    learn = learner(digits(), net)
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(8)
    return learner(digits(300), net)

def fashion_teacher():
    "A residual network that learned from 10,000 images of Fashion-MNIST, of 14x14; its students learn from 3,000"
    small = partial(fashion, bs=100, augment=False, size=14, test=4000)
    set_seed(0)
    learn = learner(small(10_000, seed=1), net(residual, (16,32,64), 2, 10, 1))
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(8, cbs=NoValidation())
    return learner(small(3000), learn.model)

def learner(dls, model):
    return Learner(dls, model, lr=1e-2, metrics=accuracy, loss_func=CrossEntropyLossFlat())

SEEN = {}  # not in the module, whose digest must not change

class Remembers(nn.Module):
    "A model that predicts once for each picture: eight views of each repeat"
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        keys = [hash(o.contiguous().numpy().tobytes()) for o in x]
        new = [i for i,k in enumerate(keys) if k not in SEEN]
        if new: SEEN.update(zip([keys[i] for i in new], self.model(x[new])))
        return torch.stack([SEEN[k] for k in keys])

# --- candidates

def conv(ni, nf, stride=1, groups=1, ks=3):
    return nn.Sequential(nn.Conv2d(ni, nf, ks, stride, ks//2, groups=groups, bias=False), nn.BatchNorm2d(nf), nn.ReLU())

def separable(ni, nf, stride): return nn.Sequential(conv(ni, ni, stride, ni), conv(ni, nf, ks=1))

def residual(ni, nf, stride):
    change = nn.Sequential(nn.Conv2d(ni, nf, 1, stride, bias=False), nn.BatchNorm2d(nf)) if stride>1 or ni!=nf else None
    return BasicBlock(ni, nf, stride, change)

def net(block, widths, repeat=1, n_classes=9, n_in=3):
    "A stem with stride 2, and stages of blocks, of which the first has stride 2"
    stages = [block(i, o, 2) for i,o in zip(widths, widths[1:])]
    stages = [nn.Sequential(s, *[block(o, o, 1) for _ in range(repeat-1)]) for s,o in zip(stages, widths[1:])]
    return nn.Sequential(conv(n_in, widths[0], 2), *stages, nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                         nn.Linear(widths[-1], n_classes))

CANDIDATES = {
    'plain 16-128': partial(net, conv, (16,32,64,128)),
    'plain 24-192': partial(net, conv, (24,48,96,192)),
    'separable 16-128': partial(net, separable, (16,32,64,128)),
    'separable 24-192': partial(net, separable, (24,48,96,192)),
    'separable 16-128, twice': partial(net, separable, (16,32,64,128), 2),
    'residual 8-64': partial(net, residual, (8,16,32,64)),
    'residual 16-64': partial(net, residual, (16,32,64))}
HAND = 'plain 24-192'  # the first idea of many: 3x3 convolutions that double their channels

# --- studies

def train(learn, epochs, cbs=None): learn.fit_one_cycle(epochs, cbs=[*L(cbs), NoValidation()])

def tasks(source, makers, method, lengths):
    "Training runs with the names that `kd_shrink` gives, so that they share a csv: `{epochs: seeds}`"
    return [dict(name=f'{n}: distilled', make_learner=lambda seed, f=f: student_learner(source, f), method=method,
                 seed=s, epochs=e) for e,seeds in lengths.items() for s in seeds for n,f in makers.items()]

def trained(todo, csv):
    "Train what the csv does not have, and return all runs"
    table = RunTable(csv)
    run_all(TrainRun(train), todo, table, progress=False, finished=lambda row, _: print(
        {k: row[k] for k in ('method','seed','epochs','accuracy','seconds')}, flush=True))
    return table.read()

def agreement(runs, epochs, full):
    "How well the ranks of pilots agree with those of full runs"
    pilots = runs[runs.epochs==epochs].pivot(index='method', columns='seed', values='accuracy')
    means = pilots.mean(axis=1)
    chosen,each = means.idxmax(),pilots.idxmax()
    return dict(pilot_epochs=epochs, candidates=len(means), pilot_seeds=pilots.shape[1],
                spearman=spearmanr(means, full[means.index]).statistic, chosen=chosen, best=full.idxmax(),
                points_below_best=100*(full.max()-full[chosen]), one_seed_agrees=(each==full.idxmax()).mean())

def candidates_of(data, source, xb):
    "Candidates of a study: on pictures, those that `student` chooses from"
    if data=='digits': return family(source.model, xb)
    if data=='fashion': return {n: partial(f, n_classes=10, n_in=1) for n,f in CANDIDATES.items()}
    fits = fits_budget(measure_candidates(source.model, CANDIDATES, xb), faster=10)
    return {n: CANDIDATES[n] for n in fits}

def pilots(data, source, method, xb):
    makers = candidates_of(data, source, xb)
    lengths = {**dict.fromkeys(PILOTS, range(2)), EPOCHS: range(FINAL, FINAL+SEEDS)}
    runs = trained(tasks(source, makers, method, lengths), TABLES/f'shrink_{data}_runs.csv')
    runs = runs[runs.method.isin(f'{n}: distilled' for n in makers)]
    full = runs[(runs.epochs==EPOCHS) & (runs.seed<FINAL+SEEDS)].groupby('method').accuracy.mean()
    table = pd.DataFrame([agreement(runs[runs.seed<FINAL], e, full) for e in PILOTS])
    table.round(3).to_csv(TABLES/f'shrink_{data}_pilots.csv', index=False)
    print(full, table.to_string(), sep='\n')

def student(data, source, method, xb, half='choose', first_seed=0, seeds=10):
    name = half if first_seed==0 else f'{half}_again'
    csv = TABLES/f'shrink_{name}_runs.csv'
    pilot_seeds,seeds = (range(first_seed, first_seed+n) for n in (2,seeds))
    found = source.kd_shrink(faster=10, candidates=CANDIDATES, epochs=EPOCHS, pilot_epochs=2, seeds=seeds,
                             pilot_seeds=pilot_seeds, method=method, fit=train, batch_size=BATCH, csv=csv,
                             progress=False)
    by_hand = f'by hand, {HAND}'
    runs = trained([dict(name=by_hand, make_learner=lambda seed: student_learner(source, CANDIDATES[HAND]), method=None,
                         seed=FINAL+s, epochs=EPOCHS) for s in seeds], csv)
    hand = runs[runs.method==by_hand].set_index('seed').accuracy
    table,best = found.table,f'{found.best}, distilled'
    table.loc[by_hand] = dict(runs=len(hand), score=hand.mean(), **found.costs.loc[HAND])
    gain = paired_interval(found.final('distilled')-hand)
    table.loc[best,['gain','gain_low','gain_high','verdict']] = [*gain.values()]
    table.round(4).rename_axis('student').to_csv(TABLES/f'shrink_{name}_student.csv')
    found.costs.round(4).rename_axis('candidate').to_csv(TABLES/f'shrink_{name}_costs.csv')
    pd.concat(dict(found.rounds), names=['epochs']).round(4).to_csv(TABLES/f'shrink_{name}_rounds.csv')
    seconds = runs.seconds[runs.method!=by_hand].sum()
    print(found, table.T, f'{seconds/60:.1f} minutes of processor', sep='\n')

def slices(data, source, method, xb, epochs=8, seeds=4):
    todo = []
    for start in ('new','sliced'):
        makers = family(source.model, xb, (1/4,), (1/2,), start=='sliced')
        for o in tasks(source, makers, method, {epochs: range(seeds)}):
            todo.append({**o, 'name': f"{start}: {o['name'].removesuffix(': distilled')}"})
    runs = trained(todo, TABLES/f'shrink_{data}_slices_runs.csv')
    names = [*dict.fromkeys(runs.method)]
    table = comparison_table(runs.drop(columns=['start','settings']), 'accuracy',
                             {n: n.replace('sliced', 'new') for n in names})
    table[['runs','mean','std','gain','low','high','verdict','parameters','seconds']].round(4).rename_axis(
        'student').to_csv(TABLES/f'shrink_{data}_slices.csv')
    print(table.to_string())

def main():
    p = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    p.add_argument('study', choices=['pilots','student','slices'])
    p.add_argument('--half', default='choose', choices=['choose','report'], help='of `student`')
    p.add_argument('--first-seed', type=int, default=0, help='of `student`')
    p.add_argument('--seeds', type=int, default=10, help='of `student`: its full runs')
    p.add_argument('--data', default='pictures', choices=['pictures','digits','fashion'])
    a = p.parse_args()
    torch.set_num_threads(1)
    teachers = dict(pictures=partial(pictures_teacher, a.half), digits=digits_teacher, fashion=fashion_teacher)
    source = teachers[a.data]()
    xb = first_batch(source.dls.valid)[:1]
    method = dict(teacher=source if a.data=='digits' else Remembers(source.model))
    xb = tuple(o[:BATCH] for o in xb)
    studies = dict(pilots=pilots, slices=slices,
                   student=partial(student, half=a.half, first_seed=a.first_seed, seeds=a.seeds))
    studies[a.study](a.data, source, method, xb)

if __name__=='__main__': main()
