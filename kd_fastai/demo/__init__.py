"Data and networks of the examples, and the command `kd-demo`"
import warnings
# PyTorch 2.14 warns of a line in fastai: the first lines of the demo are its own
warnings.filterwarnings('ignore', '`torch.jit.script` is deprecated', FutureWarning)
from .data import *
from .fashion_mnist import *
from .pictures import *
from .command import *
