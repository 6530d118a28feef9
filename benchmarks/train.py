"""The whole loop through tools/train.py: distilled, without the terms, and MMDetection's own.

    python tools/make_digits.py
    python benchmarks/train.py

One epoch of 1,600 images of the digits pair (batch 8) in each of ROUNDS rounds, in turn, every run
a process of its own. Medians over the rounds: seconds from the start of the process to the end of
the first step, images per second of the steps after it, the share of their time that waited for
data, and the checkpoint's size and the time to write it.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import mmdet
from mmengine.hooks import Hook
from mmengine.registry import HOOKS

ROOT = Path(__file__).resolve().parents[1]
IMAGES, BATCH = 1600, 8
RUNS = {
    # name: (config, what it changes, whose tools/train.py)
    'MMDetection, plain student': ('plain.py', '', 'mmdet'),
    'mmkd, plain student': ('plain.py', '', 'mmkd'),
    'mmkd, hints alone': (
        'paper.py',
        'rpn_bbox=dict(loss_weight=0), rcnn_bbox=dict(loss_weight=0), '
        'rpn_cls=dict(loss_weight=0), rcnn_cls=dict(loss_weight=0)',
        'mmkd',
    ),
    'mmkd, all terms': ('paper.py', '', 'mmkd'),
}  # fmt: skip
CHILD = """\
_base_ = {config!r}
custom_imports = dict(imports=['benchmarks.train'], allow_failed_imports=False)
custom_hooks = [dict(type='Marks', path={marks!r})]
train_cfg = dict(max_epochs=1, val_interval=10)
train_dataloader = dict(dataset=dict(indices={images}))
"""


@HOOKS.register_module()
class Marks(Hook):
    """Writes down when things happened."""

    priority = 'LOWEST'

    def __init__(self, path: str) -> None:
        self.path = path
        self.steps: list[float] = []
        self.waited: list[float] = []
        self.last = 0.0
        self.saving = self.saved = 0.0

    def before_train_iter(self, runner, batch_idx, data_batch=None) -> None:  # noqa: ANN001
        self.waited.append(time.time() - self.last)

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None) -> None:  # noqa: ANN001
        self.last = time.time()
        self.steps.append(self.last)

    def before_save_checkpoint(self, runner, checkpoint) -> None:  # noqa: ANN001
        self.saving = time.time()

    def after_train_epoch(self, runner) -> None:  # noqa: ANN001
        self.saved = time.time()
        Path(self.path).write_text(json.dumps(vars(self)))


def run(name: str, folder: Path) -> dict:
    """One training; its figures."""
    config, changes, whose = RUNS[name]
    marks = folder / 'marks.json'
    text = CHILD.format(
        config=str(ROOT / 'configs/digits' / config), marks=str(marks), images=IMAGES
    )
    if changes:
        text += f'model = dict(distillation=dict({changes}))\n'
    child = folder / 'child.py'
    child.write_text(text)
    tool = ROOT / 'tools/train.py'
    if whose == 'mmdet':
        tool = Path(mmdet.__file__).parent / '.mim/tools/train.py'
    started = time.time()
    done = subprocess.run(
        [sys.executable, str(tool), str(child), '--work-dir', str(folder / 'work')],
        cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, 'PYTHONPATH': str(ROOT), 'PYTHONWARNINGS': 'ignore'},
    )  # fmt: skip
    if done.returncode:
        sys.exit(f'{name}: {done.stderr[-2000:]}')
    seen = json.loads(marks.read_text())
    steps = seen['steps']
    spent = steps[-1] - steps[0]
    return dict(
        start=steps[0] - started,
        images_per_second=BATCH * (len(steps) - 1) / spent,
        data_share=sum(seen['waited'][1:]) / spent,
        checkpoint_mb=(folder / 'work/epoch_1.pth').stat().st_size / 2**20,
        saving=seen['saved'] - seen['saving'],
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--rounds', type=int, default=3)
    parser.add_argument('--json', type=Path)
    args = parser.parse_args()
    seen: dict[str, list[dict]] = {name: [] for name in RUNS}
    for _ in range(args.rounds):
        for name in RUNS:
            with tempfile.TemporaryDirectory() as folder:
                seen[name].append(run(name, Path(folder)))
            print(name, json.dumps(seen[name][-1]), flush=True)
    medians = {
        name: {key: statistics.median(r[key] for r in runs) for key in runs[0]}
        for name, runs in seen.items()
    }
    print('| run | start to first step | images/s | waiting for data | checkpoint | written in |')
    print('| --- | --- | --- | --- | --- | --- |')
    for name, m in medians.items():
        print(
            f'| {name} | {m["start"]:.1f} s | {m["images_per_second"]:.0f} | '
            f'{100 * m["data_share"]:.0f} % | {m["checkpoint_mb"]:.2f} MB | '
            f'{1000 * m["saving"]:.0f} ms |'
        )
    if args.json:
        args.json.write_text(json.dumps(medians, indent=1) + '\n')


if __name__ == '__main__':
    main()
