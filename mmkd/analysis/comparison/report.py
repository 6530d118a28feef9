"""The comparison as one HTML file: no network, no script, no framework."""

from __future__ import annotations

import base64
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

import numpy as np
from mmengine.config import Config

from .table import PairSummary, Summary, columns, format_number, interval, pair_columns

SCORE_THRESHOLD = 0.3
IOU_THRESHOLD = 0.5

# Okabe and Ito's colours, which colour-blind readers can tell apart; the second of each pair is for
# dark backgrounds. Dashes repeat the distinction without colour.
_COLOURS = [
    ('#0072b2', '#56b4e9'),
    ('#d55e00', '#ff8c42'),
    ('#00795a', '#2fc79a'),
    ('#a3487f', '#e39ac4'),
    ('#8a6d00', '#f0e442'),
    ('#3a3a3a', '#d0d0d0'),
]
_DASHES = ['', '7 3', '2 3', '9 3 2 3', '4 2', '1 2']
_SIGNS = {'BEATS': '▲', 'WORSE': '▼', 'NO GAIN': '■', 'INCONCLUSIVE': '?'}


@dataclass
class Picture:
    """A test image with the ground truth and what each network found.

    ``truth`` and ``found`` hold boxes as (x1, y1, x2, y2) in pixels of the original image with the
    class's name, ``found`` by network's label with the score.
    """

    name: str
    width: int
    height: int
    data_uri: str
    truth: list[tuple[list[float], str]]
    found: dict[str, list[tuple[list[float], str, float]]]


def collect_pictures(
    cfg: Config,
    detections: Mapping[str, Path],
    count: int,
    threshold: float = SCORE_THRESHOLD,
    longest: int = 640,
) -> list[Picture]:
    """``count`` images at equal distances through the test set, so nobody chose them.

    Args:
        cfg: a test config; its ``test_dataloader.dataset`` gives images and ground truth.
        detections: by network's label, the pickle that ``tools/test.py --out`` wrote.
        threshold: detections below this score are not shown.
        longest: images are scaled down to this many pixels on the longer side; boxes are not.
    """
    import cv2
    from mmdet.registry import DATASETS
    from mmengine.fileio import get
    from mmengine.registry import init_default_scope

    init_default_scope(cfg.get('default_scope', 'mmdet'))
    dataset = DATASETS.build(cfg.test_dataloader.dataset)
    classes = dataset.metainfo['classes']
    by_image: dict[str, dict] = {}
    for label, path in detections.items():
        with open(path, 'rb') as file:
            # Written a moment ago by our own test, and by nobody else.
            by_image[label] = {sample['img_id']: sample for sample in pickle.load(file)}
    pictures = []
    for index in sorted(set(np.linspace(0, len(dataset) - 1, min(count, len(dataset)), dtype=int))):
        info = dataset.get_data_info(int(index))
        raw = np.frombuffer(get(info['img_path']), np.uint8)
        image = cv2.imdecode(raw, cv2.IMREAD_COLOR)
        if image is None:
            raise ValueError(f'{info["img_path"]} is not an image that OpenCV can read')
        height, width = image.shape[:2]
        scale = longest / max(height, width)
        if scale < 1:
            size = (round(width * scale), round(height * scale))
            image = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
        encoded = cv2.imencode('.jpg', image, [cv2.IMWRITE_JPEG_QUALITY, 88])[1].tobytes()
        truth = [
            (list(map(float, instance['bbox'])), classes[instance['bbox_label']])
            for instance in info['instances']
            if not instance.get('ignore_flag')
        ]
        found = {}
        for label, samples in by_image.items():
            if info['img_id'] not in samples:
                continue
            predicted = samples[info['img_id']]['pred_instances']
            rows = zip(
                np.asarray(predicted['bboxes']).tolist(),
                np.asarray(predicted['labels']).tolist(),
                np.asarray(predicted['scores']).tolist(),
                strict=True,
            )
            found[label] = [(box, classes[c], s) for box, c, s in rows if s >= threshold]
        uri = 'data:image/jpeg;base64,' + base64.b64encode(encoded).decode()
        name = Path(info['img_path']).name
        pictures.append(Picture(name, width, height, uri, truth, found))
    return pictures


