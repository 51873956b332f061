"Two views of each sample in a Learner: the batches, losses across views, and published training steps as a whole."
import json
from functools import partial
import numpy as np, pytest, torch, torch.nn.functional as F
from torch import nn
from torch.utils.data import TensorDataset
from fastai.basics import (Callback, CrossEntropyLossFlat, DataLoader, DataLoaders, ItemTransform, Learner, Pipeline,
    Recorder)
from kd_fastai.all import *
from kd_fastai.methods.gates import teacher_right, teacher_sure
from kd_fastai.methods.two_views import across_views, by_view, on_two_views
from kd_fastai.demo import digits, small_net
from support import KD, KeepBatches, fit, history, learner, quiet, weights
from support.golden import golden

from impls import cross, mlkd_as_published

pytestmark = pytest.mark.filterwarnings('ignore')
torch.set_num_threads(1)

# ---- published training steps

def cases(method):
    entry = json.loads((golden/'index'/f'{method}.json').read_text())
    return pytest.mark.parametrize('case', entry['cases'], ids=lambda c: f"{method} {c['case']}")

def arrays(method, key):
    with np.load(golden/f'{method}.npz') as z:
        found = {k.removeprefix(key+'/'): torch.tensor(z[k]) for k in z.files if k.startswith(key+'/')}
    return {k: v.double() if v.is_floating_point() else v for k,v in found.items()}

class KeepStep(Callback):
    "Keeps the loss and the gradient, and ends the training before the step"
    order,run_valid = KD.order+1,False
    def after_backward(self):
        self.loss,self.grad = self.learn.loss.item(),self.learn.model.weight.grad.clone()

def step_of(x, terms, task_weight):
    "Loss and gradient of one batch: inputs are positions in a table of the case's logits, strong views after weak"
    n = len(x['pred'])
    labels = x.get('target', torch.zeros(n, dtype=torch.long))
    def table(weak, strong): return nn.Embedding.from_pretrained(torch.cat([x[weak], x[strong]]), freeze=False)
    ds = TensorDataset(torch.arange(n), labels)
    train,valid = DataLoader(ds, bs=n),DataLoader(ds, bs=n)
    train.after_batch = Pipeline([TwoViews(ItemTransform(lambda b: (b[0]+n, b[1])))], split_idx=0)
    kd,keep = KD(table('teacher_pred', 'aux/teacher_strong'), terms, task_weight=task_weight),KeepStep()
    learn = Learner(DataLoaders(train, valid), table('pred', 'aux/pred_strong'), loss_func=CrossEntropyLossFlat(),
                    cbs=[kd, keep])
    learn.remove_cb(Recorder)  # computes in float32
    quiet(learn).fit(1, 0.)
    return keep.loss,keep.grad

def check(case, x, loss, grad):
    assert loss==pytest.approx(case['expected'], rel=1e-5, abs=1e-9)
    expected = torch.cat([x['grad/pred'], x['grad/aux/pred_strong']])
    torch.testing.assert_close(grad, expected, rtol=1e-5, atol=1e-5*expected.abs().max().item()+1e-9)

@cases('mlkd_two_views')
def test_the_published_step_of_mlkd(case):
    "The cross-entropies of both views are added, so that the task weight is twice theirs."
    hp,x = case['hp'],arrays('mlkd_two_views', case['key'])
    term = Term(on_two_views(mlkd_as_published), hp['kd_weight'], T=hp['temperature'], standardized=hp['logit_stand'])
    check(case, x, *step_of(x, term, 2*hp['ce_weight']))

def crld_loss(T, within, across, tau_w, tau_s):
    return Term(on_two_views(partial(cross, target=None)), T=T, within=within, across=across, tau_w=tau_w, tau_s=tau_s)

def crld_terms(T, within, across, tau_w, tau_s):
    "Means over both views are half of the published sums"
    soft = partial(SoftTarget, T=T)
    def sure(tau): return teacher_sure(tau) if tau<=1 else lambda b: torch.zeros(len(b.pred))
    return [Term(soft, 2*within, sample_weight=by_view(sure(tau_w)), name='within'),
            Term(across_views(soft), 2*across, sample_weight=by_view(sure(tau_s), 'strong'), name='across')]

@pytest.mark.parametrize('form', [crld_loss, crld_terms])
@cases('crld_parts')
def test_the_published_loss_of_crld(case, form):
    hp,x = case['hp'],arrays('crld_parts', case['key'])
    terms = form(hp['temperature'], hp['wv_weight'], hp['cv_weight'], hp['tau_w'], hp['tau_s'])
    check(case, x, *step_of(x, terms, 0.))

# ---- the batch

def erase(b):
    "Works in place, as `RandomErasing` does"
    b[0][...,2:6,2:6] = 0
    return b

def two_views(strong=erase, labels=100):
    dls = digits(labels)
    dls.train.after_batch = Pipeline([TwoViews(ItemTransform(strong))], split_idx=0)
    return dls

class Count(nn.Module):
    "Counts its forward passes"
    def __init__(self, model): super().__init__(); self.model,self.sizes = model,[]
    def forward(self, x): self.sizes.append(len(x)); return self.model(x)

@pytest.fixture(scope='module')
def teacher(): return fit(learner(width=8, dls=digits(), seed=8), 2).model

