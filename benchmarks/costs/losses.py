"""Time and peak memory of every loss, forward and backward, compared with torchdistill's form where it has one.

    python benchmarks/cost.py losses [--seconds 0.7] [--batch 64 256] [--channels 256 512] [--only NST RKD]

Maps are (B, C, 8, 8), embeddings (B, C), predictions (B, 100). Ours and theirs take turns, for some seconds; times
are medians. Memory is what tensors hold at most beyond the inputs, as PyTorch's operations hand them out. Peers
whose largest tensor would pass 600 MB are left out, but for NST's, which its target speaks of. torchdistill is
optional (extra `bench`); NST's peer is RepDistiller's form."""
import argparse, time
from functools import partial
import torch, torch.nn.functional as F
from torch.utils._pytree import tree_leaves
from clock import ms, peak_mib, ratio, take_turns, target, write
from kd_fastai.losses.facts import loss_args
from kd_fastai.losses import output, feature, relation
try: from torchdistill.losses import mid_level as td
except ImportError: td = None

CLASSES = 100
EMBEDDINGS = 'PKT','RKD','RKD angle','DarkRank','CorrelationCongruence','SRD'
LOSSES = {n: getattr(m, n) for m in (output, feature, relation) for n in m.__all__ if hasattr(getattr(m, n), 'info')}
LOSSES['RKD angle'] = partial(relation.RKD, distance=0.)
LOSSES['MiniLMv2'] = partial(feature.MiniLMv2, heads=8)  # 12, the default, divides no power of 2

def inputs(name, B, C, classes=CLASSES):
    "Arguments of one loss"
    def feat():
        return ({'a': torch.randn(B, C, 8, 8), 'b': torch.randn(B, C, 8, 8)} if name in ('FSP','IRG')
                else {'a': torch.randn(B, C)} if name in EMBEDDINGS else {'a': torch.randn(B, C, 8, 8)})
    x = dict(pred=torch.randn(B, classes), teacher_pred=torch.randn(B, classes), fm_s=feat(), fm_t=feat(),
             target=torch.randint(classes, (B,)))
    if name=='BoundedRegression': x['target'] = torch.randn(B, classes)
    if name=='IFVD': x['target'] = torch.randint(classes, (B,8,8))  # a label for each position
    return {k:v for k,v in x.items() if k in loss_args(LOSSES[name]).accepted}

def students(x): return [t.requires_grad_() for t in tree_leaves([x.get('pred'), x.get('fm_s')]) if t is not None]

# --- peers

def io(v, kind='output'): return {k: {kind: t} for k,t in v.items()} if isinstance(v, dict) else {'a': {kind: v}}
def on(make, s='fm_s', t='fm_t'):
    def _(x): loss = make(); return lambda: loss(io(x[s]), io(x[t]))
    return _
def both_ends(*a):
    return dict(zip(('student_module_path','student_module_io','teacher_module_path','teacher_module_io'),
                    a or ('a','output','a','output')))
def pairs(**kw): return {'p': dict(teacher=dict(io='output', path='a'), student=dict(io='output', path='a'), **kw)}
def hcl(x):
    loss = td.HierarchicalContextLoss(**both_ends())
    return lambda: loss({'a': {'output': (x['fm_s']['a'], None)}}, io(x['fm_t']))
def srd(x):
    loss = td.SRDLoss('a','output','a','output','z','output','z','output', exponent=4.)
    return lambda: loss({**io(x['fm_s']), 'z': {'output': x['pred']}},
                        {**io(x['fm_t']), 'z': {'output': x['teacher_pred']}})
def nst(x):
    def k(a, b): return (a[:,:,None]*b[:,None]).sum(-1).pow(2).mean()
    def unit(f): return F.normalize(f.flatten(2), dim=2)
    def _():
        s,t = unit(x['fm_s']['a']),unit(x['fm_t']['a'])
        return k(t, t).detach()+k(s, s)-2*k(s, t)
    return _
FSP_ENDS = {f'{who}_{n}': dict(io='output', path=p) for who in ('student','teacher')
            for n,p in (('first','a'),('second','b'))}
