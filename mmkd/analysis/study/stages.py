"""From stage to stage: who enters, which runs that takes, and who goes on."""

from __future__ import annotations

import itertools
import math
from collections.abc import Container
from dataclasses import dataclass, field

from ...recipe import read_recipe
from ...registry import build_terms
from ..comparison.plan import (
    Plan,
    Row,
    Run,
    config_with_options,
    judged_files,
    require_test_data,
    student_run,
    teacher_run,
    terms_on,
)
from .declaration import RESERVED, Stage, Study, Variant


@dataclass
class Standing:
    """What the stages so far have decided: each arm's variant, and who is left, the best first."""

    chosen: dict[str, Variant] = field(default_factory=dict)
    left: list[str] | None = None


@dataclass
class Entry:
    """One line of a stage: a variant with one student, its runs and its teacher's test."""

    variant: Variant
    student: str
    row: Row
    teacher: Run | None


def entrants(study: Study, stage: Stage, standing: Standing) -> list[Variant]:
    """The variants of a stage, in declared order: the reference, and who is listed or left."""
    left = list(study.arms) if standing.left is None else standing.left
    groups = {'winners': left, 'winner': left[:1]}
    names = {study.reference}
    for name in left if stage.arms is None else stage.arms:
        names.update(groups.get(name, [name]))
    return [
        variant
        for arm, variants in study.arms.items()
        if arm in names
        for variant in ([standing.chosen[arm]] if arm in standing.chosen else variants)
    ]


def plan_stage(stage: Stage, variants: list[Variant], processes: int) -> tuple[Plan, list[Entry]]:
    """The runs of a stage, with the keys of a comparison: what has been run is not run again.

    Raises:
        ValueError: if a config or an option does not fit.
        FileNotFoundError: if a config is not there.
    """
    plan = Plan([], [], [], stage.seeds, stage.split, [])
    teachers: dict[str, Run] = {}
    entries = []
    for student in stage.students:
        for variant in variants:
            runs = [variant_run(variant, stage, student, s, processes) for s in stage.seeds]
            plan.annotations.update(*(run.annotations for run in runs))
            row = Row(runs[0].label, runs[0].role, runs)
            plan.rows.append(row)
            teacher = _teacher(variant, stage, student, runs[0], teachers)
            entries.append(Entry(variant, student, row, teacher))
    plan.rows += [Row(run.label, 'teacher', [run]) for run in teachers.values()]
    return plan, entries


def variant_run(variant: Variant, stage: Stage, student: str, seed: int, processes: int) -> Run:
    """The run of a variant: that which ``mmkd compare`` makes of the same config and options."""
    path = variant.config.replace('{student}', student)
    options = [*variant.options, *stage.options]
    label = f'{student}: {variant.label}' if student else variant.label
    try:
        cfg = config_with_options(path, options)
        build_terms(read_recipe(cfg.model.get('distillation') or {}).terms)
    except (TypeError, ValueError) as error:
        raise ValueError(f'{label}, stage {stage.name!r}: {error}') from None
    if 'distillation' in cfg.model and 'teacher_config' not in cfg.model:
        raise ValueError(
            f'{label}, stage {stage.name!r}: {path} names no teacher, and an option sets '
            'model.distillation: take a config that does (with every term off it is plain)'
        )
    role = 'distilled' if terms_on(cfg.model) else 'plain'
    return student_run(label, role, path, options, seed, stage.split, processes)


def _teacher(
    variant: Variant, stage: Stage, student: str, run: Run, known: dict[str, Run]
) -> Run | None:
    """The test of a variant's teacher, planned once for all that share it."""
    cfg = config_with_options(run.config, [*variant.options, *stage.options])
    model = cfg.model
    recipe = model.get('distillation') or {}
    names = [model.get('teacher_config'), model.get('teacher_ckpt')]
    same = [student, *names, recipe.get('resolution'), recipe.get('classes')]
    key = repr([*same, run.test_cfg.test_dataloader, run.test_cfg.test_evaluator])
    if key not in known:
        found = teacher_run(cfg, run.config, stage.split)
        if found is None:
            return None
        taken = {each.label for each in known.values()}
        found.label = f'{student}: {found.label}' if student else found.label
        if found.label in taken and found.key not in {each.key for each in known.values()}:
            found.label += f' of {variant.label}'
        known[key] = found
    return known[key]


