"""Which pairs distil: builds tiny versions of every student and teacher, and takes two steps each.

python benchmarks/pair_matrix.py        # ten minutes on one core; writes docs/pairs.md
"""

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


def main() -> None:
    warnings.simplefilter('ignore')
    register_all_modules()
    MMLogger.get_instance('pair matrix', logger_name='mmengine', log_level='ERROR')
    teachers = [*CONFIGS, *ONE_STAGE]
    lines = ['| student \\ teacher | ' + ' | '.join(teachers) + ' |']
    lines.append('| --- ' * (len(teachers) + 1) + '|')
    refused: dict[str, tuple[str, str]] = {}
    for student in CONFIGS:
        cells = []
        for teacher in teachers:
            terms, messages = outcome(student, teacher)
            cells.append(cell(terms))
            for message in messages:
                refused.setdefault(message.partition(':')[0], (student, teacher))
        lines.append(f'| {student} | ' + ' | '.join(cells) + ' |')
        print(lines[-1], flush=True)
    messages = '\n'.join(
        f'- {message} (first: {student} from {teacher})'
        for message, (student, teacher) in refused.items()
    )
    configs = '\n'.join(f'- {k}: `{v}`' for k, v in {**CONFIGS, **ONE_STAGE}.items())
    text = TEXT.format(table='\n'.join(lines), messages=messages, configs=configs)
    (ROOT / 'docs/pairs.md').write_text(text)


if __name__ == '__main__':
    main()
