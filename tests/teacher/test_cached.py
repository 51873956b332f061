"The cache changes no number: it predicts as the live teacher does, or refuses."
import errno, os, signal, subprocess, sys, threading, time
from contextlib import contextmanager
from copy import deepcopy
import numpy as np, pytest, torch
from PIL import Image
from torch import nn
from fastai.basics import *
from fastai.callback.all import *
from kd_fastai.all import *
from kd_fastai.teacher.cached import StoredTeacher, check_repeatable, weights_digest
from kd_fastai.demo import small_net
from kd_fastai.hooks.models import as_plain_tensor
from kd_fastai.teacher.indices import BatchTracker, batch_indices
from support import KD, fit, learner, weights
from support.processes import free_port, join_group, run_processes
from support.teachers import Images, asked, cached_fit, loaders, net, values

for o in [*globals()]:
    if o=='test' or o.startswith('test_'): del globals()[o]  # fastcore's own helpers, which pytest would take for tests

pytestmark = pytest.mark.filterwarnings('ignore::UserWarning')

def quick(name, names):
    "All cases, of which the quick tests take one"
    return [o if o==name else pytest.param(o, marks=pytest.mark.slow) for o in names]

def files(d): return sorted(d.glob('*.npy'))
def records(d, kind='pred'):
    "The table with this kind of predictions"
    return next(o for f in files(d) if kind in (o := np.load(f, allow_pickle=False)).dtype.names)

LOADERS = dict(shuffled={}, ordered=dict(shuffle=False), workers=dict(num_workers=2), drop_last=dict(drop_last=True),
    keeps_last=dict(n=90), persistent=dict(num_workers=1, persistent_workers=True),
    weighted=dict(cls=WeightedDL, wgts=[1+i%7 for i in range(100)]),
    normalized=dict(after_batch=[Normalize.from_stats([0.1], [2.], cuda=False)]))

@pytest.mark.parametrize('where', ['memory','file'])
@pytest.mark.parametrize('name', quick('shuffled', LOADERS))
def test_trains_as_without_a_cache(name, where, tmp_path):
    t = net(8)
    plain = cached_fit(t, loaders(**LOADERS[name]))
    seen = asked(t)
    cached = cached_fit(CachedTeacher(t, tmp_path/'c' if where=='file' else None), loaders(**LOADERS[name]))
    # a batch of which some are stored is predicted in part, and may be rounded otherwise
    apart = name in ('weighted','drop_last')
    torch.testing.assert_close(weights(cached), weights(plain), rtol=1e-4*apart, atol=1e-5*apart)
    np.testing.assert_allclose(values(cached), values(plain), rtol=1e-5*apart)
    assert sum(seen)<=LOADERS[name].get('n', 100)  # each once

def test_features_alone(tmp_path):
    "with an early exit; and a later fit may ask for more"
    t = net(8)
    args = dict(losses=[Term(Attention, 10.)], layers='0')
    a,b = ('check','input','layer 0'),('check','input','layer 1','pred')
    c = CachedTeacher(t, tmp_path/'c')
    assert torch.equal(weights(cached_fit(c, **args)), weights(cached_fit(t, **args)))
    assert torch.equal(weights(cached_fit(c)), weights(cached_fit(t)))
    assert [tuple(sorted(np.load(f).dtype.names)) for f in files(tmp_path/'c')] in ([a, b], [b, a])

def test_fill_then_nothing_is_asked(tmp_path):
    t = net(8)
    c,dls = CachedTeacher(t, tmp_path/'c', layers=['1']),loaders(drop_last=True)
    state = torch.get_rng_state(),random.getstate()
    c.fill(dls, bar=False)
    assert torch.equal(state[0], torch.get_rng_state()) and state[1]==random.getstate()
    plain,seen = cached_fit(deepcopy(t)),asked(t)
    cached = cached_fit(CachedTeacher(t, tmp_path/'c'))
    torch.testing.assert_close(weights(cached), weights(plain), rtol=1e-5, atol=1e-6)
    assert not seen

def losses(learn):
    "Columns of the recorder without the accuracy, in which one sample near the border counts whole"
    return np.delete(values(learn), learn.recorder.metric_names.index('accuracy')-1, 1)

def test_half_and_topk(tmp_path):
    t = net(8)
    half = cached_fit(CachedTeacher(t, tmp_path/'h', half=True))
    np.testing.assert_allclose(losses(half), losses(cached_fit(t)), rtol=2e-2)
    assert records(tmp_path/'h')['pred'].dtype==np.float16
    args = dict(losses=[Term(SoftTarget)], layers=None)
    few,all_but_one = (losses(cached_fit(CachedTeacher(t, topk=k), **args)) for k in (3,9))
    np.testing.assert_allclose(all_but_one, losses(cached_fit(t, **args)), rtol=1e-3)   # the rest is one class
    assert not np.allclose(few, all_but_one, rtol=1e-3)
    with pytest.raises(ValueError, match='topk=10 needs logits of more classes'): cached_fit(CachedTeacher(t, topk=10))
    big = net(8); big[-1].weight.data.mul_(1e7)
    with pytest.raises(ValueError, match='more than float16 can hold'):
        cached_fit(CachedTeacher(big, half=True), losses=[Term(SoftTarget)], layers=None)

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
    shifted = dict(dls=loaders(after_batch=[Shift(0.5)]))
    for text,kwargs in {'another teacher': dict(teacher=moved), 'another samples': dict(dls=loaders(90)),
                        'another inputs': dict(dls=other), 'another half': dict(half=True),
                        'another topk': dict(topk=3),
                        'another inputs:': shifted, 'another teacher_tfm': dict(teacher_tfm=halved)}.items():
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
    from fastai.vision.augment import Brightness, RandomErasing
    def refuse(text, dls=None, cbs=()):
        learn = learner(dls=dls or loaders(), cbs=[KD(CachedTeacher(net(8)), SoftTarget), *cbs])
        before = weights(learn)
        with pytest.raises(ValueError, match=text): learn.fit(1)
        assert torch.equal(weights(learn), before)
    refuse('by RandomErasing', loaders(after_batch=[RandomErasing(p=0.1)]))
    refuse('by Brightness', loaders(after_batch=[Brightness(p=0.01)]))
    refuse('Noise', loaders(after_item=[Noise]))
    refuse('RandomHorizontalFlip', DataLoaders(TfmdDL(RandomRead(), bs=20, num_workers=0), TfmdDL(Images(), bs=20)))
    refuse('MixUp mixed', cbs=[MixUp()])
    refuse('CutMix mixed', cbs=[CutMix()])
    off = RandomErasing(p=0.5); off.split_idx = 1
    check_repeatable(loaders(after_batch=[off]).train)

