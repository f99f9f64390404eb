#!/usr/bin/env python3
"""How hard is the code to carry on? Counts what makes it so, from the source alone.

python benchmarks/house.py [FOLDER]      # the root of a checkout, this one by default; `make house`
"""

import argparse
import ast
import statistics
import tomllib
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

# names that a run's settings have in the code
SETTINGS = ('args', 'config', 'teacher_args')
# names of a run's files
RUN_FILES = ('args.yaml', 'summary.csv', 'student.safetensors', 'last.pth.tar', 'model_best.pth.tar', 'analysis.json')
# stages of a run: a function that calls three or more of them defines their order
STAGES = ('create_student', 'create_datasets', 'create_data', 'create_run_teachers', 'create_run_task')


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef]:
    """All functions of a module, methods too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            yield node


def takes_namespace(function: ast.FunctionDef) -> bool:
    """Whether a parameter of it is annotated as a Namespace."""
    arguments = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
    return any('Namespace' in ast.unparse(a.annotation) for a in arguments if a.annotation)


def stores_into_settings(tree: ast.AST) -> int:
    """Assignments to an attribute of a run's settings, setattr on them too."""
    stores = 0
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign | ast.AugAssign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            named = [t for target in targets for t in ast.walk(target) if isinstance(t, ast.Attribute)]
            stores += sum(isinstance(t.value, ast.Name) and t.value.id in SETTINGS for t in named)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == 'setattr':
            stores += ast.unparse(node.args[0]) in SETTINGS
    return stores


def filled_later(trees: dict[Path, ast.AST]) -> set[str]:
    """Fields of the trainer that code outside its class sets on it."""
    return {
        target.attr
        for tree in trees.values()
        for node in ast.walk(tree)
        for assigned in _assigned(node)
        for target in ast.walk(assigned)
        if isinstance(target, ast.Attribute) and isinstance(target.value, ast.Name) and target.value.id == 'trainer'
    }


def _assigned(node: ast.AST) -> list[ast.expr]:
    if isinstance(node, ast.Assign):
        return node.targets
    return [node.optional_vars] if isinstance(node, ast.withitem) and node.optional_vars else []


def file_names(tree: ast.AST) -> bool:
    """Whether a module holds the name of a run's file in its code (documents and messages do not count)."""
    return any(
        isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value in RUN_FILES
        for node in ast.walk(tree)
    )


def writes_stages(tree: ast.AST) -> bool:
    """Whether a function of a module calls three or more stages."""
    for function in functions(tree):
        called = {ast.unparse(n.func) for n in ast.walk(function) if isinstance(n, ast.Call)}
        if len(called & set(STAGES)) > 2:
            return True
    return False


def lines_of(function: ast.FunctionDef) -> int:
    """Lines of a function from its def to its end, without its docstring."""
    docstring = function.body[0] if ast.get_docstring(function) else None
    return function.end_lineno - function.lineno + 1 - (docstring.end_lineno - docstring.lineno + 1 if docstring else 0)


def measure(root: Path) -> dict[str, object]:
    """The rows of the table."""
    package = root / 'timm_pe'
    own = [p for p in sorted(package.rglob('*.py')) if 'zoo' not in p.relative_to(package).parts]
    own.append(root / 'train_distill.py')
    trees = {path: ast.parse(path.read_text()) for path in own}
    top = [p for p in package.iterdir() if p.suffix == '.py' and p.name != '__init__.py']
    folders = [p for p in package.iterdir() if p.is_dir() and (p / '__init__.py').exists()]
    overrides = tomllib.loads((root / 'pyproject.toml').read_text())['tool']['mypy'].get('overrides', [])
    ignored = [
        name
        for override in overrides
        if override.get('ignore_errors')
        for name in ([override['module']] if isinstance(override['module'], str) else override['module'])
    ]
    names = {'.'.join(path.relative_to(root).with_suffix('').parts): path for path in own}
    skipped = {n for n in names if any(fnmatch(n, pattern) for pattern in ignored)}
    lengths = {f'{path.name}:{f.name}': lines_of(f) for path, tree in trees.items() for f in functions(tree)}
    sizes = {path.relative_to(root): len(path.read_text().splitlines()) for path in own}
    longest, largest = max(lengths, key=lengths.get), max(sizes, key=sizes.get)
    return {
        'functions that take a Namespace': sum(takes_namespace(f) for tree in trees.values() for f in functions(tree)),
        "stores into a run's settings": sum(stores_into_settings(tree) for tree in trees.values()),
        'fields of the trainer that are set from outside it': len(filled_later(trees)),
        "modules that know a run's file names": sum(file_names(tree) for tree in trees.values()),
        'modules that write the order of stages down': sum(writes_stages(tree) for tree in trees.values()),
        'modules and packages at the top': f'{len(top)} + {len(folders)}',
        'modules that mypy ignores': f'{len(skipped)} ({sum(sizes[names[n].relative_to(root)] for n in skipped)} lines)',
        'largest file': f'{largest}, {sizes[largest]} lines',
        'longest function': f'{longest}, {lengths[longest]} lines',
        'median function': f'{statistics.median(lengths.values()):g} lines of {len(lengths)} functions',
        'lines (zoo apart)': sum(sizes.values()),
    }


def main(argv: list[str] | None = None) -> None:
    """Print the table.

    Args:
        argv: Command line; None takes that of the process.
    """
    parser = argparse.ArgumentParser(prog='house.py', description=__doc__.splitlines()[0])
    parser.add_argument('folder', type=Path, nargs='?', default=Path(__file__).resolve().parent.parent)
    for name, value in measure(parser.parse_args(argv).folder).items():
        print(f'{name:<52}{value}')


if __name__ == '__main__':
    main()
