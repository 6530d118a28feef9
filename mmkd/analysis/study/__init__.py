"""A study: many arms, in stages that choose on validation and end on test.

:mod:`.declaration` reads STUDY.py, :mod:`.stages` says what is run and who goes on, :mod:`.images`
and :mod:`.statistics` do the arithmetic, :mod:`.table` and :mod:`.plot` show it. Runs, their keys
and results are those of :mod:`..comparison`.
"""

from __future__ import annotations

import io
import itertools
import math
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from ...digests import short_sha256
from ...io.checkpoint import CheckpointError
from ..comparison import Progress, RunContext, Stopped, perform_all, resources, run_command
from ..comparison.plan import Plan, Run
from ..comparison.results import append_result, damage, read_results, require_same_data
from ..comparison.runs import Execute
from . import plot as plotting
from .declaration import Stage, Study, judged_stage, read_study
from .images import resampled_maps
from .stages import Standing, check, decide, entrants, later_cost, plan_stage
from .statistics import Bootstrap, bootstrap, seeds_needed
from .table import StageSummary, declared_contrasts, judge_contrasts, markdown, summarise

__all__ = ['read_summaries', 'study']

_DIVERGED = re.compile(
    r'has diverged|(loss\w*|sum of the losses) is -?(nan|inf) at iteration (?!1\b)'
)
"""Matches the error of a training that diverged. A loss that is not finite in iteration 1 does not
match: that set-up is broken."""


def study(
    path: str,
    work_dir: str | Path | None = None,
    results_path: str | Path | None = None,
    jobs: int | None = None,
    gpus: int | None = None,
    table_only: bool = False,
    power: float | None = None,
    plot: str | Path | None = None,
    execute: Execute = run_command,
    stream: TextIO = sys.stdout,
) -> int:
    """Runs what is missing stage by stage, and writes tables (``NAME.md``) and plot (``NAME.svg``).

    The arguments are those of ``tools/study.py``, which describes them; ``execute`` runs the
    commands of a run, and ``stream`` gets what is printed.

    Returns:
        The exit code: 0, 1 if a stage could not be finished, 2 if the study is impossible, 130 if
        it was stopped.
    """
    try:
        declared = read_study(path)
        work = Path(work_dir or Path('work_dirs') / declared.name)
        picture = Path(plot or work / f'{declared.name}.svg')
        if picture.suffix not in plotting.FORMATS:
            raise ValueError(f'--plot {plot}: the name must end in {", ".join(plotting.FORMATS)}')
        side_by_side, processes, devices = resources(jobs, gpus)
        if power is not None:
            seeds_needed(1.0, power)
        context = RunContext(
            work, Path(results_path or work / 'results.jsonl'), side_by_side, processes, devices,
            Progress([], stream), execute, curves=False,
        )  # fmt: skip
        conduct = Conduct(declared, context, stream, not table_only and power is None)
        code = conduct.run()
        text = markdown(declared, conduct.summaries, conduct.notes)
    except (ValueError, FileNotFoundError) as error:
        print(f'study: {error}', file=stream)
        return 2
    except (Stopped, KeyboardInterrupt):
        print('\nstopped; the same command continues from here', file=stream)
        return 130
    if power is not None:
        print(conduct.power(power), file=stream)
        return 0
    if not any(summary.teachers or summary.lines for summary in conduct.summaries):
        return code
    work.mkdir(parents=True, exist_ok=True)
    (work / f'{declared.name}.md').write_text(text)
    print(f'\n{text}\ntable: {work / f"{declared.name}.md"}', file=stream)
    last = judged_stage(declared)
    with_gains = [s for s in conduct.summaries if any(x.gain is not None for x in s.lines)]
    with_gains = [s for s in with_gains if s.stage is last] or with_gains
    if with_gains:
        plotting.draw(with_gains[-1], declared.reference, picture)
        print(f'plot:  {picture}', file=stream)
    for message in conduct.failed:
        print(f'\n{message}', file=stream)
    stream.flush()
    return code


def read_summaries(path: str, results_path: str | Path) -> list[StageSummary]:
    """The stages of a study, as far as its results go; trains nothing.

    Raises:
        ValueError, FileNotFoundError: as :func:`study` would say.
    """
    file, stream = Path(results_path), io.StringIO()
    context = RunContext(
        file.parent, file, 1, 1, [], Progress([], stream), run_command, curves=False
    )
    conduct = Conduct(read_study(path), context, stream, train=False)
    conduct.run()
    return conduct.summaries


