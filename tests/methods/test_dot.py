"DOT: trajectories of the authors' code, a hand-written loop, and what it refuses."
import json
from copy import deepcopy
from functools import partial
from pathlib import Path
import numpy as np, pytest, torch, torch.nn.functional as F
from torch import nn
from torch.utils.data import TensorDataset
from fastai.basics import Adam, Callback, DataLoader, DataLoaders, Learner, OptimWrapper, Recorder, SGD
from fastai.callback.all import GradientAccumulation, GradientClip, SchedNo, combine_scheds
from kd_fastai.all import *
from kd_fastai.demo import digits, small_net
from support import KD, CPUMixedPrecision, fit, learner, quiet, weights

pytestmark = pytest.mark.filterwarnings('ignore')
torch.set_num_threads(1)
golden = Path(__file__).parents[1]/'golden'/'training'
index = json.loads((golden/'dot.json').read_text())
sgd = partial(SGD, mom=0.9)

# ---- golden trajectories

class Parameters(nn.Module):
    "Predicts the parameters that the task reaches; the layer `kd` outputs those that distillation reaches"
    def __init__(self, params, task, kd):
        super().__init__()
        self.params,self.kd = nn.ParameterDict(params),nn.Identity()
        self.names = task,kd
    def join(self, names): return torch.cat([self.params[n].flatten() for n in names])[None]
    def forward(self, x):
        self.kd(self.join(self.names[1]))
        return self.join(self.names[0])

class NoDecayInTheFirstStep(Callback):
    "As the reference does for parameters without a task gradient"
    def __init__(self, names): self.names = names
    def before_step(self):
        for n in self.names: self.opt.state[self.model.params[n]]['do_wd'] = self.train_iter>0

def arrays(key):
    with np.load(golden/'dot.npz') as z:
        return {k.removeprefix(key+'/'): torch.tensor(z[k]).double() for k in z.files if k.startswith(key+'/')}

def optimizer(momentum, dampening, torchs, **_):
    "SGD of fastai or of torch"
    if not torchs: return partial(SGD, mom=momentum, decouple_wd=False)
    return partial(OptimWrapper, opt=torch.optim.SGD, momentum=momentum, dampening=dampening)

def can_run(case, torchs):
    "fastai's SGD has no dampening, torch's no weight decay for single parameters"
    return case['case']!='no_task_gradient' if torchs else not case['hp']['dampening']

RUNS = [pytest.param(c, t, id=f"{c['case']}, {'torch' if t else 'fastai'}")
        for c in index['cases'] for t in (False, True) if can_run(c, t)]

@pytest.mark.parametrize('case,torchs', RUNS)
def test_golden_trajectories(case, torchs):
    "The Learner gets the gradients of the case step by step, from a linear task loss and a linear term."
    hp,x = case['hp'],arrays(case['key'])
    params = {n[9:]: v for n,v in x.items() if n.startswith('aux/param')}
    def gradients(who):
        found = {i: x[f'aux/{who}{i}'].flatten(1) for i in params if f'aux/{who}{i}' in x}
        return [*found],torch.cat([*found.values()], 1)
    (task,g_task),(kd,g_kd) = gradients('task'),gradients('kd')
    n_steps = len(g_task)
    steps = torch.arange(n_steps)
    dl = DataLoader(TensorDataset(steps.double()[:,None], steps), bs=1)
    model = Parameters({k: v.clone() for k,v in params.items()}, task, kd)
    def linear(fm_s, target): return (fm_s['kd']*g_kd[target]).sum()
    distill = KD(nn.Identity(), Term(linear, 1., layers={'student': ['kd'], 'teacher': []}))
    def task_loss(pred, y): return (pred*g_task[y]).sum()
    opt = optimizer(**hp, torchs=torchs)
    learn = Learner(DataLoaders(dl, dl), model, loss_func=task_loss, opt_func=opt, cbs=[distill, DOT(hp['delta'])])
    only_kd = [i for i in params if i not in task]
    if only_kd and hp['weight_decay']: learn.add_cb(NoDecayInTheFirstStep(only_kd))
    learn.remove_cb(Recorder)  # computes in float32
    quiet(learn).fit(1, hp['lr'], wd=hp['weight_decay'])
    for i,p in model.params.items():
        torch.testing.assert_close(p.data, x[f'state_after/param{i}'], rtol=1e-5, atol=1e-6)
    total = sum(p.sum().item() for p in model.params.values())
    assert total==pytest.approx(case['expected'], rel=1e-5, abs=1e-6)

# ---- a training run

def by_hand(teacher, model, dls, delta, mom=0.9, lr=0.05, wd=0.01, task_weight=0.7, weight=0.5, n=2):
    "Train with two momentum buffers in plain PyTorch; returns the model"
    params = [*model.parameters()]
    decays = [p.ndim>1 for p in params]  # as fastai does, not for batch norm and biases
    model.train()
    task_avg,kd_avg = None,None
    for x,y in (b for _ in range(n) for b in dls.train):
        pred = model(x)
        with torch.no_grad(): t = teacher(x)
        task,kd = task_weight*F.cross_entropy(pred, y),weight*SoftTarget(pred, t)
        g_task,g_kd = (torch.autograd.grad(o, params, retain_graph=True) for o in (task, kd))
        task_avg = g_task if task_avg is None else [(mom-delta)*v+g for v,g in zip(task_avg, g_task)]
        kd_avg = g_kd if kd_avg is None else [(mom+delta)*v+g for v,g in zip(kd_avg, g_kd)]
        with torch.no_grad():
            for p,a,b,d in zip(params, task_avg, kd_avg, decays):
                if d: p *= 1-lr*wd
                p -= lr*a
                p -= lr*b
    return model

