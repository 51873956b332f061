"""Write the table of modules in CONTRIBUTING.md from the descriptions of the notebooks: `> ...` below each title.

    python .github/scripts/modules.py [--check]

With `--check`, exit with 1 if the table is not up to date."""
import argparse, json, re, sys
from pathlib import Path

root = Path(__file__).resolve().parents[2]
ROOMS = ['losses', 'hooks', 'teacher', 'term', 'objective', 'fit', 'callback', 'methods', 'report', 'ship', 'demo']

def row(nb):
    "A row of the table for a notebook that writes a module, else None"
    cells = [''.join(c['source']) for c in json.loads(nb.read_text(encoding='utf-8'))['cells']]
    module = re.search(r'^#\| *default_exp +([\w.]+)', '\n'.join(cells), re.M)
    about = re.search(r'^> (.*)', cells[0], re.M)
    name = nb.relative_to(root/'nbs').with_suffix('').as_posix()
    return module and f"| `{name}` | `{module[1].replace('.', '/')}.py` | {about[1] if about else ''} |"

def table():
    "The table, room by room"
    nbs = sorted(p for p in (root/'nbs').rglob('*.ipynb') if not any(s[0] in '._' for s in p.relative_to(root).parts))
    def room(nb): return nb.relative_to(root/'nbs').with_suffix('').parts[0]
    rows = [r for o in ROOMS for nb in nbs if room(nb)==o and (r := row(nb))]
    return '\n'.join(['| notebook | module | contents |', '|---|---|---|', *rows])

def main():
    p = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    p.add_argument('--check', action='store_true', help='write nothing; exit with 1 if the table is not up to date')
    check,file = p.parse_args().check,root/'CONTRIBUTING.md'
    old = file.read_text(encoding='utf-8')
    new = re.sub(r'^\| notebook \| module \|.*?(?=\n\n)', lambda m: table(), old, flags=re.S|re.M)
    if check: sys.exit('Run `python .github/scripts/modules.py`: its table differs' if new!=old else 0)
    file.write_text(new, encoding='utf-8')

if __name__=='__main__': main()
