"Random cases of whole kinds of faults, seeded and bounded, against an oracle."
import copy, random
from contextlib import ExitStack
import numpy as np, pandas as pd, pytest, torch
from torch import nn
from fastai.basics import Callback, CancelBatchException, CancelFitException, DataLoader, DataLoaders
from kd_fastai.all import CachedTeacher, Logits, StoredTeacher
from kd_fastai.fit.internals import extra_parameters
from kd_fastai.hooks.capture import Capture
from kd_fastai.hooks.models import own_copy
from kd_fastai.teacher.live import shared_eval_mode
from kd_fastai.teacher.indices import BatchTracker
from support.batches import FGSM, Items, KD, Keep, data, differences, fit, learner, mlp

pytestmark = pytest.mark.filterwarnings('ignore')

# ---- inputs are the student's

class Holder:
    def __init__(self, a, b): self.a,self.b = a,b

def random_batch(r, depth=0):
    "Tensors and arrays in random containers"
    if depth==3 or r.random()<0.3: return r.choice([torch.ones(3), torch.ones(2,2).long(), np.ones(2), 'a', 1.])
    parts = [random_batch(r, depth+1) for _ in range(2)]
    return r.choice([list, tuple, lambda o: dict(zip('ab', o)), lambda o: Holder(*o)])(parts)

def content(o):
    "All numbers in a batch, with the containers around them"
    if isinstance(o, (torch.Tensor,np.ndarray)): return np.asarray(o).tolist()
    if isinstance(o, Holder): return content(vars(o))
    if isinstance(o, dict): return {k: content(v) for k,v in o.items()}
    return [content(v) for v in o] if isinstance(o, (list,tuple)) else o

def spoil(o, r):
    "Change everything in a batch in place"
    if isinstance(o, torch.Tensor): return r.choice([o.zero_, o.data.zero_, o.set_, lambda: o.numpy().fill(7)])()
    if isinstance(o, np.ndarray): return o.fill(7)
    parts = {dict: lambda: [*o.values()], Holder: lambda: [o.a, o.b], list: lambda: o, tuple: lambda: o}
    for v in parts.get(type(o), list)(): spoil(v, r)
    if isinstance(o, (list,dict)): o.clear()

@pytest.mark.parametrize('seed', range(40))
def test_random_batches_stay_whatever_is_done_to_their_copies(seed):
    r = random.Random(seed)
    batch = tuple(random_batch(r) for _ in range(3))
    before = content(batch)
    spoil(own_copy(batch), r)
    assert content(batch)==before

# ---- which forward pass, which batch

class Peek(Callback):
    "Draws another batch"
    run_valid = False
    def __init__(self, order): self.order = order
    def before_batch(self): self.other = self.learn.dls.train.one_batch()

class Again(Callback):
    "Runs the model once more"
    run_valid = False
    def __init__(self, order, event): self.order = order; setattr(self, event, lambda: self.model(torch.zeros(2,6)))

class Skip(Callback):
    "Leaves out batches"
    run_valid = False
    def __init__(self, order): self.order = order
    def before_batch(self):
        if self.iter%2: raise CancelBatchException

@pytest.mark.parametrize('seed', range(20))
def test_random_callbacks_do_not_change_which_batch_the_teacher_sees(seed):
    r = random.Random(seed)
    def order(): return r.choice([-20, -3, 3, 20])
    choices = [lambda: FGSM(order()), lambda: Peek(order()), lambda: Skip(order()),
               lambda: KD(mlp(8), Logits, weight=0.), lambda: Again(order(), r.choice(['before_batch','after_pred']))]
    student = mlp(1)
    if r.random()<0.3: student.register_forward_pre_hook(lambda m, args: (args[0]*5-2,))
    assert differences([f() for f in r.sample(choices, 3)], student, dls=data(shuffle=True))<1e-5

# ---- stored predictions are those of the samples

class StopAt(Callback):
    order,run_valid = 70,False
    def __init__(self, n): self.n = n
    def after_batch(self):
        if self.iter==self.n: raise CancelFitException

