"""The distilling student of Chen et al., NIPS 2017."""

from __future__ import annotations

import copy
import difflib
import inspect
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from mmdet.models.detectors import TridentFasterRCNN, TwoStageDetector
from mmdet.registry import MODELS
from mmdet.structures import SampleList
from mmengine.logging import MMLogger
from torch import Tensor, nn

from ..engine import gradient_flow as wiring
from ..options.acceleration import Acceleration, laid_out
from ..options.class_map import Answers, ClassMap
from ..options.inherit import Start, inherit
from ..options.resolution import Resolution
from ..options.schedule import WeightSchedule
from ..options.share import GradientShare, gradient_norm
from .adapters import KINDS, build_adapter, resample, set_identity
from .alignment import View
from .anchors import AnchorMatch, described
from .chen2017 import HintL2Loss, TeacherBoundedL2Loss, WeightedSoftCELoss
from .finite import require_finite
from .taps import Question, Record, Recorder
from .teacher import ADAPTER_PREFIX, UNTRAINED, Pixels, Teacher, roi_context

DWARFS = 10.0
"""Share of the hard losses' gradient above which a term is warned about."""
COMPARED = (1, 50, 500)
"""The steps at which it is measured."""
LOG_NAMES = {
    'rpn_cls': 'loss_kd_rpn_cls',
    'rpn_bbox': 'loss_kd_rpn_bbox',
    'rcnn_cls': 'loss_kd_cls',
    'rcnn_bbox': 'loss_kd_bbox',
    'hint': 'loss_kd_hint',
}


# A mixin has no base, but what it is mixed into; a type checker must not look for that here.
Detector: Any = object


DRY_SIZE = 128
"""Side of the image of a dry run, in pixels: a multiple of every stride."""

SCORED_BY = ('stage', 'x', 'rois')
"""What a RoI head may ask for to score RoIs."""


@dataclass
class Term:
    """One distillation term that is on."""

    loss: Any
    schedule: WeightSchedule
    share: GradientShare | None = None

    @property
    def varies(self) -> bool:
        """Whether the weight in force is not always the one in the config."""
        return self.share is not None or self.schedule != WeightSchedule()


@dataclass(frozen=True)
class Layer:
    """One output of a submodule: ``neck[2]`` is the third output of ``neck``."""

    path: str
    index: int

    def __str__(self) -> str:
        return f'{self.path}[{self.index}]'


@dataclass(frozen=True)
class HintPair:
    """A guided layer of the student and the hint layer of the teacher that it learns from."""

    name: str
    student: Layer
    teacher: Layer
    shapes: tuple[tuple[int, ...], tuple[int, ...]]
    strides: tuple[float, float] | None = None


@dataclass(frozen=True)
class Seen:
    """What the teacher made of the batch's pixels.

    Attributes:
        features: of its backbone or neck, where it has to score RoIs.
        anchors: of :meth:`Teacher.score_anchors`, where it has to score anchors.
        view: where its images lie over the student's; None for the same place.
    """

    features: Sequence[Tensor]
    anchors: list[tuple[Tensor, Tensor, tuple[int, int]]]
    view: View | None


