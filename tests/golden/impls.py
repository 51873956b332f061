"The package's losses under the names of the golden methods, for `check.py`: `f(pred, teacher_pred, fm_s, fm_t, target, **hp)`."
import re
from functools import partial
from torch import nn
import torch.nn.functional as F
from kd_fastai.losses.facts import loss_args
from kd_fastai.losses import *

def renamed(f, names): return lambda *args, **hp: f(*args, **{names.get(k, k): v for k,v in hp.items()})
def output(f, **names):   f = renamed(f, names); return lambda pred, teacher_pred, fm_s, fm_t, target, **hp: f(pred, teacher_pred, **hp)
def labelled(f, **names): f = renamed(f, names); return lambda pred, teacher_pred, fm_s, fm_t, target, **hp: f(pred, teacher_pred, target, **hp)
def feature(f, **names):  f = renamed(f, names); return lambda pred, teacher_pred, fm_s, fm_t, target, **hp: f(fm_s, fm_t, **hp)
def dense(f, **names):    f = renamed(f, names); return lambda pred, teacher_pred, fm_s, fm_t, target, **hp: f(fm_s, fm_t, target, **hp)
def both(f, **names):     f = renamed(f, names); return lambda pred, teacher_pred, fm_s, fm_t, target, **hp: f(pred, teacher_pred, fm_s, fm_t, **hp)

def weighted(f, weight): return lambda *args, loss_weight=weight, **hp: loss_weight*f(*args, **hp)
def levels(*names): return output(lambda *args, temperatures=(2.,3.,4.,5.,6.): MultiLevel(*args, T=tuple(temperatures), levels=names))
def ttm(weighted): return output(lambda *args, l=.25: TTM(*args, T=1/l, weighted=weighted))  # the authors' exponent is 1/T
def paper(f): return lambda *args, mode='paper', **hp: f(*args, **hp)                         # mode 'code' is only informative

OUTPUT = dict(
    soft_target=output(SoftTarget), logits=output(Logits), mutual=output(Mutual),
    decoupled_kd=labelled(DecoupledKD), nkd=labelled(NormalizedKD, temp='T'), dist=output(DIST, tau='T'),
    logit_std_kd=output(partial(standardize(SoftTarget), T=2.)), logit_std_dkd=labelled(partial(standardize(DecoupledKD), T=2.)),
    mlkd_instance=levels('instance'), mlkd_batch=levels('batch'), mlkd_class=levels('class'), mlkd_sum=levels('instance', 'batch', 'class'),
    wsld=labelled(weighted(WSLD, 2.5), tau='T'), ttm=ttm(False), wttm=ttm(True), mft=labelled(MFT, temperature='T'),
    skd_instance=output(paper(partial(StreamlinedKD, direction=0)), temperature='T'), skd_direction=output(paper(partial(StreamlinedKD, instance=0))),
)
# --- methods of 2023 to 2026, on predictions

def refined(*args, logit_stand=False, **hp): return (standardize(RefinedLogits) if logit_stand else RefinedLogits)(*args, **hp)
def entropy(*args, t=3., H_ub=None, student=True, **hp): return entropy_weighted(SoftTarget, t, H_ub, student)(*args, **hp)
def virtual(pred, teacher_pred, target, alpha=.1, multiplier=1., **hp):  # with its task loss
    return (1-alpha)*F.cross_entropy(pred, target) + alpha*multiplier*TfKD(pred, target, **hp)
def with_cost(f): return lambda *args, aux, **hp: f(*args, cost=aux['cost'], **hp)
def in_regions(loss, **names):
    "The case has features and linear classifiers; the loss reads class maps"
    def f(fm_s, fm_t, target, aux, scales=(1,2,4), **hp):
        def scores(fm, who): return {'maps': F.linear(fm['feat'].movedim(1,-1), aux[f'weight_{who}'], aux[f'bias_{who}']).movedim(-1,1)}
        return scale_decoupled(loss, tuple(scales))(scores(fm_s, 's'), scores(fm_t, 't'), target, **hp)
    return lambda pred, teacher_pred, *args, **hp: f(*args, **hp)

