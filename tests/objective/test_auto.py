"`weight='auto'`: what is found, that finding it changes nothing else, and for how long it is kept."
import warnings
from copy import deepcopy
from functools import partial
import pytest, torch
import torch.nn.functional as F
from torch import nn
from fastai.basics import L, params, set_seed
from fastai.callback.all import GradientAccumulation, GradientClip, SchedLin
from kd_fastai.all import *
from kd_fastai.losses.facts import get_loss_info
from kd_fastai.objective import MAX_GROWTH, Objective, auto_ratio, growth
from support import CPUMixedPrecision, KD, fit, history, hooks, learner, trained_teacher, weights

pytestmark = pytest.mark.filterwarnings('ignore::UserWarning')

@pytest.fixture(scope='module')
def teacher():
    "A trained teacher, wider than the student"
    return trained_teacher(8)

def found(learn): return learn.knowledge_distillation.weights

# ---- the number

def grads(loss, model):
    "The gradient of a loss by parameter, for those that it reaches"
    gs = torch.autograd.grad(loss, [*model.parameters()], retain_graph=True, allow_unused=True)
    return {n: g for (n,_),g in zip(model.named_parameters(), gs) if g is not None}

def norm(gs): return torch.cat([g.flatten() for g in gs]).norm().item()

@pytest.mark.parametrize('task_weight', [1., 0.2])
def test_the_weight_is_a_ratio_of_gradient_norms(teacher, task_weight):
    "By hand on the first batch: the weighted term has `auto_ratio` times the gradient of the task, where it reaches."
    learn = learner(KD(teacher, Term(Attention, 'auto', layers='1'), task_weight=task_weight))
    model,dl = deepcopy(learn.model),deepcopy(learn.dls.train)
    fit(learn)
    set_seed(1)
    x,y = next(iter(dl))
    fm_s = {'1': model[:2](x)}
    with torch.no_grad(): fm_t = {'1': teacher.eval()[:2](x)}
    of_term = grads(Attention(fm_s, fm_t), model)
    of_task = grads(task_weight*F.cross_entropy(model[2:](fm_s['1']), y), model)
    assert {*of_term}=={n for n in of_task if n[0] in '01'}
    expected = auto_ratio(Attention)*norm([of_task[n] for n in of_term])/norm(of_term.values())
    assert found(learn)['attention']==pytest.approx(expected, rel=1e-3)

def test_ratios_by_kind():
    "Losses on features and on predictions have ratios of their own."
    assert auto_ratio(SoftTarget)==auto_ratio(partial(DecoupledKD, T=2))
    assert auto_ratio(FitNet)==auto_ratio(VID())

# ---- equal to the same number given by hand

SETTINGS = {
    'predictions':      (lambda w: Term(SoftTarget, w['soft_target'], T=2), {}, []),
    'features':         (lambda w: Term(Attention, w['attention'], layers=['0','1']), {}, []),
    'several':          (lambda w: [Term(Logits, w['logits']), Term(Similarity, w['similarity'], layers='2')], {}, []),
    'adapters':         (lambda w: Term(FitNet, w['fit_net'], layers='1', adapt='auto'), {}, []),
    'own weights':      (lambda w: Term(VID(), w['vid'], layers='1'), {}, []),
    'schedule':         (lambda w: Term(SoftTarget, w['soft_target'], schedule=SchedLin(0,1)), {}, []),
    'scheduled T':      (lambda w: Term(SoftTarget, w['soft_target'], T=SchedLin(4,2)), {}, []),
    'task weight':      (lambda w: Term(DecoupledKD, w['decoupled_kd']), dict(task_weight=0.3), []),
    'accumulation':     (lambda w: Term(SoftTarget, w['soft_target']), {}, [partial(GradientAccumulation, 40)]),
    'clipping':         (lambda w: Term(VID(), w['vid'], layers='1'), {}, [partial(GradientClip, 0.1)]),
    'half precision':   (lambda w: Term(SoftTarget, w['soft_target']), {}, [CPUMixedPrecision]),
}

class Auto(dict):
    def __missing__(self, name): return 'auto'

@pytest.mark.parametrize('name', SETTINGS)
def test_equals_a_training_with_the_found_weights(teacher, name):
    "Bit for bit: the student's weights and all columns, over two epochs."
    terms,options,cbs = SETTINGS[name]
    def run(w): return fit(learner([KD(teacher, terms(w), schedule=None, **options), *(o() for o in cbs)]), 2)
    auto = run(Auto())
    fixed = run(found(auto))
    assert all(w>0 for w in found(auto).values())
    assert torch.equal(weights(auto), weights(fixed))
    assert history(auto).equals(history(fixed))

