"The command, as a user types it."
import math, os, runpy, subprocess, sys
from pathlib import Path
import pandas as pd
import pytest, torch
from torch import nn
from kd_fastai.report.compare import KDComparison, comparison_table
from kd_fastai.demo import digits, kd_demo

pytestmark = pytest.mark.slow

def demo(*args, **kwargs):
    command = [str(Path(sys.executable).parent/'kd-demo'), *map(str, args)]
    return subprocess.run(command, text=True, capture_output=True, **kwargs)

@pytest.fixture(scope='module')
def done(tmp_path_factory):
    "What the command printed, and the folder in which it ran"
    folder = tmp_path_factory.mktemp('demo')
    r = demo('--seeds', 2, '--epochs', 3, cwd=folder)
    assert r.returncode==0, r.stderr
    return r.stdout,folder

def test_prints_a_table_and_draws_a_plot(done):
    stdout,folder = done
    for o in ('teacher', 'baseline', 'with SoftTarget', 'with SoftTarget + Attention', '±', 'better in', '94186',
              '6274', 'undecided'):
        assert o in stdout
    assert (folder/'kd_demo.png').stat().st_size>5000

@pytest.mark.parametrize('args,says', [
    (dict(labels=5),'--labels must be 10 to 990, got 5'), (dict(seeds=0),'--seeds must be at least 1'),
    (dict(epochs=0),'--epochs must be'), (dict(data='cats'),'--data must be one of digits, fashion, emoji'),
    (dict(temperature=0),'--temperature must be'), (dict(out='nowhere/x.png'),"no folder 'nowhere'"),
    (dict(out='x.doc'),'--out must end in')])
def test_bad_values_end_the_command_with_a_sentence(args, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=says): kd_demo(**args)

def test_help():
    "It is the first that a user sees: no warning of another library comes before it"
    r = demo('--help', env={k: v for k,v in os.environ.items() if k!='PYTHONWARNINGS'})
    assert not r.stderr
    options = '--seeds','--labels','--epochs','--temperature','--data','--out'
    assert r.returncode==0 and all(o in r.stdout for o in options)

@pytest.mark.parametrize('args,says', [(['--labels','5'],'10 to 990'), (['--seeds','many'],'invalid int value')])
def test_module_runs_too(args, says, monkeypatch, capsys):
    monkeypatch.setattr(sys, 'argv', ['kd-demo', *args])
    with pytest.raises(SystemExit) as e: runpy.run_module('kd_fastai.demo', run_name='__main__')
    assert says in str(e.value)+capsys.readouterr().err

def test_data_sets_share_no_images():
    "The scans are read once, so a change of one data set must not reach the next one"
    a,b = digits(),digits()
    for ds in (a.train.dataset, a.valid.dataset): ds.tensors[0].fill_(7.)
    for ds in (*b.loaders, *digits().loaders): assert ds.dataset.tensors[0].max()<=1

def test_picture_shows_every_run_and_the_mean():
    "Above the accuracy, epoch by epoch, with the teacher's line; below the gain of each run, and its mean"
    import matplotlib; matplotlib.use('agg')
    from kd_fastai.demo import picture
    curves = {'baseline': [[50.,80.],[60.,90.]], 'with X': [[40.,92.],[50.,94.]]}
    top,bottom = picture(comparison({n: [o[-1] for o in v] for n,v in curves.items()}), 98., curves).axes
    lines = {l.get_label(): [*l.get_ydata()] for l in top.lines}
    assert (lines['teacher'], lines['baseline'], lines['with X']) == ([98.,98.], [55.,85.], [45.,93.])
    drawn = [[*l.get_ydata()] for l in top.lines]
    assert all(o in drawn for runs in curves.values() for o in runs)
    assert [round(o, 4) for o in next(l for l in bottom.lines if l.get_marker()=='.').get_xdata()] == [.12,.04]

def comparison(scores):
    "What `kd_compare` returns, for accuracies in percent by method"
    runs = pd.DataFrame([dict(seed=s, method=n, accuracy=a/100) for n,v in scores.items() for s,a in enumerate(v)])
    first = next(iter(scores))
    return KDComparison(runs, comparison_table(runs, 'accuracy', first), 'accuracy', first, 0.95)