class DistillationMixin(Detector):
    """Lets a two-stage detector learn from a teacher; the student *is* the detector.

    Its own training path is MMDetection's, untouched. What its heads were asked to score is heard
    on the way, the teacher answers the same, and the terms of equation (1) join the losses::

        L = L_RPN + L_RCN + γ · L_hint                                              (1)

    Args:
        teacher_config: path of the teacher's config, an ``mmdet::...`` name, or a dict.
        teacher_ckpt: the teacher's checkpoint, a path or URL; ``'random'`` for an untrained one.
        teacher_sha256: the checkpoint's SHA-256, 64 hex digits; another file is refused.
        eval_teacher: only True; the name is MMDetection's.
        distillation: the recipe, see ``configs/_base_/chen2017.py``: the terms ``rpn_cls``,
            ``rpn_bbox``, ``rcnn_cls``, ``rcnn_bbox`` and ``hint``, each a loss with its weight (a
            constant weight of 0 turns it off: it is not built) and optionally a ``schedule``;
            ``start='teacher'`` copies the teacher's neck and heads into the student;
            ``accelerate=dict(dtype='bfloat16')`` runs the teacher cheaper, see
            :class:`mmkd.accelerate.Acceleration`;
            ``resolution=dict(student=(667, 400), teacher=(1333, 800))`` shows the teacher a larger
            image, see :mod:`mmkd.resolution`; ``classes=dict(student=[...], teacher=[...],
            names={'mine': 'theirs'})`` says which class is which where the lists differ
            (DistillationRunner finds the names itself), see :mod:`mmkd.classes`;
            ``check_teacher=False`` leaves out the look at the teacher's own detections before
            training, see :mod:`mmkd.teacher_check`.
        student: the arguments of the detector.

    Raises:
        ValueError: if the recipe, or the pair, cannot be.
        TeacherError: if the teacher cannot be built or loaded completely.
    """

    def __init__(
        self,
        *args: Any,
        teacher_config: str | Path | dict,
        distillation: dict,
        teacher_ckpt: str | None = None,
        teacher_sha256: str | None = None,
        eval_teacher: bool = True,
        **student: Any,
    ) -> None:
        taken = inspect.signature(super().__init__).parameters.values()
        if all(each.kind is not each.VAR_KEYWORD for each in taken):
            if 'bbox_head' in student and 'roi_head' not in student:
                raise ValueError(
                    'model has a bbox_head and no roi_head, so the student is a one-stage '
                    'detector: mmkd distils into two-stage ones, such as faster-rcnn_r50_fpn; '
                    'a one-stage detector can be the teacher'
                )
            ours = ['distillation', 'teacher_config', 'teacher_ckpt', 'teacher_sha256']
            _known('model', student, [*(each.name for each in taken), *ours])
        super().__init__(*args, **student)
        if not eval_teacher:
            raise ValueError(
                'eval_teacher=False is refused: a teacher in training mode changes its BatchNorm '
                'buffers with every batch, so it would not be the network you trained. Remove it'
            )
        recipe = copy.deepcopy(_dict('distillation', distillation))
        start = recipe.pop('start', None)
        if start not in (None, 'teacher'):
            raise ValueError(f"distillation.start={start!r} must be None or 'teacher'")
        self.check_teacher = recipe.pop('check_teacher', True)
        if not isinstance(self.check_teacher, bool):
            raise ValueError(
                f'distillation.check_teacher={self.check_teacher!r} must be True or False'
            )
        settings = ['start', 'resolution', 'classes', 'accelerate', 'check_teacher']
        _known('distillation', recipe, [*LOG_NAMES, *settings])
        accelerate = _dict('distillation.accelerate', recipe.pop('accelerate', None) or {})
        _known('distillation.accelerate', accelerate, [f.name for f in fields(Acceleration)])
        acceleration = Acceleration(**accelerate)
        resolution = Resolution.of(recipe.pop('resolution', None))
        # Where both see one scale there is one image, and nothing to align.
        self.resolution = resolution if resolution and resolution.ratios != (1, 1) else None
        classes = _dict('distillation.classes', recipe.pop('classes', None) or {})
        _known('distillation.classes', classes, ['student', 'teacher', 'names'])
        _check_names(classes)
        self.classes: ClassMap | None = None
        self.answers: list[Answers] = []
        hint = recipe.get('hint')
        pairs = hint.pop('pairs', ['neck']) if isinstance(hint, dict) else []
        _check_pairs(pairs)
        self.terms = {name: term for name in LOG_NAMES if (term := _build_term(recipe, name))}
        self.start: Start | None = None
        self.starts_from_teacher = start == 'teacher'
        # None where nothing is asked of it.
        self.teacher: Teacher = None  # type: ignore[assignment]
        self.recorder = Recorder()
        self.hints: list[HintPair] = []
        # None where the two RPNs have the same anchors at the same places.
        self.anchors: AnchorMatch | None = None
        self.left_out: dict[str, str] = {}
        self.unproven = set(self.terms)
        self.steps, self.dwarfing = 0, set[str]()
        # Hints and the RPN know no classes.
        by_class = start == 'teacher' or any(name.startswith('rcnn_') for name in self.terms)
        if by_class and 'teacher' in classes:
            if 'student' not in classes:
                raise ValueError(
                    'distillation.classes names the classes of the teacher alone: give '
                    'student=[...] too, in the order of its head'
                )
            self.classes = ClassMap(**classes)
        if not self.terms and not self.starts_from_teacher:
            return
        # The student draws the same initial weights as it does without a teacher.
        with torch.random.fork_rng(devices=[]):
            self.teacher = Teacher(teacher_config, teacher_ckpt, acceleration, teacher_sha256)
            if self.terms:
                self._listen(pairs)

    # ---------------------------------------------------------------- one step of training

    def loss(self, batch_inputs: Tensor, batch_data_samples: SampleList) -> dict:
        """MMDetection's losses and the distillation terms, each under its own name.

        Args:
            batch_inputs: images (N, 3, H, W), normalised as the student expects.
            batch_data_samples: their ground truth.

        Returns:
            The losses by name, ``loss_kd_*`` those of the teacher.
        """
        if not self.terms:
            return super().loss(batch_inputs, batch_data_samples)
        factors = {name: term.schedule() for name, term in self.terms.items()}
        if not any(factors.values()) and not self.unproven:
            # Before or after the schedules of all terms: the teacher need not look.
            losses = super().loss(batch_inputs, batch_data_samples)
            return self._join(losses, dict.fromkeys(self.terms, self._nothing()), factors)
        hard_weights = self._hard_weights(factors)
        with self.recorder(hard_weights) as heard, self.teacher.recorder() as said:
            # Before the student's forward, which fills the memory: what the teacher needs of it is
            # then free again, and on a CPU its pages need not be made anew.
            seen = self.ask(batch_inputs, batch_data_samples)
            losses = super().loss(batch_inputs, batch_data_samples)
            terms = self.distil(heard, said, seen, batch_data_samples)
            self._measure(losses, terms, factors)
            self._compare(losses, terms, factors)
        return self._join(losses, terms, factors)

    def _join(self, losses: dict, terms: dict[str, Tensor], factors: dict[str, float]) -> dict:
        """The terms, and what is worth logging of their weights, beside the student's losses."""
        for name, term in self.terms.items():
            factor = factors[name]
            if term.share is not None:
                factor *= term.share.factor(LOG_NAMES[name])
            losses[LOG_NAMES[name]] = factor * terms[name]
            if term.varies:
                log_name = LOG_NAMES[name].replace('loss', 'weight')
                losses[log_name] = terms[name].new_tensor(factor * term.loss.loss_weight)
        return losses

    def _nothing(self) -> Tensor:
        """A zero that depends on the adaptation layers: DDP waits for the gradient of each."""
        zero = next(self.parameters()).new_zeros(())
        adapters = self.kd_adapters.parameters() if 'hint' in self.terms else ()
        return sum((0 * parameter.sum() for parameter in adapters), zero)

    def parse_losses(self, losses: dict) -> tuple[Tensor, dict]:
        """MMEngine's sum; one that is not finite stops here, before it reaches the weights."""
        parsed = super().parse_losses(losses)
        require_finite(*parsed)
        return parsed

    def _measure(self, losses: dict, terms: dict[str, Tensor], factors: dict[str, float]) -> None:
        """The first steps of a term whose weight is a share of the gradient, see GradientShare."""
        wanted = {
            name: term.share
            for name, term in self.terms.items()
            if term.share and factors[name] > 0 and not term.share.done(LOG_NAMES[name])
        }
        if not wanted:
            return
        own = [p for p in self._own() if p.requires_grad]
        hard = _sum(losses)
        norm = gradient_norm(hard, own)
        for name, share in wanted.items():
            share.measure(LOG_NAMES[name], gradient_norm(terms[name], own), norm)

    def _compare(self, losses: dict, terms: dict[str, Tensor], factors: dict[str, float]) -> None:
        """At a few early steps: a term whose gradient dwarfs the hard losses' is named, once.

        It costs one more backward pass for each term at each of these steps, and nothing else.
        """
        self.steps += 1
        if self.steps not in COMPARED or self.teacher.source == UNTRAINED:
            return
        values = {
            name: factors[name] * terms[name]
            for name, term in self.terms.items()
            if term.share is None and name not in self.dwarfing and factors[name] > 0
        }
        hard = _sum(losses)
        own = [p for p in self._own() if p.requires_grad]
        # A reentrant checkpoint cannot be asked for a part of the gradient.
        if not own or wiring.has_checkpoints(hard):
            return
        norm = float(gradient_norm(hard, own))
        for name, value in values.items():
            share = float(gradient_norm(value, own)) / max(norm, 1e-12)
            if share > DWARFS:
                self.dwarfing.add(name)
                weight = self.terms[name].loss.loss_weight
                MMLogger.get_current_instance().warning(
                    f'{LOG_NAMES[name]} dwarfs the hard losses: at step {self.steps} its gradient '
                    f'is {share:.0f} times theirs ({norm:.3g}). Try '
                    f'distillation.{name}.loss_weight={weight / share:.1g} (now {weight:g})'
                )

    def ask(self, batch_inputs: Tensor, batch_data_samples: SampleList) -> Seen:
        """Show the teacher the pixels. What the student makes of RoIs is asked in `distil`."""
        teacher = self.teacher
        teacher.follow(next(self.parameters()))
        pixels, view = self.pixels(batch_inputs, batch_data_samples)
        features = teacher.extract(pixels, self.asks_neck)
        anchors = teacher.score_anchors(features) if self.asks_rpn else []
        return Seen(features if self.asks_rcnn else (), anchors, view)

    def distil(
        self, heard: Record, said: Record, seen: Seen, batch_data_samples: SampleList
    ) -> dict[str, Tensor]:
        """Ask the teacher what the student was asked, and compare the answers."""
        losses: dict[str, Tensor] = {}
        if self.asks_rpn:
            answers, over = seen.anchors, seen.view
            if self.branches > 1:
                answers = [
                    (*(rows.repeat(self.branches, 1) for rows in a[:2]), a[2]) for a in answers
                ]
                over = over and over.repeat(self.branches)
            losses.update(self._distil_rpn(heard, answers, over))
        if self.asks_rcnn:
            losses.update(self._distil_rcnn(heard, seen.features, seen.view))
        if 'hint' in self.terms:
            losses['hint'] = self._distil_hints(heard, said, seen.view)
        if self.unproven:
            self._prove(losses, batch_data_samples)
        # A batch without boxes asks nothing: the term is then a zero that can be logged.
        zero = next(self.parameters()).new_zeros(())
        return {name: losses.get(name, zero) for name in self.terms}

    def _prove(self, losses: dict[str, Tensor], batch_data_samples: SampleList) -> None:
        """At the first step that can show it: no term is dead, see :mod:`mmkd.wiring`."""
        boxes = sum(len(sample.gt_instances) for sample in batch_data_samples)
        for name in sorted(self.unproven):
            loss = losses.get(name)
            if loss is not None:
                wiring.prove(LOG_NAMES[name], loss, self._own())
                self.unproven.remove(name)
            elif name.endswith('_cls') and boxes:
                raise wiring.DeadTermError(
                    f'{LOG_NAMES[name]} is dead: the batch has {boxes} boxes, but the student was '
                    f'not heard to classify anything. {_off(name).capitalize()}'
                )

    @property
    def branches(self) -> int:
        """How many copies of the batch the heads are trained on, one after the other."""
        return getattr(self, 'num_branch', 1)

    def _own(self) -> list[nn.Parameter]:
        """The student's parameters, without adaptation layers."""
        return [p for n, p in self.named_parameters() if not n.startswith(ADAPTER_PREFIX)]

    def _distil_rpn(
        self, heard: Record, answers: list[tuple[Tensor, Tensor, tuple]], view: View | None
    ) -> dict[str, Tensor]:
        """L_RPN: equations (2) to (5) over the anchors that the student's RPN sampled."""
        losses: dict[str, Tensor] = {}
        for column, kind in enumerate(('cls', 'bbox')):
            term = self.terms.get(f'rpn_{kind}')
            asked = heard.questions.get(('rpn', 0, kind))
            if term is None or not asked:
                continue
            pred = torch.cat([q.pred for q in asked])
            target = torch.cat([q.target for q in asked])
            weight = torch.cat([q.weight for q in asked])
            # One in a thousand anchors is sampled; the rest have no weight.
            sampled = (weight if kind == 'cls' else weight.amax(-1)).nonzero().squeeze(1)
            if kind == 'cls':
                # Of a softmax RPN the foreground is column 0; the difference is its sigmoid logit.
                answers = [(_binary(a[0], asked[0].pred.size(1)), *a[1:]) for a in answers]
            if self.anchors is None:
                _same_rows([q.pred for q in asked], [a[column] for a in answers])
                answer = torch.cat([a[column] for a in answers])[sampled]
            else:
                sampled, answer = self._look_up(heard, answers, sampled, kind, view)
            loss_module = getattr(self.rpn_head, f'loss_{kind}')
            question = (pred[sampled], answer)
            if kind == 'cls':
                sigmoid = self.rpn_head.use_sigmoid_cls
                value = term.loss(*question, weight[sampled], asked[0].avg_factor, sigmoid)
            else:
                value = term.loss(*question, target[sampled], weight[sampled], asked[0].avg_factor)
            losses[f'rpn_{kind}'] = loss_module.loss_weight * value
        return losses

    def _look_up(
        self, heard: Record, answers: list, sampled: Tensor, kind: str, view: View | None
    ) -> tuple[Tensor, Tensor]:
        """The sampled anchors that the teacher has too, and its answers, in the student's frame."""
        match: Any = self.anchors
        own_coder, coder = self.rpn_head.bbox_coder, self.teacher.network.rpn_head.bbox_coder
        theirs = torch.cat([a[kind == 'bbox'] for a in answers])
        sizes = [size for *_, size in answers]
        # A level of the student has N · H · W · A rows.
        images = len(heard.questions['rpn', 0, 'cls'][0].pred) // (
            heard.sizes[0][0] * heard.sizes[0][1] * len(match.boxes[0][0])
        )
        kept, found_answers = [], []
        first = 0
        for level, size in enumerate(heard.sizes):
            count = images * size[0] * size[1] * len(match.boxes[0][level])
            rows = sampled[(sampled >= first) & (sampled < first + count)]
            found, row, own_box, box = match(level, rows - first, size, sizes, images, view)
            answer = theirs[row[found]]
            own_box, box = own_box[found], box[found]
            if kind == 'bbox':
                moved = own_coder.encode(own_box, coder.decode(box, answer))
                same = (own_box == box).all(1, keepdim=True) & _same_coder(own_coder, coder)
                answer = torch.where(same, answer, moved)
            kept.append(rows[found])
            found_answers.append(answer)
            first += count
        return torch.cat(kept), torch.cat(found_answers)

    def _distil_rcnn(
        self, heard: Record, features: Sequence[Tensor], view: View | None
    ) -> dict[str, Tensor]:
        """L_RCN: equations (2) to (5) over the student's own RoIs, stage by stage."""
        losses: dict[str, Tensor] = {}
        features = self.teacher.acceleration.for_rois(features, self.teacher.network.roi_head)
        stage_weights = getattr(self.roi_head, 'stage_loss_weights', [1.0])
        context = roi_context(self.teacher.network.roi_head, features)
        images = features[0].size(0)
        for stage in heard.stages('rcnn'):
            head = _stage(self.roi_head.bbox_head, stage)
            asked = heard.questions['rcnn', stage, 'cls'][0]
            rois = asked.rois
            if self.branches > 1:
                rois = torch.cat([rois[:, :1] % images, rois[:, 1:]], 1)
            if view is not None:
                rois = view.rois(rois)
            logits, deltas = self.teacher.score_rois(features, rois, stage, context)
            values = {}
            if term := self.terms.get('rcnn_cls'):
                answers = self.answers[stage]
                pred, answer = answers.student(asked.pred), answers.teacher(logits)
                known = answers.known(asked.target)
                weight = asked.weight if known is None else asked.weight * known
                background = pred.size(1) > head.num_classes
                values['rcnn_cls'] = head.loss_cls.loss_weight * term.loss(
                    pred, answer, weight, asked.avg_factor, answers.sigmoid, background
                )
            boxes = heard.questions.get(('rcnn', stage, 'bbox'))
            if boxes and (term := self.terms.get('rcnn_bbox')):
                values['rcnn_bbox'] = head.loss_bbox.loss_weight * self._bounded(
                    term, stage, asked, boxes[0], deltas
                )
            for name, value in values.items():
                losses[name] = losses.get(name, 0) + stage_weights[stage] * value
        return losses

    def _bounded(
        self, term: Term, stage: int, asked: Question, boxes: Question, deltas: Tensor
    ) -> Tensor:
        """Equation (4) on the positive RoIs, in the student's delta space."""
        head = _stage(self.roi_head.bbox_head, stage)
        positive = (asked.target >= 0) & (asked.target < head.num_classes)
        labels, rois = asked.target[positive], asked.rois[positive][:, 1:]
        answers, weight = self.answers[stage], boxes.weight
        if (known := answers.known(labels)) is not None:
            weight = weight * known[:, None]
        teacher_head = self.teacher.box_head(stage)
        answer = deltas[positive]
        if not teacher_head.reg_class_agnostic:
            answer = answer.view(len(answer), -1, 4)[
                torch.arange(len(labels), device=labels.device), answers.columns(labels)
            ]
        if not _same_coder(head.bbox_coder, teacher_head.bbox_coder):
            answer = head.bbox_coder.encode(rois, teacher_head.bbox_coder.decode(rois, answer))
        pred, target = boxes.pred, boxes.target
        if head.reg_decoded_bbox:
            pred = head.bbox_coder.encode(rois, pred)
            target = head.bbox_coder.encode(rois, target)
        return term.loss(pred, answer, target, weight, boxes.avg_factor)

    def _distil_hints(self, heard: Record, said: Record, view: View | None) -> Tensor:
        """L_hint: equation (6), summed over the pairs."""
        loss = self.terms['hint'].loss
        values = []
        for pair in self.hints:
            guided = heard.feature(pair.student.path, pair.student.index)
            hint = said.feature(pair.teacher.path, pair.teacher.index)
            over = view
            if self.branches > 1 and len(guided) == self.branches * len(hint):
                hint = hint.repeat(self.branches, *[1] * (hint.dim() - 1))
                over = view and view.repeat(self.branches)
            hint = resample(hint, guided, pair.strides, over)
            adapted = self.kd_adapters[pair.name](guided)
            values.append(loss(adapted, laid_out(hint, adapted)))
            if 'hint' in self.unproven:
                # In their sum a dead pair would hide behind a living one.
                wiring.prove(f'{LOG_NAMES["hint"]} at {pair.student}', values[-1], self._own())
        return sum(values)

    def _hard_weights(self, factors: dict[str, float]) -> dict[str, float]:
        """μ of equation (2), for each head whose classification is distilled; 1 without."""
        return {
            head: 1 - factors[f'{head}_cls'] * (1 - self.terms[f'{head}_cls'].loss.hard_weight)
            for head in ('rpn', 'rcnn')
            if f'{head}_cls' in self.terms
        }

    # ---------------------------------------------------------------- before training

    def init_weights(self) -> None:
        """Initialise the student, then let it inherit the teacher's neck and heads if it should."""
        super().init_weights()
        if self.starts_from_teacher and self.start is None:
            self.start = inherit(self, self.teacher.network, self.classes)
            for adapter in self.kd_adapters.values() if self.hints else ():
                set_identity(adapter)
            if not self.terms:
                self.teacher = None  # type: ignore[assignment]

    def startup_table(self, load_from: str | None = None, resumed: str | None = None) -> str:
        """What is about to be trained, see :func:`mmkd.startup.startup_table`."""
        from ..engine.summary import startup_table

        return startup_table(self, load_from, resumed)

    def _listen(self, pairs: Sequence[str | dict]) -> None:
        if getattr(self.backbone, 'num_branch', 1) != self.branches:
            raise ValueError(
                f"the student's {type(self.backbone).__name__} belongs to a TridentFasterRCNN: "
                "write type='mmkd.KnowledgeDistillationTridentFasterRCNN'"
            )
        teacher = self.teacher.network
        hinted = {
            _parse(_pair(entry)[1])[0].split('.')[0] for entry in pairs if 'hint' in self.terms
        }
        self.asks_rpn = 'rpn_head' in hinted or any(n.startswith('rpn_') for n in self.terms)
        self.asks_rcnn = 'roi_head' in hinted or any(n.startswith('rcnn_') for n in self.terms)
        if self.asks_rpn:
            self._check_rpn(teacher)
            self.asks_rpn = 'rpn_head' in hinted or any(n.startswith('rpn_') for n in self.terms)
            self.recorder.listen_sizes(self.rpn_head)
            for kind in ('cls', 'bbox'):
                self.recorder.listen('rpn', 0, kind, getattr(self.rpn_head, f'loss_{kind}'))
        if self.asks_rcnn:
            self._check_rcnn(teacher)
            stages = getattr(self.roi_head, 'num_stages', 1)
            if 'roi_head' in hinted and stages != self.teacher.stages:
                raise ValueError(
                    f'a hint in the RoI head needs as many stages in both networks: the student '
                    f'has {stages}, the teacher {self.teacher.stages}; take a hint before it'
                )
            for stage in range(stages):
                extractor = _stage(self.roi_head.bbox_roi_extractor, stage)
                self.recorder.listen_rois(stage, extractor)
                for kind in ('cls', 'bbox'):
                    loss = _get(_stage(self.roi_head.bbox_head, stage), f'loss_{kind}')
                    if loss is not None:
                        self.recorder.listen('rcnn', stage, kind, loss)
        self.pixels = Pixels(self.data_preprocessor, teacher.data_preprocessor, self.resolution)
        backbone_alone = not (self.asks_rpn or self.asks_rcnn)
        if 'hint' in self.terms:
            self._pair_hints(pairs)
            backbone_alone &= all(p.teacher.path.split('.')[0] == 'backbone' for p in self.hints)
        self.asks_neck = not backbone_alone

    def _pair_hints(self, pairs: Sequence[str | dict]) -> None:
        if not pairs:
            raise ValueError("distillation.hint.pairs is empty: name a layer, as in ['neck']")
        wanted = [_pair(entry) for entry in pairs]
        shapes = [
            _shapes('student', self, self.recorder, [s for s, *_ in wanted]),
            _shapes(
                'teacher', self.teacher.network, self.teacher.recorder, [t for _, t, _ in wanted]
            ),
        ]
        self.kd_adapters = nn.ModuleDict()
        for spec_s, spec_t, kind in wanted:
            layers = [
                _layers(spec, seen) for spec, seen in zip((spec_s, spec_t), shapes, strict=True)
            ]
            if len(layers[0]) != len(layers[1]):
                raise ValueError(
                    f'hint pair {spec_s!r}, {spec_t!r}: the student has {len(layers[0])} outputs '
                    f'there, the teacher {len(layers[1])}; name one, as in {spec_s}[0]'
                )
            for layer_s, layer_t in zip(*layers, strict=True):
                name = f'{layer_s.path}_{layer_s.index}'.replace('.', '_')
                if name in self.kd_adapters:
                    name += f'_to_{layer_t.path}_{layer_t.index}'.replace('.', '_')
                if any((h.student, h.teacher) == (layer_s, layer_t) for h in self.hints):
                    raise ValueError(
                        f'distillation.hint.pairs joins {layer_s} and {layer_t} twice: the pair '
                        'would count twice; remove one'
                    )
                pair = (shapes[0][layer_s], shapes[1][layer_t])
                strides = _strides(layer_s, layer_t, pair)
                self.hints.append(HintPair(name, layer_s, layer_t, pair, strides))
                self.kd_adapters[name] = build_adapter(*pair, kind)

    def _check_rpn(self, teacher: nn.Module) -> None:
        heads = {'student': getattr(self, 'rpn_head', None), 'teacher': _get(teacher, 'rpn_head')}
        for who, head in heads.items():
            for need in ('loss_cls', 'loss_bbox', 'prior_generator', 'bbox_coder'):
                if not hasattr(head, need):
                    raise ValueError(
                        f"the {who}'s RPN ({type(head).__name__}) has no {need}, so it cannot be "
                        'distilled: ' + _off('rpn_cls', 'rpn_bbox')
                    )
        own, theirs = heads.values()
        generators = [head.prior_generator for head in heads.values()]
        if not all(hasattr(generator, 'base_anchors') for generator in generators):
            names = ' against '.join(type(generator).__name__ for generator in generators)
            raise ValueError(
                f'one of the two RPNs has no anchors ({names}), so they do not answer one '
                'question: ' + _off('rpn_cls', 'rpn_bbox')
            )
        terms = [n for n in ('rpn_cls', 'rpn_bbox') if n in self.terms]
        if self.resolution or not _same_anchors(own.prior_generator, theirs.prior_generator):
            self._match_anchors(own.prior_generator, theirs.prior_generator, terms)
        elif not _same_coder(own.bbox_coder, theirs.bbox_coder):
            self.anchors = AnchorMatch(own.prior_generator, theirs.prior_generator)
        if not any(n in self.terms for n in terms):
            return
        decoded = own.reg_decoded_bbox or theirs.reg_decoded_bbox
        if 'rpn_bbox' in self.terms and decoded:
            raise ValueError(
                'an RPN that regresses boxes, not deltas (reg_decoded_bbox), cannot be distilled: '
                + _off('rpn_bbox')
            )

    def _match_anchors(self, own: Any, theirs: Any, terms: Sequence[str]) -> None:
        ratio = self.resolution.ratio if self.resolution else 1.0
        self.anchors = AnchorMatch(own, theirs, ratio)
        if self.anchors.share > 0:
            return
        if self.resolution is None:
            raise ValueError(
                f"no anchor of the student is one of the teacher's ({described(own)}, against "
                f'{described(theirs)}), so the two RPNs do not answer one question: '
                + _off('rpn_cls', 'rpn_bbox')
            )
        # A ratio that is no power of two, say: there is no wrong value to mend.
        for name in terms:
            del self.terms[name]
            self.unproven.discard(name)
            self.left_out[name] = f'no anchor has a counterpart at ratio {ratio:.4g}'
        if not self.terms:
            raise ValueError(
                f'distillation has RPN terms alone, and at ratio {ratio:.4g} no anchor of the '
                "student is one of the teacher's: add rcnn_cls, rcnn_bbox or hint, or take a ratio "
                'of 2'
            )

    def _check_rcnn(self, teacher: nn.Module) -> None:
        for who, network in (('student', self), ('teacher', teacher)):
            head = _get(network, 'roi_head')
            box_head = _stage(_get(head, 'bbox_head'), 0)
            if not hasattr(head, '_bbox_forward') or not hasattr(box_head, 'loss_cls'):
                raise ValueError(
                    f"the {who}'s RoI head ({type(head).__name__}) does not score RoIs by class, "
                    'so it cannot be distilled: ' + _off('rcnn_cls', 'rcnn_bbox')
                )
            if getattr(box_head, 'num_instance', 1) > 1:
                raise ValueError(
                    f"the {who}'s box head ({type(box_head).__name__}) answers each RoI with a set "
                    'of boxes, so answers cannot be paired: ' + _off('rcnn_cls', 'rcnn_bbox')
                )
            if 'rcnn_bbox' in self.terms and not hasattr(box_head, 'loss_bbox'):
                raise ValueError(
                    f"the {who}'s box head ({type(box_head).__name__}) regresses no deltas: "
                    + _off('rcnn_bbox')
                )
            asked = inspect.signature(head._bbox_forward).parameters.values()
            needs = [p.name for p in asked if p.default is p.empty and p.name not in SCORED_BY]
            if needs:
                raise ValueError(
                    f"the {who}'s RoI head ({type(head).__name__}) scores RoIs by more than "
                    f'features ({", ".join(needs)}): ' + _off('rcnn_cls', 'rcnn_bbox')
                )
            if 'rcnn_bbox' in self.terms and not getattr(box_head, 'with_reg', True):
                raise ValueError(f'the {who} regresses no boxes: ' + _off('rcnn_bbox'))
        own, theirs = (_stage(network.roi_head.bbox_head, 0) for network in (self, teacher))
        self._check_classes(own.num_classes, theirs.num_classes)
        stages = range(getattr(self.roi_head, 'num_stages', 1))
        self.answers = [
            Answers(
                _stage(self.roi_head.bbox_head, stage), self.teacher.box_head(stage), self.classes
            )
            for stage in stages
        ]

    def _check_classes(self, own: int, theirs: int) -> None:
        if self.classes is None:
            if own != theirs:
                raise ValueError(
                    f'the teacher {self.teacher.name} has {theirs} classes, the student {own}, and '
                    'their names are not known: give distillation.classes=dict(student=[...], '
                    'teacher=[...]) in the order of the heads, or ' + _off('rcnn_cls', 'rcnn_bbox')
                )
            return
        for who, names, count in (
            ('student', self.classes.student, own),
            ('teacher', self.classes.teacher, theirs),
        ):
            if len(names) != count:
                raise ValueError(
                    f'distillation.classes.{who} has {len(names)} names, the {who} '
                    f'{count} classes (num_classes of its box head)'
                )