def test_a_cached_teacher_and_an_early_exit_find_the_same(teacher):
    "The teacher's whole prediction is not needed for it."
    def run(teacher, **options): return fit(learner(KD(teacher, Attention, '1', weight='auto', **options)))
    a,b = run(teacher),run(teacher, early_exit=False)
    assert found(a)==found(b)
    assert torch.equal(weights(a), weights(b))

def test_finding_changes_nothing_else(teacher):
    "With a schedule of 0 the training is one without a teacher, bit for bit, and gradients are not left."
    term = Term(SoftTarget, 'auto', schedule=lambda pos: 0.)
    learn,random = fit(learner(KD(teacher, term))),torch.get_rng_state()
    plain = fit(learner())
    assert found(learn)['soft_target']>0
    assert torch.equal(random, torch.get_rng_state())
    assert all(torch.equal(a, b) for a,b in zip(learn.model.state_dict().values(), plain.model.state_dict().values()))
    assert not hooks(learn.model, teacher)
    assert all(p.grad is None for p in teacher.parameters())

# ---- how long it is kept

def test_lr_find_leaves_it_unknown_or_as_it_was(teacher):
    learn = learner(KD(teacher, FitNet, '1', weight='auto', adapt='auto'))
    learn.lr_find(num_it=8, show_plot=False)
    assert found(learn)=={'fit_net': None}
    before = found(fit(learn))
    assert before['fit_net']>0
    learn.lr_find(num_it=8, show_plot=False)
    assert found(learn)==before

def test_a_second_fit_keeps_it_and_reset_weights_finds_it_again(teacher, capsys):
    learn = learner(KD(teacher, SoftTarget, weight='auto'))
    learn.logger = print
    first = found(fit(learn))
    assert f"soft_target {first['soft_target']:.3g}" in capsys.readouterr().out
    fit(learn, seed=2)
    assert found(learn)==first
    assert 'Weights found' not in capsys.readouterr().out
    learn.knowledge_distillation.reset_weights()
    assert found(learn)=={'soft_target': None}
    fit(learn, seed=2)
    assert found(learn)['soft_target']!=first['soft_target']

def test_without_logging_nothing_is_printed(teacher, capsys):
    fit(learner(KD(teacher, SoftTarget, weight='auto')))  # its logger is that of `no_logging`
    assert capsys.readouterr().out==''

@pytest.mark.parametrize('terms', [lambda: SoftTarget, lambda: Term(FitNet, 'auto', layers='1', adapt='auto')],
                         ids=['predictions','adapters'])
def test_load_keeps_it(teacher, terms, tmp_path):
    "`learn.load` brings the weight of the training that was saved, also where the losses are not built yet."
    def new(dls=None): return learner(KD(teacher, terms(), weight='auto'), dls, path=tmp_path)
    a = fit(new())
    a.save('m')
    b = new(a.dls).load('m')
    assert found(fit(b, seed=2))==found(a)

def test_report_shows_it_and_does_not_keep_it(teacher, capsys):
    learn = learner().distill(teacher, schedule=None)
    report = learn.kd_report()
    assert report.terms.weight['soft_target']>0
    assert report.terms.gradient['soft_target']==pytest.approx(auto_ratio(SoftTarget), rel=1e-3)
    assert found(learn)=={'soft_target': None}
    assert 'Weights found' not in capsys.readouterr().out

# ---- it grows as the labels are learned

def test_growth_by_hand():
    "The first task loss over its running mean; batches without labels and losses that are not finite do not count"
    kept,mean = {},2.
    for task in (2., 1., 0., float('nan'), float('inf'), 0.5, 3.):
        if 0<task<float('inf'): mean += 0.02*(task-mean)
        assert growth(kept, 'a', torch.tensor(task)).item()==pytest.approx(max(1., 2/mean), rel=1e-5)
    for _ in range(2000): last = growth(kept, 'a', torch.tensor(1e-9))
    assert last==MAX_GROWTH and growth(kept, 'a', torch.tensor(1e9))==1.

@pytest.mark.parametrize('first', [0., float('nan'), float('inf')])
def test_growth_starts_with_a_loss_that_counts(first):
    kept = {}
    for task in (first, 4.): assert growth(kept, 'a', torch.tensor(task))==1.
    for _ in range(1000): last = growth(kept, 'a', torch.tensor(1.))
    assert last.item()==pytest.approx(4, rel=1e-3)

