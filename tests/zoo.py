"""Tiny versions of every kind of two-stage detector in MMDetection's zoo, and one step of a pair.

A network is the model of a zoo config with a ResNet-18 of width 4 (where the backbone is a ResNet
before an FPN), narrow heads, few boxes and three classes; everything that makes its heads what they
are stays.
"""

import copy
import functools
import re

import numpy as np
import pairs
import torch
from mmdet.models.backbones.trident_resnet import TridentConv
from mmdet.structures.mask import BitmapMasks
from mmengine.config import ConfigDict
from mmengine.hub import get_config
from mmengine.structures import PixelData

CONFIGS = {
    'Faster R-CNN': 'faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py',
    'C4': 'faster_rcnn/faster-rcnn_r50-caffe_c4-1x_coco.py',
    'DC5': 'faster_rcnn/faster-rcnn_r50-caffe-dc5_1x_coco.py',
    'OHEM': 'faster_rcnn/faster-rcnn_r50_fpn_ohem_1x_coco.py',
    'GIoU': 'faster_rcnn/faster-rcnn_r50_fpn_giou_1x_coco.py',
    'Mask R-CNN': 'mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py',
    'Cascade': 'cascade_rcnn/cascade-rcnn_r50_fpn_1x_coco.py',
    'Cascade Mask': 'cascade_rcnn/cascade-mask-rcnn_r50_fpn_1x_coco.py',
    'Double-Head': 'double_heads/dh-faster-rcnn_r50_fpn_1x_coco.py',
    'Dynamic': 'dynamic_rcnn/dynamic-rcnn_r50_fpn_1x_coco.py',
    'Libra': 'libra_rcnn/libra-faster-rcnn_r50_fpn_1x_coco.py',
    'PISA': 'pisa/faster-rcnn_r50_fpn_pisa_1x_coco.py',
    'Mask Scoring': 'ms_rcnn/ms-rcnn_r50-caffe_fpn_1x_coco.py',
    'PointRend': 'point_rend/point-rend_r50-caffe_fpn_ms-1x_coco.py',
    'HTC': 'htc/htc_r50_fpn_1x_coco.py',
    'SCNet': 'scnet/scnet_r50_fpn_1x_coco.py',
    'Trident': 'tridentnet/tridentnet_r50-caffe_1x_coco.py',
    'Seesaw': 'seesaw_loss/mask-rcnn_r50_fpn_seesaw-loss_random-ms-2x_lvis-v1.py',
    'Grid': 'grid_rcnn/grid-rcnn_r50_fpn_gn-head_2x_coco.py',
    'SABL': 'sabl/sabl-faster-rcnn_r50_fpn_1x_coco.py',
    'GA-RPN': 'guided_anchoring/ga-faster-rcnn_r50-caffe_fpn_1x_coco.py',
    'Cascade RPN': 'cascade_rpn/cascade-rpn_faster-rcnn_r50-caffe_fpn_1x_coco.py',
    'FCOS RPN': 'faster_rcnn/faster-rcnn_r50_fpn_fcos-rpn_1x_coco.py',
    'Sparse': 'sparse_rcnn/sparse-rcnn_r50_fpn_1x_coco.py',
    'CrowdDet': 'crowddet/crowddet-rcnn_r50_fpn_8xb2-30e_crowdhuman.py',
}
ONE_STAGE = {
    'RetinaNet': 'retinanet/retinanet_r18_fpn_1x_coco.py',
    'FCOS': 'fcos/fcos_r50-caffe_fpn_gn-head_1x_coco.py',
    'DETR-like (DINO)': 'dino/dino-4scale_r50_8xb2-12e_coco.py',
}
WITHOUT_NECK = ('C4', 'DC5', 'Trident')
ATTENTION = ('Sparse', 'DETR-like (DINO)')
"""Heads whose attention wants their width."""
MOST = dict(
    num=64,
    nms_pre=100,
    max_per_img=100,
    num_proposals=32,
    num_convs=2,
    feedforward_channels=64,
)
"""Boxes sampled and proposed, for RoIAlign takes most of the time; layers of heads."""
TERMS = tuple(pairs.LOG_NAMES)


@functools.cache
def _zoo(name: str) -> ConfigDict:
    return get_config(f'mmdet::{name}').model


def tiny(name: str) -> dict:
    """The model config of a tiny network of this kind."""
    if name == 'C4':
        return pairs.c4()
    model = copy.deepcopy(_zoo({**CONFIGS, **ONE_STAGE}[name]))
    _narrow(model, keep_width=name in ATTENTION)
    if name == 'Sparse':  # 18 million parameters in each of its six stages
        head = model.roi_head
        head.update(num_stages=2, stage_loss_weights=[1, 1], bbox_head=head.bbox_head[:2])
    if name == 'CrowdDet':  # torchvision's RoIAlign is another package
        model.roi_head.bbox_roi_extractor.roi_layer.use_torchvision = False
        # A resize inside forward, to 1400 x 800: an eighth of it suits the images here.
        model.data_preprocessor.batch_augments[0].scale = (175, 100)
    backbone = model.backbone
    backbone.update(init_cfg=None, norm_eval=False, frozen_stages=-1)
    backbone.norm_cfg = dict(type='BN', requires_grad=True)
    backbone.update(depth=18, base_channels=4, style='pytorch')
    widths = [4 * 2**i for i in range(4)]
    if name == 'Trident':
        backbone.depth = 50  # its branches are bottlenecks
        # The shared head takes what a full-width backbone gives.
        del model.roi_head.shared_head
        model.rpn_head.in_channels = model.roi_head.bbox_head.in_channels = 4 * widths[2]
        model.roi_head.bbox_roi_extractor.out_channels = 4 * widths[2]
        model.roi_head.bbox_head.roi_feat_size = 14
    elif name == 'DC5':
        model.rpn_head.in_channels = model.roi_head.bbox_head.in_channels = widths[3]
        model.roi_head.bbox_roi_extractor.out_channels = widths[3]
    else:
        neck = model.neck[0] if isinstance(model.neck, list) else model.neck
        neck.in_channels = [widths[i] for i in backbone.out_indices]
    generator = (model.get('rpn_head') or {}).get('anchor_generator') or {}
    if 'scales' in generator and name != 'DC5':
        generator.scales = [4]
    return model


