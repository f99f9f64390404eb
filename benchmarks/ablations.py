"""train_distill with projectors that the literature argues about, and with a later method's loss on logits.

    python benchmarks/ablations.py DATA --teacher NAME --pe-projector frozen ...

Methods of benchmarks/methods/ that need it say `script: benchmarks/ablations.py`.
"""

import torch
import torch.nn as nn

from timm_pe import register_feature_loss, register_projector
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


@register_projector('no_decay')
class NoDecayProjector(nn.Linear):
    """W x + b without a weight decay of `decay`: SGD adds it to the gradient, and here it is taken off before."""

    decay = 5e-4

    def __init__(self, in_dim: int, out_dim: int):
        super().__init__(in_dim, out_dim)
        for parameter in self.parameters():
            parameter.register_hook(lambda gradient, parameter=parameter: gradient - self.decay * parameter.detach())


@register_projector('wide')
class WideProjector(nn.Sequential):
    """W2 relu(W1 x + b1) + b2 with three times the teacher's width between: as many hidden units as three projectors have."""

    def __init__(self, in_dim: int, out_dim: int):
        super().__init__(nn.Linear(in_dim, 3 * out_dim), nn.ReLU(), nn.Linear(3 * out_dim, out_dim))


@register_feature_loss('dist')
class DistLoss(nn.Module):
    """DIST (Huang et al., NeurIPS 2022, arXiv 2205.10536) as torchdistill has it, with the authors' temperature for CIFAR.

    Correlations of the two softmaxes, of each image over the classes and of each class over the batch; between logits:
    `--pe-target logits --pe-projector identity --pe-loss dist --task-loss-weight 1`.

    Shapes:
        `([b, c], [b, c]) -> []`.
    """

    def __init__(self) -> None:
        super().__init__()
        from torchdistill.losses.mid_level import DISTLoss  # not in the extra 'bench': it asks for a newer torch

        self.dist = DISTLoss('student', 'logits', 'teacher', 'logits', tau=4.0)

    def forward(self, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        return self.dist({'student': {'logits': student}}, {'teacher': {'logits': teacher}})


if __name__ == '__main__':
    main()
