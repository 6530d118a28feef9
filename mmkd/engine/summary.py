"""The table that says, before the first step, what is about to be trained."""

from __future__ import annotations

from terminaltables import AsciiTable
from torch import nn

from ..models.detector import DistillationMixin
from ..models.terms import DistillTerm
from ..recipe import PAPER_TERMS, TERM_PREFIXES, UNTRAINED, log_name
from .weight_origins import origins


def startup_table(
    student: DistillationMixin, load_from: str | None = None, resumed: str | None = None
) -> str:
    """Draw the table.

    Raises:
        ValueError: not one tensor was loaded from a checkpoint that the config names.

    Args:
        student: the distilling detector, its weights initialised.
        load_from: the checkpoint the student was loaded from, if any.
        resumed: the checkpoint this run goes on from, if any.
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
        elif student.kd_terms and not student.teacher_inputs.same:
            rows.append(
                ['  pixels', 'another normalisation or channel order than the student: converted']
            )
    match = getattr(student.sites.get('rpn'), 'match', None)
    for key in dict.fromkeys([*PAPER_TERMS, *student.left_out, *student.kd_terms]):
        why = student.left_out.get(key)
        if key not in student.kd_terms:
            rows.append([log_name(key), f'OFF: {why}' if why else 'off'])
            continue
        term = student.kd_terms[key]
        rows.append([log_name(key), _describe(term)])
        for pair in getattr(term, 'pairs', ()):
            guided, hint = pair.shapes
            rows.append(['  hint', f'{pair.student} {_chw(guided)} -> {pair.teacher} {_chw(hint)}'])
    if match is not None:
        rows.append(
            [
                'anchors',
                f"{100 * match.share:.1f} % of the student's are the teacher's too "
                f'(levels {match.levels}); the rest is left out',
            ]
        )
    table = AsciiTable(rows, ' what is trained ')
    table.inner_heading_row_border = False
    return table.table


def _size(network: nn.Module) -> str:
    parameters = sum(
        p.numel() for n, p in network.named_parameters() if not n.startswith(TERM_PREFIXES)
    )
    return f'{parameters / 1e6:.2f} M parameters'


def _describe(term: DistillTerm) -> str:
    loss = getattr(term, 'loss', term)
    values = {
        name: value
        for name, value in {'loss_weight': term.loss_weight, **vars(loss)}.items()
        if isinstance(value, (int, float, bool)) and not name.startswith('_') and name != 'training'
    }
    text = f'{type(loss).__name__} ' + ', '.join(f'{k}={v:g}' for k, v in values.items())
    where = [f'{kind} of {site}' for site, kind in term.needs().rows]
    if where and getattr(term, 'loss', None) is None:
        text += f' ({", ".join(where)})'
    if term.share is not None:
        text += f"; weight so that its gradient is {term.share.share:g} of the hard losses'"
        text += f' (measured over {term.share.iters} steps)'
    if term.schedule != type(term.schedule)():
        text += f'; {term.schedule}'
    return text


def _chw(shape: tuple[int, ...]) -> str:
    return '×'.join(str(size) for size in shape[1:])
