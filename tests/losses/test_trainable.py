"One menu of tests for every loss that owns weights, from the table in `support.losses`."
import io, json, pickle, re, subprocess, sys
from copy import deepcopy
from functools import partial, wraps
from pathlib import Path
import numpy as np, pytest, torch
from fastcore.docments import docments
from fastai.basics import *
from fastai.callback.all import *
from torch import nn
from kd_fastai.all import *
from kd_fastai.losses.facts import get_loss_info, loss_args, loss_name, loss_table
from kd_fastai.demo import digits, small_net
from kd_fastai import losses
from kd_fastai.losses import classifier, connectors, embedding, temperature
from kd_fastai.losses.base import TrainableLoss
from support import fit, learner
from support.golden import golden
from support.losses import ALL, DRAWN, LOSSES, Largest, built, changed, close, inputs, must_match, run, student
from check import check, load_case, load_index, tens
from impls import NO_CASES, TRAINABLE

for o in [*globals()]:
    if o=='test' or o.startswith('test_'): del globals()[o]  # fastcore's own helpers, which pytest would take for tests

root = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.filterwarnings('ignore::UserWarning')

every = pytest.mark.parametrize('name', ALL)
each  = pytest.mark.parametrize('name', LOSSES)
methods = pytest.mark.parametrize('method', [m for r in ALL.values() for m in r.golden])

# --- golden numbers

@methods
def test_golden(method):
    res = check(golden, {method: TRAINABLE[method]}, methods=[method], out=(said := io.StringIO()))[method]
    assert res['PASS']>0 and res['FAIL']==res['ERROR']==0, said.getvalue()

def test_golden_covered():
    "Every golden method with weights belongs to a row"
    covered = {m for r in ALL.values() for m in r.golden}
    with_weights = {k for k,m in load_index(golden)['methods'].items() if m['parameterised']}
    assert with_weights-{'phi_s'}<=covered=={*TRAINABLE}   # which is no loss: see test_teachers

def test_every_loss_has_a_golden_case_or_a_reason():
    covered = {loss_name(r.make()) for r in ALL.values() if r.golden}
    assert {*LOSSES}-covered=={*LOSSES}&{*NO_CASES}

@pytest.mark.parametrize('method', ['mgd','mgd_channel'])
def test_golden_default_weight(method):
    "A case that gives no weight means the authors'"
    m = load_index(golden)['methods'][method]
    with np.load(golden/m['file']) as z: c = load_case(z, m['cases'][0]['key'])
    def t(d): return {k: tens(v, torch.float64) for k,v in d.items()}
    case = dict(pred=None, teacher_pred=None, fm_s=t(c['fm_s']), fm_t=t(c['fm_t']), target=None, aux=t(c['aux']),
                state=t(c['state']))
    assert torch.equal(TRAINABLE[method](**case), TRAINABLE[method](**case, **m['defaults']))

def cases(method):
    "Loss and arguments of each golden case, in float64"
    m = load_index(golden)['methods'][method]
    with np.load(golden/m['file']) as z:
        for e in m['cases']:
            c = load_case(z, e['key'])
            def t(d): return {k: tens(v, torch.float64) for k,v in d.items()}
            case = dict(fm_s=t(c['fm_s']), fm_t=t(c['fm_t']),
                        **{k: tens(c[k], torch.float64) for k in ('pred','teacher_pred','target')})
            torch.manual_seed(0)
            yield c,TRAINABLE[method].build(**case, state=t(c['state']), aux=t(c['aux']), **e['hp']),case

@methods
def test_golden_weights(method):
    """Gradients of the weights, which check.py does not judge; every weight of the authors' is one of ours, and the
    other way round"""
    if method=='pad_l2':
        pytest.skip("its reference has no weights, but is given variances, whose gradients check.py judges")
    if method=='ofa': pytest.skip("its cases have no exits, and so no weights")
    if method=='itrd_mutual': pytest.skip("its cases hold no gradients of weights")
    if method=='queue_kl': pytest.skip("its cases come after the projection: no weights")
    checked = 0
    for c,loss,case in cases(method):
        own = {n:p for n,p in loss.named_parameters() if p.requires_grad}
        names = {TRAINABLE[method].name(k) for k in c['state']}
        assert {*own}<=names
        if not c['grad_state']: continue
        grads = dict(zip(own, torch.autograd.grad(TRAINABLE[method].call(loss, **case), own.values())))
        expected = {TRAINABLE[method].name(k): torch.from_numpy(g).double() for k,g in c['grad_state'].items()}
        assert {*own}<={*expected}
        scale = max(g.abs().max() for g in expected.values())
        for n,g in grads.items(): torch.testing.assert_close(g, expected[n], rtol=1e-5, atol=1e-9*scale+1e-9)
        checked += 1
    assert checked

def test_golden_margins():
    for c,loss,_ in cases('ofd_authors'):
        for k,m in enumerate(loss.margins, 1):
            torch.testing.assert_close(m.detach(), torch.from_numpy(c['state'][f'margin{k}']).double(), rtol=1e-6,
                                       atol=1e-9)

# --- names, facts and docs

def test_table():
    "Every public loss of the module is in the menu, and appears in the tables"
    public = {n for m in (connectors, classifier, embedding, temperature) for n in m.__all__}
    assert public=={*LOSSES}
    table = loss_table([getattr(losses, n) for n in LOSSES])
    assert all(f'`{n}`' in table for n in LOSSES) and 'layers, equal batch; trains regressors' in table

@every
def test_facts(name):
    loss = ALL[name].make()
    f = get_loss_info(loss)
    assert f.trains
    assert loss_name(loss)==type(loss).__name__
    assert isinstance(loss, TrainableLoss)
    assert loss_args(loss).required<=loss_args(loss).accepted and loss_args(loss).has_var_kwargs

@each
def test_documented(name):
    cls,a = getattr(losses, name),get_loss_info(getattr(losses, name))
    assert len(cls.__doc__)>30
    assert cls.forward.__doc__
    arguments = docments(cls.forward) | (docments(cls) if '__init__' in vars(cls) else {})
    assert [k for k,v in arguments.items() if not v and k not in ('kwargs','self','return')]==[]
    assert a.url.startswith('https://')
    assert re.search(r'\b(19|20)\d\d$', a.paper)
    assert a.best_for
    assert a.complexity in ('low','medium','high')
    assert a.cost
    assert a.weight>0
    pages = [root/'nbs'/'losses'/f'{o}.ipynb' for o in ('base','connectors','classifier','embedding','temperature')]
    cells = [c for p in pages for c in json.loads(p.read_text())['cells']]
    prose = [''.join(c['source']) for c in cells if c['cell_type']=='markdown']
    entry, = [c for c in prose if c.startswith(f'## {name}\n')]
    marks = ['$$', '**Paper**', '**Reduction**', '**Parameters**', '**Default weight**', '**If both agree**',
             '**Differs from the paper in**', '**Trains**', '**Adds**']
    assert [m for m in marks if m not in entry]==[]
    assert [entry.index(m) for m in marks]==sorted(entry.index(m) for m in marks)
    assert float(re.search(r'\*\*Default weight\*\*: ([\d.]+)', entry)[1])==a.weight
    assert re.search(r'\*\*Paper\*\*: .+\]\(https://', entry)

# --- building

@every
def test_not_built(name):
    loss,x = ALL[name].make(),inputs(name)
    with pytest.raises(RuntimeError, match=f'{loss_name(loss)} has no weights yet.*call build'):
        loss(**loss_args(loss).select(x))
    with pytest.raises(TypeError, match=rf'{loss_name(loss)}.build needs'): loss.build()
    assert not loss.built and not [*loss.parameters()]

