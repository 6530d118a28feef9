"""The processes of a run: those of its launcher, and what is said when one has ended."""

from __future__ import annotations

import datetime
import os
import re
import sys

import torch
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.dist import get_rank, get_world_size, init_dist
from mmengine.registry import RUNNERS
from mmengine.runner import Runner

from .exit import stop
from .work_dir import check_work_dir, reporting_full_disk


def build_runner(cfg: Config) -> Runner:
    """Builds the Runner; without an accelerator, ``--launcher pytorch`` uses gloo.

    Raises:
        SystemExit: Slurm or MPI without an accelerator; more processes than GPUs; a ``work_dir``
            that cannot be written.
    """
    check_work_dir(cfg.work_dir)
    if _on_cpus(cfg.launcher):
        _use_gloo(cfg)
    with reporting_full_disk(cfg.work_dir):
        return RUNNERS.build(cfg)


def join_processes(launcher: str) -> None:
    """Joins the processes that ``launcher`` has started, for work that exchanges no tensors.

    Raises:
        SystemExit: see :func:`build_runner`.
    """
    on_cpus = _on_cpus(launcher)
    # One may wait long for another that has more to do.
    if on_cpus:
        torch.distributed.init_process_group('gloo', timeout=datetime.timedelta(days=7))
    elif launcher != 'none':
        init_dist(launcher, backend='gloo', timeout=7 * 24 * 3600)


def _on_cpus(launcher: str) -> bool:
    """Whether there are several processes, and no GPU for them."""
    if launcher == 'pytorch':
        check_devices()
    if launcher == 'none' or get_device() != 'cpu':
        return False
    if launcher != 'pytorch':
        stop(
            f'--launcher {launcher} needs a GPU, and this machine shows none: '
            'for processes on CPUs use `mmkd train --gpus N`, or tools/dist_train.sh'
        )
    return True


def check_devices() -> None:
    """Compares the number of processes that torchrun started here with the number of GPUs.

    Raises:
        SystemExit: There are fewer GPUs than processes.
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


def _use_gloo(cfg: Config) -> None:
    # MMEngine's launcher calls torch.cuda.set_device and gives DDP a device id. It uses a process
    # group that exists already, and takes the arguments of the wrapper from the config.
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


# Both are plain RuntimeErrors in PyTorch: gloo raises no class of its own, and neither does the
# SIGCHLD handler that reports a worker. Only their messages tell them from other errors.
_WORKER = re.compile(r'DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\) (.*)')
_PEER = re.compile(
    r'(gloo|NCCL|ProcessGroup).*(connection (closed|reset|refused)|broken pipe|timed out|timeout'
    r'|remote (process|error)|abort)',
    re.IGNORECASE | re.DOTALL,
)


class LostProcessError(RuntimeError):
    """A data-loader worker or another process of the job has ended."""


def lost_process(message: str) -> str | None:
    """Explains an error that is due to a data-loader worker or another process that has ended.

    Args:
        message: of the error that PyTorch raised.

    Returns:
        The process, the usual causes and what to do; None for any other error.
    """
    if worker := _WORKER.search(message):
        return (
            f'data-loader worker (process {worker[1]}) {worker[2].strip(" .")}. Killed means '
            'mostly that memory ran out (dmesg says so): take fewer num_workers or a smaller '
            'batch_size. A bus error: /dev/shm is full (docker run --shm-size). Else run with '
            'num_workers=0, where an error in a transform shows'
        )
    if get_world_size() > 1 and _PEER.search(message):
        return (
            f'process {get_rank()} of {get_world_size()} lost another one of the job ('
            f'{message.strip().splitlines()[0]}). That one failed first: its own output, or the '
            'root cause that torchrun names, says why (exit code -9 is a kill, mostly for memory)'
        )
    return None
