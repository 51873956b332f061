"The site in a real browser: pages load, fit the screen and show formulas and plots; search and menu work."
import os, re, shutil
from functools import cache, partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path
from threading import Thread
from types import SimpleNamespace
import pytest

exe = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not find_spec('playwright'), reason='playwright, which drives the browser, is not installed'),
    pytest.mark.skipif(not exe, reason='no browser is installed: chromium, chromium-browser or google-chrome')]
flags = '''--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking
    --disable-component-update --disable-sync'''.split()
flags.append('--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1')   # a request to another host fails at once
sizes = dict(desktop=(1280,800), phone=(390,844))
schemes = 'dark','light'   # in this order, so that a page is loaded in light
for_sizes = pytest.mark.parametrize('size', sizes)
keep_shots = 'KD_SCREENSHOTS' in os.environ

# KaTeX shows an unknown command in red. The site hides what is wider than `main`, so the page itself stays narrow.
# Contrast is WCAG's: 1 for equal colors, 21 for black on white.
contrast = '''() => {
    const rgba = s => { const c = s.match(/[\\d.]+/g).map(Number); return c.length==3 ? [...c, 1] : c };
    const linear = v => (v/=255)<=.04045 ? v/12.92 : ((v+.055)/1.055)**2.4;
    const light = c => { const [r,g,b] = c.slice(0,3).map(linear); return .2126*r+.7152*g+.0722*b };
    const grounds = new Map([[null, [255,255,255,1]]]);   // thousands of words of code have the same
    const ground = e => {
        if (!grounds.has(e)) {
            const c = rgba(getComputedStyle(e).backgroundColor);
            grounds.set(e, c[3]==1 ? c : ground(e.parentElement)) }
        return grounds.get(e) };
    const ratio = e => {
        const [a,b] = [light(rgba(getComputedStyle(e).color)), light(ground(e))].sort((x,y) => y-x);
        return (a+.05)/(b+.05) };
    const seen = s => [...document.querySelectorAll(s)].filter(e => e.textContent.trim() && e.checkVisibility());
    const kinds = {text: 'main p, main li, main td, main h1, main h2', code: 'main pre code, main pre span',
                   link: 'main p a, main li a, #quarto-sidebar a', formula: '.katex'};
    return Object.fromEntries(Object.entries(kinds).map(([k,s]) => [k, Math.min(99, ...seen(s).map(ratio))])) }'''

facts = '''async () => {
    await document.fonts.ready;
    const all = s => [...document.querySelectorAll(s)];
    const main = document.querySelector('main'), prose = main.cloneNode(true);
    prose.querySelectorAll('pre, code, .katex').forEach(e => e.remove());
    const right = main.getBoundingClientRect().right;
    const wide = e => e.scrollWidth-e.clientWidth>2 || e.getBoundingClientRect().right>right+2;
    const bad = '.katex-error, .katex [mathcolor="#cc0000"], .math:not(:has(.katex))';
    return {wide: all('main pre, main table, main .katex-display').filter(wide).map(e => e.textContent.slice(0, 80)),
            sideways: document.documentElement.scrollWidth - innerWidth, cut: main.scrollWidth - main.clientWidth,
            bad: all(bad).map(e => e.textContent), formulas: all('.katex').length,
            height: document.documentElement.scrollHeight,
            pictures: all('main img').map(e => e.naturalWidth), text: prose.textContent} }'''

class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args): pass

@pytest.fixture(scope='module')
def url(site):
    "The URL of the site on a local server"
    missing = [o for o in ('katex','fonts') if not (site/'site_libs'/o).exists()]
    if missing: pytest.skip(f"not in node_modules and could not be downloaded from npm: {', '.join(missing)}")
    with ThreadingHTTPServer(('127.0.0.1', 0), partial(Quiet, directory=site)) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f'http://127.0.0.1:{server.server_port}/'
        server.shutdown()

@pytest.fixture(scope='module')
def new_tab():
    "A function that opens a tab of a given size in a new profile"
    from playwright.sync_api import sync_playwright
    def f(size, **kwargs):
        tab = browser.new_page(viewport=dict(zip(('width','height'), sizes[size])), **kwargs)
        tab.set_default_timeout(10_000)
        return tab
    with sync_playwright() as p, p.chromium.launch(executable_path=exe, args=flags) as browser: yield f

