"Other teachers and schemes of distillation, each compared with its definition in a small training."
from copy import deepcopy
from functools import partial
import numpy as np, pytest, torch, torch.nn.functional as F
from torch import nn
from fastai.basics import (Callback, noop, CancelFitException, CrossEntropyLossFlat, DataLoader, DataLoaders,
    Learner, MSELossFlat, OptimWrapper, load_learner, mae, rmse, set_seed)
from fastai.callback.all import (CSVLogger, GradientAccumulation, MixUp, SaveModelCallback, SchedLin, SchedNo,
    combine_scheds)
from kd_fastai.all import *
from kd_fastai.methods.self_distillation import on_exits
from kd_fastai.demo import digits, small_net
from support import (CPUMixedPrecision, KD, KeepBatches, KeepLosses, fit, history, hooks, learner, quiet, same, state,
    weights)

pytestmark = pytest.mark.filterwarnings('ignore')
torch.set_num_threads(1)

class Interrupt(Callback):
    def after_backward(self): raise KeyboardInterrupt

def naive(pred, teacher_pred):
    "A divergence that does not detach the teacher"
    return F.kl_div(pred.log_softmax(1), teacher_pred.log_softmax(1), reduction='batchmean', log_target=True)

@pytest.fixture(scope='module')
def teachers():
    "Two trained Learners, of different width and quality"
    return [fit(learner(width=w, dls=digits(), seed=w), n) for w,n in ((8,3),(6,1))]

@pytest.fixture(scope='module')
def x(): return digits(100).valid.one_batch()[0]

def answers(m, x, T=1):
    with torch.no_grad(): return (m.eval()(x)/T).softmax(1)

# ---- several teachers

@pytest.mark.parametrize('T', [1,4])
@pytest.mark.parametrize('share', [None,[3,1]])
def test_an_ensembles_target_is_the_mean_of_softmaxes(teachers, x, T, share):
    a,b = (o.model for o in teachers)
    w = 0.75 if share else 0.5
    torch.testing.assert_close(answers(Ensemble(teachers, share, T=T), x, T), w*answers(a,x,T)+(1-w)*answers(b,x,T))

def test_a_loss_sees_the_ensembles_mean(teachers):
    "In a fit, the loss gets the mean of the softmaxes, and features of the layers named for each teacher."
    seen = []
    def spy(pred, teacher_pred, fm_t):
        seen.append((teacher_pred.softmax(1), fm_t)); return SoftTarget(pred, teacher_pred)
    keep,(a,b) = KeepBatches(),teachers
    fit(learner([KD(Ensemble([a, b.model]), spy, [('1','0.1'),('1','1.1')]), keep]))
    assert len(seen)==len(keep.batches)==5
    for (p,fm),(x,_) in zip(seen, keep.batches):
        torch.testing.assert_close(p, (answers(a.model,x)+answers(b.model,x))/2)
        assert [*fm]==['0.1','1.1']
        assert fm['0.1'].shape[1:]==(16,4,4)
        assert fm['1.1'].shape[1:]==(12,4,4)
    assert not hooks(a.model, b.model)

def test_logits_are_the_geometric_mean(teachers, x):
    p = (answers(teachers[0].model, x)*answers(teachers[1].model, x)).sqrt()
    torch.testing.assert_close(answers(Ensemble(teachers, logits=True), x), p/p.sum(1, keepdim=True))

def test_an_ensemble_of_language_models():
    "The ensemble learns from its Learners that the classes are on the last axis."
    ds = [(torch.randint(0,12,(6,)), torch.randint(0,12,(6,))) for _ in range(16)]
    dls = DataLoaders.from_dsets(ds, ds, bs=8, num_workers=0)
    def lm():
        return quiet(Learner(dls, nn.Sequential(nn.Embedding(12,8), nn.Linear(8,12)), loss_func=CrossEntropyLossFlat()))
    a,b = lm(),lm()
    ids,seen = torch.randint(0,12,(2,6)),[]
    with torch.no_grad():
        mean = (a.model(ids).softmax(-1)+b.model(ids).softmax(-1))/2
        torch.testing.assert_close(Ensemble([a,b])(ids).softmax(-1), mean)
    def spy(pred, teacher_pred): seen.append(teacher_pred.softmax(1).sum(1)); return SoftTarget(pred, teacher_pred)
    lm().fit(1, cbs=KD(Ensemble([a,b]), spy))
    torch.testing.assert_close(seen[0], torch.ones(8,6))

def test_an_ensemble_reads_paths(teachers, x, tmp_path):
    teachers[0].export(tmp_path/'t.pkl')
    assert torch.equal(answers(Ensemble([tmp_path/'t.pkl', teachers[1]]), x), answers(Ensemble(teachers), x))

def with_vocab(learn, vocab): learn.dls.vocab = vocab; return learn

def test_ensembles_of_other_vocabularies_are_an_error():
    "Teachers with other vocabularies, among themselves or than the student, are an error."
    a,b = (with_vocab(learner(), v) for v in (['x','y'], ['y','x']))
    with pytest.raises(ValueError, match=r"teacher 0: \['x', 'y'\], teacher 1: \['y', 'x'\]"): Ensemble([a, b])
    with pytest.raises(ValueError, match=r"student: \['x', 'y'\], teacher: \['y', 'x'\]"):
        fit(a, cbs=KD(Ensemble([b, small_net(4)]), SoftTarget))