def test_inputs_that_a_callback_changes_are_noticed():
    class Drift(Callback):
        def before_batch(self): self.learn.xb = (self.x+self.epoch,)
    learn = learner(dls=loaders(), cbs=[KD(CachedTeacher(net(8)), SoftTarget), Drift()])
    with pytest.raises(ValueError, match='differs from the cached input'): learn.fit(2)

def test_where_there_are_no_indices():
    dl = torch.utils.data.DataLoader(Images(), batch_size=20)
    with pytest.raises(ValueError, match='Expected a fastai DataLoader'):
        cached_fit(CachedTeacher(net(8)), DataLoaders(dl, dl))

def crash(path):
    "Fill a cache, and die in the fourth batch"
    t,seen = net(8),[]
    def die(m, x, out):
        seen.append(1)
        if len(seen)==4: os.kill(os.getpid(), signal.SIGKILL)
    t.register_forward_hook(die)
    CachedTeacher(t, path, layers=['1']).fill(loaders(), bar=False)

@pytest.mark.slow
def test_a_crash_while_filling_loses_nothing(tmp_path):
    "killed in the fourth batch: three are stored, and the rest is predicted"
    assert run_processes(crash, (tmp_path/'c',))==[-signal.SIGKILL]
    assert (records(tmp_path/'c')['check']!=0).sum()==48
    t = net(8); seen = asked(t)
    CachedTeacher(t, tmp_path/'c', layers=['1']).fill(loaders(), bar=False)
    assert sum(seen)==52
    x = torch.stack([o for o,_ in Images()])
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(records(tmp_path/'c')['pred'].copy()), t.eval()(x), rtol=1e-5,
                                   atol=1e-6)

def test_an_exception_in_training_loses_nothing(tmp_path):
    class Stop(Callback):
        def after_batch(self):
            if self.training and self.iter==2: raise KeyboardInterrupt
    t = net(8)
    learn = learner(dls=loaders(), cbs=[KD(CachedTeacher(t, tmp_path/'c'), SoftTarget), Stop()])
    with pytest.raises(KeyboardInterrupt): learn.fit(1)
    assert (records(tmp_path/'c')['check']!=0).sum()==48

def table_file(d): return next(d.glob('*.npy'))
def replaced(array, **kwargs): return lambda d: np.save(table_file(d), array, **kwargs)
SPOILT = dict(values=(lambda d: os.truncate(table_file(d), table_file(d).stat().st_size-1), 'was cut short'),
    header=(lambda d: os.truncate(d/'cache.json', 100), 'is not a valid cache index'),
    foreign=(lambda d: table_file(d).write_bytes(b'PK'+bytes(999)), 'not a table of a cache'),
    pickle=(replaced(np.array([None]*100), allow_pickle=True), 'not a table of a cache'),
    longer=(replaced(np.zeros(101, [('check', np.uint32), ('pred', np.float32, (10,))])), 'not of this cache'),
    no_header=(lambda d: (d/'cache.json').unlink(), 'exists and is not a cache'))

@pytest.mark.parametrize('name', SPOILT)
def test_a_spoilt_cache_is_refused(name, tmp_path):
    args = dict(losses=[Term(SoftTarget)], layers=None, n=1)
    cached_fit(CachedTeacher(net(8), tmp_path/'c'), **args)
    spoilt,text = SPOILT[name]
    spoilt(tmp_path/'c')
    content = {o: o.read_bytes() for o in (tmp_path/'c').iterdir()}
    with pytest.raises(ValueError, match=text): cached_fit(CachedTeacher(net(8), tmp_path/'c'), **args)
    assert content=={o: o.read_bytes() for o in (tmp_path/'c').iterdir()}

def test_a_foreign_folder_is_left_alone(tmp_path):
    (tmp_path/'notes.txt').write_text('mine')
    for path in (tmp_path, tmp_path/'notes.txt'):
        with pytest.raises(ValueError, match='exists and is not a cache'): cached_fit(CachedTeacher(net(8), path))
    assert [o.name for o in tmp_path.iterdir()]==['notes.txt']

def fill_together(rank, port, path):
    "Train in one of two processes without a cache and with one, and save how many samples the teacher predicted"
    join_group(rank, 2, port)
    # imported while there is no process group, which it would keep: see the tutorial on several processes
    import torch.distributed.nn
    from fastai.distributed import DistributedDL
    def broadcast(self, t, rank):
        t = LongTensor(t)
        torch.distributed.broadcast(t, rank)
        return t.tolist()
    DistributedDL._broadcast = broadcast  # fastai's own calls .cuda()
    def train(teacher):
        learn = learner(dls=loaders(), cbs=KD(teacher, [Term(SoftTarget), Term(Attention, 10.)], '1'))
        with learn.distrib_ctx(sync_bn=False, cpu=True): fit(learn, 3)
        return weights(learn)
    t = net(8)
    plain,seen = train(t),asked(t)
    torch.testing.assert_close(train(CachedTeacher(t, path/'c')), plain, rtol=1e-4, atol=1e-5)
    (path/f'{rank}').write_text(str(sum(seen)))
    torch.distributed.destroy_process_group()

@pytest.mark.slow
def test_processes_that_train_together_share_a_cache(tmp_path):
    "each predicts its own samples, which are others in the next epoch, and reads what any has written"
    port = free_port()
    assert run_processes(fill_together, *((rank, port, tmp_path) for rank in (0,1)))==[0,0]
    assert sum(int((tmp_path/f'{rank}').read_text()) for rank in (0,1))<=100  # each once
    assert records(tmp_path/'c')['check'].all()
    x = torch.stack([o for o,_ in Images()])
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(records(tmp_path/'c')['pred'].copy()), net(8).eval()(x), rtol=1e-5,
                                   atol=1e-6)

