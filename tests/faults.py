"""Faults that a run of distillation can have, each with the sentence that it is stopped by.

A fault changes the config of a run on the tiny data set (``config``), or the runner just before
training (``runner``); :func:`plant` runs it for at most 50 steps and returns what was said.
"""

import logging
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pairs
import torch
from mmdet.registry import MODELS
from mmengine.config import Config
from mmengine.hooks import Hook
from tiny import tiny_config

from mmkd.digests import tensor_digests
from mmkd.engine.runner import DistillationRunner

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Fault:
    """``says`` is a regular expression; ``data`` names the task that it needs."""

    id: str
    says: str
    config: Callable | None = None
    runner: Callable | None = None
    data: str = 'tiny'


class At(Hook):
    """Does something to the model before one step (-1: before training)."""

    priority = 'HIGHEST'

    def __init__(self, step: int, act: Callable) -> None:
        self.step, self.act = step, act

    def before_train(self, runner) -> None:
        if self.step < 0:
            self.act(runner)

    def before_train_iter(self, runner, batch_idx, data_batch=None) -> None:
        if runner.iter == self.step:
            self.act(runner, data_batch)


def at(step: int, act: Callable) -> Callable:
    def plant(runner) -> None:
        runner._hooks.insert(0, At(step, act))

    return plant


def option(**values) -> Callable:
    """Options by their dotted name, a double underscore for each dot."""

    def plant(cfg) -> None:
        cfg.merge_from_dict({key.replace('__', '.'): value for key, value in values.items()})

    return plant


def network(act: Callable) -> Callable:
    return at(-1, lambda runner: act(runner.model.teacher.network))


def schedule(**values) -> Callable:
    return option(model__distillation__hint__schedule=dict(**values))


def _pop(*keys: str) -> Callable:
    def plant(cfg) -> None:
        for key in keys:
            cfg.model.pop(key)

    return plant


def _file(change: Callable) -> Callable:
    """A checkpoint of the teacher, changed."""

    def plant(cfg) -> None:
        teacher = pairs.MODELS.build(Config.fromfile(cfg.model.teacher_config).model)
        path = Path(cfg.work_dir) / 'teacher.pth'
        torch.save({'state_dict': change(teacher.state_dict())}, path)
        cfg.model.teacher_ckpt = str(path)

    return plant


def _student(change: Callable, key: str) -> Callable:
    def plant(cfg) -> None:
        path = Path(cfg.work_dir) / 'student.pth'
        torch.save({'state_dict': change()}, path)
        init = dict(type='Pretrained', checkpoint=str(path))
        if key == 'load_from':
            cfg.load_from = str(path)
        else:
            cfg.model.backbone.init_cfg = init

    return plant


def _teacher(**values) -> Callable:
    """The same teacher, its config given as a dict with some values changed."""

    def plant(cfg) -> None:
        teacher = Config.fromfile(cfg.model.teacher_config)
        teacher.merge_from_dict({k.replace('__', '.'): v for k, v in values.items()})
        cfg.model.teacher_config = dict(model=teacher.model.to_dict())

    return plant


def _optimizer(runner) -> None:
    runner.optim_wrapper.optimizer.add_param_group(
        {'params': list(runner.model.teacher.network.neck.parameters())}
    )


def _drop_group(runner) -> None:
    groups = runner.optim_wrapper.optimizer.param_groups
    for group in groups:
        group['params'] = group['params'][:1]


def _share(runner) -> None:
    runner.model.teacher.network.neck = runner.model.neck.eval().requires_grad_(False)
    runner.model.neck.train().requires_grad_(True)
    runner.model.teacher.network.neck.eval()


def _share_weight(runner) -> None:
    theirs = runner.model.teacher.network.neck.lateral_convs[0].conv
    runner.model.neck.lateral_convs[0].conv.weight.data = theirs.weight.data


def _reinit(net) -> None:
    for module in net.modules():
        module._is_init = False
    net.init_weights()


def _write(runner, _=None) -> None:
    runner.model.teacher.network.backbone.layer1[0].bn1.running_mean.add_(1)


