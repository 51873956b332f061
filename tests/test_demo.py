"The command, as a user types it."
import subprocess, sys
from pathlib import Path
import pytest

def demo(*args, cwd=None):
    return subprocess.run([str(Path(sys.executable).parent/'kd-demo'), *map(str, args)], text=True, capture_output=True,
                          cwd=cwd)

def test_prints_a_table_and_draws_a_plot(tmp_path):
    r = demo('--seeds', 2, '--epochs', 3, cwd=tmp_path)
    assert r.returncode==0, r.stderr
    for o in ('teacher, all 1000 labels', 'student alone', 'with SoftTarget', 'with SoftTarget + Attention', '±',
              'better in', '94186', '6274'):
        assert o in r.stdout
    assert (tmp_path/'kd_demo.png').stat().st_size>5000

@pytest.mark.parametrize('args,says',
                         [(['--labels',5],'--labels must be 10 to 990, got 5'),
                          (['--seeds',0],'--seeds must be at least 1'), (['--epochs',0],'--epochs must be'),
    (['--temperature',0],'--temperature must be'), (['--out','nowhere/x.png'],"no folder 'nowhere'"),
    (['--out','x.doc'],'--out must end in'), (['--seeds','many'],'invalid int value')])
def test_bad_values_get_a_sentence(args, says, tmp_path):
    r = demo(*args, cwd=tmp_path)
    assert r.returncode and says in r.stderr and 'Traceback' not in r.stderr

def test_help():
    r = demo('--help')
    assert r.returncode==0 and all(o in r.stdout for o in ('--seeds','--labels','--epochs','--temperature','--out'))

def test_module_runs_too():
    r = subprocess.run([sys.executable, '-m', 'kd_fastai.demo', '--labels', '5'], text=True, capture_output=True)
    assert r.returncode and '10 to 990' in r.stderr

def test_picture_shows_every_run_and_the_mean():
    "Above the way, epoch by epoch, with the teacher's line; below the ends"
    import matplotlib; matplotlib.use('agg')
    from kd_fastai.demo import picture
    curves = {'student alone': [[50.,80.],[60.,90.]], 'with X': [[40.,92.],[50.,94.]]}
    top,bottom = picture({'teacher': [98.], **{n: [o[-1] for o in v] for n,v in curves.items()}}, curves).axes
    lines = {l.get_label(): [*l.get_ydata()] for l in top.lines}
    assert (lines['teacher'], lines['student alone'], lines['with X']) == ([98.,98.], [55.,85.], [45.,93.])
    drawn = [[*l.get_ydata()] for l in top.lines]
    assert all(o in drawn for runs in curves.values() for o in runs)
    assert [[*l.get_xdata()] for l in bottom.lines if l.get_marker()=='o'] == [[98.],[80.,90.],[92.,94.]]
