"""Hints against soft targets, on the images that they were trained on: the paper's Table 5.

The trainings are those of paper.py, tested on the training images; their validation mAP is there.
`make study` runs it, `make study-table` prints its tables.
"""

_base_ = 'paper.py'

_train = {
    'test_dataloader.dataset.ann_file': 'labelled.json',
    'test_dataloader.dataset.data_prefix.img': 'train/',
    'test_evaluator.ann_file': 'data/digits_study/labelled.json',
}
_arms = ['weighted_both', 'bounded_both', 'hint', 'all']
stages = [dict(name='train', split='test', seeds=[0, 1, 2], options=_train, arms=_arms)]
contrasts = [('weighted_both', 'plain'), ('hint', 'plain'), ('hint', 'weighted_both')]
