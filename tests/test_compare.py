"""The comparison: statistics and words, planning and keys, running and resuming, the table."""

import html
import io
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mmdet.structures import DetDataSample
from mmengine.runner import TestLoop
from mmengine.structures import InstanceData
from pairs import ROOT
from scipy import stats
from tiny import tiny_config

from mmkd import RelabelledTestLoop
from mmkd.analysis import comparison as cmp
from mmkd.analysis.comparison import plan as planning
from mmkd.analysis.comparison import progress, results, runs
from mmkd.analysis.comparison.measure import cpu_cores, score, write_json
from mmkd.analysis.comparison.plan import config_with_options, file_digest, terms_on
from mmkd.analysis.comparison.runs import perform
from mmkd.analysis.comparison.statistics import gap_share, judge, paired_interval
from mmkd.analysis.comparison.table import summarise

TERMS = ('rpn_cls', 'rpn_bbox', 'rcnn_cls', 'rcnn_bbox', 'hint')
RECIPE = """\
_base_ = {base!r}
soft = dict(type='WeightedSoftCELoss', hard_weight=0.5, background_weight=1.5, temperature=1.0)
bounded = dict(type='TeacherBoundedL2Loss', margin=0.0, loss_weight=0.5)
model = dict(
    type='mmkd.KnowledgeDistillationTwoStageDetector',
    teacher_config={teacher!r},
    teacher_ckpt={ckpt!r},
    distillation=dict(
        rpn_cls=soft, rpn_bbox=bounded, rcnn_cls=soft, rcnn_bbox=bounded,
        hint=dict(type='HintL2Loss', loss_weight=0.5, normalize={normalize}, pairs=['neck']),
        start={start!r}))
"""


def write_configs(folder):
    """Paths of a plain student, its teacher's checkpoint and three distilled configs."""
    plain = tiny_config(folder, 'plain')
    teacher = tiny_config(folder, 'teacher', base_channels=8)
    ckpt = folder / 'teacher.pth'
    ckpt.write_bytes(b'weights')
    paths = {'plain': str(plain), 'ckpt': str(ckpt)}
    for name, start, normalize in (
        ('paper', None, False),
        ('paper_start', 'teacher', False),
        ('mmkd', 'teacher', True),
    ):
        path = folder / f'{name}.py'
        path.write_text(
            RECIPE.format(
                base=str(plain), teacher=str(teacher), ckpt=str(ckpt), start=start,
                normalize=normalize,
            )
        )  # fmt: skip
        paths[name] = str(path)
    return paths


@pytest.fixture(scope='module')
def configs(tmp_path_factory):
    return write_configs(tmp_path_factory.mktemp('configs'))


class Fake:
    """In place of the tools: leaves what they leave. ``maps`` gives each test's mAP by work dir."""

    def __init__(self, maps=None, fails=(), dies=()):
        self.commands = []
        self.maps = maps or (lambda name: 0.5)
        self.fails, self.dies = fails, dies
        self.mutex = threading.Lock()

    def __call__(self, command, log, env, lock, poll):
        with self.mutex:
            self.commands.append(command)
        log.parent.mkdir(parents=True, exist_ok=True)
        os.fstat(lock)
        if any('train' in part for part in command[:2]):
            work = Path(command[command.index('--work-dir') + 1])
            log.write_text('Epoch(train)  [1][4/4]  eta: 0:00:00  loss: 1.5\n')
            (work / 'epoch_1.pth').write_bytes(b'')
            (work / 'last_checkpoint').write_text(str(work / 'epoch_1.pth'))
            poll()
            if any(part in work.name for part in self.dies):
                raise cmp.Stopped
            if any(part in work.name for part in self.fails):
                log.write_text('Traceback\nRuntimeError: the loss is NaN\n')
                return 1
            scalars = work / '20250101_000000/vis_data/scalars.json'
            scalars.parent.mkdir(parents=True)
            lines = [{'loss': 2.0, 'loss_kd_hint': 0.5, 'time': 0.25, 'iter': 4, 'step': 4}]
            lines.append({'coco/bbox_mAP': 0.25, 'step': 1})
            scalars.write_text('\n'.join(map(json.dumps, lines)))
        elif 'score' in command:
            name = Path(command[3]).parents[1].name
            value = self.maps(name)
            write_json(
                Path(command[-1]),
                {'mAP': value, 'AP50': 0.9, 'exact': True, 'reported': {}, 'images': 8},
            )
        elif 'measure' in command:
            write_json(
                Path(command[-1]),
                {'kind': 'measure', 'params': 1_230_000, 'gflops': 4.5, 'images_per_second': 20.0,
                 'images': 8, 'device': 'a CPU, 1 thread'},
            )  # fmt: skip
        return 0

    def trained(self):
        return [c for c in self.commands if any(part.endswith('train.py') for part in c[:2])]


def call(configs, names, fake, tmp_path, **kwargs):
    stream = io.StringIO()
    kwargs.setdefault('jobs', 1)
    code = cmp.compare(
        [configs[n] for n in names], work_dir=tmp_path / 'work', execute=fake, stream=stream,
        images=0, **kwargs,
    )  # fmt: skip
    return code, stream.getvalue()


# ------------------------------------------------------------------------------- statistics


@pytest.mark.parametrize('n', [2, 3, 5, 12])
def test_interval_is_that_of_scipys_paired_test(n):
    rng = np.random.default_rng(n)
    baseline, distilled = rng.normal(30, 1, n), rng.normal(31, 1, n)
    expected = stats.ttest_rel(distilled, baseline).confidence_interval(0.95)
    assert paired_interval(distilled - baseline) == pytest.approx(tuple(expected), rel=1e-12)


def test_interval_of_three_by_hand():
    # mean 2, standard deviation 1, t(0.975, 2) = 4.302653
    half = 4.302652729911275 / math.sqrt(3)
    assert paired_interval([1, 2, 3]) == pytest.approx((2 - half, 2 + half), rel=1e-9)