@every
def test_build(name):
    "Once, in the features' type; the teacher is copied, not kept"
    x = inputs(name, dtype=torch.float64)
    before = deepcopy(x['teacher'].state_dict())
    loss = built(name, x)
    assert loss.built and all(p.dtype==torch.float64 for p in loss.parameters())
    assert any(p.requires_grad for p in loss.parameters())
    weights = [p for p in loss.parameters()]
    assert loss.build(**x) is loss and all(p is q for p,q in zip(weights, loss.parameters(), strict=True))
    assert not {*map(id, x['teacher'].parameters())} & {*map(id, loss.parameters())}
    assert all(p.requires_grad for p in x['teacher'].parameters())
    assert x['teacher'].training and all(torch.equal(v, before[k]) for k,v in x['teacher'].state_dict().items())

@every
def test_state_dict(name):
    x = inputs(name)
    loss = built(name, x)
    torch.manual_seed(7)
    other = ALL[name].make().build(**x)
    assert name=='CTKD' or not torch.equal(run(other, x)[0], run(loss, x)[0])  # its temperature starts the same
    other.load_state_dict(loss.state_dict())
    for o in (other, deepcopy(loss), pickle.loads(pickle.dumps(loss))): close(run(o, x), run(loss, x), 1e-6)

# --- the menu

@every
def test_gradient(name):
    "Reaches every tensor of the student and all own weights, and nothing of the teacher's"
    x = changed(inputs(name), lambda t: t.requires_grad_())
    x.update({k: x[k].requires_grad_() for k in ('pred','teacher_pred')})
    loss = built(name, x)
    loss(**loss_args(loss).select(x)).backward()
    assert all(t.grad is None for t in (x['teacher_pred'], *x['fm_t'].values(), *x['teacher'].parameters()))
    for t in student(loss, x): assert t.grad.isfinite().all() and t.grad.abs().sum()>0
    for n,p in loss.named_parameters():
        if not p.requires_grad: assert p.grad is None
        # batch norm takes away the bias before it
        else: assert p.grad.isfinite().all() and (p.grad.abs().sum()>0 or n.endswith('bias')), n

@pytest.mark.slow
@every
def test_learns(name):
    "Training only its own weights makes it smaller"
    if name=='CTKD': pytest.skip("learns to make it larger: see test_temperature")
    if name=='CRD': pytest.skip("the same batch again and again would be its own negatives")
    x = inputs(name)
    loss = built(name, x)
    opt = torch.optim.Adam([p for p in loss.parameters() if p.requires_grad], 1e-2)
    values = []
    for _ in range(30):
        values.append(v := loss(**loss_args(loss).select(x)))
        opt.zero_grad(); v.backward(); opt.step()
    assert values[-1]<values[0]-(1e-3 if name=='AFD' else 1e-2)   # its attention can only choose

EXTREME = dict(zeros=torch.zeros_like, constant=torch.ones_like, equal_rows=lambda t: t[:1].expand_as(t).clone(),
               large=lambda t: 1e4*t, small=lambda t: 1e-12*t, relu=lambda t: (t-3).relu())
@pytest.mark.slow
@every
@pytest.mark.parametrize('how', EXTREME)
def test_extreme(name, how):
    loss,x = built(name),inputs(name)
    for who in (('fm_s',), ('fm_t',), ('fm_s','fm_t')):
        value,grads = run(loss, changed(x, EXTREME[how], who))
        assert value.isfinite() and all(g.isfinite().all() for g in grads), who

LOGITS = dict(logits60=lambda t: 60*t.sign(), zeros=torch.zeros_like, shifted=lambda t: t+30,
              normalized=lambda t: torch.full_like(t, -math.log(5)))  # constant, and the probabilities sum to 1
@pytest.mark.slow
@pytest.mark.parametrize('name', [n for n,r in ALL.items() if 'pred' in loss_args(r.make()).accepted])
@pytest.mark.parametrize('how', LOGITS)
def test_extreme_logits(name, how):
    "Finite, and the same number if a constant is added"
    loss,x = built(name),inputs(name)
    expected = run(loss, x)[0]
    for who in (('pred',), ('teacher_pred',), ('pred','teacher_pred')):
        value,grads = run(loss, {**x, **{k: LOGITS[how](x[k]) for k in who}})
        assert value.isfinite() and all(g.isfinite().all() for g in grads), who
        if how=='shifted': close(value, expected)

@pytest.mark.slow
@every
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_half(name, dtype):
    "Half tensors, large ones too, under the callback's rule: autocast off, on float copies"
    loss = built(name)
    for scale in (1, 300):
        x = changed(inputs(name), lambda t: (scale*t).to(dtype))
        with torch.autocast('cpu', dtype=dtype), torch.autocast('cpu', enabled=False):
            value,grads = run(loss, changed(x, torch.Tensor.float))
        assert value.dtype==torch.float32 and value.isfinite() and all(g.isfinite().all() for g in grads)
        if scale==1: close(value, run(loss, inputs(name))[0], 5e-2)

@every
def test_permutation(name):
    if name in DRAWN or name=='SemCKD':
        pytest.skip("masks and negatives are drawn in order, SemCKD's attention reads rows of the batch in order")
    order = torch.tensor([2,0,3,1])
    x = inputs(name, dtype=torch.float64)
    y = {k: v if k in ('student','teacher') else {n: t[order] for n,t in v.items()} if isinstance(v, dict) else v[order]
         for k,v in x.items()}
    loss = built(name, x)
    close(run(loss, y)[0], run(loss, x)[0], 1e-8)

@every
def test_channels_last(name):
    x = inputs(name, dtype=torch.float64)
    loss = built(name, x)
    close(run(loss, changed(x, lambda t: t.contiguous(memory_format=torch.channels_last) if t.ndim==4 else t)),
          run(loss, x), 1e-9)

@every
def test_tokens(name):
    "Tokens `(B, N, D)` count as maps of one column, embeddings as maps of one position"
    if 'fm_s' not in loss_args(ALL[name].make()).accepted: pytest.skip("looks at no features")
    for shape in (lambda c: (6,c)), (lambda c: (c,)):
        if name=='AFD' and len(shape(1))==1: continue     # refuses one position
        if 'ViTKD' in name and len(shape(1))==2: continue # arranges tokens as a square: see test_tokens_on_a_square
        s,t = ([shape(o[0]) for o in fm] for fm in (ALL[name].student, ALL[name].teacher))
        x = inputs(name, dtype=torch.float64, shapes=(s, t))
        loss = built(name, x)
        y = changed(x, lambda t: t.mT[...,None] if t.ndim==3 else t[...,None,None])
        close(run(loss, x)[0], run(loss, y)[0], 1e-9)

@pytest.mark.slow
@every
def test_compile(name):
    "One graph (except for losses that read values or draw numbers), with the same number and the same gradients"
    torch._dynamo.reset()
    x = inputs(name, dtype=torch.float64)
    loss = built(name, x)
    compiled = torch.compile(loss, fullgraph=name not in DRAWN and name!='CTKD', backend='aot_eager')
    assert loss_name(compiled)==loss_name(loss) and loss_args(compiled)==loss_args(loss)
    close(run(compiled, x), run(loss, x), 1e-8)

