"""A teacher's weights as other trainers wrap them."""

import pytest
import torch
from mmdet.registry import MODELS
from mmengine.config import Config
from tiny import tiny_config
from torch import nn

from mmkd.io.checkpoint import CheckpointError
from mmkd.io.teacher_weights import load_completely
from mmkd.models.teacher import Teacher
from mmkd.recipe import TeacherError


def network() -> nn.Module:
    torch.manual_seed(3)
    made = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    made.register_buffer('mask', torch.full((2,), -torch.inf))
    return made


def prefixed(*prefixes: str) -> dict:
    return {''.join(prefixes) + key: value for key, value in network().state_dict().items()}


WRAPPED = {
    '': ('', network().state_dict()),
    'MMEngine': ('', {'state_dict': prefixed(), 'ema_state_dict': prefixed('module.')}),
    'DDP': ('', {'state_dict': prefixed('module.')}),
    'model': ("under 'model'", {'model': prefixed(), 'epoch': 3}),
    'model_state_dict': ("under 'model_state_dict'", {'model_state_dict': prefixed()}),
    'compiled': ("after '_orig_mod.'", prefixed('_orig_mod.')),
    'Lightning': ("after 'model.'", {'state_dict': prefixed('model.'), 'epoch': 1}),
    'both': ("after 'module.' after '_orig_mod.'", prefixed('module.', '_orig_mod.')),
    'ema alone': ("under 'ema' after 'module.'", {'ema': {'steps': torch.tensor(3),
                                                          **prefixed('module.')}}),
    'arrays': ("under 'model'", {'model': {k: v.numpy() for k, v in prefixed().items()}}),
}  # fmt: skip


@pytest.mark.parametrize('name', WRAPPED)
def test_the_one_wrapping_that_fits_is_taken_and_said(tmp_path, name):
    wrapping, content = WRAPPED[name]
    torch.save(content, tmp_path / 'x.pth')
    filled = network()
    for value in filled.state_dict().values():
        value.zero_()
    found = load_completely(filled, str(tmp_path / 'x.pth'), None, 'c.py')
    assert found == (8, 0, wrapping)
    for key, value in network().state_dict().items():
        assert torch.equal(filled.state_dict()[key], value)


@pytest.mark.parametrize(
    ('content', 'reason'),
    [
        (
            {'model': prefixed(), 'ema': prefixed()},
            r"2 sets .*under 'model'; under 'ema'\): save",
        ),
        (
            {'model': {'0.weight': torch.ones(5)}},
            r"another.* Its weights under 'model' do not",
        ),
        ({'state_dict': {'model.x': torch.ones(1)}}, r"weights after 'model\.' do not fit either"),
        ({'x': torch.ones(1)}, r'name the config it was trained with$'),
    ],
)
def test_wrappings_that_do_not_decide_are_named(tmp_path, content, reason):
    torch.save(content, tmp_path / 'x.pth')
    with pytest.raises(TeacherError, match=reason):
        load_completely(network(), str(tmp_path / 'x.pth'), None, 'c.py')


def test_a_wrapped_teacher_is_of_numbers(tmp_path):
    torch.save(
        {'model': {**prefixed(), '0.bias': torch.tensor([0, torch.nan])}}, tmp_path / 'x.pth'
    )
    with pytest.raises(
        CheckpointError, match=rf'{tmp_path}/x.pth holds weights .*first in 0\.bias'
    ):
        load_completely(network(), str(tmp_path / 'x.pth'), None, 'c.py')


def test_a_teacher_knows_its_wrapping(tmp_path):
    config = str(tiny_config(tmp_path))
    state = MODELS.build(Config.fromfile(config).model).state_dict()
    torch.save({'model': {f'module.{k}': v for k, v in state.items()}}, tmp_path / 't.pth')
    assert Teacher(config, str(tmp_path / 't.pth')).wrapping == "under 'model' after 'module.'"
