"What saves time changes no number: the teacher's early exit, and its cache."
import pytest, torch
from torch import nn
from fastai.basics import *
from fastai.callback.all import *
from kd_fastai.all import *
from support import fit, learner, weights
from support.teachers import cached_fit, loaders, net, values

for o in [*globals()]:
    if o=='test' or o.startswith('test_'): del globals()[o]  # fastcore's own helpers, which pytest would take for tests

pytestmark = pytest.mark.filterwarnings('ignore::UserWarning')

# ---- early exit

class Flow(nn.Module):
    "A teacher whose forward is `f(self, x)`"
    def __init__(self, f):
        super().__init__()
        self.f,self.a,self.b,self.act,self.bn,self.head = (f,nn.Conv2d(1,4,3,padding=1),nn.Conv2d(4,4,3,padding=1),
                                                           nn.ReLU(),nn.BatchNorm2d(4),nn.Linear(4,10))
        self.inplace,self.h,self.hs = nn.ReLU(inplace=True),0.,[0.]
    def forward(self, x): return self.head(self.f(self, x).mean((2,3)))

def straight(m, x): return m.bn(m.act(m.b(m.a(x))))
def in_place_behind(m, x): return m.inplace(m.bn(m.b(m.act(m.a(x)))))
def twice(m, x): return m.act(m.b(m.act(m.a(x))))
def order_by_data(m, x): return m.act(m.b(m.a(x))) if x[0].mean()>-0.4 else m.b(m.act(m.a(x)))
def hidden(m, x):
    f = m.act(m.a(x)+m.h); m.h = m.b(f).mean((0,2,3))[None,:,None,None]
    return f
def hidden_in_list(m, x):
    f = m.act(m.a(x)+m.hs[0]); m.hs[0] = m.b(f).mean((0,2,3))[None,:,None,None]
    return f
def statistics(m, x):
    f = m.act(m.a(x)); m.bn.running_mean.add_(f.mean((0,2,3)))
    return m.bn(m.b(f))
def random_behind(m, x): return F.dropout(m.b(m.act(m.a(x))), training=True)
def swallows(m, x):
    try: f = m.act(m.a(x))
    except BaseException: f = m.a(x)
    return m.b(f)

FLOWS = dict(straight=(straight, ['act'], True), two=(straight, ['act','a'], True),
             in_place_behind=(in_place_behind, ['act'], True), first_call=(twice, ['act@0'], False),
             last_call=(twice, ['act@-1'], False), order_by_data=(order_by_data, ['a','act','b'], None),
             hidden=(hidden, ['act'], False), hidden_in_list=(hidden_in_list, ['act'], False),
             statistics=(statistics, ['act'], False), random_behind=(random_behind, ['act'], False),
             swallows=(swallows, ['act'], False))

def watched(f, early_exit, layers, n=2):
    "Train by features of a teacher; its columns, the student's weights, and how often the teacher ran to its end"
    set_seed(5)
    t,ends = Flow(f).eval(),[]
    t.head.register_forward_hook(lambda *_: ends.append(1))
    student = nn.Sequential(OrderedDict(a=nn.Conv2d(1,4,3,padding=1), d=nn.Dropout(0.2), act=nn.ReLU(),
                                        pool=nn.AdaptiveAvgPool2d(1), flat=nn.Flatten(), head=nn.Linear(4,10)))
    kd = KnowledgeDistillationCallback(t, [Term(Attention, 10.), Term(Similarity)], [('act',o) for o in layers],
                                       early_exit=early_exit)
    learn = fit(learner(cbs=kd, model=student), n)
    return [o[:-1] for o in learn.recorder.values],weights(learn),len(ends)

@pytest.mark.slow
@pytest.mark.parametrize('name', FLOWS)
def test_early_exit_changes_no_number(name):
    f,layers,exits = FLOWS[name]
    values,w,ends = watched(f, True, layers)
    values_,w_,ends_ = watched(f, False, layers)
    assert values==values_ and torch.equal(w, w_)
    assert ends_==10
    # the first batch of each epoch shows in which order the layers run
    assert exits is None or ends==(2 if exits else 10)

def test_early_exit_keeps_the_errors():
    "A layer that is called twice, not at all or overwritten is refused all the same"
    for f,layer,text in ((twice, 'act', 'ran 2 times'), (straight, 'inplace', 'did not run'),
                         (lambda m,x: m.inplace(m.a(x)), 'a', 'changed in place')):
        with pytest.raises(RuntimeError, match=text): watched(f, True, [layer])

