"""How a flag is declared, once: as a field of a frozen dataclass. Parser, checks, `--help` and docs are made from it.

    @dataclass(frozen=True, kw_only=True)
    class ScheduleFlags:
        epochs: int = flag(300, 'epochs to train', metavar='N', at_least=1)
        warmup_prefix: bool = switch('do not count warmup in --epochs')

The annotation gives the type: `str`, `int`, `float`, a list of one of them, `dict[str, Any]` for `k=v` pairs, `bool` for a
switch, `Each` of one of these where several teachers may have a value each. The field's name is the flag's name in YAML and
Python; on the command line it has dashes.
"""

import argparse
import ast
import functools
import reprlib
import types
import typing
from collections.abc import Collection
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, TypeVar, Union

_T = TypeVar('_T')
# one value, or a list of one for each teacher; None is what applies where the flag is not given
Each = Union[_T, list[_T]]  # noqa: UP007  # subscripted
# how a user writes None in such a list
NOT_GIVEN = '-'


@dataclass(frozen=True, kw_only=True)
class Flag:
    """The declaration of a flag, apart from its name, type and default.

    Attributes:
        help: What it does, without its default.
        metavar: Name of its value in `--help`.
        also: Other names of it on the command line; a long one with an underscore replaces the usual name.
        off: Name of the flag that switches it off.
        positional: Whether it is a positional argument.
        choices: What argparse accepts.
        allowed: Values that the check after parsing accepts; timm's own parser accepts anything.
        const: Its value if it is given without one.
        count: Number of values it takes.
        unset: What applies if it is not given, in words.
        at_least: Lowest value.
        at_most: Highest value.
        above: Its values must be above this.
        share: Whether its values must be from 0 to 1.
        needs: Flags of which at least one must be set; otherwise this one is refused.
        idle_without: Flags (or 'FLAG=VALUE') of which one must be on for this one to have an effect. timm accepts it
            anyway, and settings files may hold all flags: no effect is a warning, not an error.
        of_loss: The --loss that it belongs to.
        each: Whether it may have one value for each of several teachers (see `Each`).
        package: The package that it needs, and the extra of timm_pe that installs it.
        added: Whether it is this project's flag, not timm's; the docs list these.
        neutral: Whether it changes nothing that a run learns: where its files go, how it is executed, what it shows.
    """

    help: str
    metavar: str | None = None
    also: tuple[str, ...] = ()
    off: str | None = None
    positional: bool = False
    choices: Collection[Any] | None = None
    allowed: tuple[Any, ...] | None = None
    const: str | None = None
    count: int | None = None
    unset: str = ''
    at_least: float | None = None
    at_most: float | None = None
    above: float | None = None
    share: bool = False
    needs: tuple[str, ...] = ()
    idle_without: tuple[str, ...] = ()
    of_loss: str | None = None
    each: bool = False
    package: tuple[str, str] | None = None
    added: bool = False
    neutral: bool = False


def flag(
    default: Any,
    help: str,
    *,
    needs: str | tuple[str, ...] = (),
    idle_without: str | tuple[str, ...] = (),
    **more: Any,
) -> Any:
    """A flag with a value; see `Flag`."""
    needs, idle_without = ((names,) if isinstance(names, str) else names for names in (needs, idle_without))
    declared = Flag(help=help, needs=needs, idle_without=idle_without, **more)
    metadata = {'flag': declared}
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: default.copy(), metadata=metadata)
    return field(default=default, metadata=metadata)


def switch(help: str, *, default: bool = False, **more: Any) -> Any:
    """A flag without a value that switches something on; `off` names the flag that switches it off."""
    return flag(default, help, **more)


def name_of(dest: str) -> str:
    """The flag of a field on the command line: `img_size` is `--img-size`."""
    return '--' + dest.replace('_', '-')


def neutral_in(group: type) -> set[str]:
    """Those of the flags of a group that change nothing that a run learns."""
    return {name for name, declared in declared_in(group).items() if declared.neutral}


def declared_in(group: type) -> dict[str, Flag]:
    """The flags of a group, or of a class of several groups, by their fields."""
    return {f.name: f.metadata['flag'] for f in fields(group) if 'flag' in f.metadata}


def default_of(group: type, dest: str) -> Any:
    """The default value of a flag."""
    found = next(f for f in fields(group) if f.name == dest)
    return found.default if found.default_factory is MISSING else found.default_factory()


def describe_default(group: type, dest: str) -> str:
    """The default of a flag in words; '' for a switch that is off."""
    default, declared = default_of(group, dest), declared_in(group)[dest]
    if declared.unset:
        return declared.unset
    if isinstance(default, bool):
        return 'on' if default else ''
    if default in (None, '', [], {}):
        return 'none'
    return ' '.join(f'{v:g}' for v in default) if isinstance(default, list) else f'{default}'


