"""A config in the text that a checkpoint carries, read as data."""

from __future__ import annotations

import ast
from typing import Any


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
        found[target.id] = _value(line.value)
    return found


def _value(node: ast.expr) -> Any:
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == 'dict':
        if all(isinstance(arg, ast.Dict) for arg in node.args):  # keys that are no names
            entries: dict = {}
            for arg in node.args:
                entries |= _value(arg)
            return entries | {str(word.arg): _value(word.value) for word in node.keywords}
    elif isinstance(node, ast.Dict) and None not in node.keys:
        return {_value(k): _value(v) for k, v in zip(node.keys, node.values, strict=True) if k}
    elif isinstance(node, ast.List):
        return [_value(item) for item in node.elts]
    elif isinstance(node, ast.Tuple):
        return tuple(_value(item) for item in node.elts)
    elif isinstance(node, ast.Name) and node.id in ('inf', 'nan'):
        return float(node.id)
    else:
        try:
            return ast.literal_eval(node)
        except ValueError:
            pass
    raise ValueError(f'line {node.lineno} holds {ast.unparse(node)!r}, which is no plain value')
