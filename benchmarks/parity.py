"""Whether mmkd's methods equal the published ones: values, parts and gradients against files.

    python benchmarks/parity.py tests/golden

Each file of the folder holds seeded inputs, parameters and weights, and what public code makes of
them in float64: outputs and the gradient with respect to the student's side. Its ``name`` says
which class is meant ('cwd', or 'cwd_' and anything); a file without inputs is passed over. Printed
is the largest deviation, relative to the largest entry, in float64 and float32. The exit status is
1 if one is above 1e-10 or 1e-5, or if a file cannot be compared.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mmkd
from mmkd.layer_pairs import Layer, LayerPair
from mmkd.methods.base import spatial_attention, standardised
from mmkd.methods.fgd import focal_masks, published_cells
from mmkd.methods.fgfi import anchor_overlaps, imitation_masks
from mmkd.models.heads import Rows

BOXES = ('gt_bboxes', 'gt_boxes')
GEOMETRY = ('base_anchors', 'uniform')
"""Kept in float64: what a mask is made of, where a rounding would move a cell."""
INTEGERS = ('labels', 'img_shapes', 'sampled_per_image')
TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-5}
Case = Callable[[dict, dict, dict], dict]
CASES: dict[str, Case] = {}
"""By name: parameters, inputs (tensors) and weights to what the file calls its outputs; weights are
replaced by the parameters that they were loaded into."""


def case(function: Case) -> Case:
    CASES[function.__name__] = function
    return function


# ------------------------------------------------------------------------------------ the methods


@case
def cwd(p: dict, x: dict, weights: dict) -> dict:
    return over_levels(mmkd.CWD(p.get('tau', 1.0)), p, x)


@case
def at(p: dict, x: dict, weights: dict) -> dict:
    return over_levels(mmkd.AT(), p, x)


@case
def pkd(p: dict, x: dict, weights: dict) -> dict:
    """Where only heights differ, the public class brings one network's maps to the other's size."""
    pairs = []
    for own, theirs in zip(x['student'], x['teacher'], strict=True):
        if own.size(2) != theirs.size(2):
            if p.get('resize_stu', True):
                own = F.interpolate(own, theirs.shape[2:], mode='bilinear')
            else:
                theirs = F.interpolate(theirs, own.shape[2:], mode='bilinear')
        pairs.append((own, theirs))
    student, teacher = zip(*pairs, strict=True)
    return over_levels(mmkd.PKD(), p, dict(student=student, teacher=teacher))


@case
def mgd(p: dict, x: dict, weights: dict) -> dict:
    term = mmkd.MGD(p['lambda_mgd'], p.get('mask_on_channel', False))
    term.loss_weight, term.draw = p['alpha_mgd'], lambda maps: x['uniform']
    (layers,) = built(term, [(x['student'], x['teacher'])])
    names = {r'generation\.': ''}
    (own,) = adapted(term, [x['student']], weights)
    load(layers, weights, names)
    kept = x['uniform'] <= 1 - term.ratio
    return dict(
        loss=total(term, term.compare(own, x['teacher'], layers, None)),
        generated=layers(own * kept),
    )


@case
def fgd(p: dict, x: dict, weights: dict) -> dict:
    names = ('alpha_fgd', 'beta_fgd', 'gamma_fgd', 'lambda_fgd')
    term = mmkd.FGD(p['temp'], *(p[name] for name in names), as_published=True)
    (layers,) = built(term, [(x['student'], x['teacher'])])
    (own,) = adapted(term, [x['student']], weights)
    ours = {
        r'conv_mask_(s|t)': r'\1.attention',
        r'channel_add_conv_(s|t)': r'\1.add',
        r'^s\.': 'student.',
        r'^t\.': 'teacher.',
    }
    load(layers, weights, ours)
    boxes = [
        published_cells(each, shape, own.shape[-2:])
        for each, shape in zip(x['gt_bboxes'], x['img_shapes'], strict=True)
    ]
    loss = total(term, term.compare(own, x['teacher'], layers, boxes))
    term.weights = [1.0] * 4
    parts = term.compare(own, x['teacher'], layers, boxes)
    masks = focal_masks(boxes, own[:, 0])
    return dict(
        {f'{name}_loss': part for name, part in parts.items()},
        loss=loss, mask_fg=masks[0], mask_bg=masks[1],
    )  # fmt: skip


@case
def fbkd(p: dict, x: dict, weights: dict) -> dict:
    if p.get('mode', 'dot_product') != 'dot_product':
        raise ValueError(f"mode {p['mode']!r} is none of FBKD's, which is dot_product")
    pool = p.get('maxpool_stride', 2)
    term = mmkd.FBKD(
        p['weights'], p['reduction'], pool, p['spatial_T'], p['channel_T'], as_published=True
    )
    term.loss_weight = p.get('loss_weight', 1.0)
    (layers,) = built(term, [(x['student'], x['teacher'])])
    for block in (layers['student'], layers['teacher']):
        block.pools = block.pools if p.get('sub_sample', True) else []
    ours = {
        r'channel_wise_adaptation': 'channels',
        r'spatial_wise_adaptation': 'places',
        r'non_local_adaptation': 'relations',
        r'adaptation_layers': 'maps',
        r'_non_local\.g(\.0)*\.conv': '.value',
        r'_non_local\.theta\.conv': '.query',
        r'_non_local\.phi(\.0)*\.conv': '.key',
        r'_non_local\.conv_out\.conv': '.out',
        r'_non_local\.conv_out\.bn': '.norm',
    }
    load(layers, weights, ours)
    loss = total(term, term.compare(x['student'], x['teacher'], layers, None))
    term.weights = [1.0] * 4
    parts = term.compare(x['student'], x['teacher'], layers, None)
    parts['mask_l2'] = parts.pop('mask')
    connectors = {
        f'{who}_connector': dict(
            spatial_mask=spatial_attention(x[who], p['spatial_T'])[:, None],
        )
        for who in ('student', 'teacher')
    }
    return dict(connectors, loss=loss, parts_unweighted=parts)


@case
def reviewkd(p: dict, x: dict, weights: dict) -> dict:
    term = mmkd.ReviewKD(mid_channels=p['mid_channel'])
    term.loss_weight = p.get('loss_weight', 1.0)
    levels = list(zip(x['student'], x['teacher'], strict=True))
    layers = built(term, levels)
    ours = {r'conv1': 'inner', r'conv2': 'outer', r'att_conv\.0': 'attention'}
    for index, layer in enumerate(layers):
        mine = {k: w for k, w in weights.items() if k.startswith(f'level{index}.')}
        load(layer, mine, {r'^level\d+\.': '', **ours})
    fused, coarser = [], None
    for (own, _), fuse in reversed(list(zip(levels, layers, strict=True))):
        found, coarser = fuse(own, coarser)
        fused.insert(0, found)
    student, teacher = map(list, zip(*levels, strict=True))
    loss = total(term, term(student, teacher, layers, [None] * len(student)))
    return dict(loss=loss, fused=fused)


@case
def reviewkd_hcl(p: dict, x: dict, weights: dict) -> dict:
    term = mmkd.ReviewKD(fusion=False)
    term.loss_weight = p.get('loss_weight', 1.0)
    each = [
        total(term, term([own], [theirs], [None], [None]))
        for own, theirs in zip(x['student'], x['teacher'], strict=True)
    ]
    return dict(loss=sum(each), per_level=each)


@case
def fgfi(p: dict, x: dict, weights: dict) -> dict:
    term = mmkd.FGFI(p.get('psi', 0.5), as_published=True)
    term.loss_weight = p['weight']
    height, width = x['student'].shape[-2:]
    places = torch.cartesian_prod(torch.arange(height), torch.arange(width)).flip(1)
    steps = (places * p['stride']).view(height, width, 1, 2).repeat(1, 1, 1, 2)
    anchors = x['base_anchors'] + steps
    overlaps = []
    for boxes in x['gt_boxes']:
        end = (boxes.sum(1) == 0).nonzero()  # rows of zeros fill the list up
        boxes = boxes[: int(end[0]) if len(end) else None, :4]
        overlaps.append(anchor_overlaps(boxes, anchors, 1))
    (mask,) = imitation_masks([overlaps], term.psi)
    loss = total(term, term([x['student']], [x['teacher']], [None], [overlaps]))
    return dict(loss=loss, mask=mask)


@case
def defeat(p: dict, x: dict, weights: dict) -> dict:
    term = mmkd.DeFeat(p['hint_neck_w'], p['hint_neck_back_w'], as_published=True)
    head = mmkd.DeFeatHead(
        p['head_cls_w'], p['head_cls_back_w'], p['head_cls_T'], as_published=True
    )
    student, teacher = list(x['student']), list(x['teacher'])
    masks = [
        term.mask(x['gt_bboxes'], level, len(student), stride, maps.shape[-2:])
        for level, (maps, stride) in enumerate(zip(student, p['strides'], strict=True))
    ]
    neck = term(student, teacher, [None] * len(student), masks)
    logits = head.compare(rows(x['student_cls_score'], x['teacher_cls_score'], x['labels']))
    parts = dict(
        losskd_hcls=logits['objects'], losskd_hcls_back=logits['background'],
        losskd_neck=neck['objects'], losskd_neck_back=neck['background'],
    )  # fmt: skip
    return dict(loss=sum(parts.values()), parts=parts, gt_mask=masks)


@case
def frs(p: dict, x: dict, weights: dict) -> dict:
    term, one = mmkd.FRS(p['feat_weight'], p['cls_weight']), mmkd.FRS(1.0, 1.0)
    scores = list(zip(x['teacher_rpn_logits'], x['student_rpn_logits'], strict=True))
    each = list(x['student']), list(x['teacher']), [None] * len(scores), scores
    parts = one(*each)
    return dict(
        loss=total(term, term(*each)),
        feat_loss_unweighted=parts['features'],
        cls_loss_unweighted=parts['rpn'],
        mask=[theirs.sigmoid().amax(1) for theirs, _ in scores],
    )


@case
def kl(p: dict, x: dict, weights: dict) -> dict:
    term = mmkd.KL(p['tau'])
    term.loss_weight = p.get('loss_weight', 1.0)
    student, teacher = x['student'], x['teacher']
    how = p.get('reduction', 'batchmean')
    over = {'batchmean': len(student), 'sum': 1, 'mean': student.numel()}[how]
    student, teacher = (z.movedim(1, -1).reshape(-1, z.size(1)) for z in (student, teacher))
    return dict(loss=total(term, term.compare(rows(student, teacher, None, over))))


@case
def logit_std(p: dict, x: dict, weights: dict) -> dict:
    term = mmkd.KL(p['temperature'], standardise=True)
    term.loss_weight = p.get('loss_weight', 1.0)
    loss = total(term, term.compare(rows(x['student'], x['teacher'])))
    return dict(loss=loss, student_standardised=standardised(x['student'], 1e-7))


@case
def dkd(p: dict, x: dict, weights: dict) -> dict:
    term, given = mmkd.DKD(p['alpha'], p['beta'], p['temperature']), of_rows(x)
    parts = mmkd.DKD(1.0, 1.0, p['temperature']).compare(given)
    return dict(
        loss=total(term, term.compare(given)),
        target_class_part=parts['target'],
        non_target_part=parts['rest'],
    )


@case
def dist(p: dict, x: dict, weights: dict) -> dict:
    term = mmkd.DIST(p['inter_loss_weight'], p['intra_loss_weight'], p['tau'])
    term.loss_weight = p.get('loss_weight', 1.0)
    given = of_rows(x)
    parts = mmkd.DIST(1.0, 1.0, p['tau']).compare(given)
    return dict(
        loss=total(term, term.compare(given)),
        inter_class=parts['inter'],
        intra_class=parts['intra'],
    )


@case
def nkd(p: dict, x: dict, weights: dict) -> dict:
    term = mmkd.NKD(p['gamma'], p['temp'])
    parts = term.compare(of_rows(x))
    return dict(loss=total(term, parts), target_part=parts['target'])


@case
def crosskd_roi(p: dict, x: dict, weights: dict) -> dict:
    term = mmkd.CrossKD(tau=p['T'], cls_weight=p['cls_weight'], reg_weight=p['reg_weight'])
    crossed = x['reused_cls_score'], x['reused_bbox_pred']
    own = x['teacher_cls_score'], x['teacher_bbox_pred']
    parts = term.compare_rois(crossed, own, 'softmax')
    return dict(
        loss=total(term, parts), loss_cls_kd=parts['cls'],
        loss_reg_kd=parts.get('reg', x['reused_bbox_pred'].sum() * 0),
    )  # fmt: skip


# ------------------------------------------------------------------------------------ their parts


def total(term: Any, value: Any) -> Tensor:
    """The weighted loss."""
    return sum(term.weighed(value).values())


def over_levels(term: Any, p: dict, x: dict) -> dict:
    term.loss_weight = p.get('loss_weight', term.loss_weight)
    each = [
        total(term, term.compare(own, theirs, None, None))
        for own, theirs in zip(x['student'], x['teacher'], strict=True)
    ]
    return dict(loss=sum(each), per_level=each)


def rows(student: Tensor, teacher: Tensor, target: Any = None, over: Any = None) -> Rows:
    return Rows(student, teacher, target, None, over, background=True)


def of_rows(x: dict) -> Rows:
    labels = x.get('labels')
    if labels is not None and labels.dim() > 1:
        labels = labels.argmax(1)
    return rows(x['student'], x['teacher'], labels)


def built(term: Any, levels: list[tuple[Tensor, Tensor]]) -> list[nn.Module]:
    """The term's layers, for maps of these widths; fine to coarse."""
    pairs = []
    for index, maps in enumerate(levels):
        layer, side = Layer('neck', index), max(64 >> index, 1)
        shapes = tuple((1, each.size(1), side, side) for each in maps)
        pairs.append(LayerPair(f'neck_{index}', layer, layer, shapes))
    term.bind(pairs)
    term.to(levels[0][0].dtype)
    return [term.layers[pair.name] for pair in pairs]


