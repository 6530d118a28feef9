"""A user's own methods: the page docs/own_term.md, as a user would follow it, outside of mmkd.

Run as a script, this file is one of two processes: ``RANK PORT FOLDER OUT``.
"""

import copy
import json
import os
import pickle
import re
import signal
import socket
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pairs
import pytest
import torch
import warm
from mmdet.models.task_modules.samplers import RandomSampler
from mmdet.registry import MODELS
from mmdet.utils import register_all_modules
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.logging import MessageHub
from mmengine.model import MMDistributedDataParallel, convert_sync_batchnorm
from mmengine.optim import build_optim_wrapper
from mmengine.runner import Runner
from test_checkpoint import same
from test_tools import publish_model, same_predictions, test, train
from tiny import tiny_config
from torch import nn

from mmkd import TERMS, DistillTerm, FeatureTerm, Needs, RowTerm
from mmkd.analysis.pair_check import check_pair
from mmkd.commands import terms
from mmkd.commands.terms import describe
from mmkd.engine.exit import leave
from mmkd.engine.runner import DistillationRunner
from mmkd.engine.summary import startup_table
from mmkd.io.checkpoint import from_plain, read_checkpoint
from mmkd.models.heads import Rows
from mmkd.observers import DeadTermError, UnownedParameterError
from mmkd.options.share import gradient_norm
from mmkd.recipe import terms_on

PAGE = pairs.ROOT / 'docs/own_term.md'
PAIR = """\
_base_ = ['tiny.py', {recipe!r}]
model = dict(
    type='mmkd.KnowledgeDistillationTwoStageDetector',
    teacher_config={teacher!r},
    teacher_ckpt='random',
    distillation=_base_.distillation)
train_cfg = dict(val_interval=9)
"""
OWN = {
    f'kd_terms.mgd.{module}.{kind}'
    for i in range(5)
    for module in (f'adapters.neck_{i}', f'layers.neck_{i}.0', f'layers.neck_{i}.2')
    for kind in ('weight', 'bias')
}
"""What the term on the page has learned, by its name in the checkpoint."""


def files_on(page: str) -> dict[str, str]:
    """The code on the page, by the file that the first line of each block names."""
    files: dict[str, str] = {}
    for code in re.findall(r'^```python\n(.*?)^```$', page, re.S | re.M):
        name = re.match(r'# (\w+\.py)\b', code)[1]
        files[name] = files.get(name, '') + code
    return files


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """The user's repository: the files on the page, beside a plain config and its teacher's."""
    folder = tmp_path_factory.mktemp('own')
    for name, code in files_on(PAGE.read_text()).items():
        (folder / name).write_text(code)
    tiny_config(folder, epochs=2)
    tiny_config(folder, 'teacher', channels=16)
    recipe = str(pairs.ROOT / 'configs/_base_/chen2017.py')
    teacher = str(folder / 'teacher.py')
    (folder / 'my_pair.py').write_text(PAIR.format(recipe=recipe, teacher=teacher))
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        yield folder
    for name in ('my_terms', 'test_my_terms'):
        sys.modules.pop(name, None)
    for name in (
        'MaskedGeneration',
        'Divergence',
        'FusedLevels',
        'WhereObjectsAre',
        'PositiveRoIs',
    ):
        TERMS.module_dict.pop(name, None)


@pytest.fixture(scope='module')
def my_terms(folder):
    Config.fromfile(folder / 'my_method.py')
    return sys.modules['my_terms']


@pytest.fixture(scope='module')
def whole(folder):
    """The work folder of a run of two epochs that was not interrupted."""
    work_dir = folder / 'whole'
    fresh_run()
    train.main([str(folder / 'my_method.py'), '--work-dir', str(work_dir), *named('whole')])
    return work_dir


def fresh_run() -> None:
    """What a new process would not know: the ratios that an earlier run measured."""
    MessageHub.get_current_instance().runtime_info.pop('mmkd_gradient_shares', None)


def named(name: str) -> list[str]:
    return ['--cfg-options', f'visualizer.name={name}']


def last(work_dir: Path, name: str = 'epoch_2') -> dict:
    return from_plain(read_checkpoint(str(work_dir / f'{name}.pth')))


def assert_same_run(one: dict, two: dict) -> None:
    for key in ('state_dict', 'optimizer', 'ema_state_dict', 'mmkd_resume'):
        assert same(one.get(key), two.get(key)), key
    assert one['meta']['iter'] == two['meta']['iter']


def distilled(**terms: dict) -> nn.Module:
    """A tiny pair with these terms alone."""
    return pairs.distil(pairs.fpn(), pairs.fpn(8), pairs.off() | terms)


def refusal(**terms: dict) -> str:
    with pytest.raises(ValueError) as refused:
        distilled(**terms)
    return str(refused.value)


# ---------------------------------------------------------------------------------- the page


def test_each_block_of_the_page_names_its_file(folder):
    found = files_on(PAGE.read_text())
    assert list(found) == [
        'my_terms.py',
        'my_method.py',
        'my_slow_generator.py',
        'test_my_terms.py',
    ]
    assert found['my_terms.py'].count('@TERMS.register_module()') == 5


def test_the_tests_of_the_page_pass(my_terms):
    import test_my_terms

    tests = [value for name, value in vars(test_my_terms).items() if name.startswith('test_')]
    assert len(tests) == 2
    for each in tests:
        torch.manual_seed(0)
        each()


def test_the_pair_of_the_page_is_a_go(my_terms, folder, capsys):
    report = check_pair(Config.fromfile(folder / 'my_method.py'), size=(64, 64), processes=1)
    assert report.go, report.against
    said = capsys.readouterr().out
    assert 'MaskedGeneration loss_weight=0.02, ratio=0.5' in said
    assert re.search(r'\| loss_kd_mgd +\| 0\.0', said)


