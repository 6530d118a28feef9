"""Plans the runs of a comparison, and gives them keys: runs with the same key are the same run."""

from __future__ import annotations

import copy
import hashlib
import json
import os.path
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from mmengine.config import Config

from ... import recipe
from ...datasets.annotations import AnnotationError, check_annotations, check_evaluator, leaves
from ...datasets.teacher_labels import find_images
from ...datasets.two_views import apply_resolution, at_teachers_scale
from ...digests import short_sha256
from ...engine.cfg_options import apply_options, parse_options
from ...engine.class_names import apply_classes
from ...engine.config_files import keep_detector, locate_files
from ...options.class_map import ClassMap
from ...options.unlabelled import Unlabelled
from ...recipe import ADD_NOTHING, plain_student, read_config, read_teacher_config

# What a training's result depends on; not logging, drawing, folders and the launcher.
_TRAIN_KEYS = [
    'model',
    'train_dataloader',
    'val_dataloader',
    'train_cfg',
    'val_cfg',
    'auto_scale_lr',
    'optim_wrapper',
    'param_scheduler',
    'val_evaluator',
    'custom_hooks',
    'data_preprocessor',
    'load_from',
    'randomness',
    'default_scope',
]
_IDLE_HOOKS = ('logger', 'visualization', 'checkpoint', 'timer')
WITHOUT_A_TEST_SET = (
    'without a test set, measure on the validation data: --split val, or split="val" in a study'
)


@dataclass
class Run:
    """One training (a teacher: none) and its test.

    ``train_key`` identifies the training, ``key`` the training with its test settings.
    """

    label: str
    role: str
    seed: int | None
    config: str
    options: list[str]
    test_cfg: Config
    split: str
    train_key: str
    key: str
    checkpoint: str | None = None
    max_epochs: int | None = None
    max_iters: int | None = None
    other_test: bool = False
    """Whether it is tested on other data than its config has."""
    annotations: set[str] = field(default_factory=set)
    """Annotation files of the training data and the tested data, and those of the evaluators."""

    @property
    def name(self) -> str:
        return self.label if self.seed is None else f'{self.label}, seed {self.seed}'

    @property
    def cost(self) -> float:
        """About how long it takes, in epochs of training, taken as 500 iterations."""
        epochs = self.max_epochs or (self.max_iters / 500 if self.max_iters else 12)
        return 0.5 if self.role == 'teacher' else float(epochs)

    @property
    def tested_in(self) -> str:
        """The folder of its test inside that of its training, which has one for each test set."""
        return f'{self.split}-{self.key[:8]}' if self.other_test else self.split

    @property
    def slug(self) -> str:
        slug = re.sub(r'[^\w.-]+', '-', self.label).strip('-')
        return slug if self.seed is None else f'{slug}-s{self.seed}'


@dataclass
class Row:
    """One line of the table: the runs of one network over the seeds."""

    label: str
    role: str
    runs: list[Run]
    baseline_of: list[str] = field(default_factory=list)


@dataclass
class Comparison:
    """A distilled row, its own baseline and its teacher; further references, with what differs."""

    distilled: Row
    baseline: Row
    teacher: Row | None
    others: list[tuple[Row, str]] = field(default_factory=list)


@dataclass
class Plan:
    rows: list[Row]
    comparisons: list[Comparison]
    plain: list[Row]
    seeds: list[int]
    split: str
    notes: list[str]
    annotations: set[str] = field(default_factory=set)
    """Annotation files of the training data and the tested data, and those of the evaluators."""

    @property
    def runs(self) -> list[Run]:
        """All runs: teachers first, then seed by seed, so that pairs are complete early."""
        runs = [run for row in self.rows for run in row.runs]
        return sorted(runs, key=lambda run: -1 if run.seed is None else self.seeds.index(run.seed))


