# Zhang and Ma, "Improve Object Detection with Feature-based Knowledge Distillation: Towards
# Accurate and Efficient Detectors", ICLR 2021, with MMRazor's settings for Faster R-CNN.
distillation = dict(
    fbkd=dict(
        type='FBKD',
        weights=[7e-5, 4e-3, 4e-3, 7e-5],  # masked maps, channels, places, relations
        reduction=[4, 4, 2, 2],
        pool=[8, 4, 2, 2],
        pairs=['neck[0]', 'neck[1]', 'neck[2]', 'neck[3]'],  # P2 to P5
    ),
)
runner_type = 'mmkd.DistillationRunner'
