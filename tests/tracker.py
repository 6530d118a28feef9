"""What users of other distillers wrote, and the test that shows what mmkd does.

``python tests/tracker.py`` writes docs/tracker.md.
"""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
D, F, C, M = (f'test_{n}.py::' for n in ('detector', 'faults', 'check_pair', 'machine_faults'))
R, S, T = 'test_resume.py::', 'test_versions.py::', 'test_tools.py::'
FAULT = F + 'test_a_fault_is_named'
THREADS = """
MMRazor #67, #76, #119, #145, #156, #157, #190, #197, #224, #234, #323, #339, #360, #367, #392,
#396, #548, #571, #582, #592, #594, #603, #613, #619, #620, #631, #650; FGD #9, #11, #35, #36, #48,
#60, #66, #69, #75, #87, #92; ultralytics #19386, #25415; ConsistentTeacher #42; PGD #8;
IntelLabs distiller #347; yolo-distiller #13; Efficient-Computing #95; yolov8 forks #2, #6, #14;
yolov8_Distillation #10, #16; PointDistiller #11; mdistiller #38; MGD #2; PaddleDetection #2837,
#7207, #7954, #8395; YOLOv6 #921, #1062; Fast-nnUNet #1; mmdetection-distiller #5;
lightly-train #449; deit #124; sparseml #1426; d2go #371; knowledge_distillation_caffe #3; aldi #46;
ReviewKD #10; HqWei/Distillation-of-Faster-rcnn #1; MMDetection #1710, #1713, #3090, #3240, #7615,
#10816, #12405, #12433; MMRotate #468; MMEngine #1650, #1655; MMCV #3096, #3310;
onedl-mmdetection #11, #18, #22
"""
"""Every thread that was found."""
STACK = ('MMDetection #12405, #12433; MMEngine #1655, #1650; MMCV #3096, #3310; '
         'onedl-mmdetection #11, #18, #22')  # fmt: skip
