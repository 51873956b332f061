"Comparisons over seeds: the numbers of the table by hand, runs that are paired, and files of runs."
from functools import partial
import numpy as np, pandas as pd, pytest, torch
from fastai.basics import *
from kd_fastai.callback import KnowledgeDistillationCallback
from kd_fastai.report.compare import *
from kd_fastai.demo import digits, small_net
from kd_fastai.losses import SoftTarget
from kd_fastai.report.measure import latency
from kd_fastai.report.scores import calibration_error, predicted_classes

for o in [*globals()]:
    if o=='test' or o.startswith('test_'): del globals()[o]  # fastcore's own helpers, which pytest would take for tests

LABELS = 60
quick = partial(kd_compare, epochs=1, rounds=0, progress=False)

def make_learner(seed):
    return Learner(digits(LABELS, seed), small_net(2), lr=1e-2, metrics=accuracy, loss_func=CrossEntropyLossFlat())

def distil(learn): return KnowledgeDistillationCallback(small_net(4).requires_grad_(False), SoftTarget, weight=1.)
def draws(learn): torch.randn(7); random.random(); np.random.rand()
def fails(learn): raise ValueError("this way\nhas no callback")
def named(f): return {'alone': None, 'way': f}

# ---- the table

RUNS = pd.DataFrame(dict(seed=[0,1,2]*3, way=['a']*3+['b']*3+['c']*3,
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
    ([1.,-1.],False,'undecided'), ([1.],False,'undecided'), ([],False,'undecided'), ([.1]*5,False,'undecided'),
    ([0.]*5,False,'undecided')])
def test_verdict(d, lower, verdict): assert paired_interval(pd.Series(d, dtype=float), lower=lower)['verdict']==verdict

def test_more_ways_widen_the_interval():
    one,ten = (paired_interval(pd.Series([1.,2.,3.,2.]), n_ways=n) for n in (1,10))
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

def test_false_verdicts_are_as_rare_as_promised():
    "600 comparisons of three equal ways with the baseline: at most 5% have any verdict, within three standard errors"
    g = np.random.default_rng(1)
    wrong = 0
    for _ in range(600):
        scores = g.standard_normal((5,1))*.02+g.standard_normal((5,4))*.01
        wrong += any(paired_interval(pd.Series(scores[:,i]-scores[:,0]), n_ways=3)['verdict']!='undecided'
                     for i in (1,2,3))
    assert .005 < wrong/600 < .05+3*(.05*.95/600)**.5

# ---- the runs

@pytest.fixture(scope='module')
def result():
    return kd_compare(make_learner, {'alone': None, 'draws': draws, 'distil': distil}, 2, 1, teacher=small_net(4),
                      progress=False, rounds=3)

def test_same_start_data_and_batches(result):
    "A way that draws random numbers, and one whose teacher does not count, train the same student"
    a,b = (result.runs[result.runs.way==o].drop(columns=['way','seconds']).reset_index(drop=True)
           for o in ('alone','draws'))
    pd.testing.assert_frame_equal(a, b)
    still = quick(make_learner, named(lambda learn: KnowledgeDistillationCallback(small_net(4), SoftTarget, weight=0.)),
                  1).runs
    assert still.accuracy.nunique()==1 and still.valid_loss.nunique()==1

def test_seeds_differ_and_distillation_matters(result):
    assert result.runs.groupby('way').start.nunique().tolist()==[2,2,2]
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
    row = result.runs[(result.runs.seed==1) & (result.runs.way=='alone')].iloc[0]
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
    assert (result.metric, result.baseline)==('accuracy','alone')
    assert 'not the best epoch' in repr(result) and 'Bonferroni' in repr(result)
    assert '<table' in result._repr_html_() and 'undecided' in result._repr_html_()
    assert result.table.ms.nunique()==1 and (result.table.ms>0).all()
    assert {'agreement','calibration_error','parameters','kb','ms'} < {*result.table}

def test_plot_shows_each_difference_and_the_interval(result):
    import matplotlib; matplotlib.use('agg')
    ax = result.plot()
    assert [o.get_text() for o in ax.get_yticklabels()]==['draws','distil']
    scores = result.runs.pivot(index='seed', columns='way', values='accuracy')
    drawn = [[*l.get_xdata()] for l in ax.lines if l.get_marker()=='.']
    assert drawn==[[*(scores[w]-scores.alone)] for w in ('draws','distil')]

# ---- agreement and classes

