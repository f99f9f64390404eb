"""What the student is aimed at, and the terms of the loss that say how far it is from there."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn as nn

from ..errors import UsageError
from .losses import normalize_teacher
from .map_tap import on_grid
from .teacher_output import TeacherOutput


@dataclass(frozen=True)
class Aim:
    """One output of one teacher. The student has projectors of its own for it.

    Attributes:
        name: The key of its projectors in a checkpoint, unique: 'feature_resnet34'.
        teacher: Which teacher, from 0.
        tapped: Which output: 'feature', 'logits' or 'map'.
        term: The term of the loss that it belongs to: 'pe_loss' or 'map_loss'.
        own_term: The name of its own loss, which is returned if others share the term: 'pe_loss_resnet34'.
        weight: Its share of that term, above 0; those of a term sum to 1.
        loss: The name of the distance between projection and output.
        teacher_norm: See `normalize_teacher`.
    """

    name: str
    teacher: int
    tapped: str
    term: str
    own_term: str
    weight: float
    loss: str
    teacher_norm: str = 'none'

    @property
    def wanted_name(self) -> str:
        """What `wanted` gives, in words."""
        normalized = self.teacher_norm != 'none' and self.tapped != 'logits'
        return f'{"normalized " if normalized else ""}{self.tapped}s'

    def value(self, output: TeacherOutput) -> torch.Tensor:
        """The output of its teacher that it aims at, as the teacher gives it.

        Raises:
            UsageError: It is missing.
        """
        value = {'feature': output.feature, 'logits': output.logits, 'map': output.map}[self.tapped]
        if value is None:
            raise UsageError(f"'{self.own_term}' compares with the teacher's {self.tapped}, which its output lacks")
        return value

    def wanted(self, output: TeacherOutput, grid: Sequence[int] | None = None) -> torch.Tensor:
        """What the projection should be, by the output of its teacher.

        Args:
            output: Its output.
            grid: Rows and columns that a map is brought to; None leaves its own.

        Returns:
            `[b, m]`; of a map `[b, rows, columns, m]`. A map is normalized as a batch of its positions.
        """
        value = self.value(output)
        if self.tapped == 'logits':
            return value
        if self.tapped == 'feature':
            return normalize_teacher(value, self.teacher_norm)
        value = on_grid(value, tuple(value.shape[2:] if grid is None else grid))
        return normalize_teacher(value.flatten(0, 2), self.teacher_norm).unflatten(0, value.shape[:3])


def measure_aims(
    aims: Sequence[Aim],
    losses: Mapping[str, nn.Module],
    projected: Sequence[torch.Tensor],
    outputs: Sequence[TeacherOutput],
    drop: float = 0.0,
) -> dict[str, torch.Tensor]:
    """The terms of the loss, each the weighted mean of its aims' losses.

    Args:
        aims: What is aimed at.
        losses: The distance of each term, `([b, m], [b, m]) -> []`; of maps `([b, h, w, m], [b, h, w, m]) -> []`.
        projected: The student's projection for each: `[b, m]`, of a map `[b, h, w, m]`.
        outputs: What each teacher gives for the batch.
        drop: Probability with which an image does not learn from a teacher, see `draw_kept`. The mean is then over the
            pairs of image and teacher that are kept (UNIC, arXiv 2408.05088).

    Returns:
        Scalars by the names of the terms. A term of several aims is followed by the loss of each over all images.

    Raises:
        UsageError: A loss that gives no scalar, or no gradient.
    """
    pairs = [
        (losses[aim.term], p, aim.wanted(outputs[aim.teacher], p.shape[1:-1]))
        for aim, p in zip(aims, projected, strict=True)
    ]
    rows = [_per_image(*pair) for pair in pairs] if drop else None
    found = [r.mean() for r in rows] if rows else [loss(p, wanted) for loss, p, wanted in pairs]
    for aim, value, p in zip(aims, found, projected, strict=True):
        _check_loss(aim.loss, value, p)
    # the features decide, for the maps too
    of_features = [r for aim, r in zip(aims, rows or (), strict=bool(rows)) if aim.tapped != 'map']
    kept = draw_kept(torch.stack(of_features, dim=1), drop) if rows else None
    terms: dict[str, torch.Tensor] = {}
    for term in dict.fromkeys(aim.term for aim in aims):
        members = [i for i, aim in enumerate(aims) if aim.term == term]
        if len(members) == 1:
            terms[term] = found[members[0]]
            continue
        if rows is None or kept is None:
            terms[term] = sum_of([aims[i].weight * found[i] for i in members])
        else:
            shares = {i: aims[i].weight * kept[:, aims[i].teacher] for i in members}
            learnt = sum_of([(share * rows[i]).sum() for i, share in shares.items()])
            terms[term] = learnt / sum_of([share.sum() for share in shares.values()])
        terms.update({aims[i].own_term: found[i] for i in members})
    return terms


@torch.no_grad()
def draw_kept(losses: torch.Tensor, drop: float) -> torch.Tensor:
    """Which teachers each image learns from (UNIC, arXiv 2408.05088).

    The teacher that an image matches worst is always kept, each other one is dropped with probability `drop`: where its
    number of `torch.rand_like(losses)`, one draw from torch's generator of the device, is below `drop`.

    Args:
        losses: Of each image and teacher, `[b, t]`.
        drop: From 0 to 1.

    Returns:
        Booleans `[b, t]`.
    """
    return (torch.rand_like(losses) >= drop).scatter(1, losses.argmax(dim=1, keepdim=True), True)


def sum_of(xs: Sequence[torch.Tensor]) -> torch.Tensor:
    """Their sum, without the zero that Python's sum starts from."""
    return sum(xs[1:], start=xs[0])


def has_rows(loss: nn.Module) -> bool:
    """Whether a loss tells that of each row, with a method `per_row`: `([..., m], [..., m]) -> [...]`."""
    return hasattr(loss, 'per_row')


def _per_image(loss: nn.Module, projected: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    rows: torch.Tensor = loss.per_row(projected, wanted)  # type: ignore[operator]  # see has_rows
    return rows.flatten(1).mean(1) if rows.ndim > 1 else rows


def _check_loss(name: str, value: torch.Tensor, projected: torch.Tensor) -> None:
    if value.ndim:
        raise UsageError(f"feature loss '{name}' gives {list(value.shape)}, it must give one number")
    if projected.requires_grad and not value.requires_grad:
        raise UsageError(f"feature loss '{name}' has no gradient: the projectors would learn nothing")
