"""Labels images with a detector: resumed where it was cut off, shared by all processes, checked.

While it works, each process appends what it finds to a file of its own in the folder
``<out>.<key>.parts``, where the key stands for the detector and its classes; the labels file is
written when all images are done.
"""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import functools
import hashlib
import logging
import os
import os.path as osp
import shutil
import signal
import time
import uuid
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import numpy as np
import torch
from mmdet.structures.bbox import get_box_tensor
from mmengine.config import Config
from mmengine.dataset import Compose, pseudo_collate
from mmengine.device import get_device
from mmengine.dist import (
    all_gather_object,
    barrier,
    broadcast_object_list,
    get_rank,
    get_world_size,
    is_main_process,
)
from mmengine.logging import print_log
from torch.utils.data import DataLoader, Dataset

from ..datasets.intact_images import ImageError, require_intact_images, unreadable
from ..datasets.teacher_labels import (
    Images,
    Labelled,
    Labels,
    LabelsError,
    find_images,
    from_line,
    read_labels,
    to_line,
    write_labels,
)
from ..recipe import TeacherError
from .labeller import DESCRIPTION, MIN_SCORE, Labeller, labeller_of, short_hash
from .random_state import random_state_kept

REPORT_EVERY = 15.0
"""Seconds between two lines of progress."""

T = TypeVar('T')


def label_images(
    cfg: Config,
    images: str | Path | Images,
    out: str | Path,
    *,
    prefix: str | Path | None = None,
    skip_unreadable: bool = False,
    batch_size: int | None = None,
    workers: int = 2,
    labeller: Labeller | None = None,
    keep_others: bool = False,
    check: Callable[[], None] | None = None,
    **options: Any,
) -> Path:
    """Label images, and write the labels file (:mod:`mmkd.datasets.teacher_labels`).

    Labels already in the file are kept if they are by the same detector and the image is unchanged;
    an interrupted job is resumed. All processes of a distributed job have to call it: they share
    the images, and each returns when the file is there. Random numbers are not drawn.

    Args:
        cfg: of a detector, or of a pair, whose teacher then labels.
        images: a folder, a COCO file, or what :func:`find_images` returns.
        out: the labels file, ``.json``.
        prefix: see :func:`find_images`.
        skip_unreadable: leave out images that cannot be read; they are named in the file.
        batch_size: images that the detector sees at once; None: as the config's test does.
        workers: processes that load images, for each process of the job.
        labeller: made before; None: made with ``options`` by :func:`labeller_of`.
        keep_others: whether ``out`` keeps its labels of images that are not among these; else it
            is copied to ``out.previous`` before it loses them.
        check: is called, in each process, before the first image is labelled, if any is to be.

    Returns:
        ``out``.

    Raises:
        LabelsError: no image is there, or some cannot be read; ``out`` is another kind of file.
        TeacherError: the detector cannot be loaded, or its boxes are no numbers.
    """
    out = Path(out)
    if out.suffix != '.json':
        raise LabelsError(f'labels {out}: the name of a labels file ends in .json')
    found = images if isinstance(images, Images) else by_main(lambda: find_images(images, prefix))
    with random_state_kept():
        labeller = labeller or labeller_of(cfg, **options)
        size = batch_size or _batch_size(cfg)
        with _locked(out):
            job = _Job(labeller, found, out, skip_unreadable, keep_others)
            work = by_main(job.plan)
            if work is not None:
                if check is not None and by_main(lambda: job.new):
                    check()
                batches = _batches(len(found), size, work)
                failed = _label(labeller, found, batches, job.parts, workers, len(work))
                parts = all_gather_object(failed, _patient_group())
                failed = {k: v for part in parts for k, v in part.items()}
                by_main(lambda: job.finish(failed))
            barrier(_patient_group())
    if not out.is_file():
        raise LabelsError(
            f'process {get_rank()} does not see {out}, which the first process has written: it '
            'must lie on a disk that all machines of the job share'
        )
    return out


