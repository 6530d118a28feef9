"""A study: its file, stages and decisions, resuming, tables, and the arithmetic of contrasts."""

import io
import itertools
import json
import math
import os
import shutil
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import warm
from mmdet.evaluation.metrics.coco_metric import COCOeval
from mmdet.registry import DATASETS
from mmengine.config import Config
from pairs import ROOT
from pycocotools.coco import COCO
from scipy import stats
from test_compare import Fake, write_configs
from tiny import tiny_config

from mmkd.analysis import study as studies
from mmkd.analysis.comparison import plan_runs
from mmkd.analysis.comparison.measure import evaluate, write_json
from mmkd.analysis.comparison.plan import _cached
from mmkd.analysis.comparison.progress import Progress
from mmkd.analysis.comparison.results import read_detections, read_results
from mmkd.analysis.comparison.statistics import paired_interval
from mmkd.analysis.comparison.table import percent
from mmkd.analysis.study.declaration import options_of, read_study
from mmkd.analysis.study.images import weighted_map
from mmkd.analysis.study.stages import (
    Standing,
    check,
    entrants,
    later_cost,
    plan_stage,
    variant_run,
)
from mmkd.analysis.study.statistics import (
    DRAWS,
    Bootstrap,
    bootstrap,
    contrast_interval,
    pool,
    seeds_needed,
)
from mmkd.analysis.study.table import Line, StageSummary, judge_contrasts
from mmkd.commands import study as command

STUDY = """\
arms = dict(
    plain=dict(config={plain!r}),
    paper=dict(config={paper!r}),
    start=dict(config={paper_start!r}, search={{'model.distillation.hint.loss_weight': [1, 4]}}),
    mmkd=dict(config={mmkd!r}, overrides={{'optim_wrapper.optimizer.lr': 0.02}}),
    other=dict(config={mmkd!r}))
stages = [
    dict(name='screen', seeds=[0], options={{'train_cfg.max_epochs': 2}}, keep='half'),
    dict(name='second', seeds=[0, 1], keep=1),
    dict(name='final', split='test', seeds=[0, 1, 2], arms=['paper', 'winners'])]
contrasts = [('winner', 'plain'), ('winner', 'paper')]
claim = 'winner'
"""
GAINS = {'plain': 0, 'paper': 2, 'start-hint.loss_weight-1': 1, 'start-hint.loss_weight-4': 9,
         'mmkd': 6, 'other': 4, 'teacher': 20}  # fmt: skip


TESTED = """
tested = dict(val_dataloader['dataset'], ann_file='test.json')
test_dataloader = dict(val_dataloader, dataset=tested)
test_evaluator = dict(val_evaluator, ann_file={file!r})
"""


@pytest.fixture(scope='module')
def configs(tmp_path_factory):
    paths = write_configs(tmp_path_factory.mktemp('configs'))
    with_test_set(Path(paths['plain']))
    return paths


def with_test_set(config):
    """Gives a tiny config a test set of its own."""
    data = config.parent / 'data'
    shutil.copy(data / 'val.json', data / 'test.json')
    with config.open('a') as file:
        file.write(TESTED.format(file=str(data / 'test.json')))


@pytest.fixture
def write(configs, tmp_path):
    """Writes a study: the one above, or another text, with the paths filled in."""

    def write(text=STUDY):
        path = tmp_path / 'methods.py'
        path.write_text(text.format(**configs))
        return str(path)

    return write


def maps(name):
    """mAP by the folder of a run: the arm's gain, the seed's effect, and a little noise."""
    arm = max((arm for arm in GAINS if name.startswith(arm)), key=len)
    seed = int(name.split('-s')[-1][0]) if arm != 'teacher' else 0
    return 0.3 + 0.01 * GAINS[arm] + 0.02 * seed + 0.001 * ((len(arm) * 7 + seed * 3) % 5)


def call(path, fake, tmp_path, **kwargs):
    stream = io.StringIO()
    kwargs.setdefault('jobs', 1)
    code = studies.study(path, tmp_path / 'work', execute=fake, stream=stream, **kwargs)
    return code, stream.getvalue()


def table(text, heading):
    """The rows of the first table below a heading, by the names of the columns."""
    lines = text.split(heading + '\n' if heading.startswith('###') else heading)[1].splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith('| '))
    rows = itertools.takewhile(lambda line: line.startswith('| '), lines[start:])
    cells = [[cell.strip() for cell in row.split('|')[1:-1]] for row in rows]
    head, body = cells[0], [c for c in cells[1:] if not set(c[0]) <= {'-'}]
    return [dict(zip(head, row, strict=False)) for row in body]


# ------------------------------------------------------------------------------- stages


@pytest.mark.parametrize('path', sorted((ROOT / 'benchmarks/study').glob('*.py')), ids=str)
def test_each_arm_of_a_shipped_study_is_a_training_of_its_own(path, monkeypatch):
    class All:
        """The keys of runs that have a result, for which no data are looked for."""

        def __contains__(self, key):
            return True

    monkeypatch.chdir(ROOT)
    study = read_study(str(path))
    assert set(check(study, 1, All())) == {stage.name for stage in study.stages}


def test_a_study_halves_on_validation_and_ends_on_test(write, tmp_path):
    fake = Fake(maps)
    code, out = call(write(), fake, tmp_path)
    assert code == 0, out
    text = (tmp_path / 'work/methods.md').read_text()
    assert text in out
    screen = {(r['arm'], r['values']): r for r in table(text, '## screen')}
    assert screen['start', 'hint.loss_weight=4']['decision'] == 'value chosen, kept'
    assert screen['start', 'hint.loss_weight=1']['decision'] == 'value not chosen'
    # Four candidates beside the reference: two go on.
    assert screen['mmkd', '']['decision'] == 'kept'
    assert screen['other', '']['decision'] == screen['paper', '']['decision'] == 'dropped'
    assert screen['plain', '']['decision'] == ''
    second = {r['arm']: r for r in table(text, '## second')}
    assert set(second) == {'teacher', 'plain', 'start', 'mmkd'}
    assert (second['start']['values'], second['start']['seeds']) == ('hint.loss_weight=4', '2')
    final = {r['arm']: r for r in table(text, '## final')}
    assert {'plain', 'paper', 'start'} < set(final) and 'mmkd' not in final
    # On test, seeds 0 and 1 of two arms have been trained for the second stage.
    assert len(fake.trained()) == 6 + 3 * 2 + (2 * 1 + 3)
    assert (tmp_path / 'work/methods.svg').read_text().startswith('<?xml')

    results = read_results(tmp_path / 'work/results.jsonl')
    assert results.runs and not any('curves' in run for run in results.runs.values())
    decided = results.others['decision', 'screen']
    assert (decided['kept'], decided['dropped']) == (['start', 'mmkd'], ['other', 'paper'])
    assert decided['values'] == {'start': ['hint.loss_weight=4']}
    assert results.others['decision', 'final']['arms'] == [
        'plain', 'paper', 'start (hint.loss_weight=4)',
    ]  # fmt: skip

    again = Fake(maps)
    code, out = call(write(), again, tmp_path)
    assert (code, again.commands) == (0, [])
    code, out = call(write(), None, tmp_path, table_only=True)
    assert code == 0 and text in out


