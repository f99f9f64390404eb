"""A run, stage by stage, and how it ends."""

import contextlib
import os
import shlex
import sys
from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from timm.data.readers.reader_wds import WdsTargetKeyError
from timm.utils import world_info_from_env

from .. import zoo  # noqa: F401  registers the CIFAR networks, which a command has left for later
from ..config.cli import exit_after_signal, exit_with_error
from ..config.run_config import RunConfig
from ..errors import RunError, UsageError, is_out_of_memory, one_line
from ..process.folder_lock import FolderLock
from ..process.signals import Interrupted, stopping_at_once
from ..run_folder import DEFAULT_OUTPUT, RunFolder
from .build import build
from .console import setup_logging
from .evaluate import evaluate_checkpoint
from .nonfinite import NonFiniteLoss
from .start import start

OUT_OF_MEMORY = (
    'out of memory: a smaller --batch-size (with --grad-accum-steps updates over as many images), a smaller --img-size, --amp, '
    '--grad-checkpointing, --teacher-dtype bfloat16 or a --teacher-cache need less'
)
NOT_BEGUN = 'the same command starts again'


def command_to_go_on(argv: Sequence[str], folder: RunFolder, output: str = '') -> str:
    """The command that resumes a run: its own, with --resume auto and the name of its folder.

    Flags about its start are omitted: the checkpoint has the position.

    Args:
        argv: The command line of the run.
        folder: Its folder.
        output: --output of the run, as given there or in YAML.
    """
    words = [word for word in argv if word not in ('--overwrite', '--no-resume-opt')]
    for flag in ('--resume', '--experiment', '--start-epoch'):
        while flag in words:
            del words[words.index(flag) : words.index(flag) + 2]
        words = [word for word in words if not word.startswith(f'{flag}=')]
    more = ['--resume', 'auto', '--experiment', folder.name]
    where = folder.path.parent
    if os.path.realpath(where) != os.path.realpath(output or DEFAULT_OUTPUT):  # of a run that --resume FOLDER names
        more += ['--output', str(where)]
    ranks = world_info_from_env()[2]
    here = f'python {shlex.quote(sys.argv[0])}' if sys.argv[0].endswith('.py') else 'train-distill'
    start = here if ranks == 1 else f'./distributed_train.sh {os.environ.get("LOCAL_WORLD_SIZE", ranks)}'
    return f'{start} {shlex.join([*words, *more])}'


def leave_ranks() -> None:
    """Leave the process group, when all ranks end.

    A rank that fails alone must not call this: the others wait in a collective, and it would wait for them instead of
    ending the job.
    """
    if dist.is_initialized():
        dist.destroy_process_group()


@contextlib.contextmanager
def one_line_errors(prog: str, resume: str = NOT_BEGUN) -> Iterator[None]:
    """Print errors as one line instead of a traceback.

    Args:
        prog: Command to name before it.
        resume: How to continue after a signal, in words.

    Exit code 2 for a user's mistake, 1 for a run that cannot continue, 128 + the signal's number for one that was
    stopped.
    """
    try:
        yield
    except UsageError as e:
        exit_with_error(one_line(e, limit=2000), prog=prog)
    except WdsTargetKeyError as e:
        exit_with_error(f'--target-key: {one_line(e)}', prog=prog)
    except NonFiniteLoss as e:
        leave_ranks()
        exit_with_error(
            f'{e}: the run stops, earlier checkpoints are intact; a lower --lr, --clip-grad 1 or no --amp may '
            f'help, --nonfinite skip leaves such updates out',
            1,
            prog,
            of_all=True,
        )
    except RunError as e:
        exit_with_error(one_line(e, limit=2000), code=1, prog=prog)
    except (torch.OutOfMemoryError, MemoryError) as e:
        exit_with_error(f'{OUT_OF_MEMORY} ({one_line(e)})', code=1, prog=prog)
    except RuntimeError as e:
        if 'Streaming dataset' in str(e):  # timm's reader of hfids/ has fewer shards than loader processes
            exit_with_error(f'--workers: {str(e).strip().splitlines()[-1].removeprefix("RuntimeError: ")}', prog=prog)
        if not is_out_of_memory(e):
            raise
        exit_with_error(f'{OUT_OF_MEMORY} ({one_line(e)})', code=1, prog=prog)
    except Interrupted as e:
        if e.of_all:
            leave_ranks()
        exit_after_signal(str(e), resume, 128 + e.signum, prog)
    except KeyboardInterrupt:
        exit_after_signal('interrupted', resume, 130, prog)


def run(config: RunConfig, argv: Sequence[str], log_level: int, prog: str) -> None:
    """A run, stage by stage.

    Args:
        config: Run settings.
        argv: Command line, from which the command that resumes the run is made.
        log_level: Lowest level of messages to log.
        prog: Command to name in messages.
    """
    setup_logging(log_level)
    where = 'during the evaluation' if config.evaluate else 'before training began'
    with FolderLock() as lock:
        with one_line_errors(prog), stopping_at_once(where):
            parts = build(config, lock=lock)  # device, checkpoint, student, data, teacher, task
            if config.evaluate:
                evaluate_checkpoint(parts)
                leave_ranks()
                return
            trainer = start(parts, lock)  # optimizer, resumed state, schedule, folder
        if trainer is not None:
            with one_line_errors(prog, f'to go on:\n{command_to_go_on(argv, trainer.folder, config.output)}'):
                trainer.fit()
    leave_ranks()
