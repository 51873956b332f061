"The callback in the Learners that people have: other data, other heads, other callbacks."
import pickle, subprocess, sys, warnings
from contextlib import suppress
from copy import deepcopy
import numpy as np, pandas as pd, pytest, torch, torch.nn.functional as F
from torch import nn
from fastai.vision.all import *
from fastai.tabular.all import *
from fastai.text.all import *
from fastai.callback.all import *
from kd_fastai.all import *
from kd_fastai.demo import digits, small_net

for o in [*globals()]:
    if o=='test' or o.startswith('test_'): del globals()[o]  # fastcore's own helpers, which pytest would take for tests

pytestmark = pytest.mark.filterwarnings('ignore')

def quiet(learn):
    learn.remove_cb(ProgressCallback)
    learn.logger = noop
    return learn

def weights(m): return torch.cat([p.detach().flatten().clone() for p in getattr(m, 'model', m).parameters()])
def hooks(*models): return sum(len(o._forward_hooks)+len(o._forward_pre_hooks) for m in models for o in m.modules())
def history(learn): return pd.DataFrame(learn.recorder.values, columns=learn.recorder.metric_names[1:-1])

class Spy:
    "A loss that keeps what it saw and gave, and compares predictions"
    def __init__(self, loss=Logits): self.seen,self.values,self.loss,self.__name__ = [],[],loss,'spy'
    def __call__(self, pred, teacher_pred, target, **kwargs):
        self.seen.append((pred.detach(), teacher_pred, target))
        res = self.loss(pred, teacher_pred)
        self.values.append(res.item())
        return res

def distil(learn, teacher, loss=Logits, **kwargs):
    "One epoch; returns what the loss saw. Its column is the mean, the student has moved, `valid_loss` is the task's, and nothing stays"
    before,own = weights(learn),hooks(learn.model)  # a U-Net has hooks of its own
    spy = Spy(loss)
    quiet(learn).fit(1, 1e-2, cbs=KnowledgeDistillationCallback(teacher, spy, weight=1., **kwargs))
    v = learn.recorder.values[-1]
    assert len(spy.seen)==len(learn.dls.train) and learn.recorder.metric_names[-2]=='spy' and v[-1]==pytest.approx(np.mean(spy.values), rel=1e-4) and v[-1]>0
    assert not (weights(learn)==before).all() and v[1]==pytest.approx(learn.validate()[0], rel=1e-4)
    assert hooks(learn.model)==own
    return spy.seen

def test_tabular():
    "several inputs, categorical and continuous"
    df = pd.DataFrame({'a': np.random.choice(list('xyz'), 64), 'b': np.random.randn(64), 'y': np.random.choice(['no','yes'], 64)})
    def make(layers):
        dls = TabularDataLoaders.from_df(df, procs=[Categorify, FillMissing, Normalize], cat_names=['a'], cont_names=['b'], y_names='y', valid_idx=list(range(16)), bs=16)
        return tabular_learner(dls, layers=layers)
    teacher = make([32,16])
    seen = distil(make([8]), teacher, SoftTarget)
    assert seen[0][0].shape==seen[0][1].shape==(16,2)
    df2 = df.assign(b=df.b*5+3)
    other = tabular_learner(TabularDataLoaders.from_df(df2, procs=[Categorify, FillMissing, Normalize], cat_names=['a'], cont_names=['b'], y_names='y', valid_idx=list(range(16)), bs=16), layers=[8])
    with pytest.raises(ValueError, match='normalized differently'): distil(other, teacher)

@pytest.fixture(scope='module')
def texts():
    words = 'good bad fine poor great awful film plot actor scene'.split()
    set_seed(0)
    return pd.DataFrame({'text': [' '.join(np.random.choice(words, 12)) for _ in range(48)], 'label': np.random.choice(['neg','pos'], 48), 'is_valid': [False]*32+[True]*16})

def lstm_config(c, n_hid):
    c = c.copy(); c.update(emb_sz=8, n_hid=n_hid, n_layers=1)
    return c

def test_text_classification(texts):
    "outputs that are tuples, a hidden state that is reset"
    dls = TextDataLoaders.from_df(texts, text_col='text', label_col='label', valid_col='is_valid', bs=8, seq_len=8)
    def make(n): return text_classifier_learner(dls, AWD_LSTM, pretrained=False, config=lstm_config(awd_lstm_clas_config, n))
    seen = distil(make(8), make(16), SoftTarget)
    assert seen[0][0].shape==(8,2)

