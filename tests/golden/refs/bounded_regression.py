"BoundedRegression: the squared error of samples on which the student is worse than the teacher"
ABOUT = dict(paper='Chen et al.: Learning Efficient Object Detection Models with Knowledge Distillation, NIPS 2017',
             math='|s-y|^2 if |s-y|^2 + m > |t-y|^2, else 0', reduction='sum over outputs, mean over samples')
HPS = [dict(m=0.), dict(m=5.)]

def prepare(inputs, rng): return {**inputs, 'target': rng.standard_normal(inputs['pred'].shape).astype('float32')}

def reference(pred, teacher_pred, target, m):
    loss = 0.*pred.sum()
    for s,t,y in zip(pred, teacher_pred, target):
        error_s,error_t = ((x-y).pow(2).sum() for x in (s,t))
        if error_s+m>error_t: loss = loss + error_s
    return loss/len(pred)
