"""Scoring and measuring, each in a process of its own: ``tools/compare.py score`` and ``measure``.

They are not run as ``python -m mmkd...``, which would first find a config named mmkd.py in the
user's folder.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import json
import os
import platform
import re
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmdet.evaluation.metrics import coco_metric
from mmdet.evaluation.metrics.coco_metric import COCOeval
from mmdet.registry import DATASETS, MODELS
from mmengine.analysis import FlopAnalyzer
from mmengine.config import Config
from mmengine.evaluator import Evaluator
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import init_default_scope
from mmengine.runner import Runner
from mmengine.runner.checkpoint import CheckpointLoader
from torch import Tensor

from ...datasets.annotations import boxes_of
from ...recipe import without_terms
from ...version import __version__
from ...versions import installed
from .errors import Image, error_costs
from .results import find_metrics, read_detections


def write_json(path: Path, value: dict) -> None:
    """Writes atomically: a file that exists is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(
        'w', dir=path.parent, prefix='.', suffix='.part', delete=False
    ) as file:
        json.dump(value, file, indent=1, allow_nan=False)
        file.write('\n')
    os.chmod(file.name, 0o644)
    os.replace(file.name, path)


def cpu_cores() -> int:
    """Number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1


def machine() -> str:
    """The GPU, or the CPU and how many of its cores can be used."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    model = ''
    with contextlib.suppress(OSError):
        found = re.search(r'model name\s*:\s*(.*)', Path('/proc/cpuinfo').read_text())
        model = found[1] if found else ''
    return f'{model or platform.processor() or platform.machine()}, {cpu_cores()} cores'


def versions() -> dict[str, str]:
    """The versions of mmkd and of what it runs on, by distribution."""
    return {'mmkd': __version__, **installed()}


def device() -> str:
    """What networks are timed on."""
    return machine() if torch.cuda.is_available() else f'{machine()}, 1 thread used'


def score(config: str, checkpoint: str, detections: str) -> dict:
    """Evaluates dumped detections with the config's own evaluator.

    CocoMetric rounds what it reports to 0.1 points, as much as the differences that a comparison
    looks for, so the unrounded numbers of the same evaluation are read from its COCOeval.

    Returns:
        ``mAP`` and ``AP50`` (fractions; AP50 None where not reported), ``exact`` (False: rounded by
        the evaluator), ``detections`` and ``images`` (how many), ``reported``, all scalars that the
        evaluator reported, and ``detail``, what the report shows besides: ``class_count``,
        ``errors`` (:func:`.errors.error_costs`; ``errors_why`` where there are none), and of a COCO
        evaluator AP by threshold and size, ``precision`` and ``classes`` (see :func:`_detail`).

    Raises:
        ValueError: if the checkpoint does not fill the network, so that its test means nothing.
    """
    cfg = Config.fromfile(config)
    init_default_scope(cfg.get('default_scope', 'mmdet'))
    load_weights(MODELS.build(cfg.model), checkpoint)
    predictions = read_detections(detections)
    dataset = DATASETS.build(cfg.test_dataloader.dataset)
    count = sum(len(sample['pred_instances']['bboxes']) for sample in predictions)
    base: dict[str, Any] = {'detections': count, 'images': len(predictions)}
    base['detail'] = {'class_count': len(dataset.metainfo['classes'])}
    try:
        costs = error_costs(_images(dataset, predictions))
        base['detail']['errors'] = {kind: round(cost, 5) for kind, cost in costs.items()}
    except Exception as error:  # any data set of the user's; the numbers are known without
        base['detail']['errors_why'] = f'{type(error).__name__}: {str(error)[:120]}'
    if count == 0:
        # The COCO evaluator reports nothing then, though the answer is known.
        names = dataset.metainfo['classes']
        classes = dict.fromkeys(names, 0.0) if len(names) <= MOST_CLASSES else None
        base['detail'] |= {'precision': [0.0] * 101, 'classes': classes}
        return {'mAP': 0.0, 'AP50': 0.0, 'exact': True, 'reported': {}, **base}
    reported, evaluations = evaluate(cfg, predictions, dataset.metainfo)
    value, at_50 = find_metrics(reported)
    exact = len(evaluations) == 1
    if exact:
        stats = evaluations[0].stats
        assert abs(stats[0] - value) < 5.1e-4, (stats[0], value)
        value, at_50 = (float(v) for v in stats[:2])
        base['detail'] |= _detail(evaluations[0])
    numbers = {k: float(v) for k, v in reported.items() if np.ndim(v) == 0}
    return {'mAP': value, 'AP50': at_50, 'exact': exact, 'reported': numbers, **base}


