"""The teachers that the flags name."""

import contextlib
import functools
import logging

import torch
import torch.distributed as dist
import torchvision

from ..config.derive import torch_dtype
from ..config.run_config import RunConfig
from ..config.teachers import OneTeacher, teachers_of
from ..data.datasets import count_classes
from ..data.loaders import Data
from ..errors import NoPretrainedWeights, UsageError
from ..method.input_size import Size
from ..method.teacher import Teacher, create_teacher
from ..method.weight_files import read_state_dict
from ..process.runtime import Runtime
from .from_run import teacher_settings
from .learnt_classes import other_class_of_teacher

_logger = logging.getLogger(__name__)


def create_run_teachers(config: RunConfig, data: Data, runtime: Runtime, resizes: bool = True) -> list[Teacher]:
    """The teachers that the flags name; none without --teacher.

    With --teacher-dtype auto the precision is open: `settle_precision` decides it, until then it follows autocast.

    Args:
        config: Run settings.
        data: The data that they have to fit.
        runtime: Device and ranks.
        resizes: Whether to build a network of a fixed input size for the student's.
    """
    return [_create_run_teacher(config, teacher, data, runtime, resizes) for teacher in teachers_of(config)]


def _create_run_teacher(config: RunConfig, flags: OneTeacher, data: Data, runtime: Runtime, resizes: bool) -> Teacher:
    settings = teacher_settings(flags)
    create = functools.partial(
        create_teacher,
        flags.name,
        checkpoint=flags.checkpoint,
        pretrained=flags.pretrained,
        num_classes=flags.num_classes,
        use_ema=flags.ema,
        needs_logits=config.kd_loss_weight > 0 or config.pe_target == 'logits',
        model_kwargs=settings.kwargs,
        what='--teacher',
        student_size=data.config['input_size'][1:] if resizes and not _has_own_size(flags) else None,
        input_mean=data.config['mean'],
        input_std=data.config['std'],
        input_size=flags.input_size,
        mean=settings.mean,
        std=settings.std,
        tap=flags.tap,
        device=runtime.device,
        dtype=None if flags.dtype == 'auto' else torch_dtype(flags.dtype),
        autocast_dtype=torch_dtype(config.amp_dtype) if config.amp and not flags.dtype else None,
        # a CPU runs convolutions up to a third faster so, and the rest no slower (benchmarks/step_time.py)
        channels_last=config.channels_last or runtime.device.type == 'cpu',
        fold=flags.fold,
    )
    try:
        teacher = create()
    except NoPretrainedWeights as e:
        raise UsageError(f'{e} (--teacher-checkpoint FILE or RUN, --teacher local-dir:FOLDER)') from e
    except UsageError as e:
        other = _torchvision_name(flags) if 'missing keys' in str(e) else ''
        if not other:
            raise
        raise UsageError(
            f"{e}; it is torchvision's {other}, which names its weights otherwise: in Python create_teacher("
            f'torchvision.models.{other}(), checkpoint=..., tap=...) takes it'
        ) from e
    _check_classes(config, flags, teacher, data)
    _say_teacher(flags, teacher, data.config['input_size'][1:])
    if runtime.distributed:
        # ranks have different seeds and DDP does not wrap the teacher: random weights would differ between ranks
        for tensor in teacher.state_dict().values():
            dist.broadcast(tensor, src=0)
    return teacher


def _check_classes(config: RunConfig, flags: OneTeacher, teacher: Teacher, data: Data) -> None:
    """Refuse to compare the logits of other classes; of several teachers those of another number are left out."""
    left_out = isinstance(config.teacher, list) and teacher.num_classes != count_classes(data.eval.dataset)
    if not config.kd_loss_weight or left_out:
        return
    other_class = other_class_of_teacher(flags, teacher, data.eval.dataset)
    if other_class:
        raise UsageError(
            f'--kd-loss-weight compares class by class, and the teacher has learnt other classes ({other_class}): give data of '
            f'the same classes, leave the weight at 0, or, if they are the same under other names, give a copy of its weights '
            f'alone (--teacher-checkpoint FILE)'
        )


def _has_own_size(flags: OneTeacher) -> bool:
    """Whether flags say for which size the teacher is built."""
    return bool({'img_size', 'dynamic_img_size'} & set(flags.kwargs))


def _say_teacher(flags: OneTeacher, teacher: Teacher, student_size: Size) -> None:
    if flags.is_random:
        _logger.warning(
            f'{flags.title}: its weights are RANDOM (--no-teacher-pretrained without --teacher-checkpoint).'
        )
    _say_size(flags.title, teacher, student_size)
    if teacher.folded:
        _logger.info(f'{flags.title}: {teacher.folded} batch norms folded into the layers before them.')


def _say_size(who: str, teacher: Teacher, student_size: Size) -> None:
    """Log a size of the teacher's images that is not the student's: a larger one may cost many times as much."""
    if teacher.input_size:
        return
    mine, own = 'x'.join(map(str, student_size)), 'x'.join(map(str, teacher.own_size or ()))
    if teacher.built_size:
        _logger.info(
            f"{who}: built for {'x'.join(map(str, teacher.built_size))} images, the student's are {mine}; "
            f'--teacher-input-size N gives another size, its own is {own}.'
        )
        return
    size = teacher.size_for(torch.empty(1, len(teacher.input_mean), *student_size, device=teacher.scale.device))
    times = size[0] * size[1] / (student_size[0] * student_size[1])
    if times > 1:
        _logger.info(
            f"{who}: it sees {'x'.join(map(str, size))} images, as its architecture cannot take the student's {mine}: "
            f'{times:.1f} times as many pixels.'
        )


def _torchvision_name(flags: OneTeacher) -> str:
    """The torchvision classifier that fits the teacher's checkpoint; '' if none (of those that build on meta)."""
    names = read_state_dict(str(flags.checkpoint), '--teacher-checkpoint', flags.ema).keys()
    for other in torchvision.models.list_models(module=torchvision.models):
        with contextlib.suppress(Exception), torch.device('meta'):
            if torchvision.models.get_model(other, weights=None).state_dict().keys() == names:
                return other
    return ''
