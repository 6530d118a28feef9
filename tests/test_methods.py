"""The published methods: their formulas on other shapes, their edges, and what they refuse.

``tests/test_parity.py`` has the numbers of public code.
"""

import copy
import inspect
import random
from types import SimpleNamespace

import pairs
import pytest
import torch
import torch.nn.functional as F
import zoo
from hypothesis import given
from hypothesis import strategies as st
from mmengine.config import Config
from mmengine.logging import MessageHub

import mmkd
from mmkd.engine.random_state import random_state, set_random_state
from mmkd.layer_pairs import SIZE, Layer, LayerPair
from mmkd.methods import METHODS
from mmkd.methods.base import BatchNorm
from mmkd.methods.defeat import covered, levels_of
from mmkd.methods.fbkd import NonLocal
from mmkd.methods.fgd import GlobalContext, focal_masks, published_cells
from mmkd.methods.fgfi import anchor_overlaps
from mmkd.methods.reviewkd import Fusion
from mmkd.models.heads import Rows

SEEDS = st.integers(0, 2**31 - 1)
SIZES = st.integers(1, 6)
CONFIGS = pairs.ROOT / 'configs/_base_'
RECIPES = sorted(p.stem for p in CONFIGS.glob('*.py') if p.stem not in ('chen2017', 'mmkd'))


def recipe(name):
    """The terms of a recipe base."""
    return Config.fromfile(CONFIGS / f'{name}.py').distillation.to_dict()


def rand(seed, *shape, scale=1.0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator, dtype=torch.float64) * scale).to(dtype)


def rows(student, teacher, target=None, **more):
    return Rows(student, teacher, target, torch.ones(len(student)), max(len(student), 1),
                background=True, **more)  # fmt: skip


def value(term, *given):
    """The weighted loss."""
    return sum(term.weighed(term.compare(*given)).values())


def bound(term, width=4, levels=1, side=64):
    """The term with layers for maps of this width."""
    layers = []
    for index in range(levels):
        layer, shape = Layer('neck', index), (1, width, side >> index, side >> index)
        layers.append(LayerPair(f'neck_{index}', layer, layer, (shape, shape)))
    term.bind(layers)
    return term


# ------------------------------------------------------------------------------ their formulas


@given(seed=SEEDS, n=SIZES, c=SIZES, h=SIZES, w=SIZES, tau=st.sampled_from([0.5, 1.0, 4.0]))
def test_cwd_is_the_divergence_of_channels(seed, n, c, h, w, tau):
    s, t = rand(seed, n, c, h, w), rand(seed + 1, n, c, h, w)
    logs = [(x / tau).view(n * c, h * w).log_softmax(1) for x in (s, t)]
    expected = F.kl_div(*logs, reduction='batchmean', log_target=True) * tau**2
    torch.testing.assert_close(value(mmkd.CWD(tau), s, t, None, None), 10 * expected)


@given(seed=SEEDS, n=SIZES, c=SIZES, h=st.integers(2, 6), w=SIZES)
def test_pkd_is_one_minus_the_correlation(seed, n, c, h, w):
    s, t = rand(seed, n, c, h, w), rand(seed + 1, n, c, h, w)
    count, total = n * h * w, 0
    for own, theirs in zip(s.transpose(0, 1).flatten(1), t.transpose(0, 1).flatten(1), strict=True):
        r = torch.corrcoef(torch.stack([own, theirs]))[0, 1]
        total += (1 - r) * (count - 1) / count / c
    expected = 6 * total
    torch.testing.assert_close(value(mmkd.PKD(), s, t, None, None), expected, rtol=1e-4, atol=1e-4)


@given(seed=SEEDS, n=SIZES, c=SIZES, tau=st.sampled_from([0.5, 1.0, 4.0]))
def test_kl_and_dkd_are_the_divergence_and_its_parts(seed, n, c, tau):
    s, t = rand(seed, n, c + 1, scale=3), rand(seed + 1, n, c + 1, scale=3)
    target = torch.arange(n) % (c + 1)
    logs = [(x / tau).log_softmax(1) for x in (s, t)]
    expected = F.kl_div(*logs, reduction='batchmean', log_target=True) * tau**2
    torch.testing.assert_close(value(mmkd.KL(tau), rows(s, t)), expected)
    # KL = target part + (1 - p_t) · rest: for one row, both weights are known.
    one = [x[:1] for x in (s, t, target)]
    parts = mmkd.DKD(1, 1, tau).compare(rows(*one))
    share = 1 - (t[0] / tau).softmax(0)[target[0]]
    whole = value(mmkd.KL(tau), rows(*one[:2]))
    torch.testing.assert_close(parts['target'] + share * parts['rest'], whole)


@given(seed=SEEDS, n=SIZES, c=SIZES, tau=st.sampled_from([0.5, 1.0, 4.0]))
def test_nkd_is_the_target_and_the_rest_among_themselves(seed, n, c, tau):
    s, t = rand(seed, n, c + 1, scale=3), rand(seed + 1, n, c + 1, scale=3)
    target = torch.arange(n) % (c + 1)
    first = rest = 0
    for own, theirs, label in zip(s, t, target, strict=True):
        first -= theirs.softmax(0)[label] * own.log_softmax(0)[label] / n
        others = torch.arange(c + 1) != label
        own, theirs = own[others] / tau, theirs[others] / tau
        rest -= 0.7 * tau**2 * (theirs.softmax(0) * own.log_softmax(0)).sum() / n
    parts = mmkd.NKD(0.7, tau).compare(rows(s, t, target))
    torch.testing.assert_close([parts['target'], parts['rest']], [first, rest])


@given(seed=SEEDS, n=st.integers(3, 6), c=st.integers(2, 5), tau=st.sampled_from([0.5, 1.0, 2.0]))
def test_dist_is_one_minus_the_correlations(seed, n, c, tau):
    s, t = rand(seed, n, c + 1), rand(seed + 1, n, c + 1)
    p, q = (s / tau).softmax(1), (t / tau).softmax(1)

    def apart(a, b):
        r = [torch.corrcoef(torch.stack(pair))[0, 1] for pair in zip(a, b, strict=True)]
        return 1 - torch.stack(r).mean()

    parts = mmkd.DIST(2.0, 3.0, tau).compare(rows(s, t))
    for part, expected in (('inter', 2 * apart(p, q)), ('intra', 3 * apart(p.T, q.T))):
        torch.testing.assert_close(parts[part], tau**2 * expected, rtol=1e-4, atol=4e-4)