PARAMETERS = {   # as the page says, for the last pair, of C_s and C_t channels
    'FitNetRegressor': lambda s,t: s*t+3*t, 'VID': lambda s,t: t*(s+t+t)+t, 'VID, narrow': lambda s,t: 3*(s+3+t)+t,
    'PADL2': lambda s,t: s*t+2*t,
    'ReviewKD': lambda s,t: s*(s+9*t)+2*(s+t), 'OFD': lambda s,t: s*t+2*t, 'SRRL': lambda s,t: s*t+2*t,
    'SimKD': lambda s,t: t//2*(s+9*(t//2)+t)+4*(t//2)+2*t,
    'MGD': lambda s,t: s*t+18*t*t+3*t, 'SemCKD': lambda s,t: 2*s*t+38*t*t+8*t+2*30, 'ITRD': lambda s,t: s*t+t,
    'ICKDEmbed': lambda s,t: s*t+2*t, 'AFD': lambda s,t: t*t+3*t//2,
    'CRD': lambda s,t: 8*(s+t+2), 'CRDBank': lambda s,t: 8*(s+t+2), 'CTKD': lambda s,t: 1,
    'PEFD': lambda s,t: 3*(s*t+t), 'ViTKD': lambda s,t: s*t+t+18*t*t+3*t, 'OFA, narrow exits': lambda s,t: 3*(s+5+2)+5,
    'DCD': lambda s,t: 8*(s+t+2)+1, 'RRD': lambda s,t: 8*(s+1), 'QueueKL': lambda s,t: s*t+t,
}
@pytest.mark.parametrize('name', PARAMETERS)
def test_parameters(name):
    s,t = 6,6 if must_match(name)=='shape' else 8
    loss = built(name, inputs(name, shapes=(((s,3,3),), ((t,3,3),))))
    assert sum(p.numel() for p in loss.parameters() if p.requires_grad)==PARAMETERS[name](s, t)

# --- errors

@every
def test_bad_features(name):
    if name=='CTKD': pytest.skip("looks at no features")
    if name.startswith('OFA'): pytest.skip("looks at the student's features alone: see test_bad_exits")
    loss,x = built(name),inputs(name)
    def call(**kw): return loss(**loss_args(loss).select({**x, **kw}))
    with pytest.raises(ValueError, match='got 0 and 0'): call(fm_s={}, fm_t={})
    with pytest.raises(TypeError, match='fm_s must be a dict'): call(fm_s=[*x['fm_s'].values()])
    n = len(x['fm_s'])
    if name!='SemCKD':   # which compares all with all
        with pytest.raises(ValueError, match=f'got {n} and {n+1}'): call(fm_t={**x['fm_t'], 'more': x['fm_t']['t0']})
    with pytest.raises(ValueError, match=re.escape(str(tuple(x['fm_s']['s0'].shape)))):
        call(fm_t={n: t[:3] for n,t in x['fm_t'].items()})
    wide = {n: torch.cat([t,t], 1) for n,t in x['fm_s'].items()}
    with pytest.raises(ValueError,
                       match=r"built for \(student, teacher\) channels \[\(\d+, \d+\)|Expected equal shapes"):
        call(fm_s=wide)
    deep = {k: {n: torch.rand(4,4,2,2,2) for n in x[k]} for k in ('fm_s','fm_t')}
    with pytest.raises(ValueError, match=r'\(B, C, H, W\), \(B, N, D\) or \(B, C\), got \[\(4, 4, 2, 2, 2\)'):
        ALL[name].make().build(**{**x, **deep})
    if must_match(name) in ('size','shape'):
        with pytest.raises(ValueError,
                           match=rf'equal.*{re.escape(repr([*x["fm_s"]][0]))}.*\(4, \d+, 2, 2\) of the teacher'):
            call(fm_t={n: t[...,:2,:2] for n,t in x['fm_t'].items()})

def test_bad_sizes_of_a_regressor():
    for s,t in (((4,2,2),(6,5,5)), ((4,2,4),(6,4,2)), ((4,3,3),(6,6,4))):
        with pytest.raises(ValueError, match=re.escape(f'got {(4,*s)} of the student and {(4,*t)} of the teacher')):
            ALL['FitNetRegressor'].make().build(**inputs('FitNetRegressor', shapes=((s,),(t,))))
    for s,t in (((4,5,6),(6,3,3)), ((4,7,3),(6,7,6)), ((4,1,1),(6,2,2)), ((4,2,2),(6,1,1))):  # each side by itself
        x = inputs('FitNetRegressor', shapes=((s,),(t,)))
        assert built('FitNetRegressor', x)(x['fm_s'], x['fm_t']).isfinite()
    with pytest.raises(ValueError, match=r"'t0' \(4, 6, 4, 4\) of the teacher"):
        built('FitNetRegressor', x)(x['fm_s'], {'t0': torch.rand(4,6,4,4)})

@pytest.mark.parametrize('make,match', [(lambda: VID(init_pred_var=0.), 'init_pred_var > eps > 0'),
                                        (lambda: OFD(margin='bn'), "margin is 'norm' or 'batch', got 'bn'"),
    (lambda: MGD('pixel'), "position or channel, got 'pixel'"), (lambda: MGD(ratio=1.), 'ratio from 0 to below 1'),
    (lambda: ITRD(corr=0, mutual=0), 'compares nothing'),
    (lambda: CTKD(T=.5), '0 < low < T < high'), (lambda: CTKD(low=0.), '0 < low < T < high'),
    (lambda: CTKD(high=math.inf), '0 < low < T < high'),
    (lambda: SemCKD(T=0.), 'got factor=2 and T=0.0'), (lambda: SemCKD(factor=0), 'got factor=0'),
    (lambda: CRD(T=0.), 'above 0, got T=0.0'),
    (lambda: CRDBank(1), 'got n_data=1,'), (lambda: CRDBank(10, K=0), 'K=0 and'),
    (lambda: PEFD(0), 'at least 1 projector'), (lambda: ViTKD(ratio=0.), 'ratio above 0'),
    (lambda: OFA(T=0.), 'got eps=1.0 and T=0.0'),
    (lambda: OFA(eps=0.), 'got eps=0.0'), (lambda: DCD(max_tau=0.), 'max_tau above 0'),
    (lambda: RRD(T_t=0.), 'T_t=0.0'),
    (lambda: RRD(n_queue=0), 'n_queue=0'), (lambda: QueueKL(T=0.), 'got T=0.0'),
    (lambda: CRDBank(10, T=math.nan), 'and T=nan')])
def test_bad_parameters(make, match):
    with pytest.raises(ValueError, match=match): make()

# --- training runs

def distilled(name, teachers, **kwargs):
    "A Learner whose student learns from a wider teacher by this loss"
    r = ALL[name]
    return learner(KnowledgeDistillationCallback(teachers[r.width], r.make(), r.layers, weight=1.), **kwargs)

def own(learn): return learn.knowledge_distillation.terms[0].loss
def state(m): return {k: v.detach().clone() for k,v in m.state_dict().items()}
def same(a, b): return a.keys()==b.keys() and all(torch.equal(v, b[k]) for k,v in a.items())

@pytest.mark.slow
@every
def test_training(name, teachers):
    "Its own weights move and its column falls; the teacher and the frozen parts stay"
    teacher = teachers[ALL[name].width]
    learn,before = distilled(name, teachers),state(teacher)
    fit(learn)
    first = state(own(learn))
    fit(learn, 3)
    last = state(own(learn))
    for n,p in own(learn).named_parameters(): assert torch.equal(first[n], last[n])!=p.requires_grad, n
    assert same(before, state(teacher))
    assert not any(m._forward_hooks for m in (*teacher.modules(), *learn.model.modules()))
    column = [v[learn.recorder.metric_names.index(learn.knowledge_distillation.terms[0].name)-1]
              for v in learn.recorder.values]
    assert len(column)==3 and column[-1]<column[0]

@pytest.mark.slow
@every
def test_two_fits(name, teachers, tmp_path):
    """With save and load between them, and a new callback and Learner, they equal the same two fits without, to the
    last bit"""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        a = fit(fit(distilled(name, teachers, path=tmp_path)), seed=2)
        b = fit(distilled(name, teachers, path=tmp_path)); b.save('m')
        c = fit(distilled(name, teachers, dls=b.dls, path=tmp_path).load('m'), seed=2)
    finally: torch.set_num_threads(threads)
    assert same(state(a.model), state(c.model)) and same(state(own(a)), state(own(c)))
    assert not same(state(own(b)), state(own(c)))
    # the student's file needs nothing of ours
    assert same(state(learner(path=tmp_path).load('m').model), state(b.model))

@pytest.mark.slow
@every
def test_lr_find(name, teachers):
    learn = fit(distilled(name, teachers))
    before,mine = state(learn.model),state(own(learn))
    learn.lr_find(num_it=6, show_plot=False)
    assert same(before, state(learn.model)) and same(mine, state(own(learn)))

