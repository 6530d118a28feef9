"""What a distillation step costs, in forward passes of its teacher.

    python benchmarks/step.py                      # all pairs
    python benchmarks/step.py digits --terms hint --json step.json
    python benchmarks/step.py digits --recipe cwd fgd   # published methods; all: every one

In one process, in turn, medians of
  a  the plain student's step,
  b  the teacher's bare fp32 forward of what the enabled terms read: the same images, the same RoIs,
  c  the distillation step,
each from the raw batch on (preprocessing) and, for steps, to the optimizer's. The overhead is
(c - a) / b: 1 plus the terms' own arithmetic means that nothing is wasted; its quartiles are those
of c - a over the rounds. Where MMRazor can be imported, its two algorithms take the same pair with
the same hints and 1x1 connectors.
glibc is told to keep the memory that is freed (--glibc-defaults: not). Else the kernel makes the
pages of large maps anew in each step, and which of a, b and c they fall to is chance: c - a then
differs from process to process by more than the terms cost.
With --recipe, the step with the recipe of configs/_base_/NAME.py and the step with hints alone, on
P2 to P5, are measured in turn, and their difference is printed; schedules are left out.
Peak memory is what PyTorch's allocator held beyond what it held before the step, as the profiler
heard it (on a GPU: the allocator's own maximum).
"""

import argparse
import copy
import ctypes
import json
import statistics
import sys
import time
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from mmdet.registry import MODELS
from mmdet.utils import register_all_modules
from mmengine.config import Config, ConfigDict
from mmengine.logging import MMLogger
from mmengine.optim import OptimWrapper
from mmengine.registry import DefaultScope

from mmkd.analysis.pair_check import synthetic_batch, without_downloads
from mmkd.recipe import plain_student, read_teacher_config, terms

ROOT = Path(__file__).resolve().parents[1]
PAIRS = {
    'digits': ('digits/paper.py', (96, 96), 16),
    'r101_to_r50': ('kd/faster_rcnn_r101_to_r50.py', (320, 512), 2),
    'cascade_r101_to_r50': ('kd/faster_rcnn_r101_to_r50.py', (320, 512), 2),
}
CASCADE = 'mmdet::cascade_rcnn/cascade-rcnn_r101_fpn_1x_coco.py'
TERMS = ('hint', 'all')
RAZOR_METHODS = ('cwd', 'pkd', 'mgd', 'fbkd')
RECIPES = sorted(
    p.stem for p in (ROOT / 'configs/_base_').glob('*.py') if p.stem not in ('chen2017', 'mmkd')
)


def config_of(pair: str, chosen: str, accelerate: dict | None) -> Config:
    """The pair's config with random weights, and of its terms the chosen ones."""
    cfg = Config.fromfile(ROOT / 'configs' / PAIRS[pair][0])
    model = cfg.model
    if pair.startswith('cascade'):
        model.teacher_config = CASCADE
    model.teacher_ckpt = 'random'
    without_downloads(model)
    if pair == 'digits':
        model.backbone.init_cfg = None
    levels = 3 if pair == 'digits' else 4
    model.distillation.hint.pairs = [f'neck[{i}]' for i in range(levels)]
    if chosen == 'hint':
        for name in terms(model.distillation):
            if name != 'hint':
                model.distillation[name].loss_weight = 0
    if accelerate:
        model.distillation.accelerate = accelerate
    return cfg


def config_with(pair: str, recipe: str, accelerate: dict | None) -> Config:
    """The pair's config with a published method's recipe, on the levels that its neck has."""
    cfg = config_of(pair, 'all', accelerate)
    found = Config.fromfile(ROOT / f'configs/_base_/{recipe}.py').distillation
    levels = len(cfg.model.distillation.hint.pairs)
    for term in found.values():
        term.pop('schedule', None)
        if 'pairs' in term:
            term.pairs = [p for p in term.pairs if '[' not in p or int(p[-2]) < levels]
        for name in ('reduction', 'pool'):
            if name in term:
                term[name] = term[name][: len(term.pairs)]
    if accelerate:
        found.accelerate = accelerate
    cfg.model.distillation = found
    return cfg


