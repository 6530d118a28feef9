"""Faults that went by without a word: each is refused before the first step, or mended."""

import copy
import json
import math
import pickle
import re
import sys

import pairs
import pytest
import torch
import zoo
from mmdet.apis import init_detector
from mmdet.registry import DATASETS, MODELS
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.registry import RUNNERS
from mmengine.runner import Runner
from PIL import Image
from test_check_pair import tool

import mmkd
from mmkd import KnowledgeDistillationTwoStageDetector, cli, plain_student
from mmkd.analysis.comparison.plan import plan_runs
from mmkd.datasets.annotations import check_annotations
from mmkd.datasets.labels import check_same_labels
from mmkd.datasets.two_views import apply_resolution
from mmkd.engine.class_names import class_names
from mmkd.engine.summary import startup_table

train, new_pair, test, publish_model = map(tool, ('train', 'new_pair', 'test', 'publish_model'))


# ------------------------------------------------------------------------------- the data


@pytest.mark.parametrize(
    'around', [lambda d: d, lambda d: dict(type='RepeatDataset', times=2, dataset=d)]
)
def test_parts_of_one_training_set_number_the_classes_alike(config, tmp_path, around):
    """Without a validation file to compare with, too."""
    own = config.train_dataloader.dataset
    content = json.loads((tmp_path / 'data/train.json').read_text())
    joined = dict(type='ConcatDataset', datasets=[own, dict(own, ann_file='other.json')])
    other = tmp_path / 'data/other.json'
    other.write_text(json.dumps(content))
    check_same_labels(DATASETS.build(around(joined)), None)
    other.write_text(json.dumps({**content, 'categories': content['categories'][::-1]}))
    joined['datasets'][1]['metainfo'] = dict(classes=('blue', 'green', 'red'))
    said = r'train.json .* order red, green, blue, and .*other.json .* trained under two labels'
    with pytest.raises(ValueError, match=said):
        check_same_labels(DATASETS.build(around(joined)), None)


@pytest.mark.parametrize(
    'kind', ['ConcatDataset', 'RepeatDataset', 'ClassBalancedDataset', 'MultiImageMixDataset']
)
def test_class_names_are_found_inside_wrappers(config, kind):
    own = config.train_dataloader.dataset
    inner = dict(datasets=[own, own]) if kind == 'ConcatDataset' else dict(dataset=own)
    # The last one has a pipeline of its own, which loads nothing.
    more = dict(pipeline=[]) if kind == 'MultiImageMixDataset' else {}
    config.train_dataloader.dataset = dict(type=kind, **inner, **more)
    config.val_dataloader = config.test_dataloader = None
    assert class_names(config) == list(config.classes)


@pytest.mark.parametrize('turn', [1, 3, 5, 6, 8])
@pytest.mark.parametrize('annotated', ['unturned', 'turned'])
def test_annotations_of_unturned_photographs_are_warned_about(
    config, tmp_path, turn, annotated, monkeypatch
):
    path = tmp_path / 'data/train.json'
    content = json.loads(path.read_text())
    exif = Image.Exif()
    exif[0x0112] = turn
    size = (96, 64)
    for image in content['images']:
        image['file_name'] = image['file_name'].replace('.png', '.jpg')
        Image.new('RGB', size).save(tmp_path / 'data/images' / image['file_name'], exif=exif)
        turned = annotated == 'turned' and turn > 4
        image['width'], image['height'] = size[::-1] if turned else size
    path.write_text(json.dumps(content))
    said = []
    monkeypatch.setattr('mmkd.datasets.annotations.print_log', lambda text, **_: said.append(text))
    check_annotations(config.train_dataloader)
    assert any('EXIF' in text for text in said) == (turn > 4 and annotated == 'unturned')


# ------------------------------------------------------------------------------- the metrics


@pytest.mark.parametrize('monitor', ['bbox_mAP', 'coco/bbox_map'])
@pytest.mark.parametrize('what', ['EarlyStoppingHook', 'ReduceOnPlateauLR'])
def test_a_metric_that_is_waited_for_is_reported(config, what, monitor):
    waiting = dict(type=what, monitor=monitor, rule='greater', patience=1)
    if what == 'EarlyStoppingHook':
        config.default_hooks.early_stopping = waiting
    else:
        config.param_scheduler = [waiting]
    runner = RUNNERS.build(config)
    with pytest.raises(ValueError, match=rf'{what}.monitor={monitor} is none .*coco/bbox_mAP'):
        runner.train()
    assert runner.iter == 0


