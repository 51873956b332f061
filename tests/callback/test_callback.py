"Small training runs with the callback: its numbers, what is left after a fit, and the errors."
import math, pickle, re, sys, warnings
from contextlib import nullcontext
from copy import deepcopy
from functools import partial
import pytest, torch
import torch.nn.functional as F
from torch import nn
from fastai.basics import (Adam, BCEWithLogitsLossFlat, Callback, CancelBatchException, CancelEpochException,
    CancelFitException, CancelTrainException, CrossEntropyLossFlat, DataLoader, DataLoaders, L, Learner, Metric,
    Normalize, OptimWrapper, Pipeline, SGD, load_learner, noop, params, ranger, set_seed)
from fastai.callback.all import GradientAccumulation, MixUp, SchedLin
from kd_fastai.all import *
from kd_fastai.demo import digits, small_net
from kd_fastai.hooks.models import KDWarning
from kd_fastai.losses.facts import get_loss_info, loss_name
from kd_fastai import losses
from kd_fastai.losses import output, feature, relation
from support import (CPUMixedPrecision, KD, KeepBatches, KeepLosses, Never, fit, history, hooks, learner, quiet,
    trained_teacher, weights)

pytestmark = pytest.mark.filterwarnings('ignore::UserWarning')
FEATURE = [Attention, ActivationBoundaries, FitNet, Similarity, PKT, RKD]
LAYERS = {'student': ['0','1'], 'teacher': ['0','1']}

@pytest.fixture(scope='module')
def teacher():
    "A trained teacher with the student's shapes"
    return trained_teacher(4)

# ---- the numbers

def by_hand(teacher, losses, task_weight, n=2, lr=1e-2):
    "Do the same training in a plain PyTorch loop; returns the student"
    set_seed(0)
    dls,model = digits(100),small_net(4)
    opt = torch.optim.SGD(model.parameters(), lr)
    feats = {}
    for m,k in ((model,'s'), (teacher,'t')):
        for l in '01': m[int(l)].register_forward_hook(lambda _,i,o,k=k,l=l: feats.setdefault(k, {}).__setitem__(l, o))
    set_seed(1)
    teacher.eval()
    for _ in range(n):
        model.train()
        for x,y in dls.train:
            pred = model(x)
            with torch.no_grad(): teacher_pred = teacher(x)
            inputs = dict(pred=pred, teacher_pred=teacher_pred, fm_s=feats['s'], fm_t=feats['t'])
            loss = task_weight*F.cross_entropy(pred, y) + sum(w*f(**inputs) for f,w in losses)
            loss.backward(); opt.step(); opt.zero_grad()
    for m in (*model.modules(), *teacher.modules()): m._forward_hooks.clear()
    return model

def names(losses): return '+'.join(loss_name(f) for f,_ in losses) if isinstance(losses, list) else str(losses)

@pytest.mark.parametrize('losses,task_weight', [
    ([(partial(SoftTarget, T=4), 0.9)], 0.1),
    ([(Logits, 0.5)], 1.),
    ([(Mutual, 2.)], 0.),
    ([(Attention, 1000.), (SoftTarget, 1.)], 1.),
    ([(Similarity, 100.)], 0.5),
    ([(FitNet, 1.), (PKT, 1000.), (RKD, 0.1)], 1.),
    ([(ActivationBoundaries, 1.)], 1.)], ids=names)
def test_equals_hand_written_loop(teacher, losses, task_weight):
    "The student's weights are those of a plain loop, and not those of a training run without a teacher."
    sgd = partial(OptimWrapper, opt=torch.optim.SGD)
    hand = by_hand(teacher, losses, task_weight)
    kd = KD(teacher, [Term(f, w) for f,w in losses], LAYERS, task_weight=task_weight)
    ours,alone = fit(learner(kd, opt_func=sgd), 2),fit(learner(opt_func=sgd), 2)
    torch.testing.assert_close(weights(ours), weights(hand), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(weights(ours), weights(alone), atol=1e-3)

def test_weight_zero_is_plain_training(teacher):
    "With weight 0 the student's weights are those of plain training, and the column shows the term's value."
    kd = KD(teacher, [Term(SoftTarget, 0), Term(FitNet, 0)], '1')
    ours = fit(learner(kd))
    torch.testing.assert_close(weights(ours), weights(fit(learner())), rtol=0, atol=0)
    assert (history(ours)[['soft_target','fit_net']]>0).all(axis=None)

def test_a_loss_sees_the_teachers_output_for_the_current_batch(teacher):
    "The teacher runs in eval mode, whatever its own mode is, and its outputs have no graph."
    seen,teacher = [],deepcopy(teacher).train()
    def spy(pred, teacher_pred, target, fm_t): seen.append((teacher_pred, target, fm_t['1'])); return pred.sum()*0
    keep = KeepBatches()
    fit(learner([KD(teacher, spy, '1'), keep]))
    assert len(seen)==len(keep.batches)==5
    for (pred,y,f),(x,y_) in zip(seen, keep.batches):
        assert not pred.requires_grad
        assert not f.requires_grad
        with torch.no_grad(): torch.testing.assert_close(pred, teacher.eval()(x), rtol=0, atol=0)
        torch.testing.assert_close(f, teacher[:2](x), rtol=0, atol=0)
        assert (y==y_).all()

def test_crosswise_pairs_keep_their_order(teacher):
    "Pairs of layers in another order than the forward pass arrive as they were named."
    def values(fm_s, fm_t): seen.append((dict(fm_s), dict(fm_t))); return sum(f.sum() for f in fm_s.values())*0
    convs = [nn.Conv2d(1,8,3,padding=1), nn.Conv2d(8,8,3,padding=1)]
    seen,net = [],nn.Sequential(*convs, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8,10))
    t = deepcopy(net)
    fit(learner(KD(t, values, [('1','0'), ('0','1'), ('1','1')]), model=net))
    s,t_ = seen[0]
    assert [*s]==['1','0','1#2']
    assert [*t_]==['0','1','1#2']
    assert s['1'] is s['1#2']
    assert not torch.allclose(t_['0'], t_['1'])
    assert (t_['1']==t_['1#2']).all()

