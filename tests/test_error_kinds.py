"""The kinds of errors and their costs, by hand and beside pycocotools."""

import contextlib
import io

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from mmkd.analysis.comparison.errors import Image, error_costs, judge_image, mean_ap


def image(objects, found, crowds=()):
    """An image of (box, label), (box, label, score) and (box, label)."""

    def columns(rows, count):
        boxes = np.array([row[0] for row in rows], dtype=float).reshape(-1, 4)
        types = (int, float)
        return boxes, *(np.array([row[i + 1] for row in rows], types[i]) for i in range(count - 1))

    boxes, labels, scores = columns(found, 3)
    of_objects, of_crowds = columns(objects, 2), columns(crowds, 2)
    return Image(*of_objects, *of_crowds, boxes, labels, scores)


def at(x, height=10):
    """A box 10 wide at x; two at one place overlap by the share of their heights."""
    return [x, 0, x + 10, height]


def test_each_kind_costs_what_the_paper_says():
    """Two classes, one error of each kind; AP is read at recalls 0, 0.01, ..., 1."""
    objects = [(at(0), 0), (at(20), 0), (at(80), 0), (at(100), 0), (at(40), 1), (at(60), 1)]
    found = [
        (at(0), 0, 0.9),  # right
        (at(0, 6), 0, 0.8),  # found again
        (at(20, 3), 0, 0.7),  # IoU 0.3
        (at(40), 0, 0.6),  # the wrong class
        (at(60, 2), 0, 0.5),  # the wrong class, IoU 0.2
        (at(200), 0, 0.4),  # nothing there
        (at(60), 1, 0.3),  # right
        (at(80), 0, 0.1),  # right
    ]  # and the object at 100 is missed
    kinds, targets = judge_image(image(objects, found))
    assert kinds.tolist() == ['right', 'duplicate', 'localisation', 'classification', 'both',
                              'background', 'right', 'right']  # fmt: skip
    assert targets.tolist() == [0, -1, 1, 4, -1, -1, 5, 2]
    # Class 0: precision 1 up to a recall of 1/4, then 2/7 (the last of seven) up to 1/2.
    now = 26 + 25 * 2 / 7
    fewer = 25 * (2 / 6 - 2 / 7)
    assert error_costs([image(objects, found)]) == pytest.approx(
        {
            # One wrong detection fewer in class 0; class 1 from half of its objects to all.
            'classification': (fewer + 101 - 51) / 202,
            'localisation': (26 + 25 * 2 / 3 + 25 * 3 / 7 - now) / 202,
            'both': fewer / 202,
            'duplicate': fewer / 202,
            'background': fewer / 202,
            # Three objects in class 0: recalls of 1/3 and 2/3.
            'missed': (34 + 33 * 2 / 7 - now) / 202,
        },
        abs=1e-12,
    )


def test_of_two_detections_of_an_object_the_better_score_stays():
    """The mended error comes first, so the wrong one between them costs no longer."""
    objects, wrong = [(at(0), 0)], (at(50), 0, 0.8)
    for score, cost in ((0.9, 0.5), (0.5, 0.0)):
        found = [(at(0, 4), 0, score), wrong, (at(0), 0, 0.7)]
        costs = error_costs([image(objects, found)])
        before = 1 / 3 if score > 0.7 else 1 / 2
        after = 1 if score > 0.7 else 1 / 2
        assert costs['localisation'] == pytest.approx(after - before), (score, cost)


def test_a_detection_in_a_crowd_of_its_class_is_no_error():
    crowd, objects = [([0, 0, 40, 40], 0)], [(at(100), 0)]
    found = [(at(0), 0, 0.9), (at(0), 1, 0.8), (at(100), 0, 0.7)]
    kinds, _ = judge_image(image(objects, found, crowd))
    assert kinds.tolist() == ['ignored', 'background', 'right']
    assert error_costs([image(objects, found, crowd)])['background'] == 0
    assert error_costs([image(objects, found)])['background'] == pytest.approx(0.5)


def test_what_finds_nothing_has_missed_all():
    costs = error_costs([image([(at(0), 0), (at(20), 1)], []), image([], [])])
    assert costs.pop('missed') == 1
    assert set(costs.values()) == {0.0}
    assert set(error_costs([image([], [(at(0), 0, 0.9)])]).values()) == {0.0}


def test_matching_is_that_of_coco():
    """AP50 of random boxes, as pycocotools computes it."""
    rng = np.random.default_rng(0)
    truth, results, images = [], [], []
    for index in range(12):
        boxes = np.round(rng.uniform(0, 50, (7, 4)))
        boxes[:, 2:] = boxes[:, :2] + np.round(rng.uniform(8, 30, (7, 2)))
        labels = rng.integers(0, 3, 7)
        crowd = np.arange(7) == 6
        pick = rng.integers(0, 7, 20)
        found = np.round(boxes[pick] + rng.normal(0, 2, (20, 4)))
        found_labels = np.where(rng.random(20) < 0.8, labels[pick], rng.integers(0, 3, 20))
        scores = rng.permutation(20) / 20 + index / 1000
        images.append(
            Image(boxes[~crowd], labels[~crowd], boxes[crowd], labels[crowd], found, found_labels,
                  scores)
        )  # fmt: skip
        sides = boxes[:, 2:] - boxes[:, :2]
        for box, side, label, many in zip(boxes, sides, labels, crowd, strict=True):
            truth.append(
                dict(id=len(truth) + 1, image_id=index, category_id=int(label), iscrowd=int(many),
                     bbox=[*box[:2], *side], area=float(side.prod()))
            )  # fmt: skip
        for box, label, score in zip(found, found_labels, scores, strict=True):
            results.append(
                dict(image_id=index, category_id=int(label), score=float(score),
                     bbox=[*box[:2], *(box[2:] - box[:2])])
            )  # fmt: skip
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = dict(
            images=[dict(id=i) for i in range(12)],
            categories=[dict(id=i, name=str(i)) for i in range(3)],
            annotations=truth,
        )
        coco.createIndex()
        evaluation = COCOeval(coco, coco.loadRes(results), 'bbox')
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    kinds = np.concatenate([judge_image(each)[0] for each in images])
    kept = kinds != 'ignored'
    assert {'right', 'localisation', 'classification', 'duplicate', 'ignored'} < set(kinds)
    ours = mean_ap(
        np.concatenate([each.scores for each in images])[kept],
        np.concatenate([each.found_labels for each in images])[kept],
        kinds[kept] == 'right',
        np.bincount(np.concatenate([each.labels for each in images])),
    )
    assert ours == pytest.approx(evaluation.stats[1], abs=1e-9)
