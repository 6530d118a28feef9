"""Plain values: read from Python expressions as data, and shown in messages."""

from __future__ import annotations

import ast
from collections.abc import Callable
from typing import Any


def literal(node: ast.expr, other: Callable[[ast.expr], Any] | None = None) -> Any:
    """The value of literals, and of ``dict(...)``, in any nesting.

    Args:
        node: the expression.
        other: gives the value of anything else; None refuses it.

    Raises:
        ValueError: naming what is no plain value, and its line.
    """
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == 'dict':
        # Keys that are no names stand in a dict of their own: dict({'a.b': 1}, c=2).
        known = all(isinstance(arg, ast.Dict) for arg in node.args)
        if known and all(word.arg for word in node.keywords):
            entries: dict = {}
            for arg in node.args:
                entries |= literal(arg, other)
            return entries | {str(w.arg): literal(w.value, other) for w in node.keywords}
    elif isinstance(node, ast.Dict) and None not in node.keys:
        pairs = zip(node.keys, node.values, strict=True)
        return {literal(k, other): literal(v, other) for k, v in pairs if k}
    elif isinstance(node, (ast.List, ast.Tuple)):
        values = [literal(item, other) for item in node.elts]
        return values if isinstance(node, ast.List) else tuple(values)
    else:
        try:
            return ast.literal_eval(node)
        except ValueError:
            if other is not None and not isinstance(node, ast.Call):
                return other(node)
    raise ValueError(f'line {node.lineno} holds {ast.unparse(node)!r}, which is no plain value')


def show(value: Any) -> str:
    """A value in a message: short, on one line, and not written out where it holds others."""
    if type(value) in (tuple, list) and len(value) <= 8:
        parts = (f'<{type(v).__name__}>' if type(v) in (tuple, list) else show(v) for v in value)
        return f'({", ".join(parts)}{"," * (len(value) == 1)})'
    if type(value) is int and abs(value) >= 2**64:
        return f'an integer of {value.bit_length()} bits'
    if type(value) in (str, bytes):
        return ascii(value[:60]) + ('...' if len(value) > 60 else '')
    if value is None or type(value) in (bool, int, float):
        return repr(value)
    return value.__name__ if isinstance(value, type) else f'<{type(value).__name__}>'
