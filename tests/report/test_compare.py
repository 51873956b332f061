"Comparisons over seeds: the numbers of the table by hand, runs that are paired, and files of runs."
from functools import partial
from pathlib import Path
import numpy as np, pandas as pd, pytest, torch
from fastai.basics import *
from kd_fastai.callback import KnowledgeDistillationCallback
from kd_fastai.report.compare import *
from kd_fastai.demo import digits, small_net
from kd_fastai.losses import SoftTarget
from kd_fastai.report.measure import latency
from kd_fastai.report.runs import RunTable, lower_is_better
from kd_fastai.report.scores import calibration_error, score_models

pytestmark = pytest.mark.filterwarnings('ignore:The teacher .*agrees')   # teachers are not trained

for o in [*globals()]:
    if o=='test' or o.startswith('test_'): del globals()[o]  # fastcore's own helpers, which pytest would take for tests

LABELS = 60
quick = partial(kd_compare, epochs=1, rounds=0, progress=False)

def make_learner(seed):
    return Learner(digits(LABELS, seed), small_net(2), lr=1e-2, metrics=accuracy, loss_func=CrossEntropyLossFlat())

def distil(learn): return KnowledgeDistillationCallback(small_net(4).requires_grad_(False), SoftTarget, weight=1.)
def draws(learn): torch.randn(7); random.random(); np.random.rand()
def fails(learn): raise ValueError("this method\nhas no callback")
def named(f): return {'baseline': None, 'method': f}

# ---- the table

RUNS = pd.DataFrame(dict(seed=[0,1,2]*3, method=['a']*3+['b']*3+['c']*3,
    accuracy=[.5,.6,.7, .62,.70,.81, .4,.7,.6], kb=[1.]*3+[2.]*3+[3.,3.,6.]))

def test_table_by_hand():
    "Differences of b are .12, .10, .11: mean .11, deviation .01. t is 6.205 at 2 degrees of freedom and 1 - .05/4"
    t = comparison_table(RUNS, 'accuracy')
    np.testing.assert_allclose(t.loc['b', ['mean','gain','low','high']].astype(float),
                               [.71, .11, .11-6.2053*.01/3**.5, .11+6.2053*.01/3**.5], atol=1e-5)
    assert [*t.verdict.fillna('')]==['','better','undecided']
    assert [*t.kb]==[1,2,4] and [*t.runs]==[3,3,3]

@pytest.mark.parametrize('d,lower,verdict',
                         [([1.,1.1,.9],False,'better'), ([1.,1.1,.9],True,'worse'), ([-1.,-1.1,-.9],False,'worse'),
    ([1.,-1.],False,'undecided'), ([1.],False,'undecided'), ([],False,'undecided'), ([.1]*5,False,'better'),
    ([.1]*5,True,'worse'), ([1.,np.inf,1.],False,'not finite'),
    ([0.]*5,False,'undecided')])
def test_verdict(d, lower, verdict): assert paired_interval(pd.Series(d, dtype=float), lower=lower)['verdict']==verdict

def test_more_methods_widen_the_interval():
    one,ten = (paired_interval(pd.Series([1.,2.,3.,2.]), n_methods=n) for n in (1,10))
    assert ten['low']<one['low'] and ten['high']>one['high'] and one['gain']==ten['gain']

def test_a_missing_run_is_left_out_of_its_pair():
    t = comparison_table(RUNS.drop(index=3), 'accuracy')
    assert t.loc['b','gain']==pytest.approx(.105) and t.loc['b','runs']==2

@pytest.mark.parametrize('name,verdict',
                         [('valid_loss','worse'), ('error_rate','worse'), ('accuracy','better'), ('f1_score','better')])
def test_direction_is_told_by_the_name(name, verdict):
    assert comparison_table(RUNS.rename(columns={'accuracy':name}), name).loc['b','verdict']==verdict

def test_unknown_baseline():
    with pytest.raises(ValueError, match=r"baseline 'x' has no run; expected one of \['a', 'b', 'c'\]"):
        comparison_table(RUNS, 'accuracy', 'x')

@pytest.mark.slow
def test_false_verdicts_are_as_rare_as_promised():
    "600 comparisons of three equal methods with a baseline: at most 5% have any verdict, within three standard errors"
    g = np.random.default_rng(1)
    wrong = 0
    for _ in range(600):
        scores = g.standard_normal((5,1))*.02+g.standard_normal((5,4))*.01
        wrong += any(paired_interval(pd.Series(scores[:,i]-scores[:,0]), n_methods=3)['verdict']!='undecided'
                     for i in (1,2,3))
    assert .005 < wrong/600 < .05+3*(.05*.95/600)**.5

