"Teachers that are unusual: their types, their side effects, tensors that they share with the student."
import copy, threading
from collections import deque
import pytest, torch
from torch import nn
from fastai.basics import CrossEntropyLossFlat, DataLoader, DataLoaders, Learner
from fastai.callback.core import Callback
from kd_fastai.callback import KnowledgeDistillationCallback, Term
from kd_fastai.hooks.capture import Capture
from kd_fastai.hooks.layers import get_model_layers, get_module_by_name, parse_layer
from kd_fastai.losses import FitNet, Logits, SoftTarget
from kd_fastai.teacher.live import Teacher, get_logits

def mlp(seed, **kwargs):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6,8), nn.ReLU(), nn.Linear(8,5)).to(**kwargs)

def data(n=24):
    torch.manual_seed(0)
    rows = list(zip(torch.randn(n,6), torch.arange(n)%5))
    return DataLoaders(*(DataLoader(rows, bs=8, num_workers=0) for _ in range(2)))

def fit(student, teacher, loss=SoftTarget, layers=None, cbs=(), lr=0.1, **kwargs):
    "Train for an epoch and return the Learner"
    kd = KnowledgeDistillationCallback(teacher, loss, layers, **kwargs)
    learn = Learner(data(), student, loss_func=CrossEntropyLossFlat(), cbs=[kd, *cbs])
    with learn.no_bar(), learn.no_logging(): learn.fit(1, lr)
    return learn

def value(learn): return learn.recorder.values[0][-1]

x = torch.randn(4,6, generator=torch.Generator().manual_seed(0))

# ---- inputs ----

class InPlace(nn.Module):
    def __init__(self, net): super().__init__(); self.net = net
    def forward(self, x): return self.net(x.sub_(1))

class KeepsInputs(Callback):
    "Runs after the loss: compares the batch with its copy from before the forward"
    order,same = 100,None
    def before_batch(self): self.before = self.xb[0].clone()
    def after_loss(self): self.same = torch.equal(self.before, self.xb[0])

def test_teacher_in_place_leaves_the_batch_alone():
    learn = fit(mlp(1), InPlace(mlp(2)), cbs=[KeepsInputs()])
    assert learn.keeps_inputs.same

def test_teacher_tfm_in_place_leaves_the_batch_alone():
    learn = fit(mlp(1), mlp(2), teacher_tfm=lambda x: x.mul_(2), cbs=[KeepsInputs()])
    assert learn.keeps_inputs.same

def test_teacher_in_place_is_asked_on_the_same_inputs_in_each_batch():
    teacher = Teacher(InPlace(mlp(2)))
    xb = x.clone()
    with teacher.ready(): first,second = teacher(xb)[0],teacher(xb)[0]
    assert torch.equal(first, second)
    assert torch.equal(first, mlp(2)(x-1))

# ---- tensors that belong to both models ----

def test_shared_parameter_is_found_by_name():
    from kd_fastai.teacher.live import shared_tensors
    s,t = mlp(1),mlp(2)
    assert shared_tensors(s, t)==[]
    s[2].weight = t[2].weight
    assert shared_tensors(s, t)==[('2.weight','2.weight')]

def test_shared_buffer_and_shared_memory_are_found():
    from kd_fastai.teacher.live import shared_tensors
    s,t = nn.BatchNorm1d(3),nn.BatchNorm1d(3)
    s.running_mean = t.running_mean
    s.weight.data = t.weight.data
    assert shared_tensors(s, t)==[('weight','weight'), ('running_mean','running_mean')]

# ---- side effects of asking ----

class Reinitializes(nn.Linear):
    def reset(self): self.reset_parameters()

def test_reset_of_another_meaning_is_not_called():
    teacher = Reinitializes(6,5)
    before = teacher.weight.clone()
    with Teacher(teacher).ready(): pass
    assert torch.equal(before, teacher.weight)

def test_hidden_state_of_a_fastai_model_is_reset():
    from fastai.text.models.awdlstm import AWD_LSTM
    lm = nn.Sequential(AWD_LSTM(20, 8, 8, 1, hidden_p=0, input_p=0, embed_p=0, weight_p=0))
    tokens = torch.randint(0, 20, (2,5))
    teacher = Teacher(lm)
    with teacher.ready(): first = teacher(tokens)[0]
    with teacher.ready(): again = teacher(tokens)[0]
    assert torch.equal(first, again)

