"""The page: what it says, that it needs nothing from elsewhere, and how detections are matched."""

import json
import re
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hostile import HOSTILE
from mmengine.config import Config
from tiny import tiny_config

from mmkd.analysis import comparison
from mmkd.analysis.comparison import charts, details, report
from mmkd.analysis.comparison.statistics import judge
from mmkd.analysis.comparison.table import PairSummary, RowSummary, Summary, columns

VOID = {'meta', 'br'}


class Page(HTMLParser):
    """Checks that tags close in order, and gathers text, attributes and tags."""

    def __init__(self, text):
        super().__init__()
        self.open, self.words, self.tags = [], [], []
        self.feed(text)
        self.close()
        assert self.open == []
        self.text = re.sub(r'\s+', ' ', ' '.join(self.words))

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not self.open or self.open[-1] != 'style':
            self.words.append(data)


def row(label, role, values, seeds=(0, 1, 2), **kwargs):
    values = dict(zip(seeds, values, strict=True))
    return RowSummary(
        label, role, len(values), values, float(np.mean(list(values.values()))), 80.0, 1_300_000,
        4.5, 21.0, None if role == 'teacher' else 600.0, kwargs.pop('baseline_of', []), **kwargs,
    )  # fmt: skip


@pytest.fixture
def summary():
    plain = [40.0, 40.6, 39.9]
    start = [50.1, 50.9, 50.2]
    rows = [
        row('teacher', 'teacher', [63.5], seeds=[None]),
        row('plain', 'plain', plain, baseline_of=['paper']),
        row('mmkd, terms off', 'baseline', start, baseline_of=['mmkd'], share_plain=0.44),
        row('paper', 'distilled', [40.1, 40.4, 40.0], share_own=0.0, share_plain=0.0),
        row('mmkd', 'distilled', [53.2, 53.8, 53.4], share_own=0.23, share_plain=0.57),
    ]
    own, paper = [3.1, 2.9, 3.2], [0.1, -0.2, 0.1]
    whole = [13.2, 13.2, 13.5]
    pairs = [
        PairSummary('paper', 'plain', True, [0, 1, 2], judge(paper), 0.0),
        PairSummary('mmkd', 'mmkd, terms off', True, [0, 1, 2], judge(own), 0.23),
        PairSummary('mmkd', 'plain', False, [0, 1, 2], judge(whole), 0.57),
    ]
    return Summary(rows, pairs, [0, 1, 2], 'test', 0.5, ['a <note> & more'])


@pytest.fixture
def curves():
    def one(scale, terms):
        iters = list(range(50, 2001, 50))
        train = {'iter': iters, 'loss': [scale * (0.4 + 60 / (i + 50)) for i in iters]}
        for k, term in enumerate(terms):
            train[term] = [0.1 * (k + 1) * (0.2 + 40 / (i + 50)) for i in iters]
        val_iters = list(range(250, 2001, 250))
        values = [50 * scale * (1 - 200 / (i + 200)) for i in val_iters]
        return {'train': train, 'val': {'iter': val_iters, 'mAP': values}}

    terms = ['loss_kd_rpn_cls', 'loss_kd_rpn_bbox', 'loss_kd_cls', 'loss_kd_bbox', 'loss_kd_hint']
    return {
        'plain': [one(0.8, []), one(0.82, [])],
        'mmkd, terms off': [one(1.0, [])],
        'paper': [one(0.81, terms)],
        'mmkd': [one(1.06, terms), one(1.1, terms)],
    }


def pictures(tmp_path, count=3):
    cfg = Config.fromfile(tiny_config(tmp_path))
    annotations = json.loads((tmp_path / 'data/val.json').read_text())
    paths = {}
    for k, label in enumerate(('teacher', 'plain', 'mmkd, terms off', 'paper', 'mmkd')):
        samples = []
        for image in annotations['images']:
            own = [a for a in annotations['annotations'] if a['image_id'] == image['id']]
            boxes = np.array([a['bbox'] for a in own], dtype=float)
            boxes[:, 2:] += boxes[:, :2]
            boxes[k % len(boxes) :] += 6 * k
            predicted = {
                'bboxes': boxes,
                'labels': np.array([a['category_id'] - 1 for a in own]),
                'scores': np.linspace(0.9, 0.2 if k == 1 else 0.5, len(own)),
            }
            samples.append({'img_id': image['id'], 'pred_instances': predicted})
        paths[label] = tmp_path / f'{k}.pth'
        torch.save({'detections': samples}, paths[label])
    return report.collect_pictures(cfg, paths, count), annotations


