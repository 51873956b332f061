"""The same tests for every loss without weights. What a loss reads and its value at equality are facts of the loss
(`loss_info`, and `MINIMA` where it is not zero): other losses need no line here."""
import inspect, io, itertools, json, math, re, shutil
from functools import partial
import numpy as np, pytest, scipy.special, torch, torch.nn.functional as F
from fastcore.docments import docments
from kd_fastai.losses.facts import get_loss_info, has_sample_values, loss_args, loss_name, per_sample
from kd_fastai.losses import *
from kd_fastai.losses import output, feature, relation
from kd_fastai.objective import Objective, Term
from support.golden import golden
from support.losses import Largest, close
from check import check, load_index
from make import load_reference, run_reference
from impls import IMPLS, NO_CASES, OUTPUT, FEATURE, RELATION, cross, mlkd_as_published

root = golden.parents[1]

# --- what is known of each loss

def at(**changes): return lambda x: {**x, **{k: f(x) for k,f in changes.items()}}   # inputs at a stated minimum
def maps_at(f): return at(fm_s=lambda x: {ks: f(t) for ks,t in zip(x['fm_s'], x['fm_t'].values())})
def certain(x, of): return x['teacher_pred']+200*F.one_hot(of(x), x['pred'].shape[1])

def corrected(x, threshold=.2):
    "The teacher's logits after MFT's correction, sample by sample"
    q = x['teacher_pred'].softmax(1)
    for p,y in zip(q, x['target']):
        top = p.max().item()
        m = min(1, threshold/(1-p[y].item())) if p.argmax()==y else (top-p[y].item()+threshold)/(1+top-p[y].item())
        p *= 1-m; p[y] += m
    return q.log()

def others_entropy(x, gamma=1.5):
    "What is left of NormalizedKD for a student that is certain of the label"
    p = np.stack([np.delete(r, y) for r,y in zip(x['teacher_pred'].softmax(1).numpy(), x['target'])])
    return gamma*scipy.special.entr(p/p.sum(1, keepdims=True)).sum(1).mean()

def virtual_teacher(x):
    "Logits of TfKD's teacher"
    return torch.where(F.one_hot(x['target'], x['pred'].shape[1]).bool(), .99, .01/4)/20

def transport(x, lam=.05, n=10):
    "Sinkhorn's cost of the teacher's probabilities with themselves at T=2, without the label, sample by sample"
    total = 0.
    for t,y in zip(x['teacher_pred'].numpy(), x['target'].tolist()):
        p,K = scipy.special.softmax(np.delete(t, y)/2),np.delete(np.delete(COST.numpy(), y, 0), y, 1)+1e-8
        G,u = np.exp(-K/lam),np.full(len(p), 1/len(p))
        for _ in range(n):
            v = p/(G.T@u+1e-8)
            u = p/(G@v+1e-8)
        total += sum(u[i]*G[i,j]*v[j]*K[i,j] for i in range(len(p)) for j in range(len(p)))
    return 30*total/len(x['target'])
COST = (torch.arange(5.)[:,None]-torch.arange(5.)).abs().double()/5

def ladder(x):
    return at(**{k: lambda x: {n: torch.tensor([0.,3.,10.,30.]).to(f)[:,None] for n,f in x[k].items()}
                 for k in ('fm_s','fm_t')})(x)

# what a loss is where student and teacher are equal: zero, its minimum; not zero, with a gradient of zero that leads
# there; without a minimum
ZERO,STATIONARY,UNBOUNDED = 'zero','stationary','unbounded'

RIGHT = at(pred=lambda x: x['teacher_pred'], target=lambda x: x['teacher_pred'].argmax(1))
MINIMA = {   # of losses that are not zero at equality: what they are, or inputs at the minimum and its value
    'WSLD': STATIONARY, 'SRD': UNBOUNDED,
    'NormalizedKD': (at(pred=lambda x: certain(x, lambda x: x['target'])), others_entropy),
    'TTM': (at(pred=lambda x: x['teacher_pred']/4), 0),
    'MFT': (at(pred=corrected), 0),
    'HardTarget': (at(pred=lambda x: certain(x, lambda x: x['teacher_pred'].argmax(1))), 0),
    'ActivationBoundaries': (maps_at(lambda t: 3*torch.where(t>0, 1., -1.).to(t)), 0),
    'DarkRank': (ladder, 0),
    'RefinedLogits': (RIGHT, 0), 'SwappedLogits': (RIGHT, 0),
    'TfKD': (at(pred=virtual_teacher), 0),
    'WassersteinKD': (at(pred=lambda x: certain(x, lambda x: x['target'])), 0),
    'LogisticRanking': (at(pred=lambda x: 1e4*x['teacher_pred']), 0),
}

def kind(loss):
    """What a loss reads: 'both' predictions and features, 'features', 'predictions', these with 'labels', or
    'numbers' of a regression"""
    names = loss_args(loss).required
    if 'fm_s' in names: return 'both' if 'teacher_pred' in names else 'features'
    if 'target' not in names: return 'predictions'
    return 'labels' if get_loss_info(loss).softmax else 'numbers'

def row(loss, minimum=None):
    "Loss, what it reads, and what is true at equality: a name, or the minimum and its value"
    return loss,kind(loss),minimum or MINIMA.get(loss_name(loss), ZERO)

