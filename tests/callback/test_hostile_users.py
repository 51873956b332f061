"Cases that once trained something wrong in silence, lost something of the user's, or had no clear message."
import copy, pickle, pickletools, random, warnings, weakref, zipfile
from functools import partial
import numpy as np, pytest, torch
import torch.nn.functional as F
from torch import nn
from fastai.basics import Adam, Callback, DataLoaders, L, Learner, OptimWrapper, ranger, set_seed
from kd_fastai.all import *
from kd_fastai.callback import loss_layout
from kd_fastai.demo import digits, small_net
from kd_fastai.fit.internals import ScopedCallback
from kd_fastai.objective import Batch
from support import KD, fit, history, hooks, learner, quiet, weights

pytestmark = [pytest.mark.hostile, pytest.mark.filterwarnings('ignore::UserWarning')]
SGD = partial(OptimWrapper, opt=torch.optim.SGD)

@pytest.fixture(scope='module')
def teacher():
    set_seed(5)
    learn = learner(dls=digits())
    return fit(learn, 2).model

class Owned(nn.Module):
    "FitNet after a trained scale"
    def __init__(self): super().__init__(); self.w = nn.Parameter(torch.ones(1))
    def forward(self, fm_s, fm_t): return FitNet({k: self.w*v for k,v in fm_s.items()}, fm_t)

# ---- parameters belong to one owner

class HoldsStudent(nn.Module):
    "A loss that uses a layer of the student"
    def __init__(self, student): super().__init__(); self.student = student
    def forward(self, pred, teacher_pred): return F.mse_loss(pred, teacher_pred) + 0*self.student[0][0].weight.sum()

def test_a_loss_that_holds_the_student_leaves_its_parameters_in_the_optimizer(teacher):
    model = small_net(4)
    learn = fit(learner(KD(teacher, HoldsStudent(model)), model=model))
    assert sum(map(len, learn.opt.param_lists))==len([*model.parameters()])

def test_a_loss_that_holds_the_student_trains_as_a_function_does(teacher):
    def loss(pred, teacher_pred): return F.mse_loss(pred, teacher_pred)
    a,b = small_net(4),small_net(4)
    b.load_state_dict(a.state_dict())
    holds = fit(learner(KD(teacher, HoldsStudent(a)), model=a, opt_func=SGD), 2)
    plain = fit(learner(KD(teacher, loss), model=b, opt_func=SGD), 2)
    torch.testing.assert_close(weights(holds), weights(plain))

class HoldsTeacher(nn.Module):
    def __init__(self, teacher): super().__init__(); self.teacher = teacher
    def forward(self, pred, teacher_pred):
        return F.mse_loss(pred, teacher_pred) + self.teacher[0][0].weight.pow(2).sum()

def test_a_loss_that_holds_the_teacher_does_not_train_it(teacher):
    before,modes = weights(teacher),[m.training for m in teacher.modules()]
    fit(learner(KD(teacher, HoldsTeacher(teacher))))
    assert torch.equal(weights(teacher), before)
    assert [m.training for m in teacher.modules()]==modes

def test_one_owned_loss_in_two_callbacks_is_trained_once(teacher):
    own,seen = Owned(),[]
    class Look(Callback):
        def before_step(self): seen.append(sum(p is own.w for group in self.opt.param_lists for p in group))
    fit(learner([KD(teacher, own, '1'), KD(teacher, own, '1'), Look()]))
    assert {*seen[1:]}=={1}

def test_one_network_twice_in_mutual_learning_is_an_error():
    peer = small_net(4)
    with pytest.raises(ValueError, match='one of them twice'): MutualLearning(peer, peer)

def test_a_shared_parameter_is_an_error(teacher):
    t,s = copy.deepcopy(teacher),small_net(4)
    s[0][0].weight = t[0][0].weight
    with pytest.raises(ValueError, match='are the same tensor'): fit(learner(KD(t, SoftTarget), model=s))

# ---- the Learner's own forward pass

def net_without_statistics():
    convs = nn.Conv2d(1,4,3,2,1),nn.Conv2d(4,8,3,2,1)
    return nn.Sequential(*convs, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8,10))

@pytest.mark.parametrize('event', ['after_pred', 'before_batch'])
def test_another_forward_pass_does_not_change_the_features(event):
    def again(self): self.learn.model(torch.zeros_like(self.x))
    Again = type('Again', (Callback,), {event: again, 'run_valid': False})
    set_seed(3)
    teacher,student = net_without_statistics(),net_without_statistics()
    def value(*cbs):
        learn = learner([KD(teacher, FitNet, '1'), *cbs], model=copy.deepcopy(student))
        return history(fit(learn)).fit_net[0]
    assert value(Again())==value()

