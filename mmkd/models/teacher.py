"""The teacher: a frozen network that answers what the student was asked."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from mmdet.registry import MODELS
from mmdet.structures import SampleList
from mmengine.model import BaseModule
from mmengine.runner.checkpoint import CheckpointLoader
from torch import Tensor, nn

from ..io.checkpoint import load_verified
from ..options.acceleration import Acceleration, full
from ..options.resolution import Resolution
from ..recipe import ADAPTER_PREFIX, UNTRAINED, TeacherError, plain_student
from ..recipe import read_teacher_config as load_config
from .alignment import View, images_and_view
from .taps import Recorder


class Teacher:
    """Holds the network as a plain object, not as a submodule of the student.

    So it is invisible to ``parameters()``, ``state_dict()``, the optimizer, DDP and
    ``init_weights()``; a deep copy of the student (EMA) shares it.

    Args:
        config: the teacher's config, see :func:`load_config`.
        checkpoint: its weights: a path or URL; ``'random'`` leaves it untrained, for tests.
        acceleration: how it runs; None: exactly.
        sha256: the checkpoint's SHA-256, 64 hex digits; None: it may be any file. ``'random'`` has
            none.

    Raises:
        TeacherError: if the checkpoint does not fill the network completely.
        CheckpointError: if it is refused, or is another file than ``sha256`` says.
    """

    def __init__(
        self,
        config: str | Path | dict,
        checkpoint: str | None,
        acceleration: Acceleration | None = None,
        sha256: str | None = None,
    ) -> None:
        if checkpoint is None:
            raise TeacherError(
                'teacher_ckpt is missing, so the teacher would be random noise: name its '
                f'checkpoint (or {UNTRAINED!r}, if noise is what you want, in a test)'
            )
        self.config = load_config(config)
        self.name = str(self.config.filename or 'given as a dict')
        model = plain_student(self.config.model)
        model['train_cfg'] = None
        self.network: nn.Module = MODELS.build(model)
        self.source = str(checkpoint)
        self.loaded, self.passed_over = 0, 0
        if checkpoint == UNTRAINED:
            if isinstance(self.network, BaseModule):
                _without_pretrained(self.network).init_weights()
        else:
            self._load(checkpoint, sha256)
        self.network.eval().requires_grad_(False)
        self.recorder = Recorder()
        self.acceleration = acceleration or Acceleration()
        self.prepared = False
        self.prints = fingerprint(self.network)

    def __deepcopy__(self, memo: dict) -> Teacher:
        return self

    def _load(self, checkpoint: str, sha256: str | None) -> None:
        if sha256 is None:
            state = CheckpointLoader.load_checkpoint(checkpoint, map_location='cpu')
        else:
            state = load_verified(checkpoint, sha256)
        state = state.get('state_dict', state)
        state = {key.removeprefix('module.'): value for key, value in state.items()}
        own = {k: v for k, v in state.items() if not k.startswith(ADAPTER_PREFIX)}
        self.passed_over = len(state) - len(own)
        wanted = self.network.state_dict()
        misshaped = [
            f'{k} ({tuple(own[k].shape)} in the file, {tuple(v.shape)} in teacher_config)'
            for k, v in wanted.items()
            if k in own and own[k].shape != v.shape
        ]
        fitting = {k: v for k, v in own.items() if k not in wanted or v.shape == wanted[k].shape}
        # Through the network's own hooks: they translate the keys of older versions.
        result = self.network.load_state_dict(fitting, strict=False)
        shaped = {entry.split(' ')[0] for entry in misshaped}
        missing = [
            k
            for k in result.missing_keys
            if k not in shaped and not k.endswith('num_batches_tracked')
        ]
        problems = [
            f'{verb} {len(keys)} of {len(wanted)} keys (first: {", ".join(keys[:3])})'
            for verb, keys in (
                ('lacks', missing),
                ('has in another shape', misshaped),
                ('has, beyond the network,', result.unexpected_keys),
            )
            if keys
        ]
        if problems:
            raise TeacherError(
                f'teacher checkpoint {checkpoint} {"; ".join(problems)}. It was trained with '
                f'another config than teacher_config {self.name}: name the config it was trained '
                'with'
            )
        self.loaded = len(wanted) - len(result.missing_keys)

    def follow(self, parameter: Tensor) -> None:
        """Move to the device and dtype of the student's ``parameter``, if not there yet."""
        own = next(self.network.parameters())
        if own.device != parameter.device or own.dtype != parameter.dtype:
            self.network.to(device=parameter.device, dtype=parameter.dtype)

    @property
    def stages(self) -> int:
        """How many box heads the RoI head has; 1 but for cascades."""
        return getattr(self.network.roi_head, 'num_stages', 1)

    def box_head(self, stage: int) -> nn.Module:
        """The box head that answers the student's ``stage``: the corresponding one, or the last."""
        return _stage(self.network.roi_head.bbox_head, min(stage, self.stages - 1))

    def prepare(self) -> None:
        """Apply the acceleration, once."""
        if not self.prepared:
            # Not before: the student may start from this network as its file has it.
            self.acceleration.prepare(self.network)
            self.prepared = True

    @torch.no_grad()
    def extract(self, pixels: Tensor, neck: bool = True) -> tuple[Tensor, ...]:
        """Backbone and neck, or the backbone alone.

        Args:
            pixels: (N, 3, H, W), normalised as the teacher expects.
            neck: whether what is asked lies beyond the backbone.
        """
        self.prepare()
        pixels = self.acceleration.pixels(pixels)
        with self.acceleration.autocast(pixels.device):
            return self.network.extract_feat(pixels) if neck else self.network.backbone(pixels)

    @torch.no_grad()
    def score_anchors(
        self, features: Sequence[Tensor]
    ) -> list[tuple[Tensor, Tensor, tuple[int, int]]]:
        """Answer the RPN's question: logits and deltas of every anchor.

        Returns:
            For each level (N·H·W·A, C) and (N·H·W·A, 4), rows in the order in which the student's
            RPN lays them before its loss: image, y, x, anchor; and the map's H, W.
        """
        head = self.network.rpn_head
        with self.acceleration.autocast(features[0].device):
            logits, deltas = head(features)[:2]
        return [
            (
                _rows(full(cls), head.cls_out_channels),
                _rows(full(reg), head.bbox_coder.encode_size),
                tuple(cls.shape[-2:]),
            )
            for cls, reg in zip(logits, deltas, strict=True)
        ]

    @torch.no_grad()
    def score_rois(
        self, features: Sequence[Tensor], rois: Tensor, stage: int, context: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor | None]:
        """Answer the RoI head's question.

        Args:
            features: of :meth:`extract`.
            rois: the student's, (n, 5), image index first.
            stage: the student's stage.
            context: of :func:`roi_context`.

        Returns:
            Logits (n, C + 1), and deltas (n, 4·C) or (n, 4), None where the head regresses none.
        """
        head = self.network.roi_head
        where = (min(stage, self.stages - 1),) if isinstance(head.bbox_head, nn.ModuleList) else ()
        with self.acceleration.autocast(rois.device):
            answer = head._bbox_forward(*where, features, rois, **context)
        return full(answer['cls_score']), full(answer['bbox_pred'])