def test_reset_that_the_teachers_learner_calls_is_called():
    from fastai.callback.rnn import ModelResetter
    class Counts(nn.Linear):
        n = 0
        def reset(self): self.n += 1
    learn = Learner(data(), Counts(6,5), loss_func=CrossEntropyLossFlat(), cbs=ModelResetter())
    with Teacher(learn).ready(): pass
    assert learn.model.n==1

class Merges(nn.Linear):
    "As LoRA layers do: eval adds the update to the weight, train takes it out"
    merged = False
    def train(self, mode=True):
        if mode==self.merged: self.weight.data += 1. if not mode else -1.
        self.merged = not mode
        return super().train(mode)

def test_effects_of_eval_are_undone():
    teacher = nn.Sequential(Merges(6,5))
    before = teacher[0].weight.detach().clone()
    with Teacher(teacher).ready(): assert teacher[0].merged
    assert not teacher[0].merged and torch.allclose(before, teacher[0].weight)

def test_modes_of_single_layers_come_back():
    teacher = nn.Sequential(Merges(6,5), nn.BatchNorm1d(5), nn.Dropout())
    teacher[1].eval()
    with Teacher(teacher).ready(): assert not any(m.training for m in teacher.modules())
    assert [m.training for m in teacher.modules()]==[True,True,False,True]

def together(*fs):
    "Run functions in threads at once, and raise the first error"
    errors,barrier = [],threading.Barrier(len(fs))
    def run(f):
        try: barrier.wait(); f()
        except BaseException as e: errors.append(e)
    threads = [threading.Thread(target=run, args=[f]) for f in fs]
    for t in threads: t.start()
    for t in threads: t.join()
    if errors: raise errors[0]

def test_two_threads_ask_one_teacher():
    "The second is still asking when the first has finished"
    net = nn.Sequential(nn.Linear(6,8), nn.BatchNorm1d(8), nn.Linear(8,5))
    mean,want = net[1].running_mean.clone(),copy.deepcopy(net).eval()(x)
    first_open,both_open,one_closed = (threading.Event() for _ in range(3))
    def first():
        with Teacher(net).ready():
            first_open.set()
            both_open.wait(10)
        one_closed.set()
    def second():
        first_open.wait(10)
        with Teacher(net).ready() as t:
            both_open.set()
            one_closed.wait(10)
            torch.testing.assert_close(t(x)[0], want)
    together(first, second)
    assert torch.equal(net[1].running_mean, mean) and net.training and net[1].training

class Meets(nn.Module):
    "Waits until all threads have come here"
    def __init__(self, n): super().__init__(); self.net,self.barrier = mlp(2),threading.Barrier(n)
    def forward(self, x):
        y = self.net(x)
        self.barrier.wait(10)
        return y

def test_threads_capture_their_own_forwards():
    net = Meets(2)
    def ask(k):
        def f():
            with Teacher(net, ['net.0']).ready() as t:
                for _ in range(3): torch.testing.assert_close(t(x*k)[1]['net.0'], net.net[0](x*k))
        return f
    together(ask(1), ask(2))

class Remembers(nn.Module):
    "The last features are kept in a deque, and change the next ones"
    def __init__(self): super().__init__(); self.lin,self.out,self.past = nn.Linear(6,6),nn.Linear(6,5),deque(maxlen=2)
    def forward(self, x):
        f = self.lin(x+sum(self.past))
        y = self.out(f)
        self.past.append(y.mean())
        return y

def test_early_exit_respects_a_deque():
    torch.manual_seed(0)
    a = Remembers(); b = copy.deepcopy(a)
    early,whole = Teacher(a, ['lin']),Teacher(b, ['lin'], early_exit=False)
    with early.ready(), whole.ready():
        for _ in range(4): assert torch.equal(early(x, need_pred=False)[1]['lin'], whole(x, need_pred=False)[1]['lin'])

# ---- types ----

class Inference(nn.Module):
    def __init__(self): super().__init__(); self.net = mlp(2)
    @torch.inference_mode()
    def forward(self, x): return self.net(x)

def test_teacher_in_inference_mode():
    want = value(fit(mlp(1), mlp(2), Logits))
    assert value(fit(mlp(1), Inference(), Logits))==pytest.approx(want)