# ---- the runs

@pytest.fixture(scope='module')
def result():
    return kd_compare(make_learner, {'baseline': None, 'draws': draws, 'distil': distil}, 2, 1, teacher=small_net(4),
                      progress=False, rounds=3)

def test_same_start_data_and_batches(result):
    "A method that draws random numbers, and one whose teacher does not count, train the same student"
    a,b = (result.runs[result.runs.method==o].drop(columns=['method','seconds']).reset_index(drop=True)
           for o in ('baseline','draws'))
    pd.testing.assert_frame_equal(a, b)
    still = quick(make_learner, named(lambda learn: KnowledgeDistillationCallback(small_net(4), SoftTarget, weight=0.)),
                  1).runs
    assert still.accuracy.nunique()==1 and still.valid_loss.nunique()==1

def test_seeds_differ_and_distillation_matters(result):
    assert result.runs.groupby('method').start.nunique().tolist()==[2,2,2]
    assert result.runs[result.runs.seed==0].valid_loss.nunique()==2

def test_a_run_is_what_a_plain_training_gives(result):
    with no_random(1):
        learn = make_learner(1)
        set_seed(1, reproducible=True)
        for dl in learn.dls.loaders: dl.rng.seed(1)
        with learn.no_bar(), learn.no_logging():
            learn.fit_one_cycle(1)
            loss,acc = learn.validate()
            p,y = learn.get_preds()
    row = result.runs[(result.runs.seed==1) & (result.runs.method=='baseline')].iloc[0]
    assert (row.valid_loss, row.accuracy)==pytest.approx((loss, acc))
    conf,cls = p.max(1)
    assert row.calibration_error==pytest.approx(calibration_error(conf, cls==y), abs=1e-5)
    assert row.parameters==sum(o.numel() for o in small_net(2).parameters())

def test_shared_loaders_give_the_same_batches():
    "The order does not go on from run to run"
    dls = digits(LABELS)
    def shared(seed): return Learner(dls, small_net(2), lr=1e-2, metrics=accuracy, loss_func=CrossEntropyLossFlat())
    assert quick(shared, named(None), 1).runs.valid_loss.nunique()==1

def test_random_state_is_left_alone():
    torch.manual_seed(3); before = torch.get_rng_state()
    quick(make_learner, named(draws), 1)
    assert torch.equal(before, torch.get_rng_state())

def test_result_shows_itself(result):
    assert (result.metric, result.baseline)==('accuracy','baseline')
    assert 'not the best epoch' in repr(result) and 'Bonferroni' in repr(result)
    assert '<table' in result._repr_html_() and 'undecided' in result._repr_html_()
    assert result.table.ms.nunique()==1 and (result.table.ms>0).all()
    assert {'agreement','calibration_error','parameters','kb','ms'} < {*result.table}

def test_plot_shows_each_difference_and_the_interval(result):
    import matplotlib; matplotlib.use('agg')
    ax = result.plot()
    assert [o.get_text() for o in ax.get_yticklabels()]==['draws','distil']
    scores = result.runs.pivot(index='seed', columns='method', values='accuracy')
    drawn = [[*l.get_xdata()] for l in ax.lines if l.get_marker()=='.']
    assert drawn==[[*(scores[w]-scores.baseline)] for w in ('draws','distil')]

# ---- agreement and classes

def test_predicted_classes_are_those_of_get_preds():
    learn,teacher = make_learner(0),small_net(4)
    res = score_models(learn, {'teacher': teacher}).classes
    with learn.no_bar(): p,y = learn.get_preds()
    assert [*res.student]==p.argmax(1).tolist() and [*res.target]==y.tolist() and [*res['sample']]==[*range(797)]
    x = learn.dls.valid.one_batch()[0]
    assert [*res.teacher]==teacher.eval()(x).argmax(1).tolist()
    np.testing.assert_allclose(res.student_confidence, p.max(1).values, atol=1e-6)