def _batch_size(cfg: Config) -> int:
    return int((cfg.get('test_dataloader') or {}).get('batch_size') or 1)


def _batches(count: int, size: int, work: set[int]) -> list[list[int]]:
    """The batches that have work in them: always the same, for padding depends on the others."""
    every = (list(range(at, min(at + size, count))) for at in range(0, count, size))
    return [batch for batch in every if not work.isdisjoint(batch)]


def by_main(do: Callable[[], T]) -> T:
    """The result of the main process, or its error, in all processes."""
    said: list = [None, None]
    if is_main_process():
        try:
            said[0] = do()
        except Exception as error:
            said[1] = error
    broadcast_object_list(said, group=_patient_group())
    if said[1] is not None:
        raise said[1]
    return said[0]


def _patient_group() -> Any:
    """All processes, which wait for days here: one may have far more to do than another, and those
    of a training give up after minutes."""
    return _group_of(torch.distributed.group.WORLD) if get_world_size() > 1 else None


@functools.lru_cache(maxsize=1)
def _group_of(world: Any) -> Any:
    return torch.distributed.new_group(timeout=datetime.timedelta(days=7))


class _Job:
    """What is known before the work, and how the file is made of it after; in the main process."""

    def __init__(
        self, labeller: Labeller, images: Images, out: Path, skip: bool, keep_others: bool
    ) -> None:
        self.labeller, self.images, self.out, self.skip = labeller, images, out, skip
        self.keep_others, self.others = keep_others, dict[str, Labelled]()
        self.previous, self.loses = Path(f'{out}.previous'), False
        self.new = False
        """Whether there is an image to label that can be read."""
        self.key = _key(labeller)
        self.parts = Path(f'{out}.{short_hash(self.key)[:8]}.parts')

    def plan(self) -> set[int] | None:
        """Numbers of the images that are to be labelled; None if the file is as it has to be."""
        before = self._finished()
        there = before.images if before else {}
        known = {**there, **self._begun()}
        self.kept, changed = {}, 0
        for name, path in zip(self.images.names, self.images.paths, strict=True):
            if name in known:
                same = _if_unchanged(known[name], path)
                changed += same is None
                if same is not None:
                    self.kept[name] = same
        if changed:
            _say(f'{self.out}: {changed} images have changed since and are labelled anew')
        own = set(self.images.names)
        every = known if self.keep_others else there
        self.others = {n: image for n, image in every.items() if n not in own}
        if self.keep_others:
            done = there == {**self.others, **self.kept}
        else:
            done = list(there.items()) == list(self.kept.items())
        if done and not self.loses and list(self.kept) == self.images.names:
            _say(f'{self.out}: all {len(self.kept)} images have been labelled before')
            return None
        work = {i for i, name in enumerate(self.images.names) if name not in self.kept}
        bad = unreadable([self.images.paths[i] for i in work], self.labeller.loads_pictures)
        if bad and not self.skip:
            self._refuse(bad)
        self.new = len(work) > len(bad)
        if self.kept:
            _say(f'{len(self.kept)} of {len(self.images)} images have been labelled before')
        self.parts.mkdir(parents=True, exist_ok=True)
        return work

    def _refuse(self, failed: dict[str, str]) -> NoReturn:
        raise LabelsError(
            f'{len(failed)} of {len(self.images)} images cannot be read: {_first(failed)}. Copy '
            'them again or remove them, or pass them over by --skip-unreadable '
            '(skip_unreadable=True); what has been labelled already is kept'
        )

    def _finished(self) -> Labels | None:
        """The labels file that is there, or was there before another's, if it is of this
        detector."""
        if not self.out.exists():
            return None
        try:
            before = read_labels(self.out)
        except LabelsError as error:
            _require_ours(self.out)
            os.replace(self.out, f'{self.out}.damaged')
            _warn(f'{error}. It is made anew, and is now {self.out}.damaged')
            return None
        if 'teacher_sha256' not in before.info:
            _require_ours(self.out)
        if other := self._differs(before):
            self.loses = True
            _warn(
                f'{self.out} is of another {", ".join(other)}: it is made anew, and kept as '
                f'{self.previous}'
            )
            with contextlib.suppress(LabelsError):
                earlier = read_labels(self.previous)
                if not self._differs(earlier):
                    return earlier
            return None
        foreign = len(set(before.images) - set(self.images.names))
        if 2 * foreign > len(before.images) and not self.keep_others:
            raise LabelsError(
                f'{self.out} has labels of {len(before.images)} images, {foreign} of which are not '
                'among these: name another file, or remove it'
            )
        return before

    def _differs(self, labels: Labels) -> list[str]:
        """What labels of another job depend on, for people."""
        said = {**labels.info, 'classes': labels.classes}
        return [_WORDS[k] for k, v in self.key.items() if said.get(k) != v]

    def _begun(self) -> dict[str, Labelled]:
        """What earlier, unfinished jobs have found; of an image that has changed, the latest."""
        found: dict[str, Labelled] = {}
        damaged = 0
        for path in sorted(self.parts.glob('*.jsonl')):
            for line in filter(None, path.read_bytes().split(b'\n')):
                text = _checked(line)
                damaged += text is None
                if text is not None:
                    image = from_line(text)
                    other = found.get(image.name)
                    if other is None or image.mtime_ns >= other.mtime_ns:
                        found[image.name] = image
        if damaged:
            _say(f'{self.parts}: {damaged} line(s) cut off or damaged, whose images are made anew')
        return found

    def finish(self, failed: dict[str, str]) -> None:
        """Write the file and remove the parts; raises if there are images that were not read."""
        known = {**self._begun(), **self.kept}
        if failed and not self.skip:
            self._refuse(failed)
        missing = [n for n in self.images.names if n not in known and n not in failed]
        if missing:
            raise LabelsError(
                f'{self.parts} lacks {len(missing)} of the images that were labelled, the first is '
                f'{missing[0]}: it must lie on a disk that all machines of the job share'
            )
        every = zip(self.images.ids, self.images.names, strict=True)
        chosen = [(number, name) for number, name in every if name in known]
        if not chosen:
            raise LabelsError(f'none of {len(self.images)} images can be read: {_first(failed)}')
        info = {**self.labeller.info, 'skipped': sorted(failed)}
        found = {name: known[name] for _, name in chosen}
        ids: list | None = [i for i, _ in chosen]
        whole = found
        if self.keep_others and self.others:
            whole, ids = {**self.others, **found}, None
        elif self.others:
            self.loses = True
            _say(
                f'{self.out} has had labels of {len(self.others)} images that are not among these: '
                f'it is kept as {self.previous}'
            )
        if self.loses:
            shutil.copyfile(self.out, f'{self.previous}.new')
        write_labels(self.out, Labels(info, self.labeller.classes, whole), ids)
        if self.loses:
            os.replace(f'{self.previous}.new', self.previous)
        shutil.rmtree(self.parts)
        _say(summary(self.out, list(found.values()), failed))


