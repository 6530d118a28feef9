"""The comparison: a distilled student against the user's own baseline, over seeds, with a verdict.

The baseline of a distilled config is the same config with every distillation weight 0: same start,
same data, schedule and seed. What a start gives is thereby never credited to the terms.

Four parts, in this order: statistics, planning (which runs, under which keys), running (training,
testing and measuring, each in a process of its own through ``tools/``), and the table.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import fcntl
import hashlib
import json
import math
import os
import platform
import queue
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol, TextIO

import numpy as np
from mmengine.config import Config, DictAction
from scipy import stats

from .teacher import load_config

ROOT = Path(__file__).resolve().parents[1]
MARGIN = 0.5
"""Smallest gain of interest, in mAP points: see :func:`judge`."""
LEVEL = 0.95

# ------------------------------------------------------------------------------- statistics


@dataclass(frozen=True)
class Verdict:
    """One distilled config against one reference. ``mean``, ``low`` and ``high`` in mAP points."""

    word: str
    mean: float
    low: float | None
    high: float | None
    n: int
    why: str


def paired_interval(differences: Sequence[float], level: float = LEVEL) -> tuple[float, float]:
    """Student's t interval of the mean of paired differences, with n - 1 degrees of freedom.

    Raises:
        ValueError: if there are fewer than two, or one is not finite.
    """
    values = _finite(differences)
    if len(values) < 2:
        raise ValueError(f'an interval needs two differences or more, not {len(values)}')
    n = len(values)
    half = stats.t.ppf((1 + level) / 2, n - 1) * values.std(ddof=1) / math.sqrt(n)
    return float(values.mean() - half), float(values.mean() + half)


def judge(differences: Sequence[float], margin: float = MARGIN) -> Verdict:
    """The word for paired differences (distilled - reference, mAP points, one per seed).

    INCONCLUSIVE below three seeds, whatever they show. From three on: BEATS if the 95 % interval
    lies above 0, WORSE if it lies below, NO GAIN if it contains 0 and ends below ``margin``, the
    smallest gain of interest, else INCONCLUSIVE. Differences that are not 0 and equal each other
    exactly are no sample: the seed then has no effect on the runs, and n is 1 in truth.

    Raises:
        ValueError: if there is no difference, or one is not finite, or the margin is not positive.
    """
    values = _finite(differences)
    n = len(values)
    if n == 0:
        raise ValueError('no seed has both runs finished: there is nothing to judge')
    if not margin > 0:
        raise ValueError(f'the smallest gain of interest (--margin) must be above 0, not {margin}')
    mean = float(values.mean())
    if n == 1:
        return Verdict('INCONCLUSIVE', mean, None, None, n, 'one seed proves nothing')
    low, high = paired_interval(values.tolist())
    if n < 3:
        return Verdict('INCONCLUSIVE', mean, low, high, n, f'{n} seeds are too few, 3 are needed')
    if np.ptp(values) == 0 and mean != 0:
        why = f'all {n} differences are exactly equal: does the seed reach the runs?'
        return Verdict('INCONCLUSIVE', mean, low, high, n, why)
    if low > 0:
        return Verdict('BEATS', mean, low, high, n, 'the interval lies above 0')
    if high < 0:
        return Verdict('WORSE', mean, low, high, n, 'the interval lies below 0')
    if high < margin:
        why = f'the interval contains 0 and ends below {margin:g}'
        return Verdict('NO GAIN', mean, low, high, n, why)
    why = f'the interval contains 0 and reaches {margin:g} or more: more seeds would narrow it'
    return Verdict('INCONCLUSIVE', mean, low, high, n, why)


def gap_share(student: float, reference: float, teacher: float) -> float | None:
    """(student - reference) / (teacher - reference); None where the teacher is not better."""
    return (student - reference) / (teacher - reference) if teacher > reference else None


def _finite(values: Sequence[float]) -> np.ndarray:
    array = np.asarray(values, dtype=np.float64)
    if not np.isfinite(array).all():
        raise ValueError(f'not a finite number among the differences: {list(values)}')
    return array


# ------------------------------------------------------------------------------- planning

# What decides a training's result. Left out: logging, drawing, folders, the launcher.
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
# MMDetection's names for a TwoStageDetector that adds nothing to it.
_TWO_STAGE = ('FasterRCNN', 'CascadeRCNN', 'MaskRCNN')


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

    @property
    def name(self) -> str:
        return self.label if self.seed is None else f'{self.label}, seed {self.seed}'

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
    """A distilled row and what it is measured against."""

    distilled: Row
    baseline: Row
    teacher: Row | None


@dataclass
class Plan:
    rows: list[Row]
    comparisons: list[Comparison]
    plain: list[Row]
    seeds: list[int]
    split: str
    notes: list[str]

    @property
    def runs(self) -> list[Run]:
        """Teachers first, then seed by seed, so that pairs are complete early."""
        runs = [run for row in self.rows for run in row.runs]
        return sorted(runs, key=lambda run: -1 if run.seed is None else self.seeds.index(run.seed))


def plan_runs(
    configs: Sequence[str],
    seeds: Sequence[int],
    plain: Sequence[str] = (),
    options: Sequence[str] = (),
    split: str = 'test',
    processes: int = 1,
) -> Plan:
    """Which runs are needed. Runs whose resolved configs are the same are one run.

    Args:
        configs: paths of distilled configs.
        plain: paths of further reference configs; options that address the distillation or the
            teacher do not reach them.
        options: ``key=value`` strings as for ``--cfg-options``, merged into every config.
        split: 'test' or 'val': whose dataloader and evaluator the numbers come from.
        processes: of one training (its total batch grows with them, so it belongs to the key).

    Raises:
        ValueError: for seeds given twice, a config with no term on, a plain one with a term on, or
            a split that cannot be evaluated.
    """
    seeds = list(seeds)
    if not seeds or len(set(seeds)) != len(seeds):
        raise ValueError(f'--seeds must be different numbers, one or more, not {seeds}')
    for path in {p for p in (*configs, *plain) if [*configs, *plain].count(p) > 1}:
        raise ValueError(f'{path} is given twice')
    labels = _labels([*configs, *plain])
    plan = Plan([], [], [], seeds, split, [])
    by_key: dict[str, Row] = {}

    def row_of(label: str, role: str, path: str, opts: list[str]) -> Row:
        runs = []
        for seed in seeds:
            seeded = [*opts, f'randomness.seed={seed}']
            cfg = read_config(path, seeded)
            train_key = _train_key(cfg, processes)
            test_cfg = _test_config(cfg, cfg.model, split, path)
            key = _digest([train_key, split, _test_settings(test_cfg)])
            epochs = (cfg.get('train_cfg') or {}).get('max_epochs')
            runs.append(
                Run(
                    label, role, seed, path, seeded, test_cfg, split, train_key, key,
                    max_epochs=epochs,
                )
            )  # fmt: skip
        known = by_key.get(runs[0].key)
        if known is None:
            known = by_key[runs[0].key] = Row(label, role, runs)
            plan.rows.append(known)
        elif role == 'plain':
            plan.notes.append(f'{label} and {known.label} are the same run: listed once')
        return known

    without = [o for o in options if not o.startswith(('model.distillation.', 'model.teacher_'))]
    for path in plain:
        on = terms_on(read_config(path, without).model)
        if on:
            raise ValueError(
                f'--plain {path} distils ({", ".join(on)}): name it among the distilled configs'
            )
        row = row_of(labels[path], 'plain', path, without)
        if row not in plan.plain:
            plan.plain.append(row)
    for path in configs:
        cfg = read_config(path, options)
        on = terms_on(cfg.model)
        if not on:
            raise ValueError(
                f'{path} has no distillation term on, so there is nothing to compare with its '
                'baseline: give it to --plain, or turn a term on'
            )
        teacher = _teacher_row(cfg, path, split, by_key, plan)
        off = [f'model.distillation.{term}.loss_weight=0' for term in _terms(cfg.model)]
        baseline = row_of(f'{labels[path]}, terms off', 'baseline', path, [*options, *off])
        baseline.baseline_of.append(labels[path])
        distilled = row_of(labels[path], 'distilled', path, list(options))
        if distilled.label != labels[path]:
            raise ValueError(f'{path} and the config of {distilled.label} are the same run')
        plan.comparisons.append(Comparison(distilled, baseline, teacher))
    order = {'teacher': 0, 'plain': 1, 'baseline': 2, 'distilled': 3}
    plan.rows.sort(key=lambda row: order[row.role])
    return plan


def read_config(path: str, options: Sequence[str] = ()) -> Config:
    """``Config.fromfile`` with ``--cfg-options`` strings merged as the tools merge them."""
    cfg = _load(path)
    if options:
        parser = argparse.ArgumentParser()
        parser.add_argument('--cfg-options', nargs='+', action=DictAction)
        cfg.merge_from_dict(parser.parse_args(['--cfg-options', *options]).cfg_options)
    return cfg


def _load(config: str | dict) -> Config:
    return copy.deepcopy(_load_file(config)) if isinstance(config, str) else load_config(config)


@lru_cache(maxsize=64)
def _load_file(path: str) -> Config:
    # About a second for a config with bases in MMDetection, and every seed reads the same.
    return load_config(path)


def _terms(model: dict) -> list[str]:
    distillation = model.get('distillation') or {}
    return [k for k, v in distillation.items() if isinstance(v, dict) and 'type' in v]


def terms_on(model: dict) -> list[str]:
    """Names of the terms whose weight is not the constant 0. Equation (2) weights a soft term with
    1 - hard_weight where no weight is given."""
    on = []
    for name in _terms(model):
        term = model['distillation'][name]
        default = 1 - term['hard_weight'] if 'hard_weight' in term else 1
        weight = term.get('loss_weight', default)
        if isinstance(weight, dict) or weight is None or weight != 0:
            on.append(name)
    return on


def _labels(paths: Sequence[str]) -> dict[str, str]:
    """The file's stem, or as much of the path as tells the files apart."""
    labels = {}
    for path in paths:
        parts = Path(path).with_suffix('').parts
        others = [Path(other).with_suffix('').parts for other in paths if other != path]
        depth = 1
        while depth < len(parts) and any(o[-depth:] == parts[-depth:] for o in others):
            depth += 1
        labels[path] = '/'.join(parts[-depth:])
    return labels