def test_a_metric_of_no_validation_is_not_waited_for(config):
    config.default_hooks.early_stopping = dict(type='EarlyStoppingHook', monitor='coco/bbox_mAP')
    config.val_dataloader = config.val_cfg = config.val_evaluator = None
    with pytest.raises(ValueError, match='EarlyStoppingHook monitors coco/bbox_mAP.*no validation'):
        RUNNERS.build(config).train()


class Watching(Hook):
    """Of a user, who calls something else a monitor."""

    monitor = 'temperature of the room'


def test_a_hook_of_ones_own_may_call_anything_a_monitor(config):
    config.custom_hooks = [dict(type=Watching)]
    runner = RUNNERS.build(config)
    runner.train()
    assert runner.iter == 4


def test_a_metric_that_is_reported_trains(config):
    config.default_hooks.early_stopping = dict(
        type='EarlyStoppingHook', monitor='coco/bbox_mAP', rule='greater', patience=1
    )
    runner = RUNNERS.build(config)
    runner.train()
    assert runner.iter == 4


# ------------------------------------------------------------------------------- the configs


def pair(config, path, text=''):
    model = pairs.distilled(config.model, config.model, pairs.recipe())
    path.write_text(f'_base_ = {config.filename!r}\nmodel = {dict(model)!r}\n{text}')
    return path


def test_the_config_that_a_run_leaves_is_read_again(config, tmp_path):
    written = tmp_path / 'pair.py'
    recipe = tmp_path / 'recipe.py'
    recipe.write_text(f'distillation = {pairs.recipe()!r}\n')
    written.write_text(
        f'_base_ = [{config.filename!r}, {str(recipe)!r}]\n'
        "model = dict(type='mmkd.KnowledgeDistillationTwoStageDetector', teacher_ckpt='random',\n"
        f'    teacher_config={config.filename!r}, distillation=_base_.distillation)\n'
    )
    dumped = tmp_path / 'work_dirs/pair.py'
    dumped.parent.mkdir(exist_ok=True)
    Config.fromfile(written).dump(dumped)
    assert re.search('^distillation ?=', dumped.read_text(), re.MULTILINE)
    again = cli.load_config(train.parse_args([str(dumped)]))
    assert again.model.distillation == Config.fromfile(written).model.distillation
    # What a user writes beside the model of a pair is still refused.
    child = tmp_path / 'child.py'
    child.write_text(f'_base_ = {str(written)!r}\ndistillation = dict(start="teacher")\n')
    with pytest.raises(SystemExit, match='distillation stands beside the model'):
        cli.load_config(train.parse_args([str(child)]))


def test_a_teacher_config_of_2x_is_told_how_to_become_one_of_3x(config):
    model = dict(config.model)
    model.pop('data_preprocessor')
    old = dict(model=model, data=dict(samples_per_gpu=2))
    for teacher in (old, dict(model=dict(model, pretrained='torchvision://resnet18'))):
        student = pairs.distilled(config.model, config.model, pairs.recipe())
        student['teacher_config'] = teacher
        with pytest.raises(ValueError, match=r'of MMDetection 2\.x: .*data_preprocessor=dict'):
            pairs.build(student)


@pytest.mark.parametrize('term', ['hint', 'rcnn_cls', 'rpn_bbox'])
def test_an_argument_of_a_loss_that_there_is_not_gets_the_nearest(term):
    recipe = pairs.recipe()
    recipe[term]['weight'] = recipe[term].pop('loss_weight', 1.0)
    near = rf"distillation\.{term}: \w+ has no entry 'weight'; did you mean .*loss_weight"
    with pytest.raises(ValueError, match=near):
        pairs.distil(pairs.fpn(), distillation=recipe)


def test_a_student_in_the_new_style_is_told_another_way(config, tmp_path):
    parts, student = tmp_path / 'parts.py', tmp_path / 'new_style.py'
    parts.write_text(
        'from mmdet.models.detectors.faster_rcnn import FasterRCNN\n'
        f'model = {dict(config.model.to_dict(), type="X")!r}\nmodel["type"] = FasterRCNN\n'
    )
    student.write_text(
        'from mmengine.config import read_base\nwith read_base():\n    from .parts import *\n'
    )
    out = tmp_path / 'pair.py'
    arguments = ['--teacher', str(config.filename), '--teacher-ckpt', str(parts), '--student']
    with pytest.raises(SystemExit, match=r'new_style.py is in MMEngine.s new style'):
        new_pair.main([*arguments, str(student), '--out', str(out)])
    assert not out.exists()


# ------------------------------------------------------------------------------- the student


