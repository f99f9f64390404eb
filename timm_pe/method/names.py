"""Names of projectors, losses and targets. This module does not import torch, so that --help and flag checks are fast.

projectors.py and losses.py register what belongs to them.
"""

from typing import NamedTuple

from .plugins import Registry

PROJECTORS = Registry('projector', 'linear', 'mlp', 'linear_bn', 'orthogonal', 'identity')
FEATURE_LOSSES = Registry('feature loss', 'direction', 'mse', 'logsum', 'kl')
TEACHER_NORM_NAMES = ('none', 'batch', 'layer', 'whiten')


class Recipe(NamedTuple):
    """The defaults that belong to what the projectors map."""

    task_loss_weight: float
    distill_loss_weight: float
    feature_loss: str


# PEFD's (arXiv 2210.15274), and that of its follow-up for logits (arXiv 2310.17183)
TARGETS = {'feature': Recipe(1.0, 25.0, 'direction'), 'logits': Recipe(0.1, 0.9, 'kl')}
