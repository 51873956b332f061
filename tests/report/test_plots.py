"Plots show the right data on their axes, and change nothing."
import copy
import matplotlib; matplotlib.use('agg')
import matplotlib.pyplot as plt
import numpy as np, pytest, torch, torchvision
from torch import nn
from fastai.basics import CrossEntropyLossFlat, DataLoader, DataLoaders, Learner
from fastai.vision.all import CategoryBlock, DataBlock, ImageBlock
from kd_fastai.all import *
from kd_fastai.demo import digits, train
from kd_fastai.hooks.matching import layer_similarity, linear_cka
from kd_fastai.losses.adapters import LossWithAdapters
from kd_fastai.report.plots import *
from kd_fastai.teacher.live import Teacher
from support import KD, history, hooks

dls = digits(100)
x,y = dls.valid.one_batch()
def distilled(teacher, layers=['1','2']):
    return lambda student: KD(teacher, [Term(SoftTarget, weight=0.5), Term(Attention, weight=10)], layers)

@pytest.fixture(autouse=True)
def close():
    yield
    plt.close('all')

@pytest.fixture(scope='module')
def teacher(): return train(digits(), 32, 2, seed=0)
@pytest.fixture(scope='module')
def student(): return train(dls, 8, 2, seed=0)

def heights(ax): return np.array([p.get_height() for p in ax.patches])
def shown(ax): return np.array(ax.images[0].get_array())
def words(ax): return [t.get_text() for t in ax.texts]

def test_attention_maps(student, teacher):
    axs = plot_attention(student, teacher, x, [('1','1'), ('2','2')], n=3)
    assert axs.shape==(3,5)
    assert [a.get_title() for a in axs[0]]==['input','student 1','teacher 1','student 2','teacher 2']
    for i,(m,n) in enumerate(((student.model,1), (teacher.model,1), (student.model,2), (teacher.model,2)), 1):
        want = m.eval()[:n+1](x[:3]).pow(2).mean(1).detach()
        for row in range(3): assert np.allclose(shown(axs[row,i]), want[row], atol=1e-5)
    for row in range(3): assert np.allclose(shown(axs[row,0]), (x[row,0]-x[row].min())/(x[row].max()-x[row].min()))

def test_attention_of_layers_of_other_sizes_and_names(student, teacher):
    axs = plot_attention(student, teacher, x, [('1','2')], n=2)
    assert shown(axs[0,1]).shape==(4,4)
    assert shown(axs[0,2]).shape==(2,2)
    fig,mine = plt.subplots(2, 3)
    assert plot_attention(student, teacher, x, [('1','2')], n=2, ax=mine)[0,0] is mine[0,0]
    with pytest.raises(ValueError, match='Expected 2 x 5 axes, got 6'):
        plot_attention(student, teacher, x, ['1','2'], n=2, ax=mine)

def test_attention_shows_color_pictures():
    m,im = torchvision.models.resnet18(), torch.randn(2,3,32,32)
    axs = plot_attention(m, m, im, 'layer1', n=2)
    assert shown(axs[0,0]).shape==(32,32,3)
    assert shown(axs[1,0]).min()==0
    assert shown(axs[1,0]).max()==1
    assert np.array_equal(shown(axs[0,1]), shown(axs[0,2]))

def test_softened():
    t,s = torch.tensor([3.,1.,0.]),torch.tensor([0.,1.,2.])
    axs = plot_softened(t, T=(1,5))
    for ax,T in zip(axs, (1,5)):
        assert np.allclose(heights(ax), (t/T).softmax(0))
        assert ax.get_title()==f'T={T}'
    axs = plot_softened(dict(teacher=t, student=s), T=(2,), vocab=['a','b','c'])
    assert np.allclose(heights(axs[0]), torch.cat([(t/2).softmax(0), (s/2).softmax(0)]))
    assert [o.get_text() for o in axs[0].get_xticklabels()]==['a','b','c']
    assert [o.get_text() for o in axs[0].get_legend().get_texts()]==['teacher','student']
    left = [p.get_x() for p in axs[0].patches]
    assert len({round(o,6) for o in left})==6   # next to each other, not on top of each other
    with pytest.raises(ValueError, match='above 0'): plot_softened(t, T=(0,1))