# ---- disks

def fill_up_to_a_file_limit(path):
    "Exit with the number of the error that a limit on the size of files causes"
    import resource
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
    try: CachedTeacher(net(8), path, layers=['1']).fill(loaders(), bar=False)
    except OSError as e: sys.exit(e.errno)

@pytest.mark.slow
def test_a_file_limit_is_an_oserror(tmp_path):
    assert run_processes(fill_up_to_a_file_limit, (tmp_path/'c',))==[errno.EFBIG]

@pytest.fixture
def mounted(tmp_path):
    "A file system of 300 kB; `remount` changes its options"
    d = tmp_path/'disk'
    d.mkdir()
    def mount(*options): return subprocess.run(['mount', *options, str(d)], capture_output=True).returncode==0
    if not sys.platform.startswith('linux') or not mount('-t', 'tmpfs', '-o', 'size=300k', 'tmpfs'):
        pytest.skip('cannot mount a tmpfs here')
    yield d,lambda options: mount('-o', f'remount,{options}')
    subprocess.run(['umount', '-l', str(d)], check=True)  # a cache that is still mapped keeps it busy

def test_a_full_disk_is_an_oserror_and_the_cache_can_go_on(mounted):
    "with a sparse file it was SIGBUS, which kills a notebook's kernel"
    d,remount = mounted
    (d/'other').write_bytes(bytes(250_000))
    t = net(8)
    with pytest.raises(OSError, match='No space left'): CachedTeacher(t, d/'c', layers=['1']).fill(loaders(), bar=False)
    (d/'other').unlink()
    CachedTeacher(t, d/'c', layers=['1']).fill(loaders(), bar=False)
    assert records(d/'c')['check'].all()

def test_a_complete_cache_on_a_read_only_disk(mounted):
    d,remount = mounted
    t = net(8)
    CachedTeacher(t, d/'c', layers=['1']).fill(loaders(), bar=False)
    assert remount('ro')
    assert torch.equal(weights(cached_fit(CachedTeacher(t, d/'c'))), weights(cached_fit(StoredTeacher(d/'c'))))
    with pytest.raises(OSError, match='Read-only'):
        cached_fit(CachedTeacher(t, d/'c'), losses=[Term(Attention, 10.)], layers='0')

def test_no_hard_links_are_needed(tmp_path, monkeypatch):
    def refused(*args, **kwargs): raise OSError(95, 'Operation not supported')
    monkeypatch.setattr(os, 'link', refused)
    CachedTeacher(net(8), tmp_path/'c').fill(loaders(), bar=False)
    assert records(tmp_path/'c')['check'].all()

def flip(d, row):
    "Change one byte of a row's prediction"
    file, = files(d)
    table = np.lib.format.open_memmap(file, 'r+')
    table['pred'].view(np.uint8)[row, 5] ^= 1

def test_a_flipped_byte_is_found_when_the_row_is_read(tmp_path):
    t = net(8)
    CachedTeacher(t, tmp_path/'c').fill(loaders(), bar=False)
    flip(tmp_path/'c', 42)
    with pytest.warns(UserWarning, match='1 rows are damaged, the first is 42'):
        with pytest.raises(ValueError, match='Not all of the 16 samples'):
            cached_fit(StoredTeacher(tmp_path/'c'), losses=SoftTarget, layers=None)
    seen = asked(t)
    with pytest.warns(UserWarning, match='1 rows are damaged, the first is 42'):
        cached_fit(CachedTeacher(t, tmp_path/'c'), losses=SoftTarget, layers=None)
    assert seen==[1]
    cached_fit(StoredTeacher(tmp_path/'c'), losses=SoftTarget, layers=None)  # it has been written again

def test_a_creation_that_was_cut_off_goes_on(tmp_path):
    "killed before the header was written"
    t = net(8)
    CachedTeacher(t, tmp_path/'c').fill(loaders(), bar=False)
    file, = files(tmp_path/'c')
    for content in (b'', bytes(1000)):
        file.write_bytes(content)
        CachedTeacher(t, tmp_path/'c').fill(loaders(), bar=False)
        assert records(tmp_path/'c')['check'].all()

def test_threads_fill_one_folder(tmp_path):
    t,errors = net(8).eval(),[]
    def fill(k):
        try:
            with torch.no_grad():
                c = CachedTeacher(deepcopy(t), tmp_path/'c')
                c.prepare(dls[k].train)
                for i in range(0, 100, 20):
                    idx = (torch.arange(20)+i+20*k)%100
                    c(dls[k].train.dataset.x[idx], idx=idx)
        except BaseException as e: errors.append(e)
    dls = [loaders() for _ in range(4)]
    threads = [threading.Thread(target=fill, args=[k]) for k in range(4)]
    for o in threads: o.start()
    for o in threads: o.join()
    assert not errors
    assert records(tmp_path/'c')['check'].all()
    x = Images().x
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(records(tmp_path/'c')['pred'].copy()), t.eval()(x), rtol=1e-4,
                                   atol=1e-5)

# ---- what is kept

class Odd(nn.Module):
    "A teacher with layers of other types than float32"
    def __init__(self):
        super().__init__()
        self.net,self.fft,self.ids = net(8),Named(torch.fft.fft),Named(lambda x: (x*1e12).long())
        self.sign,self.twice = Named(lambda x: x>0),Named(lambda x: x.double())
    def forward(self, x):
        for f in (self.fft, self.ids, self.sign, self.twice): f(x)
        return self.net(x)
class Named(nn.Module):
    def __init__(self, f): super().__init__(); self.f = f
    def forward(self, x): return self.f(x)

def test_types_stay(tmp_path):
    t,names = Odd(),['fft','ids','sign','twice']
    got = {}
    for key,teacher in dict(live=t, cached=CachedTeacher(t, tmp_path/'c'), stored=None).items():
        def keep(pred, fm_t): got.setdefault(key, fm_t); return pred.mean()
        teacher = teacher or StoredTeacher(tmp_path/'c')
        cached_fit(teacher, loaders(shuffle=False), 1, Term(keep), [('0', o) for o in names])
    for k in names:
        assert got['cached'][k].dtype==got['live'][k].dtype
        assert torch.equal(got['cached'][k], got['live'][k]) and torch.equal(got['stored'][k], got['live'][k])

