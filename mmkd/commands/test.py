"""Tests a detector; the options are MMDetection's.

Of a distilled student's config only the student is built.
"""

import argparse
import os.path as osp
from collections.abc import Sequence
from copy import deepcopy

import torch
from mmdet.engine.hooks.utils import trigger_visualization_hook
from mmdet.evaluation import DumpDetResults
from mmdet.utils import setup_cache_size_limit_of_dynamo
from mmengine.config import Config, ConfigDict

from .. import cli
from ..datasets.two_views import apply_resolution
from ..engine.class_names import class_names
from ..engine.exit import leave, stop
from ..engine.processes import build_runner
from ..engine.testing import check_complete
from ..engine.work_dir import reporting_full_disk
from ..io.checkpoint import to_plain
from ..recipe import plain_student


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description='Test a detector')
    parser.add_argument('config', help='test config file path')
    parser.add_argument('checkpoint', help='checkpoint file')
    parser.add_argument('--work-dir', help='the folder for the file with the evaluation metrics')
    parser.add_argument(
        '--out',
        help='write the predictions: a pickle (.pkl), or tensors in plain containers (.pth)',
    )
    parser.add_argument('--show', action='store_true', help='show the predictions')
    parser.add_argument(
        '--show-dir', help='folder below work_dir/timestamp for images with predictions painted in'
    )
    parser.add_argument(
        '--wait-time', type=float, default=2, help='seconds between images with --show'
    )
    parser.add_argument('--tta', action='store_true', help='test-time augmentation')
    cli.add_shared_arguments(parser)
    return cli.parse(parser, argv)


def apply_tta(cfg: Config) -> None:
    """Applies ``tta_model`` and ``tta_pipeline`` of the config.

    Without them MMDetection's defaults are used: each image and its mirror image, merged by NMS at
    IoU 0.5 into at most 100 boxes.
    """
    if 'tta_model' not in cfg:
        cfg.tta_model = dict(
            type='DetTTAModel',
            tta_cfg=dict(nms=dict(type='nms', iou_threshold=0.5), max_per_img=100),
        )
    dataset = cfg.test_dataloader.dataset
    if 'tta_pipeline' not in cfg:
        inner = dataset
        while 'dataset' in inner:
            inner = inner.dataset
        keys = ('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor')
        flips = [dict(type='RandomFlip', prob=prob) for prob in (1.0, 0.0)]
        pack = dict(type='PackDetInputs', meta_keys=(*keys, 'flip', 'flip_direction'))
        cfg.tta_pipeline = [
            *deepcopy(inner.pipeline)[:-1],
            dict(type='TestTimeAug', transforms=[flips, [pack]]),
        ]
    cfg.model = ConfigDict(**cfg.tta_model, module=cfg.model)
    dataset.pipeline = cfg.tta_pipeline


class DumpPlain(DumpDetResults):
    """Writes the predictions as tensors in plain containers, ``{'detections': [...]}``."""

    def __init__(self, out_file_path: str) -> None:
        super().__init__(out_file_path='.pkl')  # no other is accepted
        self.out_file_path = out_file_path

    def compute_metrics(self, results: list) -> dict:
        torch.save(to_plain({'detections': results}), self.out_file_path)
        return {}


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    if args.out is not None and not args.out.endswith(('.pkl', '.pickle', '.pth')):
        stop(
            f'--out {args.out}: predictions are a pickle or, to be read without running code, a '
            'file of torch.save; the name must end in .pkl or .pth'
        )
    cli.require_checkpoint(args.checkpoint)
    setup_cache_size_limit_of_dynamo()
    cfg = cli.load_config(args)
    cfg.load_from = args.checkpoint if '://' in args.checkpoint else osp.abspath(args.checkpoint)
    # Before plain_student() removes the scale, which the test needs.
    cfg = apply_resolution(cfg)
    cfg.model = plain_student(cfg.model)
    if args.show or args.show_dir:
        cfg = trigger_visualization_hook(cfg, args)
    if args.tta:
        apply_tta(cfg)

    tests = {'test_dataloader': cfg.test_dataloader}
    runner = build_runner(cfg)
    # RelabelledTestLoop tests a checkpoint of other classes on purpose.
    classes = None if 'labels' in cfg.test_cfg else class_names(Config(tests))
    check_complete(runner.model, args.checkpoint, classes)
    if args.out is not None:
        kind = DumpPlain if args.out.endswith('.pth') else DumpDetResults
        runner.test_evaluator.metrics.append(kind(out_file_path=args.out))
    with reporting_full_disk(cfg.work_dir):
        runner.test()
    leave()
