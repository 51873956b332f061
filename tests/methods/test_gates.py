"Weights of samples and positions, checked sample by sample."
import pytest, torch
from kd_fastai.methods.gates import all_of, by_position, teacher_right
from kd_fastai.objective import Batch

def dense_batch(B, H, W):
    g = torch.Generator().manual_seed(0)
    return Batch(pred=torch.zeros(B,3,H,W), teacher_pred=torch.randn(B,3,H,W, generator=g),
                 target=torch.randint(3, (B,H,W), generator=g), idx=torch.randperm(B, generator=g))

@pytest.mark.parametrize('order', [1, -1], ids=['samples first','positions first'])
@pytest.mark.parametrize('size', [(4,4,4), (4,4,6), (3,5,3), (2,3,1)])
def test_weights_of_samples_count_at_all_their_positions(size, order):
    "Where there are as many samples as columns, too"
    batch,values = dense_batch(*size),torch.arange(1., size[0]+1)
    got = all_of(*[by_position(values), teacher_right][::order])(batch)
    right = batch.teacher_pred.argmax(1)==batch.target
    expected = torch.stack([values[i]*r for i,r in zip(batch.idx, right)])
    torch.testing.assert_close(got, expected)

def test_weights_of_other_shapes():
    batch = dense_batch(4, 5, 6)
    with pytest.raises(ValueError, match=r'samples \(4,\) or of positions \(4, 5, 6\), got \(4, 5, 6\), \(4, 1, 6\)'):
        all_of(teacher_right, lambda b: torch.ones(4,1,6))(batch)
    with pytest.raises(ValueError, match=r'got \(4,\), \(3,\)'):
        all_of(lambda b: torch.ones(4), lambda b: torch.ones(3))(batch)
