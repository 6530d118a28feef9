"""Summarises results: the numbers of each row and pair, and the tables in markdown."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from .measure import cpu_cores
from .plan import Comparison, Plan, Row, arch_key, config_with_options
from .progress import duration
from .statistics import MARGIN, Verdict, gap_share, judge

UNTRAINED = 2.0
"""mAP points below which a student has learned next to nothing, so there is nothing to compare."""
_TOO_EARLY = (
    f'below {UNTRAINED:g} mAP: train longer (train_cfg.max_epochs); more seeds would not help'
)


@dataclass
class RowSummary:
    """One network: mAP and AP50 in points (0-100), training time in seconds; None: unknown."""

    label: str
    role: str
    n: int
    by_seed: dict[int | None, float]
    mean: float | None
    ap50: float | None
    params: int | None
    gflops: float | None
    images_per_second: float | None
    seconds: float | None
    baseline_of: list[str]
    share_own: float | None = None
    share_plain: float | None = None


@dataclass
class PairSummary:
    """A distilled row against a reference: its own baseline (``own``) or another, and ``how`` the
    two differ; ``teacher`` is the label of the distilled row's."""

    label: str
    reference: str
    own: bool
    seeds: list[int]
    verdict: Verdict | None
    share: float | None
    how: str = 'start and terms together'
    teacher: str | None = None


@dataclass
class Summary:
    rows: list[RowSummary]
    pairs: list[PairSummary]
    seeds: list[int]
    split: str
    margin: float
    notes: list[str]

    @property
    def too_early(self) -> str:
        """Advice where no student has learned enough to be compared with another, else ''."""
        return f'Every student is {_TOO_EARLY}.' if _barely_trained(self.rows) else ''


def summarise(
    plan: Plan,
    results: dict[str, dict],
    measures: dict[str, dict],
    margin: float = MARGIN,
    notes: Sequence[str] = (),
) -> Summary:
    """Computes every number that the table and the report show."""
    measured = {row.label: measures.get(arch_key(row.runs[0]), {}) for row in plan.rows}
    by_label = {row.label: _row(row, results, measured[row.label]) for row in plan.rows}
    rows = list(by_label.values())
    summary = Summary(rows, [], plan.seeds, plan.split, margin, [*plan.notes, *notes])
    for comparison in plan.comparisons:
        references = [(comparison.baseline, 'own baseline'), *comparison.others]
        known = [row for row, _ in references]
        references += [
            (row, _what_differs(comparison.baseline, row)) for row in plan.plain if row not in known
        ]
        for reference, how in references:
            own = reference is comparison.baseline
            pair = _pair(comparison, reference, own, how, by_label, margin)
            summary.pairs.append(pair)
            row_summary = by_label[comparison.distilled.label]
            if own:
                row_summary.share_own = pair.share
            if plan.plain and reference is plan.plain[0]:
                row_summary.share_plain = pair.share
        baseline, plain = by_label[comparison.baseline.label], plan.plain[:1]
        teacher = by_label[comparison.teacher.label] if comparison.teacher else None
        if plain and plain[0] is not comparison.baseline and teacher:
            values = (baseline.mean, by_label[plain[0].label].mean, teacher.mean)
            if all(v is not None for v in values):
                baseline.share_plain = gap_share(*values)  # type: ignore[arg-type]
    for label, found in measured.items():
        if why := found.get('gflops_why'):
            summary.notes.append(f'GFLOPs of {label}: not computable ({why})')
    if {(row.share_own, row.share_plain) for row in rows} - {(None, None)}:
        summary.notes.append(
            "gap share: the gain as a part of the teacher's lead over the same reference"
        )
    summary.notes += _notes(plan, results, measures)
    return summary


def _what_differs(baseline: Row, plain: Row) -> str:
    """What a plain config lacks of a distilled one, whose own baseline has its network, data and
    start."""
    own, other = baseline.runs[0], plain.runs[0]
    data = [config_with_options(r.config, r.options).get('train_dataloader') for r in (own, other)]
    alike = arch_key(own) == arch_key(other) and data[0] == data[1]
    return 'start and terms together' if alike else 'another plain config'