def load(module: nn.Module, weights: dict, names: Mapping[str, str]) -> None:
    """Load ``weights`` by our names, and put the parameters in their place."""
    own, state = dict(module.named_parameters()), {}
    for theirs in [name for name in weights if 'align' not in name.partition('.')[0]]:
        name = theirs
        for pattern, ours in names.items():
            name = re.sub(pattern, ours, name)
        state[name], weights[theirs] = weights[theirs], own[name]
    missing, unknown = module.load_state_dict(state, strict=False)
    if unknown or [name for name in missing if name in own]:
        raise ValueError(f'weights {unknown} are not ours, and {missing} are missing')


def adapted(term: Any, maps: list[Tensor], weights: dict) -> list[Tensor]:
    """Maps behind the term's adaptation layers, which ``align.*`` stands for."""
    layers = list(term.adapters.values())
    mine = {k: w for k, w in weights.items() if 'align' in k.partition('.')[0]}
    for name, value in mine.items():
        layers[0].get_parameter(name.rpartition('.')[2]).data.copy_(value)
        weights[name] = layers[0].get_parameter(name.rpartition('.')[2])
    return [layer(each) for layer, each in zip(layers, maps, strict=True)]


# ------------------------------------------------------------------------------------ the files


def tensors(value: Any, dtype: torch.dtype, name: str = '') -> Any:
    """Nested lists as a tensor, or as a list of tensors where their lengths differ."""
    if isinstance(value, dict):
        return {key: tensors(each, dtype, key) for key, each in value.items()}
    if name in BOXES:
        width = max((len(box) for image in value for box in image), default=4)
        return [torch.tensor(image, dtype=torch.float64).view(-1, width) for image in value]
    dtype = torch.float64 if name in GEOMETRY else dtype
    try:
        return torch.tensor(value, dtype=torch.long if name in INTEGERS else dtype)
    except (TypeError, ValueError):
        return [tensors(each, dtype, name) for each in value]


