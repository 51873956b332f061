#!/usr/bin/env python
"""Write the golden cases of methods whose reference is a loop of our own.

    python tests/golden/make.py METHOD ...        # writes <method>.npz and index/<method>.json

`refs/<method>.py` has

- `ABOUT`: paper, math and reduction, for the index;
- `reference(pred, teacher_pred, target, fm_s, fm_t, **hp)`: the loss in a loop over samples, of float64 tensors. Its
  parameters say what it reads. Write it from the paper, before the loss;
- `HPS`: the parameters of each case; the first also for a batch of one, two classes, many classes and equal networks;
- `SHAPES`, for a loss on features: shapes of the student's and the teacher's maps, without the batch;
- `prepare(inputs, rng)`, if the inputs must be changed, or to add the weights of the loss, as `'state/<name>'`. Then
  `reference` takes `state`, a dict of them.

A test computes the references again: the stored numbers are those of the loop in the repository."""
import importlib.util, inspect, json, sys
from pathlib import Path
import numpy as np, torch

golden = Path(__file__).resolve().parent

def load_reference(method):
    "The module refs/<method>.py"
    spec = importlib.util.spec_from_file_location(f'refs_{method}', golden/'refs'/f'{method}.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

def make_inputs(ref, B, C, seed, same=False):
    "Random inputs that the reference reads, as arrays by name; features by 'fm_s/<layer>'"
    rng = np.random.default_rng(seed)
    def normal(*shape): return (2*rng.standard_normal(shape)).astype(np.float32)
    x = dict(pred=normal(B,C), teacher_pred=normal(B,C), target=rng.integers(C, size=B))
    shapes_s,shapes_t = getattr(ref, 'SHAPES', ((),()))
    x |= {f'fm_s/layer{i}': normal(B,*o) for i,o in enumerate(shapes_s)}
    x |= {f'fm_t/layer{i}': normal(B,*o) for i,o in enumerate(shapes_t)}
    if same: x |= {k: x['teacher_pred' if k=='pred' else k.replace('fm_s','fm_t')]
                   for k in x if k=='pred' or k.startswith('fm_s')}
    names = inspect.signature(ref.reference).parameters
    x = {k: v for k,v in x.items() if k.partition('/')[0] in names}
    return ref.prepare(x, rng) if hasattr(ref, 'prepare') else x

def run_reference(ref, inputs, hp):
    "Value of the reference, and gradients of the student's tensors and of the loss's weights by their key in the file"
    x = {k: torch.tensor(v).double() if v.dtype.kind=='f' else torch.tensor(v) for k,v in inputs.items()}
    leaves = {k: t.requires_grad_() for k,t in x.items() if k=='pred' or k.startswith(('fm_s/','state/'))}
    args = {k: t for k,t in x.items() if '/' not in k}
    for k,t in x.items():
        if '/' in k: args.setdefault(k.partition('/')[0], {})[k.partition('/')[2]] = t
    value = ref.reference(**args, **hp)
    grads = torch.autograd.grad(value, [*leaves.values()])
    return value.item(),{f'grad_{k}' if k.startswith('state/') else f'grad/{k}': g for k,g in zip(leaves, grads)}

def make(method):
    "Write the cases of a method and its entry in the index"
    ref,arrays,cases = load_reference(method),{},[]
    plan = [(f'hp{i}' if i else 'default', 5, 6, hp, False) for i,hp in enumerate(ref.HPS)]
    plan += [(name, B, C, ref.HPS[0], name=='identical')
             for name,B,C in (('batch1',1,6), ('two_classes',5,2), ('many_classes',3,50), ('identical',5,6))]
    for i,(name,B,C,hp,same) in enumerate(plan):
        inputs = make_inputs(ref, B, C, i, same)
        value,grads = run_reference(ref, inputs, hp)
        arrays |= {f'case{i}/{k}': v for k,v in inputs.items()} | {f'case{i}/expected': np.float64(value)}
        arrays |= {f'case{i}/{k}': g.float().numpy() for k,g in grads.items()}
        cases.append(dict(key=f'case{i}', case=name, hp=hp, compare='value+grad', expected=value))
    np.savez_compressed(golden/f'{method}.npz', **arrays)
    about = dict(file=f'{method}.npz', reference=f'refs/{method}.py, a loop of our own', **ref.ABOUT)
    entry = dict(about, parameterised=any('/state/' in k for k in arrays), cases=cases)
    (golden/'index'/f'{method}.json').write_text(json.dumps(entry, indent=1, ensure_ascii=False)+'\n')

if __name__=='__main__':
    for method in sys.argv[1:] or sys.exit(__doc__): make(method)
