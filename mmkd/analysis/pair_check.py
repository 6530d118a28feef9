"""Checks a pair of teacher and student in a minute, before a training and without its data."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import math
import os
import resource
import sysconfig
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mmcv
import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from mmdet.registry import DATASETS, MODELS
from mmdet.structures import DetDataSample
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.logging import MMLogger
from mmengine.model import MMDistributedDataParallel
from mmengine.registry import init_default_scope
from mmengine.runner import set_random_seed
from mmengine.structures import BaseDataElement, InstanceData
from mmengine.utils import import_modules_from_strings
from terminaltables import AsciiTable
from torch import Tensor, nn

from ..datasets.annotations import (
    AnnotationError,
    check_annotations,
    check_evaluator,
    require_annotations,
)
from ..datasets.labels import check_labels, check_same_labels
from ..datasets.old_spellings import refuse_old_spellings
from ..datasets.two_views import apply_resolution, at_teachers_scale
from ..datasets.unlabelled import find
from ..engine import teacher_check
from ..engine.class_names import apply_classes, class_names, head_classes
from ..engine.config_files import locate_files, places
from ..engine.exit import leave
from ..engine.summary import startup_table
from ..engine.teacher_check import CERTAIN, MIN_RECALL, PREPROCESSINGS, SUSPICIOUS, means
from ..inference import require_teacher
from ..io.checkpoint import is_here
from ..observers import DWARFS, own_parameters
from ..options.acceleration import input_channels
from ..options.class_map import ClassMap
from ..options.resolution import VIEW, Resolution
from ..options.schedule import WeightSchedule
from ..options.share import gradient_norm
from ..options.unlabelled import Unlabelled
from ..recipe import (
    UNTRAINED,
    MissingFileError,
    dicts,
    is_pair,
    log_name,
    plain_student,
    term_of,
    terms,
    terms_on,
)
from .comparison.measure import flops

LOOKED_AT = 100
"""Training images that are looked at for some with boxes."""
MIN_GRADIENT = 1e-3
"""Ratio of a term's gradient to the hard losses' below which a warning is given."""


@dataclass
class Report:
    """The result: faults with which the pair cannot be trained, warnings, and what was measured.

    ``found`` holds plain numbers and texts by name, in the order in which they were found.
    """

    against: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    found: dict[str, Any] = field(default_factory=dict)

    def say(self, text: str, **found: Any) -> None:
        """Print a text, and keep the numbers in it."""
        print(text, flush=True)
        self.found |= found

    @property
    def go(self) -> bool:
        return not self.against

    def as_json(self) -> str:
        """Verdict, reasons and everything that was measured; a number that is not finite is null.

        Sizes are in pixels, times in milliseconds unless their name says seconds.
        """
        content = dict(go=self.go, against=self.against, warnings=self.warnings, **self.found)
        return json.dumps(_finite(content), indent=2, ensure_ascii=False) + '\n'


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def check_pair(
    cfg: Config,
    size: tuple[int, int] = (256, 320),
    image: str | None = None,
    data: int = 0,
    download: bool = False,
    processes: int = 2,
    share: float = 0.2,
) -> Report:
    """Check the pair of a config with one step; no weight is changed and no file written.

    Args:
        cfg: the config of a distilled student.
        size: height and width of the student's image in the trial step, in pixels.
        image: path of an image for it; None makes one.
        data: number of validation images to test the teacher on; above 0 the trial step is made
            with training images, at the config's own scale.
        download: download checkpoints instead of replacing them by random weights.
        processes: number of processes in the trial under DDP; 1 skips it.
        share: the norm of a term's gradient, as a multiple of the hard losses', for which the
            ``loss_weight`` is told.
    """
    report = Report(found=dict(config=str(cfg.filename)))
    init_default_scope(cfg.get('default_scope', 'mmdet'))
    try:
        cfg = _prepare(cfg, report, download)
        model = _build(cfg.model)
        table = startup_table(model)
    except MissingFileError as error:
        tried = MissingFileError(error.key, error.path, places(cfg, error.path))
        report.against.append(f'TeacherError: {tried}')
        return report
    except Exception as error:  # building a config may raise anything
        report.against.append(f'{type(error).__name__}: {error}')
        return report
    trained = model.teacher.source != UNTRAINED
    report.say(table, table=table, teacher_is_loaded=trained)
    channels = input_channels(model)
    batch: dict | None = None
    if data:
        _check_files(cfg, report)
        batch = _real_batch(cfg, report) if report.go else None
        if batch is None:
            return report
        size = model.data_preprocessor(copy.deepcopy(batch), True)['inputs'].shape[-2:]
    shown = f'{size[1]}x{size[0]}'
    kind = 'training images' if data else 'image' if image else 'invented'
    report.say(
        {
            'training images': f'the step is made with two training images, at {shown} as the '
            "config's pipeline gives them",
            'image': f'the step is made with {image} at {shown}, AND INVENTED BOXES',
            'invented': f'the step is made with AN INVENTED PICTURE at {shown}, noise with boxes '
            'anywhere: its losses and gradients are a rough guide; --data takes images of yours',
        }[kind],
        picture=dict(kind=kind, width=size[1], height=size[0]),
    )
    _sizes(cfg, model, size, report)
    if batch is None:
        batch = synthetic_batch(cfg, size, image, channels=channels)
    _trial(model, batch, trained, '' if data else ' (on an invented picture)', share, report)
    if processes > 1 and report.go:
        _under_ddp(cfg, processes, report)
    _epoch(cfg, report)
    if data and report.go:
        if trained:
            _try_teacher(cfg, model.teacher.network, data, report)
        else:
            report.warnings.append('the teacher was not loaded, so it was not tested on data')
    return report


def _prepare(cfg: Config, report: Report, download: bool) -> Config:
    model = cfg.get('model') or {}
    if not is_pair(model):
        raise ValueError(
            "the config's model has no teacher_config or no distillation, so no pair to "
            'check: give the config of a distilled student'
        )
    distillation = model.get('distillation') or {}
    if not terms(distillation) or not terms_on(distillation):
        raise ValueError(
            'every distillation term has weight 0, so nothing would be distilled: give one a '
            'loss_weight above 0'
        )
    refuse_old_spellings(cfg)
    cfg = locate_files(copy.deepcopy(cfg))
    checkpoint = cfg.model.get('teacher_ckpt')
    if not download and checkpoint and '://' in checkpoint and not is_here(checkpoint):
        report.warnings.append(
            f'{checkpoint} is not on this machine, so random weights replace those of the teacher, '
            'and gradients are not representative; --download fetches it'
        )
        cfg.model.teacher_ckpt = UNTRAINED
    if not download and without_downloads(cfg.model):
        report.warnings.append(
            "the student's pretrained backbone is not on this machine and was left random; "
            '--download fetches it'
        )
    return apply_classes(apply_resolution(cfg))


def without_downloads(model: dict) -> bool:
    """Removes every ``init_cfg`` that would download; returns whether there was one."""
    found = False
    for node in dicts(model, ('teacher_config', 'distillation')):
        init_cfg = node.get('init_cfg')
        checkpoint = init_cfg.get('checkpoint') if isinstance(init_cfg, dict) else None
        if '://' in str(checkpoint) and not is_here(str(checkpoint)):
            node['init_cfg'] = None
            found = True
    return found


def _build(config: dict) -> Any:
    # At INFO, MMEngine logs a line for each tensor.
    MMLogger.get_instance('mmkd check', logger_name='mmengine', log_level='ERROR')
    torch.manual_seed(0)
    model = MODELS.build(copy.deepcopy(config))
    require_teacher(model)
    model.init_weights()
    model.guarded = True  # nothing is trained on these steps
    return model.train()


def _sizes(cfg: Config, model: Any, size: tuple[int, int], report: Report) -> None:
    networks: dict[str, dict] = {}
    rows = [['network', 'parameters (M)', f'GFLOPs at {size[1]}x{size[0]}']]
    plain = MODELS.build(plain_student(cfg.model))
    ratio = model.resolution.ratio if model.resolution else 1
    large = tuple(round(edge * ratio) for edge in size)
    for name, network, (height, width) in (
        ('teacher', model.teacher.network, large),
        ('student', plain.eval(), size),
    ):
        parameters = sum(p.numel() for p in network.parameters())
        gflops = _gflops(network, height, width)
        rows.append([name, f'{parameters / 1e6:.2f}', gflops])
        known = None if gflops.startswith('not') else float(gflops)
        networks[name] = dict(parameters=parameters, gflops=known, width=width, height=height)
    report.say(AsciiTable(rows).table, networks=networks)
    if model.kd_terms and not model.teacher_inputs.same and not model.resolution:
        report.say(
            'pixels: the teacher expects another normalisation or channel order, so its images are '
            'converted'
        )


def _gflops(network: nn.Module, height: int, width: int) -> str:
    sample = DetDataSample(
        metainfo=dict(img_shape=(height, width), ori_shape=(height, width), scale_factor=(1, 1),
                      batch_input_shape=(height, width), pad_shape=(height, width))
    )  # fmt: skip
    try:
        inputs = torch.zeros(1, input_channels(network), height, width)
        return f'{flops(network, inputs, [sample]) / 1e9:.2f}'
    except Exception as error:  # a network that cannot be counted may still train
        return f'not countable ({type(error).__name__})'


def synthetic_batch(
    cfg: Config, size: tuple[int, int], image: str | None, images: int = 2, channels: int = 3
) -> dict:
    """A batch of images with boxes, in the form that the training pipeline gives."""
    height, width = size
    draw = np.random.default_rng(0)
    classes = head_classes(cfg.model) or len(class_names(cfg) or [0])
    resolution = Resolution.of((cfg.model.get('distillation') or {}).get('resolution'))
    inputs, samples = [], []
    for _ in range(images):
        pixels = _picture(image, height, width, channels, draw)
        sides = draw.uniform(0.1, 0.5, (8, 2)) * [width, height]
        corner = draw.uniform(0, 1, (8, 2)) * ([width, height] - sides)
        sample = DetDataSample(metainfo=dict(img_shape=size, ori_shape=size, scale_factor=(1, 1)))
        sample.gt_instances = InstanceData(
            bboxes=torch.tensor(np.concatenate([corner, corner + sides], 1)).float(),
            labels=torch.tensor(draw.integers(0, classes, 8)),
        )
        sample.ignored_instances = InstanceData(bboxes=torch.zeros(0, 4), labels=torch.zeros(0))
        if resolution is not None and min(resolution.ratios) != 1:
            large = [round(edge * resolution.ratio) for edge in size]
            view = BaseDataElement(
                img=nn.functional.interpolate(pixels[None].float(), large)[0].byte()
            )
            scale = (large[1] / width, large[0] / height)
            view.set_metainfo({'scale': scale, 'offset': (0.0, 0.0)})
            sample.set_field(view, VIEW)
        inputs.append(pixels)
        samples.append(sample)
    return dict(inputs=inputs, data_samples=samples)


def _check_files(cfg: Config, report: Report) -> None:
    """Check the annotation files as a training does; a missing test set is a warning."""
    unlabelled = Unlabelled.of((cfg.model.get('distillation') or {}).get('unlabelled'))
    for split in ('train', 'val', 'test'):
        loader = cfg.get(f'{split}_dataloader')
        look = require_annotations if split == 'test' else check_annotations
        if split == 'train' and unlabelled is not None and unlabelled.share == 1:
            continue  # the file is not read
        try:
            look(loader, split)
            check_evaluator(cfg.get(f'{split}_evaluator'), loader, split)
        except AnnotationError as error:
            (report.warnings if split == 'test' else report.against).append(str(error))


def _real_batch(cfg: Config, report: Report) -> dict | None:
    """Two training images with boxes, as the pipeline gives them; None if there is none."""
    loader: Any = cfg.get('train_dataloader') or {}
    try:
        dataset = _dataset(loader.dataset)
        set_random_seed(0)  # the pipeline draws
        found = []
        order = np.random.default_rng(0).permutation(len(dataset))
        for number in order[:LOOKED_AT].tolist():
            sample = dataset[number]
            if len(sample['data_samples'].gt_instances):
                found.append(sample)
            if len(found) == 2:
                break
    except Exception as error:  # a data set may raise anything
        report.against.append(
            f'--data: the training data cannot be loaded ({type(error).__name__}: {error})'
        )
        return None
    if not found:
        report.against.append(f'--data: {LOOKED_AT} of the training images have no box')
        return None
    return pseudo_collate(found)


def _picture(
    path: str | None, height: int, width: int, channels: int, draw: np.random.Generator
) -> Tensor:
    if path is None:
        coarse = torch.tensor(draw.integers(0, 256, (1, channels, height // 16, width // 16)))
        return nn.functional.interpolate(coarse.float(), (height, width), mode='bilinear')[0].byte()
    picture = mmcv.imread(path, {1: 'grayscale', 3: 'color'}.get(channels, 'unchanged'))
    picture = mmcv.imresize(picture, (width, height)).reshape(height, width, -1)
    if picture.shape[2] != channels:
        raise ValueError(
            f'--image {path} has {picture.shape[2]} channel(s), and the student takes {channels}'
        )
    return torch.from_numpy(picture).permute(2, 0, 1).contiguous()


def _trial(
    model: Any, batch: dict, trained: bool, on: str, wanted: float, report: Report
) -> None:  # fmt: skip
    """Run one step: losses, times, each term's gradient relative to the hard losses', and the
    weight at which it would be the wanted share of theirs."""
    costs: dict[str, float] = {}
    _at_full_weight(model)
    data = model.data_preprocessor(copy.deepcopy(batch), True)
    try:
        model(**copy.deepcopy(data), mode='loss')  # warm-up
        torch.manual_seed(0)
        start = time.perf_counter()
        with _timed(model.teacher, costs):
            values = model(**data, mode='loss')
    except Exception as error:  # reported as the result
        report.against.append(f'{type(error).__name__} in the first step{_place(error)}: {error}')
        return
    forward = time.perf_counter() - start
    single = {k: sum(v) if isinstance(v, list) else v for k, v in values.items() if 'loss' in k}
    own = own_parameters(model)
    hard: Any = sum(v for k, v in single.items() if not k.startswith('loss_kd_'))
    gradient, took = _norm(hard, own)
    head = ['loss', 'value', 'gradient at the student', 'share', 'loss_weight']
    rows = [[*head, f'for a share of {wanted:g}', 'backward, ms']]
    value = float(hard.detach())
    rows.append(['the student alone', f'{value:.4g}', f'{gradient:.3g}', '', '', '', f'{took:.0f}'])
    losses = [dict(loss='the student alone', value=value, gradient=gradient, backward=took)]
    for name, term in model.kd_terms.items():
        logged = log_name(name)
        part: Any = sum(v for k, v in single.items() if term_of(k, model.kd_terms) == name)
        norm, took = _norm(part, own)
        value, share, weight = float(part.detach()), norm / max(gradient, 1e-12), term.loss_weight
        fitting = None if term.share is not None or not share else weight * wanted / share
        to_set = '' if fitting is None else f'{fitting:.2g}'
        rows.append([logged, f'{value:.4g}', f'{norm:.3g}', f'{share:.3g}', f'{weight:g}',
                     to_set if term.share is None else f'found: {term.share.share:g}',
                     f'{took:.0f}'])  # fmt: skip
        losses.append(
            dict(loss=logged, key=f'model.distillation.{name}.loss_weight', loss_weight=weight,
                 value=value, gradient=norm, share=share, backward=took,
                 wanted_share=wanted, weight_for_it=fitting)
        )  # fmt: skip
        if term.share is not None:
            continue  # its weight is computed from this ratio
        if trained and share > DWARFS:
            report.warnings.append(
                f'{logged} dwarfs the hard loss: its gradient is {share:.0f} times as large{on}. '
                f'Try --cfg-options model.distillation.{name}.loss_weight={weight / share:.1g}'
            )
        elif trained and 0 < share < MIN_GRADIENT:
            report.warnings.append(
                f"{logged} vanishes: {share:.1g} of the hard loss's gradient{on}. Try "
                f'--cfg-options model.distillation.{name}.loss_weight={weight * 0.1 / share:.1g}'
            )
    report.say(AsciiTable(rows).table, losses=losses)
    parts = ', '.join(f'{name} {1000 * cost:.0f}' for name, cost in costs.items())
    report.say(
        f'forward with everything: {1000 * forward:.0f} ms; of these the teacher: {parts}',
        forward=dict(all=1000 * forward, teacher={k: 1000 * cost for k, cost in costs.items()}),
    )
    if not trained:
        report.say('(the teacher has random weights: losses and gradients are not representative)')


@contextlib.contextmanager
def _timed(teacher: Any, costs: dict[str, float]) -> Iterator[None]:
    names = {'extract': 'backbone and neck', 'score_anchors': 'anchors', 'score_rois': 'RoIs'}
    originals: dict[str, Callable] = {name: getattr(teacher, name) for name in names}

    def clock(name: str) -> Callable:
        def call(*args: Any) -> Any:
            start = time.perf_counter()
            try:
                return originals[name](*args)
            finally:
                costs[names[name]] = costs.get(names[name], 0) + time.perf_counter() - start

        return call

    for name in names:
        setattr(teacher, name, clock(name))
    try:
        yield
    finally:
        for name in names:
            delattr(teacher, name)


def _norm(value: Tensor, parameters: list[nn.Parameter]) -> tuple[float, float]:
    start = time.perf_counter()
    return float(gradient_norm(value, parameters)), 1000 * (time.perf_counter() - start)


def _under_ddp(cfg: Config, processes: int, report: Report) -> None:
    """Run the step in several processes over gloo, on small images."""
    start = time.perf_counter()
    os.environ['PYTHONWARNINGS'] = 'ignore'  # each process imports everything again
    try:
        multiprocessing.spawn(_process, (processes, cfg, os.getpid()), processes)
    except Exception as error:
        lines = [line for line in str(error).splitlines() if line.strip()]
        report.against.append(f'the step fails under {processes} processes: {lines[-1]}')
        return
    finally:
        Path(_store(os.getpid())).unlink(missing_ok=True)
    took = time.perf_counter() - start
    report.say(
        f'{processes} processes (DDP, gloo): steps in {took:.0f} s',
        ddp=dict(processes=processes, seconds=took),
    )


def _place(error: BaseException) -> str:
    """The last line of the user's code on the way to ``error``; '' if there is none."""
    ours = (
        str(Path(__file__).parents[1]),
        sysconfig.get_path('purelib'),
        sysconfig.get_path('stdlib'),
    )
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if not frame.filename.startswith((*ours, '<')):
            return f' ({frame.filename}:{frame.lineno}, in {frame.name})'
    return ''


