"""Tries a pair before training: ``mmkd check``."""

from mmkd.commands.check import main, parse_args
from mmkd.engine.exit import run

__all__ = ['main', 'parse_args']

if __name__ == '__main__':
    run(main)
