"""MMEngine's Runner with checkpoints in plain form and a resume that says what it does."""

from __future__ import annotations

import contextlib
import errno
import gc
import os
import os.path as osp
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.dist import get_rank, get_world_size, is_main_process
from mmengine.hooks import CheckpointHook, EMAHook, Hook
from mmengine.model import is_model_wrapper
from mmengine.optim import OptimWrapperDict
from mmengine.registry import RUNNERS
from mmengine.runner import IterBasedTrainLoop, Runner
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from ..datasets.annotations import check_annotations, check_evaluator, leaves
from ..datasets.intact_images import require_whole_images
from ..datasets.two_views import apply_resolution
from ..io import checkpoint as checkpoints
from ..options.classes import apply_classes, check_labels, check_num_classes, check_same_labels
from .exact_resume import BEGUN, GoOnHook, WholeCheckpointHook, prepare_workers
from .resume_compatibility import check_resumed, guard_optimizer
from .step_dump import NonFiniteLossError, StepHook, images
from .training_guard import GuardHook
from .weight_origins import origins

_PEER = re.compile(
    r'(gloo|NCCL|ProcessGroup).*(connection (closed|reset|refused)|broken pipe|timed out|timeout'
    r'|remote (process|error)|abort)',
    re.IGNORECASE | re.DOTALL,
)
"""What gloo and NCCL say of a process that no longer answers."""
_ADAPTER_KEY = re.compile(r'(module\.)?kd_adapters\.')