OPEN = None
# threads, what was asked, what mmkd does, the test (OPEN: what mmkd does is the reason)
ROWS = [
    ('MMRazor #76, #571, #594, #650, #157; FGD #69, #9', 'a checkpoint of the student alone',
     'it is the plain student, adaptation layers aside',
     T + 'test_each_file_of_a_distilled_run_is_the_plain_students'),
    ('MMRazor #613', "the student's own weights are not loaded",
     'stops: load_from holds not one of the tensors', FAULT + '[load_from of another network]'),
    ('ultralytics #25415', 'an interrupted run spoils its last checkpoint',
     'it is resumed, to the bit', R + 'test_a_distilling_detector_goes_on_in_mid_epoch'),
    ('ConsistentTeacher #42, MMRazor #156', 'export',
     'the published file is a plain detector, for any exporter',
     T + 'test_published_student_loads_strictly_in_plain_mmdetection'),
    ('FGD #75, #36, #48, #35, #60; MMRazor #603', 'the teacher is not loaded',
     'stops: lacks n of m keys', FAULT + '[teacher half loaded]'),
    ('FGD #66, #87', "the backbone's weights are not loaded", 'stops: not one of its tensors',
     FAULT + '[backbone file of another network]'),
    ('FGD #66, #87', 'the same, of another width', 'stops: not one of its tensors',
     FAULT + '[backbone file of another width]'),
    ('FGD #66, #87', 'the same, of the baseline', 'stops: not one of its tensors',
     'test_weight_origins.py::test_a_plain_run_says_it_too[student.]'),
    ('MMRazor #619, #631; PGD #8; IntelLabs distiller #347', 'the student stays at mAP 0',
     'stops: nothing of it would be trained', FAULT + '[student frozen]'),
    ('MMRazor #619, #631; PGD #8; IntelLabs distiller #347', 'the same',
     'stops: it is not in the optimizer', FAULT + '[optimizer without the student]'),
    ('MMRazor #619, #631; PGD #8; IntelLabs distiller #347', 'the same',
     'stops: the learning rate is 0', FAULT + '[learning rate 0]'),
    ('MMRazor #619, #631; PGD #8; IntelLabs distiller #347', 'the same',
     'stops: the learning rate of the student is 0', FAULT + "[the student's learning rate 0]"),
    ('MMRazor #619, #631; PGD #8; IntelLabs distiller #347',
     'the same: validated on classes in another order', 'stops: both orders are named',
     'test_classes.py::test_validation_numbers_classes_as_training_does'),
    ('MMRazor #339; ultralytics #19386; yolov8 forks #2, #6, #14',
     'the distillation loss is never computed, or not in the log',
     'each term is in the losses, and reaches the student',
     D + 'test_a_gradient_arrives_through_every_term'),
    ('MMRazor #339; ultralytics #19386; yolov8 forks #2, #6, #14',
     'a hook that captures nothing', 'stops: the term is dead',
     D + 'test_a_hint_in_a_frozen_stage_is_dead_and_named'),
    ('Efficient-Computing #95', 'the term is 0, for a second flag was needed',
     'a term is on by its own entry', D + 'test_each_term_works_alone[hint]'),
    ('Efficient-Computing #95', 'the term stays at 0', 'named in the log after 50 steps',
     FAULT + '[term at zero]'),
    ('yolo-distiller #13', 'the term is 0 under DDP', 'two processes give the mean gradient',
     'test_distributed.py::test_two_processes_give_the_mean_of_their_gradients[alike]'),
    ('yolov8_Distillation #16', "the teacher's parameters are in the optimizer",
     'they are no part of the student', D + 'test_the_teacher_is_no_part_of_the_student'),
    ('yolov8_Distillation #16', 'the same, put there later', 'stops: is in the optimizer',
     FAULT + '[teacher in the optimizer]'),
    ('PointDistiller #11', 'a published teacher under another version of the code',
     'stops: it finds next to nothing in your images',
     F + 'test_a_teacher_that_does_not_fit_is_named[teacher untrained]'),
    ('PointDistiller #11', 'the same, of other pixels', 'stops: what it was trained with is named',
     F + 'test_a_teacher_that_does_not_fit_is_named[mean]'),
    ('FGD #11, MGD #2, MMRazor #323, PaddleDetection #7954, #8395, YOLOv6 #921',
     'how to weight the losses', 'each share of the gradient is shown before training',
     C + 'test_shares_are_those_of_the_gradients'),
    ('FGD #11, MGD #2, MMRazor #323, PaddleDetection #7954, #8395, YOLOv6 #921',
     'the same', 'share=0.2 finds the weight',
     'test_share.py::test_the_terms_gradient_is_the_share_from_the_first_step_on'),
    ('FGD #11, MGD #2, MMRazor #323, PaddleDetection #7954, #8395, YOLOv6 #921',
     'one term is abnormally large', 'warned about, with a weight',
     F + 'test_the_weight_that_is_named_makes_the_gradients_equal'),
    ('yolov8_Distillation #10', 'compare with your own baseline',
     'it is the same config with every weight 0',
     'test_compare.py::test_baseline_is_the_same_config_with_every_weight_0'),
    ('Fast-nnUNet #1', 'teacher, baseline and distilled in one table', 'tools/compare.py',
     'test_compare.py::test_everything_is_run_once_and_the_table_ends_in_a_word'),
    ('MMRazor #392, #119', 'the loss removed and still below plain', 'off is plain to the bit',
     D + 'test_with_every_term_off_a_run_is_plain_mmdetection_to_the_bit'),
    ('mdistiller #38; PaddleDetection #2837; YOLOv6 #1062; MMRazor #392',
     'does it help at all', 'your own baseline, an interval and a word',
     'test_compare.py::test_word[differences3-BEATS]'),
    ('mdistiller #38; PaddleDetection #2837; YOLOv6 #1062; MMRazor #392',
     'below the undistilled', 'it is said', 'test_compare.py::test_word[differences4-WORSE]'),
    ('PaddleDetection #7207', 'a wrong loss is silently accepted', 'refused by its key',
     'test_bad_input.py::test_a_recipe[another loss for classes]'),
    ('FGD #92', 'parameters and FLOPs of the result', 'tools/check_pair.py tells both networks',
     C + 'test_parameters_and_flops_are_those_of_each_network'),
    ('MMRazor #145', 'learning from the teacher alone: classes and features',
     'hard_weight=0 in both heads, and loss_bbox.loss_weight=0 in theirs: labels change nothing',
     D + 'test_classes_and_features_can_be_learnt_from_the_teacher_alone'),
    ('MMRazor #145', 'learning from the teacher alone: boxes, or images without labels',
     "what the teacher finds stands in for boxes, in the paper's bounded regression too",
     'test_unlabelled.py::test_the_teacher_alone_trains'),
    ('MMRazor #197', 'which module names are there', 'near names are told',
     C + 'test_a_planted_mistake_is_a_no_go[a path that does not exist]'),
    ('MMRazor #548', 'a shipped config does not run', 'every config is built and steps',
     'test_configs.py::test_a_config_is_built_and_steps_once[kd/faster_rcnn_r101_to_r50.py]'),
    ('MMRazor #234; mmdetection-distiller #5; lightly-train #449', 'my own teacher',
     'two configs and a checkpoint', C + 'test_a_new_pair_is_ten_lines_and_a_go'),
    ('MMRazor #234; mmdetection-distiller #5; lightly-train #449', 'any teacher',
     'a matrix of students and teachers',
     'test_pairs.py::test_a_pair_takes_two_steps[Faster R-CNN-DETR-like (DINO)]'),
    ('MMRazor #367, deit #124, PaddleDetection #8395', 'my classes', 'matched by name',
     'test_classes.py::test_classes_are_matched_by_name_in_any_order'),
    ('MMRazor #367, deit #124, PaddleDetection #8395', 'the head has another number of classes',
     'stops before the first step',
     M + 'test_another_number_of_classes_is_named_before_the_first_step[fewer]'),
    ('MMRazor #620, #592, sparseml #1426', 'channels by hand', 'a dry run tells them',
     D + 'test_a_hint_is_the_mean_squared_distance_at_the_named_layers'
     '[backbone[1]-backbone_1-shapes0]'),
    ('MMRazor #190', 'fp16 with adapters', "a step under autocast, on a CPU with mmcv's operators "
     'in float32', D + 'test_a_step_under_autocast_on_a_cpu[dtype0]'),
    ('MMRazor #224', 'activation checkpointing breaks hooks', 'changes nothing where a hint is '
     'heard between the blocks', D + 'test_activation_checkpointing_changes_nothing'),
    ('MMRazor #224', 'the same, where a hint is heard within one', 'stops: the term is dead',
     D + 'test_a_hint_within_activation_checkpointing_is_refused'),
    ('MMRazor #67', 'other pixels for teacher and student: normalisation, channel order',
     'converted', D + 'test_pixels_are_those_of_the_teachers_own_preprocessor[size0]'),
    ('MMRazor #67', 'other transforms: scale', 'distillation.resolution, two views of one place',
     'test_resolution.py::test_both_views_show_one_place[0-2.0-all]'),
    ('MMRazor #67', 'other transforms: a crop, flip or colour of its own',
     "the teacher is asked about the student's boxes, so both see one place in the same colours; "
     'choices of their own are not offered', OPEN),
    ('MMRazor #360', "the teacher's accuracy on my data: boxes found",
     'tools/check_pair.py --data', C + 'test_a_teacher_that_sees_is_a_go'),
    ('MMRazor #360', "the teacher's accuracy on my data: mAP", 'a row in the table of compare.py',
     'test_compare.py::test_everything_is_run_once_and_the_table_ends_in_a_word'),
    ('MMRazor #396', "best-checkpoint mixes up the two networks' metrics",
     "validation and the best checkpoint are the student's alone",
     D + 'test_validation_and_the_best_checkpoint_are_the_students_alone'),
    ('MMRazor #582', 'losses that need the ground truth',
     "the bounded term has the student's own targets",
     D + 'test_the_terms_are_the_equations_over_what_was_heard[fpn]'),
    ('MMRazor #582', "a loss of one's own that needs the ground truth",
     'a loss for the boxes is given it', D
     + 'test_a_box_loss_of_ones_own_is_given_the_ground_truth[rcnn]'),
    ('d2go #371', 'the teacher as its own config', 'one line names it',
     'test_configs.py::test_a_swap_of_either_network_is_one_line'),
    ('knowledge_distillation_caffe #3, aldi #46, ReviewKD #10', 'two sets of boxes',
     "the student's alone", D + 'test_a_teacher_that_is_the_student_gives_the_same_rows_to_the_bit'
     '[fpn]'),
    ('HqWei/Distillation-of-Faster-rcnn #1', 'neck imitation below the baseline',
     'a comparison says so; hints can be standardised, and are a term of their own',
     'test_compare.py::test_word[differences4-WORSE]'),
    ('MMDetection #1713, #3090, #7615', 'two-stage distillation',
     'it is what mmkd is for', D + 'test_the_terms_are_the_equations_over_what_was_heard[fpn]'),
    ('MMRotate #468', 'two-stage distillation of rotated boxes',
     "MMRotate's heads and box coders are not MMDetection's, and none was tried", OPEN),
    (STACK, 'is it dead, which versions go together', 'both stacks are known, and checked',
     S + 'test_the_tested_pins_are_in_range[onedl]'),
    (STACK, 'mmcv._ext is missing', 'named, with the command',
     S + 'test_mmcv_without_ops[given0-mmcv]'),
    (STACK, 'weights_only on resume', "MMEngine's own files are resumed",
     'test_runner.py::test_resume_equals_no_interruption[Runner]'),
    (STACK, 'weights_only on test, without running what is in a file', 'refused at each door',
     'test_doors.py::test_a_hostile_file_is_refused_at_each_door[tools/test.py-os.system]'),
    ('MMDetection #10816', 'a dry run', 'tools/check_pair.py',
     C + 'test_a_pair_that_trains_is_a_go'),
    ('MMDetection #3240; PaddleDetection #7954', 'NaN', 'the run stops, and the step is kept',
     'test_step_dump.py::test_the_run_stops_before_a_weight_is_touched_and_the_step_tells_where'),
    ('MMDetection #1710', 'learning rate scaling', '--auto-scale-lr',
     T + 'test_options_reach_the_optimizer'),
    ('MMDetection #1710', 'learning rate scaling without a batch size to scale from',
     'stops before the first step', T + 'test_auto_scale_lr_needs_the_base_batch_size'),
]  # fmt: skip
ENDS = M + 'test_a_fault_ends_a_run_that_goes_on_once_it_is_mended'
# what happens to the machine, what mmkd does, the test
MACHINE = [
    ('an image vanishes', 'stops by its name', ENDS + '[an image vanishes]'),
    ('a JPEG is cut short', 'stops by its name', ENDS + '[a JPEG is cut short]'),
    ('an image is none', 'stops by its name', ENDS + '[an image is text]'),
    ('a data-loader worker is killed', 'stops, with the usual causes',
     ENDS + '[a worker is killed]'),
    ('a process of a distributed run is killed', 'the others stop, and say that it failed first',
     ENDS + '[the second process is killed]'),
    ('data-loader workers that persist', 'the run ends when it ends',
     M + 'test_a_run_with_persistent_workers_ends'),
    ('a run with data-loader workers is killed', 'they end within seconds, and leave no file',
     R + 'test_a_kill_leaves_no_process_and_no_temporary_file[epoch-fork]'),
    ('work_dir lies under a file', 'stops before a network is built',
     M + 'test_a_work_dir_that_cannot_be_written[file/x-Not a directory]'),
    ('work_dir lies where nothing can be made', 'stops before a network is built',
     M + 'test_a_work_dir_that_cannot_be_written[/proc/x-No such file]'),
    ('more processes than GPUs, or none', 'stops, or says that they work on CPUs',
     M + 'test_more_processes_than_gpus_and_none_at_all'),
    ('the number of GPUs is none', 'stops in one line',
     M + 'test_a_number_of_gpus_that_is_none[two-script0]'),
    *((f'the disk is full at the start: {what}', 'stops in one sentence',
       M + f'test_a_disk_that_is_full_at_the_start[{what}]')
      for what in ('the folder', 'the first bytes', 'the log', 'the config', 'TensorBoard',
                   'the log of the weights')),
    ('no room for the weights of a checkpoint', 'stops before the first step',
     M + 'test_no_room_for_a_checkpoint[the weights]'),
    ('room for the weights, but not for the optimizer', 'stops after the first step',
     M + 'test_no_room_for_a_checkpoint[the optimizer]'),
    ('no room for the weights of the EMA', 'stops after the first step',
     M + 'test_no_room_for_a_checkpoint[EMA]'),
    ('the disk is full when a checkpoint is written', 'what was there stays whole',
     'test_checkpoint.py::test_a_write_that_fails_leaves_the_old_file_whole[fsync]'),
    ('told to end (SIGTERM)', 'saved at the end of the iteration; goes on in mid-epoch',
     R + 'test_told_to_stop_it_saves_and_goes_on_in_mid_epoch[epoch-15]'),
    ('several processes with long steps are told to end', 'saved together, within seconds',
     M + 'test_processes_with_long_steps_stop_together_soon'),
    ('a second Ctrl-C', 'ends at once', R + 'test_a_second_ctrl_c_ends_at_once'),
    ('cut off, with images batched by their shape and workers', 'goes on with the same batches',
     R + 'test_batches_of_one_shape_go_on_where_they_were[iter-True-2]'),
    ('cut off, with a sampler that cannot be put back', 'it is named',
     R + 'test_a_sampler_that_cannot_be_put_back_is_named[True]'),
    ('a work_dir is copied', 'the copy goes on from its own files',
     'test_work_dir.py::test_a_copied_folder_is_gone_on_with_from_its_own_files'),
    ('a run that has saved nothing, in the folder of an earlier one',
     '--resume does not go on from that', 'test_work_dir.py::'
     'test_a_run_that_has_saved_nothing_is_not_gone_on_with_from_the_one_before'),
    ('the last checkpoint is gone', '--resume does not begin anew without a word',
     'test_work_dir.py::test_a_record_of_a_file_that_is_gone_stops'),
    ('a hook switches the pipeline', 'an image that is cut short is still named',
     M + 'test_a_pipeline_that_is_switched_refuses_an_image_that_is_cut_short'),
    ('killed in a validation', 'it is made up for',
     R + 'test_cut_off_in_a_validation_it_is_made_up_for[epoch]'),
    ('resumed on more GPUs, or with another batch size or data',
     'the epoch continues after the same share of it, and it is said',
     'test_resume_compatibility.py::test_an_epoch_of_another_length_is_no_other_epoch'
     '[1-iter_7-20-32-Epoch 2 continues after batch 4 of 10]'),
    ('resumed with another learning rate or schedule', 'the checkpoint decides, and it is said',
     'test_resume_compatibility.py::test_what_the_config_no_longer_decides_is_said'),
    ('resumed with another optimizer', 'refused in one sentence',
     'test_resume_compatibility.py::test_another_optimizer_is_named'
     '[<lambda>-another optimizer than AdamW: one with]'),
    ('resumed from a file that names files of others', 'only those of its own folder are deleted',
     'test_resume_compatibility.py::test_only_its_own_files_are_deleted'),
    ('--resume forgotten', 'said, before anything is written over',
     'test_resume_compatibility.py::test_a_run_without_a_checkpoint_before_its_end_says_so'
     '[epoch-None-None]'),
    ('a second run in the same work_dir', 'refused before anything is written',
     M + 'test_two_runs_in_one_work_dir'),
    ('save_best names a figure that no validation gives', 'stops before the first step',
     'test_save_best.py::test_a_misspelt_name_stops_before_the_first_step'),
    ('annotations changed between the runs of a comparison', 'refused',
     'test_compare.py::test_results_on_other_annotations_are_not_compared'),
    ('detections scored against the annotations of another split', 'stops before the first image',
     'test_tools.py::test_detections_are_not_scored_against_other_images'),
]  # fmt: skip


