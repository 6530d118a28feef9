"""Tiny networks and batches for tests of the detector: every kind of head, in milliseconds.

A network is the model config of an MMDetection zoo config, narrowed; ``distil(student, teacher)``
makes the pair and builds it.
"""

import copy
import functools
from pathlib import Path

import torch
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmengine.config import Config, ConfigDict
from mmengine.hub import get_config
from mmengine.structures import BaseDataElement, InstanceData
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
CLASSES = 3
TERMS = ('rpn_cls', 'rpn_bbox', 'rcnn_cls', 'rcnn_bbox', 'hint')
LOG_NAMES = {
    'rpn_cls': 'loss_kd_rpn_cls',
    'rpn_bbox': 'loss_kd_rpn_bbox',
    'rcnn_cls': 'loss_kd_cls',
    'rcnn_bbox': 'loss_kd_bbox',
    'hint': 'loss_kd_hint',
}


@functools.cache
def _parsed(name: str) -> ConfigDict:
    return get_config(f'mmdet::{name}').model


def zoo(name: str) -> ConfigDict:
    """The model of an MMDetection config, with fewer proposals and nothing to download."""
    model = copy.deepcopy(_parsed(name))
    model.backbone.init_cfg = None
    model.backbone.frozen_stages = -1
    model.backbone.norm_eval = False
    model.train_cfg.rpn.sampler.num = 64
    model.train_cfg.rpn_proposal.update(nms_pre=60, max_per_img=60)
    return model


def fpn(width: int = 4, channels: int = 8, classes: int = CLASSES) -> ConfigDict:
    """Faster R-CNN with FPN and a ResNet-18 whose stages have ``width · (1, 2, 4, 8)`` channels."""
    model = zoo('faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py')
    _narrow(model, width, channels)
    model.train_cfg.rcnn.sampler.num = 32
    _box_head(model.roi_head.bbox_head, channels, classes)
    return model


def ohem() -> ConfigDict:
    """The same with online hard example mining."""
    model = fpn()
    model.train_cfg.rcnn.sampler.update(type='OHEMSampler')
    return model


def giou() -> ConfigDict:
    """The same with an RoI head that regresses decoded boxes under GIoU."""
    model = fpn()
    model.roi_head.bbox_head.update(
        reg_decoded_bbox=True, loss_bbox=dict(type='GIoULoss', loss_weight=10.0)
    )
    return model


def cascade() -> ConfigDict:
    """Cascade R-CNN, three stages, class-agnostic regression."""
    model = zoo('cascade_rcnn/cascade-rcnn_r50_fpn_1x_coco.py')
    _narrow(model, 4, 8)
    for sampler in model.train_cfg.rcnn:
        sampler.sampler.num = 32
    for head in model.roi_head.bbox_head:
        _box_head(head, 8, CLASSES)
    return model


def c4() -> ConfigDict:
    """Faster R-CNN on C4: no neck, the last stage of the backbone is the RoI head's."""
    model = zoo('faster_rcnn/faster-rcnn_r50-caffe_c4-1x_coco.py')
    for block in (model.backbone, model.roi_head.shared_head):
        block.update(norm_cfg=dict(type='BN', requires_grad=True), init_cfg=None)
    model.backbone.depth = 18
    # ResLayer has no narrow form: it takes what a full-width backbone gives.
    model.roi_head.shared_head.update(depth=18, norm_eval=False)
    model.rpn_head.update(in_channels=256, feat_channels=8)
    model.rpn_head.anchor_generator.scales = [1, 2]
    model.roi_head.bbox_roi_extractor.update(
        out_channels=256, roi_layer=dict(type='RoIAlign', output_size=4, sampling_ratio=1)
    )
    model.roi_head.bbox_head.update(in_channels=512, roi_feat_size=2, num_classes=CLASSES)
    model.train_cfg.rcnn.sampler.num = 32
    return model


def _narrow(model: ConfigDict, width: int, channels: int) -> None:
    model.backbone.update(depth=18, base_channels=width)
    model.neck.update(in_channels=[width * 2**i for i in range(4)], out_channels=channels)
    model.rpn_head.update(in_channels=channels, feat_channels=channels)
    model.rpn_head.anchor_generator.scales = [4]
    model.roi_head.bbox_roi_extractor.update(out_channels=channels)
    model.roi_head.bbox_roi_extractor.roi_layer.update(output_size=3, sampling_ratio=1)


def _box_head(head: ConfigDict, channels: int, classes: int) -> None:
    head.update(in_channels=channels, fc_out_channels=16, roi_feat_size=3, num_classes=classes)


@functools.cache
def _paper() -> dict:
    return Config.fromfile(ROOT / 'configs/_base_/chen2017.py').distillation.to_dict()


def recipe(*terms: str, start: str | None = None, **changes: dict) -> dict:
    """The paper's recipe with only ``terms`` on (all of them if none is named).

    Args:
        changes: entries of single terms, as in ``hint=dict(pairs=['backbone[1]'])``.
    """
    distillation = copy.deepcopy(_paper())
    for name in TERMS:
        distillation[name].update(changes.get(name, {}))
        if terms and name not in terms:
            distillation[name]['loss_weight'] = 0
    return {**distillation, 'start': start}