PEERS = {'NST': nst} if td is None else {'NST': nst, 'HCL': hcl, 'SRD': srd,
    'SoftTarget': on(lambda: td.KDLoss(**both_ends(), temperature=5., alpha=0., beta=1.), 'pred', 'teacher_pred'),
    'DIST': on(lambda: td.DISTLoss(**both_ends()), 'pred', 'teacher_pred'),
    'Attention': on(lambda: td.ATLoss(pairs(factor=1))),
    'AttentionNorm': on(lambda: td.ATLoss(pairs(factor=1), mode='paper')),
    'ActivationBoundaries': on(lambda: td.AltActTransferLoss(pairs(factor=1), margin=2, reduction='mean')),
    'FSP': on(lambda: td.FSPLoss({'p': dict(FSP_ENDS, weight=1)})),
    'FactorTransfer': on(lambda: td.FTLoss(paraphraser_path='a', translator_path='a')),
    'KTA': on(lambda: td.KTALoss(knowledge_translator_path='a', feature_adapter_path='a')),
    'Affinity': on(lambda: td.AffinityLoss('a', 'a')),
    'Similarity': on(lambda: td.SPKDLoss('a', 'a', reduction='batchmean')),
    'PKT': on(lambda: td.PKTLoss('a', 'output', 'a', 'output')),
    'RKD': on(lambda: td.RKDLoss('a', 'a', dist_factor=25., angle_factor=50., reduction='mean')),
    'RKD angle': on(lambda: td.RKDLoss('a', 'a', dist_factor=0., angle_factor=50., reduction='mean')),
    'CorrelationCongruence': on(lambda: td.CCKDLoss('a', 'a', dict(type='gaussian', gamma=.4, max_p=2),
                                                    reduction='batchmean')),
    'ICKD': on(lambda: td.ChSimLoss(pairs(weight=1))),
}
LIKE_PEER = {'CorrelationCongruence': dict(normalize=False)}  # where our default does more than the peer does
def largest(name, B, C):
    return 4*{'NST': B*C*C*64, 'Affinity': B*C*64*64, 'RKD': B*B*max(B, C),
              'RKD angle': B*B*max(B, C)}.get(name, B*C*64)

# --- measuring

def step(f, leaves): torch.autograd.grad(f(), leaves, allow_unused=True)

def measure(name, B, C, seconds):
    "One row: milliseconds and MiB of our loss and of its peer, if it has one"
    torch.manual_seed(0)
    x = inputs(name, B, C)
    leaves = students(x)
    fs = {'ours': partial(LOSSES[name], **x, **LIKE_PEER.get(name, {}))}
    if name in PEERS and largest(name, B, C)<=(1.2e9 if name=='NST' else 6e8): fs['peer'] = PEERS[name](x)
    steps = {k: partial(step, f, leaves) for k,f in fs.items()}
    start = time.perf_counter(); [f() for f in steps.values()]; once = time.perf_counter()-start
    times = take_turns(steps, max(3 if once>1 else 7, min(300, int(seconds/once))), warm=1)
    row = {'loss': name, 'B': B, 'C': C, 'ms': ms(times['ours']), 'MiB': peak_mib(steps['ours'])}
    if 'peer' in fs:
        mid,low,_ = ratio(times, 'ours', 'peer')
        more = sorted(a-b for a,b in zip(times['ours'], times['peer']))[len(times['ours'])//2]
        row.update({'peer ms': ms(times['peer']), 'peer MiB': peak_mib(steps['peer']), 'time to peer': mid,
                    'quartile 1': low, 'ms more than peer': 1000*more})
    return row

def main(seconds=0.7, batch=(64,256), channels=(256,512), only=None):
    "Measure, write the table, and give the targets"
    rows = [measure(name, B, C, seconds) for name in only or LOSSES for B in batch
            for C in (channels if 'fm_s' in loss_args(LOSSES[name]).accepted else [CLASSES])]
    write('losses', rows,
          "Every loss, forward and backward, compared with its peer's form. A ratio below 1: ours is faster.")
    def targets(r):
        where = f"{r['loss']} B{r['B']} C{r['C']}"
        # of calls that take less than 2 ms, checks of the inputs are a large part: at most 0.2 ms more
        time = (target(f'{where}: ms more than peer', r['ms more than peer'], 0.2) if r['peer ms']<2 else
                target(f'{where}: time to peer', (r['time to peer'],r['quartile 1'],None), 1.05))
        return [time, target(f'{where}: memory to peer', r['MiB']/r['peer MiB'], 1.05)]
    return [t for r in rows if 'peer ms' in r for t in targets(r)]

if __name__=='__main__':
    p = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    p.add_argument('--seconds', type=float, default=0.7)
    p.add_argument('--batch', type=int, nargs='+', default=[64,256])
    p.add_argument('--channels', type=int, nargs='+', default=[256,512])
    p.add_argument('--only', nargs='*', choices=LOSSES)
    torch.set_num_threads(1)
    main(**vars(p.parse_args()))