def test_student_and_teacher_run_once_on_both_views(teacher):
    t,keep = Count(teacher),KeepBatches()
    learn = fit(learner([KD(t, SoftTarget), keep], two_views(), Count(small_net(4))))
    assert t.sizes==[40]*5
    assert learn.model.sizes==[40]*5+[797]
    for x,y in keep.batches:
        (weak,strong),labels = x.chunk(2),y.chunk(2)
        assert (labels[0]==labels[1]).all()
        assert (strong[...,2:6,2:6]==0).all()
        assert not (weak[...,2:6,2:6]==0).all()
        strong[...,2:6,2:6] = weak[...,2:6,2:6]
        assert (weak==strong).all()

def test_the_task_loss_is_the_mean_over_both_views():
    keep = KeepBatches()
    learn = learner(keep, two_views())
    model = learn.model
    fit(learn, 1, 0.)
    values = [F.cross_entropy(model.train()(x), y).item() for x,y in keep.batches[-1:]]
    x,y = keep.batches[-1]
    pred = model.train()(x)
    halves = (F.cross_entropy(pred[:20], y[:20])+F.cross_entropy(pred[20:], y[20:]))/2
    assert halves.item()==pytest.approx(values[0], rel=1e-5)

def test_a_training_across_views(teacher):
    "The student learns on strong views what the teacher says of weak ones."
    def run(*terms): return fit(learner(KD(teacher, [*terms], task_weight=0.), two_views()), 6)
    across = run(Term(across_views(SoftTarget), 1., sample_weight=by_view(teacher_sure(0.5))))
    within = run(Term(SoftTarget, 1.))
    h = history(across)
    assert h.iloc[-1,-1]<h.iloc[0,-1]
    assert h.accuracy.iloc[-1]>0.2
    assert not torch.equal(weights(across), weights(within))

def test_transforms_of_pictures():
    "fastai's transforms make the views before `Normalize`, of pictures between 0 and 1."
    from fastai.vision.all import IntToFloatTensor, Normalize, RandomErasing, TensorImage, aug_transforms
    from fastai.vision.all import TensorCategory
    strong = [*aug_transforms(size=16, max_lighting=0.4, p_lighting=1.), RandomErasing(p=1., max_count=1)]
    stats = [0.5]*3,[0.25]*3
    tfms = Pipeline([TwoViews(strong), Normalize.from_stats(*stats, cuda=False), IntToFloatTensor()], split_idx=0)
    x = TensorImage(torch.randint(0, 256, (4,3,16,16), dtype=torch.uint8))
    y = TensorCategory(torch.arange(4))
    got,labels = tfms((x, y))
    assert labels.tolist()==[0,1,2,3]*2
    assert isinstance(got, TensorImage)
    torch.testing.assert_close(got[:4].as_subclass(torch.Tensor), (x.float().as_subclass(torch.Tensor)/255-0.5)/0.25)
    assert not torch.allclose(got[:4], got[4:])
    assert Pipeline([TwoViews(strong)], split_idx=1)((x, y))[0].shape==(4,3,16,16)

# ---- wrappers of losses

def test_across_views_is_a_loss_like_any_other():
    s,t = torch.randn(6,5),torch.randn(6,5)
    loss = across_views(partial(DecoupledKD, beta=2.))
    y = torch.arange(3).repeat(2)
    loop = [DecoupledKD(s[i:i+1], t[j:j+1], y[i:i+1], beta=2.) for i,j in zip(range(6), (3,4,5,0,1,2))]
    torch.testing.assert_close(loss(s, t, y), sum(loop)/6)
    torch.testing.assert_close(loss.sample_values(s, t, y), torch.stack(loop))
    assert Term(loss, T=2).name=='decoupled_kd'
    torch.testing.assert_close(across_views(DIST)(s, t), DIST(s, t[[3,4,5,0,1,2]]))
    with pytest.raises(TypeError, match="no parameter 'temperature'"): Term(loss, temperature=2)
    with pytest.raises(ValueError, match='DIST has none'): Term(across_views(DIST), sample_weight=teacher_right)

def test_a_loss_on_two_views_has_its_own_parameters():
    "Labels are those of one view, since both have the same."
    def three(pred, teacher_pred, pred_strong, teacher_strong, target, T=1.):
        assert len(target)==len(pred)==len(pred_strong)==3
        return T*(pred_strong-teacher_pred).abs().mean()
    s,t,y = torch.randn(6,5),torch.randn(6,5),torch.arange(3).repeat(2)
    term = Term(on_two_views(three), T=2.)
    assert term.name=='three'
    assert term.needs_labels
    objective = Objective([term])
    value = objective.values(objective.prepare(s, t, target=y))['three']
    torch.testing.assert_close(value, 2*(s[3:]-t[:3]).abs().mean())
    with pytest.raises(TypeError, match="three has no parameter 'temperature': its parameters are pred, teacher_pred"):
        Term(on_two_views(three), temperature=2.)

def strong_view(pred, teacher_pred, pred_strong, teacher_strong): return F.mse_loss(pred_strong, teacher_pred)

def test_one_view_is_an_error(teacher):
    "A batch of an odd number of samples has no two views."
    dls = digits(100, bs=25)
    learn = learner(KD(teacher, Term(on_two_views(strong_view))), dls)
    before = weights(learn)
    with pytest.raises(ValueError, match='got 25 samples: is TwoViews among the transforms'): fit(learn)
    assert torch.equal(weights(learn), before)
    with pytest.raises(ValueError, match="Expected view='weak' or 'strong', got 'both'"):
        by_view(teacher_right, 'both')
