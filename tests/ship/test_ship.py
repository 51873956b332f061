"Resumed training runs, exported models, and students that were pruned or quantized first."
import pytest, torch
from functools import partial
from fastai.basics import *
from fastai.callback.all import *
from kd_fastai.all import *
from kd_fastai.demo import digits, small_net
from support import text_learner

for o in [*globals()]:
    if o=='test' or o.startswith('test_'): del globals()[o]  # fastcore's own helpers, which pytest would take for tests

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings('ignore')]

# ---- resume: fit(n, start_epoch=k) after save and load

def weights(learn): return torch.cat([p.detach().flatten() for p in learn.model.parameters()])
def columns(learn): return pd.DataFrame(learn.recorder.values, columns=learn.recorder.metric_names[1:-1])

class Interrupt(Callback):
    "Save the Learner and the random state after some epochs, and stop"
    order = 61
    def __init__(self, after): self.after = after
    def after_epoch(self):
        if self.epoch!=self.after-1: return
        self.learn.save('half')
        self.learn.states = get_random_states(),self.dls.train.rng.getstate()
        raise CancelFitException

def plain(teacher): return dict(loss=partial(SoftTarget, T=4), weight=0.9)
def schedules(teacher):
    return dict(loss=[Term(SoftTarget, 0.9, T=SchedLin(8,2)), Term(Attention, 10., layers='1')], schedule=SchedCos(0,1))
def owned(teacher): return dict(loss=Term(CRD(), 0.8, layers='2'))
def bank(teacher): return dict(loss=Term(CRDBank(n_data=100), 0.8, layers='2'))
def adapters(teacher): return dict(loss=Term(FitNet, 1., layers=['1','2'], adapt='auto'))
def balanced(teacher): return dict(loss=[Term(SoftTarget, 0.5), Term(CRD(), 0.1, layers='2')], balance=True)
def cached(teacher): return dict(teacher=CachedTeacher(teacher), loss=partial(SoftTarget, T=4))

@pytest.mark.parametrize('opt', [Adam, partial(OptimWrapper, opt=torch.optim.AdamW)], ids=['Adam','OptimWrapper'])
@pytest.mark.parametrize('settings', [plain, schedules, owned, bank, adapters, balanced, cached])
def test_a_resumed_training_equals_the_uninterrupted_one(settings, opt, tmp_path):
    "bit for bit: weights, columns, what losses own, and the optimizer's steps"
    set_seed(1)
    teacher = small_net(8)
    def make():
        set_seed(0, reproducible=True)
        kd = KnowledgeDistillationCallback(**{'teacher': teacher, **settings(teacher)})
        learn = Learner(digits(100), small_net(4), loss_func=CrossEntropyLossFlat(), metrics=accuracy, opt_func=opt,
            path=tmp_path, cbs=kd)
        learn.remove_cb(ProgressCallback)
        learn.logger = noop
        return learn
    (whole := make()).fit_one_cycle(4, 1e-2)
    (half := make()).fit_one_cycle(4, 1e-2, cbs=Interrupt(2))
    assert not torch.equal(weights(half), weights(whole))
    rest = make()
    torch.randn(3)  # the random state at this point does not matter
    rest.load('half')
    set_random_states(**half.states[0])
    rest.dls.train.rng.setstate(half.states[1])
    rest.fit_one_cycle(4, 1e-2, start_epoch=2)
    assert torch.equal(weights(rest), weights(whole))
    pd.testing.assert_frame_equal(columns(rest).iloc[2:,1:], columns(whole).iloc[2:,1:])  # not fastai's running mean
    for a,b in zip(rest.model.buffers(), whole.model.buffers()): assert torch.equal(a, b)

def test_a_student_is_not_resumed_without_what_its_losses_own(tmp_path):
    "The file of owned weights matters: without it the rest of the training differs"
    teacher = small_net(8)
    def make():
        set_seed(0, reproducible=True)
        kd = KnowledgeDistillationCallback(teacher, Term(CRD(), 0.8, layers='2'))
        learn = Learner(digits(100), small_net(4), loss_func=CrossEntropyLossFlat(), path=tmp_path, cbs=kd)
        learn.remove_cb(ProgressCallback)
        learn.logger = noop
        return learn
    ends = []
    half = make()
    half.fit_one_cycle(4, 1e-2, cbs=Interrupt(2))
    for remove in (False, True):
        if remove: (tmp_path/'models/half.kd.pth').unlink()
        learn = make()
        learn.load('half')
        set_random_states(**half.states[0])
        learn.dls.train.rng.setstate(half.states[1])
        learn.fit_one_cycle(4, 1e-2, start_epoch=2)
        ends.append(weights(learn))
    assert not torch.equal(*ends)

# ---- export: each student by each tool

def conv(): return Learner(digits(20), small_net(4), loss_func=CrossEntropyLossFlat(), metrics=accuracy)