class InPlace(nn.Module):
    def __init__(self): super().__init__(); self.body = small_net(4)
    def forward(self, x): return self.body(x.sub_(x.mean()))

def test_a_student_that_changes_its_input_does_not_change_the_answer(teacher):
    seen,inputs = [],[]
    def spy(pred, teacher_pred): seen.append(teacher_pred); return pred.sum()*0
    class Keep(Callback):
        run_valid = False
        def before_batch(self): inputs.append(self.x.clone())
    fit(learner([KD(teacher, spy), Keep()], model=InPlace()))
    with torch.no_grad():
        for pred,x in zip(seen, inputs): torch.testing.assert_close(pred, teacher.eval()(x))
    assert len(seen)==5

def test_a_random_teacher_moves_no_random_number_of_the_student():
    class Noisy(nn.Module):
        def __init__(self): super().__init__(); self.net,self.outputs = small_net(4),[]
        def forward(self, x): self.outputs.append(F.dropout(self.net(x), 0.5, True)); return self.outputs[-1]
    def model():
        set_seed(0)
        return nn.Sequential(nn.Dropout(0.5), nn.Flatten(), nn.Linear(64,10))
    noisy = Noisy()
    a = fit(learner(KD(noisy, SoftTarget, weight=0.), model=model()))
    b = fit(learner(model=model()))
    assert torch.equal(weights(a), weights(b))
    assert len({(o!=0).float().mean().item() for o in noisy.outputs})>1  # another mask each time

@pytest.mark.parametrize('draw', [random.random, np.random.randn, lambda: torch.rand(1).item()],
                         ids=['python','numpy','torch'])
def test_a_teacher_that_draws_now_and_then_moves_no_random_number(draw):
    "from any generator; its draws are a stream that goes on"
    drawn,states,n = [],[],[0]
    class Sometimes(nn.Module):
        def __init__(self): super().__init__(); self.net = small_net(4)
        def forward(self, x):
            n[0] += 1
            if n[0] in (3,4): drawn.append(draw())
            return self.net(x)
    class Draw(Callback):
        run_valid = False
        def after_batch(self): states.append((random.random(), np.random.randn(), torch.rand(1).item()))
    def run(*cbs):
        states.clear()
        random.seed(5)
        fit(learner([*cbs, Draw()]))
        return [*states]
    assert run(KD(Sometimes(), SoftTarget, weight=0.))==run()
    assert len(drawn)==2 and drawn[0]!=drawn[1]

def test_no_feature_of_the_teacher_lives_until_the_next_batch(teacher):
    alive,refs = [],[]
    handle = teacher[1].register_forward_hook(lambda module, inputs, out: refs.append(weakref.ref(out)))
    class Look(Callback):
        order,run_valid = KnowledgeDistillationCallback.order+1,False
        def after_batch(self): alive.append(refs[-1]() is not None)
    fit(learner([KD(teacher, FitNet, '1'), Look()]))
    handle.remove()
    assert alive==[False]*5

# ---- several callbacks

def test_balance_of_a_second_callback_compares_with_the_task(teacher):
    total = []
    class Look(Callback):
        order,run_valid = KnowledgeDistillationCallback.order+1,False
        def after_loss(self): total.append((self.loss/F.cross_entropy(self.pred, self.y)).item())
    cbs = [KD(teacher, Term(SoftTarget, 1.)), KD(teacher, Term(Logits, 0.5), balance=True), Look()]
    h = history(fit(learner(cbs)))
    assert h.logits_weight[0]*h.logits[0]==pytest.approx(0.5*h.task_loss[0], rel=0.2)

def test_an_unlabeled_batch_keeps_the_first_callbacks_terms(teacher):
    train,valid = digits(100).train_ds,digits(100).valid_ds
    def unlabeled():
        set_seed(0)
        return DataLoaders.from_dsets([(x, torch.tensor(-100)) for x,_ in train], valid, bs=20, num_workers=0)
    both = fit(learner([KD(teacher, SoftTarget), KD(teacher, Logits)], unlabeled()))
    one = fit(learner(KD(teacher, [SoftTarget, Logits]), unlabeled()))
    torch.testing.assert_close(weights(both), weights(one))