def _loss(name: str, change: Callable) -> Callable:
    def act(runner) -> None:
        term = runner.model.kd_terms[name]
        forward = term.loss.forward
        term.loss.forward = lambda *args, **kw: change(forward(*args, **kw))

    return at(-1, act)


def _poison(where: str) -> Callable:
    def act(runner, batch) -> None:
        if where == 'student':
            runner.model.backbone.layer2[0].conv2.weight.data[0] = float('nan')
        elif where == 'teacher':
            runner.model.teacher.network.neck.lateral_convs[0].conv.weight.data[0] = float('nan')
        elif where == 'boxes':
            batch['data_samples'][0].gt_instances.bboxes.tensor.fill_(float('nan'))
        else:
            batch['inputs'][0] = batch['inputs'][0].float() * float('nan')

    return at(0 if where == 'teacher' else 3, act)


def _parameters(value: bool, part: str | None = None) -> Callable:
    return at(-1, lambda r: (getattr(r.model, part) if part else r.model).requires_grad_(value))


def _pixels(**values) -> Callable:
    return _teacher(**{f'model__data_preprocessor__{k}': v for k, v in values.items()})


def _roll(runner) -> None:
    head = runner.model.teacher.network.roi_head.bbox_head.fc_cls
    order = [*range(1, len(head.weight) - 1), 0, len(head.weight) - 1]
    head.weight.data, head.bias.data = head.weight.data[order], head.bias.data[order]
    runner.model.teacher.digests = tensor_digests(runner.model.teacher.network)


def _wider(prefix: str = '') -> dict:
    """A backbone of twice the width: of what fits, BatchNorm's counters alone."""
    wide = MODELS.build(dict(type='ResNet', depth=18, base_channels=64))
    return {prefix + k: v for k, v in wide.state_dict().items()}


def _untrained(runner) -> None:
    network = runner.model.teacher.network
    for module in network.modules():
        if hasattr(module, 'reset_parameters'):
            module.reset_parameters()
    runner.model.teacher.digests = tensor_digests(network)


