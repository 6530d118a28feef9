"""Write the embedded detection benchmark: real handwritten digits in real photographs.

scikit-learn ships 1,797 scans of handwritten digits (8x8) and two photographs inside its wheel, so
the data set needs no download. Digits are pasted, rotated, sheared, faint, blurred, half hidden and
noisy, into crops of the photographs, and written as three COCO data sets (``train``, ``val``,
``test``). Splits share nothing: every digit scan belongs to one split, and so does every pixel
column of each photograph. The same arguments give the same bytes.

    python tools/make_digits.py                 # data/digits/{train,val,test}{/,.json}

With ``--half`` the training images are made of one half of the training split's scans and columns
alone, so that two data sets share nothing but ``val`` and ``test``. With ``--labelled N`` the first
N training images are listed in ``labelled.json`` too, and the others, without what is in them, in
``unlabelled.json``.
"""

import argparse
import json
import os
import shutil
import sys
import time
from pathlib import Path

import cv2
import numpy as np
from sklearn.datasets import load_digits, load_sample_images

CLASSES = tuple('0123456789')
SPLITS = ('train', 'val', 'test')
#: where each split's share ends, for the scans of a class and the columns of a photograph
SHARES = {'train': (0.0, 0.6), 'val': (0.6, 0.77), 'test': (0.77, 1.0)}
#: part of the marker: raise it when the pictures change, so that old ones are made again
VERSION = 1
MARKER = 'made.json'
#: a pixel belongs to a digit's box where the pasted stroke is at least this opaque
VISIBLE = 0.3
MIN_BOX = 6
DIGITS = (2, 6)
HALVES = ('first', 'second')


def split_digits(labels: np.ndarray, seed: int) -> dict[str, np.ndarray]:
    """Share the scans out, class by class.

    Args:
        labels: class of each scan, shape (N,).
        seed: seed of the shuffle.

    Returns:
        Indices of the scans of each split, sorted; together they are 0..N-1, each once.
    """
    rng = np.random.default_rng([seed, 0])
    parts: dict[str, list[np.ndarray]] = {split: [] for split in SPLITS}
    for label in range(len(CLASSES)):
        own = rng.permutation(np.flatnonzero(labels == label))
        for split, (start, end) in SHARES.items():
            parts[split].append(own[round(start * len(own)) : round(end * len(own))])
    indices = {split: np.sort(np.concatenate(part)) for split, part in parts.items()}
    every = np.sort(np.concatenate(list(indices.values())))
    assert np.array_equal(every, np.arange(len(labels))), 'a digit is in two splits, or in none'
    return indices


def split_columns(width: int) -> dict[str, tuple[int, int]]:
    """Columns [start, end) of a photograph of ``width`` pixels that belong to each split."""
    columns = {
        split: (round(start * width), round(end * width)) for split, (start, end) in SHARES.items()
    }
    taken = [x for start, end in columns.values() for x in range(start, end)]
    assert len(taken) == len(set(taken)), 'a stretch of photograph is in two splits'
    return columns


def halve(
    scans: np.ndarray, labels: np.ndarray, regions: list[np.ndarray], half: str, seed: int
) -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
    """One half of the scans of each class, and of the columns of each photograph."""
    which = HALVES.index(half)
    rng = np.random.default_rng([seed, 2])
    own = [rng.permutation(np.flatnonzero(labels == label)) for label in range(len(CLASSES))]
    kept = np.sort(np.concatenate([np.array_split(each, 2)[which] for each in own]))
    return scans[kept], labels[kept], [np.array_split(r, 2, axis=1)[which] for r in regions]


def background(regions: list[np.ndarray], size: int, rng: np.random.Generator) -> np.ndarray:
    """A random square of one region, turned, mirrored, lighter or darker, float32 (S, S, 3)."""
    region = regions[rng.integers(len(regions))]
    limit = min(*region.shape[:2], round(1.1 * size))
    side = int(rng.integers(min(round(0.6 * size), limit), limit + 1))
    y = int(rng.integers(region.shape[0] - side + 1))
    x = int(rng.integers(region.shape[1] - side + 1))
    crop = np.rot90(region[y : y + side, x : x + side], int(rng.integers(4)))
    if rng.random() < 0.5:
        crop = crop[:, ::-1]
    crop = cv2.resize(
        np.ascontiguousarray(crop, np.float32), (size, size), interpolation=cv2.INTER_LINEAR
    )
    return (crop - 127.5) * rng.uniform(0.6, 1.1) + 127.5 + rng.uniform(-30, 30)