def listen(tab):
    "Lists of the requests and of the errors of a tab, which grow as they happen"
    requests,errors = [],[]
    tab.on('request', lambda r: requests.append(r.url))
    tab.on('requestfailed', lambda r: errors.append(f'{r.url}: {r.failure}'))
    tab.on('response', lambda r: r.status<400 or errors.append(f'{r.url}: {r.status}'))
    tab.on('console', lambda m: m.type!='error' or errors.append(m.text))
    tab.on('pageerror', lambda e: errors.append(str(e)))
    return requests,errors

@pytest.fixture(scope='module')
def look(url, new_tab):
    "A function that opens a page, once for all tests, and returns facts about it"
    @cache
    def listened(size):   # one tab for all pages: a new one each time takes three times as long
        tab = new_tab(size)
        return tab, listen(tab)
    @cache
    def f(page, size):
        tab,logs = listened(size)
        for l in logs: l.clear()
        tab.goto(url+page)
        seen = tab.evaluate(facts)
        seen['contrast'] = {}
        for scheme in schemes if size=='desktop' or keep_shots else ():   # a phone has the same colors
            tab.emulate_media(color_scheme=scheme, reduced_motion='reduce')
            is_dark = 'document.documentElement.classList.contains("quarto-dark")'
            tab.wait_for_function(f'dark => {is_dark}==dark', arg=scheme=='dark')
            seen['contrast'][scheme] = tab.evaluate(contrast)
            shot = f'{page.replace("/", "_")}.{size}.{scheme}.png'
            if keep_shots: tab.screenshot(path=Path(__file__).parent/'screenshots'/shot, full_page=True)
        return SimpleNamespace(**seen, **dict(zip(('requests','errors'), map(list, logs))))
    return f

# Their formulas and pictures are on the pages of losses
split = {f'losses/{m}.html' for m in 'output feature relation connectors classifier embedding temperature'.split()}

@for_sizes
def test_loads(look, page, size): assert not look(page, size).errors

@for_sizes
def test_stays_local(look, url, page, size):
    "No request goes to another host"
    assert not [r for r in look(page, size).requests if not r.startswith((url, 'data:'))]

@for_sizes
def test_fits(look, page, size):
    "The page does not scroll sideways and nothing is cut off; a wide table or formula scrolls by itself"
    seen = look(page, size)
    assert seen.sideways <= 1 and seen.cut <= 8   # the end of an index may reach into the margin

@for_sizes
def test_length(look, page, size):
    "Tutorials are at most 15,000 pixels long; the benchmark of all losses may be longer"
    limit = 18_000 if page=='tutorials/which_loss.html' else 15_000
    if page.startswith('tutorials/') or page in ('index.html','losses.html','glossary.html'):
        assert look(page, size).height<=limit

def test_wide_parts_fade_out(url, new_tab):
    "On a phone, what is wider than the screen fades out at the side where it goes on, until one has scrolled there"
    tab = new_tab('phone')
    tab.goto(f'{url}tutorials/cost.html')
    tab.wait_for_function("document.querySelectorAll('main .kd-more').length>5")
    hidden = tab.evaluate('''() => [...document.querySelectorAll('main *')].filter(e =>
        /auto|scroll/.test(getComputedStyle(e).overflowX) && e.scrollWidth-e.clientWidth>2
        && !e.classList.contains('kd-more')).map(e => e.textContent.slice(0, 60))''')
    assert not hidden and tab.locator('main p.kd-more > img').count()
    tab.evaluate("window.wide = document.querySelector('main .kd-more'); wide.scrollLeft = wide.scrollWidth")
    tab.wait_for_function("!wide.classList.contains('kd-more')")
    tab.goto(f'{url}tutorials/when_not.html')   # a report: sentences between tables
    tab.wait_for_function("document.querySelectorAll('main .kd-more').length>5")
    assert not tab.locator('main .kd-more p').count()
    tab.close()

def test_nothing_to_scroll(look, page):
    "On a desktop, lines of code, tables and formulas are visible without scrolling"
    assert not look(page, 'desktop').wide

@for_sizes
def test_formulas(look, page, source, size):
    "All formulas are rendered without an error"
    seen = look(page, size)
    assert not seen.bad and '$$' not in seen.text
    assert seen.formulas or page in split or '$$' not in source

def test_markdown(look, page):
    "Links and callouts are rendered. A symbol in backticks would break the link around it: it becomes a link itself"
    assert not re.findall(r'.{,60}\]\(.{,40}|:::.{,40}', look(page, 'desktop').text)

@for_sizes
def test_pictures(look, page, source, size):
    "A plot stored in the notebook is a picture on the page"
    pictures = look(page, size).pictures
    assert all(pictures)
    assert pictures or page in split or '"image/png"' not in source

