"What a teacher gets, and which sample it belongs to: inputs that are changed, batches drawn in between, similar data."
import os, random
import numpy as np, pandas as pd, pytest, torch
import torch.nn.functional as F
from torch import nn
from fastai.basics import (Callback, CrossEntropyLossFlat, DataLoader, DataLoaders, Learner, Normalize, Pipeline, SGD,
                           noop, set_seed)
from kd_fastai.callback import KnowledgeDistillationCallback as KD
from kd_fastai.losses import FitNet, Logits, SoftTarget
from kd_fastai.methods.schemes import Ensemble
from kd_fastai.teacher.cached import CachedTeacher, StoredTeacher
from kd_fastai.teacher.classes import check_compatible_data
from kd_fastai.teacher.function import FunctionTeacher
from kd_fastai.teacher.live import Teacher, shared_eval_mode
from kd_fastai.term import Term

def mlp(seed=0, i=6, h=8, o=5):
    set_seed(seed)
    return nn.Sequential(nn.Linear(i, h), nn.ReLU(), nn.Linear(h, o))

class Items:
    def __init__(self, n=64, i=6):
        g = torch.Generator().manual_seed(0)
        self.x,self.y = torch.randn(n, i, generator=g),torch.randint(0, 5, (n,), generator=g)
    def __len__(self): return len(self.x)
    def __getitem__(self, i): return self.x[i],self.y[i]

def data(ds=None, bs=16, shuffle=False, **kwargs):
    ds = Items() if ds is None else ds
    return DataLoaders(DataLoader(ds, bs=bs, shuffle=shuffle, **kwargs), DataLoader(ds, bs=bs, **kwargs))

def fit(model, cbs, dls=None, n=1, lr=.1):
    learn = Learner(data() if dls is None else dls, model, loss_func=CrossEntropyLossFlat(), opt_func=SGD, cbs=cbs)
    learn.logger = noop
    with learn.no_bar(): learn.fit(n, lr)
    return learn

class Keep(Callback):
    "The inputs of each training batch"
    order,run_valid = 4,False
    def __init__(self): self.x = []
    def before_batch(self): self.x.append(self.xb[0].detach().clone())

def keeping(got):
    "A loss that keeps the teacher's predictions"
    def loss(pred, teacher_pred): got.append(teacher_pred.clone()); return pred.mean()
    return loss

W = torch.randn(6, 5, generator=torch.Generator().manual_seed(1)).numpy()
def scaled(x): x *= 3.; return x@W
def numpy_tfm(x): x.numpy()[...] *= 3.; return x
def set_tfm(x): x.set_(torch.zeros(16,6)); return x
class InData(nn.Module):
    def __init__(self): super().__init__(); self.f = mlp(9)
    def forward(self, x): x.data.mul_(3.); return self.f(x)

@pytest.mark.parametrize('make', [lambda: KD(FunctionTeacher(scaled), SoftTarget), lambda: KD(InData(), SoftTarget),
    lambda: KD(mlp(9), SoftTarget, teacher_tfm=numpy_tfm), lambda: KD(mlp(9), SoftTarget, teacher_tfm=set_tfm)])
def test_what_a_teacher_does_to_its_inputs_does_not_reach_the_student(make):
    keep = Keep()
    class Seen(nn.Module):
        def __init__(self): super().__init__(); self.f,self.x = mlp(1),[]
        def forward(self, x):
            if self.training: self.x.append(x.detach().clone())
            return self.f(x)
    model,dls = Seen(),data()
    fit(model, [keep, make()], dls)
    assert torch.equal(torch.cat(model.x), dls.train_ds.x)

def test_a_feature_that_is_a_view_of_the_input_stays():
    class S(nn.Module):
        def __init__(self): super().__init__(); self.f = mlp(1)
        def forward(self, x): x.mul_(2.); return self.f(x)
    got,teacher = [],nn.Sequential(nn.Flatten(), mlp(9))
    def loss(fm_s, fm_t): got.append(fm_t['0'].clone()); return fm_s['f.0'].mean()
    fit(S(), KD(teacher, loss, [('f.0','0')]))
    assert torch.equal(torch.cat(got), Items().x)

