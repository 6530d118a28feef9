"""Does a change keep training as it was, to the bit? Records ten steps of many pairs; compares.

python benchmarks/bits.py record before.json    # on the tree before the change
python benchmarks/bits.py compare before.json   # after it, on the same machine; 1 if one differs
python benchmarks/bits.py compare before.json --only tiny/

For each config in configs/digits (their data sets are made where they are missing) and each tiny
pair of the tests: the losses of ten steps and the digests of the weights after them, on a CPU, with
a fixed seed and one thread. Two machines may round differently, so a record is of use on the
machine that made it alone, and none is kept in the repository.
"""

import argparse
import contextlib
import hashlib
import io
import json
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

# Read when the libraries are loaded.
os.environ.update(OMP_NUM_THREADS='1', MKL_NUM_THREADS='1')

import torch  # noqa: E402
from mmdet.utils import register_all_modules  # noqa: E402
from mmengine.config import Config  # noqa: E402
from mmengine.hooks import Hook  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / 'tests')]

import pairs  # noqa: E402
import zoo  # noqa: E402

from mmkd import DistillationRunner  # noqa: E402

STEPS = 10
LARGE = (
    '--out data/digits_large --size 192 --train 2000 --val 250 --test 500 --digits 4 10'
    ' --heights 14 60'
)
"""As in the Makefile."""
DATA = {
    'digits': [],
    'digits_large': LARGE.split(),
}
OLD_PREFIX, NEW_PREFIX = 'kd_adapters.', 'kd_terms.hint.adapters.'
"""Where a tensor of the adaptation layers was found, and is."""


def digest(tensor: torch.Tensor) -> str:
    """16 digits of a tensor's SHA-256."""
    numbers = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return hashlib.sha256(numbers).hexdigest()[:16]


def weights(model: torch.nn.Module) -> dict[str, str]:
    """Digests of all that a checkpoint holds."""
    state = model.state_dict()
    return {k.replace(NEW_PREFIX, OLD_PREFIX): digest(v) for k, v in sorted(state.items())}


def losses(values: dict) -> dict[str, str]:
    """Losses of a step, each float as its bits; a list as its parts."""
    flat = {}
    for name, value in sorted(values.items()):
        for i, each in enumerate(value if isinstance(value, list) else [value]):
            if torch.is_tensor(each):
                flat[f'{name}.{i}' if isinstance(value, list) else name] = float(each).hex()
    return flat


class Losses(Hook):
    """Notes what each iteration of a runner reports."""

    def __init__(self) -> None:
        self.steps: list[dict] = []

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None) -> None:
        self.steps.append(losses({k: v for k, v in outputs.items() if torch.is_tensor(v)}))


def config(path: Path) -> dict:
    """Ten steps of a config by the runner."""
    cfg = Config.fromfile(path)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as work_dir:
        cfg.work_dir = work_dir
        cfg.visualizer = dict(type='DetLocalVisualizer', vis_backends=None, name=work_dir)
        cfg.train_cfg = dict(type='IterBasedTrainLoop', max_iters=STEPS, val_interval=STEPS + 1)
        cfg.param_scheduler = [s for s in cfg.param_scheduler if not s.by_epoch]
        cfg.val_cfg = cfg.val_dataloader = cfg.val_evaluator = None
        cfg.randomness = dict(seed=0)
        cfg.default_hooks.checkpoint = dict(
            type='CheckpointHook', by_epoch=False, interval=STEPS + 1, save_last=False
        )
        cfg.log_level = 'ERROR'
        cfg.experiment_name = f'bits_{path.stem}_{os.path.basename(work_dir)}'
        if 'distillation' in cfg.model:
            cfg.model.distillation.check_teacher = False
        heard = Losses()
        runner = DistillationRunner.from_cfg(cfg)
        runner.register_hook(heard, priority='LOWEST')
        model = runner.train()
    return {'losses': heard.steps, 'weights': weights(model)}


def steps(build: Callable, batch: Callable) -> dict:
    """Ten steps of SGD on a model that ``build`` makes, on batches by their number."""
    torch.manual_seed(0)
    model = build()
    for network in (model, getattr(model.teacher, 'network', None)):
        if network is not None:
            zoo.settle(network)
    optimizer = torch.optim.SGD(model.parameters(), 1e-3, momentum=0.9)
    heard = []
    for step in range(STEPS):
        values = pairs.losses(model, batch(step), seed=step)
        heard.append(losses(values))
        optimizer.zero_grad()
        pairs.total(model, values).backward()
        optimizer.step()
    return {'losses': heard, 'weights': weights(model)}


