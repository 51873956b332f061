"All losses, by name"
from .output import *
from .feature import *
from .relation import *
from .trainable import *
