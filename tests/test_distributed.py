"Two processes train together: each runs this file as a script, and the tests compare what they saved with one process that has the joined batches."
import os, socket, subprocess, sys
from contextlib import nullcontext
from copy import deepcopy
from pathlib import Path
import pytest, torch
from torch import nn
from fastai.basics import *
from fastai.callback.all import *
from kd_fastai.all import *
from kd_fastai.demo import _Digits, _Rows, digits, small_net

for o in [*globals()]:
    if o=='test' or o.startswith('test_'): del globals()[o]  # fastcore's own helpers, which pytest would take for tests

pytest.importorskip('accelerate', reason='fastai trains in several processes by accelerate, which is not installed')
RANKS,BS,N = 2,12,96

def net(): set_seed(3); return nn.Sequential(nn.Flatten(), nn.Linear(64,16), nn.Tanh(), nn.Linear(16,10))
def teacher(): set_seed(4); return nn.Sequential(nn.Flatten(), nn.Linear(64,24), nn.Tanh(), nn.Linear(24,10))

class Adapted(nn.Module):
    "The square distance to the teacher's feature after a linear layer, and perhaps batch norm"
    def __init__(self, norm=False): super().__init__(); self.norm = norm
    def build(self, fm_s, fm_t, **kwargs):
        (s,),(t,) = fm_s.values(),fm_t.values()
        self.layers = nn.Sequential(nn.Linear(s.shape[1], t.shape[1]), *([nn.BatchNorm1d(t.shape[1])] if self.norm else []))
    def forward(self, fm_s, fm_t):
        (s,),(t,) = fm_s.values(),fm_t.values()
        return (self.layers(s)-t).pow(2).mean()

def data(joined):
    "The same 96 digits, in order; joined, a batch holds what both processes have at the same time"
    x,y = digits().train.dataset.tensors
    order = torch.arange(N)
    if joined: order = order.view(RANKS,-1,BS).transpose(0,1).flatten()
    ds = _Digits(x[order], y[order])
    return DataLoaders(_Rows(ds, bs=BS*(RANKS if joined else 1)), _Rows(ds, bs=BS))

def learner(joined, path='.', norm=False, model=None, **kwargs):
    layer = '2' if model is None else '4'
    kd = KnowledgeDistillationCallback(teacher(), [Term(SoftTarget, 0.5), Term(Adapted(norm), 2., layers=[(layer,'2')])])
    learn = Learner(data(joined), model or net(), loss_func=CrossEntropyLossFlat(), cbs=kd, path=path, **kwargs)
    learn.remove_cb(ProgressCallback)
    learn.logger = noop
    return learn

CASES = {  # callbacks, of one process and of each of two
    'plain': (lambda n: []), 'clipped': (lambda n: [GradientClip(0.1)]), 'accumulated': (lambda n: [GradientAccumulation(2*BS*n)]),
    'both': (lambda n: [GradientAccumulation(2*BS*n), GradientClip(0.1)])}

def state(learn): return {'student': deepcopy(learn.model.state_dict()), 'owned': deepcopy(learn.knowledge_distillation.terms[1].loss.state_dict()),
    'columns': dict(zip(learn.recorder.metric_names[1:-1], learn.recorder.values[-1])), 'hooks': sum(len(m._forward_hooks) for m in learn.model.modules())}

def run(learn, ctx, n=2, **kwargs):
    with ctx(learn): learn.fit(n, 0.1, **kwargs)
    return state(learn)

def seeded(seed, *args, **kwargs):
    "A learner before whose fit the random state is known"
    learn = learner(*args, **kwargs)
    set_seed(seed)
    return learn

def positions(ctx):
    "Whether a loss that asks for the positions of its samples gets this process's, and which they were"
    learn,seen = learner(False),[]
    def indexed(pred, target, idx):
        assert (learn.dls.train.dataset.tensors[1][idx]==target).all()
        seen.extend(idx.tolist())
        return pred.mean()
    learn.remove_cb(learn.knowledge_distillation)
    with ctx(learn): learn.fit(1, 0.1, cbs=KnowledgeDistillationCallback(teacher(), indexed))
    return seen

