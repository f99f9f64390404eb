"""The command line of a run: first its flags, then what needs torch."""

import logging
import sys
from collections.abc import Mapping
from typing import Any

from ..config.run_config import parse_config


def main(argv: list[str] | None = None, log_level: int = logging.INFO, prog: str = 'train_distill') -> None:
    """Train, or evaluate a checkpoint.

    Args:
        argv: Command line; None takes that of the process.
        log_level: What to say at least.
        prog: Command to name in messages.
    """
    config = parse_config(argv, prog, more=_fill_evaluation)
    from .run import run  # it imports torch and timm, which takes seconds: a wrong flag is refused before

    run(config, sys.argv[1:] if argv is None else argv, log_level, prog)


def _fill_evaluation(given: Mapping[str, Any]) -> Mapping[str, Any]:
    if not given.get('evaluate'):
        return {}
    from .from_run import fill_evaluation

    return fill_evaluation(given)
