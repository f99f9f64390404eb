"""Losses between projected student features and teacher features, and between logits.

To add one, decorate with `@register_feature_loss('name')` a function or class without arguments that returns an
`nn.Module` whose `forward(projected, teacher)`, both `[b, m]`, gives a scalar, and add the name to names.py. It may
also live in a package of its own, see plugins.py. A method `per_row`, `([b, m], [b, m]) -> [b]`, of which forward is the
mean, lets it work with `teacher_drop`.
"""

import math
from collections.abc import Callable, Sequence
from typing import cast

import torch
import torch.nn as nn
import torch.nn.functional as F

from .names import FEATURE_LOSSES


def register_feature_loss(name: str) -> Callable[[Callable[[], nn.Module]], Callable[[], nn.Module]]:
    """Decorator: make a feature loss known under `name` to `create_feature_loss` and `--pe-loss`.

    Args:
        name: New name. A name that exists is refused.

    Raises:
        ValueError: The name is taken.
    """
    return FEATURE_LOSSES.register(name)


def list_feature_losses() -> list[str]:
    """Names that `create_feature_loss` takes, sorted, those of installed plugins too."""
    return list(FEATURE_LOSSES)


def create_feature_loss(name: str) -> nn.Module:
    """Create the feature loss called `name`, a module `([b, m], [b, m]) -> []`.

    Raises:
        UsageError: Unknown name; the message lists the known ones.
    """
    return cast(nn.Module, FEATURE_LOSSES.get(name)())


def _full_precision(*tensors: torch.Tensor) -> list[torch.Tensor]:
    return [t if t.dtype == torch.float64 else t.float() for t in tensors]


def _direction(x: torch.Tensor, eps: float) -> torch.Tensor:
    """x / |x|, and zero with a zero gradient where |x| <= eps: such a row has no direction to learn from.

    Dividing by max(|x|, eps) instead is finite too, but its gradient there is 1 / eps.
    """
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    has_direction = norm > eps
    return x * (has_direction / torch.where(has_direction, norm, 1.0))


