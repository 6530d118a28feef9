# The far student: an eighth of its teacher's width, on 250 labelled images, augmented. 1,000
# iterations train each of the three students to the end: docs/digits.md. Their backbones are
# pretrained on all training images (which digit is in a window), as ImageNet pretrains a zoo
# detector's: `make study-backbones`.
_base_ = '../plain.py'

data_root = 'data/digits_study/'
max_iters = 1000

train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', with_bbox=True),
    dict(type='PhotoMetricDistortion'),
    dict(type='RandomChoiceResize', scales=[(80, 80), (96, 96), (112, 112)], keep_ratio=True),
    dict(type='PackDetInputs'),
]
train_dataloader = dict(
    sampler=dict(type='InfiniteSampler', shuffle=True),
    dataset=dict(data_root=data_root, ann_file='labelled.json', pipeline=train_pipeline),
)
val_dataloader = dict(dataset=dict(data_root=data_root))
test_dataloader = dict(dataset=dict(data_root=data_root))
val_evaluator = dict(ann_file=data_root + 'val.json')
test_evaluator = dict(ann_file=data_root + 'test.json')

train_cfg = dict(
    _delete_=True, type='IterBasedTrainLoop', max_iters=max_iters, val_interval=max_iters
)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=100),
    dict(
        type='CosineAnnealingLR', T_max=max_iters, eta_min=0.0, begin=0, end=max_iters,
        by_epoch=False,
    ),
]  # fmt: skip
default_hooks = dict(checkpoint=dict(by_epoch=False, interval=1000))
log_processor = dict(by_epoch=False)
