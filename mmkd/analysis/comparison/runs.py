"""Runs: each is trained, tested and measured by the tools, in processes of their own.

What was stopped is resumed, and a lock keeps two calls out of one folder.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import queue
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from ...engine.exact_resume import latest_checkpoint
from ...shipped import TOOLS
from .measure import cpu_cores, machine, versions, write_json
from .plan import Plan, Run, arch_key
from .progress import Progress, duration, training_state
from .results import append_result, load_measures, read_curves, read_results, read_step_time

ROOT = Path(__file__).resolve().parents[3]


class Stopped(Exception):
    """The user stopped the comparison."""


Execute = Callable[[list[str], Path, dict[str, str], int, Callable[[], None]], int]
"""Runs a command to its end and returns its exit code, as :func:`run_command` does."""


def run_command(
    command: list[str], log: Path, env: dict[str, str], lock: int, poll: Callable[[], None]
) -> int:
    """Runs a command to its end, appending its output to ``log``, and returns its exit code.

    ``poll`` is called about once a second; if it raises, the command is stopped. The child inherits
    the descriptor ``lock``, and holds the lock on if this process is killed.
    """
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
class RunContext:
    """Where runs are trained (``work_dir``), how many side by side (``jobs``), and with what.

    ``results`` is the results file, ``processes`` train one run, ``devices`` are names of GPUs.
    With ``curves`` the results hold what the trainings logged: half of their size.
    """

    work_dir: Path
    results: Path
    jobs: int
    processes: int
    devices: list[str]
    progress: Progress
    execute: Execute
    stop: threading.Event = field(default_factory=threading.Event)
    curves: bool = True

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
        names = ('OMP_NUM_THREADS', 'MKL_NUM_THREADS')
        # Either one that the user has set holds for both.
        if not self.devices and not any(env.get(name) for name in names):
            # Runs side by side on one machine share its cores instead of fighting for them.
            threads = max(1, cpu_cores() // (self.jobs * self.processes))
            env.update(dict.fromkeys(names, str(threads)))
        return env

    def directory(self, run: Run) -> Path:
        """Folder of a run, found by key: the label depends on the other configs of the call."""
        runs = self.work_dir / 'runs'
        known = sorted(runs.glob(f'*-{run.train_key}'))
        return known[0] if known else runs / f'{run.slug}-{run.train_key}'


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        return probe.getsockname()[1]


class RunFailed(RuntimeError):
    """A command of a run failed; the message holds the last lines of its log."""


def perform(run: Run, context: RunContext, device: str | None = None) -> dict:
    """Trains or resumes a run, tests and scores it, and appends its result to the results file.

    Raises:
        RunFailed: with the last lines of the log, if a command fails or leaves nothing behind.
    """
    directory = context.directory(run)
    directory.mkdir(parents=True, exist_ok=True)
    env = context.environment(device)
    with _locked(directory, run, context) as lock:
        done = read_results(context.results).runs.get(run.key)
        if done is not None:  # by another call, which held the lock
            return done
        training = None
        if run.role != 'teacher':
            training = _train(run, context, directory, env, lock)
        checkpoint = run.checkpoint or training['checkpoint']  # type: ignore[index]
        context.progress.set(run.name, 'testing', event=True)
        metrics = _test(run, context, directory, checkpoint, env, lock)
        result = _result(run, metrics, training, directory)
        if training is not None and context.curves:
            result['curves'] = read_curves(directory)
        append_result(context.results, result)
    return result


def _result(run: Run, metrics: dict, training: dict | None, directory: Path) -> dict:
    """The line of the results file."""
    result: dict[str, Any] = {
        'kind': 'run',
        **{name: getattr(run, name) for name in ('label', 'role', 'seed', 'split', 'config')},
        'cfg_options': run.options,
        'key': run.key,
        'train_key': run.train_key,
        'metrics': metrics,
        'machine': machine(),
        'versions': versions(),
        'date': datetime.now(timezone.utc).date().isoformat(),
    }
    if training is not None:
        kept = ('attempts', 'side_by_side', 'processes')
        seconds = round(training['seconds'], 1)
        result['train'] = {'seconds': seconds, **{k: training[k] for k in kept}}
        if (step := read_step_time(directory)) is not None:
            result['train']['step_ms'] = step
    return result


@contextlib.contextmanager
def _locked(directory: Path, run: Run, context: RunContext) -> Iterator[int]:
    with open(directory / '.lock', 'w') as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:
                context.progress.set(run.name, 'still being run by an earlier call: waiting for it')
                if context.stop.wait(2):
                    raise Stopped from None
        yield file.fileno()


def _train(run: Run, context: RunContext, directory: Path, env: dict[str, str], lock: int) -> dict:
    """Trains and returns ``checkpoint``, ``seconds`` of wall time over all ``attempts``, etc."""
    path = directory / 'training.json'
    state: dict = {'seconds': 0.0, 'attempts': 0}
    if path.exists():
        state = json.loads(path.read_text())
    if state.get('checkpoint') and Path(state['checkpoint']).exists():
        return state
    before = state['seconds']
    started = time.time()
    state.update(
        attempts=state['attempts'] + 1, side_by_side=context.jobs, processes=context.processes
    )
    resume = ['--resume'] if (directory / 'last_checkpoint').exists() else []
    arguments = ['--work-dir', str(directory), *resume, '--cfg-options', *run.options]
    if context.processes > 1:
        command = ['bash', str(TOOLS / 'dist_train.sh'), run.config, str(context.processes)]
    else:
        command = [sys.executable, str(TOOLS / 'train.py'), run.config]
    log = directory / 'train.log'
    written = 0.0

    def poll() -> None:
        nonlocal written
        if context.stop.is_set():
            raise Stopped
        if time.time() - written > 10:
            written = time.time()
            write_json(path, {**state, 'seconds': written - started + before})
        text = training_state(_tail(log), run.max_epochs)
        context.progress.set(run.name, text or 'starting')

    context.progress.set(run.name, 'resuming the training' if resume else 'training', event=True)
    try:
        code = context.execute([*command, *arguments], log, env, lock, poll)
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
    run: Run, context: RunContext, directory: Path, checkpoint: str, env: dict[str, str], lock: int
) -> dict:
    """Tests a checkpoint and returns what :func:`.measure.score` makes of the detections."""
    folder = directory / run.tested_in
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    config, detections, out = folder / 'config.py', folder / 'detections.pth', folder / 'score.json'
    run.test_cfg.dump(str(config))

    def poll() -> None:
        if context.stop.is_set():
            raise Stopped

    log = folder / 'test.log'
    command = [sys.executable, str(TOOLS / 'test.py'), str(config), checkpoint]
    command += ['--work-dir', str(folder), '--out', str(detections)]
    _check(context.execute(command, log, env, lock, poll), 'test', log)
    command = [sys.executable, str(TOOLS / 'compare.py'), 'score', str(config), checkpoint]
    command += [str(detections), str(out)]
    _check(context.execute(command, log, env, lock, poll), 'scoring', log)
    return json.loads(out.read_text())


def _check(code: int, what: str, log: Path) -> None:
    if code != 0:
        lines = '\n'.join(f'    {line}' for line in _tail(log).splitlines()[-12:])
        raise RunFailed(f'{what} failed (exit code {code}); the end of {log}:\n{lines}')


def _tail(path: Path) -> str:
    if not path.exists():
        return ''
    with open(path, 'rb') as file:
        file.seek(max(0, path.stat().st_size - 20_000))
        return re.sub(r'\x1b\[[\d;]*m', '', file.read().decode(errors='replace'))


def perform_all(runs: Sequence[Run], context: RunContext) -> tuple[dict[str, dict], dict[str, str]]:
    """Performs the runs, ``context.jobs`` at a time. One that fails does not stop the others.

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

    def run_waiting(slot: int) -> None:
        device = None
        if context.devices and context.processes == 1:
            device = context.devices[slot % len(context.devices)]
        while not context.stop.is_set():
            try:
                run = waiting.get_nowait()
            except queue.Empty:
                return
            try:
                result = perform(run, context, device)
            except Stopped:
                return
            except Exception as error:
                failures[run.name] = str(error)
                context.progress.set(run.name, 'FAILED')
                context.progress.say(f'FAILED  {run.name}: {error}')
            else:
                results[run.key] = result
                train = result.get('train')
                took = f' in {duration(train["seconds"])}' if train else ''
                points = 100 * result['metrics']['mAP']
                context.progress.set(run.name, f'done{took}: mAP {points:.1f}', event=True)

    slots = range(min(context.jobs, len(runs)))
    threads = [threading.Thread(target=run_waiting, args=(slot,), daemon=True) for slot in slots]
    with _stopping_at_signals(context.stop):
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            for thread in threads:
                thread.join(timeout=0.2)
            context.progress.tick()
    context.progress.tick()
    context.progress.drawn = 0
    if context.stop.is_set():
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


