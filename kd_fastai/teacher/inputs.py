"The inputs of a model are in `kd_fastai.hooks.inputs`"
from ..hooks.inputs import *
from ..hooks.inputs import as_plain_tensor, batch_inputs, input_size, sample_inputs, split_inputs, stats_repr # noqa: F401
