"""A cheaper teacher says the same, as closely as its options promise."""

import pairs
import pytest
import torch
from mmdet.models.roi_heads.roi_extractors import SingleRoIExtractor
from pairs import LOG_NAMES, distil, recipe
from torch import nn

from mmkd.engine.summary import startup_table
from mmkd.options.acceleration import Acceleration, full
from mmkd.options.roi_align import GatheredRoIExtractor

KINDS = {'fpn': pairs.fpn, 'c4': pairs.c4, 'cascade': pairs.cascade}


def trained(model):
    """Gives the teacher's BatchNorm statistics that are not 0 and 1."""
    generator = torch.Generator().manual_seed(0)
    for module in model.teacher.network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.copy_(torch.randn(module.num_features, generator=generator) * 0.1)
            module.running_var.copy_(torch.rand(module.num_features, generator=generator) + 0.5)
            module.weight.data.copy_(torch.rand(module.num_features, generator=generator) + 0.5)
            module.bias.data.copy_(torch.randn(module.num_features, generator=generator) * 0.1)
    return model


def answers(kind, accelerate):
    """What the teacher answered to each term, in one step."""
    hint = dict(pairs=['neck' if kind != 'c4' else 'backbone'])
    paper = recipe(hint=hint)
    paper['accelerate'] = accelerate
    model = trained(distil(KINDS[kind](), distillation=paper))
    calls = pairs.spy(model)
    values = pairs.losses(model)
    assert all(values[name].isfinite() for name in LOG_NAMES.values())
    return {name: [call[1].float() for call in given] for name, given in calls.items()}


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize(
    ('accelerate', 'tolerance'),
    [
        (dict(fuse_conv_bn=True), 1e-4),
        (dict(channels_last=True), 1e-4),
        (dict(roi_align=True), 1e-4),
        (dict(dtype='bfloat16'), 0.05),
        (
            dict(fuse_conv_bn=True, channels_last=True, roi_align=True, dtype='bfloat16'),
            0.05,
        ),
    ],
    ids=str,
)
def test_the_answers_are_the_exact_ones(kind, accelerate, tolerance):
    exact, cheap = answers(kind, None), answers(kind, accelerate)
    assert exact.keys() == cheap.keys() == LOG_NAMES.keys()
    changed = False
    for name, rows in exact.items():
        assert len(rows) == len(cheap[name])
        for a, b in zip(rows, cheap[name], strict=True):
            if len(a):
                assert (a - b).abs().amax() <= tolerance * a.abs().amax(), name
                changed |= not torch.equal(a, b)
    assert changed or accelerate in (dict(channels_last=True), dict(roi_align=True))


def test_without_options_the_network_is_left_alone():
    model = trained(distil(pairs.fpn(), pairs.fpn(8)))
    before = {k: v.clone() for k, v in model.teacher.network.state_dict().items()}
    pairs.losses(model)
    after = model.teacher.network.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) for k in before)


def test_folding_takes_the_batch_norm_away_and_leaves_nothing_to_train():
    paper = recipe()
    paper['accelerate'] = dict(fuse_conv_bn=True)
    model = trained(distil(pairs.fpn(), pairs.fpn(8), paper))
    pairs.losses(model)
    network = model.teacher.network
    assert not any(isinstance(m, nn.BatchNorm2d) for m in network.modules())
    assert not any(p.requires_grad for p in network.parameters())
    assert any(isinstance(m, nn.BatchNorm2d) for m in model.modules())


def test_the_student_starts_from_the_teacher_as_its_file_has_it():
    """Folding comes after the copy: the neck's BatchNorm is copied, not an identity."""

    def network(width):
        config = pairs.fpn(width)
        config.neck.norm_cfg = dict(type='BN', requires_grad=True)
        return config

    started = []
    for accelerate in (None, dict(fuse_conv_bn=True)):
        paper = recipe('hint', start='teacher')
        paper['accelerate'] = accelerate
        started.append(distil(network(4), network(8), paper).neck.state_dict())
    assert any('running_mean' in key for key in started[0])
    assert all(torch.equal(started[0][k], started[1][k]) for k in started[0])


