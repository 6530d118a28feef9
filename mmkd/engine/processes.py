"""The processes of a run: those of its launcher, and the workers of its data loaders."""

from __future__ import annotations

import datetime
import gc
import os
import re
import sys
from typing import Any

import torch
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.dist import get_rank, get_world_size
from mmengine.model import is_model_wrapper
from mmengine.registry import RUNNERS
from mmengine.runner import Runner
from torch import nn
from torch.utils.data import DataLoader
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from .exit import stop
from .work_dir import check_work_dir, reporting_full_disk


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
    with reporting_full_disk(cfg.work_dir):
        return RUNNERS.build(cfg)


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


_PEER = re.compile(
    r'(gloo|NCCL|ProcessGroup).*(connection (closed|reset|refused)|broken pipe|timed out|timeout'
    r'|remote (process|error)|abort)',
    re.IGNORECASE | re.DOTALL,
)
"""What gloo and NCCL say of a process that no longer answers."""


class LostProcessError(RuntimeError):
    """A process that the run cannot do without has ended."""


def lost_process(said: str) -> str | None:
    """What it means that a data-loader worker, or another process of the job, is gone.

    Args:
        said: PyTorch's words.

    Returns:
        Which process, the usual cause and the way out; None where the words are of something else.
    """
    if worker := re.search(r'DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\) (.*)', said):
        return (
            f'data-loader worker (process {worker[1]}) {worker[2].strip(" .")}. Killed means '
            'mostly that memory ran out (dmesg says so): take fewer num_workers or a smaller '
            'batch_size. A bus error: /dev/shm is full (docker run --shm-size). Else run with '
            'num_workers=0, where an error in a transform shows'
        )
    if get_world_size() > 1 and _PEER.search(said):
        return (
            f'process {get_rank()} of {get_world_size()} lost another one of the job ('
            f'{said.strip().splitlines()[0]}). That one failed first: its own output, or the '
            'root cause that torchrun names, says why (exit code -9 is a kill, mostly for memory)'
        )
    return None


def end_workers(loader: Any) -> None:
    """Let the workers of a data loader end now, while they can still be told to.

    Python sends those that live at its end two SIGTERM at once and waits. A worker passes over the
    first, and two that come together are one to it: the process would wait for ever.

    Args:
        loader: a data loader that may be used again; anything else is passed over.
    """
    if not isinstance(loader, DataLoader) or not loader.num_workers:
        return
    loader._iterator = None
    # A traceback or a loop may hold the iterator, so letting go of it is not enough.
    for each in gc.get_objects():
        if type(each) is _MultiProcessingDataLoaderIter and each._dataset is loader.dataset:
            each._shutdown_workers()


def unwrap(model: nn.Module) -> nn.Module:
    return model.module if is_model_wrapper(model) else model
