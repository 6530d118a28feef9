"""Published ways to teach a two-stage detector, one file each; docs/methods.md is their table."""

from .cwd import CWD

__all__ = [
    'CWD',
]
