"""Our own word list: words that a reader of English manuals stumbles over, each with the word of the field.

It reads the prose of notebooks, Markdown files, and the docstrings and comments of code, without inline code."""
import ast, io, json, re, tokenize
from pathlib import Path
import pytest

root = Path(__file__).resolve().parents[2]

# a pattern, and what to write; a pattern that raises false alarms is removed
WORDS = {
    r'\bways?\b': 'method, setting, form',
    r'\balone\b': 'baseline, without a teacher, only',
    r'\bclothes\b': 'Fashion-MNIST',
    r'\btrainings\b': 'training runs',
    r'\b(a|another|each|every|one|short|long|longer) training\b(?! (run|set|batch|data|step|loop|script|loss|image|'
    r'sample|picture|split|example|epoch|digit|emoji|row))': 'training run',
    r'\b(?<!frequently )ask(s|ed)\b': 'run, predict, need, require',
    r'\banswer(s|ed|ing)?\b': 'prediction, result',
    r'\b(stands|standing|stood) (in|for|at|on|next|by|there)\b': 'is in, represents',
    r'\banew\b': 'again, new',
    r'\bof (much |great |no |little )?use\b(?! of)': 'useful, useless',
    r'\bbesides?\b': 'next to, in addition to',
    r'\bwhence\b': 'from which',
    r'\bputs? out\b': 'outputs, returns',
    r'\bto the measure of\b': 'according to, as large as',
    r'\bwrong now\b': 'regressions',
    r'\b(rows?|records?|lines?|ms|milliseconds|bytes) an? (seed|step|batch|sample|row|epoch|run|image|class)\b': 'per',
    r'\b(colour|behaviour|neighbour|labour)|\bgrey\b|\b(un)?labelled\b|\bcentred?\b': 'American spelling',
    r'\w(alis|aris|imis|iv?tis|gnis)(e|es|ed|ing|ation)\b': 'American spelling',
    r'\bas (many|few|long|large|often|much) (?!as\b)(?:(?!\bas\b)[^.;:,)|])*(?=[.;:,)|]|\Z)':
    'name what it is compared with: as many steps as …'}
PATTERNS = {re.compile(p, re.I): better for p,better in WORDS.items()}
ALLOWED = re.compile(r'precis(e|ed|ion)|advis|supervis|revis|exercis|surpris|promis|otherwis|likewis|pairwis'
                     r'|as (much|long|far|often) as|times as|way round|either way|left alone|leaves? \w+ alone', re.I)

def comments(code):
    "The comments of a cell"
    lines = io.StringIO(re.sub(r'^[%!].*|^#\|.*', '', code, flags=re.M)).readline
    return [t.string.lstrip('# ') for t in tokenize.generate_tokens(lines) if t.type==tokenize.COMMENT]

def docstrings(code):
    "The docstrings of a cell or a script"
    tree = ast.parse(re.sub(r'^[%!].*', '', code, flags=re.M))
    nodes = (n for n in ast.walk(tree) if isinstance(n, (ast.Module, ast.FunctionDef, ast.ClassDef)))
    return [d for d in map(ast.get_docstring, nodes) if d]

def without_code(markdown):
    "Prose without code blocks, inline code, addresses, formulas and titles of papers"
    for code in (r'```.*?```', r'`[^`]*`', r'\]\([^)]*\)', r'https?:\S+', r'\$[^$]*\$', r'\{[^}]*\}', r'"[^"]*"'):
        markdown = re.sub(code, ' x ', markdown, flags=re.S)
    return re.sub(r'\*[A-Z][^*]{15,}\*', ' x ', markdown)

def code_prose(code): return [without_code(o) for o in (*comments(code), *docstrings(code))]

def prose(cell):
    "What a person reads in a cell"
    source = ''.join(cell['source'])
    return code_prose(source) if cell['cell_type']=='code' else [without_code(source)]

def hits(text):
    "Words of the list in a text, with the better word"
    found = ((m, better) for p,better in PATTERNS.items() for m in p.finditer(text))
    return [f'{" ".join(text[max(0, m.start()-30):m.end()+20].split())!r}: {better}' for m,better in found
            if not ALLOWED.search(text[max(0, m.start()-12):m.end()+6])]

def read(path):
    "The prose of a notebook, a Markdown file, or a script"
    text = path.read_text(encoding='utf-8')
    if path.suffix=='.ipynb': return [o for c in json.loads(text)['cells'] for o in prose(c)]
    return [without_code(text)] if path.suffix=='.md' else code_prose(text)

def name(path): return path.relative_to(root).as_posix()

files = [*sorted(p for p in (root/'nbs').rglob('*.ipynb') if not any(o[0] in '._' for o in p.relative_to(root).parts)),
         root/'README.md', root/'CONTRIBUTING.md', *sorted((root/'benchmarks').rglob('*.py')),
         *sorted(p for p in (root/'tests').rglob('*.py') if 'golden' not in p.parts and p!=Path(__file__).resolve())]

@pytest.mark.parametrize('path', files, ids=name)
def test_words(path):
    "A file uses the words of the field"
    found = [h for o in read(path) for h in hits(o)]
    assert not found, '\n'.join(found)

@pytest.mark.parametrize('text', ['The way to train.', 'The student alone.', 'Two trainings', 'The teacher is asked.',
    'one row a seed', 'in grey', 'labelled data',
    'normalise it', 'It takes as many steps.', 'a training without labels'])
def test_finds(text): assert hits(text)

@pytest.mark.parametrize('text', ['always', 'as many steps as the baseline', 'a training run', 'a training set',
    'supervised, revised', 'as far as known', 'a 3x3 precision', 'the training takes long', 'normalize, center',
    'three times as many.'])
def test_no_false_alarm(text): assert not hits(text)

def stored_text(path):
    "The text of the stored outputs of a notebook"
    outputs = [o for c in json.loads(path.read_text(encoding='utf-8'))['cells'] for o in c.get('outputs', [])]
    return json.dumps([o.get('text') or {k: v for k,v in o['data'].items() if k!='image/png'} for o in outputs])

def test_tables_name_the_baseline():
    "Stored tables call the student without a teacher *baseline*"
    assert not [name(p) for p in files if p.suffix=='.ipynb' and re.search(r'\balone\b', stored_text(p))]
