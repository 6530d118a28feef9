"""A pair's config where it only predicts: without the teacher's files, at the student's scale."""

import copy
import logging

import pairs
import pytest
import torch
from mmdet.apis import DetInferencer, inference_detector, init_detector
from mmdet.registry import MODELS
from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.registry import RUNNERS
from mmengine.runner import Runner
from tiny import tiny_config

import mmkd
from mmkd.io.checkpoint import CheckpointError
from mmkd.recipe import TeacherError, plain_student


class Lines(logging.Handler):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(record.getMessage())

    def about(self, text: str) -> list[str]:
        return [line for line in self.said if text in line]


@pytest.fixture
def log():
    lines, logger = Lines(), MMLogger.get_current_instance()
    logger.addHandler(lines)
    yield lines
    logger.removeHandler(lines)


@pytest.fixture
def config(tmp_path):
    made = Config.fromfile(tiny_config(tmp_path))
    made.experiment_name = tmp_path.name
    return made


@pytest.fixture
def image(tmp_path, config):
    return str(tmp_path / 'data/images/val_000.png')


def pair(config, distillation=None, teacher_ckpt='random', teacher=None):
    made = copy.deepcopy(config)
    teacher = teacher or made.model
    made.model = pairs.distilled(made.model, teacher, distillation or pairs.recipe(), teacher_ckpt)
    return made


def checkpoint(config, path):
    """Of the distilled student, its terms included."""
    model = pairs.build(pair(config).model, seed=3)
    torch.save({'state_dict': model.state_dict(), 'meta': {}}, path)
    return str(path)


def write(config, path):
    config.dump(path)
    return str(path)


def same(one, two):
    for key in ('bboxes', 'scores', 'labels'):
        torch.testing.assert_close(one.pred_instances[key], two.pred_instances[key])


# ------------------------------------------------------------------------------- the teacher


MISSING = {
    'checkpoint': dict(teacher_ckpt='/nowhere/teacher.pth'),
    'address': dict(teacher_ckpt='http://127.0.0.1:9/teacher.pth'),
    'config': dict(teacher='/nowhere/teacher.py', teacher_ckpt='/nowhere/teacher.pth'),
}


@pytest.mark.parametrize('start', [None, 'teacher'])
@pytest.mark.parametrize('what', MISSING)
def test_without_the_teachers_files_a_student_predicts(
    config, image, tmp_path, log, what, start, capfd
):
    weights = checkpoint(config, tmp_path / 'student.pth')
    distillation = pairs.recipe(start=start)
    written = write(pair(config, distillation, **MISSING[what]), tmp_path / 'missing.py')
    plain = copy.deepcopy(config)
    plain.model = plain_student(pair(config).model)
    expected = inference_detector(init_detector(plain, weights, device='cpu'), image)
    assert len(expected.pred_instances)
    capfd.readouterr()
    model = init_detector(written, weights, device='cpu')
    assert len(log.about('the teacher was not found')) == 1
    assert 'unexpected key' not in ''.join(capfd.readouterr())
    same(inference_detector(model, image), expected)
    inferencer = DetInferencer(written, weights, device='cpu', show_progress=False)
    (found,) = inferencer(image, return_datasamples=True)['predictions']
    same(found, expected)
    assert len(log.about('the teacher was not found')) == 2


@pytest.mark.parametrize('what', MISSING)
def test_training_without_the_teachers_files_raises_the_teachers_error(config, what):
    cfg = pair(config, **MISSING[what])
    error = CheckpointError if what == 'address' else TeacherError
    model = MODELS.build(copy.deepcopy(cfg.model))
    model.init_weights()
    twin = copy.deepcopy(model)
    for each in (model, twin):
        with pytest.raises(error, match='/teacher.p'):
            pairs.losses(each.train())
    loader = Runner.build_dataloader(cfg.train_dataloader)
    with pytest.raises(error, match='/teacher.p'):
        mmkd.guard(model, loader)
    for runner_type in ('mmkd.DistillationRunner', 'Runner'):
        cfg.runner_type = runner_type
        cfg.experiment_name += '_'
        runner = RUNNERS.build(cfg)
        with pytest.raises(error, match='/teacher.p'):
            runner.train()
        assert runner.iter == 0


@pytest.mark.parametrize('runner_type', ['mmkd.DistillationRunner', 'Runner'])
def test_a_test_without_the_teachers_files(config, tmp_path, runner_type):
    """MMDetection's tools/test.py: the runner of the config, or its own."""
    weights = checkpoint(config, tmp_path / 'student.pth')
    found = []
    for cfg in (pair(config, **MISSING['config']), config):
        cfg = copy.deepcopy(cfg)
        cfg.load_from, cfg.runner_type = weights, runner_type
        cfg.experiment_name += str(len(found))
        found.append(RUNNERS.build(cfg).test())
    assert found[0] == found[1] and 'coco/bbox_mAP' in found[0]