def built(model: dict, device: str) -> Any:
    torch.manual_seed(0)
    network = MODELS.build(copy.deepcopy(dict(model)))
    network.init_weights()
    network.guarded = True  # as if a runner had taken charge
    return network.to(device).train()


def stepper(network: Any, data: dict, amp: bool = False) -> Callable[[], None]:
    """One training step, MMEngine's own."""
    optimizer = torch.optim.SGD(network.parameters(), 1e-6)
    if amp:
        from mmengine.optim import AmpOptimWrapper

        wrapper: OptimWrapper = AmpOptimWrapper(optimizer=optimizer)
    else:
        wrapper = OptimWrapper(optimizer)

    def step() -> None:
        torch.manual_seed(0)  # the same anchors and RoIs each time
        network.train_step(copy.deepcopy(data), wrapper)

    return step


def bare_teacher(model: Any, data: dict) -> Callable[[], None]:
    """The teacher's forward of what the terms read, and nothing else."""
    teacher = model.teacher
    rois: list[tuple] = []
    score = teacher.score_rois
    teacher.score_rois = lambda inputs, r, stage: rois.append((r, stage)) or score(inputs, r, stage)
    torch.manual_seed(0)
    prepared = model.data_preprocessor(copy.deepcopy(data), True)
    model(**prepared, mode='loss')
    del teacher.score_rois
    network = copy.deepcopy(teacher.network).eval()
    for module in network.modules():
        module._forward_hooks.clear()

    def forward() -> None:
        prepared = model.data_preprocessor(copy.deepcopy(data), True)
        with torch.no_grad():
            features = network.extract_feat(prepared['inputs'])
            if 'rpn' in model.sites:
                network.rpn_head(features)
            for where, stage in rois:
                stages = (
                    (stage,) if isinstance(network.roi_head.bbox_head, torch.nn.ModuleList) else ()
                )
                network.roi_head._bbox_forward(*stages, features, where)

    return forward


def keep_memory() -> None:
    """Let glibc neither give freed memory back to the kernel nor map large blocks apart."""
    mallopt = getattr(ctypes.CDLL(None), 'mallopt', None)
    if mallopt is None:
        return  # another C library
    for option, value in ((-1, -1), (-4, 0), (-8, 1)):  # M_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX
        mallopt(option, value)


class _Stub(types.ModuleType):
    def __getattr__(self, name: str) -> type:
        if name.startswith('__'):
            raise AttributeError(name)
        return type(name, (), {})


def razor_hints(hints: list) -> tuple[dict, dict, dict]:
    """Connectors, losses and where each loss reads, for hints with 1x1 connectors."""
    connectors, losses, sides = {}, {}, {}
    for i, pair in enumerate(hints):
        connectors[f'connect{i}'] = dict(
            type='ConvModuleConnector', in_channel=pair.shapes[0][1],
            out_channel=pair.shapes[1][1], act_cfg=None,
        )  # fmt: skip
        losses[f'loss_fpn{i}'] = dict(
            type='L2Loss', loss_weight=0.5, normalize=False, div_element=True
        )
        sides[f'loss_fpn{i}'] = {'s_feature': f'connect{i}', 't_feature': None}
    return connectors, losses, sides


def razor_method(recipe: str, term: dict, pairs: list) -> tuple[dict, dict, dict]:
    """The same of a published method, with the settings of ours on the same layers."""
    connectors, losses, sides = {}, {}, {}
    for i, pair in enumerate(pairs):
        width = pair.shapes[0][1]
        name = f'loss_fpn{i}'
        sides[name] = {'preds_S': None, 'preds_T': None}
        if recipe == 'cwd':
            losses[name] = dict(
                type='ChannelWiseDivergence', tau=term['tau'], loss_weight=term['loss_weight']
            )
        elif recipe == 'pkd':
            losses[name] = dict(type='PKDLoss', loss_weight=term['loss_weight'])
        elif recipe == 'mgd':
            losses[name] = dict(type='MGDLoss', alpha_mgd=term['loss_weight'])
            connectors[f'connect{i}'] = dict(
                type='MGDConnector', student_channels=width, teacher_channels=pair.shapes[1][1],
                lambda_mgd=term['lambda_mgd'],
            )  # fmt: skip
            sides[name]['preds_S'] = f'connect{i}'
        else:
            losses[name] = dict(type='FBKDLoss')
            for side in ('Student', 'Teacher'):
                connectors[f'{side}{i}'] = dict(
                    type=f'FBKD{side}Connector', in_channels=width, mode='dot_product',
                    sub_sample=True, reduction=term['reduction'][i], maxpool_stride=term['pool'][i],
                )  # fmt: skip
            sides[name] = {'s_input': f'Student{i}', 't_input': f'Teacher{i}'}
    return connectors, losses, sides


