"""The numbers of a stage, and its tables in markdown."""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, field

import numpy as np

from ..comparison.plan import Run
from ..comparison.progress import duration
from ..comparison.statistics import gap_share, interval_word, judge, paired_interval
from ..comparison.table import markdown_table, mean_sd, percent
from .declaration import Stage, Study, Variant
from .stages import Entry
from .statistics import DRAWS, Bootstrap, Pooled, contrast_interval, pool

Headline = Callable[[list[Run], list[Run], Run | None], tuple[Bootstrap | None, bool]]
"""The bootstrap of runs against others, and whether it resamples the test images too."""


@dataclass
class Line:
    """One network of a stage. mAP, gain over the reference and its 95 % interval in points."""

    entry: Entry
    by_seed: dict[int, float]
    gain: float | None = None
    interval: tuple[float, float] | None = None
    headline: Bootstrap | None = None
    images: bool = False
    share: float | None = None
    diverged: int = 0
    """How many of its runs have diverged: it is compared with nothing then."""
    step_ms: float | None = None
    seconds: float | None = None

    @property
    def arm(self) -> str:
        return self.entry.variant.arm

    @property
    def seeds_and_images(self) -> tuple[float, float] | None:
        """The interval over seeds and test images."""
        return (self.headline.low, self.headline.high) if self.headline and self.images else None


@dataclass
class StageSummary:
    stage: Stage
    lines: list[Line]
    teachers: dict[str, float]
    """mAP of each teacher in points, by its label."""
    chosen: dict[str, Variant]
    """The value of each arm, as far as it is chosen."""
    decision: dict | None = None
    missing: list[str] = field(default_factory=list)
    contrasts: dict[str, list[Contrast]] = field(default_factory=dict)
    """The declared contrasts of each student."""
    judged: dict[str, str] = field(default_factory=dict)
    """Contrasts and claim of each student, as markdown."""

    def of(self, student: str) -> list[Line]:
        return [line for line in self.lines if line.entry.student == student]

    def find(self, student: str, arm: str) -> Line | None:
        """The line of an arm, at its chosen value; before there is one, the first of its lines."""
        lines = [line for line in self.of(student) if line.arm == arm]
        chosen = [line for line in lines if line.entry.variant == self.chosen.get(arm)]
        return next(iter([*chosen, *lines]), None)

    def pooled(self, student: str) -> Pooled | None:
        """The pooled variance over all arms whose seeds are complete; two that are the same runs
        are one."""
        whole = {
            tuple(run.key for run in line.entry.row.runs): line.by_seed
            for line in self.of(student)
            if self.complete(line)
        }
        return pool([[maps[seed] for seed in self.stage.seeds] for maps in whole.values()])

    def complete(self, line: Line) -> bool:
        """Whether all seeds of a line have a result."""
        return len(line.by_seed) == len(self.stage.seeds)


def summarise(
    study: Study,
    stage: Stage,
    entries: list[Entry],
    results: dict[str, dict],
    diverged: Container[str],
    chosen: dict[str, Variant],
    headline: Headline,
) -> StageSummary:
    """Computes what the table of a stage shows from the results of its runs by key, and the keys
    of those that have diverged."""
    summary = StageSummary(stage, [], {}, chosen)
    for entry in entries:
        found = {r.seed: results[r.key] for r in entry.row.runs if r.key in results}
        trained = [each['train'] for each in found.values() if each.get('train')]
        steps = [each['step_ms'] for each in trained if 'step_ms' in each]
        maps = {s: 100 * r['metrics']['mAP'] for s, r in found.items() if s is not None}
        line = Line(entry, maps, diverged=sum(r.key in diverged for r in entry.row.runs))
        line.step_ms = float(np.mean(steps)) if steps else None
        line.seconds = float(np.mean([each['seconds'] for each in trained])) if trained else None
        summary.lines.append(line)
        summary.missing += [run.name for run in entry.row.runs if run.key not in results]
        if entry.teacher and entry.teacher.key in results:
            value = 100 * results[entry.teacher.key]['metrics']['mAP']
            summary.teachers[entry.teacher.label] = value
    for line in summary.lines:
        reference = summary.find(line.entry.student, study.reference)
        if reference is None or reference is line or line.diverged or reference.diverged:
            continue
        teacher = line.entry.teacher
        pair = paired(line, reference)
        if not pair:
            continue
        line.gain = float(np.mean(pair))
        line.interval = paired_interval(pair) if len(pair) > 1 else None
        seeds = [s for s in line.by_seed if s in reference.by_seed]
        a, b = ([r for r in x.entry.row.runs if r.seed in seeds] for x in (line, reference))
        line.headline, line.images = headline(a, b, teacher)
        if teacher and teacher.label in summary.teachers:
            own, plain = (float(np.mean([x.by_seed[s] for s in seeds])) for x in (line, reference))
            line.share = gap_share(own, plain, summary.teachers[teacher.label])
    return summary