@pytest.mark.slow
@each
def test_lr_find_before_any_fit(name, teachers):
    "The weights, and the statistics of batch norm, are those that were built"
    learn,kept = distilled(name, teachers),{}
    make = own(learn).make
    @wraps(make)
    def remembered(**given): make(**given); kept.update(state(own(learn).float()))  # margins are computed in float64
    own(learn).make = remembered
    learn.lr_find(num_it=6, show_plot=False)
    assert kept and same(kept, state(own(learn)))

@pytest.mark.slow
def test_adapted(teachers):
    "A loss that needs equal shapes trains with an adapter, which is trained too"
    learn = learner(KnowledgeDistillationCallback(teachers[6], PADL2(), ['0','1'], weight=1., adapt='auto'))
    fit(learn)
    first = state(own(learn))
    fit(learn)
    last = state(own(learn))
    assert any(k.startswith('adapters') for k in first) and any('branches' in k for k in first)
    assert not any(torch.equal(v, last[k]) for k,v in first.items())

@pytest.mark.slow
@each
def test_export(name, teachers, tmp_path):
    learn = fit(distilled(name, teachers, path=tmp_path))
    learn.export('m.pkl')
    data = (tmp_path/'m.pkl').read_bytes()
    assert b'kd_fastai.demo' in data
    assert not any(o in data for o in (b'kd_fastai.losses', b'kd_fastai.callback', b'kd_fastai.scope'))
    assert same(state(load_learner(tmp_path/'m.pkl').model), state(learn.model))

# --- segmentation

def bright_positions(n=60):
    "Digits whose positions are labeled as bright or dark; some labels are left out"
    x = digits(100).train.dataset.tensors[0][:n]
    y = (x[:,0]>0).long()
    y[:,0] = -100
    data = [*zip(x, y)]
    return DataLoaders.from_dsets(data, data[:20], bs=20, num_workers=0)

def segmenter(width):
    stages = nn.Conv2d(1, width, 3, 1, 1),nn.ReLU(),nn.Conv2d(width, 2*width, 3, 2, 1),nn.ReLU()
    return nn.Sequential(*stages, nn.Conv2d(2*width, 2, 1), nn.Upsample(scale_factor=2))

@pytest.mark.parametrize('loss', [PairwiseKD, CIRKD, IFVD, TokenRelationKL, partial(PairwiseKD, window=2)],
                         ids=['PairwiseKD','CIRKD','IFVD','TokenRelationKL','windows'])
def test_segmentation_losses_train(loss):
    "Their column falls in a training run with dense labels, on maps that are smaller than the labels"
    set_seed(9)
    teacher = segmenter(8)
    kd = KnowledgeDistillationCallback(teacher, loss, '3', weight=get_loss_info(loss).weight, task_weight=0.1)
    learn = Learner(bright_positions(), segmenter(4), loss_func=CrossEntropyLossFlat(axis=1), cbs=kd)
    with learn.no_bar(), learn.no_logging(): fit(learn, 6)
    column = learn.kd_history()[kd.terms[0].name]
    assert 0<column.iloc[-1]<0.8*column.iloc[0]

# --- losses that find the feature that the classifier reads

FINDS = [n for n,r in LOSSES.items() if get_loss_info(r.make()).default_layer]

@pytest.mark.parametrize('name', FINDS)
def test_finds_the_input_of_the_classifier(name, teachers):
    "Without layers, the training equals one on the input of the last linear layer, bit for bit"
    def train(**layers):
        kd = KnowledgeDistillationCallback(teachers[6], LOSSES[name].make(), weight=1., **layers)
        return weights_of(fit(learner(kd, dls=digits(40))).model)
    found = train()
    assert torch.equal(found, train(layers='>5'))
    assert not torch.equal(found, train(layers=[('1','2')]))  # explicit layers win

def weights_of(model): return nn.utils.parameters_to_vector(model.parameters())

def test_which_losses_find_their_layers():
    assert {*FINDS}=={'SRRL','SimKD','CRD','CRDBank','ITRD','DCD','RRD','PEFD'}
    assert get_loss_info(CATKD).default_layer=='>maps'

def test_class_activation_maps(teachers):
    "Their mean over positions are the logits; they train the student's classifier too"
    net = teachers[6].eval()
    x = digits(20).one_batch()[0]
    with Capture(net, ['>maps']) as c:
        logits = net(x)
        maps = c.pop()['>maps']
    assert maps.shape[1]==10 and maps.ndim==4
    torch.testing.assert_close(maps.mean((2,3)), logits)
    student = learner(KnowledgeDistillationCallback(teachers[6], CATKD, weight=10., task_weight=0))
    before = state(student.model)
    fit(student)
    after = state(student.model)
    assert not torch.equal(before['5.weight'], after['5.weight'])
    assert not torch.equal(before['0.0.weight'], after['0.0.weight'])

def headless(): return nn.Sequential(*small_net(4)[:2], nn.Flatten(), nn.Linear(128,16), nn.ReLU())
def of_tokens(): return nn.Sequential(nn.Flatten(2), nn.Linear(64,8), nn.Flatten(), nn.ReLU())

@pytest.mark.parametrize('loss,make,match', [
    (SRRL, lambda: small_net(4)[:2], 'student: Sequential has no linear layer for a classifier'),
    (CRD, lambda: small_net(4)[:5], 'student: Sequential has no linear layer for a classifier'),
    (SimKD, headless, "last linear layer of the student, '3', does not compute its predictions"),
    (CRD, of_tokens, r"student: the last linear layer '1' receives \(\d+, 1, 64\), so it is not a classifier"),
    (lambda: CATKD, lambda: nn.Sequential(nn.Flatten(), nn.Linear(64,10)), "got no pooling layer before '1'"),
    (lambda: CATKD, lambda: nn.Sequential(*small_net(4)[:5], nn.Linear(16,8), nn.ReLU(), nn.Linear(8,10)),
     r"got \['5'\] before '7'")], ids=['SRRL','CRD','headless','tokens','no pooling','layers between'])
def test_no_classifier_to_find(loss, make, match, teachers):
    learn = learner(KnowledgeDistillationCallback(teachers[6], loss(), weight=1.), model=make())
    with pytest.raises(ValueError, match=match): fit(learn)

@pytest.mark.parametrize('layer', ['>', '>5'])
def test_simkd_student_from_the_input_of_the_classifier(layer, teachers):
    "The projector comes before the teacher's classifier"
    kd = KnowledgeDistillationCallback(teachers[6], simkd := SimKD(), [(layer, '>')], weight=1., task_weight=0)
    learn = fit(learner(kd), 4)
    final = simkd.student(learn.model).eval()
    x = learn.dls.valid.one_batch()[0]
    with torch.no_grad():
        feature = learn.model.eval()[:5](x)
        expected = teachers[6][5](simkd.eval().transfer(feature[...,None,None]).flatten(1))
        torch.testing.assert_close(final(x), expected)

# --- networks that average by a function

class PoolsByFunction(nn.Module):
    "A `small_net`, with the mean over positions in `forward`"
    def __init__(self, net):
        super().__init__()
        self.body,self.head = nn.Sequential(*net[:-3]),net[-1]
    def forward(self, x): return self.head(self.body(x).mean((2,3)))

def both_nets(width=4, seed=0):
    "A network with a pooling layer, and an equal one without"
    set_seed(seed)
    net = small_net(width)
    return net,PoolsByFunction(deepcopy(net))

def trained_with(loss, student, teacher, layers=None):
    kd = KnowledgeDistillationCallback(teacher, loss, layers, weight=1.)
    return fit(learner(kd, digits(40), student))