def test_language_model(texts):
    "classes on the last axis"
    dls = TextDataLoaders.from_df(texts, text_col='text', valid_col='is_valid', is_lm=True, bs=4, seq_len=8)
    def make(n): return language_model_learner(dls, AWD_LSTM, pretrained=False, config=lstm_config(awd_lstm_lm_config, n))
    teacher = make(16)
    seen = distil(make(8), teacher, SoftTarget)
    pred,teacher_pred,y = seen[0]
    assert pred.shape==teacher_pred.shape==(4, len(dls.vocab), 8) and y.shape==(4,8)

class Upsampling(nn.Module):
    def __init__(self, width): super().__init__(); self.down,self.up = ConvLayer(1,width,stride=2),nn.Conv2d(width,3,1)
    def forward(self, x): return F.interpolate(self.up(self.down(x)), scale_factor=2)

def tensors(x, y, bs=8): return DataLoaders.from_dsets(L(zip(x,y)), L(zip(x,y))[:8], bs=bs, num_workers=0)

def test_segmentation():
    "dense predictions, features too; void pixels are left out"
    y = torch.randint(0,3,(32,8,8)); y[:,0] = 255
    dls = tensors(torch.rand(32,1,8,8), y)
    def make(n): return Learner(dls, Upsampling(n), loss_func=CrossEntropyLossFlat(axis=1, ignore_index=255))
    seen = distil(make(4), make(8).model, SoftTarget)
    assert seen[0][0].shape==(8*7*8,3) and (seen[0][2]!=255).all()
    quiet(l := make(4)).fit(1, cbs=KnowledgeDistillationCallback(make(8).model, Term(Attention, 1000), match_feature_layers(make(4).model, make(8).model, dls.one_batch()[0])))

@pytest.mark.parametrize('loss_func,y', [(BCEWithLogitsLossFlat(), torch.rand(32,3).round()), (MSELossFlat(), torch.rand(32,3)), (nn.L1Loss(), torch.rand(32,3))], ids=['multi-label','regression','plain torch'])
def test_other_heads(loss_func, y):
    dls = tensors(torch.rand(32,5), y)
    seen = distil(Learner(dls, nn.Linear(5,3), loss_func=loss_func), nn.Linear(5,3))
    assert seen[0][0].shape==(8,3)

class HF(nn.Module):
    "Returns what Hugging Face models return"
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
    "Layers that put out a tuple and a dict, and one that runs twice"
    def __init__(self): super().__init__(); self.rnn,self.body,self.act,self.head = nn.LSTM(8,6,batch_first=True),HF(6),nn.Tanh(),nn.Linear(8,10)
    def forward(self, x):
        out = self.rnn(x[:,0])[0][:,:,:5]
        return self.head(torch.cat([self.act(out[:,0]+out[:,-1]), self.act(self.body(out.mean(1))['logits'])], 1))

@pytest.mark.parametrize('layer,by_hand', [
    ('rnn:0', lambda m,x: m.rnn(x)[0]), (('rnn', lambda o: o[0][:,-1]), lambda m,x: m.rnn(x)[0][:,-1]), ('body:logits', lambda m,x: m.body(m.rnn(x)[0][:,:,:5].mean(1))['logits']),
    (('body', lambda o: o['hidden_states'][1]), lambda m,x: m.body.body(m.rnn(x)[0][:,:,:5].mean(1))), ('act@1', lambda m,x: m.act(m.body(m.rnn(x)[0][:,:,:5].mean(1))['logits'])),
    (('act@0', lambda o: o.pow(2)), lambda m,x: m.act((m.rnn(x)[0][:,0]+m.rnn(x)[0][:,-1])[:,:5]).pow(2))], ids=['tuple','function of a tuple','dict','function of a dict','second call','function of a call'])
def test_picks_from_a_layer(layer, by_hand):
    "by number, key, call or function; student's and teacher's features are what the layer gives by hand"
    set_seed(0)
    student,teacher,seen = Picked(),Picked(),[]
    class Keep(Callback):
        def before_batch(self):
            if self.training: seen.append((self.x[:,0], by_hand(self.model, self.x[:,0]).detach()))
    def loss(fm_s, fm_t): seen.append((*fm_s.items(), *fm_t.items())); return FitNet(fm_s, fm_t)
    learn = quiet(Learner(digits(100), student, loss_func=CrossEntropyLossFlat(), cbs=Keep()))
    learn.fit(1, 1e-2, cbs=KnowledgeDistillationCallback(teacher, loss, layer, weight=1.))
    assert len(seen)==10
    for (x,s),((name,fs),(_,ft)) in zip(seen[::2], seen[1::2]):
        torch.testing.assert_close(fs, s); torch.testing.assert_close(ft, by_hand(teacher, x))
        assert isinstance(name, str)
    with pytest.raises(ValueError, match="student layer .*has no item"): learn.fit(1, cbs=KnowledgeDistillationCallback(teacher, FitNet, ('rnn', lambda o: o['nothing'])))