PUBLIC = {n: getattr(m, n) for m in (output, feature, relation) for n in m.__all__}
LOSSES = {n: row(f) for n,f in PUBLIC.items() if hasattr(f, 'info')}
VARIANTS = { # the same tests for other parameters, and for wrappers
    'DecoupledKD, soft': partial(DecoupledKD, T=1.),
    'DIST, soft': partial(DIST, T=4., beta=2.),
    'JSD, forward': partial(JSD, beta=0), 'JSD, reverse': partial(JSD, beta=1, T=2.),
    'SkewKL, reverse': partial(SkewKL, reverse=True),
    **{f'AlphaBeta {a} {b}': partial(AlphaBeta, alpha=a, beta=b) for a,b in ((1,0),(0,1),(0,0),(.2,.7))},
    'TTM, weighted': partial(TTM, weighted=True),
    'standardize(SoftTarget)': standardize(SoftTarget), 'standardize(DecoupledKD)': standardize(DecoupledKD),
    'standardize(SoftTarget), rescaled': partial(standardize(SoftTarget, rescale=True), T=2.),
    'entropy_weighted(SoftTarget)': entropy_weighted(SoftTarget),
    'entropy_weighted(DecoupledKD), teacher': entropy_weighted(DecoupledKD, student=False),
    'scale_decoupled(SoftTarget)': scale_decoupled(SoftTarget),
    'scale_decoupled(DecoupledKD)': scale_decoupled(DecoupledKD, scales=(1,2)),
    'LDRLD, k=3': partial(LDRLD, k=3), 'HingeRanking, k=3': partial(HingeRanking, k=3),
    'GaussianWasserstein, grid': partial(GaussianWasserstein, g=2),
    'pooled(Attention)': pool_to_smaller(Attention), 'pooled(NST)': pool_to_smaller(NST),
    'halving(FitNet)': weighted_sum_over_layers(FitNet),
    'FactorTransfer, attention': partial(FactorTransfer, p1=2, p2=2),
    'KTA, p=2': partial(KTA, p=2, q=1),
    'CATKD, raw': partial(CATKD, normalize=False), 'PKD, teacher resized': partial(PKD, resize_stu=False),
    'normalized(RKD)': unit_length(RKD),
    'PairwiseKD, windows': partial(PairwiseKD, window=2, constant_norm=False),
    'MiniLMv2, weights': partial(MiniLMv2, heads=1, weights=(.5,2.)),
    'CorrelationCongruence, bilinear': partial(CorrelationCongruence, kernel='bilinear', normalize=False,
                                               squared=False),
}
VARIANTS = {n: row(f) for n,f in VARIANTS.items()}
VARIANTS['WassersteinKD, cost'] = row(partial(WassersteinKD, cost=COST), (MINIMA['WassersteinKD'][0], transport))
NARROW = {'MiniLMv2': partial(MiniLMv2, heads=2)}  # parameters for the few channels of the inputs below
ALL = {**LOSSES, **VARIANTS, **{n: row(f) for n,f in NARROW.items()}}
every = pytest.mark.parametrize('name', ALL)
each  = pytest.mark.parametrize('name', LOSSES)
def some(test): return pytest.mark.parametrize('name', [k for k,(f,*_) in ALL.items() if test(loss_args(f).accepted)])
with_maps,with_preds,with_labels = (some(lambda n, o=o: o<=n) for o in ({'fm_t'},{'teacher_pred'},{'target','pred'}))

# --- inputs

GRIDS = {'shape': (((4,6,6),(8,3,3)), ((4,6,6),(8,3,3))), 'size': (((4,6,6),(8,3,3)), ((6,6,6),(12,3,3))),
         'channels': (((4,6,6),(8,3,3)), ((4,5,5),(8,4,4))), 'batch': (((4,6,6),(8,3,3)), ((6,5,5),(12,2,2)))}

def must_match(name):
    "What must be equal in student and teacher"
    return ('batch' if name.startswith('pooled') else 'size' if name=='FactorTransfer, attention'
            else get_loss_info(ALL[name][0]).must_match)

def inputs(name, B=4, C=5, dtype=torch.float32, seed=0, same=False, grids=None):
    "Random arguments for a loss, as different in shape as it allows"
    f,kind,_ = ALL[name]
    g = torch.Generator().manual_seed(seed)
    def rand(*shape): return torch.randn(shape, generator=g, dtype=torch.float64).to(dtype)
    s,t = grids or GRIDS[must_match(name)]
    fm_t = {f't{i}': rand(B,*o) for i,o in enumerate(t)}
    # a loss on features takes labels of positions, one on class maps of samples
    positions,classes = (s[0][1:],C) if kind=='features' else ((),C)
    if name.startswith('scale_decoupled'): positions,classes = (),s[0][0]
    x = dict(pred=2*rand(B,C), teacher_pred=2*rand(B,C), fm_t=fm_t, fm_s={f's{i}': rand(B,*o) for i,o in enumerate(s)},
             target=rand(B,C) if kind=='numbers' else torch.randint(classes, (B,*positions), generator=g))
    if same: x.update(pred=x['teacher_pred'].clone(), fm_s={k.replace('t','s'): v.clone() for k,v in fm_t.items()})
    return {k: x[k] for k in inspect.signature(f).parameters if k in loss_args(f).accepted and k in x}

