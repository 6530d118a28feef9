"""Plants small faults in what computes, one at a time, and runs the tests that should see each.

python benchmarks/reliability/mutants.py                      # 200 drawn with seed 0
python benchmarks/reliability/mutants.py --modules share.py   # every one of a module
python benchmarks/reliability/mutants.py --again FILE.json    # the survivors of an earlier call

A mutant survives if its tests pass. Survivors are listed in the JSON with their line before and
after; those that change nothing which a run can show (``EQUAL``) are judged there, by that pair of
lines. Cosmic Ray was looked at: it drops no operand, no call such as ``detach()`` and no keyword,
which is what slips in when such code is edited, and it starts Python anew for every mutant, which
costs more than most of the tests.
"""

import argparse
import ast
import contextlib
import copy
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.dont_write_bytecode = True
ROOT = Path(__file__).resolve().parents[2]
STEP = ['test_step.py', 'test_detector.py']
FAULTS = 'test_silent_faults.py::test_'
TRIDENT = FAULTS + 'trident_is_a_detector_class_like_any'
TESTS = {
    'models/chen2017.py': ['test_losses.py', *STEP],
    'models/terms.py': [*STEP, 'test_own_term.py'],
    'models/taps.py': [*STEP, 'test_own_term.py'],
    'models/heads.py': [*STEP, 'test_own_term.py', 'test_classes.py'],
    'models/step.py': [*STEP, 'test_resolution.py', 'test_own_term.py'],
    'models/teacher.py': [*STEP, 'test_resolution.py', 'test_accelerate.py', 'test_own_term.py'],
    'models/detector.py': [
        *STEP, 'test_share.py', 'test_schedule.py', 'test_own_term.py', TRIDENT,
        FAULTS + 'a_loop_of_ones_own_is_guarded',
        'test_unlabelled.py::test_hard_labels_alone_train',
    ],
    'options/acceleration.py': ['test_accelerate.py', *STEP],
    'options/adapters.py': STEP,
    'options/anchor_match.py': ['test_resolution.py', 'test_own_term.py', *STEP],
    'options/class_map.py': ['test_classes.py', *STEP],
    'options/head_layout.py': ['test_classes.py', *STEP],
    'options/resolution.py': ['test_resolution.py', *STEP],
    'options/roi_align.py': ['test_accelerate.py', 'test_resolution.py', *STEP],
    'options/schedule.py': ['test_schedule.py'],
    'options/share.py': ['test_share.py'],
    'options/step_extras.py': [*STEP, 'test_own_term.py'],
    'options/teacher_inputs.py': [
        *STEP, 'test_resolution.py', FAULTS + 'images_of_one_channel',
    ],
    'datasets/two_views.py': ['test_resolution.py'],
    'observers.py': ['test_divergence.py', 'test_faults.py', 'test_check_pair.py', *STEP],
    'analysis/comparison/statistics.py': ['test_compare.py'],
    **{
        f'methods/{path.name}': ['test_parity.py', 'test_methods.py']
        for path in sorted(ROOT.glob('mmkd/methods/*.py'))
    },
}  # fmt: skip
SECONDS = 1200  # a mutant that hangs is seen, too
SWAPS = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult,
    ast.FloorDiv: ast.Div, ast.And: ast.Or, ast.Or: ast.And,
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.Is: ast.IsNot, ast.IsNot: ast.Is,
    ast.In: ast.NotIn, ast.NotIn: ast.In,
}  # fmt: skip
NAMES = {
    'min': 'max', 'max': 'min', 'amin': 'amax', 'amax': 'amin', 'sum': 'mean', 'mean': 'sum',
    'any': 'all', 'all': 'any', 'zeros': 'ones', 'ones': 'zeros', 'zeros_like': 'ones_like',
    'floor': 'ceil', 'ceil': 'floor', 'softmax': 'log_softmax', 'median': 'max',
    'logsigmoid': 'sigmoid', 'sigmoid': 'tanh',
}  # fmt: skip
DROPPED = {'detach', 'abs', 'sqrt', 'float', 'contiguous', 'clone', 'flatten', 'double'}


