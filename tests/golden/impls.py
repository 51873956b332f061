"The package's losses under the names of the golden methods, for `check.py`: `f(pred, teacher_pred, fm_s, fm_t, target, **hp)`."
from functools import partial
from kd_fastai.losses import *

def output(f):  return lambda pred, teacher_pred, fm_s, fm_t, target, **hp: f(pred, teacher_pred, **hp)
def feature(f): return lambda pred, teacher_pred, fm_s, fm_t, target, **hp: f(fm_s, fm_t, **hp)

IMPLS = dict(
    soft_target=output(SoftTarget), logits=output(Logits), mutual=output(Mutual),
    attention=feature(Attention), activation_boundaries=feature(ActivationBoundaries), fitnet=feature(FitNet),
    similarity=feature(partial(Similarity, pred=None)), pkt=feature(PKT),
    rkd_distance=feature(partial(RKD, distance=1., angle=0.)), rkd_angle=feature(partial(RKD, distance=0., angle=1.)),
    rkd=feature(lambda fm_s, fm_t, w_d, w_a: RKD(fm_s, fm_t, distance=w_d, angle=w_a)),
)