def test_ensembles_check_weights_and_teachers():
    a = learner()
    with pytest.raises(ValueError, match='Expected 2 weights'): Ensemble([a, a], weights=[1,-1])
    with pytest.raises(TypeError, match='A teacher is an nn.Module'): Ensemble([a, 3])

# ---- the student's average

@pytest.mark.parametrize('cbs', [[], [GradientAccumulation(40)]], ids=['plain','accumulation'])
def test_mean_teacher_is_the_recursion(cbs):
    "Parameters and batch norm statistics follow the recursion over two fits, once for each optimizer step."
    seen = []
    class Watch(Callback):
        def after_step(self):
            floats = {k:v for k,v in self.learn.model.state_dict().items() if v.is_floating_point()}
            seen.append(deepcopy(floats))
    learn = learner()
    learn.add_cbs([MeanTeacher(learn, Mutual, weight=1., decay=0.8), Watch(), *cbs])
    fit(learn, 2); fit(learn)
    mean = seen[0]
    for s in seen[1:]: mean = {k: 0.8*mean[k]+0.2*v for k,v in s.items()}
    average = learn.mean_teacher.average
    assert average.n_averaged==len(seen)==(7 if cbs else 15)
    torch.testing.assert_close({k:v for k,v in average.module.state_dict().items() if k in mean}, mean)
    assert not hooks(average, learn.model)

def test_mean_teacher_teaches():
    "The loss gets the predictions of the average in eval mode, which changes from batch to batch."
    learn,seen = learner(),[]
    def spy(pred, teacher_pred):
        seen.append((teacher_pred, deepcopy(learn.mean_teacher.average.module), learn.x.clone()))
        return SoftTarget(pred, teacher_pred)
    learn.add_cb(MeanTeacher(learn, spy))
    fit(learn)
    assert len(seen)==5
    for p,m,x in seen: torch.testing.assert_close(p.softmax(1), answers(m, x))
    assert (seen[0][0]!=seen[-1][0]).any()

def test_mean_teacher_saves_copies_and_exports(tmp_path):
    "Two fits with a save and a load between them equal two without; a plain file resets the average."
    def new(dls=None):
        learn = learner(dls=dls, path=tmp_path)
        return learn.add_cb(MeanTeacher(learn, SoftTarget, decay=0.9))
    a,b = fit(fit(new())),fit(new())
    b.save('m')
    c = fit(new(b.dls).load('m'))
    assert torch.equal(weights(a), weights(c))
    assert torch.equal(weights(a.mean_teacher.average), weights(c.mean_teacher.average))
    plain = fit(learner(path=tmp_path)); plain.save('plain')
    c.load('plain')
    assert c.mean_teacher.average.n_averaged==0
    d = deepcopy(a); before = weights(a.mean_teacher.average); fit(d)
    assert torch.equal(weights(a.mean_teacher.average), before)
    assert not torch.equal(weights(d.mean_teacher.average), before)
    assert d.mean_teacher.teacher.model is d.mean_teacher.average.module is not a.mean_teacher.teacher.model
    a.export('a.pkl')
    assert isinstance(load_learner(tmp_path/'a.pkl').model, nn.Sequential)

def test_lr_find_does_not_change_the_average():
    learn = learner()
    learn.add_cb(MeanTeacher(learn, SoftTarget, decay=0.9)); fit(learn)
    before = weights(learn.mean_teacher.average)
    learn.lr_find(num_it=6, show_plot=False)
    assert torch.equal(weights(learn.mean_teacher.average), before)
    assert learn.mean_teacher.average.n_averaged==5

# ---- generations

def test_generations(teachers):
    "Each generation learns from the one before, and the table has a row for each."
    taught = []
    def train(learn, teacher):
        taught.append((learn, teacher))
        if teacher: learn.distill(teacher)
        fit(learn)
    a,b = learner(width=6),learner(width=4)
    t = train_generations({'assistant': a, 'small': b}, train, teachers[0])
    assert taught==[(a,teachers[0]),(b,a)]
    assert [*t.index]==['teacher','assistant','small']
    assert t.parameters.is_monotonic_decreasing
    assert t.accuracy['small']==pytest.approx(b.validate()[1])
    assert t.valid_loss['teacher']==pytest.approx(teachers[0].validate()[0])
    born = train_generations([learner(seed=s) for s in range(3)], train)
    assert [*born.index]==[1,2,3]
    assert taught[2][1] is None
    assert taught[4][1] is taught[3][0]
    assert born.parameters.nunique()==1

# ---- mutual learning

def by_hand(nets, dls, w, lr=1e-2):
    "Train networks on each other's mean softmax in plain PyTorch; returns them"
    opts = [torch.optim.SGD(m.parameters(), lr) for m in nets]
    set_seed(1)
    for m in nets: m.train()
    for x,y in dls.train:
        preds = [m(x) for m in nets]
        for i,(p,opt) in enumerate(zip(preds, opts)):
            q = torch.stack([o.detach().softmax(1) for j,o in enumerate(preds) if j!=i]).mean(0)
            (F.cross_entropy(p, y) + w*F.kl_div(p.log_softmax(1), q, reduction='batchmean')).backward()
        for opt in opts: opt.step(); opt.zero_grad()
    return nets

