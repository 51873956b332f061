"Run the command: `python -m kd_fastai.demo`"
from .command import kd_demo

if __name__=='__main__': kd_demo()
