"The folder of the golden numbers. Its modules, such as `check` and `impls`, can be imported after this one."
import sys
from pathlib import Path

golden = Path(__file__).resolve().parents[1]/'golden'
sys.path.insert(0, str(golden))