@pytest.mark.slow
def test_the_trial_in_two_processes_finds_the_users_module(my_terms, folder, monkeypatch):
    monkeypatch.setenv('PYTHONPATH', f'{pairs.ROOT}:{folder}')
    report = check_pair(Config.fromfile(folder / 'my_method.py'), size=(64, 64), processes=2)
    assert report.go, report.against


@pytest.mark.parametrize('kind', ['FusedLevels', 'WhereObjectsAre', 'PositiveRoIs'])
def test_the_other_terms_of_the_page_reach_the_student(my_terms, kind):
    model = distilled(mine=dict(type=kind))
    values = pairs.losses(model)
    assert [name for name in values if 'kd' in name] == ['loss_kd_mine']
    assert values['loss_kd_mine'] > 0
    values['loss_kd_mine'].backward()
    own = pairs.gradients(model)
    adapters = model.kd_terms['mine'].adapters
    assert len(adapters) == (1 if kind == 'PositiveRoIs' else 5)
    assert all(own[f'kd_terms.mine.adapters.{name}.weight'].any() for name in adapters)
    assert own['backbone.conv1.weight'].any()


def test_masks_are_the_cells_whose_centre_is_in_a_box(my_terms):
    boxes = [torch.tensor([[1.0, 0.0, 3.0, 1.0], [0.0, 1.6, 0.9, 3.0]]), torch.zeros(0, 4)]
    first, second = my_terms.inside(boxes, 3, 4)
    assert first.tolist() == [[0, 1, 1, 0], [0, 0, 0, 0], [1, 0, 0, 0]]
    assert not second.any() and second.shape == (3, 4)


# ---------------------------------------------------------------------------------- a run of it


def test_weights_of_its_own_are_trained_and_saved(whole):
    first, second = last(whole, 'epoch_1'), last(whole)
    weights = {k: v for k, v in second['state_dict'].items() if k.startswith('kd_terms.mgd.')}
    assert set(weights) == OWN
    assert [k for k, v in weights.items() if torch.equal(v, first['state_dict'][k])] == []
    plain = MODELS.build(Config.fromfile(whole.parent / 'tiny.py').model)
    hint = [k for k in second['state_dict'] if k.startswith('kd_terms.hint.')]
    groups = second['optimizer']['param_groups']
    slots = sum(len(group['params']) for group in groups)
    assert slots == len(list(plain.parameters())) + len(OWN) + len(hint)
    momenta = second['optimizer']['state']
    assert len(momenta) == slots
    # Terms are the last of the detector's modules, and this one the last that has parameters.
    for state in list(momenta.values())[-len(OWN) :]:
        assert state['momentum_buffer'].any()


def test_each_part_is_logged_and_so_is_a_weight_that_varies(whole):
    (path,) = whole.glob('*/vis_data/scalars.json')
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    steps = [line for line in lines if 'loss' in line]
    assert len(steps) == 8
    for step in steps:
        assert {k for k in step if 'mgd' in k or 'kl' in k} == {
            *('loss_kd_mgd_objects', 'loss_kd_mgd_rest', 'weight_kd_mgd'),
            *('loss_kd_kl', 'weight_kd_kl'),
        }
        assert not any('kd_cls' in k for k in step)
    rising = [step['weight_kd_mgd'] for step in steps]
    assert rising == pytest.approx([0.02 * f for f in (0.2, 0.4, 0.6, 0.8, 1, 1, 1, 1)], rel=1e-4)
    assert len({step['weight_kd_kl'] for step in steps}) > 1


class Stop(Hook):
    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        if runner.iter + 1 == 6:
            os.kill(os.getpid(), signal.SIGTERM)


def test_stopped_and_resumed_it_equals_a_run_that_was_not(folder, whole, monkeypatch):
    """In the second epoch: with momentum, a rising weight, a measured one, and random masks."""
    config, work_dir = str(folder / 'my_method.py'), folder / 'parts'
    train_on = DistillationRunner.train

    def told(runner):
        if not runner._resume:
            runner.register_hook(Stop())
        return train_on(runner)

    monkeypatch.setattr(DistillationRunner, 'train', told)
    fresh_run()
    with pytest.raises(SystemExit) as stopped:
        train.main([config, '--work-dir', str(work_dir), *named('stopped')])
    assert stopped.value.code == 128 + signal.SIGTERM
    assert (work_dir / 'iter_6.pth').exists() and not (work_dir / 'epoch_2.pth').exists()
    fresh_run()
    train.main([config, '--work-dir', str(work_dir), '--resume', *named('resumed')])
    assert_same_run(last(whole), last(work_dir))


def test_paramwise_cfg_reaches_it_by_its_key(folder, my_terms):
    cfg = Config.fromfile(folder / 'my_slow_generator.py')
    cfg.optim_wrapper.paramwise_cfg.custom_keys['kd_terms.mgd'].lr_mult = 0.0
    del cfg.model.distillation.mgd['schedule']
    model = pairs.build(cfg.model)
    before = copy.deepcopy(model.state_dict())
    wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
    pairs.total(model, pairs.losses(model)).backward()
    wrapper.step()
    reached = {name for name, gradient in pairs.gradients(model).items() if gradient.any()}
    kept = {name for name in reached if torch.equal(model.state_dict()[name], before[name])}
    assert len(kept) > 20 and kept == OWN & reached


def test_plain_mmdetection_loads_the_checkpoint_without_it(folder, whole, capfd):
    cfg = Config.fromfile(folder / 'tiny.py')
    cfg.load_from, cfg.work_dir = str(whole / 'epoch_2.pth'), str(folder / 'plain')
    cfg.visualizer.name = 'plain'
    runner = Runner.from_cfg(cfg)
    capfd.readouterr()
    runner.load_or_resume()
    said = ''.join(capfd.readouterr())
    assert all(key in said for key in OWN) and 'missing keys' not in said
    state = last(whole)['state_dict']
    own = runner.model.state_dict()
    assert set(state) - set(own) == {k for k in state if k.startswith('kd_terms.')}
    assert all(torch.equal(value, state[key]) for key, value in own.items())


