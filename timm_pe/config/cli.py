"""Shared by all commands of the package: a parser with one-line errors, and how a process exits with one."""

import argparse
import difflib
import os
import sys
import time
from typing import Any, NoReturn

from ..version import __version__

# variables in which launchers give the rank, in the order of timm's world_info_from_env, which would import torch
_RANK_VARIABLES = ('RANK', 'PMI_RANK', 'SLURM_PROCID', 'OMPI_COMM_WORLD_RANK')
# seconds
RANK_0_FIRST = 5


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line, printed once (by rank 0)."""

    def error(self, message: str) -> NoReturn:
        exit_with_error(message, prog=self.prog)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            known = [s for a in self._actions for s in a.option_strings]
            near = [m for u in unknown for m in difflib.get_close_matches(u.split('=')[0], known, n=1, cutoff=0.7)]
            hint = f', did you mean {", ".join(near)}?' if near else ' (--help lists the known ones)'
            if unknown[0] in {f'--{a.dest}' for a in self._actions if not a.option_strings}:
                hint = f': give it without {unknown[0]}'
            self.error(f'unknown argument {" ".join(unknown)}{hint}')
        return parsed


class ShowVersion(argparse.Action):
    """A flag that prints the versions of this package, torch and timm on one line, and ends the process."""

    def __init__(self, option_strings: Any, dest: str):
        what = 'print the versions of timm_pe, torch and timm'
        super().__init__(option_strings, dest, nargs=0, default=argparse.SUPPRESS, help=what)

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        from importlib.metadata import version

        print(f'{parser.prog} {__version__} (torch {version("torch")}, timm {version("timm")})')
        parser.exit()


def exit_with_error(message: str, code: int = 2, prog: str = 'train_distill', of_all: bool = False) -> NoReturn:
    """Print one line, with the name of the command `prog` before it, and exit with `code`.

    Most errors occur on all ranks, and rank 0 reports them: a launcher stops the whole job at the first exit, so the
    other ranks wait first. A rank that still runs after the wait prints its own error, unless all are known to end with
    this one (`of_all`).
    """
    rank = _wait_for_rank_0(code, of_all)
    message = f'[rank {rank}] {message}' if rank else message
    message = ' '.join(message.split())
    # user input must neither fill the screen nor send control characters to the terminal
    message = message if len(message) <= 1200 else f'{message[:900]} ... {message[-250:]}'
    message = ''.join(c if c.isprintable() else ascii(c)[1:-1] for c in message)
    sys.stderr.write(f'{prog}: error: {message}\n')
    sys.stderr.flush()
    raise SystemExit(code)


def exit_after_signal(message: str, resume: str, code: int, prog: str) -> NoReturn:
    """Print that a signal stopped the command (not an error) and how to continue; exit with `code`."""
    _wait_for_rank_0(code, of_all=True)
    sys.stderr.write(f'{prog}: {message}; {resume}\n')
    sys.stderr.flush()
    raise SystemExit(code)


def _wait_for_rank_0(code: int, of_all: bool) -> int:
    """Return this rank; ranks other than 0 first wait for rank 0 to report, and with `of_all` exit after that."""
    rank = next((int(os.environ[name]) for name in _RANK_VARIABLES if name in os.environ), 0)
    if rank != 0:
        time.sleep(RANK_0_FIRST)
        if of_all:
            raise SystemExit(code)
    return rank
