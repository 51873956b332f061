"""Two processes train together, and equal one process that has the joined batches.

Each of the two saves what it saw; the tests compare the files."""
from contextlib import nullcontext
from copy import deepcopy
from functools import partial
import pytest, torch
from torch import nn
from fastai.basics import CrossEntropyLossFlat, DataLoaders, Learner, LongTensor, SGD, set_seed
from fastai.callback.all import GradientAccumulation, GradientClip
from kd_fastai.all import *
from kd_fastai.objective import rising
from kd_fastai.demo import ImageSet, WholeBatchLoader, digits, small_net
from support import KD, hooks, quiet
from support.processes import free_port, join_group, run_processes

pytestmark = pytest.mark.slow

pytest.importorskip('accelerate', reason='fastai trains in several processes by accelerate, which is not installed')
RANKS,BS,N = 2,12,96

def net(): set_seed(3); return nn.Sequential(nn.Flatten(), nn.Linear(64,16), nn.Tanh(), nn.Linear(16,10))
def teacher(seed=4): set_seed(seed); return nn.Sequential(nn.Flatten(), nn.Linear(64,24), nn.Tanh(), nn.Linear(24,10))

class Adapted(nn.Module):
    "The mean squared distance to the teacher's feature after a linear layer, with or without batch norm"
    def __init__(self, norm=False): super().__init__(); self.norm = norm
    def build(self, fm_s, fm_t, **kwargs):
        (s,),(t,) = fm_s.values(),fm_t.values()
        self.layers = nn.Sequential(nn.Linear(s.shape[1], t.shape[1]))
        if self.norm: self.layers.append(nn.BatchNorm1d(t.shape[1]))
    def forward(self, fm_s, fm_t):
        (s,),(t,) = fm_s.values(),fm_t.values()
        return (self.layers(s)-t).pow(2).mean()

def data(joined, teacher_inputs=0):
    """96 digits in order; if `joined`, a batch has the samples of both processes' batches.

    The teacher's own inputs are the images in a mirror."""
    x,y = digits().train.dataset.tensors
    order = torch.arange(N)
    if joined: order = order.view(RANKS,-1,BS).transpose(0,1).flatten()
    own = [x.flip(-1)[order]] if teacher_inputs else []
    ds = ImageSet(x[order], *own, y[order])
    return DataLoaders(WholeBatchLoader(ds, bs=BS*(RANKS if joined else 1)), WholeBatchLoader(ds, bs=BS))

def terms(a=None, b=None, norm=False, layer='2'):
    "A term on predictions of one teacher, and one on features of the same or of another"
    return [Term(SoftTarget, 0.5, teacher=a, name='soft_target'),
            Term(Adapted(norm), 2., layers=[(layer,'2')], teacher=b, name='adapted')]

def learner(joined, path='.', norm=False, model=None, kd=None, **kwargs):
    kd = kd or KD(teacher(), terms(norm=norm, layer='2' if model is None else '4'))
    dls = data(joined, kd.teacher_inputs)
    return quiet(Learner(dls, model or net(), loss_func=CrossEntropyLossFlat(), cbs=kd, path=path, **kwargs))

CASES = {   # callbacks, for the number of processes whose batches are joined
    'plain':       lambda n: [],
    'clipped':     lambda n: [GradientClip(0.1)],
    'accumulated': lambda n: [GradientAccumulation(2*BS*n)],
    'both':        lambda n: [GradientAccumulation(2*BS*n), GradientClip(0.1)]}

TEACHERS = {
    'several teachers': lambda: KD({'a': teacher(), 'b': teacher(5)}, terms('a', 'b')),
    'own inputs':       lambda: KD(teacher(), terms(), teacher_inputs=1),
    'balanced':         lambda: KD(teacher(), terms(), balance=True),
    'growing':          lambda: KD(teacher(), terms(), schedule=rising)}

def result(learn):
    columns = dict(zip(learn.recorder.metric_names[1:-1], learn.recorder.values[-1]))
    owned = learn.knowledge_distillation.terms[1].loss.state_dict()
    return {'student': deepcopy(learn.model.state_dict()), 'owned': deepcopy(owned), 'columns': columns,
        'hooks': hooks(learn.model)}

def run(learn, ctx, n=2, **kwargs):
    with ctx(learn): learn.fit(n, 0.1, **kwargs)
    return result(learn)

def features_alone(learn, ctx):
    "The student after a training run on features without the task loss, so that its last layer has no gradient"
    learn.remove_cb(learn.knowledge_distillation)
    with ctx(learn): learn.fit(2, 0.1, cbs=KD(teacher(), Term(Adapted(), layers=[('2','2')]), task_weight=0))
    return deepcopy(learn.model.state_dict())

def seeded(seed, *args, **kwargs):
    "A Learner, with the random state set after it is created"
    learn = learner(*args, **kwargs)
    set_seed(seed)
    return learn

def positions(ctx):
    "The positions that a loss gets in this process; checks that they are those of its samples"
    learn,seen = learner(False),[]
    def indexed(pred, target, idx):
        assert (learn.dls.train.dataset.tensors[1][idx]==target).all()
        seen.extend(idx.tolist())
        return pred.mean()
    learn.remove_cb(learn.knowledge_distillation)
    with ctx(learn): learn.fit(1, 0.1, cbs=KD(teacher(), indexed))
    return seen

