# Distilled on the 800 labelled images and the 7,200 without labels.
_base_ = 'distilled.py'

model = dict(
    distillation=dict(
        unlabelled=dict(
            ann_file='data/digits_second/unlabelled.json',
            img_prefix='data/digits_second/train/',
            share=0.75,
            threshold=0.5,
        )
    )
)