Q = 'test_silent_faults.py::'
# a set-up or a run that went by without a word elsewhere, what mmkd does, the test
SILENT = [
    ("a distilling detector under MMDetection's own runner, or in a notebook",
     'stops at the first loss, with the lines to write',
     Q + 'test_a_runner_that_checks_nothing_is_stopped_with_the_lines_to_write'),
    ("a training loop of one's own", 'mmkd.guard checks it as the runner does',
     Q + 'test_a_loop_of_ones_own_is_guarded'),
    ("the student is of a detector class of the user's own", 'kept, with its loss and its layers',
     Q + 'test_the_students_own_detector_class_is_kept'),
    ('parts of one training set number their classes in two orders',
     'stops before the first step',
     Q + 'test_parts_of_one_training_set_number_the_classes_alike[<lambda>0]'),
    ('class names only inside a wrapper of data sets', 'found, and matched',
     Q + 'test_class_names_are_found_inside_wrappers[MultiImageMixDataset]'),
    ('photographs with an EXIF turn, annotated unturned', 'warned about, with both ways out',
     Q + 'test_annotations_of_unturned_photographs_are_warned_about[unturned-6]'),
    ('a hook switches the pipeline of a pair with two scales', 'switched at both scales',
     Q + 'test_both_scales_reach_the_pipeline_of_a_hook[distilled]'),
    ('early stopping or a schedule waits for a metric that nobody reports',
     'stops before the first step',
     Q + 'test_a_metric_that_is_waited_for_is_reported[EarlyStoppingHook-bbox_mAP]'),
    ('the config that a run leaves in its folder', 'trains, tests, resumes like the first',
     Q + 'test_the_config_that_a_run_leaves_is_read_again'),
    ('images of one channel', 'trained on', Q + 'test_images_of_one_channel'),
    ('a teacher config of MMDetection 2.x', 'refused, with what to write',
     Q + 'test_a_teacher_config_of_2x_is_told_how_to_become_one_of_3x'),
    ("a student config in MMEngine's new style", 'refused, with another way',
     Q + 'test_a_student_in_the_new_style_is_told_another_way'),
    ('an argument of a loss is misspelt', 'refused, with the nearest name',
     Q + 'test_an_argument_of_a_loss_that_there_is_not_gets_the_nearest[hint]'),
]  # fmt: skip
P, E = 'test_refusals.py::', 'test_endings.py::'
# what is written, what mmkd does, the test
SETUP = [
    ("a pair's paths, started from another folder", 'relative to the config first, as _base_ is',
     P + 'test_paths_are_relative_to_the_config_first'),
    ('a teacher_ckpt that is not there', 'says whose it is, which key, and both places tried',
     P + 'test_a_missing_file_of_the_teachers_names_both_places[teacher_ckpt]'),
    ('a checkpoint of another config, whose class names differ too', 'judged by its weights',
     P + 'test_weights_of_another_config_are_not_blamed_on_class_names'),
    ('class names of another spelling', 'did you mean',
     P + 'test_a_file_of_another_spelling_is_asked_for'),
    ('images of four channels', 'trained', P + 'test_a_pair_of_four_channels_trains'),
    ('ann_file=[...] and other spellings of 2.x', 'told what 3.x writes',
     P + 'test_a_spelling_of_2x_is_told_that_of_3x[ann_file]'),
    ('a start that takes few of its tensors', 'a warning with the counts',
     P + 'test_a_start_that_takes_little_is_warned_about[teacher0-True]'),
    ('memory runs out', 'one sentence: the batch, what is large, --resume',
     E + 'test_out_of_memory_is_one_sentence[2]'),
    ('work_dir is deleted in mid-run', 'saved to a new one, and ends in one sentence',
     E + 'test_a_work_dir_that_is_deleted_ends_in_one_sentence[train-2-3]'),
    ('any exception', 'one error: line, its traceback in the log',
     E + 'test_train_ends_in_one_line_and_the_log_has_the_traceback'),
    ('the advice of check_pair', 'is typed as it stands',
     C + 'test_advice_is_typed_as_it_stands'),
    ('a comparison of students that have learned nothing', 'train longer, not more seeds',
     'test_compare.py::test_networks_that_have_learned_nothing_are_to_be_trained_longer'
     '[1.0-True-seeds0]'),
]  # fmt: skip


