"""Two processes over gloo: the gradient of one with the doubled batch, and nothing that hangs.

Run as a script, this file is one of the two processes: ``RANK PORT CASE OUT``, where CASE is one of
``CASES``, or the config that a training loop of one's own trains.
"""

import copy
import faulthandler
import os
import socket
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pairs
import pytest
import torch
import warm
from mmdet.models.task_modules.samplers import RandomSampler
from mmdet.registry import MODELS
from mmdet.utils import register_all_modules
from mmengine.config import Config
from mmengine.logging import MessageHub
from mmengine.model import MMDistributedDataParallel
from mmengine.runner import Runner
from tiny import tiny_config
from torch.nn.parallel import DistributedDataParallel

import mmkd
from mmkd.engine.exit import leave
from mmkd.options.share import GradientShare

WORLD = 2
LIMIT = 600  # seconds; a process that takes longer says where it is, and ends
CASES = {
    # the number of boxes on each rank
    'alike': (2, 2),
    'no boxes on one rank': (2, 0),
    'a weight as a share of the gradient': (2, 1),
    'methods with statistics over the batch': (2, 1),
}


def student(case):
    """The paper's terms, or methods; BatchNorm does not see how a batch is divided."""
    hint = dict(share=0.2) if 'share' in case else {}
    recipe = pairs.recipe(hint=hint)
    if 'statistics' in case:
        recipe = dict(pkd=dict(type='PKD'), dist=dict(type='DIST'), reviewkd=dict(type='ReviewKD'))
        recipe['fbkd'] = dict(type='FBKD', reduction=2, pool=2)
    return evaluated(pairs.distil(pairs.fpn(), pairs.fpn(8), recipe, seed=1))


def evaluated(model):
    """In eval mode, but for the terms, which normalise by the batch of their own process."""
    model.eval()
    model.kd_terms.train()
    return model


def first_of(self, gallery, num):
    """Sampling that does not depend on which process draws."""
    return gallery[:num]


def image(case, rank):
    return pairs.batch((CASES[case][rank],), seed=rank)


def work(rank, port, case, out):
    os.environ.update(MASTER_ADDR='127.0.0.1', MASTER_PORT=port)
    torch.distributed.init_process_group(
        'gloo', rank=rank, world_size=WORLD, timeout=timedelta(seconds=300)
    )
    if case in CASES:
        gradients(rank, case, out)
    else:
        own_loop(rank, case, out)
    leave()


def own_loop(rank, path, out):
    """A training loop of one's own, around PyTorch's own wrapper."""
    cfg = Config.fromfile(path)
    torch.manual_seed(rank)
    model = MODELS.build(cfg.model)
    model.init_weights()
    wrapped = DistributedDataParallel(model.train())
    loader = Runner.build_dataloader(cfg.train_dataloader, seed=0)
    optimizer = torch.optim.SGD(wrapped.parameters(), 1e-3)
    result = {}
    for _ in range(2):
        for data in loader:
            data = model.data_preprocessor(data, True)
            if not model.guarded:
                try:
                    wrapped(**copy.deepcopy(data), mode='loss')
                except RuntimeError as error:
                    result['refused'] = str(error)
                mmkd.guard(wrapped, loader)
            total, _ = model.parse_losses(wrapped(**data, mode='loss'))
            optimizer.zero_grad()
            total.backward()
            optimizer.step()
    seen = sorted(loader.batch_sampler.sampler)
    result.update(weights=model.state_dict(), unproven=sorted(model.unproven), seen=seen)
    torch.save(result, out)


def gradients(rank, case, out):
    RandomSampler.random_choice = first_of
    model = student(case)
    wrapped = MMDistributedDataParallel(
        model, find_unused_parameters=False, broadcast_buffers=False
    ).eval()
    evaluated(model)
    for _ in range(2):  # the second step waits for the buckets of the first
        model.zero_grad()
        data = model.data_preprocessor(image(case, rank), True)
        values = wrapped(**data, mode='loss')
        pairs.total(model, values).backward()
    torch.save(GradientShare(1).measured('loss_kd_hint'), ratio_of(Path(out).parent, rank))
    torch.save(pairs.gradients(model), out)