def worker(path):
    "What each of the processes does"
    import torch.distributed.nn  # while there is no process group, which it would keep: see the tutorial on several processes
    from fastai.distributed import DistributedDL
    rank = rank_distrib()
    mine = partial(seeded, rank, False)  # what a loss builds must not depend on each process's random state
    def broadcast(self, t, rank): t = LongTensor(t); torch.distributed.broadcast(t, rank); return t.tolist()
    DistributedDL._broadcast = broadcast  # fastai's own calls .cuda()
    def together(learn): return learn.distrib_ctx(sync_bn=False, cpu=True)
    res = {case: run(mine(opt_func=SGD), together, cbs=cbs(1)) for case,cbs in CASES.items()}
    res['norm'] = run(mine(norm=True), together)
    res['positions'] = positions(together)
    res['student with batch norm'] = run(mine(model=small_net(4)), together)  # torch has SyncBatchNorm on GPUs alone
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

if __name__=='__main__': worker(Path(sys.argv[1]))

@pytest.fixture(scope='module')
def ranks(tmp_path_factory):
    path = tmp_path_factory.mktemp('ranks')
    with socket.socket() as s: s.bind(('127.0.0.1', 0)); port = s.getsockname()[1]
    def start(r): return subprocess.Popen([sys.executable, '-W', 'ignore', __file__, path], text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env={**os.environ, 'RANK':str(r), 'LOCAL_RANK':str(r),
        'WORLD_SIZE':str(RANKS), 'MASTER_ADDR':'127.0.0.1', 'MASTER_PORT':str(port), 'PYTHONPATH':str(Path(__file__).parent.parent)})
    procs = [start(r) for r in range(RANKS)]
    try: out = [p.communicate(timeout=300)[0] for p in procs]
    finally:
        for p in procs: p.kill()
    assert not any(p.returncode for p in procs), '\n'.join(out)
    return [torch.load(path/f'{r}.pt') for r in range(RANKS)]

def same(a, b, **kwargs):
    assert a.keys()==b.keys()
    for k in a: torch.testing.assert_close(a[k], b[k], **kwargs)

@pytest.mark.parametrize('case', CASES)
def test_equals_one_process_with_the_joined_batch(ranks, case):
    "student, owned weights and columns"
    whole = run(seeded(0, True, opt_func=SGD), lambda l: nullcontext(), cbs=CASES[case](RANKS))
    for o in ranks:
        for k in ('student','owned'): same(o[case][k], whole[k], rtol=1e-4, atol=1e-6)
        for k in ('task_loss','soft_target','adapted'): assert o[case]['columns'][k]==pytest.approx(whole['columns'][k], rel=1e-5)

@pytest.mark.parametrize('case', [*CASES,'norm','student with batch norm','after apart','loaded','went on'])
def test_owned_weights_stay_equal(ranks, case):
    "to the last bit, and so do the columns; running statistics, which a loss in train mode does not use, are each one's own"
    a,b = (o[case] for o in ranks)
    for k in ('student','owned'): same(*({n:v for n,v in o[k].items() if 'running' not in n} for o in (a,b)), rtol=0, atol=0)
    for k in ('task_loss','soft_target','adapted'): assert a['columns'][k]==b['columns'][k]
    assert a['hooks']==b['hooks']==0

def test_positions_of_samples(ranks):
    "each process is told its own, together they are all"
    assert sorted(ranks[0]['positions']+ranks[1]['positions'])==[*range(N)]

def test_apart_means_apart(ranks):
    "a Learner outside `distrib_ctx` trains by itself"
    a,b = (o['apart']['owned']['layers.0.weight'] for o in ranks)
    assert not torch.equal(a, b)

def test_saved_once_and_goes_on(ranks):
    assert ranks[0]['files']==['m.losses.pth','m.pth']
    for o in ranks:
        for k in ('student','owned'): same(o['loaded'][k], o['went on'][k], rtol=0, atol=0)
