"""Images labelled with a detector: the file, what is kept of earlier work, thresholds, the page."""

import contextlib
import copy
import json
import os
import re
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pairs
import pytest
import torch
import zoo
from mmdet.apis import inference_detector, init_detector
from mmdet.registry import DATASETS
from mmengine.config import Config
from mmengine.structures import InstanceData
from PIL import Image
from pycocotools.coco import COCO
from test_tools import free_port, refusal
from tiny import CLASSES, tiny_config

from mmkd.analysis.gallery import write_gallery
from mmkd.commands import pseudo_label
from mmkd.datasets.annotations import AnnotationError, check_annotations
from mmkd.datasets.intact_images import unreadable
from mmkd.datasets.teacher_labels import Images, Labels, LabelsError, find_images, read_labels
from mmkd.digests import digest, tensor_digests
from mmkd.engine import labeller_checks, pseudo_labels, thresholds
from mmkd.engine.labeller import DESCRIPTION, Labeller, labeller_of
from mmkd.engine.labeller_checks import best_thresholds, require_labeller
from mmkd.engine.pseudo_labels import label_images
from mmkd.models.teacher import Teacher
from mmkd.recipe import TeacherError


def weights(model, path, classes=CLASSES, seed=0):
    state = pairs.build(model, seed).state_dict()
    torch.save({'state_dict': state, 'meta': {'dataset_meta': {'classes': classes}}}, path)
    return str(path)


@pytest.fixture(scope='module')
def home(tmp_path_factory):
    """A config, its checkpoint, and a folder of six images, two of them below."""
    folder = tmp_path_factory.mktemp('labels')
    config = tiny_config(folder)
    # So that an untrained network finds some of each class.
    with open(config, 'a') as file:
        file.write("\nmodel['test_cfg']['rcnn']['max_per_img'] = 60\n")
    images = folder / 'unlabelled'
    (images / 'more').mkdir(parents=True)
    for i in range(6):
        below = images / 'more' if i < 2 else images
        shutil.copy2(folder / f'data/images/train_{i:03d}.png', below / f'{i}.png')
    checkpoint = weights(Config.fromfile(config).model, folder / 'teacher.pth')
    return SimpleNamespace(
        folder=folder, config=str(config), cfg=Config.fromfile(config), checkpoint=checkpoint,
        images=images,
    )  # fmt: skip


@pytest.fixture
def images(home, tmp_path):
    """A copy of the folder, which a test may change; times are kept."""
    shutil.copytree(home.images, tmp_path / 'images')
    return tmp_path / 'images'


class Finder(torch.nn.Module):
    """Finds one box in each image, whose place is told by the image's pixels; counts its images."""

    def __init__(self, ends_after=None):
        super().__init__()
        self.seen, self.ends_after = [], ends_after

    def test_step(self, data):
        if self.ends_after is not None and len(self.seen) >= self.ends_after:
            os.kill(os.getpid(), signal.SIGKILL)
        for image, sample in zip(data['inputs'], data['data_samples'], strict=True):
            self.seen.append(Path(sample.img_path).name)
            at = int(image.sum()) % 20
            sample.pred_instances = InstanceData(
                bboxes=torch.tensor([[at, 1.0, at + 30.25, 90.0], [0.0, 0.0, 5.0, 5.0]]),
                labels=torch.tensor([at % 3, 2]), scores=torch.tensor([0.25 + at / 40, 0.04]),
            )  # fmt: skip
        return data['data_samples']


def finder(home, teacher='one', classes=CLASSES, **options):
    info = dict(description=DESCRIPTION, teacher=teacher, min_score=0.05)
    info |= dict(teacher_sha256=teacher, config_sha256='c')
    pipeline = home.cfg.test_dataloader.dataset.pipeline
    return Labeller(Finder(**options), pipeline, list(classes), [0, 1, 2], info)


def label(home, images, out, labeller=None, **options):
    labeller = labeller or finder(home)
    options = dict(batch_size=2, workers=0) | options
    label_images(home.cfg, images, out, labeller=labeller, **options)
    return labeller.network.seen


# ------------------------------------------------------------------------------------- the file


@pytest.fixture(scope='module')
def labelled(home):
    out = home.folder / 'labels.json'
    label_images(home.cfg, home.images, out, checkpoint=home.checkpoint, workers=0)
    return out


def test_the_boxes_are_those_of_mmdetections_inference(home, labelled):
    model = init_detector(home.config, home.checkpoint, device='cpu')
    labels = read_labels(labelled)
    assert list(labels.images) == ['2.png', '3.png', '4.png', '5.png', 'more/0.png', 'more/1.png']
    for name, image in labels.images.items():
        found = inference_detector(model, str(home.images / name)).pred_instances
        found = found[found.scores >= 0.05]
        assert len(found) == len(image.scores) > 0
        assert found.labels.tolist() == image.labels.tolist()
        np.testing.assert_allclose(image.scores, found.scores, atol=1e-4)
        np.testing.assert_allclose(image.boxes, found.bboxes.clamp(0, 64), atol=0.01)