def reverse(items): return items[::-1]

def random_loaders(r, n, shuffle=None, **kwargs):
    if shuffle is None: shuffle = r.random()<0.5
    train = DataLoader(Items(n), bs=r.choice([3,8,16]), shuffle=shuffle, drop_last=r.random()<0.3, **kwargs)
    return DataLoaders(train, DataLoader(Items(n), bs=16))

@pytest.mark.parametrize('seed', range(25))
def test_random_caches_predict_as_the_live_teacher(seed, tmp_path):
    "Other loaders in each fit, interrupts, views, features or predictions, in memory or in a folder"
    r,teacher = random.Random(seed),mlp(9)
    n,views,path = r.randint(17, 64),r.choice([None, None, 1, 2]),r.choice([None, tmp_path/'c'])
    layers,shuffle = r.choice([None, '0']),r.random()<0.5 if views else None  # views replay one order
    tfms = dict(before_batch=reverse) if not views and r.random()<0.3 else {}
    def loaders(): return random_loaders(r, n, shuffle, **tfms)
    def live(x): return teacher[0](x) if layers else teacher(x)
    def of_predictions(pred, teacher_pred): got.append(teacher_pred); return pred.mean()
    def of_features(fm_s, fm_t): got.append(fm_t['0']); return fm_s['0'].mean()
    cached = CachedTeacher(teacher, path, views=views)
    if r.random()<0.3: cached.fill(loaders(), bar=False)
    for _ in range(3):
        keep,got = Keep(),[]
        if path and r.random()<0.5: cached = CachedTeacher(teacher, path, views=views)
        kd = KD(cached, of_features if layers else of_predictions, layers, weight=1.)
        fit(learner(mlp(1), [keep, kd, StopAt(r.choice([1, 99]))], loaders()), r.choice([1, 2]))
        for x,p in zip(keep.x, got): torch.testing.assert_close(p, live(x).detach(), rtol=1e-4, atol=1e-5)

@pytest.mark.parametrize('seed', range(5))
def test_random_orders_of_a_table_give_the_predictions_of_the_samples(seed):
    r,got,keep = random.Random(seed),[],Keep()
    def loss(pred, teacher_pred): got.append(teacher_pred); return pred.mean()
    table = pd.DataFrame(Items().x.numpy()).sample(frac=1, random_state=seed)
    fit(learner(mlp(1, n_out=6), [keep, KD(StoredTeacher(table), loss, weight=1.)], random_loaders(r, 64)))
    assert all(torch.equal(x, p) for x,p in zip(keep.x, got))

# ---- contexts may end in any order

@pytest.mark.parametrize('seed', range(20))
def test_contexts_that_end_in_any_order_leave_nothing(seed):
    r,learn = random.Random(seed),learner(mlp(1))
    model,dl = learn.model.train(),learn.dls.train
    makers = [lambda: Capture(model, ['0']), lambda: shared_eval_mode(model), lambda: BatchTracker(dl),
              lambda: extra_parameters(learn, [nn.Parameter(torch.ones(1))])]
    before = {*vars(dl)},{*vars(learn)}
    open_ones = []
    for make in r.choices(makers, k=8):
        open_ones.append(ExitStack())
        open_ones[-1].enter_context(make())
        if r.random()<0.4: open_ones.pop(r.randrange(len(open_ones))).close()
    for o in r.sample(open_ones, len(open_ones)): o.close()
    assert ({*vars(dl)},{*vars(learn)})==before
    assert model.training and not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert len([*learn.parameters()])==4

def test_two_callbacks_that_end_in_the_order_in_which_they_began():
    "Their owned weights leave the optimizer and the Learner"
    learn = learner(mlp(1))
    a,b = (extra_parameters(learn, [nn.Parameter(torch.ones(1))]) for _ in range(2))
    a.__enter__(); b.__enter__(); a.__exit__(None, None, None)
    assert len([*copy.copy(learn).parameters()])==5
    b.__exit__(None, None, None)
    assert 'parameters' not in vars(learn)