@RUNNERS.register_module()
class DistillationRunner(Runner):
    """A Runner whose checkpoints stock PyTorch and MMEngine can read, and that reads them safely.

    Args:
        load_from: checkpoint to start from, a path or URL; with ``resume``, the one to go on from.
        resume: go on from ``load_from`` or, where that is None, from the last checkpoint in the
            work directory; where there is none, training starts from scratch, with a warning.

    Raises:
        FileNotFoundError: ``load_from`` is a local path with no file there.
    """

    def __init__(
        self, *args: Any, load_from: str | None = None, resume: bool = False, **kwargs: Any
    ) -> None:
        checkpoints.install()
        # Before the model is built: a teacher takes its time to load.
        if load_from is not None and '://' not in load_from:
            path = osp.expanduser(load_from)
            if not osp.isfile(path):
                what = 'is a directory: name a file' if osp.isdir(path) else 'does not exist'
                raise FileNotFoundError(
                    f'{"resume" if resume else "load_from"}: checkpoint {load_from} {what}'
                )
        self.resumed_from: str | None = None
        self._resuming: str | None = None
        super().__init__(*args, load_from=load_from, resume=resume, **kwargs)

    @classmethod
    def from_cfg(cls, cfg: Config) -> DistillationRunner:
        """Builds it, with the scales and class names that the rest of the config tells.

        See :func:`apply_resolution` and :func:`apply_classes`.
        """
        return super().from_cfg(apply_classes(apply_resolution(cfg)))

    @staticmethod
    def build_dataloader(dataloader: Any, *args: Any, **kwargs: Any) -> DataLoader:
        """Builds it; an image that is not whole will stop the run by its name."""
        try:
            loader = Runner.build_dataloader(dataloader, *args, **kwargs)
        except ValueError as error:  # of numpy, which is to join the samples
            if 'need at least one array' not in str(error):
                raise
            files = [str(each.get('ann_file')) for each in leaves(dataloader.get('dataset'))]
            raise ValueError(
                'a data set is empty: filter_cfg leaves none of its images, or indices, or '
                f'ann_file has none: {", ".join(files)}'
            ) from None
        if hasattr(loader.dataset, '__len__') and not len(loader):
            raise ValueError(
                f'a data set of {len(loader.dataset)} images gives not one batch: batch_size='
                f'{loader.batch_size}, drop_last={loader.drop_last}'
            )
        require_whole_images(loader.dataset)
        return loader

    def register_hooks(self, default_hooks: Any = None, custom_hooks: Any = None) -> None:
        """Registers the hooks, ours outermost: others see the real objects, the file plain ones."""
        super().register_hooks(default_hooks, custom_hooks)
        self._checkpoints: WholeCheckpointHook | None = None
        self._steps = StepHook()
        self.register_hook(self._steps, priority='LOWEST')
        self.register_hook(FromPlainHook(), priority='HIGHEST')
        self.register_hook(GuardHook(), priority='LOWEST')
        self.register_hook(WholeImagesHook(), priority='LOWEST')
        self.register_hook(ToPlainHook(), priority='LOWEST')
        for hook in self.hooks:
            if isinstance(hook, WholeCheckpointHook):
                self.register_hook(GoOnHook(hook), priority='LOWEST')
                if not hook.out_dir:
                    self.register_hook(RoomHook(hook.save_optimizer), priority='LOWEST')
                self._checkpoints = hook
                break

    def register_hook(self, hook: Any, priority: Any = None) -> None:
        """Registers a hook; MMEngine's CheckpointHook becomes :class:`WholeCheckpointHook`."""
        stock = ('CheckpointHook', 'mmengine.CheckpointHook', CheckpointHook)
        if isinstance(hook, dict) and hook.get('type') in stock:
            hook = dict(hook, type=WholeCheckpointHook)
        super().register_hook(hook, priority)

    def train(self) -> nn.Module:
        """Trains; a step whose loss is not finite is kept before the run stops.

        SIGTERM and Ctrl-C save at the end of the iteration and leave with 128 + the signal's
        number; ``--resume`` goes on there.

        Raises:
            AnnotationError: before the first step, an annotation file that cannot be used.
            ValueError: before the first step, a head with another number of classes than the data.
            NonFiniteLossError: with the losses, the iteration, the images, and how to look at it.
            ImageError: an image that is gone, cut short or no image.
            LostProcessError: a data-loader worker, or another process of the job, has ended.
            OSError: before or after the first step, no room for a checkpoint in the work directory.
        """
        check_num_classes(self.cfg)
        check_annotations(self._train_dataloader, 'train')
        check_annotations(self._val_dataloader, 'val')
        check_evaluator(self._val_evaluator, self._val_dataloader, 'val')
        earlier = None if self._resume else latest_checkpoint(self.work_dir)
        if earlier:
            if self._checkpoints:
                self._checkpoints.earlier = earlier
            self.logger.warning(
                f'{earlier} IS OF AN EARLIER RUN, whose files in this folder this one writes over: '
                'to go on from it use --resume, to keep it another --work-dir'
            )
        heeding = (
            self._checkpoints.heeding_signals() if self._checkpoints else contextlib.nullcontext()
        )
        try:
            with self._naming_the_end(), heeding:
                return super().train()
        except Exception as error:
            if self.iter:
                self.logger.error(self._stopped(error))
            raise
        finally:
            for loop in (self._train_loop, self._val_loop):
                end_workers(getattr(loop, 'dataloader', None))

    def test(self) -> dict[str, float]:
        """Tests.

        Raises:
            AnnotationError: the evaluator has the annotations of other images.
        """
        check_evaluator(self._test_evaluator, self._test_dataloader, 'test')
        return super().test()

    @contextlib.contextmanager
    def _naming_the_end(self) -> Iterator[None]:
        try:
            yield
        except NonFiniteLossError as error:
            path = self._steps.keep(self, _unwrap(self.model))
            raise NonFiniteLossError(
                f'{error} at iteration {self.iter + 1} (epoch {self.epoch + 1}), on '
                f'{images(self._steps.batch)}. No weight was changed by it. The step is kept: '
                f'python tools/replay.py CONFIG {path} says where it begins. Often it is the '
                'learning rate, a box without size, or fp16'
            ) from None
        except RuntimeError as error:
            if lost := lost_process(str(error)):
                raise LostProcessError(lost) from None
            raise

    def _stopped(self, error: Exception) -> str:
        """One line for the log, which has no traceback: where, by what, and how to go on."""
        last = latest_checkpoint(self.work_dir) or self.resumed_from
        # An error in a data-loader worker comes with its traceback: the last line says it.
        said = (str(error).strip().splitlines() or [''])[-1]
        if osp.isfile(osp.join(self.work_dir, BEGUN)):
            last = None
        on = (
            f'Nothing that was saved is lost, {last} is whole: with the cause mended, the same '
            'command with --resume goes on from there'
            if last
            else f'No checkpoint is in {self.work_dir}: mend the cause and run the same again'
        )
        return (
            f'stopped in iteration {self.iter + 1} (epoch {self.epoch + 1}) by '
            f'{type(error).__name__}: {said}. {on}'
        )

    _train_dataloader: Any

    def build_train_loop(self, loop: Any) -> Any:
        """MMEngine's loop, with workers whose random state a resumed run can restore."""
        config = self._train_dataloader
        if self._checkpoints is not None:
            # An iteration-based loop starts them as it is made.
            if isinstance(config, dict):
                self._train_dataloader = self.build_dataloader(
                    config,
                    seed=self.seed,
                    diff_rank_seed=self._randomness_cfg.get('diff_rank_seed', False),
                )
            prepare_workers(self._train_dataloader, tell=True)
            self._checkpoints.data = config
        try:
            return super().build_train_loop(loop)
        finally:
            # scale_lr() reads its batch_size, which a loader with a batch sampler does not know.
            self._train_dataloader = config

    def build_optim_wrapper(self, optim_wrapper: Any) -> Any:
        """MMEngine's; what its optimizers load from a checkpoint is checked."""
        built = super().build_optim_wrapper(optim_wrapper)
        for each in built.values() if isinstance(built, OptimWrapperDict) else [built]:
            guard_optimizer(each.optimizer)
        return built

    def load_or_resume(self) -> None:
        """Loads or resumes as the constructor's arguments say, once."""
        if self._has_loaded or not self._resume or self._load_from is not None:
            super().load_or_resume()
            return
        path = latest_checkpoint(self.work_dir)
        if path is not None and osp.isfile(osp.join(self.work_dir, BEGUN)):
            raise checkpoints.CheckpointError(
                f'the run that was last begun in {self.work_dir} has saved nothing, and {path} is '
                f'of the one before it. To go on from that name it: --resume {path}; to begin '
                'the last one again drop --resume'
            )
        if path is None:
            record = osp.join(self.work_dir, 'last_checkpoint')
            named = Path(record).read_text().strip() if osp.isfile(record) else ''
            if named:
                raise FileNotFoundError(
                    f'{record} names {named}, which does not exist, nor is a checkpoint beside it. '
                    'Name the one to go on from (--resume PATH), or remove that file to begin anew'
                )
            self.logger.warning(
                f'NOTHING TO RESUME in {self.work_dir}: training starts from scratch'
            )
            return
        self.logger.info(f'resuming from {path}')
        self.resume(path)

    def resume(self, filename: str, *args: Any, **kwargs: Any) -> None:
        """Goes on from a training checkpoint.

        Raises:
            CheckpointError: The file holds weights, but not the state of a training run.
        """
        self._resuming = filename
        try:
            super().resume(filename, *args, **kwargs)
        finally:
            self._resuming = None
        self.resumed_from = filename
        if is_main_process() and filename == latest_checkpoint(self.work_dir):
            with contextlib.suppress(FileNotFoundError):
                os.remove(osp.join(self.work_dir, BEGUN))