@pytest.mark.slow
@pytest.mark.parametrize('loss', [SoftTarget, Logits, Mutual, *FEATURE], ids=lambda f: f.__name__)
def test_a_loss_falls_at_its_default_weight(teacher, loss):
    "After training the loss is lower than in the same training with weight 0."
    def last(w):
        learn = learner(KD(teacher, Term(loss, w, name='term'), '1'))
        return history(fit(learn, 4)).term.iloc[-1]
    assert last(get_loss_info(loss).weight) < last(0)

def functions(*modules): return [n for m in modules for n in m.__all__ if hasattr(getattr(m, n), 'info')]

OTHER_LAYERS = {'FSP': ['0','1'], 'IRG': ['0','1','4'], 'SRD': '4', 'DarkRank': '4'}

# BoundedRegression needs numbers as labels, IFVD labels of positions: they have their own tests
@pytest.mark.slow
@pytest.mark.parametrize('name', [n for n in functions(output, feature, relation)
                                  if n not in ('BoundedRegression','IFVD')])
def test_every_loss_trains_a_learner(teacher, name):
    "With its default weight, each loss has a finite column and changes the student's weights."
    loss = partial(MiniLMv2, heads=2) if name=='MiniLMv2' else getattr(losses, name)
    term = Term(loss, get_loss_info(loss).weight, name='term')
    learn = fit(learner(KD(teacher, term, OTHER_LAYERS.get(name, '1'))))
    assert math.isfinite(history(learn).term.iloc[0])
    assert weights(learn).isfinite().all()
    assert not torch.equal(weights(learn), weights(fit(learner())))

def test_schedule_multiplies_the_weight_and_restarts_with_each_fit(teacher):
    keep = KeepLosses()
    def one(pred): return pred.sum()*0 + 1
    learn = learner([KD(teacher, Term(one, 2., schedule=SchedLin(0,1)), task_weight=0), keep])
    fit(learn); fit(learn)
    assert keep.losses==pytest.approx([2*i/5 for i in range(5)]*2)

def test_each_term_has_a_column_and_valid_loss_is_the_tasks(teacher):
    maps = Term(Attention, 1000, layers='0', name='maps')
    kd = KD(teacher, [SoftTarget, SoftTarget, maps])
    learn = fit(learner(kd), 2)
    h = history(learn)
    assert [*h]==['train_loss','valid_loss','accuracy','task_loss','soft_target','soft_target#2','maps']
    assert h.valid_loss.iloc[-1]==pytest.approx(F.cross_entropy(*learn.get_preds(act=noop)).item(), rel=1e-5)
    assert learn.validate()[0]==pytest.approx(h.valid_loss.iloc[-1])
    assert len(learn.validate())==2
    assert learn.metrics.attrgot('name')==['accuracy']

def test_columns_are_means_over_samples(teacher):
    dls = digits(95); dls.train.drop_last = False
    vals = []
    def spy(pred): vals.append((len(pred), pred.detach().pow(2).mean().item())); return pred.pow(2).mean()
    h = history(fit(learner(KD(teacher, spy), dls)))
    assert {n for n,_ in vals}=={20,15}
    assert h.spy.iloc[0]==pytest.approx(sum(n*v for n,v in vals)/95)

# ---- fastai's methods of training

@pytest.mark.slow
@pytest.mark.parametrize('train', [
    lambda l: l.fit_one_cycle(1, slice(1e-4,1e-2)), lambda l: l.fit_flat_cos(1, 1e-2), lambda l: l.fine_tune(1),
    lambda l: (l.freeze(), l.fit(1), l.unfreeze(), l.fit(1))],
    ids=['one_cycle slice', 'flat_cos', 'fine_tune', 'freeze'])
@pytest.mark.parametrize('opt', [Adam, ranger, partial(OptimWrapper, opt=torch.optim.AdamW)],
    ids=['Adam','ranger','AdamW'])
def test_fits_then_exports(teacher, train, opt, tmp_path):
    "A loss with weights of its own trains in each of fastai's schedules, and the Learner trains on after an export."
    own = Scale()
    def two_groups(m): return L(m[:2], m[2:]).map(params)
    learn = learner(KD(teacher, own, '1'), opt_func=opt, splitter=two_groups, path=tmp_path)
    train(learn)
    assert own.w.item()!=1
    assert [len(o) for o in learn.opt.param_lists]==[6,5]
    before = own.w.item()
    learn.export(); fit(learn)
    assert own.w.item()!=before

class Scale(nn.Module):
    "FitNet after a learned scale, which is created on the first batch"
    def build(self, fm_s, fm_t, pred, teacher_pred, student, teacher):
        assert isinstance(student, nn.Sequential)
        assert isinstance(teacher, nn.Sequential)
        self.w = nn.Parameter(torch.ones(1))
        self.start = torch.rand(1)
    def forward(self, fm_s, fm_t): return FitNet({k: self.w*v for k,v in fm_s.items()}, fm_t)

