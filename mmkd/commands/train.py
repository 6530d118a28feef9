"""Trains a detector, with or without distillation; the options are MMDetection's."""

import argparse
import os.path as osp
from collections.abc import Sequence

from mmdet.utils import setup_cache_size_limit_of_dynamo
from mmengine.config import Config
from mmengine.device import get_device

from .. import cli
from ..engine.exit import leave, stop
from ..engine.processes import build_runner
from ..engine.work_dir import locked, reporting_full_disk


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description='Train a detector')
    parser.add_argument('config', help='train config file path')
    parser.add_argument('--work-dir', help='the folder for logs and checkpoints')
    parser.add_argument('--amp', action='store_true', help='automatic mixed precision')
    parser.add_argument(
        '--auto-scale-lr',
        action='store_true',
        help='scale the learning rate by the batch size over auto_scale_lr.base_batch_size',
    )
    parser.add_argument(
        '--resume',
        nargs='?',
        const='auto',
        metavar='CHECKPOINT',
        help='resume from this checkpoint, or without a value from the last one in the work folder',
    )
    cli.add_shared_arguments(parser)
    return cli.parse(parser, argv)


def apply_amp(cfg: Config, amp: bool) -> None:
    """Turns mixed precision on; refuses it on a CPU, also if the config asks for it."""
    if amp:
        cfg.optim_wrapper.type = 'AmpOptimWrapper'
        cfg.optim_wrapper.loss_scale = 'dynamic'
    if cfg.optim_wrapper.get('type') == 'AmpOptimWrapper' and get_device() == 'cpu':
        more = [key for key in ('dtype', 'loss_scale', 'use_fsdp') if key in cfg.optim_wrapper]
        stop(
            'mixed precision (--amp, or optim_wrapper.type=AmpOptimWrapper in the config) needs a '
            "GPU: MMEngine's AmpOptimWrapper does not run on a CPU, and this machine shows no "
            'other device; leave --amp out, or write optim_wrapper.type=OptimWrapper in the config'
            + (f' and remove its {", ".join(more)}' if more and not amp else '')
        )


def apply_auto_scale_lr(cfg: Config) -> None:
    """Turns the scaling of the learning rate on, if the config has a base batch size."""
    if 'base_batch_size' not in cfg.get('auto_scale_lr', {}):
        stop(
            '--auto-scale-lr: the config names no auto_scale_lr.base_batch_size, the batch size '
            'its learning rate was chosen for'
        )
    cfg.auto_scale_lr.enable = True


def apply_resume(cfg: Config, resume: str | None) -> None:
    """Sets the checkpoint to resume; the Runner finds the last one if none is named."""
    if resume is None:
        return
    cfg.resume = True
    cfg.load_from = None
    if resume == 'auto':
        return
    if '://' not in resume and not osp.isfile(osp.expanduser(resume)):
        stop(f'--resume {resume}: no such checkpoint')
    # From the shell's folder, whatever lies beside the config.
    cfg.load_from = resume if '://' in resume else osp.abspath(osp.expanduser(resume))


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    setup_cache_size_limit_of_dynamo()
    cfg = cli.load_config(args)
    apply_amp(cfg, args.amp)
    if args.auto_scale_lr:
        apply_auto_scale_lr(cfg)
    apply_resume(cfg, args.resume)
    with locked(cfg.work_dir, cfg.launcher):
        runner = build_runner(cfg)
        with reporting_full_disk(cfg.work_dir):
            runner.train()
    leave()