@pytest.mark.parametrize('n', [2,3])
def test_mutual_learning_equals_a_hand_written_loop(n):
    "The weights of each network are those of the plain loop, and not those of training without a teacher."
    sgd = partial(OptimWrapper, opt=torch.optim.SGD)
    hand = by_hand([learner(width=4+2*i, seed=i).model for i in range(n)], digits(100), 0.7)
    first,*rest = [learner(width=4+2*i, seed=i, opt_func=sgd) for i in range(n)]
    fit(first, cbs=MutualLearning(*rest, weight=0.7))
    alone = by_hand([learner(width=4+2*i, seed=i).model for i in range(n)], digits(100), 0)
    for a,b,c in zip((first,*rest), hand, alone):
        torch.testing.assert_close(weights(a), weights(b), rtol=1e-4, atol=1e-6)
        assert not torch.allclose(weights(a), weights(c), atol=1e-4)

def test_no_gradient_crosses():
    "The gradient of each network is that of its own two terms, even for a loss that does not detach the peer."
    a,b = learner(width=4),learner(width=6, seed=1)
    class Look(Callback):
        order = KD.order+1
        def after_loss(self):
            if not self.training: return
            p,q = self.pred,self.mutual_learning.teacher.preds[0]
            for net,p,q in ((a.model,p,q), (b.model,q,p)):
                own = F.cross_entropy(p, self.y)+naive(p, q.detach())
                def grads(loss): return torch.autograd.grad(loss, [*net.parameters()], retain_graph=True)
                torch.testing.assert_close(grads(self.learn.loss_grad), grads(own), rtol=1e-3, atol=1e-6)
            looked.append(1)
            raise CancelFitException()
    looked = []
    fit(a, cbs=[MutualLearning(b, loss=naive), Look()])
    assert len(looked)==1

def test_peers_keep_their_own_learners(tmp_path):
    "A peer's metrics have columns; after the fit, optimizer, metrics and export contain nothing of a peer."
    a,b = learner(width=4, path=tmp_path),learner(width=6, seed=1)
    n = len(a.create_opt() or [*a.opt.all_params()])
    ml = MutualLearning(b)
    a.fit_one_cycle(3, 1e-2, cbs=ml)
    h = history(a)
    assert [*h]==['train_loss','valid_loss','accuracy','task_loss','mutual','valid_loss#2','accuracy#2']
    assert [*h.iloc[-1][['valid_loss#2','accuracy#2']]]==pytest.approx([*b.validate()])
    assert [*h.iloc[-1][['valid_loss','accuracy']]]==pytest.approx([*a.validate()])
    assert h['accuracy#2'].iloc[-1]>h['accuracy#2'].iloc[0]
    assert len([*a.opt.all_params()])==n
    assert ml.teacher.preds is None
    assert a.metrics.attrgot('name')==b.metrics.attrgot('name')==['accuracy']
    assert b.opt is None
    a.export('a.pkl'); b.export(tmp_path/'b.pkl')
    assert load_learner(tmp_path/'b.pkl').model[0][0].out_channels==6

def test_mutual_learning_saves_its_peers(tmp_path):
    "Two fits with a save and a load between them equal two without, and a copy trains peers of its own."
    def new(dls=None):
        peer = learner(width=6, seed=1)
        return peer,learner(MutualLearning(peer), dls, path=tmp_path)
    p,a = new(); fit(fit(a))
    _,b = new(); fit(b); b.save('m')
    q,c = new(b.dls); fit(c.load('m'))
    assert torch.equal(weights(a), weights(c))
    assert torch.equal(weights(p), weights(q))
    d = deepcopy(c); before = weights(q); fit(d)
    peer = d.mutual_learning.peers[0].model
    assert torch.equal(weights(q), before)
    assert not torch.equal(weights(peer), before)
    assert peer is d.mutual_learning.teacher.model[0]

def test_lr_find_does_not_change_peers():
    a,b = learner(width=4),learner(width=6, seed=1)
    fit(a.add_cb(MutualLearning(b)))
    before = deepcopy(b.model.state_dict())
    a.lr_find(num_it=6, show_plot=False)
    assert same(before, b.model.state_dict())
    assert b.metrics.attrgot('name')==['accuracy']

@pytest.mark.slow
@pytest.mark.parametrize('scheme', [
    lambda l: MutualLearning(learner(width=6), learner(width=8)), MeanTeacher,
    lambda l: KD(Ensemble([small_net(4), small_net(6)]), SoftTarget)], ids=['mutual','mean teacher','ensemble'])
def test_half_precision(scheme):
    "The columns in bfloat16 autocast are close to those in full precision, and not equal to them."
    learn = learner(cbs=CPUMixedPrecision(amp_mode='bf16'))
    learn.add_cb(scheme(learn))
    plain = learner(); plain.add_cb(scheme(plain))
    a,b = (history(fit(o, 2)) for o in (learn, plain))
    assert a.shape==b.shape
    assert not a.equals(b)
    np.testing.assert_allclose(a, b, rtol=0.1, atol=0.05)

