"JSD: the generalized Jensen-Shannon divergence; at beta 0 and 1 its limits, the forward and the reverse divergence"
ABOUT = dict(paper='Agarwal et al.: On-Policy Distillation of Language Models, ICLR 2024 (arXiv 2306.13649)',
             math='T^2 (beta KL(p||m) + (1-beta) KL(q||m)), m = beta p + (1-beta) q, p of the teacher; '
                  'beta 0: KL(p||q), 1: KL(q||p)',
             reduction='sum over classes, mean over samples')
HPS = [dict(beta=b, T=T) for b,T in ((.5,1.), (.1,3.), (.9,3.), (0,2.), (1,2.))]

def kl(p, q): return sum(a*(a/b).log() for a,b in zip(p, q))

def reference(pred, teacher_pred, beta, T):
    loss = 0.
    for s,t in zip(pred/T, teacher_pred/T):
        p,q = t.exp()/t.exp().sum(),s.exp()/s.exp().sum()
        m = beta*p + (1-beta)*q
        if beta==0: loss = loss + kl(p, q)
        elif beta==1: loss = loss + kl(q, p)
        else: loss = loss + beta*kl(p, m) + (1-beta)*kl(q, m)
    return T**2*loss/len(pred)