def razor(ours: Any, model: dict, algorithm: str, method: tuple[dict, dict, dict]) -> Any:
    """The same pair and terms as MMRazor has them, with our networks' weights.

    The cost of RoIAlign depends on the sizes of the proposals, and so on the weights.
    """
    modules = ('mmrazor.structures.quantization', 'mmrazor.models.quantizers',
               'mmrazor.models.fake_quants', 'mmrazor.models.observers',
               'mmrazor.models.algorithms.quantization')  # fmt: skip
    for name in modules:  # they do not import on this PyTorch, and are not used
        sys.modules.setdefault(name, _Stub(name))
    import mmrazor.models
    import mmrazor.utils

    student = ConfigDict(plain_student(model))
    student['_scope_'] = 'mmdet'
    teacher = read_teacher_config(model['teacher_config']).model
    without_downloads(teacher)
    teacher['_scope_'] = 'mmdet'
    connectors, losses, sides = method
    recorders = dict(neck=dict(type='ModuleOutputs', source='neck'))
    mappings = {}
    for i, (loss, arguments) in enumerate(sides.items()):
        mappings[loss] = {
            name: dict(from_student=own, recorder='neck', data_idx=i)
            | (dict(connector=connector) if connector else {})
            for (name, connector), own in zip(arguments.items(), (True, False), strict=True)
        }
    from mmrazor.registry import MODELS as RAZOR

    # Its other parts need what the stubs stand for.
    mmrazor.utils.register_all_modules = lambda *args: None
    torch.manual_seed(0)
    with DefaultScope.overwrite_default_scope('mmrazor'):
        network = RAZOR.build(
            dict(
                type=algorithm,
                data_preprocessor=None,
                architecture=student,
                teacher=teacher,
                distiller=dict(
                    type='ConfigurableDistiller', student_recorders=recorders,
                    teacher_recorders=copy.deepcopy(recorders), connectors=connectors,
                    distill_losses=losses, loss_forward_mappings=mappings,
                ),
            )
        )  # fmt: skip
    own = {k: v for k, v in ours.state_dict().items() if not k.startswith('kd_terms.')}
    network.architecture.load_state_dict(own)
    network.teacher.load_state_dict(ours.teacher.network.state_dict())
    network.to(next(ours.parameters()).device)
    network.train()  # MMRazor's returns nothing
    return network


def peak(action: Callable[[], None], device: str) -> int:
    """Bytes that the allocator held at most beyond what it held before."""
    if device == 'cuda':
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        action()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        action()
    held = most = 0
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == '[memory]']
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


now = time.perf_counter


def clock(action: Callable[[], None], device: str) -> float:
    if device == 'cuda':
        torch.cuda.synchronize()
    start = now()
    action()
    if device == 'cuda':
        torch.cuda.synchronize()
    return 1000 * (now() - start)


