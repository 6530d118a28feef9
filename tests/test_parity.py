"""The published methods against the numbers of public code, by ``benchmarks/parity.py``."""

import copy
import importlib.util
import json

import pytest
import torch
from pairs import ROOT

import mmkd
from mmkd.methods import METHODS

GOLDEN = ROOT / 'tests/golden'
FILES = sorted(GOLDEN.glob('*.json'))


@pytest.fixture(scope='module')
def parity():
    spec = importlib.util.spec_from_file_location('parity', ROOT / 'benchmarks/parity.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def read(name):
    return json.loads((GOLDEN / f'{name}.json').read_text())


def test_every_file_is_within_the_tolerances(parity, capsys):
    assert parity.main([str(GOLDEN)]) == 0
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 1 + 2 * len(FILES) and len(FILES) == 17
    assert {path.stem for path in FILES} == set(parity.CASES)


@pytest.mark.parametrize('path', FILES, ids=lambda path: path.stem)
@pytest.mark.parametrize('side', ['value', 'gradient'])
def test_another_number_is_seen(parity, path, side):
    data = json.loads(path.read_text())
    if side == 'value':
        data['outputs']['loss'] *= 1 + 1e-4
    else:
        leaf = next(iter(data['gradient'].values()))
        while isinstance(leaf[0], list):
            leaf = leaf[0]
        leaf[0] += 1e-3 * max(1e-3, abs(leaf[0]))
    found = parity.compare(data, torch.float64)
    assert found[side] > 1e-9


@pytest.mark.parametrize('name, output', [
    ('fgd', 'mask_fg'), ('fgd', 'bg_loss'), ('cwd', 'per_level'), ('reviewkd', 'fused'),
    ('mgd', 'generated'), ('fgfi', 'mask'), ('frs', 'mask'), ('defeat', 'gt_mask'),
    ('dkd', 'non_target_part'), ('dist', 'intra_class'), ('crosskd_roi', 'loss_reg_kd'),
])  # fmt: skip
def test_another_part_is_seen(parity, name, output):
    data = read(name)
    value = data['outputs'][output]
    if isinstance(value, list):
        while isinstance(value[0], list):
            value = value[0]
        value[0] += 0.1
    else:
        data['outputs'][output] = value * 1.001
    assert parity.compare(data, torch.float64)['parts'] > 1e-4


def test_a_folder_with_a_fault_fails(parity, tmp_path, capsys):
    assert parity.main([str(tmp_path)]) == 1
    (tmp_path / 'cwd.json').write_text(json.dumps(read('cwd')))
    (tmp_path / 'notes.json').write_text('{"cases": {}}')
    assert parity.main([str(tmp_path)]) == 0
    data = read('pkd')
    data['outputs']['loss'] += 1e-3
    (tmp_path / 'pkd_more.json').write_text(json.dumps(data))
    assert parity.main([str(tmp_path)]) == 1
    (tmp_path / 'pkd_more.json').write_text(json.dumps({**data, 'name': 'nothing'}))
    capsys.readouterr()
    assert parity.main([str(tmp_path)]) == 1
    assert "no class belongs to the name 'nothing'" in capsys.readouterr().out


def test_a_suffix_of_a_name_is_no_other_class(parity):
    for name in ('reviewkd_hcl', 'reviewkd'):
        data = {**read(name), 'name': f'{name}_seed7'}
        assert max(parity.compare(data, torch.float64).values()) < 1e-10


@pytest.mark.parametrize('name', ['cwd', 'pkd', 'at', 'frs', 'reviewkd_hcl'])
def test_levels_of_other_shapes_are_read(parity, name):
    """Levels that differ in size are no rectangular list; each here keeps a share of the value."""
    data = read(name)
    dropped = copy.deepcopy(data)
    for side, value in dropped['inputs'].items():
        assert len(value) >= 2, side
        value[0] = [[[row[:4] for row in plane] for plane in image] for image in value[0]]
    dropped['gradient'] = {
        side: [
            [[[row[:4] for row in plane] for plane in image] for image in level]
            if index == 0
            else level
            for index, level in enumerate(value)
        ]
        for side, value in data['gradient'].items()
    }
    dropped['outputs'] = {'loss': data['outputs']['loss']}
    assert parity.compare(dropped, torch.float64)['value'] > 1e-6  # compared, and not the same


def test_each_method_is_found_by_name_and_exported():
    for method in METHODS:
        name = method.__name__
        assert mmkd.TERMS.get(name) is mmkd.TERMS.get(f'mmkd.{name}') is getattr(mmkd, name)
        assert name in mmkd.__all__
