"""Batch norms of a frozen network, folded into the layers before them if that is exact to rounding."""

import copy
import weakref
from typing import Any, cast

import torch
import torch.nn as nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_weights, fuse_linear_bn_weights

from ..errors import is_out_of_memory
from .tap import FeatureTap

_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_Layer = nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Linear
# exceptions of a network that can't be copied, or can't take the images
_FAILURES = (RuntimeError, AssertionError, ValueError, IndexError, TypeError, AttributeError)


def fold_batch_norm(model: nn.Module, example: torch.Tensor, tap: str | None = None) -> nn.Module | None:
    """A copy of `model`, in eval mode, without the batch norms that directly follow a convolution or a linear layer.

    In eval mode such a norm is a scale and a shift per channel, which can be merged into the weights before it: g (W x
    + b - mean) / sqrt(var + eps) + beta is one convolution too (Jacob et al., arXiv 1712.05877, sec. 3.2). Which layer
    a norm follows is observed in a forward pass of `example`, not derived from names. An activation inside the norm
    (timm's `BatchNormAct2d`) stays.

    The copy is made and checked on the CPU, where TF32 does not affect the comparison, then moved to the device of
    `model`, which itself is not changed.

    Args:
        model: A network in float32 (or float64).
        example: Images `[b, ch, h, w]` as it will see them; copy and original are compared on these.
        tap: Path of the module whose input is the feature, for models that are not timm's.

    Returns:
        The copy; None if there is nothing to fold, if `model` can't be copied or doesn't take `example`, or if output
        or feature of the copy differ by more than rounding (a convolution whose output is also read elsewhere, ...).
    """
    floats = {p.dtype for p in model.parameters() if p.is_floating_point()}
    if not count_batch_norms(model) or floats not in ({torch.float32}, {torch.float64}):
        return None
    try:
        folded = copy.deepcopy(model).cpu().eval()
        example = example.to('cpu', next(folded.parameters()).dtype)
        layer_of = _find_layers_before_norms(folded, example)
        expected = _run(folded, example, tap)
        for norm, layer in layer_of.items():
            _fold(folded, norm, layer)
        results = _run(folded, example, tap)
        exact = all(equal_to_rounding(a, b) for a, b in zip(results, expected, strict=True))
    except _FAILURES as e:
        if is_out_of_memory(e):
            raise
        return None
    return folded.to(next(model.parameters()).device) if layer_of and exact else None


def count_batch_norms(model: nn.Module) -> int:
    """Number of batch norms in a network."""
    return sum(isinstance(module, _BatchNorm) for module in model.modules())


def equal_to_rounding(x: torch.Tensor, y: torch.Tensor, rtol: float = 1e-4) -> bool:
    """Whether two tensors of one shape differ by less than `rtol` times the largest of `y`. Waits for the device."""
    if x.shape != y.shape:
        return False
    x, y = x.detach().double(), y.detach().double()
    # false for NaN, and for zeros, which prove nothing
    return bool((x - y).abs().max() < rtol * y.abs().max())


@torch.no_grad()
def _run(model: nn.Module, example: torch.Tensor, path: str | None) -> list[torch.Tensor]:
    """Feature and outputs."""
    tap = FeatureTap(model, path)
    try:
        output = model(example)
        return [tap.pop(), *(output if isinstance(output, (tuple, list)) else (output,))]
    finally:
        tap.remove()


@torch.no_grad()
def _find_layers_before_norms(model: nn.Module, example: torch.Tensor) -> dict[_BatchNorm, _Layer]:
    """Batch norm -> the layer whose unchanged output enters it in a forward pass of `example`."""
    made: dict[int, tuple[weakref.ref[torch.Tensor], _Layer, int]] = {}
    layer_of: dict[_BatchNorm, _Layer] = {}

    def keep_output(layer: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> None:
        made[id(output)] = weakref.ref(output), cast(_Layer, layer), output._version

    def look_up_input(norm: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        if id(args[0]) not in made:
            return
        output, layer, version = made[id(args[0])]
        # the id of a freed tensor may be reused; another version means that it was changed in place
        if output() is args[0] and args[0]._version == version:
            layer_of[cast(_BatchNorm, norm)] = layer

    handles = [m.register_forward_hook(keep_output) for m in model.modules() if _can_carry(m)]
    handles += [m.register_forward_pre_hook(look_up_input) for m in model.modules() if _is_frozen_norm(m)]
    try:
        model(example)
    finally:
        for handle in handles:
            handle.remove()
    return layer_of


def _can_carry(layer: nn.Module) -> bool:
    # a weight that is computed (weight norm, parametrizations) can't be replaced
    return isinstance(layer, (*_CONVS, nn.Linear)) and 'weight' in layer._parameters


def _is_frozen_norm(module: nn.Module) -> bool:
    return isinstance(module, _BatchNorm) and module.running_mean is not None


def _fold(model: nn.Module, norm: _BatchNorm, layer: _Layer) -> None:
    """Merge the norm into the layer, and replace it by what remains (its activation, or nothing)."""
    fuse = fuse_linear_bn_weights if isinstance(layer, nn.Linear) else fuse_conv_bn_weights
    mean, var = cast(torch.Tensor, norm.running_mean), cast(torch.Tensor, norm.running_var)
    weight = torch.ones_like(mean) if norm.weight is None else norm.weight
    bias = torch.zeros_like(mean) if norm.bias is None else norm.bias
    layer.weight, layer.bias = fuse(layer.weight, layer.bias, mean, var, norm.eps, weight, bias)
    rest = [part for part in (getattr(norm, 'drop', None), getattr(norm, 'act', None)) if part is not None]
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is norm:
                setattr(parent, name, nn.Sequential(*rest))
