"Inputs for the teacher only: `teacher_inputs` of the callback."
import matplotlib.pyplot as plt, pytest, torch
from torch import nn
from torch.nn import functional as F
from fastai.basics import Callback, DataLoader, DataLoaders, set_seed
from fastai.callback.mixup import CutMix, MixUp
from fastai.data.block import CategoryBlock, DataBlock, TransformBlock
from fastai.data.transforms import RandomSplitter
from fastai.learner import load_learner
from kd_fastai.all import (CachedTeacher, FitNet, MeanTeacher, SoftTarget, StoredTeacher, Term, kd_compare,
    layer_similarity, match_feature_layers, plot_attention, plot_similarity)
from kd_fastai.report.scores import score_models
from kd_fastai.ship.export import deployable
from kd_fastai.demo import digits, small_net
from support import KD, KeepBatches, fit, history, hooks, learner, weights

class Strict(nn.Sequential):
    "A network that takes one input, of one size"
    def __init__(self, size, width=4): super().__init__(*small_net(width)); self.size = size
    def forward(self, x):
        assert x.shape[-1]==self.size, f"{x.shape}"
        return super().forward(x)

images = torch.stack([x for x,_ in digits(200).train_ds])
labels = [int(y) for _,y in digits(200).train_ds]

def small(i): return F.avg_pool2d(images[i], 2)
def large(i): return images[i]
def label(i): return labels[i]

def data(get_x=(small, large), n=80, **kwargs):
    "Items are positions; inputs are a small image and a large one"
    set_seed(0)  # also for the order of the batches
    blocks = (*[TransformBlock]*len(get_x), CategoryBlock)
    block = DataBlock(blocks, n_inp=len(get_x), get_x=[*get_x], get_y=label, splitter=RandomSplitter(seed=0))
    return block.dataloaders(range(n), bs=16, num_workers=0, **kwargs)

@pytest.fixture
def teacher(): torch.manual_seed(3); return Strict(8, 8).eval()

def student(): torch.manual_seed(4); return Strict(4)

def taught(teacher, loss=SoftTarget, dls=None, cbs=(), **kwargs):
    kd = KD(teacher, loss, teacher_inputs=1, **kwargs)
    return learner([kd, *cbs], dls or data(), student())

def test_value_is_that_of_a_loop_by_hand(teacher):
    seen = KeepBatches()
    class Keep(Callback):
        order,run_valid = KD.order-1,False
        def before_batch(self): self.xb_all = self.xb
        def after_loss(self): self.values.append(SoftTarget(self.pred, teacher(self.xb_all[1])).item())
        def before_fit(self): self.values = []
    learn = taught(teacher, cbs=[Keep(), seen])
    fit(learn, lr=0.)
    mean = sum(learn.keep.values)/len(learn.keep.values)
    assert history(learn).soft_target[0]==pytest.approx(mean, rel=1e-5)
    assert all(x.shape[-1]==4 for x,_ in seen.batches)

def test_training_equals_that_of_a_teacher_that_enlarges_nothing(teacher):
    "The teacher's input made by `teacher_tfm` from the only input gives the same training"
    def enlarged(i): return F.interpolate(small(i)[None], scale_factor=2.)[0]
    class Enlarges(nn.Module):
        def __init__(self): super().__init__(); self.net = teacher
        def forward(self, x): return self.net(F.interpolate(x, scale_factor=2.))
    own = fit(taught(teacher, dls=data((small, enlarged))))
    shared = fit(learner(KD(Enlarges(), SoftTarget), data((small,)), student()))
    torch.testing.assert_close(weights(own), weights(shared))

def test_validation_and_prediction_use_the_students_inputs(teacher):
    learn = fit(taught(teacher))
    n = len(learn.dls.valid_ds)
    assert learn.kd_history().accuracy.iloc[-1]==learn.validate()[1]
    assert learn.get_preds()[0].shape==(n,10)
    inputs = learn.get_preds(with_input=True)[0]
    assert [o.shape[-1] for o in inputs]==[4,8]
    assert len(learn.predict(3)[2])==10
    assert learn.model.training is False and not hooks(learn.model, teacher)

def test_lr_find_runs(teacher): assert taught(teacher).lr_find(show_plot=False, num_it=5).valley>0

def test_exported_student_has_only_its_own_inputs(teacher, tmp_path):
    learn = fit(taught(teacher))
    before = learn.predict(3)[2]
    learn.path = tmp_path
    learn.export('m.pkl')
    assert (learn.dls.n_inp, len(learn.dls.train_ds))==(2,64)
    loaded = load_learner(tmp_path/'m.pkl')
    assert loaded.dls.n_inp==1 and b'kd_fastai' not in (tmp_path/'m.pkl').read_bytes()
    torch.testing.assert_close(loaded.predict(3)[2], before)