def _at_full_weight(model: Any) -> None:
    """Leave schedules out: no iteration is counted here, and a term may begin late."""
    for term in model.kd_terms.values():
        term.schedule = WeightSchedule()


def _process(rank: int, processes: int, cfg: Config, run: int) -> None:
    # A new interpreter: it has not read the config file, which imports the user's modules.
    import_modules_from_strings(**(cfg.get('custom_imports') or dict(imports=[])))
    init_default_scope(cfg.get('default_scope', 'mmdet'))
    torch.set_num_threads(1)
    store = dist.FileStore(_store(run), processes)
    dist.init_process_group('gloo', store=store, rank=rank, world_size=processes)
    detector = _build(cfg.model)
    _at_full_weight(detector)
    model = MMDistributedDataParallel(
        detector,
        broadcast_buffers=False,
        find_unused_parameters=cfg.get('find_unused_parameters', False),
    )
    for _ in range(2):  # DDP reports parameters without a gradient in the next step
        batch = synthetic_batch(cfg, (128, 128), None, 1, input_channels(detector))
        data = model.module.data_preprocessor(batch, True)
        model.module.parse_losses(model(**data, mode='loss'))[0].backward()
    leave()


def _store(run: int) -> str:
    return os.path.join(tempfile.gettempdir(), f'mmkd-check-{run}')


