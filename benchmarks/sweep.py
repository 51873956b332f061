"What studies of accuracy share: where tables are, training without validation, and rows that stay."
import sys
from pathlib import Path
import pandas as pd
from fastai.basics import Callback, CancelValidException

TABLES = Path(__file__).parent/'tables'

class NoValidation(Callback):
    "Train without a look at the test images; their score is taken at the end"
    def before_validate(self): raise CancelValidException

def replace_rows(file, made, keys):
    "`made` after the rows of an earlier `file` whose values in the columns `keys` are not among it"
    if not Path(file).exists(): return made
    old,again = pd.read_csv(file),{*zip(*(made[k] for k in keys))}
    return pd.concat([old[[o not in again for o in zip(*(old[k] for k in keys))]], made])

def run_part(folder, about):
    "Run the module of `folder` that the command line names, with the remaining arguments"
    import runpy
    parts = sorted(p.stem for p in (Path(__file__).parent/folder).glob('*.py'))
    if len(sys.argv)<2 or sys.argv[1] not in parts: sys.exit(f"{about}\n\nParts: {', '.join(parts)}")
    part = sys.argv.pop(1)
    sys.argv[0] = f'{Path(sys.argv[0]).name} {part}'
    runpy.run_module(f'{folder}.{part}', run_name='__main__', alter_sys=False)
