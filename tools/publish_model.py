"""Publishes a trained student: ``mmkd publish``."""

from mmkd.commands.publish import main, publish
from mmkd.engine.exit import run

__all__ = ['main', 'publish']

if __name__ == '__main__':
    run(main)
