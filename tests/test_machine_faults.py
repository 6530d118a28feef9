"""What fails while a run goes on ends it in a bounded time, in a sentence, and nothing is lost."""

import errno
import io
import multiprocessing
import os
import re
import signal
import socket
import subprocess
import time
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
import warm
from mmcv.transforms import LoadImageFromFile
from mmdet.registry import DATASETS
from mmengine.config import Config
from mmengine.dist import get_rank
from mmengine.hooks import Hook
from mmengine.registry import HOOKS, RUNNERS
from test_tools import tool
from tiny import tiny_config

from mmkd.datasets.intact_images import ImageError, cut_short, require_intact_images
from mmkd.engine import processes
from mmkd.engine.processes import lost_process
from mmkd.engine.work_dir import locked, reporting_full_disk

ROOT = Path(__file__).resolve().parents[1]
LIMIT = 600  # seconds for a run of a few seconds, on a busy machine
train = tool('train')


def _cut(path):
    path.write_bytes(path.read_bytes()[:-20])


def _kill_worker(path):
    os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)


def _kill_second(path):
    if get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)


Fault = namedtuple(
    'Fault', 'name plant sentence workers persistent processes', defaults=(0, False, 1)
)
FAULTS = [
    Fault('an image vanishes', Path.unlink,
          r'image {image} cannot be read \(No such file.*copy it again, or take it out', 2, True),
    Fault('a JPEG is cut short', _cut,
          r'image {image} is cut short: none of its \d+ bytes is the end of a JPEG.*take it out'),
    Fault('an image is text', lambda path: path.write_text('no picture'),
          r"image {image} is no image that cv2 can decode \(10 bytes, beginning with b'no pic", 2),
    Fault('a worker is killed', _kill_worker,
          r'data-loader worker \(process \d+\) is killed by signal: Killed.*fewer num_workers', 2),
    Fault('the second process is killed', _kill_second,
          r'process 0 of 2 lost another one of the job .*failed first', processes=2),
]  # fmt: skip


@HOOKS.register_module(force=True)
class PlantHook(Hook):
    """Plants a fault in the second epoch, or none."""

    def __init__(self, fault, image):
        self.plant = {f.name: f.plant for f in FAULTS}.get(fault)
        self.image = Path(image)

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if self.plant and runner.epoch == 1 and batch_idx == 0:
            self.plant(self.image)


@HOOKS.register_module(force=True)
class SlowHook(Hook):
    """Steps of some seconds; the second process is told to end in its fourth."""

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        time.sleep(2.6)
        if get_rank() == 1 and runner.iter == 3:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.fixture(scope='module')
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp('digits') / 'data'
    tool('make_digits').make(root, size=64, train=24, val=2, test=1, seed=0)
    return root


def config(folder, root, fault=None, workers=0, persistent=False):
    """Three epochs of six iterations, a checkpoint after each; images in the order of the file."""
    path = folder / 'run.py'
    image = root / 'train/000023.jpg'  # the last, and none of those that are looked at before
    path.write_text(f"""
_base_ = {str(ROOT / 'configs/digits/plain.py')!r}
custom_imports = dict(imports=[{__name__!r}])
custom_hooks = [dict(type='PlantHook', fault={fault!r}, image={str(image)!r})]
train_dataloader = dict(
    batch_size=4, num_workers={workers}, persistent_workers={persistent},
    sampler=dict(shuffle=False), dataset=dict(data_root={f'{root}/'!r}))
train_cfg = dict(max_epochs=3)
val_cfg = val_dataloader = val_evaluator = None
default_hooks = dict(logger=dict(interval=1))
experiment_name = {folder.name!r}
""")
    return str(path), image


