"Teachers that are functions, and the faster copy of a teacher."
import time
from copy import deepcopy
import pytest, torch
from fastai.basics import *
from fastai.callback.all import *
from kd_fastai.all import *
from kd_fastai.teacher.fast import fast_copy
from support import learner, weights
from support.teachers import cached_fit, loaders, net

for o in [*globals()]:
    if o=='test' or o.startswith('test_'): del globals()[o]  # fastcore's own helpers, which pytest would take for tests

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
    assert calls==[8, *6*[16], 4]  # eight samples tell functions from each other, then each of 100 is predicted once
    cached_fit(teacher, losses=SoftTarget, layers=None)
    assert calls==[8, *6*[16], 4, 8]
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
    assert fast[0][0].weight.is_contiguous(memory_format=torch.channels_last)
    losses = [Term(SoftTarget, 1.), Term(Attention, 10.)]
    a,b = (weights(cached_fit(o, n=1, losses=losses)) for o in (t, fast))
    assert (a-b).abs().max()<(1e-4 if dtype==torch.float32 else 2e-2)

def test_a_fast_copy_that_differs_is_an_error():
    with pytest.raises(ValueError, match='at most 1e-09 is allowed'):
        fast_copy(net(8), torch.randn(8,1,8,8), dtype=torch.bfloat16, tolerance=1e-9)

# ---- the fastest form

class Sleeps(nn.Module):
    "A slow model of the same outputs"
    def __init__(self, model): super().__init__(); self.model = model
    def forward(self, x): time.sleep(0.02); return self.model(x)

def other(model):
    "A copy of other outputs"
    res = deepcopy(model)
    for p in res.parameters(): p.data += 0.1
    return res

def test_a_compiled_form_is_tried_where_it_is_wanted(monkeypatch):
    "The compiler itself is PyTorch's"
    monkeypatch.setattr(torch, 'compile', lambda model: model)
    net,x = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(72, 3)).eval(),torch.randn(4,1,8,8)
    for wanted in (True, False):
        fast = FastTeacher(net, compile=wanted)
        with fast.ready(): pred,_ = fast(x)
        assert ('compiled' in fast.times)==wanted
        torch.testing.assert_close(pred, net(x).detach())

@pytest.mark.parametrize('dropout,choice', [(0.,'quick'), (0.5,'as it is')])
def test_the_fastest_form_that_agrees_goes_on(dropout, choice, capsys):
    "A form of other outputs, or of random ones, is not taken"
    t,x = nn.Sequential(net(8), Draws(dropout)),loaders().train.dataset.x
    fast,wrong = FastTeacher(Sleeps(t)),other(t)
    fast.makers |= {'quick': lambda device: t, 'wrong': lambda device: wrong}
    state = torch.get_rng_state()
    with fast.ready(): pred,_ = fast(x)
    assert fast.choice==choice and f'The teacher runs {choice} (as it is ' in capsys.readouterr().out
    if not dropout: assert torch.equal(pred, t.eval()(x)) and torch.equal(state, torch.get_rng_state())
    fast.prepare(loaders().train)
    with fast.ready(): fast(x)
    assert fast.choice==choice and not capsys.readouterr().out  # kept in the next fit

def test_a_form_that_no_longer_agrees_is_left():
    t,x = net(8),loaders().train.dataset.x
    fast = FastTeacher(Sleeps(t))
    fast.makers['quick'] = lambda device: t
    with fast.ready(): fast(x)
    fast.makers['quick'] = lambda device: other(t)
    fast.prepare(loaders().train)
    with fast.ready(): assert torch.equal(fast(x)[0], t.eval()(x))
    assert fast.choice=='as it is'

class Draws(nn.Module):
    "Dropout that is also active in eval mode"
    def __init__(self, p): super().__init__(); self.p = p
    def forward(self, x): return nn.functional.dropout(x, self.p, training=self.p>0)

# ---- teacher_dtype

def keep_answers(got):
    "A loss that keeps the teacher's predictions and features"
    def keep(pred, teacher_pred, fm_t=()):
        got.append((teacher_pred, *dict(fm_t).values()))
        return (pred-teacher_pred).square().mean()
    return Term(keep)

@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16], ids=str)
def test_a_copy_in_half_precision_answers(dtype):
    "nearly as the teacher does, which stays as it is"
    t = net(8)
    with torch.no_grad(): t.train()(loaders().train.dataset.x)
    before,live,half = deepcopy(t.state_dict()),[],[]
    layers = [('1','1'),('0.0','0.0'),('0.1','0.1')]
    a = cached_fit(t, losses=keep_answers(live), layers=layers)
    b = cached_fit(t, losses=keep_answers(half), layers=layers, teacher_dtype=dtype)
    for x,y in zip(*(map(torch.cat, zip(*o)) for o in (live, half))):
        assert y.dtype==torch.float32 and 0<(x-y).abs().max()<0.02*x.abs().max()
    assert 0<(weights(a)-weights(b)).abs().max()<0.05
    assert t.training and not any(m._forward_hooks for m in t.modules())
    assert all(torch.equal(v, before[k]) and v.dtype==before[k].dtype for k,v in t.state_dict().items())