def _teacher_row(cfg: Config, path: str, split: str, by_key: dict, plan: Plan) -> Row | None:
    model = cfg.model
    checkpoint = model.get('teacher_ckpt')
    if checkpoint is None or checkpoint == 'random':
        plan.notes.append(
            f'{path}: teacher_ckpt is {checkpoint!r}, so no teacher is tested and no share of its '
            'gap can be told'
        )
        return None
    teacher_config = model['teacher_config']
    teacher = _load(teacher_config)
    test_cfg = _test_config(cfg, teacher.model, split, path)
    identity = _teacher_identity(model)
    key = _digest([identity, split, _test_settings(test_cfg)])
    if key not in by_key:
        stem = 'as a dict' if isinstance(teacher_config, dict) else Path(str(teacher_config)).stem
        label = 'teacher' if stem == 'teacher' else f'teacher ({stem})'
        run = Run(
            label, 'teacher', None, path, [], test_cfg, split, identity, key, checkpoint=checkpoint
        )
        by_key[key] = Row(label, 'teacher', [run])
        plan.rows.append(by_key[key])
    return by_key[key]


def plain_network(model: dict) -> dict:
    """The model config of what remains after training: no teacher, no terms."""
    from .teacher import plain_student

    model = copy.deepcopy(model)
    return plain_student(model) if 'distillation' in model else model


def _test_config(cfg: Config, model: dict, split: str, path: str) -> Config:
    """The student's test settings round a plain network (the student's own, or the teacher's)."""
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
    test.model = plain_network(model)
    # Hooks and backends of the training have no part in a test (an EMA hook saves what it
    # averaged as the checkpoint's own weights).
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


def _train_key(cfg: Config, processes: int) -> str:
    """Hash of what decides the result of a training.

    With every term off nothing of the distillation is left but the start, so baselines of
    different recipes are the same run, and without a start they are the plain student.
    """
    model = copy.deepcopy(cfg.model)
    if 'distillation' in model:
        identity = _teacher_identity(model)
        for key in ('teacher_config', 'teacher_ckpt', 'eval_teacher'):
            model.pop(key, None)
        if not terms_on(model):
            start = model.pop('distillation').get('start')
            model = plain_network(dict(model, distillation={}))
            if start is not None:
                model['start'] = [start, identity]
        else:
            model['teacher'] = identity
    model = _with_weights(_canonical(model))
    parts = {key: cfg.get(key) for key in _TRAIN_KEYS}
    parts['model'] = model
    parts['load_from'] = fingerprint(cfg.load_from) if cfg.get('load_from') else None
    hooks = cfg.get('default_hooks') or {}
    parts['default_hooks'] = {k: v for k, v in hooks.items() if k not in _IDLE_HOOKS}
    if processes > 1:
        parts['processes'] = processes
    # Given or not, an empty part is the same training.
    return _digest({k: v for k, v in parts.items() if v})


