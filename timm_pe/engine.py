"""One epoch of training steps, and evaluation."""

import argparse
import logging
import os
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
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
from .data import Data
from .draws import IndexedTarget, seeded_mixup
from .errors import UsageError
from .logs import Progress
from .runtime import Runtime
from .trackers import StepCurves, TeacherAgreement, Trackers

_logger = logging.getLogger(__name__)

_NEVER = 2**31 - 1


class NonFiniteLoss(RuntimeError):
    """A loss term became NaN or infinite; the message names the term and the step."""


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

    @property
    def updates_per_epoch(self) -> int:
        """Optimizer steps in an epoch; the batches left over at its end make a smaller one."""
        return -(-len(self.data.train) // self.args.grad_accum_steps)


class LossMeter:
    """Running means of the loss terms, kept on the device and read only when asked.

    Also remembers the first step at which each term was not finite. Reading synchronizes with the device, and with the
    other ranks.
    """

    def __init__(self, device: torch.device, distributed: bool):
        self.device, self.distributed = device, distributed
        self.names: list[str] = []
        self.steps = 0

    def update(self, terms: dict[str, torch.Tensor], batch_size: int) -> None:
        """Add one batch's terms (scalars on the device)."""
        values = torch.stack([v.detach().float() for v in terms.values()])
        if not self.names:
            self.names = list(terms)
            self.sums = torch.zeros(len(values) + 1, device=self.device, dtype=torch.float32)
            self.first_bad = torch.full((len(values),), _NEVER, device=self.device, dtype=torch.int64)
        self.sums[:-1] += values * batch_size
        self.sums[-1] += batch_size
        here = torch.where(torch.isfinite(values), _NEVER, self.steps)
        self.first_bad = torch.minimum(self.first_bad, here)
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
        totals, count, firsts = numbers[: len(self.names)], numbers[len(self.names)], numbers[len(self.names) + 1 :]
        step = min(firsts)
        if step < _NEVER:
            # the terms before their weighted sum: 'loss' is only the culprit where no term is
            bad = [n for n, first in zip(self.names, firsts, strict=True) if first == step]
            named = [n for n in bad if n != 'loss'] or bad
            raise NonFiniteLoss(f'{" and ".join(named)} not finite at batch {step:.0f} of the epoch')
        return OrderedDict((n, total / count) for n, total in zip(self.names, totals, strict=True))


def train_one_epoch(trainer: Trainer, epoch: int, progress: Progress) -> OrderedDict[str, float]:
    """Train one epoch.

    Args:
        trainer: What to train with.
        epoch: Number of the epoch, from 0.
        progress: Where to show it.

    Returns:
        Mean of the loss and of each of its raw terms, and images_per_s.

    Raises:
        NonFiniteLoss: See `LossMeter.read`.
    """
    task, args, runtime = trainer.task, trainer.args, trainer.runtime
    task.train()
    meter = LossMeter(runtime.device, runtime.distributed)
    num_batches = len(trainer.data.train)
    accum = _Accumulation(num_batches, args.grad_accum_steps)
    update = epoch * trainer.updates_per_epoch
    images, start = 0, time.perf_counter()
    curves = _step_curves(trainer, epoch)
    trainer.optimizer.zero_grad()
    for i, (input, target) in enumerate(trainer.data.train):
        input, target = _to_device(trainer, epoch, i, input, target)
        curves.keep_samples(input)
        size = batch_size(input)
        need_update = accum.ends_at(i)
        with task.no_sync() if runtime.distributed and not need_update else nullcontext():
            with runtime.autocast():
                result = _forward(trainer, input, target)
            measure = curves.measure_norm if need_update and curves.wants_norm(i) else None
            _backward(trainer, result['loss'] * (_batch_scale(trainer, size) / accum.size(i)), need_update, measure)
        meter.update({k: v for k, v in result.items() if k != 'output'}, size)
        images += size * runtime.world_size
        last = i + 1 == num_batches
        if need_update:
            update += 1
            if last and hasattr(trainer.optimizer, 'sync_lookahead'):
                trainer.optimizer.sync_lookahead()  # passes over parameters without a gradient: before zero_grad
            trainer.optimizer.zero_grad()
            task.update_ema(step=update)
            if args.synchronize_step and runtime.device.type == 'cuda':
                torch.cuda.synchronize()
            if trainer.scheduler is not None:
                trainer.scheduler.step_update(num_updates=update, metric=None)
        if last or (i + 1) % args.log_interval == 0:
            shown = meter.read(), images / (time.perf_counter() - start), mean_lr(trainer.optimizer)
            progress.update(i + 1, *shown)
            curves.log(i, update, images, *shown)
            _save_images(trainer, input, i)
        else:
            progress.update(i + 1)
        if args.recovery_interval and (last or (i + 1) % args.recovery_interval == 0):
            meter.read()  # never save what a non-finite loss has touched
            if trainer.saver is not None:
                trainer.saver.save_recovery(epoch, batch_idx=i)
    if trainer.cache is not None:
        trainer.cache.flush()
    metrics = meter.read()
    metrics['images_per_s'] = images / (time.perf_counter() - start)
    return metrics


def _forward(trainer: Trainer, input: torch.Tensor, target: torch.Tensor | IndexedTarget) -> dict[str, torch.Tensor]:
    """The task's terms; with a cache the teacher runs only where that has no answer yet."""
    if not isinstance(target, IndexedTarget):
        return trainer.task(input, target)
    teacher = trainer.cache(target, lambda: trainer.task.teacher(input))
    return trainer.task(input, target.target, teacher=teacher)


class _Accumulation:
    """Which batches end an optimizer step, and how many share it; the batches left over at the end share their own."""

    def __init__(self, num_batches: int, steps: int):
        self.num_batches, self.steps = num_batches, steps

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
        trainer.runtime.scaler(
            loss,
            optimizer,
            clip_grad=args.clip_grad,
            clip_mode=args.clip_mode,
            parameters=parameters,
            create_graph=getattr(optimizer, 'is_second_order', False),
            need_update=need_update,
        )
    else:
        loss.backward(create_graph=getattr(optimizer, 'is_second_order', False))
        if need_update:
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
) -> OrderedDict[str, float]:
    """Metrics (in percent) and loss of `model` over a validation loader, over all ranks.

    Args:
        model: Batch `[b, ch, h, w]` -> logits `[b, c]`; a module should be in eval mode.
        loader: Validation loader.
        runtime: Device, ranks, precision.
        args: Run arguments.
        progress: Where to show it.

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
    return evaluator.compute(distributed=runtime.distributed)