def _epoch(cfg: Config, report: Report) -> None:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    report.say(f'peak memory of this check: {peak:.1f} GiB', peak_memory_gib=peak)
    loader: Any = cfg.get('train_dataloader') or {}
    settings = Unlabelled.of((cfg.model.get('distillation') or {}).get('unlabelled'))
    try:
        size = loader.get('batch_size', 1)
        labelled = size if settings is None else size - settings.of_batch(size)
    except ValueError as error:
        report.against.append(str(error))
        return
    try:
        more = 0 if settings is None else len(find(settings))
        dataset: Any = _dataset(loader.dataset) if labelled else None
        images = len(dataset) if labelled else more
    except Exception as error:  # the check works without data
        report.say(
            f'the training data is not on this machine ({type(error).__name__}): the length of an '
            'epoch is unknown'
        )
        return
    steps = images // (labelled or size)
    beside = f', beside {more} without labels' if more and labelled else ''
    report.say(
        f'an epoch: {images} images, {steps} steps on one device{beside}',
        epoch=dict(images=images, steps=steps),
    )
    try:
        check_labels(dataset)
        with contextlib.suppress(OSError, KeyError, AttributeError, TypeError):
            check_same_labels(dataset, _dataset(cfg.val_dataloader.dataset))
    except ValueError as error:
        report.against.append(str(error))


