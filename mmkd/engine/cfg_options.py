"""``--cfg-options KEY=VALUE``: MMEngine's, and values that are dicts."""

from __future__ import annotations

import argparse
import ast
import re
from collections.abc import Sequence
from typing import Any

from mmengine.config import DictAction

from .exit import stop

_DICT = re.compile(r'\bdict\(|\{')


class CfgOptions(DictAction):
    """MMEngine's ``DictAction`` with ``dict(...)`` and ``{...}`` as values.

    ``DictAction`` takes them for strings, or does not return from them. A malformed pair ends the
    program in a sentence.
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


def read_value(text: str) -> Any:
    """The value of an expression of literals and ``dict(...)``; bare words are strings.

    Raises:
        ValueError: if it is no such expression.
    """
    try:
        return _value(ast.parse(text.strip(), mode='eval').body)
    except SyntaxError as error:
        raise ValueError(str(error)) from None


def _value(node: ast.expr) -> Any:
    if isinstance(node, ast.Call):
        named = isinstance(node.func, ast.Name) and node.func.id == 'dict' and not node.args
        if not named or not all(each.arg for each in node.keywords):
            raise ValueError(f'{ast.unparse(node)} is no dict of literals')
        return {each.arg: _value(each.value) for each in node.keywords}
    if isinstance(node, ast.Dict):
        keys = [_value(key) for key in node.keys if key is not None]
        return dict(zip(keys, map(_value, node.values), strict=True))
    if isinstance(node, (ast.List, ast.Tuple)):
        values = [_value(each) for each in node.elts]
        return values if isinstance(node, ast.List) else tuple(values)
    try:
        return ast.literal_eval(node)
    except ValueError:
        word = ast.unparse(node)  # such as neck[2]
        return {'true': True, 'false': False, 'none': None}.get(word.lower(), word)