def _teacher_identity(model: dict) -> str:
    """Hash of the teacher: its network and the bytes of its checkpoint."""
    checkpoint = model.get('teacher_ckpt')
    network = plain_network(_load(model['teacher_config']).model)
    return _digest([_canonical(_bare(network)), fingerprint(checkpoint) if checkpoint else None])


def _canonical(model: dict) -> dict:
    plain = model.get('type') in _TWO_STAGE
    return {**model, 'type': 'TwoStageDetector'} if plain else dict(model)


def _with_weights(model: Any) -> Any:
    """A network's config with the bytes of each file that it is initialised from."""
    if isinstance(model, dict):
        filled = {k: _with_weights(v) for k, v in model.items()}
        if filled.get('type') == 'Pretrained' and 'checkpoint' in filled:
            filled['checkpoint'] = fingerprint(filled['checkpoint'])
        return filled
    return [_with_weights(v) for v in model] if isinstance(model, (list, tuple)) else model


def _bare(model: Any) -> Any:
    """A network's config without what only training or initialisation reads."""
    if isinstance(model, dict):
        skip = ('init_cfg', 'pretrained', 'train_cfg')
        return {k: _bare(v) for k, v in model.items() if k not in skip}
    return [_bare(v) for v in model] if isinstance(model, (list, tuple)) else model


@lru_cache(maxsize=64)
def fingerprint(path: str) -> str:
    """SHA-256 of a file, so that a teacher trained anew under the old name is not mistaken for it;
    of a URL, which cannot be read without fetching it, the name."""
    if not Path(path).is_file():
        return str(path)
    digest = hashlib.sha256()
    with open(path, 'rb') as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _digest(value: Any) -> str:
    """Hash of a config value; checkouts in different folders give the same."""
    if isinstance(value, Config):
        value = value.to_dict()
    text = json.dumps(value, sort_keys=True, default=str).replace(str(Path.cwd()), '.')
    return hashlib.sha256(text.encode()).hexdigest()[:16]


# ------------------------------------------------------------------------------- results


def write_json(path: Path, value: dict) -> None:
    """Atomically: a file that exists is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(
        'w', dir=path.parent, prefix='.', suffix='.part', delete=False
    ) as file:
        json.dump(value, file, indent=1, allow_nan=False)
        file.write('\n')
    os.chmod(file.name, 0o644)
    os.replace(file.name, path)


def load_results(directory: Path, plan: Plan) -> tuple[dict[str, dict], list[str]]:
    """The results of the plan's runs by key, and notes on results that do not count any more."""
    wanted = {run.key for run in plan.runs}
    asked = {(run.config, run.role, run.seed) for run in plan.runs}
    found: dict[str, dict] = {}
    stale = []
    for path in sorted(directory.glob('*.json')):
        result = json.loads(path.read_text())
        if result.get('kind') != 'run' or result.get('split') != plan.split:
            continue
        if result['key'] in wanted:
            found[result['key']] = result
        elif (result['config'], result['role'], result['seed']) in asked:
            stale.append(path.name)
    notes = []
    if stale:
        notes.append(
            f'{len(stale)} stale result(s) ignored: config, options, teacher or start have changed '
            f'since ({", ".join(stale[:3])}{", ..." if len(stale) > 3 else ""})'
        )
    return found, notes


def read_curves(directory: Path, points: int = 60) -> dict:
    """What a training logged, from MMEngine's ``vis_data/scalars.json`` of all its attempts.

    A later attempt overwrites the iterations that it went through again.

    Returns:
        ``{'train': {'iter': [...], 'loss': [...], 'loss_...': [...]}, 'val': {'iter', 'mAP'}}``;
        train values are means over at most ``points`` equal spans, losses not logged are None.
    """
    train: dict[int, dict] = {}
    val: dict[int, float] = {}
    for path in sorted(directory.glob('*/vis_data/scalars.json')):
        now = 0
        for line in path.read_text().splitlines():
            try:
                entry = json.loads(line)
            except ValueError:
                continue  # the line that a kill cut short
            if 'loss' in entry:
                now = int(entry.get('iter', entry['step']))
                train[now] = {k: v for k, v in entry.items() if k.startswith('loss')}
            else:
                with contextlib.suppress(KeyError):
                    val[now] = 100 * find_metrics(entry)[0]
    steps = sorted(train)
    spans = np.array_split(np.arange(len(steps)), max(1, min(points, len(steps))))
    bins = [span for span in spans if len(span)]
    names = sorted({name for entry in train.values() for name in entry})
    curves: dict = {'iter': [int(steps[b[-1]]) for b in bins]}
    for name in names:
        values = [[train[steps[i]].get(name) for i in b] for b in bins]
        finite = [[v for v in vs if v is not None and math.isfinite(v)] for vs in values]
        curves[name] = [float(f'{np.mean(vs):.4g}') if vs else None for vs in finite]
    points_val = sorted(val)
    return {
        'train': curves,
        'val': {'iter': points_val, 'mAP': [round(val[i], 2) for i in points_val]},
    }


def find_metrics(reported: dict[str, float]) -> tuple[float, float | None]:
    """mAP and AP50, as fractions, among what COCO-like and VOC metrics report.

    Raises:
        KeyError: if there is no box mAP.
    """

    def find(*endings: str) -> float | None:
        for ending in endings:
            for key, value in reported.items():
                if key == ending or key.endswith('/' + ending):
                    return float(value)
        return None

    value = find('bbox_mAP', 'bbox_AP', 'mAP')
    if value is None:
        raise KeyError(f'no box mAP among the metrics: {sorted(reported)}')
    return value, find('bbox_mAP_50', 'bbox_AP50', 'AP50')


# ------------------------------------------------------------------------------- running


class Stopped(Exception):
    """The user stopped the comparison."""


class Execute(Protocol):
    """Runs a command to its end, its output appended to ``log``; calls ``poll`` now and then."""

    def __call__(
        self,
        command: list[str],
        log: Path,
        env: dict[str, str],
        lock: int,
        poll: Callable[[], None],
    ) -> int: ...


def run_command(
    command: list[str], log: Path, env: dict[str, str], lock: int, poll: Callable[[], None]
) -> int:
    """The child inherits ``lock``, so that it tells of a child that outlives this process."""
    with open(log, 'a') as out:
        out.write(f'\n$ {" ".join(command)}\n')
        out.flush()
        process = subprocess.Popen(
            command, stdout=out, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=env,
            pass_fds=[lock], start_new_session=True,
        )  # fmt: skip
        try:
            while True:
                try:
                    return process.wait(timeout=1)
                except subprocess.TimeoutExpired:
                    poll()
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)
                try:
                    process.wait(timeout=10)
                except subprocess.TimeoutExpired:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()