def stroke(scan: np.ndarray, height: float, rng: np.random.Generator) -> np.ndarray:
    """One 8x8 scan as an opacity map about ``height`` pixels high, float32 in [0, 1].

    Turned by up to 25 degrees, sheared by up to 0.35, stretched by up to a quarter.
    """
    angle = np.deg2rad(rng.uniform(-25, 25))
    shear = rng.uniform(-0.35, 0.35)
    stretch = np.exp(rng.uniform(-0.22, 0.22))
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    matrix = turn @ np.array([[1, shear], [0, 1]]) * (height / 8) * np.array([[stretch, 1]])
    side = int(np.ceil(2 * height))
    # cv2 puts pixel centres at integers: the centre of the scan goes to the centre of the map
    shift = (side - 1) / 2 - matrix @ np.array([3.5, 3.5])
    opacity = cv2.warpAffine(
        scan.astype(np.float32) / 16,
        np.column_stack([matrix, shift]),
        (side, side),
        flags=cv2.INTER_CUBIC,
    )
    return np.clip((opacity - 0.15) / 0.6, 0, 1).astype(np.float32)


def tight_box(opacity: np.ndarray) -> tuple[int, int, int, int] | None:
    """Box (x, y, width, height) of the pixels that are VISIBLE, None if there are none."""
    ys, xs = np.nonzero(opacity >= VISIBLE)
    if not len(ys):
        return None
    x, y = int(xs.min()), int(ys.min())
    return x, y, int(xs.max()) + 1 - x, int(ys.max()) + 1 - y


def overlap(a: tuple[int, ...], b: tuple[int, ...]) -> float:
    """Intersection of two (x, y, w, h) boxes over the area of the smaller one."""
    w = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
    h = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1])
    return max(w, 0) * max(h, 0) / min(a[2] * a[3], b[2] * b[3])


def paste(image: np.ndarray, opacity: np.ndarray, rng: np.random.Generator) -> None:
    """Draw a stroke into ``image`` in place, somewhat lighter or darker than what is there."""
    inside = image[opacity >= VISIBLE].mean(axis=0)
    contrast = rng.uniform(28, 90) * rng.choice([-1.0, 1.0])
    if not 0 <= inside.mean() + contrast <= 255:
        contrast = -contrast
    colour = inside + contrast + rng.uniform(-20, 20, 3)
    alpha = opacity[..., None] * rng.uniform(0.7, 1.0)
    image += (colour.astype(np.float32) - image) * alpha.astype(np.float32)


