"What adversaries found in losses: degenerate inputs, ignored positions, masked classes, half precision, many classes"
import math
from functools import partial
import pytest, torch, torch.nn.functional as F
from kd_fastai.losses import *
from kd_fastai.losses.facts import LOSS_ARGS, loss_args
from kd_fastai.losses import output, feature, relation

pytestmark = pytest.mark.hostile

def public(module): return [f for f in (getattr(module, n) for n in module.__all__) if hasattr(f, 'info')]

OF_PREDICTIONS = {f.__name__: f for f in public(output)}
OF_LOGITS      = {n: f for n,f in OF_PREDICTIONS.items() if f.info.softmax and 'teacher_pred' in loss_args(f).accepted}
OF_FEATURES    = {f.__name__: f for m in (feature, relation) for f in public(m)}
OF_FEATURES['MiniLMv2'] = partial(MiniLMv2, heads=2)  # the inputs have few channels
PREDICTIONS = pytest.mark.parametrize('name', OF_PREDICTIONS)
LOGITS      = pytest.mark.parametrize('name', OF_LOGITS)
FEATURES    = pytest.mark.parametrize('name', OF_FEATURES)

def inputs(loss, B=4, C=5, dtype=torch.float32, seed=0):
    "Random arguments of a loss"
    g = torch.Generator().manual_seed(seed)
    def rand(*shape): return torch.randn(shape, generator=g, dtype=torch.float64).to(dtype)
    x = dict(pred=2*rand(B,C), teacher_pred=2*rand(B,C), target=torch.randint(C-1, (B,), generator=g),
             fm_s={'a': rand(B,4,6,6), 'b': rand(B,8,3,3)}, fm_t={'c': rand(B,4,6,6), 'd': rand(B,8,3,3)})
    if loss is BoundedRegression: x['target'] = rand(B,C)
    if loss is IFVD: x['target'] = torch.randint(C-1, (B,6,6), generator=g)
    return {k: v for k,v in x.items() if k in loss_args(loss).accepted}

def gradients(loss, x):
    "Value, and the gradients of the student's tensors that the loss uses"
    x = {**x, **({'fm_s': {k: v.clone().requires_grad_() for k,v in x['fm_s'].items()}} if 'fm_s' in x else {})}
    if 'pred' in x: x['pred'] = x['pred'].clone().requires_grad_()
    value = loss(**x)
    leaves = [*x.get('fm_s', {}).values()] + ([x['pred']] if 'pred' in x else [])
    grads = torch.autograd.grad(value, leaves, allow_unused=True)
    return value.detach(),[torch.zeros_like(l) if g is None else g for l,g in zip(leaves, grads)]

# ---- ignored positions

def losses_with_mask(): return [n for n,f in OF_PREDICTIONS.items() if 'mask' in loss_args(f).accepted]

def test_losses_that_relate_samples_take_valid():
    assert losses_with_mask()==['MultiLevel', 'StreamlinedKD']
    assert 'mask' in LOSS_ARGS

@pytest.mark.parametrize('name', ['MultiLevel', 'StreamlinedKD'])
def test_valid_equals_loop(name):
    "Each position is a batch of the samples that count there; positions are weighted by their number of samples"
    loss,g = OF_PREDICTIONS[name],torch.Generator().manual_seed(1)
    s,t = (torch.randn(6,5,2,3, generator=g).double() for _ in range(2))
    mask = torch.rand(6,2,3, generator=g)>.3
    mask[:,1,2] = False                                    # no sample counts at this position
    total = 0.
    for i in range(2):
        for j in range(3):
            kept = mask[:,i,j]
            if kept.any(): total += kept.sum()*loss(s[kept][...,i,j], t[kept][...,i,j])
    torch.testing.assert_close(loss(s, t, mask=mask), total/mask.sum())

@pytest.mark.parametrize('name', ['MultiLevel', 'StreamlinedKD'])
def test_ignored_positions_have_no_influence(name):
    loss = OF_PREDICTIONS[name]
    s,t = torch.randn(4,5,3),torch.randn(4,5,3)
    mask = torch.ones(4,3, dtype=torch.bool); mask[1,2] = False
    s2 = s.clone(); s2[1,:,2] = 50.
    torch.testing.assert_close(loss(s2, t, mask=mask), loss(s, t, mask=mask))
    grad, = gradients(partial(loss, mask=mask), dict(pred=s, teacher_pred=t))[1]
    assert grad[1,:,2].abs().max()==0