def test_creating_owned_weights_does_not_change_the_random_state(teacher):
    def plain(fm_s, fm_t): return FitNet(fm_s, fm_t)
    def run(loss): return weights(fit(learner(KD(teacher, loss, '1', weight=0.)))),torch.get_rng_state()
    (a,state_a),(b,state_b) = run(Scale()),run(plain)
    assert torch.equal(a, b)
    assert torch.equal(state_a, state_b)

def test_lr_find_restores_student_and_owned_weights(teacher):
    own = Scale()
    learn = fit(learner(KD(teacher, own, '1')))
    before,w = weights(learn),own.w.item()
    learn.lr_find(num_it=8, show_plot=False)
    assert (weights(learn)==before).all()
    assert own.w.item()==w
    assert not hooks(learn.model, teacher)
    assert [len(o) for o in learn.opt.param_lists]==[11]

@pytest.mark.parametrize('opt', [Adam, partial(OptimWrapper, opt=torch.optim.AdamW)], ids=['Adam','AdamW'])
def test_save_and_load_restore_owned_weights(teacher, opt, tmp_path):
    "Two fits with a save and a load between them give exactly the weights of two fits without."
    def new(dls=None): return learner(KD(teacher, Scale(), '1'), dls, path=tmp_path, opt_func=opt)
    a,b = fit(fit(new())),fit(new())
    b.save('m')
    c = fit(new(b.dls).load('m'))
    assert (weights(a)==weights(c)).all()
    assert (a.knowledge_distillation.terms[0].loss.w==c.knowledge_distillation.terms[0].loss.w).all()
    plain = learner(path=tmp_path, opt_func=opt).load('m')   # the student's file loads without the callback
    assert (weights(plain)==weights(b)).all()

@pytest.mark.slow
def test_indices_are_those_of_the_samples(teacher):
    "`idx` gives indices in the dataset for a shuffled DataLoader with two workers and a short last batch."
    ds,seen = digits(100).train_ds,[]
    dls = DataLoaders(DataLoader(ds, bs=30, shuffle=True, num_workers=2), DataLoader(ds, bs=30))
    def spy(pred, target, idx):
        seen.append(idx)
        assert (torch.stack([ds[i][1] for i in idx.tolist()])==target).all()
        return pred.mean()
    fit(learner(dls=dls), 2, cbs=KD(teacher, spy))
    assert [len(o) for o in seen]==[30,30,30,10]*2
    for epoch in (seen[:4], seen[4:]): assert sorted(torch.cat(epoch).tolist())==[*range(100)]
    assert (seen[0]!=seen[4]).any()

@pytest.mark.slow
def test_optional_indices_are_none_for_mixed_samples(teacher):
    seen = []
    def optional(pred, idx=None): seen.append(idx); return pred.mean()
    fit(learner(MixUp()), cbs=KD(teacher, optional))
    assert seen==[None]*5

@pytest.mark.slow
@pytest.mark.parametrize('adapt', [
    'auto', partial(make_adapter, kernel=3, bn=True), partial(make_adapter, orthogonal=True),
    ['auto', partial(make_adapter, kernel=3)]], ids=['auto','conv3x3+bn','orthogonal','list'])
def test_adapters_train_save_and_load(adapt, tmp_path):
    """Adapters between layers of other shapes train with the student and are restored by `load`.

    `lr_find` leaves them unchanged, and an exported Learner does not contain them."""
    big,pairs = small_net(8),[('0','1'),('1','0')]
    def begin(dls=None):
        cb = KD(big, Term(FitNet, 1.), pairs, adapt=adapt)
        return cb,learner(cb, dls, path=tmp_path)
    def owned(cb): return torch.cat([v.flatten() for v in cb.terms[0].module.state_dict().values()]).clone()
    cb,learn = begin()
    assert repr(cb).endswith('1·FitNet on 0→1, 1→0, adapted')
    fit(learn); first = owned(cb); fit(learn, 2)
    assert (owned(cb)!=first).any()
    assert history(learn).fit_net.is_monotonic_decreasing
    cb1,a = begin(); fit(a); a.save('adapted')
    cb2,b = begin(a.dls); b.load('adapted'); fit(b, 2)
    assert (owned(cb2)==owned(cb)).all()
    assert (weights(b)==weights(learn)).all()
    first = owned(cb)
    learn.lr_find(num_it=10, show_plot=False, suggest_funcs=())
    assert (owned(cb)==first).all()
    learn.export('l.pkl')
    fit(learner(path=tmp_path), 3).export('p.pkl')
    size,plain = ((tmp_path/o).stat().st_size for o in ('l.pkl','p.pkl'))
    assert size==pytest.approx(plain, rel=0.01)

def test_auto_adapts_only_what_the_loss_compares(teacher):
    def made(loss, layers):
        cb = KD(teacher, loss, layers, adapt='auto')
        fit(learner(cb))
        return [type(o).__name__ for o in cb.terms[0].module.adapters]
    assert made(FitNet, ['0',('0','1')])==['FeatureAdapter','FeatureAdapter']  # the first has no weights
    assert made(Attention, [('0','1')])==['FeatureAdapter']
    assert made(Similarity, [('0','1')])==['Identity']