def paired(line: Line, other: Line) -> list[float]:
    """Differences in mAP points of the seeds that both have."""
    return [line.by_seed[s] - other.by_seed[s] for s in line.by_seed if s in other.by_seed]


def stage_table(study: Study, summary: StageSummary, student: str) -> str:
    """The table of a stage and student."""
    decision = summary.decision or {}
    lines = summary.of(student)
    head = ['arm', 'values', 'seeds', 'mAP', f'over {study.reference}', '95 %, seeds',
            '95 %, seeds and images', 'gap share', 'at least', 'ms/step', 'training time',
            'decision']  # fmt: skip
    body = [
        [teacher, '', '', f'{value:.1f}', *[''] * 8]
        for teacher, value in summary.teachers.items()
        if any(line.entry.teacher and line.entry.teacher.label == teacher for line in lines)
    ]
    for line in lines:
        maps, variant = list(line.by_seed.values()), line.entry.variant
        chosen = decision.get('values', {}).get(line.arm)
        word = 'value not chosen' if chosen and chosen != list(variant.values) else 'chosen'
        if not chosen or word == 'chosen':
            names = [name for name in ('kept', 'dropped') if line.arm in decision.get(name, ())]
            word = ', '.join([*(['value chosen'] if chosen else []), *names])
        share = line.headline.share if line.headline else None
        body.append([
            line.arm, ', '.join(variant.values), str(len(maps)),
            mean_sd(maps) + (f' ({line.diverged} diverged)' if line.diverged else ''),
            '' if line.gain is None else f'{line.gain:+.2f}', ends(line.interval),
            ends(line.seeds_and_images), percent(line.share), percent(share),
            '' if line.step_ms is None else f'{line.step_ms:.3g}',
            '' if line.seconds is None else duration(line.seconds), word,
        ])  # fmt: skip
    return _without_empty(head, body)


def _without_empty(head: list[str], body: list[list[str]]) -> str:
    """A table without the columns in which nothing stands."""
    used = [i for i in range(len(head)) if any(row[i] for row in body)]
    return markdown_table([head[i] for i in used], [[row[i] for i in used] for row in body])


@dataclass(frozen=True)
class Contrast:
    """Two arms of a stage: the mean paired difference in points, and its corrected interval."""

    arm: str
    other: str
    mean: float | None
    interval: tuple[float, float] | None = None
    images: tuple[float, float] | None = None
    """The interval over seeds and test images, which is not corrected."""
    share: float | None = None
    least: float | None = None
    """The share of the gap between ``other`` and the teacher, and the lower end of its interval."""
    word: str = ''
    """What the corrected interval allows to say: the words of a comparison."""


def declared_contrasts(
    study: Study, summary: StageSummary, student: str, winner: str | None, headline: Headline
) -> list[Contrast]:
    """The declared contrasts of one student, in declared order.

    A contrast's interval is :func:`.statistics.contrast_interval`: at the variance pooled over all
    arms of the stage within seeds, corrected for all declared contrasts on all its students.
    """
    pooled = summary.pooled(student)
    declared = len(study.contrasts) * len(summary.stage.students)
    found = []
    for names in study.contrasts:
        a, b = (_find(summary, student, name, winner) for name in names)
        if a is None or b is None:
            continue
        if a is b:
            found.append(Contrast(*names, None, word='the same arm'))
            continue
        pair = paired(a, b)
        mean = float(np.mean(pair)) if pair else None
        if a.diverged or b.diverged:
            found.append(Contrast(a.arm, b.arm, None, word='diverged'))
        elif pooled is None or mean is None or len(pair) < pooled.seeds:
            found.append(Contrast(a.arm, b.arm, mean))
        else:
            interval = contrast_interval(mean, pooled, declared)
            # As a comparison judges: two seeds are too few, and where the seed has no effect on the
            # runs there is one sample.
            same = float(np.ptp(pair)) < 1e-9  # up to rounding
            told = len(pair) >= 3 and (not same or abs(mean) < 1e-9)
            word = interval_word(*interval)[0] if told else 'INCONCLUSIVE'
            teacher, share = a.entry.teacher, None
            if teacher and teacher.label in summary.teachers:
                own, others = (float(np.mean(list(x.by_seed.values()))) for x in (a, b))
                share = gap_share(own, others, summary.teachers[teacher.label])
            boot, of_images = headline(a.entry.row.runs, b.entry.row.runs, teacher)
            images = (boot.low, boot.high) if boot and of_images else None
            least = boot.share if boot else None
            found.append(Contrast(a.arm, b.arm, mean, interval, images, share, least, word))
    return found


def _find(summary: StageSummary, student: str, name: str, winner: str | None) -> Line | None:
    return summary.find(student, winner or '' if name == 'winner' else name)


def _seeds_and_images(a: Line, b: Line, headline: Headline) -> tuple[float, float] | None:
    found, images = headline(a.entry.row.runs, b.entry.row.runs, None)
    return (found.low, found.high) if found and images else None