def views(f, **names):
    f = renamed(f, names)
    return lambda pred, teacher_pred, fm_s, fm_t, target, aux, **hp: f(pred, teacher_pred, aux['pred_strong'], aux['teacher_strong'], target, **hp)
def cross(pred, teacher_pred, pred_strong, teacher_strong, target, T=4., within=2., across=.5, tau_w=.9, tau_s=.2):
    "Cross-view consistency of the samples of which the teacher is sure (Zhang et al., 2024): two gated terms in training"
    def values(s, t): return SoftTarget.sample_values(s, t, T=T)
    sure_w,sure_s = (t.softmax(1).amax(1)>=tau for t,tau in ((teacher_pred,tau_w), (teacher_strong,tau_s)))
    same = values(pred, teacher_pred)+values(pred_strong, teacher_strong)
    crossed = values(pred_strong, teacher_pred)+values(pred, teacher_strong)
    return (within*sure_w*same + across*sure_s*crossed).mean()

def share_up_to_median(x): return (x<=x.quantile(.5)).to(x).mean()
def mlkd_as_published(pred, teacher_pred, pred_strong, teacher_strong, T=4., standardized=False):
    """The distillation part of the published training step of MultiLevel (Jin et al., 2023). It differs from the paper:
    masks of samples and classes multiply whole terms, and some temperatures of the strong view read the weak one"""
    p = teacher_pred.softmax(1)
    of_samples,of_classes = share_up_to_median(p.amax(1)),share_up_to_median(p.sum(0))
    instance = standardize(SoftTarget) if standardized else SoftTarget
    def at(temperatures, s, t): return sum(instance(s, t, T=tau) for tau in temperatures)
    all_T,strong_T,weak_T = (T,3.,5.,2.,6.),(T,3.,5.),(2.,6.)
    return (of_samples*(at(all_T, pred, teacher_pred) + MultiLevel(pred, teacher_pred, T=all_T, levels=('batch',)))
            + of_classes*MultiLevel(pred, teacher_pred, T=all_T, levels=('class',))
            + at(strong_T, pred_strong, teacher_strong) + at(weak_T, pred, teacher_pred))
def published(pred, teacher_pred, pred_strong, teacher_strong, target, ce_weight, kd_weight, **hp):  # with its task loss
    return (ce_weight*(F.cross_entropy(pred, target) + F.cross_entropy(pred_strong, target))
            + kd_weight*mlkd_as_published(pred, teacher_pred, pred_strong, teacher_strong, **hp))
WKD = dict(temperature='T', sinkhorn_lambda='lam', sinkhorn_iter='n')
OUTPUT |= dict(
    rld=labelled(refined, temperature='T', alpha_temperature='alpha_T'), norm_kd=output(standardize(SoftTarget, rescale=True), t_norm='T'),
    dtkd=output(DTKD), sld=labelled(SwappedLogits, temperatures='T', student_swap='student'), ldrld=output(LDRLD),
    wkd_logit=labelled(with_cost(partial(WassersteinKD, gamma=25.)), **WKD), wkd_logit_plain=labelled(with_cost(partial(WassersteinKD, gamma=1., separate=False)), **WKD),
    tvd=output(TotalVariation, temperature='T'), hinge=output(HingeRanking), logistic_ranking=output(LogisticRanking),
    tf_kd_reg=labelled(virtual, temperature='T'), ea_kd=output(partial(entropy, student=True)), er_kd=output(partial(entropy, student=False)),
    crld_parts=views(cross, wv_weight='within', cv_weight='across', temperature='T'), mlkd_two_views=views(published, temperature='T', logit_stand='standardized'),
    hard_target=output(HardTarget), jsd=output(JSD), skew_kl=output(SkewKL), alpha_beta=output(AlphaBeta), # refs/: loops of our own
    multi_label=output(MultiLabel), bounded_regression=labelled(BoundedRegression),
    sdd_kd=in_regions(SoftTarget), sdd_dkd=in_regions(DecoupledKD), sdd_nkd=in_regions(NormalizedKD),
)

