"""The embedded benchmark: same bytes from the same seed, and nothing shared between its splits."""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import warm
from mmdet.registry import MODELS
from mmengine.config import Config
from mmengine.fileio import load
from mmengine.runner import Runner
from pycocotools.coco import COCO
from sklearn.datasets import load_digits

from mmkd.analysis import comparison as compare

ROOT = Path(__file__).parents[1]
#: of the shipped teacher on the first 100 validation images (all 500: 0.485)
TEACHER_MAP = 0.479
#: of the Cascade teacher, the same images (all 500: 0.556)
CASCADE_TEACHER_MAP = 0.547
#: of the one on large images (all 250: 0.388)
LARGE_TEACHER_MAP = 0.392
SMALL = {'size': 96, 'train': 12, 'val': 5, 'test': 6, 'seed': 3}


def load_script(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / 'tools' / f'{name}.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


make_digits = load_script('make_digits')
pretrain_digits = load_script('pretrain_digits')


def contents(folder: Path) -> dict[str, bytes]:
    files = sorted(path for path in folder.rglob('*') if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.fixture(scope='module')
def small(tmp_path_factory):
    out = tmp_path_factory.mktemp('digits') / 'small'
    assert make_digits.make(out, **SMALL)
    return out


def test_same_arguments_give_the_same_bytes(small, tmp_path):
    make_digits.make(tmp_path / 'again', **SMALL)
    assert contents(tmp_path / 'again') == contents(small)


def test_another_seed_gives_other_pictures(small, tmp_path):
    make_digits.make(tmp_path / 'other', **{**SMALL, 'seed': 4})
    mine, other = contents(small), contents(tmp_path / 'other')
    assert mine.keys() == other.keys()
    assert not any(mine[name] == other[name] for name in mine)


def test_an_image_does_not_depend_on_how_many_there_are(small, tmp_path):
    make_digits.make(tmp_path / 'fewer', **{**SMALL, 'train': 4, 'val': 1})
    mine, fewer = contents(small), contents(tmp_path / 'fewer')
    names = [name for name in fewer if name.endswith('.jpg')]
    assert len(names) == 4 + 1 + 6
    assert all(mine[name] == fewer[name] for name in names)


def test_images_listed_as_unlabelled_have_no_annotations(tmp_path):
    given = {**SMALL, 'half': 'second', 'labelled': 2}
    assert make_digits.make(tmp_path / 'out', **given)
    assert not make_digits.make(tmp_path / 'out', **given)
    lists = {
        name: json.loads((tmp_path / f'out/{name}.json').read_text())
        for name in ('train', 'labelled', 'unlabelled')
    }
    whole, first, others = lists.values()
    assert first['images'] + others['images'] == whole['images'] and len(first['images']) == 2
    assert first['annotations'] == [a for a in whole['annotations'] if a['image_id'] < 2]
    assert others['annotations'] == [] and others['categories'] == whole['categories']
    other = {**given, 'half': 'first'}
    make_digits.make(tmp_path / 'other', **other)
    mine, theirs = contents(tmp_path / 'out'), contents(tmp_path / 'other')
    same = {name for name in mine if name.endswith('.jpg') and mine[name] == theirs[name]}
    assert same == {n for n in mine if n.endswith('.jpg') and not n.startswith('train/')}
    with pytest.raises(ValueError, match='--labelled 12: it must be above 0 and below --train 12'):
        make_digits.make(tmp_path / 'wrong', **{**given, 'labelled': SMALL['train']})


def test_splits_share_no_scan_and_no_column_of_a_photograph(monkeypatch, tmp_path):
    """A photograph whose pixels are their own column number shows which columns a split gets."""
    columns = np.broadcast_to(np.arange(640)[None, :, None], (427, 640, 3))
    seen = {}

    def record(folder, split, count, size, seed, scans, labels, regions, *_):
        seen[split] = (scans, labels, regions)

    monkeypatch.setattr(make_digits, 'write_split', record)
    monkeypatch.setattr(
        make_digits,
        'load_sample_images',
        lambda: type('Photos', (), {'images': [columns, columns]}),
    )
    make_digits.make(tmp_path / 'out', **SMALL)

    assert set(seen) == {'train', 'val', 'test'}
    whole, parts = seen['train'], []
    for half in make_digits.HALVES:
        make_digits.make(tmp_path / half, **SMALL, half=half)
        parts.append(seen['train'])
    for pick in (lambda p: [x.tobytes() for x in p[0]], lambda p: set(p[2][0][0, :, 0].tolist())):
        first, second, all_ = (set(pick(p)) for p in (*parts, whole))
        assert not first & second and first | second == all_
        assert abs(len(first) - len(second)) <= 10
    assert all(set(labels) == set(range(10)) for _, labels, _ in parts)
    seen['train'] = whole
    digits = load_digits()
    every = [scan.tobytes() for scans, _, _ in seen.values() for scan in scans]
    assert len(every) == len(set(every)) == 1797
    assert set(every) == {scan.tobytes() for scan in digits.images}
    label_of = {
        scan.tobytes(): label for scan, label in zip(digits.images, digits.target, strict=True)
    }
    for scans, labels, regions in seen.values():
        assert [label_of[scan.tobytes()] for scan in scans] == list(labels)
        assert set(labels) == set(range(10))
        assert len(regions) == 2
    for photo in range(2):
        taken = [
            x for _, _, regions in seen.values() for x in np.unique(regions[photo]).astype(int)
        ]
        assert sorted(taken) == list(range(640))


def test_a_background_comes_from_the_regions_it_is_given():
    """A black region gives a picture no brighter than black can become, a white one no darker."""
    for seed in range(20):
        rng = np.random.default_rng(seed)
        regions = [np.zeros((427, 200, 3), np.uint8)]
        image = make_digits.background(regions, 96, rng)
        assert image.shape == (96, 96, 3)
        assert np.ptp(image) == 0 and image.max() < 127.5
        regions = [np.full((427, 200, 3), 255, np.uint8)]
        assert make_digits.background(regions, 96, np.random.default_rng(seed)).min() > 127.5


def test_tight_box_is_the_extent_of_the_visible_pixels():
    opacity = np.zeros((20, 30), np.float32)
    opacity[4:9, 7:20] = make_digits.VISIBLE
    opacity[3, 7:20] = make_digits.VISIBLE - 0.01
    assert make_digits.tight_box(opacity) == (7, 4, 13, 5)
    assert make_digits.tight_box(np.zeros((5, 5), np.float32)) is None


def test_boxes_are_tight_round_what_was_pasted(monkeypatch):
    digits = load_digits()
    pasted = []
    paste = make_digits.paste

    def record(image, opacity, rng):
        pasted.append(opacity.copy())
        paste(image, opacity, rng)

    monkeypatch.setattr(make_digits, 'paste', record)
    photo = np.random.default_rng(0).integers(0, 256, (200, 200, 3), dtype=np.uint8)
    found = []
    for index in range(40):
        image, objects = make_digits.draw(digits.images, digits.target, [photo], 96, [0, index])
        assert image.shape == (96, 96, 3) and image.dtype == np.uint8
        found += [box for _, box in objects]
    assert len(found) == len(pasted) > 80
    for (x, y, w, h), opacity in zip(found, pasted, strict=True):
        visible = opacity >= make_digits.VISIBLE
        assert visible.sum() == visible[y : y + h, x : x + w].sum()
        for edge in (visible[y], visible[y + h - 1], visible[:, x], visible[:, x + w - 1]):
            assert edge.any()


def test_annotations_read_under_pycocotools(small):
    for split in ('train', 'val', 'test'):
        coco = COCO(str(small / f'{split}.json'))
        assert [c['name'] for c in coco.loadCats(coco.getCatIds())] == list('0123456789')
        assert len(coco.imgs) == SMALL[split]
        for info in coco.imgs.values():
            image = cv2.imread(str(small / split / info['file_name']))
            assert image.shape == (info['height'], info['width'], 3) == (96, 96, 3)
        assert len(coco.anns) >= 2 * SMALL[split]
        for annotation in coco.anns.values():
            x, y, w, h = annotation['bbox']
            assert x >= 0 and y >= 0 and x + w <= 96 and y + h <= 96
            assert min(w, h) >= make_digits.MIN_BOX // 2 and max(w, h) >= make_digits.MIN_BOX
            assert annotation['area'] == w * h and annotation['iscrowd'] == 0


def test_what_is_there_and_complete_is_left_alone(tmp_path):
    out = tmp_path / 'digits'
    assert make_digits.make(out, **SMALL)
    before = contents(out)
    stamp = (out / 'train.json').stat().st_mtime_ns
    assert not make_digits.make(out, **SMALL)
    assert (out / 'train.json').stat().st_mtime_ns == stamp

    (out / 'val' / '000002.jpg').unlink()  # no longer complete
    assert make_digits.make(out, **SMALL)
    assert contents(out) == before

    assert make_digits.make(out, **{**SMALL, 'test': 2})  # other parameters
    assert len(json.loads((out / 'test.json').read_text())['images']) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ['digits']


def test_a_strangers_folder_is_not_touched(tmp_path):
    (tmp_path / 'thesis.tex').write_text('irreplaceable')
    with pytest.raises(FileExistsError, match=r'not empty and has no made.json'):
        make_digits.make(tmp_path, **SMALL)
    assert (tmp_path / 'thesis.tex').read_text() == 'irreplaceable'


@pytest.mark.parametrize(
    ('changed', 'message'), [({'size': 32}, '--size 32'), ({'val': 0}, '--val 0')]
)
def test_arguments_out_of_range_are_refused(tmp_path, changed, message):
    with pytest.raises(ValueError, match=message):
        make_digits.make(tmp_path / 'out', **{**SMALL, **changed})
    assert not (tmp_path / 'out').exists()


def test_number_and_height_of_digits_can_be_set(tmp_path):
    given = dict(SMALL, size=192, train=6, val=1, test=1, digits=(6, 9), heights=(16.0, 24.0))
    assert make_digits.make(tmp_path / 'out', **given)
    assert not make_digits.make(tmp_path / 'out', **given)  # it knows its own
    annotations = json.loads((tmp_path / 'out/train.json').read_text())['annotations']
    assert 6 * 2 < len(annotations) <= 6 * 9
    assert max(a['bbox'][3] for a in annotations) <= 24 * 1.6  # turned and stretched
    with pytest.raises(ValueError, match='--heights 16 100'):
        make_digits.make(tmp_path / 'other', **{**given, 'heights': (16.0, 100.0)})
    with pytest.raises(ValueError, match='--digits 9 6'):
        make_digits.make(tmp_path / 'other', **{**given, 'digits': (9, 6)})


def test_student_and_teacher_differ_in_the_backbone_alone():
    plain = Config.fromfile(ROOT / 'configs/digits/plain.py').model.to_dict()
    teacher = Config.fromfile(ROOT / 'configs/digits/teacher.py').model.to_dict()
    for model in (plain, teacher):
        assert model['neck'].pop('in_channels')
    assert plain['backbone'].pop('init_cfg')['type'] == 'Pretrained'
    assert plain['backbone'].pop('base_channels') < teacher['backbone'].pop('base_channels')
    assert plain == teacher


def test_the_config_expects_what_the_script_writes(small):
    config = Config.fromfile(ROOT / 'configs/digits/plain.py')
    assert tuple(config.metainfo.classes) == make_digits.CLASSES
    assert config.model.roi_head.bbox_head.num_classes == len(make_digits.CLASSES)
    for split in ('train', 'val', 'test'):
        dataset = config[f'{split}_dataloader'].dataset
        assert (small / dataset.ann_file).is_file()
        assert (small / dataset.data_prefix.img).is_dir()


@pytest.mark.parametrize(
    ('name', 'file', 'data', 'expected'),
    [
        ('teacher', 'digits_teacher', dict(size=96), TEACHER_MAP),
        (
            'pairs/cascade_teacher',
            'digits_cascade_teacher',
            dict(size=96),
            CASCADE_TEACHER_MAP,
        ),
        (
            'large',
            'digits_large_teacher',
            dict(size=192, digits=(4, 10), heights=(14.0, 60.0)),
            LARGE_TEACHER_MAP,
        ),
    ],
)
def test_a_shipped_teacher_is_what_its_config_says(tmp_path, name, file, data, expected):
    """Every tensor fits, and it scores what it was measured at (100 validation images)."""
    path = ROOT / 'checkpoints' / f'{file}.pth'
    assert path.stat().st_size < 8 * 2**20
    checkpoint = torch.load(path, map_location='cpu', weights_only=True)
    assert checkpoint['meta']['dataset_meta']['classes'] == make_digits.CLASSES

    make_digits.make(tmp_path / 'data', train=1, val=100, test=1, seed=0, **data)
    config = Config.fromfile(ROOT / f'configs/digits/{name}.py')
    config.work_dir = str(tmp_path / 'work')
    config.test_dataloader = config.val_dataloader
    config.test_dataloader.dataset.data_root = str(tmp_path / 'data') + '/'
    config.test_evaluator = config.val_evaluator
    config.test_evaluator.ann_file = str(tmp_path / 'data' / 'val.json')
    runner = Runner.from_cfg(config)
    runner.model.load_state_dict(checkpoint['state_dict'], strict=True)
    metrics = runner.test()
    assert metrics['coco/bbox_mAP'] == pytest.approx(expected, abs=0.01)


@pytest.mark.slow
def test_the_ten_class_teacher_is_tested_among_four_classes(monkeypatch, small, tmp_path):
    """`tools/test.py` of the row that `tools/compare.py` plans for it."""
    monkeypatch.chdir(ROOT)
    plan = compare.plan_runs(['configs/digits/pairs/four_classes.py'], [0])
    run = next(row for row in plan.rows if row.role == 'teacher').runs[0]
    run.test_cfg.test_dataloader.dataset.data_root = str(small) + '/'
    run.test_cfg.test_evaluator.ann_file = str(small / 'test.json')
    run.test_cfg.dump(tmp_path / 'config.py')
    command = ['tools/test.py', tmp_path / 'config.py', run.checkpoint, '--work-dir', tmp_path]
    subprocess.run(
        [warm.python(), *command, '--out', tmp_path / 'found.pkl'],
        check=True, capture_output=True,
    )  # fmt: skip
    found = load(tmp_path / 'found.pkl')
    labels = torch.cat([sample['pred_instances']['labels'] for sample in found])
    assert set(labels.tolist()) == {0, 1, 2, 3}


@pytest.mark.slow
def test_the_accelerated_teacher_is_checked_and_trains(monkeypatch, tmp_path):
    """The check of the teacher sees it as its file has it."""
    monkeypatch.chdir(ROOT)
    data = tmp_path / 'data'
    make_digits.make(data, size=96, train=40, val=4, test=1, seed=0)
    command = [
        'tools/train.py', 'configs/digits/accelerated.py', '--work-dir', tmp_path / 'work',
        '--cfg-options', f'train_dataloader.dataset.data_root={data}/',
        f'val_dataloader.dataset.data_root={data}/', f'val_evaluator.ann_file={data}/val.json',
        'train_cfg.max_epochs=1', 'train_cfg.val_interval=1',
    ]  # fmt: skip
    done = subprocess.run([sys.executable, *command], check=True, capture_output=True, text=True)
    found = re.search(r'teacher check: the teacher finds (\d+) % of (\d+) boxes', done.stdout)
    assert int(found[1]) > 60


def test_the_large_data_set_is_the_one_the_makefile_makes():
    """The options of the test above are those of `make demo-resolution`."""
    line = next(x for x in (ROOT / 'Makefile').read_text().splitlines() if x.startswith('LARGE'))
    assert '--size 192' in line
    assert '--digits 4 10 --heights 14 60' in line


def test_the_shipped_backbone_is_what_its_config_says():
    """It fills the student's backbone completely, and is small."""
    model = Config.fromfile(ROOT / 'configs/digits/plain.py').model
    path = Path(model.backbone.init_cfg.checkpoint)
    assert path.stat().st_size < 2**20
    state = torch.load(path, map_location='cpu', weights_only=True)['state_dict']
    student = MODELS.build(model)
    student.init_weights()
    own = student.backbone.state_dict()
    assert own.keys() == state.keys()
    assert all(torch.equal(own[key], state[key]) for key in own)


def test_pretraining_learns_and_repeats_to_the_bit(small, tmp_path, capfd):
    states = []
    for name, named in (('a', []), ('b', ['--ann-file', 'train.json'])):
        config = Config.fromfile(ROOT / 'configs/digits/plain.py')
        for split in ('train', 'val'):
            config[f'{split}_dataloader'].dataset.data_root = str(small) + '/'
        if named:
            config.train_dataloader.dataset.ann_file = 'nowhere.json'
        config.dump(tmp_path / 'config.py')
        out = tmp_path / f'{name}.pth'
        args = ['--config', str(tmp_path / 'config.py'), '--out', str(out)]
        pretrain_digits.main([*args, *named, '--epochs', '40', '--batch-size', '8'])
        states.append(torch.load(out, weights_only=True)['state_dict'])
    said = capfd.readouterr().out
    losses = [float(line.split('loss ')[1].split(',')[0]) for line in said.splitlines()[:40]]
    assert losses[39] < losses[0] - 0.3
    assert all(torch.equal(a, b) for a, b in zip(*(s.values() for s in states), strict=True))
