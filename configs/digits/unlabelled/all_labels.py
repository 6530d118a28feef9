# The student on all 8,000 images, labelled, from the teacher's neck and heads.
_base_ = 'labelled_start.py'

train_dataloader = dict(dataset=dict(ann_file='train.json'))