def of_timm():
    timm = pytest.importorskip('timm', reason='timm is not installed')
    data = [*zip(torch.randn(8,3,32,32), torch.arange(8)%3)]
    dls = DataLoaders(DataLoader(data, bs=4), DataLoader(data, bs=4))
    model = timm.create_model('test_efficientnet', num_classes=3)
    return Learner(dls, model, loss_func=CrossEntropyLossFlat(), metrics=accuracy)

def tabular():
    from fastai.tabular.all import TabularDataLoaders, Categorify, Normalize, CategoryBlock, tabular_learner
    df = pd.DataFrame(dict(c=list('abcd')*4, x=np.arange(16.), y=list('nnyy')*4))
    dls = TabularDataLoaders.from_df(df, procs=[Categorify,Normalize], cat_names=['c'], cont_names=['x'], y_names='y',
                                     y_block=CategoryBlock(), valid_idx=[*range(8)], bs=4)
    # torchao builds a hundred patterns for a batch norm without a convolution: test_export.py has such students
    config = dict(use_bn=False, bn_cont=False)
    return tabular_learner(dls, layers=[8], n_out=2, metrics=accuracy, config=config)

def text(): return text_learner(24)

def segmentation():
    data = [*zip(torch.randn(8,1,8,8), torch.randint(3,(8,8,8)))]
    dls = DataLoaders(DataLoader(data, bs=4), DataLoader(data, bs=4))
    body = nn.Conv2d(1,4,3,2,1),nn.BatchNorm2d(4),nn.ReLU()
    model = nn.Sequential(*body, nn.Upsample(scale_factor=2), nn.Conv2d(4,3,1))
    return Learner(dls, model, loss_func=CrossEntropyLossFlat(axis=1))

def program(learn, folder):
    model,xb,shapes = deployable(learn)
    return torch.export.export(model, xb, dynamic_shapes=shapes).module()

def onnx(learn, folder):
    for o in ('onnx','onnxscript','onnxruntime'): pytest.importorskip(o, reason=f'{o} is not installed')
    return OnnxModel(export_onnx(learn, folder/'m.onnx'), threads=1)

def dynamic_int8(learn, folder):
    return torch.ao.quantization.quantize_dynamic(deployable(learn)[0], {nn.Linear}, torch.qint8)

def static_int8(learn, folder):
    pytest.importorskip('torchao', reason='torchao is not installed')
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86
    quantizer = x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config())
    model = prepare_pt2e(program(learn, folder), quantizer)
    with torch.no_grad():
        for *xb,_ in learn.dls.valid: model(*xb)
    return convert_pt2e(model)

# (student, tool) -> the tool's reason for refusing a student: AWD_LSTM compares the batch size with its hidden state's
REFUSED = {('text',o): 'Could not guard on data-dependent expression' for o in ('program','onnx','static_int8')}

@pytest.mark.parametrize('tool,difference,agreement', [
    (program,1e-5,1.), (onnx,1e-4,1.), (dynamic_int8,0.1,0.9), (static_int8,0.1,0.9)],
    ids=['program','onnx','dynamic_int8','static_int8'])
@pytest.mark.parametrize('student', [conv, of_timm, tabular, text, segmentation])
def test_an_exported_student_is_the_student(student, tool, difference, agreement, tmp_path):
    set_seed(0)
    learn = student()
    known = REFUSED.get((student.__name__, tool.__name__))
    try: model = tool(learn, tmp_path)
    except Exception as e:
        if known is None or known not in str(e): raise
        pytest.skip(f'{tool.__name__} cannot export a {student.__name__} student: {known}')
    row = learn.kd_parity(rounds=1, exported=model).loc['exported']
    assert row.largest_difference<=difference and row.agreement>=agreement

def test_parity_tells_another_model():
    learn = conv()
    other = deepcopy(deployable(learn)[0])
    with torch.no_grad(): other.model[5].bias[3] += 5
    res = learn.kd_parity(rounds=1, same=deployable(learn)[0], other=other)
    assert res.largest_difference.to_dict()==pytest.approx(dict(student=0, same=0, other=5))
    assert res.agreement['same']==1
    assert res.agreement['other']<1

def test_parity_refuses_other_shapes():
    words = r"short gives outputs of shape \(\d+, 9\), expected the student's \(\d+, 10\)"
    with pytest.raises(ValueError, match=words):
        conv().kd_parity(rounds=1, short=lambda x: torch.zeros(len(x), 9))

def test_deployable_changes_nothing():
    learn = conv()
    learn.model.train()
    model,xb,_ = deployable(learn, 3)
    assert learn.model.training and all(p.requires_grad for p in learn.model.parameters()) and len(xb[0])==3
    assert not model.training and not any(p.requires_grad for p in model.parameters())

# ---- the chain: smaller first, then distilled back

