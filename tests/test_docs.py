import re
from pathlib import Path

import pytest
import torch

import train_distill
from timm_pe import export
from timm_pe.args import create_parser, parse_args
from timm_pe.projectors import _PROJECTORS

ROOT = Path(train_distill.__file__).parent
README = (ROOT / 'README.md').read_text()


def test_the_python_examples_of_the_readme_run():
    blocks = re.findall(r'```python\n(.*?)```', README, re.DOTALL)
    assert len(blocks) == 2
    torch.manual_seed(0)
    known = dict(_PROJECTORS)
    try:
        for block in blocks:
            exec(compile(block, 'README.md', 'exec'), {})
        assert set(_PROJECTORS) - set(known) == {'bottleneck'}
    finally:
        _PROJECTORS.clear()
        _PROJECTORS.update(known)


def test_every_flag_in_the_readme_exists():
    parsers = create_parser(), export.create_parser()
    flags = {s for parser in parsers for a in parser._actions for s in a.option_strings}
    text = '\n'.join(line for line in README.splitlines() if '#SBATCH' not in line)
    named = set(re.findall(r'(?<![\w-])--[a-z][\w-]+', text))
    assert named
    assert named <= flags


@pytest.mark.parametrize('recipe', sorted((ROOT / 'hparams').glob('*.yaml')), ids=lambda p: p.stem)
def test_a_recipe_holds_known_flags_with_the_command_in_its_head(recipe):
    args, _ = parse_args(['data', '-c', str(recipe)])
    assert args.teacher
    assert f'-c hparams/{recipe.name}' in recipe.read_text().split('\nmodel:')[0]


def test_the_file_tree_of_the_readme_names_every_module():
    tree = README.split('## Files')[1]
    for path in (ROOT / 'timm_pe').glob('*.py'):
        if path.name not in ('__init__.py', 'version.py'):
            assert path.name in tree, path.name