def test_a_reader_sees_numbers_that_are_right(write, tmp_path):
    call(write(), Fake(maps), tmp_path)
    text = (tmp_path / 'work/methods.md').read_text()
    points = {
        arm: [100 * maps(f'{arm}-s{seed}') for seed in range(3)]
        for arm in ('plain', 'paper', 'start-hint.loss_weight-4')
    }
    start = points['start-hint.loss_weight-4']
    pair = [a - b for a, b in zip(start, points['plain'], strict=True)]
    row = {r['arm']: r for r in table(text, '## final')}['start']
    low, high = paired_interval(pair)
    assert row['mAP'] == f'{np.mean(start):.1f}\xa0±\xa0{np.std(start, ddof=1):.1f}'
    assert row['over plain'] == f'{np.mean(pair):+.2f}'
    assert row['95 %, seeds'] == f'[{low:+.2f}, {high:+.2f}]'
    gap = 100 * maps('teacher') - np.mean(points['plain'])
    assert row['gap share'] == f'{100 * np.mean(pair) / gap:.0f} %'
    assert 0 < float(row['at least'].split()[0]) < 100 * np.mean(pair) / gap
    low, high = contrast_interval(np.mean(pair), pool(list(points.values())), 2)
    contrasts = text.split('Declared contrasts')[1]
    assert f'| start - plain | {np.mean(pair):+.2f}' in contrasts
    assert f'[{low:+.2f}, {high:+.2f}]' in contrasts
    assert low > 0 and '| BEATS ' in contrasts.split('| start - plain |')[1].splitlines()[0]
    assert 'corrected after Bonferroni (declared contrasts: 2)' in contrasts
    assert 'start is above each rival' in contrasts and '**HOLDS**' in contrasts
    assert 'Test images are not resampled' in text  # the fake left no detections


def test_runs_are_those_of_a_comparison(write, configs, tmp_path):
    """A result of `mmkd compare` counts in a study, and the other way round."""
    study = read_study(write())
    (final,) = [stage for stage in study.stages if stage.name == 'final']
    variants = entrants(study, final, Standing({}, ['other']))
    plan, entries = plan_stage(final, variants, 1)
    compared = plan_runs([configs['mmkd'], configs['paper']], [0, 1, 2], [configs['plain']])
    keys = {run.key for run in compared.runs if run.role != 'baseline'}
    assert {run.key for run in plan.runs} == keys
    assert [entry.variant.arm for entry in entries] == ['plain', 'paper', 'other']
    assert entries[0].teacher is None and entries[1].teacher is entries[2].teacher


def test_arms_that_resolve_to_one_run_are_trained_once(write, tmp_path):
    text = 'arms=dict(a=dict(config={plain!r}), b=dict(config={plain!r}))\nstages=[dict(seeds=[0])]'
    fake = Fake(lambda name: 0.5)
    code, out = call(write(text), fake, tmp_path)
    assert (code, len(fake.trained())) == (0, 1), out


def test_a_stage_is_estimated_from_the_pace_of_those_before(write, tmp_path, monkeypatch):
    made = []

    class Kept(Progress):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            made.append(self)

    monkeypatch.setattr(studies, 'Progress', Kept)
    assert call(write(), Fake(maps), tmp_path)[0] == 0
    stages = [each for each in made if each.names]
    assert stages[0].before == 0 and stages[0].started == stages[1].started
    assert stages[1].before == stages[0].done() > 0
    whole = sum(sum(each.costs.values()) for each in stages[:2])
    assert stages[2].before == stages[1].done() == pytest.approx(whole)


def test_a_share_of_nearly_nothing_has_no_sign():
    assert [percent(share) for share in (-0.003, 0.003, -0.3, None)] == ['0 %', '0 %', '-30 %', '']


def test_what_was_stopped_goes_on(write, tmp_path):
    path = write()
    code, out = call(path, Fake(maps, fails=['mmkd-s0']), tmp_path)
    assert code == 1
    assert 'stage screen is not complete: 1 of 7 runs are not there (mmkd, seed 0)' in out
    assert not [k for k in read_results(tmp_path / 'work/results.jsonl').others if 'decision' in k]
    fake = Fake(maps)
    code, out = call(path, fake, tmp_path)
    assert code == 0
    first = fake.trained()[0]
    assert '--resume' in first and any('mmkd-s0' in part for part in first)
    assert 'stage screen: 7 runs, 6 of them done already' in out
    assert 'side by side; up to 15 runs in later stages\n' in out


class Diverging(Fake):
    """The losses of some runs overflow."""

    which, said = 'loss_weight-4', 'training has diverged. The likely cause is the learning rate'

    def __call__(self, command, log, env, lock, poll):
        if any('train' in part for part in command[:2]) and self.which in ' '.join(command):
            self.commands.append(command)
            log.write_text(f'error: {self.said}\n')
            return 1
        return super().__call__(command, log, env, lock, poll)


def test_a_value_that_diverges_is_the_lowest_and_stops_nothing(write, tmp_path):
    fake = Diverging(maps)
    code, out = call(write(), fake, tmp_path)
    assert code == 0, out
    assert 'start (hint.loss_weight=4), seed 0 has diverged in stage screen' in out
    decided = read_results(tmp_path / 'work/results.jsonl').others['decision', 'screen']
    assert decided['values'] == {'start': ['hint.loss_weight=1']}
    assert decided['mAP']['start (hint.loss_weight=4)'] is None
    assert decided['kept'] == ['mmkd', 'other']
    again = Diverging(maps)
    assert call(write(), again, tmp_path)[0] == 0
    assert again.commands == []


