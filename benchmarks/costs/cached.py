"""The cost of a teacher that predicts once, of stored predictions, and of a faster copy.

    python benchmarks/cost.py cached [--rounds 15] [--device cuda]

A resnet18 teaches a network of four stages on random images: tensors of 32x32 pixels in batches of 64 and of 96x96 in
batches of 32, flipped and shifted at random, and JPEG files that one worker decodes and crops at random to 96x96.
Targets are for the files, which is the usual case, and for steps of 96x96: a step of 32x32 takes 15 ms, of which fastai
and this package take a large part. Epochs and steps take turns in one process; ratios are taken round by round,
with quartiles. An epoch is measured without the start of its fit, which is a column of its own: there the data and the
weights of the teacher are compared with the cache."""
import argparse, statistics, tempfile, time, warnings
from functools import cache, partial
from pathlib import Path
warnings.filterwarnings('ignore')
import numpy as np, torch
from fastai.basics import CrossEntropyLossFlat, DataLoaders, Learner, Tensor, Transform, TfmdDL, noop, set_seed
from fastai.callback.progress import ProgressCallback
from fastai.vision.all import CategoryBlock, DataBlock, Flip, ImageBlock, RandomResizedCrop, get_image_files
from kd_fastai.all import CachedTeacher, KnowledgeDistillationCallback, SoftTarget
from kd_fastai.teacher.cached import StoredTeacher
from kd_fastai.demo import shift_and_flip
from kd_fastai.teacher.fast import fast_copy
import clock
from nets import stages
from clock import ms, peak_mib, ratio, synchronize, take_turns, target, write
from costs import step

BATCH = {32: 64, 96: 32}  # images of so many pixels

class Augment(Transform):
    "Flip and shift each image of a batch"
    def encodes(self, x:Tensor): return shift_and_flip(x, 4) if x.ndim==4 else x

class _Rows(TfmdDL):
    def create_batches(self, samples):
        for b in self.chunkify(samples): yield self.dataset[[*b]]

def data(pixels=32, n=256):
    set_seed(0)
    ds = step._Same(torch.randn(n,3,pixels,pixels), torch.randint(100, (n,)))
    kwargs = dict(bs=BATCH[pixels], num_workers=0, device=torch.get_default_device())
    train = _Rows(ds, shuffle=True, after_batch=Augment(), **kwargs)
    train._n_inp = 1
    return DataLoaders(train, _Rows(ds, **kwargs))

@cache
def pictures(n=256):
    "A folder of JPEG files of 128x128, which is deleted at the end"
    from PIL import Image
    folder,rng = tempfile.TemporaryDirectory(),np.random.default_rng(0)
    for i in range(n):
        coarse = Image.fromarray(rng.integers(0, 256, (16,16,3), dtype=np.uint8))
        coarse.resize((128,128)).save(Path(folder.name)/f'{i}.jpg')
    return folder

def from_files():
    "Pictures that a worker decodes and crops at random; the validation set is not used"
    block = DataBlock((ImageBlock, CategoryBlock(vocab=[*range(100)])), get_items=get_image_files,
                      get_y=lambda f: int(f.stem)%100, splitter=lambda o: (range(len(o)), [0]),
                      item_tfms=RandomResizedCrop(96), batch_tfms=Flip())
    return block.dataloaders(pictures().name, bs=BATCH[96], num_workers=1)

def learner(dls, teacher=None):
    set_seed(0)
    cbs = [] if teacher is None else KnowledgeDistillationCallback(teacher, SoftTarget)
    learn = Learner(dls, stages(16), loss_func=CrossEntropyLossFlat(), cbs=cbs)
    learn.remove_cb(ProgressCallback)
    learn.logger,learn._do_epoch_validate = noop,noop
    return learn

def epoch_of(learn, starts):
    "A function that fits one epoch and returns its seconds; those before it go to `starts`"
    train_epoch = learn._do_epoch
    def timed():
        synchronize()
        learn.epoch_began = time.perf_counter()
        train_epoch()
        synchronize()
        learn.epoch_took = time.perf_counter()-learn.epoch_began
    learn._do_epoch = timed
    def fit():
        began = time.perf_counter()
        learn.fit(1)
        starts.append(learn.epoch_began-began)
        return learn.epoch_took
    return fit

IMAGES = {'32x32': partial(data, 32), '96x96': partial(data, 96), '96x96, files': from_files}