FEATURE = dict(
    attention=feature(Attention), attention_pooled=feature(pool_to_smaller(Attention)), attention_paper=feature(AttentionNorm),
    activation_boundaries=feature(ActivationBoundaries), activation_boundaries_authors=feature(weighted(partial(weighted_sum_over_layers(ActivationBoundaries), m=1.), 3/1000), margin='m'),
    fitnet=feature(FitNet), similarity=feature(partial(Similarity, pred=None)), nst_poly=feature(pool_to_smaller(NST)), fsp=feature(FSP),
    factor_transfer=feature(FactorTransfer), factor_transfer_repdistiller=feature(partial(pool_to_smaller(FactorTransfer), p1=2)),
    cwd=feature(weighted(CWD, 1.), tau='T'), pkd=feature(weighted(PKD, 1.)), cat_kd=feature(CATKD, cam_resolution='r'), hcl=feature(HCL),
    kta=feature(KTA), affinity=feature(Affinity), ofd_batch_margin=feature(PartialL2),
    ofd_partial_l2=feature(lambda fm_s, fm_t, aux: len([*fm_t.values()][0])*weighted_sum_over_layers(PartialL2)(fm_s, fm_t, margin={n: aux[f'margin_{n}'] for n in fm_t})),  # a sum over the batch
    srd=both(partial(SRD, alpha=1.), exponent='alpha', temperature='T'),
)
SEGMENTATION_AND_TOKENS = dict(
    cirkd_minibatch=feature(CIRKD, temperature='T'), ifvd=dense(IFVD),
    skd_pairwise_authors=feature(PairwiseKD), skd_pairwise=feature(partial(PairwiseKD, window=2, constant_norm=False)),
    token_relation_kl=feature(TokenRelationKL, temperature='T'),
    minilmv2=feature(lambda fm_s, fm_t, aux={}, **hp: MiniLMv2(fm_s, fm_t, mask=aux.get('attention_mask'), **hp), num_relation_heads='heads'),
    cosine_smooth_l1=feature(lambda fm_s, fm_t, **hp: CosineSmoothL1(fm_s, fm_t, **hp)/len(fm_s), lam_cos='cosine', lam_sl1='smooth_l1'),  # a mean over layers
)
FEATURE.update(SEGMENTATION_AND_TOKENS)
FEATURE |= dict(wkd_feature=feature(GaussianWasserstein, grid='g', mean_cov_ratio='r'))  # with the logits' wkd above
RELATION = dict(
    pkt=feature(PKT), rkd=feature(RKD, w_d='distance', w_a='angle'), rkd_l2norm=feature(unit_length(RKD), w_d='distance', w_a='angle'),
    rkd_distance=feature(partial(RKD, distance=1., angle=0.)), rkd_angle=feature(partial(RKD, distance=0., angle=1.)),
    cc_taylor=feature(CorrelationCongruence, P_order='P'),
    cc_gaussian_torchdistill=feature(partial(CorrelationCongruence, normalize=False, squared=False), max_p='P'),
    cc_bilinear=feature(partial(CorrelationCongruence, kernel='bilinear', normalize=False, squared=False)),
    ickd=feature(ICKD), dark_rank=feature(DarkRank), irg=both(IRG, w_irg_vert='vert', w_irg_edge='edge', w_irg_tran='tran'),
)

class Owned:
    "A loss with the case's weights. `names` are patterns of the names that its `state` gives them, and what they are called here; `given` is what `build` gets in addition to features"
    def __init__(self, make, names={}, given=lambda **case: {}): self.make,self.names,self.given = make,names,given

    def name(self, key):
        "What a weight of the case is called here, if it is here"
        for old,new in self.names.items(): key = re.sub(f'^{old}', new, key)
        return key

    def build(self, fm_s, fm_t, state={}, aux={}, pred=None, teacher_pred=None, target=None, **hp):
        case = dict(fm_s=fm_s, fm_t=fm_t, pred=pred, teacher_pred=teacher_pred)
        loss = self.make(**hp).build(**{**case, **self.given(state=state, aux=aux, **case)})
        known = loss.state_dict()
        loss.load_state_dict({**known, **{n: v for k,v in state.items() if (n := self.name(k)) in known}})
        return loss

    def call(self, loss, **case): return loss(**loss_args(loss).select({k: v for k,v in case.items() if v is not None}))

    def __call__(self, pred, teacher_pred, fm_s, fm_t, target, **kw):
        case = dict(pred=pred, teacher_pred=teacher_pred, fm_s=fm_s, fm_t=fm_t, target=target)
        return self.call(self.build(**case, **kw), **case)

