"The callback with other data, other heads and other callbacks of fastai."
import pickle, subprocess, sys, warnings
from copy import deepcopy
from functools import partial
from pathlib import Path
import numpy as np, pandas as pd, pytest, torch, torch.nn.functional as F
from torch import Tensor, nn
from fastai.basics import (BCEWithLogitsLossFlat, Callback, CrossEntropyLossFlat, DataBlock, DataLoaders, L,
    LabelSmoothingCrossEntropyFlat, Learner, MSELossFlat, Normalize, RandomSplitter, SGD, TfmdDL, TfmdLists,
    TransformBlock, accuracy, noop, params, set_seed, tensor)
from fastai.callback.all import (BnFreeze, CSVLogger, ChannelsLast, CutMix, EarlyStoppingCallback, GradientAccumulation,
    GradientClip, MixUp, ReduceLROnPlateau, SaveModelCallback)
from fastai.interpret import ClassificationInterpretation, Interpretation
from fastai.layers import AdaptiveConcatPool2d, ConvLayer
from fastai.tabular.all import Categorify, FillMissing, TabularDataLoaders, tabular_learner
from fastai.text.all import (AWD_LSTM, TextDataLoaders, awd_lstm_clas_config, awd_lstm_lm_config,
    language_model_learner, text_classifier_learner)
from fastai.vision.all import (ImageBlock, ImageDataLoaders, aug_transforms, get_image_files, imagenet_stats, resnet18,
    resnet34, vision_learner)
from kd_fastai.all import *
from kd_fastai.demo import digits, small_net
from support import CPUMixedPrecision, KD, Never, history, hooks, quiet, weights

pytestmark = [pytest.mark.slow, pytest.mark.hostile, pytest.mark.filterwarnings('ignore')]

class Spy:
    "A loss on predictions that keeps its arguments and its values"
    def __init__(self, loss=Logits): self.seen,self.values,self.loss,self.__name__ = [],[],loss,'spy'
    def __call__(self, pred, teacher_pred, target, **kwargs):
        self.seen.append((pred.detach(), teacher_pred, target))
        res = self.loss(pred, teacher_pred)
        self.values.append(res.item())
        return res

def distil(learn, teacher, loss=Logits, **kwargs):
    """Train one epoch with distillation; returns what the loss saw.

    Checks that the column is the mean of the loss, that the student changes, and that `valid_loss` is the task's."""
    before,own = weights(learn),hooks(learn.model)  # a U-Net has hooks of its own
    spy = Spy(loss)
    quiet(learn).fit(1, 1e-2, cbs=KD(teacher, spy, weight=1., **kwargs))
    h = history(learn).iloc[-1]
    assert len(spy.seen)==len(learn.dls.train)
    assert h.index[-1]=='spy'
    assert h.spy>0
    assert h.spy==pytest.approx(np.mean(spy.values), rel=1e-4)
    assert not torch.equal(weights(learn), before)
    assert h.valid_loss==pytest.approx(learn.validate()[0], rel=1e-4)
    assert hooks(learn.model)==own
    return spy.seen

def test_tabular():
    "A tabular model takes several inputs, and other statistics of `Normalize` are an error."
    a,y = np.random.choice(list('xyz'), 64),np.random.choice(['no','yes'], 64)
    df = pd.DataFrame({'a': a, 'b': np.random.randn(64), 'y': y})
    def make(layers, df=df):
        dls = TabularDataLoaders.from_df(df, procs=[Categorify, FillMissing, Normalize], cat_names=['a'],
            cont_names=['b'], y_names='y', valid_idx=list(range(16)), bs=16)
        return tabular_learner(dls, layers=layers)
    teacher = make([32,16])
    seen = distil(make([8]), teacher, SoftTarget)
    assert seen[0][0].shape==seen[0][1].shape==(16,2)
    other = make([8], df.assign(b=df.b*5+3))
    with pytest.raises(ValueError, match='normalized differently'): distil(other, teacher)

@pytest.fixture(scope='module')
def texts():
    words = 'good bad fine poor great awful film plot actor scene'.split()
    set_seed(0)
    text = [' '.join(np.random.choice(words, 12)) for _ in range(48)]
    return pd.DataFrame({'text': text, 'label': np.random.choice(['neg','pos'], 48), 'is_valid': [False]*32+[True]*16})

def lstm_config(c, n_hid):
    c = c.copy(); c.update(emb_sz=8, n_hid=n_hid, n_layers=1)
    return c

def test_text_classification(texts):
    "A classifier of texts outputs tuples and has a hidden state."
    dls = TextDataLoaders.from_df(texts, text_col='text', label_col='label', valid_col='is_valid', bs=8, seq_len=8,
        num_workers=0)
    def make(n):
        return text_classifier_learner(dls, AWD_LSTM, pretrained=False, config=lstm_config(awd_lstm_clas_config, n))
    seen = distil(make(8), make(16), SoftTarget)
    assert seen[0][0].shape==(8,2)