class LostProcessError(RuntimeError):
    """A process that the run cannot do without has ended."""


def lost_process(said: str) -> str | None:
    """What it means that a data-loader worker, or another process of the job, is gone.

    Args:
        said: PyTorch's words.

    Returns:
        Which process, the usual cause and the way out; None where the words are of something else.
    """
    if worker := re.search(r'DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\) (.*)', said):
        return (
            f'data-loader worker (process {worker[1]}) {worker[2].strip(" .")}. Killed means '
            'mostly that memory ran out (dmesg says so): take fewer num_workers or a smaller '
            'batch_size. A bus error: /dev/shm is full (docker run --shm-size). Else run with '
            'num_workers=0, where an error in a transform shows'
        )
    if get_world_size() > 1 and _PEER.search(said):
        return (
            f'process {get_rank()} of {get_world_size()} lost another one of the job ('
            f'{said.strip().splitlines()[0]}). That one failed first: its own output, or the '
            'root cause that torchrun names, says why (exit code -9 is a kill, mostly for memory)'
        )
    return None


def end_workers(loader: Any) -> None:
    """Let the workers of a data loader end now, while they can still be told to.

    Python sends those that live at its end two SIGTERM at once and waits. A worker passes over the
    first, and two that come together are one to it: the process would wait for ever.

    Args:
        loader: a data loader that may be used again; anything else is passed over.
    """
    if not isinstance(loader, DataLoader) or not loader.num_workers:
        return
    loader._iterator = None
    # A traceback or a loop may hold the iterator, so letting go of it is not enough.
    for each in gc.get_objects():
        if type(each) is _MultiProcessingDataLoaderIter and each._dataset is loader.dataset:
            each._shutdown_workers()