@dataclass
class Progress:
    """What each run is doing, one line each: redrawn on a terminal, else printed on change."""

    names: list[str]
    stream: TextIO
    every: float = 30.0
    state: dict[str, str] = field(default_factory=dict)
    # Re-entrant: say() draws.
    mutex: Any = field(default_factory=threading.RLock)
    drawn: int = 0
    last: float = 0.0
    shown: dict[str, str] = field(default_factory=dict)

    def set(self, name: str, text: str, event: bool = False) -> None:
        """``event``: worth a line at once, also where nothing is redrawn."""
        with self.mutex:
            self.state[name] = text
            if event and not self.stream.isatty():
                self._line(name)

    def say(self, text: str) -> None:
        """A line that stays."""
        with self.mutex:
            self._clear()
            print(text, file=self.stream, flush=True)
            self.draw()

    def tick(self) -> None:
        with self.mutex:
            if self.stream.isatty():
                self._clear()
                self.draw()
            elif time.monotonic() - self.last >= self.every:
                self.last = time.monotonic()
                for name in self.names:
                    if self.state.get(name, '') != self.shown.get(name, ''):
                        self._line(name)

    def draw(self) -> None:
        if not self.stream.isatty():
            return
        columns = shutil.get_terminal_size().columns
        for name in self.names:
            text = f'{name:{self.width}}  {self.state.get(name, "waiting")}'
            print(text[: columns - 1], file=self.stream)
        self.stream.flush()
        self.drawn = len(self.names)

    @property
    def width(self) -> int:
        return max(map(len, self.names), default=0)

    def _clear(self) -> None:
        if self.drawn:
            self.stream.write(f'\x1b[{self.drawn}F\x1b[J')
            self.drawn = 0

    def _line(self, name: str) -> None:
        self.shown[name] = self.state.get(name, '')
        clock = time.strftime('%H:%M:%S')
        print(f'{clock}  {name:{self.width}}  {self.shown[name]}', file=self.stream, flush=True)


def training_state(log_text: str, max_epochs: int | None = None) -> str | None:
    """``iteration/total  loss  ETA`` from the last training line that MMEngine printed, or None."""
    head = r'(?:Epoch\(train\)\s*\[\s*(\d+)\]|Iter\(train\)\s*)'
    lines = re.findall(head + r'\[\s*(\d+)/\s*(\d+)\](.*)', log_text)
    if not lines:
        return None
    epoch, done, total, rest = lines[-1]
    done, total = int(done), int(total)
    if epoch:
        done += (int(epoch) - 1) * total
        total = total * max_epochs if max_epochs else 0
    text = f'training {done}/{total or "?"}'
    if loss := re.search(r'\bloss: ([^\s]+)', rest):
        text += f'  loss {float(loss[1]):.3g}'
    if eta := re.search(r'eta: (.*?\d+:\d\d:\d\d)', rest):
        text += f'  ETA {eta[1]}'
    return text


