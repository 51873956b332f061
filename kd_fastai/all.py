"Everything, by name: `from kd_fastai.all import *`"
from .adapters import *
from .cache import CachedTeacher, StoredTeacher
from .callback import *
from .classes import *
from .hooks import *
from .losses import *
from .plots import *
from .report import *
from .schemes import *
from .sources import FunctionTeacher, fast_copy, onnx_teacher
from .teacher import *
