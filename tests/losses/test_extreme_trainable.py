"Inputs at which losses with weights failed or had side effects: each test failed before its fix."
import pytest, torch
from fastai.basics import *
from torch import nn
from kd_fastai.all import *
from kd_fastai.demo import digits, small_net
from kd_fastai.losses.base import RobustBatchNorm2d
from kd_fastai.losses.facts import loss_args
from support import fit, learner
from support.losses import ALL, built, changed, inputs, run

pytestmark = pytest.mark.hostile

for o in [*globals()]:
    if o=='test' or o.startswith('test_'): del globals()[o]  # fastcore's own helpers, which pytest would take for tests

features = [n for n in ALL if n!='CTKD']
every = pytest.mark.parametrize('name', ALL)

def first_samples(x, n):
    "The same arguments, for the first samples of the batch"
    def cut(v):
        if isinstance(v, nn.Module): return v
        return {k: t[:n] for k,t in v.items()} if isinstance(v, dict) else v[:n]
    return {k: cut(v) for k,v in x.items()}

def call(loss, x): return loss(**loss_args(loss).select(x))

# --- a last batch of one sample

@pytest.mark.parametrize('name', features)
def test_last_batch_of_one_embedding(name):
    "A batch of one embedding has one value per channel, for which batch norm has no statistics"
    if name=='AFD': pytest.skip("refuses features of one position")
    x = inputs(name, shapes=([(s[0],) for s in ALL[name].student], [(t[0],) for t in ALL[name].teacher]))
    loss = built(name, x)
    value = call(loss, first_samples(x, 1))
    assert value.isfinite()

@pytest.mark.parametrize('name', ['FitNetRegressor','ReviewKD','SRRL','SimKD','SemCKD','ICKDEmbed'])
@pytest.mark.slow
def test_training_with_a_last_batch_of_one(name, teachers):
    data = digits(17)
    data = DataLoaders(DataLoader(data.train_ds, bs=16, shuffle=True, drop_last=False), data.valid)
    assert [len(x) for x,_ in data.train]==[16,1]
    learn = learner(KnowledgeDistillationCallback(teachers[6], ALL[name].make(), '4', weight=1.), dls=data)
    fit(learn)

def test_one_value_per_channel_keeps_the_statistics():
    bn = RobustBatchNorm2d(3)
    bn(torch.randn(8,3,2,2))
    before = {k: v.clone() for k,v in bn.state_dict().items()}
    x = torch.randn(1,3,1,1)
    expected = (x-bn.running_mean[:,None,None])/(bn.running_var[:,None,None]+bn.eps).sqrt()
    torch.testing.assert_close(bn(x), expected)
    assert all(torch.equal(v, before[k]) for k,v in bn.state_dict().items())

def test_several_values_per_channel_are_normalized_as_usual():
    x = torch.randn(2,3,1,1)
    torch.testing.assert_close(RobustBatchNorm2d(3)(x), nn.BatchNorm2d(3)(x))

# --- a float64 student and a float32 teacher

@every
def test_float64_student_with_float32_teacher(name):
    x = inputs(name, dtype=torch.float64)
    mixed = {**changed(x, torch.Tensor.float, ('fm_t',)), 'teacher_pred': x['teacher_pred'].float()}
    value,grads = run(built(name, mixed), mixed)
    same_numbers = {**changed(mixed, torch.Tensor.double, ('fm_t',)), 'teacher_pred': mixed['teacher_pred'].double()}
    expected,_ = run(built(name, same_numbers), same_numbers)
    torch.testing.assert_close(value.double(), expected, rtol=1e-6, atol=1e-9)
    assert all(g.isfinite().all() for g in grads)

# --- random numbers

DRAWING = ['MGD', 'MGD, channel', 'CRDBank']

@pytest.mark.parametrize('name', DRAWING)
def test_torchs_random_state_is_kept(name):
    x = inputs(name)
    loss = built(name, x)
    before = torch.get_rng_state()
    call(loss, x)
    assert torch.equal(before, torch.get_rng_state())

@pytest.mark.parametrize('name', DRAWING)
def test_each_batch_draws_other_numbers(name):
    x = inputs(name)
    loss = built(name, x).eval()   # eval mode: a bank does not change
    assert call(loss, x)!=call(loss, x)

@pytest.mark.parametrize('name', DRAWING)
def test_draws_depend_on_the_seed_alone(name):
    x = inputs(name)
    a,b = built(name, x),built(name, x)
    torch.rand(3)
    assert call(a, x)==call(b, x)
    torch.manual_seed(1)
    other = ALL[name].make().build(**x)
    other.load_state_dict({**a.state_dict(), 'draws': other.draws})
    assert call(other.eval(), x)!=call(a.eval(), x)

@pytest.mark.parametrize('name', ['MGD','CRDBank'])
def test_students_dropout_is_the_same_at_weight_zero(name, teachers):
    "A training run whose only term has weight 0 equals one without a callback, bit for bit"
    def model():
        torch.manual_seed(3)
        return nn.Sequential(*small_net(4)[:5], nn.Dropout(.5), nn.Linear(16, 10))
    term = Term(ALL[name].make(), layers='2' if name=='MGD' else '4', weight=0.)
    plain = fit(learner(model=model()))
    with_kd = fit(learner(KnowledgeDistillationCallback(teachers[6], term), model=model()))
    for p,q in zip(plain.model.parameters(), with_kd.model.parameters(), strict=True): assert torch.equal(p, q)

# --- the number of training samples

def test_bank_takes_the_number_of_samples_from_build():
    x = inputs('CRDBank')
    bank = CRDBank(K=5, dim=8).build(**x, n_data=100)
    assert bank.pairs[0].bank_s.shape==(100,8)
    assert call(bank, x).isfinite()

def test_bank_prefers_its_own_number_of_samples():
    bank = CRDBank(50, K=5, dim=8).build(**inputs('CRDBank'), n_data=100)
    assert bank.pairs[0].bank_s.shape==(50,8)

def test_bank_without_a_number_of_samples():
    with pytest.raises(TypeError, match=r'CRDBank needs the number of training samples.*build\(n_data=...\)'):
        CRDBank().build(**inputs('CRDBank'))

# --- a class instead of an instance

@pytest.mark.parametrize('cls', [CRD, CRDBank, CTKD])
def test_class_instead_of_an_instance(cls):
    name = cls.__name__
    with pytest.raises(TypeError, match=rf'{name} is a class: pass an instance, {name}\(\)'): loss_args(cls)

def test_class_with_required_parameters():
    class Mine(nn.Module):
        def __init__(self, width): super().__init__()
    with pytest.raises(TypeError, match=r'Mine is a class: pass an instance, Mine\(width=...\)'): loss_args(Mine)

def test_class_in_a_callback(teachers):
    with pytest.raises(TypeError, match=r'CRD is a class: pass an instance, CRD\(\)'):
        KnowledgeDistillationCallback(teachers[6], CRD, '4')
