"""What a teacher gives for a batch."""

from typing import NamedTuple

import torch


class TeacherOutput(NamedTuple):
    """A teacher's output for a batch: what no loss reads may be None.

    Attributes:
        feature: Its penultimate feature `[b, m]`.
        logits: Its logits `[b, c]`.
        map: Its last feature map `[b, d, h, w]`.
    """

    feature: torch.Tensor
    logits: torch.Tensor | None = None
    map: torch.Tensor | None = None
