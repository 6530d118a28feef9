"""Repeats a step whose loss was not finite: ``mmkd replay``."""

from mmkd.commands.replay import main, parse_args
from mmkd.engine.exit import run

__all__ = ['main', 'parse_args']

if __name__ == '__main__':
    run(main)
