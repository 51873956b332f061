"The site builds, its links and anchors exist, and it documents everything that the package exports."
import ast, builtins, inspect, json, pkgutil, posixpath, re, shutil, subprocess, sys
from functools import cache
from html.parser import HTMLParser
from importlib import import_module
from pathlib import Path
from urllib.parse import unquote, urldefrag
import pytest
import kd_fastai

root = Path(__file__).resolve().parents[2]

class Page(HTMLParser):
    "The ids, links and words of a page"
    def __init__(self, path):
        super().__init__()
        self.ids,self.links,self.words = set(),[],set()
        self.feed(path.read_text(encoding='utf-8'))
    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        if attrs.get('id'): self.ids.add(attrs['id'])
        self.links += [attrs[k] for k in ('href','src') if attrs.get(k)]
    def handle_data(self, data): self.words.update(re.findall(r'\w+', data))

parse = cache(Page)

@cache
def site_url():
    "The address of the site, without a slash at its end"
    from nbdev.config import get_config
    return get_config(root).doc_url.rstrip('/')

def exists(base, link):
    "Whether `link`, on a page in the folder `base`, points to a file of the site and to an anchor in it"
    file,anchor = map(unquote, urldefrag(link))
    path = (base/file).resolve()
    return path.is_file() and (not anchor or anchor in parse(path).ids)

def broken(path):
    "The links of a page, other than those to other sites, whose target does not exist"
    inner = [l for l in parse(path).links if not re.match(r'[a-z]+:|//', l)]
    return [l for l in inner if not exists(path.parent, path.name+l if l.startswith('#') else l)]

def public():
    "Pairs of a module of the package and a name that it exports"
    mods = [import_module(m.name) for m in pkgutil.walk_packages(kd_fastai.__path__, 'kd_fastai.')]
    return [(m,n) for m in mods for n in getattr(m, '__all__', [])]

def shown(obj, name, pages):
    "Whether a class or function has a heading of its own, or any other object is mentioned"
    if inspect.isclass(obj) or inspect.isfunction(obj): return any(name.lower() in p.ids for p in pages)
    return any(name in p.words for p in pages)

@pytest.mark.slow
def test_pages(site, pages):
    "Each notebook has one page, with the name that nbdev's links use, and each loss; the others are redirects"
    made = {p.relative_to(site).as_posix() for p in site.rglob('*.html')}
    assert made == {*pages, *loss_pages(), *redirects(), '404.html'}

def loss_pages():
    "The pages of losses and wrappers, by name"
    from kd_fastai import losses
    return {f'losses/{n.lower()}.html': n for n in losses.__all__ if n!='TrainableLoss'}

@pytest.mark.slow
def test_loss_pages(site):
    "The page of a loss has all parts, and working links; links to its old section lead to it"
    from kd_fastai import losses
    linked = {l for p in site.rglob('*.html') for l in parse(p).links}
    for page,name in loss_pages().items():
        assert not broken(site/page)
        if not hasattr(getattr(losses, name), 'info'): continue
        assert {'use-it','signature','gain-and-cost','examples','reference','see-also'}<=parse(site/page).ids, page
        html = (site/page).read_text(encoding='utf-8')
        assert re.search(r'\$\$|class="math', html) and 'learn.distill(teacher' in re.sub('<.*?>', '', html), page
        assert any(l.endswith(page.removeprefix('losses/')) for l in linked), page
    anchors = {(m, n.lower()) for m in ('output','feature','relation','embedding') for n in loss_pages().values()}
    assert not [l for l in linked if (m := re.search(r'(\w+)\.html#(\w+)$', l)) and (m[1], m[2]) in anchors]

@pytest.fixture(scope='module')
def loss_notebooks(site, tmp_path_factory):
    "The notebooks of the pages of losses, by name"
    sys.path.insert(0, str(root/'.github'/'scripts'))
    try: from loss_pages import loss_names, write_loss_pages
    finally: sys.path.pop(0)
    proc = tmp_path_factory.mktemp('losses')/'proc'
    shutil.copytree(site.parent/'_proc', proc)
    write_loss_pages(proc)
    return {n: json.loads((proc/'losses'/f'{n}.ipynb').read_text(encoding='utf-8'))['cells'] for n in loss_names()}