D = 'model__distillation__'
FAULTS = [
    # the teacher's file
    Fault('teacher_ckpt missing', 'teacher_ckpt is missing', _pop('teacher_ckpt')),
    Fault('teacher_config missing', 'teacher_config', _pop('teacher_config')),
    Fault('teacher file absent', 'lost.pth', option(model__teacher_ckpt='lost.pth')),
    Fault('teacher config absent', 'cannot be read', option(model__teacher_config='lost.py')),
    Fault('teacher half loaded', 'lacks .* of .* keys',
          _file(lambda s: dict(list(s.items())[::2]))),
    Fault('teacher empty', 'lacks', _file(lambda s: {})),
    Fault('teacher with a prefix in part', 'lacks', _file(
        lambda s: {f'net.{k}' if k.startswith('neck') else k: v for k, v in s.items()})),
    Fault('teacher backbone only', 'lacks', _file(
        lambda s: {k: v for k, v in s.items() if k.startswith('backbone')})),
    Fault('teacher misshaped', 'in another shape', _file(
        lambda s: {k: v[:1] if v.dim() > 1 else v for k, v in s.items()})),
    Fault('file of two networks', 'beyond the network', _file(
        lambda s: {**s, **{f'teacher.{k}': v for k, v in s.items()}})),
    Fault('teacher of other classes', 'classes',
          _teacher(model__roi_head__bbox_head__num_classes=7)),
    Fault('eval_teacher=False', 'eval_teacher=False is refused', option(model__eval_teacher=False)),
    # the teacher while it runs
    Fault('teacher in training mode', 'in training mode', None, network(lambda n: n.train())),
    Fault('teacher part in training mode', 'first: backbone', None,
          network(lambda n: n.backbone.train())),
    Fault('teacher trainable', 'requires a gradient', None,
          network(lambda n: n.requires_grad_(True))),
    Fault('one teacher tensor trainable', 'neck.* requires a gradient', None,
          network(lambda n: n.neck.requires_grad_(True))),
    Fault('teacher in the optimizer', 'is in the optimizer', None, at(-1, _optimizer)),
    Fault('teacher shares a module', "is the student's|share memory|requires a gradient", None,
          at(-1, _share)),
    Fault('teacher shares a tensor', 'share memory', None, at(-1, _share_weight)),
    Fault('teacher re-initialised', 'has changed since it was loaded', None, network(_reinit)),
    Fault('teacher buffer changed', 'changed since it was loaded.*running_mean', None,
          at(-1, _write)),
    Fault('teacher buffer changed later', 'changed since training began.*running_mean', None,
          at(2, _write)),
    Fault('teacher trains later', 'in training mode', None,
          at(2, lambda r, b: r.model.teacher.network.train())),
    Fault('teacher weights NaN', 'changed|loss_kd.* is nan', None, _poison('teacher')),
    # the student
    Fault('load_from of another network', 'load_from .* holds not one of',
          _student(lambda: {'net.a': torch.zeros(1)}, 'load_from')),
    Fault('load_from of another width', 'load_from .* holds not one of',
          _student(lambda: _wider('backbone.'), 'load_from')),
    Fault('load_from absent', 'does not exist', option(load_from='lost.pth')),
    Fault('backbone file of another network', 'init_cfg of backbone: not one of',
          _student(lambda: {'net.a': torch.zeros(1)}, 'init_cfg')),
    Fault('backbone file of another width', 'init_cfg of backbone: not one of',
          _student(_wider, 'init_cfg')),
    Fault('backbone file absent', 'lost.pth', option(
        model__backbone__init_cfg=dict(type='Pretrained', checkpoint='lost.pth'))),
    Fault('student frozen', 'not one of .* requires a gradient', None, _parameters(False)),
    Fault('optimizer without the student', 'are not in the optimizer', None, at(-1, _drop_group)),
    Fault('learning rate 0', 'learning rate is 0', option(optim_wrapper__optimizer__lr=0.0)),
    Fault("the student's learning rate 0", "learning rate is 0 .* lr_mult", option(
        optim_wrapper__paramwise_cfg=dict(custom_keys={
            name: dict(lr_mult=0.0) for name in ('backbone', 'neck.', 'rpn_head', 'roi_head')}))),
    Fault('student weights NaN', 'is nan at iteration 4', None, _poison('student')),
    Fault('image NaN', 'is nan at iteration 4', None, _poison('image')),
    Fault('box NaN', 'nan|finite', None, _poison('boxes')),
    # the terms
    Fault('hint on a frozen layer', 'loss_kd_hint at .* is dead',
          option(**{D + 'hint__pairs': ['backbone[0]'], 'model__backbone__frozen_stages': 4})),
    Fault('hint name wrong', 'no such submodule; near ones',
          option(**{D + 'hint__pairs': ['nekc']})),
    Fault('hint without pairs', 'pairs is empty', option(**{D + 'hint__pairs': []})),
    Fault('hint index wrong', 'has 5 outputs', option(**{D + 'hint__pairs': ['neck[9]']})),
    Fault('unknown term', 'the key does not tell what it compares', option(
        **{D + 'hnit': dict(type='L1Loss')})),
    Fault('unknown schedule', 'has no entry', schedule(start=3)),
    Fault('never begins', 'would never be on', schedule(begin=10**6)),
    Fault('begins at the end', 'would never be on', schedule(begin=4)),
    Fault('detached rcnn_cls', 'loss_kd_cls is dead', None,
          _loss('rcnn_cls', lambda v: v.detach())),
    Fault('detached rpn_cls', 'loss_kd_rpn_cls is dead', None,
          _loss('rpn_cls', lambda v: v.detach())),
    Fault('detached hint', 'loss_kd_hint is dead', None, _loss('hint', lambda v: v.detach())),
    Fault('constant loss', 'loss_kd_cls is dead', None,
          _loss('rcnn_cls', lambda v: torch.ones_like(v, requires_grad=True))),
    Fault('term NaN', 'loss_kd_cls is nan', None, _loss('rcnn_cls', lambda v: v * float('nan'))),
    Fault('term infinite', 'loss_kd_hint is inf', None,
          _loss('hint', lambda v: v * float('inf'))),
    Fault('term at zero', 'loss_kd_hint has been 0 for all of the first 50', option(
        train_cfg__max_epochs=13), _loss('hint', lambda v: v * 0)),
    Fault('check_teacher no switch', 'must be True or False', option(**{D + 'check_teacher': 1})),
    # on the digits: a teacher that is trained
    Fault('channel order', 'with the other channel order', _pixels(bgr_to_rgb=False),
          data='digits'),
    Fault('mean', 'is not the one that it was trained with', _pixels(mean=[0.0, 0.0, 0.0]),
          data='digits'),
    Fault('std', 'is not the one that it was trained with', _pixels(std=[1.0, 1.0, 1.0]),
          data='digits'),
    Fault('class order', 'if its classes stood in another order', None, at(-1, _roll),
          data='digits'),
    Fault('teacher untrained', 'That usually means a wrong checkpoint', None, at(-1, _untrained),
          data='digits'),
    Fault('term too heavy', 'loss_kd_hint dwarfs the hard losses',
          option(**{D + 'hint__loss_weight': 1e4}), data='digits'),
]  # fmt: skip


