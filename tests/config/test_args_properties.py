"""Any command line and any YAML file is either a run or one line, never a traceback; found with hypothesis."""

import contextlib
import io
import string

import pytest
import yaml
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from timm_pe.config.run_config import create_parser, parse_config


def repeatable(examples: int) -> settings:
    """The same examples every time, so that a test that passed passes again."""
    return settings(
        max_examples=examples,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.filter_too_much],
    )


DATA = ['--dataset', 'sklearn/digits']
ACTIONS = [a for a in create_parser()._actions if a.option_strings and a.dest not in ('help', 'version', 'config')]

numbers = st.one_of(
    st.integers(-5, 300).map(str),
    st.floats().map(str),
    st.integers().map(str),
    st.sampled_from(['1e400', '-0', '1_000', '0x10', '9' * 5000, '٣', '1e-400', '']),
)
words = st.one_of(
    st.text(max_size=20),
    st.text(string.printable, max_size=20),
    st.sampled_from(['', ' ', 'None', 'true', 'a=1', 'a=[1, (2,)]', 'a={1: 2}', 'a=', '=', 'x' * 9000, 'auto', 'all']),
)


def values_of(action) -> st.SearchStrategy[list[str]]:
    """Words to put behind a flag: likely ones, its choices and its default among them, and unlikely ones."""
    if action.nargs == 0:
        return st.just([])
    default = action.default if isinstance(action.default, list) else [action.default]
    known = [str(v) for v in [*(action.choices or []), *default] if v is not None]
    likely = st.integers(1, 9).map(str) if action.type in (int, float) else words
    one = st.one_of(*([st.sampled_from(known)] * 4 if known else [likely] * 3), likely, numbers | words)
    least, most = {None: (1, 1), '?': (0, 1), '*': (0, 3), '+': (1, 3)}.get(action.nargs, (action.nargs, action.nargs))
    return st.lists(one, min_size=least, max_size=most)


@st.composite
def flags(draw) -> list[str]:
    """Some flags of the parser with values, good and bad."""
    argv = []
    for action in draw(st.lists(st.sampled_from(ACTIONS), min_size=1, max_size=4)):
        argv += [draw(st.sampled_from(action.option_strings)), *draw(values_of(action))]
    return argv


plain = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=12), st.dates(), st.binary(max_size=8)
)
structures = st.recursive(
    plain, lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(plain, inner, max_size=4)), max_leaves=8
)


@st.composite
def configs(draw) -> dict:
    """What a YAML file may hold: some flags with their defaults, some with anything, some keys that are no flag's."""
    actions = st.lists(st.sampled_from(ACTIONS), max_size=3)
    config = {action.dest: action.default for action in draw(actions)}
    config |= {action.dest: draw(structures) for action in draw(actions)[: draw(st.integers(0, 2))]}
    return config | draw(st.dictionaries(plain, structures, max_size=draw(st.sampled_from([0, 0, 0, 1]))))


def outcome(argv: list[str]) -> str | None:
    """The args.yaml of a run; None where the command line was refused, which must be in one line."""
    with contextlib.redirect_stderr(io.StringIO()) as err, contextlib.redirect_stdout(io.StringIO()) as out:
        try:
            text = parse_config(argv).to_yaml()
        except SystemExit as e:
            text = None
            assert e.code == 2
    assert out.getvalue() == ''
    said = err.getvalue()
    if text is not None:
        assert said == ''
        return text
    assert said.startswith('train_distill: error: ')
    assert said.endswith('\n')
    assert said[:-1].isprintable()
    assert len(said) < 1500
    return None


def as_file(tmp_path, content: str | bytes) -> list[str]:
    file = tmp_path / 'args.yaml'
    file.write_bytes(content if isinstance(content, bytes) else content.encode('utf-8', 'surrogatepass'))
    return ['-c', str(file)]


def same_run_again(text: str, tmp_path) -> None:
    """args.yaml, read back, gives itself; but for what YAML may not ask for."""
    args = yaml.safe_load(text)
    assume(not args['device_modules'] and not args['dataset_trust_remote_code'])
    again = outcome(as_file(tmp_path, text))
    assert again is not None
    assert {**yaml.safe_load(again), 'config': ''} == {**args, 'config': ''}


@repeatable(250)
@given(argv=flags())
def test_any_flags_are_a_run_or_one_line(argv, tmp_path):
    assume(not any(word.startswith('-h') or word == '--help' for word in argv))
    text = outcome([*DATA, *argv])
    if text is not None:
        same_run_again(text, tmp_path)


@repeatable(250)
@given(config=configs())
def test_any_yaml_is_a_run_or_one_line(config, tmp_path):
    try:
        content = yaml.dump(config, Dumper=yaml.SafeDumper, allow_unicode=True)
    except (yaml.YAMLError, UnicodeError, TypeError):
        assume(False)
    text = outcome([*as_file(tmp_path, content), *DATA])
    if text is not None:
        same_run_again(text, tmp_path)


@repeatable(150)
@given(content=st.one_of(st.binary(max_size=60), st.text('ab: -[]{}&*!|>\'"%@`#,?\n\t0.1e~<', max_size=40)))
def test_any_bytes_for_yaml_are_a_run_or_one_line(content, tmp_path):
    outcome([*as_file(tmp_path, content), *DATA])


ODD = ('', 'x', '-1', '0', 'nan', '1e400', '9' * 5000, 'a=1', '\x1b', '١', '[1]', '{', '\udcff')


@pytest.mark.parametrize('action', ACTIONS, ids=lambda a: a.option_strings[-1])
def test_every_flag_takes_odd_words_without_a_traceback(action):
    first = ACTIONS.index(action)
    for word in (ODD[(first + i) % len(ODD)] for i in (0, 4, 8)):
        outcome([*DATA, action.option_strings[-1], *([word] if action.nargs != 0 else [])])
