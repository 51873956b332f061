"What is different on a GPU: half precision, devices of states, random draws, and caches that move between devices."
from copy import deepcopy
import pytest, torch
from torch import nn
from fastai.basics import *
from fastai.callback.all import *
from kd_fastai.all import *
from kd_fastai.demo import digits, small_net

for o in [*globals()]:
    if o=='test' or o.startswith('test_'): del globals()[o]  # fastcore's own helpers, which pytest would take for tests

pytestmark = [pytest.mark.cuda, pytest.mark.filterwarnings('ignore::UserWarning')]
GPU = torch.device('cuda')

def net(width, seed=5):
    set_seed(seed)
    return small_net(width)

class Jitter(Transform):
    "Draws on the device of the batch"
    def encodes(self, x:Tensor): return x+torch.rand_like(x) if x.is_floating_point() else x

def loaders(device=GPU, **kwargs):
    set_seed(3)
    data = digits(100).train.dataset
    return DataLoaders(*(TfmdDL(data, bs=16, shuffle=o, num_workers=0, device=device, **kwargs) for o in (True,False)))

def learner(kd=None, dls=None, path='.', model=None):
    set_seed(0, reproducible=True)
    learn = Learner(dls or loaders(), model or small_net(4), loss_func=CrossEntropyLossFlat(), metrics=accuracy, cbs=kd,
                    path=path)
    learn.remove_cb(ProgressCallback)
    learn.logger = noop
    return learn

def fit(learn, n=2):
    set_seed(1, reproducible=True)
    learn.fit(n, 1e-2)
    return weights(learn)

def weights(learn): return torch.cat([p.detach().flatten().cpu() for p in learn.model.parameters()])
def device_types(tensors): return {o.device.type for o in tensors}

def test_half_precision():
    "The losses get float32, all columns are finite, and a teacher from the CPU returns there"
    teacher,seen = net(8),set()
    def types(pred, teacher_pred, fm_s, fm_t):
        seen.update(o.dtype for o in (pred, teacher_pred, *fm_s.values(), *fm_t.values()))
        return (pred-teacher_pred).square().mean()
    kd = KnowledgeDistillationCallback(teacher, [SoftTarget, Term(Attention, 10.), Term(types, 0.1)], layers=['0','1'])
    learn = learner(kd).to_fp16()
    before = weights(learn)
    assert not torch.equal(fit(learn), before)
    assert seen=={torch.float32}
    assert kd.history.isna().sum().sum()==0
    assert device_types(learn.model.parameters())=={'cuda'} and device_types(teacher.parameters())=={'cpu'}

def test_a_weight_of_zero_changes_nothing():
    "also not the random numbers of the GPU, from which the student's dropout draws"
    def train(kd=None):
        set_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(64,10))
        teacher = nn.Sequential(nn.Flatten(), nn.Linear(64,10))
        return fit(learner(kd and kd(teacher), model=model))
    assert torch.equal(train(), train(lambda t: KnowledgeDistillationCallback(t, Term(SoftTarget, 0.))))

class StateDevices(Callback):
    "Devices of the optimizer's tensors, also for what losses own, which it trains only during a fit"
    def __init__(self): self.seen = set()
    def after_step(self):
        tensors = [o for _,_,state,_ in self.opt.all_params() for o in state.values() if isinstance(o, Tensor)]
        self.n,self.seen = len(tensors),self.seen|device_types(o for o in tensors if o.ndim)

def test_load_moves_the_state_of_owned_weights(tmp_path):
    "the resumed training equals the uninterrupted one, nearly: kernels may round otherwise"
    def make(): return learner(KnowledgeDistillationCallback(net(8), Term(CRD(), 0.8, layers='2')), path=tmp_path)
    class Stop(Callback):
        order = 61
        def after_epoch(self):
            if self.epoch!=1: return
            self.learn.save('half')
            self.learn.states = get_random_states(),self.dls.train.rng.getstate()
            raise CancelFitException
    whole,half,rest = make(),make(),make()
    set_seed(1, reproducible=True)
    whole.fit(4, 1e-2)
    set_seed(1, reproducible=True)
    half.fit(4, 1e-2, cbs=Stop())
    rest.load('half')
    set_random_states(**half.states[0])
    rest.dls.train.rng.setstate(half.states[1])
    devices = StateDevices()
    rest.fit(4, 1e-2, start_epoch=2, cbs=devices)
    assert devices.seen=={'cuda'} and devices.n>2*len([*rest.model.parameters()])
    torch.testing.assert_close(weights(rest), weights(whole), rtol=1e-3, atol=1e-4)