def test_language_model(texts):
    "A language model has its classes on the last axis."
    dls = TextDataLoaders.from_df(texts, text_col='text', valid_col='is_valid', is_lm=True, bs=4, seq_len=8,
        num_workers=0)
    def make(n):
        return language_model_learner(dls, AWD_LSTM, pretrained=False, config=lstm_config(awd_lstm_lm_config, n))
    teacher = make(16)
    seen = distil(make(8), teacher, SoftTarget)
    pred,teacher_pred,y = seen[0]
    assert pred.shape==teacher_pred.shape==(4, len(dls.vocab), 8)
    assert y.shape==(4,8)

class Upsampling(nn.Module):
    def __init__(self, width): super().__init__(); self.down,self.up = ConvLayer(1,width,stride=2),nn.Conv2d(width,3,1)
    def forward(self, x): return F.interpolate(self.up(self.down(x)), scale_factor=2)

def tensors(x, y, bs=8): return DataLoaders.from_dsets(L(zip(x,y)), L(zip(x,y))[:8], bs=bs, num_workers=0)

def test_segmentation():
    "Losses on dense predictions leave void pixels out, and features of a segmentation model match."
    y = torch.randint(0,3,(32,8,8)); y[:,0] = 255
    dls = tensors(torch.rand(32,1,8,8), y)
    def make(n): return Learner(dls, Upsampling(n), loss_func=CrossEntropyLossFlat(axis=1, ignore_index=255))
    seen = distil(make(4), make(8).model, SoftTarget)
    assert seen[0][0].shape==(8*7*8,3)
    assert (seen[0][2]!=255).all()
    learn,teacher = quiet(make(4)),make(8).model
    layers = match_feature_layers(learn.model, teacher, dls.one_batch()[0])
    learn.fit(1, cbs=KD(teacher, Term(Attention, 1000), layers))
    assert history(learn).attention.iloc[0]>0

@pytest.mark.parametrize('loss_func,y', [
    (BCEWithLogitsLossFlat(), torch.rand(32,3).round()), (MSELossFlat(), torch.rand(32,3)),
    (nn.L1Loss(), torch.rand(32,3))],
    ids=['multi-label','regression','plain torch'])
def test_other_heads(loss_func, y):
    dls = tensors(torch.rand(32,5), y)
    seen = distil(Learner(dls, nn.Linear(5,3), loss_func=loss_func), nn.Linear(5,3))
    assert seen[0][0].shape==(8,3)

class HF(nn.Module):
    "A model that returns a dict, as Hugging Face models do"
    def __init__(self, n): super().__init__(); self.body,self.head = nn.Linear(5,n),nn.Linear(n,3)
    def forward(self, x):
        h = self.body(x)
        return {'logits': self.head(h), 'hidden_states': (x,h)}

def test_dictionaries():
    def lf(out, y): return F.cross_entropy(out['logits'], y)
    dls = tensors(torch.rand(32,5), torch.randint(0,3,(32,)))
    seen = distil(Learner(dls, HF(4), loss_func=lf), HF(8), SoftTarget)
    assert seen[0][0].shape==(8,3)

class Picked(nn.Module):
    "Layers that return a tuple and a dict, and one that runs twice"
    def __init__(self):
        super().__init__()
        self.rnn,self.body = nn.LSTM(8,6,batch_first=True),HF(6)
        self.act,self.head = nn.Tanh(),nn.Linear(8,10)
    def start(self, x): return self.rnn(x)[0][:,:,:5]
    def forward(self, x):
        out = self.start(x[:,0])
        return self.head(torch.cat([self.act(out[:,0]+out[:,-1]), self.act(self.body(out.mean(1))['logits'])], 1))

PICKS = {
    'tuple':                ('rnn:0', lambda m,x: m.rnn(x)[0]),
    'function of a tuple':  (('rnn', lambda o: o[0][:,-1]), lambda m,x: m.rnn(x)[0][:,-1]),
    'dict':                 ('body:logits', lambda m,x: m.body(m.start(x).mean(1))['logits']),
    'function of a dict':   (('body', lambda o: o['hidden_states'][1]), lambda m,x: m.body.body(m.start(x).mean(1))),
    'second call':          ('act@1', lambda m,x: m.act(m.body(m.start(x).mean(1))['logits'])),
    'function of a call':   (('act@0', lambda o: o.pow(2)), lambda m,x: m.act(m.start(x)[:,0]+m.start(x)[:,-1]).pow(2))}

@pytest.mark.parametrize('layer,by_hand', PICKS.values(), ids=PICKS)
def test_picks_from_a_layer(layer, by_hand):
    "An output is picked by number, key, call or function, and equals the one computed by hand in both models."
    set_seed(0)
    student,teacher,seen = Picked(),Picked(),[]
    class Keep(Callback):
        def before_batch(self):
            if self.training: seen.append((self.x[:,0], by_hand(self.model, self.x[:,0]).detach()))
    def loss(fm_s, fm_t): seen.append((*fm_s.items(), *fm_t.items())); return FitNet(fm_s, fm_t)
    learn = quiet(Learner(digits(100), student, loss_func=CrossEntropyLossFlat(), cbs=Keep()))
    learn.fit(1, 1e-2, cbs=KD(teacher, loss, layer, weight=1.))
    assert len(seen)==10
    for (x,s),((name,fs),(_,ft)) in zip(seen[::2], seen[1::2]):
        torch.testing.assert_close(fs, s); torch.testing.assert_close(ft, by_hand(teacher, x))
        assert isinstance(name, str)

