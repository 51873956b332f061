"What files on batches use: a small network on vectors, trained by SGD, and callbacks that change batches."
import torch
import torch.nn.functional as F
from torch import nn
from fastai.basics import Callback, CrossEntropyLossFlat, DataLoader, DataLoaders, Learner, SGD, noop, set_seed
from support import KD

def mlp(seed=0, n_in=6, hidden=8, n_out=5):
    set_seed(seed)
    return nn.Sequential(nn.Linear(n_in, hidden), nn.ReLU(), nn.Linear(hidden, n_out))

class Items:
    def __init__(self, n=64):
        g = torch.Generator().manual_seed(0)
        self.x,self.y = torch.randn(n, 6, generator=g),torch.randint(5, (n,), generator=g)
    def __len__(self): return len(self.x)
    def __getitem__(self, i): return self.x[i],self.y[i]

def data(shuffle=False):
    ds = Items()
    return DataLoaders(DataLoader(ds, bs=16, shuffle=shuffle), DataLoader(ds, bs=16))

def learner(model, cbs=None, dls=None, **kwargs):
    learn = Learner(dls or data(), model, cbs=cbs, **{'loss_func': CrossEntropyLossFlat(), 'opt_func': SGD, **kwargs})
    learn.logger = noop
    return learn

def fit(learn, n=1, lr=0.1, **kwargs):
    with learn.no_bar(): learn.fit(n, lr, **kwargs)
    return learn

class Keep(Callback):
    "The inputs of each training batch, as the model gets them"
    order,run_valid = 30,False
    def __init__(self): self.x = []
    def before_batch(self): self.x.append(self.xb[0].detach().clone())

def differences(cbs, student=None, teacher=None, dls=None):
    "Largest difference of the teacher's predictions from those for the batches that the student trains on"
    teacher,keep,got = teacher or mlp(9),Keep(),[]
    def loss(pred, teacher_pred): got.append(teacher_pred.clone()); return (pred-teacher_pred).pow(2).mean()
    fit(learner(student or mlp(1), [*cbs, keep, KD(teacher, loss, weight=1.)], dls), 1, 0.)
    with torch.no_grad(): return max((teacher(x)-t).abs().max().item() for x,t in zip(keep.x, got))

class FGSM(Callback):
    "Runs the model on the batch, and trains on another one"
    run_valid = False
    def __init__(self, order): self.order = order
    def before_batch(self):
        x = self.xb[0].clone().requires_grad_()
        g, = torch.autograd.grad(F.cross_entropy(self.model(x), self.yb[0]), x)
        self.learn.xb = ((x+0.5*g.sign()).detach(),)
