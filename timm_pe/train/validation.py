"""The validation of a run after an epoch: by labels, or without them by what the student has learnt from the teacher."""

import logging
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from typing import Protocol, cast

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from timm.utils import unwrap_model

from ..config.teachers import teachers_of
from ..data.knn_data import warn_of_trained
from ..method.task import ProjectorEnsembleModule, ProjectorEnsembleTask
from ..method.teacher import Teacher, TeacherOutput
from ..process.runtime import Runtime, ranks_together
from .build import Parts
from .evaluate import create_evaluator, eval_batches, validate
from .first_look import check_teachers
from .knn import Knn
from .probes import normalize_in_batches
from .trackers import TeacherAgreement

_logger = logging.getLogger(__name__)

# an effective rank of the student's features under this is a collapse: all images lie on one line
_LEAST_RANK = 1.05
# likewise a variance that is a smaller share of the mean square
_LEAST_VARIANCE = 1e-6
# images held out below which one output for all of them comes close to each
_ENOUGH = 16


class Validation(Protocol):
    """Measures the weights of a run.

    Attributes:
        metric_names: Names of its metrics.
        agreement: Percentage of images on which student and teacher agree, None if not measured.
    """

    @property
    def metric_names(self) -> tuple[str, ...]:
        """See the class."""

    @property
    def agreement(self) -> float | None:
        """See the class."""

    def __call__(
        self, ema: bool, what: str, after_batch: Callable[[], None], is_last: bool = False
    ) -> OrderedDict[str, float]:
        """The metrics by name.

        Args:
            ema: Whether to measure the moving average.
            what: Name of the pass, for its progress.
            after_batch: Called after each batch.
            is_last: Whether it is the last validation of the run, which may measure more.
        """


def create_validation(parts: Parts) -> Validation:
    """The validation of a run, once its teacher is validated or has seen the images that are held out.

    Raises:
        UsageError: Images of --knn-data that do not fit.
    """
    knn = Knn(parts) if parts.config.knn_data else None  # first: it may refuse its images
    if knn is not None and parts.config.unlabeled:
        # it may read many files: the other ranks must not wait for that in a collective of the device
        with ranks_together(parts.runtime):
            if parts.runtime.is_primary:
                warn_of_trained(knn.loaders['validation'].dataset, parts.datasets[0])
    validation = LabelValidation(parts, check_teachers(parts)) if parts.config.has_labels else TeacherValidation(parts)
    if knn is None:
        return validation
    for flags, teacher in zip(teachers_of(parts.config), parts.teachers, strict=True):
        scores = knn(partial(_feature_of, teacher), flags.title, linear=True)
        linear = f'; linear probe {scores["linear"]:.3f} %' if 'linear' in scores else ''
        _logger.info(f'{flags.title}: {knn.describe()} {scores["knn"]:.3f} %{linear}.')
    if not knn.probes:
        _logger.info("No linear probe on --knn-data: it needs scikit-learn (pip install 'timm_pe[analysis]').")
    return WithKnn(validation, knn, cast(ProjectorEnsembleTask, parts.task))


def _feature_of(teacher: Teacher, input: torch.Tensor) -> torch.Tensor:
    output: TeacherOutput = teacher.forward_uncompiled(input)
    return output.feature


class WithKnn:
    """A validation that also measures the kNN top-1 of the student's features, at last that of a linear probe.

    See `Validation`.

    Args:
        validation: What else is measured.
        knn: The kNN.
        task: The task.
    """

    def __init__(self, validation: Validation, knn: Knn, task: ProjectorEnsembleTask):
        self.validation, self.knn, self.task = validation, knn, task
        self.metric_names = (*validation.metric_names, 'knn', *(['linear'] if knn.probes else []))

    @property
    def agreement(self) -> float | None:
        """See `Validation`."""
        return self.validation.agreement

    def __call__(
        self, ema: bool, what: str, after_batch: Callable[[], None], is_last: bool = False
    ) -> OrderedDict[str, float]:
        """See `Validation`."""
        metrics = self.validation(ema, what, after_batch, is_last)
        module = _measured_module(self.task, ema)

        def forward(input: torch.Tensor) -> torch.Tensor:
            module.student(input)
            return module.tap.pop()

        metrics.update(self.knn(forward, what, after_batch, linear=is_last))
        return metrics


def _measured_module(task: ProjectorEnsembleTask, ema: bool) -> ProjectorEnsembleModule:
    """Student and projectors in eval mode, not compiled: graphs that meet other shapes would become dynamic."""
    return cast(ProjectorEnsembleModule, unwrap_model(cast(nn.Module, task.get_trainable_module(ema=ema))).eval())


