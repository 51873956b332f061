"Whole (tiny) trainings with the callback: its numbers, what it leaves behind, and what it refuses."
import pickle, subprocess, sys, warnings
from contextlib import suppress
from copy import deepcopy
from functools import partial
import pytest, torch
import torch.nn.functional as F
from torch import nn
from fastai.basics import *
from fastai.callback.all import *
from kd_fastai.all import *
from kd_fastai.demo import digits, small_net
from kd_fastai.info import get_loss_info
from kd_fastai.signature import loss_name
from kd_fastai import losses
from kd_fastai.losses import output, feature, relation

for o in [*globals()]:
    if o=='test' or o.startswith('test_'): del globals()[o]  # fastcore's own helpers, which pytest would take for tests

pytestmark = pytest.mark.filterwarnings('ignore::UserWarning')
FEATURE = [Attention, ActivationBoundaries, FitNet, Similarity, PKT, RKD]
LAYERS = {'student': ['0','1'], 'teacher': ['0','1']}

@pytest.fixture(scope='module')
def teacher():
    "A trained teacher, of the student's shapes"
    set_seed(9)
    learn = Learner(digits(), small_net(4), loss_func=CrossEntropyLossFlat(), metrics=accuracy)
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(3, 1e-2)
    learn.model.zero_grad(set_to_none=True)
    return learn.model

def learner(cbs=None, dls=None, model=None, loss_func=None, **kwargs):
    set_seed(0)
    learn = Learner(dls or digits(100), model or small_net(4), loss_func=loss_func or CrossEntropyLossFlat(), metrics=accuracy, cbs=cbs, **kwargs)
    learn.remove_cb(ProgressCallback)
    learn.logger = noop
    return learn

def fit(learn, n=1, lr=1e-2, **kwargs):
    set_seed(1)
    learn.fit(n, lr, **kwargs)
    return learn

def weights(m): return torch.cat([p.detach().flatten().clone() for p in getattr(m, 'model', m).parameters()])
def hooks(*models): return sum(len(o._forward_hooks)+len(o._forward_pre_hooks) for m in models for o in m.modules())
def history(learn): return pd.DataFrame(learn.recorder.values, columns=learn.recorder.metric_names[1:-1])

# ---- the numbers

def by_hand(teacher, losses, task_weight, n=2, lr=1e-2):
    "The same training as a plain PyTorch loop"
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
            loss = task_weight*F.cross_entropy(pred, y) + sum(w*f(pred=pred, teacher_pred=teacher_pred, fm_s=feats['s'], fm_t=feats['t']) for f,w in losses)
            loss.backward(); opt.step(); opt.zero_grad()
    for m in (*model.modules(), *teacher.modules()): m._forward_hooks.clear()
    return model

@pytest.mark.parametrize('losses,task_weight', [
    ([(partial(SoftTarget, T=4), 0.9)], 0.1), ([(Logits, 0.5)], 1.), ([(Mutual, 2.)], 0.), ([(Attention, 1000.), (SoftTarget, 1.)], 1.),
    ([(Similarity, 100.)], 0.5), ([(FitNet, 1.), (PKT, 1000.), (RKD, 0.1)], 1.), ([(ActivationBoundaries, 1.)], 1.)], ids=lambda o: '+'.join(loss_name(f) for f,_ in o) if isinstance(o, list) else str(o))
