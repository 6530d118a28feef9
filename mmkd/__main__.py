"""The command ``mmkd``: ``mmkd train CONFIG``, ``mmkd check CONFIG``; ``python -m mmkd`` too."""

from __future__ import annotations

import difflib
import importlib
import os
import sys
from collections.abc import Sequence

COMMANDS = {
    'new-pair': "write the config of a pair from a teacher's and a student's",
    'check': 'try a pair in a minute, before training: GO or NO-GO',
    'train': 'train a detector, with or without distillation; --gpus N',
    'test': 'test a detector; --gpus N',
    'compare': 'train a pair and its own baseline over seeds: a table with intervals, a report',
    'study': 'many arms in stages, screened on validation and judged on test: tables, a plot',
    'pseudo-label': 'label images with a detector: a COCO file with scores; --gpus N',
    'publish': "write the plain student's weights, config and model card",
    'speed': 'time detectors: images per second, one at a time and in batches',
    'replay': 'repeat a step whose loss was not finite, and name the layer',
    'terms': 'list the terms of distillation, and what each needs',
    'demo': 'teach a small detector of digits: data, training, table and report in minutes',
}
ON_GPUS = ('train', 'test', 'pseudo-label')
"""The commands that take ``--gpus``."""


def usage() -> str:
    """The commands, one a line."""
    width = max(map(len, COMMANDS))
    lines = [f'  {name:{width}}  {what}' for name, what in COMMANDS.items()]
    return '\n'.join(
        ['usage: mmkd COMMAND [options]', '', *lines, '',
         '`mmkd COMMAND --help` lists the options of one.']
    )  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; its exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    command = arguments[0] if arguments else '--help'
    if command in ('-h', '--help', 'help'):
        print(usage())
        return 0 if arguments else 2
    if command in ('-V', '--version'):
        from .version import __version__

        print(f'mmkd {__version__}')
        return 0
    if command not in COMMANDS:
        near = difflib.get_close_matches(command, COMMANDS, 1)
        hint = f'did you mean {near[0]}?' if near else f'the commands are {", ".join(COMMANDS)}'
        print(f'error: mmkd has no command {command!r}; {hint}', file=sys.stderr)
        return 2
    if command in ON_GPUS and any(a.partition('=')[0] == '--gpus' for a in arguments):
        launch(arguments)
    sys.argv = [f'mmkd {command}', *arguments[1:]]  # what argparse says of itself
    module = importlib.import_module(f'mmkd.commands.{command.replace("-", "_")}')
    from .engine.exit import run

    run(lambda: module.main(arguments[1:]))


def launch(arguments: list[str]) -> None:
    """Replaces this process by PyTorch's launcher with ``--gpus`` processes."""
    words = [part for a in arguments for part in (a.split('=') if a[:7] == '--gpus=' else [a])]
    at = words.index('--gpus')
    number = words[at + 1] if at + 1 < len(words) else ''
    if not number.isdigit() or int(number) < 1:
        raise SystemExit(
            f'error: --gpus {number}: a number of GPUs (of processes, where there are none), from 1'
        )
    rest = words[:at] + words[at + 2 :]
    os.environ.setdefault('OMP_NUM_THREADS', '1')
    launcher = ['-m', 'torch.distributed.run', f'--nproc_per_node={number}']
    launcher += [f'--master_port={os.environ.get("PORT", "29500")}', '-m', 'mmkd']
    os.execv(sys.executable, [sys.executable, *launcher, *rest, '--launcher', 'pytorch'])


if __name__ == '__main__':
    sys.exit(main())