class TakeLogits(Callback):
    "Predictions out of a `ModelOutput`, for the loss function, metrics and `predict`"
    def after_pred(self): self.learn.pred = self.pred.logits

def vit(hidden):
    from transformers import ViTConfig, ViTForImageClassification
    set_seed(hidden)
    return ViTForImageClassification(ViTConfig(hidden_size=hidden, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=8, patch_size=4, num_channels=1, num_labels=10))

def bert(hidden):
    from transformers import BertConfig, BertForSequenceClassification
    return BertForSequenceClassification(BertConfig(vocab_size=20, hidden_size=hidden, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, num_labels=3, max_position_embeddings=8))

def test_hugging_face_vision():
    "A `ModelOutput` with logits, tokens for features"
    pytest.importorskip('transformers')
    learn,teacher = Learner(digits(100), vit(8), loss_func=CrossEntropyLossFlat(), metrics=accuracy, cbs=TakeLogits()),vit(16)
    seen = distil(learn, teacher, SoftTarget)
    assert seen[0][0].shape==(20,10)
    layers = match_feature_layers(learn.model, teacher, learn.dls.one_batch()[0])
    learn.fit(2, 1e-2, cbs=KnowledgeDistillationCallback(teacher, [SoftTarget, Term(Similarity, 1000), Term(partial(RKD, angle=0), layers=('vit.layernorm', lambda o: o[:,0]))], layers, task_weight=0))
    h = history(learn)
    assert (h[['soft_target','similarity','rkd']].iloc[1]<h[['soft_target','similarity','rkd']].iloc[0]).sum()>=2
    assert learn.get_preds()[0].shape==(797,10)

def test_hugging_face_text():
    "Several inputs: token ids and an attention mask"
    pytest.importorskip('transformers')
    items = [(torch.randint(1,20,(6,)), torch.ones(6), torch.tensor(i%3)) for i in range(32)]
    dls = DataLoaders.from_dsets(items, items[:8], bs=8, num_workers=0)
    seen = distil(Learner(dls, bert(8), loss_func=CrossEntropyLossFlat(), cbs=TakeLogits()), bert(16), SoftTarget)
    assert seen[0][0].shape==seen[0][1].shape==(8,3)

def test_timm(pictures):
    "a model of timm, as it is and as `vision_learner` makes it; the teacher is of another architecture"
    timm = pytest.importorskip('timm')
    dls = ImageDataLoaders.from_name_func(pictures, get_image_files(pictures), first_letter, bs=8, num_workers=0, batch_tfms=Normalize.from_stats(*imagenet_stats))
    teacher = vision_learner(dls, 'test_resnet', pretrained=False)
    plain = Learner(dls, timm.create_model('test_efficientnet', num_classes=2), loss_func=CrossEntropyLossFlat())
    for student in (plain, vision_learner(dls, 'test_efficientnet', pretrained=False)):
        assert distil(student, teacher, SoftTarget)[0][0].shape==(8,2)
        layers = match_feature_layers(student.model, teacher.model, dls.one_batch()[0])
        assert len(layers['student'])>=3
        student.fit(1, cbs=KnowledgeDistillationCallback(teacher, Term(Attention, 1000), layers))
        assert 0<history(student).attention.iloc[0]<1

def test_unet():
    "fastai's own, on a small body: maps of predictions, features of both halves, void pixels"
    from fastai.vision.models.unet import DynamicUnet
    y = torch.randint(0,3,(32,16,16)); y[:,0] = 255
    dls = tensors(torch.rand(32,1,16,16), y)
    def make(n): set_seed(n); return DynamicUnet(nn.Sequential(*[ConvLayer(a, b, stride=2) for a,b in ((1,n),(n,2*n),(2*n,4*n))]), 3, (16,16))
    student,teacher = make(2),make(4)
    learn = Learner(dls, student, loss_func=CrossEntropyLossFlat(axis=1, ignore_index=255))
    assert distil(learn, teacher, SoftTarget)[0][0].shape==(8*15*16,3)
    layers = match_feature_layers(student, teacher, dls.one_batch()[0])
    learn.fit(1, cbs=KnowledgeDistillationCallback(teacher, [Term(Similarity, 1000), Term(Attention, 1000)], layers))
    assert len(layers['student'])>=3 and (history(learn)[['similarity','attention']]>0).all(axis=None)

def test_other_input_size_and_normalisation():
    "the teacher gets what `teacher_tfm` makes of the student's inputs"
    set_seed(0)
    teacher,seen = nn.Sequential(nn.AvgPool2d(2), small_net(4)),[]
    def tfm(x): seen.append(x); return F.interpolate(x*2+1, scale_factor=2)
    got = distil(Learner(digits(100), small_net(4), loss_func=CrossEntropyLossFlat()), teacher, teacher_tfm=tfm)
    for x,(_,t,_) in zip(seen, got): torch.testing.assert_close(t, teacher.eval()(F.interpolate(x*2+1, scale_factor=2)).detach())