def test_a_pruned_student_is_distilled_and_stays_pruned():
    "The callback finds its layers, zeros stay zero, and the export is clean"
    from torch.nn.utils import prune
    learn,teacher = conv(),small_net(4)
    parts = [(m,'weight') for m in learn.model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    prune.global_unstructured(parts, prune.L1Unstructured, amount=0.5)
    masks = [m.weight_mask.clone() for m,_ in parts]
    kd = KnowledgeDistillationCallback(teacher, [SoftTarget, Term(Attention, 10., layers=['0','1'])])
    with learn.no_bar(), learn.no_logging(): learn.fit(2, 1e-2, cbs=kd)
    for m,n in parts: prune.remove(m, n)
    for (m,_),mask in zip(parts, masks): assert (m.weight[mask==0]==0).all() and (m.weight[mask==1]!=0).any()
    assert {*learn.model.state_dict()}=={*small_net(4).state_dict()}
    assert not any(m._forward_hooks for m in learn.model.modules())

def test_a_quantization_aware_student_is_distilled():
    "Layers keep their names, and train with rounded weights"
    pytest.importorskip('torchao', reason='torchao is not installed')
    from torchao.quantization import quantize_
    from torchao.quantization.granularity import PerAxis
    from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig
    learn,teacher = conv(),small_net(4)
    quantize_(learn.model, QATConfig(weight_config=IntxFakeQuantizeConfig(torch.int8, PerAxis(0)), step='prepare'))
    assert 'FakeQuantized' in type(learn.model[5]).__name__
    before = learn.model[5].weight.detach().clone()
    kd = KnowledgeDistillationCallback(teacher, [SoftTarget, Term(FitNet, 1., layers='5')])
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-2, cbs=kd)
    assert not torch.equal(before, learn.model[5].weight)

def test_a_convolutional_student_is_trained_for_int8():
    "by `torch.ao`, whose fused layers (convolution, norm and ReLU in one) keep the convolution's name"
    from torch.ao.quantization import disable_observer, get_default_qat_qconfig_mapping
    from torch.ao.quantization.quantize_fx import convert_fx, prepare_qat_fx
    set_seed(0)
    learn,teacher = conv(),small_net(4)
    x = learn.dls.one_batch()[0]
    learn.model = prepare_qat_fx(learn.model.train(), get_default_qat_qconfig_mapping(), (x,))
    kd = KnowledgeDistillationCallback(teacher, [SoftTarget, Term(Attention, 10., layers=[('0.0','0'), ('1.0','1')])])
    before = weights(learn)
    with learn.no_bar(), learn.no_logging(): learn.fit(2, 1e-2, cbs=kd)
    assert not torch.equal(weights(learn), before) and kd.history.attention.notna().all()
    assert not any(m._forward_hooks for m in learn.model.modules())
    learn.model.apply(disable_observer)  # ranges would move during validation
    int8 = convert_fx(deepcopy(learn.model).eval())
    assert '.quantized.' in type(int8.get_submodule('0.0')).__module__
    row = learn.kd_parity(rounds=1, int8=int8).loc['int8']
    assert row.largest_difference<0.1 and row.agreement>0.85  # the student has learned little

def test_an_exported_student_is_trained_for_int8(tmp_path):
    "by torchao, in a graph that does not call its layers: by predictions, and the converted graph is exported"
    pytest.importorskip('torchao', reason='torchao is not installed')
    from torchao.quantization.pt2e import allow_exported_model_train_eval
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_qat_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86
    set_seed(0)
    learn,teacher = conv(),small_net(4)
    # without batch norm, for which torchao first builds a hundred patterns
    learn.model = nn.Sequential(nn.Conv2d(1,4,3,2,1), nn.ReLU(), nn.Flatten(), nn.Linear(64,10))
    x = learn.dls.one_batch()[0]
    quantizer = x86.X86InductorQuantizer()
    quantizer.set_global(x86.get_default_x86_inductor_quantization_config(is_qat=True))
    shapes = ({0: torch.export.Dim('batch', min=2)},)
    graph = torch.export.export(learn.model.train(), (x,), dynamic_shapes=shapes).module()
    learn.model = allow_exported_model_train_eval(prepare_qat_pt2e(graph, quantizer))
    before = weights(learn)
    kd = KnowledgeDistillationCallback(teacher, SoftTarget)
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-2, cbs=kd)
    assert not torch.equal(weights(learn), before)
    with pytest.raises(RuntimeError, match="layer '0' did not run in this forward"), learn.no_bar(), learn.no_logging():
        learn.fit(1, cbs=KnowledgeDistillationCallback(teacher, Term(Attention, layers='0')))
    learn.model.eval()  # returns None
    int8 = convert_pt2e(learn.model)
    torch.export.save(torch.export.export(int8, (x,), dynamic_shapes=shapes), tmp_path/'int8.pt2')
    loaded = torch.export.load(tmp_path/'int8.pt2').module()
    torch.testing.assert_close(loaded(x), int8(x))