def python_of(cells):
    "The code of a page after the heading *Examples*, with the output of each cell"
    at = next((i for i,c in enumerate(cells) if ''.join(c['source']).startswith('## Examples')), len(cells))
    for c in cells[at:]:
        text = ''.join(c['source'])
        if c['cell_type']=='markdown': yield from ((o, None) for o in re.findall(r'```python\n(.*?)```', text, re.S))
        elif not text.startswith('#| echo: false'): yield text, c['outputs']

@pytest.mark.slow
def test_loss_pages_run_as_pasted(loss_notebooks):
    "The examples on the page of a loss run without the rest of its module's page, and the numbers shown come out"
    for name,cells in loss_notebooks.items():
        names,fixed = {},'other random numbers' not in str(cells)
        for code,outputs in python_of(cells):
            *start,last = ast.parse(code).body
            exec(compile(ast.Module(start, []), name, 'exec'), names)
            said = ''.join(''.join(o['data'].get('text/plain', '')) for o in outputs or [] if 'data' in o)
            if not isinstance(last, ast.Expr): exec(compile(ast.Module([last], []), name, 'exec'), names)
            else:
                value = eval(compile(ast.Expression(last.value), name, 'eval'), names)
                if fixed and re.match(r'tensor\([\d.e-]+', said): assert repr(value)==said, (name, code)

@pytest.mark.slow
def test_lines_of_loss_pages(loss_notebooks):
    "The lines that the pages give construct the terms that they show"
    from kd_fastai import all as names
    for name,cells in loss_notebooks.items():
        text = '\n'.join(''.join(c['source']) for c in cells if c['cell_type']=='markdown')
        terms = re.findall(r'learn\.distill\(teacher, (Term\(.*?\))(?:, task_weight=1)?\)\n', text)
        assert all(name in repr(eval(t, dict(vars(names)))) for t in terms), name
        assert len(terms)==2*hasattr(vars(names)[name], 'info')

def redirects():
    "The old addresses of pages, and the new ones"
    lines = (root/'.github/scripts/redirects.txt').read_text(encoding='utf-8').splitlines()
    return dict(l.split() for l in lines if l[0]!='#')

@pytest.mark.slow
def test_redirects(site):
    "An old address leads to a page, and to an anchor in it, by a link and by itself"
    for old,new in redirects().items():
        assert exists(site, new), new
        link = '../'*old.count('/')+new
        page = (site/old).read_text(encoding='utf-8')
        assert parse(site/old).links==[link, link] and f'url={link}"' in page

@pytest.mark.slow
def test_not_found(site):
    "All links of the page for errors begin at the root: it is shown at any address"
    base = posixpath.join('/', site_url().partition('://')[2].partition('/')[2])
    inner = [l for l in parse(site/'404.html').links if not re.match(r'[a-z]+:|//|#', l)]
    assert len(inner)>20 and all(l.startswith(base) for l in inner)
    assert all(exists(site, l.removeprefix(base).lstrip('/')) for l in inner)

@pytest.mark.slow
def test_links(site, page): assert not broken(site/page)

@pytest.mark.slow
def test_own_links(site, page):
    "Links to pages of the site are relative, so that `test_links` tests them"
    assert not [l for l in parse(site/page).links if l.startswith(site_url())]

@pytest.mark.slow
def test_search_index(site):
    "Each entry of the search index points to a page and an anchor"
    links = [o['href'] for o in json.loads((site/'search.json').read_text(encoding='utf-8'))]
    assert links and not [l for l in links if not exists(site, l)]

@pytest.mark.slow
def test_public_names(site):
    "Every name that a module exports is documented on a page"
    pages = [parse(p) for p in site.rglob('*.html')]
    names = public()
    missing = [f'{m.__name__}.{n}' for m,n in names if not shown(getattr(m,n), n, pages)]
    assert names and not missing

