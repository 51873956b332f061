"Masks: losses leave out padding and ignored regions."
from functools import partial
import pytest, torch
from torch import nn
from torch.nn import functional as F
from fastai.basics import CrossEntropyLossFlat, DataLoader, DataLoaders, Learner, set_seed
import kd_fastai.losses as losses
from kd_fastai.all import *
from kd_fastai.demo import small_net
from kd_fastai.losses.masks import how_masked, masked_loss
from kd_fastai.losses.facts import get_loss_info, loss_args, loss_info
from support import KD, fit, history, quiet, weights

pytestmark = pytest.mark.filterwarnings('ignore:The teacher agrees')   # teachers are not trained

FEATURE_LOSSES = {n: f for n,f in vars(losses).items() if getattr(f, 'info', None) and not isinstance(f, type)
                  and {'fm_s','fm_t'} & loss_args(f).accepted and 'mask' not in loss_args(f).accepted}
MASKED = [n for n,f in FEATURE_LOSSES.items() if how_masked(f)]
every = pytest.mark.parametrize('name', MASKED)
KINDS = 'tokens','maps'

def mask_of(kind):
    "True where a position counts: other counts in each sample"
    keep = torch.arange(9)<torch.tensor([9,6,4,7])[:,None]
    return keep if kind=='tokens' else keep.view(4,3,3)

def features(kind, seed=0):
    g = torch.Generator().manual_seed(seed)
    f = torch.randn(4,9,5, generator=g)
    return f if kind=='tokens' else f.mT.reshape(4,5,3,3)

def expand(mask, f): return mask[...,None] if f.ndim==3 else mask[:,None]

def term(name, **kwargs): return Term(FEATURE_LOSSES[name], layers='a', **kwargs)

def value(name, s, t, mask, **kwargs):
    "The value of a term on these features"
    objective = Objective([term(name, mask=None if mask is None else (lambda: mask), **kwargs)])
    pred,g = torch.randn(4,3, generator=torch.Generator().manual_seed(7)),torch.Generator().manual_seed(8)
    masks = objective.find_masks(())
    batch = objective.prepare(pred, torch.randn(4,3, generator=g), {'a': s}, {'a': t}, masks=masks)
    if not objective.built: objective.build(batch, nn.Identity(), nn.Identity())
    return next(iter(objective.values(batch).values()))

def with_gradient(name, s, t, mask, **kwargs):
    s = s.clone().requires_grad_()
    res = value(name, s, t, mask, **kwargs)
    return res.detach(),torch.autograd.grad(res, s)[0]

def test_which_losses_take_a_mask():
    assert {n for n in FEATURE_LOSSES if n not in MASKED}>={'HCL','CATKD','FSP','IRG'}
    assert {*MASKED}>={'FitNet','ActivationBoundaries','PartialL2','PKD','Attention','AttentionNorm','NST','CWD',
                       'FactorTransfer','KTA','Affinity','ICKD','Similarity','PKT','RKD','CorrelationCongruence'}

@every
@pytest.mark.parametrize('kind', KINDS)
def test_a_mask_of_all_positions_changes_nothing(name, kind):
    s,t = features(kind),features(kind, 1)
    want,got = (with_gradient(name, s, t, m) for m in (None, torch.ones_like(mask_of(kind))))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)

@every
@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('junk', [1e4, float('nan')])
def test_masked_places_have_no_effect(name, kind, junk):
    s,t,mask = features(kind),features(kind, 1),mask_of(kind)
    want = with_gradient(name, s, t, mask)
    broken = [torch.where(expand(mask, f), f, junk) for f in (s,t)]
    got = with_gradient(name, *broken, mask)
    torch.testing.assert_close(got, want)
    assert want[0].isfinite() and (want[1]*~expand(mask, s)==0).all() and want[1].abs().sum()>0

@every
def test_more_padding_changes_nothing(name):
    s,t,mask = features('tokens'),features('tokens', 1),mask_of('tokens')
    def longer(f): return F.pad(f, (0,0,0,5), value=3.)
    want = value(name, s, t, mask)
    torch.testing.assert_close(value(name, longer(s), longer(t), F.pad(mask, (0,5))), want, rtol=1e-4, atol=1e-6)

def test_selected_positions_by_hand():
    "The mean over all positions of the batch that count, as TextBrewer's hid_mse_loss"
    s,t,mask = features('tokens'),features('tokens', 1),mask_of('tokens')
    squares = (s-t).pow(2)*mask[...,None]
    torch.testing.assert_close(value('FitNet', s, t, mask), squares.sum()/(mask.sum()*5))

@pytest.mark.parametrize('name', ['Attention','CWD','NST','ICKD','Affinity'])
def test_samples_by_hand(name):
    "The mean over samples, each on its own positions"
    s,t,mask = features('tokens'),features('tokens', 1),mask_of('tokens')
    single = [FEATURE_LOSSES[name]({'a': s[i:i+1,mask[i]]}, {'a': t[i:i+1,mask[i]]}) for i in range(4)]
    torch.testing.assert_close(value(name, s, t, mask), sum(single)/4)