def test_columns_of_two_callbacks_have_different_names(teacher):
    h = history(fit(learner([KD(teacher, SoftTarget), KD(teacher, SoftTarget)])))
    assert [*h][-3:]==['task_loss','soft_target','soft_target#2']

def test_two_callbacks_share_one_file(teacher, tmp_path):
    def new(dls=None): return learner([KD(teacher, Owned(), '1'), KD(teacher, Owned(), '0')], dls, path=tmp_path)
    def scales(learn): return [cb.terms[0].loss.w.item() for cb in learn.cbs if isinstance(cb, KD)]
    a = fit(new()); a.save('m')
    b = new(a.dls).load('m')
    fit(b, lr=0.)
    assert scales(a)==pytest.approx(scales(b))
    assert scales(a)[0]!=scales(a)[1]

# ---- files

def test_a_users_file_is_not_overwritten(teacher, tmp_path):
    learn = fit(learner(KD(teacher, Owned(), '1'), path=tmp_path))
    (tmp_path/'models').mkdir(exist_ok=True)
    torch.save('mine', tmp_path/'models'/'m.kd.pth')
    with pytest.raises(FileExistsError, match='not a file of kd_fastai'): learn.save('m')
    assert torch.load(tmp_path/'models'/'m.kd.pth')=='mine'

def test_weights_of_another_training_are_not_loaded(teacher, tmp_path):
    a = fit(learner(KD(teacher, Owned(), '1'), path=tmp_path)); a.save('m')
    b = learner(path=tmp_path); b.save('m')   # without a callback: the sidecar stays
    c = learner(KD(teacher, Owned(), '1'), a.dls, path=tmp_path)
    with pytest.warns(UserWarning, match='saved with another m.pth'): c.load('m')

def test_other_terms_are_refused_on_load(teacher, tmp_path):
    a = fit(learner(KD(teacher, Owned(), '1'), path=tmp_path)); a.save('m')
    b = fit(learner(KD(teacher, Term(FitNet, adapt=partial(make_adapter, kernel=3)), '1'), a.dls, path=tmp_path))
    words = r"Expected weights of the losses \['fit_net'\], got those of \['owned'\]"
    with pytest.raises(ValueError, match=words): b.load('m')

# ---- the Learner keeps what is the user's

def test_own_methods_of_the_user_come_back(teacher):
    learn,calls = learner(),[]
    def parameters(): calls.append(1); return learn.model.parameters()
    learn.parameters = parameters
    fit(learn, cbs=KD(teacher, Owned(), '1'))
    assert learn.parameters is parameters

def modules_in_file(file, package):
    "Names of a package's modules that an exported Learner imports"
    with zipfile.ZipFile(file) as f:
        data = next(f.read(n) for n in f.namelist() if n.endswith('data.pkl'))
    words = {str(arg).split()[0] for _,arg,_ in pickletools.genops(data) if isinstance(arg, str) and arg.strip()}
    return {o for o in words if o.split('.')[0]==package}

@pytest.mark.parametrize('when', ['after_batch','after_epoch'])
@pytest.mark.parametrize('opt', [Adam, ranger, SGD], ids=['Adam','ranger','SGD'])
def test_export_during_a_fit(teacher, opt, when, tmp_path):
    ds = [(torch.rand(1,8,8), i%10) for i in range(40)]
    dls = DataLoaders.from_dsets(L(ds), L(ds), bs=20, num_workers=0)
    dls.new_empty = lambda: DataLoaders.from_dsets(L(), L(), bs=20)
    class SaveOften(Callback):
        order = 70
        def after_batch(self):
            if when=='after_batch' and self.training: self.learn.export('m.pkl')
        def after_epoch(self):
            if when=='after_epoch': self.learn.export('m.pkl')
    kd = KD(teacher, [SoftTarget, Term(Owned(), layers='1')])
    learn = fit(learner([kd, SaveOften()], dls, opt_func=opt, path=tmp_path), 2)
    assert not modules_in_file(tmp_path/'m.pkl', 'kd_fastai')
    assert len(learn.dls.train_ds)==40

def test_copies_of_the_model_during_a_fit_hold_no_live_hook(teacher):
    copies = []
    class Copy(Callback):
        run_valid = False
        def after_batch(self): copies.append((copy.deepcopy(self.model), pickle.dumps(self.model)))
    learn = fit(learner([KD(teacher, FitNet, '1'), Copy()]))
    x = torch.rand(2,1,8,8)
    for m in (copies[-1][0], pickle.loads(copies[-1][1])): assert m.eval()(x).shape==(2,10)
    assert not hooks(learn.model)

