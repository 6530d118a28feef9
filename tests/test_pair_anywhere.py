"""A pair's file names its recipe without a path, and is read by every program, from anywhere.

The programs are a user's: each runs in an interpreter that has not imported mmkd, outside of the
repository, in another folder than the pair.
"""

import json
import os
import subprocess
import sys

import pytest
import torch
from mmdet.apis import inference_detector, init_detector
from mmdet.registry import MODELS
from mmengine.config import Config
from pairs import ROOT
from tiny import tiny_config

from mmkd.commands import new_pair

PROGRAMS = """
import json, os, pickle, runpy, sys, traceback
import mmdet.apis
from mmengine.config import Config

pair, plain, weights, image, *doors = sys.argv[1:]


def tool(name, *arguments):
    sys.argv = [name, *arguments]
    where = os.path.join(os.path.dirname(mmdet.__file__), '.mim', 'tools', name)
    runpy.run_path(where, run_name='__main__')


def train():
    tool('train.py', pair, '--work-dir', 'trained')
    return os.path.isfile('trained/epoch_1.pth')


def test():
    tool('test.py', pair, weights, '--work-dir', 'tested', '--out', 'tested.pkl')
    with open('tested.pkl', 'rb') as file:
        return pickle.load(file)[0]['pred_instances']['scores'].tolist()


def of_detector(config):
    model = mmdet.apis.init_detector(config, weights, device='cpu')
    return mmdet.apis.inference_detector(model, image).pred_instances.scores.tolist()


def of_inferencer():
    infer = mmdet.apis.DetInferencer(pair, weights, device='cpu', show_progress=False)
    return infer(image)['predictions'][0]['scores']


def config(work_dir):
    read = Config.fromfile(pair)
    read.work_dir, read.load_from = work_dir, weights
    return read


def cell_train():
    from mmengine.registry import RUNNERS

    RUNNERS.build(config('cell')).train()
    return os.path.isfile('cell/epoch_1.pth')


def cell_test():
    from mmengine.runner import Runner

    return 'coco/bbox_mAP' in Runner.from_cfg(config('cell_test')).test()


def cell_guarded():
    from mmengine.runner import Runner
    import mmkd

    runner = Runner.from_cfg(config('cell_guarded'))
    mmkd.guard(runner.model, runner.build_dataloader(runner.cfg.train_dataloader))
    runner.train()
    return os.path.isfile('cell_guarded/epoch_1.pth')


def cell_unguarded():
    from mmengine.runner import Runner

    try:
        Runner.from_cfg(config('cell_unguarded')).train()
    except RuntimeError as error:
        return str(error)


DOORS = {
    'tools/train.py': train,
    'tools/test.py': test,
    'tools/misc/print_config.py': lambda: tool('misc/print_config.py', pair),
    'tools/analysis_tools/get_flops.py': lambda: tool(
        'analysis_tools/get_flops.py', pair, '--num-images', '1'
    ),
    'init_detector': lambda: of_detector(pair),
    'init_detector of a Config': lambda: of_detector(Config.fromfile(pair)),
    'DetInferencer': of_inferencer,
    'Runner.from_cfg, test': cell_test,
    'Runner.from_cfg, train': cell_unguarded,
    'Runner.from_cfg and mmkd.guard': cell_guarded,
    'RUNNERS.build': cell_train,
}
for door in doors:
    child = os.fork()  # each is the first of its process
    if child == 0:
        status = 1
        try:
            assert 'mmkd' not in sys.modules
            given = DOORS[door]()
            print('FOUND', json.dumps([door, given]))
            status = 0
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        os._exit(status)
    if os.waitpid(child, 0)[1]:
        sys.exit(f'{door} has failed')
"""
SCORES = ('tools/test.py', 'init_detector', 'init_detector of a Config', 'DetInferencer')
DONE = (
    'tools/train.py',
    'Runner.from_cfg, test',
    'Runner.from_cfg and mmkd.guard',
    'RUNNERS.build',
)
READ = {
    'tools/misc/print_config.py': "type='mmkd.KnowledgeDistillationTwoStageDetector'",
    'tools/analysis_tools/get_flops.py': 'Flops: ',
}
REFUSED = 'Runner.from_cfg, train'


@pytest.fixture(scope='module')
def pair(tmp_path_factory):
    """The file that new-pair writes, in a folder beside its networks, and a student's weights."""
    root = tmp_path_factory.mktemp('anywhere')
    networks = root / 'networks'
    networks.mkdir()
    teacher, student = (
        tiny_config(networks, name, channels=channels)
        for name, channels in (('teacher', 12), ('student', 8))
    )
    torch.manual_seed(0)
    for config in (teacher, student):
        state = MODELS.build(Config.fromfile(config).model).state_dict()
        torch.save({'state_dict': state, 'meta': {}}, config.with_suffix('.pth'))
    path = root / 'my pairs' / 'pair.py'
    path.parent.mkdir()
    new_pair.main(
        ['--teacher', str(teacher), '--teacher-ckpt', str(teacher.with_suffix('.pth')),
         '--student', str(student), '--out', str(path)]
    )  # fmt: skip
    # The teacher is untrained, and detects nothing.
    text = path.read_text()
    assert "__import__('mmkd').base('chen2017')" in text
    recipe = 'distillation=dict(_base_.distillation, check_teacher=False)'
    path.write_text(text.replace('distillation=_base_.distillation', recipe))
    return path


@pytest.mark.parametrize(
    'doors',
    [
        ('init_detector',),
        pytest.param((*(door for door in SCORES if door != 'init_detector'), *DONE, *READ, REFUSED),
                     marks=pytest.mark.slow),
    ],
    ids=['one', 'all others'],
)  # fmt: skip
def test_a_pair_is_read_by_a_program_that_has_not_imported_mmkd(doors, pair, tmp_path):
    networks = pair.parents[1] / 'networks'
    student, image = networks / 'student.py', networks / 'data/images/val_000.png'
    weights = student.with_suffix('.pth')
    done = subprocess.run(
        [sys.executable, '-c', PROGRAMS, os.path.relpath(pair, tmp_path), student, weights, image,
         *doors],
        cwd=tmp_path, text=True, timeout=600, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        env={**os.environ, 'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1'},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:]
    assert 'the teacher was not found' not in done.stdout
    lines = [line[6:] for line in done.stdout.splitlines() if line.startswith('FOUND ')]
    found = dict(map(json.loads, lines))
    assert tuple(found) == doors
    for door, words in READ.items():
        assert door not in doors or words in done.stdout
    for door, given in found.items():
        if door in SCORES:
            model = init_detector(str(student), str(weights), device='cpu')
            wanted = inference_detector(model, str(image)).pred_instances.scores
            torch.testing.assert_close(torch.tensor(given), wanted, rtol=1e-4, atol=1e-5)
        elif door in DONE:
            assert given is True
        elif door == REFUSED:
            assert 'RUNNERS.build(cfg)' in given and 'mmkd.guard' in given


def test_of_a_path_that_only_mmkd_finds_every_other_program_says_so(pair, tmp_path, monkeypatch):
    """A teacher beside the config: mmkd's runner finds it, an inferencer does not know where."""
    monkeypatch.chdir(tmp_path)
    text = pair.read_text()
    assert '{{ fileDirname }}/../networks/teacher.py' in text
    beside = pair.with_name('beside.py')
    beside.write_text(text.replace('{{ fileDirname }}/', ''))
    model = init_detector(str(beside), device='cpu')
    with pytest.raises(ValueError, match=r"write '\{\{ fileDirname \}\}/\.\./networks/teacher\.py"):
        raise model.missing_teacher
