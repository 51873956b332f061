"Objectives next to plain loops: random ones, labels that leave out positions, class maps, and the class axis."
import random
import pytest, torch
import torch.nn.functional as F
from kd_fastai.all import DecoupledKD, FitNet, Logits, Mutual, SoftTarget, Term
from kd_fastai.methods.gates import teacher_right
from kd_fastai.objective import Objective

def soft_target(s, t, T): return T**2*F.kl_div((s/T).log_softmax(-1), (t/T).softmax(-1), reduction='none').sum(-1)
ORACLES = {   # the value of one sample or position, from vectors of logits
    SoftTarget: lambda s, t: soft_target(s, t, 5),
    Mutual: lambda s, t: soft_target(s, t, 1),
    Logits: lambda s, t: (s-t).pow(2).mean(-1)}

def random_case(seed):
    "Settings of an objective, and a batch in double precision"
    r,g = random.Random(seed),torch.Generator().manual_seed(seed)
    def rand(*shape): return torch.randn(shape, generator=g, dtype=torch.float64)
    n,c,size = r.randint(2, 5),r.randint(3, 6),r.choice([(), (3,), (2,4)])
    case = dict(pred=rand(n, *size, c), task=rand(), target=torch.randint(c, (n, *size), generator=g),
                class_map=r.choice([None, None, r.sample([-1, *range(c)], c)]), ignore=r.choice([None, -100]),
                task_weight=r.choice([0., 0.3, 1.]), progress=r.random())
    if case['ignore'] is not None and size: case['target'][torch.rand(n, *size, generator=g)<0.3] = -100
    if case['class_map'] is not None and sum(o>=0 for o in case['class_map'])<2: case['class_map'] = None
    case['teachers'] = {k: rand(n, *size, c) for k in ('a','b')[:r.randint(1, 2)]}
    case['share'] = torch.rand(n, generator=g, dtype=torch.float64) if r.random()<0.3 else None
    losses = [(r.choice([*ORACLES]), r.uniform(-1, 3), r.choice([*case['teachers']]), r.random()<0.3) for _ in range(3)]
    return case,losses

def by_hand(case, losses):
    "The total by loops over samples and positions"
    mask = torch.ones(case['target'].shape, dtype=torch.bool)
    if case['target'].ndim>1: mask = case['target']>=0
    known = [*range(case['pred'].shape[-1])] if case['class_map'] is None else [
        i for i,o in enumerate(case['class_map']) if o>=0]
    columns = known if case['class_map'] is None else [case['class_map'][i] for i in known]
    total = case['task_weight']*case['task']
    for f,weight,name,weighted in losses:
        values = ORACLES[f](case['pred'][...,known], case['teachers'][name][...,columns])
        if weighted: values = values*torch.arange(1, len(values)+1).double().view(-1, *[1]*(values.ndim-1))
        total = total + weight*(1-case['progress'])*(values[mask].mean() if mask.any() else 0.)
    return total

@pytest.mark.parametrize('seed', range(60))
def test_random_objectives_equal_loops(seed):
    "Losses, weights, schedules, teachers, class maps, ignored labels, sample weights and mixed labels at random"
    case,losses = random_case(seed)
    one = len(case['teachers'])==1
    def by_place(batch): return torch.arange(1, len(batch.pred)+1).double()
    terms = [Term(f, w, schedule=lambda p: 1-p, teacher=None if one else k,
                  sample_weight=by_place if weighted else None) for f,w,k,weighted in losses]
    used = {k: t for k,t in case['teachers'].items() if one or any(k==o[2] for o in losses)}
    objective = Objective(terms, case['task_weight'], class_axis=-1, ignore_index=case['ignore'],
                          class_map=case['class_map'])
    mixed = None if case['share'] is None else (case['target'].flip(0), case['share'])
    if mixed is not None and (case['target']<0).any(): mixed = None
    batch = objective.prepare(case['pred'], used['a'] if one else used, fm_t=None if one else dict.fromkeys(used, {}),
                              target=case['target'], mixed=mixed, task=case['task'])
    values = objective.values(batch, case['progress'])
    total = objective.total(batch, values, objective.weights(batch, values, case['progress']))
    torch.testing.assert_close(total, by_hand(case, losses), rtol=1e-9, atol=1e-9)

# ---- labels

def value(term, pred, teacher_pred, target, **kwargs):
    objective = Objective([term], **kwargs)
    return objective.values(objective.prepare(pred, teacher_pred, target=target))[term.name]

