"""All that is trained, in one module."""

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
import torch.nn as nn
from timm.optim import auto_group_layers
from timm.task.distillation import FeatureDistillationTrainableModule
from timm.utils import unwrap_model

from ..errors import UsageError
from .map_tap import MapTap, on_grid
from .projectors import ProjectorEnsemble
from .tap import FeatureTap


class ProjectorEnsembleModule(FeatureDistillationTrainableModule):
    """All that is trained, student and projectors, in one module, for DDP, compile and EMA.

    Args:
        student: Student model.
        projections: The projectors of each aim, by its name. Those of a single aim are the attribute `projection`
            themselves, so that the state_dict of one teacher has no name in it.
        tapped: What each of them maps: 'feature', 'logits' or 'map'.
        tap: The tap on the student.
        map_tap: That of its map, if one is mapped.

    Shapes:
        forward: `[b, ch, h, w]` -> (logits `[b, c]`, projection `[b, m]` of the first aim, that of the second, ...). A map's
        is `[b, rows, columns, m]`: its grid is the smaller one of student and teacher, in each direction.
    """

    student: nn.Module
    projection: ProjectorEnsemble | nn.ModuleDict

    def __init__(
        self,
        student: nn.Module,
        projections: Mapping[str, ProjectorEnsemble],
        tapped: Sequence[str],
        tap: FeatureTap,
        map_tap: MapTap | None = None,
    ):
        one, *more = projections.values()
        super().__init__(student, nn.ModuleDict(projections) if more else one)
        self.tapped, self.tap, self.map_tap = tuple(tapped), tap, map_tap

    @property
    def projectors(self) -> list[ProjectorEnsemble]:
        """The projectors of each aim."""
        if isinstance(self.projection, ProjectorEnsemble):
            return [self.projection]
        return cast(list[ProjectorEnsemble], list(self.projection.values()))

    @property
    def feature_projectors(self) -> list[ProjectorEnsemble]:
        """Those of features or logits, one of each teacher, without those of maps."""
        return [p for p, tapped in zip(self.projectors, self.tapped, strict=True) if tapped != 'map']

    def group_matcher(self, coarse: bool = False) -> Any:
        """The layer of each parameter by its name, for --layer-decay: that of the student alone, the projectors with the last."""
        student = unwrap_model(self.student)
        if hasattr(student, 'group_matcher'):
            return super().group_matcher(coarse=coarse)
        layers = {f'student.{name}': layer for name, layer in auto_group_layers(student).items()}
        return lambda name: layers.get(name, max(layers.values()))

    def forward(  # type: ignore[override]  # timm's gives two
        self, input: torch.Tensor, grids: Sequence[Sequence[int]] = ()
    ) -> tuple[torch.Tensor, ...]:
        """Logits and projections of a batch; `grids` are those of the teacher's map for each aim that maps one."""
        output = self.student(input)
        is_read = getattr(self.student, 'num_classes', None) != 0
        logits = self._mean_of_heads(output) if is_read and not isinstance(output, torch.Tensor) else output
        given, of_map = {'logits': logits, 'feature': self.tap.pop()}, iter(grids)
        if self.map_tap is not None:
            given['map'] = self.map_tap.pop()
        return logits, *(
            _project_map(projectors, given['map'], next(of_map)) if tapped == 'map' else projectors(given[tapped])
            for projectors, tapped in zip(self.projectors, self.tapped, strict=True)
        )

    def _mean_of_heads(self, output: Any) -> torch.Tensor:
        """Logits of a distilled model, as it gives them in eval mode."""
        distils = any(getattr(module, 'distilled_training', False) for module in self.student.modules())
        if isinstance(output, (tuple, list)) and distils:
            return cast(torch.Tensor, sum(output) / len(output))
        raise UsageError(
            f'the student {type(unwrap_model(self.student)).__name__} returns a {type(output).__name__}, which may be anything: '
            f'give a model that returns its logits, one tensor'
        )


def _project_map(projectors: ProjectorEnsemble, x: torch.Tensor, grid: Sequence[int]) -> torch.Tensor:
    """Each position of a map `[b, d, h, w]` projected by itself -> `[b, rows, columns, m]`."""
    # pooled in float32, projected in the precision of the student
    x = on_grid(x, (min(x.shape[2], grid[0]), min(x.shape[3], grid[1]))).to(x.dtype)
    return projectors(x.flatten(0, 2)).unflatten(0, x.shape[:3])
