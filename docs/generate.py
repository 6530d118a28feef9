"""Writes the parts of README.md and docs/ that are made from code and committed results.

python docs/generate.py

A page marks such a part by ``<!-- NAME: python docs/generate.py -->`` and ``<!-- end -->``.
docs/methods.md, docs/tracker.md, docs/reliability.md and docs/pairs.md have commands of their own.
"""

from __future__ import annotations

import ast
import functools
import inspect
import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from mmdet.registry import MODELS
from mmengine.analysis import get_model_complexity_info
from mmengine.config import Config

from mmkd.analysis.comparison.plan import plan_runs
from mmkd.analysis.comparison.results import load_measures, load_results, read_results
from mmkd.analysis.comparison.table import (
    RowSummary,
    Summary,
    format_number,
    interval,
    markdown,
    markdown_table,
    mean_sd,
    spread,
    summarise,
)
from mmkd.analysis.study import read_summaries
from mmkd.analysis.study.declaration import Study, read_study
from mmkd.analysis.study.table import StageSummary, ends, signed, stage_table
from mmkd.methods import METHODS
from mmkd.models.chen2017 import (
    HintL1Loss,
    HintL2Loss,
    TeacherBoundedL2Loss,
    WeightedSoftCELoss,
)
from mmkd.options.acceleration import Acceleration
from mmkd.options.adapters import KINDS
from mmkd.options.resolution import Resolution
from mmkd.options.schedule import WeightSchedule
from mmkd.options.share import GradientShare
from mmkd.options.unlabelled import Unlabelled
from mmkd.recipe import PAPER_TERMS, SETTINGS, log_name

ROOT = Path(__file__).resolve().parents[1]

# ------------------------------------------------------------------------ results of the benchmark

DIGITS = 'configs/digits/'
HALF = ('train_cfg.max_epochs=4', 'train_cfg.val_interval=4', 'param_scheduler.1.T_max=4',
        'param_scheduler.1.end=4')  # fmt: skip
COMPARISONS: dict[str, dict[str, Any]] = {
    'digits': dict(
        configs=('paper.py', 'paper_start.py', 'mmkd.py'), plain=('plain.py',), seeds=range(5)
    ),
    'digits_resolution': dict(
        configs=('large_to_half.py',), plain=('half.py', 'large.py'), seeds=range(3)
    ),
    'digits_pairs': dict(
        configs=('pairs/to_mobilenet.py', 'pairs/from_cascade.py', 'pairs/four_classes.py'),
        plain=(), seeds=range(3), options=HALF,
    ),
    'digits_unlabelled': dict(
        configs=('unlabelled/all_images.py', 'unlabelled/distilled.py'),
        against=('unlabelled/distilled.py',), plain=('unlabelled/all_labels.py',), seeds=range(5),
    ),
}  # fmt: skip
"""The comparisons whose results are committed, as benchmarks/NAME.jsonl."""


def summary(name: str) -> Summary:
    """What ``tools/compare.py --table-only`` computes from the committed results."""
    given = COMPARISONS[name]
    path = ROOT / f'benchmarks/{name}.jsonl'
    at = {
        key: [str(ROOT / DIGITS / config) for config in given.get(key, ())]
        for key in ('configs', 'plain', 'against')
    }
    options = list(given.get('options', ()))
    plan = plan_runs(
        at['configs'], list(given['seeds']), at['plain'], options, 'test', 1, at['against']
    )
    results, notes = load_results(path, plan)
    if not results:
        raise ValueError(f'{path} holds no result of these configs')
    return summarise(plan, results, load_measures(path, plan), notes=notes)


def command(name: str) -> str:
    """The command that prints the same table."""
    given = COMPARISONS[name]
    parts = ['python tools/compare.py', *(DIGITS + c for c in given['configs'])]
    for key in ('against', 'plain'):
        if found := given.get(key):
            parts += [f'--{key}', *(DIGITS + config for config in found)]
    parts += ['--seeds', *map(str, given['seeds'])]
    if options := given.get('options'):
        parts += ['--cfg-options', *options]
    return ' '.join([*parts, f'--table-only --results benchmarks/{name}.jsonl'])


def whole_table(name: str) -> str:
    return f'```sh\n{command(name)}\n```\n\n{markdown(summary(name)).rstrip()}'


SHOWN = {
    'teacher': 'teacher',
    'plain': 'student, plain',
    'paper': "student, the paper's recipe",
    'paper_start': "the same, from the teacher's neck and heads",
    'mmkd': "student, mmkd's recipe",
}


