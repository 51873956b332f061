"The benchmark on Fashion-MNIST, on a folder of noise: the real images need not be there."
import runpy, sys
from pathlib import Path
import pandas as pd
import pytest

pytestmark = pytest.mark.slow

script = Path(__file__).parents[2]/'benchmarks/accuracy.py'

def run(cwd, *args):
    "Run the benchmark in a folder, in this process"
    with pytest.MonkeyPatch.context() as m:
        m.chdir(cwd)
        m.syspath_prepend(str(script.parent))
        m.setattr(sys, 'argv', [str(script), 'fashion', '--quick', *map(str, args)])
        runpy.run_path(str(script), run_name='__main__')

@pytest.fixture(scope='module')
def done(tmp_path_factory, fashion_folder):
    "A folder in which the benchmark has run"
    folder = tmp_path_factory.mktemp('run')
    run(folder, '--folder', fashion_folder, '--students', 'thin')
    return folder

def results(folder): return [pd.read_csv(folder/'fashion_quick'/f'{n}.csv') for n in ('fashion_runs','fashion')]

def test_every_method_runs_on_every_seed(done):
    runs,table = results(done)
    assert {*runs.groupby('method').seed.count()}=={2}
    assert [*table.method]==['teacher','baseline','learn.distill(teacher)','SoftTarget, auto','SoftTarget, paper',
                          'DecoupledKD, auto','Logits, auto','Attention, auto','FitNet, auto','RKD, auto',
                          'Similarity, auto']

def test_methods_of_a_seed_are_paired(done):
    runs,_ = results(done)
    assert {*runs.groupby('seed').start.nunique()}=={1}

def test_runs_name_the_ratios_of_auto(done):
    from kd_fastai.objective import AUTO_RATIO
    assert {*results(done)[0].auto_ratio}=={', '.join(f'{k} {v:g}' for k,v in AUTO_RATIO.items())}

def test_table_names_its_machine(done):
    assert 'torch' in (done/'fashion_quick/fashion.md').read_text()

def test_another_method_is_added_to_the_finished_ones(done, fashion_folder):
    before = results(done)[0]
    run(done, '--folder', fashion_folder, '--students', 'thin', '--only', 'Similarity, paper')
    after = results(done)[0]
    assert {*after.method}-{*before.method}=={'Similarity, paper'}
    def in_order(runs): return runs.sort_values(['seed','method']).reset_index(drop=True)
    kept = in_order(after[after.method!='Similarity, paper'])
    pd.testing.assert_frame_equal(kept, in_order(before))   # seconds, too: they did not run again

@pytest.mark.parametrize('args,says', [(['--folder','.'],"Install Debian's package dataset-fashion-mnist"),
                                       (['--only','Nonsense'],'No such method: Nonsense')])
def test_what_is_missing_is_named(args, says, tmp_path, capsys):
    with pytest.raises((SystemExit,FileNotFoundError)) as e: run(tmp_path, *args)
    assert says in str(e.value)+capsys.readouterr().err
