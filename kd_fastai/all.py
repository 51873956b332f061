"Everything that a user needs, by name: `from kd_fastai.all import *`"
from .losses.adapters import make_adapter
from .teacher.cached import CachedTeacher, StoredTeacher
from .callback import KnowledgeDistillationCallback
from .hooks.capture import Capture
from .teacher.classes import match_classes
from .report.compare import kd_compare
from .methods.dot import DOT
from .methods import gates
from .hooks.inputs import normalization_tfm
from .hooks.layers import get_model_layers, get_module_by_name
from .losses import *
from .hooks.matching import layer_similarity, match_feature_layers
from .objective import Objective, Term
from .ship.cascade import Cascade
from .ship.export import OnnxModel, deployable, export_onnx
from .methods import pretrain as _pretrain                     # these give Learner its other methods kd_...
from .report import find as _find, report as _report, shrink as _shrink
from .ship import card as _card, hub as _hub, parity as _parity, quantize as _quantize
from .report.plots import plot_attention, plot_similarity, plot_softened
from .report.runs import StudentInputs
from .methods.ensemble import Ensemble
from .methods.generations import train_generations
from .methods.mean_teacher import MeanTeacher
from .methods.mutual import MutualLearning
from .methods.self_distillation import SelfDistillation
from .methods.token import DistillationToken
from .teacher.fast import FastTeacher
from .teacher.function import FunctionTeacher, onnx_teacher
from .teacher.live import Teacher
from .methods.two_views import TwoViews
