"""Feature maps of a run on its validation images: how near the student's are to each teacher's, and how they look."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from tqdm import tqdm

from .reopen import OpenRun, mixed_order

# images that are shown
SHOWN = 6
# of the teacher's values of a component, the share that is as dark or as bright as can be, at each end
_CLIPPED = 0.02


@dataclass
class MapComparison:
    """The maps of the student, through its projectors, and of one teacher.

    Attributes:
        cosine: Between both, mean over positions and validation images.
        images: Some images as the networks see them, RGB from 0 to 1 `[n, h, w, 3]`.
        student: What the student's projectors give for these `[n, rows, columns, m]`.
        teacher: The teacher's maps on the same grid `[n, rows, columns, m]`.
    """

    cosine: float
    images: torch.Tensor
    student: torch.Tensor
    teacher: torch.Tensor


@torch.inference_mode()
def compare_maps(run: OpenRun) -> list[MapComparison]:
    """A comparison with each teacher whose map the student was aimed at; none if there is no such."""
    if run.task is None or not run.task.map_weight:
        return []
    aims = [(i, aim) for i, aim in enumerate(run.task.aims) if aim.tapped == 'map']
    loader = run.loaders['mixed']  # what normalizes over a batch needs one as those of training
    order = mixed_order(len(loader.dataset)).tolist()
    shown = [order.index(i) for i, _ in run.samples[:SHOWN]]
    total, number = torch.zeros(len(aims), dtype=torch.float64), 0
    images: list[torch.Tensor] = []
    pairs: list[list[tuple[torch.Tensor, torch.Tensor]]] = [[] for _ in aims]
    for input, target in tqdm(loader, desc='maps', leave=False, disable=None):
        with run.runtime.autocast():
            outputs = [teacher(input) for teacher in run.teachers]
            grids = [aim.value(outputs[aim.teacher]).shape[2:] for _, aim in aims]
            _, *projected = run.task.trainable_module(input, grids)
        here = [i - number for i in shown if number <= i < number + len(target)]
        images.append(_as_seen(input[here], run.data_config))
        for k, (place, aim) in enumerate(aims):
            own = projected[place].float()
            theirs = aim.wanted(outputs[aim.teacher], own.shape[1:-1]).float()
            total[k] += F.cosine_similarity(own, theirs, dim=-1).flatten(1).mean(1).sum().double().cpu()
            pairs[k].append((own[here].cpu(), theirs[here].cpu()))
        number += len(target)
    return [
        MapComparison(
            cosine=total[k].item() / number,
            images=torch.cat(images),
            student=torch.cat([own for own, _ in of_batches]),
            teacher=torch.cat([theirs for _, theirs in of_batches]),
        )
        for k, of_batches in enumerate(pairs)
    ]


def _as_seen(input: torch.Tensor, data_config: dict[str, Any]) -> torch.Tensor:
    """Normalized images `[n, ch, h, w]` as RGB from 0 to 1 `[n, h, w, 3]`; fewer than three channels: the first, as grey."""
    mean, std = (torch.tensor(data_config[key]).view(-1, 1, 1) for key in ('mean', 'std'))
    pixels = (input.float().cpu() * std + mean).clamp(0, 1)
    return (pixels[:, :3] if pixels.shape[1] >= 3 else pixels[:, :1].expand(-1, 3, -1, -1)).movedim(1, -1)


def paint(maps: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Maps in colours: the first three principal components of their directions are red, green and blue.

    Args:
        maps: `[n, rows, columns, m]` each. Components and range are those of the first one, so equal vectors have equal
            colours in all.

    Returns:
        RGB from 0 to 1 `[n, rows, columns, 3]` each.
    """
    directions = [F.normalize(x.double(), dim=-1) for x in maps]
    known = directions[0].flatten(0, -2)
    center = known.mean(0)
    _, _, components = torch.linalg.svd(known - center, full_matrices=False)
    components = F.pad(components[:3], (0, 0, 0, 3 - len(components[:3])))
    components = components * torch.where(components.sum(1, keepdim=True) < 0, -1, 1)  # a sign that does not vary
    values = [(x - center) @ components.T for x in directions]
    spread = values[0].flatten(0, -2)
    low, high = (spread.quantile(q, dim=0) for q in (_CLIPPED, 1 - _CLIPPED))
    return [((x - low) / (high - low).clamp(min=1e-12)).clamp(0, 1).float() for x in values]