@pytest.mark.parametrize('name', ['FitNet','Attention','PKT'])
def test_nothing_counts(name):
    s,t = features('tokens'),features('tokens', 1)
    got,gradient = with_gradient(name, s, t, torch.zeros(4,9).bool())
    assert got.isfinite() and not gradient.any()

def test_mask_is_resized_to_maps():
    s,t = (torch.randn(2,3,4,4, generator=torch.Generator().manual_seed(k)) for k in (0,1))
    mask = torch.zeros(2,8,8).bool()
    mask[:,:4] = True
    torch.testing.assert_close(value_of(s, t, mask), F.mse_loss(s[:,:,:2], t[:,:,:2]))

def value_of(s, t, mask): return masked_loss(FitNet, mask)(fm_s={'a': s}, fm_t={'b': t})

def test_sizes_that_do_not_fit():
    s = torch.randn(2,5,3)
    with pytest.raises(ValueError, match=r'size \(4,\) does not fit a feature of size \(5,\)'):
        value_of(s, s, torch.ones(2,4).bool())
    with pytest.raises(ValueError, match=r'size \(2, 2\) does not fit a feature of size \(5,\)'):
        value_of(s, s, torch.ones(2,2,2).bool())
    maps = torch.randn(2,3,4,4)
    with pytest.raises(ValueError, match='Expected features of one size under a mask'):
        value_of(maps, maps[...,:2,:2], torch.ones(2,4,4).bool())

def test_embeddings_have_no_positions():
    s,t = torch.randn(2,3),torch.randn(2,3)
    assert value_of(s, t, torch.zeros(2,4).bool())==F.mse_loss(s, t)

@pytest.mark.parametrize('kwargs', [dict(adapt='auto'), dict(adapt=partial(make_adapter, kernel=3))],
                         ids=['auto','convolution'])
def test_adapted_features(kwargs):
    "Adapters, also those that read neighbors, do not see values at masked positions"
    s,mask = features('maps'),mask_of('maps')
    t = torch.randn(4,7,3,3, generator=torch.Generator().manual_seed(3))
    def masked(s):
        torch.manual_seed(5)
        return with_gradient('FitNet', s, t, mask, **kwargs)
    torch.testing.assert_close(masked(torch.where(mask[:,None], s, 1e4)), masked(s))

@pytest.mark.parametrize('loss', [HCL, CATKD, FSP, IRG, SRRL(), FitNetRegressor(), pool_to_smaller(Attention)],
                         ids=lambda f: getattr(f, '__name__', type(f).__name__))
def test_losses_that_take_no_mask_are_named(loss):
    name = getattr(loss, '__name__', type(loss).__name__)
    with pytest.raises(ValueError, match=f'{name} cannot leave out positions'): Term(loss, mask='attention_mask')
    with pytest.raises(ValueError, match=f'{name} cannot leave out positions'):
        KD(small_net(4), loss, ['0','1'], mask='attention_mask')

def test_own_loss_takes_the_mask_as_valid():
    seen = []
    def mine(fm_s, fm_t, mask): seen.append(mask); return (fm_s['a']*mask[...,None]).sum()
    objective = Objective([Term(mine, layers='a', mask=lambda x: x>0)])
    x = torch.tensor([[1,0],[1,1]])
    f = {'a': torch.ones(2,2,3)}
    batch = objective.prepare(torch.zeros(2,2), None, f, f, masks=objective.find_masks((x,)))
    assert objective.values(batch)['mine']==9 and torch.equal(seen[0], x>0)

@pytest.mark.parametrize('mask,error,words', [
    (lambda x, y: x['input_ids'][0], ValueError, r'\(B, \*positions\) of booleans'),
    (lambda x, y: [1], TypeError, 'must be a tensor, got list'),
    ('padding', KeyError, 'is a key of no input'), (3, TypeError, 'mask is the key of a dict input')])
def test_bad_masks(mask, error, words):
    with pytest.raises(error, match=words): text_fit(mask)

# ---- predictions

def test_dense_predictions_leave_out_masked_positions():
    p,t = (torch.randn(2,5,4, generator=torch.Generator().manual_seed(k)) for k in (0,1))
    mask = torch.tensor([[1,1,0,0],[1,0,1,1]]).bool()
    objective = Objective([Term(SoftTarget, mask=lambda: mask)])
    def soft_target(p, t):
        return objective.values(objective.prepare(p, t, masks=objective.find_masks(())))['soft_target']
    rows = [o.movedim(1,-1)[mask] for o in (p,t)]
    torch.testing.assert_close(soft_target(p, t), SoftTarget(*rows))
    broken = [torch.where(mask[:,None], o, float('nan')) for o in (p,t)]
    torch.testing.assert_close(soft_target(*broken), soft_target(p, t))