def test_an_arm_that_diverges_altogether_does_not_go_on(write, tmp_path):
    text = """
arms = dict(
    plain=dict(config={plain!r}),
    b=dict(config={mmkd!r}, search={{'model.distillation.hint.loss_weight': [4, 40]}}),
    c=dict(config={mmkd!r}))
stages = [dict(name='screen', seeds=[0], keep='all'), dict(name='final', seeds=[0, 1])]
"""
    code, out = call(write(text), Diverging(lambda name: 0.5), tmp_path)
    assert code == 0, out
    assert [r['arm'] for r in table(out, '## final')] == ['teacher', 'plain', 'c']


def test_a_searched_reference_is_compared_at_its_chosen_value(write, tmp_path):
    text = """
arms = dict(
    plain=dict(config={plain!r}, search={{'optim_wrapper.optimizer.lr': [0.1, 0.2]}}),
    mmkd=dict(config={mmkd!r}))
stages = [dict(name='screen', seeds=[0])]
"""
    fake = Fake(lambda name: 0.5 if 'mmkd' in name else 0.4 if 'lr-0.2' in name else 0.3)
    code, out = call(write(text), fake, tmp_path)
    assert code == 0, out
    gains = {r['arm'] + r['values'][-3:]: r['over plain'] for r in table(out, '## screen')}
    assert gains == {'teacher': '', 'plain0.1': '-10.00', 'plain0.2': '', 'mmkd': '+10.00'}


@pytest.mark.parametrize(
    ('rival', 'images', 'word'),
    [
        ([30.0, 30.1, 30.3], None, '**HOLDS**'),
        ([30.0, 30.1, 30.3], (0.1, 2.0), '**HOLDS**'),
        ([30.0, 30.1, 30.3], (-0.1, 2.0), '**does not hold (rival, low)**'),
        ([30.0, 31.1, 32.3], None, '**does not hold (rival)**'),
        ([30.0, 30.1], None, '**cannot be told yet: seeds are missing (rival)**'),
        ([30.0, 30.1, 30.2], None, '**does not hold (rival)**'),  # the seed does nothing
        ('diverged', None, '**does not hold (rival)**'),
    ],
)
def test_the_claim_takes_every_interval(write, rival, images, word):
    study = read_study(write())
    maps = {'start': [31.0, 31.1, 31.2], 'rival': rival, 'low': [20.0, 20.1, 20.4]}
    lines = []
    for arm, values in maps.items():
        entry = SimpleNamespace(
            variant=SimpleNamespace(arm=arm), student='', row=SimpleNamespace(runs=[])
        )
        diverged = values == 'diverged'
        lines.append(Line(entry, dict(enumerate([] if diverged else values)), diverged=diverged))
    summary = StageSummary(study.stages[-1], lines, {}, {})
    found = Bootstrap(*images, None) if images else None
    text = judge_contrasts(study, summary, '', 'start', lambda *_: (found, bool(images)))
    assert word in text


def test_a_study_inherits(write, tmp_path):
    write()
    path = tmp_path / 'more.py'
    path.write_text(
        "_base_ = 'methods.py'\nfrom pathlib import Path\n"
        "arms = dict(other=dict(overrides=['work_dir=x']))\n"
    )
    study = read_study(str(path))
    assert study.name == 'more' and len(study.stages) == 3 and len(study.arms) == 5
    assert study.arms['other'][0].options == ('work_dir=x',)


def test_results_from_before_a_change_are_told(configs, write, tmp_path):
    text = "arms = dict(a=dict(config={plain!r}))\nstages = [dict(name='x', seeds=[0])]"
    path = write(text)
    assert 'stale' not in call(path, Fake(lambda name: 0.5), tmp_path)[1]
    plain = Path(configs['plain'])
    before = plain.read_text()
    try:
        plain.write_text(before + '\nmodel = dict(backbone=dict(depth=34))\n')
        _cached.cache_clear()
        fake = Fake(lambda name: 0.5)
        code, out = call(path, fake, tmp_path)
        assert code == 0 and len(fake.trained()) == 1
        assert '1 stale result(s) of stage x ignored' in out
    finally:
        plain.write_text(before)
        _cached.cache_clear()


def test_students_share_a_choice_and_have_tables_of_their_own(configs, write, tmp_path):
    text = """
students = ['plain', 'near']
arms = dict(
    base=dict(config={folder!r}),
    slow=dict(config={folder!r}, search={{'optim_wrapper.optimizer.lr': [0.1, 0.2]}}))
stages = [dict(name='val', seeds=[0], keep='all', students=['plain']),
          dict(name='test', split='test', seeds=[0, 1, 2])]
contrasts = [('slow', 'base')]
"""
    plain = Path(configs['plain'])
    near = plain.with_name('near.py')
    near.write_text(f'_base_ = {str(plain)!r}\nmodel = dict(backbone=dict(depth=34))\n')
    folder = repr(str(plain.with_name('{{student}}.py')))
    text = text.replace('{folder!r}', folder)

    def value(name):
        return 0.3 + 0.1 * ('0.2' in name) + 0.01 * int(name.split('-s')[-1][0])

    code, out = call(write(text), Fake(value), tmp_path)
    assert code == 0, out
    assert {r['values'] for r in table(out, '### near')} == {'', 'optim_wrapper.optimizer.lr=0.2'}
    assert out.count('corrected after Bonferroni (declared contrasts: 2)') == 2


class Detecting(Fake):
    """Leaves detections: the truth, moved by less the better the arm is."""

    def __init__(self, root):
        super().__init__()
        self.truth = json.loads((root / 'val.json').read_text())

    def __call__(self, command, log, env, lock, poll):
        if '--out' in command:
            out = Path(command[command.index('--out') + 1])
            name = out.parents[1].name
            arm = max((arm for arm in GAINS if name.startswith(arm)), key=len)
            rng = np.random.default_rng([GAINS[arm], ord(name[-18])])
            samples = []
            for image in self.truth['images']:
                own = [a for a in self.truth['annotations'] if a['image_id'] == image['id']]
                boxes = torch.tensor([a['bbox'] for a in own], dtype=torch.float)
                boxes[:, 2:] += boxes[:, :2]
                boxes += torch.tensor(rng.normal(0, 20 / (5 + GAINS[arm]), boxes.shape))
                found = {
                    'bboxes': boxes,
                    'labels': torch.tensor([a['category_id'] - 1 for a in own]),
                    'scores': torch.tensor(rng.random(len(own))),
                }
                samples.append(
                    {'img_id': image['id'], 'ori_shape': (64, 64), 'pred_instances': found}
                )
            torch.save({'detections': samples}, out)
        elif 'score' in command:
            cfg = Config.fromfile(command[3])
            metainfo = DATASETS.build(cfg.test_dataloader.dataset).metainfo
            evaluations = evaluate(cfg, read_detections(command[5]), metainfo)[1]
            value = float(evaluations[0].stats[0])
            write_json(Path(command[-1]), {'mAP': value, 'AP50': 0.9, 'exact': True})
            return 0
        return super().__call__(command, log, env, lock, poll)


