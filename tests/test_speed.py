"""``mmkd speed``: a row for each network, whatever its config; what cannot be timed is named."""

import math
import re

import pairs
import pytest
import torch
from mmdet.registry import MODELS
from mmengine.config import Config
from tiny import tiny_config

from mmkd.commands import speed


@pytest.fixture(scope='module')
def made(tmp_path_factory):
    """A large and a small network, and a pair of two resolutions whose teacher is elsewhere."""
    folder = tmp_path_factory.mktemp('speed')
    for name, width in (('large', 8), ('small', 4)):
        cfg = Config.fromfile(tiny_config(folder, name, base_channels=width))
        state = MODELS.build(cfg.model).state_dict()
        torch.save({'state_dict': state}, folder / f'{name}.pth')
    cfg.model = pairs.distilled(
        cfg.model, '/nowhere/teacher.py',
        pairs.recipe() | dict(resolution=dict(student=(48, 48), teacher=(64, 64))), '/nowhere.pth',
    )  # fmt: skip
    cfg.dump(folder / 'pair.py')
    weights = {'kd_terms.hint.adapters.neck_0.weight': torch.zeros(1)}
    torch.save({'state_dict': state | weights}, folder / 'pair.pth')
    return folder


def networks(folder, *names):
    return [str(folder / f'{name}.{end}') for name in names for end in ('py', 'pth')]


def test_each_network_has_a_row(made, capsys, monkeypatch):
    shown = []
    timed = speed.time_step

    def time_step(model, batch):
        shown.append({(len(batch['inputs']), *image.shape[1:]) for image in batch['inputs']})
        return timed(model, batch)

    monkeypatch.setattr(speed, 'time_step', time_step)
    three = networks(made, 'large', 'small', 'pair')
    assert speed.main([*three, '--batch', '1', '3', '--images', '7']) == 0
    *_, head, _, large, small, pair = (
        [cell.strip() for cell in line.strip('|').split('|')]
        for line in capsys.readouterr().out.splitlines() if line.startswith('|')
    )  # fmt: skip
    assert head == ['config', 'checkpoint', 'params (M)', 'images/s', 'times the first',
                    'images/s, batch 3', 'times the first']  # fmt: skip
    for row, name in ((large, 'large'), (small, 'small'), (pair, 'pair')):
        assert row[:2] == networks(made, name)
        assert all(0 < float(cell) < math.inf for cell in row[2:])
    assert large[4] == large[6] == '1.00'
    assert float(large[2]) > float(small[2]) == float(pair[2])
    # In turn: the pair's student at its own scale. 7 single images and 2 batches, and warm-ups.
    at = {n: [{(n, 64, 64)}, {(n, 64, 64)}, {(n, 48, 48)}] for n in (1, 3)}
    assert shown == at[1] * (speed.WARM_UP + 7) + at[3] * (speed.WARM_UP + 2)


@pytest.mark.parametrize(
    ('arguments', 'says'),
    [
        (['large.py'], 'each network is a config and a checkpoint: .*large.py is alone'),
        (['large.py', 'large.pth', '--batch', '0'], '--batch 0: a number from 1'),
        (['large.py', 'large.pth', '--images', '-1'], '--images -1: a number from 1'),
        (['large.py', 'large.pth', '--batch', '9'], '--batch 9 is more .* the 8 of a test set'),
        (['large.py', 'none.pth'], 'no such checkpoint: .*none.pth'),
        (['none.py', 'large.pth'], 'none.py cannot be read: no such file'),
        (['large.py', 'small.pth'], 'small.pth does not fit the network.*: size mismatch for '),
        (['part.py', 'large.pth'], 'part.py defines no test_dataloader'),
        (['moved.py', 'large.pth'], 'the test set of .*moved.py is not on this machine'),
    ],
)
def test_what_cannot_be_timed_is_named(arguments, says, made, capsys):
    (made / 'part.py').write_text("_base_ = 'large.py'\ntest_dataloader = None\n")
    (made / 'moved.py').write_text(
        "_base_ = 'large.py'\ntest_dataloader = dict(dataset=dict(data_root='/nowhere'))\n"
    )
    paths = [str(made / word) if word.endswith(('.py', '.pth')) else word for word in arguments]
    with pytest.raises((SystemExit, ValueError)) as error:
        speed.main(paths)
    assert re.search(says, capsys.readouterr().err + str(error.value))
