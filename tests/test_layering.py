"""Who may import whom: the folders of timm_pe, from the lowest to the highest."""

import ast
from pathlib import Path

import timm_pe

ROOT = Path(timm_pe.__file__).parent
# a module imports from its own floor and lower ones
FLOORS = (
    {'errors', 'version'},
    {'method'},
    {'config'},
    {'process', 'zoo'},
    {'data', 'run_folder'},
    {'train'},
    {'runs'},
    {'analysis', 'report', 'export', 'precompute', 'demo'},
)
FLOOR_OF = {name: floor for floor, names in enumerate(FLOORS) for name in names}


def place(path):
    """The folder, or the module at the top, that a file is in; of the package itself nothing."""
    return path.relative_to(ROOT).parts[0].removesuffix('.py').replace('__init__', '')


def sources():
    return [path for path in sorted(ROOT.rglob('*.py')) if place(path)]


def imports(path):
    """Places of timm_pe that a file imports from, and other top-level packages."""
    own, other = set(), set()
    package = ['timm_pe', *path.relative_to(ROOT).parts[:-1]]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            parts = [*base, *(node.module.split('.') if node.module else [])]
            if parts[0] != 'timm_pe':
                other.add(parts[0])
            elif len(parts) > 1:
                own.add(parts[1])
            else:
                own |= {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            other |= {alias.name.split('.')[0] for alias in node.names}
    return own, other


def test_every_file_has_a_floor():
    assert {place(path) for path in sources()} == set(FLOOR_OF)


def test_no_file_imports_upwards():
    for path in sources():
        for imported in imports(path)[0]:
            assert FLOOR_OF[imported] <= FLOOR_OF[place(path)], f'{path.relative_to(ROOT)} imports {imported}'


def test_the_method_needs_torch_and_timm_and_sees_no_settings():
    allowed = {'torch', 'timm', 'safetensors'}
    standard = __import__('sys').stdlib_module_names
    for path in sources():
        own, other = imports(path)
        if place(path) == 'method':
            assert own <= {'errors', 'method'}, path.name
            assert other - set(standard) <= allowed, path.name
            assert 'argparse' not in other, path.name


def test_nothing_in_the_package_imports_the_scripts():
    for path in sources():
        assert not {'train_distill', 'timm_pe_command'} & imports(path)[1], path.name


def test_there_are_no_import_cycles_between_modules():
    graph = {}
    for path in sources():
        name = '.'.join(path.relative_to(ROOT).with_suffix('').parts).removesuffix('.__init__')
        package = name.split('.')[:-1]
        graph[name] = set()
        for node in ast.parse(path.read_text()).body:  # those inside of functions are made when they are called
            if isinstance(node, ast.ImportFrom) and node.level:
                base = package[: len(package) - node.level + 1]
                target = '.'.join([*base, *(node.module.split('.') if node.module else [])])
                graph[name] |= {target, *(f'{target}.{alias.name}'.lstrip('.') for alias in node.names)}
    graph = {name: (targets & set(graph)) - {name} for name, targets in graph.items()}
    while graph:
        free = {name for name, targets in graph.items() if not targets & set(graph)}
        assert free, f'cycle among {sorted(graph)}'
        graph = {name: targets for name, targets in graph.items() if name not in free}
