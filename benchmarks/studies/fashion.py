"""Losses on Fashion-MNIST: small students with few labels, without and with a teacher, over paired seeds.

    python benchmarks/accuracy.py fashion [--students thin mixer] [--labels 100 1000 10000] [--steps 2400] [--seeds 8]
        [--only METHOD ...] [--folder FOLDER] [--cache FOLDER] [--hours 1] [--picture FILE] [--quick]

Every method of a seed has the same initial weights, labeled images, batches, shifts and flips; methods with 10,000
images have other batches, of the same number. The score is the accuracy on the 10,000 test images at the end.
Temperatures and weights are those of the papers (`paper`), found by `weight='auto'` (`auto`), or those of
`learn.distill(teacher)`. The learning rate is that of the digits (thin), or was chosen for the baseline on 5,000
training images that it did not learn from (mixer, `--choose`). No weight, temperature, rate or length was chosen on
the test images. A training run takes 2,400 steps of 100 images, with fewer than 1,000 labels 600.

The teacher is trained once, on all 60,000 images, and kept in `--cache` with the finished runs, from which a stopped
benchmark goes on. It predicts each version of an image once (`CachedTeacher` with a view for each epoch), for
all methods of a seed. `--hours` ends the benchmark after the run that exceeds them.

Writes `benchmarks/tables/fashion_runs.csv`, a row for each run, `fashion.csv`, a row for each method, and
`fashion.md`."""
import argparse, hashlib, tempfile, time
from datetime import datetime
from functools import partial
from pathlib import Path
import pandas as pd
import torch
from torch import nn
from fastai.basics import CrossEntropyLossFlat, L, Learner, accuracy, set_seed
import fastai.callback.schedule  # noqa: F401, gives Learner its fit_one_cycle
from kd_fastai.teacher.cached import CachedTeacher, StoredTeacher
from kd_fastai.callback import KnowledgeDistillationCallback, Term
from kd_fastai.report.compare import comparison_table, kd_compare, paired_interval
from kd_fastai.report.measure import size_kb
from kd_fastai.demo import fashion
from kd_fastai.losses.facts import get_loss_info
from kd_fastai.objective import AUTO_RATIO
from kd_fastai.losses import Attention, DecoupledKD, FitNet, Logits, RKD, Similarity, SoftTarget
import clock
from nets import mixer, resnet
from peers import peers
from sweep import TABLES, NoValidation

STUDENTS = {'thin': partial(resnet, 6), 'mixer': partial(mixer, 32)}
LR = {'thin': 1e-2, 'mixer': 1e-2}  # thin: that of the digits; mixer: by --choose
BS = 100
LABELS = [100,1000,10_000]

def default_steps(labels):
    "Steps of a training run with this number of labels"
    return 600 if labels<1000 else 2400