def test_an_interrupt_leaves_no_peer_in_the_learner():
    a,b = learner(width=4),learner(width=6, seed=1)
    ml = MutualLearning(b)
    with pytest.raises(KeyboardInterrupt, match='^$'): fit(a, cbs=[ml, Interrupt()])
    assert a.metrics.attrgot('name')==['accuracy']
    assert len([*a.opt.all_params()])==11
    assert ml.teacher.preds is None

def test_a_learner_cannot_be_its_own_peer():
    a = learner()
    with pytest.raises(ValueError, match='share 11 of their layers'): fit(a, cbs=MutualLearning(a))

# ---- two heads, exits

class TwoHeads(nn.Module):
    def __init__(self):
        super().__init__()
        *body,self.cls = small_net(4)
        self.body,self.dist = nn.Sequential(*body),nn.Linear(16,10)
    def forward(self, x):
        z = self.body(x)
        both = self.cls(z),self.dist(z)
        return both if self.training else (both[0]+both[1])/2

def test_distillation_token(teachers):
    "The first head learns from labels, the second from the teacher's classes; predictions are their mean."
    set_seed(0); model = TwoHeads()
    class Look(Callback):
        order = KD.order+1
        def after_loss(self):
            if not self.training: return
            with torch.no_grad(): hard = teachers[0].model.eval()(self.x).argmax(1)
            z = model.body(self.x)
            own = (F.cross_entropy(model.cls(z), self.y)+F.cross_entropy(model.dist(z), hard))/2
            torch.testing.assert_close(own, self.loss, rtol=1e-4, atol=1e-5)
            for head,v in ((model.cls, F.cross_entropy(model.cls(z), self.y)),
                (model.dist, F.cross_entropy(model.dist(z), hard))):
                (g,),(h,) = (torch.autograd.grad(o, head.weight, retain_graph=True)
                    for o in (self.learn.loss_grad, v/2))
                torch.testing.assert_close(g, h, rtol=1e-3, atol=1e-5)
            looked.append(1)
    looked = []
    learn = learner(cbs=[DistillationToken(teachers[0]), Look()], model=model)
    fit(learn, 4)
    h = history(learn)
    assert len(looked)==20
    assert h.hard_target.iloc[-1]<h.hard_target.iloc[0]
    assert h.accuracy.iloc[-1]>0.3
    assert learn.get_preds(act=noop)[0].shape==(797,10)
    deepcopy(learn)   # works after a fit

def test_distillation_token_needs_two_predictions(teachers):
    with pytest.raises(ValueError, match='Expected .class, distillation. predictions'):
        fit(learner(cbs=DistillationToken(teachers[0])))

@pytest.mark.slow
def test_distillation_token_of_timm(teachers):
    "timm's distilled transformer returns pairs after `set_distilled_training`, and its tokens and heads train."
    timm = pytest.importorskip('timm')
    def net():
        set_seed(0)
        return timm.create_model('deit_tiny_distilled_patch16_224', img_size=8, patch_size=4, in_chans=1,
            num_classes=10, embed_dim=32, depth=1, num_heads=2)
    learn = learner(cbs=DistillationToken(teachers[0]), model=net())
    with pytest.raises(ValueError, match='call model.set_distilled_training.True.'): fit(learn)
    learn.model.set_distilled_training(True)
    before = deepcopy(learn.model.state_dict())
    h = history(fit(learn, 4, 1e-3))
    assert h.hard_target.iloc[-1]<h.hard_target.iloc[0]
    moved = {k for k,v in learn.model.state_dict().items() if not torch.equal(v, before[k])}
    assert {'dist_token','head_dist.weight','head.weight'}<=moved
    assert learn.get_preds(act=noop)[0].shape==(797,10)

class WithExit(nn.Module):
    def __init__(self):
        super().__init__()
        self.first,*rest = small_net(4)
        self.rest,self.exit = nn.Sequential(*rest),nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4,10))
    def forward(self, x):
        z = self.first(x)
        if self.training: self.exit(z)
        return self.rest(z)

def test_self_distillation():
    "An exit learns from labels and from the last prediction, which gets no gradient from it."
    def run(weight, exit_weight):
        set_seed(0); model = WithExit()
        learn = learner(model=model, cbs=SelfDistillation('exit', naive, weight=weight, exit_weight=exit_weight))
        return fit(learn, 4)
    a,b = run(0.3, 0.7),run(0, 0)
    assert torch.equal(weights(b.model.exit), weights(run(0,0).model.exit))
    assert not torch.equal(weights(a.model.exit), weights(b.model.exit))
    h,w = history(a),history(b)
    assert [*h][-3:]==['task_loss','exits','naive']
    assert h.exits.iloc[-1]<w.exits.iloc[-1]
    class Look(Callback):
        order = KD.order+1
        def after_loss(self):
            if not self.training: return
            m = self.learn.model
            g = torch.autograd.grad(self.learn.loss_grad, m.rest[-1].weight, retain_graph=True)[0]
            h = torch.autograd.grad(F.cross_entropy(self.pred, self.y), m.rest[-1].weight, retain_graph=True)[0]
            torch.testing.assert_close(g, h, rtol=1e-3, atol=1e-6)
            e = m.exit(m.first(self.x))
            expected = F.cross_entropy(self.pred, self.y)+0.7*F.cross_entropy(e, self.y)+0.3*naive(e, self.pred)
            torch.testing.assert_close(self.loss, expected, rtol=1e-4, atol=1e-5)
            looked.append(1)
            raise CancelFitException()
    looked = []
    fit(a, cbs=Look())
    assert len(looked)==1

