"""Flags from YAML files: read without running anything, each value checked as on the command line."""

import argparse
import datetime
import difflib
import reprlib
from collections import Counter
from typing import Any, NoReturn

import yaml

from .cli import Parser
from .recipes import find_config

# keys that would let a YAML file run something: whoever wants that says so on the command line
_RUN_CODE = ('device_modules', 'dataset_trust_remote_code')
# bytes of a YAML file
_MAX_YAML = 2**17


def read_config(parser: Parser, path: str) -> dict[str, Any]:
    """Flags of a YAML file, or of a recipe by its name, each checked; `parser` says what is wrong with one."""
    try:
        path = find_config(path)
        config = read_yaml(path)
    except ValueError as e:
        parser.error(f'--config: {e}')
    actions = {a.dest: a for a in parser._actions if a.dest not in ('help', 'config')}
    values = {}
    for key, value in config.items():
        dest = str(key).replace('-', '_')
        if dest == 'config':  # an args.yaml names the YAML it came from
            continue
        if runs_code(dest, value):
            parser.error(f'--config: {key} runs code and is taken from the command line alone')
        if dest not in actions:
            near = difflib.get_close_matches(dest, actions, n=1)
            hint = f', did you mean {near[0]}?' if near else ''
            parser.error(f"--config: unknown key '{key}' in '{path}'{hint}")
        if dest in values:
            parser.error(f"--config: '{path}' gives {dest} twice, as {dest} and as {dest.replace('_', '-')}")
        values[dest] = typed_value(parser, actions[dest], key, value, path)
    return values


def runs_code(name: str, value: Any) -> bool:
    """Whether a flag at this value lets something run, which a file must not do."""
    return bool(name in _RUN_CODE and value) or (isinstance(value, str) and value.startswith('pipe:'))


def read_yaml(path: str) -> dict[str, Any]:
    """The 'key: value' lines of a YAML file; empty for an empty file. No tag in it makes more than plain values.

    Raises:
        ValueError: Unreadable, too large, no YAML, a key twice, or something else than 'key: value' lines.
    """
    try:
        with open(path, 'rb') as f:
            text = f.read(_MAX_YAML + 1)
    except (OSError, ValueError) as e:
        raise ValueError(f"cannot read '{path}' ({getattr(e, 'strerror', None) or e})") from e
    if len(text) > _MAX_YAML:
        raise ValueError(f"'{path}' is larger than {_MAX_YAML:,} bytes, no file of flags is")
    try:
        config = yaml.load(text, Loader=_UniqueKeyLoader)
    except Exception as e:  # YAML's own errors, and those of the Python types it makes: dates, numbers, depth
        reason = ' '.join(str(e).split())
        raise ValueError(f"'{path}' is no YAML file: {reason[:300]}") from e
    if config is None:
        return {}
    if not isinstance(config, dict):
        raise ValueError(f"'{path}' must hold 'flag: value' lines, it holds a {type(config).__name__}")
    return config


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML's safe loader, which takes the last of two equal keys in silence, without that."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        counts = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        for key, count in counts.items():
            if count > 1:
                raise yaml.YAMLError(f'it has the key {key!r} {count} times')
        return super().construct_mapping(node, deep)


def typed_value(
    parser: Parser, action: argparse.Action, key: str, value: Any, path: str, what: str = '--config'
) -> Any:
    """A YAML value, checked as the same words on the command line would be."""

    def refuse(expected: str) -> NoReturn:
        parser.error(f"{what}: {key} in '{path}' must be {expected}, got {reprlib.repr(value)}")

    def scalar(v: Any) -> Any:
        convert = action.type or str
        if (
            isinstance(v, bool)
            or not isinstance(v, (str, int, float, datetime.date))
            or (convert is int and isinstance(v, float) and not v.is_integer())
        ):
            refuse(f'of type {convert.__name__}')
        try:
            result = convert(v)
        except (TypeError, ValueError, OverflowError):
            refuse(f'of type {convert.__name__}')
        if action.choices and result not in action.choices:
            refuse(f'one of {", ".join(map(str, action.choices))}')
        return result

    if value is None:  # as if the flag had not been given; without a strength there is no color jitter, as in timm
        return None if action.dest == 'color_jitter' else action.default
    if value is True and action.nargs == '?' and action.const is not None:
        return action.const
    if action.nargs == 0 or isinstance(action, argparse.BooleanOptionalAction):
        return value if isinstance(value, bool) else refuse('true or false')
    if isinstance(action.default, dict):
        named = isinstance(value, dict) and all(isinstance(k, str) for k in value)
        return value if named else refuse("'key: value' lines")
    if action.nargs in ('+', '*') or isinstance(action.nargs, int):
        values = value if isinstance(value, list) else [value]
        if isinstance(action.nargs, int) and len(values) != action.nargs:
            refuse(f'a list of {action.nargs}')
        return [scalar(v) for v in values]
    return scalar(value)
