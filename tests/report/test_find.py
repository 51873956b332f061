"`learn.kd_find`: paired training runs, a Learner that stays as it was, and no suggestion within the noise."
from functools import partial
import pandas as pd, pytest, torch
from fastai.basics import set_seed
from fastai.callback.all import MixUp, SaveModelCallback
from kd_fastai.all import *
from kd_fastai.report.find import KDFind
from kd_fastai.demo import digits, small_net
from kd_fastai.report.compare import comparison_table
from kd_fastai.report.find import default_methods
from kd_fastai.report.trial import trial_learner
from support import KD, KeepLosses, fit, hooks, learner, same, state, weights, trained_teacher

pytestmark = pytest.mark.filterwarnings('ignore:The teacher .*agrees')   # teachers are not trained

quick = partial(dict, show_plot=False, progress=False)

@pytest.fixture(scope='module')
def teacher():
    return trained_teacher(16, 4)

@pytest.mark.parametrize('fitted', [True,False])
def test_it_changes_nothing(teacher, fitted):
    "Not the model, optimizer, callbacks, random numbers or recorder; the next fit is the one it would have been."
    def attached():
        learn = learner()
        if fitted: fit(learn)
        return learn.distill(teacher)
    a,b = attached(),attached()
    before,of_teacher = state(a),weights(teacher)
    methods = {'Logits': Logits, 'FitNet': Term(FitNet, 'auto', layers='1', adapt='auto')}
    a.kd_find(methods=methods, budget=6, seeds=2, **quick())
    assert same(state(a), before)
    assert torch.equal(weights(teacher), of_teacher)
    assert a.knowledge_distillation.weights=={'soft_target': None}
    assert not hooks(a.model, teacher)
    assert torch.equal(weights(fit(a)), weights(fit(b)))

def test_an_error_leaves_the_learner_as_it_was(teacher):
    def broken(pred): raise RuntimeError('no value')
    learn = fit(learner())
    before = state(learn)
    with pytest.raises(RuntimeError, match='no value'):
        learn.kd_find(teacher, {'broken': broken}, budget=4, seeds=2, **quick())
    assert same(state(learn), before)

def test_trainings_are_paired_and_budgeted(teacher):
    "A method of weight 0 equals the baseline in each seed; seeds differ; epochs are the budget's share."
    methods = {'nothing': dict(loss=SoftTarget, weight=0.), 'Logits': Logits}
    found = learner(lr=1e-2).kd_find(teacher, methods, budget=20, seeds=3, **quick())
    scores = found.runs.pivot(index='seed', columns='method', values='valid_loss')
    assert (scores['nothing']==scores['baseline']).all()
    assert (scores['Logits']!=scores['baseline']).all()
    assert scores['baseline'].nunique()==3
    assert found.runs.epochs.unique().tolist()==[2]
    assert found.runs.start.nunique()==1
    assert found.table.equals(comparison_table(found.runs, 'accuracy').drop(columns='epochs'))

def test_losses_with_weights_start_again_in_each_training(teacher):
    "The loss that was given stays unbuilt."
    loss = VID()
    learner().kd_find(teacher, {'VID': Term(loss, 'auto', layers='1')}, budget=4, seeds=2, **quick())
    assert not [*loss.parameters()]

@pytest.mark.slow
def test_a_useful_teacher_is_suggested(teacher):
    "The suggestion is the best of those that are better, and its arguments attach it."
    learn = learner(dls=digits(50), lr=1e-2)
    methods = {'SoftTarget': dict(loss=Term(SoftTarget, 2., T=4)), 'against': dict(loss=Term(Logits, -0.5))}
    found = learn.kd_find(teacher, methods, budget=90, seeds=3, metric='valid_loss', **quick())
    assert found.suggestion=='SoftTarget'
    assert found.table.verdict['against']!='better'
    assert 'Suggestion: SoftTarget.' in found.note
    learn.distill(teacher, **found.arguments[found.suggestion])
    assert '2·SoftTarget(T=4)' in repr(learn.knowledge_distillation)

