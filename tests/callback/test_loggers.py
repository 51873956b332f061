"wandb and trackio, offline: every column once for each epoch. A stand-in of wandb takes its place where it is missing."
import sys
from importlib.util import find_spec
from types import ModuleType, SimpleNamespace
import pytest
from fastai.basics import *
from kd_fastai.all import KnowledgeDistillationCallback, SoftTarget, Term
from kd_fastai.demo import small_net
from kd_fastai.losses import Attention
from support import fit, learner

for o in [*globals()]:
    if o=='test' or o.startswith('test_'): del globals()[o]  # fastcore's own helpers, which pytest would take for tests

pytestmark = pytest.mark.filterwarnings('ignore')

def train(*cbs):
    kd = KnowledgeDistillationCallback(small_net(8), [SoftTarget, Term(Attention, 10., layers='1')])
    return fit(learner([kd, *cbs]), 2)

def history(learn):
    "A dict of columns for each epoch, as the Recorder has them"
    names = learn.recorder.metric_names[1:-1]
    return [dict(zip(names, o)) for o in learn.recorder.values]

def stand_in():
    "What fastai's callback uses of wandb"
    config = SimpleNamespace(update=lambda values, **kwargs: None)
    return SimpleNamespace(run=SimpleNamespace(step=0, summary={}), config=config, log=lambda values, step=None: None,
                           finish=noop)

@pytest.fixture(params=['stand-in','wandb'])
def wandb(request, monkeypatch, tmp_path):
    "fastai's module of the callback, with wandb offline or a stand-in, and the list of what was logged"
    if request.param=='wandb':
        wandb = pytest.importorskip('wandb', reason='wandb is not installed')
        wandb.init(mode='offline', dir=tmp_path, settings=wandb.Settings(silent=True))
    else: wandb = stand_in()
    logged,log = [],wandb.log
    def keep(values, step=None):
        logged.append(values)
        return log(values, step=step)
    monkeypatch.setattr(wandb, 'log', keep)
    if not find_spec('wandb'): monkeypatch.setitem(sys.modules, 'wandb', ModuleType('wandb'))
    from fastai.callback import wandb as module
    monkeypatch.setattr(module, 'wandb', wandb)
    # fastai 2.8.12 with fastcore 2.2 fails on numbers, with and without distillation
    init_args = module.init_args
    monkeypatch.setattr(module, 'init_args', lambda o: init_args(o) if hasattr(o, '__dict__') else {})
    yield module.WandbCallback,logged
    wandb.finish()

def test_wandb_logs_every_column_once(wandb):
    "task loss, terms, validation loss and metrics, with the values of the Recorder"
    WandbCallback,logged = wandb
    learn = train(WandbCallback(log_preds=False))
    columns = {'task_loss','soft_target','attention','valid_loss','accuracy'}
    for epoch,row in enumerate(history(learn)):
        assert columns<=row.keys()
        for n in row.keys()-{'train_loss'}:
            values = [o[n] for o in logged if n in o]
            assert len(values)==2 and values[epoch]==row[n]

class LogColumns(Callback):
    "As in the page on questions"
    order = Recorder.order+1
    def __init__(self, log): self.log = log
    def after_epoch(self): self.log(dict(zip(self.recorder.metric_names, self.recorder.log)))

def test_a_callback_of_the_user_logs_every_column_once():
    logged = []
    learn = train(LogColumns(logged.append))
    assert [{k: v for k,v in o.items() if k not in ('epoch','time')} for o in logged]==history(learn)

def test_trackio_logs_every_column_once(tmp_path, monkeypatch):
    "into a local database"
    monkeypatch.setenv('TRACKIO_DIR', str(tmp_path))
    trackio = pytest.importorskip('trackio', reason='trackio is not installed')
    from trackio.sqlite_storage import SQLiteStorage
    trackio.init(project='kd', name='run')
    learn = train(LogColumns(trackio.log))
    trackio.finish()
    logged = SQLiteStorage.get_logs('kd', 'run')
    assert len(logged)==2
    for row,expected in zip(logged, history(learn)):
        assert {k: row[k] for k in expected}==pytest.approx(expected)
