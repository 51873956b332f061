"What measurements of cost share: taking turns, bytes, tables, targets, and where it ran."
import csv, datetime, os, platform, statistics, sys, time, weakref
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

TABLES = Path(__file__).parent/'tables'

def use_device(name):
    """Make new tensors and networks on this device, and keep its tables apart. Ends the program if there is no such
    device"""
    global TABLES
    device = torch.device(name)
    if device.type=='cpu': return
    if device.type!='cuda' or not torch.cuda.is_available(): raise SystemExit(
        f"--device {name}: PyTorch finds no such GPU here (torch.cuda.is_available() is {torch.cuda.is_available()}). "
        "Leave --device out to measure on the processor")
    torch.set_default_device(device)
    TABLES = TABLES/device.type

def synchronize():
    "Wait until the GPU has done what it was given"
    if torch.cuda.is_initialized(): torch.cuda.synchronize()

def seconds(f):
    "How long a call takes; a call that returns a float has measured itself"
    synchronize()
    start = time.perf_counter()
    res = f()
    synchronize()
    return res if isinstance(res, float) else time.perf_counter()-start

def take_turns(methods, rounds, warm=3):
    """Seconds that each of `{name: function}` takes, in every round: `{name: [seconds]}`. The order turns from
    round to round"""
    names,times = [*methods],{n:[] for n in methods}
    for n in names:
        for _ in range(warm): methods[n]()
    for r in range(rounds):
        k = r%len(names)
        for n in names[k:]+names[:k]: times[n].append(seconds(methods[n]))
    return times

def ratio(times, a, b):
    "Median of `a` to `b`, round by round, with its quartiles"
    q = statistics.quantiles([x/y for x,y in zip(times[a], times[b])], n=4)
    return q[1],q[0],q[2]

def ms(ts): return 1000*statistics.median(ts)

class Held(TorchDispatchMode):
    "Bytes that tensors made by operations hold, now and at most"
    now = peak = 0
    def __init__(self): super().__init__(); self.seen = set()
    def _gone(self, key, n): self.seen.discard(key); self.now -= n
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        old = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if not isinstance(t, torch.Tensor) or (key := t.untyped_storage()._cdata) in old|self.seen: continue
            n = t.untyped_storage().nbytes()
            self.seen.add(key); self.now += n; self.peak = max(self.peak, self.now)
            weakref.finalize(t.untyped_storage(), self._gone, key, n)
        return out

def peak_mib(f):
    with Held() as held: f()
    return held.peak/2**20

def saved_mib(f, known=()):
    "MiB that one call keeps for its backward, each storage once, without those of `known` tensors"
    skip,seen = {t.untyped_storage()._cdata for t in known},{}
    def pack(t):
        # held, so that no storage comes twice
        if (key := t.untyped_storage()._cdata) not in skip: seen[key] = t.untyped_storage().nbytes(),t.detach()
        return t
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t): f()
    return sum(n for n,_ in seen.values())/2**20

def _processor():
    if torch.get_default_device().type=='cuda': return torch.cuda.get_device_name()
    try: return next(l.split(':')[1].strip() for l in open('/proc/cpuinfo') if l.startswith('model name'))
    except (OSError, StopIteration): return platform.processor() or platform.machine()

def _version(name):
    try: return f'{name} {version(name)}'
    except PackageNotFoundError: return f'no {name}'

def where():
    "Machine, versions and date, in one line"
    names = ', '.join(map(_version, ('torch','fastai','fasterai','torchdistill')))
    return (f"{_processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} used; "
            f"{platform.system()}, Python {platform.python_version()}, {names}; {datetime.date.today()}")

def shown(v):
    return f'{v:.3g}' if isinstance(v, float) and abs(v)<100 else f'{v:.0f}' if isinstance(v, float) else str(v)

def write(name, rows, said):
    "A table of dicts as `tables/name.csv` and `tables/name.md`, which names the script that runs"
    TABLES.mkdir(exist_ok=True)
    head = [*dict.fromkeys(k for r in rows for k in r)]
    with open(TABLES/f'{name}.csv', 'w', newline='') as f:
        out = csv.DictWriter(f, head, lineterminator='\n'); out.writeheader(); out.writerows(rows)
    lines = [head, ['---']*len(head), *([shown(r.get(k, '')) for k in head] for r in rows)]
    text = '\n'.join(f"| {' | '.join(l)} |" for l in lines)
    made = f"Made by `benchmarks/{Path(sys.argv[0]).name}` on {where()}."
    (TABLES/f'{name}.md').write_text(f"{said}\n\n{made}\n\n{text}\n")
    print(f'\n{said}\n\n{text}', flush=True)
    return rows

def target(what, value, limit):
    """One row of the table of targets: a value that should not pass its limit.

    Of a `ratio`, which varies from round to round, the first quartile counts: three rounds of four are above it."""
    middle,low,_ = value if isinstance(value, tuple) else (value,)*3
    return {'target': what, 'value': middle, 'quartile 1': low, 'at most': limit, 'met': 'yes' if low<=limit else 'NO'}
