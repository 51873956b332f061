"""A page for each loss, from its section in the notebook of its module and the tables of measurements.

The section moves to the page of the loss; the page of the module keeps its heading, its first paragraph and a link."""
import ast, builtins, inspect, json, re
from functools import cache
from importlib import import_module
from pathlib import Path
import pandas as pd
from kd_fastai.losses.facts import loss_table
from scipy.stats import t

root = Path(__file__).resolve().parents[2]
tables,golden = root/'benchmarks'/'tables',root/'tests'/'golden'
MODULES = 'output','feature','relation','connectors','classifier','embedding','temperature'
STUDIES = {'digits, 8×8': 'which_loss', 'Fashion-MNIST, 14×14': 'which_loss_fashion',
           'color pictures, 32×32': 'which_loss_pictures', 'digits, four times as long': 'which_loss_long',
           'Fashion-MNIST, four times as long': 'which_loss_fashion_long'}
repo = 'https://github.com/kd-fastai/kd_fastai/blob/main'

# --- the parts of a notebook

def source(cell): return ''.join(cell['source'])
def markdown(text): return dict(cell_type='markdown', metadata={}, source=text)
def code_block(text): return f'```python\n{text}\n```'

def sections(cells):
    "The cells of each section of the second level by its title; those before the first one by the title `None`"
    found,title = {None: []},None
    for c in cells:
        head = c['cell_type']=='markdown' and re.match(r'## (.+)', source(c))
        if head: title = head[1].strip()
        found.setdefault(title, []).append(c)
    return found

def documented(cells):
    "Whether a section has a documented symbol: a page that was moved has none left"
    return any('show_doc' in source(c) for c in cells if c['cell_type']=='code')

def split(cells):
    "Introduction, documentation of symbols, and examples of a section"
    intro,rest = cells[0],cells[1:]
    return intro,[c for c in rest if 'show_doc' in source(c)],[c for c in rest if 'show_doc' not in source(c)]

# --- code that runs as pasted

def names(node, kind): return {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, kind)}

def defines(statement):
    "The names that a statement of a cell defines"
    if isinstance(statement, (ast.FunctionDef, ast.ClassDef)): return {statement.name}
    return names(statement, ast.Store)

SCOPES = ast.FunctionDef, ast.Lambda, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp

def local(node):
    "The names that exist only inside functions and comprehensions of a statement"
    inner = [o for o in ast.walk(node) if isinstance(o, SCOPES)]
    return {n.arg for n in ast.walk(node) if isinstance(n, ast.arg)}.union(*(names(o, ast.Store) for o in inner))

def needs(statement): return names(statement, ast.Load)-local(statement)-set(dir(builtins))

def free(cells):
    "The names that cells use before they define them"
    known,found = set(),set()
    for statement in (s for cell in statements(cells) for s,_ in cell):
        found |= needs(statement)-known
        known |= defines(statement)
    return found

def statements(cells):
    "The statements of the code that a page shows, cell by cell, with their texts"
    code = [source(c) for c in cells if c['cell_type']=='code' and not re.match(r'#\| *echo: false', source(c))]
    return [[(s, ast.get_source_segment(o, s)) for s in ast.parse(o).body] for o in code]

def is_import(statement): return isinstance(statement, (ast.Import, ast.ImportFrom))

def imports(cells):
    "The import statements of cells"
    return [text for cell in statements(cells) for s,text in cell if is_import(s)]

def definitions(wanted, cells):
    "The statements of cells that define `wanted` names, what these need, and the seed of their cell"
    kept = []
    for cell in reversed(statements(cells)):
        chosen = []
        for s,text in reversed(cell):
            seeds = chosen and text.startswith('torch.manual_seed')
            if is_import(s) or not (seeds or wanted & defines(s)): continue
            wanted = wanted-defines(s) | needs(s)
            chosen.insert(0, text)
        kept = chosen+kept
    return kept

# --- facts of a loss

def reads_layers(loss): return 'fm_s' in inspect.signature(getattr(loss, 'forward', loss)).parameters

def lines(name, loss):
    "Lines that distill with a loss: with the default weight, and with the paper's"
    call = f'{name}()' if inspect.isclass(loss) else name
    layers = ", layers='layer3'" if reads_layers(loss) and not loss.info.default_layer else ''
    return [f'learn.distill(teacher, Term({call}{layers}))',
            f'learn.distill(teacher, Term({call}, {loss.info.weight:g}{layers}), task_weight=1)']

