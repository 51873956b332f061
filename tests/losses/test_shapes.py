"Features and labels that a loss refuses, since it would be constant or wrong for them."
from functools import partial
import pytest, torch
from kd_fastai.losses import *
from kd_fastai.losses.facts import loss_args, loss_name

def one_position(loss, shape):
    "Arguments of a loss for features of one position"
    g = torch.Generator().manual_seed(0)
    s,t = ({'a': torch.randn(shape, generator=g)} for _ in range(2))
    return loss_args(loss).select(dict(fm_s=s, fm_t=t, pred=torch.zeros(4,3), target=torch.randint(3, (4,1,1))))

POSITIONS = [Attention, AttentionNorm, NST, CWD, Affinity, IFVD, partial(FactorTransfer, p1=2), CATKD]
RELATIONS = [PairwiseKD, CIRKD, TokenRelationKL, partial(MiniLMv2, heads=2)]
OTHERS = [FitNet, Similarity, PKT, RKD, HCL, ICKD, KTA, GaussianWasserstein, CosineSmoothL1,
          partial(CATKD, normalize=False)]

@pytest.mark.parametrize('shape', [(4,8,1,1), (4,1,8)], ids=['map','token'])
@pytest.mark.parametrize('loss', POSITIONS, ids=loss_name)
def test_a_loss_that_compares_positions_needs_two(loss, shape):
    "It is constant for one position, so that the student would learn nothing without a word"
    if loss is IFVD and len(shape)==3: pytest.skip("takes maps only")
    with pytest.raises(ValueError, match=r"A layer has one position, got 'a' \(4, .*Name an earlier layer"):
        loss(**one_position(loss, shape))

@pytest.mark.parametrize('loss', RELATIONS, ids=loss_name)
def test_relations_of_one_position_give_a_warning(loss):
    "The value is 0 by definition, whatever the student does"
    with pytest.warns(UserWarning, match='a: one position.*name an earlier layer'):
        assert abs(loss(**one_position(loss, (4,8,1,1))))<1e-6

@pytest.mark.parametrize('loss', OTHERS, ids=loss_name)
def test_the_other_losses_learn_from_one_position(loss):
    x = one_position(loss, (4,8,1,1))
    x['fm_s']['a'].requires_grad_()
    loss(**x).backward()
    assert x['fm_s']['a'].grad.abs().sum()>0

WITH_LABELS = [DecoupledKD, NormalizedKD, WSLD, MFT, RefinedLogits, SwappedLogits, WassersteinKD, TfKD]
@pytest.mark.parametrize('loss', WITH_LABELS, ids=loss_name)
@pytest.mark.parametrize('label', [255, -1, -100])
def test_a_label_that_is_no_class(loss, label):
    "The message names the label, and what it advises works"
    pred,teacher_pred,y = torch.randn(4,3,2,2),torch.randn(4,3,2,2),torch.randint(3, (4,2,2))
    y[0] = label
    x = loss_args(loss).select(dict(pred=pred, teacher_pred=teacher_pred, target=y))
    with pytest.raises(ValueError, match=f"labels from 0 to 2 .* got the label {label}: .*ignore_index={label}"):
        loss(**x)
    from kd_fastai.objective import Objective, Term
    objective = Objective([Term(loss)], ignore_index=label)
    value, = objective.values(objective.prepare(pred, teacher_pred, target=y)).values()
    kept = y!=label
    def rows(t): return t.movedim(1, -1)[kept]
    expected = loss(**{k: v[kept] if k=='target' else rows(v) for k,v in x.items()})
    torch.testing.assert_close(value, expected)

def test_a_loss_that_is_called_as_a_class():
    with pytest.raises(TypeError, match=r'Set its parameters with partial\(SoftTarget, T=4\)'): SoftTarget(T=4)
    x = torch.randn(4,3),torch.randn(4,3)
    assert partial(SoftTarget, T=4)(*x)==SoftTarget(*x, T=4)
