"""Checks for a distilled training that runs without DistillationRunner."""

from __future__ import annotations

from mmengine.logging import MMLogger
from torch import nn
from torch.utils.data import DataLoader

from ..datasets.intact_images import require_intact_images
from ..datasets.labels import check_labels, check_same_labels
from ..inference import require_teacher
from ..options.class_map import first_names
from .class_names import teacher_names
from .summary import startup_table
from .training_checks import TrainingSetupError, check_teaching
from .unlabelled import check_data, set_thresholds
from .wrappers import distils, unwrap


def guard(model: nn.Module, train_dataloader: DataLoader) -> None:
    """Check a distilling detector before a training loop of one's own, and let it train.

    DistillationRunner does this, and more, by itself. Here the data's labels, the class map, the
    teacher's freeze and its detections are checked, and the table of what is trained is logged.

    Args:
        model: the detector, wrapped (DDP) or not, its weights initialised.
        train_dataloader: of the training data, with MMDetection's data set.

    Raises:
        ValueError: the data number their classes in another order than their names; the unlabelled
            images are not in the data.
        TrainingSetupError: teacher and student have other classes, and no class map.
        TeacherError: the teacher is not frozen, does not detect, or its files are missing.
    """
    detector = unwrap(model)
    if not distils(detector):
        return
    require_teacher(detector)
    data = train_dataloader.dataset
    own = list((getattr(data, 'metainfo', None) or {}).get('classes') or [])
    labels = detector.unlabelled
    if labels.on:
        set_thresholds(labels, own)
        check_data(labels, train_dataloader)
    if not detector.kd_terms and not labels.asks:
        detector.guarded = True
        return
    check_labels(data)
    check_same_labels(data, None)
    require_intact_images(data)
    theirs = teacher_names(detector.teacher.config, detector.teacher.source)
    by_class = 'rcnn' in detector.sites or labels.asks
    if detector.classes is None and by_class and theirs not in (None, own) and own:
        raise TrainingSetupError(
            f'the student has the classes {first_names(own)} and the teacher '
            f'{first_names(theirs)}, in other numbers or another order, and they are not mapped: '
            f'give distillation.classes=dict(student={own!r}, teacher={theirs!r})'
        )
    logger = MMLogger.get_current_instance()
    logger.info(startup_table(detector))
    check_teaching(detector, train_dataloader, logger)