def changed(x, f, who=('pred','teacher_pred','fm_s','fm_t')):
    def on(v): return {k: f(t) for k,t in v.items()} if isinstance(v, dict) else f(v)
    return {k: on(v) if k in who else v for k,v in x.items()}

def tensors(x, *names):
    return [t for n in names if n in x for t in (x[n].values() if isinstance(x[n], dict) else [x[n]])]

def run(name, x):
    "Value and gradients of the student's tensors"
    f = ALL[name][0]
    x = changed(x, lambda t: t.detach().clone(memory_format=torch.preserve_format).requires_grad_(), ('pred','fm_s'))
    loss = f(**x)
    assert loss.shape==() and loss.requires_grad
    unused = name=='Similarity'
    grads = torch.autograd.grad(loss, tensors(x, 'fm_s') if unused else tensors(x, 'pred', 'fm_s'))
    return loss.detach(),grads


# --- golden numbers

# golden/README.md: informative, or not to be built
EXCLUDED = {'kd_ce_combined', 'decoupled_kd_normalized', 'hkd', 'cc_repdistiller', 'kdsvd', 'mlkd_authors_full',
            # learn a variance, keep a queue: losses with weights
            'pad_l2', 'queue_kl'}
STATELESS = [k for k,m in load_index(golden)['methods'].items() if not m['parameterised'] and k not in EXCLUDED]

@pytest.mark.filterwarnings('ignore:.*one position')   # some cases have one
@pytest.mark.parametrize('method', STATELESS)
def test_golden(method):
    res = check(golden, {method: IMPLS[method]}, methods=[method], out=(said := io.StringIO()))[method]
    assert res['PASS']>0, said.getvalue()
    assert res['FAIL']==res['ERROR']==0, said.getvalue()

@pytest.mark.parametrize('method', [p.stem for p in sorted((golden/'refs').glob('*.py'))])
def test_golden_numbers_of_our_own_loops(method):
    "The stored inputs in the loop of `refs/` give the stored numbers"
    ref,entry = load_reference(method),load_index(golden, [method])['methods'][method]
    with np.load(golden/entry['file']) as stored:
        for case in entry['cases']:
            x = {k.removeprefix(case['key']+'/'): stored[k] for k in stored.files if k.startswith(case['key']+'/')}
            given = {k: v for k,v in x.items() if not k.startswith(('expected','grad'))}
            value,grads = run_reference(ref, given, case['hp'])
            assert math.isclose(value, x['expected'], rel_tol=1e-12, abs_tol=1e-12)
            for k,g in grads.items(): np.testing.assert_allclose(g, x[k], rtol=1e-5, atol=1e-7)

def covered_by_golden():
    "Losses that a golden method calls"
    called = set()
    def calls(f, seen=()):
        "Names of the losses inside closures, partials and wrappers"
        if isinstance(f, partial): f = [f.func, *f.keywords.values()]
        if isinstance(f, (list, tuple)): return set().union(*[calls(o, seen) for o in f])
        if not callable(f) or id(f) in seen: return set()
        names = {f.__name__} if hasattr(f, 'info') and hasattr(f, '__name__') else set()
        inner = [c.cell_contents for c in getattr(f, '__closure__', None) or ()]
        globs = [PUBLIC[n] for n in getattr(getattr(f, '__code__', None), 'co_names', ()) if n in PUBLIC]
        return names | calls([*inner, *globs] if not names else [], (*seen, id(f)))
    for f in {**OUTPUT, **FEATURE, **RELATION}.values(): called |= calls(f)
    return called

def test_every_loss_has_a_golden_case_or_a_reason():
    missing = set(LOSSES)-covered_by_golden()
    assert missing=={*LOSSES}&{*NO_CASES}
    assert all(len(reason)>10 for reason in NO_CASES.values())

def test_cases_left_to_their_value_give_a_reason():
    cases = [(n, c) for n,m in load_index(golden)['methods'].items() for c in m['cases'] if 'compare_reason' in c]
    said = (golden/'README.md').read_text()
    assert len(cases)==9
    for name,case in cases:
        assert case['compare']=='value'
        assert f"{name}/{case['key']}" in said

# --- the table, names and docs

@each
def test_documented(name):
    f = LOSSES[name][0]
    assert len(f.__doc__)>30
    assert [k for k,v in docments(f).items() if not v and k not in ('kwargs','self')]==[]
    a = get_loss_info(f)
    assert a.url.startswith('https://')
    assert 'github.com' not in a.url
    assert re.search(r'\b(19|20)\d\d$', a.paper)
    assert a.best_for
    assert a.complexity in ('low','medium','high')
    assert a.cost
    assert a.weight>0
    page = next(p for m,p in ((output,'output'),(feature,'feature'),(relation,'relation'))
                if name in m.__all__)
    prose = [''.join(c['source']) for c in json.loads((root/'nbs'/'losses'/f'{page}.ipynb').read_text())['cells']
             if c['cell_type']=='markdown']
    entry, = [c for c in prose if c.startswith(f'## {name}\n')]
    marks = ['$$', '**Paper**', '**Reduction**', '**Parameters**', '**Default weight**', '**If both agree**',
             '**Differs from the paper in**']
    assert [m for m in marks if m not in entry]==[]
    assert marks==sorted(marks, key=entry.index)
    assert re.search(r'\*\*Paper\*\*: .+\]\(https://', entry)
    weight = re.search(r'\*\*Default weight\*\*: ([\d.]+)', entry)[1]
    assert float(weight)==a.weight

