"""The feature map of every architecture of the installed timm, against what its `forward_features` and its
`forward_intermediates` give.

Whether there is a map, and its shape, is found on the meta device for every architecture; numbers on random weights for the
smallest one of each class. Takes minutes.
"""

import os
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest
import timm
import torch
from test_registry_tap import _attempt, _create_small
from timm.models import list_modules
from torch import nn

from timm_pe import UsageError
from timm_pe.method.map_tap import MapTap

SHAPES = 'shape and width, every architecture that has a map'
NUMBERS = 'numbers, the smallest of each class that has a map'
# several maps, tokens of classes alone, or a forward of their own
WITHOUT = {
    'CoaT',
    'CrossVit',
    'EfficientViM',
    'EfficientViMDistilled',
    'Gemma4VitEncoder',
    'PoolingVisionTransformer',
}


@pytest.mark.registry
def test_every_architecture_gives_a_map_or_one_clear_line():
    modules = sorted(list_modules(), key=lambda module: -len(timm.list_models(module=module)))
    with ProcessPoolExecutor(os.cpu_count(), get_context('spawn'), torch.set_num_threads, (1,)) as pool:
        reports = list(pool.map(_check_module, modules))
    wrong = {}
    for what in (SHAPES, NUMBERS):
        found = {name: why for report in reports for name, why in report[what].items()}
        wrong[what] = {name: why for name, why in found.items() if why}
        print(f'\nMapTap, {what}: {len(found) - len(wrong[what])} of {len(found)}', file=sys.stderr)
    refused = {name: line for report in reports for name, line in report['refused'].items()}
    print(f'\nMapTap, without a map: {len(refused)} of {len(timm.list_models())}', file=sys.stderr)
    for name, (_, line) in sorted(refused.items()):
        print(f'  {name}: {line}', file=sys.stderr)
    assert sum(len(report[SHAPES]) for report in reports) + len(refused) == len(timm.list_models())
    assert wrong == {SHAPES: {}, NUMBERS: {}}
    assert {of_class for of_class, _ in refused.values()} == WITHOUT
    assert all(line.startswith(of_class) and '\n' not in line for of_class, line in refused.values())


def _check_module(module: str) -> dict[str, dict]:
    """What is wrong with each architecture of one of timm's modules, '' where nothing is; and those that have no map."""
    report, smallest = {SHAPES: {}, NUMBERS: {}, 'refused': {}}, {}
    for name in timm.list_models(module=module):
        with torch.device('meta'):
            model = timm.create_model(name).eval()
            try:
                tap = MapTap(model)
            except UsageError as e:
                report['refused'][name] = type(model).__name__, str(e)
                continue
            report[SHAPES][name] = _attempt(_check_shape, model, tap)
            num_params = sum(p.numel() for p in model.parameters())
            if num_params < smallest.get(type(model), (float('inf'), ''))[0]:
                smallest[type(model)] = num_params, name
    for _, name in smallest.values():
        report[NUMBERS][name] = _attempt(_check_numbers, name)
    return report


def _check_shape(model: nn.Module, tap: MapTap) -> None:
    """The width that the tap has found in its own forward is that which the model declares."""
    assert tap.width == model.num_features
    tap.remove()
    assert 'forward_features' not in vars(model)


@torch.no_grad()
def _check_numbers(name: str) -> None:
    model, x = _create_small(name)
    tap = MapTap(model)
    model(x)
    found = tap.pop()
    tap.remove()
    features = model.forward_features(x)
    assert found.shape[:2] == (2, tap.width)
    assert found.std() > 0
    if features.ndim == 4:
        torch.testing.assert_close(found, features if features.shape == found.shape else features.permute(0, 3, 1, 2))
    else:
        number = found[0, 0].numel()
        assert features.shape[1] >= number
        torch.testing.assert_close(found.flatten(2).mT, features[:, -number:])
    expected = _intermediate(model, x)
    # others end in layers behind their last stage
    if (
        expected is not None
        and expected.shape == found.shape
        and type(model).__name__ not in ('Xcit', 'NormFreeNet', 'XceptionAligned')
    ):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def _intermediate(model: nn.Module, x: torch.Tensor) -> torch.Tensor | None:
    """The last map that timm itself extracts, normalized, where it can."""
    try:
        found = model.forward_intermediates(x, indices=1, norm=True, intermediates_only=True, output_fmt='NCHW')
    except (AssertionError, AttributeError, TypeError):
        return None
    return found[-1]