def test_headline_intervals_resample_images_and_are_kept(configs, write, tmp_path):
    text = """
arms = dict(plain=dict(config={plain!r}), mmkd=dict(config={mmkd!r}))
stages = [dict(name='final', split='test', seeds=[0, 1, 2])]
contrasts = [('mmkd', 'plain')]
"""
    path = write(text)
    root = Path(configs['plain']).parent / 'data'
    code, out = call(path, Detecting(root), tmp_path)
    assert code == 0, out
    assert 'not resampled' not in out and 'not possible' not in out
    row = {r['arm']: r for r in table(out, '## final')}['mmkd']
    low, high = map(float, row['95 %, seeds and images'].strip('[]').split(','))
    assert low < float(row['over plain']) < high
    assert row['95 %, seeds'] != row['95 %, seeds and images'] and row['at least']
    # The table needs no more than the results: neither checkpoints nor detections.
    file = (tmp_path / 'work/results.jsonl').rename(tmp_path / 'kept.jsonl')
    before = (tmp_path / 'work/methods.md').read_text()
    shutil.rmtree(tmp_path / 'work')
    code, out = call(path, None, tmp_path, table_only=True, results_path=file)
    assert code == 0 and before in out


@pytest.mark.slow
def test_detections_of_another_test_are_not_resampled(configs, write, tmp_path):
    text = """
arms = dict(plain=dict(config={plain!r}), mmkd=dict(config={mmkd!r}))
stages = [dict(name='final', split='test', seeds=[0, 1, 2])]
"""
    path = write(text)
    fake = Detecting(Path(configs['plain']).parent / 'data')
    assert call(path, fake, tmp_path)[0] == 0
    file = tmp_path / 'work/results.jsonl'
    lines = [line for line in file.read_text().splitlines() if '"interval"' not in line]
    file.write_text('\n'.join(lines) + '\n')
    one, other = sorted((tmp_path / 'work/runs').glob('mmkd-s[01]*'))
    shutil.copy(other / 'test/detections.pth', one / 'test/detections.pth')
    code, out = call(path, None, tmp_path)
    assert code == 0
    assert 'is of another test than the results of mmkd, seed 0' in out
    assert 'Test images are not resampled' in out


class Interrupting(Fake):
    """The user presses Ctrl-C in the third training."""

    def __call__(self, command, log, env, lock, poll):
        if any('train' in part for part in command[:2]) and len(self.trained()) == 2:
            os.kill(os.getpid(), signal.SIGINT)
            while True:
                time.sleep(0.01)
                poll()
        return super().__call__(command, log, env, lock, poll)


def test_ctrl_c_stops_and_the_same_command_goes_on(write, tmp_path):
    code, out = call(write(), Interrupting(maps), tmp_path)
    assert code == 130 and out.endswith('stopped; the same command continues from here\n')
    fake = Fake(maps)
    code, _ = call(write(), fake, tmp_path)
    assert code == 0 and len(fake.trained()) == 6 + 3 * 2 + (2 * 1 + 3) - 2


def test_the_estimate_counts_the_stages_to_come(write):
    study = read_study(write())
    costs = {'screen': 2.0, 'second': 4.0, 'final': 4.0}
    # Two arms of four and the reference with two seeds; one winner, paper, reference with three.
    assert later_cost(study, 0, 4, costs) == 3 * 2 * 4.0 + 3 * 3 * 4.0
    assert later_cost(study, 1, 2, costs) == 3 * 3 * 4.0
    assert later_cost(study, 2, 2, costs) == 0


# ------------------------------------------------------------------------------- refusals

ARMS = """\
arms = dict(
    a=dict(config={plain!r}),
    b=dict(config={mmkd!r}, search={{'model.distillation.hint.loss_weight': [1, 2]}}))
"""
ONE = 'stages = [dict(seeds=[0])]\n'


FIT = 'stages = [dict(seeds=[0], keep=1), dict(seeds=[0], split="test", '


