"Label-free pretraining: what it trains, and what it leaves as it was"
from copy import deepcopy
import pytest, torch
from torch import nn
from fastai.basics import Callback, DataLoader
from fastai.callback.mixup import MixUp
from kd_fastai.demo import digits, small_net
from kd_fastai.methods.pretrain import Embedding, has_classifier
from support import fit, hooks, learner, same, state, trained_teacher, weights

@pytest.fixture(scope='module')
def teacher(): return trained_teacher(8, 2)

def distance(student, teacher, x):
    "Mean squared error of the best linear map from the student's features to the teacher's"
    with torch.no_grad(): s,t = student[:-1].eval()(x),teacher[:-1].eval()(x)
    s = torch.cat([s, torch.ones(len(s),1)], 1)
    return (s@torch.linalg.lstsq(s, t).solution-t).pow(2).mean()

def test_body_learns_the_features_and_the_classifier_stays(teacher):
    learn = learner(width=4)
    x,before = learn.dls.valid.one_batch()[0],deepcopy(learn.model)
    learn.kd_pretrain(teacher, 5, 1e-2)
    assert distance(learn.model, teacher, x)<.8*distance(before, teacher, x)
    assert torch.equal(learn.model[-1].weight, before[-1].weight) and torch.equal(learn.model[-1].bias, before[-1].bias)

@pytest.mark.parametrize('trained', [False,True])
def test_the_learner_is_as_before(teacher, trained):
    learn = learner(width=4)
    if trained: fit(learn)
    learn.freeze()
    frozen,before,opt = [p.requires_grad for p in learn.model.parameters()],state(learn),learn.opt
    learn.kd_pretrain(teacher, 1)
    after = state(learn)
    assert not same(before.pop('model'), after.pop('model')) and same(before, after) and learn.opt is opt
    assert [p.requires_grad for p in learn.model.parameters()]==frozen and not hooks(learn.model, teacher)

def test_frozen_layers_are_trained_too(teacher):
    learn = learner(width=4)
    for p in learn.model[0].parameters(): p.requires_grad_(False)
    before = weights(learn.model[0])
    learn.kd_pretrain(teacher, 1)
    assert not torch.equal(weights(learn.model[0]), before) and not learn.model[0][0].weight.requires_grad

def test_labels_are_not_used(teacher):
    def pretrained(shift):
        dls = digits(100)
        x,y = dls.train_ds.tensors
        dls.train_ds.tensors = x,(y+shift)%10
        return weights(learner(dls=dls, width=4).kd_pretrain(teacher, 1))
    assert torch.equal(pretrained(0), pretrained(1))

def test_samples_without_labels_and_mixup(teacher):
    learn = learner(width=4)
    dl = DataLoader([(x,) for x,_ in digits(100).train_ds], bs=20, num_workers=0)
    plain,mixed = (weights(deepcopy(learn).kd_pretrain(teacher, 1, dls=dl, cbs=cbs)) for cbs in (None, MixUp()))
    assert mixed.isfinite().all() and not torch.equal(plain, mixed)

@pytest.mark.parametrize('body', [lambda t: t[:-1], lambda t: t[:-3]])
def test_teacher_without_a_classifier(teacher, body):
    learn = learner(width=4)
    x,before = learn.dls.valid.one_batch()[0],deepcopy(learn.model)
    learn.kd_pretrain(body(teacher), 5, 1e-2)
    assert distance(learn.model, teacher, x)<.8*distance(before, teacher, x)

def test_teacher_of_other_classes_and_a_learner():
    other = learner(model=nn.Sequential(*small_net(8)[:-1], nn.Linear(32,3)))
    learn = learner(width=4)
    before = weights(learn)
    learn.kd_pretrain(other.model, 1)
    assert not torch.equal(weights(learn), before)
    fit(learn)

class Stop(Callback):
    def after_batch(self): raise KeyboardInterrupt

def test_an_interrupt_leaves_nothing(teacher):
    learn = learner(width=4)
    before = state(learn)
    with pytest.raises(KeyboardInterrupt): learn.kd_pretrain(teacher, 1, cbs=Stop())
    after = state(learn)
    before.pop('model'), after.pop('model')
    assert same(before, after) and not hooks(learn.model, teacher)

def test_the_time_is_printed_beforehand(teacher, capsys):
    learn = learner(width=4)
    learn.logger = print
    with learn.no_bar(): learn.kd_pretrain(teacher, 2)
    said,*rest = capsys.readouterr().out.split('\n')
    assert said.startswith('2 epochs of 5 batches, about ') and rest
    with learn.no_logging(): learn.kd_pretrain(teacher, 1)
    assert not capsys.readouterr().out

def test_token_outputs_and_layers_that_are_not_the_last(teacher):
    assert Embedding(nn.Linear(4,8))(torch.zeros(2,5,4)).shape==(2,8)
    assert not has_classifier(nn.Sequential(nn.Flatten(), nn.Linear(64,8), nn.ReLU()), torch.randn(2,1,8,8))
    learn = learner(width=4)
    with pytest.raises(ValueError, match='no layer|No layer'): learn.kd_pretrain(teacher, 1, layers=[('>','pooling')])

class Table(Callback):
    def after_fit(self): self.names,self.values = self.recorder.metric_names,self.recorder.log

def test_the_table_has_a_value_for_each_name(teacher):
    "Validation is left out, so its columns are too"
    table = Table()
    learner(width=4).kd_pretrain(teacher, 1, cbs=table)
    assert table.names==['epoch','train_loss','task_loss','features','time']
    assert len(table.values)==len(table.names) and table.values[3]>0
