"""The one reader of ``model.distillation``: its keys, its defaults, and what it refuses."""

from __future__ import annotations

import copy
import difflib
import functools
import inspect
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NoReturn

from mmengine.config import Config
from mmengine.hub import get_config
from torch import nn

from . import shipped
from .options.acceleration import Acceleration
from .options.adapters import KINDS
from .options.resolution import Resolution
from .options.schedule import WeightSchedule
from .options.share import GradientShare
from .options.unlabelled import PseudoLabels, Unlabelled

UNTRAINED = 'random'
"""The ``teacher_ckpt`` of a teacher that is left untrained, for tests."""
TERM_PREFIXES = ('kd_terms.', 'kd_adapters.')
"""How the keys of what a distilled checkpoint holds beside the plain student begin; the second is
that of earlier versions, which had no terms but hints."""
SETTINGS = ('start', 'resolution', 'classes', 'accelerate', 'check_teacher', 'unlabelled')
"""The entries of ``distillation`` that are no terms."""
PAPER_TERMS = {
    'rpn_cls': ('rpn', 'cls'),
    'rpn_bbox': ('rpn', 'bbox'),
    'rcnn_cls': ('rcnn', 'cls'),
    'rcnn_bbox': ('rcnn', 'bbox'),
    'hint': (None, 'features'),
}
"""The keys of the paper's terms, with the site and the kind that such a key implies."""
_LOG_NAMES = {'rcnn_cls': 'loss_kd_cls', 'rcnn_bbox': 'loss_kd_bbox'}
_LAYER = re.compile(r'(?P<path>[\w.]+?)(\[(?P<index>\d+)\])?')


class TeacherError(ValueError):
    """The teacher's config or checkpoint is not what it has to be."""


class MissingFileError(TeacherError, FileNotFoundError):
    """No file is at a path of the teacher's.

    Args:
        key: of ``model``, that names it.
        path: its value.
        places: where it was looked for; without them a relative path is one of the working
            directory, as in a program that mmkd does not run.
    """

    def __init__(self, key: str, path: str, places: Sequence[str] = ()) -> None:
        where = list(places) or [os.path.abspath(os.path.expanduser(path))]
        what = 'is a directory' if any(map(os.path.isdir, where)) else 'does not exist'
        tried = '' if where == [path] else f' (looked for {" and ".join(where)})'
        kind = 'config' if key == 'teacher_config' else 'checkpoint'
        advice = f'Set model.{key} to its path' + (' or URL' if kind == 'checkpoint' else '')
        if not places and not os.path.isabs(os.path.expanduser(path)):
            advice += (
                f'; if the path is relative to the config, write {"{{ fileDirname }}/" + path!r}'
            )
        super().__init__(
            f"model.{key} {path!r} cannot be read: the teacher's {kind} {what}{tried}. {advice}"
        )
        self.key, self.path, self.places = key, path, tuple(places)

    def __reduce__(self) -> tuple:
        return type(self), (self.key, self.path, self.places)


@dataclass(frozen=True)
class TermConfig:
    """An entry of ``distillation`` that is a term.

    Attributes:
        type: the class, or its name in a registry.
        args: what it is built with.
        schedule, share: when it is in force, and its weight as a share of the gradient.
    """

    type: str | type
    args: dict
    schedule: WeightSchedule
    share: GradientShare | None


@dataclass(frozen=True)
class Recipe:
    """What ``distillation`` says, checked and with its defaults."""

    terms: dict[str, TermConfig]
    starts_from_teacher: bool
    check_teacher: bool
    acceleration: Acceleration
    resolution: Resolution | None
    classes: dict = field(default_factory=dict)
    unlabelled: PseudoLabels = field(default_factory=PseudoLabels)


