"""The run of a command line, stage by stage, and how it ends."""

import contextlib
import logging
from collections.abc import Iterator

import torch
import torch.distributed as dist

from ..config.cli import exit_with_error
from ..config.run_config import parse_config
from ..errors import RunError, UsageError, one_line
from ..process.signals import Interrupted
from .build import build
from .console import setup_logging
from .evaluate import evaluate_checkpoint
from .from_run import fill_evaluation
from .nonfinite import NonFiniteLoss
from .start import start

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
    config = parse_config(argv, more=fill_evaluation)
    setup_logging(log_level)
    with one_line_errors():
        parts = build(config)  # device, student, data, teacher, task
        if config.evaluate:
            evaluate_checkpoint(parts)
            return
        trainer = start(parts)  # optimizer, resumed state, schedule, folder
        if trainer is not None:
            trainer.fit()