def test_mixed_precision_computes_losses_in_float32(teacher):
    seen = []
    def spy(pred, teacher_pred, fm_s, fm_t):
        s,t = fm_s['1'],fm_t['1']
        seen.append({o.dtype for o in (pred, teacher_pred, s, t, s.flatten(1)@t.flatten(1).T)})
        return FitNet(fm_s, fm_t)
    fit(learner([KD(teacher, spy, '1'), CPUMixedPrecision(amp_mode='bf16')]))
    assert seen==[{torch.float32}]*5

def test_accumulation_equals_one_large_batch(teacher):
    def net(): set_seed(3); return nn.Sequential(nn.Flatten(), nn.Linear(64,16), nn.Tanh(), nn.Linear(16,10))
    t = net(); t[1].weight.data.mul_(2)
    def run(bs, cbs):
        kd = KD(t, [Term(SoftTarget, 0.5), Term(FitNet, 1., layers='2')])
        return weights(fit(learner([kd, *cbs], digits(100, bs=bs), net(), opt_func=SGD)))
    torch.testing.assert_close(run(20, [GradientAccumulation(100)]), run(100, []), rtol=1e-4, atol=1e-6)

# ---- classes, labels, vocabularies

def test_classes_last_and_ignored_positions():
    "A language model has its classes on the last axis, and `ignore_index` marks padding, which no loss sees."
    class LM(nn.Module):
        def __init__(self): super().__init__(); self.emb,self.head = nn.Embedding(12,8),nn.Linear(8,12)
        def forward(self, x): return self.head(self.emb(x))
    x = torch.randint(0,12,(40,6)); y = x.roll(-1,1); y[:,-2:] = -100
    ds = list(zip(x,y))
    dls,seen = DataLoaders.from_dsets(ds, ds[:8], bs=8, num_workers=0),[]
    def spy(pred, teacher_pred, target): seen.append((pred.shape, target)); return SoftTarget(pred, teacher_pred)
    learn = quiet(Learner(dls, LM(), loss_func=CrossEntropyLossFlat(ignore_index=-100), cbs=KD(LM(), spy)))
    learn.fit(1)
    assert seen[0][0]==(8*4,12)
    assert (seen[0][1]!=-100).all()

def test_samples_without_a_label_are_distilled(teacher):
    "A loss that reads labels gets only the samples that have one."
    seen = []
    def soft(pred, teacher_pred): seen.append(len(pred)); return SoftTarget(pred, teacher_pred)
    def hard(pred, target): seen.append(target); return F.cross_entropy(pred, target)
    dls = digits(100); y = dls.train.dataset.tensors[1]; y[::2] = -100
    fit(learner(KD(teacher, [soft, hard]), dls))
    assert seen[::2]==[20]*5
    assert sum(map(len, seen[1::2]))==50
    assert all((o>=0).all() for o in seen[1::2])

def test_without_any_label_a_loss_that_reads_labels_is_zero(teacher):
    dls = digits(100); dls.train.dataset.tensors[1][:] = -100
    def hard(pred, target): return F.cross_entropy(pred, target)
    learn = learner(dls=dls)
    fit(learn, cbs=KD(teacher, [SoftTarget, hard], task_weight=0))
    assert weights(learn).isfinite().all()
    assert history(learn).hard.iloc[0]==0

def learner_with(vocab=None, norm=None, width=4):
    dls = digits(100)
    if norm is not None:
        dls.train.after_batch = dls.valid.after_batch = Pipeline([Normalize.from_stats([norm], [1.], cuda=False)])
    if vocab: dls.train.vocab = vocab
    return learner(dls=dls, model=small_net(width))

def test_other_vocabulary_or_normalization_is_an_error():
    fit(learner_with(['a','b']), cbs=KD(learner_with(['a','b']), SoftTarget))
    with pytest.raises(ValueError, match=r"different vocabularies.*student: \['a', 'b'\], teacher: \['b', 'a'\]"):
        fit(learner_with(['a','b']), cbs=KD(learner_with(['b','a']), SoftTarget))
    # features do not depend on the order of classes
    fit(learner_with(['a','b']), cbs=KD(learner_with(['b','a']), FitNet, '1'))
    with pytest.raises(ValueError, match=r"normalized differently. student: not at all, teacher: mean \[0.5\]"):
        fit(learner_with(), cbs=KD(learner_with(norm=0.5), FitNet, '1'))
    fit(learner_with(), cbs=KD(learner_with(norm=0.5), FitNet, '1', teacher_tfm=lambda x: x-0.5))

def test_a_teacher_can_be_the_path_of_an_exported_learner(teacher, tmp_path):
    t = fit(learner(path=tmp_path)); t.export('t.pkl')
    with pytest.warns(UserWarning, match='insecure pickle'): kd = KD(tmp_path/'t.pkl', SoftTarget)
    other = KD(t, SoftTarget)
    assert (weights(fit(learner(kd)))==weights(fit(learner(other)))).all()

def test_warns_of_a_small_weight_and_of_a_loss_that_does_not_fit(teacher):
    def said(learn, n=1):
        with warnings.catch_warnings(record=True) as ws:
            warnings.simplefilter('always')
            fit(learn, n); fit(learn, n)
        return [str(w.message) for w in ws if issubclass(w.category, KDWarning)]
    (w,) = said(learner(KD(teacher, Attention, '1', weight=1e-3)))
    assert 'attention adds' in w
    assert 'default weight is 1000' in w
    assert not said(learner(KD(teacher, SoftTarget)))
    ds = [(torch.rand(4), torch.rand(3).round()) for _ in range(16)]
    dls = DataLoaders.from_dsets(ds, ds, bs=8, num_workers=0)
    kd = KD(nn.Linear(4,3), SoftTarget)
    (w,) = said(quiet(Learner(dls, nn.Linear(4,3), loss_func=BCEWithLogitsLossFlat(), cbs=kd)))
    assert 'soft_target' in w
    assert 'BCEWithLogitsLoss: use Logits or MultiLabel' in w

