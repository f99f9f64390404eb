"""Checks before training: are the teacher's outputs finite, and is its accuracy above chance?"""

import copy
import functools
import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from timm.task import evaluation_sample_limit
from torch.utils.data import IterableDataset

from ..data.epochs import first_batch
from ..data.loaders import create_eval_loader
from ..errors import UsageError
from ..method.task import ProjectorEnsembleTask
from ..method.teacher import Teacher
from ..process.runtime import Runtime
from .build import Parts
from .cache import TeacherCache
from .evaluate import format_metrics, validate
from .from_run import teacher_input
from .run_cache import open_teacher_cache
from .run_task import has_random_weights, other_class_of_teacher
from .teacher_precision import settle_precision
from .trackers import TeacherAgreement, is_tracked

_logger = logging.getLogger(__name__)


def prepare_teacher(parts: Parts, meaning: Mapping[str, Any]) -> TeacherCache | None:
    """Settle the teacher's precision, open its cache, which depends on it, and look at its first outputs.

    Raises:
        UsageError: See `open_teacher_cache` and `look_at_first_batch`.

    Returns:
        The cache, if there is one.
    """
    batch = functools.cache(functools.partial(first_batch, parts.data.train))
    settle_precision(parts, meaning, batch)
    cache = open_teacher_cache(parts.config, parts.teacher, parts.data, parts.runtime)
    if isinstance(parts.task, ProjectorEnsembleTask):
        look_at_first_batch(parts.task, batch(), parts.runtime, cache)
    return cache


def look_at_first_batch(
    task: ProjectorEnsembleTask, batch: tuple[Any, Any], runtime: Runtime, cache: TeacherCache | None = None
) -> None:
    """Run the teacher on the first batch of epoch 0: refuse outputs that are not finite, and decide an 'auto'
    activation.

    Raises:
        UsageError: A feature or logit that is not finite, or a projector's parameter without a gradient.
    """
    task.projection.check_gradients()
    input, target = batch
    input = input.to(runtime.device, runtime.model_dtype or torch.float32)
    with runtime.autocast():
        teacher = cache(target, lambda: task.teacher(input)) if cache is not None else task.teacher(input)
        for what, values in (('features', teacher.feature), ('logits', teacher.logits)):
            if values is not None and not torch.isfinite(values).all():
                raise UsageError(
                    f"the teacher's {what} on the first training batch are not finite: are its weights right, is "
                    f'--teacher-dtype wide enough?'
                )
        if task.projection.act != 'auto':
            return
        act = task.resolve_act(input, teacher)
    signs = 'all >= 0' if act == 'relu' else 'of both signs'
    _logger.info(f"--pe-act auto is '{act}': the teacher's features on the first training batch are {signs}.")


def check_teacher(parts: Parts) -> TeacherAgreement | None:
    """Validate the teacher through the student's own loader: a wrongly loaded teacher teaches nothing.

    Returns:
        For a run with trackers, the teacher's predictions to compare the student's with; else None.
    """
    config, teacher, data, runtime = parts.config, parts.teacher, parts.data, parts.runtime
    num_classes = parts.num_classes
    if teacher is None or not config.teacher_eval or not config.has_labels:
        return None
    if teacher.num_classes != num_classes:
        _logger.info(
            f'Teacher: its {teacher.num_classes} classes are not the {num_classes} of the data, so its accuracy cannot be '
            f'checked.'
        )
        return None
    other_class = other_class_of_teacher(config, data)
    if other_class:
        _logger.info(
            f'Teacher: its run has learnt other classes than those of the data ({other_class}), so its accuracy cannot be '
            f'checked.'
        )
        return None
    if config.task == 'multilabel':
        metrics = validate(teacher.forward_logits, data, runtime, config, 'Teacher')
        _logger.info(f'Teacher: {format_metrics(metrics, num_classes)} on the validation split.')
        return None
    # the images of a stream come in no fixed order
    measured = is_tracked(config) and not isinstance(data.eval.dataset, IterableDataset)
    agreement = TeacherAgreement(evaluation_sample_limit(data.eval)) if measured else None
    forward = teacher.forward_logits if agreement is None else agreement.record(teacher.forward_logits)
    metrics = validate(forward, data, runtime, config, 'Teacher')
    said, best = format_metrics(metrics, num_classes), metrics['top1']
    own = _own_input(parts, teacher)
    if own is None:
        _logger.info(f'Teacher: {said} on the validation split.')
    else:
        loader = create_eval_loader(config, copy.copy(data.eval.dataset), own, runtime)
        own_metrics = validate(teacher.forward_logits, replace(data, eval=loader), runtime, config, 'Teacher')
        best = max(best, own_metrics['top1'])
        _logger.info(
            f'Teacher: {format_metrics(own_metrics, num_classes)} on the validation split by its own transforms '
            f"({_describe_input(own)}), {said} by this run's ({_describe_input(data.config)})."
        )
    chance, images = 1 / num_classes, len(data.eval.dataset)
    at_chance = num_classes > 1 and best / 100 < chance + 3 * (chance * (1 - chance) / images) ** 0.5
    if at_chance and not has_random_weights(config):
        _logger.warning(
            f'THE TEACHER IS AT CHANCE LEVEL (top-1 {best:.2f} % of {num_classes} classes): were its weights '
            f'loaded, are the classes in its order?'
        )
    return agreement


def _own_input(parts: Parts, teacher: Teacher) -> dict[str, Any] | None:
    """The data config of the teacher's own validation, with the normalization of the run's batches.

    None if it is unknown, equals this run's, or cannot be used with the teacher as this run sets it up.
    """
    config, data = parts.config, parts.data
    own = teacher_input(config, teacher)
    if own is None or config.torchcompile or isinstance(data.eval.dataset, IterableDataset):
        return None
    channels, size = data.config['input_size'][0], own['input_size'][1:]
    mine = {**own, 'input_size': (channels, *size), 'mean': data.config['mean'], 'std': data.config['std']}
    same = all(mine[name] == data.config[name] for name in ('input_size', 'crop_pct', 'interpolation', 'crop_mode'))
    if same or teacher.size_for(torch.empty(1, channels, *size, device=teacher.scale.device)) != tuple(size):
        return None
    return mine


def _describe_input(config: Mapping[str, Any]) -> str:
    return f'{"x".join(map(str, config["input_size"][1:]))}, crop {config["crop_pct"]:g}, {config["interpolation"]}'