def found(ctx):
    "The weights that this process found, and its student"
    learn = learner(False, opt_func=SGD)
    learn.remove_cb(learn.knowledge_distillation)
    kd = KD(teacher(), [SoftTarget, Term(Similarity, 'auto', layers='2')], weight='auto')
    with ctx(learn): learn.fit(1, 0.1, cbs=kd)
    return {'weights': kd.weights, 'student': deepcopy(learn.model.state_dict())}

def worker(rank, port, path):
    "The training runs of one process"
    join_group(rank, RANKS, port)
    # imported later, torch.distributed.nn would keep the process group: see the tutorial on several processes
    import torch.distributed.nn
    from fastai.distributed import DistributedDL
    mine = partial(seeded, rank, False)  # a loss's weights must not depend on a process's random state
    def broadcast(self, t, rank):
        t = LongTensor(t)
        torch.distributed.broadcast(t, rank)
        return t.tolist()
    DistributedDL._broadcast = broadcast  # fastai's own calls .cuda()
    def together(learn): return learn.distrib_ctx(sync_bn=False, cpu=True)
    res = {case: run(mine(opt_func=SGD), together, cbs=cbs(1)) for case,cbs in CASES.items()}
    res |= {case: run(mine(kd=make(), opt_func=SGD), together) for case,make in TEACHERS.items()}
    res['norm'] = run(mine(norm=True), together)
    res['features alone'] = features_alone(mine(opt_func=SGD), together)
    res['positions'],res['found'] = positions(together),found(together)
    res['student with batch norm'] = run(mine(model=small_net(4)), together)  # torch has SyncBatchNorm on GPUs only
    learn = mine(path=path, opt_func=SGD)               # Adam's states, the student's too, would stay apart
    res['apart'] = run(learn, lambda l: nullcontext())           # each for itself, from other weights
    res['after apart'] = run(learn, together)
    learn.save('m')
    torch.distributed.barrier()
    res['files'] = sorted(o.name for o in (path/'models').iterdir())
    res['loaded'] = run(mine(path=path, opt_func=SGD).load('m'), together)
    res['went on'] = run(learn, together)
    torch.save(res, path/f'{rank}.pt')
    torch.distributed.destroy_process_group()

@pytest.fixture(scope='module')
def ranks(tmp_path_factory):
    path = tmp_path_factory.mktemp('ranks')
    port = free_port()
    assert run_processes(worker, *((rank, port, path) for rank in range(RANKS)))==[0]*RANKS
    return [torch.load(path/f'{r}.pt') for r in range(RANKS)]

COLUMNS = ['task_loss','soft_target','adapted']

@pytest.mark.parametrize('case', [*CASES, *TEACHERS])
def test_equals_one_process_with_the_joined_batch(ranks, case):
    "Student, owned weights and columns are those of one process."
    kd = TEACHERS[case]() if case in TEACHERS else None
    cbs = CASES.get(case, CASES['plain'])(RANKS)
    whole = run(seeded(0, True, kd=kd, opt_func=SGD), lambda l: nullcontext(), cbs=cbs)
    for o in ranks:
        for k in ('student','owned'): torch.testing.assert_close(o[case][k], whole[k], rtol=1e-4, atol=1e-5)
        for k in COLUMNS: assert o[case]['columns'][k]==pytest.approx(whole['columns'][k], rel=1e-5)

@pytest.mark.parametrize('case', TEACHERS)
def test_other_teachers_teach_something_else(ranks, case):
    assert not torch.equal(ranks[0][case]['student']['1.weight'], ranks[0]['plain']['student']['1.weight'])

def test_features_alone_equal_one_process(ranks):
    "`DistributedDataParallel` waits for every parameter, also for those without a gradient."
    whole = features_alone(seeded(0, True, opt_func=SGD), lambda l: nullcontext())
    for o in ranks: torch.testing.assert_close(o['features alone'], whole, rtol=1e-4, atol=1e-6)

def without_statistics(state): return {n:v for n,v in state.items() if 'running' not in n}

@pytest.mark.parametrize('case', [*CASES,*TEACHERS,'norm','student with batch norm','after apart','loaded','went on'])
def test_processes_stay_equal(ranks, case):
    "Student, owned weights and columns are equal to the last bit; running statistics are each process's own."
    a,b = (o[case] for o in ranks)
    for k in ('student','owned'):
        torch.testing.assert_close(without_statistics(a[k]), without_statistics(b[k]), rtol=0, atol=0)
    for k in COLUMNS: assert a['columns'][k]==b['columns'][k]
    assert a['hooks']==b['hooks']==0

def test_automatic_weights_are_equal(ranks):
    "The processes find one number together, though each has other samples."
    a,b = (o['found'] for o in ranks)
    assert all(w>0 for w in a['weights'].values())
    assert a['weights']==b['weights']
    torch.testing.assert_close(a['student'], b['student'], rtol=0, atol=0)

def test_positions_of_samples(ranks):
    "Each process gets the positions of its own samples, and together these are all."
    assert sorted(ranks[0]['positions']+ranks[1]['positions'])==[*range(N)]

def test_apart_means_apart(ranks):
    "Outside `distrib_ctx` each process trains by itself, so weights differ."
    a,b = (o['apart']['owned']['layers.0.weight'] for o in ranks)
    assert not torch.equal(a, b)

def test_one_process_saves_and_all_load(ranks):
    assert ranks[0]['files']==['m.kd.pth','m.pth']
    for o in ranks:
        for k in ('student','owned'): torch.testing.assert_close(o['loaded'][k], o['went on'][k], rtol=0, atol=0)
