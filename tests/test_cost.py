"What saves time changes no number: the teacher's early exit, and its cache."
import json, os, signal, subprocess, sys, textwrap
from copy import deepcopy
import numpy as np, pytest, torch
from torch import nn
from fastai.basics import *
from fastai.callback.all import *
from kd_fastai.all import *
from kd_fastai.demo import digits, small_net

for o in [*globals()]:
    if o=='test' or o.startswith('test_'): del globals()[o]  # fastcore's own helpers, which pytest would take for tests

pytestmark = pytest.mark.filterwarnings('ignore::UserWarning')

def learner(dls=None, cbs=None, model=None):
    set_seed(0)
    learn = Learner(dls or digits(100), model or small_net(4), loss_func=CrossEntropyLossFlat(), metrics=accuracy, cbs=cbs)
    learn.remove_cb(ProgressCallback)
    learn.logger = noop
    return learn

def fit(learn, n=2):
    set_seed(1)
    learn.fit(n, 1e-2)
    return learn

def weights(m): return torch.cat([p.detach().flatten().clone() for p in getattr(m, 'model', m).parameters()])
def net(width=4, seed=5):
    set_seed(seed)
    return small_net(width)

# ---- early exit

class Flow(nn.Module):
    "A teacher whose forward is `f(self, x)`"
    def __init__(self, f):
        super().__init__()
        self.f,self.a,self.b,self.act,self.bn,self.head = f,nn.Conv2d(1,4,3,padding=1),nn.Conv2d(4,4,3,padding=1),nn.ReLU(),nn.BatchNorm2d(4),nn.Linear(4,10)
        self.inplace,self.h,self.hs = nn.ReLU(inplace=True),0.,[0.]
    def forward(self, x): return self.head(self.f(self, x).mean((2,3)))

def straight(m, x): return m.bn(m.act(m.b(m.a(x))))
def in_place_behind(m, x): return m.inplace(m.bn(m.b(m.act(m.a(x)))))
def twice(m, x): return m.act(m.b(m.act(m.a(x))))
def order_by_data(m, x): return m.act(m.b(m.a(x))) if x[0].mean()>-0.4 else m.b(m.act(m.a(x)))
def hidden(m, x):
    f = m.act(m.a(x)+m.h); m.h = m.b(f).mean((0,2,3))[None,:,None,None]
    return f
def hidden_in_list(m, x):
    f = m.act(m.a(x)+m.hs[0]); m.hs[0] = m.b(f).mean((0,2,3))[None,:,None,None]
    return f
def statistics(m, x):
    f = m.act(m.a(x)); m.bn.running_mean.add_(f.mean((0,2,3)))
    return m.bn(m.b(f))
def random_behind(m, x): return F.dropout(m.b(m.act(m.a(x))), training=True)
def swallows(m, x):
    try: f = m.act(m.a(x))
    except BaseException: f = m.a(x)
    return m.b(f)

FLOWS = dict(straight=(straight, ['act'], True), two=(straight, ['act','a'], True), in_place_behind=(in_place_behind, ['act'], True), first_call=(twice, ['act@0'], False),
             last_call=(twice, ['act@-1'], False), order_by_data=(order_by_data, ['a','act','b'], None), hidden=(hidden, ['act'], False), hidden_in_list=(hidden_in_list, ['act'], False),
             statistics=(statistics, ['act'], False), random_behind=(random_behind, ['act'], False), swallows=(swallows, ['act'], False))

def watched(f, early_exit, layers, n=2):
    "Train by features of a teacher; its columns, the student's weights, and how often the teacher ran to its end"
    set_seed(5)
    t,ends = Flow(f).eval(),[]
    t.head.register_forward_hook(lambda *_: ends.append(1))
    student = nn.Sequential(OrderedDict(a=nn.Conv2d(1,4,3,padding=1), d=nn.Dropout(0.2), act=nn.ReLU(), pool=nn.AdaptiveAvgPool2d(1), flat=nn.Flatten(), head=nn.Linear(4,10)))
    kd = KnowledgeDistillationCallback(t, [Term(Attention, 10.), Term(Similarity)], [('act',o) for o in layers], early_exit=early_exit)
    learn = fit(learner(cbs=kd, model=student), n)
    return [o[:-1] for o in learn.recorder.values],weights(learn),len(ends)