@MODELS.register_module()
class KnowledgeDistillationTwoStageDetector(DistillationMixin, TwoStageDetector):
    """A two-stage detector that learns from a teacher, see :class:`DistillationMixin`."""


@MODELS.register_module()
class KnowledgeDistillationTridentFasterRCNN(DistillationMixin, TridentFasterRCNN):
    """TridentNet as a student; each of its branches learns from the same answers."""


def _sum(losses: dict) -> Tensor:
    """What MMEngine makes of a dict of losses, which may be lists."""
    return sum(
        sum(value) if isinstance(value, list) else value
        for key, value in losses.items()
        if 'loss' in key
    )


def _build_term(recipe: dict, name: str) -> Term | None:
    if name not in recipe:
        return None
    if not isinstance(recipe[name], dict):
        raise ValueError(
            f'distillation.{name}={recipe[name]!r} must be a loss, dict(type=...): ' + _off(name)
        )
    config = dict(recipe[name])
    times = _dict(f'distillation.{name}.schedule', config.pop('schedule', {}))
    _known(f'distillation.{name}.schedule', times, ['begin', 'warmup', 'end', 'by_epoch'])
    try:
        schedule = WeightSchedule(**times)
    except ValueError as error:
        raise ValueError(f'distillation.{name}.schedule: {error}') from None
    share = config.pop('share', None)
    if share is not None and not isinstance(share, dict):
        share = dict(share=share)
    _known(f'distillation.{name}.share', share or {}, ['share', 'iters'])
    if not config.get('type') or not isinstance(config['type'], (str, type)):
        raise ValueError(
            f'distillation.{name}: type={config.get("type")!r} must name a loss, such as '
            f'{_OWN_LOSSES[name][0].__name__}'
        )
    try:
        loss = MODELS.build(config)
        measured = GradientShare(**share) if share is not None else None
    except (TypeError, ValueError, KeyError, RuntimeError) as error:
        message = error.args[0] if error.args else error
        raise ValueError(f'distillation.{name}: {message}') from error
    _check_loss(name, loss)
    if loss.loss_weight == 0:
        return None
    return Term(loss, schedule, measured)