def test_ignored_pixels_are_left_out():
    x,y = torch.randn(6,1,4,4),torch.randint(3,(6,4,4))
    y[0] = 255
    data = [*zip(x, y)]
    dls = DataLoaders(DataLoader(data, bs=2), DataLoader(data, bs=2))
    learn = Learner(dls, nn.Conv2d(1,3,1), loss_func=CrossEntropyLossFlat(axis=1, ignore_index=255))
    res = score_models(learn).classes
    assert len(res)==5*16 and [*res['sample'].unique()]==[1,2,3,4,5]
    assert [*res.target]==y[1:].flatten().tolist() and [*res.student]==learn.model(x)[1:].argmax(1).flatten().tolist()

def test_no_classes_no_answers():
    data = [*zip(torch.randn(4,3), torch.randn(4,1))]
    dls = DataLoaders(DataLoader(data, bs=2), DataLoader(data, bs=2))
    learn = Learner(dls, nn.Linear(3,1), lr=.1, loss_func=MSELossFlat())
    assert score_models(learn).classes is None
    def make(seed): return Learner(dls, nn.Linear(3,1), lr=.1, loss_func=MSELossFlat())
    res = quick(make, named(None), 2)
    assert res.metric=='valid_loss' and 'agreement' not in res.runs

def test_latency_takes_turns():
    order = []
    def model(n): return lambda x: order.append(n)
    latency({'a': model('a'), 'b': model('b')}, (0,), rounds=2)
    assert ''.join(order)=='ab'+'ab'+'ba'

# ---- the file

def test_goes_on_where_it_was(tmp_path):
    """An interrupt in the third run leaves two rows; the rest is trained, and all equals a comparison without an
    interrupt"""
    count,file = [],tmp_path/'runs.csv'
    def interrupted(seed):
        count.append(seed)
        if len(count)==4: raise KeyboardInterrupt  # the first one tells the metric
        return make_learner(seed)
    methods = named(distil)
    with pytest.raises(KeyboardInterrupt): quick(interrupted, methods, 2, csv=file)
    assert len(pd.read_csv(file))==2 and [o.name for o in tmp_path.iterdir() if o.name[0]!='.']==['runs.csv']
    count.clear()
    res = quick(lambda seed: (count.append(seed), make_learner(seed))[1], methods, 2, csv=file)
    assert count==[0,0,0,1,1]  # the direction of the metric, two methods of the file, and the two missing runs
    whole = quick(make_learner, methods, 2)
    pd.testing.assert_frame_equal(res.runs.drop(columns='seconds'), whole.runs.drop(columns='seconds'),
                                  check_dtype=False)

def test_the_file_of_another_comparison_is_refused(tmp_path):
    file = tmp_path/'runs.csv'
    quick(make_learner, named(None), 1, csv=file)
    before = file.read_bytes()
    def bigger(seed):
        return Learner(digits(LABELS, seed), small_net(3), metrics=accuracy, loss_func=CrossEntropyLossFlat())
    def other(seed): l = make_learner(seed); l.metrics = l.metrics+[AvgMetric(error_rate)]; return l
    for kw,match in [(dict(methods={'baseline':None, 'x':None}), 'runs of other methods: method; expected baseline, x'),
                     (dict(epochs=2), r'runs of \[1\] epochs, expected 2'),
                     (dict(make_learner=other, seeds=2), 'changed in: learner, method'),
                     (dict(teacher=small_net(2), seeds=2), 'changed in: teacher'),
                     (dict(make_learner=bigger, methods=dict(named(None), third=None)), 'changed in: learner, method')]:
        with pytest.raises(ValueError, match=match):
            quick(**{**dict(make_learner=make_learner, methods=named(None), seeds=1, csv=file), **kw})
        assert file.read_bytes()==before
    (tmp_path/'x.csv').write_text('a,b\n1,2\n')
    with pytest.raises(ValueError, match='not a file of kd_compare: it has no column seed, method'):
        quick(make_learner, named(None), 1, csv=tmp_path/'x.csv')

def test_methods_may_be_added(tmp_path):
    file = tmp_path/'runs.csv'
    quick(make_learner, named(None), 1, csv=file)
    res = quick(make_learner, dict(named(None), third=distil), 1, csv=file)
    assert [*res.runs.method]==['baseline','method','third']