def test_labels_and_mask_together():
    p,target = torch.randn(2,5,4),torch.tensor([[0,1,-100,2],[3,-100,4,0]])
    mask = torch.tensor([[1,1,1,0],[1,1,1,1]]).bool()
    objective = Objective([Term(DecoupledKD, mask=lambda: mask)], ignore_index=-100)
    batch = objective.prepare(p, 2*p, target=target, masks=objective.find_masks(()))
    both = mask & (target!=-100)
    want = DecoupledKD(p.movedim(1,-1)[both], 2*p.movedim(1,-1)[both], target[both])
    torch.testing.assert_close(objective.values(batch)['decoupled_kd'], want)

def test_predictions_of_whole_samples_have_no_mask():
    p = torch.randn(2,5)
    objective = Objective([Term(SoftTarget, mask=lambda: torch.zeros(2,4).bool())])
    values = objective.values(objective.prepare(p, 2*p, masks=objective.find_masks(())))
    torch.testing.assert_close(values['soft_target'], SoftTarget(p, 2*p))

# ---- training

class Tagger(nn.Module):
    "Embeds tokens and classifies the mean of those that count"
    def __init__(self, width, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.emb,self.mix,self.out = nn.Embedding(20,width),nn.Linear(width,width),nn.Linear(width,3)
    def forward(self, inputs):
        ids,mask = inputs['input_ids'],inputs['attention_mask']
        h = self.mix(self.emb(ids))*mask[...,None]
        return self.out(h.sum(1)/mask.sum(1, keepdim=True))

def text_data(pad):
    "Dict inputs of 6 tokens, padded by the token `pad`"
    set_seed(0)
    rows,lengths = [],[2,3,4,5,6,3,4,2]
    for i in range(32):
        n = lengths[i%8]
        ids = torch.cat([torch.randint(2,20,(n,)), torch.full((6-n,), pad)])
        rows.append((dict(input_ids=ids, attention_mask=(torch.arange(6)<n).long()), torch.tensor(i%3)))
    return DataLoaders(*(DataLoader(rows, bs=8, num_workers=0) for _ in range(2)))

def text_fit(mask, pad=0):
    loss = Term(FitNet, 1., layers=[('emb','mix')], adapt='auto')
    kd = KD(Tagger(6, 2), [SoftTarget, loss], mask=mask)
    return fit(quiet(Learner(text_data(pad), Tagger(4, 1), loss_func=CrossEntropyLossFlat(), cbs=kd)), 2)

def test_training_with_an_attention_mask_does_not_see_the_padding():
    a,b = text_fit('attention_mask', pad=0),text_fit('attention_mask', pad=1)
    assert history(a).fit_net.tolist()==history(b).fit_net.tolist()
    def rest(learn): return [p for n,p in learn.model.named_parameters() if n!='emb.weight']
    torch.testing.assert_close(rest(a), rest(b))
    unmasked = [history(text_fit(None, pad=p)).fit_net.tolist() for p in (0,1)]
    assert unmasked[0]!=unmasked[1]

def test_a_function_of_the_batch_is_a_mask():
    a,b = text_fit('attention_mask'),text_fit(lambda x, y: x['input_ids']!=0)
    torch.testing.assert_close(weights(a), weights(b))

def test_ignored_regions_of_a_segmentation():
    set_seed(0)
    rows = [(torch.rand(1,8,8), torch.randint(0,3,(8,8)).index_fill(0, torch.arange(4), 255)) for _ in range(16)]
    def train(ruined):
        set_seed(0)
        student,teacher = (nn.Sequential(nn.Conv2d(1,4,1), nn.ReLU(), nn.Conv2d(4,3,1)) for _ in range(2))
        data = [(x.index_fill(1, torch.arange(4), 50.) if ruined else x, y) for x,y in rows]
        dls = DataLoaders(*(DataLoader(data, bs=8, num_workers=0) for _ in range(2)))
        kd = KD(teacher, [SoftTarget, Term(CWD, layers='0')], mask=lambda x, y: y!=255)
        loss_func = CrossEntropyLossFlat(axis=1, ignore_index=255)
        return fit(quiet(Learner(dls, student, loss_func=loss_func, cbs=kd)), 2)
    torch.testing.assert_close(weights(train(True)), weights(train(False)))

def test_masks_go_with_the_samples_that_have_a_label():
    "A loss on features that reads labels gets features, labels and masks of the same samples."
    def distance(fm_s, fm_t, target): return FitNet(fm_s, fm_t)+0*target.sum()
    loss = loss_info(**vars(get_loss_info(FitNet)))(distance)
    s,t,y,m = features('tokens'),features('tokens', 1),torch.tensor([1,-100,0,2]),mask_of('tokens')
    def value(rows, y, m):
        objective = Objective([Term(loss, 1., layers=[('s','t')], mask=lambda x, y: m)])
        objective.set_layout(None, -100)
        batch = objective.prepare(torch.zeros(len(y), 3), None, {'s': s[rows]}, {'t': t[rows]}, y,
                                  masks=objective.find_masks((s[rows],), (y,)))
        return objective.values(batch)['distance']
    torch.testing.assert_close(value([0,1,2,3], y, m), value([0,2,3], y[y>=0], m[y>=0]))