_OWN_LOSSES: dict[str, tuple[type, int]] = {
    'rpn_cls': (WeightedSoftCELoss, 5),
    'rpn_bbox': (TeacherBoundedL2Loss, 5),
    'rcnn_cls': (WeightedSoftCELoss, 6),
    'rcnn_bbox': (TeacherBoundedL2Loss, 5),
    'hint': (HintL2Loss, 2),
}
"""For each term the loss of the paper, and how many arguments the detector calls it with."""


def _check_loss(name: str, loss: Any) -> None:
    """A loss of one's own may take the place of the paper's, if it is called as that is."""
    kind, count = _OWN_LOSSES[name]
    of_others = tuple({other for other, _ in _OWN_LOSSES.values()} - {kind})
    fits = isinstance(loss, nn.Module) and isinstance(_get(loss, 'loss_weight'), (int, float))
    if name.endswith('_cls'):
        fits = fits and hasattr(loss, 'hard_weight')
    if fits:
        try:
            inspect.signature(loss.forward).bind(*[None] * count)
        except TypeError:
            fits = False
    if not fits or isinstance(loss, of_others):
        raise ValueError(
            f'distillation.{name}: type={type(loss).__name__} is no loss for this term: take '
            f'{kind.__name__}, or one with its loss_weight and its forward'
        )


