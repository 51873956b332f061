"""What distillation costs, part by part.

    python benchmarks/cost.py PART [options], python benchmarks/cost.py PART --help

step: one step, next to a loop by hand and two packages. scale: how it grows. losses: time and memory of each loss.
per_sample: values of single samples. cached: stored predictions, views and faster copies. dot: an epoch with DOT.
compare: worker processes of kd_compare.
`benchmarks/run` measures those that have targets."""
import warnings
warnings.filterwarnings('ignore')
import sys
from pathlib import Path
sys.path.insert(0, str(Path(__file__).parents[1]))
from sweep import run_part

if __name__=='__main__': run_part('costs', __doc__)
