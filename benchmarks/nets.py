"Networks of the benchmarks."
from collections import OrderedDict
from torch import nn

# --- costs: only their size counts

def block(ni, nf):
    "A convolution of stride 2, with normalization"
    return nn.Sequential(nn.Conv2d(ni, nf, 3, 2, 1, bias=False), nn.BatchNorm2d(nf), nn.ReLU())

def stages(width):
    "Maps of 16x16 to 2x2, each with twice the channels of the one before"
    return nn.Sequential(block(3, width), block(width, 2*width), block(2*width, 4*width), block(4*width, 8*width),
                         nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8*width, 100))

def plain(channels, classes):
    "Four convolutions of the same width"
    return nn.Sequential(block(3, channels), *(block(channels, channels) for _ in range(3)), nn.AdaptiveAvgPool2d(1),
                         nn.Flatten(), nn.Linear(channels, classes))

# --- digits and Fashion-MNIST at 14x14

def conv(ni, nf, stride, thin):
    "A convolution; a thin one is separable"
    if not thin: return nn.Conv2d(ni, nf, 3, stride, 1, bias=False)
    return nn.Sequential(nn.Conv2d(ni, ni, 3, stride, 1, groups=ni, bias=False), nn.Conv2d(ni, nf, 1, bias=False))

def three_stages(thin):
    "Three stages of 8x8, 4x4 and 2x2, a map for each class, and its mean"
    def stage(ni, nf, stride):
        return nn.Sequential(OrderedDict(conv=conv(ni, nf, stride, thin), norm=nn.BatchNorm2d(nf), act=nn.ReLU()))
    w = 16
    return nn.Sequential(OrderedDict({'0': stage(1, w, 1), '1': stage(w, 2*w, 2), '2': stage(2*w, 4*w, 2),
                                      'cam': nn.Conv2d(4*w, 10, 1), 'pool': nn.AdaptiveAvgPool2d(1),
                                      'flat': nn.Flatten()}))

def linear_head(model):
    "The same function with the mean before the classifier, which then is a linear layer of the same weights"
    *stages,cam,pool,flat = model
    fc = nn.Linear(cam.in_channels, cam.out_channels)
    fc.load_state_dict({'weight': cam.weight.flatten(1), 'bias': cam.bias})
    return nn.Sequential(*stages, pool, flat, fc)

# --- Fashion-MNIST at 28x28

def normed(ni, nf, stride=1):
    "A convolution with normalization"
    return nn.Conv2d(ni, nf, 3, stride, 1, bias=False),nn.BatchNorm2d(nf)

class Residual(nn.Module):
    "A convolution that adds to its input"
    def __init__(self, n):
        super().__init__()
        self.conv = nn.Sequential(*normed(n, n))
    def forward(self, x): return (x+self.conv(x)).relu()

def resnet(width):
    "Three stages of 14x14, 7x7 and 4x4, and a linear head"
    def stage(ni, nf): return nn.Sequential(*normed(ni, nf, 2), nn.ReLU(), Residual(nf))
    return nn.Sequential(OrderedDict(
        early=stage(1, width), middle=stage(width, 2*width), late=stage(2*width, 4*width),
        pool=nn.AdaptiveAvgPool2d(1), flat=nn.Flatten(), head=nn.Linear(4*width, 10)))

class Mix(nn.Module):
    "One block of a mixer: mix positions, then channels. Features stay maps"
    def __init__(self, positions, channels):
        super().__init__()
        def mlp(n): return nn.Sequential(nn.LayerNorm(n), nn.Linear(n, 2*n), nn.GELU(), nn.Linear(2*n, n))
        self.positions,self.channels = mlp(positions),mlp(channels)
    def forward(self, x):
        flat = x.flatten(2)
        flat = flat+self.positions(flat)
        return (flat+self.channels(flat.transpose(1, 2)).transpose(1, 2)).view_as(x)

def mixer(channels):
    "An MLP-mixer: patches of 4x4 in three blocks of 7x7, and a linear head"
    return nn.Sequential(OrderedDict(
        patches=nn.Conv2d(1, channels, 4, 4), early=Mix(49, channels), middle=Mix(49, channels),
        late=Mix(49, channels), pool=nn.AdaptiveAvgPool2d(1), flat=nn.Flatten(), head=nn.Linear(channels, 10)))