def test_a_detector_may_be_initialised_from_its_own_checkpoint(config, tmp_path):
    weights = checkpoint(config, tmp_path / 'student.pth')
    cfg = pair(config, pairs.recipe(start='teacher'), **MISSING['checkpoint'])
    cfg.model.init_cfg = dict(type='Pretrained', checkpoint=weights)
    model = MODELS.build(cfg.model)
    model.init_weights()
    state = torch.load(weights, weights_only=True)['state_dict']
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_a_teacher_that_is_there_and_wrong_is_refused_as_it_is_built(config, tmp_path):
    (tmp_path / 'teacher.pth').write_bytes(b'no checkpoint')
    with pytest.raises(ValueError, match='teacher.pth'):
        MODELS.build(pair(config, teacher_ckpt=str(tmp_path / 'teacher.pth')).model)
    with pytest.raises(TeacherError, match='teacher_ckpt is missing'):
        MODELS.build(pair(config, teacher_ckpt=None).model)


# ------------------------------------------------------------------------------- the scale


def two_scales(config, student=(48, 48), teacher=(96, 96), terms=True):
    """The pipelines of the config that is inherited are at the teacher's scale."""
    config = copy.deepcopy(config)
    for part in ('train', 'val', 'test'):
        for transform in config[f'{part}_dataloader'].dataset.pipeline:
            if transform.type == 'Resize':
                transform.scale = teacher
    recipe = pairs.recipe() if terms else pairs.off()
    return pair(config, {**recipe, 'resolution': dict(student=student, teacher=teacher)})


def sizes(monkeypatch):
    """The sizes of the images that a student is shown."""
    shown = []
    cls = mmkd.KnowledgeDistillationTwoStageDetector
    predict = cls.predict

    def look(self, inputs, samples, *args, **kwargs):
        shown.extend(sample.img_shape for sample in samples)
        return predict(self, inputs, samples, *args, **kwargs)

    monkeypatch.setattr(cls, 'predict', look)
    return shown


@pytest.mark.parametrize('terms', [True, False])
def test_an_inferencer_shows_a_student_its_own_scale(config, image, tmp_path, monkeypatch, terms):
    weights = checkpoint(config, tmp_path / 'student.pth')
    shown = sizes(monkeypatch)
    wrapped = two_scales(config, terms=terms)
    wrapped.test_dataloader.dataset = dict(type='RepeatDataset', times=1,
                                           dataset=wrapped.test_dataloader.dataset)  # fmt: skip
    for number, cfg in enumerate((two_scales(config, terms=terms), wrapped)):
        model = init_detector(write(cfg, tmp_path / f'{number}.py'), weights, device='cpu')
        inference_detector(model, image)
        inference_detector(model, [torch.zeros(64, 64, 3).byte().numpy()])
        assert shown == [(48, 48)] * 2
        shown.clear()
    written = write(two_scales(config, terms=terms), tmp_path / 'pair.py')
    DetInferencer(written, weights, device='cpu', show_progress=False)(image)
    assert shown == [(48, 48)]


def test_a_runner_that_knows_no_scales_is_refused(config, tmp_path):
    cfg = two_scales(config)
    cfg.load_from = checkpoint(config, tmp_path / 'student.pth')
    with pytest.raises(ValueError, match=r'image of 96x96, and .*resolution\.student is 48x48'):
        Runner.from_cfg(cfg).test()
    cfg.runner_type, cfg.experiment_name = 'mmkd.DistillationRunner', tmp_path.name + '2'
    assert 'coco/bbox_mAP' in RUNNERS.build(cfg).test()
    # Its baseline would be trained at the teacher's scale.
    cfg = two_scales(config, terms=False)
    cfg.experiment_name = tmp_path.name + '3'
    with pytest.raises(RuntimeError, match='nothing has checked its .*scales'):
        Runner.from_cfg(cfg).train()
    cfg.runner_type, cfg.experiment_name = 'mmkd.DistillationRunner', tmp_path.name + '4'
    RUNNERS.build(cfg).train()


@pytest.mark.parametrize('flat', [(48, 24), (24, 48)])
def test_padding_and_upright_images_are_of_the_students_scale(config, image, tmp_path, flat):
    """What is padded is not larger; (w, h) are the long and the short edge, in any order."""
    cfg = two_scales(config, student=flat)
    pipeline = cfg.test_dataloader.dataset.pipeline
    pipeline.insert(2, dict(type='Pad', size_divisor=64))
    model = init_detector(cfg, checkpoint(config, tmp_path / 'student.pth'), device='cpu')
    for size in ((64, 32, 3), (32, 64, 3), (64, 64, 3)):
        inference_detector(model, torch.zeros(size).byte().numpy())
