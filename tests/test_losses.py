"""The losses against slow float64 loops written from the paper's equations, and their properties.

Chen et al., NIPS 2017, equations (3), (4) and (6).
"""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from mmdet.models.losses import CrossEntropyLoss, L1Loss
from mmdet.registry import MODELS

from mmkd.models.chen2017 import HintL1Loss, HintL2Loss, TeacherBoundedL2Loss, WeightedSoftCELoss

SEEDS = st.integers(0, 2**31 - 1)


def rand(seed, *shape, scale=1.0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator, dtype=torch.float64) * scale).to(dtype)


# ---------------------------------------------------------------- equation (3)


def log_softmax(row):
    top = max(row)
    total = math.log(math.fsum(math.exp(z - top) for z in row))
    return [z - top - total for z in row]


def soft_ce_by_hand(student, teacher, class_weight, temperature, sigmoid):
    """Rows of equation (3); a sigmoid head's classes are Bernoulli, the background their rest."""
    rows = []
    for z_s, z_t in zip(student.tolist(), teacher.tolist(), strict=True):
        total = 0.0
        for c in range(len(z_s)):
            if sigmoid:
                log_s = log_softmax([z_s[c] / temperature, 0.0])
                log_t = log_softmax([z_t[c] / temperature, 0.0])
                total -= class_weight[c] * math.exp(log_t[0]) * log_s[0]
                total -= class_weight[-1] * math.exp(log_t[1]) * log_s[1]
            else:
                log_s = log_softmax([z / temperature for z in z_s])
                log_t = log_softmax([z / temperature for z in z_t])
                total -= class_weight[c] * math.exp(log_t[c]) * log_s[c]
        rows.append(total * temperature**2)
    return rows


@given(
    seed=SEEDS,
    n=st.integers(1, 5),
    classes=st.integers(1, 4),
    scale=st.sampled_from([0.1, 1.0, 10.0]),
    sigmoid=st.booleans(),
    background=st.sampled_from([0.0, 1.0, 1.5]),
    temperature=st.sampled_from([0.5, 1.0, 4.0]),
    weighted=st.booleans(),
)
def test_soft_ce_is_equation_3(seed, n, classes, scale, sigmoid, background, temperature, weighted):
    columns = classes if sigmoid else classes + 1
    student, teacher = (rand(seed + i, n, columns, scale=scale) for i in (0, 1))
    foreground = rand(seed + 2, classes).abs().tolist() if weighted else [1.0] * classes
    loss = WeightedSoftCELoss(
        hard_weight=0.3,
        background_weight=background,
        class_weight=foreground if weighted else None,
        temperature=temperature,
    )
    rows = soft_ce_by_hand(student, teacher, [*foreground, background], temperature, sigmoid)
    # (1 - mu) of equation (2), once, and the mean over N
    expected = 0.7 * sum(rows) / n
    got = loss(student, teacher, use_sigmoid=sigmoid)
    assert got.item() == pytest.approx(expected, rel=1e-10, abs=1e-12)

    row_weight = rand(seed + 3, n).abs()
    expected = 0.7 * sum(w * r for w, r in zip(row_weight.tolist(), rows, strict=True)) / 7
    for avg_factor in (7, 7.0, torch.tensor(7.0)):
        got = loss(student, teacher, row_weight, avg_factor, sigmoid)
        assert got.item() == pytest.approx(expected, rel=1e-10, abs=1e-12)


@pytest.mark.parametrize('sigmoid', [False, True])
@pytest.mark.parametrize('temperature', [1.0, 3.0])
def test_soft_ce_gradient(sigmoid, temperature):
    loss = WeightedSoftCELoss(temperature=temperature)
    student, teacher = rand(0, 4, 5).requires_grad_(), rand(1, 4, 5).requires_grad_()
    weight = rand(2, 4).abs()
    assert torch.autograd.gradcheck(lambda s: loss(s, teacher, weight, 3.0, sigmoid), student)
    loss(student, teacher, weight, 3.0, sigmoid).backward()
    assert teacher.grad is None


