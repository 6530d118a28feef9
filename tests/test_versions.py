"""mmkd.versions: what is installed is judged by metadata and file names alone."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import subprocess
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from types import SimpleNamespace

import pytest

from mmkd import versions

if sys.version_info >= (3, 11):
    import tomllib

ROOT = Path(__file__).parents[1]
GOOD = {'torch': '2.13.0+cpu', 'mmengine': '0.10.7', 'mmcv': '2.1.0', 'mmdet': '3.3.0'}
FORK = {
    'torch': '2.12.0',
    'onedl-mmengine': '0.10.12',
    'onedl-mmcv': '2.3.6',
    'onedl-mmdetection': '3.5.1',
}
MODULE = {
    'onedl-mmengine': 'mmengine',
    'onedl-mmcv': 'mmcv',
    'onedl-mmdetection': 'mmdet',
    'mmcv-lite': 'mmcv',
    'mmcv-full': 'mmcv',
}
BUILD_MMCV = '--no-build-isolation --no-deps --force-reinstall --no-cache-dir'


@pytest.fixture
def installed(monkeypatch, tmp_path):
    """Pretend that exactly the given distributions are installed."""

    def pretend(given: dict[str, str], ops: bool = True, files: bool = True) -> None:
        def version(name: str) -> str:
            if name not in given:
                raise importlib.metadata.PackageNotFoundError(name)
            return given[name]

        def find_spec(name: str) -> SimpleNamespace | None:
            folder = tmp_path / name
            if not (folder / '__init__.py').exists():
                return None
            return SimpleNamespace(origin=str(folder / '__init__.py'))

        if files:
            for name in given:
                folder = tmp_path / MODULE.get(name, name)
                folder.mkdir(exist_ok=True)
                (folder / '__init__.py').touch()
                if folder.name == 'mmcv' and ops:
                    (folder / f'_ext{EXTENSION_SUFFIXES[0]}').touch()
        monkeypatch.setattr(importlib.metadata, 'version', version)
        monkeypatch.setattr(importlib.util, 'find_spec', find_spec)

    return pretend


@pytest.mark.parametrize(
    'given',
    [
        GOOD,
        FORK,
        GOOD | {'torch': '2.6.0'},
        GOOD | {'torch': '2.6.0a0+git12ab'},
        GOOD | {'mmcv': '2.0.0rc4'},
        GOOD | {'mmcv': '2.1.99'},
        GOOD | {'mmengine': '0.10.0'},
    ],
)
def test_a_stack_that_fits_passes(installed, given):
    installed(given)
    assert versions.find_problems() == []
    assert versions.check() is None


@pytest.mark.parametrize(
    ('change', 'fault', 'command'),
    [
        ({'torch': None}, 'torch is not installed (torch>=2.6)', 'pip install "torch>=2.6"'),
        ({'mmdet': None}, 'mmdet is not installed (mmdet>=3.3,<3.4)', '"mmdet>=3.3,<3.4"'),
        ({'mmcv': None}, 'mmcv is not installed (mmcv>=2.0.0rc4,<2.2)', BUILD_MMCV),
        ({'mmengine': '0.9.1'}, 'mmengine 0.9.1 is too old', '"mmengine>=0.10.0,<1"'),
        ({'mmengine': '1.0.0rc1'}, 'mmengine 1.0.0rc1 is too new', '"mmengine>=0.10.0,<1"'),
        ({'mmcv': '2.0.0rc3'}, 'mmcv 2.0.0rc3 is too old', BUILD_MMCV),
        ({'mmcv': '1.7.2'}, 'mmcv 1.7.2 is too old', BUILD_MMCV),
        ({'mmcv': '2.2.0'}, 'mmcv 2.2.0 is too new', '"mmcv>=2.0.0rc4,<2.2"'),
        ({'mmcv': '2.2.0rc1'}, 'mmcv 2.2.0rc1 is too new', '"mmcv>=2.0.0rc4,<2.2"'),
        ({'mmdet': '3.2.0'}, 'mmdet 3.2.0 is too old', '"mmdet>=3.3,<3.4"'),
        ({'mmdet': '3.4.0'}, 'mmdet 3.4.0 is too new', '"mmdet>=3.3,<3.4"'),
        (
            {'mmcv': None, 'mmcv-lite': '2.1.0'},
            'mmcv-lite 2.1.0 provides mmcv',
            'pip uninstall -y mmcv-lite && ',
        ),
        (
            {'mmcv': None, 'mmcv-full': '1.7.2'},
            'mmcv-full 1.7.2 provides mmcv',
            'pip uninstall -y mmcv-full && ',
        ),
        (
            {'mmcv-lite': '2.1.0'},
            'mmcv 2.1.0 and mmcv-lite 2.1.0 are both installed',
            'pip uninstall -y mmcv mmcv-lite && ',
        ),
        # a stray `pip install` of the fork's detector beside upstream, and over it
        (
            {'mmdet': None, 'onedl-mmdetection': '3.5.1'},
            "onedl-mmdetection 3.5.1 is mixed with mmcv's stack (mmdet>=3.3,<3.4 is its own)",
            'pip uninstall -y onedl-mmdetection && '
            'pip install --force-reinstall --no-deps "mmdet>=3.3,<3.4"',
        ),
        (
            {'onedl-mmdetection': '3.5.1'},
            'mmdet 3.3.0 and onedl-mmdetection 3.5.1 are both installed and overwrite',
            'pip uninstall -y mmdet onedl-mmdetection && ',
        ),
    ],
)
def test_one_fault_in_upstream(installed, change, fault, command):
    installed({name: v for name, v in (GOOD | change).items() if v is not None})
    problems = versions.find_problems()
    assert len(problems) == 1, problems
    assert problems[0][0].startswith(fault)
    assert command in problems[0][1]
    with pytest.raises(ImportError) as error:
        versions.check()
    assert problems[0][0] in str(error.value)
    assert problems[0][1] in str(error.value)


@pytest.mark.parametrize(
    ('change', 'fault', 'command'),
    [
        # upstream's detector on the fork's mmcv: the fork is completed, for mmcv takes longest
        (
            {'onedl-mmdetection': None, 'mmdet': '3.3.0'},
            "mmdet 3.3.0 is mixed with onedl-mmcv's stack (onedl-mmdetection>=3.5,<3.6 is its own)",
            'pip uninstall -y mmdet && '
            'pip install --force-reinstall --no-deps "onedl-mmdetection>=3.5,<3.6"',
        ),
        (
            {'onedl-mmengine': None, 'mmengine': '0.10.7'},
            "mmengine 0.10.7 is mixed with onedl-mmcv's stack",
            '"onedl-mmengine>=0.10.10,<1"',
        ),
        ({'onedl-mmdetection': None}, 'mmdet is not installed (onedl-mmdetection', 'onedl-mmdet'),
        ({'onedl-mmcv': '2.2.0'}, 'onedl-mmcv 2.2.0 is too old', '"onedl-mmcv>=2.3,<2.4"'),
    ],
)
def test_one_fault_in_the_fork(installed, change, fault, command):
    installed({name: v for name, v in (FORK | change).items() if v is not None})
    problems = versions.find_problems()
    assert len(problems) == 1, problems
    assert problems[0][0].startswith(fault)
    assert command in problems[0][1]


@pytest.mark.parametrize(('given', 'name'), [(GOOD, 'mmcv'), (FORK, 'onedl-mmcv')])
def test_mmcv_without_ops(installed, given, name):
    installed(given, ops=False)
    ((fault, command),) = versions.find_problems()
    assert fault == (
        f'{name} {given[name]} was built without its compiled ops (there is no mmcv._ext)'
    )
    assert 'MMCV_WITH_OPS=1' in command
    assert BUILD_MMCV in command


def test_ops_of_another_python_do_not_count(installed, tmp_path):
    installed(GOOD, ops=False)
    (tmp_path / 'mmcv' / '_ext.cpython-27-other.so').touch()
    assert [fault for fault, _ in versions.find_problems() if 'compiled ops' in fault]


def test_a_new_torch_takes_a_new_mmcv_along(installed):
    installed(GOOD | {'torch': '1.13.1'})
    ((fault, command),) = versions.find_problems()
    assert fault == 'torch 1.13.1 is too old (torch>=2.6)'
    assert command.startswith('pip install "torch>=2.6" && ')
    assert BUILD_MMCV in command


def test_everything_missing_is_told_at_once_in_the_order_to_install(installed):
    installed({})
    with pytest.raises(ImportError) as error:
        versions.check()
    places = [
        str(error.value).index(f'{m} is not installed')
        for m in ('torch', 'mmengine', 'mmcv', 'mmdet')
    ]
    assert places == sorted(places)
    assert str(error.value).count('repair it:') == 4


def test_metadata_without_files(installed):
    installed(GOOD, files=False)
    problems = versions.find_problems()
    assert [fault for fault, _ in problems] == [
        'mmengine 0.10.7 is installed, but its files are gone',
        'mmcv 2.1.0 is installed, but its files are gone',
        'mmdet 3.3.0 is installed, but its files are gone',
    ]
    assert all('--force-reinstall' in command for _, command in problems)


@pytest.mark.parametrize(('spelt', 'faults'), [('3.3.0', 0), ('3.2.0', 1)])
def test_a_source_tree_without_metadata_is_read(installed, tmp_path, spelt, faults):
    installed({name: v for name, v in GOOD.items() if name != 'mmdet'})
    (tmp_path / 'mmdet').mkdir()
    (tmp_path / 'mmdet' / '__init__.py').touch()
    (tmp_path / 'mmdet' / 'version.py').write_text(f"# v\n\n__version__ = '{spelt}'\n")
    problems = versions.find_problems()
    assert [fault for fault, _ in problems] == ['mmdet 3.2.0 is too old (mmdet>=3.3,<3.4)'] * faults


def test_an_unreadable_version_is_named(installed):
    installed(GOOD | {'mmdet': 'main'})
    with pytest.raises(ImportError, match="version 'main'"):
        versions.check()


def test_quick_and_importing_nothing():
    """In a process of its own, by path: `import mmkd` goes on to import the stack."""
    code = f"""
