"""Checks before training: are the teacher's outputs finite, and is its accuracy above chance?"""

import copy
import functools
import logging
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
import torch.nn as nn
from timm.task import evaluation_sample_limit
from timm.utils import unwrap_model
from torch.utils.data import IterableDataset

from ..config.teachers import OneTeacher, teachers_of
from ..data.epochs import first_batch
from ..data.loaders import create_eval_loader
from ..errors import UsageError
from ..method.task import ProjectorEnsembleModule, ProjectorEnsembleTask
from ..method.teacher import Teacher, TeacherOutput
from ..process.runtime import Runtime
from .build import Parts
from .cache import TeacherCache
from .evaluate import format_metrics, validate
from .from_run import teacher_input
from .learnt_classes import other_class_of_teacher
from .run_cache import open_teacher_caches, outputs_of
from .teacher_precision import settle_precision
from .trackers import TeacherAgreement, is_tracked

_logger = logging.getLogger(__name__)


def prepare_teachers(parts: Parts, meaning: Mapping[str, Any]) -> list[TeacherCache]:
    """Settle the precision of the teachers, open their caches, which depend on it, and look at their first outputs.

    Raises:
        UsageError: See `open_teacher_caches` and `look_at_first_batch`.

    Returns:
        The cache of each, none without --teacher-cache.
    """
    batch = functools.cache(functools.partial(first_batch, parts.data.train))
    settle_precision(parts, meaning, batch)
    caches = open_teacher_caches(parts.config, parts.teachers, parts.data, parts.runtime)
    if isinstance(parts.task, ProjectorEnsembleTask):
        look_at_first_batch(parts.task, batch(), parts.runtime, caches)
    return caches


def look_at_first_batch(
    task: ProjectorEnsembleTask, batch: tuple[Any, Any], runtime: Runtime, caches: Sequence[TeacherCache] = ()
) -> None:
    """Run the teachers on the first batch of epoch 0: refuse outputs that are not finite, and decide each 'auto'
    activation.

    Raises:
        UsageError: A feature, logit or map that is not finite, or a projector's parameter without a gradient.
    """
    for projectors in task.projectors:
        projectors.check_gradients()
    input, target = batch
    input = input.to(runtime.device, runtime.model_dtype or torch.float32)
    with runtime.autocast():
        outputs = outputs_of(task.teachers, caches, input, target)
        for name, output in zip(task.teacher_names, outputs, strict=True):
            whose = f"the teacher's {{}} ({name})" if len(outputs) > 1 else "the teacher's {}"
            for what, values in (('features', output.feature), ('logits', output.logits), ('maps', output.map)):
                if values is not None and not torch.isfinite(values).all():
                    raise UsageError(
                        f'{whose.format(what)} on the first training batch are not finite: are its weights right, is '
                        f'--teacher-dtype wide enough?'
                    )
        if task.kd_loss_weight and any(outputs[i].logits is None for i in task.kd_teachers):
            raise UsageError(
                '--kd-loss-weight compares logits [b, c]: a teacher gives none, or more than that one tensor'
            )
        _warn_of_single_positions(task, input, outputs)
        open_aims = [i for i, projectors in enumerate(task.projectors) if projectors.act == 'auto']
        task.resolve_act(input, outputs)
    for i in open_aims:
        _logger.info(f'--pe-act auto is {task.describe_act(i)}')


@torch.no_grad()
def _warn_of_single_positions(
    task: ProjectorEnsembleTask, input: torch.Tensor, outputs: Sequence[TeacherOutput]
) -> None:
    module = cast(ProjectorEnsembleModule, unwrap_model(cast(nn.Module, task.get_trainable_module())))
    if module.map_tap is None:
        return
    grids = {
        f"The teacher's map ({name})": output.map.shape[2:]
        for name, output in zip(task.teacher_names, outputs, strict=True)
        if output.map is not None
    }
    mode = module.training
    module.eval().student(input[:1])
    grids["The student's map"] = module.map_tap.pop().shape[2:]
    module.tap.pop()
    module.train(mode)
    for whose, grid in grids.items():
        if grid.numel() == 1:
            _logger.warning(
                f'{whose} has a single position at this image size: --pe-map-weight compares features a second time; larger '
                f'images have more positions.'
            )


