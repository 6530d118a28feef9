"""Repeats the step in which a loss was not finite, and prints the module where it started.

    mmkd replay CONFIG work_dirs/RUN/step_1234.pth

The file has the weights, the batch and the random state of that step; CONFIG is that of the run.
"""

import argparse
import copy
from collections.abc import Sequence
from typing import Any

import torch
from mmdet.registry import MODELS
from mmengine.registry import init_default_scope
from torch import nn

from .. import cli
from ..datasets.two_views import apply_resolution
from ..engine import step_dump
from ..engine.class_names import apply_classes
from ..engine.exit import stop
from ..engine.unlabelled import settings_of
from ..inference import require_teacher
from ..io.checkpoint import CheckpointError


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = cli.command_parser(__doc__)
    parser.add_argument('config', help="the run's config")
    parser.add_argument('step', help='the step_*.pth that it left in its work_dir')
    cli.add_shared_arguments(parser)
    return cli.parse(parser, argv)


def first_wrong(networks: dict[str, nn.Module]) -> list[str]:
    """A list to which hooks on all modules add those whose output is not finite."""
    found: list[str] = []

    def listen(name: str, module: nn.Module) -> None:
        def check(module: nn.Module, args: tuple, output: object) -> None:
            if not _finite(output):
                given = 'was given finite numbers' if _finite(args) else 'was given such already'
                found.append(f'{name or "its losses"} ({type(module).__name__}) {given}')

        module.register_forward_hook(check)

    for owner, network in networks.items():
        for name, module in network.named_modules():
            listen(f'{owner}{name}', module)
    return found


def _finite(value: object) -> bool:
    if isinstance(value, torch.Tensor):
        return not value.is_floating_point() or bool(value.isfinite().all())
    if isinstance(value, dict):
        return all(_finite(v) for v in value.values())
    if isinstance(value, (list, tuple)):
        return all(_finite(v) for v in value)
    return True


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    cfg = apply_classes(apply_resolution(cli.load_config(args)))
    init_default_scope(cfg.get('default_scope', 'mmdet'))
    try:
        batch, step = step_dump.read_step(args.step)
    except (CheckpointError, OSError) as error:
        stop(str(error))
    model = MODELS.build(copy.deepcopy(cfg.model))
    require_teacher(model)
    try:
        model.load_state_dict(step['state_dict'])
    except RuntimeError as error:
        stop(f'{args.step} was left by a run of another config than {args.config}: {error}')
    model.to('cuda' if torch.cuda.is_available() else 'cpu').train()
    model.guarded = True  # nothing is trained on this step
    if settings_of(model) is not None:
        model.unlabelled.thresholds = step['thresholds']  # 'auto' has found them
    networks: dict[str, nn.Module] = {'': model}
    if getattr(model, 'teacher', None) is not None:
        networks['teacher '] = model.teacher.network
    wrong = [n for n, p in model.named_parameters() if not _finite(p)]
    if wrong:
        print(f'{len(wrong)} weights are not finite before the step (first: {wrong[0]})')
    for image, sample in zip(batch['inputs'], batch['data_samples'], strict=True):
        boxes = torch.as_tensor(sample.gt_instances.bboxes)
        sides = boxes[:, 2:] - boxes[:, :2]
        odd = int((~boxes.isfinite().all(1) | (sides <= 0).any(1)).sum())
        print(
            f'{getattr(sample, "img_path", "?")}: {tuple(image.shape[1:])}, {len(boxes)} boxes'
            + (f', {odd} OF THEM EMPTY OR NOT FINITE' if odd else '')
        )
    if hasattr(model, 'unproven'):
        model.unproven.clear()  # its check would raise before the losses are printed
    found = first_wrong(networks)
    step_dump.restore_step(step)
    values = model(**model.data_preprocessor(batch, True), mode='loss')
    for name, value in values.items():
        single: Any = sum(value) if isinstance(value, list) else value
        print(f'{name}: {single.detach().item():.6g}' + ('' if single.isfinite() else '   <--'))
    print(f'first output that is not finite: {found[0]}' if found else
          'the outputs of all modules are finite')  # fmt: skip
    return 0
