"""What one step offers to the terms, against MMDetection's own modules called by hand."""

import copy
import functools
import itertools
import sys
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pairs
import pytest
import torch
import zoo
from mmdet.structures.bbox import HorizontalBoxes
from pairs import batch, losses, recipe
from torch import nn

import mmkd.models.step
from mmkd.models.taps import Taps
from mmkd.models.terms import DistillTerm, FeatureTerm, Needs

PACKAGE = Path(__file__).resolve().parents[1] / 'mmkd'
TWICE = dict(student=(64, 64), teacher=(128, 128))
FOUND = dict(student=['a', 'b', 'c'], teacher=['c', 'x', 'a', 'y', 'b'])
UNKNOWN = dict(student=['a', 'b', 'c'], teacher=['c', 'x', 'a', 'y', 'z'])
VECTORS = 'roi_head.bbox_head.shared_fcs.1'


class Asks(DistillTerm):
    """A term that needs what a test says, looks at the step, and teaches nothing."""

    def __init__(self, needed):
        super().__init__()
        self.needed, self.look, self.found = needed, None, None

    def needs(self):
        return self.needed

    def bind(self, pairs):
        self.pairs = list(pairs)

    def forward(self, step):
        self.found = self.look(step)


def asking(student, teacher, *needs, **settings):
    """A pair with one term for each of ``needs``, whose weights lie apart."""
    terms = {f'ask{i}': dict(type=Asks, needed=needed) for i, needed in enumerate(needs)}
    return lively(pairs.distil(student, teacher, {**terms, **settings}))


def lively(model, scale=1.0):
    """Draws heads that say something, and statistics of the teacher that are not 0 and 1."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for module in model.teacher.network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.1, generator=generator)
                module.running_var.uniform_(0.5, 1.5, generator=generator)
        for network in (model, model.teacher.network):
            for head in (network.rpn_head, network.roi_head):
                for name, weight in head.named_parameters():
                    last = any(part in name for part in ('cls', 'reg'))
                    weight.normal_(0, scale * (0.1 if last else 0.3), generator=generator)
    model.observers.clear()
    return model


def looking(model, *looks, data=None):
    """One step, in which each term ``ask`` looks at it; what the looks returned."""
    asked = [term for term in model.kd_terms.values() if isinstance(term, Asks)]
    for term, look in zip(asked, looks, strict=True):
        term.look = look
    losses(model, data)
    found = [term.found for term in asked]
    return found[0] if len(found) == 1 else found


def layer_pairs(model):
    return model.kd_terms['ask0'].pairs


def ragged(*boxes):
    """Two images of different sizes, which are padded together, to 96 x 96."""
    first, second = boxes or (2, 3)
    data = batch((first,), (64, 96))
    for key, value in batch((second,), (80, 64), seed=1).items():
        data[key] += value
    return data


def two_views(data, offset=(3.0, -2.0), wider=8):
    """The teacher's images, twice as large and a little ``wider``, moved by ``offset``."""
    for image, sample in zip(data['inputs'], data['data_samples'], strict=True):
        large = image.repeat_interleave(2, 1).repeat_interleave(2, 2)
        pairs.second_view(sample, torch.cat([large, large[:, :, :wider]], 2), offset)
    return data


def inputs_of(model, data):
    return model.data_preprocessor(copy.deepcopy(data), True)['inputs']


def heard(model):
    """What MMDetection gives the student's loss modules and extractors, and what layers return."""
    calls = defaultdict(list)

    def listen(name, module):
        module.register_forward_hook(
            lambda m, args, kwargs, out: calls[name].append((*args, kwargs)), with_kwargs=True
        )

    listen('rpn cls', model.rpn_head.loss_cls)
    listen('rpn bbox', model.rpn_head.loss_bbox)
    heads, pools = model.roi_head.bbox_head, model.roi_head.bbox_roi_extractor
    if not isinstance(heads, nn.ModuleList):
        heads, pools = [heads], [pools]
    for stage, (head, pool) in enumerate(zip(heads, pools, strict=True)):
        listen(f'rcnn cls {stage}', head.loss_cls)
        listen(f'rcnn bbox {stage}', head.loss_bbox)
        listen(f'rois {stage}', pool)
    return calls


def outputs(network, *paths):
    """Copies of what these layers return from now on."""
    kept = {}
    for path in paths:
        network.get_submodule(path).register_forward_hook(
            lambda m, args, out, path=path: kept.__setitem__(
                path, out.clone() if torch.is_tensor(out) else [o.clone() for o in out]
            )
        )
    return kept


def read(feature, cells, strides, scale=(1.0, 1.0), offset=(0.0, 0.0)):
    """A map (C, H, W) of the teacher read bilinearly at the middle of the student's cells."""
    feature = feature.double().numpy()
    places = []
    for axis, size in enumerate(cells[::-1]):  # x, then y
        pixel = (np.arange(size) + 0.5) * strides[0] * scale[axis] + offset[axis]
        place = np.clip(pixel / strides[1] - 0.5, 0, feature.shape[2 - axis] - 1)
        low = np.floor(place).astype(int)
        places.append((low, np.minimum(low + 1, feature.shape[2 - axis] - 1), place - low))
    (left, right, x), (top, bottom, y) = places

    def along_x(rows):
        return feature[:, rows][:, :, left] * (1 - x) + feature[:, rows][:, :, right] * x

    read = along_x(top) * (1 - y)[:, None] + along_x(bottom) * y[:, None]
    return torch.from_numpy(read).float()


def close(got, expected, size=1e-4):
    """Equal up to the rounding of other operations, or of the same in another order."""
    assert got.shape == expected.shape
    assert (got - expected).abs().max() <= size * expected.abs().max()


# ------------------------------------------------------------------------------ ground truth


