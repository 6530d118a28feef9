"""Checks the versions of torch, mmengine, mmcv (with its compiled ops) and mmdet.

mmkd's package metadata requires none of them, since ``pip install -e .`` must not replace installed
versions that work. So :func:`check` runs when mmkd is imported. It reads package metadata and file
names only, which takes a few milliseconds.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import math
import platform
import re
from dataclasses import dataclass
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

__all__ = ['check', 'installed']


@dataclass(frozen=True)
class Range:
    """Versions of one distribution: ``lower <= version < upper`` (None: no upper bound)."""

    distribution: str
    lower: str
    upper: str | None = None

    def __str__(self) -> str:
        return f'{self.distribution}>={self.lower}' + (f',<{self.upper}' if self.upper else '')

    def fault(self, version: str) -> str | None:
        """``'too old'``, ``'too new'`` or None."""
        if _key(version) < _key(self.lower):
            return 'too old'
        # A pre-release of the bound is too new as well: 2.2.0rc1 is no 2.1.
        if self.upper and _key(version)[0] >= _key(self.upper)[0]:
            return 'too new'
        return None


TORCH = Range('torch', '2.6')  # the first whose torch.load reads data alone by default
# Import name -> distribution. The extra `stack` of pyproject.toml has the same ranges.
UPSTREAM = {
    'mmengine': Range('mmengine', '0.10.0', '1'),
    'mmcv': Range('mmcv', '2.0.0rc4', '2.2'),  # mmdet 3.3 refuses mmcv 2.2
    'mmdet': Range('mmdet', '3.3', '3.4'),
}
# The maintained fork, with the same import names.
FORK = {
    'mmengine': Range('onedl-mmengine', '0.10.10', '1'),
    'mmcv': Range('onedl-mmcv', '2.3', '2.4'),
    'mmdet': Range('onedl-mmdetection', '3.5', '3.6'),
}
# Other distributions that install a module of that name.
STRAYS = {'mmcv-lite': 'mmcv', 'mmcv-full': 'mmcv'}


def check() -> None:
    """Check that torch, mmengine, mmcv with its ops and mmdet are installed in versions that fit.

    Raises:
        ImportError: with everything that is missing, too old, too new, built without ops, or mixed
            from upstream and the ``onedl-*`` fork, and the command that repairs it.
    """
    problems = find_problems()
    if problems:
        raise ImportError(
            'mmkd cannot run on the packages installed here:\n'
            + '\n'.join(f'  - {fault}\n    repair it: {command}' for fault, command in problems)
        )


def installed() -> dict[str, str]:
    """The versions of Python, torch and the stack, by distribution."""
    found = {'Python': platform.python_version()}
    found['torch'] = _metadata_version('torch') or _file_version('torch') or 'unknown'
    for module in ('mmdet', 'mmengine', 'mmcv'):
        found |= _providers(module)
    return found


def find_problems() -> list[tuple[str, str]]:
    """Each fault of the installed packages with the command that repairs it."""
    problems = []
    found = {module: _providers(module) for module in UPSTREAM}
    stack = _stack_of(found)

    torch = _metadata_version('torch') or _file_version('torch')
    if torch is None:
        problems.append((f'torch is not installed ({TORCH})', _install(TORCH)))
    elif fault := TORCH.fault(torch):
        command = _install(TORCH)
        if found['mmcv']:  # its ops are linked against the old torch
            command += f' && {_install(stack["mmcv"])}'
        problems.append((f'torch {torch} is {fault} ({TORCH})', command))

    problems += _overlaps(found, stack)
    for module, want in stack.items():
        providers = found[module]
        if not providers:
            problems.append((f'{module} is not installed ({want})', _install(want)))
        elif list(providers) == [want.distribution]:  # _overlaps reports the other cases
            version = providers[want.distribution]
            if fault := want.fault(version):
                fault = f'{want.distribution} {version} is {fault} ({want})'
                problems.append((fault, _install(want)))
            elif _folder(module) is None:
                fault = f'{want.distribution} {version} is installed, but its files are gone'
                problems.append((fault, _install(want, reinstall=True)))
            elif module == 'mmcv' and not _has_ops():
                fault = f'{want.distribution} {version} was built without its compiled ops'
                problems.append((f'{fault} (there is no mmcv._ext)', _install(want)))
    return problems


def _stack_of(found: dict[str, dict[str, str]]) -> dict[str, Range]:
    """Upstream or the fork: whichever mmcv is from, since mmcv takes long to build."""
    anchor = found['mmcv'] or {name: '' for providers in found.values() for name in providers}
    ours = {want.distribution for want in UPSTREAM.values()}
    return FORK if anchor and not ours & set(anchor) and not set(anchor) & set(STRAYS) else UPSTREAM


def _overlaps(found: dict[str, dict[str, str]], stack: dict[str, Range]) -> list[tuple[str, str]]:
    """Distributions that overwrite each other's files or are not from ``stack``."""
    problems = []
    for module, providers in found.items():
        want = stack[module]
        if not providers or list(providers) == [want.distribution]:
            continue
        names = ' and '.join(f'{name} {version}'.strip() for name, version in providers.items())
        if len(providers) > 1:
            fault = f"{names} are both installed and overwrite each other's files in {module}/"
        elif providers.keys() <= STRAYS.keys():
            fault = f'{names} provides {module}: {want} is needed, with its compiled ops'
        else:
            fault = (
                f"{names} is mixed with {stack['mmcv'].distribution}'s stack ({want} is its own)"
            )
        # Uninstall all of them: uninstalling one removes files of the others.
        command = f'pip uninstall -y {" ".join(providers)} && {_install(want, reinstall=True)}'
        problems.append((fault, command))
    return problems


