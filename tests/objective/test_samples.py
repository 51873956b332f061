"Weights of samples in a term, gates, and labels of mixed samples, each compared with a loop over samples."
from functools import partial
import pytest, scipy.stats, torch, torch.nn.functional as F
from torch import nn
from fastai.basics import Callback, DataLoader, DataLoaders, set_seed
from fastai.callback.all import CutMix, MixUp, SchedLin
from kd_fastai.all import *
from kd_fastai.methods.gates import all_of, by_entropy, by_position, teacher_right, teacher_sure
from kd_fastai.demo import digits, small_net
from kd_fastai.objective import Batch
from support import KD, KeepBatches, fit, history, learner, weights

pytestmark = pytest.mark.filterwarnings('ignore')
torch.set_num_threads(1)

@pytest.fixture(scope='module')
def teacher(): return fit(learner(width=8, dls=digits(), seed=8), 3).model

def inputs(B=6, C=5, size=()):
    "A batch in float64, with features of equal and unequal channels"
    g = torch.Generator().manual_seed(0)
    def rand(*shape): return torch.randn(shape, generator=g, dtype=torch.float64)
    target = torch.randint(C, (B,*size), generator=g)
    fm_s,fm_t = {'a': rand(B,4,3,3).requires_grad_()},{'a': rand(B,4,3,3), 'b': rand(B,7,3,3)}
    pred,teacher_pred = rand(B,C,*size).requires_grad_(),rand(B,C,*size)
    return dict(pred=pred, teacher_pred=teacher_pred, fm_s=fm_s, fm_t=fm_t, target=target)

def one(x, i):
    "The batch of one sample"
    return {k: {n: f[i:i+1] for n,f in v.items()} if isinstance(v, dict) else v[i:i+1] for k,v in x.items()}

W = torch.tensor([0.,1.,.5,2.,0.,3.])
def given(batch): return W

def value(term, x, **kwargs):
    "Value of a term in an objective"
    objective = Objective([term])
    batch = objective.prepare(**x, **kwargs)
    if not objective.built: objective.build(batch, nn.Identity(), nn.Identity())
    return objective.values(batch, progress=0.5)[objective.terms[0].name],objective

TERMS = {'predictions': partial(Term, SoftTarget, T=3), 'labels': partial(Term, DecoupledKD),
         'elements': partial(Term, Logits), 'wrapped': partial(Term, standardize(SoftTarget)),
         'features': partial(Term, FitNet, layers='a'), 'scheduled': partial(Term, CWD, layers='a', T=SchedLin(2,4)),
         'adapted': partial(Term, FitNet, layers=[('a','b')], adapt='auto')}

@pytest.mark.parametrize('name', TERMS)
def test_weighted_term_equals_a_loop(name):
    "The value and the gradient are those of the mean over samples of weight times value."
    x = inputs()
    got,objective = value(TERMS[name](sample_weight=given), x)
    def of_one(i): return objective.terms[0].loss_at(0.5)(**select(one(x, i)))
    def select(x):
        term = objective.terms[0]
        features = Batch(None, fm_s=x['fm_s'], fm_t=x['fm_t']).features(term.layers) if term.uses_features else {}
        return {**term.args.select(x), **features}
    loop = sum(w*of_one(i) for i,w in enumerate(W))/6
    torch.testing.assert_close(got, loop)
    leaf = x['fm_s']['a'] if objective.terms[0].uses_features else x['pred']
    a,b = (torch.autograd.grad(o, leaf)[0] for o in (got, loop))
    torch.testing.assert_close(a, b)
    assert (a[0]==0).all()

@pytest.mark.parametrize('name', TERMS)
def test_weights_of_one_equal_the_plain_term(name):
    x = inputs()
    set_seed(0); plain,_ = value(TERMS[name](), x)
    set_seed(0); ones,_ = value(TERMS[name](sample_weight=lambda b: torch.ones(6)), x)
    torch.testing.assert_close(ones, plain)

def test_weights_get_no_gradient():
    x = inputs()
    got,_ = value(Term(SoftTarget, sample_weight=lambda b: b.pred.pow(2).sum(1)), x)
    fixed = x['pred'].detach().pow(2).sum(1)
    again,_ = value(Term(SoftTarget, sample_weight=lambda b: fixed), x)
    torch.testing.assert_close(*(torch.autograd.grad(o, x['pred'])[0] for o in (got, again)))

# ---- dense predictions, ignored labels

@pytest.mark.parametrize('per_position', [False,True])
@pytest.mark.parametrize('ignored', [False,True])
@pytest.mark.parametrize('loss', [SoftTarget, DecoupledKD])
def test_dense_weights(loss, per_position, ignored):
    "Each labeled position counts with its own weight or with that of its sample."
    x = inputs(size=(2,3))
    if ignored: x['target'][2:4,0] = -100
    w = torch.rand(6,2,3) if per_position else W
    got,_ = value_of(Term(loss, sample_weight=lambda b: w), x, ignore_index=-100)
    terms = []
    for i,h,v in ((i,h,v) for i in range(6) for h in range(2) for v in range(3)):
        y = x['target'][i,h,v]
        if y==-100: continue
        row = dict(pred=x['pred'][i,:,h,v][None], teacher_pred=x['teacher_pred'][i,:,h,v][None])
        if loss is DecoupledKD: row['target'] = y[None]
        terms.append(w[i,h,v]*loss(**row) if per_position else w[i]*loss(**row))
    torch.testing.assert_close(got, sum(terms)/len(terms))

