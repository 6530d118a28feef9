"""Whether the heads of two networks can be compared, said before training and in words."""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mmdet.models.detectors import TwoStageDetector
from mmdet.registry import MODELS

from .options.anchor_match import AnchorMatch
from .options.class_map import ClassMap
from .options.head_layout import HeadLayout, same_coder
from .options.resolution import Resolution
from .recipe import parse_pair, site_of, turn_off

SCORED_BY = ('stage', 'x', 'rois')
"""What a RoI head may need to score RoIs."""


def distilling_class(cls: type, detector: str | type | None) -> type:
    """``cls`` and the student's own detector class in one.

    Args:
        cls: the distilling detector.
        detector: the student's class or its name in MMDetection's registry; None for ``cls``.

    Raises:
        ValueError: if there is no such class, or it is no two-stage detector.
    """
    if detector is None:
        return cls
    own: Any = MODELS.get(detector) if isinstance(detector, str) else detector
    base: Any = cls
    if own is None:
        near = difflib.get_close_matches(str(detector), list(MODELS.module_dict), 3, 0)
        raise ValueError(
            f'model.detector={detector!r} is registered nowhere; near ones: {", ".join(near)}. One '
            'of yours is found if custom_imports names its module'
        )
    if not (isinstance(own, type) and issubclass(own, TwoStageDetector)):
        raise ValueError(
            f'model.detector={detector!r} is no two-stage detector, and mmkd distils into those; a '
            'one-stage detector can be the teacher'
        )
    return cls if issubclass(cls, own) else _joined(base, own)


@functools.cache
def _joined(cls: Any, own: Any) -> type:
    return type(cls.__name__, (cls, own), {'__module__': cls.__module__, 'student_class': own})


@dataclass(frozen=True)
class Comparison:
    """How the two networks are compared.

    Attributes:
        rpn: finds the student's anchors among the teacher's; None where both have the same.
        rcnn: the layout of the RoI head's predictions, stage by stage.
        sites: those at which the teacher has to answer.
        left_out: by key why a term is left out.
        shared_losses: by site the term that takes a share of the student's own classification loss.
    """

    rpn: AnchorMatch | None
    rcnn: list[HeadLayout]
    sites: set[str]
    left_out: dict[str, str]
    shared_losses: dict[str, str]


def compare_networks(
    student: Any, teacher: Any, name: str, terms: dict[str, Any], resolution: Resolution | None,
    classes: ClassMap | None,
) -> Comparison:  # fmt: skip
    """Find out how student and teacher are compared; terms that cannot be are removed.

    Args:
        student, teacher: the two networks.
        name: of the teacher's config, for messages.
        terms: by key.
        resolution: the two scales; None for one.
        classes: which class is which; None where the lists are the same.

    Raises:
        ValueError: if a term cannot be, with the way out.
    """
    if getattr(student.backbone, 'num_branch', 1) != getattr(student, 'num_branch', 1):
        raise ValueError(
            f"the student's {type(student.backbone).__name__} belongs to a TridentFasterRCNN: "
            "write type='mmkd.KnowledgeDistillationTridentFasterRCNN'"
        )
    for key, term in terms.items():
        try:
            term.check_networks(student, teacher)
        except ValueError as error:
            raise ValueError(f'distillation.{key}: {error}; or {turn_off(key)}') from None
    match, layouts, left_out = None, [], {}
    if keys := keys_at('rpn', terms):
        match = match_anchors(student, teacher, resolution, keys)
        if match is not None and not match.share:
            # A ratio that is no power of two, say: there is no wrong value to mend.
            left_out = leave_out_rpn(terms, match.ratio)
    if keys := keys_at('rcnn', terms):
        layouts = head_layouts(student, teacher, name, classes, keys)
    sites = {site for term in terms.values() for site in term.needs().sites}
    return Comparison(match, layouts, sites, left_out, hard_losses_shared(terms))


def map_classes(given: dict, terms: dict[str, Any], starts_from_teacher: bool) -> ClassMap | None:
    """The class map of ``distillation.classes``; None where nothing depends on classes, as hints
    and the RPN do not.

    Raises:
        ValueError: if the teacher's names are given and the student's are not.
    """
    needs = [term.needs() for term in terms.values()]
    by_class = any('rcnn' in {*dict(need.rows), *need.cross} for need in needs)
    if 'teacher' not in given or not (by_class or starts_from_teacher):
        return None
    if 'student' not in given:
        raise ValueError(
            'distillation.classes names the classes of the teacher alone: give student=[...] too, '
            'in the order of its head'
        )
    return ClassMap(**given)


