"Everything that a user needs, by name: `from kd_fastai.all import *`"
from .adapters import make_adapter
from .cache import CachedTeacher, StoredTeacher
from .callback import KnowledgeDistillationCallback
from .capture import Capture
from .card import KDCard
from .classes import match_classes
from .compare import KDComparison, StudentInputs, kd_compare
from .dot import DOT
from .find import KDFind
from .gates import all_of, by_entropy, by_position, teacher_right, teacher_sure
from .inputs import normalization_tfm
from .layers import get_model_layers, get_module_by_name
from .losses import *
from .matching import classifier_input, layer_similarity, linear_cka, match_feature_layers
from .objective import Objective, Term
from .parity import OnnxModel, deployable, export_onnx, kd_parity
from .phi_s import fit_phi_s, phi_s
from .plots import *
from .report import KDReport
from .schemes import DistillationToken, Ensemble, MeanTeacher, MutualLearning, SelfDistillation
from .schemes import on_exits, train_generations
from .sources import FunctionTeacher, fast_copy, onnx_teacher
from .teacher import Teacher
from .two_views import TwoViews, across_views, by_view, on_two_views