def off(start: str | None = None) -> dict:
    """The recipe with every term off: the user's own baseline."""
    distillation = recipe(start=start)
    for name in TERMS:
        distillation[name]['loss_weight'] = 0
    return distillation


def build(model: dict, seed: int = 0) -> nn.Module:
    """A network with the weights that it draws under ``seed``."""
    torch.manual_seed(seed)
    network = MODELS.build(copy.deepcopy(model))
    network.init_weights()
    network.guarded = True  # as if a runner had taken charge
    return network.train()


def distilled(
    student: dict, teacher: dict | str, distillation: dict, teacher_ckpt: str | None = 'random'
) -> dict:
    """The ten lines: the config of ``student`` as a distilled one."""
    model = copy.deepcopy(student)
    model['type'] = 'mmkd.KnowledgeDistillationTwoStageDetector'
    model['teacher_config'] = teacher if isinstance(teacher, str) else dict(model=teacher)
    model['teacher_ckpt'] = teacher_ckpt
    model['distillation'] = distillation
    return model


def distil(
    student: dict, teacher: dict | None = None, distillation: dict | None = None, seed: int = 0
) -> nn.Module:
    """Build the pair; the teacher, untrained, is of the student's kind unless given."""
    teacher = student if teacher is None else teacher
    return build(distilled(student, teacher, distillation or recipe()), seed)


def teach_itself(model: nn.Module) -> None:
    """Make the teacher equal to the student, and the student answer as a teacher does (eval)."""
    state = {k: v for k, v in model.state_dict().items() if not k.startswith('kd_terms.')}
    model.teacher.network.load_state_dict(state, strict=True)
    model.eval()


def batch(
    boxes: tuple[int, ...] = (2, 1),
    size: int | tuple[int, int] = 64,
    seed: int = 0,
    sides: tuple[int, int] = (12, 40),
) -> dict:
    """Raw images, one for each entry of ``boxes``, which says how many boxes it has.

    Args:
        boxes: how many boxes each image has.
        size: of the images in pixels, or (height, width).
        seed: of pixels and boxes.
        sides: the shortest and the longest side of a box; the default is what the anchors of the
            tiny networks match.
    """
    generator = torch.Generator().manual_seed(seed)
    height, width = (size, size) if isinstance(size, int) else size
    inputs, samples = [], []
    for count in boxes:
        inputs.append(
            torch.randint(256, (3, height, width), generator=generator, dtype=torch.uint8)
        )
        room = torch.tensor([width, height]) - sides[1]
        corner = torch.rand(count, 2, generator=generator) * room
        side = sides[0] + (sides[1] - sides[0]) * torch.rand(count, 2, generator=generator)
        sample = DetDataSample(metainfo=dict(img_shape=(height, width), ori_shape=(height, width),
                                             scale_factor=(1.0, 1.0), pad_shape=(height, width),
                                             batch_input_shape=(height, width)))  # fmt: skip
        sample.gt_instances = InstanceData(
            bboxes=torch.cat([corner, corner + side], 1),
            labels=torch.randint(CLASSES, (count,), generator=generator),
        )
        sample.ignored_instances = InstanceData(bboxes=torch.zeros(0, 4), labels=torch.zeros(0))
        samples.append(sample)
    return dict(inputs=inputs, data_samples=samples)


def second_view(
    sample: DetDataSample, image: torch.Tensor, offset: tuple[float, float] = (0.0, 0.0)
) -> None:
    """Give a sample the teacher's view of it, (3, H, W), as TwoViews does."""
    height, width = sample.img_shape
    view = BaseDataElement(img=image)
    scale = (image.size(2) / width, image.size(1) / height)
    view.set_metainfo({'scale': scale, 'offset': offset})
    sample.set_field(view, 'teacher_view')


def losses(model: nn.Module, data: dict | None = None, seed: int = 0) -> dict:
    """The losses of one step, under ``seed`` (which anchors and RoIs are sampled)."""
    data = model.data_preprocessor(copy.deepcopy(data or batch()), True)
    torch.manual_seed(seed)
    return model(**data, mode='loss')


def total(model: nn.Module, values: dict) -> torch.Tensor:
    """The sum that is trained on."""
    return model.parse_losses(values)[0]


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    """The gradients that have arrived, by parameter."""
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


class Spy(nn.Module):
    """Stands before a term's loss and keeps what it was given."""

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.loss = loss
        self.calls: list[tuple] = []

    def __getattr__(self, name: str):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.loss, name)

    def forward(self, *args, **kwargs):
        self.calls.append(args)
        return self.loss(*args, **kwargs)


def spy(model: nn.Module) -> dict[str, list[tuple]]:
    """Put a spy before each term that is on; returns their calls by the term's name."""
    calls = {}
    for name, term in model.kd_terms.items():
        term.loss = Spy(term.loss)
        calls[name] = term.loss.calls
    return calls
