"Cards: their numbers, what a wrong student shows, and files that other programs read."
import re
from functools import partial
import pytest, torch, yaml
from fastai.basics import *
from fastai.callback.all import *
from kd_fastai.all import *
from kd_fastai.report.measure import resize_batch
from kd_fastai.ship.card import data_fingerprint, recall_by_class
from kd_fastai.demo import digits, small_net

for o in [*globals()]:
    if o=='test' or o.startswith('test_'): del globals()[o]  # fastcore's own helpers, which pytest would take for tests

pytestmark = pytest.mark.filterwarnings('ignore')

def learner(width=4, labels=100, epochs=6, cbs=None):
    set_seed(0)
    learn = Learner(digits(labels), small_net(width), loss_func=CrossEntropyLossFlat(), metrics=accuracy)
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(epochs, 1e-2, cbs=cbs)
    return learn

class Confuses(nn.Module):
    "Predicts the class of a model, but 7 where it says 1"
    def __init__(self, model): super().__init__(); self.model = model
    def forward(self, x):
        p = self.model(x)
        wrong = torch.zeros_like(p); wrong[:,7] = 9.
        return torch.where((p.argmax(1)==1)[:,None], wrong, p)

@pytest.fixture(scope='module')
def teacher(): return learner(16, None, 5)

@pytest.fixture(scope='module')
def trained(teacher):
    kd = KnowledgeDistillationCallback(teacher, [Term(partial(SoftTarget, T=4), 0.9, schedule=SchedCos(0,1))],
                                       task_weight=0.1)
    return learner(cbs=kd),kd

@pytest.fixture(scope='module')
def card(trained, teacher):
    return trained[0].kd_card(teacher, learner(), 'A | title', kd=trained[1], intended='For digits.',
                              limits=['Only digits.'], license='apache-2.0')

def test_scores_are_those_of_validate(card, trained, teacher):
    for name,learn in (('student',trained[0]), ('teacher',teacher)):
        with learn.no_bar(), learn.no_logging(): loss,acc = learn.validate(dl=trained[0].dls.valid)
        assert tuple(card.scores.loc[name, ['valid_loss','accuracy']])==pytest.approx((loss, acc), abs=1e-6)
    x,_ = trained[0].dls.valid.one_batch()
    equal = trained[0].model.eval()(x).argmax(1)==teacher.model.eval()(x).argmax(1)
    assert card.scores.agreement['student']==pytest.approx(equal.float().mean().item())
    assert card.scores.agreement['teacher']==1

def test_latency_is_measured_at_two_batch_sizes(card):
    assert (card.scores[['ms_batch_1','ms_batch_64']]>0).all(axis=None)
    assert {*card.scores.index}=={'student','teacher','baseline'}

def test_a_class_that_is_lost_comes_first(teacher):
    "with its samples"
    learn = Learner(teacher.dls, Confuses(teacher.model), loss_func=CrossEntropyLossFlat(), metrics=accuracy)
    card = learn.kd_card(deepcopy(teacher.model))
    assert card.recall.index[0]==1 and card.recall.student[1]==0 and (card.recall.change[1:]>=0).all()
    right = teacher.model.eval()(teacher.dls.valid.one_batch()[0]).argmax(1)==teacher.dls.valid.one_batch()[1]
    assert len(card.lost)==(right & (teacher.dls.valid.one_batch()[1]==1)).sum()
    assert {*card.lost.label}=={1} and {*card.lost.student}=={7}
    assert 'wrong_now' in [p[0] for p in card.parts if isinstance(p, tuple)]

def test_lost_samples_are_where_they_are_said_to_be(card, trained, teacher):
    x,y = trained[0].dls.valid.one_batch()
    s,t = (m.eval()(x).argmax(1) for m in (trained[0].model, teacher.model))
    assert {*card.lost.index}=={*((t==y)&(s!=y)).nonzero()[:,0].tolist()}
    for i,row in card.lost.iterrows(): assert (row.label, row.student)==(y[i], s[i])
    assert card.lost.confidence.is_monotonic_decreasing