def test_no_exit_where_predictions_are_wanted():
    t,ends = net(8),[]
    t[-1].register_forward_hook(lambda *_: ends.append(1))
    fit(learner(cbs=KnowledgeDistillationCallback(t, [SoftTarget, Term(Attention)], '1')), 2)
    assert len(ends)==10

def test_no_exit_where_everything_is_wanted():
    "a loss from elsewhere that takes `**kwargs` may look at anything"
    got = []
    def everything(fm_s, **kwargs): got.append({*kwargs}); return sum(f.mean() for f in fm_s.values())
    fit(learner(cbs=KnowledgeDistillationCallback(net(), [everything, Attention], '1')), 1)
    assert all(o=={'pred','teacher_pred','fm_t','target'} for o in got) and len(got)>1

def test_no_exit_of_compiled_teachers():
    torch._dynamo.reset()
    def train(compile):
        t,ends = net(8),[]
        t[-1].register_forward_hook(lambda *_: ends.append(1))
        teacher = torch.compile(t, backend='eager') if compile else t
        kd = KnowledgeDistillationCallback(teacher, Attention, '1', weight=10.)
        return weights(fit(learner(kd), 2)),len(ends)
    (a,ends),(b,ends_compiled) = train(False),train(True)
    torch.testing.assert_close(a, b)
    assert ends==2 and ends_compiled==10  # the first batch of each epoch, and all batches
    torch._dynamo.reset()

def test_a_loss_that_is_built_gets_the_first_prediction():
    got = []
    class Built(nn.Module):
        def build(self, teacher_pred, **kwargs): got.append(teacher_pred.shape)
        def forward(self, fm_s, fm_t): return Attention(fm_s, fm_t)
    fit(learner(cbs=KnowledgeDistillationCallback(net(8), Built(), '1')))
    assert got==[(20,10)]

def test_two_callbacks_stop_one_teacher_each_for_itself():
    t = net(8)
    def train(early_exit):
        return fit(learner(cbs=[KnowledgeDistillationCallback(t, Term(Attention, 10.), l, early_exit=early_exit)
                                for l in ('0','2')]), 2)
    assert torch.equal(weights(train(True)), weights(train(False)))

# ---- looking at the columns' values less often, as on a GPU

def test_a_later_look_gives_the_same_columns(monkeypatch):
    now = cached_fit(net(8))
    monkeypatch.setattr('kd_fastai.fit.columns.flush_interval', lambda device: 3)  # of seven steps
    assert (values(cached_fit(net(8)))==values(now)).all()

@pytest.mark.parametrize('bad', [1,4,6])
def test_a_later_look_names_the_first_bad_step(monkeypatch, bad):
    "before the validation that follows"
    monkeypatch.setattr('kd_fastai.fit.columns.flush_interval', lambda device: 50)
    calls,validated = [],[]
    def breaks(pred): calls.append(1); return pred.mean()*(float('nan') if len(calls)>bad else 1.)
    class Seen(Callback):
        def before_validate(self): validated.append(1)
    learn = learner(dls=loaders(), cbs=[KnowledgeDistillationCallback(net(8), breaks), Seen()])
    with pytest.raises(FloatingPointError, match=f'breaks is nan in epoch 0, batch {bad}'): learn.fit(1)
    assert not validated

# ---- what is kept for backward

@pytest.fixture
def benchmarks(monkeypatch): monkeypatch.syspath_prepend(str(Path(__file__).parents[2]/'benchmarks'))

@pytest.mark.slow
def test_saves_no_more_for_backward_than_a_loop_by_hand(benchmarks):
    from clock import saved_mib
    from costs import step
    methods = step.methods(*step.tiny())
    for f in methods.values(): f()
    saved = {n: saved_mib(f) for n,f in methods.items()}
    for n in ('kd_fastai','kd_fastai, cached'): assert saved[n]<=1.02*saved['by hand'], saved
    assert saved['by hand']>saved['teacher and loss']>0

def test_every_loss_can_be_measured(benchmarks):
    from costs import losses
    for name in losses.LOSSES:
        row = losses.measure(name, 4, 16, seconds=0)
        assert row['ms']>0 and row['MiB']>0, row
