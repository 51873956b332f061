"Layers of networks from torchvision and fastai: names, sizes, matching."
import copy
import pytest, torch, torchvision
from torch import nn
from kd_fastai.hooks.capture import Capture
from kd_fastai.hooks.layers import get_model_layers
from kd_fastai.hooks.matching import match_feature_layers
from support import hooks

def body(m): return nn.Sequential(*list(m.children())[:-2])

def vision_learner_model(arch):
    "As `vision_learner` makes it: the body, and a head with pooling"
    from fastai.vision.learner import create_vision_model
    return create_vision_model(arch, 10, pretrained=False)

x = torch.rand(2,3,64,64)
r18,r34,r50,mobile,effnet,vit = (getattr(torchvision.models, o)
    for o in ('resnet18','resnet34','resnet50','mobilenet_v2','efficientnet_b0','vit_b_16'))

def shapes(model, names):
    with Capture(model, names) as c, torch.no_grad():
        model.eval()(x)
        return [tuple(f.shape[2:]) if f.ndim==4 else f.shape[1] for f in c.pop().values()]

R18_BODY = {'student': ['relu','layer1','layer2','layer3','layer4'], 'teacher': ['2','4','5','6','7']}
VISION_LEARNER = {k: ['0.2','0.4','0.5','0.6','0.7'] for k in ('student','teacher')}
MATCHES = {
    'resnet18-body':        (lambda: r18(), lambda: body(r34()), R18_BODY),
    'vision_learner':       (lambda: vision_learner_model(r18), lambda: vision_learner_model(r34), VISION_LEARNER),
    'resnet-mobilenet':     (lambda: r18(), lambda: mobile(), None),
    'mobilenet-resnet50':   (lambda: mobile(), lambda: r50(), None),
    'efficientnet-vision_learner': (lambda: effnet(), lambda: vision_learner_model(r18), None)}

@pytest.mark.slow
@pytest.mark.parametrize('student,teacher,expected', MATCHES.values(), ids=MATCHES)
def test_matched_layers_have_equal_sizes(student, teacher, expected):
    "One layer for each size, from large to small, without the input and the pooled feature."
    student,teacher = student(),teacher()
    m = match_feature_layers(student, teacher, x)
    if expected: assert m==expected
    s,t = shapes(student, m['student']),shapes(teacher, m['teacher'])
    assert s==t==sorted(s, reverse=True)
    assert len({*s})==len(s)>=4
    assert s[-1]==(2,2)
    assert (64,64) not in s

def test_tokens_of_transformers_match():
    def make(d): return torchvision.models.VisionTransformer(64, 16, 2, 2, d, 2*d, num_classes=3)
    m = match_feature_layers(make(8), make(12), x)
    assert 17 in shapes(make(8), m['student'])

class WindowAttention(nn.Module):
    "Attention within windows of maps `(B, H, W, C)`, as in Swin"
    def __init__(self, c): super().__init__(); self.qkv,self.softmax = nn.Linear(c, 3*c),nn.Softmax(-1)
    def forward(self, x):
        b,h,w,c = x.shape
        q,k,v = self.qkv(x.reshape(b, 2, h*w//2, c)).chunk(3, -1)
        return x+(self.softmax(q@k.mT)@v).reshape(b, h, w, c)

class MapsChannelsLast(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.stem,self.block,self.norm = nn.Conv2d(3, c, 4, 4),WindowAttention(c),nn.LayerNorm(c)
    def forward(self, x): return self.norm(self.block(self.stem(x).movedim(1, -1)))

def test_maps_with_channels_last_match_by_height_and_width():
    "Attention weights and windows are not maps"
    cnn = nn.Sequential(nn.Conv2d(3, 6, 4, 4), nn.ReLU(), nn.Conv2d(6, 9, 2, 2))
    layers = match_feature_layers(MapsChannelsLast(8), cnn, torch.randn(2, 3, 16, 24))
    assert layers=={'student': ['norm'], 'teacher': ['1']}
    both = match_feature_layers(MapsChannelsLast(8), MapsChannelsLast(12), torch.randn(2, 3, 16, 16))
    assert both['student']==both['teacher'] and 'norm' in both['student'] and 'block.softmax' not in both['student']

def test_matching_changes_neither_models_nor_random_state():
    a,b = r18(),mobile()
    a.layer1.eval()
    modes,state = [m.training for m in a.modules()],copy.deepcopy(a.state_dict())
    before = torch.get_rng_state()
    match_feature_layers(a, b, x)
    assert (torch.get_rng_state()==before).all()
    assert [m.training for m in a.modules()]==modes
    for k,v in a.state_dict().items(): assert (v==state[k]).all()
    assert hooks(a, b)==0

def test_models_without_a_common_size_are_an_error():
    with pytest.raises(ValueError, match=r"Student: \{\(62, 62\): '0'\}. Teacher: \{\(60, 60\): '0'\}"):
        match_feature_layers(nn.Sequential(nn.Conv2d(3,4,3)), nn.Sequential(nn.Conv2d(3,4,5)), x)

@pytest.mark.slow
def test_wrapped_models_have_the_names_of_the_model_inside():
    assert get_model_layers(nn.DataParallel(r18()))==get_model_layers(torch.compile(r18()))==get_model_layers(r18())