@torch.no_grad()
def roi_context(roi_head: Any, features: Sequence[Tensor]) -> dict[str, Tensor]:
    """What a RoI head adds to every RoI, from the whole image: HTC and SCNet do; else nothing."""
    context = {}
    if getattr(roi_head, 'with_semantic', False):
        context['semantic_feat'] = roi_head.semantic_head(features)[1]
    if getattr(roi_head, 'with_glbctx', False):
        context['glbctx_feat'] = roi_head.glbctx_head(features)[1]
    return context


class Pixels:
    """Gives the teacher the pixels that it was trained on.

    With one resolution the student's batch is converted (normalisation, channel order), or is the
    teacher's as it stands. With two, the teacher's own preprocessor takes the images that the
    training pipeline made for it.

    Args:
        student: the student's data preprocessor, which made the batch.
        teacher: the teacher's.
        resolution: where the two see different scales.

    Raises:
        ValueError: if the student's batch is changed behind the pipeline (``batch_augments``).
    """

    def __init__(
        self, student: nn.Module, teacher: nn.Module, resolution: Resolution | None = None
    ) -> None:
        self.swapped = student._channel_conversion != teacher._channel_conversion
        self.normalised = [_normalisation(student), _normalisation(teacher)]
        same = all(torch.equal(a, b) for a, b in zip(*self.normalised, strict=True))
        self.resolution = resolution
        self.same = same and not self.swapped and resolution is None
        self.preprocessor: Any = teacher
        for augment in getattr(student, 'batch_augments', None) or ():
            if resolution is not None and type(augment).__name__ != 'BatchFixedSizePad':
                raise ValueError(
                    f"the student's data_preprocessor changes the batch by "
                    f'{type(augment).__name__}, after the two views were made, so the teacher '
                    'would see another place: resize in the pipeline (RandomChoiceResize) instead'
                )

    def __call__(self, inputs: Tensor, data_samples: SampleList) -> tuple[Tensor, View | None]:
        """Turn the student's batch (N, 3, H, W) into the teacher's; itself where both agree.

        Returns:
            The teacher's batch (N, 3, H', W'), and where its images lie over the student's; None
            where each pixel lies over its own.
        """
        if self.resolution is not None:
            return self._second_view(inputs, data_samples)
        if self.same:
            return inputs, None
        (mean_s, std_s), (mean_t, std_t) = [
            [value.to(inputs.device).view(-1, 1, 1) for value in pair] for pair in self.normalised
        ]
        pixels = inputs * std_s + mean_s
        if self.swapped:
            pixels = pixels.flip(1)
        pixels = (pixels - mean_t) / std_t
        # Padding is 0 behind the normalisation, in both.
        inside = torch.zeros_like(pixels[:, :1])
        for mask, sample in zip(inside, data_samples, strict=True):
            height, width = sample.img_shape[:2]
            mask[:, :height, :width] = 1
        return (pixels * inside).to(inputs.dtype), None

    def _second_view(self, inputs: Tensor, data_samples: SampleList) -> tuple[Tensor, View]:
        images, view = images_and_view(data_samples, inputs.device)
        pixels = self.preprocessor({'inputs': images}, training=False)['inputs']
        # Over all of the student's batch, its padding included: each cell has a counterpart.
        divisor = self.preprocessor.pad_size_divisor
        canvas = inputs.new_tensor(inputs.shape[:1:-1], dtype=torch.float64)
        far = (view.scale * canvas + view.offset).amax(0).tolist()[::-1]
        height, width = (
            max(math.ceil(round(edge, 6) / divisor) * divisor, size)
            for edge, size in zip(far, pixels.shape[2:], strict=True)
        )
        pixels = F.pad(pixels, (0, width - pixels.size(3), 0, height - pixels.size(2)))
        return pixels.to(inputs.dtype), view