def test_a_callback_that_is_added_during_a_fit_says_so(teacher):
    class Late(Callback):
        def after_epoch(self): self.learn.add_cb(KD(teacher, SoftTarget))
    with pytest.raises(RuntimeError, match='was added or turned on'): fit(learner(Late()), 2)

@pytest.mark.parametrize('shapes', ['equal','unequal'])
def test_lookahead_forgets_the_weights_of_an_earlier_callback(teacher, shapes):
    learn = learner(opt_func=ranger)
    fit(learn, 2, cbs=KD(teacher, Term(FitNet, adapt=partial(make_adapter, kernel=1)), '1'))
    pairs = '1' if shapes=='equal' else '0'
    kd = KD(teacher, Term(FitNet, adapt=partial(make_adapter, kernel=1)), pairs)
    before = []
    class Look(Callback):
        run_valid = False
        def after_batch(self): before.append(torch.cat([p.detach().flatten() for p in kd.objective.parameters()]))
    fit(learn, 2, lr=1e-6, cbs=[kd, Look()])
    steps = [(b-a).abs().max().item() for a,b in zip(before, before[1:])]
    assert max(steps)<1e-3

# ---- numbers

@pytest.mark.parametrize('loss', [SoftTarget, NST, DIST], ids=lambda f: f.__name__)
def test_float64_training(teacher, loss):
    model = small_net(4).double()
    dls = digits(100)
    datasets = [[(x.double(), y) for x,y in ds] for ds in (dls.train_ds, dls.valid_ds)]
    double = DataLoaders.from_dsets(*datasets, bs=20, num_workers=0)
    learn = fit(learner(KD(teacher, loss, '1' if loss is NST else None), double, model))
    assert weights(learn).dtype==torch.float64
    assert weights(learn).isfinite().all()

def test_labels_that_a_partial_ignores_are_left_out(teacher):
    assert loss_layout(partial(F.cross_entropy, ignore_index=255))[1]==255
    seen = []
    def spy(pred, teacher_pred, target): seen.append(target); return pred.mean()
    net = nn.Conv2d(1,3,1)
    ds = [(torch.rand(1,4,4), torch.randint(0,3,(4,4)).index_fill(0, torch.tensor([0]), 255)) for _ in range(40)]
    dls = DataLoaders.from_dsets(ds, ds, bs=20, num_workers=0)
    loss_func = partial(F.cross_entropy, ignore_index=255)
    fit(quiet(Learner(dls, net, loss_func=loss_func, cbs=KD(copy.deepcopy(net), spy))))
    assert (seen[0]!=255).all()
    assert len(seen[0])==20*12

@pytest.mark.parametrize('loss', [MultiLevel, StreamlinedKD, SoftTarget], ids=lambda f: f.__name__)
def test_one_ignored_position_changes_a_dense_loss_little(teacher, loss):
    set_seed(0)
    pred,t,y = torch.randn(4,5,3,3),torch.randn(4,5,3,3),torch.randint(0,5,(4,3,3))
    objective = Objective([Term(loss)], ignore_index=-100)
    whole = objective.values(objective.prepare(pred, t, target=y))
    y[0,0,0] = -100
    (a,),(b,) = (o.values() for o in (whole, objective.values(objective.prepare(pred, t, target=y))))
    assert b.item()==pytest.approx(a.item(), rel=0.15)

def test_classes_in_the_last_dimension_are_found_without_fastais_loss():
    pred,t,y = torch.randn(2,7,5),torch.randn(2,7,5),torch.randint(0,5,(2,7))
    objective = Objective([Term(SoftTarget)], class_axis=None)
    value, = objective.values(objective.prepare(pred, t, target=y)).values()
    torch.testing.assert_close(value, SoftTarget(pred.flatten(0,1), t.flatten(0,1)))

def test_nan_in_a_term_of_weight_0_does_not_stop_the_training(teacher):
    def nan(pred): return pred.mean()*float('nan')
    watched = fit(learner(KD(teacher, Term(nan, 0.))))
    assert torch.equal(weights(watched), weights(fit(learner())))

def test_a_nan_teacher_is_named():
    broken = small_net(4)
    with torch.no_grad(): broken[0][0].weight.fill_(float('nan'))
    with pytest.raises(FloatingPointError, match='check that the outputs of student and teacher are finite'):
        fit(learner(KD(broken, SoftTarget)))