def check_teachers(parts: Parts) -> TeacherAgreement | None:
    """Validate the teachers through the student's own loader: a wrongly loaded teacher teaches nothing.

    Returns:
        For a run with trackers and one teacher, its predictions to compare the student's with; else None.
    """
    config = parts.config
    if not config.teacher_eval or not config.has_labels:
        return None
    settings = teachers_of(config)
    found = [_check_teacher(parts, *of_teacher) for of_teacher in zip(settings, parts.teachers, strict=True)]
    return found[0] if len(found) == 1 else None


def _check_teacher(parts: Parts, flags: OneTeacher, teacher: Teacher) -> TeacherAgreement | None:
    config, data, runtime, who = parts.config, parts.data, parts.runtime, flags.title
    num_classes = parts.num_classes
    if teacher.num_classes != num_classes:
        _logger.info(
            f'{who}: its {teacher.num_classes} classes are not the {num_classes} of the data, so its accuracy cannot be '
            f'checked.'
        )
        return None
    other_class = other_class_of_teacher(flags, teacher, data.eval.dataset)
    if other_class:
        _logger.info(
            f'{who}: it has learnt other classes than those of the data ({other_class}), so its accuracy cannot be checked.'
        )
        return None
    if config.task == 'multilabel':
        metrics = validate(teacher.forward_logits, data.eval, runtime, config, who)
        _logger.info(f'{who}: {format_metrics(metrics, num_classes)} on the validation split.')
        return None
    # the images of a stream come in no fixed order
    measured = is_tracked(config) and not isinstance(data.eval.dataset, IterableDataset)
    agreement = TeacherAgreement(evaluation_sample_limit(data.eval)) if measured else None
    forward = teacher.forward_logits if agreement is None else agreement.record(teacher.forward_logits)
    metrics = validate(forward, data.eval, runtime, config, who)
    said, best = format_metrics(metrics, num_classes), metrics['top1']
    own = _own_input(parts, flags, teacher)
    if own is None:
        _logger.info(f'{who}: {said} on the validation split.')
    else:
        loader = create_eval_loader(config, copy.copy(data.eval.dataset), own, runtime)
        own_metrics = validate(teacher.forward_logits, loader, runtime, config, who)
        best = max(best, own_metrics['top1'])
        own_said = format_metrics(own_metrics, num_classes)
        if own_said == said:
            _logger.info(f"{who}: {said} on the validation split, by its own transforms as by this run's.")
        else:
            _logger.info(f'{who}: {own_said} on the validation split by its own transforms ({_describe_input(own)}),')
            _logger.info(f"{who}: {said} by this run's ({_describe_input(data.config)}), as it teaches.")
    chance, images = 1 / num_classes, len(data.eval.dataset)
    at_chance = num_classes > 1 and best / 100 < chance + 3 * (chance * (1 - chance) / images) ** 0.5
    if at_chance and not flags.is_random:
        _logger.warning(
            f'{who.replace("Teacher", "THE TEACHER", 1)} IS AT CHANCE LEVEL (top-1 {best:.2f} % of {num_classes} classes): '
            f'were its weights loaded, are the classes in its order?'
        )
    return agreement


def _own_input(parts: Parts, flags: OneTeacher, teacher: Teacher) -> dict[str, Any] | None:
    """The data config of the teacher's own validation, with the normalization of the run's batches.

    None if it is unknown, equals this run's, or cannot be used with the teacher as this run sets it up.
    """
    config, data = parts.config, parts.data
    own = teacher_input(flags, teacher)
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