@pytest.mark.parametrize(
    ('differences', 'word'),
    [
        ([5.0], 'INCONCLUSIVE'),
        ([5.0, 5.1], 'INCONCLUSIVE'),
        ([0.0, 0.0], 'INCONCLUSIVE'),
        ([3.0, 3.1, 2.9], 'BEATS'),
        ([-3.0, -3.1, -2.9], 'WORSE'),
        ([0.1, -0.1, 0.0], 'NO GAIN'),
        ([0.0, 0.0, 0.0], 'NO GAIN'),
        ([-1.0, 0.3, -0.2, -0.6, 0.2], 'NO GAIN'),
        ([3.0, -1.0, 1.0], 'INCONCLUSIVE'),
        ([2.0, 2.0, 2.0], 'INCONCLUSIVE'),
    ],
)
def test_word(differences, word):
    verdict = judge(differences, margin=0.5)
    assert verdict.word == word
    assert verdict.n == len(differences)
    assert verdict.mean == pytest.approx(np.mean(differences))


def test_margin_separates_no_gain_from_inconclusive():
    differences = [-0.3, 0.4, 0.1, 0.2]
    high = paired_interval(differences)[1]
    assert judge(differences, margin=high + 1e-6).word == 'NO GAIN'
    assert judge(differences, margin=high - 1e-6).word == 'INCONCLUSIVE'


def test_equal_differences_are_said_to_be_no_sample():
    assert 'does the seed reach the runs' in judge([2.0, 2.0, 2.0]).why


@pytest.mark.parametrize('bad', [[], [1.0, math.nan, 2.0], [math.inf, 1.0, 2.0]])
def test_what_cannot_be_judged_is_refused(bad):
    with pytest.raises(ValueError, match='nothing to judge|not a finite number'):
        judge(bad)


def test_gap_share():
    assert gap_share(53.0, 50.0, 60.0) == pytest.approx(0.3)
    assert gap_share(49.0, 50.0, 60.0) == pytest.approx(-0.1)
    assert gap_share(53.0, 50.0, 50.0) is None


@pytest.mark.parametrize('teacher', [0.5, 0.9])
def test_a_table_with_a_gap_share_says_what_it_is(configs, tmp_path, teacher):
    fake = Fake(lambda name: teacher if name.startswith('teacher') else 0.5)
    _, out = call(configs, ['mmkd'], fake, tmp_path)
    assert ("- gap share: the gain as a part of the teacher's lead" in out) == (teacher > 0.5)


# ------------------------------------------------------------------------------- planning


def test_baseline_is_the_same_config_with_every_weight_0(configs):
    plan = cmp.plan_runs([configs['mmkd']], [0, 7])
    (comparison,) = plan.comparisons
    run = comparison.baseline.runs[1]
    cfg = config_with_options(run.config, run.options)
    distilled = config_with_options(configs['mmkd'], comparison.distilled.runs[1].options)
    for term in TERMS:
        assert cfg.model.distillation[term].pop('loss_weight') == 0
        distilled.model.distillation[term].pop('loss_weight', None)
    assert cfg.model.distillation.start == 'teacher'
    assert cfg.randomness.seed == 7
    assert cfg.to_dict() == distilled.to_dict()
    assert terms_on(config_with_options(run.config, run.options).model) == []
    assert terms_on(config_with_options(configs['mmkd']).model) == list(TERMS)


def test_baselines_with_the_same_start_are_one_run(configs):
    plan = cmp.plan_runs(
        [configs['paper'], configs['paper_start'], configs['mmkd']], [0, 1], [configs['plain']]
    )
    paper, paper_start, mmkd = plan.comparisons
    assert paper_start.baseline is mmkd.baseline
    assert mmkd.baseline.baseline_of == ['paper_start', 'mmkd']
    # Without a start, off is plain MMDetection: the plain student is the baseline.
    assert paper.baseline is plan.plain[0]
    assert paper.baseline.role == 'plain'
    # teacher, plain, start only, three distilled ones
    assert [row.role for row in plan.rows] == ['teacher', 'plain', 'baseline'] + 3 * ['distilled']
    assert len(plan.runs) == 1 + 2 * 5
    assert len({run.key for run in plan.runs}) == len(plan.runs)


def test_keys_follow_what_decides_the_result(configs):
    def keys(**kwargs):
        run = cmp.plan_runs([configs['mmkd']], [0], **kwargs).comparisons[0].distilled.runs[0]
        return run.train_key, run.key

    first = keys()
    assert keys(options=['work_dir=elsewhere', 'default_hooks.logger.interval=7']) == first
    assert keys(options=['optim_wrapper.optimizer.lr=0.5'])[0] != first[0]
    assert keys(options=['model.distillation.hint.loss_weight=9'])[0] != first[0]
    assert keys(processes=2)[0] != first[0]
    # Another split tests the same training.
    assert keys(split='val')[0] == first[0]
    assert keys(split='val')[1] != first[1]
    # A teacher trained anew under the old name is another teacher.
    Path(configs['ckpt']).write_bytes(os.urandom(8))
    file_digest.cache_clear()
    assert keys()[0] != first[0]


def test_pretrained_weights_count_by_their_bytes(configs, tmp_path):
    def key(weights):
        init_cfg = dict(_delete_=True, type='Pretrained', checkpoint=str(weights))
        path = tmp_path / f'{weights.name}.py'
        path.write_text(
            f'_base_ = {configs["mmkd"]!r}\nmodel = dict(backbone=dict(init_cfg={init_cfg}))\n'
        )
        return cmp.plan_runs([str(path)], [0]).comparisons[0].distilled.runs[0].train_key

    one, other, third = (tmp_path / name for name in ('one', 'other', 'third'))
    for path, content in ((one, b'a'), (other, b'a'), (third, b'b')):
        path.write_bytes(content)
    assert key(one) == key(other)
    assert key(one) != key(third)


