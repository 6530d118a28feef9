"""Scoring and measuring, each in a process of its own: ``tools/compare.py score`` and ``measure``.

They are not run as ``python -m mmkd...``, which would first find a config named mmkd.py in the
user's folder.
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
import platform
import re
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmdet.evaluation.metrics import coco_metric
from mmdet.evaluation.metrics.coco_metric import COCOeval
from mmdet.registry import DATASETS, MODELS
from mmengine.analysis import get_model_complexity_info
from mmengine.config import Config
from mmengine.evaluator import Evaluator
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import init_default_scope
from mmengine.runner import Runner
from mmengine.runner.checkpoint import CheckpointLoader

from ...recipe import without_terms
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


def device() -> str:
    """What networks are timed on."""
    return machine() if torch.cuda.is_available() else f'{machine()}, 1 thread used'


def score(config: str, checkpoint: str, detections: str) -> dict:
    """Evaluates dumped detections with the config's own evaluator.

    CocoMetric rounds what it reports to 0.1 points, as much as the differences that a comparison
    looks for, so the unrounded numbers of the same evaluation are read from its COCOeval.

    Returns:
        ``mAP`` and ``AP50`` (fractions; AP50 None where not reported), ``exact`` (False: rounded by
        the evaluator), ``detections`` and ``images`` (how many) and ``reported``, all scalars that
        the evaluator reported.

    Raises:
        ValueError: if the checkpoint does not fill the network, so that its test means nothing.
    """
    cfg = Config.fromfile(config)
    init_default_scope(cfg.get('default_scope', 'mmdet'))
    load_weights(MODELS.build(cfg.model), checkpoint)
    predictions = read_detections(detections)
    count = sum(len(sample['pred_instances']['bboxes']) for sample in predictions)
    base = {'detections': count, 'images': len(predictions)}
    if count == 0:
        # The COCO evaluator reports nothing then, though the answer is known.
        return {'mAP': 0.0, 'AP50': 0.0, 'exact': True, 'reported': {}, **base}
    reported, evaluations = evaluate(cfg, predictions)
    value, at_50 = find_metrics(reported)
    exact = len(evaluations) == 1
    if exact:
        unrounded = evaluations[0].stats
        assert abs(unrounded[0] - value) < 5.1e-4, (unrounded[0], value)
        value, at_50 = (float(v) for v in unrounded[:2])
    numbers = {k: float(v) for k, v in reported.items() if np.ndim(v) == 0}
    return {'mAP': value, 'AP50': at_50, 'exact': exact, 'reported': numbers, **base}


def evaluate(cfg: Config, predictions: list[dict]) -> tuple[dict, list[COCOeval]]:
    """What the config's evaluator reports of detections, and its evaluations of boxes by COCO."""
    evaluator = Evaluator(cfg.test_evaluator)
    evaluator.dataset_meta = DATASETS.build(cfg.test_dataloader.dataset).metainfo
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
    return revert_sync_batchnorm(model.cuda() if torch.cuda.is_available() else model).eval()


WARM_UP = 3
"""Steps before the first that counts."""


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


def measure(config: str, checkpoint: str, images: int = 30) -> dict:
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
    batches = []
    for batch in Runner.build_dataloader(loader, seed=0):
        batches.append(batch)
        if len(batches) == images:
            break
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
    forward = model.forward
    flops = []
    try:
        for batch in batches[:5]:
            data = model.data_preprocessor(copy.deepcopy(batch))
            samples = data['data_samples']
            model.forward = lambda inputs, samples=samples: forward(inputs, data_samples=samples)
            info = get_model_complexity_info(
                model, None, inputs=data['inputs'], show_table=False, show_arch=False
            )
            flops.append(info['flops'])
        value['gflops'] = float(np.mean(flops)) / 1e9
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
