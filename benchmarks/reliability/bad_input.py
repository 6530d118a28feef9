"""Plants bad input and counts what neither trains rightly nor is refused in a sentence.

The tables are of ``tests/planted.py``; the fuzz mutates a valid recipe at random. A last part times
the check of an annotation file of COCO's size.

    python benchmarks/reliability/bad_input.py --seeds 1500 --json bad_input.json
"""

import argparse
import logging
import random
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / 'tests')]

from campaign import report  # noqa: E402
from mmdet.utils import register_all_modules  # noqa: E402
from planted import ANNOTATIONS, RECIPES, Planter, check_recipe, fuzz  # noqa: E402

from mmkd.datasets import annotations  # noqa: E402


def large(images: int, boxes: int) -> dict:
    """A COCO file of that many images and boxes, without mistakes."""
    rng = random.Random(0)
    return dict(
        images=[dict(id=i, file_name=f'{i:012}.jpg', width=640, height=480) for i in range(images)],
        annotations=[
            dict(id=i, image_id=rng.randrange(images), category_id=rng.randrange(80), iscrowd=0,
                 bbox=[rng.uniform(0, 500), rng.uniform(0, 400), 60.5, 50.5], area=3055.25)
            for i in range(boxes)
        ],
        categories=[dict(id=i, name=str(i)) for i in range(80)],
    )  # fmt: skip


def main() -> int:
    """Runs it all and writes the counts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--json', type=Path, help='where the counts go')
    parser.add_argument('--seeds', type=int, default=200, help='mutated recipes')
    parser.add_argument('--boxes', type=int, default=860_000, help='of the timed file, 0: none')
    args = parser.parse_args()
    register_all_modules(init_default_scope=True)
    torch.set_num_threads(1)
    logging.disable(logging.INFO)  # each network that is built says how it was initialised
    began = time.perf_counter()
    rows = []
    with tempfile.TemporaryDirectory() as directory:
        planter = Planter(directory)
        for row in ANNOTATIONS:
            rows.append(dict(part='annotations', name=row.name, wrong=_run(planter.check, row)))
    for row in RECIPES:
        rows.append(dict(part='recipe', name=row.name, wrong=_run(check_recipe, row)))
    lost = [row for row in rows if row['wrong']]
    print(f'{len(rows)} planted, {len(lost)} lost', flush=True)
    for seed in range(args.seeds):
        if wrong := fuzz(seed):
            lost.append(dict(part='fuzz', name=str(seed), wrong=wrong))
            print(wrong, flush=True)
        if seed % 200 == 199:
            print(f'fuzz: {seed + 1} recipes', flush=True)
    notes = [f'{len(rows)} planted by hand, {args.seeds} recipes mutated at random']
    if args.boxes:
        images = args.boxes * 118 // 860
        content = large(images, args.boxes)
        start = time.perf_counter()
        annotations._check_coco(content, 'large', [str(i) for i in range(80)])
        seconds = time.perf_counter() - start
        notes.append(
            f'{images} images and {args.boxes} boxes are checked in {seconds:.1f} s once the file '
            'is read, without the look for image files'
        )
    for row in lost:
        print('LOST', row)
    rows += [row for row in lost if row['part'] == 'fuzz']
    tried = sum(row['part'] != 'fuzz' for row in rows) + args.seeds
    return report('bad_input', tried, len(lost), began, notes, rows, args.json)


def _run(check, row) -> str | None:
    try:
        return check(row)
    except Exception as error:  # what is looked for
        return f'{type(error).__name__}: {error}'


if __name__ == '__main__':
    sys.exit(main())
