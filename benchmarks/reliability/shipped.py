"""Trains each config of configs/ for 60 steps with every guard on, and counts what mmkd says.

python benchmarks/reliability/shipped.py --json shipped.json
python benchmarks/reliability/shipped.py --json shipped.json --only digits/   # the others stay

configs/digits/ as they are, on digits drawn anew. configs/kd/ without their downloads: both
networks at random, images of noise in the layout of COCO and VOC, an eighth of the size and of the
boxes sampled.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from mmdet.datasets import CocoDataset, VOCDataset
from mmdet.utils import register_all_modules
from mmengine.config import Config
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / 'tests')]

import faults  # noqa: E402
from campaign import report  # noqa: E402
from test_check_pair import tool  # noqa: E402

from mmkd import cli  # noqa: E402
from mmkd.engine.processes import build_runner  # noqa: E402

STEPS = 60
"""A term that stays at 0 is named after 50."""
SMALLER = 8
IMAGES = 2 * STEPS
WIDTH, HEIGHT = 320, 200
VOC = '<bndbox><xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax></bndbox>'


def noise(directory: Path, seed: int) -> list[tuple[str, list[tuple[int, int, int, int]]]]:
    """Write images; the names of their files, without suffix, and their boxes (xyxy)."""
    directory.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    found = []
    for number in range(IMAGES):
        pixels = rng.integers(0, 256, (HEIGHT // 8, WIDTH // 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((WIDTH, HEIGHT)).save(directory / f'{number:06d}.jpg')
        boxes = []
        for _ in range(3):
            width, height = rng.integers(64, 181, 2).tolist()
            x, y = int(rng.integers(WIDTH - width)), int(rng.integers(HEIGHT - height))
            boxes.append((x, y, x + width, y + height))
        found.append((f'{number:06d}', boxes))
    return found


def coco(root: Path) -> None:
    """The training images of COCO, as far as their layout goes."""
    classes = CocoDataset.METAINFO['classes']
    images, annotations = [], []
    for name, boxes in noise(root / 'coco/train2017', seed=0):
        number = len(images) + 1
        images.append(dict(id=number, file_name=f'{name}.jpg', width=WIDTH, height=HEIGHT))
        for x0, y0, x1, y1 in boxes:
            box = [x0, y0, x1 - x0, y1 - y0]
            annotations.append(
                dict(
                    id=len(annotations) + 1,
                    image_id=number,
                    category_id=len(annotations) % len(classes) + 1,
                    bbox=box,
                    area=box[2] * box[3],
                    iscrowd=0,
                )
            )
    categories = [dict(id=i + 1, name=name) for i, name in enumerate(classes)]
    path = root / 'coco/annotations/instances_train2017.json'
    path.parent.mkdir()
    path.write_text(json.dumps(dict(images=images, annotations=annotations, categories=categories)))


def voc(root: Path) -> None:
    """VOC's."""
    classes = VOCDataset.METAINFO['classes']
    for seed, year in enumerate(('VOC2007', 'VOC2012')):
        folder = root / 'VOCdevkit' / year
        images = noise(folder / 'JPEGImages', seed)
        for part in ('Annotations', 'ImageSets/Main'):
            (folder / part).mkdir(parents=True)
        (folder / 'ImageSets/Main/trainval.txt').write_text('\n'.join(n for n, _ in images))
        for number, (name, boxes) in enumerate(images):
            objects = ''.join(
                f'<object><name>{classes[(3 * number + i) % len(classes)]}</name>'
                f'<difficult>0</difficult>{VOC.format(*box)}</object>'
                for i, box in enumerate(boxes)
            )
            (folder / f'Annotations/{name}.xml').write_text(
                f'<annotation><size><width>{WIDTH}</width><height>{HEIGHT}</height></size>'
                f'{objects}</annotation>'
            )