def test_mmdetection_and_pycocotools_read_the_file(home, labelled):
    coco = COCO(str(labelled))
    assert [c['name'] for c in coco.loadCats(coco.getCatIds())] == list(CLASSES)
    assert all(a['score'] >= 0.05 and a['area'] > 0 for a in coco.loadAnns(coco.getAnnIds()))
    data = copy.deepcopy(home.cfg.train_dataloader)
    prefix = dict(img=str(home.images))
    data.dataset.update(data_root='', ann_file=str(labelled), data_prefix=prefix)
    check_annotations(data, 'train')
    dataset = DATASETS.build(data.dataset)
    labels = read_labels(labelled)
    assert len(dataset) == 6
    for i in range(6):
        sample = dataset[i]['data_samples']
        name = str(Path(sample.img_path).relative_to(home.images))
        boxes = labels.images[name].boxes
        large = ((boxes[:, 2:] - boxes[:, :2]) >= 1).all(1)  # MMDetection drops smaller ones
        assert len(sample.gt_instances) == large.sum() > 0


def test_a_one_stage_detector_and_its_own_classes(home, tmp_path):
    cfg = copy.deepcopy(home.cfg)
    cfg.model = zoo.tiny('RetinaNet')
    cfg.model.test_cfg.score_thr = 0.0
    cfg.test_dataloader.dataset.metainfo = dict(classes=('one', 'two', 'three'))
    path = weights(cfg.model, tmp_path / 'retina.pth', CLASSES)
    options = dict(checkpoint=path, workers=0, min_score=0.0)
    labels = read_labels(label_images(cfg, home.images, tmp_path / 'l.json', **options))
    # Its weights say what they were trained on.
    assert labels.classes == list(CLASSES)
    assert all(len(image.scores) for image in labels.images.values())


@pytest.mark.parametrize(
    'classes, order',
    [(dict(blue='blue', red='red'), [2, 0]), (dict(rot='red'), [0])],
)
def test_classes_are_chosen_and_renamed(home, labelled, tmp_path, classes, order):
    options = dict(checkpoint=home.checkpoint, workers=0, classes=classes)
    found = read_labels(label_images(home.cfg, home.images, tmp_path / 'l.json', **options))
    assert found.classes == list(classes)
    assert {i for each in found.images.values() for i in each.labels} == set(range(len(order)))
    for name, image in read_labels(labelled).images.items():
        rows = [[*row[:4], order.index(row[4]), row[5]] for row in image.rows if row[4] in order]
        assert found.images[name].rows == rows


def test_the_teacher_of_a_pair_labels_in_the_students_classes(home, tmp_path, labelled):
    cfg = copy.deepcopy(home.cfg)
    for split in ('train', 'val', 'test'):
        cfg[f'{split}_dataloader'].dataset.metainfo = dict(classes=('Blue', 'green'))
    student = copy.deepcopy(cfg.model)
    student.roi_head.bbox_head.num_classes = 2
    names = dict(classes=dict(names=dict(Blue='blue')))
    recipe = {**pairs.recipe(), **names}
    cfg.model = pairs.distilled(student, home.config, recipe, home.checkpoint)
    found = read_labels(label_images(cfg, home.images, tmp_path / 'l.json', workers=0))
    assert found.classes == ['Blue', 'green']
    assert {i for each in found.images.values() for i in each.labels} == {0, 1}
    for name, image in read_labels(labelled).images.items():
        rows = [[*row[:4], {2: 0, 1: 1}[row[4]], row[5]] for row in image.rows if row[4] in (1, 2)]
        assert found.images[name].rows == rows
    network = init_detector(home.config, home.checkpoint, device='cpu')
    assert found.info['teacher_sha256'] == digest(tensor_digests(network))
    assert found.info['teacher'] == 'tiny.py'


def test_a_teacher_that_is_there_already_is_the_same(home, pair):
    there = Teacher(home.config, home.checkpoint)
    assert labeller_of(pair, teacher=there).info == labeller_of(pair).info
    assert labeller_of(pair, teacher=there).network is there.network


def test_the_view_of_the_teacher(home, pair, tmp_path):
    def scale(pair, **options):
        pipeline = labeller_of(pair, **options).pipeline
        return next(t['scale'] for t in pipeline if t['type'] == 'Resize')

    own = tmp_path / 'own.py'
    text = f'_base_ = {home.config!r}\ntest_dataloader = dict(dataset=dict(pipeline=['
    text += "dict(type='LoadImageFromFile'), dict(type='Resize', scale=(128, 128))]))\n"
    own.write_text(text)
    pair.model.teacher_config = str(own)
    assert scale(pair) == (128, 128)
    # As in training, at the teacher's scale.
    assert scale(pair, pairs_own_view=True) == (64, 64)
    pair.model.distillation.resolution = dict(student=(32, 32), teacher=(96, 96))
    assert scale(pair, pairs_own_view=True) == (96, 96)
    # A teacher's config without data sees images as the pair's test does, at its own scale.
    pair.model.teacher_config = dict(model=home.cfg.model)
    pair.test_dataloader = pair.val_dataloader
    assert scale(pair) == (96, 96)


def test_no_random_number_is_drawn(home, tmp_path):
    before = [each.tolist() for each in (torch.get_rng_state(), np.random.get_state()[1])]
    label_images(home.cfg, home.images, tmp_path / 'l.json', checkpoint=home.checkpoint, workers=0)
    assert [torch.get_rng_state().tolist(), np.random.get_state()[1].tolist()] == before


