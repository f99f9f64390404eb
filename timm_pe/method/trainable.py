"""All that is trained, in one module."""

from collections.abc import Mapping, Sequence
from typing import cast

import torch
import torch.nn as nn
from timm.task.distillation import FeatureDistillationTrainableModule

from .projectors import ProjectorEnsemble
from .tap import FeatureTap


class ProjectorEnsembleModule(FeatureDistillationTrainableModule):
    """All that is trained, student and projectors, in one module, for DDP, compile and EMA.

    Args:
        student: Student model.
        projections: The projectors of each aim, by its name. Those of a single aim are the attribute `projection`
            themselves, so that the state_dict of one teacher has no name in it.
        tap: The tap on the student.
        tapped: What each of them maps: 'feature' or 'logits'.

    Shapes:
        forward: `[b, ch, h, w]` -> (logits `[b, c]`, projection `[b, m]` of the first aim, that of the second, ...).
    """

    student: nn.Module
    projection: ProjectorEnsemble | nn.ModuleDict

    def __init__(
        self, student: nn.Module, projections: Mapping[str, ProjectorEnsemble], tap: FeatureTap, tapped: Sequence[str]
    ):
        one, *more = projections.values()
        super().__init__(student, nn.ModuleDict(projections) if more else one)
        self.tap = tap
        self.tapped = tuple(tapped)

    @property
    def projectors(self) -> list[ProjectorEnsemble]:
        """The projectors of each aim."""
        if isinstance(self.projection, ProjectorEnsemble):
            return [self.projection]
        return cast(list[ProjectorEnsemble], list(self.projection.values()))

    def forward(self, input: torch.Tensor) -> tuple[torch.Tensor, ...]:  # type: ignore[override]  # timm's gives two
        logits = self.student(input)
        if isinstance(logits, (tuple, list)):
            # set_distilled_training: in eval mode the model returns the mean of its heads
            logits = sum(logits) / len(logits)
        given = {'logits': logits, 'feature': self.tap.pop()}
        return logits, *(p(given[tapped]) for p, tapped in zip(self.projectors, self.tapped, strict=True))
