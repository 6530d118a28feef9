"""Reads STUDY.py: arms, students and stages, as a config of MMEngine.

docs/study.md describes the file. Whatever can be refused is refused here, before the first run.
"""

from __future__ import annotations

import difflib
import itertools
import os.path
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from mmengine.config import Config
from mmengine.config.utils import ConfigParsingError

from ...engine.cfg_options import parse_options
from ...recipe import require_dict, require_known

RESERVED = ('winner', 'winners')
"""What a study calls the best arm of its last selection, and all that went on from there."""
_SELECT_ON_TEST = (
    'the test split is read once, to judge and never to choose: select on a stage with split="val"'
)


@dataclass(frozen=True)
class Variant:
    """An arm at one value of its search: ``label`` names both, ``options`` are the values."""

    arm: str
    label: str
    config: str
    options: tuple[str, ...]
    values: tuple[str, ...] = ()


@dataclass(frozen=True)
class Stage:
    """One line of ``stages``; ``arms`` and ``students`` None: those that are left, all."""

    name: str
    split: str
    seeds: list[int]
    options: list[str]
    keep: str | int | None
    arms: list[str] | None
    students: list[str]

    def places(self, candidates: int) -> int:
        """How many of so many candidates go on."""
        if isinstance(self.keep, int):
            return min(self.keep, candidates)
        return -(-candidates // 2) if self.keep == 'half' else candidates


@dataclass(frozen=True)
class Study:
    name: str
    arms: dict[str, list[Variant]]
    stages: list[Stage]
    reference: str
    students: list[str]
    contrasts: list[tuple[str, str]]
    claim: tuple[str, list[str] | None] | None
    """An arm, and those that it is to be above: None for each other arm of the last stage."""


def read_study(path: str) -> Study:
    """Reads a study's file.

    Raises:
        ValueError: naming the entry, its value and the way out.
        FileNotFoundError: if the file is not there.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f'study {path}: there is no such file')
    try:
        given = Config.fromfile(path, lazy_import=False).to_dict()
    except (OSError, SyntaxError, NameError, ConfigParsingError) as error:
        raise ValueError(f'study {path} cannot be read: {error}') from None
    known = ('name', 'config', 'arms', 'students', 'reference', 'stages', 'contrasts', 'claim')
    # A class is imported: a study may read other configs, and compute.
    own = (key for key in given if not key.startswith('_') and not isinstance(given[key], type))
    require_known(path, own, known, ' (a variable of your own begins with _)')
    students = _names(f'{path}: students', given.get('students', ['']))
    arms = {
        str(name): _variants(name, arm, given.get('config'), students)
        for name, arm in require_dict(f'{path}: arms', given.get('arms')).items()
    }
    for name in RESERVED:
        if name in arms:
            raise ValueError(f'{path}: an arm cannot be named {name}: it stands for those selected')
    if not arms:
        raise ValueError(f'{path} has no arms')
    reference = given.get('reference', next(iter(arms)))
    _require_arm('reference', reference, arms)
    stages = [
        _stage(i, each, arms, students) for i, each in enumerate(given.get('stages') or (), 1)
    ]
    if not stages:
        raise ValueError(f"{path} has no stages: stages=[dict(name='final', seeds=[0, 1, 2])]")
    if twice := _twice(stage.name for stage in stages):
        raise ValueError(f'{path}: two stages are named {twice!r}')
    contrasts = given.get('contrasts') or []
    for pair in contrasts:
        if not isinstance(pair, (list, tuple)) or len(pair) != 2 or pair[0] == pair[1]:
            raise ValueError(f"contrasts has {pair!r}: write two arms, ('winner', 'plain')")
    claim = given.get('claim')
    if isinstance(claim, str):
        claim = (claim, None)
    elif claim is not None:
        if not isinstance(claim, (list, tuple)) or len(claim) != 2 or isinstance(claim[1], str):
            raise ValueError(
                f"claim={claim!r} must be an arm, 'winner', or with its rivals, "
                "('winner', ['plain', 'start'])"
            )
        claim = (claim[0], _names('claim', claim[1]))
    name = given.get('name') or os.path.splitext(os.path.basename(path))[0]
    if not isinstance(name, str) or os.path.basename(name) != name:
        raise ValueError(f'{path}: name={name!r} must be one that files can have (NAME.md)')
    study = Study(
        name, arms, stages, reference,
        students, [(str(a), str(b)) for a, b in contrasts], claim,
    )  # fmt: skip
    _require_order(study)
    return study


def _require_order(study: Study) -> None:
    """Refuses a choice before there is one to make, and any on the test split."""
    chosen: set[str] = set()
    selected = False
    for stage in study.stages:
        names = stage.arms
        if names is not None and not selected and set(names) & set(RESERVED):
            raise ValueError(
                f'stage {stage.name!r} has {" and ".join(set(names) & set(RESERVED))} among its '
                "arms, and no stage before it selects: give one keep='half'"
            )
        entering = set(names or () if names or selected else study.arms) - set(RESERVED)
        entering.add(study.reference)
        if stage.split == 'val':
            chosen |= entering
            selected |= stage.keep is not None
            continue
        if stage.keep is not None:
            raise ValueError(
                f'stage {stage.name!r} keeps {stage.keep!r} on test: {_SELECT_ON_TEST}'
            )
        for arm in entering - chosen:
            if len(study.arms[arm]) > 1:
                raise ValueError(
                    f'stage {stage.name!r} would search the values of {arm} on test: '
                    f'{_SELECT_ON_TEST}'
                )
    last = judged_stage(study)
    mentioned = [arm for pair in study.contrasts for arm in pair]
    if study.claim:
        mentioned += [study.claim[0], *(study.claim[1] or ())]
    for arm in mentioned:
        if arm == 'winner':
            before = study.stages[: study.stages.index(last)]
            if last.split == 'test' and not any(stage.keep is not None for stage in before):
                raise ValueError(
                    f"winner: no stage before {last.name!r} selects one, as keep='half' does"
                )
            if last.split == 'val':
                raise ValueError(
                    f'winner is in a contrast or the claim, and stage {last.name!r} is on the '
                    'images that choose it, which flatter it: let a stage with split="test" end '
                    'the study'
                )
            continue
        _require_arm('a contrast or the claim', arm, study.arms)
        listed = [study.reference, *(last.arms or study.arms)]
        if arm not in listed and 'winners' not in listed:
            raise ValueError(
                f'{arm} is in a contrast or the claim, and not in stage {last.name!r}, which is '
                'judged: add it to its arms'
            )


def judged_stage(study: Study) -> Stage:
    """The stage of which contrasts and claim are: the last one on test, else the last one."""
    tested = [stage for stage in study.stages if stage.split == 'test']
    return (tested or study.stages)[-1]


def _variants(name: str, arm: Any, config: str | None, students: Sequence[str]) -> list[Variant]:
    owner = f'arms.{name}'
    given = require_dict(owner, arm)
    require_known(owner, given, ('config', 'overrides', 'search'))
    path = given.get('config', config)
    if not isinstance(path, str):
        raise ValueError(
            f'{owner} has no config: write {name}=dict(config=...), or config=... once'
        )
    if students != [''] and '{student}' not in path:
        raise ValueError(
            f'{owner}: config={path!r} is the same for each of the students: write {{student}} '
            'where their names differ'
        )
    fixed = options_of(owner, given.get('overrides') or {})
    search = require_dict(f'{owner}.search', given.get('search') or {})
    for key, values in search.items():
        if not isinstance(values, (list, tuple)) or not values:
            raise ValueError(f'{owner}.search: {key}={values!r} must be a list of values')
        if twice := _twice(map(repr, values)):
            raise ValueError(f'{owner}.search: {key} has {twice} twice')
    variants = []
    for point in itertools.product(*search.values()):
        values = dict(zip(search, point, strict=True))
        shown = tuple(f'{k.removeprefix("model.distillation.")}={v}' for k, v in values.items())
        found = options_of(f'{owner}.search', values)
        label = f'{name} ({", ".join(shown)})' if shown else str(name)
        variants.append(Variant(str(name), label, path, (*fixed, *found), shown))
    return variants


def _stage(number: int, stage: Any, arms: dict[str, list[Variant]], students: list[str]) -> Stage:
    given = require_dict(f'stage {number}', stage)
    name = given.get('name') or f'stage {number}'
    owner = f'stage {name!r}'
    known = ('name', 'split', 'seeds', 'options', 'keep', 'arms', 'students')
    require_known(owner, given, known)
    split, keep, seeds = given.get('split', 'val'), given.get('keep'), given.get('seeds')
    if split not in ('val', 'test'):
        raise ValueError(f"{owner}: split={split!r} must be 'val' or 'test'")
    good = isinstance(seeds, (list, tuple)) and all(type(s) is int and s >= 0 for s in seeds)
    if not good or not seeds or _twice(map(str, seeds)):
        raise ValueError(f'{owner}: seeds={seeds!r} must be different numbers from 0, such as [0]')
    whole = type(keep) is int and keep > 0
    if keep not in (None, 'half', 'all') and not whole:
        raise ValueError(f"{owner}: keep={keep!r} must be 'half', 'all' or a number of arms")
    names = given.get('arms')
    if names is not None:
        names = _names(f'{owner}: arms', names)
        for each in names:
            _require_arm(owner, each, [*arms, *RESERVED])
    subset = _names(f'{owner}: students', given.get('students', students))
    for each in subset:
        _require_arm(owner, each, students, 'student')
    return Stage(
        name, split, list(seeds), options_of(owner, given.get('options') or {}), keep, names, subset
    )


def options_of(owner: str, given: Any) -> list[str]:
    """``--cfg-options`` strings of a dict, or of a list of such strings."""
    if isinstance(given, (list, tuple)) and all(isinstance(each, str) for each in given):
        _parse(owner, given)
        return list(given)
    strings = []
    for key, value in require_dict(owner, given).items():
        text = f'{key}={value if isinstance(value, str) else repr(value)}'
        if _parse(owner, [text]) != {key: value}:
            raise ValueError(
                f'{owner}: {key}={value!r} cannot be written as --cfg-options, which is how a run '
                'receives it: write it into a config of its own'
            )
        strings.append(text)
    return strings


def _parse(owner: str, texts: Sequence[str]) -> dict:
    try:
        return parse_options(texts)
    except ValueError as error:
        raise ValueError(f'{owner}: {error}') from None


def _names(owner: str, given: Any) -> list[str]:
    if (
        not isinstance(given, (list, tuple))
        or not given
        or not all(isinstance(each, str) for each in given)
    ):
        raise ValueError(f'{owner}={given!r} must be a list of names')
    if twice := _twice(given):
        raise ValueError(f'{owner} has {twice!r} twice')
    return list(given)


def _require_arm(owner: str, name: Any, known: Iterable[str], kind: str = 'arm') -> None:
    if name not in list(known):
        near = difflib.get_close_matches(str(name), list(known), 3, 0)
        raise ValueError(
            f'{owner} names {name!r}, which is no {kind}; did you mean {" or ".join(near)}?'
        )


def _twice(values: Iterable[Any]) -> Any:
    seen: set = set()
    return next((value for value in values if value in seen or seen.add(value)), None)  # type: ignore[func-returns-value]