@pytest.fixture(scope='module')
def pictures(tmp_path_factory):
    from PIL import Image
    d = tmp_path_factory.mktemp('pictures')
    for i in range(24): Image.fromarray(np.random.randint(0,255,(32,32,3),dtype=np.uint8)).save(d/f"{'ab'[i%2]}_{i}.png")
    return d

def first_letter(p): return Path(p).name[0]

def test_vision_learner(pictures):
    "pictures, augmentation, torchvision bodies, freezing; the features that match are there"
    dls = ImageDataLoaders.from_name_func(pictures, get_image_files(pictures), first_letter, bs=8, num_workers=0, batch_tfms=[*aug_transforms(size=32), Normalize.from_stats(*imagenet_stats)])
    def make(arch): return vision_learner(dls, arch, pretrained=False, metrics=accuracy)
    teacher,student = make(resnet34),quiet(make(resnet18))
    layers = match_feature_layers(student.model, teacher.model, dls.one_batch()[0])
    student.add_cb(KnowledgeDistillationCallback(teacher, [SoftTarget, Term(Attention, 1000), Term(Similarity, 1000)], layers))
    student.freeze(); student.fit_one_cycle(1, slice(1e-3)); student.unfreeze(); student.fit_one_cycle(1, slice(1e-5,1e-3))
    names = student.recorder.metric_names
    assert [*names][4:8]==['task_loss','soft_target','attention','similarity'] and all(np.isfinite(student.recorder.values[-1]))
    student.predict(get_image_files(pictures)[0]); student.tta(n=1)
    assert student.metrics.attrgot('name')==['accuracy']
    interp = ClassificationInterpretation.from_learner(student)
    assert interp.confusion_matrix().sum()==len(dls.valid_ds)

@pytest.mark.parametrize('cb', [lambda p: CSVLogger(p/'h.csv'), lambda p: SaveModelCallback(monitor='valid_loss', fname=str(p/'m')), lambda p: EarlyStoppingCallback(monitor='valid_loss'),
    lambda p: SaveModelCallback(monitor='attention', comp=np.less, fname=str(p/'m')), lambda p: ChannelsLast(), lambda p: GradientClip(0.1), lambda p: BnFreeze(), lambda p: ReduceLROnPlateau()],
    ids=['CSVLogger','SaveModel','EarlyStopping','SaveModel on a term','ChannelsLast','GradientClip','BnFreeze','ReduceLROnPlateau'])
def test_other_callbacks(cb, tmp_path):
    set_seed(0)
    dls,teacher = digits(100),small_net(8)
    learn = quiet(Learner(dls, small_net(4), loss_func=LabelSmoothingCrossEntropyFlat(), metrics=accuracy, path=tmp_path))
    learn.fit(2, 1e-2, cbs=[KnowledgeDistillationCallback(teacher, [SoftTarget, Term(Attention, 1000)], ['0','1']), cb(tmp_path)])
    assert learn.recorder.values[-1][-1]>0
    if (f := tmp_path/'h.csv').exists(): assert [*pd.read_csv(f)][4:7]==['task_loss','soft_target','attention'] and len(pd.read_csv(f))==2

def test_checkpointing():
    "Non-reentrant checkpoints work; a reentrant one cuts the gradient, and is named"
    from torch.utils.checkpoint import checkpoint
    class Net(nn.Module):
        def __init__(self, reentrant): super().__init__(); self.a,self.b,self.reentrant = nn.Linear(64,16),nn.Linear(16,10),reentrant
        def body(self, x): return self.a(x).tanh()
        def forward(self, x): return self.b(checkpoint(self.body, x.flatten(1), use_reentrant=self.reentrant))
    def fit(reentrant):
        set_seed(0)
        learn = quiet(Learner(digits(100), Net(reentrant), loss_func=CrossEntropyLossFlat()))
        learn.fit(1, 1e-2, cbs=KnowledgeDistillationCallback(Net(False), FitNet, 'a', weight=1.))
        return learn
    assert fit(False).recorder.values[-1][-1]>0
    with pytest.raises(ValueError, match="through its layers \\['a'\\].*use_reentrant=False"): fit(True)

def test_compiled_models():
    "give the numbers of the plain ones"
    def run(wrap):
        torch._dynamo.reset(); set_seed(0)
        dls,student,teacher = digits(100),small_net(4),small_net(8)
        learn = quiet(Learner(dls, wrap(student), loss_func=CrossEntropyLossFlat()))
        learn.fit(1, 1e-2, cbs=KnowledgeDistillationCallback(wrap(teacher), [SoftTarget, Term(Attention, 1000)], ['0','1']))
        return torch.cat([p.flatten() for p in student.parameters()])
    torch.testing.assert_close(run(noop), run(partial(torch.compile, backend='eager')), rtol=1e-4, atol=1e-5)
    torch._dynamo.reset()

