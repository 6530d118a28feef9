"""A checkpoint comes in by many doors: at each a hostile one is refused by its name, and not run.

The real tools run in this process, on networks that fit in a few kilobytes. That a door leads to
the one reader, and that what a file carries would have run, is shown by a reader that trusts it.
"""

import ast
import contextlib
import io
import pickle
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pairs
import pytest
import torch
from hostile import HOSTILE, Hostile, safetensors
from mmdet.apis import DetInferencer, init_detector
from mmengine.config import Config
from mmengine.runner import Runner, load_checkpoint
from test_check_pair import PAIR
from test_tools import tool
from tiny import tiny_config

from mmkd.analysis import comparison as compare
from mmkd.io import checkpoint, reader
from mmkd.io.checkpoint import CheckpointError
from mmkd.models.teacher import Teacher
from mmkd.recipe import TeacherError

ROOT = Path(__file__).resolve().parents[1]
train, test, publish_model, check_pair, replay = (
    tool(name) for name in ('train', 'test', 'publish_model', 'check_pair', 'replay')
)
KINDS = {
    name: HOSTILE[name]
    for name in ('os.system', 'os.system, old format', 'tar', 'deflated', 'hidden in meta')
}
KINDS['safetensors header'] = Hostile(
    'memory', r'is no PyTorch', lambda m: safetensors({}, length=2**60), 'x.safetensors'
)
FOUND: list[str] = []
"""Names that any unpickler of this process has looked up, of those that a payload needs."""


def _audit(event: str, arguments: tuple) -> None:
    if event == 'pickle.find_class' and arguments == ('posix', 'system'):
        FOUND.append('.'.join(arguments))


sys.addaudithook(_audit)


# --- doors ----------------------------------------------------------------------------------------


class Case(SimpleNamespace):
    """Where a door is tried: ``plain`` and ``pair`` are configs, ``work`` is a fresh folder."""

    def train(self, config, *arguments, **options):
        options = [f'{key.replace("__", ".")}={value}' for key, value in options.items()]
        options += [f'experiment_name={self.work.name}_{self.work.parent.name}']
        train.main([config, '--work-dir', str(self.work), *arguments, '--cfg-options', *options])

    def heir(self, text):
        path = self.work.parent / 'heir.py'
        path.write_text(f'_base_ = {self.plain!r}\n{text}\n')
        return str(path)


def _teacher(case, file):
    case.train(case.pair, model__teacher_ckpt=file)


def _teacher_with_a_digest(case, file):
    with open(file, 'rb') as opened:
        digest = checkpoint.hashlib.sha256(opened.read()).hexdigest()
    case.train(case.pair, model__teacher_ckpt=file, model__teacher_sha256=digest)


def _load_from(case, file):
    case.train(case.plain, load_from=file)


def _resume(case, file):
    case.train(case.plain, '--resume', file, train_cfg__max_epochs=2)


def _last_checkpoint(case, file):
    case.work.mkdir()
    (case.work / 'last_checkpoint').write_text(file)
    case.train(case.plain, '--resume', train_cfg__max_epochs=2)


def _newest(case, file):
    """``last_checkpoint`` is gone: the newest of the folder."""
    case.work.mkdir()
    (case.work / 'epoch_1.pth').symlink_to(file)
    case.train(case.plain, '--resume', train_cfg__max_epochs=2)


def _init_cfg(case, file):
    init = dict(type='Pretrained', checkpoint=file, prefix='backbone.', _delete_=True)
    case.train(case.heir(f'model = dict(backbone=dict(init_cfg={init!r}))'))


def _ema(case, file):
    case.train(case.heir("custom_hooks = [dict(type='EMAHook')]"), load_from=file)


def _test(case, file):
    test.main([case.plain, file, '--work-dir', str(case.work)])


def _test_of_a_pair(case, file):
    test.main([case.pair, file, '--work-dir', str(case.work)])


def _check_pair(case, file):
    options = ['--size', '64', '64', '--processes', '1', '--cfg-options']
    check_pair.main([case.pair, *options, f'model.teacher_ckpt={file}'])