def test_caught_errors_are_rows(tmp_path):
    res = quick(make_learner, dict(named(fails), other=None), 2, csv=tmp_path/'r.csv', catch=(ValueError,))
    assert [*res.runs.error.dropna()]==['ValueError: this method']*2
    assert res.table.loc['method','runs']==0 and res.table.loc['method','verdict']=='undecided'
    assert res.table.loc['other','runs']==2
    again = quick(make_learner, dict(named(fails), other=None), 2, csv=tmp_path/'r.csv', catch=(ValueError,))
    assert again.runs.error.notna().sum()==2
    with pytest.raises(ValueError, match='this method'): quick(make_learner, named(fails), 1)

def test_errors_inside_a_training_are_rows_in_their_own_words(tmp_path):
    class Fails(Callback):
        def before_batch(self): raise ValueError("the batch has no teacher\ndetails")
    res = quick(make_learner, named(lambda learn: Fails()), 1, csv=tmp_path/'r.csv', catch=(ValueError,))
    assert [*res.runs.error.dropna()]==['ValueError: the batch has no teacher']

# ---- what it refuses

def test_a_start_that_is_not_the_same():
    count = []
    def careless(seed):
        count.append(seed)
        torch.manual_seed(len(count))
        return make_learner(seed)
    with pytest.raises(ValueError, match='seed 0 begin from different weights, so that they cannot be paired'):
        quick(careless, named(None), 1)

@pytest.mark.parametrize('kw,error,match', [(dict(methods={'a':None}), ValueError,
                                             'at least two methods to compare, got 1'),
                                            (dict(baseline='x'), ValueError,
                                             "baseline 'x' is not one of the methods: baseline, method"),
    (dict(metric='f1'), ValueError, "No metric 'f1'; the runs have valid_loss, accuracy"),
    (dict(make_learner=lambda seed: small_net(2)), TypeError, 'must return a Learner, got Sequential'),
    (dict(make_learner=make_learner(0)), TypeError, 'got a Learner: def make_learner'),
    (dict(methods=named(lambda learn: 3)), TypeError, 'A method is None.*got 3'),
    (dict(methods=named(SoftTarget)), ValueError, 'has no teacher: give kd_compare')])
def test_bad_input(kw, error, match):
    with pytest.raises(error, match=match):
        quick(**{**dict(make_learner=make_learner, methods=named(None), seeds=1), **kw})

def test_several_processes_give_the_same_rows():
    "in any order"
    methods = named(distil)
    one,two = (quick(make_learner, methods, 2, workers=n).runs.drop(columns='seconds') for n in (0,2))
    pd.testing.assert_frame_equal(one, two)

def test_workers_take_lambdas():
    res = quick(make_learner, named(lambda learn: learn.distill(small_net(4))), 1, workers=2)
    assert [*res.runs.method]==['baseline','method']

# ---- methods

def test_methods_may_be_written_in_several_forms():
    "One distillation, as a dict, a callback, a function that returns the callback or the Learner: the same numbers"
    with no_random(0): teacher = small_net(4).requires_grad_(False)
    kd = KnowledgeDistillationCallback(teacher, SoftTarget, weight=1.)
    forms = dict(baseline=None, dict=dict(teacher=teacher, loss=SoftTarget, weight=1., schedule=None), callback=kd,
                 function=lambda learn: kd, learner=lambda learn: learn.distill(teacher, SoftTarget, weight=1.,
                                                                                schedule=None))
    runs = quick(make_learner, forms, 1).runs.set_index('method')
    assert runs.valid_loss[1:].nunique()==1 and runs.valid_loss['dict']!=runs.valid_loss['baseline']

def test_losses_learn_from_the_teacher_of_the_comparison():
    res = quick(make_learner, dict(baseline=None, kd=SoftTarget), 1, teacher=small_net(4))
    assert res.runs.valid_loss.nunique()==2

@pytest.mark.parametrize('name', ['error','agreement','seconds','settings'])
def test_a_metric_with_the_name_of_another_column_is_refused(name):
    def metric(pred, y): return accuracy(pred, y)
    metric.__name__ = name
    def make(seed):
        learn = make_learner(seed)
        learn.metrics = [accuracy, metric]
        return learn
    with pytest.raises(ValueError, match=f'The metric {name} has the name of a column'): quick(make, named(distil), 1)

def test_a_model_that_predicts_nan_is_not_finite():
    class Break(Callback):
        def after_fit(self): torch.nn.init.constant_(self.model[-1].weight, float('nan'))
    res = quick(make_learner, named(Break()), 2, metric='valid_loss')
    assert res.table.verdict['method']=='not finite'

# ---- a csv remembers what a method was