def config(path: Path, root: Path) -> Config:
    """The config as tools/train.py has it, and, of configs/kd/, what stands in for downloads."""
    cfg = cli.load_config(
        argparse.Namespace(
            config=str(path), cfg_options=None, launcher='none', work_dir=tempfile.mkdtemp(dir=root)
        )
    )
    cfg.val_cfg = cfg.val_dataloader = cfg.val_evaluator = None
    cfg.test_cfg = cfg.test_dataloader = cfg.test_evaluator = None
    cfg.experiment_name = f'{path.stem}-{time.time_ns()}'
    cfg.train_dataloader.update(num_workers=0, persistent_workers=False)
    smaller = 1 if 'digits' in path.parts else SMALLER
    _move(cfg.train_dataloader.dataset, root, smaller)
    _move(cfg.model.get('distillation'), root, smaller)
    if 'digits' in path.parts:
        return cfg
    cfg.model.backbone.init_cfg = None
    cfg.model.train_cfg.rcnn.sampler.num //= SMALLER  # RoIAlign takes most of the time
    if 'teacher_config' in cfg.model:
        cfg.model.teacher_ckpt = 'random'
        if resolution := cfg.model.distillation.get('resolution'):
            for side, (width, height) in resolution.items():
                resolution[side] = (width // SMALLER, height // SMALLER)
    cfg.auto_scale_lr.enable = True
    return cfg


def _move(node: object, root: Path, smaller: int) -> None:
    if isinstance(node, list):
        for each in node:
            _move(each, root, smaller)
    elif isinstance(node, dict):
        for key, value in node.items():
            if isinstance(value, str) and value.startswith('data/'):
                node[key] = value.replace('data/', f'{root}/', 1)
        if node.get('type') == 'Resize':
            node['scale'] = tuple(side // smaller for side in node['scale'])
        _move(list(node.values()), root, smaller)


def train(cfg: Config) -> list[str]:
    """What mmkd and MMEngine said, warnings, and last the error that stopped the run."""
    heard = faults.Heard()
    try:
        runner = build_runner(cfg)
        runner.logger.addHandler(heard)
        faults.at(STEPS, faults.enough)(runner)
        runner.train()
    except faults.Enough:
        pass
    except (Exception, SystemExit) as error:  # whatever stops a run: its words are counted
        if isinstance(getattr(error, 'code', None), int):
            raise  # told to end
        heard.said.append(f'{type(error).__name__}: {error}')
    else:
        heard.said.append(f'ended after {runner.iter} steps')
    return heard.said


def main() -> int:
    parser = argparse.ArgumentParser(description='Looks for false alarms on the shipped configs')
    parser.add_argument('--json', help='where the result goes')
    parser.add_argument('--only', default='', help='configs whose path contains this')
    args = parser.parse_args()
    register_all_modules()
    torch.set_num_threads(1)
    paths = sorted(p for p in (ROOT / 'configs').rglob('*.py') if '_base_' not in p.parts)
    rows, start = [], time.perf_counter()
    if args.only and args.json and Path(args.json).exists():
        before = json.loads(Path(args.json).read_text())
        rows = [row for row in before['rows'] if args.only not in row['id']]
        start -= sum(row['seconds'] for row in rows)
    with tempfile.TemporaryDirectory(prefix='mmkd-shipped-') as directory:
        root = Path(directory)
        make = tool('make_digits').make
        make(root / 'digits', 96, 1000, 2, 1, 7)
        make(root / 'digits_large', 192, 1000, 2, 1, 7, (4, 10), (14, 60))
        make(root / 'digits_first', 96, 1000, 2, 1, 7, half='first')
        make(root / 'digits_second', 96, 1000, 2, 1, 7, half='second', labelled=500)
        coco(root)
        voc(root)
        for path in paths:
            name = str(path.relative_to(ROOT))
            if args.only in name:
                begun = time.perf_counter()
                said = train(config(path, root))
                seconds = round(time.perf_counter() - begun, 1)
                rows.append({'id': name, 'held': not said, 'said': said, 'seconds': seconds})
                print('\nLOST' if said else '\nok  ', name, said or '', flush=True)
    lost = sum(not row['held'] for row in rows)
    notes = [f'{STEPS} steps each; configs/kd with random networks on images of noise']
    return report('shipped', len(rows), lost, start, notes, rows, args.json)


if __name__ == '__main__':
    sys.exit(main())