def _dict(owner: str, given: Any) -> dict:
    if not isinstance(given, dict):
        raise ValueError(f'{owner}={given!r} must be a dict')
    return dict(given)


def _check_names(classes: dict) -> None:
    for who in ('student', 'teacher'):
        names = classes.get(who, [])
        if not isinstance(names, (list, tuple)) or not all(isinstance(n, str) for n in names):
            raise ValueError(f'distillation.classes.{who}={names!r} must be a list of names')
        twice = [n for i, n in enumerate(names) if n in names[:i]]
        if twice:
            raise ValueError(f'distillation.classes.{who} has {twice[0]!r} twice')
    names = _dict('distillation.classes.names', classes.get('names') or {})
    if not all(isinstance(n, str) for pair in names.items() for n in pair):
        raise ValueError(f"distillation.classes.names={names!r} must be {{'mine': 'theirs'}}")


def _check_pairs(pairs: Any) -> None:
    if not isinstance(pairs, (list, tuple)):
        raise ValueError(f"distillation.hint.pairs={pairs!r} must be a list, such as ['neck']")
    seen: list[tuple[str, str]] = []
    for entry in pairs:
        student, teacher, _ = _pair(entry)
        for spec in (student, teacher):
            _parse(spec)
        if (student, teacher) in seen:
            raise ValueError(f'distillation.hint.pairs has {entry!r} twice: it would count twice')
        seen.append((student, teacher))