def test_features_of_a_teacher_in_inference_mode():
    want = value(fit(mlp(1), mlp(2), Term(FitNet), '0'))
    assert value(fit(mlp(1), Inference(), Term(FitNet), [('0','net.0')]))==pytest.approx(want)

def test_exported_program():
    net = mlp(2).eval()
    B = torch.export.Dim('B', min=2, max=64)
    program = torch.export.export(net, (x,), dynamic_shapes=({0:B},)).module()
    assert value(fit(mlp(1), program, Logits))==pytest.approx(value(fit(mlp(1), net, Logits)))

@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float64], ids=str)
def test_teacher_of_another_dtype(dtype):
    pred,fm = None,None
    teacher = Teacher(mlp(2, dtype=dtype), ['0'])
    with teacher.ready(): pred,fm = teacher(x)
    assert (pred.dtype, fm['0'].dtype)==(torch.float32, torch.float32)
    torch.testing.assert_close(pred, mlp(2)(x), atol=0.05, rtol=0.05)
    want = value(fit(mlp(1), mlp(2), Logits))
    assert value(fit(mlp(1), mlp(2, dtype=dtype), Logits))==pytest.approx(want, rel=0.05)

def test_integer_inputs_stay_integers():
    class Tokens(nn.Module):
        def __init__(self): super().__init__(); self.emb,self.out = nn.Embedding(9,4),nn.Linear(4,3)
        def forward(self, i, w): assert i.dtype==torch.long; return self.out(self.emb(i).mean(1)*w)
    teacher = Teacher(Tokens().to(torch.bfloat16))
    with teacher.ready(): assert teacher(torch.zeros(2,5).long(), torch.ones(2,1))[0].dtype==torch.float32

def test_layers_of_a_script_module_are_refused():
    scripted = torch.jit.script(mlp(2))
    with pytest.raises(TypeError, match='teacher: .*RecursiveScriptModule.*has no hooks'): Teacher(scripted, ['0'])
    assert value(fit(mlp(1), scripted, Logits))==pytest.approx(value(fit(mlp(1), mlp(2), Logits)))

def test_errors_inside_the_teacher_name_it():
    with pytest.raises(RuntimeError, match=r'mat1.*raised by the teacher, Sequential, for inputs \(8, 6\)'):
        fit(mlp(1), nn.Sequential(nn.Linear(7,5)), Logits)

# ---- names of layers ----

class Tied(nn.Module):
    def __init__(self): super().__init__(); self.a = nn.Linear(6,5); self.b = self.a
    def forward(self, x): return self.b(x)

def test_second_name_of_a_tied_layer():
    net = Tied()
    assert get_module_by_name(net, 'b') is net.a
    with Capture(net, ['b']) as c: y = net(x); assert c.pop()['b'] is y

@pytest.mark.parametrize('name', ['a:0', 'a@1', 'a:b@2', '>a', 'a:'])
def test_names_with_signs_of_ours(name):
    net = nn.ModuleDict({name: nn.Linear(6,5)})
    net.forward = lambda x: net[name](x)
    assert parse_layer(net, name).name==name
    with Capture(net, [name]) as c: y = net(x); assert c.pop()[name] is y
    assert parse_layer(net, f'{name}@0:1')[1:4]==(name, 0, '1')

# ---- teachers without a classifier ----

images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))

def vision_config(cls, **kwargs):
    return cls(image_size=32, patch_size=8, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, **kwargs)

def dino():
    import transformers as hf
    return hf.Dinov2Model(vision_config(hf.Dinov2Config)),images,'encoder.layer.1'

def clip():
    import transformers as hf
    return hf.CLIPVisionModel(vision_config(hf.CLIPVisionConfig, intermediate_size=16)),images,None

def bert_config(hf):
    return hf.BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
                         intermediate_size=16)

def bert():
    import transformers as hf
    return hf.BertModel(bert_config(hf)),torch.randint(0, 50, (2,7)),'encoder.layer.1'

@pytest.fixture(params=[dino, clip, bert])
def headless(request):
    "A model without a classifier, inputs, and the name of a layer"
    pytest.importorskip('transformers')
    model,inputs,layer = request.param()
    return model,inputs,layer or next(n for n in get_model_layers(model) if n.endswith('layers.1'))

