"""From picture files to names: parity, int8 and a cascade on color pictures.

    python benchmarks/ship.py [--seeds 5]

The student is the one that `shrink.py student` chose, with and without its teacher, an EfficientNet-Lite0. Training and
validation pictures of `pictures.py` (half `choose`) are written as files: validation files have four shapes, and are
PNG, PNG with alpha, or gray JPEG in turn. Four tables:

- `ship_parity.csv`: names and probabilities of the ONNX file and of `learn.predict`, for every validation file.
- `ship_int8.csv`: size, milliseconds a picture and accuracy of float and int8 files, on color files of 64x64.
- `ship_int8_gain.csv`: paired differences over seeds: what int8 costs, and what the teacher gives before and after it.
- `ship_cascade.csv`: accuracy and mean milliseconds of a cascade of two files, by the share of teacher calls. One half
  of the validation files chooses the threshold; `ship_cascade_new.csv` has the result on the other half."""
import argparse, logging, os, tempfile, warnings
os.environ.setdefault('OMP_NUM_THREADS', '1')
warnings.filterwarnings('ignore')
logging.disable(logging.WARNING)
from pathlib import Path
import pandas as pd
import torch
from PIL import Image
from fastai.vision.all import *
from kd_fastai.all import *
from kd_fastai.report.compare import paired_interval
from kd_fastai.report.shrink import FINAL, student_learner
from data import MEAN, STD, emoji, emoji_split
from pictures import subset
from shrink import CANDIDATES, EPOCHS, Remembers, pictures_teacher, train
from sweep import TABLES

STUDENT = 'separable 24-192'
SHAPES = [(64,64), (96,64), (64,80), (48,64)]  # width, height

def write_files(folder):
    "Write the training pictures, and the validation pictures as they are (`valid`) and in several forms (`forms`)"
    x,y,_,_,vocab = emoji()
    training,valid = emoji_split('choose')
    for part,chosen in dict(train=training[subset('choose', 1142)], valid=valid, forms=valid).items():
        for i in chosen.tolist():
            file = folder/part/vocab[y[i]]/f'{i}.png'
            file.parent.mkdir(parents=True, exist_ok=True)
            picture = Image.fromarray(x[i].movedim(0, -1).numpy())
            if part=='forms':
                picture = picture.resize(SHAPES[i%4], Image.BICUBIC)
                if i%3==1: picture.putalpha(200)
                if i%3==2: picture,file = picture.convert('L'),file.with_suffix('.jpg')
            picture.save(file)

def of_files(folder, model):
    "A Learner with the data of the files"
    block = DataBlock((ImageBlock,CategoryBlock), get_items=partial(get_image_files, folders=['train','valid']),
                      get_y=parent_label, splitter=GrandparentSplitter(), item_tfms=Resize(64),
                      batch_tfms=Normalize.from_stats([MEAN]*3, [STD]*3))
    dls = block.dataloaders(folder, bs=64, num_workers=0, device='cpu')
    return Learner(dls, model, loss_func=CrossEntropyLossFlat(), metrics=accuracy)

def trained_student(source, seed, teacher=None):
    set_seed(seed, reproducible=True)
    learn = student_learner(source, CANDIDATES[STUDENT])
    if teacher is not None: learn.distill(teacher)
    source.dls.train.rng.seed(seed)
    set_seed(seed, reproducible=True)
    with learn.no_bar(), learn.no_logging(): train(learn, EPOCHS)
    return learn.model

def quantized(learn, name, folder):
    "Rows of the float and the int8 file"
    file = learn.kd_export(folder/f'{name}.onnx', scores={})
    table = learn.kd_quantize(file, folder/f'{name}_int8.onnx').table
    return table.drop(columns='valid_loss').rename_axis('file').reset_index()

def parity(learn, file, folder):
    "Names by the file and by `learn.predict`, for each validation file"
    files,model = get_image_files(folder/'forms'),OnnxModel(file, threads=1)
    with learn.no_bar(): names = [learn.predict(f)[0] for f in files]
    same = sum(model.predict(f)[0]==n for f,n in zip(files, names))
    found = learn.kd_parity(files, onnx=model)
    pd.DataFrame([dict(files=len(files), shapes=len(SHAPES), equal_names=same,
                       largest_difference=found.largest_difference['onnx'], listed=len(found.differ))]).round(6).to_csv(
        TABLES/'ship_parity.csv', index=False)

def cascade(student, teacher, folder, vocab, wanted=0.2):
    files = get_image_files(folder/'valid').sorted()
    order = torch.randperm(len(files), generator=torch.Generator().manual_seed(0))
    half = [[files[i] for i in o] for o in order.chunk(2)]
    labels = [torch.tensor([vocab.index(parent_label(f)) for f in o]) for o in half]
    models = [OnnxModel(folder/f'{n}.onnx', threads=1) for n in (student, teacher)]
    both = Cascade(*models).calibrate((half[0], labels[0]), share=wanted)
    both.table.drop_duplicates('share').round(5).to_csv(TABLES/'ship_cascade.csv', index=False)
    def right(model): return (model(half[1]).argmax(1)==labels[1]).float().mean().item()
    new = dict(student=right(models[0]), teacher=right(models[1]), cascade=right(both), share=both.share)
    pd.DataFrame([dict(files=len(half[1]), wanted_share=wanted, **new, ms=both.report['ms'])]).round(4).to_csv(
        TABLES/'ship_cascade_new.csv', index=False)

def gains(rows):
    "Paired differences over seeds"
    scores = rows[rows.model!='teacher'].pivot(index='seed', columns=['model','file'], values='accuracy')
    pairs = {'int8, baseline': (('baseline','int8'), ('baseline','float')),
             'int8, distilled': (('distilled','int8'), ('distilled','float')),
             'teacher, float': (('distilled','float'), ('baseline','float')),
             'teacher, int8': (('distilled','int8'), ('baseline','int8'))}
    rows = {n: dict(runs=len(scores), **paired_interval(scores[a]-scores[b])) for n,(a,b) in pairs.items()}
    return pd.DataFrame.from_dict(rows, orient='index').rename_axis('difference')

def main():
    p = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    p.add_argument('--seeds', type=int, default=5)
    a = p.parse_args()
    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp())
    write_files(folder)
    source = pictures_teacher()
    remembers,rows = Remembers(source.model),[]
    for seed in range(FINAL, FINAL+a.seeds):
        for name,teacher in dict(distilled=remembers, baseline=None).items():
            learn = of_files(folder, trained_student(source, seed, teacher))
            rows.append(quantized(learn, f'{name}_{seed}', folder).assign(model=name, seed=seed))
            print(rows[-1].to_string(), flush=True)
            if len(rows)==1: parity(learn, folder/f'{name}_{seed}.onnx', folder)
    rows.append(quantized(of_files(folder, source.model), 'teacher', folder).assign(model='teacher', seed=0))
    rows = pd.concat(rows)
    rows.groupby(['model','file'])[['kb','ms','accuracy','agreement','largest_difference']].mean().round(4).to_csv(
        TABLES/'ship_int8.csv')
    gains(rows).to_csv(TABLES/'ship_int8_gain.csv', float_format='%.4f')
    cascade(f'distilled_{FINAL}', 'teacher', folder, [*learn.dls.vocab])
    for n in ('parity','int8','int8_gain','cascade_new'): print(pd.read_csv(TABLES/f'ship_{n}.csv').to_string())

if __name__=='__main__': main()
