"""Opens the cache of --teacher-cache on all ranks together, and lists what its rows depend on."""

import contextlib
import json
import logging
import platform
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from timm.utils import unwrap_model
from torch.utils.data import Dataset

from ..config.run_config import RunConfig
from ..data.draws import SeededDataset
from ..data.fingerprint import hash_names, hash_pixels, list_files
from ..data.loaders import Data
from ..errors import UsageError
from ..method.teacher import Teacher
from ..method.weights import hash_tensors
from ..process.runtime import Runtime, ranks_together
from .cache import _FORMAT, TeacherCache
from .from_run import teacher_settings
from .position import is_precision

_logger = logging.getLogger(__name__)

# entry of the manifest
_PRECISION = 'teacher precision'


def open_teacher_cache(config: RunConfig, teacher: Teacher | None, data: Data, runtime: Runtime) -> TeacherCache | None:
    """The cache that --teacher-cache names, its state read; None without the flag.

    It writes only to a complete cache: the new sizes and times of files whose content is unchanged.

    Raises:
        UsageError: See `TeacherCache.look` and `TeacherCache.find_changed`; or a cache with missing rows and ranks on several machines.
    """
    if not config.teacher_cache or teacher is None:
        return None
    widths = {
        'feature': teacher.width if config.pe_target == 'feature' else 0,
        'logits': teacher.num_classes if config.kd_loss_weight or config.pe_target == 'logits' else 0,
    }
    dataset = data.train.dataset
    paths = list_files(dataset.dataset)
    _hash_sources(dataset, paths is not None)
    cache = TeacherCache(
        config.teacher_cache,
        {**create_manifest(config, teacher, data, widths), 'image files': paths is not None},
        len(dataset),
        {name: width for name, width in widths.items() if width},
        config.teacher_cache_views,
        runtime.device,
        paths,
    )
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
                f'(python -m timm_pe.precompute, with the same flags; images that it cannot read have to be mended)'
            )
    if runtime.is_primary and cache.is_complete:
        with contextlib.suppress(OSError):  # a read-only folder: they are compared again next time
            cache.keep_stats([])
    _hash_sources(dataset, paths is not None and not cache.is_complete)
    return cache


def _hash_sources(dataset: SeededDataset, wanted: bool) -> None:
    if hasattr(dataset.dataset, 'hash_sources'):
        dataset.dataset.hash_sources(wanted)


def allocate_cache(cache: TeacherCache | None, teacher: Teacher | None, runtime: Runtime) -> None:
    """Create the missing files of a cache, and open it. If it is complete, the teacher is moved to the CPU.

    Raises:
        UsageError: See `TeacherCache.allocate`.
    """
    if cache is None:
        return
    with ranks_together(runtime):
        if runtime.is_primary and not cache.is_complete:
            _logger.info(f'Teacher cache: {cache.describe()}.')
            cache.allocate()
    with ranks_together(runtime):
        cache.open()
    if cache.is_complete and teacher is not None:
        teacher.to('cpu')


def create_manifest(
    config: RunConfig, teacher: Teacher, data: Data, widths: Mapping[str, int | None]
) -> dict[str, Any]:
    """All that the teacher's outputs depend on: its weights and input, the images, their transforms and draws."""
    dataset = data.train.dataset
    size = data.config['input_size']
    height, width = teacher.size_for(torch.empty(1, *size, device=teacher.scale.device))
    return {
        'format': _FORMAT,
        'teacher': config.teacher,
        'teacher arguments': teacher_settings(config).kwargs,
        'teacher weights': hash_tensors(unwrap_model(teacher.model).state_dict()),
        'teacher input': f'{len(teacher.mean)}x{height}x{width}',
        'teacher mean': list(teacher.mean),
        'teacher std': list(teacher.std),
        'teacher norms folded': teacher.folded,
        'teacher tap': config.teacher_tap,
        _PRECISION: teacher.precision,
        'feature width': widths['feature'],
        'logits': widths['logits'],
        'image size': list(size),
        'image precision': config.model_dtype or 'float32',
        'image mean': list(data.config['mean']),
        'image std': list(data.config['std']),
        'images': len(dataset),
        'image names': hash_names(dataset.dataset),
        'pixels': hash_pixels(dataset),
        'transform': _describe_transform(dataset.dataset),
        'seed': config.seed,
    }


def cached_precision(folder: str | None) -> str | None:
    """The teacher's precision in the cache of a folder; None if there is no cache, or none that can be read."""
    try:
        precision = json.loads((Path(folder or '') / 'manifest.json').read_text(encoding='utf-8'))[_PRECISION]
    except (OSError, ValueError, KeyError, TypeError):
        return None  # opening it says what is wrong with it
    return precision if is_precision(precision) else None


def _describe_transform(dataset: Dataset[Any]) -> list[str]:
    text = re.sub(r' at 0x[0-9a-f]+', '', repr(getattr(dataset, 'transform', None)))
    return [line.strip() for line in text.splitlines()]


def _on_several_machines(runtime: Runtime) -> bool:
    """Whether ranks run on several machines, without the shared page cache that writing to one mapped file needs."""
    if not runtime.distributed:
        return False
    boot = Path('/proc/sys/kernel/random/boot_id')
    return len(set(runtime.gather((platform.node(), boot.read_text() if boot.exists() else '')))) > 1