def usage(name, loss):
    "How to attach the loss to a Learner"
    default,paper = lines(name, loss)
    head = f'## Use it\n\n{code_block(default)}\n\n'
    where = "`'layer3'` is a placeholder for [layers of your models](../tutorials/layers.ipynb). "*('layer3' in default)
    return (f'{head}The weight is [found on the first batch](../tutorials/weights.ipynb). {where}'
            f'With the weight of the paper, or of its code:\n\n{code_block(paper)}')

def facts(loss):
    "What the loss needs and costs, as a list"
    head,_,row = ([c.strip() for c in l.strip('|').split(' | ')] for l in loss_table([loss]).splitlines())
    known = dict(zip(head, row))
    return '\n'.join([f"- **Needs**: {known['needs']}",
                      f"- **Operations per batch**: {known['cost']} ({known['complexity']} complexity)"])

@cache
def guide():
    "What you have, and the losses to begin with and to try then: the rows of the guide in *Choose a loss*"
    cells = json.loads((root/'nbs'/'losses.ipynb').read_text(encoding='utf-8'))['cells']
    text = next(source(c) for c in cells if '| you have |' in source(c))
    rows = [l for l in text.splitlines() if re.match(r'\| (?!you have)', l)]
    return [[c.strip() for c in l.strip('|').split(' | ')] for l in rows]

def situations(name):
    "Where the guide names the loss"
    said = [[have for have,*cols in guide() if len(cols)>i and f'`{name}`' in cols[i]] for i in (0,1)]
    heads = 'Begin with it if you have','A second choice if you have'
    return [f"- **{head}**: {'; '.join(o)}" for head,o in zip(heads, said) if o]

@cache
def runs(table): return pd.read_csv(tables/f'{table}.csv')

def gain(name, table, weight_by):
    "Cells of a row: the mean gain over the baseline with its interval, the number of runs, and the time; or None"
    o = runs(table)
    base = o[o.loss=='baseline'].set_index('seed')
    mine = o[(o.loss==name) & (o.weight_by==weight_by)].set_index('seed').dropna(subset='accuracy')
    diff = (mine.accuracy-base.accuracy).dropna()
    if len(diff)<2: return None
    half = diff.std()/len(diff)**.5*t.ppf(.975, len(diff)-1)
    time = (mine.seconds/base.seconds).median()
    return f'{diff.mean():+.1f}',f'{diff.mean()-half:.1f} to {diff.mean()+half:.1f}',str(len(diff)),f'{time:.2f}'

def gains(name):
    "The measured gains of a loss as text, or why there are none"
    every = [(data, w, gain(name, table, w)) for data,table in STUDIES.items() for w in ('auto','paper')]
    rows = [f"| {data} | {'automatic' if w=='auto' else 'the paper’s'} | {' | '.join(g)} |"
            for data,w,g in every if g]
    if rows: return '\n'.join([
        'Percentage points over the same student without a teacher, and the time of the training run as a multiple '
        'of its time. Intervals are 95%, over paired seeds, not corrected for the number of losses.', '',
        '| data | weight | gain | interval | seeds | time |', '|---|---|---|---|---|---|', *rows, '',
        'From the [benchmark of all losses](../tutorials/which_loss.ipynb), in which nothing is tuned for a loss.'])
    why = runs('which_loss').query('loss==@name').why_not.dropna()
    return ('Not measured in the [benchmark](../tutorials/which_loss.ipynb)'
            + (': its task does not fit. The loss says: "'+why.iloc[0].replace('*', r'\*')+'".' if len(why) else '.'))

def cost(name):
    "Time and memory of the loss, forward and backward, as text"
    o = runs('losses').query('loss==@name')
    if not len(o): return ''
    def number(x): return f'{x:,.0f}' if x>=1000 else f'{x:.3g}'
    rows = [f'| {r.B} | {r.C} | {number(r.ms)} | {number(r.MiB)} |' for r in o.itertuples()]
    return '\n'.join(['Time and memory of the loss itself, forward and backward, on one CPU core '
        '([cost](../tutorials/cost.ipynb)):', '',
        '| batch | classes or channels | ms | MiB |', '|---|---|---|---|', *rows])

def measured(name, loss):
    "What was measured of a loss, as text"
    return '\n\n'.join(filter(None, ['## Gain and cost', facts(loss), gains(name), cost(name)]))

@cache
def golden_losses():
    "The names of losses that each golden method mentions in `impls.py`, itself or in a function that it calls"
    tree = ast.parse((golden/'impls.py').read_text(encoding='utf-8'))
    helpers = {s.name: names(s, ast.Load) for s in tree.body if isinstance(s, ast.FunctionDef)}
    methods = {k.arg: names(k.value, ast.Load) for c in ast.walk(tree) if isinstance(c, ast.Call)
               for k in c.keywords if k.arg and (golden/'index'/f'{k.arg}.json').exists()}
    return {m: (used, {n for u in used for n in helpers.get(u, ())}) for m,used in methods.items()}

