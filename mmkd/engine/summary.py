"""The table of what is trained, logged before the first step."""

from __future__ import annotations

from typing import Any

from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from mmengine.runner import Runner
from terminaltables import AsciiTable
from torch import nn

from ..models.detector import LOG_NAMES
from ..recipe import ADAPTER_PREFIX, UNTRAINED
from .processes import unwrap
from .weight_origins import origins


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
        if hasattr(model, 'terms'):
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
    rows = [['student', f'{type(student.backbone).__name__}, {_size(student)}']]
    rows += [['  weights', line] for line in origins(student, load_from, resumed)]
    if student.start is not None and not (resumed or load_from):
        taken, left = student.start.taken, student.start.left
        rows.append(['  start', f"{len(taken)} tensors of neck and heads are the teacher's"])
        rows += [
            ['  start', f'{key}: {count} classes, by name']
            for key, count in student.start.by_class.items()
        ]
        rows += [['  start', f'left: {key}: {why}'] for key, why in list(left.items())[:5]]
        if len(left) > 5:
            rows.append(['  start', f'left: {len(left) - 5} more'])
    teacher = student.teacher
    if teacher is None:
        rows.append(
            [
                'teacher',
                'none: every term is off'
                + ', only the start was taken' * (student.start is not None),
            ]
        )
    else:
        rows.append(
            ['teacher', f'{type(teacher.network.backbone).__name__}, {_size(teacher.network)}']
        )
        rows.append(['  config', teacher.name])
        if teacher.source == UNTRAINED:
            rows.append(['  weights', "RANDOM: teacher_ckpt='random' (for tests)"])
        else:
            rows.append(
                ['  weights', f'{teacher.loaded} tensors, all it has, from {teacher.source}']
            )
        if teacher.passed_over:
            rows.append(
                ['  weights', f'{teacher.passed_over} adaptation tensors in the file passed over']
            )
        if teacher.acceleration != type(teacher.acceleration)():
            rows.append(['  runs', str(teacher.acceleration)])
        if student.classes is not None and not student.classes.same:
            rows.append(['  classes', str(student.classes)])
        if student.resolution is not None:
            small, large = student.resolution.student, student.resolution.teacher
            rows.append(
                ['  pixels', f'{large[0]}x{large[1]}, where the student sees {small[0]}x{small[1]}']
            )
        elif student.terms and not student.pixels.same:
            rows.append(
                ['  pixels', 'another normalisation or channel order than the student: converted']
            )
    for name, log_name in LOG_NAMES.items():
        term = student.terms.get(name)
        why = student.left_out.get(name)
        rows.append([log_name, _describe(term) if term else f'OFF: {why}' if why else 'off'])
    if student.anchors is not None and ('rpn_cls' in student.terms or 'rpn_bbox' in student.terms):
        rows.append(
            [
                '  anchors',
                f"{100 * student.anchors.share:.1f} % of the student's are the teacher's too "
                f'(levels {student.anchors.levels}); the rest is left out',
            ]
        )
    for pair in student.hints:
        guided, hint = pair.shapes
        rows.append(['  hint', f'{pair.student} {_chw(guided)} -> {pair.teacher} {_chw(hint)}'])
    table = AsciiTable(rows, ' what is trained ')
    table.inner_heading_row_border = False
    return table.table


def _size(network: nn.Module) -> str:
    parameters = sum(
        p.numel() for n, p in network.named_parameters() if not n.startswith(ADAPTER_PREFIX)
    )
    return f'{parameters / 1e6:.2f} M parameters'


def _describe(term) -> str:
    loss = term.loss
    values = {
        key: getattr(loss, key)
        for key in (
            'loss_weight',
            'hard_weight',
            'background_weight',
            'temperature',
            'margin',
            'normalize',
        )
        if hasattr(loss, key)
    }
    text = f'{type(loss).__name__} ' + ', '.join(f'{k}={v:g}' for k, v in values.items())
    if term.share is not None:
        text += f"; weight so that its gradient is {term.share.share:g} of the hard losses'"
        text += f' (measured over {term.share.iters} steps)'
    schedule = term.schedule
    if schedule != type(schedule)():
        text += f'; {schedule}'
    return text


def _chw(shape: tuple[int, ...]) -> str:
    return '×'.join(str(size) for size in shape[1:])
