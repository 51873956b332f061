"""Does a teacher help a small network on color pictures, when both have the same labels?

The teacher is EfficientNet-Lite0 with ImageNet weights, fine-tuned on the pictures that the student trains on. The
student is small and begins from random weights. All methods train for equally many steps, from the same seeds, on the
same 8 augmented views of each picture; the score is that of the last epoch, on other emoji. `--half choose` and
`--half report` share no emoji: methods are chosen on one and reported on the other.

    python benchmarks/pictures.py --half report --labels 1142 --steps 1400 --seeds 0 1 2

Runs go to `tables/pictures_runs.csv`, which is completed, and their comparison to `tables/pictures.csv`. Losses of
other libraries (`peers.py`) have tables of their own, `--file tables/pictures_peers_runs.csv`."""
import argparse, os
os.environ.setdefault('OMP_NUM_THREADS', '1')
import time
from functools import cache, partial
from math import prod
from pathlib import Path
import pandas as pd
import torch
from torch import nn, Tensor
from torch.utils.data import TensorDataset
from fastai.vision.all import *
from kd_fastai.all import *
from kd_fastai.report.compare import comparison_table
from kd_fastai.report.runs import StudentInputs
from data import CACHE, emoji, emoji_split, lite0, normalized, plain, separable
from peers import peers
from sweep import NoValidation, TABLES

VIEWS,SIZE,ALL = 8,96,1142  # views of a picture, pixels for the features before fine-tuning, training pictures
STUDENTS = dict(separable=separable, plain=plain)
FOLDER = CACHE/'pictures'

# --- pictures, and the teacher's predictions and features of them

class Pictures(TensorDataset):
    "Tensors that are indexed by a whole batch"
    def new_empty(self): return Pictures(*(t[:0].clone() for t in self.tensors))

class WholeBatches(DataLoader):
    "Index the data set once for each batch"
    def create_batches(self, samps):
        for b in self.chunkify(samps): yield self.dataset[[*b]]

def subset(half, labels):
    "Positions among the training pictures of a half: all, or the first so many of a random order"
    n = len(emoji_split(half)[0])
    return torch.randperm(n, generator=torch.Generator().manual_seed(1))[:labels].sort().values

@torch.no_grad()
def augmented(x, seed):
    "Random views of pictures in bytes, `(N, 8, 3, 64, 64)`"
    view = Pipeline(aug_transforms(max_warp=0., size=64), split_idx=0)
    def one(o): return (Tensor(view(TensorImage(o.float().div(255)))).clamp(0,1)*255).round().byte()
    set_seed(seed)
    views = [torch.cat([one(o) for o in x.split(64)]) for _ in range(VIEWS)]
    return torch.stack(views, 1)

def batches(x, y, bs=32, shuffle=True, tfm=None):
    "A loader of normalized pictures"
    def ready(b): return (normalized(b[0]).contiguous(memory_format=torch.channels_last),*b[1:])
    return WholeBatches(Pictures(x, y), bs=bs, shuffle=shuffle, drop_last=shuffle, after_batch=tfm or ready)


def random_view(b):
    "One view of each picture, normalized"
    x,y = b
    view = torch.randint(VIEWS, (len(x),))
    return normalized(x[range(len(x)),view]).contiguous(memory_format=torch.channels_last),y

def tune(views, y, valid, epochs=6):
    "Fine-tune EfficientNet-Lite0: its classifier for an epoch, then all of it"
    set_seed(0)
    dls = DataLoaders(batches(views, y, tfm=random_view), batches(*valid, bs=256, shuffle=False))
    def split(m): return [L(m.named_parameters()).filter(lambda o: ('classifier' in o[0])==head).itemgot(1)
                          for head in (False,True)]
    net = lite0(9).to(memory_format=torch.channels_last)
    learn = Learner(dls, net, loss_func=CrossEntropyLossFlat(), metrics=accuracy, splitter=split)
    with learn.no_bar(), learn.no_logging(), learn.added_cbs(NoValidation()):
        learn.freeze()
        learn.fit_one_cycle(1, 3e-3)
        learn.unfreeze()
        learn.fit_one_cycle(epochs, slice(1e-3, 5e-3))
    return learn

@torch.no_grad()
def outputs(f, x, size=64):
    "What a network returns for pictures in bytes, `(N, ..., 3, 64, 64)`, in half precision"
    flat = x.flatten(0, -4)
    def one(o):
        o = normalized(o)
        if size!=64: o = nn.functional.interpolate(o, size=(size,size), mode='bilinear')
        return f(o.contiguous(memory_format=torch.channels_last)).half()
    return torch.cat([one(o) for o in flat.split(64)]).unflatten(0, x.shape[:-3])