@pytest.mark.slow
def test_names_of_all(site):
    "Every name of ours that `from kd_fastai.all import *` imports is documented on a page"
    import kd_fastai.losses, kd_fastai.all as names
    pages = [parse(p) for p in site.rglob('*.html')]
    def is_ours(n, o):
        return n[0]!='_' and not inspect.ismodule(o) and getattr(o, '__module__', '').startswith('kd_fastai')
    ours = {n:o for n,o in vars(names).items() if is_ours(n, o)}
    assert {n for n,o in vars(kd_fastai.losses).items() if hasattr(o, 'info')}<=ours.keys()
    assert not [n for n,o in ours.items() if not shown(o, n, pages)]

@pytest.mark.slow
def test_sidebar(site, pages):
    "The sidebar lists every page once, in the order of nbs/sidebar.yml, without pages that do not exist"
    listed = re.findall(r'([\w./]+\.ipynb)', (root/'nbs/sidebar.yml').read_text(encoding='utf-8'))
    paths = {p.relative_to(root/'nbs').as_posix(): name for name,p in pages.items()}
    assert len(listed)==len(set(listed))
    assert not set(paths)-set(listed)
    menu = re.search(r'id="quarto-sidebar".*?</nav>', (site/'index.html').read_text(encoding='utf-8'), re.S)[0]
    links = [l.removeprefix('./') for l in re.findall(r'href="([^"#]+\.html)"', menu)]
    assert list(dict.fromkeys(links))==[paths[p] for p in listed if p in paths]

def linked_pages(html, page):
    "The other pages of the site to which a part of a page links"
    found = re.findall(r'href="(?!https?:)([^"#]+\.html)', html)
    return {posixpath.normpath(posixpath.join(posixpath.dirname(page), l)) for l in found}-{page}

@pytest.mark.slow
def test_see_also(site, pages):
    "Each page but the first ends in *See also*, with links to other pages"
    see = {}
    for page in pages:
        main = re.search(r'<main.*?</header>(.*?)(?:<nav class="page-navigation"|</main>)',
                         (site/page).read_text(encoding='utf-8'), re.S)[1]
        _,mark,end = main.rpartition('id="see-also"')
        see[page] = linked_pages(end, page) if mark else set()
    assert [page for page in pages if not see[page]]==['index.html']

def is_tutorial(page): return page.startswith('tutorials/')

def sources(nb, kind):
    "The sources of a notebook's cells of one kind"
    cells = json.loads(nb.read_text(encoding='utf-8'))['cells']
    return [''.join(c['source']) for c in cells if c['cell_type']==kind]

def test_tutorials_say_how_long_they_take(pages):
    "The text before the first section says how long the page takes to run"
    for page in filter(is_tutorial, pages):
        start = '\n'.join(sources(pages[page], 'markdown')).partition('\n## ')[0]
        assert re.search(r'seconds|minute', start), page

def test_tutorials_run_as_pasted(pages):
    "A tutorial that uses the package imports it in a cell that the page shows"
    for page in filter(is_tutorial, pages):
        shown = '\n'.join(s for s in sources(pages[page], 'code') if not s.startswith('#| hide'))
        assert 'kd_fastai' not in shown or re.search(r'^(from kd_fastai.* import|import kd_fastai)', shown, re.M), page
        assert '../benchmarks' not in shown, f'{page}: find the file from kd_fastai.__file__'

@pytest.mark.slow
def test_previous_and_next(site, pages):
    "Each page links to the next one of the sidebar, and back"
    order = re.findall(r'([\w./]+\.ipynb)', (root/'nbs/sidebar.yml').read_text(encoding='utf-8'))
    name = {nb.relative_to(root/'nbs').as_posix(): page for page,nb in pages.items()}
    order = [name[o] for o in order if o in name]
    def nav(page): return (site/page).read_text(encoding='utf-8').partition('class="page-navigation"')[2]
    for page,following in zip(order, order[1:]):
        assert following in linked_pages(nav(page), page)
        assert page in linked_pages(nav(following), following)

