"""``--cfg-options KEY=VALUE``: MMEngine's, and values that are dicts."""

from __future__ import annotations

import argparse
import ast
import re
from collections.abc import Sequence
from typing import Any

from mmengine.config import DictAction

from ..literals import literal
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
        return literal(ast.parse(text.strip(), mode='eval').body, _word)
    except SyntaxError as error:
        raise ValueError(str(error)) from None


def _word(node: ast.expr) -> Any:
    """A bare word, such as ``neck[2]``."""
    word = ast.unparse(node)
    return {'true': True, 'false': False, 'none': None}.get(word.lower(), word)