@pytest.mark.parametrize('name', FLOWS)
def test_early_exit_changes_no_number(name):
    f,layers,exits = FLOWS[name]
    values,w,ends = watched(f, True, layers)
    values_,w_,ends_ = watched(f, False, layers)
    assert values==values_ and torch.equal(w, w_)
    assert ends_==10
    assert exits is None or ends==(3 if exits else 10)  # the first batch, for losses that are built to its measure, and the one in each epoch that shows the way

def test_early_exit_keeps_the_errors():
    "A layer that is called twice, not at all or overwritten is refused all the same"
    for f,layer,text in ((twice, 'act', 'ran 2 times'), (straight, 'inplace', 'did not run'), (lambda m,x: m.inplace(m.a(x)), 'a', 'changed in place')):
        with pytest.raises(RuntimeError, match=text): watched(f, True, [layer])

def test_no_exit_where_predictions_are_wanted():
    t,ends = net(8),[]
    t[-1].register_forward_hook(lambda *_: ends.append(1))
    fit(learner(cbs=KnowledgeDistillationCallback(t, [SoftTarget, Term(Attention)], '1')))
    assert len(ends)==10

def test_no_exit_where_everything_is_wanted():
    "a loss from elsewhere that takes `**kwargs` may look at anything"
    got = []
    def everything(fm_s, **kwargs): got.append({*kwargs}); return sum(f.mean() for f in fm_s.values())
    fit(learner(cbs=KnowledgeDistillationCallback(net(), [everything, Attention], '1')), 1)
    assert all(o=={'pred','teacher_pred','fm_t','target'} for o in got) and len(got)>1

def test_no_exit_of_compiled_teachers():
    torch._dynamo.reset()
    a,b = (fit(learner(cbs=KnowledgeDistillationCallback(t, Attention, '1', weight=10.))) for t in (net(8), torch.compile(net(8), backend='eager')))
    torch.testing.assert_close(weights(a), weights(b))
    assert a.knowledge_distillation.teacher.early_exit and not b.knowledge_distillation.teacher.early_exit
    torch._dynamo.reset()

def test_a_loss_that_is_built_gets_the_first_prediction():
    got = []
    class Built(nn.Module):
        def build(self, teacher_pred, **kwargs): got.append(teacher_pred.shape)
        def forward(self, fm_s, fm_t): return Attention(fm_s, fm_t)
    fit(learner(cbs=KnowledgeDistillationCallback(net(8), Built(), '1')))
    assert got==[(20,10)]

def test_two_callbacks_stop_one_teacher_each_for_itself():
    t = net(8)
    def train(early_exit): return fit(learner(cbs=[KnowledgeDistillationCallback(t, Term(Attention, 10.), l, early_exit=early_exit) for l in ('0','2')]))
    assert torch.equal(weights(train(True)), weights(train(False)))

# ---- the cache

class Images(torch.utils.data.Dataset):
    "Digits, one by one; every reading is counted"
    def __init__(self, n=100): self.x,self.y = digits().train.dataset[[*range(n)]]
    def __len__(self): return len(self.x)
    def __getitem__(self, i): return self.x[i],self.y[i]

def loaders(n=100, bs=16, cls=TfmdDL, **kwargs):
    ds = Images(n)
    set_seed(3)  # the order of batches
    return DataLoaders(cls(ds, bs=bs, **{'shuffle':True, 'num_workers':0, **kwargs}), TfmdDL(ds, bs=bs, num_workers=0))

def cached_fit(teacher, dls=None, n=3, losses=None, layers='1', **kwargs):
    "Train by predictions and features"
    return fit(learner(dls or loaders(), KnowledgeDistillationCallback(teacher, losses or [Term(SoftTarget), Term(Attention, 10.)], layers, **kwargs)), n)

