"""The training task: batch -> student and its projectors <- teacher -> loss. A task of timm's kind (timm.task)."""

import logging
from collections.abc import Callable, Sequence
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
from timm.utils import unwrap_model

from ..errors import UsageError, one_line
from .aims import Aim, measure_aims, sum_of
from .checks import (
    check_dim,
    check_drop,
    check_settings,
    check_weights,
    check_whole_maps,
    create_frozen_loss,
    has_classifier,
    widths_of,
)
from .losses import DirectionLoss, average_logits, kd_loss
from .map_tap import MapTap
from .names import TARGETS
from .projectors import ProjectorEnsemble
from .tap import FeatureTap
from .teacher import Teacher, TeacherOutput
from .teachers import (
    TeacherLike,
    as_list,
    check_apart,
    check_single,
    keep_out_of_state_dict,
    name_teachers,
    normalize_weights,
    resolve_teacher,
    settle_input_norms,
    teachers_of_classes,
    told_input_norm,
)
from .trainable import ProjectorEnsembleModule

_logger = logging.getLogger(__name__)


class ProjectorEnsembleTask(FeatureDistillationTask):
    """Projector Ensemble Feature Distillation (Chen et al., NeurIPS 2022, arXiv 2210.15274).

    loss = task_loss_weight * criterion + distill_loss_weight * feature loss + kd_loss_weight * T^2 KL(teacher || student)
           + map_weight * direction loss of the feature maps

    It takes every keyword of `timm.task.FeatureDistillationTask` and returns the same (`loss`, `output`, named terms), so it
    can replace it. Three differences: the weights default to 1 and 25 independently, while timm derives one from the other;
    the term is called `pe_loss`, not `kd_loss`; a teacher given by name keeps its own classes.

    Several teachers have projectors of their own each. The feature loss is the weighted mean of theirs; logit distillation
    compares with the weighted mean of the probabilities (at temperature T) of those that have the student's classes.

    Args:
        student_model: Student model to train, on its device.
        teacher_model: A timm name, any module, a `Teacher`, or a timm `DistillationTeacher`. A name is created with its
            own pretrained weights and its own classes. The module is frozen in place. A list of them for several.
        criterion: Task loss. Created by timm's create_classification_loss() from criterion_kwargs when None; a student
            without a classifier (num_classes=0) then has none, and targets are not read.
        criterion_kwargs: Arguments for it.
        teacher_pretrained_path: Checkpoint for a teacher given by name or as a module.
        teacher_pretrained_cfg_overlay: timm's pretrained cfg overrides for a teacher given by name.
        distill_loss_weight: Weight of the projectors' loss, None means 25 (0.9 for logits).
        task_loss_weight: Weight of the task loss, None means 1 (0.1 for logits).
        student_feature_dim: Checked against the measured width d if given.
        teacher_feature_dim: Checked against the measured width m if given.
        num_projectors: q, None means 3, or 1 of the kind identity.
        projector: Kind of projector, see `list_projectors`.
        act: Activation of the projectors: 'relu' (the paper's), 'none', or 'auto': relu exactly when the features of
            the teacher on the first batch (rank 0's), after `teacher_norm`, are all >= 0.
        feature_loss: See `list_feature_losses`; None means 'direction' for features and 'kl' for logits.
        target: 'feature': the projectors map the student's feature to the teacher's; 'logits': its logits to the
            teacher's (kd1proj with one projector, arXiv 2310.17183), whose classes may differ. 'auto' then means no
            activation.
        teacher_norm: See `normalize_teacher`.
        kd_loss_weight: Weight of plain logit distillation.
        kd_temperature: Temperature T of that, and of 'kl'.
        input_mean: Mean the batch is normalized with; None takes what a given `Teacher` was made with, else reads the
            student's pretrained_cfg, as timm does.
        input_std: Its standard deviation, likewise.
        multi_label: Whether targets are dense `[b, c]`; a default criterion and `create_evaluator()` then suit them.
        threshold: Probability that counts as a prediction in that evaluator.
        student_tap: Path of the module whose input is the student's feature, for models that are not timm's.
        teacher_tap: The same for the teacher.
        teacher_weights: How much each teacher counts, above 0, in any scale; None means equally.
        teacher_drop: In training, the probability with which an image does not learn from a teacher that it does not match
            worst, see `aims.draw_kept` (UNIC, arXiv 2408.05088). For several teachers and a loss of rows ('direction').
        map_weight: Weight of the direction loss between the last feature maps (or patch tokens) of student and teacher,
            which are brought to the smaller grid and have projectors of their own, applied at each position; 0: none.
        device: Device for teacher and projectors; None is the student's.
        dtype: Dtype of the projectors.
        verbose: Log what was resolved.

    Raises:
        UsageError: An argument does not fit; the message gives its value and what is allowed.

    Attributes:
        teacher: The `Teacher`; of several, a `ModuleList` of them.
        teacher_names: A name for each, unique.
        aims: What the student is aimed at, one `Aim` for each output of a teacher that a projector maps to.
    """

    teacher: Teacher | nn.ModuleList  # type: ignore[assignment]  # timm's has its own kind

    def __init__(
        self,
        student_model: nn.Module,
        teacher_model: TeacherLike | Sequence[TeacherLike],
        criterion: nn.Module | Callable[..., torch.Tensor] | None = None,
        criterion_kwargs: dict[str, Any] | None = None,
        teacher_pretrained_path: str | None = None,
        teacher_pretrained_cfg_overlay: dict[str, Any] | None = None,
        distill_loss_weight: float | None = None,
        task_loss_weight: float | None = None,
        student_feature_dim: int | None = None,
        teacher_feature_dim: int | None = None,
        num_projectors: int | None = None,
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
        teacher_weights: Sequence[float] | None = None,
        teacher_drop: float = 0.0,
        map_weight: float = 0.0,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        verbose: bool = True,
    ):
        # not FeatureDistillationTask's: it would build its own Linear and its own idea of the widths
        places = (p.device for p in student_model.parameters())
        device = device or next((place for place in places if place.type != 'meta'), None)
        TrainingTask.__init__(self, device=device, dtype=dtype, verbose=verbose)
        needs_logits = bool(kd_loss_weight) or target == 'logits'
        check_settings(target, teacher_norm, kd_temperature, multi_label and needs_logits)
        check_weights(
            distill_loss_weight=distill_loss_weight,
            task_loss_weight=task_loss_weight,
            kd_loss_weight=kd_loss_weight,
            map_weight=map_weight,
        )
        models, student = as_list(teacher_model), unwrap_model(student_model)
        of_one = teacher_pretrained_path, teacher_pretrained_cfg_overlay, teacher_tap
        check_single(len(models), *of_one, teacher_feature_dim)
        weights = normalize_weights(teacher_weights, len(models))
        check_apart(student, models)
        if map_weight:
            check_whole_maps(student)
        map_tap = MapTap(student) if map_weight else None  # before the other tap: it runs the model
        tap = FeatureTap(student, student_tap, before_dropout=True)
        input_mean, input_std = told_input_norm(models, input_mean, input_std)
        given = *of_one, input_mean, input_std, self.device, needs_logits
        self._set_teachers([resolve_teacher(model, student, *given) for model in models], weights)
        check_dim('student_feature_dim', student_feature_dim, tap.width)
        check_dim('teacher_feature_dim', teacher_feature_dim, self.teachers[0].width)
        self.multi_label, self.threshold = multi_label, threshold
        self.kd_loss_weight, self.kd_temperature = kd_loss_weight, kd_temperature
        # the teachers that logits are compared with
        self.kd_teachers = teachers_of_classes(student, self.teachers, self.teacher_names) if kd_loss_weight else []
        self._set_task_loss(student, criterion, criterion_kwargs, task_loss_weight, TARGETS[target].task_loss_weight)
        self._set_distillation(target, feature_loss, distill_loss_weight, teacher_norm, teacher_drop)
        self.map_weight, self.map_loss = map_weight, DirectionLoss()
        self.aims = self._create_aims()
        projections = self._create_projectors(student, tap, map_tap, num_projectors, projector, act)
        tapped = [aim.tapped for aim in self.aims]
        self.trainable_module = ProjectorEnsembleModule(student_model, projections, tapped, tap, map_tap)
        settle_input_norms(self.teachers, student, input_mean, input_std)
        keep_out_of_state_dict(self)
        self._log_settings()

    def _set_teachers(self, teachers: list[Teacher], weights: list[float]) -> None:
        self.teacher = teachers[0] if len(teachers) == 1 else nn.ModuleList(teachers)
        self.teacher_names, self.teacher_weights = name_teachers(teachers), weights

    def _set_task_loss(
        self,
        student: nn.Module,
        criterion: nn.Module | Callable[..., torch.Tensor] | None,
        criterion_kwargs: dict[str, Any] | None,
        weight: float | None,
        default: float,
    ) -> None:
        self.criterion = None  # type: ignore[assignment]  # timm's tasks always have one
        if criterion is not None or has_classifier(student, weight):
            self.criterion = resolve_classification_loss(
                criterion, self.device, multi_label=self.multi_label, criterion_kwargs=criterion_kwargs
            )
        self.task_loss_weight = 0.0 if self.criterion is None else default if weight is None else weight

    def _set_distillation(
        self, target: str, loss: str | None, weight: float | None, teacher_norm: str, teacher_drop: float
    ) -> None:
        recipe = TARGETS[target]
        self.feature_loss_name = loss or recipe.feature_loss
        self.feature_loss = create_frozen_loss(self.feature_loss_name, self.kd_temperature).to(self.device)
        check_drop(teacher_drop, len(self.teachers), self.feature_loss, self.feature_loss_name)
        self.distill_loss_weight = recipe.distill_loss_weight if weight is None else weight
        self.target, self.teacher_norm, self.teacher_drop = target, teacher_norm, teacher_drop

    def _create_aims(self) -> list[Aim]:
        """The features (or logits) of each teacher, then with a weight their maps."""
        tapped = [(self.target, 'pe_loss', self.feature_loss_name)]
        if self.map_weight:
            tapped.append(('map', 'map_loss', 'direction'))
        return [
            Aim(f'{what}_{name}', i, what, term, f'{term}_{name}', self.teacher_weights[i], loss, self.teacher_norm)
            for what, term, loss in tapped
            for i, name in enumerate(self.teacher_names)
        ]

    def _create_projectors(
        self, student: nn.Module, tap: FeatureTap, map_tap: MapTap | None, number: int | None, kind: str, act: str
    ) -> dict[str, ProjectorEnsemble]:
        """Those of each aim, by its name."""
        created = {}
        for aim in self.aims:
            widths = widths_of(aim, tap, map_tap, student, self.teachers[aim.teacher])
            own_act = 'none' if act == 'auto' and aim.tapped == 'logits' else act
            ensemble = ProjectorEnsemble(*widths, number, kind, own_act)
            created[aim.name] = ensemble.to(device=self.device, dtype=self.dtype)
        return created

    def _log_settings(self) -> None:
        if not self.verbose:
            return
        projectors = '; '.join(p.extra_repr() for p in self.projectors)
        more = f', map_weight={self.map_weight}' if self.map_weight else ''
        if len(self.teachers) > 1:
            more += f', teacher_weights={self.teacher_weights}, teacher_drop={self.teacher_drop}'
        _logger.info(
            f'ProjectorEnsembleTask: projectors {projectors}, target={self.target}, '
            f'feature_loss={self.feature_loss_name}, teacher_norm={self.teacher_norm}, '
            f'task_weight={self.task_loss_weight}, distill_weight={self.distill_loss_weight}, '
            f'kd_weight={self.kd_loss_weight}{more}'
        )

    def create_evaluator(self, **kwargs: Any) -> ClassificationEvaluator:
        """timm's evaluator for the kind of targets."""
        if self.multi_label:
            return MultiLabelClassificationEvaluator(device=self.device, threshold=self.threshold, **kwargs)
        return super().create_evaluator(**kwargs)

    @property
    def teachers(self) -> list[Teacher]:
        """The teachers, also of a single one."""
        return [self.teacher] if isinstance(self.teacher, Teacher) else cast(list[Teacher], list(self.teacher))

    @property
    def projection(self) -> Any:
        """The projectors: a `ProjectorEnsemble`, or with several aims a `ModuleDict` of theirs by name."""
        return unwrap_model(self.trainable_module).projection

    @property
    def projectors(self) -> list[ProjectorEnsemble]:
        """The projectors of each of `aims`."""
        return unwrap_model(self.trainable_module).projectors

    @property
    def act(self) -> str | dict[str, str]:
        """Activation of the projectors, with several aims of each by name."""
        acts = {aim.name: p.act for aim, p in zip(self.aims, self.projectors, strict=True)}
        return acts if len(acts) > 1 else self.projectors[0].act

    @property
    def loss_weights(self) -> dict[str, float]:
        """The weight of each raw term in the loss, by its name in the result of `forward`."""
        return {
            'task_loss': self.task_loss_weight,
            'pe_loss': self.distill_loss_weight,
            'map_loss': self.map_weight,
            'logit_loss': self.kd_loss_weight,
        }

    def get_clip_parameters(self, exclude_head: bool = False) -> list[nn.Parameter]:
        """The parameters whose gradients are clipped; `exclude_head` leaves out those of the student's classifiers."""
        module = unwrap_model(self.trainable_module)
        student = unwrap_model(module.student)
        if not exclude_head:
            return list(module.parameters())
        try:
            found = student.get_classifier()
        except (AttributeError, NotImplementedError):  # not timm's
            found = None
        heads = found if isinstance(found, (tuple, list)) else (found,)
        left_out = {id(p) for head in heads if isinstance(head, nn.Module) for p in head.parameters()}
        # of an unknown head timm's guess, the last two parameters
        return (
            [p for p in module.parameters() if id(p) not in left_out] if left_out else super().get_clip_parameters(True)
        )

    def check_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """Refuse an optimizer that trains a projector not at all, or twice in a step.

        Raises:
            UsageError: A parameter of a projector that requires gradients is not in exactly one of its groups.
        """
        grouped = [id(p) for group in optimizer.param_groups for p in group['params']]
        for name, param in self.projection.named_parameters():
            if param.requires_grad and grouped.count(id(param)) != 1:
                raise UsageError(
                    f"the projectors' {name} is in {grouped.count(id(param))} groups of the optimizer, not in 1: make it from "
                    f'task.trainable_module.parameters()'
                )

    @torch.no_grad()
    def resolve_act(
        self, input: torch.Tensor, teacher: TeacherOutput | Sequence[TeacherOutput] | None = None
    ) -> str | dict[str, str]:
        """Decide each 'auto' activation from a batch `[b, ch, h, w]` (rank 0's batch decides); return `act`.

        The teacher's output for the batch can be given, as in `forward`.
        """
        if any(p.act == 'auto' for p in self.projectors):
            self._settle_acts(self._teacher_outputs(input, teacher))
        return self.act

    def _settle_acts(self, outputs: Sequence[TeacherOutput]) -> None:
        undecided = [i for i, p in enumerate(self.projectors) if p.act == 'auto']
        wanted = [self.aims[i].wanted(outputs[self.aims[i].teacher]) for i in undecided]
        non_negative = torch.stack([(values.min() >= 0).to(wanted[0].device) for values in wanted]).to(torch.uint8)
        if dist.is_available() and dist.is_initialized():
            dist.broadcast(non_negative, src=0)
        for i, all_positive in zip(undecided, non_negative.tolist(), strict=True):
            self._set_act(i, 'relu' if all_positive else 'none')
            if self.verbose:
                _logger.info(f"Projector activation 'auto' is {self.describe_act(i)}")

    def describe_act(self, index: int) -> str:
        """In words, which activation 'auto' is of the projectors of this number, and why."""
        aim, ensemble = self.aims[index], self.projectors[index]
        whose = f' of {self.teacher_names[aim.teacher]}' if len(self.teachers) > 1 else ''
        signs = 'are all >= 0' if ensemble.act == 'relu' else 'have both signs'
        linear = ensemble.projector == 'linear' and ensemble.act == 'none' and ensemble.num_projectors > 1
        as_one = f' Without it the mean of the {ensemble.num_projectors} is one linear layer.' if linear else ''
        return f"'{ensemble.act}': the teacher's {aim.wanted_name}{whose} on the first batch {signs}.{as_one}"

    def _set_act(self, index: int, act: str) -> None:
        for ema in (False, True):
            module = self.get_trainable_module(ema=ema)
            if module is not None:
                unwrap_model(module).projectors[index].act = act

    def compile(  # type: ignore[override]  # nn.Module.compile takes anything and gives nothing
        self, backend: str = 'inductor', mode: str | None = None, **compile_kwargs: Any
    ) -> nn.Module:
        """Compile student with projectors, the student alone (evaluation) and the teachers; before DDP.

        Without `dynamic`, teachers get a graph for each shape, see `Teacher.compile`.
        """
        compile_kwargs.update(backend=backend, mode=mode)
        self.eval_model = cast(nn.Module, torch.compile(self.trainable_module.student, **compile_kwargs))
        self.trainable_module = cast(Any, torch.compile(self.trainable_module, **compile_kwargs))
        for teacher in self.teachers:
            teacher.compile(**compile_kwargs)
        return self.eval_model

    def release_student(self, ema: bool = False) -> nn.Module:
        """Take this project's hooks off the student and give it back, with its own dropout; the task cannot train it any more.

        Args:
            ema: The moving average's student.

        Raises:
            UsageError: There is no moving average.
        """
        module = unwrap_model(self.get_trainable_module(ema=ema))
        if module is None:
            raise UsageError('the task has no moving average to release the student of: setup_ema() makes one')
        if module.map_tap is not None:
            module.map_tap.remove()
        module.tap.remove()
        return unwrap_model(module.student)

    def get_task_state(self, module: nn.Module | None = None, ema: bool = False) -> dict[str, Any]:
        """The projectors' state, with what is needed to rebuild them."""
        state = super().get_task_state(module=module, ema=ema)
        of_loss = self.feature_loss.state_dict()
        return state and {
            **state,
            **({'feature_loss': of_loss} if of_loss else {}),
            **self._kind_of_projectors(),
            'act': self.act,
        }

    def _kind_of_projectors(self) -> dict[str, Any]:
        first = self.projectors[0]
        return {'target': self.target, 'projector': first.projector, 'num_projectors': first.num_projectors}

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
        for name, value in self._kind_of_projectors().items():
            if state.get(name, value) != value:
                raise UsageError(f'the checkpoint has {name}={state[name]}, this run {name}={value}')
        self._load_acts(state.get('act', 'auto'))
        try:
            self.feature_loss.load_state_dict(state.get('feature_loss', {}))
        except RuntimeError as e:
            raise UsageError(f"the checkpoint's feature loss is not '{self.feature_loss_name}': {one_line(e)}") from e
        try:
            super().load_task_state(state, strict=strict, module=module, ema=ema)
        except RuntimeError as e:
            own = '; '.join(p.extra_repr() for p in self.projectors)
            raise UsageError(f"the checkpoint's projectors are not those of {own}: {one_line(e)}") from e

    def _load_acts(self, saved: str | dict[str, str]) -> None:
        own = self.act
        theirs, ours = (sorted(acts) if isinstance(acts, dict) else ['a single one'] for acts in (saved, own))
        if theirs != ours:
            raise UsageError(
                f'the checkpoint has projectors to {", ".join(theirs)}, this run to {", ".join(ours)}: give the same '
                f'teachers and map_weight'
            )
        for i, aim in enumerate(self.aims):
            act = saved[aim.name] if isinstance(saved, dict) else saved
            if act == 'auto':
                continue
            if self.projectors[i].act not in ('auto', act):
                raise UsageError(f"the checkpoint's projectors have act={act}, this run act={self.projectors[i].act}")
            self._set_act(i, act)

    def forward(
        self,
        input: torch.Tensor,
        target: torch.Tensor,
        teacher: TeacherOutput | Sequence[TeacherOutput] | None = None,
    ) -> dict[str, torch.Tensor]:
        """One training step's forward.

        Args:
            input: Batch `[b, ch, h, w]`, in the normalization `input_mean`, `input_std`; teacher and student see it.
            target: Labels `[b]`, or soft ones `[b, c]`.
            teacher: The teacher's output for this batch, if known already (a cache): features `[b, m]`, logits
                `[b, c]`, map `[b, d, h, w]`; those that no loss reads may be None. The teacher does not run then. Of
                several a list.

        Returns:
            `loss` (weighted sum), `output` (student logits `[b, c]`), and the raw terms `task_loss` (if there is a
            criterion), `pe_loss`, and with their weights `logit_loss` and `map_loss`; with several teachers `pe_loss` is
            their weighted mean, and `pe_loss_NAME` that of each (`map_loss` likewise).
        """
        # before the student: on a CPU it then reuses memory of the last step, which saves up to a fifth of a step
        outputs = self._teacher_outputs(input, teacher)
        if any(p.act == 'auto' for p in self.projectors):
            self._settle_acts(outputs)
        grids = [aim.value(outputs[aim.teacher]).shape[2:] for aim in self.aims if aim.tapped == 'map']
        logits, *projected = self.trainable_module(input, grids) if grids else self.trainable_module(input)
        drop = self.teacher_drop if self.training else 0.0
        losses = {'pe_loss': self.feature_loss, 'map_loss': self.map_loss}
        terms = {} if self.criterion is None else {'task_loss': self.criterion(logits, target)}
        terms.update(measure_aims(self.aims, losses, projected, outputs, drop))
        if self.kd_loss_weight:
            terms['logit_loss'] = kd_loss(logits, self._kd_target(logits, outputs), self.kd_temperature)
        loss = sum_of([weight * terms[name] for name, weight in self.loss_weights.items() if name in terms])
        return {'loss': loss, 'output': logits, **terms}

    def _teacher_outputs(
        self, input: torch.Tensor, given: TeacherOutput | Sequence[TeacherOutput] | None
    ) -> Sequence[TeacherOutput]:
        """What each teacher gives for a batch, computed if it is not given."""
        if given is None:
            return [teacher(input) for teacher in self.teachers]
        outputs = [given] if isinstance(given, TeacherOutput) else given
        if len(outputs) != len(self.teachers):
            raise UsageError(f'{len(outputs)} outputs are given for {len(self.teachers)} teachers: give one of each')
        return outputs

    def _kd_target(self, logits: torch.Tensor, outputs: Sequence[TeacherOutput]) -> torch.Tensor:
        """Logits `[b, c]` that stand for the teachers of the student's classes."""
        theirs = [outputs[i].logits for i in self.kd_teachers]
        for each in theirs:
            if each is None:
                raise UsageError(
                    'the KD loss compares logits [b, c]: a teacher gives none, or more than that one tensor'
                )
            if logits.shape != each.shape:
                raise UsageError(
                    f'logits of the student {list(logits.shape)} and of the teacher {list(each.shape)} cannot be compared'
                )
        weights = [self.teacher_weights[i] for i in self.kd_teachers]
        return average_logits(cast(list[torch.Tensor], theirs), weights, self.kd_temperature)