@given(seed=SEEDS, background=st.sampled_from([0.0, 1.0, 1.5]))
def test_a_sigmoid_is_a_softmax_against_zero(seed, background):
    student, teacher = (rand(seed + i, 6, 1, scale=3) for i in (0, 1))
    loss = WeightedSoftCELoss(background_weight=background)
    pair = [torch.cat([z, torch.zeros_like(z)], 1) for z in (student, teacher)]
    softmax, sigmoid = loss(*pair), loss(student, teacher, use_sigmoid=True)
    assert sigmoid.item() == pytest.approx(softmax.item(), rel=1e-12)


@pytest.mark.parametrize('sigmoid', [False, True])
def test_a_certain_teacher_makes_the_soft_loss_the_hard_one(sigmoid):
    """With weights of 1 and a teacher that is sure of the label, (3) is the cross entropy."""
    labels = torch.tensor([0, 1, 2])
    logits = rand(0, 3, 3)
    sure = torch.full((3, 3), -1e3, dtype=torch.float64)
    sure[range(3), labels] = 1e3
    soft = WeightedSoftCELoss(loss_weight=1.0, background_weight=1.0)(
        logits, sure, avg_factor=3, use_sigmoid=sigmoid
    )
    hard = CrossEntropyLoss(use_sigmoid=sigmoid)(logits, labels, avg_factor=3)
    # MMDetection adds a float32 epsilon to avg_factor
    assert soft.item() == pytest.approx(hard.item(), rel=1e-6)


@pytest.mark.parametrize('sigmoid', [False, True])
def test_the_temperature_keeps_the_scale_of_the_gradient(sigmoid):
    """T² · d/dz CE(softmax(z/T), p) = T · (q - p), which hardly moves with a high T."""
    teacher, gradients = rand(1, 4, 5), {}
    for temperature in (1.0, 50.0, 100.0):
        student = rand(0, 4, 5).requires_grad_()
        WeightedSoftCELoss(loss_weight=1.0, background_weight=1.0, temperature=temperature)(
            student, teacher, use_sigmoid=sigmoid
        ).backward()
        soften = torch.sigmoid if sigmoid else (lambda z: z.softmax(-1))
        q, p = (soften(z.detach() / temperature) for z in (student, teacher))
        torch.testing.assert_close(student.grad, temperature * (q - p) / 4, rtol=1e-9, atol=1e-12)
        gradients[temperature] = student.grad
    torch.testing.assert_close(gradients[50.0], gradients[100.0], rtol=0.05, atol=2e-3)


@pytest.mark.parametrize('sigmoid', [False, True])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float16, torch.bfloat16])
def test_soft_ce_is_stable_at_huge_logits(dtype, sigmoid):
    """Where both are sure, and opposed, it is the difference of their logits, not infinity."""
    huge = 1e4
    student = torch.tensor([[huge, -huge], [-huge, huge]], dtype=dtype, requires_grad=True)
    agreeing = WeightedSoftCELoss(loss_weight=1.0, background_weight=1.0)
    assert agreeing(student, student.detach(), use_sigmoid=sigmoid).item() == 0
    value = agreeing(student, -student.detach(), avg_factor=1, use_sigmoid=sigmoid)
    span = float(student.detach()[0, 0])
    assert value.item() == pytest.approx(4 * span, rel=1e-6)
    value.backward()
    torch.testing.assert_close(student.grad, student.detach().sign())


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype):
    student, teacher = (rand(i, 64, 4, scale=2, dtype=dtype) for i in (0, 1))
    targets = rand(2, 64, 4, dtype=dtype)
    soft, bounded, hint = WeightedSoftCELoss(), TeacherBoundedL2Loss(), HintL2Loss(normalize=True)
    for got, want in (
        (soft(student, teacher), soft(student.float(), teacher.float())),
        (
            bounded(student, teacher, targets),
            bounded(student.float(), teacher.float(), targets.float()),
        ),
        (hint(student, teacher), hint(student.float(), teacher.float())),
    ):
        assert got.dtype == torch.float32
        assert torch.equal(got, want)