def test_a_sigmoid_heads_divergence_is_that_of_each_class():
    s, t = rand(0, 5, 3), rand(1, 5, 3)
    p, q = s.sigmoid(), t.sigmoid()
    each = q * (q / p).log() + (1 - q) * ((1 - q) / (1 - p)).log()
    given = Rows(s, t, None, torch.ones(5), 5, sigmoid=True)
    torch.testing.assert_close(mmkd.KL().compare(given), each.sum() / 5)


def test_rows_are_weighted_and_divided_as_in_the_heads_own_loss():
    s, t, target = rand(0, 4, 3), rand(1, 4, 3), torch.tensor([0, 1, 2, 2])
    weight = torch.tensor([1.0, 0.0, 1.0, 1.0])
    kept = weight > 0
    for term in (mmkd.KL(2.0), mmkd.DKD(), mmkd.NKD(), mmkd.DIST(), mmkd.DeFeatHead()):
        some = value(term, Rows(s, t, target, weight, 3, background=True))
        left = value(term, rows(s[kept], t[kept], target[kept]))
        torch.testing.assert_close(some, left)
    deltas = Rows(s[:, :4], t[:, :4], None, torch.ones(4, 3), 8)
    torch.testing.assert_close(
        mmkd.PlainRegression(beta=0).compare(deltas), (s - t).abs().sum() / 8
    )


# ------------------------------------------------------------------------------ properties

FEATURES = {
    'CWD': lambda: mmkd.CWD(),
    'PKD': lambda: mmkd.PKD(),
    'AT': lambda: mmkd.AT(),
    'MGD': lambda: mmkd.MGD(),
    'FGD': lambda: mmkd.FGD(),
    'FBKD': lambda: mmkd.FBKD(reduction=2, pool=2),
    'FBKD as published': lambda: mmkd.FBKD(reduction=2, pool=2, as_published=True),
    'ReviewKD': lambda: mmkd.ReviewKD(),
    'ReviewKD without fusion': lambda: mmkd.ReviewKD(fusion=False),
    'DeFeat': lambda: mmkd.DeFeat(),
    'FGFI': lambda: mmkd.FGFI(),
    'FRS': lambda: mmkd.FRS(),
}
LOGITS = {
    'KL': lambda: mmkd.KL(2.0),
    'KL standardised': lambda: mmkd.KL(2.0, standardise=True),
    'DKD': lambda: mmkd.DKD(),
    'DIST': lambda: mmkd.DIST(),
    'NKD': lambda: mmkd.NKD(),
    'DeFeatHead': lambda: mmkd.DeFeatHead(),
    'DeFeatHead as published': lambda: mmkd.DeFeatHead(as_published=True),
}
NEVER_ZERO = ('NKD', 'MGD', 'FGD', 'FBKD', 'FBKD as published', 'ReviewKD', 'FRS')
"""A cross entropy, or layers of one's own between the two networks."""


def context(name, maps, boxes, scores=None):
    """What a method is given besides the features, for boxes in cells."""
    if name == 'DeFeat':
        return torch.stack([covered(each, maps.shape[2:], False) for each in boxes])
    if name == 'FGFI':
        y, x = torch.meshgrid(*(torch.arange(s) for s in maps.shape[2:]), indexing='ij')
        corner = torch.stack([x, y], -1)[:, :, None].to(maps)
        anchors = torch.cat([corner - 1, corner + 2], -1)
        return [anchor_overlaps(each.to(maps), anchors) for each in boxes]
    if name == 'FRS':
        own, theirs = scores or (maps[:, :1] * 0.5, maps[:, :1].detach() * 0.7)
        return theirs, own
    return boxes


def loss_of_maps(name, student, teacher, boxes, scores=None, term=None):
    if term is None:
        torch.manual_seed(3)
        term = FEATURES[name]()
        if name not in ('FGFI', 'FRS'):
            bound(term, student.size(1))
    layers = dict(getattr(term, 'layers', {})).get('neck_0')
    if layers is not None:
        layers.to(student.dtype if student.dtype == torch.float64 else torch.float32)
    given = context(name, student, boxes, scores)
    torch.manual_seed(0)
    return sum(term.weighed(term([student], [teacher], [layers], [given])).values())


def some_boxes(n):
    return [torch.tensor([[0.4, 0.2, 2.6, 3.0], [1.0, 1.0, 1.2, 3.9]])] * n


@pytest.mark.parametrize('name', [n for n in FEATURES if n != 'MGD'])
@given(seed=SEEDS)
def test_the_order_of_images_does_not_matter(name, seed):
    s, t = rand(seed, 3, 4, 5, 6), rand(seed + 1, 3, 4, 5, 6)
    boxes = [some_boxes(1)[0], torch.zeros(0, 4), some_boxes(1)[0][:1]]
    one = loss_of_maps(name, s, t, boxes)
    order = [2, 0, 1]
    other = loss_of_maps(name, s[order], t[order], [boxes[i] for i in order])
    torch.testing.assert_close(one, other)


@pytest.mark.parametrize('name', LOGITS)
@given(seed=SEEDS, n=st.integers(2, 6))
def test_the_order_of_rows_does_not_matter(name, seed, n):
    s, t, target = rand(seed, n, 4), rand(seed + 1, n, 4), torch.arange(n) % 4
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    one, other = (value(LOGITS[name](), rows(s[i], t[i], target[i])) for i in (slice(None), order))
    torch.testing.assert_close(one, other)


@given(seed=SEEDS, scale=st.sampled_from([0.1, 3.0, 50.0]), shift=st.sampled_from([-5.0, 2.0]))
def test_what_a_scale_or_a_shift_does_not_change(seed, scale, shift):
    s, t = rand(seed, 2, 3, 4, 5), rand(seed + 1, 2, 3, 4, 5)
    of_channels = scale * rand(seed + 2, 1, 3, 1, 1).abs() + 0.1
    for term, other in (
        (mmkd.PKD(), s * of_channels + shift),
        (mmkd.AT(), s * scale),
        (mmkd.CWD(), s + of_channels),
    ):
        one = value(term, s, t, None, None)
        torch.testing.assert_close(one, value(term, other, t, None, None), rtol=1e-3, atol=1e-4)
    z, y = rand(seed, 4, 5), rand(seed + 1, 4, 5)
    target = torch.tensor([0, 4, 2, 1])
    for name, changed in (
        ('KL standardised', z * scale + shift), ('DKD', z + shift), ('DIST', z + shift),
        ('NKD', z + shift),
    ):  # fmt: skip
        one, other = (value(LOGITS[name](), rows(x, y, target)) for x in (z, changed))
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('name', [n for n in FEATURES if n not in NEVER_ZERO])
def test_maps_that_agree_cost_nothing_and_others_do(name):
    s, t = rand(0, 2, 4, 5, 6), rand(1, 2, 4, 5, 6)
    assert loss_of_maps(name, s, s, some_boxes(2)).item() == 0
    assert loss_of_maps(name, s, t, some_boxes(2)).item() > 0