def _known(owner: str, given: dict, names: Sequence[str] | dict) -> None:
    for key in given:
        if key not in names:
            near = difflib.get_close_matches(str(key), list(names), 3, 0)
            raise ValueError(f'{owner} has no entry {key!r}; did you mean {" or ".join(near)}?')


def _off(*terms: str) -> str:
    return 'turn it off by ' + ' and '.join(f'distillation.{t}.loss_weight=0' for t in terms)


def _get(owner: Any, name: str) -> Any:
    return getattr(owner, name, None)


def _stage(heads: Any, stage: int) -> Any:
    return heads[stage] if isinstance(heads, nn.ModuleList) else heads


def _same_coder(own: Any, theirs: Any) -> bool:
    # A list in one config is a tuple in another's defaults.
    frames = [
        (type(c), *(list(_get(c, n) or ()) for n in ('means', 'stds'))) for c in (own, theirs)
    ]
    return frames[0] == frames[1]


def _same_anchors(own: Any, theirs: Any) -> bool:
    return (
        own.strides == theirs.strides
        and own.num_base_priors == theirs.num_base_priors
        and all(
            torch.equal(a, b) for a, b in zip(own.base_anchors, theirs.base_anchors, strict=True)
        )
    )


def _binary(logits: Tensor, columns: int) -> Tensor:
    """The RPN's logits (n, 1) of a sigmoid or (n, 2) of a softmax, as ``columns`` of them."""
    if logits.size(1) == columns:
        return logits
    if columns == 1:
        return logits[:, :1] - logits[:, 1:]
    return torch.cat([logits, torch.zeros_like(logits)], 1)