def test_export_of_other_data_names_them(teacher, tmp_path):
    rows = [(small(i), large(i), label(i)) for i in range(32)]
    dls = DataLoaders(*(DataLoader(rows, bs=16, num_workers=0) for _ in range(2)))
    learn = fit(taught(teacher, dls=dls))
    with pytest.raises(TypeError, match='data of a DataBlock or of Datasets, got list'): learn.export(tmp_path/'m.pkl')
    assert learn.dls is dls

def test_a_number_that_does_not_fit_is_an_error_before_the_first_step(teacher):
    learn = learner(KD(teacher, SoftTarget, teacher_inputs=2), data(), student())
    before = weights(learn)
    with pytest.raises(ValueError, match='teacher_inputs=2 leaves no input for the student: the batch has 2'):
        fit(learn)
    assert torch.equal(weights(learn), before)

@pytest.mark.parametrize('n', [-1, 1.5, True, '1'])
def test_bad_numbers(teacher, n):
    with pytest.raises((TypeError,ValueError), match='teacher_inputs must be'):
        KD(teacher, SoftTarget, teacher_inputs=n)

@pytest.mark.parametrize('mixer', [MixUp, CutMix])
def test_mixing_is_refused(teacher, mixer):
    with pytest.raises(ValueError, match=f'{mixer.__name__} mixes a single input'):
        fit(taught(teacher, cbs=[mixer()]))

def test_two_callbacks_share_the_inputs(teacher):
    two = [KD(teacher, SoftTarget, teacher_inputs=1), KD(teacher, Term(FitNet, adapt='auto'), '2', teacher_inputs=1)]
    assert {'soft_target','fit_net'}<={*history(fit(learner(two, data(), student())))}
    uneven = [KD(teacher, SoftTarget, teacher_inputs=1), KD(teacher, SoftTarget)]
    with pytest.raises(ValueError, match='Expected one teacher_inputs in all distillation callbacks'):
        fit(learner(uneven, data(), student()))

def test_mean_teacher_sees_another_view():
    def shifted(i): return torch.roll(small(i), 1, -1)
    learn = learner(dls=data((small, shifted)), model=student())
    learn.add_cb(MeanTeacher(learn, SoftTarget, teacher_inputs=1))
    assert history(fit(learn)).soft_target[0]>0

def test_cached_teacher_is_asked_about_its_own_inputs(teacher):
    want = fit(taught(teacher), 2)
    cached = CachedTeacher(teacher)
    learn = fit(taught(cached), 2)
    torch.testing.assert_close(weights(learn), weights(want))

def test_cache_of_a_fixed_view_while_the_students_is_random(teacher):
    def noisy(i): return small(i)+0.1*torch.randn(1,4,4)
    calls = []
    handle = teacher.register_forward_hook(lambda *args: calls.append(1))
    learn = fit(taught(CachedTeacher(teacher), dls=data((noisy, large))), 3)
    handle.remove()
    assert len(calls)==4  # the batches of one epoch
    torch.testing.assert_close(weights(learn), weights(fit(taught(teacher, dls=data((noisy, large))), 3)))
    with pytest.raises(ValueError, match='Reading a sample twice gives different inputs'):
        fit(taught(CachedTeacher(teacher), dls=data((small, noisy))))

def test_filled_folder_trains_without_the_teacher(teacher, tmp_path):
    CachedTeacher(teacher, tmp_path/'answers').fill(data(), bar=False, teacher_inputs=1)
    stored = fit(taught(StoredTeacher(tmp_path/'answers')))
    torch.testing.assert_close(weights(stored), weights(fit(taught(teacher))))
    with pytest.raises(ValueError, match='made with another inputs'):
        fit(learner(KD(StoredTeacher(tmp_path/'answers'), SoftTarget), data((small,)), student()))

def test_report_asks_the_teacher_about_its_own_inputs(teacher):
    report = fit(taught(teacher)).kd_report()
    assert report.terms.value['soft_target']>0

def test_nothing_is_kept_between_batches(teacher):
    kept,kd = [],KD(teacher, SoftTarget, teacher_inputs=1)
    class Look(Callback):
        order,run_valid = KD.order+1,False
        def after_batch(self): kept.append(kd.fit_state.teacher_xb)
    fit(learner([kd, Look()], data(), student()))
    assert kept==[None]*len(kept)!=[]

# ---- functions that run the models themselves

def by_hand(learn, teacher):
    "Predictions of both models on the validation set"
    with torch.no_grad():
        pairs = [(learn.model.eval()(a), teacher.eval()(b)) for a,b,_ in learn.dls.valid]
    return [torch.cat(o) for o in zip(*pairs)]

def labels_of(learn): return torch.cat([y for *_,y in learn.dls.valid])

def test_card_gives_each_model_its_inputs(teacher):
    learn,baseline = fit(taught(teacher)),student()
    card = learn.kd_card(teacher, baseline)
    pred,teacher_pred = by_hand(learn, teacher)
    y = labels_of(learn)
    assert card.scores.accuracy['student']==pytest.approx((pred.argmax(1)==y).float().mean().item())
    assert card.scores.accuracy['teacher']==pytest.approx((teacher_pred.argmax(1)==y).float().mean().item())
    same = (pred.argmax(1)==teacher_pred.argmax(1)).float().mean().item()
    assert card.scores.agreement['student']==pytest.approx(same)
    assert card.scores.ms_batch_64.notna().all() and [*card.scores.index]==['student','teacher','baseline']