# ---- nothing stays after a fit

class Fault:
    "Raises `ex` at call number `at`, and counts how often it did"
    def __init__(self, ex, at=3): self.ex,self.at,self.calls,self.fired = ex,at,0,0
    def __call__(self):
        self.calls += 1
        if self.calls!=self.at: return
        self.fired += 1
        raise self.ex

class BrokenEvent(Callback):
    def __init__(self, event, fault): setattr(self, event, fault)

class BrokenLayer(nn.Module):
    def __init__(self, fault): super().__init__(); self.fault = fault
    def forward(self, x): self.fault(); return x

class BrokenMetric(Metric):
    value = 0.
    def __init__(self, fault): self.fault = fault
    def accumulate(self, learn): self.fault()

def fine(pred, teacher_pred, fm_s, fm_t): return SoftTarget(pred, teacher_pred)+FitNet(fm_s, fm_t)

def broken_loss(fault):
    def broken(pred, teacher_pred, fm_s, fm_t):
        fault()
        return fine(pred, teacher_pred, fm_s, fm_t)
    return broken

ERRORS = [partial(RuntimeError, 'boom'), ValueError, KeyboardInterrupt]
CANCELS = [CancelFitException, CancelEpochException, CancelTrainException, CancelBatchException]
IN_A_BATCH = ['before_batch','after_pred','after_loss','before_backward','before_step','after_step','loss','teacher',
    'student']
CAUGHT = {   # by fastai, in each phase; `metric` is in the batches of the validation set
    **{phase: CANCELS for phase in IN_A_BATCH}, 'after_batch': CANCELS[:3], 'metric': CANCELS[:2],
    'after_epoch': CANCELS[:1], 'before_fit': CANCELS[:1]}

def surfaces(ex, phase):
    "The context that the fit runs in: `pytest.raises` for an exception that fastai does not catch"
    if type(ex) in CAUGHT[phase]: return nullcontext()
    if ex.args: return pytest.raises(type(ex), match='boom')
    # without a message: fastai adds one, or raises an IndexError where it extends it
    expected = (type(ex),IndexError) if type(ex) is ValueError else type(ex)
    return pytest.raises(expected, match=f'^$|{type(ex).__name__} in|tuple index out of range')

@pytest.fixture
def captures(monkeypatch):
    "All objects of the class `Capture` that are created in a test"
    created,init = [],Capture.__init__
    def remember(self, *args, **kwargs):
        created.append(self)
        init(self, *args, **kwargs)
    monkeypatch.setattr(Capture, '__init__', remember)
    return created

def slow(o): return pytest.param(o, marks=pytest.mark.slow)

# 182 cases; the quick run has one exception in each phase
@pytest.mark.parametrize('kept', [True, slow(False)], ids=['permanent','fit(cbs)'])
@pytest.mark.parametrize('phase', CAUGHT)
@pytest.mark.parametrize('ex', [ERRORS[0], *map(slow, ERRORS[1:]+CANCELS)],
    ids=lambda e: getattr(e, 'func', e).__name__)
def test_nothing_stays(teacher, captures, ex, phase, kept):
    """After an exception in any phase, models, metrics and Learner are as they were before the fit.

    The next fit gives the weights of a Learner that never failed."""
    ex = ex()
    fault = Fault(ex, at=1 if phase in ('metric','after_epoch','before_fit') else 3)
    t = deepcopy(teacher); t.train(); t[1][1].eval()
    modes,before = [m.training for m in t.modules()],deepcopy(t.state_dict())
    model = small_net(4)
    if phase=='teacher': t.add_module('6', BrokenLayer(fault))
    if phase=='student': model.add_module('6', BrokenLayer(fault))
    kd = KD(t, broken_loss(fault) if phase=='loss' else fine, '1', weight=0.5)
    learn = learner(kd if kept else None, model=model)
    if phase=='metric': learn.metrics = [BrokenMetric(fault)]
    event = [BrokenEvent(phase, fault)] if phase.startswith(('before','after')) else []
    metrics = learn.metrics.attrgot('name')
    with surfaces(ex, phase): learn.fit(1, cbs=event if kept else [kd, *event])
    assert fault.fired==1
    if phase!='before_fit': assert len(captures)>=2
    for c in captures: assert not c.outputs
    assert hooks(t, learn.model)==0
    assert learn.metrics.attrgot('name')==metrics
    assert [m.training for m in t.modules()][:len(modes)]==modes
    for p in t.parameters(): assert p.grad is None
    for p in t.parameters(): assert p.requires_grad
    for k,v in before.items(): assert (t.state_dict()[k]==v).all()
    if not kept: assert not {'fit','save','load'}&{*learn.__dict__}
    fault.ex = None   # an exception with a traceback cannot be pickled
    pickle.dumps(learn.model)
    fresh = learner(model=small_net(4))
    learn.model.load_state_dict(fresh.model.state_dict())
    for l,cb in ((learn, None if kept else kd), (fresh, KD(teacher, fine, '1', weight=0.5))):
        l.dls,l.metrics,l.loss_func = digits(100),[],CrossEntropyLossFlat()
        l.model.zero_grad()    # fastai leaves the gradients of a step that was not taken
        fit(l, cbs=cb, reset_opt=True)
    assert torch.equal(weights(learn), weights(fresh))