def values(learn): return np.array([o[:-1] for o in learn.recorder.values])

def asked(t):
    "How many samples a teacher is asked about, from now on"
    seen = []
    t.register_forward_hook(lambda m,x,out: seen.append(len(out)))
    return seen

LOADERS = dict(shuffled={}, ordered=dict(shuffle=False), workers=dict(num_workers=2), drop_last=dict(drop_last=True), keeps_last=dict(n=90), persistent=dict(num_workers=1, persistent_workers=True),
               weighted=dict(cls=WeightedDL, wgts=[1+i%7 for i in range(100)]), normalised=dict(after_batch=[Normalize.from_stats([0.1], [2.], cuda=False)]))

@pytest.mark.parametrize('where', ['memory','file'])
@pytest.mark.parametrize('name', LOADERS)
def test_trains_as_without_a_cache(name, where, tmp_path):
    t = net(8)
    plain = cached_fit(t, loaders(**LOADERS[name]))
    seen = asked(t)
    cached = cached_fit(CachedTeacher(t, tmp_path/'c' if where=='file' else None), loaders(**LOADERS[name]))
    apart = name in ('weighted','drop_last')  # a batch of which some are there is asked in part, and may be rounded otherwise
    torch.testing.assert_close(weights(cached), weights(plain), rtol=1e-4*apart, atol=1e-5*apart)
    np.testing.assert_allclose(values(cached), values(plain), rtol=1e-5*apart)
    assert sum(seen)<=LOADERS[name].get('n', 100)+2  # each once, and one in each later epoch that shows whether answers still hold

def test_features_alone(tmp_path):
    "with an early exit; and a later fit may ask for more"
    t = net(8)
    args = dict(losses=[Term(Attention, 10.)], layers='0')
    c = CachedTeacher(t, tmp_path/'c')
    assert torch.equal(weights(cached_fit(c, **args)), weights(cached_fit(t, **args)))
    assert torch.equal(weights(cached_fit(c)), weights(cached_fit(t)))
    assert {'pred.npy','layer%200.npy','layer%201.npy'} <= {o.name for o in (tmp_path/'c').iterdir()}

def test_fill_then_nothing_is_asked(tmp_path):
    t = net(8)
    c,dls = CachedTeacher(t, tmp_path/'c', layers=['1']),loaders(drop_last=True)
    state = torch.get_rng_state(),random.getstate()
    c.fill(dls, bar=False)
    assert torch.equal(state[0], torch.get_rng_state()) and state[1]==random.getstate()
    plain,seen = cached_fit(deepcopy(t)),asked(t)
    cached = cached_fit(CachedTeacher(t, tmp_path/'c'))
    torch.testing.assert_close(weights(cached), weights(plain), rtol=1e-5, atol=1e-6)
    assert sum(seen)<=3
    for f in (tmp_path/'c').glob('*.npy'): np.load(f, allow_pickle=False)

def test_half_and_topk(tmp_path):
    t = net(8)
    half = cached_fit(CachedTeacher(t, tmp_path/'h', half=True))
    np.testing.assert_allclose(values(half), values(cached_fit(t)), rtol=2e-2)
    assert np.load(tmp_path/'h'/'pred.npy').dtype==np.float16
    args = dict(losses=[Term(SoftTarget)], layers=None)
    few,all_but_one = (weights(cached_fit(CachedTeacher(t, topk=k), **args)) for k in (3,9))
    torch.testing.assert_close(all_but_one, weights(cached_fit(t, **args)), rtol=1e-4, atol=1e-5)  # the rest is one class then
    assert not torch.allclose(few, all_but_one, atol=1e-5)
    with pytest.raises(ValueError, match='topk=10 needs logits of more classes'): cached_fit(CachedTeacher(t, topk=10))
    big = net(8); big[-1].weight.data.mul_(1e7)
    with pytest.raises(ValueError, match='more than float16 can hold'): cached_fit(CachedTeacher(big, half=True), losses=[Term(SoftTarget)], layers=None)

