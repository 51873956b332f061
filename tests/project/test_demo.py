"The command, as a user types it."
import io, os, runpy, subprocess, sys
from contextlib import redirect_stdout
from pathlib import Path
import pytest, torch
from fastcore.xtras import working_directory
from torch import nn
from kd_fastai.demo import digits, kd_demo

pytestmark = pytest.mark.slow

def demo(*args):
    "Run the command in this process"
    with pytest.MonkeyPatch.context() as m:
        m.setattr(sys, 'argv', ['kd-demo', *map(str, args)])
        runpy.run_module('kd_fastai.demo', run_name='__main__')

@pytest.fixture(scope='module')
def done(tmp_path_factory):
    "What the command printed, and the folder in which it ran"
    folder = tmp_path_factory.mktemp('demo')
    with working_directory(folder), redirect_stdout(io.StringIO()) as out: demo('--seeds', 2, '--epochs', 3)
    return out.getvalue(),folder

def test_prints_a_table_and_draws_a_plot(done):
    stdout,folder = done
    for o in ('teacher: ', 'baseline', 'with SoftTarget', 'with SoftTarget + Attention', 'gain', '94186', '6274',
              'undecided', 'All intervals hold together at 95%'):
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
    command,env = Path(sys.executable).parent/'kd-demo',{k: v for k,v in os.environ.items() if k!='PYTHONWARNINGS'}
    r = subprocess.run([command, '--help'], text=True, capture_output=True, env=env)
    assert not r.stderr
    options = '--seeds','--labels','--epochs','--temperature','--data','--out'
    assert r.returncode==0 and all(o in r.stdout for o in options)

@pytest.mark.parametrize('args,says', [(['--labels','5'],'10 to 990'), (['--seeds','many'],'invalid int value')])
def test_module_runs_too(args, says, capsys):
    with pytest.raises(SystemExit) as e: demo(*args)
    assert says in str(e.value)+capsys.readouterr().err

def test_data_sets_share_no_images():
    "The scans are read once, so a change of one data set must not reach the next one"
    a,b = digits(),digits()
    for ds in (a.train.dataset, a.valid.dataset): ds.tensors[0].fill_(7.)
    for ds in (*b.loaders, *digits().loaders): assert ds.dataset.tensors[0].max()<=1

def test_fashion_runs_too(tmp_path, fashion_folder, monkeypatch):
    "With images of noise in place of the real ones"
    import matplotlib; matplotlib.use('agg')
    from functools import partial
    from kd_fastai.demo import command as module
    data = partial(module.fashion, bs=20, size=14, augment=False, folder=fashion_folder)
    monkeypatch.setitem(module.DEMO_TASKS, 'fashion', module.DemoTask(data, 6000, 'test images'))
    res,teacher = module.compare(2, 50, 2, data='fashion', say=lambda o: None)
    assert [*res.table.runs]==[2]*3
    assert tuple(teacher.dls.one_batch()[0].shape[1:])==(1,14,14)

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
    epochs,fit = [],command.Learner.fit_one_cycle
    def fit_and_note(learn, n, *args, **kwargs):
        epochs.append(n)
        return fit(learn, n, *args, **kwargs)
    monkeypatch.setattr(command.Learner, 'fit_one_cycle', fit_and_note)
    try: res,teacher = command.compare(2, epochs=3, data='emoji', say=lambda o: None)
    finally: pictures.read_views.cache_clear()
    assert teacher.dls.train.n==18*2 and teacher.dls.valid.n==12
    assert [*res.table.index]==['baseline', 'learn.distill', 'kd_pretrain, then distill']
    assert epochs==[1,2, *[3,3,1]*2] and {*res.runs.parameters}=={21513}