def value_of(term, x, **kwargs):
    objective = Objective([term], **kwargs)
    return objective.values(objective.prepare(**x))[objective.terms[0].name],objective

def test_features_of_a_dense_student_have_a_weight_for_each_sample():
    x = inputs(size=(2,3))
    got,_ = value_of(Term(FitNet, layers='a', sample_weight=given), x)
    loop = sum(w*FitNet({'a': x['fm_s']['a'][i:i+1]}, {'a': x['fm_t']['a'][i:i+1]}) for i,w in enumerate(W))/6
    torch.testing.assert_close(got, loop)
    with pytest.raises(ValueError, match=r'fit_net: expected one weight for each of 6 samples, got \(6, 2, 3\)'):
        value_of(Term(FitNet, layers='a', sample_weight=lambda b: torch.ones(6,2,3)), x)

def test_samples_without_a_label_do_not_count():
    x = inputs()
    x['target'][1] = -100
    got,_ = value_of(Term(DecoupledKD, sample_weight=given), x, ignore_index=-100)
    loop = [w*DecoupledKD(**{k: one(x, i)[k] for k in ('pred','teacher_pred','target')})
            for i,w in enumerate(W) if i!=1]
    torch.testing.assert_close(got, sum(loop)/5)

# ---- mixed samples

@pytest.mark.parametrize('weight', [None, teacher_sure(0.3)], ids=['plain','gated'])
@pytest.mark.parametrize('mix', [MixUp, CutMix])
def test_labels_of_mixed_samples_are_exact(teacher, mix, weight):
    "In a training run, each sample is interpolated by its own share."
    class Look(Callback):
        order,run_valid = KD.order+1,False
        def after_loss(self):
            with torch.no_grad(): q = teacher.eval()(self.x)
            lam,other = mixer.lam.expand(len(self.y)),mixer.yb1[0]
            w = torch.ones(len(q)) if weight is None else (q.softmax(1).amax(1)>=0.3).float()
            def of(i, y): return DecoupledKD(self.pred[i:i+1], q[i:i+1], y[i:i+1])
            loop = sum(w[i]*(lam[i]*of(i, self.y)+(1-lam[i])*of(i, other)) for i in range(len(q)))/len(q)
            task = self.learn.loss_func(self.pred, self.y)
            torch.testing.assert_close(self.loss, task+2*loop, rtol=1e-4, atol=1e-5)
            looked.append(lam)
    looked,mixer = [],mix(1.)
    fit(learner([KD(teacher, Term(DecoupledKD, 2., sample_weight=weight)), mixer, Look()]))
    assert len(looked)==5
    assert (looked[0].std()>0.01)==(mix is MixUp)

def test_a_loss_without_values_of_samples_uses_the_mean_share():
    def hard(pred, target): return F.cross_entropy(pred, target)
    x,other = inputs(),torch.arange(6)%5
    share = torch.rand(6, dtype=torch.float64)
    got,_ = value(Term(hard), x, mixed=(other, share))
    expected = torch.lerp(hard(x['pred'], other), hard(x['pred'], x['target']), share.mean())
    torch.testing.assert_close(got, expected)

def test_mixed_dense_labels_are_exact():
    x = inputs(size=(2,))
    x['target'][0,0] = -100
    other,share = (x['target'].clamp_min(0)+1)%5,torch.rand(6, dtype=torch.float64)
    objective = Objective([Term(DecoupledKD)], ignore_index=-100)
    got = objective.values(objective.prepare(**x, mixed=(other, share)))['decoupled_kd']
    values = [share[i]*f(x['target'])+(1-share[i])*f(other) for i in range(6) for h in range(2) if (i,h)!=(0,0)
              for f in [lambda y: DecoupledKD(x['pred'][i,:,h][None], x['teacher_pred'][i,:,h][None], y[i,h][None])]]
    torch.testing.assert_close(got, sum(values)/11)

# ---- gates

def test_gates():
    x = inputs()
    x['target'][:3] = x['teacher_pred'][:3].argmax(1)
    batch = Batch(x['pred'], x['teacher_pred'], target=x['target'])
    p = x['teacher_pred'].softmax(1)
    right = [float(q.argmax()==y) for q,y in zip(p, x['target'])]
    sure = [float(q.max()>=0.4) for q in p]
    assert 0<sum(right)<6
    assert 0<sum(sure)<6
    assert teacher_right(batch).tolist()==right
    assert teacher_sure(0.4)(batch).tolist()==sure
    assert all_of(teacher_right, teacher_sure(0.4))(batch).tolist()==[a*b for a,b in zip(right, sure)]
    entropy = scipy.stats.entropy((x['teacher_pred']/2).softmax(1), axis=1)
    torch.testing.assert_close(by_entropy(T=2)(batch), torch.tensor(entropy))
    with pytest.raises(ValueError, match='between 0 and 1, got 1.5'): teacher_sure(1.5)