# ---- training features, by their numbers

class Scale(nn.Module):
    "FitNet after a scale that is learned"
    def __init__(self): super().__init__(); self.w = nn.Parameter(torch.ones(1))
    def forward(self, fm_s, fm_t): return FitNet({k: self.w*v for k,v in fm_s.items()}, fm_t)

def distilled(cbs=None, n=1, losses=None, learn=None, **kwargs):
    "The same small training, but for what is given"
    set_seed(0)
    learn = learn or quiet(Learner(kwargs.pop('dls', None) or digits(100), small_net(4), loss_func=kwargs.pop('loss_func', CrossEntropyLossFlat()), metrics=accuracy, **kwargs))
    kd = KnowledgeDistillationCallback(small_net(4), losses or [SoftTarget, Term(Scale(), 1., layers='1')])
    set_seed(1)
    learn.fit(n, 1e-2, cbs=[kd, *L(cbs)])
    learn.owned = [p for o in kd.terms if o.module is not None for p in o.module.parameters()]
    return learn

def test_clipping_takes_all_by_one_norm():
    "student's and owned parameters, as `clip_grad_norm_` clips them together"
    class Watch(Callback):
        run_valid = False
        def __init__(self, order): self.order,self.norms = order,[]
        def before_step(self): self.norms.append((self.norm([*self.model.parameters()]), self.norm(self.opt.all_params().itemgot(0))))
        def norm(self, ps): return torch.stack([p.grad.norm() for p in ps if p.grad is not None]).norm().item()
    before,after = Watch(GradientClip.order-1),Watch(GradientClip.order+1)
    learn = distilled([before, GradientClip(0.1), after], losses=Term(Scale(), 100., layers='1'))
    for (s,a),(s2,a2) in zip(before.norms, after.norms):
        assert a>s>0.1 and a2==pytest.approx(0.1, rel=1e-3) and s2==pytest.approx(s*0.1/a, rel=1e-3)
    assert len(after.norms)==5 and 'parameters' not in learn.__dict__

class CPUMixedPrecision(MixedPrecision):
    "fastai's own says 'cuda'"
    def before_fit(self):
        super().before_fit()
        self.autocast,self.learn.scaler = torch.autocast('cpu', dtype=torch.bfloat16 if self.amp_mode==AMPMode.BF16 else torch.float16),torch.amp.GradScaler('cpu', **self.kwargs)

@pytest.mark.parametrize('mode,kwargs', [('bf16', {}), ('fp16', {}), ('fp16', dict(init_scale=2.**8))], ids=['bf16','fp16','fp16 low scale'])
def test_mixed_precision(mode, kwargs):
    "is close to full precision, in the student, the owned weight and every column"
    full,half = distilled(opt_func=SGD),distilled(CPUMixedPrecision(amp_mode=mode, **kwargs), opt_func=SGD)
    set_seed(0); start = weights(small_net(4))
    assert (weights(half)-weights(full)).norm()<0.1*(weights(full)-start).norm()
    assert 0<(half.owned[0]-full.owned[0]).abs()<0.1*(full.owned[0]-1).abs()
    cols = ['task_loss','soft_target','scale']
    np.testing.assert_allclose(history(half)[cols], history(full)[cols], rtol=0.05)

def test_a_step_that_overflows_is_skipped():
    "for owned weights too: nothing moves until the scaler has found its scale"
    seen = []
    class Watch(Callback):
        order = 70
        def after_batch(self):
            if self.training: seen.append((self.scaler.get_scale(), weights(self), [p.item() for p in [*self.learn.parameters()][-1:]]))
    learn = distilled([CPUMixedPrecision(amp_mode='fp16', init_scale=2.**127, backoff_factor=2.**-60), Watch()])
    scales,ws,owned = zip(*seen)
    assert scales[0]<2.**127 and torch.equal(ws[0], ws[1]) and owned[0]==owned[1]==[1.] and owned[-1]!=[1.]
    assert weights(learn).isfinite().all()

def test_accumulation_with_owned_weights():
    "the student's and theirs are those of one large batch"
    def run(bs, cbs):
        def net(): set_seed(3); return nn.Sequential(nn.Flatten(), nn.Linear(64,16), nn.Tanh(), nn.Linear(16,10))
        own,t = Scale(),net(); t[1].weight.data.mul_(2)
        learn = quiet(Learner(digits(100, bs=bs), net(), loss_func=CrossEntropyLossFlat(), opt_func=SGD))
        learn.fit(2, 0.1, cbs=[KnowledgeDistillationCallback(t, [SoftTarget, Term(own, 5., layers='2')]), *cbs])
        return torch.cat([weights(learn), own.w.detach()])
    a,b = run(20, [GradientAccumulation(100), GradientClip(0.5)]),run(100, [GradientClip(0.5)])
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    assert a[-1]!=1