def leaves(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    else:
        for each in value.values() if isinstance(value, dict) else value:
            yield from leaves(each)


def deviation(ours: Any, theirs: Any) -> float:
    """The largest difference over the largest entry of what is expected."""
    apart, largest = 0.0, 0.0
    ours, theirs = list(leaves(ours)), list(leaves(theirs))
    if sum(t.numel() for t in ours) != sum(t.numel() for t in theirs):
        raise ValueError('the sizes of ours and theirs differ')
    flat = [torch.cat([t.detach().double().flatten() for t in side]) for side in (ours, theirs)]
    if not flat[0].numel():
        return 0.0
    apart, largest = float((flat[0] - flat[1]).abs().max()), float(flat[1].abs().max())
    return apart / largest if largest else apart


def compare(data: dict, dtype: torch.dtype) -> dict[str, float]:
    """The largest deviation of value, parts and gradient."""
    known = [k for k in CASES if data['name'] == k or data['name'].startswith(f'{k}_')]
    if not known:
        raise ValueError(f'no class belongs to the name {data["name"]!r}')
    x = tensors(data['inputs'], dtype)
    weights = {n: w for side in [k for k in x if 'weights' in k] for n, w in x.pop(side).items()}
    wanted = {k: v for k, v in data['gradient'].items() if k != 'weights'}
    for name in wanted:
        for leaf in leaves(x[name]):
            leaf.requires_grad_()
    found = CASES[max(known, key=len)](data['parameters'], x, weights)
    expected = tensors(data['outputs'], torch.float64)
    result = dict(value=deviation(found['loss'], expected['loss']), parts=0.0, gradient=0.0)
    result['parts'] = max(
        [deviation(ours, theirs) for ours, theirs in _both(found, expected)], default=0.0
    )
    inputs = {name: list(leaves(x[name])) for name in wanted}
    for name, theirs in data['gradient'].get('weights', {}).items():
        wanted[name], inputs[name] = theirs, [weights[name]]
    flat = [leaf for each in inputs.values() for leaf in each]
    gradients = iter(torch.autograd.grad(found['loss'], flat, allow_unused=True))
    for name, theirs in wanted.items():
        own = [next(gradients) for _ in inputs[name]]
        pairs = zip(own, inputs[name], strict=True)
        own = [torch.zeros_like(x) if gradient is None else gradient for gradient, x in pairs]
        apart = deviation(own, tensors(theirs, torch.float64))
        result['gradient'] = max(result['gradient'], apart)
    return result


def _both(ours: dict, theirs: dict) -> Iterator[tuple[Any, Any]]:
    for name, value in ours.items():
        if isinstance(value, dict):
            yield from _both(value, theirs.get(name, {}))
        elif name != 'loss' and name in theirs:
            yield value, theirs[name]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('folder', type=Path, help='of *.json files')
    folder = parser.parse_args(argv).folder
    paths, compared, failed = sorted(folder.glob('*.json')), 0, 0
    print(f'{"file":24}{"dtype":9}{"value":>9}{"parts":>9}{"gradient":>10}')
    for path in paths:
        data = json.loads(path.read_text(encoding='utf-8'))
        if 'inputs' not in data:
            print(f'{path.stem:24}no inputs: passed over')
            continue
        compared += 1
        for dtype, tolerance in TOLERANCES.items():
            label = f'{path.stem:24}{str(dtype).removeprefix("torch."):9}'
            try:
                found = compare(data, dtype)
            except Exception as error:  # what one file lacks, say; the others are compared
                print(f'{label}{type(error).__name__}: {error}')
                failed += 1
                continue
            wrong = not all(each <= tolerance for each in found.values())
            failed += wrong
            cells = f'{found["value"]:9.0e}{found["parts"]:9.0e}{found["gradient"]:10.0e}'
            print(f'{label}{cells}' + (f'  ABOVE {tolerance:g}' if wrong else ''))
    if not compared:
        print(f'{folder} has no file to compare')
    return int(failed > 0 or not compared)


if __name__ == '__main__':
    sys.exit(main())
