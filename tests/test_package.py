"""The wheel is enough: installed beside the stack, outside of any clone, it does all the work."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import mmdet
import pytest
from mmengine.config import Config

import mmkd
from mmkd import shipped
from mmkd.recipe import read_config

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope='module')
def wheel(tmp_path_factory):
    """Built of a copy, for setuptools leaves its own files in the tree."""
    folder = tmp_path_factory.mktemp('wheel')
    for name in ('mmkd', 'configs', 'tools', 'checkpoints'):
        shutil.copytree(
            ROOT / name, folder / 'tree' / name, symlinks=True,
            ignore=shutil.ignore_patterns('__pycache__'),
        )  # fmt: skip
    for name in ('pyproject.toml', 'README.md', 'model-index.yml'):
        shutil.copy(ROOT / name, folder / 'tree')
    pip = [sys.executable, '-m', 'pip', 'wheel', '--no-deps', '--no-build-isolation', '--no-index']
    done = subprocess.run(
        [*pip, '-w', str(folder), str(folder / 'tree')], text=True, capture_output=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (found,) = folder.glob('*.whl')
    return found


def test_the_wheel_has_all_that_a_clone_has(wheel):
    with zipfile.ZipFile(wheel) as file:
        names = set(file.namelist())
    for folder in ('configs', 'tools'):
        there = {p.relative_to(ROOT) for p in (ROOT / folder).rglob('*') if p.is_file()}
        there = {p for p in there if '__pycache__' not in p.parts}
        assert {f'mmkd/.mim/{p}' for p in there} <= names
    assert 'mmkd/.mim/model-index.yml' in names
    templates = {p.relative_to(ROOT).as_posix() for p in (ROOT / 'mmkd').rglob('*.jinja')}
    assert len(templates) > 1 and templates <= names
    assert mmkd.__version__ in wheel.name


def test_every_name_is_found_and_another_gets_the_nearest():
    names = shipped.names()
    assert {'chen2017', 'mmkd', 'kd/faster_rcnn_r101_to_r50'} <= set(names)
    for name in names:
        assert Path(mmkd.base(name)).samefile(mmkd.base(f'{name}.py'))
    with pytest.raises(FileNotFoundError, match="no config 'chen17'; it has chen2017"):
        mmkd.base('chen17')
    with pytest.raises(FileNotFoundError, match='no config'):
        mmkd.base('../mmkd/__init__')


def test_the_index_names_every_pair():
    from mmengine import load

    (meta,) = load(ROOT / 'model-index.yml')['Import']
    listed = {model['Config'] for model in load(ROOT / meta)['Models']}
    assert listed == {str(p.relative_to(ROOT)) for p in (ROOT / 'configs/kd').rglob('*.py')}


def test_a_config_of_mmkd_is_named_as_one_of_mmdetections(tmp_path):
    name = 'kd/faster_rcnn_r101_to_r50.py'
    own = Config.fromfile(ROOT / 'configs' / name)
    inherited = tmp_path / 'mine.py'
    inherited.write_text(f"_base_ = __import__('mmkd').base({name!r})\n")
    for cfg in (read_config(f'mmkd::{name}'), Config.fromfile(inherited)):
        assert cfg.to_dict() == own.to_dict()


# ------------------------------------------------------------------------ outside of the repository


@pytest.fixture(scope='module')
def outside(wheel, tmp_path_factory):
    """Runs a command of an environment that sees the stack and the installed wheel alone."""
    folder = tmp_path_factory.mktemp('outside')
    subprocess.run([sys.executable, '-m', 'venv', '--without-pip', folder / 'env'], check=True)
    python = folder / 'env/bin/python'
    (site,) = (folder / 'env/lib').glob('python*/site-packages')
    # Its .pth files, by which a clone of mmkd may be installed there, are not read.
    (site / 'stack.pth').write_text(sysconfig.get_path('purelib') + '\n')
    pip = [sys.executable, '-m', 'pip', '--python', str(python), 'install', '-q', '--no-deps']
    subprocess.run([*pip, '--no-index', str(wheel)], check=True)
    env = {k: v for k, v in os.environ.items() if k != 'PYTHONPATH'}
    env |= {'OMP_NUM_THREADS': '1', 'PATH': f'{python.parent}:{env["PATH"]}'}

    def run(*command: object, status: int = 0) -> str:
        done = subprocess.run(
            [str(word) for word in command], cwd=folder, env=env, text=True, timeout=900,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        assert done.returncode == status, done.stdout[-6000:]
        return done.stdout

    run.folder = folder
    return run


SMALL = ('train_cfg.max_epochs=1', 'train_cfg.val_interval=1', 'param_scheduler.1.T_max=1',
         'param_scheduler.1.end=1')  # fmt: skip


@pytest.mark.slow
def test_all_work_is_done_from_the_wheel(outside):
    where = outside('python', '-c', 'import mmkd; print(mmkd.__file__)')
    assert str(outside.folder) in where
    mim = Path(where.strip().splitlines()[-1]).parent / '.mim'
    counts = ('--train', 48, '--val', 16, '--test', 16)
    outside('python', mim / 'tools/make_digits.py', '--out', 'data/digits', *counts)
    outside(
        'mmkd', 'new-pair', '--teacher', mim / 'configs/digits/teacher.py', '--teacher-ckpt',
        mim / 'checkpoints/digits_teacher.pth', '--student', mim / 'configs/digits/plain.py',
        '--recipe', 'mmkd', '--out', 'pair.py',
    )  # fmt: skip
    pair = (outside.folder / 'pair.py').read_text()
    assert "__import__('mmkd').base('mmkd')" in pair
    assert outside('mmkd', 'check', 'pair.py').splitlines()[-1] == 'GO'
    outside('mmkd', 'train', 'pair.py', '--cfg-options', *SMALL)
    checkpoint = outside.folder / 'work_dirs/pair/epoch_1.pth'
    outside('mmkd', 'test', 'pair.py', checkpoint, '--work-dir', 'tested')
    (figures,) = (outside.folder / 'tested').glob('*/*.json')
    assert 'coco/bbox_mAP' in json.loads(figures.read_text())
    outside('mmkd', 'compare', 'pair.py', '--seeds', 0, '--work-dir', 'compared', '--cfg-options',
            *SMALL)  # fmt: skip
    assert 'pair, terms off' in (outside.folder / 'compared/table.md').read_text()
    said = outside('mmkd', 'publish', checkpoint, 'out/student.pth')
    assert 'init_detector' in said
    (weights,) = (outside.folder / 'out').glob('student-*.pth')
    assert weights.with_suffix('.py').exists()
    # The tools in the wheel, and MMDetection's own, on the same pair.
    outside('python', mim / 'tools/train.py', 'pair.py', '--work-dir', 'again', '--cfg-options',
            *SMALL)  # fmt: skip
    mmdets = Path(mmdet.__file__).parent / '.mim/tools'
    assert 'coco/bbox_mAP' in outside('python', mmdets / 'test.py', 'pair.py', checkpoint)


@pytest.mark.parametrize(
    ('arguments', 'status', 'says'),
    [
        ((), 2, 'usage: mmkd COMMAND'),
        (('--help',), 0, 'publish'),
        (('--version',), 0, mmkd.__version__),
        (('trian',), 2, 'did you mean train'),
    ],
)
def test_the_command_helps(arguments, status, says, capsys):
    from mmkd.__main__ import main

    assert main(arguments) == status
    said = capsys.readouterr()
    assert says in said.out + said.err


@pytest.mark.parametrize('name', ['train', 'pseudo-label'])
@pytest.mark.parametrize('option', [['--gpus', '2'], ['--gpus=2']])
def test_gpus_are_processes_of_pytorchs_launcher(option, name, monkeypatch):
    from mmkd import __main__ as command

    class Replaced(Exception):
        pass

    def replaced(path, words):
        raise Replaced(words)

    monkeypatch.setattr('os.execv', replaced)
    with pytest.raises(Replaced) as found:
        command.main([name, 'x.py', *option, '--amp'])
    words = found.value.args[0]
    assert '--nproc_per_node=2' in words
    assert words[-5:] == [name, 'x.py', '--amp', '--launcher', 'pytorch']
    with pytest.raises(SystemExit, match='a number of GPUs'):
        command.main(['test', 'x.py', '--gpus', 'all'])
