"""The precision that --teacher-dtype auto takes: that of the run or cache that goes on, else what the first batch decides."""

import copy
import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F

from ..config.derive import torch_dtype
from ..config.run_config import RunConfig
from ..config.teachers import teachers_of
from ..errors import is_out_of_memory, one_line
from ..method.teacher import Teacher, TeacherOutput
from ..process.runtime import Runtime, has_fast_bfloat16
from .build import Parts
from .cache_manifest import cached_precision
from .checkpoints import saved_precisions
from .run_cache import cache_folders

_logger = logging.getLogger(__name__)

# a low precision must keep each image's feature closer to that in float32 than this
LEAST_COSINE = 0.999


def settle_precision(parts: Parts, meaning: Mapping[str, Any], batch: Callable[[], tuple[Any, Any]]) -> None:
    """Decide the precision of teachers with --teacher-dtype auto; call it on all ranks, which all decide the same.

    A checkpoint that the run goes on with has it already, and so has an existing cache: rows of one cache are of one
    precision. Otherwise a precision that is fast on this device is measured against float32.

    Args:
        parts: The run's parts; the teachers are changed in place, and must not be compiled yet.
        meaning: The run's (see `run_meaning`): a checkpoint of another teacher decides nothing.
        batch: Gives the first training batch; called where it is needed.
    """
    config, runtime, settings = parts.config, parts.runtime, teachers_of(parts.config)
    if all(flags.dtype != 'auto' for flags in settings):
        return
    saved = saved_precisions(parts.checkpoint, len(settings), meaning)
    folders = cache_folders(config, parts.teachers)
    for flags, teacher, of_checkpoint, folder in zip(settings, parts.teachers, saved, folders, strict=True):
        if flags.dtype != 'auto':
            continue
        known = _find_known(folder, of_checkpoint, runtime)
        if known is None:
            why = choose_precision(config, teacher, runtime, batch)
        else:
            precision, why = known
            take_precision(teacher, precision)
        whose = '' if len(settings) == 1 else f' of {flags.title[0].lower()}{flags.title[1:]}'
        if why:
            _logger.info(f'--teacher-dtype auto{whose} is {teacher.precision}: {why}.')
        is_low, on_cpu = teacher.dtype in (torch.bfloat16, torch.float16), runtime.device.type == 'cpu'
        if is_low and on_cpu and teacher.dtype != _fast_precision(config, runtime):
            _logger.warning(
                f'{teacher.precision} is not fast on this device: the teacher keeps it, for the same numbers.'
            )


def choose_precision(
    config: RunConfig, teacher: Teacher, runtime: Runtime, batch: Callable[[], tuple[Any, Any]]
) -> str:
    """Give a teacher the low precision that this device is fast in, if that keeps it close to float32, else the usual one.

    Returns:
        The measurement in words; '' if this device is fast in no low precision.
    """
    low, why = _fast_precision(config, runtime), ''
    if low is not None:
        lowest, why = _measure(teacher, batch()[0], low, runtime)
        low = low if lowest > LEAST_COSINE else None
    teacher.set_precision(low, torch_dtype(config.amp_dtype) if config.amp else None)
    return why


def take_precision(teacher: Teacher, precision: str) -> None:
    """Give a teacher a `Teacher.precision` that another one had."""
    name = precision.removeprefix('AMP ')
    if name == precision:
        teacher.set_precision(torch_dtype(name))
    else:
        teacher.set_precision(autocast_dtype=torch_dtype(name))


def _find_known(folder: str | None, saved: str | None, runtime: Runtime) -> tuple[str, str] | None:
    """The precision of what the run goes on with (a cache's folder, a checkpoint), and what that is in words; that of rank 0."""
    cached = cached_precision(folder)
    return runtime.share(
        (saved, 'as in the checkpoint') if saved else (cached, 'as in the teacher cache') if cached else None
    )


def _fast_precision(config: RunConfig, runtime: Runtime) -> torch.dtype | None:
    """bfloat16 where this device is fast in it: on CUDA under an --amp of that type, which is the user's choice.

    Never float16: a later batch may overflow where the first did not, and autocast keeps sums and norms in float32.
    """
    if runtime.device.type == 'cuda':
        fast = config.amp and torch_dtype(config.amp_dtype) == torch.bfloat16
    else:
        fast = has_fast_bfloat16(runtime.device.type)
    return torch.bfloat16 if fast else None


def _measure(teacher: Teacher, input: torch.Tensor, dtype: torch.dtype, runtime: Runtime) -> tuple[float, str]:
    """Lowest cosine over the batches of all ranks, -inf if the teacher cannot run in `dtype`; and the result in words."""
    input = input.to(runtime.device, runtime.model_dtype or torch.float32)
    expected = teacher(input)  # an error here is none of the precision
    name = str(dtype).removeprefix('torch.')
    try:
        low = copy.deepcopy(teacher)
        low.set_precision(dtype)
        found = _lowest_cosine(expected, low(input))
        result = found, f'the lowest cosine of {name} to float32 on the first batch is {found:.6f}'
        if found == -torch.inf:
            result = found, f'in {name} its outputs on the first batch are not finite'
    except Exception as e:  # a network may fail in many ways
        if is_out_of_memory(e):
            raise
        result = -torch.inf, f'in {name} it fails ({one_line(e, 120)})'
    return min(runtime.gather(result), key=lambda of_rank: of_rank[0])


def _lowest_cosine(expected: TeacherOutput, actual: TeacherOutput) -> float:
    """The lowest over images, features, logits and maps; -inf if a value is not finite."""
    lowest = 1.0
    for a, b in zip(expected, actual, strict=True):
        if a is None or b is None:
            continue
        if not b.isfinite().all():
            return -torch.inf
        a, b = a.double().flatten(1), b.double().flatten(1)
        cosines = F.cosine_similarity(a, b).masked_fill((a == b).all(1), 1.0)  # equal ones may be all zero
        lowest = min(lowest, cosines.min().item())
    return lowest
