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


def describe_nonfinite(names: Sequence[str], batch: int) -> str:
    """The terms that were first not finite at a batch, and a hint if the task loss is not among them."""
    named = [n for n in names if n != 'loss'] or list(names)
    of_teacher = bool(named) and 'task_loss' not in named and named != ['loss']
    hint = ' (the loss on the labels was: look at the teacher, its weights and --teacher-dtype)' if of_teacher else ''
    return f'{" and ".join(named)} not finite at batch {batch} of the epoch{hint}'


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
        self.buffers = [b for b in module.buffers() if b.is_floating_point()]
        self.scales = scales
        self.updates, self.said = 0, (0, 0)
        self.dropped = torch.zeros((), dtype=torch.int64, device=self.parameters[0].device)

    def before_forward(self) -> None:
        """Remember the running statistics; to be called before the first batch of an update."""
        self.kept = [b.clone() for b in self.buffers]

    @torch.no_grad()
    def after_backward(self) -> None:
        """Zero the gradients unless all are finite; to be called between the last backward of an update and its step."""
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        if any(
            gradient.dtype != torch.float32 for gradient in gradients
        ):  # in float16 finite ones have an infinite norm
            norms = [torch.linalg.vector_norm(gradient, dtype=torch.float32) for gradient in gradients]
        else:
            norms = gradients
        bad = ~torch.isfinite(torch.nn.utils.get_total_norm(norms))
        if not self.scales:
            for gradient in gradients:
                gradient.masked_fill_(bad, 0)
        for buffer, kept in zip(self.buffers, self.kept, strict=True):
            buffer.copy_(torch.where(bad, kept, buffer))
        self.dropped += bad
        self.updates += 1

    def say(self, why: str) -> None:
        """Log how many updates were dropped since the last call; waits for the device.

        Args:
            why: The terms that were not finite, and where.

        Raises:
            NonFiniteLoss: All of them were, and there was more than one.
        """
        dropped, (dropped_before, updates_before) = int(self.dropped), self.said
        new, of = dropped - dropped_before, self.updates - updates_before
        self.said = dropped, self.updates
        if new and new == of and of > 1:
            raise NonFiniteLoss(f'{why or "gradients not finite"}, and so all of the last {of} updates')
        if new:
            _logger.warning(
                f'--nonfinite skip left out {new} of the last {of} updates: {why or "gradients not finite"}.'
            )