def test_no_rows_give_a_zero_that_has_a_gradient():
    student = torch.zeros(0, 4, requires_grad=True)
    for value in (
        WeightedSoftCELoss()(student, torch.zeros(0, 4)),
        TeacherBoundedL2Loss()(student, torch.zeros(0, 4), torch.zeros(0, 4)),
    ):
        assert value.item() == 0
        value.backward()
    assert student.grad.shape == (0, 4)


# ---------------------------------------------------------------- equation (4)


def bounded_by_hand(student, teacher, targets, margin, weight):
    """Equation (4), box by box."""
    total = 0.0
    rows = [t.tolist() for t in (student, teacher, targets, weight)]
    for s, t, y, w in zip(*rows, strict=True):
        worse = sum((a - b) ** 2 for a, b in zip(s, y, strict=True)) + margin > sum(
            (a - b) ** 2 for a, b in zip(t, y, strict=True)
        )
        if worse:
            total += sum(v * (a - b) ** 2 for a, b, v in zip(s, y, w, strict=True))
    return total


@given(
    seed=SEEDS,
    n=st.integers(1, 12),
    margin=st.sampled_from([0.0, 0.5, 3.0, -0.5]),
    weighted=st.booleans(),
)
def test_bounded_l2_is_equation_4(seed, n, margin, weighted):
    student, teacher, targets = (rand(seed + i, n, 4) for i in range(3))
    weight = rand(seed + 3, n, 4).abs() if weighted else torch.ones(n, 4, dtype=torch.float64)
    expected = 0.5 * bounded_by_hand(student, teacher, targets, margin, weight)
    loss = TeacherBoundedL2Loss(loss_weight=0.5, margin=margin)
    given_weight = weight if weighted else None
    got = loss(student, teacher, targets, given_weight)
    assert got.item() == pytest.approx(expected / n, rel=1e-10, abs=1e-14)
    got = loss(student, teacher, targets, given_weight, 9)
    assert got.item() == pytest.approx(expected / 9, rel=1e-10, abs=1e-14)


@pytest.mark.parametrize('margin', [0.0, 0.3])
def test_bounded_l2_gradient(margin):
    student, teacher, targets = (rand(i, 8, 4).requires_grad_(i < 2) for i in range(3))
    loss = TeacherBoundedL2Loss(margin=margin)
    assert torch.autograd.gradcheck(lambda s: loss(s, teacher, targets, None, 5.0), student)
    loss(student, teacher, targets).backward()
    assert teacher.grad is None


def test_a_better_student_gets_no_push_and_a_worse_one_twice_its_error():
    targets = rand(0, 6, 4)
    near, far = targets + 0.1 * rand(1, 6, 4).sign(), targets + 0.7 * rand(2, 6, 4).sign()
    loss = TeacherBoundedL2Loss(loss_weight=0.5)

    better = near.clone().requires_grad_()
    value = loss(better, far, targets, avg_factor=16)
    value.backward()
    assert value.item() == 0
    assert torch.equal(better.grad, torch.zeros(6, 4, dtype=torch.float64))

    worse = far.clone().requires_grad_()
    loss(worse, near, targets, avg_factor=16).backward()
    torch.testing.assert_close(worse.grad, 2 * (far - targets) * 0.5 / 16)


def test_a_teacher_that_is_right_bounds_nothing_and_a_student_that_is_right_stops():
    student, targets = rand(0, 6, 4), rand(1, 6, 4)
    value = TeacherBoundedL2Loss(loss_weight=1.0)(student, targets, targets, avg_factor=1)
    assert value.item() == pytest.approx(((student - targets) ** 2).sum().item())
    for teacher in (targets, student):
        assert TeacherBoundedL2Loss()(targets, teacher, targets).item() == 0


def test_the_margin_asks_the_student_to_be_better_by_it():
    targets, teacher = torch.zeros(1, 4), torch.tensor([[1.0, 0, 0, 0]])
    student = torch.tensor([[0.8, 0, 0, 0]])  # squared errors 0.64 against 1
    for margin, pushed in ((0.0, False), (0.35, False), (0.37, True)):
        value = TeacherBoundedL2Loss(loss_weight=1.0, margin=margin)(student, teacher, targets)
        assert value.item() == pytest.approx(0.64 * pushed)