def test_a_teacher_of_more_classes_is_tested_among_the_students(monkeypatch):
    """Its detections of other classes do not count; the rest have the student's labels."""
    monkeypatch.chdir(ROOT)
    plan = cmp.plan_runs(['configs/digits/pairs/four_classes.py'], [0])
    teacher = next(row for row in plan.rows if row.role == 'teacher').runs[0]
    assert teacher.test_cfg.test_cfg == dict(type='mmkd.RelabelledTestLoop', labels=[3, 5, 6, 8])
    student = next(row for row in plan.rows if row.role == 'distilled').runs[0]
    assert student.test_cfg.test_cfg.type == 'TestLoop'

    def step(data):
        sample = DetDataSample()
        sample.pred_instances = InstanceData(
            labels=torch.tensor(data), scores=torch.arange(len(data)) / 10
        )
        return [sample]

    runner = SimpleNamespace(model=SimpleNamespace(test_step=step))
    monkeypatch.setattr(TestLoop, '__init__', lambda self, it: setattr(self, '_runner', it))
    RelabelledTestLoop(runner, labels=[8, 3, None, 5])
    for given, labels, scores in (
        ([5, 0, 8, 6], [3, 0], [0.0, 0.2]),
        ([1, 2], [], []),
        ([], [], []),
    ):
        (sample,) = runner.model.test_step(given)
        assert sample.pred_instances.labels.tolist() == labels
        assert sample.pred_instances.scores.tolist() == pytest.approx(scores)


def test_two_tests_of_one_teacher_are_two_rows(monkeypatch):
    """Each student's share of the gap is told by the teacher's mAP on its own classes."""
    monkeypatch.chdir(ROOT)
    configs = ['configs/digits/pairs/to_mobilenet.py', 'configs/digits/pairs/four_classes.py']
    plan = cmp.plan_runs(configs, [0])
    teachers = [row.label for row in plan.rows if row.role == 'teacher']
    assert teachers == ['teacher', 'teacher of four_classes']
    assert [c.teacher.label for c in plan.comparisons] == teachers


def test_the_teacher_does_not_matter_to_a_baseline_without_a_start(configs):
    def key(name):
        plan = cmp.plan_runs([configs[name]], [0])
        return plan.comparisons[0].baseline.runs[0].train_key

    paper, start = key('paper'), key('paper_start')
    Path(configs['ckpt']).write_bytes(os.urandom(8))
    file_digest.cache_clear()
    assert key('paper') == paper
    assert key('paper_start') != start


def test_tests_run_the_plain_network_with_the_students_settings(configs):
    plan = cmp.plan_runs([configs['mmkd']], [0])
    student, teacher = plan.comparisons[0].distilled.runs[0], plan.comparisons[0].teacher.runs[0]
    assert student.test_cfg.model.type == 'TwoStageDetector'
    assert not {'teacher_config', 'teacher_ckpt', 'distillation'} & set(student.test_cfg.model)
    assert teacher.test_cfg.model.backbone.base_channels == 8
    assert student.test_cfg.model.backbone.base_channels == 4
    assert teacher.test_cfg.test_dataloader == student.test_cfg.test_dataloader
    assert teacher.checkpoint == configs['ckpt']


UNLABELLED = """\
_base_ = {base!r}
model = dict(distillation=dict(unlabelled=dict(ann_file={images!r}, share={share})))
"""


@pytest.fixture
def unlabelled(configs, tmp_path):
    """Paths of a config with images that have no labels, of one with these alone, and the list."""
    images = tmp_path / 'images.json'
    images.write_text(json.dumps(dict(images=[], annotations=[], categories=[])))
    paths = {'images': str(images)}
    for name, share in (('more', 0.5), ('alone', 1.0)):
        paths[name] = str(tmp_path / f'{name}.py')
        text = UNLABELLED.format(base=configs['mmkd'], images=str(images), share=share)
        Path(paths[name]).write_text(text)
    return paths


def test_more_images_are_not_credited_to_the_terms(configs, unlabelled):
    """A baseline on the labelled images, and one that learns the teacher's boxes."""
    plan = cmp.plan_runs([unlabelled['more'], configs['mmkd']], [0, 1])
    more, mmkd = plan.comparisons
    assert more.baseline is mmkd.baseline  # the plain student with the same start
    ((hard, how),) = more.others
    assert how == 'hard pseudo-labels, terms off' and mmkd.others == []
    ((note),) = plan.notes
    assert note.startswith('more counts epochs') and 'fewer iterations' in note
    by_iter = ['train_cfg.by_epoch=False', 'train_cfg.max_iters=9']
    assert cmp.plan_runs([unlabelled['more']], [0], options=by_iter).notes == []
    assert hard.label == "more, teacher's boxes" and len(hard.runs) == 2
    keys = {row.runs[0].train_key for row in (more.distilled, mmkd.distilled, hard, more.baseline)}
    assert len(keys) == 4
    cfg = config_with_options(hard.runs[0].config, hard.runs[0].options)
    assert not terms_on(cfg.model) and cfg.model.distillation.unlabelled.share == 0.5
    cfg = config_with_options(more.baseline.runs[0].config, more.baseline.runs[0].options)
    assert not terms_on(cfg.model) and cfg.model.distillation.unlabelled is None
    assert unlabelled['images'] in plan.annotations
    summary = summarise(plan, {}, {})
    assert [(p.label, p.reference, p.own) for p in summary.pairs] == [
        ('more', 'more, labelled images', True),
        ('more', "more, teacher's boxes", False),
        ('mmkd', 'more, labelled images', True),
    ]


def test_the_file_of_a_data_set_without_labels_is_one_of_the_annotations(configs, unlabelled):
    folder, name = os.path.split(unlabelled['images'])
    key = 'model.distillation.unlabelled'
    options = [f'{key}.ann_file=None', f'{key}.dataset.type=CocoDataset',
               f'{key}.dataset.data_root={folder}', f'{key}.dataset.ann_file={name}']  # fmt: skip
    plan = cmp.plan_runs([unlabelled['more']], [0], options=options)
    assert unlabelled['images'] in plan.annotations


def test_a_folder_below_the_home_folder_is_one_of_the_annotations(
    unlabelled, tmp_path, monkeypatch
):
    (tmp_path / 'disk').mkdir()
    monkeypatch.setenv('HOME', str(tmp_path))
    key = 'model.distillation.unlabelled'
    options = [f'{key}.ann_file=None', f'{key}.images=~/disk']
    plan = cmp.plan_runs([unlabelled['more']], [0], options=options)
    assert str(tmp_path / 'disk') in plan.annotations


