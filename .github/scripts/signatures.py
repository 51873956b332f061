"""Signatures as a reader wants them: one short call, and a table of parameters.

nbdev shows each parameter on a line with its full type and a comment, which wraps in the middle of words."""
import json, re
from dataclasses import dataclass
from fastai.callback.core import event

fence = re.compile(r'```python\n((?:def|class) [\w.]+\(.*?)\n```', re.S)
bare = {'NoneType': 'None', 'Ellipsis': '...'}

@dataclass
class Parameter:
    "One line of a signature"
    name:str
    type:str
    default:str
    details:str

def split(text, sep):
    "The parts of `text` between `sep`, where no bracket or quote is open"
    parts,depth,quote = [''],0,''
    for c in text:
        if quote: quote = '' if c==quote else quote
        elif c in '"\'': quote = c
        depth += (c in '([{') - (c in ')]}') if not quote else 0
        if c==sep and not depth and not quote: parts.append('')
        else: parts[-1] += c
    return [p.strip() for p in parts]

def short(text):
    "Types and defaults without modules and addresses: `Module` for `torch.nn.modules.module.Module`"
    text = re.sub(r'<(?:function|class|bound method) \'?([\w.]+)\'?[^>]*>', r'\1', text)
    text = re.sub(r'''('[^']*'|"[^"]*")|\b(?:[A-Za-z_]\w*\.)+(?=[A-Za-z_])''', lambda m: m[1] or '', text)
    text = re.sub(r'\b(NoneType|Ellipsis)\b', lambda m: bare[m[0]], text)
    for _ in range(3):   # nested ones
        text = re.sub(r'\bOptional\[([^\[\]]*)\]', r'\1 | None', text)
        text = re.sub(r'\bUnion\[([^\[\]]*)\]', lambda m: m[1].replace(',', ' |'), text)
    return text

def parameter(line):
    "Read `name:type=default, # details`"
    code,_,details = line.strip().partition(' # ')
    name,*rest = split(code.rstrip(','), ':')
    if rest: annotation,*default = split(':'.join(rest), '=')
    else: annotation,(name,*default) = '',split(name, '=')
    if annotation=='NoneType': annotation = ''   # only the type of the default
    return Parameter(name, short(annotation), short('='.join(default)), details.strip())

def read(text):
    "Name, parameters and the returned value of a signature as nbdev writes it; None for another form"
    head = re.match(r'(?:def|class) ([\w.]+)\((.*)', text, re.S)
    end = re.search(r'(?:^|\n)\)(?:->(.*?))?:(?: # (.*))?$', head[2])
    if not end: end = re.search(r'\)(?:->([^#]*?))?:(?: # (.*))?$', head[2])   # all on one line
    if not end: return None
    # a line without a comment can have several parameters
    lines = [p for l in head[2][:end.start()].split('\n') for p in ([l] if ' # ' in l else split(l, ',')) if p]
    return head[1],[parameter(l) for l in lines],Parameter('returns', short(end[1] or ''), '', end[2] or '')

def cell(text): return text.replace('|', r'\|').replace('\n', ' ')
def code(text): return f'`{cell(text)}`' if text else ''

def table(parameters, returns):
    "A Markdown table with a row for each documented parameter, or an empty text"
    rows = [(code(p.name.removeprefix('*, ')), code(p.type), cell(p.details)) for p in parameters if p.details]
    if returns.details: rows.append(('returns', code(returns.type), cell(returns.details)))
    if not rows: return ''
    return '\n'.join(f'| {" | ".join(r)} |' for r in [('parameter','type','details'), ('--',)*3, *rows])

def call(name, parameters, returns):
    "The signature without the types of parameters, and without the events that any fastai callback takes"
    events = {'*', *vars(event)} if any(p.name=='after_create' for p in parameters) else ()
    own = [p for p in parameters if p.name not in events]
    args = ', '.join(p.name + (f'={p.default}' if p.default else '') for p in own)
    result = f' -> {returns.type}' if returns.type not in ('','None') else ''
    return f'{name}({args}){result}'

def tidy(markdown):
    "Shorten the signature in the output of `show_doc`, and add the table of its parameters at the end"
    m = fence.search(markdown)
    parts = read(m[1]) if m else None
    if parts is None: return markdown
    name,parameters,returns = parts
    # nbdev emphasizes the first line of a docstring: emphasize the whole paragraph
    markdown = re.sub(r'^\*(.+)\*\n(?=[\w`(])(.+(?:\n.+)*)', r'*\1\n\2*', markdown, count=1, flags=re.M)
    text = markdown.replace(m[0], f'```python\n{call(name, parameters, returns)}\n```')
    return '\n\n'.join(filter(None, [text, table(parameters, returns)]))

def tidy_notebook(text):
    "Tidy the outputs of a processed notebook, given and returned as JSON"
    nb = json.loads(text)
    for data in (o['data'] for c in nb['cells'] for o in c.get('outputs', []) if 'text/markdown' in o.get('data', {})):
        markdown = ''.join(data['text/markdown'])
        if markdown.startswith(('---','#')): data['text/markdown'] = tidy(markdown)
    return json.dumps(nb, ensure_ascii=False)