@pytest.mark.parametrize('scheme', schemes)
def test_readable(look, page, scheme):
    "Text, code, links and formulas have enough contrast in the light and the dark scheme"
    seen = look(page, 'desktop').contrast[scheme]
    assert min(seen['text'], seen['link']) >= 4.5 and min(seen.values()) >= 3, seen

@pytest.mark.parametrize('scheme', schemes)
def test_plots_have_a_ground(url, new_tab, scheme):
    "Plots have black labels, so they need a white ground of their own in the dark scheme"
    tab = new_tab('desktop', color_scheme=scheme)
    tab.goto(url)
    corner = tab.evaluate('''() => {
        const im = document.querySelector('main img'), c = document.createElement('canvas').getContext('2d');
        c.drawImage(im, 0, 0); return [...c.getImageData(0, 0, 1, 1).data] }''')
    assert corner == [255]*4
    tab.close()

def test_keyboard(url, new_tab):
    "Tab reaches the search, the menu and the text with a visible focus; Enter follows a link"
    tab = new_tab('desktop')
    tab.goto(url)
    where = '''() => { const e = document.activeElement, s = getComputedStyle(e);
        const part = e.closest('.smalldocs-search, #quarto-sidebar, main')?.className.split(' ')[0] ?? '';
        return [part, e.matches(':focus-visible'), s.outlineStyle!='none' || s.boxShadow!='none'] }'''
    seen = []
    for _ in range(200):
        tab.keyboard.press('Tab')
        seen.append(tab.evaluate(where))
        if seen[-1][0]=='content': break
    assert {'smalldocs-search','sidebar','content'} <= {o[0] for o in seen}, seen
    assert all(visible and ring for part,visible,ring in seen if part), seen
    link = tab.locator('#quarto-sidebar a.sidebar-link[href$=".html"]').nth(1)
    target = link.get_attribute('href')
    link.focus()
    tab.keyboard.press('Enter')
    tab.wait_for_url(url+target.removeprefix('./'))
    tab.close()

@for_sizes
@pytest.mark.parametrize('loss', ['softtarget','cwd','crdbank','minilmv2'])
def test_page_of_a_loss(look, loss, size):
    "A sample of the generated pages loads, fits the screen and shows formulas"
    seen = look(f'losses/{loss}.html', size)
    assert not seen.errors and not seen.bad and seen.formulas and '$$' not in seen.text
    assert seen.sideways <= 1 and seen.cut <= 8 and not (size=='desktop' and seen.wide)
    assert all(seen.pictures) and (seen.pictures or loss!='cwd')

@for_sizes
def test_search(url, new_tab, size):
    "The search finds a loss and links to its page"
    tab = new_tab(size)
    tab.goto(url)
    if size=='phone': tab.locator('.navbar-toggler').click()
    tab.locator('.smalldocs-search input').press_sequentially('SoftTarget')
    tab.locator('a.search-result[href$="losses/softtarget.html"]').click()
    tab.wait_for_url('**/losses/softtarget.html')
    signature = 'SoftTarget(pred, teacher_pred, T=5, **kwargs) -> Tensor'
    assert tab.locator('main pre').filter(has_text=signature).is_visible()
    tab.close()

# What people search for, and the page that the first result must be on
queries = {
    'weight': 'tutorials/weights', 'temperature': 'tutorials/weights|glossary', 'loss is nan': 'tutorials/faq',
    'learning rate': 'tutorials/(faq|lesson)', 'mixup': 'tutorials/faq', 'cutmix': 'tutorials/faq',
    'object detection': 'tutorials/faq',
    'teacher normalization': 'tutorials/|hooks/inputs', 'colab': 'index|tutorials/(install|lesson)',
    'install': 'tutorials/install', 'quick start': 'tutorials/install', 'own images': 'tutorials/quickstart',
    'photos': 'tutorials/quickstart',
    'timm': 'tutorials/any_learner', 'hugging face': 'tutorials/any_learner', 'onnx': 'tutorials/ship|ship/',
    'quantization': 'tutorials/ship', 'unlabelled': 'tutorials/unlabeled', 'segmentation': 'tutorials/segmentation',
    'cache': 'tutorials/cache', 'CRD': 'losses/crd.html', 'SoftTarget': 'losses/softtarget.html',
    'VID': 'losses/vid', 'standardize': 'losses/standardize', 'ReviewKD': 'losses/reviewkd'}