def test_another_batch_in_between():
    class Second(Callback):
        order,run_valid = -10,False
        def before_batch(self): self.other = self.learn.dls.train.one_batch()
    dls,keep,got = data(shuffle=True),Keep(),[]
    fit(mlp(3), [Second(), keep, KD(StoredTeacher(dls.train_ds.x[:,:5].clone()), keeping(got))], dls)
    assert all(torch.equal(x[:,:5], p) for x,p in zip(keep.x, got)) and len(got)==4

def test_items_that_are_sorted_and_padded():
    class Sequences(Items):
        def __getitem__(self, i): return self.x[i,:1+i%6],int(self.y[i])
    def sort_pad(b): return [(F.pad(x, (0,6-len(x))),y) for x,y in sorted(b, key=lambda o: -len(o[0]))]
    ds,keep,got = Sequences(48),Keep(),[]
    table = torch.stack([F.pad(ds[i][0], (0,6-len(ds[i][0]))) for i in range(48)])
    fit(mlp(3), [keep, KD(StoredTeacher(table), keeping(got))], data(ds, shuffle=True, before_batch=sort_pad))
    assert all(torch.equal(x, p) for x,p in zip(keep.x, got))

def test_two_callbacks_with_positions_and_a_removal_in_mid_epoch():
    kd = KD(CachedTeacher(mlp(9)), Logits)
    class Remove(Callback):
        order = 90
        def after_batch(self):
            if self.training and self.iter==1 and kd in self.learn.cbs: self.learn.remove_cb(kd)
    learn = fit(mlp(3), [KD(CachedTeacher(mlp(8)), SoftTarget), kd, Remove()], n=2)
    assert not vars(learn.dls.train).keys() & {'get_idxs','do_item','create_batch','create_batches'}

@pytest.mark.parametrize('make', [lambda k: Ensemble([mlp(1), mlp(2)], logits=not k, T=8.),
                                  lambda k: FunctionTeacher([lambda x: x@W, lambda x: -x@W][k])])
def test_a_folder_is_of_one_teacher(make, tmp_path):
    fit(mlp(3), KD(CachedTeacher(make(0), tmp_path/'c'), SoftTarget))
    with pytest.raises(ValueError, match='another (teacher|predictions)'):
        fit(mlp(3), KD(CachedTeacher(make(1), tmp_path/'c'), SoftTarget))

@pytest.mark.parametrize('common', [1.7e9, 5.3e6, 101325., 0.])
def test_samples_that_share_a_large_part_are_told_apart(common, tmp_path):
    ds = Items(i=3)
    def rows(x): return data([*zip(torch.cat([x, torch.full((64,1), common)], 1), ds.y)])
    fit(mlp(3, i=4), KD(CachedTeacher(mlp(9, i=4), tmp_path/'c'), SoftTarget), rows(ds.x))
    fit(mlp(3, i=4), KD(CachedTeacher(mlp(9, i=4), tmp_path/'c'), SoftTarget), rows(ds.x))
    with pytest.raises(ValueError, match='another inputs'):
        fit(mlp(3, i=4), KD(CachedTeacher(mlp(9, i=4), tmp_path/'c'), SoftTarget), rows(ds.x.flip(0)))

def test_a_path_that_depends_on_data_is_no_early_exit():
    class T(nn.Module):
        def __init__(self): super().__init__(); self.a = nn.Linear(6, 6)
        def forward(self, x):
            for _ in range(1 if x[0,0]==1e3 else 3): x = self.a(x).tanh()
            return x
    ds = Items(); ds.x[0,0] = 1e3
    with pytest.raises(RuntimeError, match='ran 3 times'):
        fit(mlp(1, h=6), KD(T(), [Term(FitNet, layers=[('0','a')])]), data(ds))

def test_stored_rows_go_by_the_index():
    dls,keep,got = data(),Keep(),[]
    logits = mlp(9)(dls.train_ds.x).detach()
    frame = pd.DataFrame(logits.numpy()).sample(frac=1, random_state=0)
    fit(mlp(3), [keep, KD(StoredTeacher(frame), keeping(got))], dls)
    torch.testing.assert_close(torch.cat(got), logits)
    with pytest.raises(ValueError, match='reset_index'): StoredTeacher(frame[:30])
    with pytest.raises(ValueError, match='Expected probabilities'): StoredTeacher(logits, probabilities=True)