@pytest.fixture(scope='module')
def teacher(): return fit(learner(width=8, dls=digits(), seed=8), 2).model.eval()

def distilled(teacher, *cbs, opt_func=sgd, **kwargs):
    return learner([KD(teacher, SoftTarget, weight=0.5, task_weight=0.7), *cbs], opt_func=opt_func, wd=0.01, **kwargs)

@pytest.mark.parametrize('delta', [0,0.075])
def test_training_equals_a_hand_written_loop(teacher, delta):
    learn = distilled(teacher, DOT(delta))
    torch.manual_seed(1)
    hand = by_hand(teacher, deepcopy(learn.model), digits(100), delta)
    fit(learn, 2, 0.05)
    torch.testing.assert_close(weights(learn), weights(hand), rtol=1e-3, atol=1e-5)
    other = by_hand(teacher, distilled(teacher).model, digits(100), 0.075-delta)
    assert not torch.allclose(weights(learn), weights(other), atol=1e-3)

def test_delta_zero_is_plain_training_with_owned_weights(teacher):
    "An adapter gets no gradient of the task, and the head none of a term on features."
    def run(*cbs):
        kd = KD(teacher, Term(FitNet, 1., layers='1', adapt='auto'))
        learn = fit(learner([kd, *cbs], opt_func=sgd), 2, 0.02)
        return torch.cat([weights(learn), *(p.detach().flatten() for p in kd.objective.parameters())])
    plain,zero,dot = run(),run(DOT(0)),run(DOT())
    torch.testing.assert_close(zero, plain, rtol=1e-3, atol=1e-5)
    assert not torch.allclose(dot, plain, atol=1e-3)

def test_terms_of_weight_zero_are_plain_momentum(teacher):
    "While a schedule is at 0, the optimizer trains without a teacher."
    late = combine_scheds([0.5,0.5], [SchedNo(0,0), SchedNo(1,1)])
    def run(schedule, *cbs):
        return weights(fit(learner([KD(teacher, SoftTarget, schedule=schedule), *cbs], opt_func=sgd), 1, 0.02))
    torch.testing.assert_close(run(SchedNo(0,0), DOT()), run(SchedNo(0,0)))
    assert not torch.allclose(run(late, DOT()), run(late), atol=1e-4)

def test_saved_and_loaded(teacher, tmp_path):
    "Two fits with a save and a load between them equal two without."
    def new(dls=None): return distilled(teacher, DOT(), path=tmp_path, dls=dls)
    a,b = new(),new()
    fit(fit(a, 1, 0.02), 1, 0.02)
    fit(b, 1, 0.02).save('m')
    c = new(b.dls)
    c.create_opt()
    c.load('m')
    assert torch.equal(weights(fit(c, 1, 0.02)), weights(a))
    plain = learner(opt_func=sgd, path=tmp_path)
    fit(plain.load('m'), 1, 0.02)  # loads without the callback

def test_nothing_stays(teacher):
    dot = DOT()
    learn = fit(distilled(teacher, dot), 1, 0.02)
    assert not dot.task_grads
    assert not dot.kd_grads
    assert learn.opt.hypers[0]['mom']==0.9

def test_the_loss_that_is_recorded_is_the_sum(teacher):
    a,b = (fit(distilled(teacher, *cbs), 1, 0.) for cbs in ([DOT()], []))
    assert a.recorder.values[0][0]==pytest.approx(b.recorder.values[0][0])

# ---- mistakes

MISTAKES = {
    'no teacher':   (dict(kd=False), 'DOT needs a distillation callback'),
    'no task':      (dict(task_weight=0.), 'but task_weight is 0'),
    'Adam':         (dict(opt_func=Adam), 'SGD with momentum.*got Optimizer of weight_decay, average_grad, .*adam'),
    'no momentum':  (dict(opt_func=SGD), 'got Optimizer of weight_decay, sgd_step'),
    'AdamW':        (dict(opt_func=partial(OptimWrapper, opt=torch.optim.AdamW)), 'got AdamW'),
    'nesterov':     (dict(opt_func=partial(OptimWrapper, opt=torch.optim.SGD, momentum=.9, nesterov=True)), 'got SGD'),
    'accumulation': (dict(cbs=[GradientAccumulation(40)]), 'DOT does not work with gradient_accumulation'),
    'clipping':     (dict(cbs=[GradientClip()]), 'DOT does not work with gradient_clip'),
    'fp16':         (dict(cbs=[CPUMixedPrecision()]), 'DOT does not work with cpumixed_precision|cpu_mixed_precision'),
    'momentum':     (dict(opt_func=partial(SGD, mom=0.95)),
                     'Expected a momentum from delta to 1-delta, 0.075 to 0.925, got 0.95'),
}

@pytest.mark.parametrize('name', MISTAKES)
def test_mistakes_are_errors_before_the_first_step(teacher, name):
    given,message = MISTAKES[name]
    given = {'kd': True, 'task_weight': 1., 'opt_func': sgd, 'cbs': [], **given}
    kd = [KD(teacher, SoftTarget, task_weight=given['task_weight'])] if given['kd'] else []
    learn = learner([*kd, DOT(), *given['cbs']], opt_func=given['opt_func'])
    before = weights(learn)
    with pytest.raises(ValueError, match=message): fit(learn)
    assert torch.equal(weights(learn), before)

def test_mutual_learning_is_refused():
    with pytest.raises(ValueError, match='DOT does not work with mutual_learning'):
        fit(learner([MutualLearning(small_net(4)), DOT()], opt_func=sgd))

def test_bfloat16(teacher):
    "Autocast in bfloat16 has no scaler, and works."
    learn = fit(distilled(teacher, DOT(), CPUMixedPrecision(amp_mode='bf16')), 2, 0.02)
    assert learn.recorder.values[-1][0]<learn.recorder.values[0][0]