def halved(x): return x/2
class Shift(Transform):
    def __init__(self, by): self.by = by
    def encodes(self, x:Tensor): return x+self.by if x.is_floating_point() else x

def test_a_stale_cache_is_refused(tmp_path):
    t = net(8)
    def use(teacher=t, dls=None, **kwargs):
        made = {k: kwargs.pop(k) for k in ('half','topk') if k in kwargs}
        return cached_fit(CachedTeacher(teacher, tmp_path/'c', **made), dls, n=1, **kwargs)
    use(); use()
    moved = deepcopy(t)
    with torch.no_grad(): moved[-1].bias[3] += 1e-4
    other = loaders(); other.train.dataset.x = other.train.dataset.x.flip(0)
    for text,kwargs in {'another teacher': dict(teacher=moved), 'another samples': dict(dls=loaders(90)), 'another inputs': dict(dls=other), 'another half': dict(half=True), 'another topk': dict(topk=3),
                        'another transforms': dict(dls=loaders(after_batch=[Shift(0.)])), 'another teacher_tfm': dict(teacher_tfm=halved)}.items():
        before = weights(learner())
        with pytest.raises(ValueError, match=f'made with {text}|and {text}'): use(**kwargs)
    relu = deepcopy(t); relu[0][2] = nn.LeakyReLU()
    with pytest.raises(ValueError, match='another teacher'): use(relu)

def test_in_memory_a_changed_teacher_begins_anew():
    t = net(8)
    c = CachedTeacher(t)
    cached_fit(c)
    with torch.no_grad(): t[-1].bias[3] += 1.
    assert torch.equal(weights(cached_fit(c)), weights(cached_fit(t)))

class Noise(Transform):
    def encodes(self, x:Tensor): return x+torch.rand(1) if x.is_floating_point() else x
class RandomRead(Images):
    transform = 'RandomHorizontalFlip'
    def __getitem__(self, i): return self.x[i]+random.random(),self.y[i]

def test_random_augmentation_is_refused_by_name():
    from fastai.vision.augment import Brightness, Resize, RandomErasing, ResizeMethod
    from kd_fastai.cache import check_repeatable
    def refuse(text, dls=None, cbs=()):
        learn = learner(dls or loaders(), [KnowledgeDistillationCallback(CachedTeacher(net(8)), SoftTarget), *cbs])
        before = weights(learn)
        with pytest.raises(ValueError, match=text): learn.fit(1)
        assert torch.equal(weights(learn), before)
    refuse('by RandomErasing', loaders(after_batch=[RandomErasing(p=0.1)]))
    refuse('by Brightness', loaders(after_batch=[Brightness(p=0.01)]))
    refuse('by Resize', loaders(after_item=[Resize(8)]))
    refuse('Noise', loaders(after_item=[Noise]))
    refuse('RandomHorizontalFlip', DataLoaders(TfmdDL(RandomRead(), bs=20, num_workers=0), TfmdDL(Images(), bs=20)))
    refuse('MixUp mixed', cbs=[MixUp()])
    refuse('CutMix mixed', cbs=[CutMix()])
    check_repeatable(loaders(after_item=[Resize(8, method=ResizeMethod.Squish)]).train)
    off = RandomErasing(p=0.5); off.split_idx = 1
    check_repeatable(loaders(after_batch=[off]).train)

def test_inputs_that_a_callback_changes_are_noticed():
    class Drift(Callback):
        def before_batch(self): self.learn.xb = (self.x+self.epoch,)
    learn = learner(loaders(), [KnowledgeDistillationCallback(CachedTeacher(net(8)), SoftTarget), Drift()])
    with pytest.raises(ValueError, match='no longer what the cache holds'): learn.fit(2)

def test_where_there_are_no_positions():
    dl = torch.utils.data.DataLoader(Images(), batch_size=20)
    with pytest.raises(ValueError, match='expected a fastai DataLoader'): cached_fit(CachedTeacher(net(8)), DataLoaders(dl, dl))

