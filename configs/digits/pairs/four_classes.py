# Other classes: the student has four of the teacher's ten.
_base_ = '../mmkd.py'

metainfo = dict(classes=('3', '5', '6', '8'))
train_dataloader = dict(dataset=dict(metainfo=metainfo))
val_dataloader = dict(dataset=dict(metainfo=metainfo))
test_dataloader = dict(dataset=dict(metainfo=metainfo))

model = dict(roi_head=dict(bbox_head=dict(num_classes=4)))
