"""The last feature map of any timm model: one vector for each position of a grid over the image."""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn

from ..errors import UsageError, is_out_of_memory, one_line

# parameters that a model puts in front of its patch tokens, one token for each row
_PREFIX_TOKENS = ('cls_token', 'dist_token', 'reg_token')
# sides in pixels that are tried if a model does not take the size that it declares
_SIDES = (224, 256, 192, 160, 128, 96, 64, 32, 288, 320, 384, 448, 512)
# exceptions of a network that can't take the images
_FAILURES = (RuntimeError, AssertionError, ValueError, IndexError, TypeError, KeyError, AttributeError)


class MapTap:
    """Gives what `forward_features` returned in the last forward of a timm model, as a map `[b, d, h, w]`.

    The structure of the model decides how it is read:

    - a map with its channels first, or last (`[b, h, w, d]`, as of Swin): where the model's `num_features` channels are.
    - tokens `[b, n, d]`: without those in front (class, distillation, register), they are the grid, row by row, that has
      the shape of the image.

    `forward_features` is no module that could be hooked. The tap puts an attribute of the same name on the model, which
    calls it and keeps its result; `remove()` takes it away. A deepcopy of a module that holds both the model and its tap (as
    an EMA makes) has its own tap. The tap keeps one map, with its graph, until it is popped.

    Args:
        model: A timm model. It sees one black image when the tap is made.

    Attributes:
        width: Number of channels `d` of the map.

    Raises:
        UsageError: The model has no map; the message says what it has instead.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model: Any = model
        self._name = type(model).__name__
        if not hasattr(model, 'forward_features'):
            raise self._refusal('it has no forward_features()')
        self._value: Any = None
        self._image: tuple[int, ...] = ()  # shape of the images that entered
        # that of another tap on this model; pickle would take a method of the model itself for ours
        self._inner: Callable[..., Any] | None = model.__dict__.get('forward_features')
        model.__dict__['forward_features'] = self._run  # a bound method: a deepcopied model calls the deepcopied tap
        try:
            self.width = self._probe()
        except Exception:
            self.remove()
            raise

    def __getstate__(self) -> dict[str, Any]:
        # a tensor inside an autograd graph can't be deepcopied
        return {**self.__dict__, '_value': None}

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        run = self._inner or partial(type(self._model).forward_features, self._model)
        self._value = run(*args, **kwargs)
        image = args[0] if args else next(iter(kwargs.values()), None)
        self._image = image.shape if isinstance(image, torch.Tensor) else ()
        return self._value

    def pop(self) -> torch.Tensor:
        """The map of the last forward; it can be taken once.

        Returns:
            `[b, d, h, w]`, part of the autograd graph if the forward was.

        Raises:
            RuntimeError: No forward has run since the last call.
            UsageError: What `forward_features` returned is not a map.
        """
        value, self._value = self._value, None
        if value is None:
            raise RuntimeError(
                f'{self._name} has no feature map to pop: its forward has not run since the last pop(), or the tap was '
                f'removed. Call the whole model once before each pop().'
            )
        return self._as_map(value)

    def remove(self) -> None:
        """Give the model its own `forward_features` back; the last tap made must be the first removed."""
        self._value = None
        if self._inner is not None:
            self._model.__dict__['forward_features'] = self._inner
        else:
            self._model.__dict__.pop('forward_features', None)

    def _as_map(self, x: Any) -> torch.Tensor:
        width = getattr(self._model, 'num_features', None)
        if not isinstance(x, torch.Tensor) or x.ndim not in (3, 4):
            given = str(list(x.shape)) if isinstance(x, torch.Tensor) else f'a {type(x).__name__}'
            raise self._refusal(f'its forward_features() gives {given}, neither one map nor tokens')
        if x.ndim == 3:
            return self._tokens_as_map(x)
        channels_last = getattr(self._model, 'output_fmt', None) == 'NHWC' or x.shape[1] != width == x.shape[-1]
        return x.movedim(-1, 1) if channels_last else x

    def _tokens_as_map(self, x: torch.Tensor) -> torch.Tensor:
        prefix = getattr(self._model, 'num_prefix_tokens', None)
        if prefix is None:
            tokens = [getattr(self._model, name, None) for name in _PREFIX_TOKENS]
            prefix = sum(t.shape[1] for t in tokens if isinstance(t, torch.Tensor))
        number = x.shape[1] - prefix
        rows = _rows_of_grid(number, *self._image[2:]) if len(self._image) == 4 else None
        if rows is None:
            size = 'x'.join(map(str, self._image[2:]))
            raise self._refusal(f'the {number} tokens behind {prefix} in front are no grid over {size} images')
        return x[:, prefix:].transpose(1, 2).unflatten(2, (rows, number // rows))

    @torch.no_grad()
    def _probe(self) -> int:
        """Number of channels of the map, from a forward in eval mode."""
        weight = next(self._model.parameters(), torch.empty(0))
        training = [(module, module.training) for module in self._model.modules()]
        self._model.eval()
        failure: Exception | None = None
        try:
            for shape in self._shapes():
                try:
                    self._model(weight.new_zeros(1, *shape))
                except _FAILURES as e:
                    if is_out_of_memory(e):
                        raise
                    failure = failure or e
                    continue
                if self._value is None:
                    raise self._refusal('its forward does not call forward_features()')
                return self.pop().shape[1]
        finally:
            for module, mode in training:
                module.training = mode
        raise self._refusal(f'it takes images of no usual size ({one_line(failure, 120) if failure else ""})')

    def _refusal(self, reason: str) -> UsageError:
        return UsageError(f'{self._name} has no feature map: {reason}. Give no map weight, or take another network.')

    def _shapes(self) -> Iterator[tuple[int, int, int]]:
        """Shapes `(ch, h, w)` of images that the model may take, the likeliest first."""
        cfg = getattr(self._model, 'pretrained_cfg', None) or {}
        own = cfg.get('input_size') or (3, 224, 224)
        convs = (m for m in self._model.modules() if isinstance(m, nn.Conv2d))
        channels = next((m.in_channels for m in convs), own[0])  # pretrained_cfg does not know of in_chans
        embedded = getattr(getattr(self._model, 'patch_embed', None), 'img_size', None)
        sizes = [*([tuple(embedded)] if embedded else []), tuple(own[1:]), *((side, side) for side in _SIDES)]
        for of_channels in dict.fromkeys((channels, own[0])):
            for height, width in dict.fromkeys(cast(list[tuple[int, int]], sizes)):
                yield of_channels, height, width


def _rows_of_grid(number: int, height: int, width: int) -> int | None:
    """Rows of the grid of `number` square patches over an image of `height` x `width`; None if there is no such grid.

    Patches of side p make floor(height / p) rows and floor(width / p) columns, so rows / columns differs from height /
    width by less than one patch.
    """
    wanted = math.sqrt(number * height / width) if number > 0 else 0.0
    divisors = [rows for rows in range(1, number + 1) if number % rows == 0]
    rows = min(divisors, key=lambda rows: abs(math.log(rows / wanted)), default=None)
    if rows is None or abs(rows - number // rows * height / width) >= max(1.0, height / width):
        return None
    return rows


def on_grid(x: torch.Tensor, grid: Sequence[int]) -> torch.Tensor:
    """A map on a grid of as many or fewer positions, by adaptive average pooling; channels last.

    Args:
        x: `[b, d, h, w]`.
        grid: Rows and columns.

    Returns:
        `[b, rows, columns, d]`; in float32 (float64 stays) if it is pooled.
    """
    if tuple(x.shape[2:]) != tuple(grid):
        with torch.autocast(x.device.type, enabled=False):
            x = F.adaptive_avg_pool2d(x if x.dtype == torch.float64 else x.float(), (grid[0], grid[1]))
    return x.movedim(1, -1)