def test_publishing_strips_it(folder, whole, capsys):
    final = publish_model.publish(str(whole / 'epoch_2.pth'), str(folder / 'out.pth'))
    assert 'left out: 40 tensors of distillation terms' in capsys.readouterr().out
    published = torch.load(final, weights_only=True)['state_dict']
    plain = MODELS.build(Config.fromfile(folder / 'tiny.py').model)
    plain.load_state_dict(published, strict=True)


def test_as_a_teacher_it_is_loaded_without_it(folder, whole, my_terms):
    """Named by the config that it was trained with, or by the plain student's."""
    for config in ('my_method.py', 'tiny.py'):
        model = copy.deepcopy(pairs.distilled(pairs.fpn(), str(folder / config), pairs.recipe()))
        model.teacher_ckpt = str(whole / 'epoch_2.pth')
        teacher = pairs.build(model).teacher
        assert teacher.passed_over == len(OWN) + 10
        state = last(whole)['state_dict']
        own = teacher.network.state_dict()
        assert all(torch.equal(value, state[key]) for key, value in own.items())


# ---------------------------------------------------------------------------------- two processes

WORLD = 2
BOXES = (2, 0)
"""How many boxes the image of each process has."""


class Seldom(FeatureTerm):
    """Layers that an image without boxes does not pass through."""

    def build(self, pair):
        return nn.Conv2d(pair.channels[1], 1, 1, bias=False)

    def compare(self, student, teacher, layers, boxes):
        if not any(map(len, boxes)):
            return (student - teacher).square().mean()
        return (layers(student) - layers(teacher)).square().mean()


class WithoutWord(DistillTerm):
    """Finds nothing to compare in a batch without boxes, and says so by None."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def needs(self):
        return Needs(pairs=('neck[0]',))

    def bind(self, pairs):
        self.pairs = list(pairs)

    def forward(self, step):
        if not any(map(len, step.boxes(self.pairs[0]))):
            return None
        return dict(part=self.scale * step.features(self.pairs[0])[0].square().mean())


CASES = {
    'page': dict(
        mgd=dict(type='MaskedGeneration', ratio=0.0), kl=dict(type='Divergence', site='rcnn')
    ),
    'none on one rank': dict(mine=dict(type=WithoutWord)),
    'layers unused on one rank': dict(mine=dict(type=Seldom)),
}


def student(case: str) -> nn.Module:
    """In eval mode, where BatchNorm does not see how a batch is divided."""
    return distilled(**CASES[case]).eval()


def image(rank: int) -> dict:
    return pairs.batch((BOXES[rank],), seed=rank)


def first_of(self, gallery, num):
    """Sampling that does not depend on which process draws."""
    return gallery[:num]


def work(rank: int, port: str, case: str, out: str) -> None:
    import my_terms  # noqa: F401

    RandomSampler.random_choice = first_of
    os.environ.update(MASTER_ADDR='127.0.0.1', MASTER_PORT=port)
    torch.distributed.init_process_group(
        'gloo', rank=rank, world_size=WORLD, timeout=timedelta(seconds=120)
    )
    model = student(case)
    wrapped = MMDistributedDataParallel(
        model, find_unused_parameters=False, broadcast_buffers=False
    ).eval()
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    saved = {}
    for _ in range(2):  # the second waits for the buckets of the first
        optimizer.zero_grad()
        data = model.data_preprocessor(image(rank), True)
        pairs.total(model, wrapped(**data, mode='loss')).backward()
        saved.setdefault('gradients', pairs.gradients(model))
        optimizer.step()
    saved['trained'] = model.state_dict()
    torch.save(saved, out)
    leave()


def run(folder: Path, tmp_path: Path, case: str) -> list[dict]:
    with socket.socket() as server:
        server.bind(('127.0.0.1', 0))
        port = str(server.getsockname()[1])
    outs = [tmp_path / f'{rank}.pth' for rank in range(WORLD)]
    env = {**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': f'{pairs.ROOT}:{folder}'}
    env['RES_OPTIONS'] = 'timeout:1 attempts:1'  # as in test_distributed.py
    workers = [
        subprocess.Popen(
            [warm.python(), __file__, str(rank), port, case, str(out)],
            env=env, cwd=pairs.ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        )
        for rank, out in enumerate(outs)
    ]  # fmt: skip
    try:
        for worker in workers:
            _, errors = worker.communicate(timeout=300)
            assert worker.returncode == 0, errors.decode()[-3000:]
    finally:
        for worker in workers:
            worker.kill()
    return [torch.load(out, weights_only=True) for out in outs]


@pytest.mark.parametrize(
    'case', [pytest.param(c, marks=[pytest.mark.slow] if c == 'page' else []) for c in CASES]
)
def test_two_processes_train_it_alike(folder, my_terms, tmp_path, monkeypatch, case):
    """By the mean of their gradients, also where one process has no boxes."""
    monkeypatch.setattr(RandomSampler, 'random_choice', first_of)
    one, two = run(folder, tmp_path, case)
    alone = []
    for rank in range(WORLD):
        model = student(case)
        pairs.total(model, pairs.losses(model, image(rank))).backward()
        alone.append(pairs.gradients(model))
    own = [name for name in one['gradients'] if name.startswith('kd_terms.')]
    assert own == [name for name, _ in model.named_parameters() if name.startswith('kd_terms.')]
    for name in own:
        assert torch.equal(one['gradients'][name], two['gradients'][name])
        mean = sum(a.get(name, torch.zeros(())) for a in alone) / WORLD
        torch.testing.assert_close(
            one['gradients'][name], mean.expand_as(one['gradients'][name]), rtol=1e-4, atol=1e-6
        )
    before = student(case).state_dict()
    for name in own:
        assert torch.equal(one['trained'][name], two['trained'][name])
        assert not torch.equal(one['trained'][name], before[name])


# ---------------------------------------------------------------------------------- keys and types


class Distance(FeatureTerm):
    """Without arguments of its own, and without ``**kwargs``."""

    def __init__(self):
        super().__init__()

    def compare(self, student, teacher, layers, boxes):
        return (student - teacher).square().mean()


class Squares(RowTerm):
    """Over rows, with an option of its own; the base class's are passed on."""

    def __init__(self, power: float = 2.0, **options):
        super().__init__(**options)
        self.power = power
        self.seen: list[Rows] = []

    def compare(self, rows):
        self.seen.append(rows)
        weight = rows.weight if self.kind == 'bbox' else rows.weight[:, None]
        return ((rows.student - rows.teacher).abs() ** self.power * weight).sum() / rows.avg_factor