T,D = torch.Tensor,dict[str, torch.Tensor]
SIGNATURES = {
    'SoftTarget': [('pred',T), ('teacher_pred',T), ('T',float,5)], 'Logits': [('pred',T), ('teacher_pred',T)],
    'Mutual': [('pred',T), ('teacher_pred',T)],
    'Attention': [('fm_s',D), ('fm_t',D), ('p',int,2)], 'ActivationBoundaries': [('fm_s',D), ('fm_t',D), ('m',float,2)],
    'FitNet': [('fm_s',D), ('fm_t',D)],
    'Similarity': [('fm_s',D), ('fm_t',D), ('pred',T), ('p',int,2)],
    'PKT': [('fm_s',D), ('fm_t',D), ('eps',float,1e-7)],
    'RKD': [('fm_s',D), ('fm_t',D), ('distance',float,25.), ('angle',float,50.)],
}
@pytest.mark.parametrize('name', SIGNATURES)
def test_specification(name):
    sig = inspect.signature(LOSSES[name][0])
    *params,last = sig.parameters.values()
    assert [(p.name, p.annotation, *(() if p.default is p.empty else (p.default,))) for p in params]==SIGNATURES[name]
    assert sig.return_annotation is T and (last.name, last.kind)==('kwargs', last.VAR_KEYWORD)

@every
def test_signature(name):
    "Uniform: data without defaults, parameters with defaults, `**kwargs`; wrappers and partials keep names and facts"
    f = ALL[name][0]
    params = inspect.signature(f).parameters
    assert all((p.default is p.empty)==(k in ('pred','teacher_pred','fm_s','fm_t','target'))
               for k,p in params.items() if k!='kwargs')
    assert 'kwargs' in params
    assert loss_name(f) in LOSSES
    facts,expected = (vars(get_loss_info(o)) for o in (f, LOSSES[loss_name(f)][0]))
    if name.startswith('scale_decoupled'): expected = {**expected, 'must_match': 'channels'}
    assert facts==expected

# --- the menu

@every
def test_equality(name):
    _,_,equality = ALL[name]
    x = inputs(name, dtype=torch.float64, same=True)
    value,grads = run(name, x)
    scale = run(name, inputs(name, dtype=torch.float64))[0]
    if equality==ZERO:
        assert abs(value)<=1e-6*max(1, scale) and all(g.abs().max()<=1e-5*max(1, scale) for g in grads)
        assert scale>1e-6
    elif equality==UNBOUNDED: assert value<-50 and all(g.isfinite().all() for g in grads)
    elif equality==STATIONARY: assert value>0 and all(g.abs().max()<1e-12 for g in grads)
    else:
        where,least = equality
        # random embeddings are so far apart that any ranking is certain
        if name=='DarkRank': value = run(name, changed(x, lambda t: t/20))[0]
        assert value>1e-3
        y = where(inputs(name, dtype=torch.float64))
        least = least(y) if callable(least) else least
        assert abs(run(name, y)[0]-least)<1e-8 and scale>least

@every
@pytest.mark.parametrize('distance', [0.1, 3., 30.])
def test_minimum(name, distance):
    """Gradient descent from near the stated minimum, and from far, does not get below it. Where equality is only
    stationary, the gradient leads back to it"""
    equality = ALL[name][2]
    if equality==UNBOUNDED: pytest.skip("there is no minimum")
    if name=='WassersteinKD, cost': pytest.skip("a smooth flow costs least between other probabilities than equal ones")
    where,least = equality if isinstance(equality, tuple) else (lambda x: x, 0)
    least_at = where(inputs(name, dtype=torch.float64, same=not isinstance(equality, tuple)))
    if callable(least): least = least(least_at)
    torch.manual_seed(0)
    x = changed(least_at, lambda t: (t+distance*torch.randn_like(t)).detach().requires_grad_(), ('pred','fm_s'))
    if equality==STATIONARY:
        assert (run(name, x)[1][0]*(x['pred']-least_at['pred'])).sum()>0
        return
    opt = torch.optim.Adam(tensors(x, 'pred', 'fm_s'), lr=distance/5)
    for _ in range(20):
        value = ALL[name][0](**x)
        assert value>=least-1e-8
        opt.zero_grad(); value.backward(); opt.step()

SHIFTS = -30., -3., -math.log(5), 3., 30.
@with_preds
def test_shift(name):
    "Logits that are shifted by constants give the same number, and it is not below zero"
    if not get_loss_info(ALL[name][0]).softmax: pytest.skip("compares no probabilities")
    x = inputs(name, dtype=torch.float64)
    expected = run(name, x)[0]
    for c,d in itertools.product(SHIFTS, SHIFTS):
        value,grads = run(name, {**x, 'pred': x['pred']+c, 'teacher_pred': x['teacher_pred']+d})
        assert value>=-1e-9
        assert all(g.isfinite().all() for g in grads)
        # these read directions of logits, and the largest one
        if name not in ('StreamlinedKD','DTKD'): close(value, expected, 1e-6)

