"""Projectors from the student's feature space to the teacher's, and their ensemble (PEFD, arXiv 2210.15274, sec. 3).

To add one, decorate with `@register_projector('name')` a function or class `(in_dim, out_dim) -> nn.Module` that maps
`[b, in_dim]` to `[b, out_dim]`, and add the name to names.py. The ensemble then builds q of them, each with its own
random init, and applies the activation after them. It may also live in a package of its own, see plugins.py.
"""

import copy
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.func import functional_call

from ..errors import UsageError
from .names import PROJECTORS

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {'relu': F.relu, 'none': lambda x: x}


def register_projector(name: str) -> Callable[[Callable[..., nn.Module]], Callable[..., nn.Module]]:
    """Decorator: make a projector known under `name` to `create_projector` and `--pe-projector`.

    Args:
        name: New name. A name that exists is refused.

    Raises:
        ValueError: The name is taken.
    """
    return PROJECTORS.register(name)


def list_projectors() -> list[str]:
    """Names that `create_projector` takes, sorted, those of installed plugins too."""
    return list(PROJECTORS)


def create_projector(name: str, in_dim: int, out_dim: int) -> nn.Module:
    """Create one projector `[b, in_dim] -> [b, out_dim]`, without the activation that the ensemble puts after it.

    Args:
        name: A registered name, see `list_projectors`.
        in_dim: Width d of the student's feature.
        out_dim: Width m of the teacher's feature.

    Raises:
        UsageError: Unknown name, or widths that this projector cannot map.
    """
    return cast(nn.Module, PROJECTORS.get(name)(in_dim, out_dim))


@register_projector('linear')
class LinearProjector(nn.Linear):
    """W x + b, the projector of the paper (before its activation)."""


