"Teachers that are unusual: their types, their side effects, tensors that they share with the student."
import copy, threading
from collections import deque
import pytest, torch
from torch import nn
from torch.nn.utils import parametrize
from fastai.basics import CrossEntropyLossFlat, DataLoader, DataLoaders, Learner, set_seed
from fastai.callback.core import Callback
from kd_fastai.callback import KnowledgeDistillationCallback, Term
from kd_fastai.capture import Capture
from kd_fastai.layers import get_module_by_name, parse_layer
from kd_fastai.losses import FitNet, Logits, SoftTarget
from kd_fastai.teacher import Teacher

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

def test_guard_returns_the_inputs_from_before_the_student():
    from kd_fastai.inputs import InPlaceGuard
    guard = InPlaceGuard('student')
    for _ in range(3):
        xb = (x.clone(),)
        guard.before(xb)
        InPlace(mlp(1))(*xb)
        assert torch.equal(guard.after()[0], x)

def test_guard_copies_only_the_first_batch_of_a_student_that_changes_nothing():
    from kd_fastai.inputs import InPlaceGuard
    guard,returned = InPlaceGuard('student'),[]
    for _ in range(3):
        guard.before((x,))
        mlp(1)(x)
        returned.append(guard.after()[0] is x)
    assert returned==[True]*3 and not guard.copying

def test_guard_names_a_model_that_starts_to_change_inputs_later():
    from kd_fastai.inputs import InPlaceGuard
    guard = InPlaceGuard('student')
    guard.before((x,)); guard.after()
    xb = (x.clone(),)
    guard.before(xb); xb[0].relu_()
    with pytest.raises(RuntimeError, match='student changed its input in place'): guard.after()

# ---- tensors that belong to both models ----

def test_shared_parameter_is_found_by_name():
    from kd_fastai.teacher import shared_tensors
    s,t = mlp(1),mlp(2)
    assert shared_tensors(s, t)==[]
    s[2].weight = t[2].weight
    assert shared_tensors(s, t)==[('2.weight','2.weight')]

def test_shared_buffer_and_shared_memory_are_found():
    from kd_fastai.teacher import shared_tensors
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