def lr_fit(lr): return lambda learn, epochs, cbs: learn.fit(epochs, lr, cbs=cbs)

def with_data(item=None, **kwargs):
    "The Learner with other items or transforms, as many as before"
    learn = make_learner(0)
    def new(dl): return DataLoader([item(*o) for o in dl.dataset] if item else dl.dataset, bs=dl.bs, **kwargs)
    learn.dls = DataLoaders(*map(new, learn.dls.loaders))
    return learn

@pytest.mark.parametrize('change,match', [
    (dict(methods=named(dict(loss=SoftTarget, weight=3.))), "runs of 'method' with other settings, changed in: method"),
    (dict(methods=named(dict(loss=partial(SoftTarget, T=2), weight=1.))), 'changed in: method'),
    (dict(teacher=small_net(3)), 'changed in: .*teacher'),
    (dict(fit=lr_fit(1e-3)), 'changed in: fit'),
    (dict(make_learner=lambda seed: Learner(digits(LABELS, seed), small_net(2), lr=1e-3, metrics=accuracy,
                                            loss_func=CrossEntropyLossFlat())), 'changed in: learner, method'),
    (dict(make_learner=lambda seed: with_data(lambda x, y: (x*2, y))), 'changed in: learner, method'),
    (dict(make_learner=lambda seed: with_data(after_batch=lambda b: (b[0]+1, b[1]))), 'changed in: learner, method')])
def test_other_settings_under_the_same_name_are_refused(tmp_path, change, match):
    with no_random(0): teacher = small_net(4)
    given = dict(make_learner=make_learner, methods=named(dict(loss=SoftTarget, weight=1.)), seeds=1, teacher=teacher,
                 fit=lr_fit(1e-2), csv=tmp_path/'runs.csv')
    quick(**given)
    quick(**{**given, 'fit': lr_fit(1e-2)})  # the same settings, made again
    before = given['csv'].read_bytes()
    with pytest.raises(ValueError, match=match): quick(**{**given, **change})
    assert given['csv'].read_bytes()==before

# ---- nothing that was finished is lost

def test_an_interrupt_without_a_csv_names_the_file_of_the_runs(capsys):
    count = []
    def interrupts(seed):
        count.append(seed)
        if len(count)==4: raise KeyboardInterrupt
        return make_learner(seed)
    with pytest.raises(KeyboardInterrupt): quick(interrupts, named(distil), 2)
    said = capsys.readouterr().out
    assert '2 finished runs are kept in' in said
    file = said.split("csv='")[1].split("'")[0]
    assert len(quick(make_learner, named(distil), 2, csv=file).runs)==4
    Path(file).unlink()

def test_two_tables_of_one_csv_lose_nothing(tmp_path):
    "As two processes that have read the file before the other one wrote"
    a,b = RunTable(tmp_path/'r.csv'),RunTable(tmp_path/'r.csv')
    def row(seed): return dict(seed=seed, method='m', epochs=1, start='x', settings='a:b', accuracy=.5)
    a.read(), b.read()
    for t,seed in ((a,0), (b,1), (a,2), (b,2)): t.add(row(seed))
    assert [*a.read().seed]==[0,1,2]

# ---- direction, NaN, and what is missing

def table(scores, metric='accuracy', **kwargs):
    runs = pd.DataFrame([{'seed': s, 'method': m, metric: v} for m,vs in scores.items() for s,v in enumerate(vs)])
    return comparison_table(runs, metric, **kwargs)

@pytest.mark.parametrize('metric,verdict', [('msle','better'), ('_exp_rmspe','better'), ('perplexity','better'),
    ('brier_score_loss','better'), ('pearsonr','worse'), ('dice','worse'), ('matthews_corrcoef','worse')])
def test_directions_of_fastais_metrics(metric, verdict):
    assert table(dict(a=[.5,.51,.52], b=[.1,.12,.11]), metric).verdict.b==verdict

def test_an_unknown_metric_is_asked_for():
    "before anything is trained; a part of its name says nothing"
    for name in ('lossless','maerz','my_metric'):
        with pytest.raises(ValueError, match='give lower=True or lower=False'): lower_is_better(name)
    def lossless(x, y): return accuracy(x, y)
    def make(seed):
        l = make_learner(seed); l.metrics = lossless; return l
    def never(learn, epochs, cbs): raise AssertionError('trained')
    with pytest.raises(ValueError, match="Is a smaller 'lossless' better"): quick(make, named(None), 1, fit=never)
    assert quick(make, named(None), 1, lower=False).metric=='lossless'