def test_learner_agreement(student, teacher):
    ax = student.plot_agreement(teacher)
    s,t = (o.model.eval()(x).argmax(1).numpy() for o in (student, teacher))
    assert shown(ax).sum()==797
    assert all(shown(ax)[i,j]==((t==i) & (s==j)).sum() for i in range(10) for j in range(10))
    assert f'{(s==t).mean():.1%}' in ax.get_title()
    assert (ax.get_ylabel(), ax.get_xlabel())==('teacher','student')
    assert words(ax).count('')==(shown(ax)==0).sum()
    blank = shown(student.plot_agreement(teacher, dl=dls.train, teacher_tfm=lambda x: x*0))
    assert (blank.sum(1)>0).sum()==1   # the teacher gives blank pictures one class

def test_learner_agreement_names_classes():
    "The axes have the vocabulary of the data."
    ims = [np.full((8,8), v, np.uint8) for v in (0,255)]
    d = DataBlock((ImageBlock, CategoryBlock), get_items=lambda _: [0,1]*4, get_x=lambda i: ims[i],
                  get_y=lambda i: 'dark light'.split()[i]).dataloaders(None, bs=2)
    learn = Learner(d, nn.Sequential(nn.Flatten(), nn.LazyLinear(2)), loss_func=CrossEntropyLossFlat())
    learn.model(d.one_batch()[0])
    ax = learn.plot_agreement(copy.deepcopy(learn.model))
    assert [o.get_text() for o in ax.get_xticklabels()]==['dark','light']
    assert '100.0%' in ax.get_title()

class Two(nn.Module):
    "A model of two inputs"
    def __init__(self): super().__init__(); self.lin = nn.Linear(4,3)
    def forward(self, a, b): return self.lin(a+b)

def test_learner_agreement_of_models_with_two_inputs():
    "DataLoaders without n_inp: all items but the last are inputs, as in fastai"
    rows = [(torch.randn(4), torch.randn(4), i%3) for i in range(12)]
    two_inputs = DataLoaders(*(DataLoader(rows, bs=4, num_workers=0) for _ in range(2)))
    learn = Learner(two_inputs, Two(), loss_func=CrossEntropyLossFlat())
    assert '100.0%' in learn.plot_agreement(copy.deepcopy(learn.model)).get_title()

def test_learner_agreement_finds_the_teacher_of_the_learner(student, teacher):
    learn = Learner(dls, student.model, loss_func=CrossEntropyLossFlat())
    with pytest.raises(ValueError, match='There is no teacher: give one'): learn.plot_agreement()
    learn.distill(teacher, teacher_tfm=lambda x: x*0)
    assert np.array_equal(shown(learn.plot_agreement()),
                          shown(student.plot_agreement(teacher, teacher_tfm=lambda x: x*0)))

def by_definition(a, b):
    "CKA from HSIC of linear kernels, centered by the matrix H"
    n = len(a)
    H = torch.eye(n).double()-1/n
    K,L = ((f:=o.flatten(1).double())@f.T for o in (a,b))
    def hsic(K, L): return (K@H@L@H).trace()
    return (hsic(K,L)/(hsic(K,K)*hsic(L,L)).sqrt()).item()

def test_cka():
    torch.manual_seed(0)
    a,b = torch.randn(20,3,2,2),torch.randn(20,7)
    assert linear_cka(a, b)==pytest.approx(by_definition(a, b))
    assert linear_cka(a, b)==pytest.approx(linear_cka(b, a))
    assert linear_cka(b, 5-2*b)==pytest.approx(1)
    assert np.isnan(linear_cka(a, torch.ones(20,2)))
    with pytest.raises(ValueError, match='20 and 19'): linear_cka(a, b[:19])

def test_layer_similarity(student, teacher):
    table = layer_similarity(student, teacher, x[:60])
    assert [*table.index]==[*table.columns]==['0','1','2','3','4','5']
    s,t = student.model.eval()[:2](x[:60]),teacher.model.eval()[:3](x[:60])
    assert table.loc['1','2']==pytest.approx(by_definition(s.detach(), t.detach()), abs=1e-4)
    ax = plot_similarity(student, teacher, x[:60])
    assert np.allclose(shown(ax), table.values)
    assert f'{table.loc["1","2"]:.2f}' in words(ax)
    columns,rows = ([int(v+.5) for v in o] for o in zip(*(p.get_xy() for p in ax.patches)))
    assert columns==[*table.values.argmax(1)]
    assert rows==[*range(6)]