def test_predictions_are_missing_only_if_they_are_needed(headless):
    model,inputs,layer = headless
    teacher = Teacher(model, [layer])
    with teacher.ready():
        for _ in range(2):
            pred,features = teacher(inputs, need_pred=False)
            assert pred is None and features[layer].shape==(2, 17 if inputs.ndim==4 else 7, 16)
        with pytest.raises(TypeError, match='with last_hidden_state, pooler_output.*by the teacher'): teacher(inputs)

@pytest.mark.parametrize('out,holds', [({'tokens': x}, 'dict with tokens'), (({}, 'a'), r'tuple of \(dict, str\)'),
                                       (None, 'NoneType')], ids=['dict','tuple','nothing'])
def test_an_output_without_predictions_says_what_it_holds(out, holds):
    with pytest.raises(TypeError, match=f'got {holds}: take a model with a classifier'): get_logits(out)

def test_timm_backbone():
    timm = pytest.importorskip('timm')
    teacher = Teacher(timm.create_model('resnet18', num_classes=0), ['layer4'])
    with teacher.ready():
        pred,features = teacher(images)
    assert pred.shape==(2,512) and features['layer4'].shape==(2,512,1,1)

# ---- training with teachers without a classifier ----

class Conv(nn.Sequential):
    "A student of images `(B, 3, 32, 32)`"
    def __init__(self):
        torch.manual_seed(1)
        super().__init__(nn.Conv2d(3,8,4,4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8,5))

class Words(nn.Sequential):
    "A student of tokens `(B, 7)`"
    def __init__(self):
        torch.manual_seed(1)
        super().__init__(nn.Embedding(50,8), nn.Linear(8,8), nn.Flatten(), nn.Linear(56,5))

def headless_fit(teacher, student, x, loss, **kwargs):
    "Train for three epochs on four copies of the inputs"
    rows = [(o, torch.tensor(i%5)) for i,o in enumerate(x.repeat(8, *[1]*(x.ndim-1)))]
    dls = DataLoaders(*(DataLoader(rows, bs=8, num_workers=0) for _ in range(2)))
    kd = KnowledgeDistillationCallback(teacher, loss, **kwargs)
    learn = Learner(dls, student, loss_func=CrossEntropyLossFlat(), cbs=kd)
    with learn.no_bar(), learn.no_logging(): learn.fit(3, 1e-2)
    return learn

def test_training_on_features_of_a_headless_model(headless):
    model,x,layer = headless
    before = copy.deepcopy(model.state_dict())
    student = Words() if x.ndim==2 else Conv()
    learn = headless_fit(model, student, x, Term(FitNet, 1., layers=[('0',layer)], adapt='auto', name='feature'))
    values = learn.kd_history().feature
    assert values.iloc[-1]<0.9*values.iloc[0]
    assert all(torch.equal(v, before[k]) for k,v in model.state_dict().items())

@pytest.mark.parametrize('make', [dino, clip, bert])
def test_training_that_needs_predictions_says_what_a_headless_model_returns(make):
    pytest.importorskip('transformers')
    model,x,_ = make()
    student = Words() if x.ndim==2 else Conv()
    before = copy.deepcopy(student.state_dict())
    with pytest.raises(TypeError, match='with last_hidden_state, pooler_output: take a model with a classifier'):
        headless_fit(model, student, x, SoftTarget)
    assert all(torch.equal(v, before[k]) for k,v in student.state_dict().items())

def test_training_on_the_pooled_features_of_a_timm_backbone():
    timm = pytest.importorskip('timm')
    backbone = timm.create_model('resnet18', num_classes=0)
    loss = Term(FitNet, layers=[('3','global_pool')], adapt='auto', name='feature')
    learn = headless_fit(backbone, Conv(), images, loss)
    values = learn.kd_history().feature
    assert values.iloc[-1]<0.9*values.iloc[0]

def test_predictions_of_a_timm_backbone_are_not_classes():
    timm = pytest.importorskip('timm')
    with pytest.raises(ValueError, match=r'got \(8, 5\) of the student and \(8, 512\) of the teacher'):
        headless_fit(timm.create_model('resnet18', num_classes=0), Conv(), images, SoftTarget)

# ---- several teachers by name ----

def backbone(width, seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6,width), nn.Tanh()).eval()


