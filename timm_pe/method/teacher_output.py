"""What a teacher gives for a batch."""

from typing import NamedTuple

import torch


class _FeatureAndLogits(NamedTuple):
    feature: torch.Tensor
    logits: torch.Tensor | None


class TeacherOutput(_FeatureAndLogits):
    """A teacher's output for a batch: its penultimate feature `[b, m]`, and its logits `[b, c]` if they are needed.

    It unpacks into these two; its last feature map `[b, d, h, w]`, if that is needed, is the attribute `map`."""

    map: torch.Tensor | None

    def __new__(
        cls, feature: torch.Tensor, logits: torch.Tensor | None, map: torch.Tensor | None = None
    ) -> 'TeacherOutput':
        output = super().__new__(cls, feature, logits)
        output.map = map
        return output