def test_a_teacher_teaches_every_exit(teachers):
    early = Term(on_exits(SoftTarget), 0.5, layers={'student': ['exit'], 'teacher': []}, name='early')
    h = history(fit(learner(cbs=KD(teachers[0], [SoftTarget, early]), model=WithExit()), 3))
    assert h.early.iloc[-1]<h.early.iloc[0]
    with pytest.raises(TypeError, match="no parameter 'temperature'"): on_exits(partial(SoftTarget, temperature=3))

# ---- schedules, balance, class maps

def test_parameters_follow_schedules(teachers):
    seen = []
    def spy(pred, teacher_pred, T=1.): seen.append(T); return SoftTarget(pred, teacher_pred, T)
    for _ in range(2): fit(learner(cbs=KD(teachers[0], Term(spy, T=SchedLin(8,3)))))
    assert seen==pytest.approx([8,7,6,5,4]*2)

def test_a_constant_schedule_equals_partial(teachers):
    def run(term): return weights(fit(learner(cbs=KD(teachers[0], term))))
    assert torch.equal(run(Term(SoftTarget, T=SchedNo(3,3))), run(Term(partial(SoftTarget, T=3))))

def test_schedules_of_parameters_are_checked():
    with pytest.raises(TypeError, match="SoftTarget has no parameter 'temperature': its parameters are pred, "):
        Term(SoftTarget, temperature=SchedLin(8,2))
    with pytest.raises(TypeError, match="FitNet has no parameter 'layer': its parameters are fm_s, fm_t"):
        Term(FitNet, layer='5')
    with pytest.raises(ValueError, match='must be finite'): Term(SoftTarget, T=lambda p: float('nan'))

@pytest.mark.parametrize('shares,scheds,expected', [
    ([0.4,0.6], [SchedLin(0,1),SchedNo(1,1)], [0,.5,1,1,1]), ([0.6,0.4], [SchedNo(1,1),SchedNo(0,0)], [1,1,1,0,0])],
    ids=['warm-up','stops early'])
def test_weights_follow_combined_schedules(teachers, shares, scheds, expected):
    "Schedules combined by fastai work: a warm-up as DecoupledKD's authors use, and an end before the training's."
    keep = KeepLosses()
    def one(pred): return pred.sum()*0+1
    term = Term(one, schedule=combine_scheds(shares, scheds))
    fit(learner(cbs=[KD(teachers[0], term, task_weight=0), keep]))
    assert keep.losses==pytest.approx(expected, abs=1e-5)

def test_balanced_terms(teachers):
    "Each term has the share of its weight, whatever its own size, and its factor is a column."
    total = []
    class Watch(Callback):
        order = KD.order+1
        def after_loss(self):
            if self.training: total.append((self.loss/F.cross_entropy(self.pred, self.y)).item())
    def small(pred, teacher_pred): return SoftTarget(pred, teacher_pred)*1e-5
    def run(loss):
        kd = KD(teachers[0], [Term(loss, 0.5), Term(FitNet, 0.25, layers='5')], balance=True)
        return fit(learner(cbs=[kd, Watch()]))
    learns = [run(o) for o in (SoftTarget, small)]
    assert total==pytest.approx([1.75]*10, rel=1e-4)
    torch.testing.assert_close(weights(learns[0]), weights(learns[1]), rtol=1e-3, atol=1e-4)
    h,g = map(history, learns)
    assert [*h][-5:]==['task_loss','soft_target','fit_net','soft_target_weight','fit_net_weight']
    assert g.small_weight[0]==pytest.approx(1e5*h.soft_target_weight[0], rel=1e-2)

class Shuffled(nn.Module):
    "A model with other classes, in another order"
    def __init__(self, model, cols):
        super().__init__()
        self.model,self.cols = model,cols
    def forward(self, x): return self.model(x)[:,self.cols]

def test_class_maps(teachers):
    "A teacher with its classes in another order gives the training of one with the student's order."
    t,order = teachers[0].model,[3,1,4,0,5,9,2,6,8,7]
    def run(teacher, class_map=None):
        return weights(fit(learner(cbs=KD(teacher, [SoftTarget, DecoupledKD], class_map=class_map))))
    class_map = match_classes([*range(10)], order)
    torch.testing.assert_close(run(Shuffled(t, order), class_map), run(t))

