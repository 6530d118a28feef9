"""MMEngine's Runner with checks before training, plain checkpoints and exact resume."""

from __future__ import annotations

import contextlib
import os
import os.path as osp
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mmdet.registry import DATASETS
from mmengine.config import Config
from mmengine.dist import is_main_process
from mmengine.hooks import CheckpointHook
from mmengine.registry import RUNNERS
from mmengine.runner import BaseLoop, EpochBasedTrainLoop, IterBasedTrainLoop, Runner
from torch import nn
from torch.utils.data import DataLoader

from ..datasets.annotations import check_annotations, check_evaluator, leaves, require_annotations
from ..datasets.intact_images import IntactImagesHook, require_intact_images
from ..datasets.labels import check_num_classes
from ..datasets.old_spellings import refuse_old_spellings
from ..datasets.two_views import apply_resolution
from ..inference import require_teacher
from ..io import checkpoint as checkpoints
from ..observers import NonFiniteLossError
from ..recipe import MissingFileError, rename_adapters
from ..shipped import command
from .class_names import apply_classes
from .config_files import keep_detector, locate_files, places
from .divergence import DivergedError, DivergenceHook
from .exact_resume import UNSAVED, ResumableCheckpointHook, ResumeHook, latest_checkpoint
from .loader import ResumableLoader
from .memory import OutOfMemoryError, explain, is_out_of_memory
from .plain_checkpoints import FromPlainHook, ToPlainHook
from .processes import LostProcessError, lost_process
from .resume_compatibility import check_loaded_states
from .step_dump import StepDumpHook, image_files
from .summary import SummaryHook
from .training_checks import InputChecksHook, TrainingChecksHook
from .unlabelled import UnlabelledHook, mixed_dataloader, settings_of
from .work_dir import DiskSpaceHook, WorkDirError, WorkDirHook
from .wrappers import optimizers, unwrap