def test_balance_is_bounded_where_a_term_passes_zero():
    objective,batch = Objective([Term(Logits, 1.)], balance=True),Batch(torch.zeros(1,2), task=torch.tensor(2.))
    factors = [objective.weights(batch, {'logits': torch.tensor(v)})['logits'].item() for v in (1., -1., 1e-9, 1.)]
    assert max(factors)<40

def test_a_callback_refuses_a_student_of_another_width(teacher):
    kd = KD(teacher, Term(FitNet, adapt=partial(make_adapter, kernel=3)), '1')
    fit(learner(model=small_net(4)), cbs=kd)
    with pytest.raises(ValueError, match='was built for student features of'): fit(learner(model=small_net(6)), cbs=kd)

# ---- a teacher that is confidently wrong

class Rotated(nn.Module):
    "A teacher with its classes in another order: `order[c]` is the column of class `c`"
    def __init__(self, model, order): super().__init__(); self.model,self.order = model,order
    def forward(self, x): return torch.empty_like(y := self.model(x)).index_copy_(1, torch.tensor(self.order), y)

ORDER = [3,0,1,2,9,4,5,6,7,8]

def agreement_warnings(*cbs, **kwargs):
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        fit(learner(*cbs, **kwargs), 2)
    return [str(w.message) for w in said if 'agrees with' in str(w.message)]

def test_classes_in_another_order_are_noticed_once(teacher):
    said = agreement_warnings(KD(Rotated(teacher, ORDER), SoftTarget))
    assert len(said)==1 and f'class_map={ORDER} ' in said[0]

def test_the_class_map_of_the_warning_mends_it(teacher):
    mended = fit(learner(KD(Rotated(teacher, ORDER), SoftTarget, class_map=ORDER)))
    assert torch.equal(weights(mended), weights(fit(learner(KD(teacher, SoftTarget)))))

def test_a_teacher_at_chance_is_noticed(teacher):
    def shuffled(x): return teacher(x.flip(0))
    class Shuffled(nn.Module):
        def forward(self, x): return shuffled(x)
    said = agreement_warnings(KD(Shuffled(), SoftTarget))
    assert len(said)==1 and 'hardly more than by chance' in said[0]

@pytest.mark.parametrize('make', [
    lambda t: KD(t, SoftTarget), lambda t: MutualLearning(Rotated(copy.deepcopy(t), ORDER)),
    lambda t: KD(Rotated(t, ORDER), SoftTarget, task_weight=0)], ids=['right','learns too','labels not used'])
def test_no_warning_for(teacher, make):
    assert agreement_warnings(make(teacher))==[]

def test_the_report_names_another_order_of_classes(teacher):
    report = learner(KD(Rotated(teacher, ORDER), SoftTarget)).kd_report()
    assert f'class_map={ORDER} ' in report.warnings[0]
    assert not [w for w in learner(KD(teacher, SoftTarget)).kd_report().warnings if 'agrees with' in w]

# ---- owned weights follow the rules of the student's

def test_freezing_the_student_in_a_fit_leaves_owned_weights_trainable(teacher):
    class FreezeAll(Callback):
        def after_epoch(self): self.learn.freeze_to(1)
    own = Owned()
    learn = learner(FreezeAll())
    fit(learn, 2, cbs=KD(teacher, own, '1'))
    assert own.w.requires_grad and not learn.model[0][0].weight.requires_grad

class OwnedNorm(nn.Module):
    "FitNet after a batch norm and a trained scale, without a gradient for the norm"
    def __init__(self):
        super().__init__()
        self.norm,self.w = nn.BatchNorm2d(16),nn.Parameter(torch.ones(1))
    def forward(self, fm_s, fm_t):
        (s,), = [fm_s.values()]
        return FitNet({'1': self.w*s + 0*self.norm.weight[0]}, fm_t)

@pytest.mark.parametrize('wd_bn_bias', [False,True])
def test_weight_decay_of_owned_norms_follows_the_learner(teacher, wd_bn_bias):
    own = OwnedNorm()
    fit(learner(KD(teacher, own, '1'), wd=1., wd_bn_bias=wd_bn_bias))
    assert own.w.item()<1-1e-3
    assert (own.norm.weight[0].item()<1-1e-3)==wd_bn_bias

# ---- words

@pytest.mark.parametrize('make,words', [
    (lambda: KD(SoftTarget, small_net(4)), 'teacher and loss are swapped'),
    (lambda: KD(small_net(4), CRD), r'CRD is a class: pass an instance, CRD\(\)'),
    (lambda: Term(SoftTarget, '0.5'), r"must be a number or 'auto', got '0.5'"),
    (lambda: Term(SoftTarget, weight=lambda p: p), 'give a schedule by schedule='),
    (lambda: learner().distill(small_net(4), T=4), r'parameters of a loss are given by Term\(loss, T=...\)')],
    ids=['swapped','class','string','schedule','distill'])