@register_projector('mlp')
class MlpProjector(nn.Module):
    """W2 relu(W1 x + b1) + b2 with a hidden layer as wide as the teacher's feature."""

    def __init__(self, in_dim: int, out_dim: int):
        super().__init__()
        self.fc1 = nn.Linear(in_dim, out_dim)
        self.fc2 = nn.Linear(out_dim, out_dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(F.relu(self.fc1(x)))


@register_projector('linear_bn')
class LinearBnProjector(nn.Sequential):
    """W x, standardized over the batch (Miles & Mikolajczyk, AAAI 2024, arXiv 2303.11098).

    That paper puts one such projector next to `teacher_norm='batch'` and the `logsum` loss.
    """

    def __init__(self, in_dim: int, out_dim: int):
        super().__init__(nn.Linear(in_dim, out_dim), nn.BatchNorm1d(out_dim, affine=False))


@register_projector('orthogonal')
class OrthogonalProjector(nn.Linear):
    """W x with orthonormal columns (rows where out_dim < in_dim): it keeps the geometry of the student's features.

    The projector of VkD (Miles et al., CVPR 2024, arXiv 2403.06213), next to `teacher_norm='layer'` or 'whiten' and the
    `mse` loss. PyTorch's parametrization keeps W orthogonal under any optimizer, weight decay included.
    """

    def __init__(self, in_dim: int, out_dim: int):
        super().__init__(in_dim, out_dim, bias=False)
        start = self.weight.detach().clone()
        nn.utils.parametrize.register_parametrization(self, 'weight', _FixedDiagonal())
        nn.utils.parametrizations.orthogonal(self)
        self.weight = start

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parametrization = cast(Any, self).parametrizations.weight
        dtype = parametrization.original.dtype
        if dtype.itemsize >= 4:
            return super().forward(x)
        # W is computed in float32: PyTorch's matrix functions have no half precision
        whole = {k: v.float() for k, v in (*parametrization.named_parameters(), *parametrization.named_buffers())}
        return F.linear(x, functional_call(parametrization, whole, ()).to(dtype))


class _FixedDiagonal(nn.Module):
    """Fixes the diagonal of the trained matrix at -1.

    If W is not square, PyTorch keeps signs there that get no gradient, and truncates them to integers: the first weight
    decay would turn them, and so W, into 0.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.diagonal_scatter(x, x.new_full((min(x.shape),), -1.0))

    def right_inverse(self, x: torch.Tensor) -> torch.Tensor:
        return x


@register_projector('identity')
class IdentityProjector(nn.Identity):
    """The student's feature as it is: the paper's baseline without a projector. It gets no activation either."""

    def __init__(self, in_dim: int, out_dim: int):
        if in_dim != out_dim:
            raise UsageError(
                f"projector 'identity' needs equal feature widths, the student has {in_dim} and the teacher {out_dim}: "
                f"use 'linear'"
            )
        super().__init__()


class _StackedLinear(nn.Module):
    """q linear projectors as one matmul, `[b, d] -> [b, q, m]`.

    PyTorch's default init of a Linear depends on its input width alone, so one Linear(d, q * m) starts as q
    independent Linear(d, m) do, and element-wise optimizers (SGD, Adam, ...) train it as such. LAMB, LARS and Muon,
    which look at a whole matrix, see one matrix.
    """

    def __init__(self, in_dim: int, out_dim: int, num_projectors: int):
        super().__init__()
        self.num_projectors = num_projectors
        self.fc = nn.Linear(in_dim, num_projectors * out_dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x).unflatten(-1, (self.num_projectors, -1))


class _Stacked(nn.ModuleList):
    """Any q projectors side by side, `[b, d] -> [b, q, m]`."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack([projector(x) for projector in self], dim=1)


class ProjectorEnsemble(nn.Module):
    """Mean of q projectors: p = 1/q sum_k act(W_k s + b_k) (PEFD, arXiv 2210.15274, sec. 3.2).

    Without an activation the mean of q linear projectors is one linear layer, the mean of theirs: it starts 1 / sqrt(q) as large and
    moves with 1/q of the gradient. For a loss of directions the two cancel at the start. An `mlp` has its ReLU inside.

    Args:
        in_dim: Width d of the student's feature.
        out_dim: Width m of the teacher's feature.
        num_projectors: q, the number of projectors; None means 3, or 1 of the kind identity.
        projector: Kind of projector, see `list_projectors`.
        act: 'relu' (the paper's), 'none' (teacher features of both signs), or 'auto' (to be set through the
            attribute `act` before the first forward; `ProjectorEnsembleTask` does that from the teacher's features).

    Shapes:
        forward: `[b, d] -> [b, m]`; project: `[b, d] -> [b, q, m]`, each projector's own output.

    Raises:
        UsageError: q < 1, an unknown projector or activation, or 'identity' with q > 1 or unequal widths.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        num_projectors: int | None = None,
        projector: str = 'linear',
        act: str = 'relu',
    ):
        super().__init__()
        factory = PROJECTORS.get(projector)
        if num_projectors is None:
            num_projectors = 1 if factory is IdentityProjector else 3
        if num_projectors < 1:
            raise UsageError(f'number of projectors must be 1 or more, got {num_projectors}')
        if factory is IdentityProjector and num_projectors > 1:
            raise UsageError(
                f"projector '{projector}' has nothing to train, so {num_projectors} of them are one: use 1 projector"
            )
        self.in_dim, self.out_dim, self.num_projectors, self.projector = in_dim, out_dim, num_projectors, projector
        self._act = 'auto'
        if act != 'auto':
            self.act = act
        if factory is IdentityProjector:
            self.act = 'none'
        self.projectors: _StackedLinear | _Stacked
        if factory is LinearProjector:
            self.projectors = _StackedLinear(in_dim, out_dim, num_projectors)
        else:
            self.projectors = _Stacked(factory(in_dim, out_dim) for _ in range(num_projectors))

    @property
    def act(self) -> str:
        """Activation of the projectors' output: 'relu', 'none', or 'auto' as long as it is undecided."""
        return self._act

    @act.setter
    def act(self, act: str) -> None:
        if act not in ACTIVATIONS:
            raise UsageError(f"unknown projector activation '{act}': choose from {', '.join(ACTIVATIONS)}")
        self._act = 'none' if self.projector == 'identity' else act

    def project(self, x: torch.Tensor) -> torch.Tensor:
        """Each projector's output, `[b, d] -> [b, q, m]`."""
        if self._act == 'auto':
            raise RuntimeError("projector activation is 'auto' and undecided: set .act to 'relu' or 'none' first")
        projected = self.projectors(x)
        if projected.shape[1:] != (self.num_projectors, self.out_dim):  # a loss might broadcast it silently
            raise UsageError(
                f"projector '{self.projector}' must map [b, {self.in_dim}] to [b, {self.out_dim}], "
                f'{self.num_projectors} of them give {list(projected.shape)}'
            )
        return ACTIVATIONS[self._act](projected)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.project(x).mean(dim=1)

    def check_gradients(self) -> None:
        """Raise unless each parameter gets a gradient from the output for a random feature; nothing is changed.

        Raises:
            UsageError: Some get none. They would never train, and DDP would fail in the second step.
        """
        trained = [name for name, p in self.projectors.named_parameters() if p.requires_grad]
        if not trained:
            return
        projectors = copy.deepcopy(self.projectors).train()  # a forward may change its running statistics
        parameters = [projectors.get_parameter(name) for name in trained]
        devices = [parameters[0].device] if parameters[0].is_cuda else []
        with torch.random.fork_rng(devices), torch.enable_grad():
            output = projectors(torch.randn(16, self.in_dim).to(parameters[0])).sum()
            gradients: Sequence[torch.Tensor | None] = [None] * len(parameters)
            if output.requires_grad:
                gradients = torch.autograd.grad(output, parameters, allow_unused=True)
        unused = [name for name, gradient in zip(trained, gradients, strict=True) if gradient is None]
        if unused:
            more = f' and {len(unused) - 3} more' if len(unused) > 3 else ''
            raise UsageError(
                f"projector '{self.projector}' has parameters without a gradient, {', '.join(unused[:3])}{more}: use them "
                f'in its forward, or take them out of it'
            )

    def extra_repr(self) -> str:
        return f'{self.num_projectors} x {self.projector}({self.in_dim}, {self.out_dim}), act={self._act}'