@pytest.mark.parametrize('kind', ['tensor', 'HorizontalBoxes'])
@pytest.mark.parametrize('resolution', [None, TWICE], ids=['one scale', 'two scales'])
def test_boxes_are_the_ground_truth_in_cells_of_the_students_map(kind, resolution):
    entries = (
        'neck',
        dict(student='backbone[1]', teacher='backbone[0]'),
        dict(student='backbone.layer1', teacher='neck[0]'),
    )
    model = asking(pairs.fpn(), pairs.fpn(8), Needs(pairs=entries), resolution=resolution)
    data = two_views(ragged(2, 3))

    def look(step):
        if kind == 'HorizontalBoxes':  # a preprocessor with boxtype2tensor=False leaves these
            for sample in step.samples:
                sample.gt_instances.bboxes = HorizontalBoxes(sample.gt_instances.bboxes)
        return [step.boxes(p) for p in layer_pairs(model)]

    found = looking(model, look, data=data)
    strides = [4, 8, 16, 32, 64, 8, 4]
    assert len(found) == len(strides)
    for boxes, stride in zip(found, strides, strict=True):
        assert [type(b) for b in boxes] == [torch.Tensor] * 2
        for got, sample, count in zip(boxes, data['data_samples'], (2, 3), strict=True):
            assert got.shape == (count, 4)
            assert torch.equal(got, sample.gt_instances.bboxes / stride)


def test_an_image_without_objects_has_no_boxes_and_a_map_of_a_roi_has_none():
    model = asking(pairs.fpn(), pairs.fpn(8), Needs(pairs=('neck[1]', VECTORS)))
    found = looking(
        model, lambda step: [step.boxes(p) for p in layer_pairs(model)], data=batch((0, 2))
    )
    assert [len(boxes) for boxes in found[0]] == [0, 2]
    assert found[0][0].shape == (0, 4)
    assert found[1] is None


# ------------------------------------------------------------------------------ features


def test_features_are_what_the_layers_returned():
    entries = ('neck', dict(student='backbone.layer2', teacher='backbone[1]'))
    model = asking(pairs.fpn(), pairs.fpn(8), Needs(pairs=entries))
    data = ragged()
    own = outputs(model, 'neck', 'backbone.layer2')
    found = looking(model, lambda step: [step.features(p) for p in layer_pairs(model)], data=data)
    with torch.no_grad():
        network = model.teacher.network
        backbone = network.backbone(inputs_of(model, data))
        theirs = [*network.neck(backbone), backbone[1]]
    for (student, teacher), mine, other in zip(
        found, [*own['neck'], own['backbone.layer2']], theirs, strict=True
    ):
        assert torch.equal(student, mine) and torch.equal(teacher, other)
        assert not teacher.requires_grad
        (gradient,) = torch.autograd.grad(student.sum(), model.backbone.conv1.weight,
                                          retain_graph=True)  # fmt: skip
        assert gradient.abs().max() > 0


@pytest.mark.parametrize('teacher', ['backbone[1]', 'backbone[0]'])
def test_the_teachers_map_is_read_on_the_students_grid(teacher):
    pair = dict(student='backbone[0]', teacher=teacher)
    model = asking(pairs.fpn(), pairs.fpn(8), Needs(pairs=(pair,)))
    theirs = outputs(model.teacher.network, 'backbone')
    student, hint = looking(model, lambda step: step.features(layer_pairs(model)[0]), data=ragged())
    index = int(teacher[-2])
    assert student.shape[2:] == hint.shape[2:] == (24, 24)
    for got, feature in zip(hint, theirs['backbone'][index], strict=True):
        close(got, read(feature, (24, 24), (4, 4 * 2**index)))


def test_of_a_second_view_the_same_places_are_read():
    """Each image has a scale and an offset of its own, and the two maps other strides."""
    entries = ('neck', dict(student='backbone[1]', teacher='backbone[0]'))
    model = asking(pairs.fpn(), pairs.fpn(8), Needs(pairs=entries), resolution=TWICE)
    data = two_views(ragged())
    data['data_samples'][1].teacher_view.set_metainfo(dict(offset=(-1.5, 4.0)))
    theirs = outputs(model.teacher.network, 'neck', 'backbone')
    found = looking(model, lambda step: [step.features(p) for p in layer_pairs(model)], data=data)
    maps = [*theirs['neck'], theirs['backbone'][0]]
    strides = [*((s, s) for s in (4, 8, 16, 32, 64)), (8, 4)]
    for (student, hint), feature, stride in zip(found, maps, strides, strict=True):
        assert not hint.requires_grad and student.requires_grad
        assert feature.shape[2] * stride[1] >= 192
        for i, sample in enumerate(data['data_samples']):
            view = sample.teacher_view
            expected = read(feature[i], student.shape[2:], stride, view.scale, view.offset)
            close(hint[i], expected)
            unmoved = read(feature[i], student.shape[2:], stride, view.scale)
            assert (expected - unmoved).abs().max() > 10e-4 * expected.abs().max()


@pytest.mark.parametrize('kind', ['fpn', 'cascade'])
@pytest.mark.parametrize('resolution', [None, TWICE], ids=['one scale', 'two scales'])
def test_vectors_of_rois_are_those_of_the_students_rois(kind, resolution):
    """Whatever else is asked before or after, also nothing; the teacher's ReLU works in place."""
    make = pairs.cascade if kind == 'cascade' else pairs.fpn
    entry = 'roi_head.bbox_head.1.shared_fcs.1' if kind == 'cascade' else VECTORS
    needs = dict(
        vectors=Needs(pairs=(entry,)),
        rows=Needs(rows=(('rcnn', 'cls'),)),
        crosswise=Needs(pairs=('neck',), cross=('rpn', 'rcnn')),
    )
    orders = ['vectors'], ['rows', 'vectors'], ['vectors', 'rows'], ['crosswise', 'vectors'], [
        'vectors', 'crosswise']  # fmt: skip

    def look_of(name, term):
        def crosswise(step):
            maps = [step.features(pair)[0] for pair in term.pairs]
            return step.cross('rcnn', maps[:4]), step.cross('rpn', maps)

        return dict(
            vectors=lambda step: step.features(term.pairs[0]),
            rows=lambda step: step.rows('rcnn', 'cls'),
            crosswise=crosswise,
        )[name]

    data, found = two_views(batch()), []
    for order in orders:
        model = asking(make(), make(), *map(needs.get, order), resolution=resolution)
        own, calls = outputs(model, entry), heard(model)
        theirs = outputs(model.teacher.network, 'neck')
        looking(model, *map(look_of, order, model.kd_terms.values()), data=data)
        found.append(model.kd_terms[f'ask{order.index("vectors")}'].found)
    (student, teacher), *others = found
    assert all(torch.equal(student, s) and torch.equal(teacher, t) for s, t in others)
    student, teacher = found[-1]
    assert torch.equal(student, own[entry]) and student.requires_grad
    assert not teacher.requires_grad
    # By hand: the RoIs of that stage, in the teacher's image.
    stage = 1 if kind == 'cascade' else 0
    rois = calls[f'rois {stage}'][0][1].clone()
    if resolution:
        for i, sample in enumerate(data['data_samples']):
            view = sample.teacher_view
            scale, offset = (torch.tensor([*v, *v]) for v in (view.scale, view.offset))
            mine = rois[:, 0] == i
            rois[mine, 1:] = rois[mine, 1:] * scale + offset
    network = model.teacher.network
    said = outputs(network, entry)
    with torch.no_grad():
        where = (stage,) if kind == 'cascade' else ()
        network.roi_head._bbox_forward(*where, theirs['neck'], rois)
    close(teacher, said[entry], 1e-5)
    assert len(teacher) == len(rois) > 30


