"SkewKL: the divergence from a mixture of both networks"
ABOUT = dict(paper='Ko et al.: DistiLLM, ICML 2024 (arXiv 2402.03898)',
             math='T^2 KL(p || alpha p + (1-alpha) q), p of the teacher; reverse: p and q exchanged',
             reduction='sum over classes, mean over samples')
HPS = [dict(alpha=a, reverse=r, T=T)
       for a,r,T in ((.1,False,1.), (.1,True,1.), (0,False,2.), (.7,False,2.), (.7,True,2.))]

def reference(pred, teacher_pred, alpha, reverse, T):
    loss = 0.
    for s,t in zip(pred/T, teacher_pred/T):
        p,q = t.exp()/t.exp().sum(),s.exp()/s.exp().sum()
        if reverse: p,q = q,p
        loss = loss + sum(a*(a/(alpha*a+(1-alpha)*b)).log() for a,b in zip(p, q))
    return T**2*loss/len(pred)
