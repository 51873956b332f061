"""Time and peak memory of every loss, forward and backward, beside torchdistill's form where it has one.

    python benchmarks/losses.py [--rounds 5] [--batch 64 256] [--channels 256 512] [--only NST RKD] [--out benchmarks/losses.md]

Maps are (B, C, 8, 8), embeddings (B, C), predictions (B, 100). Ours and theirs take turns; times are medians. Memory is what tensors hold at most beyond the inputs, as PyTorch's
operations hand them out. Peers whose largest tensor would pass 600 MB are left out. torchdistill is optional: `pip install torchdistill` fills its column; NST's peer is RepDistiller's form."""
import argparse, statistics, sys, time, weakref
import torch, torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from kd_fastai.contract import needs
from kd_fastai.losses import output, feature, relation
try: from torchdistill.losses import mid_level as td
except ImportError: td = None

CLASSES = 100
EMBEDDINGS = 'PKT','RKD','DarkRank','CorrelationCongruence','SRD'
LOSSES = {n: getattr(m, n) for m in (output, feature, relation) for n in m.__all__ if hasattr(getattr(m, n), 'about')}

def inputs(name, B, C):
    "Arguments of one loss"
    def feat(): return {'a': torch.randn(B, C, 8, 8), 'b': torch.randn(B, C, 8, 8)} if name in ('FSP','IRG') else {'a': torch.randn(B, C)} if name in EMBEDDINGS else {'a': torch.randn(B, C, 8, 8)}
    x = dict(pred=torch.randn(B, CLASSES), teacher_pred=torch.randn(B, CLASSES), fm_s=feat(), fm_t=feat(), target=torch.randint(CLASSES, (B,)))
    if name=='BoundedRegression': x['target'] = torch.randn(B, CLASSES)
    return {k:v for k,v in x.items() if k in needs(LOSSES[name]).wanted}

def students(x): return [t.requires_grad_() for t in tree_leaves([x.get('pred'), x.get('fm_s')]) if t is not None]

# --- peers

def io(v, kind='output'): return {k: {kind: t} for k,t in v.items()} if isinstance(v, dict) else {'a': {kind: v}}
def on(make, s='fm_s', t='fm_t'):
    def _(x): loss = make(); return lambda: loss(io(x[s]), io(x[t]))
    return _
def both_ends(*a): return dict(zip(('student_module_path','student_module_io','teacher_module_path','teacher_module_io'), a or ('a','output','a','output')))
def pairs(**kw): return {'p': dict(teacher=dict(io='output', path='a'), student=dict(io='output', path='a'), **kw)}
def hcl(x): loss = td.HierarchicalContextLoss(**both_ends()); return lambda: loss({'a': {'output': (x['fm_s']['a'], None)}}, io(x['fm_t']))
def srd(x):
    loss = td.SRDLoss('a','output','a','output','z','output','z','output', exponent=4.)
    return lambda: loss({**io(x['fm_s']), 'z': {'output': x['pred']}}, {**io(x['fm_t']), 'z': {'output': x['teacher_pred']}})
def nst(x):
    def k(a, b): return (a[:,:,None]*b[:,None]).sum(-1).pow(2).mean()
    def unit(f): return F.normalize(f.flatten(2), dim=2)
    def _():
        s,t = unit(x['fm_s']['a']),unit(x['fm_t']['a'])
        return k(t, t).detach()+k(s, s)-2*k(s, t)
    return _