def test_probabilities_as_logits_are_a_warning_whose_advice_helps():
    soft = nn.Sequential(mlp(9), nn.Softmax(1))
    with pytest.warns(UserWarning, match='predictions are probabilities'): fit(mlp(1), KD(soft, SoftTarget))
    got = []
    fit(mlp(1), KD(Teacher(soft, probabilities=True), keeping(got)), lr=0.)
    torch.testing.assert_close(torch.cat(got).softmax(1), soft(Items().x).detach())

def test_common_modules_of_two_teachers_keep_their_mode():
    body = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8))
    a,b = (shared_eval_mode(nn.Sequential(body, nn.Linear(8, 5))) for _ in range(2))
    with b:
        with a: pass
        assert not body[1].training
    assert body[1].training

def test_files_of_a_cache(tmp_path):
    before = os.umask(0o022)
    try: fit(mlp(1), KD(CachedTeacher(mlp(9), tmp_path/'c'), SoftTarget))
    finally: os.umask(before)
    assert {o.stat().st_mode & 0o777 for o in (tmp_path/'c').iterdir()}=={0o644}
    file = next((tmp_path/'c').glob('*.npy'))
    victim,content = tmp_path/'other.bin',bytes(8)+b'precious'*1000
    victim.write_bytes(content)
    file.unlink(); file.symlink_to(victim)
    with pytest.raises(ValueError, match='is a link to another file'):
        fit(mlp(1), KD(CachedTeacher(mlp(9), tmp_path/'c'), SoftTarget))
    assert victim.read_bytes()==content

def test_an_interrupted_fill_changes_nothing():
    class T(nn.Module):
        def __init__(self): super().__init__(); self.f,self.n = mlp(9),0
        def forward(self, x):
            self.n += 1
            if self.n==2: raise KeyboardInterrupt
            return self.f(x)
    cached,dls = CachedTeacher(T(), views=2),data(shuffle=True)
    state = dls.train.rng.getstate()
    with pytest.raises(KeyboardInterrupt): cached.fill(dls, bar=False)
    assert dls.train.rng.getstate()==state
    with cached.ready(): assert not vars(dls.train).keys() & {'do_item'}

def test_statistics_are_not_rounded():
    def learner(std):
        dls = data()
        for dl in dls.loaders: dl.after_batch = Pipeline([Normalize.from_stats([0.], [std], dim=2, cuda=False)])
        return Learner(dls, mlp(1), loss_func=CrossEntropyLossFlat())
    with pytest.raises(ValueError, match='normalized differently'): check_compatible_data(learner(3e-5), learner(1e-5))

@pytest.mark.parametrize('seed', range(6))
def test_random_caches_give_the_predictions_of_the_live_teacher(seed, tmp_path):
    "Loaders, types and views drawn at random, in two epochs and in a second fit"
    r = random.Random(seed)
    ds,bs = Items(r.choice([17,33,64])),r.choice([5,16])
    settings = dict(half=r.random()<.5, topk=r.choice([None,3]), views=r.choice([None,2]))
    dls,teacher = data(ds, bs, shuffle=r.random()<.5),mlp(9)
    path = tmp_path/'c' if r.random()<.5 else None
    cached = CachedTeacher(teacher, path, **settings)
    for _ in range(2):
        keep,got = Keep(),[]
        fit(mlp(3), [keep, KD(cached, keeping(got))], dls, n=2)
        expected = teacher(torch.cat(keep.x)).detach()
        found = torch.cat(got)
        if settings['topk']:
            top = expected.softmax(1).topk(3).indices
            found,expected = (o.softmax(1).gather(1, top) for o in (found, expected))
        torch.testing.assert_close(found, expected, rtol=1e-2 if settings['half'] else 1e-4, atol=1e-3)
        assert not np.isnan(found.numpy()).any()