def first(out): return out
def test_a_layer_that_a_function_picks_is_found_again(tmp_path):
    t = net(8)
    for _ in range(2):
        def pick(out): return out  # at another address each time
        seen = asked(t)
        cached_fit(CachedTeacher(t, tmp_path/'c'), losses=Term(Attention, 10.), layers=[('1', ('1', pick))])
    assert len(files(tmp_path/'c'))==1 and not seen

def test_a_long_layer_name(tmp_path):
    name = 'x'*250
    t = nn.Sequential(OrderedDict([(name, net(8))]))
    cached_fit(CachedTeacher(t, tmp_path/'c'), losses=Term(lambda pred, fm_t: pred.mean()), layers=[('1', name)])
    assert records(tmp_path/'c', 'layer '+name)['check'].all()

def test_a_later_fit_with_fewer_layers_reads_the_same_table(tmp_path):
    t = net(8)
    cached_fit(CachedTeacher(t, tmp_path/'c'), layers=['0','1'])
    seen = asked(t)
    cached_fit(CachedTeacher(t, tmp_path/'c'), layers='1')
    cached_fit(CachedTeacher(t, tmp_path/'c'), losses=SoftTarget, layers=None)
    assert not seen and len(files(tmp_path/'c'))==1

def set_buffer(m, v): m.register_buffer('b', torch.full((1,), v), persistent=False)

@pytest.mark.parametrize('change', [
    lambda m, v: setattr(m, 'scale', v), lambda m, v: setattr(m, 'shift', torch.full((1,), v)),
    lambda m, v: setattr(m, 'shift', np.full(1, v)), lambda m, v: setattr(m, 'cfg', dict(layers=int(v))),
    lambda m, v: setattr(m, 'act', [torch.relu, torch.tanh][int(v)]), set_buffer],
    ids=['number','tensor','array','dict','function','buffer'])
def test_the_digest_changes_with_what_predictions_depend_on(change):
    a,b = net(4),net(4)
    for m in (a, b): change(m, 0.)
    assert weights_digest(a)==weights_digest(b)
    change(b, 1.)
    assert weights_digest(a)!=weights_digest(b)

class Remembers(nn.Module):
    "Remembers its predictions in four forms"
    def __init__(self):
        super().__init__()
        self.net,self.by_hash,self.classes,self.batches,self.last = net(4),{},{},[],None
    def forward(self, x):
        self.last = self.net(x)
        for o,p in zip(x, self.last): self.by_hash[hash(o.numpy().tobytes())] = p
        self.classes.update({o.numpy().tobytes(): int(p.argmax()) for o,p in zip(x, self.last)})
        self.batches.append(self.last)
        return self.last

def test_predictions_that_a_teacher_remembers_do_not_belong_to_it(tmp_path):
    "neither for the digest nor for a cache in a folder; its settings still are"
    t = Remembers().eval()
    before = weights_digest(t)
    with torch.no_grad(): t(torch.randn(2,1,8,8))
    assert t.by_hash and t.classes and t.batches and weights_digest(t)==before
    for _ in range(2): cached_fit(CachedTeacher(t, tmp_path/'c'), losses=SoftTarget, layers=None, n=1)
    t.scale = 2.
    assert weights_digest(t)!=before
    with pytest.raises(ValueError, match='another teacher'):
        cached_fit(CachedTeacher(t, tmp_path/'c'), losses=SoftTarget, layers=None, n=1)

def test_the_digest_of_quantized_models():
    "their packed weights have a `repr` that leaves out the middle"
    a,b = (torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(64,64)), {nn.Linear}) for _ in range(2))
    b.load_state_dict(a.state_dict())
    assert weights_digest(a)==weights_digest(b)
    (w,bias),c = a[0]._packed_params._weight_bias(),deepcopy(a)
    q = w.dequantize(); q[32,32] += 0.05
    c[0].set_weight_bias(torch.quantize_per_tensor(q, w.q_scale(), w.q_zero_point(), w.dtype), bias)
    assert weights_digest(a)!=weights_digest(c)

def test_version(tmp_path):
    t = net(8)
    cached_fit(CachedTeacher(t, tmp_path/'c', version='1'), n=1)
    with pytest.raises(ValueError, match='another version'):
        cached_fit(CachedTeacher(t, tmp_path/'c', version='2'), n=1)

# ---- which sample is which

class Skips(Images):
    def __getitem__(self, i):
        if i in (5,50): raise SkipItemException
        return super().__getitem__(i)

def exact(t, learn, got):
    "A loss that compares the teacher's predictions with those of the live teacher to the student's inputs"
    def loss(pred, teacher_pred):
        with torch.no_grad(): live = t(*learn[0].xb)
        torch.testing.assert_close(teacher_pred, live, rtol=1e-4, atol=1e-5)
        got.append(len(live))
        return (pred-teacher_pred).square().mean()
    return loss

def exact_fit(teacher, live, dls, n=4, cbs=(), **kwargs):
    "Train, and compare each prediction; how many were compared"
    holder,got,live = [],[],deepcopy(live).eval()
    for m in live.modules(): m._forward_hooks.clear()  # of `asked`
    kd = KD(teacher, exact(live, holder, got))
    holder.append(learner(dls=dls, cbs=[kd, *cbs], **kwargs))
    fit(holder[0], n)
    return sum(got)

def test_skipped_samples(tmp_path):
    "fastai filters them before it makes batches, so that counting gives other samples' indices"
    t,ds = net(8),Skips()
    dls = DataLoaders(TfmdDL(ds, bs=16, shuffle=True, drop_last=True, num_workers=0),
                      TfmdDL(Images(), bs=16, num_workers=0))
    seen = asked(t)
    assert exact_fit(CachedTeacher(t, tmp_path/'c'), t, dls)==4*96
    assert sum(seen)<=98
    there = records(tmp_path/'c')
    assert not there['check'][[5,50]].any()

def by_label(items): return sorted(items, key=lambda o: int(o[1]))
def test_a_before_batch_that_reorders():
    t = net(8)
    seen = asked(t)
    assert exact_fit(CachedTeacher(t), t, loaders(before_batch=by_label), 3)==300
    assert sum(seen)==100

