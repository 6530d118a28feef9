"""Lists the terms of distillation: what each teaches, what it needs, and where it is from."""

from __future__ import annotations

import argparse
import inspect
import json
import re
import textwrap
from collections.abc import Sequence
from typing import Any

from mmengine.config import Config

from ..models.chen2017 import HintL2Loss, TeacherBoundedL2Loss, WeightedSoftCELoss
from ..models.terms import DistillTerm
from ..registry import TERMS

_PAPERS = {
    WeightedSoftCELoss: 'rows of class scores, of the RPN or the RoI head',
    TeacherBoundedL2Loss: 'rows of box deltas with their targets, of the RPN or the RoI head',
    HintL2Loss: 'layer pairs',
}


def describe() -> list[dict[str, Any]]:
    """``type``, ``teaches``, ``needs`` and ``arguments`` (with defaults) of each term."""
    own = {
        kind: _line(kind, 'Needs') or 'see its documentation'
        for kind in TERMS.module_dict.values()
        # Those that wrap a tensor loss are chosen by it.
        if issubclass(kind, DistillTerm) and 'loss' not in inspect.signature(kind).parameters
    }
    return [
        {
            'type': kind.__name__,
            'teaches': _summary(kind),
            'needs': needs,
            'arguments': {
                name: None if p.default is p.empty else repr(p.default)
                for name, p in inspect.signature(kind).parameters.items()
            },
        }
        for kind, needs in {**_PAPERS, **own}.items()
    ]


def _summary(kind: type) -> str:
    """The first paragraph of a docstring, its equations in TeX."""
    paragraph = (inspect.getdoc(kind) or '').partition('\n\n')[0]
    return re.sub(r':math:`(.*?)`', r'\1', ' '.join(paragraph.split()))


def _line(kind: type, heading: str) -> str:
    found = re.search(rf'^{heading}: (.+?)\.?$', inspect.getdoc(kind) or '', re.MULTILINE)
    return found[1] if found else ''


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('names', nargs='*', metavar='TYPE', help='these alone, with all they say')
    parser.add_argument(
        '--config', help='a config whose custom_imports register terms of your own: list them too'
    )
    parser.add_argument('--json', action='store_true', help='as JSON')
    args = parser.parse_args(argv)
    if args.config:
        Config.fromfile(args.config)  # imports what it names
    found = describe()
    known = {term['type']: term for term in found}
    if unknown := [name for name in args.names if name not in known]:
        parser.error(f'there is no term {unknown[0]}; there are {", ".join(known)}')
    if args.json:
        print(json.dumps([known[name] for name in args.names or known], indent=1))
    elif args.names:
        for name in args.names:
            kind = TERMS.get(name) or next(k for k in _PAPERS if k.__name__ == name)
            print(f'{name}\n\n{textwrap.indent(inspect.getdoc(kind) or "", "  ")}\n')
    else:
        for term in found:
            said = textwrap.wrap(term['teaches'], 78) + textwrap.wrap(f'needs {term["needs"]}', 78)
            print(f'{term["type"]:22}' + f'\n{"":22}'.join(said))
        print('\n`mmkd terms TYPE` has its equation, arguments and source.')
    return 0