def test_gradient_is_the_sum_by_hand():
    torch.manual_seed(0)
    heads = dict(a=nn.Linear(8,16), b=nn.Linear(8,24))
    wide = dict(a=backbone(16, 2), b=backbone(24, 3))
    terms = [Term(FitNet, w, layers=[('0','0')], teacher=k, adapt=heads[k]) for k,w in (('a',0.5),('b',2.))]
    student,grads = mlp(1),[]
    class Keep(Callback):
        def after_backward(self):
            grads.append((self.x.clone(), self.y.clone(), [p.grad.clone() for p in student.parameters()]))
    kd = KnowledgeDistillationCallback(wide, terms)
    learn = Learner(data(), student, loss_func=CrossEntropyLossFlat(), cbs=[kd, Keep()])
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 0.)
    xb,y,got = grads[-1]
    feature = student[0](xb)
    loss = nn.functional.cross_entropy(student(xb), y)
    for k,w in (('a',0.5),('b',2.)): loss = loss + w*nn.functional.mse_loss(heads[k](feature), wide[k][0](xb).detach())
    torch.testing.assert_close(got, [*torch.autograd.grad(loss, [*student.parameters()])])

def test_one_callback_with_two_teachers_equals_two_callbacks():
    def terms(a=None, b=None): return [Term(Logits, 0.5, teacher=a), Term(FitNet, 2., layers='0', teacher=b)]
    wide = nn.Sequential(nn.Linear(6,8), nn.ReLU())
    one = fit(mlp(1), dict(a=mlp(2), b=wide), terms('a', 'b'))
    two = [KnowledgeDistillationCallback(t, o) for t,o in zip((mlp(2), wide), terms())]
    learn = Learner(data(), mlp(1), loss_func=CrossEntropyLossFlat(), cbs=two)
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 0.1)
    for a,b in zip(one.model.parameters(), learn.model.parameters()): torch.testing.assert_close(a, b)

def test_table_has_a_column_for_each_term_and_teacher():
    learn = fit(mlp(1), dict(a=mlp(2), b=mlp(3)), [Term(Logits, teacher='a'), Term(Logits, teacher='b')])
    assert [*learn.kd_history()][-3:]==['task_loss','logits_a','logits_b']

def test_each_teacher_exits_early_on_its_own():
    ran = []
    def named(k):
        net = nn.Sequential(nn.Linear(6,8), nn.ReLU(), nn.Linear(8,5))
        net[2].register_forward_hook(lambda *args: ran.append(k))
        return net
    fit(mlp(1), dict(a=named('a'), b=named('b')), [Term(Logits, teacher='a'), Term(FitNet, layers='0', teacher='b')])
    assert (ran.count('a'), ran.count('b'))==(3,1)  # the first forward of b runs to its end

def test_each_teacher_has_its_own_cache_and_transform():
    from kd_fastai.teacher.cached import CachedTeacher
    calls = []
    def counted(k, seed):
        net = mlp(seed).eval()
        net.register_forward_hook(lambda *args: calls.append(k))
        return CachedTeacher(net)
    cached = dict(a=counted('a', 2), b=counted('b', 3))
    terms = [Term(Logits, teacher='a'), Term(Logits, teacher='b')]
    kd = KnowledgeDistillationCallback(cached, terms, teacher_tfm={'b': lambda x: 2*x})
    learn = Learner(data(), mlp(1), loss_func=CrossEntropyLossFlat(), cbs=kd)
    with learn.no_bar(), learn.no_logging(): learn.fit(3, 0.)
    assert (calls.count('a'), calls.count('b'))==(3,3)
    h = learn.kd_history()
    plain = fit(mlp(1), dict(a=mlp(2), b=mlp(3)), terms, teacher_tfm={'b': lambda x: 2*x}, lr=0.).kd_history()
    assert h.logits_b[2]==pytest.approx(plain.logits_b[0], rel=1e-5)
    assert h.logits_a[2]==pytest.approx(plain.logits_a[0], rel=1e-5)

def test_class_maps_by_teacher():
    few = nn.Sequential(nn.Linear(6,3))
    learn = fit(mlp(1), dict(a=mlp(2), b=few), [Term(SoftTarget, teacher='a'), Term(SoftTarget, teacher='b')],
                class_map={'b': [2,-1,0,-1,1]})
    assert learn.kd_history().soft_target_b[0]>0

