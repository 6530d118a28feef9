"""Images per second of detectors on the images of their own test sets, in turn, in one process.

    python tools/make_digits.py --out data/digits_large --size 192 --train 2000 --val 250 --test 500 --digits 4 10 --heights 14 60
    python benchmarks/speed.py configs/digits/large.py checkpoints/digits_large_teacher.pth \\
        configs/digits/half.py work_dirs/demo-resolution/runs/large_to_half-s0-*/epoch_8.pth

Behind the pipeline: preprocessing, network, NMS. Medians, on one thread.
"""  # noqa: E501

import argparse
import copy
import statistics
import time

import torch
from mmdet.registry import DATASETS, MODELS
from mmdet.utils import register_all_modules
from mmengine.config import Config
from mmengine.dataset import pseudo_collate

from mmkd.io.checkpoint import read_checkpoint
from mmkd.recipe import plain_student, without_terms


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('networks', nargs='+', metavar='CONFIG CHECKPOINT')
    parser.add_argument('--images', type=int, default=200, help='of each, in all')
    parser.add_argument('--batch', type=int, default=1, help='images at a time')
    args = parser.parse_args()
    if len(args.networks) % 2:
        parser.error('each network is a config and a checkpoint')
    register_all_modules()
    torch.set_num_threads(1)
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    names, networks, batches = args.networks[::2], [], []
    for config, checkpoint in zip(names, args.networks[1::2], strict=True):
        cfg = Config.fromfile(config)
        network = MODELS.build(plain_student(cfg.model)).to(device).eval()
        network.load_state_dict(without_terms(read_checkpoint(checkpoint)['state_dict']))
        networks.append(network)
        dataset = DATASETS.build(cfg.test_dataloader.dataset)
        batches.append(
            [
                pseudo_collate([dataset[i] for i in range(first, first + args.batch)])
                for first in range(0, min(args.images, len(dataset)) - args.batch + 1, args.batch)
            ]
        )
    times: list[list[float]] = [[] for _ in networks]
    with torch.no_grad():
        for i in range(-5, min(map(len, batches))):  # five to warm up
            for network, own, seen in zip(networks, batches, times, strict=True):
                batch = copy.deepcopy(own[i])
                start = time.perf_counter()
                network.test_step(batch)
                if device == 'cuda':
                    torch.cuda.synchronize()
                if i >= 0:
                    seen.append(time.perf_counter() - start)
    speeds = [args.batch / statistics.median(seen) for seen in times]
    for name, speed in zip(names, speeds, strict=True):
        print(f'{name}: {speed:.0f} images/s, {speed / speeds[0]:.2f} times {names[0]}')


if __name__ == '__main__':
    main()