def plan_runs(
    configs: Sequence[str],
    seeds: Sequence[int],
    plain: Sequence[str] = (),
    options: Sequence[str] = (),
    split: str = 'test',
    processes: int = 1,
    against: Sequence[str] = (),
) -> Plan:
    """Plans the runs. Configs that resolve to the same training and test share one run.

    Args:
        configs: paths of distilled configs.
        plain: paths of further reference configs; options that address the distillation or the
            teacher do not reach them.
        options: ``key=value`` strings as for ``--cfg-options``, merged into every config.
        split: 'test' or 'val': the dataloader and evaluator that give the numbers.
        processes: how many train one run; the total batch grows with them, so keys differ.
        against: those of ``configs`` that the others are compared with.

    Raises:
        ValueError: for seeds given twice, a config with no term on, a plain one with a term on, or
            a split that cannot be evaluated.
    """
    seeds = list(seeds)
    if not seeds or len(set(seeds)) != len(seeds):
        raise ValueError(f'--seeds must be different numbers, one or more, not {seeds}')
    for path in {p for p in (*configs, *plain) if [*configs, *plain].count(p) > 1}:
        raise ValueError(f'{path} is given twice')
    for path in against:
        if path not in configs:
            raise ValueError(f'--against {path}: it is not among the distilled configs')
    labels = _labels([*configs, *plain])
    plan = Plan([], [], [], seeds, split, [])
    by_key: dict[str, Row] = {}

    def row_of(label: str, role: str, path: str, opts: list[str]) -> Row:
        runs = [student_run(label, role, path, opts, seed, split, processes) for seed in seeds]
        plan.annotations.update(*(run.annotations for run in runs))
        known = by_key.get(runs[0].key)
        if known is None:
            known = by_key[runs[0].key] = Row(label, role, runs)
            plan.rows.append(known)
        elif role == 'plain':
            plan.notes.append(f'{label} and {known.label} are the same run: listed once')
        return known

    without = [o for o in options if not o.startswith(('model.distillation.', 'model.teacher_'))]
    for path in plain:
        on = terms_on(config_with_options(path, without).model)
        if on:
            raise ValueError(
                f'--plain {path} distils ({", ".join(on)}): name it among the distilled configs'
            )
        row = row_of(labels[path], 'plain', path, without)
        if row not in plan.plain:
            plan.plain.append(row)
    for path in configs:
        cfg = config_with_options(path, options)
        on = terms_on(cfg.model)
        if not on:
            raise ValueError(
                f'{path} has no distillation term on, so there is nothing to compare with its '
                'baseline: give it to --plain, or turn a term on'
            )
        teacher = _teacher_row(cfg, path, labels[path], split, by_key, plan)
        off = [*options, *(f'model.distillation.{t}.loss_weight=0' for t in _terms(cfg.model))]
        # Which images there are is not to the credit of the terms, nor boxes of the teacher.
        alone, boxes = _unlabelled_options(cfg.model)
        if alone:
            baseline = row_of(f'{labels[path]}, labelled images', 'baseline', path, [*off, *alone])
        else:
            baseline = row_of(f'{labels[path]}, terms off', 'baseline', path, [*off, *boxes])
        baseline.baseline_of.append(labels[path])
        distilled = row_of(labels[path], 'distilled', path, list(options))
        if distilled.label != labels[path]:
            raise ValueError(f'{path} and the config of {distilled.label} are the same run')
        comparison = Comparison(distilled, baseline, teacher)
        if alone:
            if not (cfg.get('train_cfg') or {}).get('max_iters'):
                plan.notes.append(
                    f'{labels[path]} counts epochs, and an epoch is one pass over the labelled '
                    f'images: {baseline.label} has more of them in a batch, so it is trained for '
                    'fewer iterations. IterBasedTrainLoop (train_cfg) gives both as many'
                )
            hard = row_of(f"{labels[path]}, teacher's boxes", 'baseline', path, [*off, *boxes])
            comparison.others.append((hard, 'hard pseudo-labels, terms off'))
        plan.comparisons.append(comparison)
    for comparison in plan.comparisons:
        for path in against:
            (row,) = [c.distilled for c in plan.comparisons if c.distilled.label == labels[path]]
            if row is not comparison.distilled:
                comparison.others.append((row, 'distilled too'))
    order = {'teacher': 0, 'plain': 1, 'baseline': 2, 'distilled': 3}
    plan.rows.sort(key=lambda row: order[row.role])
    return plan


def require_test_data(runs: Sequence[Run]) -> None:
    """Check the annotation files of the tests, before hours of training for them.

    Raises:
        AnnotationError: naming the file, the entry and its value.
    """
    checked = []
    for run in runs:
        loader, evaluator = run.test_cfg.test_dataloader, run.test_cfg.test_evaluator
        if (loader, evaluator) in checked:
            continue
        checked.append((loader, evaluator))
        try:
            check_annotations(loader, run.split)
            check_evaluator(evaluator, loader, run.split)
        except AnnotationError as error:
            raise AnnotationError(
                f'{run.config}: {error}'
                + (f'; {WITHOUT_A_TEST_SET}' if run.split == 'test' else '')
            ) from None


