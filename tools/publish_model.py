"""Publishes a trained student: ``mmkd publish``."""

from mmkd.commands.publish import main, publish

__all__ = ['main', 'publish']

if __name__ == '__main__':
    main()
