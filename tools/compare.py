"""Compares the distilled student with a baseline trained in the same way: ``mmkd compare``."""

from mmkd.commands.compare import main, parse_args
from mmkd.engine.exit import run

__all__ = ['main', 'parse_args']

if __name__ == '__main__':
    run(main)