def test_the_error_says_what_to_do(make, words):
    with pytest.raises(TypeError, match=words): make()

def test_constants_are_parameters_of_the_loss(teacher):
    a = fit(learner(KD(teacher, Term(SoftTarget, 0.9, T=4))))
    b = fit(learner(KD(teacher, Term(partial(SoftTarget, T=4), 0.9))))
    assert torch.equal(weights(a), weights(b))

def test_the_history_survives_validate(teacher):
    learn = fit(learner(KD(teacher, SoftTarget)))
    before = learn.kd_history()
    learn.validate()
    assert learn.kd_history().equals(before)

# ---- layers without parameters

def test_a_relu_after_frozen_layers_is_frozen(teacher):
    learn = learner(KD(teacher, Term(Attention, 1., layers='0.2')), train_bn=False,
                    splitter=lambda m: L(m[:2], m[2:]).map(lambda o: [*o.parameters()]))
    learn.freeze()
    with pytest.warns(UserWarning, match=r"layers \['0.2'\] are frozen"): fit(learn)

def test_a_layer_without_parameters_that_detaches_is_an_error(teacher):
    class Detach(nn.Module):
        def forward(self, x): return x.detach()
    model = small_net(8)
    model[1] = nn.Sequential(Detach(), *model[1])
    with pytest.raises(ValueError, match='no gradient through its layers'):
        fit(learner(KD(teacher, Term(Attention, 1., layers=[('1.0','0')])), model=model))

# ---- a copy that is made in a fit

class KeepCopy(Callback):
    order = 70
    def after_epoch(self): self.copied = copy.deepcopy(self.learn)

def test_a_copy_that_is_made_in_a_fit_is_in_no_fit(teacher):
    keep = KeepCopy()
    learn = learner([KD(teacher, [SoftTarget, Term(FitNet, layers='1', adapt='auto')]), keep])
    fit(learn)
    copied = quiet(keep.copied)
    copied.remove_cbs([o for o in copied.cbs if isinstance(o, KeepCopy)])
    fit(copied)
    assert [*history(copied)]==[*history(learn)]
    assert len(copied.opt.param_lists[-1])==len(learn.opt.param_lists[-1])==len([*copied.model.parameters()])
    assert len([*copied.parameters()])==len([*copied.model.parameters()])

# ---- a callback that is turned off

class TurnOff(Callback):
    order = -100
    def before_fit(self):
        for cb in self.learn.cbs:
            if isinstance(cb, KnowledgeDistillationCallback): cb.run = False

def test_a_fit_without_the_callback_has_its_own_history(teacher):
    learn = fit(learner(KD(teacher, SoftTarget)), 2)
    learn.add_cb(TurnOff())
    fit(learn)
    assert len(learn.kd_history())==1
    assert all(cb.run for cb in learn.cbs)  # fastai turns callbacks on again after a fit

def test_callbacks_without_after_fit_run_again_after_a_fit():
    "fastai turns each callback on at that event, which callbacks here skip if they do not define it"
    cb = ScopedCallback()
    learn = learner(cb)
    cb.run = False
    fit(learn)
    assert cb.run

def test_the_students_inputs_stay_its_own_without_the_callback(teacher):
    class Twice(Callback):
        "A second input of each batch, for the teacher"
        order = -50
        def before_batch(self): self.learn.xb = (*self.xb, self.xb[0])
    cb = KD(teacher, SoftTarget, teacher_inputs=1)
    learn = learner([Twice(), cb])
    expected = learn.validate()[0]
    cb.run = False
    assert learn.validate()[0]==expected

# ---- words of the user that reach the terms

def test_a_class_map_of_an_unknown_teacher(teacher):
    for t,name in (({'a': teacher}, 'A'), (teacher, 'big')):
        loss = Term(SoftTarget, teacher='a') if isinstance(t, dict) else SoftTarget
        with pytest.raises(ValueError, match='class_map by the names of teachers'):
            KD(t, loss, class_map={name: [*range(10)]})

def test_distill_gives_its_weight_to_the_layers(teacher):
    learn = learner().distill(teacher, layers='1', balance=True, weight=0.5)
    assert [o.weight for o in learn.knowledge_distillation.terms]==[0.5,0.5]
    fit(learn)
