"""Times detectors: images per second, one at a time and in batches.

    mmkd speed large.py teacher.pth student-1a2b3c4d.py student-1a2b3c4d.pth

Any number of networks, each on the images of its own test set, in turn in one process. Of a
distilled student's config the student is timed, at its own scale. What counts is pre-processing,
network and NMS without reading the images, the median, on one GPU or one thread of a CPU.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from typing import Any

import torch
from mmdet.registry import DATASETS
from mmengine.config import Config
from mmengine.dataset import pseudo_collate

from .. import cli
from ..analysis.comparison.measure import WARM_UP, device, load_network, time_step
from ..analysis.comparison.table import markdown_table
from ..datasets.two_views import apply_resolution
from ..engine.exit import stop
from ..recipe import plain_student


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = cli.command_parser(__doc__)
    parser.add_argument('networks', nargs='+', metavar='CONFIG CHECKPOINT')
    parser.add_argument(
        '--batch', type=int, nargs='+', default=[1, 8], metavar='N',
        help='images at a time (default: 1 8)',
    )  # fmt: skip
    parser.add_argument(
        '--images', type=int, default=200, help='images of each test set, at most (default: 200)'
    )
    args = parser.parse_args(argv)
    if len(args.networks) % 2:
        parser.error(f'each network is a config and a checkpoint: {args.networks[-1]} is alone')
    for option, value in [('--images', args.images), *(('--batch', n) for n in args.batch)]:
        if value < 1:
            parser.error(f'{option} {value}: a number from 1')
    return args


def load(config: str, checkpoint: str) -> tuple[Any, Any]:
    """The plain network with its weights, and its test set.

    Raises:
        SystemExit: a file is missing, or the config has no model or no test set.
        ValueError: the checkpoint does not fit the network.
    """
    cli.require_checkpoint(checkpoint)
    cfg = _plain(config)
    network = load_network(cfg, checkpoint)
    try:
        return network, DATASETS.build(cfg.test_dataloader.dataset)
    except FileNotFoundError as error:
        stop(f'the test set of {config} is not on this machine: {error}')


def _plain(config: str) -> Config:
    shell = argparse.Namespace(config=config, cfg_options=None, launcher='none', work_dir=None)
    cfg = cli.load_config(shell)
    for key in ('model', 'test_dataloader'):
        if not cfg.get(key):
            stop(f'{config} defines no {key}')
    cfg = apply_resolution(cfg)
    cfg.model = plain_student(cfg.model)
    return cfg


def speeds(networks: list[tuple[Any, Any]], batch: int, images: int) -> list[float]:
    """Images per second of each network in batches of ``batch``, medians over all steps.

    Raises:
        SystemExit: ``images`` or the smallest test set is less than one batch.
    """
    steps = min(images, *(len(dataset) for _, dataset in networks)) // batch
    if not steps:
        fewest = min(len(dataset) for _, dataset in networks)
        stop(f'--batch {batch} is more than --images {images}, or than the {fewest} of a test set')
    times: list[list[float]] = [[] for _ in networks]
    for step in range(-WARM_UP, steps):
        first = max(step, 0) * batch
        for (network, dataset), seen in zip(networks, times, strict=True):
            data = pseudo_collate([dataset[i] for i in range(first, first + batch)])
            seconds = time_step(network, data)
            if step >= 0:
                seen.append(seconds)
    return [batch / statistics.median(seen) for seen in times]


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    torch.set_num_threads(1)
    configs, checkpoints = args.networks[::2], args.networks[1::2]
    networks = [load(*each) for each in zip(configs, checkpoints, strict=True)]
    head = ['config', 'checkpoint', 'params (M)']
    rows = [
        [config, checkpoint, f'{sum(p.numel() for p in network.parameters()) / 1e6:.2f}']
        for config, checkpoint, (network, _) in zip(configs, checkpoints, networks, strict=True)
    ]
    for batch in args.batch:
        found = speeds(networks, batch, args.images)
        head += ['images/s' if batch == 1 else f'images/s, batch {batch}', 'times the first']
        for row, speed in zip(rows, found, strict=True):
            row += [f'{speed:.1f}', f'{speed / found[0]:.2f}']
    print(f'\n{markdown_table(head, rows)}\n\n{device()}')
    return 0