def student_run(
    label: str,
    role: str,
    path: str,
    options: Sequence[str],
    seed: int,
    split: str = 'test',
    processes: int = 1,
) -> Run:
    """A training of a config with ``--cfg-options`` strings and a seed, and its test.

    Raises:
        ValueError: if an option does not fit, or the split cannot be evaluated.
    """
    seeded = [*options, f'randomness.seed={seed}']
    cfg = apply_resolution(config_with_options(path, seeded))
    train_key = _train_key(cfg, processes)
    test_cfg = _test_config(cfg, cfg.model, split, path)
    key = _digest([train_key, split, _test_settings(test_cfg)])
    return Run(
        label, role, seed, path, seeded, test_cfg, split, train_key, key,
        max_epochs=(cfg.get('train_cfg') or {}).get('max_epochs'),
        max_iters=(cfg.get('train_cfg') or {}).get('max_iters'),
        other_test=_tests_other_data(cfg, path, split),
        annotations=_annotations(cfg, test_cfg),
    )  # fmt: skip


def _unlabelled_options(model: dict) -> tuple[list[str], list[str]]:
    """Options that leave unlabelled images out, none where there are no others, and options that
    let the student learn the teacher's boxes."""
    key = 'model.distillation.unlabelled'
    settings = Unlabelled.of((model.get('distillation') or {}).get('unlabelled'))
    if settings is None:
        return [], []
    boxes = [f'{key}.hard_weight=1'] if settings.hard_weight == 0 else []
    return ([] if settings.share == 1 else [f'{key}=None']), boxes


def _teacher_labels(cfg: Config) -> list[int | None] | None:
    """The teacher's class for each class of the student, where the lists differ, else None."""
    classes = (apply_classes(cfg).model.get('distillation') or {}).get('classes')
    if not classes or 'teacher' not in classes:
        return None
    known = ClassMap(**classes)
    return None if known.same else known.indices


def config_with_options(path: str, options: Sequence[str] = ()) -> Config:
    """Reads a config and merges ``--cfg-options`` strings into it as the tools do.

    Raises:
        ValueError: if an option is malformed, has no effect or does not fit.
    """
    cfg = locate_files(copy.deepcopy(_cached(path)))
    if options:
        apply_options(cfg, parse_options(options), path)
        locate_files(cfg, from_shell=True)
    return keep_detector(cfg)


# A config with bases in MMDetection takes about a second, and every seed reads the same one.
@lru_cache(maxsize=64)
def _cached(path: str) -> Config:
    if '::' not in path and not os.path.isfile(path):
        raise FileNotFoundError(f'config {path}: there is no such file')
    return read_config(path)


@lru_cache(maxsize=64)
def _cached_teacher(path: str) -> Config:
    return read_teacher_config(path)


def _teacher_config(config: str | dict) -> Config:
    if isinstance(config, dict):
        return read_teacher_config(config)
    return copy.deepcopy(_cached_teacher(config))


def _terms(model: dict) -> list[str]:
    return recipe.terms(model.get('distillation') or {})


def terms_on(model: dict) -> list[str]:
    """Names of the terms of a model that are on."""
    return recipe.terms_on(model.get('distillation') or {})


def _labels(paths: Sequence[str]) -> dict[str, str]:
    """Shortest endings of the paths, without suffix, that tell the files apart."""
    labels = {}
    for path in paths:
        parts = Path(path).with_suffix('').parts
        others = [Path(other).with_suffix('').parts for other in paths if other != path]
        depth = 1
        while depth < len(parts) and any(o[-depth:] == parts[-depth:] for o in others):
            depth += 1
        labels[path] = '/'.join(parts[-depth:])
    return labels


def _teacher_row(
    cfg: Config, path: str, student: str, split: str, by_key: dict, plan: Plan
) -> Row | None:
    run = teacher_run(cfg, path, split)
    if run is None:
        plan.notes.append(
            f'{path}: teacher_ckpt is {cfg.model.get("teacher_ckpt")!r}, so no teacher is tested '
            'and the gap share is unknown'
        )
        return None
    if run.key not in by_key:
        if any(row.label == run.label for row in plan.rows):
            # Other weights or another test, such as on the classes of this student.
            run.label += f' of {student}'
        by_key[run.key] = Row(run.label, 'teacher', [run])
        plan.rows.append(by_key[run.key])
    return by_key[run.key]