def match(
    truth: Sequence[tuple[Sequence[float], str]],
    found: Sequence[tuple[Sequence[float], str, float]],
    iou: float = IOU_THRESHOLD,
) -> tuple[list[bool], list[bool]]:
    """Best score first, each detection takes the free box of its class that it overlaps most.

    Returns:
        For each detection whether it is right (IoU of ``iou`` or more), for each true box whether
        it was found.
    """
    right, taken = [False] * len(found), [False] * len(truth)
    for i in sorted(range(len(found)), key=lambda i: -found[i][2]):
        box, name, _ = found[i]
        overlaps = [
            _iou(box, other) if cls == name and not taken[j] else 0.0
            for j, (other, cls) in enumerate(truth)
        ]
        if overlaps and max(overlaps) >= iou:
            right[i] = taken[int(np.argmax(overlaps))] = True
    return right, taken


def _iou(a: Sequence[float], b: Sequence[float]) -> float:
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    area = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1])
    return width * height / (area - width * height)


def render(
    summary: Summary, curves: Mapping[str, list[dict]], pictures: Sequence[Picture] = ()
) -> str:
    """The page.

    Args:
        summary: see :func:`.table.summarise`.
        curves: by row's label, what the trainings logged, one entry per seed
            (:func:`.results.read_curves`).
    """
    trained = [row.label for row in summary.rows if row.role != 'teacher']
    style = {label: i % len(_COLOURS) for i, label in enumerate(trained)}
    seeds = ', '.join(map(str, summary.seeds))
    parts = [
        '<h1>Does distillation help?</h1>',
        f'<p class="lead">Each distilled student against the same config with every distillation '
        f'term off: same start, data, schedule and seed. {escape(summary.split.capitalize())} '
        f'split; seeds {seeds}; mAP in points from 0 to 100.</p>',
        _verdicts(summary),
        '<h2>Numbers</h2>',
        _table(*columns(summary), caption='Mean ± standard deviation over the seeds'),
        '<h2>Differences, same seed against same seed</h2>',
        _forest(summary),
        _table(*pair_columns(summary), caption='Paired differences in mAP and what follows'),
        f'<p>BEATS: the 95&nbsp;% interval (paired t over the seeds) lies above 0. WORSE: it lies '
        f'below. NO GAIN: it contains 0 and ends below {summary.margin:g}, the smallest gain of '
        'interest. INCONCLUSIVE: anything else, and always below three seeds.</p>',
        _by_seed(summary),
    ]
    if summary.notes:
        notes = ''.join(f'<li>{escape(note)}</li>' for note in summary.notes)
        parts.append(f'<h2>Notes</h2><ul>{notes}</ul>')
    parts.append(_curves(curves, style, summary))
    parts.append(_gallery(pictures, summary))
    body = '\n'.join(part for part in parts if part)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<title>Does distillation help?</title><style>{_css()}</style></head>'
        f'<body><main>{body}</main></body></html>\n'
    )


def _verdicts(summary: Summary) -> str:
    cards = []
    for pair in summary.pairs:
        if not pair.own:
            continue
        verdict = pair.verdict
        word = verdict.word if verdict else 'INCONCLUSIVE'
        kind = word.lower().replace(' ', '-')
        cards.append(
            f'<section class="card {kind}"><p class="word"><span aria-hidden="true">'
            f'{_SIGNS[word]}</span> {word}</p><p><strong>{escape(pair.label)}</strong> '
            f'{_sentence(pair)}</p></section>'
        )
    warning = ''
    if len(summary.seeds) < 3:
        warning = (
            f'<p class="warning">n&nbsp;=&nbsp;{len(summary.seeds)}: this proves nothing. Runs '
            'that differ only in their seed differ by more than most gains; three seeds are the '
            'least.</p>'
        )
    return f'<div class="cards">{"".join(cards)}</div>{warning}'


def _sentence(pair: PairSummary) -> str:
    verdict = pair.verdict
    if verdict is None:
        return 'and its baseline have no seed in common yet.'
    text = f'{verdict.mean:+.1f} mAP against its own baseline'
    if verdict.low is not None:
        text += f', 95&nbsp;% interval {interval(verdict)}'
    text += f', n&nbsp;=&nbsp;{verdict.n}: {escape(verdict.why)}.'
    if pair.share is not None:
        text += f' Share of the gap to the teacher: {100 * pair.share:.0f}&nbsp;%.'
    return text


