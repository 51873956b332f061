"Which forward pass, which batch and which labels a fit uses, and what it says about a teacher at its start."
import pickle, warnings
from copy import deepcopy
from functools import partial
import pytest, torch
import torch.nn.functional as F
from torch import nn
from fastai.basics import (Adam, Callback, CancelFitException, DataLoader, DataLoaders, SGD, ranger, set_seed)
from fastai.callback.mixup import MixUp
from fastai.callback.schedule import SchedLin, minimum
from kd_fastai.all import (Ensemble, FitNet, FunctionTeacher, Logits, MultiLabel, Mutual,
    MutualLearning, Similarity, SoftTarget, Term)
from kd_fastai.methods.gates import by_position
from support.batches import FGSM, Items, KD, Keep, data, differences, fit, learner, mlp

pytestmark = pytest.mark.filterwarnings('ignore:The teacher agrees')   # teachers are not trained

@pytest.mark.parametrize('order', [-5, 0, 20])
def test_the_teacher_predicts_for_what_the_learner_feeds_its_model(order):
    assert differences([FGSM(order)])<1e-6

def test_features_are_those_of_the_learners_own_forward():
    "A callback of any order may run the model before and after it."
    class After(Callback):
        order,run_valid = -20,False
        def after_pred(self): self.model(torch.zeros(2,6))
    seen = []
    def loss(fm_s, pred): seen.append((fm_s['2'], pred)); return pred.mean()
    fit(learner(mlp(1), [FGSM(20), After(), KD(mlp(9), loss, '2', weight=1.)]))
    for f,pred in seen: assert torch.equal(f, pred)

def test_a_pre_hook_of_the_user_does_not_change_the_teachers_input():
    student = mlp(1)
    student.register_forward_pre_hook(lambda m, args: (args[0]*5-2,))
    assert differences([], student)<1e-6

def test_positions_are_those_of_the_batch_that_trains():
    "A callback may draw another batch before."
    class Second(Callback):
        order,run_valid = -10,False
        def before_batch(self): self.other = self.learn.dls.train.one_batch()
    dls,keep,got = data(shuffle=True),Keep(),[]
    inner = by_position(dls.train_ds.x[:,0])
    def gate(batch): got.append(inner(batch)); return got[-1].abs()
    gate.uses_idx = True
    fit(learner(mlp(1), [Second(), keep, KD(mlp(9), Term(SoftTarget, 1., sample_weight=gate))], dls))
    for x,w in zip(keep.x, got): torch.testing.assert_close(x[:,0], w)

def test_fields_are_read_before_the_student_takes_them():
    class Dicts(Items):
        def __getitem__(self, i): return {'x': self.x[i], 'w': self.x[i,0].abs()},self.y[i]
    class Pops(nn.Module):
        def __init__(self): super().__init__(); self.body = mlp(1)
        def forward(self, b): b.pop('w', None); return self.body(b['x'])
    class Reads(nn.Module):
        def __init__(self): super().__init__(); self.body = mlp(9)
        def forward(self, b): return self.body(b['x'])
    dl = DataLoader(Dicts(), bs=16)
    fit(learner(Pops(), KD(Reads(), Term(SoftTarget, 1., sample_weight='w')), DataLoaders(dl, dl)))

@pytest.mark.parametrize('off', [0, 1])
def test_one_of_two_callbacks_may_be_off(off):
    cbs = [KD(mlp(9), SoftTarget), KD(mlp(8), Logits)]
    cbs[off].run = False
    learn = fit(learner(mlp(1), cbs))
    assert [*learn.kd_history()][2:]==['task_loss', ('logits','soft_target')[off]]

@pytest.mark.parametrize('leave', [lambda learn, kd: learn.remove_cb(kd), lambda learn, kd: setattr(kd, 'run', False)],
                         ids=['removed','off'])