def test_a_pick_that_fails_is_an_error():
    learn = quiet(Learner(digits(100), Picked(), loss_func=CrossEntropyLossFlat()))
    with pytest.raises(ValueError, match="layer .*has no item"):
        learn.fit(1, cbs=KD(Picked(), FitNet, ('rnn', lambda o: o['nothing'])))

class TakeLogits(Callback):
    "Takes the predictions from a `ModelOutput`, for the loss function, metrics and `predict`"
    def after_pred(self): self.learn.pred = self.pred.logits

def vit(hidden):
    from transformers import ViTConfig, ViTForImageClassification
    set_seed(hidden)
    return ViTForImageClassification(ViTConfig(hidden_size=hidden, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16, image_size=8, patch_size=4, num_channels=1, num_labels=10))

def bert(hidden):
    from transformers import BertConfig, BertForSequenceClassification
    return BertForSequenceClassification(BertConfig(vocab_size=20, hidden_size=hidden, num_hidden_layers=1,
        num_attention_heads=2, intermediate_size=16, num_labels=3, max_position_embeddings=8))

def test_hugging_face_vision():
    "A vision transformer returns a `ModelOutput`, and its features are tokens."
    pytest.importorskip('transformers')
    learn = Learner(digits(100), vit(8), loss_func=CrossEntropyLossFlat(), metrics=accuracy, cbs=TakeLogits())
    teacher = vit(16)
    seen = distil(learn, teacher, SoftTarget)
    assert seen[0][0].shape==(20,10)
    layers = match_feature_layers(learn.model, teacher, learn.dls.one_batch()[0])
    class_token = Term(partial(RKD, angle=0), layers=('vit.layernorm', lambda o: o[:,0]))
    learn.fit(2, 1e-2, cbs=KD(teacher, [SoftTarget, Term(Similarity, 1000), class_token], layers, task_weight=0))
    h = history(learn)[['soft_target','similarity','rkd']]
    assert (h.iloc[1]<h.iloc[0]).sum()>=2
    assert learn.get_preds()[0].shape==(797,10)

def test_hugging_face_text():
    "A text model takes token ids and an attention mask."
    pytest.importorskip('transformers')
    items = [(torch.randint(1,20,(6,)), torch.ones(6), torch.tensor(i%3)) for i in range(32)]
    dls = DataLoaders.from_dsets(items, items[:8], bs=8, num_workers=0)
    seen = distil(Learner(dls, bert(8), loss_func=CrossEntropyLossFlat(), cbs=TakeLogits()), bert(16), SoftTarget)
    assert seen[0][0].shape==seen[0][1].shape==(8,3)

def test_timm(pictures):
    "A model of timm learns from another architecture, created by timm and by `vision_learner`."
    timm = pytest.importorskip('timm')
    dls = image_loaders(pictures)
    teacher = vision_learner(dls, 'test_resnet', pretrained=False)
    plain = Learner(dls, timm.create_model('test_efficientnet', num_classes=2), loss_func=CrossEntropyLossFlat())
    for student in (plain, vision_learner(dls, 'test_efficientnet', pretrained=False)):
        assert distil(student, teacher, SoftTarget)[0][0].shape==(8,2)
        layers = match_feature_layers(student.model, teacher.model, dls.one_batch()[0])
        assert len(layers['student'])>=3
        student.fit(1, cbs=KD(teacher, Term(Attention, 1000), layers))
        assert 0<history(student).attention.iloc[0]<1

def test_unet():
    "fastai's U-Net has features in both halves, and void pixels are left out."
    from fastai.vision.models.unet import DynamicUnet
    y = torch.randint(0,3,(32,16,16)); y[:,0] = 255
    dls = tensors(torch.rand(32,1,16,16), y)
    def make(n):
        set_seed(n)
        body = nn.Sequential(*[ConvLayer(a, b, stride=2) for a,b in ((1,n),(n,2*n),(2*n,4*n))])
        return DynamicUnet(body, 3, (16,16))
    student,teacher = make(2),make(4)
    learn = Learner(dls, student, loss_func=CrossEntropyLossFlat(axis=1, ignore_index=255))
    assert distil(learn, teacher, SoftTarget)[0][0].shape==(8*15*16,3)
    layers = match_feature_layers(student, teacher, dls.one_batch()[0])
    learn.fit(1, cbs=KD(teacher, [Term(Similarity, 1000), Term(Attention, 1000)], layers))
    assert len(layers['student'])>=3
    assert (history(learn)[['similarity','attention']]>0).all(axis=None)

def test_teacher_tfm_makes_the_teachers_inputs():
    "The teacher gets what `teacher_tfm` returns for the student's inputs: another size and normalization."
    set_seed(0)
    teacher,seen = nn.Sequential(nn.AvgPool2d(2), small_net(4)),[]
    def larger(x): return F.interpolate(x*2+1, scale_factor=2)
    def tfm(x): seen.append(x); return larger(x)
    got = distil(Learner(digits(100), small_net(4), loss_func=CrossEntropyLossFlat()), teacher, teacher_tfm=tfm)
    assert len(seen)==len(got)==5
    teacher.eval()
    for x,(_,teacher_pred,_) in zip(seen, got):
        torch.testing.assert_close(teacher_pred, teacher(larger(x)).detach())
        assert not torch.allclose(teacher_pred, teacher(x).detach())