class InParts(Distance):
    def compare(self, student, teacher, layers, boxes):
        error = (student - teacher).square()
        return dict(top=error[:, :, :1].mean(), all=error.mean())


@pytest.fixture
def registered():
    """The classes above under their names."""
    kinds = (Distance, Squares, InParts)
    for kind in kinds:
        TERMS.register_module(module=kind)
    yield
    for kind in kinds:
        TERMS.module_dict.pop(kind.__name__)


def test_several_terms_under_keys_of_ones_own(registered):
    """Two of one class, beside one of the paper's; each with weights and a weight of its own."""
    model = distilled(
        near=dict(type='Distance', pairs=['neck[0]'], loss_weight=2.0),
        far=dict(type='Distance', pairs=['neck[3]', 'backbone[1]']),
        rows=dict(type='Squares', power=1.0),
        rpn_cls=dict(type='WeightedSoftCELoss', loss_weight=0.5),
    )
    values = pairs.losses(model)
    assert {name for name in values if 'kd' in name} == {
        'loss_kd_near', 'loss_kd_far', 'loss_kd_rows', 'loss_kd_rpn_cls'
    }  # fmt: skip
    assert {name for name, _ in model.kd_terms.named_parameters()} == {
        f'{key}.adapters.{layer}.{kind}'
        for key, layer in (('near', 'neck_0'), ('far', 'neck_3'), ('far', 'backbone_1'))
        for kind in ('weight', 'bias')
    }
    pairs.total(model, values).backward()
    assert all(p.grad.any() for p in model.kd_terms.parameters())
    assert model.kd_terms['near'].loss_weight == 2 and model.kd_terms['far'].loss_weight == 1
    # The weight is on the loss, once.
    model.kd_terms['near'].loss_weight = 1.0
    assert pairs.losses(model)['loss_kd_near'] * 2 == values['loss_kd_near']


@pytest.mark.parametrize('key', ['my-term', 'a.b', '2nd', 'two words'])
def test_a_key_that_is_no_identifier_is_refused(key):
    said = refusal(**{key: dict(type=Distance)})
    assert f'a term {key!r}' in said and 'must be an identifier' in said


@pytest.mark.parametrize('key', ['keys', 'pop', 'items', 'type', 'training', 'forward'])
def test_a_key_that_is_an_attribute_of_the_container_is_refused(key):
    said = refusal(**{key: dict(type=Distance)})
    assert f'a term {key!r}' in said and f'call it another, such as my_{key}' in said


def test_an_argument_that_a_term_does_not_take_gets_the_nearest(registered):
    assert "distillation.mine has no entry 'powr'; did you mean power" in refusal(
        mine=dict(type='Squares', powr=1.0)
    )
    assert "has no entry 'loss_wieght'; did you mean loss_weight" in refusal(
        mine=dict(type='Distance', loss_wieght=1.0)
    )
    assert "has no entry 'site'; did you mean" in refusal(mine=dict(type='Distance', site='rpn'))
    # What collects the rest is no argument.
    assert "has no entry 'options'; did you mean" in refusal(
        mine=dict(type='Squares', options=dict(power=1.0))
    )


def test_a_type_that_is_not_registered_gets_near_names(my_terms):
    said = refusal(mine=dict(type='MaskGeneration'))
    assert said.startswith("distillation.mine: type='MaskGeneration' is registered neither")
    assert 'near ones: MaskedGeneration' in said and 'custom_imports' in said


def test_a_constructor_that_takes_nothing_gets_the_options_of_its_base(registered):
    model = distilled(mine=dict(type='Distance', pairs=['backbone[2]'], loss_weight=0.25))
    term = model.kd_terms['mine']
    assert term.loss_weight == 0.25 and [p.name for p in term.pairs] == ['backbone_2']


@pytest.mark.parametrize('kind', ['cls', 'bbox'])
@pytest.mark.parametrize('site', ['rpn', 'rcnn'])
def test_rows_of_either_head(registered, site, kind):
    model = distilled(mine=dict(type='Squares', site=site, kind=kind))
    values = pairs.losses(model)
    (rows,) = model.kd_terms['mine'].seen
    columns = {('rpn', 'cls'): 1, ('rcnn', 'cls'): pairs.CLASSES + 1}.get((site, kind), 4)
    n = len(rows.student)
    assert n > 0
    assert rows.student.shape == rows.teacher.shape == (n, columns)
    assert rows.student.requires_grad and not rows.teacher.requires_grad
    assert rows.target.shape == ((n,) if kind == 'cls' else (n, 4))
    assert rows.weight.shape == rows.target.shape and rows.weight.any()
    assert rows.sigmoid == ((site, kind) == ('rpn', 'cls'))
    assert rows.background == ((site, kind) == ('rcnn', 'cls'))
    if site == 'rpn':
        assert rows.rois is None
    else:
        assert rows.rois.shape == (n, 5) and set(rows.rois[:, 0].tolist()) <= {0.0, 1.0}
    values['loss_kd_mine'].backward()
    assert pairs.gradients(model)['backbone.conv1.weight'].any()


def test_rows_are_weighted_as_the_heads_own_loss(registered):
    config = pairs.fpn()
    config.roi_head.bbox_head.loss_cls.loss_weight = 3.0
    terms = pairs.off() | dict(mine=dict(type='Squares', loss_weight=0.5))
    model = pairs.distil(config, pairs.fpn(), terms)
    value = pairs.losses(model)['loss_kd_mine']
    (rows,) = model.kd_terms['mine'].seen
    torch.testing.assert_close(value, 0.5 * 3.0 * model.kd_terms['mine'].compare(rows))