def short_table() -> str:
    """Five rows of the digits benchmark, each distilled one beside its own baseline."""
    found = summary('digits')
    rows = {row.label: row for row in found.rows}
    own = {pair.label: pair for pair in found.pairs if pair.own}
    body = []
    for label, shown in SHOWN.items():
        row: RowSummary = rows[label]
        line = [shown, spread(row), format_number(row.ap50)]
        line += [format_number(row.params, '.2f', 1e-6) + ' M']
        line += [format_number(row.images_per_second, '.0f')]
        verdict = own[label].verdict if label in own else None
        if verdict is None:
            line += ['', '']
        else:
            line += [f'{verdict.mean:+.1f} {interval(verdict)}', f'**{verdict.word}**']
        body.append(line)
    head = ['network', 'mAP', 'AP50', 'parameters', 'images/s']
    head += ['gain over own baseline', 'verdict']
    return markdown_table(head, body)


ARMS = {
    'all_images, labelled images': 'the 800 alone',
    'distilled': 'distilled on the 800',
    "all_images, teacher's boxes": "the teacher's boxes on all",
    'all_images': '**distilled on all**',
    'all_labels': 'all 8,000 labels, no terms',
}


def unlabelled_line() -> str:
    """What images without labels are worth, in a sentence."""
    rows = {row.label: row for row in summary('digits_unlabelled').rows}
    seeds = len(COMPARISONS['digits_unlabelled']['seeds'])
    said = ', '.join(f'{shown} {spread(rows[label])}' for label, shown in ARMS.items())
    return (
        f'800 labelled digit images, 7,200 without labels, {seeds} seeds, mAP on test '
        f'([the command](docs/results.md#images-that-nobody-has-labelled)):\n{said}.'
    )


# ---------------------------------------------------------------------- the keys of `distillation`


def arguments(kind: Any) -> dict[str, str]:
    """The lines of ``Args:`` in a docstring, by the name of the argument."""
    text = inspect.getdoc(kind) or ''
    section = re.search(r'^Args:\n((?:(?: .*)?\n?)+)', text, re.MULTILINE)
    found: dict[str, str] = {}
    if section is None:
        return found
    for entry in re.split(r'\n(?=    \S)', section[1].rstrip()):
        names, _, said = entry.strip().partition(': ')
        for name in names.split(', '):
            found[name] = in_markdown(said)
    return found


def in_markdown(text: str) -> str:
    """A docstring's text in one line of a table."""
    text = re.sub(r'\s+', ' ', text).strip().rstrip('.')
    text = re.sub(r':math:`(.*?)`', r'$\1$', text)
    text = re.sub(r':(?:class|func|mod|attr):`~?(?:[\w.]+\.)?(\w+)`', r'`\1`', text)
    return text.replace('``', '`').replace('|', r'\|')


def type_of(annotation: Any) -> str:
    if annotation in (inspect.Parameter.empty, 'Any'):
        return ''
    return str(annotation).replace('|', 'or').replace('  ', ' ')


def key_table(kind: Any, skip: Iterable[str] = ()) -> str:
    """Name, type, default and meaning of each argument of a class."""
    said = arguments(kind)
    body = []
    for name, parameter in inspect.signature(kind).parameters.items():
        if name in skip:
            continue
        required = parameter.default is parameter.empty
        default = 'required' if required else f'`{parameter.default!r}`'
        body.append([f'`{name}`', type_of(parameter.annotation), default, said.get(name, '')])
    if missing := [line[0] for line in body if not line[3]]:
        raise ValueError(f'{kind.__name__}: the docstring says nothing of {", ".join(missing)}')
    return markdown_table(['key', 'type', 'default', 'meaning'], body)