def test_a_teacher_of_fewer_classes(teachers):
    "A loss compares the classes that the teacher has: both softmaxes are over these."
    seen,t = [],Shuffled(teachers[0].model, [7,2,5])
    def spy(pred, teacher_pred): seen.append((pred.shape, teacher_pred)); return SoftTarget(pred, teacher_pred)
    cols = match_classes([*range(10)], [7,2,5])
    learn = learner(cbs=KD(t, spy, class_map=cols))
    keep = KeepBatches()
    fit(learn, cbs=keep)
    assert cols==[-1,-1,1,-1,-1,2,-1,0,-1,-1]
    assert seen[0][0]==(20,3)
    with torch.no_grad(): expected = teachers[0].model.eval()(keep.batches[-1][0])[:,[2,5,7]]
    torch.testing.assert_close(seen[-1][1], expected)

def test_class_maps_are_checked(teachers):
    t,cols = Shuffled(teachers[0].model, [7,2,5]),match_classes([*range(10)], [7,2,5])
    with pytest.raises(ValueError, match='decoupled_kd reads labels, but the teacher lacks 7'):
        KD(t, DecoupledKD, class_map=cols)
    with pytest.raises(ValueError, match='has 3 classes, with columns up to 2, but the student predicts 10'):
        fit(learner(cbs=KD(t, SoftTarget, class_map=[0,1,2])))
    with pytest.raises(ValueError, match='at least two'): KD(t, SoftTarget, class_map=[0,0,1])

def test_a_class_map_allows_other_vocabularies():
    a,b = with_vocab(learner(), [*range(10)]),with_vocab(learner(width=6), [*range(10)][::-1])
    with pytest.raises(ValueError, match='class_map=match_classes'): fit(a, cbs=KD(b, SoftTarget))
    fit(a, cbs=KD(b, SoftTarget, class_map=match_classes(a, b)))

# ---- one line, and the report

def test_distill(teachers):
    "`distill` attaches a callback, trains nothing, and replaces the callback of an earlier call."
    learn = learner()
    before = weights(learn)
    assert learn.distill(teachers[0], weight=0.9) is learn
    assert torch.equal(weights(learn), before)
    assert repr(learn.knowledge_distillation)=='KnowledgeDistillationCallback: 1·task_loss + 0.9·SoftTarget(T=4)'
    learn.distill(teachers[0], Logits, layers='1', task_weight=0.5)
    assert repr(learn.knowledge_distillation).endswith(
        ': 0.5·task_loss + auto·schedule·Logits + auto·FitNet on 1, adapted')
    assert sum(isinstance(cb, KD) for cb in learn.cbs)==1
    assert [*history(fit(learn))][-2:]==['logits','fit_net']

@pytest.mark.parametrize('loss,terms', [
    (FitNet, ['FitNet on 1']), ([SoftTarget, FitNet], ['SoftTarget','FitNet on 1']),
    ([SoftTarget, Term(FitNet, 2.)], ['SoftTarget','2·FitNet on 1']),
    ([SoftTarget, Term(Similarity, layers='0')], ['SoftTarget','Similarity on 0','FitNet on 1, adapted'])])
def test_layers_of_distill_are_those_of_a_loss_that_needs_some(teachers, loss, terms):
    "otherwise another loss compares them"
    kd = learner().distill(teachers[0], loss, layers='1').knowledge_distillation
    got = repr(kd.objective).replace('auto·schedule·', '').replace('auto·', '')
    assert got==' + '.join(['1·task_loss', *terms])

def test_distill_finds_the_layers(teachers):
    "those of equal sizes; the random state and the order of the batches stay"
    learn = learner(width=4)
    random_state,order = torch.get_rng_state(),learn.dls.train.rng.getstate()
    learn.distill(teachers[0], layers='auto')
    assert torch.equal(random_state, torch.get_rng_state()) and order==learn.dls.train.rng.getstate()
    assert repr(learn.knowledge_distillation).endswith('SoftTarget(T=4) + auto·FitNet on 1, 2, adapted')
    assert repr(learn.distill(teachers[0], layers='auto', features=PKT).knowledge_distillation).endswith('PKT on 1, 2')
    fit(learn.distill(teachers[0], Similarity, layers='auto'))
    flat = Learner(learn.dls, nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), loss_func=CrossEntropyLossFlat())
    with pytest.raises(ValueError, match='No feature size is in both models'): flat.distill(teachers[0], layers='auto')
    for several in (dict(a=teachers[0], b=teachers[1]), StoredTeacher(torch.randn(100, 10))):
        with pytest.raises(ValueError, match="'auto' finds the layers of one network, got (dict|StoredTeacher)"):
            learn.distill(several, layers='auto')
    with pytest.raises(ValueError, match="'auto' and activations_student are the same argument"):
        learn.distill(teachers[0], layers='auto', activations_student='1')

def test_distill_lets_the_labels_teach_first(teachers):
    "A weight that is found rises from 0; with a schedule, a weight or without labels, it is as the user says."
    def factors(loss=SoftTarget, **kwargs):
        (term,) = learner().distill(teachers[0], loss, **kwargs).knowledge_distillation.terms
        return [term.schedule_at(o) for o in (0.,0.5,1.)]
    assert factors()==pytest.approx([0,0.5,1])
    constant = [dict(schedule=None), dict(task_weight=0), dict(weight=2), dict(loss=Term(SoftTarget, 2.)),
                dict(loss=Term(SoftTarget, 'auto', schedule=lambda _: 1.))]
    assert [factors(**o) for o in constant]==[[1,1,1]]*len(constant)

