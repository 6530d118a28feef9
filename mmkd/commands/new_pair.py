r"""Writes the config of a new pair: ten lines.

    mmkd new-pair --teacher mmdet::faster_rcnn/faster-rcnn_r101_fpn_1x_coco.py \
        --student mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py --out my_pair.py

Configs are paths or names in the installed MMDetection, which knows the published checkpoint of
each. The new config is not run: `mmkd check my_pair.py` does that.
"""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from mmengine.hub import get_config

from .. import cli
from ..engine.exit import stop
from ..recipe import ADD_NOTHING, TeacherError, read_teacher_config
from ..shipped import CONFIGS, command, names

PAPER = 'chen2017'
RECIPES = ['paper', *(name for name in names() if '/' not in name)]
PAIR = """\
_base_ = [{student}, __import__('mmkd').base({recipe!r})]

model = dict(
    type='mmkd.KnowledgeDistillationTwoStageDetector',
{detector}    teacher_config={teacher!r},
    teacher_ckpt={checkpoint!r},
    distillation=_base_.distillation,
)
"""


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = cli.command_parser(__doc__)
    parser.add_argument('--teacher', required=True, help="the teacher's config")
    parser.add_argument('--student', required=True, help="the student's config")
    parser.add_argument('--teacher-ckpt', help="the teacher's checkpoint, a path or URL")
    parser.add_argument('--recipe', choices=RECIPES, default='paper')
    parser.add_argument('--out', required=True, help='the file to write')
    return parser.parse_args(argv)


def checked(option: str, config: str) -> str:
    """The type of a config's detector; stops if there is no such config."""
    if '::' not in config and not Path(config).is_file():
        stop(f'{option} {config}: there is no such file')
    try:
        kind = read_teacher_config(config).model.type
        if not isinstance(kind, str):
            stop(
                f"{option} {config} is in MMEngine's new style (read_base()), and a pair inherits "
                'by _base_, which cannot read it. Write it in the other style first: python -c '
                f'"from mmengine import Config; Config.fromfile({config!r}).dump(\'plain.py\')"'
            )
        return kind
    except TeacherError as error:
        stop(f'{option} {config}: {str(error).partition(" cannot be read: ")[2] or error}')


def published(config: str) -> str:
    """The URL of the checkpoint that MMDetection publishes for a config."""
    if '::' not in config:
        stop(f'--teacher-ckpt is missing: MMDetection publishes none for {config}')
    try:
        return get_config(config, pretrained=True).model_path
    except (AssertionError, AttributeError, ValueError):
        stop(f'MMDetection publishes no checkpoint of {config}: give --teacher-ckpt')


def beside(path: str, folder: Path) -> str:
    """A path relative to the folder of the config; of mmkd's own, and of URLs, the name."""
    if '::' in path or '://' in path:
        return path
    whole = Path(path).resolve()
    if CONFIGS in whole.parents:
        return f'mmkd::{whole.relative_to(CONFIGS).as_posix()}'
    return os.path.relpath(whole, folder)


def inherited(path: str, folder: Path) -> str:
    """The expression by which the config inherits another.

    MMEngine gives what it inherits as ``mmkd::...`` the scope mmkd, in which no data set is found.
    """
    name = beside(path, folder)
    if name.startswith('mmkd::'):
        return f"__import__('mmkd').base({name.removeprefix('mmkd::')!r})"
    return repr(name)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    out = Path(args.out).resolve()
    if out.exists():
        stop(f'--out {args.out} exists already: move it or give another name')
    if not out.parent.is_dir():
        stop(f'--out {args.out}: there is no folder {out.parent}')
    checked('--teacher', args.teacher)
    own = checked('--student', args.student) not in ADD_NOTHING
    checkpoint = args.teacher_ckpt or published(args.teacher)
    if '://' not in checkpoint and not Path(checkpoint).is_file():
        stop(f'--teacher-ckpt {checkpoint}: no such file')
    teacher, checkpoint = (beside(path, out.parent) for path in (args.teacher, checkpoint))
    folder = '{{ fileDirname }}/'
    teacher, checkpoint = (
        path if '::' in path or '://' in path else folder + path for path in (teacher, checkpoint)
    )
    text = PAIR.format(
        detector='    detector=_base_.model.type,\n' if own else '',
        student=inherited(args.student, out.parent),
        recipe=PAPER if args.recipe == 'paper' else args.recipe,
        teacher=teacher,
        checkpoint=checkpoint,
    )
    out.write_text(text)
    print(text)
    print(f'wrote {args.out}; next: {command("check")} {args.out}')