def read_recipe(distillation: Any) -> Recipe:
    """Read ``distillation``.

    Raises:
        ValueError: naming the entry, its value and the way out.
    """
    given = copy.deepcopy(require_dict('distillation', distillation))
    start = given.get('start')
    if start not in (None, 'teacher'):
        raise ValueError(f"distillation.start={start!r} must be None or 'teacher'")
    check_teacher = given.get('check_teacher', True)
    if not isinstance(check_teacher, bool):
        raise ValueError(f'distillation.check_teacher={check_teacher!r} must be True or False')
    accelerate = require_dict('distillation.accelerate', given.get('accelerate') or {})
    require_known('distillation.accelerate', accelerate, [f.name for f in fields(Acceleration)])
    acceleration = Acceleration(**accelerate)
    resolution = Resolution.of(given.get('resolution'))
    # Where both networks see one scale there is one image, and nothing to align.
    if resolution is not None and resolution.ratios == (1, 1):
        resolution = None
    classes = require_dict('distillation.classes', given.get('classes') or {})
    require_known('distillation.classes', classes, ['student', 'teacher', 'names'])
    _require_names(classes)
    terms = {k: _read_term(k, v) for k, v in given.items() if k not in SETTINGS}
    twice = [k for k in terms if sum(log_name(k) == log_name(other) for other in terms) > 1]
    if twice:
        raise ValueError(
            f'distillation.{" and distillation.".join(twice)} would both be logged as '
            f'{log_name(twice[0])}: rename one'
        )
    return Recipe(
        terms, start == 'teacher', check_teacher, acceleration, resolution, classes,
        PseudoLabels(Unlabelled.of(given.get('unlabelled'))),
    )  # fmt: skip


def _read_term(key: str, given: Any) -> TermConfig:
    if not isinstance(given, dict) or (key not in PAPER_TERMS and 'type' not in given):
        if key not in PAPER_TERMS:
            require_known('distillation', {key: given}, [*PAPER_TERMS, *SETTINGS], _A_TERM)
        raise ValueError(
            f'distillation.{key}={given!r} must be a loss, dict(type=...): ' + turn_off(key)
        )
    if not str(key).isidentifier():
        raise ValueError(
            f'distillation has a term {key!r}: a key names losses in the log and weights in the '
            'checkpoint, so it must be an identifier'
        )
    if hasattr(nn.ModuleDict(), key):
        raise ValueError(
            f'distillation has a term {key!r}: PyTorch has an attribute of that name where terms '
            f'are kept (torch.nn.ModuleDict), so call it another, such as my_{key}'
        )
    args = dict(given)
    times = require_dict(f'distillation.{key}.schedule', args.pop('schedule', {}))
    require_known(f'distillation.{key}.schedule', times, [f.name for f in fields(WeightSchedule)])
    share = args.pop('share', None)
    if share is not None and not isinstance(share, dict):
        share = dict(share=share)
    require_known(f'distillation.{key}.share', share or {}, [f.name for f in fields(GradientShare)])
    kind = args.pop('type', None)
    if not kind or not isinstance(kind, (str, type)):
        raise ValueError(
            f'distillation.{key}: type={kind!r} must name a loss or a term, such as '
            + _EXAMPLES[PAPER_TERMS.get(key, (None, 'cls'))[1]]
        )
    try:
        schedule = WeightSchedule(**times)
    except ValueError as error:
        raise ValueError(f'distillation.{key}.schedule: {error}') from None
    try:
        measured = GradientShare(**share) if share is not None else None
    except (TypeError, ValueError) as error:
        raise ValueError(f'distillation.{key}: {error}') from None
    return TermConfig(kind, args, schedule, measured)


_A_TERM = '; an entry of yours is a term if it is a dict with a type'
_EXAMPLES = {
    'cls': 'WeightedSoftCELoss', 'bbox': 'TeacherBoundedL2Loss', 'features': 'HintL2Loss',
}  # fmt: skip


def _require_names(classes: dict) -> None:
    for who in ('student', 'teacher'):
        names = classes.get(who, [])
        if not isinstance(names, (list, tuple)) or not all(isinstance(n, str) for n in names):
            raise ValueError(f'distillation.classes.{who}={names!r} must be a list of names')
        twice = [n for i, n in enumerate(names) if n in names[:i]]
        if twice:
            raise ValueError(f'distillation.classes.{who} has {twice[0]!r} twice')
    names = require_dict('distillation.classes.names', classes.get('names') or {})
    if not all(isinstance(n, str) for pair in names.items() for n in pair):
        raise ValueError(f"distillation.classes.names={names!r} must be {{'mine': 'theirs'}}")


