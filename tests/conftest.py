"""What every test shares: MMDetection's registries, one thread, nothing that is slow in vain."""

import gc
import os

# Before PyTorch is imported, and for the processes that tests start: workers of the suite share
# the cores. Set it to 2 to run all tests with two threads.
THREADS = int(os.environ.setdefault('OMP_NUM_THREADS', '1'))

import pytest  # noqa: E402
import torch  # noqa: E402
from hypothesis import HealthCheck, settings  # noqa: E402
from mmdet.utils import register_all_modules  # noqa: E402
from mmengine.config import Config  # noqa: E402
from mmengine.registry import init_default_scope  # noqa: E402
from mmengine.utils import manager  # noqa: E402
from quick import make_quick  # noqa: E402
from tiny import tiny_config  # noqa: E402

settings.register_profile(
    'mmkd',
    deadline=None,
    derandomize=True,
    max_examples=25,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
settings.load_profile('mmkd')


COLLECTED = pytest.StashKey[set[str]]()
"""The names of all tests that were collected, whichever of them are run."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    config.stash[COLLECTED] = {item.nodeid for item in items}


@pytest.fixture
def collected(pytestconfig):
    return pytestconfig.stash[COLLECTED]


@pytest.fixture(autouse=True, scope='session')
def _mmdet():
    register_all_modules(init_default_scope=True)
    torch.set_num_threads(THREADS)
    # MMEngine collects garbage as it builds a data set: not among what will stay for all tests.
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope='session')
def _quick():
    with pytest.MonkeyPatch.context() as patch:
        make_quick(patch.setattr)
        yield


@pytest.fixture(autouse=True)
def _scope():
    # A Runner of an earlier test may have left another one.
    init_default_scope('mmdet')
    yield
    # MMEngine keeps the lock of its loggers and scopes where one of them cannot be made (its disk
    # is full, say); the next test that asks for one in another thread would wait for ever.
    while manager._lock._is_owned():
        manager._lock.release()


@pytest.fixture
def config(tmp_path):
    """A plain detector on a tiny data set, under mmkd's runner."""
    made = Config.fromfile(tiny_config(tmp_path))
    made.runner_type = 'mmkd.DistillationRunner'
    made.experiment_name = tmp_path.name
    return made
