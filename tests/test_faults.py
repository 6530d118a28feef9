"""Each planted fault is stopped, or warned about, by the sentence that names it."""

import dataclasses
import re
from types import SimpleNamespace

import faults
import pytest
import torch
from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.structures import InstanceData
from test_check_pair import tool

from mmkd.digests import tensor_digests
from mmkd.engine import teacher_check
from mmkd.engine.testing import check_complete
from mmkd.engine.training_checks import digest
from mmkd.recipe import TeacherError

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
        'backbone file of another network', 'backbone file of another width',
        'optimizer without the student', 'learning rate 0',
        "the student's learning rate 0", 'never begins', 'term at zero',
    )
]  # fmt: skip


@pytest.fixture(scope='module', autouse=True)
def digits(tmp_path_factory):
    """Drawn anew: not those that the teacher was trained on, of which it finds every one."""
    root = tmp_path_factory.mktemp('digits') / 'data'
    tool('make_digits').make(root, size=96, train=520, val=2, test=1, seed=7)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(faults, 'DATA', root)
        # No test depends on how busy the machine is.
        patch.setattr(teacher_check, 'SECONDS', 1000.0)
        yield root


NEEDS_DIGITS = [
    # A check that is in doubt looks at more images.
    pytest.param(f, marks=[pytest.mark.slow] if f.id == 'mean' else [])
    for f in faults.FAULTS
    if f.data == 'digits'
]


@pytest.mark.parametrize('fault', FAST, ids=lambda f: f.id)
def test_a_fault_is_named(fault, tmp_path):
    said = faults.plant(fault, tmp_path)
    assert faults.caught(fault, said), said


@pytest.mark.parametrize('fault', NEEDS_DIGITS, ids=lambda f: f.id)
def test_a_teacher_that_does_not_fit_is_named(fault, tmp_path):
    said = faults.plant(fault, tmp_path)
    assert faults.caught(fault, said), said


def test_the_weight_that_is_named_makes_the_gradients_equal(tmp_path):
    fault = next(f for f in faults.FAULTS if f.id == 'term too heavy')
    (said,) = faults.plant(fault, tmp_path)
    pattern = r'is (\d+) times theirs.*hint.loss_weight=(\S+) \(now (\S+)\)'
    times, advice, now = map(float, re.search(pattern, said).groups())
    assert now == 1e4 and times > 100
    assert advice == pytest.approx(now / times, rel=0.5)  # one digit


def test_no_checkpoint_is_written_beside_a_changed_teacher(tmp_path):
    fault = next(f for f in faults.FAULTS if f.id == 'teacher buffer changed later')

    def often(cfg):
        cfg.default_hooks.checkpoint = dict(type='CheckpointHook', by_epoch=False, interval=2)

    said = faults.plant(dataclasses.replace(fault, config=often), tmp_path)
    assert faults.caught(fault, said), said
    # It changes in the third step of four.
    assert [path.name for path in tmp_path.glob('**/*.pth')] == ['iter_2.pth']


@pytest.mark.parametrize('data', ['tiny', 'digits'])
def test_a_sound_run_is_not_warned_about(data, tmp_path):
    assert faults.plant(None, tmp_path, data) == []


def test_a_bounded_term_at_zero_is_no_fault(tmp_path):
    """A student that is better than its teacher on every box is right."""
    fault = next(f for f in faults.FAULTS if f.id == 'term at zero')
    runner = faults._loss('rpn_bbox', lambda v: v * 0)
    assert faults.plant(dataclasses.replace(fault, runner=runner), tmp_path) == []


def test_a_digest_sees_each_tensor():
    network = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    before = tensor_digests(network)
    assert sorted(before) == [
        '0.bias', '0.weight', '1.bias', '1.num_batches_tracked', '1.running_mean',
        '1.running_var', '1.weight',
    ]  # fmt: skip
    network[1].running_var[1] += 1e-6
    after = tensor_digests(network)
    assert [n for n in before if before[n] != after[n]] == ['1.running_var']
    assert digest(before) != digest(after)


def test_a_checkpoint_of_other_classes_is_refused_by_their_names(tmp_path):
    network = torch.nn.Linear(2, 2)
    path = str(tmp_path / 'a.pth')
    meta = {'dataset_meta': {'classes': ('cat', 'dog')}}
    torch.save({'state_dict': network.state_dict(), 'meta': meta}, path)
    check_complete(network, path, ['cat', 'dog'])
    with pytest.raises(SystemExit, match=r'trained on 2 classes \(cat, dog\), .* \(dog, cat\)'):
        check_complete(network, path, ['dog', 'cat'])
    with pytest.raises(SystemExit, match=r'weight, \(2, 2\) in the file and \(3, 2\) here'):
        check_complete(torch.nn.Linear(2, 3), path)