@functools.cache
def annotations_of(group: type) -> dict[str, Any]:
    """The types of the flags of a group."""
    return typing.get_type_hints(group)


def add_group(parser: argparse.ArgumentParser, group: type) -> None:
    """Add the flags that a group itself declares, under the first line of its docstring."""
    title = (group.__doc__ or group.__name__).splitlines()[0].removesuffix('.')
    add = parser.add_argument_group(title).add_argument
    annotations = annotations_of(group)
    own = set(group.__annotations__)
    for dest, declared in declared_in(group).items():
        if dest in own:
            _add(add, group, dest, declared, annotations[dest])


def _add(add: Any, group: type, dest: str, declared: Flag, annotation: Any) -> None:
    default, text = default_of(group, dest), describe_default(group, dest)
    values = ', '.join(str(v) for v in declared.allowed or () if v)
    help = declared.help + (f': {values}' if values else '')
    help = help.replace('%', '%%')
    if declared.choices is not None and declared.metavar:
        help += ': %(choices)s'  # argparse expands this for --help: plugins are not imported earlier
    help += f' (default: {text})'.replace('%', '%%') if text else ''
    short = [name for name in declared.also if not name.startswith('--')]
    long = [name for name in declared.also if name.startswith('--')]
    # the first of the long names gives argparse the field's name
    names = [dest] if declared.positional else [*short, *(long if '_' in ''.join(long) else [name_of(dest), *long])]
    if annotation is bool:
        if declared.off == 'no':
            add(*names, action=argparse.BooleanOptionalAction, default=default, help=help)
            return
        add(*names, action='store_true', default=default, help=help)
        if declared.off:
            add(declared.off, dest=dest, action='store_false', default=default, help=f'switch {name_of(dest)} off')
        return
    kind, is_list, is_pairs = value_type(annotation)
    metavar = declared.metavar or ('K=V' if is_pairs else {int: 'N', float: 'R'}.get(kind, 'NAME'))
    settings: dict[str, Any] = {'default': default, 'help': help, 'metavar': metavar}
    if is_pairs:
        add(*names, nargs='*', action=_AsDict, type=_pair, **settings)
        return
    if declared.each and not is_list:
        add(*names, nargs='+', action=_AsWords, **settings)
        return
    if is_list:
        settings['nargs'] = declared.count or '+'
    elif declared.const is not None or declared.positional:
        settings |= {'nargs': '?', 'const': declared.const}
    if declared.choices is not None:
        settings |= {'choices': declared.choices, 'metavar': declared.metavar}  # without one argparse shows the choices
    add(*names, type=kind, **settings)


def value_type(annotation: Any) -> tuple[type, bool, bool]:
    """The type of one value of an annotation, whether there may be several, and whether they are `k=v` pairs."""
    if typing.get_origin(annotation) in (types.UnionType, Union):  # `int | None`
        annotation = next(a for a in typing.get_args(annotation) if a is not types.NoneType)
    origin = typing.get_origin(annotation)
    if origin is dict:
        return str, False, True
    if origin is list:
        return typing.get_args(annotation)[0], True, False
    return annotation, False, False


def is_each(value: Any, of_lists: bool) -> bool:
    """Whether the value of an `Each` is a list of one for each teacher.

    Args:
        value: The value.
        of_lists: Whether one value is a list itself.
    """
    return isinstance(value, list) and (not of_lists or any(v is None or isinstance(v, list) for v in value))


class _AsDict(argparse.Action):
    """Keeps pairs as a dict."""

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: Any = None) -> None:
        setattr(namespace, self.dest, dict(filter(None, values)))


class Words(list[str]):
    """What the command line gives to a flag that may have one value for each teacher; `teachers.read_words` converts it."""


class _AsWords(argparse.Action):
    """Keeps words as they are."""

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: Any = None) -> None:
        setattr(namespace, self.dest, Words(values))


def _pair(text: str) -> tuple[str, Any] | None:
    """Key and value of a word `key=value`, as timm's ParseKwargs reads it; None for an empty word."""
    if not text:
        return None
    key, _, value = text.partition('=')
    if not (key.isidentifier() and '=' in text):
        raise argparse.ArgumentTypeError(f'takes key=value pairs, got {reprlib.repr(text)}')
    try:
        return key, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return key, value  # a plain word
    except Exception as e:  # too deep, unhashable, ...
        raise argparse.ArgumentTypeError(f'cannot read {reprlib.repr(text)} ({type(e).__name__})') from e
