"""The same trainings as in plain.py, tested on the images that they were trained on.

`make study` runs it, `make study-table` prints its tables.
"""

_base_ = 'plain.py'

_train = {
    'test_dataloader.dataset.ann_file': 'labelled.json',
    'test_dataloader.dataset.data_prefix.img': 'train/',
    'test_evaluator.ann_file': 'data/digits_study/labelled.json',
}
stages = [dict(name='train', split='test', seeds=[0], options=_train)]