def test_a_student_as_good_as_its_teacher_is_not_pushed():
    """Equation (4) has >, not >=: on the other side of the target the two errors are equal."""
    targets, teacher = torch.zeros(1, 4), torch.tensor([[0.5, 0, 0, 0]])
    for student, margin in ((-teacher, 0.0), (0.0 * teacher, 0.25)):
        student.requires_grad_()
        value = TeacherBoundedL2Loss(loss_weight=1.0, margin=margin)(student, teacher, targets)
        value.backward()
        assert value.item() == 0
        assert not student.grad.any()


# ---------------------------------------------------------------- equation (6)


@given(
    seed=SEEDS,
    shape=st.sampled_from([(2, 3, 4, 5), (1, 2, 3, 3), (6, 3)]),
    normalize=st.booleans(),
    reduction=st.sampled_from(['mean', 'sum']),
)
def test_hint_is_equation_6(seed, shape, normalize, reduction):
    guided, hint = (rand(seed + i, *shape, scale=3.0) + i for i in (0, 1))
    channels = [t.transpose(0, 1).reshape(shape[1], -1).tolist() for t in (guided, hint)]
    total, count = 0.0, 0
    for v, z in zip(*channels, strict=True):
        if normalize:
            v, z = map(standardised_by_hand, (v, z))
        total += math.fsum((a - b) ** 2 for a, b in zip(v, z, strict=True))
        count += len(v)
    expected = 0.5 * (total / count if reduction == 'mean' else total)
    got = HintL2Loss(loss_weight=0.5, normalize=normalize, reduction=reduction)(guided, hint)
    assert got.item() == pytest.approx(expected, rel=1e-9)


def standardised_by_hand(values):
    mean = math.fsum(values) / len(values)
    variance = math.fsum((v - mean) ** 2 for v in values) / len(values)
    return [(v - mean) / math.sqrt(variance + 1e-6) for v in values]


@pytest.mark.parametrize('normalize', [False, True])
def test_hint_gradient(normalize):
    guided, hint = rand(0, 2, 3, 2, 2).requires_grad_(), rand(1, 2, 3, 2, 2).requires_grad_()
    loss = HintL2Loss(normalize=normalize)
    assert torch.autograd.gradcheck(lambda v: loss(v, hint), guided)
    loss(guided, hint).backward()
    assert hint.grad is None


@pytest.mark.parametrize('reduction', ['mean', 'sum'])
def test_the_hint_is_the_librarys_to_the_bit_and_keeps_one_map(reduction):
    torch.manual_seed(0)
    hint, results, kept = torch.randn(2, 33, 40, 57), [], []
    losses = (
        HintL2Loss(loss_weight=0.3, reduction=reduction),
        lambda v, z: 0.3 * F.mse_loss(v, z, reduction=reduction),
    )
    for loss in losses:
        torch.manual_seed(1)
        guided = (3 * torch.randn(2, 33, 40, 57)).requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            value = loss(guided, hint)
        value.backward()
        results.append((value.detach(), guided.grad, [t for t in kept if t.dim() == 4]))
        kept.clear()
    (value, grad, own), (expected, expected_grad, theirs) = results
    assert torch.equal(value, expected)
    assert torch.equal(grad, expected_grad)
    assert (len(own), len(theirs)) == (1, 2)


def test_standardised_hints_do_not_see_the_scale_of_a_channel():
    guided, hint = rand(0, 2, 3, 8, 8), rand(1, 2, 3, 8, 8)
    scale = torch.tensor([0.1, 1.0, 30.0], dtype=torch.float64).view(1, 3, 1, 1)
    loss = HintL2Loss(loss_weight=1.0, normalize=True)
    assert loss(guided * scale + 4, hint).item() == pytest.approx(
        loss(guided, hint).item(), rel=1e-3
    )
    assert loss(hint * 3 - 1, hint).item() == pytest.approx(0, abs=1e-10)
    pearson = [torch.corrcoef(torch.stack([guided[:, c].flatten(), hint[:, c].flatten()]))[0, 1]
               for c in range(3)]  # fmt: skip
    assert loss(guided, hint).item() == pytest.approx(
        sum(2 * (1 - r.item()) for r in pearson) / 3, rel=1e-4
    )