def _same_rows(asked: list[Tensor], answers: list[Tensor]) -> None:
    shapes = [[tuple(t.shape) for t in rows] for rows in (asked, answers)]
    if shapes[0] != shapes[1]:
        raise RuntimeError(
            f'the student scored anchors {shapes[0]}, the teacher {shapes[1]} (level by level): '
            'their feature maps differ in size; ' + _off('rpn_cls', 'rpn_bbox')
        )


def _strides(
    student: Layer, teacher: Layer, shapes: tuple[tuple[int, ...], tuple[int, ...]]
) -> tuple[float, float] | None:
    """Pixels from cell to cell, by the dry run; None for maps that are not over the image."""
    over_image = not any(layer.path.startswith('roi_head') for layer in (student, teacher))
    if not over_image or any(len(shape) != 4 for shape in shapes):
        return None
    return DRY_SIZE / shapes[0][-1], DRY_SIZE / shapes[1][-1]


def _pair(entry: str | dict) -> tuple[str, str, str | None]:
    """Student's layer, teacher's layer and kind of adapter."""
    if isinstance(entry, str):
        return entry, entry, None
    known = {'student', 'teacher', 'adapter'}
    if not isinstance(entry, dict) or not {'student', 'teacher'} <= set(entry) <= known:
        raise ValueError(
            f"hint pair {entry!r} must be a path, or dict(student='...', teacher='...') and "
            f"optionally adapter='...', one of {', '.join(KINDS)}"
        )
    return entry['student'], entry['teacher'], entry.get('adapter')