@pytest.fixture(scope='module')
def pictures(tmp_path_factory):
    from PIL import Image
    d = tmp_path_factory.mktemp('pictures')
    for i in range(24):
        pixels = np.random.randint(0, 255, (32,32,3), dtype=np.uint8)
        Image.fromarray(pixels).save(d/f"{'ab'[i%2]}_{i}.png")
    return d

def first_letter(p): return Path(p).name[0]

def image_loaders(pictures, *tfms):
    return ImageDataLoaders.from_name_func(pictures, get_image_files(pictures), first_letter, bs=8, num_workers=0,
        batch_tfms=[*tfms, Normalize.from_stats(*imagenet_stats)])

def test_vision_learner(pictures):
    "A `vision_learner` with augmentation distills while it is frozen and after, then predicts as usual."
    dls = image_loaders(pictures, *aug_transforms(size=32))
    def make(arch): return vision_learner(dls, arch, pretrained=False, metrics=accuracy)
    teacher,student = make(resnet34),quiet(make(resnet18))
    layers = match_feature_layers(student.model, teacher.model, dls.one_batch()[0])
    student.add_cb(KD(teacher, [SoftTarget, Term(Attention, 1000), Term(Similarity, 1000)], layers))
    student.freeze(); student.fit_one_cycle(1, slice(1e-3))
    student.unfreeze(); student.fit_one_cycle(1, slice(1e-5,1e-3))
    h = history(student)
    assert [*h][3:]==['task_loss','soft_target','attention','similarity']
    assert np.isfinite(h.iloc[-1]).all()
    student.predict(get_image_files(pictures)[0]); student.tta(n=1)
    assert student.metrics.attrgot('name')==['accuracy']
    interp = ClassificationInterpretation.from_learner(student)
    assert interp.confusion_matrix().sum()==len(dls.valid_ds)

# ---- other callbacks of fastai

def with_callback(cb, n=2, **kwargs):
    "The Learner after `n` epochs with distillation and another callback"
    set_seed(0)
    learn = quiet(Learner(digits(100), small_net(4), loss_func=LabelSmoothingCrossEntropyFlat(), metrics=accuracy,
        **kwargs))
    kd = KD(small_net(8), [SoftTarget, Term(Attention, 1000)], ['0','1'])
    learn.fit(n, 1e-2, cbs=[kd, *L(cb)])
    assert history(learn).attention.iloc[-1]>0
    return learn

class Watch(Callback):
    "Calls `f(learn)` before each step of the optimizer, and keeps what it returns"
    order,run_valid = GradientClip.order+1,False
    def __init__(self, f): self.f,self.kept = f,[]
    def before_step(self): self.kept.append(self.f(self.learn))

def test_csv_logger_writes_every_column(tmp_path):
    learn = with_callback(CSVLogger(tmp_path/'h.csv'))
    table = pd.read_csv(tmp_path/'h.csv')
    assert [*table][1:-1]==[*history(learn)]
    np.testing.assert_allclose(table[[*history(learn)]], history(learn), rtol=1e-5)

@pytest.mark.parametrize('monitor,comp', [('valid_loss',np.less), ('attention',np.less), ('attention',np.greater)])
def test_save_model_keeps_the_best_epoch(monitor, comp, tmp_path):
    "The best epoch by `valid_loss`, or by the column of a term, is loaded after the fit."
    kept = []
    class Keep(Callback):
        order = 59   # before SaveModelCallback loads its file
        def after_epoch(self): kept.append(weights(self))
    save = SaveModelCallback(monitor=monitor, comp=comp, fname=str(tmp_path/'m'))
    learn = with_callback([save, Keep()], 3)
    h = history(learn)[monitor]
    best = h.argmin() if comp is np.less else h.argmax()
    assert torch.equal(weights(learn), kept[best])

def test_early_stopping_stops():
    "No epoch improves `valid_loss` by 10, so the fit ends after the first and `patience` more."
    assert len(history(with_callback(EarlyStoppingCallback(patience=2, min_delta=10.), 5)))==3

def test_channels_last_features_reach_the_loss():
    "Features of the student are channels_last in every batch."
    formats = []
    def spy(fm_s, fm_t):
        formats.append(fm_s['0'].is_contiguous(memory_format=torch.channels_last))
        return Attention(fm_s, fm_t)
    learn = quiet(Learner(digits(100), small_net(4), loss_func=CrossEntropyLossFlat()))
    learn.fit(1, 1e-2, cbs=[KD(small_net(8), spy, '0'), ChannelsLast()])
    assert formats==[True]*5

def test_gradient_clip_limits_the_gradient_with_distillation():
    def norm(learn): return torch.stack([p.grad.norm() for p in learn.model.parameters()]).norm().item()
    clipped,free = Watch(norm),Watch(norm)
    with_callback([GradientClip(0.1), clipped]); with_callback(free)
    assert len(clipped.kept)==10
    assert max(clipped.kept)<=0.1*(1+1e-4)
    assert min(free.kept)>0.1