EVERY_TERM = {
    'type': ('all', 'required', 'the loss or term; optional for none but the keys of the paper'),
    'loss_weight': ('all', "the class's", 'factor on the loss; the constant 0 turns the term off'),
    'schedule': ('all', '`{}`', 'when the term is in force, see [`schedule`](#schedule)'),
    'share': (
        'all', '`None`',
        "finds the weight, whatever `loss_weight` is: the term's gradient as a multiple of the "
        "hard losses', a number or a dict, see [`share`](#share)",
    ),
    'pairs': (
        'features', "`['neck']`",
        'the layers that are compared, see [layer pairs](#layer-pairs)',
    ),
    'site': ('predictions', "`'rcnn'`", "`'rpn'` or `'rcnn'`"),
    'kind': ('predictions', "`'cls'`", "`'cls'`: class scores; `'bbox'`: box deltas"),
    'hard_weight': (
        'predictions', '1',
        'μ of equation (2): factor on the student\'s own classification loss at that site, from 0 '
        'to 1; one term per site may set it',
    ),
}  # fmt: skip
PAIR_KEYS = {
    'student': "the student's layer (guided layer): `neck`, `backbone[2]` (its third output), or a "
    'path of submodules, `backbone.layer1.0`',
    'teacher': "the teacher's layer (hint layer)",
    'adapter': 'the adaptation layer: ' + ', '.join(f'`{kind!r}`' for kind in KINDS),
}
CLASS_KEYS = {
    'names': ('dict', "the student's name to the teacher's, where one class has two names"),
    'student': ('list', "the student's class names; default: those of its training data"),
    'teacher': ('list', "the teacher's class names; default: those in its checkpoint or config"),
}
MODEL_KEYS = {
    'type': (
        'required', "`'mmkd.KnowledgeDistillationTwoStageDetector'`, or "
        "`'mmkd.KnowledgeDistillationTridentFasterRCNN'`",
    ),
    'teacher_config': ('required', "a path, a name (`'mmdet::...'`) or a dict"),
    'teacher_ckpt': (
        'required', "the teacher's weights, a path or URL; `'random'` leaves it untrained, for "
        'tests',
    ),
    'teacher_sha256': ('`None`', "the SHA-256 that the file must have"),
    'detector': ('`None`', "the student's own detector class, if it is none of MMDetection's"),
    'eval_teacher': ('`True`', 'only `True`: the name is MMDetection\'s'),
    'distillation': ('required', 'the recipe, all keys below'),
}  # fmt: skip


def settings() -> dict[str, str]:
    """The section of each entry of ``distillation`` that is no term."""
    rows = [[f'`{name}`', kind, said] for name, (kind, said) in CLASS_KEYS.items()]
    return {
        'start': "`None`, or `'teacher'`: neck and heads begin as the teacher's, wherever names "
        'and shapes agree, and adaptation layers of one layer as the identity. Not in the paper.',
        'check_teacher': '`True`, or `False`: leaves out the look at training images through the '
        "teacher's eyes, before the first step.",
        'accelerate': 'A cheaper forward of the teacher ([performance](performance.md)).\n\n'
        + key_table(Acceleration),
        'resolution': "The scale of each network's images ([resolution](resolution.md)); both are "
        'needed.\n\n' + key_table(Resolution),
        'classes': 'Where the class names in the two configs do not say which is which.\n\n'
        + markdown_table(['key', 'type', 'meaning'], rows),
        'unlabelled': 'Images without labels ([the page](unlabelled.md)).\n\n'
        + key_table(Unlabelled),
    }


def reference() -> str:
    """All keys of ``distillation``, from the signatures and docstrings of what reads them."""
    parts = ['## Beside `distillation`', 'Keys of `model`:']
    parts += [markdown_table(['key', 'default', 'meaning'],
                             [[f'`{k}`', *v] for k, v in MODEL_KEYS.items()])]  # fmt: skip
    parts += ["And `runner_type = 'mmkd.DistillationRunner'`, which mmkd's recipes set."]
    parts += ['## Terms', 'An entry with a `type` is a term. These keys need none:']
    losses = {'cls': WeightedSoftCELoss, 'bbox': TeacherBoundedL2Loss, 'features': HintL2Loss}
    rows = [
        [f'`{key}`', f'[`{losses[kind].__name__}`](#{losses[kind].__name__.lower()})',
         f'`{log_name(key)}`']
        for key, (_, kind) in PAPER_TERMS.items()
    ]  # fmt: skip
    parts += [markdown_table(['key', 'loss', 'in the log'], rows)]
    parts += ['Any other key is yours: an identifier, logged as `loss_kd_KEY`.']
    parts += ['### Keys of every term']
    rows = [[f'`{k}`', *v] for k, v in EVERY_TERM.items()]
    parts += [markdown_table(['key', 'terms that compare', 'default', 'meaning'], rows)]
    parts += ['### schedule', key_table(WeightSchedule), '### share', key_table(GradientShare)]
    parts += ['### Layer pairs', 'An entry of `pairs` is a path, for both networks, or a dict:']
    rows = [[f'`{name}`', said] for name, said in PAIR_KEYS.items()]
    parts += [markdown_table(['key', 'meaning'], rows)]
    parts += ["## The paper's losses"]
    for loss in (WeightedSoftCELoss, TeacherBoundedL2Loss, HintL2Loss):
        parts += [f'### {loss.__name__}', key_table(loss)]
    parts += [f'`{HintL1Loss.__name__}` takes the keys of `HintL2Loss`.']
    parts += ['## Published methods', 'Formulas and sources: [methods](methods.md).']
    parts += [method_table(method) for method in METHODS]
    parts += ['## Settings', 'Entries that are no terms.']
    found = settings()
    if set(found) != set(SETTINGS):
        raise ValueError(f'settings on the page: {sorted(found)}, in the code: {sorted(SETTINGS)}')
    for name in SETTINGS:
        parts += [f'### {name}', found[name]]
    return '\n\n'.join(parts)