def test_the_teacher_is_not_trained(teacher):
    before = deepcopy(teacher.state_dict())
    fit(learner(KD(teacher, [SoftTarget, Term(FitNet)], '1')), 2)
    for k,v in teacher.state_dict().items(): assert (v==before[k]).all()
    for p in teacher.parameters(): assert p.grad is None

def test_outside_a_fit(teacher, tmp_path):
    "validate, get_preds and summary work before any fit and do not run the teacher."
    learn = learner(KD(Never(), SoftTarget))
    plain = learner()
    assert learn.validate()==plain.validate()
    assert (learn.get_preds()[0]==plain.get_preds()[0]).all()
    assert learn.summary()

def test_a_copied_learner_distills(teacher):
    a = fit(learner(KD(teacher, Scale(), '1')))
    b = deepcopy(a)
    assert b.knowledge_distillation.teacher is a.knowledge_distillation.teacher
    assert b.knowledge_distillation.learn is b
    before = weights(a)
    fit(b)
    owned_a,owned_b = (o.knowledge_distillation.terms[0].loss.w.item() for o in (a,b))
    assert (weights(a)==before).all()
    assert owned_b!=owned_a
    fit(a)
    assert torch.equal(weights(a), weights(b))
    assert not hooks(teacher, a.model, b.model)

@pytest.mark.slow
def test_an_exported_learner_holds_only_the_student(teacher, tmp_path, monkeypatch):
    "The file has the size of one without distillation, within 1%, and loads where kd_fastai is not installed."
    ds = [(torch.rand(1,8,8), i%10) for i in range(40)]
    def trained(cbs):
        dls = DataLoaders.from_dsets(L(ds), L(ds), bs=20, num_workers=0)
        learn = learner(cbs, dls, small_net(16), path=tmp_path)
        dls.new_empty = lambda: DataLoaders.from_dsets(L(), L(), bs=20)
        fit(learn, 1)
        return learn
    sizes = []
    for file,kd in (('a.pkl', None), ('b.pkl', KD(small_net(64), [SoftTarget, Term(Attention, 1000)], '1'))):
        learn = trained(kd)
        learn.recorder.metric_names = learn.recorder.values = None
        learn.export(file)
        sizes.append((tmp_path/file).stat().st_size)
    assert sizes[1]==pytest.approx(sizes[0], rel=0.01)
    for m in [m for m in sys.modules if m.startswith('kd_fastai')]: monkeypatch.delitem(sys.modules, m)
    monkeypatch.setitem(sys.modules, 'kd_fastai', None)   # as where it is not installed
    assert load_learner(tmp_path/'b.pkl').model(torch.rand(2,1,8,8)).shape==(2,10)

def test_two_callbacks_equal_one_with_both_losses(teacher):
    kd1,kd2 = KD(teacher, SoftTarget, task_weight=0.5),KD(deepcopy(teacher), FitNet, '1')
    both = fit(learner([kd1, kd2]))
    one = fit(learner(KD(teacher, [SoftTarget, FitNet], '1', task_weight=0.5)))
    torch.testing.assert_close(weights(both), weights(one), rtol=1e-4, atol=1e-5)
    assert [*history(both)][3:]==['task_loss','soft_target','fit_net']
    for order in ([kd1,kd2], [kd2,kd1]):
        both.remove_cbs(order)
        assert both.metrics.attrgot('name')==['accuracy']
        assert 'fit' not in both.__dict__
        both.add_cbs([kd1,kd2])

def test_a_second_callback_must_not_weight_the_task(teacher):
    kd1,kd2 = KD(teacher, SoftTarget),KD(deepcopy(teacher), Logits, task_weight=0.1)
    with pytest.raises(ValueError, match='leave task_weight at 1'): fit(learner([kd1, kd2]))

def test_auto_of_a_second_callback_needs_the_task_loss(teacher):
    kd1,kd2 = KD(teacher, SoftTarget, weight=1., task_weight=0),KD(deepcopy(teacher), Logits, weight='auto')
    with pytest.raises(ValueError, match='give weights of logits'): fit(learner([kd1, kd2]))
    fit(learner([KD(teacher, SoftTarget, weight=1., task_weight=0), KD(deepcopy(teacher), Logits, weight=0.1)]))

# ---- errors

T = small_net(4)
def kd(*args, **kwargs): return lambda: KD(T, *args, **kwargs)
def labelled(pred, target): return F.cross_entropy(pred, target)
def vector(pred): return pred.mean(1)
def number(pred): return 1.
def nan(pred): return pred.mean()*float('nan')
def detached(fm_s): return sum(f.detach().mean() for f in fm_s.values())
def indexed(pred, idx): return pred.mean()
def linear(n): return nn.Sequential(nn.Flatten(), nn.Linear(64,n))
class Lazy(nn.Module):
    def forward(self, pred): return pred.mean()

