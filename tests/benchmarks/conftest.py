import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

import train_distill

BENCHMARKS = Path(train_distill.__file__).parent / 'benchmarks'


@pytest.fixture(scope='module')
def load_script() -> Iterator[Callable[[str], ModuleType]]:
    """Imports a script of benchmarks/ by its name, as if it had been started there; it is forgotten after the module."""
    loaded = []

    def load(name: str) -> ModuleType:
        spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f'{name}.py')
        module = sys.modules[name] = importlib.util.module_from_spec(spec)
        loaded.append(name)
        spec.loader.exec_module(module)
        return module

    sys.path.insert(0, str(BENCHMARKS))
    yield load
    sys.path.remove(str(BENCHMARKS))
    for name in loaded:
        sys.modules.pop(name, None)
