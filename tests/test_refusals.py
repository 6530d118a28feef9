"""What cannot be is refused in one sentence that has the value and the way out."""

import copy
import json
import os
import shutil
from pathlib import Path

import cv2
import numpy as np
import pairs
import pytest
import torch
from mmcv.transforms import BaseTransform
from mmdet.registry import MODELS, TRANSFORMS
from mmengine.config import Config
from mmengine.registry import RUNNERS
from test_check_pair import tool
from tiny import CLASSES, tiny_config
from torch import nn

from mmkd import cli
from mmkd.analysis.comparison import plan_runs
from mmkd.analysis.pair_check import check_pair
from mmkd.datasets.annotations import AnnotationError, check_annotations
from mmkd.datasets.labels import check_labels, check_same_labels
from mmkd.datasets.old_spellings import refuse_old_spellings
from mmkd.engine.class_names import apply_classes
from mmkd.engine.config_files import locate_files
from mmkd.engine.runner import DistillationRunner
from mmkd.engine.summary import startup_table
from mmkd.engine.weight_origins import origins
from mmkd.inference import require_teacher
from mmkd.io.checkpoint import CheckpointError
from mmkd.options.acceleration import input_channels
from mmkd.options.class_map import ClassMap
from mmkd.recipe import MissingFileError, TeacherError

train, new_pair, pair_tool = tool('train'), tool('new_pair'), tool('check_pair')


@pytest.fixture
def said(monkeypatch):
    """What is logged outside of a run, where no logger listens."""
    found = []
    for module in ('engine.class_names', 'engine.weight_origins', 'datasets.labels'):
        monkeypatch.setattr(f'mmkd.{module}.print_log', lambda text, **_: found.append(text))
    return found


PAIR = """\
_base_ = [{student!r}, {recipe!r}]
model = dict(
    type='mmkd.KnowledgeDistillationTwoStageDetector',
    teacher_config='networks/teacher.py', teacher_ckpt='networks/teacher.pth',
    distillation=_base_.distillation)
runner_type = 'mmkd.DistillationRunner'
"""


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """A pair whose paths are relative to its config, and nobody's working directory."""
    folder = tmp_path_factory.mktemp('refusals')
    (folder / 'networks').mkdir()
    student = tiny_config(folder, 'student')
    teacher = Config.fromfile(tiny_config(folder, 'teacher', base_channels=8))
    state = pairs.build(teacher.model).state_dict()
    torch.save(dict(state_dict=state), folder / 'networks/teacher.pth')
    (folder / 'teacher.py').rename(folder / 'networks/teacher.py')
    recipe = {**pairs.recipe(), 'check_teacher': False}
    (folder / 'recipe.py').write_text(f'distillation = {recipe!r}\n')
    (folder / 'pair.py').write_text(PAIR.format(student=str(student), recipe='recipe.py'))
    return folder


def load(path, *options):
    return cli.load_config(train.parse_args([str(path), *options]))


def options(**values):
    return ['--cfg-options', *(f'{k.replace("__", ".")}={v}' for k, v in values.items())]


# ---------------------------------------------------------------------------------- paths of a pair