CRASH = '''
import sys, os, signal, warnings; warnings.filterwarnings('ignore')
sys.path.insert(0, {tests!r})
from test_cost import *
t = net(8)
seen = []
def die(m, x, out):
    seen.append(1)
    if len(seen)==4: os.kill(os.getpid(), signal.SIGKILL)
t.register_forward_hook(die)
CachedTeacher(t, {path!r}, layers=['1']).fill(loaders(), bar=False)
'''

def test_a_crash_while_filling_loses_nothing(tmp_path):
    "killed in the fourth batch: three are there, and the rest is asked for"
    code = CRASH.format(tests=str(Path(__file__).parent), path=str(tmp_path/'c'))
    assert subprocess.run([sys.executable, '-W', 'ignore', '-c', code], capture_output=True).returncode==-signal.SIGKILL
    there = np.load(tmp_path/'c'/'pred.there.npy')
    assert there.sum()==48
    t = net(8); seen = asked(t)
    CachedTeacher(t, tmp_path/'c', layers=['1']).fill(loaders(), bar=False)
    assert sum(seen)==52
    x = torch.stack([o for o,_ in Images()])
    with torch.no_grad(): torch.testing.assert_close(torch.from_numpy(np.load(tmp_path/'c'/'pred.npy')), t.eval()(x), rtol=1e-5, atol=1e-6)

def test_an_exception_while_training_loses_nothing(tmp_path):
    class Stop(Callback):
        def after_batch(self):
            if self.training and self.iter==2: raise KeyboardInterrupt
    t = net(8)
    learn = learner(loaders(), [KnowledgeDistillationCallback(CachedTeacher(t, tmp_path/'c'), SoftTarget), Stop()])
    with pytest.raises(KeyboardInterrupt): learn.fit(1)
    assert np.load(tmp_path/'c'/'pred.there.npy').sum()==48

def spoil(name):
    def f(d): os.truncate(d/name, os.path.getsize(d/name)-1)
    return f
SPOILT = dict(values=(spoil('pred.npy'), 'was cut short'), mask=(spoil('pred.there.npy'), 'was cut short'), header=(spoil('cache.json'), 'not what a cache begins with'),
              empty=(lambda d: (d/'pred.npy').write_bytes(b''), 'no array of a cache'), foreign=(lambda d: (d/'pred.npy').write_bytes(b'PK'+bytes(999)), 'no array of a cache'),
              pickle=(lambda d: np.save(d/'pred.npy', np.array([None]*100), allow_pickle=True), 'no array of a cache'), missing=(lambda d: (d/'pred.npy').unlink(), 'no array of a cache'),
              longer=(lambda d: np.save(d/'pred.npy', np.zeros((101,10), np.float32)), 'not of this cache'), no_header=(lambda d: (d/'cache.json').unlink(), 'something else than a cache'))

@pytest.mark.parametrize('name', SPOILT)
def test_a_spoilt_cache_is_refused(name, tmp_path):
    args = dict(losses=[Term(SoftTarget)], layers=None, n=1)
    cached_fit(CachedTeacher(net(8), tmp_path/'c'), **args)
    spoilt,text = SPOILT[name]
    spoilt(tmp_path/'c')
    files = {o: o.read_bytes() for o in (tmp_path/'c').iterdir()}
    with pytest.raises(ValueError, match=text): cached_fit(CachedTeacher(net(8), tmp_path/'c'), **args)
    assert files=={o: o.read_bytes() for o in (tmp_path/'c').iterdir()}

def test_a_foreign_folder_is_left_alone(tmp_path):
    (tmp_path/'notes.txt').write_text('mine')
    for path in (tmp_path, tmp_path/'notes.txt'):
        with pytest.raises(ValueError, match='something else than a cache'): cached_fit(CachedTeacher(net(8), path))
    assert [o.name for o in tmp_path.iterdir()]==['notes.txt']

