"""The configs and tools that mmkd brings along, found wherever it is installed.

``.mim`` is where OpenMMLab's tools look for those of a package: links in a clone, files in a wheel.
"""

from __future__ import annotations

import difflib
import shutil
import sys
from pathlib import Path

_MIM = Path(__file__).resolve().parent / '.mim'
CONFIGS, TOOLS = (_MIM / 'configs').resolve(), (_MIM / 'tools').resolve()
_SCRIPTS = {'check': 'check_pair', 'publish': 'publish_model'}


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
        if path.is_file() and CONFIGS in path.resolve().parents:
            return str(path.resolve())
    there = names()
    near = difflib.get_close_matches(stem, there, 4, 0.4) or there
    raise FileNotFoundError(f'mmkd has no config {name!r}; it has {", ".join(near)}')


def names() -> list[str]:
    """Every name that :func:`base` takes: recipes first, then pairs."""
    recipes = sorted(path.stem for path in (CONFIGS / '_base_').glob('*.py'))
    pairs = (p for folder in ('kd', 'digits') for p in (CONFIGS / folder).rglob('*.py'))
    return recipes + sorted(path.relative_to(CONFIGS).as_posix()[:-3] for path in pairs)


def command(name: str) -> str:
    """How to type a command of mmkd here: as the running one was, or as it can be found."""
    script = f'tools/{_SCRIPTS.get(name, name.replace("-", "_"))}.py'
    if not sys.argv[0].startswith('mmkd ') and Path(script).is_file():
        return f'python {script}'
    return f'mmkd {name}' if shutil.which('mmkd') else f'python -m mmkd {name}'