def _table(head: list[str], body: list[list[str]], caption: str) -> str:
    def cell(text: str, first: bool) -> str:
        strong = text.startswith('**')
        text = escape(text.strip('*'))
        if strong:
            text = f'<strong>{text}</strong>'
        return f'<th scope="row">{text}</th>' if first else f'<td>{text}</td>'

    heads = ''.join(f'<th scope="col">{escape(name)}</th>' for name in head)
    rows = ''.join(
        '<tr>' + ''.join(cell(text, i == 0) for i, text in enumerate(line)) + '</tr>'
        for line in body
    )
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(caption)}"><table>'
        f'<caption>{escape(caption)}</caption><thead><tr>{heads}</tr></thead>'
        f'<tbody>{rows}</tbody></table></div>'
    )


def _by_seed(summary: Summary) -> str:
    rows = [row for row in summary.rows if row.role != 'teacher']
    body = [
        [row.label, *(format_number(row.by_seed.get(seed), '.2f') for seed in summary.seeds)]
        for row in rows
    ]
    head = ['network', *(f'seed {seed}' for seed in summary.seeds)]
    return (
        '<details><summary>mAP of every run</summary>'
        f'{_table(head, body, "mAP of every run")}</details>'
    )


def _ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers that cover [low, high]."""
    span = high - low or abs(high) or 1.0
    raw = span / count
    power = 10.0 ** np.floor(np.log10(raw))
    step = power * min((f for f in (1, 2, 2.5, 5, 10) if f * power >= raw * 0.999), default=10)
    first, last = np.floor(low / step + 1e-9), np.ceil(high / step - 1e-9)
    if first == last:
        last += 1
    return [float(i * step) for i in np.arange(first, last + 1)]


def _forest(summary: Summary) -> str:
    pairs = [(pair, pair.verdict) for pair in summary.pairs if pair.verdict is not None]
    if not pairs:
        return ''
    ends = [0.0, summary.margin]
    for _, v in pairs:
        ends += [x for x in (v.mean, v.low, v.high) if x is not None]
    ticks = _ticks(min(ends), max(ends), 6)
    left, width, row = 30, 700, 46
    height = row * len(pairs) + 46

    def x(value: float) -> float:
        return left + (value - ticks[0]) / (ticks[-1] - ticks[0]) * (width - 2 * left)

    out = []
    for tick in ticks:
        out.append(
            f'<line x1="{x(tick):.1f}" x2="{x(tick):.1f}" y1="6" y2="{height - 36}" '
            f'class="{"zero" if abs(tick) < 1e-9 else "grid"}"/>'
            f'<text x="{x(tick):.1f}" y="{height - 22}" text-anchor="middle">'
            f'{tick:+g}</text>'.replace('+0<', '0<')
        )
    out.append(
        f'<line x1="{x(summary.margin):.1f}" x2="{x(summary.margin):.1f}" y1="6" '
        f'y2="{height - 36}" class="margin"/>'
        f'<text x="{width / 2}" y="{height - 4}" text-anchor="middle">difference in mAP points '
        f'(dashed: {summary.margin:g}, the smallest gain of interest)</text>'
    )
    words = []
    for i, (pair, v) in enumerate(pairs):
        y = 14 + i * row
        middle = x(v.mean)
        anchor = 'start' if middle < width * 0.35 else 'end' if middle > width * 0.65 else 'middle'
        name = f'{pair.label} − {pair.reference}: {v.mean:+.1f}'
        out.append(
            f'<text x="{middle:.1f}" y="{y + 6}" text-anchor="{anchor}" class="halo">'
            f'{escape(name)}</text>'
        )
        if v.low is not None and v.high is not None:
            a, b = x(v.low), x(v.high)
            out.append(
                f'<path d="M{a:.1f} {y + 20}H{b:.1f}M{a:.1f} {y + 15}v10M{b:.1f} {y + 15}v10" '
                'class="whisker"/>'
            )
        out.append(f'<circle cx="{middle:.1f}" cy="{y + 20}" r="5" class="dot"/>')
        span = f', interval {v.low:+.1f} to {v.high:+.1f}' if v.low is not None else ''
        words.append(f'{name}{span}')
    label = escape('Paired differences in mAP. ' + '; '.join(words))
    return (
        f'<figure class="wide"><svg viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="{label}">{"".join(out)}</svg></figure>'
    )


def _mean_curve(curves: Sequence[dict], x_name: str, y_name: str) -> list[tuple[float, float]]:
    """Mean over seeds at the first seed's positions."""
    lines = []
    for curve in curves:
        pairs = [
            (a, b)
            for a, b in zip(curve.get(x_name, []), curve.get(y_name, []), strict=False)
            if b is not None
        ]
        if pairs:
            lines.append(np.asarray(pairs, dtype=float))
    if not lines:
        return []
    xs = lines[0][:, 0]
    ys = np.mean([np.interp(xs, line[:, 0], line[:, 1]) for line in lines], axis=0)
    return list(zip(xs.tolist(), ys.tolist(), strict=True))