@pytest.mark.parametrize('name', ['MultiLevel', 'StreamlinedKD'])
def test_one_ignored_position_changes_little(name):
    loss,g = OF_PREDICTIONS[name],torch.Generator().manual_seed(0)
    s,t = (torch.randn(16,4,12,12, generator=g) for _ in range(2))
    mask = torch.ones(16,12,12, dtype=torch.bool); mask[3,5,5] = False
    assert math.isclose(loss(s, t, mask=mask), loss(s, t), rel_tol=.01)

@pytest.mark.parametrize('name', ['MultiLevel', 'StreamlinedKD'])
def test_nothing_valid(name):
    value,grads = gradients(partial(OF_PREDICTIONS[name], mask=torch.zeros(4,3, dtype=torch.bool)),
                            dict(pred=torch.randn(4,5,3), teacher_pred=torch.randn(4,5,3)))
    assert value==0
    assert grads[0].abs().max()==0

# ---- gradients where the derivative does not exist

def zero_rows(f):
    f = f.clone(); f[0] = 0
    return f
def zero_channels(f):
    f = f.clone(); f[:,0] = 0
    return f
def equal_rows(f):
    f = f.clone(); f[1] = f[0]
    return f
DEGENERATE = dict(zeros=torch.zeros_like, zero_rows=zero_rows, zero_channels=zero_channels, equal_rows=equal_rows,
                  all_equal=lambda f: f[:1].expand_as(f).clone(), constant=torch.ones_like)

@FEATURES
@pytest.mark.parametrize('how', DEGENERATE)
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_degenerate_features_have_bounded_gradients(name, how, dtype):
    loss = OF_FEATURES[name]
    x = inputs(loss, dtype=dtype)
    usual = max(g.abs().max() for g in gradients(loss, x)[1])
    x['fm_s'] = {k: DEGENERATE[how](v) for k,v in x['fm_s'].items()}
    value,grads = gradients(loss, x)
    assert value.isfinite()
    assert max(g.abs().max() for g in grads)<1e4*max(usual, 1e-2)

@pytest.mark.parametrize('loss', [FactorTransfer, KTA, partial(KTA, p=2), CATKD, NST, Affinity, unit_length(RKD)],
                         ids=['FactorTransfer','KTA','KTA-2','CATKD','NST','Affinity','unit_length'])
def test_gradient_of_zero_features_is_zero(loss):
    x = inputs(FitNet)
    x['fm_s'] = {k: torch.zeros_like(v) for k,v in x['fm_s'].items()}
    assert all(g.abs().max()==0 for g in gradients(loss, x)[1])

@LOGITS
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_classifier_of_zeros_has_bounded_gradients(name, dtype):
    loss = OF_LOGITS[name]
    x = inputs(loss, dtype=dtype)
    for pred in (torch.zeros_like(x['pred']), torch.full_like(x['pred'], .1)):
        value,grads = gradients(loss, {**x, 'pred': pred})
        assert value.isfinite()
        assert all(g.abs().max()<100 for g in grads)

# ---- angles of close rows

@pytest.mark.parametrize('spread', [1e-2, 1e-3, 1e-4, 1e-5])
def test_angles_of_close_rows(spread):
    "Against the direct formula in float64"
    g = torch.Generator().manual_seed(0)
    base,noise,t = (torch.randn(n, 64, generator=g) for n in (4,16,16))
    s = base.repeat(4,1)+spread*noise
    def cosines(f):
        e = F.normalize(f.double()[None]-f.double()[:,None], dim=2)
        return e@e.mT
    expected = F.smooth_l1_loss(cosines(s), cosines(t)).item()
    assert math.isclose(RKD({'a': s}, {'a': t}, distance=0, angle=1), expected, rel_tol=1e-3)