def test_parts_are_summed_over_the_pairs_and_all_are_trained_on(registered):
    model = distilled(mine=dict(type='InParts', loss_weight=0.5, pairs=['neck[0]', 'neck[1]']))
    values = pairs.losses(model)
    parts = {name: value for name, value in values.items() if 'kd' in name}
    assert set(parts) == {'loss_kd_mine_top', 'loss_kd_mine_all'}
    own = pairs.losses(distilled())
    torch.testing.assert_close(
        pairs.total(model, values), sum(parts.values()) + pairs.total(model, own)
    )
    alone = [
        pairs.losses(distilled(mine=dict(type='InParts', loss_weight=0.5, pairs=[pair])))
        for pair in ('neck[0]', 'neck[1]')
    ]
    assert all(0 < each['loss_kd_mine_top'] < parts['loss_kd_mine_top'] for each in alone)


def test_boxes_lie_in_cells_of_the_map():
    seen = []

    class Boxes(Distance):
        def compare(self, student, teacher, layers, boxes):
            seen.append((student.shape[-1], boxes))
            return super().compare(student, teacher, layers, boxes)

    data = pairs.batch((2, 0))
    pairs.losses(distilled(mine=dict(type=Boxes, pairs=['neck[0]', 'neck[2]'])), data)
    expected = data['data_samples'][0].gt_instances.bboxes
    for (width, boxes), stride in zip(seen, (4, 16), strict=True):
        assert width == 64 // stride and [len(each) for each in boxes] == [2, 0]
        torch.testing.assert_close(boxes[0] * stride, expected)


@pytest.mark.parametrize('kind', ['Distance', 'Squares', 'InParts'])
def test_any_term_has_a_schedule_and_a_share(registered, kind):
    fresh_run()
    model = distilled(mine=dict(type=kind, schedule=dict(begin=2, warmup=1), share=0.3))
    weights = []
    for now in range(4):
        MessageHub.get_current_instance().update_info('iter', now)
        values = pairs.losses(model)
        weights.append(float(values['weight_kd_mine']))
        terms = [value for name, value in values.items() if name.startswith('loss_kd_mine')]
        assert all(bool(value) == (now >= 2) for value in terms)
    fresh_run()
    assert weights[:2] == [0, 0] and 0 < weights[2] < weights[3]


def test_a_share_is_that_of_the_gradient(registered):
    fresh_run()
    model = distilled(mine=dict(type='Distance', share=0.3))
    values = pairs.losses(model)
    own = [p for n, p in model.named_parameters() if not n.startswith('kd_terms.')]
    norms = [
        gradient_norm(value, own)
        for value in (values.pop('loss_kd_mine'), pairs.total(model, values))
    ]
    fresh_run()
    assert float(norms[0] / norms[1]) == pytest.approx(0.3, rel=1e-4)


def test_one_term_alone_takes_a_share_of_a_hard_loss(registered):
    half = dict(type='Squares', hard_weight=0.5)
    said = refusal(one=dict(half), two=dict(half))
    assert 'distillation.one and distillation.two both take a share of the rcnn head' in said
    said = refusal(one=dict(half), rcnn_cls=dict(type='WeightedSoftCELoss', loss_weight=0.5))
    assert 'distillation.rcnn_cls and distillation.one both take a share' in said
    plain = pairs.losses(distilled(one=dict(type='Squares')))
    shared = pairs.losses(distilled(one=dict(half), two=dict(type='Squares', site='rpn')))
    torch.testing.assert_close(shared['loss_cls'], 0.5 * plain['loss_cls'])
    assert shared['loss_rpn_cls'][0] == plain['loss_rpn_cls'][0]


class Asks(DistillTerm):
    """Asks for the teacher's heads on the student's features, and for anchors."""

    def __init__(self, site, kind):
        super().__init__()
        self.site, self.kind = site, kind

    def needs(self):
        return Needs(pairs=('neck',), anchors=True, cross=(self.site,))

    def bind(self, pairs):
        self.pairs = list(pairs)

    def forward(self, step):
        maps = [step.features(pair)[0] for pair in self.pairs]
        self.crossed, self.anchors = step.cross(self.site, maps, self.kind), step.anchors()
        return sum((rows.student - rows.teacher).square().mean() for rows in self.crossed)


@pytest.mark.parametrize('kind', ['cls', 'bbox'])
@pytest.mark.parametrize('site', ['rpn', 'rcnn'])
def test_the_students_features_pass_through_the_teachers_head(site, kind):
    model = distilled(mine=dict(type=Asks, site=site, kind=kind))
    values = pairs.losses(model)
    term, (rows,) = model.kd_terms['mine'], model.kd_terms['mine'].crossed
    assert [tuple(level.shape) for level in term.anchors] == [
        (side, side, 3, 4) for side in (16, 8, 4, 2, 1)
    ]
    assert rows.student.requires_grad and not rows.teacher.requires_grad
    values['loss_kd_mine'].backward()
    reached = {name.split('.')[0] for name in pairs.gradients(model)}
    assert reached == {'backbone', 'neck'}
    assert all(p.grad is None for p in model.teacher.network.parameters())


def test_of_the_teachers_head_only_deltas_are_brought_into_the_students_frame():
    """A teacher whose deltas are in other units: its logits stay what they are."""
    found = {}
    for kind in ('cls', 'bbox'):
        for stds in ([1.0] * 4, [0.1, 0.2, 0.4, 0.5]):
            teacher = pairs.fpn(8)
            teacher.rpn_head.bbox_coder.target_stds = stds
            term = dict(mine=dict(type=Asks, site='rpn', kind=kind))
            model = pairs.distil(pairs.fpn(), teacher, pairs.off() | term)
            pairs.losses(model)
            (rows,) = model.kd_terms['mine'].crossed
            found.setdefault(kind, []).append(rows.student.detach())
    torch.testing.assert_close(*found['cls'])
    torch.testing.assert_close(found['bbox'][1], found['bbox'][0] * torch.tensor(stds))