def test_verdict_counts_runs_and_takes_the_interval():
    from kd_fastai.demo import verdict
    assert verdict(comparison({'baseline': [90.,90.], 'with X': [91.,89.4]}))==(
        'with X: +0.2 points against the baseline, better in 1 of 2 runs, worse in 1: undecided')
    assert verdict(comparison({'baseline': [90.,90.1,90.2], 'with X': [95.,95.,95.3]})).endswith(
        'better in 3 of 3 runs, worse in 0: better')

def test_students_have_one_latency(done):
    "Time and size belong to the architecture"
    rows = [l.split() for l in done[0].splitlines() if l.startswith(('baseline','with SoftTarget'))]
    ends = {tuple(o[-3:]) for o in rows if '6274' in o}
    assert len(ends)==1, rows

def test_fashion_runs_too(tmp_path, fashion_folder, monkeypatch):
    "With images of noise in place of the real ones"
    import matplotlib; matplotlib.use('agg')
    from functools import partial
    from kd_fastai.demo import command as module
    data = partial(module.fashion, bs=20, size=14, augment=False, folder=fashion_folder)
    monkeypatch.setitem(module.DEMO_TASKS, 'fashion', module.DemoTask(data, 6000, 'test images'))
    res,teacher,curves = module.compare(2, 50, 2, data='fashion', say=lambda o: None)
    assert [len(o) for o in curves.values()]==[2]*3
    assert tuple(teacher.dls.one_batch()[0].shape[1:])==(1,14,14)
    assert [*module.table(res, teacher).index]==['teacher', *res.table.index]

def test_missing_fashion_gets_a_sentence(tmp_path, monkeypatch, capsys):
    from kd_fastai.demo import fashion_mnist
    monkeypatch.setattr(fashion_mnist, 'DEBIAN_FOLDER', tmp_path)
    monkeypatch.setattr(Path, 'home', lambda: tmp_path)
    with pytest.raises(SystemExit, match='kd-demo: Fashion-MNIST is not in .*dataset-fashion-mnist'):
        kd_demo(data='fashion', out=str(tmp_path/'x.png'))

def test_missing_emoji_get_a_sentence_with_the_command(tmp_path, monkeypatch):
    from kd_fastai.demo import pictures
    monkeypatch.setattr(pictures, 'CACHE', tmp_path)
    monkeypatch.setenv('PATH', '')
    pictures.emoji.cache_clear()
    command = 'npm pack emoji-datasource-google@16.0.0'
    with pytest.raises(SystemExit, match=f'kd-demo: No emoji-.* Fetch it there: {command}'):
        kd_demo(data='emoji', out=str(tmp_path/'x.png'))

class TinyPretrained(nn.Module):
    "In place of EfficientNet-Lite0"
    def __init__(self, n_classes=0):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 9, 8), nn.BatchNorm2d(8), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.classifier = nn.Linear(8, n_classes) if n_classes else nn.Identity()
    def forward(self, x): return self.classifier(self.body(x))

def test_emoji_run_too(monkeypatch):
    "With pictures of noise and a tiny teacher; pretraining takes one of the epochs"
    from kd_fastai.demo import command, pictures
    number = torch.arange(30).repeat(2)
    images = torch.randint(0, 256, (60,3,64,64), dtype=torch.uint8)
    monkeypatch.setattr(pictures, 'emoji', lambda: (images, number%9, number, number//30, [*'abcdefghi']))
    monkeypatch.setattr(pictures, 'lite0', TinyPretrained)
    pictures.read_views.cache_clear()
    try: res,teacher,curves = command.compare(2, epochs=3, data='emoji', say=lambda o: None)
    finally: pictures.read_views.cache_clear()
    assert teacher.dls.train.n==18*2 and teacher.dls.valid.n==12
    assert [*curves]==['baseline', 'learn.distill', 'kd_pretrain, then distill']
    assert [math.isnan(runs[0][0]) for runs in curves.values()]==[False,False,True]
    assert command.table(res, teacher, pictures.small_separable).parameters['baseline']==21513