# ------------------------------------------------------------------------------ the RPN's maps


def softmax_rpn(width=4):
    model = pairs.fpn(width)
    model.rpn_head.loss_cls.use_sigmoid = False
    return model


@pytest.mark.parametrize('kinds', itertools.product(['sigmoid', 'softmax'], repeat=2), ids=str)
def test_score_maps_are_the_teachers_objectness(kinds):
    make = dict(sigmoid=pairs.fpn, softmax=softmax_rpn)
    model = asking(make[kinds[0]](), make[kinds[1]](8), Needs(score_maps=True))
    data = ragged()
    maps = looking(model, lambda step: step.score_maps(), data=data)
    network = model.teacher.network
    with torch.no_grad():
        logits, _ = network.rpn_head(network.extract_feat(inputs_of(model, data)))
    assert [tuple(m.shape) for m in maps] == [(2, 3, s, s) for s in (24, 12, 6, 3, 2)]
    for got, said in zip(maps, logits, strict=True):
        assert not got.requires_grad
        if kinds[1] == 'sigmoid':
            assert torch.equal(got, said)
        else:  # MMDetection's own reading of an RPN with two logits: all but the last
            said = said.view(2, 3, 2, *said.shape[2:]).softmax(2)[:, :, :-1].squeeze(2)
            close(got.sigmoid(), said, 1e-5)
    assert maps[0].std() > 0.1