def parse_pair(entry: Any) -> tuple[str, str, str | None]:
    """The student's layer, the teacher's and the kind of adapter of an entry of ``pairs``.

    Raises:
        ValueError: if it is neither a path nor a dict of two.
    """
    pair = dict(student=entry, teacher=entry) if isinstance(entry, str) else entry
    known = {'student', 'teacher', 'adapter'}
    if not isinstance(pair, dict) or not {'student', 'teacher'} <= set(pair) <= known:
        raise ValueError(
            f"hint pair {entry!r} must be a path, or dict(student='...', teacher='...') and "
            f"optionally adapter='...', one of {', '.join(KINDS)}"
        )
    for layer in (pair['student'], pair['teacher']):
        parse_layer(layer)
    return pair['student'], pair['teacher'], pair.get('adapter')


def parse_layer(layer: Any) -> tuple[str, int | None]:
    """Path and index of ``neck[2]``; the index is None for all outputs of ``neck``."""
    match = _LAYER.fullmatch(layer) if isinstance(layer, str) else None
    if match is None:
        raise ValueError(f'hint {layer!r} is no path of a submodule, such as neck or backbone[2]')
    return match['path'], int(match['index']) if match['index'] else None


def site_of(layer: str) -> str:
    """The site in which a layer lies, 'rpn' or 'rcnn'; '' for one of backbone or neck."""
    return {'rpn_head': 'rpn', 'roi_head': 'rcnn'}.get(layer.split('.')[0], '')


def check_pairs(owner: str, pairs: Any) -> None:
    """Check the form of a term's layer pairs.

    Raises:
        ValueError: if they are no list, or one is malformed or there twice.
    """
    if not isinstance(pairs, (list, tuple)):
        raise ValueError(f"{owner}.pairs={pairs!r} must be a list, such as ['neck']")
    seen: list[tuple[str, str]] = []
    for entry in pairs:
        layers = parse_pair(entry)[:2]
        if layers in seen:
            raise ValueError(f'{owner}.pairs has {entry!r} twice: it would count twice')
        seen.append(layers)


