"""What ``tools/train.py`` and ``tools/test.py`` share: the options, the config, the processes."""

import argparse
import ast
import contextlib
import datetime
import difflib
import errno
import fcntl
import inspect
import io
import logging
import os
import os.path as osp
import re
import socket
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from mmengine.config import Config, DictAction
from mmengine.config.utils import ConfigParsingError
from mmengine.device import get_device
from mmengine.model import BaseTTAModel, is_model_wrapper
from mmengine.registry import RUNNERS
from mmengine.runner import CheckpointLoader, Runner
from torch import nn

from .io.checkpoint import CheckpointError

LAUNCHERS = ('none', 'pytorch', 'slurm', 'mpi')
ROOM = 2**20
"""Bytes that the work directory must take before a network is built: log, configs, curves."""


def stop(message: str) -> NoReturn:
    """Ends the program with one line on stderr and exit status 1."""
    raise SystemExit(f'error: {message}')


class CfgOptions(DictAction):
    """MMEngine's ``DictAction``, which answers a malformed pair in words instead of a traceback."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        try:
            super().__call__(parser, namespace, values, option_string)
        except (ValueError, AssertionError):
            stop(
                f'--cfg-options {" ".join(values or ())}: '
                'each must read key=value, with closed brackets and no spaces'
            )


def add_shared_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options that MMDetection's train and test tools have in common, by their names."""
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=CfgOptions,
        metavar='KEY=VALUE',
        help='values of the config to override, e.g. model.distillation.hint.loss_weight=0; '
        'lists as key="[a,b]" or key=a,b',
    )
    parser.add_argument('--launcher', choices=LAUNCHERS, default='none', help='job launcher')
    # Both spellings: torch.distributed.launch passes the second since PyTorch 2.0.
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0)


def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Parses ``argv`` and sets ``LOCAL_RANK``, which MMEngine reads, where no launcher did."""
    args = parser.parse_args(argv)
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    return args


def load_config(args: argparse.Namespace) -> Config:
    """Reads the config and applies ``--cfg-options``, ``--launcher`` and ``--work-dir``.

    A config without ``runner_type`` gets mmkd's, so that every checkpoint is written in plain form
    and read safely. ``work_dir`` is, in this order: the option, the config's, or
    ``work_dirs/<name of the config>``.

    Raises:
        SystemExit: The config, or one that it inherits, cannot be found; an option does not fit.
    """
    try:
        cfg = Config.fromfile(args.config)
    except (OSError, ConfigParsingError) as error:
        reason = 'no such file' if not osp.isfile(args.config) else str(error)
        stop(f'config {args.config} cannot be read: {reason}')

    options = args.cfg_options or {}
    for key in options:
        if key.split('.')[0] == 'distillation' and 'distillation' in cfg.get('model', {}):
            stop(
                f'--cfg-options {key}: the recipe has already been copied into the model, so this '
                f'would change nothing; write model.{key}'
            )
        _require_used(key, cfg)
    _require_in_model(args.config, cfg)
    try:
        cfg.merge_from_dict(options)
    except (TypeError, KeyError) as error:
        stop(f'--cfg-options {" ".join(options)} does not fit {args.config}: {error}')

    cfg.launcher = args.launcher
    cfg.setdefault('runner_type', 'mmkd.DistillationRunner')
    if args.work_dir is not None:
        cfg.work_dir = args.work_dir
    elif cfg.get('work_dir') is None:
        cfg.work_dir = osp.join('work_dirs', osp.splitext(osp.basename(args.config))[0])
    return cfg


_READ = {
    *inspect.signature(Runner.__init__).parameters,
    *('runner_type', 'auto_scale_lr', 'tta_model', 'tta_pipeline', 'custom_imports'),
}
"""Keys of a config that something reads; others are variables for those."""


def _require_used(option: str, cfg: Config) -> None:
    """An option that nothing reads would change nothing."""
    key = option.split('.')[0]
    if key in _READ or (key in cfg and isinstance(cfg[key], dict)):
        return
    if key in cfg:
        stop(
            f'--cfg-options {option}: {key} is a variable of the config, which has already been '
            'copied to where it is used, so this would change nothing; set it there, as '
            'train_cfg.max_epochs=1'
        )
    near = difflib.get_close_matches(key, sorted(_READ | set(cfg)), 3)
    stop(
        f'--cfg-options {option}: no config has {key}'
        + (f'; near it: {", ".join(near)}' if near else '')
        + ". What is the detector's begins with model., as model.distillation.hint.loss_weight=0"
    )


_OF_MODEL = ('distillation', 'teacher_config', 'teacher_ckpt', 'teacher_sha256', 'eval_teacher')


def _require_in_model(path: str, cfg: Config) -> None:
    """What a config sets beside its model, and does not use, would change nothing."""
    if 'teacher_config' not in cfg.get('model', {}) or not osp.isfile(path) or path[-3:] != '.py':
        return
    with open(path, encoding='utf-8') as file:
        text = re.sub('{{(.*?)}}', r'(\1)', file.read())
    tree = ast.parse(text)
    nodes = list(ast.walk(tree))
    used = {
        node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)
    }
    used |= {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    for node in tree.body:
        targets = node.targets if isinstance(node, ast.Assign) else []
        for name in (each.id for each in targets if isinstance(each, ast.Name)):
            if name in _OF_MODEL and name not in used:
                stop(
                    f'{path}: {name} stands beside the model and nothing uses it there, so it '
                    f'would change nothing; write model=dict({name}=...)'
                )


def build_runner(cfg: Config) -> Runner:
    """Builds the Runner, for ``--launcher pytorch`` without an accelerator over gloo.

    Raises:
        SystemExit: Slurm or MPI without an accelerator; more processes than GPUs; a ``work_dir``
            that cannot be written.
    """
    check_work_dir(cfg.work_dir)
    if cfg.launcher == 'pytorch':
        check_devices()
    if cfg.launcher != 'none' and get_device() == 'cpu':
        if cfg.launcher != 'pytorch':
            stop(
                f'--launcher {cfg.launcher} needs a GPU, and this machine shows none: '
                'for processes on CPUs start tools/dist_train.sh or tools/dist_test.sh'
            )
        _use_gloo(cfg)
    with naming_a_full_disk(cfg.work_dir):
        return RUNNERS.build(cfg)


@contextlib.contextmanager
def naming_a_full_disk(work_dir: str) -> Iterator[None]:
    """What is written in this block goes to ``work_dir``, or to no named file.

    Raises:
        SystemExit: There is no room left.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        # Only some errors name a file; semaphores of data-loader workers, for one, are elsewhere.
        if error.filename and not _lies_in(error.filename, work_dir):
            raise
        unsure = (
            '' if error.filename else '; if it has room, /dev/shm or the temporary folder has none'
        )
        _stop_unwritten(work_dir, error, unsure)


