"Naming, capturing and matching layers, under one name"
from importlib import import_module
from .layers import *
from .capture import *

def __getattr__(name):
    "`matching` is imported when one of its names is used: it reads teachers, which read layers"
    matching = import_module('.matching', __name__)
    if name in matching.__all__: return getattr(matching, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