def _narrow(node: object, keep_width: bool) -> None:
    if isinstance(node, dict):
        for key, value in list(node.items()):
            if 'channels' in key and isinstance(value, int) and value >= 128 and not keep_width:
                # Group normalisation wants 32 of them.
                node[key] = 32 if value in (256, 1024) else 16
            elif key == 'num_classes' and isinstance(value, int) and value > 3:
                node[key] = pairs.CLASSES
            elif key in MOST and isinstance(value, int):
                node[key] = min(value, MOST[key])
            else:
                _narrow(value, keep_width)
    elif isinstance(node, (list, tuple)):
        for value in node:
            _narrow(value, keep_width)


def batch(size: int = 128, seed: int = 0) -> dict:
    """Two images with boxes, masks and a map of stuff."""
    data = pairs.batch((3, 2), size, seed, sides=(16, 60))
    for sample in data['data_samples']:
        boxes = sample.gt_instances.bboxes.round().int().tolist()
        masks = np.zeros((len(boxes), size, size), np.uint8)
        for mask, (left, top, right, bottom) in zip(masks, boxes, strict=True):
            mask[top:bottom, left:right] = 1
        sample.gt_instances.masks = BitmapMasks(masks, size, size)
        stuff = torch.zeros(1, size // 8, size // 8, dtype=torch.long)
        sample.gt_sem_seg = PixelData(sem_seg=stuff)
    return data


def recipe_for(student: str, teacher: str, terms: tuple[str, ...] = TERMS) -> dict:
    """The paper's recipe with these terms; hints from neck to neck, or where there is none."""
    layers = ['backbone[0]' if name in WITHOUT_NECK else 'neck[2]' for name in (student, teacher)]
    pair = dict(student=layers[0], teacher=layers[1])
    return pairs.recipe(*terms, hint=dict(pairs=[pair])) if terms else pairs.off()


def config(student: str, teacher: str, terms: tuple[str, ...] = TERMS) -> dict:
    """The model config of the pair."""
    model = pairs.distilled(tiny(student), tiny(teacher), recipe_for(student, teacher, terms))
    if student == 'Trident':
        model['type'] = 'mmkd.KnowledgeDistillationTridentFasterRCNN'
    return model


def pair(student: str, teacher: str, terms: tuple[str, ...] = TERMS) -> torch.nn.Module:
    """Builds the pair."""
    return pairs.build(config(student, teacher, terms))


def settle(network: torch.nn.Module) -> None:
    """Initialise what MMDetection leaves as the memory was."""
    for module in network.modules():
        if isinstance(module, TridentConv):
            torch.nn.init.kaiming_normal_(module.weight)


def steps(student: str, teacher: str, terms: tuple[str, ...], count: int = 2) -> dict:
    """Builds the pair and takes optimizer steps.

    Returns:
        The losses of the last.
    """
    model = pair(student, teacher, terms)
    settle(model)
    settle(model.teacher.network)
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    for _ in range(count):
        data = model.data_preprocessor(batch(), True)
        values = model(**data, mode='loss')
        optimizer.zero_grad()
        pairs.total(model, values).backward()
        gradients = pairs.gradients(model).values()
        assert all(g.isfinite().all() for g in gradients), 'a gradient is not finite'
        optimizer.step()
    kd = {k for k in values if '_kd_' in k}
    assert kd == {pairs.LOG_NAMES[t] for t in model.kd_terms}, kd
    assert not model.unproven, model.unproven
    return values


def outcome(student: str, teacher: str) -> tuple[tuple[str, ...], list[str]]:
    """Which terms of a pair train, and the messages by which the others were refused.

    A user who follows the messages turns off what they name; so does this.

    Returns:
        The terms that trained, in the order of the log; none where the pair is refused altogether.
    """
    terms, messages = TERMS, []
    while terms:
        try:
            steps(student, teacher, terms)
        except ValueError as error:
            named = re.findall(r'distillation\.(\w+)\.loss_weight=0', str(error))
            left = tuple(t for t in terms if t not in named)
            messages.append(str(error))
            if left == terms:
                return (), messages
            terms = left
        else:
            return terms, messages
    return (), messages


def cell(terms: tuple[str, ...]) -> str:
    """An entry of the matrix: which terms of a pair train."""
    if terms == TERMS:
        return 'all'
    parts = []
    if 'rpn_cls' in terms:
        parts.append('rpn')
    if 'rcnn_cls' in terms:
        parts.append('rcnn' if 'rcnn_bbox' in terms else 'rcnn cls')
    if 'hint' in terms:
        parts.append('hint')
    return ', '.join(parts) or 'refused'


def terms_of(entry: str) -> tuple[str, ...]:
    """The terms of an entry of the matrix."""
    named = {
        'all': TERMS, 'rpn': ('rpn_cls', 'rpn_bbox'), 'rcnn': ('rcnn_cls', 'rcnn_bbox'),
        'rcnn cls': ('rcnn_cls',), 'hint': ('hint',), 'refused': (),
    }  # fmt: skip
    return tuple(term for part in entry.split(', ') for term in named[part])
