"""Plants a wrong teacher on digits drawn anew, and shows right ones beside them.

python benchmarks/reliability/teacher_check.py --json teacher_check.json
"""

import argparse
import contextlib
import io
import random
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from mmdet.registry import MODELS
from mmdet.utils import register_all_modules
from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.runner import Runner

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / 'tests'), str(ROOT / 'tools')]

import faults  # noqa: E402
import make_digits  # noqa: E402
from campaign import report  # noqa: E402

from mmkd.datasets.two_views import apply_resolution  # noqa: E402
from mmkd.engine.class_names import apply_classes  # noqa: E402
from mmkd.engine.teacher_check import check_teacher  # noqa: E402
from mmkd.recipe import TeacherError, terms_on  # noqa: E402

CONFIGS = {
    'Faster R-CNN': 'mmkd.py',
    'Cascade R-CNN': 'pairs/from_cascade.py',
    'large images': 'large_to_half.py',
}
SIZES: dict[str, dict] = {
    'large images': dict(size=192, digits=(4, 10), heights=(14.0, 60.0)),
}
"""Of the images, as ``make demo-resolution`` draws them; 96 pixels without."""
IMAGES = 520
FLIPS = [dict(type='RandomFlip', prob=[0.4, 0.3], direction=['horizontal', 'vertical'])]
COLOURS = [dict(type='PhotoMetricDistortion')]


def pixels(**values) -> Callable:
    """Another data_preprocessor in teacher_config."""

    def plant(cfg: Config, directory: Path) -> None:
        faults._pixels(**values)(cfg)

    return plant


def weights(change: Callable) -> Callable:
    """Other weights in teacher_ckpt."""

    def plant(cfg: Config, directory: Path) -> None:
        state = torch.load(cfg.model.teacher_ckpt, weights_only=True)['state_dict']
        config = Config.fromfile(cfg.model.teacher_config)
        path = directory / 'teacher.pth'
        torch.save({'state_dict': change(state, config)}, path)
        cfg.model.teacher_ckpt = str(path)

    return plant


def untrained(state: dict, config: Config) -> dict:
    """What the network had before it was trained."""
    network = MODELS.build(config.model)
    network.init_weights()
    return network.state_dict()


def untrained_backbone(state: dict, config: Config) -> dict:
    """The same for the backbone alone."""
    fresh = untrained(state, config)
    return {**state, **{k: v for k, v in fresh.items() if k.startswith('backbone.')}}


def rolled(state: dict, config: Config) -> dict:
    """The classes in another order: each digit is called the next one."""
    changed = {}
    for name, value in state.items():
        found = re.search(r'bbox_head.*fc_(cls|reg)', name)
        each = 4 if found and found[1] == 'reg' else 1
        if found and len(value) > 10:  # class-agnostic regression has 4 rows
            blocks = value[: 10 * each].unflatten(0, (10, each)).roll(1, 0).flatten(0, 1)
            value = torch.cat([blocks, value[10 * each :]])
        changed[name] = value
    return changed


def noisy(strength: float) -> Callable:
    """A weak teacher: each weight is multiplied by 1 + noise."""

    def change(state: dict, config: Config) -> dict:
        return {
            k: v * (1 + strength * torch.randn(v.shape)) if v.dim() > 1 else v
            for k, v in state.items()
        }

    return change


def augmented(transforms: list[dict]) -> Callable:
    """More transforms before the last of the training pipeline."""

    def plant(cfg: Config, directory: Path) -> None:
        cfg.train_dataloader.dataset.pipeline[-1:-1] = transforms

    return plant


PLANTED: dict[str, tuple[str, Callable]] = {
    'channels swapped': ('with the other channel order', pixels(bgr_to_rgb=False)),
    'mean 0': ('with RGB, mean .123', pixels(mean=[0.0] * 3)),
    'std 1': ('with RGB, mean .123', pixels(std=[1.0] * 3)),
    'mean 0, std 1': ('with RGB, mean .123', pixels(mean=[0.0] * 3, std=[1.0] * 3)),
    'untrained': ('wrong checkpoint', weights(untrained)),
    'untrained backbone': ('wrong checkpoint', weights(untrained_backbone)),
    'class order': ('if its classes stood in another order', weights(rolled)),
}
RIGHT: dict[str, Callable | None] = {
    'as it is': None,
    'flipped images': augmented(FLIPS),
    'flipped, coloured images': augmented([*COLOURS, *FLIPS]),
    'weak (noise 0.3)': weights(noisy(0.3)),
    'weak (noise 0.5)': weights(noisy(0.5)),
}
"""Nothing is to be said of these. Flips turn digits into what their teacher never saw."""