@pytest.mark.parametrize('a,b', [([.5,.5,.6], [.9,float('nan'),.9]), ([.5,float('nan'),.6], [.9,.9,.91]),
                                 ([.5,float('nan'),.6], [.9,float('nan'),.9]), ([1.,2.,1.], [9.,float('inf'),9.])])
def test_a_run_that_diverged_is_no_gain(a, b):
    assert table(dict(a=a, b=b)).verdict.b=='not finite'

def test_a_missing_run_is_not_a_diverged_one():
    runs = pd.DataFrame([dict(seed=s, method=m, accuracy=.5+s/10+(.3+s**2/100)*(m=='b'))
                         for s in range(4) for m in 'ab'])
    assert comparison_table(runs.drop(index=1), 'accuracy').verdict.b=='better'

def test_equal_gains():
    "Decided where seeds change the scores; undecided where all seeds are one run"
    assert table(dict(a=[.5,.6,.7], b=[.6,.7,.8])).verdict.b=='better'
    assert table(dict(a=[.5,.5,.5], b=[.6,.6,.6])).verdict.b=='undecided'
    assert table(dict(a=[.5,.6,.7], b=[.5,.6,.7])).verdict.b=='undecided'

def test_the_note_says_how_many_seeds_are_missing():
    gains = [0.,.2,.1,0.]
    runs = pd.DataFrame([dict(seed=s, method=m, accuracy=.5+s/10+gains[s]*(m=='b'))
                         for s in range(4) for m in 'ab'])
    res = KDComparison(runs, comparison_table(runs, 'accuracy'), 'accuracy', 'a', .95)
    n = seeds_for_verdict(res.differences('b'))
    assert res.table.verdict.b=='undecided' and f'b: about {n} seeds would decide' in res.note
    z = pd.Series(np.linspace(-1, 1, n))
    d = z/z.std()*res.differences('b').std()+res.differences('b').mean()  # n differences with this mean and spread
    assert paired_interval(d)['verdict']=='better' and paired_interval(d[1:-1])['verdict']!='worse'

# ---- several students, the best student, progress

def test_several_students_in_one_table():
    "Each against its own baseline"
    def small(seed): return make_learner(seed)
    def large(seed):
        return Learner(digits(LABELS, seed), small_net(3), lr=1e-2, metrics=accuracy, loss_func=CrossEntropyLossFlat())
    res = quick(dict(small=small, large=large), named(distil), 2)
    assert [*res.table.index]==['small: baseline','small: method','large: baseline','large: method']
    alone = quick(large, named(distil), 2)
    assert res.table.gain['large: method']==pytest.approx(alone.table.gain.method)
    assert res.compared==['small: method','large: method']

@pytest.mark.parametrize('workers', [0,2])
def test_the_best_student_is_kept(workers):
    res = quick(make_learner, named(distil), 2, workers=workers)
    learn = res.best.learner()
    with learn.no_bar(), learn.no_logging(): assert learn.validate()[1]==pytest.approx(res.runs.accuracy.max())

def test_progress_shows_method_seed_epoch_and_score(monkeypatch):
    from kd_fastai.report import runs
    shown = []
    class Bar:
        def __init__(self, it, **kwargs): self.it = it
        def __iter__(self): return iter(self.it)
        def __setattr__(self, k, v): shown.append(v) if k=='comment' else object.__setattr__(self, k, v)
    monkeypatch.setattr(runs, 'progress_bar', Bar)
    kd_compare(make_learner, named(None), 1, 2, rounds=0)
    assert len(shown)==4 and shown[0].startswith('baseline, seed 0, epoch 1/2: accuracy 0.')

def test_pytorchs_loaders():
    import torch.utils.data as tud
    ds = tud.TensorDataset(torch.randn(32,4), torch.randint(3, (32,)))
    def make(seed):
        dls = DataLoaders(tud.DataLoader(ds, 16, shuffle=True), tud.DataLoader(ds, 16), device='cpu')
        return Learner(dls, nn.Linear(4,3), loss_func=CrossEntropyLossFlat(), metrics=accuracy)
    res = kd_compare(make, named(dict(loss=SoftTarget)), 2, 1, teacher=nn.Linear(4,3), progress=False, rounds=1)
    assert res.runs.agreement.between(0, 1).all() and (res.table.ms>0).all()
