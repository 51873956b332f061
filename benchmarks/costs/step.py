"""What one step of distillation costs, compared with a loop written by hand, fastai without a teacher, and two
packages from PyPI.

    python benchmarks/cost.py step [--rounds 40]

All methods take turns in one process, on the same batch, with torch's SGD; numbers are medians over the rounds, ratios
are taken round by round, with quartiles."""
import argparse, logging, warnings
from copy import deepcopy
from functools import partial
warnings.filterwarnings('ignore')
import torch, torch.nn.functional as F
from torchvision.models import resnet18
from fastai.basics import (Callback, CrossEntropyLossFlat, DataLoader, DataLoaders, Learner, OptimWrapper, noop,
                           set_seed, tensor)
from fastai.callback.progress import ProgressCallback
from kd_fastai.all import Attention, CachedTeacher, KnowledgeDistillationCallback, SoftTarget, Term
from kd_fastai.demo import small_net
from nets import stages
from clock import ms, peak_mib, ratio, saved_mib, take_turns, target, write
try:
    from fasterai.distill.all import KnowledgeDistillationCallback as FasteraiCallback, SoftTarget as FasteraiSoftTarget
except ImportError: FasteraiCallback = None
try: from torchdistill.core.distillation import DistillationBox
except ImportError: DistillationBox = None
logging.disable(logging.INFO)

def on_images(n, pixels):
    "A resnet18 teaches a network of four stages, on `n` images"
    return resnet18(num_classes=100).eval(),stages(16),torch.randn(n,3,pixels,pixels),torch.randint(100, (n,))
def large():
    "32 images of 96x96"
    return on_images(32, 96)
def medium():
    "64 images of 32x32"
    return on_images(64, 32)
def tiny():
    "The demo's networks, 64 images of 8x8: here it is the overhead that counts"
    return small_net(8).eval(),small_net(4),torch.randn(64,1,8,8),torch.randint(10, (64,))

class _Same(torch.utils.data.Dataset):
    def __init__(self, x, y): self.x,self.y = x,y
    def __len__(self): return len(self.x)
    def __getitem__(self, i): return self.x[i],self.y[i]

class _Whole(DataLoader):
    "Batches by one look-up, so that reading costs next to nothing"
    def create_batches(self, samples):
        for b in self.chunkify(samples): yield self.dataset[[*b]]

def fastai_step(student, x, y, cbs=()):
    "One batch of a Learner that is in the second epoch of a fit"
    dl = _Whole(_Same(x, y), bs=len(x))
    learn = Learner(DataLoaders(dl, dl), deepcopy(student), loss_func=CrossEntropyLossFlat(),
                    opt_func=partial(OptimWrapper, opt=torch.optim.SGD), lr=1e-3, cbs=cbs)
    learn.remove_cb(ProgressCallback)
    learn.logger = noop
    learn.create_opt(); learn.opt.set_hyper('lr', 1e-3)
    learn.n_epoch,learn.epoch,learn.n_iter,learn.loss = 1,0,1,tensor(0.)
    learn.dl = learn.dls.train
    def step():
        for b in learn.dl: learn.one_batch(0, b)
    learn('before_fit'); learn('before_epoch'); learn('before_train')
    step()
    learn('after_train'); learn('before_train')
    return step

def by_hand(teacher, student, x, y):
    student = deepcopy(student).train()
    opt = torch.optim.SGD(student.parameters(), 1e-3)
    def step():
        pred = student(x)
        with torch.no_grad(): teacher_pred = teacher(x)
        loss = F.cross_entropy(pred, y)+0.5*SoftTarget(pred, teacher_pred)
        loss.backward(); opt.step(); opt.zero_grad()
    return step

def torchdistill_box(teacher, student, x, y):
    def ends(who): return {'forward_proc': 'forward_batch_only', 'requires_grad': who=='student'}
    kd = dict(key='KDLoss', kwargs=dict(student_module_path='.', student_module_io='output', teacher_module_path='.',
                                        teacher_module_io='output', temperature=5., alpha=0.5))
    config = dict(num_epochs=1, teacher=ends('teacher'), student=ends('student'),
                  optimizer=dict(key='SGD', kwargs=dict(lr=1e-3)),
                  criterion=dict(key='WeightedSumLoss', kwargs=dict(sub_terms=dict(kd=dict(criterion=kd, weight=1.)))))
    box = DistillationBox(deepcopy(teacher), deepcopy(student), {}, config, torch.get_default_device(), None, False, 1.)
    box.teacher_model.eval(); box.student_model.train()
    return lambda: box.post_forward_process(box.forward_process(x, y))

def teacher_and_loss(teacher, student, x, y):
    "What no method can save: the teacher's forward, and the loss with its backward to the student's logits"
    pred = student(x).detach().requires_grad_()
    def step():
        with torch.no_grad(): teacher_pred = teacher(x)
        SoftTarget(pred, teacher_pred).backward(); pred.grad = None
    return step

class Constant(Callback):
    "The same loss with predictions of a teacher that cost nothing"
    order = 5
    def __init__(self, pred): self.p = pred
    def after_loss(self):
        self.learn.loss_grad = self.learn.loss_grad+0.5*SoftTarget(self.pred, self.p)
        self.learn.loss = self.learn.loss_grad.detach().clone()