def test_a_student_of_the_teacher_alone_is_compared_with_one_of_its_boxes(unlabelled):
    options = ['model.distillation.unlabelled.hard_weight=0']
    plan = cmp.plan_runs([unlabelled['alone']], [0], options=options)
    (found,) = plan.comparisons
    assert found.others == [] and found.baseline.label == 'alone, terms off'
    cfg = config_with_options(found.baseline.runs[0].config, found.baseline.runs[0].options)
    assert not terms_on(cfg.model)
    # Of no loss at all a baseline would learn nothing.
    assert cfg.model.distillation.unlabelled.hard_weight == 1
    cfg = config_with_options(found.distilled.runs[0].config, found.distilled.runs[0].options)
    assert cfg.model.distillation.unlabelled.hard_weight == 0


def test_distilled_configs_are_compared_with_one_of_them(configs):
    given = [configs['paper_start'], configs['mmkd']]
    plan = cmp.plan_runs(given, [0], against=[given[0]])
    first, second = plan.comparisons
    assert first.others == [] and second.others == [(first.distilled, 'distilled too')]
    with pytest.raises(ValueError, match='--against .*: it is not among the distilled configs'):
        cmp.plan_runs(given[1:], [0], against=given[:1])


def test_a_plain_config_of_other_data_or_another_network_is_not_said_to_lack_the_start_alone(
    configs, tmp_path
):
    for name, change in (
        ('data', "train_dataloader = dict(dataset=dict(ann_file='val.json'))"),
        ('network', 'model = dict(rpn_head=dict(feat_channels=4))'),
    ):
        (tmp_path / f'{name}.py').write_text(f'_base_ = {configs["plain"]!r}\n{change}\n')
    others = [str(tmp_path / 'data.py'), str(tmp_path / 'network.py')]
    plan = cmp.plan_runs([configs['mmkd']], [0], [configs['plain'], *others])
    said = {pair.reference: pair.how for pair in summarise(plan, {}, {}).pairs if not pair.own}
    assert said == {
        'plain': 'start and terms together',
        'data': 'another plain config',
        'network': 'another plain config',
    }


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (lambda c: ([c['mmkd']], [0, 0]), 'different numbers'),
        (lambda c: ([c['plain']], [0]), 'no distillation term on'),
        (lambda c: ([c['mmkd']], [0], [c['paper']]), 'distils'),
        (lambda c: ([c['mmkd'], c['mmkd']], [0]), 'given twice'),
        (lambda c: ([c['mmkd']], [0], [], ['test_evaluator.format_only=True']), 'format_only'),
        (lambda c: ([c['mmkd']], [0], [], ['test_dataloader=None']), 'no test_dataloader'),
        (
            lambda c: ([c['mmkd']], [0], [], ['optim_wrapper']),
            '^--cfg-options optim_wrapper: each must',
        ),
    ],
)
def test_impossible_plans_are_refused(configs, arguments, message):
    with pytest.raises(ValueError, match=message):
        cmp.plan_runs(*arguments(configs))


def test_options_of_the_distillation_do_not_reach_plain_configs(configs):
    options = ['model.distillation.hint.loss_weight=1', 'optim_wrapper.optimizer.lr=0.02']
    plan = cmp.plan_runs([configs['mmkd']], [3], [configs['plain']], options)
    assert plan.plain[0].runs[0].options == ['optim_wrapper.optimizer.lr=0.02', 'randomness.seed=3']


def test_names_that_clash_are_told_apart():
    paths = ['configs/a/x.py', 'configs/b/x.py', 'configs/b/y.py']
    assert list(planning._labels(paths).values()) == ['a/x', 'b/x', 'y']


# ------------------------------------------------------------------------------- running


def test_everything_is_run_once_and_the_table_ends_in_a_word(configs, tmp_path):
    gains = {0: 0.031, 1: 0.030, 2: 0.032}

    def maps(name):
        if name.startswith('teacher'):
            return 0.6
        seed = int(name.split('-s')[1][0])
        return 0.4 + 0.01 * seed + (0.0 if 'off' in name else gains[seed])

    fake = Fake(maps)
    code, out = call(configs, ['mmkd'], fake, tmp_path, jobs=2)
    assert code == 0
    assert len(fake.trained()) == 6
    table = (tmp_path / 'work/table.md').read_text()
    assert table in out
    rows = {
        line.split('|')[1].strip(): [cell.strip() for cell in line.split('|')[2:-1]]
        for line in table.splitlines()
        if line.startswith('| ')
    }
    time_column = rows['mmkd, terms off'][7]
    assert time_column == '0 s'
    assert rows['teacher'] == ['teacher', '', '60.0', '90.0', '1.23', '4.5', '20', '', '']
    assert rows['mmkd, terms off'][:4] == ['baseline of mmkd', '3', '41.0\xa0±\xa01.0', '90.0']
    # The difference's table has the same first cell and comes later.
    low, high = paired_interval([3.1, 3.0, 3.2])
    assert rows['mmkd'][:5] == [
        'mmkd, terms off (own baseline)',
        '+3.1',
        f'[{low:+.1f}, {high:+.1f}]',
        '3',
        '**BEATS**',
    ]
    assert '| 16 %' in table  # 3.1 of 60 - 41
    assert (tmp_path / 'work/report.html').read_text().startswith('<!doctype html>')

    again = Fake(maps)
    code, out = call(configs, ['mmkd'], again, tmp_path)
    assert (code, again.commands) == (0, [])
    assert '7 runs, 7 of them done already' in out

    changed = Fake(maps)
    code, out = call(
        configs, ['mmkd'], changed, tmp_path, options=['optim_wrapper.optimizer.lr=0.5'], seeds=[0]
    )
    assert len(changed.trained()) == 2
    assert '2 stale result(s) ignored' in out

    # Another split: tests, but no training.
    val = Fake(maps)
    code, out = call(configs, ['mmkd'], val, tmp_path, split='val', seeds=[0])
    assert (code, val.trained()) == (0, [])
    assert 'proves nothing' in out


