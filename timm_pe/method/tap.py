"""The penultimate feature of any timm model, read where it enters the classifier."""

import difflib
import inspect
from collections.abc import Iterable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn

from ..errors import UsageError

# how a user names the module that the feature enters
_PATH = 'path=, of a teacher tap= or --teacher-tap'


class FeatureTap:
    """Gives the feature that entered the classifier in the last forward of a model.

    `get_classifier()` of a timm model gives the module to hook, and its structure decides how the feature is read:

    - one layer: its input. Maps and tokens that are not pooled yet are averaged over positions.
    - a head that pools and classifies in one module: the input of its classifying layer.
    - a tuple, the two heads of a distilled model: the mean of their inputs.
    - a `ModuleList`, one head per branch or stage: their inputs, concatenated.
    - no classifier (`num_classes=0`, or an encoder that never has one): the model's output, pooled.

    Make the tap before `torch.compile` and DDP wrap the model, and after `reset_classifier`. A deepcopy of a module
    that holds both the model and its tap (as an EMA makes) has its own tap. The tap keeps one feature, with its graph,
    until it is popped.

    Args:
        model: A timm model, or with `path` any module.
        path: Name of the submodule whose input is the feature (`'fc'`), instead of what `get_classifier()` gives.
        before_dropout: In training, give the feature before the dropout in front of the classifier. If the model
            applies dropout by its `drop_rate` instead of a module, the tap applies it instead (and sets that rate to 0)
            with the same random numbers, so that the model's output stays bit for bit the same. A new classifier would
            train without dropout: `remove()` the tap before. Only if a single layer classifies and `path` is not given.

    Attributes:
        width: Number of channels `d` of the feature.

    Raises:
        UsageError: If the classifier or the feature's width can't be determined, or there is no submodule `path`.
    """

    def __init__(self, model: nn.Module, path: str | None = None, before_dropout: bool = False) -> None:
        self._name = type(model).__name__
        # averaged over the outer list, concatenated over the inner one
        self._heads = _tap_classifier(model, before_dropout) if path is None else [[_tap_path(model, path)]]
        self.width = sum(site.width for site in self._heads[0])

    def pop(self) -> torch.Tensor:
        """The feature of the last forward; it can be taken once.

        Returns:
            Feature `[b, d]`, part of the autograd graph if the forward was.

        Raises:
            RuntimeError: If no forward has reached the classifier since the last call.
            UsageError: If the feature isn't as wide as the model's structure implies.
        """
        heads: list[list[Any]] = [[site.pop() for site in branches] for branches in self._heads]
        if any(x is None for branches in heads for x in branches):
            raise RuntimeError(
                f'{self._name} has no feature to pop: its classifier has not run since the last pop(), has been replaced '
                'since the tap was made, or the tap was removed. Call the whole model once before each pop().'
            )
        feature = _mean([torch.cat(branches, dim=1) if len(branches) > 1 else branches[0] for branches in heads])
        if feature.shape[1] != self.width:
            raise UsageError(
                f'The feature of {self._name} is {feature.shape[1]} wide, its structure told {self.width}. '
                f'Give the name of the module that takes the feature ({_PATH}).'
            )
        return feature

    def remove(self) -> None:
        """Remove the hooks and restore the model's dropout."""
        for branches in self._heads:
            for site in branches:
                site.remove()