_WORDS = {
    'teacher_sha256': 'detector', 'config_sha256': 'config', 'classes': 'list of classes',
    'min_score': 'lowest score',
}  # fmt: skip


def _key(labeller: Labeller) -> dict:
    """What labels depend on besides the image."""
    of_info = {k: labeller.info[k] for k in ('teacher_sha256', 'config_sha256', 'min_score')}
    return {**of_info, 'classes': labeller.classes}


def _require_ours(path: Path) -> None:
    """A damaged labels file may be replaced; any other file may not."""
    with open(path, 'rb') as file:
        head = file.read(200).strip(b'\0 \n')
    if head and not head.startswith(f'{{"info": {{"description": "{DESCRIPTION}'.encode()):
        raise LabelsError(
            f'{path} is there and is no labels file of mmkd: it is left as it is; name another file'
        )


def _first(failed: dict[str, str]) -> str:
    shown = [f'{name} ({why})' for name, why in list(failed.items())[:5]]
    return '; '.join(shown) + (f'; and {len(failed) - 5} more' if len(failed) > 5 else '')


def _say(text: str) -> None:
    print_log(text, 'current')


def _warn(text: str) -> None:
    print_log(text, 'current', logging.WARNING)


def summary(out: str | Path, images: Sequence[Labelled], failed: dict[str, str]) -> str:
    """What was found, in a line for the log."""
    at = (MIN_SCORE, 0.3, 0.5, 0.7)
    boxes = [sum(int((image.scores >= t).sum()) for image in images) / len(images) for t in at]
    empty = sum(not (image.scores >= 0.5).any() for image in images)
    said = ', '.join(f'{n:.1f} of at least {t:g}' for n, t in zip(boxes, at, strict=True))
    return (
        f'{out}: {len(images)} images; boxes per image by score: {said}; {empty} images '
        f'({100 * empty / len(images):.0f} %) without one of at least 0.5'
        + (f'; skipped because they cannot be read: {_first(failed)}' if failed else '')
    )


