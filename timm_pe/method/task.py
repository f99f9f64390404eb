"""The training task: batch -> student and its projectors <- teacher -> loss. A task of timm's kind (timm.task)."""

import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn as nn
from timm.task import (
    ClassificationEvaluator,
    FeatureDistillationTask,
    MultiLabelClassificationEvaluator,
    TrainingTask,
)
from timm.task.classification import resolve_classification_loss
from timm.task.distillation import FeatureDistillationTrainableModule
from timm.utils import unwrap_model

from ..errors import UsageError, one_line
from .losses import TEACHER_NORMS, KlLoss, create_feature_loss, kd_loss, normalize_teacher
from .names import TARGETS
from .projectors import ProjectorEnsemble
from .tap import FeatureTap
from .teacher import Teacher, TeacherOutput, create_teacher

_logger = logging.getLogger(__name__)


class ProjectorEnsembleModule(FeatureDistillationTrainableModule):
    """All that is trained, student and projectors, in one module, for DDP, compile and EMA.

    Args:
        student: Student model.
        projection: Projectors from the student's feature (or logits) to the teacher's.
        tap: The tap on the student.
        target: 'feature', or 'logits'.

    Shapes:
        forward: `[b, ch, h, w]` -> (logits `[b, c]`, projection `[b, m]`).
    """

    student: nn.Module
    projection: ProjectorEnsemble

    def __init__(self, student: nn.Module, projection: ProjectorEnsemble, tap: FeatureTap, target: str = 'feature'):
        super().__init__(student, projection)
        self.tap = tap
        self.target = target

    def forward(self, input: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits = self.student(input)
        if isinstance(logits, (tuple, list)):
            # set_distilled_training: in eval mode the model returns the mean of its heads
            logits = sum(logits) / len(logits)
        feature = self.tap.pop()
        return logits, self.projection(feature if self.target == 'feature' else logits)


class ProjectorEnsembleTask(FeatureDistillationTask):
    """Projector Ensemble Feature Distillation (Chen et al., NeurIPS 2022, arXiv 2210.15274).

    loss = task_loss_weight * criterion + distill_loss_weight * feature loss + kd_loss_weight * T^2 KL(teacher || student)

    It takes every keyword of `timm.task.FeatureDistillationTask` and returns the same (`loss`, `output`, named terms), so it
    can replace it. Three differences: the weights default to 1 and 25 independently, while timm derives one from the other;
    the term is called `pe_loss`, not `kd_loss`; a teacher given by name keeps its own classes.

    Args:
        student_model: Student model to train, on its device.
        teacher_model: A timm name, any module, a `Teacher`, or a timm `DistillationTeacher`. A name is created with its
            own pretrained weights and its own classes. The module is frozen in place.
        criterion: Task loss. Created by timm's create_classification_loss() from criterion_kwargs when None; a student
            without a classifier (num_classes=0) then has none, and targets are not read.
        criterion_kwargs: Arguments for it.
        teacher_pretrained_path: Checkpoint for a teacher given by name.
        teacher_pretrained_cfg_overlay: timm's pretrained cfg overrides for a teacher given by name.
        distill_loss_weight: Weight of the projectors' loss, None means 25 (0.9 for logits).
        task_loss_weight: Weight of the task loss, None means 1 (0.1 for logits).
        student_feature_dim: Checked against the measured width d if given.
        teacher_feature_dim: Checked against the measured width m if given.
        num_projectors: q.
        projector: Kind of projector, see `list_projectors`.
        act: Activation of the projectors: 'relu' (the paper's), 'none', or 'auto': relu exactly when the features of
            the teacher on the first batch (rank 0's) are all >= 0.
        feature_loss: See `list_feature_losses`; None means 'direction' for features and 'kl' for logits.
        target: 'feature': the projectors map the student's feature to the teacher's; 'logits': its logits to the
            teacher's (kd1proj with one projector, arXiv 2310.17183), whose classes may differ. 'auto' then means no
            activation.
        teacher_norm: See `normalize_teacher`.
        kd_loss_weight: Weight of plain logit distillation.
        kd_temperature: Temperature T of that, and of 'kl'.
        input_mean: Mean the batch is normalized with; None reads the student's pretrained_cfg, as timm does.
        input_std: Its standard deviation, likewise.
        multi_label: Whether targets are dense `[b, c]`; a default criterion and `create_evaluator()` then suit them.
        threshold: Probability that counts as a prediction in that evaluator.
        student_tap: Path of the module whose input is the student's feature, for models that are not timm's.
        teacher_tap: The same for the teacher.
        device: Device for teacher and projectors.
        dtype: Dtype of the projectors.
        verbose: Log what was resolved.

    Raises:
        UsageError: An argument does not fit; the message gives its value and what is allowed.
    """

    teacher: Teacher  # type: ignore[assignment]  # timm's has its own kind

    def __init__(
        self,
        student_model: nn.Module,
        teacher_model: str | nn.Module,
        criterion: nn.Module | Callable[..., torch.Tensor] | None = None,
        criterion_kwargs: dict[str, Any] | None = None,
        teacher_pretrained_path: str | None = None,
        teacher_pretrained_cfg_overlay: dict[str, Any] | None = None,
        distill_loss_weight: float | None = None,
        task_loss_weight: float | None = None,
        student_feature_dim: int | None = None,
        teacher_feature_dim: int | None = None,
        num_projectors: int = 3,
        projector: str = 'linear',
        act: str = 'auto',
        feature_loss: str | None = None,
        target: str = 'feature',
        teacher_norm: str = 'none',
        kd_loss_weight: float = 0.0,
        kd_temperature: float = 4.0,
        input_mean: Sequence[float] | None = None,
        input_std: Sequence[float] | None = None,
        multi_label: bool = False,
        threshold: float = 0.5,
        student_tap: str | None = None,
        teacher_tap: str | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        verbose: bool = True,
    ):
        # not FeatureDistillationTask's: it would build its own Linear and its own idea of the widths
        TrainingTask.__init__(self, device=device, dtype=dtype, verbose=verbose)
        needs_logits = bool(kd_loss_weight) or target == 'logits'
        _check_settings(target, teacher_norm, kd_temperature, multi_label and needs_logits)
        student = unwrap_model(student_model)
        _check_apart(student, teacher_model)
        tap = FeatureTap(student, student_tap, before_dropout=True)
        self.teacher = _resolve_teacher(
            teacher_model,
            student,
            teacher_pretrained_path,
            teacher_pretrained_cfg_overlay,
            teacher_tap,
            input_mean,
            input_std,
            self.device,
            needs_logits,
        )
        _check_dim('student_feature_dim', student_feature_dim, tap.width)
        _check_dim('teacher_feature_dim', teacher_feature_dim, self.teacher.width)
        if kd_loss_weight:
            _check_classes(student, self.teacher)
        widths = tap.width, self.teacher.width
        if target == 'logits':
            widths = _num_classes(student, 'student'), _num_classes(self.teacher, 'teacher')
            act = 'none' if act == 'auto' else act
        projection = ProjectorEnsemble(*widths, num_projectors, projector, act)
        self.trainable_module = ProjectorEnsembleModule(
            student_model, projection.to(device=self.device, dtype=self.dtype), tap, target
        )
        self.criterion = None  # type: ignore[assignment]  # timm's tasks always have one
        if criterion is not None or _has_classifier(student, task_loss_weight):
            self.criterion = resolve_classification_loss(
                criterion, self.device, multi_label=multi_label, criterion_kwargs=criterion_kwargs
            )
        self.multi_label, self.threshold = multi_label, threshold
        task_weight, distill_weight, loss = TARGETS[target]
        self.feature_loss_name = feature_loss or loss
        self.feature_loss = _create_frozen_loss(self.feature_loss_name, kd_temperature).to(self.device)
        self.target, self.teacher_norm = target, teacher_norm
        self.distill_loss_weight = distill_weight if distill_loss_weight is None else distill_loss_weight
        self.task_loss_weight = task_weight if task_loss_weight is None else task_loss_weight
        if self.criterion is None:
            self.task_loss_weight = 0.0
        self.kd_loss_weight, self.kd_temperature = kd_loss_weight, kd_temperature
        if self.verbose:
            self._log_settings()

    def _log_settings(self) -> None:
        _logger.info(
            f'ProjectorEnsembleTask: projectors {self.projection.extra_repr()}, target={self.target}, '
            f'feature_loss={self.feature_loss_name}, teacher_norm={self.teacher_norm}, '
            f'task_weight={self.task_loss_weight}, distill_weight={self.distill_loss_weight}, '
            f'kd_weight={self.kd_loss_weight}'
        )

    def create_evaluator(self, **kwargs: Any) -> ClassificationEvaluator:
        """timm's evaluator for the kind of targets."""
        if self.multi_label:
            return MultiLabelClassificationEvaluator(device=self.device, threshold=self.threshold, **kwargs)
        return super().create_evaluator(**kwargs)

    @property
    def projection(self) -> ProjectorEnsemble:
        """The projectors."""
        return unwrap_model(self.trainable_module).projection

    @torch.no_grad()
    def resolve_act(self, input: torch.Tensor, teacher: TeacherOutput | None = None) -> str:
        """Decide an 'auto' activation from a batch `[b, ch, h, w]` (rank 0's batch decides); return it.

        The teacher's output for the batch can be given, as in `forward`.
        """
        if self.projection.act == 'auto':
            self._settle_act((self.teacher(input) if teacher is None else teacher).feature)
        return self.projection.act

    def _settle_act(self, feature: torch.Tensor) -> None:
        non_negative = (normalize_teacher(feature, self.teacher_norm).min() >= 0).to(torch.uint8)
        if dist.is_available() and dist.is_initialized():
            dist.broadcast(non_negative, src=0)
        self._set_act('relu' if non_negative else 'none')
        if self.verbose:
            _logger.info(
                f"Projector activation 'auto' is '{self.projection.act}': the teacher's features on the first batch "
                f'{"are all >= 0" if non_negative else "have both signs"}.'
            )

    def _set_act(self, act: str) -> None:
        for ema in (False, True):
            module = self.get_trainable_module(ema=ema)
            if module is not None:
                unwrap_model(module).projection.act = act

    def compile(  # type: ignore[override]  # nn.Module.compile takes anything and gives nothing
        self, backend: str = 'inductor', mode: str | None = None, **compile_kwargs: Any
    ) -> nn.Module:
        """Compile student with projectors, the student alone (evaluation) and the teacher; before DDP."""
        compile_kwargs.update(backend=backend, mode=mode)
        self.eval_model = cast(nn.Module, torch.compile(self.trainable_module.student, **compile_kwargs))
        self.trainable_module = cast(Any, torch.compile(self.trainable_module, **compile_kwargs))
        self.teacher.compile(**compile_kwargs)
        return self.eval_model

    def get_task_state(self, module: nn.Module | None = None, ema: bool = False) -> dict[str, Any]:
        """The projectors' state, with what is needed to rebuild them."""
        state = super().get_task_state(module=module, ema=ema)
        of_loss = self.feature_loss.state_dict()
        return state and {
            **state,
            **({'feature_loss': of_loss} if of_loss else {}),
            'target': self.target,
            'projector': self.projection.projector,
            'num_projectors': self.projection.num_projectors,
            'act': self.projection.act,
        }

    def load_task_state(
        self,
        state: dict[str, Any] | None,
        strict: bool = True,
        module: nn.Module | None = None,
        ema: bool = False,
    ) -> None:
        """Load projectors, and the activation that was decided when they were first trained.

        Raises:
            UsageError: Projectors of another kind, number or width.
        """
        if not state:
            return
        own = self.projection
        kind = {'target': self.target, 'projector': own.projector, 'num_projectors': own.num_projectors}
        for name, value in kind.items():
            if state.get(name, value) != value:
                raise UsageError(f'the checkpoint has {name}={state[name]}, this run {name}={value}')
        if state.get('act', 'auto') != 'auto':
            if own.act not in ('auto', state['act']):
                raise UsageError(f"the checkpoint's projectors have act={state['act']}, this run act={own.act}")
            self._set_act(state['act'])
        try:
            self.feature_loss.load_state_dict(state.get('feature_loss', {}))
        except RuntimeError as e:
            raise UsageError(f"the checkpoint's feature loss is not '{self.feature_loss_name}': {one_line(e)}") from e
        try:
            super().load_task_state(state, strict=strict, module=module, ema=ema)
        except RuntimeError as e:
            raise UsageError(f"the checkpoint's projectors are not those of {own.extra_repr()}: {e}") from e

    def forward(
        self, input: torch.Tensor, target: torch.Tensor, teacher: TeacherOutput | None = None
    ) -> dict[str, torch.Tensor]:
        """One training step's forward.

        Args:
            input: Batch `[b, ch, h, w]`, in the normalization `input_mean`, `input_std`; teacher and student see it.
            target: Labels `[b]`, or soft ones `[b, c]`.
            teacher: The teacher's output for this batch, if known already (a cache): features `[b, m]`, logits
                `[b, c]`; those that no loss reads may be None. The teacher does not run then.

        Returns:
            `loss` (weighted sum), `output` (student logits `[b, c]`), and the raw terms `task_loss` (if there is a
            criterion), `pe_loss`, and with a KD weight `logit_loss`.
        """
        if teacher is None:
            # before the student: on a CPU it then reuses memory of the last step, which saves up to a fifth of a step
            teacher = self.teacher(input)
        if self.projection.act == 'auto':
            self._settle_act(teacher.feature)
        logits, projected = self.trainable_module(input)
        aim = teacher.logits if self.target == 'logits' else normalize_teacher(teacher.feature, self.teacher_norm)
        terms = {} if self.criterion is None else {'task_loss': self.criterion(logits, target)}
        terms['pe_loss'] = self.feature_loss(projected, aim)
        self._check_feature_loss(terms['pe_loss'], projected)
        weighted = [(self.task_loss_weight, 'task_loss'), (self.distill_loss_weight, 'pe_loss')]
        first, *others = [weight * terms[name] for weight, name in weighted if name in terms]
        loss = sum(others, first)
        if self.kd_loss_weight:
            if teacher.logits is None or logits.shape != teacher.logits.shape:
                given = None if teacher.logits is None else list(teacher.logits.shape)
                raise UsageError(
                    f'logits of the student {list(logits.shape)} and of the teacher {given} cannot be compared'
                )
            terms['logit_loss'] = kd_loss(logits, teacher.logits, self.kd_temperature)
            loss = loss + self.kd_loss_weight * terms['logit_loss']
        return {'loss': loss, 'output': logits, **terms}

    def _check_feature_loss(self, value: torch.Tensor, projected: torch.Tensor) -> None:
        if value.ndim:
            raise UsageError(
                f"feature loss '{self.feature_loss_name}' gives {list(value.shape)}, it must give one number"
            )
        if projected.requires_grad and not value.requires_grad:
            raise UsageError(
                f"feature loss '{self.feature_loss_name}' has no gradient: the projectors would learn nothing"
            )


def _check_settings(target: str, teacher_norm: str, temperature: float, compares_many_labels: bool) -> None:
    _check_choice('target', target, TARGETS)
    _check_choice('teacher_norm', teacher_norm, TEACHER_NORMS)
    if compares_many_labels:
        raise UsageError('logit distillation compares softmax logits, which multi-label targets do not have')
    if temperature <= 0:
        raise UsageError(f'the KD temperature must be above 0, got {temperature}')


def _create_frozen_loss(name: str, temperature: float) -> nn.Module:
    loss = create_feature_loss(name)
    if any(p.requires_grad for p in loss.parameters()):
        raise UsageError(
            f"feature loss '{name}' has parameters, which no optimizer trains: freeze them, or make them part of a projector"
        )
    if isinstance(loss, KlLoss):
        loss.temperature = temperature
    return loss


def _resolve_teacher(
    teacher: str | nn.Module,
    student: nn.Module,
    checkpoint: str | None,
    cfg_overlay: dict[str, Any] | None,
    tap: str | None,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    device: torch.device,
    needs_logits: bool,
) -> Teacher:
    cfg = getattr(student, 'pretrained_cfg', None) or {}
    mean, std = mean or cfg.get('mean'), std or cfg.get('std')
    if isinstance(teacher, Teacher):
        if needs_logits and not teacher.needs_logits:
            raise UsageError(
                'the teacher was made with needs_logits=False, but a loss compares logits: make it with True'
            )
        if mean and std and (tuple(mean), tuple(std)) != (teacher.input_mean, teacher.input_std):
            _logger.info(f'The teacher keeps the input normalization it was made with, {teacher.input_mean}.')
        return teacher
    return create_teacher(
        teacher,
        checkpoint=checkpoint,
        model_kwargs={'pretrained_cfg_overlay': cfg_overlay} if cfg_overlay else None,
        tap=tap,
        input_mean=mean,
        input_std=std,
        device=device,
        needs_logits=needs_logits,
    )


def _check_apart(student: nn.Module, teacher: str | nn.Module) -> None:
    parameters = set() if isinstance(teacher, str) else {id(p) for p in teacher.parameters()}
    if any(id(p) in parameters for p in student.parameters()):
        raise UsageError(
            'student and teacher share parameters, and a teacher is frozen: give copy.deepcopy(student) as the teacher'
        )


def _check_dim(name: str, given: int | None, measured: int) -> None:
    if given is not None and given != measured:
        raise UsageError(f'{name} is {given}, but the feature that enters the classifier has {measured} channels')


def _check_choice(name: str, given: str, allowed: Iterable[str]) -> None:
    if given not in allowed:
        raise UsageError(f"unknown {name} '{given}': choose from {', '.join(allowed)}")


def _has_classifier(student: nn.Module, task_loss_weight: float | None) -> bool:
    if getattr(student, 'num_classes', None) != 0:
        return True
    if task_loss_weight:
        raise UsageError(
            'the student has no classifier (num_classes=0), so there is no task loss: leave task_loss_weight out, or give a '
            'criterion for its features'
        )
    return False


def _num_classes(model: nn.Module, what: str) -> int:
    classes = getattr(model, 'num_classes', None)
    if not classes:
        raise UsageError(f"the {what} has no logits to project (its num_classes is {classes}): use target 'feature'")
    return classes


def _check_classes(student: nn.Module, teacher: Teacher) -> None:
    classes = getattr(student, 'num_classes', None)
    if teacher.num_classes is not None and classes != teacher.num_classes:
        raise UsageError(
            f'logit distillation compares logits of equal classes, the student has {classes} and the teacher '
            f'{teacher.num_classes}: set the KD weight to 0 (features need no equal classes) or take another teacher'
        )