OWN = """
from mmdet.models.detectors import FasterRCNN
from mmdet.registry import MODELS


@MODELS.register_module()
class DarkFasterRCNN(FasterRCNN):
    def __init__(self, *args, light=1.0, **kwargs):
        super().__init__(*args, **kwargs)
        self.light = light

    def extract_feat(self, batch_inputs):
        return super().extract_feat(batch_inputs * self.light)

    def loss(self, batch_inputs, batch_data_samples):
        losses = super().loss(batch_inputs, batch_data_samples)
        losses['loss_of_mine'] = batch_inputs.mean() * 0 + 1.0
        return losses
"""


@pytest.fixture
def own_student(config, tmp_path, monkeypatch):
    """A student of a detector class of one's own, and a pair that replaces its type."""
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / 'dark_detector.py').write_text(OWN)
    student, recipe, written = (tmp_path / f'{n}.py' for n in ('student', 'recipe', 'own_pair'))
    student.write_text(
        f"_base_ = [{config.filename!r}]\ncustom_imports = dict(imports=['dark_detector'])\n"
        "model = dict(type='DarkFasterRCNN', light=0.5)\n"
    )
    recipe.write_text(f'distillation = {pairs.recipe()!r}\n')
    written.write_text(
        f'_base_ = [{str(student)!r}, {str(recipe)!r}]\n'
        "model = dict(type='mmkd.KnowledgeDistillationTwoStageDetector', teacher_ckpt='random',\n"
        f'    teacher_config={config.filename!r}, distillation=_base_.distillation)\n'
    )
    yield student, written
    for name in ('Dark', 'Light'):
        MODELS.module_dict.pop(f'{name}FasterRCNN', None)
        sys.modules.pop(f'{name.lower()}_detector', None)


def test_the_students_own_detector_class_is_kept(own_student, tmp_path):
    student, written = own_student
    cfg = cli.load_config(train.parse_args([str(written)]))
    assert cfg.model.detector == 'DarkFasterRCNN'
    assert plain_student(cfg.model)['type'] == 'DarkFasterRCNN'
    model = pairs.build(cfg.model)
    own = MODELS.get('DarkFasterRCNN')
    assert isinstance(model, KnowledgeDistillationTwoStageDetector) and isinstance(model, own)
    assert model.light == 0.5 and 'student  ' in (table := startup_table(model))
    assert 'DarkFasterRCNN, ResNet' in table
    values = pairs.losses(model)
    assert values['loss_of_mine'] == 1 and values['loss_kd_hint'] > 0
    plain = pairs.build(Config.fromfile(student).model)
    hard = pairs.losses(plain)
    assert torch.equal(values['loss_bbox'], hard['loss_bbox'])


def test_the_tools_keep_the_students_class(own_student, config, tmp_path):
    student, written = own_student
    out = tmp_path / 'out'
    train.main([str(written), '--work-dir', str(out)])
    published = publish_model.publish(str(out / 'epoch_1.pth'), str(tmp_path / 'student.pth'))
    found = []
    # As a pair and as the plain student; as trained and as published.
    for number, (cfg, weights) in enumerate(
        ((written, out / 'epoch_1.pth'), (student, out / 'epoch_1.pth'), (written, published))
    ):
        pickled = tmp_path / f'{number}.pkl'
        options = ['--work-dir', str(tmp_path / str(number)), '--out', str(pickled)]
        options += ['--cfg-options', f'experiment_name={tmp_path.name}{number}']
        test.main([str(cfg), str(weights), *options])
        found.append([each['pred_instances'] for each in pickle.loads(pickled.read_bytes())])
    assert sum(len(each['bboxes']) for each in found[0])
    for other in found[1:]:
        for one, two in zip(found[0], other, strict=True):
            assert all(torch.equal(one[key], two[key]) for key in ('bboxes', 'scores', 'labels'))
    plain = MODELS.build(Config.fromfile(student).model)
    state = torch.load(published, weights_only=True)['state_dict']
    plain.load_state_dict(state, strict=True)


@pytest.mark.parametrize('argument', [True, False])
def test_an_inferencer_is_told_the_students_class(own_student, argument):
    """It builds what is written, and knows nothing of what the config inherits."""
    student, written = own_student
    if not argument:
        student.write_text(student.read_text().replace(', light=0.5', ''))
    text = written.read_text()
    says = "no entry 'light'.*needs its name" if argument else 'student of class DarkFasterRCNN'
    with pytest.raises(ValueError, match=says + r'.*detector=_base_\.model\.type'):
        init_detector(str(written), device='cpu')
    written.write_text(text.replace("Detector',", "Detector', detector=_base_.model.type,"))
    model = init_detector(str(written), device='cpu')
    assert isinstance(model, MODELS.get('DarkFasterRCNN'))


