"One pass over the data for all models: rows of the same samples, the right labels and classes, and nothing changed."
from copy import deepcopy
import numpy as np, pytest, torch
import torch.utils.data as tud
from torch import nn
from fastai.basics import CrossEntropyLossFlat, DataLoader, DataLoaders, Learner, accuracy, error_rate
from kd_fastai.callback import KnowledgeDistillationCallback as KD
from kd_fastai.losses import SoftTarget
from kd_fastai.report.report import KDReport  # noqa: F401  gives Learner its methods
from kd_fastai.report.scores import first_batch, score_models
from support import learner, quiet, same, state

pytestmark = pytest.mark.filterwarnings('ignore:The teacher .*agrees')   # teachers are not trained

def eye(n, keep):
    "A model that returns columns of its input"
    m = nn.Linear(n, len(keep), bias=False)
    m.weight.data = torch.eye(n)[keep]
    return m.requires_grad_(False)

def of_classes(n=5, model=None, cbs=None, shuffle=False, **kwargs):
    "A Learner whose inputs are one-hot labels"
    data = [*zip(6*torch.eye(n).repeat(8,1), torch.arange(n).repeat(8))]
    dls = DataLoaders(*(DataLoader(data, bs=16, shuffle=shuffle, num_workers=0) for _ in range(2)))
    model = model or eye(n, [*range(n)]).requires_grad_(True)
    return quiet(Learner(dls, model, loss_func=CrossEntropyLossFlat(), cbs=cbs, metrics=[accuracy,error_rate],
                         **kwargs))

def test_rows_are_of_the_same_samples_in_a_loader_that_shuffles():
    learn = of_classes(shuffle=True, model=nn.Linear(5,5))
    for dl in (learn.dls.train, learn.dls.valid):
        res = score_models(learn, {'teacher': deepcopy(learn.model)}, dl).classes
        assert (res.student==res.teacher).all()
        assert (res.student_confidence==res.teacher_confidence).all()

def test_it_changes_nothing():
    learn = learner(KD(nn.Sequential(nn.Flatten(), nn.Linear(64,10)), SoftTarget))
    learn.fit(1)
    before = state(learn)
    score_models(learn, {'other': deepcopy(learn.model)}, learn.dls.train)
    first_batch(learn.dls.train)
    assert same(state(learn), before)

def test_metrics_are_those_of_validate():
    learn,other = of_classes(model=nn.Linear(5,5)),nn.Linear(5,5)
    res = score_models(learn, {'other': other}).metrics
    assert res.loc['student'].tolist()==pytest.approx([*learn.validate()])
    learn.model = other
    assert res.loc['other'].tolist()==pytest.approx([*learn.validate()])

def test_class_map_with_a_hole():
    "A student that is always right is reported so; the teacher is right on the four classes that it has"
    learn = of_classes(cbs=KD(eye(5, [1,2,3,4]), SoftTarget, class_map=[-1,0,1,2,3]))
    res = learn.kd_report().scores.accuracy
    assert res.student==1 and res.teacher==pytest.approx(.8)

@pytest.mark.parametrize('columns', [[1,0,3,2,4],[4,3,2,1,0]])
def test_class_map_of_another_order(columns):
    order = [columns.index(i) for i in range(5)]
    learn = of_classes(cbs=KD(eye(5, order), SoftTarget, class_map=columns))
    scores = score_models(learn, {'teacher': learn.knowledge_distillation.teacher})
    assert scores.agreement('student','teacher')==1 and scores.metrics.error_rate.teacher==0
    given = score_models(of_classes(), {'teacher': eye(5, order)}, class_map=columns)
    assert given.agreement('student','teacher')==1

def pixels(loss_func, ignore=255, size=(5,7)):
    g = torch.Generator().manual_seed(0)
    x,y = torch.randn(16,1,*size, generator=g),torch.randint(0, 3, (16,*size), generator=g)
    y[torch.rand(16,*size, generator=g)<.3] = ignore
    dls = DataLoaders(*(DataLoader([*zip(x,y)], bs=6, num_workers=0) for _ in range(2)))
    return Learner(dls, nn.Conv2d(1,3,3,padding=1), loss_func=loss_func),x,y

