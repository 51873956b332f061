"Everything, by name: `from kd_fastai.all import *`"
from .adapters import *
from .cache import CachedTeacher
from .callback import *
from .card import KDCard
from .classes import *
from .compare import KDComparison, kd_compare
from .hooks import *
from .losses import *
from .parity import OnnxModel, deployable, export_onnx, kd_parity
from .plots import *
from .report import *
from .schemes import *
from .teacher import *
