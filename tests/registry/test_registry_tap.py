"""The tap of every architecture of the installed timm, against timm's own `pre_logits`.

Shapes and widths are compared on the meta device for every architecture; numbers on random weights for the smallest one
of each kind, a kind being a model class with one structure of classifier. Takes minutes.
"""

import copy
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import numpy as np
import pytest
import timm
import torch
from timm.models import list_modules
from torch import nn

from timm_pe.method.tap import FeatureTap

SHAPES = 'shape and width, with and without a classifier'
NUMBERS = 'numbers, the smallest of each kind'
DROPOUT = 'logits in training with the dropout taken over, the smallest of each kind'
SIZES = (96, 128, 160, 192, 224)  # the first that an architecture takes, else its own


@pytest.mark.registry
def test_feature_is_pre_logits_for_every_architecture():
    modules = sorted(list_modules(), key=lambda module: -len(timm.list_models(module=module)))
    with ProcessPoolExecutor(os.cpu_count(), get_context('spawn'), torch.set_num_threads, (1,)) as pool:
        reports = list(pool.map(_check_module, modules))
    results = {
        what: {k: v for report in reports for k, v in report[what].items()} for what in (SHAPES, NUMBERS, DROPOUT)
    }
    wrong = {what: {name: why for name, why in found.items() if why} for what, found in results.items()}
    for what, found in results.items():
        print(f'\nFeatureTap, {what}: {len(found) - len(wrong[what])} of {len(found)}', file=sys.stderr)
    assert set(results[SHAPES]) == set(timm.list_models())
    assert wrong == {SHAPES: {}, NUMBERS: {}, DROPOUT: {}}


def _check_module(module: str) -> dict[str, dict[str, str]]:
    """What is wrong with each architecture of one of timm's modules, '' where nothing is."""
    report, smallest = {SHAPES: {}, NUMBERS: {}, DROPOUT: {}}, {}
    for name in timm.list_models(module=module):
        with torch.device('meta'):
            model = timm.create_model(name).eval()
            num_params = sum(p.numel() for p in model.parameters())
            kind = _kind(model)
            if num_params < smallest.get(kind, (float('inf'), ''))[0]:
                smallest[kind] = num_params, name
            report[SHAPES][name] = _attempt(_check_shapes, model)
    for _, name in smallest.values():
        report[NUMBERS][name] = _attempt(_check_numbers, name)
        report[DROPOUT][name] = _attempt(_check_dropout, name)
    return report


def _attempt(check, *args) -> str:
    try:
        check(*args)
    except Exception as e:
        return f'{type(e).__name__}: {e}'
    return ''


def _kind(model: nn.Module) -> tuple:
    classifier = model.get_classifier() if hasattr(model, 'get_classifier') else None
    types = [type(x) for x in classifier] if isinstance(classifier, tuple) else [type(classifier)]
    return type(model), *types, type(getattr(model, 'head', None)), str(getattr(model, 'global_pool', ''))


@torch.no_grad()
def _check_shapes(model: nn.Module) -> None:
    x = torch.empty(2, *model.pretrained_cfg['input_size'])
    maps, forward_features = [], model.forward_features
    model.forward_features = lambda *args, **kwargs: maps.append(forward_features(*args, **kwargs)) or maps[-1]
    tap = FeatureTap(model)
    output = model(x)
    feature = tap.pop()
    if not maps:
        model.forward_features(x)
    expected = _pre_logits(model, maps[0], output)
    assert feature.shape == expected.shape == (2, tap.width), (feature.shape, expected.shape, tap.width)
    if hasattr(model, 'reset_classifier'):
        tap.remove()
        model.reset_classifier(0)
        model.forward_features = lambda *args, **kwargs: maps[0]  # the backbone is the same, its time is saved
        tap = FeatureTap(model)
        model(x)
        assert tap.pop().shape == expected.shape == (2, tap.width), 'without a classifier'


@torch.no_grad()
def _check_numbers(name: str) -> None:
    for kwargs in ({}, {'num_classes': 0}):
        model, x = _create_small(name, **kwargs)
        tap = FeatureTap(model)
        output = model(x)
        feature = tap.pop()
        expected = _pre_logits(model, model.forward_features(x), output)
        assert feature.std() > 0
        torch.testing.assert_close(feature, expected, rtol=1e-5, atol=1e-6)
        if not hasattr(model, 'get_classifier'):
            return
    if hasattr(model, 'set_distilled_training'):
        model = _create_small(name)[0].train()
        model.set_distilled_training(True)
        tap = FeatureTap(model)
        model(x)
        assert tap.pop().shape == feature.shape


@torch.no_grad()
def _check_dropout(name: str) -> None:
    """A tap before the dropout leaves the logits as they are, to the last bit and random number."""
    try:
        model, x = _create_small(name, drop_rate=0.5)
    except TypeError as e:
        if 'drop_rate' in str(e):  # an encoder that never drops
            return
        raise
    model.train()
    untouched = copy.deepcopy(model)
    FeatureTap(model, before_dropout=True)
    outputs = []
    for each in (untouched, model):
        torch.manual_seed(1)
        np.random.seed(1)  # volo mixes its tokens by it
        outputs.append((each(x), torch.get_rng_state()))
    torch.testing.assert_close(outputs[1], outputs[0], rtol=0, atol=0, equal_nan=True)


def _create_small(name: str, **kwargs) -> tuple[nn.Module, torch.Tensor]:
    """The architecture in eval mode and an input, both at the smallest size that it takes."""
    cfg = timm.get_pretrained_cfg(name)
    for size in SIZES:
        if size >= min(cfg.input_size[1:]):
            break
        try:
            img_size = {'img_size': size} if cfg.fixed_input_size else {}
            return _create(name, (cfg.input_size[0], size, size), **kwargs, **img_size)
        except (AssertionError, IndexError, RuntimeError, TypeError, ValueError):
            pass
    return _create(name, cfg.input_size, **kwargs)


def _create(name: str, input_size: tuple[int, int, int], **kwargs) -> tuple[nn.Module, torch.Tensor]:
    model, x = timm.create_model(name, **kwargs), torch.randn(2, *input_size)
    _fill_norms(model)
    model.eval()(x)
    return model, x


def _fill_norms(model: nn.Module) -> None:
    # as initialized, a norm in eval does almost nothing: the wrong side of it would pass for the right one
    for name, tensor in model.state_dict().items():
        if tensor.ndim == 1 and tensor.is_floating_point():
            tensor.mul_(torch.rand_like(tensor) + 0.5)
            if name.endswith(('bias', 'running_mean')):
                tensor.add_(torch.randn_like(tensor), alpha=0.1)


def _pre_logits(model: nn.Module, maps: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
    """`[b, d]` by timm's own head; of an encoder, which has none, the mean of its output over positions."""
    if hasattr(model, 'get_classifier'):
        return model.forward_head(maps, pre_logits=True)
    return output.mean((2, 3)) if output.ndim == 4 else output.mean(1)
