"""Each planted fault is stopped, or warned about, by the sentence that names it."""

import faults
import pytest
import torch
from mmengine.config import Config
from test_check_pair import tool

from mmkd import launch
from mmkd.guard import digest
from mmkd.teacher import fingerprint

# Building a network takes most of the time: those whose check has a test of its own are run by
# benchmarks/reliability/faults.py alone.
FAST = [
    f
    for f in faults.FAULTS
    if f.id
    in (
        'teacher half loaded', 'teacher in training mode', 'one teacher tensor trainable',
        'teacher in the optimizer', 'teacher shares a tensor', 'teacher re-initialised',
        'teacher buffer changed later', 'load_from of another network', 'student frozen',
        'backbone file of another network', 'optimizer without the student', 'learning rate 0',
        'never begins', 'term at zero',
    )
]  # fmt: skip


@pytest.fixture(scope='module', autouse=True)
def digits(tmp_path_factory):
    root = tmp_path_factory.mktemp('digits') / 'data'
    tool('make_digits').make(root, size=96, train=40, val=2, test=1, seed=0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(faults, 'DATA', root)
        yield root


# Swapped channels and another mean cost a teacher a tenth of its boxes. Among the sixty or so of
# this look that is not always clear enough to stop a run (of these images it is not):
# tools/check_pair.py --data looks at more, and has its own tests of both.
NEEDS_DIGITS = [
    f for f in faults.FAULTS if f.data == 'digits' and f.id not in ('channel order', 'mean')
]


@pytest.mark.parametrize('fault', FAST, ids=lambda f: f.id)
def test_a_fault_is_named(fault, tmp_path):
    said = faults.plant(fault, tmp_path)
    assert faults.caught(fault, said), said


@pytest.mark.parametrize('fault', NEEDS_DIGITS, ids=lambda f: f.id)
def test_a_teacher_that_does_not_fit_is_named(fault, tmp_path):
    said = faults.plant(fault, tmp_path)
    assert faults.caught(fault, said), said


def test_a_sound_run_is_not_warned_about(tmp_path):
    said = faults.plant(None, tmp_path)
    assert said == []


def test_a_fingerprint_sees_each_tensor():
    network = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    before = fingerprint(network)
    assert sorted(before) == [
        '0.bias', '0.weight', '1.bias', '1.num_batches_tracked', '1.running_mean',
        '1.running_var', '1.weight',
    ]  # fmt: skip
    network[1].running_var[1] += 1e-6
    after = fingerprint(network)
    assert [n for n in before if before[n] != after[n]] == ['1.running_var']
    assert digest(before) != digest(after)


def test_a_checkpoint_of_other_classes_is_refused_by_their_names(tmp_path):
    network = torch.nn.Linear(2, 2)
    path = str(tmp_path / 'a.pth')
    meta = {'dataset_meta': {'classes': ('cat', 'dog')}}
    torch.save({'state_dict': network.state_dict(), 'meta': meta}, path)
    launch.check_complete(network, path, ['cat', 'dog'])
    with pytest.raises(SystemExit, match=r'trained on 2 classes \(cat, dog\), .* \(dog, cat\)'):
        launch.check_complete(network, path, ['dog', 'cat'])
    with pytest.raises(SystemExit, match=r'weight, \(2, 2\) in the file and \(3, 2\) here'):
        launch.check_complete(torch.nn.Linear(2, 3), path)


def test_the_look_at_the_teacher_changes_no_random_number(digits):
    from mmdet.registry import MODELS
    from mmengine.runner import Runner

    from mmkd.classes import apply_classes
    from mmkd.teacher_check import check_teacher
    from mmkd.watch import random_state

    cfg = apply_classes(Config.fromfile(faults.ROOT / 'configs/digits/mmkd.py'))
    cfg.train_dataloader.update(num_workers=0, persistent_workers=False)
    cfg.train_dataloader.dataset.data_root = f'{digits}/'
    model, loader = MODELS.build(cfg.model), Runner.build_dataloader(cfg.train_dataloader)
    before = random_state()
    assert 'the teacher finds 100 % of' in check_teacher(model, loader)
    after = random_state()
    assert before['python'] == after['python']
    assert (before['numpy'][1] == after['numpy'][1]).all()
    assert before['numpy'][2:] == after['numpy'][2:]
    assert torch.equal(before['torch'], after['torch'])
