"Files of `kd_export`: each kind of data against `learn.predict`, from files on disk, and a process without PyTorch."
import subprocess, sys
import numpy as np, pandas as pd, pytest, torch
from torch import nn
from PIL import Image, ImageOps
from fastai.vision.all import *
from kd_fastai.all import *
from kd_fastai.ship.export import read_image, runner_code
from support import quiet, text_learner

for o in [*globals()]:
    if o=='test' or o.startswith('test_'): del globals()[o]  # fastcore's own helpers, which pytest would take for tests

pytestmark = pytest.mark.filterwarnings('ignore')
for o in ('onnx','onnxruntime','onnxscript'): pytest.importorskip(o, reason=f'{o} is not installed')

SHAPES = [(40,50), (64,33), (20,90), (57,57)]  # height, width

@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    "Smooth pictures of four shapes: PNG with alpha, gray JPEG, RGB PNG"
    folder,rng = tmp_path_factory.mktemp('pictures'),np.random.default_rng(0)
    for i in range(24):
        h,w = SHAPES[i%4]
        image = Image.fromarray(rng.integers(0, 255, (6,6,4), dtype=np.uint8), 'RGBA').resize((w,h), Image.BICUBIC)
        name = folder/f"{'ab'[i%2]}_{i}"
        if i%3==0: image.save(f'{name}.png')
        elif i%3==1: image.convert('L').save(f'{name}.jpg')
        else: image.convert('RGB').save(f'{name}.png')
    return folder

def net(channels=3, outputs=2):
    set_seed(0)
    body = nn.Conv2d(channels,8,3,2,1),nn.BatchNorm2d(8),nn.ReLU(),nn.Conv2d(8,8,3,2,1),nn.ReLU()
    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8,outputs))

def label(file): return file.name[0]

def pictures(folder, item, batch=(), blocks=(ImageBlock,CategoryBlock), get_y=label, model=None, **kwargs):
    block = DataBlock(blocks, get_items=get_image_files, get_y=get_y, splitter=RandomSplitter(0.5, seed=0),
                      item_tfms=item, batch_tfms=[*batch])
    dls = block.dataloaders(folder, bs=8 if item else 1, num_workers=0, device='cpu')
    learn = quiet(Learner(dls, model or net(), **{'loss_func': CrossEntropyLossFlat(), 'metrics': accuracy, **kwargs}))
    with learn.no_bar(): learn.fit(1, 1e-2)
    return learn

def differences(learn, model, files):
    "Names by fastai and by the file, and the largest difference of a probability"
    with learn.no_bar(): ours = [learn.predict(f) for f in files]
    theirs = [model.predict(f) for f in files]
    worst = max(np.abs(a[2].numpy()-b[2]).max() for a,b in zip(ours, theirs))
    return [a[0] for a in ours],[b[0] for b in theirs],worst

IMAGENET = Normalize.from_stats(*imagenet_stats)
ROOMS = dict(
    crop=([Resize(32)], [IMAGENET]), squish=([Resize((24,40), method='squish')], [IMAGENET]),
    pad_mirrored=([Resize(32, method='pad')], [IMAGENET]),
    pad_edge=([Resize((32,20), method='pad', pad_mode='border')], []),
    pad_black=([Resize((32,20), method='pad', pad_mode='zeros')], []), center=([CropPad(45)], []),
    random_crop=([RandomCrop(61)], []), random_resized=([RandomResizedCrop(32)], [IMAGENET]),
    presizing=([Resize(64)], [*aug_transforms(size=24, min_scale=0.75), IMAGENET]),
    affine=([Resize(100)], [*aug_transforms(size=20), IMAGENET]))

@pytest.mark.slow
@pytest.mark.parametrize('room', ROOMS)
def test_a_file_predicts_what_the_learner_predicts(folder, room, tmp_path):
    "Names of all files are equal, and probabilities to what one level of 255 changes"
    learn = pictures(folder, *ROOMS[room])
    model = OnnxModel(learn.kd_export(tmp_path/'m.onnx', scores={}))
    ours,theirs,worst = differences(learn, model, get_image_files(folder))
    assert ours==theirs and worst<1e-3

@pytest.mark.slow
def test_gray_students(folder, tmp_path):
    learn = pictures(folder, [Resize(32)], [Normalize.from_stats([.5], [.2])],
                     (ImageBlock(PILImageBW),CategoryBlock), model=net(1))
    ours,theirs,worst = differences(learn, OnnxModel(learn.kd_export(tmp_path/'m.onnx')), get_image_files(folder))
    assert ours==theirs and worst<1e-3