def _if_unchanged(image: Labelled, path: str) -> Labelled | None:
    """The labels of an image, if its file is the same."""
    try:
        now = os.stat(path)
        if now.st_size != image.size:
            return None
        if now.st_mtime_ns == image.mtime_ns:
            return image
        same = hashlib.sha256(Path(path).read_bytes()).hexdigest() == image.sha256
    except OSError:
        return None
    return replace(image, mtime_ns=now.st_mtime_ns) if same else None


# ------------------------------------------------------------------------------ files of the parts


def _checked_line(text: str) -> bytes:
    return f'{zlib.crc32(text.encode()):08x} {text}\n'.encode()


def _checked(line: bytes) -> str | None:
    """The text of a line that :func:`_checked_line` wrote, None if it is not whole."""
    head, _, text = line.partition(b' ')
    return text.decode() if head == b'%08x' % zlib.crc32(text) else None


@contextlib.contextmanager
def _locked(out: Path) -> Iterator[None]:
    """One job at a time works on a file; another waits, and finds it finished."""
    path = Path(f'{out}.lock')
    said = False
    with contextlib.ExitStack() as stack:
        while not by_main(lambda: _try_lock(path, stack)):
            if not said:
                _say(f'another process is labelling for {out}: waiting for it')
            said = True
            time.sleep(2)
        try:
            yield
        finally:
            if is_main_process():
                with contextlib.suppress(OSError):
                    path.unlink()


def _try_lock(path: Path, stack: contextlib.ExitStack) -> bool:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, 'a')  # noqa: SIM115 (closed with the stack)
    except OSError as error:
        raise LabelsError(
            f'labels cannot be written to {path.parent} ({error.strerror}): name another folder'
        ) from None
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not osp.samestat(os.fstat(file.fileno()), os.stat(path)):
            raise BlockingIOError  # of a job that has ended just now
    except (BlockingIOError, PermissionError, FileNotFoundError):
        file.close()
        return False
    except OSError:
        pass  # a file system without locks
    stack.callback(file.close)
    return True


# --------------------------------------------------------------------------------------- detection


class _Files(Dataset):
    """Images as a detector sees them, or why they cannot be read."""

    def __init__(self, images: Images, pipeline: list) -> None:
        self.paths = images.paths
        self.transforms = Compose(pipeline)
        require_intact_images(self.transforms)

    def __getitem__(self, index: int) -> tuple:
        path = self.paths[index]
        try:
            of_file = os.stat(path)
            sha256 = hashlib.sha256(Path(path).read_bytes()).hexdigest()
            data = self.transforms(dict(img_path=path, img_id=index, instances=[]))
            if data is None:
                raise ImageError('the pipeline gives no image')
        except (ImageError, OSError) as error:
            return index, None, getattr(error, 'strerror', None) or str(error)
        return index, (of_file.st_size, of_file.st_mtime_ns, sha256), data