def _dataset(config: dict) -> Any:
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints
        return DATASETS.build(config)


# ------------------------------------------------------------------------- the teacher on data


def match_batches(
    network: nn.Module, batches: list[dict], indices: list[int | None] | None = None
) -> list[Tensor]:
    """:func:`mmkd.engine.teacher_check.match_boxes` of each image with boxes.

    Args:
        network: the teacher.
        batches: of the teacher's test pipeline, with ground truth.
        indices: the teacher's class for each class of the data; None if they are the same.

    Returns:
        For each image with n > 0 boxes, (n, 5).
    """
    images = []
    for batch in batches:
        with torch.no_grad():
            results = network.test_step(copy.deepcopy(batch))
        for result, sample in zip(results, batch['data_samples'], strict=True):
            boxes, labels = teacher_check.ground_truth(sample, indices)
            if len(boxes):
                images.append(teacher_check.match_boxes(result.pred_instances, boxes, labels))
    return images


def _try_teacher(cfg: Config, network: Any, images: int, report: Report) -> None:
    cfg = at_teachers_scale(cfg)
    loader: Any = cfg.get('val_dataloader') or cfg.get('test_dataloader')
    try:
        dataset = _dataset(dict(loader.dataset, indices=images))
        # The test pipeline keeps boxes in pixels of the file, and detections are rescaled to them.
        batches = [pseudo_collate([dataset[i]]) for i in range(len(dataset))]
    except Exception as error:  # a data set may raise anything
        report.against.append(
            f'--data: the validation data cannot be loaded ({type(error).__name__}: {error})'
        )
        return
    classes = (cfg.model.distillation or {}).get('classes')
    indices = None
    if classes and 'teacher' in classes:
        indices = ClassMap(**classes).indices
    seen = match_batches(network, batches, indices)
    if not seen:
        report.warnings.append(f'no boxes on the first {images} images: the teacher was not tested')
        return
    any_class, right_class, _ = means(seen)
    renamed = teacher_check.best_class_recall(seen)
    report.say(
        f'the teacher on {len(batches)} images, {sum(map(len, seen))} boxes: finds '
        f'{100 * any_class:.0f} % (IoU 0.5), {100 * right_class:.0f} % with the right class',
        teacher=dict(
            images=len(batches), boxes=sum(map(len, seen)), recall=any_class,
            recall_with_class=right_class,
        ),
    )  # fmt: skip
    chance, better = _other_preprocessings(network, batches, indices, seen)
    if chance < CERTAIN:
        report.against.append(
            f'{better}: its data_preprocessor is not the one that it was trained with'
        )
    elif any_class < MIN_RECALL:
        report.against.append(
            f'the teacher finds {100 * any_class:.0f} % of the boxes. That usually means a wrong '
            'checkpoint, a wrong normalisation (mean and std of its data_preprocessor) or data '
            'unlike its training data'
        )
    elif renamed > max(2 * right_class, any_class / 3):
        report.against.append(
            f'the teacher finds {100 * any_class:.0f} % of the boxes, but only '
            f'{100 * right_class:.0f} % with the right class, and {100 * renamed:.0f} % if its '
            'classes stood in another order: give distillation.classes'
        )
    elif chance < SUSPICIOUS:
        report.warnings.append(f'{better}: try it on more images (--data)')