def test_page_needs_nothing_from_elsewhere(summary, curves, tmp_path):
    text = report.render(summary, curves, pictures(tmp_path)[0])
    page = Page(text)
    assert '//' not in re.sub(r'base64,[\w+/=]*', '', text)
    assert not {tag for tag, _ in page.tags} & {'script', 'link', 'iframe', 'img', 'object'}
    assert 'url(' not in text and '@import' not in text
    for _, attributes in page.tags:
        for name in ('href', 'src'):
            assert attributes.get(name, '#').startswith(('#', 'data:image/jpeg;base64,'))


def test_verdict_comes_first_and_every_drawing_is_told_in_words(summary, curves, tmp_path):
    page = Page(report.render(summary, curves, pictures(tmp_path)[0]))
    assert page.text.index('BEATS') < page.text.index('Numbers')
    assert page.text.index('NO GAIN') < page.text.index('Numbers')
    assert 'mmkd +3.1 mAP against its own baseline' in page.text
    assert 'Share of the gap to the teacher: 23' in page.text
    assert 'a <note> & more' in page.text
    assert 'proves nothing' not in page.text
    drawings = [attributes for tag, attributes in page.tags if tag == 'svg']
    assert all(a.get('aria-label') or a.get('aria-hidden') for a in drawings)
    labels = ' '.join(a.get('aria-label', '') for a in drawings)
    terms = ('loss_kd_rpn_cls', 'loss_kd_rpn_bbox', 'loss_kd_cls', 'loss_kd_bbox', 'loss_kd_hint')
    for term in ('mAP', 'loss', *terms):
        assert f'{term} (' in labels
    assert 'mmkd − mmkd, terms off: +3.1, interval' in labels
    head, body = columns(summary)
    for cell in (*head, *(c for line in body for c in line)):
        assert ' '.join(cell.strip('*').split()) in page.text


def test_one_seed_is_said_to_prove_nothing(summary):
    summary.seeds = [0]
    summary.pairs[1].verdict = judge([3.1])
    page = Page(report.render(summary, {}))
    assert 'this proves nothing' in page.text
    assert 'INCONCLUSIVE' in page.text
    assert 'vis_data/scalars.json' in page.text
    assert 'Test images None' in page.text


def test_names_cannot_break_out_of_the_page(summary, curves, tmp_path):
    hostile = '"><script>alert(1)</script>\'&{{ 7 * 7 }}'
    summary.rows[-1].label = summary.pairs[1].label = summary.pairs[2].label = hostile
    summary.rows[-2].role = hostile
    summary.notes.append(hostile)
    summary.split = hostile
    curves[hostile] = curves.pop('mmkd')
    shown = pictures(tmp_path)[0]
    for picture in shown:
        picture.name = hostile
        picture.truth = [(box, hostile) for box, _ in picture.truth]
        picture.found[hostile] = picture.found.pop('mmkd')
    text = report.render(summary, curves, shown)
    page = Page(text)
    assert 'script' not in {tag for tag, _ in page.tags}
    assert '<script' not in text
    assert hostile in page.text
    labels = [attributes.get('aria-label') or '' for tag, attributes in page.tags if tag == 'svg']
    forest = f'Paired differences in mAP. paper − plain: +0.0, interval -0.4 to +0.4; {hostile}'
    for start in (forest, 'loss (sum of all)', f'{hostile}, ground truth'):
        assert any(each.startswith(start) for each in labels)
    assert sum(hostile in each for each in labels) > 10


def test_pictures_show_the_same_images_for_all(tmp_path):
    shown, annotations = pictures(tmp_path)
    assert [p.name for p in shown] == ['val_000.png', 'val_003.png', 'val_007.png']
    for picture, index in zip(shown, (0, 3, 7), strict=True):
        own = [a for a in annotations['annotations'] if a['image_id'] == index]
        expected = [[x, y, x + w, y + h] for x, y, w, h in (a['bbox'] for a in own)]
        assert [box for box, _ in picture.truth] == expected
        assert list(picture.found) == ['teacher', 'plain', 'mmkd, terms off', 'paper', 'mmkd']
        assert [box for box, _, _ in picture.found['teacher']] == expected
        assert all(score >= 0.3 for found in picture.found.values() for _, _, score in found)
        assert (picture.width, picture.height) == (64, 64)


