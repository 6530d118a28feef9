"""Pairs of layers, one of each network: found by name and measured by a dry run."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from .options.acceleration import input_channels
from .options.head_layout import roi_context
from .recipe import parse_layer, parse_pair

SIZE = 128
"""Side of the dry run's image in pixels: a multiple of every stride."""


@dataclass(frozen=True)
class Layer:
    """One output of a submodule: ``neck[2]`` is the third output of ``neck``."""

    path: str
    index: int

    def __str__(self) -> str:
        return f'{self.path}[{self.index}]'


@dataclass(frozen=True)
class LayerPair:
    """A guided layer of the student and the hint layer of the teacher that it learns from.

    Attributes:
        name: unique within a term, usable as the name of a submodule.
        student, teacher: the two layers.
        shapes: of their outputs in the dry run, (1, C, H, W) or (n, C).
        adapter: the kind of adaptation layer that the config asks for; None for the term's own.
    """

    name: str
    student: Layer
    teacher: Layer
    shapes: tuple[tuple[int, ...], tuple[int, ...]]
    adapter: str | None = None

    @property
    def channels(self) -> tuple[int, int]:
        """Channels of the student's layer and of the teacher's."""
        return self.shapes[0][1], self.shapes[1][1]

    @cached_property
    def strides(self) -> tuple[float, float] | None:
        """Pixels from cell to cell in either network's image; None where a map is of a RoI."""
        in_rois = any(layer.path.startswith('roi_head') for layer in (self.student, self.teacher))
        if in_rois or any(len(shape) != 4 for shape in self.shapes):
            return None
        return SIZE / self.shapes[0][-1], SIZE / self.shapes[1][-1]


class Probe:
    """Taps the layers that the terms name, and learns their shapes by a dry run of both networks.

    One black image runs through each; weights, buffers and modes stay as they are.

    Args:
        student, teacher: each network with its taps.
        entries: all entries of ``pairs`` of all terms.

    Raises:
        ValueError: if a network has no such layer, does not run it once a step, or its output is
            no tensor.
    """

    def __init__(self, student: tuple, teacher: tuple, entries: Sequence[str | dict]) -> None:
        specs = [parse_pair(entry) for entry in entries]
        self.shapes = [
            _shapes('student', *student, [own for own, *_ in specs]),
            _shapes('teacher', *teacher, [theirs for _, theirs, _ in specs]),
        ]
        self.needs_neck = any(layer.path.split('.')[0] != 'backbone' for layer in self.shapes[1])

    def pairs(self, owner: str, entries: Sequence[str | dict]) -> list[LayerPair]:
        """The layer pairs of the term ``owner``, each output of a layer with its counterpart."""
        found: list[LayerPair] = []
        for spec_s, spec_t, adapter in map(parse_pair, entries):
            own, theirs = _outputs(spec_s, self.shapes[0]), _outputs(spec_t, self.shapes[1])
            if len(own) != len(theirs):
                raise ValueError(
                    f'hint pair {spec_s!r}, {spec_t!r}: the student has {len(own)} outputs '
                    f'there, the teacher {len(theirs)}; name one, as in {spec_s}[0]'
                )
            for student, teacher in zip(own, theirs, strict=True):
                if any((p.student, p.teacher) == (student, teacher) for p in found):
                    raise ValueError(
                        f'{owner}.pairs joins {student} and {teacher} twice: the pair would count '
                        'twice; remove one'
                    )
                name = f'{student.path}_{student.index}'.replace('.', '_')
                if any(p.name == name for p in found):
                    name += f'_to_{teacher.path}_{teacher.index}'.replace('.', '_')
                shapes = self.shapes[0][student], self.shapes[1][teacher]
                found.append(LayerPair(name, student, teacher, shapes, adapter))
        return found


@torch.no_grad()
def _shapes(
    who: str, network: Any, taps: Any, specs: Sequence[str]
) -> dict[Layer, tuple[int, ...]]:
    if not specs:
        return {}
    modules = dict(network.named_modules())
    paths = sorted({parse_layer(spec)[0] for spec in specs})
    for path in paths:
        if path not in modules:
            near = difflib.get_close_matches(path, list(modules), 3, 0)
            raise ValueError(
                f'hint at {path!r}: the {who} has no such submodule; near ones: {", ".join(near)}'
            )
        taps.tap_layer(path, modules[path])
    modes = {module: module.training for module in network.modules()}
    network.eval()
    try:
        with taps as record:
            _run(network, {path.split('.')[0] for path in paths})
            for path, (tensors, _) in record.features.items():
                if not all(isinstance(tensor, Tensor) for tensor in tensors):
                    raise ValueError(
                        f'hint at {path!r}: its outputs in the {who} are no tensors, but lists of '
                        'them; name a submodule inside it'
                    )
                if record.runs[path] > 1:
                    raise ValueError(
                        f'hint at {path!r}: the {who} runs it {record.runs[path]} times in one '
                        'step (once for each level, say), so it has no one output; take a layer '
                        'before it'
                    )
                if record.changed(path):
                    taps.copy(path)
            return {
                Layer(path, index): tuple(tensor.shape)
                for path, (tensors, _) in record.features.items()
                for index, tensor in enumerate(tensors)
            }
    finally:
        for module, mode in modes.items():
            module.training = mode


def _run(network: Any, parts: set[str]) -> None:
    """Backbone, neck and the heads among ``parts``, on one image and one RoI."""
    parameter = next(network.parameters())
    image = parameter.new_zeros(1, input_channels(network), SIZE, SIZE)
    features = network.extract_feat(image)
    if 'rpn_head' in parts:
        network.rpn_head(features)
    if 'roi_head' in parts:
        rois = features[0].new_tensor([[0, 0, 0, 64, 64]])
        heads = network.roi_head.bbox_head
        for stage in range(len(heads)) if isinstance(heads, nn.ModuleList) else [None]:
            where = () if stage is None else (stage,)
            context = roi_context(network.roi_head, features)
            network.roi_head._bbox_forward(*where, features, rois, **context)


def _outputs(spec: str, shapes: dict[Layer, tuple[int, ...]]) -> list[Layer]:
    path, index = parse_layer(spec)
    found = [layer for layer in shapes if layer.path == path]
    if not found:
        raise ValueError(
            f'hint at {path!r}: the network does not call this submodule; name one inside it'
        )
    if index is None:
        return found
    if index >= len(found):
        raise ValueError(f'hint {spec!r}: {path} has {len(found)} outputs, the first is {path}[0]')
    return [Layer(path, index)]
