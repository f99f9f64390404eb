"""Flags from YAML files, read without running any code; each value is checked as on the command line."""

import datetime
import difflib
import reprlib
from collections import Counter
from collections.abc import Callable
from typing import Any, NoReturn

import yaml

from ..method.plugins import Registry
from .declare import NOT_GIVEN, annotations_of, declared_in, default_of, is_each, value_type
from .recipes import find_config
from .teachers import split_teachers

Refuse = Callable[[str], NoReturn]

# keys that let a YAML file run code: accepted on the command line only
_RUN_CODE = ('device_modules', 'dataset_trust_remote_code')
# largest YAML file, in bytes
_MAX_YAML = 2**17


def read_config(group: type, path: str, refuse: Refuse) -> dict[str, Any]:
    """Flags of a YAML file, or of a recipe by its name, each checked.

    Args:
        group: Declares the flags.
        path: The file, or the name of a recipe.
        refuse: Reports an error and does not return.
    """
    try:
        path = find_config(path)
        config = read_yaml(path)
    except ValueError as e:
        refuse(f'--config: {e}')
    config = split_teachers(config, f"--config: teacher in '{path}'", refuse)
    known = set(declared_in(group)) - {'config'}
    values: dict[str, Any] = {}
    for key, value in config.items():
        dest = str(key).replace('-', '_')
        if dest == 'config':  # an args.yaml names the YAML it came from
            continue
        if runs_code(dest, value):
            refuse(f'--config: {key} runs code and is taken from the command line alone')
        if dest not in known:
            near = difflib.get_close_matches(dest, known, n=1)
            hint = f', did you mean {near[0]}?' if near else ''
            refuse(f"--config: unknown key '{key}' in '{path}'{hint}")
        if dest in values:
            refuse(f"--config: '{path}' gives {dest} twice, as {dest} and as {dest.replace('_', '-')}")
        values[dest] = typed_value(group, dest, value, f"--config: {key} in '{path}'", refuse)
    return values


def runs_code(name: str, value: Any) -> bool:
    """Whether a flag with this value would run code, which a file must not do."""
    return bool(name in _RUN_CODE and value) or (isinstance(value, str) and value.startswith('pipe:'))


def read_yaml(path: str) -> dict[str, Any]:
    """The 'key: value' lines of a YAML file; empty for an empty file. Tags cannot create anything but plain values.

    Raises:
        ValueError: It is unreadable, too large, not YAML, repeats a key, or holds other than 'key: value' lines.
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
    """YAML's safe loader, but a repeated key is an error; the original takes the last value."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        counts = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        for key, count in counts.items():
            if count > 1:
                raise yaml.YAMLError(f'it has the key {key!r} {count} times')
        return super().construct_mapping(node, deep)


def typed_value(group: type, dest: str, value: Any, what: str, refuse: Refuse) -> Any:
    """A flag's YAML value, checked as on the command line.

    Args:
        group: Declares the flag.
        dest: Its name.
        value: The value as YAML parsed it.
        what: The key and its file, for messages.
        refuse: Reports what the value must be, and does not return.
    """
    declared, annotation = declared_in(group)[dest], annotations_of(group)[dest]
    kind, is_list, is_pairs = value_type(annotation)

    def expect(expected: str) -> NoReturn:
        refuse(f'{what} must be {expected}, got {reprlib.repr(value)}')

    def scalar(v: Any) -> Any:
        is_scalar = isinstance(v, (str, int, float, datetime.date)) and not isinstance(v, bool)
        if not is_scalar or (kind is int and isinstance(v, float) and not v.is_integer()):
            expect(f'of type {kind.__name__}')
        try:
            result = kind(v)
        except (TypeError, ValueError, OverflowError):
            expect(f'of type {kind.__name__}')
        if declared.choices is not None and result not in declared.choices:
            of_plugins = ' or of an installed plugin' if isinstance(declared.choices, Registry) else ''
            expect(f'one of {", ".join(map(str, declared.choices))}{of_plugins}')
        return result

    if value is None:  # null means not given, but for color_jitter no jitter, as in timm
        return None if dest == 'color_jitter' else default_of(group, dest)
    if declared.each and is_each(value, is_list):
        given = [None if v == NOT_GIVEN else v for v in value]
        if not given or any(is_each(v, is_list) for v in given) or given == [None]:
            expect('one value, or one for each teacher')
        found = [None if v is None else typed_value(group, dest, v, what, refuse) for v in given]
        return found if len(found) > 1 else found[0]
    if kind is bool:
        return value if isinstance(value, bool) else expect('true or false')
    if value is True and declared.const is not None:
        return declared.const
    if is_pairs:
        named = isinstance(value, dict) and all(isinstance(k, str) for k in value)
        return value if named else expect("'key: value' lines")
    if is_list:
        values = value if isinstance(value, list) else [value]
        if declared.count is not None and len(values) != declared.count:
            expect(f'a list of {declared.count}')
        return [scalar(v) for v in values]
    return scalar(value)