@RUNNERS.register_module()
class DistillationRunner(Runner):
    """A Runner that reads checkpoints safely and writes ones that plain PyTorch can read.

    Args:
        load_from: checkpoint to start from, a path or URL; with ``resume``, the one to resume.
        resume: resume from ``load_from`` or, if that is None, from the last checkpoint in the work
            directory; if there is none, training starts from scratch, with a warning.

    Raises:
        FileNotFoundError: ``load_from`` is a local path and no file is there.
    """

    def __init__(
        self, *args: Any, load_from: str | None = None, resume: bool = False, **kwargs: Any
    ) -> None:
        checkpoints.install()
        # Before the model is built, since loading a teacher takes time.
        if load_from is not None and '://' not in load_from:
            path = osp.expanduser(load_from)
            if not osp.isfile(path):
                tried = ' and '.join(places(kwargs.get('cfg'), load_from))
                what = f'does not exist (looked for {tried})'
                what = 'is a directory: name a file' if osp.isdir(path) else what
                raise FileNotFoundError(
                    f'{"resume" if resume else "load_from"}: checkpoint {load_from} {what}'
                )
        self.resumed_from: str | None = None
        self._resuming: str | None = None
        self._begun_loop: Any = None
        super().__init__(*args, load_from=load_from, resume=resume, **kwargs)
        for name in ('_train_dataloader', '_val_dataloader', '_test_dataloader'):
            setattr(self, name, _resumable(getattr(self, name)))

    @classmethod
    def from_cfg(cls, cfg: Config) -> DistillationRunner:
        """Builds a Runner after :func:`locate_files`, :func:`keep_detector`,
        :func:`apply_resolution` and :func:`apply_classes`."""
        refuse_old_spellings(cfg)
        cfg = keep_detector(locate_files(cfg))
        with _naming_both_places(cfg):
            return super().from_cfg(apply_classes(apply_resolution(cfg)))

    @staticmethod
    def build_dataloader(dataloader: Any, *args: Any, **kwargs: Any) -> DataLoader:
        """Builds a data loader that raises ImageError on images that are not intact.

        Raises:
            ValueError: a data set is empty, or too small for one batch.
        """
        try:
            loader = Runner.build_dataloader(dataloader, *args, **kwargs)
        except ValueError:
            datasets = leaves(dataloader.get('dataset'))
            if not (files := [str(d.get('ann_file')) for d in datasets if _is_empty(d)]):
                raise
            raise ValueError(
                'a data set is empty: filter_cfg or indices remove all of its images, or ann_file '
                f'has none: {", ".join(files)}'
            ) from None
        if hasattr(loader.dataset, '__len__') and not len(loader):
            raise ValueError(
                f'a data set of {len(loader.dataset)} images is too small for a batch: batch_size='
                f'{loader.batch_size}, drop_last={loader.drop_last}'
            )
        require_intact_images(loader.dataset)
        return _resumable(loader)

    def register_hooks(self, default_hooks: Any = None, custom_hooks: Any = None) -> None:
        """Registers the config's hooks and mmkd's.

        mmkd's convert checkpoints first after loading and last before saving, so that all other
        hooks see the real objects and the file contains the plain forms.
        """
        super().register_hooks(default_hooks, custom_hooks)
        self._checkpoints: ResumableCheckpointHook | None = None
        self._steps, self._divergence = StepDumpHook(), DivergenceHook()
        self.register_hook(self._steps, priority='LOWEST')
        self.register_hook(self._divergence)
        self._folders = WorkDirHook()
        first = (self._folders, FromPlainHook(), InputChecksHook(), UnlabelledHook(), SummaryHook())
        for hook in first:
            self.register_hook(hook, priority='HIGHEST')
        for hook in (TrainingChecksHook(), IntactImagesHook(), ToPlainHook()):
            self.register_hook(hook, priority='LOWEST')
        for hook in self.hooks:
            if isinstance(hook, ResumableCheckpointHook):
                self.register_hook(ResumeHook(hook), priority='LOWEST')
                if not hook.out_dir:
                    self.register_hook(DiskSpaceHook(hook.save_optimizer), priority='LOWEST')
                self._checkpoints = hook
                self._folders.when_lost = hook.work_dir_is_lost
                break

    def register_hook(self, hook: Any, priority: Any = None) -> None:
        """Registers a hook; CheckpointHook is replaced by :class:`ResumableCheckpointHook`."""
        stock = ('CheckpointHook', 'mmengine.CheckpointHook', CheckpointHook)
        if isinstance(hook, dict) and hook.get('type') in stock:
            hook = dict(hook, type=ResumableCheckpointHook)
        super().register_hook(hook, priority)

    def train(self) -> nn.Module:
        """Trains.

        On SIGTERM or Ctrl-C the run saves at the end of the iteration and exits with 128 + the
        signal's number; ``--resume`` continues from there.

        Raises:
            TeacherError: before the first step, the teacher's files are missing.
            AnnotationError: before the first step, an annotation file that cannot be used.
            ValueError: before the first step, a head with another number of classes than the data.
            NonFiniteLossError: with the losses, the iteration, the images, and the file in which
                the step was saved.
            DivergedError: the losses have grown beyond all bounds.
            ImageError: an image that is missing, truncated or no image.
            LostProcessError: a data-loader worker, or another process of the job, has ended.
            OutOfMemoryError: with the batch, and what to change.
            WorkDirError: the work directory was deleted; the training was saved to a new one.
            OSError: before or after the first step, no room for a checkpoint in the work directory.
        """
        with _naming_both_places(self.cfg):
            require_teacher(unwrap(self.model))
        check_num_classes(self.cfg)
        if getattr(settings_of(self.model), 'share', 0) < 1:  # else it is not used
            check_annotations(self._train_dataloader, 'train')
        check_annotations(self._val_dataloader, 'val')
        check_evaluator(self._val_evaluator, self._val_dataloader, 'val')
        earlier = None if self._resume else latest_checkpoint(self.work_dir)
        if earlier:
            if self._checkpoints:
                self._checkpoints.earlier = earlier
            self.logger.warning(
                f'{earlier} IS OF AN EARLIER RUN, whose files in this folder will be overwritten: '
                'use --resume to continue that run, or another --work-dir to keep it'
            )
        signals = (
            self._checkpoints.handling_signals() if self._checkpoints else contextlib.nullcontext()
        )
        try:
            with self._explaining_errors(), signals:
                return super().train()
        except WorkDirError as error:
            self.logger.error(error)
            raise
        except Exception as error:
            if self._begun:
                self.logger.error(self._stopped(error))
            raise
        finally:
            for loop in (self._train_loop, self._val_loop):
                if isinstance(loader := getattr(loop, 'dataloader', None), ResumableLoader):
                    loader.end_workers()

    def test(self) -> dict[str, float]:
        """Tests.

        Raises:
            AnnotationError: an annotation file is missing, or the evaluator's is of other images.
            OutOfMemoryError: with what to change.
        """
        require_annotations(self._test_dataloader, 'test')
        check_evaluator(self._test_evaluator, self._test_dataloader, 'test')
        with self._explaining_errors('test_dataloader'):
            return super().test()

    @property
    def _begun(self) -> bool:
        """Whether a step has been trained.

        MMEngine's ``iter`` would build the loop, even again after a failure.
        """
        return isinstance(self._train_loop, BaseLoop) and self._train_loop.iter > 0

    @contextlib.contextmanager
    def _explaining_errors(self, dataloader: str = 'train_dataloader') -> Iterator[None]:
        try:
            yield
        except NonFiniteLossError as error:
            path = self._steps.save(self, unwrap(self.model))
            where = (
                f'{error} at iteration {self.iter + 1} (epoch {self.epoch + 1}), on '
                f'{image_files(self._steps.batch)}. No weight was changed by it. The step was '
                f'saved: `{command("replay")} CONFIG {path}` finds the first module with such '
                'values'
            )
            cause = self._divergence.cause(self)
            if self._divergence.grown:
                raise DivergedError(f'training has diverged. {cause}. Then {where}') from None
            raise NonFiniteLossError(f'{where}. {cause}') from None
        except Exception as error:
            if isinstance(error, RuntimeError) and (lost := lost_process(str(error))):
                raise LostProcessError(lost) from None
            if is_out_of_memory(error):
                if dataloader == 'train_dataloader' and self._begun and not self.model.training:
                    dataloader = 'val_dataloader'
                last = latest_checkpoint(self.work_dir) or self.resumed_from
                batch = self._steps.batch if dataloader == 'train_dataloader' else None
                said = explain(error, self, batch, dataloader, last)
                raise OutOfMemoryError(said) from error
            raise

    def _stopped(self, error: Exception) -> str:
        """A line for the log, which has no traceback: where, why, and how to continue."""
        last = latest_checkpoint(self.work_dir) or self.resumed_from
        # The error of a data-loader worker contains its traceback; the last line is the message.
        said = (str(error).strip().splitlines() or [''])[-1]
        if osp.isfile(osp.join(self.work_dir, UNSAVED)):
            last = None
        on = (
            f'The last checkpoint {last} is complete: fix the cause, and continue from it by the '
            'same command with --resume'
            if last
            else f'No checkpoint is in {self.work_dir}: fix the cause and repeat the command'
        )
        if last and (self._divergence.grown or isinstance(error, DivergedError)):
            on = (
                f'The last checkpoint {last} is complete: begin anew, or from its weights by '
                f'load_from={last} (--resume would keep its learning rate)'
            )
        return (
            f'stopped in iteration {self.iter + 1} (epoch {self.epoch + 1}) by '
            f'{type(error).__name__}: {said}. {on}'
        )

    _train_dataloader: Any
    _train_loop: Any

    def build_train_loop(self, loop: Any) -> Any:
        """Builds the loop with workers whose random state is saved and restored."""
        config = self._train_dataloader
        if isinstance(loop, BaseLoop):
            return super().build_train_loop(loop)
        given = None
        if isinstance(config, dict):
            # The teacher may label images for hours, and what it has labelled is kept.
            hook = self._checkpoints
            with hook.signals_end_at_once() if hook else contextlib.nullcontext():
                given = mixed_dataloader(config, self.model, self.cfg, self.work_dir)
        if self._checkpoints is None:
            self._train_dataloader = given or config
            try:
                return super().build_train_loop(loop)
            finally:
                self._train_dataloader = config
        if given is not None:
            # An iteration-based loop starts the workers when it is built.
            self._train_dataloader = self.build_dataloader(
                given,
                seed=self.seed,
                diff_rank_seed=self._randomness_cfg.get('diff_rank_seed', False),
            )
        loader, path = self._train_dataloader, self._resuming
        if self._resume and not path:
            path = self._load_from or latest_checkpoint(self.work_dir)
        self._begun_loop = None if path else loop
        if isinstance(loader, ResumableLoader):
            # An iteration-based loop iterates it here, before it is known where to resume.
            loader.reports, loader.waits = True, path is not None
        try:
            return super().build_train_loop(loop)
        finally:
            if isinstance(loader, ResumableLoader):
                loader.waits = False
            # scale_lr() reads the batch_size, which a loader with a batch sampler does not have.
            self._train_dataloader = config

    def call_hook(self, fn_name: str, **kwargs: Any) -> None:
        """Calls the hooks; the batches of an epoch that is resumed keep their numbers."""
        if fn_name.endswith('_train_iter') and isinstance(self._train_loop, EpochBasedTrainLoop):
            kwargs['batch_idx'] += getattr(self._train_loop.dataloader, 'begun', 0)
        super().call_hook(fn_name, **kwargs)

    def build_optim_wrapper(self, optim_wrapper: Any) -> Any:
        """Builds it with optimizers that check the state that they load.

        ``paramwise_cfg.custom_keys`` may name adaptation layers as earlier versions did.
        """
        paramwise = isinstance(optim_wrapper, dict) and optim_wrapper.get('paramwise_cfg')
        if paramwise and paramwise.get('custom_keys'):
            keys = dict(paramwise['custom_keys'])
            rename_adapters(keys)
            paramwise = {**paramwise, 'custom_keys': keys}
            optim_wrapper = {**optim_wrapper, 'paramwise_cfg': paramwise}
        built = super().build_optim_wrapper(optim_wrapper)
        for optimizer in optimizers(built):
            check_loaded_states(optimizer)
        return built

    def load_or_resume(self) -> None:
        """Loads or resumes as the constructor's arguments say, once.

        Raises:
            CheckpointError: the last run here saved nothing; its predecessor's checkpoints are
                not resumed by mistake.
            FileNotFoundError: the checkpoint that ``last_checkpoint`` names is gone.
        """
        if self._has_loaded or not self._resume or self._load_from is not None:
            super().load_or_resume()
            return
        path = latest_checkpoint(self.work_dir)
        if path is not None and osp.isfile(osp.join(self.work_dir, UNSAVED)):
            raise checkpoints.CheckpointError(
                f'the last run in {self.work_dir} saved nothing, and {path} is of the run before '
                f'it. To resume that one, name it: --resume {path}; to start the last run again, '
                'leave out --resume'
            )
        if path is None:
            record = osp.join(self.work_dir, 'last_checkpoint')
            named = Path(record).read_text().strip() if osp.isfile(record) else ''
            if named:
                raise FileNotFoundError(
                    f'{record} names {named}, which does not exist, and there is no other '
                    'checkpoint. Name one (--resume PATH), or remove that file to start from '
                    'scratch'
                )
            self.logger.warning(
                f'NOTHING TO RESUME in {self.work_dir}: training starts from scratch'
            )
            return
        self.logger.info(f'resuming from {path}')
        self.resume(path)

    def resume(self, filename: str, *args: Any, **kwargs: Any) -> None:
        """Resumes from a training checkpoint.

        Raises:
            CheckpointError: The file holds weights, but not the state of a training run.
        """
        self._resuming = filename
        if isinstance(self._train_loop, IterBasedTrainLoop) and self._begun_loop is not None:
            self._train_loop = self._begun_loop  # built once more: its samplers have begun
        try:
            super().resume(filename, *args, **kwargs)
        finally:
            self._resuming = None
        self.resumed_from = filename
        if is_main_process() and filename == latest_checkpoint(self.work_dir):
            with contextlib.suppress(FileNotFoundError):
                os.remove(osp.join(self.work_dir, UNSAVED))


@contextlib.contextmanager
def _naming_both_places(cfg: Config) -> Iterator[None]:
    """Adds to the error of a missing teacher that it was looked for beside the config too."""
    try:
        yield
    except MissingFileError as error:
        raise MissingFileError(error.key, error.path, places(cfg, error.path)) from None


def _resumable(loader: Any) -> Any:
    """A plain DataLoader as a :class:`ResumableLoader`; anything else as it is."""
    return ResumableLoader(loader) if type(loader) is DataLoader else loader


def _is_empty(dataset: dict) -> bool:
    """Whether no image is left in a data set; MMEngine's serialization fails on an empty one."""
    try:
        return not len(DATASETS.build({**dataset, 'serialize_data': False}))
    except Exception:  # another fault, which building it as it is reports
        return False