def judge_contrasts(
    study: Study, summary: StageSummary, student: str, winner: str | None, headline: Headline
) -> str:
    """The declared contrasts and the claim, of one student, as markdown.

    The claim is an all-of-them: it holds if each paired interval with a rival (Student's t of their
    own differences, 95 %, uncorrected) lies above 0, and each over seeds and images that there is;
    all seeds have to be there, and none may have diverged.
    """
    parts = []
    pooled = summary.pooled(student)
    declared = len(study.contrasts) * len(summary.stage.students)
    if contrasts := summary.contrasts.get(student):
        said = ''
        if pooled:
            said = (
                f' at the variance pooled over {pooled.arms} arms within {pooled.seeds} seeds '
                f'(standard deviation of a difference {pooled.sd:.2f}, {pooled.dof} degrees of '
                f'freedom), corrected after Bonferroni (declared contrasts: {declared})'
            )
        parts.append(f'Declared contrasts: the 95 % interval{said}.')
        body = [
            [f'{each.arm} - {each.other}', signed(each.mean), ends(each.interval),
             ends(each.images), percent(each.share), percent(each.least), each.word]
            for each in contrasts
        ]  # fmt: skip
        head = ['contrast', 'difference', '95 %, corrected', '95 %, seeds and images', 'gap share',
                'at least', 'verdict']  # fmt: skip
        parts.append(_without_empty(head, body))
    arm = _find(summary, student, study.claim[0], winner) if study.claim else None
    if study.claim and arm is not None:
        rivals = study.claim[1] or [x.arm for x in summary.of(student)]
        found = (_find(summary, student, name, winner) for name in rivals)
        others = [x for x in found if x is not None and x is not arm]
        body, below, missing = [], [], []
        for other in others:
            pair = paired(arm, other)
            mean = float(np.mean(pair)) if pair else None
            verdict, both = None, None
            if arm.diverged or other.diverged:
                below.append(other.arm)
            elif not (summary.complete(arm) and summary.complete(other)):
                missing.append(other.arm)
            else:
                verdict, both = judge(pair), _seeds_and_images(arm, other, headline)
                if verdict.word != 'BEATS' or (both and both[0] <= 0):
                    below.append(other.arm)
            interval = None
            if verdict and verdict.low is not None and verdict.high is not None:
                interval = verdict.low, verdict.high
            body.append([other.arm, signed(mean), ends(interval), ends(both)])
        word = 'HOLDS'
        if below:
            word = f'does not hold ({", ".join(below)})'
        elif missing:
            word = f'cannot be told yet: seeds are missing ({", ".join(missing)})'
        elif not others:
            word = 'has no rival'
        parts.append(
            f'Claim: {arm.arm} is above each rival. Each paired interval has to lie above 0, '
            f'uncorrected: **{word}**.'
        )
        head = ['rival', 'difference', '95 %, seeds', '95 %, seeds and images']
        parts.append(markdown_table(head, body))
    return '\n\n'.join(parts)


def markdown(study: Study, summaries: Sequence[StageSummary], notes: Sequence[str]) -> str:
    """The study as markdown, readable as plain text too."""
    parts = [f'# {study.name}']
    for summary in summaries:
        stage = summary.stage
        parts.append(f'## {stage.name}: {stage.split} split, seeds {_join(stage.seeds)}')
        if stage.options:
            parts.append(f'With {" ".join(stage.options)}.')
        for student in stage.students:
            if student:
                parts.append(f'### {student}')
            parts.append(stage_table(study, summary, student))
            parts += filter(None, [summary.judged.get(student)])
        if summary.missing:
            parts.append(f'Not there: {", ".join(summary.missing)}.')
        if stage.split == 'test' and any(x.headline and not x.images for x in summary.lines):
            parts.append(
                'Test images are not resampled where no column says so: it takes the detections of '
                'all runs of a pair, which the work folder keeps, and CocoMetric.'
            )
    parts.append(
        'mAP in points (0-100), mean ± standard deviation over seeds. Differences are paired, same '
        "seed against same seed; 95 %, seeds: Student's t. Seeds and images: a bootstrap of "
        f"{DRAWS} draws over both, stretched to the width of Student's t for so few seeds; that of "
        'the gap share is over seeds, and over images where the column beside it is filled. ms per '
        'step is the median that the training logged, data loading included.'
    )
    parts += ['\n'.join(f'- {note}' for note in notes)] if notes else []
    return '\n\n'.join(parts) + '\n'


def signed(difference: float | None) -> str:
    return 'n/a' if difference is None else f'{difference:+.2f}'


def ends(interval: tuple[float, float] | None) -> str:
    if interval is None or not all(map(math.isfinite, interval)):
        return ''
    return f'[{interval[0]:+.2f}, {interval[1]:+.2f}]'


def _join(values: Sequence[object]) -> str:
    return ', '.join(map(str, values))