@cache
def recorded(half, labels=None):
    "Views, labels, and what the teacher and the network before fine-tuning return for each view"
    FOLDER.mkdir(parents=True, exist_ok=True)
    of_half,of_labels = FOLDER/f'{half}.pt',FOLDER/f'{half}_{labels}.pt'
    if not of_half.exists():
        x,y,*_ = emoji()
        train,valid = emoji_split(half)
        start,views = time.time(),augmented(x[train], seed=0)
        before = lite0().eval().to(memory_format=torch.channels_last)
        torch.save(dict(views=views, y=y[train], valid=(x[valid],y[valid]), before=outputs(before, views, SIZE)),
                   of_half)
        print(f'{half}: views and features in {time.time()-start:.0f} s', flush=True)
    all = torch.load(of_half, mmap=True)
    if labels is None: return all
    i = subset(half, labels)
    if not of_labels.exists():
        start,learn = time.time(),tune(all['views'][i], all['y'][i], all['valid'])
        net = learn.model.eval()
        pooled,head = nn.Sequential(*[*net.children()][:-1]),net.classifier
        features = outputs(pooled, all['views'][i])
        valid = outputs(net, all['valid'][0]).float()
        predictions = head(features.float().flatten(0,1)).unflatten(0, features.shape[:2]).detach()
        def said(p, y): return dict(accuracy=(p.argmax(-1)==y).float().mean().item(),
                                    confidence=p.softmax(-1).amax(-1).mean().item())
        scores = dict(train=said(predictions, all['y'][i][:,None]), valid=said(valid, all['valid'][1]))
        torch.save(dict(features=features, predictions=predictions, scores=scores, i=i), of_labels)
        torch.save(net.state_dict(), FOLDER/f'{half}_{labels}_weights.pt')
        print(f'{half}, {labels} labels: {scores} in {time.time()-start:.0f} s', flush=True)
    own = torch.load(of_labels)
    return {**all, **own, **{k: all[k][i] for k in ('views','y','before')}}

@cache
def of_folds(half, labels, n=3):
    "Predictions of teachers that saw neither a picture nor the same emoji in the other style: fine-tuned on the others"
    file = FOLDER/f'{half}_{labels}_folds.pt'
    if not file.exists():
        start,o = time.time(),recorded(half, labels)
        views,y,fold = o['views'],o['y'],emoji()[2][emoji_split(half)[0][o['i']]]%n
        res = torch.zeros(*views.shape[:2], 9)
        for f in range(n):
            net = tune(views[fold!=f], y[fold!=f], o['valid']).model.eval()
            res[fold==f] = outputs(net, views[fold==f]).float()
        right = (res.argmax(-1)==y[:,None]).float().mean().item()
        torch.save(res, file)
        print(f'{half}, {labels} labels: {n} folds, {right:.3f} right in {time.time()-start:.0f} s', flush=True)
    return torch.load(file)

MAPS = dict(first=(24,16,16), early=(40,8,8), late=(112,4,4), last=(1280,2,2)) # of a picture of 64x64 pixels

def maps(net, x):
    "Flat maps of EfficientNet-Lite0: after three of its stages, and before the pooling"
    first = net.blocks[:2](net.bn1(net.conv_stem(x)))
    early = net.blocks[2](first)
    late = net.blocks[3:5](early)
    last = net.bn2(net.conv_head(net.blocks[5:](late)))
    return torch.cat([o.flatten(1) for o in (first,early,late,last)], 1)

@cache
def tuned(half, labels):
    "The fine-tuned network, and its maps of each view"
    o,file = recorded(half, labels),FOLDER/f'{half}_{labels}_maps4.pt'
    net = lite0(9).eval()
    net.load_state_dict(torch.load(FOLDER/f'{half}_{labels}_weights.pt'))
    if not file.exists():
        start = time.time()
        torch.save(outputs(partial(maps, net), o['views']), file)
        print(f'{half}, {labels} labels: maps in {time.time()-start:.0f} s', flush=True)
    return net,torch.load(file, mmap=True)

# --- students

class Lookup(nn.Module):
    "Returns what was recorded for `key`: pairs of picture and view, `(B, 2)`"
    def __init__(self, values): super().__init__(); self._values = values
    def forward(self, key): return self._values[key[:,0],key[:,1]].float()

class Recorded(nn.Module):
    "A teacher with recorded predictions, and with a layer for the features of each network"
    def __init__(self, o, predictions='predictions'):
        super().__init__()
        self.before,self.features,self.predictions = (Lookup(o[k]) for k in ('before','features',predictions))
    def forward(self, key):
        self.before(key); self.features(key)
        return self.predictions(key)

