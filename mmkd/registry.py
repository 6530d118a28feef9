"""The registry of distillation terms, and how an entry of ``distillation`` becomes one."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping
from typing import Any

from mmdet.registry import MODELS
from mmengine.registry import Registry
from torch import nn

from .recipe import PAPER_TERMS, TermConfig, check_pairs, require_known, turn_off


class TermRegistry(Registry):
    """A registry that says what to do about a name that is taken."""

    def _register_module(
        self, module: Any, module_name: str | list[str] | None = None, force: bool = False
    ) -> None:
        try:
            super()._register_module(module, module_name, force)
        except KeyError as error:
            raise KeyError(
                f'{error.args[0]}: rename the class in {module.__module__}, or write '
                'register_module(force=True) to replace it, as in a notebook cell that runs twice'
            ) from None


TERMS = TermRegistry('distillation term', parent=MODELS, scope='mmkd')
"""Where ``type`` of an entry is looked up: a term, or a tensor loss of MMDetection's registry."""
_OF_LOSSES = {'cls': 'SoftTargetTerm', 'bbox': 'RegressionTerm', 'features': 'HintTerm'}
_PAPERS = {
    'cls': ('WeightedSoftCELoss', 5),
    'bbox': ('TeacherBoundedL2Loss', 5),
    'features': ('HintL2Loss', 2),
}
"""By kind the paper's loss, and how many arguments it is called with."""
_WHERE = ('site', 'kind', 'pairs')
"""Entries that are of the term, not of the tensor loss it applies."""


def build_terms(configs: Mapping[str, TermConfig]) -> dict[str, Any]:
    """Build the terms whose weight is not the constant 0, by key.

    Raises:
        ValueError: naming the entry, if it cannot be built.
    """
    terms = {}
    for key, config in configs.items():
        try:
            term = _build(key, config)
        except (TypeError, ValueError, KeyError, RuntimeError) as error:
            said = str(error.args[0] if error.args else error)
            owner = '' if said.startswith('distillation.') else f'distillation.{key}: '
            raise ValueError(owner + said) from error
        term.schedule, term.share = config.schedule, config.share
        if term.loss_weight != 0:
            if not getattr(term, 'entries', ('neck',)):
                raise ValueError(f"distillation.{key}.pairs is empty: name a layer, as in ['neck']")
            terms[key] = term
    return terms


def _build(key: str, config: TermConfig) -> Any:
    kind = config.type if isinstance(config.type, type) else TERMS.get(config.type)
    if kind is None:
        known = [*TERMS.module_dict, *(name for name, _ in _PAPERS.values())]
        near = difflib.get_close_matches(str(config.type), known, 3, 0)
        raise ValueError(
            f'type={config.type!r} is registered neither as a term nor as a loss; near ones: '
            f'{", ".join(near)}. One of yours is found if custom_imports names its module'
        )
    if 'pairs' in config.args:
        check_pairs(f'distillation.{key}', config.args['pairs'])
    if hasattr(kind, 'distil'):
        return _build_term(key, kind, config.args)
    return _wrap_loss(key, kind, config.args)


def _build_term(key: str, kind: Any, args: dict) -> Any:
    """A term; what its constructor does not take is given to the base class's ``configure``."""
    options = inspect.signature(kind.configure).parameters
    site, of_key = PAPER_TERMS.get(key, (None, None))
    if site and 'site' in options:
        args = {'site': site, 'kind': of_key, **args}
    parameters = inspect.signature(kind.__init__).parameters
    taken = {n: p for n, p in parameters.items() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        taken |= options
    known = [name for name in {**taken, **options} if name != 'self']
    require_known(f'distillation.{key}', args, known)
    later = {k: v for k, v in args.items() if k not in taken}
    term = kind(**{k: v for k, v in args.items() if k in taken})
    term.configure(**later)
    return term


def _wrap_loss(key: str, kind: Any, args: dict) -> Any:
    """A term that applies a tensor loss."""
    where = {k: args[k] for k in _WHERE if k in args}
    args = {k: v for k, v in args.items() if k not in _WHERE}
    taken = inspect.signature(kind).parameters
    if not any(p.kind is p.VAR_KEYWORD for p in taken.values()):
        owner = f'distillation.{key}: {getattr(kind, "__name__", kind)}'
        require_known(owner, args, [*taken, *_WHERE, 'schedule', 'share'])
    loss = MODELS.build(dict(args, type=kind))
    site, of_key = PAPER_TERMS.get(key, (None, None))
    of_loss = getattr(loss, 'kind', None)
    compares = where.pop('kind', of_key or of_loss)
    if compares not in _OF_LOSSES:
        raise ValueError(
            f'{type(loss).__name__} is a loss, and the key does not tell what it compares: give '
            "kind='cls', 'bbox' or 'features' beside its type"
        )
    if of_loss not in (None, compares) or not _fits(loss, compares):
        raise ValueError(
            f'distillation.{key}: type={type(loss).__name__} is no loss for this term: take '
            f'{_PAPERS[compares][0]}, or one with its loss_weight and its forward'
        )
    if compares != 'features':
        where = {'site': site, **where, 'kind': compares}
        if where['site'] is None:
            raise ValueError(
                "a loss over the rows of a head needs site='rpn' or site='rcnn' beside its type; "
                f'or {turn_off(key)}'
            )
    return TERMS.get(_OF_LOSSES[compares])(loss, **where)


def _fits(loss: Any, kind: str) -> bool:
    """Whether a loss of one's own can be called as the paper's of this kind is."""
    if not isinstance(loss, nn.Module) or not isinstance(
        getattr(loss, 'loss_weight', None), (int, float)
    ):
        return False
    if kind == 'cls' and not hasattr(loss, 'hard_weight'):
        return False
    try:
        inspect.signature(loss.forward).bind(*[None] * _PAPERS[kind][1])
    except TypeError:
        return False
    return True
