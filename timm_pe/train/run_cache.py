"""Opens the cache of --teacher-cache on all ranks together, and lists what its rows depend on."""

import contextlib
import logging
import math
import os
import platform
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch

from ..config.run_config import RunConfig
from ..config.teachers import OneTeacher, teachers_of
from ..data.draws import SeededDataset
from ..data.fingerprint import list_files
from ..data.loaders import Data
from ..errors import UsageError
from ..method.teacher import Teacher, TeacherOutput
from ..method.teachers import name_teachers
from ..process.runtime import Runtime, ranks_together
from .cache import TeacherCache
from .cache_manifest import create_manifest

_logger = logging.getLogger(__name__)


def cache_folders(config: RunConfig, teachers: Sequence[Teacher]) -> list[str | None]:
    """The folder of each teacher's cache: that of --teacher-cache, of several teachers one in it for each, of its name."""
    if not config.teacher_cache or len(teachers) < 2:
        return [config.teacher_cache] * len(teachers)
    return [os.path.join(config.teacher_cache, name) for name in name_teachers(teachers)]


def open_teacher_caches(
    config: RunConfig, teachers: Sequence[Teacher], data: Data, runtime: Runtime
) -> list[TeacherCache]:
    """The cache of each teacher that --teacher-cache names, its state read; none without the flag.

    It writes only to complete caches: the new sizes and times of files whose content is unchanged.

    Raises:
        UsageError: See `TeacherCache.look` and `TeacherCache.find_changed`; or a cache with missing rows and ranks on several machines.
    """
    if not config.teacher_cache or not teachers:
        return []
    dataset = data.train.dataset
    paths = list_files(dataset.dataset)
    _hash_sources(dataset, paths is not None)
    settings = zip(teachers_of(config), teachers, cache_folders(config, teachers), strict=True)
    caches = [_create_cache(config, *of_teacher, data, runtime, paths) for of_teacher in settings]
    for cache in caches:
        _look(cache, runtime)
    _hash_sources(dataset, paths is not None and not all(cache.is_complete for cache in caches))
    return caches


def _create_cache(
    config: RunConfig,
    flags: OneTeacher,
    teacher: Teacher,
    folder: str | None,
    data: Data,
    runtime: Runtime,
    paths: Sequence[str] | None,
) -> TeacherCache:
    map_shape = _map_shape(teacher, data) if config.pe_map_weight else ()
    widths = {
        'feature': teacher.width if config.pe_target == 'feature' else 0,
        'logits': teacher.num_classes if config.kd_loss_weight or config.pe_target == 'logits' else 0,
        'map': math.prod(map_shape) if map_shape else 0,
    }
    manifest = create_manifest(config, flags, teacher, data, widths)
    if map_shape:
        manifest['map'] = list(map_shape)
    return TeacherCache(
        str(folder),
        {**manifest, 'image files': paths is not None},
        len(data.train.dataset),
        {name: width for name, width in widths.items() if width},
        config.teacher_cache_views,
        runtime.device,
        paths,
        map_shape,
    )


def _map_shape(teacher: Teacher, data: Data) -> tuple[int, ...]:
    """Channels, rows and columns of its map of the run's images."""
    # random images: the teacher finds out on its first ones whether its classifier can be left out
    images = torch.rand(2, *data.config['input_size'], generator=torch.Generator().manual_seed(0))
    output = teacher(images.to(teacher.scale.device))
    return tuple(cast(torch.Tensor, output.map).shape[1:])


def _look(cache: TeacherCache, runtime: Runtime) -> None:
    """Read the state of a cache, on all ranks together."""
    several = _on_several_machines(runtime)
    with ranks_together(runtime):
        cache.look()
    with ranks_together(runtime):
        if runtime.is_primary:
            cache.find_changed()
    cache.stale = runtime.share(cache.stale)
    with ranks_together(runtime):
        cache.look()
        if several and not cache.is_complete:
            said = f' ({cache.describe_stale()})' if cache.stale else ''
            raise UsageError(
                f"--teacher-cache: ranks on several machines can only read a cache, and '{cache.folder}' has "
                f'{sum(cache.counts):,} of {cache.num_images * cache.num_views:,} rows{said}: fill it on one of them first '
                f'(timm-pe precompute, with the same flags; images that it cannot read have to be mended)'
            )
    if runtime.is_primary and cache.is_complete and not cache.stale:  # other views may have rows of what an image was
        with contextlib.suppress(OSError):  # a read-only folder: they are compared again next time
            cache.keep_stats([])


def _hash_sources(dataset: SeededDataset, wanted: bool) -> None:
    if hasattr(dataset.dataset, 'hash_sources'):
        dataset.dataset.hash_sources(wanted)


def allocate_caches(caches: Sequence[TeacherCache], teachers: Sequence[Teacher], runtime: Runtime) -> None:
    """Create the missing files of caches, and open them. The teacher of a complete one is moved to the CPU.

    Raises:
        UsageError: See `TeacherCache.allocate`.
    """
    for cache, teacher in zip(caches, teachers, strict=bool(caches)):
        with ranks_together(runtime):
            if runtime.is_primary and not cache.is_complete:
                _logger.info(f'Teacher cache: {cache.describe()}.')
                cache.allocate()
        with ranks_together(runtime):
            cache.open()
        if cache.is_complete:
            teacher.to('cpu')


def outputs_of(
    teachers: Sequence[Teacher], caches: Sequence[TeacherCache], input: torch.Tensor, target: Any
) -> list[TeacherOutput]:
    """What each teacher gives for a batch; with caches a teacher runs only if rows of its are missing.

    Args:
        teachers: The teachers. With a complete cache they are on the CPU: an image that becomes unreadable later still
            needs them on the device.
        caches: The cache of each, or none.
        input: Images `[b, ch, h, w]`.
        target: With caches an `IndexedTarget`.
    """
    if not caches:
        return [teacher(input) for teacher in teachers]

    def compute(teacher: Teacher) -> TeacherOutput:
        if teacher.scale.device == input.device:
            there: TeacherOutput = teacher(input)
            return there
        # not compiled: the other ranks would wait for that
        output: TeacherOutput = teacher.to(input.device).forward_uncompiled(input)
        teacher.to('cpu')
        return output

    return [cache(target, partial(compute, teacher)) for cache, teacher in zip(caches, teachers, strict=True)]


def _on_several_machines(runtime: Runtime) -> bool:
    """Whether ranks run on several machines, without the shared page cache that writing to one mapped file needs."""
    if not runtime.distributed:
        return False
    boot = Path('/proc/sys/kernel/random/boot_id')
    return len(set(runtime.gather((platform.node(), boot.read_text() if boot.exists() else '')))) > 1