def _lies_in(path: str | bytes, folder: str) -> bool:
    return Path(os.fsdecode(path)).resolve().is_relative_to(Path(folder).resolve())


def _stop_unwritten(work_dir: str, error: OSError, more: str = '') -> NoReturn:
    stop(
        f'work_dir {work_dir} cannot be written ({error.strerror}): name a folder on a disk with '
        f'space, that you may write to, with --work-dir, or make room{more}'
    )


def check_work_dir(path: str) -> None:
    """Write something to the work directory, before a network is built.

    Raises:
        SystemExit: It cannot be made or written.
    """
    try:
        os.makedirs(path, exist_ok=True)
        with tempfile.TemporaryFile(dir=path) as file:
            file.write(bytes(ROOM))
    except OSError as error:
        _stop_unwritten(path, error)


_RANKS = {'pytorch': 'RANK', 'slurm': 'SLURM_PROCID', 'mpi': 'OMPI_COMM_WORLD_RANK'}


@contextlib.contextmanager
def holding(work_dir: str, launcher: str = 'none') -> Iterator[None]:
    """In this block no other job trains in ``work_dir``: they would delete each other's files.

    The first process of a job holds the folder by a lock, which the system takes back when the
    process ends, killed or not. A file system without locks is passed over.

    Raises:
        SystemExit: Another process has it.
    """
    first = os.environ.get(_RANKS.get(launcher, ''), '0') == '0'
    with contextlib.ExitStack() as stack:
        # What cannot be written is left to check_work_dir().
        with contextlib.suppress(OSError):
            if first:
                os.makedirs(work_dir, exist_ok=True)
                path = osp.join(work_dir, '.training')
                _lock(stack.enter_context(open(path, 'ab+', buffering=0)), work_dir)
        yield