@dataclass(frozen=True)
class Needs:
    """What a term asks its :class:`mmkd.models.step.Step` for; the teacher computes nothing else.

    Attributes:
        pairs: layer pairs, see :func:`parse_pair`.
        rows: (site, kind), such as ('rcnn', 'cls'), whose rows it compares.
        score_maps, anchors: whether it wants the teacher's objectness, the student's anchors.
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
        of_pairs = {site_of(parse_pair(entry)[1]) for entry in self.pairs} - {''}
        of_maps = {'rpn'} if self.score_maps else set()
        return {site for site, _ in self.rows} | of_maps | of_pairs | {*self.cross}


def log_name(key: str, part: str = '') -> str:
    """The name under which a term, or a part of its loss, is logged."""
    name = _LOG_NAMES.get(key, f'loss_kd_{key}')
    return f'{name}_{part}' if part else name


def term_of(logged: str, keys: Iterable[str]) -> str | None:
    """The key, among ``keys``, of the term that a logged loss belongs to."""
    found = [k for k in keys if logged == log_name(k) or logged.startswith(f'{log_name(k)}_')]
    return max(found, key=lambda key: len(log_name(key)), default=None)


def terms(distillation: dict) -> list[str]:
    """Keys of the entries that are terms: those with a ``type``."""
    return [k for k, v in distillation.items() if isinstance(v, dict) and 'type' in v]


def terms_on(distillation: dict) -> list[str]:
    """Keys of the terms whose weight is not the constant 0. Equation (2) weights its soft loss with
    1 - hard_weight where no weight is given."""
    on = []
    for name in terms(distillation):
        term = distillation[name]
        soft = getattr(term['type'], '__name__', str(term['type'])).endswith('WeightedSoftCELoss')
        default = 1 - term.get('hard_weight', 0.5) if soft else 1
        weight = term.get('loss_weight', default)
        if isinstance(weight, dict) or weight is None or weight != 0:
            on.append(name)
    return on


def turn_off(*keys: str) -> str:
    """The way out of a term that cannot be."""
    return 'turn it off by ' + ' and '.join(f'model.distillation.{k}.loss_weight=0' for k in keys)


# ------------------------------------------------------------------------ small checks of values


def number(owner: str, name: str, value: object, low: float, high: float = float('inf')) -> float:
    """``value`` as a float.

    Raises:
        ValueError: if it is no finite number within the bounds.
    """
    infinite = float('inf')
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not low <= value <= high or abs(value) == infinite:  # type: ignore
        bounds = f'at least {low}' if high == infinite else f'between {low} and {high}'
        raise ValueError(f'{owner}: {name}={value!r} must be a finite number {bounds}')
    return float(value)  # type: ignore


def require_one_of(name: str, value: Any, *known: str) -> str:
    """``value``, which must be one of ``known``."""
    if value not in known:
        raise ValueError(f'{name}={value!r} must be {" or ".join(map(repr, known))}')
    return value


def refuse_loss(term: Any, value: Any) -> NoReturn:
    """Refuse what a term returned, which cannot be trained on."""
    what = f'a tensor of shape {tuple(value.shape)}' if hasattr(value, 'shape') else repr(value)
    raise TypeError(
        f'{type(term).__name__} returned {what}: a loss must be a scalar tensor, a dict of such by '
        'name, or None'
    )


def refuse_shapes(**tensors: Any) -> NoReturn:
    """Refuse tensors whose shapes differ and must not."""
    shapes = [f'{n.replace("_", " ")} {tuple(t.shape)}' for n, t in tensors.items()]
    raise ValueError(f'{" and ".join(shapes)} differ in shape')


def require_dict(owner: str, given: Any) -> dict:
    """A copy of ``given``, which must be a dict."""
    if not isinstance(given, dict):
        raise ValueError(f'{owner}={given!r} must be a dict')
    return dict(given)


def require_known(owner: str, given: Iterable, names: Sequence[str], more: str = '') -> None:
    """Refuse keys that are none of ``names``, with the nearest of them."""
    for key in given:
        if key not in names:
            near = difflib.get_close_matches(str(key), list(names))
            near = near or difflib.get_close_matches(str(key), list(names), 3, 0)
            raise ValueError(
                f'{owner} has no entry {key!r}; did you mean {" or ".join(near)}?{more}'
            )


def check_model(constructor: Callable, given: dict, eval_teacher: bool) -> None:
    """Check the arguments of ``model`` that are the student's own against its constructor.

    Raises:
        ValueError: if the student is a one-stage detector, or a key is unknown; if the teacher is
            to be in training mode.
    """
    if not eval_teacher:
        raise ValueError(
            'eval_teacher=False is refused: a teacher in training mode changes its BatchNorm '
            'buffers with every batch, so it would not be the network you trained. Remove it'
        )
    taken = inspect.signature(constructor).parameters.values()
    if any(each.kind is each.VAR_KEYWORD for each in taken):
        return
    if 'bbox_head' in given and 'roi_head' not in given:
        raise ValueError(
            'model has a bbox_head and no roi_head, so the student is a one-stage detector: mmkd '
            'distils into two-stage ones, such as faster-rcnn_r50_fpn; a one-stage detector can be '
            'the teacher'
        )
    ours = ['distillation', 'teacher_config', 'teacher_ckpt', 'teacher_sha256', 'detector']
    require_known(
        'model', given, [*(each.name for each in taken), *ours],
        '; an argument of a detector class of your own needs its name beside it, '
        'detector=_base_.model.type',
    )  # fmt: skip


# --------------------------------------------------------------------------------- the two configs


def read_config(config: str | Path | dict | Config) -> Config:
    """Resolve a config: a path, a name (``mmdet::...``, or ``mmkd::...`` of mmkd's own), a dict.

    One that has been read already is copied.
    """
    if isinstance(config, Config):
        return copy.deepcopy(config)
    if isinstance(config, dict):
        return Config(copy.deepcopy(dict(config)))
    path = str(config)
    if path.startswith('mmkd::'):
        return Config.fromfile(shipped.base(path.removeprefix('mmkd::')))
    return get_config(path) if '::' in path else Config.fromfile(path)


def read_teacher_config(config: str | Path | dict | Config | None) -> Config:
    """Resolve ``teacher_config``: a path, an ``mmdet::...`` name of the installed package, a dict.

    Raises:
        TeacherError: if there is no such config, or it has no ``model``.
    """
    if config is None or config == '':
        raise TeacherError(
            'model.teacher_config is missing: name the config that teacher_ckpt was trained with, '
            'a path or an mmdet:: name'
        )
    path = '' if isinstance(config, dict | Config) else str(config)
    if path and '::' not in path and not os.path.isfile(path):
        raise MissingFileError('teacher_config', path)
    try:
        resolved = read_config(config)
    except Exception as error:  # a config is a program
        raise TeacherError(
            f'model.teacher_config {config!r} cannot be read: {type(error).__name__}: {error}'
        ) from error
    if 'model' not in resolved:
        raise TeacherError(f'teacher_config {resolved.filename!r} defines no model')
    old = 'data' in resolved or 'pretrained' in resolved.model
    if old and 'data_preprocessor' not in resolved.model:
        raise TeacherError(
            f'teacher_config {resolved.filename!r} is of MMDetection 2.x: its model has no '
            'data_preprocessor. In 3.x what Normalize and Pad say in the pipeline stands there, '
            "data_preprocessor=dict(type='DetDataPreprocessor', mean=[...], std=[...], "
            'bgr_to_rgb=True, pad_size_divisor=32), and pretrained=... is '
            "backbone.init_cfg=dict(type='Pretrained', checkpoint=...)"
        )
    return resolved


def dicts(node: Any, skip: Sequence[str] = ()) -> Iterator[dict]:
    """Every dict in a config, the outer ones first, but for the values of the keys ``skip``."""
    if isinstance(node, dict):
        yield node
        node = [value for key, value in node.items() if key not in skip]
    if isinstance(node, (list, tuple)):
        for value in node:
            yield from dicts(value, skip)


def pipelines(node: Any) -> Iterator[dict]:
    """Every dict that has a pipeline, also inside wrappers of data sets."""
    return (each for each in dicts(node) if isinstance(each.get('pipeline'), (list, tuple)))


_OF_PAIRS = ('teacher_config', 'teacher_ckpt', 'teacher_sha256', 'eval_teacher', 'distillation')


def is_pair(model: dict) -> bool:
    """Whether a model config is that of a student with its teacher.

    MMDetection's own distilled detectors have a ``teacher_config`` too.
    """
    return 'teacher_config' in model and 'distillation' in model


def plain_student(model: dict) -> dict:
    """The model config of a student alone: what plain MMDetection builds and tests.

    Any other config comes back as it is, in a copy.
    """
    model = copy.deepcopy(model)
    if 'distillation' in model:
        for key in _OF_PAIRS:
            model.pop(key, None)
        trident = 'Trident' in str(model['type'])
        own = model.pop('detector', None)
        model['type'] = own or ('TridentFasterRCNN' if trident else 'TwoStageDetector')
    return model


ADD_NOTHING = ('TwoStageDetector', 'FasterRCNN', 'CascadeRCNN', 'MaskRCNN')
"""Names that MMDetection has for one and the same detector."""


@functools.lru_cache  # the command line and the runner both ask
def own_detector(path: str) -> str | None:
    """The detector class that the config at ``path`` inherits and replaces by the distilling one.

    None where it inherits none, or one that is MMDetection's plain two-stage detector.
    """
    for base in Config._get_base_files(path):
        # No public function of MMEngine says what a config inherits.
        where, _ = Config._get_cfg_path(base, path)
        model = Config.fromfile(where, import_custom_modules=False).get('model') or {}
        if model.get('type') is None:
            continue
        kind = str(model['type'])
        if 'teacher_config' in model:
            return own_detector(where)
        return None if kind.rpartition('.')[2] in ADD_NOTHING else kind
    return None


def without_terms(state: dict) -> dict:
    """The entries of a state dict that are the plain student's."""
    return {
        k: v for k, v in state.items() if not k.removeprefix('module.').startswith(TERM_PREFIXES)
    }


_ADAPTERS = re.compile(r'^((?:module\.)?)kd_adapters\b')
"""How earlier versions named the adaptation layers of the hints, which were the one term to have
parameters."""


def rename_before_loading(module: Any, state: dict, *_: Any) -> None:
    """A ``load_state_dict`` pre-hook: checkpoints of earlier versions load."""
    rename_adapters(state)


def rename_adapters(state: dict) -> None:
    """Give the adaptation layers in an earlier version's state dict today's names, in place.

    Also the keys of ``paramwise_cfg.custom_keys`` that name them.
    """
    for key in [key for key in state if _ADAPTERS.match(key)]:
        state[_ADAPTERS.sub(r'\1kd_terms.hint.adapters', key)] = state.pop(key)
