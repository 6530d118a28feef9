# Every config of the page can be built.
from pathlib import Path

from mmdet.registry import MODELS
from mmdet.utils import register_all_modules
from mmengine.config import Config

import mmkd  # noqa: F401  registers the detector

register_all_modules()
for path in sorted(Path().glob('*.py')):
    if 'distillation' in path.read_text():
        model = MODELS.build(Config.fromfile(path).model)
        print(path, *model.kd_terms)
        assert len(model.kd_terms)