@pytest.mark.parametrize('views', [None, 2])
def test_a_cache_on_the_gpu(views, tmp_path):
    "predicts as the live teacher does, to the same inputs; draws on the GPU are replayed"
    teacher,got = net(8),[]
    live = deepcopy(teacher).eval().to(GPU)
    tfms = dict(after_batch=[Jitter]) if views else {}
    def exact(pred, teacher_pred):
        with torch.no_grad(): torch.testing.assert_close(teacher_pred, live(learn.x), rtol=1e-3, atol=1e-3)
        got.append(len(pred))
        return (pred-teacher_pred).square().mean()
    def cached(): return CachedTeacher(teacher, tmp_path/'c', views=views)
    def stored(): return StoredTeacher(tmp_path/'c')
    for make in (cached, stored):
        learn = learner(KnowledgeDistillationCallback(make(), exact), loaders(**tfms))
        fit(learn, 4)
    assert sum(got)==8*100
    assert device_types(teacher.parameters())=={'cpu'}

def test_a_cache_that_was_filled_on_the_gpu_trains_on_the_cpu(tmp_path):
    "fingerprints of inputs differ by rounding only"
    teacher = net(8)
    CachedTeacher(teacher, tmp_path/'c').fill(loaders(), bar=False)
    def train(t): return fit(learner(KnowledgeDistillationCallback(t, SoftTarget), loaders(torch.device('cpu'))))
    torch.testing.assert_close(train(StoredTeacher(tmp_path/'c')), train(teacher), rtol=1e-2, atol=1e-3)

def test_views_leave_the_random_numbers_of_the_gpu():
    teacher,dls = CachedTeacher(net(8), views=2),loaders(after_batch=[Jitter])
    state = torch.cuda.get_rng_state()
    teacher.fill(dls, bar=False)
    assert torch.equal(state, torch.cuda.get_rng_state())

@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize('half', [False, True])
def test_teacher_dtype(dtype, half):
    "The copy predicts on the GPU, also in a student's half precision; the teacher stays where it is and what it is"
    teacher = net(8)
    def train(**kwargs):
        learn = learner(KnowledgeDistillationCallback(teacher, [SoftTarget, Term(Attention, 10.)], '1', **kwargs))
        return fit(learn.to_fp16() if half else learn)
    assert (train(teacher_dtype=dtype)-train()).abs().max()<0.1
    assert {(p.dtype,p.device.type) for p in teacher.parameters()}=={(torch.float32,'cpu')}

class NoSynchronization(Callback):
    "From before the teacher predicts until the loss is complete, an operation that waits for the GPU raises"
    order,run_valid = KnowledgeDistillationCallback.order+1,False
    n = 0
    def before_batch(self):
        if self.iter in (5,6): torch.cuda.set_sync_debug_mode('error')  # checks look again after 1, 2, 4, ... steps
    def after_loss(self):
        self.n += torch.cuda.get_sync_debug_mode()==2
        torch.cuda.set_sync_debug_mode('default')

@pytest.mark.parametrize('terms,layers', [(lambda: SoftTarget, None), (lambda: [SoftTarget, Attention], ['0'])],
                         ids=['predictions','features'])
def test_a_step_does_not_wait_for_the_gpu(terms, layers):
    kd,check = KnowledgeDistillationCallback(net(8).to(GPU), terms(), layers),NoSynchronization()
    learn = learner([kd, check])
    fit(learn, 2)
    assert check.n==4
