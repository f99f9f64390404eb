"""Fill a teacher's cache ahead of training.

    python -m timm_pe.precompute DATA --model resnet18 --teacher resnet34 --teacher-cache DIR --teacher-cache-views 3

The command line is that of train_distill, under torchrun too. Only what is missing is read and computed, so it goes on where
it was stopped. Nothing is trained and no run folder is made.
"""

import argparse
import logging
import time
from functools import partial

import torch.distributed as dist

from train_distill import one_line_errors

from .args import parse_args
from .cache import TeacherCache, allocate_cache, open_teacher_cache
from .cli import exit_with_error
from .data import Data, check_data, create_data, create_datasets, view_loader
from .engine import batch_to_device
from .fit import check_teacher
from .logs import Progress, setup_logging
from .models import check_names, create_student
from .runtime import Runtime, setup_runtime
from .task_from_args import create_run_task, create_run_teacher
from .teacher import Teacher
from .unreadable import describe_unreadable

_logger = logging.getLogger(__name__)
PROG = 'python -m timm_pe.precompute'


def fill_view(
    args: argparse.Namespace, cache: TeacherCache, teacher: Teacher, data: Data, runtime: Runtime, view: int
) -> None:
    """Compute the rows of one view that are missing; each rank those of its share of the images.

    Args:
        args: Run arguments.
        cache: Where they are kept, allocated.
        teacher: What is asked.
        data: Its training loader gives the images.
        runtime: Device, ranks, precision.
        view: The view.
    """
    missing = cache.missing(view)
    # shares by index, not by place in the list: another rank may be writing already when this one looks
    missing = missing[missing % runtime.world_size == runtime.rank]
    if not len(missing):
        return
    loader = view_loader(data.train, view, missing, args.batch_size)
    progress = Progress(f'View {view}/{cache.num_views - 1}', len(loader), runtime.is_primary)
    images, start = 0, time.perf_counter()
    try:
        for i, (input, target) in enumerate(loader):
            input, target = batch_to_device(args, runtime, input, target)
            with runtime.autocast():
                cache(target, partial(teacher, input))
            images += len(input) * runtime.world_size
            if (i + 1) % args.log_interval == 0 or i + 1 == len(loader):
                progress.update(i + 1, {}, images / (time.perf_counter() - start))
            else:
                progress.update(i + 1)
    finally:
        progress.close()
        cache.flush()


def main(argv: list[str] | None = None) -> None:
    """Fill the cache.

    Args:
        argv: Command line; None takes that of the process.
    """
    args, _ = parse_args(argv, prog=PROG)
    for name, given in (('--teacher-cache', args.teacher_cache), ('no --evaluate', not args.evaluate)):
        if not given:
            exit_with_error(f'it needs {name}: it fills the cache of a training run', prog=PROG)
    setup_logging()
    with one_line_errors(PROG, 'the same command goes on where it was stopped'):
        check_names(args)
        check_data(args)
        runtime = setup_runtime(args)
        student = create_student(args)
        data = create_data(args, create_datasets(args, student.in_chans), student, runtime)
        teacher = create_run_teacher(args, data, runtime)
        create_run_task(args, student, teacher, runtime)  # refuses what the training run would refuse
        cache = open_teacher_cache(args, teacher, data, runtime)
        if not cache.is_complete:
            check_teacher(args, teacher, data, student.num_classes, runtime)
            allocate_cache(cache, teacher, runtime)
            for view in range(cache.num_views):
                fill_view(args, cache, teacher, data, runtime, view)
                # of all images: those whose rows are there could be read
                said = describe_unreadable(data.train.dataset, cache.num_images, runtime.distributed)
                if said:
                    _logger.warning(said)
            if runtime.distributed:
                dist.barrier()
            cache.look()
        _logger.info(f'Teacher cache: {cache.describe()}.')


if __name__ == '__main__':
    main()