def test_entropy_of_a_certain_teacher_is_zero():
    z = torch.tensor([[0.,-torch.inf,-torch.inf], [1e4,-1e4,0.]])
    assert by_entropy()(Batch(z, z)).tolist()==[0,0]

def test_a_mixed_teacher_is_right_by_its_share():
    z = torch.eye(3)
    batch = Batch(z, z, target=torch.tensor([0,1,0]), mixed=(torch.tensor([1,1,2]), torch.tensor([.7,.6,.8])))
    torch.testing.assert_close(teacher_right(batch), torch.tensor([.7,1.,.2]))

GATES = {'right': teacher_right, 'sure': teacher_sure(0.9), 'entropy': by_entropy(),
         'both': all_of(teacher_right, teacher_sure(0.9))}

@pytest.mark.parametrize('name', GATES)
@pytest.mark.parametrize('term', [partial(Term, SoftTarget), partial(Term, FitNet, layers='1', adapt='auto')],
                         ids=['predictions','features'])
def test_a_training_with_each_gate(teacher, name, term):
    "A gated training runs, counts the gate, and is another one than the plain training."
    seen = []
    def watched(batch):
        w = GATES[name](batch)
        seen.append(w)
        return w
    plain,gated = (fit(learner(KD(teacher, term(weight=2., sample_weight=o))), 2) for o in (None, watched))
    w = torch.cat(seen)
    assert len(w)==200
    assert 0<w.mean()
    assert w.std()>0
    h = history(gated)
    assert h.iloc[-1,-2]<h.iloc[0,-2]  # the task loss
    assert not torch.equal(weights(plain), weights(gated))

def test_weights_by_position(teacher):
    "Weights may be looked up by the positions of the samples; mixed samples have none."
    table,seen,keep = torch.rand(100),[],KeepBatches()
    def look_up(batch): seen.append(by_position(table)(batch)); return seen[-1]
    look_up.uses_idx = True
    learn = fit(learner([KD(teacher, Term(SoftTarget, sample_weight=look_up)), keep]))
    order = [(learn.dls.train_ds[:][0]==x).flatten(1).all(1).nonzero()[0].item() for b,_ in keep.batches for x in b]
    assert torch.equal(torch.cat(seen), table[order])
    term = Term(SoftTarget, sample_weight=all_of(teacher_right, by_position(table)))
    fit(learner(KD(teacher, term)))
    with pytest.raises(ValueError, match='by_position needs the indices of the samples'):
        fit(learner([KD(teacher, term), MixUp()]))

class FromDict(nn.Module):
    "A student that reads its picture from a dict"
    def __init__(self, net): super().__init__(); self.net = net
    def forward(self, x): return self.net(x['image'])

def test_weights_in_the_batch(teacher):
    "The batch may have weights in a dict; one without them is an error before the first step."
    ds = [({'image': x, 'weight': torch.rand(())}, y) for x,y in zip(*digits(100).train_ds[:])]
    dls = DataLoaders(*(DataLoader(ds, bs=20) for _ in range(2)))
    def run(**kwargs):
        term = Term(SoftTarget, 2., **kwargs)
        set_seed(0)
        learn = learner(KD(FromDict(teacher), term), dls, FromDict(small_net(4)))
        return learn,partial(fit, learn)
    def same(batch): return torch.stack([o[0]['weight'] for o in ds[20*learn.iter:20*learn.iter+20]])
    learn,train = run(sample_weight=same)
    a = weights(train())
    assert torch.equal(weights(run(sample_weight='weight')[1]()), a)
    assert not torch.equal(weights(run()[1]()), a)
    learn,train = run(sample_weight='wight')
    before = weights(learn)
    with pytest.raises(ValueError, match=r"soft_target: the batch has no field 'wight', only \['image', 'weight'\]"):
        train()
    assert torch.equal(weights(learn), before)

# ---- mistakes

@pytest.mark.parametrize('loss', [RKD, DIST, lambda pred, teacher_pred: pred.sum()])
def test_losses_without_values_of_samples_are_refused(loss):
    with pytest.raises(ValueError, match='sample_weight needs a value for each sample, and .* has none'):
        Term(loss, sample_weight=teacher_right)

@pytest.mark.parametrize('got,wrong', [(r'\(6, 1\)', torch.ones(6,1)), (r'\(5,\)', torch.ones(5)), ('float', 1.)])
def test_weights_of_another_shape_are_an_error(got, wrong):
    with pytest.raises(ValueError, match=rf'soft_target: expected sample weights of shape \(6,\), got {got}'):
        value(Term(SoftTarget, sample_weight=lambda b: wrong), inputs())
