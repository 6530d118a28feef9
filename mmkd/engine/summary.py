"""The table of what is trained, logged before the first step."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from mmengine.runner import Runner
from terminaltables import AsciiTable
from torch import nn

from ..recipe import PAPER_TERMS, TERM_PREFIXES, UNTRAINED, log_name
from .weight_origins import origins, warn_of_inheritance
from .wrappers import distils, unwrap


class SummaryHook(Hook):
    """Logs :func:`startup_table` before training; of a plain model, where its weights are from."""

    priority = 'HIGHEST'

    def before_train(self, runner: Runner) -> None:
        """Logs it.

        Raises:
            ValueError: a checkpoint that the config names holds none of the weights.
        """
        model = unwrap(runner.model)
        resumed = getattr(runner, 'resumed_from', None)
        load_from = None if resumed else runner._load_from
        # On all ranks: reading a checkpoint by URL is a collective call.
        if distils(model):
            text = startup_table(model, load_from, resumed)
        else:
            text = 'weights: ' + '; '.join(origins(model, load_from, resumed))
        if is_main_process():
            runner.logger.info(text)


def startup_table(student: Any, load_from: str | None = None, resumed: str | None = None) -> str:
    """Tabulate student, teacher, weights and terms.

    Args:
        student: the distilling detector, its weights initialised.
        load_from: the checkpoint the student was loaded from, if any.
        resumed: the checkpoint that the run is resumed from, if any.

    Raises:
        ValueError: a checkpoint that the config names holds none of the weights.
    """
    own = getattr(student, 'student_class', None)
    kind = f'{own.__name__}, ' if own else ''
    rows = [['student', f'{kind}{type(student.backbone).__name__}, {_size(student)}']]
    rows += [['  weights', line] for line in origins(student, load_from, resumed)]
    if student.start is not None and not (resumed or load_from):
        rows += (['  start', text] for text in _start(student.start))
    rows += map(list, _teacher(student))
    rows += map(list, student.unlabelled.table)
    rows += map(list, _terms(student))
    if (match := getattr(student.sites.get('rpn'), 'match', None)) is not None:
        of = f"{100 * match.share:.1f} % of the student's are the teacher's too"
        rows.append(['anchors', f'{of} (levels {match.levels}); the rest is left out'])
    table = AsciiTable(rows, ' what is trained ')
    table.inner_heading_row_border = False
    return table.table


def _start(start: Any) -> Iterator[str]:
    """What of the start is the teacher's."""
    taken, left = start.taken, start.left
    yield f"{len(taken)} tensors of neck and heads are the teacher's, of {len(taken) + len(left)}"
    warn_of_inheritance(start)
    for key, count in start.by_class.items():
        yield f'{key}: {count} classes, by name'
    for key, why in list(left.items())[:5]:
        yield f'left: {key}: {why}'
    if len(left) > 5:
        yield f'left: {len(left) - 5} more'


def _teacher(student: Any) -> Iterator[tuple[str, str]]:
    teacher = student.teacher
    if teacher is None:
        start = ', only the start was taken' if student.start is not None else ''
        before = ', it has labelled images before' if student.unlabelled.on else ''
        yield 'teacher', f'none: every term is off{start}{before}'
        return
    yield 'teacher', f'{type(teacher.network.backbone).__name__}, {_size(teacher.network)}'
    yield '  config', teacher.name
    if teacher.source == UNTRAINED:
        yield '  weights', "RANDOM: teacher_ckpt='random' (for tests)"
    else:
        of = f' ({teacher.wrapping})' if teacher.wrapping else ''
        yield '  weights', f'{teacher.loaded} tensors, all it has, from {teacher.source}{of}'
    if teacher.passed_over:
        yield '  weights', f'{teacher.passed_over} adaptation tensors in the file passed over'
    if teacher.acceleration != type(teacher.acceleration)():
        yield '  runs', str(teacher.acceleration)
    if student.classes is not None and not student.classes.same:
        yield '  classes', str(student.classes)
    if student.resolution is not None:
        (w, h), (width, height) = student.resolution.student, student.resolution.teacher
        yield '  pixels', f'{width}x{height}, where the student sees {w}x{h}'
    elif hasattr(student, 'teacher_inputs') and not student.teacher_inputs.same:
        yield '  pixels', 'another normalisation or channel order than the student: converted'


def _terms(student: Any) -> Iterator[tuple[str, str]]:
    for key in dict.fromkeys([*PAPER_TERMS, *student.left_out, *student.kd_terms]):
        if key not in student.kd_terms:
            why = student.left_out.get(key)
            yield log_name(key), f'OFF: {why}' if why else 'off'
            continue
        term = student.kd_terms[key]
        yield log_name(key), _describe(term)
        for pair in getattr(term, 'pairs', ()) if term.needs().pairs else ():
            own, theirs = ('×'.join(str(size) for size in shape[1:]) for shape in pair.shapes)
            yield f'  {key}', f'{pair.student} {own} -> {pair.teacher} {theirs}'


def _size(network: nn.Module) -> str:
    parameters = sum(
        p.numel() for n, p in network.named_parameters() if not n.startswith(TERM_PREFIXES)
    )
    return f'{parameters / 1e6:.2f} M parameters'


def _describe(term: Any) -> str:
    loss = getattr(term, 'loss', None)
    values = {'loss_weight': term.loss_weight, **vars(loss or term)}
    text = f'{type(loss or term).__name__} ' + ', '.join(
        f'{name}={value:g}'
        for name, value in values.items()
        if isinstance(value, (int, float)) and not name.startswith('_') and name != 'training'
    )
    if loss is None:
        text += ''.join(f', {kind} of {site}' for site, kind in term.needs().rows)
    if term.share is not None:
        text += f"; weight so that its gradient is {term.share.share:g} of the hard losses'"
        text += f' (measured over {term.share.iters} steps)'
    if term.schedule != type(term.schedule)():
        text += f'; {term.schedule}'
    return text