def test_teachers_stay_as_they_were_and_leave_nothing():
    teachers = dict(a=mlp(2), b=mlp(3))
    fit(mlp(1), teachers, [Term(Logits, teacher='a'), Term(FitNet, layers='0', teacher='b')])
    for net in teachers.values():
        assert net.training and all(p.grad is None for p in net.parameters())
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())

def test_a_loss_that_is_built_gets_its_own_teacher():
    seen = {}
    class Built(nn.Module):
        def __init__(self, name): super().__init__(); self.name = name
        def build(self, teacher, fm_t): seen[self.name] = teacher,{k: f.shape for k,f in fm_t.items()}
        def forward(self, fm_s, fm_t): return sum(f.mean() for f in fm_s.values())
    teachers = dict(a=mlp(2), b=backbone(16, 3))
    fit(mlp(1), teachers, [Term(Built(k), layers='0', teacher=k, name=k) for k in 'ab'])
    assert {k: t for k,(t,_) in seen.items()}==teachers
    assert seen['b'][1]=={'0': (8,16)}

def test_wrong_names_of_teachers():
    KD,two = KnowledgeDistillationCallback,dict(a=mlp(2), b=mlp(3))
    with pytest.raises(ValueError, match=r"one of the teachers \['a', 'b'\], .*in logits"): KD(two, Logits)
    with pytest.raises(ValueError, match='in logits_c'): KD(two, [Term(Logits, teacher=k) for k in 'abc'])
    with pytest.raises(ValueError, match=r"No term learns from the teachers \['b'\]"):
        KD(two, Term(Logits, teacher='a'))
    with pytest.raises(ValueError, match='there is a single one: give a dict'): KD(mlp(2), Term(Logits, teacher='a'))
    with pytest.raises(ValueError, match="at least one teacher by name"): KD({}, Logits)
    with pytest.raises(ValueError, match="is an identifier such as"): KD({1: mlp(2)}, Logits)
    terms = [Term(Logits, teacher=k) for k in 'ab']
    with pytest.raises(ValueError, match=r"teacher_tfm of the teachers \['a', 'b'\], got \['c'\]"):
        KD(two, terms, teacher_tfm={'c': abs})
    import kd_fastai.report.report  # noqa: F401
    with pytest.raises(ValueError, match='kd_report compares the student with one teacher'):
        fit(mlp(1), two, terms).kd_report()

def test_shared_tensors_name_the_teacher():
    student,other = mlp(1),mlp(3)
    other[2].weight = student[2].weight
    with pytest.raises(ValueError, match=r"student's '2.weight' and the teacher's 'b.2.weight' are the same tensor"):
        fit(student, dict(a=mlp(2), b=other), [Term(Logits, teacher=k) for k in 'ab'])

# ---- features on one scale ----

def phi_s_cases():
    import json, numpy as np
    from pathlib import Path
    golden = Path(__file__).parents[1]/'golden'
    arrays = np.load(golden/'phi_s.npz')
    for case in json.loads((golden/'index'/'phi_s.json').read_text())['cases']:
        prefix = case['key']+'/'
        yield case,{k.removeprefix(prefix): torch.tensor(arrays[k]) for k in arrays.files if k.startswith(prefix)}

