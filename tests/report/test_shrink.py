"`learn.kd_shrink`: copies that keep the teacher's function, budgets, elimination, and an honest final score."
import math
import pandas as pd, pytest, torch
from torch import nn
from torchvision.models import mobilenet_v2, resnet18
from torchvision.models.resnet import BasicBlock
from fastai.basics import no_random
from kd_fastai.report.shrink import KDShrink
from kd_fastai.demo import digits, small_net
from kd_fastai.report.candidates import family, shallower, thinner
from kd_fastai.report.runs import RunTable, TrainRun
from kd_fastai.report.shrink import DECIDE, FINAL, FINALISTS, Pilots, fits_budget, halve, read_candidates, tied
from support import fit, learner, same, state, weights

xb = (torch.randn(2,3,64,64),)

# ---- copies

@pytest.mark.parametrize('net', [resnet18, mobilenet_v2])
@pytest.mark.parametrize('width', [.75,.5,.25])
def test_thinner_copies_run_and_leave_the_model(net, width):
    net = net(num_classes=7)
    before = weights(net)
    copy = thinner(net, width, xb)
    assert copy(*xb).shape==(2,7) and torch.equal(weights(net), before)
    n,k = (sum(p.numel() for p in m.parameters()) for m in (net, copy))
    assert k<1.2*width*n