@pytest.mark.parametrize(
    ('text', 'message'),
    [
        ('stages = [dict(seeds=[0], arms=["c"])]', "stage 'stage 1' names 'c', which is no arm"),
        (ONE + 'contrasts = [("a", "bb")]', "mean b"),
        (ONE + 'name = "a/b"', "name='a/b' must be one that files can have"),
        ('stages = [dict(seeds=[0]), dict(seeds=[0], split="test", '
         'options={{"test_dataloader.dataset.ann_file": "val.json"}})]', "to judge on"),
        ('stages = [dict(seeds=[0], split="test", arms=["a"])]\ncontrasts = [("winner", "a")]',
         "winner: no stage before 'stage 1' selects"),
        ('stages = [dict(seeds=[0]), dict(seeds=[0], keep=1)]\nclaim = "winner"',
         'on the images that choose it'),
        (FIT + 'options={{"test_dataloader.dataset.ann_file": "val.json"}})]',
         "to judge on"),
        (ONE + 'arms["b"]["overrides"] = {{"model.distillation.hint.loss_wight": 2}}',
         "b (hint.loss_weight=1), stage 'stage 1': "),
        (FIT + 'options={{"model.distillation.start": "teacher"}})]',
         'names no teacher, and an option sets'),
        (FIT + 'students=["x"])]\nstudents = ["", "x"]', 'is the same for each of'),
        (ONE + 'claim = ("b", "a")', 'must be an arm'),
        (ONE + 'contrast = [("a", "b")]', "no entry 'contrast'; did you mean"),
        ('stages = [dict(name="x")]', "stage 'x': seeds=None must be different numbers"),
        ('stages = [dict(seeds=[])]', 'seeds=[] must be'),
        ('stages = [dict(seeds=[1, 1])]', 'seeds=[1, 1] must be'),
        ('stages = [dict(seeds=3)]', 'seeds=3 must be'),
        ('stages = []', 'has no stages'),
        ('stages = [dict(seeds=[0], keep="best")]', "keep='best' must be"),
        ('stages = [dict(seeds=[0], keep=0)]', 'keep=0 must be'),
        ('stages = [dict(seeds=[0], split="train")]', "split='train' must be"),
        ('stages = [dict(seeds=[0], name="x"), dict(seeds=[0], name="x")]', "two stages are"),
        ('stages = [dict(seeds=[0], split="test", keep="half", arms=["a"])]', "keeps 'half' on te"),
        ('stages = [dict(seeds=[0], split="test")]', 'would search the values of b on test'),
        ('stages = [dict(seeds=[0], arms=["winners"])]', 'no stage before it selects'),
        ('stages = [dict(seeds=[0], arms=["b"])]\nreference = "x"', "reference names 'x'"),
        (ONE + 'arms.update(winner=arms["a"])', 'cannot be named winner'),
        (ONE + 'arms["b"]["search"]["x.y"] = [2, 2]', 'x.y has 2 twice'),
        (ONE + 'arms["b"]["search"]["x.y"] = 2', 'x.y=2 must be a list'),
        (ONE + 'arms["b"]["serch"] = {{}}', 'did you mean search'),
        (ONE + 'arms["b"]["config"] = "gone.py"', 'gone.py: there is no such'),
        (ONE + 'arms["b"]["overrides"] = {{"modell.x": 1}}', 'near it: model'),
        (ONE + 'arms["a"]["search"] = {{"work_dir": ["x", "y"]}}',
         'are the same training'),
        ('stages = [dict(seeds=[0], students=["x"])]', "names 'x', which is no student"),
        (ONE + 'students = ["x", "y"]', 'is the same for each of'),
        ('stages = [dict(seeds=[0], options={{"train_cfg.x": "a b, c"}})]', 'cannot be written as'),
        ('stages = [dict(seeds=[0], keep=1), dict(seeds=[0], split="test", '
         'options={{"test_dataloader.dataset.ann_file": "gone"}})]', 'test annotations '),
        ('stages = [dict(seeds=[0], options=["train_cfg"])]', 'each must read key=value'),
        ('stages = [', 'cannot be read'),
    ],
)  # fmt: skip
def test_a_study_that_cannot_be_run_is_refused_before_a_run(write, tmp_path, text, message):
    fake = Fake()
    code, out = call(write(ARMS + text), fake, tmp_path)
    assert (code, fake.commands) == (2, []), out
    assert out.startswith('study: ') and message in out
    assert not (tmp_path / 'work').exists()


def test_the_arms_of_the_example_are_not_refused(write):
    read_study(write(ARMS + ONE + '_mine = 1'))


def test_results_of_another_study_are_refused(write, tmp_path):
    path = write(ARMS + 'stages = [dict(seeds=[0], arms=["a"])]')
    assert call(path, Fake(lambda name: 0.5), tmp_path)[0] == 0
    other = Path(path).rename(tmp_path / 'other.py')
    for table_only in (False, True):
        code, out = call(str(other), Fake(), tmp_path, table_only=table_only,
                         results_path=tmp_path / 'work/results.jsonl')  # fmt: skip
        assert code == 2 and 'has the results of the study methods, and this one is other' in out
    other.write_text(other.read_text() + '\nname = "methods"')
    code, _ = call(str(other), Fake(), tmp_path, results_path=tmp_path / 'work/results.jsonl')
    assert code == 0


def test_a_choice_cannot_change_once_the_test_split_is_read(results, write, tmp_path):
    path = write()
    (tmp_path / 'work').mkdir()
    shutil.copy(results, tmp_path / 'work')
    text = Path(path).read_text()
    Path(path).write_text(text.replace("keep='half'", 'keep=1'))
    fake = Fake(maps)
    code, out = call(path, fake, tmp_path)
    assert (code, fake.commands) == (2, [])
    assert "the decision of stage 'screen'" in out and 'the test split has been read since' in out
    Path(path).write_text(text.replace("['paper', 'winners']", "['paper', 'mmkd', 'winners']"))
    code, out = call(path, fake, tmp_path)
    assert (code, fake.commands) == (2, []) and "the decision of stage 'final'" in out


@pytest.fixture(scope='module')
def results(configs, tmp_path_factory):
    """The results of the study above, all of it done."""
    folder = tmp_path_factory.mktemp('done')
    (folder / 'methods.py').write_text(STUDY.format(**configs))
    code, out = call(str(folder / 'methods.py'), Fake(maps), folder)
    assert code == 0, out
    return folder / 'work/results.jsonl'


@pytest.mark.parametrize(
    ('before', 'after'),
    [
        ("['paper', 'winners'])", "['paper', 'winners'], options={'train_cfg.max_epochs': 3})"),
        ('seeds=[0, 1, 2]', 'seeds=[0, 1, 2, 3]'),
        ("('winner', 'paper')]", "('paper', 'plain')]"),
        ("claim = 'winner'", "claim = ('winner', ['plain'])"),
        ("name='final'", "name='finals'"),
        (
            "    dict(name='final'",
            "    dict(name='more', split='test', seeds=[5]), dict(name='final'",
        ),
    ],
    ids=['options', 'a seed', 'contrasts', 'the claim', 'a name', 'a second stage'],
)
def test_nothing_is_declared_once_the_test_split_is_read(results, write, tmp_path, before, after):
    path = write()
    (tmp_path / 'work').mkdir()
    shutil.copy(results, tmp_path / 'work')
    text = Path(path).read_text()
    assert before in text
    Path(path).write_text(text.replace(before, after))
    fake = Fake(maps)
    code, out = call(path, fake, tmp_path)
    assert (code, fake.commands) == (2, []) and 'the test split has been read since' in out


class DivergingOnTest(Diverging):
    """The winner diverges with one of the seeds of the last stage."""

    which, said = 'loss_weight-4-s2', 'loss_cls is nan at iteration 250 (epoch 3)'


def test_a_finalist_that_diverges_is_not_judged_by_its_other_seeds(write, tmp_path):
    code, out = call(write(), DivergingOnTest(maps), tmp_path)
    assert code == 0, out
    row = {r['arm']: r for r in table(out, '## final')}['start']
    assert row['mAP'].endswith('(1 diverged)') and row['over plain'] == row['gap share'] == ''
    assert '**does not hold (plain, paper)**' in out
    assert {r['verdict'] for r in table(out, 'Declared contrasts')} == {'diverged'}