def test_bn_freeze_keeps_statistics_of_frozen_layers():
    "fastai freezes batch norm without gradients; the callback must not set it to train mode."
    set_seed(0)
    learn = quiet(Learner(digits(100), small_net(4), loss_func=CrossEntropyLossFlat(), train_bn=False,
        splitter=lambda m: L(m[:2], m[2:]).map(params), cbs=BnFreeze()))
    learn.freeze()
    frozen,trained = learn.model[0][1],learn.model[2][1]
    before = [o.running_mean.clone() for o in (frozen,trained)]
    learn.fit(1, 1e-2, cbs=KD(small_net(8), [SoftTarget, Term(Attention, 1000)], '2'))
    assert torch.equal(frozen.running_mean, before[0])
    assert not torch.equal(trained.running_mean, before[1])

def test_reduce_lr_on_plateau_lowers_the_learning_rate():
    "No epoch improves `valid_loss` by 10, so each epoch after the first divides the learning rate by ten."
    learn = with_callback(ReduceLROnPlateau(patience=1, min_delta=10., factor=10.), 3)
    assert learn.opt.hypers[-1]['lr']==pytest.approx(1e-4)

def test_checkpointing():
    "Non-reentrant checkpoints work; a reentrant one cuts the gradient, and the error says so."
    from torch.utils.checkpoint import checkpoint
    class Net(nn.Module):
        def __init__(self, reentrant):
            super().__init__(); self.a,self.b,self.reentrant = nn.Linear(64,16),nn.Linear(16,10),reentrant
        def body(self, x): return self.a(x).tanh()
        def forward(self, x): return self.b(checkpoint(self.body, x.flatten(1), use_reentrant=self.reentrant))
    def fit(reentrant):
        set_seed(0)
        learn = quiet(Learner(digits(100), Net(reentrant), loss_func=CrossEntropyLossFlat()))
        learn.fit(1, 1e-2, cbs=KD(Net(False), FitNet, 'a', weight=1.))
        return learn
    assert fit(False).recorder.values[-1][-1]>0
    with pytest.raises(ValueError, match="through its layers \\['a'\\].*use_reentrant=False"): fit(True)

def test_compiled_models():
    "A compiled student with a compiled teacher gives the numbers of the plain models."
    def run(wrap):
        torch._dynamo.reset(); set_seed(0)
        dls,student,teacher = digits(100),small_net(4),small_net(8)
        learn = quiet(Learner(dls, wrap(student), loss_func=CrossEntropyLossFlat()))
        learn.fit(1, 1e-2, cbs=KD(wrap(teacher), [SoftTarget, Term(Attention, 1000)], ['0','1']))
        return torch.cat([p.flatten() for p in student.parameters()])
    torch.testing.assert_close(run(noop), run(partial(torch.compile, backend='eager')), rtol=1e-4, atol=1e-5)
    torch._dynamo.reset()

# ---- training features, by their numbers

class Scale(nn.Module):
    "FitNet after a learned scale"
    def __init__(self): super().__init__(); self.w = nn.Parameter(torch.ones(1))
    def forward(self, fm_s, fm_t): return FitNet({k: self.w*v for k,v in fm_s.items()}, fm_t)

def distilled(cbs=None, n=1, losses=None, learn=None, **kwargs):
    "A small training with a loss that owns a weight; returns the Learner, with these weights in `owned`"
    set_seed(0)
    kwargs = {'loss_func': CrossEntropyLossFlat(), 'metrics': accuracy, **kwargs}
    learn = learn or quiet(Learner(kwargs.pop('dls', None) or digits(100), small_net(4), **kwargs))
    kd = KD(small_net(4), losses or [SoftTarget, Term(Scale(), 1., layers='1')])
    set_seed(1)
    learn.fit(n, 1e-2, cbs=[kd, *L(cbs)])
    learn.owned = [p for o in kd.terms if o.module is not None for p in o.module.parameters()]
    return learn

def test_clipping_takes_all_by_one_norm():
    "Parameters of the student and of a loss are clipped by their common norm, as `clip_grad_norm_` does."
    def norm(ps): return torch.stack([p.grad.norm() for p in ps if p.grad is not None]).norm().item()
    def norms(learn): return norm([*learn.model.parameters()]),norm(learn.opt.all_params().itemgot(0))
    before,after = Watch(norms),Watch(norms)
    before.order = GradientClip.order-1
    learn = distilled([before, GradientClip(0.1), after], losses=Term(Scale(), 100., layers='1'))
    assert len(before.kept)==len(after.kept)==5
    for (student,every),(student2,every2) in zip(before.kept, after.kept):
        assert every>student>0.1
        assert every2==pytest.approx(0.1, rel=1e-3)
        assert student2==pytest.approx(student*0.1/every, rel=1e-3)
    assert 'parameters' not in learn.__dict__

@pytest.mark.parametrize('mode,kwargs', [('bf16', {}), ('fp16', {}), ('fp16', dict(init_scale=2.**8))],
    ids=['bf16','fp16','fp16 low scale'])