def test_front_matter_and_tables_are_valid(card):
    front = re.match(r'---\n(.*?)\n---\n\n# ', card.markdown, re.S)[1]
    front = yaml.safe_load(front)
    front.pop('model-index', None)
    assert front==dict(library_name='fastai', tags=['knowledge-distillation','fastai','kd_fastai'],
                       metrics=['accuracy'], license='apache-2.0')
    tables = re.findall(r'(?:^\|.*\|\n)+', card.markdown, re.M)
    assert len(tables)==3
    for t in tables: assert len({len(re.findall(r'(?<!\\)\|', l)) for l in t.splitlines()})==1

def test_the_hub_reads_it(card):
    hub = pytest.importorskip('huggingface_hub',
                              reason='the Hub reads cards by huggingface_hub, which is not installed')
    data = hub.ModelCard(card.markdown).data
    assert (data.library_name, data.license, data.metrics)==('fastai','apache-2.0',['accuracy'])
    result, = data.eval_results
    assert (data.model_name,result.metric_type)==('A | title','accuracy')
    assert result.metric_value==pytest.approx(card.scores.accuracy['student'])

def test_says_how_it_was_trained(card, trained):
    for o in (repr(trained[1]), 'epochs: 6', 'training samples: 100', data_fingerprint(trained[0].dls.valid),
              f'torch {torch.__version__.split("+")[0]}',
              'schedule of soft_target', 'For digits.', '- Only digits.',
              'loss function: FlattenedLoss of CrossEntropyLoss()'):
        assert o in card.markdown

@pytest.mark.slow
def test_files(card, tmp_path):
    "Each picture that the Markdown names is there"
    assert card.save(tmp_path/'new')==tmp_path/'new/README.md'
    named = re.findall(r'!\[\w+\]\((.*?)\)', (tmp_path/'new/README.md').read_text())
    assert {*named}=={'recall.png','history.png','wrong_now.png'}
    assert {o.name for o in (tmp_path/'new').iterdir()}=={'README.md',*named}

def test_a_notebook_shows_all_parts(card, monkeypatch):
    display,shown = pytest.importorskip('IPython.display'),[]
    monkeypatch.setattr(display, 'display', shown.append)
    card._ipython_display_()
    assert len(shown)==1+len(card.parts) and shown[0].data=='# A | title'
    assert sum(isinstance(o, pd.DataFrame) for o in shown)==3 and sum(hasattr(o, 'savefig') for o in shown)==3

def test_changes_nothing(teacher):
    learn = learner(epochs=1)
    learn.model.train(); other = small_net(8).train()
    values,before = [*learn.recorder.values],deepcopy(learn.model.state_dict())
    state = torch.get_rng_state()
    learn.kd_card(other)
    assert learn.recorder.values==values and learn.model.training and other.training
    assert torch.equal(state, torch.get_rng_state())
    for k,v in learn.model.state_dict().items(): assert torch.equal(v, before[k])
    assert not any(m._forward_hooks for m in (*learn.model.modules(), *other.modules()))

def test_regression_has_no_classes():
    data = [*zip(torch.randn(8,3), torch.randn(8,1))]
    dls = DataLoaders(DataLoader(data, bs=4), DataLoader(data, bs=4))
    learn = Learner(dls, nn.Linear(3,1), loss_func=MSELossFlat(), metrics=rmse)
    card = learn.kd_card(nn.Linear(3,1))
    assert card.recall is None and card.lost is None and 'Recall' not in card.markdown
    p,y = learn.model(torch.stack([o for o,_ in data])),torch.stack([o for _,o in data])
    assert card.scores.loc['student','_rmse']==pytest.approx(((p-y)**2).mean().sqrt().item(), rel=1e-4)

def test_vocabulary_names_the_classes(teacher):
    learn = learner(epochs=1)
    learn.dls.vocab = [f'digit {i}' for i in range(10)]
    card = learn.kd_card(teacher)
    assert {*card.recall.index}=={*learn.dls.vocab} and card.lost.label.str.startswith('digit').all()

def test_recall_by_hand():
    answers = pd.DataFrame(dict(target=[0,0,0,0,1], student=[0,0,0,1,0], teacher=[0,0,1,1,0]))
    res = recall_by_class(answers, ['student','teacher'])
    assert res.student.to_dict()=={1:0., 0:.75} and res.change.to_dict()=={1:0., 0:.25}
    assert res.samples.to_dict()=={0:4, 1:1}

def test_fingerprint():
    a,b = [torch.tensor([1.,2.])],[torch.tensor([2.,1.])]
    assert data_fingerprint([a])==data_fingerprint([a]) and data_fingerprint([a])!=data_fingerprint([b])