BAD_ARGUMENTS = {
    'no teacher':            (lambda: KD(None, SoftTarget), TypeError, 'got NoneType'),
    'teacher class':         (lambda: KD(nn.Linear, SoftTarget), TypeError, 'the class Linear'),
    'teacher function':      (lambda: KD(lambda x: x, SoftTarget), TypeError, 'got function'),
    'no file':               (lambda: KD('nowhere.pkl', SoftTarget), FileNotFoundError, 'nowhere.pkl'),
    'loss is a name':        (kd('SoftTarget'), TypeError, "got 'SoftTarget'"),
    'loss is a class':       (kd(Lazy), TypeError, 'pass an instance'),
    'no loss':               (kd([]), ValueError, 'at least one loss'),
    'loss is None':          (kd(None), TypeError, 'got None'),
    'typo in partial':       (kd(partial(SoftTarget, temperature=4)), TypeError,
        'its parameters are pred, teacher_pred, T'),
    'positional partial':    (kd(partial(SoftTarget, 4)), TypeError, 'by keyword'),
    'unknown requirement':   (kd(lambda pred, alpha: pred.mean()), TypeError, 'requires alpha'),
    'weight nan':            (kd(SoftTarget, weight=float('nan')), ValueError, 'finite, got nan'),
    'weight inf':            (kd(Term(SoftTarget, 1.), weight=float('inf')), ValueError, 'finite, got inf'),
    'weight str':            (kd(SoftTarget, weight='much'), TypeError, "got 'much'"),
    'task weight':           (kd(SoftTarget, task_weight=None), TypeError, 'task_weight must be a number'),
    'term weight':           (lambda: Term(SoftTarget, float('nan')), ValueError, 'weight of SoftTarget'),
    'schedule number':       (kd(SoftTarget, schedule=0.5), TypeError, 'SchedCos'),
    'schedule nan':          (kd(SoftTarget, schedule=lambda p: float('nan')), ValueError, 'value at 0.0'),
    'schedule none':         (kd(SoftTarget, schedule=lambda p: None), TypeError, 'must be a number'),
    'no layers':             (kd(Attention), ValueError, 'no layers are named'),
    'empty layers':          (kd(Attention, []), ValueError, 'no layers are named'),
    'term without layers':   (kd([SoftTarget, Term(FitNet)]), ValueError, 'FitNet compares features'),
    'layer number':          (kd(Attention, [1]), TypeError, 'got 1'),
    'layer module':          (kd(Attention, T[0]), TypeError, 'got'),
    'layers generator':      (kd(Attention, (o for o in '01')), TypeError, 'list of names'),
    'triple':                (kd(Attention, [('0','1','2')]), TypeError, "got ('0', '1', '2')"),
    'layer and number':      (kd(Attention, [('0', 1)]), TypeError, "got ('0', 1)"),
    'tuple of a function and teacher': (kd(Attention, [('0', ('1', len))], ['0']), ValueError,
        'leave out activations_teacher'),
    'tuples and teacher':    (kd(Attention, [('0','1')], ['0']), ValueError, 'leave out activations_teacher'),
    'dict and teacher':      (kd(Attention, LAYERS, ['0']), ValueError, 'leave out activations_teacher'),
    'dict keys':             (kd(Attention, {'s':['0'], 't':['0']}), ValueError, "'student' and 'teacher'"),
    'unequal lists':         (kd(Attention, ['0','1'], ['0']), ValueError, "got 2 (['0', '1']) and 1 (['0'])"),
    'only teacher layers':   (kd(Attention, None, ['0']), ValueError, 'give activations_student too'),
    'teacher layer':         (kd(Attention, [('0','9')]), ValueError, "teacher: No layer '9'"),
    'teacher layer model.':  (kd(Attention, [('0','model.1')]), ValueError, "use '1'"),
    'adapt word':            (kd(FitNet, '1', adapt='conv'), TypeError, "adapt is 'auto', a function"),
    'adapt class':           (kd(FitNet, '1', adapt=nn.Conv2d), TypeError, "adapt is 'auto', a function"),
    'adapt predictions':     (lambda: Term(SoftTarget, adapt='auto'), ValueError,
        'adapt is for losses on features, got SoftTarget'),
}

BAD_TRAININGS = {
    'picks no tensor':       (kd(FitNet, ('0', lambda o: None)), TypeError, 'returns NoneType, not a tensor'),
    'picks what is not there': (kd(FitNet, ('0', lambda o: o['x'])), ValueError, 'has no item'),
    'student layer':         (kd(Attention, [('9','0')]), ValueError, "student: No layer '9'"),
    'itself':                ('itself', ValueError, 'share 11 of their layers'),
    'one position':          (kd(Attention, '3'), ValueError, 'has one position'),
    'shapes':                (lambda: KD(small_net(8), FitNet, '1'), ValueError,
        "'1' (20, 8, 4, 4) of the student and '1' (20, 16, 4, 4) of the teacher"),
    'sizes':                 (kd(Attention, [('0','1')]), ValueError, 'equal batch and spatial sizes'),
    'unequal dict':          (kd(FitNet, {'student':['0'], 'teacher':['0','1']}), ValueError, 'got 1 and 2'),
    'classes':               (lambda: KD(linear(7), SoftTarget), ValueError,
        '(20, 10) of the student and (20, 7) of the teacher'),
    'one column':            (lambda: KD(linear(1), SoftTarget), ValueError, '(20, 1) of the teacher'),
    'temperature':           (kd(partial(SoftTarget, T=0)), ValueError, 'got T=0'),
    'RKD of nothing':        (kd(partial(RKD, distance=0, angle=0), '1'), ValueError, 'compares nothing'),
    'no scalar':             (kd(vector), TypeError, 'one of shape (20,)'),
    'no tensor':             (kd(number), TypeError, 'must return a scalar tensor, got float'),
    'nan':                   (kd(nan, weight=0.5), FloatingPointError, 'nan is nan in epoch 0, batch 0'),
    'detached':              (kd(detached, '1'), ValueError, 'gives the student no gradient'),
    'indices of mixed':      ('mixed', ValueError,
        'indexed needs idx: A sample that MixUp mixed of two has no index'),
    'indices elsewhere':     ('elsewhere', ValueError, 'got DataLoader: its samples have no index'),
    'adapt too many':        (kd(FitNet, '1', adapt=['auto','auto']), ValueError,
        'for each of 1 pairs of layers, got 2'),
    'adapt none too many':   (kd(FitNet, ['0','1'], adapt=nn.Conv2d(4,4,1)), ValueError,
        'for each of 2 pairs of layers, got 1'),
    'adapter that fails':    (kd(FitNet, [('5','0')], adapt='auto'), ValueError, 'an embedding has no positions'),
    'adapter of the wrong shape': (kd(FitNet, '1', adapt=nn.Conv2d(8,3,1)), ValueError,
        "'1' (20, 3, 4, 4) of the student"),
    'layer of a tuple':      ('tuple', TypeError, "pick an item, for example 'rnn:0'"),
    'layer not reached':     ('unreached', RuntimeError, "'spare' did not run"),
    'layer twice':           ('twice', RuntimeError, 'ran 2 times'),
    'in place':              ('inplace', RuntimeError, 'changed in place'),
    'data parallel':         ('parallel', ValueError, 'over 2 devices'),
    'no target':             ('no target', ValueError, 'no target'),
    'no tensor from teacher':('dict', TypeError, 'Expected a tensor of predictions'),
}

