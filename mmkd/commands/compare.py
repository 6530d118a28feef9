"""Compares the distilled student with a baseline trained in the same way.

    mmkd compare configs/digits/mmkd.py --seeds 0 1 2 --plain configs/digits/plain.py

For each distilled CONFIG and each seed this trains the config itself and the same config with every
distillation weight 0 (same start, data, schedule and seed), and tests both and the teacher. It
prints a table with one word per config (BEATS, NO GAIN, WORSE or INCONCLUSIVE) and writes
WORK_DIR/report.html. Results that exist are not computed again, so an interrupted comparison
continues when the command is repeated.
"""

import argparse
import shlex
import sys
from collections.abc import Sequence

from .. import cli
from ..analysis.comparison import MARGIN, compare, measure


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of how runs are performed and where their results go."""
    parser.add_argument(
        '--jobs',
        type=int,
        help='runs side by side; default: one per GPU, without GPUs one single-threaded per core',
    )
    parser.add_argument(
        '--gpus',
        type=int,
        help='with --jobs 1 each run uses this many (without GPUs, processes '
        'on the CPU); else runs are spread over them, one each. Default: all that are visible',
    )
    parser.add_argument(
        '--results', dest='results_path', metavar='FILE',
        help='results, one line a run; default: WORK_DIR/results.jsonl',
    )  # fmt: skip


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = cli.command_parser(__doc__)
    parser.add_argument('configs', nargs='+', metavar='CONFIG', help='of a distilled student')
    parser.add_argument('--seeds', nargs='+', type=int, default=[0, 1, 2])
    parser.add_argument(
        '--plain',
        nargs='+',
        default=[],
        metavar='PLAIN_CONFIG',
        help='further references, such as the plain student without a start',
    )
    parser.add_argument(
        '--against',
        nargs='+',
        default=[],
        metavar='CONFIG',
        help='those of the distilled configs that the others are compared with too',
    )
    parser.add_argument('--work-dir', default='work_dirs/compare')
    add_run_arguments(parser)
    parser.add_argument(
        '--split',
        choices=['test', 'val'],
        default='test',
        help="which of the config's dataloaders and evaluators the numbers come from; choose "
        'hyperparameters on val',
    )
    parser.add_argument(
        '--margin',
        type=float,
        default=MARGIN,
        help='smallest gain of interest in mAP points: NO GAIN means that the 95%% interval '
        'contains 0 and ends below it (default: %(default)s)',
    )
    parser.add_argument('--images', type=int, default=6, help='test images shown in the report')
    parser.add_argument(
        '--table-only', action='store_true', help='train and test nothing: table from the results'
    )
    parser.add_argument(
        '--cfg-options', dest='options', nargs='+', default=[], metavar='KEY=VALUE',
        help='for all runs',
    )  # fmt: skip
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] in (['score'], ['measure']):
        return measure.main(arguments)
    command = shlex.join(['mmkd', 'compare', *arguments])
    return compare(**vars(parse_args(arguments)), command=command)