@with_preds
@pytest.mark.parametrize('constant', [-30., -math.log(5), 0., 3.])  # with -log(5), the probabilities sum to 1
def test_constant_logits(name, constant):
    for who in (('pred',), ('teacher_pred',), ('pred','teacher_pred')):
        for dtype in (torch.float32, torch.float64):
            value,grads = run(name, changed(inputs(name, dtype=dtype), lambda t: torch.full_like(t, constant), who))
            assert value.isfinite()
            assert all(g.isfinite().all() for g in grads)

@every
def test_gradient(name):
    "Reaches every tensor of the student, and none of the teacher"
    x = changed(inputs(name), lambda t: t.requires_grad_())
    ALL[name][0](**x).backward()
    assert all(t.grad is None for t in tensors(x, 'teacher_pred', 'fm_t'))
    assert all(t.grad.isfinite().all() and t.grad.abs().sum()>0
               for t in tensors(x, 'fm_s') + ([] if name=='Similarity' else tensors(x, 'pred')))

def _channel(f):
    f = f.clone(); f[:,0] = 0
    return f
def _row(f):
    f = f.clone(); f[0] = 0
    return f
EXTREME = dict(logits60=lambda t: 60*t.sign(), zeros=torch.zeros_like, constant=torch.ones_like, dead_channel=_channel,
               zero_row=_row, equal_rows=lambda t: t[:1].expand_as(t).clone(),
               large=lambda t: 1e4*t, small=lambda t: 1e-12*t, relu=lambda t: (t-3).relu())
@pytest.mark.slow
@every
@pytest.mark.parametrize('how', EXTREME)
def test_extreme(name, how):
    "Finite, with finite gradients, when student, teacher or both are extreme"
    for who in (('pred','fm_s'), ('teacher_pred','fm_t'), ('pred','fm_s','teacher_pred','fm_t')):
        for same in (False, True) if len(who)==4 else (False,):
            value,grads = run(name, changed(inputs(name, same=same), EXTREME[how], who))
            assert value.isfinite() and all(g.isfinite().all() for g in grads), who

@with_preds
def test_opposite(name):
    "Logits of ±60 that contradict each other still pull"
    x = inputs(name)
    pred = torch.full_like(x['pred'], -60); pred[:,0] = 60
    if LOSSES.get(name, ALL[name])[1]=='labels': x['target'] = torch.ones_like(x['target'])
    value,grads = run(name, {**x, 'pred': pred, 'teacher_pred': pred.flip(1)})
    assert value.isfinite() and all(g.isfinite().all() for g in grads)
    if name in ('SoftTarget','Mutual','DecoupledKD','DecoupledKD, soft','NormalizedKD','TTM','MFT','HardTarget',
                'JSD, forward','MultiLabel'):
        assert grads[0].abs().max()>1e-3

@every
def test_batch_of_one(name):
    value,grads = run(name, inputs(name, B=1))
    assert value.isfinite() and all(g.isfinite().all() for g in grads)

def value_in_an_objective(name, x):
    "The value of a loss for the tensors of a training step under autocast"
    pairs = [*zip(x.get('fm_s', {}), x.get('fm_t', {}))]
    objective = Objective([Term(ALL[name][0], layers=pairs or None)])
    pred = x.get('pred', torch.zeros(4, 10))   # as many classes as any case has
    with torch.autocast('cpu', dtype=torch.bfloat16):
        batch = objective.prepare(pred, x.get('teacher_pred'), x.get('fm_s'), x.get('fm_t'), x.get('target'))
        value, = objective.values(batch).values()
    return value

@pytest.mark.slow
@every
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
@pytest.mark.parametrize('scale', [1, 300])
def test_half(name, dtype, scale):
    "Half tensors in a training step with autocast: computed in float32, also where squares of half precision overflow"
    x = changed(inputs(name), lambda t: (scale*t).to(dtype).requires_grad_())
    value = value_in_an_objective(name, x)
    value.backward()
    assert value.dtype==torch.float32 and value.isfinite()
    if scale>1: return
    grads = [t.grad for t in tensors(x, 'fm_s') + ([] if name=='Similarity' else tensors(x, 'pred'))]
    assert all(g.dtype==dtype and g.isfinite().all() for g in grads)
    close(value, run(name, changed(x, lambda t: t.detach().double()))[0].float(), 2e-3)

@every
def test_permutation(name):
    order = torch.tensor([2,0,3,1])
    x = inputs(name, dtype=torch.float64)
    value,grads = run(name, x)
    value2,grads2 = run(name, changed(x, lambda t: t[order], x))
    close((value2,grads2), (value,[g[order] for g in grads]), 1e-8)

@with_maps
def test_channels_last(name):
    x = inputs(name, dtype=torch.float64)
    close(run(name, changed(x, lambda t: t.contiguous(memory_format=torch.channels_last) if t.ndim==4 else t)),
          run(name, x), 1e-9)

@with_maps
def test_tokens(name):
    "Features `(B, N, D)` count as maps with channels last"
    def flat(shapes): return tuple((c,h*w) for c,h,w in shapes)
    grids = tuple(map(flat, GRIDS[must_match(name)]))
    x = inputs(name, grids=grids, dtype=torch.float64)
    tokens = changed(x, lambda t: t.mT if t.ndim==3 else t, ('fm_s','fm_t'))
    value,grads = run(name, tokens)
    # pooling a row is not pooling a plane
    if name.startswith(('HCL','CATKD','FSP','PKD','IRG','pooled','scale')):
        assert value.isfinite() and all(g.abs().sum()>0 for g in grads)
    else:
        one_column = ('fm_s','fm_t','target')
        close(value, run(name, changed(x, lambda t: t[...,None], one_column))[0], 1e-8)

