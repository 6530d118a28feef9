"""Labels images with a detector: ``mmkd pseudo-label``."""

from mmkd.commands.pseudo_label import main, parse_args
from mmkd.engine.exit import run

__all__ = ['main', 'parse_args']

if __name__ == '__main__':
    run(main)
