"""Pretrain the backbone of configs/digits/plain.py, as zoo detectors start from ImageNet.

It learns to say which digit, or none, is in the middle of a window of the training split. Every
student then starts from the same backbone, as a user's does. From a seed; writes
checkpoints/digits_student_backbone.pth::

    python tools/pretrain_digits.py
"""

import argparse
import json
import random
import time
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from mmdet.registry import MODELS
from mmdet.utils import register_all_modules
from mmengine.config import Config
from mmengine.logging import MMLogger
from torch import Tensor, nn

from mmkd.engine.exit import run
from mmkd.io.checkpoint import to_plain

ROOT = Path(__file__).resolve().parents[1]
WINDOW = 40  # pixels; the largest digit has 48, half of all have less than 21
JITTER = 3  # pixels by which the middle of a window may miss the middle of the digit
BACKGROUND = 10  # the class of a window with no digit in its middle


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--config', default=ROOT / 'configs/digits/plain.py')
    parser.add_argument('--ann-file', help="training annotations, in the place of the config's")
    parser.add_argument('--out', default=ROOT / 'checkpoints/digits_student_backbone.pth')
    parser.add_argument('--epochs', type=int, default=40)
    parser.add_argument('--batch-size', type=int, default=64)
    parser.add_argument('--seed', type=int, default=0)
    return parser.parse_args(argv)


def read_windows(root: Path, ann_file: str, img: str) -> tuple[np.ndarray, list]:
    """The images (n, H, W, 3), and (image, centre x, centre y, class) of every window."""
    annotations = json.loads((root / ann_file).read_text())
    rows = {image['id']: row for row, image in enumerate(annotations['images'])}
    images = np.stack([cv2.imread(str(root / img / i['file_name'])) for i in annotations['images']])
    digits: dict[int, list] = {row: [] for row in rows.values()}
    for a in annotations['annotations']:
        x, y, w, h = a['bbox']
        digits[rows[a['image_id']]].append((x + w / 2, y + h / 2, a['category_id']))
    draw, windows = random.Random(0), []
    for row, found in digits.items():
        windows += [(row, x, y, label) for x, y, label in found]
        height, width = images.shape[1:3]
        x, y = draw.uniform(0, width), draw.uniform(0, height)
        if all(max(abs(x - u), abs(y - v)) > WINDOW / 2 for u, v, _ in found):
            windows.append((row, x, y, BACKGROUND))
    return images, windows


def cut(images: np.ndarray, windows: list, draw: random.Random) -> tuple[np.ndarray, np.ndarray]:
    """Windows (n, WINDOW, WINDOW, 3), reflected where they leave the image, and their classes."""
    half = WINDOW // 2
    patches = []
    for row, x, y, _ in windows:
        left = round(x + draw.uniform(-JITTER, JITTER)) - half
        top = round(y + draw.uniform(-JITTER, JITTER)) - half
        height, width = images.shape[1:3]
        columns = np.abs(np.arange(left, left + WINDOW))
        lines = np.abs(np.arange(top, top + WINDOW))
        columns = np.where(columns < width, columns, 2 * width - 2 - columns)
        lines = np.where(lines < height, lines, 2 * height - 2 - lines)
        patches.append(images[row][np.ix_(lines, columns)])
    return np.stack(patches), np.array([label for *_, label in windows])


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    register_all_modules()
    MMLogger.get_instance('mmengine', log_level='WARNING')  # not a line for each tensor
    random.seed(args.seed)
    np.random.seed(args.seed)
    torch.manual_seed(args.seed)
    cfg = Config.fromfile(args.config)
    backbone_cfg = dict(cfg.model.backbone)
    backbone_cfg.pop('init_cfg', None)
    backbone = MODELS.build(backbone_cfg)
    backbone.init_weights()
    preprocessor = MODELS.build(cfg.model.data_preprocessor)
    classifier = nn.Linear(cfg.model.neck.in_channels[-1], BACKGROUND + 1)
    network = nn.ModuleList([backbone, classifier]).train()

    def logits(patches: np.ndarray) -> Tensor:
        # In channels_last oneDNN's backward of a 1x1 convolution of 4 channels with stride 2 writes
        # beyond its memory where the CPU has AVX2 alone.
        pixels = torch.from_numpy(patches).permute(0, 3, 1, 2).float().flip(1).contiguous()
        pixels = (pixels - preprocessor.mean) / preprocessor.std
        return classifier(backbone(pixels)[-1].amax((2, 3)))

    sets = {}
    for split in ('train', 'val'):
        data = cfg[f'{split}_dataloader'].dataset
        if split == 'train' and args.ann_file:
            data.ann_file = args.ann_file
        sets[split] = read_windows(Path(data.data_root), data.ann_file, data.data_prefix.img)
    images, windows = sets['train']
    size, draw = args.batch_size, random.Random(args.seed)
    steps = args.epochs * (len(windows) // size)
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    start = time.time()
    for epoch in range(args.epochs):
        draw.shuffle(windows)
        total = 0.0
        for first in range(0, len(windows) - size + 1, size):
            patches, labels = cut(images, windows[first : first + size], draw)
            loss = F.cross_entropy(logits(patches), torch.from_numpy(labels))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item() * size
        print(
            f'epoch {epoch + 1} of {args.epochs}: loss {total / len(windows):.3f}, '
            f'{time.time() - start:.0f} s',
            flush=True,
        )
    network.eval()
    images, windows = sets['val']
    patches, labels = cut(images, windows, random.Random(0))
    with torch.no_grad():
        right = (logits(patches).argmax(1).numpy() == labels).mean()
    print(f'accuracy on {len(windows)} windows of val: {right:.3f}')
    torch.save(to_plain(dict(state_dict=backbone.state_dict())), args.out)
    print(f'wrote {args.out}')


if __name__ == '__main__':
    run(main)
