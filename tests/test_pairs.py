"""Any two-stage pair: a sample of the matrix that benchmarks/pair_matrix.py writes."""

import pytest
import torch
import zoo
from pairs import ROOT
from zoo import CONFIGS, ONE_STAGE, TERMS, outcome, steps, tiny

LEFT_OUT = {
    'Grid': {'rcnn_bbox'},
    'SABL': {'rcnn_bbox'},
    **{name: {'rpn_cls', 'rpn_bbox'} for name in ('GA-RPN', 'Cascade RPN', 'FCOS RPN')},
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
    assert all('turn it off by model.distillation.' in message for message in messages)


@pytest.mark.parametrize('name', LEFT_OUT)
def test_a_term_that_cannot_work_is_refused_at_construction(name):
    with pytest.raises(ValueError, match='turn it off by model.distillation'):
        zoo.pair('Faster R-CNN', name)


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


def test_each_branch_of_a_trident_student_hears_the_teacher_about_its_own_boxes():
    """The teacher has the student's weights and runs the middle branch, so that one agrees."""
    model = zoo.pair('Trident', 'Trident')
    zoo.settle(model)
    state = {k: v for k, v in model.state_dict().items() if not k.startswith('kd_terms.')}
    model.teacher.network.load_state_dict(state)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
    calls = zoo.pairs.spy(model)
    rois = []
    score = model.teacher.score_rois
    model.teacher.score_rois = lambda *args: rois.append(args[1]) or score(*args)
    zoo.pairs.losses(model, zoo.batch())
    image = rois[0][:, 0].long()
    # Image 0 of the next branch follows image 1 of the one before.
    starts = ((image[1:] == 0) & (image[:-1] == 1)).nonzero().squeeze(1) + 1
    assert len(starts) == 2
    rows = len(calls['rpn_cls'][0][0])
    assert rows % 3 == 0  # the RPN samples as many anchors of each
    for name, (first, end) in (
        ('rpn_cls', (rows // 3, 2 * rows // 3)),
        ('rcnn_cls', starts.tolist()),
    ):
        ours, answers = calls[name][0][:2]
        equal = torch.isclose(ours, answers, rtol=1e-4, atol=1e-5).all(1)
        assert equal[first:end].all(), name
        assert not equal[:first].any(), name
        assert not equal[end:].any(), name


def test_a_trident_student_under_the_common_type_is_refused():
    config = zoo.pairs.distilled(tiny('Trident'), tiny('C4'), zoo.recipe_for('Trident', 'C4'))
    with pytest.raises(ValueError, match="type='mmkd.KnowledgeDistillationTridentFasterRCNN'"):
        zoo.pairs.build(config)