def _row(row: Row, results: dict[str, dict], measured: dict) -> RowSummary:
    found = {run.seed: results[run.key] for run in row.runs if run.key in results}
    by_seed = {seed: 100 * r['metrics']['mAP'] for seed, r in found.items()}
    at_50 = [r['metrics'].get('AP50') for r in found.values()]
    trained = [r['train'] for r in found.values() if r.get('train')]
    return RowSummary(
        row.label,
        row.role,
        len(by_seed),
        by_seed,
        _mean(list(by_seed.values())),
        _mean([100 * value for value in at_50 if value is not None]),
        measured.get('params'),
        measured.get('gflops'),
        measured.get('images_per_second'),
        _mean([t['seconds'] for t in trained]),
        row.baseline_of,
    )


def _mean(values: list[float]) -> float | None:
    return float(np.mean(values)) if values else None


def _notes(plan: Plan, results: dict[str, dict], measures: dict[str, dict]) -> Iterator[str]:
    """What is missing, and how exact the numbers are."""
    runs = [run for row in plan.rows for run in row.runs]
    done = [results[run.key] for run in runs if run.key in results]
    if missing := [run.name for run in runs if run.key not in results]:
        yield f'not there (yet): {", ".join(missing)}'
    if any(not r['metrics']['exact'] for r in done):
        yield 'the evaluator rounds to 0.1 points, and a difference is only as fine as that'
    if devices := sorted({m['device'] for m in measures.values() if 'device' in m}):
        yield (
            'GFLOPs are multiply-adds of convolutions and linear layers; images/s is one image at '
            f'a time without reading it, median ({"; ".join(devices)})'
        )
    busy = max((m.get('load_before', 0.0) for m in measures.values()), default=0.0)
    if busy > cpu_cores():
        yield (
            f'the machine was busy (load {busy:.1f}) when images/s was measured: delete the lines '
            'of kind "measure" from the results file and call again when it is idle'
        )
    if trained := [r['train'] for r in done if r.get('train')]:
        side = '/'.join(map(str, sorted({t['side_by_side'] for t in trained})))
        wall = duration(sum(t['seconds'] for t in trained))
        yield (
            f'training time is wall time of the training command with validation, {side} run(s) '
            f'side by side; all trainings together: {wall}'
        )
    if resumed := {r['label'] for r in done if r.get('train', {}).get('attempts', 1) > 1}:
        labels = ', '.join(sorted(resumed))
        yield f'interrupted and resumed, so that their time is inexact: {labels}'


def _pair(
    comparison: Comparison,
    reference: Row,
    own: bool,
    how: str,
    by_label: dict[str, RowSummary],
    margin: float,
) -> PairSummary:
    distilled, other = by_label[comparison.distilled.label], by_label[reference.label]
    seeds = [s for s in distilled.by_seed if s in other.by_seed and s is not None]
    named = comparison.teacher.label if comparison.teacher else None
    pair = PairSummary(distilled.label, other.label, own, seeds, None, None, how, named)
    if not seeds:
        return pair
    pair.verdict = judge([distilled.by_seed[s] - other.by_seed[s] for s in seeds], margin)
    if pair.verdict.word == 'INCONCLUSIVE' and _barely_trained([distilled, other]):
        pair.verdict = dataclasses.replace(pair.verdict, why=f'both are {_TOO_EARLY}')
    teacher = by_label[comparison.teacher.label].mean if comparison.teacher else None
    if teacher is not None:
        # Over the seeds that both have, as the difference is.
        student, plain = (float(np.mean([r.by_seed[s] for s in seeds])) for r in (distilled, other))
        pair.share = gap_share(student, plain, teacher)
    return pair


def _barely_trained(rows: list[RowSummary]) -> bool:
    means = [row.mean for row in rows if row.role != 'teacher' and row.mean is not None]
    return bool(means) and max(means) < UNTRAINED


def format_number(value: float | None, form: str = '.1f', scale: float = 1.0) -> str:
    return 'n/a' if value is None else format(value * scale, form)


def percent(share: float | None) -> str:
    return '' if share is None else f'{round(100 * share, 0) + 0:.0f} %'  # never -0


