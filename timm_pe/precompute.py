"""Fill a teacher's cache ahead of training.

    python -m timm_pe.precompute DATA --model resnet18 --teacher resnet34 --teacher-cache DIR --teacher-cache-views 3

The command line is that of train_distill, under torchrun too. Only missing rows are read and computed, so a stopped
command continues where it was. Nothing is trained and no run folder is made.
"""

import logging
import time
from collections.abc import Sequence
from functools import partial

import numpy as np

from .config.cli import exit_with_error
from .config.run_config import RunConfig, parse_config
from .data.epochs import first_batch, view_loader
from .data.loaders import Data
from .method.teacher import Teacher
from .process.runtime import Runtime
from .process.signals import stopping_at_once
from .train.build import build
from .train.cache import TeacherCache
from .train.console import Progress, setup_logging
from .train.evaluate import batch_to_device, say_unreadable
from .train.first_look import check_teachers
from .train.main import fill_from_runs
from .train.position import run_meaning
from .train.run import leave_ranks, one_line_errors
from .train.run_cache import allocate_caches, open_teacher_caches, outputs_of
from .train.teacher_precision import settle_precision

_logger = logging.getLogger(__name__)
PROG = 'python -m timm_pe.precompute'


def fill_view(
    config: RunConfig,
    caches: Sequence[TeacherCache],
    teachers: Sequence[Teacher],
    data: Data,
    runtime: Runtime,
    view: int,
) -> None:
    """Compute the missing rows of one view; each rank computes those of its share of the images.

    Args:
        config: Run settings.
        caches: The cache of each teacher, allocated.
        teachers: The teachers.
        data: Its training loader gives the images.
        runtime: Device, ranks, precision.
        view: The view.
    """
    missing = np.unique(np.concatenate([cache.missing(view) for cache in caches]))
    # shares by index, not by position: another rank may already have written rows when this one looks
    missing = missing[missing % runtime.world_size == runtime.rank]
    if not len(missing):
        return
    loader = view_loader(data.train, view, missing, config.batch_size)
    progress = Progress(f'View {view}/{caches[0].num_views - 1}', len(loader), runtime.is_primary)
    images, start = 0, time.perf_counter()
    try:
        for i, (input, target) in enumerate(loader):
            input, target = batch_to_device(config, runtime, input, target)
            with runtime.autocast():
                outputs_of(teachers, caches, input, target)
            images += len(input) * runtime.world_size
            if (i + 1) % config.log_interval == 0 or i + 1 == len(loader):
                progress.update(i + 1, {}, images / (time.perf_counter() - start))
            else:
                progress.update(i + 1)
    finally:
        progress.close()
        for cache in caches:
            cache.flush()


def main(argv: list[str] | None = None, prog: str = PROG) -> None:
    """Fill the cache.

    Args:
        argv: Command line; None takes that of the process.
        prog: Command to name in messages.
    """
    config = parse_config(argv, prog=prog, more=fill_from_runs)
    for name, given in (('--teacher-cache', config.teacher_cache), ('no --evaluate', not config.evaluate)):
        if not given:
            exit_with_error(f'it needs {name}: it fills the cache of a training run', prog=prog)
    setup_logging()
    goes_on = 'the same command goes on where it was stopped'
    with one_line_errors(prog, goes_on), stopping_at_once('while it filled the cache'):
        parts = build(config)  # as for training, so that it refuses what the training run would refuse
        data, runtime, teachers = parts.data, parts.runtime, parts.teachers
        settle_precision(
            parts, run_meaning(config, parts.training_task, data, runtime), partial(first_batch, data.train)
        )
        caches = open_teacher_caches(config, teachers, data, runtime)
        if not all(cache.is_complete for cache in caches):
            check_teachers(parts)
            allocate_caches(caches, teachers, runtime)
            for view in range(caches[0].num_views):
                fill_view(config, caches, teachers, data, runtime, view)
                # as a share of all images: those that have rows were readable
                say_unreadable(data.train, caches[0].num_images, runtime)
            runtime.gather(None)  # until all have written
        for cache in caches:
            cache.look()
            _logger.info(f'Teacher cache: {cache.describe()}.')
    leave_ranks()


if __name__ == '__main__':
    main()
