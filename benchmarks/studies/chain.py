"""Prune a trained student, or train it for low precision, with the same budget: on the labels only, or with the
teacher. What does distillation recover?

    python benchmarks/accuracy.py chain [pruned] [quantized] [--seeds 8] [--epochs 10] [--quick]

Every seed has its own labels and its own student, trained without a teacher for 20 epochs. The teacher learned from
1000 digits, the students from 200. Pruned: the same share of the smallest weights of all its convolutions and of its
head is set to zero (`torch.nn.utils.prune`), and stays zero. Quantized: quantization-aware training with weights of
2 bits and activations of 8, by `torch.ao.quantization`, because torchao's own has no convolutions. Writes
`benchmarks/tables/chain.csv`; what is not measured again keeps its rows."""
import argparse
from functools import cache, partial
from pathlib import Path
import pandas as pd
import torch
import torch.ao.quantization as tq
from torch import nn
from torch.ao.quantization.quantize_fx import prepare_qat_fx
from torch.nn.utils import prune
from fastai.basics import Callback, CrossEntropyLossFlat, Learner, accuracy
from kd_fastai.callback import KnowledgeDistillationCallback
from kd_fastai.report.compare import kd_compare
from kd_fastai.demo import digits, small_net, train
from kd_fastai.losses import SoftTarget
from sweep import TABLES

AMOUNT,BITS = 0.8,2

@cache
def teacher(): return train(digits(), 32, 10, seed=0).model

@cache
def student(seed): return train(digits(200, seed), 8, 20, seed).model.state_dict()

def make_learner(seed):
    "A Learner with the trained student"
    learn = Learner(digits(200, seed), small_net(8), lr=3e-3, metrics=accuracy, loss_func=CrossEntropyLossFlat())
    learn.model.load_state_dict(student(seed))
    return learn

def distillation(weight=0.9, task_weight=0.1):
    return KnowledgeDistillationCallback(teacher(), partial(SoftTarget, T=4), weight=weight, task_weight=task_weight)

# ---- pruning

def prune_student(learn):
    "Set the smallest weights to zero; a mask keeps them there"
    parts = [(m, 'weight') for m in learn.model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    prune.global_unstructured(parts, prune.L1Unstructured, amount=AMOUNT)

def pruned(learn, **kwargs):
    prune_student(learn)
    return distillation(**kwargs) if kwargs else None

# ---- quantization-aware training

def qconfig(bits):
    "Weights of so many bits by channel, activations of 8 bits"
    half = 2**(bits-1)
    weight = tq.FakeQuantize.with_args(
        observer=tq.MovingAveragePerChannelMinMaxObserver, quant_min=-half, quant_max=half-1, dtype=torch.qint8,
        qscheme=torch.per_channel_symmetric, ch_axis=0)
    return tq.QConfig(activation=tq.default_fused_act_fake_quant, weight=weight)

def prepare_student(learn, bits=None):
    "Replace the model by one that rounds weights and activations while it trains"
    mapping = tq.QConfigMapping().set_global(qconfig(bits or BITS))
    learn.model = prepare_qat_fx(learn.model.train(), mapping, (learn.dls.one_batch()[0],))

class FrozenRanges(Callback):
    "Ranges of activations are learned in training only"
    def before_train(self): self.model.apply(tq.enable_observer)
    def before_validate(self): self.model.apply(tq.disable_observer)

def quantized(learn, **kwargs):
    prepare_student(learn)
    return [FrozenRanges(), *([distillation(**kwargs)] if kwargs else [])]

def only_ranges(learn):
    "The weights of the trained student, rounded"
    learn.lr = 0.
    return quantized(learn)

WITH_TEACHER,BOTH = dict(weight=0.9, task_weight=0.1),dict(weight=0.5, task_weight=0.5)
PARTS = {
    'pruned': {'pruned, fine-tuned': pruned, 'pruned, distilled back': partial(pruned, **WITH_TEACHER),
               'pruned, both': partial(pruned, **BOTH), 'not pruned, trained on': None},
    'quantized': {'quantized, fine-tuned': quantized, 'quantized, distilled back': partial(quantized, **WITH_TEACHER),
                  'quantized, both': partial(quantized, **BOTH), 'quantized, not trained on': only_ranges,
                  'not quantized, trained on': None}}

def main():
    p = argparse.ArgumentParser(description=__doc__.split('\n\n')[0])
    p.add_argument('parts', nargs='*', default=[*PARTS], help=f"some of: {', '.join(PARTS)}")
    p.add_argument('--seeds', type=int, default=8)
    p.add_argument('--epochs', type=int, default=10)
    p.add_argument('--quick', action='store_true')
    p.add_argument('--out', type=Path, default=TABLES/'chain.csv')
    a = p.parse_args()
    if a.quick: a.seeds,a.epochs,a.out = 2,1,Path('chain_quick.csv')
    torch.set_num_threads(1)
    old = pd.read_csv(a.out, index_col='method') if a.out.exists() else pd.DataFrame()
    tables = [old[old.index.isin(PARTS[n])] if n not in a.parts and len(old) else None for n in PARTS]
    for i,n in enumerate(PARTS):
        if n not in a.parts: continue
        res = kd_compare(make_learner, PARTS[n], a.seeds, a.epochs, teacher=teacher(), rounds=0)
        tables[i] = res.table.drop(columns=['seconds','kb']).round(4)
        print(res)
    pd.concat([o for o in tables if o is not None]).to_csv(a.out, index_label='method')

if __name__=='__main__': main()