def test_a_comparison_keeps_the_classes_of_student_and_teacher(own_student, config, tmp_path):
    """The baseline is the plain student's run, and each test imports what its network needs."""
    student, written = own_student
    (tmp_path / 'light_detector.py').write_text(OWN.replace('DarkFasterRCNN', 'LightFasterRCNN'))
    teacher, weights = tmp_path / 'own_teacher.py', tmp_path / 'teacher.pth'
    teacher.write_text(
        f"_base_ = [{config.filename!r}]\ncustom_imports = dict(imports=['light_detector'])\n"
        "model = dict(type='LightFasterRCNN')\n"
    )
    torch.save({'state_dict': {}}, weights)
    text = written.read_text().replace("teacher_ckpt='random'", f'teacher_ckpt={str(weights)!r}')
    written.write_text(
        text.replace(f'teacher_config={config.filename!r}', f'teacher_config={str(teacher)!r}')
    )
    plan = plan_runs([str(written)], [0], plain=[str(student)])
    comparison = plan.comparisons[0]
    assert comparison.baseline is plan.plain[0]
    kinds = ('LightFasterRCNN', 'DarkFasterRCNN', 'DarkFasterRCNN')
    rows = (comparison.teacher, comparison.baseline, comparison.distilled)
    for kind, row in zip(kinds, rows, strict=True):
        dumped = tmp_path / f'{row.role}.py'
        row.runs[0].test_cfg.dump(dumped)
        # As another process reads it.
        for name in ('dark_detector', 'light_detector'):
            sys.modules.pop(name, None)
        for name in {*kinds}:
            MODELS.module_dict.pop(name, None)
        assert type(MODELS.build(Config.fromfile(dumped).model)).__name__ == kind


def test_a_copy_and_a_pickle_are_of_the_students_class(own_student):
    model = pairs.build(cli.load_config(train.parse_args([str(own_student[1])])).model)
    total = float(pairs.total(model, pairs.losses(model.eval())))
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(twin) is type(model) and twin is not model
        assert float(pairs.total(twin, pairs.losses(twin))) == total
    assert copy.deepcopy(model).teacher is model.teacher


def test_a_new_pair_names_the_students_class(own_student, config, tmp_path):
    student, _ = own_student
    out = tmp_path / 'new.py'
    checkpoint = tmp_path / 'teacher.pth'
    checkpoint.touch()
    for base, named in ((student, True), (config.filename, False)):
        arguments = ['--teacher', config.filename, '--teacher-ckpt', str(checkpoint)]
        new_pair.main([*arguments, '--student', str(base), '--out', str(out)])
        cfg = Config.fromfile(out)
        assert cfg.model.get('detector') == ('DarkFasterRCNN' if named else None)
        out.unlink()


@pytest.mark.parametrize(
    ('detector', 'says'),
    [
        ('FastRCNNN', 'registered nowhere; near ones: .*FastRCNN'),
        ('RetinaNet', 'is no two-stage detector'),
        (dict, 'is no two-stage detector'),
    ],
)
def test_a_detector_class_that_cannot_be_is_refused(detector, says):
    model = pairs.distilled(pairs.fpn(), pairs.fpn(), pairs.recipe())
    with pytest.raises(ValueError, match=says):
        pairs.build(dict(model, detector=detector))


def test_trident_is_a_detector_class_like_any(config):
    named = dict(zoo.config('Trident', 'Trident'))
    kind = named.pop('type')
    other = dict(
        named, type='mmkd.KnowledgeDistillationTwoStageDetector', detector='TridentFasterRCNN'
    )
    values = []
    for model in (dict(named, type=kind), other):
        built = pairs.build(model)
        zoo.settle(built), zoo.settle(built.teacher.network)
        values.append(float(pairs.total(built, pairs.losses(built, zoo.batch()))))
    assert built.student_class.__name__ == 'TridentFasterRCNN' and built.num_branch == 3
    twin = copy.deepcopy(built)
    assert type(twin) is type(built) and twin.student_class is built.student_class
    assert all(math.isfinite(value) for value in values)


# ------------------------------------------------------------------------------- the pixels


def one_channel(model):
    model.data_preprocessor.update(mean=[114.0], std=[58.0], bgr_to_rgb=False)
    model.backbone.in_channels = 1
    return model


def grey(data):
    data['inputs'] = [image[:1] for image in data['inputs']]
    return data


