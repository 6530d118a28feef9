"""Runs a study of many arms in stages: ``mmkd study``."""

from mmkd.commands.study import main, parse_args
from mmkd.engine.exit import run

__all__ = ['main', 'parse_args']

if __name__ == '__main__':
    run(main)