def test_a_constant_channel_has_a_gradient_when_standardised():
    guided = torch.zeros(1, 1, 4, 4, requires_grad=True)
    HintL2Loss(normalize=True)(guided, rand(0, 1, 1, 4, 4, dtype=torch.float32)).backward()
    assert guided.grad.isfinite().all()
    assert guided.grad.abs().max() > 0


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ('config', 'message'),
    [
        (dict(type='WeightedSoftCELoss', hard_weight=1.5), 'hard_weight=1.5 must be .* between'),
        (dict(type='WeightedSoftCELoss', hard_weight='half'), "hard_weight='half' must be"),
        (dict(type='WeightedSoftCELoss', loss_weight=-1), 'loss_weight=-1 must be .* at least 0'),
        (dict(type='WeightedSoftCELoss', background_weight=-1), 'background_weight=-1'),
        (dict(type='WeightedSoftCELoss', temperature=0), 'temperature=0'),
        (dict(type='WeightedSoftCELoss', class_weight=[1, -2]), r'class_weight\[1\]=-2'),
        (dict(type='TeacherBoundedL2Loss', loss_weight=None), 'loss_weight=None'),
        (dict(type='TeacherBoundedL2Loss', margin=float('nan')), 'margin=nan'),
        (dict(type='HintL2Loss', reduction='none'), "reduction='none' must be"),
        (dict(type='HintL2Loss', loss_weight=float('nan')), 'loss_weight=nan'),
    ],
)
def test_a_value_that_cannot_be_is_refused_by_name(config, message):
    with pytest.raises(ValueError, match=message):
        MODELS.build(config)


def test_shapes_that_differ_are_refused():
    with pytest.raises(ValueError, match=r'student logits \(2, 3\) and teacher logits \(2, 4\)'):
        WeightedSoftCELoss()(torch.zeros(2, 3), torch.zeros(2, 4))
    with pytest.raises(ValueError, match='class_weight has 2 entries, the head has 3'):
        WeightedSoftCELoss(class_weight=[1, 2])(torch.zeros(2, 4), torch.zeros(2, 4))
    with pytest.raises(ValueError, match='differ in shape'):
        TeacherBoundedL2Loss()(torch.zeros(2, 4), torch.zeros(3, 4), torch.zeros(2, 4))
    with pytest.raises(ValueError, match=r'guided layer \(1, 2, 3, 3\) and hint layer'):
        HintL2Loss()(torch.zeros(1, 2, 3, 3), torch.zeros(1, 2, 4, 4))


# ------------------------------- what went wrong in public attempts at this paper, one test each


def test_error_background_weight_missing():
    """The paper weighs the background by 1.5 and every other class by 1, unless told otherwise."""
    nothing = torch.tensor([[-50.0, -50.0, 50.0]], dtype=torch.float64)
    student = rand(0, 1, 3)
    got = WeightedSoftCELoss(loss_weight=1.0)(student, nothing)
    assert got.item() == pytest.approx(-1.5 * student.log_softmax(-1)[0, 2].item(), rel=1e-12)
    recipe = MODELS.build(dict(type='WeightedSoftCELoss'))
    assert recipe.background_weight == 1.5


def test_error_background_index():
    """The weight sits on the last class, MMDetection's background, not on the paper's first."""
    student = torch.zeros(3, 3, dtype=torch.float64)
    teacher = 100 * torch.eye(3, dtype=torch.float64)  # row c is sure of class c
    loss = WeightedSoftCELoss(loss_weight=1.0, background_weight=1.5)
    rows = [loss(student, teacher, torch.eye(3)[c], avg_factor=1).item() for c in range(3)]
    assert rows == pytest.approx([math.log(3), math.log(3), 1.5 * math.log(3)], rel=1e-12)


