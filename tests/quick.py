"""What MMEngine does slowly and no test is about; the results are the same."""

import functools
from collections.abc import Callable
from types import SimpleNamespace

import mmengine.config.config
from mmengine.config import utils
from mmengine.runner import loops


def make_quick(replace: Callable[..., None] = setattr) -> None:
    """``replace`` is called as ``setattr`` is."""
    config = mmengine.config.config
    # Each Runner lays out the text of its config three times, with YAPF: a second a time.
    if hasattr(config, 'FormatCode'):  # (The fork has no such function.)
        replace(config, 'FormatCode', lambda text, **_: (text, True))
    # A config of another package (`mmdet::...`) is looked up by reading all of its YAML files.
    replace(utils, 'load', functools.cache(utils.load))
    # A loop by iterations waits for two seconds between epochs.
    replace(loops, 'time', SimpleNamespace(sleep=lambda seconds: None))
