"Adapters where sizes differ from batch to batch."
from functools import partial
import pytest, torch, torch.nn.functional as F
from torch import nn
from kd_fastai.losses import Attention, CWD, FitNet
from kd_fastai.losses.adapters import LossWithAdapters, make_adapter, reads_sequences
from kd_fastai.losses.shapes import resize_to

def built(loss, s, t, **given):
    res = LossWithAdapters(loss, 'auto')
    res.build({'a': s}, {'a': t}, **given)
    return res

@pytest.mark.parametrize('loss', [FitNet, Attention, CWD])
@pytest.mark.parametrize('side', [8, 4, 2])
def test_the_size_is_that_of_the_batch(loss, side):
    "An adapter that was made for one size has the right value for another: the loss of the resized, projected feature"
    torch.manual_seed(0)
    adapted = built(loss, torch.randn(2,4,side,side), torch.randn(2,6,4,4))
    for size_s,size_t in (((12,10),(6,5)), ((3,3),(6,6)), ((5,5),(5,5))):
        s,t = torch.randn(3,4,*size_s),torch.randn(3,6,*size_t)
        expected = loss({'a': adapted.adapters[0].channels(resize_to(s, size_t))}, {'a': t})
        torch.testing.assert_close(adapted(fm_s={'a': s}, fm_t={'a': t}), expected)

class Frames(nn.Module):
    "A model of sequences"
    def __init__(self): super().__init__(); self.conv = nn.Conv1d(3, 8, 3)

@pytest.mark.parametrize('n_s,n_t', [(16,64), (12,6), (9,4), (7,7)])
def test_steps_of_a_sequence_are_resized_along_it(n_s, n_t):
    "Also where both numbers are squares, which tokens of a picture would be laid out on"
    adapted = built(FitNet, torch.randn(2,5,4), torch.randn(2,10,6), student=Frames(), teacher=Frames())
    s,t = torch.randn(3,n_s,4),torch.randn(3,n_t,6)
    along = resize_to(s.mT, (n_t,))
    expected = F.mse_loss(adapted.adapters[0].channels(along).mT, t)
    torch.testing.assert_close(adapted(fm_s={'a': s}, fm_t={'a': t}), expected)

def test_which_models_read_sequences():
    picture = nn.Sequential(nn.Conv2d(3, 8, 4), nn.Linear(8, 8))
    assert reads_sequences(Frames(), Frames())
    assert reads_sequences(nn.Embedding(5, 4), None)
    assert not reads_sequences(Frames(), picture)
    assert not reads_sequences(nn.Linear(4, 4), None)

def test_the_advice_for_tokens_that_make_no_square():
    s,t = torch.randn(2,7,4),torch.randn(2,13,4)
    with pytest.raises(ValueError, match=r'adapt=partial\(make_adapter, sequence=True\)'): make_adapter(s, t)
    assert partial(make_adapter, sequence=True)(s, t)(s).shape==t.shape
    assert partial(make_adapter, class_tokens=(1,1))(s, t)(s).shape==t.shape

def test_an_adapter_of_the_user_gets_the_students_feature_alone():
    adapted = LossWithAdapters(FitNet, nn.Conv2d(4, 6, 1))
    s,t = torch.randn(2,4,5,5),torch.randn(2,6,5,5)
    adapted.build({'a': s}, {'a': t})
    torch.testing.assert_close(adapted(fm_s={'a': s}, fm_t={'a': t}), F.mse_loss(adapted.adapt(s), t))