def _lock(file: io.FileIO, work_dir: str) -> None:
    try:
        # Not flock: the workers of a data loader would hold that too, and may outlive a kill.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        file.seek(0)
        stop(
            f'work_dir {work_dir}: another run is training in it '
            f'({file.read(200).decode(errors="replace").strip()}), and each would write over the '
            'other. Wait for it or stop it, or take another --work-dir'
        )
    file.truncate(0)
    file.write(f'process {os.getpid()} on {socket.gethostname()}\n'.encode())


def check_devices() -> None:
    """Compare the processes that torchrun started on this machine with its GPUs.

    Raises:
        SystemExit: There are fewer GPUs.
    """
    rank, processes = int(os.environ.get('LOCAL_RANK', 0)), os.environ.get('LOCAL_WORLD_SIZE', '?')
    if get_device() == 'cpu':
        if rank == 0:
            print(
                'warning: this machine shows no GPU (torch.cuda.is_available() is False), so its '
                f'{processes} processes work on CPUs, over gloo. If it should have some, look at '
                'nvidia-smi, CUDA_VISIBLE_DEVICES and the build of torch',
                file=sys.stderr,
                flush=True,
            )
    elif get_device() == 'cuda' and rank >= torch.cuda.device_count():
        stop(
            f'{processes} processes were asked for, one a GPU, and this machine shows '
            f'{torch.cuda.device_count()}: ask for as many, or look at CUDA_VISIBLE_DEVICES'
        )


def leave() -> None:
    """Ends a process of a distributed run that has done its work, at once.

    At the interpreter's own end the threads of a process group, destroyed before or not, can
    outlive what they use: now and then a run that had saved everything aborted, and was called
    failed.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def check_complete(model: nn.Module, path: str, classes: Sequence[str] | None = None) -> None:
    """Loads a checkpoint's weights and insists that no tensor of ``model`` is left untouched.

    MMEngine's own loading writes one warning and tests random weights.

    Args:
        model: the detector, wrapped or not.
        path: of the checkpoint.
        classes: names of the config's classes, to compare with those in the checkpoint.

    Raises:
        SystemExit: The file is no checkpoint; it was trained on other classes; tensors are missing
            from it, or have other shapes.
    """
    while is_model_wrapper(model) or isinstance(model, BaseTTAModel):
        model = model.module
    try:
        checkpoint = CheckpointLoader.load_checkpoint(path, map_location='cpu')
    except CheckpointError as error:
        stop(str(error))
    state = {
        key.removeprefix('module.'): value
        for key, value in checkpoint.get('state_dict', checkpoint).items()
    }
    meta = checkpoint.get('meta') or {}
    trained = (meta.get('dataset_meta') or {}).get('classes') or meta.get('CLASSES')
    if classes and trained and list(trained) != list(classes):
        stop(
            f'checkpoint {path} was trained on {_named(trained)}, the config tests '
            f'{_named(classes)}: give the config that it was trained with, or its classes in that '
            'order'
        )
    own = model.state_dict()
    shapes = [key for key in own if key in state and state[key].shape != own[key].shape]
    missing = [] if shapes else model.load_state_dict(state, strict=False).missing_keys
    if wrong := shapes or missing:
        sizes = (
            f', {tuple(state[wrong[0]].shape)} in the file and {tuple(own[wrong[0]].shape)} here'
            if shapes
            else ''
        )
        what = 'has other shapes for' if shapes else 'lacks'
        stop(
            f'checkpoint {path} {what} {len(wrong)} of {len(own)} keys of the detector '
            f'(first: {wrong[0]}{sizes}): it was written with another config'
        )


def _named(classes: Sequence[str]) -> str:
    names = ', '.join(classes[:4]) if not isinstance(classes, str) else classes
    return f'{len(classes)} classes ({names}{", ..." if len(classes) > 4 else ""})'


def _use_gloo(cfg: Config) -> None:
    # MMEngine's own launcher calls torch.cuda.set_device and hands DDP a device id. It leaves a
    # process group that exists alone, and takes the wrapper's arguments from the config.
    timeout = cfg.get('env_cfg', {}).get('dist_cfg', {}).get('timeout')
    torch.distributed.init_process_group(
        'gloo', timeout=None if timeout is None else datetime.timedelta(seconds=timeout)
    )
    if cfg.get('model_wrapper_cfg') is None:
        cfg.model_wrapper_cfg = dict(
            type='MMDistributedDataParallel',
            broadcast_buffers=False,
            find_unused_parameters=cfg.get('find_unused_parameters', False),
        )
    cfg.model_wrapper_cfg.device_ids = None