def _ignore_interrupts(worker: int) -> None:
    """Workers ignore Ctrl-C: the process that started them handles it and ends them."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _collate(samples: list[tuple]) -> tuple[list[tuple], Any]:
    data = [each[2] for each in samples if each[1] is not None]
    rest = [(i, of_file, None if of_file else why) for i, of_file, why in samples]
    return rest, pseudo_collate(data) if data else None


@torch.no_grad()
def _label(
    labeller: Labeller,
    images: Images,
    batches: list[list[int]],
    parts: Path,
    workers: int,
    total: int,
) -> dict[str, str]:
    """This process's share of the batches.

    Returns:
        Why images could not be read, by name.
    """
    own = batches[get_rank() :: get_world_size()]
    network = labeller.network.to(get_device())
    network.eval()
    loader: DataLoader = DataLoader(
        _Files(images, labeller.pipeline), batch_sampler=own, num_workers=workers,
        collate_fn=_collate, generator=torch.Generator().manual_seed(0),
        worker_init_fn=_ignore_interrupts,
    )  # fmt: skip
    failed: dict[str, str] = {}
    progress = _Progress(total)
    with open(parts / f'{get_rank():04d}-{uuid.uuid4().hex}.jsonl', 'ab') as file:
        for number, (read, data) in enumerate(loader, 1):
            results = iter(network.test_step(data) if data is not None else ())
            for index, of_file, why in read:
                name = images.names[index]
                if of_file is None:
                    failed[name] = why
                    _warn(f'image {name} cannot be read: {why}')
                else:
                    image = _labelled(labeller, name, of_file, next(results))
                    file.write(_checked_line(to_line(image)))
            file.flush()
            progress.tell(number / len(own))
    return failed


def _labelled(labeller: Labeller, name: str, of_file: tuple, sample: Any) -> Labelled:
    """The detections of an image, within it, in the file's classes."""
    height, width = sample.ori_shape[:2]
    found = sample.pred_instances
    scores = found.scores.float().cpu().numpy().astype(np.float64)
    boxes = get_box_tensor(found.bboxes).float().cpu().numpy().astype(np.float64).reshape(-1, 4)
    teacher, known = labeller.info['teacher'], len(labeller.labels)
    if not (np.isfinite(scores).all() and np.isfinite(boxes).all()):
        raise TeacherError(
            f'{teacher} gives boxes or scores of {name} that are no numbers (NaN or infinite): its '
            'checkpoint is damaged, or was trained with another config'
        )
    if (found.labels >= known).any():
        raise TeacherError(
            f'{teacher} gives class {int(found.labels.max())}, and {known} names are known of its '
            'classes: set metainfo=dict(classes=[...]) of its data sets'
        )
    labels = np.array(labeller.labels)[found.labels.cpu().numpy()]
    scores = scores.round(5)
    boxes = boxes.clip(0, [width, height, width, height])
    boxes[:, 2:] -= boxes[:, :2]
    boxes = boxes.round(3)
    kept = (labels >= 0) & (scores >= labeller.info['min_score']) & (boxes[:, 2:] > 0).all(1)
    kept = np.flatnonzero(kept)
    rows = [
        [*boxes[i].tolist(), int(labels[i]), float(scores[i])]
        for i in kept[np.argsort(-scores[kept], kind='stable')]
    ]
    size, mtime_ns, sha256 = of_file
    return Labelled(name, int(width), int(height), size, mtime_ns, sha256, rows)


class _Progress:
    """Says every few seconds how far the main process is, and how long it will take."""

    def __init__(self, total: int) -> None:
        self.total, self.begin = total, time.monotonic()
        self.last = self.begin

    def tell(self, share: float) -> None:
        now = time.monotonic()
        if now - self.last < REPORT_EVERY or not is_main_process():
            return
        self.last, spent = now, now - self.begin
        left = spent / share - spent
        _say(
            f'labelled {share * self.total:,.0f} of {self.total:,} images ({100 * share:.0f} %), '
            f'{share * self.total / spent:.1f} a second, {_duration(left)} left'
        )


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f'{minutes // 60} h {minutes % 60:02d} min' if minutes >= 60 else f'{minutes} min'
