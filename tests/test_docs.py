"""README and docs/: every block of code runs, every command line is one that the programs take, every page is reachable."""

import argparse
import importlib
import importlib.util
import json
import os
import re
import shlex
from configparser import ConfigParser
from pathlib import Path
from types import ModuleType, SimpleNamespace
from xml.sax.saxutils import escape

import pytest
import torch
import yaml
from helpers import run

import train_distill
from timm_pe import export
from timm_pe.config.cli import Parser
from timm_pe.config.declare import declared_in
from timm_pe.config.run_config import GROUPS, RunConfig, create_parser, parse_config
from timm_pe.method.names import FEATURE_LOSSES, PROJECTORS

ROOT = Path(train_distill.__file__).parent
README = (ROOT / 'README.md').read_text()
PAGES = sorted(
    {ROOT / 'README.md', ROOT / 'CONTRIBUTING.md', ROOT / 'hparams' / 'README.md', *(ROOT / 'docs').rglob('*.md')}
)
TRAIN = ('train-distill', 'train_distill.py', './distributed_train.sh')
# programs of others, which a reader is told to look at files with
FOREIGN = {'tensorboard', 'trackio', 'wandb', 'git', 'cd'}


def blocks(path: Path) -> list[tuple[str, str]]:
    """Code blocks of a page as (language, text): the fenced ones, and in README those that are indented."""
    text = path.read_text()
    fenced = re.findall(r'^```(\w*)\n(.*?)^```$', text, re.DOTALL | re.MULTILINE)
    fenced = [(kind or 'text', block) for kind, block in fenced]
    rest = re.sub(r'^```.*?^```$', '', text, flags=re.DOTALL | re.MULTILINE)
    indented = re.findall(r'(?:\n\n)((?:    .+\n)+)', rest)
    return fenced + [('', re.sub('^    ', '', block, flags=re.MULTILINE)) for block in indented]


def load_file(name: str, path: Path) -> ModuleType:
    """A file of Python that belongs to no package, as a module."""
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


PYTHON = [(named(p), i, text) for p in PAGES for i, (kind, text) in enumerate(blocks(p)) if kind == 'python']


@pytest.fixture
def registries():
    """Gives the registries back as they were."""
    known = [(registry, dict(registry)) for registry in (PROJECTORS.factories, FEATURE_LOSSES.factories)]
    yield
    for registry, before in known:
        registry.clear()
        registry.update(before)