@dataclass(frozen=True)
class Keys:
    """The keys of the terms that need a site, for messages that name the way out.

    Attributes:
        all: of all of them.
        bbox: of those that compare deltas.
        hints: of those with layer pairs inside the head.
    """

    all: list[str]
    bbox: list[str]
    hints: list[str]


def keys_at(site: str, terms: Mapping[str, Any]) -> Keys | None:
    """The terms that need ``site``; None where no term does."""
    needs = {key: term.needs() for key, term in terms.items()}
    found = {key: need for key, need in needs.items() if site in need.sites}
    if not found:
        return None
    bbox = [key for key, need in found.items() if (site, 'bbox') in need.rows]
    hints = [
        key
        for key, need in found.items()
        if site in {site_of(parse_pair(entry)[1]) for entry in need.pairs}
    ]
    return Keys(list(found), bbox, hints)


def leave_out_rpn(terms: dict, ratio: float) -> dict[str, str]:
    """Remove the terms that compare RPNs without a common anchor; the reason by key.

    Raises:
        ValueError: if none is left.
    """
    why = f'no anchor has a counterpart at ratio {ratio:.4g}'
    needs = {key: term.needs() for key, term in terms.items()}
    keys = [key for key, need in needs.items() if 'rpn' in {*dict(need.rows), *need.cross}]
    for key in keys:
        del terms[key]
    if not terms:
        raise ValueError(
            f'distillation has RPN terms alone, and at ratio {ratio:.4g} no anchor of the student '
            "is one of the teacher's: add rcnn_cls, rcnn_bbox or hint, or take a ratio of 2"
        )
    return dict.fromkeys(keys, why)


def hard_losses_shared(terms: Mapping[str, Any]) -> dict[str, str]:
    """By site the term that takes a share of the student's own classification loss (μ below 1).

    Raises:
        ValueError: if two terms take a share of one.
    """
    found: dict[str, str] = {}
    for key, term in terms.items():
        for site, kind in term.needs().rows:
            if kind != 'cls' or term.hard_weight == 1:
                continue
            if site in found:
                raise ValueError(
                    f'distillation.{found[site]} and distillation.{key} both take a share of the '
                    f"{site} head's own classification loss (hard_weight, mu of equation (2)): "
                    'set hard_weight=1 in one of them, and give it a loss_weight'
                )
            found[site] = key
    return found


def match_anchors(
    student: Any, teacher: Any, resolution: Resolution | None, keys: Keys
) -> AnchorMatch | None:
    """Find out how the student's anchors are looked up among the teacher's.

    Args:
        student, teacher: the two networks.
        resolution: their two scales; None for one.
        keys: of the terms that need the RPN.

    Returns:
        The match, which may find no anchor where the scales differ; None where both RPNs have the
        same anchors at the same places.

    Raises:
        ValueError: if the two RPNs cannot be compared.
    """
    heads: dict[str, Any] = {
        who: getattr(n, 'rpn_head', None) for who, n in _both(student, teacher)
    }
    for who, head in heads.items():
        for need in ('loss_cls', 'loss_bbox', 'prior_generator', 'bbox_coder'):
            if not hasattr(head, need):
                raise ValueError(
                    f"the {who}'s RPN ({type(head).__name__}) has no {need}, so it cannot be "
                    'distilled: ' + turn_off(*keys.all)
                )
    own, theirs = heads.values()
    generators = own.prior_generator, theirs.prior_generator
    if not all(hasattr(generator, 'base_anchors') for generator in generators):
        names = ' against '.join(type(generator).__name__ for generator in generators)
        raise ValueError(
            f'one of the two RPNs has no anchors ({names}), so they do not answer one question: '
            + turn_off(*keys.all)
        )
    match = None
    if resolution or not same_anchors(*generators):
        match = AnchorMatch(*generators, resolution.ratio if resolution else 1.0)
        if not match.share:
            if resolution:
                return match
            described = ', against '.join(map(_described, generators))
            raise ValueError(
                f"no anchor of the student is one of the teacher's ({described}), so the two RPNs "
                'do not answer one question: ' + turn_off(*keys.all)
            )
    elif not same_coder(own.bbox_coder, theirs.bbox_coder):
        match = AnchorMatch(*generators)
    if keys.bbox and (own.reg_decoded_bbox or theirs.reg_decoded_bbox):
        raise ValueError(
            'an RPN that regresses boxes, not deltas (reg_decoded_bbox), cannot be distilled: '
            + turn_off(*keys.bbox)
        )
    return match