@dataclass
class Bench:
    """Where and how runs are run."""

    work_dir: Path
    results: Path
    jobs: int
    processes: int
    devices: list[str]
    progress: Progress
    execute: Execute
    stop: threading.Event = field(default_factory=threading.Event)

    def environment(self, device: str | None) -> dict[str, str]:
        env = dict(os.environ)
        env['PYTHONPATH'] = os.pathsep.join(filter(None, [str(ROOT), env.get('PYTHONPATH')]))
        if device is not None:
            env['CUDA_VISIBLE_DEVICES'] = device
        if self.processes > 1:
            env['PYTHON'] = sys.executable
            env.setdefault('PORT', str(_free_port()))
            if self.devices:
                env['CUDA_VISIBLE_DEVICES'] = ','.join(self.devices)
        if not self.devices:
            # Runs side by side on one machine share its cores instead of fighting for them.
            threads = max(1, cpu_cores() // (self.jobs * self.processes))
            for name in ('OMP_NUM_THREADS', 'MKL_NUM_THREADS'):
                env.setdefault(name, str(threads))
        return env

    def directory(self, run: Run) -> Path:
        """Of a run, found by key: its label may have changed with the configs beside it."""
        runs = self.work_dir / 'runs'
        known = sorted(runs.glob(f'*-{run.train_key}'))
        return known[0] if known else runs / f'{run.slug}-{run.train_key}'

    def result_path(self, run: Run) -> Path:
        return self.results / f'{run.slug}-{run.split}-{run.key}.json'


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        return probe.getsockname()[1]


def cpu_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1


class RunFailed(RuntimeError):
    """A command of a run failed; the message holds the last lines of its log."""


def perform(run: Run, bench: Bench, device: str | None = None) -> dict:
    """Trains (or goes on training), tests and scores one run, and writes its result.

    Raises:
        RunFailed: with the last lines of the log, if a command fails or leaves nothing behind.
    """
    directory = bench.directory(run)
    directory.mkdir(parents=True, exist_ok=True)
    env = bench.environment(device)
    with _locked(directory, run, bench) as lock:
        training = None
        if run.role != 'teacher':
            training = _train(run, bench, directory, env, lock)
        checkpoint = run.checkpoint or training['checkpoint']  # type: ignore[index]
        bench.progress.set(run.name, 'testing', event=True)
        metrics = _test(run, bench, directory, checkpoint, env, lock)
    result: dict[str, Any] = {
        'kind': 'run',
        'label': run.label,
        'role': run.role,
        'seed': run.seed,
        'split': run.split,
        'config': run.config,
        'cfg_options': run.options,
        'key': run.key,
        'train_key': run.train_key,
        'metrics': metrics,
        'machine': machine(),
    }
    if training is not None:
        kept = ('seconds', 'attempts', 'side_by_side', 'processes')
        result['train'] = {k: training[k] for k in kept}
        result['curves'] = read_curves(directory)
    write_json(bench.result_path(run), result)
    return result


@contextlib.contextmanager
def _locked(directory: Path, run: Run, bench: Bench) -> Iterator[int]:
    with open(directory / '.lock', 'w') as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:
                bench.progress.set(run.name, 'still being run by an earlier call: waiting for it')
                if bench.stop.wait(2):
                    raise Stopped from None
        yield file.fileno()


def _train(run: Run, bench: Bench, directory: Path, env: dict[str, str], lock: int) -> dict:
    """The training's state: ``checkpoint``, ``seconds`` of wall time over all ``attempts``."""
    path = directory / 'training.json'
    state: dict = {'seconds': 0.0, 'attempts': 0}
    if path.exists():
        state = json.loads(path.read_text())
    if state.get('checkpoint') and Path(state['checkpoint']).exists():
        return state
    before = state['seconds']
    started = time.time()
    state.update(attempts=state['attempts'] + 1, side_by_side=bench.jobs, processes=bench.processes)
    resume = ['--resume'] if (directory / 'last_checkpoint').exists() else []
    arguments = ['--work-dir', str(directory), *resume, '--cfg-options', *run.options]
    if bench.processes > 1:
        command = ['bash', str(ROOT / 'tools/dist_train.sh'), run.config, str(bench.processes)]
    else:
        command = [sys.executable, str(ROOT / 'tools/train.py'), run.config]
    log = directory / 'train.log'
    written = 0.0

    def poll() -> None:
        nonlocal written
        if bench.stop.is_set():
            raise Stopped
        if time.time() - written > 10:
            written = time.time()
            write_json(path, {**state, 'seconds': written - started + before})
        text = training_state(_tail(log), run.max_epochs)
        bench.progress.set(run.name, text or 'starting')

    bench.progress.set(run.name, 'going on with training' if resume else 'training', event=True)
    try:
        code = bench.execute([*command, *arguments], log, env, lock, poll)
    finally:
        state['seconds'] = time.time() - started + before
        write_json(path, state)
    _check(code, 'training', log)
    last = directory / 'last_checkpoint'
    if not last.exists():
        raise RunFailed(
            f'training ended without a checkpoint in {directory}: default_hooks.checkpoint must '
            'save one at the end (save_last=True)'
        )
    state['checkpoint'] = last.read_text().strip()
    write_json(path, state)
    return state


def _test(
    run: Run, bench: Bench, directory: Path, checkpoint: str, env: dict[str, str], lock: int
) -> dict:
    """What the evaluator reports, and its unrounded mAP and AP50 where it is COCO's."""
    folder = directory / run.split
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    config, detections, out = folder / 'config.py', folder / 'detections.pkl', folder / 'score.json'
    run.test_cfg.dump(str(config))

    def poll() -> None:
        if bench.stop.is_set():
            raise Stopped

    log = folder / 'test.log'
    command = [sys.executable, str(ROOT / 'tools/test.py'), str(config), checkpoint]
    command += ['--work-dir', str(folder), '--out', str(detections)]
    _check(bench.execute(command, log, env, lock, poll), 'test', log)
    command = [sys.executable, str(ROOT / 'tools/compare.py'), 'score', str(config), checkpoint]
    command += [str(detections), str(out)]
    _check(bench.execute(command, log, env, lock, poll), 'scoring', log)
    return json.loads(out.read_text())


def _check(code: int, what: str, log: Path) -> None:
    if code != 0:
        lines = '\n'.join(f'    {line}' for line in _tail(log).splitlines()[-12:])
        raise RunFailed(f'{what} failed (exit code {code}); the end of {log}:\n{lines}')


def _tail(path: Path, size: int = 20_000) -> str:
    if not path.exists():
        return ''
    with open(path, 'rb') as file:
        file.seek(max(0, path.stat().st_size - size))
        return re.sub(r'\x1b\[[\d;]*m', '', file.read().decode(errors='replace'))


def machine() -> str:
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    model = ''
    with contextlib.suppress(OSError):
        found = re.search(r'model name\s*:\s*(.*)', Path('/proc/cpuinfo').read_text())
        model = found[1] if found else ''
    return f'{model or platform.processor() or platform.machine()}, {cpu_cores()} cores'


def perform_all(runs: Sequence[Run], bench: Bench) -> tuple[dict[str, dict], dict[str, str]]:
    """Performs the runs, ``bench.jobs`` at a time. A run that fails stops no other.

    Returns:
        Results by key, and the messages of failed runs by name.

    Raises:
        Stopped: on SIGINT or SIGTERM, after the children are stopped.
    """
    waiting: queue.SimpleQueue[Run] = queue.SimpleQueue()
    for run in runs:
        waiting.put(run)
    results: dict[str, dict] = {}
    failures: dict[str, str] = {}

    def work(slot: int) -> None:
        device = None
        if bench.devices and bench.processes == 1:
            device = bench.devices[slot % len(bench.devices)]
        while not bench.stop.is_set():
            try:
                run = waiting.get_nowait()
            except queue.Empty:
                return
            try:
                result = perform(run, bench, device)
            except Stopped:
                return
            except Exception as error:
                failures[run.name] = str(error)
                bench.progress.set(run.name, 'FAILED')
                bench.progress.say(f'FAILED  {run.name}: {error}')
            else:
                results[run.key] = result
                train = result.get('train')
                took = f' in {duration(train["seconds"])}' if train else ''
                points = 100 * result['metrics']['mAP']
                bench.progress.set(run.name, f'done{took}: mAP {points:.1f}', event=True)

    slots = range(min(bench.jobs, len(runs)))
    threads = [threading.Thread(target=work, args=(slot,), daemon=True) for slot in slots]
    with _stopping_at_signals(bench.stop):
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            for thread in threads:
                thread.join(timeout=0.2)
            bench.progress.tick()
    bench.progress.tick()
    bench.progress.drawn = 0
    if bench.stop.is_set():
        raise Stopped
    return results, failures


@contextlib.contextmanager
def _stopping_at_signals(stop: threading.Event) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, lambda *_: stop.set()) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


# ------------------------------------------------------------------------------- scoring, measuring