def test_error_bound_on_the_batch_scalar():
    """One student better and one worse than its teacher: only the worse box is pushed, although
    the batch as a whole is worse (a bound on the sum would push both)."""
    targets = torch.zeros(2, 4, dtype=torch.float64)
    student = torch.tensor([[0.1, 0, 0, 0], [3.0, 0, 0, 0]], dtype=torch.float64).requires_grad_()
    teacher = torch.tensor([[0.5, 0, 0, 0], [1.0, 0, 0, 0]], dtype=torch.float64)
    value = TeacherBoundedL2Loss(loss_weight=1.0)(student, teacher, targets, avg_factor=1)
    value.backward()
    assert value.item() == 9.0
    assert student.grad.tolist() == [[0, 0, 0, 0], [6, 0, 0, 0]]


def test_error_bound_per_coordinate():
    """The norm is over the four deltas: one worse delta in a better box is not pushed."""
    targets = torch.zeros(1, 4)
    student, teacher = torch.tensor([[0.5, 0, 0, 0.5]]), torch.tensor([[0.0, 0, 0, 2.0]])
    assert TeacherBoundedL2Loss()(student, teacher, targets).item() == 0


def test_error_direction_of_the_bound():
    """The push is there where the student is worse, and gone where it is better."""
    targets, near, far = torch.zeros(1, 4), torch.full((1, 4), 0.1), torch.full((1, 4), 2.0)
    loss = TeacherBoundedL2Loss(loss_weight=1.0)
    assert loss(far, near, targets).item() == 16.0
    assert loss(near, far, targets).item() == 0


def test_error_nu_applied_twice():
    student, teacher, targets = (rand(i, 5, 4) for i in range(3))
    values = [
        TeacherBoundedL2Loss(loss_weight=nu)(student, teacher, targets).item() for nu in (1.0, 0.5)
    ]
    assert values[0] > 0
    assert values[1] == pytest.approx(0.5 * values[0], rel=1e-12)


def test_error_mu_applied_twice():
    student, teacher = rand(0, 5, 4), rand(1, 5, 4)
    whole = WeightedSoftCELoss(loss_weight=1.0)(student, teacher).item()
    assert WeightedSoftCELoss(hard_weight=0.8)(student, teacher).item() == pytest.approx(
        0.2 * whole, rel=1e-12
    )


def test_a_sigmoid_head_with_a_background_logit_weighs_that_column_the_other_way_round():
    """MMDetection's sigmoid RoI heads have C + 1 logits, the background's last."""
    student, teacher = rand(1, 3, 3), rand(2, 3, 3)
    value = WeightedSoftCELoss(loss_weight=1.0)(student, teacher, None, 1.0, True, True)
    total = 0.0
    for z_s, z_t in zip(student.tolist(), teacher.tolist(), strict=True):
        for c, (inside, outside) in enumerate([(1, 1.5), (1, 1.5), (1.5, 1)]):
            log_s, log_t = (log_softmax([z[c], 0.0]) for z in (z_s, z_t))
            total -= inside * math.exp(log_t[0]) * log_s[0]
            total -= outside * math.exp(log_t[1]) * log_s[1]
    assert value.item() == pytest.approx(total, rel=1e-12)


def test_error_sigmoid_without_its_other_half():
    """A teacher sure that there is nothing pushes a sigmoid student down, by the weight of the
    background: -1.5 · log(1 - p), whose gradient is 1.5 · p."""
    student = torch.tensor([[2.0]], dtype=torch.float64, requires_grad=True)
    teacher = torch.tensor([[-60.0]], dtype=torch.float64)
    value = WeightedSoftCELoss(loss_weight=1.0)(student, teacher, use_sigmoid=True)
    value.backward()
    p = 1 / (1 + math.exp(-2.0))
    assert value.item() == pytest.approx(-1.5 * math.log(1 - p), rel=1e-12)
    assert student.grad.item() == pytest.approx(1.5 * p, rel=1e-12)


def test_error_item_inside_the_loss():
    """Gradients flow through each loss, of the size that the equations say."""
    student = rand(0, 3, 4).requires_grad_()
    teacher, targets = rand(1, 3, 4), rand(2, 3, 4)
    WeightedSoftCELoss(loss_weight=1.0, background_weight=1.0)(student, teacher).backward()
    expected = (student.detach().softmax(-1) - teacher.softmax(-1)) / 3
    torch.testing.assert_close(student.grad, expected)
    student.grad = None
    TeacherBoundedL2Loss(loss_weight=1.0, margin=1e6)(student, teacher, targets).backward()
    torch.testing.assert_close(student.grad, 2 * (student.detach() - targets) / 3)
    student.grad = None
    HintL2Loss(loss_weight=1.0)(student, teacher).backward()
    torch.testing.assert_close(student.grad, 2 * (student.detach() - teacher) / 12)