@pytest.mark.parametrize('name', [n for n in LOGITS if n not in NEVER_ZERO])
def test_rows_that_agree_cost_nothing_and_others_do(name):
    s, t, target = rand(0, 5, 4), rand(1, 5, 4), torch.arange(5) % 4
    assert value(LOGITS[name](), rows(s, s, target)).item() == pytest.approx(0, abs=1e-6)
    assert value(LOGITS[name](), rows(s, t, target)) > 1e-3


# ------------------------------------------------------------------------------ edges

EDGES = {
    'ordinary': lambda s: (s, s.flip(0)),
    'equal': lambda s: (s, s.clone()),
    'one image, one cell': lambda s: (s[:1, :, :1, :1], s[1:, :, 1:2, :1]),
    'one row of cells': lambda s: (s[:, :, :1], s.flip(0)[:, :, :1]),
    'a constant channel': lambda s: (torch.cat([s[:, :1] * 0 + 2, s[:, 1:]], 1), s.flip(0)),
    'a constant channel of the teacher': lambda s: (
        s, torch.cat([s[:, :1] * 0 + 2, s[:, 1:]], 1).flip(0)
    ),
    'zeros': lambda s: (s * 0, s.flip(0)),
    'zeros of the teacher': lambda s: (s, s * 0),
    'large': lambda s: (s * 1e3, s.flip(0) * 1e3),
    'no image': lambda s: (s[:0], s[:0]),
}  # fmt: skip
PRECISIONS = {
    'float32': (torch.float32, None),
    'autocast to bfloat16': (torch.float32, torch.bfloat16),
    'autocast to float16': (torch.float32, torch.float16),
    'bfloat16 maps under autocast': (torch.bfloat16, torch.bfloat16),
}


def assert_finite(compute, leaf, dtype):
    with torch.autocast('cpu', dtype=dtype or torch.bfloat16, enabled=dtype is not None):
        loss = compute()
    assert loss.isfinite(), loss
    loss.backward()
    assert leaf.grad is None or leaf.grad.isfinite().all()


@pytest.mark.parametrize('precision', PRECISIONS)
@pytest.mark.parametrize('edge', EDGES)
@pytest.mark.parametrize('name', FEATURES)
def test_value_and_gradient_of_maps_are_finite_at_the_edges(name, edge, precision):
    dtype, autocast = PRECISIONS[precision]
    s, t = (x.detach().to(dtype) for x in EDGES[edge](rand(0, 2, 4, 6, 5, dtype=torch.float32)))
    if edge == 'no image' and name in ('FGD', 'DeFeat', 'FGFI', 'FRS'):
        return  # maps over the image: a batch has one
    s.requires_grad_()
    boxes = [torch.zeros(0, 4)] * len(s) if edge == 'ordinary' else some_boxes(len(s))
    assert_finite(lambda: loss_of_maps(name, s, t, boxes), s, autocast)


@pytest.mark.parametrize('precision', [p for p in PRECISIONS if 'maps' not in p])
@pytest.mark.parametrize('logits', [(18, -18), (-30, 3), (-110, 3), (1e4, -1e4), (0, -120)])
def test_frs_is_finite_and_has_a_gradient_for_any_logits(logits, precision):
    """Silent everywhere is 0; elsewhere the gradient is that of sigmoid(student) - teacher."""
    own, theirs = (torch.full((2, 3, 4, 5), float(x)) for x in logits)
    own.requires_grad_()
    maps = rand(0, 2, 4, 4, 5, dtype=torch.float32)
    term = mmkd.FRS(feature_weight=1.0, rpn_weight=1.0)

    def compute():
        parts = term.compare(maps, maps * 2, None, (theirs, own))
        return sum(parts.values())

    assert_finite(compute, own, PRECISIONS[precision][1])
    expected = own.detach().sigmoid() - theirs.sigmoid()
    if logits[1] == -1e4:
        assert not own.grad.any()
    elif logits[1] > -100:
        torch.testing.assert_close(own.grad, expected / 40)


ROWS = {
    'no row': lambda z: (z[:0], z[:0]),
    'one row': lambda z: (z[:1], z[1:2]),
    'equal': lambda z: (z, z.clone()),
    'huge': lambda z: (z.sign() * 1e4, z.flip(0).sign() * 1e4),
    'a gap of 120': lambda z: (torch.eye(len(z), z.size(1)) * 120, z),
    'a gap of 120 in the teacher': lambda z: (z, torch.eye(len(z), z.size(1)) * 120),
    'a row of equal logits': lambda z: (torch.cat([z[:1] * 0, z[1:]]), z.flip(0)),
    'a row of equal logits in the teacher': lambda z: (z, torch.cat([z[:1] * 0, z[1:]])),
    'all rows alike': lambda z: (z[:1].expand_as(z).clone(), z),
}


@pytest.mark.parametrize('precision', ['float32', 'autocast to bfloat16', 'half precision rows'])
@pytest.mark.parametrize('labels', ['all', 'background'])
@pytest.mark.parametrize('edge', ROWS)
@pytest.mark.parametrize('name', LOGITS)
def test_value_and_gradient_of_rows_are_finite_at_the_edges(name, edge, labels, precision):
    dtype = torch.float16 if 'rows' in precision else torch.float32
    s, t = (x.detach().to(dtype) for x in ROWS[edge](rand(0, 6, 5, dtype=torch.float32)))
    s.requires_grad_()
    target = torch.arange(len(s)) % 5 if labels == 'all' else torch.full((len(s),), 4)
    autocast = None if precision == 'float32' else torch.bfloat16
    assert_finite(lambda: value(LOGITS[name](), rows(s, t, target)), s, autocast)
    if edge == 'no row':
        assert value(LOGITS[name](), rows(s, t, target)).item() == 0