@pytest.mark.parametrize('ignored', [-100, -1, 5, 255])
def test_labels_of_no_class_are_left_out_though_nobody_names_them(ignored):
    p,t = torch.randn(2, 4, 6, 5).unbind()
    y = torch.randint(5, (4,6)); y[:,4:] = ignored
    for loss in (SoftTarget, DecoupledKD):
        got = value(Term(loss, 1.), p, t, y, class_axis=None)
        args = (p[:,:4].flatten(0,1), t[:,:4].flatten(0,1))+((y[:,:4].flatten(),) if loss is DecoupledKD else ())
        torch.testing.assert_close(got, loss(*args))

def test_labels_of_another_size_leave_out_positions():
    p,t = torch.randn(2, 3, 4, 4, 4).unbind()
    y = torch.randint(4, (3,16,16)); y[:,:8] = 255
    torch.testing.assert_close(value(Term(SoftTarget, 1.), p, t, y, ignore_index=255), SoftTarget(p[:,:,2:], t[:,:,2:]))

def test_numbers_of_one_output_are_no_classes():
    p,t = torch.randn(2, 6, 1, 4).unbind()
    y = torch.randint(9, (6,4))
    torch.testing.assert_close(value(Term(Logits, 1.), p, t, y), Logits(p, t))

def test_labels_in_a_column_are_those_of_the_samples():
    "fastai's tabular classification has labels `(B, 1)`."
    p,t,y = *torch.randn(2, 6, 3).unbind(),torch.randint(3, (6,))
    assert value(Term(DecoupledKD, 1.), p, t, y[:,None])==value(Term(DecoupledKD, 1.), p, t, y)

@pytest.mark.parametrize('named', [None, 1, -1])
def test_labels_say_where_the_classes_are(named):
    p,t,y = *torch.randn(2, 8, 7, 5).unbind(),torch.randint(5, (8,7))
    got = value(Term(Mutual, 1.), p, t, y, class_axis=named)
    torch.testing.assert_close(got, Mutual(p.flatten(0,1), t.flatten(0,1)))

def test_time_first():
    "CTC's predictions are `(T, B, C)`, its labels `(B, L)`."
    p,t,y = *torch.randn(2, 12, 6, 5).unbind(),torch.randint(5, (6,4))
    torch.testing.assert_close(value(Term(SoftTarget, 1.), p, t, y, class_axis=None),
                               SoftTarget(p.flatten(0,1), t.flatten(0,1)))

def test_a_class_map_renumbers_the_labels():
    "A gate sees labels in the numbering of the shared classes; one with optional labels those the teacher knows."
    seen = {}
    def gate(batch):
        seen['right'] = teacher_right(batch)
        return seen['right']
    def optional(pred, teacher_pred, target=None):
        seen['target'] = target
        return pred.sum()
    y = torch.arange(5).repeat(4)
    teacher_pred = F.one_hot((y-1).clamp_min(0), 4).float()*9
    objective = Objective([Term(SoftTarget, 1., sample_weight=gate), Term(optional, 1.)], class_map=[-1,0,1,2,3])
    objective.values(objective.prepare(torch.randn(20,5), teacher_pred, target=y))
    assert seen['right'].tolist()==(y>0).float().tolist()
    assert seen['target'].tolist()==(y[y>0]-1).tolist()

def test_a_constant_term_gets_no_weight_of_its_own():
    "Its gradient is rounding: 'auto' keeps the default, and looks again in the next fit."
    objective = Objective([Term(SoftTarget)])
    objective.find_weights({'soft_target': (1., 1e-9)})
    assert objective.assumed_weights['soft_target']<1e3
    objective.assumed_weights.clear()
    assert objective.unknown_weights==objective.terms
    objective.find_weights({'soft_target': (1., 0.5)})
    objective.assumed_weights.clear()
    assert objective.found_weights=={'soft_target': 2.}

def test_default_weight_and_schedule_are_one_rule():
    def progress(term, **kwargs): return [Objective([term], **kwargs).terms[0].schedule_at(p) for p in (0., 1.)]
    assert progress(Term(SoftTarget))==[0., 1.]
    assert progress(Term(SoftTarget), task_weight=0)==[1., 1.]
    assert progress(Term(SoftTarget, 0.5))==[1., 1.]
    assert progress(Term(FitNet, layers='0'))==[1., 1.]
    assert progress(Term(SoftTarget, schedule=None))==[1., 1.]

def test_a_share_of_the_task_loss_is_a_number():
    with pytest.raises(ValueError, match="a weight is a share of the task loss.*logits has the weight 'auto'"):
        Objective([Term(SoftTarget, 0.5), Term(Logits)], balance=True)
