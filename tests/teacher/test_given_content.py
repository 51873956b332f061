"What a teacher gets, and which sample it belongs to: inputs that are changed, batches drawn in between, similar data."
import gc
import pytest, torch
import torch.nn.functional as F
from torch import nn
from fastai.basics import Callback, CrossEntropyLossFlat, DataLoader, DataLoaders, Learner, SGD, noop, set_seed
from kd_fastai.callback import KnowledgeDistillationCallback as KD
from kd_fastai.losses import Logits, SoftTarget
from kd_fastai.methods.ensemble import Ensemble
from kd_fastai.teacher.cached import CachedTeacher, StoredTeacher
from kd_fastai.teacher.function import FunctionTeacher
from support import batches

pytestmark = pytest.mark.filterwarnings('ignore:The teacher agrees')   # teachers are not trained

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

class Keep(batches.Keep):
    "Before callbacks that change the batch"
    order = 4

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

class Holder:
    "A batch that is an object, such as a graph"
    def __init__(self, x): self.x = x

class OfHolder(nn.Module):
    "A model that may empty its input"
    def __init__(self, seed, empties=False): super().__init__(); self.f,self.empties,self.x = mlp(seed),empties,[]
    def forward(self, b):
        if self.training: self.x.append(b.x.clone())
        res = self.f(b.x)
        if self.empties: b.x.data.zero_()
        return res

def test_a_teacher_may_change_tensors_inside_an_object():
    class Hold(Callback):
        order = 4
        def before_batch(self): self.learn.xb = (Holder(self.xb[0]),)
    model = OfHolder(1)
    fit(model, [Hold(), KD(OfHolder(9, empties=True), SoftTarget)])
    assert torch.equal(torch.cat(model.x), Items().x)

def test_a_feature_in_inference_mode_is_fixed_when_taken():
    class T(nn.Sequential):
        @torch.inference_mode()
        def forward(self, x): return super().forward(x)
    inner,got = mlp(9),[]
    teacher = T(inner[0], nn.ReLU(inplace=True), inner[2])
    def loss(fm_s, fm_t): got.append(fm_t['0'].clone()); return fm_s['0'].mean()
    fit(mlp(1), KD(teacher, loss, '0'))
    torch.testing.assert_close(torch.cat(got), inner[0](Items().x))

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

@pytest.mark.parametrize('num_workers', [0, pytest.param(2, marks=pytest.mark.slow)])
def test_two_callbacks_with_positions_and_a_removal_in_mid_epoch(num_workers):
    kd = KD(CachedTeacher(mlp(9)), Logits)
    class Remove(Callback):
        order = 90
        def after_batch(self):
            if self.training and self.iter==1 and kd in self.learn.cbs: self.learn.remove_cb(kd)
    learn = fit(mlp(3), [KD(CachedTeacher(mlp(8)), SoftTarget), kd, Remove()], data(num_workers=num_workers), n=2)
    assert_plain(learn.dls.train)

HOOKED = {'get_idxs','do_item','create_batch','create_batches','after_batch'}
def assert_plain(dl): assert not vars(dl).keys() & HOOKED and '_index_sampler' not in vars(dl.fake_l)

@pytest.mark.parametrize('num_workers', [0, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize('ending', ['removal','interrupt'])
def test_the_only_callback_with_positions_ends_in_mid_epoch(ending, num_workers):
    "The running iteration goes on, and then the loader is as it was."
    kd,n = KD(CachedTeacher(mlp(9)), Logits),[]
    class End(Callback):
        order = 90
        def after_batch(self):
            n.append(self.training)
            if len(n)!=2: return
            if ending=='interrupt': raise KeyboardInterrupt
            self.learn.remove_cb(kd)
    dls = data(num_workers=num_workers)
    try: fit(mlp(3), [kd, End()], dls, n=2)
    except KeyboardInterrupt: pass
    gc.collect()
    assert_plain(dls.train)
    assert sum(n)==(2 if ending=='interrupt' else 8)

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