@pytest.mark.parametrize('kind', ['softmax', 'sigmoid', 'seesaw'])
@pytest.mark.parametrize('scale, n', [(1.0, 5), (1e4, 5), (1.0, 0)])
def test_crosskd_is_finite_for_any_kind_of_head(kind, scale, n):
    columns = {'softmax': 4, 'sigmoid': 3, 'seesaw': 5}[kind]
    logits, theirs = (rand(i, n, columns, scale=scale, dtype=torch.float32) for i in (0, 1))
    deltas = rand(2, n, 12, dtype=torch.float32)
    logits.requires_grad_()
    term = mmkd.CrossKD()
    parts = term.compare_rois((logits, deltas), (theirs, deltas + 1), kind)
    assert_finite(lambda: sum(parts.values()), logits, None)
    assert float(parts['reg']) == pytest.approx(1.0 if n else 0.0, abs=1e-5)
    assert bool(logits.grad.any()) == bool(n)


@pytest.mark.parametrize('level', [0.0, 0.1, -0.1, 1e4, -1e4])
def test_what_is_constant_up_to_rounding_has_no_gradient(level):
    """Divided by its deviation it would have a million times the usual one."""
    s = torch.cat([torch.full((1, 5), level), rand(0, 5, 5, dtype=torch.float32)]).requires_grad_()
    t = rand(1, 6, 5, dtype=torch.float32)
    for name in ('KL standardised', 'DIST'):
        parts = LOGITS[name]().compare(rows(s, t))
        part = parts['inter'] if name == 'DIST' else parts
        (gradient,) = torch.autograd.grad(part, s)
        assert not gradient[0].any() and gradient[1:].any(), name
    maps = s.detach().view(1, 6, 5, 1).requires_grad_()
    value(mmkd.PKD(), maps, t.view(1, 6, 5, 1), None, None).backward()
    assert not maps.grad[:, 0].any() and maps.grad[:, 1:].any()


@pytest.mark.parametrize('name', [*FEATURES, *LOGITS, 'PlainRegression'])
def test_nothing_reaches_what_the_teacher_says(name):
    if name in FEATURES:
        s, t = (rand(seed, 2, 4, 6, 6, dtype=torch.float32).requires_grad_() for seed in (0, 1))
        scores = (s[:, :1] * 0.5, t[:, :1] * 0.7) if name == 'FRS' else None
        loss = loss_of_maps(name, s, t, some_boxes(2), scores)
    else:
        s, t = (rand(seed, 6, 4, dtype=torch.float32).requires_grad_() for seed in (0, 1))
        term = LOGITS[name]() if name in LOGITS else mmkd.PlainRegression()
        given = rows(s, t, torch.arange(6) % 4)
        loss = value(term, given if name in LOGITS else Rows(s, t, None, torch.ones(6, 4), 6))
    loss.backward()
    assert s.grad.any() and t.grad is None


def test_a_loss_that_says_nothing_of_a_sigmoid_is_a_softmax():
    head = SimpleNamespace(loss_cls=object(), num_classes=3)
    student = SimpleNamespace(roi_head=SimpleNamespace(bbox_head=head))
    for term in (mmkd.DKD(), mmkd.NKD(), mmkd.DIST()):
        term.check_networks(student, student)
        head.loss_cls = SimpleNamespace(use_sigmoid=True)
        with pytest.raises(ValueError, match='by a sigmoid of its own'):
            term.check_networks(student, student)
        head.loss_cls = object()


def test_batch_norm_of_one_value_is_its_bias():
    layer = BatchNorm(3)
    torch.nn.init.normal_(layer.bias)
    maps = torch.randn(1, 3, 1, 1, requires_grad=True)
    assert torch.equal(layer(maps).flatten(), layer.bias)
    layer(maps).sum().backward()
    assert layer.weight.grad is not None and not maps.grad.any()
    two = torch.randn(2, 3, 1, 1)
    own = torch.nn.BatchNorm2d(3)
    own.load_state_dict(layer.state_dict())
    assert torch.equal(layer(two), own(two))


# ------------------------------------------------------------------------------ as published


def test_own_layers_begin_as_in_public_code():
    """The spread of their first weights; blocks that add to a map begin as the identity."""
    torch.manual_seed(0)
    fusion = Fusion(64, 64, 64, False)
    for layer, inputs in ((fusion.inner[0], 64), (fusion.outer[0], 9 * 64)):
        assert float(layer.weight.abs().max()) == pytest.approx((3 / inputs) ** 0.5, rel=0.01)
    context = GlobalContext(4096)
    assert float(context.attention.weight.std()) == pytest.approx((2 / 4096) ** 0.5, rel=0.1)
    maps = torch.randn(1, 64, 5, 5)
    for block in (GlobalContext(64), NonLocal(64, 2, 2, True).train()):
        torch.testing.assert_close(block(maps), maps, rtol=0, atol=0)


def test_an_image_without_objects_is_all_background():
    some, none = torch.tensor([[0.0, 0.0, 1.0, 1.0]]), torch.zeros(0, 4)
    objects, background = focal_masks([some, none], torch.zeros(2, 4, 5))
    assert objects[0].any() and not objects[1].any()
    torch.testing.assert_close(background[1], torch.full((4, 5), 1 / 20))


def test_defeats_levels_begin_at_112_and_224_pixels():
    sides = torch.tensor([0.0, 110.5, 111.0, 222.5, 223.0, 5000.0])
    boxes = torch.stack([sides, sides, 2 * sides, 2 * sides], 1)
    assert levels_of(boxes, 4).tolist() == [0, 0, 1, 1, 2, 3]


def test_fgds_boxes_lie_beside_the_objects_of_a_padded_image_in_public_code():
    box = torch.tensor([[8.0, 8.0, 24.0, 24.0]])
    size = (8, 8)  # a map of stride 8 over 64 pixels, of which the image has 32
    ours, theirs = (
        focal_masks([cells], torch.zeros(1, *size))[0][0].nonzero()
        for cells in (box / 8, published_cells(box, (32, 32), size))
    )
    assert ours.amin(0).tolist() == [1, 1] and ours.amax(0).tolist() == [3, 3]
    assert theirs.amin(0).tolist() == [2, 2] and theirs.amax(0).tolist() == [6, 6]
    alike = published_cells(box, (64, 64), size)
    assert torch.equal(alike, box / 8)


def test_defeats_thin_boxes_are_one_cell_in_public_code():
    boxes = torch.tensor([[2.1, 1.0, 2.9, 5.0]])
    ours, theirs = (covered(boxes, (6, 8), published) for published in (False, True))
    assert ours.nonzero().tolist() == [[y, 2] for y in range(1, 5)]
    assert theirs.nonzero().tolist() == [[1, 2]]
    border = torch.tensor([[8.0, 2.0, 8.0, 4.0], [3.0, 6.0, 5.0, 6.0]])
    assert covered(border, (6, 8), False).nonzero().tolist() == [[2, 7], [3, 7], [5, 3], [5, 4]]