def test_gradient_of_angles_of_close_rows():
    g = torch.Generator().manual_seed(0)
    base,noise,t = (torch.randn(n, 64, generator=g) for n in (4,16,16))
    x = dict(fm_s={'a': base.repeat(4,1)+1e-4*noise}, fm_t={'a': t})
    exact = {k: {'a': v['a'].double()} for k,v in x.items()}
    got,expected = (gradients(RKD, o)[1][0] for o in (x, exact))
    torch.testing.assert_close(got, expected.float(), rtol=1e-3, atol=1e-3*float(expected.abs().max()))

def test_angles_in_chunks_equal_the_whole():
    "More than 64 rows are computed in chunks"
    s,t = torch.randn(70,6).double(),torch.randn(70,9).double()
    def cosines(f):
        e = F.normalize(f[None]-f[:,None], dim=2)
        return e@e.mT
    expected = F.smooth_l1_loss(cosines(s), cosines(t))
    torch.testing.assert_close(RKD({'a': s}, {'a': t}, distance=0, angle=1), expected)

# ---- masked classes

def mask_last(x): return torch.cat([x, torch.full_like(x[:,:1], -torch.inf)], 1)

@LOGITS
def test_masked_class_counts_as_absent(name):
    "Logits of -inf in both: no NaN, and the value of only the other classes where the loss is a sum over classes"
    loss = OF_LOGITS[name]
    x = inputs(loss)
    value,grads = gradients(loss, {**x, 'pred': mask_last(x['pred']), 'teacher_pred': mask_last(x['teacher_pred'])})
    assert value.isfinite()
    assert grads[0].isfinite().all()
    assert grads[0][:,-1].abs().max()==0
    # means over classes, and a loss whose number of classes in pairs is larger than that of classes
    if name not in ('DIST', 'MultiLevel', 'LDRLD'): torch.testing.assert_close(value, loss(**x))

@pytest.mark.parametrize('name', ['SoftTarget', 'DecoupledKD', 'TTM'])
def test_standardize_with_masked_class(name):
    loss = standardize(OF_LOGITS[name])
    x = inputs(loss)
    value,grads = gradients(loss, {**x, 'pred': mask_last(x['pred']), 'teacher_pred': mask_last(x['teacher_pred'])})
    torch.testing.assert_close(value, loss(**x))
    assert grads[0].isfinite().all()

@LOGITS
def test_class_masked_for_the_teacher_only(name):
    loss = OF_LOGITS[name]
    x = inputs(loss, C=6)
    teacher_pred = x['teacher_pred'].clone(); teacher_pred[:,-1] = -torch.inf
    value,grads = gradients(loss, {**x, 'teacher_pred': teacher_pred})
    assert value.isfinite()
    assert grads[0].isfinite().all()

def test_nan_is_not_hidden():
    x = inputs(SoftTarget)
    x['pred'][0,0] = torch.nan
    assert SoftTarget(**x).isnan()

# ---- half precision without autocast

HALF = pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])

@HALF
@pytest.mark.parametrize('name', [*OF_PREDICTIONS, *OF_FEATURES])
@pytest.mark.parametrize('how', ['random', 'zeros'])
def test_direct_half(name, dtype, how):
    loss = {**OF_PREDICTIONS, **OF_FEATURES}[name]
    x = inputs(loss, dtype=dtype)
    if how=='zeros': x = {k: {n: 0*f for n,f in v.items()} if isinstance(v, dict) else 0*v for k,v in x.items()}
    value,grads = gradients(loss, x)
    assert value.isfinite()
    assert all(g.isfinite().all() for g in grads)

# ---- many classes

def test_multi_level_of_many_classes_is_lean():
    "No product of classes by classes"
    from support.losses import Largest
    s,t = torch.randn(4,3000, requires_grad=True),torch.randn(4,3000)
    with Largest() as seen: MultiLevel(s, t).backward()
    assert seen.numel<=10*s.numel()

@pytest.mark.parametrize('B,C', [(3,7), (7,3), (4,4)])
def test_multi_level_equals_products(B, C):
    s,t = torch.randn(B,C).double(),torch.randn(B,C).double()
    expected = 0.
    for T in (2., 5.):
        p,q = ((x/T).softmax(1) for x in (s,t))
        expected += (p@p.T-q@q.T).pow(2).sum()/B + (p.T@p-q.T@q).pow(2).sum()/C
    torch.testing.assert_close(MultiLevel(s, t, T=(2., 5.), levels=('batch','class')), expected)
