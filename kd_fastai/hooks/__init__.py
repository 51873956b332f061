"Naming, capturing and matching layers, under one name"
from .layers import *
from .capture import *
from .matching import *