def test_mixed_precision(mode, kwargs):
    "Half precision is close to full precision in the student, the owned weight and every column."
    full,half = distilled(opt_func=SGD),distilled(CPUMixedPrecision(amp_mode=mode, **kwargs), opt_func=SGD)
    set_seed(0); start = weights(small_net(4))
    assert (weights(half)-weights(full)).norm()<0.1*(weights(full)-start).norm()
    assert 0<(half.owned[0]-full.owned[0]).abs()<0.1*(full.owned[0]-1).abs()
    cols = ['task_loss','soft_target','scale']
    np.testing.assert_allclose(history(half)[cols], history(full)[cols], rtol=0.05)

def test_a_step_that_overflows_is_skipped():
    "No weight changes, owned ones included, until the scaler has found its scale."
    seen = []
    class Watch(Callback):
        order = 70
        def after_batch(self):
            owned = [*self.learn.parameters()][-1].item()
            if self.training: seen.append((self.scaler.get_scale(), weights(self), owned))
    learn = distilled([CPUMixedPrecision(amp_mode='fp16', init_scale=2.**127, backoff_factor=2.**-60), Watch()])
    scales,ws,owned = zip(*seen)
    assert scales[0]<2.**127
    assert torch.equal(ws[0], ws[1])
    assert owned[0]==owned[1]==1.
    assert owned[-1]!=1.
    assert weights(learn).isfinite().all()

def test_accumulation_with_owned_weights():
    "With accumulated gradients, the student's and the owned weights are those of one large batch."
    def run(bs, cbs):
        def net(): set_seed(3); return nn.Sequential(nn.Flatten(), nn.Linear(64,16), nn.Tanh(), nn.Linear(16,10))
        own,t = Scale(),net(); t[1].weight.data.mul_(2)
        learn = quiet(Learner(digits(100, bs=bs), net(), loss_func=CrossEntropyLossFlat(), opt_func=SGD))
        learn.fit(2, 0.1, cbs=[KD(t, [Term(SoftTarget, 0.5), Term(own, 5., layers='2')]), *cbs])
        return torch.cat([weights(learn), own.w.detach()])
    a,b = run(20, [GradientAccumulation(100), GradientClip(0.5)]),run(100, [GradientClip(0.5)])
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    assert a[-1]!=1

@pytest.mark.parametrize('mix', [MixUp, CutMix])
def test_mixed_labels(mix):
    "The teacher gets the mixed inputs; a loss on labels is interpolated between both, by the mean share of the batch."
    seen = []
    def hard(pred, teacher_pred, target):
        seen.append((pred, teacher_pred, target)); return F.cross_entropy(pred, target)
    class Keep(Callback):
        order,run_valid,run = KD.order+1,False,True
        def before_fit(self): self.kept = []
        def after_loss(self):
            task = self.learn.loss_func(self.pred, self.y).item()
            self.kept.append((self.x.clone(), self.y, mixer.yb1[0], mixer.lam, self.loss.item(), task))
    set_seed(0)
    teacher,mixer,keep = small_net(4),mix(),Keep()
    cbs = [KD(teacher, hard, weight=2.), mixer, keep]
    learn = quiet(Learner(digits(100), small_net(4), loss_func=CrossEntropyLossFlat(), cbs=cbs))
    learn.fit(1, 1e-2)
    assert len(seen)==10
    assert len(keep.kept)==5
    for ((p,t,y),(_,_,y1)),(x,ya,yb,lam,loss,task) in zip(zip(seen[::2], seen[1::2]), keep.kept):
        torch.testing.assert_close(t, teacher.eval()(x).detach())
        assert (y==ya).all()
        assert (y1==yb).all()
        assert not (y==y1).all()
        expected = torch.lerp(F.cross_entropy(p,yb), F.cross_entropy(p,ya), lam.mean())
        assert loss==pytest.approx(task+2*expected.item(), rel=1e-5)
        # CutMix has one share for the whole batch, so the mean share is exact
        if mix is CutMix: assert expected.item()==pytest.approx(task, rel=1e-5)

def test_channels_last_gives_the_same_numbers():
    torch.testing.assert_close(weights(distilled(ChannelsLast())), weights(distilled()), rtol=1e-3, atol=1e-5)

def test_trackers_follow_the_task(tmp_path):
    "SaveModel loads the epoch with the best `valid_loss`, which has no part of the teacher's."
    lf = LabelSmoothingCrossEntropyFlat()
    learn = distilled(SaveModelCallback(fname=str(tmp_path/'m')), 3, loss_func=lf)
    best = history(learn).valid_loss.min()
    assert lf(*learn.get_preds(act=noop)).item()==pytest.approx(best, rel=1e-5)
    assert learn.validate()[0]==pytest.approx(best, rel=1e-5)

def test_tensorboard_gets_every_column(tmp_path):
    pytest.importorskip('tensorboard')
    from fastai.callback.tensorboard import TensorBoardCallback
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    learn = distilled(TensorBoardCallback(tmp_path, log_preds=False), 2)
    log = EventAccumulator(str(tmp_path)); log.Reload()
    for k in ('task_loss','soft_target','scale','valid_loss'):
        np.testing.assert_allclose([o.value for o in log.Scalars(k)], history(learn)[k], rtol=1e-5)