def test_what_cannot_be_drawn_is_a_sentence_and_nothing_in_a_work_folder_is_run(summary, tmp_path):
    """The folder of a comparison may be somebody else's."""
    pictures(tmp_path)
    marker, config = tmp_path / 'marker', Config.fromfile(tmp_path / 'tiny.py')
    runs = []
    for k, label in enumerate(('plain', 'cut', 'hostile', 'pickle', 'gone')):
        folder = tmp_path / label / 'test'
        folder.mkdir(parents=True)
        data = (tmp_path / f'{k}.pth').read_bytes()
        data = {'cut': data[:-300], 'hostile': HOSTILE['os.system'].make(str(marker)),
                'pickle': HOSTILE['bare pickle'].make(str(marker))}.get(label, data)  # fmt: skip
        if label != 'gone':
            (folder / 'detections.pth').write_bytes(data)
        runs.append(SimpleNamespace(key=label, tested_in='test', test_cfg=config))
    plan = SimpleNamespace(rows=[SimpleNamespace(label=run.key, runs=[run]) for run in runs])
    context = SimpleNamespace(directory=lambda run: tmp_path / run.key, work_dir=tmp_path)
    results = {run.key: {} for run in runs}

    comparison._write_report(plan, context, summary, results, 3)
    text = Page((tmp_path / 'report.html').read_text()).text
    for label, why in (('cut', 'is cut off'), ('hostile', r'names \w+\.system'),
                       ('pickle', r'names \w+\.system'), ('gone', 'is not there')):  # fmt: skip
        assert re.search(rf'Not drawn: {label}: .*{why}', text)
    assert 'plain 0 of' in text or 'plain ' in text and 'ground truth' in text

    for image in (tmp_path / 'data').rglob('*.png'):
        image.unlink()
    comparison._write_report(plan, context, summary, results, 3)
    assert 'None: FileNotFoundError' in Page((tmp_path / 'report.html').read_text()).text
    assert not marker.exists()


def test_matching_takes_each_true_box_once_best_score_first():
    truth = [([0, 0, 10, 10], 'a'), ([20, 0, 30, 10], 'b')]
    found = [
        ([0, 0, 10, 9], 'a', 0.5),
        ([0, 0, 10, 10], 'a', 0.9),
        ([20, 0, 30, 10], 'a', 0.8),
        ([20, 0, 30, 4], 'b', 0.7),
    ]
    assert report.match(truth, found) == ([False, True, False, False], [True, False])
    # IoU of exactly one half counts.
    assert report.match(truth, [([20, 0, 30, 5], 'b', 0.7)]) == ([True], [False, True])
    assert report.match([], found[:1]) == ([False], [])


@pytest.mark.parametrize(
    ('low', 'high', 'expected'),
    [(0, 1, [0, 0.25, 0.5, 0.75, 1.0]), (-0.4, 3.1, [-1, 0, 1, 2, 3, 4]), (0, 0, None)],
)
def test_ticks_are_round_and_cover(low, high, expected):
    ticks = charts.ticks(low, high, 4)
    assert ticks[0] <= low and ticks[-1] >= high and ticks[-1] > ticks[0]
    if expected is not None:
        assert ticks == pytest.approx(expected)


def test_curves_of_seeds_are_averaged_where_the_first_has_points():
    curves = [
        {'iter': [10, 20, 30], 'loss': [1.0, None, 3.0]},
        {'iter': [10, 30], 'loss': [3.0, 5.0]},
    ]
    assert charts.mean_curve(curves, 'iter', 'loss') == [(10, 2.0), (30, 4.0)]


KINDS = ('classification', 'localisation', 'both', 'duplicate', 'background', 'missed')