def epochs(images, rounds, K=2):
    "An epoch with the teacher, with views that are all recorded, and without a teacher"
    teacher,data = step.on_images(1, int(images[:2]))[0],IMAGES[images]
    with tempfile.TemporaryDirectory() as d:
        CachedTeacher(teacher, d, views=K).fill(data(), bar=False)
        teachers = {'no teacher': None, 'live teacher': teacher, f'{K} views': CachedTeacher(teacher, d, views=K),
                    'stored': StoredTeacher(d)}
        starts = {n: [] for n in teachers}
        fits = {n: epoch_of(learner(data(), t), starts[n]) for n,t in teachers.items()}
        times = take_turns(fits, rounds, 1)
    rows = []
    for n in times:
        mid,low,high = ratio(times, n, 'no teacher')
        rows.append({'images': images, 'epoch with': n, 'ms': ms(times[n]), 'to no teacher': mid, 'quartile 1': low,
                     'quartile 3': high, 'start of a fit, ms': 1000*statistics.median(starts[n])})
    return rows,[target(f'{images}: epoch with views to no teacher', ratio(times, f'{K} views', 'no teacher'), 1.05)]

def sweep(students=10, n_epochs=3):
    "Ten training runs with the live teacher, and the filling of a cache with ten training runs after it"
    teacher = step.medium()[0]
    def live():
        for _ in range(students): learner(data(), teacher).fit(n_epochs)
    def cached():
        with tempfile.TemporaryDirectory() as d:
            CachedTeacher(teacher, d, views=1).fill(data(), bar=False)
            for _ in range(students): learner(data(), StoredTeacher(d)).fit(n_epochs)
    times = take_turns({'live': live, 'cached': cached}, 2, 0)
    return ([{'sweep of ten': k, 's': ms(v)/1000} for k,v in times.items()],
            [target('sweep of ten students, cached to live', ratio(times, 'cached', 'live'), 1.)])

def fast(pixels, rounds):
    "A step with fast copies of the teacher, to the loop by hand with the teacher itself"
    teacher,student,x,y = step.on_images(BATCH[pixels], pixels)
    copies = {'float32, folded, channels last': fast_copy(teacher, x),
              'bfloat16, folded, channels last': fast_copy(teacher, x, dtype=torch.bfloat16)}
    methods = {'by hand': step.by_hand(teacher, student, x, y),
            'live teacher': step.fastai_step(student, x, y, [KnowledgeDistillationCallback(teacher, SoftTarget)])}
    methods.update({n: step.fastai_step(student, x, y, [KnowledgeDistillationCallback(t, SoftTarget)])
                 for n,t in copies.items()})
    times,rows = take_turns(methods, rounds),[]
    for n in methods:
        mid,low,high = ratio(times, n, 'by hand')
        rows.append({'pixels': pixels, 'teacher': n, 'ms': ms(times[n]), 'to by hand': mid, 'quartile 1': low,
                     'quartile 3': high})
    return rows,[target('step with the faster copy to by hand', min(ratio(times, n, 'by hand') for n in copies), 1.)]

def memory():
    "MiB at most in a step, without a teacher and with stored predictions"
    teacher,student,x,y = step.medium()
    with torch.no_grad(): pred = teacher(x)
    methods = {'no teacher': step.fastai_step(student, x, y),
            'stored predictions': step.fastai_step(student, x, y,
                                               [KnowledgeDistillationCallback(StoredTeacher(pred), SoftTarget)]),
            'live teacher': step.fastai_step(student, x, y, [KnowledgeDistillationCallback(teacher, SoftTarget)])}
    for f in methods.values(): f()
    mib = {n: peak_mib(f) for n,f in methods.items()}
    return ([{'step with': n, 'MiB at most': v} for n,v in mib.items()],
            [target('memory of a step with stored predictions to no teacher',
                    mib['stored predictions']/mib['no teacher'], 1.02)])

def by_size(measure, sizes, rounds):
    "The rows of all sizes, and the targets of the last"
    res = [measure(o, rounds) for o in sizes]
    return [row for rows,_ in res for row in rows],res[-1][1]

def main(rounds=15):
    "Measure, write the tables, and return the targets"
    targets = []
    for name,(rows,ts),said in (('cached_epoch', by_size(epochs, IMAGES, rounds),
                                 'An epoch on augmented data, all methods taking turns.'),
            ('cached_sweep', sweep(), 'Ten students, three epochs each.'),
            ('fast_teacher', by_size(fast, (32,96), 2*rounds), 'A step with a faster copy of the teacher.'),
            ('cached_memory', memory(), 'Memory of a step, without the weights.')):
        write(name, rows, said)
        targets += ts
    return targets

if __name__=='__main__':
    p = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    p.add_argument('--rounds', type=int, default=15); p.add_argument('--device', default='cpu')
    a = p.parse_args()
    torch.set_num_threads(1)
    clock.use_device(a.device)
    main(a.rounds)
