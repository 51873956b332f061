"The layout of captured features: checked against the layers that made them."
import pytest, torch
from torch import nn
from kd_fastai.hooks.capture import Capture
from kd_fastai.hooks.layout import batch_first

def captured(model, layer, x):
    with torch.no_grad(), Capture(model, [layer]) as c:
        model(x)
        f, = c.pop().values()
    return f

class ChannelsLast(nn.Module):
    "A stage of maps `(B, H, W, C)`, as in Swin"
    def __init__(self, c): super().__init__(); self.norm,self.fc = nn.LayerNorm(c),nn.Linear(c, c)
    def forward(self, x): return self.fc(self.norm(x))

class Patches(nn.Module):
    "A patch embedding that returns tokens `(B, N, D)`"
    def __init__(self, c): super().__init__(); self.proj = nn.Conv2d(3, c, 4, 4)
    def forward(self, x): return self.proj(x).flatten(2).mT

class ConvNeXt(nn.Module):
    "A block with channels first that ends in linear layers on channels last"
    def __init__(self, c):
        super().__init__()
        self.dw,self.norm,self.fc = nn.Conv2d(c, c, 3, padding=1),nn.LayerNorm(c),nn.Linear(c, c)
    def forward(self, x): return self.fc(self.norm(self.dw(x).movedim(1, -1))).movedim(-1, 1)

@pytest.mark.parametrize('size', [5, 8, 12], ids=['fewer positions','as many','more'])
@pytest.mark.parametrize('case', ['swin','convolution','convnext','sequence','tokens','patches'])
def test_layout(case, size):
    "Maps have channels first and tokens channels last, for any number of positions"
    c = 8
    maps,rows = torch.randn(2,3,size,size),torch.randn(2,3,size)
    to_last = nn.Conv2d(3, c, 1)
    class Moved(nn.Module):
        def forward(self, x): return x.movedim(1, -1)
    model,x,layer,expected = {
        'swin': (nn.Sequential(to_last, Moved(), ChannelsLast(c)), maps, '2', lambda out: out.movedim(-1, 1)),
        'convolution': (nn.Sequential(to_last, nn.ReLU()), maps, '1', lambda out: out),
        'convnext': (nn.Sequential(to_last, ConvNeXt(c)), maps, '1', lambda out: out),
        'sequence': (nn.Sequential(nn.Conv1d(3, c, 1), nn.BatchNorm1d(c), nn.ReLU()), rows, '2', lambda out: out.mT),
        'tokens': (nn.Sequential(nn.Linear(3, c), nn.LayerNorm(c)), rows.mT, '1', lambda out: out),
        'patches': (nn.Sequential(Patches(c)), torch.randn(2,3,16,16), '0', lambda out: out)}[case]
    model.eval()
    with torch.no_grad(): out = model(x)
    torch.testing.assert_close(captured(model, layer, x), expected(out))

@pytest.mark.parametrize('n', [3, 5, 10], ids=['fewer','as long as the sequence','a part of it'])
@pytest.mark.parametrize('layer', ['0:0','1','1.norm1'])
def test_sequence_first(layer, n):
    "Known from the modules, also where two dimensions could be the batch"
    class Net(nn.Sequential):
        def forward(self, x): return self[1](self[0](x)[0])
    model = Net(nn.GRU(6, 8), nn.TransformerEncoderLayer(8, 2, 16)).eval()
    x = torch.randn(n, 1, 6).expand(n, 10 if n==3 else 5, 6)
    f = batch_first(captured(model, layer, x.transpose(0, 1)), n, layer)
    outs = captured(model, (layer.partition(':')[0], lambda o: o[0] if layer=='0:0' else o), x.transpose(0, 1))
    torch.testing.assert_close(f, outs.transpose(0, 1))

def test_a_function_says_the_layout_itself():
    model,x = nn.Sequential(nn.Conv1d(3, 8, 1)),torch.randn(2,3,24)
    torch.testing.assert_close(captured(model, ('0', lambda f: f), x), model(x).detach())

@pytest.mark.parametrize('shape,expected', [((4,7,3), (4,7,3)), ((7,4,3), (4,7,3)), ((12,7,3), (12,7,3)),
                                            ((4,3,5,5), (4,3,5,5))])
def test_batch_first(shape, expected): assert batch_first(torch.randn(shape), 4, 'a').shape==expected

@pytest.mark.parametrize('shape', [(7,5,3), (8,4,3), (5,3,6,6)], ids=['no batch','two candidates','map'])
def test_a_feature_without_a_batch_dimension(shape):
    "The advice, a function that moves the batch, gives one"
    f = torch.randn(shape)
    with pytest.raises(ValueError, match=r"got layer 'a' of .*lambda f: f.movedim\(1, 0\)"): batch_first(f, 4, 'a')