@pytest.fixture
def metrics(summary):
    """Of every run; the student's localisation errors cost 4 to 5 points less."""
    for pair in summary.pairs:
        pair.teacher = 'teacher'
    found = {}
    for k, row in enumerate(summary.rows):
        found[row.label] = {}
        for seed, points in row.by_seed.items():
            errors = dict.fromkeys(KINDS, 0.02 + 0.001 * ((seed or 0) % 2))
            errors['localisation'] = 0.1 if row.label != 'mmkd' else 0.05 + 0.005 * seed
            detail = {
                'AP75': points / 100 - 0.1,
                'AP_small': 0.3 + 0.01 * k,
                'AP_large': None,
                'precision': [max(0.0, 0.9 - i / 100) for i in range(101)],
                'classes': {'crab': points / 100 - 0.2, 'eel': points / 100 + 0.2},
                'class_count': 2,
                'errors': errors,
            }
            found[row.label][seed] = dict(
                mAP=points / 100, AP50=0.8, reported={}, images=8, detail=detail
            )
    return found


def test_page_shows_what_results_hold(summary, metrics):
    page = Page(report.render(summary, {}, metrics=metrics))
    for heading in ('By overlap and size', 'By class', 'Precision and recall', 'kind of errors'):
        assert heading in page.text
    labels = ' '.join(attributes.get('aria-label') or '' for _, attributes in page.tags)
    assert 'mmkd (precision in %, IoU 0.5) over recall. Precision at a recall of 50 %: ' in labels
    assert 'teacher 40 %; mmkd, terms off 40 %; mmkd 40 %' in labels
    assert 'localisation: teacher 10.0, mmkd, terms off 10.0, mmkd 5.5' in labels
    # Of the differences alone, not of results that hold none.
    bare = Page(report.render(summary, {}))
    assert 'Precision and recall' not in bare.text and 'left out' not in bare.text


def test_ap_by_threshold_and_size(summary, metrics):
    head, body = details.threshold_table(summary, metrics)
    assert head == ['network', 'mAP', 'AP50', 'AP75', 'AP small']
    assert body[0] == ['teacher', '63.5', '80.0', '53.5', '30.0']
    assert body[4][0:2] == ['mmkd', '53.5\xa0±\xa00.3']
    # Of results that an earlier version wrote: what the evaluator reported, rounded.
    reported = {'coco/bbox_mAP_75': 0.384, 'coco/bbox_mAP_s': 0.344, 'coco/bbox_mAP_l': -1.0}
    old = {label: {s: dict(m, reported=reported) for s, m in each.items()}
           for label, each in metrics.items()}  # fmt: skip
    for each in old.values():
        for metric in each.values():
            del metric['detail']
    head, body = details.threshold_table(summary, old)
    assert head == ['network', 'mAP', 'AP50', 'AP75', 'AP small']
    assert body[0] == ['teacher', '63.5', '80.0', '38.4', '34.4']


def test_ap_by_class_where_there_is_more_than_one(summary, metrics):
    head, body = details.class_table(summary, metrics)
    assert head[:2] == ['class', 'teacher']
    assert head[-2:] == ['paper − plain', 'mmkd − mmkd, terms off']
    assert [line[0] for line in body] == ['crab', 'eel']
    assert (body[0][1], body[0][-1]) == ('43.5', '+3.1')
    for each in metrics.values():
        for metric in each.values():
            metric['detail']['classes'] = {'crab': 0.5}
    assert details.class_table(summary, metrics) is None


def test_errors_that_the_terms_removed(summary, metrics):
    paper, mmkd = details.error_tables(summary, metrics)
    assert mmkd.sentence == 'With the terms on, these errors cost less: localisation (-4.5).'
    assert paper.sentence == 'No kind of error changed by more than it varies from seed to seed.'
    head, body = mmkd.table
    assert head == ['kind of error', 'teacher', 'mmkd, terms off', 'mmkd', 'change',
                    '95 % interval']  # fmt: skip
    line = next(line for line in body if line[0] == 'localisation')
    assert line == ['localisation', '10.0', '10.0', '5.5', '-4.5', '[-5.7, -3.3]']
    summary.pairs[1].seeds = [1]
    assert 'proves nothing' in details.error_tables(summary, metrics)[1].sentence