class Case:
    """One teacher on one set of images.

    Args:
        path: of the config.
        data: root of the images; None leaves what the config says.
        plant: what is done to the config; it may write beside the images.
    """

    def __init__(self, path: Path, data: Path | None, plant: Callable | None) -> None:
        self.cfg = Config.fromfile(path)
        if data:
            self.cfg.train_dataloader.dataset.data_root = f'{data}/'
            if plant:
                plant(self.cfg, data)
        self.cfg = apply_classes(apply_resolution(self.cfg))

    def run(self) -> tuple[str, str, float]:
        """'stopped', 'warned' or 'went on', what was said, and seconds."""
        heard = faults.Heard()
        logger = MMLogger.get_current_instance()
        with contextlib.redirect_stdout(io.StringIO()):
            model = MODELS.build(self.cfg.model)
            loader = Runner.build_dataloader(self.cfg.train_dataloader)
        logger.addHandler(heard)
        start = time.perf_counter()
        try:
            said = check_teacher(model, loader)
        except TeacherError as error:
            return 'stopped', str(error), time.perf_counter() - start
        finally:
            logger.removeHandler(heard)
        took = time.perf_counter() - start
        return ('warned', heard.said[0], took) if heard.said else ('went on', said, took)


def cases(seeds: list[int], directory: Path):
    """(id, regular expression of what is to be said or None, case) of each."""
    for seed in seeds:
        for teacher, config in CONFIGS.items():
            options = dict(dict(size=96), **SIZES.get(teacher, {}))
            data = directory / f'{options["size"]}-{seed}'
            with contextlib.redirect_stdout(io.StringIO()):
                make_digits.make(data, train=IMAGES, val=1, test=1, seed=seed, **options)
            for name, says, plant in [
                *((name, *each) for name, each in PLANTED.items()),
                *((name, None, plant) for name, plant in RIGHT.items()),
            ]:
                for package in (torch, np.random, random):
                    getattr(package, 'manual_seed', getattr(package, 'seed', None))(seed)
                case = Case(ROOT / 'configs/digits' / config, data, plant)
                yield f'{teacher}, {name}, seed {seed}', says, case
    for path in sorted((ROOT / 'configs/digits').rglob('*.py')):
        model = Config.fromfile(path).get('model') or {}
        # A start without terms asks its teacher nothing.
        if 'teacher_ckpt' in model and terms_on(model['distillation']):
            yield f'shipped: {path.relative_to(ROOT)}', None, Case(path, None, None)


def main() -> int:
    parser = argparse.ArgumentParser(description='Plants wrong teachers and looks for false alarms')
    parser.add_argument('--json', help='where the result goes')
    parser.add_argument(
        '--seeds', type=int, nargs='+', default=[*range(401, 404)],
        help='of the images; 11 to 14, 101 to 104, 201 to 204, 301 to 306 chose rule and time',
    )  # fmt: skip
    args = parser.parse_args()
    register_all_modules()
    torch.set_num_threads(1)
    MMLogger.get_instance('teacher check', logger_name='mmengine', log_level='WARNING')
    # What the shipped configs read, as the Makefile makes it.
    make_digits.make(ROOT / 'data/digits', 96, 8000, 500, 1000, seed=0)
    make_digits.make(
        ROOT / 'data/digits_large', train=2000, val=250, test=500, seed=0, **SIZES['large images']
    )
    rows, start = [], time.perf_counter()
    with tempfile.TemporaryDirectory(prefix='mmkd-digits-') as directory:
        for name, says, case in cases(args.seeds, Path(directory)):
            how, said, took = case.run()
            held = (
                how == 'went on'
                if says is None
                else how != 'went on' and bool(re.search(says, said))
            )
            rows.append(
                dict(id=name, planted=says is not None, held=held, how=how, said=said,
                     seconds=round(took, 1))
            )  # fmt: skip
            print('ok  ' if held else 'LOST', name, how, rows[-1]['seconds'], flush=True)
    lost = sum(not row['held'] for row in rows)
    seconds = [row['seconds'] for row in rows]
    notes = [
        f'{len(args.seeds)} sets of images drawn anew (seeds {args.seeds[0]} to {args.seeds[-1]}), '
        f'{len(CONFIGS)} shipped teachers; a check takes {statistics.median(seconds):.1f} s '
        f'(median), {max(seconds):.1f} s at most',
        *_counts('wrong', [row for row in rows if row['planted']]),
        *_counts('right', [row for row in rows if not row['planted']]),
    ]
    return report('teacher_check', len(rows), lost, start, notes, rows, args.json)


def _counts(kind: str, rows: list[dict]) -> list[str]:
    groups: dict[str, list[dict]] = {}
    for row in rows:
        shipped = row['id'].startswith('shipped')
        name = (
            'the shipped configs' if shipped else row['id'].partition(', ')[2].rpartition(', ')[0]
        )
        groups.setdefault(name, []).append(row)
    return [
        f'{kind}, {name}: of {len(group)} '
        + ', '.join(
            f'{count} {how}'
            for how in ('stopped', 'warned', 'went on')
            if (count := sum(row['how'] == how for row in group))
        )
        for name, group in groups.items()
    ]


if __name__ == '__main__':
    sys.exit(main())