@pytest.mark.slow
@pytest.mark.parametrize('fitted', [True,False])
def test_report_changes_nothing(teachers, fitted, tmp_path):
    "Learner, teacher, random state and files stay as they are, and the next fit is the one without a report."
    def new():
        learn = learner(path=tmp_path, cbs=[CSVLogger(tmp_path/'h.csv'), SaveModelCallback(fname='s')])
        learn.distill(teachers[0], layers=['0','1'])
        return fit(learn) if fitted else learn
    a,b = new(),new()
    t = teachers[0].model.train()
    before,stamp = state(b),{p: p.stat().st_mtime_ns for p in tmp_path.rglob('*')}
    modes,sd = [m.training for m in t.modules()],deepcopy(t.state_dict())
    b.kd_report()
    after = state(b)
    assert [k for k in before if not same(before[k], after[k])]==[]
    assert same(t.state_dict(), sd)
    assert modes==[m.training for m in t.modules()]
    assert not hooks(t, b.model)
    assert stamp=={p: p.stat().st_mtime_ns for p in tmp_path.rglob('*')}
    assert torch.equal(weights(fit(a)), weights(fit(b)))

def test_report_equals_values_computed_by_hand(teachers):
    student = learner(width=4).distill(teachers[0], partial(SoftTarget, T=4), ['0','1'], Attention, weight=0.9)
    fit(student, 6)
    r = student.kd_report()
    assert [*r.scores.index]==['teacher','student']
    assert r.scores.accuracy.teacher==pytest.approx(teachers[0].validate()[1], abs=1e-6)
    assert [r.scores.valid_loss.student, r.scores.accuracy.student]==pytest.approx([*student.validate()], abs=1e-6)
    x,y = digits(100).valid.one_batch()
    p,q = answers(student.model, x),answers(teachers[0].model, x)
    assert r.agreement==pytest.approx((p.argmax(1)==q.argmax(1)).float().mean().item(), abs=1e-6)
    (c,k) = q.max(1)
    bins = [(c*15).long().clamp_max(14)==i for i in range(15)]
    ece = sum((k[m]==y[m]).float().sub(c[m]).sum().abs().item() for m in bins)/len(y)
    assert r.scores.calibration_error.teacher==pytest.approx(ece, abs=1e-5)
    assert r.scores.confidence.teacher==pytest.approx(c.mean().item(), abs=1e-5)
    t = r.terms
    assert [*t.index]==['task_loss','soft_target','attention']
    assert [*t.weight][:2]==[1,0.9]
    assert 0<t.gradient.attention<=1  # found on the first batch, over the layers that it reaches
    assert t.cosine.task_loss==pytest.approx(1)
    assert t['size'].soft_target==pytest.approx(0.9*t.value.soft_target/t.value.task_loss)
    assert [*r.layers.student]==['0','1']
    assert r.layers['shape of teacher'][1]==(20,16,4,4)
    assert 'They agree on' in repr(r)
    assert '<table' in r._repr_html_()
    assert not any('not better' in o for o in r.warnings)

def test_report_warns(teachers):
    good = fit(learner(width=8, dls=digits()), 6)
    def said(learn, *args, **kwargs): return ' / '.join(learn.distill(*args, **kwargs).kd_report().warnings)
    assert 'the teacher is not better than the student' in said(good, learner(width=6, seed=3))
    class Times10(nn.Module):
        def forward(self, x): return 10*x
    sure = nn.Sequential(deepcopy(good.model), Times10())
    assert 'soft_target at T=1 adds little' in said(learner(), sure, partial(SoftTarget, T=1))
    assert 'mutual at T=1' in said(learner(), sure, Mutual)
    assert 'at T=1' not in said(learner(), sure, partial(SoftTarget, T=4))
    w = said(learner(), good, Term(SoftTarget, 1e5))
    assert 'soft_target is ' in w
    assert 'times the task loss' in w
    assert 'raise its weight of 1e-06' in said(learner(), good, Term(SoftTarget, 1e-6))
    with pytest.raises(ValueError, match='no teacher to report on'): learner().kd_report()

SCHEMES = {
    'mean teacher': lambda learn, ts: MeanTeacher(learn),
    'mutual':       lambda learn, ts: MutualLearning(learner(width=6)),
    'token':        lambda learn, ts: DistillationToken(ts[0]),
    'exits':        lambda learn, ts: SelfDistillation('exit'),
    'balanced':     lambda learn, ts: KD(ts[0], Term(SoftTarget, 0.5), balance=True),
    'mixed':        lambda learn, ts: KD(ts[0], DecoupledKD),
    'subset':       lambda learn, ts: KD(Shuffled(ts[0].model, [7,2,5]), SoftTarget,
                                         class_map=match_classes(range(10), [7,2,5])),
    'ensemble':     lambda learn, ts: KD(Ensemble(ts), SoftTarget),
    'schedule':     lambda learn, ts: KD(ts[0], Term(SoftTarget, T=SchedLin(8,2)), schedule=SchedLin(0,1))}
STUDENTS = {'token': TwoHeads, 'exits': WithExit}

