"What several test files use: a small Learner, callbacks that watch a training run, and states to compare."
import random
from copy import deepcopy
import numpy as np, pandas as pd, torch
from torch import nn
from fastai.basics import Callback, CrossEntropyLossFlat, L, Learner, accuracy, noop, set_seed
from fastai.callback.fp16 import AMPMode, MixedPrecision
from fastai.callback.progress import ProgressCallback
from kd_fastai.callback import KnowledgeDistillationCallback as KD
from kd_fastai.demo import digits, small_net

# ---- a training run

def quiet(learn):
    "Turn off the progress bar and the printed table; returns `learn`"
    learn.remove_cb(ProgressCallback)
    learn.logger = noop
    return learn

def learner(cbs=None, dls=None, model=None, *, width=4, seed=0, loss_func=None, **kwargs):
    "A quiet Learner, by default of a small net on 100 digits, made from the random state `seed`"
    set_seed(seed)
    dls,model = dls or digits(100),model or small_net(width)
    loss_func = loss_func or CrossEntropyLossFlat()
    return quiet(Learner(dls, model, loss_func=loss_func, metrics=accuracy, cbs=cbs, **kwargs))

def text_learner(seq_len, n_layers=1, **kwargs):
    "A Learner of fastai's text classifier on a table of four sentences"
    from fastai.text.all import AWD_LSTM, TextDataLoaders, awd_lstm_clas_config, text_classifier_learner
    df = pd.DataFrame(dict(text=['a good film','a bad film indeed','not a good one','bad']*4, label=list('pnnn')*4,
                           is_valid=[False]*8+[True]*8))
    dls = TextDataLoaders.from_df(df, text_col='text', label_col='label', valid_col='is_valid', bs=4, num_workers=0)
    config = {**awd_lstm_clas_config, 'emb_sz':8, 'n_hid':8, 'n_layers':n_layers}
    return text_classifier_learner(dls, AWD_LSTM, pretrained=False, config=config, seq_len=seq_len, metrics=accuracy,
                                   **kwargs)

def fit(learn, n=1, lr=1e-2, seed=1, **kwargs):
    "Train `n` epochs from the random state `seed`; returns `learn`"
    set_seed(seed)
    learn.fit(n, lr, **kwargs)
    return learn

def trained_teacher(width=4, epochs=3):
    "A trained net for the digits, without gradients"
    set_seed(9)
    learn = Learner(digits(), small_net(width), loss_func=CrossEntropyLossFlat(), metrics=accuracy)
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(epochs, 1e-2)
    learn.model.zero_grad(set_to_none=True)
    return learn.model

# ---- what a training run did

def weights(m):
    "All parameters of a model or Learner, as one vector"
    return torch.cat([p.detach().flatten().clone() for p in getattr(m, 'model', m).parameters()])

def hooks(*models):
    "The number of hooks on all modules of `models`"
    return sum(len(o._forward_hooks)+len(o._forward_pre_hooks) for m in models for o in m.modules())

def history(learn):
    "The recorder's table, without the columns for the epoch and the time"
    return pd.DataFrame(learn.recorder.values, columns=learn.recorder.metric_names[1:-1])

def state(learn):
    "All of a Learner that a report could change"
    rng = torch.get_rng_state(),random.getstate(),np.random.get_state()[1]
    return deepcopy(dict(model=learn.model.state_dict(), modes=[m.training for m in learn.model.modules()],
        cbs=learn.cbs.map(str), metrics=learn.metrics.attrgot('name'), values=vars(learn.recorder).get('values'),
        rng=rng, loaders=[o.rng.getstate() for o in learn.dls.loaders],
        grads=[p.grad for p in learn.model.parameters()], opt=learn.opt and learn.opt.state_dict()['hypers']))

def same(a, b):
    "Are two nested containers of tensors and values equal?"
    if isinstance(a, (torch.Tensor, np.ndarray)): return bool((a==b).all())
    if isinstance(a, dict): return a.keys()==b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list,tuple,L)): return len(a)==len(b) and all(map(same, a, b))
    return a==b

# ---- callbacks and models

class KeepBatches(Callback):
    "Keeps input and labels of each training batch"
    def __init__(self): self.batches = []
    def after_loss(self):
        if self.training: self.batches.append((self.x.clone(), self.y.clone()))

class KeepLosses(Callback):
    "Keeps the loss of each training batch, with the distillation terms"
    order = KD.order+1
    def __init__(self): self.losses = []
    def after_loss(self):
        if self.training: self.losses.append(self.loss.item())

class CPUMixedPrecision(MixedPrecision):
    "fastai's callback on the CPU; its own autocast is for 'cuda'"
    def before_fit(self):
        super().before_fit()
        dtype = torch.bfloat16 if self.amp_mode==AMPMode.BF16 else torch.float16
        self.autocast = torch.autocast('cpu', dtype=dtype)
        self.learn.scaler = torch.amp.GradScaler('cpu', **self.kwargs)

class Never(nn.Module):
    "A teacher that must not run"
    def forward(self, x): raise AssertionError('the teacher was called')