DISTRIBUTED = """
import sys, warnings; warnings.filterwarnings('ignore')
sys.path.insert(0, {tests!r})
import torch.distributed.nn  # while there is no process group, which it would keep: see the tutorial on several processes
from test_cost import *
from fastai.distributed import DistributedDL
def broadcast(self, t, rank): t = LongTensor(t); torch.distributed.broadcast(t, rank); return t.tolist()
DistributedDL._broadcast = broadcast  # fastai's own calls .cuda()
def train(teacher):
    learn = learner(loaders(), KnowledgeDistillationCallback(teacher, [Term(SoftTarget), Term(Attention, 10.)], '1'))
    with learn.distrib_ctx(sync_bn=False, cpu=True): fit(learn, 3)
    return weights(learn)
t = net(8)
plain = train(t); seen = asked(t)
torch.testing.assert_close(train(CachedTeacher(t, {path!r})), plain, rtol=1e-4, atol=1e-5)
print('asked', sum(seen))
torch.distributed.destroy_process_group()
"""

def test_processes_that_train_together_share_a_cache(tmp_path):
    "each asks about its own samples, which are others in the next epoch, and reads what any has written"
    import socket
    with socket.socket() as s: s.bind(('127.0.0.1', 0)); port = s.getsockname()[1]
    code = DISTRIBUTED.format(tests=str(Path(__file__).parent), path=str(tmp_path/'c'))
    def start(r): return subprocess.Popen([sys.executable, '-W', 'ignore', '-c', code], text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        env={**os.environ, 'RANK':str(r), 'LOCAL_RANK':str(r), 'WORLD_SIZE':'2', 'MASTER_ADDR':'127.0.0.1', 'MASTER_PORT':str(port)})
    procs = [start(r) for r in (0,1)]
    try: outs = [p.communicate(timeout=200)[0] for p in procs]
    finally:
        for p in procs: p.kill()
    assert not any(p.returncode for p in procs), '\n'.join(outs)
    assert sum(int(re.search(r'asked (\d+)', o)[1]) for o in outs)<=100+4  # each once, and one a process in each later epoch
    assert np.load(tmp_path/'c'/'pred.there.npy').all()
    x = torch.stack([o for o,_ in Images()])
    with torch.no_grad(): torch.testing.assert_close(torch.from_numpy(np.load(tmp_path/'c'/'pred.npy')), net(8).eval()(x), rtol=1e-5, atol=1e-6)

# ---- looking at the columns' values less often, as on a GPU

def test_a_later_look_gives_the_same_columns(monkeypatch):
    now = cached_fit(net(8))
    monkeypatch.setattr('kd_fastai.callback._between_looks', lambda device: 3)  # of seven steps
    assert (values(cached_fit(net(8)))==values(now)).all()

@pytest.mark.parametrize('bad', [1,4,6])
def test_a_later_look_names_the_first_bad_step(monkeypatch, bad):
    "before the validation that follows"
    monkeypatch.setattr('kd_fastai.callback._between_looks', lambda device: 50)
    calls,validated = [],[]
    def breaks(pred): calls.append(1); return pred.mean()*(float('nan') if len(calls)>bad else 1.)
    class Seen(Callback):
        def before_validate(self): validated.append(1)
    learn = learner(loaders(), [KnowledgeDistillationCallback(net(8), breaks), Seen()])
    with pytest.raises(FloatingPointError, match=f'breaks is nan in epoch 0, batch {bad}'): learn.fit(1)
    assert not validated

# ---- what is kept for backward

def test_saves_no_more_for_backward_than_a_loop_by_hand(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent/'benchmarks'))
    from common import saved_mib
    import step
    ways = step.ways(*step.tiny())
    for f in ways.values(): f()
    saved = {n: saved_mib(f) for n,f in ways.items()}
    for n in ('kd_fastai','kd_fastai, cached'): assert saved[n]<=1.02*saved['by hand'], saved
    assert saved['by hand']>saved['teacher and loss']>0