def method_table(method: Any) -> str:
    """The keys of a published method, with the class's defaults and those of its recipes."""
    recipes = {
        path.stem: entry
        for path in sorted((ROOT / 'configs/_base_').glob('*.py'))
        for entry in Config.fromfile(path).distillation.to_dict().values()
        if isinstance(entry, dict) and entry.get('type') == method.__name__
    }
    meaning = {name: cells[-1] for name, cells in EVERY_TERM.items()} | arguments(method)
    names = [n for n, p in inspect.signature(method).parameters.items() if p.kind != p.VAR_KEYWORD]
    names += [n for e in recipes.values() for n in e if n not in names and n != 'type']
    body = []
    for name in dict.fromkeys(names):
        parameter = inspect.signature(method).parameters.get(name)
        given = parameter is not None and parameter.default is not parameter.empty
        default = f'`{parameter.default!r}`' if parameter is not None and given else ''
        cells = [f'`{e[name]!r}`' if name in e else '' for e in recipes.values()]
        body.append([f'`{name}`', default, *cells, meaning.get(name, '')])
    title = f'### {method.__name__}\n\n[What it is](methods.md#{method.__name__.lower()}).\n\n'
    head = ['key', 'default', *(f'in `{r}.py`' for r in recipes), 'meaning']
    return title + markdown_table(head, body)


# --------------------------------------------------------------------------------------- messages

ROOMS = {
    'recipe': 'The recipe and the pair',
    'registry': 'The recipe and the pair',
    'options': 'The recipe and the pair',
    'layer_pairs': 'The recipe and the pair',
    'literals': 'The recipe and the pair',
    'compatibility': 'The recipe and the pair',
    'methods': 'The recipe and the pair',
    'models': 'The recipe and the pair',
    'io': 'Checkpoints and the teacher',
    'inference': 'Prediction',
    'observers': 'Training',
    'engine': 'Training',
    'datasets': 'Data',
    'analysis': 'Checking and comparing',
    'commands': 'The command line',
    'cli': 'The command line',
    '__main__': 'The command line',
    'shipped': 'The command line',
    'versions': 'The installed stack',
}
"""The heading under which a room's messages stand."""
SHORTEST = 25
"""Letters that are the same each time, below which a message cannot be searched for."""


def spoken(node: ast.AST, names: dict[str, ast.AST]) -> str:
    """The text of a string expression; what differs each time is ….

    Args:
        node: the expression.
        names: the string expressions that variables stand for.
    """
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return ''.join(spoken(value, names) for value in node.values)
    if isinstance(node, ast.FormattedValue):
        return spoken(node.value, names)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return spoken(node.left, names) + spoken(node.right, names)
    if isinstance(node, ast.BoolOp):
        return spoken(node.values[-1], names)
    if isinstance(node, ast.Name) and node.id in names:
        # Its own name could stand in it again.
        return spoken(names[node.id], {n: v for n, v in names.items() if n != node.id})
    return '…'


def said_by(tree: ast.Module) -> Iterable[str]:
    """The messages with which a file ends a run, or warns."""
    constants = _strings(tree.body)
    for scope in ast.walk(tree):
        if isinstance(scope, ast.FunctionDef):
            names = constants | _strings(ast.walk(scope))
            for node in ast.walk(scope):
                if (message := _message(node)) is not None:
                    text = re.sub(r'\s+', ' ', spoken(message, names)).strip()
                    yield re.sub(r'…([\s,]*…)+', '…', text)


def _strings(nodes: Iterable[ast.AST]) -> dict[str, ast.AST]:
    """The first string that each variable is set to, unless it is empty."""
    found: dict[str, ast.AST] = {}
    for node in nodes:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            text = isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
            if (text and node.value.value) or isinstance(node.value, ast.JoinedStr):
                found.setdefault(node.targets[0].id, node.value)
    return found