def changes(node: ast.AST) -> Iterator[ast.AST]:
    """Every node that a small fault would leave in place of ``node``."""
    if isinstance(node, ast.BinOp):
        yield node.left
        if type(node.op) in SWAPS:
            yield ast.BinOp(node.left, SWAPS[type(node.op)](), node.right)
    elif isinstance(node, ast.BoolOp):
        yield ast.BoolOp(SWAPS[type(node.op)](), node.values)
        yield node.values[0]
    elif isinstance(node, ast.Compare) and type(node.ops[0]) in SWAPS:
        yield ast.Compare(node.left, [SWAPS[type(node.ops[0])](), *node.ops[1:]], node.comparators)
        yield ast.UnaryOp(ast.Not(), node)
    elif isinstance(node, ast.UnaryOp):
        yield node.operand
    elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield ast.Constant(not node.value)
    elif isinstance(node, ast.Constant) and isinstance(node.value, (int, float)):
        yield ast.Constant(node.value + 1)
    elif isinstance(node, ast.IfExp):
        yield node.body
        yield node.orelse
    elif isinstance(node, ast.Call):
        name = node.func.attr if isinstance(node.func, ast.Attribute) else ''
        if name in DROPPED and isinstance(node.func, ast.Attribute):
            yield node.func.value
        if name in NAMES:
            other = ast.Attribute(node.func.value, NAMES[name], ast.Load())
            yield ast.Call(other, node.args, node.keywords)
        if isinstance(node.func, ast.Name) and node.func.id in NAMES:
            yield ast.Call(ast.Name(NAMES[node.func.id], ast.Load()), node.args, node.keywords)
        for keyword in node.keywords:
            others = [other for other in node.keywords if other is not keyword]
            if not _is_strict(keyword):
                yield ast.Call(node.func, node.args, others)


def _is_strict(node: ast.AST) -> bool:
    """Whether it is what zip is told, which no run shows: all that is zipped here is as long."""
    return isinstance(node, ast.keyword) and node.arg == 'strict'


def mutants(module: str) -> Iterator[tuple[str, int, str, str, str]]:
    """All of a module: its name, the line, the expression before and after, the whole source."""
    source = (ROOT / 'mmkd' / module).read_text()
    tree = ast.parse(source)
    passed_over = set()
    for node in ast.walk(tree):
        # Messages and annotations are no arithmetic.
        is_word = isinstance(node, (ast.Raise, ast.Assert, ast.JoinedStr)) or _is_strict(node)
        words = [node] if is_word else []
        words += [getattr(node, key, None) for key in ('annotation', 'returns')]
        for word in filter(None, words):
            passed_over |= {id(inner) for inner in ast.walk(word)}
    parents = {
        (id(child)): (parent, field, i)
        for parent in ast.walk(tree)
        for field, value in ast.iter_fields(parent)
        for i, child in enumerate(value if isinstance(value, list) else [value])
        if isinstance(child, ast.AST)
    }
    for node in list(ast.walk(tree)):
        if id(node) in passed_over or id(node) not in parents:
            continue
        parent, field, i = parents[id(node)]
        before = getattr(parent, field)
        for change in changes(node):
            text = ast.unparse(node), ast.unparse(change)
            change = ast.copy_location(copy.copy(change), node)
            after = [*before[:i], change, *before[i + 1 :]] if isinstance(before, list) else change
            setattr(parent, field, after)
            yield module, node.lineno, *text, ast.unparse(ast.fix_missing_locations(tree))
            setattr(parent, field, before)


def outcome(mutant: tuple[str, int, str, str, str], tree: Path) -> str:
    """What the tests say of the mutant in a copy of the tree, in a fork of this process.

    Returns:
        'seen', 'survived', or 'hung' after :data:`SECONDS`.
    """
    module, source = mutant[0], mutant[-1]
    path = tree / 'mmkd' / module
    path.write_text(source)
    tests = [str(tree / 'tests' / name) for name in TESTS[module]]
    child = os.fork()
    if child == 0:
        os.setsid()
        sys.path[:0] = [str(tree), str(tree / 'tests')]
        os.environ['PYTHONPATH'] = str(tree)
        os.environ['PYTHONDONTWRITEBYTECODE'] = '1'
        os.chdir(tree)
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
        import pytest

        status = pytest.main(
            ['-x', '-q', '-n0', '-p', 'no:cacheprovider', '-m', 'not slow', *tests]
        )
        os._exit(int(status))
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            break
        time.sleep(0.1)
    else:
        status = -1
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    if not ended:
        os.waitpid(child, 0)
    shutil.copy(ROOT / 'mmkd' / module, path)
    return {0: 'survived', -1: 'hung'}.get(status, 'seen')


