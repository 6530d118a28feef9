"""tools/check_pair.py: GO for what trains, and each planted mistake caught with its sentence."""

import copy
import importlib.util
import json
import re

import numpy as np
import pairs
import pytest
import torch
from mmdet.models import DetDataPreprocessor
from mmdet.structures import DetDataSample
from mmengine.config import Config
from mmengine.structures import InstanceData
from pairs import ROOT, recipe
from tiny import CLASSES, tiny_config

from mmkd import cli
from mmkd.analysis import pair_check
from mmkd.analysis.pair_check import Report, _other_preprocessings, check_pair, match_batches

PAIR = """\
_base_ = {base!r}
model = dict(
    type='mmkd.KnowledgeDistillationTwoStageDetector',
    teacher_config={teacher!r}, teacher_ckpt={checkpoint!r}, distillation={distillation!r})
runner_type = 'mmkd.DistillationRunner'
"""
SHIPPED = ROOT / 'checkpoints/digits_teacher.pth'


def tool(name):
    spec = importlib.util.spec_from_file_location(f'mmkd_tool_{name}', ROOT / f'tools/{name}.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """A plain student, a teacher of twice its width, and the teacher's checkpoint."""
    folder = tmp_path_factory.mktemp('check')
    tiny_config(folder, 'student')
    teacher = Config.fromfile(tiny_config(folder, 'teacher', base_channels=8))
    torch.save(dict(state_dict=pairs.build(teacher.model).state_dict()), folder / 'teacher.pth')
    return folder


def pair(folder, distillation=None, checkpoint=None, teacher='teacher.py', name='pair'):
    path = folder / f'{name}.py'
    path.write_text(
        PAIR.format(
            base=str(folder / 'student.py'),
            teacher=str(folder / teacher),
            checkpoint=checkpoint or str(folder / 'teacher.pth'),
            distillation=distillation or recipe(),
        )
    )
    return Config.fromfile(path)


def check(cfg, **kwargs):
    return check_pair(cfg, **{'size': (64, 64), 'processes': 1, **kwargs})


def test_a_pair_that_trains_is_a_go(folder, capsys):
    report = check(pair(folder), processes=2)
    assert report.go, report.against
    said = capsys.readouterr().out
    for text in ('what is trained', 'GFLOPs at 64x64', 'the student alone', 'loss_kd_hint',
                 'of these the teacher: backbone and neck', '2 processes (DDP, gloo): steps',
                 'peak memory', 'an epoch: 16 images, 4 steps'):  # fmt: skip
        assert text in said, text


def test_an_epoch_with_images_without_labels(folder, capsys):
    images = folder / 'data' / 'images'
    for share, said in ((0.25, '16 images, 5 steps on one device, beside 24 without labels'),
                        (1.0, '24 images, 6 steps on one device\n')):  # fmt: skip
        cfg = pair(folder, {**recipe(), 'unlabelled': dict(images=str(images), share=share)})
        report = Report()
        pair_check._epoch(cfg, report)
        assert f'an epoch: {said}' in capsys.readouterr().out and report.go
    cfg.model.distillation.unlabelled.share = 0.1
    pair_check._epoch(cfg, report)
    assert 'leaves no unlabelled image in a batch' in report.against[0]


def multiply_adds(network, size):
    """Of convolutions and linear layers, in one image."""
    done = []

    def heard(module, args, output):
        each = module.weight[0].numel()  # for one output
        done.append(output.numel() * each)

    for module in network.modules():
        if isinstance(module, (torch.nn.Conv2d, torch.nn.Linear)):
            module.register_forward_hook(heard)
    sample = DetDataSample(
        metainfo=dict(img_shape=size, ori_shape=size, scale_factor=(1, 1), batch_input_shape=size)
    )
    with torch.no_grad():
        network.eval()(torch.zeros(1, 3, *size), [sample], mode='predict')
    return sum(done)


def test_parameters_and_flops_are_those_of_each_network(folder, capsys):
    size = (512, 512)
    check(pair(folder), size=size)
    lines = capsys.readouterr().out.splitlines()
    for name in ('teacher', 'student'):
        network = pairs.build(Config.fromfile(folder / f'{name}.py').model)
        (line,) = [x for x in lines if x.startswith(f'| {name} ') and x.count('|') == 4]
        millions, gflops = (float(cell) for cell in line.split('|')[2:4])
        count = sum(p.numel() for p in network.parameters())
        assert (millions, gflops) == pytest.approx(
            (count / 1e6, multiply_adds(network, size) / 1e9), abs=0.0051
        )


def test_shares_are_those_of_the_gradients(folder, capsys):
    """Twice the weight, twice the share."""
    shares = []
    for weight in (0.5, 1.0):
        check(pair(folder, recipe('hint', hint=dict(loss_weight=weight))))
        lines = capsys.readouterr().out.splitlines()
        (line,) = [x for x in lines if x.startswith('| loss_kd_hint') and x.count('|') == 8]
        shares.append(float(line.split('|')[4]))
    assert shares[1] == pytest.approx(2 * shares[0], rel=0.02)


def test_the_weight_for_a_wanted_share_gives_it(folder, tmp_path):
    """For every term, of the paper or not, by the command that a user would type."""
    terms = {**recipe(), 'more': dict(type='DKD', loss_weight=0.3)}
    path = pair(folder, terms).filename
    call = [str(path), '--size', '64', '64', '--processes', '1', '--json', str(tmp_path / 'x.json')]

    def losses(*more):
        assert tool('check_pair').main([*call, *more]) == 0
        found = json.loads((tmp_path / 'x.json').read_text())['losses']
        return {each['key']: each for each in found if 'key' in each}

    first = losses('--share', '0.05')
    assert len(first) == 6 and all(each['wanted_share'] == 0.05 for each in first.values())
    options = [f'{key}={each["weight_for_it"]!r}' for key, each in first.items()]
    for each in losses('--cfg-options', *options).values():
        assert each['share'] == pytest.approx(0.05, rel=1e-3)


def test_a_share_that_cannot_be_is_refused(folder):
    with pytest.raises(SystemExit, match='--share -1: it must be above 0'):
        tool('check_pair').main([str(pair(folder).filename), '--share', '-1'])


def test_a_term_out_of_proportion_is_warned_about(folder):
    report = check(pair(folder, recipe(hint=dict(loss_weight=1e6))))
    assert report.go
    (text,) = [w for w in report.warnings if 'dwarfs' in w]
    assert text.startswith('loss_kd_hint dwarfs the hard loss: its gradient is ')
    weight = float(text.rpartition('loss_weight=')[2])
    assert not any('hint' in w for w in check(
        pair(folder, recipe(hint=dict(loss_weight=weight)))).warnings)  # fmt: skip
    report = check(pair(folder, recipe(hint=dict(loss_weight=1e-9))))
    assert any(w.startswith('loss_kd_hint vanishes') for w in report.warnings)


def changed_teacher(folder, name, change):
    path = folder / f'{name}.py'
    text = (folder / 'teacher.py').read_text()
    assert change[0] in text
    path.write_text(text.replace(*change))
    return path.name


def half_a_checkpoint(folder):
    state = torch.load(folder / 'teacher.pth')['state_dict']
    torch.save(dict(list(state.items())[:20]), folder / 'half.pth')
    return dict(checkpoint=str(folder / 'half.pth'))


def of_another_width(folder):
    return dict(teacher=changed_teacher(folder, 'wider', ('base_channels=8', 'base_channels=16')))


def not_finite(folder):
    state = torch.load(folder / 'teacher.pth')['state_dict']
    state['backbone.conv1.weight'] = state['backbone.conv1.weight'] * float('nan')
    torch.save(dict(state_dict=state), folder / 'nan.pth')
    return dict(checkpoint=str(folder / 'nan.pth'))


def other_classes(folder):
    change = (repr(CLASSES), repr(('a', 'b', 'c')))
    return dict(teacher=changed_teacher(folder, 'others', change))


def off(folder):
    distillation = recipe()
    for term in pairs.TERMS:
        distillation[term]['loss_weight'] = 0
    return dict(distillation=distillation)


def hint(**changes):
    return lambda folder: dict(distillation=recipe('hint', hint=changes))


PLANTED = {
    'half a checkpoint': (half_a_checkpoint, 'lacks .* keys'),
    'a checkpoint of another width': (of_another_width, 'in another shape .*another config'),
    'a checkpoint that is not there': (lambda f: dict(checkpoint='/none.pth'), '/none.pth'),
    'a teacher that gives NaN': (not_finite, 'NaN or infinite, first in backbone.conv1.weight'),
    'other classes': (other_classes, 'have no class in common'),
    'a teacher config that is not there': (lambda f: dict(teacher='none.py'), 'cannot be read'),
    'every weight 0': (off, 'every distillation term has weight 0'),
    'a path that does not exist': (
        hint(pairs=['nek']), "the student has no such submodule; near ones: neck"),
    'an output that does not exist': (hint(pairs=['neck[9]']), 'neck has 5 outputs'),
    'no pairs': (hint(pairs=[]), 'pairs is empty'),
    'an adapter that does not fit': (
        hint(pairs=[dict(student='neck', teacher='neck', adapter='linear')]), 'cannot lead'),
    'a misspelt term': (
        lambda f: dict(distillation=dict(recipe(), hints={})), "no entry 'hints'; did you mean"),
    'a misspelt loss': (
        hint(type='HintL3Loss'),
        "type='HintL3Loss' is registered neither as a term nor as a loss; near ones: HintL2Loss",
    ),
    'a negative weight': (hint(loss_weight=-1), 'loss_weight=-1 must be a finite number'),
    'a misspelt option': (
        lambda f: dict(distillation=recipe('rcnn_cls', rcnn_cls=dict(temprature=2))), 'temprature'),
    'μ above 1': (
        lambda f: dict(distillation=recipe('rcnn_cls', rcnn_cls=dict(hard_weight=1.5))),
        'hard_weight=1.5 must be a finite number between'),
    'a start that is none': (
        lambda f: dict(distillation=recipe(start='student')), "start='student' must be"),
    'a scale for one network': (
        lambda f: dict(distillation=dict(recipe(), resolution=dict(teacher=(128, 128)))),
        'no scale for the student'),
    'a schedule that ends before it begins': (
        hint(schedule=dict(begin=5, end=3)), 'end must come after begin'),
}  # fmt: skip


@pytest.mark.parametrize('name', PLANTED)
def test_a_planted_mistake_is_a_no_go(folder, name):
    plant, message = PLANTED[name]
    report = check(pair(folder, **plant(folder)))
    assert not report.go
    assert len(report.against) == 1
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(report.against[0])


def test_a_plain_config_is_no_pair(folder):
    report = check(Config.fromfile(folder / 'student.py'))
    assert 'no teacher_config' in report.against[0]


def test_weights_that_are_elsewhere_are_said(folder):
    report = check(pair(folder, checkpoint='https://example.com/none-12345678.pth'))
    assert report.go
    assert any('is not on this machine' in w for w in report.warnings)


def test_a_backbone_of_a_zoo_is_left_out_only_where_it_has_not_been_downloaded(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path))
    init = dict(type='Pretrained', checkpoint='torchvision://resnet50')
    model = dict(backbone=dict(init_cfg=init), teacher_config=dict(init_cfg=init))
    assert pair_check.without_downloads(model)
    assert model == dict(backbone=dict(init_cfg=None), teacher_config=dict(init_cfg=init))
    (tmp_path / 'checkpoints').mkdir()
    (tmp_path / 'checkpoints/resnet50-0676ba61.pth').touch()
    model = dict(backbone=dict(init_cfg=init))
    assert not pair_check.without_downloads(model) and model['backbone']['init_cfg'] == init


# ----------------------------------------------------------------------- the teacher on data


@pytest.fixture(scope='module')
def digits(tmp_path_factory):
    """The shipped pair on 40 images of its validation data."""
    root = tmp_path_factory.mktemp('digits')
    tool('make_digits').make(root / 'data', size=96, train=2, val=40, test=1, seed=0)
    cfg = Config.fromfile(ROOT / 'configs/digits/mmkd.py')
    for loader in (cfg.train_dataloader, cfg.val_dataloader):
        loader.dataset.data_root = str(root / 'data') + '/'
    cfg.val_evaluator.ann_file = str(root / 'data/val.json')
    return cfg


def on_data(cfg, images=40, **changes):
    cfg = copy.deepcopy(cfg)
    teacher = Config.fromfile(ROOT / 'configs/digits/teacher.py')
    teacher.merge_from_dict({k.replace('__', '.'): v for k, v in changes.items()})
    cfg.model.teacher_config = teacher.to_dict()
    return check(cfg, size=(96, 96), data=images)


def test_names_in_another_order_than_the_files_are_a_no_go(digits):
    """MMDetection numbers classes as the file does, so every name would mean another digit."""
    cfg = copy.deepcopy(digits)
    order = list(reversed(cfg.train_dataloader.dataset.metainfo.classes))
    cfg.train_dataloader.dataset.metainfo.classes = order
    report = check(cfg, size=(96, 96))
    assert any('in the order of the file. Write classes=' in text for text in report.against)


def test_a_teacher_that_sees_is_a_go(digits, capsys):
    report = on_data(digits)
    assert report.go, report.against
    (line,) = [x for x in capsys.readouterr().out.splitlines() if x.startswith('the teacher on')]
    assert '40 images' in line
    assert int(line.split('finds ')[1].split(' %')[0]) > 80


def test_other_pixels_than_it_was_trained_on_are_found(digits):
    report = on_data(
        digits,
        model__data_preprocessor__mean=[0.0, 0.0, 0.0],
        model__data_preprocessor__std=[1.0, 1.0, 1.0],
    )
    with pytest.raises(AssertionError, match='not the one that it was trained with'):
        raise AssertionError(report.against)


@pytest.mark.slow
def test_the_channel_order_that_costs_little_is_found_on_more_images(digits, tmp_path):
    tool('make_digits').make(tmp_path / 'data', size=96, train=1, val=300, test=1, seed=5)
    cfg = copy.deepcopy(digits)
    cfg.val_dataloader.dataset.data_root = f'{tmp_path}/data/'
    cfg.val_evaluator.ann_file = f'{tmp_path}/data/val.json'
    report = on_data(cfg, images=300, model__data_preprocessor__bgr_to_rgb=False)
    with pytest.raises(AssertionError, match='with the other channel order'):
        raise AssertionError(report.against)


class Blind:
    """Sees the boxes in one channel order alone."""

    def __init__(self):
        self.data_preprocessor = DetDataPreprocessor([0.0] * 3, [1.0] * 3, bgr_to_rgb=True)

    def test_step(self, batch):
        for sample in batch['data_samples']:
            seen = len(sample.gt_instances) if not self.data_preprocessor._channel_conversion else 0
            sample.pred_instances = InstanceData(
                bboxes=sample.gt_instances.bboxes[:seen],
                labels=sample.gt_instances.labels[:seen],
                scores=torch.ones(seen),
            )
        return batch['data_samples']


def test_the_other_channel_order_is_named():
    network = Blind()
    batches = [pairs.batch((3, 2), seed=seed) for seed in range(10)]
    seen = match_batches(network, batches)
    assert sum(map(len, seen)) == 50
    assert torch.cat(seen)[:, :3].eq(0).all()
    chance, said = _other_preprocessings(network, batches, None, seen)
    assert chance < 1e-4
    assert '0 % of the boxes as its config prepares pixels (score times IoU 0.000)' in said
    assert '100 % (1.000) with the other channel order' in said
    assert network.data_preprocessor._channel_conversion


def test_few_images_accuse_no_pixels():
    network = Blind()
    batches = [pairs.batch((3, 2))]
    chance, _ = _other_preprocessings(network, batches, None, match_batches(network, batches))
    assert chance > 0.1


def test_another_order_of_classes_is_found(digits, tmp_path):
    checkpoint = torch.load(SHIPPED, weights_only=True)
    order = np.roll(np.arange(10), 3).tolist()
    state = checkpoint['state_dict']
    for name, each in (('fc_cls', 1), ('fc_reg', 4)):
        for part in ('weight', 'bias'):
            tensor = state[f'roi_head.bbox_head.{name}.{part}']
            rows = [each * i + j for i in order for j in range(each)]
            tensor[: 10 * each] = tensor[rows]
    torch.save(checkpoint, tmp_path / 'rolled.pth')
    cfg = copy.deepcopy(digits)
    cfg.model.teacher_ckpt = str(tmp_path / 'rolled.pth')
    report = on_data(cfg)
    assert 'if its classes stood in another order' in report.against[0]


def test_a_teacher_that_finds_nothing_is_a_no_go(digits, tmp_path):
    teacher = Config.fromfile(ROOT / 'configs/digits/teacher.py')
    torch.save(pairs.build(teacher.model).state_dict(), tmp_path / 'untrained.pth')
    cfg = copy.deepcopy(digits)
    cfg.model.teacher_ckpt = str(tmp_path / 'untrained.pth')
    report = on_data(cfg)
    assert 'usually means a wrong checkpoint' in report.against[0]


# ------------------------------------------------------------------------- advice and numbers


def test_advice_is_typed_as_it_stands(folder):
    report = check(pair(folder, recipe(hint=dict(loss_weight=1e6))))
    (text,) = [w for w in report.warnings if 'dwarfs' in w]
    assert '(on an invented picture)' in text
    advice = text.partition('Try ')[2].split()
    config = str(folder / 'pair.py')
    again = check(cli.load_config(tool('check_pair').parse_args([config, *advice])))
    assert not [w for w in again.warnings if 'hint' in w]


def test_with_data_the_step_is_made_with_images_of_ones_own(folder, capsys):
    cfg = pair(folder)
    check(cfg, size=(96, 128))
    assert 'AN INVENTED PICTURE at 128x96' in capsys.readouterr().out
    seen = check(cfg, size=(96, 128), data=4)
    said = capsys.readouterr().out
    assert 'two training images, at 64x64' in said and 'INVENTED' not in said
    assert seen.found['picture'] == dict(kind='training images', width=64, height=64)
    assert seen.found['networks']['student']['width'] == 64
    cfg.train_dataloader.dataset.ann_file = 'gone.json'
    report = check(cfg, size=(96, 128), data=4)
    assert len(report.against) == 1
    assert re.match('train annotations .*gone.json do not exist', report.against[0])
    cfg.train_dataloader.dataset.update(ann_file='train.json', pipeline=[dict(type='Gone')])
    report = check(cfg, size=(96, 128), data=4)
    assert report.against[0].startswith('--data: the training data cannot be loaded (KeyError: ')


def test_with_data_the_files_are_those_that_a_training_takes(folder):
    cfg = pair(folder)
    for split in ('train', 'val'):
        spoilt = copy.deepcopy(cfg)
        spoilt[f'{split}_dataloader'].dataset.metainfo = dict(classes=('rad', *CLASSES[1:]))
        (said,) = check(spoilt, size=(64, 64), data=4).against
        assert said.startswith(f'{split} annotations ') and "has no 'rad'" in said
    cfg.test_dataloader.dataset.ann_file = 'gone.json'
    report = check(cfg, size=(64, 64), data=4)
    assert not any('annotations' in fault for fault in report.against)
    assert any(warning.startswith('test annotations ') for warning in report.warnings)


@pytest.mark.parametrize('good', [True, False])
def test_json_has_everything(folder, tmp_path, capsys, good):
    path = tmp_path / 'found.json'
    pair(folder)
    call = [str(folder / 'pair.py'), '--size', '64', '64', '--processes', '1']
    call += [] if good else ['--cfg-options', 'model.distillation.start=nobody']
    assert tool('check_pair').main([*call, '--json', str(path)]) == (0 if good else 1)
    found = json.loads(path.read_text())
    assert found['go'] == good and bool(found['against']) != good
    if good:
        losses = {each['loss']: each for each in found['losses']}
        assert losses['loss_kd_hint']['key'] == 'model.distillation.hint.loss_weight'
        assert losses['loss_kd_hint']['share'] > 0 and found['epoch'] == dict(images=16, steps=4)
        assert found['networks']['teacher']['parameters'] > 0
    capsys.readouterr()
    tool('check_pair').main([*call, '--json'])
    out, err = capsys.readouterr()
    assert json.loads(out)['go'] == good and ('GO\n' if good else 'NO-GO\n') in err


def test_json_does_not_take_the_config_for_its_file(folder):
    pair(folder)
    config = folder / 'pair.py'
    with pytest.raises(SystemExit, match=r'--json .*pair.py: the name must end in .json'):
        tool('check_pair').main(['x.py', '--json', str(config)])
    assert 'teacher_ckpt' in config.read_text()


# ------------------------------------------------------------------------------- command lines


def test_the_exit_code_is_the_verdict(folder, capsys):
    main = tool('check_pair').main
    pair(folder, name='good')
    options = ['--size', '64', '64', '--processes', '1']
    assert main([str(folder / 'good.py'), *options]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == 'GO'
    options += ['--cfg-options', 'model.distillation.start=nobody']
    assert main([str(folder / 'good.py'), *options]) == 1
    assert capsys.readouterr().out.splitlines()[-1] == 'NO-GO'


def test_a_new_pair_is_ten_lines_and_a_go(folder, capsys):
    out = folder / 'new.py'
    new_pair = tool('new_pair').main
    args = ['--student', str(folder / 'student.py'), '--out', str(out)]
    new_pair([*args, '--teacher', str(folder / 'teacher.py'),
              '--teacher-ckpt', str(folder / 'teacher.pth')])  # fmt: skip
    assert len(out.read_text().splitlines()) <= 10
    assert check(Config.fromfile(out)).go
    with pytest.raises(SystemExit, match='exists already'):
        new_pair([*args, '--teacher', 'x'])


def test_a_new_pair_of_the_zoo_knows_its_checkpoint(tmp_path, capsys):
    new_pair = tool('new_pair').main
    zoo = 'mmdet::faster_rcnn/faster-rcnn_r{}_fpn_1x_coco.py'
    new_pair(['--student', zoo.format(50), '--teacher', zoo.format(101),
              '--out', str(tmp_path / 'zoo.py')])  # fmt: skip
    cfg = Config.fromfile(tmp_path / 'zoo.py')
    shipped = Config.fromfile(ROOT / 'configs/kd/faster_rcnn_r101_to_r50.py')
    assert cfg.model == shipped.model


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'--teacher': 'none.py'}, '--teacher none.py'),
        ({'--teacher-ckpt': 'none.pth'}, 'none.pth: no such file'),
        ({'--teacher-ckpt': None}, '--teacher-ckpt is missing'),
        ({'--out': '/nowhere/at/all.py'}, 'there is no folder'),
    ],
)
def test_a_new_pair_that_cannot_be_is_refused(folder, tmp_path, changes, message):
    given = {'--student': str(folder / 'student.py'), '--teacher': str(folder / 'teacher.py'),
             '--teacher-ckpt': str(folder / 'teacher.pth'), '--out': str(tmp_path / 'p.py'),
             **changes}  # fmt: skip
    args = [str(part) for key, value in given.items() if value for part in (key, value)]
    with pytest.raises(SystemExit, match=message):
        tool('new_pair').main(args)
