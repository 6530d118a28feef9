"""mmkd: knowledge distillation for object detectors in MMDetection 3."""

import warnings

from . import versions

versions.check()
# MMEngine still looks packages up by this module, and is told so several times before the first
# line of a run; whoever uses mmkd cannot mend that.
warnings.filterwarnings('ignore', '(pkg_resources is deprecated|Deprecated call to `pkg_resources)')

from .datasets.two_views import TwoViews  # noqa: E402
from .engine.guard import guard  # noqa: E402
from .engine.runner import DistillationRunner  # noqa: E402
from .engine.testing import RelabelledTestLoop  # noqa: E402
from .engine.unlabelled import mixed_dataloader  # noqa: E402
from .io import checkpoint  # noqa: E402
from .methods import (  # noqa: E402
    AT,
    CWD,
    DIST,
    DKD,
    FBKD,
    FGD,
    FGFI,
    FRS,
    KL,
    MGD,
    NKD,
    PKD,
    CrossKD,
    DeFeat,
    DeFeatHead,
    PlainRegression,
    ReviewKD,
)
from .models.chen2017 import (  # noqa: E402
    HintL1Loss,
    HintL2Loss,
    TeacherBoundedL2Loss,
    WeightedSoftCELoss,
)
from .models.detector import (  # noqa: E402
    KnowledgeDistillationTridentFasterRCNN,
    KnowledgeDistillationTwoStageDetector,
)
from .models.terms import DistillTerm, FeatureTerm, Needs, RowTerm  # noqa: E402
from .recipe import plain_student  # noqa: E402
from .registry import TERMS  # noqa: E402
from .shipped import base  # noqa: E402
from .version import __version__  # noqa: E402

# For the whole process, on import: a config names a teacher or a pretrained backbone, and MMEngine
# loads them by CheckpointLoader, which unpickles anything, from many places (init_cfg, inferencers,
# other hooks). Registering its schemes is the documented way to change that, and it is global.
checkpoint.install()

__all__ = [
    'AT',
    'CWD',
    'DIST',
    'DKD',
    'FBKD',
    'FGD',
    'FGFI',
    'FRS',
    'KL',
    'MGD',
    'NKD',
    'PKD',
    'TERMS',
    'CrossKD',
    'DeFeat',
    'DeFeatHead',
    'DistillTerm',
    'FeatureTerm',
    'RowTerm',
    'DistillationRunner',
    'HintL1Loss',
    'HintL2Loss',
    'KnowledgeDistillationTridentFasterRCNN',
    'KnowledgeDistillationTwoStageDetector',
    'Needs',
    'PlainRegression',
    'RelabelledTestLoop',
    'ReviewKD',
    'TeacherBoundedL2Loss',
    'TwoViews',
    'WeightedSoftCELoss',
    '__version__',
    'base',
    'guard',
    'mixed_dataloader',
    'plain_student',
]
