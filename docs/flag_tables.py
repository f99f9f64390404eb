"""The tables of docs/guide/flags.md, made from the declarations of the flags.

python docs/flag_tables.py      # writes them anew between the marks; a test says when that is due
"""

import re
from pathlib import Path

from timm_pe.config import flags
from timm_pe.config.declare import (
    Flag,
    annotations_of,
    declared_in,
    default_of,
    describe_default,
    name_of,
    value_type,
)

PAGE = Path(__file__).parent / 'guide' / 'flags.md'
_MARKED = re.compile(r'(<!-- flags: (\w+) -->\n).*?(<!-- end -->)', re.DOTALL)


def flag_table(group: type) -> str:
    """A Markdown table of the flags that this project adds in a group."""
    rows = ['| flag | default | meaning |', '|---|---|---|']
    rows += [_row(group, dest) for dest, declared in declared_in(group).items() if declared.added]
    return '\n'.join(rows) + '\n'


def _row(group: type, dest: str) -> str:
    declared, default = declared_in(group)[dest], default_of(group, dest)
    name = name_of(dest)
    if declared.off == 'no':
        names = f'`{name}`, `{name_of("no_" + dest)}`'
    else:
        names = f'`{name}`' if isinstance(default, bool) else f'`{name} {_metavar(group, dest)}`'
    return f'| {names} | {_default(group, dest)} | {_meaning(declared)} |'


def _metavar(group: type, dest: str) -> str:
    name = declared_in(group)[dest].metavar
    _, is_list, is_pairs = value_type(annotations_of(group)[dest])
    several = is_list or declared_in(group)[dest].each
    return 'K=V ...' if is_pairs else (name or 'NAME') + ' ...' * several


def _default(group: type, dest: str) -> str:
    default, text = default_of(group, dest), describe_default(group, dest)
    if isinstance(default, bool):
        return 'on' if default else 'off'
    if declared_in(group)[dest].unset:
        return _marked_up(text)
    if isinstance(default, float):
        return f'{default:g}'
    return f'`{default}`' if isinstance(default, str) and default else text


def _meaning(declared: Flag) -> str:
    """What a flag does, with the values that it takes where the help does not quote each."""
    values = [v for v in declared.allowed or declared.choices or () if v]
    named = ', '.join(f'`{v}`' for v in values if any(f"'{w}'" not in declared.help for w in values))
    return _marked_up(declared.help) + (f': {named}' if named else '')


def _marked_up(text: str) -> str:
    """Flags, what is quoted, and what looks like a path or a command in code spans; papers as links."""
    text = re.sub(r"(?<!\w)'([^' ]+)'(?!\w)", r'`\1`', text)
    text = re.sub(
        r'(?<![`\w])(--[\w-]+|python -m [\w.]+|RUN/\w+|[A-Z]+_[A-Z]+|k=v \.\.\.|\.\w+(?:\.\w+)?(?=[,)]))', r'`\1`', text
    )
    return re.sub(r'(arXiv (\d{4}\.\d{5}))', r'[\1](https://arxiv.org/abs/\2)', text)


def update(text: str) -> str:
    """The page with its tables made anew."""
    return _MARKED.sub(lambda m: f'{m[1]}{flag_table(getattr(flags, m[2]))}{m[3]}', text)


if __name__ == '__main__':
    PAGE.write_text(update(PAGE.read_text()))
