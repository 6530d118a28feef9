"""Published ways to teach a two-stage detector, one file each; docs/methods.md is their table."""

from .at import AT
from .crosskd import CrossKD
from .cwd import CWD
from .defeat import DeFeat, DeFeatHead
from .dist import DIST
from .dkd import DKD
from .fbkd import FBKD
from .fgd import FGD
from .fgfi import FGFI
from .frs import FRS
from .kl import KL
from .mgd import MGD
from .nkd import NKD
from .pkd import PKD
from .regression import PlainRegression
from .reviewkd import ReviewKD

METHODS = (
    CWD, PKD, MGD, FGD, FBKD, ReviewKD, AT, FGFI, DeFeat, DeFeatHead, FRS, KL, DKD, DIST, NKD,
    PlainRegression, CrossKD,
)  # fmt: skip
"""In the order of docs/methods.md: features, features at objects, rows."""