@with_preds
def test_dense(name):
    "Positions are averaged: a picture with one prediction counts like that prediction"
    x = inputs(name, dtype=torch.float64)
    def wide(t): return t[...,None,None].expand(*t.shape, 2, 3).clone()
    close(ALL[name][0](**changed(x, wide, ('pred','teacher_pred','target'))), ALL[name][0](**x), 1e-6)

@pytest.mark.slow
@pytest.mark.parametrize('name', [n for n in ALL if n in LOSSES or '(' in n])
def test_compile(name):
    "One graph, with the same number and the same gradients: of losses and wrappers. Generating its code takes long"
    torch._dynamo.reset()
    f,*rest = ALL[name]
    x = inputs(name, dtype=torch.float64)
    expected = run(name, x)
    ALL['compiled'] = (torch.compile(f, fullgraph=True, backend='eager'), *rest)
    try:
        close(run('compiled', x) if name!='Similarity' else ALL['compiled'][0](**x),
              expected if name!='Similarity' else expected[0], 1e-8)
    finally: del ALL['compiled']

@every
def test_gradcheck(name):
    if name in ('WSLD', 'entropy_weighted(SoftTarget)'): pytest.skip("its weights have no gradient: see test_wsld")
    if name=='PairwiseKD': pytest.skip("the length of its vectors has no gradient: see test_constant_norm")
    small = {'shape': (((2,3,3),(4,2,2)),)*2, 'size': (((2,3,3),(4,2,2)), ((4,3,3),(6,2,2))),
             'channels': (((2,3,3),(4,2,2)), ((2,2,2),(4,3,3))), 'batch': (((2,3,3),(4,2,2)), ((3,2,2),(6,2,2)))}
    x = inputs(name, B=3, dtype=torch.float64, seed=1, grids=small[must_match(name)])
    keys = [(n,k) for n in ('pred','fm_s') if n in x and not (n=='pred' and name=='Similarity')
            for k in (x[n] if isinstance(x[n], dict) else [None])]
    def f(*leaves):
        y = {**x, **({'fm_s': dict(x['fm_s'])} if 'fm_s' in x else {})}
        for (n,k),t in zip(keys, leaves):
            if k is None: y[n] = t
            else: y[n][k] = t
        return ALL[name][0](**y)
    assert torch.autograd.gradcheck(f, [(x[n] if k is None else x[n][k]).requires_grad_() for n,k in keys], atol=1e-6,
                                    fast_mode=True)

@pytest.mark.skipif(not shutil.which('g++'), reason="inductor needs a compiler")
@pytest.mark.slow
def test_inductor():
    "Compiled for real: a loss on predictions and one on features, in one graph"
    torch._dynamo.reset()
    x,y = inputs('DecoupledKD'),inputs('NST')
    def both(x, y): return DecoupledKD(**x),NST(**y)
    close(torch.compile(both, fullgraph=True)(x, y), both(x, y))

@pytest.mark.slow
@with_maps
def test_lean(name):
    "No tensor much larger than a feature: nothing of B×B×D, B×C×C×HW or B×C×HW×HW"
    if '(HW)²' in get_loss_info(ALL[name][0]).cost: pytest.skip("compares all positions with each other, and says so")
    grids = {'shape': (((16,8,8),(16,8,8)),)*2}
    x = inputs(name, B=16, grids=grids['shape'])
    with Largest() as seen: run(name, x)
    assert seen.numel<=4*x['fm_s']['s0'].numel()

# --- errors

@with_preds
def test_unequal_predictions(name):
    x = inputs(name)
    with pytest.raises(ValueError, match=r'\(4, 5\).*\(4, 1\)'):
        ALL[name][0](**{**x, 'teacher_pred': x['teacher_pred'][:,:1]})

@with_preds
def test_one_class(name):
    x = changed(inputs(name), lambda t: t[:,:1],
                ('pred','teacher_pred') + (('target',) if ALL[name][1]=='numbers' else ()))
    if get_loss_info(ALL[name][0]).softmax:
        with pytest.raises(ValueError, match=r'at least two classes, got \(4, 1\)'): ALL[name][0](**x)
    else: assert run(name, x)[0].isfinite()

@with_labels
def test_bad_labels(name):
    x = inputs(name)
    for y in (x['target'][:3], None):
        with pytest.raises(ValueError, match=r'labels.*\(4, [45]\)'): ALL[name][0](**{**x, 'target': y})

@with_maps
def test_bad_features(name):
    f,x = ALL[name][0],inputs(name)
    with pytest.raises(ValueError, match='got 2 and 1'): f(**{**x, 'fm_t': dict([*x['fm_t'].items()][:1])})
    with pytest.raises(ValueError, match='got 0 and 0'): f(**{**x, 'fm_s': {}, 'fm_t': {}})
    with pytest.raises(TypeError, match='fm_s must be a dict'): f(**{**x, 'fm_s': [*x['fm_s'].values()]})
    bad = {'batch': lambda t: t[:3], 'channels': lambda t: t[:,:1], 'size': lambda t: t[:,:,:2,:2],
           'shape': lambda t: t[:,:1]}
    for k in {'batch', must_match(name)}:
        fm_t = {n: bad[k](t) for n,t in x['fm_t'].items()}
        a,b = (re.escape(str(tuple(fm[n].shape))) for fm,n in ((x['fm_s'],'s0'), (fm_t,'t0')))
        with pytest.raises(ValueError, match=f'{a}.*{b}'): f(**{**x, 'fm_t': fm_t})