def test_equals_hand_written_loop(teacher, losses, task_weight):
    hand = by_hand(teacher, losses, task_weight)
    kd = KnowledgeDistillationCallback(teacher, [Term(f, w) for f,w in losses], LAYERS, task_weight=task_weight)
    ours = fit(learner(kd, opt_func=partial(OptimWrapper, opt=torch.optim.SGD)), 2)
    torch.testing.assert_close(weights(ours), weights(hand), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(weights(ours), weights(fit(learner(opt_func=partial(OptimWrapper, opt=torch.optim.SGD)), 2)), atol=1e-3)

def test_weight_zero_is_plain_training(teacher):
    "and its column shows what the term would be"
    kd = KnowledgeDistillationCallback(teacher, [Term(SoftTarget, 0), Term(FitNet, 0)], '1')
    ours = fit(learner(kd))
    torch.testing.assert_close(weights(ours), weights(fit(learner())), rtol=0, atol=0)
    assert (history(ours)[['soft_target','fit_net']]>0).all(axis=None)

def test_a_loss_sees_the_teachers_answer_to_this_very_batch(teacher):
    "in eval mode whatever its own mode, and without a graph"
    seen,teacher = [],deepcopy(teacher).train()
    def spy(pred, teacher_pred, target, fm_t): seen.append((teacher_pred, target, fm_t['1'])); return pred.sum()*0
    class Keep(Callback):
        batches = []
        def after_loss(self):
            if self.training: self.batches.append((self.x.clone(), self.y.clone()))
    keep = Keep(); keep.batches = []
    fit(learner([KnowledgeDistillationCallback(teacher, spy, '1'), keep]))
    assert len(seen)==len(keep.batches)==5
    for (pred,y,f),(x,y_) in zip(seen, keep.batches):
        assert not pred.requires_grad and not f.requires_grad
        with torch.no_grad(): torch.testing.assert_close(pred, teacher.eval()(x), rtol=0, atol=0)
        torch.testing.assert_close(f, teacher[:2](x), rtol=0, atol=0)
        assert (y==y_).all()

def test_crosswise_pairs_are_told_apart(teacher):
    def values(fm_s, fm_t): seen.append((dict(fm_s), dict(fm_t))); return sum(f.sum() for f in fm_s.values())*0
    seen,net = [],nn.Sequential(nn.Conv2d(1,8,3,padding=1), nn.Conv2d(8,8,3,padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8,10))
    t = deepcopy(net)
    fit(learner(KnowledgeDistillationCallback(t, values, [('1','0'), ('0','1'), ('1','1')]), model=net))
    s,t_ = seen[0]
    assert [*s]==['1','0','1#2'] and [*t_]==['0','1','1#2']
    assert s['1'] is s['1#2'] and not torch.allclose(t_['0'], t_['1'])
    assert (t_['1']==t_['1#2']).all()

@pytest.mark.parametrize('loss', [SoftTarget, Logits, Mutual, *FEATURE], ids=lambda f: f.__name__)
def test_falls_at_its_default_weight(teacher, loss):
    "against the same training in which it only watches"
    def last(w): return history(fit(learner(KnowledgeDistillationCallback(teacher, Term(loss, w, name='term'), '1')), 4)).term.iloc[-1]
    assert last(get_loss_info(loss).weight) < last(0)

@pytest.mark.parametrize('name', [n for m in (output, feature, relation) for n in m.__all__ if hasattr(getattr(m, n), 'info') and n!='BoundedRegression'])
def test_every_loss_trains_a_learner(teacher, name):
    "with its default weight, and its value in the table (BoundedRegression, which wants numbers for labels, has its own tests)"
    loss,layers = getattr(losses, name),{'FSP': ['0','1'], 'IRG': ['0','1','4'], 'SRD': '4', 'DarkRank': '4'}.get(name, '1')
    learn = fit(learner(KnowledgeDistillationCallback(teacher, Term(loss, get_loss_info(loss).weight, name='term'), layers)))
    assert math.isfinite(history(learn).term.iloc[0]) and weights(learn).isfinite().all()
    assert not torch.equal(weights(learn), weights(fit(learner())))

def test_schedule_multiplies_and_begins_anew(teacher):
    seen = []
    class Watch(Callback):
        order = KnowledgeDistillationCallback.order+1
        def after_loss(self):
            if self.training: seen.append(self.loss.item())
    def one(pred): return pred.sum()*0 + 1
    learn = learner([KnowledgeDistillationCallback(teacher, Term(one, 2., schedule=SchedLin(0,1)), task_weight=0), Watch()])
    fit(learn); fit(learn)
    assert seen==pytest.approx([2*i/5 for i in range(5)]*2)

def test_columns_and_valid_loss(teacher):
    kd = KnowledgeDistillationCallback(teacher, [SoftTarget, SoftTarget, Term(Attention, 1000, layers='0', name='maps')])
    learn = fit(learner(kd), 2)
    h = history(learn)
    assert [*h]==['train_loss','valid_loss','accuracy','task_loss','soft_target','soft_target#2','maps']
    assert h.valid_loss.iloc[-1]==pytest.approx(F.cross_entropy(*learn.get_preds(act=noop)).item(), rel=1e-5)
    assert learn.validate()[0]==pytest.approx(h.valid_loss.iloc[-1]) and len(learn.validate())==2
    assert learn.metrics.attrgot('name')==['accuracy']

def test_means_are_weighted_by_samples(teacher):
    dls = digits(95); dls.train.drop_last = False
    vals = []
    def spy(pred): vals.append((len(pred), pred.detach().pow(2).mean().item())); return pred.pow(2).mean()
    h = history(fit(learner(KnowledgeDistillationCallback(teacher, spy), dls)))
    assert {n for n,_ in vals}=={20,15}
    assert h.spy.iloc[0]==pytest.approx(sum(n*v for n,v in vals)/95)

# ---- every training that fastai has

@pytest.mark.parametrize('train', [
    lambda l: l.fit_one_cycle(1, slice(1e-4,1e-2)), lambda l: l.fit_flat_cos(1, 1e-2), lambda l: l.fine_tune(1), lambda l: (l.freeze(), l.fit(1), l.unfreeze(), l.fit(1))],
    ids=['one_cycle slice', 'flat_cos', 'fine_tune', 'freeze'])
@pytest.mark.parametrize('opt', [Adam, ranger, partial(OptimWrapper, opt=torch.optim.AdamW)], ids=['Adam','ranger','AdamW'])
def test_fits_then_exports(teacher, train, opt, tmp_path):
    "with weights that a loss owns, in two parameter groups"
    own = Scale()
    learn = learner(KnowledgeDistillationCallback(teacher, own, '1'), opt_func=opt, splitter=lambda m: L(m[:2], m[2:]).map(params), path=tmp_path)
    train(learn)
    assert own.w.item()!=1 and [len(o) for o in learn.opt.param_lists]==[6,5]
    before = own.w.item()
    learn.export(); fit(learn)
    assert own.w.item()!=before

class Scale(nn.Module):
    "FitNet after a scale that is learned"
    def build(self, fm_s, fm_t, pred, teacher_pred, student, teacher):
        assert isinstance(student, nn.Sequential) and isinstance(teacher, nn.Sequential)
        self.w = nn.Parameter(torch.ones(1))
        self.start = torch.rand(1)
    def forward(self, fm_s, fm_t): return FitNet({k: self.w*v for k,v in fm_s.items()}, fm_t)

def test_owned_weights_start_without_moving_random_state(teacher):
    def plain(fm_s, fm_t): return FitNet(fm_s, fm_t)
    (a,state_a),(b,state_b) = ((fit(learner(KnowledgeDistillationCallback(teacher, o, '1', weight=0.))), torch.get_rng_state()) for o in (Scale(), plain))
    assert torch.equal(weights(a), weights(b)) and torch.equal(state_a, state_b)

def test_lr_find_leaves_all_as_it_was(teacher):
    own = Scale()
    learn = fit(learner(KnowledgeDistillationCallback(teacher, own, '1')))
    before,w = weights(learn),own.w.item()
    learn.lr_find(num_it=8, show_plot=False)
    assert (weights(learn)==before).all() and own.w.item()==w and not hooks(learn.model, teacher)
    assert [len(o) for o in learn.opt.param_lists]==[11]

@pytest.mark.parametrize('opt', [Adam, partial(OptimWrapper, opt=torch.optim.AdamW)], ids=['Adam','AdamW'])
def test_save_and_load_bring_owned_weights_back(teacher, opt, tmp_path):
    "two fits with a save and a load between them equal the same two fits without, to the last bit"
    def new(dls=None): return learner(KnowledgeDistillationCallback(teacher, Scale(), '1'), dls, path=tmp_path, opt_func=opt)
    a = fit(fit(new()))
    b = fit(new()); b.save('m'); c = new(b.dls).load('m'); fit(c)
    assert (weights(a)==weights(c)).all()
    assert (a.knowledge_distillation.terms[0].loss.w==c.knowledge_distillation.terms[0].loss.w).all()
    plain = learner(path=tmp_path, opt_func=opt).load('m')     # the student's file needs nothing of ours
    assert (weights(plain)==weights(b)).all()

def test_indices_are_those_of_the_samples(teacher):
    "shuffled, by two workers, with a last batch that is short"
    ds,seen = digits(100).train_ds,[]
    dls = DataLoaders(DataLoader(ds, bs=30, shuffle=True, num_workers=2), DataLoader(ds, bs=30))
    def spy(pred, target, idx):
        seen.append(idx)
        assert (torch.stack([ds[i][1] for i in idx.tolist()])==target).all()
        return pred.mean()
    fit(learner(dls=dls), 2, cbs=KnowledgeDistillationCallback(teacher, spy))
    assert [len(o) for o in seen]==[30,30,30,10]*2 and all(sorted(torch.cat(o).tolist())==[*range(100)] for o in (seen[:4],seen[4:])) and (seen[0]!=seen[4]).any()
    def optional(pred, idx=None): seen.append(idx); return pred.mean()
    fit(learner(MixUp()), cbs=KnowledgeDistillationCallback(teacher, optional))
    assert seen[-1] is None

@pytest.mark.parametrize('adapt', ['auto', partial(make_adapter, kernel=3, bn=True), partial(make_adapter, orthogonal=True), ['auto',partial(make_adapter, kernel=3)]], ids=['auto','conv3x3+bn','orthogonal','list'])
def test_adapters_fit_any_shapes(adapt, tmp_path):
    "of layers crosswise, train with the student, come back with `load`, stay as they were after `lr_find`, and are not exported"
    big,pairs = small_net(8),[('0','1'),('1','0')]
    def begin(dls=None): cb = KnowledgeDistillationCallback(big, Term(FitNet, 1.), pairs, adapt=adapt); return cb,learner(cb, dls, path=tmp_path)
    def owned(cb): return torch.cat([v.flatten() for v in cb.terms[0].module.state_dict().values()]).clone()
    cb,learn = begin()
    assert repr(cb).endswith('1·FitNet on 0→1, 1→0, adapted')
    fit(learn); first = owned(cb); fit(learn, 2)
    assert (owned(cb)!=first).any() and history(learn).fit_net.is_monotonic_decreasing
    cb1,a = begin(); fit(a); a.save('adapted')
    cb2,b = begin(a.dls); b.load('adapted'); fit(b, 2)
    assert (owned(cb2)==owned(cb)).all() and (weights(b)==weights(learn)).all()
    first = owned(cb)
    learn.lr_find(num_it=10, show_plot=False, suggest_funcs=())
    assert (owned(cb)==first).all()
    learn.export('l.pkl')
    fit(learner(path=tmp_path), 3).export('p.pkl')
    assert abs((tmp_path/'l.pkl').stat().st_size/(tmp_path/'p.pkl').stat().st_size-1)<.01

def test_auto_adapts_only_what_the_loss_compares(teacher):
    def made(loss, layers): cb = KnowledgeDistillationCallback(teacher, loss, layers, adapt='auto'); fit(learner(cb)); return [type(o).__name__ for o in cb.terms[0].module.adapters]
    assert made(FitNet, ['0',('0','1')])==['Identity','FeatureAdapter'] and made(Attention, [('0','1')])==['FeatureAdapter'] and made(Similarity, [('0','1')])==['Identity']

def test_mixed_precision_computes_losses_in_float32(teacher):
    class CPUMixedPrecision(MixedPrecision):
        def before_fit(self): super().before_fit(); self.autocast,self.learn.scaler = torch.autocast('cpu', dtype=torch.bfloat16),torch.amp.GradScaler('cpu', enabled=False)
    seen = []
    def spy(pred, teacher_pred, fm_s, fm_t):
        seen.append({o.dtype for o in (pred, teacher_pred, fm_s['1'], fm_t['1'], fm_s['1'].flatten(1)@fm_t['1'].flatten(1).T)}); return FitNet(fm_s, fm_t)
    fit(learner([KnowledgeDistillationCallback(teacher, spy, '1'), CPUMixedPrecision(amp_mode='bf16')]))
    assert seen and all(o=={torch.float32} for o in seen)

def test_accumulation_equals_one_large_batch(teacher):
    def net(): set_seed(3); return nn.Sequential(nn.Flatten(), nn.Linear(64,16), nn.Tanh(), nn.Linear(16,10))
    t = net(); t[1].weight.data.mul_(2)
    def run(bs, cbs): return weights(fit(learner([KnowledgeDistillationCallback(t, [SoftTarget, Term(FitNet, layers='2')]), *cbs], digits(100, bs=bs), net(), opt_func=SGD)))
    torch.testing.assert_close(run(20, [GradientAccumulation(100)]), run(100, []), rtol=1e-4, atol=1e-6)

# ---- meaning

def test_classes_last_and_ignored_positions():
    "as in a language model: classes on the last axis, padding marked by ignore_index"
    class LM(nn.Module):
        def __init__(self): super().__init__(); self.emb,self.head = nn.Embedding(12,8),nn.Linear(8,12)
        def forward(self, x): return self.head(self.emb(x))
    x = torch.randint(0,12,(40,6)); y = x.roll(-1,1); y[:,-2:] = -100
    ds = list(zip(x,y))
    dls,seen = DataLoaders.from_dsets(ds, ds[:8], bs=8, num_workers=0),[]
    def spy(pred, teacher_pred, target): seen.append((pred.shape, target)); return SoftTarget(pred, teacher_pred)
    t,kd = LM(),None
    learn = Learner(dls, LM(), loss_func=CrossEntropyLossFlat(ignore_index=-100), cbs=KnowledgeDistillationCallback(t, spy))
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    assert seen[0][0]==(8*4,12) and (seen[0][1]!=-100).all()

def test_missing_labels(teacher):
    "a sample without a label is distilled all the same, but not by a loss that needs labels"
    seen = []
    def soft(pred, teacher_pred): seen.append(len(pred)); return SoftTarget(pred, teacher_pred)
    def hard(pred, target): seen.append(target); return F.cross_entropy(pred, target)
    dls = digits(100); y = dls.train.dataset.tensors[1]; y[::2] = -100
    fit(learner(KnowledgeDistillationCallback(teacher, [soft, hard]), dls))
    assert seen[::2]==[20]*5 and sum(map(len, seen[1::2]))==50 and all((o>=0).all() for o in seen[1::2])

def test_no_label_at_all(teacher):
    dls = digits(100); dls.train.dataset.tensors[1][:] = -100
    def hard(pred, target): return F.cross_entropy(pred, target)
    learn = learner(dls=dls)
    fit(learn, cbs=KnowledgeDistillationCallback(teacher, [SoftTarget, hard], task_weight=0))
    assert weights(learn).isfinite().all() and history(learn).hard.iloc[0]==0

def learner_with(vocab=None, norm=None, width=4):
    dls = digits(100)
    if norm is not None: dls.train.after_batch = dls.valid.after_batch = Pipeline([Normalize.from_stats([norm], [1.], cuda=False)])
    if vocab: dls.train.vocab = vocab
    return learner(dls=dls, model=small_net(width))

def test_taught_differently_is_an_error():
    fit(learner_with(['a','b']), cbs=KnowledgeDistillationCallback(learner_with(['a','b']), SoftTarget))
    with pytest.raises(ValueError, match=r"different vocabularies.*Teacher: \['b', 'a'\], student: \['a', 'b'\]"): fit(learner_with(['a','b']), cbs=KnowledgeDistillationCallback(learner_with(['b','a']), SoftTarget))
    fit(learner_with(['a','b']), cbs=KnowledgeDistillationCallback(learner_with(['b','a']), FitNet, '1'))   # classes do not matter to features
    with pytest.raises(ValueError, match=r"normalized differently. Teacher: mean \[0.5\].*student: not at all"): fit(learner_with(), cbs=KnowledgeDistillationCallback(learner_with(norm=0.5), FitNet, '1'))
    fit(learner_with(), cbs=KnowledgeDistillationCallback(learner_with(norm=0.5), FitNet, '1', teacher_tfm=lambda x: x-0.5))

def test_path_of_an_exported_learner(teacher, tmp_path):
    t = fit(learner(path=tmp_path)); t.export('t.pkl')
    with pytest.warns(UserWarning, match='insecure pickle'): kd = KnowledgeDistillationCallback(tmp_path/'t.pkl', SoftTarget)
    other = KnowledgeDistillationCallback(t, SoftTarget)
    assert (weights(fit(learner(kd)))==weights(fit(learner(other)))).all()

def test_warnings(teacher):
    def said(learn, n=1):
        with warnings.catch_warnings(record=True) as ws: warnings.simplefilter('always'); fit(learn, n); fit(learn, n)
        return [str(w.message) for w in ws if w.category is UserWarning]
    (w,) = said(learner(KnowledgeDistillationCallback(teacher, Attention, '1', weight=1e-3)))
    assert 'attention adds' in w and 'default weight is 1000' in w
    assert not said(learner(KnowledgeDistillationCallback(teacher, SoftTarget)))
    ds = [(torch.rand(4), torch.rand(3).round()) for _ in range(16)]
    dls = DataLoaders.from_dsets(ds, ds, bs=8, num_workers=0)
    (w,) = said(Learner(dls, nn.Linear(4,3), loss_func=BCEWithLogitsLossFlat(), cbs=[KnowledgeDistillationCallback(nn.Linear(4,3), SoftTarget)]).remove_cb(ProgressCallback))
    assert 'soft_target' in w and 'BCEWithLogitsLoss: Logits fits it' in w

# ---- nothing stays behind

class Boom(Callback):
    "Raises once, at an event of training"
    def __init__(self, event, ex): self.event,self.ex,self.count = event,ex,0; setattr(self, event, self.go)
    def go(self):
        self.count += 1
        if self.count==3: raise self.ex

def broken_loss(ex):
    calls = []
    def broken(pred, teacher_pred, fm_s, fm_t):
        calls.append(1)
        if len(calls)==3: raise ex
        return SoftTarget(pred, teacher_pred)+FitNet(fm_s, fm_t)
    return broken

def fine(pred, teacher_pred, fm_s, fm_t): return SoftTarget(pred, teacher_pred)+FitNet(fm_s, fm_t)

class BrokenLayer(nn.Module):
    def __init__(self, ex): super().__init__(); self.ex,self.calls = ex,0
    def forward(self, x):
        self.calls += 1
        if self.calls==3: raise self.ex
        return x

class BrokenMetric(Metric):
    def __init__(self, ex): self.ex = ex
    def accumulate(self, learn): raise self.ex
    value = 0.

EXCEPTIONS = [RuntimeError('boom'), ValueError(), KeyboardInterrupt(), CancelFitException(), CancelEpochException(), CancelTrainException(), CancelBatchException()]
PHASES = ['before_batch','after_pred','after_loss','before_backward','before_step','after_step','after_batch','loss','teacher','student','metric','after_epoch','before_fit']

@pytest.mark.parametrize('kept', [True,False], ids=['permanent','fit(cbs)'])
@pytest.mark.parametrize('phase', PHASES)
@pytest.mark.parametrize('ex', EXCEPTIONS, ids=lambda e: type(e).__name__+('' if e.args else '()'))
def test_nothing_stays(teacher, ex, phase, kept):
    "after any exception in any phase; and the next fit gives the numbers of an undisturbed one"
    t = deepcopy(teacher); t.train(); t[1][1].eval()
    modes,state = [m.training for m in t.modules()],deepcopy(t.state_dict())
    model = small_net(4)
    if phase=='teacher': t.add_module('6', BrokenLayer(ex))
    if phase=='student': model.add_module('6', BrokenLayer(ex))
    kd = KnowledgeDistillationCallback(t, broken_loss(ex) if phase=='loss' else fine, '1')
    learn = learner(kd if kept else None, model=model)
    if phase=='metric': learn.metrics = [BrokenMetric(ex)]
    boom = [Boom(phase, ex)] if phase.startswith(('before','after')) else []
    if phase in ('before_fit','after_epoch'): boom[0].count = 2
    names = learn.metrics.attrgot('name')
    with suppress(BaseException): learn.fit(1, cbs=boom if kept else [kd, *boom])
    assert not kd.teacher.capture.outputs and not (hasattr(kd, '_student') and kd._student.outputs)
    assert not hooks(t, learn.model)
    assert learn.metrics.attrgot('name')==names
    assert [m.training for m in t.modules()][:len(modes)]==modes and all(p.grad is None and p.requires_grad for p in t.parameters())
    for k,v in state.items(): assert (t.state_dict()[k]==v).all()
    assert all(k not in learn.__dict__ for k in ('fit','save','load')) or kept
    for m in learn.model.modules():
        if isinstance(m, BrokenLayer): m.ex = None     # fastai's own exceptions cannot be pickled
    pickle.dumps(learn.model)
    again,fresh = learn,learner(model=small_net(4))
    again.model.load_state_dict(fresh.model.state_dict())
    for l,cb in ((again, None if kept else kd), (fresh, KnowledgeDistillationCallback(teacher, fine, '1'))):
        set_seed(2)
        l.dls,l.metrics,l.loss_func = digits(100),[],CrossEntropyLossFlat()
        l.model.zero_grad()    # fastai leaves the gradients of a step that was not taken
        fit(l, cbs=cb, reset_opt=True)
    assert torch.equal(weights(again), weights(fresh))

def test_teacher_that_shares_nothing_is_not_trained(teacher):
    before = deepcopy(teacher.state_dict())
    fit(learner(KnowledgeDistillationCallback(teacher, [SoftTarget, Term(FitNet)], '1')), 2)
    assert all((v==before[k]).all() for k,v in teacher.state_dict().items()) and all(p.grad is None for p in teacher.parameters())

def test_outside_a_fit(teacher, tmp_path):
    "validate, get_preds and lr_find need no teacher, and work before any fit"
    class Never(nn.Module):
        def forward(self, x): raise AssertionError('the teacher was asked')
    learn = learner(KnowledgeDistillationCallback(Never(), SoftTarget))
    plain = learner()
    assert learn.validate()==plain.validate()
    assert (learn.get_preds()[0]==plain.get_preds()[0]).all()
    assert learn.summary()

def test_deepcopy_goes_on_distilling(teacher):
    a = fit(learner(KnowledgeDistillationCallback(teacher, Scale(), '1')))
    b = deepcopy(a)
    assert b.knowledge_distillation.teacher is a.knowledge_distillation.teacher and b.knowledge_distillation.learn is b
    before = weights(a); fit(b)
    assert (weights(a)==before).all() and b.knowledge_distillation.terms[0].loss.w.item()!=a.knowledge_distillation.terms[0].loss.w.item()
    fit(a)
    assert torch.equal(weights(a), weights(b)) and not hooks(teacher, a.model, b.model)

def test_export_holds_the_student_alone(teacher, tmp_path):
    "within 1% of the size without distillation, and loads where kd_fastai is not installed"
    ds = [(torch.rand(1,8,8), i%10) for i in range(40)]
    def trained(cbs):
        dls = DataLoaders.from_dsets(L(ds), L(ds), bs=20, num_workers=0)
        learn = learner(cbs, dls, small_net(16), path=tmp_path)
        dls.new_empty = lambda: DataLoaders.from_dsets(L(), L(), bs=20)
        fit(learn, 1)
        return learn
    sizes = []
    for name,kd in (('a',None), ('b',KnowledgeDistillationCallback(small_net(64), [SoftTarget, Term(Attention, 1000)], '1'))):
        learn = trained(kd); learn.recorder.metric_names = learn.recorder.values = None
        learn.export(f'{name}.pkl'); sizes.append((tmp_path/f'{name}.pkl').stat().st_size)
    assert abs(sizes[1]-sizes[0])<0.01*sizes[0], sizes
    code = f"import sys; sys.modules['kd_fastai']=None\nfrom fastai.basics import *\nl = load_learner({str(tmp_path/'b.pkl')!r})\nprint(tuple(l.model(torch.rand(2,1,8,8)).shape)); l.fit"
    r = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], capture_output=True, text=True)
    assert r.stdout.strip()=='(2, 10)', r.stderr