def measure(
    pair: str, chosen: str, rounds: int, device: str, amp: bool, accelerate: dict | None,
    size: tuple[int, int] | None, with_razor: bool,
) -> dict:  # fmt: skip
    """Medians in milliseconds, the overhead in teacher forwards, and peak memory in MB."""
    _, own_size, images = PAIRS[pair]
    cfg = config_of(pair, chosen, accelerate)
    data = synthetic_batch(cfg, size or own_size, None, images)
    model = built(cfg.model, device)
    exact = built(config_of(pair, chosen, None).model, device) if accelerate else model
    plain = built(plain_student(cfg.model), device)
    actions = {
        'plain': stepper(plain, data, amp),
        'teacher': bare_teacher(exact, data),
        'distilled': stepper(model, data, amp),
    }
    if with_razor and chosen == 'hint':
        for algorithm in ('SingleTeacherDistill', 'FpnTeacherDistill'):
            hints = razor_hints(model.kd_terms['hint'].pairs)
            network = razor(exact, cfg.model, algorithm, hints)
            actions[algorithm] = stepper(network, data, amp)
    times = rounds_of(actions, rounds)
    medians = {name: statistics.median(values) for name, values in times.items()}
    apart = [c - a for a, c in zip(times['plain'], times['distilled'], strict=True)]
    quartiles = statistics.quantiles(apart, n=4)[::2] if rounds > 1 else []
    memory = {name: peak(actions[name], device) for name in ('plain', 'teacher', 'distilled')}
    adapters = sum(p.numel() for n, p in model.named_parameters() if n.startswith('kd_terms.'))
    return dict(
        pair=pair,
        terms=chosen,
        rounds=rounds,
        milliseconds={k: round(v, 1) for k, v in medians.items()},
        overhead=round((medians['distilled'] - medians['plain']) / medians['teacher'], 3),
        quartiles=[round(each / medians['teacher'], 3) for each in quartiles],
        memory_mb={k: round(v / 2**20, 1) for k, v in memory.items()},
        memory_ratio=round(memory['distilled'] / (memory['plain'] + memory['teacher']), 3),
        adapter_parameters=adapters,
    )


def measure_recipe(
    pair: str, recipe: str, rounds: int, device: str, amp: bool, accelerate: dict | None,
    size: tuple[int, int] | None, with_razor: bool,
) -> dict:  # fmt: skip
    """What a published method's step costs above that of hints alone: milliseconds and MB."""
    _, own_size, images = PAIRS[pair]
    configs = dict(
        hint=config_of(pair, 'hint', accelerate), recipe=config_with(pair, recipe, accelerate)
    )
    data = synthetic_batch(configs['hint'], size or own_size, None, images)
    models = {name: built(cfg.model, device) for name, cfg in configs.items()}
    actions = {name: stepper(model, data, amp) for name, model in models.items()}
    memory = {name: peak(action, device) for name, action in actions.items()}
    if with_razor and recipe in RAZOR_METHODS:
        term = configs['recipe'].model.distillation[recipe]
        pairs = models['recipe'].kd_terms[recipe].pairs
        theirs = razor_method(recipe, term, pairs)
        exact = models['recipe']
        if accelerate:
            exact = built(config_with(pair, recipe, None).model, device)
        network = razor(exact, configs['recipe'].model, 'FpnTeacherDistill', theirs)
        actions['mmrazor'] = stepper(network, data, amp)
    times = rounds_of(actions, rounds)
    medians = {name: statistics.median(values) for name, values in times.items()}
    apart = [r - h for h, r in zip(times['hint'], times['recipe'], strict=True)]
    quartiles = statistics.quantiles(apart, n=4)[::2] if rounds > 1 else apart * 2
    named = models['recipe'].named_parameters()
    return dict(
        pair=pair,
        recipe=recipe,
        rounds=rounds,
        size=size or own_size,
        images=images,
        clock=now.__name__,
        milliseconds={name: round(value, 1) for name, value in medians.items()},
        above_hints_ms=round(statistics.median(apart), 1),
        quartiles_ms=[round(q, 1) for q in quartiles],
        above_hints_mb=round((memory['recipe'] - memory['hint']) / 2**20, 1),
        parameters=sum(p.numel() for n, p in named if n.startswith('kd_terms.')),
    )


