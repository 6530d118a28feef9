"""Set-up: what it refuses, what it repairs, and that the package leaves an installed stack alone.

tools/setup.sh runs here in a copy of its own with a stand-in for Python, so nothing is downloaded,
compiled or installed.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Plays the base interpreter and, once copied there by `-m venv`, the one in .venv. Files beside
# the checkout's Makefile are its memory: calls, mmcv (the installed version), ops (they load).
STAND_IN = r"""#!/usr/bin/env bash
printf '%s\n' "$*" >>calls
for lack in $LACKS; do
    case "$*" in *"$lack"*) exit 1 ;; esac
done
case "$*" in
*"-m venv"*) mkdir -p "${!#}/bin" && cp "$0" "${!#}/bin/python" ;;
*" install "*mmcv==*)
    [[ $PIP_FAILS == mmcv ]] && { echo "ninja: build stopped"; exit 1; }
    echo 2.1.0 >mmcv
    echo "pip got CFLAGS=$CFLAGS MMCV_WITH_OPS=$MMCV_WITH_OPS MAX_JOBS=$MAX_JOBS" >>calls
    if [[ $OPS == always || ($OPS == rebuilt && "$*" == *--force-reinstall*) ]]; then touch ops; fi
    ;;
*'mmcv")'*) cat mmcv ;;
*is_available*CUDA_HOME* | *is_available*) exit 1 ;;
-) [[ -e ops ]] || { echo "built without its ops"; exit 1; } ;;
*'print("%d.%d"'*) echo 3.11 ;;
*--version*) echo "Python 3.11.2" ;;
esac
"""


@pytest.fixture
def checkout(tmp_path):
    """A copy of what set-up reads, with the stand-in as the interpreter to use."""
    folder = tmp_path / 'checkout'
    (folder / 'tools').mkdir(parents=True)
    requirements = ('requirements.txt', 'requirements-onedl.txt')
    for name in ('Makefile', *requirements, 'pyproject.toml', 'tools/setup.sh'):
        shutil.copy(ROOT / name, folder / name)
    python = tmp_path / 'python-stand-in'
    python.write_text(STAND_IN)
    python.chmod(0o755)

    def run(command: str = 'bash tools/setup.sh stamp', **env: str) -> subprocess.CompletedProcess:
        settings = {'MMKD_PYTHON': str(python), 'LACKS': '', 'OPS': 'always', 'PIP_FAILS': ''}
        inherited = {name: v for name, v in os.environ.items() if not name.startswith('MAKE')}
        return subprocess.run(
            ['bash', '-c', command],
            cwd=folder,
            env={**inherited, **settings, **env},
            capture_output=True,
            text=True,
            timeout=600,
        )

    run.folder = folder
    return run


def calls(checkout) -> list[str]:
    return (checkout.folder / 'calls').read_text().splitlines()


@pytest.mark.parametrize(
    ('env', 'lacks', 'package'),
    [
        ({'LACKS': 'ensurepip'}, 'the venv and ensurepip modules', 'python3-venv'),
        ({'LACKS': 'Python.h'}, 'the header Python.h', 'python3-dev'),
        ({'LACKS': 'libGL.so.1'}, "the shared library libGL.so.1 (OpenCV's", 'libgl1'),
        ({'LACKS': 'libgthread-2.0.so.0'}, 'libgthread-2.0.so.0', 'libglib2.0-0'),
        ({'LACKS': 'libxcb.so.1'}, 'libxcb.so.1', 'libxcb1'),
        ({'CXX': 'no-such-compiler'}, 'a working C++ compiler (no-such-compiler;', 'g++ libc6-dev'),
    ],
)
def test_what_the_machine_lacks_stops_set_up_at_once(checkout, env, lacks, package):
    done = checkout(**env)
    assert done.returncode == 1
    assert lacks in done.stderr
    assert f'On Debian: apt-get install {package}\n' in done.stderr
    assert not (checkout.folder / '.venv').exists()
    assert not (checkout.folder / 'stamp').exists()
    assert not any('-m pip' in call for call in calls(checkout))


def test_everything_the_machine_lacks_is_told_in_one_message(checkout):
    done = checkout(LACKS='ensurepip Python.h libGL libglib', CXX='no-such-compiler')
    assert done.returncode == 1
    assert done.stderr.count('        - ') == 5
    line = 'apt-get install g++ libc6-dev libgl1 libglib2.0-0 python3-dev python3-venv\n'
    assert line in done.stderr


def test_a_compiler_without_headers_does_not_pass(checkout, tmp_path):
    compiler = tmp_path / 'g++'
    compiler.write_text("#!/bin/sh\necho 'fatal error: vector: No such file' >&2; exit 1\n")
    compiler.chmod(0o755)
    done = checkout(PATH=f'{tmp_path}:{os.environ["PATH"]}', CXX='')
    assert done.returncode == 1
    assert 'a working C++ compiler (g++; building mmcv)' in done.stderr


def test_another_python_is_refused_by_name(checkout):
    done = checkout(MMKD_PYTHON='/no/python3.9')
    assert done.returncode == 1
    assert 'MMKD_PYTHON=/no/python3.9 is no Python 3.11 or 3.12' in done.stderr


def test_no_python_at_all(checkout, tmp_path):
    tools = tmp_path / 'bin'
    tools.mkdir()
    for name in ('bash', 'dirname', 'flock', 'grep', 'sort', 'tr', 'g++', 'env'):
        (tools / name).symlink_to(shutil.which(name))
    done = checkout(MMKD_PYTHON='', PATH=str(tools))
    assert done.returncode == 1
    assert '- Python 3.11 or 3.12 (found: none)' in done.stderr
    assert 'python3 python3-dev python3-venv' in done.stderr


def test_the_fork_has_an_environment_of_its_own(checkout):
    done = checkout('make -s setup STACK=onedl')
    assert done.returncode == 0, done.stderr
    assert not (checkout.folder / '.venv').exists()
    installs = [call for call in calls(checkout) if ' install ' in call]
    assert ' onedl-mmcv==' in installs[2]
    assert installs[3].endswith('install -r .venv-onedl/requirements.txt')
    pinned = (checkout.folder / '.venv-onedl/requirements.txt').read_text()
    names = {line.split('==')[0] for line in pinned.splitlines() if '==' in line}
    assert {'onedl-mmengine', 'onedl-mmcv', 'onedl-mmdetection', 'torch', 'pytest'} <= names
    assert names.isdisjoint({'mmengine', 'mmcv', 'mmdet'})


def test_a_stack_that_is_none_is_refused(checkout):
    done = checkout('make setup STACK=upsteam')
    assert done.returncode != 0
    assert 'MMKD_STACK=upsteam: the stacks are upstream and onedl' in done.stderr


def test_a_fresh_set_up_builds_mmcv_with_its_ops(checkout):
    done = checkout()
    assert done.returncode == 0, done.stderr
    assert (checkout.folder / 'stamp').exists()
    assert 'minutes on 2 cores' in done.stdout
    installs = [call for call in calls(checkout) if ' install ' in call]
    steps = ['setuptools==', 'torch==', 'mmcv==', '-r requirements.txt', '--editable .']
    assert [step for step, call in zip(steps, installs, strict=True) if step in call] == steps
    assert '--no-build-isolation --no-deps mmcv==2.1.0' in installs[2]
    assert '--no-deps --no-build-isolation --editable .' in installs[4]
    # Without -O3 the ops are slow; the cache stays on, it makes the next set-up quick.
    (flags,) = [call for call in calls(checkout) if call.startswith('pip got')]
    assert re.fullmatch(
        r'pip got CFLAGS=-O3 -DNDEBUG -g0 -w MMCV_WITH_OPS=1 MAX_JOBS=[1-9]\d*', flags
    )
    assert not any('no-cache' in call or 'force-reinstall' in call for call in calls(checkout))


def test_an_mmcv_with_ops_is_kept(checkout):
    (checkout.folder / 'mmcv').write_text('2.1.0\n')
    (checkout.folder / 'ops').touch()
    assert checkout().returncode == 0
    assert not any('mmcv==' in call for call in calls(checkout))


@pytest.mark.parametrize('there', ['installed', "in pip's cache"])
def test_an_mmcv_without_ops_is_replaced(checkout, there):
    if there == 'installed':
        (checkout.folder / 'mmcv').write_text('2.1.0\n')
    done = checkout(OPS='rebuilt')
    assert done.returncode == 0, done.stderr
    assert 'has no working ops: it is replaced' in done.stdout
    at = [i for i, call in enumerate(calls(checkout)) if 'cache remove mmcv' in call]
    builds = [call for call in calls(checkout)[at[0] :] if 'mmcv==2.1.0' in call]
    assert len(at) == len(builds) == 1
    assert '--force-reinstall --no-binary mmcv mmcv==2.1.0' in builds[0]
    assert (checkout.folder / 'stamp').exists()


def test_it_never_ends_with_an_mmcv_without_ops(checkout):
    done = checkout(OPS='never')
    assert done.returncode == 1
    assert 'mmcv was built, but its ops do not load' in done.stderr
    assert 'built without its ops' in done.stderr
    assert not (checkout.folder / 'stamp').exists()


def test_a_failing_build_stops_with_its_output(checkout):
    done = checkout(PIP_FAILS='mmcv')
    assert done.returncode == 1
    assert 'ninja: build stopped' in done.stderr
    assert 'mmcv==2.1.0: failed (exit status 1)' in done.stderr
    assert not any('requirements.txt' in call for call in calls(checkout))
    assert not (checkout.folder / 'stamp').exists()


def test_make_sets_up_once_and_again_when_a_pin_changes(checkout):
    env = {'PYTHON': str(checkout.folder.parent / 'python-stand-in')}
    first = checkout('make setup', **env)
    assert first.returncode == 0, first.stderr
    assert 'set-up done' in first.stdout
    assert 'setup.sh' not in checkout('make -n test', **env).stdout
    with (checkout.folder / 'requirements.txt').open('a') as file:
        file.write('left-pad==1.0\n')
    for target in ('demo', 'demo-full', 'test', 'test-all', 'lint'):
        assert 'bash tools/setup.sh' in checkout(f'make -n {target}', **env).stdout


@pytest.mark.parametrize(('status', 'ok'), [(0, True), (1, False), (5, False)])
def test_ci_fails_when_the_tests_fail_or_there_are_none(tmp_path, status, ok):
    (tmp_path / '.ci').mkdir()
    shutil.copy(ROOT / '.ci/run', tmp_path / '.ci/run')
    (tmp_path / 'Makefile').write_text(f'test:\n\t@exit {status}\n')
    done = subprocess.run([tmp_path / '.ci/run'], capture_output=True, text=True)
    assert (done.returncode == 0) is ok


def test_installing_the_package_pulls_nothing_at_all(tmp_path):
    """Resolved as on an empty machine, so that a dependency would show (or fail: no index)."""
    shutil.copytree(ROOT / 'mmkd', tmp_path / 'mmkd', ignore=shutil.ignore_patterns('__pycache__'))
    shutil.copy(ROOT / 'pyproject.toml', tmp_path)
    done = subprocess.run(
        [sys.executable, '-m', 'pip', 'install', '--quiet', '--dry-run', '--ignore-installed']
        + ['--no-index', '--no-build-isolation', '--report', '-', str(tmp_path)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert [item['metadata']['name'] for item in report['install']] == ['mmkd']
    required = report['install'][0]['metadata'].get('requires_dist', [])
    assert [line for line in required if 'extra ==' not in line] == []
    names = {re.match(r'[\w-]+', line)[0] for line in required}
    assert names >= {'torch', 'mmcv', 'mmengine', 'mmdet'}


def test_every_requirement_is_pinned_once():
    lines = (ROOT / 'requirements.txt').read_text().splitlines()
    pins = [line for line in lines if line and not line.startswith('#')]
    assert [line for line in pins if not re.fullmatch(r'[\w.-]+==[\w.]+', line)] == []
    names = [re.sub(r'[-_.]+', '-', line.split('==')[0]).lower() for line in pins]
    assert len(names) == len(set(names))
