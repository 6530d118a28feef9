"""mmkd: teaching small object detectors from large ones, in MMDetection 3."""

from . import stack

stack.check()

from . import checkpoint  # noqa: E402
from .classes import RelabelledTestLoop  # noqa: E402
from .detector import (  # noqa: E402
    KnowledgeDistillationTridentFasterRCNN,
    KnowledgeDistillationTwoStageDetector,
)
from .losses import HintL1Loss, HintL2Loss, TeacherBoundedL2Loss, WeightedSoftCELoss  # noqa: E402
from .resolution import TwoViews  # noqa: E402
from .runner import DistillationRunner  # noqa: E402
from .teacher import plain_student  # noqa: E402

checkpoint.install()

__all__ = [
    'DistillationRunner',
    'HintL1Loss',
    'HintL2Loss',
    'KnowledgeDistillationTridentFasterRCNN',
    'KnowledgeDistillationTwoStageDetector',
    'RelabelledTestLoop',
    'TeacherBoundedL2Loss',
    'TwoViews',
    'WeightedSoftCELoss',
    'plain_student',
]