def test_channels_without_effect_may_go():
    "Every second channel of each layer is 0 and not read: the half copy computes the same function"
    net = nn.Sequential(nn.Conv2d(1,8,3), nn.ReLU(), nn.Conv2d(8,4,3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                        nn.Linear(4,3))
    with torch.no_grad():
        for m in (net[0], net[2]): m.weight[1::2],m.bias[1::2] = 0.,0.
    x = torch.randn(2,1,9,9)
    assert torch.allclose(thinner(net, .5, (x,))(x), net(x), atol=1e-6)

def test_a_head_of_two_poolings_keeps_both():
    "fastai's head concatenates two poolings: evenly spaced channels are those of both"
    class TwoPools(nn.Module):
        def forward(self, x): return torch.cat([x.mean((2,3)), x.amax((2,3))], 1)
    net = nn.Sequential(nn.Conv2d(1,4,3), TwoPools(), nn.Linear(8,3))
    with torch.no_grad(): net[0].weight[1::2],net[0].bias[1::2] = 0.,0.
    x = torch.randn(2,1,9,9)
    with torch.no_grad(): net[2].weight[:,1::2] = 0.
    assert torch.allclose(thinner(net, .5, (x,))(x), net(x), atol=1e-6)

def test_new_weights_depend_on_the_seed():
    net = small_net(8)
    x = (torch.randn(2,1,8,8),)
    def make(seed, sliced):
        with no_random(seed): return weights(thinner(net, .5, x, sliced))
    assert torch.equal(make(1, True), make(2, True)) and not torch.equal(make(1, False), make(2, False))

def test_shallower_leaves_out_blocks_that_keep_their_shape():
    assert [len(getattr(shallower(resnet18(), .5, xb), f'layer{i}')) for i in (1,2,3,4)]==[1,1,1,1]
    with pytest.raises(ValueError, match='no block to leave out'): shallower(small_net(4), .5, (torch.randn(2,1,8,8),))

def test_what_cannot_be_copied_is_left_out():
    grouped = nn.Sequential(nn.Conv2d(3,8,3), nn.Conv2d(8,8,3,groups=2), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                            nn.Linear(8,2))
    assert family(grouped, xb)=={}
    learn = learner(model=nn.Sequential(nn.Flatten(), nn.TransformerEncoderLayer(64, 2), nn.Linear(64,10)))
    with pytest.raises(ValueError, match='No smaller copies of Sequential can be made: give candidates='):
        learn.kd_shrink(faster=2)

# ---- budgets and elimination

COSTS = pd.DataFrame(dict(ms=[10.,1.,2.,5.], kb=[90.,5.,40.,20.], multiply_adds=[9.,1.,2.,3.]),
                     index=['teacher',*'abc'])

@pytest.mark.parametrize('kw,fits', [(dict(ms=2), 'ab'), (dict(kb=20), 'ac'), (dict(multiply_adds=2.5), 'ab'),
    (dict(faster=5), 'ab'), (dict(faster=2, kb=30), 'ac'), (dict(ms=.5), ''), ({}, 'abc')])
def test_budgets(kw, fits): assert fits_budget(COSTS, **kw)==[*fits]

def test_halving_keeps_the_better_half():
    assert halve([*'abcde'], dict(a=1, b=5, c=3, d=2, e=4))==['b','e','c']

def known_scores(accuracies, late_after=None):
    "Pilots whose runs are known: candidate to a function of epochs and seed. The time may be over after so many runs"
    trained = []
    class Known(TrainRun):
        def __init__(self): pass
        def settings(self, **kwargs): return 'a:b'
        def __call__(self, name, seed, epochs, **kwargs):
            n = name.split(': ')[0]
            trained.append((n, seed, epochs))
            if len(trained)==late_after: pilots.deadline = -math.inf
            return dict(seed=seed, method=name, epochs=epochs, start='x', settings='a:b',
                        accuracy=accuracies[n](epochs, seed)),{}
    def task(n): return dict(name=f'{n}: distilled', make_learner=None, method=None)
    pilots = Pilots(Known(), RunTable(), task, [0,1], 'accuracy', 1, progress=False)
    return pilots,trained

def test_elimination_by_rounds():
    pilots,trained = known_scores({n: lambda e, s, i=i: .1*i+.01*e*s for i,n in enumerate('abcdefgh')})
    with pilots.table.kept(): assert pilots.eliminate([*'abcdefgh'], 1, 100)=='h'
    assert [(e, scores.shape) for e,scores in pilots.rounds]==[(1,(2,8)), (2,(2,4)), (4,(2,2))]
    assert {s for _,s,_ in trained}=={0,1}

def test_a_late_starter_wins_and_a_run_that_diverged_loses():
    pilots,_ = known_scores(dict(late=lambda e, s: .1*e, early=lambda e, s: .15, broken=lambda e, s: float('nan')))
    with pilots.table.kept(): assert pilots.eliminate(['broken','early','late'], 1, 100)=='late'

@pytest.mark.parametrize('n,best,seeds', [(2,'a',0), (3,'c',1), (5,'c',1), (6,'c',2)])
def test_the_time_bound_ends_the_pilots(n, best, seeds):
    "The seeds that all candidates have count"
    pilots,trained = known_scores({n: lambda e, s, i=i: .1*i for i,n in enumerate('abc')}, late_after=n)
    with pilots.table.kept(): assert pilots.eliminate([*'abc'], 1, 100)==best
    assert len(trained)==n and sum(len(scores) for _,scores in pilots.rounds)==seeds

# ---- candidates that tie

def table(**scores): return pd.DataFrame(scores, index=range(3))

def test_ties():
    "b differs by the same in each seed, c by both signs, d by both signs and more, e has diverged"
    a = [.5,.6,.7]
    scores = table(a=a, b=[.4,.5,.6], c=[.5,.61,.68], d=[.4,.61,.68], e=[-math.inf]*3)
    assert tied([(8, scores)], 'a')==['c','d']
    assert tied([(4, scores), (8, table(a=a, c=[.3,.4,.5]))], 'a')==['d']
    assert tied([(4, scores), (8, table(c=a, d=a))], 'a')==['c','d'] and tied([], 'a')==[]

def deciding(full, **kwargs):
    "Pilots of 1 and 2 epochs in which all candidates tie and `a` is the best; runs of 4 epochs have known accuracies"
    start = dict(zip(full, [.52,.51,.5,.49]))
    return known_scores({n: lambda e, s, n=n: full[n]+.001*s if e==4 else start[n]+(-1)**s*.1*ord(n) for n in full},
                        **kwargs)

def decide(pilots, names, seeds=3):
    with pilots.table.kept():
        best = pilots.eliminate([*names], 1, 4)
        return best,pilots.decide(best, 4, [DECIDE+s for s in range(seeds)])

def test_ties_are_decided_by_full_runs_on_other_seeds():
    pilots,trained = deciding(dict(a=.6, b=.8, c=.7, d=.9))
    assert decide(pilots, 'abcd')==('a','b')
    full = [o for o in trained if o[2]==4]
    assert {n for n,_,_ in full}=={*'abc'} and {s for _,s,_ in full}=={DECIDE,DECIDE+1,DECIDE+2} and FINALISTS==3
    assert pilots.rounds[-1][0]==4 and tied(pilots.rounds[-1:], 'b')==[]

def test_without_ties_nothing_is_trained_in_full():
    pilots,trained = known_scores({n: lambda e, s, i=i: .1*i for i,n in enumerate('abc')})
    assert decide(pilots, 'abc')==('c','c') and {e for _,_,e in trained}=={1,2}

@pytest.mark.parametrize('n,best', [(0,'a'), (2,'a'), (3,'b'), (4,'b')])
def test_the_time_bound_ends_the_decision(n, best):
    "The pilots' winner stays until each candidate has a full run"
    pilots,trained = deciding(dict(a=.6, b=.8, c=.7), late_after=10+n)
    assert decide(pilots, 'abc')==('a',best) and len(trained)==10+n

# ---- the whole

@pytest.fixture(scope='module')
def trained():
    blocks = nn.Sequential(BasicBlock(16,16), BasicBlock(16,16))
    net = nn.Sequential(nn.Conv2d(1,16,3,padding=1), nn.ReLU(), blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                        nn.Linear(16,10))
    return fit(learner(model=net, dls=digits(300), lr=1e-2), 2)

@pytest.mark.slow
def test_a_student_for_a_budget(trained, tmp_path):
    "It changes nothing, keeps to the budget, scores on other seeds, and a second call repeats no run"
    before = state(trained)
    def shrink(**kwargs):
        return trained.kd_shrink(multiply_adds=.2, epochs=2, pilot_epochs=1, seeds=2, rounds=2, progress=False,
                                 csv=tmp_path/'runs.csv', **kwargs)
    found = shrink()
    assert same(state(trained), before) and isinstance(found, KDShrink)
    assert found.costs.multiply_adds[found.chosen]<=.2<found.costs.multiply_adds['teacher']
    assert [*found.final('distilled').index]==[*found.final('baseline').index]==[FINAL,FINAL+1]
    learn = found.learner
    with learn.no_bar(): assert learn.validate()[1]==pytest.approx(found.final('distilled')[FINAL], abs=1e-6)
    assert found.chosen in found.sentence and 'times faster' in found.sentence
    assert found.teacher_score==pytest.approx(trained.validate()[1])
    n = len(pd.read_csv(tmp_path/'runs.csv'))
    again = shrink()
    assert len(pd.read_csv(tmp_path/'runs.csv'))==n and again.best==found.best
    files = {o.name for o in found.save(tmp_path/'student').iterdir()}
    assert {'student.pkl','README.md'}<=files

def test_none_where_nothing_fits_or_comes_near(trained):
    none = trained.kd_shrink(kb=.1, rounds=2)
    assert none.chosen is None and none.learner is None and 'No candidate is within the budget' in none.sentence
    with pytest.raises(ValueError, match='no student to save'): none.save('x')
    far = trained.kd_shrink(multiply_adds=.2, within=-1., epochs=1, seeds=2, rounds=2, progress=False,
                            candidates={'tiny': lambda: small_net(1)})
    assert far.chosen is None and far.best=='tiny' and 'No candidate comes near enough' in far.sentence

def test_the_sentence_names_the_fastest_the_smallest_and_ties():
    none = KDShrink(COSTS, pd.DataFrame(), [], None, None, .9, 'accuracy', False, None)
    assert none.sentence=="No candidate is within the budget: the fastest, a, takes 1 ms, and the smallest, a, 5 kB."
    runs = pd.DataFrame([(f'b: {m}', FINAL+s, .8+.01*s) for m in ('distilled','baseline') for s in range(3)],
                        columns=['method','seed','accuracy'])
    scores = table(a=[.75,.8,.85], b=[.8,.79,.86], c=[.82,.77,.86])
    found = KDShrink(COSTS, runs, [(8, scores)], 'b', 'b', .9, 'accuracy', False, None)
    assert found.sentence==(
        "b: 5.0 times faster, 9 points below the teacher [6.5, 11]; the next faster, a, is 1.7 points lower after "
        "8 epochs. 3 runs of 8 epochs cannot tell it from c or a.")

@pytest.mark.slow
def test_within_finds_the_fastest_that_comes_near(trained):
    nets = dict(small=lambda: small_net(1), middle=lambda: small_net(4), large=lambda: small_net(8))
    found = trained.kd_shrink(within=2., candidates=nets, epochs=1, seeds=2, pilot_seeds=1, rounds=5, progress=False)
    assert found.chosen==found.costs.ms.drop('teacher').idxmin()

def test_without_time_the_slowest_is_taken_that_may_come_near(trained):
    "Nothing was tried, so the slowest candidate is the surest one"
    nets = dict(small=lambda: small_net(1), large=lambda: small_net(16))
    found = trained.kd_shrink(within=2., candidates=nets, epochs=1, seeds=1, rounds=5, minutes=0, progress=False)
    assert found.chosen==found.costs.ms.drop('teacher').idxmax() and found.rounds==[]

def test_candidates():
    learn = learner()
    x = learn.dls.valid.one_batch()[:1]
    made = read_candidates(learn, ['resnet10t', small_net_2], x)
    assert [*made]==['resnet10t','small_net_2']
    assert made['resnet10t']()(torch.randn(2,1,32,32)).shape==(2,10)
    with pytest.raises(TypeError, match='A candidate is the name of a timm model'):
        read_candidates(learn, [small_net(2)], x)
    with pytest.raises(ValueError, match='Give a budget'): learn.kd_shrink()

def small_net_2(): return small_net(2)