@pytest.mark.parametrize(
    ('option', 'layer'),
    [('fuse_conv_bn', 'backbone.layer1.0.bn1'), ('roi_align', 'roi_head.bbox_roi_extractor')],
)
def test_a_hint_at_a_replaced_layer_is_still_heard(option, layer):
    values = []
    for accelerate in (None, {option: True}):
        paper = recipe('hint', hint=dict(pairs=[layer]))
        paper['accelerate'] = accelerate
        values.append(pairs.losses(trained(distil(pairs.fpn(), pairs.fpn(8), paper))))
    torch.testing.assert_close(values[0]['loss_kd_hint'], values[1]['loss_kd_hint'], rtol=1e-4,
                               atol=1e-6)  # fmt: skip


class Steep(nn.Module):
    """One level; BatchNorm makes its values large, and none positive."""

    def __init__(self, weight: float) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        nn.init.constant_(self.bn.weight, weight)
        nn.init.constant_(self.bn.bias, -10 * weight)
        nn.init.uniform_(self.bn.running_mean, -0.5, 0.5)

    def extract_feat(self, image: torch.Tensor) -> list[torch.Tensor]:
        return [self.bn(self.conv(image))]


@pytest.mark.parametrize('weight', [1.0, 1e6])
def test_folding_is_judged_beside_the_largest_value(weight):
    network = Steep(weight).eval()
    image = torch.rand(1, 3, 16, 16)
    before = network.extract_feat(image)[0]
    assert before.max() < 0
    Acceleration(fuse_conv_bn=True).prepare(network)
    after = network.extract_feat(image)[0]
    torch.testing.assert_close(after, before, rtol=1e-3, atol=1e-3 * weight)
    assert not isinstance(network.bn, nn.BatchNorm2d)


def test_only_tensors_of_half_precision_become_float32():
    assert full(torch.ones(1, dtype=torch.bfloat16)).dtype == torch.float32
    assert full(torch.ones(1, dtype=torch.float64)).dtype == torch.float64
    assert full(None) is None


def test_a_network_that_folding_changes_is_refused():
    class Crossed(nn.Module):
        """BatchNorm that is run before the convolution it stands behind."""

        def __init__(self):
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
            self.bn.running_mean.fill_(1.0)

        def extract_feat(self, x):
            return [self.conv(self.bn(x))]

    with pytest.raises(ValueError, match="fuse_conv_bn changes this teacher's features"):
        Acceleration(fuse_conv_bn=True).prepare(Crossed().eval())


@pytest.mark.parametrize('aligned', [True, False], ids=['aligned', 'not aligned'])
@pytest.mark.parametrize('ratio', [0, 2])
@pytest.mark.parametrize('size', [(7, 7), (3, 5)], ids=str)
@pytest.mark.parametrize('strides', [(4,), (4, 8, 16)], ids=str)
@pytest.mark.parametrize('grown', [None, 1.3])
def test_gathered_rois_are_mmdetections(aligned, ratio, size, strides, grown):
    """Boxes of all sizes, over the edges, without a pixel, outside the image."""
    generator = torch.Generator().manual_seed(0)
    features = [
        torch.randn(2, 6, 80 // stride, 120 // stride, generator=generator) for stride in strides
    ]
    wide, high = 120, 80
    points = torch.rand(200, 2, 2, generator=generator) * torch.tensor([wide, high])
    boxes = torch.cat([points.amin(1), points.amax(1)], 1)
    boxes[:20] += torch.tensor([wide, 0, wide, 0]) / 2
    boxes[20:40] -= torch.tensor([0, high, 0, high]) / 2
    boxes[40:50, 2:] = boxes[40:50, :2]
    boxes[50] = torch.tensor([0, 0, wide, high])
    boxes[51] = torch.tensor([2 * wide, 2 * high, 3 * wide, 3 * high])
    boxes[52] = torch.tensor([0, 0, 28, 28])  # whole cells to a bin
    image = torch.randint(2, (200, 1), generator=generator)
    rois = torch.cat([image, boxes], 1)
    extractor = SingleRoIExtractor(
        dict(type='RoIAlign', output_size=size, sampling_ratio=ratio, aligned=aligned),
        out_channels=6, featmap_strides=list(strides), finest_scale=14,
    )  # fmt: skip
    if len(strides) > 1:
        assert len(extractor.map_roi_levels(rois, len(strides)).unique()) == len(strides)
    expected = extractor(features, rois, grown)
    assert GatheredRoIExtractor.replaces(extractor)
    extractor.__class__ = GatheredRoIExtractor
    for lay in (torch.contiguous_format, torch.channels_last):
        got = extractor([f.to(memory_format=lay) for f in features], rois, grown)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=2e-5)
    assert got[52].abs().max() > 0
    assert got[51].abs().max() == 0
    assert extractor(features, rois[:0]).shape == (0, 6, *size)
    rois[3:6, 1:] = torch.nan  # of a student that is about to be stopped
    assert torch.equal(extractor(features, rois, grown)[6:], got[6:])


