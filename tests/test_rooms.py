"""Imports between the files of mmkd have one direction, and no circle."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / 'mmkd'

FLOORS = (
    ('version', 'literals', 'versions', 'shipped', 'digests', 'options'),
    ('recipe',),
    ('registry', 'layer_pairs', 'observers', 'compatibility', 'inference', 'io'),
    ('models', 'datasets'),
    ('methods',),
    ('engine',),
    ('analysis',),
    ('cli',),
    ('commands',),
    ('__main__',),
)
"""The rooms from the bottom to the top: a file imports from its own room and from lower floors.

``mmkd/__init__.py`` is above all of them. ``tools/`` is no part of the package.
"""
DOOR = {('mmkd.io.teacher_weights', 'load_teacher')}
"""All that ``mmkd/models`` takes from ``mmkd/io``: what fills a teacher from its checkpoint."""
MOST_LINES = 1100
"""Of ``mmkd/models``, docstrings included: the method is read in one sitting."""

Import = tuple[str, str, str]
"""Importer, imported module, and the name taken from it ('' for the module itself)."""


def package() -> dict[str, str]:
    """The text of each module, by its dotted name."""
    found = {}
    for path in sorted(PACKAGE.rglob('*.py')):
        parts = path.relative_to(PACKAGE.parent).with_suffix('').parts
        name = '.'.join(parts[:-1] if parts[-1] == '__init__' else parts)
        found[name] = path.read_text(encoding='utf-8')
    return found


def imports(modules: dict[str, str]) -> Iterator[Import]:
    """Every import of one module by another, in functions and under TYPE_CHECKING too."""
    folders = {name.rpartition('.')[0] for name in modules} | {'mmkd'}
    for module, text in modules.items():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Import):
                named = [(alias.name, '') for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                base = node.module or ''
                if node.level:
                    # A package's own name is where its first dot leads.
                    up = node.level - (module in folders)
                    folder = module.split('.')[: len(module.split('.')) - up]
                    base = '.'.join([*folder, *filter(None, [base])])
                named = [
                    (f'{base}.{alias.name}', '')
                    if f'{base}.{alias.name}' in modules
                    else (base, alias.name)
                    for alias in node.names
                ]
            else:
                continue
            for imported, name in named:
                if imported.partition('.')[0] == 'mmkd':
                    yield module, imported, name


def room(module: str) -> str:
    return module.split('.')[1] if '.' in module else ''


def height(module: str) -> int:
    floors = (floor for floor, rooms in enumerate(FLOORS) if room(module) in rooms)
    return next(floors) if '.' in module else len(FLOORS)


def upward(found: list[Import]) -> list[str]:
    """Imports from a higher floor, or from another room of the same one."""
    return [
        f'{a} imports {b}, which is not below it'
        for a, b, _ in found
        if height(a) <= height(b) and room(a) != room(b)
    ]


def beyond_the_door(found: list[Import]) -> list[str]:
    return [
        f'{a} imports {name or "all"} of {b}'
        for a, b, name in found
        if a.startswith('mmkd.models')
        and b.split('.')[1:2] in (['engine'], ['analysis'], ['datasets'], ['io'])
        and (b, name) not in DOOR
    ]


def circles(found: list[Import]) -> list[str]:
    """One circle of files from each import that closes one."""
    graph: dict[str, set[str]] = {}
    for a, b, _ in found:
        graph.setdefault(a, set()).add(b)
    closed, done = [], set()

    def walk(module: str, path: list[str]) -> None:
        if module in path:
            closed.append(' -> '.join([*path[path.index(module) :], module]))
        elif module not in done:
            for each in sorted(graph.get(module, ())):
                walk(each, [*path, module])
            done.add(module)

    for module in sorted(graph):
        walk(module, [])
    return closed


@pytest.fixture(scope='module')
def found() -> list[Import]:
    return list(imports(package()))


def test_every_file_has_a_room(found):
    rooms = {room(name) for name in package() if '.' in name}
    assert rooms == {name for floor in FLOORS for name in floor}
    assert len(found) > 100


def test_nothing_imports_upwards(found):
    assert upward(found) == []


def test_no_circle_of_files(found):
    assert circles(found) == []


def test_the_method_takes_one_function_from_files(found):
    assert beyond_the_door(found) == []
    assert {(b, name) for a, b, name in found if (room(a), room(b)) == ('models', 'io')} == DOOR


def test_the_method_is_read_in_one_sitting():
    """Docstrings and comments count, blank lines do not."""
    lines = {
        name: sum(bool(line.strip()) for line in text.splitlines())
        for name, text in package().items()
        if room(name) == 'models'
    }
    count = sum(lines.values())
    assert lines['mmkd.models.detector'] > 100
    assert count <= MOST_LINES, (
        f'mmkd/models has {count:,} lines, {count - MOST_LINES:,} too many: '
        + ', '.join(f'{name.rpartition(".")[2]} {n}' for name, n in lines.items())
    )


@pytest.mark.parametrize(
    'text, imported',
    [
        ('from ..engine import runner', 'mmkd.engine.runner'),
        ('from ..engine.runner import DistillationRunner', 'mmkd.engine.runner'),
        ('def f():\n    from ..engine.runner import x', 'mmkd.engine.runner'),
        ('if TYPE_CHECKING:\n    import mmkd.engine.runner', 'mmkd.engine.runner'),
        ('import mmkd', 'mmkd'),
        ('from .. import cli', 'mmkd.cli'),
        ('from ..datasets import annotations', 'mmkd.datasets.annotations'),
    ],
)
def test_an_upward_import_is_seen_wherever_it_stands(text, imported):
    names = ('mmkd', 'mmkd.cli', 'mmkd.engine', 'mmkd.engine.runner', 'mmkd.datasets.annotations')
    modules = dict.fromkeys(names, '')
    found = list(imports({**modules, 'mmkd.models': '', 'mmkd.models.teacher': text}))
    assert [each[:2] for each in found] == [('mmkd.models.teacher', imported)]
    assert upward(found) and (
        beyond_the_door(found) or room(imported) not in ('engine', 'datasets')
    )


def test_a_circle_is_seen_through_a_package():
    modules = {
        'mmkd.engine': 'from .a import x',
        'mmkd.engine.a': 'from .b import y',
        'mmkd.engine.b': 'def f():\n    from ..engine import x',
    }
    assert circles(list(imports(modules))) == [
        'mmkd.engine -> mmkd.engine.a -> mmkd.engine.b -> mmkd.engine'
    ]
    assert not circles(list(imports({**modules, 'mmkd.engine.b': 'import torch'})))