def run(command):
    """Exit status and output; one that does not end fails, with its processes."""
    env = {
        **os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': f'{ROOT}:{ROOT / "tests"}',
        'PYTHON': warm.python(), 'PYTHON_EXEC': warm.python(),
        'RES_OPTIONS': 'timeout:1 attempts:1',
    }  # fmt: skip
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        env['PORT'] = str(s.getsockname()[1])
    process = subprocess.Popen(
        command, env=env, cwd=ROOT, start_new_session=True, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    try:
        said, _ = process.communicate(timeout=LIMIT)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, said


def marked(fault):
    slow = fault.name in ('an image is text', 'an image vanishes', 'the second process is killed')
    return pytest.param(fault, marks=[pytest.mark.slow] if slow else [])


@pytest.mark.parametrize('fault', [*map(marked, FAULTS)], ids=lambda fault: fault.name)
def test_a_fault_ends_a_run_that_goes_on_once_it_is_mended(made, tmp_path, fault):
    root = tmp_path / 'data'
    root.mkdir()
    (root / 'train').mkdir()
    (root / 'train.json').symlink_to(made / 'train.json')
    for image in (made / 'train').iterdir():
        (root / 'train' / image.name).write_bytes(image.read_bytes())
    path, image = config(tmp_path, root, fault.name, fault.workers, fault.persistent)
    whole = image.read_bytes()
    work_dir = tmp_path / 'work'
    start = (
        ['bash', 'tools/dist_train.sh', path, '2'] if fault.processes > 1
        else [warm.python(), 'tools/train.py', path]
    )  # fmt: skip
    status, said = run([*start, '--work-dir', str(work_dir)])
    assert status not in (0, None)
    sentence = fault.sentence.format(image=re.escape(str(image)))
    assert re.search(sentence, said), said[-3000:]
    last = Path((work_dir / 'last_checkpoint').read_text())
    assert last == work_dir / 'epoch_1.pth'
    assert torch.load(last, weights_only=True)['meta']['epoch'] == 1
    # The log, which has no traceback, says it too.
    log = ''.join(log.read_text() for log in work_dir.glob('*/*.log'))
    assert re.search(rf'stopped in iteration .*{sentence}.* {last} is complete: .*--resume', log)
    image.write_bytes(whole)
    path, _ = config(tmp_path, root)
    resumed = [path, '--work-dir', str(work_dir), '--resume']
    train.main([*resumed, '--cfg-options', f'experiment_name=resumed_{tmp_path.name}'])
    last = Path((work_dir / 'last_checkpoint').read_text())
    assert last.name == 'epoch_3.pth'
    assert torch.load(last, weights_only=True)['meta']['epoch'] == 3


def test_a_pipeline_that_is_switched_refuses_an_image_that_is_cut_short(tmp_path):
    class Cut(Hook):
        def after_train_epoch(self, runner):
            _cut(image)

    cfg = Config.fromfile(tiny_config(tmp_path, epochs=2))
    image = tmp_path / 'data/images/train_003.png'
    assert image.is_file()
    cfg.runner_type = 'mmkd.DistillationRunner'
    cfg.val_cfg = cfg.val_dataloader = cfg.val_evaluator = None
    switch = dict(type='PipelineSwitchHook', switch_epoch=1, switch_pipeline=cfg.train_pipeline)
    cfg.custom_hooks = [switch]
    runner = RUNNERS.build(cfg)
    runner.register_hook(Cut())
    with pytest.raises(ImageError, match=rf'image {image} is cut short: .* the end of a PNG'):
        runner.train()
    assert runner.epoch == 1


@pytest.mark.slow
def test_processes_with_long_steps_stop_together_soon(made, tmp_path):
    """torchrun gives them 30 s."""
    path, _ = config(tmp_path, made)
    with open(path, 'a') as file:
        file.write("custom_hooks = [dict(type='SlowHook')]\n")
    work_dir = tmp_path / 'work'
    status, said = run(['bash', 'tools/dist_train.sh', path, '2', '--work-dir', str(work_dir)])
    assert status not in (0, None)
    assert 'SIGTERM after iteration 4: saved as' in said, said[-3000:]
    last = Path((work_dir / 'last_checkpoint').read_text())
    assert last.name == 'iter_4.pth'
    assert torch.load(last, weights_only=True)['meta']['iter'] == 4


def test_a_run_with_persistent_workers_ends(made, tmp_path):
    path, _ = config(tmp_path, made, workers=2, persistent=True)
    options = ['--cfg-options', 'train_cfg.max_epochs=1']
    status, said = run([warm.python(), 'tools/train.py', path, '--work-dir', tmp_path, *options])
    assert status == 0, said[-3000:]


@pytest.mark.parametrize('where, why', [('file/x', 'Not a directory'), ('/proc/x', 'No such file')])
def test_a_work_dir_that_cannot_be_written(made, tmp_path, where, why):
    (tmp_path / 'file').write_text('')
    path, _ = config(tmp_path, made)
    work_dir = str(tmp_path / where)
    said = rf'error: work_dir {work_dir} cannot be written \({why}.*--work-dir'
    with pytest.raises(SystemExit, match=said):
        train.main([path, '--work-dir', work_dir])


def _full(*args, **kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class NearlyFull(io.BytesIO):
    """A file on a disk with room for a few blocks."""

    def __init__(self, **kwargs):
        super().__init__()

    def write(self, data):
        return _full() if self.tell() + len(data) > 2**14 else super().write(data)


FULL = {
    'the folder': ('os.makedirs', _full),
    'the first bytes': ('tempfile.TemporaryFile', NearlyFull),
    'the log': ('logging.FileHandler._open', _full),
    'the config': ('mmengine.config.Config.dump', _full),
    'TensorBoard': ('torch.utils.tensorboard.SummaryWriter', _full),
    'the log of the weights': ('mmengine.model.BaseModule._dump_init_info', _full),
}
"""What is written before the first step, in that order."""


@pytest.mark.parametrize('what', FULL)
def test_a_disk_that_is_full_at_the_start(made, tmp_path, monkeypatch, capfd, what):
    path, _ = config(tmp_path, made)
    with open(path, 'a') as file:
        boards = [dict(type='TensorboardVisBackend')]
        file.write(f'visualizer = dict(name={str(tmp_path)!r}, vis_backends={boards!r})\n')
    work_dir = tmp_path / 'work'
    monkeypatch.setattr(*FULL[what])
    said = rf'^error: work_dir {work_dir} cannot be written \(No space left on device\): name a'
    with pytest.raises(SystemExit, match=said) as error:
        train.main([path, '--work-dir', str(work_dir)])
    assert '\n' not in str(error.value)
    heard = ''.join(capfd.readouterr())
    assert 'Epoch(train)' not in heard and 'Logging error' not in heard
    if what in ('the folder', 'the first bytes'):  # no network was built for it
        assert not work_dir.exists() or os.listdir(work_dir) == ['.training']


HOLD = """
import os, sys, time
from multiprocessing import Process
from mmkd.engine.work_dir import locked
with locked(sys.argv[1]):
    worker = Process(target=time.sleep, args=(900,))
    worker.start()
    print(os.getpid(), worker.pid, flush=True)
    time.sleep(900)
"""


def test_two_runs_in_one_work_dir(made, tmp_path, monkeypatch):
    """The second is refused before it writes anything; a kill frees the folder, workers or not."""
    work_dir = tmp_path / 'work'
    path, _ = config(tmp_path, made)
    again = [path, '--work-dir', str(work_dir), '--cfg-options', 'train_cfg.max_epochs=1']
    first = subprocess.Popen(
        [warm.python(), '-c', HOLD, str(work_dir)], stdout=subprocess.PIPE, text=True
    )
    holder, worker = map(int, first.stdout.readline().split())
    try:
        said = rf'error: work_dir {work_dir}: another run is training in it \(process {holder} on'
        with pytest.raises(SystemExit, match=said):
            train.main(again)
        assert os.listdir(work_dir) == ['.training']
        monkeypatch.setenv('RANK', '1')  # of one job: its first process asks for all
        with locked(str(work_dir), 'pytorch'):
            pass
    finally:
        os.kill(holder, signal.SIGKILL)
        first.wait()
    os.kill(worker, 0)  # it lives
    try:
        train.main(again)
    finally:
        os.kill(worker, signal.SIGKILL)
    assert (work_dir / 'epoch_1.pth').exists()


def test_another_full_disk_is_not_blamed_on_work_dir(tmp_path):
    """An error that names a file elsewhere is left as it is; one that names none says so."""
    for file in ('epoch_1.pth', None):
        place = file and str(tmp_path / 'work' / file)
        with pytest.raises(SystemExit) as stopped, reporting_full_disk(tmp_path / 'work'):
            raise OSError(errno.ENOSPC, 'No space left on device', place)
        assert ('/dev/shm' in str(stopped.value)) == (file is None)
    elsewhere = OSError(errno.ENOSPC, 'No space left on device', str(tmp_path / 'x'))
    with pytest.raises(OSError) as kept, reporting_full_disk(tmp_path / 'work'):
        raise elsewhere
    assert kept.value is elsewhere


WEIGHTS = 1.6e6  # bytes, about, of the plain student; its optimizer's momentum has as many
ROOM = {
    'the weights': (4096, 'the weights in each checkpoint take', 0),
    'the optimizer': (1.5 * WEIGHTS, 'each checkpoint takes', 1),
    'EMA': (2.5 * WEIGHTS, 'each checkpoint takes', 1),
}


@pytest.mark.parametrize('what', ROOM)
def test_no_room_for_a_checkpoint(made, tmp_path, monkeypatch, capfd, what):
    """It is said before the first step or right behind it, not where the checkpoint is due."""
    path, _ = config(tmp_path, made)
    command = [path, '--work-dir', str(tmp_path), '--cfg-options', 'train_cfg.max_epochs=1']
    if what == 'EMA':
        with Path(path).open('a') as file:
            print("custom_hooks.append(dict(type='EMAHook'))", file=file)
    free, takes, steps = ROOM[what]
    usage = SimpleNamespace(total=2**40, free=free)
    monkeypatch.setattr('shutil.disk_usage', lambda path: usage)
    said = rf'cannot be written \(\d\.\d MiB are free, and {takes} [1-9]\S* MiB\)'
    with pytest.raises(SystemExit, match=said):
        train.main(command)
    assert ''.join(capfd.readouterr()).count(' loss: ') == steps
    assert not list(tmp_path.glob('*.pth'))
    if what == 'the optimizer':
        free = usage.free = 2.5 * WEIGHTS
    elif what == 'EMA':
        free = usage.free = 3.5 * WEIGHTS
    else:
        usage.total = 0  # a file system that does not tell
    train.main([*command, f'experiment_name=room_{tmp_path.name}'])
    assert (tmp_path / 'epoch_1.pth').stat().st_size < free or not usage.total


TEACHER = str(ROOT / 'configs/digits/teacher.py')


@pytest.mark.parametrize(
    'student, options, said',
    [
        ('plain', {'': 4}, 'roi_head.bbox_head.num_classes is 4, and the train data .* 10 classes'),
        ('plain', {'': 12}, 'bbox_head.num_classes is 12, and the train .*10 .*set num_classes=10'),
        ('paper', {'': 9}, 'bbox_head.num_classes is 9, and the train data .* have 10 classes'),
        ('paper', {'teacher': 4}, 'teacher .* has 4 classes, the student 10, .*: give .*classes='),
    ],
    ids=['fewer', 'more', 'distilled', 'teacher'],
)
def test_another_number_of_classes_is_named_before_the_first_step(
    made, tmp_path, student, options, said
):
    head = 'dict(roi_head=dict(bbox_head=dict(num_classes={})))'
    (tmp_path / 'teacher.py').write_text(
        f'_base_ = {TEACHER!r}\nmodel = {head.format(options.get("teacher", 10))}'
    )
    path, _ = config(tmp_path, made)
    text = Path(path).read_text().replace('/plain.py', f'/{student}.py')
    text += f'model = {head.format(options.get("", 10))}\n'
    if 'teacher' in options:
        text += f'model.update(teacher_config={str(tmp_path / "teacher.py")!r})\n'
        text += "model.update(teacher_ckpt='random')\n"
    Path(path).write_text(text)
    with pytest.raises(ValueError, match=said):
        train.main([path, '--work-dir', str(tmp_path / 'work')])
    assert not list(tmp_path.glob('work/*.pth'))


@pytest.mark.parametrize('script', [['dist_train.sh', 'c.py'], ['dist_test.sh', 'c.py', 'c.pth']])
@pytest.mark.parametrize('gpus', ['0', '-1', 'two', 'gpu'])
def test_a_number_of_gpus_that_is_none(script, gpus):
    name, *rest = script
    status, said = run(['bash', f'tools/{name}', *rest, gpus])
    assert (status, said.count('\n')) == (2, 1)
    assert f"GPUS is '{gpus}': it must be a number" in said


def test_more_processes_than_gpus_and_none_at_all(monkeypatch, capsys):
    monkeypatch.setenv('LOCAL_RANK', '1')
    monkeypatch.setenv('LOCAL_WORLD_SIZE', '2')
    monkeypatch.setattr(processes, 'get_device', lambda: 'cuda')
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 1)
    with pytest.raises(SystemExit, match='2 processes were asked for, .* this machine shows 1:'):
        processes.check_devices()
    monkeypatch.setattr(processes, 'get_device', lambda: 'cpu')
    processes.check_devices()
    assert capsys.readouterr().err == ''  # the first process says it for all
    monkeypatch.setenv('LOCAL_RANK', '0')
    processes.check_devices()
    assert 'shows no GPU' in (said := capsys.readouterr().err) and '2 processes' in said


def test_other_errors_are_not_called_a_lost_process(monkeypatch):
    closed = 'gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:21741.'
    assert lost_process(closed) is None  # there is one process
    monkeypatch.setattr('mmkd.engine.processes.get_world_size', lambda: 2)
    assert 'process 0 of 2 lost another' in lost_process(closed)
    assert lost_process('mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)') is None


def _encoded(kind, *options):
    pixels = np.random.default_rng(0).integers(0, 255, (40, 30, 3), dtype=np.uint8)
    return cv2.imencode(kind, pixels, options)[1].tobytes()


JPEGS = [_encoded('.jpg'), _encoded('.jpg', cv2.IMWRITE_JPEG_PROGRESSIVE, 1)]


@pytest.mark.parametrize('content', [*JPEGS, _encoded('.png')], ids=['jpeg', 'progressive', 'png'])
def test_a_file_cut_anywhere_is_cut_short(content):
    assert cut_short(content) is None
    assert cut_short(content + b'appended by a phone') is None
    kind = 'JPEG' if content in JPEGS else 'PNG'
    # A PNG's end is the last chunk: a length of four bytes, IEND, a checksum of four.
    last = len(content) - (2 if kind == 'JPEG' else 8)
    assert all(cut_short(content[:end]) == kind for end in range(8, last))


def test_a_preview_in_the_header_is_not_the_end():
    content = JPEGS[0]
    exif = b'\xff\xe1' + (len(content) + 2).to_bytes(2, 'big') + content
    both = content[:2] + exif + content[2:]
    assert cut_short(both) is None
    assert cut_short(both[:-2]) == 'JPEG'


def test_other_formats_are_left_to_the_decoder():
    assert cut_short(_encoded('.bmp')[:100]) is None and cut_short(b'') is None


LEAF = dict(type='CocoDataset', ann_file='train.json', data_prefix=dict(img='train/'),
            metainfo=dict(classes=tuple('0123456789')))  # fmt: skip
LOADED = [dict(type='LoadImageFromFile'), dict(type='LoadAnnotations', with_bbox=True)]
BACKEND = [dict(type='LoadImageFromFile', backend_args=dict(backend='local'), to_float32=True)]
NESTED = [dict(type='RandomChoice', transforms=[LOADED])]


def _wrapped(root):
    def leaf(pipeline):
        return {**LEAF, 'data_root': str(root), 'pipeline': pipeline}

    flips = [dict(type='RandomFlip', prob=0.5)]
    return {
        'none': leaf(LOADED),
        'backend_args': leaf(BACKEND),
        'nested transforms': leaf(NESTED),
        'RepeatDataset': dict(type='RepeatDataset', times=2, dataset=leaf(LOADED)),
        'ConcatDataset': dict(type='ConcatDataset', datasets=[leaf(LOADED), leaf(LOADED)]),
        'ClassBalancedDataset': dict(
            type='ClassBalancedDataset', oversample_thr=0.01, dataset=leaf(LOADED)
        ),
        'MultiImageMixDataset': dict(
            type='MultiImageMixDataset', pipeline=flips, dataset=leaf(LOADED)
        ),
    }


@pytest.mark.parametrize('wrapper', _wrapped(''))
def test_whole_images_are_what_they_were_and_others_are_refused(made, tmp_path, wrapper):
    dataset = DATASETS.build(_wrapped(made)[wrapper])
    np.random.seed(0)
    plain = dataset[3]['img']
    require_intact_images(dataset)
    np.random.seed(0)
    image = dataset[3]['img']
    assert image.dtype == plain.dtype and (image == plain).all()
    image = made / 'train/000003.jpg'
    whole = image.read_bytes()
    try:
        image.write_bytes(whole[:-2])
        with pytest.raises(ImageError, match='000003.jpg is cut short'):
            _ = [dataset[i] for i in range(len(dataset))]
    finally:
        image.write_bytes(whole)


def test_what_a_config_tells_to_ignore_is_ignored(made, tmp_path):
    class Own(LoadImageFromFile):
        def transform(self, results):
            return {'own': True}

    load, own = LoadImageFromFile(ignore_empty=True), Own()
    require_intact_images([load, own])
    assert load({'img_path': str(tmp_path / 'gone.jpg')}) is None
    assert own({}) == {'own': True}