def run(tmp_path, case):
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = str(s.getsockname()[1])
    outs = [tmp_path / f'{rank}.pth' for rank in range(WORLD)]
    env = {**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(pairs.ROOT)}
    # PyTorch looks up the name of each peer: where no name server answers, that must be short.
    env['RES_OPTIONS'] = 'timeout:1 attempts:1'
    workers = [
        subprocess.Popen(
            [warm.python(), __file__, str(rank), port, case, str(out)],
            env=env, cwd=pairs.ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        )
        for rank, out in enumerate(outs)
    ]  # fmt: skip
    try:
        for worker in workers:
            _, errors = worker.communicate(timeout=LIMIT + 30)
            assert worker.returncode == 0, errors.decode()[-3000:]
    finally:
        for worker in workers:
            worker.kill()
    return [torch.load(out, weights_only=True) for out in outs]


def ratio_of(folder, rank):
    """The file with the ratios that a process measured."""
    return folder / f'ratio_{rank}.pth'


def alone_ratio(data, case):
    pairs.losses(student(case), data)
    return MessageHub.get_current_instance().runtime_info.pop('mmkd_gradient_shares')[
        'loss_kd_hint'
    ][0]


def single(data, case):
    model = student(case)
    pairs.total(model, pairs.losses(model, data)).backward()
    return pairs.gradients(model)


@pytest.mark.parametrize('case', CASES)
def test_two_processes_give_the_mean_of_their_gradients(tmp_path, monkeypatch, case):
    """No parameter is left without a gradient on one rank, so none is waited for in vain."""
    monkeypatch.setattr(RandomSampler, 'random_choice', first_of)
    got = run(tmp_path, case)
    if 'share' in case:
        # Each process alone would find another factor; all have found the same.
        own = [alone_ratio(image(case, rank), case) for rank in range(WORLD)]
        together = [torch.load(ratio_of(tmp_path, rank))[-1] for rank in range(WORLD)]
        assert min(own) < together[0] == together[1] < max(own)
        monkeypatch.setattr(GradientShare, 'factor', lambda self, name: self.share / together[0])
    alone = [single(image(case, rank), case) for rank in range(WORLD)]
    assert got[0].keys() == got[1].keys() == alone[0].keys()
    for name, gradient in got[0].items():
        assert torch.equal(gradient, got[1][name])
        torch.testing.assert_close(
            gradient, (alone[0][name] + alone[1][name]) / 2, rtol=1e-4, atol=1e-6
        )
    if case != 'alike':
        return
    # Where every image has as many samples, that is the gradient of the doubled batch.
    both = image(case, 0)
    for key, value in image(case, 1).items():
        both[key] += value
    for name, gradient in single(both, case).items():
        torch.testing.assert_close(got[0][name], gradient, rtol=1e-3, atol=1e-5)


def test_a_loop_of_ones_own_is_guarded_in_two_processes(tmp_path):
    cfg = Config.fromfile(tiny_config(tmp_path))
    cfg.model = pairs.distilled(cfg.model, cfg.model, pairs.recipe())
    cfg.dump(tmp_path / 'pair.py')
    one, two = run(tmp_path, str(tmp_path / 'pair.py'))
    for each in (one, two):
        assert 'nothing has checked' in each['refused'] and each['unproven'] == []
        assert all(value.isfinite().all() for value in each['weights'].values())
    assert not {*one['seen']} & {*two['seen']}  # each process has its own half of the images
    trained = [k for k in one['weights'] if k.endswith(('weight', 'bias'))]
    assert all(torch.equal(one['weights'][key], two['weights'][key]) for key in trained)


if __name__ == '__main__':
    faulthandler.dump_traceback_later(LIMIT, exit=True)
    torch.set_num_threads(1)
    register_all_modules(init_default_scope=True)
    work(int(sys.argv[1]), *sys.argv[2:])