class PAD(Owned):
    "The case gives the logarithms of the variances, which a branch makes otherwise"
    def build(self, aux, **kw):
        loss = super().build(**kw)
        loss.branches[0].eval().register_forward_hook(lambda module, inp, out: aux['log_variance'].view_as(out))
        return loss

class Summed(Owned):
    "The authors sum over a batch"
    def call(self, loss, **case): return len(next(iter(case['fm_t'].values())))*super().call(loss, **case)

def norms(fm_t, aux, **case):
    "A teacher whose layers are the case's batch norms"
    def norm(w, b): res = nn.BatchNorm2d(len(w)).to(w); res.load_state_dict({**res.state_dict(), 'weight': w, 'bias': b}); return res
    return dict(teacher=nn.ModuleDict({n: norm(aux[f'bn_weight_{n}'], aux[f'bn_bias_{n}']) for n in fm_t}))

def headed(fm_t, teacher_pred=None, **case):
    "A teacher that ends in a classifier, with what it makes of the feature"
    t = next(iter(fm_t.values())).detach()
    teacher = nn.Sequential(nn.Linear(t.shape[1], 2 if teacher_pred is None else teacher_pred.shape[1])).to(t)
    return dict(teacher=teacher, teacher_pred=teacher(t if t.ndim==2 else t.mean((2,3))).detach())

class Masked(Owned):
    "The case gives the mask, and weighs a sum over the elements of a sample, by `alpha` if it does not say"
    def __init__(self, make, alpha): super().__init__(make, {r'(align|generation)\.': r'\1.0.'}); self.default = alpha
    def build(self, aux, alpha_mgd=None, **kw):
        loss = super().build(**kw)
        loss.draw,self.alpha = (lambda t: aux['mask']),self.default if alpha_mgd is None else alpha_mgd
        return loss
    def call(self, loss, fm_t, **case): return self.alpha*next(iter(fm_t.values()))[0].numel()*super().call(loss, fm_t=fm_t, **case)

class Banked(Owned):
    "The case gives the samples' positions and what is drawn"
    def build(self, aux, **kw):
        loss = super().build(**kw)
        loss.draw,self.idx = (lambda idx: aux['contrast_idx']),aux['idx']
        return loss
    def call(self, loss, **case): return super().call(loss, idx=self.idx, **case)

class Queued(Owned):
    "The case gives the queue, and says whether the batch is put in front of it"
    def build(self, aux, update=True, **kw):
        loss = super().build(**kw)
        for pair in loss.pairs: pair.queue = aux['queue'].clone()
        return loss.train(update)

class Sized(Owned):
    "Sizes of the case's weights are parameters of the loss: `sizes` reads them from the weights"
    def __init__(self, make, names, sizes): super().__init__(make, names); self.sizes = sizes
    def build(self, state, **kw):
        sized = Owned(partial(self.make, **self.sizes(state)), self.names)
        return sized.build(state=state, **kw)

class Tokens(Owned):
    "The case has two first layers in one tensor, gives the mask, and weighs sums over the elements of a sample"
    def layers(self, fm): return {'low0': fm['low'][:,0], 'low1': fm['low'][:,1], 'high': fm['high']}
    def build(self, fm_s, fm_t, aux, alpha_vitkd=3e-5, beta_vitkd=3e-6, lambda_vitkd=.5, **kw):
        size = fm_t['high'][0].numel()
        make = partial(self.make, low=alpha_vitkd*size, high=beta_vitkd*size, ratio=lambda_vitkd)
        loss = Owned(make, self.names).build(fm_s=self.layers(fm_s), fm_t=self.layers(fm_t), aux=aux, **kw)
        loss.draw = lambda t: aux['mask'].bool().view(len(t), 1, *t.shape[2:])
        return loss
    def call(self, loss, fm_s, fm_t, **case): return super().call(loss, fm_s=self.layers(fm_s), fm_t=self.layers(fm_t), **case)

