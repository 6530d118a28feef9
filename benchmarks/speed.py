"""Images per second of two detectors on the images of their own test sets, in turn, in one process.

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


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('pairs', nargs=4, metavar=('CONFIG', 'CHECKPOINT') * 2)
    parser.add_argument('--images', type=int, default=200, help='of each, in all')
    parser.add_argument('--batch', type=int, default=1, help='images at a time')
    args = parser.parse_args()
    register_all_modules()
    torch.set_num_threads(1)
    networks, batches = [], []
    for config, checkpoint in (args.pairs[:2], args.pairs[2:]):
        cfg = Config.fromfile(config)
        network = MODELS.build(cfg.model).eval()
        state = read_checkpoint(checkpoint)['state_dict']
        own = {k: v for k, v in state.items() if not k.startswith(('kd_terms.', 'kd_adapters.'))}
        network.load_state_dict(own)
        networks.append(network)
        dataset = DATASETS.build(cfg.test_dataloader.dataset)
        batches.append(
            [
                pseudo_collate([dataset[i] for i in range(first, first + args.batch)])
                for first in range(0, args.images, args.batch)
            ]
        )
    times: list[list[float]] = [[], []]
    with torch.no_grad():
        for i in range(-5, len(batches[0])):  # five to warm up
            for network, own, seen in zip(networks, batches, times, strict=True):
                batch = copy.deepcopy(own[i])
                start = time.perf_counter()
                network.test_step(batch)
                if i >= 0:
                    seen.append(time.perf_counter() - start)
    speeds = [args.batch / statistics.median(seen) for seen in times]
    for config, speed in zip(args.pairs[::2], speeds, strict=True):
        print(f'{config}: {speed:.0f} images/s')
    print(f'the second is {speeds[1] / speeds[0]:.2f} times as fast')


if __name__ == '__main__':
    main()