class _Site:
    """One hooked module: its input, or the output of the whole model, as one vector per sample."""

    def __init__(self, module: nn.Module, width: int, pools_token: bool = False, output: bool = False) -> None:
        self.width = width
        self._pools_token = pools_token
        self._channels_first = _takes_channels_first(module)
        self._value: torch.Tensor | None = None
        # an in-place module in it, such as a dropout at its beginning, may overwrite what entered
        self._overwrites = any(getattr(m, 'inplace', False) for m in module.modules())
        # what entered the dropout module in front of the hooked one, in this forward
        self._undropped: torch.Tensor | None = None
        # input and output of a dropout module that may be in front of the hooked one
        self._dropped: tuple[torch.Tensor, torch.Tensor] | None = None
        # module whose dropout the tap applies in its place, and its drop_rate
        self._drops_for: tuple[Any, float] | None = None
        # bound methods: a deepcopied model calls the deepcopied site
        if output:
            self._handles = [module.register_forward_hook(self._keep_output)]
        else:
            self._handles = [module.register_forward_pre_hook(self._keep_input, with_kwargs=True)]

    def __getstate__(self) -> dict[str, Any]:
        # a tensor inside an autograd graph can't be deepcopied
        return {**self.__dict__, '_value': None, '_undropped': None, '_dropped': None}

    def pop(self) -> torch.Tensor | None:
        value, self._value = self._value, None
        return value

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._value = self._undropped = self._dropped = None
        if self._drops_for is not None:
            owner, owner.drop_rate = self._drops_for[0], self._drops_for[1]
            self._drops_for = None

    def look_before(self, dropout: nn.Dropout) -> None:
        """Take the input of this dropout module as the feature when it runs in training."""
        self._handles.append(dropout.register_forward_pre_hook(self._keep_undropped))

    def look_before_any(self, dropouts: Iterable[nn.Dropout]) -> None:
        """Take the input of one of these dropout modules as the feature when its output is what enters the hooked module."""
        self._handles += [dropout.register_forward_hook(self._keep_dropped) for dropout in dropouts]

    def drop_for(self, owner: Any) -> None:
        """Apply dropout behind the tap, in place of `owner`, which applies it in front by its `drop_rate`."""
        self._drops_for = owner, owner.drop_rate
        owner.drop_rate = 0.0

    def _keep_undropped(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self._undropped = args[0] if module.training else None

    def _keep_dropped(self, module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> None:
        self._dropped = (args[0], output) if module.training else None

    def _keep_input(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        entered = args[0] if args else next(iter(kwargs.values()))
        undropped, self._undropped = self._undropped, None
        dropped_before, self._dropped = self._dropped, None
        if dropped_before is not None and dropped_before[1] is entered:
            undropped = dropped_before[0]
        value = self._pool(entered if undropped is None else undropped)
        self._value = value.clone() if self._overwrites else value
        if self._drops_for is None or not module.training:
            return None
        dropped = F.dropout(entered, self._drops_for[1])
        return ((dropped, *args[1:]), kwargs) if args else ((), {**kwargs, next(iter(kwargs)): dropped})

    def _keep_output(
        self, module: nn.Module, args: tuple[Any, ...], output: torch.Tensor | tuple[torch.Tensor, ...]
    ) -> None:
        # a distilled model in training returns one vector per head
        self._value = _mean([self._pool(x) for x in (output if isinstance(output, tuple) else (output,))])

    def _pool(self, x: torch.Tensor) -> torch.Tensor:
        """`[b, d]`, `[b, n, d]`, `[b, h, w, d]` or `[b, d, h, w]` -> `[b, d]`."""
        if not isinstance(x, torch.Tensor):
            raise UsageError(f'A feature is one tensor, not a {type(x).__name__}: tap another module ({_PATH}).')
        if x.ndim == 2:
            return x
        if self._pools_token:
            return x[:, 0]
        last = x.shape[-1] == self.width
        if x.ndim == 4 and last and x.shape[1] == self.width:  # as many columns as channels
            last = not self._channels_first
        return x.movedim(-1 if last else 1, 1).flatten(2).mean(2)


def _mean(xs: list[torch.Tensor]) -> torch.Tensor:
    # heads that share one input give that same tensor
    return xs[0] if all(x is xs[0] for x in xs) else torch.stack(xs).mean(0)


def _tap_classifier(model: nn.Module, before_dropout: bool) -> list[list[_Site]]:
    """Hook a timm model's classifying layers: alternative heads in the outer list, branches of a head in the inner."""
    heads = classifiers(model)
    # several layers may share one dropout
    before_dropout = before_dropout and sum(map(len, heads)) == 1
    if any(_in_width(layer) or any(True for _ in layer.parameters()) for branches in heads for layer in branches):
        return [[_tap_layer(model, layer, before_dropout) for layer in branches] for branches in heads]
    return [[_Site(model, _declared_width(model), output=True)]]


def classifiers(model: nn.Module) -> list[list[nn.Module]]:
    """The layers that classify, as `_tap_classifier` hooks them; none for an encoder."""
    if not hasattr(model, 'get_classifier'):
        return _without_classifier(model)
    try:
        classifier = cast(Any, model).get_classifier()
    except AttributeError as e:
        # if the classifier is a part of the head, num_classes=0 may leave nothing to get it from
        if getattr(model, 'num_classes', None) == 0:
            return []
        raise UsageError(
            f'{type(model).__name__} does not find its own classifier ({e}). '
            f'Name the module that the penultimate feature enters ({_PATH}).'
        ) from e
    heads = [head for head in (classifier if isinstance(classifier, tuple) else (classifier,)) if head is not None]
    return [[_final_layer(x) for x in (head if isinstance(head, nn.ModuleList) else [head])] for head in heads]


def _without_classifier(model: nn.Module) -> list[list[nn.Module]]:
    """No layers of an encoder.

    Raises:
        UsageError: It is none, or not timm's: which of its layers classifies is not known.
    """
    if hasattr(model, 'forward_features') and not (
        hasattr(model, 'forward_head') and getattr(model, 'num_classes', None) != 0
    ):
        return []
    linears = [name for name, module in model.named_modules() if name and isinstance(module, nn.Linear)]
    example = f', for example {linears[-1]!r}' if linears else ''
    raise UsageError(
        f'{type(model).__name__} has no get_classifier() to find its penultimate feature by. '
        f'Name the module that the feature enters ({_PATH}){example}.'
    )


def _final_layer(head: nn.Module) -> nn.Module:
    """The classifying layer of a head; heads that also pool take `pre_logits`."""
    return getattr(head, 'fc', head) if 'pre_logits' in inspect.signature(head.forward).parameters else head


def _tap_layer(model: nn.Module, layer: nn.Module, before_dropout: bool) -> _Site:
    parent = _parent_of(model, layer)
    others = [x for x in parent.children() if x is not layer and not isinstance(x, nn.Dropout)]
    # a norm of pooled vectors and a linear layer that share a module classify together
    hooked = parent if others and all(isinstance(x, nn.BatchNorm1d) for x in others) else layer
    # attention pooling may classify every token and pool after that
    pools_token = getattr(parent, 'pool_type', None) == 'token'
    site = _Site(hooked, _in_width(hooked) or _declared_width(model), pools_token=pools_token)
    if before_dropout:
        _pass_dropout(site, model, hooked)
    return site


def _parent_of(model: nn.Module, layer: nn.Module) -> nn.Module:
    return next((parent for parent in model.modules() if any(x is layer for x in parent.children())), model)


def _pass_dropout(site: _Site, model: nn.Module, layer: nn.Module) -> None:
    """Put a site in front of the dropout of what enters its layer, if there is one.

    timm has three ways: a `Dropout` registered just before the layer, one registered after it whose output enters it, and
    `F.dropout` by the `drop_rate` of the module that holds the layer.
    """
    drops_itself = any(isinstance(x, nn.Dropout) and x.p for x in layer.modules())
    parent = _parent_of(model, layer)
    while isinstance(parent, nn.Sequential) and next(parent.children()) is layer:
        layer, parent = parent, _parent_of(model, parent)
    children = list(parent.children())
    before = children[: next((i for i, x in enumerate(children) if x is layer), 0)]
    while before and isinstance(before[-1], (nn.Identity, nn.Flatten)):
        before.pop()
    if before and isinstance(before[-1], nn.Dropout):
        if not before[-1].inplace:
            site.look_before(before[-1])
    elif any(isinstance(x, nn.Dropout) for x in children):  # registered after the layer, and perhaps in front of it
        site.look_before_any(x for x in children if isinstance(x, nn.Dropout) and x.p and not x.inplace)
    # if the classifier has dropout modules, the drop_rate has created them
    elif getattr(parent, 'drop_rate', 0) and not drops_itself:
        site.drop_for(parent)


def _tap_path(model: nn.Module, path: str) -> _Site:
    modules = {name: module for name, module in model.named_modules() if name}
    if path not in modules:
        names = difflib.get_close_matches(path, modules, n=5) or [name for name, _ in model.named_children()]
        raise UsageError(f'{type(model).__name__} has no module {path!r} to tap, but has {", ".join(names)}.')
    return _Site(modules[path], _in_width(modules[path]) or _declared_width(model))


def _in_width(module: nn.Module) -> int | None:
    """Number of input channels of a module, as its first layer that has such a number declares them."""
    for layer in module.modules():
        for name in ('in_features', 'in_channels', 'num_features', 'normalized_shape'):
            width = getattr(layer, name, None)
            if width:
                return width if isinstance(width, int) else width[-1]
    return None


def _takes_channels_first(module: nn.Module) -> bool:
    """Whether a module takes `[b, d, h, w]`, by its first layer that tells; those of most networks do."""
    for layer in module.modules():
        pools_over = getattr(layer, 'dim', None)  # timm's pooling layers
        is_leaf = not any(True for _ in layer.children())
        if isinstance(layer, (nn.Conv2d, nn.BatchNorm2d, nn.GroupNorm)) or pools_over == (2, 3):
            return True
        if is_leaf and type(layer).__name__.endswith('2d'):
            return True
        if isinstance(layer, (nn.Linear, nn.LayerNorm)) or pools_over == (1, 2):
            return False
    return True


def _declared_width(model: nn.Module) -> int:
    """Number of channels of the penultimate feature as a timm model declares it, for layers that don't."""
    width = getattr(model, 'head_hidden_size', None) or getattr(model, 'num_features', None)
    if not width:
        raise UsageError(
            f'Nothing tells how wide the penultimate feature of {type(model).__name__} is. '
            f'Name a module with weights, or one that contains some, that the feature enters ({_PATH}).'
        )
    return width
