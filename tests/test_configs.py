"""Every config in configs/ is built and steps once, forward and backward, on its own shapes.

Random weights stand in for downloads, through overrides that any user can give:
``model.teacher_ckpt='random'`` and ``model.backbone.init_cfg=None``.
"""

import copy
import importlib.util
import re

import pairs
import pytest
import torch
from mmdet.registry import MODELS
from mmengine.config import Config
from mmengine.logging import MessageHub
from pairs import LOG_NAMES, ROOT, batch, total

from mmkd import plain_student
from mmkd.engine.class_names import apply_classes
from mmkd.recipe import log_name

RECIPE = ROOT / 'configs/_base_/chen2017.py'
METHODS = sorted(p for p in RECIPE.parent.glob('*.py') if p.stem not in ('chen2017', 'mmkd'))
PAIR = 'faster_rcnn_r101_to_r50.py'
PAIRS_OF_METHODS = [ROOT / 'configs/kd' / f'{p.stem}_{PAIR}' for p in METHODS]
METHODS_BY = dict(zip(PAIRS_OF_METHODS, METHODS, strict=True))
PATHS = sorted(
    p
    for p in (ROOT / 'configs').rglob('*.py')
    if '_base_' not in p.parts and p not in PAIRS_OF_METHODS
)


def load(path):
    config = Config.fromfile(path)
    overrides = {'model.backbone.init_cfg': None}
    if 'teacher_config' in config.model:
        overrides['model.teacher_ckpt'] = 'random'
    config.merge_from_dict(overrides)
    return config


@pytest.fixture(autouse=True)
def _root(monkeypatch):
    monkeypatch.chdir(ROOT)  # paths in configs are relative to the checkout


def marked(path):
    """Of the pairs of large networks one of each setting is enough for every day."""
    every_day = 'faster_rcnn_r101_to_r50', 'faster_rcnn_r50_800_to_400'
    slow = 'kd' in path.parts and (path.stem not in every_day or path.parent.name == 'best')
    return pytest.param(path, marks=[pytest.mark.slow] if slow else [])


@pytest.mark.parametrize(
    'path', [*map(marked, PATHS)], ids=lambda p: str(p.relative_to(ROOT / 'configs'))
)
def test_a_config_is_built_and_steps_once(path):
    config = load(path)
    torch.manual_seed(0)
    config = apply_classes(config)  # as DistillationRunner does
    model = MODELS.build(config.model)
    model.init_weights()
    model.train()
    model.guarded = True
    on = {
        name
        for name, term in config.model.get('distillation', {}).items()
        if name in LOG_NAMES and term.get('loss_weight') != 0
    }
    digits = 'digits' in path.parts
    data = batch((2, 1), 96) if digits else batch((3,), 320, sides=(40, 160))
    if resolution := config.model.get('distillation', {}).get('resolution'):
        factor = round(resolution.teacher[1] / resolution.student[1])
        for image, sample in zip(data['inputs'], data['data_samples'], strict=True):
            large = image.repeat_interleave(factor, 1).repeat_interleave(factor, 2)
            pairs.second_view(sample, large)
    values = model(**model.data_preprocessor(data, True), mode='loss')
    assert {k for k in values if 'kd' in k} == {LOG_NAMES[name] for name in on}
    total(model, values).backward()
    # What DDP needs of a config without find_unused_parameters: a gradient for each parameter.
    without = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert config.get('find_unused_parameters', False) == bool(without), without
    assert all(g.isfinite().all() for g in pairs.gradients(model).values())
    assert not getattr(model, 'unproven', set())
    with torch.device('meta'):  # its names are asked for, and no numbers
        plain = MODELS.build(plain_student(config.model))
    own = {k for k in model.state_dict() if not k.startswith('kd_terms.')}
    assert own == set(plain.state_dict())


def step_of(config, data):
    """The losses of one step, and the network, whose gradients are finite."""
    torch.manual_seed(0)
    MessageHub.get_current_instance().update_info('iter', 1000)  # some schedules begin late
    model = pairs.build(config.model)
    values = model(**model.data_preprocessor(data, True), mode='loss')
    MessageHub.get_current_instance().pop_info('iter')
    total(model, values).backward()
    assert all(g.isfinite().all() for g in pairs.gradients(model).values())
    assert not model.unproven
    return model, {k for k in values if k.startswith('loss_kd_')}


def logged(model):
    return {name for key in model.kd_terms for name in [log_name(key)]}


@pytest.mark.parametrize('path', PAIRS_OF_METHODS, ids=lambda p: p.stem.partition('_faster')[0])
def test_the_pair_of_a_method_is_the_papers_with_another_recipe(path):
    config, paper = load(path), load(path.parent / PAIR)
    assert config.model.pop('distillation') == Config.fromfile(METHODS_BY[path]).distillation
    paper.model.pop('distillation')
    assert config.model == paper.model and config.runner_type == paper.runner_type
    # Networks of the same build and half a dozen channels stand in; the real ones step below.
    config.model = pairs.distilled(
        pairs.fpn(), pairs.fpn(8), Config.fromfile(METHODS_BY[path]).distillation.to_dict()
    )
    model, kd = step_of(config, batch((2, 1), 96))
    assert kd and all(any(k.startswith(name) for k in kd) for name in logged(model))
    assert not [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]