def test_results_on_other_annotations_are_not_compared(configs, tmp_path):
    code, _ = call(configs, ['mmkd'], Fake(), tmp_path, seeds=[0])
    assert code == 0
    path = Path(configs['plain']).parent / 'data/train.json'
    before = path.read_text()
    try:
        path.write_text(before.replace('"bbox": [', '"bbox": [1, ', 1))
        file_digest.cache_clear()
        for options in ({}, {'table_only': True}):
            code, out = call(configs, ['mmkd'], Fake(), tmp_path, seeds=[0], **options)
            assert code == 2
            assert f'compare: {path} has changed since the results in' in out
    finally:
        path.write_text(before)
        file_digest.cache_clear()
    code, out = call(configs, ['mmkd'], Fake(), tmp_path, seeds=[0])
    assert code == 0 and '3 of them done already' in out


def test_results_on_other_unlabelled_images_are_not_compared(configs, tmp_path):
    folder = tmp_path / 'unlabelled'
    folder.mkdir()
    images = sorted((Path(configs['plain']).parent / 'data/images').glob('train_*'))[:3]
    for image in images[:2]:
        shutil.copy(image, folder)
    asked = dict(options=[f'model.distillation.unlabelled.images={folder}'], seeds=[0])
    code, _ = call(configs, ['mmkd'], Fake(), tmp_path, **asked)
    assert code == 0
    shutil.copy(images[2], folder)
    file_digest.cache_clear()
    code, out = call(configs, ['mmkd'], Fake(), tmp_path, **asked)
    assert code == 2
    assert f'compare: {folder} has changed since the results in' in out


def test_commands_are_those_of_a_user(configs, tmp_path):
    fake = Fake()
    call(configs, ['mmkd'], fake, tmp_path, seeds=[5], options=['train_cfg.max_epochs=3'])
    baseline, distilled = fake.trained()
    assert distilled[:3] == [sys.executable, str(ROOT / 'tools/train.py'), configs['mmkd']]
    assert distilled[-3:] == ['--cfg-options', 'train_cfg.max_epochs=3', 'randomness.seed=5']
    assert set(baseline) - set(distilled) - {baseline[4]} == {
        f'model.distillation.{term}.loss_weight=0' for term in TERMS
    }
    assert '--resume' not in baseline


def test_report_says_where_its_numbers_come_from(configs, tmp_path):
    code, _ = call(configs, ['mmkd'], Fake(), tmp_path, command='mmkd compare a.py', seeds=[0, 4])
    assert code == 0
    page = re.sub(r'<[^>]*>|\s+', ' ', (tmp_path / 'work/report.html').read_text())
    page = ' '.join(html.unescape(page).split())
    result = json.loads((tmp_path / 'work/results.jsonl').read_text().splitlines()[1])
    data = Path(configs['plain']).parent / 'data'
    for words in (
        'command mmkd compare a.py',
        f'data set CocoDataset in {data}, test split, 8 images',
        f'machine {result["machine"]}',
        f'torch {torch.__version__}',
        f'date of the runs {result["date"]} ',
        f'test split {data}/val.json SHA-256 {file_digest(str(data / "val.json"))[:16]}…',
        f'training {data}/train.json SHA-256 {file_digest(str(data / "train.json"))[:16]}…',
        f'teacher SHA-256 {file_digest(configs["ckpt"])[:16]}… {configs["ckpt"]}',
        f'mmkd mmkd train {configs["mmkd"]} --work-dir {tmp_path}/work/runs/mmkd-s0-',
        f'results {tmp_path}/work/results.jsonl',
        'an earlier mmkd made these results',  # the fake's have no detail
    ):
        assert words in page, words


def test_one_run_over_several_processes(configs, tmp_path):
    fake = Fake()
    code, _ = call(configs, ['mmkd'], fake, tmp_path, seeds=[0], jobs=1, gpus=2)
    assert code == 0
    launcher = ['bash', str(ROOT / 'tools/dist_train.sh'), configs['mmkd'], '2']
    assert [c[:4] for c in fake.commands if c[0] == 'bash'] == [launcher, launcher]


def test_what_was_stopped_is_resumed(configs, tmp_path):
    stopped = Fake(dies=['mmkd-s0'])
    stopped_code = []
    runs = cmp.plan_runs([configs['mmkd']], [0]).runs
    context = cmp.RunContext(
        tmp_path / 'work', tmp_path / 'work/results.jsonl', 1, 1, [],
        cmp.Progress([], io.StringIO()), stopped,
    )  # fmt: skip
    for run in runs:
        try:
            perform(run, context)
        except cmp.Stopped:
            stopped_code.append(run.name)
    assert stopped_code == ['mmkd, seed 0']

    fake = Fake()
    code, out = call(configs, ['mmkd'], fake, tmp_path, seeds=[0])
    assert code == 0
    (command,) = fake.trained()
    assert command[5] == '--resume'
    assert 'interrupted and resumed' in out


def test_a_failure_is_shown_and_stops_no_other(configs, tmp_path):
    fake = Fake(fails=['mmkd-terms-off-s1'])
    code, out = call(configs, ['mmkd'], fake, tmp_path, seeds=[0, 1, 2])
    assert code == 1
    assert len(fake.trained()) == 6
    assert 'RuntimeError: the loss is NaN' in out
    assert 'not there (yet): mmkd, terms off, seed 1' in out
    # A pair that lacks one half counts for nothing.
    assert judge([0.0, 0.0]).word in out.split('own baseline')[2]