# ---------------------------------------------------------------------------------- slips


def test_two_losses_under_one_name_are_refused():
    """Or one would replace the other, and not be trained on."""

    class Part(Distance):
        def compare(self, *given):
            return dict(b=super().compare(*given))

    model = distilled(a=dict(type=Part), a_b=dict(type=Distance))
    with pytest.raises(ValueError, match=r'distillation\.a_b .*loss_kd_a_b.*rename'):
        pairs.losses(model)


def test_a_share_of_the_hard_loss_is_for_classification(registered):
    said = refusal(mine=dict(type='Squares', kind='bbox', hard_weight=0.5))
    assert said.startswith('distillation.mine: ') and "hard_weight=0.5 needs kind='cls'" in said


def test_the_start_from_the_teacher_leaves_layers_of_ones_own():
    class Layers(DistillTerm):
        def needs(self):
            return Needs(pairs=('neck[0]',))

        def bind(self, pairs):
            self.pairs = list(pairs)
            layer = nn.Sequential(nn.Conv2d(*pairs[0].channels, 1, bias=False))
            self.adapters = nn.ModuleDict(dict(mine=layer))

    class Both(Layers, Distance):
        def bind(self, pairs):
            Distance.bind(self, pairs)

    mine, both = dict(type=Layers), dict(type=Both)
    model = pairs.distil(pairs.fpn(), distillation=pairs.off('teacher') | dict(a=mine, b=both))
    without = pairs.distil(pairs.fpn(), distillation=pairs.off() | dict(a=mine, b=both))
    weight = 'a.adapters.mine.0.weight'
    own = model.kd_terms.state_dict()
    assert torch.equal(own[weight], without.kd_terms.state_dict()[weight])
    assert torch.equal(own['b.adapters.neck_0.weight'].squeeze(), torch.eye(8))


@pytest.mark.parametrize(
    'value', [1.5, torch.ones(2, 3), dict(part=2.0)], ids=['float', 'map', 'part']
)
def test_what_is_no_loss_is_named(value):
    class Wrong(Distance):
        def compare(self, *given):
            return value

    model = distilled(mine=dict(type=Wrong, pairs=['neck[0]']))
    with pytest.raises(TypeError, match=r'Wrong .*must be a scalar tensor'):
        pairs.losses(model)


def test_rows_that_a_term_did_not_say_it_needs_are_named():
    class Forgot(Squares):
        def needs(self):
            return Needs(rows=(('rcnn', 'cls'),))

    model = distilled(mine=dict(type=Forgot, site='rpn'))
    with pytest.raises(RuntimeError, match=r"rows of 'rpn'.*needs\(\)"):
        pairs.losses(model)


def test_a_pair_with_nothing_to_compare_is_left_out():
    class Fine(Distance):
        def compare(self, student, *given):
            return super().compare(student, *given) if student.shape[-1] > 4 else None

    value = pairs.losses(distilled(mine=dict(type=Fine)))['loss_kd_mine']
    fine = dict(type=Distance, pairs=['neck[0]', 'neck[1]'])
    alone = pairs.losses(distilled(mine=fine))['loss_kd_mine']
    assert torch.equal(value, alone)

    class Never(Distance):
        def compare(self, *given):
            return None

    values = pairs.losses(distilled(mine=dict(type=Never)))
    assert values['loss_kd_mine'] == 0 and values['loss_kd_mine'].requires_grad


# ---------------------------------------------------------------------------------- configs


def test_a_term_is_inherited_changed_and_turned_off_by_grandchildren(folder, my_terms):
    child, grandchild = folder / 'child.py', folder / 'grandchild.py'
    child.write_text(
        "_base_ = 'my_method.py'\nmodel = dict(distillation=dict(mgd=dict(ratio=0.25)))\n"
    )
    grandchild.write_text(
        "_base_ = 'child.py'\nmodel = dict(distillation=dict(mgd=dict(loss_weight=0)))\n"
    )
    inherited = pairs.build(Config.fromfile(child).model).kd_terms['mgd']
    assert (inherited.ratio, inherited.loss_weight) == (0.25, 0.02)
    off = Config.fromfile(grandchild).model
    assert 'mgd' not in pairs.build(off).kd_terms and 'mgd' not in terms_on(off.distillation)


def test_it_is_turned_off_on_the_command_line(folder, my_terms, monkeypatch):
    class Built(Exception):
        pass

    def build(cfg):
        raise Built(pairs.build(cfg.model))

    monkeypatch.setattr(train, 'build_runner', build)
    option = 'model.distillation.mgd.loss_weight=0'
    work_dir = str(folder / 'off')
    with pytest.raises(Built) as built:
        train.main([str(folder / 'my_method.py'), '--work-dir', work_dir, '--cfg-options', option])
    assert set(built.value.args[0].kd_terms) == {'rpn_cls', 'rpn_bbox', 'rcnn_bbox', 'hint', 'kl'}


@pytest.mark.parametrize(
    ('entry', 'on'),
    [
        (dict(type='Squares', hard_weight=1.0), True),
        (dict(type='Squares', hard_weight=1.0, loss_weight=0), False),
        (dict(type='WeightedSoftCELoss', hard_weight=1.0), False),
        (dict(type='mmkd.WeightedSoftCELoss', hard_weight=0.5), True),
    ],
)
def test_which_terms_are_on_is_what_is_built(registered, entry, on):
    """Only the paper's soft loss takes its weight from the hard one's."""
    key = 'mine' if entry['type'] == 'Squares' else 'rcnn_cls'
    terms = pairs.off()
    terms[key] = entry
    assert terms_on(terms) == ([key] if on else [])
    assert set(pairs.distil(pairs.fpn(), distillation=terms).kd_terms) == set(terms_on(terms))