def test_an_extractor_that_takes_the_maximum_is_not_replaced():
    layer = dict(type='RoIAlign', output_size=2, pool_mode='max')
    extractor = SingleRoIExtractor(layer, out_channels=6, featmap_strides=[4])
    assert not GatheredRoIExtractor.replaces(extractor)


def test_rois_of_the_teacher_alone_are_gathered():
    paper = recipe()
    paper['accelerate'] = dict(roi_align=True)
    model = distil(pairs.fpn(), pairs.fpn(8), paper)
    pairs.losses(model)
    assert any(isinstance(m, GatheredRoIExtractor) for m in model.teacher.network.modules())
    assert not any(isinstance(m, GatheredRoIExtractor) for m in model.modules())


def test_an_extractor_that_cannot_be_replaced_still_gets_what_it_can_read():
    """The sum over all levels is MMDetection's, whose RoIAlign passes over strides."""
    paper = recipe()
    teacher = pairs.fpn(8)
    extractor = teacher['roi_head']['bbox_roi_extractor']
    extractor.update(type='GenericRoIExtractor', aggregation='sum')
    extractor.pop('finest_scale', None)
    expected = pairs.losses(distil(pairs.fpn(), teacher, paper))
    paper['accelerate'] = dict(roi_align=True, channels_last=True)
    got = pairs.losses(distil(pairs.fpn(), teacher, paper))
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=1e-4, atol=1e-6)


def test_features_for_rois_are_laid_out_by_channel():
    """RoIAlign reads memory as if they were, whatever the tensor's own strides say."""
    feature = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    for dtype, expected in ((torch.float32, torch.float32), (torch.bfloat16, torch.float32)):
        (given,) = Acceleration().for_rois([feature.to(dtype)], torch.nn.Identity())
        assert given.is_contiguous()
        assert given.dtype == expected
        assert torch.equal(given, feature.to(dtype).to(expected))


@pytest.mark.parametrize(
    ('accelerate', 'message'),
    [
        (dict(dtype='int8'), "dtype='int8' must be None, 'bfloat16' or 'float16'"),
        (dict(fuse_conv_bn=1), 'fuse_conv_bn=1 must be True or False'),
        (dict(chanels_last=True), "no entry 'chanels_last'; did you mean channels_last"),
    ],
)
def test_an_option_that_cannot_be_is_refused(accelerate, message):
    paper = recipe()
    paper['accelerate'] = accelerate
    with pytest.raises(ValueError, match=message):
        distil(pairs.fpn(), pairs.fpn(8), paper)


def test_the_startup_table_says_how_it_runs():
    paper = recipe()
    assert ' runs ' not in startup_table(distil(pairs.fpn(), pairs.fpn(8), paper))
    paper['accelerate'] = dict(fuse_conv_bn=True, dtype='bfloat16')
    table = startup_table(distil(pairs.fpn(), pairs.fpn(8), paper))
    assert 'fuse_conv_bn, dtype=bfloat16' in table
