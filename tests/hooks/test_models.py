"Random states that a teacher leaves as they are."
import numpy as np, pytest
from kd_fastai.hooks.models import RandomStream


@pytest.mark.parametrize('draw', [np.random.rand, np.random.randn, np.random.standard_normal,
    lambda: np.random.bytes(1), lambda: np.random.randint(2), lambda: np.random.shuffle([1,2]),
    lambda: np.random.seed(3)])
@pytest.mark.parametrize('n_before', [0, 1, 2])  # after an odd number of calls, randn keeps a number for the next one
def test_each_draw_from_numpy_is_noticed(draw, n_before):
    np.random.seed(0)
    for _ in range(n_before): np.random.randn()
    state,stream = np.random.get_state(),RandomStream()
    before = str(state)
    with stream: pass
    with stream: draw()
    with stream: draw()
    assert str(np.random.get_state())==before
    np.random.set_state(state)  # by others: the stream goes by what NumPy has
    with stream: draw()
    assert str(np.random.get_state())==before

def test_numpys_generator_may_be_of_another_kind():
    if not hasattr(np.random, 'set_bit_generator'): pytest.skip("needs NumPy 1.24")
    outer = np.random.get_bit_generator()
    np.random.set_bit_generator(np.random.PCG64(1))
    try:
        before,stream = np.random.get_state(legacy=False),RandomStream()
        with stream: a = np.random.rand()
        with stream: b = np.random.rand()
        assert np.random.get_state(legacy=False)==before and a!=b
    finally: np.random.set_bit_generator(outer)
