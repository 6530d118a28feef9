"""Hears what a network was asked to score, and what its layers said, while it does so.

A loss module is the one place where a detection head of any kind lays its prediction, target,
weight and normaliser side by side. Forward hooks listen there; nothing of the network is replaced.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn


@dataclass
class Question:
    """One call of a loss module: what the student was asked, and what it answered.

    Attributes:
        pred: the prediction, (n, C), (n, C + 1) or (n, 4); with the student's graph.
        target: labels (n,) or box targets (n, 4).
        weight: weights of the rows, (n,) or (n, 4).
        avg_factor: what the head divided its loss by.
        rois: (n, 5) with the image index first, in pixels of the batch; RoI heads only.
    """

    pred: Tensor
    target: Tensor
    weight: Tensor | None
    avg_factor: float | Tensor | None
    rois: Any = None


@dataclass
class Record:
    """What was heard in one step.

    Attributes:
        questions: lists of questions in the order of the calls (one per RPN level), by head
            ('rpn' or 'rcnn'), stage (0 but for cascades) and kind ('cls' or 'bbox').
        features: the last output of each tapped module, by its path, with the version of each of
            its tensors, which tells a later change in place.
        runs: how often each tapped module ran, by its path.
    """

    questions: dict[tuple[str, int, str], list[Question]] = field(
        default_factory=lambda: defaultdict(list)
    )
    features: dict[str, tuple[list[Tensor], list[int]]] = field(default_factory=dict)
    runs: Counter[str] = field(default_factory=Counter)
    sizes: list[tuple[int, int]] = field(default_factory=list)

    def stages(self, head: str) -> list[int]:
        """The stages of ``head`` that were asked to classify."""
        return [stage for name, stage, kind in self.questions if (name, kind) == (head, 'cls')]

    def feature(self, path: str, index: int) -> Tensor:
        """Output ``index`` of the module at ``path``.

        Raises:
            RuntimeError: if it was never computed, or was changed in place since.
        """
        if path not in self.features:
            raise RuntimeError(f'hint at {path!r}: the module was not run in this step')
        if self.changed(path):
            raise RuntimeError(
                f'hint at {path!r}: a later layer changed its output in place, so it is no longer '
                'what the layer said; take the hint at that later layer, or set inplace=False there'
            )
        return self.features[path][0][index]

    def changed(self, path: str) -> bool:
        """Whether a later layer changed the output of the module at ``path`` in place."""
        tensors, versions = self.features[path]
        return versions != [_version(t) for t in tensors]


class Recorder:
    """Listens at loss modules and layers; hears only inside ``with recorder(...) as record``.

    Its hooks are bound methods, so that a deep copy of the network (EMA) has a recorder of its own.
    """

    def __init__(self) -> None:
        self._record: Record | None = None
        self._hard_weights: Mapping[str, float] = {}
        self._rois: dict[int, Tensor] = {}
        self._copied: set[str] = set()

    def listen(self, head: str, stage: int, kind: str, loss: nn.Module) -> None:
        """Hear the calls of a loss module: ``kind`` 'cls' or 'bbox' of ``head`` 'rpn' or 'rcnn'."""
        loss.register_forward_hook(partial(self._hear, head, stage, kind), with_kwargs=True)

    def listen_rois(self, stage: int, extractor: nn.Module) -> None:
        """Hear which RoIs an RoI extractor is given."""
        extractor.register_forward_pre_hook(partial(self._hear_rois, stage), with_kwargs=True)

    def listen_sizes(self, rpn_head: nn.Module) -> None:
        """Hear the height and width of the maps that an RPN scores."""
        rpn_head.register_forward_hook(self._hear_sizes)

    def tap(self, path: str, module: nn.Module) -> None:
        """Hear the output of the layer ``module``, to be found under ``path``."""
        module.register_forward_hook(partial(self._hear_feature, path))

    def copy(self, path: str) -> None:
        """Copy what the layer at ``path`` says: one that follows changes it in place."""
        self._copied.add(path)

    def __call__(self, hard_weights: Mapping[str, float] | None = None) -> Recorder:
        """Set the factor on the hard classification loss of each head (μ of equation (2))."""
        self._hard_weights = hard_weights or {}
        return self

    def __enter__(self) -> Record:
        self._record = Record()
        return self._record

    def __exit__(self, *exc: object) -> None:
        # A kept graph would hold the activations and make the network impossible to copy.
        self._record = None
        self._rois.clear()

    def _hear_rois(self, stage: int, module: nn.Module, args: tuple, kwargs: dict) -> None:
        if self._record is not None:
            self._rois[stage] = kwargs['rois'] if 'rois' in kwargs else args[1]

    def _hear_sizes(self, module: nn.Module, args: tuple, output: Any) -> None:
        if self._record is not None:
            self._record.sizes = [tuple(level.shape[-2:]) for level in output[0]]

    def _hear(
        self,
        head: str,
        stage: int,
        kind: str,
        module: nn.Module,
        args: tuple,
        kwargs: dict,
        output: Any,
    ) -> Any:
        # Samplers and miners (OHEM, PISA) ask the same module with a reduction of their own first.
        if self._record is None or kwargs.get('reduction_override') is not None:
            return None
        pred, target = args[:2]
        weight = args[2] if len(args) > 2 else kwargs.get('weight')
        avg_factor = args[3] if len(args) > 3 else kwargs.get('avg_factor')
        question = Question(pred, target, weight, avg_factor, self._rois.get(stage))
        self._record.questions[head, stage, kind].append(question)
        hard_weight = self._hard_weights.get(head, 1.0)
        if kind == 'bbox' or hard_weight == 1:
            return None
        if isinstance(output, dict):
            return {k: v * hard_weight if 'loss' in k else v for k, v in output.items()}
        return output * hard_weight

    def _hear_feature(self, path: str, module: nn.Module, args: tuple, output: Any) -> None:
        if self._record is not None:
            tensors = [output] if isinstance(output, Tensor) else list(output)
            if path in self._copied:
                tensors = [t.clone() for t in tensors]
            self._record.features[path] = tensors, [_version(t) for t in tensors]
            self._record.runs[path] += 1


def _version(output: Any) -> int:
    return output._version if torch.is_tensor(output) else 0
