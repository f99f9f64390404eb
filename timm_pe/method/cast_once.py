"""Weights cast once to what autocast would cast them to in every step."""

from collections.abc import Callable, Sequence

import torch
import torch.nn as nn

from ..errors import is_out_of_memory


@torch.no_grad()
def cast_once(network: nn.Module, dtype: torch.dtype, run: Callable[[], Sequence[torch.Tensor]]) -> None:
    """Cast the weights of convolutions and linear layers, as autocast remembers only casts of weights that are trained.

    A network that reads a weight outside of its layer would compute with another one: it keeps all its weights.

    Args:
        network: A frozen network.
        dtype: That of autocast.
        run: Runs it under autocast, always on the same batch, and gives its outputs.
    """
    layers = [m for m in network.modules() if type(m) in (nn.Conv2d, nn.Linear)]
    kept = [(p, p.data) for layer in layers for p in layer.parameters(recurse=False)]
    before = run()
    for parameter, value in kept:
        parameter.data = value.to(dtype)
    try:
        equal = all(map(torch.equal, before, run()))
    except RuntimeError as e:
        if is_out_of_memory(e):
            raise
        equal = False
    if not equal:
        for parameter, value in kept:
            parameter.data = value
