"""Names of projectors, losses and targets. This module does not import torch, so that --help and flag checks are fast.

The implementations are registered under these names in projectors.py and losses.py.
"""

from typing import NamedTuple

from .plugins import Names

PROJECTOR_NAMES = Names('linear', 'mlp', 'linear_bn', 'orthogonal', 'identity')
FEATURE_LOSS_NAMES = Names('direction', 'mse', 'logsum', 'kl')
TEACHER_NORM_NAMES = ('none', 'batch', 'layer', 'whiten')


class Recipe(NamedTuple):
    """The defaults that belong to what the projectors map."""

    task_loss_weight: float
    distill_loss_weight: float
    feature_loss: str


# PEFD's (arXiv 2210.15274), and that of its follow-up for logits (arXiv 2310.17183)
TARGETS = {'feature': Recipe(1.0, 25.0, 'direction'), 'logits': Recipe(0.1, 0.9, 'kl')}
