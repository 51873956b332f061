"The package's losses under the names of the golden methods, for `check.py`: `f(pred, teacher_pred, fm_s, fm_t, target, **hp)`."
from functools import partial
from kd_fastai.losses import *

def renamed(f, names): return lambda *args, **hp: f(*args, **{names.get(k, k): v for k,v in hp.items()})
def output(f, **names):   f = renamed(f, names); return lambda pred, teacher_pred, fm_s, fm_t, target, **hp: f(pred, teacher_pred, **hp)
def labelled(f, **names): f = renamed(f, names); return lambda pred, teacher_pred, fm_s, fm_t, target, **hp: f(pred, teacher_pred, target, **hp)
def feature(f, **names):  f = renamed(f, names); return lambda pred, teacher_pred, fm_s, fm_t, target, **hp: f(fm_s, fm_t, **hp)
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
FEATURE = dict(
    attention=feature(Attention), attention_pooled=feature(pooled(Attention)), attention_paper=feature(AttentionNorm),
    activation_boundaries=feature(ActivationBoundaries), activation_boundaries_authors=feature(weighted(partial(halving(ActivationBoundaries), m=1.), 3/1000), margin='m'),
    fitnet=feature(FitNet), similarity=feature(partial(Similarity, pred=None)), nst_poly=feature(pooled(NST)), fsp=feature(FSP),
    factor_transfer=feature(FactorTransfer), factor_transfer_repdistiller=feature(partial(pooled(FactorTransfer), p1=2)),
    cwd=feature(weighted(CWD, 1.), tau='T'), pkd=feature(weighted(PKD, 1.)), cat_kd=feature(CATKD, cam_resolution='r'), hcl=feature(HCL),
    kta=feature(KTA), affinity=feature(Affinity), ofd_batch_margin=feature(PartialL2),
    ofd_partial_l2=feature(lambda fm_s, fm_t, aux: len([*fm_t.values()][0])*halving(PartialL2)(fm_s, fm_t, margin={n: aux[f'margin_{n}'] for n in fm_t})),  # a sum over the batch
    srd=both(partial(SRD, alpha=1.), exponent='alpha', temperature='T'),
)
RELATION = dict(
    pkt=feature(PKT), rkd=feature(RKD, w_d='distance', w_a='angle'), rkd_l2norm=feature(normalized(RKD), w_d='distance', w_a='angle'),
    rkd_distance=feature(partial(RKD, distance=1., angle=0.)), rkd_angle=feature(partial(RKD, distance=0., angle=1.)),
    cc_taylor=feature(CorrelationCongruence, P_order='P'),
    cc_gaussian_torchdistill=feature(partial(CorrelationCongruence, normalize=False, squared=False), max_p='P'),
    cc_bilinear=feature(partial(CorrelationCongruence, kernel='bilinear', normalize=False, squared=False)),
    ickd=feature(ICKD), dark_rank=feature(DarkRank), irg=both(IRG, w_irg_vert='vert', w_irg_edge='edge', w_irg_tran='tran'),
)
IMPLS = {**OUTPUT, **FEATURE, **RELATION}