def test_the_first_of_two_callbacks_leaves_in_mid_epoch(leave):
    "The second trains on as if it were the only one."
    first,second = KD(mlp(9), Term(SoftTarget, 1.)),KD(mlp(8), Term(Logits, 0.5))
    class Leave(Callback):
        order = 50
        def after_batch(self):
            if self.training and first.run and first in self.learn.cbs: leave(self.learn, first)
    class Sum(Callback):
        order = KD.order+1
        def __init__(self): self.expected,self.loss = [],[]
        def after_loss(self):
            if not self.training: return
            task = F.cross_entropy(self.pred, self.yb[0])
            self.expected.append((task+0.5*Logits(self.pred, mlp(8)(self.xb[0]))).item())
            self.loss.append(self.learn.loss.item())
    seen = Sum()
    fit(learner(mlp(1), [first, second, Leave(), seen]), 2)
    assert len(seen.loss)==8 and seen.loss[0]>seen.expected[0]
    assert seen.loss[1:]==pytest.approx(seen.expected[1:])

def test_the_only_callback_is_turned_off_in_mid_epoch():
    "The student trains on without a teacher."
    kd = KD(mlp(9), Term(SoftTarget, 1.), teacher_inputs=0)
    class Off(Callback):
        order = 50
        def after_batch(self): kd.run = False
    class Compare(Callback):
        order = KD.order+1
        def __init__(self): self.is_task = []
        def after_loss(self):
            if self.training: self.is_task.append(self.learn.loss.item()==F.cross_entropy(self.pred, self.yb[0]).item())
    seen = Compare()
    fit(learner(mlp(1), [kd, Off(), seen]))
    assert seen.is_task==[False,True,True,True]

def test_a_term_that_counts_later_is_checked_later():
    "A schedule that begins at 0 hides a missing gradient only as long as it is 0."
    def detached(pred, teacher_pred): return (pred-teacher_pred).detach().pow(2).mean()
    kd,seen = KD(mlp(9), Term(detached, 1., schedule=SchedLin(0, 1))),Keep()
    with pytest.raises(ValueError, match='detached gives the student no gradient'):
        fit(learner(mlp(1), [kd, seen]))
    assert len(seen.x)==2

def test_weights_that_are_not_compared_are_said_once(capsys):
    "Without a task loss, 'auto' has nothing to compare with in any epoch."
    learn = learner(mlp(1), KD(mlp(9), SoftTarget, task_weight=0))
    learn.logger = print
    fit(learn, 3)
    assert capsys.readouterr().out.count('weights are the defaults: soft_target')==1

def test_a_validation_within_an_epoch():
    class Look(Callback):
        order = 80
        def after_batch(self):
            if not self.training or self.iter!=1: return
            dl = self.learn.dl
            self.learn.validate()
            self.model.train()
            self.learn.training,self.learn.dl = True,dl
    fit(learner(mlp(1), [KD(mlp(9), Term(FitNet, 1., layers='0')), Look()]), 2)

def test_columns_have_names_of_their_own():
    "A metric of the user may be named as a term."
    def soft_target(pred, y): return F.cross_entropy(pred, y)
    columns = [*fit(learner(mlp(1), KD(mlp(9), SoftTarget), metrics=soft_target)).kd_history()]
    assert columns[-3:]==['soft_target','task_loss','soft_target#2']

def test_losses_on_features_read_no_predictions():
    "A student may return what no loss on predictions can read."
    class Net(nn.Module):
        def __init__(self, seed): super().__init__(); self.body = mlp(seed)
        def forward(self, x): return {'out': self.body(x), 'aux': x}
    def task(pred, y): return F.cross_entropy(pred['out'], y)
    learn = learner(Net(1), KD(Net(9), FitNet, 'body.0', weight=1.), loss_func=task)
    assert fit(learn).kd_history().fit_net[0]>0

# ---- weights that are found