import importlib.util, sys
spec = importlib.util.spec_from_file_location("stack", {str(ROOT / 'mmkd/versions.py')!r})
stack = sys.modules["stack"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(stack)
stack.check()
print(sorted({{"torch", "mmengine", "mmcv", "mmdet"}} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    assert done.stdout == '[]\n'

    # Counted, for a clock tells of the machine and its load: 75,000 calls take about 50 ms.
    calls = 0

    def count(frame: object, event: str, argument: object) -> None:
        nonlocal calls
        calls += event in ('call', 'c_call')

    before = sys.getprofile()
    sys.setprofile(count)
    try:
        versions.check()
    finally:
        sys.setprofile(before)
    assert 0 < calls < 75_000


@pytest.mark.skipif(sys.version_info < (3, 11), reason='tomllib came with Python 3.11')
def test_the_extra_says_the_same_ranges():
    project = tomllib.loads((ROOT / 'pyproject.toml').read_text())['project']
    extra = project['optional-dependencies']['stack']
    for want in (versions.TORCH, *versions.UPSTREAM.values()):
        assert str(want) in extra


@pytest.mark.parametrize(
    ('file', 'wanted'),
    [
        ('requirements.txt', (versions.TORCH, *versions.UPSTREAM.values())),
        ('requirements-onedl.txt', versions.FORK.values()),
    ],
    ids=['upstream', 'onedl'],
)
def test_the_tested_pins_are_in_range(file, wanted):
    lines = (ROOT / file).read_text().splitlines()
    pins = dict(line.split('==') for line in lines if '==' in line)
    for want in wanted:
        assert want.fault(pins[want.distribution]) is None
