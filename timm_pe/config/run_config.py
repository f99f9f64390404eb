"""The settings of a run: a frozen value, made once from YAML and the command line."""

import argparse
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from ..errors import UsageError
from . import rules
from .cli import Parser, ShowVersion
from .declare import add_group, declared_in, default_of, flag
from .flags import (
    AugmentationFlags,
    AverageFlags,
    CacheFlags,
    DataFlags,
    DeviceFlags,
    InputFlags,
    LoaderFlags,
    LossFlags,
    ModelFlags,
    OptimizerFlags,
    ProjectorFlags,
    RegularizationFlags,
    RunFlags,
    ScheduleFlags,
    SizeFlags,
    TeacherFlags,
    TimmDistillationFlags,
    TrackerFlags,
)
from .teachers import read_words
from .yaml_file import read_config


@dataclass(frozen=True, kw_only=True)
class RunConfig(
    # in the order of --help
    TeacherFlags,
    CacheFlags,
    ProjectorFlags,
    DataFlags,
    ModelFlags,
    InputFlags,
    DeviceFlags,
    OptimizerFlags,
    ScheduleFlags,
    AugmentationFlags,
    RegularizationFlags,
    AverageFlags,
    LoaderFlags,
    RunFlags,
    TrackerFlags,
    SizeFlags,
    LossFlags,
    TimmDistillationFlags,
):
    """Run settings.

    All flags, flat, under timm's names. Values derived from them come from `derive.py` and are never stored here.
    """

    config: str = flag('', 'YAML file of flags, or the name of a recipe of hparams/; the command line wins', metavar='FILE', also=('-c',), neutral=True)  # fmt: skip

    def as_dict(self) -> dict[str, Any]:
        """Flags and their values by name, as args.yaml holds them."""
        return {name: getattr(self, name) for name in declared_in(type(self))}

    def as_namespace(self) -> argparse.Namespace:
        """The same as a Namespace, for timm functions that take one or store it in a checkpoint."""
        return argparse.Namespace(**self.as_dict())

    def is_given(self, name: str) -> bool:
        """Whether a flag has another value than its default."""
        return bool(getattr(self, name) != default_of(type(self), name))

    def to_yaml(self) -> str:
        """The text of args.yaml."""
        return yaml.safe_dump(self.as_dict(), default_flow_style=False)


GROUPS: tuple[type, ...] = RunConfig.__bases__


def create_parser(prog: str = 'train_distill') -> Parser:
    """The parser of the whole command line."""
    parser = Parser(
        prog=prog,
        usage='%(prog)s [-h] [-c FILE] [DIR] [--model NAME] [--teacher NAME]\n       [--flag VALUE ...]',
        description="timm's ImageNet training with a teacher: projector ensemble feature distillation",
        allow_abbrev=False,
        formatter_class=argparse.HelpFormatter,
    )
    parser.add_argument('--version', action=ShowVersion)
    for group in (RunConfig, *GROUPS):
        add_group(parser, group)
    return parser


def parse_config(
    argv: list[str] | None = None,
    prog: str = 'train_distill',
    more: Callable[[Mapping[str, Any]], Mapping[str, Any]] | None = None,
) -> RunConfig:
    """Read the settings (command line over YAML over defaults) and refuse invalid ones.

    Args:
        argv: Arguments; None takes those of the process.
        prog: Command to name in messages.
        more: Takes the given settings and returns values for flags that were not given.

    Raises:
        SystemExit: With code 2, after one line that says what is wrong.
    """
    parser = create_parser(prog)
    for action in parser._actions:
        action.default = argparse.SUPPRESS  # then the result holds given flags only
    given = vars(parser.parse_args(argv))
    # of the command line alone: what a finished run in args.yaml went on from may be gone
    if given.get('resume', 'auto') not in ('', 'auto') and not os.path.exists(given['resume']):
        parser.error(f"--resume: no file '{given['resume']}', and no folder")
    known = read_config(RunConfig, given['config'], parser.error) if given.get('config') else {}
    read_words(given, known, parser.error)
    if 'teacher' in given and isinstance(known.get('teacher'), list):
        parser.error(f"--teacher: '{given['config']}' lists teachers with their settings: change them there")
    values = {**known, **given}
    try:
        found = more(values) if more else {}
        # names of run folders fill the gaps between names that are given
        settings = {**found, **values, **({'teacher': found['teacher']} if 'teacher' in found else {})}
    except UsageError as e:
        parser.error(str(e))
    config = RunConfig(**settings)
    rules.check(config, parser.error)
    return config
