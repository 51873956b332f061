"Teachers that are functions, and the faster copy of a teacher."
from copy import deepcopy
import pytest, torch
from torch import nn
from kd_fastai.all import CachedTeacher, FunctionTeacher, SoftTarget, fast_copy, onnx_teacher
from test_cost import cached_fit, loaders, net, weights

pytestmark = pytest.mark.filterwarnings('ignore::UserWarning')

def run(t):
    def f(x):
        with torch.no_grad(): return t.eval()(torch.from_numpy(x)).numpy()
    return f

def test_a_function_teaches_as_its_model():
    t,args = net(8),dict(losses=SoftTarget, layers=None, n=1)
    expected = weights(cached_fit(t, **args))
    assert torch.equal(weights(cached_fit(FunctionTeacher(run(deepcopy(t))), **args)), expected)
    def probabilities(x): return torch.from_numpy(run(t)(x)).double().softmax(1).numpy()
    torch.testing.assert_close(weights(cached_fit(FunctionTeacher(probabilities, probabilities=True), **args)),
                               expected, rtol=1e-3, atol=1e-4)

def test_a_function_is_cached(tmp_path):
    calls,t = [],net(8)
    def f(x): calls.append(len(x)); return run(t)(x)
    teacher = CachedTeacher(FunctionTeacher(f), tmp_path/'c', version='1').fill(loaders(), bar=False)
    cached_fit(teacher, losses=SoftTarget, layers=None)
    assert sum(calls)==100
    with pytest.raises(ValueError, match='another version'):
        CachedTeacher(FunctionTeacher(f), tmp_path/'c', version='2').fill(loaders(), bar=False)

def test_onnx(tmp_path):
    "an exported teacher gives the same training as its original, within rounding"
    ort = pytest.importorskip('onnxruntime')
    pytest.importorskip('onnx')
    t,file = net(8).eval(),tmp_path/'t.onnx'
    torch.onnx.export(t, torch.randn(2,1,8,8), file, dynamo=False, input_names=['x'], dynamic_axes={'x': {0: 'n'}})
    teacher = onnx_teacher(ort.InferenceSession(str(file), providers=['CPUExecutionProvider']))
    args = dict(losses=SoftTarget, layers=None, n=1)
    torch.testing.assert_close(weights(cached_fit(teacher, **args)), weights(cached_fit(t, **args)), rtol=1e-3,
                               atol=1e-4)

@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_a_fast_copy_teaches_nearly_the_same(dtype):
    t = net(8)
    x = loaders().train.dataset.x
    with torch.no_grad(): t.train()(x)
    before = {k: v.clone() for k,v in t.state_dict().items()}
    fast = fast_copy(t, x, dtype=dtype, layers=['1'])
    assert all(torch.equal(v, before[k]) for k,v in t.state_dict().items()) and t.training
    assert isinstance(fast[0][1], nn.Identity)
    a,b = (weights(cached_fit(o, n=1)) for o in (t, fast))
    assert (a-b).abs().max()<(1e-4 if dtype==torch.float32 else 2e-2)

class UsedTwice(nn.Module):
    "The convolution's output is also used without the norm"
    def __init__(self):
        super().__init__(); self.conv,self.norm,self.head = nn.Conv2d(1,4,3),nn.BatchNorm2d(4),nn.Linear(4,10)
    def forward(self, x): x = self.conv(x); return self.head((x+self.norm(x)).mean((2,3)))

def test_what_cannot_be_folded_is_not():
    t,x = UsedTwice(),torch.randn(8,1,8,8)
    nn.init.constant_(t.norm.running_var, 9.)
    fast = fast_copy(t, x)
    assert isinstance(fast.norm, nn.BatchNorm2d)
    torch.testing.assert_close(fast(x), t.eval()(x))
    assert isinstance(fast_copy(net(8), x, layers=['0.1'])[0][1], nn.BatchNorm2d)
    with pytest.raises(ValueError, match='at most 1e-09 is allowed'):
        fast_copy(net(8), x, dtype=torch.bfloat16, tolerance=1e-9)
