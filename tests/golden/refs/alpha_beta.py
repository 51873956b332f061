"AlphaBeta: the published formula; where a parameter is 0, test_alpha_beta compares with the limit"
ABOUT = dict(paper='Wang et al.: ABKD, ICML 2025 (arXiv 2505.04560)',
             math='-T^2/(alpha beta) sum p^alpha q^beta - alpha/(alpha+beta) p^(alpha+beta) '
                  '- beta/(alpha+beta) q^(alpha+beta), p of the teacher',
             reduction='sum over classes, mean over samples')
HPS = [dict(alpha=a, beta=b, T=T) for a,b,T in ((.5,.5,1.), (1,1,1.), (.2,.7,1.), (2,.5,2.))]

def reference(pred, teacher_pred, alpha, beta, T):
    loss,total = 0.,alpha+beta
    for s,t in zip(pred/T, teacher_pred/T):
        for p,q in zip(t.exp()/t.exp().sum(), s.exp()/s.exp().sum()):
            loss = loss - (p**alpha*q**beta - alpha/total*p**total - beta/total*q**total)/(alpha*beta)
    return T**2*loss/len(pred)
