"""A flag is declared once: parser, YAML, checks and --help follow from it."""

from dataclasses import dataclass, fields
from typing import Any

import pytest

from timm_pe.config.cli import Parser
from timm_pe.config.declare import add_group, default_of, describe_default, flag, switch
from timm_pe.config.rules import out_of_bounds
from timm_pe.config.run_config import RunConfig, create_parser, parse_config

DATA = ['--dataset', 'sklearn/digits']


@dataclass(frozen=True, kw_only=True)
class Flags:
    """A group.

    With more words that --help does not show.
    """

    sides: list[int] | None = flag(None, 'sides', metavar='N', at_least=1, at_most=9)
    rate: float = flag(0.5, 'rate', also=('-r', '--speed'), above=0, share=True)
    kind: str | None = flag(None, 'kind', allowed=(None, 'a', 'b'), unset='as it comes')
    backend: str | None = flag(None, 'backend', const='inductor')
    pairs: dict[str, Any] = flag({}, 'pairs')
    quiet: bool = switch('say less', off='--loud')
    sound: bool = switch('sound', default=True, off='no')


def parse(*argv):
    parser = Parser(prog='p')
    add_group(parser, Flags)
    return parser.parse_args([*argv]), parser.format_help()


def test_the_annotation_is_the_type_of_the_value():
    args, _ = parse('--sides', '3', '4', '-r', '0.25', '--pairs', 'x=1', 'y=a', '--backend', '--quiet', '--no-sound')
    assert vars(args) == {
        'sides': [3, 4],
        'rate': 0.25,
        'kind': None,
        'backend': 'inductor',
        'pairs': {'x': 1, 'y': 'a'},
        'quiet': True,
        'sound': False,
    }
    assert parse('--speed', '1', '--quiet', '--loud')[0].quiet is False
    assert Flags(**vars(parse()[0])) == Flags()


def test_help_says_defaults_and_values_and_never_none():
    shown = parse()[1]
    assert 'rate (default: 0.5)' in shown
    assert 'kind: a, b (default: as it comes)' in shown
    assert 'pairs (default: none)' in shown
    assert 'sound (default: on)' in shown
    assert '--sides N [N ...]' in shown
    assert '--pairs [K=V ...]' in shown
    assert 'A group:' in shown
    assert 'None' not in shown
    assert 'None' not in create_parser().format_help()


@pytest.mark.parametrize(
    ('dest', 'value', 'message'),
    [
        ('sides', [1, 0], 'must be 1 or more, got [1, 0]'),
        ('sides', [1, 10], 'must be 9 or less, got [1, 10]'),
        ('rate', 0, 'must be above 0, got 0'),
        ('rate', 1.5, 'must be from 0 to 1, got 1.5'),
        ('kind', 'c', "must be one of 'a', 'b', got 'c'"),
        ('kind', None, ''),
        ('sides', None, ''),
    ],
)
def test_the_bounds_of_a_declaration_are_those_of_the_check(dest, value, message):
    assert out_of_bounds(Flags, dest, value) == message


def test_a_default_that_can_change_is_not_shared():
    assert default_of(Flags, 'pairs') is not default_of(Flags, 'pairs')
    assert RunConfig().decay_milestones is not RunConfig().decay_milestones
    assert describe_default(Flags, 'pairs') == 'none'


def test_settings_cannot_be_changed():
    config = parse_config(DATA)
    with pytest.raises(AttributeError):
        config.lr = 1.0


def test_every_setting_has_exactly_one_group_that_declares_it():
    declared = [name for base in RunConfig.__mro__ for name in base.__dict__.get('__annotations__', ())]
    assert sorted(declared) == sorted({f.name for f in fields(RunConfig)})


def test_what_was_given_is_known():
    config = parse_config([*DATA, '--epochs', '7', '--lr', '0.1'])
    assert config.is_given('epochs')
    assert config.is_given('lr')
    assert not config.is_given('model')
    assert not parse_config([*DATA, '--epochs', '300']).is_given('epochs')  # the same run as without
