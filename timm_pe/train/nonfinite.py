"""Handling of NaN and infinity: reported, never saved, and skipped with --nonfinite skip."""

import logging
from collections.abc import Sequence
from typing import cast

import torch
import torch.distributed as dist
import torch.nn as nn
from timm.task import TrainingTask
from timm.utils import unwrap_model

from ..errors import RunError
from ..process.runtime import Runtime

_logger = logging.getLogger(__name__)

# A loss scaler starts at 65536 and halves its scale at each dropped update: after 16 it is 1. A run that goes on from a
# larger scale needs more.
HALVINGS = 32

_INTEGER_OF_SIZE = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class NonFiniteLoss(RunError):
    """A loss term became NaN or infinite; the message names the term and the step."""


def check_finite(task: TrainingTask, runtime: Runtime) -> None:
    """Refuse weights that a gradient has made NaN or infinite, before a loss shows it; call it on all ranks.

    Raises:
        NonFiniteLoss: Some are, on some rank.
    """
    weights = cast(nn.Module, task.get_trainable_module()).state_dict()
    tensors = [t for t in weights.values() if t.is_floating_point()]
    finite = torch.stack([torch.isfinite(t).all() for t in tensors]).all().int()
    if runtime.distributed:
        dist.all_reduce(finite, op=dist.ReduceOp.MIN)
    if not finite.item():
        raise NonFiniteLoss('weights not finite after the last step (a gradient was not)')


def describe_nonfinite(bad: Sequence[str], names: Sequence[str], batch: int) -> str:
    """The terms that were first not finite at a batch, and a hint if the task loss is a term and not among them."""
    named = [n for n in bad if n != 'loss'] or list(bad)
    of_teacher = 'task_loss' in names and 'task_loss' not in named and named != ['loss']
    hint = ' (the loss on the labels was: look at the teacher, its weights and --teacher-dtype)' if of_teacher else ''
    return f'{" and ".join(named)} not finite at batch {batch} of the epoch{hint}'


def _as_integers(tensors: Sequence[torch.Tensor]) -> list[list[torch.Tensor]]:
    """Views of the tensors as integers, a list for each dtype: NaN times 0 is NaN, but its bits times 0 are those of 0.

    A view starts nothing on the device, so what is done to all of a list costs the same for 10 tensors and for 1000.
    """
    lists: dict[torch.dtype, list[torch.Tensor]] = {}
    for tensor in tensors:
        integer = _INTEGER_OF_SIZE[tensor.element_size()]
        lists.setdefault(integer, []).append(tensor.view(integer))
    return list(lists.values())


class UpdateGuard:
    """Zeroes the gradients of an update if they are not finite, on the device and without waiting for it.

    Momentum and weight decay continue as after any other batch; running statistics of the batches are restored.

    Args:
        module: The trained module.
        scales: Whether the optimizer steps through a loss scaler, which itself skips such updates.
    """

    def __init__(self, module: nn.Module, scales: bool):
        module = unwrap_model(module)
        self.parameters = [p for p in module.parameters() if p.requires_grad]
        statistics = [b for b in module.buffers() if b.is_floating_point()]
        self.statistics = _as_integers(statistics)
        self.kept = _as_integers([b.clone() for b in statistics])
        self.scales = scales
        self.updates, self.said, self.in_a_row = 0, (0, 0), 0
        self.dropped = torch.zeros((), dtype=torch.int64, device=self.parameters[0].device)

    def before_forward(self) -> None:
        """Remember the running statistics; to be called before the first batch of an update."""
        for kept, statistics in zip(self.kept, self.statistics, strict=True):
            torch._foreach_copy_(kept, statistics)

    @torch.no_grad()
    def after_backward(self) -> None:
        """Zero the gradients unless all are finite; to be called between the last backward of an update and its step."""
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        # summed in float32: in float16 the norm of finite gradients can be infinite
        norms = torch._foreach_norm(gradients, 2, torch.float32)
        good = torch.isfinite(torch.linalg.vector_norm(torch.stack(norms)))
        bad = ~good
        if not self.scales:
            for integers in _as_integers(gradients):
                torch._foreach_mul_(integers, good.to(integers[0].dtype))
        for kept, statistics in zip(self.kept, self.statistics, strict=True):
            torch._foreach_mul_(kept, bad.to(kept[0].dtype))
            torch._foreach_mul_(statistics, good.to(kept[0].dtype))
            torch._foreach_add_(statistics, kept)  # one of the two is zero
        self.dropped += bad
        self.updates += 1

    def say(self, why: str) -> None:
        """Log how many updates were dropped since the last call; waits for the device.

        Args:
            why: The terms that were not finite, and where.

        Raises:
            NonFiniteLoss: All of them were, and more than one in a row; with a loss scaler, whose scale falls at each,
                more than `HALVINGS`.
        """
        dropped, (dropped_before, updates_before) = int(self.dropped), self.said
        new, of = dropped - dropped_before, self.updates - updates_before
        self.said = dropped, self.updates
        why = why or 'gradients not finite'
        self.in_a_row = self.in_a_row + new if new == of else 0
        if self.in_a_row > (HALVINGS if self.scales else 1):
            scale = ', though each halved the loss scale' if self.scales else ''
            raise NonFiniteLoss(f'{why}, and so all of the last {self.in_a_row} updates{scale}')
        if new:
            scale = '; each halved the loss scale' if self.scales else ''
            _logger.warning(f'--nonfinite skip left out {new} of the last {of} updates: {why}{scale}.')