@pytest.mark.parametrize(
    ('split', 'key'), [('test', 'ann_file'), ('test', 'data_prefix.img'), ('val', 'ann_file')]
)
def test_what_cannot_be_tested_is_not_trained(configs, tmp_path, split, key):
    fake = Fake()
    options = [f'{split}_dataloader.dataset.{key}=gone']
    code, out = call(configs, ['mmkd'], fake, tmp_path, split=split, options=options)
    assert (code, fake.commands) == (2, [])
    assert not list((tmp_path / 'work').glob('*'))
    assert f'{split} annotations ' in out and 'not exist' in out
    assert ('--split val' in out) == (split == 'test')
    # The other split's data are not needed, nor any for a table.
    other = {'test': 'val', 'val': 'test'}[split]
    code, _ = call(configs, ['mmkd'], fake, tmp_path, split=other, options=options)
    assert code == 0 and fake.commands
    code, out = call(configs, ['mmkd'], fake, tmp_path, options=options, table_only=True)
    assert 'do not exist' not in out


def test_table_from_results_alone(configs, tmp_path):
    call(configs, ['mmkd'], Fake(), tmp_path)
    table = (tmp_path / 'work/table.md').read_text()
    file = tmp_path / 'work/results.jsonl'
    assert file.stat().st_size < 20_000
    stream = io.StringIO()
    code = cmp.compare(
        [configs['mmkd']], work_dir=tmp_path / 'elsewhere', results_path=file, table_only=True,
        execute=None, stream=stream,
    )  # fmt: skip
    assert code == 0
    assert (tmp_path / 'elsewhere/table.md').read_text() == table


def test_a_line_that_a_kill_cut_short_costs_one_run(configs, tmp_path):
    assert call(configs, ['mmkd'], Fake(), tmp_path, seeds=[0])[0] == 0
    file = tmp_path / 'work/results.jsonl'
    lines = file.read_bytes().splitlines(keepends=True)
    kinds = [json.loads(line)['kind'] for line in lines]
    assert kinds == ['annotations', 'run', 'run', 'run', 'measure', 'measure']
    cut = lines[3][:50]
    file.write_bytes(b''.join([*lines[:3], *lines[4:], cut]))
    fake = Fake()
    code, out = call(configs, ['mmkd'], fake, tmp_path, seeds=[0])
    assert code == 0 and '3 runs, 2 of them done already' in out
    assert f'note: {file}: line(s) 6 cut short' in out
    assert fake.trained() == []  # its checkpoint is there: it is tested again
    assert len(fake.commands) == 2
    assert file.read_bytes() == b''.join([*lines[:3], *lines[4:], cut, b'\n', lines[3]])
    code, out = call(configs, ['mmkd'], Fake(), tmp_path, seeds=[0])
    assert code == 0 and '3 of them done already' in out


def test_a_result_that_another_call_made_meanwhile_is_taken(configs, tmp_path):
    file = tmp_path / 'results.jsonl'
    run = cmp.plan_runs([configs['mmkd']], [0]).runs[-1]
    line = {'kind': 'run', 'key': run.key, 'metrics': {'mAP': 0.25}}
    results.append_result(file, line)
    progress = cmp.Progress([], io.StringIO())
    context = cmp.RunContext(tmp_path, file, 1, 1, [], progress, Fake(fails=['']))
    assert perform(run, context) == line


WRITER = """
import sys, threading
from pathlib import Path
from mmkd.analysis.comparison.results import append_result

def write(thread):
    for i in range(25):
        line = {'kind': 'run', 'key': f'{sys.argv[2]}-{thread}-{i}', 'text': 'x' * 9000}
        append_result(Path(sys.argv[1]), line)

threads = [threading.Thread(target=write, args=(each,)) for each in range(2)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
"""


def test_processes_and_threads_append_whole_lines(tmp_path):
    file = tmp_path / 'results.jsonl'
    command = [sys.executable, '-c', WRITER, str(file)]
    env = {**os.environ, 'PYTHONPATH': str(ROOT)}
    writers = [subprocess.Popen([*command, name], env=env) for name in 'ab']
    assert [writer.wait() for writer in writers] == [0, 0]
    read = results.read_results(file)
    assert read.damaged == []
    assert set(read.runs) == {f'{n}-{t}-{i}' for n in 'ab' for t in range(2) for i in range(25)}
    assert len(file.read_bytes().splitlines()) == 100


def test_a_result_that_the_disk_cannot_take_leaves_no_part(tmp_path, monkeypatch):
    file = tmp_path / 'results.jsonl'
    results.append_result(file, {'kind': 'run', 'key': 'a'})
    before = file.read_bytes()

    def full(descriptor):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(os, 'fsync', full)
    with pytest.raises(OSError, match='No space'):
        results.append_result(file, {'kind': 'run', 'key': 'b'})
    assert file.read_bytes() == before


def test_a_folder_of_results_is_refused(configs, tmp_path):
    stream = io.StringIO()
    code = cmp.compare([configs['mmkd']], results_path=tmp_path, table_only=True, stream=stream)
    assert code == 2
    assert f'{tmp_path} is a folder' in stream.getvalue()


def test_a_gpu_for_each_run_side_by_side(monkeypatch):
    monkeypatch.setattr('torch.cuda.device_count', lambda: 4)
    monkeypatch.delenv('CUDA_VISIBLE_DEVICES', raising=False)
    assert cmp.resources(None, None) == (4, 1, ['0', '1', '2', '3'])
    assert cmp.resources(None, 2) == (2, 1, ['0', '1'])
    assert cmp.resources(1, 2) == (1, 2, ['0', '1'])
    assert cmp.resources(8, 4) == (8, 1, ['0', '1', '2', '3'])
    monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '4,5,6,7')
    assert cmp.resources(None, 2) == (2, 1, ['4', '5'])
    with pytest.raises(ValueError, match='shows 4'):
        cmp.resources(None, 5)
    monkeypatch.setattr('torch.cuda.device_count', lambda: 0)
    assert cmp.resources(None, None) == (cpu_cores(), 1, [])
    with pytest.raises(ValueError, match='no GPU'):
        cmp.resources(None, 2)


