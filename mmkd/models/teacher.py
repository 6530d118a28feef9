"""The teacher: a frozen network that answers what the student is trained on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..digests import tensor_digests
from ..io.teacher_weights import load_teacher
from ..options.acceleration import Acceleration, full
from ..options.head_layout import roi_context
from ..options.resolution import View
from .taps import Taps


@dataclass(frozen=True)
class Seen:
    """What the teacher makes of a batch before the student runs.

    Attributes:
        features: of its neck, or of its backbone where no term needs more.
        rpn: of each level logits (N·H·W·A, C), deltas (N·H·W·A, 4) and the map's (H, W), rows in
            the order of the student's RPN: image, y, x, anchor; empty where no term needs them.
        view: where its images lie over the student's; None for the same place.
    """

    features: Sequence[Tensor]
    rpn: list[tuple[Tensor, Tensor, tuple[int, int]]]
    view: View | None


class Teacher:
    """Holds the network as a plain object, not as a submodule of the student.

    So it is invisible to ``parameters()``, ``state_dict()``, the optimizer, DDP and
    ``init_weights()``; a deep copy of the student (EMA) shares it.

    Args:
        config: the teacher's config: a path, an ``mmdet::...`` name, or a dict.
        checkpoint: its weights, a path or URL; ``'random'`` leaves it untrained, for tests.
        acceleration: how it runs; None: exactly.
        sha256: the checkpoint's SHA-256, 64 hex digits; None: it may be any file.

    Raises:
        TeacherError: if the checkpoint does not fill the network completely.
        CheckpointError: if it is refused, or is another file than ``sha256`` says.
    """

    def __init__(
        self, config: str | Path | dict | None, checkpoint: str | None,
        acceleration: Acceleration | None = None, sha256: str | None = None,
    ) -> None:  # fmt: skip
        found = load_teacher(config, checkpoint, sha256)
        self.network, self.config, self.name = found.network, found.config, found.name
        self.source, self.loaded, self.passed_over = found.source, found.loaded, found.passed_over
        self.wrapping = found.wrapping
        self.taps = Taps()
        self.acceleration, self.prepared = acceleration or Acceleration(), False
        self.digests = tensor_digests(self.network)

    def __deepcopy__(self, memo: dict) -> Teacher:
        return self

    def follow(self, parameter: Tensor) -> None:
        """Move to the device and dtype of the student's ``parameter``, if not there yet."""
        own = next(self.network.parameters())
        if own.device != parameter.device or own.dtype != parameter.dtype:
            self.network.to(device=parameter.device, dtype=parameter.dtype)

    def prepare(self) -> None:
        """Apply the acceleration, once; not before the student has started from this network."""
        if not self.prepared:
            self.acceleration.prepare(self.network)
            self.prepared = True

    def see(self, pixels: Tensor, view: View | None, neck: bool, rpn: bool) -> Seen:
        """Run on a batch of its own pixels (N, 3, H, W), with neck and RPN if asked."""
        features = self.extract(pixels, neck)
        return Seen(features, self.score_anchors(features) if rpn else [], view)

    def extract(self, pixels: Tensor, neck: bool = True) -> tuple[Tensor, ...]:
        """Features of pixels (N, 3, H, W), normalised as the teacher expects, behind the neck or
        the backbone alone."""
        self.prepare()
        pixels = self.acceleration.pixels(pixels)
        with self.acceleration.autocast(pixels.device):
            return self.network.extract_feat(pixels) if neck else self.network.backbone(pixels)

    def score_anchors(self, features: Sequence[Tensor]) -> list:
        """Logits, deltas and map size of each level of the RPN, as :attr:`Seen.rpn` has them."""
        head = self.network.rpn_head
        with self.acceleration.autocast(features[0].device):
            levels = zip(*head(features)[:2], strict=True)
        width = head.cls_out_channels, head.bbox_coder.encode_size
        return [
            (_rows(full(cls), width[0]), _rows(full(reg), width[1]), tuple(cls.shape[-2:]))
            for cls, reg in levels
        ]

    def roi_inputs(self, features: Sequence[Tensor]) -> tuple[list[Tensor], dict[str, Tensor]]:
        """Features as the RoI head wants them, and what it adds to each RoI from the image."""
        features = self.acceleration.for_rois(features, self.network.roi_head)
        return features, roi_context(self.network.roi_head, features)

    def score_rois(self, inputs: tuple, rois: Tensor, stage: int) -> tuple[Tensor, Any]:
        """Logits (n, C + 1) and deltas (n, 4·C) or (n, 4), None where the head regresses none.

        ``rois`` (n, 5) lie in the image of the ``inputs`` of :meth:`roi_inputs`; the stage that
        corresponds to the student's answers, or the last.
        """
        head, (features, context) = self.network.roi_head, inputs
        last = getattr(head, 'num_stages', 1) - 1
        where = (min(stage, last),) if isinstance(head.bbox_head, nn.ModuleList) else ()
        with self.acceleration.autocast(rois.device):
            answer = head._bbox_forward(*where, features, rois, **context)
        return full(answer['cls_score']), full(answer['bbox_pred'])


def _rows(level: Tensor, columns: int) -> Tensor:
    return level.permute(0, 2, 3, 1).reshape(-1, columns)