@pytest.mark.parametrize('mix', [MixUp, CutMix])
def test_mixed_labels(mix):
    "the teacher sees the mixed pictures; a loss with labels is interpolated between both, by the mean share of the batch"
    seen = []
    def hard(pred, teacher_pred, target): seen.append((pred, teacher_pred, target)); return F.cross_entropy(pred, target)
    class Keep(Callback):
        order,run_valid,run = KnowledgeDistillationCallback.order+1,False,True
        def before_fit(self): self.kept = []
        def after_loss(self): self.kept.append((self.x.clone(), self.y, mixer.yb1[0], mixer.lam, self.loss.item(), self.learn.loss_func(self.pred, self.y).item()))
    set_seed(0)
    teacher,mixer,keep = small_net(4),mix(),Keep()
    learn = quiet(Learner(digits(100), small_net(4), loss_func=CrossEntropyLossFlat(), cbs=[KnowledgeDistillationCallback(teacher, hard, weight=2.), mixer, keep]))
    learn.fit(1, 1e-2)
    assert len(seen)==10 and len(keep.kept)==5
    for ((p,t,y),(_,_,y1)),(x,ya,yb,lam,loss,task) in zip(zip(seen[::2], seen[1::2]), keep.kept):
        torch.testing.assert_close(t, teacher.eval()(x).detach())
        assert (y==ya).all() and (y1==yb).all() and not (y==y1).all()
        expected = torch.lerp(F.cross_entropy(p,yb), F.cross_entropy(p,ya), lam.mean())
        assert loss==pytest.approx(task+2*expected.item(), rel=1e-5)
        if mix is CutMix: assert expected.item()==pytest.approx(task, rel=1e-5)  # it has one share for all, so this is exact

def test_channels_last_gives_the_same_numbers():
    torch.testing.assert_close(weights(distilled(ChannelsLast())), weights(distilled()), rtol=1e-3, atol=1e-5)

def test_trackers_follow_the_task(tmp_path):
    "SaveModel and EarlyStopping see a valid_loss without the teacher, here with label smoothing"
    lf = LabelSmoothingCrossEntropyFlat()
    learn = distilled([SaveModelCallback(fname=str(tmp_path/'m')), EarlyStoppingCallback(patience=2, min_delta=10.)], 5, loss_func=lf)
    h = history(learn)
    assert len(h)==3   # the best, and two that are no better by 10
    preds = learn.get_preds(act=noop)
    assert lf(*preds).item()==pytest.approx(h.valid_loss.min(), rel=1e-5)==learn.validate()[0]

def test_tensorboard(tmp_path):
    "gets every column"
    pytest.importorskip('tensorboard')
    from fastai.callback.tensorboard import TensorBoardCallback
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    learn = distilled(TensorBoardCallback(tmp_path, log_preds=False), 2)
    log = EventAccumulator(str(tmp_path)); log.Reload()
    for k in ('task_loss','soft_target','scale','valid_loss'): np.testing.assert_allclose([o.value for o in log.Scalars(k)], history(learn)[k], rtol=1e-5)

def test_csv(tmp_path):
    learn = distilled(CSVLogger(tmp_path/'h.csv'), 2)
    np.testing.assert_allclose(pd.read_csv(tmp_path/'h.csv')[[*history(learn)]], history(learn), rtol=1e-5)

def test_training_metrics():
    "a Recorder with train_metrics shows the columns beside both"
    learn = quiet(Learner(digits(100), small_net(4), loss_func=CrossEntropyLossFlat(), metrics=accuracy))
    learn.recorder.train_metrics = True
    h = history(distilled(learn=learn))
    assert h.train_soft_target[0]==h.valid_soft_target[0]>0

def test_without_validation_data():
    "an empty validation set, as fastai's splitters make; the columns are there all the same"
    dls = digits(100)
    dls.loaders[1] = dls.valid.new(dls.valid.dataset.new_empty())
    learn = distilled(dls=dls)
    assert torch.equal(weights(learn), weights(distilled())) and history(learn).soft_target[0]>0
    alone = DataLoaders(digits(100).train)     # none at all is fastai's own IndexError, with a teacher and without
    for cbs in (None, KnowledgeDistillationCallback(small_net(4), SoftTarget)):
        with pytest.raises(IndexError): quiet(Learner(alone, small_net(4), loss_func=CrossEntropyLossFlat(), cbs=cbs)).fit(1)