def test_defeats_head_takes_the_largest_label_for_the_background_in_public_code():
    s, t, target = rand(0, 4, 4), rand(1, 4, 4), torch.tensor([0, 1, 2, 2])
    ours, theirs = (mmkd.DeFeatHead(as_published=p).compare(rows(s, t, target)) for p in (0, 1))
    assert ours['background'] == 0 and theirs['background'] > 0
    target[-1] = 3
    ours, theirs = (mmkd.DeFeatHead(as_published=p).compare(rows(s, t, target)) for p in (0, 1))
    assert ours == theirs


def test_fbkd_pools_once_and_uses_the_attention_over_channels():
    s, t = rand(0, 2, 4, 16, 16, dtype=torch.float32), rand(1, 2, 4, 16, 16, dtype=torch.float32)
    terms = [bound(mmkd.FBKD(reduction=2, pool=4, as_published=p)) for p in (False, True)]
    terms[1].load_state_dict(terms[0].state_dict())
    for term in terms:
        torch.nn.init.ones_(term.layers['neck_0']['student'].norm.weight)
    ours, theirs = (term.compare(s, t, term.layers['neck_0'], None) for term in terms)
    assert {n for n in ours if not torch.equal(ours[n], theirs[n])} == {'mask', 'nonlocal'}
    keys = [term.layers['neck_0']['student'].pooled(s).shape[2:] for term in terms]
    assert keys == [(4, 4), (2, 2)]


def test_fgfis_boxes_are_a_pixel_larger_in_public_code():
    box, anchor = torch.tensor([[0.0, 0.0, 9.0, 9.0]]), torch.tensor([[[[0.0, 0.0, 4.0, 9.0]]]])
    assert float(anchor_overlaps(box, anchor)) == pytest.approx(4 / 9)
    assert float(anchor_overlaps(box, anchor, 1)) == pytest.approx(5 / 10)


# ------------------------------------------------------------------------------ in a step


@pytest.fixture(autouse=True)
def _late():
    """Schedules are over: some recipes begin late."""
    MessageHub.get_current_instance().update_info('iter', 1000)
    yield
    MessageHub.get_current_instance().pop_info('iter')


def distil(student=None, teacher=None, distillation=None, seed=0):
    student = student or pairs.fpn()
    return pairs.distil(student, teacher or student, distillation, seed)


@pytest.mark.parametrize('name', RECIPES)
def test_each_recipe_reaches_every_parameter(name):
    """Between networks of other widths: no parameter is without a gradient, but those of CrossKD
    at P6, which no RoI head reads."""
    model = distil(pairs.fpn(), pairs.fpn(8, 16), recipe(name))
    values = pairs.losses(model)
    pairs.total(model, values).backward()
    found = pairs.gradients(model)
    assert all(gradient.isfinite().all() for gradient in found.values())
    without = {n for n, p in model.named_parameters() if p.requires_grad} - set(found)
    assert {n.rpartition('.')[0] for n in without} == (
        {'kd_terms.crosskd.adapters.neck_4'} if name == 'crosskd_roi' else set()
    )
    assert not model.unproven and not model.dwarfing
    assert all(values[k] > 0 for k in values if k.startswith('loss_kd'))


def ragged(one=(64, 64), two=(96, 48)):
    """A batch of two images of different sizes, and each alone."""
    alone = [pairs.batch((2,), size, seed) for seed, size in enumerate((one, two))]
    both = copy.deepcopy(alone[0])
    for key, each in copy.deepcopy(alone[1]).items():
        both[key] += each
    return both, alone


def masks_seen(model, name, data):
    """Where the term looked: a mask of each image and pair, (H, W)."""
    term, seen = model.kd_terms[name], []
    forward = term.forward

    def spy(student, teacher, layers, contexts):
        for maps, mask in zip(student, contexts, strict=True):
            if name == 'fgd':
                mask = focal_masks(mask, maps[:, 0])[0]
            elif name == 'fgfi':
                mask = torch.stack([each.amax(0) for each in mask])
            seen.append(mask.detach())
        return forward(student, teacher, layers, contexts)

    term.forward = spy
    pairs.losses(model, data)
    term.forward = forward
    return seen


