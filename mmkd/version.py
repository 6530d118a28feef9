"""The version of mmkd, read at build time too."""

__version__ = '0.2.0'
