"""Labels images with a detector: a COCO annotation file, with a score for each box.

    mmkd pseudo-label teacher.py teacher.pth images/ --out labels.json --gallery labels.html

CONFIG is that of a detector, or of a pair, whose teacher then labels with the student's classes.
The same command goes on with work that was cut off, and labels what has been added or has changed.
"""

import argparse
import os
import os.path as osp
from collections.abc import Sequence
from pathlib import Path

from mmengine.dist import is_main_process

from .. import cli
from ..analysis.gallery import write_gallery
from ..datasets.teacher_labels import find_images, read_labels
from ..engine.exit import leave, stop
from ..engine.labeller import MIN_SCORE
from ..engine.processes import join_processes
from ..engine.pseudo_labels import label_images
from ..recipe import is_pair


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = cli.command_parser(__doc__)
    parser.add_argument('config', help='config of a detector, or of a pair')
    parser.add_argument('checkpoint', nargs='?', help="its weights; of a pair: the teacher's")
    parser.add_argument('images', help='a folder, searched with all below it, or a COCO file')
    parser.add_argument('--out', required=True, metavar='FILE.json', help='the labels file')
    parser.add_argument('--img-prefix', help="the images' folder (default: that of the COCO file)")
    parser.add_argument(
        '--score-thr', type=float, default=MIN_SCORE, metavar='SCORE',
        help='detections below this score are left out (default: %(default)s)',
    )  # fmt: skip
    parser.add_argument(
        '--classes', nargs='+', metavar='NAME',
        help="the classes of the file, in this order; NAME=THEIRS where the detector's is another",
    )  # fmt: skip
    parser.add_argument('--batch-size', type=int, help="images at once (default: the config's)")
    parser.add_argument(
        '--workers', type=int, default=2, help='processes that load images (default: %(default)s)'
    )
    parser.add_argument(
        '--skip-unreadable', action='store_true', help='pass over images that cannot be read'
    )
    parser.add_argument(
        '--gallery', metavar='PATH',
        help='write a page of the boxes by score: a .html file, or a folder for index.html',
    )  # fmt: skip
    parser.add_argument(
        '--gallery-images', type=int, default=120, metavar='N',
        help='the most boxes shown there (default: %(default)s)',
    )  # fmt: skip
    cli.add_shared_arguments(parser)
    # CHECKPOINT may be left out, so options between the names would make them ambiguous.
    args = parser.parse_intermixed_args(argv)
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    return args


def read_classes(given: Sequence[str] | None) -> dict[str, str] | None:
    """The detector's name of each class that ``--classes`` names."""
    if given is None:
        return None
    pairs = [name.partition('=')[::2] for name in given]
    names = [name for name, _ in pairs]
    for name in names:
        if not name or names.count(name) > 1:
            stop(
                f'--classes {" ".join(given)}: {name!r} '
                + ('is there twice' if name else 'is no class name')
            )
    return {name: theirs or name for name, theirs in pairs}


def require_usable(args: argparse.Namespace) -> None:
    """Ends the program if an option cannot be used."""
    for name, least in (('batch_size', 1), ('workers', 0), ('gallery_images', 1)):
        value = getattr(args, name)
        if value is not None and value < least:
            stop(f'--{name.replace("_", "-")} {value} must be at least {least}')
    if not 0 <= args.score_thr < 1:
        stop(f'--score-thr {args.score_thr} must be a score from 0 to below 1')
    if not args.out.endswith('.json'):
        stop(f'--out {args.out}: the name of a labels file ends in .json')
    if args.checkpoint is not None:
        cli.require_checkpoint(args.checkpoint)
    if osp.isfile(args.images) and osp.exists(args.out) and osp.samefile(args.images, args.out):
        stop(f'--out {args.out} is the list of images itself: name another file')


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    require_usable(args)
    classes = read_classes(args.classes)
    cfg = cli.load_config(args)
    if 'model' not in cfg:
        stop(f'{args.config} is no config of a detector: it defines no model')
    if args.checkpoint is None and not is_pair(cfg.model):
        stop(
            f'{args.config} is no pair, so it names no weights: give the checkpoint too, '
            'as in `mmkd pseudo-label CONFIG CHECKPOINT IMAGES`'
        )
    join_processes(args.launcher)
    try:
        label_images(
            cfg, args.images, args.out, prefix=args.img_prefix, classes=classes,
            skip_unreadable=args.skip_unreadable, batch_size=args.batch_size, workers=args.workers,
            checkpoint=args.checkpoint, min_score=args.score_thr,
        )  # fmt: skip
    except KeyboardInterrupt:
        print(f'stopped; the same command goes on from what is kept beside {args.out}')
        return 130
    if args.gallery and is_main_process():
        page = Path(args.gallery)
        page = page if page.suffix == '.html' else page / 'index.html'
        images = find_images(args.images, args.img_prefix)
        paths = dict(zip(images.names, images.paths, strict=True))
        write_gallery(page, read_labels(args.out), paths, args.gallery_images)
        print(f'{page}: the boxes by score')
    leave()
    return 0