def _compare(case, file):
    def execute(command, log, env, lock, poll):
        try:
            {'train': train, 'test': test}[Path(command[1]).stem].main(
                [*command[2:], f'experiment_name={case.work.parent.name}']
            )
        except BaseException as error:
            log.write_text(str(error))
            return 1
        return 0

    said = io.StringIO()
    compare.compare(
        [case.pair], [0], options=[f'load_from={file}', 'model.teacher_ckpt=random'],
        work_dir=case.work, jobs=1, execute=execute, stream=said,
    )  # fmt: skip
    print(' '.join(log.read_text() for log in case.work.glob('runs/*/train.log')))


def _publish(case, file):
    publish_model.main([file, str(case.work / 'out.pth')])


def _replay(case, file):
    replay.main([case.plain, file])


def _init_detector(case, file):
    init_detector(case.plain, file, device='cpu')


def _inferencer(case, file):
    DetInferencer(model=case.plain, weights=file, device='cpu', show_progress=False)


def _inferencer_alone(case, file):
    with pytest.raises(Exception) as error:
        DetInferencer(weights=file, device='cpu', show_progress=False)
    if not isinstance(error.value, ValueError) or 'Cannot find the config' not in str(error.value):
        raise error.value


def _runner(case, file):
    """MMEngine's own, where mmkd is imported."""
    cfg = Config.fromfile(case.plain)
    cfg.merge_from_dict({'work_dir': str(case.work), 'load_from': file, 'resume': True})
    cfg.experiment_name = f'{case.work.name}_{case.work.parent.name}'
    cfg.train_cfg.max_epochs = 2
    Runner.from_cfg(cfg).train()


def _load_checkpoint(case, file):
    load_checkpoint(torch.nn.Linear(1, 1), file)


def _s3(case, file):
    load_checkpoint(torch.nn.Linear(1, 1), f's3://bucket{file}')


DOORS: dict[str, Callable[[Case, str], None]] = {
    'teacher_ckpt': _teacher,
    'teacher_ckpt with teacher_sha256': _teacher_with_a_digest,
    'load_from': _load_from,
    '--resume PATH': _resume,
    '--resume, last_checkpoint': _last_checkpoint,
    '--resume, the newest': _newest,
    'init_cfg of the backbone': _init_cfg,
    'EMAHook': _ema,
    'tools/test.py': _test,
    'tools/test.py of a pair': _test_of_a_pair,
    'tools/check_pair.py': _check_pair,
    'tools/compare.py': _compare,
    'tools/publish_model.py': _publish,
    'tools/replay.py': _replay,
    'init_detector': _init_detector,
    'DetInferencer': _inferencer,
    'DetInferencer of weights alone': _inferencer_alone,
    "MMEngine's Runner": _runner,
    'load_checkpoint': _load_checkpoint,
    's3://': _s3,
}


# --- what is tried at them ------------------------------------------------------------------------


@pytest.fixture(scope='module')
def made(tmp_path_factory):
    """A plain config, a pair, and a training checkpoint of the plain one."""
    folder = tmp_path_factory.mktemp('doors')
    cfg = Config.fromfile(tiny_config(folder))
    plain = str(folder / 'plain.py')  # in one piece: with its bases it takes a second to read
    cfg.dump(plain)
    torch.save({'state_dict': pairs.build(cfg.model).state_dict()}, folder / 'teacher.pth')
    (folder / 'pair.py').write_text(
        PAIR.format(base=plain, teacher=plain, checkpoint=str(folder / 'teacher.pth'),
                    distillation=pairs.recipe('hint'))
    )  # fmt: skip
    options = ['--cfg-options', 'experiment_name=doors']
    train.main([plain, '--work-dir', str(folder / 'trained'), *options])
    return folder


@pytest.fixture
def case(made, tmp_path, monkeypatch):
    monkeypatch.setattr(
        checkpoint,
        'get_file_backend',
        lambda *_, **__: SimpleNamespace(get=lambda u: Path(u.split('bucket')[1]).read_bytes()),
    )
    return Case(plain=f'{made}/plain.py', pair=f'{made}/pair.py', work=tmp_path / 'work')


