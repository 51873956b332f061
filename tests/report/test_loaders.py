"Each tool with the loaders that plain fastai trains: PyTorch's, without a data set, iterable, a last batch of one."
import pytest, torch
from torch import nn
from torch.utils.data import DataLoader as TorchLoader, IterableDataset, TensorDataset
from fastai.basics import CrossEntropyLossFlat, DataLoader, DataLoaders, Learner, accuracy, noop, set_seed
from kd_fastai.all import (CachedTeacher, CRD, FastTeacher, SoftTarget, StoredTeacher, Term, export_onnx, kd_compare,
    layer_similarity)
from kd_fastai.hooks.matching import classifier_input
from kd_fastai.methods.gates import by_position

pytestmark = [pytest.mark.hostile, pytest.mark.slow, pytest.mark.filterwarnings('ignore')]

x,y = torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(0)),torch.arange(64)%4

def net(width):
    set_seed(width)
    return nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                         nn.Linear(width, 4))

class Batches:
    "A loader without a data set"
    def __len__(self): return 4
    def __iter__(self): return zip(x.split(16), y.split(16))
    def to(self, device): return self

class Stream(IterableDataset):
    def __iter__(self): return iter(zip(x, y))

LOADERS = {
    'PyTorch': lambda: TorchLoader(TensorDataset(x, y), 16),
    'without a data set': Batches,
    'iterable': lambda: DataLoader(Stream(), bs=16, n=64),
    'last batch of one': lambda: DataLoader([*zip(x[:33], y[:33])], bs=16)}

def learner(loader, width=4):
    learn = Learner(DataLoaders(LOADERS[loader](), LOADERS[loader]()), net(width), loss_func=CrossEntropyLossFlat(),
                    metrics=accuracy)
    learn.logger = noop
    return learn

def fit(learn):
    with learn.no_bar(): learn.fit(1)

TOOLS = {
    'distill': lambda learn, t, _: fit(learn.distill(t)),
    'CRD': lambda learn, t, _: fit(learn.distill(t, Term(CRD(dim=4)))),
    'FastTeacher': lambda learn, t, _: fit(learn.distill(FastTeacher(t.model))),
    'lr_find': lambda learn, t, _: learn.distill(t).lr_find(num_it=5, show_plot=False),
    'kd_report': lambda learn, t, _: learn.kd_report(t),
    'kd_card': lambda learn, t, _: learn.kd_card(t),
    'kd_parity': lambda learn, t, _: learn.kd_parity(rounds=1, same=learn.model),
    'kd_pretrain': lambda learn, t, _: learn.kd_pretrain(t),
    'kd_compare': lambda learn, t, loader: kd_compare(
        lambda seed: learner(loader), dict(a=None, b=SoftTarget), teacher=t, epochs=1, seeds=2, progress=False),
    'export_onnx': lambda learn, t, path: export_onnx(learn, path/'student.onnx'),
    'layer_similarity': lambda learn, t, _: layer_similarity(learn, t, learn.dls),
    'classifier_input': lambda learn, t, _: classifier_input(learn, learn.dls)}

@pytest.mark.parametrize('loader', LOADERS)
@pytest.mark.parametrize('tool', TOOLS)
def test_a_tool_takes_the_loader(tool, loader, tmp_path):
    TOOLS[tool](learner(loader), learner(loader, 8), loader if tool=='kd_compare' else tmp_path)

NEED_POSITIONS = {
    'CachedTeacher': lambda learn, t: learn.distill(CachedTeacher(t.model)),
    'StoredTeacher': lambda learn, t: learn.distill(StoredTeacher(torch.randn(64, 4))),
    'by_position': lambda learn, t: learn.distill(t, Term(SoftTarget, sample_weight=by_position(torch.ones(64))))}

@pytest.mark.parametrize('loader', [*LOADERS][:3])
@pytest.mark.parametrize('what', NEED_POSITIONS)
def test_what_needs_positions_says_so(what, loader):
    with pytest.raises(ValueError, match='index'): fit(NEED_POSITIONS[what](learner(loader), learner(loader, 8)))

def test_inputs_that_cannot_be_exported_are_named(tmp_path):
    class Named(nn.Module):
        def __init__(self): super().__init__(); self.body = net(4)
        def forward(self, x, names): return self.body(x)
    dl = DataLoader([(a, 'name', b) for a,b in zip(x, y)], bs=16)
    dl.n_inp = 2
    learn = Learner(DataLoaders(dl, dl), Named(), loss_func=CrossEntropyLossFlat())
    with pytest.raises(TypeError, match='Expected tensors as inputs of the student, got str'):
        export_onnx(learn, tmp_path/'student.onnx')
