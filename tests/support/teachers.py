"What several files on teachers use: a teacher, data item by item, and training runs with a cache."
import numpy as np, torch
from fastai.basics import DataLoaders, TfmdDL, set_seed
from kd_fastai.demo import digits, small_net
from kd_fastai.losses import Attention, SoftTarget
from kd_fastai.term import Term
from support import KD, fit, learner

def net(width=4, seed=5):
    "An untrained net for the digits"
    set_seed(seed)
    return small_net(width)

class Images(torch.utils.data.Dataset):
    "Digits, one by one; every reading is counted"
    def __init__(self, n=100): self.x,self.y = digits().train.dataset[[*range(n)]]
    def __len__(self): return len(self.x)
    def __getitem__(self, i): return self.x[i],self.y[i]

def loaders(n=100, bs=16, cls=TfmdDL, **kwargs):
    ds,few = Images(n),Images(2*bs)   # few to validate on: the same path for each batch
    set_seed(3)  # the order of batches
    return DataLoaders(cls(ds, bs=bs, **{'shuffle':True, 'num_workers':0, **kwargs}), TfmdDL(few, bs=bs, num_workers=0))

def cached_fit(teacher, dls=None, n=3, losses=None, layers='1', **kwargs):
    "Train by predictions and features"
    kd = KD(teacher, losses or [Term(SoftTarget), Term(Attention, 10.)], layers, **kwargs)
    return fit(learner(kd, dls or loaders()), n)

def values(learn):
    "The rows of the recorder, without the time"
    return np.array([o[:-1] for o in learn.recorder.values])

def asked(t):
    "How many samples a teacher predicts, from now on"
    seen = []
    t.register_forward_hook(lambda m,x,out: seen.append(len(out)))
    return seen
