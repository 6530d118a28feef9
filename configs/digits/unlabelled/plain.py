# The plain student on the 800 labelled images of the second half.
_base_ = '../plain.py'

data_root = 'data/digits_second/'
max_iters = 8000

model = dict(
    backbone=dict(
        init_cfg=dict(checkpoint='{{ fileDirname }}/../../../checkpoints/digits_800_backbone.pth')
    )
)

train_dataloader = dict(
    sampler=dict(type='InfiniteSampler', shuffle=True),
    dataset=dict(data_root=data_root, ann_file='labelled.json'),
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