class RoomHook(Hook):
    """What cannot take one checkpoint now cannot take it when it is due, which may be hours away.

    Args:
        save_optimizer: whether its state is a part of each.

    Raises:
        OSError: no room for the weights before the first step, or for all of it behind that step.
    """

    priority = 'LOWEST'

    def __init__(self, save_optimizer: bool = True) -> None:
        self.save_optimizer = save_optimizer
        self.complete = False

    def before_train(self, runner: Runner) -> None:
        """The weights."""
        self._require(runner, 'the weights in each checkpoint take', [])

    def after_train_iter(self, runner: Runner, *args: Any, **kwargs: Any) -> None:
        """The optimizer's state too: before its first step it has none."""
        if self.complete:
            return
        self.complete = True
        found: list[Any] = []
        if self.save_optimizer:
            wrapper = runner.optim_wrapper
            for each in wrapper.values() if isinstance(wrapper, OptimWrapperDict) else [wrapper]:
                found += [v for state in each.optimizer.state.values() for v in state.values()]
        for hook in runner.hooks:
            if isinstance(hook, EMAHook):
                found += hook.ema_model.state_dict().values()
        self._require(runner, 'each checkpoint takes', found)

    def _require(self, runner: Runner, what: str, more: list[Any]) -> None:
        if not is_main_process():
            return
        tensors = [*_unwrap(runner.model).state_dict().values(), *more]
        size = sum(v.nbytes for v in tensors if isinstance(v, Tensor))
        disk = shutil.disk_usage(runner.work_dir)
        if disk.total and disk.free < size:  # some file systems do not tell
            raise OSError(
                errno.ENOSPC,
                f'{disk.free / 2**20:.1f} MiB are free, and {what} {size / 2**20:.1f} MiB',
                runner.work_dir,
            )


class WholeImagesHook(Hook):
    """What loads images may be another than at the start: a hook has switched the pipeline."""

    priority = 'LOWEST'

    def before_train_epoch(self, runner: Runner) -> None:
        """Lets it refuse files that are not whole, too."""
        require_whole_images(getattr(runner.train_loop.dataloader, 'dataset', None))