def methods(teacher, student, x, y):
    def kd(t): return [KnowledgeDistillationCallback(t, SoftTarget, weight=0.5)]
    with torch.no_grad(): pred = teacher(x)
    res = {'by hand': by_hand(teacher, student, x, y), 'fastai, no teacher': fastai_step(student, x, y),
           'teacher and loss': teacher_and_loss(teacher, student, x, y),
           'kd_fastai': fastai_step(student, x, y, kd(teacher)),
           'kd_fastai, cached': fastai_step(student, x, y, kd(CachedTeacher(teacher))),
           'fastai, constant predictions': fastai_step(student, x, y, [Constant(pred)])}
    if FasteraiCallback:
        res['fasterai'] = fastai_step(student, x, y, [FasteraiCallback(deepcopy(teacher), FasteraiSoftTarget)])
    if DistillationBox:  res['torchdistill'] = torchdistill_box(teacher, student, x, y)
    return res

def measure(size, rounds):
    "Rows of the table, what targets need, for one size"
    set_seed(0)
    teacher,student,x,y = size()
    fs = methods(teacher, student, x, y)
    times = take_turns(fs, rounds)
    known = [x, y, *teacher.parameters(), *teacher.buffers(), *student.parameters()]
    rows,saved = [],{}
    for n,f in fs.items():
        mid,low,high = ratio(times, n, 'by hand')
        saved[n] = saved_mib(f, known)
        rows.append({'size': size.__name__, 'method': n, 'ms': ms(times[n]), 'to by hand': mid, 'quartile 1': low,
                     'quartile 3': high, 'MiB saved for backward': saved[n], 'MiB at most': peak_mib(f)})
    return rows,times,saved

def up_to_layer(teacher, student, x, y, i):
    "A step by hand that compares one layer; the teacher is cut after it"
    names = [n for n,_ in teacher.named_children()]
    teacher = torch.nn.Sequential(*[*teacher.children()][:names.index(f'layer{i}')+1])
    student = deepcopy(student).train()
    opt = torch.optim.SGD(student.parameters(), 1e-3)
    def step():
        feature = student[:i+1](x)
        with torch.no_grad(): seen = teacher(x)
        loss = F.cross_entropy(student[i+1:](feature), y)+Attention({'a': feature}, {'a': seen})
        loss.backward(); opt.step(); opt.zero_grad()
    return step

def early_exit(rounds):
    """Rows for features of one layer, with the exit and without. The student is narrow: the smaller it is, the more
    of a step is the teacher's"""
    set_seed(0)
    teacher,_,x,y = large()
    student,layers = stages(8),(1,2,3)
    def step(i, exit):
        kd = KnowledgeDistillationCallback(teacher, Term(Attention, 1.), [(str(i), f'layer{i}')], early_exit=exit)
        return fastai_step(student, x, y, [kd])
    methods = {(i,e): step(i, e) for i in layers for e in (True,False)}
    methods |= {(i,'by hand'): up_to_layer(teacher, student, x, y, i) for i in layers}
    times,rows,targets = take_turns(methods, rounds),[],[]
    for i in layers:
        mid,low,high = ratio(times, (i,True), (i,False))
        rows.append({'layer': f'layer{i}', 'ms to its end': ms(times[i,False]), 'ms with exit': ms(times[i,True]),
                     'ms by hand': ms(times[i,'by hand']), 'ratio': mid, 'quartile 1': low, 'quartile 3': high})
        targets.append(target(f'early exit at layer{i}, to a teacher that is cut there by hand',
                              ratio(times, (i,True), (i,'by hand')), 1.05))
    return rows,targets

def main(rounds=40):
    "Measure, write the tables, and give the targets"
    rows,T = [],[]
    for size,n in ((large, rounds//2), (medium, rounds), (tiny, 10*rounds)):
        r,times,saved = measure(size, max(n, 4))
        rows += r
        if size is large:
            T += [target('large: kd_fastai to by hand', ratio(times, 'kd_fastai', 'by hand'), 1.01),
                  target('large: bytes saved for backward, to fastai without a teacher',
                         saved['kd_fastai']/saved['fastai, no teacher'], 1.02),
                  target('large: cached to constant predictions',
                         ratio(times, 'kd_fastai, cached', 'fastai, constant predictions'), 1.05)]
        if FasteraiCallback: T.append(
            target(f'{size.__name__}: kd_fastai to fasterai', ratio(times, 'kd_fastai', 'fasterai'), 1.))
    write('step', rows,
          'One step, all methods taking turns: medians, and ratios to the loop written by hand with their quartiles.')
    exits,targets = early_exit(max(rounds//2, 4))
    write('early_exit', exits, 'A step that looks at one layer of a resnet18: the teacher runs to its end, stops after '
                               'the layer, or is cut there by hand. `ratio` is with exit to its end.')
    return T+targets

if __name__=='__main__':
    p = argparse.ArgumentParser(description=__doc__.split('\n\n')[0]); p.add_argument('--rounds', type=int, default=40)
    torch.set_num_threads(1)
    main(p.parse_args().rounds)