@pytest.mark.slow
@pytest.mark.parametrize('path', PAIRS_OF_METHODS, ids=lambda p: p.stem.partition('_faster')[0])
def test_the_pair_of_a_method_steps_on_real_networks(path):
    model, kd = step_of(load(path), batch((3,), 320, sides=(40, 160)))
    assert kd and all(any(k.startswith(name) for k in kd) for name in logged(model))
    own = {n for n, p in model.named_parameters() if p.requires_grad and p.grad is None}
    assert not own


def test_the_page_of_methods_is_what_its_command_writes():
    spec = importlib.util.spec_from_file_location('methods', ROOT / 'benchmarks/methods.py')
    methods = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(methods)
    page = methods.PAGE.read_text()
    assert methods.page() == page
    assert all(f'### {method.__name__}\n' in page for method in methods.METHODS)
    assert all(f'`{path.stem}.py`' in page for path in METHODS)


def test_the_configs_on_the_page_of_methods_build(tmp_path):
    page = (ROOT / 'docs/methods.md').read_text().replace('path/to/mmkd', str(ROOT))
    blocks = re.findall(r'^```python\n(.*?)^```$', page, re.S | re.M)
    kinds = []
    for block in blocks:
        path = tmp_path / 'pair.py'
        path.write_text(block)
        distillation = Config.fromfile(path).model.distillation.to_dict()
        model = pairs.distil(pairs.fpn(), pairs.fpn(), distillation)
        kinds.append({type(term).__name__ for term in model.kd_terms.values()})
    assert kinds == [{'FGD'}, {'SoftTargetTerm', 'RegressionTerm', 'PKD', 'DKD'}]


def test_every_recipe_has_its_golden_numbers_and_its_pair():
    golden = {p.stem for p in (ROOT / 'tests/golden').glob('*.json')}
    assert golden | {'regression'} == {p.stem for p in METHODS}
    assert all(path.exists() for path in PAIRS_OF_METHODS)


def distilled_paths():
    every = PATHS + PAIRS_OF_METHODS
    return [p for p in every if 'KnowledgeDistillation' in p.read_text()]


@pytest.mark.parametrize('path', distilled_paths(), ids=lambda p: p.stem)
def test_a_pair_is_short_and_its_options_address_single_terms(path):
    code = [line for line in path.read_text().splitlines() if line.strip()[:1] not in ('', '#')]
    assert len(code) <= 16
    config = load(path)
    if 'hint' not in config.model.distillation:
        return
    before = copy.deepcopy(config.model.distillation)
    config.merge_from_dict({'model.distillation.hint.loss_weight': 0})
    assert config.model.distillation.hint.loss_weight == 0
    config.model.distillation.hint.loss_weight = before.hint.loss_weight
    assert config.model.distillation == before


@pytest.mark.parametrize(
    'path',
    [p for p in distilled_paths() if 'kd' in p.parts and p not in PAIRS_OF_METHODS],
    ids=lambda p: str(p.relative_to(ROOT / 'configs/kd')),
)
def test_a_pair_uses_the_papers_recipe_or_the_best(path):
    recipe = RECIPE.with_name('mmkd.py') if path.parent.name == 'best' else RECIPE
    distillation = load(path).model.distillation
    distillation.pop('resolution', None)
    assert distillation == Config.fromfile(recipe).distillation


@pytest.mark.parametrize(
    'path', sorted((ROOT / 'configs/kd/best').glob('*.py')), ids=lambda p: p.stem
)
def test_a_best_pair_is_the_papers_with_the_recipe_that_won(path):
    """Its networks and its teacher's weights are those of the pair of the same name."""
    best, paper = (Config.fromfile(p).model for p in (path, path.parents[1] / path.name))
    assert {**best, 'distillation': None} == {**paper, 'distillation': None}
    assert 'Not yet run on COCO' in path.read_text()


def test_the_recipe_has_the_papers_values():
    terms = Config.fromfile(RECIPE).distillation
    for name in ('rpn_cls', 'rcnn_cls'):
        assert terms[name] == dict(
            type='WeightedSoftCELoss', hard_weight=0.5, background_weight=1.5, temperature=1.0
        )
        assert MODELS.build(terms[name]).loss_weight == 0.5  # 1 - mu
    for name in ('rpn_bbox', 'rcnn_bbox'):
        assert terms[name] == dict(type='TeacherBoundedL2Loss', loss_weight=0.5, margin=0.0)
    assert terms.hint == dict(type='HintL2Loss', loss_weight=0.5, normalize=False, pairs=['neck'])
    assert terms.start is None


def test_a_swap_of_either_network_is_one_line():
    """The teacher, then the student, of the R101 -> R50 pair; the hints find their channels."""
    config = load(ROOT / 'configs/kd/faster_rcnn_r101_to_r50.py')
    config.merge_from_dict(
        {'model.teacher_config': 'mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py'}
    )
    config.merge_from_dict(
        {'model.backbone.depth': 18, 'model.neck.in_channels': [64, 128, 256, 512]}
    )
    model = MODELS.build(config.model)
    assert model.teacher.network.backbone.depth == 50
    assert model.backbone.depth == 18
    assert [p.shapes[0][1] for p in model.kd_terms['hint'].pairs] == [256] * 5
