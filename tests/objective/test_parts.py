"What a term sees of a batch is its own: layers, masks and labels of other terms and teachers do not reach it."
import warnings
import pytest, torch
from torch import nn
from fastai.basics import CrossEntropyLossFlat, Learner, noop, set_seed
from fastai.callback.progress import ProgressCallback
from kd_fastai.all import Attention, DecoupledKD, FitNet, KnowledgeDistillationCallback, MiniLMv2, SoftTarget, Term
from kd_fastai.demo import digits, small_net
from kd_fastai.losses.adapters import LossWithAdapters
from kd_fastai.objective import Objective

def values(terms, **batch):
    o = Objective(terms, ignore_index=-100)
    xb,yb = (torch.zeros(len(batch['pred']), 1),),(batch['target'],)
    return o.values(o.prepare(masks=o.find_masks(xb, yb), **batch))

def test_a_mask_stays_with_its_term():
    "A mask of maps, next to a loss on tokens of another number"
    fm = {'blocks': torch.randn(2,5,3)}
    batch = dict(pred=torch.randn(2,4,6,6), teacher_pred=torch.randn(2,4,6,6), target=torch.randint(4, (2,6,6)),
                 fm_s=fm, fm_t={'blocks': torch.randn(2,5,3)})
    masked,tokens = Term(SoftTarget, mask=lambda x,y: y!=1),Term(FitNet, layers='blocks')
    got = values([masked, tokens], **batch)
    assert got==values([masked], **batch) | values([tokens], **batch)

def test_missing_labels_stay_with_the_losses_that_read_labels():
    "Windows are more rows than samples"
    fm = {'windows': torch.randn(8,5,3)}
    batch = dict(pred=torch.randn(4,6), teacher_pred=torch.randn(4,6), target=torch.tensor([0,-100,2,3]),
                 fm_s=fm, fm_t={'windows': torch.randn(8,5,3)})
    labels,windows = Term(DecoupledKD),Term(FitNet, layers='windows')
    assert values([labels, windows], **batch)==values([labels], **batch) | values([windows], **batch)

def test_a_loss_on_features_compares_tokens_without_a_label():
    "Language models have labels in few positions; all tokens count, unless a mask says otherwise"
    s,t = ({'qkv': torch.randn(2,8,12)} for _ in range(2))
    batch = dict(pred=torch.randn(2,7,8), teacher_pred=torch.randn(2,7,8), fm_s=s, fm_t=t)
    term = Term(MiniLMv2, layers='qkv', heads=2)
    few,all_ = torch.full((2,8), -100),torch.zeros(2,8).long()
    few[:,0] = 0
    assert values([term], target=few, **batch)==values([term], target=all_, **batch)

def test_a_loss_that_takes_a_mask_gets_no_sample_without_a_label():
    seen = []
    def loss(pred, teacher_pred, target, mask=None):
        seen.append((len(pred), target.tolist()))
        return (pred-teacher_pred).square().mean()
    values([Term(loss)], pred=torch.randn(3,4), teacher_pred=torch.randn(3,4), target=torch.tensor([1,-100,2]))
    assert seen==[(2, [1,2])]

def test_classes_of_a_layer_are_not_mapped():
    with pytest.raises(ValueError, match='class_map is for .* soft_target compares those of layers'):
        Objective([Term(SoftTarget, layers='head_b')], class_map=[2,0,1])

def test_a_loss_with_layers_of_its_own_is_built_from_their_predictions():
    class Built(nn.Module):
        def build(self, pred, teacher_pred): self.sizes = pred.shape[1],teacher_pred.shape[1]
        def forward(self, pred, teacher_pred): return (pred-teacher_pred).square().mean()
    loss = Built()
    o = Objective([Term(loss, layers='head')])
    batch = o.prepare(torch.randn(2,3), torch.randn(2,3), {'head': torch.randn(2,7)}, {'head': torch.randn(2,7)})
    o.build(batch, nn.Identity())
    assert loss.sizes==(7,7)

def fit(teacher, losses, **kwargs):
    set_seed(0)
    kd = KnowledgeDistillationCallback(teacher, losses, **kwargs)
    learn = Learner(digits(300, bs=100), small_net(8), loss_func=CrossEntropyLossFlat(), cbs=kd, lr=1e-2)
    learn.remove_cb(ProgressCallback)
    learn.logger = noop
    learn.fit(10)
    return kd

class OneLayer(nn.Module):
    "A network without the layers of `small_net`"
    def __init__(self): super().__init__(); self.only = nn.Linear(64, 10)
    def forward(self, x): return self.only(x.flatten(1))

@pytest.mark.filterwarnings('ignore:The teacher .*agrees')
def test_layers_of_the_callback_are_those_of_losses_on_features():
    "A teacher of predictions need not have them"
    kd = fit(dict(a=OneLayer(), b=small_net(16)), [Term(SoftTarget, teacher='a'), Term(FitNet, teacher='b')],
             layers='1', adapt='auto')
    assert [o.layers for o in kd.terms]==[([],[]), (['1'],['1'])]
    assert isinstance(kd.terms[1].loss, LossWithAdapters)

@pytest.mark.parametrize('early_exit', [True, False])
@pytest.mark.filterwarnings('ignore:The teacher .*agrees')
def test_predictions_that_nobody_reads_are_not_compared_with_the_labels(early_exit):
    "A teacher of features may have any head"
    good = fit(small_net(8), Term(Attention, layers='1')).learn.model
    teachers = dict(a=good, b=small_net(8))
    losses = [Term(SoftTarget, teacher='a'), Term(Attention, teacher='b', layers='1')]
    kd = fit(teachers, losses, early_exit=early_exit)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        kd.learn.fit(1)  # the student is good by now

def test_a_student_and_a_teacher_with_lazy_layers_are_saved(tmp_path):
    learn = Learner(digits(100), small_net(4), loss_func=CrossEntropyLossFlat(), path=tmp_path)
    learn.distill(nn.Sequential(nn.Flatten(), nn.LazyLinear(10)))
    learn.save('student')
    assert (tmp_path/'models/student.pth').exists()