def test_predicted_classes_are_those_of_get_preds():
    learn,teacher = make_learner(0),small_net(4)
    res = predicted_classes(learn, teacher=teacher)
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
    res = predicted_classes(learn)
    assert len(res)==5*16 and [*res['sample'].unique()]==[1,2,3,4,5]
    assert [*res.target]==y[1:].flatten().tolist() and [*res.student]==learn.model(x)[1:].argmax(1).flatten().tolist()

def test_no_classes_no_answers():
    data = [*zip(torch.randn(4,3), torch.randn(4,1))]
    dls = DataLoaders(DataLoader(data, bs=2), DataLoader(data, bs=2))
    learn = Learner(dls, nn.Linear(3,1), lr=.1, loss_func=MSELossFlat())
    assert predicted_classes(learn) is None
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
        if len(count)==3: raise KeyboardInterrupt
        return make_learner(seed)
    ways = named(distil)
    with pytest.raises(KeyboardInterrupt): quick(interrupted, ways, 2, csv=file)
    assert len(pd.read_csv(file))==2 and [o.name for o in tmp_path.iterdir()]==['runs.csv']
    count.clear()
    res = quick(lambda seed: (count.append(seed), make_learner(seed))[1], ways, 2, csv=file)
    assert count==[1,1]
    whole = quick(make_learner, ways, 2)
    pd.testing.assert_frame_equal(res.runs.drop(columns='seconds'), whole.runs.drop(columns='seconds'),
                                  check_dtype=False)

def test_the_file_of_another_comparison_is_refused(tmp_path):
    file = tmp_path/'runs.csv'
    quick(make_learner, named(None), 1, csv=file)
    before = file.read_bytes()
    def bigger(seed):
        return Learner(digits(LABELS, seed), small_net(3), metrics=accuracy, loss_func=CrossEntropyLossFlat())
    def other(seed): l = make_learner(seed); l.metrics = l.metrics+[AvgMetric(error_rate)]; return l
    for kw,match in [(dict(ways={'alone':None, 'x':None}), 'runs of other ways: way; expected alone, x'),
                     (dict(epochs=2), r'runs of \[1\] epochs, expected 2'),
                     (dict(make_learner=other, seeds=2), 'lacks theirs: error_rate'),
                     (dict(teacher=small_net(2), seeds=2), 'lacks theirs: agreement'),
                     (dict(make_learner=bigger, ways=dict(named(None), third=None)),
                      'seed 0 begin from different weights')]:
        with pytest.raises(ValueError, match=match):
            quick(**{**dict(make_learner=make_learner, ways=named(None), seeds=1, csv=file), **kw})
        assert file.read_bytes()==before
    (tmp_path/'x.csv').write_text('a,b\n1,2\n')
    with pytest.raises(ValueError, match='not a file of kd_compare: it has no column seed, way'):
        quick(make_learner, named(None), 1, csv=tmp_path/'x.csv')

def test_ways_may_be_added(tmp_path):
    file = tmp_path/'runs.csv'
    quick(make_learner, named(None), 1, csv=file)
    assert [*quick(make_learner, dict(named(None), third=distil), 1, csv=file).runs.way]==['alone','way','third']

def test_caught_errors_are_rows(tmp_path):
    res = quick(make_learner, dict(named(fails), other=None), 2, csv=tmp_path/'r.csv', catch=(ValueError,))
    assert [*res.runs.error.dropna()]==['ValueError: this way']*2
    assert res.table.loc['way','runs']==0 and res.table.loc['way','verdict']=='undecided'
    assert res.table.loc['other','runs']==2
    again = quick(make_learner, dict(named(fails), other=None), 2, csv=tmp_path/'r.csv', catch=(ValueError,))
    assert again.runs.error.notna().sum()==2
    with pytest.raises(ValueError, match='this way'): quick(make_learner, named(fails), 1)

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

@pytest.mark.parametrize('kw,error,match', [(dict(ways={'a':None}), ValueError, 'at least two ways to compare, got 1'),
                                            (dict(baseline='x'), ValueError,
                                             "baseline 'x' is not one of the ways: alone, way"),
    (dict(metric='f1'), ValueError, "No metric 'f1'; the runs have seed, way"),
    (dict(make_learner=lambda seed: small_net(2)), TypeError, 'must return a Learner, got Sequential'),
    (dict(workers=2, ways=named(lambda learn: None)), TypeError, 'from a module, not lambdas')])
def test_bad_input(kw, error, match):
    with pytest.raises(error, match=match):
        quick(**{**dict(make_learner=make_learner, ways=named(None), seeds=1), **kw})

def test_several_processes_give_the_same_rows():
    "in any order"
    ways = named(distil)
    one,two = (quick(make_learner, ways, 2, workers=n).runs.drop(columns='seconds') for n in (0,2))
    pd.testing.assert_frame_equal(one, two)
