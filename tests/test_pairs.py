"""Any two-stage pair: a sample of the matrix that benchmarks/pair_matrix.py writes."""

import pytest
import zoo
from pairs import ROOT
from zoo import CONFIGS, ONE_STAGE, TERMS, outcome, steps, tiny

LEFT_OUT = {
    'Grid': {'rcnn_bbox'},
    'SABL': {'rcnn_bbox'},
    'GA-RPN': {'rpn_cls', 'rpn_bbox'},
    'CrowdDet': {'rcnn_cls', 'rcnn_bbox'},
    'Sparse': {'rpn_cls', 'rpn_bbox', 'rcnn_cls', 'rcnn_bbox'},
    **{name: {'rpn_cls', 'rpn_bbox', 'rcnn_cls', 'rcnn_bbox'} for name in ONE_STAGE},
}
NAMES = list(CONFIGS)


def expected(student, teacher):
    left = LEFT_OUT.get(student, set()) | LEFT_OUT.get(teacher, set())
    return tuple(t for t in TERMS if t not in left)


def diagonal():
    """Each as student of its neighbour in the list, and as teacher of plain Faster R-CNN."""
    shifted = [(name, NAMES[(i + 5) % len(NAMES)]) for i, name in enumerate(NAMES)]
    return shifted + [('Faster R-CNN', name) for name in ONE_STAGE]


@pytest.mark.parametrize(('student', 'teacher'), diagonal())
def test_a_pair_takes_two_steps(student, teacher):
    terms, messages = outcome(student, teacher)
    assert terms == expected(student, teacher), messages
    assert all('turn it off by distillation.' in message for message in messages)


@pytest.mark.parametrize('name', LEFT_OUT)
def test_a_term_that_cannot_work_is_refused_at_construction(name):
    student = 'Faster R-CNN'
    with pytest.raises(ValueError, match='turn it off by distillation'):
        zoo.pairs.build(
            zoo.pairs.distilled(tiny(student), tiny(name), zoo.recipe_for(student, name))
        )


def test_the_matrix_in_the_docs_knows_every_kind():
    """And says of the sample above what the sample shows."""
    lines = (ROOT / 'docs/pairs.md').read_text().splitlines()
    table = [[cell.strip() for cell in line.strip('|').split('|')] for line in lines if '|' in line]
    head = next(row for row in table if row[0].startswith('student'))
    assert head[1:] == NAMES + list(ONE_STAGE)
    rows = {row[0]: dict(zip(head[1:], row[1:], strict=True)) for row in table if row[0] in NAMES}
    assert list(rows) == NAMES
    for student, teacher in diagonal():
        assert rows[student][teacher] == zoo.cell(expected(student, teacher))


def test_a_step_checks_what_it_says():
    """The helper fails where a term is missing, so that the tests above can fail."""
    values = steps('Faster R-CNN', 'Cascade', ('hint',))
    assert {k for k in values if 'kd' in k} == {'loss_kd_hint'}
