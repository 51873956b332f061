"Push by huggingface_hub, against a server of this test in place of the Hub."
import base64, json, threading
from http.server import BaseHTTPRequestHandler, HTTPServer
import pytest
from fastai.basics import *
from kd_fastai.all import *
from kd_fastai.demo import small_net
from kd_fastai.hooks.models import digest
from support import fit, learner

for o in [*globals()]:
    if o=='test' or o.startswith('test_'): del globals()[o]  # fastcore's own helpers, which pytest would take for tests

pytestmark = pytest.mark.filterwarnings('ignore')
pytest.importorskip('toml', reason='huggingface_hub reads fastai repositories with toml, which is not installed')
pytest.importorskip('huggingface_hub', reason='huggingface_hub is not installed')

COMMIT = '1'*40

class StandIn(BaseHTTPRequestHandler):
    "The calls that a push and a download make. Commits are written to `server.folder`, and files are read from there"
    def log_message(self, *args): pass
    def reply(self, values):
        data = json.dumps(values).encode()
        self.send_response(200)
        self.send_header('Content-Type', 'application/json')
        self.send_header('Content-Length', str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_HEAD(self): self.do_GET()

    def do_GET(self):
        if '/resolve/' in self.path: return self.send(self.server.folder/self.path.rsplit('/', 1)[1])
        if '/tree/' not in self.path: return self.reply(dict(sha=COMMIT, id='user/net', siblings=[]))
        files = self.server.folder.iterdir()
        self.reply([dict(type='file', path=o.name, size=o.stat().st_size, oid=COMMIT) for o in files])

    def send(self, file):
        "A file of the repository, or 404"
        if not file.exists(): return self.send_error(404)
        data = file.read_bytes()
        self.send_response(200)
        for k,v in {'Content-Length': len(data), 'ETag': digest(data), 'X-Repo-Commit': COMMIT}.items():
            self.send_header(k, str(v))
        self.end_headers()
        if self.command=='GET': self.wfile.write(data)

    def do_POST(self):
        body = self.rfile.read(int(self.headers['Content-Length']))
        url = f'http://127.0.0.1:{self.server.server_port}/user/net'
        if self.path.endswith('/create'): return self.reply(dict(url=url))
        if '/preupload/' in self.path:
            files = [dict(path=o['path'], uploadMode='regular', shouldIgnore=False) for o in json.loads(body)['files']]
            return self.reply(dict(files=files))
        if '/commit/' not in self.path: return self.reply({})
        for line in map(json.loads, body.decode().splitlines()):
            if line['key']!='file': continue
            file = self.server.folder/line['value']['path']
            file.write_bytes(base64.b64decode(line['value']['content']))
        self.reply(dict(commitUrl=f'{url}/commit/1', commitOid=COMMIT, success=True))

@pytest.fixture
def server(tmp_path):
    server = HTTPServer(('127.0.0.1', 0), StandIn)
    server.folder = tmp_path/'repository'
    server.folder.mkdir()
    server.url = f'http://127.0.0.1:{server.server_port}'
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()

@pytest.fixture
def pushed(server, tmp_path):
    "A Learner and its card, which were pushed with the ONNX file"
    learn = fit(learner(KnowledgeDistillationCallback(small_net(8), SoftTarget)))
    path = learn.path
    card = learn.kd_card(small_net(8), title='Small digits', license='apache-2.0', progress=False)
    file = learn.kd_export(tmp_path/'student.onnx', scores={})
    address = learn.kd_push('user/net', card, file, token='hf_x', api_endpoint=server.url)
    assert 'commit' in str(address) and learn.path==path
    return learn,card

@pytest.mark.slow
def test_a_push_keeps_the_card(server, pushed):
    "Card, figures and ONNX file are in the repository, and the file predicts"
    learn,card = pushed
    assert {'README.md','recall.png','model.pkl','pyproject.toml','student.onnx'}<={
        o.name for o in server.folder.iterdir()}
    assert (server.folder/'README.md').read_text()==card.markdown
    x,_ = learn.dls.valid.one_batch()
    torch.testing.assert_close(OnnxModel(server.folder/'student.onnx')(x), learn.model(x).softmax(1))

@pytest.mark.slow
def test_a_pushed_learner_is_downloaded(server, pushed, tmp_path, monkeypatch):
    "by `from_pretrained_fastai`, into a cache that has our card"
    from huggingface_hub import constants, from_pretrained_fastai
    monkeypatch.setattr(constants, 'ENDPOINT', server.url)
    monkeypatch.setattr(constants, 'HUGGINGFACE_CO_URL_TEMPLATE', server.url+'/{repo_id}/resolve/{revision}/{filename}')
    monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(tmp_path/'cache'))
    learn,card = pushed
    loaded = from_pretrained_fastai('user/net')
    x,_ = learn.dls.valid.one_batch()
    torch.testing.assert_close(loaded.model.eval()(x), learn.model.eval()(x))
    assert next((tmp_path/'cache').rglob('README.md')).read_text()==card.markdown
