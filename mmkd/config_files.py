"""The configs that mmkd brings along, found wherever it is installed."""

from __future__ import annotations

import difflib
from pathlib import Path

CONFIGS = Path(__file__).resolve().parent / '.mim' / 'configs'


def base(name: str) -> str:
    """The path of a config of mmkd, for the ``_base_`` of a config file anywhere.

    ``_base_ = ['mmdet::…', __import__('mmkd').base('chen2017')]``: MMEngine resolves ``_base_``
    before any import of a config file runs, but evaluates it as an expression, so this works in
    every program that reads the file, whether or not it has imported mmkd.

    Args:
        name: a recipe of ``configs/_base_``, such as ``'chen2017'``, or a path below ``configs``,
            such as ``'kd/faster_rcnn_r101_to_r50.py'``; ``.py`` may be left out.

    Raises:
        FileNotFoundError: if there is none of this name; the message has the nearest names.
    """
    stem = name.removesuffix('.py')
    for path in (CONFIGS / '_base_' / f'{stem}.py', CONFIGS / f'{stem}.py'):
        if path.is_file() and CONFIGS.resolve() in path.resolve().parents:
            return str(path.resolve())
    there = names()
    near = difflib.get_close_matches(stem, there, 4, 0.4) or there
    raise FileNotFoundError(f'mmkd has no config {name!r}; it has {", ".join(near)}')


def names() -> list[str]:
    """Every name that :func:`base` takes: recipes first, then pairs."""
    recipes = sorted(path.stem for path in (CONFIGS / '_base_').glob('*.py'))
    pairs = (CONFIGS / 'kd').rglob('*.py')
    return recipes + sorted(path.relative_to(CONFIGS).as_posix()[:-3] for path in pairs)
