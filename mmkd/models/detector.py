"""The distilling student: one training step of Chen et al., NIPS 2017."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from mmdet.models.detectors import TridentFasterRCNN, TwoStageDetector
from mmdet.registry import MODELS
from mmdet.structures import SampleList
from mmengine.dist import get_world_size
from torch import Tensor, nn

from ..compatibility import compare_networks, distilling_class, map_classes
from ..inference import at_own_scale, check_scale, drop_terms, require_own_class, without_teacher
from ..layer_pairs import Probe
from ..observers import OBSERVERS, refuse_total, refuse_unguarded
from ..options.acceleration import input_channels
from ..options.adapters import set_identity
from ..options.inherit import inherit
from ..options.schedule import WeightSchedule
from ..options.teacher_inputs import TeacherInputs
from ..recipe import check_model, log_name, read_recipe, rename_before_loading
from ..registry import build_terms
from . import chen2017  # noqa: F401  registers the paper's terms
from .heads import RPN, RoIHead
from .step import Step
from .taps import ScaledLosses, Taps
from .teacher import Seen, Teacher

# Typed as Any: the concrete class chooses the base.
Detector: Any = object


class DistillationMixin(Detector):
    """Lets a two-stage detector learn from a teacher; the student *is* the detector.

    Its own training path is MMDetection's, untouched. Taps record the anchors and RoIs it is
    trained on, the teacher scores the same ones, and the terms join the losses::

        L = L_RPN + L_RCN + γ · L_hint                                              (1)

    Args:
        teacher_config, teacher_ckpt, teacher_sha256: see :class:`mmkd.models.teacher.Teacher`.
        eval_teacher: only True; the name is MMDetection's.
        distillation: the recipe, see ``configs/_base_/chen2017.py`` and :mod:`mmkd.recipe`.
        student: the arguments of the detector.

    Raises:
        ValueError: if the recipe, or the pair, cannot be.
        TeacherError: if the teacher cannot be built or loaded completely. Where its files are
            missing the student is built without terms and predicts; training it raises.
    """

    def __init__(
        self, *args: Any, distillation: dict, teacher_config: str | Path | dict | None = None,
        teacher_ckpt: str | None = None, teacher_sha256: str | None = None,
        eval_teacher: bool = True, **student: Any,
    ) -> None:  # fmt: skip
        check_model(super().__init__, student, eval_teacher)
        super().__init__(*args, **student)
        recipe = read_recipe(distillation)
        self.check_teacher, self.resolution = recipe.check_teacher, recipe.resolution
        self.starts_from_teacher, self.start = recipe.starts_from_teacher, None
        self.unlabelled = recipe.unlabelled
        asks = self.starts_from_teacher or self.unlabelled.asks
        self.kd_terms = nn.ModuleDict()
        self.taps, self.hard_losses = Taps(), ScaledLosses()
        self.sites: dict[str, Any] = {}
        self.shared_losses, self.left_out = dict[str, str](), dict[str, str]()
        self.observers, self.steps, self.dwarfing = list(OBSERVERS), 0, set[str]()
        self.first_hard = 0.0
        # The student draws the same initial weights as it does without a teacher.
        with torch.random.fork_rng(devices=[]):
            terms = build_terms(recipe.terms)
            # None where nothing is asked of it.
            self.teacher: Teacher = None  # type: ignore[assignment]
            self.missing_teacher: Exception | None = None
            if terms or asks:
                try:
                    self.teacher = Teacher(
                        teacher_config, teacher_ckpt, recipe.acceleration, teacher_sha256
                    )
                except Exception as error:
                    self.missing_teacher = without_teacher(error)
            # Weights first: those of another config would be blamed on its class names.
            self.classes = None
            if self.missing_teacher is None:
                self.classes = map_classes(recipe.classes, terms, asks or self.unlabelled.on)
            if (terms or self.unlabelled.asks) and self.teacher is not None:
                self._connect(terms)
        self.unlabelled.attach(self, getattr(self.teacher, 'network', None), self.classes)
        self.unproven = set(self.kd_terms)
        # Whether a runner, or mmkd.guard, has checked what this would be trained on.
        self.guarded = False
        self.log_names = {key: log_name(key) for key in self.kd_terms}
        for hook in (rename_before_loading, drop_terms):
            self.register_load_state_dict_pre_hook(hook)

    # ---------------------------------------------------------------- one step of training

    def loss(self, batch_inputs: Tensor, batch_data_samples: SampleList) -> dict:
        """MMDetection's losses and the terms (``loss_kd_*``) by name, for a batch of images
        (N, 3, H, W), normalised as the student expects, and its ground truth."""
        if self.training:
            if self.missing_teacher is not None:
                raise self.missing_teacher
            if not self.guarded and (self.kd_terms or self.resolution or self.unlabelled.on):
                refuse_unguarded()
        factors = {key: term.schedule() for key, term in self.kd_terms.items()}
        asked = self.unlabelled.on and self.unlabelled.begin(batch_data_samples)
        if not any(factors.values()) and not self.unproven:
            # Every term is off, or not in force now: the teacher looks at what has no labels alone.
            if asked:
                batch_data_samples = self.unlabelled.alone(self, batch_inputs, batch_data_samples)
            losses = super().loss(batch_inputs, batch_data_samples)
            return self._join(losses, {key: {'': self._nothing(key)} for key in factors}, factors)
        self.steps += 1
        mu = {
            site: 1 - factors[key] * (1 - self.kd_terms[key].hard_weight)
            for site, key in self.shared_losses.items()
        }
        with self.taps as record, self.teacher.taps as teacher_record:
            # Before the student's forward fills the memory: what this needs is then free again.
            seen = self._show(batch_inputs, batch_data_samples)
            if asked:
                batch_data_samples = self.unlabelled.label(self.teacher, seen, batch_data_samples)
            with self.hard_losses(mu):  # μ · L_hard of (2)
                losses = super().loss(batch_inputs, batch_data_samples)  # L_RPN + L_RCN of (1)
            step = Step(self, record, teacher_record, seen, batch_data_samples)
            terms = {key: self._distil(key, step) for key in self.kd_terms}
            for observe in self.observers:
                observe(self, step, losses, terms, factors)
        return self._join(losses, terms, factors)

    @torch.no_grad()
    def _show(self, batch_inputs: Tensor, samples: SampleList) -> Seen:
        """Let the teacher see the batch, as far as some term needs."""
        self.teacher.follow(next(self.parameters()))
        own = self.teacher_inputs
        pixels = (batch_inputs, None) if own.same else own(batch_inputs, samples)
        return self.teacher.see(*pixels, *self.depth)

    def _distil(self, key: str, step: Step) -> dict[str, Tensor]:
        """The parts of a term's loss; a zero that can be logged where it compared nothing."""
        parts = self.kd_terms[key].distil(step)
        if not parts:
            step.silent.add(key)
        if not parts or get_world_size() > 1:  # another process may use what this one does not
            name = next(iter(parts), '')
            parts[name] = parts.get(name, 0) + self._nothing(key)
        return parts

    def _nothing(self, key: str) -> Tensor:
        return self.kd_terms[key].nothing(next(self.parameters()).new_zeros(()))

    def _join(self, losses: dict, terms: dict, factors: dict[str, float]) -> dict:
        """The terms, and their weights where these vary, beside the student's losses."""
        if self.unlabelled.on:
            losses.update(self.unlabelled.end(losses))
        for key, term in self.kd_terms.items():
            factor = factors[key]
            if term.share is not None:
                factor *= term.share.factor(self.log_names[key])
            for part, value in terms[key].items():
                name = f'{self.log_names[key]}_{part}' if part else self.log_names[key]
                if name in losses:
                    raise ValueError(f'distillation.{key} gives a second {name}: rename one of two')
                losses[name] = factor * value
            if term.share is not None or term.schedule != WeightSchedule():
                weight = torch.tensor(factor * term.loss_weight)
                losses[self.log_names[key].replace('loss', 'weight')] = weight.to(value)
        return losses

    # ---------------------------------------------------------------- inference

    def predict(self, batch_inputs: Tensor, batch_data_samples: SampleList, *args: Any,
                **kwargs: Any) -> SampleList:  # fmt: skip
        """The student's detections; a ValueError for images of the teacher's scale."""
        check_scale(self.resolution, batch_data_samples)
        return super().predict(batch_inputs, batch_data_samples, *args, **kwargs)

    @property
    def cfg(self) -> Any:
        """The config that MMDetection's inferencers keep here and take the test pipeline from."""
        return self._cfg

    @cfg.setter
    def cfg(self, config: Any) -> None:
        require_own_class(config, self)
        self._cfg = at_own_scale(config)

    # ---------------------------------------------------------------- before training

    def init_weights(self) -> None:
        """Initialise the student, then let it inherit the teacher's neck and heads if it should."""
        super().init_weights()
        if self.starts_from_teacher and self.start is None and self.teacher is not None:
            self.start = inherit(self, self.teacher.network, self.classes)
            set_identity(self.kd_terms)
            if not self.kd_terms and not self.unlabelled.asks:
                self.teacher = None  # type: ignore[assignment]

    def _connect(self, terms: dict) -> None:
        """Attach to both networks what the terms need, and give each term its layer pairs."""
        teacher = self.teacher.network
        how = compare_networks(
            self, teacher, self.teacher.name, terms, self.resolution, self.classes
        )
        self.left_out, self.shared_losses = how.left_out, how.shared_losses
        if 'rpn' in how.sites:
            self.sites['rpn'] = RPN(how.rpn)
        if 'rcnn' in how.sites:
            self.sites['rcnn'] = RoIHead(how.rcnn)
        for site in self.sites.values():
            site.tap(self, self.taps, self.hard_losses)
        needs = {key: term.needs() for key, term in terms.items()}
        if any(need.anchors for need in needs.values()) and 'rpn' not in self.sites:
            self.taps.tap_map_sizes(self.rpn_head)
        self.teacher_inputs = TeacherInputs(
            self.data_preprocessor, teacher.data_preprocessor,
            (input_channels(self), input_channels(teacher)), self.resolution,
        )  # fmt: skip
        entries = [entry for need in needs.values() for entry in need.pairs]
        probe = Probe((self, self.taps), (teacher, self.teacher.taps), entries)
        for key, term in terms.items():
            term.bind(probe.pairs(f'distillation.{key}', needs[key].pairs))
        self.kd_terms.update(terms)
        # How far the teacher runs before the student: its neck, its RPN.
        neck = bool(self.sites) or probe.needs_neck or self.unlabelled.asks
        self.depth = neck, 'rpn' in self.sites

    def parse_losses(self, losses: dict) -> tuple[Tensor, dict]:
        """MMEngine's sum; raises NonFiniteLossError before one that is not finite is trained on."""
        total, logged = super().parse_losses(losses)
        if not total.isfinite():
            refuse_total(total, logged)
        return total, logged


@MODELS.register_module()
class KnowledgeDistillationTwoStageDetector(DistillationMixin, TwoStageDetector):
    """A two-stage detector that learns from a teacher, see :class:`DistillationMixin`.

    ``detector`` names the student's own class, such as 'TridentFasterRCNN' or one of a user: the
    object is then of both classes.
    """

    def __new__(cls, *args: Any, detector: str | type | None = None, **kwargs: Any) -> Any:
        return super().__new__(distilling_class(cls, detector))

    def __init__(self, *args: Any, detector: str | type | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> tuple:
        """A copy, or a pickle in another process, makes the class again from the student's own."""
        own = getattr(self, 'student_class', None)
        if own is None:
            return super().__reduce_ex__(protocol)
        return _blank, (own,), self.__dict__


def _blank(own: type) -> Any:
    cls = KnowledgeDistillationTwoStageDetector
    return cls.__new__(cls, detector=own)


@MODELS.register_module()
class KnowledgeDistillationTridentFasterRCNN(DistillationMixin, TridentFasterRCNN):
    """TridentNet as a student; each of its branches learns from the same answers."""