def measure_all(plan: Plan, context: RunContext, results: dict[str, dict]) -> dict[str, dict]:
    """Measures the networks that have not been measured, one at a time, after all runs."""
    measured = load_measures(context.results, plan)
    for row in plan.rows:
        run = next((r for r in row.runs if r.key in results), None)
        if run is None or arch_key(run) in measured:
            continue
        directory = context.directory(run)
        config = directory / run.tested_in / 'config.py'
        checkpoint = run.checkpoint
        if checkpoint is None and (directory / 'training.json').exists():
            checkpoint = json.loads((directory / 'training.json').read_text()).get('checkpoint')
        if not config.exists() or checkpoint is None:
            continue  # the result was made on another machine
        context.progress.say(f'measuring the size and speed of {row.label} ...')
        log, out = directory / 'measure.log', directory / 'measure.json'
        command = [sys.executable, str(TOOLS / 'compare.py'), 'measure']
        command += [str(config), checkpoint, str(out)]
        with open(log, 'a') as file:
            env = context.environment(context.devices[0] if context.devices else None)
            code = context.execute(command, log, env, file.fileno(), lambda: None)
        if code != 0:
            context.progress.say(f'could not measure {row.label}; see the end of {log}')
            continue
        key = arch_key(run)
        measured[key] = {**json.loads(out.read_text()), 'label': row.label, 'key': key}
        append_result(context.results, measured[key])
    return measured