def test_some_replaced_samples_are_noticed(tmp_path):
    t = net(8)
    CachedTeacher(t, tmp_path/'c').fill(loaders(), bar=False)
    dls = loaders()
    dls.train.dataset.x = dls.train.dataset.x.clone(); dls.train.dataset.x[31:41] = dls.train.dataset.x[:10]
    for teacher in (CachedTeacher(t, tmp_path/'c'), StoredTeacher(tmp_path/'c')):
        with pytest.raises(ValueError, match='differs from the cached input'):
            cached_fit(teacher, dls, 1, SoftTarget, None)

def test_a_training_set_that_is_exchanged_in_a_fit():
    class Exchange(Callback):
        def before_epoch(self):
            if self.epoch==1: self.learn.dls = loaders(90)
    learn = learner(dls=loaders(), cbs=[KD(CachedTeacher(net(8)), SoftTarget), Exchange()])
    with pytest.raises(ValueError, match='does not come from the training data that the fit began with'): learn.fit(2)

class Dicts(Images):
    "Inputs in a dict"
    def __getitem__(self, i): return dict(image=self.x[i], scale=torch.tensor([1.+i%3])),self.y[i]
class TakesDict(nn.Module):
    def __init__(self, m): super().__init__(); self.m = m
    def forward(self, b): return self.m(b['image']*b['scale'][...,None,None])

def test_inputs_in_dicts(tmp_path):
    ds = Dicts()
    def dls(): return DataLoaders(*(DataLoader(ds, bs=16, shuffle=o, num_workers=0) for o in (True, False)))
    t = TakesDict(net(8))
    seen = asked(t)
    assert exact_fit(CachedTeacher(t, tmp_path/'c'), t, dls(), 2, model=TakesDict(small_net(4)))==200
    assert sum(seen)==100
    ds.x = ds.x.clone(); ds.x[7] += 1
    with pytest.raises(ValueError, match='differs from the cached input|another inputs'):
        exact_fit(CachedTeacher(t, tmp_path/'c'), t, dls(), 1, model=TakesDict(small_net(4)))

def test_resize_of_images_that_have_the_size():
    from fastai.vision.augment import Resize
    from fastai.vision.core import PILImageBW
    from fastai.data.transforms import ToTensor
    class Pictures(Images):
        def __getitem__(self, i): return PILImageBW.create(((self.x[i,0]+1)*100).byte()),self.y[i]
    ds = Pictures()
    def dls(size):
        return DataLoaders(*(TfmdDL(ds, bs=16, shuffle=o, num_workers=0,
                                    after_item=[Resize(size), ToTensor, IntToFloatTensor]) for o in (True, False)))
    t = net(8)
    assert exact_fit(CachedTeacher(t), t, dls(8), 2)==200

def test_a_flip_that_has_seen_validation():
    "fastai's coordinate transforms note the last split, and looked as if they did nothing in training"
    from fastai.vision.augment import Flip
    from fastai.vision.core import TensorImage
    dls = loaders(after_batch=[Flip(p=.05)])
    dls.train.dataset.x = TensorImage(dls.train.dataset.x)
    dls.valid.after_batch = dls.train.after_batch
    learn = learner(dls=dls, cbs=KD(CachedTeacher(net(8)), SoftTarget))
    learn.validate()
    with pytest.raises(ValueError, match='at random by Flip'): learn.fit(1)

# ---- no teacher at all

def test_a_full_cache_does_not_touch_its_model(tmp_path, monkeypatch):
    t = net(8)
    CachedTeacher(t, tmp_path/'c', layers=['1']).fill(loaders(), bar=False)
    def touched(*args, **kwargs): raise AssertionError("the model was touched")
    def ready(*args): touched(); yield
    for name in ('forward','to','eval','train'): monkeypatch.setattr(t, name, touched)
    monkeypatch.setattr(Teacher, 'ready', contextmanager(ready))
    cached_fit(CachedTeacher(t, tmp_path/'c'))

def live_answers(t):
    with torch.no_grad(): return t.eval()(Images().x)

@pytest.mark.slow
def test_stored_answers_train_as_the_teacher(tmp_path):
    t = net(8)
    args = dict(losses=[Term(SoftTarget)], layers=None)
    CachedTeacher(t, tmp_path/'c').fill(loaders(), bar=False)
    a = live_answers(t)
    expected = weights(cached_fit(t, **args))
    for o in (tmp_path/'c', str(tmp_path/'c'), a, a.numpy(), pd.DataFrame(a.numpy()), {'pred': a}):
        torch.testing.assert_close(weights(cached_fit(StoredTeacher(o), **args)), expected, rtol=1e-4, atol=1e-5)
    probabilities = weights(cached_fit(StoredTeacher(a.double().softmax(1), probabilities=True), **args))
    torch.testing.assert_close(probabilities, expected, rtol=1e-3, atol=1e-4)

def test_stored_features():
    t = net(8)
    with torch.no_grad(): features = t.eval()[:2](Images().x)
    stored = StoredTeacher({'pred': live_answers(t), '1': features})
    torch.testing.assert_close(weights(cached_fit(stored)), weights(cached_fit(t)), rtol=1e-3, atol=1e-5)

def test_what_a_stored_teacher_refuses(tmp_path):
    a = live_answers(net(8))
    for text,answers in {'another samples': a[:90], 'No outputs for all of': {'pred': a},
                         'No predictions are stored': {'1': torch.rand(100,8,4,4)}}.items():
        with pytest.raises(ValueError, match=text):
            cached_fit(StoredTeacher(answers), layers='1' if 'No' in text else None,
                       losses=None if 'No' in text else SoftTarget)
    for text,answers in {'Expected numbers of shape': a[:,0], 'rows of pred have NaN': a*float('nan'),
                         'Expected one row per sample': {'pred': a, '1': a[:5]},
                         'Expected numbers': np.array([['a']])}.items():
        with pytest.raises(ValueError, match=text): StoredTeacher(answers)
    with pytest.raises(ValueError, match='is not a valid cache index'): StoredTeacher(tmp_path)
    with pytest.raises(ValueError, match='teacher_tfm has no effect'):
        cached_fit(StoredTeacher(a), losses=SoftTarget, layers=None, teacher_tfm=halved)
    half_filled = CachedTeacher(net(8), tmp_path/'c')
    half_filled.prepare(loaders().train)
    half_filled(Images().x[:10], idx=torch.arange(10))
    with pytest.raises(ValueError, match='fill the cache first'):
        cached_fit(StoredTeacher(tmp_path/'c'), losses=SoftTarget, layers=None)

