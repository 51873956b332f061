"""What distillation gains, study by study, over paired seeds.

    python benchmarks/accuracy.py STUDY [options], python benchmarks/accuracy.py STUDY --help

which_loss: every loss. fashion: losses on Fashion-MNIST. distill_default: temperature and strength of `learn.distill`.
auto_ratio: the strength of 'auto'. funmatch: function matching. views: repeated views. chain: pruned and quantized
students. first_student: the numbers of the lesson. `benchmarks/tables/README.md` lists the tables."""
import sys
from pathlib import Path
sys.path.insert(0, str(Path(__file__).parents[1]))
from sweep import run_part

if __name__=='__main__': run_part('studies', __doc__)