def check(study: Study, processes: int, done: Container[str] = ()) -> dict[str, float]:
    """Plans each variant once, so that what cannot be run is refused before the first run.

    Args:
        done: keys of the runs that have a result, and need no data any more.

    Returns:
        The cost of a run in each stage, see :attr:`.plan.Run.cost`.

    Raises:
        ValueError: if a config or an option does not fit, a searched key changes nothing, or a
            stage cannot be tested on its data.
        FileNotFoundError: if a config is not there.
    """
    costs: dict[str, float] = {}
    planned: set[tuple] = set()
    todo: list[Run] = []
    tested: dict[tuple[str, str], dict[str, str]] = {}
    for stage in study.stages:
        named = set(study.arms if stage.arms is None or set(stage.arms) & set(RESERVED) else ())
        entering = sorted({study.reference, *named, *(set(stage.arms or ()) & set(study.arms))})
        found: list[float] = []
        # Arms dropped before a stage that has run no longer need its data.
        first = variant_run(
            study.arms[study.reference][0], stage, stage.students[0], stage.seeds[0], processes
        )
        chosen = any(other.keep is not None for other in study.stages[: study.stages.index(stage)])
        over = chosen and first.key in done
        for arm, student in itertools.product(entering, stage.students):
            keys: dict[str, str] = {}
            # Values are tried once, other options on one of them.
            known, asked = (arm, student) in planned, (arm, student, stage.split, *stage.options)
            if asked in planned:
                continue
            for variant in study.arms[arm][: 1 if known else None]:
                run = variant_run(variant, stage, student, stage.seeds[0], processes)
                found.append(run.cost)
                needless = run.key in done or (over and arm not in (stage.arms or ()))
                todo += [] if needless else [run]
                files = tested.setdefault((student, stage.split), {})
                files.update(dict.fromkeys(judged_files(run.test_cfg), stage.name))
                other = keys.setdefault(run.train_key, variant.label)
                if other != variant.label:
                    raise ValueError(
                        f'{other} and {variant.label} are the same training in stage '
                        f"{stage.name!r}: nothing reads the key, or the stage's options set it"
                    )
            planned |= {(arm, student), asked}
        # One that was planned before has its options.
        costs[stage.name] = sum(found) / len(found) if found else first.cost
    searches = any(len(variants) > 1 for variants in study.arms.values())
    if searches or any(stage.keep is not None for stage in study.stages):
        _require_two_splits(tested)
    require_test_data(todo)
    return costs


def _require_two_splits(tested: dict[tuple[str, str], dict[str, str]]) -> None:
    """Refuses to judge on the images that have chosen: many configs have one split for both."""
    for (student, split), files in tested.items():
        same = files.keys() & tested.get((student, 'val'), {}).keys() if split == 'test' else ()
        for file in sorted(same):
            raise ValueError(
                f'stage {files[file]!r} is to judge on {file}, on which stage '
                f'{tested[student, "val"][file]!r} selects: name a test set of its own '
                '(test_dataloader.dataset.ann_file, test_evaluator.ann_file), or hold images of '
                'the training set out for val_dataloader and val_evaluator'
            )


def later_cost(study: Study, number: int, candidates: int, costs: dict[str, float]) -> float:
    """The cost of all runs after stage ``number``, which so many candidates enter."""
    total = 0.0
    for before, stage in zip(study.stages[number:], study.stages[number + 1 :], strict=False):
        candidates = before.places(candidates) if before.keep is not None else candidates
        groups = {'winners': candidates, 'winner': 1}
        listed = {study.reference, *(['winners'] if stage.arms is None else stage.arms)}
        arms = sum(groups.get(name, 1) for name in listed)
        total += arms * len(stage.students) * len(stage.seeds) * costs[stage.name]
    return total


def decide(
    study: Study, stage: Stage, entries: list[Entry], scores: dict[str, float], standing: Standing
) -> tuple[dict | None, Standing]:
    """Chooses each arm's value, and who goes on, by the mean mAP over students and seeds.

    Ties go to what is declared first. The reference goes on without a place of its own.

    Args:
        scores: of each row by its label, in points; minus infinity where a run has diverged.

    Returns:
        The decision as a line of the results, None where there was nothing to decide; and who is
        left.
    """
    by_variant: dict[Variant, list[float]] = {}
    for entry in entries:
        by_variant.setdefault(entry.variant, []).append(scores[entry.row.label])
    means = {variant: sum(values) / len(values) for variant, values in by_variant.items()}
    best: dict[str, Variant] = {}
    for variant, mean in means.items():
        if variant.arm not in best or mean > means[best[variant.arm]]:
            best[variant.arm] = variant
    if stage.split == 'test' or (stage.keep is None and len(best) == len(means)):
        return None, standing
    ranked = sorted(best, key=lambda arm: -means[best[arm]])
    ranked = [arm for arm in ranked if arm != study.reference]
    places = stage.places(len(ranked))
    kept = [arm for arm in ranked[:places] if means[best[arm]] > -math.inf]
    line = {
        'kind': 'decision',
        'key': stage.name,
        'mAP': {v.label: round(m, 4) if m > -math.inf else None for v, m in means.items()},
        'values': {
            arm: list(v.values) for arm, v in best.items() if sum(o.arm == arm for o in means) > 1
        },
    }
    if stage.keep is not None:
        line |= {'kept': kept, 'dropped': [arm for arm in ranked if arm not in kept]}
    left = standing.left if stage.keep is None else kept
    return line, Standing({**standing.chosen, **best}, left)