# ---------------------------------------------------------------------------------- copies


def test_a_copy_has_weights_of_its_own(my_terms):
    """As EMA makes it; the copy's taps are its own too."""
    model = distilled(mgd=dict(type='MaskedGeneration'), objects=dict(type='WhereObjectsAre'))
    twin = copy.deepcopy(model)
    before = copy.deepcopy(twin.state_dict())
    one, two = pairs.losses(model), pairs.losses(twin)
    assert [k for k, v in one.items() if 'kd' in k and not torch.equal(v, two[k])] == []
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    pairs.total(model, one).backward()
    optimizer.step()
    terms = [k for k in before if k.startswith('kd_terms.')]
    assert len(terms) == 40
    assert all(torch.equal(twin.state_dict()[k], before[k]) for k in terms)
    reached = {k for k in terms if pairs.gradients(model)[k].any()}
    changed = {k for k in terms if not torch.equal(model.state_dict()[k], before[k])}
    assert len(changed) > 30 and changed == reached


def test_its_batch_norm_becomes_a_synchronised_one(my_terms):
    class Normalised(my_terms.MaskedGeneration):
        def build(self, pair):
            return nn.Sequential(super().build(pair), nn.BatchNorm2d(pair.channels[1]))

    # In eval mode it needs no second process.
    model = distilled(mgd=dict(type=Normalised)).eval()
    plain = pairs.losses(model)
    model = convert_sync_batchnorm(model, 'torch').eval()
    norms = {type(layers[1]) for layers in model.kd_terms['mgd'].layers.values()}
    assert norms == {nn.SyncBatchNorm}
    for part in ('objects', 'rest'):
        torch.testing.assert_close(
            pairs.losses(model)[f'loss_kd_mgd_{part}'], plain[f'loss_kd_mgd_{part}']
        )


# ---------------------------------------------------------------------------------- yesterday's


def with_earlier_names(checkpoint: dict) -> dict:
    """As an earlier version wrote it."""
    for name in ('state_dict', 'ema_state_dict'):
        state = checkpoint.get(name, {})
        for key in [key for key in state if 'kd_terms.' in key]:
            state[key.replace('kd_terms.hint.adapters.', 'kd_adapters.')] = state.pop(key)
        assert sum('kd_adapters.' in key for key in state) == (10 if state else 0)
    return checkpoint


@pytest.fixture(scope='module')
def averaged(folder):
    """The paper's recipe with EMA and a learning rate of its own for the adaptation layers."""
    (folder / 'averaged.py').write_text(
        "_base_ = 'my_pair.py'\n"
        "custom_hooks = [dict(type='EMAHook')]\n"
        'optim_wrapper = dict(paramwise_cfg=dict(custom_keys={\n'
        "    'kd_adapters': dict(lr_mult=0.5), 'kd_adapters.neck_0': dict(lr_mult=0)}))\n"
    )
    work_dir = folder / 'averaged'
    train.main([str(folder / 'averaged.py'), '--work-dir', str(work_dir), *named('averaged')])
    earlier = with_earlier_names(read_checkpoint(str(work_dir / 'epoch_1.pth')))
    torch.save(earlier, folder / 'earlier.pth')
    return work_dir


def test_a_checkpoint_with_earlier_names_is_resumed_to_the_bit(folder, averaged):
    work_dir, path = folder / 'on', str(folder / 'earlier.pth')
    config = str(folder / 'averaged.py')
    train.main([config, '--work-dir', str(work_dir), '--resume', path, *named('on')])
    whole, parts = last(averaged), last(work_dir)
    assert 'ema_state_dict' in whole
    assert_same_run(whole, parts)


def test_custom_keys_with_earlier_names_reach_the_adaptation_layers(folder, averaged):
    first, second = last(averaged, 'epoch_1')['ema_state_dict'], last(averaged)['ema_state_dict']
    names = [key for key in first if '.adapters.' in key]
    assert len(names) == 10
    kept = {key for key in names if torch.equal(first[key], second[key])}
    assert kept == {f'module.kd_terms.hint.adapters.neck_0.{kind}' for kind in ('weight', 'bias')}
    groups = last(averaged)['optimizer']['param_groups']
    assert [group['lr'] for group in groups[-10:]] == [0.0] * 2 + [0.005] * 8
    assert all(group['lr'] == 0.01 for group in groups[:-10])


def test_a_checkpoint_with_earlier_names_is_loaded(folder, averaged):
    cfg = Config.fromfile(folder / 'averaged.py')
    cfg.load_from, cfg.work_dir = str(folder / 'earlier.pth'), str(folder / 'loaded')
    cfg.visualizer.name = 'loaded'
    runner = DistillationRunner.from_cfg(cfg)
    runner.call_hook('before_run')  # where EMAHook makes its copy
    runner.load_or_resume()
    state = last(averaged, 'epoch_1')['state_dict']
    own = runner.model.state_dict()
    assert set(own) == set(state)
    assert [key for key, value in own.items() if not torch.equal(value, state[key])] == []


def test_a_checkpoint_with_earlier_names_is_tested(folder, averaged):
    """As the distilled student, whose terms are left out, and as the plain one."""
    for config in ('averaged.py', 'tiny.py'):
        found = []
        for name, path in (('new', averaged / 'epoch_1.pth'), ('old', folder / 'earlier.pth')):
            out = folder / f'{name}.pkl'
            work_dir = str(folder / 'tested' / config / name)
            test.main([str(folder / config), str(path), '--work-dir', work_dir, '--out', str(out)])
            found.append(pickle.loads(out.read_bytes()))
        assert same_predictions(*found)


def test_a_checkpoint_with_earlier_names_is_a_teacher(folder, averaged):
    model = pairs.distilled(pairs.fpn(), str(folder / 'tiny.py'), pairs.recipe())
    model.teacher_ckpt = str(folder / 'earlier.pth')
    teacher = pairs.build(model).teacher
    assert teacher.passed_over == 10
    state = last(averaged, 'epoch_1')['state_dict']
    assert all(torch.equal(v, state[k]) for k, v in teacher.network.state_dict().items())