def evaluate(cfg: Config, predictions: list[dict], metainfo: Any) -> tuple[dict, list[COCOeval]]:
    """What the config's evaluator reports of detections, and its evaluations of boxes by COCO.

    ``metainfo`` is that of the tested data set.
    """
    evaluator = Evaluator(cfg.test_evaluator)
    evaluator.dataset_meta = metainfo
    evaluations: list[COCOeval] = []

    class RecordingCOCOeval(COCOeval):
        def summarize(self) -> None:
            super().summarize()
            if self.params.iouType == 'bbox' and self.params.useCats:
                evaluations.append(self)

    coco_metric.COCOeval = RecordingCOCOeval
    try:
        return evaluator.offline_evaluate(predictions), evaluations
    finally:
        coco_metric.COCOeval = COCOeval


MOST_CLASSES = 100
"""Of which each AP is kept: a result is a line of a few kB."""


def _detail(evaluation: Any) -> dict:
    """What a COCOeval holds besides mAP and AP50, as fractions; None: no object to find.

    Returns:
        ``AP75``, ``AP_small``, ``AP_medium`` and ``AP_large``; ``precision`` at IoU 0.5 and 101
        recalls from 0 to 1, the mean over classes; ``classes``, AP by name (None: above
        ``MOST_CLASSES``).
    """
    names = ('AP75', 'AP_small', 'AP_medium', 'AP_large')
    detail: dict[str, Any] = {
        name: round(float(value), 5) if value >= 0 else None
        for name, value in zip(names, evaluation.stats[2:6], strict=True)
    }
    # (thresholds, recalls, classes, areas, numbers of detections); -1: a class without an object.
    precision = evaluation.eval['precision'][:, :, :, 0, -1]
    ids = evaluation.params.catIds
    known = [k for k in range(len(ids)) if (precision[:, :, k] > -1).any()]
    at_50 = np.flatnonzero(np.isclose(evaluation.params.iouThrs, 0.5))
    if len(at_50) and known:
        curve = precision[at_50[0]][:, known].mean(1)
        detail['precision'] = [round(float(value), 3) for value in curve]
    detail['classes'] = None
    if len(ids) <= MOST_CLASSES:
        named = [category['name'] for category in evaluation.cocoGt.loadCats(ids)]
        detail['classes'] = {
            name: round(float(precision[:, :, k].mean()), 4) if k in known else None
            for k, name in enumerate(named)
        }
    return detail


def _images(dataset: Any, predictions: Sequence[dict]) -> Iterator[Image]:
    """The objects and the detections of each image of a test set."""
    found = {sample['img_id']: sample['pred_instances'] for sample in predictions}
    for index in range(len(dataset)):
        info = dataset.get_data_info(index)
        of_image = found.get(info['img_id'], {'bboxes': [], 'labels': [], 'scores': []})
        boxes, labels, crowd = boxes_of(info)
        yield Image(
            boxes[~crowd],
            labels[~crowd],
            boxes[crowd],
            labels[crowd],
            np.asarray(of_image['bboxes'], dtype=float).reshape(-1, 4),
            np.asarray(of_image['labels'], dtype=int),
            np.asarray(of_image['scores'], dtype=float),
        )


def load_weights(network: Any, checkpoint: str) -> None:
    """Loads a checkpoint strictly, without the adapters that a distilled student's may hold.

    Raises:
        ValueError: naming the keys that are missing, too many, or of another shape.
    """
    state = CheckpointLoader.load_checkpoint(checkpoint, map_location='cpu')
    state = state.get('state_dict', state)
    state = {key.removeprefix('module.'): value for key, value in state.items()}
    state = without_terms(state)
    try:
        result = network.load_state_dict(state, strict=False)
    except RuntimeError as error:
        why = str(error).strip().splitlines()[-1].strip()
        raise ValueError(
            f'{checkpoint} does not fit the network that is tested: {why} Its numbers would mean '
            'nothing'
        ) from None
    missing = [key for key in result.missing_keys if not key.endswith('num_batches_tracked')]
    if missing or result.unexpected_keys:
        raise ValueError(
            f'{checkpoint} does not fit the network that is tested: missing {missing[:3]} '
            f'({len(missing)}), unexpected {result.unexpected_keys[:3]} '
            f'({len(result.unexpected_keys)}). Its numbers would mean nothing'
        )