def test_the_look_at_the_teacher_changes_no_random_number(digits):
    from mmdet.registry import MODELS
    from mmengine.runner import Runner

    from mmkd.engine.class_names import apply_classes
    from mmkd.engine.random_state import random_state
    from mmkd.engine.teacher_check import check_teacher

    cfg = apply_classes(Config.fromfile(faults.ROOT / 'configs/digits/mmkd.py'))
    cfg.train_dataloader.update(num_workers=0, persistent_workers=False)
    cfg.train_dataloader.dataset.data_root = f'{digits}/'
    model, loader = MODELS.build(cfg.model), Runner.build_dataloader(cfg.train_dataloader)
    before = random_state()
    found = re.search(r'the teacher finds (\d+) % of', check_teacher(model, loader))
    # Processors round differently, and a few boxes lie at the edge of being found.
    assert int(found[1]) == pytest.approx(87, abs=2)
    after = random_state()
    assert before['python'] == after['python']
    assert (before['numpy'][1] == after['numpy'][1]).all()
    assert before['numpy'][2:] == after['numpy'][2:]
    assert torch.equal(before['torch'], after['torch'])


def images(*scores):
    """What a teacher says of one box in each of some images."""
    return [torch.tensor([[1.0, 1.0, score, 0.0, 0.0]]) for score in scores]


def test_few_images_accuse_nobody_and_equal_pixels_neither():
    low, high = images(*[0.1] * 10), images(*[0.9] * 10)
    assert 1e-4 < teacher_check.p_value(low, high) < 1e-2
    assert teacher_check.p_value(high, low) > 0.99
    assert teacher_check.p_value(low, low) == 1
    assert teacher_check.p_value(low, []) == 1


def test_a_box_is_no_witness_of_its_own():
    """A hundred boxes of one image that gain are one image that gains."""
    low, high = torch.zeros(100, 3), torch.ones(100, 3)
    assert teacher_check.p_value([low], [high]) > 0.1


def test_the_score_of_a_box_is_that_of_its_best_detection_times_iou():
    found = InstanceData(
        bboxes=torch.tensor(
            [[0.0, 0.0, 10.0, 5.0], [0.0, 0.0, 10.0, 10.0], [50.0, 50.0, 60.0, 60.0]]
        ),
        scores=torch.tensor([0.9, 0.4, 1.0]),
        labels=torch.tensor([1, 2, 1]),
    )
    boxes = torch.tensor([[0.0, 0.0, 10.0, 10.0], [80.0, 80.0, 90.0, 90.0]])
    said = teacher_check.match_boxes(found, boxes, torch.tensor([2, 1]))
    # 0.9 at IoU 1/2, of another class, and 0.4 at IoU 1, of its own: the mean of the two. What is
    # sure is the other class.
    expected = torch.tensor([[1.0, 0.0, 0.425, 2.0, 1.0], [0.0, 0.0, 0.0, 1.0, -1.0]])
    torch.testing.assert_close(said, expected)
    said = teacher_check.match_boxes(found, boxes, torch.tensor([1, 1]), by_class=False)
    torch.testing.assert_close(said[:, 1:3], torch.tensor([[1.0, 0.45], [0.0, 0.0]]))
    said = teacher_check.match_boxes(found[:0], boxes, torch.tensor([2, 1]))
    assert said.tolist() == [[0, 0, 0, 2, -1], [0, 0, 0, 1, -1]]


def named(labels, said):
    """What a teacher says of some boxes, which it finds unless what it says is -1."""
    columns = [[s >= 0 for s in said], [a == b for a, b in zip(labels, said, strict=True)]]
    return torch.tensor([*columns, [0.0] * len(said), labels, said]).float().T


def test_classes_in_another_order_are_told_from_classes_that_are_taken_for_one():
    labels = [0, 0, 0, 1, 1, 1, 2, 2, 2, 2]
    order = teacher_check.best_class_recall
    assert order([named(labels, [1, 1, 1, 2, 2, 0, 0, 0, 0, -1])]) == pytest.approx(0.8)
    assert order([named(labels, labels)]) == 1
    assert order([named(labels, [0] * 10)]) == pytest.approx(0.4)
    assert order([named(labels, [-1] * 10)]) == 0
    # The data have two classes of the teacher's: numbers need not be those of one list.
    assert order([named([1, 1], [7, 7])]) == 1


def judged(monkeypatch, looks):
    """What is said of a teacher of which this was seen: (own, others)."""
    monkeypatch.setattr(teacher_check, '_look', lambda *_: looks)
    network = SimpleNamespace(test_cfg={}, predict=None, modules=lambda: [])
    model = SimpleNamespace(
        teacher=SimpleNamespace(source='a.pth', network=network),
        classes=SimpleNamespace(indices=[0]),
        sites=dict(rcnn=None),
    )
    return teacher_check.check_teacher(model, SimpleNamespace(dataset=[]))


def gain_in(count):
    """Other pixels help in some of 40 images."""
    other = images(*(0.5 + 0.01 * i for i in range(count, 0, -1)), *[0.5] * (40 - count))
    return images(*[0.5] * 40), {'other pixels': other}