@pytest.fixture
def reached(monkeypatch):
    """Calls that read more than data, with their arguments' beginning."""
    calls = []

    def watch(owner, name):
        original = getattr(owner, name)

        def call(*args, **kwargs):
            if not any(isinstance(each, reader._PickleModule) for each in args):
                calls.append((name, f'{args[0]!r:.80}'))
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, call)

    for owner, name in ((torch, 'load'), (pickle, 'load'), (Config, 'fromstring')):
        watch(owner, name)
    FOUND.clear()
    return calls


READER = 'load_checkpoint'
"""The door that has nothing before the one reader: each kind is tried at it, two at the others."""
PAIRS = [
    pytest.param(door, kind, marks=() if quick else pytest.mark.slow)
    for door in DOORS
    for kind in KINDS
    for quick in [door == READER or kind in ('os.system', 'hidden in meta')]
    # The first trains two networks each time; the second looks for epoch_1.pth.
    if (door != 'tools/compare.py' or kind in ('os.system', 'hidden in meta'))
    and (door != '--resume, the newest' or kind != 'safetensors header')
]


@pytest.mark.parametrize(('door', 'kind'), PAIRS)
def test_a_hostile_file_is_refused_at_each_door(door, kind, case, tmp_path, reached, capsys):
    marker, file = tmp_path / 'marker', tmp_path / KINDS[kind].file
    file.write_bytes(KINDS[kind].make(str(marker)))
    try:
        DOORS[door](case, str(file))
        text = capsys.readouterr().out
    except (CheckpointError, SystemExit) as error:
        text = str(error)
    named = {'--resume, the newest': case.work / 'epoch_1.pth', 's3://': f's3://bucket{file}'}
    assert re.search(rf'checkpoint {named.get(door, file)} .*({KINDS[kind].reason})', text), text
    assert reached == [] and FOUND == []
    assert not marker.exists()


@pytest.mark.parametrize('door', DOORS)
def test_each_door_leads_to_the_one_reader(door, case, tmp_path, monkeypatch):
    """Were it one that trusts the file, what is in it would run: at every door."""
    monkeypatch.setattr(reader, 'read', lambda file, *_: torch.load(file, weights_only=False))
    marker, file = tmp_path / 'marker', tmp_path / 'x.pth'
    file.write_bytes(HOSTILE['os.system'].make(str(marker)))
    FOUND.clear()
    with contextlib.suppress(Exception, SystemExit):  # there is nothing else in it
        DOORS[door](case, str(file))
    assert marker.exists() and FOUND


def test_what_is_refused_at_a_door_that_no_reader_is_behind(case, tmp_path):
    file = tmp_path / 'x.pth'
    file.write_bytes(HOSTILE['os.system'].make(str(tmp_path / 'marker')))
    with pytest.raises(CheckpointError, match='pavi://a/x.pth is not fetched: download it'):
        load_checkpoint(torch.nn.Linear(1, 1), 'pavi://a/x.pth')
    for given in (str(file), dict(_base_=str(file))):
        with pytest.raises(TeacherError, match='cannot be read|defines no model'):
            Teacher(given, 'random')
    with pytest.raises(SystemExit, match=f'config {file} cannot be read'):
        train.main([str(file)])
    assert not (tmp_path / 'marker').exists()


# --- texts in a checkpoint ------------------------------------------------------------------------

RUN_LATER = {
    name: DOORS[name]
    for name in (
        '--resume PATH', '--resume, last_checkpoint', 'EMAHook', 'tools/test.py', 'teacher_ckpt',
        'tools/publish_model.py', 'DetInferencer', 'DetInferencer of weights alone',
        "MMEngine's Runner",
    )
}  # fmt: skip


@pytest.fixture
def armed(made, tmp_path):
    """A training checkpoint whose texts make a marker, in each place where MMEngine has one."""
    found = torch.load(made / 'trained/epoch_1.pth', weights_only=True)
    text = f'open({str(tmp_path / "marker")!r}, "w")'
    found['meta'] |= dict(cfg=text, config=text)
    found['message_hub']['runtime_info']['cfg'] = text
    torch.save(found, tmp_path / 'armed.pth')
    return str(tmp_path / 'armed.pth')