def _message(node: ast.AST) -> ast.AST | None:
    """The expression of a message that a statement says, if it says one."""
    if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
        call = node.exc
    elif isinstance(node, ast.Call) and _name(node.func) in ('stop', 'warning', 'warn'):
        call = node
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        # One that is collected first: report.against.append('...').
        if node.func.attr != 'append' or _name(node.func.value) not in ('against', 'warnings'):
            return None
        call = node
    else:
        return None
    return call.args[0] if call.args else None


def _name(node: ast.AST) -> str:
    return getattr(node, 'id', getattr(node, 'attr', ''))


def messages() -> str:
    """Every message that ends a run or warns, by the part of mmkd that says it."""
    found: dict[str, dict[str, str]] = {}
    for path in sorted((ROOT / 'mmkd').rglob('*.py')):
        place = path.relative_to(ROOT / 'mmkd')
        room = place.parts[0].removesuffix('.py')
        for text in said_by(ast.parse(path.read_text(encoding='utf-8'))):
            if len(text.replace('…', '')) >= SHORTEST:
                heading = ROOMS[room]
                found.setdefault(heading, {}).setdefault(text, f'mmkd/{place.as_posix()}')
    parts = []
    for heading in dict.fromkeys(ROOMS.values()):
        said = sorted(found.get(heading, {}), key=lambda text: text.lstrip('….: ').casefold())
        lines = [f'- {_code(text)}' for text in said]
        parts.append(f'### {heading}\n\n' + '\n'.join(lines))
    return '\n\n'.join(parts)


def _code(text: str) -> str:
    """Text as it stands, in a code span that holds its backticks."""
    longest = max((len(run) for run in re.findall('`+', text)), default=0)
    fence = '`' * (longest + 1)
    space = ' ' if text[:1] == '`' or text[-1:] == '`' else ''
    return f'{fence}{space}{text}{space}{fence}'


# ----------------------------------------------------------------------------------------- studies

STUDENTS = ('far', 'middle', 'near')
PLAIN = (
    ('val', 'plain', 'val'),
    ('test', 'plain', 'test'),
    ('train', 'plain_train', 'test'),
)
"""What is shown of a plain run, the study that tested it, and the split there."""


def students() -> str:
    """The backbones of the study's students beside their teacher's, on 96x96 images."""
    found = {}
    for name in ('teacher', *(f'study/{student}' for student in reversed(STUDENTS))):
        cfg = dict(Config.fromfile(ROOT / DIGITS / f'{name}.py').model.backbone, init_cfg=None)
        backbone = MODELS.build(cfg)
        backbone.eval()
        cost = get_model_complexity_info(backbone, (3, 96, 96), show_table=False, show_arch=False)
        found[Path(name).name] = cfg['base_channels'], cost['params'], cost['flops']
    most = found['teacher'][2]
    body = [
        [name, str(width), f'{params / 1e6:.3f}', f'{flops / 1e6:.1f}', f'{flops / most:.2f}']
        for name, (width, params, flops) in found.items()
    ]
    head = ['backbone', 'channels', 'parameters (M)', 'MFLOPs', "of the teacher's"]
    return markdown_table(head, body)


def plain_curves() -> str:
    """mAP of the study's plain students by the length of their schedule."""
    found: dict[int, dict[tuple[str, str], float]] = {}
    for shown, study, split in PLAIN:
        for run in read_results(ROOT / f'benchmarks/study/{study}.jsonl').runs.values():
            if run['split'] == split and run['role'] == 'plain':
                student, length = re.match(r'(\w+): (\d+) iterations', run['label']).groups()
                found.setdefault(int(length), {})[student, shown] = 100 * run['metrics']['mAP']
    columns = [(student, shown) for student in STUDENTS for shown, *_ in PLAIN]
    body = [
        [f'{length:,}', *(format_number(row.get(column), '.1f') for column in columns)]
        for length, row in sorted(found.items())
    ]
    return markdown_table(['iterations', *(f'{s}, {shown}' for s, shown in columns)], body)


