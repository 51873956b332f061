"""Run pages and store their outputs: `python .github/scripts/run_page.py nbs/tutorials/lesson.ipynb ...`

Pages contain no settings for it. fastai prints its progress table as text; the frames of its bars are removed."""
import json, os, re, subprocess, sys
from pathlib import Path

quiet = dict(OMP_NUM_THREADS='1', PYTHONWARNINGS='ignore', TRANSFORMERS_VERBOSITY='error')

def last_frame(line):
    "What a terminal shows of a line that was overwritten after each carriage return"
    return next((o for o in reversed(line.rstrip('\r\n').split('\r')) if o.strip(' █')), '').rstrip()

def as_shown(text):
    "Printed text without the frames of progress bars"
    if '\r' not in text: return text
    # an error can be printed in the line of a bar
    lines = [re.sub(r'.*\|[█-]+\| *[\d.]+%( \[[^\]]*\])?', '', last_frame(l)) for l in text.split('\n')]
    # fastai writes six decimals, and no space after a number that fills its column
    lines = [re.sub(r'(\.\d{6})(?=\d)', r'\1  ', l) for l in lines]
    return '\n'.join(filter(None, lines)).rstrip() + '\n'

def tidy(output):
    "A stored output without progress bars, or None if nothing else is in it"
    if output['output_type']!='stream': return output
    text = as_shown(''.join(output['text']))
    return {**output, 'text': text.splitlines(keepends=True)} if text.strip() else None

def run(path):
    "Run a notebook, and store its outputs in it"
    command = ['nbdev-test', str(path), '--save', '--flags', 'slow', '--cell-timeout', '0']
    subprocess.run(command, env={**os.environ, **quiet}, check=True)
    nb = json.loads(path.read_text(encoding='utf-8'))
    for c in nb['cells']:
        if c['cell_type']=='code': c['outputs'] = [o for o in map(tidy, c['outputs']) if o]
    path.write_text(json.dumps(nb, ensure_ascii=False, indent=1)+'\n', encoding='utf-8')
    subprocess.run(['nbdev-clean', '--fname', str(path)], check=True)

if __name__=='__main__':
    for p in map(Path, sys.argv[1:]): run(p)
