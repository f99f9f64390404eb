#!/usr/bin/env python3
"""Train a timm model, with a teacher: timm's ImageNet training and Projector Ensemble Feature Distillation.

python train_distill.py DATA --model resnet18 --teacher resnet34
./distributed_train.sh 8 DATA --model resnet18 --teacher resnet34 --pe-projectors 3
"""

import contextlib
import logging
from collections.abc import Iterator

import torch
import torch.distributed as dist

from timm_pe.args import parse_args
from timm_pe.cache import allocate_cache, open_teacher_cache
from timm_pe.cli import exit_with_error
from timm_pe.data import check_data, create_data, create_datasets
from timm_pe.errors import RunError, UsageError, one_line
from timm_pe.fit import (
    announce,
    check_teacher,
    create_trainer,
    evaluate_checkpoint,
    fit,
    is_finished,
    open_run_folder,
)
from timm_pe.interrupts import Interrupted
from timm_pe.logs import setup_logging
from timm_pe.models import check_names, create_student
from timm_pe.nonfinite import NonFiniteLoss
from timm_pe.runtime import setup_runtime
from timm_pe.task_from_args import check_loss_weights, create_run_task, create_run_teacher

OUT_OF_MEMORY = (
    'out of memory: a smaller --batch-size (with --grad-accum-steps the same updates), a smaller --img-size, --amp, '
    '--grad-checkpointing, --teacher-dtype bfloat16 or a --teacher-cache need less'
)
RESUME = '--resume auto --experiment NAME continues from the last checkpoint, if any'


def leave_ranks() -> None:
    """Leave the process group, at an end that all ranks come to.

    A rank that fails alone must not: the others wait in a collective, and it would wait for them in place of ending the job.
    """
    if dist.is_initialized():
        dist.destroy_process_group()


@contextlib.contextmanager
def one_line_errors(prog: str = 'train_distill', resume: str = RESUME) -> Iterator[None]:
    """One line in place of a traceback.

    Args:
        prog: Command to name before it.
        resume: How to go on after an interrupt from the keyboard.

    Exit code 2 for a user's mistake, 1 for a run that cannot go on, 128 + the signal's number for one that was stopped.
    """
    try:
        yield
    except UsageError as e:
        exit_with_error(one_line(e, limit=2000), prog=prog)
    except NonFiniteLoss as e:
        leave_ranks()
        exit_with_error(f'{e}: the run stops, checkpoints written before are good', 1, prog, of_all=True)
    except RunError as e:
        exit_with_error(one_line(e, limit=2000), code=1, prog=prog)
    except (torch.OutOfMemoryError, MemoryError) as e:
        exit_with_error(f'{OUT_OF_MEMORY} ({one_line(e)})', code=1, prog=prog)
    except RuntimeError as e:
        if "can't allocate memory" not in str(e):  # torch has no type of its own for this on a CPU
            raise
        exit_with_error(f'{OUT_OF_MEMORY} ({one_line(e)})', code=1, prog=prog)
    except Interrupted as e:
        leave_ranks()
        exit_with_error(
            f'{e}: the same command with --resume auto --experiment NAME goes on there',
            128 + e.signum,
            prog,
            of_all=True,
        )
    except KeyboardInterrupt:
        exit_with_error(f'interrupted: {resume}', 130, prog, of_all=True)
    leave_ranks()


def main(argv: list[str] | None = None, log_level: int = logging.INFO) -> None:
    """A run, stage by stage.

    Args:
        argv: Command line; None takes that of the process.
        log_level: What to say at least.
    """
    args, args_text = parse_args(argv)
    setup_logging(log_level)
    with one_line_errors():
        check_names(args)
        check_data(args)
        if not args.evaluate:
            check_loss_weights(args, args.num_classes)
        runtime = setup_runtime(args)
        student = create_student(args)
        datasets = create_datasets(args, student.in_chans)
        data = create_data(args, datasets, student, runtime)
        if args.evaluate:
            evaluate_checkpoint(args, student, data, runtime)
            return
        teacher = create_run_teacher(args, data, runtime)
        task = create_run_task(args, student, teacher, runtime)
        cache = open_teacher_cache(args, teacher, data, runtime)
        trainer, start_epoch, num_epochs = create_trainer(args, task, data, runtime, cache)
        if is_finished(args, trainer, start_epoch, num_epochs):
            return
        trainer.agreement = check_teacher(args, teacher, data, student.num_classes, runtime)
        allocate_cache(cache, teacher, runtime)
        folder = open_run_folder(args, args_text, trainer, start_epoch)
        announce(args, trainer, teacher, (start_epoch, num_epochs), folder)
        with trainer.trackers:
            fit(trainer, start_epoch, num_epochs, folder)


if __name__ == '__main__':
    main()