def _chart(title: str, y_label: str, series: dict[str, list], style: dict[str, int]) -> str:
    points = [p for line in series.values() for p in line]
    width, height, left, right, top, bottom = 460, 250, 54, 24, 12, 40
    x_max = max(p[0] for p in points)
    low, high = min(p[1] for p in points), max(p[1] for p in points)
    # A loss or an mAP is read against 0, unless that would press all lines together.
    low = min(low, 0.0) if low < 0.6 * high else low
    y_ticks = _ticks(low, high, 4)
    x_ticks = [t for t in _ticks(0, x_max, 4) if t <= x_max * 1.001]

    def x(value: float) -> float:
        return left + value / x_max * (width - left - right) if x_max else left

    def y(value: float) -> float:
        share = (value - y_ticks[0]) / (y_ticks[-1] - y_ticks[0])
        return height - bottom - share * (height - top - bottom)

    out = []
    for tick in y_ticks:
        out.append(
            f'<line x1="{left}" x2="{width - right}" y1="{y(tick):.1f}" y2="{y(tick):.1f}" '
            f'class="grid"/><text x="{left - 6}" y="{y(tick) + 4:.1f}" text-anchor="end">'
            f'{tick:.4g}</text>'
        )
    for tick in x_ticks:
        out.append(
            f'<text x="{x(tick):.1f}" y="{height - bottom + 16}" text-anchor="middle">'
            f'{tick:g}</text>'
        )
    out.append(
        f'<text x="{(left + width - right) / 2:.0f}" y="{height - 6}" text-anchor="middle">'
        'iteration</text>'
    )
    ends = []
    for label, line in series.items():
        index = style[label]
        if len(line) == 1:
            out.append(
                f'<circle cx="{x(line[0][0]):.1f}" cy="{y(line[0][1]):.1f}" r="4" class="f{index}">'
                f'<title>{escape(label)}</title></circle>'
            )
        else:
            path = ' '.join(f'{x(a):.1f},{y(b):.1f}' for a, b in line)
            out.append(
                f'<polyline points="{path}" class="line s{index}"><title>{escape(label)}</title>'
                '</polyline>'
            )
        ends.append(f'{label} ends at {line[-1][1]:.3g}')
    description = escape(f'{title} ({y_label}) over iterations: {"; ".join(ends)}')
    return (
        f'<figure><figcaption>{escape(title)} <small>{escape(y_label)}</small></figcaption>'
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{description}">'
        f'{"".join(out)}</svg></figure>'
    )


def _curves(curves: Mapping[str, list[dict]], style: dict[str, int], summary: Summary) -> str:
    curves = {label: of_seeds for label, of_seeds in curves.items() if of_seeds and label in style}
    if not curves:
        return (
            '<h2>Curves</h2><p>None: the trainings left no vis_data/scalars.json, which '
            "MMEngine's LocalVisBackend writes.</p>"
        )
    charts = []
    val = {
        label: _mean_curve([c['val'] for c in of_seeds], 'iter', 'mAP')
        for label, of_seeds in curves.items()
    }
    val = {label: line for label, line in val.items() if line}
    if val:
        charts.append(_chart('mAP', 'points, validation split', val, style))
    entries = [curve['train'] for of_seeds in curves.values() for curve in of_seeds]
    names = {name for entry in entries for name in entry if name != 'iter'}
    for name in sorted(names, key=lambda name: (name != 'loss', name.startswith('loss_kd'), name)):
        series = {
            label: _mean_curve([c['train'] for c in of_seeds], 'iter', name)
            for label, of_seeds in curves.items()
        }
        series = {label: line for label, line in series.items() if line}
        if series:
            kind = 'distillation term, weighted' if name.startswith('loss_kd') else 'loss, weighted'
            charts.append(_chart(name, 'sum of all' if name == 'loss' else kind, series, style))
    legend = ''.join(
        f'<li><svg viewBox="0 0 34 10" width="34" height="10" aria-hidden="true">'
        f'<path d="M0 5H34" class="line s{style[label]}"/></svg> {escape(label)}</li>'
        for label in curves
    )
    return (
        '<h2>Curves</h2><p>Mean over the seeds, each point a mean over some iterations. Hard and '
        'soft labels share one weight in the recipe (equation 2 of the paper), so hard losses of a '
        'distilled student and of its baseline differ in scale too.</p>'
        f'<ul class="legend">{legend}</ul><div class="charts">{"".join(charts)}</div>'
    )