def test_similarity_leaves_out_what_it_cannot_read():
    "Layers that are changed in place, run twice or return no tensor are left out."
    m,im = torchvision.models.resnet18(),torch.randn(6,3,32,32)
    table = layer_similarity(m, m, im)
    assert 'bn1' not in table
    assert 'layer4' in table
    assert table.values.diagonal()==pytest.approx(1)
    assert 'layer1.0' in layer_similarity(m, m, im, depth=2)
    lstm = nn.Sequential(nn.LSTM(3,4))
    with pytest.raises(ValueError, match='The teacher has no layer of depth 1'):
        layer_similarity(nn.Sequential(nn.Linear(3,4)), lstm, torch.randn(6,2,3))

def test_terms_are_the_recorders_columns(teacher):
    learn = train(dls, 8, 3, seed=0, kd=distilled(teacher.model))
    h = history(learn)
    lines = learn.plot_terms().lines
    assert [l.get_label() for l in lines]==['task_loss','soft_target','attention']
    for l in lines: assert np.allclose(l.get_ydata(), h[l.get_label()]/h[l.get_label()][0])
    for l in (ax:=learn.plot_terms(relative=False)).lines: assert np.allclose(l.get_ydata(), h[l.get_label()])
    assert ax.get_yscale()=='log'
    with learn.no_bar(): learn.validate()
    with pytest.raises(ValueError, match='validate'): learn.plot_terms()

def test_terms_need_a_distillation(student):
    with pytest.raises(ValueError, match='KnowledgeDistillationCallback'): student.plot_terms()

@pytest.fixture
def unchanged(student, teacher):
    "Modes, weights, statistics, hooks, random state and the recorder are the same after the test"
    models = student.model,teacher.model
    student.model.train(); student.model[1].eval()
    def modes(): return [m.training for o in models for m in o.modules()]
    def grads(): return [p.grad is None for o in models for p in o.parameters()]
    def rest(): return hooks(*models),len(student.recorder.values),torch.get_rng_state().tolist()
    before = modes(),grads(),rest()
    tensors = [copy.deepcopy(m.state_dict()) for m in models]
    yield
    assert (modes(),grads(),rest())==before
    for a,m in zip(tensors, models):
        for k,v in m.state_dict().items(): assert (a[k]==v).all()
    student.model.eval()

@pytest.mark.slow
def test_plots_change_nothing(student, teacher, unchanged):
    plot_attention(student, teacher, x, '1')
    plot_similarity(student, teacher, x[:50])
    student.plot_agreement(teacher)

@pytest.mark.slow
def test_plots_that_fail_change_nothing(student, teacher, unchanged):
    with pytest.raises(ValueError, match="'5'"): plot_attention(student, teacher, x, '5')
    with pytest.raises(ValueError, match='no layer of depth 9'): plot_similarity(student, teacher, x[:50], depth=9)

@pytest.mark.slow
def test_any_teacher_of_the_callback(student, tmp_path):
    "A `Teacher` with a conversion, and the file of an exported Learner"
    wide = train(dls, 8, 1, seed=0)
    wide.export(tmp_path/'wide.pkl')
    def larger(x): return nn.functional.interpolate(x, size=16)
    teachers = dict(converted=Teacher(wide, tfm=larger), file=tmp_path/'wide.pkl')
    layers = {k: match_feature_layers(student, t, dls) for k,t in teachers.items()}
    assert layers['converted']==match_feature_layers(student, wide, dls, teacher_tfm=larger)
    assert layers['file']==match_feature_layers(student, wide, dls)
    assert layer_similarity(student, teachers['converted'], x).equals(layer_similarity(student, wide, x, 1, larger))
    maps = [shown(plot_attention(student, t, x, ['1'], n=1, teacher_tfm=f)[0,2])
            for t,f in ((teachers['converted'],None), (wide,larger))]
    assert np.array_equal(*maps)
    assert maps[0].shape==(8,8)
    tables = [shown(student.plot_agreement(t, teacher_tfm=f))
              for t,f in ((teachers['converted'],None), (wide,larger))]
    assert np.array_equal(*tables)
    similar = [shown(plot_similarity(student, t, x)) for t in (teachers['file'],wide)]
    assert np.array_equal(*similar)

def test_tokens_keep_their_class_token():
    "`adapt='auto'` moves positions to positions: the class token of the teacher is compared with the student's only"
    small,large = torch.randn(2,5,8),torch.randn(2,17,8)      # 2x2 and 4x4 positions after a class token
    loss = LossWithAdapters(FitNet)
    loss.build({'s': small}, {'t': large})
    resize = loss.adapters[0].size
    moved = resize(small.mT)
    assert torch.equal(moved[...,0], small[:,0])
    other = small.clone()
    other[:,0] = 100.
    assert torch.equal(resize(other.mT)[...,1:], moved[...,1:])
