"""Forward hooks that record what a network computes, inside a ``with`` block and nowhere else.

Every head lays its prediction, target, weight and normaliser side by side when it calls its loss
module, so that is where heads are tapped; nothing is replaced.
"""

from __future__ import annotations

import contextlib
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn


@dataclass
class LossCall:
    """What a loss module was called with: a prediction with its graph, (n, C), (n, C + 1) or
    (n, 4); labels (n,) or box targets (n, 4); weights (n,) or (n, 4); and the RoIs (n, 5)."""

    pred: Tensor
    target: Tensor
    weight: Any
    avg_factor: float | Tensor | None
    rois: Any = None


@dataclass
class Record:
    """What was recorded in one step.

    Attributes:
        loss_calls: by site ('rpn' or 'rcnn'), stage and kind ('cls' or 'bbox'), in the order of
            the calls: one per level for an RPN.
        features: the last output of each tapped layer by its path, with the version of each
            tensor, which tells a later change in place; ``runs`` counts how often the layer ran.
        map_sizes: height and width of each map that the RPN scored.
    """

    loss_calls: dict[tuple[str, int, str], list[LossCall]] = field(
        default_factory=lambda: defaultdict(list)
    )
    features: dict[str, tuple[list[Tensor], list[int]]] = field(default_factory=dict)
    runs: Counter[str] = field(default_factory=Counter)
    map_sizes: list[tuple[int, int]] = field(default_factory=list)

    def feature(self, path: str, index: int) -> Tensor:
        """Output ``index`` of the layer at ``path``; it must have run and not changed since."""
        if path not in self.features:
            raise RuntimeError(f'hint at {path!r}: the module was not run in this step')
        if self.changed(path):
            raise RuntimeError(
                f'hint at {path!r}: a later layer changed its output in place; take the hint at '
                'that later layer, or set inplace=False there'
            )
        return self.features[path][0][index]

    def changed(self, path: str) -> bool:
        """Whether a later layer changed the output of the layer at ``path`` in place."""
        tensors, versions = self.features[path]
        return versions != [_version(t) for t in tensors]


class Taps:
    """Records loss calls, RoIs and layer outputs inside ``with taps as record:``.

    The hooks are bound methods, so a deep copy of the network (EMA) has taps of its own.
    """

    def __init__(self) -> None:
        self._record: Record | None = None
        self._rois: dict[int, Tensor] = {}
        self._copied: set[str] = set()

    def tap_loss(self, site: str, stage: int, kind: str, loss: nn.Module) -> None:
        """Record the calls of a loss module, ``kind`` 'cls' or 'bbox' of a site's stage."""
        call = partial(self._on_loss, (site, stage, kind))
        loss.register_forward_pre_hook(call, with_kwargs=True)

    def tap_rois(self, stage: int, extractor: nn.Module) -> None:
        """Record the RoIs that an extractor is given; they join the stage's loss calls."""
        extractor.register_forward_pre_hook(partial(self._on_rois, stage), with_kwargs=True)

    def tap_map_sizes(self, rpn_head: nn.Module) -> None:
        """Record the sizes of the maps that an RPN scores."""
        rpn_head.register_forward_hook(self._on_rpn)

    def tap_layer(self, path: str, layer: nn.Module) -> None:
        """Record the output of a layer under its path."""
        layer.register_forward_hook(partial(self._on_layer, path))

    def copy(self, path: str) -> None:
        """Record a copy at this layer, because a later one changes its output in place."""
        self._copied.add(path)

    def __enter__(self) -> Record:
        self._record = Record()
        return self._record

    def __exit__(self, *exc: object) -> None:
        # A kept graph would hold the activations and make the network impossible to copy.
        self._record = None
        self._rois.clear()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Record nothing in this block."""
        record, self._record = self._record, None
        try:
            yield
        finally:
            self._record = record

    def _on_rois(self, stage: int, module: nn.Module, args: tuple, kwargs: dict) -> None:
        if self._record is not None:
            self._rois[stage] = kwargs['rois'] if 'rois' in kwargs else args[1]

    def _on_rpn(self, module: nn.Module, args: tuple, output: Any) -> None:
        if self._record is not None:
            self._record.map_sizes = [tuple(level.shape[-2:]) for level in output[0]]

    def _on_loss(self, where: tuple, module: nn.Module, args: tuple, kwargs: dict) -> None:
        if self._record is None or not _is_the_loss(kwargs):
            return
        weight, avg_factor = (
            args[i] if len(args) > i else kwargs.get(name)
            for i, name in ((2, 'weight'), (3, 'avg_factor'))
        )
        call = LossCall(args[0], args[1], weight, avg_factor, self._rois.get(where[1]))
        self._record.loss_calls[where].append(call)

    def _on_layer(self, path: str, module: nn.Module, args: tuple, output: Any) -> None:
        if self._record is not None:
            tensors = [output] if isinstance(output, Tensor) else list(output)
            if path in self._copied:
                tensors = [t.clone() for t in tensors]
            self._record.features[path] = tensors, [_version(t) for t in tensors]
            self._record.runs[path] += 1


class ScaledLosses:
    """Multiplies what loss modules return, inside ``with scaled({'rcnn': 0.5}):``; exact for every
    head, also for one that logs a list, stages or a dict."""

    def __init__(self) -> None:
        self._factors: Mapping[str, float] = {}

    def add(self, site: str, loss: nn.Module) -> None:
        """Let the factor of ``site`` scale this module."""
        loss.register_forward_hook(partial(self._scale, site), with_kwargs=True)

    @contextlib.contextmanager
    def __call__(self, factors: Mapping[str, float]) -> Iterator[None]:
        self._factors = factors
        try:
            yield
        finally:
            self._factors = {}

    def _scale(self, site: str, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        factor = self._factors.get(site, 1.0)
        if factor == 1 or not _is_the_loss(kwargs):
            return None
        if isinstance(output, dict):
            return {k: v * factor if 'loss' in k else v for k, v in output.items()}
        return output * factor


def _is_the_loss(kwargs: dict) -> bool:
    # Samplers and miners (OHEM, PISA) call the same module first, with a reduction of their own.
    return kwargs.get('reduction_override') is None


def _version(output: Any) -> int:
    return output._version if torch.is_tensor(output) else 0