@pytest.mark.parametrize('name', FINDS)
def test_finds_the_input_of_the_classifier_after_a_pooling_function(name, teachers):
    "The training equals that of the same network with a pooling layer"
    a,b = (trained_with(LOSSES[name].make(), o, teachers[6]) for o in both_nets())
    assert not torch.equal(weights_of(a.model), weights_of(both_nets()[0]))
    torch.testing.assert_close(weights_of(b.model), weights_of(a.model))
    b = trained_with(LOSSES[name].make(), both_nets()[0], PoolsByFunction(teachers[6]))
    torch.testing.assert_close(weights_of(b.model), weights_of(a.model))

def test_simkd_student_of_a_network_that_pools_by_a_function(teachers):
    simkd = SimKD()
    learn = trained_with(simkd, both_nets()[1], PoolsByFunction(teachers[6]))
    final,x = simkd.student(learn.model).eval(),learn.dls.valid.one_batch()[0]
    with torch.no_grad():
        feature = learn.model.eval().body(x).mean((2,3))
        expected = teachers[6][-1](simkd.eval().transfer(feature[...,None,None]).flatten(1))
        torch.testing.assert_close(final(x), expected)

def test_named_class_activation_maps(teachers):
    (net,same),teacher = both_nets(),PoolsByFunction(teachers[6])
    with pytest.raises(ValueError, match="Name the layer whose map is averaged for 'head', such as '>maps:body'"):
        trained_with(CATKD, same, teachers[6])
    a = trained_with(CATKD, net, teachers[6])
    b = trained_with(CATKD, same, teacher, '>maps:body')
    torch.testing.assert_close(weights_of(b.model), weights_of(a.model))
    found = trained_with(CATKD, both_nets()[1], teachers[6], [('>maps:body','>maps')])
    torch.testing.assert_close(weights_of(found.model), weights_of(a.model))

def test_wrong_class_activation_maps(teachers):
    student = both_nets()[1]
    match = r"expected a map \(B, 16, \*size\), which the classifier reads, got \(20, 4, 8, 8\)"
    with pytest.raises(ValueError, match=match):
        trained_with(CATKD, student, teachers[6], [('>maps:body.0','>maps')])
    with pytest.raises(ValueError, match="student: No layer 'bodi' in PoolsByFunction: did you mean 'body'"):
        trained_with(CATKD, student, teachers[6], [('>maps:bodi','>maps')])

# --- variances, and margins of the overhaul

def test_first_variance():
    loss = VID(init_pred_var=2., eps=.5).build(**inputs('VID'))
    for v in loss.log_scales: close(nn.functional.softplus(v)+.5, torch.full_like(v, 2.), 1e-6)

def margins(name, teacher, channels):
    return OFD().build(fm_s={'s': torch.rand(4,3,2,2)}, fm_t={name: torch.rand(4,channels,2,2)},
                       teacher=teacher).margins[0]

def test_which_batch_norm():
    "The layer itself, the last one inside it, or the last before it"
    net = small_net(4)
    for k,b in enumerate((.1,.5,1.)): nn.init.constant_(net[k][1].bias, b)
    for name in ('1.1', '1', '1.2', '1.1#2', '1@0', '1.1:0'):
        assert torch.equal(margins(name, net, 8),
                           margins('1.1', nn.Sequential(nn.Identity(), nn.Sequential(nn.Identity(), net[1][1])),
                                   8)), name
    assert not torch.equal(margins('2.1', net, 16)[:,:8], margins('1.1', net, 8))
    assert torch.equal(margins('5', nn.DataParallel(net), 16), margins('2.1', net, 16))
    for name,channels,match in (('0', 8, 'has one of 4'), ('0.0', 4, 'has none in it or before it')):
        with pytest.raises(ValueError, match=f"{match}.*OFD.margin='batch'"): margins(name, net, channels)
    plain = nn.BatchNorm2d(4, affine=False)
    assert torch.equal(margins('0', nn.Sequential(plain), 4), margins('0', nn.Sequential(nn.BatchNorm2d(4)), 4))

def test_margins_are_expectations():
    "By sampling; for a channel that is hardly negative by the rule of the paper"
    norm = nn.BatchNorm2d(5)
    norm.weight.data,norm.bias.data = torch.tensor([1.,-2.,.5,0.,1.]),torch.tensor([.5,-1.,0.,-1.,5.])
    x = torch.randn(400_000, generator=torch.Generator().manual_seed(0))[:,None]*norm.weight.detach()+norm.bias.detach()
    m = margins('0', nn.Sequential(norm), 5).flatten()
    for c in range(4): assert abs(m[c]-x[:,c][x[:,c]<0].mean())<1e-2
    assert m[4]==-3

# --- the teacher's classifier

@pytest.mark.parametrize('make', [SRRL, SimKD])
def test_classifier(make):
    "The last linear layer or one that is named; refused if it does not make the predictions"
    def build(teacher, t, pred, **kw):
        return make(**kw).build(fm_s={'s': torch.rand(4,3)}, fm_t={'last': t}, teacher=teacher, teacher_pred=pred)
    t = torch.randn(4,8)
    teacher = nn.ModuleDict(dict(head=nn.Sequential(nn.Dropout(0.9), nn.Linear(8,5)), aux=nn.Linear(8,5),
                                 narrow=nn.Linear(6,5)))
    pred = teacher['head'].eval()(t).detach()
    loss = build(teacher, t, pred, classifier='head').train()
    close(loss.classifier(t), pred)                              # no dropout, though the loss is in train mode
    refused = [(dict(), "'narrow' does not compute the predictions from layer 'last'"),
               (dict(classifier='aux'), "'aux' does not compute"), (dict(classifier='haed'), "did you mean 'head'")]
    for kw,match in refused:
        with pytest.raises(ValueError, match=match): build(teacher, t, pred, **kw)
    with pytest.raises(ValueError, match='no linear layer'): build(nn.Sequential(nn.ReLU()), t, pred)
    with pytest.raises(ValueError, match=r"one layer, the input of the classifier, got \['t0', 't1'\]"):
        make().build(**inputs('VID'))

@pytest.mark.parametrize('name', ['SRRL','SimKD'])
def test_classifier_that_is_captured(name, teachers):
    "Its copy has a state of its own"
    learn = learner(KnowledgeDistillationCallback(teachers[6],
                                                  [Term(ALL[name].make(), layers=ALL[name].layers),
                                                   Term(FitNet, layers='5')]))
    fit(learn)
    assert not any(m._forward_hooks for m in own(learn).modules())

@pytest.mark.parametrize('layer', [('2','2'), ('1','2'), ('3','3'), ('4','4')], ids=str)
@pytest.mark.slow
def test_simkd_student(layer, teachers, tmp_path):
    """Its body, the projector and the teacher's classifier: better than its own head, which was not trained, and of
    torch only"""
    kd = KnowledgeDistillationCallback(teachers[6], simkd := SimKD(), [layer], weight=1., task_weight=0)
    learn = fit(learner(kd, model=small_net(4) if layer!=('1','2')
                        else nn.Sequential(*small_net(4)[:2], nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8,10))),
                        10)
    before = state(learn.model)
    final = learner(model=simkd.student(learn.model), path=tmp_path)
    assert same(before, state(learn.model))
    for mode in (True, False): assert {m.training for m in simkd.student(learn.model.train(mode)).modules()}=={mode}
    x = final.dls.valid.one_batch()[0]
    with torch.no_grad(), Capture(learn.model.eval(), [layer[0]]) as c:
        learn.model(x)
        s, = simkd.eval().as_maps(o:=c.pop(), {k: torch.zeros(len(x), simkd.channels[0][1]) for k in o})[0].values()
        if layer==('1','2'): s = nn.AdaptiveAvgPool2d(2)(s)      # the student's map is larger
        close(final.model.eval()(x), simkd.classifier(simkd.transfer(s).mean((2,3))), 1e-5)
    assert final.validate()[1]>learn.validate()[1]+0.2
    assert {type(m).__module__.split('.')[0] for m in final.model.modules()}=={'torch'}
    final.export('m.pkl')
    assert same(state(load_learner(tmp_path/'m.pkl').model), state(final.model))
    head,kept = final.model[-1].weight.clone(),state(simkd)
    fit(final)                                                     # it trains on; the teacher's classifier stays
    assert same(kept, state(simkd)) and not torch.equal(before['0.0.weight'], state(final.model)['0.0.weight'])
    assert torch.equal(head, final.model[-1].weight) and torch.equal(head, teachers[6][5].weight)

