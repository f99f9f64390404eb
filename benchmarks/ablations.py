"""train_distill with projectors that the literature argues about, each another answer to: why should one help?

    python benchmarks/ablations.py DATA --teacher NAME --pe-projector frozen ...

Methods of benchmarks/methods/ that need it say `script: ablations.py`.
"""

import torch
import torch.nn as nn

from timm_pe import register_projector
from timm_pe.train.main import main


@register_projector('frozen')
class FrozenProjector(nn.Linear):
    """A random W x + b that is never trained: is there anything to learn in a projector?"""

    def __init__(self, in_dim: int, out_dim: int):
        super().__init__(in_dim, out_dim)
        self.requires_grad_(False)


@register_projector('identity_init')
class IdentityInitProjector(nn.Linear):
    """W x + b that starts as the identity: no random start, and from there all freedom."""

    def __init__(self, in_dim: int, out_dim: int):
        super().__init__(in_dim, out_dim)
        nn.init.eye_(self.weight)
        nn.init.zeros_(self.bias)


@register_projector('third_gradient')
class ThirdGradientProjector(nn.Linear):
    """W x + b with a third of its gradient: each of three projectors gets that much, so is one of these as good as three?

    With SGD it is a third of the learning rate, weight decay apart.
    """

    factor = 1 / 3

    def __init__(self, in_dim: int, out_dim: int):
        super().__init__(in_dim, out_dim)
        for parameter in self.parameters():
            parameter.register_hook(self._scale)

    def _scale(self, gradient: torch.Tensor) -> torch.Tensor:
        return gradient * self.factor


@register_projector('triple_gradient')
class TripleGradientProjector(ThirdGradientProjector):
    """W x + b with three times its gradient: three of these move as far as one projector does."""

    factor = 3.0


@register_projector('wide')
class WideProjector(nn.Sequential):
    """W2 relu(W1 x + b1) + b2 with three times the teacher's width between: as many hidden units as three projectors have."""

    def __init__(self, in_dim: int, out_dim: int):
        super().__init__(nn.Linear(in_dim, 3 * out_dim), nn.ReLU(), nn.Linear(3 * out_dim, out_dim))


if __name__ == '__main__':
    main()