@pytest.mark.parametrize('ratio', [2, 1.5])
def test_score_maps_of_a_second_view_lie_on_the_students_grid(ratio):
    """Also where no anchor of the two networks is the same, so that no rows can be compared."""
    resolution = dict(student=(64, 64), teacher=(int(64 * ratio),) * 2)
    needs = Needs(score_maps=True), Needs(rows=(('rcnn', 'cls'),))
    model = asking(pairs.fpn(), pairs.fpn(8), *needs, resolution=resolution)
    data = ragged()
    for image, sample in zip(data['inputs'], data['data_samples'], strict=True):
        height, width = (int(ratio * edge) for edge in image.shape[1:])
        large = nn.functional.interpolate(image[None].float(), (height, width))[0]
        pairs.second_view(sample, large, (2.0, 5.0))
    said = outputs(model.teacher.network, 'rpn_head.rpn_cls')
    levels = []
    model.teacher.network.rpn_head.rpn_cls.register_forward_hook(
        lambda m, args, out: levels.append(out)
    )
    maps, _ = looking(model, lambda step: step.score_maps(), lambda step: None, data=data)
    assert said
    for got, feature, stride in zip(maps, levels, (4, 8, 16, 32, 64), strict=True):
        cells = -(-96 // stride)
        assert got.shape == (2, 3, cells, cells)
        for image, full, sample in zip(got, feature, data['data_samples'], strict=True):
            view = sample.teacher_view
            close(image, read(full, (cells, cells), (stride, stride), view.scale, view.offset))


@pytest.mark.parametrize('resolution', [None, TWICE], ids=['one scale', 'two scales'])
def test_anchors_are_the_students_own(resolution):
    """By the definition in Faster R-CNN, and by the student's own generator."""
    teacher = pairs.fpn(8)
    teacher.rpn_head.anchor_generator.scales = [5]  # none of the student's
    model = asking(pairs.fpn(), teacher, Needs(anchors=True), resolution=resolution)
    calls = counted(model.teacher.network)
    levels = looking(model, lambda step: step.anchors(), data=two_views(ragged()))
    assert calls['rpn_head'] == calls['neck'] == calls['roi_head.bbox_head'] == 0
    sizes = [(s, s) for s in (24, 12, 6, 3, 2)]
    priors = model.rpn_head.prior_generator.grid_priors(sizes, device='cpu')
    for level, (anchors, size, flat) in enumerate(zip(levels, sizes, priors, strict=True)):
        stride = 4 * 2**level
        assert anchors.shape == (*size, 3, 4)
        assert torch.equal(anchors.reshape(-1, 4), flat)
        y, x = torch.meshgrid(*(torch.arange(s) * stride for s in size), indexing='ij')
        for number, ratio in enumerate((0.5, 1.0, 2.0)):
            half = torch.tensor([ratio**-0.5, ratio**0.5]) * 4 * stride / 2
            middle = torch.stack([x, y], -1)
            expected = torch.cat([middle - half, middle + half], -1)
            close(anchors[:, :, number], expected, 1e-6)


def counted(network, parts=('backbone', 'neck', 'rpn_head', 'roi_head.bbox_head')):
    """How often these parts are called from now on."""
    calls = Counter(dict.fromkeys(parts, 0))
    for part in parts:
        network.get_submodule(part).register_forward_hook(
            lambda *a, part=part: calls.update([part])
        )
    return calls


# ------------------------------------------------------------------------------ rows


def seesaw(width=4, classes=3):
    model = pairs.fpn(width, classes=classes)
    model.roi_head.bbox_head.loss_cls = dict(type='SeesawLoss', num_classes=classes)
    return model


def sigmoid(width=4):
    model = pairs.fpn(width)
    model.roi_head.bbox_head.loss_cls.use_sigmoid = True
    return model


def giou(width=4):
    """A student that regresses boxes, under GIoU; or else its teacher, which has deltas."""
    return pairs.giou() if width == 4 else pairs.fpn(width)


def weighted(model):
    """The same with λ of its losses 3 and 5, in the RPN 7 and 2."""
    heads = model.roi_head.bbox_head
    for head in heads if isinstance(heads, list) else [heads]:
        head.loss_cls.loss_weight, head.loss_bbox.loss_weight = 3.0, 5.0
    model.rpn_head.loss_cls.loss_weight, model.rpn_head.loss_bbox.loss_weight = 7.0, 2.0
    return model


def flat(levels, columns):
    """Maps (N, A·C, H, W) as rows (image, y, x, anchor) of C columns, all levels together."""
    rows = []
    for level in levels:
        count, channels, height, width = level.shape
        split = level.view(count, channels // columns, columns, height, width)
        rows.append(split.permute(0, 3, 4, 1, 2).reshape(-1, columns))
    return torch.cat(rows)


ALL_ROWS = tuple(itertools.product(('rpn', 'rcnn'), ('cls', 'bbox')))


@pytest.mark.parametrize('kind', ['sigmoid', 'softmax'])
def test_rows_of_an_rpn(kind):
    make = pairs.fpn if kind == 'sigmoid' else softmax_rpn
    model = asking(weighted(make()), make(8), Needs(rows=ALL_ROWS[:2]))
    calls, data = heard(model), ragged()
    both = looking(model, lambda step: [step.rows('rpn', k) for k in ('cls', 'bbox')], data=data)
    assert [len(rows) for rows in both] == [1, 1]
    network = model.teacher.network
    with torch.no_grad():
        said = network.rpn_head(network.extract_feat(inputs_of(model, data)))
    columns = {'cls': 1 if kind == 'sigmoid' else 2, 'bbox': 4}
    for (rows,), name, levels in zip(both, ('cls', 'bbox'), said, strict=True):
        heard_by_level = calls[f'rpn {name}']
        assert len(heard_by_level) == 5
        pred, target, weight = (torch.cat([c[i] for c in heard_by_level]) for i in range(3))
        sampled = weight > 0 if name == 'cls' else (weight > 0).any(1)
        assert torch.equal(rows.student, pred[sampled]) and rows.student.requires_grad
        assert torch.equal(rows.teacher, flat(levels, columns[name])[sampled])
        assert not rows.teacher.requires_grad
        assert torch.equal(rows.target, target[sampled])
        assert torch.equal(rows.weight, weight[sampled]) and (rows.weight > 0).all()
        assert rows.avg_factor == 128  # two images, 64 anchors of each
        assert (rows.sigmoid, rows.background) == (
            name == 'cls' and kind == 'sigmoid', name == 'cls' and kind == 'softmax',
        )  # fmt: skip
        assert rows.rois is None
        assert (rows.loss_weight, rows.stage_weight) == (7 if name == 'cls' else 2, 1)
        assert rows.student.shape[1] == columns[name]
    assert len(both[0][0].student) == 128 > len(both[1][0].student) > 0


ROI_HEADS = {
    'softmax': (pairs.fpn, None),
    'sigmoid': (sigmoid, None),
    'decoded': (giou, None),
    'cascade': (pairs.cascade, None),
    'classes': (pairs.fpn, FOUND),
    'unknown class': (pairs.fpn, UNKNOWN),
    'seesaw': (seesaw, None),
    'seesaw classes': (seesaw, FOUND),
}


def roi_pair(kind, *needs, **settings):
    make, classes = ROI_HEADS[kind]
    teacher = make(8, classes=5) if classes else make() if make is pairs.cascade else make(8)
    if classes:
        settings['classes'] = classes
    return asking(weighted(make()), teacher, *needs, **settings)


def probabilities(head, logits):
    """What MMDetection makes of logits at test time."""
    if head.custom_activation:
        return head.loss_cls.get_activation(logits)
    return logits.softmax(-1)


def in_the_students_classes(scores, kind):
    """A loop over the names: what the student does not know is background."""
    if (classes := ROI_HEADS[kind][1]) is None:
        return scores
    names = classes['teacher']
    columns = [
        scores[:, names.index(name)] if name in names else torch.zeros(len(scores))
        for name in classes['student']
    ]
    others = [scores[:, i] for i, n in enumerate(names) if n not in classes['student']]
    return torch.stack([*columns, sum(others) + scores[:, len(names)]], 1)


def stages_of(model):
    heads = model.roi_head.bbox_head
    return list(heads) if isinstance(heads, nn.ModuleList) else [heads]


def roi_answers(model, features, calls, stage):
    """What the teacher's RoI head says of the RoIs of a stage, called by hand."""
    (*_, (_, rois, _)) = calls[f'rois {stage}']
    where = (stage,) if len(stages_of(model)) > 1 else ()
    answer = model.teacher.network.roi_head._bbox_forward(*where, features, rois)
    return rois, answer['cls_score'], answer['bbox_pred']


def picked(deltas, labels, kind):
    """The four deltas of the true class, by a loop."""
    if deltas.size(1) == 4:
        return deltas
    classes = ROI_HEADS[kind][1]
    rows = []
    for row, label in zip(deltas, labels.tolist(), strict=True):
        if classes:
            name = classes['student'][label]
            label = classes['teacher'].index(name) if name in classes['teacher'] else -1
        rows.append(row.view(-1, 4)[label])
    return torch.stack(rows)


@pytest.mark.parametrize('kind', ROI_HEADS)
def test_rows_of_a_roi_head(kind):
    model = roi_pair(kind, Needs(rows=ALL_ROWS[2:]))
    calls, data = heard(model), ragged(4, 4)
    cls, bbox = looking(
        model, lambda step: [step.rows('rcnn', k) for k in ('cls', 'bbox')], data=data
    )
    heads, count = stages_of(model), 3 if kind == 'cascade' else 1
    assert len(cls) == len(bbox) == len(heads) == count
    network = model.teacher.network
    with torch.no_grad():
        features = network.extract_feat(inputs_of(model, data))[:4]
    left_out = 0
    for stage, head in enumerate(heads):
        with torch.no_grad():
            rois, logits, deltas = roi_answers(model, features, calls, stage)
        theirs = network.roi_head.bbox_head
        theirs = theirs[stage] if count > 1 else theirs
        pred, target, weight, rest = calls[f'rcnn cls {stage}'][0]
        rows, known = cls[stage], torch.ones_like(weight)
        if kind == 'unknown class':
            known = (target != 1).float()
            left_out += int((target == 1).sum())
        want = in_the_students_classes(probabilities(theirs, logits), kind)
        assert rows.student.shape == rows.teacher.shape == (len(rois), 4)
        assert rows.student.requires_grad and not rows.teacher.requires_grad
        close(rows.student.softmax(1), probabilities(head, pred), 1e-5)
        close(rows.teacher.softmax(1), want, 1e-5)
        if kind in ('softmax', 'sigmoid', 'cascade', 'decoded'):
            assert rows.student is pred
            close(rows.teacher, logits, 1e-5)
        assert torch.equal(rows.target, target) and torch.equal(rows.weight, weight * known)
        assert torch.equal(rows.rois, rois)
        assert rows.avg_factor == rest['avg_factor'] == len(rois)
        assert (rows.sigmoid, rows.background) == (kind == 'sigmoid', True)
        assert rows.stage_weight == (1, 0.5, 0.25)[stage]
        assert rows.loss_weight == (3 if 'seesaw' not in kind else head.loss_cls.loss_weight)

        (boxes, labels), rows = (target < 3, target[target < 3]), bbox[stage]
        pred, target, weight, rest = calls[f'rcnn bbox {stage}'][0]
        if kind == 'decoded':
            pred, target = (head.bbox_coder.encode(rois[boxes, 1:], b) for b in (pred, target))
        assert torch.equal(rows.student, pred) and torch.equal(rows.target, target)
        assert rows.student.requires_grad and not rows.teacher.requires_grad
        # of a class that the teacher does not know the deltas have no weight
        weight = weight * known[boxes, None]
        some = weight[:, 0] > 0
        assert torch.equal(rows.weight, weight) and some.any()
        close(rows.teacher[some], picked(deltas[boxes], labels, kind)[some], 1e-4)
        assert torch.equal(rows.rois, rois[boxes])
        assert rows.avg_factor == rest['avg_factor']
        assert (rows.sigmoid, rows.background) == (False, False)
        assert (rows.loss_weight, rows.stage_weight) == (5, (1, 0.5, 0.25)[stage])
    assert (left_out > 0) == (kind == 'unknown class')


def test_a_batch_without_boxes_has_no_deltas():
    model = asking(pairs.fpn(), pairs.fpn(8), Needs(rows=ALL_ROWS))
    found = looking(
        model, lambda step: {each: step.rows(*each) for each in ALL_ROWS}, data=batch((0, 0))
    )
    counts = {each: [len(rows.student) for rows in found[each]] for each in ALL_ROWS}
    assert counts['rpn', 'bbox'] == [0] and counts['rcnn', 'bbox'] == []
    assert counts['rpn', 'cls'] == [128] and counts['rcnn', 'cls'][0] > 0


# ------------------------------------------------------------------------------ crosswise


@pytest.mark.parametrize('resolution', [None, TWICE], ids=['one scale', 'two scales'])
def test_the_teachers_rpn_on_the_students_features(resolution):
    needs = Needs(pairs=('neck',), rows=ALL_ROWS[:2], cross=('rpn',))
    model = asking(weighted(pairs.fpn()), pairs.fpn(8), needs, resolution=resolution)
    data = two_views(ragged(), (0.0, 0.0), 0)
    head = model.teacher.network.rpn_head

    def look(step):
        own = [step.features(p)[0] for p in layer_pairs(model)]
        found = []
        for kind in ('cls', 'bbox'):
            (before,), copied = step.rows('rpn', kind), [f.clone() for f in own]
            (rows,) = step.cross('rpn', own, kind)
            (after,) = step.rows('rpn', kind)
            assert after is before
            assert all(map(torch.equal, own, copied))
            gradient = torch.autograd.grad(rows.student.square().sum(), own, retain_graph=True)
            found.append((own, before, rows, gradient))
        return found

    calls = heard(model)
    found = looking(model, look, data=data)
    for (own, before, rows, gradient), name in zip(found, ('cls', 'bbox'), strict=True):
        said = head(own)[name == 'bbox']
        weight = torch.cat([c[2] for c in calls[f'rpn {name}']])
        sampled = weight > 0 if name == 'cls' else (weight > 0).any(1)
        want = flat(said, 1 if name == 'cls' else 4)[sampled]
        if resolution:  # the coarsest level has no counterpart
            fine = sum(len(c[2]) for c in calls[f'rpn {name}'][:4])
            want = want[sampled.nonzero().squeeze(1) < fine]
        assert len(want) > 0
        assert torch.equal(rows.student, want)
        for field in ('teacher', 'target', 'weight', 'avg_factor', 'sigmoid', 'loss_weight'):
            assert getattr(rows, field) is getattr(before, field) or torch.equal(
                *(torch.as_tensor(getattr(each, field)) for each in (rows, before))
            )
        expected = torch.autograd.grad(want.square().sum(), own, retain_graph=True)
        assert all(map(torch.equal, gradient, expected))
        assert any(g.any() for g in gradient)
        rows.student.sum().backward(retain_graph=True)
    assert all(p.grad is None for p in model.teacher.network.parameters())
    assert model.backbone.conv1.weight.grad.any()


def test_the_teachers_rpn_answers_crosswise_in_the_students_frame():
    """One network, its deltas in other units: both sides of the rows are of one frame."""
    other, stds = pairs.fpn(8), [0.1, 0.2, 0.4, 0.5]
    other.rpn_head.bbox_coder.target_stds = stds
    needs = Needs(pairs=('neck',), cross=('rpn',))
    model = asking(pairs.fpn(), other, needs)
    calls = heard(model)

    def look(step):
        own = [step.features(p)[0] for p in layer_pairs(model)]
        return own, step.cross('rpn', own, 'bbox')

    own, (rows,) = looking(model, look, data=ragged())
    sampled = (torch.cat([c[2] for c in calls['rpn bbox']]) > 0).any(1)
    want = flat(model.teacher.network.rpn_head(own)[1], 4)[sampled] * torch.tensor(stds)
    assert len(want) > 0
    close(rows.student, want, 1e-3)


def test_the_teachers_rpn_answers_crosswise_for_the_students_anchors():
    """It has three anchors to a cell, of which the student has the second alone."""
    student = pairs.fpn()
    student.rpn_head.anchor_generator.ratios = [1.0]
    model = asking(student, pairs.fpn(8), Needs(pairs=('neck',), cross=('rpn',)))
    calls = heard(model)

    def look(step):
        own = [step.features(p)[0] for p in layer_pairs(model)]
        return own, step.cross('rpn', own)

    own, (rows,) = looking(model, look, data=ragged())
    sampled = torch.cat([c[2] for c in calls['rpn cls']]) > 0
    want = flat([said[:, 1:2] for said in model.teacher.network.rpn_head(own)[0]], 1)[sampled]
    assert len(want) == 128
    assert torch.equal(rows.student, want)


def test_across_rpns_without_a_common_anchor_there_is_no_term():
    """At this ratio no anchor has a counterpart: such a term would stay 0 in silence."""
    needs = Needs(rows=(('rcnn', 'cls'),)), Needs(pairs=('neck',), cross=('rpn',))
    resolution = dict(student=(64, 64), teacher=(96, 96))
    model = asking(pairs.fpn(), pairs.fpn(8), *needs, resolution=resolution)
    assert list(model.kd_terms) == ['ask0']
    assert model.left_out == {'ask1': 'no anchor has a counterpart at ratio 1.5'}


CHEAP = dict(roi_align=True, channels_last=True, fuse_conv_bn=True)


@pytest.mark.parametrize('accelerate', [None, CHEAP], ids=['exact', 'accelerated'])
@pytest.mark.parametrize('kind', ROI_HEADS)
def test_the_teachers_roi_head_on_the_students_features(kind, accelerate):
    """Prediction and gradient are those of an exact teacher's head, called by hand."""
    first = VECTORS.replace('bbox_head', 'bbox_head.0') if kind == 'cascade' else VECTORS
    needs = Needs(pairs=('neck', first), cross=('rcnn',))
    model = roi_pair(kind, needs, accelerate=accelerate)
    exact = copy.deepcopy(model.teacher.network.roi_head)
    calls, data = heard(model), ragged(4, 4)

    def look(step):
        *neck, vectors = layer_pairs(model)
        own = [step.features(p)[0] for p in neck]
        found, before = [], {}
        for kind in ('cls', 'bbox'):
            before[kind] = step.rows('rcnn', kind)
            rows = step.cross('rcnn', own[:4], kind)
            # What was laid down for these RoIs is still the teacher's own.
            assert step.rows('rcnn', kind) is before[kind]
            total = sum(each.student.square().sum() for each in rows)
            gradient = torch.autograd.grad(total, own[:4], retain_graph=True)
            found.append((before[kind], rows, gradient))
        assert step.teacher_record.feature(vectors.teacher.path, 0) is step.features(vectors)[1]
        return own[:4], found

    own, found = looking(model, look, data=data)
    model.teacher.network.roi_head = exact
    for name, (before, crossed, gradient) in zip(('cls', 'bbox'), found, strict=True):
        totals = []
        for stage, (rows, plain) in enumerate(zip(crossed, before, strict=True)):
            rois, logits, deltas = roi_answers(model, own, calls, stage)
            target = calls[f'rcnn cls {stage}'][0][1]
            theirs = exact.bbox_head[stage] if kind == 'cascade' else exact.bbox_head
            if name == 'cls':
                want = in_the_students_classes(probabilities(theirs, logits), kind)
                close(rows.student.softmax(1), want, 1e-4)
                if ROI_HEADS[kind][1] is None and kind != 'seesaw':
                    close(rows.student, logits)
                    totals.append(logits)
                else:
                    totals.append(want.clamp(min=1e-30).log() if kind != 'unknown class' else None)
            else:
                boxes = target < 3
                want = picked(deltas[boxes], target[boxes], kind)
                some = plain.weight[:, 0] > 0
                close(rows.student[some], want[some])
                totals.append(want if some.all() else None)
            assert rows.student.shape == plain.student.shape
            assert not torch.equal(rows.student, plain.student)
            for field in ('teacher', 'target', 'weight', 'rois'):
                assert torch.equal(getattr(rows, field), getattr(plain, field))
            for field in ('avg_factor', 'sigmoid', 'background', 'loss_weight', 'stage_weight'):
                assert getattr(rows, field) == getattr(plain, field)
        if all(t is not None for t in totals):
            total = sum(t.square().sum() for t in totals)
            expected = torch.autograd.grad(total, own, retain_graph=True, allow_unused=True)
            largest = max(e.abs().max() for e in expected if e is not None)
            assert largest > 0
            for got, want in zip(gradient, expected, strict=True):
                want = torch.zeros_like(got) if want is None else want
                assert (got - want).abs().max() <= 1e-3 * largest
        assert any(g.any() for g in gradient)
    sum(r.student.sum() for _, crossed, _ in found for r in crossed).backward()
    assert model.backbone.conv1.weight.grad.any()
    for network in (exact, model.teacher.network):
        assert all(p.grad is None for p in network.parameters())


def test_a_layer_is_copied_where_a_later_one_writes_over_it_and_nowhere_else():
    taps, layer, given = Taps(), nn.Linear(2, 2), torch.ones(1, 2)
    taps.tap_layer('layer', layer)
    with taps as record:
        out = layer(given)
    assert record.feature('layer', 0) is out
    taps.copy('layer')
    with taps as record:
        out = layer(given)
    assert record.feature('layer', 0) is not out and torch.equal(record.feature('layer', 0), out)


@pytest.mark.parametrize('by_name', [True, False])
def test_rois_may_be_given_to_an_extractor_by_name(by_name):
    class Extractor(nn.Module):
        def forward(self, feats, rois):
            return rois

    taps, extractor, loss = Taps(), Extractor(), nn.L1Loss()
    rois = torch.rand(3, 5)
    taps.tap_rois(1, extractor)
    taps.tap_loss('rcnn', 1, 'cls', loss)
    with taps as record:
        extractor([], rois=rois) if by_name else extractor([], rois)
        loss(torch.ones(3, 2), torch.ones(3, 2))
    assert record.loss_calls['rcnn', 1, 'cls'][0].rois is rois


# ------------------------------------------------------------------------------ Trident


@functools.cache
def trident():
    """A step of TridentNet, which trains three branches of a batch laid down three times."""
    distillation = dict(
        ask0=dict(
            type=Asks,
            needed=Needs(
                pairs=('backbone[0]', 'backbone.layer1'),
                rows=(('rpn', 'cls'),),
                score_maps=True,
                cross=('rcnn',),
            ),  # fmt: skip
        )
    )
    model = pairs.distilled(zoo.tiny('Trident'), zoo.tiny('Trident'), distillation)
    model['type'] = 'mmkd.KnowledgeDistillationTridentFasterRCNN'
    model = pairs.build(model)
    zoo.settle(model)
    zoo.settle(model.teacher.network)
    lively(model, 0.05)  # its maps are large
    for module in model.modules():  # so that one image knows nothing of another
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    data, calls = batch((3, 2), 128, sides=(16, 60)), heard(model)
    inputs = inputs_of(model, data).requires_grad_()
    theirs = outputs(model.teacher.network, 'backbone', 'backbone.layer1', 'rpn_head.rpn_cls')
    model.data_preprocessor.register_forward_hook(lambda m, args, out: {**out, 'inputs': inputs})

    def look(step):
        features = [step.features(p) for p in layer_pairs(model)]
        boxes = [step.boxes(p) for p in layer_pairs(model)]
        maps = step.score_maps(), step.objectness()
        return features, boxes, maps, step.cross('rcnn', [features[0][0]])

    return model, data, inputs, theirs, calls, looking(model, look, data=data)


def test_a_trident_student_has_each_image_once_for_each_branch():
    _, data, inputs, theirs, _, ((features, boxes, (maps, own_maps), _)) = trident()
    assert own_maps[0].shape == maps[0].shape
    (student, hint), (early, early_hint) = features
    assert len(student) == len(hint) == len(boxes[0]) == 6
    assert len(early) == len(early_hint) == len(boxes[1]) == 2
    for i in range(6):
        (gradient,) = torch.autograd.grad(student[i].sum(), inputs, retain_graph=True)
        assert [bool(g.any()) for g in gradient] == [i % 2 == 0, i % 2 == 1]
        (gradient,) = torch.autograd.grad(own_maps[0][i].sum(), inputs, retain_graph=True)
        assert [bool(g.any()) for g in gradient] == [i % 2 == 0, i % 2 == 1]
        assert torch.equal(hint[i], theirs['backbone'][0][i % 2])
        assert torch.equal(maps[0][i], theirs['rpn_head.rpn_cls'][i % 2])
        truth = data['data_samples'][i % 2].gt_instances.bboxes
        assert torch.equal(boxes[0][i], truth / 16)
    assert torch.equal(early_hint, theirs['backbone.layer1'])
    for got, sample in zip(boxes[1], data['data_samples'], strict=True):
        assert torch.equal(got, sample.gt_instances.bboxes / 4)


def test_crosswise_a_trident_student_has_the_features_of_each_branch():
    """The second branch's RoIs are pooled from the second branch's map."""
    model, _, _, _, calls, ((features, _, _, (rows,))) = trident()
    _, logits, _ = roi_answers(model, [features[0][0]], calls, 0)
    assert {int(i) for i in rows.rois[:, 0]} == set(range(6))
    close(rows.student, logits, 1e-5)


# ------------------------------------------------------------------------------ no more


@pytest.mark.parametrize(
    ('needs', 'look', 'expected'),
    [
        (Needs(pairs=('neck',)), 'features', (1, 1, 0, 0)),
        (Needs(pairs=('backbone[1]', 'backbone.layer2')), 'features', (1, 0, 0, 0)),
        (Needs(pairs=('neck', VECTORS)), 'features', (1, 1, 0, 1)),
        (Needs(score_maps=True), 'score_maps', (1, 1, 1, 0)),
        (Needs(anchors=True, pairs=('backbone[1]',)), 'anchors', (1, 0, 0, 0)),
        (Needs(rows=ALL_ROWS[:2]), 'rows', (1, 1, 1, 0)),
        (Needs(rows=ALL_ROWS[2:]), 'rows', (1, 1, 0, 1)),
        (Needs(rows=ALL_ROWS, score_maps=True, anchors=True), 'rows', (1, 1, 1, 1)),
        (Needs(pairs=('neck',), cross=('rpn',)), 'cross', (1, 1, 2, 0)),
        (Needs(pairs=('neck',), cross=('rcnn',)), 'cross', (1, 1, 0, 2)),
    ],
)
@pytest.mark.parametrize('resolution', [None, TWICE], ids=['one scale', 'two scales'])
def test_what_no_term_needs_is_not_computed(needs, look, expected, resolution):
    """Twice the same needs, each thing asked for twice: it is computed once."""
    model = asking(pairs.fpn(), pairs.fpn(8), needs, needs, resolution=resolution)
    calls = counted(model.teacher.network)
    own = counted(model)

    def everything(step):
        for _ in range(2):
            features = [step.features(p) for p in layer_pairs(model)]
            for each in needs.rows:
                step.rows(*each)
            if needs.score_maps:
                step.score_maps()
            if needs.anchors:
                step.anchors()
        return [step.cross(site, [f for f, _ in features]) for site in needs.cross]

    # A term is given what it asks; to cross is a computation of each term's own.
    looking(model, everything, everything if look != 'cross' else lambda step: None,
            data=two_views(batch()))  # fmt: skip
    assert tuple(calls.values()) == expected
    assert tuple(own.values()) == (1, 1, 1, 1)


class Near(FeatureTerm):
    """A feature term of one's own."""

    def compare(self, student, teacher, layers, boxes):
        return (student - teacher).abs().mean()


@pytest.mark.parametrize('resolution', [None, TWICE], ids=['one scale', 'two scales'])
def test_five_feature_terms_share_the_teachers_maps(resolution, monkeypatch):
    terms = {f'near{i}': dict(type=Near) for i in range(5)}
    model = lively(pairs.distil(pairs.fpn(), pairs.fpn(8), dict(terms, resolution=resolution)))
    calls, sampled = counted(model.teacher.network), []
    resample = mmkd.models.step.resample
    monkeypatch.setattr(
        mmkd.models.step, 'resample', lambda *args: sampled.append(args) or resample(*args)
    )
    values = losses(model, two_views(batch()))
    assert tuple(calls.values()) == (1, 1, 0, 0)
    assert len(sampled) == 5  # one for each of the neck's maps
    assert len({id(args[0]) for args in sampled}) == 5
    assert all(values[f'loss_kd_near{i}'] > 0 for i in range(5))


# ------------------------------------------------------------------------------ terms together


SITES = {key: dict(site=key.split('_')[0]) for key in pairs.TERMS if key != 'hint'}


def together(keys, names, extra=(), first=False):
    """The losses of the paper's terms ``keys`` in this order, under ``names``."""
    paper = recipe()
    terms = {
        name: dict(paper[key], **(SITES.get(key, {}) if name != key else {}))
        for key, name in zip(keys, names, strict=True)
    }
    others = {name: dict(type=Asks, needed=needed) for name, needed in extra}
    distillation = {**others, **terms} if first else {**terms, **others}
    model = lively(pairs.distil(pairs.fpn(), pairs.fpn(8), distillation))
    for name, _ in extra:
        model.kd_terms[name].look = functools.partial(everything_crosswise, model.kd_terms[name])
    values = losses(model, ragged())
    logged = [pairs.LOG_NAMES[k] if k == n else f'loss_kd_{n}'
              for k, n in zip(keys, names, strict=True)]  # fmt: skip
    assert [k for k in values if 'kd' in k and 'ask' not in k] == logged
    return {key: values[name] for key, name in zip(keys, logged, strict=True)}


def everything_crosswise(term, step):
    own = [step.features(pair)[0] for pair in term.pairs]
    step.cross('rcnn', own[:4])
    step.cross('rpn', own)
    step.score_maps()


@functools.cache
def alone():
    return {key: together([key], [key])[key] for key in pairs.TERMS}


ORDERS = [
    pairs.TERMS, pairs.TERMS[::-1], ('hint', 'rcnn_bbox', 'rpn_cls'), ('rcnn_bbox', 'rcnn_cls'),
    ('rpn_bbox', 'hint', 'rcnn_cls', 'rpn_cls', 'rcnn_bbox'), ('rpn_bbox', 'rpn_cls'),
]  # fmt: skip


@pytest.mark.parametrize('keys', ORDERS, ids=', '.join)
@pytest.mark.parametrize('named', ['as today', 'otherwise'])
def test_terms_in_any_combination_are_what_each_is_alone(keys, named):
    names = keys if named == 'as today' else [f'term{i}' for i in range(len(keys))]
    found = together(keys, names)
    assert {key: float(value) for key, value in found.items()} == {
        key: float(alone()[key]) for key in keys
    }
    assert all(value > 0 for value in found.values())


@pytest.mark.parametrize('first', [True, False], ids=['before', 'after'])
def test_a_term_that_asks_for_everything_changes_no_other(first):
    needs = Needs(pairs=('neck',), cross=('rpn', 'rcnn'), score_maps=True)
    found = together(pairs.TERMS, pairs.TERMS, [('ask', needs)], first)
    assert {k: float(v) for k, v in found.items()} == {k: float(v) for k, v in alone().items()}


@pytest.mark.parametrize('kind', ['fpn', 'cascade'])
def test_a_second_soft_term_is_the_papers_equation_too(kind):
    """Equation (3) with another background weight and temperature; μ is the first term's."""
    make = pairs.cascade if kind == 'cascade' else pairs.fpn
    second = dict(type='WeightedSoftCELoss', site='rcnn', hard_weight=1.0, loss_weight=1.0,
                  background_weight=2.0, temperature=2.0)  # fmt: skip
    terms = dict(rcnn_cls=recipe()['rcnn_cls'], soft2=second, ask0=dict(
        type=Asks, needed=Needs(rows=(('rcnn', 'cls'),))))  # fmt: skip
    values, hard = {}, {}
    for name in ('plain', 'both'):
        model = lively(pairs.distil(make(), make(), terms))
        if name == 'plain':
            del model.shared_losses['rcnn'], model.kd_terms['rcnn_cls'], model.kd_terms['soft2']
        calls = heard(model)
        model.kd_terms['ask0'].look = lambda step: None
        theirs = outputs(model.teacher.network, 'neck')
        values[name] = losses(model, ragged())
        hard[name] = sum(v for k, v in values[name].items() if k.endswith('loss_cls'))
    # exactly: the same operations, and a half of each
    assert torch.equal(hard['both'], hard['plain'] * 0.5)
    expected = {'loss_kd_cls': 0.0, 'loss_kd_soft2': 0.0}
    for stage in range(len(stages_of(model))):
        with torch.no_grad():
            _, answer, _ = roi_answers(model, theirs['neck'][:4], calls, stage)
        own, _, weight, rest = calls[f'rcnn cls {stage}'][0]
        for name, scale, outside, t in (('cls', 0.5, 1.5, 1.0), ('soft2', 1.0, 2.0, 2.0)):
            w_c = torch.tensor([1.0, 1.0, 1.0, outside])
            rows = -t * t * (w_c * (answer / t).softmax(1) * (own / t).log_softmax(1)).sum(1)
            value = scale * (rows * weight).sum() / rest['avg_factor']
            expected[f'loss_kd_{name}'] += (1, 0.5, 0.25)[stage] * value
    for name, value in expected.items():
        close(values['both'][name], value, 1e-5)
    assert {k for k in values['both'] if 'kd' in k} == {*expected, 'loss_kd_ask0'}


# ------------------------------------------------------------------------------ one folder


BESIDES = {
    f'options/{name}.py' for name in (
        'schedule', 'share', 'class_map', 'head_layout', 'acceleration', 'roi_align',
    )
}  # fmt: skip


def traced(call):
    """The lines of mmkd that run in ``call``: (file, function, line)."""
    lines, folder = set(), f'{PACKAGE}/'

    def each(frame, event, arg):
        if not frame.f_code.co_filename.startswith(folder):
            return None
        if event == 'line':
            name = frame.f_code.co_filename.removeprefix(folder)
            lines.add((name, frame.f_code.co_qualname, frame.f_lineno))
        return each

    before = sys.gettrace()
    sys.settrace(each)
    try:
        call()
    finally:
        sys.settrace(before)
    return lines


def test_one_step_of_the_papers_recipe_runs_in_one_folder():
    """From the batch to the gradients, once the observers of the first steps have gone."""
    model = pairs.distil(pairs.fpn(), pairs.fpn(8), recipe())
    data = model.data_preprocessor(batch(), True)

    def step():
        pairs.total(model, model(**copy.deepcopy(data), mode='loss')).backward()

    step()
    assert not model.unproven
    model.observers.clear()
    lines = traced(step)
    files = Counter(name for name, *_ in lines)
    for part in ('detector', 'step', 'teacher', 'taps', 'heads', 'chen2017'):
        assert files[f'models/{part}.py'] > 3, part
    offenders = Counter(
        f'{name}: {function}'
        for name, function, _ in lines
        if not name.startswith('models/') and name not in BESIDES
    )
    assert not offenders, 'besides mmkd/models there run ' + ', '.join(
        f'{where} ({count} lines)' for where, count in sorted(offenders.items())
    )