def cases() -> dict[str, Callable[[], dict]]:
    """What is recorded, by name."""
    found: dict[str, Callable[[], dict]] = {}
    for path in sorted((ROOT / 'configs/digits').glob('**/*.py')):
        if '_base_' not in path.parts:
            name = str(path.relative_to(ROOT / 'configs').with_suffix(''))
            found[name] = lambda path=path: config(path)

    def tiny(name: str, student: Callable, teacher: Callable, **recipe) -> None:
        found[f'tiny/{name}'] = lambda: steps(
            lambda: pairs.distil(student(), teacher(), pairs.recipe(**recipe), seed=1),
            lambda step: pairs.batch(seed=step),
        )

    wide = lambda: pairs.fpn(8)  # noqa: E731
    tiny('fpn', pairs.fpn, wide)
    tiny('start', pairs.fpn, wide, start='teacher')
    tiny('giou', pairs.giou, wide)
    tiny('ohem', pairs.ohem, wide)
    tiny('cascade', pairs.cascade, pairs.cascade)
    tiny('cascade-to-fpn', pairs.fpn, pairs.cascade)
    tiny('fpn-to-cascade', pairs.cascade, wide)
    tiny('c4', pairs.c4, pairs.c4, hint=dict(pairs=['backbone']))
    several = ['neck[1]', 'backbone[2]', 'roi_head.bbox_head.shared_fcs.1']
    tiny('hints', pairs.fpn, wide, hint=dict(pairs=several, normalize=True))
    tiny('l1', pairs.fpn, wide, hint=dict(type='HintL1Loss'))
    tiny('schedule', pairs.fpn, wide, hint=dict(schedule=dict()), rcnn_cls=dict(hard_weight=0.25))
    tiny('share', pairs.fpn, wide, hint=dict(share=dict(share=0.2, iters=5)), rpn_cls=dict(share=2))
    anchors = wide()
    anchors.rpn_head.anchor_generator.ratios = [0.5, 1.0]
    tiny('anchors', pairs.fpn, lambda: anchors)
    for student, teacher in (
        ('Faster R-CNN', 'HTC'), ('Trident', 'Trident'), ('Seesaw', 'Faster R-CNN'),
        ('Faster R-CNN', 'Seesaw'), ('DC5', 'Cascade'), ('PISA', 'SCNet'), ('Libra', 'Double-Head'),
        ('Mask Scoring', 'Mask R-CNN'), ('Cascade Mask', 'Dynamic'),
    ):  # fmt: skip
        found[f'zoo/{student} from {teacher}'] = lambda student=student, teacher=teacher: steps(
            lambda: zoo.pair(student, teacher), lambda step: zoo.batch(seed=step)
        )
    return found


def make_data() -> None:
    """The digits data sets, where they are missing."""
    for name, options in DATA.items():
        if not (ROOT / 'data' / name).exists():
            command = [sys.executable, str(ROOT / 'tools/make_digits.py'), *options]
            subprocess.run(command, cwd=ROOT, check=True)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('command', choices=['record', 'compare'])
    parser.add_argument('file', type=Path)
    parser.add_argument('--only', default='', help='cases whose name has this in it')
    args = parser.parse_args()
    warnings.simplefilter('ignore')
    make_data()
    os.chdir(ROOT)
    register_all_modules(init_default_scope=True)
    torch.set_num_threads(1)
    before = json.loads(args.file.read_text()) if args.command == 'compare' else {}
    now, wrong = {}, []
    for name, run in cases().items():
        if args.only not in name:
            continue
        with contextlib.redirect_stdout(io.StringIO()):
            now[name] = run()
        said = f'{len(now[name]["weights"])} tensors'
        if args.command == 'compare':
            differing = differences(before.get(name), now[name])
            said = differing or f'equal: {said}'
            wrong += [name] if differing else []
        print(f'{name}: {said}', flush=True)
    if args.command == 'record':
        args.file.write_text(json.dumps(now))
        return 0
    missing = [name for name in before if args.only in name and name not in now]
    print(f'{len(now) - len(wrong)} of {len(now)} equal' + '; gone: '.join(['', *missing]))
    return 1 if wrong or missing else 0


def differences(before: dict | None, now: dict) -> str:
    """What differs, in words; empty where nothing does."""
    if before is None:
        return 'NEW: not in the record'
    for step, (old, new) in enumerate(zip(before['losses'], now['losses'], strict=True), 1):
        if old.keys() != new.keys():
            return f'DIFFERS: losses {sorted(old.keys() ^ new.keys())}'
        if changed := [k for k in old if old[k] != new[k]]:
            said = [f'{k} {float.fromhex(old[k])} -> {float.fromhex(new[k])}' for k in changed]
            return f'DIFFERS at step {step}: ' + '; '.join(said[:3])
    old, new = before['weights'], now['weights']
    changed = [k for k in {**old, **new} if old.get(k) != new.get(k)]
    return f'DIFFERS: {len(changed)} weights, first {changed[0]}' if changed else ''


if __name__ == '__main__':
    sys.exit(main())