HEADS = {r'embed_s\.': 'pairs.0.heads.student.', r'embed_t\.': 'pairs.0.heads.teacher.'}
TRAINABLE = dict(
    fitnet_regressor=Owned(FitNetRegressor, {'conv': 'regressors.0.0', 'bn': 'regressors.0.1'}),
    vid=Owned(renamed(VID, dict(mid_channels='dim')), {'regressor': 'regressors.0', 'log_scale': 'log_scales.0'}), pad_l2=PAD(PADL2), reviewkd=Owned(ReviewKD),
    ofd_connector=Owned(partial(OFD, margin='batch'), {'connector': 'connectors.0'}, lambda **case: dict(teacher=None)),
    ofd_authors=Summed(partial(OFD, distance=weighted_sum_over_layers(PartialL2)), {'Connectors': 'connectors'}, norms),
    srrl=Owned(SRRL, {r'srrl\.': '', 'cls_t': 'classifier.0'}, headed), simkd=Owned(SimKD, given=headed),
    mgd=Masked(MGD, 2e-5), mgd_channel=Masked(partial(MGD, 'channel'), 7e-5),
    semckd=Owned(renamed(SemCKD, dict(soft='T')), {r'(query|key)_(\d)\.linear1': r'\1.\2.0', r'(query|key)_(\d)\.linear2': r'\1.\2.2',
                          r'regressor(\d)(\d)\.regressor': r'project.\1_\2'}),
    itrd_corr=Owned(renamed(partial(ITRD, corr=1, mutual=0), dict(alpha_it='alpha')), {r'embed\.linear': 'embed.0'}),
    itrd_mutual=Owned(renamed(partial(ITRD, corr=0, mutual=1), dict(alpha_it='alpha')), {r'embed\.linear': 'embed.0'}),
    ickd_embed=Owned(ICKDEmbed, {r'embed_s\.conv2d': 'embed.0.0', r'embed_s\.l2norm': 'embed.0.1'}),
    afd_zoo=Owned(renamed(AFD, dict(att_f='factor')), {'attention': 'attention.0'}),
    crd=Banked(renamed(CRDBank, dict(feat_dim='dim', nce_k='K', nce_t='T', nce_m='momentum')), {r'embed_s\.linear': 'pairs.0.heads.student', r'embed_t\.linear': 'pairs.0.heads.teacher', r'contrast\.memory_v1': 'pairs.0.bank_s',
                         r'contrast\.memory_v2': 'pairs.0.bank_t'}),
    pefd=Owned(PEFD, {rf'proj{i}\.linear': f'projectors.0.{i-1}' for i in (1,2,3)}),
    vitkd=Tokens(ViTKD, {r'align2\.': 'align.', r'align\.(weight|bias)': r'align.2.\1'}),
    ofa=Owned(renamed(OFA, dict(temperature='T'))),
    dcd=Sized(DCD, {**HEADS, r'params\.tau': 'pairs.0.tau'}, lambda state: dict(dim=len(state['embed_s.weight']))),
    rrd=Sized(renamed(RRD, dict(nce_t_s='T_s', nce_t_t='T_t')), {**HEADS, 'queue_ptr': 'pairs.0.position', 'queue$': 'pairs.0.queue'},
              lambda state: dict(dim=len(state['embed_s.weight']), n_queue=len(state['queue']))),
    queue_kl=Queued(renamed(partial(QueueKL, project=False), dict(temperature='T'))),
)
IMPLS = {**OUTPUT, **FEATURE, **RELATION, **TRAINABLE}

NO_CASES = dict(  # public losses that no golden method covers: name, and what checks them instead
    CRD='a softmax over batch and queue, not the noise contrast of the authors: test_crd_is_a_softmax_over_batch_and_queue',
    CTKD='its value is that of the loss inside: test_temperature computes the gradient of the temperature by hand')