def test_lr_find_holds_schedules_constant():
    "The suggestions are those of the loss at a constant weight."
    def find(**kwargs):
        set_seed(0)
        learn = learner(mlp(1)).distill(mlp(9), **kwargs)
        with learn.no_bar(): return learn.lr_find(suggest_funcs=minimum, show_plot=False).minimum
    assert 0.1<find()/find(schedule=lambda p: 0.5)<10

@pytest.mark.filterwarnings('ignore:.* are frozen')
def test_a_frozen_phase_leaves_no_weight_behind():
    "The weight of a term on frozen layers is found when they train."
    def split(model): return [[*model[0].parameters()], [*model[2].parameters()]]
    learn = learner(mlp(1), splitter=split)
    kd = KD(mlp(9), FitNet, '0')
    with pytest.warns(UserWarning, match='default of the loss'), learn.no_bar():
        learn.add_cb(kd)
        learn.freeze(); learn.fit(1)
    before = kd.weights['fit_net']
    learn.unfreeze()
    fit(learn)
    assert kd.weights['fit_net']!=before

@pytest.mark.filterwarnings('ignore')
def test_layers_that_are_unfrozen_within_a_fit_find_a_weight():
    class Unfreeze(Callback):
        def before_epoch(self): self.model[0].requires_grad_(self.epoch>0)
    kd = KD(mlp(9), Term(Similarity, layers='0'))
    fit(learner(mlp(1), [Unfreeze(), kd]), 2)
    assert 0<kd.weights['similarity']<1000  # the default of the loss is 3000

def test_compiled_students_find_a_weight():
    "Their graph has one backward pass, so the gradients are compared at the predictions."
    student = torch.compile(mlp(1), backend='aot_eager')
    learn = fit(learner(student).distill(mlp(9)))
    assert 0<learn.knowledge_distillation.weights['soft_target']<1e3

def test_reentrant_checkpoints_find_a_weight():
    class Net(nn.Module):
        def __init__(self): super().__init__(); self.body = mlp(1)
        def forward(self, x):
            h = self.body[0](x)
            return self.body[2](torch.utils.checkpoint.checkpoint(self.body[1], h, use_reentrant=True))
    learn = fit(learner(Net()).distill(mlp(9)))
    assert 0<learn.knowledge_distillation.weights['soft_target']<1e3

# ---- state

def adapted(seed=9): return KD(mlp(seed, hidden=10), Term(FitNet, 2., layers='0', adapt='auto'))

def adapter(kd): return kd.objective.modules[0].adapters[0]

def test_each_callback_gets_its_own_weights_back(tmp_path):
    "They are kept by terms and teacher, not by order."
    first,second = adapted(8),adapted(9)
    learn = fit(learner(mlp(1), [first, second], path=tmp_path))
    learn.save('model')
    own = deepcopy([*adapter(second).parameters()])
    learn.remove_cb(first)
    fit(learn)
    learn.load('model')
    for a,b in zip(adapter(second).parameters(), own): assert torch.equal(a, b)