def epochs_of(steps, images):
    "Epochs of this many images that take about this many steps, at least one"
    return max(1, steps*BS//images)

# --- the teacher

def train_teacher(data, epochs):
    "A teacher and its accuracy"
    set_seed(0, reproducible=True)
    learn = Learner(fashion(bs=128, **data), resnet(24), loss_func=CrossEntropyLossFlat(), metrics=accuracy)
    with learn.no_bar(): learn.fit_one_cycle(epochs, 1e-2, wd=0.01)
    return learn.model,learn.validate()[1]

def get_teacher(folder, data, epochs):
    "The teacher of this folder, trained if it is not there, and its accuracy"
    file,net = folder/f'teacher{epochs}.pt',resnet(24)
    if not file.exists():
        net,score = train_teacher(data, epochs)
        torch.save(dict(weights=net.state_dict(), accuracy=score), file)
    saved = torch.load(file, weights_only=True)
    net.load_state_dict(saved['weights'])
    return net.eval().requires_grad_(False),saved['accuracy']

PREDICTED = {}   # by the content of a batch; no attribute of the model, to whose identity it would belong

class OncePerBatch(nn.Module):
    "A model that predicts each batch once: all students are compared with it on the test images"
    def __init__(self, model):
        super().__init__()
        self.model = model
    def forward(self, x):
        key = hashlib.blake2b(x.numpy().tobytes()).digest()
        if key not in PREDICTED: PREDICTED[key] = self.model(x)
        return PREDICTED[key]

class Predictions:
    "Predictions of a teacher for the images of one seed, in all versions; those of the last seed only are kept"
    LAYERS = ['middle','late','pool']
    def __init__(self, teacher): self.teacher,self.key,self.folder = teacher,None,None
    def of(self, learn, epochs):
        "A teacher with predictions for the data of this Learner"
        if self.key!=(learn.seed, epochs, learn.dls.train.n):
            if self.folder: self.folder.cleanup()
            self.folder = tempfile.TemporaryDirectory()
            teacher = CachedTeacher(self.teacher, self.folder.name, layers=self.LAYERS, half=True, views=epochs,
                                    seed=learn.seed)
            teacher.fill(learn.dls, bar=False)
            self.key = learn.seed, epochs, learn.dls.train.n
        return StoredTeacher(self.folder.name)

# --- the methods

def paper(loss, **params): return Term(loss, weight=get_loss_info(loss).weight, **params)
def auto(loss, **params): return Term(loss, weight='auto', schedule=None, **params)

BASELINE,DEFAULT = 'baseline','learn.distill(teacher)'
MAPS = {'thin': ['middle','late'], 'mixer': ['middle']}  # of the same sizes as the teacher's
LATE,POOL,HINT = dict(layers=['late']),dict(layers=['pool']),dict(layers=['middle'], adapt='auto')

def ours(maps):
    "Terms and task weight of each method"
    return {
        DEFAULT:             lambda: ([Term(SoftTarget, T=4)], 1.),
        'SoftTarget, auto':  lambda: ([auto(SoftTarget, T=4)], 1.),
        'SoftTarget, paper': lambda: ([Term(SoftTarget, weight=0.9, T=4)], 0.1),
        'DecoupledKD, auto': lambda: ([auto(DecoupledKD)], 1.),
        'Logits, auto':      lambda: ([auto(Logits)], 1.),
        'Attention, auto':   lambda: ([auto(Attention, layers=maps)], 1.),
        'FitNet, auto':      lambda: ([auto(FitNet, **HINT)], 1.),
        'RKD, auto':         lambda: ([auto(RKD, **POOL)], 1.),
        'Similarity, auto':  lambda: ([auto(Similarity, **LATE)], 1.),
        'DecoupledKD, paper': lambda: ([paper(DecoupledKD)], 1.),
        'Attention, paper':  lambda: ([paper(Attention, layers=maps)], 1.),
        'RKD, paper':        lambda: ([paper(RKD, **POOL)], 1.),
        'Similarity, paper': lambda: ([paper(Similarity, **LATE)], 1.)}

FIRST = [BASELINE, *[*ours([])][:9]]

def distilled(predictions, make, epochs, learn):
    "The callback of a method"
    terms,task_weight = make()
    return KnowledgeDistillationCallback(predictions.of(learn, epochs), terms, task_weight=task_weight)

MORE = 10_000

def more_images(learn, data, steps):
    "Train on 10,000 images for this number of steps"
    learn.epochs = epochs_of(steps, MORE)
    learn.dls = fashion(MORE, learn.seed, bs=BS, **data)

def imitating(teacher, data, steps, learn):
    "The callback of a student that learns only from the teacher, on images whose labels are not used"
    more_images(learn, data, steps)
    return KnowledgeDistillationCallback(teacher, [Term(SoftTarget, weight=1., T=4)], task_weight=0.)

def more(teacher, data, steps):
    "Methods with more images, by name"
    return {'imitation, 10,000 images without labels': partial(imitating, teacher, data, steps),
            'baseline, 10,000 labels': partial(more_images, data=data, steps=steps)}

def baseline(): return [Term(SoftTarget, weight=0.)],1.  # weight 0: the same versions of the images

# --- the benchmark

def fit(learn, epochs, cbs=None):
    learn.fit_one_cycle(getattr(learn, 'epochs', epochs), cbs=[*L(cbs), NoValidation()])

def make_learner(student, labels, data, seed):
    "A Learner with an untrained student"
    dls = fashion(labels, seed, bs=BS, **data)
    learn = Learner(dls, STUDENTS[student](), lr=LR[student], metrics=accuracy, loss_func=CrossEntropyLossFlat())
    learn.seed = seed
    return learn

def read_runs(file):
    "The runs of a comparison, with those that were set aside"
    parts = [pd.read_csv(f, dtype={'start': str, 'settings': str}) for f in (file, aside(file)) if f.exists()]
    if not parts: return pd.DataFrame(columns=['seed','method'])
    return pd.concat(parts, ignore_index=True).drop_duplicates(['seed','method'])

def aside(file): return file.with_suffix('.aside.csv')

def set_aside(file, names):
    "Leave in the file the runs of these methods only: `kd_compare` completes all methods that a file has"
    runs = read_runs(file)
    for f,part in ((aside(file), runs[~runs.method.isin(names)]), (file, runs[runs.method.isin(names)])):
        part.to_csv(f, index=False) if len(part) else f.unlink(missing_ok=True)

def compare(student, labels, steps, names, seeds, teacher, data, file, deadline):
    "One comparison: a student, a number of labels. Seed by seed, until the deadline"
    epochs = epochs_of(steps, labels)
    predictions,every = Predictions(teacher),{BASELINE: baseline, **ours(MAPS[student]), **peers(MAPS[student])}
    set_aside(file, names)
    methods = {n: partial(distilled, predictions, every[n], epochs) for n in every if n in names}
    methods |= {n: method for n,method in more(teacher, data, steps).items() if n in names}
    seen = OncePerBatch(teacher)
    for n in range(1, seeds+1):
        kd_compare(partial(make_learner, student, labels, data), methods, n, epochs, csv=file, rounds=0, teacher=seen,
                   fit=fit, progress=False)
        print(f"{datetime.now():%H:%M} {student}, {labels} labels: {n} of {seeds} seeds", flush=True)
        if time.time()>deadline: break

GROUP = ['student','labels','steps','auto_ratio']

def results(folder, steps):
    "The runs of all comparisons in a folder, and their table"
    runs,tables = [],[]
    for student in STUDENTS:
        for n,k in steps.items():
            one = read_runs(runs_file(folder, student, n, k))
            if not len(one): continue
            group = dict(zip(GROUP, (student, n, k, ratios())))
            table = comparison_table(one, 'accuracy', BASELINE).drop(columns=['epochs','seconds','valid_loss'])
            runs.append(one.drop(columns='settings').assign(**group))
            tables.append(table.rename_axis('method').reset_index().assign(**group))
    def joined(parts):
        res = pd.concat(parts, ignore_index=True)
        return res[[*GROUP, *(c for c in res if c not in GROUP)]]
    return joined(runs),joined(tables)

def teacher_row(teacher, score):
    return pd.DataFrame([dict(student='', labels=60_000, method='teacher', runs=1, mean=score, kb=size_kb(teacher),
                              parameters=sum(p.numel() for p in teacher.parameters()))])

PICTURED = {BASELINE: 'baseline', DEFAULT: 'with a teacher,\nthe same images',
            'imitation, 10,000 images without labels': 'with a teacher, 10,000\nimages, no labels'}

def draw(ax, runs, teacher, title):
    "Draw the accuracy in the methods of `PICTURED`: a dot for each seed, means with intervals"
    scores = runs.pivot(index='seed', columns='method', values='accuracy').mul(100)[[*PICTURED]]
    ax.axhline(100*teacher, color='k', ls='--', lw=1)
    ax.text(-.4, 100*teacher, 'teacher, 60,000 labels', va='bottom', size=8)
    for i,method in enumerate(PICTURED):
        ax.plot([i]*len(scores), scores[method], 'o', color='C7' if method==BASELINE else 'C2', alpha=.5)
        ax.plot(i, scores[method].mean(), 'k_', ms=26, mew=2)
        d = paired_interval(scores[method]-scores[BASELINE])
        if method!=BASELINE: ax.text(i+.16, scores[method].mean(),
            f"{d['gain']:+.1f}\n({d['low']:.1f} to {d['high']:.1f})", va='center', size=8)
    ax.set(xticks=range(len(PICTURED)), xlim=(-.5, len(PICTURED)-.2), title=title)
    ax.set_xticklabels(PICTURED.values(), size=8)

def picture(runs, teacher, file):
    "Draw the thin student with 100 and with 1,000 labels"
    import matplotlib; matplotlib.use('agg')
    import matplotlib.pyplot as plt
    fig,axs = plt.subplots(1, 2, sharey=True, figsize=(9, 3.6), layout='constrained')
    for ax,labels in zip(axs, (100,1000)):
        draw(ax, runs[(runs.student=='thin') & (runs.labels==labels)], teacher,
             f'{labels:,} labels, {default_steps(labels):,} steps')
    axs[0].set(ylim=(None, 100*teacher+1.5), ylabel='% of 10,000 test images right')
    fig.savefig(file, dpi=130)

def ratios():
    "The constant of `weight='auto'` as text"
    return ', '.join(f'{k} {v:g}' for k,v in AUTO_RATIO.items())

def runs_file(folder, student, labels, steps):
    "The file of one comparison. Another ratio is another comparison"
    return folder/f"{student}_{labels}_{steps}_{'_'.join(f'{v:g}' for v in AUTO_RATIO.values())}.csv"

def choose(students, steps, data, seeds=1):
    "Accuracy of the baseline for several learning rates, on 5,000 training images that it does not learn from"
    for student in students:
        for n,k in steps.items():
            for lr in (3e-3, 1e-2, 3e-2):
                scores = []
                for seed in range(seeds):
                    set_seed(seed, reproducible=True)
                    learn = make_learner(student, n, dict(data, holdout=5000), seed)
                    with learn.no_bar(), learn.no_logging():
                        learn.fit_one_cycle(epochs_of(k, n), lr, cbs=NoValidation())
                    with learn.no_bar(): scores.append(learn.validate()[1])
                print(f'{student}, {n} labels, lr {lr:g}: {100*sum(scores)/seeds:.2f}%', flush=True)

def main():
    p = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    p.add_argument('--students', nargs='*', default=[*STUDENTS], choices=[*STUDENTS])
    p.add_argument('--labels', nargs='*', type=int, default=[1000])
    p.add_argument('--steps', type=int, help='2400, or 600 with fewer than 1000 labels, if not given')
    p.add_argument('--seeds', type=int, default=8)
    p.add_argument('--only', nargs='*', help='names of methods; the first ten, if not given')
    p.add_argument('--folder', type=Path)
    p.add_argument('--cache', type=Path, default=Path.home()/'.cache/kd_fastai/fashion')
    p.add_argument('--out', type=Path, default=TABLES)
    p.add_argument('--hours', type=float, default=24.)
    p.add_argument('--choose', action='store_true')
    p.add_argument('--picture', type=Path, help='file for the picture of the front page')
    p.add_argument('--quick', action='store_true')
    a = p.parse_args()
    torch.set_num_threads(1)
    teacher_epochs = 10
    if a.quick:
        a.seeds,a.labels,a.steps,teacher_epochs = 2,[50],1,1
        a.cache = a.out = Path('fashion_quick')
    steps = {n: a.steps or default_steps(n) for n in a.labels}
    a.cache.mkdir(parents=True, exist_ok=True)
    a.out.mkdir(exist_ok=True)
    data = dict(folder=a.folder)
    if a.choose: return choose(a.students, steps, data)
    every = [BASELINE, *ours([]), *peers([]), *more(None, {}, 0)]
    names = [BASELINE, *a.only] if a.only else FIRST
    if unknown := {*names}-{*every}: p.error(f"No such method: {', '.join(sorted(unknown))}. There are {every}")
    deadline = time.time()+3600*a.hours
    teacher,score = get_teacher(a.cache, data, teacher_epochs)
    for student in a.students:
        for n,k in steps.items():
            compare(student, n, k, names, a.seeds, teacher, data, runs_file(a.cache, student, n, k), deadline)
    runs,table = results(a.cache, {**{n: default_steps(n) for n in LABELS}, **steps})
    table = pd.concat([teacher_row(teacher, score), table], ignore_index=True)[[*table]]
    runs.to_csv(a.out/'fashion_runs.csv', index=False)
    clock.TABLES = a.out
    clock.write('fashion', table.round(5).to_dict('records'),
                 f"Students on Fashion-MNIST. The teacher has {100*score:.2f}% of 10,000 test images, after "
                 f"{teacher_epochs} epochs on 60,000 images. {len(runs)} students took {runs.seconds.sum()/3600:.2f} "
                 "hours of processor time.")
    if a.picture: picture(runs, score, a.picture)

if __name__=='__main__': main()
