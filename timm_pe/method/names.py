"""Names of projectors, losses and targets. This module does not import torch, so that --help and flag checks are fast.

The implementations are registered under these names in projectors.py and losses.py.
"""

from .plugins import Names

PROJECTOR_NAMES = Names('linear', 'mlp', 'linear_bn', 'orthogonal', 'identity')
FEATURE_LOSS_NAMES = Names('direction', 'mse', 'logsum', 'kl')
TEACHER_NORM_NAMES = ('none', 'batch', 'layer', 'whiten')

# what the projectors map -> (weight of the task loss, weight of the projectors' loss, loss): PEFD's recipe (arXiv
# 2210.15274), and that of its follow-up for logits (arXiv 2310.17183)
TARGETS = {'feature': (1.0, 25.0, 'direction'), 'logits': (0.1, 0.9, 'kl')}