@pytest.mark.parametrize('loss_func', [CrossEntropyLossFlat(axis=1, ignore_index=255),
                                       nn.CrossEntropyLoss(ignore_index=255)])
def test_ignored_labels_count_nowhere(loss_func):
    learn,x,y = pixels(loss_func)
    quiet(learn.distill(nn.Conv2d(1,3,3,padding=1)))
    with torch.no_grad(): right = (learn.model(x).argmax(1)==y)[y!=255]
    assert learn.kd_report().scores.accuracy.student==pytest.approx(right.float().mean().item(), abs=1e-6)
    assert len(score_models(learn).classes)==(y!=255).sum()

def test_labels_of_tabular_data():
    "(B, 1) next to logits (B, C)"
    data = [*zip(6*torch.eye(3).repeat(4,1), torch.arange(3).repeat(4)[:,None])]
    dls = DataLoaders(*(DataLoader(data, bs=5, num_workers=0) for _ in range(2)))
    learn = Learner(dls, eye(3, [0,1,2]), loss_func=CrossEntropyLossFlat())
    res = score_models(learn).classes
    assert len(res)==12 and (res.student==res.target).all()

def test_labels_that_are_no_classes():
    "Several labels a sample, and soft labels"
    x = torch.randn(8,4)
    for y,loss in ((torch.randint(2, (8,3)).float(), nn.BCEWithLogitsLoss()),
                   (torch.rand(8,3).softmax(1), nn.CrossEntropyLoss())):
        dls = DataLoaders(*(DataLoader([*zip(x,y)], bs=4, num_workers=0) for _ in range(2)))
        assert score_models(Learner(dls, nn.Linear(4,3), loss_func=loss)).classes is None

def test_classes_are_last_in_predictions_of_text():
    x,y = torch.randn(8,6,4),torch.randint(3, (8,6))
    dls = DataLoaders(*(DataLoader([*zip(x,y)], bs=4, num_workers=0) for _ in range(2)))
    learn = Learner(dls, nn.Linear(4,3), loss_func=CrossEntropyLossFlat())
    res = score_models(learn).classes
    assert [*res.student]==learn.model(x).argmax(-1).flatten().tolist() and [*res.target]==y.flatten().tolist()

def test_a_teacher_that_changes_its_input_leaves_the_students_alone():
    class InPlace(nn.Module):
        def forward(self, x): return x.mul_(0)
    learn = of_classes()
    assert score_models(learn, {'a': InPlace(), 'b': deepcopy(learn.model)}).metrics.accuracy.b==1

def test_pytorchs_loaders_in_reports_and_plots():
    ds = tud.TensorDataset(torch.randn(32,4), torch.randint(3, (32,)))
    dls = DataLoaders(tud.DataLoader(ds, 16, shuffle=True), tud.DataLoader(ds, 16), device='cpu')
    learn = quiet(Learner(dls, nn.Linear(4,3), loss_func=CrossEntropyLossFlat(), metrics=accuracy))
    learn.distill(nn.Linear(4,3))
    torch.manual_seed(5); before = torch.get_rng_state()
    assert learn.kd_report().scores.shape[0]==2
    assert learn.plot_agreement().images[0].get_array().sum()==32
    assert torch.equal(before, torch.get_rng_state())

def test_predictions_without_labels_are_plotted():
    x = torch.randn(8,4)
    dls = DataLoaders(*(DataLoader([*zip(x, torch.rand(8,2))], bs=4, num_workers=0) for _ in range(2)))
    learn = Learner(dls, nn.Linear(4,2), loss_func=nn.MSELoss())
    shown = np.array(learn.plot_agreement(deepcopy(learn.model)).images[0].get_array())
    assert shown.sum()==8 and shown.trace()==8
