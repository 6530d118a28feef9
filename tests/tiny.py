"""A detection task small enough for a unit test: coloured rectangles on noise, and a detector.

``tiny_config(dir)`` is a plain MMDetection config (no mmkd in it); a test that wants a distilled
student inherits the file it returns and adds the usual ten lines.
"""

import json
from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = ('red', 'green', 'blue')
IMAGE_SIZE = 64
"""Side of the square images, in pixels."""

_CONFIG = """\
_base_ = ['mmdet::_base_/models/faster-rcnn_r50_fpn.py', 'mmdet::_base_/default_runtime.py']

classes = {classes!r}
data_root = {root!r}

model = dict(
    backbone=dict(
        depth=18, base_channels={base_channels}, frozen_stages=-1, norm_eval=False, init_cfg=None),
    neck=dict(in_channels=[{base_channels} * 2**i for i in range(4)], out_channels={channels}),
    rpn_head=dict(
        in_channels={channels},
        feat_channels={channels},
        anchor_generator=dict(scales=[4], ratios=[0.5, 1.0, 2.0])),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels={channels}, roi_layer=dict(output_size=3)),
        bbox_head=dict(
            in_channels={channels}, fc_out_channels=16, roi_feat_size=3, num_classes=len(classes))),
    train_cfg=dict(
        rpn=dict(sampler=dict(num=64)),
        rpn_proposal=dict(nms_pre=50, max_per_img=50),
        rcnn=dict(sampler=dict(num=32))),
    test_cfg=dict(rpn=dict(nms_pre=50, max_per_img=50), rcnn=dict(max_per_img=10)))

train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', with_bbox=True),
    dict(type='Resize', scale=({size}, {size}), keep_ratio=True),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PackDetInputs')]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=({size}, {size}), keep_ratio=True),
    dict(type='LoadAnnotations', with_bbox=True),
    dict(
        type='PackDetInputs',
        meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor'))]

train_dataloader = dict(
    batch_size={batch_size},
    num_workers=0,
    sampler=dict(type='DefaultSampler', shuffle=True),
    batch_sampler=dict(type='AspectRatioBatchSampler'),
    dataset=dict(
        type='CocoDataset',
        data_root=data_root,
        metainfo=dict(classes=classes),
        ann_file='train.json',
        data_prefix=dict(img='images/'),
        pipeline=train_pipeline))
val_dataloader = dict(
    batch_size={batch_size},
    num_workers=0,
    drop_last=False,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(
        type='CocoDataset',
        data_root=data_root,
        metainfo=dict(classes=classes),
        ann_file='val.json',
        data_prefix=dict(img='images/'),
        test_mode=True,
        pipeline=test_pipeline))
test_dataloader = val_dataloader
val_evaluator = dict(type='CocoMetric', ann_file=data_root + '/val.json', metric='bbox')
test_evaluator = val_evaluator

train_cfg = dict(type='EpochBasedTrainLoop', max_epochs={epochs}, val_interval=1)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')
optim_wrapper = dict(
    type='OptimWrapper', optimizer=dict(type='SGD', lr=0.01, momentum=0.9, weight_decay=1e-4))
auto_scale_lr = dict(enable=False, base_batch_size=16)
default_hooks = dict(logger=dict(interval=1))
env_cfg = dict(cudnn_benchmark=False, mp_cfg=dict(mp_start_method='fork', opencv_num_threads=0))
randomness = dict(seed=0)
work_dir = {work_dir!r}
"""


def write_tiny_dataset(directory: str | Path, train: int = 16, val: int = 8, seed: int = 0) -> Path:
    """Writes ``images/``, ``train.json`` and ``val.json`` (COCO) below ``directory`` / ``data``.

    Each image is 64x64 with one or two rectangles of 16-32 px in one of three colours.

    Returns:
        The data root, ``directory / 'data'``.
    """
    rng = np.random.default_rng(seed)
    root = Path(directory).resolve() / 'data'
    (root / 'images').mkdir(parents=True, exist_ok=True)
    categories = [{'id': i + 1, 'name': name} for i, name in enumerate(CLASSES)]
    for split, count in (('train', train), ('val', val)):
        images, annotations = [], []
        for i in range(count):
            pixels = rng.integers(0, 96, (IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8)
            for _ in range(int(rng.integers(1, 3))):
                w, h = (int(v) for v in rng.integers(16, 33, 2))
                x, y = (int(rng.integers(0, IMAGE_SIZE - side + 1)) for side in (w, h))
                label = int(rng.integers(len(CLASSES)))
                pixels[y : y + h, x : x + w, label] = 255
                annotations.append(
                    {
                        'id': len(annotations) + 1,
                        'image_id': i,
                        'category_id': label + 1,
                        'bbox': [x, y, w, h],
                        'area': w * h,
                        'iscrowd': 0,
                    }
                )
            name = f'{split}_{i:03d}.png'
            Image.fromarray(pixels).save(root / 'images' / name)
            images.append({'id': i, 'file_name': name, 'width': IMAGE_SIZE, 'height': IMAGE_SIZE})
        (root / f'{split}.json').write_text(
            json.dumps({'images': images, 'annotations': annotations, 'categories': categories})
        )
    return root


def tiny_config(
    directory: str | Path,
    name: str = 'tiny',
    epochs: int = 1,
    batch_size: int = 4,
    base_channels: int = 4,
    channels: int = 8,
) -> Path:
    """Writes the data set (once) and a plain Faster R-CNN config for it.

    Args:
        directory: Where ``data/``, ``<name>.py`` and ``work_dirs/<name>`` go.
        base_channels: Width of the ResNet-18 (4: stages of 4, 8, 16 and 32 channels).
        channels: Width of FPN and RPN.

    Returns:
        The path of the config; its ``work_dir`` is ``directory / 'work_dirs' / name``.
    """
    directory = Path(directory).resolve()
    root = directory / 'data'
    if not (root / 'val.json').exists():
        write_tiny_dataset(directory)
    path = directory / f'{name}.py'
    path.write_text(
        _CONFIG.format(
            classes=CLASSES,
            root=str(root),
            size=IMAGE_SIZE,
            epochs=epochs,
            batch_size=batch_size,
            base_channels=base_channels,
            channels=channels,
            work_dir=str(directory / 'work_dirs' / name),
        )
    )
    return path
