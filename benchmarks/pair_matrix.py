"""Which pairs distil: builds tiny versions of every student and teacher, and takes two steps each.

python benchmarks/pair_matrix.py              # writes docs/pairs.md
python benchmarks/pair_matrix.py --missing    # only the pairs that it lacks
python benchmarks/pair_matrix.py --again DC5  # only those of a network, anew
"""

import argparse
import sys
import warnings
from pathlib import Path

from mmdet.utils import register_all_modules
from mmengine.logging import MMLogger

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / 'tests'))
from zoo import CONFIGS, ONE_STAGE, cell, outcome  # noqa: E402

TEXT = """# Which pairs distil

Each cell is a pair of tiny networks (a ResNet-18 of width 4 before the heads of the zoo config
named below) that was built with every term of the paper's recipe, turning off what it was told to,
and took two optimizer steps with finite gradients. Hints join neck and neck, or the backbone where
there is no neck.

- `all`: all five terms.
- `rpn`, `rcnn`, `hint`: the terms that are left, `rcnn cls` without the regression. The others were
  refused when the pair was built, with the sentences below.

One-stage and DETR-like detectors can give hints.

<!-- python benchmarks/pair_matrix.py -->
{table}

## What was refused

{messages}

## The configs

{configs}
"""


def known() -> tuple[dict[tuple[str, str], str], list[str]]:
    """What docs/pairs.md has: cells by student and teacher, and lines of messages."""
    path = ROOT / 'docs/pairs.md'
    if not path.exists():
        return {}, []
    lines = path.read_text().splitlines()
    rows = [[c.strip() for c in line.strip('|').split('|')] for line in lines if '|' in line]
    head = next(row for row in rows if row[0].startswith('student'))
    cells = {
        (row[0], teacher): entry
        for row in rows
        if row[0] in CONFIGS
        for teacher, entry in zip(head[1:], row[1:], strict=True)
    }
    return cells, [line for line in lines if line.startswith('- ') and '(first: ' in line]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--missing', action='store_true', help='only what docs/pairs.md lacks')
    parser.add_argument(
        '--again', metavar='NETWORK', choices=[*CONFIGS, *ONE_STAGE], help='its pairs, anew'
    )
    args = parser.parse_args()
    warnings.simplefilter('ignore')
    register_all_modules()
    MMLogger.get_instance('pair matrix', logger_name='mmengine', log_level='ERROR')
    teachers = [*CONFIGS, *ONE_STAGE]
    cells, messages = known() if args.missing or args.again else ({}, [])
    cells = {pair: entry for pair, entry in cells.items() if args.again not in pair}
    lines = ['| student \\ teacher | ' + ' | '.join(teachers) + ' |']
    lines.append('| --- ' * (len(teachers) + 1) + '|')
    for student in CONFIGS:
        for teacher in teachers:
            if (student, teacher) in cells:
                continue
            terms, said = outcome(student, teacher)
            cells[student, teacher] = cell(terms)
            for message in said:
                start = f'- {message.partition(":")[0]}'
                if not any(line.startswith(start) for line in messages):
                    messages.append(f'{start} (first: {student} from {teacher})')
        lines.append(f'| {student} | ' + ' | '.join(cells[student, t] for t in teachers) + ' |')
        print(lines[-1], flush=True)
    configs = '\n'.join(f'- {k}: `{v}`' for k, v in {**CONFIGS, **ONE_STAGE}.items())
    text = TEXT.format(table='\n'.join(lines), messages='\n'.join(messages), configs=configs)
    (ROOT / 'docs/pairs.md').write_text(text)


if __name__ == '__main__':
    main()