def _boxes(picture: Picture, label: str | None) -> tuple[str, str]:
    """Shapes of one panel, and its caption in words."""
    unit = max(picture.width, picture.height) / 100
    font = 5.2 * unit

    def rectangle(box: Sequence[float], text: str, kind: str) -> str:
        x1, y1, x2, y2 = box
        # Inside the picture, above the box where there is room.
        y_text = y1 - unit if y1 > font + unit else min(y2 + font, picture.height - unit)
        x_text = min(max(x1, 0), picture.width - 0.55 * font * len(text))
        shape = (
            f'<rect x="{x1:.1f}" y="{y1:.1f}" width="{x2 - x1:.1f}" height="{y2 - y1:.1f}" '
            f'class="box {kind}"/>'
        )
        if text:
            shape += (
                f'<text x="{x_text:.1f}" y="{y_text:.1f}" font-size="{font:.1f}" '
                f'class="name {kind}">{escape(text)}</text>'
            )
        return shape

    if label is None:
        shapes = ''.join(rectangle(box, name, 'truth') for box, name in picture.truth)
        count = len(picture.truth)
        return shapes, f'{count} object{"" if count == 1 else "s"}'
    found = picture.found[label]
    right, taken = match(picture.truth, found)
    shapes = ''.join(
        rectangle(box, '', 'missed')
        for (box, _), hit in zip(picture.truth, taken, strict=True)
        if not hit
    )
    for (box, name, value), hit in zip(found, right, strict=True):
        shapes += rectangle(box, f'{name} {100 * value:.0f}', 'right' if hit else 'wrong')
    wrong = len(found) - sum(right)
    return shapes, f'{sum(taken)} of {len(taken)} found, {wrong} wrong'


def _gallery(pictures: Sequence[Picture], summary: Summary) -> str:
    if not pictures:
        return (
            '<h2>Test images</h2><p>None: they are drawn from the folders of the runs, which are '
            'not here.</p>'
        )
    rows = []
    for i, picture in enumerate(pictures):
        panels = []
        for label in (None, *picture.found):
            shapes, words = _boxes(picture, label)
            title = 'ground truth' if label is None else label
            description = escape(f'{picture.name}, {title}: {words}')
            # One copy of the pixels, shown in every panel.
            image = (
                f'<image id="i{i}" href="{picture.data_uri}" width="{picture.width}" '
                f'height="{picture.height}"/>'
                if label is None
                else f'<use href="#i{i}"/>'
            )
            panels.append(
                f'<figure><svg viewBox="0 0 {picture.width} {picture.height}" role="img" '
                f'aria-label="{description}">{image}{shapes}</svg><figcaption><strong>'
                f'{escape(title)}</strong><br>{words}</figcaption></figure>'
            )
        rows.append(f'<h3>{escape(picture.name)}</h3><div class="panels">{"".join(panels)}</div>')
    seed = summary.seeds[0]
    return (
        '<h2>Test images</h2><p>At equal distances through the split, not chosen; students of '
        f'seed {seed}. Detections with a score of {SCORE_THRESHOLD:g} or more, the number is the '
        'score in percent. <span class="key right">solid</span> right class and IoU of '
        f'{IOU_THRESHOLD:g} or more, <span class="key wrong">dashed</span> wrong, '
        '<span class="key missed">dotted</span> an object that was missed.</p>' + ''.join(rows)
    )


