"Everything that a user needs, by name: `from kd_fastai.all import *`"
from .losses.adapters import make_adapter
from .teacher.cached import CachedTeacher, StoredTeacher
from .callback import KnowledgeDistillationCallback
from .hooks.capture import Capture
from .ship.card import KDCard
from .teacher.classes import match_classes
from .report.compare import KDComparison, kd_compare
from .methods.dot import DOT
from .report.find import KDFind
from .methods import gates
from .hooks.inputs import normalization_tfm
from .hooks.layers import get_model_layers, get_module_by_name
from .losses import *
from .hooks.matching import classifier_input, layer_similarity, linear_cka, match_feature_layers
from .objective import Objective, Term
from .ship.cascade import Cascade
from .ship.export import OnnxModel, deployable, export_onnx
from .ship.hub import *
from .ship.parity import KDParity
from .ship.quantize import KDQuantized
from .methods import pretrain as _pretrain  # gives Learner its kd_pretrain
from .report.plots import *
from .report.report import KDReport
from .report.runs import StudentInputs
from .report.shrink import KDShrink
from .methods.schemes import DistillationToken, Ensemble, MeanTeacher, MutualLearning, SelfDistillation
from .methods.schemes import train_generations
from .teacher.fast import FastTeacher, fast_copy
from .teacher.function import FunctionTeacher, onnx_teacher
from .teacher.live import Teacher
from .methods.two_views import TwoViews