def test_images_of_one_channel():
    model = pairs.distil(one_channel(pairs.fpn()), one_channel(pairs.fpn(8)))
    values = pairs.losses(model, grey(pairs.batch()))
    assert values['loss_kd_hint'] > 0 and values['loss_kd_cls'] > 0
    for student, teacher in ((1, 3), (3, 1)):
        networks = [one_channel(pairs.fpn()) if n == 1 else pairs.fpn() for n in (student, teacher)]
        said = rf'have {student} channel\(s\) .* the teacher.s {teacher}'
        with pytest.raises(ValueError, match=said):
            pairs.distil(*networks)
    for wrong in (dict(mean=[1.0, 2.0, 3.0], std=[1.0, 1.0, 1.0]), dict(bgr_to_rgb=True)):
        teacher = one_channel(pairs.fpn(8))
        teacher.data_preprocessor.update(wrong)
        with pytest.raises(ValueError, match="the teacher's backbone takes images of 1 channel"):
            pairs.distil(one_channel(pairs.fpn()), teacher)


@pytest.mark.parametrize('terms', [True, False], ids=['distilled', 'baseline'])
def test_both_scales_reach_the_pipeline_of_a_hook(config, terms):
    resolution = dict(student=(48, 48), teacher=(96, 96))
    recipe = pairs.recipe() if terms else pairs.off()
    config.model = pairs.distilled(config.model, config.model, {**recipe, 'resolution': resolution})
    last = [dict(t) for t in config.train_dataloader.dataset.pipeline if t.type != 'RandomFlip']
    config.custom_hooks = [dict(type='PipelineSwitchHook', switch_epoch=1, switch_pipeline=last)]
    found = apply_resolution(config).custom_hooks[0].switch_pipeline
    resizes = found[-1].transforms if terms else found
    assert (found[-1].type == 'mmkd.TwoViews') == terms
    assert [t.scale for t in resizes if t.type == 'Resize'] == [(48, 48)]
    assert apply_resolution(apply_resolution(config)).custom_hooks[0].switch_pipeline == found


# ------------------------------------------------------------------------------- nobody in charge


def notebook(config, **changes):
    """MMEngine's own Runner, which knows nothing of mmkd."""
    made = copy.deepcopy(config)
    made.model = pairs.distilled(made.model, made.model, pairs.recipe() | changes)
    made.pop('runner_type')
    return Runner.from_cfg(made)


def test_a_runner_that_checks_nothing_is_stopped_with_the_lines_to_write(config):
    runner = notebook(config)
    with pytest.raises(
        RuntimeError, match=r'RUNNERS\.build\(cfg\).*mmkd\.guard\(model, train_data'
    ):
        runner.train()
    assert runner.iter == 0


def test_with_every_term_off_nobody_need_be_in_charge(config):
    made = copy.deepcopy(config)
    made.model = pairs.distilled(made.model, made.model, pairs.off())
    made.pop('runner_type')
    Runner.from_cfg(made).train()


def test_a_loop_of_ones_own_is_guarded(config):
    """And then trains; nothing is asked of a detector that is only evaluated."""
    runner = notebook(config)
    model, loader = runner.model, runner.build_dataloader(config.train_dataloader)
    model.init_weights()
    data = model.data_preprocessor(next(iter(loader)), True)
    with pytest.raises(RuntimeError, match='nothing has checked'):
        model.train()(**copy.deepcopy(data), mode='loss')
    assert model.eval()(**copy.deepcopy(data), mode='loss')['loss_kd_hint'] > 0
    mmkd.guard(model, loader)
    assert model.train()(**data, mode='loss')['loss_kd_hint'] > 0


def test_a_guard_sees_classes_in_another_order(config, tmp_path):
    teacher = tmp_path / 'reversed.py'
    names = repr(tuple(config.classes[::-1]))
    teacher.write_text(
        f'_base_ = [{config.filename!r}]\n'
        + ''.join(
            f'{part}_dataloader = dict(dataset=dict(metainfo=dict(classes={names})))\n'
            for part in ('train', 'val', 'test')
        )
    )
    made = copy.deepcopy(config)
    made.model = pairs.distilled(made.model, str(teacher), pairs.recipe())
    made.pop('runner_type')
    runner = Runner.from_cfg(made)
    loader = runner.build_dataloader(config.train_dataloader)
    with pytest.raises(RuntimeError, match=r'another order, .*classes=dict\(student=\[.red'):
        mmkd.guard(runner.model, loader)


def test_a_guard_tries_the_teacher(config):
    runner = notebook(config)
    loader = runner.build_dataloader(config.train_dataloader)
    network = runner.model.teacher.network
    network.backbone.conv1.weight.requires_grad_(True)
    with pytest.raises(ValueError, match='requires a gradient, so it is not frozen'):
        mmkd.guard(runner.model, loader)
    assert not runner.model.guarded