def test_a_killed_caller_leaves_a_lock_that_its_child_holds(configs, tmp_path):
    """The lock goes to the child, so a second call cannot train in the same folder beside it."""
    run = cmp.plan_runs([configs['mmkd']], [0]).runs[-1]
    stop = threading.Event()
    context = cmp.RunContext(
        tmp_path, tmp_path, 1, 1, [], cmp.Progress([], io.StringIO()), cmp.run_command, stop
    )
    with runs._locked(tmp_path, run, context) as lock:
        child = subprocess.Popen(['sleep', '900'], pass_fds=[lock])
    stop.set()
    with pytest.raises(cmp.Stopped), runs._locked(tmp_path, run, context):
        pass
    assert 'earlier call' in context.progress.state[run.name]
    child.send_signal(signal.SIGKILL)
    child.wait()
    with runs._locked(tmp_path, run, context):
        pass


def test_a_stopped_command_leaves_no_child(tmp_path):
    """It is told, with its own children, and need not be killed."""
    script = "trap 'echo told; exit' TERM; sleep 900 & echo child $!; wait"
    log = tmp_path / 'log'

    def poll():
        if '\nchild ' in log.read_text():
            raise cmp.Stopped

    with pytest.raises(cmp.Stopped), open(tmp_path / 'lock', 'w') as lock:
        cmp.run_command(['bash', '-c', script], log, dict(os.environ), lock.fileno(), poll)
    said = log.read_text()
    assert said.endswith('\ntold\n')
    child = re.search(r'^child (\d+)$', said, re.MULTILINE)[1]
    for _ in range(3000):  # whoever inherits it takes note of its end in his own time
        status = Path(f'/proc/{child}/stat')
        if not status.exists() or status.read_text().rpartition(')')[2].split()[0] == 'Z':
            break
        time.sleep(0.02)
    else:
        pytest.fail('its child lives on')


@pytest.mark.parametrize(
    ('line', 'epochs', 'expected'),
    [
        (
            '07/01 - mmengine - INFO - Epoch(train)  [ 2][ 50/120]  lr: 1e-2  eta: 1:02:03  '
            'time: 0.1  loss: 1.2345  loss_kd_hint: 0.1',
            3,
            'training 170/360  loss 1.23  ETA 1:02:03',
        ),
        (
            'Iter(train) [  50/2000]  lr: 1e-2  eta: 1 day, 1:02:03  time: 1  loss: nan',
            None,
            'training 50/2000  loss nan  ETA 1 day, 1:02:03',
        ),
        ('loading annotations into memory...', 1, None),
    ],
)
def test_progress_is_read_from_mmengines_log(line, epochs, expected):
    assert progress.training_state(f'before\n{line}\nSaving checkpoint', epochs) == expected


def test_the_end_is_estimated_from_the_pace_of_this_call(monkeypatch):
    clock = SimpleNamespace(monotonic=lambda: 100.0, time=time.time, strftime=time.strftime,
                            localtime=time.localtime)  # fmt: skip
    monkeypatch.setattr(progress, 'time', clock)
    screen = cmp.Progress(['a', 'b', 'c'], io.StringIO(), costs={'c': 0.25}, later=2.0, started=0.0)
    assert screen.estimate() == ''
    screen.set('a', 'done in 40 s: mAP 50.0')
    # An earlier call had done half of b; this one has no pace from that.
    screen.set('b', 'training 50/100  loss 1.5')
    assert screen.first == {'b': pytest.approx(0.475)}
    # Of one that begins here all is this call's, however late it is looked at.
    fresh = cmp.Progress(['d'], io.StringIO(), started=0.0)
    fresh.set('d', 'training')
    fresh.set('d', 'training 50/100  loss 1.5')
    assert fresh.done() == pytest.approx(0.475)
    left = 0.525 + 0.25 + 2.0
    assert screen.estimate().startswith(
        f'1 of 3 runs done; about {progress.duration(100 * left)} left, until '
    )
    screen.set('b', 'training 100/100')
    assert progress.duration(100 * (0.05 + 0.25 + 2) / 1.475) in screen.estimate()
    following = cmp.Progress(['d'], io.StringIO(), before=screen.done(), started=0.0)
    assert progress.duration(100 / 1.475) in following.estimate()
    clock.monotonic = lambda: 3.0  # start-up is no pace
    assert screen.estimate() == ''


def test_a_step_takes_the_median_of_what_is_logged(tmp_path):
    assert results.read_step_time(tmp_path) is None
    file = tmp_path / '20250101_000000/vis_data/scalars.json'
    file.parent.mkdir(parents=True)
    lines = [{'loss': 1.0, 'time': t, 'step': i} for i, t in enumerate((9.0, 0.2, 0.25))]
    lines += [{'loss': 1.0, 'step': 4}, {'coco/bbox_mAP': 0.2, 'time': 99.0, 'step': 1}]
    file.write_text('\n'.join(map(json.dumps, lines)) + '\n{"loss": 1, "ti')
    assert results.read_step_time(tmp_path) == 250.0


@pytest.mark.parametrize(
    ('option', 'message'),
    [
        ('distillation.hint.loss_weight=1', 'write model.distillation.hint.loss_weight'),
        ('optim_wraper.optimizer.lr=1', 'near it: optim_wrapper'),
        ('data_root=elsewhere', 'data_root is a variable of the config'),
        ('train_cfg.max_epochs.x=1', 'does not fit'),
    ],
)
def test_options_without_effect_are_refused_before_a_run(configs, tmp_path, option, message):
    fake = Fake()
    code, out = call(configs, ['mmkd'], fake, tmp_path, options=[option])
    assert (code, fake.commands) == (2, [])
    assert message in out


def test_curves_of_a_resumed_run_join(tmp_path):
    def attempt(stamp, entries):
        path = tmp_path / stamp / 'vis_data/scalars.json'
        path.parent.mkdir(parents=True)
        path.write_text('\n'.join(map(json.dumps, entries)) + '\n{"loss": 1, "it')

    attempt('20250101_000000', [{'loss': float(i), 'iter': i, 'step': i} for i in (1, 2, 3)])
    attempt(
        '20250101_000100',
        [
            {'loss': 30.0, 'loss_kd_hint': math.nan, 'iter': 3, 'step': 3},
            {'loss': 40.0, 'loss_kd_hint': 0.5, 'iter': 4, 'step': 4},
            {'coco/bbox_mAP': 0.125, 'step': 1},
        ],
    )
    assert results.read_curves(tmp_path) == {
        'train': {
            'iter': [1, 2, 3, 4],
            'loss': [1.0, 2.0, 30.0, 40.0],
            'loss_kd_hint': [None, None, None, 0.5],
        },
        'val': {'iter': [4], 'mAP': [12.5]},
    }
    assert results.read_curves(tmp_path, points=2)['train']['loss'] == [1.5, 35.0]