def fingerprint(network: nn.Module) -> dict[str, str]:
    """SHA-256 of each parameter and buffer, by name; those left out of state dicts too."""
    tensors = [*network.named_parameters(), *network.named_buffers()]
    return {name: sha256(tensor) for name, tensor in tensors}


def sha256(tensor: Tensor) -> str:
    """SHA-256 of a tensor's numbers, in hexadecimal digits."""
    numbers = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return hashlib.sha256(numbers).hexdigest()


def _normalisation(preprocessor: nn.Module) -> tuple[Tensor, Tensor]:
    if not getattr(preprocessor, '_enable_normalize', False):
        return torch.zeros(3), torch.ones(3)
    return preprocessor.mean.flatten().cpu(), preprocessor.std.flatten().cpu()


def _rows(level: Tensor, columns: int) -> Tensor:
    return level.permute(0, 2, 3, 1).reshape(-1, columns)


def _stage(heads: nn.Module, stage: int) -> nn.Module:
    return heads[stage] if isinstance(heads, nn.ModuleList) else heads


def _without_pretrained(network: Any) -> Any:
    for module in network.modules():
        init_cfg = getattr(module, 'init_cfg', None)
        if isinstance(init_cfg, dict) and init_cfg.get('type') == 'Pretrained':
            module.init_cfg = None
    return network