def test_a_study_of_which_every_arm_diverges_has_no_result(write, tmp_path):
    text = """
arms = dict(plain=dict(config={plain!r}), b=dict(config={mmkd!r}))
stages = [dict(name='screen', seeds=[0], keep='all'),
          dict(name='final', split='test', seeds=[0, 1])]
"""

    class All(Diverging):
        which = 'b-s0'

    code, out = call(write(text), All(maps), tmp_path)
    assert code == 1 and 'stage screen: every arm has diverged' in out


def test_a_loss_that_is_nan_from_the_start_is_no_divergence(write, tmp_path):
    class Broken(Fake):
        def __call__(self, command, log, env, lock, poll):
            code = super().__call__(command, log, env, lock, poll)
            if code:
                log.write_text('error: loss_kd_hint is nan at the first step\n')
            return code

    code, out = call(write(), Broken(maps, fails=['mmkd-s0']), tmp_path)
    assert code == 1 and 'stage screen is not complete: 1 of 7' in out


def test_two_arms_that_are_one_run_count_once(write):
    study = read_study(write())
    lines = []
    for arm, own, values in (('a', 'k', [30, 31, 33]), ('b', 'k', [30, 31, 33]),
                             ('c', 'l', [31, 31, 32])):  # fmt: skip
        row = SimpleNamespace(runs=[SimpleNamespace(key=f'{own}{seed}') for seed in range(3)])
        entry = SimpleNamespace(variant=SimpleNamespace(arm=arm), student='', row=row)
        lines.append(Line(entry, dict(enumerate(values))))
    pooled = StageSummary(study.stages[-1], lines, {}, {}).pooled('')
    assert pooled == pool([[30, 31, 33], [31, 31, 32]])


def test_a_contrast_has_its_share_of_the_gap(results):
    """Between its second arm and the teacher, also where that is not the reference."""
    text = results.with_name('methods.md').read_text()
    start, paper = (
        np.mean([100 * maps(f'{arm}-s{seed}') for seed in range(3)])
        for arm in ('start-hint.loss_weight-4', 'paper')
    )
    row = {r['contrast']: r for r in table(text, 'Declared contrasts')}['start - paper']
    share = 100 * (start - paper) / (100 * maps('teacher') - paper)
    assert row['gap share'] == f'{share:.0f} %'
    assert 0 < float(row['at least'].split()[0]) < share


def test_two_seeds_tell_nothing_as_in_a_comparison(write, tmp_path):
    text = """
arms = dict(plain=dict(config={plain!r}), mmkd=dict(config={mmkd!r}))
stages = [dict(name='val', seeds={seeds})]
contrasts = [('mmkd', 'plain')]
"""
    cases = [([0, 1], maps, 'INCONCLUSIVE'), ([0, 1, 2], maps, 'BEATS')]
    # Not exact in binary.
    cases.append(([0, 1, 2], lambda name: 0.31723 + 0.1119 * ('mmkd' in name), 'INCONCLUSIVE'))
    for seeds, value, word in cases:
        path = write(text.replace('{seeds}', str(seeds)))
        shutil.rmtree(tmp_path / 'work', ignore_errors=True)
        out = call(path, Fake(value), tmp_path)[1]
        assert table(out, 'Declared contrasts')[0]['verdict'] == word


def test_iterations_cost_what_they_are(write, configs):
    text = """
arms = dict(plain=dict(config={plain!r}))
stages = [dict(name='half', seeds=[0], options=BY + ['train_cfg.max_iters=500']),
          dict(name='whole', seeds=[0], options=BY + ['train_cfg.max_iters=1000'])]
""".replace('BY', "['train_cfg.type=IterBasedTrainLoop', 'train_cfg.max_epochs=None']")
    costs = check(read_study(write(text)), 1)
    assert costs['whole'] == 2 * costs['half']