PAPER = {
    ('weighted_both', 'soft_both'): (
        'soft targets want the background weighted more', '+0.3 / +0.5'
    ),
    ('bounded_both', 'l2_both'): (
        "regression should be bounded by the teacher, not drawn to its boxes", '+1.3 / +1.6'
    ),
    ('hint', 'hint_without'): ('hints want an adaptation layer', 'a clear gain'),
    ('weighted_both', 'plain'): ('soft targets help', '+3.0'),
    ('bounded_both', 'plain'): ('bounded regression helps', '+1.2'),
    ('hint', 'plain'): ('hints help', 'a gain'),
    ('all', 'plain'): ('all three together help', '+4.7'),
    ('all', 'hint'): ('they help more than hints alone', 'a gain'),
}  # fmt: skip
"""What the paper says of each declared contrast of benchmarks/study/paper.py: mAP@.5 on PASCAL VOC
2007, and on KITTI where two numbers stand (VGG16 to Tucker-decomposed AlexNet)."""
TOLD = {
    'BEATS': 'holds',
    'WORSE': 'does not hold: it is worse',
    'NO GAIN': 'does not hold: no gain of 0.5',
    'INCONCLUSIVE': 'cannot be told',
}


@functools.cache
def stages_of(name: str) -> tuple[Study, list[StageSummary]]:
    """A study and its stages, from its committed results; the working directory is the root."""
    path = f'benchmarks/study/{name}'
    return read_study(f'{path}.py'), read_summaries(f'{path}.py', f'{path}.jsonl')


def study_stage(name: str, stage: str) -> str:
    """The table of one stage, as ``make study-table`` prints it."""
    study, found = stages_of(name)
    return stage_table(study, next(each for each in found if each.stage.name == stage), '')


def paper_claims() -> str:
    """The paper's claims beside what the study says of them."""
    contrasts = stages_of('paper')[1][-1].contrasts['']
    body = []
    for each in contrasts:
        claim, theirs = PAPER[each.arm, each.other]
        ours = f'{signed(each.mean)} {ends(each.interval)}'
        body.append([claim, theirs, f'{each.arm} - {each.other}', ours, f'**{TOLD[each.word]}**'])
    head = ['claim', 'in the paper', 'contrast', 'here: mAP, 95 %, corrected', 'verdict']
    return markdown_table(head, body)


def paper_train() -> str:
    """What the paper's terms gain on the images that they were trained on, and on others."""
    trained, seen = stages_of('paper_train')
    lines = {}
    for name, summary in (('val', stages_of('paper')[1][-1]), ('train', seen[-1])):
        for line in summary.lines:
            gain = '' if line.gain is None else f'{signed(line.gain)} {ends(line.interval)}'
            lines.setdefault(line.arm, {})[name] = [mean_sd([*line.by_seed.values()]), gain]
    arms = [trained.reference, *trained.stages[-1].arms]
    body = [[arm, *lines[arm]['train'], *lines[arm]['val']] for arm in arms]
    return markdown_table(['arm', 'train mAP', 'gain', 'val mAP', 'gain'], body)


# ------------------------------------------------------------------------------------------- pages

BLOCKS: dict[str, dict[str, Callable[[], str]]] = {
    'README.md': {'results': short_table, 'unlabelled': unlabelled_line},
    'docs/results.md': {name: (lambda name=name: whole_table(name)) for name in COMPARISONS},
    'docs/digits.md': {'students': students, 'curves': plain_curves},
    'docs/paper.md': {
        'claims': paper_claims,
        'terms': lambda: study_stage('paper', 'terms'),
        'values': lambda: study_stage('paper', 'one at a time'),
        'train': paper_train,
    },
    'docs/advice.md': {
        'features': lambda: study_stage('combinations', 'features'),
        'together': lambda: study_stage('combinations', 'together'),
        'three': lambda: study_stage('combinations', 'three seeds'),
    },
    'docs/reference.md': {'keys': reference},
    'docs/messages.md': {'messages': messages},
}
"""By page the generated parts and what makes them."""


def page(path: str) -> str:
    """The text of a page with its generated parts anew."""
    text = (ROOT / path).read_text(encoding='utf-8')
    for name, make in BLOCKS[path].items():
        begin, end = f'<!-- {name}: python docs/generate.py -->\n', '\n<!-- end -->'
        before, found, rest = text.partition(begin)
        if not found or end not in '\n' + rest:
            raise ValueError(f'{path} has no part {begin.strip()} ... {end.strip()}')
        text = before + begin + make() + end + ('\n' + rest).partition(end)[2]
    return text


if __name__ == '__main__':
    os.chdir(ROOT)
    for each in BLOCKS:
        (ROOT / each).write_text(page(each), encoding='utf-8')
