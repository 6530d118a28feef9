"""What ``tools/train.py`` and ``tools/test.py`` share: the options, the config, the processes."""

import argparse
import ast
import difflib
import inspect
import os
import os.path as osp
import re
from collections.abc import Sequence
from typing import Any

from mmengine.config import Config, DictAction
from mmengine.config.utils import ConfigParsingError
from mmengine.runner import Runner

from .engine.exit import stop

LAUNCHERS = ('none', 'pytorch', 'slurm', 'mpi')


class CfgOptions(DictAction):
    """MMEngine's ``DictAction``, which answers a malformed pair in words instead of a traceback."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        try:
            super().__call__(parser, namespace, values, option_string)
        except (ValueError, AssertionError):
            stop(
                f'--cfg-options {" ".join(values or ())}: '
                'each must read key=value, with closed brackets and no spaces'
            )


def add_shared_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options that MMDetection's train and test tools have in common, by their names."""
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=CfgOptions,
        metavar='KEY=VALUE',
        help='values of the config to override, e.g. model.distillation.hint.loss_weight=0; '
        'lists as key="[a,b]" or key=a,b',
    )
    parser.add_argument('--launcher', choices=LAUNCHERS, default='none', help='job launcher')
    # Both spellings: torch.distributed.launch passes the second since PyTorch 2.0.
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0)


def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Parses ``argv`` and sets ``LOCAL_RANK``, which MMEngine reads, where no launcher did."""
    args = parser.parse_args(argv)
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    return args


def load_config(args: argparse.Namespace) -> Config:
    """Reads the config and applies ``--cfg-options``, ``--launcher`` and ``--work-dir``.

    A config without ``runner_type`` gets mmkd's, so that every checkpoint is written in plain form
    and read safely. ``work_dir`` is, in this order: the option, the config's, or
    ``work_dirs/<name of the config>``.

    Raises:
        SystemExit: The config, or one that it inherits, cannot be found; an option does not fit.
    """
    try:
        cfg = Config.fromfile(args.config)
    except (OSError, ConfigParsingError) as error:
        reason = 'no such file' if not osp.isfile(args.config) else str(error)
        stop(f'config {args.config} cannot be read: {reason}')

    options = args.cfg_options or {}
    for key in options:
        if key.split('.')[0] == 'distillation' and 'distillation' in cfg.get('model', {}):
            stop(
                f'--cfg-options {key}: the recipe has already been copied into the model, so this '
                f'would change nothing; write model.{key}'
            )
        _require_used(key, cfg)
    _require_in_model(args.config, cfg)
    try:
        cfg.merge_from_dict(options)
    except (TypeError, KeyError) as error:
        stop(f'--cfg-options {" ".join(options)} does not fit {args.config}: {error}')

    cfg.launcher = args.launcher
    cfg.setdefault('runner_type', 'mmkd.DistillationRunner')
    if args.work_dir is not None:
        cfg.work_dir = args.work_dir
    elif cfg.get('work_dir') is None:
        cfg.work_dir = osp.join('work_dirs', osp.splitext(osp.basename(args.config))[0])
    return cfg


_READ = {
    *inspect.signature(Runner.__init__).parameters,
    *('runner_type', 'auto_scale_lr', 'tta_model', 'tta_pipeline', 'custom_imports'),
}
"""Keys of a config that something reads; others are variables for those."""


def _require_used(option: str, cfg: Config) -> None:
    """An option that nothing reads would change nothing."""
    key = option.split('.')[0]
    if key in _READ or (key in cfg and isinstance(cfg[key], dict)):
        return
    if key in cfg:
        stop(
            f'--cfg-options {option}: {key} is a variable of the config, which has already been '
            'copied to where it is used, so this would change nothing; set it there, as '
            'train_cfg.max_epochs=1'
        )
    near = difflib.get_close_matches(key, sorted(_READ | set(cfg)), 3)
    stop(
        f'--cfg-options {option}: no config has {key}'
        + (f'; near it: {", ".join(near)}' if near else '')
        + ". What is the detector's begins with model., as model.distillation.hint.loss_weight=0"
    )


_OF_MODEL = ('distillation', 'teacher_config', 'teacher_ckpt', 'teacher_sha256', 'eval_teacher')


def _require_in_model(path: str, cfg: Config) -> None:
    """What a config sets beside its model, and does not use, would change nothing."""
    if 'teacher_config' not in cfg.get('model', {}) or not osp.isfile(path) or path[-3:] != '.py':
        return
    with open(path, encoding='utf-8') as file:
        text = re.sub('{{(.*?)}}', r'(\1)', file.read())
    tree = ast.parse(text)
    nodes = list(ast.walk(tree))
    used = {
        node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)
    }
    used |= {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    for node in tree.body:
        targets = node.targets if isinstance(node, ast.Assign) else []
        for name in (each.id for each in targets if isinstance(each, ast.Name)):
            if name in _OF_MODEL and name not in used:
                stop(
                    f'{path}: {name} stands beside the model and nothing uses it there, so it '
                    f'would change nothing; write model=dict({name}=...)'
                )
