"Cascades: where the student is sure, bounds on new data, and two files on disk."
import pytest, torch
from torch import nn
from fastai.basics import *
from kd_fastai.all import Cascade, OnnxModel
from kd_fastai.ship.cascade import first_failure, lower_bound
from support import learner

for o in [*globals()]:
    if o=='test' or o.startswith('test_'): del globals()[o]  # fastcore's own helpers, which pytest would take for tests

pytestmark = pytest.mark.filterwarnings('ignore')

def model_of(rng, n, accuracy, classes=4):
    "Logits of `n` samples that are right with this probability, and more confident when right"
    y = torch.from_numpy(rng.integers(0, classes, n))
    right = torch.from_numpy(rng.random(n)<accuracy)
    said = torch.where(right, y, (y+1)%classes)
    confidence = torch.from_numpy(np.where(right, rng.uniform(1, 6, n), rng.uniform(0, 3, n))).float()
    return confidence[:,None]*torch.eye(classes)[said],y

class Table(nn.Module):
    "Predictions by row number"
    def __init__(self, rows):
        super().__init__()
        self.rows = rows
        self.seen = []
    def forward(self, i):
        self.seen += i.tolist()
        return self.rows[i]

def pair(rng, n):
    student,y = model_of(rng, n, 0.8)
    right = torch.from_numpy(rng.random(n)<0.97)
    teacher = 5*torch.eye(4)[torch.where(right, y, (y+1)%4)]
    return Table(student),Table(teacher),y

@pytest.mark.slow
def test_the_bound_holds_on_new_data():
    "in at least 95 of 100 calibrations; with 60 draws, all but a few"
    rng,missed = np.random.default_rng(0),0
    for _ in range(60):
        student,teacher,y = pair(rng, 4000)
        cascade = Cascade(student, teacher).calibrate((torch.arange(400), y[:400]), accuracy=0.92, rounds=0)
        new = cascade(torch.arange(400, 4000)).argmax(1)==y[400:]
        missed += new.float().mean()<0.92
        assert 0<cascade.report['share']<1 and cascade.report['accuracy_at_least']>=0.92
    assert missed<=8  # binomial(60, 0.05): more in one of 500 draws

def test_the_share_of_calls_is_bounded():
    student,teacher,y = pair(np.random.default_rng(1), 4000)
    cascade = Cascade(student, teacher).calibrate((torch.arange(1000), y[:1000]), share=0.3, rounds=0)
    cascade(torch.arange(1000, 4000))
    assert cascade.share<=0.3 and cascade.report['share_at_most']<=0.3
    assert cascade.report['student']<cascade.report['accuracy']<=cascade.report['teacher']

def test_the_teacher_sees_the_unsure_samples_alone():
    student,teacher,y = pair(np.random.default_rng(2), 50)
    cascade = Cascade(student, teacher, threshold=0.9)
    pred = cascade(torch.arange(50))
    unsure = [*(student.rows.softmax(1).amax(1)<0.9).nonzero()[:,0].tolist()]
    assert teacher.seen==unsure and 0<len(unsure)<50
    torch.testing.assert_close(pred[unsure], teacher.rows.softmax(1)[unsure])
    assert cascade.share==len(unsure)/50

def test_nan_is_unsure():
    student,teacher,_ = pair(np.random.default_rng(3), 4)
    student.rows[1] = math.nan
    assert Cascade(student, teacher, threshold=0.)(torch.arange(4)).isfinite().all() and teacher.seen==[1]

def test_what_cannot_be_promised_is_an_error():
    student,teacher,y = pair(np.random.default_rng(4), 100)
    cascade,data = Cascade(student, teacher),(torch.arange(100), y)
    with pytest.raises(ValueError, match='cannot be promised: the teacher on all samples'):
        cascade.calibrate(data, accuracy=0.999, rounds=0)
    with pytest.raises(ValueError, match='cannot be promised: without any call'):
        cascade.calibrate(data, share=0.001, rounds=0)
    with pytest.raises(ValueError, match='either accuracy= or share='): cascade.calibrate(data)
    with pytest.raises(ValueError, match='has no threshold'): cascade(torch.arange(3))
    with pytest.raises(ValueError, match='the same classes'):
        Cascade(student, Table(torch.zeros(100,3))).calibrate(data, share=0.5, rounds=0)

def test_bounds_by_hand():
    assert lower_bound(0, 10)==0
    assert lower_bound(10, 10)==pytest.approx(0.05**0.1)  # all right: p**n = 0.05
    assert first_failure([True,True,False,True])==2 and first_failure([])==0

@pytest.mark.slow
def test_a_cascade_of_two_files(tmp_path):
    "The same predictions as from the Learners, from a list of pictures"
    for o in ('onnx','onnxruntime','onnxscript'): pytest.importorskip(o, reason=f'{o} is not installed')
    from fastai.vision.all import ImageDataLoaders, Resize, get_image_files
    from PIL import Image
    rng = np.random.default_rng(0)
    for i in range(24):
        x = np.clip([[200,90,60],[60,90,200]][i%2]+rng.normal(0, 60, (20+i,30,3)), 0, 255).astype(np.uint8)
        Image.fromarray(x).save(tmp_path/f'{i%2}_{i}.png')
    files = get_image_files(tmp_path)
    dls = ImageDataLoaders.from_name_func(tmp_path, files, lambda o: o[0], bs=8, item_tfms=Resize(16), device='cpu')
    def net(width):
        body = nn.Conv2d(3,width,3,2),nn.ReLU(),nn.AdaptiveAvgPool2d(1),nn.Flatten(),nn.Linear(width,2)
        return nn.Sequential(*body)
    learners = [learner(dls=dls, model=net(w)) for w in (2,8)]
    models = [OnnxModel(o.kd_export(tmp_path/f'{i}.onnx', scores={})) for i,o in enumerate(learners)]
    cascade = Cascade(*models, threshold=0.5001)
    x = dls.test_dl(files).one_batch()[0].as_subclass(torch.Tensor)
    torch.testing.assert_close(cascade([*files[:8]]), Cascade(*learners, threshold=0.5001)(x), atol=1e-3, rtol=0)
