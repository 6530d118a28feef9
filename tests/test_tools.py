"""The command lines: what they write, and what they refuse in words."""

import hashlib
import importlib.util
import json
import os
import pickle
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pairs
import pytest
import torch
import warm
from mmdet.apis import init_detector
from mmdet.registry import MODELS
from mmengine.config import Config
from mmengine.hooks import Hook
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny import tiny_config

from mmkd import cli
from mmkd.analysis.comparison.plan import config_with_options
from mmkd.commands import publish as publish_model
from mmkd.commands import test, train
from mmkd.datasets.annotations import AnnotationError
from mmkd.engine import processes
from mmkd.engine.runner import DistillationRunner
from mmkd.io.checkpoint import read_checkpoint

ROOT = Path(__file__).resolve().parents[1]


def tool(name: str):
    spec = importlib.util.spec_from_file_location(f'mmkd_tool_{name}', ROOT / f'tools/{name}.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp('tools')


@pytest.fixture(scope='module')
def config(folder):
    return str(tiny_config(folder))


@pytest.fixture(scope='module')
def trained(folder, config):
    """A checkpoint after one epoch, of a run with options that it can be asked about."""
    work_dir = folder / 'trained'
    options = ['--cfg-options', 'optim_wrapper.optimizer.momentum=0.5', 'visualizer.name=trained']
    train.main([config, '--work-dir', str(work_dir), '--auto-scale-lr', *options])
    return work_dir / 'epoch_1.pth'


@pytest.fixture(scope='module')
def predictions(folder, config, trained):
    """What tools/test.py --out writes for it, and the mAP."""
    out, work_dir = folder / 'plain.pkl', folder / 'tested'
    test.main([config, str(trained), '--work-dir', str(work_dir), '--out', str(out)])
    return pickle.loads(out.read_bytes()), metrics(work_dir)


def metrics(work_dir: Path) -> dict:
    (path,) = work_dir.glob('*/*.json')
    return {k: v for k, v in json.loads(path.read_text()).items() if 'mAP' in k}


def environment(**variables: str) -> dict[str, str]:
    """The environment of a user's shell, with this very interpreter."""
    launched = ('RANK', 'LOCAL_RANK', 'WORLD_SIZE', 'MASTER_ADDR', 'MASTER_PORT')
    env = {k: v for k, v in os.environ.items() if k not in launched}
    # PyTorch looks up the name of each peer: where no name server answers, that must be short.
    resolver = {'RES_OPTIONS': 'timeout:1 attempts:1'}
    return {**env, **resolver, 'PYTHON': sys.executable, 'OMP_NUM_THREADS': '1', **variables}


def warmed() -> dict[str, str]:
    """Has the launchers' processes start with the stack imported."""
    return dict(PYTHON=warm.python(), PYTHON_EXEC=warm.python())


def free_port() -> str:
    with socket.socket() as server:
        server.bind(('127.0.0.1', 0))
        return str(server.getsockname()[1])


def start(script: str, *args: object, **variables: str) -> subprocess.Popen:
    """Starts a script; what it prints goes to a file, for a pipe that nobody reads can fill up."""
    command = [str(ROOT / 'tools' / script), *map(str, args)]
    said = tempfile.TemporaryFile('w+')  # noqa: SIM115 (closed by finish)
    process = subprocess.Popen(
        command, env=environment(**variables), stdout=said, stderr=subprocess.STDOUT
    )
    process.said = said
    return process


def finish(*processes: subprocess.Popen) -> list[str]:
    """What they printed; a process that hangs fails the test with the output of all."""
    hung = []
    for process in processes:
        try:
            process.wait(timeout=5 if hung else 600)
        except subprocess.TimeoutExpired:
            hung.append(process.args)
            process.kill()
            process.wait()
    outputs = []
    for process in processes:
        process.said.seek(0)
        outputs.append(process.said.read())
        process.said.close()
    said = '\n'.join(f'--- {p.args}\n{o}' for p, o in zip(processes, outputs, strict=True))
    assert not hung, f'{hung} did not end\n{said}'
    assert all(process.returncode == 0 for process in processes), said
    return outputs


def refusal(capsys, main, *args: object) -> str:
    """The one line that a refused call ends with."""
    with pytest.raises(SystemExit) as error:
        main([str(arg) for arg in args])
    assert isinstance(error.value.code, str)
    assert '\n' not in error.value.code
    return error.value.code


# -------------------------------------------------------------------------------- training


def test_options_reach_the_optimizer(trained):
    group = read_checkpoint(str(trained))['optimizer']['param_groups'][0]
    assert group['momentum'] == 0.5
    assert group['lr'] == pytest.approx(0.01 * 4 / 16)  # batch size over base_batch_size


def test_resume_goes_on(trained, config, tmp_path):
    work_dir = tmp_path / 'resumed'
    options = ['--cfg-options', 'train_cfg.max_epochs=2', 'visualizer.name=resumed']
    train.main([config, '--work-dir', str(work_dir), '--resume', str(trained), *options])
    assert not (work_dir / 'epoch_1.pth').exists()
    assert read_checkpoint(str(work_dir / 'epoch_2.pth'))['meta']['iter'] == 8


def test_resume_names_a_missing_checkpoint(config, tmp_path, capsys):
    line = refusal(capsys, train.main, config, '--resume', tmp_path / 'gone.pth')
    assert line == f'error: --resume {tmp_path}/gone.pth: no such checkpoint'


def test_resume_without_a_name_leaves_the_search_to_the_runner(config):
    cfg = Config.fromfile(config)
    cfg.load_from = 'pretrained.pth'
    train.apply_resume(cfg, 'auto')
    assert (cfg.resume, cfg.load_from) == (True, None)


def test_amp_needs_a_gpu(config, capsys, monkeypatch):
    monkeypatch.setattr(train, 'get_device', lambda: 'cpu')
    line = refusal(capsys, train.main, config, '--amp')
    assert 'needs a GPU' in line and '--amp' in line
    asked_in_config = ['--cfg-options', 'optim_wrapper.type=AmpOptimWrapper']
    line = refusal(capsys, train.main, config, *asked_in_config)
    assert 'needs a GPU' in line and 'remove its' not in line
    more = [*asked_in_config, 'optim_wrapper.dtype=bfloat16']
    assert 'and remove its dtype' in refusal(capsys, train.main, config, *more)


def test_amp_on_a_gpu(config, monkeypatch):
    monkeypatch.setattr(train, 'get_device', lambda: 'cuda')
    cfg = Config.fromfile(config)
    train.apply_amp(cfg, True)
    assert (cfg.optim_wrapper.type, cfg.optim_wrapper.loss_scale) == ('AmpOptimWrapper', 'dynamic')


def test_auto_scale_lr_needs_the_base_batch_size(config, tmp_path, capsys):
    path = tmp_path / 'no_base.py'
    path.write_text(f'_base_ = {config!r}\nauto_scale_lr = dict(_delete_=True, enable=False)\n')
    work_dir = tmp_path / 'work'
    line = refusal(capsys, train.main, path, '--work-dir', work_dir, '--auto-scale-lr')
    assert 'names no auto_scale_lr.base_batch_size' in line
    assert not list(tmp_path.glob('**/*.pth'))


class TellTrained(Hook):
    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        if runner.iter + 1 == 3:
            os.kill(os.getpid(), signal.SIGTERM)


def test_each_file_of_a_distilled_run_is_the_plain_students(config, tmp_path, monkeypatch):
    """Stopped, resumed, the best, the averaged: no tensor of the teacher is in any of them."""
    path, work_dir = tmp_path / 'distilled.py', tmp_path / 'work'
    path.write_text(
        f'_base_ = {config!r}\n'
        'model = dict(\n'
        "    type='mmkd.KnowledgeDistillationTwoStageDetector',\n"
        f"    teacher_config={config!r}, teacher_ckpt='random',\n"
        f'    distillation={pairs.recipe()!r})\n'
        "default_hooks = dict(checkpoint=dict(save_best='coco/bbox_mAP', interval=1))\n"
        "custom_hooks = [dict(type='EMAHook')]\n"
        'train_cfg = dict(max_epochs=2)\n'
    )
    train_on = DistillationRunner.train

    def told(runner):
        if not runner._resume:
            runner.register_hook(TellTrained())
        return train_on(runner)

    monkeypatch.setattr(DistillationRunner, 'train', told)
    call = [str(path), '--work-dir', str(work_dir)]
    with pytest.raises(SystemExit) as stopped:
        train.main([*call, '--cfg-options', 'visualizer.name=told'])
    assert stopped.value.code == 128 + signal.SIGTERM
    shutil.copy(work_dir / 'iter_3.pth', tmp_path)
    train.main([*call, '--resume', '--cfg-options', 'visualizer.name=on'])
    plain = MODELS.build(Config.fromfile(config).model)
    own = plain.state_dict()
    files = [*work_dir.glob('*.pth'), tmp_path / 'iter_3.pth']
    assert {f.name[:5] for f in files} == {'iter_', 'epoch', 'best_'}
    for file in files:
        read = torch.load(file, weights_only=True)
        averaged = read.get('ema_state_dict', {})
        for state in (read['state_dict'], averaged):
            state = {k.removeprefix('module.'): v for k, v in state.items() if k != 'steps'}
            adapters = {k for k in state if k.startswith('kd_terms.')}
            assert len(adapters) == 10 and len(state) == 10 + len(own)
            plain.load_state_dict({k: v for k, v in state.items() if k not in adapters})
        groups = read['optimizer']['param_groups'] if 'optimizer' in read else []
        slots = sum(len(group['params']) for group in groups)
        assert slots == (10 + len(list(plain.parameters())) if groups else 0)


def test_slurm_and_mpi_need_a_gpu(config, capsys, monkeypatch):
    monkeypatch.setattr(processes, 'get_device', lambda: 'cpu')
    for launcher in ('slurm', 'mpi'):
        line = refusal(capsys, train.main, config, '--launcher', launcher)
        assert line.startswith(f'error: --launcher {launcher} needs a GPU')


def test_every_config_gets_the_safe_runner(config):
    cfg = cli.load_config(train.parse_args([config]))
    assert cfg.runner_type == 'mmkd.DistillationRunner'


def test_work_dir_is_named_after_the_config(config):
    cfg = Config.fromfile(config)
    cfg.pop('work_dir')
    path = Path(config).with_name('nameless.py')
    cfg.dump(path)
    assert cli.load_config(train.parse_args([str(path)])).work_dir == 'work_dirs/nameless'


@pytest.mark.parametrize('main', [train.main, lambda argv: test.main([argv[0], __file__])])
def test_a_config_that_does_not_exist(main, tmp_path, capsys):
    path = tmp_path / 'nowhere.py'
    assert refusal(capsys, main, path) == f'error: config {path} cannot be read: no such file'


def test_a_base_config_that_does_not_exist(tmp_path, capsys):
    path = tmp_path / 'heir.py'
    path.write_text("_base_ = 'nowhere.py'\n")
    line = refusal(capsys, train.main, path)
    assert line.startswith(f'error: config {path} cannot be read: ') and 'nowhere.py' in line


def test_malformed_cfg_options(config, capsys):
    line = refusal(capsys, train.main, config, '--cfg-options', 'work_dir')
    assert line.startswith('error: --cfg-options work_dir: each must read key=value')
    line = refusal(capsys, train.main, config, '--cfg-options', 'model.neck.in_channels=[1,2')
    assert 'closed brackets' in line
    line = refusal(capsys, train.main, config, '--cfg-options', 'work_dir.name=x')
    assert line.startswith('error: --cfg-options work_dir.name does not fit')


SCALES = dict(student=(48, 48), teacher=(96, 96))


@pytest.mark.parametrize(
    ('option', 'value'),
    [
        ('resolution=dict(student=(48,48),teacher=(96,96))', SCALES),
        ('resolution=dict(student=(48, 48), teacher=(96, 96))', SCALES),
        ("resolution={'student': (48, 48), 'teacher': (96, 96)}", SCALES),
        ('resolution={student:(48,48),teacher:(96,96)}', SCALES),
        ('classes=dict(names=dict(mine=theirs))', dict(names=dict(mine='theirs'))),
        ('hint.schedule=dict(warmup=50)', dict(warmup=50)),
        ('hint.share=dict(share=-.2,iters=3)', dict(share=-0.2, iters=3)),
        ('accelerate=dict(roi_align=true,dtype=none)', dict(roi_align=True, dtype=None)),
        (
            'hint.pairs=[dict(student=neck[0],teacher=backbone.layer1),neck]',
            [dict(student='neck[0]', teacher='backbone.layer1'), 'neck'],
        ),
        ('hint.pairs=[neck,backbone[2]]', ['neck', 'backbone[2]']),
        ('hint.pairs=neck,rpn_head', ['neck', 'rpn_head']),
        ('resolution=None', 'None'),
    ],
)
def test_a_dict_on_the_command_line(option, value):
    """MMEngine's own action takes some for strings, and ends the others in a RecursionError."""
    pair = str(ROOT / 'configs/kd/faster_rcnn_r101_to_r50.py')
    option = f'model.distillation.{option}'
    expected = None if value == 'None' else value
    for cfg in (
        cli.load_config(train.parse_args([pair, '--cfg-options', option])),
        config_with_options(pair, [option]),
    ):
        found = cfg
        for key in option.partition('=')[0].split('.'):
            found = found[key]
        assert found == expected


@pytest.mark.parametrize(
    'value',
    ['dict(student=(48,48)', 'dict(48,96)', 'dict(**x)', 'dict(a=open())', '[{1:2}'],
)
def test_a_dict_on_the_command_line_that_is_none(config, capsys, value):
    option = f'model.distillation.resolution={value}'
    line = refusal(capsys, train.main, config, '--cfg-options', option)
    assert line.startswith(f'error: --cfg-options {option}: ') and 'dict as key="dict(a=1' in line


def test_an_option_for_the_recipe_that_would_change_nothing(tmp_path, capsys):
    pair = ROOT / 'configs/kd/faster_rcnn_r101_to_r50.py'
    option = 'distillation.hint.loss_weight'
    line = refusal(capsys, train.main, pair, '--cfg-options', f'{option}=0')
    assert line.endswith(f'write model.{option}')
    cfg = cli.load_config(train.parse_args([str(pair), '--cfg-options', f'model.{option}=0']))
    assert cfg.model.distillation.hint.loss_weight == 0


@pytest.mark.parametrize(
    ('option', 'says'),
    [
        ('modle.distillation.hint.loss_weight=0', 'no config has modle; near it: model'),
        ('optim_wraper.optimizer.lr=1', 'no config has optim_wraper; near it: optim_wrapper'),
        ('teacher_ckpt=x.pth', 'no config has teacher_ckpt'),
        (
            'data_root=x/',
            'data_root is a variable of the config, whose value has already been copied',
        ),
    ],
)
def test_an_option_that_nothing_reads(config, capsys, option, says):
    line = refusal(capsys, train.main, config, '--cfg-options', option)
    assert says in line


@pytest.mark.parametrize(
    'name', ['distillation = dict(hint=dict(loss_weight=0))', "teacher_ckpt = 'other.pth'"]
)
def test_what_stands_beside_the_model_in_a_config(tmp_path, capsys, name):
    pair, path = ROOT / 'configs/kd/faster_rcnn_r101_to_r50.py', tmp_path / 'child.py'
    path.write_text(f'_base_ = {str(pair)!r}\n{name}\n')
    key = name.split()[0]
    line = refusal(capsys, train.main, path)
    assert line.startswith(f'error: {path}: {key} stands beside the model')
    path.write_text(f'_base_ = {str(pair)!r}\n{name}\nmodel = dict({key}={key})\n')
    assert cli.load_config(train.parse_args([str(path)])).model[key]


def test_detections_are_not_scored_against_other_images(config, trained, folder, tmp_path):
    options = ['--cfg-options', f'test_evaluator.ann_file={folder}/data/train.json']
    with pytest.raises(AnnotationError, match=r'test_evaluator.ann_file=.*8 of 8 are not in it'):
        test.main([config, str(trained), '--work-dir', str(tmp_path), *options])


def test_tensorboard_through_vis_backends(config, tmp_path):
    path = Path(config).with_name('tensorboard.py')
    path.write_text(
        "_base_ = 'tiny.py'\n"
        "vis_backends = [dict(type='TensorboardVisBackend')]\n"
        "visualizer = dict(name='tensorboard', vis_backends=vis_backends)\n"
    )
    train.main([str(path), '--work-dir', str(tmp_path)])
    (events,) = tmp_path.glob('*/vis_data/events.out.tfevents.*')
    record = EventAccumulator(str(events))
    record.Reload()
    assert [event.step for event in record.Scalars('loss')] == [1, 2, 3, 4]


# -------------------------------------------------------------------------------- testing


def test_out_holds_every_image(predictions):
    assert sorted(entry['img_id'] for entry in predictions[0]) == list(range(8))
    assert all(len(entry['pred_instances']['bboxes']) == 10 for entry in predictions[0])


def test_out_must_be_a_pickle_or_a_file_of_torch(config, trained, capsys):
    line = refusal(capsys, test.main, config, trained, '--out', 'boxes.json')
    assert line.startswith('error: --out boxes.json') and '.pkl or .pth' in line


def test_a_missing_checkpoint(config, tmp_path, capsys):
    line = refusal(capsys, test.main, config, tmp_path / 'gone.pth')
    assert line == f'error: no such checkpoint: {tmp_path}/gone.pth'


def same_predictions(one: list[dict], two: list[dict]) -> bool:
    return len(one) == len(two) and all(
        torch.equal(a['pred_instances'][key], b['pred_instances'][key])
        for a, b in zip(one, two, strict=True)
        for key in ('bboxes', 'scores', 'labels')
    )


def test_a_distilled_student_is_tested_without_its_teacher(folder, trained, predictions, tmp_path):
    path = folder / 'distilled.py'
    path.write_text(
        "_base_ = 'tiny.py'\n"
        "model = dict(type='mmkd.KnowledgeDistillationTwoStageDetector', distillation=dict(),\n"
        "             teacher_config='lost.py', teacher_ckpt='lost.pth')\n"
    )
    out = tmp_path / 'distilled.pkl'
    test.main([str(path), str(trained), '--work-dir', str(tmp_path), '--out', str(out)])
    assert same_predictions(pickle.loads(out.read_bytes()), predictions[0])
    assert metrics(tmp_path) == predictions[1]


def test_a_checkpoint_of_another_detector(folder, trained, tmp_path, capsys):
    wider = tiny_config(folder, 'wider', channels=16)
    line = refusal(capsys, test.main, wider, trained, '--work-dir', tmp_path)
    assert line.startswith(f'error: checkpoint {trained} has other shapes for ')
    deeper = folder / 'deeper.py'
    deeper.write_text("_base_ = 'tiny.py'\nmodel = dict(backbone=dict(depth=34))\n")
    line = refusal(capsys, test.main, deeper, trained, '--work-dir', tmp_path)
    assert line.startswith(f'error: checkpoint {trained} lacks ')
    assert 'first: backbone.layer1.2.conv1.weight' in line


def test_show_dir_paints_every_image(config, trained, tmp_path):
    args = ['--work-dir', tmp_path, '--show-dir', 'painted']
    args += ['--cfg-options', 'visualizer.name=painted']
    test.main([config, str(trained), *map(str, args)])
    assert len(list(tmp_path.glob('*/painted/*.png'))) == 8


def test_tta_of_one_view_is_the_plain_test(config, trained, predictions, tmp_path):
    """One view, the image as it is, merged by an NMS that keeps all: the plain predictions."""
    path = Path(config).with_name('one_view.py')
    path.write_text(
        "_base_ = 'tiny.py'\n"
        "tta_model = dict(type='DetTTAModel',\n"
        "    tta_cfg=dict(nms=dict(type='nms', iou_threshold=1.0), max_per_img=10))\n"
        'tta_pipeline = _base_.test_pipeline[:-1] + [dict(\n'
        "    type='TestTimeAug', transforms=[[dict(type='RandomFlip', prob=0.0)], [dict(\n"
        "        type='PackDetInputs', meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape',\n"
        "            'scale_factor', 'flip', 'flip_direction'))]])]\n"
    )
    out = tmp_path / 'one_view.pkl'
    test.main([str(path), str(trained), '--tta', '--work-dir', str(tmp_path), '--out', str(out)])
    for one, two in zip(pickle.loads(out.read_bytes()), predictions[0], strict=True):
        for key in ('bboxes', 'scores', 'labels'):
            torch.testing.assert_close(one['pred_instances'][key], two['pred_instances'][key])


def test_tta_defaults_are_two_views(config):
    cfg = Config.fromfile(config)
    test.apply_tta(cfg)
    *_, last = cfg.test_dataloader.dataset.pipeline
    assert last.type == 'TestTimeAug'
    assert [view.prob for view in last.transforms[0]] == [1.0, 0.0]
    assert (cfg.model.type, cfg.model.module.type) == ('DetTTAModel', 'FasterRCNN')


# -------------------------------------------------------------------------------- publishing


@pytest.fixture
def distilled_checkpoint(trained, tmp_path):
    """The trained checkpoint with two tensors of an adaptation layer beside the student's."""
    checkpoint = read_checkpoint(str(trained))
    checkpoint['state_dict']['kd_adapters.neck_0.weight'] = torch.ones(8, 8, 1, 1)
    checkpoint['state_dict']['kd_adapters.neck_0.bias'] = torch.ones(8)
    checkpoint.pop('message_hub')
    path = tmp_path / 'distilled.pth'
    torch.save(checkpoint, path)
    return path


def test_published_student_loads_strictly_in_plain_mmdetection(
    config, trained, distilled_checkpoint, tmp_path
):
    final = publish_model.publish(str(distilled_checkpoint), str(tmp_path / 'out.pth'))
    assert final.name == f'out-{hashlib.sha256(final.read_bytes()).hexdigest()[:8]}.pth'
    published = torch.load(final, weights_only=True)
    assert set(published) == {'meta', 'state_dict'}
    assert tuple(published['meta']['dataset_meta']['classes']) == ('red', 'green', 'blue')
    assert not {'cfg', 'config'} & set(published['meta'])  # text that would be run as Python
    own = read_checkpoint(str(trained))['state_dict']
    assert set(published['state_dict']) == set(own)
    assert all(torch.equal(own[key], value) for key, value in published['state_dict'].items())
    model = MODELS.build(Config.fromfile(config).model)
    model.load_state_dict(published['state_dict'], strict=True)
    detector = init_detector(config, str(final), device='cpu')
    assert tuple(detector.dataset_meta['classes']) == ('red', 'green', 'blue')


def test_publishing_is_reproducible_and_overwrites_nothing(distilled_checkpoint, tmp_path, capsys):
    final = publish_model.publish(str(distilled_checkpoint), str(tmp_path / 'one.pth'))
    line = refusal(capsys, publish_model.main, distilled_checkpoint, tmp_path / 'one.pth')
    assert line.startswith(f'error: {final} exists and is left as it is')
    again = publish_model.publish(str(distilled_checkpoint), str(tmp_path / 'two.pth'))
    assert again.stem.removeprefix('two') == final.stem.removeprefix('one')


def test_publishing_refuses_what_is_no_checkpoint(tmp_path, capsys):
    path, out = tmp_path / 'weights.pth', tmp_path / 'out.pth'
    assert refusal(capsys, publish_model.main, path, out) == f'error: no such checkpoint: {path}'
    torch.save({'weight': torch.ones(1)}, path)
    assert "no state_dict, but ['weight']" in refusal(capsys, publish_model.main, path, out)
    path.write_bytes(b'')
    assert 'is empty' in refusal(capsys, publish_model.main, path, out)


# -------------------------------------------------------------------------------- launchers


cpu_only = pytest.mark.skipif(torch.cuda.is_available(), reason='processes on a CPU, over gloo')


@cpu_only
def test_dist_train_and_dist_test_on_two_processes(config, tmp_path):
    args = ['dist_train.sh', config, 2, '--work-dir', tmp_path]
    (output,) = finish(start(*args, PORT=free_port(), **warmed()))
    assert 'Distributed training: True' in output
    checkpoint = tmp_path / 'epoch_1.pth'
    # 16 images, two processes of 4 each: two iterations where one process makes four.
    assert read_checkpoint(str(checkpoint))['meta']['iter'] == 2

    results = [tmp_path / 'one', tmp_path / 'two']
    args = [config, checkpoint, 2, '--work-dir', results[1]]
    finish(start('dist_test.sh', *args, PORT=free_port(), **warmed()))
    test.main([config, str(checkpoint), '--work-dir', str(results[0])])
    assert metrics(results[0]) == metrics(results[1])


@cpu_only
@pytest.mark.slow
def test_two_processes_start_from_a_backbone_named_by_its_url(config, tmp_path):
    """The table at the start reads it again, and that is a collective call: no rank may miss it."""
    cfg = Config.fromfile(config)
    backbone = MODELS.build(cfg.model.backbone)
    (tmp_path / 'hub/checkpoints').mkdir(parents=True)
    torch.save(backbone.state_dict(), tmp_path / 'hub/checkpoints/backbone.pth')
    distilled = tmp_path / 'distilled.py'
    distilled.write_text(
        f"""_base_ = ['{config}', '{ROOT}/configs/_base_/chen2017.py']
model = dict(
    type='mmkd.KnowledgeDistillationTwoStageDetector',
    backbone=dict(init_cfg=dict(
        _delete_=True, type='Pretrained', checkpoint='http://127.0.0.1/backbone.pth')),
    teacher_config='{config}',
    teacher_ckpt='random',
    distillation=_base_.distillation,
)
"""
    )
    work_dir = tmp_path / 'work'
    args = ['dist_train.sh', distilled, 2, '--work-dir', work_dir]
    (output,) = finish(start(*args, PORT=free_port(), TORCH_HOME=str(tmp_path)))
    tensors = sum(v.is_floating_point() for v in backbone.state_dict().values())
    assert f'{tensors} of {tensors} tensors of backbone from http://127.0.0.1' in output
    assert read_checkpoint(str(work_dir / 'epoch_1.pth'))['meta']['iter'] == 2


@cpu_only
def test_two_launchers_make_one_run(config, tmp_path):
    shared = dict(NNODES='2', MASTER_ADDR='127.0.0.1', PORT=free_port(), **warmed())
    args = ['dist_train.sh', config, 1, '--work-dir', tmp_path]
    finish(*(start(*args, NODE_RANK=str(rank), **shared) for rank in (0, 1)))
    assert read_checkpoint(str(tmp_path / 'epoch_1.pth'))['meta']['iter'] == 2


@pytest.mark.parametrize(
    ('script', 'args', 'command'),
    [
        ('slurm_train.sh', ['gpu', 'job', 'c f.py', 'work'], ['train.py', 'c f.py', '--work-dir']),
        ('slurm_test.sh', ['gpu', 'job', 'c f.py', 'x.pth'], ['test.py', 'c f.py', 'x.pth']),
    ],
)
def test_slurm_scripts_call_srun(script, args, command, tmp_path):
    """A stand-in for srun prints what it was called with, one argument a line."""
    srun = tmp_path / 'srun'
    srun.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    srun.chmod(0o755)
    variables = dict(GPUS='16', SRUN_ARGS='--exclusive -w node1')
    variables['PATH'] = f'{tmp_path}:{os.environ["PATH"]}'
    (output,) = finish(start(script, *args, '--cfg-options', 'a=1', **variables))
    said = output.splitlines()
    assert said[:4] == ['-p', 'gpu', '--job-name=job', '--gres=gpu:8']
    assert {'--ntasks=16', '--ntasks-per-node=8', '--cpus-per-task=5'} < set(said)
    at = said.index('node1') + 1
    assert said[at - 3 : at + 2] == ['--exclusive', '-w', 'node1', sys.executable, '-u']
    assert said[at + 2 : at + 5] == [str(ROOT / 'tools' / command[0]), *command[1:]]
    assert said[-4:] == ['--launcher', 'slurm', '--cfg-options', 'a=1']


@pytest.mark.parametrize('script', ['dist_train.sh', 'dist_test.sh', 'slurm_train.sh'])
def test_scripts_say_how_they_are_called(script):
    bash = shutil.which('bash')
    result = subprocess.run(
        [bash, ROOT / 'tools' / script, 'config.py'], capture_output=True, text=True
    )
    assert result.returncode == 2
    assert result.stderr.startswith(f'usage: tools/{script} ')
