"""Runs a study: many arms, screened on validation in stages, the finalists judged on test.

    mmkd study STUDY.py --work-dir work_dirs/study

STUDY.py declares arms, seeds and stages; docs/study.md describes it. Runs are those of `mmkd
compare`. Results that exist are not computed again, so a study that was stopped continues when the
command is repeated. The tables are printed and written to WORK_DIR/NAME.md, with a plot of gain
against cost.
"""

import argparse
from collections.abc import Sequence

from .. import cli
from ..analysis.study import study
from .compare import add_run_arguments


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = cli.command_parser(__doc__)
    parser.add_argument('path', metavar='STUDY.py')
    parser.add_argument('--work-dir', help='default: work_dirs/<name of the study>')
    add_run_arguments(parser)
    parser.add_argument(
        '--table-only',
        action='store_true',
        help='train and test nothing: tables and plot from the results',
    )
    parser.add_argument(
        '--power',
        type=float,
        metavar='MARGIN',
        help='say how many seeds a margin in mAP points would need, by the variance in the results',
    )
    parser.add_argument(
        '--plot', metavar='FILE', help='.svg, .png or .pdf; default: WORK_DIR/NAME.svg'
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    return study(**vars(parse_args(argv)))
