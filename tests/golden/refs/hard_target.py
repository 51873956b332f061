"HardTarget: the cross-entropy with the teacher's class"
ABOUT = dict(paper='Touvron et al.: Training data-efficient image transformers, ICML 2021 (arXiv 2012.12877)',
             math='-log softmax(s)_y with y = argmax t', reduction='mean over samples')
HPS = [{}]

def reference(pred, teacher_pred):
    loss = 0.
    for s,t in zip(pred, teacher_pred):
        p = s.exp()/s.exp().sum()
        loss = loss - p[t.argmax()].log()
    return loss/len(pred)
