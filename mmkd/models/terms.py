"""What a distillation term is: a class that says what it needs, is given it, and returns a loss.

Every entry of ``distillation`` with a ``type`` is one, under a key of the user's choice. A method
of one's own derives from :class:`FeatureTerm` or :class:`RowTerm` (see docs/own_term.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..layer_pairs import LayerPair
from ..options.acceleration import laid_out
from ..options.adapters import build_adapter
from ..options.schedule import WeightSchedule
from ..options.share import GradientShare
from ..recipe import number, parse_pair
from .heads import Rows
from .step import Step

_HEADS = {'rpn_head': 'rpn', 'roi_head': 'rcnn'}


@dataclass(frozen=True)
class Needs:
    """What a term asks for; the teacher computes what some term needs and nothing else.

    Attributes:
        pairs: entries of layer pairs, see :func:`mmkd.recipe.parse_pair`.
        rows: (site, kind), such as ('rcnn', 'cls'), whose rows it compares.
        score_maps: the teacher's objectness.
        anchors: the student's anchors.
        cross: sites at which the teacher's head is run on the student's features.
    """

    pairs: tuple = ()
    rows: tuple[tuple[str, str], ...] = ()
    score_maps: bool = False
    anchors: bool = False
    cross: tuple[str, ...] = ()

    @property
    def sites(self) -> set[str]:
        """The sites at which the teacher has to answer."""
        heads = [parse_pair(entry)[1].split('.')[0] for entry in self.pairs]
        of_pairs = {_HEADS[head] for head in heads if head in _HEADS}
        of_maps = {'rpn'} if self.score_maps else set()
        return {site for site, _ in self.rows} | of_maps | of_pairs | {*self.cross}


class DistillTerm(nn.Module):
    """One way to learn from the teacher. Its parameters are trained, and saved under ``kd_terms.``.

    Args:
        loss_weight: factor on the loss; a constant 0 turns the term off. None: the class's own.

    Attributes:
        hard_weight: μ of equation (2): the student's own classification loss at the term's site is
            multiplied by it; 1 leaves it as it is.
        schedule, share: when the term is in force, and its weight as a share of the gradient.
    """

    loss_weight: float = 1.0
    hard_weight: float = 1.0

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.schedule = WeightSchedule()
        self.share: GradientShare | None = None
        self.configure(**options)

    def configure(self, loss_weight: float | None = None) -> None:
        """Set options of the base class; None leaves one as the class has it."""
        if loss_weight is not None:
            self.loss_weight = number(type(self).__name__, 'loss_weight', loss_weight, 0)

    @property
    def varies(self) -> bool:
        """Whether the weight in force is not always the one in the config."""
        return self.share is not None or self.schedule != WeightSchedule()

    def needs(self) -> Needs:
        """What :meth:`forward` asks its :class:`Step` for."""
        raise NotImplementedError

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
        parts = value if isinstance(value, dict) else {} if value is None else {'': value}
        return {name: self.loss_weight * part for name, part in parts.items()}

    def nothing(self, zero: Tensor) -> Tensor:
        """A zero that depends on every parameter of the term: DDP waits for each gradient."""
        return sum((0 * parameter.sum() for parameter in self.parameters()), zero)


class RowTerm(DistillTerm):
    """A term over what both networks predict for the same anchors or RoIs.

    A method overrides :meth:`compare`. It is called once for an RPN and once for each stage of a
    RoI head; the results are weighted as the head's own losses are, and summed.

    Args:
        site: 'rpn' or 'rcnn'.
        kind: 'cls' for logits, 'bbox' for deltas of positive anchors or RoIs.
        hard_weight: see :class:`DistillTerm`.
        loss_weight: see :class:`DistillTerm`.
    """

    site, kind = 'rcnn', 'cls'

    def configure(  # type: ignore[override]
        self, site: str | None = None, kind: str | None = None, hard_weight: float | None = None,
        loss_weight: float | None = None,
    ) -> None:  # fmt: skip
        super().configure(loss_weight)
        self.site, self.kind = site or self.site, kind or self.kind
        if self.site not in ('rpn', 'rcnn') or self.kind not in ('cls', 'bbox'):
            raise ValueError(
                f"site={self.site!r} must be 'rpn' or 'rcnn', kind={self.kind!r} 'cls' or 'bbox'"
            )
        if hard_weight is not None:
            self.hard_weight = number(type(self).__name__, 'hard_weight', hard_weight, 0, 1)

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

    Args:
        pairs: layers by name: 'neck' (all its outputs), 'backbone[2]', or dict(student='...',
            teacher='...', adapter='...').
        loss_weight: see :class:`DistillTerm`.

    Attributes:
        adapter: kind of adaptation layer where a pair names none, see :func:`build_adapter`.
    """

    adapter: str | None = None
    entries: tuple = ('neck',)
    pairs: Sequence[LayerPair] = ()

    def configure(  # type: ignore[override]
        self, pairs: Sequence[str | dict] | None = None, loss_weight: float | None = None
    ) -> None:
        super().configure(loss_weight)
        if pairs is not None:
            self.entries = tuple(pairs)

    def needs(self) -> Needs:
        return Needs(pairs=self.entries)

    def bind(self, pairs: Sequence[LayerPair]) -> None:
        self.pairs = list(pairs)
        self.adapters = nn.ModuleDict()
        self.layers = nn.ModuleDict()
        for pair in pairs:
            self.adapters[pair.name] = build_adapter(*pair.shapes, pair.adapter or self.adapter)
            if (layers := self.build(pair)) is not None:
                self.layers[pair.name] = layers

    def build(self, pair: LayerPair) -> nn.Module | None:
        """Layers of the term's own for one pair, from its name, channels and strides."""
        return None

    def compare(self, student: Tensor, teacher: Tensor, layers: Any, boxes: Any) -> Any:
        """The unweighted loss of one pair, a scalar or a dict of parts.

        Args:
            student: the adapted feature, (N, C, H, W), or (n, C) of vectors.
            teacher: the teacher's on the same grid, detached.
            layers: what :meth:`build` returned for the pair.
            boxes: ground truth of each image, (n, 4), xyxy in cells; None if not over the image.
        """
        raise NotImplementedError

    def forward(  # type: ignore[override]
        self, student: list, teacher: list, layers: list, boxes: list
    ) -> Any:
        """The unweighted loss of all pairs; each argument is a list, fine to coarse."""
        values = [self.compare(*each) for each in zip(student, teacher, layers, boxes, strict=True)]
        if isinstance(values[0], dict):
            return {name: sum(value[name] for value in values) for name in values[0]}
        return sum(values)

    def distil(self, step: Step) -> dict[str, Tensor]:
        student, teacher = [], []
        for pair in self.pairs:
            guided, hint = step.features(pair)
            student.append(self.adapters[pair.name](guided))
            teacher.append(laid_out(hint, student[-1]))
        layers = [dict(self.layers).get(p.name) for p in self.pairs]
        return self.weighed(self(student, teacher, layers, [step.boxes(p) for p in self.pairs]))