def test_a_sidecar_that_was_cut_short(tmp_path):
    "Loading says so, and the next save replaces it."
    learn = fit(learner(mlp(1), adapted(), path=tmp_path))
    learn.save('model')
    sidecar = tmp_path/'models'/'model.kd.pth'
    sidecar.write_bytes(sidecar.read_bytes()[:len(sidecar.read_bytes())//2])
    with pytest.warns(UserWarning, match='model.kd.pth is damaged'): learn.load('model')
    learn.save('model')
    with warnings.catch_warnings():
        warnings.simplefilter('error', UserWarning)
        learn.load('model')
    assert sorted(p.name for p in sidecar.parent.iterdir())==['model.kd.pth','model.pth']

class StopAndSave(Callback):
    order = 90
    def after_epoch(self):
        if self.epoch==0: self.learn.save('checkpoint'); raise CancelFitException()

@pytest.mark.parametrize('opt_func', [SGD, Adam, ranger])
def test_a_resumed_training_equals_an_uninterrupted_one(tmp_path, opt_func):
    "With the optimizer's state of the adapters, slow weights included, also if the callback moves to a new Learner."
    def make(kd): return learner(mlp(1), kd, path=tmp_path, opt_func=opt_func)
    def new(): set_seed(7); return KD(mlp(9), Term(FitNet, 5., layers='0', adapt=nn.Linear(8, 8)))
    whole = fit(make(new()), 3, 0.05)
    for move in (False, True):
        stopped,kd = make(None),new()
        stopped.add_cbs([kd, StopAndSave()])
        fit(stopped, 3, 0.05)
        if move: stopped.remove_cb(kd)
        resumed = make(kd if move else new())
        resumed.load('checkpoint')
        fit(resumed, 3, 0.05, start_epoch=1)
        for a,b in zip(resumed.model.parameters(), whole.model.parameters()):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-6)

def test_a_new_optimizer_within_a_fit_trains_the_adapters():
    kept,kd = [],adapted()
    class New(Callback):
        def before_epoch(self):
            if self.epoch==1: self.learn.create_opt()
        def after_epoch(self): kept.append(adapter(kd).channels.weight.detach().clone())
    learn = fit(learner(mlp(1, hidden=8), [kd, New()]), 3)
    assert not torch.equal(kept[1], kept[2])
    assert sum(len(g) for g in learn.opt.param_lists)==len([*learn.model.parameters()])

def test_a_callback_with_another_student_says_that_it_goes_on():
    kd = adapted()
    fit(learner(mlp(1)), cbs=kd)
    with pytest.warns(UserWarning, match='trained with another student'): fit(learner(mlp(2)), cbs=kd)

def test_a_pickled_learner_says_that_it_has_no_teacher():
    other = pickle.loads(pickle.dumps(learner(mlp(1), KD(mlp(9), SoftTarget))))
    with pytest.warns(UserWarning, match='was not pickled, and it trains without'): fit(other)

# ---- what is said

def said(teacher, loss, **kwargs):
    "The warnings of a fit"
    with warnings.catch_warnings(record=True) as ws:
        warnings.simplefilter('always')
        fit(learner(mlp(1), KD(teacher, loss, **kwargs)))
    return ' '.join(str(w.message) for w in ws)

def test_probabilities_are_noticed():
    "Once, by the teacher: also for each of several, and for a function."
    softmax = nn.Sequential(mlp(9), nn.Softmax(1))
    for teacher in softmax, {'a': softmax, 'b': mlp(8)}, FunctionTeacher(softmax, numpy=False):
        loss = [Term(SoftTarget, teacher=k) for k in teacher] if isinstance(teacher, dict) else SoftTarget
        assert said(teacher, loss).count('losses expect logits')==1
    assert 'probabilities' not in said(nn.Sequential(mlp(9), nn.LogSoftmax(1)), SoftTarget)

def test_probabilities_of_a_student_and_of_a_sigmoid_are_noticed():
    expected = 'The predictions of the student are probabilities'
    student = nn.Sequential(mlp(1), nn.Softmax(1))
    with pytest.warns(UserWarning, match=expected): fit(learner(student, KD(mlp(9), SoftTarget)))
    teacher = nn.Sequential(mlp(9), nn.Sigmoid())
    assert 'leave out its last sigmoid' in said(teacher, MultiLabel)
    assert 'sigmoid' not in said(teacher, Logits)+said(mlp(9), MultiLabel)

def first_warning(teacher, n=256):
    "What is said before the eighth step, and the number of warnings in all"
    class At(Callback):
        order,run_valid = 60,False
        def after_step(self): early.append(len(ws))
    early,labels = [],mlp(9)(Items(n).x).argmax(1)
    dl = DataLoader(list(zip(Items(n).x, labels)), bs=16)
    with warnings.catch_warnings(record=True) as ws:
        warnings.simplefilter('always')
        fit(learner(mlp(1), [KD(teacher, SoftTarget), At()], DataLoaders(dl, dl)))
    return ' '.join(str(w.message) for w in ws[:early[7]]),len(ws)

def test_an_untrained_teacher_is_noticed_in_the_first_batches():
    text,n = first_warning(mlp(3))
    assert 'hardly more than by chance' in text and n==1
    assert first_warning(mlp(9))==('', 0)

def test_an_untrained_one_of_several_teachers_is_named():
    dl = DataLoader(list(zip(Items(256).x, mlp(9)(Items(256).x).argmax(1))), bs=16)
    terms = [Term(SoftTarget, teacher=k) for k in ('good','bad')]
    with pytest.warns(UserWarning, match="The teacher 'bad' agrees with .* hardly more than by chance") as ws:
        fit(learner(mlp(1), KD({'good': mlp(9), 'bad': mlp(3)}, terms), DataLoaders(dl, dl)))
    assert len(ws)==1

def test_a_teacher_that_is_worse_than_the_student_is_noticed_on_the_first_batch():
    class Stop(Callback):
        order = 70
        def after_batch(self): raise CancelFitException
    dl = DataLoader(list(zip(Items().x, mlp(9)(Items().x).argmax(1))), bs=32)
    def fit_first(student, teacher): fit(learner(student, [KD(teacher, SoftTarget), Stop()], DataLoaders(dl, dl)))
    with pytest.warns(UserWarning, match='the student agrees with 100% of the labels'): fit_first(mlp(9), mlp(3))
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        fit_first(mlp(3), mlp(9))

# ---- models with several outputs

class TwoHeads(nn.Module):
    def __init__(self, seed, kind):
        super().__init__()
        self.body,self.kind = mlp(seed, n_out=8),kind
        self.a,self.b = nn.Linear(8, 5),nn.Linear(8, 3)
    def forward(self, x):
        a,b = self.a(f := self.body(x)),self.b(f)
        return {'tuple': (a, b), 'dict': dict(out=a, aux=b), 'after embedding': (f, b)}[self.kind]

@pytest.mark.parametrize('kind,layer,i', [
    ('tuple','b',1), ('tuple',':1',1), ('dict',':out','out'), ('dict',':aux','aux'), ('after embedding',':1',1)])
def test_a_term_names_the_output_that_it_compares(kind, layer, i):
    def task(pred, y): return F.cross_entropy(pred['out'] if kind=='dict' else pred[1].repeat(1,2), y)
    student,teacher,got = TwoHeads(1, kind),TwoHeads(9, kind),[]
    class Values(Callback):
        order,run_valid = 6,False
        def after_loss(self): got.append(kd.fit_state.values['soft_target'].item())
    kd = KD(teacher, Term(SoftTarget, 1., layers=layer))
    x = Items().x[:16]
    expected = SoftTarget(student(x)[i], teacher(x)[i]).item()
    fit(learner(student, [kd, Values()], loss_func=task), lr=0.)
    assert got[0]==pytest.approx(expected)

def test_a_term_on_predictions_has_one_layer():
    with pytest.raises(ValueError, match='those of one layer'): Term(SoftTarget, layers=['0','2'])

def test_a_constant_term_is_noticed():
    def constant(fm_s, fm_t): return sum((f-f).sum() for f in fm_s.values())
    assert 'constant was 0 in the whole epoch' in said(mlp(9), constant, layers='0', weight=1.)

def test_a_second_callback_for_the_same_teacher_is_noticed():
    teacher = mlp(9)
    with pytest.warns(UserWarning, match='their terms add up'):
        fit(learner(mlp(1)).distill(teacher), cbs=KD(teacher, SoftTarget))

def test_a_teacher_that_is_much_smaller_is_noticed():
    with pytest.warns(UserWarning, match=r'student.distill\(teacher\) is the order'):
        learner(mlp(1, hidden=80)).distill(learner(mlp(9)))

@pytest.mark.parametrize('kwargs,advice', [
    (dict(T=4), 'as in Term(SoftTarget, T=4)'), (dict(temperature=4), 'as in Term(SoftTarget, T=4)'),
    (dict(alpha=0.9), 'weight=0.9'), (dict(weights=[0.5]), 'weight=[0.5]'),
    (dict(loss=nn.KLDivLoss()), 'take SoftTarget')])
def test_words_that_do_not_exist_name_those_that_do(kwargs, advice):
    for make in (learner(mlp(1)).distill, partial(KD, **{'loss': SoftTarget, **kwargs})):
        with pytest.raises((TypeError,ValueError)) as e: make(mlp(9), **kwargs)
        assert advice in str(e.value)

def test_layers_are_found_by_distill_only():
    with pytest.raises(ValueError, match=r'layers=match_feature_layers\(learn.model'):
        KD(mlp(9), [SoftTarget, FitNet], layers='auto')

def test_swapped_arguments_and_functions_as_teachers():
    with pytest.raises(TypeError, match='teacher and loss are swapped'): learner(mlp(1)).distill(SoftTarget, mlp(9))
    with pytest.raises(TypeError, match='give FunctionTeacher'): learner(mlp(1)).distill(lambda x: x)

def test_advice_can_be_followed():
    for loss in (Term(SoftTarget, T=4), lambda pred, teacher_pred: nn.MSELoss()(pred, teacher_pred)):
        fit(learner(mlp(1)).distill(mlp(9), loss))

def test_scripted_students_train():
    fit(learner(torch.jit.script(mlp(1)), KD(mlp(9), SoftTarget)))

def test_networks_that_teach_each_other_share_the_class_axis():
    "Probabilities of several teachers are averaged over classes, where these are the last dimension."
    class Net(nn.Module):
        def __init__(self, seed): super().__init__(); set_seed(seed); self.body = nn.Linear(3, 5)
        def forward(self, x): return self.body(x)
    set_seed(0)
    x,y = torch.randn(8, 7, 3),torch.randint(5, (8,7))
    dl = DataLoader(list(zip(x, y)), bs=8)
    p = [Net(i)(x) for i in (1,2,3)]
    q = (p[1].softmax(-1)+p[2].softmax(-1))/2
    want = (q*(q.log()-p[0].log_softmax(-1))).sum(-1).mean().item()
    for cb,name in ((MutualLearning(Net(2), Net(3)), 'mutual'), (KD(Ensemble([Net(2), Net(3)]), Mutual), 'mutual')):
        learn = fit(learner(Net(1), cb, DataLoaders(dl, dl)), 1, 0.)
        assert learn.kd_history()[name][0]==pytest.approx(want, rel=1e-5)

def test_a_first_callback_that_does_not_run_leaves_the_inputs_to_the_second():
    "The first running callback gives the teacher its inputs"
    ds = Items()
    rows = [(x, x.flip(-1), y) for x,y in zip(ds.x, ds.y)]
    dls = DataLoaders(*(DataLoader(rows, bs=16, num_workers=0, n_inp=2) for _ in range(2)))
    def kd(weight): return KD(mlp(1), SoftTarget, weight=weight, teacher_inputs=1)
    def trained(*cbs): return list(fit(learner(mlp(), [*cbs], dls)).model.parameters())
    off,alone = kd(2.),trained(kd(1.))
    off.run = False
    assert all(torch.equal(a, b) for a,b in zip(trained(off, kd(1.)), alone))

def test_mixing_that_is_turned_off_does_not_mix_labels():
    "MixUp keeps the labels of its last batch: without `run` they are those of another batch."
    class Off(Callback):
        order,run_valid = MixUp.order-1,False
        def before_batch(self): self.learn.mix_up.run = self.iter==0
    seen = []
    def spy(pred, teacher_pred, target): seen.append(len(pred)); return F.cross_entropy(pred, target)
    kd = KD(mlp(9), Term(spy, 1.))
    fit(learner(mlp(1), [MixUp(), Off(), kd]))
    assert seen==[16,16]+[16]*3   # twice for the labels of both partners, and then once