def test_training_metrics():
    "A Recorder with `train_metrics` shows the columns for training and for validation."
    learn = quiet(Learner(digits(100), small_net(4), loss_func=CrossEntropyLossFlat(), metrics=accuracy))
    learn.recorder.train_metrics = True
    h = history(distilled(learn=learn))
    assert h.train_soft_target[0]==h.valid_soft_target[0]>0

def test_without_validation_data():
    "With an empty validation set, as fastai's splitters make it, weights and columns are the same."
    dls = digits(100)
    dls.loaders[1] = dls.valid.new(dls.valid.dataset.new_empty())
    learn = distilled(dls=dls)
    assert torch.equal(weights(learn), weights(distilled()))
    assert history(learn).soft_target[0]>0

def test_without_a_validation_set_fastais_own_error_comes():
    alone = DataLoaders(digits(100).train)
    for cbs in (None, KD(small_net(4), SoftTarget)):
        with pytest.raises(IndexError, match='list index out of range'):
            quiet(Learner(alone, small_net(4), loss_func=CrossEntropyLossFlat(), cbs=cbs)).fit(1)

def test_one_callback_for_two_learners():
    "Used by two Learners, one after the other, it gives each the numbers of a callback of its own."
    kd,ws = KD(small_net(4), SoftTarget),[]
    for cb in (kd, kd, KD(kd.teacher.model, SoftTarget)):
        set_seed(0)
        learn = quiet(Learner(digits(100), small_net(4), loss_func=CrossEntropyLossFlat()))
        learn.fit(1, cbs=cb)
        ws.append(weights(learn))
    assert torch.equal(ws[0], ws[1])
    assert torch.equal(ws[0], ws[2])

def test_data_parallel_of_one_device():
    "In `DataParallel` on one device, layers have the names of the model inside."
    pytest.importorskip('accelerate')
    from fastai.distributed import ParallelTrainer
    learn = distilled(ParallelTrainer([]))
    assert isinstance(learn.model, nn.Sequential)
    assert torch.equal(weights(learn), weights(distilled()))

# ---- data without labels

def unlabeled(x): return x, tensor(-100)     # the label that CrossEntropyLoss ignores

def test_imitation_without_labels():
    "Without labels the student is the same as with labels and `task_weight=0`."
    def run(tfms, task_weight):
        set_seed(0)
        x,y = digits(100).train.dataset.tensors
        dls = DataLoaders(TfmdDL(TfmdLists([*x], tfms) if tfms else [*zip(x,y)], bs=20), digits(100).valid)
        learn = quiet(Learner(dls, small_net(4), loss_func=CrossEntropyLossFlat()))
        learn.fit(1, 1e-2, cbs=KD(small_net(4), SoftTarget, weight=1., task_weight=task_weight))
        return learn
    learn = run([unlabeled], 0)
    assert torch.equal(weights(learn), weights(run(None, 0)))
    assert np.isfinite(learn.recorder.values[-1]).all()
    assert torch.equal(weights(learn), weights(run([unlabeled], 1.)))    # no label, no task loss

def test_warns_if_a_loss_reads_labels_and_there_are_none():
    def run(dls):
        learn = quiet(Learner(dls, small_net(4), loss_func=CrossEntropyLossFlat()))
        learn.fit(1, cbs=KD(small_net(4), [SoftTarget, DecoupledKD]))
    images = TfmdLists([*digits(100).train.dataset.tensors[0]], [unlabeled])
    with pytest.warns(UserWarning, match='decoupled_kd .*labels.* no sample .*this epoch'):
        run(DataLoaders(TfmdDL(images, bs=20), digits(100).valid))
    with warnings.catch_warnings():
        warnings.filterwarnings('error', message='.*no sample .*this epoch')
        run(digits(100))

def test_data_block_with_some_labels(pictures):
    "In a `DataBlock` where some samples have no label, a loss on labels gets only those that have one."
    def label(o): return 'ab'.index(o.name[0]) if int(o.stem[2:])<12 else -100
    block = DataBlock((ImageBlock, TransformBlock), get_items=get_image_files, get_y=label,
        splitter=RandomSplitter(0.25, seed=0))
    model = nn.Sequential(ConvLayer(3,4,stride=4), nn.Flatten(), nn.Linear(256,2))
    learn = Learner(block.dataloaders(pictures, bs=6, num_workers=0), model, loss_func=CrossEntropyLossFlat())
    seen = distil(learn, nn.Sequential(nn.Flatten(), nn.Linear(3072,2)), SoftTarget)
    y = torch.cat([o[2] for o in seen])
    assert 0<len(y)<18
    assert (y>=0).all()
    assert np.isfinite(learn.recorder.values[-1]).all()