def shows_something(source):
    "Whether the last line of a cell is an expression without a semicolon, or the cell prints or trains"
    tree = ast.parse(re.sub(r'^[%!].*', '', source, flags=re.M))
    if not tree.body: return False
    last = tree.body[-1]
    is_value = isinstance(last, ast.Expr) and not source.rstrip().endswith(';')
    return is_value and not isinstance(last.value, (ast.Constant, ast.Yield))

silent = """append assert_close backward clear close extend fill freeze load load_state_dict mkdir register_forward_hook
    remove set_num_threads
    remove_cb rmtree save set_seed show_doc simplefilter step test_close test_eq test_fail test_is test_ne unfreeze
    write_text export""".split()

def is_silent(source):
    "Whether the last expression calls something that returns nothing"
    call = ast.parse(source).body[-1].value
    f = getattr(call, 'func', None)
    name = getattr(f, 'attr', getattr(f, 'id', None)) or ''
    return name in silent or name.startswith('check_')

def test_cells_store_what_they_show(page, source):
    "A visible cell that ends in a value stores it"
    for c in json.loads(source)['cells']:
        code = ''.join(c['source'])
        if c['cell_type']!='code' or re.search(r'^#\| *(hide|eval: false|export)', code, re.M): continue
        if shows_something(code) and not is_silent(code): assert c['outputs'], f'no stored output: {code[-200:]}'

def test_no_hidden_settings(page, source):
    "Pages have no hidden cell that changes what a reader would see, such as fastai's progress table"
    if not is_tutorial(page) and page!='index.html': return
    hidden = [''.join(c['source']) for c in json.loads(source)['cells'] if ''.join(c['source']).startswith('#| hide')]
    assert not [h for h in hidden if re.search(r'ProgressCallback|logger|no_bar|set_num_threads', h)]

@pytest.mark.slow
def test_contents(site):
    "The contents of a page list a symbol once"
    html = (site/'losses/output.html').read_text(encoding='utf-8')
    toc = re.search(r'<nav id="TOC".*?</nav>', html, re.S)[0]
    names = re.findall(r'>([^<]+)</a>', toc)
    assert names.count('SoftTarget')==1
    assert len(names)==len(set(names))

@pytest.mark.slow
def test_alt_texts(site, pages):
    "A picture on the front page or in a tutorial has a text for those who cannot see it"
    for page in pages:
        if page!='index.html' and not is_tutorial(page): continue
        main = (site/page).read_text(encoding='utf-8').partition('<main')[2]
        assert not [i[:60] for i in re.findall(r'<img[^>]*>', main) if not re.search(r'\balt="[^"]{20,}', i)], page

@pytest.mark.slow
def test_llms(site, pages):
    "llms.txt lists a Markdown copy of each page by part, internals last"
    text = (site/'llms.txt').read_text(encoding='utf-8')
    links = re.findall(r'\]\((\S+?)\)', text)
    assert len(links)==len(pages)
    assert '## Start' in text and text.rpartition('\n## ')[2].startswith('Optional')
    for l in links:
        copy = site/l.removeprefix(site_url()).lstrip('/')
        assert len(copy.read_text(encoding='utf-8'))>300

@pytest.mark.slow
def test_addresses_in_docstrings(site):
    "The docstring of each module leads to the Markdown copy of its page"
    url = site_url()+'/'
    trees = [ast.parse(p.read_text(encoding='utf-8')) for p in (root/'kd_fastai').rglob('*.py')]
    links = re.findall(r'Docs: (\S+)', '\n'.join(ast.get_docstring(t) or '' for t in trees))
    assert len(links)>50 and not [l for l in links if not (site/l.removeprefix(url)).exists()]