def test_golden_phi_s():
    from kd_fastai.methods.phi_s import phi_s
    done = []
    for case,given in phi_s_cases():
        if case['compare']=='none': continue
        stats,signs,t = (given[k] for k in ('aux/stats','state/signs','fm_t/feat'))
        standard = phi_s(stats.double(), signs)
        torch.testing.assert_close(standard.mean.float(), given['state_after/mean'].float(), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(standard.matrix.float(), given['state_after/matrix'].float(), rtol=1e-3, atol=1e-4)
        s = given['fm_s/feat'].double().requires_grad_()
        value = FitNet({'a': s}, {'b': standard(t.double())})
        assert value.item()==pytest.approx(float(given['expected']), rel=1e-5)
        gradient = torch.autograd.grad(value, s)[0].float()
        torch.testing.assert_close(gradient, given['grad/fm_s/feat'].float(), rtol=1e-4, atol=1e-6)
        done.append(case['case'])
    assert len(done)>=7

def test_all_channels_have_one_variance():
    from kd_fastai.methods.phi_s import phi_s
    g = torch.Generator().manual_seed(0)
    for C in (2,8,12,20,24,28):
        f = (torch.randn(400,C, generator=g)@torch.randn(C,C, generator=g)).double()*100+5
        torch.testing.assert_close(phi_s(f)(f).var(0), torch.ones(C).double())

def test_features_that_cannot_be_standardized():
    from kd_fastai.methods.phi_s import phi_s
    with pytest.raises(ValueError, match='two samples and two channels'): phi_s(torch.randn(5,1))
    with pytest.raises(ValueError, match='No Hadamard matrix of size 6'): phi_s(torch.randn(9,6))
    with pytest.raises(ValueError, match='features that vary'): phi_s(torch.ones(5,4))

# ---- inputs of layers, and the feature that a classifier reads ----

def classifiers():
    import timm, torchvision.models as tv, transformers as hf
    yield tv.resnet18(num_classes=5),'>fc',images
    yield tv.densenet121(num_classes=5),'>classifier',images
    yield tv.mobilenet_v2(num_classes=5),'>classifier.1',images
    yield tv.mobilenet_v3_small(num_classes=5),'>classifier.3',images
    yield timm.create_model('convnext_atto', num_classes=5),'>head.fc',images
    yield timm.create_model('vit_tiny_patch16_224', img_size=32, patch_size=8, depth=2, num_classes=5),'>head',images
    yield hf.ViTForImageClassification(vision_config(hf.ViTConfig, num_labels=5)),'>classifier',images
    yield hf.BertForSequenceClassification(bert_config(hf)),'>classifier',torch.randint(0, 50, (2,7))

def test_classifier_input_is_what_the_last_linear_layer_receives():
    pytest.importorskip('timm'); pytest.importorskip('transformers')
    from kd_fastai.hooks.matching import classifier_input
    for model,layer,inputs in classifiers():
        assert classifier_input(model, inputs)==layer
        received = []
        handle = get_module_by_name(model, layer[1:]).register_forward_pre_hook(lambda m,args: received.append(args[0]))
        with Capture(model.eval(), [layer, '>']) as c, torch.no_grad():
            model(inputs)
            by_name,found = c.pop().values()
        assert by_name is received[-1]
        assert found is received[-1]
        handle.remove()

def test_input_of_a_layer_given_by_keyword():
    class Scale(nn.Module):
        def forward(self, x, by): return x*by
    class Net(nn.Module):
        def __init__(self): super().__init__(); self.scale = Scale()
        def forward(self, x): return self.scale(x, by=x+1)
    net = Net()
    with Capture(net, ['>scale', '>scale:by', '>scale:0']) as c:
        net(x)
        first,by,zero = c.pop().values()
    assert first is x and zero is x and torch.equal(by, x+1)

def test_early_exit_before_a_layer():
    net,ran = mlp(2),[]
    net[2].register_forward_hook(lambda *args: ran.append(1))
    teacher = Teacher(net, ['>2'])
    with teacher.ready(): features = [teacher(x, need_pred=False)[1]['>2'] for _ in range(3)]
    assert len(ran)==1
    for f in features: assert torch.equal(f, net[:2](x))

# ---- layers of transformers ----

def test_blocks_of_vision_transformers_are_matched():
    timm = pytest.importorskip('timm')
    from kd_fastai.hooks.matching import match_feature_layers
    def vit(depth): return timm.create_model('vit_tiny_patch16_224', img_size=32, patch_size=8, depth=depth)
    layers = match_feature_layers(vit(2), vit(4), images)
    pairs = [*zip(layers['student'], layers['teacher'])]
    assert ('blocks.0','blocks.1') in pairs and ('blocks.1','blocks.3') in pairs
    assert not any('attn' in n for names in layers.values() for n in names)

def test_blocks_of_hugging_face_models_are_matched():
    hf = pytest.importorskip('transformers')
    from kd_fastai.hooks.matching import match_feature_layers
    small,large = bert_config(hf),bert_config(hf)
    large.num_hidden_layers = 4
    layers = match_feature_layers(hf.BertModel(small), hf.BertModel(large), torch.randint(0, 50, (2,7)))
    assert layers=={'student': ['encoder.layer.0','encoder.layer.1'], 'teacher': ['encoder.layer.1','encoder.layer.3']}

def test_matching_reads_learners_data_and_conversions():
    from kd_fastai.demo import digits, small_net
    from kd_fastai.hooks.matching import layer_similarity, match_feature_layers
    dls = digits(100)
    learn = Learner(dls, small_net(4), loss_func=CrossEntropyLossFlat())
    rng = dls.train.rng.getstate()
    assert match_feature_layers(learn, small_net(8), dls)=={'student': ['1','2'], 'teacher': ['1','2']}
    assert dls.train.rng.getstate()==rng
    def larger(x): return nn.functional.interpolate(x, size=16)
    assert match_feature_layers(learn, small_net(8), dls, teacher_tfm=larger)=={'student': ['1'], 'teacher': ['2']}
    colored = nn.Sequential(nn.Conv2d(3,4,3), nn.ReLU())
    with pytest.raises(RuntimeError, match=r'by the teacher, Sequential, for inputs \(20, 1, 8, 8\)'):
        layer_similarity(learn, colored, dls)
    assert layer_similarity(learn, colored, dls, teacher_tfm=lambda x: x.expand(-1,3,-1,-1)).shape==(6,2)

# ---- normalization ----

def test_auto_conversion_to_a_timm_teacher():
    timm = pytest.importorskip('timm')
    from fastai.basics import Normalize
    teacher_model = timm.create_model('vit_tiny_patch16_224', img_size=32, patch_size=8, depth=1, num_classes=5,
                                      pretrained_cfg_overlay=dict(input_size=(3,32,32)))
    rows = [(torch.rand(3,16,16), i%5) for i in range(8)]
    norm = Normalize.from_stats([0.2]*3, [0.4]*3, cuda=False)
    dls = DataLoaders(*(DataLoader(rows, bs=4, num_workers=0) for _ in range(2)))
    dls.train.after_batch = type('Pipe', (), dict(fs=[norm], __call__=lambda self, b: b))()
    teacher = Teacher(teacher_model, tfm='auto')
    with pytest.raises(RuntimeError, match='call prepare'), teacher.ready(): teacher(rows[0][0][None])
    teacher.prepare(dls.train)
    raw = torch.rand(2,3,16,16)
    with teacher.ready(): pred = teacher((raw-0.2)/0.4)[0]
    want = nn.functional.interpolate((raw-0.5)/0.5, size=(32,32), mode='bilinear', antialias=True)
    with torch.no_grad(): torch.testing.assert_close(pred, teacher_model.eval()(want), atol=1e-4, rtol=1e-4)

def test_auto_conversion_needs_to_know_the_teacher():
    teacher = Teacher(mlp(2), tfm='auto')
    with pytest.raises(ValueError, match='needs the normalization of the teacher, which Sequential does not say'):
        teacher.prepare(data().train)
    with pytest.raises(ValueError, match="Expected a function or 'auto'"): Teacher(mlp(2), tfm='imagenet')

def test_name_of_a_timm_model_as_teacher(monkeypatch):
    timm = pytest.importorskip('timm')
    from kd_fastai.hooks.models import timm_teacher
    asked,create = [],timm.create_model
    def without_weights(name, pretrained, **kwargs):
        asked.append((name, pretrained))
        return create(name, **kwargs)
    monkeypatch.setattr(timm, 'create_model', without_weights)
    teacher = Teacher('timm/resnet18')
    assert asked==[('resnet18',True)] and not any(p.requires_grad for p in teacher.model.parameters())
    half = Teacher(timm_teacher('resnet18', dtype=torch.bfloat16, num_classes=5))
    with half.ready(): assert half(images)[0].dtype==torch.float32

# ---- copies and other forwards while a capture is open ----

def test_models_are_copied_and_saved_while_captured(tmp_path):
    net = mlp(2)
    with Capture(net, ['0', '>2']) as c:
        net(x)
        copied = copy.deepcopy(net)
        torch.save(net, tmp_path/'net.pth')
        c.pop()
        loaded = torch.load(tmp_path/'net.pth', weights_only=False)
        for o in (copied, loaded): assert torch.equal(o(x), mlp(2)(x))
        assert c.outputs=={}

def test_capture_ignores_forwards_while_disabled():
    net = mlp(2)
    with Capture(net, ['0']) as c:
        net(x)
        c.enabled = False
        net(2*x)
        assert torch.equal(c.pop()['0'], net[0](x))
