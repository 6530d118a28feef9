"""A loss that is not finite stops the run before it touches a weight, and the step can be taken
again."""

import importlib.util
from pathlib import Path

import pairs
import pytest
import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.registry import MODELS
from pairs import ROOT, distil
from tiny import tiny_config

from mmkd.engine import step_dump
from mmkd.engine.runner import DistillationRunner
from mmkd.io.checkpoint import CheckpointError
from mmkd.observers import NonFiniteLossError


def replay(*args):
    spec = importlib.util.spec_from_file_location('replay', ROOT / 'tools/replay.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main([str(arg) for arg in args])


@pytest.fixture
def config(tmp_path):
    """A distilled student on the tiny data set."""
    plain = tiny_config(tmp_path, epochs=2)  # of 4 iterations
    path = tmp_path / 'distilled.py'
    path.write_text(
        f'_base_ = {str(plain)!r}\n'
        "runner_type = 'mmkd.DistillationRunner'\n"
        'model = dict(\n'
        "    type='mmkd.KnowledgeDistillationTwoStageDetector',\n"
        f'    teacher_config={str(plain)!r},\n'
        "    teacher_ckpt='random',\n"
        f'    distillation={pairs.recipe()!r})\n'
    )
    return path


class Poison(Hook):
    """Makes one weight infinite before one step, and remembers the others."""

    def __init__(self, at):
        self.at = at

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if runner.iter == self.at:
            model = runner.model
            model.backbone.layer2[0].conv2.weight.data[0] = float('inf')
            self.before = {k: v.clone() for k, v in model.named_parameters() if v.requires_grad}


class Keep(Hook):
    """Keeps one step that is finite, and its losses."""

    def __init__(self, at):
        self.at = at

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if runner.iter == self.at:
            self.path = runner._steps.save(runner, runner.model)

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        if runner.iter == self.at:
            self.losses = {k: v.item() for k, v in outputs.items() if 'loss' in k}


def test_the_run_stops_before_a_weight_is_touched_and_the_step_tells_where(config, capsys):
    runner = DistillationRunner.from_cfg(Config.fromfile(config))
    poison = Poison(5)
    runner.register_hook(poison, priority='NORMAL')
    with pytest.raises(NonFiniteLossError) as error:
        runner.train()
    said = str(error.value)
    path = Path(runner.work_dir) / 'step_5.pth'
    for part in (
        'loss_rpn_cls is nan',
        'iteration 6 (epoch 2)',
        'train_0',
        'tools/replay.py',
        path,
    ):
        assert str(part) in said, said
    for name, parameter in runner.model.named_parameters():
        assert torch.equal(parameter, poison.before[name]), name
    assert not list(path.parent.glob('*.part'))
    capsys.readouterr()
    assert replay(config, path) == 0
    out = capsys.readouterr().out
    assert '1 weights are not finite before the step (first: backbone.layer2.0.conv2.w' in out
    assert 'that is not finite: backbone.layer2.0.conv2 (Conv2d) was given finite numbers' in out
    assert 'loss_rpn_cls: nan   <--' in out


def test_a_step_taken_again_is_the_step(config):
    """The same batch, the same random numbers, the same losses to the bit."""
    runner = DistillationRunner.from_cfg(Config.fromfile(config))
    keep = Keep(5)
    runner.register_hook(keep, priority='VERY_LOW')  # before StepDumpHook
    runner._hooks.sort(key=lambda hook: hook is keep)
    runner.train()
    batch, step = step_dump.read_step(keep.path)
    assert (step['iter'], step['epoch']) == (5, 1)
    model = MODELS.build(Config.fromfile(config).model)
    model.load_state_dict(step['state_dict'])
    model.teacher.network.load_state_dict(runner.model.teacher.network.state_dict())
    model.train()
    model.guarded = True
    step_dump.restore_step(step)
    values = model(**model.data_preprocessor(batch, True), mode='loss')
    total, logs = model.parse_losses(values)
    assert {k: v.item() for k, v in logs.items() if 'loss' in k} == keep.losses


def test_masks_and_the_second_view_come_back(tmp_path):
    import zoo

    data = zoo.batch()
    for image, sample in zip(data['inputs'], data['data_samples'], strict=True):
        large = image.repeat_interleave(2, 1).repeat_interleave(2, 2)
        pairs.second_view(sample, large)
    for sample in data['data_samples']:
        again = step_dump._element(step_dump._plain_element(sample))
        assert type(again) is type(sample)
        assert again.metainfo == sample.metainfo
        assert torch.equal(again.gt_instances.bboxes, sample.gt_instances.bboxes)
        assert (again.gt_instances.masks.masks == sample.gt_instances.masks.masks).all()
        assert torch.equal(again.teacher_view.img, sample.teacher_view.img)
        assert again.teacher_view.scale == sample.teacher_view.scale
        assert torch.equal(again.gt_sem_seg.sem_seg, sample.gt_sem_seg.sem_seg)


@pytest.mark.parametrize('value', [float('nan'), float('inf'), float('-inf')])
def test_every_loss_at_fault_is_named(value):
    model = distil(pairs.fpn(), pairs.fpn(8))
    values = pairs.losses(model)
    assert model.parse_losses(values)
    values['loss_kd_cls'] = values['loss_kd_cls'] * value
    values['loss_rpn_bbox'] = [values['loss_cls'], values['loss_cls'] * value]
    with pytest.raises(NonFiniteLossError, match=r'loss_rpn_bbox is .*, loss_kd_cls is [-a-z]+$'):
        model.parse_losses(values)


def test_another_file_is_no_step(tmp_path):
    path = tmp_path / 'weights.pth'
    torch.save({'state_dict': {}}, path)
    with pytest.raises(CheckpointError, match='is no step: name the step_'):
        step_dump.read_step(str(path))


def test_a_step_of_another_config_is_refused(config, tmp_path, capsys):
    runner = DistillationRunner.from_cfg(Config.fromfile(config))
    keep = Keep(0)
    runner.register_hook(keep, priority='VERY_LOW')
    runner._hooks.sort(key=lambda hook: hook is keep)
    runner.train()
    other = tiny_config(tmp_path, name='other', base_channels=8)
    with pytest.raises(SystemExit, match='left by a run of another config'):
        replay(other, keep.path)
    with pytest.raises(SystemExit, match='does not exist'):
        replay(config, tmp_path / 'nothing.pth')
