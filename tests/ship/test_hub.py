"Push by huggingface_hub, against a server of this test in place of the Hub."
import base64, json, threading
from http.server import BaseHTTPRequestHandler, HTTPServer
import pytest
from fastai.basics import *
from kd_fastai.all import *
from kd_fastai.demo import small_net
from support import fit, learner

for o in [*globals()]:
    if o=='test' or o.startswith('test_'): del globals()[o]  # fastcore's own helpers, which pytest would take for tests

pytestmark = pytest.mark.filterwarnings('ignore')
pytest.importorskip('toml', reason='huggingface_hub reads fastai repositories with toml, which is not installed')
pytest.importorskip('huggingface_hub', reason='huggingface_hub is not installed')

class StandIn(BaseHTTPRequestHandler):
    "The calls that a push makes: create, preupload and commit. Commits are written to `server.folder`"
    def log_message(self, *args): pass
    def reply(self, **values):
        data = json.dumps(values).encode()
        self.send_response(200)
        self.send_header('Content-Type', 'application/json')
        self.send_header('Content-Length', str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self): self.reply(sha='1'*40, id='user/net', siblings=[])

    def do_POST(self):
        body = self.rfile.read(int(self.headers['Content-Length']))
        url = f'http://127.0.0.1:{self.server.server_port}/user/net'
        if self.path.endswith('/create'): return self.reply(url=url)
        if '/preupload/' in self.path:
            files = [dict(path=o['path'], uploadMode='regular', shouldIgnore=False) for o in json.loads(body)['files']]
            return self.reply(files=files)
        if '/commit/' not in self.path: return self.reply()
        for line in map(json.loads, body.decode().splitlines()):
            if line['key']!='file': continue
            file = self.server.folder/line['value']['path']
            file.write_bytes(base64.b64decode(line['value']['content']))
        self.reply(commitUrl=f'{url}/commit/1', commitOid='1'*40, success=True)

@pytest.fixture
def server(tmp_path):
    server = HTTPServer(('127.0.0.1', 0), StandIn)
    server.folder = tmp_path/'repository'
    server.folder.mkdir()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()

@pytest.mark.slow
def test_a_push_keeps_the_card(server, tmp_path):
    "Card, figures and ONNX file are in the repository, and the Learner loads from its file"
    teacher = small_net(8)
    learn = fit(learner(KnowledgeDistillationCallback(teacher, SoftTarget)))
    path = learn.path
    card = learn.kd_card(teacher, title='Small digits', license='apache-2.0', progress=False)
    file = learn.kd_export(tmp_path/'student.onnx', scores={})
    address = learn.kd_push('user/net', card, file, token='hf_x', api_endpoint=f'http://127.0.0.1:{server.server_port}')
    assert 'commit' in str(address) and learn.path==path
    assert {'README.md','card.html','recall.png','model.pkl','pyproject.toml','student.onnx'}<={
        o.name for o in server.folder.iterdir()}
    assert (server.folder/'README.md').read_text()==card.markdown
    loaded = load_learner(server.folder/'model.pkl')
    x,_ = learn.dls.valid.one_batch()
    torch.testing.assert_close(loaded.model.eval()(x), learn.model.eval()(x))
    torch.testing.assert_close(OnnxModel(server.folder/'student.onnx')(x), learn.model(x).softmax(1))