FSP_ENDS = {f'{who}_{n}': dict(io='output', path=p) for who in ('student','teacher') for n,p in (('first','a'),('second','b'))}
PEERS = {'NST': nst} if td is None else {'NST': nst, 'HCL': hcl, 'SRD': srd,
    'SoftTarget': on(lambda: td.KDLoss(**both_ends(), temperature=5., alpha=0., beta=1.), 'pred', 'teacher_pred'),
    'DIST': on(lambda: td.DISTLoss(**both_ends()), 'pred', 'teacher_pred'),
    'Attention': on(lambda: td.ATLoss(pairs(factor=1))), 'AttentionNorm': on(lambda: td.ATLoss(pairs(factor=1), mode='paper')),
    'ActivationBoundaries': on(lambda: td.AltActTransferLoss(pairs(factor=1), margin=2, reduction='mean')),
    'FSP': on(lambda: td.FSPLoss({'p': dict(FSP_ENDS, weight=1)})),
    'FactorTransfer': on(lambda: td.FTLoss(paraphraser_path='a', translator_path='a')),
    'KTA': on(lambda: td.KTALoss(knowledge_translator_path='a', feature_adapter_path='a')),
    'Affinity': on(lambda: td.AffinityLoss('a', 'a')),
    'Similarity': on(lambda: td.SPKDLoss('a', 'a', reduction='batchmean')),
    'PKT': on(lambda: td.PKTLoss('a', 'output', 'a', 'output')),
    'RKD': on(lambda: td.RKDLoss('a', 'a', dist_factor=25., angle_factor=50., reduction='mean')),
    'CorrelationCongruence': on(lambda: td.CCKDLoss('a', 'a', dict(type='gaussian', gamma=.4, max_p=2), reduction='batchmean')),
    'ICKD': on(lambda: td.ChSimLoss(pairs(weight=1))),
}
def largest(name, B, C): return 4*{'NST': B*C*C*64, 'Affinity': B*C*64*64, 'RKD': B*B*max(B, C)}.get(name, B*C*64)

# --- measuring

class Held(TorchDispatchMode):
    "Bytes that tensors made by operations hold, now and at most"
    now = peak = 0
    def __init__(self): super().__init__(); self.seen = set()
    def _gone(self, key, n): self.seen.discard(key); self.now -= n
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        old = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if not isinstance(t, torch.Tensor) or (key := t.untyped_storage()._cdata) in old|self.seen: continue
            n = t.untyped_storage().nbytes()
            self.seen.add(key); self.now += n; self.peak = max(self.peak, self.now)
            weakref.finalize(t.untyped_storage(), self._gone, key, n)
        return out

def step(f, leaves): torch.autograd.grad(f(), leaves, allow_unused=True)
def seconds(f, leaves): start = time.perf_counter(); step(f, leaves); return time.perf_counter()-start
def peak_mib(f, leaves):
    with Held() as held: step(f, leaves)
    return held.peak/2**20

def measure(name, B, C, rounds):
    "Milliseconds and MiB of our loss and of its peer, if it has one"
    torch.manual_seed(0)
    x = inputs(name, B, C)
    leaves = students(x)
    ways = [lambda: LOSSES[name](**x)]
    if name in PEERS and largest(name, B, C)<=6e8: ways.append(PEERS[name](x))
    for f in ways: step(f, leaves)
    times = [[] for _ in ways]
    for _ in range(rounds):
        for f,t in zip(ways, times): t.append(seconds(f, leaves))
    return [(1000*statistics.median(t), peak_mib(f, leaves)) for f,t in zip(ways, times)]

def row(name, B, C, rounds):
    (ms,mib),*peer = measure(name, B, C, rounds)
    theirs = f"{peer[0][0]:.2f} | {peer[0][1]:.1f} | {peer[0][0]/ms:.2f}" if peer else '– | – | –'
    return f"| `{name}` | {B} | {C} | {ms:.2f} | {mib:.1f} | {theirs} |"

def main():
    p = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    for k,v in dict(rounds=5).items(): p.add_argument(f'--{k}', type=int, default=v)
    p.add_argument('--batch', type=int, nargs='+', default=[64,256]); p.add_argument('--channels', type=int, nargs='+', default=[256,512])
    p.add_argument('--only', nargs='*', choices=LOSSES); p.add_argument('--out')
    a = p.parse_args()
    torch.set_num_threads(1)
    said = [f"CPU, one thread, PyTorch {torch.__version__}, median of {a.rounds}. A ratio above 1: the peer takes longer.\n",
            '| loss | B | C | ms | MiB | peer ms | peer MiB | peer/ours |', '|---|---|---|---|---|---|---|---|']
    print('\n'.join(said))
    for name in a.only or LOSSES:
        for B in a.batch:
            for C in a.channels if 'fm_s' in needs(LOSSES[name]).wanted else [CLASSES]:
                said.append(row(name, B, C, a.rounds)); print(said[-1], flush=True)
    if a.out: open(a.out, 'w').write('\n'.join(said)+'\n')

if __name__=='__main__': main()
