"""Losses of other libraries, by their code, with the weights of their defaults or their documentation.

A library that is not installed is left out."""
from functools import partial
import torch
from torch import nn
from kd_fastai.callback import Term

def peers(
    maps:list=() # Layers of losses on features, which are left out without any
)->dict: # Name to a function that returns terms and the weight of the task loss
    "Methods of the libraries that are installed"
    of_predictions,of_maps = {},{}
    try: import fasterai.distill.losses as fasterai
    except ImportError: fasterai = None
    try: import torchdistill.losses.mid_level as torchdistill
    except ImportError: torchdistill = None
    try: from timm.task.distillation import LogitDistillationTask as timm_task
    except ImportError: timm_task = None
    if fasterai:  # its callback takes the mean of the task loss and the term
        def half(loss, **kwargs): return lambda: ([Term(loss, weight=0.5, **kwargs)], 0.5)
        of_predictions |= {'fasterai SoftTarget': half(fasterai.SoftTarget),
                           'fasterai DecoupledKD': half(fasterai.DecoupledKD)}
        of_maps |= {'fasterai Attention': half(fasterai.Attention, layers=maps)}
    if torchdistill:
        of_predictions['torchdistill KDLoss'] = whole(partial(torchdistill_kd, torchdistill))
        of_maps['torchdistill ATLoss'] = lambda: (
            [Term(torchdistill_at(torchdistill, maps), weight=1000., name='at', layers=maps)], 1.)
    if timm_task:
        of_predictions |= {'timm LogitDistillationTask': whole(partial(timm_kd, timm_task)),
            'timm LogitDistillationTask, T=4, 0.3': whole(partial(timm_kd, timm_task, temperature=4.,
                                                                  task_loss_weight=0.3))}
    return of_predictions | (of_maps if maps else {})

def whole(make):
    "A method whose loss includes the cross-entropy"
    return lambda: ([Term(make(), weight=1., name='kd')], 0.)

def torchdistill_kd(mid_level):
    "torchdistill's loss for CIFAR-100, which includes the cross-entropy"
    loss = mid_level.KDLoss('a', 'output', 'a', 'output', temperature=4., alpha=0.9)
    def kd(pred, teacher_pred, target):
        return loss({'a': {'output': pred}}, {'a': {'output': teacher_pred}}, target)
    return kd

def torchdistill_at(mid_level, maps):
    "torchdistill's loss for ImageNet"
    pairs = {n: dict(teacher=dict(io='output', path=n), student=dict(io='output', path=n), factor=1)
             for n in maps}
    loss = mid_level.ATLoss(pairs, mode='code')
    def at(fm_s, fm_t):
        return loss({n: {'output': f} for n,f in fm_s.items()}, {n: {'output': f} for n,f in fm_t.items()})
    return at

class Given(nn.Module):
    "A network of a timm task that returns the predictions it was given"
    pretrained_cfg,num_classes,in_chans = dict(mean=(0.,)*3, std=(1.,)*3),0,3
    pred = None
    def forward(self, x): return self.pred

def timm_kd(task, **kwargs):
    "timm's task, at its defaults or with the arguments of its documentation, which includes the cross-entropy"
    student,teacher = Given(),Given()
    made = task(student, teacher, criterion=nn.CrossEntropyLoss(), device=torch.device('cpu'), verbose=False, **kwargs)
    def kd(pred, teacher_pred, target):
        student.pred,teacher.pred = pred,teacher_pred
        return made(pred, target)['loss']
    return kd
