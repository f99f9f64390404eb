"""Counters of an epoch of training: its loss terms, its optimizer steps, its images."""

import logging
import time
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from ..config.run_config import RunConfig
from ..process.runtime import Runtime
from .console import Progress
from .nonfinite import NonFiniteLoss, describe_nonfinite
from .position import Span
from .trackers import StepCurves

_logger = logging.getLogger(__name__)

_NEVER = 2**31 - 1
_Batch = TypeVar('_Batch')


class LossMeter:
    """Running means of the loss terms, kept on the device and read only when asked.

    Also remembers the first step at which each term was not finite. Reading synchronizes with the device, and with the
    other ranks.

    Args:
        device: Where the terms are.
        distributed: Whether to read those of all ranks.
        skip: Discard batches with a term that is not finite, instead of raising.

    Attributes:
        count: Images of all ranks in the means, as of the last reading.
        labeled: Of those, the images that the task loss is a mean of.
        bad: With `skip`, which terms were not finite since `forget_bad`, and at which batch first, as of the last reading.
    """

    def __init__(self, device: torch.device, distributed: bool, skip: bool = False):
        self.device, self.distributed, self.skip = device, distributed, skip
        self.bad, self.count, self.labeled = '', 0.0, 0.0
        self.names: list[str] = []
        self.steps = 0
        # sums of the task loss and of the images that it is a mean of, if these are not all images
        self.of_labels: torch.Tensor | None = None

    def state(self) -> dict[str, Any]:
        """The sums so far, for `load_state`."""
        if not self.names:
            return {}
        of_labels = {} if self.of_labels is None else {'of_labels': self.of_labels.cpu()}
        return {'names': self.names, 'steps': self.steps, 'sums': self.sums.cpu(), **of_labels}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Continue from the sums of an earlier `state`."""
        if state:
            self._start(state['names'])
            self.steps = state['steps']
            self.sums.copy_(state['sums'])
            if 'of_labels' in state:
                self.of_labels = state['of_labels'].to(self.device)

    def start_anew(self, names: Iterable[str]) -> None:
        """Discard the sums: a resumed epoch continues with other terms."""
        _logger.warning(
            f'The loss terms have changed in the middle of the epoch, {", ".join(self.names)} then and '
            f'{", ".join(names)} now: the losses of this epoch are means over its batches from {self.steps} on.'
        )
        self._start(names)

    def _start(self, names: Iterable[str]) -> None:
        self.names = list(names)
        self.sums = torch.zeros(len(self.names) + 1, device=self.device, dtype=torch.float32)
        self.of_labels = None
        self.first_bad = torch.full((len(self.names),), _NEVER, device=self.device, dtype=torch.int64)

    def update(
        self, terms: dict[str, torch.Tensor], batch_size: int, labeled: int | torch.Tensor | None = None
    ) -> None:
        """Add one batch.

        Args:
            terms: Its terms, scalars on the device.
            batch_size: Number of its images.
            labeled: Number of images that its task loss is a mean of; None means all. Of several ranks, that of all.
        """
        values = torch.stack([v.detach().float() for v in terms.values()])
        if not self.names:
            self._start(terms)
        finite = torch.isfinite(values)
        size: int | torch.Tensor = batch_size
        self.first_bad = torch.minimum(self.first_bad, torch.where(finite, _NEVER, self.steps))
        if self.skip:
            values = torch.where(finite.all(), values, 0)
            size = batch_size * finite.all()
            labeled = None if labeled is None else labeled * finite.all()
        self.sums[:-1] += values * size
        self.sums[-1] += size
        if labeled is not None:
            ones = torch.stack([values[self.names.index('task_loss')], torch.ones_like(values[0])])
            self.of_labels = ones * labeled + (0 if self.of_labels is None else self.of_labels)
        self.steps += 1

    def read(self) -> OrderedDict[str, float]:
        """Means over all batches so far, of all ranks.

        Raises:
            NonFiniteLoss: A term was not finite at some step, on some rank.
        """
        sums, first_bad = self.sums.clone(), self.first_bad.clone()
        labeled = sums[-1:]
        if self.of_labels is not None:  # as if it were a mean over all images
            i = self.names.index('task_loss')
            of_labels = self.of_labels.clone()
            if self.distributed:
                dist.all_reduce(of_labels)
            sums[i] = of_labels[0] / of_labels[1].clamp(min=1) * sums[-1]
            labeled = of_labels[1:]
        if self.distributed:
            dist.all_reduce(sums)
            dist.all_reduce(first_bad, op=dist.ReduceOp.MIN)
        numbers = torch.cat([sums, labeled, first_bad.float()]).tolist()  # all in one transfer: the host waits once
        terms = len(self.names)
        totals, (self.count, self.labeled), firsts = numbers[:terms], numbers[terms : terms + 2], numbers[terms + 2 :]
        step = min(firsts)
        if step < _NEVER:
            # 'loss', the weighted sum, is only to blame if no term is
            bad = [n for n, first in zip(self.names, firsts, strict=True) if first == step]
            self.bad = describe_nonfinite(bad, self.names, int(step))
            if not self.skip:
                raise NonFiniteLoss(self.bad)
        return OrderedDict((n, total / max(self.count, 1)) for n, total in zip(self.names, totals, strict=True))

    def forget_bad(self) -> None:
        """What was not finite so far is said: `bad` is about the batches to come."""
        self.bad = ''
        if self.names:
            self.first_bad.fill_(_NEVER)


class Accumulation:
    """Which batches end an optimizer step, and how many share it; batches left over at the end share one of their own.

    Args:
        num_batches: Batches in an epoch.
        steps: Batches that share an optimizer step.
    """

    def __init__(self, num_batches: int, steps: int):
        self.num_batches, self.steps = num_batches, steps

    def starts_at(self, i: int) -> bool:
        """Whether batch `i` is the first of its optimizer step."""
        return i % self.steps == 0

    def ends_at(self, i: int) -> bool:
        """Whether the optimizer steps after batch `i`."""
        return i + 1 >= self.num_batches or (i + 1) % self.steps == 0

    def size(self, i: int) -> int:
        """How many batches share the optimizer step of batch `i`."""
        if i >= self.num_batches:  # a stream longer than announced: one step for each batch
            return 1
        first = i - i % self.steps
        return min(self.steps, self.num_batches - first)

    def updates_after(self, batches: int) -> int:
        """Optimizer steps in the first batches of an epoch."""
        return -(-batches // self.steps)


@dataclass
class EpochCount:
    """An epoch of training while it runs.

    Attributes:
        number: The epoch, from 0.
        num_batches: Batches in it.
        accumulation: Which of them end an optimizer step.
        meter: Its loss terms.
        curves: Its reports to the trackers.
        progress: Its progress on the terminal.
        update: Optimizer steps since the start of the run.
        images: Images of all ranks that this process has trained on.
        waited: Seconds that it has waited for the loader.
        began: When it began, by `time.perf_counter`.
    """

    number: int
    num_batches: int
    accumulation: Accumulation
    meter: 'LossMeter'
    curves: StepCurves
    progress: Progress
    update: int
    images: int = 0
    waited: float = 0.0
    began: float = field(default_factory=time.perf_counter)

    @property
    def images_per_s(self) -> float:
        """Speed so far."""
        return self.images / (time.perf_counter() - self.began)

    @property
    def waiting(self) -> float:
        """Share of the time so far that was spent waiting for data."""
        return self.waited / (time.perf_counter() - self.began)

    def timed(self, batches: Iterable[_Batch]) -> Iterator[_Batch]:
        """Yield the batches, and add up the time spent waiting for them."""
        batches = iter(batches)
        while True:
            began = time.perf_counter()
            try:
                batch = next(batches)
            except StopIteration:
                return
            self.waited += time.perf_counter() - began
            yield batch

    def add(
        self,
        terms: dict[str, torch.Tensor],
        batch_size: int,
        world_size: int,
        labeled: int | torch.Tensor | None = None,
    ) -> None:
        """Count a batch and its loss terms; see `LossMeter.update`."""
        if self.meter.names and self.meter.names != list(terms):
            self.meter.start_anew(terms)
            self.curves.go_on({}, 0, 0)
        self.meter.update(terms, batch_size, labeled)
        self.images += batch_size * world_size


class Pace:
    """How long a run has trained, and how long it will still take.

    Args:
        span: Which epochs this process trains, and how long earlier ones took.
        num_batches: Batches in an epoch.
    """

    def __init__(self, span: Span, num_batches: int):
        self.span, self.began = span, time.perf_counter()
        self.last = self.began
        resumed = span.resumed
        # how much of its first epoch was trained before
        self.share_before = 0.0 if resumed is None or resumed.validated else resumed.batch / num_batches

    @property
    def seconds(self) -> float | None:
        """Seconds that the run has trained in all its parts, None if those of earlier parts are unknown."""
        before = self.span.seconds_before
        return None if before is None else before + time.perf_counter() - self.began

    def describe(self) -> str:
        """The same in words."""
        if self.seconds is None:
            return f'{time.perf_counter() - self.began:.0f} s since it was resumed'
        return f'{self.seconds:.0f} s{" in all" if self.span.is_resumed else ""}'

    def left(self, epochs: float) -> float:
        """Seconds that the run still needs at its pace so far; 0 if there is none yet.

        Args:
            epochs: Number of epochs trained, including earlier parts, and the current one as a fraction.
        """
        done = epochs - self.span.first - self.share_before
        if done <= 0:  # resumed after the last batch of an epoch: there is no pace yet
            return 0.0
        return (time.perf_counter() - self.began) * (self.span.end - epochs) / done

    def split(self, epochs: int) -> tuple[float, float]:
        """Seconds since the last call, and those that the run still needs; `epochs` as for `left`."""
        now = time.perf_counter()
        seconds, self.last = now - self.last, now
        return seconds, self.left(epochs)


def batch_size(input: torch.Tensor | dict[str, torch.Tensor]) -> int:
    """Images in a batch `[b, ch, h, w]`, or in a NaFlex batch of patches `[b, n, ...]`."""
    return len(input['patches'] if isinstance(input, dict) else input)


def batch_scale(config: RunConfig, runtime: Runtime, size: int) -> float | torch.Tensor:
    """Weight of a batch of another size than --batch-size; ranks whose batches differ share by their images.

    Args:
        config: Run settings.
        runtime: Ranks; with NaFlex batches all of them must call.
        size: Images in the batch of this rank.
    """
    how = config.naflex_loss_scale if config.naflex_loader else config.variable_batch_loss_scale
    scale = {'none': 1.0, 'sqrt': (size / config.batch_size) ** 0.5, 'linear': size / config.batch_size}[how]
    if config.naflex_loader and runtime.distributed:
        sizes = torch.tensor(float(size), device=runtime.device)
        dist.all_reduce(sizes)
        return scale * runtime.world_size * size / sizes  # stays on the device: nobody waits for the number
    return scale


def mean_lr(optimizer: torch.optim.Optimizer) -> float:
    """Mean learning rate of the parameter groups."""
    lrs: list[float] = [group['lr'] for group in optimizer.param_groups]
    return sum(lrs) / len(lrs)