def test_one_callback_for_two_learners():
    "one after the other, as if each had its own"
    kd,ws = KnowledgeDistillationCallback(small_net(4), SoftTarget),[]
    for cb in (kd, kd, KnowledgeDistillationCallback(kd.teacher.model, SoftTarget)):
        set_seed(0); learn = quiet(Learner(digits(100), small_net(4), loss_func=CrossEntropyLossFlat())); learn.fit(1, cbs=cb); ws.append(weights(learn))
    assert torch.equal(ws[0], ws[1]) and torch.equal(ws[0], ws[2])

def test_data_parallel_of_one_device():
    "`to_parallel` without a second device: names are those of the model inside"
    pytest.importorskip('accelerate')
    from fastai.distributed import ParallelTrainer
    learn = distilled(ParallelTrainer([]))
    assert isinstance(learn.model, nn.Sequential) and torch.equal(weights(learn), weights(distilled()))

# ---- data without labels

def unlabelled(x): return x, tensor(-100)     # the placeholder that CrossEntropyLoss leaves out

def test_imitation_without_labels():
    "pictures alone, and a placeholder by a transform: the same student as from the labelled ones with task_weight=0"
    def run(tfms, task_weight):
        set_seed(0)
        x,y = digits(100).train.dataset.tensors
        dls = DataLoaders(TfmdDL(TfmdLists([*x], tfms) if tfms else [*zip(x,y)], bs=20), digits(100).valid)
        learn = quiet(Learner(dls, small_net(4), loss_func=CrossEntropyLossFlat()))
        learn.fit(1, 1e-2, cbs=KnowledgeDistillationCallback(small_net(4), SoftTarget, weight=1., task_weight=task_weight))
        return learn
    learn = run([unlabelled], 0)
    assert torch.equal(weights(learn), weights(run(None, 0))) and np.isfinite(learn.recorder.values[-1]).all()
    assert torch.equal(weights(learn), weights(run([unlabelled], 1.)))    # no label, no task loss

def test_a_loss_that_reads_labels_says_that_there_are_none():
    learn = quiet(Learner(DataLoaders(TfmdDL(TfmdLists([*digits(100).train.dataset.tensors[0]], [unlabelled]), bs=20), digits(100).valid), small_net(4), loss_func=CrossEntropyLossFlat()))
    with pytest.warns(UserWarning, match='decoupled_kd reads labels, and no sample of this epoch had one'): learn.fit(1, cbs=KnowledgeDistillationCallback(small_net(4), [SoftTarget, DecoupledKD]))
    learn = quiet(Learner(digits(100), small_net(4), loss_func=CrossEntropyLossFlat()))
    with warnings.catch_warnings(): warnings.simplefilter('error'); learn.fit(1, cbs=KnowledgeDistillationCallback(small_net(4), [SoftTarget, DecoupledKD]))

def test_data_block_with_some_labels(pictures):
    "as the page on any Learner has it"
    block = DataBlock((ImageBlock, TransformBlock), get_items=get_image_files, get_y=lambda o: 'ab'.index(o.name[0]) if int(o.stem[2:])<12 else -100, splitter=RandomSplitter(0.25, seed=0))
    learn = Learner(block.dataloaders(pictures, bs=6, num_workers=0), nn.Sequential(ConvLayer(3,4,stride=4), nn.Flatten(), nn.Linear(256,2)), loss_func=CrossEntropyLossFlat())
    seen = distil(learn, nn.Sequential(nn.Flatten(), nn.Linear(3072,2)), SoftTarget)
    y = torch.cat([o[2] for o in seen])    # a loss that asks for labels is given the samples that have one
    assert 0<len(y)<18 and (y>=0).all() and np.isfinite(learn.recorder.values[-1]).all()

def test_few_labels():
    "batches without any label among others: nothing becomes nan, and the loss is the labelled ones'"
    dls,seen = digits(100),[]
    dls.train.dataset.tensors[1][3:] = -100
    class Keep(Callback):
        order,run_valid = KnowledgeDistillationCallback.order+1,False
        def after_loss(self): seen.append(((self.y>=0).sum().item(), self.loss.item(), F.cross_entropy(self.pred, self.y, reduction='sum').item()))
    learn = distilled(Keep(), dls=dls, losses=Term(SoftTarget, 1e-9))
    assert any(n==0 for n,*_ in seen) and any(n>0 for n,*_ in seen)
    for n,loss,task in seen: assert loss==pytest.approx(task/max(n,1), abs=1e-5)
    assert np.isfinite(learn.recorder.values[-1]).all() and weights(learn).isfinite().all()

# ---- outside a fit

class Never(nn.Module):
    def forward(self, x): raise AssertionError('the teacher was asked')