@pytest.mark.slow
def test_simkd_student_is_read_by_torch_alone(teachers, tmp_path):
    "A file of the whole model is read where neither fastai nor kd_fastai is imported"
    kd = KnowledgeDistillationCallback(teachers[6], simkd := SimKD(), [('1','2')], weight=1., task_weight=0)
    student = nn.Sequential(*small_net(4)[:2], nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8,10))
    student = simkd.student(fit(learner(kd, model=student)).model)
    torch.save(student, tmp_path/'m.pt')
    code = ("import sys, torch; m = torch.load(sys.argv[1], weights_only=False); "
            "print(sum(p.numel() for p in m.parameters()), "
            "[k for k in sys.modules if k.split('.')[0] in ('fastai','fastcore','kd_fastai')])")
    r = subprocess.run([sys.executable, '-c', code, str(tmp_path/'m.pt')], text=True, capture_output=True, cwd=tmp_path)
    assert r.stdout.strip()==f"{sum(p.numel() for p in student.parameters())} []", r.stderr

def test_simkd_student_refuses():
    with pytest.raises(RuntimeError, match='no projector yet'): SimKD().student(small_net(4))
    x = inputs('SimKD', shapes=(((6,8),), ((6,12),)))
    with pytest.raises(ValueError, match="cannot be inserted between 's0' and the classifier '5'"):
        built('SimKD', x).student(small_net(4))
    for layer in ('2@0', '2:0', '5'):
        x = inputs('SimKD', shapes=(((8,),), ((12,),)))
        x['fm_s'] = {layer: x['fm_s']['s0']}
        with pytest.raises(ValueError, match=f"cannot be inserted between '{layer}' and the classifier '5'"):
            built('SimKD', x).student(small_net(4))

# --- masks, attention, queue, bank and temperature

@pytest.mark.parametrize('mask,ratio,dims', [('position', .65, (0,2,3)), ('channel', .15, (0,1))])
def test_masks(mask, ratio, dims):
    "As many zeros as required, another mask each time, the same mask for the same state"
    loss,t = MGD(mask).build(**inputs('MGD')),torch.zeros(40,50,9,9)
    before = state(loss)
    a = loss.draw(t)
    assert not torch.equal(a, loss.draw(t))
    loss.load_state_dict(before)
    assert torch.equal(a, loss.draw(t))
    assert {*a.unique().tolist()}=={0,1}
    assert [n>1 for n in a.shape]==[k in dims for k in range(4)] and abs(1-a.mean()-ratio)<.03

def test_masked_positions_are_unseen():
    "What is masked has no gradient, what is left has one"
    x = inputs('MGD')
    loss = built('MGD', x)
    loss.align,keep = nn.ModuleList([nn.Identity()]*2),torch.zeros(1,1,6,6)
    keep[...,:3] = 1
    s = torch.randn(4,6,6,6, requires_grad=True)
    loss.draw = lambda t: keep[...,:t.shape[2],:t.shape[3]]
    (loss.generation[0](s*loss.draw(s))-x['fm_t']['t0']).pow(2).mean().backward()
    assert s.grad[...,3:].abs().sum()==0 and s.grad[...,:3].abs().sum()>0

@pytest.mark.parametrize('ns,nt', [(3,2),(2,1),(1,4)])
def test_semckd_by_hand(ns, nt):
    "Sample by sample and pair by pair; weights of the authors' names, for any number of layers"
    x = inputs('SemCKD', dtype=torch.float64, shapes=([(3+i,4,4) for i in range(ns)], [(5+j,4,4) for j in range(nt)]))
    loss,s,t = SemCKD(T=2.).build(**x),[*x['fm_s'].values()],[*x['fm_t'].values()]
    named = {TRAINABLE['semckd'].name(f'regressor{i}{j}.regressor.0.weight'): (2*(5+j),3+i,1,1) for i in range(ns)
             for j in range(nt)}
    assert {k: tuple(v.shape) for k,v in loss.state_dict().items() if k in named}==named
    def vectors(embeddings, fm): return [unit(e(f.flatten(1)@f.flatten(1).T)) for e,f in zip(embeddings, fm)]
    q,k = vectors(loss.query, s),vectors(loss.key, t)
    d = [[(loss.project[f'{i}_{j}'](s[i])-t[j]).pow(2).mean((1,2,3)) for j in range(nt)] for i in range(ns)]
    total = 0.
    for b in range(4):
        for i in range(ns):
            e = [math.exp(q[i][b]@k[j][b]/2) for j in range(nt)]
            total += sum(e[j]*d[i][j][b].item() for j in range(nt))/sum(e)
    assert math.isclose(loss(x['fm_s'], x['fm_t']), total/(4*ns), rel_tol=1e-9)

def test_semckd_smaller_batches():
    "A last batch counts as if the samples that it lacks were zero"
    x = inputs('SemCKD', dtype=torch.float64)
    loss = built('SemCKD', x)
    part = changed(x, lambda t: t[:3])
    whole = changed(x, lambda t: torch.cat([t[:3], 0*t[3:]]))
    torch.testing.assert_close(loss.attention(part['fm_s'], part['fm_t']),
                               loss.attention(whole['fm_s'], whole['fm_t'])[:3])
    assert loss(part['fm_s'], part['fm_t']).isfinite()
    with pytest.raises(ValueError, match='at most 4, got 8'):
        loss(**changed({k: x[k] for k in ('fm_s','fm_t')}, lambda t: torch.cat([t,t])))

def test_itrd_dead_channels():
    "A teacher's channel that does not vary counts as uncorrelated"
    x = inputs('ITRD, corr', dtype=torch.float64)
    loss = built('ITRD, corr', x)
    dead = changed(x, lambda t: t*(torch.arange(t.shape[1])!=2).to(t)[:,None,None], ('fm_t',))
    value,grads = run(loss, dead)
    assert value.isfinite() and all(g.isfinite().all() for g in grads)
    s,t = (x['fm_s']['s0'].mean((2,3)),dead['fm_t']['t0'].mean((2,3)))
    # the unbiased deviation together with a mean
    c = [0. if k==2 else np.corrcoef(loss.embed[0](s).detach()[:,k], t[:,k])[0,1]*3/4 for k in range(12)]
    assert math.isclose(value, 2*math.log2(sum(abs(o-1)**2.02 for o in c)), rel_tol=1e-9)

def unit(t): return t/t.pow(2).sum(1, keepdim=True).sqrt()

def test_crd_is_a_softmax_over_batch_and_queue():
    x = inputs('CRD', dtype=torch.float64)
    loss = built('CRD', x)
    pair,(s,),(t,) = loss.pairs[0],x['fm_s'].values(),x['fm_t'].values()
    vs,vt = unit(pair.heads.student(s)).detach(),unit(pair.heads.teacher(t)).detach()
    def contrast(a, keys):
        return np.mean([-math.log(math.exp(a[b]@keys[b]/.07)/sum(math.exp(a[b]@k/.07) for k in keys))
                        for b in range(4)])
    assert math.isclose(loss(x['fm_s'], x['fm_t']), contrast(vs, vt)+contrast(vt, vs), rel_tol=1e-9)
    torch.testing.assert_close(pair.queue_t, torch.cat([vt, torch.zeros(36,8).double()]))
    value = loss(**changed({k: x[k] for k in ('fm_s','fm_t')}, lambda t: t.flip(0)))
    assert math.isclose(value,
                        contrast(vs.flip(0), torch.cat([vt.flip(0), vt]))+contrast(
                            vt.flip(0), torch.cat([vs.flip(0), vs])), rel_tol=1e-9)
    torch.testing.assert_close(pair.queue_s[:8], torch.cat([vs.flip(0), vs]))
    before = state(loss)
    loss.eval()(x['fm_s'], x['fm_t'])
    assert same(before, state(loss)) and not pair.queue_s.requires_grad
    wide = inputs('CRD', B=50)                         # a batch larger than the queue
    built('CRD', wide)(wide['fm_s'], wide['fm_t'])