@pytest.mark.slow
def test_several_labels_and_numbers(folder, tmp_path):
    "sigmoid with the loss's threshold; and regression as values"
    def labels(f): return [label(f), *(['odd'] if int(f.stem[2:])%2 else [])]
    learn = pictures(folder, [Resize(32)], (), (ImageBlock,MultiCategoryBlock), labels, net(outputs=3),
                     loss_func=BCEWithLogitsLossFlat(thresh=0.45), metrics=accuracy_multi)
    model = OnnxModel(learn.kd_export(tmp_path/'m.onnx'))
    ours,theirs,worst = differences(learn, model, get_image_files(folder))
    assert [[*o] for o in ours]==theirs and worst<1e-3 and model.info['threshold']==0.45
    learn = pictures(folder, [Resize(32)], (), (ImageBlock,RegressionBlock), lambda f: float(f.stem[2:]),
                     net(outputs=1), loss_func=MSELossFlat(), metrics=rmse)
    model = OnnxModel(learn.kd_export(tmp_path/'r.onnx'))
    file = get_image_files(folder)[0]
    with learn.no_bar(): assert model.predict(file)[0]==pytest.approx(learn.predict(file)[2].tolist(), abs=1e-3)

def small_body(pretrained=False):
    "A body as `create_unet_model` takes it, in place of `resnet18`"
    def stage(i, o): return nn.Sequential(nn.Conv2d(i,o,3,2,1), nn.BatchNorm2d(o), nn.ReLU())
    return nn.Sequential(stage(3,8), stage(8,16), stage(16,32), nn.AdaptiveAvgPool2d(1))