def score(config: str, checkpoint: str, detections: str) -> dict:
    """Metrics of dumped detections by the config's own evaluator.

    CocoMetric rounds what it reports to 0.1 points, which is as large as the differences that are
    looked for; the same evaluation's unrounded numbers are taken from COCOeval.

    Returns:
        ``mAP`` and ``AP50`` (fractions; AP50 None where not reported), ``exact`` (False: rounded by
        the evaluator), ``detections`` (their number) and ``reported``, all that it reported.

    Raises:
        ValueError: if the checkpoint does not fill the network: its test means nothing.
    """
    from mmdet.evaluation.metrics import coco_metric
    from mmdet.registry import DATASETS, MODELS
    from mmengine import load
    from mmengine.evaluator import Evaluator
    from mmengine.registry import init_default_scope

    cfg = Config.fromfile(config)
    init_default_scope(cfg.get('default_scope', 'mmdet'))
    _fill(MODELS.build(cfg.model), checkpoint)
    predictions = load(detections)
    count = sum(len(sample['pred_instances']['bboxes']) for sample in predictions)
    base = {'detections': count, 'images': len(predictions)}
    if count == 0:
        # The COCO evaluator reports nothing then, though the answer is known.
        return {'mAP': 0.0, 'AP50': 0.0, 'exact': True, 'reported': {}, **base}
    evaluator = Evaluator(cfg.test_evaluator)
    evaluator.dataset_meta = DATASETS.build(cfg.test_dataloader.dataset).metainfo
    unrounded: list[np.ndarray] = []

    class Remembering(coco_metric.COCOeval):
        def summarize(self) -> None:
            super().summarize()
            if self.params.iouType == 'bbox' and self.params.useCats:
                unrounded.append(np.array(self.stats))

    original, coco_metric.COCOeval = coco_metric.COCOeval, Remembering
    try:
        reported = evaluator.offline_evaluate(predictions)
    finally:
        coco_metric.COCOeval = original
    value, at_50 = find_metrics(reported)
    exact = len(unrounded) == 1
    if exact:
        assert abs(unrounded[0][0] - value) < 5.1e-4, (unrounded[0][0], value)
        value, at_50 = (float(v) for v in unrounded[0][:2])
    numbers = {k: float(v) for k, v in reported.items() if np.ndim(v) == 0}
    return {'mAP': value, 'AP50': at_50, 'exact': exact, 'reported': numbers, **base}


def _fill(network: Any, checkpoint: str) -> None:
    """Loads strictly, but for the adapters that a distilled student's checkpoint may hold."""
    from mmengine.runner.checkpoint import CheckpointLoader

    from .teacher import ADAPTER_PREFIX

    state = CheckpointLoader.load_checkpoint(checkpoint, map_location='cpu')
    state = state.get('state_dict', state)
    state = {key.removeprefix('module.'): value for key, value in state.items()}
    state = {key: value for key, value in state.items() if not key.startswith(ADAPTER_PREFIX)}
    result = network.load_state_dict(state, strict=False)
    missing = [key for key in result.missing_keys if not key.endswith('num_batches_tracked')]
    if missing or result.unexpected_keys:
        raise ValueError(
            f'{checkpoint} does not fit the network that is tested: missing {missing[:3]} '
            f'({len(missing)}), unexpected {result.unexpected_keys[:3]} '
            f'({len(result.unexpected_keys)}). Its numbers would mean nothing'
        )


def measure(config: str, checkpoint: str, images: int = 30) -> dict:
    """Parameters, GFLOPs and speed of a plain network on test images, one at a time.

    Returns:
        ``params``; ``gflops``: multiply-adds of convolutions and linear layers in units of 1e9,
        mean over images (None: not computable, ``gflops_why`` says why); ``images_per_second``:
        1 / the median time of pre-processing, network and NMS, without reading the image, on one
        thread of a CPU or on one GPU; ``load_before``: the machine's load average before;
        ``device`` and ``images``.
    """
    import torch
    from mmdet.registry import MODELS
    from mmengine.analysis import get_model_complexity_info
    from mmengine.model import revert_sync_batchnorm
    from mmengine.registry import init_default_scope
    from mmengine.runner import Runner

    busy = os.getloadavg()[0]
    cfg = Config.fromfile(config)
    init_default_scope(cfg.get('default_scope', 'mmdet'))
    torch.set_num_threads(1)
    cuda = torch.cuda.is_available()
    model = MODELS.build(cfg.model)
    _fill(model, checkpoint)
    model = revert_sync_batchnorm(model.cuda() if cuda else model).eval()
    loader = dict(cfg.test_dataloader, batch_size=1, num_workers=0, persistent_workers=False)
    for key in ('prefetch_factor', 'batch_sampler'):
        loader.pop(key, None)
    loader.setdefault('sampler', {'type': 'DefaultSampler', 'shuffle': False})
    batches = []
    for batch in Runner.build_dataloader(loader, seed=0):
        batches.append(batch)
        if len(batches) == images:
            break
    times = []
    with torch.no_grad():
        for batch in batches[:3]:
            model.test_step(copy.deepcopy(batch))
        for batch in batches:
            batch = copy.deepcopy(batch)
            if cuda:
                torch.cuda.synchronize()
            start = time.perf_counter()
            model.test_step(batch)
            if cuda:
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
    value: dict[str, Any] = {
        'kind': 'measure',
        'params': sum(p.numel() for p in model.parameters()),
        'images_per_second': float(1 / np.median(times)),
        'images': len(times),
        'load_before': busy,
        'device': machine() if cuda else f'{machine()}, 1 thread used',
    }
    forward = model.forward
    flops = []
    try:
        for batch in batches[:5]:
            data = model.data_preprocessor(copy.deepcopy(batch))
            samples = data['data_samples']
            model.forward = lambda inputs, samples=samples: forward(inputs, data_samples=samples)
            info = get_model_complexity_info(
                model, None, inputs=data['inputs'], show_table=False, show_arch=False
            )
            flops.append(info['flops'])
        value['gflops'] = float(np.mean(flops)) / 1e9
    except Exception as error:  # whatever a network nobody here has seen may raise
        value['gflops'] = None
        value['gflops_why'] = f'{type(error).__name__}: {str(error).splitlines()[0][:120]}'
    return value


def arch_key(run: Run) -> str:
    """Of what decides a network's size and speed; weights do not count, so seeds share it."""
    dataset = run.test_cfg.test_dataloader
    return _digest(['arch', _canonical(_bare(run.test_cfg.model)), dataset])


def _measure_all(plan: Plan, bench: Bench, results: dict[str, dict]) -> dict[str, dict]:
    """Measures what has not been measured, one after another, while nothing else is running."""
    measured = load_measures(plan, bench.results)
    for row in plan.rows:
        run = next((r for r in row.runs if r.key in results), None)
        if run is None or arch_key(run) in measured:
            continue
        directory = bench.directory(run)
        config = directory / run.split / 'config.py'
        checkpoint = run.checkpoint
        if checkpoint is None and (directory / 'training.json').exists():
            checkpoint = json.loads((directory / 'training.json').read_text()).get('checkpoint')
        if not config.exists() or checkpoint is None:
            continue  # the result came from elsewhere, the run's folder did not
        bench.progress.say(f'measuring the size and speed of {row.label} ...')
        log, out = directory / 'measure.log', directory / 'measure.json'
        command = [sys.executable, str(ROOT / 'tools/compare.py'), 'measure']
        command += [str(config), checkpoint, str(out)]
        with open(log, 'a') as file:
            env = bench.environment(bench.devices[0] if bench.devices else None)
            code = bench.execute(command, log, env, file.fileno(), lambda: None)
        if code != 0:
            bench.progress.say(f'could not measure {row.label}; see the end of {log}')
            continue
        key = arch_key(run)
        value = {**json.loads(out.read_text()), 'key': key}
        slug = re.sub(r'[^\w.-]+', '-', row.label).strip('-')
        write_json(bench.results / f'measure-{slug}-{key}.json', value)
        measured[key] = value
    return measured