def test_paths_are_relative_to_the_config_first(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = load(folder / 'pair.py').model
    assert model.teacher_config == str(folder / 'networks/teacher.py')
    assert model.teacher_ckpt == str(folder / 'networks/teacher.pth')
    # Of a file that inherits it, as a base in another folder has them.
    child = tmp_path / 'child.py'
    child.write_text(f'_base_ = {str(folder / "pair.py")!r}\n')
    assert load(child).model == model
    # The config's folder before the working directory.
    (tmp_path / 'networks').mkdir()
    shutil.copy(folder / 'networks/teacher.pth', tmp_path / 'networks')
    assert load(folder / 'pair.py').model == model
    # A file that lies beside the child is nearer.
    assert load(child).model.teacher_ckpt == str(tmp_path / 'networks/teacher.pth')


def test_paths_of_the_command_line_are_the_shells(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'recipe.py').touch()  # a name that lies beside the config too
    given = options(model__teacher_ckpt='recipe.py', load_from='recipe.py')
    cfg = load(folder / 'pair.py', *given)
    assert cfg.model.teacher_ckpt == cfg.load_from == str(tmp_path / 'recipe.py')


def test_paths_of_the_working_directory_still_do(config, tmp_path, monkeypatch):
    elsewhere = tmp_path / 'elsewhere'
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    (elsewhere / 'start.pth').touch()
    config.load_from = 'start.pth'
    config.model.backbone.init_cfg = dict(type='Pretrained', checkpoint='start.pth')
    locate_files(config)
    assert config.load_from == config.model.backbone.init_cfg.checkpoint
    assert config.load_from == str(elsewhere / 'start.pth')


@pytest.mark.parametrize(
    'path', ['torchvision://resnet18', 'https://example.com/x.pth', 'random', '/nowhere/x.pth']
)
def test_what_is_no_relative_path_stays(config, path):
    config.model.update(teacher_ckpt=path, teacher_config='mmdet::x/y.py')
    locate_files(config)
    assert config.model.teacher_ckpt == path and config.model.teacher_config == 'mmdet::x/y.py'


def test_what_a_run_dumps_is_read_from_anywhere(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(folder)
    work = ['--work-dir', str(tmp_path / 'work')]
    train.main([str(folder / 'pair.py'), *work, *options(visualizer__name='dumped')])
    monkeypatch.chdir(tmp_path)
    dumped = load(tmp_path / 'work/pair.py')
    assert Path(dumped.model.teacher_ckpt).samefile(folder / 'networks/teacher.pth')
    (found,) = plan_runs([str(tmp_path / 'work/pair.py')], [0]).comparisons
    assert found.teacher.runs[0].checkpoint == dumped.model.teacher_ckpt


def test_a_comparison_reads_the_paths_alike(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (found,) = plan_runs([str(folder / 'pair.py')], [0]).comparisons
    assert found.teacher.runs[0].checkpoint == str(folder / 'networks/teacher.pth')
    with pytest.raises(FileNotFoundError, match='config gone.py: there is no such file'):
        plan_runs(['gone.py'], [0])


# -------------------------------------------------------------------------------- a missing teacher


@pytest.mark.parametrize('key', ['teacher_ckpt', 'teacher_config'])
def test_a_missing_file_of_the_teachers_names_both_places(folder, tmp_path, monkeypatch, key):
    monkeypatch.chdir(tmp_path)
    cfg = load(folder / 'pair.py', *options(**{f'model__{key}': 'gone.x'}))
    cfg.work_dir = str(tmp_path / 'work')
    said = rf'model\.{key} .gone.x. cannot be read: the teacher.s \w+ does not exist .*'
    said += rf'{folder}/gone.x and {tmp_path}/gone.x\)\. Set model\.{key}'
    with pytest.raises(MissingFileError, match=said):
        RUNNERS.build(cfg).train()
    report = check_pair(cfg, size=(64, 64), processes=1)
    with pytest.raises(AssertionError, match=said):
        raise AssertionError(report.against)


@pytest.mark.parametrize(
    ('change', 'said'),
    [
        (dict(teacher_ckpt=None), r'model\.teacher_ckpt is missing.*noise'),
        (dict(teacher_ckpt=''), r'model\.teacher_ckpt is missing.*noise'),
        (dict(teacher_ckpt='gone.pth'), r'model\.teacher_ckpt .gone.pth. cannot .*does not exist'),
        (dict(teacher_ckpt='.'), r'teacher.s checkpoint, model\.teacher_ckpt: .*is a directory'),
        (
            dict(teacher_ckpt='http://127.0.0.1:9/x.pth'),
            r'teacher.s checkpoint, model\.teacher_ckpt: .*cannot be downloaded',
        ),
        (dict(teacher_config=None), r'model\.teacher_config is missing: name the config'),
        (
            dict(teacher_config='gone.py'),
            r'model\.teacher_config .gone.py. cannot .*does not exist',
        ),
        (dict(teacher_config='.'), r'model\.teacher_config .\.. cannot .*is a directory'),
        (dict(teacher_config='mmdet::gone/gone.py'), r'model\.teacher_config .*cannot be read'),
    ],
)
def test_what_is_missing_is_said_to_be_the_teachers(change, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('TORCH_HOME', str(tmp_path))
    model = pairs.distilled(pairs.fpn(), pairs.fpn(), pairs.recipe())
    with pytest.raises((TeacherError, CheckpointError), match=said):
        require_teacher(pairs.build(dict(model, **change)))


def test_a_teacher_config_that_is_no_python(tmp_path):
    """A config is a program: it may raise anything."""
    model = pairs.distilled(pairs.fpn(), pairs.fpn(), pairs.recipe())
    for text in ("_base_ = 'gone.py'\n", 'model = dict(\n', 'model = undefined\n'):
        path = tmp_path / f'teacher{len(text)}.py'
        path.write_text(text)
        with pytest.raises(TeacherError, match=rf'model\.teacher_config .*{path.name}.*cannot be'):
            require_teacher(pairs.build(dict(model, teacher_config=str(path))))


# ---------------------------------------------------------------------- a teacher of another config


def names_of_a_pair(config, said, own, tmp_path, ckpt=None):
    """``distillation.classes`` of a pair whose teacher's config and checkpoint name these."""
    teacher = copy.deepcopy(config)
    for part in ('train', 'val', 'test'):
        teacher[f'{part}_dataloader'].dataset.metainfo = dict(classes=tuple(said))
    teacher.dump(tmp_path / 'teacher.py')
    state = pairs.build(teacher.model).state_dict()
    ckpt = ckpt or tmp_path / 'teacher.pth'
    meta = dict(dataset_meta=dict(classes=tuple(own))) if own else {}
    torch.save(dict(state_dict=state, meta=meta), ckpt)
    config.model = pairs.distilled(
        config.model, str(tmp_path / 'teacher.py'), pairs.recipe(), str(ckpt)
    )
    return apply_classes(config).model.distillation.get('classes')


def test_the_checkpoints_own_names_come_before_those_of_the_config(config, tmp_path, said):
    found = names_of_a_pair(config, ('a', 'b', 'c'), CLASSES[::-1], tmp_path)
    assert found.teacher == list(CLASSES[::-1]) and found.student == list(CLASSES)
    assert pairs.build(apply_classes(config).model).classes.indices == [2, 1, 0]
    assert all('trained on the classes blue, green, red' in text for text in said) and said


@pytest.mark.parametrize('own', [None, ('red', 'green'), ('Red', 'GREEN', 'blue')])
def test_the_configs_names_stand_where_the_checkpoint_has_none(config, tmp_path, own, said):
    """None, those of another head, or the same in an older spelling."""
    assert names_of_a_pair(config, CLASSES, own, tmp_path) is None and not said


def test_weights_of_another_config_are_not_blamed_on_class_names(config, tmp_path):
    """Both are wrong: the weights say why."""
    names_of_a_pair(config, ('a', 'b', 'c'), None, tmp_path)
    wider = pairs.build(Config.fromfile(tiny_config(tmp_path, 'w', base_channels=8)).model)
    torch.save(dict(state_dict=wider.state_dict()), tmp_path / 'teacher.pth')
    with pytest.raises(TeacherError, match='trained with another config'):
        pairs.build(apply_classes(config).model)
    os.remove(tmp_path / 'teacher.pth')
    with pytest.raises(MissingFileError, match='does not exist'):
        require_teacher(pairs.build(apply_classes(config).model))


# ----------------------------------------------------------------------------------------- spelling


@pytest.mark.parametrize(
    ('one', 'other'),
    [
        ('Traffic Light', 'traffic_light'), ('café', 'cafe\u0301'), ('Crème', 'creme'),
        ('dining table', 'diningtable'), ('stop-sign', 'STOP SIGN'), ('\ufeffcat', 'cat '),
    ],
)  # fmt: skip
def test_a_class_of_another_spelling_is_asked_for(one, other):
    with pytest.raises(ValueError, match='did you mean') as error:
        ClassMap(['dog', one], [other, 'dog'])
    assert repr(other) in str(error.value) and 'distillation.classes=dict(names=' in str(
        error.value
    )
    assert ClassMap(['dog', one], [other, 'dog'], {one: other}).indices == [1, 0]


@pytest.mark.parametrize(
    ('student', 'teacher'),
    [
        (['cat', 'new'], ['cat', 'dog']),  # unknown, rightly
        (['Orange', 'orange'], ['orange', 'x']),  # both are classes of the student
        (['new', 'cat'], ['cat', 'NEW', 'New']),  # which one?
        (['か', 'x'], ['が', 'x']), (['কল', 'x'], ['কাল', 'x']), (['C', 'x'], ['C++', 'x']),
    ],
)  # fmt: skip
def test_another_class_is_no_other_spelling(student, teacher):
    ClassMap(student, teacher)


def test_a_wrong_name_gets_the_nearest_spelling_first():
    with pytest.raises(ValueError, match="no class 'CAR'; near ones: car$"):
        ClassMap(['CAR'], ['bus', 'car', 'cart'], dict(CAR='CAR'))


def recategorised(path, names):
    content = json.loads(path.read_text())
    for category, name in zip(content['categories'], names, strict=True):
        category['name'] = name
    path.write_text(json.dumps(content))


def test_a_file_of_another_spelling_is_asked_for(config, tmp_path):
    recategorised(tmp_path / 'data/val.json', ('Red', 'green', 'blue'))
    with pytest.raises(AnnotationError, match=r"no 'red' .*'red': did you mean 'Red'\?"):
        check_annotations(config.val_dataloader, 'val')
    recategorised(tmp_path / 'data/train.json', ('red', 'gre-en', 'blue'))
    data = RUNNERS.get('mmkd.DistillationRunner').build_dataloader(config.train_dataloader).dataset
    with pytest.raises(ValueError, match=r"'green': did you mean 'gre-en'\?$"):
        check_labels(data)


@pytest.mark.parametrize('order', [1, -1])
def test_training_and_validation_in_two_spellings(config, tmp_path, order, said):
    names = ('Red', 'green', 'BLUE')[::order]
    recategorised(tmp_path / 'data/val.json', names)
    config.val_dataloader.dataset.metainfo.classes = names
    build = DistillationRunner.build_dataloader
    data = [build(config[f'{part}_dataloader']).dataset for part in ('train', 'val')]
    if order < 0:
        with pytest.raises(ValueError, match='in the order BLUE, green, Red'):
            check_same_labels(*data)
        return
    check_same_labels(*data)
    assert "'red': did you mean 'Red'?" in said[0] and len(said) == 1
    check_same_labels(data[0], data[0])
    assert len(said) == 1


# ---------------------------------------------------------------------------------- MMDetection 2.x


def changed(config, change):
    made = copy.deepcopy(config)
    change(made, made.train_dataloader, made.train_dataloader.dataset)
    return made


def transform(index, **values):
    return lambda cfg, loader, data: data.pipeline[index].update(values)


@pytest.mark.parametrize(
    ('change', 'said'),
    [
        (
            lambda cfg, loader, data: data.update(ann_file=['a.json', 'b.json']),
            r"dataset\.ann_file=\['a.json', 'b.json'\].*write train_dataloader\.dataset="
            r"dict\(type='ConcatDataset', datasets=\[dict\(\.\.\., ann_file='a.json'\), dict",
        ),
        (
            lambda cfg, loader, data: loader.update(
                dataset=dict(type='RepeatDataset', times=2, dataset=dict(data, img_prefix='x/'))
            ),
            r"train_dataloader\.dataset\.dataset\.img_prefix='x/'.*data_prefix=dict\(img='x/'\)",
        ),
        (
            lambda cfg, loader, data: data.update(classes=('a', 'b')),
            r"classes=\('a', 'b'\).*write metainfo=dict\(classes=\('a', 'b'\)\)",
        ),
        (
            lambda cfg, loader, data: loader.update(dataset=[data, data]),
            r"a list of 2 data sets.*dict\(type='ConcatDataset', datasets=\[\.\.\.\]\)",
        ),
        (lambda cfg, loader, data: data.update(data_prefix='x/'), r"data_prefix=dict\(img='x/'\)"),
        (lambda cfg, loader, data: data.update(filter_empty_gt=True), r'filter_cfg=dict\(filter'),
        (lambda cfg, loader, data: loader.update(samples_per_gpu=2), r'write batch_size=2'),
        (lambda cfg, loader, data: cfg.update(data=dict(samples_per_gpu=2)), 'data=dict.*nothing'),
        (transform(2, img_scale=(9, 9)), r'Resize\(img_scale=\.\.\.\).*write scale=\(9, 9\)'),
        (transform(3, flip_ratio=0.5), r'RandomFlip\(flip_ratio=\.\.\.\).*write prob=0.5'),
        (transform(4, type='Collect', keys=['img']), r"pipeline\[4\], type='Collect'.*PackDetIn"),
    ],
    ids=['ann_file', 'img_prefix', 'classes', 'list', 'data_prefix', 'filter_empty_gt', 'samples',
         'data', 'img_scale', 'flip_ratio', 'Collect'],
)  # fmt: skip
def test_a_spelling_of_2x_is_told_that_of_3x(config, change, said):
    with pytest.raises(ValueError, match=said):
        DistillationRunner.from_cfg(changed(config, change))


def test_what_3x_reads_is_left_alone(config):
    for change in (
        lambda cfg, loader, data: loader.update(
            dataset=dict(type='RepeatDataset', times=2, dataset=dict(data))
        ),
        lambda cfg, loader, data: loader.update(
            dataset=dict(type='ConcatDataset', datasets=[dict(data), dict(data)])
        ),
        lambda cfg, loader, data: cfg.update(data='a variable', classes=('a',)),
        lambda cfg, loader, data: data.update(type='mmdet.CityscapesDataset'),
    ):
        refuse_old_spellings(changed(config, change))


# ------------------------------------------------------------------------------------ four channels


@TRANSFORMS.register_module()
class LoadArray(BaseTransform):
    """Of a user: images of many channels, from .npy files."""

    def transform(self, results):
        results['img'] = np.load(results['img_path']).astype(np.float32) / 255
        results['img_shape'] = results['ori_shape'] = results['img'].shape[:2]
        return results


def many_channels(model, channels=4):
    model.data_preprocessor.update(mean=None, std=None, bgr_to_rgb=False)
    model.backbone.in_channels = channels
    return model


def of_arrays(config, tmp_path, channels=4):
    """The config with images of .npy files, and a network that takes them."""
    root = tmp_path / 'data'
    for split in ('train', 'val'):
        content = json.loads((root / f'{split}.json').read_text())
        for image in content['images']:
            file = root / 'images' / image['file_name']
            image['file_name'] = file.with_suffix('.npy').name
            pixels = cv2.imread(str(file))
            layers = [pixels[..., i % 3] for i in range(channels)]
            np.save(file.with_suffix('.npy'), np.stack(layers, -1))
        (root / f'{split}.json').write_text(json.dumps(content))
    for part in ('train', 'val', 'test'):
        pipeline = config[f'{part}_dataloader'].dataset.pipeline
        pipeline[0] = dict(type='LoadArray')
    many_channels(config.model, channels)
    return config


def test_a_pair_of_four_channels_trains(config, tmp_path):
    cfg = of_arrays(config, tmp_path)
    torch.save(dict(state_dict=pairs.build(cfg.model).state_dict()), tmp_path / 'teacher.pth')
    cfg.model = pairs.distilled(cfg.model, cfg.model, pairs.recipe(), str(tmp_path / 'teacher.pth'))
    teacher = Config(dict(model=copy.deepcopy(cfg.model.teacher_config.model)))
    cfg.model.teacher_config = teacher.to_dict()
    report = check_pair(cfg, size=(64, 64), processes=1)
    assert report.go, report.against
    runner = RUNNERS.build(cfg)
    runner.train()  # its teacher is shown some images first
    assert runner.iter == 4


@pytest.mark.parametrize('channels', [1, 2, 4])
def test_a_teacher_of_other_channels_is_refused(channels):
    other = many_channels(pairs.fpn(), channels)
    for networks, said in (
        ((other, pairs.fpn()), rf'have {channels} channel\(s\) .* the teacher.s 3'),
        ((pairs.fpn(), other), rf'have 3 channel\(s\) .* the teacher.s {channels}'),
    ):
        with pytest.raises(ValueError, match=said):
            pairs.distil(*copy.deepcopy(networks))


def test_a_backbone_that_folds_pixels_into_channels_takes_three():
    csp = MODELS.build(dict(type='CSPDarknet', deepen_factor=0.33, widen_factor=0.125))
    assert csp.stem.conv.conv.in_channels == 12 and input_channels(csp) == 3


def test_an_order_of_three_channels_among_four_is_refused():
    """MMEngine would keep three of them."""
    model = many_channels(pairs.fpn())
    model.data_preprocessor.bgr_to_rgb = True
    with pytest.raises(ValueError, match=r'takes images of 4 channel.*set bgr_to_rgb=False'):
        pairs.distil(model, copy.deepcopy(model))


def test_one_mean_for_three_channels_is_none_of_one_channel():
    model = pairs.fpn()
    model.data_preprocessor.update(mean=[0.0], std=[255.0])
    assert pairs.losses(pairs.distil(model, pairs.fpn()))['loss_kd_hint'] > 0


@pytest.mark.parametrize('loaded', [3, 5])
def test_images_of_other_channels_than_the_student_takes(config, tmp_path, loaded):
    cfg = of_arrays(config, tmp_path, loaded)
    many_channels(cfg.model, 4)
    cfg.model = pairs.distilled(cfg.model, cfg.model, pairs.recipe())
    runner = RUNNERS.build(cfg)
    said = rf'loads images of {loaded} channel\(s\).* takes 4: .*in_channels={loaded}'
    with pytest.raises(ValueError, match=said):
        runner.train()
    assert runner.iter == 0


# ------------------------------------------------------------------------------ a start from little


def warned(said):
    return [text for text in said if 'DO NOT START' in text]


@pytest.mark.parametrize(
    ('what', 'warns'),
    [('another width', True), ('the neck', True), ('other classes', False), ('all', False)],
)
def test_a_file_of_which_little_fits_is_warned_about(tmp_path, said, what, warns):
    network = pairs.build(pairs.fpn())
    other = {'another width': pairs.fpn(8, 8), 'other classes': pairs.fpn(classes=7)}
    file = pairs.build(other.get(what, pairs.fpn()), seed=1).state_dict()
    file = {k: v for k, v in file.items() if k.startswith('neck.') or what != 'the neck'}
    own = network.state_dict()
    fitting = {k: v for k, v in file.items() if k in own and own[k].shape == v.shape}
    network.load_state_dict(fitting, strict=False)
    torch.save(dict(state_dict=file), tmp_path / 'start.pth')
    origins(network, str(tmp_path / 'start.pth'))
    assert bool(warned(said)) == warns, warned(said)


def test_a_file_of_a_backbone_is_a_start_of_the_detector(tmp_path, said):
    """Also of a small one, under heads that have more tensors."""
    heads = nn.ModuleList(nn.Linear(2, 2) for _ in range(5))
    network = nn.ModuleDict(dict(backbone=nn.Linear(2, 2), roi_head=heads))
    file = {k: v for k, v in network.state_dict().items() if k.startswith('backbone')}
    torch.save(dict(state_dict=file), tmp_path / 'start.pth')
    (line,) = origins(network, str(tmp_path / 'start.pth'))
    assert line.startswith('2 of 12 tensors') and not warned(said)


@pytest.mark.parametrize(
    ('teacher', 'warns'),
    [(pairs.fpn(8, 16), True), (pairs.fpn(8), False), (pairs.fpn(8, classes=3), False)],
)
def test_a_start_that_takes_little_is_warned_about(said, teacher, warns):
    student = pairs.distil(pairs.fpn(), teacher, pairs.recipe(start='teacher'))
    table = startup_table(student)
    assert bool(warned(said)) == warns
    if warns:
        taken = len(student.start.taken)
        of = taken + len(student.start.left)
        assert f'holds {taken} of the {of} tensors' in warned(said)[0]
        assert f"{taken} tensors of neck and heads are the teacher's, of {of}" in table


def test_a_cascade_that_starts_from_one_stage_is_not(said):
    student = pairs.distil(pairs.cascade(), pairs.fpn(), pairs.recipe('hint', start='teacher'))
    startup_table(student)
    assert not warned(said)