class Staged(nn.Module):
    "The fine-tuned network with recorded maps"
    def __init__(self, net, maps):
        super().__init__()
        self.maps = Lookup(maps)
        self.first,self.early,self.late,self.last = (nn.Identity() for _ in MAPS)
        self.pool,self.flat,self.classifier = nn.AdaptiveAvgPool2d(1),nn.Flatten(),net.classifier
    def forward(self, key):
        flat = self.maps(key).split([prod(o) for o in MAPS.values()], 1)
        first,early,late,last = (o.unflatten(1, size) for o,size in zip(flat, MAPS.values()))
        self.first(first); self.early(early); self.late(late)
        return self.classifier(self.flat(self.pool(self.last(last))))

@cache
def prepared(half, labels, pixels):
    "What was recorded, with pictures of this height and width (means of pixels), normalized"
    def shrunk(x): return nn.functional.adaptive_avg_pool2d(normalized(x), pixels)
    o = recorded(half, labels)
    x,y = o['valid']
    views = torch.stack([shrunk(v) for v in o['views'].unbind(1)], 1)
    return {**o, 'views': views, 'valid': (shrunk(x),y), 'half': half, 'labels': labels, 'pixels': pixels}

def keyed_view(b, views):
    "One view of each picture, and its key"
    i,y = b
    view = torch.randint(VIEWS, (len(i),))
    return views[i,view].contiguous(memory_format=torch.channels_last),torch.stack([i,view], 1),y

def data(o, seed, bs=32):
    "Loaders of pictures, keys (for the teacher only) and classes"
    n,(x,y) = len(o['y']),o['valid']
    dls = DataLoaders(WholeBatches(Pictures(torch.arange(n), o['y']), bs=bs, shuffle=True, drop_last=True,
                                   after_batch=partial(keyed_view, views=o['views'])),
                      WholeBatches(Pictures(x, torch.zeros(len(y), 2), y), bs=256))
    dls.train.rng.seed(seed)
    return dls

def make_learner(o, student, seed, metrics=accuracy):
    "A Learner with an untrained student"
    set_seed(seed, reproducible=True)
    net = STUDENTS[student]().to(memory_format=torch.channels_last)
    learn = Learner(data(o, seed), net, loss_func=CrossEntropyLossFlat(), metrics=metrics, lr=1e-2)
    learn.seed,learn.student = seed,student
    return learn

# --- methods

def times(k, f=None):
    "A schedule that multiplies by k"
    return (lambda p: k) if f is None else (lambda p: k*f(p))

def falling(k=1.): return times(k, SchedCos(1,0))
def rising(k=1.): return times(k, SchedCos(0,1))
def soft(schedule, T=4): return Term(SoftTarget, 'auto', schedule=schedule, T=T)
def feature(schedule, layer='before', loss=CosineSmoothL1):
    return Term(loss, 'auto', layers=[('>',layer)], adapt='auto', schedule=schedule)

class Follow(Callback):
    "Multiply the weights of terms on predictions by the first task loss over its running mean"
    order = KnowledgeDistillationCallback.order-1
    def __init__(self, cap=30., power=1., names=('soft_target',), speed=.1): store_attr()
    def before_fit(self):
        objective = first(self.learn.cbs, lambda o: isinstance(o, KnowledgeDistillationCallback)).objective
        self.start = self.mean = None
        weights = objective.weights
        def follow(batch, values, progress=0.):
            task = batch.task.detach()
            if self.start is None: self.start = self.mean = task
            self.mean = torch.lerp(self.mean, task, self.speed)
            k = min(self.cap, float(self.start/self.mean))**self.power
            return {n: w*k if n in self.names else w for n,w in weights(batch, values, progress).items()}
        objective.weights = follow

class TaskSchedule(Callback):
    "Schedule the weight of the task loss"
    order = KnowledgeDistillationCallback.order-1
    def __init__(self, f): self.f = f
    def before_batch(self):
        kd = first(self.learn.cbs, lambda o: isinstance(o, KnowledgeDistillationCallback))
        if self.training: kd.objective.task_weight = self.f(self.pct_train)

def from_half(p): return float(p>=.5)
def to_half(p): return float(p<.5)
def second(k=1.): return lambda p: k*SchedCos(0,1)(max(0., 2*p-1))

def fit(learn, epochs, cbs):
    "Train without a look at the validation set"
    learn.fit_one_cycle(epochs, cbs=[*cbs, NoValidation()])

