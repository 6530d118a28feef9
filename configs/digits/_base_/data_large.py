"""Digits in larger photographs, 192x192 images: `make data-large`. Seen at half their size."""

_base_ = 'data.py'

data_root = 'data/digits_large/'

train_dataloader = dict(dataset=dict(data_root=data_root))
val_dataloader = dict(dataset=dict(data_root=data_root))
test_dataloader = dict(dataset=dict(data_root=data_root))

val_evaluator = dict(ann_file=data_root + 'val.json')
test_evaluator = dict(ann_file=data_root + 'test.json')