def test_few_labels():
    "A batch without any label has the loss 0, not nan, and the others have the mean over their labeled samples."
    dls,seen = digits(100),[]
    dls.train.dataset.tensors[1][3:] = -100
    class Keep(Callback):
        order,run_valid = KD.order+1,False
        def after_loss(self):
            task = F.cross_entropy(self.pred, self.y, reduction='sum').item()
            seen.append(((self.y>=0).sum().item(), self.loss.item(), task))
    learn = distilled(Keep(), dls=dls, losses=Term(SoftTarget, 1e-9))
    assert any(n==0 for n,*_ in seen)
    assert any(n>0 for n,*_ in seen)
    for n,loss,task in seen: assert loss==pytest.approx(task/max(n,1), abs=1e-5)
    assert np.isfinite(learn.recorder.values[-1]).all()
    assert weights(learn).isfinite().all()

# ---- outside a fit

def picture_learner(pictures, cbs=None):
    set_seed(0)
    dls = image_loaders(pictures)
    body = nn.Sequential(ConvLayer(3,8,stride=2), AdaptiveConcatPool2d(1), nn.Flatten(), nn.Linear(16,2))
    return quiet(Learner(dls, body, loss_func=CrossEntropyLossFlat(), metrics=accuracy, cbs=cbs, path=pictures))

OUTSIDE = {
    'validate':     lambda l,f: l.validate(),
    'get_preds':    lambda l,f: l.get_preds(with_loss=True),
    'predict':      lambda l,f: l.predict(f),
    'tta':          lambda l,f: l.tta(n=2),
    'summary':      lambda l,f: l.summary(),
    'Interpretation': lambda l,f: [*Interpretation.from_learner(l).top_losses(3)],
    'ClassificationInterpretation': lambda l,f: ClassificationInterpretation.from_learner(l).confusion_matrix(),
    'show_results': lambda l,f: l.show_results(show=False)}

def flat(o): return [x for v in o for x in flat(v)] if isinstance(o, (tuple,list,L)) else [o]

@pytest.mark.parametrize('fitted', [False,True], ids=['unfitted','fitted'])
@pytest.mark.parametrize('what', OUTSIDE)
def test_outside_a_fit(pictures, what, fitted):
    "Results are those without the callback, and the teacher does not run."
    import matplotlib; matplotlib.use('agg')
    file,results = get_image_files(pictures).sorted()[0],[]
    for kd in (KD(picture_learner(pictures).model, SoftTarget), None):
        learn = picture_learner(pictures, kd)
        if fitted: learn.fit(1, 1e-2)
        if kd:
            kd.teacher.model = Never()
            state = learn.model.state_dict()
        learn.model.load_state_dict(state)
        set_seed(2)
        results.append(OUTSIDE[what](learn, file))
        assert learn.metrics.attrgot('name')==['accuracy']
        assert hooks(learn.model)==0
    ours,plain = map(flat, results)
    assert len(ours)==len(plain)>0
    for a,b in zip(ours, plain):
        if isinstance(a, (Tensor,np.ndarray,float)): np.testing.assert_allclose(a, b, rtol=1e-6)
        # a summary lists the callbacks
        elif what=='summary': assert [o for o in a.splitlines() if 'KnowledgeDistillation' not in o]==b.splitlines()
        else: assert a==b

PREDICT = """
import sys
sys.modules['kd_fastai'] = None
from fastai.vision.all import *
def first_letter(p): return Path(p).name[0]
sys.modules['test_any_learner'] = sys.modules['__main__']
print(load_learner({learner!r}).predict({file!r})[2].tolist())
"""

def test_an_exported_learner_predicts_without_kd_fastai(pictures):
    "The file has the size of one without distillation, within 1%, and predicts the same in another process."
    sizes,file = [],get_image_files(pictures).sorted()[0]
    kd = KD(picture_learner(pictures).model, [SoftTarget, Term(Scale(), layers='0')])
    for name,cb in (('plain.pkl', None), ('kd.pkl', kd)):
        learn = picture_learner(pictures, cb)
        learn.fit(1, 1e-2)
        learn.recorder.metric_names = learn.recorder.values = learn.recorder.log = learn.final_record = None
        learn.export(name)
        sizes.append((pictures/name).stat().st_size)
    assert sizes[1]==pytest.approx(sizes[0], rel=0.01)
    expected = learn.predict(file)
    code = PREDICT.format(learner=str(pictures/'kd.pkl'), file=str(file))
    r = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], capture_output=True, text=True)
    assert r.returncode==0, r.stderr
    assert eval(r.stdout)==pytest.approx(expected[2].tolist(), rel=1e-5)

def test_copies_and_pickles():
    "A copied Learner goes on distilling, and a pickled one has no teacher."
    learn = distilled()
    learn.add_cb(KD(small_net(4), [SoftTarget, Term(Scale(), layers=('1', lambda o: o.tanh()))]))
    twin = deepcopy(learn)
    for l in (learn, twin):
        l.dls = digits(100)
        set_seed(5)
        l.fit(1, 1e-2)
    assert torch.equal(weights(learn), weights(twin))
    assert learn.knowledge_distillation.teacher is twin.knowledge_distillation.teacher
    assert torch.equal(learn.knowledge_distillation.terms[1].loss.w, twin.knowledge_distillation.terms[1].loss.w)
    other = pickle.loads(pickle.dumps(learn))
    assert torch.equal(weights(other), weights(learn))
    assert not any(isinstance(cb, KD) for cb in other.cbs)