def baseline(learn, o, epochs): fit(learn, epochs, [StudentInputs(1)])

def kd(terms, *cbs, task_weight=1., predictions='predictions'):
    "A method: the terms, other callbacks, and whose predictions"
    def train(learn, o, epochs):
        teacher = Recorded(o, predictions)
        fit(learn, epochs, [KnowledgeDistillationCallback(teacher, terms(), task_weight=task_weight, teacher_inputs=1),
                            *cbs])
    return train

# what `layers='auto'` finds for the student `separable` and the whole teacher
AUTO_LAYERS = [('0','first'),('1','early'),('4','late'),('5','last')]
MAP_LAYERS = {'separable': [('1','early'),('4','late')], 'plain': [('1','early'),('2','late')]} # of equal sizes

def by_maps(loss, soft=True, schedule=None, layers=None):
    "A method: a loss on the maps of the fine-tuned network, and the default term on its predictions"
    def train(learn, o, epochs):
        teacher = Staged(*tuned(o['half'], o['labels']))
        own = loss() if isinstance(loss, type) else loss
        terms = [Term(own, 'auto', layers=layers or MAP_LAYERS[learn.student], schedule=schedule,
                      adapt=None if own is not loss else 'auto')]
        if soft: terms.append(Term(SoftTarget, T=4))
        fit(learn, epochs, [KnowledgeDistillationCallback(teacher, terms, teacher_inputs=1)])
    return train

def started(share, method, unlabeled=False):
    "A method that begins with features, without labels, for a share of the steps; also on pictures that have no label"
    def train(learn, o, epochs):
        n,whole = round(share*epochs),prepared(o['half'], ALL, o['pixels']) if unlabeled else o
        dls = data(whole, learn.seed)
        learn.kd_pretrain(Teacher(Recorded(whole)), round(n*len(learn.dls.train)/len(dls.train)), dls=dls,
                          layers=[('>','before')], teacher_inputs=1)
        method(learn, o, epochs-n)
    return train

METHODS = {
    'baseline': baseline,
    'distill': kd(lambda: [Term(SoftTarget, T=4)]),
    'soft rising': kd(lambda: [soft(rising())]),
    'F before x.5': kd(lambda: [feature(times(.5))]),
    'F before x3 falling': kd(lambda: [feature(falling(3))]),
    'F before x10 falling': kd(lambda: [feature(falling(10))]),
    'F before x3 falling, soft rising': kd(lambda: [feature(falling(3)), soft(rising())]),
    'F before x10 falling, soft rising': kd(lambda: [feature(falling(10)), soft(rising())]),
    'F tuned x3 falling, soft rising': kd(lambda: [feature(falling(3), 'features'), soft(rising())]),
    'F before first half': kd(lambda: [feature(times(1., to_half))], TaskSchedule(from_half)),
    'F before first half, soft rising': kd(lambda: [feature(times(1., to_half)), soft(second())],
                                           TaskSchedule(from_half)),
    'soft adapt': kd(lambda: [soft(None)], Follow()),
    'soft adapt rising': kd(lambda: [soft(rising())], Follow()),
    'soft .9/.1': kd(lambda: [Term(SoftTarget, .9, T=4)], task_weight=.1),
    'F tuned x3 falling, soft adapt rising': kd(lambda: [feature(falling(3), 'features'), soft(rising())], Follow()),
    'F before x3 falling, soft adapt rising': kd(lambda: [feature(falling(3)), soft(rising())], Follow()),
    'soft adapt rising slow': kd(lambda: [soft(rising())], Follow(speed=.02)),
    'start third, labels': started(1/3, baseline),
    'start third, soft rising': started(1/3, kd(lambda: [soft(rising())])),
    'start half, soft rising': started(1/2, kd(lambda: [soft(rising())])),
    'start third, soft adapt rising': started(1/3, kd(lambda: [soft(rising())], Follow())),
    'start 60% on all pictures, labels': started(.6, baseline, unlabeled=True),
    'start 60% on all pictures, distill': started(.6, kd(lambda: [Term(SoftTarget, T=4)]), unlabeled=True),
    'folds, soft rising': kd(lambda: [soft(rising())], predictions='folds'),
    'folds, soft adapt rising': kd(lambda: [soft(rising())], Follow(), predictions='folds'),
    'start third, folds, soft rising': started(1/3, kd(lambda: [soft(rising())], predictions='folds')),
}