def test_only_default_schedules_grow():
    "Terms with a weight or a schedule of their own, and terms on features, stay as they are; several grow alike"
    terms = [Term(SoftTarget), Term(Logits), Term(SoftTarget, 2.), Term(SoftTarget, schedule=None),
             Term(FitNet, layers='a')]
    o = Objective(terms)
    o.found_weights = dict.fromkeys((t.name for t in o.terms if t.weight=='auto'), 0.5)
    p = torch.randn(4,3)
    for task in [2.]+2000*[0.5]: last = o.weights(o.prepare(p, p, task=torch.tensor(task)), {}, 1.)
    assert [float(w) for w in last.values()]==pytest.approx([2.,2.,2.,.5,.5], rel=1e-3)

def test_growth_is_saved_and_lr_find_leaves_it(teacher, tmp_path):
    "A training run that goes on after `learn.load` goes on from there, in a second fit, too"
    def new(dls=None): return learner(KD(teacher, SoftTarget), dls, path=tmp_path)
    def task_losses(learn): return learn.knowledge_distillation.objective.task_losses
    a = fit(new(), 3)
    before = task_losses(a)['soft_target']
    assert before[0]>before[1]
    a.save('m')
    b = new(a.dls).load('m')
    a.lr_find(num_it=8, show_plot=False)
    assert task_losses(a)==task_losses(b)=={'soft_target': before}
    for o in (a, b):
        first,mean = task_losses(fit(o, seed=2))['soft_target']
        assert first==before[0] and mean<before[1]

def test_a_weight_that_is_found_again_starts_again(teacher):
    learn = fit(learner(KD(teacher, SoftTarget)), 3)
    kd = learn.knowledge_distillation
    first,_ = kd.objective.task_losses['soft_target']
    kd.reset_weights()
    fit(learn, seed=2)
    assert kd.objective.task_losses['soft_target'][0]<first

# ---- nothing to compare

def test_equal_models_have_no_gradient():
    "A term that is at its minimum on the first batch is named, and gets the default weight of its loss."
    net = nn.Sequential(nn.Flatten(), nn.Linear(64,10))
    learn = learner(KD(deepcopy(net), Logits, weight='auto'), model=net)
    with pytest.warns(UserWarning, match='gradients of logits and.*logits 1, the default of the loss'): fit(learn)
    assert found(learn)=={'logits': get_loss_info(Logits).weight}

def test_a_classifier_that_starts_at_zero():
    "It passes no gradient of the task to the layers before it, but the weight is found all the same."
    net = nn.Sequential(nn.Flatten(), nn.Linear(64,12), nn.ReLU(), nn.Linear(12,10))
    t = deepcopy(net)
    t[1].weight.data.mul_(-2)
    net[3].weight.data.zero_()
    learn = learner(KD(t, FitNet, '1', weight='auto'), model=net)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        fit(learn)
    assert 0<found(learn)['fit_net']!=get_loss_info(FitNet).weight

def test_frozen_layers_have_no_gradient(teacher):
    "The other term is found all the same."
    def two_groups(m): return L(m[:2], m[2:]).map(params)
    terms = [SoftTarget, Term(Attention, 'auto', layers='0')]
    learn = learner(KD(teacher, terms, weight='auto'), splitter=two_groups, train_bn=False)
    learn.freeze()
    with pytest.warns(UserWarning, match='gradients of attention and of the task loss'): fit(learn)
    assert found(learn)['attention']==get_loss_info(Attention).weight
    assert found(learn)['soft_target']!=get_loss_info(SoftTarget).weight

def test_without_a_task_loss_it_is_the_default(teacher):
    "There is nothing to compare with, and no reason for a warning."
    learn = learner(KD(teacher, CWD, '1', weight='auto', adapt='auto', task_weight=0))
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        fit(learn)
    assert found(learn)=={'cwd': get_loss_info(CWD).weight}

def test_a_gradient_that_is_not_finite_is_named(teacher):
    "It cannot be compared."
    def endless(pred): return pred.sum()*float('inf')
    learn = learner(KD(teacher, endless, weight='auto'))
    with pytest.warns(UserWarning, match='gradients of endless.*values not finite'):
        with pytest.raises(Exception): fit(learn)

def test_weights_that_are_the_default_are_not_shown_as_found(teacher, capsys):
    learn = learner(KD(teacher, CWD, '1', weight='auto', adapt='auto', task_weight=0))
    learn.logger = print
    fit(learn, 2)
    assert 'Weights found' not in capsys.readouterr().out

def test_a_full_memory_is_no_reason_for_a_default_weight(teacher, monkeypatch):
    def full_once(*args):
        monkeypatch.undo()
        raise torch.OutOfMemoryError('no memory')
    monkeypatch.setattr('kd_fastai.fit.auto.gradient_norms', full_once)
    with pytest.raises(torch.OutOfMemoryError): fit(learner(KD(teacher, SoftTarget, weight='auto')))