def load_measures(plan: Plan, directory: Path) -> dict[str, dict]:
    wanted = {arch_key(run) for run in plan.runs}
    found = {}
    for path in sorted(directory.glob('measure-*.json')):
        value = json.loads(path.read_text())
        if value['key'] in wanted:
            found[value['key']] = value
    return found


# ------------------------------------------------------------------------------- the table


@dataclass
class RowSummary:
    """mAP and AP50 in points (0-100), time in seconds; None: not known."""

    label: str
    role: str
    n: int
    by_seed: dict[int | None, float]
    mean: float | None
    sd: float | None
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
    """A distilled row against a reference: its own baseline, or a plain student."""

    label: str
    reference: str
    own: bool
    seeds: list[int]
    verdict: Verdict | None
    share: float | None


@dataclass
class Summary:
    rows: list[RowSummary]
    pairs: list[PairSummary]
    seeds: list[int]
    split: str
    margin: float
    notes: list[str]


def summarise(
    plan: Plan,
    results: dict[str, dict],
    measures: dict[str, dict],
    margin: float = MARGIN,
    notes: Sequence[str] = (),
) -> Summary:
    """All that the table and the report say, from results alone."""
    summary = Summary([], [], plan.seeds, plan.split, margin, [*plan.notes, *notes])
    by_label: dict[str, RowSummary] = {}
    resumed, rounded, missing, wall = [], False, [], 0.0
    side_by_side = set()
    for row in plan.rows:
        found = {run.seed: results[run.key] for run in row.runs if run.key in results}
        missing += [run.name for run in row.runs if run.key not in results]
        metrics = [r['metrics'] for r in found.values()]
        by_seed = {seed: 100 * r['metrics']['mAP'] for seed, r in found.items()}
        maps = list(by_seed.values())
        ap50 = [100 * m['AP50'] for m in metrics if m.get('AP50') is not None]
        trained = [r['train'] for r in found.values() if r.get('train')]
        measured = measures.get(arch_key(row.runs[0]), {})
        rounded |= any(not m['exact'] for m in metrics)
        resumed += [r['label'] for r in found.values() if r.get('train', {}).get('attempts', 1) > 1]
        wall += sum(t['seconds'] for t in trained)
        side_by_side |= {t['side_by_side'] for t in trained}
        by_label[row.label] = RowSummary(
            row.label,
            row.role,
            len(maps),
            by_seed,
            float(np.mean(maps)) if maps else None,
            float(np.std(maps, ddof=1)) if len(maps) > 1 else None,
            float(np.mean(ap50)) if ap50 else None,
            measured.get('params'),
            measured.get('gflops'),
            measured.get('images_per_second'),
            float(np.mean([t['seconds'] for t in trained])) if trained else None,
            row.baseline_of,
        )
        if why := measured.get('gflops_why'):
            summary.notes.append(f'GFLOPs of {row.label}: not computable ({why})')
    summary.rows = list(by_label.values())
    for comparison in plan.comparisons:
        references = [(comparison.baseline, True)]
        references += [(row, False) for row in plan.plain if row is not comparison.baseline]
        for reference, own in references:
            pair = _pair(comparison, reference, own, by_label, margin)
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
    if missing:
        summary.notes.append(f'not there (yet): {", ".join(missing)}')
    if rounded:
        summary.notes.append(
            'the evaluator rounds to 0.1 points, and a difference is only as fine as that'
        )
    devices = sorted({m['device'] for m in measures.values() if 'device' in m})
    if devices:
        summary.notes.append(
            'GFLOPs are multiply-adds of convolutions and linear layers; images/s is one image at '
            f'a time without reading it, median ({"; ".join(devices)})'
        )
    busy = max((m.get('load_before', 0.0) for m in measures.values()), default=0.0)
    if busy > cpu_cores():
        summary.notes.append(
            f'the machine was busy (load {busy:.1f}) when images/s was measured: delete '
            'measure-*.json among the results and call again on a quiet one'
        )
    if wall:
        side = '/'.join(map(str, sorted(side_by_side)))
        summary.notes.append(
            f'training time is wall time of the training command with validation, {side} run(s) '
            f'side by side; all trainings together: {duration(wall)}'
        )
    if resumed:
        summary.notes.append(
            f'interrupted and resumed, so that their time counts some iterations twice: '
            f'{", ".join(sorted(set(resumed)))}'
        )
    return summary


def _pair(
    comparison: Comparison,
    reference: Row,
    own: bool,
    by_label: dict[str, RowSummary],
    margin: float,
) -> PairSummary:
    distilled, other = by_label[comparison.distilled.label], by_label[reference.label]
    seeds = [s for s in distilled.by_seed if s in other.by_seed and s is not None]
    pair = PairSummary(distilled.label, other.label, own, seeds, None, None)
    if not seeds:
        return pair
    pair.verdict = judge([distilled.by_seed[s] - other.by_seed[s] for s in seeds], margin)
    teacher = by_label[comparison.teacher.label].mean if comparison.teacher else None
    if teacher is not None:
        # Over the seeds that both have, so that the share and the difference speak of the same.
        student, plain = (float(np.mean([r.by_seed[s] for s in seeds])) for r in (distilled, other))
        pair.share = gap_share(student, plain, teacher)
    return pair


