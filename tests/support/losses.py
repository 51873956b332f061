"""What several files on losses use: the losses with weights, with inputs for each, and a watch for large tensors.

What each takes, and the layers that it trains on, are in `LOSSES`; a new loss joins by a line."""
from copy import deepcopy
from functools import partial
from typing import Callable, NamedTuple
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from kd_fastai.losses import *
from kd_fastai.losses.facts import get_loss_info, loss_args

# --- numbers

def close(a, b, tol=1e-4):
    "Compare two nested containers of tensors"
    for p,q in zip(tree_leaves(a), tree_leaves(b), strict=True):
        torch.testing.assert_close(p, q, rtol=tol, atol=tol*max(1e-2, float(q.abs().max())))

class Largest(TorchDispatchMode):
    "Watches for the number of elements of the largest tensor"
    numel = 0
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor): self.numel = max(self.numel, t.untyped_storage().nbytes()//t.element_size())
        return out

# --- losses with weights

class Row(NamedTuple):
    make:Callable              # Makes a new instance
    student:tuple              # Shapes of the student's features, without the batch
    teacher:tuple              # Shapes of the teacher's
    golden:tuple = ()          # Methods among the golden numbers
    layers:object = ['0','1','2'] # Layers of `small_net` for a training run
    width:int = 6              # Width of the teacher, where the student's is 4

def must_match(name):
    "What must be equal in student and teacher"
    return get_loss_info(ALL[name].make()).must_match

two,wider = ((4,6,6),(8,3,3)),((6,6,6),(12,3,3))
LOSSES = {
    'FitNetRegressor': Row(FitNetRegressor, ((4,6,6),(8,3,3),(8,5,5)), ((6,3,3),(12,6,6),(9,3,3)),
                           ('fitnet_regressor',)),
    'VID': Row(VID, ((4,6,6),(8,3,3)), ((6,4,4),(12,6,6)), ('vid',)),
    'PADL2': Row(PADL2, two, two, ('pad_l2',), width=4),
    'ReviewKD': Row(ReviewKD, (*two,(8,)), (*wider,(12,)), ('reviewkd',)),
    'OFD': Row(OFD, two, wider, ('ofd_authors',), ['0.1','1.1','2.1']),
    'SRRL': Row(SRRL, ((8,),), ((12,),), ('srrl',), '4'),
    'SimKD': Row(SimKD, ((8,4,4),), ((12,3,3),), ('simkd',), '2'),
    'MGD': Row(MGD, two, wider, ('mgd',)),
    'SemCKD': Row(SemCKD, two, (*wider,(9,5,5)), ('semckd',), {'student': ['0','1'], 'teacher': ['0','1','2']}),
    'ITRD': Row(ITRD, ((8,),(8,)), ((12,),(8,)), layers='4'),
    'ICKDEmbed': Row(ICKDEmbed, ((4,6,6),(8,3,3)), ((6,4,4),(12,3,3)), ('ickd_embed',)),
    'AFD': Row(AFD, two, two, ('afd_zoo',), width=4),
    'CRD': Row(partial(CRD, dim=8, n_queue=40), ((8,),), ((12,),), (), '4'),
    'CRDBank': Row(partial(CRDBank, n_data=100, K=30, dim=8), ((8,),), ((12,),), ('crd',), '4'),
    'CTKD': Row(partial(CTKD, warmup=5), two, two),
    'PEFD': Row(PEFD, ((8,),(8,)), ((12,),(8,)), ('pefd',), '4'),
    'ViTKD': Row(ViTKD, two, wider, ('vitkd',)),
    'OFA': Row(OFA, two, wider, ('ofa',), {'student': ['0','1'], 'teacher': []}),
    'DCD': Row(partial(DCD, dim=8), ((8,),), ((12,),), ('dcd',), '4'),
    'RRD': Row(partial(RRD, dim=8, n_queue=40), ((8,),), ((12,),), ('rrd',), '4'),
    'QueueKL': Row(partial(QueueKL, n_queue=40), ((8,),), ((12,),), ('queue_kl',), '4'),
}
VARIANTS = {
    'VID, narrow': Row(partial(VID, dim=3, init_pred_var=2.), two, wider),
    'ReviewKD, other sizes': Row(partial(ReviewKD, dim=5), two, ((6,4,4),(12,2,2))),
    'OFD, batch margins': Row(partial(OFD, margin='batch'), two, wider, ('ofd_connector',), ['0.1','1.1','2.1']),
    'SRRL, maps': Row(SRRL, ((8,4,4),), ((12,3,3),), (), '2'),
    'SimKD, embedding': Row(partial(SimKD, factor=4), ((8,),), ((12,),), (), '4'),
    'MGD, channel': Row(partial(MGD, 'channel'), two, two, ('mgd_channel',), width=4),
    'ITRD, corr': Row(partial(ITRD, mutual=0), ((8,3,3),), ((12,2,2),), ('itrd_corr',), '2'),
    'ViTKD, equal widths': Row(partial(ViTKD, ratio=.75), two, two, width=4),
    'OFA, narrow exits': Row(partial(OFA, eps=1.5, T=2., dim=3), ((6,),(8,3,3)), ((6,),(8,3,3))),
    'ITRD, mutual': Row(partial(ITRD, corr=0, mutual=1), ((8,),), ((12,),), ('itrd_mutual',), '4'),
}
DRAWN = {'MGD', 'MGD, channel', 'CRDBank', 'ViTKD', 'ViTKD, equal widths'}   # they draw masks or negatives
ALL = {**LOSSES, **VARIANTS}

def inputs(name, B=4, dtype=torch.float32, seed=0, shapes=None):
    """Random arguments for `build`: a teacher of batch norms and a classifier, which makes the predictions of the
    last feature"""
    g = torch.Generator().manual_seed(seed)
    def rand(*shape): return torch.randn(shape, generator=g, dtype=torch.float64).to(dtype)
    s,t = shapes or (ALL[name].student, ALL[name].teacher)
    fm_s,fm_t = ({f'{k}{i}': rand(B,*o) for i,o in enumerate(fm)} for k,fm in (('s',s), ('t',t)))
    last = fm_t[f't{len(t)-1}']
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        channels = {n: f.shape[2 if f.ndim==3 else 1] for n,f in fm_t.items()}
        teacher = nn.ModuleDict({**{n: nn.BatchNorm2d(c) for n,c in channels.items()},
                                 'classifier': nn.Linear([*channels.values()][-1], 5)}).to(dtype)
    teacher_pred = teacher['classifier'](last.mean(1) if last.ndim==3 else last.flatten(2).mean(2) if last.ndim>2
                                         else last).detach()
    return dict(fm_s=fm_s, fm_t=fm_t, pred=rand(B,5), teacher_pred=teacher_pred,
                target=torch.randint(5, (B,), generator=g), student=nn.Linear(2,2), teacher=teacher,
                idx=torch.randperm(100, generator=g)[:B])

def built(name, x=None):
    torch.manual_seed(0)
    return ALL[name].make().build(**(x or inputs(name)))

def changed(x, f, who=('fm_s','fm_t')):
    return {k: {n: f(t) for n,t in v.items()} if k in who else v for k,v in x.items()}

def student(loss, x):
    return [t for k in ('fm_s','pred') if k in loss_args(loss).accepted
            for t in (x[k].values() if k=='fm_s' else [x[k]])]

def run(loss, x):
    "Value, and gradients of the student's tensors and the loss's own weights; the loss stays as it was"
    x = changed(x, lambda t: t.detach().clone(memory_format=torch.preserve_format).requires_grad_(), ('fm_s',))
    x['pred'] = x['pred'].detach().clone().requires_grad_()
    own,before = [p for p in loss.parameters() if p.requires_grad],deepcopy(loss.state_dict())
    torch.manual_seed(3)  # of what is drawn
    value = loss(**loss_args(loss).select(x))
    assert value.shape==() and value.requires_grad
    grads = torch.autograd.grad(value, student(loss, x)+own)
    loss.load_state_dict(before)
    return value.detach(),grads