@pytest.mark.parametrize(('page', 'number', 'text'), PYTHON, ids=[f'{page}-{i}' for page, i, _ in PYTHON])
def test_a_python_block_runs_as_it_stands(page, number, text, registries, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    exec(compile(text, f'{page}, block {number}', 'exec'), {})


def test_there_are_python_blocks_in_the_readme_and_in_the_guide():
    pages = [page for page, _, _ in PYTHON]
    assert pages.count('README.md') >= 1
    assert pages.count('docs/guide/python.md') >= 5


def commands(text: str) -> list[str]:
    """Command lines of a shell block: continued lines joined, comments left out."""
    lines = [line.strip() for line in text.replace('\\\n', ' ').splitlines()]
    return [line for line in lines if line and not line.startswith('#')]


def words_of(command: str) -> list[str]:
    """The words of a command without the assignments before it; of `bash -c`, those inside."""
    words = shlex.split(command, comments=True)
    while words and re.fullmatch(r'\w+=.*', words[0]):
        words.pop(0)
    if words[:1] == ['timm-pe']:
        tool = ['train-distill'] if words[1] == 'train' else ['python', '-m', f'timm_pe.{words[1]}']
        words = [*tool, *words[2:]]
    return words_of(words[words.index('-c') + 1]) if 'bash' in words else words


def training_argv(words: list[str]) -> list[str] | None:
    """The arguments that reach train_distill; None for another command."""
    words = words[1:] if words[0] == 'python' and not words[1].startswith('-') else words
    if words[:3] == ['python', '-m', 'timm_pe.precompute']:
        return words[3:]
    if words[0] == 'torchrun':
        return words[words.index('train_distill') + 1 :]
    if words[0] not in TRAIN:
        return None
    return words[2:] if words[0] == './distributed_train.sh' else words[1:]


SHELL = [
    (named(page), command)
    for page in PAGES
    for kind, text in blocks(page)
    if kind in ('', 'bash')  # '': indented
    for command in commands(text)
]
# the formula and the line of Python of README, the file tree of CONTRIBUTING
TREE = (ROOT / 'CONTRIBUTING.md').read_text().split('## Where things are')[1].split('\n## ')[0]
NO_COMMANDS = [
    (page, line)
    for page, line in SHELL
    if (page == 'README.md' and re.match(r'(p|p_k|loss)\s+=|timm\.create_model', line))
    or (page == 'CONTRIBUTING.md' and line in TREE)
]


def check_command(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail unless the program of `command` takes it."""
    words = words_of(command)
    if not words or words[0] in FOREIGN or words[0] == 'export':
        return
    argv = training_argv(words)
    if words[0].startswith('--'):  # flags to add to the command of a recipe
        parse_config(['data', '-c', 'hparams/cifar100_wrn_40_2_wrn_16_2_paper.yaml', *words])
    elif argv is not None:
        parse_config(argv)
    elif words[0] == 'make':
        targets = set(re.findall(r'^([\w-]+):', (ROOT / 'Makefile').read_text(), re.MULTILINE))
        assert {w for w in words[1:] if '=' not in w} <= targets
    elif words[0] == 'pip':
        check_pip(words)
    else:
        assert words[0] == 'python', command
        is_module = words[1] == '-m'
        path = ROOT / (words[2].replace('.', '/') + '.py' if is_module else words[1])
        check_tool(path, words[3 if is_module else 2 :], monkeypatch)


def check_pip(words: list[str]) -> None:
    config = ConfigParser()
    config.read(ROOT / 'setup.cfg')
    target = words[-1]
    assert words[1] == 'install'
    assert re.fullmatch(r'(timm_pe|\.)(\[\w+\])?', target), target
    if '[' in target:
        assert target.split('[')[1][:-1] in config['options.extras_require']


def check_tool(path: Path, argv: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Have a tool's own parser take the arguments, and stop it there."""

    class Parsed(Exception):
        pass

    def stop_after(parse):
        def parse_and_stop(self, args=None, namespace=None):
            parse(self, args, namespace)
            raise Parsed

        return parse_and_stop

    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.import_module(f'timm_pe.{path.stem}') if path.parent.name == 'timm_pe' else None
    if module is None:
        monkeypatch.syspath_prepend(str(path.parent))
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(__import__('sys').modules, path.stem, module)
        spec.loader.exec_module(module)
    if hasattr(module, 'create_parser') and module.create_parser is not create_parser:
        module.create_parser().parse_args(argv)
        return
    with monkeypatch.context() as patch, pytest.raises(Parsed):
        for parser in (argparse.ArgumentParser, Parser):
            patch.setattr(parser, 'parse_args', stop_after(parser.parse_args))
        module.main(argv)


@pytest.mark.parametrize('page', sorted({page for page, _ in SHELL}))
def test_every_command_of_a_page_is_one_that_its_program_takes(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    for command in [c for p, c in SHELL if p == page and (p, c) not in NO_COMMANDS]:
        try:
            check_command(command, monkeypatch)
        except SystemExit:
            pytest.fail(f'{page}: refused: {command}')


DIGITS = sorted({page for page, command in SHELL if 'sklearn/digits' in command})


@pytest.mark.parametrize('page', DIGITS)
def test_the_commands_of_a_page_on_the_digits_run_one_after_the_other(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for command in [c for p, c in SHELL if p == page]:
        words = words_of(command)
        if 'sklearn/digits' in command:
            argv = training_argv(words)
            run(argv)
            assert (tmp_path / 'runs' / argv[argv.index('--experiment') + 1] / 'student.safetensors').is_file()
        elif words[:2] == ['python', '-m'] and '/data/' not in command:  # a tool, on the runs before it
            importlib.import_module(words[2]).main(words[3:])


def test_the_guide_shows_a_whole_story_on_the_digits():
    assert {'docs/guide/first-steps.md', 'docs/guide/teacher-cache.md', 'docs/guide/trackers.md'} <= set(DIGITS)


@pytest.mark.parametrize('page', PAGES, ids=named)
def test_every_flag_on_a_page_exists(page):
    parsers = create_parser(), export.create_parser()
    own = {s for parser in parsers for a in parser._actions for s in a.option_strings}
    foreign = {'--signal', '--requeue', '--logdir', '--project', '--nodes', '--ntasks-per-node', '--gpus-per-node'}
    foreign |= {'--standalone', '--nproc-per-node'}  # torchrun's
    shown = set(re.findall(r'(?<![\w-])--[a-z][\w-]+', re.sub(r'(?m)^--8<--.*$', '', page.read_text())))
    assert shown <= own | foreign


def test_the_page_of_flags_has_each_one_that_is_added_to_those_of_timm():
    timm = {dest for dest, declared in declared_in(RunConfig).items() if not declared.added}
    known = {s for a in create_parser()._actions if a.dest in timm for s in a.option_strings}
    added = {s for a in create_parser()._actions for s in a.option_strings} - known - {'-h', '--help', '-c', '--config'}
    page = (ROOT / 'docs' / 'guide' / 'flags.md').read_text()
    assert len(added) > 30
    assert added <= set(re.findall(r'--[a-z][\w-]+', page))


def test_the_tables_of_flags_are_those_of_the_declarations():
    tables = load_file('flag_tables', ROOT / 'docs' / 'flag_tables.py')
    text = tables.PAGE.read_text()
    shown = set(re.findall(r'<!-- flags: (\w+) -->', text))
    assert shown == {g.__name__ for g in GROUPS if any(d.added for d in declared_in(g).values())}
    assert tables.update(text) == text, 'run: python docs/flag_tables.py'
    stale = text.replace('number of projectors', 'number of them')
    assert stale != text
    assert tables.update(stale) == text


@pytest.mark.parametrize('recipe', sorted((ROOT / 'hparams').glob('*.yaml')), ids=lambda p: p.stem)
def test_a_recipe_holds_known_flags_with_the_command_in_its_head(recipe):
    args = parse_config(['data', '-c', str(recipe)])
    assert args.teacher
    assert f'-c hparams/{recipe.name}' in recipe.read_text().split('\nmodel:')[0]


def test_the_file_tree_names_every_folder_and_every_module_beside_them():
    for path in (ROOT / 'timm_pe').glob('*.py'):
        if path.name not in ('__init__.py', 'version.py'):
            assert path.name in TREE, path.name
    for path in (ROOT / 'timm_pe').glob('*/__init__.py'):
        assert f'      {path.parent.name}/ ' in TREE, path.parent.name
    for path in re.findall(r'`([\w/]+\.py)`', (ROOT / 'CONTRIBUTING.md').read_text()):
        assert (ROOT / path).is_file() or (ROOT / 'timm_pe' / path).is_file(), path


def test_the_navigation_reaches_every_page_and_the_theme_loads_nothing_from_elsewhere():
    config = yaml.safe_load((ROOT / 'mkdocs.yml').read_text())
    targets = set(re.findall(r'[\w/-]+\.md', yaml.safe_dump(config['nav'])))
    pages = {str(p.relative_to(ROOT / 'docs')) for p in (ROOT / 'docs').rglob('*.md')}
    assert pages <= targets
    assert targets - pages <= {'RELIABILITY.md'}
    assert config['theme']['font'] is False
    assert 'analytics' not in config['extra']


def test_the_api_page_names_everything_that_is_public():
    import timm_pe

    named = set(re.findall(r'::: timm_pe\.(\w+)', (ROOT / 'docs' / 'api.md').read_text()))
    assert set(timm_pe.__all__) - {'__version__'} <= named


@pytest.fixture(scope='module')
def hooks():
    """docs/hooks.py, which belongs to no package."""
    return load_file('docs_hooks', ROOT / 'docs' / 'hooks.py')


def test_the_navigation_leaves_out_pages_that_are_not_there_and_those_that_would_show_no_file(hooks, tmp_path):
    for name in ('a.md', 'benchmarks/results/accuracy.md', 'benchmarks/results/none.md'):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    kept = [{'A': 'a.md'}, {'B': [{'C': 'benchmarks/results/accuracy.md'}]}]
    there = [{'A': 'a.md'}, {'D': 'd.md'}, {'B': [*kept[1]['B'], {'E': 'benchmarks/results/none.md'}]}]
    assert hooks._without_missing(tmp_path, there) == kept


def test_the_page_of_recipes_shows_each_file(hooks):
    page = SimpleNamespace(file=SimpleNamespace(src_uri='recipes.md'))
    shown = hooks.on_page_markdown('table', page)
    for recipe in (ROOT / 'hparams').glob('*.yaml'):
        assert f'```yaml\n{recipe.read_text()}```' in shown
    page.file.src_uri = 'index.md'
    assert hooks.on_page_markdown('home', page) == 'home'


def test_the_chart_of_the_results_page_shows_every_method_that_is_compared_with_the_student_alone(hooks, tmp_path):
    results = json.loads((hooks.RESULTS / 'accuracy.json').read_text())
    path = tmp_path / 'figures' / 'accuracy.svg'
    hooks.draw_accuracy(results, path)
    drawn = path.read_bytes()
    labels = [m['label'] for s in results['suites'].values() for m in s['methods'].values() if m['minus_alone']]
    assert len(labels) > 10
    for label in labels:
        assert escape(label).encode() in drawn, label
    os.utime(path, (0, 0))
    hooks.draw_accuracy(results, path)
    assert path.stat().st_mtime == 0  # the same numbers give the same file, which is left alone
    assert list(path.parent.iterdir()) == [path]


def test_the_chart_of_projectors_has_each_pair_and_number_of_epochs_they_are_compared_at(hooks, tmp_path):
    results = json.loads((hooks.RESULTS / 'accuracy.json').read_text())
    compared = [s for s in results['suites'].values() if s['methods'].get('pe_q3', {}).get('minus_no_projector')]
    assert len(compared) > 2
    path = tmp_path / 'figures' / 'projectors.svg'
    hooks.draw_projectors(results, path)
    drawn = path.read_text()
    for suite in compared:
        assert f'{suite["common"]["epochs"]} epochs' in drawn
        assert suite['student'] in drawn
    assert drawn.count('one projector') == 1
    # one of a pair is moved: so is its point, and nothing else of that size
    moved = json.loads(json.dumps(results))
    moved['suites']['cifar10_resnet']['methods']['pe_q3']['minus_no_projector']['mean'] += 0.5
    hooks.draw_projectors(moved, path)
    assert path.read_text() != drawn


def test_the_chart_of_a_steps_cost_has_each_pair_and_comes_before_the_folded_tables(hooks, tmp_path):
    results = json.loads((hooks.RESULTS / 'step_time.json').read_text())
    hooks.draw_step_time(results, tmp_path / 'step_time.svg')
    drawn = (tmp_path / 'step_time.svg').read_text()
    for pair in results['steps']:
        assert pair.split(':')[0] in drawn
    page = SimpleNamespace(file=SimpleNamespace(src_uri='benchmarks/results/step_time.md'))
    given = (hooks.RESULTS / 'step_time.md').read_text()
    shown = hooks.on_page_markdown('--8<-- "benchmarks/results/step_time.md"', page)
    assert shown.index('step_time.svg') < shown.index('## ')
    tables = re.findall(r'^\|.*', given, re.MULTILINE)
    assert len(tables) > 20
    assert not re.search(r'^\|', shown, re.MULTILINE)  # none stands open
    assert all(f'    {line}\n' in shown for line in tables)


def test_the_badges_are_true():
    setup = ConfigParser()
    setup.read(ROOT / 'setup.cfg')
    lowest = dict(re.findall(r'^(\w+)>=([\d.]+)', setup['options']['install_requires'], re.MULTILINE))
    badges = dict(re.findall(r'img\.shields\.io/badge/(\w+)-([\w.]+(?:--[\d.]+)?)(?:%2B)?-', README))
    assert badges == {
        'python': setup['options']['python_requires'].removeprefix('>='),
        'torch': lowest['torch'],
        'timm': lowest['timm'],
        'licence': setup['metadata']['license'].replace('-', '--'),
    }


def test_the_readme_is_one_page():
    assert len(README.splitlines()) <= 150
