"""Checks a pair of teacher and student before training: GO or NO-GO in a minute, without data.

mmkd check configs/kd/faster_rcnn_r101_to_r50.py
"""

import argparse
import contextlib
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

from .. import cli
from ..analysis.pair_check import check_pair
from ..engine.exit import stop


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = cli.command_parser(__doc__)
    parser.add_argument('config', help='config of a distilled student')
    parser.add_argument(
        '--size', type=int, nargs=2, default=(256, 320), metavar=('H', 'W'),
        help='size of the image of the trial step (default: %(default)s)',
    )  # fmt: skip
    parser.add_argument(
        '--json', nargs='?', const='-', metavar='FILE.json',
        help='write all that was found; without a name to stdout, and the text to stderr',
    )  # fmt: skip
    parser.add_argument('--image', help='a picture for the trial step; default: one is made')
    parser.add_argument(
        '--data', type=int, nargs='?', const=200, default=0, metavar='N',
        help='try the teacher on N images of the validation data (default: 200), and make the step '
        "with training images at the config's own scale",
    )  # fmt: skip
    parser.add_argument(
        '--share', type=float, default=0.2,
        help="name for each term the loss_weight that makes its gradient this multiple of the hard "
        "losses' (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument('--download', action='store_true', help='fetch checkpoints by URL')
    parser.add_argument('--processes', type=int, default=2, help='of the trial under DDP; 1: none')
    cli.add_shared_arguments(parser)
    return cli.parse(parser, argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    if args.json and args.json != '-' and not args.json.endswith('.json'):
        stop(f'--json {args.json}: the name must end in .json; put the config before --json')
    if not 0 < args.share < float('inf'):
        stop(f'--share {args.share:g}: it must be above 0')
    warnings.simplefilter('ignore')
    to = contextlib.redirect_stdout(sys.stderr) if args.json == '-' else contextlib.nullcontext()
    with to:
        report = check_pair(
            cli.load_config(args), tuple(args.size), args.image, args.data, args.download,
            args.processes, args.share,
        )  # fmt: skip
        for text in report.warnings:
            print(f'warning: {text}')
        for text in report.against:
            print(f'against it: {text}')
        print('GO' if report.go else 'NO-GO')
    if args.json == '-':
        print(report.as_json(), end='')
    elif args.json:
        Path(args.json).write_text(report.as_json(), encoding='utf-8')
    return 0 if report.go else 1