def test_error_log_of_zero():
    """A probability that underflows to 0 has a finite logarithm, and a finite gradient."""
    student = torch.tensor([[500.0, -500.0]], requires_grad=True)
    assert student.softmax(-1)[0, 1].item() == 0
    assert (1 - student.sigmoid())[0, 0].item() == 0
    loss = WeightedSoftCELoss(loss_weight=1.0, background_weight=1.0)
    for sigmoid, expected in ((False, 1000.0), (True, 1000.0)):
        student.grad = None
        value = loss(student, -student.detach(), use_sigmoid=sigmoid)
        value.backward()
        assert value.item() == expected
        assert student.grad.tolist() == [[1.0, -1.0]]


def test_regression_adds_to_smooth_l1_it_does_not_replace_it():
    """Equation (5): L_sL1 + nu · L_b; the hard loss is whole."""
    student, teacher, targets = (rand(i, 5, 4) for i in range(3))
    hard = L1Loss()(student, targets)
    bounded = TeacherBoundedL2Loss(loss_weight=0.5, margin=1e6)(student, teacher, targets)
    total = (student - targets).abs().mean() + 0.5 * ((student - targets) ** 2).sum(-1).mean()
    assert (hard + bounded).item() == pytest.approx(total.item(), rel=1e-12)


@pytest.mark.parametrize('reduction', ['mean', 'sum'])
def test_the_l1_hint_is_the_mean_distance_of_elements(reduction):
    guided, hint = rand(0, 2, 3, 4, 5), rand(1, 2, 3, 4, 5)
    total = sum(abs(a - b) for a, b in zip(guided.flatten().tolist(), hint.flatten().tolist(),
                                           strict=True))  # fmt: skip
    want = 0.25 * total / (guided.numel() if reduction == 'mean' else 1)
    got = HintL1Loss(loss_weight=0.25, reduction=reduction)(guided, hint)
    assert got.item() == pytest.approx(want, rel=1e-6)


# ---------------------------------------------------------------- extreme inputs


@settings(max_examples=40)
@given(
    st.integers(0, 999),
    st.integers(0, 4),
    st.sampled_from([1.0, 100.0, 1e4]),
    st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    st.booleans(),
)
def test_every_loss_and_its_gradient_stay_finite(seed, rows, scale, dtype, weighted):
    torch.manual_seed(seed)
    student, teacher, targets = (scale * torch.randn(rows, 4).clamp(-1, 1) for _ in range(3))
    student, teacher = student.to(dtype).requires_grad_(), teacher.to(dtype)
    weight = torch.full((rows, 4), float(weighted))
    soft, bounded = WeightedSoftCELoss(), TeacherBoundedL2Loss()
    values = [
        soft(student, teacher, weight[:, 0], 1.0),
        soft(student, teacher, weight[:, 0], 1.0, use_sigmoid=True),
        bounded(student, teacher, targets, weight, 1.0),
        HintL2Loss()(student, teacher),
    ]
    for value in values:
        (gradient,) = torch.autograd.grad(value, student)
        assert value.isfinite()
        assert gradient.float().isfinite().all()
        if not (weighted and rows) and value is not values[-1]:
            assert value == 0
            assert not gradient.any()


def test_a_target_of_nan_at_no_weight_counts_nothing():
    student = torch.ones(2, 4, requires_grad=True)
    targets = torch.tensor([[0.0] * 4, [float('nan')] * 4])
    weight = torch.tensor([[1.0] * 4, [0.0] * 4])
    value = TeacherBoundedL2Loss(loss_weight=1)(student, torch.zeros(2, 4), targets, weight, 1.0)
    value.backward()
    assert value == 4
    assert student.grad.tolist() == [[2.0] * 4, [0.0] * 4]
