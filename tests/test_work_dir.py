"""Whose files are in a work directory, and which of them a run goes on from."""

import os
import shutil

import pytest
import torch
from test_resume import Cut, CutHook, Noisy, TellHook, assert_equal, installed, last, runner

from mmkd.engine.exact_resume import latest_checkpoint
from mmkd.io.checkpoint import CheckpointError

__all__ = ['installed']


def test_a_copied_folder_is_gone_on_with_from_its_own_files(tmp_path):
    with pytest.raises(Cut):
        runner(tmp_path / 'a', cut=CutHook(12)).train()
    shutil.copytree(tmp_path / 'a', tmp_path / 'b')
    for name in ('a', 'whole'):
        if name == 'a':
            with pytest.raises(Cut):
                runner(tmp_path / name, cut=CutHook(12), seed=7).train()
        else:
            runner(tmp_path / name).train()
    runner(tmp_path / 'b', resume=True).train()
    assert_equal(last(tmp_path / 'whole'), last(tmp_path / 'b'))
    assert [p.name for p in (tmp_path / 'b').glob('*.pth')] == ['epoch_3.pth']


def test_a_run_that_has_saved_nothing_is_not_gone_on_with_from_the_one_before(tmp_path, capfd):
    runner(tmp_path).train()
    with pytest.raises(Cut):
        runner(tmp_path, cut=CutHook(2), seed=7).train()
    said = ''.join(capfd.readouterr())
    assert 'IS OF AN EARLIER RUN' in said and f'No checkpoint is in {tmp_path}' in said
    path = tmp_path / 'epoch_3.pth'
    with pytest.raises(CheckpointError, match=f'saved nothing, and {path} is .*--resume {path}'):
        runner(tmp_path, resume=True).train()
    named = runner(tmp_path, resume=True, load_from=str(path))
    named.train()
    assert named.iter == 15
    runner(tmp_path, resume=True).train()  # it is this one's now
    with pytest.raises(Cut):
        runner(tmp_path, cut=CutHook(7), seed=7).train()
    on = runner(tmp_path, resume=True)  # from its own first epoch
    on.train()
    assert on.iter == 15 and on.resumed_from.endswith('epoch_1.pth')


def test_a_record_of_a_file_that_is_gone_stops(tmp_path):
    runner(tmp_path).train()
    (tmp_path / 'epoch_3.pth').unlink()
    with pytest.raises(FileNotFoundError, match=r'epoch_3.pth, which does not exist.*from scratch'):
        runner(tmp_path, resume=True).train()
    # MMEngine's own empties it before it writes.
    (tmp_path / 'last_checkpoint').write_text('')
    runner(tmp_path, resume=True).train()


def test_a_stop_is_saved_where_the_others_are(tmp_path, monkeypatch):
    work_dir = tmp_path / 'run'
    for told in (7, 12):
        with pytest.raises(SystemExit):
            runner(work_dir, cut=TellHook(told), resume=True, out_dir=str(tmp_path / 'big')).train()
        stopped = tmp_path / f'big/run/iter_{told}.pth'
        assert stopped.is_file() and latest_checkpoint(str(work_dir)) == str(stopped)
        (stopped.parent / 'epoch_2.pth.123.partial').touch()
    shutil.copy(stopped, work_dir / stopped.name)  # of another time, and not what is recorded
    assert latest_checkpoint(str(work_dir)) == str(stopped)
    runner(work_dir, resume=True, out_dir=str(tmp_path / 'big')).train()
    runner(tmp_path / 'whole').train()
    assert os.listdir(tmp_path / 'big/run') == ['epoch_3.pth']
    ours, own = last(tmp_path / 'whole'), last(work_dir)
    assert_equal(ours, own)


def test_a_relative_folder_is_found_from_elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    work_dir = str(tmp_path / 'run')
    with pytest.raises(SystemExit):
        runner(work_dir, cut=TellHook(7), out_dir='big').train()
    (tmp_path / 'other').mkdir()
    monkeypatch.chdir(tmp_path / 'other')
    assert latest_checkpoint(work_dir) == str(tmp_path / 'big/run/iter_7.pth')
    monkeypatch.chdir(tmp_path)
    runner(work_dir, out_dir='big', resume=True, load_from='big/run/iter_7.pth').train()
    assert os.listdir('big/run') == ['epoch_3.pth']


@pytest.mark.parametrize(('size', 'behind'), [(2, None), (4, 4), (8, 2)])
def test_a_stream_of_images_goes_on_behind_what_was_seen(tmp_path, capfd, size, behind):
    """By iterations, with another batch size: 8 batches of 2 are 4 of 4."""
    setting = dict(loop='iter', every=4, infinite=True, keep=-1)
    whole = Noisy(20)
    runner(tmp_path / 'whole', data=whole, **setting).train()
    path = str(tmp_path / 'whole/iter_8.pth')
    data = Noisy(20)
    begun = dict(setting, data=data, size=size, resume=True)
    runner(tmp_path / 'rest', load_from=path, **begun).train()
    count = min(len(data.read), len(whole.read) - 16)
    assert data.read[:count] == whole.read[16 : 16 + count] and len(data.read) == 5 * size
    said = ''.join(capfd.readouterr())
    if behind:
        assert f'after 8 batches of 2 images, and here a batch of all processes has {size}' in said
        assert f'continues after {behind} of them' in said
    else:
        assert 'continues after' not in said
    # And one that goes on from that run is where it was.
    rest = Noisy(20)
    again = dict(begun, data=rest, load_from=str(tmp_path / 'rest/iter_12.pth'))
    runner(tmp_path / 'more', **again).train()
    assert rest.read == data.read[4 * size :]
    assert 'continues after' not in ''.join(capfd.readouterr())


@pytest.mark.parametrize(
    'forged', [dict(seen=2**47), dict(images=2**60), dict(seen=-3, images='x')]
)
def test_a_forged_place_in_the_stream_takes_no_longer(tmp_path, forged):
    setting = dict(loop='iter', every=4, infinite=True, keep=-1)
    runner(tmp_path / 'whole', **setting).train()
    path = tmp_path / 'whole/iter_8.pth'
    content = torch.load(path, weights_only=True)
    content['mmkd_resume'].update(forged)
    torch.save(content, path)
    data = Noisy()
    runner(tmp_path / 'rest', data=data, resume=True, load_from=str(path), **setting).train()
    assert len(data.read) == 10
    if 'images' not in forged or forged['images'] == 'x':
        assert_equal(last(tmp_path / 'whole'), last(tmp_path / 'rest'))
