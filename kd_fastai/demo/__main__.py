"Run the command: `python -m kd_fastai.demo`"
from .command import kd_demo

kd_demo()