def test_two_callbacks(teacher):
    kd1,kd2 = KnowledgeDistillationCallback(teacher, SoftTarget, task_weight=0.5),KnowledgeDistillationCallback(deepcopy(teacher), FitNet, '1')
    both = fit(learner([kd1, kd2]))
    one = fit(learner(KnowledgeDistillationCallback(teacher, [SoftTarget, FitNet], '1', task_weight=0.5)))
    torch.testing.assert_close(weights(both), weights(one), rtol=1e-4, atol=1e-5)
    assert [*history(both)][3:]==['task_loss','soft_target','fit_net']
    for order in ([kd1,kd2], [kd2,kd1]):
        both.remove_cbs(order)
        assert both.metrics.attrgot('name')==['accuracy'] and 'fit' not in both.__dict__
        both.add_cbs([kd1,kd2])
    with pytest.raises(ValueError, match='leave task_weight at 1'): fit(learner([KnowledgeDistillationCallback(teacher, SoftTarget), KnowledgeDistillationCallback(deepcopy(teacher), Logits, task_weight=0.1)]))

# ---- what is refused

T = small_net(4)
def kd(*args, **kwargs): return lambda: KnowledgeDistillationCallback(T, *args, **kwargs)
def labelled(pred, target): return F.cross_entropy(pred, target)
def vector(pred): return pred.mean(1)
def number(pred): return 1.
def nan(pred): return pred.mean()*float('nan')
def detached(fm_s): return sum(f.detach().mean() for f in fm_s.values())
def indexed(pred, idx): return pred.mean()
class Lazy(nn.Module):
    def forward(self, pred): return pred.mean()

