"Everything, by name: `from kd_fastai.all import *`"
from .adapters import *
from .cache import CachedTeacher
from .callback import KnowledgeDistillationCallback
from .classes import *
from .hooks import *
from .inputs import *
from .losses import *
from .objective import Objective, Term
from .plots import *
from .report import *
from .schemes import *
from .teacher import *