# ---- views

class Jitter(Transform):
    "Random numbers of all three kinds, of an item or of a batch"
    def encodes(self, x:Tensor):
        return x+torch.rand(x.shape)+random.random()+np.random.rand() if x.is_floating_point() else x
def jittered(item=True, batch=True, n=100, **kwargs):
    if item: kwargs['after_item'] = [Jitter]
    if batch: kwargs['after_batch'] = [Jitter]
    return loaders(n, **kwargs)

VIEWS = dict(item=dict(batch=False), batch=dict(item=False), both={}, workers=dict(num_workers=2),
             drop_last=dict(drop_last=True),
    keeps_last=dict(n=90), weighted=dict(cls=WeightedDL, wgts=[1+i%7 for i in range(100)]), ordered=dict(shuffle=False),
    sorts=dict(before_batch=by_label), both_workers=dict(num_workers=2, n=90, drop_last=True))

@pytest.mark.parametrize('name', quick('both', VIEWS))
def test_views_answer_as_the_live_teacher(name, tmp_path):
    "on the very inputs that the student gets; then another student, and another with nothing but the folder"
    t,n = net(8),VIEWS[name].get('n', 100)
    seen = asked(t)
    once = n//16*16 if VIEWS[name].get('drop_last') else n
    assert exact_fit(CachedTeacher(t, tmp_path/'c', views=2), t, jittered(**VIEWS[name]), 5)==5*once
    assert sum(seen)==2*once
    assert exact_fit(CachedTeacher(t, tmp_path/'c', views=2), t, jittered(**VIEWS[name]), 3)==3*once
    assert exact_fit(StoredTeacher(tmp_path/'c'), t, jittered(**VIEWS[name]), 3)==3*once
    assert sum(seen)==2*once

def inputs(teacher, dls, n):
    "What the student gets in each epoch"
    got = []
    class Keep(Callback):
        def before_batch(self):
            if self.training: got.append((self.epoch, self.x.clone()))
    fit(learner(dls=dls, cbs=[KD(teacher, SoftTarget), Keep()]), n)
    return [torch.cat([x for e,x in got if e==i]) for i in range(n)]

def test_views_repeat_in_turn():
    a = inputs(CachedTeacher(net(8), views=2), jittered(), 5)
    assert torch.equal(a[0], a[2]) and torch.equal(a[0], a[4]) and torch.equal(a[1], a[3])
    assert not torch.equal(a[0].sum((1,2,3)).sort()[0], a[1].sum((1,2,3)).sort()[0])
    assert torch.equal(inputs(CachedTeacher(net(8), views=2), jittered(num_workers=2), 1)[0], a[0])
    assert not torch.equal(inputs(CachedTeacher(net(8), views=2, seed=1), jittered(), 1)[0], a[0])

def test_views_are_filled_without_a_student(tmp_path):
    t = net(8)
    dls = jittered(drop_last=True)
    states = torch.get_rng_state(),random.getstate(),np.random.get_state()[1]
    rng = dls.train.rng.getstate()
    c = CachedTeacher(t, tmp_path/'c', views=3).fill(dls, bar=False)
    assert torch.equal(states[0], torch.get_rng_state()) and states[1]==random.getstate()
    assert (states[2]==np.random.get_state()[1]).all()
    assert rng==dls.train.rng.getstate()
    seen = asked(t)
    assert exact_fit(c, t, jittered(drop_last=True), 6)==6*96
    assert not seen

def test_random_numbers_outside_are_the_users():
    "the student's dropout draws as it would without random transforms"
    def dropped(dls, teacher):
        got = []
        model = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(64,10))
        class Draw(Callback):
            def after_pred(self):
                if self.training: got.append((torch.rand(1).item(), random.random(), np.random.rand()))
        fit(learner(dls=dls, cbs=[KD(teacher, SoftTarget), Draw()], model=model), 3)
        return got
    assert dropped(jittered(), CachedTeacher(net(8), views=2))==dropped(loaders(), net(8))

def test_another_batch_size():
    "items are replayed as they were; a transform of a batch is another one, and an error that says so"
    t = net(8)
    item = CachedTeacher(t, views=2)
    item.fill(jittered(batch=False), bar=False)
    seen = asked(t)
    assert exact_fit(item, t, jittered(batch=False, bs=20), 2)==200
    assert not seen
    both = CachedTeacher(t, views=2)
    both.fill(jittered(), bar=False)
    with pytest.raises(ValueError, match='differs from the cached input: batch_size was 16, is 20'):
        exact_fit(both, t, jittered(bs=20), 2)

class Harder(Jitter):
    def encodes(self, x:Tensor): return super().encodes(x)*1.1 if x.is_floating_point() else x
def test_changed_transforms_are_an_error(tmp_path):
    t = net(8)
    CachedTeacher(t, tmp_path/'c', views=2).fill(jittered(), bar=False)
    for teacher in (CachedTeacher(t, tmp_path/'c', views=2), StoredTeacher(tmp_path/'c')):
        with pytest.raises(ValueError, match='another inputs'):
            exact_fit(teacher, t, loaders(after_item=[Harder], after_batch=[Jitter]), 1)
    for text,kwargs in {'another views': dict(views=3), 'another seed': dict(views=2, seed=1)}.items():
        with pytest.raises(ValueError, match=text):
            exact_fit(CachedTeacher(t, tmp_path/'c', **kwargs), t, jittered(), 1)

class OwnGenerator(Transform):
    def __init__(self): self.rng = np.random.default_rng(0)
    def encodes(self, x:Tensor): return x+float(self.rng.random()) if x.is_floating_point() else x
