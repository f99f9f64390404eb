"""The command line of a run: it reads the flags before it imports torch."""

import logging
import sys
from collections.abc import Mapping
from typing import Any

from ..config.run_config import parse_config


def main(argv: list[str] | None = None, log_level: int = logging.INFO, prog: str = 'train_distill') -> None:
    """Train, or evaluate a checkpoint.

    Args:
        argv: Command line; None takes that of the process.
        log_level: Lowest level of messages to log.
        prog: Command to name in messages.
    """
    config = parse_config(argv, prog, more=fill_from_runs)
    from .run import run  # it imports torch and timm, which takes seconds: a wrong flag is refused before

    run(config, sys.argv[1:] if argv is None else argv, log_level, prog)


def fill_from_runs(given: Mapping[str, Any]) -> Mapping[str, Any]:
    """Settings taken from the run folders that other settings name; see `from_run.py`."""
    if not given.get('evaluate') and not given.get('teacher_checkpoint'):
        return {}
    from .from_run import fill_evaluation, fill_teacher

    return {**fill_evaluation(given), **fill_teacher(given)}
