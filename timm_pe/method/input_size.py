"""Networks with a fixed input size, built anew for another one: their position embeddings are resampled, as timm does it."""

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn as nn

from ..errors import is_out_of_memory

Size = tuple[int, int]


def size_to_build(create: Callable[[], nn.Module], wanted: Size, rounds: bool = True) -> Size | None:
    """The size that an architecture has to be built for to see images of `wanted` pixels.

    Args:
        create: Makes the network; it is called on the meta device, where weights take no memory.
        wanted: Height and width of the images.
        rounds: Whether to round them to the network's patches; otherwise they have to fit.

    Returns:
        Height and width; None if it takes these images as it is, or cannot be built for another size.
    """
    try:
        # the run's random state is left as it is
        with torch.random.fork_rng(devices=[]), torch.device('meta'):
            model = cast(Any, create().eval())
            if not hasattr(model, 'set_input_size') or _takes(model, wanted):
                return None
            size = _rounded(model, wanted)
            if size != wanted and not rounds:
                return None
            model.set_input_size(img_size=size)
            return size if _takes(model, size) else None
    except Exception as e:  # an architecture may fail in many ways on a size, or on the meta device
        if is_out_of_memory(e):
            raise
        return None


def resize_network(
    model: nn.Module, create: Callable[[], nn.Module], student_size: Size | None, input_size: int | None
) -> Size | None:
    """Build a network with weights for the student's size, or for the one that is given, in place.

    Args:
        model: The network.
        create: Makes another one like it.
        student_size: Height and width of the student's images; None leaves the network as it is.
        input_size: Side of the images that it is to see, None for the student's.

    Returns:
        The size that it is built for; None if it stays as it is.
    """
    if student_size is None or not hasattr(model, 'set_input_size'):
        return None
    built = size_to_build(create, (input_size, input_size) if input_size else student_size, rounds=not input_size)
    if built is not None:
        cast(Any, model).set_input_size(img_size=built)
    return built


def _takes(model: nn.Module, size: Size) -> bool:
    channels = cast(Any, model).pretrained_cfg['input_size'][0]
    try:
        with torch.no_grad():
            model(torch.empty(1, channels, *size, device='meta'))
    except (RuntimeError, AssertionError, ValueError, IndexError, TypeError):
        return False
    return True


def _rounded(model: nn.Module, size: Size) -> Size:
    """`size` in whole patches, at least one; of a network without patches, in whole steps of 32 pixels."""
    embed: Any = getattr(model, 'patch_embed', None)
    ratio = embed.feat_ratio(as_scalar=False) if hasattr(embed, 'feat_ratio') else (32, 32)
    height, width = (max(1, round(side / step)) * step for side, step in zip(size, ratio, strict=True))
    return height, width
