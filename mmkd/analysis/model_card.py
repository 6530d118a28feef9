"""The model card of a published student: what it is, what taught it, how good it is, how large."""

from __future__ import annotations

import contextlib
import io
import os
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.logging import MMLogger

from ..recipe import dicts, terms_on
from ..version import __version__
from .comparison.measure import measure
from .comparison.plan import file_digest
from .comparison.results import read_results


def model_card(
    weights: Path, plain: Path, cfg: Config, meta: dict, results: Path | None = None
) -> str:
    """A model card in Markdown.

    Args:
        weights: the published weights.
        plain: the plain student's config, beside them.
        cfg: the config that the student was trained with.
        meta: ``meta`` of the checkpoint.
        results: the results file of a comparison that the run belongs to.
    """
    lines = [
        f'# {weights.stem}',
        '',
        f'A detector for MMDetection 3: `init_detector({plain.name!r}, {weights.name!r})`.',
        '',
        *_table(_about(cfg, Config.fromfile(plain).model.type, meta)),
    ]
    distillation = cfg.model.get('distillation') or {}
    if terms_on(distillation) or distillation.get('unlabelled'):
        lines += ['', '## What taught it', '', *_table(_teacher(cfg.model))]
        lines += ['', '```python', _recipe(cfg.model['distillation']), '```']
    lines += ['', '## Size and speed', '', *_table(_size(plain, weights))]
    if results is not None:
        lines += ['', '## Results', '', *_results(results)]
    lines += ['', f'Written by mmkd {__version__}.']
    return '\n'.join(lines) + '\n'


def _table(rows: Iterator[tuple[str, str]]) -> list[str]:
    cells = (f'| {name} | {str(value).replace("|", chr(92) + "|")} |' for name, value in rows)
    return ['| | |', '| --- | --- |', *cells]


def _about(cfg: Config, detector: str, meta: dict) -> Iterator[tuple[str, str]]:
    yield 'detector', detector
    classes = (meta.get('dataset_meta') or {}).get('classes') or ()
    if classes:
        shown = ', '.join(classes[:20]) + (', …' if len(classes) > 20 else '')
        yield f'classes ({len(classes)})', shown
    found = (data.get('ann_file') for data in dicts(cfg.get('train_dataloader')))
    files = sorted({file for file in found if isinstance(file, str)})
    if files:
        yield 'training data', ', '.join(f'`{file}`' for file in files)
    if 'epoch' in meta or 'iter' in meta:
        yield 'trained for', f'{meta.get("epoch", "?")} epochs, {meta.get("iter", "?")} iterations'
    for key, name in (('seed', 'seed'), ('time', 'saved'), ('mmengine_version', 'MMEngine')):
        if meta.get(key) is not None:
            yield name, str(meta[key])


def _teacher(model: Any) -> Iterator[tuple[str, str]]:
    config = model.get('teacher_config')
    yield 'config', f'`{_public(config)}`' if isinstance(config, str) else 'written in the pair'
    checkpoint = str(model.get('teacher_ckpt'))
    yield 'checkpoint', f'`{_public(checkpoint)}`'
    if model.get('teacher_sha256'):
        yield 'its SHA-256', f'{model["teacher_sha256"]} (enforced)'
    elif Path(checkpoint).is_file():
        yield 'its SHA-256', file_digest(checkpoint)
    resolution = model['distillation'].get('resolution')
    if resolution:
        yield 'scale', f'teacher {resolution["teacher"]}, student {resolution["student"]}'


def _public(path: str) -> str:
    """A path relative to the current folder where it lies below, else the file's name alone."""
    if not os.path.isabs(path):
        return path
    short = os.path.relpath(path)
    return os.path.basename(path) if short.startswith('..') else short


def _recipe(distillation: Any) -> str:
    return Config({'distillation': dict(distillation)}).pretty_text.strip()


def _size(plain: Path, weights: Path) -> Iterator[tuple[str, str]]:
    yield 'file', f'{weights.stat().st_size / 1e6:.1f} MB'
    logger = MMLogger.get_current_instance()
    level = logger.level
    try:
        logger.setLevel('ERROR')  # a line for each operator that is not counted
        with contextlib.redirect_stdout(io.StringIO()):
            found = measure(str(plain), str(weights))
    except Exception as error:  # the test images may be elsewhere, the network anybody's
        reason = f'{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ""}'
        yield 'not measured', reason[:200]
        return
    finally:
        logger.setLevel(level)
    yield 'parameters', f'{found["params"] / 1e6:.2f} M'
    if found.get('gflops') is not None:
        yield 'GFLOPs', f'{found["gflops"]:.3g} (multiply-adds, mean over test images)'
    yield 'speed', f'{found["images_per_second"]:.1f} images/s, one at a time ({found["device"]})'


def _results(path: Path) -> list[str]:
    groups: dict[tuple[str, str], list[float]] = {}
    for run in read_results(path).runs.values():
        groups.setdefault((run['label'], run['split']), []).append(100 * run['metrics']['mAP'])
    lines = ['| network | split | runs | mAP |', '| --- | --- | --- | --- |']
    for (label, split), values in groups.items():
        spread = f' ± {statistics.stdev(values):.1f}' if len(values) > 1 else ''
        lines.append(
            f'| {label} | {split} | {len(values)} | {statistics.mean(values):.1f}{spread} |'
        )
    return [*lines, '', f'From `{path.name}` of `compare`: mean ± standard deviation over runs.']