def test_card_takes_the_callback_of_a_fit(teacher):
    learn,kd = learner(dls=data(), model=student()),KD(teacher, SoftTarget, teacher_inputs=1)
    fit(learn, cbs=kd)
    card = learn.kd_card(teacher, kd=kd)
    assert card.scores.accuracy['student']==fit(taught(teacher)).kd_card(teacher).scores.accuracy['student']

def test_predicted_classes_and_metrics(teacher):
    learn = fit(taught(teacher))
    answers = score_models(learn, {'teacher': teacher, 'other': student()}).classes
    pred,teacher_pred = by_hand(learn, teacher)
    assert answers.student.tolist()==pred.argmax(1).tolist()
    assert answers.teacher.tolist()==teacher_pred.argmax(1).tolist()
    assert score_models(learn).metrics.accuracy['student']==pytest.approx(learn.validate()[1])

def test_parity_and_example_inputs_are_the_students(teacher):
    learn = fit(taught(teacher))
    model,xb,shapes = deployable(learn)
    assert [o.shape for o in xb]==[(4,1,4,4)] and len(shapes[0])==1
    same = torch.export.export(model, xb, dynamic_shapes=shapes).module()
    table = learn.kd_parity(rounds=1, exported=same, other=student().eval())
    assert table.largest_difference['exported']<1e-5<table.largest_difference['other']
    assert table.accuracy['exported']==pytest.approx(learn.validate()[1])

@pytest.mark.slow
def test_compare_gives_students_their_inputs(teacher):
    def make(seed): return learner(dls=data(), model=student(), seed=seed)
    def small_alone(seed): return learner(dls=data((small,)), model=student(), seed=seed)
    ways = {'baseline': None, 'taught': lambda learn: KD(teacher, SoftTarget, teacher_inputs=1)}
    found = kd_compare(make, ways, 2, 1, teacher=teacher, teacher_inputs=1, rounds=1, progress=False)
    own = kd_compare(small_alone, {'baseline': None, 'again': None}, 2, 1, rounds=0, progress=False)
    def column(runs, method, name): return runs[runs.method==method][name].tolist()
    assert column(found.runs, 'baseline', 'valid_loss')==pytest.approx(column(own.runs, 'baseline', 'valid_loss'))
    assert column(found.runs, 'taught', 'valid_loss')!=column(found.runs, 'baseline', 'valid_loss')
    assert found.runs.agreement.notna().all() and found.table.ms.notna().all()

@pytest.mark.parametrize('n', [0, 2])
def test_compare_names_ways_with_other_inputs(teacher, n):
    ways = {'taught': lambda learn: KD(teacher, SoftTarget, teacher_inputs=1), 'baseline': None}
    match = rf"The method 'taught' has teacher_inputs=1, expected {n}: give kd_compare\(..., teacher_inputs=1\)"
    with pytest.raises(ValueError, match=match):
        kd_compare(lambda seed: learner(dls=data(), model=student()), ways, 1, 1, teacher_inputs=n, progress=False)

def find(learn, **kwargs):
    ways = {'T=1': SoftTarget, 'T=4': Term(SoftTarget, 0.5, T=4)}
    return learn.kd_find(methods=ways, budget=6, seeds=2, show_plot=False, progress=False, **kwargs)

@pytest.mark.slow
def test_find_keeps_the_inputs(teacher):
    learn = taught(teacher)
    found = find(learn)
    assert [*found.table.index]==['baseline','T=1','T=4']
    assert found.arguments['T=1']=={'teacher_inputs': 1, 'loss': SoftTarget}
    assert find(learn, teacher=teacher).runs.valid_loss.tolist()==found.runs.valid_loss.tolist()
    attached = learn.distill(teacher, **found.arguments['T=4'])
    assert attached.knowledge_distillation.teacher_inputs==1

def test_plots_give_each_model_its_inputs(teacher):
    learn = fit(taught(teacher))
    pred,teacher_pred = by_hand(learn, teacher)
    share = (pred.argmax(1)==teacher_pred.argmax(1)).float().mean().item()
    assert learn.plot_agreement().get_title()==f'equal: {share:.1%}'
    axs = plot_attention(learn, teacher, learn.dls, ['1','2'], n=3)
    assert axs.shape==(3,5) and axs[0,0].images[0].get_array().shape[:2]==(4,4)
    assert plot_similarity(learn, teacher, learn.dls).images[0].get_array().shape==(6,6)
    learn.plot_terms()
    plt.close('all')

def test_layers_are_matched_on_each_models_inputs(teacher):
    learn = taught(teacher)
    assert match_feature_layers(learn, teacher, learn.dls, teacher_inputs=1)=={'student': ['1'], 'teacher': ['2']}
    assert layer_similarity(learn, teacher, learn.dls, teacher_inputs=1).shape==(6,6)
