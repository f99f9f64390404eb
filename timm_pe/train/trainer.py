"""The training of a run: epochs, steps, validation, and what is saved when."""

import logging
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
import torchvision
from timm.scheduler.scheduler import Scheduler
from timm.utils import dispatch_clip_grad, distribute_bn

from ..config.derive import ranked_by
from ..data.draws import IndexedTarget, seeded_mixup
from ..data.epochs import epoch_batches
from ..errors import UsageError
from ..process.runtime import on_primary
from ..process.signals import Interrupted, Interrupts
from ..run_folder import RunFolder
from .build import Parts
from .cache import TeacherCache
from .checkpoints import Saver
from .console import Progress, say_epoch
from .evaluate import METRIC_NAMES, batch_to_device, format_metrics, say_unreadable
from .meters import Accumulation, EpochCount, LossMeter, Pace, batch_scale, batch_size, mean_lr
from .nonfinite import UpdateGuard, check_finite
from .position import RunState, Span, precisions_of, restore_rank_state, run_settings, take_rank_state, take_schedule
from .run_cache import outputs_of
from .student import describe_use
from .task_loss import LabeledLoss
from .trackers import StepCurves, Trackers, flat_metrics, log_epoch
from .validation import Validation

_logger = logging.getLogger(__name__)


class Trainer:
    """Trains the task of a run.

    Args:
        parts: Task, data, settings, device.
        optimizer: Optimizer over `task.get_trainable_module()`.
        scheduler: Learning rate schedule or None.
        span: Which epochs to train.
        images: Number and hash of the training images, kept in checkpoints.
        meaning: What defines the run (see `run_meaning`), kept in checkpoints.
        caches: With --teacher-cache the outputs of each teacher for the training images.
        guard: Drops updates that are not finite, with --nonfinite skip, else None.
        folder: The run's folder.
        saver: Checkpoint saver on the primary rank, else None.
        trackers: Trackers on the primary rank, none on the others.
        validation: Measures the weights after an epoch.
    """

    def __init__(
        self,
        parts: Parts,
        optimizer: torch.optim.Optimizer,
        scheduler: Scheduler | None,
        span: Span,
        images: Mapping[str, Any],
        meaning: Mapping[str, Any],
        caches: Sequence[TeacherCache],
        guard: UpdateGuard | None,
        folder: RunFolder,
        saver: Saver | None,
        trackers: Trackers,
        validation: Validation,
    ):
        self.config, self.runtime, self.data, self.task = parts.config, parts.runtime, parts.data, parts.training_task
        self.num_classes, self.teachers = parts.num_classes, parts.teachers
        self.optimizer, self.scheduler, self.span = optimizer, scheduler, span
        self.images, self.meaning = dict(images), dict(meaning)
        self.caches, self.guard, self.folder, self.saver = caches, guard, folder, saver
        self.trackers, self.validation = trackers, validation
        self.accumulation = Accumulation(len(self.data.train), self.config.grad_accum_steps)
        self.interrupts, self.pace = Interrupts(self.runtime), Pace(span, len(self.data.train))
        self.epoch_images = 0  # images of all ranks in the last epoch
        # A CPU's allocator returns the memory of freed gradients to the system and pages it in again, up to 5 % of a
        # step, so on a CPU they are freed just before the backward that makes new ones. A GPU's allocator keeps the
        # memory for the activations of the next forward, so on a GPU they are freed right after the step.
        self.frees_late = self.runtime.device.type == 'cpu'

    # The run ------------------------------------------------------------------------------------------------------------

    def fit(self) -> None:
        """Train, validate and save, epoch by epoch; a resumed run continues at the batch where it was.

        Raises:
            Interrupted: A signal asked the run to stop; a checkpoint of that point is written.
            RunError: It cannot continue; earlier checkpoints are intact.
        """
        config, span = self.config, self.span
        metric_name = ranked_by(config)
        self.pace = Pace(span, len(self.data.train))
        losses = restore_rank_state(span.resumed, self.task, self.runtime) if span.resumed else {}
        state = span.resumed if span.resumed and not span.resumed.validated else None
        best: tuple[float | None, int | None] = (None, None)
        with self.interrupts, self.trackers:
            for number in range(span.first, span.end):
                if state is None or not state.train_metrics:
                    state = self._train(number, state.batch if state else 0, losses)
                metrics = self.validate(state) if self._validates_after(number) else None
                best = self._save_epoch(state, metrics, metrics[metric_name] if metrics else None)
                self._say_epoch(state, metrics, best)
                if self.scheduler is not None:
                    self.scheduler.step(number + 1, metrics[metric_name] if metrics else None)
                state, losses = None, {}
        if self.runtime.is_primary and best[0] is not None:
            _logger.info(
                f'Best {METRIC_NAMES.get(metric_name, metric_name)} {best[0]:.3f} in epoch {cast(int, best[1]) + 1} of {span.schedule} '
                f"(epoch {best[1]} of summary.csv, which counts from 0), {self.pace.describe()}. The student: '{self.folder.student_file}'.\n"
                f'{describe_use(config, self.folder, self.num_classes)}'
            )

    def _validates_after(self, number: int) -> bool:
        config = self.config
        milestone = number + 1 in (config.save_epochs or [])
        return (number + 1) % config.val_interval == 0 or number == self.span.end - 1 or milestone

    def _train(self, number: int, start: int, losses: Mapping[str, Any]) -> RunState:
        """Train an epoch, or the rest of it; returns the run's position after it."""
        num_batches = len(self.data.train)
        metrics = self.train_epoch(number, start, losses)
        say_unreadable(self.data.train, self.epoch_images, self.runtime)
        self._share_running_statistics()
        state = self.state(number, num_batches, train_metrics=dict(metrics))
        if self.config.recovery_interval:
            self.save_recovery(state)
        self._stop_if_asked(state)
        return state

    def _share_running_statistics(self) -> None:
        """Make the running statistics of all ranks equal, as --dist-bn says; with --sync-bn they already are."""
        config, runtime = self.config, self.runtime
        if not runtime.distributed or config.sync_bn or config.dist_bn not in ('broadcast', 'reduce'):
            return
        for ema in (False, True):
            module = self.task.get_trainable_module(ema=ema)
            if module is not None and not (ema and config.model_ema_force_cpu):
                distribute_bn(module, runtime.world_size, config.dist_bn == 'reduce')

    # An epoch -----------------------------------------------------------------------------------------------------------

    def train_epoch(
        self, number: int, start: int = 0, losses: Mapping[str, Any] | None = None
    ) -> OrderedDict[str, float]:
        """Train one epoch, or the rest of one.

        Args:
            number: Number of the epoch, from 0.
            start: The first batch, from 0.
            losses: Sums of the losses of the batches before.

        Returns:
            Mean of the loss and of each of its raw terms, and images_per_s.

        Raises:
            NonFiniteLoss: See `LossMeter.read`.
            Interrupted: The run was asked to stop before the last batch, and has written a recovery checkpoint.
        """
        self.task.train()
        epoch = self._begin_epoch(number, start, losses or {})
        recovery_due = False
        self.optimizer.zero_grad()
        try:
            for i, (input, target) in epoch.timed(epoch_batches(self.data.train, number, start)):
                input, target = self._to_device(number, i, input, target)
                epoch.curves.keep_samples(input)
                self.train_step(epoch, i, input, target)
                self._report(epoch, i, input)
                recovery_due |= bool(self.config.recovery_interval) and (i + 1) % self.config.recovery_interval == 0
                # after the last batch the caller saves and stops
                if self.accumulation.ends_at(i) and i + 1 != epoch.num_batches:
                    recovery_due = self._save_or_stop(epoch, i, recovery_due)
        finally:
            epoch.progress.close()
        for cache in self.caches:
            cache.flush()
        if not epoch.images and not start:
            raise UsageError(
                'the training split gave no image: do --train-split, --input-key and --target-key fit the data?'
            )
        self.epoch_images = epoch.images
        metrics = epoch.meter.read()
        metrics['images_per_s'] = epoch.images_per_s
        return metrics

    def train_step(self, epoch: EpochCount, i: int, input: torch.Tensor, target: torch.Tensor | IndexedTarget) -> None:
        """One batch: forward, backward, and the optimizer's step if the batch ends one.

        Args:
            epoch: The epoch, which counts the batch.
            i: Number of the batch in it.
            input: Images `[b, ch, h, w]` on the device, or a NaFlex batch.
            target: Labels `[b]` or soft labels `[b, c]`, with the images' indices if the teacher is cached.
        """
        starts, ends, last = self.accumulation.starts_at(i), self.accumulation.ends_at(i), i + 1 == epoch.num_batches
        size = batch_size(input)
        if self.guard is not None and starts:
            self.guard.before_forward()  # before the batch changes the running statistics that it may have to restore
        with self._gradients_of_one_rank(not ends):
            with self.runtime.autocast():
                result = self._forward(input, target)
            if self.frees_late and starts:
                self.optimizer.zero_grad()
            measure = epoch.curves.measure_norm if ends and epoch.curves.wants_norm(i) else None
            loss = result['loss'] * (batch_scale(self.config, self.runtime, size) / self.accumulation.size(i))
            self._backward(loss, ends, measure)
        labeled = self.task.criterion.images if isinstance(self.task.criterion, LabeledLoss) else None
        epoch.add({k: v for k, v in result.items() if k != 'output'}, size, self.runtime.world_size, labeled)
        if not ends:
            return
        epoch.update += 1
        if last and hasattr(self.optimizer, 'sync_lookahead'):
            self.optimizer.sync_lookahead()  # before zero_grad: it skips parameters without a gradient
        if not self.frees_late or last:
            self.optimizer.zero_grad()
        self.task.update_ema(step=epoch.update)
        if self.config.synchronize_step and self.runtime.device.type == 'cuda':
            torch.cuda.synchronize()
        if self.scheduler is not None:
            self.scheduler.step_update(num_updates=epoch.update, metric=None)

    def _gradients_of_one_rank(self, wanted: bool) -> AbstractContextManager[Any]:
        """Skip DDP's exchange of gradients between ranks while they are accumulated over batches."""
        return self.task.no_sync() if self.runtime.distributed and wanted else nullcontext()

    def _forward(self, input: torch.Tensor, target: torch.Tensor | IndexedTarget) -> dict[str, torch.Tensor]:
        """The task's terms; with a cache the teacher runs only if rows are missing."""
        if not isinstance(target, IndexedTarget):
            return self.task(input, target)
        outputs = outputs_of(self.teachers, self.caches, input, target)
        return self.task(input, target.target, teacher=outputs)

    def _backward(self, loss: torch.Tensor, steps: bool, measure: Callable[[], None] | None) -> None:
        """Backward, and the optimizer's step if `steps`; `measure` reads the gradients before they are clipped."""
        config, optimizer, scaler = self.config, self.optimizer, self.runtime.scaler
        second_order = getattr(optimizer, 'is_second_order', False)
        guard = self.guard if steps else None
        clip_grad = config.clip_grad
        parameters: Iterable[torch.Tensor] | None = None
        if clip_grad is not None:
            parameters = self.task.get_clip_parameters(exclude_head='agc' in config.clip_mode)
            if measure is not None:
                # clipping reads its parameters after unscaling, before clipping: the only moment to measure gradients
                parameters = _after(measure, parameters)
        elif measure is not None and scaler is not None:
            # a step may write into its gradients (foreach Nesterov does): look at them where a scaler would clip them
            clip_grad, parameters = float('inf'), _after(measure, self.task.get_clip_parameters(exclude_head=False))
        if scaler is not None:
            if guard is not None and parameters is not None:
                # the scaler clips by itself, and clipping by value would make an infinite gradient finite: check before
                parameters, guard = _after(guard.after_backward, parameters), None
            scaler(
                loss,
                optimizer,
                clip_grad=clip_grad,
                clip_mode=config.clip_mode if config.clip_grad is not None else 'norm',
                parameters=parameters,
                create_graph=second_order,
                need_update=steps,
            )
            if guard is not None:  # the scaler has skipped the step of infinite gradients: only count it
                guard.after_backward()
        else:
            loss.backward(create_graph=second_order)
            if steps:
                if guard is not None:
                    guard.after_backward()  # before clipping, for the same reason
                if parameters is not None and clip_grad is not None:
                    dispatch_clip_grad(parameters, clip_grad, mode=config.clip_mode)
                elif measure is not None:
                    measure()
                optimizer.step()

    def _begin_epoch(self, number: int, start: int, losses: Mapping[str, Any]) -> EpochCount:
        num_batches, runtime, config = len(self.data.train), self.runtime, self.config
        meter = LossMeter(runtime.device, runtime.distributed, skip=self.guard is not None)
        meter.load_state(losses)
        curves = StepCurves(
            self.trackers,
            self.task,
            self.optimizer,
            number,
            num_batches,
            log_interval=config.log_interval,
            accum_steps=config.grad_accum_steps,
            mean=self.data.config['mean'],
            std=self.data.config['std'],
        )
        if losses:
            curves.go_on(meter.read(), meter.count, meter.labeled)
        progress = Progress(f'Train {number + 1}/{self.span.schedule}', num_batches, runtime.is_primary)
        update = number * self.updates_per_epoch + self.accumulation.updates_after(start)
        return EpochCount(number, num_batches, self.accumulation, meter, curves, progress, update)

    def _to_device(self, number: int, i: int, input: Any, target: Any) -> tuple[Any, Any]:
        mixup, off = self.data.mixup, self.config.mixup_off_epoch
        input, target = batch_to_device(self.config, self.runtime, input, target)
        if mixup is not None:
            mixup.mixup_enabled = not off or number < off
            input, target = seeded_mixup(mixup, input, target, self.config.seed, number, i, self.runtime.rank)
        return input, target

    def _report(self, epoch: EpochCount, i: int, input: Any) -> None:
        """Show and track the terms at an epoch's end and each log interval, the only waits for the device."""
        if i + 1 != epoch.num_batches and (i + 1) % self.config.log_interval:
            epoch.progress.update(i + 1)
            return
        shown = epoch.meter.read(), epoch.images_per_s, mean_lr(self.optimizer)
        left = self.pace.left(epoch.number + (i + 1) / epoch.num_batches)
        epoch.progress.update(i + 1, *shown, left=left, waiting=epoch.waiting)
        epoch.curves.log(i, epoch.update, epoch.meter.count, epoch.meter.labeled, *shown)
        if self.guard is not None:
            self.guard.say(epoch.meter.bad)
            epoch.meter.forget_bad()
        if self.config.save_images and self.saver is not None:
            path = self.folder.path / f'train-batch-{i}.jpg'
            torchvision.utils.save_image(input.float(), path, padding=0, normalize=True)

    def _save_or_stop(self, epoch: EpochCount, i: int, recovery_due: bool) -> bool:
        """Save if that is due or the run is asked to stop; returns whether it is still due."""
        signum = self.interrupts.requested()
        if signum or recovery_due:
            epoch.meter.read()  # never save what a non-finite loss has touched
            self.save_recovery(self.state(epoch.number, i + 1, epoch.meter.state()))
            recovery_due = False
        if signum:
            raise Interrupted(
                signum,
                f'after batch {i + 1} of {epoch.num_batches} of epoch {epoch.number + 1} of {self.span.schedule}',
            )
        return recovery_due

    # Validation ---------------------------------------------------------------------------------------------------------

    def validate(self, state: RunState) -> OrderedDict[str, float]:
        """Validate the weights and, if there is one, the moving average, whose metrics then count.

        Args:
            state: The run's position, saved if it is asked to stop.
        """
        with_average = self.task.has_ema() and not self.config.model_ema_force_cpu
        for ema in (False, True) if with_average else (False,):
            what = 'Test (EMA)' if ema else 'Test'
            is_last = state.epoch + 1 == self.span.schedule
            metrics = self.validation(ema, what, lambda: self._stop_if_asked(state), is_last)
            if with_average and not ema:
                said = format_metrics(metrics, self.num_classes)
                _logger.info(f'Epoch {state.epoch + 1}/{self.span.schedule} without the average: {said}')
        return metrics

    def _say_epoch(
        self, state: RunState, metrics: Mapping[str, float] | None, best: tuple[float | None, int | None]
    ) -> None:
        """Log the final line of an epoch."""
        number, (_, best_epoch) = state.epoch, best
        validation = format_metrics(metrics, self.num_classes).split('  ') if metrics else []
        if validation and best_epoch is not None:
            name = ranked_by(self.config)
            at = next((i for i, part in enumerate(validation) if part.startswith(METRIC_NAMES.get(name, name))), 0)
            validation[at] += ' (best)' if best_epoch == number else f' (best: epoch {best_epoch + 1})'
        epoch, lr = f'Epoch {number + 1}/{self.span.schedule}', mean_lr(self.optimizer)
        say_epoch([epoch, *validation], state.train_metrics, lr, *self.pace.split(number + 1))

    # Saving -------------------------------------------------------------------------------------------------------------

    @property
    def updates_per_epoch(self) -> int:
        """Optimizer steps in an epoch; the batches left over at its end make a smaller one."""
        return self.accumulation.updates_after(len(self.data.train))

    def state(self, epoch: int, batch: int, losses: Mapping[str, Any] | None = None, **more: Any) -> RunState:
        """The run's position; call it on all ranks.

        Args:
            epoch: The epoch.
            batch: How many of its batches are trained.
            losses: Sums of its losses so far, if it is not finished.
            **more: Further fields of `RunState`.
        """
        return RunState(
            epoch,
            batch,
            settings=run_settings(self.config, len(self.data.train), self.runtime.world_size),
            data=self.images,
            seconds=self.pace.seconds,
            meaning=self.meaning,
            teacher_precision=precisions_of(self.teachers),
            schedule=take_schedule(self.scheduler),
            ranks=take_rank_state(self.task, self.runtime, losses),
            **more,
        )

    def save_recovery(self, state: RunState) -> None:
        """Write a recovery checkpoint if the weights are finite; call it on all ranks.

        Raises:
            NonFiniteLoss: They are not; nothing is written.
            RunError: It cannot be written; earlier ones are intact.
        """
        check_finite(self.task, self.runtime)

        def save() -> None:
            assert self.saver is not None
            self.saver.run = state
            self.saver.save_recovery(state.epoch, batch_idx=state.batch - 1)

        on_primary(self.runtime, save, 'a recovery checkpoint')

    def _stop_if_asked(self, state: RunState) -> None:
        signum = self.interrupts.requested()
        if signum:
            self.save_recovery(state)
            raise Interrupted(
                signum, f'after epoch {state.epoch + 1} of {self.span.schedule}, before its validation was through'
            )

    def _save_epoch(
        self, state: RunState, eval_metrics: Mapping[str, float] | None, metric: float | None
    ) -> tuple[float | None, int | None]:
        """Write an epoch's row and checkpoints; returns the best metric and its epoch on the primary rank."""
        check_finite(self.task, self.runtime)
        number, num_batches, lr = state.epoch, len(self.data.train), mean_lr(self.optimizer)
        state = self.state(number, num_batches, train_metrics=state.train_metrics, validated=True, metric=metric)
        best: tuple[float | None, int | None] = (None, None)

        def save() -> None:
            nonlocal best
            assert self.saver is not None
            without = dict.fromkeys(self.validation.metric_names, '')
            self.folder.append_row(number, state.train_metrics, {**without, **(eval_metrics or {})}, lr)
            if self.trackers:
                agreement = self.validation.agreement if eval_metrics else None
                row = flat_metrics(number, state.train_metrics, eval_metrics or {}, lr)
                log_epoch(self.trackers, self.task, (number + 1) * self.updates_per_epoch, row, agreement)
            self.saver.run = state
            best = self.saver.save_checkpoint(number, metric=metric)
            if number + 1 in (self.config.save_epochs or []):
                self.saver.save_milestone(number + 1)

        on_primary(self.runtime, save, 'the checkpoint of an epoch')
        return best


def _after(first: Callable[[], None], values: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
    """Yield `values`, after a call of `first`."""
    first()
    yield from values