def test_golden_bank():
    "What the bank and Z are after a batch, which check.py does not judge"
    checked = 0
    for c,loss,case in cases('crd'):
        before = state(loss)
        TRAINABLE['crd'].call(loss, **case)
        after = state(loss)
        for k,n in (('memory_v1','bank_s'), ('memory_v2','bank_t')):
            expected = torch.from_numpy(c['state_after'][f'contrast.{k}'])
            torch.testing.assert_close(after[f'pairs.0.{n}'], expected, rtol=1e-5, atol=1e-7)
            assert not torch.equal(before[f'pairs.0.{n}'], after[f'pairs.0.{n}'])
        z = torch.stack([after['pairs.0.log_z_s'], after['pairs.0.log_z_t']]).exp()
        torch.testing.assert_close(z, torch.from_numpy(c['state_after']['contrast.params'][2:4]), rtol=1e-5, atol=0)
        TRAINABLE['crd'].call(loss, **case)             # Z stays
        assert all(torch.equal(after[f'pairs.0.log_z_{k}'], state(loss)[f'pairs.0.log_z_{k}']) for k in 'st')
        checked += 1
    assert checked

def test_bank():
    "Negatives are others, all of them in the long run; no vector moves in eval mode; positions outside are refused"
    x = inputs('CRDBank')
    loss = built('CRDBank', x)
    drawn = loss.draw(x['idx'].repeat(30))
    assert torch.equal(drawn[:4,0], x['idx']) and (drawn[:,1:]!=drawn[:,:1]).all()
    assert {*drawn[::4,1:].flatten().tolist()}=={*range(100)}-{x['idx'][0].item()}
    before = state(loss)
    loss.eval()(x['fm_s'], x['fm_t'], x['idx'])
    now = state(loss)
    def vectors(state): return {k: v for k,v in state.items() if k!='draws'}
    assert same(vectors(before), vectors(now))
    assert {*before}>={f'pairs.0.{k}' for k in ('bank_s','bank_t','log_z_s','log_z_t')}
    for idx in (x['idx']+100, x['idx']-100, x['idx'][:3]):
        with pytest.raises(ValueError, match='positions in the training data, each from 0 to below n_data=100'):
            loss(x['fm_s'], x['fm_t'], idx)

@pytest.mark.slow
def test_bank_remembers_the_samples_of_a_training(teachers):
    "Every sample's vector has moved, to where the network puts the sample"
    learn = distilled('CRDBank', teachers)
    before = {}
    make = own(learn).make
    @wraps(make)
    def remembered(**given): make(**given); before.update(state(own(learn)))
    own(learn).make = remembered
    fit(learn, 6)
    pair,x = own(learn).pairs[0],learn.dls.train_ds.tensors[0]
    assert (pair.bank_t!=before['pairs.0.bank_t']).any(1).all()
    with torch.no_grad(): now = unit(pair.heads.teacher(teachers[6].eval()[:5](x)))
    assert ((now@pair.bank_t.T).argmax(1)==torch.arange(100)).float().mean()>.5 and (now*pair.bank_t).sum(1).mean()>.9

def test_bank_is_lean():
    "No copy of what is drawn: nothing larger than a bank, or its products with the batch"
    x = inputs('CRDBank', B=16)
    loss = CRDBank(n_data=200, K=400, dim=64).build(**x)
    with Largest() as seen: loss(x['fm_s'], x['fm_t'], x['idx']).backward()
    assert seen.numel<=200*64

def test_bank_needs_positions(teachers):
    "Where samples have none, it is refused before the first step"
    learn = distilled('CRDBank', teachers)
    learn.add_cb(MixUp())
    before = [p.detach().clone() for p in learn.model.parameters()]
    with pytest.raises(ValueError, match='crd_bank needs idx: A sample that MixUp mixed of two has no index'):
        fit(learn)
    assert all(torch.equal(p, q) for p,q in zip(before, learn.model.parameters()))

def test_temperature():
    "The value is SoftTarget's; its gradient for the temperature is reversed, by a strength that grows with a cosine"
    x = inputs('CTKD', dtype=torch.float64)
    loss = CTKD(warmup=4).build(**x)
    for n in range(1, 7):
        theta = loss.theta.detach().clone().requires_grad_()
        plain = SoftTarget(x['pred'], x['teacher_pred'], T=1+20*theta.sigmoid())
        value,grads = loss(x['pred'], x['teacher_pred']),torch.autograd.grad(plain, theta)
        strength = (1-math.cos(math.pi*min(n, 4)/4))/2
        torch.testing.assert_close(value, plain)
        torch.testing.assert_close(torch.autograd.grad(value, loss.theta)[0], -strength*grads[0])
    assert loss.step==6 and math.isclose(loss.T, 4, rel_tol=1e-6)
    loss.eval()(x['pred'], x['teacher_pred'])
    assert loss.step==6

@pytest.mark.parametrize('lr', [1e-2, 1e6])
def test_temperature_stays_within_bounds(lr):
    "Whatever the step, it moves and the loss stays finite"
    loss,x = CTKD(T=2., low=1., high=8., warmup=1).build(pred=torch.rand(4,5)),inputs('CTKD')
    opt,seen = torch.optim.SGD(loss.parameters(), lr),[loss.T.item()]
    for scale in (1,-9,30,0,1):
        value = loss(scale*x['pred'], 60*x['teacher_pred'])
        opt.zero_grad(); value.backward(); opt.step()
        seen.append(loss.T.item())
        assert value.isfinite() and loss.theta.isfinite() and 1<=seen[-1]<=8
    assert len({*seen})>1

@pytest.mark.slow
def test_temperature_in_a_training(teachers):
    learn = fit(distilled('CTKD', teachers), 3)
    assert 1<own(learn).T<21 and abs(own(learn).T-4)>1e-3 and own(learn).step==15

# --- methods of 2022 to 2024

def test_golden_queue():
    "The queue and its position after a batch, which check.py does not judge"
    checked = 0
    for c,loss,case in cases('rrd'):
        TRAINABLE['rrd'].call(loss, **case)
        after = state(loss)
        expected = torch.from_numpy(c['state_after']['queue']).double()
        torch.testing.assert_close(after['pairs.0.queue'], expected, rtol=1e-5, atol=1e-7)
        assert after['pairs.0.position'].tolist()==c['state_after']['queue_ptr'].tolist()
        checked += 1
    assert checked

def test_golden_queue_of_vectors():
    "The queue after a batch, which check.py does not judge"
    checked = 0
    for c,loss,case in cases('queue_kl'):
        TRAINABLE['queue_kl'].call(loss, **case)
        expected = torch.from_numpy(c['state_after']['queue']).double()
        torch.testing.assert_close(loss.pairs[0].queue, expected, rtol=1e-5, atol=1e-7)
        checked += 1
    assert checked

def test_divergence_of_the_queue_by_hand():
    x = inputs('QueueKL', dtype=torch.float64)
    loss = built('QueueKL', x)
    pair,(s,),(t,) = loss.pairs[0],x['fm_s'].values(),x['fm_t'].values()
    vs,vt = unit(pair.project(s)).detach(),unit(t)
    def softmax(v): e = [math.exp(v@q/.07) for q in vt]+[1.]*36; return [o/sum(e) for o in e]  # 36 empty places
    total = sum(p*math.log(p/q) for b in range(4) for p,q in zip(softmax(vt[b]), softmax(vs[b])))
    assert math.isclose(loss(x['fm_s'], x['fm_t']), total/4, rel_tol=1e-9)