def threads(text: str) -> list[str]:
    """``'A #1, #2; B #3'`` as ``['A #1', 'A #2', 'B #3']``."""
    found, owner = [], ''
    for part in re.split('[,;]', ' '.join(text.split())):
        name, number = part.strip().rsplit('#', 1)
        owner = name.strip() or owner
        found.append(f'{owner} #{number}')
    return found


def nodes() -> list[str]:
    """The tests that the tables name."""
    return [row[-1] for row in (*ROWS, *SILENT, *MACHINE, *SETUP) if row[-1] is not OPEN]


def text() -> str:
    def line(*cells: str | None) -> str:
        *said, test = cells
        return f'| {" | ".join(said)} | {"open" if test is OPEN else f"`tests/{test}`"} |'

    lines = [
        '# What users of other distillers ask for', '',
        'Written by `python tests/tracker.py`; do not edit. "open": not met, for the reason that '
        'stands there. [Questions](questions.md) has the answers in words.', '',
        '## Threads', '',
        '| threads | asked | mmkd | test |', '| --- | --- | --- | --- |',
        *(line(*row) for row in ROWS), '',
        '## What went by without a word', '',
        '| set-up or run | mmkd | test |', '| --- | --- | --- |',
        *(line(*row) for row in SILENT), '',
        '## Machine faults', '',
        '| what happens | mmkd | test |', '| --- | --- | --- |',
        *(line(*row) for row in MACHINE), '',
        '## Set-ups and endings', '',
        '| what happens | mmkd | test |', '| --- | --- | --- |',
        *(line(*row) for row in SETUP),
    ]  # fmt: skip
    return '\n'.join(lines) + '\n'


if __name__ == '__main__':
    (ROOT / 'docs/tracker.md').write_text(text())