def test_search_order(url, new_tab):
    "The first result of a search is on the expected page"
    tab = new_tab('desktop')
    tab.goto(url)
    first = tab.evaluate('''async (queries) => {
        const index = await (await fetch('search.json')).json();
        const first = q => (window.kdSearch(index, q, 1)[0] ?? {href: ''}).href;
        return Object.fromEntries(queries.map(q => [q, first(q)])) }''', [*queries])
    assert not {q: first[q] for q,page in queries.items() if not re.match(page, first[q])}
    tab.close()

@for_sizes
def test_sidebar_shows_the_page(url, new_tab, size):
    "The entry of the page is marked, and visible without scrolling the sidebar"
    tab = new_tab(size)
    for page in ('glossary.html','teacher/store.html','losses/vid.html'):
        tab.goto(url+page)
        if size=='phone': tab.locator('.quarto-btn-toggle').click()
        entry = tab.locator('#quarto-sidebar a.sidebar-link.active')
        assert entry.count()==1 and entry.get_attribute('aria-current')
        if size=='desktop': assert 0 < entry.bounding_box()['y'] < sizes[size][1]
    tab.close()

@pytest.mark.parametrize('words,found', [('kubernetes', False), ('temperature schedule', True)])
def test_search_is_exact(url, new_tab, words, found):
    "The search says so if it finds nothing, and finds pages that contain all words"
    tab = new_tab('desktop')
    tab.goto(url)
    tab.locator('.smalldocs-search input').press_sequentially(words)
    tab.locator('.search-result' if found else '.search-none').first.wait_for()
    tab.close()

def test_menu(url, new_tab):
    "On a phone the menu is hidden; it opens, and its links work"
    tab = new_tab('phone')
    tab.goto(url)
    link = tab.locator('#quarto-sidebar a.sidebar-link[href$=".html"]:visible').last
    assert link.bounding_box()['x'] < 0
    tab.locator('.quarto-btn-toggle').click()
    target = link.get_attribute('href')
    link.click()
    tab.wait_for_url(url+target)
    assert tab.locator('main h1').is_visible()
    tab.close()

# ---- the page that predicts

@pytest.fixture
def predicting(url, site, new_tab):
    "The page that predicts in a new tab, and the folder of its files"
    folder = site/'site_libs/predict'
    if not folder.exists(): pytest.skip('npm could not download onnxruntime-web, or onnxscript is not installed')
    tab = new_tab('desktop')
    requests,errors = listen(tab)
    tab.goto(f'{url}tutorials/browser.html')
    assert not [r for r in requests if 'onnx' in r]   # 14 MB: with the first picture
    yield tab,folder
    assert not errors and not [r for r in requests if not r.startswith((url, 'data:'))]
    tab.close()

def shown(tab):
    "The table of the page after a prediction: `{model: [prediction, probability, ms, kB, accuracy]}`"
    tab.wait_for_function("document.querySelector('#kd-teacher').cells[5].textContent!='–'", timeout=60_000)
    rows = tab.locator('#kd-predict tbody tr').all_inner_texts()
    return {name: values for name,*values in (r.split('\t') for r in rows)}

@pytest.mark.parametrize('mode,suffix,close', [('RGB','png',1e-3), ('RGBA','png',1e-3), ('L','jpg',2e-2)])
def test_a_picture_file_in_the_browser(predicting, mode, suffix, close, tmp_path):
    "A file on disk gets the name and probability of ONNX Runtime in Python, by student and teacher"
    import numpy as np
    from PIL import Image
    from sklearn.datasets import load_digits
    from kd_fastai.ship.export import OnnxModel
    tab,folder = predicting
    file = tmp_path/f'digit.{suffix}'
    digit = Image.fromarray((load_digits().images[1003]*15.9).astype(np.uint8)).resize((40,52), Image.BICUBIC)
    digit.convert(mode).save(file)
    tab.locator('#kd-predict input').set_input_files(file)
    for name,(predicted,probability,ms,kb,_) in shown(tab).items():
        index,_,expected = OnnxModel(folder/f'{name}.onnx').predict(file)
        assert predicted==index and float(probability)==pytest.approx(expected.max(), abs=close)
        assert float(ms)>0 and float(kb)==round((folder/f'{name}.onnx').stat().st_size/1000)

def test_a_drawing_in_the_browser(predicting):
    "A vertical line is a 1"
    tab,_ = predicting
    box = tab.locator('#kd-predict canvas').bounding_box()
    x = box['x']+box['width']/2
    tab.mouse.move(x, box['y']+0.15*box['height'])
    tab.mouse.down()
    tab.mouse.move(x, box['y']+0.85*box['height'], steps=5)
    tab.mouse.up()
    assert shown(tab)['teacher'][0]=='1'