_SPEC = re.compile(r'(?P<path>[\w.]+?)(\[(?P<index>\d+)\])?')


def _parse(spec: str) -> tuple[str, int | None]:
    match = _SPEC.fullmatch(spec) if isinstance(spec, str) else None
    if match is None:
        raise ValueError(f'hint {spec!r} is no path of a submodule, such as neck or backbone[2]')
    return match['path'], int(match['index']) if match['index'] else None


@torch.no_grad()
def _shapes(
    who: str, network: nn.Module, recorder: Recorder, specs: list[str]
) -> dict[Layer, tuple[int, ...]]:
    """Tap the named layers; a dry run on one black image tells their shapes, and changes nothing.

    Raises:
        ValueError: if there is no such submodule.
    """
    modules = dict(network.named_modules())
    paths = sorted({_parse(spec)[0] for spec in specs})
    for path in paths:
        if path not in modules:
            near = difflib.get_close_matches(path, list(modules), 3, 0)
            raise ValueError(
                f'hint at {path!r}: the {who} has no such submodule; near ones: {", ".join(near)}'
            )
        recorder.tap(path, modules[path])
    parts = {path.split('.')[0] for path in paths}
    modes = {module: module.training for module in network.modules()}
    network.eval()
    try:
        with recorder() as record:
            image = next(network.parameters()).new_zeros(1, 3, DRY_SIZE, DRY_SIZE)
            features = network.extract_feat(image)
            if 'rpn_head' in parts:
                network.rpn_head(features)
            if 'roi_head' in parts:
                rois = features[0].new_tensor([[0, 0, 0, 64, 64]])
                heads = network.roi_head.bbox_head
                for stage in range(len(heads)) if isinstance(heads, nn.ModuleList) else [None]:
                    where = () if stage is None else (stage,)
                    context = roi_context(network.roi_head, features)
                    network.roi_head._bbox_forward(*where, features, rois, **context)
            for path, (tensors, _) in record.features.items():
                if not all(torch.is_tensor(tensor) for tensor in tensors):
                    raise ValueError(
                        f'hint at {path!r}: its outputs in the {who} are no tensors, but lists of '
                        'them; name a submodule inside it'
                    )
                if record.runs[path] > 1:
                    raise ValueError(
                        f'hint at {path!r}: the {who} runs it {record.runs[path]} times in one '
                        'step (once for each level, say), so it has no one output; take a layer '
                        'before it'
                    )
                if record.changed(path):
                    recorder.copy(path)
            return {
                Layer(path, index): tuple(tensor.shape)
                for path, (tensors, _) in record.features.items()
                for index, tensor in enumerate(tensors)
            }
    finally:
        for module, mode in modes.items():
            module.training = mode


def _layers(spec: str, shapes: dict[Layer, tuple[int, ...]]) -> list[Layer]:
    path, index = _parse(spec)
    seen = [layer for layer in shapes if layer.path == path]
    if not seen:
        raise ValueError(
            f'hint at {path!r}: the network does not call this submodule; name one inside it'
        )
    if index is None:
        return seen
    if index >= len(seen):
        raise ValueError(f'hint {spec!r}: {path} has {len(seen)} outputs, the first is {path}[0]')
    return [Layer(path, index)]
