"""One epoch of training steps, and evaluation."""

import argparse
import logging
import os
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
import torchvision
from timm.task import (
    ClassificationEvaluator,
    MultiLabelClassificationEvaluator,
    TrainingTask,
    evaluation_sample_limit,
)
from timm.utils import dispatch_clip_grad

from .cache import TeacherCache
from .data import Data, epoch_batches
from .draws import IndexedTarget, seeded_mixup
from .errors import UsageError
from .interrupts import Interrupted, Interrupts
from .logs import Progress
from .nonfinite import NonFiniteLoss, UpdateGuard, check_finite, describe_nonfinite
from .run_state import RunState, run_settings, take_rank_state, take_schedule
from .runtime import Runtime, on_primary
from .trackers import StepCurves, TeacherAgreement, Trackers

_logger = logging.getLogger(__name__)

_NEVER = 2**31 - 1


@dataclass
class Trainer:
    """What an epoch of training needs, made once.

    Attributes:
        task: The task, prepared (compile, DDP).
        data: Its data.
        optimizer: Optimizer over `task.get_trainable_module()`.
        scheduler: Learning rate schedule or None.
        runtime: Device, ranks, precision.
        args: Run arguments.
        saver: Checkpoint saver on the primary rank, else None.
        trackers: Trackers on the primary rank, none on the others.
        agreement: Measures agreement with the teacher for the trackers, where that costs nothing, else None.
        cache: What the teacher says of the training images with --teacher-cache, else None.
        guard: Leaves out updates that are not finite, with --nonfinite skip, else None.
        interrupts: Signals that ask the run to stop.
        images: Number and hash of the training images.
        meaning: What the run is about, kept in its checkpoints.
        resumed: Where the run was when the checkpoint of --resume was written.
        seconds_before: Seconds that the parts of the run before this one have trained, None where that is not known.
        began: When this part began, by `time.perf_counter`.
    """

    task: TrainingTask
    data: Data
    optimizer: torch.optim.Optimizer
    scheduler: Any
    runtime: Runtime
    args: argparse.Namespace
    saver: Any = None
    trackers: Trackers = field(default_factory=Trackers)
    agreement: TeacherAgreement | None = None
    cache: TeacherCache | None = None
    guard: UpdateGuard | None = None
    interrupts: Interrupts = field(default_factory=Interrupts)
    images: dict[str, Any] = field(default_factory=dict)
    meaning: dict[str, Any] = field(default_factory=dict)
    resumed: RunState | None = None
    seconds_before: float | None = 0.0
    began: float = field(default_factory=time.perf_counter)

    @property
    def seconds(self) -> float | None:
        """Seconds that the run has trained in all its parts, None where those before are not known."""
        return None if self.seconds_before is None else self.seconds_before + time.perf_counter() - self.began

    @property
    def updates_per_epoch(self) -> int:
        """Optimizer steps in an epoch; the batches left over at its end make a smaller one."""
        return self.updates_after(len(self.data.train))

    def updates_after(self, batches: int) -> int:
        """Optimizer steps in the first batches of an epoch."""
        return -(-batches // self.args.grad_accum_steps)

    def state(self, epoch: int, batch: int, losses: Mapping[str, Any] | None = None, **more: Any) -> RunState:
        """Where the run is; to be called on all ranks.

        Args:
            epoch: The epoch.
            batch: How many of its batches are trained.
            losses: Sums of its losses so far, where it is not through.
            **more: What else is known, see `RunState`.
        """
        return RunState(
            epoch,
            batch,
            settings=run_settings(self.args, len(self.data.train), self.runtime.world_size),
            data=self.images,
            seconds=self.seconds,
            meaning=self.meaning,
            schedule=take_schedule(self.scheduler),
            ranks=take_rank_state(self.task, self.runtime, losses),
            **more,
        )

    def save_recovery(self, state: RunState) -> None:
        """Write a recovery checkpoint of weights that are finite; to be called on all ranks.

        Raises:
            NonFiniteLoss: They are not; nothing is written.
            RunError: It cannot be written; those before are whole.
        """
        check_finite(self.task, self.runtime)

        def save() -> None:
            self.saver.run = state
            self.saver.save_recovery(state.epoch, batch_idx=state.batch - 1)

        on_primary(self.runtime, save, 'a recovery checkpoint')


class LossMeter:
    """Running means of the loss terms, kept on the device and read only when asked.

    Also remembers the first step at which each term was not finite. Reading synchronizes with the device, and with the
    other ranks.

    Args:
        device: Where the terms are.
        distributed: Read those of all ranks.
        skip: Leave batches with a term that is not finite out, and do not raise.

    Attributes:
        count: Images of all ranks in the means, as of the last reading.
        bad: With `skip`, what was not finite and where first, as of the last reading.
    """

    def __init__(self, device: torch.device, distributed: bool, skip: bool = False):
        self.device, self.distributed, self.skip = device, distributed, skip
        self.bad, self.count = '', 0.0
        self.names: list[str] = []
        self.steps = 0

    def state(self) -> dict[str, Any]:
        """What was added up, to go on from with `load_state`."""
        return {'names': self.names, 'steps': self.steps, 'sums': self.sums.cpu()} if self.names else {}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from what was added up before."""
        if state:
            self._start(state['names'])
            self.steps = state['steps']
            self.sums.copy_(state['sums'])

    def start_anew(self, names: Iterable[str]) -> None:
        """Forget what was added up: a resumed epoch goes on with other terms."""
        _logger.warning(
            f'The loss terms have changed in the middle of the epoch, {", ".join(self.names)} then and '
            f'{", ".join(names)} now: the losses of this epoch are means over its batches from {self.steps} on.'
        )
        self._start(names)

    def _start(self, names: Iterable[str]) -> None:
        self.names = list(names)
        self.sums = torch.zeros(len(self.names) + 1, device=self.device, dtype=torch.float32)
        self.first_bad = torch.full((len(self.names),), _NEVER, device=self.device, dtype=torch.int64)

    def update(self, terms: dict[str, torch.Tensor], batch_size: int) -> None:
        """Add one batch's terms (scalars on the device)."""
        values = torch.stack([v.detach().float() for v in terms.values()])
        if not self.names:
            self._start(terms)
        finite = torch.isfinite(values)
        self.first_bad = torch.minimum(self.first_bad, torch.where(finite, _NEVER, self.steps))
        if self.skip:
            values = torch.where(finite.all(), values, 0)
            batch_size = batch_size * finite.all()
        self.sums[:-1] += values * batch_size
        self.sums[-1] += batch_size
        self.steps += 1

    def read(self) -> OrderedDict[str, float]:
        """Means over all batches so far, of all ranks.

        Raises:
            NonFiniteLoss: A term was not finite at some step, on some rank.
        """
        sums, first_bad = self.sums.clone(), self.first_bad.clone()
        if self.distributed:
            dist.all_reduce(sums)
            dist.all_reduce(first_bad, op=dist.ReduceOp.MIN)
        numbers = torch.cat([sums, first_bad.float()]).tolist()  # all in one transfer: the host waits once
        totals, self.count, firsts = (
            numbers[: len(self.names)],
            numbers[len(self.names)],
            numbers[len(self.names) + 1 :],
        )
        step = min(firsts)
        if step < _NEVER:
            # the terms before their weighted sum: 'loss' is only the culprit where no term is
            bad = [n for n, first in zip(self.names, firsts, strict=True) if first == step]
            self.bad = describe_nonfinite(bad, int(step))
            if not self.skip:
                raise NonFiniteLoss(self.bad)
        return OrderedDict((n, total / max(self.count, 1)) for n, total in zip(self.names, totals, strict=True))


def train_one_epoch(
    trainer: Trainer, epoch: int, progress: Progress, start: int = 0, losses: Mapping[str, Any] | None = None
) -> OrderedDict[str, float]:
    """Train one epoch, or the rest of one.

    Args:
        trainer: What to train with.
        epoch: Number of the epoch, from 0.
        progress: Where to show it.
        start: The first batch, from 0.
        losses: Sums of the losses of the batches before.

    Returns:
        Mean of the loss and of each of its raw terms, and images_per_s.

    Raises:
        NonFiniteLoss: See `LossMeter.read`.
        Interrupted: The run was asked to stop before the last batch, and has written a recovery checkpoint.
    """
    task, args, runtime = trainer.task, trainer.args, trainer.runtime
    task.train()
    meter = LossMeter(runtime.device, runtime.distributed, skip=trainer.guard is not None)
    meter.load_state(losses or {})
    num_batches = len(trainer.data.train)
    accum = _Accumulation(num_batches, args.grad_accum_steps)
    update = epoch * trainer.updates_per_epoch + trainer.updates_after(start)
    images, began, recovery_due = 0, time.perf_counter(), False
    late_zero = zeroes_late(runtime.device)
    curves = _step_curves(trainer, epoch)
    if losses:
        curves.go_on(meter.read(), meter.count)
    trainer.optimizer.zero_grad()
    for i, (input, target) in epoch_batches(trainer.data.train, epoch, start):
        input, target = _to_device(trainer, epoch, i, input, target)
        curves.keep_samples(input)
        size = batch_size(input)
        need_update = accum.ends_at(i)
        if trainer.guard is not None and accum.starts_at(i):
            trainer.guard.before_forward()
        with task.no_sync() if runtime.distributed and not need_update else nullcontext():
            with runtime.autocast():
                result = _forward(trainer, input, target)
            if late_zero and accum.starts_at(i):
                trainer.optimizer.zero_grad()
            measure = curves.measure_norm if need_update and curves.wants_norm(i) else None
            _backward(trainer, result['loss'] * (_batch_scale(trainer, size) / accum.size(i)), need_update, measure)
        terms = {k: v for k, v in result.items() if k != 'output'}
        if meter.names and meter.names != list(terms):
            meter.start_anew(terms)
            curves.go_on({}, 0)
        meter.update(terms, size)
        images += size * runtime.world_size
        last = i + 1 == num_batches
        if need_update:
            update += 1
            if last and hasattr(trainer.optimizer, 'sync_lookahead'):
                trainer.optimizer.sync_lookahead()  # passes over parameters without a gradient: before zero_grad
            if not late_zero or last:
                trainer.optimizer.zero_grad()
            task.update_ema(step=update)
            if args.synchronize_step and runtime.device.type == 'cuda':
                torch.cuda.synchronize()
            if trainer.scheduler is not None:
                trainer.scheduler.step_update(num_updates=update, metric=None)
        if last or (i + 1) % args.log_interval == 0:
            shown = meter.read(), images / (time.perf_counter() - began), mean_lr(trainer.optimizer)
            progress.update(i + 1, *shown)
            curves.log(i, update, meter.count, *shown)
            if trainer.guard is not None:
                trainer.guard.say(meter.bad)
            _save_images(trainer, input, i)
        else:
            progress.update(i + 1)
        recovery_due |= bool(args.recovery_interval) and (i + 1) % args.recovery_interval == 0
        if need_update and not last:  # after the last batch it is for the caller to see
            signum = trainer.interrupts.requested()
            if signum or recovery_due:
                meter.read()  # never save what a non-finite loss has touched
                trainer.save_recovery(trainer.state(epoch, i + 1, meter.state()))
                recovery_due = False
            if signum:
                raise Interrupted(signum, f'after batch {i + 1} of {num_batches} of epoch {epoch}')
    if trainer.cache is not None:
        trainer.cache.flush()
    metrics = meter.read()
    metrics['images_per_s'] = images / (time.perf_counter() - began)
    return metrics


def zeroes_late(device: torch.device) -> bool:
    """Whether to free gradients just before the backward that makes new ones, not after the step.

    A CPU's allocator would give the memory back to the system in between, and page it in again: up to 5 % of a step. A
    GPU's keeps it, and there the activations of the next forward can have it.
    """
    return device.type == 'cpu'


def _forward(trainer: Trainer, input: torch.Tensor, target: torch.Tensor | IndexedTarget) -> dict[str, torch.Tensor]:
    """The task's terms; with a cache the teacher runs only where that has no answer yet."""
    if not isinstance(target, IndexedTarget):
        return trainer.task(input, target)
    # a complete cache sends the teacher to the host; an image that breaks later still has to be asked about
    teacher = trainer.cache(target, lambda: trainer.task.teacher.to(input.device)(input))
    return trainer.task(input, target.target, teacher=teacher)


class _Accumulation:
    """Which batches end an optimizer step, and how many share it; the batches left over at the end share their own."""

    def __init__(self, num_batches: int, steps: int):
        self.num_batches, self.steps = num_batches, steps

    def starts_at(self, i: int) -> bool:
        return i % self.steps == 0

    def ends_at(self, i: int) -> bool:
        return i + 1 >= self.num_batches or (i + 1) % self.steps == 0

    def size(self, i: int) -> int:
        if i >= self.num_batches:  # a stream that is longer than it said: a step of its own for each batch
            return 1
        first = i - i % self.steps
        return min(self.steps, self.num_batches - first)


def batch_size(input: torch.Tensor | dict[str, torch.Tensor]) -> int:
    """Images in a batch `[b, ch, h, w]`, or in a NaFlex batch of patches `[b, n, ...]`."""
    return len(input['patches'] if isinstance(input, dict) else input)


def _batch_scale(trainer: Trainer, size: int) -> float:
    """Weight of a batch of another size than --batch-size; ranks whose batches differ share by their images."""
    args, runtime = trainer.args, trainer.runtime
    how = args.naflex_loss_scale if args.naflex_loader else args.variable_batch_loss_scale
    scale = {'none': 1.0, 'sqrt': (size / args.batch_size) ** 0.5, 'linear': size / args.batch_size}[how]
    if args.naflex_loader and runtime.distributed:
        sizes = torch.tensor(float(size), device=runtime.device)
        dist.all_reduce(sizes)
        scale *= runtime.world_size * size / sizes.item()
    return scale


def _save_images(trainer: Trainer, input: torch.Tensor, i: int) -> None:
    if trainer.args.save_images and trainer.saver is not None:
        path = os.path.join(trainer.saver.checkpoint_dir, f'train-batch-{i}.jpg')
        torchvision.utils.save_image(input.float(), path, padding=0, normalize=True)


def _on_device(value: Any, device: torch.device, dtype: torch.dtype | None = None) -> Any:
    if isinstance(value, dict):
        return {k: _on_device(v, device, dtype if k == 'patches' else None) for k, v in value.items()}
    return value.to(device=device, dtype=dtype) if isinstance(value, torch.Tensor) else value


def create_evaluator(args: argparse.Namespace, runtime: Runtime, loader: Any) -> ClassificationEvaluator:
    """timm's evaluator of the task: loss, top-1 and top-5, or mAP and F1 for multi-label data."""
    limit = evaluation_sample_limit(loader)
    if args.task == 'multilabel':
        threshold = args.multilabel_threshold
        return MultiLabelClassificationEvaluator(runtime.device, max_samples=limit, threshold=threshold)
    return ClassificationEvaluator(runtime.device, max_samples=limit)


def batch_to_device(args: argparse.Namespace, runtime: Runtime, input: Any, target: Any) -> tuple:
    """A loader's batch where the run computes, in its dtype and memory format (a prefetching loader did the first two)."""
    if args.no_prefetcher:
        input = _on_device(input, runtime.device, runtime.model_dtype or torch.float32)
        target = target.to(runtime.device)
    if args.channels_last and not isinstance(input, dict):
        input = input.contiguous(memory_format=torch.channels_last)
    return input, target


def _to_device(trainer: Trainer, epoch: int, i: int, input: torch.Tensor, target: torch.Tensor) -> tuple:
    args, mixup = trainer.args, trainer.data.mixup
    input, target = batch_to_device(args, trainer.runtime, input, target)
    if mixup is not None:
        mixup.mixup_enabled = not args.mixup_off_epoch or epoch < args.mixup_off_epoch
        input, target = seeded_mixup(mixup, input, target, args.seed, epoch, i, trainer.runtime.rank)
    return input, target


def _step_curves(trainer: Trainer, epoch: int) -> StepCurves:
    args, config = trainer.args, trainer.data.config
    return StepCurves(
        trainer.trackers,
        trainer.task,
        trainer.optimizer,
        epoch,
        len(trainer.data.train),
        log_interval=args.log_interval,
        accum_steps=args.grad_accum_steps,
        mean=config['mean'],
        std=config['std'],
    )


def _after(first: Callable[[], None], values: Iterable) -> Iterator:
    first()
    yield from values


def _backward(
    trainer: Trainer, loss: torch.Tensor, need_update: bool, measure: Callable[[], None] | None = None
) -> None:
    """Backward, and with `need_update` the optimizer step; `measure` is called on its gradients before clipping."""
    args, optimizer = trainer.args, trainer.optimizer
    parameters = None
    if args.clip_grad is not None:
        parameters = trainer.task.get_clip_parameters(exclude_head='agc' in args.clip_mode)
        if measure is not None:
            # clipping asks for its parameters when they are unscaled and not clipped yet, which nobody else can tell
            parameters = _after(measure, parameters)
    if trainer.runtime.scaler is not None:
        guard = trainer.guard if need_update else None
        if guard is not None and parameters is not None:  # clipping by value would make an infinite gradient finite
            parameters, guard = _after(guard.after_backward, parameters), None
        trainer.runtime.scaler(
            loss,
            optimizer,
            clip_grad=args.clip_grad,
            clip_mode=args.clip_mode,
            parameters=parameters,
            create_graph=getattr(optimizer, 'is_second_order', False),
            need_update=need_update,
        )
        if guard is not None:
            guard.after_backward()
    else:
        loss.backward(create_graph=getattr(optimizer, 'is_second_order', False))
        if need_update:
            if trainer.guard is not None:
                trainer.guard.after_backward()
            if parameters is not None:
                dispatch_clip_grad(parameters, args.clip_grad, mode=args.clip_mode)
            optimizer.step()
    if measure is not None and args.clip_grad is None:
        measure()


def mean_lr(optimizer: torch.optim.Optimizer) -> float:
    """Mean learning rate of the parameter groups."""
    lrs = [group['lr'] for group in optimizer.param_groups]
    return sum(lrs) / len(lrs)


@torch.inference_mode()
def evaluate(
    model: Callable[[torch.Tensor], torch.Tensor],
    loader: Any,
    runtime: Runtime,
    args: argparse.Namespace,
    progress: Progress,
    after_batch: Callable[[], None] = lambda: None,
) -> OrderedDict[str, float]:
    """Metrics (in percent) and loss of `model` over a validation loader, over all ranks.

    Args:
        model: Batch `[b, ch, h, w]` -> logits `[b, c]`; a module should be in eval mode.
        loader: Validation loader.
        runtime: Device, ranks, precision.
        args: Run arguments.
        progress: Where to show it.
        after_batch: Called after each batch.

    Raises:
        UsageError: Labels that the model has no class for.
    """
    evaluator = create_evaluator(args, runtime, loader)
    for i, (input, target) in enumerate(loader):
        input, target = batch_to_device(args, runtime, input, target)
        with runtime.autocast():
            output = model(input)
        if isinstance(output, (tuple, list)):
            output = output[0]
        if args.tta > 1:
            output = output.unfold(0, args.tta, args.tta).mean(dim=2)
            target = target[:: args.tta][: len(output)]
        if i == 0 and target.ndim == 1 and int(target.max()) >= output.shape[-1]:
            raise UsageError(f'the data has label {int(target.max())}, the model {output.shape[-1]} classes')
        evaluator.update(output, target)
        progress.update(i + 1)
        after_batch()
    return evaluator.compute(distributed=runtime.distributed)
