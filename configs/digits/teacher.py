# The teacher, trained twice as long as a student. `make teacher` writes its checkpoint again.
_base_ = ['_base_/detector.py', '_base_/data.py', '_base_/schedule.py']

model = dict(backbone=dict(base_channels=32), neck=dict(in_channels=[32, 64, 128]))

max_epochs = 16
train_cfg = dict(max_epochs=max_epochs, val_interval=max_epochs)
optim_wrapper = dict(optimizer=dict(lr=0.001, weight_decay=0.05))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=100),
    dict(
        type='CosineAnnealingLR',
        T_max=max_epochs,
        eta_min=0.0,
        begin=0,
        end=max_epochs,
        by_epoch=True,
        convert_to_iter_based=True,
    ),
]