class FromPlainHook(Hook):
    """After loading, first of all: real objects for plain forms, no adapters that nobody has.

    Before training it logs the model's start-up table, or where a plain model's weights are from.
    """

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Turns the checkpoint's plain forms back, in place."""
        checkpoints.from_plain(checkpoint)
        resuming = getattr(runner, '_resuming', None)
        if resuming is not None:
            check_resumed(checkpoint, resuming, runner, _unwrap(runner.model))
        if not any(key.startswith('kd_adapters.') for key in _unwrap(runner.model).state_dict()):
            _drop_adapters(runner, checkpoint)

    def before_test(self, runner: Runner) -> None:
        """Warns where the names of the classes are not those of their numbers."""
        try:
            check_labels(getattr(runner.test_loop.dataloader, 'dataset', None))
        except ValueError as error:
            runner.logger.warning(
                f'{error}. Unless the detector was trained on a file in the same order, its '
                'classes are scored as others'
            )

    def before_train(self, runner: Runner) -> None:
        """Logs what is about to be trained.

        Raises:
            ValueError: A term is scheduled by epochs, and the loop counts none; the classes of the
                training data are numbered in another order than their names, or than those of
                validation; a file that the config names holds none of the weights.
        """
        model = _unwrap(runner.model)
        data = runner.train_dataloader.dataset
        if hasattr(model, 'terms'):
            check_labels(data)
        check_same_labels(
            data, getattr(getattr(runner.val_loop, 'dataloader', None), 'dataset', None)
        )
        scheduled = [n for n, t in getattr(model, 'terms', {}).items() if t.schedule.by_epoch]
        if scheduled and isinstance(runner.train_loop, IterBasedTrainLoop):
            raise ValueError(
                f'distillation.{scheduled[0]}.schedule has by_epoch=True, but '
                f'{type(runner.train_loop).__name__} counts iterations alone, so the term would '
                'stay where it begins: give begin, warmup and end in iterations, without by_epoch'
            )
        table = getattr(model, 'startup_table', None)
        resumed = getattr(runner, 'resumed_from', None)
        load_from = None if resumed else runner._load_from
        # On all ranks: it may read a checkpoint by URL, which is a collective call.
        if table is not None:
            text = table(load_from=load_from, resumed=resumed)
        else:
            text = 'weights: ' + '; '.join(origins(model, load_from, resumed))
        if is_main_process():
            runner.logger.info(text)


class ToPlainHook(Hook):
    """Before saving, last of all: plain forms for real objects."""

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Puts the checkpoint in plain form; only the outermost dict is changed in place."""
        plain = checkpoints.to_plain(checkpoint)
        checkpoint.clear()
        checkpoint.update(plain)


def latest_checkpoint(work_dir: str) -> str | None:
    """The checkpoint to go on from, or None where there is none.

    MMEngine empties ``last_checkpoint`` before it writes it, and a run killed just then, or moved
    elsewhere since, leaves a file that names nothing: then it is the newest of those beside it.
    """
    record = osp.join(work_dir, 'last_checkpoint')
    if osp.isfile(record):
        with open(record) as file:
            last = file.read().strip()
        named = [last, osp.join(work_dir, osp.basename(last))]
        # In a folder that was copied it names the original's, which has a record beside it.
        if osp.isfile(osp.join(osp.dirname(last), 'last_checkpoint')):
            named.reverse()
        for path in named:
            if osp.isfile(path):
                return path
    if not osp.isdir(work_dir):
        return None
    found = [
        (int(match[1]), match[0])
        for name in os.listdir(work_dir)
        if (match := re.fullmatch(r'(?:epoch|iter)_(\d+)\.pth', name))
    ]
    return osp.join(work_dir, max(found)[1]) if found else None


def _unwrap(model: nn.Module) -> nn.Module:
    return model.module if is_model_wrapper(model) else model


def _drop_adapters(runner: Runner, checkpoint: dict) -> None:
    """Passes over a distilled student's adaptation layers in a model that has none."""
    count = 0
    for state in (
        checkpoint.get('state_dict', checkpoint),
        checkpoint.get('ema_state_dict', {}),
    ):
        for key in [key for key in state if _ADAPTER_KEY.match(key)]:
            del state[key]
            count += 1
    if count:
        runner.logger.info(
            f"{count} tensors of a distilled student's adaptation layers (kd_adapters.*) are "
            'passed over: this model has none'
        )
