"""What a distillation term is: a class that says what it needs, is given it, and returns a loss.

Every entry of ``distillation`` with a ``type`` is one, under a key of the user's choice. A method
of one's own derives from :class:`FeatureTerm` or :class:`RowTerm`, see docs/own_term.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from ..layer_pairs import LayerPair
from ..options.adapters import build_adapter
from ..options.schedule import WeightSchedule
from ..options.share import GradientShare
from ..recipe import Needs, number, refuse_loss, require_one_of
from .heads import Rows
from .step import Step


class DistillTerm(nn.Module):
    """One way to learn from the teacher. Its parameters are trained, and saved under ``kd_terms.``.

    Attributes:
        loss_weight: factor on the loss; a constant 0 turns the term off.
        hard_weight: μ of equation (2), by which the student's own classification loss at the
            term's site is multiplied; 1 leaves it as it is.
        schedule, share: when the term is in force, and its weight as a share of the gradient.
    """

    loss_weight: float = 1.0
    hard_weight: float = 1.0
    schedule: WeightSchedule
    share: GradientShare | None

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.schedule, self.share = WeightSchedule(), None
        self.configure(**options)

    def configure(self, loss_weight: float | None = None) -> None:
        """Set options of the base class; None leaves one as the class has it."""
        if loss_weight is not None:
            self.loss_weight = number(type(self).__name__, 'loss_weight', loss_weight, 0)

    def needs(self) -> Needs:
        """What :meth:`forward` asks its :class:`Step` for."""
        raise NotImplementedError

    def check_networks(self, student: Any, teacher: Any) -> None:
        """Raise a ValueError where the method makes no sense for these two networks."""

    def bind(self, pairs: Sequence[LayerPair]) -> None:
        """Build the term's own layers, once the pairs that it needs are known."""

    def forward(self, step: Step) -> Any:
        """The unweighted loss, a scalar or a dict of named parts; None if nothing was compared."""
        raise NotImplementedError

    def distil(self, step: Step) -> dict[str, Tensor]:
        """The weighted loss of this step by part ('' for a loss of one part)."""
        return self.weighed(self(step))

    def weighed(self, value: Any) -> dict[str, Tensor]:
        """``value`` times ``loss_weight``, by part."""
        return {name: self.loss_weight * part for name, part in self.parts_of(value).items()}

    def parts_of(self, value: Any) -> dict[str, Tensor]:
        """A loss by part: {} for None.

        Raises:
            TypeError: if a part is no scalar tensor.
        """
        parts = value if isinstance(value, dict) else {} if value is None else {'': value}
        for part in parts.values():
            if not isinstance(part, Tensor) or part.numel() != 1:
                refuse_loss(self, part)
        return parts

    def nothing(self, zero: Tensor) -> Tensor:
        """A zero that depends on every parameter of the term: DDP waits for each gradient."""
        return sum((0 * p.sum() for p in self.parameters() if p.requires_grad), zero)


class RowTerm(DistillTerm):
    """A term over what both networks predict for the same anchors or RoIs.

    A method overrides :meth:`compare`, which is called once for an RPN and once for each stage of
    a RoI head; the results are weighted as the head's own losses are, and summed.

    Attributes:
        site: 'rpn' or 'rcnn'.
        kind: 'cls' for logits, 'bbox' for deltas of positive anchors or RoIs.
    """

    site, kind = 'rcnn', 'cls'

    def configure(  # type: ignore[override]
        self, site: str | None = None, kind: str | None = None, hard_weight: float | None = None,
        loss_weight: float | None = None,
    ) -> None:  # fmt: skip
        super().configure(loss_weight)
        self.site = require_one_of('site', site or self.site, 'rpn', 'rcnn')
        self.kind = require_one_of('kind', kind or self.kind, 'cls', 'bbox')
        if hard_weight is not None:
            self.hard_weight = number(type(self).__name__, 'hard_weight', hard_weight, 0, 1)
        if self.hard_weight != 1 and self.kind != 'cls':
            raise ValueError(f"hard_weight={self.hard_weight:g} needs kind='cls'")

    def needs(self) -> Needs:
        return Needs(rows=((self.site, self.kind),))

    def compare(self, rows: Rows) -> Any:
        """The unweighted loss over some rows, a scalar or a dict of parts."""
        raise NotImplementedError

    def distil(self, step: Step) -> dict[str, Tensor]:
        total: dict[str, Tensor] = {}
        for rows in step.rows(self.site, self.kind):
            for name, part in self.weighed(self.compare(rows)).items():
                value = rows.stage_weight * (rows.loss_weight * part)
                total[name] = total.get(name, 0) + value
        return total