BAD = {
    'no teacher':            (lambda: KnowledgeDistillationCallback(None, SoftTarget), TypeError, 'got NoneType'),
    'teacher class':         (lambda: KnowledgeDistillationCallback(nn.Linear, SoftTarget), TypeError, 'the class Linear'),
    'teacher function':      (lambda: KnowledgeDistillationCallback(lambda x: x, SoftTarget), TypeError, 'got function'),
    'no file':               (lambda: KnowledgeDistillationCallback('nowhere.pkl', SoftTarget), FileNotFoundError, 'nowhere.pkl'),
    'loss is a name':        (kd('SoftTarget'), TypeError, "got 'SoftTarget'"),
    'loss is a class':       (kd(Lazy), TypeError, 'pass an instance'),
    'no loss':               (kd([]), ValueError, 'at least one loss'),
    'loss is None':          (kd(None), TypeError, 'got None'),
    'typo in partial':       (kd(partial(SoftTarget, temperature=4)), TypeError, 'its parameters are pred, teacher_pred, T'),
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
    'picks no tensor':       (kd(FitNet, ('0', lambda o: None)), TypeError, 'returns NoneType, not a tensor'),
    'picks what is not there': (kd(FitNet, ('0', lambda o: o['x'])), ValueError, 'has no item'),
    'tuple of a function and teacher': (kd(Attention, [('0', ('1', len))], ['0']), ValueError, 'leave out activations_teacher'),
    'tuples and teacher':    (kd(Attention, [('0','1')], ['0']), ValueError, 'leave out activations_teacher'),
    'dict and teacher':      (kd(Attention, LAYERS, ['0']), ValueError, 'leave out activations_teacher'),
    'dict keys':             (kd(Attention, {'s':['0'], 't':['0']}), ValueError, "'student' and 'teacher'"),
    'unequal lists':         (kd(Attention, ['0','1'], ['0']), ValueError, "got 2 (['0', '1']) and 1 (['0'])"),
    'only teacher layers':   (kd(Attention, None, ['0']), ValueError, 'give activations_student too'),
    'teacher layer':         (kd(Attention, [('0','9')]), ValueError, "teacher: No layer '9'"),
    'teacher layer model.':  (kd(Attention, [('0','model.1')]), ValueError, "use '1'"),
    'student layer':         (kd(Attention, [('9','0')]), ValueError, "student: No layer '9'"),
    'itself':                ('itself', ValueError, 'share 11 of their layers'),
    'one position':          (kd(Attention, '3'), ValueError, 'has one position'),
    'shapes':                (lambda: KnowledgeDistillationCallback(small_net(8), FitNet, '1'), ValueError, "'1' (20, 8, 4, 4) of the student and '1' (20, 16, 4, 4) of the teacher"),
    'sizes':                 (kd(Attention, [('0','1')]), ValueError, 'equal batch and spatial sizes'),
    'unequal dict':          (kd(FitNet, {'student':['0'], 'teacher':['0','1']}), ValueError, 'got 1 and 2'),
    'classes':               (lambda: KnowledgeDistillationCallback(nn.Sequential(nn.Flatten(), nn.Linear(64,7)), SoftTarget), ValueError, '(20, 10) of the student and (20, 7) of the teacher'),
    'one column':            (lambda: KnowledgeDistillationCallback(nn.Sequential(nn.Flatten(), nn.Linear(64,1)), SoftTarget), ValueError, '(20, 1) of the teacher'),
    'temperature':           (kd(partial(SoftTarget, T=0)), ValueError, 'got T=0'),
    'RKD of nothing':        (kd(partial(RKD, distance=0, angle=0), '1'), ValueError, 'compares nothing'),
    'no scalar':             (kd(vector), TypeError, 'one of shape (20,)'),
    'no tensor':             (kd(number), TypeError, 'must return a scalar tensor, got float'),
    'nan':                   (kd(nan), FloatingPointError, 'nan is nan in epoch 0, batch 0'),
    'detached':              (kd(detached, '1'), ValueError, 'gives the student no gradient'),
    'indices of mixed':      ('mixed', ValueError, 'indexed needs idx: A sample that MixUp mixed of two has no position'),
    'indices elsewhere':     ('elsewhere', ValueError, 'The samples of a DataLoader have no positions'),
    'adapt word':            (kd(FitNet, '1', adapt='conv'), TypeError, "adapt is 'auto', a function"),
    'adapt class':           (kd(FitNet, '1', adapt=nn.Conv2d), TypeError, "adapt is 'auto', a function"),
    'adapt predictions':     (lambda: Term(SoftTarget, adapt='auto'), ValueError, 'adapt is for losses on features, got SoftTarget'),
    'adapt too many':        (kd(FitNet, '1', adapt=['auto','auto']), ValueError, 'for each of 1 pairs of layers, got 2'),
    'adapt none too many':   (kd(FitNet, ['0','1'], adapt=nn.Conv2d(4,4,1)), ValueError, 'for each of 2 pairs of layers, got 1'),
    'adapter that fails':    (kd(FitNet, [('5','0')], adapt='auto'), ValueError, 'an embedding has no positions'),
    'adapter of the wrong shape': (kd(FitNet, '1', adapt=nn.Conv2d(8,3,1)), ValueError, "'1' (20, 3, 4, 4) of the student"),
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
        self.rnn,self.act,self.spare,self.lin,self.inplace = nn.LSTM(8,10,batch_first=True),nn.ReLU(),nn.ReLU(),nn.Linear(10,10),nn.ReLU(inplace=True)
    def forward(self, x): return self.inplace(self.lin(self.act(self.act(self.rnn(x[:,0])[0][:,-1]))))

def special(name):
    "(learner, callback) for the cases that need more than a callback"
    odd = {'tuple':'rnn', 'unreached':'spare', 'twice':'act', 'inplace':'lin'}
    if name in odd: return learner(model=Odd()),KnowledgeDistillationCallback(Odd(), FitNet, odd[name])
    if name=='itself': l = learner(); return l,KnowledgeDistillationCallback(l.model, SoftTarget)
    if name=='parallel': m = nn.DataParallel(small_net(4)); m.device_ids = [0,1]; return learner(model=m),kd(SoftTarget)()
    if name=='mixed': return learner(MixUp()),kd(indexed)()
    if name=='elsewhere': return learner(dls=DataLoaders(*(torch.utils.data.DataLoader(o.dataset, 20) for o in digits(100).loaders))),kd(indexed)()
    if name=='dict':
        class D(nn.Module):
            def forward(self, x): return {'loss': x.sum()}
        return learner(),KnowledgeDistillationCallback(D(), SoftTarget)
    ds = [(torch.rand(1,8,8),) for _ in range(40)]
    dls = DataLoaders.from_dsets(ds, ds, bs=20, num_workers=0)
    return learner(dls=dls),kd(SoftTarget)()

@pytest.mark.parametrize('name', BAD)
def test_bad_input(name):
    "raises, with expected and got, before any step of the optimizer, and changes nothing"
    make,ex,text = BAD[name]
    if isinstance(make, str): learn,cb = special(make)
    else:
        try: cb = make()
        except ex as e: assert text in str(e); return
        learn = learner()
    before,metrics,modes = weights(learn),[*learn.metrics],[m.training for m in cb.teacher.model.modules()]
    with pytest.raises(ex, match=re.escape(text)): learn.fit(1, cbs=cb)
    assert (weights(learn)==before).all() and [*learn.metrics]==metrics and not hooks(learn.model, cb.teacher.model)
    assert [m.training for m in cb.teacher.model.modules()]==modes or make=='itself'
    assert all(len(s)==0 or 'grad_avg' not in s for s in learn.opt.state.values())

def test_bad_inputs_are_many(): assert len(BAD)>=40

def test_frozen_layers_are_a_warning(teacher):
    learn = learner(KnowledgeDistillationCallback(teacher, FitNet, '0', weight=1.), splitter=lambda m: L(m[:2], m[2:]).map(params), train_bn=False)
    learn.freeze()
    with pytest.warns(UserWarning, match="are frozen: fit_net has no effect"): fit(learn)

def test_compiled_after_use_is_an_error(teacher):
    "hooks are not seen by a model that was compiled and run before; torch._dynamo.reset() helps"
    torch._dynamo.reset()
    model = torch.compile(small_net(4), backend='eager')
    model(torch.rand(20,1,8,8))
    with pytest.raises(RuntimeError, match="'1' did not run.*torch._dynamo.reset()"):
        learn = learner(model=model); learn.model.train(); model(torch.rand(20,1,8,8)); fit(learn, cbs=KnowledgeDistillationCallback(teacher, FitNet, '1'))
    torch._dynamo.reset()
    a = fit(learner(model=torch.compile(small_net(4), backend='eager')), cbs=KnowledgeDistillationCallback(teacher, FitNet, '1'))
    assert 'fit_net' in a.recorder.metric_names and history(a).fit_net.iloc[0]>0
    torch._dynamo.reset()
