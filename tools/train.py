"""Trains a detector; the options are MMDetection's: ``mmkd train``."""

from mmkd.commands.train import main, parse_args
from mmkd.engine.exit import run

__all__ = ['main', 'parse_args']

if __name__ == '__main__':
    run(main)
