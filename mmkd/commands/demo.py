"""Teaches a small detector of digits: makes the images, trains it and its baseline, compares.

The images are made of scikit-learn's handwritten digits and photographs, so nothing is downloaded.
One seed and a quarter of the schedule: some minutes on two cores, and no proof of anything.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Sequence

from .. import cli
from ..engine.exit import stop
from ..shipped import TOOLS, base
from . import compare


def main(argv: Sequence[str] | None = None) -> int:
    parser = cli.command_parser(__doc__)
    parser.add_argument('--work-dir', default='work_dirs/demo')
    args = parser.parse_args(argv)
    if importlib.util.find_spec('sklearn') is None:
        stop('the demo makes its images of what scikit-learn ships: pip install scikit-learn')
    made = subprocess.run([sys.executable, TOOLS / 'make_digits.py']).returncode
    if made:
        return made
    return compare.main([base('digits/demo'), '--seeds', '0', '--work-dir', args.work_dir])