def test_the_best_of_the_pixels_that_are_better_are_named():
    """With a wrong std many are better in every image: the ranks are the same."""
    own, some, more = (images(*[score + 0.01 * i for i in range(40)]) for score in (0.0, 0.2, 0.4))
    others = {'some': some, 'more': more, 'not asked': []}
    chance, name = teacher_check.best_preprocessing(own, others, 5)
    assert name == 'more'
    assert chance == 15 * teacher_check.p_value(own, more)
    # Of those that are certain: this is larger in the mean, and in one image alone.
    assert (
        teacher_check.best_preprocessing(own, {**others, 'one': own[:-1] + images(90.0)})[1]
        == 'more'
    )
    assert teacher_check.best_preprocessing(own, {'same': own}) == (1, '')


def test_what_may_be_an_accident_is_warned_about(monkeypatch):
    heard = faults.Heard()
    logger = MMLogger.get_current_instance()
    logger.addHandler(heard)
    try:
        assert '100 % of 40 boxes' in judged(
            monkeypatch, gain_in(5)
        )  # 1/32, and there are 5 comparisons
        assert heard.said == []
        assert '100 % of 40 boxes' in judged(monkeypatch, gain_in(12))  # 1/4096
        (said,) = heard.said
        assert 'with other pixels it finds 100 % instead of 100 %' in said
        assert 'scores 0.520 instead of 0.500' in said
        with pytest.raises(TeacherError, match='is not the one that it was trained with'):
            judged(monkeypatch, gain_in(20))
    finally:
        logger.removeHandler(heard)


def test_pixels_are_not_blamed_for_a_checkpoint_that_they_do_not_mend(monkeypatch):
    """Of an untrained network some pixels bring more out than others."""
    low, high = (torch.tensor([[0.0, 0.0, score, 0.0, -1.0]]) for score in (0.1, 0.2))
    looks = [low] * 40, {'other pixels': [high] * 40}
    with pytest.raises(TeacherError, match='usually means a wrong checkpoint'):
        judged(monkeypatch, looks)
    some = torch.tensor([[1.0, 1.0, 0.0, 0.0, 1.0]])  # chance finds a fifth, and names it right
    looks = [low + some] * 8 + [low] * 32, {'other pixels': [high + some] * 8 + [high] * 32}
    with pytest.raises(TeacherError, match='20 % of 40 boxes.*usually means a wrong checkpoint'):
        judged(monkeypatch, looks)
    # Found with others, and its class guessed.
    guesses = [torch.tensor([1.0, 1.0 if i % 10 == 0 else 0.0, 0.0, 0.0, 1.0]) for i in range(40)]
    looks = [low] * 40, {'other pixels': [high + guess for guess in guesses]}
    with pytest.raises(TeacherError, match='100 % instead of 0 .*usually means a wrong checkpoint'):
        judged(monkeypatch, looks)
    looks = [low] * 40, {'other pixels': [high + torch.tensor([1.0, 1.0, 0.0, 0.0, 1.0])] * 40}
    with pytest.raises(TeacherError, match='is not the one that it was trained with'):
        judged(monkeypatch, looks)


def looked(monkeypatch, scores, clock=None, images=512):
    """How many images a teacher is shown, by its score of each with each kind of pixels."""
    asked = dict.fromkeys(scores, 0)

    def ask(model, batch, change, by_class):
        asked[change] += 1
        return [torch.tensor([[1.0, 1.0, scores[change](batch)]] * 4)]

    monkeypatch.setattr(teacher_check, '_ask', ask)
    monkeypatch.setattr(teacher_check, '_batches', lambda *_: iter(range(images)))
    candidates = {name: name for name in scores if name}
    monkeypatch.setattr(teacher_check, '_candidates', lambda _: candidates)
    if clock:
        ticks = iter(range(10**6))
        monkeypatch.setattr(teacher_check.time, 'perf_counter', lambda: clock * next(ticks))
    model = SimpleNamespace(
        teacher=SimpleNamespace(network=SimpleNamespace(data_preprocessor=None, modules=lambda: []))
    )
    teacher_check._look(model, None, None, True)
    return asked


def test_pixels_that_are_hopeless_are_not_tried_further(monkeypatch):
    asked = looked(monkeypatch, {None: lambda i: 0.5, 'bad': lambda i: 0.1})
    assert asked == {None: 32, 'bad': 32}


def test_pixels_that_are_as_good_are_tried_to_the_end(monkeypatch):
    scores = {None: lambda i: 0.5, 'same': lambda i: 0.5 + 0.125 * (-1) ** i, 'bad': lambda i: 0.1}
    assert looked(monkeypatch, scores) == {None: 512, 'same': 512, 'bad': 32}


def test_a_slow_machine_looks_at_its_own_pixels_until_there_are_boxes(monkeypatch):
    monkeypatch.setattr(teacher_check, 'SECONDS', 16.0)
    # Ten seconds an image of four boxes: thirty boxes are eight images, but twice the budget is
    # over at the fourth.
    assert looked(monkeypatch, {None: lambda i: 0.5, 'same': lambda i: 0.5}, 10.0) == {
        None: 4, 'same': 0,
    }  # fmt: skip
    # Four seconds: the boxes are there at the eighth.
    assert looked(monkeypatch, {None: lambda i: 0.5, 'same': lambda i: 0.5}, 4.0) == {
        None: 8, 'same': 0,
    }  # fmt: skip