@pytest.mark.parametrize('f', [partial(SoftTarget, T=0), partial(JSD, beta=1.5), partial(SkewKL, alpha=-1),
                               partial(AlphaBeta, alpha=-1), partial(MultiLevel, levels=()),
                               partial(LDRLD, k=1), partial(StreamlinedKD, instance=0, direction=0)], ids=loss_name)
def test_bad_parameters(f):
    with pytest.raises(ValueError, match='Expected|compares nothing'): f(torch.rand(2,3), torch.rand(2,3))

# --- against independent computations

def probabilities(x, T=1.): return [scipy.special.softmax(x[k].numpy()/T, axis=1) for k in ('teacher_pred','pred')]

@pytest.mark.parametrize('a,b', [(1,0), (0,1), (.5,0), (0,2), (0,0)])
def test_alpha_beta(a, b):
    "The published formula at its poles: the limit, by coming near"
    x = inputs('AlphaBeta', dtype=torch.float64)
    def formula(a, b):
        return np.mean([sum(-(p**a*q**b - a/(a+b)*p**(a+b) - b/(a+b)*q**(a+b))/(a*b) for p,q in zip(*pq))
                        for pq in zip(*probabilities(x))])
    e = 1e-4
    expected = (formula(a or e, b or e) + formula(a or -e, b or -e))/2
    assert math.isclose(AlphaBeta(**x, alpha=a, beta=b), expected, rel_tol=1e-3)

def test_wsld():
    "The gradient with the weights held fixed"
    x = inputs('WSLD', dtype=torch.float64)
    p,q = probabilities(x, 2)
    p1,q1 = probabilities(x)
    y = x['target'].numpy()
    w = 1-np.exp(np.log(q1[range(4),y])/-np.log(p1[range(4),y]))
    np.testing.assert_allclose(run('WSLD', x)[1][0], 4*w[:,None]*(q-p)/2/4, rtol=1e-5)

def test_constant_norm():
    "The gradient of PairwiseKD with the lengths of vectors held fixed"
    x = inputs('PairwiseKD', dtype=torch.float64)
    s = x['fm_s']['s0'].requires_grad_()
    def relations(f, lengths):
        f = F.max_pool2d(f, 3)/lengths
        return f.flatten(2).mT@f.flatten(2)
    def lengths(f): return F.max_pool2d(f.detach(), 3).norm(dim=1, keepdim=True)
    t = x['fm_t']['t0']
    expected = (relations(s, lengths(s))-relations(t, lengths(t))).pow(2).mean()
    value = PairwiseKD({'s0': s}, {'t0': t})
    close(torch.autograd.grad(value, s), torch.autograd.grad(expected, s), 1e-6)

def test_class_centers_of_ignored_positions():
    "Positions with the label that the Learner ignores are in no center, whatever the label is"
    x = inputs('IFVD', dtype=torch.float64)
    target = x['target'].clone()
    ignored = torch.rand(target.shape, generator=torch.Generator().manual_seed(0))<.3
    pairs = [('s0','t0')]
    term,values = Term(IFVD, layers=pairs),[]
    for label in (-100, 3, 255):
        target[ignored] = label
        objective = Objective([term], ignore_index=label)
        pred = torch.randn(4,5,6,6)
        other = torch.where(ignored | (x['target']==3), -1, x['target'])  # label 3 is ignored in all of them
        target = torch.where(other<0, label, other)
        batch = objective.prepare(pred, None, {'s0': x['fm_s']['s0']}, {'t0': x['fm_t']['t0']}, target)
        values.append(objective.values(batch)['ifvd'])
    assert values[0]>0
    assert torch.equal(values[0], values[1])
    assert torch.equal(values[0], values[2])
    changed_there = torch.where(ignored[:,None], 9., x['fm_s']['s0'])
    batch = objective.prepare(pred, None, {'s0': changed_there}, {'t0': x['fm_t']['t0']}, target)
    close(objective.values(batch)['ifvd'], values[0], 1e-9)

@pytest.mark.parametrize('target', [torch.ones(4, dtype=torch.long), torch.ones(3,6,6, dtype=torch.long), None,
                                    torch.ones(4,6,6)], ids=['of samples','of three','none','floating'])
def test_labels_of_positions(target):
    x = inputs('IFVD')
    with pytest.raises(ValueError, match=r'integer labels \(B, \*size\) for features \(4, 4, 6, 6\)'):
        IFVD(**{**x, 'target': target})

