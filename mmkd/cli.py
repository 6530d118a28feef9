"""Command-line options of the tools, and reading the config that they name."""

import argparse
import ast
import os
import os.path as osp
import re
from collections.abc import Sequence

from mmengine.config import Config
from mmengine.config.utils import ConfigParsingError

from .engine.cfg_options import CfgOptions, apply_options
from .engine.config_files import keep_detector, locate_files
from .engine.exit import stop
from .recipe import read_config

LAUNCHERS = ('none', 'pytorch', 'slurm', 'mpi')


def command_parser(description: str | None) -> argparse.ArgumentParser:
    """A parser whose help begins with the docstring of a command, line by line."""
    return argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def add_shared_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options that MMDetection's train and test tools have in common."""
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=CfgOptions,
        metavar='KEY=VALUE',
        help='values of the config to override, e.g. model.distillation.hint.loss_weight=0; '
        'lists as key="[a,b]" or key=a,b, dicts as key="dict(a=1,b=2)"',
    )
    parser.add_argument('--launcher', choices=LAUNCHERS, default='none', help='job launcher')
    # torch.distributed.launch passes the second spelling since PyTorch 2.0.
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0)
    parser.set_defaults(work_dir=None)  # also of a command without the option


def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Parses ``argv``, and sets ``LOCAL_RANK`` for MMEngine if no launcher did."""
    args = parser.parse_args(argv)
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    return args


def require_checkpoint(path: str) -> None:
    """Ends the program if ``path`` is neither a file nor a URL."""
    if '://' not in path and not osp.isfile(path):
        stop(f'no such checkpoint: {path}')


def read_config_file(path: str) -> Config:
    """Reads a config file, or one of mmkd's own: ``mmkd::kd/faster_rcnn_r101_to_r50.py``.

    Raises:
        SystemExit: The config, or one that it inherits, cannot be read.
    """
    try:
        return read_config(path)
    except (OSError, ConfigParsingError) as error:
        missing = not osp.isfile(path) and '::' not in path
        stop(f'config {path} cannot be read: {"no such file" if missing else error}')


def load_config(args: argparse.Namespace) -> Config:
    """Reads the config and applies ``--cfg-options``, ``--launcher`` and ``--work-dir``.

    A config without ``runner_type`` gets mmkd's, so that checkpoints are read safely and written in
    plain form. ``work_dir`` is the option, else the config's, else ``work_dirs/<config's name>``.

    Raises:
        SystemExit: The config, or one that it inherits, cannot be read; an option would have no
            effect.
    """
    cfg = read_config_file(args.config)
    locate_files(cfg)
    _require_in_model(args.config, cfg)
    try:
        apply_options(cfg, args.cfg_options or {}, args.config)
    except ValueError as error:
        stop(str(error))
    locate_files(cfg, from_shell=True)
    keep_detector(cfg)
    cfg.launcher = args.launcher
    cfg.setdefault('runner_type', 'mmkd.DistillationRunner')
    if args.work_dir is not None:
        cfg.work_dir = args.work_dir
    elif cfg.get('work_dir') is None:
        cfg.work_dir = osp.join('work_dirs', osp.splitext(osp.basename(args.config))[0])
    return cfg


_MODEL_KEYS = ('distillation', 'teacher_config', 'teacher_ckpt', 'teacher_sha256', 'eval_teacher')


def _require_in_model(path: str, cfg: Config) -> None:
    """Refuses a config that sets one of these keys outside its model and does not use it."""
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
    assigned = {
        target.id: node.value
        for node in tree.body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    if '_base_' not in assigned:
        # A config that a run has dumped inherits nothing: its variables are left of what they were.
        used |= {keyword.arg for keyword in getattr(assigned.get('model'), 'keywords', [])}
    for name in assigned:
        if name in _MODEL_KEYS and name not in used:
            stop(
                f'{path}: {name} stands beside the model, where nothing uses it; write '
                f'model=dict({name}=...)'
            )
