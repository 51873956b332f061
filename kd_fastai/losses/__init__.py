"All losses, by name"
from .output import *
from .feature import *
from .relation import *
from .base import TrainableLoss
from .connectors import *
from .classifier import *
from .embedding import *
from .temperature import *
from . import classifier, connectors, embedding, feature, output, relation, temperature

_modules = output, feature, relation, connectors, classifier, embedding, temperature
__all__ = ['TrainableLoss', *(n for m in _modules for n in m.__all__)]