# losses on maps of the fine-tuned network
MORE = {'': dict(soft=False), ', distill': {}, ' falling, distill': dict(schedule=falling())}
METHODS |= {f'maps {f.__name__}{more}': by_maps(f, **kwargs)
            for f in (FitNet, CosineSmoothL1, VID, CWD) for more,kwargs in MORE.items()}

METHODS["distill, layers='auto'"] = by_maps(FitNet, layers=AUTO_LAYERS)

# losses one by one, as in `accuracy.py which_loss`: on predictions, or on what the classifiers read
METHODS |= {f.__name__: kd(lambda f=f: [Term(f, 'auto', schedule=None)])
            for f in (SoftTarget, DecoupledKD, Logits, DIST, Mutual)}
METHODS |= {f.__name__: kd(lambda f=f: [Term(f, 'auto', layers=[('>','features')])]) for f in (RKD, Similarity)}
METHODS |= {f.__name__: kd(lambda f=f: [Term(f, 'auto', layers=[('>','features')], adapt='auto')])
            for f in (FitNet, CosineSmoothL1)}

def of_peer(make):
    "A method with the loss and the weights of another library"
    def train(learn, o, epochs):
        terms,task_weight = make()
        kd(lambda: terms, task_weight=task_weight)(learn, o, epochs)
    return train

METHODS |= {n: of_peer(make) for n,make in peers().items()}

# --- the study

def run(half, student, pixels, labels, steps, method, seed):
    "Train one student. Returns its row"
    o = prepared(half, labels, pixels)
    if 'folds' in method: o = {**o, 'folds': of_folds(half, labels)}
    learn = make_learner(o, student, seed)
    epochs = max(1, round(steps/len(learn.dls.train)))
    set_seed(seed, reproducible=True)
    began = time.process_time()
    with learn.no_bar(), learn.no_logging(): METHODS[method](learn, o, epochs)
    took = time.process_time()-began
    with learn.no_bar(), learn.no_logging(), learn.added_cbs([StudentInputs(1)]):
        p,y = learn.get_preds()
    return dict(half=half, student=student, pixels=pixels, labels=labels, steps=epochs*len(learn.dls.train),
                method=method, seed=seed, accuracy=(p.argmax(1)==y).float().mean().item(),
                valid_loss=nn.functional.nll_loss(p.log(), y).item(), confidence=p.amax(1).mean().item(),
                teacher=o['scores']['valid']['accuracy'], seconds=round(took, 1))

def write_table(runs, group, file):
    "Compare the methods within each group of runs that has a baseline"
    groups = [(k, o) for k,o in runs.groupby(group) if 'baseline' in {*o.method}]
    tables = [comparison_table(o.drop(columns=group), 'accuracy', 'baseline').rename_axis('method').reset_index()
              .assign(**dict(zip(group, k))) for k,o in groups]
    table = pd.concat(tables, ignore_index=True)
    table[[*group, *(c for c in table if c not in group)]].round(4).to_csv(file, index=False)
    print(table.to_string(), flush=True)

GROUP = ['half','student','pixels','labels','steps']

def main():
    p = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    p.add_argument('--half', default='report', choices=['choose','report'])
    p.add_argument('--student', default='separable', choices=[*STUDENTS])
    p.add_argument('--pixels', type=int, default=64, help='height and width of the student\'s pictures')
    p.add_argument('--labels', type=int, default=1142)
    p.add_argument('--steps', type=int, default=1400)
    p.add_argument('--seeds', type=int, nargs='*', default=[*range(5)])
    p.add_argument('--methods', nargs='*', default=[*METHODS])
    p.add_argument('--file', type=Path, default=TABLES/'pictures_runs.csv')
    a = p.parse_args()
    torch.set_num_threads(1)
    for seed in a.seeds:
        for method in a.methods:
            runs = pd.read_csv(a.file) if a.file.exists() else pd.DataFrame(columns=[*GROUP,'method','seed'])
            case = dict(half=a.half, student=a.student, pixels=a.pixels, labels=a.labels, method=method, seed=seed)
            same = (runs[[*case]]==[*case.values()]).all(1)
            if len(runs) and (same & ((runs.steps-a.steps).abs()<.05*a.steps)).any(): continue
            row = run(a.half, a.student, a.pixels, a.labels, a.steps, method, seed)
            runs = pd.read_csv(a.file) if a.file.exists() else None
            pd.concat([o for o in (runs, pd.DataFrame([row])) if o is not None]).to_csv(a.file, index=False)
            print({k: round(v, 4) if isinstance(v, float) else v for k,v in row.items()}, flush=True)
    write_table(pd.read_csv(a.file), GROUP, a.file.with_stem(a.file.stem.removesuffix('_runs')))

if __name__=='__main__': main()