@pytest.mark.parametrize('name', ['fgd', 'defeat', 'fgfi'])
def test_masks_lie_on_the_objects_of_every_image_of_a_ragged_batch(name):
    model = distil(distillation=recipe(name))
    both, alone = ragged()
    together = masks_seen(model, name, both)
    for index, data in enumerate(alone):
        height, width = data['inputs'][0].shape[1:]
        for level, own in enumerate(masks_seen(model, name, data)):
            cells = [max(1, -(-side // (4 << level))) for side in (height, width)]
            seen = together[level][index]
            assert own[0].any() or level > 0
            inside = seen[: cells[0], : cells[1]]
            torch.testing.assert_close(inside, own[0][: cells[0], : cells[1]])
    if name == 'fgd':
        model.kd_terms[name].as_published = True
        published = masks_seen(model, name, both)
        assert torch.equal(published[0][0], together[0][0]) is False


def test_public_codes_boxes_are_ours_where_the_images_have_one_size():
    model = distil(distillation=recipe('fgd'))
    ours = masks_seen(model, 'fgd', pairs.batch())
    model.kd_terms['fgd'].as_published = True
    for one, other in zip(ours, masks_seen(model, 'fgd', pairs.batch()), strict=True):
        torch.testing.assert_close(one, other)


def test_frs_weighs_each_level_by_the_teachers_scores_there():
    model = distil(distillation=recipe('frs'))
    pairs.teach_itself(model)
    seen = {}
    term = model.kd_terms['frs']
    compare = term.compare

    def spy(student, teacher, layers, scores):
        seen[student.shape[2:]] = scores
        return compare(student, teacher, layers, scores)

    term.compare = spy
    pairs.losses(model)
    assert len(seen) == 5
    for size, (theirs, own) in seen.items():
        assert theirs.shape == own.shape == (2, 3, *size)
        assert torch.equal(theirs, own.detach()) and own.requires_grad


def test_crosskd_of_a_student_that_is_its_teacher_is_nothing():
    for site in ('rcnn', 'rpn'):
        model = distil(distillation=dict(cross=dict(type='CrossKD', site=site)))
        pairs.teach_itself(model)
        values = {k: v for k, v in pairs.losses(model).items() if 'kd' in k}
        assert set(values) == {'loss_kd_cross_cls', 'loss_kd_cross_reg'}
        assert all(v.item() == pytest.approx(0, abs=1e-6) for v in values.values())


def test_crosskd_of_an_rpn_takes_the_distance_of_deltas_without_their_sign():
    student = torch.tensor([[1.0, -2.0, 3.0, -4.0], [0.5, 0.0, -0.5, 1.0]])
    found = Rows(student, torch.zeros(2, 4), None, torch.ones(2, 4), 8)
    site = SimpleNamespace(rows=lambda kind, step, answers: [found] if kind == 'bbox' else [])
    step = SimpleNamespace(
        teacher=SimpleNamespace(score_anchors=lambda features: None),
        student=SimpleNamespace(sites={'rpn': site}),
    )
    parts = mmkd.CrossKD(site='rpn', reg_weight=2.0).of_rpn(step, [])
    assert parts['reg'].item() == pytest.approx(2 * 12 / 8)


def test_crosskd_needs_the_deltas_of_an_rpn_where_it_compares_them():
    for weight, kinds in ((1.0, {'cls', 'bbox'}), (0.0, {'cls'})):
        needs = mmkd.CrossKD(site='rpn', reg_weight=weight).needs()
        assert set(needs.rows) == {('rpn', kind) for kind in kinds}


def test_one_object_is_not_shared_with_another():
    """The mean over the rows of objects is over one row where there is one."""
    s, t = rand(0, 3, 4), rand(1, 3, 4)
    found = mmkd.DeFeatHead().compare(rows(s, t, torch.tensor([0, 3, 3])))
    logs = [x.log_softmax(1) for x in (s, t)]
    each = F.kl_div(*logs, reduction='none', log_target=True).sum(1)
    torch.testing.assert_close(found['objects'], 2 * each[0])
    torch.testing.assert_close(found['background'], 2 * each[1:].mean())


@pytest.mark.parametrize('width', [0, -1, 1.5, '8'])
def test_reviewkds_width_is_a_whole_number(width):
    with pytest.raises(ValueError, match='mid_channels=.* must be a whole number'):
        mmkd.ReviewKD(mid_channels=width)


def test_levels_of_anchors_are_found_by_the_students_stride():
    def pair(own, theirs):
        sides = [(1, 4, SIZE // stride, SIZE // stride) for stride in (own, theirs)]
        return LayerPair('neck_0', Layer('neck', 0), Layer('neck', 0), (sides[0], sides[1]))

    for own, theirs in ((4, 16), (4, 4)):
        term = mmkd.FGFI()
        term.strides = [4.0, 8.0]
        term.bind([pair(own, theirs)])
    term.strides = [4.0, 8.0]
    with pytest.raises(ValueError, match='has stride 16, and the RPN has no level of it'):
        term.bind([pair(16, 4)])


def test_crosskds_gradient_goes_around_the_students_own_head():
    model = distil(distillation=dict(cross=dict(type='CrossKD')))
    values = pairs.losses(model)
    sum(v for k, v in values.items() if 'kd' in k).backward()
    reached = {n.split('.')[0] for n, g in pairs.gradients(model).items() if g.any()}
    assert reached == {'backbone', 'neck'}
    assert not any(p.requires_grad for p in model.teacher.network.parameters())


def test_five_methods_on_the_neck_run_and_resample_the_teacher_once(monkeypatch):
    five = dict(
        cwd=dict(type='CWD'), pkd=dict(type='PKD'), at=dict(type='AT'), mgd=dict(type='MGD'),
        fgd=dict(type='FGD'), resolution=dict(student=(64, 64), teacher=(128, 128)),
    )  # fmt: skip
    for options in five.values():
        if 'type' in options:
            options['pairs'] = ['neck']
    model = distil(distillation=five)
    data = at_two_scales(pairs.batch())
    runs, samples = [], []
    extract, sample = model.teacher.network.extract_feat, F.grid_sample
    monkeypatch.setattr(
        model.teacher.network, 'extract_feat', lambda x: runs.append(1) or extract(x)
    )
    monkeypatch.setattr(F, 'grid_sample', lambda *a, **k: samples.append(1) or sample(*a, **k))
    values = pairs.losses(model, data)
    assert {k.split('_')[2] for k in values if 'kd' in k} == {'cwd', 'pkd', 'at', 'mgd', 'fgd'}
    assert len(runs) == 1 and len(samples) == 5


def at_two_scales(data):
    for image, sample in zip(data['inputs'], data['data_samples'], strict=True):
        pairs.second_view(sample, image.repeat_interleave(2, 1).repeat_interleave(2, 2))
    return data


# ------------------------------------------------------------------------------ combinations

HEADS = {
    'fpn': pairs.fpn, 'wide': lambda: pairs.fpn(8, 16), 'cascade': pairs.cascade,
    'giou': pairs.giou, 'ohem': pairs.ohem, 'c4': pairs.c4,
}  # fmt: skip
TERMS = {
    **{n: dict(type=n) for n in ('CWD', 'PKD', 'AT', 'MGD', 'FGD', 'ReviewKD', 'FGFI', 'DeFeat')},
    'FBKD': dict(type='FBKD', reduction=2, pool=2),
    'FRS': dict(type='FRS', rpn_weight=0),
    **{n: dict(type=n) for n in ('KL', 'DKD', 'DIST', 'NKD', 'DeFeatHead', 'PlainRegression')},
    'KL_of_RPN': dict(type='KL', site='rpn'),
    'PlainRegression_of_RPN': dict(type='PlainRegression', site='rpn'),
    'CrossKD': dict(type='CrossKD'),
    'CrossKD_of_RPN': dict(type='CrossKD', site='rpn'),
    'rpn_cls': pairs.recipe()['rpn_cls'],
    'hint': pairs.recipe()['hint'],
}
LAYERED = ('CWD', 'PKD', 'AT', 'MGD', 'FGD', 'ReviewKD', 'FGFI', 'DeFeat', 'FBKD', 'FRS', 'hint')


def combination(seed):
    """The names of student and teacher, and the terms between them."""
    draw = random.Random(seed)
    student, teacher = draw.choice(list(HEADS)), draw.choice(list(HEADS))
    names = draw.sample(list(TERMS), draw.randint(1, 5))
    resolution = draw.random() < 0.3
    refused = set()
    if resolution:
        refused |= {'ReviewKD'}
    if 'c4' in (student, teacher):
        # One level of stride 16 is no pyramid.
        refused |= {'CrossKD', 'CrossKD_of_RPN', 'FRS', 'PlainRegression_of_RPN', 'KL_of_RPN'}
        refused |= {'rpn_cls'}
    terms = {n: copy.deepcopy(TERMS[n]) for n in names if n not in refused} or {
        'PKD': dict(type='PKD')
    }
    c4 = dict(student='backbone[0]' if student == 'c4' else 'neck[2]',
              teacher='backbone[0]' if teacher == 'c4' else 'neck[2]')  # fmt: skip
    for name, options in terms.items():
        if name in LAYERED and 'c4' in (student, teacher):
            options['pairs'] = [c4]
    if resolution:
        terms['resolution'] = dict(student=(64, 64), teacher=(128, 128))
    return student, teacher, terms


@pytest.mark.parametrize(
    'seed', [pytest.param(i, marks=pytest.mark.slow) if i % 3 else i for i in range(30)]
)
def test_a_combination_takes_two_steps_and_resumes_to_the_bit(seed):
    student, teacher, terms = combination(seed)

    def fresh():
        return distil(HEADS[student](), HEADS[teacher](), copy.deepcopy(terms), seed)

    def step(model, optimizer):
        data = pairs.batch((2, 1), seed=seed)
        data = at_two_scales(data) if 'resolution' in terms else data
        values = model(**model.data_preprocessor(copy.deepcopy(data), True), mode='loss')
        optimizer.zero_grad()
        pairs.total(model, values).backward()
        assert all(g.isfinite().all() for g in pairs.gradients(model).values())
        optimizer.step()
        return {k: v for k, v in values.items() if 'kd' in k}

    model = fresh()
    optimizer = torch.optim.SGD(model.parameters(), 1e-4, momentum=0.9)
    torch.manual_seed(seed)
    step(model, optimizer)
    kept = copy.deepcopy((model.state_dict(), optimizer.state_dict(), random_state(False)))
    whole = step(model, optimizer)
    assert {k.split('.')[0] for k in kept[0]} >= {'backbone', 'rpn_head', 'roi_head'}
    again = fresh()
    again.load_state_dict(kept[0])
    other = torch.optim.SGD(again.parameters(), 1e-4, momentum=0.9)
    other.load_state_dict(kept[1])
    set_random_state(kept[2])
    resumed = step(again, other)
    assert whole.keys() == resumed.keys() and all(whole[k].equal(resumed[k]) for k in whole)
    state = again.state_dict()
    assert all(value.equal(state[key]) for key, value in model.state_dict().items())


def test_mgds_masks_are_drawn_from_the_generator_that_a_checkpoint_holds():
    maps = torch.zeros(2, 3, 4, 5)
    for term, shape in (
        (mmkd.MGD(), (2, 1, 4, 5)),
        (mmkd.MGD(mask_on_channel=True), (2, 3, 1, 1)),
    ):
        state = random_state(False)
        first, second = term.draw(maps), term.draw(maps)
        assert first.shape == shape and not first.equal(second)
        set_random_state(state)
        assert first.equal(term.draw(maps))


def test_the_combinations_are_varied():
    seen = [combination(seed) for seed in range(30)]
    assert {s for s, _, _ in seen} == {t for _, t, _ in seen} == set(HEADS)
    assert {name for _, _, terms in seen for name in terms} == {*TERMS, 'resolution'}


# ------------------------------------------------------------------------------ refusals

SIGMOID = dict(type='CrossEntropyLoss', use_sigmoid=True, loss_weight=1.0)
TWO_SCALES = dict(student=(64, 64), teacher=(128, 128))


def without_rpn():
    model = pairs.fpn()
    model.rpn_head = dict(type='EmbeddingRPNHead', num_proposals=8, proposal_feature_channel=8)
    return model


def sigmoid():
    model = pairs.fpn()
    model.roi_head.bbox_head.loss_cls = SIGMOID
    return model


ANCHORS = "needs an RPN with anchors, and the student's is EmbeddingRPNHead"
OF_C4 = [dict(student='neck[2]', teacher='backbone[0]')]
OF_FPN = [dict(student='backbone[0]', teacher='neck[2]')]
IN_ROIS = ['backbone[0]', 'roi_head.bbox_roi_extractor']
REFUSED = [
    ('fpn', 'fpn', dict(type='DKD', site='rpn'), "only object or not: take site='rcnn'"),
    ('fpn', 'fpn', dict(type='DIST', site='rpn'), 'DIST compares how probability is shared'),
    ('fpn', 'fpn', dict(type='NKD', site='rpn'), 'NKD compares how probability is shared'),
    ('fpn', 'fpn', dict(type='KL', site='rpn', standardise=True), 'or leave standardise out'),
    ('sigmoid', 'fpn', dict(type='DKD'), "by a sigmoid of its own: take type='KL'"),
    ('sigmoid', 'fpn', dict(type='KL', standardise=True), 'by a sigmoid of its own'),
    ('one class', 'one class', dict(type='KL', standardise=True), 'at least 2 classes beside'),
    ('fpn', 'fpn', dict(type='KL', kind='bbox'), "kind='bbox' must be 'cls'"),
    ('fpn', 'fpn', dict(type='PlainRegression', kind='cls'), "kind='cls' must be 'bbox'"),
    ('fpn', 'fpn', dict(type='DeFeatHead', site='rpn'), "site='rpn' must be 'rcnn'"),
    ('without rpn', 'fpn', dict(type='FRS'), ANCHORS),
    ('without rpn', 'fpn', dict(type='FGFI'), ANCHORS),
    ('fpn', 'c4', dict(type='FRS', pairs=OF_C4), 'strides are not the same'),
    ('fpn', 'one stage', dict(type='FRS'), 'this teacher has none'),
    ('fpn', 'other anchors', dict(type='FRS'), 'give rpn_weight=0'),
    ('fpn', 'two scales', dict(type='FRS'), 'give rpn_weight=0'),
    ('fpn', 'two scales', dict(type='ReviewKD'), 'both networks must see one resolution'),
    ('fpn', 'two scales', dict(type='ReviewKD', fusion=False), 'must see one resolution'),
    ('fpn', 'fpn', dict(type='ReviewKD', pairs=['neck[1]', 'neck[0]']), 'name them in that order'),
    ('fpn', 'fpn', dict(type='DeFeat', pairs=['neck[1]', 'neck[0]']), 'name them in that order'),
    ('fpn', 'fpn', dict(type='FGFI', pairs=IN_ROIS), 'compares maps over the image'),
    ('fpn', 'fpn', dict(type='CWD', pairs=['roi_head.bbox_head.shared_fcs.1']), 'compares maps ('),
    (
        'fpn',
        'fpn',
        dict(type='FGFI', pairs=['backbone.conv1']),
        'no level of it (4, 8, 16, 32, 64)',
    ),
    ('fpn', 'fpn', dict(type='FBKD', pairs=['neck']), 'or one for each of the 5 pairs'),
    ('fpn', 'fpn', dict(type='FBKD', reduction=[4, 0, 2, 2]), 'must be a whole number, or one for'),
    ('fpn', 'fpn', dict(type='FBKD', weights=[1, 2]), 'must be four numbers'),
    ('fpn', 'fpn', dict(type='CWD', tau=0), 'CWD: tau=0 must be a finite number at least 0.001'),
    ('fpn', 'fpn', dict(type='MGD', lambda_mgd=1.5), 'between 0 and 1'),
    ('fpn', 'grid', dict(type='CrossKD'), 'give reg_weight=0'),
    ('fpn', 'fpn', dict(type='CrossKD', pairs=['neck[2]']), 'the pairs have [16.0]'),
    ('fpn', 'fpn', dict(type='CrossKD', site='rpn', pairs=['neck[0]']), 'the pairs have [4.0]'),
    ('c4', 'fpn', dict(type='CrossKD', pairs=OF_FPN), 'reads strides [4.0, 8.0, 16.0, 32.0]'),
]


DEFAULTS = {
    'CWD': (10, [1]), 'PKD': (6, []), 'MGD': (5e-7, [0.45]), 'AT': (1000, []),
    'FGD': (1, [0.5, 5e-5, 2.5e-5, 5e-5, 5e-7]), 'ReviewKD': (1, []), 'DeFeat': (1, [4, 16]),
    'FBKD': (1, [(7e-5, 4e-3, 4e-3, 7e-5), (4, 4, 2, 2), (8, 4, 2, 2), 0.5, 0.5]),
    'FGFI': (0.01, [0.5]), 'DeFeatHead': (1, [2, 2, 1]), 'FRS': (1, [0.002, 0.1]), 'KL': (1, [1]),
    'DKD': (1, [1, 0.25, 1]), 'DIST': (1, [1, 1, 1]), 'NKD': (1, [1.5, 1]),
    'PlainRegression': (1, [1]), 'CrossKD': (1, [3, 0.5, 1]),
}  # fmt: skip
"""The weight of each method and its other numbers, as docs/methods.md names their sources."""


def test_defaults_are_the_published_ones():
    found = {}
    for method in METHODS:
        given = [each.default for each in inspect.signature(method).parameters.values()]
        numbers = [value for value in given if type(value) in (float, tuple)]
        found[method.__name__] = (method.loss_weight, numbers)
    assert found == DEFAULTS


TEMPERATURES, SHARES = ('tau', 'temp', 'spatial_T', 'channel_T'), ('psi', 'lambda_mgd')


@pytest.mark.parametrize('method', METHODS)
def test_each_number_has_its_bounds(method):
    """Temperatures are above 0, shares up to 1, weights anything from 0 on."""
    given = inspect.signature(method).parameters.values()
    for each in [each.name for each in given if type(each.default) is float]:
        low, high = 1e-3 if each in TEMPERATURES else 0, 1 if each in SHARES else 1e9
        method(**{each: low}), method(**{each: high})
        for value in (low - 1e-4, float('nan'), *[1.1] * (each in SHARES)):
            with pytest.raises(ValueError, match=rf'{method.__name__}: {each}='):
                method(**{each: value})


@pytest.mark.parametrize('student, teacher, term, words', REFUSED)
def test_what_makes_no_sense_is_refused_in_words(student, teacher, term, words):
    made = {'sigmoid': sigmoid, 'without rpn': without_rpn, **HEADS}
    given = dict(mine=dict(term))
    if teacher == 'two scales':
        given['resolution'] = TWO_SCALES
    own = made.get(student, pairs.fpn)()
    theirs = made.get(teacher, pairs.fpn)()
    if teacher == 'other anchors':
        theirs.rpn_head.anchor_generator.ratios = [0.4, 1.0, 2.5]
    if teacher == 'grid':
        theirs.roi_head.bbox_head.with_reg = False
    if teacher == 'one stage':
        theirs = zoo.tiny('RetinaNet')
    if student == 'one class':
        own, theirs = pairs.fpn(classes=1), pairs.fpn(classes=1)
    with pytest.raises(ValueError) as refused:
        distil(own, theirs, given)
    assert words in str(refused.value)


@pytest.mark.parametrize('student, teacher, pairs_', [
    ('cascade', 'fpn', ['neck']), ('fpn', 'cascade', ['neck']), ('c4', 'c4', ['backbone']),
    ('fpn', 'wide', ['neck[0]', 'neck[1]', 'neck[2]', 'neck[3]']),
])  # fmt: skip
def test_crosskd_wants_the_maps_that_the_teachers_head_reads_and_no_more(student, teacher, pairs_):
    model = distil(
        HEADS[student](), HEADS[teacher](), dict(mine=dict(type='CrossKD', pairs=pairs_))
    )
    values = pairs.losses(model)
    assert values['loss_kd_mine_cls'] > 0 and values['loss_kd_mine_reg'] > 0


@pytest.mark.parametrize('name', ['DKD', 'DIST', 'NKD'])
def test_one_class_and_the_background_are_enough(name):
    model = distil(pairs.fpn(classes=1), pairs.fpn(classes=1), dict(mine=dict(type=name)))
    values = pairs.losses(model, pairs.batch(boxes=(0, 0)))
    assert pairs.total(model, values).isfinite()


@pytest.mark.parametrize('term', [
    dict(type='FRS', rpn_weight=0), dict(type='CWD'), dict(type='KL', site='rpn'),
    dict(type='FGD'), dict(type='FGFI'), dict(type='DeFeat'), dict(type='CrossKD'),
])  # fmt: skip
def test_what_makes_sense_at_two_scales_is_not_refused(term):
    model = distil(distillation=dict(mine=term, resolution=TWO_SCALES))
    values = pairs.losses(model, at_two_scales(pairs.batch()))
    pairs.total(model, values).backward()
    assert all(g.isfinite().all() for g in pairs.gradients(model).values())