def mean_sd(points: Sequence[float]) -> str:
    """Mean ± standard deviation, as the tables show mAP over seeds."""
    if not points:
        return 'n/a'
    # No-break spaces: a table cell stays on one line.
    sd = f'\xa0±\xa0{np.std(points, ddof=1):.1f}' if len(points) > 1 else ''
    return f'{np.mean(points):.1f}{sd}'


def spread(row: RowSummary) -> str:
    return mean_sd(list(row.by_seed.values()))


def interval(verdict: Verdict) -> str:
    if verdict.low is None or verdict.high is None:
        return 'none'
    return f'[{verdict.low:+.1f}, {verdict.high:+.1f}]'


def role_name(row: RowSummary) -> str:
    if row.baseline_of:
        of = f'baseline of {", ".join(row.baseline_of)}'
        return of if row.role == 'baseline' else f'{row.role}; {of}'
    return row.role


def columns(summary: Summary) -> tuple[list[str], list[list[str]]]:
    """Head and body of the main table."""
    plain = [row.label for row in summary.rows if row.role == 'plain'][:1]
    head = ['network', 'role', 'seeds', 'mAP', 'AP50', 'params (M)', 'GFLOPs', 'images/s',
            'training time', 'gap share over own baseline']  # fmt: skip
    head += [f'gap share over {plain[0]}'] if plain else []
    body = []
    for row in summary.rows:
        line = [
            row.label,
            role_name(row),
            '' if row.role == 'teacher' else str(row.n),
            spread(row),
            format_number(row.ap50),
            format_number(row.params, '.2f', 1e-6),
            format_number(row.gflops, '.3g'),
            format_number(row.images_per_second, '.3g'),
            '' if row.seconds is None else duration(row.seconds),
            percent(row.share_own),
        ]
        if plain:
            line.append(percent(row.share_plain))
        body.append(line)
    return head, body


def pair_columns(summary: Summary) -> tuple[list[str], list[list[str]]]:
    """Head and body of the table of paired differences."""
    head = ['distilled', 'against', 'difference in mAP', '95 % interval', 'n', 'verdict', 'why']
    body = []
    for pair in summary.pairs:
        against = f'{pair.reference} ({pair.how})'
        verdict = pair.verdict
        if verdict is None:
            line = [pair.label, against, 'n/a', 'n/a', '0', 'INCONCLUSIVE', 'no pair has finished']
        else:
            line = [
                pair.label,
                against,
                f'{verdict.mean:+.1f}',
                interval(verdict),
                str(verdict.n),
                f'**{verdict.word}**' if pair.own else verdict.word,
                verdict.why,
            ]
        body.append(line)
    return head, body


def markdown(summary: Summary) -> str:
    """The comparison as markdown, readable as plain text too."""
    seeds = ', '.join(map(str, summary.seeds))
    parts = [
        f'mAP and AP50 in points (0-100) on the {summary.split} split, mean ± standard deviation '
        f'over seeds {seeds}.',
        markdown_table(*columns(summary)),
        'Paired differences, same seed against same seed. BEATS: the 95 % interval (paired t) lies '
        'above 0. WORSE: below. NO GAIN: it contains 0 and ends below the smallest gain of '
        f'interest, {summary.margin:g}. INCONCLUSIVE: anything else, and always below three seeds.',
        markdown_table(*pair_columns(summary)),
    ]
    if summary.too_early:
        parts.append(f'**{summary.too_early}**')
    elif len(summary.seeds) < 3:
        n = len(summary.seeds)
        parts.append(f'**n = {n}: this proves nothing.** Three seeds are the least.')
    parts += ['\n'.join(f'- {note}' for note in summary.notes)] if summary.notes else []
    return '\n\n'.join(parts) + '\n'


def markdown_table(head: list[str], body: list[list[str]]) -> str:
    """A table in markdown, its columns aligned."""
    lines = [head, *body]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    padded = [[c.ljust(width) for c, width in zip(line, widths, strict=True)] for line in lines]
    rule = ['-' * width for width in widths]
    return '\n'.join(f'| {" | ".join(line)} |' for line in (padded[0], rule, *padded[1:]))