@pytest.mark.slow
def test_a_teacher_that_knows_nothing_is_not_suggested():
    set_seed(3)
    methods = {'SoftTarget': SoftTarget, 'Logits': Logits}
    found = learner(lr=1e-2).kd_find(small_net(16), methods, budget=24, seeds=4, **quick())
    assert found.suggestion is None
    assert 'Suggestion: none' in found.note

def test_suggestion_by_a_metric_where_lower_is_better():
    runs = pd.DataFrame([dict(seed=s, method=w, valid_loss=v+0.01*s*(i+1)) for s in range(4)
                         for i,(w,v) in enumerate([('baseline',1.), ('a',0.8), ('b',0.5), ('c',1.5)])])
    found = KDFind(runs, comparison_table(runs, 'valid_loss'), 'valid_loss', 'baseline', 0.95, arguments={})
    assert found.suggestion=='b'

def test_default_methods():
    "Temperatures, and a term on features where layers are named; the teacher may be the attached one."
    assert [*default_methods()]==['SoftTarget T=2','SoftTarget T=4','SoftTarget T=8']
    assert len(default_methods('1'))==4

def test_the_attached_teacher_and_the_plot(teacher):
    learn = learner().distill(teacher)
    found = learn.kd_find(budget=8, seeds=2, progress=False)
    assert [*found.table.index]==['baseline', *default_methods()]

def test_a_trial_keeps_what_takes_part_in_training(teacher):
    "fastai's callbacks that change batches, not those that save files, nor the user's or a replaced method."
    learn = learner([MixUp(), SaveModelCallback(), KeepLosses(), KD(teacher, SoftTarget)])
    learn.fit = lambda *args: None
    trial = trial_learner(learn)
    assert {type(cb).__name__ for cb in trial.cbs}=={'TrainEvalCallback','Recorder','CastToTensor','MixUp'}
    assert trial.mix_up.learn is trial
    assert learn.mix_up.learn is learn
    assert 'fit' not in trial.__dict__

def test_mistakes(teacher):
    with pytest.raises(ValueError, match='There is no teacher'): learner().kd_find()
    with pytest.raises(ValueError, match='A budget of 7 epochs is too small for 8 runs: give at least 8'):
        learner().kd_find(teacher, budget=7, seeds=2)
    with pytest.raises(TypeError, match='A method is None, a loss, a Term.*got 3'): learner().kd_find(teacher, {'x': 3})
    with pytest.raises(TypeError, match="There is no argument 'T'.*Term"):
        learner().kd_find(teacher, {'x': dict(loss=SoftTarget, T=4)}, **quick())

def test_trials_ask_the_attached_teacher_in_its_own_way():
    "With its conversion and its class map, which are part of what is suggested."
    asked = []
    def tfm(x): asked.append(len(x)); return 2*x
    few = small_net(8)
    few[-1] = torch.nn.Linear(32, 3)
    columns = [-1,-1,1,-1,-1,2,-1,0,-1,-1]
    learn = learner().distill(few, SoftTarget, teacher_tfm=tfm, class_map=columns)
    found = learn.kd_find(methods={'T=1': SoftTarget}, budget=4, seeds=2, **quick())
    assert asked and found.arguments=={'T=1': dict(teacher_tfm=tfm, class_map=columns, loss=SoftTarget)}

def test_trials_leave_several_teachers_as_they_were(teacher):
    both = {'a': teacher, 'b': small_net(6)}
    terms = [Term(SoftTarget, teacher='a'), Term(FitNet, layers='1', adapt='auto', teacher='b')]
    a,b = (learner().distill(both, terms) for _ in range(2))
    methods = {'predictions': [Term(SoftTarget, 'auto', teacher=k) for k in 'ab']}
    assert a.kd_find(methods=methods, budget=4, seeds=2, **quick()).runs.shape[0]==4
    assert torch.equal(weights(fit(a)), weights(fit(b)))