def test_a_generator_of_its_own_cannot_be_replayed():
    with pytest.raises(ValueError, match='random generator of its own, which cannot be replayed'):
        exact_fit(CachedTeacher(net(8), views=2), net(8), loaders(after_batch=[OwnGenerator()]), 1)
    with pytest.raises(ValueError, match='views of at least 1'): CachedTeacher(net(8), views=0)

def test_fastai_and_torchvision_augmentation(tmp_path):
    from torchvision import transforms as tv
    from fastai.vision.augment import RandomErasing, RandomResizedCrop, aug_transforms
    from fastai.vision.core import PILImageBW
    from fastai.data.transforms import ToTensor
    crop = tv.RandomCrop(24, padding=2)
    class Pictures(Images):
        def __getitem__(self, i):
            return PILImageBW.create(crop(PILImageBW.create(((self.x[i,0]+1)*100).byte()).resize((24,24)))),self.y[i]
    ds = Pictures(60)
    def dls():
        return DataLoaders(*(TfmdDL(ds, bs=16, shuffle=o, num_workers=0, after_item=[RandomResizedCrop(16), ToTensor],
                                    after_batch=[IntToFloatTensor, *aug_transforms(), RandomErasing(p=0.5)])
                             for o in (True, False)))
    t = net(8)
    seen = asked(t)
    assert exact_fit(CachedTeacher(t, tmp_path/'c', views=2), t, dls(), 4)==240
    assert sum(seen)==120
    with pytest.raises(ValueError, match='at random by RandomResizedCrop'): exact_fit(CachedTeacher(t), t, dls(), 1)

@pytest.mark.slow
def test_text_in_a_shuffled_sorted_loader(tmp_path):
    "the padding of a sample depends on its batch, so that orders are replayed"
    from fastai.text.data import SortedDL, TensorText, pad_input
    g = torch.Generator().manual_seed(0)
    ds = [(TensorText(torch.randint(2, 50, (int(n),), generator=g)),i%2)
          for i,n in enumerate(torch.randint(3, 30, (90,), generator=g))]
    def dls():
        return DataLoaders(*(SortedDL(ds, bs=16, shuffle=o, num_workers=0, before_batch=pad_input,
                                      res=[len(x) for x,_ in ds]) for o in (True, False)))
    class Words(nn.Module):
        def __init__(self): super().__init__(); self.emb,self.out = nn.Embedding(50,8),nn.Linear(8,2)
        def forward(self, x): return self.out(self.emb(as_plain_tensor(x)).cumsum(1)[:,-1])
    set_seed(0)
    t = Words()
    seen = asked(t)
    c = CachedTeacher(t, tmp_path/'c', views=2).fill(dls(), bar=False)
    assert sum(seen)==180
    assert exact_fit(c, t, dls(), 3, model=Words())==270
    assert sum(seen)==180
    with pytest.raises(ValueError, match='depends on its batch, by Pipeline.* .padding'):
        exact_fit(CachedTeacher(t), t, dls(), 1, model=Words())

def test_mixed_samples_are_refused_with_views():
    with pytest.raises(ValueError, match='MixUp mixed'):
        exact_fit(CachedTeacher(net(8), views=2), net(8), jittered(), 1, cbs=[MixUp()])

def test_nothing_stays_on_the_loader():
    class Stop(Callback):
        def after_batch(self):
            if self.training and self.iter==2: raise KeyboardInterrupt
    dls = jittered()
    before = {*vars(dls.train)}
    exact_fit(CachedTeacher(net(8), views=2), net(8), dls, 2)
    with pytest.raises(KeyboardInterrupt): exact_fit(CachedTeacher(net(8), views=2), net(8), dls, 2, cbs=[Stop()])
    assert {*vars(dls.train)}-before<={'_DataLoader__idxs','it','_n_inp','_types'}
    assert type(dls.train.after_batch) is Pipeline

def test_indices_are_tracked_twice_at_once():
    dl = loaders(shuffle=True).train
    with BatchTracker(dl) as a, BatchTracker(dl, seed=3) as b:
        for x,_ in dl:
            assert torch.equal(a.indices, b.indices) and torch.equal(x, dl.dataset.x[a.indices])
            assert batch_indices(dl) is b.indices
    with pytest.raises(ValueError, match='not tracked'): batch_indices(dl)

# ---- transforms of other libraries, as a plain Transform

class ImagesAsPictures(Images):
    "Gray pictures of 24x24, which students see as 16x16"
    def __init__(self, n=48):
        from fastai.vision.core import PILImageBW
        super().__init__(n)
        grey = [Image.fromarray(((x[0]+1)*100).byte().numpy()) for x in self.x]
        self.pictures = [PILImageBW.create(o.resize((24,24))) for o in grey]
    def __getitem__(self, i): return self.pictures[i],self.y[i]

def pictures(*tfms, n=48, **kwargs):
    from fastai.data.transforms import ToTensor
    ds = ImagesAsPictures(n)
    return DataLoaders(*(TfmdDL(ds, bs=16, shuffle=o, after_item=[*tfms, ToTensor], after_batch=[IntToFloatTensor],
                                **{'num_workers':0, **kwargs}) for o in (True, False)))

class FromOtherLibrary(Transform):
    "As the tutorials of fastai have it: the pipeline is an attribute"
    def __init__(self, f): self.f = f
    def encodes(self, x:Image.Image): return type(x)(self.f(x))

def check_views(tfm, tmp_path, **kwargs):
    "Exact with two views, in this process and with workers; refused without views"
    t = net(8)
    seen = asked(t)
    assert exact_fit(CachedTeacher(t, tmp_path/'c', views=2), t, pictures(tfm), 3)==3*48
    assert sum(seen)==2*48
    a,b = (inputs(StoredTeacher(tmp_path/'c'), pictures(tfm, num_workers=w), 2) for w in (0,2))
    assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])
    assert not torch.equal(a[0].sum((1,2,3)).sort()[0], a[1].sum((1,2,3)).sort()[0])
    with pytest.raises(ValueError, match='From(OtherLibrary|Albumentations)'):
        exact_fit(CachedTeacher(t), t, pictures(tfm), 1)

@pytest.mark.slow
def test_torchvision_transforms(tmp_path):
    from torchvision.transforms import v2
    check_views(FromOtherLibrary(v2.Compose([v2.RandomCrop(16), v2.RandomHorizontalFlip(), v2.RandomRotation(10)])),
                tmp_path)

