"""Writes the config of a new pair: ten lines: ``mmkd new-pair``."""

from mmkd.commands.new_pair import main, parse_args
from mmkd.engine.exit import run

__all__ = ['main', 'parse_args']

if __name__ == '__main__':
    run(main)