def main() -> int:
    from campaign import report

    parser = argparse.ArgumentParser(description='Plants small faults in what computes')
    parser.add_argument('--number', type=int, default=200)
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--modules', nargs='+', help='every mutant of these')
    parser.add_argument('--again', type=Path, metavar='FILE', help='the JSON of an earlier call')
    parser.add_argument('--workers', type=int, default=2)
    parser.add_argument('--json')
    args = parser.parse_args()
    modules = [m for m in TESTS if not args.modules or m.endswith(tuple(args.modules))]
    drawn = [mutant for module in modules for mutant in mutants(module)]
    existing = len(drawn)
    judged: list[dict] = []
    if args.again:
        earlier = json.loads(args.again.read_text())
        survivors = [(row, (row['module'], row['before'], row['after'])) for row in earlier['rows']]
        judged = [row for row, change in survivors if change in EQUAL]
        alike = [
            [m for m in drawn if (m[0], *m[2:4]) == change]
            for _, change in survivors
            if change not in EQUAL
        ]
        lines = [row['line'] for row, change in survivors if change not in EQUAL]
        drawn = [
            min(found, key=lambda m: abs(m[1] - line))  # noqa: B023  used at once
            for line, found in zip(lines, alike, strict=True)
            if found  # else the code is gone
        ]
    elif not args.modules:
        drawn = random.Random(args.seed).sample(drawn, min(args.number, existing))
    import mmdet.apis  # noqa: F401  in every fork already
    import pytest  # noqa: F401
    import torch

    torch.set_num_threads(1)
    start, rows, hung = time.perf_counter(), judged, 0
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(args.workers) as pool:
        trees = []
        for i in range(args.workers):
            trees.append(Path(folder, str(i)))
            skipped = shutil.ignore_patterns('.*', '__pycache__', 'work_dirs', 'data')
            shutil.copytree(ROOT, trees[-1], ignore=skipped)
            if (ROOT / 'data').exists():
                (trees[-1] / 'data').symlink_to(ROOT / 'data')

        def tried(mutant: tuple[str, int, str, str, str]) -> tuple:
            tree = trees.pop()
            try:
                return mutant, outcome(mutant, tree)
            finally:
                trees.append(tree)

        for number, (mutant, found) in enumerate(pool.map(tried, drawn), 1):
            hung += found == 'hung'
            if found == 'survived':
                module, line, before, after, _ = mutant
                rows.append(dict(module=module, line=line, before=before, after=after))
                print(f'{module}:{line}: {before}  ->  {after}', flush=True)
            if number % 20 == 0:
                print(f'{number} of {len(drawn)}, {len(rows)} survived', flush=True)
    for row in rows:
        row['said'] = EQUAL.get((row['module'], row['before'], row['after']))
    equal = sum(row['said'] is not None for row in rows)
    notes = [
        f'{existing} could be planted; {equal} of the survivors change nothing one can see; '
        f'{hung} never ended'
    ]
    tried = len(drawn)
    if args.again:
        tried = earlier['tried']
        notes.append(
            f'{len(survivors)} of the draw survived when it was made; tests have been added since, '
            f'and the {len(drawn)} that change something were tried again'
        )
    return report('mutants', tried, len(rows) - equal, start, notes, rows, args.json)


# Survivors that were looked at, and why no test can see them.
EQUAL: dict[tuple[str, str, str], str] = {
    ('observers.py', 'share > DWARFS', 'share >= DWARFS'):
        'a measured ratio is never exactly 10',
    (
        'options/head_layout.py',
        'torch.arange(len(labels), device=labels.device)', 'torch.arange(len(labels))',
    ): 'an index may lie on the CPU: only a copy more',
    (
        'options/acceleration.py',
        '(new - old).abs().amax() <= 0.001 * scale', '(new - old).abs().amax() < 0.001 * scale',
    ): 'a measured difference is never exactly a thousandth',
    (
        'models/step.py',
        "(site, kind) == ('rcnn', 'cls')", "not (site, kind) == ('rcnn', 'cls')",
    ): 'what else is recorded has the same stages',
    ('options/head_layout.py', '-1', '1'):
        'logits are (n, C + 1), and what stands for an unknown class is not looked at',
    (
        'models/teacher.py',
        'own.device != parameter.device', 'not own.device != parameter.device',
    ): 'a network that is moved to where it is stays there',
    ('models/teacher.py', '1', '2'): 'a head without stages is asked without one',
    ('models/heads.py', '1.0', '2.0'): 'the detector always gives it',
    (
        'options/resolution.py',
        'torch.tensor([getattr(view, name) for view in views], dtype=torch.float64, device=device)',
        'torch.tensor([getattr(view, name) for view in views], device=device)',
    ): 'a ten-thousandth of a pixel',
    ('options/class_map.py', '3', '4'): 'how many names a message has',
    ('methods/crosskd.py', '0', '1'): 'strides are square',
    ('methods/base.py', '-1', '1'):
        'rows are (n, C), and of the two logits that a sigmoid stands for all are summed',
    (
        'methods/reviewkd.py',
        'self.attention is not None and coarser is not None', 'self.attention is not None',
    ): 'the level that has no coarser one has no attention',
}  # fmt: skip


if __name__ == '__main__':
    sys.exit(main())