class OwnPipeline:
    "A random crop with a generator of its own, with the method by which Albumentations sets its generators"
    def __init__(self): self.set_random_seed(None)
    def set_random_seed(self, seed): self.rng = np.random.default_rng(seed)
    def __call__(self, x):
        i,j = self.rng.integers(9, size=2)
        return x.crop((i,j,i+16,j+16))

def test_a_pipeline_whose_generator_can_be_seeded(tmp_path): check_views(FromOtherLibrary(OwnPipeline()), tmp_path)

def test_albumentations(tmp_path):
    A = pytest.importorskip('albumentations', reason='albumentations is not installed')
    class FromAlbumentations(FromOtherLibrary):
        def encodes(self, x:Image.Image): return type(x)(Image.fromarray(self.f(image=np.array(x))['image']))
    crop = A.Compose([A.RandomCrop(16, 16), A.HorizontalFlip(p=0.5), A.RandomBrightnessContrast(p=0.5)])
    check_views(FromAlbumentations(crop), tmp_path)

# ---- other processes: killed at any moment, or filling the same folder

def start(f):
    "Run a function in a forked process, for a minute at most"
    if not hasattr(os, 'fork'): pytest.skip('no fork on this system')
    pid,code = os.fork(),1
    if pid: return pid
    try:
        signal.alarm(60)
        f()
        code = 0
    except BaseException as e: print(repr(e), file=sys.stderr)
    finally: os._exit(code)

def end(pid):
    "How a process ended: 0, or the negative number of a signal"
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

def die(*args, **kwargs): os.kill(os.getpid(), signal.SIGKILL)
def dies_in_call(f, n, counts=lambda *args: True):
    "A function that does what `f` does, and kills the process in the n-th of the calls that count"
    calls = []
    def wrapped(*args):
        if counts(*args): calls.append(1)
        if len(calls)==n: die()
        return f(*args)
    return wrapped

def in_batch(n): return lambda teacher: teacher.register_forward_hook(dies_in_call(lambda *args: None, n))
def in_store(name, f):
    "Replace a function of the store in this process"
    import kd_fastai.teacher.store as store
    return lambda teacher: setattr(store, name, f(getattr(store, name)))
def then_die(f): return lambda *args: (f(*args), die())

MOMENTS = dict(
    before_the_folder_has_its_settings=(in_store('_write_json', lambda f: die), 0),
    before_a_table_exists=(in_batch(1), 0),
    before_a_table_has_its_header=(in_store('_allocate', then_die), 0),
    before_a_batch_has_its_checksums=(in_store('_checksums', lambda f: dies_in_call(f, 3, len)), 32),
    in_the_second_view=(in_batch(9), 8*16-12))  # the last of seven batches has 4 of 100 samples

@pytest.mark.parametrize('moment', MOMENTS)
def test_views_after_a_kill(moment, tmp_path):
    "What was written is stored, the rest is predicted, and every prediction is the live teacher's"
    kill_when,n_there = MOMENTS[moment]
    t = net(8)
    def fill(): return CachedTeacher(t, tmp_path/'c', views=2).fill(jittered(), bar=False)
    def fill_and_die(): kill_when(t); fill()
    assert end(start(fill_and_die))==-signal.SIGKILL
    seen = asked(t)
    fill()
    assert sum(seen)==200-n_there
    assert exact_fit(StoredTeacher(tmp_path/'c'), t, jittered(), 2)==200

def test_two_processes_fill_the_same_views(tmp_path):
    "at once, and one of them is killed in between"
    t = net(8)
    t.register_forward_hook(lambda *args: time.sleep(0.01))
    def fill(): CachedTeacher(t, tmp_path/'c', views=2).fill(jittered(), bar=False)
    def fill_and_die():
        t.register_forward_hook(lambda *args: ((tmp_path/'asked').touch(), time.sleep(0.02), die()))
        fill()
    def fill_soon():
        while not (tmp_path/'asked').exists(): time.sleep(0.001)
        fill()
    pids = [start(f) for f in (fill_and_die, fill_soon, fill_soon)]
    assert [end(o) for o in pids]==[-signal.SIGKILL, 0, 0]
    assert len(files(tmp_path/'c'))==1
    seen = asked(t)
    fill()
    assert not seen
    assert exact_fit(StoredTeacher(tmp_path/'c'), t, jittered(), 2)==200

@pytest.mark.slow
def test_text_classification_of_fastai(tmp_path):
    "its training loader is a shuffled SortedDL, and its models have a hidden state"
    from fastai.text.all import AWD_LSTM, TextDataLoaders, awd_lstm_clas_config, text_classifier_learner
    g = random.Random(0)
    words = 'a good bad film not one is it the very'.split()
    df = pd.DataFrame(dict(text=[' '.join(g.choices(words, k=g.randint(3,40))) for _ in range(60)], label=[0,1]*30,
                           is_valid=[False]*48+[True]*12))
    config = {**awd_lstm_clas_config, 'emb_sz':8, 'n_hid':8, 'n_layers':1}
    def classifier():
        dls = TextDataLoaders.from_df(df, text_col='text', label_col='label', valid_col='is_valid', bs=16,
                                      num_workers=0)
        learn = text_classifier_learner(dls, AWD_LSTM, pretrained=False, config=config, seq_len=24)
        learn.remove_cb(ProgressCallback)
        learn.logger = noop
        return learn
    set_seed(0)
    t,live,seen,got = classifier().model,classifier().model,[],[]
    live.load_state_dict(t.state_dict())
    live.eval()
    t.register_forward_hook(lambda m,x,out: seen.append(len(out[0])))
    learn = classifier()
    def loss(pred, teacher_pred):
        live.reset()
        with torch.no_grad(): expected = live(*learn.xb)[0]
        torch.testing.assert_close(teacher_pred, expected, rtol=1e-4, atol=1e-5)
        got.append(len(pred))
        return (pred-teacher_pred).square().mean()
    learn.add_cb(KD(CachedTeacher(t, tmp_path/'c', views=2), loss))
    learn.fit(4)
    assert sum(got)==4*48
    assert sum(seen)==2*48
