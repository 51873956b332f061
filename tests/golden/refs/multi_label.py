"MultiLabel: the divergence of binary probabilities"
ABOUT = dict(paper='Yang et al.: Multi-Label Knowledge Distillation, ICCV 2023 (arXiv 2308.06453)',
             math='T^2 KL([sigmoid(t/T), 1-sigmoid(t/T)] || [sigmoid(s/T), 1-sigmoid(s/T)])',
             reduction='mean over all elements')
HPS = [dict(T=1.), dict(T=2.)]

def reference(pred, teacher_pred, T):
    loss = 0.
    for s,t in zip(pred.flatten()/T, teacher_pred.flatten()/T):
        p,q = 1/(1+(-t).exp()),1/(1+(-s).exp())
        loss = loss + p*(p/q).log() + (1-p)*((1-p)/(1-q)).log()
    return T**2*loss/pred.numel()