def draw(
    scans: np.ndarray,
    labels: np.ndarray,
    regions: list[np.ndarray],
    size: int,
    key: list[int],
    digits: tuple[int, int] = DIGITS,
    heights: tuple[float, float] | None = None,
) -> tuple[np.ndarray, list[tuple[int, tuple[int, int, int, int]]]]:
    """One image and its digits.

    Args:
        scans: the split's digits, shape (N, 8, 8), values 0..16.
        labels: their classes, shape (N,).
        regions: the split's part of each photograph, uint8 (H, W, 3).
        size: side of the image in pixels.
        key: seed of this image alone, so that an image does not depend on how many there are.
        digits: fewest and most digits tried.
        heights: smallest and largest height of a digit in pixels; None: 12 to 0.4 of the image.

    Returns:
        The image, uint8 (size, size, 3), and (class, (x, y, w, h)) of each digit.
    """
    rng = np.random.default_rng(key)
    image = background(regions, size, rng)
    objects: list[tuple[int, tuple[int, int, int, int]]] = []
    low, high = heights or (12, 0.4 * size)
    for _ in range(int(rng.integers(digits[0], digits[1] + 1))):
        number = int(rng.integers(len(scans)))
        height = float(np.exp(rng.uniform(np.log(low), np.log(high))))
        small = stroke(scans[number], height, rng)
        x, y = (int(v) for v in rng.integers(-height // 2, size - 1.5 * height, 2))
        opacity = np.zeros((size, size), np.float32)
        top, left = max(y, 0), max(x, 0)
        part = small[top - y : size - y, left - x : size - x]
        opacity[top : top + part.shape[0], left : left + part.shape[1]] = part
        whole = tight_box(small)
        if rng.random() < 0.25 and whole is not None:  # a bar across it: what is under it is gone
            bar = int(rng.integers(2, max(3, round(0.2 * height)) + 1))
            at = int(rng.integers(whole[2] - bar)) if whole[2] > bar else 0
            opacity[:, max(x + whole[0] + at, 0) : max(x + whole[0] + at + bar, 0)] = 0
        box = tight_box(opacity)
        if box is None or min(box[2:]) < MIN_BOX // 2 or max(box[2:]) < MIN_BOX:
            continue
        if any(overlap(box, other) > 0.15 for _, other in objects):
            continue
        paste(image, opacity, rng)
        objects.append((int(labels[number]), box))
    blur = rng.uniform(0.0, 1.0)
    if blur > 0.3:
        image = cv2.GaussianBlur(image, (0, 0), blur)
    image = image + rng.normal(0, rng.uniform(4, 16), image.shape)
    return np.clip(np.rint(image), 0, 255).astype(np.uint8), objects


def write_split(
    folder: Path,
    split: str,
    count: int,
    size: int,
    seed: int,
    scans: np.ndarray,
    labels: np.ndarray,
    regions: list[np.ndarray],
    digits: tuple[int, int],
    heights: tuple[float, float] | None,
    stream: int = 1,
) -> None:
    """Write ``count`` images to folder/split and their COCO annotations to folder/split.json."""
    (folder / split).mkdir()
    images, annotations = [], []
    for index in range(count):
        key = [seed, stream, SPLITS.index(split), index]
        pixels, objects = draw(scans, labels, regions, size, key, digits, heights)
        name = f'{index:06d}.jpg'
        target = str(folder / split / name)
        if not cv2.imwrite(target, pixels[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 95]):
            raise OSError(f'could not write {target}: is the disk full?')
        images.append(dict(id=index, file_name=name, width=size, height=size))
        for label, box in objects:
            annotations.append(
                dict(
                    id=len(annotations) + 1,
                    image_id=index,
                    category_id=label,
                    bbox=list(box),
                    area=box[2] * box[3],
                    iscrowd=0,
                )
            )
        if (index + 1) % 500 == 0 or index + 1 == count:
            print(f'  {split}: {index + 1}/{count} images, {len(annotations)} digits', flush=True)
    categories = [dict(id=label, name=name) for label, name in enumerate(CLASSES)]
    content = dict(images=images, annotations=annotations, categories=categories)
    (folder / f'{split}.json').write_text(json.dumps(content))


def list_apart(folder: Path, labelled: int) -> None:
    """Write labelled.json, of the first training images, and unlabelled.json, of the others."""
    content = json.loads((folder / 'train.json').read_text())
    first, others = content['images'][:labelled], content['images'][labelled:]
    boxes = [a for a in content['annotations'] if a['image_id'] < labelled]
    for name, images, found in (('labelled', first, boxes), ('unlabelled', others, [])):
        each = dict(content, images=images, annotations=found)
        (folder / f'{name}.json').write_text(json.dumps(each))


def is_complete(out: Path, parameters: dict) -> bool:
    """Whether ``out`` holds every image of a data set made with just these parameters."""
    marker = out / MARKER
    if not marker.is_file() or json.loads(marker.read_text()) != parameters:
        return False
    return all(
        (out / f'{split}.json').is_file()
        and sum(1 for _ in (out / split).glob('*.jpg')) == parameters[split]
        for split in SPLITS
    )


def make(
    out: Path,
    size: int,
    train: int,
    val: int,
    test: int,
    seed: int,
    digits: tuple[int, int] = DIGITS,
    heights: tuple[float, float] | None = None,
    half: str | None = None,
    labelled: int | None = None,
) -> bool:
    """Write the data set to ``out`` unless it is there already.

    It is written beside ``out`` and moved there once it is complete.

    Args:
        out: folder of the data set.
        size: side of the square images in pixels, 64 at least.
        train, val, test: number of images of each split.
        seed: seed of everything that is drawn.
        digits, heights: see :func:`draw`.
        half: which half of the training split's scans and columns; None: all.
        labelled: how many training images are listed apart; None: no lists.

    Returns:
        Whether anything was written.

    Raises:
        ValueError: an argument out of range.
        FileExistsError: ``out`` holds something that this script did not write.
    """
    if size < 64:
        raise ValueError(f'--size {size}: digits are up to 0.4 of it, so it must be 64 or more')
    if min(train, val, test) < 1:
        raise ValueError(f'--train {train} --val {val} --test {test}: each needs one image or more')
    if not 1 <= digits[0] <= digits[1]:
        raise ValueError(f'--digits {digits[0]} {digits[1]}: fewest first, one or more')
    if heights is not None and not MIN_BOX <= heights[0] <= heights[1] <= size / 2:
        raise ValueError(
            f'--heights {heights[0]:g} {heights[1]:g}: smallest first, from {MIN_BOX} pixels to '
            f'half of --size {size}'
        )
    if labelled is not None and not 0 < labelled < train:
        raise ValueError(f'--labelled {labelled}: it must be above 0 and below --train {train}')
    parameters: dict = dict(version=VERSION, size=size, train=train, val=val, test=test, seed=seed)
    if digits != DIGITS:
        parameters['digits'] = list(digits)
    if heights is not None:
        parameters['heights'] = list(heights)
    for name, value in (('half', half), ('labelled', labelled)):
        if value is not None:
            parameters[name] = value
    if is_complete(out, parameters):
        print(f'{out} is there and complete ({train}/{val}/{test} images of {size}x{size})')
        return False
    if out.exists() and any(out.iterdir()) and not (out / MARKER).is_file():
        raise FileExistsError(
            f'{out} is not empty and has no {MARKER}, so this script did not write it: '
            'move it away or give another --out'
        )
    start = time.time()
    partial = out.with_name(f'{out.name}.partial-{os.getpid()}')
    partial.mkdir(parents=True)
    try:
        print(f'writing {train}/{val}/{test} images of {size}x{size} to {out}', flush=True)
        scans = load_digits()
        indices = split_digits(scans.target, seed)
        photos = load_sample_images().images
        for split, count in (('train', train), ('val', val), ('test', test)):
            regions = []
            for photo in photos:
                left, right = split_columns(photo.shape[1])[split]
                regions.append(photo[:, left:right])
            own = indices[split]
            images, labels = scans.images[own], scans.target[own]
            stream = 1
            if split == 'train' and half is not None:
                images, labels, regions = halve(images, labels, regions, half, seed)
                stream = 3 + HALVES.index(half)  # else both would have digits in the same places
            write_split(
                partial, split, count, size, seed, images, labels, regions, digits, heights, stream
            )
        if labelled is not None:
            list_apart(partial, labelled)
        (partial / MARKER).write_text(json.dumps(parameters))
        if out.exists():
            shutil.rmtree(out)
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    print(f'done in {time.time() - start:.0f} s')
    return True


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--out', type=Path, default=Path('data/digits'), help='folder to write')
    parser.add_argument('--size', type=int, default=96, help='side of the images in pixels')
    parser.add_argument('--train', type=int, default=8000, help='training images')
    parser.add_argument('--val', type=int, default=500, help='validation images')
    parser.add_argument('--test', type=int, default=1000, help='test images')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument(
        '--digits', type=int, nargs=2, default=list(DIGITS), metavar=('FEWEST', 'MOST'),
        help='digits tried in an image',
    )  # fmt: skip
    parser.add_argument(
        '--heights', type=float, nargs=2, metavar=('LOW', 'HIGH'),
        help='heights of digits in pixels; default: 12 to 0.4 of the image',
    )  # fmt: skip
    parser.add_argument('--half', choices=HALVES, help="of the training split's scans and columns")
    parser.add_argument('--labelled', type=int, help='training images that are listed apart')
    args = parser.parse_args()
    heights = tuple(args.heights) if args.heights else None
    counts = (args.train, args.val, args.test)
    try:
        make(
            args.out, args.size, *counts, args.seed, tuple(args.digits), heights,
            args.half, args.labelled,
        )  # fmt: skip
    except (ValueError, FileExistsError) as error:
        print(f'make_digits: {error}', file=sys.stderr)
        return 1
    return 0


if __name__ == '__main__':
    sys.exit(main())