def duration(seconds: float) -> str:
    """``2 h 03 min``, ``4 min 10 s`` or ``31 s``."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f'{hours} h {minutes:02d} min'
    return f'{minutes} min {seconds:02d} s' if minutes else f'{seconds} s'


def shown(value: float | None, form: str = '.1f', scale: float = 1.0) -> str:
    return 'n/a' if value is None else format(value * scale, form)


def percent(share: float | None) -> str:
    return '' if share is None else f'{100 * share:.0f} %'


def spread(row: RowSummary) -> str:
    if row.mean is None:
        return 'n/a'
    # No-break spaces: a table cell stays on one line.
    return f'{row.mean:.1f}' + (f'\xa0±\xa0{row.sd:.1f}' if row.sd is not None else '')


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
            shown(row.ap50),
            shown(row.params, '.2f', 1e-6),
            shown(row.gflops, '.3g'),
            shown(row.images_per_second, '.3g'),
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
        against = f'{pair.reference} ({"own baseline" if pair.own else "start and terms together"})'
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
        _table(*columns(summary)),
        'Paired differences, same seed against same seed. BEATS: the 95 % interval (paired t) lies '
        'above 0. WORSE: below. NO GAIN: it contains 0 and ends below the smallest gain of '
        f'interest, {summary.margin:g}. INCONCLUSIVE: anything else, and always below three seeds.',
        _table(*pair_columns(summary)),
    ]
    if len(summary.seeds) < 3:
        n = len(summary.seeds)
        parts.append(f'**n = {n}: this proves nothing.** Three seeds are the least.')
    parts += ['\n'.join(f'- {note}' for note in summary.notes)] if summary.notes else []
    return '\n\n'.join(parts) + '\n'


def _table(head: list[str], body: list[list[str]]) -> str:
    lines = [head, *body]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    padded = [[c.ljust(width) for c, width in zip(line, widths, strict=True)] for line in lines]
    rule = ['-' * width for width in widths]
    return '\n'.join(f'| {" | ".join(line)} |' for line in (padded[0], rule, *padded[1:]))


# ------------------------------------------------------------------------------- all of it


def compare(
    configs: Sequence[str],
    seeds: Sequence[int] = (0, 1, 2),
    plain: Sequence[str] = (),
    options: Sequence[str] = (),
    work_dir: str | Path = 'work_dirs/compare',
    results_dir: str | Path | None = None,
    split: str = 'test',
    jobs: int | None = None,
    gpus: int | None = None,
    margin: float = MARGIN,
    images: int = 6,
    table_only: bool = False,
    execute: Execute = run_command,
    stream: TextIO = sys.stdout,
) -> int:
    """Plans, runs what is missing, prints the table and writes ``table.md`` and ``report.html``.

    Returns:
        The exit code: 0, 1 if a run failed, 2 if the plan is impossible, 130 if it was stopped.
    """
    work = Path(work_dir)
    results_path = Path(results_dir) if results_dir else work / 'results'
    try:
        jobs, processes, devices = _resources(jobs, gpus)
        plan = plan_runs(configs, seeds, plain, options, split, processes)
        if not margin > 0:
            raise ValueError(f'--margin must be above 0, not {margin}')
    except (ValueError, FileNotFoundError) as error:
        print(f'compare: {error}', file=stream)
        return 2
    results, notes = load_results(results_path, plan)
    todo = [run for run in plan.runs if run.key not in results]
    failures: dict[str, str] = {}
    progress = Progress([run.name for run in todo], stream)
    bench = Bench(work, results_path, jobs, processes, devices, progress, execute)
    where = f'{len(devices)} GPU(s)' if devices else f'{cpu_cores()} CPU core(s)'
    how = f'; {jobs} side by side with {processes} process(es) each, {where}'
    print(
        f'{len(plan.runs)} runs, {len(plan.runs) - len(todo)} of them done already'
        + ('' if table_only else how),
        file=stream,
        flush=True,
    )
    for note in [*plan.notes, *notes]:
        print(f'note: {note}', file=stream, flush=True)
    if table_only:
        measures = load_measures(plan, results_path)
    else:
        try:
            done, failures = perform_all(todo, bench)
        except Stopped:
            print('\nstopped; the same command goes on from here', file=stream)
            return 130
        results |= done
        measures = _measure_all(plan, bench, results)
    if not results:
        print(f'no result of these configs in {results_path}', file=stream, flush=True)
        return 1
    summary = summarise(plan, results, measures, margin, notes)
    text = markdown(summary)
    work.mkdir(parents=True, exist_ok=True)
    (work / 'table.md').write_text(text)
    _write_report(plan, bench, summary, results, images)
    print(f'\n{text}\ntable:  {work / "table.md"}\nreport: {work / "report.html"}', file=stream)
    for name, message in failures.items():
        print(f'\nFAILED  {name}: {message}', file=stream)
    stream.flush()
    return 1 if failures else 0


def _resources(jobs: int | None, gpus: int | None) -> tuple[int, int, list[str]]:
    """(runs side by side, processes of each, names of the GPUs to use)."""
    import torch

    available = torch.cuda.device_count()
    if jobs is not None and jobs < 1:
        raise ValueError(f'--jobs must be 1 or more, not {jobs}')
    if gpus is not None and gpus < 1:
        raise ValueError(f'--gpus must be 1 or more, not {gpus}')
    if available:
        if gpus is not None and gpus > available:
            raise ValueError(f'--gpus {gpus}: this machine shows {available}')
        visible = os.environ.get('CUDA_VISIBLE_DEVICES')
        names = visible.split(',') if visible else [str(i) for i in range(available)]
        devices = names[: gpus or available]
    else:
        devices = []
        if gpus is not None and jobs != 1:
            raise ValueError(
                f'--gpus {gpus}: this machine shows no GPU; --jobs 1 --gpus {gpus} trains with '
                f'{gpus} processes on the CPU'
            )
    side_by_side = jobs or len(devices) or cpu_cores()
    processes = gpus if gpus and jobs == 1 else 1
    return side_by_side, processes, devices


def _write_report(
    plan: Plan, bench: Bench, summary: Summary, results: dict[str, dict], images: int
) -> None:
    from . import report

    curves = {}
    for row in plan.rows:
        of_seeds = [results[run.key].get('curves') for run in row.runs if run.key in results]
        curves[row.label] = [c for c in of_seeds if c]
    detections, cfg = {}, None
    for row in plan.rows:
        run = row.runs[0]
        path = bench.directory(run) / run.split / 'detections.pkl'
        if run.key in results and path.exists():
            detections[row.label] = path
            cfg = cfg or run.test_cfg
    pictures = []
    if cfg is not None and images:
        pictures = report.collect_pictures(cfg, detections, images)
    (bench.work_dir / 'report.html').write_text(report.render(summary, curves, pictures))


def work(arguments: Sequence[str]) -> int:
    """``score`` and ``measure``, the two jobs that get a process of their own beside the tools.

    They are asked for as ``tools/compare.py score ...``: ``python -m mmkd...`` would find a config
    named mmkd.py in the user's folder first.
    """
    parser = argparse.ArgumentParser(prog='tools/compare.py')
    commands = parser.add_subparsers(dest='command', required=True)
    for name, files in (('score', ['detections']), ('measure', [])):
        command = commands.add_parser(name)
        for argument in ('config', 'checkpoint', *files, 'out'):
            command.add_argument(argument)
    args = parser.parse_args(arguments)
    if args.command == 'score':
        value = score(args.config, args.checkpoint, args.detections)
    else:
        value = measure(args.config, args.checkpoint)
    write_json(Path(args.out), value)
    return 0