def rounds_of(actions: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each action in each round, in turn, after two that do not count."""
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    times: dict[str, list[float]] = {name: [] for name in actions}
    for number in range(rounds + 2):
        for name, action in actions.items():
            took = clock(action, device)
            if number >= 2:
                times[name].append(took)
    return times


def recipe_table(results: list[dict]) -> str:
    columns = ['pair', 'recipe', 'hints alone', 'with the recipe', 'above hints', 'quartiles',
               'memory above hints', 'parameters', 'MMRazor Fpn']  # fmt: skip
    lines = ['| ' + ' | '.join(columns) + ' |', '| --- ' * len(columns) + '|']
    for result in results:
        ms = result['milliseconds']
        low, high = result['quartiles_ms']
        cells = [result['pair'], result['recipe'], f'{ms["hint"]:.0f} ms', f'{ms["recipe"]:.0f} ms']
        cells += [f'{result["above_hints_ms"]:+.0f} ms', f'{low:+.0f} to {high:+.0f} ms']
        cells += [f'{result["above_hints_mb"]:+.1f} MB', f'{result["parameters"]:,}']
        razors = ms.get('mmrazor')
        cells += [f'{razors:.0f} ms (ours: {ms["recipe"] / razors:.2f})' if razors else '']
        lines.append('| ' + ' | '.join(cells) + ' |')
    return '\n'.join(lines)


def table(results: list[dict]) -> str:
    columns = ['pair', 'terms', 'plain (a)', 'teacher (b)', 'distilled (c)', '(c - a) / b',
               'quartiles', 'memory: c over a + b', 'MMRazor Single', 'MMRazor Fpn']  # fmt: skip
    lines = ['| ' + ' | '.join(columns) + ' |', '| --- ' * len(columns) + '|']
    for result in results:
        ms = result['milliseconds']
        cells = [result['pair'], result['terms']]
        cells += [f'{ms[k]:.0f} ms' for k in ('plain', 'teacher', 'distilled')]
        cells += [f'{result["overhead"]:.2f}']
        cells += [' to '.join(f'{each:.2f}' for each in result['quartiles'])]
        cells += [f'{result["memory_ratio"]:.2f}']
        for algorithm in ('SingleTeacherDistill', 'FpnTeacherDistill'):
            theirs = ms.get(algorithm)
            cells.append(
                f'{theirs:.0f} ms (ours: {ms["distilled"] / theirs:.2f})' if theirs else ''
            )
        lines.append('| ' + ' | '.join(cells) + ' |')
    return '\n'.join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('pairs', nargs='*', default=list(PAIRS), metavar='PAIR',
                        help=f'of {", ".join(PAIRS)}; default: all')  # fmt: skip
    parser.add_argument('--terms', nargs='+', choices=TERMS, default=list(TERMS))
    parser.add_argument('--recipe', nargs='+', choices=['all', *RECIPES], metavar='NAME',
                        help=f'of {", ".join(RECIPES)}, or all')  # fmt: skip
    parser.add_argument('--rounds', type=int, default=9)
    parser.add_argument('--size', type=int, nargs=2, metavar=('HEIGHT', 'WIDTH'))
    parser.add_argument('--threads', type=int, help='of PyTorch; default: its own')
    parser.add_argument('--cpu-time', action='store_true',
                        help='of all threads, for a machine that has other work')  # fmt: skip
    parser.add_argument('--amp', action='store_true', help='steps in mixed precision (GPU)')
    parser.add_argument('--accelerate', type=json.loads, metavar='JSON',
                        help='distillation.accelerate of the distilled step')  # fmt: skip
    parser.add_argument('--mmrazor', action='store_true', help='MMRazor 1.0 beside it')
    parser.add_argument('--glibc-defaults', action='store_true', help='freed memory is given back')
    parser.add_argument('--json', type=Path, help='write the figures there too')
    args = parser.parse_args()
    if args.cpu_time:
        global now
        now = time.process_time
    if not args.glibc_defaults:
        keep_memory()
    warnings.simplefilter('ignore')
    register_all_modules()
    MMLogger.get_instance('step', logger_name='mmengine', log_level='ERROR')
    if args.threads:
        torch.set_num_threads(args.threads)
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    results = []
    size = args.size and tuple(args.size)
    for pair in args.pairs:
        for recipe in RECIPES if 'all' in (args.recipe or ()) else args.recipe or ():
            settings = (args.rounds, device, args.amp, args.accelerate, size, args.mmrazor)
            results.append(measure_recipe(pair, recipe, *settings))
            print(json.dumps(results[-1]), flush=True)
        for chosen in () if args.recipe else args.terms:
            results.append(
                measure(
                    pair,
                    chosen,
                    args.rounds,
                    device,
                    args.amp,
                    args.accelerate,
                    size,
                    args.mmrazor,
                )  # fmt: skip
            )
            print(json.dumps(results[-1]), flush=True)
    print((recipe_table if args.recipe else table)(results))
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + '\n')


if __name__ == '__main__':
    main()
