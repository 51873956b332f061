"The losses of other libraries in `benchmarks/peers.py` are what these libraries compute in their own loops."
from pathlib import Path
from types import SimpleNamespace
import pytest, torch
import torch.nn.functional as F

pred,teacher_pred = (torch.randn(2, 8, 5, generator=torch.Generator().manual_seed(0))*3).unbind()
target = torch.arange(8)%5
ce = F.cross_entropy(pred, target)

def kl(T): return F.kl_div((pred/T).log_softmax(1), (teacher_pred/T).softmax(1), reduction='batchmean')*T*T

@pytest.fixture
def total(monkeypatch):
    "The training loss of a method"
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2]/'benchmarks'))
    from peers import peers
    def total(name):
        if name not in peers(): pytest.skip('the library is not installed')
        (term,),task_weight = peers()[name]()
        return term.weight*term.loss(pred=pred, teacher_pred=teacher_pred, target=target)+task_weight*ce
    return total

@pytest.mark.parametrize('name', ['SoftTarget','DecoupledKD'])
def test_fasterai(total, name):
    "Its callback, at its defaults, replaces the loss of the batch"
    distill = pytest.importorskip('fasterai.distill.all')
    cb = distill.KnowledgeDistillationCallback(lambda x: teacher_pred, getattr(distill, name))
    cb.learn = SimpleNamespace(x=None, y=target, pred=pred, loss_grad=ce, loss=ce)
    cb.after_loss()
    torch.testing.assert_close(total(f'fasterai {name}'), cb.learn.loss_grad)

def test_torchdistill(total): torch.testing.assert_close(total('torchdistill KDLoss'), .9*ce+.1*kl(4.))

def test_timm(total):
    "Its task, at its defaults and with the arguments of its example"
    torch.testing.assert_close(total('timm LogitDistillationTask'), ce+kl(1.))
    torch.testing.assert_close(total('timm LogitDistillationTask, T=4, 0.3'), .3*ce+.7*kl(4.))