def references(name):
    "What the golden numbers of a loss come from, as text"
    found = [m for m,(used,_) in golden_losses().items() if name in used]
    found = found or [m for m,(_,indirect) in golden_losses().items() if name in indirect]
    if not found: return 'No golden numbers: its tests compute the value by hand.'
    rows = []
    for m in sorted(found):
        ref = json.loads((golden/'index'/f'{m}.json').read_text(encoding='utf-8'))['reference']
        made = f"[{ref['repo']}](https://github.com/{ref['repo']}), {ref['symbol']}" if isinstance(ref, dict) else ref
        rows.append(f'| [{m}]({repo}/tests/golden/index/{m}.json) | {made} |')
    return '\n'.join(['Values and gradients are compared with these numbers, on random inputs:', '',
                      '| golden numbers | computed by |', '|---|---|', *rows])

# --- pages

def signature(cell, name):
    "The documentation of a symbol without its title, if that is the title of the page"
    for data in (o['data'] for o in cell.get('outputs', []) if 'text/markdown' in o.get('data', {})):
        text = ''.join(data['text/markdown'])
        data['text/markdown'] = re.sub(rf'^---\n\n(.*\n\n)###+ {name}\n', r'\1', text)
    return cell

def page(name, module, cells, before):
    "The notebook of the page of a loss or a wrapper, from its section and the cells before it"
    loss = getattr(import_module(f'kd_fastai.losses.{module}'), name)
    for c in cells:   # links to other sections
        if c['cell_type']=='markdown': c['source'] = source(c).replace('](#', f']({module}.ipynb#')
    intro,docs,examples = split(cells)
    intro = re.sub(r'^## .*\n+', '', source(intro))
    is_loss = hasattr(loss, 'info')
    about = loss.info.best_for if is_loss else 'a wrapper: it changes another loss'
    front = f'---\ntitle: {name}\ndescription: {json.dumps(f"For {about}" if is_loss else about.capitalize())}\n---'
    head = [dict(cell_type='raw', metadata={}, source=front), markdown('\n'.join([*situations(name), '', intro]))]
    setup = '\n'.join(dict.fromkeys([*imports(before), *definitions(free(examples), before)]))
    random = 'rand' in ''.join([setup, *map(source, examples)])
    said = 'They run as pasted, from top to bottom'+(', with other random numbers' if random else '')
    shown = [markdown(f'## Examples\n\n{said}:\n\n{code_block(setup)}'), *examples]
    end = f"""## Reference

{references(name)}

## See also

- The source: [losses.{module}]({module}.ipynb), with the losses of its kind.
- [Losses A–Z](a_z.ipynb). [Choose a loss](../losses.ipynb). [Weights and temperature](../tutorials/weights.ipynb)."""
    docs = [markdown('## Signature'), *(signature(c, name) for c in docs)]
    if is_loss: docs = [markdown(usage(name, loss)), *docs, markdown(measured(name, loss))]
    return [*head, *docs, *(shown if examples else []), markdown(end)]

def link(cells, name):
    "What the page of the module keeps of a section: the sentences before its formula"
    text = re.sub(r'^## .*\n+', '', source(cells[0])).split('\n\n')[0].split('\n$$')[0].split('\n- ')[0]
    text = re.sub(r'(?<=[.?])\s[^.?]*[^.?:]$', '', text)   # a sentence that ends in the formula
    return markdown(f'## {name}\n\n{text}\n\n[{name}: formula, parameters, gain, cost and examples]({name}.ipynb)')

def write_loss_pages(proc):
    "Move the sections of losses from the processed notebooks in the folder `proc` to pages of their own"
    for module in MODULES:
        file = proc/'losses'/f'{module}.ipynb'
        nb = json.loads(file.read_text(encoding='utf-8'))
        public,parts,kept,before = import_module(f'kd_fastai.losses.{module}').__all__,sections(nb['cells']),[],[]
        for title,cells in parts.items():
            moves = title in public and documented(cells)
            if moves:
                own = dict(nb, cells=page(title, module, json.loads(json.dumps(cells)), before))
                (file.parent/f'{title}.ipynb').write_text(json.dumps(own, ensure_ascii=False), encoding='utf-8')
            kept += [link(cells, title)] if moves else cells
            before += cells
        file.write_text(json.dumps(dict(nb, cells=kept), ensure_ascii=False), encoding='utf-8')

def loss_names():
    "The losses and wrappers, which have pages of their own, with the modules that define them"
    return {n: m for m in MODULES for n in import_module(f'kd_fastai.losses.{m}').__all__}
