"""What every test shares: MMDetection's registries, one thread, and hypothesis without a clock."""

import pytest
import torch
from hypothesis import HealthCheck, settings
from mmdet.utils import register_all_modules
from mmengine.registry import init_default_scope

settings.register_profile(
    'mmkd',
    deadline=None,
    derandomize=True,
    max_examples=25,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
settings.load_profile('mmkd')


@pytest.fixture(autouse=True, scope='session')
def _mmdet():
    register_all_modules(init_default_scope=True)
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _scope():
    # A Runner of an earlier test may have left another one.
    init_default_scope('mmdet')