@pytest.mark.slow
def test_social_card(site, pages):
    "Each page has the picture of the front page, by an address that exists"
    url = site_url()+'/'
    for page in pages:
        pictures = re.findall(r'property="og:image" content="([^"]*)"', (site/page).read_text(encoding='utf-8'))
        assert len(pictures)==1 and (site/pictures[0].removeprefix(url)).is_file(), page

tasks = ('tutorials/quickstart', 'tutorials/ship', 'tutorials/text', 'tutorials/segmentation', 'tutorials/tabular',
         'tutorials/any_learner', 'tutorials/cache', 'tutorials/unlabeled', 'tutorials/gpus', 'losses', 'tutorials/faq')

@pytest.mark.slow
def test_tasks_are_one_click_away(site):
    "The text of the front page links to the page of each task"
    main = (site/'index.html').read_text(encoding='utf-8').partition('<main')[2].partition('<nav class="page-')[0]
    assert not {f'{t}.html' for t in tasks}-linked_pages(main, 'index.html')

def shown_code(source):
    "A syntax tree for each code cell that the site shows and that runs"
    hidden = re.compile(r'^#\| *(hide|export|exports|exporti|default_exp|eval: false|echo: false)\b', re.M)
    cells = [''.join(c['source']) for c in json.loads(source)['cells'] if c['cell_type']=='code']
    return [ast.parse(re.sub(r'^[%!].*', '', c, flags=re.M)) for c in cells if not hidden.search(c)]

@cache
def imported(statement):
    "The names that an import statement defines"
    exec(statement, names := {})
    return set(names)

def defined(node):
    "The names that a node of a syntax tree defines; an import is executed"
    if isinstance(node, (ast.Import, ast.ImportFrom)): return imported(ast.unparse(node))
    if isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.ExceptHandler)): return {node.name}
    if isinstance(node, ast.arg): return {node.arg}
    return {node.id} if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) else set()

def test_shown_code_has_its_imports(source):
    "A reader can paste the code of a page, from top to bottom: each name in it is imported or defined there"
    nodes = [n for tree in shown_code(source) for n in ast.walk(tree)]
    known = {*dir(builtins), 'display', 'show_doc'}.union(*map(defined, nodes))
    used = {n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}
    assert not used-known

def code_on_page(cell):
    "The code that a page shows of a cell"
    source = ''.join(cell['source'])
    if cell['cell_type']=='markdown': return '\n'.join(re.findall(r'```\w*\n(.*?)```', source, re.S))
    hidden = re.search(r'^#\| *(hide|export|exports|exporti|default_exp|echo: false)\b', source, re.M)
    return '' if hidden else re.sub(r'^#\|.*', '', source, flags=re.M)

def test_lines_of_code_fit_the_page(source):
    "At 1,280 pixels a page is 93 characters wide; a longer line of code wraps"
    lines = [l for c in json.loads(source)['cells'] for l in code_on_page(c).split('\n')]
    assert not [l for l in lines if len(l)>93]

def test_stored_outputs_have_no_bars():
    "What a terminal shows after a progress bar stays, also an error in the line of a bar"
    sys.path.insert(0, str(root/'.github'/'scripts'))
    try: from run_page import as_shown
    finally: sys.path.pop(0)
    bars = '\r█ |----| 0.00% [0/10 00:00<?]','\r█ |████| 100.00% [10/10 00:00<00:00 6.8]\r   \r'
    assert as_shown(f'epoch\n{bars[0]}Expected x\n{bars[1]}0  1.2\n')=='epoch\nExpected x\n0  1.2\n'
    assert as_shown(f'{bars[1]}0  228.49555100:41\n')=='0  228.495551  00:41\n'   # a number that fills its column

def test_pages_store_no_bars(source):
    "`run_page.py` removes the frames of progress bars from stored outputs"
    assert '|████' not in source

def test_pictures_are_described(source):
    "Each cell that draws a picture has a text for readers who cannot see it"
    cells = [c for c in json.loads(source)['cells'] if c['cell_type']=='code']
    def draws(c): return any('image/png' in o.get('data', {}) for o in c['outputs'])
    assert all(re.search(r'^#\| *(fig-alt: ..{20}|hide)', ''.join(c['source']), re.M) for c in cells if draws(c))