MMENGINES = ('FileClient', 'HardDiskBackend', 'save_param')
"""What it warns of itself, whatever the run."""


class Heard(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.said: list[str] = []

    def emit(self, record) -> None:
        # The end is put to it here.
        said = record.getMessage()
        if not any(each in said for each in (*MMENGINES, f'by {Enough.__name__}')):
            self.said.append(said)


class Enough(Exception):
    pass


def enough(runner, batch) -> None:
    """Ends a run."""
    raise Enough


DATA = ROOT / 'data/digits'
"""The digits; the tests make a few of their own."""


def config(directory: Path, data: str) -> Config:
    """A distilled student without a fault."""
    if data == 'digits':
        cfg = Config.fromfile(ROOT / 'configs/digits/mmkd.py')
        cfg.train_dataloader.update(num_workers=0, persistent_workers=False)
        cfg.train_dataloader.dataset.data_root = f'{DATA}/'
        cfg.work_dir = str(directory / 'work_dirs')
        return cfg
    plain = tiny_config(directory)  # 4 iterations
    path = directory / 'distilled.py'
    path.write_text(
        f'_base_ = {str(plain)!r}\n'
        "runner_type = 'mmkd.DistillationRunner'\n"
        'model = dict(\n'
        "    type='mmkd.KnowledgeDistillationTwoStageDetector',\n"
        f"    teacher_config={str(plain)!r}, teacher_ckpt='random',\n"
        f'    distillation={pairs.recipe()!r})\n'
    )
    return Config.fromfile(path)


def plant(fault: Fault | None, directory: Path, data: str = 'tiny', steps: int = 50) -> list[str]:
    """Run with a fault (None: without); what was said: warnings, and last the error, if any."""
    import time

    data = fault.data if fault else data
    cfg = config(Path(directory), data)
    Path(cfg.work_dir).mkdir(parents=True, exist_ok=True)
    cfg.val_cfg = cfg.val_dataloader = cfg.val_evaluator = None
    cfg.experiment_name = str(time.time_ns())
    heard = Heard()
    steps = 1 if data == 'digits' else steps

    try:
        if fault and fault.config:
            fault.config(cfg)
        runner = DistillationRunner.from_cfg(cfg)
        runner.logger.addHandler(heard)
        if fault and fault.runner:
            fault.runner(runner)
        at(steps, enough)(runner)
        runner.train()
    except Enough:
        pass
    except Exception as error:  # whatever a fault leads to: the words are what is tested
        heard.said.append(f'{type(error).__name__}: {error}')
    return heard.said


def caught(fault: Fault, said: list[str]) -> bool:
    return any(re.search(fault.says, line, re.DOTALL) for line in said)