def test_queue_wraps_around():
    "A queue whose size is no multiple of the batch's, and one smaller than the batch"
    x = inputs('RRD', dtype=torch.float64)
    loss = RRD(dim=8, n_queue=6).build(**x)
    pair,(t,) = loss.pairs[0],x['fm_t'].values()
    loss(x['fm_s'], x['fm_t'])
    first = pair.queue.clone()
    loss(x['fm_s'], x['fm_t'])
    v = unit(pair.heads.teacher(t)).detach()
    torch.testing.assert_close(pair.queue, torch.cat([v[2:], first[2:4], v[:2]]))
    small = RRD(dim=8, n_queue=3).build(**x)
    assert small(x['fm_s'], x['fm_t']).isfinite()

def test_relation_to_the_queue_by_hand():
    x = inputs('RRD', dtype=torch.float64)
    loss = built('RRD', x).eval()
    pair,(s,),(t,) = loss.pairs[0],x['fm_s'].values(),x['fm_t'].values()
    vs,vt = unit(pair.heads.student(s)).detach(),unit(pair.heads.teacher(t)).detach()
    queue = torch.cat([vt, pair.queue[4:]])
    def softmax(v, T): e = [math.exp(v@q/T) for q in queue]; return [o/sum(e) for o in e]
    total = sum(-p*math.log(q) for b in range(4) for p,q in zip(softmax(vt[b], .1), softmax(vs[b], .02)))
    before = state(loss)
    assert math.isclose(loss(x['fm_s'], x['fm_t']), total/4, rel_tol=1e-9)
    assert same(before, state(loss))

def test_batch_contrast_by_hand():
    x = inputs('DCD', dtype=torch.float64)
    loss = built('DCD', x)
    pair,(s,),(t,) = loss.pairs[0],x['fm_s'].values(),x['fm_t'].values()
    scores = math.e*unit(pair.heads.student(s))@unit(pair.heads.teacher(t)).T
    def share(row, k): return math.exp(row[k])/sum(math.exp(o) for o in row)
    student = [[share(scores[i], j) for j in range(4)] for i in range(4)]
    teacher = [[share(scores[:,i], j) for j in range(4)] for i in range(4)]
    contrast = sum(-math.log(student[i][i]) for i in range(4))/4
    consistency = sum(q*math.log(q/p) for p,q in zip(sum(student, []), sum(teacher, [])))/4
    assert math.isclose(loss(x['fm_s'], x['fm_t']), contrast+consistency/2, rel_tol=1e-9)

def test_projector_ensemble_by_hand():
    x = inputs('PEFD', dtype=torch.float64)
    loss,total = built('PEFD', x),0.
    for projectors,s,t in zip(loss.projectors, x['fm_s'].values(), x['fm_t'].values()):
        for b in range(4):
            p = sum((m.weight@s[b]+m.bias).clamp_min(0) for m in projectors)/3
            total += 1-(p@t[b]/p.norm()/t[b].norm()).item()
    assert math.isclose(loss(x['fm_s'], x['fm_t']), total/4, rel_tol=1e-9)

def test_dead_projections():
    "Projections that are all 0 have no angle: the loss is 1, and the gradient 0"
    x = inputs('PEFD', shapes=(((8,),), ((12,),)))
    loss = built('PEFD', x)
    for m in loss.projectors[0]: nn.init.constant_(m.bias, -1e3)
    value,grads = run(loss, x)
    assert value==1
    assert not any(g.any() for g in grads)

def test_generation_by_hand():
    "Only masked tokens count, and what the student has there is not seen"
    x = inputs('ViTKD', dtype=torch.float64)
    loss,mask = built('ViTKD', x),torch.zeros(4,1,3,3, dtype=torch.bool)
    mask[:,:,:2,1] = True
    loss.draw = lambda t: mask
    (s0,s1),(t0,t1) = x['fm_s'].values(),x['fm_t'].values()
    first = loss.align[0](s0.movedim(1,-1)).movedim(-1,1)
    last = loss.align[1](s1.movedim(1,-1)).movedim(-1,1).clone()
    for i in range(2): last[:,:,i,1] = loss.mask_token[0,0]
    errors = loss.generation(last)-t1
    expected = (first-t0).pow(2).mean() + .1*errors[:,:,:2,1].pow(2).sum()/t1.numel()/.5
    torch.testing.assert_close(loss(x['fm_s'], x['fm_t']), expected)
    hidden = {**x['fm_s'], 's1': torch.where(mask, 100., s1)}
    torch.testing.assert_close(loss(hidden, x['fm_t']), expected)

def test_tokens_on_a_square():
    "Tokens, with or without a class token, equal the map whose rows they are"
    x = inputs('ViTKD', dtype=torch.float64, shapes=(((6,4,4),), ((8,4,4),)))
    loss = built('ViTKD', x)
    tokens = changed(x, lambda f: f.flatten(2).mT)
    with_class = changed(tokens, lambda f: torch.cat([torch.randn(4,1,f.shape[2]).double(), f], 1))
    for o in (tokens, with_class): close(run(loss, o)[0], run(loss, x)[0], 1e-9)
    with pytest.raises(ValueError, match='a square number of tokens, with or without a class token, got 18'):
        ViTKD().build(fm_s={'a': torch.randn(2,18,6)}, fm_t={'a': torch.randn(2,18,8)})

@pytest.mark.parametrize('ratio,masked', [(.5, 8), (.75, 12), (1., 16), (.01, 1)])
def test_masked_tokens(ratio, masked):
    "Equally many in each sample, and other ones in each"
    loss = ViTKD(ratio=ratio).build(**inputs('ViTKD'))
    mask = loss.draw(torch.zeros(30,8,4,4))
    assert mask.sum((1,2,3)).tolist()==[masked]*30
    assert ratio==1 or not torch.equal(mask[0], mask[1])

def test_exits_by_hand():
    x = inputs('OFA, narrow exits', dtype=torch.float64)
    loss,total = built('OFA, narrow exits', x),0.
    maps = [f if f.ndim==4 else f[...,None,None] for f in x['fm_s'].values()]
    logits = [x['pred']] + [exit(f) for exit,f in zip(loss.exits, maps)]
    for z in logits:
        p,q = (z/2).softmax(1),(x['teacher_pred']/2).softmax(1)
        for b in range(4):
            for c in range(5):
                weight = (1+q[b,c])**1.5-1 if c==x['target'][b] else q[b,c]**1.5
                total -= (weight*p[b,c].log()).item()
    assert math.isclose(loss(**loss_args(loss).select(x)), total/4, rel_tol=1e-9)

def test_bad_exits():
    loss,x = built('OFA'),inputs('OFA')
    def call(**kw): return loss(**loss_args(loss).select({**x, **kw}))
    with pytest.raises(ValueError, match=r"channels \[4, 8\], got \[\] of layers \[\]"): call(fm_s={})
    with pytest.raises(ValueError, match=r"channels \[4, 8\], got \[4\] of layers \['s0'\]"):
        call(fm_s={'s0': x['fm_s']['s0']})
    with pytest.raises(TypeError, match='fm_s must be a dict'): call(fm_s=[*x['fm_s'].values()])
    with pytest.raises(ValueError, match='one class per sample.*leave out the layers'):
        OFA().build(**{**x, 'pred': torch.randn(4,5,2,2)})

def test_exits_need_no_layer_of_the_teacher(teachers):
    "Without layers the loss compares logits; with layers the teacher's may be empty"
    for layers in (None, {'student': ['1'], 'teacher': []}):
        learn = learner(KnowledgeDistillationCallback(teachers[6], OFA(), layers, weight=1.))
        fit(learn)
        assert len(own(learn).exits)==(0 if layers is None else 1)
