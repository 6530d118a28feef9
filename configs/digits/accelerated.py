# mmkd.py with a cheaper forward of the teacher; its answers differ by rounding.
_base_ = 'mmkd.py'

model = dict(
    distillation=dict(
        accelerate=dict(fuse_conv_bn=True, channels_last=True, roi_align=True, dtype='bfloat16'),
    ),
)
