"""What users of other distillers wrote, and the test that shows what mmkd does.

``python tests/tracker.py`` writes docs/tracker.md.
"""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
D, F = 'test_detector.py::', 'test_faults.py::'
OPEN = 'open'
# threads, what was asked, what mmkd does, the test (or OPEN: no test is tied to it yet)
ROWS = [
    ('MMRazor #76, #571, #594, #650, #157; FGD #69, #9', 'a checkpoint of the student alone',
     'it is the plain student, adaptation layers aside',
     D + 'test_the_checkpoint_is_the_plain_students_and_the_adapters'),
    ('MMRazor #613', "the student's own weights are not loaded",
     'stops: load_from holds not one of the tensors', F + 'test_a_fault_is_named'),
    ('ultralytics #25415', 'an interrupted run spoils its last checkpoint',
     'it is resumed, to the bit', 'test_resume.py::test_cut_off_and_resumed_equals_never_cut_off'),
    ('ConsistentTeacher #42, MMRazor #156', 'export',
     'the published file is a plain detector, for any exporter',
     'test_tools.py::test_published_student_loads_strictly_in_plain_mmdetection'),
    ('FGD #75, #36, #48, #35, #60; MMRazor #603', 'the teacher is not loaded',
     'stops: lacks n of m keys', D
     + 'test_a_teacher_that_does_not_fit_its_file_is_refused_with_counts_and_names'),
    ('FGD #66, #87', "the backbone's weights are not loaded", 'stops: not one of its tensors',
     F + 'test_a_fault_is_named'),
    ('MMRazor #619, #631; PGD #8; IntelLabs distiller #347', 'the student stays at mAP 0',
     'stops: nothing trainable, not in the optimizer, learning rate 0',
     F + 'test_a_fault_is_named'),
    ('MMRazor #339; ultralytics #19386; yolov8 forks #2, #6, #14; Efficient-Computing #95',
     'the distillation loss is never computed', 'each term reaches the student, or a stop',
     D + 'test_a_gradient_arrives_through_every_term'),
    ('yolo-distiller #13', 'the term is 0 under DDP', 'two processes give the mean gradient',
     'test_distributed.py::test_two_processes_give_the_mean_of_their_gradients'),
    ('yolov8_Distillation #16', "the teacher's parameters are in the optimizer",
     'stops: is in the optimizer', F + 'test_a_fault_is_named'),
    ('PointDistiller #11', 'a published teacher under another version of the code',
     'stops: what the teacher finds in the training images',
     F + 'test_a_teacher_that_does_not_fit_is_named'),
    ('FGD #11, MGD #2, MMRazor #323, PaddleDetection #7954, #8395, YOLOv6 #921',
     'how to weight the losses', 'a dwarfing term is warned about, with a weight',
     F + 'test_a_teacher_that_does_not_fit_is_named'),
    ('yolov8_Distillation #10, Fast-nnUNet #1', 'teacher, baseline and distilled in one table',
     'tools/compare.py',
     'test_compare.py::test_everything_is_run_once_and_the_table_ends_in_a_word'),
    ('MMRazor #392, #119', 'the loss removed and still below plain', 'off is plain to the bit',
     D + 'test_with_every_term_off_a_run_is_plain_mmdetection_to_the_bit'),
    ('MMRazor #197', 'which module names are there', 'near names are told',
     D + 'test_a_hint_that_cannot_be_is_refused_by_name'),
    ('MMRazor #367, deit #124', 'my classes', 'matched by name',
     'test_classes.py::test_classes_are_matched_by_name_in_any_order'),
    ('MMRazor #224', 'activation checkpointing breaks hooks', 'changes nothing',
     D + 'test_activation_checkpointing_changes_nothing'),
    ('MMRazor #190', 'fp16 with adapters', 'works', D + 'test_a_step_under_autocast_on_a_cpu'),
    ('MMRazor #620, #592, sparseml #1426', 'channels by hand', 'a dry run tells them',
     D + 'test_a_hint_is_the_mean_squared_distance_at_the_named_layers'),
    ('knowledge_distillation_caffe #3, aldi #46, ReviewKD #10', 'two sets of boxes',
     "the student's alone", D + 'test_the_terms_are_the_equations_over_what_was_heard'),
    ('MMDetection #12405, #12433; MMEngine #1655, #1650; MMCV #3096, #3310; '
     'onedl-mmdetection #11, #18, #22', 'which versions go together', 'the stack is checked',
     'test_stack.py::test_one_fault_in_upstream'),
    ('mdistiller #38; PaddleDetection #2837; YOLOv6 #1062', 'does it help at all',
     'your own baseline, an interval and a word', 'test_compare.py::test_word'),
    ('PaddleDetection #7207', 'a wrong loss is silently accepted', 'refused by its key',
     'test_bad_input.py::test_any_recipe_builds_or_is_refused_by_its_key'),
    ('FGD #92; MMRazor #145', 'parameters and FLOPs; learning from the teacher alone', '', OPEN),
    ('MMRazor #548', 'a shipped config does not run', 'every config is built and steps',
     'test_configs.py::test_a_config_is_built_and_steps_once'),
    ('MMRazor #234; mmdetection-distiller #5; lightly-train #449', 'any teacher',
     'a matrix of students and teachers', 'test_pairs.py::test_a_pair_takes_two_steps'),
    ('d2go #371', 'the teacher as its own config', 'one line names it',
     'test_configs.py::test_a_swap_of_either_network_is_one_line'),
    ('MMRazor #67, #360, #396, #582', 'transforms, metrics, ground truth', '', OPEN),
    ('HqWei/Distillation-of-Faster-rcnn #1; MMDetection #1713, #3090, #7615; MMRotate #468',
     'two-stage distillation', 'it is what mmkd is for',
     'test_configs.py::test_the_recipe_has_the_papers_values'),
    ('MMDetection #10816', 'a dry run', 'tools/check_pair.py',
     'test_check_pair.py::test_a_pair_that_trains_is_a_go'),
    ('MMDetection #3240', 'NaN', 'the run stops, and the step is kept',
     'test_watch.py::test_the_run_stops_before_a_weight_is_touched_and_the_step_tells_where'),
    ('MMDetection #1710', 'learning rate scaling', '--auto-scale-lr, which asks for the batch size',
     'test_tools.py::test_auto_scale_lr_needs_the_base_batch_size'),
]  # fmt: skip


def text() -> str:
    lines = [
        '# What users of other distillers ask for', '',
        'Written by `python tests/tracker.py`; do not edit. "open": no test is tied to it yet.', '',
        '| threads | asked | mmkd | test |', '| --- | --- | --- | --- |',
    ]  # fmt: skip
    lines += [f'| {a} | {b} | {c} | {d if d == OPEN else f"`tests/{d}`"} |' for a, b, c, d in ROWS]
    return '\n'.join(lines) + '\n'


if __name__ == '__main__':
    (ROOT / 'docs/tracker.md').write_text(text())
