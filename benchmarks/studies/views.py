"""What repeating K views costs in accuracy, against views that are drawn fresh in each epoch.

    python benchmarks/accuracy.py views [--seeds 8]

Digits shifted at random by up to one pixel, 300 labels, a teacher trained on all 1000. All methods of one seed begin
with the same student. Writes `views.csv`, which the tutorial reads; about five minutes on one core."""
import argparse, csv, warnings
warnings.filterwarnings('ignore')
import torch
from fastai.basics import CrossEntropyLossFlat, Learner, Tensor, Transform, accuracy, set_seed
import fastai.callback.schedule  # noqa: F401, gives Learner its fit_one_cycle
from kd_fastai.all import CachedTeacher, KnowledgeDistillationCallback, SoftTarget
from sweep import TABLES
from kd_fastai.demo import digits, score, small_net

class Shift(Transform):
    "Each image of a batch moved by up to one pixel in each direction"
    def encodes(self, x:Tensor):
        if x.ndim<4: return x
        padded = torch.nn.functional.pad(x, (1,1,1,1), value=-1.)
        moves = torch.randint(3, (len(x),2)).tolist()
        return torch.stack([o[:,i:i+8,j:j+8] for o,(i,j) in zip(padded, moves)])

def shifted(labels, seed):
    dls = digits(labels, seed)
    dls.train = dls.train.new(after_batch=Shift())
    dls.train.rng.seed(seed)
    return dls

def train(dls, width, epochs, seed, cbs=()):
    set_seed(seed, reproducible=True)
    learn = Learner(dls, small_net(width), loss_func=CrossEntropyLossFlat(), metrics=accuracy)
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(epochs, 1e-2, cbs=cbs)
    return learn

def methods(teacher):
    "Teachers by the number of views; the first sees no shifts"
    return {'no shifts': CachedTeacher(teacher), **{f'{k} views': CachedTeacher(teacher, views=k) for k in (1,2,4,8)},
            'fresh views': teacher}

def main(seeds=8, labels=300, epochs=24):
    teacher = train(shifted(990, 0), 32, 12, 0).model
    rows = []
    for seed in range(seeds):
        for name,t in methods(teacher).items():
            dls = digits(labels, seed) if name=='no shifts' else shifted(labels, seed)
            kd = KnowledgeDistillationCallback(t, SoftTarget, weight=0.9, task_weight=0.1)
            rows.append({'seed': seed, 'method': name, 'accuracy': score(train(dls, 8, epochs, seed, kd))})
        print(seed, {r['method']: round(r['accuracy'], 1) for r in rows if r['seed']==seed}, flush=True)
    return rows

if __name__=='__main__':
    p = argparse.ArgumentParser(description=__doc__.split('\n')[0]); p.add_argument('--seeds', type=int, default=8)
    torch.set_num_threads(1)
    rows = main(p.parse_args().seeds)
    with open(TABLES/'views.csv', 'w', newline='') as f:
        out = csv.DictWriter(f, rows[0], lineterminator='\n'); out.writeheader(); out.writerows(rows)