class FeatureTerm(DistillTerm):
    """A term over pairs of layers, each with an adaptation layer behind the student's.

    A method overrides :meth:`compare`, and :meth:`build` if it has layers of its own; one that
    fuses levels overrides :meth:`forward`.

    Attributes:
        entries: the config's ``pairs``: 'neck' (all its outputs), 'backbone[2]', or
            dict(student='...', teacher='...', adapter='...').
        pairs: the :class:`LayerPair` of each output.
        adapter: the kind of adaptation layer where a pair names none, see :func:`build_adapter`.
    """

    adapter: str | None = None
    entries: tuple = ('neck',)
    pairs: Sequence[LayerPair] = ()

    def configure(  # type: ignore[override]
        self, pairs: Sequence[str | dict] | None = None, loss_weight: float | None = None
    ) -> None:
        super().configure(loss_weight)
        self.entries = self.entries if pairs is None else tuple(pairs)

    def needs(self) -> Needs:
        return Needs(pairs=self.entries)

    def bind(self, pairs: Sequence[LayerPair]) -> None:
        self.pairs, self.adapters, self.layers = list(pairs), nn.ModuleDict(), nn.ModuleDict()
        for pair in pairs:
            self.adapters[pair.name] = self.adapt(pair)
            if (layers := self.build(pair)) is not None:
                self.layers[pair.name] = layers

    def adapt(self, pair: LayerPair) -> nn.Module:
        """The adaptation layer behind the student's layer of one pair."""
        return build_adapter(*pair.shapes, self.adapter if pair.adapter is None else pair.adapter)

    def build(self, pair: LayerPair) -> nn.Module | None:
        """Layers of the term's own for one pair, from its name, channels and strides."""
        return None

    def context(self, step: Step, pair: LayerPair) -> Any:
        """What :meth:`compare` is given besides the features of a pair: its boxes."""
        return step.boxes(pair)

    def compare(self, student: Tensor, teacher: Tensor, layers: Any, boxes: Any) -> Any:
        """The unweighted loss of one pair, a scalar or a dict of parts; None for nothing.

        Args:
            student, teacher: the adapted feature and the teacher's on the same grid, detached;
                both (N, C, H, W), or (n, C) of vectors.
            layers: what :meth:`build` returned for the pair.
            boxes: ground truth of each image, (n, 4), xyxy in cells; None if not over the image.
        """
        raise NotImplementedError

    def forward(  # type: ignore[override]
        self, student: list, teacher: list, layers: list, boxes: list
    ) -> Any:
        """The unweighted loss of all pairs; each argument is a list, fine to coarse."""
        total: dict[str, Tensor] = {}
        for each in zip(student, teacher, layers, boxes, strict=True):
            for name, part in self.parts_of(self.compare(*each)).items():
                total[name] = total.get(name, 0) + part
        return total

    def distil(self, step: Step) -> dict[str, Tensor]:
        student, teacher = [], []
        for pair in self.pairs:
            guided, hint = step.features(pair)
            student.append(self.adapters[pair.name](guided))
            teacher.append(hint)
        layers = [dict(self.layers).get(p.name) for p in self.pairs]
        return self.weighed(
            self(student, teacher, layers, [self.context(step, p) for p in self.pairs])
        )
