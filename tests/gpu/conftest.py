"""Tests on a device: the environment variable DEVICE names it, and a file of JSON lines keeps what each test found.

With DEVICE=cpu the same tests run without what a CPU cannot show.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import timm
import torch

# without a DEVICE the tests are skipped where there is none; a device that was asked for must be there
DEVICE = os.environ.get('DEVICE') or 'cuda'
RESULTS = os.environ.get('RESULTS')


@pytest.fixture(autouse=True)
def _needs_device() -> Iterator[None]:
    if DEVICE != 'cpu' and not torch.cuda.is_available():
        if 'DEVICE' in os.environ:
            pytest.fail(f'DEVICE={DEVICE}: no CUDA device here, DEVICE=cpu needs none', pytrace=False)
        pytest.skip('no CUDA device here, DEVICE=cpu needs none')
    yield
    torch.compiler.reset()
    if DEVICE != 'cpu':
        torch.cuda.empty_cache()


@pytest.fixture
def on_device(small_run: list[str]) -> list[str]:
    """The command line of a run of seconds on the device, without its models."""
    return [*small_run, '--device', DEVICE]


def _write(line: dict[str, object]) -> None:
    if RESULTS:
        with open(RESULTS, 'a') as f:
            f.write(json.dumps(line) + '\n')


def pytest_configure(config: pytest.Config) -> None:
    if RESULTS and not hasattr(config, 'workerinput'):
        Path(RESULTS).parent.mkdir(parents=True, exist_ok=True)
        Path(RESULTS).unlink(missing_ok=True)
        name = torch.cuda.get_device_name(0) if DEVICE != 'cpu' and torch.cuda.is_available() else 'none'
        _write({'device': DEVICE, 'gpu': name, 'torch': torch.__version__, 'timm': timm.__version__})


@pytest.hookimpl(trylast=True)
def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    told_by_another = 'PYTEST_XDIST_WORKER' in os.environ
    if told_by_another or (report.when != 'call' and report.passed):
        return
    line = {'test': report.nodeid.split('/')[-1], 'outcome': report.outcome, 'seconds': round(report.duration, 2)}
    if report.failed:
        line['error'] = report.longreprtext[-600:]
    _write({**line, **dict(report.user_properties)})