class Odd(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn,self.lin = nn.LSTM(8,10,batch_first=True),nn.Linear(10,10)
        self.act,self.spare,self.inplace = nn.ReLU(),nn.ReLU(),nn.ReLU(inplace=True)
    def forward(self, x):
        last = self.rnn(x[:,0])[0][:,-1]
        return self.inplace(self.lin(self.act(self.act(last))))

def special(name):
    "The Learner and the callback of a case that needs more than a callback"
    odd = {'tuple':'rnn', 'unreached':'spare', 'twice':'act', 'inplace':'lin'}
    if name in odd: return learner(model=Odd()),KD(Odd(), FitNet, odd[name])
    if name=='itself': l = learner(); return l,KD(l.model, SoftTarget)
    if name=='parallel':
        m = nn.DataParallel(small_net(4)); m.device_ids = [0,1]; return learner(model=m),kd(SoftTarget)()
    if name=='mixed': return learner(MixUp()),kd(indexed)()
    if name=='elsewhere':
        dls = DataLoaders(*(torch.utils.data.DataLoader(o.dataset, 20) for o in digits(100).loaders))
        return learner(dls=dls),kd(indexed)()
    if name=='dict':
        class D(nn.Module):
            def forward(self, x): return {'loss': x.sum()}
        return learner(),KD(D(), SoftTarget)
    ds = [(torch.rand(1,8,8),) for _ in range(40)]
    dls = DataLoaders.from_dsets(ds, ds, bs=20, num_workers=0)
    return learner(dls=dls),kd(SoftTarget)()

@pytest.mark.parametrize('name', BAD_ARGUMENTS)
def test_bad_arguments_are_an_error(name):
    "The error says what was expected and what came."
    make,ex,text = BAD_ARGUMENTS[name]
    with pytest.raises(ex, match=re.escape(text)): make()

@pytest.mark.parametrize('name', BAD_TRAININGS)
def test_bad_trainings_are_an_error(name):
    "The error comes before any step of the optimizer, and changes nothing."
    make,ex,text = BAD_TRAININGS[name]
    learn,cb = special(make) if isinstance(make, str) else (learner(),make())
    before,metrics,modes = weights(learn),[*learn.metrics],[m.training for m in cb.teacher.model.modules()]
    with pytest.raises(ex, match=re.escape(text)): learn.fit(1, cbs=cb)
    assert (weights(learn)==before).all()
    assert [*learn.metrics]==metrics
    assert hooks(learn.model, cb.teacher.model)==0
    if make!='itself': assert [m.training for m in cb.teacher.model.modules()]==modes
    for s in learn.opt.state.values(): assert 'grad_avg' not in s   # which the first step creates

def test_frozen_layers_give_a_warning(teacher):
    def two_groups(m): return L(m[:2], m[2:]).map(params)
    learn = learner(KD(teacher, FitNet, '0', weight=1.), splitter=two_groups, train_bn=False)
    learn.freeze()
    with pytest.warns(UserWarning, match="are frozen: fit_net has no effect"): fit(learn)

@pytest.mark.slow
def test_a_model_compiled_and_run_before_is_an_error(teacher):
    "Such a model ignores hooks; the error names `torch._dynamo.reset()`, after which the same training works."
    torch._dynamo.reset()
    model = torch.compile(small_net(4), backend='eager')
    learn = learner(model=model)
    for mode in (False,True): model.train(mode); model(torch.rand(20,1,8,8))
    with pytest.raises(RuntimeError, match=r"'1' did not run in this forward.*torch._dynamo.reset\(\)"):
        fit(learn, cbs=KD(teacher, FitNet, '1'))
    torch._dynamo.reset()
    a = fit(learner(model=torch.compile(small_net(4), backend='eager')), cbs=KD(teacher, FitNet, '1'))
    assert 'fit_net' in a.recorder.metric_names
    assert history(a).fit_net.iloc[0]>0
    torch._dynamo.reset()
