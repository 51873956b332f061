"What `kd_report` says of a teacher that was trained on the student's samples"
import torch
import pytest
from kd_fastai.demo import digits
from kd_fastai.report.report import accuracy_and_confidence
from support import fit, learner, trained_teacher

def warned(teacher): return any("trained on the student's samples" in o for o in
                                learner(dls=digits(40, bs=40)).kd_report(teacher).warnings)

@pytest.mark.slow
def test_teacher_that_was_trained_on_the_samples_of_the_student():
    assert warned(fit(learner(width=16, dls=digits(40)), 30).model)
    assert not warned(trained_teacher(16, 5))  # of 1000 samples

def test_labels_that_are_not_classes():
    pred = torch.zeros(4,3)
    assert accuracy_and_confidence(pred, torch.zeros(4)) is accuracy_and_confidence(None, torch.zeros(4).long()) is None
    assert accuracy_and_confidence(pred, torch.zeros(4).long())==(1., torch.tensor(1/3).item())