def load_network(cfg: Config, checkpoint: str) -> Any:
    """Builds a plain network for inference, on the GPU if there is one, and loads its weights.

    Raises:
        ValueError: naming the keys that are missing or too many.
    """
    init_default_scope(cfg.get('default_scope', 'mmdet'))
    model = MODELS.build(cfg.model)
    load_weights(model, checkpoint)
    model = revert_sync_batchnorm(model.cuda() if torch.cuda.is_available() else model)
    model.eval()  # which returns nothing where the detector is one of MMDetection's distilled ones
    return model


WARM_UP = 3
"""Steps before the first that counts."""
IMAGES = 30
"""On which a network is measured, at most."""


def time_step(model: Any, batch: Any) -> float:
    """The seconds that pre-processing, network and NMS take; ``batch`` stays as it is."""
    batch = copy.deepcopy(batch)
    cuda = torch.cuda.is_available()
    with torch.no_grad():
        if cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        model.test_step(batch)
        if cuda:
            torch.cuda.synchronize()
    return time.perf_counter() - start


def flops(network: Any, inputs: Tensor, samples: list) -> float:
    """Multiply-adds of convolutions and linear layers; a network may raise anything."""
    forward = network.forward
    network.forward = lambda inputs: forward(inputs, samples)
    try:
        return FlopAnalyzer(network, inputs).total()
    finally:
        network.forward = forward


def measure(config: str, checkpoint: str) -> dict:
    """Measures a plain network's parameters, GFLOPs and speed on test images, one at a time.

    Returns:
        ``params``; ``gflops``: multiply-adds of convolutions and linear layers in units of 1e9,
        mean over images (None: not computable, ``gflops_why`` says why); ``images_per_second``:
        1 / the median time of pre-processing, network and NMS, without reading the image, on one
        thread of a CPU or on one GPU; ``load_before``: the machine's load average before;
        ``device`` and ``images``.
    """
    busy = os.getloadavg()[0]
    cfg = Config.fromfile(config)
    torch.set_num_threads(1)
    model = load_network(cfg, checkpoint)
    loader = dict(cfg.test_dataloader, batch_size=1, num_workers=0, persistent_workers=False)
    for key in ('prefetch_factor', 'batch_sampler'):
        loader.pop(key, None)
    loader.setdefault('sampler', {'type': 'DefaultSampler', 'shuffle': False})
    batches = list(itertools.islice(Runner.build_dataloader(loader, seed=0), IMAGES))
    for batch in batches[:WARM_UP]:
        time_step(model, batch)
    times = [time_step(model, batch) for batch in batches]
    value: dict[str, Any] = {
        'kind': 'measure',
        'params': sum(p.numel() for p in model.parameters()),
        'images_per_second': float(1 / np.median(times)),
        'images': len(times),
        'load_before': busy,
        'device': device(),
    }
    try:
        data = [model.data_preprocessor(copy.deepcopy(batch)) for batch in batches[:5]]
        counts = [flops(model, each['inputs'], each['data_samples']) for each in data]
        value['gflops'] = float(np.mean(counts)) / 1e9
    except Exception as error:  # an unknown network may raise anything
        value['gflops'] = None
        value['gflops_why'] = f'{type(error).__name__}: {str(error).splitlines()[0][:120]}'
    return value


def main(arguments: Sequence[str]) -> int:
    """Runs ``score CONFIG CHECKPOINT DETECTIONS OUT`` or ``measure CONFIG CHECKPOINT OUT``."""
    command, config, checkpoint, *detections, out = arguments
    if command == 'score':
        write_json(Path(out), score(config, checkpoint, *detections))
    else:
        write_json(Path(out), measure(config, checkpoint))
    return 0
