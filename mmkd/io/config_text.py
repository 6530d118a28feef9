"""A config in the text that a checkpoint carries, read as data."""

from __future__ import annotations

import ast
from typing import Any

from ..literals import literal


def read_config_text(text: str) -> dict[str, Any]:
    """Read what ``Config.pretty_text`` wrote: names, and literals or ``dict(...)`` behind them.

    MMEngine puts the text of the whole config into ``meta`` of each checkpoint. Nothing of it is
    executed, so it may come from anybody's file.

    Raises:
        ValueError: if a line is anything else.
    """
    try:
        body = ast.parse(text).body
    except SyntaxError as error:
        raise ValueError(f'line {error.lineno} is no Python') from error
    found = {}
    for line in body:
        target = line.targets[0] if isinstance(line, ast.Assign) else None
        if not isinstance(line, ast.Assign) or not isinstance(target, ast.Name):
            raise ValueError(f'line {line.lineno} assigns no value to a name')
        found[target.id] = literal(line.value, _number)
    return found


def _number(node: ast.expr) -> float:
    """What ``repr`` of a float leaves as a name."""
    if isinstance(node, ast.Name) and node.id in ('inf', 'nan'):
        return float(node.id)
    raise ValueError(f'line {node.lineno} holds {ast.unparse(node)!r}, which is no plain value')
