"From a trained student to a shipped one: trainings that are resumed, exported models, and students that were made smaller first."
import pytest, torch
from functools import partial
from fastai.basics import *
from fastai.callback.all import *
from kd_fastai.all import *
from kd_fastai.demo import digits, small_net

for o in [*globals()]:
    if o=='test' or o.startswith('test_'): del globals()[o]  # fastcore's own helpers, which pytest would take for tests

pytestmark = pytest.mark.filterwarnings('ignore')

# ---- resume: fit(n, start_epoch=k) after save and load

def weights(learn): return torch.cat([p.detach().flatten() for p in learn.model.parameters()])
def columns(learn): return pd.DataFrame(learn.recorder.values, columns=learn.recorder.metric_names[1:-1])

class Interrupt(Callback):
    "Save the Learner and the random state after some epochs, and stop"
    order = 61
    def __init__(self, after): self.after = after
    def after_epoch(self):
        if self.epoch!=self.after-1: return
        self.learn.save('half')
        self.learn.states = get_random_states(),self.dls.train.rng.getstate()
        raise CancelFitException

def plain(teacher): return dict(loss=partial(SoftTarget, T=4), weight=0.9)
def schedules(teacher):
    return dict(loss=[Term(SoftTarget, 0.9, T=SchedLin(8,2)), Term(Attention, 10., layers='1')], schedule=SchedCos(0,1))
def owned(teacher): return dict(loss=Term(CRD(), 0.8, layers='2'))
def bank(teacher): return dict(loss=Term(CRDBank(n_data=100), 0.8, layers='2'))
def adapters(teacher): return dict(loss=Term(FitNet, 1., layers=['1','2'], adapt='auto'))
def balanced(teacher): return dict(loss=[SoftTarget, Term(CRD(), 0.1, layers='2')], balance=True)
def cached(teacher): return dict(teacher=CachedTeacher(teacher), loss=partial(SoftTarget, T=4))

@pytest.mark.parametrize('opt', [Adam, partial(OptimWrapper, opt=torch.optim.AdamW)], ids=['Adam','OptimWrapper'])
@pytest.mark.parametrize('settings', [plain, schedules, owned, bank, adapters, balanced, cached])
def test_a_resumed_training_equals_the_uninterrupted_one(settings, opt, tmp_path):
    "bit for bit: weights, columns, what losses own, and the optimizer's steps"
    set_seed(1)
    teacher = small_net(8)
    def make():
        set_seed(0, reproducible=True)
        kd = KnowledgeDistillationCallback(**{'teacher': teacher, **settings(teacher)})
        learn = Learner(digits(100), small_net(4), loss_func=CrossEntropyLossFlat(), metrics=accuracy, opt_func=opt, path=tmp_path, cbs=kd)
        learn.remove_cb(ProgressCallback)
        learn.logger = noop
        return learn
    (whole := make()).fit_one_cycle(4, 1e-2)
    (half := make()).fit_one_cycle(4, 1e-2, cbs=Interrupt(2))
    assert not torch.equal(weights(half), weights(whole))
    rest = make()
    torch.randn(3)  # the random state at this point does not matter
    rest.load('half')
    set_random_states(**half.states[0])
    rest.dls.train.rng.setstate(half.states[1])
    rest.fit_one_cycle(4, 1e-2, start_epoch=2)
    assert torch.equal(weights(rest), weights(whole))
    pd.testing.assert_frame_equal(columns(rest).iloc[2:,1:], columns(whole).iloc[2:,1:])  # the first is fastai's running mean
    for a,b in zip(rest.model.buffers(), whole.model.buffers()): assert torch.equal(a, b)

def test_a_student_is_not_resumed_without_what_its_losses_own(tmp_path):
    "The file of owned weights matters: without it the rest of the training differs"
    teacher = small_net(8)
    def make():
        set_seed(0, reproducible=True)
        kd = KnowledgeDistillationCallback(teacher, Term(CRD(), 0.8, layers='2'))
        learn = Learner(digits(100), small_net(4), loss_func=CrossEntropyLossFlat(), path=tmp_path, cbs=kd)
        learn.remove_cb(ProgressCallback)
        learn.logger = noop
        return learn
    ends = []
    half = make()
    half.fit_one_cycle(4, 1e-2, cbs=Interrupt(2))
    for remove in (False, True):
        if remove: (tmp_path/'models/half.losses.pth').unlink()
        learn = make()
        learn.load('half')
        set_random_states(**half.states[0])
        learn.dls.train.rng.setstate(half.states[1])
        learn.fit_one_cycle(4, 1e-2, start_epoch=2)
        ends.append(weights(learn))
    assert not torch.equal(*ends)
