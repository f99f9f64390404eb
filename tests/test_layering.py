"""Who may import whom: a module imports from its own floor and lower ones, without cycles."""

import ast
from pathlib import Path

import timm_pe

ROOT = Path(timm_pe.__file__).parent
FLOORS = {
    0: {'tap', 'projectors', 'losses', 'plugins', 'recipes', 'errors', 'files', 'version'},
    1: {'task', 'teacher', 'fold', 'loading', 'draws', 'zoo'},
    2: {
        'args_check',
        'args_timm',
        'args_yaml',
        'cli',
        'args',
        'runtime',
        'data',
        'models',
        'engine',
        'fit',
        'task_from_args',
        'checkpoints',
        'logs',
        'trackers',
        'cache',
        'interrupts',
        'nonfinite',
        'run_state',
        'unreadable',
    },
    3: {'demo', 'analysis', 'measures', 'plots', 'report', 'precompute', 'export'},
}
FLOOR_OF = {name: floor for floor, names in FLOORS.items() for name in names}


def sources():
    for path in sorted(ROOT.rglob('*.py')):
        name = path.relative_to(ROOT).parts[0].removesuffix('.py')
        if name != '__init__' or path.parent != ROOT:
            yield name, path


def imports(path):
    """Names of timm_pe's modules, and of other top-level packages, that a file imports."""
    own, other = set(), set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            if path.parent == ROOT or node.level == 2:
                own |= {node.module.split('.')[0]} if node.module else {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            parts = node.module.split('.')
            if parts[0] == 'timm_pe':
                own |= {parts[1]} if len(parts) > 1 else {a.name for a in node.names}
            else:
                other.add(parts[0])
        elif isinstance(node, ast.Import):
            other |= {a.name.split('.')[0] for a in node.names}
    return own, other


def test_every_module_has_a_floor():
    assert {name for name, _ in sources()} == set(FLOOR_OF)


def test_no_module_imports_upwards():
    for name, path in sources():
        for imported in imports(path)[0]:
            assert FLOOR_OF.get(imported, 0) <= FLOOR_OF[name], f'{path.name} imports {imported}'


def test_floor_0_needs_torch_alone():
    for name, path in sources():
        if FLOOR_OF[name] == 0:
            assert 'timm' not in imports(path)[1], path.name


def test_the_method_never_sees_a_namespace():
    for name, path in sources():
        if FLOOR_OF[name] <= 1:
            assert 'argparse' not in imports(path)[1], path.name


def test_nobody_imports_a_tool_but_another_tool():
    for name, path in sources():
        if FLOOR_OF[name] < 3:
            assert not imports(path)[0] & FLOORS[3], path.name


def test_there_are_no_import_cycles():
    graph = {name: set() for name in FLOOR_OF}
    for name, path in sources():
        graph[name] |= imports(path)[0] - {name}
    while graph:
        free = {name for name, targets in graph.items() if not targets & set(graph)}
        assert free, f'cycle among {sorted(graph)}'
        graph = {name: targets for name, targets in graph.items() if name not in free}
