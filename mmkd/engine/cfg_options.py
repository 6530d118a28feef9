"""``--cfg-options KEY=VALUE``: MMEngine's, and values that are dicts."""

from __future__ import annotations

import argparse
import ast
import difflib
import inspect
import re
from collections.abc import Sequence
from typing import Any

from mmengine.config import Config, DictAction
from mmengine.runner import Runner

from ..literals import literal
from .exit import stop

_DICT = re.compile(r'\bdict\(|\{')


class CfgOptions(DictAction):
    """MMEngine's ``DictAction`` with ``dict(...)`` and ``{...}`` as values.

    ``DictAction`` parses them as strings or recurses without end. A malformed pair ends the program
    with a one-line error.
    """

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        try:
            super().__call__(parser, namespace, values, option_string)
        except (ValueError, AssertionError, RecursionError):
            stop(
                f'--cfg-options {" ".join(values or ())}: '
                'each must read key=value, with closed brackets and no spaces; a dict as '
                'key="dict(a=1,b=(2,3))"'
            )

    @staticmethod
    def _parse_iterable(val: str) -> Any:
        if val.startswith(('dict(', '{', '[', '(')) and _DICT.search(val):
            return read_value(val)
        return DictAction._parse_iterable(val)


def parse_options(texts: Sequence[str]) -> dict[str, Any]:
    """The values of ``KEY=VALUE`` texts by key, as a command line reads them.

    Raises:
        ValueError: one is malformed.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument('--cfg-options', nargs='*', action=CfgOptions, default={})
    try:
        return parser.parse_args(['--cfg-options', *texts]).cfg_options if texts else {}
    except SystemExit as error:
        raise ValueError(str(error).removeprefix('error: ')) from None


def apply_options(cfg: Config, options: dict[str, Any], path: str) -> None:
    """Merges options by key into the config that was read from ``path``.

    Raises:
        ValueError: one has no effect or does not fit.
    """
    for key in options:
        if why := unused_option(key, cfg):
            raise ValueError(f'{path}: --cfg-options {key}: {why}')
    try:
        cfg.merge_from_dict(options)
    except (TypeError, KeyError) as error:
        said = f'--cfg-options {" ".join(options)} does not fit {path}: {error}'
        raise ValueError(said) from None


def read_value(text: str) -> Any:
    """The value of an expression of literals and ``dict(...)``; bare words are strings.

    Raises:
        ValueError: if it is no such expression.
    """
    try:
        return literal(ast.parse(text.strip(), mode='eval').body, _word)
    except SyntaxError as error:
        raise ValueError(str(error)) from None


_CONFIG_KEYS = {
    *inspect.signature(Runner.__init__).parameters,
    *('runner_type', 'auto_scale_lr', 'tta_model', 'tta_pipeline', 'custom_imports'),
}
"""The keys of a config that are read; any other is a variable of the config file."""


def unused_option(option: str, cfg: Config) -> str | None:
    """Why nothing reads the key of an option (``train_cfg.max_epochs``); None where it is read."""
    key = option.split('.')[0]
    if key == 'distillation' and key in cfg.get('model', {}):
        return (
            'the recipe has already been copied into the model, so the option has no effect; '
            f'write model.{option}'
        )
    if key in _CONFIG_KEYS or (key in cfg and isinstance(cfg[key], dict)):
        return None
    if key in cfg:
        return (
            f'{key} is a variable of the config, whose value has already been copied to where it '
            'is used, so the option has no effect; set the copy, as in train_cfg.max_epochs=1'
        )
    near = difflib.get_close_matches(key, sorted(_CONFIG_KEYS | set(cfg)), 3)
    return (
        f'no config has {key}'
        + (f'; near it: {", ".join(near)}' if near else '')
        + ". The detector's options begin with model., as in model.distillation.hint.loss_weight=0"
    )


def _word(node: ast.expr) -> Any:
    """A bare word, such as ``neck[2]``."""
    word = ast.unparse(node)
    return {'true': True, 'false': False, 'none': None}.get(word.lower(), word)