def _providers(module: str) -> dict[str, str]:
    """The installed distributions that provide ``module``, with their versions."""
    names = [UPSTREAM[module].distribution, FORK[module].distribution]
    names += [stray for stray, target in STRAYS.items() if target == module]
    versions = {name: _metadata_version(name) for name in names}
    providers = {name: version for name, version in versions.items() if version is not None}
    if not providers and (version := _file_version(module)):
        providers[names[0]] = version  # a source tree on PYTHONPATH
    return providers


def _metadata_version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _file_version(module: str) -> str | None:
    """``__version__`` in ``module/version.py``, read without importing it."""
    folder = _folder(module)
    if folder is None or not (folder / 'version.py').exists():
        return None
    text = (folder / 'version.py').read_text(encoding='utf-8')
    match = re.search(r"^__version__\b[^=\n]*=\s*['\"]([^'\"]+)", text, flags=re.MULTILINE)
    return match[1] if match else None


def _folder(module: str) -> Path | None:
    """The folder that ``import module`` would read, else None."""
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:  # no origin: a bare folder of that name
        return None
    return Path(spec.origin).parent


def _has_ops() -> bool:
    folder = _folder('mmcv')
    return folder is not None and any(
        (folder / f'_ext{end}').exists() for end in EXTENSION_SUFFIXES
    )


def _key(version: str) -> tuple[tuple[int, ...], float]:
    """Sort key of a version: three numbers and the release candidate (infinity for a release).

    Other suffixes are ignored: ``2.3.0a0+git12`` in a vendor's image is torch 2.3.
    """
    match = re.match(r'(\d+)(?:\.(\d+))?(?:\.(\d+))?(?:rc(\d+))?', version)
    if match is None:
        raise ImportError(f'cannot read the version {version!r} of an installed package')
    major, minor, micro, candidate = match.groups()
    return (int(major), int(minor or 0), int(micro or 0)), float(candidate or math.inf)


def _install(want: Range, reinstall: bool = False) -> str:
    """The pip command that installs ``want``; ``reinstall``: even if pip finds it installed."""
    if want.distribution in (UPSTREAM['mmcv'].distribution, FORK['mmcv'].distribution):
        # An isolated build finds no torch and builds no ops; the cache may contain such a wheel.
        # -O3 is not the default; -g0 halves the time.
        return (
            'pip install "setuptools<81" wheel ninja psutil && '
            'CFLAGS="-O3 -DNDEBUG -g0 -w" MMCV_WITH_OPS=1 pip install --no-build-isolation '
            f'--no-deps --force-reinstall --no-cache-dir "{want}"'
        )
    return f'pip install {"--force-reinstall --no-deps " if reinstall else ""}"{want}"'