def test_the_copy_is_compared_before_the_first_step():
    t = net(8)
    t[-1].weight.data.mul_(1e6)  # the logits exceed what float16 can hold
    learn = learner(dls=loaders(), cbs=KnowledgeDistillationCallback(t, SoftTarget, teacher_dtype=torch.float16))
    before = weights(learn)
    with pytest.raises(ValueError, match=r'copy in torch.float16 differ by (inf|nan) \(predictions\)'): learn.fit(1)
    assert torch.equal(weights(learn), before)

def test_a_copy_changes_nothing_but_its_answers():
    "with a weight of 0 the training is the same bit for bit"
    def train(**kwargs): return weights(cached_fit(net(8), losses=Term(SoftTarget, 0.), layers=None, **kwargs))
    assert torch.equal(train(), train(teacher_dtype=torch.bfloat16))

def test_each_fit_makes_its_copy():
    "of the weights that the teacher has then"
    t,got = net(8),[]
    learn = learner(dls=loaders(shuffle=False), cbs=KnowledgeDistillationCallback(t, keep_answers(got),
                                                                          teacher_dtype=torch.bfloat16))
    learn.fit(1)
    t[-1].bias.data += 100
    learn.fit(1)
    assert (got[7][0]-got[0][0]).mean()>90

def test_a_copy_stops_early_and_converts_inputs():
    t = net(8)
    t.pretrained_cfg = dict(mean=(0.5,), std=(0.5,))
    def train(**kwargs):
        dls = loaders(after_batch=[Normalize.from_stats([0.1], [2.], cuda=False)])
        return cached_fit(t, dls, losses=Term(Attention, 10.), layers='1', teacher_tfm='auto', **kwargs)
    plain,fast = train(),train(teacher_dtype=torch.float32)
    torch.testing.assert_close(weights(fast), weights(plain), rtol=1e-3, atol=1e-4)
    assert fast.knowledge_distillation.teacher.early_exit

def test_a_recurrent_teacher_in_half_precision():
    "its hidden state does not reach the comparison"
    from fastai.text.all import AWD_LSTM, awd_lstm_clas_config, get_text_classifier
    config = {**awd_lstm_clas_config, 'emb_sz': 8, 'n_hid': 8, 'n_layers': 1}
    def model(): return get_text_classifier(AWD_LSTM, 20, 2, seq_len=8, config=config)
    set_seed(0)
    dls = DataLoaders(*(DataLoader([*zip(torch.randint(2,20,(32,12)), torch.arange(32)%2)], bs=8) for _ in range(2)))
    for _ in range(2):  # the second time its hidden state is that of another batch
        t = model()
        learn = learner(KnowledgeDistillationCallback(t, SoftTarget, teacher_dtype=torch.bfloat16), dls, model())
        learn.add_cbs([ModelResetter(), RNNCallback()]).fit(2)
    assert {p.dtype for p in t.parameters()}=={torch.float32}

def test_what_cannot_be_converted():
    with pytest.raises(TypeError, match='CachedTeacher predicts by itself'):
        KnowledgeDistillationCallback(CachedTeacher(net(8)), SoftTarget, teacher_dtype=torch.bfloat16)
    with pytest.raises(ValueError, match='FunctionTeacher has no floating-point weights'):
        KnowledgeDistillationCallback(FunctionTeacher(run(net(8))), SoftTarget, teacher_dtype=torch.bfloat16)
    for dtype in (torch.int8, 'bfloat16'):
        with pytest.raises(TypeError, match='a floating-point type such as torch.bfloat16'):
            KnowledgeDistillationCallback(net(8), SoftTarget, teacher_dtype=dtype)
    with pytest.raises(ValueError, match='leave teacher_dtype out'):
        MeanTeacher(net(8), SoftTarget, teacher_dtype=torch.bfloat16)

def test_an_ensemble_in_half_precision():
    "its Learner, with the data, is not copied"
    learn = Learner(loaders(), net(8), loss_func=CrossEntropyLossFlat())
    def refuse(self, memo): raise AssertionError('the data were copied')
    learn.dls.__class__ = type('Data', (DataLoaders,), dict(__deepcopy__=refuse))
    got = []
    learner_ = learner(dls=loaders(), cbs=KnowledgeDistillationCallback(Ensemble([learn, net(4)]), keep_answers(got),
                                                                teacher_dtype=torch.bfloat16))
    learner_.fit(1)
    assert got and got[0][0].dtype==torch.float32