def test_boxes_are_clipped_and_low_ones_left_out(home, tmp_path):
    label(home, home.images, tmp_path / 'l.json')
    for image in read_labels(tmp_path / 'l.json').images.values():
        assert len(image.rows) == 1
        assert image.boxes[0, 3] == image.height == 64


def test_boxes_that_are_no_numbers_are_refused(home, tmp_path):
    labeller = finder(home)
    step = labeller.network.test_step

    def broken(data):
        for sample in (samples := step(data)):
            sample.pred_instances.bboxes[0, 0] = float('nan')
        return samples

    labeller.network.test_step = broken
    with pytest.raises(TeacherError, match=r'one gives boxes or scores of 2\.png that are no numb'):
        label(home, home.images, tmp_path / 'l.json', labeller)


# ---------------------------------------------------------------------------- what is kept of it


def forked(work):
    """Runs ``work`` in a child process; its exit status, or minus the signal that ended it."""
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        except BaseException:
            import traceback

            traceback.print_exc()
            os._exit(1)
    return child


def status(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_a_killed_job_goes_on_and_ends_equal_to_the_bit(home, tmp_path):
    whole, cut = tmp_path / 'whole.json', tmp_path / 'cut.json'
    assert len(label(home, home.images, whole)) == 6
    killed = forked(lambda: label(home, home.images, cut, finder(home, ends_after=4)))
    assert status(killed) == -signal.SIGKILL
    assert not cut.exists()
    (part,) = tmp_path.glob('cut.json.*.parts/*.jsonl')
    part.write_bytes(part.read_bytes()[:-20])  # the last line is not whole
    seen = label(home, home.images, cut)
    # The second batch, whose last image was cut off, and the third.
    assert seen == ['4.png', '5.png', '0.png', '1.png']
    assert cut.read_bytes() == whole.read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ['cut.json', 'whole.json']


def test_a_damaged_line_is_labelled_anew(home, tmp_path):
    out = tmp_path / 'l.json'
    assert status(forked(lambda: label(home, home.images, out, finder(home, ends_after=4)))) < 0
    (part,) = tmp_path.glob('*.parts/*.jsonl')
    changed = part.read_text().replace('"2.png", 64', '"2.png", 65')
    assert changed != part.read_text()
    part.write_text(changed)
    assert set(label(home, home.images, out)) > {'2.png'}
    assert read_labels(out).images['2.png'].width == 64


def test_a_finished_file_is_taken_as_it_is(home, images, tmp_path):
    out = tmp_path / 'l.json'
    label(home, images, out)
    before = out.read_bytes(), out.stat().st_mtime_ns
    assert label(home, images, out) == []
    assert (out.read_bytes(), out.stat().st_mtime_ns) == before


def test_only_what_is_new_or_changed_is_labelled(home, images, tmp_path):
    out = tmp_path / 'l.json'
    label(home, images, out, batch_size=1)
    os.utime(images / '2.png', (1, 1))  # copied, say: the same bytes
    pixels = np.asarray(Image.open(images / '3.png'))
    Image.fromarray(255 - pixels).save(images / '3.png')
    shutil.copy(images / '4.png', images / '9.png')
    os.remove(images / '5.png')
    assert label(home, images, out, batch_size=1) == ['3.png', '9.png']
    resumed = out.read_bytes()
    out.unlink()
    label(home, images, out, batch_size=1)
    assert resumed == out.read_bytes()


@pytest.mark.parametrize('size', [True, False])
def test_an_image_of_the_same_size_in_bytes_is_seen_to_have_changed(home, images, tmp_path, size):
    out = tmp_path / 'l.json'
    label(home, images, out, batch_size=1)
    content = bytearray((images / '3.png').read_bytes())
    (images / '3.png').write_bytes(content + b'' if size else content + b'.')
    if size:  # a letter of a comment, which changes no pixel
        (images / '3.png').write_bytes(bytes(content[:-1]) + b'\x83')
    assert label(home, images, out, batch_size=1) == ['3.png']


@pytest.mark.parametrize('other', [dict(teacher='two'), dict(classes=('red', 'green', 'pink'))])
def test_labels_of_another_teacher_or_classes_are_made_anew(home, images, tmp_path, other):
    out = tmp_path / 'l.json'
    label(home, images, out)
    assert len(label(home, images, out, finder(home, **other))) == 6
    assert read_labels(f'{out}.previous').info['teacher_sha256'] == 'one'
    # Back again nothing is labelled anew, and the other's are kept.
    assert label(home, images, out) == []
    assert read_labels(out).info['teacher_sha256'] == 'one'
    assert label(home, images, out, finder(home, **other)) == []
    # Neither is begun work taken for another's, nor lost by it.
    out.unlink()
    Path(f'{out}.previous').unlink()
    assert status(forked(lambda: label(home, images, out, finder(home, ends_after=4)))) < 0
    assert len(label(home, images, out, finder(home, **other))) == 6
    assert len(label(home, images, out, finder(home))) == 2


@pytest.mark.parametrize(
    'damage',
    [
        lambda text: text[: len(text) // 2],
        lambda text: text.replace('"score": 0.', '"score": 0.0', 1),
        lambda text: '',
        lambda text: re.sub(r'"image_id": 2,', '"image_id": 77,', text),
    ],
    ids=['cut', 'a digit', 'empty', 'an unknown image'],
)
def test_a_damaged_file_is_made_anew_and_kept_aside(home, images, tmp_path, damage):
    out = tmp_path / 'l.json'
    label(home, images, out)
    good = out.read_text()
    out.write_text(damage(good))
    with pytest.raises(LabelsError, match='damaged|cannot be read'):
        read_labels(out)
    assert len(label(home, images, out)) == 6
    assert out.read_text() == good
    assert (tmp_path / 'l.json.damaged').read_text() == damage(good)


@pytest.mark.parametrize('content', ['{"images": [], "annotations": [], "categories": []}', 'mine'])
def test_a_file_of_somebody_elses_is_left_as_it_is(home, images, tmp_path, content):
    out = tmp_path / 'l.json'
    out.write_text(content)
    with pytest.raises(LabelsError, match='is no labels file of mmkd: it is left as it is'):
        label(home, images, out)
    assert out.read_text() == content
    assert [p.name for p in tmp_path.iterdir() if p.is_file()] == ['l.json']


def test_labels_of_other_images_are_not_overwritten(home, images, tmp_path):
    out = tmp_path / 'l.json'
    label(home, images, out)
    names = ['2.png', '3.png']
    part = Images(names, [str(images / name) for name in names], [1, 2])
    with pytest.raises(LabelsError, match='of 6 images, 4 of which are not among these'):
        label(home, part, out)
    assert len(read_labels(out).images) == 6


def test_labels_of_other_images_are_kept(home, images, tmp_path):
    """In a cache; a file that is made to be read loses them, and is kept as it was."""
    out = tmp_path / 'labels.json'
    label(home, images, out)
    whole = read_labels(out).images
    names = ['2.png', '3.png', '4.png', '5.png']
    some = Images(names, [str(images / n) for n in names], [1, 2, 3, 4])
    few = Images(names[:1], [str(images / names[0])], [1])
    for asked in (some, few, images):
        assert label(home, asked, out, keep_others=True) == []
        assert read_labels(out).images == whole
    (images / '6.png').write_bytes((images / '2.png').read_bytes())
    one = Images(['6.png'], [str(images / '6.png')], [7])
    assert label(home, one, out, keep_others=True) == ['6.png']
    assert set(read_labels(out).images) == {*whole, '6.png'}
    # In any order; and begun work of the others.
    backwards = Images(names[::-1], [str(images / n) for n in names[::-1]], [1, 2, 3, 4])
    made = out.stat().st_mtime_ns
    assert label(home, backwards, out, keep_others=True) == []
    assert out.stat().st_mtime_ns == made
    (images / '7.png').write_bytes((images / '3.png').read_bytes())
    two = Images(['7.png', '8.png'], [str(images / n) for n in ('7.png', 'gone.png')], [8, 9])
    with pytest.raises(LabelsError, match='1 of 2 images cannot be read'):
        label(home, two, out, keep_others=True)
    label(home, some, out)
    assert list(read_labels(out).images) == names
    assert set(read_labels(f'{out}.previous').images) == {*whole, '6.png'}


def test_begun_work_of_other_images_is_kept(home, images, tmp_path):
    """Two configs with lists of their own share a cache, and the first has not finished."""
    out = tmp_path / 'labels.json'
    names = sorted(p.name for p in images.glob('*.png'))
    first, second = (
        Images(n, [str(images / each) for each in n], list(range(1, len(n) + 1)))
        for n in (names[:3], names[3:])
    )
    cut = finder(home, ends_after=2)
    assert status(forked(lambda: label(home, first, out, cut, keep_others=True))) < 0
    assert len(label(home, second, out, keep_others=True)) == len(names) - 3
    assert len(label(home, first, out, keep_others=True)) == 1


def test_a_check_comes_before_the_first_new_label_alone(home, images, tmp_path):
    out, done = tmp_path / 'labels.json', []
    label(home, images, out, check=lambda: done.append(1))
    (images / 'empty.png').touch()
    label(home, images, out, check=lambda: done.append(2), skip_unreadable=True)
    assert done == [1]

    def refuse():
        raise TeacherError('blind')

    shutil.copy2(images / '2.png', images / '7.png')
    labeller = finder(home)
    with pytest.raises(TeacherError, match='blind'):
        label(home, images, out, labeller, check=refuse, skip_unreadable=True)
    assert labeller.network.seen == []


@pytest.mark.parametrize(
    ('shift', 'classes', 'knows', 'says'),
    [
        (0, 0, [0, 1, 2], None),
        (40, 0, [0, 1, 2], r'finds 0 % of \d+ boxes'),
        (0, 1, [0, 1, 2], r'100 %.* 0 % with the right class'),
        (0, 0, [0, -1, -1], None),  # what it does not know is not held against it
        (0, 0, [-1, -1, -1], None),
    ],
)
def test_a_detector_is_tried_on_labelled_images(home, monkeypatch, shift, classes, knows, says):
    """In its own view of them, since it labels no other."""
    data = DATASETS.build(home.cfg.test_dataloader.dataset)
    infos = [data.get_data_info(i) for i in range(len(data))]
    truth = {info['img_path']: info['instances'] for info in infos}

    class Knowing(torch.nn.Module):
        def test_step(self, data):
            for sample in data['data_samples']:
                own = truth[sample.img_path]
                boxes = torch.tensor([i['bbox'] for i in own]).reshape(-1, 4) + shift
                labels = torch.tensor([(i['bbox_label'] + classes) % 3 for i in own])
                sample.pred_instances = InstanceData(
                    bboxes=boxes, labels=labels, scores=torch.full((len(own),), 0.9)
                )
            return data['data_samples']

    monkeypatch.setattr(labeller_checks, 'BOXES', 1)
    labeller = replace(finder(home), network=Knowing(), labels=knows)
    monkeypatch.setattr(labeller_checks, 'MIN_TRAIN_RECALL', 0.9)
    with contextlib.nullcontext() if says is None else pytest.raises(TeacherError, match=says):
        require_labeller(home.cfg, labeller, infos)


def test_two_classes_may_not_be_one_of_the_teachers(home):
    cfg = copy.deepcopy(home.cfg)
    names = dict(student=['rose', *CLASSES], names=dict(rose='red'))
    cfg.model = dict(
        cfg.model, teacher_config=home.config, teacher_ckpt=home.checkpoint,
        distillation=dict(classes=names),
    )  # fmt: skip
    with pytest.raises(LabelsError, match=r"classes rose, red are all the teacher's 'red'"):
        labeller_of(cfg)


def test_two_processes_share_the_images(home, tmp_path):
    alone, shared = tmp_path / 'alone.json', tmp_path / 'shared.json'
    label(home, home.images, alone)
    port = free_port()

    def work(rank):
        os.environ.update(MASTER_ADDR='127.0.0.1', MASTER_PORT=port)
        torch.distributed.init_process_group('gloo', rank=rank, world_size=2)
        seen = label(home, home.images, shared)
        assert len(seen) == (4, 2)[rank], seen
        assert label(home, home.images, shared) == seen[:0]

    children = [forked(lambda rank=rank: work(rank)) for rank in range(2)]
    assert [status(child) for child in children] == [0, 0]
    assert shared.read_bytes() == alone.read_bytes()


def test_a_second_job_waits_and_finds_the_file(home, images, tmp_path):
    out = tmp_path / 'l.json'
    children = [forked(lambda: label(home, images, out)) for _ in range(2)]
    assert [status(child) for child in children] == [0, 0]
    assert label(home, images, out) == []
    assert sorted(p.name for p in tmp_path.iterdir()) == ['images', 'l.json']


# ------------------------------------------------------------------------------------- the images


BAD = {
    'is empty': lambda path: path.write_bytes(b''),
    'is text': lambda path: path.write_text('no image'),
    'is cut short': lambda path: path.write_bytes(path.read_bytes()[:3000]),
    'is a dead link': lambda path: (path.unlink(), path.symlink_to('gone.png')),
}


@pytest.mark.parametrize('kind', BAD)
def test_images_that_cannot_be_read_are_named_and_passed_over_if_told_so(
    home, images, tmp_path, kind
):
    out = tmp_path / 'l.json'
    BAD[kind](images / '4.png')
    labeller = finder(home)
    with pytest.raises(LabelsError, match=r'1 of 6 images cannot be read: .*4\.png \('):
        label(home, images, out, labeller, batch_size=3)
    # What shows without reading a file is said before the work.
    assert len(labeller.network.seen) == (5 if kind == 'is cut short' else 0)
    assert not out.exists()
    label(home, images, out, batch_size=3, skip_unreadable=True)
    labels = read_labels(out)
    assert len(labels.images) == 5 and labels.info['skipped'] == ['4.png']
    # Mended, it is the only one that is missing.
    shutil.copy2(home.images / '5.png', images / '4.png.new')
    os.replace(images / '4.png.new', images / '4.png')
    assert label(home, images, out, batch_size=1) == ['4.png']


def test_what_was_labelled_beside_an_unreadable_image_is_kept(home, images, tmp_path):
    out = tmp_path / 'l.json'
    BAD['is cut short'](images / 'more/1.png')
    with pytest.raises(LabelsError):
        label(home, images, out, batch_size=1)
    assert label(home, images, out, batch_size=1, skip_unreadable=True) == []
    assert len(read_labels(out).images) == 5


def test_no_readable_image(home, tmp_path):
    (tmp_path / 'images').mkdir()
    (tmp_path / 'images/a.png').write_text('')
    with pytest.raises(LabelsError, match='none of 1 images can be read: a.png'):
        label(home, tmp_path / 'images', tmp_path / 'l.json', skip_unreadable=True)


def test_images_of_a_folder_and_all_below_it(tmp_path):
    for name in ('b/2.JPG', 'b/c/1.png', 'a.webp', '.hidden/x.png', 'b/._2.jpg', 'b/notes.txt'):
        path = tmp_path / 'images' / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (tmp_path / 'elsewhere').mkdir()
    (tmp_path / 'elsewhere/9.png').touch()
    (tmp_path / 'images/linked').symlink_to(tmp_path / 'elsewhere')
    (tmp_path / 'images/b/up').symlink_to(tmp_path / 'images')
    found = find_images(tmp_path / 'images')
    assert found.names == ['a.webp', 'b/2.JPG', 'b/c/1.png', 'linked/9.png']
    assert all(map(os.path.exists, found.paths)) and found.ids == [1, 2, 3, 4]


def test_a_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    for name in ('open', 'closed', 'lost+found'):
        (tmp_path / name).mkdir()
    Image.new('RGB', (8, 8)).save(tmp_path / 'open' / 'a.png')
    scandir = os.scandir

    def closed(path):
        if str(path).endswith(('closed', 'found')):
            raise PermissionError(13, 'Permission denied', str(path))
        return scandir(path)

    monkeypatch.setattr(os, 'scandir', closed)
    with pytest.raises(LabelsError, match=r'/closed cannot be read \(Permission denied\)'):
        find_images(tmp_path)


def test_images_of_a_coco_file_without_annotations(home, tmp_path):
    names = ['5.png', 'more/0.png']
    entries = [dict(id=i, file_name=n) for i, n in zip((70, 8), names, strict=True)]
    path = tmp_path / 'test-dev.json'
    path.write_text(json.dumps(dict(images=entries)))
    with pytest.raises(LabelsError, match='none of the 2 images .*--img-prefix'):
        label(home, path, tmp_path / 'l.json')
    seen = label(home, path, tmp_path / 'l.json', prefix=home.images)
    assert seen == ['5.png', '0.png']
    written = json.loads((tmp_path / 'l.json').read_text())
    assert [(i['id'], i['file_name']) for i in written['images']] == [(70, '5.png'), (8, names[1])]
    assert {a['image_id'] for a in written['annotations']} == {70, 8}


@pytest.mark.parametrize(
    'content, says',
    [
        ({'images': []}, 'images is empty'),
        ({'pictures': []}, 'no COCO file: images is no list'),
        ({'images': [{'id': 1}]}, r'images\[0\] needs a file_name and an id'),
        ({'images': [{'id': 1, 'file_name': 'a'}, {'id': 1, 'file_name': 'b'}]}, 'id 1 twice'),
        ({'images': [{'id': 1, 'file_name': 'a'}, {'id': 2, 'file_name': 'a'}]}, "'a' twice"),
    ],
)
def test_lists_of_images_that_are_refused(tmp_path, content, says):
    (tmp_path / 'l.json').write_text(json.dumps(content))
    with pytest.raises((LabelsError, AnnotationError), match=says):
        find_images(tmp_path / 'l.json')


@pytest.mark.parametrize('name, says', [('', 'has no image in it'), ('gone', 'does not exist')])
def test_folders_that_are_refused(tmp_path, name, says):
    with pytest.raises(LabelsError, match=says):
        find_images(tmp_path / name)


# -------------------------------------------------------------------------------------- the reader


def test_the_reader_asks_for_teacher_classes_and_images(home, tmp_path):
    out = tmp_path / 'l.json'
    label(home, home.images, out)
    read_labels(out, 'one', CLASSES, ['2.png', 'more/0.png'])
    for wrong, says in (
        (dict(teacher_digest='two'), 'of another teacher: one, weights one instead of two'),
        (dict(classes=('red', 'blue', 'green')), 'the same in the same order'),
        (dict(names=['2.png', '7.png', '8.png']), r'lack 2 of the images, the first is 7\.png'),
    ):
        with pytest.raises(LabelsError, match=says):
            read_labels(out, **wrong)
    with pytest.raises(LabelsError, match='do not exist'):
        read_labels(tmp_path / 'none.json')


def test_labels_of_another_program_are_read(tmp_path):
    box = dict(id=1, image_id=5, category_id=9, bbox=[1, 2, 3, 4])
    content = dict(
        images=[dict(id=5, file_name='a.jpg', width=10, height=20)], annotations=[box],
        categories=[dict(id=9, name='late'), dict(id=2, name='early')],
    )  # fmt: skip
    (tmp_path / 'l.json').write_text(json.dumps(content))
    labels = read_labels(tmp_path / 'l.json')
    assert labels.classes == ['early', 'late']
    image = labels.images['a.jpg']
    assert image.boxes.tolist() == [[1, 2, 4, 6]] and image.labels.tolist() == [1]
    assert image.scores.tolist() == [1]


# -------------------------------------------------------------------------------------- thresholds


def searched(scores, right, objects):
    """The same by trying every threshold."""

    def f1(t):
        kept = scores >= t
        return 2 * (kept & right).sum() / (kept.sum() + objects)

    best = max(f1(t) for t in scores)
    return max(t for t in scores if f1(t) == best), best


@pytest.mark.parametrize('seed', range(20))
def test_the_best_threshold_is_that_of_a_search(seed):
    rng = np.random.default_rng(seed)
    n = int(rng.integers(1, 40))
    scores = rng.integers(1, 20, n) / 20  # with ties
    right = rng.random(n) < scores
    right[0] = True
    objects = int(right.sum() + rng.integers(0, 10))
    found = thresholds.best_threshold(scores, right, objects)
    assert found == pytest.approx(searched(scores, right, objects))


def test_no_right_detection_has_no_threshold():
    assert thresholds.best_threshold(np.array([0.5]), np.array([False]), 3) is None
    assert thresholds.best_threshold(np.zeros(0), np.zeros(0, bool), 3) is None


def matched(truth, found):
    arrays = lambda *rows: tuple(  # noqa: E731
        np.array(r, float).reshape((-1, 4) if i == 0 else -1) for i, r in enumerate(rows)
    )
    ((scores, right, objects),) = thresholds.match_detections([arrays(*truth)], [arrays(*found)], 1)
    return sorted(zip(scores.tolist(), right.tolist(), strict=True), reverse=True), objects


BOX, SHIFTED, FAR = [0, 0, 10, 10], [2, 0, 12, 10], [50, 50, 60, 60]


@pytest.mark.parametrize(
    'truth, found, result',
    [
        # The better score takes the object, though the other overlaps it more.
        (([BOX], [0], [0]), ([BOX, SHIFTED], [0, 0], [0.5, 0.9]), ([(0.9, True), (0.5, False)], 1)),
        (([BOX, FAR], [0, 0], [0, 0]), ([BOX, FAR], [0, 0], [0.5, 0.9]),
         ([(0.9, True), (0.5, True)], 2)),
        # All in a crowd is left out; the crowd is no object.
        (([BOX], [0], [1]), ([BOX, [1, 1, 4, 4], FAR], [0, 0, 0], [0.9, 0.8, 0.7]),
         ([(0.7, False)], 0)),
        (([BOX], [0], [0]), ([], [], []), ([], 1)),
        (([], [], []), ([BOX], [0], [0.3]), ([(0.3, False)], 0)),
    ],
)  # fmt: skip
def test_detections_are_matched_as_cocos_are(truth, found, result):
    assert matched(truth, found) == result


def test_a_class_without_objects_takes_the_threshold_of_all():
    sure = np.array([0.9] * 6 + [0.3]), np.array([True] * 6 + [False]), 6
    other = np.array([0.5] * 8 + [0.2] * 9), np.array([True] * 8 + [False] * 9), 8
    none = np.array([0.95]), np.array([False]), 0
    few = np.array([0.7]), np.array([True]), 2
    a, b, c, d = thresholds.thresholds_of([sure, other, none, few])
    assert (a.score, b.score, c.score, d.score) == (0.9, 0.5, 0.5, 0.5)
    assert (a.own, b.own, c.own, d.own) == (True, True, False, False)
    assert thresholds.thresholds_of([few, none]) is None  # two objects are too few


class Oracle(Finder):
    """Finds what is written in the file, right ones with high scores; in val.json alone."""

    def __init__(self, ann_file):
        super().__init__()
        self.coco = COCO(str(ann_file))

    def test_step(self, data):
        for sample in data['data_samples']:
            self.seen.append(Path(sample.img_path).name)
            ids = [i for i, v in self.coco.imgs.items() if v['file_name'] == self.seen[-1]]
            boxes = self.coco.imgToAnns[ids[0]]
            xywh = torch.tensor([b['bbox'] for b in boxes]).float()
            right = torch.cat([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], 1)
            labels = torch.tensor([b['category_id'] - 1 for b in boxes])
            sample.pred_instances = InstanceData(
                bboxes=torch.cat([right, right + 40]), labels=torch.cat([labels, labels]),
                scores=torch.cat([0.6 + 0.1 * labels, 0.2 + 0 * labels]),
            )  # fmt: skip
        return data['data_samples']


@pytest.fixture
def pair(home):
    cfg = copy.deepcopy(home.cfg)
    cfg.model = pairs.distilled(cfg.model, home.config, pairs.recipe(), home.checkpoint)
    cfg.test_dataloader = None  # is never looked at
    return cfg


def test_the_thresholds_of_the_validation_images(home, pair, tmp_path, monkeypatch):
    oracle = Oracle(home.folder / 'data/val.json')
    labeller = replace(finder(home), network=oracle)
    monkeypatch.setattr(labeller_checks, 'labeller_of', lambda *_, **__: labeller)
    monkeypatch.setattr(thresholds, 'FEWEST', 1)
    found = best_thresholds(pair, tmp_path / 'val.json', workers=0)
    counts = np.bincount([a['category_id'] - 1 for a in oracle.coco.anns.values()], minlength=3)
    assert [t.objects for t in found] == counts.tolist()
    for i, (t, count) in enumerate(zip(found, counts, strict=True)):
        assert t.score == pytest.approx(0.6 + 0.1 * i if count else t.score, abs=1e-4)
        assert t.f1 == 1 or not count
    assert all(name.startswith('val_') for name in oracle.seen) and len(oracle.seen) == 8
    # A run that is resumed has them already.
    assert best_thresholds(pair, tmp_path / 'val.json', workers=0) == found
    assert len(oracle.seen) == 8


class Blind(Finder):
    """Finds what nobody has labelled: boxes of one pixel."""

    def test_step(self, data):
        samples = super().test_step(data)
        for sample in samples:
            sample.pred_instances.bboxes = torch.tensor([[0.0, 0.0, 1.0, 1.0]] * 2)
        return samples


def test_thresholds_that_cannot_be_chosen(home, pair, monkeypatch):
    labeller = replace(finder(home), network=Blind())
    monkeypatch.setattr(labeller_checks, 'labeller_of', lambda *_, **__: labeller)
    with pytest.raises(TeacherError, match="finds none of the .* there is no threshold='auto'"):
        best_thresholds(pair, workers=0)
    monkeypatch.setattr(labeller_checks, 'FEWEST', 1000)
    with pytest.raises(LabelsError, match='too few to choose a threshold on: give a number'):
        best_thresholds(pair, workers=0)
    pair.val_dataloader = None
    with pytest.raises(LabelsError, match='needs val_dataloader'):
        best_thresholds(pair)


# ---------------------------------------------------------------------------- the page, the command


def test_the_page_shows_boxes_of_all_scores(home, tmp_path):
    out = tmp_path / 'l.json'
    label(home, home.images, out)
    found = find_images(home.images)
    labels = read_labels(out)
    odd = Labels({**labels.info, 'teacher': '<b>.py'}, ['<red>', *CLASSES[1:]], labels.images)
    page = tmp_path / 'page.html'
    write_gallery(page, odd, dict(zip(found.names, found.paths, strict=True)), 60)
    text = page.read_text()
    assert text.count('data:image/jpeg') == sum(len(i.rows) for i in labels.images.values())
    assert not re.search(r'(src|href)="(?!data:)', text) and '<script' not in text
    assert 'prefers-color-scheme:dark' in text
    assert '<b>.py' not in text and '&lt;red&gt;' in text
    for threshold in (0.05, 0.3, 0.5):
        kept = sum(int((i.scores >= threshold).sum()) for i in labels.images.values())
        assert re.search(rf'<th scope="row">{threshold:g}</th><td>{kept}</td>', text)
    write_gallery(page, odd, dict(zip(found.names, found.paths, strict=True)), 1)
    # One of each of the ten ranges of scores.
    assert page.read_text().count('data:image/jpeg') <= 10


def test_a_page_of_nothing(tmp_path):
    write_gallery(tmp_path / 'page.html', Labels({}, ['a'], {}), {}, 10)
    assert '0 images' in (tmp_path / 'page.html').read_text()


def test_the_command_writes_file_and_page(home, tmp_path, capsys):
    out, page = tmp_path / 'l.json', tmp_path / 'page'
    options = ['--out', str(out), '--workers', '0', '--gallery', str(page)]
    words = [home.config, home.checkpoint, str(home.images)]
    assert pseudo_label.main([words[0], *options, *words[1:]]) == 0
    assert len(read_labels(out).images) == 6
    assert (page / 'index.html').is_file()


@pytest.mark.parametrize(
    'options, says',
    [
        (['--score-thr', '50'], '--score-thr 50.0 must be a score from 0'),
        (['--batch-size', '0'], '--batch-size 0 must be at least 1'),
        (['--out', 'labels.pth'], 'ends in .json'),
        (['--classes', 'red', 'red'], "'red' is there twice"),
        (['--classes', '=red'], "'' is no class name"),
    ],
)
def test_options_that_are_refused(home, capsys, options, says):
    words = [home.config, home.checkpoint, home.images, '--out', 'l.json', *options]
    assert says in refusal(capsys, pseudo_label.main, *words)


def test_names_that_are_refused(home, tmp_path, capsys):
    out = tmp_path / 'l.json'
    gone = tmp_path / 'gone.pth'
    words = [home.config, gone, home.images, '--out', out]
    assert f'no such checkpoint: {gone}' in refusal(capsys, pseudo_label.main, *words)
    words = [home.config, home.images, '--out', out]
    assert 'is no pair, so it names no weights' in refusal(capsys, pseudo_label.main, *words)
    words = [home.config, home.checkpoint, home.images, '--out', str(out), '--classes', 'rde=rad']
    with pytest.raises(LabelsError, match="tiny.py has no class 'rad'; near ones: red"):
        pseudo_label.main([str(w) for w in words])
    words[-1] = 'a=red'
    with pytest.raises(LabelsError, match="'red' of tiny.py is to be 'a' and 'b'"):
        pseudo_label.main([str(w) for w in [*words, 'b=red']])


def test_a_checkpoint_of_another_config(home, tmp_path):
    path = weights(pairs.fpn(8), tmp_path / 'wide.pth')
    with pytest.raises(TeacherError, match=r'another config than teacher_config .*tiny\.py'):
        labeller_of(home.cfg, path)


@pytest.mark.parametrize('stages', [1, 2])
def test_a_detector_whose_classes_nobody_names(home, tmp_path, stages):
    cfg = copy.deepcopy(home.cfg)
    cfg.model = zoo.tiny('RetinaNet') if stages == 1 else cfg.model
    for split in ('train', 'val', 'test'):
        del cfg[f'{split}_dataloader'].dataset['metainfo']  # COCO's 80 do not fit it
    path = tmp_path / 'nameless.pth'
    torch.save(pairs.build(cfg.model).state_dict(), path)
    with pytest.raises(LabelsError, match=r'name the 3 classes: set metainfo=dict\(classes'):
        labeller_of(cfg, str(path))


@pytest.mark.parametrize('kind', ['jpg', 'png', 'bmp', 'webp', 'tif', 'ppm', 'gif'])
def test_the_first_look_at_a_picture_of_any_kind_is_silent(tmp_path, kind):
    path = tmp_path / f'a.{kind}'
    Image.new('RGB', (8, 8)).save(path)
    assert unreadable([str(path)]) == {}
    path.write_bytes(b'x' * 100)
    assert unreadable([str(path)]) == {str(path): 'it is no image'}
    # A loader of one's own may read what nobody else can.
    assert unreadable([str(path)], pictures=False) == {}


def test_progress_says_how_long_it_will_take(home, tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(pseudo_labels, 'REPORT_EVERY', 0)
    monkeypatch.setattr(pseudo_labels, '_say', said.append)
    label(home, home.images, tmp_path / 'l.json')
    assert re.fullmatch(
        r'labelled 2 of 6 images \(33 %\), [\d.]+ a second, \d+ min left', said[0]
    ), said
    assert said[2].startswith('labelled 6 of 6 images (100 %)')
    assert pseudo_labels._duration(7260) == '2 h 01 min'