class Conduct:
    """Takes a study through its stages; ``train`` False: as far as the results go."""

    def __init__(self, declared: Study, context: RunContext, stream: TextIO, train: bool) -> None:
        self.study, self.context, self.stream, self.train = declared, context, stream, train
        self.standing = Standing()
        self.summaries: list[StageSummary] = []
        self.notes: list[str] = []
        self.failed: list[str] = []
        self.maps: dict[str, np.ndarray | None] = {}
        """mAP on resampled images by the key of the run; None where they cannot be had."""

    def run(self) -> int:
        """Runs the stages; 0, or 1 where one is not complete."""
        file = self.context.results
        lines = read_results(file)
        self.notes = damage(file, lines)
        names = {key for kind, key in lines.others if kind == 'study'}
        if names - {self.study.name}:
            raise ValueError(
                f'{file} has the results of the study {", ".join(names)}, and this one is '
                f'{self.study.name}: name another --results, or name=... in the study'
            )
        costs = check(self.study, self.context.processes, lines.runs) if self.train else {}
        if self.train and not names:
            append_result(file, {'kind': 'study', 'key': self.study.name})
        for number, stage in enumerate(self.study.stages):
            if not self._stage(number, stage, costs):
                return 1
        return 0

    def _stage(self, number: int, stage: Stage, costs: dict[str, float]) -> bool:
        """Runs one stage; whether it is complete."""
        file = self.context.results
        variants = entrants(self.study, stage, self.standing)
        if stage is judged_stage(self.study):
            self._require_contrasts(stage, {variant.arm for variant in variants})
        plan, entries = plan_stage(stage, variants, self.context.processes)
        require_same_data(file, plan, keep=self.train)
        if stage.split == 'test':
            # All that follow, up to another choice, before the first is run: none is added later.
            before, following = self.study.stages[:number], self.study.stages[number:]
            again = any(each.split == 'test' for each in before) and before[-1].split == 'val'
            for each in itertools.takewhile(lambda other: other.split == 'test', following):
                self._record(self._finalists(each), again)
        if self.train:
            candidates = len({v.arm for v in variants} - {self.study.reference})
            runs_later = later_cost(self.study, number, candidates, dict.fromkeys(costs, 1.0))
            later = later_cost(self.study, number, candidates, costs)
            self._perform(plan, stage, later, round(runs_later))
        lines = read_results(file)
        runs = {run.key: run for run in plan.runs}
        diverged = [key for key in runs if ('diverged', key) in lines.others]
        left = [run for key, run in runs.items() if key not in lines.runs and key not in diverged]
        self.notes += [
            f'{runs[key].name} has diverged in stage {stage.name}: it ranks last'
            for key in diverged
        ]
        self.notes += _stale(stage, runs, lines.runs)
        decision = None
        if left:
            self.failed.append(
                f'stage {stage.name} is not complete: {len(left)} of {len(runs)} runs are not '
                f'there ({left[0].name}{", ..." if len(left) > 1 else ""}), and nothing is decided '
                'without them'
            )
        else:
            scores = {
                entry.row.label: -math.inf
                if any(run.key in diverged for run in entry.row.runs)
                else float(
                    np.mean([100 * lines.runs[r.key]['metrics']['mAP'] for r in entry.row.runs])
                )
                for entry in entries
            }
            decision, self.standing = decide(self.study, stage, entries, scores, self.standing)
            if decision:
                self._record(decision)
            if decision and decision.get('kept') == [] and decision['dropped']:
                self.failed.append(f'stage {stage.name}: every arm has diverged, so none goes on')
                left = list(runs.values())
        summary = summarise(
            self.study, stage, entries, lines.runs, diverged, self.standing.chosen, self.headline
        )
        summary.decision = decision
        self.summaries.append(summary)
        if stage is judged_stage(self.study):
            for student in stage.students:
                given = self.study, summary, student, self.winner, self.headline
                summary.contrasts[student] = declared_contrasts(*given)
                summary.judged[student] = judge_contrasts(*given)
        return not left

    def _finalists(self, stage: Stage) -> dict:
        """What is declared of a stage on the test split before it is read."""
        variants = entrants(self.study, stage, self.standing)
        entries = plan_stage(stage, variants, self.context.processes)[1]
        runs = {entry.row.label: [run.key for run in entry.row.runs] for entry in entries}
        claim = self.study.claim and [self.study.claim[0], self.study.claim[1]]
        return {
            'kind': 'decision', 'key': stage.name, 'arms': list(runs), 'seeds': stage.seeds,
            'runs': runs, 'contrasts': [list(pair) for pair in self.study.contrasts],
            'claim': claim,
        }  # fmt: skip

    def _require_contrasts(self, stage: Stage, arms: set[str]) -> None:
        named = [arm for pair in self.study.contrasts for arm in pair]
        if self.study.claim:
            named += [self.study.claim[0], *(self.study.claim[1] or ())]
        for arm in named:
            name = self.winner if arm == 'winner' else arm
            if name not in arms:
                raise ValueError(
                    f'{name or arm} is in a contrast or the claim, and did not get into stage '
                    f'{stage.name!r}: add it to the arms of that stage, or take the contrast out'
                )

    def _record(self, line: dict, again: bool = False) -> None:
        """Writes a decision into the results, once; ``again``: the study chooses after a test, so
        its finalists could not be known before.

        Raises:
            ValueError: if it differs from one that a run on the test split came after, or a stage
                on that split is declared after another has read it.
        """
        lines = read_results(self.context.results)
        known = lines.others.get(('decision', line['key']))
        # An older version has recorded less of a stage on test.
        parts = [p for p in _DECIDED if known is None or p in known or p in _ALWAYS]
        if known and all(known.get(part) == line.get(part) for part in parts):
            return
        decisions = [other for (kind, _), other in lines.others.items() if kind == 'decision']
        declared = {
            key for other in decisions for keys in other.get('runs', {}).values() for key in keys
        }
        read = [run for key, run in lines.runs.items() if key in declared]
        if known and not declared:  # by an older version
            finalists = {label for other in decisions for label in other.get('arms', ())}
            read = [
                run
                for run in lines.runs.values()
                if run['split'] == 'test' and run['role'] != 'teacher' and run['label'] in finalists
            ]
        if read and (known or ('arms' in line and not again)):
            changed = [p for p in parts if (known or {}).get(p) != line.get(p)]
            was = _told(known, changed, line) if known else 'not there'
            raise ValueError(
                f'the decision of stage {line["key"]!r} in {self.context.results} was {was}, and '
                f'would now be {_told(line, changed, known or {})}; the test split has been read '
                f'since ({read[0]["label"]}). Undo the change, or begin a study with another '
                '--results'
            )
        if self.train:
            append_result(self.context.results, line)

    def _perform(self, plan: Plan, stage: Stage, later: float, runs_later: int) -> None:
        lines = read_results(self.context.results)
        done = lines.runs.keys() | {key for kind, key in lines.others if kind == 'diverged'}
        runs = {run.key: run for run in plan.runs}
        todo = [run for key, run in runs.items() if key not in done]
        print(
            f'stage {stage.name}: {len(runs)} runs, {len(runs) - len(todo)} of them done already; '
            f'{self.context.jobs} side by side'
            + (f'; up to {runs_later} runs in later stages' if runs_later else ''),
            file=self.stream,
            flush=True,
        )
        costs = {run.name: run.cost for run in todo}
        progress = Progress(list(costs), self.stream, costs=costs, later=later)
        if before := self.context.progress.done():  # the pace of the stages before
            progress.before, progress.started = before, self.context.progress.started
        self.context.progress = progress
        failures = perform_all(todo, self.context)[1]
        for run in todo:
            message = failures.get(run.name, '')
            if _DIVERGED.search(message):
                line = {'kind': 'diverged', 'key': run.key, 'label': run.name}
                append_result(self.context.results, {**line, 'message': message[-500:]})
            elif message:
                self.failed.append(f'FAILED  {run.name}: {message}')

    @property
    def winner(self) -> str | None:
        """The best arm of the last selection."""
        return self.standing.left[0] if self.standing.left else None

    def headline(
        self, student: list[Run], reference: list[Run], teacher: Run | None
    ) -> tuple[Bootstrap | None, bool]:
        """The bootstrap of runs against others by seed, and whether images are resampled too.

        On the test split it takes the images from the detections in the work folder. What it gives
        is kept in the results, so that the table needs these alone.
        """
        lines = read_results(self.context.results)
        runs = [*student, *reference, *([teacher] if teacher else [])]
        if len(student) < 3 or any(run.key not in lines.runs for run in runs):
            return None, False
        scores = (lines.runs[run.key]['metrics']['mAP'] for run in runs)
        key = short_sha256(
            ' '.join(f'{r.key} {score}' for r, score in zip(runs, scores, strict=True))
        )
        known = lines.others.get(('interval', key))
        if known:
            return Bootstrap(known['low'], known['high'], known['share']), True
        images = student[0].split == 'test' and self.train and all(map(self._resample, runs))

        def maps(of: list[Run]) -> np.ndarray:
            if images:
                return np.stack([self.maps[run.key] for run in of], 1)  # type: ignore[misc]
            return np.array([100 * lines.runs[run.key]['metrics']['mAP'] for run in of])

        of_teacher = maps([teacher])[..., 0] if teacher else None
        found = bootstrap(maps(student), maps(reference), of_teacher)
        if images and found:
            share = None if found.share is None else round(found.share, 4)
            found = Bootstrap(round(found.low, 4), round(found.high, 4), share)
            line = {'kind': 'interval', 'key': key, 'of': [student[0].label, reference[0].label]}
            append_result(self.context.results, {**line, **asdict(found)})
        return found, images

    def _resample(self, run: Run) -> bool:
        """Computes a run's mAP on resampled images, if its detections are there."""
        if run.key not in self.maps:
            path = self.context.directory(run) / run.tested_in / 'detections.pth'
            expected = read_results(self.context.results).runs[run.key]['metrics']['mAP']
            said = f'resampling the test images of {run.name}'
            try:
                self.maps[run.key] = resampled_maps(run, path, expected)
            except (OSError, ValueError, CheckpointError) as error:
                self.maps[run.key] = None
                said += f': not possible, {error}'
            print(said, file=self.stream, flush=True)
        return self.maps[run.key] is not None

    def power(self, margin: float) -> str:
        """How many seeds a margin needs, by student, from the last stage that can tell."""
        said = []
        for student in self.study.students:
            found: Any = None
            for summary in self.summaries:
                pooled = summary.pooled(student)
                found = (summary.stage.name, pooled) if pooled else found
            if found is None:
                said.append(
                    f'{student or self.study.name}: no stage has two arms with two seeds yet, so '
                    'the variance is unknown'
                )
                continue
            name, pooled = found
            narrow, powerful = seeds_needed(pooled.sd, margin)
            said.append(
                f'{student + ": " if student else ""}the difference of two arms has a standard '
                f'deviation of {pooled.sd:.2f} mAP from seed to seed (stage {name}, {pooled.arms} '
                f'arms, {pooled.seeds} seeds, {pooled.dof} degrees of freedom). A 95 % interval of '
                f'± {margin:g} takes {narrow} seeds; to find a true difference of {margin:g} in 4 '
                f'of 5 studies takes {powerful}'
            )
        return '\n'.join(said)


