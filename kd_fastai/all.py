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
from .methods.gates import all_of, by_entropy, by_position, teacher_right, teacher_sure
from .hooks.inputs import normalization_tfm
from .hooks.layers import get_model_layers, get_module_by_name
from .losses import *
from .hooks.matching import classifier_input, layer_similarity, linear_cka, match_feature_layers
from .objective import Objective, Term
from .ship.cascade import Cascade
from .ship.export import OnnxModel, deployable, export_onnx
from .ship.parity import KDParity
from .ship.quantize import KDQuantized
from .methods.phi_s import fit_phi_s, phi_s
from .methods import pretrain as _pretrain  # gives Learner its kd_pretrain
from .report.plots import *
from .report.report import KDReport
from .report.runs import StudentInputs
from .report.shrink import KDShrink
from .methods.schemes import DistillationToken, Ensemble, MeanTeacher, MutualLearning, SelfDistillation
from .methods.schemes import on_exits, train_generations
from .teacher.fast import FastTeacher, fast_copy
from .teacher.function import FunctionTeacher, onnx_teacher
from .teacher.live import Teacher
from .methods.two_views import TwoViews, across_views, by_view, on_two_views