def head_layouts(
    student: Any, teacher: Any, name: str, classes: ClassMap | None, keys: Keys
) -> list[HeadLayout]:
    """How the predictions of both RoI heads are laid side by side, stage by stage.

    Args:
        student, teacher: the two networks.
        name: of the teacher's config, for messages.
        classes: which class is which; None where the lists are the same.
        keys: of the terms that need the RoI head.

    Raises:
        ValueError: if the two heads cannot be compared.
    """
    for who, network in _both(student, teacher):
        head: Any = getattr(network, 'roi_head', None)
        box_head = _at(getattr(head, 'bbox_head', None), 0)
        kind = type(box_head).__name__
        if not hasattr(head, '_bbox_forward') or not hasattr(box_head, 'loss_cls'):
            raise ValueError(
                f"the {who}'s RoI head ({type(head).__name__}) does not score RoIs by class, "
                'so it cannot be distilled: ' + turn_off(*keys.all)
            )
        if getattr(box_head, 'num_instance', 1) > 1:
            raise ValueError(
                f"the {who}'s box head ({kind}) answers each RoI with a set of boxes, so answers "
                'cannot be paired: ' + turn_off(*keys.all)
            )
        if keys.bbox and not hasattr(box_head, 'loss_bbox'):
            raise ValueError(
                f"the {who}'s box head ({kind}) regresses no deltas: " + turn_off(*keys.bbox)
            )
        asked = inspect.signature(head._bbox_forward).parameters.values()
        needs = [p.name for p in asked if p.default is p.empty and p.name not in SCORED_BY]
        if needs:
            raise ValueError(
                f"the {who}'s RoI head ({type(head).__name__}) scores RoIs by more than features "
                f'({", ".join(needs)}): ' + turn_off(*keys.all)
            )
        if keys.bbox and not getattr(box_head, 'with_reg', True):
            raise ValueError(f'the {who} regresses no boxes: ' + turn_off(*keys.bbox))
    own, theirs = student.roi_head.bbox_head, teacher.roi_head.bbox_head
    _require_classes(_at(own, 0).num_classes, _at(theirs, 0).num_classes, name, classes, keys)
    stages, last = (getattr(n.roi_head, 'num_stages', 1) for n in (student, teacher))
    if keys.hints and stages != last:
        raise ValueError(
            'a hint in the RoI head needs as many stages in both networks: the student has '
            f'{stages}, the teacher {last}; take a hint before it'
        )
    return [HeadLayout(_at(own, i), _at(theirs, min(i, last - 1)), classes) for i in range(stages)]


def _require_classes(
    own: int, theirs: int, name: str, classes: ClassMap | None, keys: Keys
) -> None:
    if classes is None:
        if own != theirs:
            raise ValueError(
                f'the teacher {name} has {theirs} classes, the student {own}, and their names are '
                'not known: give distillation.classes=dict(student=[...], teacher=[...]) in the '
                'order of the heads, or ' + turn_off(*keys.all)
            )
        return
    for who, names, count in (
        ('student', classes.student, own),
        ('teacher', classes.teacher, theirs),
    ):
        if len(names) != count:
            raise ValueError(
                f'distillation.classes.{who} has {len(names)} names, the {who} '
                f'{count} classes (num_classes of its box head)'
            )


def _both(student: Any, teacher: Any) -> tuple[tuple[str, Any], tuple[str, Any]]:
    return ('student', student), ('teacher', teacher)


def _at(heads: Any, stage: int) -> Any:
    return heads[stage] if hasattr(heads, '__getitem__') else heads


def same_anchors(own: Any, theirs: Any) -> bool:
    """Whether two anchor generators put the same anchors in the same places."""
    return (
        own.strides == theirs.strides
        and own.num_base_priors == theirs.num_base_priors
        and all(a.equal(b) for a, b in zip(own.base_anchors, theirs.base_anchors, strict=True))
    )


def _described(generator: Any) -> str:
    """An anchor generator in a few words: strides, and the sides and the middle of its first."""
    base = generator.base_anchors[0].float()
    sides = ', '.join(f'{w:.0f}x{h:.0f}' for w, h in (base[:, 2:] - base[:, :2]).tolist())
    x, y = ((base[0, :2] + base[0, 2:]) / 2).tolist()
    strides = ', '.join(f'{stride[0]}' for stride in generator.strides)
    return f'strides {strides}, the first with anchors of {sides} around ({x:g}, {y:g})'