@pytest.mark.parametrize('door', RUN_LATER)
def test_a_text_in_a_checkpoint_is_left_out_and_the_rest_is_used(
    door, armed, case, tmp_path, reached
):
    RUN_LATER[door](case, armed)
    if door.startswith('--resume') or door == "MMEngine's Runner":
        assert torch.load(case.work / 'epoch_2.pth', weights_only=False)['meta']['iter'] == 8
    assert [name for name, _ in reached if name == 'fromstring'] == []
    for written in case.work.glob('*.pth'):
        assert str(tmp_path / 'marker').encode() not in written.read_bytes()
    assert not (tmp_path / 'marker').exists()


@pytest.mark.parametrize(
    'door', ['--resume PATH', "MMEngine's Runner", 'DetInferencer of weights alone']
)
def test_the_text_runs_where_it_is_not_left_out(door, armed, case, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, '_drop_config_text', lambda checkpoint, keep_cfg: False)
    with contextlib.suppress(Exception):
        RUN_LATER[door](case, armed)
    assert (tmp_path / 'marker').exists()


# --- the source -----------------------------------------------------------------------------------

READERS = {
    'torch': ('load',), 'torch.jit': ('load',), 'torch.hub': ('load',), 'np': ('load',),
    'numpy': ('load', 'fromfile'),
    'pickle': ('load', 'loads', 'Unpickler'), '_pickle': ('load', 'loads', 'Unpickler'),
    'mmengine': ('load',), 'fileio': ('load',), 'mmengine.fileio': ('load',), 'mmcv': ('load',),
    'joblib': ('load',), 'cloudpickle': ('load', 'loads'), 'dill': ('load', 'loads'),
    'marshal': ('load', 'loads'), 'shelve': ('open',), 'yaml': ('load', 'unsafe_load'),
    'pandas': ('read_pickle',), 'pd': ('read_pickle',), 'scipy.io': ('loadmat',),
    'builtins': ('eval', 'exec'),
}  # fmt: skip
"""What reads more than data. Config.fromfile runs its file too, which is what a config is."""
ANYWHERE = ('load_url', 'load_state_dict_from_url', 'fromstring')


def unsafe_calls(source: str) -> set[str]:
    """The names of a file that read more than data, used or imported."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute):
            owner = ast.unparse(node.value)
            if node.attr in (*READERS.get(owner, ()), *ANYWHERE):
                found.add(f'{owner}.{node.attr}')
        elif isinstance(node, ast.ImportFrom):
            names = {each.name for each in node.names}
            found |= {f'{node.module}.{n}' for n in names & {*READERS.get(node.module, ())}}
        elif isinstance(node, ast.Name) and node.id in READERS['builtins']:
            found.add(node.id)
    return found


@pytest.mark.parametrize(
    'source',
    ['import torch as t\nimport torch\ntorch.load(x)', 'from pickle import loads', 'eval(x)',
     'class A(pickle.Unpickler): pass', 'from mmengine.fileio import load', 'f = np.load'],
)  # fmt: skip
def test_a_reader_of_more_than_data_is_found(source):
    assert unsafe_calls(source)


def test_nothing_else_reads_more_than_data():
    folders = ('mmkd', 'tools', 'benchmarks')
    files = [path for folder in folders for path in ROOT.glob(f'{folder}/**/*.py')]
    found = {
        (str(path.relative_to(ROOT)), name)
        for path in files
        for name in unsafe_calls(path.read_text())
    }
    # The state that a worker of this run has sent.
    assert found - {('mmkd/engine/loader.py', 'pickle.loads')} == {
        # It looks no name up, and is the one by which torch.load reads there.
        ('mmkd/io/reader.py', 'pickle.Unpickler'),
        ('mmkd/io/reader.py', 'torch.load'),
        # A JSON file of MMEngine's own.
        ('mmkd/io/checkpoint.py', 'mmengine.load'),
        # With weights_only=True, the teachers that are shipped.
        ('benchmarks/reliability/teacher_check.py', 'torch.load'),
        # So, too, what it has just written.
        ('benchmarks/reader.py', 'torch.load'),
    }
