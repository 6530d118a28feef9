"""Where weights come from is told by the numbers that are there after loading."""

import logging

import pairs
import pytest
import torch
from mmdet.registry import MODELS
from mmengine.config import Config, ConfigDict
from mmengine.registry import RUNNERS
from pairs import build
from tiny import tiny_config

from mmkd.engine.weight_origins import origins


def plain(tmp_path, load_from=None):
    config = Config.fromfile(tiny_config(tmp_path))
    config.runner_type, config.load_from = 'mmkd.DistillationRunner', load_from
    config.val_cfg = config.val_dataloader = config.val_evaluator = None
    return config


@pytest.mark.parametrize('prefix', ['', 'student.'])
def test_a_plain_run_says_it_too(tmp_path, capfd, prefix):
    """A baseline that is trained from noise would let its student look good."""
    config = plain(tmp_path, str(tmp_path / 'start.pth'))
    state = MODELS.build(config.model).state_dict()
    torch.save({f'{prefix}{k}': v for k, v in state.items()}, config.load_from)
    runner = RUNNERS.build(config)
    if prefix:
        with pytest.raises(ValueError, match='load_from .* holds not one of .*another prefix'):
            runner.train()
        return
    runner.train()
    count = sum('num_batches' not in key for key in state)
    assert f'weights: {count} of {count} tensors loaded from' in ''.join(capfd.readouterr())


@pytest.mark.parametrize('share', [0.4, 0.6])
def test_a_file_of_less_than_half_is_warned_about(tmp_path, caplog, share):
    own = {k: v for k, v in build(pairs.fpn()).state_dict().items() if 'num_batches' not in k}
    network, path = build(pairs.fpn()), tmp_path / 'part.pth'
    count = int(share * len(own))
    part = {k: v + 1 for k, v in list(own.items())[:count]}
    torch.save(part, path)
    network.load_state_dict(part, strict=False)
    with caplog.at_level(logging.WARNING):
        (line,) = origins(network, str(path))
    assert line.startswith(f'{count} of {len(own)} tensors')


def swin_file(path, width=8):
    """As the backbone's authors published it, under names and in an order of their own."""
    backbone = swin(width)
    state = {}
    for key, value in backbone.state_dict().items():
        if key.startswith('stages'):
            key = key.replace('stages', 'layers').replace('attn.w_msa.', 'attn.')
            key = key.replace('ffn.layers.0.0.', 'mlp.fc1.').replace('ffn.layers.1.', 'mlp.fc2.')
        else:
            key = key.replace('projection', 'proj')
        state[key] = torch.rand_like(value) if value.is_floating_point() else value
    torch.save({'model': state}, path)


def swin(width=8, **kwargs):
    return MODELS.build(
        dict(
            type='mmdet.SwinTransformer', embed_dims=width, depths=(1, 1), num_heads=(1, 2),
            strides=(4, 2), out_indices=(0, 1), convert_weights=True, **kwargs,
        )
    )  # fmt: skip


def test_a_backbone_that_reads_another_librarys_file(tmp_path):
    path = str(tmp_path / 'swin.pth')
    swin_file(path)
    network = torch.nn.Module()
    network.backbone = swin(init_cfg=ConfigDict(type='Pretrained', checkpoint=path))
    with pytest.raises(ValueError, match='init_cfg of backbone: not one of'):
        origins(network)
    network.backbone.init_weights()
    count = sum('num_batches' not in key for key in network.backbone.state_dict())
    found = int(origins(network)[0].split()[0])
    assert count > found > count / 2
    swin_file(path, width=16)
    network.backbone = swin(init_cfg=ConfigDict(type='Pretrained', checkpoint=path))
    with pytest.raises(ValueError, match='init_cfg of backbone: not one of'):
        origins(network)