def teacher_run(cfg: Config, path: str, split: str) -> Run | None:
    """The test of a config's teacher on the student's data; None where it names no checkpoint."""
    model = cfg.model
    checkpoint = model.get('teacher_ckpt')
    if checkpoint is None or checkpoint == 'random':
        return None
    teacher_config = model['teacher_config']
    teacher = _teacher_config(teacher_config)
    test_cfg = _test_config(at_teachers_scale(cfg), teacher.model, split, path)
    test_cfg.custom_imports = _imports_of_both(cfg, teacher)
    identity = _teacher_identity(model)
    settings = _test_settings(test_cfg)
    if labels := _teacher_labels(cfg):
        test_cfg.test_cfg = dict(type='mmkd.RelabelledTestLoop', labels=labels)
        settings.append(labels)
    key = _digest([identity, split, settings])
    stem = 'as a dict' if isinstance(teacher_config, dict) else Path(str(teacher_config)).stem
    label = 'teacher' if stem == 'teacher' else f'teacher ({stem})'
    return Run(
        label, 'teacher', None, path, [], test_cfg, split, identity, key, checkpoint=checkpoint,
        other_test=_tests_other_data(cfg, path, split),
    )  # fmt: skip


def _tests_other_data(cfg: Config, path: str, split: str) -> bool:
    """Whether options have given a config other data to be tested on than its own."""
    own = config_with_options(path)
    keys = (f'{split}_dataloader', f'{split}_evaluator')
    return any(own.get(key) != cfg.get(key) for key in keys)


def _imports_of_both(student: Config, teacher: Config) -> dict | None:
    """The modules that a test needs of a network from one config and data from the other."""
    given = [cfg.get('custom_imports') or {} for cfg in (student, teacher)]
    names = [each.get('imports') or [] for each in given]
    both = [m for part in names for m in ([part] if isinstance(part, str) else part)]
    if not both:
        return None
    allowed = all(each.get('allow_failed_imports') for each in given if each)
    return dict(imports=list(dict.fromkeys(both)), allow_failed_imports=allowed)


def _test_config(cfg: Config, model: dict, split: str, path: str) -> Config:
    """The student's test settings with another network: its plain self, or the teacher."""
    test = copy.deepcopy(cfg)
    if split == 'val':
        for part in ('dataloader', 'evaluator'):
            test[f'test_{part}'] = copy.deepcopy(cfg.get(f'val_{part}'))
        test.test_cfg = {'type': 'TestLoop'}
    if not test.get('test_dataloader') or not test.get('test_evaluator'):
        raise ValueError(
            f'{path} has no {split}_dataloader and {split}_evaluator: name the other --split'
        )
    evaluators = test.test_evaluator
    for evaluator in [evaluators] if isinstance(evaluators, dict) else evaluators:
        if evaluator.get('format_only'):
            raise ValueError(
                f'{path}: the {split}_evaluator only formats results (format_only), so it gives no '
                'mAP: use --split val'
            )
    test.model = plain_student(model)
    # A test uses no hooks of the training: an EMA hook has saved its averages as the weights.
    for key in ('custom_hooks', 'load_from', 'train_dataloader', 'val_dataloader', 'train_cfg',
                'val_cfg', 'val_evaluator', 'optim_wrapper', 'param_scheduler'):  # fmt: skip
        test.pop(key, None)
    test.resume = False
    test.visualizer = {
        'type': 'DetLocalVisualizer',
        'vis_backends': [{'type': 'LocalVisBackend'}],
        'name': 'visualizer',
    }
    return test


def _test_settings(cfg: Config) -> list:
    speed = ('batch_size', 'num_workers', 'persistent_workers', 'pin_memory', 'prefetch_factor')
    loader = {k: v for k, v in cfg.test_dataloader.items() if k not in speed}
    return [loader, cfg.test_evaluator]


def _annotations(cfg: Config, test_cfg: Config) -> set[str]:
    """Annotation files of the training data, the tested data and the evaluators, and folders of
    unlabelled images."""
    found = files_of(test_cfg.test_dataloader.dataset) | _evaluated_files(test_cfg)
    images = (cfg.model.get('distillation') or {}).get('unlabelled') or {}
    for loader in (cfg.get('train_dataloader'), images):
        found |= files_of((loader or {}).get('dataset'))
    found.add(os.path.expanduser(images.get('ann_file') or ''))
    settings = Unlabelled.of(images or None)
    folders = [os.path.expanduser(path) for path in (settings and settings.folders) or []]
    return {path for path in found if os.path.isfile(path)} | set(filter(os.path.isdir, folders))