def test_masked_tokens():
    "Value and gradient do not depend on masked tokens, not even on NaN; a sample without tokens adds 0"
    x = inputs('MiniLMv2', dtype=torch.float64, grids=(((4,6),),((6,6),)))
    mask = torch.tensor([[1,1,0,1,0,0],[1,1,1,1,1,1],[0,0,0,0,0,0],[0,0,0,0,0,1]]).bool()
    def values(fill):
        s,t = ({'a': torch.where(mask[...,None], f.mT, fill)} for fm in (x['fm_s'],x['fm_t']) for f in fm.values())
        s['a'].requires_grad_()
        value = MiniLMv2(s, t, heads=2, mask=mask)
        return value.detach(),torch.autograd.grad(value, s['a'])[0]
    (v,g),(w,h) = values(0.),values(torch.nan)
    assert torch.equal(v, w) and torch.equal(g, h)
    assert not g[~mask].any() and g[mask].any()

def test_standardize():
    "Scale and shift do not matter, and constant logits learn as they are"
    x = inputs('SoftTarget', dtype=torch.float64)
    close(standardize(SoftTarget)(3*x['pred']+7, x['teacher_pred']/9-2), standardize(SoftTarget)(**x), 1e-6)
    pred = torch.zeros(2, 5, requires_grad=True)
    standardize(SoftTarget)(pred, x['teacher_pred'][:2].float()).backward()
    assert 1e-3<pred.grad.abs().max()<10

def test_wrappers_keep_the_order():
    "Arguments by place or by name, wherever the features stand"
    x = inputs('SRD')
    for w in (pool_to_smaller, unit_length): close(w(SRD)(*x.values()), w(SRD)(**x))
    assert [*x]==['pred','teacher_pred','fm_s','fm_t'] and pool_to_smaller(SRD)(**x)==SRD(**x)
    with pytest.raises(TypeError, match='fm_t'): pool_to_smaller(SRD)(x['pred'], x['teacher_pred'], x['fm_s'])

def test_both_forms_of_nst():
    "More positions than channels, and fewer"
    for c,hw in ((4,9),(9,4)):
        s,t = torch.randn(2,c,hw,1).double(),torch.randn(2,c+1,hw,1).double()
        a,b = (F.normalize(f.flatten(2), dim=2) for f in (s,t))
        def k(a, b): return np.mean([(u@v).item()**2 for i in range(2) for u in a[i] for v in b[i]])
        assert math.isclose(NST({'a':s}, {'a':t}), k(b,b)+k(a,a)-2*k(a,b), rel_tol=1e-9)

# --- two views

@pytest.mark.parametrize('loss', [partial(cross, target=None, tau_w=.3), mlkd_as_published], ids=loss_name)
def test_two_views(loss):
    "Gradients reach the student in both views, and no teacher; zero where the networks agree, if the views do"
    x = [torch.randn(6, 5, generator=torch.Generator().manual_seed(i)).double().requires_grad_() for i in range(4)]
    loss(*x).backward()
    assert all(t.grad.abs().sum()>0 for t in x[::2])
    assert all(t.grad is None for t in x[1::2])
    assert abs(loss(*x[:1]*4))<1e-12
    for i in (1, 2, 3):
        with pytest.raises(ValueError, match=r'\(6, 5\).*\(5, 5\)|\(5, 5\).*\(6, 5\)'):
            loss(*[t[:5] if i==k else t for k,t in enumerate(x)])

# --- one value per sample

SAMPLES = [n for n,(f,*_) in ALL.items() if has_sample_values(f)]
per_sample_losses = pytest.mark.parametrize('name', SAMPLES)

def sample(x, i):
    return {k: {n: t[i:i+1] for n,t in v.items()} if isinstance(v, dict) else v[i:i+1] for k,v in x.items()}

@per_sample_losses
def test_per_sample_equals_loop(name):
    f,x = ALL[name][0],inputs(name, dtype=torch.float64)
    values = per_sample(f)(**x)
    close(values, torch.stack([f(**sample(x, i)) for i in range(4)]), 1e-9)
    close(values.mean(), f(**x), 1e-9)

@per_sample_losses
def test_gradients_of_per_sample_values(name):
    f,x = ALL[name][0],changed(inputs(name, dtype=torch.float64), lambda t: t.requires_grad_(), ('pred','fm_s'))
    student = tensors(x, 'pred', 'fm_s')
    close(torch.autograd.grad(per_sample(f)(**x).mean(), student), torch.autograd.grad(f(**x), student), 1e-8)

@pytest.mark.parametrize('name', [n for n in ALL if n not in SAMPLES])
def test_a_loss_without_sample_values(name):
    "A loss that offers none is not a mean over samples, and is refused"
    f,x = ALL[name][0],inputs(name, dtype=torch.float64)
    if 'teacher_pred' in x: x['teacher_pred'][0] = x['teacher_pred'][0].round()  # ties: fewer pairs
    loop = torch.stack([f(**sample(x, i)) for i in range(4)]).mean()
    assert not torch.isclose(loop, f(**x), rtol=1e-6)
    with pytest.raises(ValueError, match='not a mean over samples'): per_sample(f)

@pytest.mark.parametrize('name', [n for n in SAMPLES if 'teacher_pred' in loss_args(ALL[n][0]).accepted])
def test_sample_values_of_dense_predictions(name):
    f,x = ALL[name][0],inputs(name, dtype=torch.float64)
    def wide(t): return t[...,None,None].expand(*t.shape, 2, 3).clone()
    close(per_sample(f)(**changed(x, wide, ('pred','teacher_pred','target'))), per_sample(f)(**x), 1e-6)
