"Every notebook under nbs/ is one test, in a process of its own."
import json, multiprocessing, re, sys
from pathlib import Path
import pytest
from support.processes import run_processes

pytestmark = pytest.mark.slow

root = Path(__file__).resolve().parents[2]
nbs = sorted((p for p in (root/'nbs').rglob('*.ipynb') if not any(s[0] in '._' for s in p.relative_to(root).parts)),
             reverse=True)   # tutorials, which take longest, first: the workers then end at the same time

def test_found():
    "All notebooks of the sidebar are found"
    listed = re.findall(r'([\w./]+\.ipynb)', (root/'nbs/sidebar.yml').read_text(encoding='utf-8'))
    assert {*listed}=={p.relative_to(root/'nbs').as_posix() for p in nbs}

def runs(cell):
    "Is this a cell that nbdev-test executes?"
    src = ''.join(cell['source'])
    return (cell['cell_type']=='code' and src.strip()
            and not any(f'#| {o}' in src for o in ('eval: false', 'slow', 'notest')))

def is_slow(cell): return '#| slow' in ''.join(cell['source'])

def execute(nb, log):
    "Run a notebook as `nbdev-test` does, and write its errors to `log`. Exits with 1 after an error"
    import matplotlib
    from nbdev.config import get_config
    from nbdev.test import test_nb
    sys.stdout = sys.stderr = sys.__stderr__ = log.open('w')
    matplotlib.use('agg')
    multiprocessing.set_start_method('fork', force=True)   # of workers, as in a notebook on Linux
    passed,_ = test_nb(nb, skip_flags=get_config(root).tst_flags.split(), basepath=root)
    sys.exit(not passed)

@pytest.mark.notebook
@pytest.mark.parametrize('nb', nbs, ids=lambda p: p.relative_to(root/'nbs').as_posix())
def test_notebook(nb, tmp_path):
    "All its cells run without an error, and they are not all switched off"
    cells = json.loads(nb.read_text())['cells']
    code,run = sum(c['cell_type']=='code' for c in cells),sum(map(runs, map(dict, cells)))
    if not code: return   # only prose
    if all(is_slow(c) for c in cells if c['cell_type']=='code'):   # run_page.py runs it, and stores its outputs
        assert any(c.get('outputs') for c in cells) and all(compile(''.join(c['source']), nb.name, 'exec')
                                                            for c in cells if c['cell_type']=='code')
        return
    assert run>=min(3, code) and run>=0.75*code, f'only {run} of {code} code cells are executed'
    code, = run_processes(execute, (nb, tmp_path/'log'), seconds=600)
    if code: pytest.fail((tmp_path/'log').read_text(), pytrace=False)

@pytest.mark.filterwarnings('ignore')
def test_quickstart_runs_on_noise(monkeypatch):
    "The cells of *Distill on your images*, with pictures of noise and random weights: CI does not fetch the real ones"
    import matplotlib.pyplot as plt
    import timm, torch
    from kd_fastai import demo
    from kd_fastai.demo import pictures as module
    monkeypatch.setattr(plt, 'show', lambda *args: None)
    names = ['Food & Drink',*'bcdefghi']   # nine, as the student has
    number = torch.arange(140).repeat(2)
    pictures = torch.randint(0, 256, (280,3,64,64), dtype=torch.uint8)
    for o in (demo, module):
        monkeypatch.setattr(o, 'emoji', lambda: (pictures, number%9, number, number//140, names))
        monkeypatch.setattr(o, 'lite0', lambda: timm.create_model('tf_efficientnet_lite0', num_classes=0))
    cells = json.loads((root/'nbs/tutorials/quickstart.ipynb').read_text(encoding='utf-8'))['cells']
    known = {}
    for i,c in enumerate(cells):
        if c['cell_type']=='code': exec(compile(''.join(c['source']), f'cell {i}', 'exec'), known)
    assert known['learn'].kd_history() is not None and known['scores'].keys()=={'baseline','student','teacher'}
    plt.close('all')
