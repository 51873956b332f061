"""Test one loss: save the outputs of its notebook, export, run its tests, and make the tables again.

    python .github/scripts/check_loss.py SoftTarget [golden method ...]

Golden cases are found by the name of the loss in snake case, `soft_target`; name other methods in addition. A method
whose reference is a loop in `tests/golden/refs` is written first."""
import os, subprocess, sys
from pathlib import Path
from fastcore.basics import camel2snake

root = Path(__file__).resolve().parents[2]

def run(*command):
    print('$', *command, flush=True)
    fast = dict(OMP_NUM_THREADS='1', PYTHONWARNINGS='ignore')
    r = subprocess.run(command, cwd=root, env={**os.environ, **fast})
    if r.returncode: sys.exit(f"Failed: {' '.join(command)}")

def notebook_of(name):
    "The notebook that defines a loss"
    found = [p for p in sorted((root/'nbs'/'losses').glob('*.ipynb')) if f'"## {name}\\n"' in p.read_text()]
    if not found: sys.exit(f"No notebook in nbs/losses has a section '## {name}'")
    return str(found[0].relative_to(root))

def main(name, *methods):
    methods = [camel2snake(name), *methods]
    run('nbdev-test', notebook_of(name), '--save')
    run('nbdev-clean')
    run('nbdev-export')
    own = [m for m in methods if (root/'tests'/'golden'/'refs'/f'{m}.py').exists()]
    if own: run(sys.executable, 'tests/golden/make.py', *own)
    chosen = ' or '.join([name, *(f'golden and {m}' for m in methods), 'reason'])
    files = [f'tests/losses/test_{o}.py' for o in ('losses', 'trainable', 'extreme_inputs', 'extreme_trainable')]
    run(sys.executable, '-m', 'pytest', '-q', '-k', chosen, *files)
    for page in ('losses','losses/a_z'): run('nbdev-test', f'nbs/{page}.ipynb', '--save')
    run('nbdev-clean')

if __name__=='__main__': main(*sys.argv[1:]) if sys.argv[1:] else sys.exit(__doc__)