def _other_preprocessings(
    network: Any, batches: list[dict], indices: list | None, seen: list[Tensor]
) -> tuple[float, str]:
    """Compare the teacher's preprocessing with the common ones.

    Returns:
        The p-value of the best one being better, and a sentence for a message, '' if none is
        clearly better. p is 1 if the teacher finds next to nothing with it, as an untrained one.
    """
    preprocessor = network.data_preprocessor
    if len(getattr(preprocessor, 'mean', ())) != 3:
        return 1.0, ''  # the common ones are of three channels, and replace a normalisation
    kept = (preprocessor._channel_conversion, preprocessor.mean, preprocessor.std)
    candidates: dict[str, tuple] = {'the other channel order': (not kept[0], kept[1], kept[2])}
    for name, (swap, mean, std) in PREPROCESSINGS.items():
        values = (kept[1].new_tensor(v).view(-1, 1, 1) for v in (mean, std))
        candidates[name] = (swap, *values)
    others = {}
    try:
        for name, (swap, mean, std) in candidates.items():
            preprocessor._channel_conversion, preprocessor.mean, preprocessor.std = swap, mean, std
            others[name] = match_batches(network, batches, indices)
    finally:
        preprocessor._channel_conversion, preprocessor.mean, preprocessor.std = kept
    chance, best = teacher_check.best_preprocessing(seen, others)
    if not best:
        return chance, ''
    found, _, score = means(seen)
    more, _, higher = means(others[best])
    chance = chance if more >= MIN_RECALL else 1.0
    return chance, (
        f'the teacher finds {100 * found:.0f} % of the boxes as its config prepares pixels (score '
        f'times IoU {score:.3f}), and {100 * more:.0f} % ({higher:.3f}) with {best} '
        f'(p = {chance:.0e})'
    )
