"Losses with their own weights, under one name"
from .base import TrainableLoss
from .connectors import *
from .classifier import *
from .embedding import *
from .temperature import *
from . import connectors, classifier, embedding, temperature

__all__ = ['TrainableLoss', *connectors.__all__, *classifier.__all__, *embedding.__all__, *temperature.__all__]