def _css() -> str:
    light = ''.join(f'--c{i}:{pair[0]};' for i, pair in enumerate(_COLOURS))
    dark = ''.join(f'--c{i}:{pair[1]};' for i, pair in enumerate(_COLOURS))
    lines = ''.join(
        f'.s{i}{{stroke:var(--c{i});stroke-dasharray:{dash or "none"}}}.f{i}{{fill:var(--c{i})}}'
        for i, dash in enumerate(_DASHES)
    )
    return f"""
:root{{color-scheme:light dark;--bg:#fff;--fg:#1b1f24;--soft:#59636e;--rule:#d5dae0;--panel:#f5f7f9;
--good:#00694d;--bad:#b23a00;--none:#4c5560;--unsure:#7a5a00;{light}}}
@media (prefers-color-scheme:dark){{:root{{--bg:#14171b;--fg:#e6e9ed;--soft:#a2abb5;--rule:#353c45;
--panel:#1d2127;--good:#3ddba8;--bad:#ff9a5c;--none:#b9c1ca;--unsure:#f0cf5a;{dark}}}}}
*{{box-sizing:border-box}}
body{{margin:0;background:var(--bg);color:var(--fg);font:16px/1.5 system-ui,sans-serif}}
main{{max-width:1240px;margin:0 auto;padding:1.5rem 1rem 4rem}}
h1{{font-size:1.7rem;margin:0 0 .3rem}}h2{{font-size:1.25rem;margin:2.4rem 0 .6rem}}
h3{{font-size:.9rem;font-weight:600;color:var(--soft);margin:1.4rem 0 .4rem}}
p,ul{{max-width:80ch}}.lead{{color:var(--soft);margin-top:0}}
.cards{{display:grid;gap:.8rem;
grid-template-columns:repeat(auto-fit,minmax(min(100%,300px),1fr))}}
.card{{background:var(--panel);border-left:6px solid var(--edge);border-radius:6px;
padding:.7rem 1rem}}
.card p{{margin:.2rem 0}}.word{{font-size:1.5rem;font-weight:700;color:var(--edge)}}
.beats{{--edge:var(--good)}}.worse{{--edge:var(--bad)}}.no-gain{{--edge:var(--none)}}
.inconclusive{{--edge:var(--unsure)}}
.warning{{border:2px solid var(--unsure);border-radius:6px;padding:.5rem .8rem;font-weight:600}}
.scroll{{overflow-x:auto}}
table{{border-collapse:collapse;font-size:.9rem;font-variant-numeric:tabular-nums;min-width:100%}}
caption{{text-align:left;color:var(--soft);padding:.2rem 0}}
th,td{{text-align:left;padding:.4rem .7rem;border-bottom:1px solid var(--rule);vertical-align:top}}
thead th{{color:var(--soft);font-weight:600}}tbody th{{font-weight:600}}
td,tbody th{{white-space:nowrap}}td:last-child{{white-space:normal;min-width:7rem}}
details{{margin:.8rem 0}}summary{{cursor:pointer}}
figure{{margin:0}}figcaption{{font-size:.85rem}}figcaption small{{color:var(--soft)}}
svg{{display:block;width:100%;height:auto}}
.wide svg{{min-width:600px;max-width:820px}}.wide{{margin:.5rem 0 1rem;overflow-x:auto}}
.charts{{display:grid;gap:1.2rem;
grid-template-columns:repeat(auto-fill,minmax(min(100%,360px),1fr))}}
.charts figcaption{{font-weight:600}}.charts figcaption small{{font-weight:400}}
.charts text,.wide text{{fill:var(--soft);font-size:13px}}
.grid{{stroke:var(--rule)}}.zero{{stroke:var(--fg);stroke-width:1.5}}
.margin{{stroke:var(--soft);stroke-dasharray:4 4}}
.whisker{{stroke:var(--c0);stroke-width:2.5;fill:none}}.dot{{fill:var(--c0)}}
.wide .halo{{fill:var(--fg);paint-order:stroke;stroke:var(--bg);stroke-width:5px}}
.line{{fill:none;stroke-width:2.2;stroke-linejoin:round}}{lines}
.legend{{list-style:none;display:flex;flex-wrap:wrap;gap:.3rem 1.3rem;padding:0;font-size:.9rem}}
.legend svg{{display:inline-block;width:34px;vertical-align:middle}}
.panels{{display:grid;gap:.7rem;
grid-template-columns:repeat(auto-fit,minmax(min(46%,150px),1fr))}}
.box{{fill:none;stroke-width:2px;vector-effect:non-scaling-stroke}}
.box.truth{{stroke:#fff}}.box.right{{stroke:#4fc3ff}}
.box.wrong{{stroke:#ff8c1a;stroke-dasharray:6 3}}
.box.missed{{stroke:#ff6ad5;stroke-dasharray:2 3}}
.name{{font-family:system-ui,sans-serif;font-weight:700;paint-order:stroke;stroke:#000;
stroke-width:.22em;stroke-linejoin:round}}
.name.truth{{fill:#fff}}.name.right{{fill:#7fd4ff}}.name.wrong{{fill:#ffb066}}
.panels svg{{background:#222;border-radius:3px;overflow:hidden}}
.key{{background:#222;color:#fff;padding:0 .4em;border-radius:3px;font-size:.85em}}
.key.right{{border:2px solid #4fc3ff}}.key.wrong{{border:2px dashed #ff8c1a}}
.key.missed{{border:2px dotted #ff6ad5}}
"""