def judged_files(test_cfg: Config) -> set[str]:
    """Annotation files of the tested images; none of data that is a part of its file's."""
    dataset = test_cfg.test_dataloader.dataset
    if any(data.get('indices') is not None for data in leaves(dataset)):
        return set()
    return files_of(dataset) or _evaluated_files(test_cfg)


def files_of(dataset: Any) -> set[str]:
    """The annotation files of a data set's config."""
    return {
        os.path.join(data.get('data_root') or '', data['ann_file'])
        for data in leaves(dataset)
        if data.get('ann_file')
    }


def _evaluated_files(test_cfg: Config) -> set[str]:
    metrics = test_cfg.test_evaluator
    metrics = [metrics] if isinstance(metrics, dict) else metrics
    return {metric['ann_file'] for metric in metrics if metric.get('ann_file')}


def _train_key(cfg: Config, processes: int) -> str:
    """Hash of everything that the result of a training depends on.

    With every term off only the start remains of the distillation, so baselines of different
    recipes with the same start share a key; without a start it is the plain student's.
    """
    model = copy.deepcopy(cfg.model)
    if 'distillation' in model:
        identity = _teacher_identity(model)
        for key in ('teacher_config', 'teacher_ckpt', 'teacher_sha256', 'eval_teacher'):
            model.pop(key, None)
        if not terms_on(model) and not model.get('distillation', {}).get('unlabelled'):
            start = model.pop('distillation').get('start')
            model = plain_student(dict(model, distillation={}))
            if start is not None:
                model['start'] = [start, identity]
        else:
            model['teacher'] = identity
    model = _with_file_digests(_canonical(model))
    parts = {key: cfg.get(key) for key in _TRAIN_KEYS}
    parts['model'] = model
    parts['load_from'] = file_digest(cfg.load_from) if cfg.get('load_from') else None
    hooks = cfg.get('default_hooks') or {}
    parts['default_hooks'] = {k: v for k, v in hooks.items() if k not in _IDLE_HOOKS}
    if processes > 1:
        parts['processes'] = processes
    # An empty part and a missing one mean the same training.
    return _digest({k: v for k, v in parts.items() if v})


def arch_key(run: Run) -> str:
    """Hash of everything that a network's size and speed depend on; all seeds share it."""
    dataset = run.test_cfg.test_dataloader
    return _digest(['arch', _canonical(_inference_config(run.test_cfg.model)), dataset])


def _teacher_identity(model: dict) -> str:
    """Hash of the teacher: its network and the bytes of its checkpoint."""
    checkpoint = model.get('teacher_ckpt')
    network = plain_student(_teacher_config(model['teacher_config']).model)
    return _digest(
        [_canonical(_inference_config(network)), file_digest(checkpoint) if checkpoint else None]
    )


def _canonical(model: dict) -> dict:
    plain = model.get('type') in ADD_NOTHING
    return {**model, 'type': 'TwoStageDetector'} if plain else dict(model)


def _with_file_digests(model: Any) -> Any:
    """A network's config with the digest of each file that it is initialised from."""
    if isinstance(model, dict):
        filled = {k: _with_file_digests(v) for k, v in model.items()}
        if filled.get('type') == 'Pretrained' and 'checkpoint' in filled:
            filled['checkpoint'] = file_digest(filled['checkpoint'])
        return filled
    return [_with_file_digests(v) for v in model] if isinstance(model, (list, tuple)) else model


def _inference_config(model: Any) -> Any:
    """A network's config without the keys that only training or initialisation reads."""
    if isinstance(model, dict):
        skip = ('init_cfg', 'pretrained', 'train_cfg')
        return {k: _inference_config(v) for k, v in model.items() if k not in skip}
    return [_inference_config(v) for v in model] if isinstance(model, (list, tuple)) else model


@lru_cache(maxsize=64)
def file_digest(path: str) -> str:
    """SHA-256 of a file: a teacher trained again under the old name is another teacher.

    That of a folder of images is of their names and sizes. A URL, which would have to be
    downloaded, is returned as it is.
    """
    digest = hashlib.sha256()
    if Path(path).is_dir():
        images = find_images(path)
        for name, image in zip(images.names, images.paths, strict=True):
            digest.update(json.dumps([name, os.path.getsize(image)]).encode())
        return digest.hexdigest()
    if not Path(path).is_file():
        return str(path)
    with open(path, 'rb') as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _digest(value: Any) -> str:
    """Hash of a config value, the same in every folder that the repository is checked out to."""
    if isinstance(value, Config):
        value = value.to_dict()
    text = json.dumps(value, sort_keys=True, default=str).replace(str(Path.cwd()), '.')
    return short_sha256(text)
