"""Runs: training, testing and measuring, each in a process of its own, and the results they leave.

A result is a small JSON file, found again by its key. What was stopped is resumed, and a lock keeps
two calls out of one folder.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import fcntl
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
from pathlib import Path
from typing import Any, Protocol, TextIO

import numpy as np
from mmengine.config import Config

from ...engine.exact_resume import latest_checkpoint
from ...recipe import without_terms
from .plan import Plan, Run, arch_key, fingerprint

ROOT = Path(__file__).resolve().parents[3]

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


def require_same_data(plan: Plan, directory: Path, keep: bool) -> None:
    """Insists that the annotations are those of the results that are there already.

    Args:
        plan: with the annotation files.
        directory: of the results, which gets ``annotations.json``.
        keep: whether runs follow, so that what is there now is remembered.

    Raises:
        ValueError: naming a file that has changed since.
    """
    path = directory / 'annotations.json'
    known = json.loads(path.read_text()) if path.is_file() else {}
    now = {name: fingerprint(name) for name in sorted(plan.annotations)}
    for name in now:
        if known.get(name, now[name]) != now[name]:
            raise ValueError(
                f'{name} has changed since the results in {directory} were made, so runs of today '
                'would be compared with runs on other data: name another --work-dir (or --results) '
                'or delete it'
            )
    if keep and known != {**known, **now}:
        write_json(path, {**known, **now})


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
                    # torchrun gives its processes 30 s; those of a run have sessions of their own.
                    process.wait(timeout=45)
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


def duration(seconds: float) -> str:
    """``2 h 03 min``, ``4 min 10 s`` or ``31 s``."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f'{hours} h {minutes:02d} min'
    return f'{minutes} min {seconds:02d} s' if minutes else f'{seconds} s'


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
    last = latest_checkpoint(str(directory))
    if last is None:
        raise RunFailed(
            f'training ended without a checkpoint in {directory}: default_hooks.checkpoint must '
            'save one at the end (save_last=True)'
        )
    state['checkpoint'] = last
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

    state = CheckpointLoader.load_checkpoint(checkpoint, map_location='cpu')
    state = state.get('state_dict', state)
    state = {key.removeprefix('module.'): value for key, value in state.items()}
    state = without_terms(state)
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


def measure_all(plan: Plan, bench: Bench, results: dict[str, dict]) -> dict[str, dict]:
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