def test_each_test_set_has_a_folder(write):
    study = read_study(write())
    stage = study.stages[-1]
    other = replace(stage, options=[*stage.options, 'test_dataloader.dataset.ann_file=train.json'])
    for arm in ('plain', 'paper'):
        (variant,) = study.arms[arm]
        runs = [variant_run(variant, each, '', 0, 1) for each in (stage, other)]
        if arm == 'paper':
            runs += [plan_stage(s, [variant], 1)[1][0].teacher for s in (stage, other)]
        folders = [run.tested_in for run in runs]
        assert folders[::2] == ['test'] * (len(runs) // 2)
        assert all(folder.startswith('test-') for folder in folders[1::2])


def test_a_config_that_a_later_stage_needs_is_looked_for_before(configs, write, tmp_path):
    text = """
students = ['plain', 'later']
arms = dict(base=dict(config={folder!r}))
stages = [dict(name='val', seeds=[0], students=['plain']), dict(name='all', seeds=[0])]
"""
    folder = repr(str(Path(configs['plain']).with_name('{{student}}.py')))
    fake = Fake()
    code, out = call(write(text.replace('{folder!r}', folder)), fake, tmp_path)
    assert (code, fake.commands) == (2, []) and 'later.py: there is no such' in out


def test_a_study_may_choose_and_judge_twice(write, tmp_path):
    text = STUDY.replace("stages = [", "stages = [\n    dict(name='a', seeds=[0], keep=3),\n"
                         "    dict(name='b', split='test', seeds=[7]),", 1)  # fmt: skip
    code, out = call(write(text), Fake(maps), tmp_path)
    assert code == 0, out
    assert call(write(text), None, tmp_path, table_only=True)[0] == 0


def test_a_comparison_of_the_same_runs_reads_nothing_for_a_study(write, configs, results, tmp_path):
    """Results are shared by key, so a run of another arm's name may have been tested before."""
    (tmp_path / 'work').mkdir()
    lines = [json.loads(line) for line in results.read_text().splitlines()]
    kept = [line for line in lines if line.get('kind') not in ('decision', 'study')]
    path = tmp_path / 'work/results.jsonl'
    path.write_text(''.join(json.dumps(line) + '\n' for line in kept))
    code, out = call(write(), Fake(maps), tmp_path)
    assert code == 0, out


def test_a_finished_study_needs_no_data(write, configs, tmp_path):
    """Neither that of the arms that were dropped."""
    path = write()
    assert call(path, Fake(maps), tmp_path)[0] == 0
    data = Path(configs['plain']).parent / 'data'
    moved = [data / f'{split}.json' for split in ('val', 'test')]
    for file in moved:
        file.rename(file.with_suffix('.away'))
    try:
        code, out = call(path, Fake(maps), tmp_path)
        assert code == 0, out
    finally:
        for file in moved:
            file.with_suffix('.away').rename(file)


def test_a_choice_can_change_before(write, tmp_path):
    path = write()
    text = Path(path).read_text()
    Path(path).write_text(text.replace(", 'winners']", ", 'winners', 'other']"))
    code, _ = call(path, Fake(maps, fails=['paper-s2', 'plain-s2', 'start', 'other']), tmp_path)
    assert code == 1
    Path(path).write_text(text.replace("keep='half'", 'keep=3'))
    code, out = call(path, Fake(maps), tmp_path)
    assert code == 0, out
    decided = read_results(tmp_path / 'work/results.jsonl').others['decision', 'screen']
    assert decided['kept'] == ['start', 'mmkd', 'other']


def test_a_contrast_with_an_arm_that_was_dropped_is_refused_before_the_test(write, tmp_path):
    path = write()
    text = Path(path).read_text()
    Path(path).write_text(text.replace("('winner', 'paper')", "('winner', 'other')"))
    fake = Fake(maps)
    code, out = call(path, fake, tmp_path)
    assert (
        code == 2
        and "other is in a contrast or the claim, and did not get into stage 'final'" in out
    )
    assert not [c for c in fake.commands if 'test' in Path(c[-1]).parts]


def test_options_reach_a_run_as_they_were_meant():
    given = {
        'a.b': 0.1, 'c': [1, 2], 'd': dict(type='X', pairs=['neck'], w=None), 'e': 'text',
        'f': True, 'g': (1, 2), 'h': 1e-5, 'i': dict(_delete_=True, x=-1),
    }  # fmt: skip
    strings = options_of('arm', given)
    cfg = Config(dict(model=dict(d=0)))
    assert options_of('arm', strings) == strings
    assert strings[:2] == ['a.b=0.1', 'c=[1, 2]'] and cfg


# ------------------------------------------------------------------------------- arithmetic


def test_the_pooled_variance_is_that_of_a_least_squares_fit():
    y = np.random.default_rng(0).normal(30, 1, (4, 5)) + np.arange(4)[:, None]
    arms, seeds = (index.ravel() for index in np.indices(y.shape))
    design = np.c_[arms[:, None] == np.arange(4), seeds[:, None] == np.arange(1, 5)].astype(float)
    left = np.linalg.lstsq(design, y.ravel(), rcond=None)[1][0]
    found = pool(y)
    assert (found.dof, found.arms, found.seeds) == (12, 4, 5)
    assert found.sd == pytest.approx(math.sqrt(2 * left / 12))
    # The mean over pairs of the variance of their paired differences.
    pairs = [np.var(y[i] - y[j], ddof=1) for i in range(4) for j in range(i)]
    assert found.sd**2 == pytest.approx(np.mean(pairs))


def test_a_contrast_of_two_arms_is_the_paired_interval():
    y = np.random.default_rng(1).normal(30, 1, (2, 5))
    found = contrast_interval(float((y[0] - y[1]).mean()), pool(y))
    assert found == pytest.approx(paired_interval(y[0] - y[1]))


def test_bonferroni_by_hand():
    y = np.random.default_rng(2).normal(30, 1, (3, 5))
    found = pool(y)
    low, high = contrast_interval(1.0, found, 4)
    half = stats.t.ppf(1 - 0.05 / 8, 8) * found.sd / math.sqrt(5)
    assert (low, high) == pytest.approx((1 - half, 1 + half))


@pytest.mark.parametrize('maps', [[[1, 2, 3]], [[1], [2]], []])
def test_nothing_is_pooled_of_one_arm_or_one_seed(maps):
    assert pool(maps) is None


def test_the_number_of_seeds_by_simulation():
    # Textbook values of the paired t test for a power of 0.8.
    assert [seeds_needed(1.0, effect)[1] for effect in (1.0, 0.5, 0.2)] == [10, 34, 199]
    narrow, powerful = seeds_needed(1.0, 1.0)
    half = stats.t.ppf(0.975, narrow - 1) / math.sqrt(narrow)
    assert half <= 1 < stats.t.ppf(0.975, narrow - 2) / math.sqrt(narrow - 1)
    rng = np.random.default_rng(0)

    def power(n):
        x = rng.normal(1.0, 1.0, (20_000, n))
        return (
            np.abs(x.mean(1)) * math.sqrt(n) / x.std(1, ddof=1) > stats.t.ppf(0.975, n - 1)
        ).mean()

    assert power(powerful) > 0.79 and power(powerful - 1) < 0.8
    assert seeds_needed(1.0, 100.0) == (2, 2) and seeds_needed(0.0, 1.0) == (2, 2)
    with pytest.raises(ValueError, match='above 0, not 0'):
        seeds_needed(1.0, 0)


def test_power_is_told_from_results(write, tmp_path):
    path = write()
    call(path, Fake(maps), tmp_path)
    before = (tmp_path / 'work/results.jsonl').read_bytes()
    code, out = call(path, None, tmp_path, power=0.5)
    y = [[100 * maps(f'{arm}-s{s}') for s in range(3)]
         for arm in ('plain', 'paper', 'start-hint.loss_weight-4')]  # fmt: skip
    narrow, powerful = seeds_needed(pool(y).sd, 0.5)
    assert code == 0 and '(stage final, 3 arms, 3 seeds, 4 degrees of freedom)' in out
    assert f'takes {narrow} seeds' in out and f'4 of 5 studies takes {powerful}' in out
    assert (tmp_path / 'work/results.jsonl').read_bytes() == before
    code, out = call(path, None, tmp_path, power=-1.0)
    assert code == 2 and 'margin in mAP points above 0' in out
    code, out = call(path, None, tmp_path, power=0.5, results_path=tmp_path / 'none.jsonl')
    assert code == 0 and 'the variance is unknown' in out


def test_the_bootstrap_covers_as_students_t_does():
    """Of 400 studies with 5 seeds, about 95 % have the true difference in the interval."""
    rng = np.random.default_rng(3)
    inside = 0
    for _ in range(400):
        a, b = rng.normal(1, 1, 5), rng.normal(0, 1, 5)
        found = bootstrap(a, b)
        inside += found.low < 1 < found.high
    assert 0.92 < inside / 400 < 0.99


def test_the_bootstrap_adds_the_images():
    rng = np.random.default_rng(4)
    a, b = np.array([31.0, 31.2, 31.1]), np.array([30.0, 30.1, 30.2])
    seeds = bootstrap(a, b, 40.0)
    noise = rng.normal(0, 2, (DRAWS, 1))
    # What moves both networks and the teacher alike is no uncertainty of their difference.
    same = bootstrap(a + noise, b + noise, 40 + noise[:, 0])
    assert (same.low, same.high) == pytest.approx((seeds.low, seeds.high))
    wide = bootstrap(a + noise, np.broadcast_to(b, (DRAWS, 3)), 40.0)
    assert wide.high - wide.low > 2 * (seeds.high - seeds.low)
    assert wide.share < seeds.share < 0.1
    assert bootstrap(a, b, 29.0).share is None and bootstrap(a, b).share is None
    assert bootstrap(a[:2], b[:2]) is None


def evaluation(path, rng, copies=None):
    """COCO's evaluation of random detections on a data set, or on copies of its images."""
    data = json.loads(path.read_text())
    found = []
    for note in data['annotations']:
        for _ in range(int(rng.integers(1, 4))):
            box = (np.array(note['bbox']) + rng.normal(0, 3, 4)).clip(1).tolist()
            category = note['category_id'] if rng.random() < 0.8 else 1
            found.append(dict(image_id=note['image_id'], category_id=category, bbox=box,
                              score=float(rng.random())))  # fmt: skip
    data['annotations'][0]['iscrowd'] = 1
    if copies is not None:
        new = {'images': [], 'annotations': [], 'categories': data['categories']}
        detections = []
        for image, count in zip(data['images'], copies, strict=True):
            for _ in range(count):
                name = len(new['images'])
                new['images'].append({**image, 'id': name})
                for note in data['annotations']:
                    if note['image_id'] == image['id']:
                        number = len(new['annotations']) + 1
                        new['annotations'].append({**note, 'id': number, 'image_id': name})
                detections += [
                    {**d, 'image_id': name} for d in found if d['image_id'] == image['id']
                ]
        data, found = new, detections
    truth = COCO()
    truth.dataset = data
    truth.createIndex()
    result = COCOeval(truth, truth.loadRes(found), 'bbox')
    result.evaluate()
    return result


def test_weights_of_images_are_copies_of_images(configs, capsys):
    path = Path(configs['plain']).parent / 'data/val.json'
    whole = evaluation(path, np.random.default_rng(0))
    images = len(whole.params.imgIds)
    weights = np.random.default_rng(5).multinomial(images, np.full(images, 1 / images), 6)
    weights = np.vstack([np.ones((1, images), int), weights])
    found = weighted_map(whole, weights)
    for each, copies in zip(found, weights, strict=True):
        copied = evaluation(path, np.random.default_rng(0), copies)
        copied.accumulate()
        copied.summarize()
        assert each == pytest.approx(copied.stats[0], abs=1e-9)
    assert len(set(found)) > 3


# ------------------------------------------------------------------------------- the command


def test_the_plot_and_its_formats(write, tmp_path):
    path = write()
    call(path, Fake(maps), tmp_path)
    first = (tmp_path / 'work/methods.svg').read_bytes()
    code, out = call(path, None, tmp_path, table_only=True, plot=tmp_path / 'made/x.png')
    assert code == 0 and (tmp_path / 'made/x.png').read_bytes()[:4] == b'\x89PNG'
    assert '| 250 ' in out and b'<!-- ms per training step -->' in first
    # Results of before a step's time was kept.
    file = tmp_path / 'work/results.jsonl'
    file.write_text(file.read_text().replace(',"step_ms":250.0', ''))
    assert call(path, None, tmp_path, table_only=True)[0] == 0
    drawn = (tmp_path / 'work/methods.svg').read_bytes()
    assert b'<!-- training time (min) -->' in drawn and b'ms per' not in drawn
    code, out = call(path, None, tmp_path, table_only=True, plot='x.txt')
    assert code == 2 and 'must end in .svg' in out


def test_the_command_takes_what_it_describes(monkeypatch):
    given = {}
    monkeypatch.setattr(command, 'study', lambda path, **kwargs: given.update(kwargs, path=path))
    command.main(['s.py', '--results', 'r', '--work-dir', 'w', '--jobs', '2', '--power', '0.5'])
    assert given == dict(path='s.py', work_dir='w', results_path='r', jobs=2, gpus=None,
                         table_only=False, power=0.5, plot=None)  # fmt: skip


@pytest.mark.slow
def test_a_study_from_end_to_end(tmp_path, monkeypatch):
    """Real runs: two arms, a search on validation, the test split with resampled images."""
    monkeypatch.setattr(sys, 'executable', warm.python())
    plain = tiny_config(tmp_path, 'plain', epochs=2)
    with_test_set(Path(plain))
    study = tmp_path / 'tiny_study.py'
    study.write_text(
        f'config = {str(plain)!r}\n'
        "_rates = {'optim_wrapper.optimizer.lr': [0.02, 0.03]}\n"
        "_half = {'train_cfg.max_epochs': 1}\n"
        'arms = dict(plain=dict(), slow=dict(search=_rates))\n'
        "stages = [dict(name='screen', seeds=[0], options=_half, keep='all'),\n"
        "          dict(name='final', split='test', seeds=[0, 1, 2])]\n"
        "contrasts = [('slow', 'plain')]\nclaim = 'winner'\n"
    )
    stream = io.StringIO()
    assert studies.study(str(study), tmp_path / 'work', jobs=1, stream=stream) == 0
    text = (tmp_path / 'work/tiny_study.md').read_text()
    rows = {row['arm']: row for row in table(text, '## final')}
    assert float(rows['slow']['ms/step']) > 0
    results = read_results(tmp_path / 'work/results.jsonl')
    values = [r['metrics']['mAP'] for r in results.runs.values()]
    if max(values) > 0:
        assert any(kind == 'interval' for kind, _ in results.others)
    again = io.StringIO()
    assert studies.study(str(study), tmp_path / 'work', table_only=True, stream=again) == 0
    assert text in again.getvalue()
