"A step reads no tensor's value, which would wait for a GPU. The same on a GPU, by PyTorch's own check: test_cuda.py."
import pytest
from torch.utils._python_dispatch import TorchDispatchMode
from fastai.basics import *
from fastai.callback.progress import ProgressCallback
from kd_fastai.all import *
from kd_fastai.demo import digits, small_net
from kd_fastai.fit import columns

for o in [*globals()]:
    if o=='test' or o.startswith('test_'): del globals()[o]  # fastcore's own helpers, which pytest would take for tests

pytestmark = pytest.mark.filterwarnings('ignore:The teacher .*agrees')  # it is not trained

READS = 'aten::_local_scalar_dense','aten::nonzero','aten::is_nonzero'

class Reads(TorchDispatchMode):
    "The operations that read values of tensors"
    def __init__(self):
        super().__init__()
        self.found = []
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.name() in READS: self.found.append(func.name())
        return func(*args, **(kwargs or {}))

class WatchSteps(Callback):
    "Watches batches from before the teacher predicts until the loss is complete"
    order,run_valid = KnowledgeDistillationCallback.order+1,False
    def __init__(self, batches): self.batches,self.reads,self.n = batches,Reads(),0
    def before_batch(self):
        if self.iter in self.batches: self.reads.__enter__()
    def after_loss(self):
        if self.iter not in self.batches: return
        self.reads.__exit__(None, None, None)
        self.n += 1

def reads_of(loss, batches, **kwargs):
    "Operations in these batches of a fit that read values"
    set_seed(0)
    kd,watch = KnowledgeDistillationCallback(small_net(8).eval(), loss, **kwargs),WatchSteps(batches)
    learn = Learner(digits(300), small_net(4), loss_func=CrossEntropyLossFlat(), cbs=[kd, watch])
    learn.remove_cb(ProgressCallback)
    learn.logger = noop
    learn.fit(1)
    assert watch.n==len(batches)
    return watch.reads.found

@pytest.mark.parametrize('loss,kwargs', [
    (SoftTarget, {}), (SoftTarget, dict(weight=0.5)), (SoftTarget, dict(weight=0.5, balance=True)),
    ([SoftTarget, Attention], dict(layers='0')), ([Similarity, RKD], dict(layers='1')), (DIST, {})])
def test_a_step_reads_no_tensor(monkeypatch, loss, kwargs):
    "Batches 5 and 6: checks look again after 1, 2, 4, 8, ... batches, and columns are read in 50 steps on a GPU"
    monkeypatch.setattr(columns, 'flush_interval', lambda device: 50)
    assert reads_of(loss, (5,6), **kwargs)==[]

def test_reads_are_seen(monkeypatch):
    "The first batch is checked, and on a CPU columns are read at once"
    assert len(reads_of(SoftTarget, (0,)))>2 and len(reads_of(SoftTarget, (5,)))==2