def _stale(stage: Stage, planned: dict[str, Run], known: dict[str, dict]) -> list[str]:
    """A note on results of what is planned that were made before a config or a file changed."""
    same = {(run.config, run.role, run.split, *run.options) for run in planned.values()}
    old = [
        line['label']
        for key, line in known.items()
        if key not in planned
        and (line['config'], line['role'], line['split'], *line['cfg_options']) in same
    ]
    if not old:
        return []
    read = '; the test split has been read for them' if stage.split == 'test' else ''
    return [
        f'{len(old)} stale result(s) of stage {stage.name} ignored: config, teacher or start have '
        f'changed since ({old[0]}{", ..." if len(old) > 1 else ""}){read}'
    ]


_ALWAYS = ('arms', 'values', 'kept', 'dropped')
_DECIDED = (*_ALWAYS, 'seeds', 'runs', 'contrasts', 'claim')
"""The parts of a decision."""


def _told(decision: dict, parts: Sequence[str], other: dict) -> str:
    """What a decision says in those parts in which another differs."""
    said = [f'{p} {decision.get(p)}' for p in parts if p != 'runs']
    if not said:
        runs = other.get('runs', {})
        arms = [name for name, keys in decision.get('runs', {}).items() if runs.get(name) != keys]
        said = [f'{", ".join(arms)} with other configs or options']
    return ', '.join(said)
