"""How strong should a term with weight='auto' be? Trains students with several ratios of a term's gradient to the task
loss's, on the digits of `which_loss` (to choose) and on Fashion-MNIST (to check).

    python benchmarks/accuracy.py auto_ratio [--seeds 3] [--ratios 0.3 1 3] [--only SoftTarget CWD]
    python benchmarks/accuracy.py auto_ratio --fashion FOLDER --ratios auto

`--fashion` is the folder with the original files of Fashion-MNIST (`train-images-idx3-ubyte.gz`, ...). Its students get
1000 labeled pictures of 14x14 pixels, its teacher 5000 pictures.

`kd_compare` writes the runs to `benchmarks/tables/auto_ratio_DATA.csv`, and a stopped sweep goes on from there. A
method is named `LOSS RATIO`; its column `weight` is the weight that this ratio gave."""
import argparse
from functools import cache, partial
from pathlib import Path
import torch
import torch.nn.functional as F
from torch.utils.data import TensorDataset
from fastai.basics import CrossEntropyLossFlat, DataLoader, DataLoaders, Learner, accuracy, noop, set_seed
import fastai.callback.schedule  # noqa: F401, gives Learner its fit_one_cycle
from kd_fastai.callback import KnowledgeDistillationCallback, Term
from kd_fastai.report.compare import kd_compare
from kd_fastai.demo import find_fashion, read_idx
from kd_fastai.objective import auto_ratio
from nets import linear_head, three_stages
from studies import which_loss
from sweep import TABLES

HURT = ['AFD','NST','CWD','Attention','DarkRank','SemCKD','StreamlinedKD'] # at the weights of their papers
GOOD = ['SoftTarget','DecoupledKD','FitNet','ITRD','Logits']
RATIOS = {**dict.fromkeys(HURT+['FitNet','ITRD'], ['0.3','1','3']),
          **dict.fromkeys(['SoftTarget','DecoupledKD','Logits'], ['1','3'])}
PIXELS,LABELS,TEACHER_LABELS,EPOCHS = 14,1000,5000,20

# ---- data

class Pictures(TensorDataset):
    "Pictures and classes"
    def new_empty(self): return Pictures(*(t[:0].clone() for t in self.tensors))

class BatchLoader(DataLoader):
    "Indexes a data set once for each batch"
    def create_batches(self, samps):
        for b in self.chunkify(samps): yield self.dataset[[*b]]

@cache
def fashion_part(folder, part):
    "Pictures of 14x14 pixels and classes: the first 10000 of a part"
    files = find_fashion(folder)
    x,y = (torch.tensor(read_idx(files[f'{part}-{o}-ubyte'])[:10000]) for o in ('images-idx3','labels-idx1'))
    return F.adaptive_avg_pool2d(x[:,None].float().div(128).sub(1), PIXELS),y.long()

def fashion(folder, labels, seed, bs=50):
    "`labels` pictures to train on, drawn by `seed`, and 2000 others to test on"
    x,y = fashion_part(folder, 'train')
    drawn = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))[:labels]
    test = Pictures(*(o[:2000] for o in fashion_part(folder, 't10k')))
    dls = DataLoaders(BatchLoader(Pictures(x[drawn], y[drawn]), bs=bs, shuffle=True, drop_last=True),
                      BatchLoader(test, bs=500))
    dls.train.rng.seed(seed)
    return dls

@cache
def fashion_teacher(folder):
    "The trained teacher"
    set_seed(0, reproducible=True)
    learn = Learner(fashion(folder, TEACHER_LABELS, 100), three_stages(False), loss_func=CrossEntropyLossFlat(),
                    metrics=accuracy)
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(10, 1e-2)
    return learn

# ---- runs

def make_learner(folder, seed):
    "A Learner with the thin student of `which_loss`"
    dls = which_loss.student_data('digits', seed) if folder is None else fashion(folder, LABELS, seed)
    return Learner(dls, three_stages(True), lr=1e-2, loss_func=CrossEntropyLossFlat(),
                   metrics=[accuracy, which_loss.TermWeight()])

def make_loss(loss):
    "An instance of a loss's class, or the loss"
    return loss() if isinstance(loss, type) else loss

def distillation(name, ratio, get_teacher, learn):
    "A callback with one loss whose gradient has this ratio to the task loss's; 'auto' is the package's own ratio"
    loss,head = make_loss(which_loss.all_losses()[name]),linear_head if name in which_loss.LINEAR else noop
    learn.model = head(learn.model)
    schedule = None if ratio=='auto' else lambda _: float(ratio)/auto_ratio(loss)
    term = Term(loss, 'auto', layers=which_loss.layers(loss), schedule=schedule)
    return learn.metrics[1].of(KnowledgeDistillationCallback(head(get_teacher().model), term))

def main():
    p = argparse.ArgumentParser(description=__doc__.split('\n\n')[0])
    p.add_argument('--fashion')
    p.add_argument('--seeds', type=int, default=3)
    p.add_argument('--ratios', nargs='*', default=[])
    p.add_argument('--only', nargs='*', default=HURT+GOOD)
    p.add_argument('--out', type=Path)
    a = p.parse_args()
    torch.set_num_threads(1)
    get_teacher = partial(which_loss.teacher, 10) if a.fashion is None else partial(fashion_teacher, a.fashion)
    methods = {f'{n} {r}': partial(distillation, n, r, get_teacher) for n in a.only for r in a.ratios or RATIOS[n]}
    with get_teacher().no_bar(), get_teacher().no_logging(): print('teacher', get_teacher().validate()[1])
    name = 'digits' if a.fashion is None else 'fashion'
    res = kd_compare(partial(make_learner, a.fashion), {'baseline': None, **methods}, a.seeds, EPOCHS,
                     csv=a.out or TABLES/f'auto_ratio_{name}.csv', rounds=0, catch=which_loss.ERRORS, progress=False)
    print(res.table[['runs','mean','gain','std','weight']].round(4).to_string())

if __name__=='__main__': main()