@pytest.mark.slow
@pytest.mark.parametrize('scheme', SCHEMES)
def test_reports_of_all_schemes(teachers, scheme):
    "A report works before the fit, changes nothing, and gives each term a gradient."
    learn = learner(model=STUDENTS[scheme]() if scheme in STUDENTS else None)
    learn.add_cb(SCHEMES[scheme](learn, teachers))
    if scheme=='mixed': learn.add_cb(MixUp())
    before = state(learn)
    r = learn.kd_report()
    assert same(before, state(learn))
    assert r.terms.gradient.iloc[1:].gt(0).all()
    assert r.scores.shape[0]==2
    fit(learn)
    if scheme=='balanced': assert r.terms['size'].soft_target==pytest.approx(0.5)

def test_report_where_the_task_does_not_count(teachers):
    r = learner().distill(teachers[0], Mutual, weight=0.5, task_weight=0).kd_report()
    t = r.terms
    assert [*t.weight]==[0,0.5]
    assert t['size'].mutual==pytest.approx(0.5*t.value.mutual/t.value.task_loss)
    assert t.gradient.mutual>0

def test_report_without_classes():
    "For regression the report has scores by loss and metrics, and no agreement."
    ds = [(x := torch.rand(4), x[:2]*2) for _ in range(32)]
    def make(n, metrics):
        model = nn.Sequential(nn.Linear(4,n), nn.ReLU(), nn.Linear(n,2))
        dls = DataLoaders.from_dsets(ds, ds, bs=8, num_workers=0)
        return quiet(Learner(dls, model, loss_func=MSELossFlat(), metrics=metrics))
    set_seed(0)
    t,s = make(16, []),make(4, [mae, rmse])
    t.fit(10, 1e-2)
    r = s.distill(t, Logits).kd_report()
    assert r.agreement is None
    assert [*r.scores]==['valid_loss','mae','_rmse']
    assert r.scores.valid_loss.teacher==pytest.approx(t.validate()[0])
    assert r.scores._rmse.teacher==pytest.approx(r.scores.valid_loss.teacher**0.5, rel=1e-4)
    assert 'agree' not in repr(r)

def test_report_after_an_interrupt(teachers):
    "An interrupted fit leaves a batch on the Learner, which a report does not change."
    learn = learner().distill(teachers[0])
    with pytest.raises(KeyboardInterrupt, match='^$'): fit(learn, cbs=Interrupt())
    assert learn.pred is not None
    assert learn.kd_report().scores.shape[0]==2
    assert learn.pred.requires_grad

def test_report_raises_the_errors_of_a_fit(teachers):
    "The errors are those of a fit, and Learner and teacher stay as they are."
    t = teachers[0].model.train()
    def bad(pred, teacher_pred): raise RuntimeError('bad loss')
    learn = learner().distill(t, bad)
    before = state(learn)
    with pytest.raises(RuntimeError, match='bad loss'): learn.kd_report()
    with pytest.raises(ValueError, match='No layer'): learner().distill(t, layers=[('stage9','0')]).kd_report()
    assert same(before, state(learn))
    assert all(m.training for m in t.modules())
    assert not hooks(t, learn.model)

# ---- the class axis of sequences

class PerStep(nn.Module):
    "Logits `(B, T, C)`"
    def __init__(self, seed): super().__init__(); set_seed(seed); self.layer = nn.Linear(3, 5)
    def forward(self, x): return self.layer(x)

@pytest.fixture
def sequences(): return torch.randn(8, 7, 3, generator=torch.Generator().manual_seed(0))

def mean_of_two(x, models):
    "KL of the student from the mean of the probabilities of two networks"
    p,*others = [m(x) for m in models]
    q = sum(o.softmax(-1) for o in others)/2
    return (q*(q.log()-p.log_softmax(-1))).sum(-1).mean().item()

def fit_sequences(student, cb, x):
    ds = [*zip(x, torch.zeros(8, 7, dtype=torch.long))]
    dls = DataLoaders(DataLoader(ds, bs=8), DataLoader(ds, bs=8))
    learn = quiet(Learner(dls, student, loss_func=CrossEntropyLossFlat(), cbs=cb))
    return fit(learn, 1, 0.)

def from_an_ensemble(*models): return KD(Ensemble(models), Mutual, weight=1.)

@pytest.mark.parametrize('scheme', [MutualLearning, from_an_ensemble])
def test_probabilities_of_sequences_are_averaged_over_classes(scheme, sequences):
    models = [PerStep(i) for i in range(3)]
    expected = mean_of_two(sequences, models)
    learn = fit_sequences(models[0], scheme(*models[1:]), sequences)
    assert history(learn)['mutual'].iloc[0]==pytest.approx(expected, rel=1e-4)

def test_an_ensemble_of_sequences_without_an_axis(sequences):
    "The advice gives the mean over classes"
    models = [PerStep(1),PerStep(2)]
    with pytest.raises(ValueError, match=r'give Ensemble\(teachers, axis=-1\) or axis=1'): Ensemble(models)(sequences)
    got = Ensemble(models, axis=-1)(sequences).softmax(-1)
    torch.testing.assert_close(got, (models[0](sequences).softmax(-1)+models[1](sequences).softmax(-1))/2)