@pytest.mark.parametrize(
    ('reported', 'expected'),
    [
        ({'coco/bbox_mAP': 0.4, 'coco/bbox_mAP_50': 0.6, 'coco/segm_mAP': 0.3}, (0.4, 0.6)),
        ({'pascal_voc/mAP': 0.7, 'pascal_voc/AP50': 0.7}, (0.7, 0.7)),
        ({'lvis/bbox_AP': 0.2}, (0.2, None)),
    ],
)
def test_metrics_are_found_by_their_names(reported, expected):
    assert results.find_metrics(reported) == expected


def test_a_missing_metric_is_named():
    with pytest.raises(KeyError, match='no box mAP.*coco/segm_mAP'):
        results.find_metrics({'coco/segm_mAP': 0.3})


def test_score_is_the_evaluators_number_unrounded(tmp_path):
    """Boxes shifted by known amounts: COCO's AP at ten thresholds, which CocoMetric rounds."""
    import torch
    from mmdet.registry import MODELS
    from mmengine.config import Config
    from mmengine.registry import init_default_scope

    config = tiny_config(tmp_path)
    cfg = Config.fromfile(config)
    init_default_scope('mmdet')
    torch.save({'state_dict': MODELS.build(cfg.model).state_dict()}, tmp_path / 'net.pth')
    annotations = json.loads((tmp_path / 'data/val.json').read_text())
    samples = []
    for image in annotations['images']:
        own = [a for a in annotations['annotations'] if a['image_id'] == image['id']]
        boxes = torch.tensor([a['bbox'] for a in own], dtype=torch.float)
        boxes[:, 2:] += boxes[:, :2]
        boxes[:, 2] += (image['id'] % 3) * 10.0
        predicted = {
            'bboxes': boxes,
            'labels': torch.tensor([a['category_id'] - 1 for a in own]),
            'scores': torch.linspace(0.9, 0.5, len(own)),
        }
        samples.append({'img_id': image['id'], 'ori_shape': (64, 64), 'pred_instances': predicted})
    torch.save({'detections': samples}, tmp_path / 'found.pth')
    value = score(str(config), str(tmp_path / 'net.pth'), str(tmp_path / 'found.pth'))
    assert value['exact']
    assert value['reported']['coco/bbox_mAP'] == round(value['mAP'], 3)
    assert value['mAP'] != value['reported']['coco/bbox_mAP']
    assert (value['images'], value['detections']) == (8, len(annotations['annotations']))
    detail = value['detail']
    assert detail['AP75'] < value['AP50'] - 0.01
    assert detail['AP75'] == pytest.approx(value['reported']['coco/bbox_mAP_75'], abs=6e-4)
    assert np.mean(detail['precision']) == pytest.approx(value['AP50'], abs=1e-3)
    assert list(detail['classes']) == ['red', 'green', 'blue'] and detail['class_count'] == 3
    assert np.mean(list(detail['classes'].values())) == pytest.approx(value['mAP'], abs=1e-3)
    # Boxes that are too wide.
    assert detail['errors']['localisation'] > 0.01 and detail['errors']['background'] == 0
    assert len(json.dumps(detail)) < 2000

    for sample in samples:
        sample['pred_instances'] = {k: v[:0] for k, v in sample['pred_instances'].items()}
    torch.save({'detections': samples}, tmp_path / 'found.pth')
    value = score(str(config), str(tmp_path / 'net.pth'), str(tmp_path / 'found.pth'))
    assert value['mAP'] == 0.0
    assert value['detail']['errors']['missed'] == 1 and set(value['detail']['precision']) == {0.0}

    torch.save({'state_dict': {'backbone.conv1.weight': torch.zeros(1)}}, tmp_path / 'bad.pth')
    with pytest.raises(ValueError, match='does not fit'):
        score(str(config), str(tmp_path / 'bad.pth'), str(tmp_path / 'found.pth'))


@pytest.mark.parametrize(
    ('given', 'found'),
    [
        (dict(OMP_NUM_THREADS='3'), ('3', None)),
        (dict(MKL_NUM_THREADS='2'), (None, '2')),
        (dict(OMP_NUM_THREADS='3', MKL_NUM_THREADS='2'), ('3', '2')),
        ({}, ('1', '1')),
    ],
)
def test_threads_that_are_set_are_left_alone(tmp_path, monkeypatch, given, found):
    names = ('OMP_NUM_THREADS', 'MKL_NUM_THREADS')
    for name in names:
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr('mmkd.analysis.comparison.runs.cpu_cores', lambda: 2)
    screen = cmp.Progress([], io.StringIO())
    context = cmp.RunContext(tmp_path, tmp_path / 'r', 2, 1, [], screen, cmp.run_command)
    assert tuple(context.environment(None).get(name) for name in names) == found


@pytest.mark.parametrize('seeds', [(0,), (0, 1, 2)])
@pytest.mark.parametrize(('points', 'too_early'), [(1.0, True), (30.0, False)])
def test_networks_that_have_learned_nothing_are_to_be_trained_longer(
    configs, tmp_path, seeds, points, too_early
):
    def maps(name):
        # Differences from seed to seed, so that nothing is proven.
        return 0.4 if 'teacher' in name else (points + 0.6 * (len(name) % 2)) / 100

    fake = Fake(maps)
    call(configs, ['paper'], fake, tmp_path, seeds=seeds)
    for text in ((tmp_path / 'work' / name).read_text() for name in ('table.md', 'report.html')):
        assert ('train longer (train_cfg.max_epochs)' in text) == too_early
        assert ('this proves nothing' in text) == (len(seeds) < 3 and not too_early)