class LabelValidation:
    """Accuracy on the validation split; see `Validation`.

    Args:
        parts: The run's parts.
        measured: Measures agreement with the teacher for the trackers, if that costs nothing, else None.
    """

    def __init__(self, parts: Parts, measured: TeacherAgreement | None):
        self.config, self.runtime, self.data, self.task = parts.config, parts.runtime, parts.data, parts.training_task
        self.measured = measured
        self.metric_names = tuple(create_evaluator(self.config, self.runtime, self.data.eval).metric_names)

    @property
    def agreement(self) -> float | None:
        """See `Validation`."""
        return self.measured.percent if self.measured else None

    def __call__(
        self, ema: bool, what: str, after_batch: Callable[[], None], is_last: bool = False
    ) -> OrderedDict[str, float]:
        """See `Validation`."""
        model = cast(nn.Module, self.task.get_eval_model(ema=ema)).eval()
        forward = model if self.measured is None else self.measured.compare(model)
        metrics = validate(forward, self.data.eval, self.runtime, self.config, what, after_batch)
        if self.measured is not None:
            self.measured.finish(self.runtime.distributed)
        return metrics


class TeacherValidation:
    """What the student has learnt from the teachers, on images that are held out; see `Validation`.

    - loss: the feature loss, without that of maps.
    - cosine: the mean over images of the cosine, from -1 to 1, between the mean of the projectors' outputs and the
      teacher's feature, as the loss compares them: normalized over random batches of the size of training. Of several
      teachers it is the weighted mean, and cosine_NAME is that of each.
    - effective_rank: how many directions the student's features fill, see `Moments`.

    The teachers see the images once, before the first epoch: their features are kept in memory.

    Args:
        parts: The run's parts.
    """

    agreement: float | None = None

    def __init__(self, parts: Parts):
        self.config, self.runtime, self.data = parts.config, parts.runtime, parts.data
        self.task = cast(ProjectorEnsembleTask, parts.task)
        self.warned = False
        self.names = [f'cosine_{name}' for name in self.task.teacher_names] if len(parts.teachers) > 1 else []
        self.metric_names = ('loss', 'cosine', *self.names, 'effective_rank')
        # of each teacher what its features ask for, batch by batch, of the images that count
        self.aims: list[list[torch.Tensor]] = []
        self.teacher_ranks: list[float] = []
        self.constants: list[float] = []  # mean cosine that one output for all images could reach
        for flags, teacher in zip(teachers_of(self.config), parts.teachers, strict=True):
            self._see(flags.title, teacher)

    def _see(self, who: str, teacher: Teacher) -> None:
        """Keep what the features of a teacher ask for, and log what a student could reach."""
        moments, features = Moments(teacher.width, self.runtime), []
        for input, _, size in eval_batches(self.data.eval, self.runtime, self.config, who):
            with self.runtime.autocast():
                feature = _feature_of(teacher, input)[:size]
            features.append(feature.float().cpu())
            moments.add(feature)
        # the images lie class by class in many folders: a batch of neighbours has other statistics than one of training
        norm, batch_size = self.task.teacher_norm, self.config.batch_size
        aims = normalize_in_batches(torch.cat(features), norm, batch_size, self.runtime.device).float()
        directions = F.normalize(aims, dim=1).sum(0).to(moments.sums)
        moments.share()
        self._share(directions)
        self.aims.append(list(aims.split([len(feature) for feature in features])))
        self.teacher_ranks.append(moments.effective_rank)
        # the best constant is the mean direction, so its mean cosine is the length of that mean
        constant = float(directions.norm() / moments.images)
        self.constants.append(constant)
        _logger.info(
            f'{who}: on the {len(self.data.eval.dataset)} images held out its features have an effective rank of '
            f'{moments.effective_rank:.2f}; a student that gives the same for each image could reach a cosine of '
            f'{constant:.3f}.'
        )

    def _share(self, sums: torch.Tensor) -> None:
        """Add up sums of all ranks, in place."""
        if self.runtime.distributed:
            dist.all_reduce(sums)

    @torch.no_grad()
    def __call__(
        self, ema: bool, what: str, after_batch: Callable[[], None], is_last: bool = False
    ) -> OrderedDict[str, float]:
        """See `Validation`."""
        module = _measured_module(self.task, ema)
        moments = Moments(module.tap.width, self.runtime)
        projectors = module.feature_projectors
        # of each teacher loss and cosine
        sums = torch.zeros(len(projectors), 2, dtype=moments.sums.dtype, device=self.runtime.device)
        known = zip(*self.aims, strict=True)
        batches = eval_batches(self.data.eval, self.runtime, self.config, what, after_batch)
        for (input, _, size), aims in zip(batches, known, strict=True):
            with self.runtime.autocast():
                module.student(input)
                feature = module.tap.pop()
                projected = [projector(feature) for projector in projectors]
            moments.add(feature[:size])
            if size:
                pairs = zip(projected, aims, strict=True)
                sums += torch.stack([self._measure(p[:size].float(), aim.to(p.device)) * size for p, aim in pairs])
        moments.share()
        self._share(sums)
        self._warn_of_collapse(moments)
        means = sums / moments.images
        loss, cosine = (means.T @ means.new_tensor(self.task.teacher_weights)).tolist()
        constant = sum(w * c for w, c in zip(self.task.teacher_weights, self.constants, strict=True))
        if is_last and cosine <= constant and moments.images >= _ENOUGH:
            whose = 'of the moving average' if ema else 'of the student'
            remedy = 'a lower --model-ema-decay' if ema else 'another --lr'
            _logger.warning(
                f'The last cosine {whose}, {cosine:.3f}, is no higher than the {constant:.3f} of one that gives the same for each '
                f'image: it has not learnt to tell images apart. Longer training or {remedy} may help.'
            )
        each = dict(zip(self.names, means[:, 1].tolist(), strict=False))
        return OrderedDict(loss=loss, cosine=cosine, **each, effective_rank=moments.effective_rank)

    def _measure(self, projected: torch.Tensor, aim: torch.Tensor) -> torch.Tensor:
        """Feature loss and mean cosine of projections and what they should be `[b, m]`."""
        return torch.stack([self.task.feature_loss(projected, aim), F.cosine_similarity(projected, aim, dim=1).mean()])

    def _warn_of_collapse(self, moments: 'Moments') -> None:
        rank = moments.effective_rank
        if self.warned or not (rank < _LEAST_RANK or moments.variance_share < _LEAST_VARIANCE):
            return
        self.warned = True
        _logger.warning(
            f"THE STUDENT'S FEATURES HAVE COLLAPSED: on the images held out their effective rank is {rank:.2f} (the teacher's: "
            f'{", ".join(f"{r:.2f}" for r in self.teacher_ranks)}), so they tell images hardly apart: a lower --lr, a longer '
            f'warmup or another optimizer may help.'
        )


