"Everything, by name: `from kd_fastai.all import *`"
from .callback import *
from .hooks import *
from .losses import *
from .plots import *
from .teacher import *