# ------------------------------------------------------------ layers that nothing would train


class Kept(FeatureTerm):
    """Where the layer of a term is kept, and whether it is trained there."""

    def __init__(self, where):
        super().__init__()
        self.where, self.hidden = where, {}
        if where == 'init':
            self.own = nn.Conv2d(8, 8, 1)
        self.scale = torch.ones(1, requires_grad=where == 'tensor')

    def build(self, pair):
        layer = nn.Conv2d(pair.channels[1], pair.channels[1], 1)
        if self.where == 'build':
            return layer
        self.hidden[pair.name] = layer.requires_grad_(self.where != 'fixed')

    def bind(self, pairs):
        super().bind(pairs)
        if self.where == 'bind':
            self.own = nn.Conv2d(8, 8, 1)

    def compare(self, student, teacher, layers, boxes):
        if self.where == 'forward' and not hasattr(self, 'own'):
            self.own = nn.Conv2d(8, 8, 1)
        layer = {
            'dict': self.hidden.get('neck_0'), 'fixed': self.hidden.get('neck_0'), 'build': layers,
            'each': nn.Conv2d(8, 8, 1) if self.where == 'each' else None,
            'tensor': self.scale.mul,
        }.get(self.where) or self.own  # fmt: skip
        return (layer(student) - teacher).square().mean()


@pytest.mark.parametrize('where', ['dict', 'forward', 'each', 'tensor'])
def test_a_layer_that_nothing_trains_is_refused(where):
    model = distilled(mine=dict(type=Kept, where=where))
    with pytest.raises(UnownedParameterError, match='loss_kd_mine uses a parameter of shape'):
        pairs.losses(model)


@pytest.mark.parametrize('where', ['init', 'build', 'bind', 'fixed'])
def test_a_layer_in_its_place_is_not(where):
    model = copy.deepcopy(distilled(mine=dict(type=Kept, where=where)))
    pairs.losses(model)
    assert not model.unproven


def test_a_loss_without_the_student_is_dead_and_the_message_says_so():
    class Deaf(FeatureTerm):
        def compare(self, student, teacher, layers, boxes):
            return (student.detach() - teacher).square().mean()

    with pytest.raises(DeadTermError, match="loss of your own that detaches the student's"):
        pairs.losses(distilled(mine=dict(type=Deaf)))


def test_a_name_that_is_taken_is_refused_with_the_way_out():
    class CWD(FeatureTerm):
        pass

    published = TERMS.get('CWD')
    with pytest.raises(
        KeyError, match=r'CWD is already registered in .* at mmkd.methods.cwd: rename the class in'
    ):
        TERMS.register_module(module=CWD)
    assert TERMS.get('CWD') is published
    TERMS.register_module(module=published, force=True)


def test_the_start_up_table_names_the_layers_by_the_key_of_their_term():
    table = startup_table(distilled(mine=dict(type='CWD', pairs=['neck[1]'])))
    assert re.search(r'\| +mine +\| neck\[1\] 8×', table)


def test_the_list_of_terms_has_whole_sentences():
    assert [term['type'] for term in describe() if not term['teaches'].endswith('.')] == []


def test_the_check_says_where_a_term_of_the_user_fails(folder):
    (folder / 'broken.py').write_text(
        'from mmkd import TERMS, RowTerm\n\n\n@TERMS.register_module()\nclass Broken(RowTerm):\n'
        '    def compare(self, rows):\n        return rows.student.gather(1, rows.target).mean()\n'
    )
    config = "_base_ = 'my_pair.py'\ncustom_imports = dict(imports=['broken'])\n"
    config += "model = dict(distillation=dict(mine=dict(type='Broken')))\n"
    (folder / 'broken_pair.py').write_text(config)
    report = check_pair(Config.fromfile(folder / 'broken_pair.py'), size=(64, 64), processes=1)
    assert re.search(r'first step \(.*broken\.py:7, in compare\): Index', report.against[0])
    TERMS.module_dict.pop('Broken')


def test_the_list_has_the_terms_of_a_config(tmp_path, capsys, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / 'listed.py').write_text(
        'from mmkd import TERMS, RowTerm\n\n\n@TERMS.register_module()\nclass Listed(RowTerm):\n'
        '    """Teaches nothing.\n\n    Needs: rows of the RoI head.\n    """\n'
    )
    (tmp_path / 'my_pair.py').write_text("custom_imports = dict(imports=['listed'])\n")
    assert terms.main(['--config', str(tmp_path / 'my_pair.py')]) == 0
    assert re.search(r'^Listed +Teaches nothing\.\n +needs rows of the RoI head$',
                     capsys.readouterr().out, re.MULTILINE)  # fmt: skip
    TERMS.module_dict.pop('Listed')


def test_a_command_finds_modules_in_the_working_directory(tmp_path):
    """The script `mmkd` is not in it, and Python looks in the folder of a script alone."""
    (tmp_path / 'own').mkdir()
    (tmp_path / 'own/listed.py').write_text(
        'from mmkd import TERMS, RowTerm\n\n\n@TERMS.register_module()\nclass Own(RowTerm):\n'
        '    """Teaches nothing."""\n'
    )
    (tmp_path / 'own/pair.py').write_text("custom_imports = dict(imports=['listed'])\n")
    (tmp_path / 'script.py').write_text('from mmkd.__main__ import main\n\nmain()\n')
    done = subprocess.run(
        [warm.python(), str(tmp_path / 'script.py'), 'terms', '--config', 'pair.py'],
        cwd=tmp_path / 'own', capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert re.search(r'^Own +Teaches nothing\.', done.stdout, re.MULTILINE), done.stderr


if __name__ == '__main__':
    torch.set_num_threads(1)
    register_all_modules(init_default_scope=True)
    work(int(sys.argv[1]), *sys.argv[2:])