@pytest.mark.slow
@pytest.mark.parametrize('method', ['squish','crop','pad'])
def test_a_mask_has_the_size_of_the_picture(folder, method, tmp_path):
    "U-Net included; pixels outside of the crop have class -1"
    def mask(f): return PILMask.create(np.asarray(Image.open(f).convert('L'))//128)
    set_seed(0)
    conv = nn.Sequential(nn.Conv2d(3,8,3,1,1), nn.ReLU(), nn.Conv2d(8,2,1))
    model = create_unet_model(small_body, 2, (32,32), pretrained=False) if method=='squish' else conv
    learn = pictures(folder, [Resize(32, method=method)], [IMAGENET], (ImageBlock,MaskBlock(['dark','light'])), mask,
                     model, loss_func=CrossEntropyLossFlat(axis=1), metrics=None)
    model = OnnxModel(learn.kd_export(tmp_path/'m.onnx'))
    for file in get_image_files(folder)[:4]:
        with learn.no_bar(): prob = learn.predict(file)[2].numpy()
        mask,_,ours = model.predict(file)
        assert np.abs(ours-prob).max()<1e-2 and mask.shape==Image.open(file).size[::-1]
        h,w = mask.shape
        assert (mask==-1).sum()==(h*w-min(h,w)**2 if method=='crop' else 0)
        if method!='squish': continue
        nearest = Image.fromarray(ours.argmax(0).astype(np.uint8)).resize((w,h), Image.NEAREST)
        assert {*mask.flat}=={0,1}
        assert (np.asarray(nearest)!=mask).mean()<0.01   # few pixels are in the middle between two

@pytest.mark.slow
def test_a_transform_that_cannot_be_written_is_named(folder, tmp_path):
    def posterize(x:PILImage): return PILImage.create(np.asarray(x)//64*64)
    def shift(x:TensorImage): return x+1
    for item,batch,name in (([Resize(32), posterize],[],'posterize'), ([Resize(32)],[shift],'shift'),
                            ([RatioResize(32), CropPad(32)],[],'RatioResize')):
        learn = pictures(folder, item, batch)
        with pytest.raises(ValueError, match=f"The transform '{name}' changes the"): learn.kd_export(tmp_path/'m.onnx')
    learn = pictures(folder, [Resize(32, resamples=(Image.NEAREST,Image.NEAREST))])
    with pytest.raises(ValueError, match='Resize has resamples'): learn.kd_export(tmp_path/'m.onnx')
    assert not (tmp_path/'m.onnx').exists()

def test_a_learner_without_data_says_where_to_export(folder, tmp_path):
    learn = pictures(folder, [Resize(32)])
    learn.path = tmp_path
    learn.export('m.pkl')
    with pytest.raises(ValueError, match='export from the Learner that was trained'):
        load_learner(tmp_path/'m.pkl').kd_export(tmp_path/'m.onnx')

@pytest.mark.slow
def test_metadata(folder, tmp_path):
    learn = pictures(folder, [Resize(32)])
    loss,acc = learn.validate()
    info = OnnxModel(learn.kd_export(tmp_path/'m.onnx', license='mit', title='Letters')).info
    assert (info['task'],info['input'],info['classes'],info['license'],info['title'])==(
        'classification','image',['a','b'],'mit','Letters')
    assert info['scores']==pytest.approx(dict(valid_loss=loss, accuracy=acc), abs=1e-6)
    assert info['versions']['torch'].split('+')[0]==torch.__version__.split('+')[0]

# ---- tables, texts, tensors

@pytest.mark.slow
@pytest.mark.parametrize('cats,conts', [(['c','k'],['x','z']), ([],['x']), (['c'],[])])
def test_a_table_by_names_and_raw_numbers(cats, conts, tmp_path):
    "missing numbers and unknown categories included"
    from fastai.tabular.all import (TabularDataLoaders, Categorify, FillMissing, Normalize,
                                     CategoryBlock, tabular_learner)
    z = np.where(np.arange(32)%5==0, np.nan, np.arange(32.))
    df = pd.DataFrame(dict(c=list('abcd')*8, k=[1,2,3,4]*8, x=np.arange(32.)*1000, z=z, y=list('nnyy')*8))
    dls = TabularDataLoaders.from_df(df, procs=[Categorify,FillMissing,Normalize], cat_names=cats, cont_names=conts,
        y_names='y', y_block=CategoryBlock(), valid_idx=[*range(8)], bs=4)
    learn = quiet(tabular_learner(dls, layers=[8], n_out=2, metrics=accuracy))
    learn.fit(1, 1e-2)
    model = OnnxModel(learn.kd_export(tmp_path/'m.onnx'))
    df.loc[3,'c'] = 'never seen'
    with learn.no_bar(): ours = torch.stack([learn.predict(df.iloc[i])[2] for i in range(8)])
    torch.testing.assert_close(model(df[:8]), ours, atol=1e-5, rtol=0)
    assert model.predict(df.iloc[3])[0]=='ny'[int(ours[3].argmax())]
    res = learn.kd_parity(df[:8], onnx=model)
    assert res.agreement['onnx']==1 and not len(res.differ)

@pytest.mark.slow
@pytest.mark.parametrize('max_len', [None,12])
def test_a_text_of_any_length(max_len, tmp_path):
    learn = quiet(text_learner(6, n_layers=2, max_len=max_len))
    model = OnnxModel(learn.kd_export(tmp_path/'m.onnx', scores={}))
    for text in ('a good film', 'bad indeed film not good '*5):
        ids = learn.dls.test_dl([text]).one_batch()[0][0]
        with learn.no_bar(): ours = learn.predict(text)[2].numpy()
        assert np.abs(model.predict(ids)[2]-ours).max()<1e-5
        assert [model.info['vocab'][i] for i in ids]==[learn.dls.vocab[0][i] for i in ids]

class Words(torch.utils.data.Dataset):
    "Inputs in a dict"
    def __len__(self): return 24
    def __getitem__(self, i): return {'ids': torch.arange(i, i+6)%30},torch.tensor(i%4)

class Bag(nn.Module):
    def __init__(self): super().__init__(); self.emb,self.head = nn.Embedding(30,8),nn.Linear(8,4)
    def forward(self, b): return self.head(self.emb(b['ids']).mean(1))

@pytest.mark.slow
def test_inputs_in_a_dict(tmp_path):
    set_seed(0)
    dls = DataLoaders.from_dsets(Words(), Words(), bs=8, num_workers=0, device='cpu')
    learn = quiet(Learner(dls, Bag(), loss_func=CrossEntropyLossFlat()))
    b,_ = dls.valid.one_batch()
    torch.testing.assert_close(OnnxModel(export_onnx(learn, tmp_path/'m.onnx'))(b), learn.model(b))
    model = OnnxModel(learn.kd_export(tmp_path/'k.onnx'))
    torch.testing.assert_close(model(b), learn.model(b).softmax(1))

@pytest.mark.slow
def test_loaders_of_pytorch(tmp_path):
    data = [*zip(torch.randn(16,4), torch.arange(16)%3)]
    loader = torch.utils.data.DataLoader(data, 4)
    learn = quiet(Learner(DataLoaders(loader, loader, device='cpu'), nn.Linear(4,3), loss_func=nn.CrossEntropyLoss()))
    x = data[0][0][None]
    torch.testing.assert_close(OnnxModel(learn.kd_export(tmp_path/'m.onnx'))(x), learn.model(x).softmax(1))

@pytest.mark.slow
def test_export_changes_nothing(folder, tmp_path):
    learn = pictures(folder, [Resize(32)])
    learn.model.train()
    before,state,values = deepcopy(learn.model.state_dict()),torch.get_rng_state(),[*learn.recorder.values]
    learn.kd_export(tmp_path/'m.onnx')
    learn.kd_parity(get_image_files(folder)[:2], onnx=tmp_path/'m.onnx')
    assert learn.model.training and torch.equal(state, torch.get_rng_state()) and learn.recorder.values==values
    for k,v in learn.model.state_dict().items(): assert torch.equal(v, before[k])

# ---- parity from files

@pytest.fixture(scope='module')
def exported(folder, tmp_path_factory):
    learn = pictures(folder, [Resize(24)], [IMAGENET])
    with learn.no_bar(): learn.fit(3, 1e-2)
    return learn,OnnxModel(learn.kd_export(tmp_path_factory.mktemp('onnx')/'m.onnx'))

def test_parity_of_files(exported, folder):
    learn,model = exported
    res = learn.kd_parity(get_image_files(folder), onnx=model.file)
    assert (res.files['onnx'],res.agreement['onnx'],len(res.differ))==(24,1,0)
    assert res.largest_difference['onnx']<1e-3

def resized(path, how): return np.asarray(Image.open(path).convert('RGB').resize((24,24), how))

def sampled(path):
    "The largest square, resized as PyTorch does without antialiasing"
    im = Image.open(path).convert('RGB')
    x = torch.tensor(np.asarray(ImageOps.fit(im, (min(im.size),)*2, Image.NEAREST))).permute(2,0,1)[None].float()
    return F.interpolate(x, size=24, mode='bilinear')[0].round().byte().permute(1,2,0).numpy()

MISTAKES = {'color: BGR instead of RGB': lambda m,f: m(read_image(f)[...,::-1].copy())[0],
            'resize: squished': lambda m,f: m(resized(f, Image.BILINEAR))[0],
            'resize: nearest filter': lambda m,f: m(np.asarray(
                ImageOps.fit(Image.open(f).convert('RGB'), (24,24), Image.NEAREST)))[0],
            'resize: no antialiasing': lambda m,f: m(sampled(f))[0]}

@pytest.fixture(scope='module')
def noise(tmp_path_factory):
    "Files of pictures in which each pixel counts"
    folder,rng = tmp_path_factory.mktemp('noise'),np.random.default_rng(0)
    for i,(h,w) in enumerate(SHAPES):
        Image.fromarray(rng.integers(0, 256, (2*h,2*w,3), dtype=np.uint8)).save(folder/f'{i}.png')
    return get_image_files(folder)

@pytest.mark.parametrize('cause', MISTAKES)
def test_parity_names_the_step_that_differs(exported, folder, noise, cause):
    learn,model = exported
    files = noise if 'antialiasing' in cause else [f for f in get_image_files(folder) if f.suffix=='.png']
    res = learn.kd_parity(files, wrong=partial(MISTAKES[cause], model), tol=1e-4)
    assert len(res.differ) and res.differ['likely cause'].value_counts().index[0]==cause

def test_parity_names_a_missing_normalization(exported, folder):
    "A network that is fed by hand"
    learn,_ = exported
    def by_hand(f):
        window = ImageOps.fit(Image.open(f).convert('RGB'), (24,24), Image.BILINEAR)
        x = torch.tensor(np.asarray(window)).permute(2,0,1)[None]/255
        with torch.no_grad(): return learn.model.eval()(x).softmax(1)[0]
    square = [f for f in get_image_files(folder) if Image.open(f).size==(57,57)]
    res = learn.kd_parity(square, wrong=by_hand)
    assert len(res.differ) and {*res.differ['likely cause']}=={'normalization: none'}

def test_nan_never_passes(exported, folder):
    learn,model = exported
    files = get_image_files(folder)[:3]
    def broken(f): return torch.full((2,), math.nan) if f==files[0] else model(f)[0]
    res = learn.kd_parity(files, broken=broken)
    assert math.isnan(res.largest_difference['broken']) and res.agreement['broken']<1
    assert [*res.differ.file]==[files[0]] and 'NaN' in res.differ['likely cause'][0]
    one = learn.kd_parity(rounds=1, broken=lambda x: learn.model(x).detach().index_fill(0, torch.tensor([0]), math.nan))
    assert math.isnan(one.largest_difference['broken']) and one.agreement['broken']<1

def test_ignored_positions_do_not_count():
    set_seed(0)
    y = torch.randint(3, (8,4,4)); y[:,:2] = 255
    data = [*zip(torch.randn(8,1,4,4), y)]
    learn = quiet(Learner(DataLoaders(DataLoader(data, bs=4), DataLoader(data, bs=4)), nn.Conv2d(1,3,1),
                          loss_func=CrossEntropyLossFlat(axis=1, ignore_index=255)))
    def other(x):
        pred = learn.model(x).detach().clone()
        pred[:,:,:2] = -pred[:,:,:2]
        return pred
    res = learn.kd_parity(rounds=1, other=other)
    assert res.agreement['other']==1 and res.largest_difference['other']==0

def test_parity_says_what_it_needs(exported):
    with pytest.raises(ValueError, match='Expected a model to compare'): exported[0].kd_parity()
    with pytest.raises(ValueError, match='at least one file'): exported[0].kd_parity([], onnx=exported[1])
    with pytest.raises(TypeError, match='takes images before the preprocessing'):
        exported[0].kd_parity(rounds=1, onnx=exported[1])

# ---- a script without PyTorch, and int8

BLOCK = """import sys
class Forbid:
    def find_spec(self, name, path=None, target=None):
        banned = ('torch','fastai','fastcore','kd_fastai')
        if name.split('.')[0] in banned: raise ImportError(f'{name} is forbidden here')
sys.meta_path.insert(0, Forbid())
"""

def run_script(code, folder, *args):
    "What a script prints in a process that cannot import PyTorch, fastai or kd_fastai"
    (folder/'run.py').write_text(BLOCK+code)
    res = subprocess.run([sys.executable, 'run.py', *map(str, args)], cwd=folder, capture_output=True, text=True)
    assert res.returncode==0, res.stderr
    return res.stdout

def test_the_printed_script_runs_without_pytorch(exported, folder, tmp_path):
    learn,model = exported
    shutil.copy(model.file, tmp_path/'m.onnx')
    code = runner_code(model.info, 'm.onnx')
    assert len([o for o in code.splitlines() if o])<=10
    for file in get_image_files(folder)[:2]:
        with learn.no_bar(): name,_,prob = learn.predict(file)
        said = run_script(code, tmp_path, file).splitlines()[0]
        assert said.startswith(f'{name}: ')
        assert float(said.split(': ')[1][:-1])==pytest.approx(100*prob.max().item(), abs=0.1)

def test_the_process_without_pytorch_has_none(tmp_path):
    with pytest.raises(AssertionError, match='torch is forbidden here'): run_script('import torch', tmp_path)

@pytest.mark.slow
def test_int8_from_files(exported, folder, tmp_path):
    "The int8 file takes pictures, is smaller, and its table is that of both files"
    learn,model = exported
    res = learn.kd_quantize(model.file, tmp_path/'int8.onnx', samples=12, rounds=3)
    names = [OnnxModel(res.file).predict(f)[0] for f in get_image_files(folder)]
    assert {*names}<={'a','b'} and OnnxModel(res.file).info==model.info
    assert [*res.table.index]==['float','int8'] and res.table.agreement['int8']>0.8
    assert res.table.accuracy['float']==pytest.approx(learn.validate()[1])
    assert res.ship==res.decision.startswith('Ship the int8 file')
    assert 'accuracy' in res.decision and 'times as fast' in res.decision

def test_the_decision_for_int8():
    from kd_fastai.ship.quantize import _decide
    def table(ms, accuracy):
        return pd.DataFrame(dict(kb=[100.,30.], ms=[1.,ms], accuracy=[0.9,accuracy]), index=["float","int8"])
    assert _decide(table(0.5, 0.895), 'accuracy', 0.01, False)[1]
    assert 'int8 loses 0.02' in _decide(table(0.5, 0.88), 'accuracy', 0.01, False)[0]
    assert 'int8 is slower' in _decide(table(1.5, 0.9), 'accuracy', 0.01, False)[0]
    assert not _decide(table(0.5, math.nan), 'accuracy', 0.01, False)[1]