@register_feature_loss('direction')
class DirectionLoss(nn.Module):
    """Direction alignment, mean over the batch of 1 - cos(p, t) (PEFD, arXiv 2210.15274, eq. 2).

    Computed in float32 (float64 stays) outside autocast. A feature without a direction (norm <= eps) costs 1 and has
    a zero gradient.

    Args:
        eps: Norm at or under which a feature counts as zero.

    Shapes:
        forward: `([..., m], [..., m]) -> []`, a value in [0, 2]; per_row: `([..., m], [..., m]) -> [...]`.
    """

    def __init__(self, eps: float = 1e-8):
        super().__init__()
        self.eps = eps

    def per_row(self, projected: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        """1 - cos of each row."""
        with torch.autocast(projected.device.type, enabled=False):
            projected, teacher = _full_precision(projected, teacher)
            cosine = (_direction(projected, self.eps) * _direction(teacher, self.eps)).sum(dim=-1)
            return 1.0 - cosine

    def forward(self, projected: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        return self.per_row(projected, teacher).mean()


@register_feature_loss('mse')
class MseLoss(nn.Module):
    """Mean squared error over batch and width, in float32 outside autocast (FitNets, arXiv 1412.6550, eq. 3).

    Shapes:
        `([b, m], [b, m]) -> []`.
    """

    def forward(self, projected: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        with torch.autocast(projected.device.type, enabled=False):
            projected, teacher = _full_precision(projected, teacher)
            return F.mse_loss(projected, teacher)


@register_feature_loss('logsum')
class LogSumLoss(nn.Module):
    """log of sum |p - t|^4 over batch and width, in float32 outside autocast (arXiv 2303.11098, its LogSum distance).

    The logarithm softens the few largest differences of a student with little capacity.

    Args:
        exponent: The paper's alpha.
        eps: Added to the sum, for a projection that equals its target.

    Shapes:
        `([b, m], [b, m]) -> []`.
    """

    def __init__(self, exponent: float = 4.0, eps: float = 1e-5):
        super().__init__()
        self.exponent, self.eps = exponent, eps

    def forward(self, projected: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        with torch.autocast(projected.device.type, enabled=False):
            projected, teacher = _full_precision(projected, teacher)
            return ((projected - teacher).abs() ** self.exponent).sum().add(self.eps).log()


@register_feature_loss('kl')
class KlLoss(nn.Module):
    """`kd_loss` as a module: T^2 KL(teacher || student), for projected logits (arXiv 2310.17183).

    Args:
        temperature: T > 0.

    Shapes:
        `([b, c], [b, c]) -> []`.
    """

    def __init__(self, temperature: float = 4.0):
        super().__init__()
        self.temperature = temperature

    def forward(self, projected: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        return kd_loss(projected, teacher, self.temperature)


def _standardize(x: torch.Tensor) -> torch.Tensor:
    return F.batch_norm(x, None, None, training=True) if len(x) > 1 else torch.zeros_like(x)


def _whiten(x: torch.Tensor) -> torch.Tensor:
    """Decorrelated channels of variance 1, as far as the batch spans them (ZCA: no rotation).

    With x = u s v' it is u v', from the eigenvectors of the smaller of x x' and x' x: an SVD of `[b, m]` takes longer than many
    a network. In float64, where the squares of s lose nothing.
    """
    centred = (x - x.mean(dim=0)).double()
    n, m = centred.shape
    squares, vectors = torch.linalg.eigh(centred @ centred.T if n <= m else centred.T @ centred)
    spanned = squares > 1e-10 * squares.max()
    scales = torch.where(spanned, squares, 1).rsqrt() * spanned * max(n - 1, 1) ** 0.5
    root = (vectors * scales) @ vectors.T
    return (root @ centred if n <= m else centred @ root).to(x.dtype)


# normalizations of the teacher's feature before the loss, `[b, m] -> [b, m]`
TEACHER_NORMS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    'none': lambda x: x,
    'batch': _standardize,
    'layer': lambda x: F.layer_norm(x, x.shape[-1:]),
    'whiten': _whiten,
}


def normalize_teacher(feature: torch.Tensor, norm: str) -> torch.Tensor:
    """The teacher's feature, normalized for the loss, in float32 (float64 stays) unless `norm` is 'none'.

    Args:
        feature: `[b, m]`.
        norm: 'none'; 'batch': each channel standardized over the batch (arXiv 2303.11098); 'layer': each feature over
            its channels, 'whiten': channels decorrelated over the batch (arXiv 2403.06213); with b <= m + 1
            that makes any two images equally unlike, so give it b well above m.

    Returns:
        `[b, m]`.
    """
    if norm == 'none':
        return feature
    with torch.autocast(feature.device.type, enabled=False):
        return TEACHER_NORMS[norm](*_full_precision(feature))


def kd_loss(student_logits: torch.Tensor, teacher_logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """Logit distillation, T^2 KL(teacher || student), mean over the batch (Hinton et al., arXiv 1503.02531, sec. 2).

    Computed in float32 outside autocast.

    Args:
        student_logits: `[b, c]`.
        teacher_logits: `[b, c]`.
        temperature: T > 0, divides both logits.

    Returns:
        A scalar.
    """
    with torch.autocast(student_logits.device.type, enabled=False):
        student_logits, teacher_logits = _full_precision(student_logits, teacher_logits)
        return temperature**2 * F.kl_div(
            F.log_softmax(student_logits / temperature, dim=-1),
            F.log_softmax(teacher_logits / temperature, dim=-1),
            reduction='batchmean',
            log_target=True,
        )


def average_logits(logits: Sequence[torch.Tensor], weights: Sequence[float], temperature: float) -> torch.Tensor:
    """Logits whose softmax at the temperature is the weighted mean of theirs, for `kd_loss`; a single one as it is.

    The mean is over probabilities: it is a mixture of the teachers. One over logits would be their normalized product, in
    which a single teacher that excludes a class excludes it for all. In float32 outside autocast.

    Args:
        logits: Of each teacher, `[b, c]`.
        weights: Above 0, in any scale.
        temperature: T > 0.

    Returns:
        `[b, c]`.
    """
    if len(logits) == 1:
        return logits[0]
    with torch.autocast(logits[0].device.type, enabled=False):
        logs = [
            F.log_softmax(x / temperature, dim=-1) + math.log(weight / sum(weights))
            for x, weight in zip(_full_precision(*logits), weights, strict=True)
        ]
        return temperature * torch.stack(logs).logsumexp(dim=0)