def test_signature():
    "The output of `show_doc` becomes a short call and a table, without modules, addresses and comments"
    sys.path.insert(0, str(root/'.github'/'scripts'))
    try: from signatures import tidy
    finally: sys.path.pop(0)
    given = '''### f

```python
def f(
    net:torch.nn.modules.module.Module, # A model, or `None`
    loss:Union[Callable, NoneType]=functools.partial(<function SoftTarget at 0x7f>, T=4), # Two, of them
    out:str='a.b=c', # A file | a folder
    tfm:NoneType=None, # A function
    lr, *args
)->list: # The losses
```

*What it does*'''
    assert tidy(given) == '''### f

```python
f(net, loss=partial(SoftTarget, T=4), out='a.b=c', tfm=None, lr, *args) -> list
```

*What it does*

| parameter | type | details |
| -- | -- | -- |
| `net` | `Module` | A model, or `None` |
| `loss` | `Callable \\| None` | Two, of them |
| `out` | `str` | A file \\| a folder |
| `tfm` |  | A function |
| returns | `list` | The losses |'''

def test_signature_of_a_callback():
    "Events of fastai callbacks and a bare star are left out; a first paragraph is emphasized as a whole"
    sys.path.insert(0, str(root/'.github'/'scripts'))
    try: from signatures import tidy
    finally: sys.path.pop(0)
    given = """```python
class C(
    n:int=1, # A number
    *, after_create=None, before_fit=None,
    late:bool=False, # A bool
):
```

*What it does, in*
two lines"""
    assert tidy(given).startswith('```python\nC(n=1, late=False)\n```\n\n*What it does, in\ntwo lines*\n\n| parameter')
    given = '```python\ndef f(\n    a, # Any\n    *, b:int=0, # A number\n):\n```\n\n*Do*'
    assert 'f(a, *, b=0)' in tidy(given) and '| `b` |' in tidy(given)

def test_counts_of_losses():
    "The numbers of losses on the front page are those that the page of losses computes and asserts"
    readme,page = ((root/o).read_text(encoding='utf-8') for o in ('README.md','nbs/losses.ipynb'))
    said = re.search(r'has (\d+) losses\. The values of (\d+) .*?, of (\d+) .*?, and of (\d+) ', readme)
    total,authors,others,own = map(int, said.groups())
    counted = re.search(r'test_eq\(\(len\(every\).*?\), \((\d+), (\d+), (\d+)\)\)', page)
    assert tuple(map(int, counted.groups()))==(total, authors, own) and total==authors+others+own

def test_front_page_shows_a_run_of_the_quickstart():
    "The table and the calls of the front page are those of *Distill on your images*"
    front,page = (json.loads((root/f'nbs/{n}.ipynb').read_text(encoding='utf-8'))['cells']
                  for n in ('index','tutorials/quickstart'))
    call = "learn.distill(teacher, layers='auto')"
    shown = next(c for c in front if c['cell_type']=='code' and call in ''.join(c['source']))
    assert shown['outputs'] and shown['outputs'] in [c.get('outputs') for c in page]
    run = '\n'.join(''.join(c['source']) for c in page if c['cell_type']=='code')
    calls = re.findall(r'^(?:learn|teacher)\..*\)', ''.join(shown['source']), re.M)
    assert len(calls)>=3 and not [o for o in calls if o not in run]
    scores = next(c for c in page if ''.join(c['source']).endswith('\nscores'))['outputs'][0]['data']['text/plain']
    scores = ast.literal_eval(''.join(scores))
    assert scores['baseline']<scores['student']<scores['teacher']   # as the text says

def test_readme():
    "README.md is up to date with index.ipynb"
    command = [sys.executable, '.github/scripts/readme.py', '--check']
    r = subprocess.run(command, cwd=root, text=True, capture_output=True)
    assert not r.returncode, r.stdout+r.stderr