def picture_learner(pictures, cbs=None):
    set_seed(0)
    dls = ImageDataLoaders.from_name_func(pictures, get_image_files(pictures), first_letter, bs=8, num_workers=0, batch_tfms=Normalize.from_stats(*imagenet_stats))
    body = nn.Sequential(ConvLayer(3,8,stride=2), AdaptiveConcatPool2d(1), nn.Flatten(), nn.Linear(16,2))
    return quiet(Learner(dls, body, loss_func=CrossEntropyLossFlat(), metrics=accuracy, cbs=cbs, path=pictures))

OUTSIDE = {
    'validate':      lambda l,f: l.validate(), 'get_preds': lambda l,f: l.get_preds(with_loss=True), 'predict': lambda l,f: l.predict(f), 'tta': lambda l,f: l.tta(n=2), 'summary': lambda l,f: l.summary(),
    'Interpretation':lambda l,f: [*Interpretation.from_learner(l).top_losses(3)], 'ClassificationInterpretation': lambda l,f: ClassificationInterpretation.from_learner(l).confusion_matrix(),
    'show_results':  lambda l,f: l.show_results(show=False)}

@pytest.mark.parametrize('fitted', [False,True], ids=['unfitted','fitted'])
@pytest.mark.parametrize('what', OUTSIDE)
def test_outside_a_fit(pictures, what, fitted):
    "the same results as without the callback, and no teacher is asked"
    import matplotlib; matplotlib.use('agg')
    file,results = get_image_files(pictures).sorted()[0],[]
    for kd in (KnowledgeDistillationCallback(picture_learner(pictures).model, SoftTarget), None):
        learn = picture_learner(pictures, kd)
        if fitted: learn.fit(1, 1e-2)
        if kd: kd.teacher.model,state = Never(),learn.model.state_dict()
        learn.model.load_state_dict(state)
        set_seed(2)
        results.append(OUTSIDE[what](learn, file))
        assert learn.metrics.attrgot('name')==['accuracy'] and hooks(learn.model)==0
    def flat(o): return [x for v in o for x in flat(v)] if isinstance(o, (tuple,list,L)) else [o]
    for a,b in zip(*map(flat, results)):
        if isinstance(a, (Tensor,np.ndarray,float)): np.testing.assert_allclose(a, b, rtol=1e-6)
        elif what=='summary': assert [o for o in a.splitlines() if 'KnowledgeDistillation' not in o]==b.splitlines()   # which lists the callbacks
        else: assert a==b

def test_exported_and_predicting_where_kd_fastai_is_not(pictures):
    "the file is of the same size, and predicts the same"
    sizes,file = [],get_image_files(pictures).sorted()[0]
    for name,cb in (('plain.pkl', None), ('kd.pkl', KnowledgeDistillationCallback(picture_learner(pictures).model, [SoftTarget, Term(Scale(), layers='0')]))):
        learn = picture_learner(pictures, cb); learn.fit(1, 1e-2)
        learn.recorder.metric_names = learn.recorder.values = learn.recorder.log = learn.final_record = None
        learn.export(name); sizes.append((pictures/name).stat().st_size)
    assert abs(sizes[1]-sizes[0])<0.01*sizes[0], sizes
    expected = learn.predict(file)
    code = f"import sys; sys.modules['kd_fastai']=None; sys.path.insert(0, {str(pictures)!r})\nfrom fastai.vision.all import *\ndef first_letter(p): return Path(p).name[0]\nsys.modules['test_any_learner']=sys.modules['__main__']\n" \
           f"l = load_learner({str(pictures/'kd.pkl')!r}); print(l.predict({str(file)!r})[2].tolist())"
    r = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], capture_output=True, text=True)
    assert eval(r.stdout)==pytest.approx(expected[2].tolist(), rel=1e-5), r.stderr

def test_copies_and_pickles():
    "a copied Learner distils on, a pickled one has forgotten the teacher"
    learn = distilled()
    learn.add_cb(KnowledgeDistillationCallback(small_net(4), [SoftTarget, Term(Scale(), layers=('1', lambda o: o.tanh()))]))
    twin = deepcopy(learn)
    for l in (learn, twin): l.dls = digits(100); set_seed(5); l.fit(1, 1e-2)
    assert torch.equal(weights(learn), weights(twin)) and learn.knowledge_distillation.teacher is twin.knowledge_distillation.teacher
    assert torch.equal(learn.knowledge_distillation.terms[1].loss.w, twin.knowledge_distillation.terms[1].loss.w)
    other = pickle.loads(pickle.dumps(learn))
    assert torch.equal(weights(other), weights(learn)) and not any(isinstance(cb, KnowledgeDistillationCallback) for cb in other.cbs)
