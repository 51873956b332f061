"The measured cases that `kd_report` quotes are those of the tables, and the sentences fit the Learner."
import re
from pathlib import Path
import pandas as pd
import pytest
from kd_fastai.demo import digits
from kd_fastai.report.compare import comparison_table
from kd_fastai.report.expect import CASES, nearest_cases
from kd_fastai.report.report import KDReport
from support import learner, trained_teacher

TABLES = Path(__file__).parents[2]/'benchmarks/tables'

def points(row): return tuple(round(float(100*row[k]), 1)+0. for k in ('gain','low','high'))

def of_regime(data, regime, steps):
    "Of `distill_default.csv`"
    runs = pd.read_csv(TABLES/'distill_default.csv').query('data==@data and regime==@regime')
    runs = runs[runs.method.isin(['baseline','T=4, rising'])]
    return steps,points(comparison_table(runs, 'accuracy', 'baseline').loc['T=4, rising'])

def of_fashion(labels, steps):
    "Of `fashion.csv`"
    is_case = "student=='thin' and labels==@labels and method=='learn.distill(teacher)'"
    o = pd.read_csv(TABLES/'fashion.csv').query(is_case)
    assert o.steps.item()==steps
    return steps,points(o.iloc[0])

def of_pictures(labels, steps, method='distill'):
    "Of `pictures.csv`"
    is_case = "half=='report' and student=='separable' and pixels==32 and labels==@labels and steps==@steps"
    o = pd.read_csv(TABLES/'pictures.csv').query(is_case).set_index('method').loc[method]
    return steps,points(o)

@pytest.mark.parametrize('case,rows', zip(CASES, [
    [of_regime('digits', 'short', 50), of_regime('digits', 'few labels', 200), of_regime('digits', 'long', 800)],
    [of_regime('digits', 'many labels, short', 225), of_regime('digits', 'many labels', 900)],
    [of_regime('fashion', 'short', 100), of_regime('fashion', 'few labels', 400), of_regime('fashion', 'long', 1600)],
    [of_fashion(100, 600)], [of_fashion(10_000, 2400)], [of_pictures(381, 1155)],
    [of_pictures(1142, 455)]], strict=True),
    ids=[f'{o.data}, {o.labels}' for o in CASES])
def test_cases_are_those_of_the_tables(case, rows): assert case.gains==dict(rows)

def test_what_gained_more_is_in_the_table():
    maps,start = "distill, layers='auto'",'start 60% on all pictures, distill'
    shown = [(381, 1155, maps), (381, 1155, start), (1142, 455, maps)]
    said = [float(o) for c in CASES if c.is_same for o in re.findall(r'\((\+[\d.]+)\)', c.better)]
    assert said==[of_pictures(*o)[1][0] for o in shown]

def test_nearest_by_teacher_and_number_of_labels():
    assert [o.labels for o in nearest_cases(180, False)]==[200,100]
    assert all(o.is_same for o in nearest_cases(20, True))

def test_report_says_what_to_expect():
    "In steps of this Learner, with the nearest case"
    report = learner(dls=digits(200, bs=20)).kd_report(trained_teacher(16, 5))
    assert isinstance(report, KDReport)
    said = repr(report)
    for o in ('200 training samples, 10 batches an epoch: 500 steps are 50 epochs', 'digits of 8x8 pixels',
              'On a batch of training samples the teacher is right'): assert o in said
