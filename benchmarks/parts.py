"""Where the time of a distillation step goes, part by part, beside the plain student's.

    python benchmarks/parts.py r101_to_r50 all
    python benchmarks/parts.py r101_to_r50 hint --accelerate '{"dtype": "bfloat16"}'

Medians over ROUNDS steps of each in turn, of one process; a part within another is counted in both.
Page faults are those of the teacher's backbone and neck: memory that the kernel makes anew.
"""

import argparse
import json
import resource
import statistics
import time
import warnings
from collections import defaultdict
from typing import Any

import torch
from mmdet.utils import register_all_modules
from mmengine.logging import MMLogger
from step import PAIRS, TERMS, built, config_of, keep_memory, stepper

from mmkd.analysis.pair_check import synthetic_batch
from mmkd.recipe import plain_student


class Parts:
    """Notes how long the calls of chosen methods last, under the name of the step in ``now``."""

    def __init__(self) -> None:
        self.now = ''
        self.seen: dict[tuple[str, str], list[float]] = defaultdict(list)
        self.faults: list[int] = []

    def watch(self, owner: Any, name: str, label: str) -> None:
        """Replaces the method ``name`` of ``owner`` by one that is timed."""
        method = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            start = time.perf_counter()
            result = method(*args, **kwargs)
            self.seen[label, self.now].append(1000 * (time.perf_counter() - start))
            if label.startswith('teacher: backbone'):
                self.faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
            return result

        object.__setattr__(owner, name, timed)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('pair', choices=PAIRS)
    parser.add_argument('terms', choices=TERMS)
    parser.add_argument('--rounds', type=int, default=7)
    parser.add_argument('--accelerate', type=json.loads, metavar='JSON')
    parser.add_argument('--glibc-defaults', action='store_true', help='freed memory is given back')
    args = parser.parse_args()
    if not args.glibc_defaults:
        keep_memory()
    warnings.simplefilter('ignore')
    register_all_modules()
    MMLogger.get_instance('parts', logger_name='mmengine', log_level='ERROR')
    cfg = config_of(args.pair, args.terms, args.accelerate)
    _, size, images = PAIRS[args.pair]
    data = synthetic_batch(cfg, size, None, images)
    networks = {
        'plain': built(plain_student(cfg.model), 'cpu'),
        'distilled': built(cfg.model, 'cpu'),
    }
    parts = Parts()
    for network in networks.values():
        parts.watch(network, '_run_forward', 'forward')
        parts.watch(network, 'extract_feat', 'student: backbone and neck')
        parts.watch(network.rpn_head, 'loss_and_predict', 'student: RPN')
        parts.watch(network.roi_head, 'loss', 'student: RoI head')
    model = networks['distilled']
    parts.watch(model.teacher, 'extract', 'teacher: backbone and neck')
    parts.watch(model.teacher, 'score_anchors', 'teacher: RPN')
    parts.watch(model.teacher, 'score_rois', 'teacher: RoI head, all stages')
    for key, term in model.kd_terms.items():
        parts.watch(term, 'distil', f'term {key}, with what it is the first to ask for')
    backward = torch.Tensor.backward

    def timed(self: torch.Tensor, *given: Any, **named: Any) -> None:
        start = time.perf_counter()
        backward(self, *given, **named)
        parts.seen['backward', parts.now].append(1000 * (time.perf_counter() - start))

    torch.Tensor.backward = timed  # type: ignore[method-assign]
    steps = {name: stepper(network, data) for name, network in networks.items()}
    for number in range(args.rounds + 2):
        if number == 2:
            parts.seen.clear()
            parts.faults.clear()
        for parts.now, step in steps.items():
            start = time.perf_counter()
            step()
            parts.seen['step', parts.now].append(1000 * (time.perf_counter() - start))
    print('| part | plain | distilled |')
    print('| --- | --- | --- |')
    for label in dict.fromkeys(label for label, _ in parts.seen):
        cells = []
        for name in networks:
            of_steps = parts.seen.get((label, name), [])
            # A cascade calls its RoI head once a stage.
            each = len(of_steps) // args.rounds
            sums = [
                sum(of_steps[i * each : (i + 1) * each]) for i in range(args.rounds if each else 0)
            ]
            cells.append(f'{statistics.median(sums):.1f} ms' if sums else '')
        print(f'| {label} | {" | ".join(cells)} |')
    print(
        f"\npage faults in the teacher's backbone and neck: {statistics.median(parts.faults):,.0f}"
    )


if __name__ == '__main__':
    main()