def test_resized_batches():
    assert [*resize_batch((torch.arange(3),), 7)[0]]==[0,1,2,0,1,2,0]
    assert len(resize_batch((torch.zeros(5,2),), 1)[0])==1

# ---- what a newcomer read in a card

def test_no_object_addresses(card, trained):
    "fastai's schedules, losses and optimizers have representations that name them"
    assert not re.search(r'0x[0-9a-f]{6}', card.markdown) and 'sched_cos(0, 1)' in card.markdown

def test_models_of_one_architecture_have_one_latency(card):
    assert card.scores.ms_batch_1['student']==card.scores.ms_batch_1['baseline']!=card.scores.ms_batch_1['teacher']

def test_epochs_without_validation_count(teacher):
    class LastOnly(Callback):
        "Validates in the last epoch only"
        def before_validate(self):
            if self.epoch<self.n_epoch-1: raise CancelValidException
    assert 'epochs: 3' in learner(epochs=3, cbs=LastOnly()).kd_card(teacher).markdown

def test_titles_fit_their_pictures(teacher):
    "Long class names are wrapped: no two titles of a row overlap"
    learn = learner(epochs=1)
    learn.dls.vocab = [f'Travel and many other places {i}' for i in range(10)]
    fig = dict(p for p in learn.kd_card(teacher).parts if isinstance(p, tuple))['wrong_now']
    fig.canvas.draw()
    boxes = [ax.title.get_window_extent() for ax in fig.axes if ax.get_title()]
    assert len(boxes)>1 and not any(a.overlaps(b) for i,a in enumerate(boxes) for b in boxes[:i])

def test_class_map_of_the_training():
    "Two models that agree everywhere, in other columns"
    x,y = torch.eye(5).repeat(8,1)*6,torch.arange(5).repeat(8)
    perm = [3,0,5,1,2]
    student,teacher = nn.Linear(5,5,bias=False),nn.Linear(5,6,bias=False)
    student.weight.data,teacher.weight.data = torch.eye(5),torch.zeros(6,5)
    for c,k in enumerate(perm): teacher.weight.data[k,c] = 1.
    data = [*zip(x,y)]
    kd = KnowledgeDistillationCallback(teacher, SoftTarget, class_map=perm)
    dls = DataLoaders(DataLoader(data, bs=40), DataLoader(data, bs=40))
    learn = Learner(dls, student, loss_func=CrossEntropyLossFlat(), metrics=error_rate, cbs=kd)
    for card in (learn.kd_card(teacher), learn.remove_cb(kd).kd_card(teacher, kd=kd)):
        assert card.scores.agreement['student']==1 and card.scores.error_rate['teacher']==0 and not len(card.lost)

@pytest.mark.slow
def test_files_and_a_script(tmp_path):
    "Samples are named by file, and the card has the script that runs the ONNX file"
    for o in ('onnx','onnxruntime','onnxscript'): pytest.importorskip(o, reason=f'{o} is not installed')
    from fastai.vision.all import ImageDataLoaders, Resize, get_image_files
    from PIL import Image
    (tmp_path/'pictures').mkdir()
    for i in range(24):
        x = np.random.default_rng(i).integers(0, 255, (20+i,30,3), dtype=np.uint8)
        Image.fromarray(x).save(tmp_path/f'pictures/{i%2}_{i}.png')
    files = get_image_files(tmp_path).sorted()
    dls = ImageDataLoaders.from_name_func(tmp_path, files, lambda o: o[0], valid_pct=0.5, seed=0, bs=8,
        item_tfms=Resize(16), device='cpu')
    def always(c):
        "A network that predicts class `c`"
        linear = nn.Linear(768,2)
        with torch.no_grad(): linear.weight.zero_(); linear.bias.copy_(torch.eye(2)[c])
        return nn.Sequential(nn.Flatten(), linear)
    learn = Learner(dls, always(0), loss_func=CrossEntropyLossFlat(), metrics=accuracy)
    file = learn.kd_export(tmp_path/'student.onnx', scores={})
    card = learn.kd_card(always(1), file=file)
    assert len(card.lost)
    assert card.lost.file.str.startswith('pictures').all() and card.lost.file.str.endswith('.png').all()
    assert "InferenceSession('student.onnx')" in card.markdown
