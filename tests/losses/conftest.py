import pytest
from support import trained_teacher
from support.losses import ALL

@pytest.fixture(scope='module')
def teachers():
    "Trained teachers, by width"
    return {w: trained_teacher(w) for w in {r.width for r in ALL.values()}}