def test_what_results_do_not_hold_is_a_sentence_with_the_way_to_get_it(metrics):
    def said(change):
        for metric in metrics['mmkd'].values():
            change(metric)
        return details.left_out(metrics, 'results.jsonl', 'work')

    assert said(lambda metric: None) == []
    (one,) = said(lambda metric: metric['detail'].update(classes=None, class_count=365))
    assert '365 classes are too many' in one
    (_, one) = said(lambda metric: metric['detail'].update(errors_why='KeyError: bbox'))
    assert one == 'kinds of errors are left out: KeyError: bbox'
    (one,) = said(lambda metric: metric.pop('detail'))
    assert 'are left out for mmkd: an earlier mmkd' in one
    assert 'delete the lines of kind "run" of these networks from results.jsonl' in one
    assert 'in work is only tested again' in one


def test_cost_beside_the_teachers(summary):
    teacher, *students = summary.rows
    teacher.params, teacher.gflops, teacher.images_per_second = 5_200_000, 9.0, 10.5
    head, body = details.cost_table(summary)
    assert body == [
        ['teacher', '5.20 M', '9', '10.5'],
        ['; '.join(row.label for row in students), '1.30 M\xa0(25\xa0%)', '4.5\xa0(50\xa0%)',
         '21\xa0(200\xa0%)'],
    ]  # fmt: skip
    assert '25 %' not in Page(report.render(summary, {})).text.split('Numbers')[0]
    summary.pairs[1].teacher = 'teacher'
    assert (
        '53.5 mAP beside 63.5 of the teacher, with 25 % of its parameters, 50 % of its arithmetic, '
        '2 times its speed.'
    ) in Page(report.render(summary, {})).text.split('Numbers')[0]


def test_axes_do_not_magnify_a_tenth_of_a_point(summary):
    summary.pairs[0].verdict = judge([0.1, 0.1, 0.2])
    axis = charts.forest_axis(summary.pairs[:1], 0.5)
    assert (axis.low, axis.high) == (-2, 2)
    for points in ([36.1, 36.2], [0.1, 0.2]):
        curve = {'train': {}, 'val': {'iter': [1, 2], 'mAP': points}}
        (chart,) = charts.log_charts({'mmkd': [curve]})
        assert chart.y.low == 0 and chart.y.high >= 10
    assert charts.bars('', '', {'missed': {'mmkd': 0.1}}).x.high >= 10


def test_names_are_left_off_where_there_is_one_class(tmp_path):
    _, annotations = pictures(tmp_path)
    cfg = Config.fromfile(tmp_path / 'tiny.py')
    cfg.test_dataloader.dataset.metainfo = dict(classes=('red',))
    torch.save({'detections': []}, tmp_path / 'none.pth')
    (picture, *_) = report.collect_pictures(cfg, {'mmkd': tmp_path / 'none.pth'}, 8)
    assert {name for _, name in picture.truth} <= {''}
    box = [4.0, 4.0, 20.0, 20.0]
    picture.truth, picture.found = [(box, '')], {'mmkd': [([30, 30, 50, 50], '', 0.87)]}
    truth, mmkd = report._panels(picture)
    assert [mark.text for mark in truth.marks] == ['']
    assert [(mark.kind, mark.text) for mark in mmkd.marks] == [('wrong', '87'), ('missed', '×')]


def test_every_box_has_a_dark_outline_below_it_and_misses_are_on_top(summary, tmp_path):
    page = Page(report.render(summary, {}, pictures(tmp_path)[0]))
    rects = [a for tag, a in page.tags if tag == 'rect']
    assert len(rects) > 20
    for under, box in zip(rects[::2], rects[1::2], strict=True):
        assert under['class'].split() == ['under', box['class'].split()[1]]
        assert all(under[k] == box[k] for k in ('x', 'y', 'width', 'height'))
    assert any(box['class'] == 'box missed' for box in rects)
    kinds = [mark.kind for picture in pictures(tmp_path)[0] for p in report._panels(picture)[2:]
             for mark in p.marks]  # fmt: skip
    assert 'missed' in kinds and 'wrong' in kinds


def test_tables_scroll_in_themselves(summary, metrics, curves):
    text = report.render(summary, curves, metrics=metrics)
    assert text.count('<table>') == len(re.findall(r'<div class="scroll[^>]*><table>', text)) > 5
    for rule in ('prefers-color-scheme:dark', '@media print', 'max-width:600px'):
        assert rule in text