class Moments:
    """First and second moments of features, over batches and ranks.

    Args:
        width: Width d of the features.
        runtime: Device and ranks.

    Attributes:
        images: Number of images so far.
    """

    def __init__(self, width: int, runtime: Runtime):
        self.runtime, self.images = runtime, 0.0
        # MPS has no float64
        dtype = torch.float32 if runtime.device.type == 'mps' else torch.float64
        self.sums = torch.zeros(width, dtype=dtype, device=runtime.device)
        self.products = torch.zeros(width, width, dtype=dtype, device=runtime.device)

    def add(self, feature: torch.Tensor) -> None:
        """Add the features `[b, d]` of a batch."""
        feature = feature.to(self.sums.dtype)
        self.images += len(feature)
        self.sums += feature.sum(0)
        self.products += feature.T @ feature

    def share(self) -> None:
        """Add up the moments of all ranks; all ranks must call it."""
        if not self.runtime.distributed:
            return
        images = torch.tensor(self.images, device=self.sums.device)
        for part in (self.sums, self.products, images):
            dist.all_reduce(part)
        self.images = images.item()

    @property
    def _covariance(self) -> torch.Tensor:
        mean = self.sums / self.images
        return self.products / self.images - mean[:, None] * mean

    @property
    def effective_rank(self) -> float:
        """Number of directions that the features fill, the participation ratio of the eigenvalues of their covariance.

        (sum of eigenvalues)^2 / sum of squared eigenvalues: 1 on a line, d for the same variance in each direction; 0
        without any variance.
        """
        covariance = self._covariance
        squares = covariance.square().sum()
        return float(covariance.trace() ** 2 / squares) if squares > 0 else 0.0

    @property
    def variance_share(self) -> float:
        """Their variance as a share of their mean square; 0 if all are zero."""
        square = self.products.trace() / self.images
        return float(self._covariance.trace() / square) if square > 0 else 0.0
