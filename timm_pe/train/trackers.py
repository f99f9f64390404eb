"""Trackers of a run: TensorBoard, Weights & Biases, trackio. Each keeps its files in the run's folder."""

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, Protocol

import torch
import torch.distributed as dist
import torchvision
import yaml
from timm.task import TrainingTask
from torch.nn.utils import get_total_norm
from torchvision.transforms.functional import to_pil_image

from ..config.declare import name_of
from ..config.flags import TrackerFlags
from ..config.run_config import RunConfig
from ..errors import UsageError, one_line

_logger = logging.getLogger(__name__)

_SAMPLES = 16

# raw term of a task of timm's -> the attribute of the task that weighs it
_TIMM_WEIGHTS = {
    'task_loss': 'task_loss_weight',
    'kd_loss': 'distill_loss_weight',
    'distill_loss': 'distill_loss_weight',
}


class Tracker(Protocol):
    """The interface of a tracker. Steps are optimizer updates since the start of the run."""

    def config(self, values: Mapping[str, Any]) -> None:
        """Keep the run's arguments."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Add a point to each of the curves named in `values`."""

    def images(self, step: int, name: str, picture: torch.Tensor) -> None:
        """Keep a picture `[3, h, w]` of values from 0 to 1."""

    def close(self, failed: bool = False) -> None:
        """Write what is left; `failed` means that the run ended with an error."""


class TensorBoardTracker:
    """Event files in RUN/tensorboard.

    Args:
        flags: Flags of the trackers.
        folder: The run's folder.
        resumed: Whether the run continues in this folder: old points from the first new step on are then dropped from
            the curves. A fresh run drops all of them.
    """

    def __init__(self, flags: TrackerFlags, folder: str, resumed: bool):
        from torch.utils.tensorboard import SummaryWriter

        self.create = lambda step: SummaryWriter(os.path.join(folder, 'tensorboard'), purge_step=step)
        # only the first step of a resumed run tells which old points to drop
        self.writer = None if resumed else self.create(0)
        self.text: str | None = None

    def config(self, values: Mapping[str, Any]) -> None:
        """See `Tracker`."""
        self.text = '    ' + yaml.safe_dump(_plain(values)).replace('\n', '\n    ')

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """See `Tracker`."""
        if self.writer is None:
            self.writer = self.create(step)
        if self.text is not None:
            self.writer.add_text('config', self.text, step)
            self.text = None
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def images(self, step: int, name: str, picture: torch.Tensor) -> None:
        """See `Tracker`."""
        if self.writer is None:
            self.writer = self.create(step)
        self.writer.add_image(name, picture, step)

    def close(self, failed: bool = False) -> None:
        """See `Tracker`."""
        if self.writer is not None:
            self.writer.close()


class WandbTracker:
    """A Weights & Biases run whose files are in RUN/wandb; WANDB_MODE and WANDB_API_KEY of the environment apply.

    Args:
        flags: Flags of the trackers.
        folder: The run's folder.
        resumed: Whether to continue the run that was last tracked in this folder.
    """

    HINT = ' (WANDB_MODE=offline needs neither key nor network)'

    def __init__(self, flags: TrackerFlags, folder: str, resumed: bool):
        import wandb

        self.image = wandb.Image
        known = flags.wandb_resume_id or (_last_wandb_id(folder) if resumed else None)
        self.run = wandb.init(
            project=flags.wandb_project,
            name=os.path.basename(folder),
            tags=flags.wandb_tags or None,
            id=known,
            resume='must' if flags.wandb_resume_id else 'allow' if known else None,
            dir=folder,
        )

    def config(self, values: Mapping[str, Any]) -> None:
        """See `Tracker`."""
        self.run.config.update(_plain(values), allow_val_change=True)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """See `Tracker`."""
        self.run.log(dict(values), step=step)

    def images(self, step: int, name: str, picture: torch.Tensor) -> None:
        """See `Tracker`."""
        self.run.log({name: self.image(to_pil_image(picture))}, step=step)

    def close(self, failed: bool = False) -> None:
        """See `Tracker`."""
        self.run.finish(exit_code=int(failed))


def _last_wandb_id(folder: str) -> str | None:
    """Id of the run that wandb last kept in a run folder."""
    latest = os.path.join(folder, 'wandb', 'latest-run')
    names = [n for n in (os.listdir(latest) if os.path.isdir(latest) else []) if n.endswith('.wandb')]
    return names[0].removeprefix('run-').removesuffix('.wandb') if names else None


class TrackioTracker:
    """A trackio run of project timm_pe; its data base is in RUN/trackio, or in TRACKIO_DIR of the environment.

    Args:
        flags: Flags of the trackers.
        folder: The run's folder.
        resumed: Whether to continue the run of this name.
    """

    def __init__(self, flags: TrackerFlags, folder: str, resumed: bool):
        place = os.environ.get('TRACKIO_DIR')
        own = os.path.join(os.path.abspath(folder), 'trackio')
        os.environ['TRACKIO_DIR'] = place or own  # trackio reads it only when it is imported
        try:
            import trackio
        finally:
            if not place:
                del os.environ['TRACKIO_DIR']
        if str(trackio.TRACKIO_DIR) != (place or own):
            _logger.warning(f"--log-trackio: trackio was loaded before and keeps writing to '{trackio.TRACKIO_DIR}'.")
        self.trackio = trackio
        self.name, self.resume = os.path.basename(folder), 'allow' if resumed else 'never'

    def config(self, values: Mapping[str, Any]) -> None:
        """See `Tracker`."""
        self.trackio.init(project='timm_pe', name=self.name, config=_plain(values), resume=self.resume, embed=False)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """See `Tracker`."""
        self.trackio.log(dict(values), step=step)

    def images(self, step: int, name: str, picture: torch.Tensor) -> None:
        """See `Tracker`."""
        self.trackio.log({name: self.trackio.Image(to_pil_image(picture))}, step=step)

    def close(self, failed: bool = False) -> None:
        """See `Tracker`."""
        self.trackio.finish()


# flag -> its tracker; what may fail over a network comes last
TRACKERS: dict[str, type] = {'log_tb': TensorBoardTracker, 'log_trackio': TrackioTracker, 'log_wandb': WandbTracker}


def is_tracked(flags: TrackerFlags) -> bool:
    """Whether any tracker is asked for."""
    return any(getattr(flags, flag) for flag in TRACKERS)


class Trackers:
    """The trackers of a run; none on all ranks but the primary.

    A tracker that fails during the run is reported once and dropped. Used as a context it closes them all.

    Args:
        trackers: The trackers to write to.
        show_samples: Whether to keep a picture of the first batch; a resumed run has it already.
    """

    def __init__(self, trackers: Sequence[Tracker] = (), show_samples: bool = True):
        self.trackers = list(trackers)
        self.show_samples = show_samples

    def __bool__(self) -> bool:
        return bool(self.trackers)

    def __enter__(self) -> 'Trackers':
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close(failed=error is not None)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """See `Tracker`."""
        self._each(lambda tracker: tracker.scalars(step, values))

    def images(self, step: int, name: str, picture: torch.Tensor) -> None:
        """See `Tracker`."""
        self._each(lambda tracker: tracker.images(step, name, picture))

    def close(self, failed: bool = False) -> None:
        """See `Tracker`."""
        self._each(lambda tracker: tracker.close(failed))
        self.trackers = []

    def _each(self, call: Callable[[Tracker], None]) -> None:
        for tracker in list(self.trackers):
            try:
                call(tracker)
            except Exception as e:  # a full disk or a lost network is no reason to lose the training
                self.trackers.remove(tracker)
                _logger.warning(f'{type(tracker).__name__} failed and gets nothing more: {one_line(e)}')


def start_trackers(config: RunConfig, folder: str, resumed: bool) -> Trackers:
    """Start the trackers that the flags select; on the primary rank only.

    Args:
        config: Run settings, which the trackers keep.
        folder: The run's folder.
        resumed: Whether the run and its curves continue in this folder.

    Raises:
        UsageError: A tracker that does not start.
    """
    started = Trackers(show_samples=not resumed)
    for flag, kind in TRACKERS.items():
        if not getattr(config, flag):
            continue
        try:
            tracker = kind(config, folder, resumed)
            started.trackers.append(tracker)
            tracker.config({k: v for k, v in config.as_dict().items() if not k.startswith('wandb')})
        except Exception as e:
            started.close(failed=True)
            raise UsageError(f'{name_of(flag)} does not start: {one_line(e)}{getattr(kind, "HINT", "")}') from e
    return started


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments as every tracker can write them."""
    simple = (bool, int, float, str, list, dict, type(None))
    return {k: v if isinstance(v, simple) else str(v) for k, v in values.items()}


def weighted_terms(task: TrainingTask, terms: Mapping[str, float]) -> dict[str, float]:
    """Raw loss terms by name, and for each that has a weight in the task's loss also the weighted value."""
    weights = getattr(task, 'loss_weights', None)  # ours
    if weights is None:
        weights = {name: getattr(task, given) for name, given in _TIMM_WEIGHTS.items() if hasattr(task, given)}
    return {**terms, **{f'{name}_weighted': weights[name] * value for name, value in terms.items() if name in weights}}


class StepCurves:
    """Reports an epoch of training to the trackers at its log intervals. Steps between them cost nothing.

    Args:
        trackers: The run's trackers; with none of them nothing is done.
        task: The task.
        optimizer: Its optimizer.
        epoch: Number of the epoch, from 0.
        num_batches: Batches in it.
        log_interval: Batches between two points of a curve.
        accum_steps: Batches of an optimizer step.
        mean: Mean that the batches are normalized with.
        std: Standard deviation likewise.
    """

    def __init__(
        self,
        trackers: Trackers,
        task: TrainingTask,
        optimizer: torch.optim.Optimizer,
        epoch: int,
        num_batches: int,
        log_interval: int,
        accum_steps: int,
        mean: Sequence[float],
        std: Sequence[float],
    ):
        self.trackers, self.task, self.optimizer = trackers, task, optimizer
        self.epoch, self.num_batches = epoch, num_batches
        self.log_interval, self.accum_steps = log_interval, accum_steps
        self.mean, self.std = mean, std
        self.samples: torch.Tensor | None = None
        self.norm: torch.Tensor | None = None
        # images that each term was a mean of, and their sums, at the last point
        self.images_before: dict[str, float] = {}
        self.sums_before: dict[str, float] = {}

    def keep_samples(self, input: Any) -> None:
        """Remember some images of the run's first batch `[b, ch, h, w]`; they are shown at the next log interval."""
        if self.trackers and self.trackers.show_samples and isinstance(input, torch.Tensor):
            self.trackers.show_samples = False
            self.samples = input[:_SAMPLES].detach().clone()

    def wants_norm(self, i: int) -> bool:
        """Whether the optimizer step that ends with batch `i` is the last one before a point of the curve."""
        if not self.trackers:
            return False
        end = i + self.accum_steps
        return i + 1 >= self.num_batches or end // self.log_interval > i // self.log_interval

    def measure_norm(self) -> None:
        """Take the gradient's norm, on the device. Unscaled gradients, before they are clipped."""
        gradients = [p.grad for group in self.optimizer.param_groups for p in group['params'] if p.grad is not None]
        self.norm = get_total_norm(gradients)

    def go_on(self, terms: Mapping[str, float], images: float, labeled: float) -> None:
        """Start in the middle of an epoch: `terms` are the means over its `images` so far, 'task_loss' over `labeled` ones."""
        self.images_before = {name: labeled if name == 'task_loss' else images for name in terms}
        self.sums_before = {name: mean * self.images_before[name] for name, mean in terms.items()}

    def log(
        self, i: int, step: int, images: float, labeled: float, terms: Mapping[str, float], speed: float, lr: float
    ) -> None:
        """Add a point after batch `i`.

        Args:
            i: Number of the batch in the epoch.
            step: Optimizer updates since the start of the run.
            images: Images of the epoch so far.
            labeled: Of those, the images that the task loss is a mean of.
            terms: Means of loss and raw terms over them; the curve shows those since its last point, and no term that has
                no image since.
            speed: Images per second.
            lr: Learning rate.
        """
        if not self.trackers:
            return
        images_before, sums_before = self.images_before, self.sums_before
        self.go_on(terms, images, labeled)
        new = {name: number - images_before.get(name, 0.0) for name, number in self.images_before.items()}
        since = {
            name: (total - sums_before.get(name, 0.0)) / new[name]
            for name, total in self.sums_before.items()
            if new[name] > 0
        }
        values = {**weighted_terms(self.task, since), 'lr': lr, 'images_per_s': speed}
        if self.norm is not None:
            values['grad_norm'] = self.norm.item()
            self.norm = None
        epoch = self.epoch + (i + 1) / max(self.num_batches, 1)
        self.trackers.scalars(step, {**{f'step/{k}': v for k, v in values.items()}, 'epoch': epoch})
        if self.samples is not None:
            self.trackers.images(step, 'first_batch', sample_grid(self.samples, self.mean, self.std))
            self.samples = None


def sample_grid(images: torch.Tensor, mean: Sequence[float], std: Sequence[float]) -> torch.Tensor:
    """Normalized images `[b, ch, h, w]` as one picture `[3, H, W]` of values from 0 to 1, four in a row."""
    shape = (1, -1, 1, 1)
    pixels = images.float().cpu() * torch.tensor(std).view(shape) + torch.tensor(mean).view(shape)
    pixels = pixels[:, : 3 if pixels.shape[1] >= 3 else 1].clamp(0, 1)
    return torchvision.utils.make_grid(pixels, nrow=4)


def log_epoch(
    trackers: Trackers, task: TrainingTask, step: int, metrics: Mapping[str, float], agreement: float | None
) -> None:
    """Report an epoch to the trackers, under the names of summary.csv; 'epoch' is the number of epochs done.

    Args:
        trackers: The run's trackers.
        task: The task.
        step: Optimizer updates since the start of the run.
        metrics: The epoch's row of summary.csv.
        agreement: Percentage of validation images on which student and teacher agree, if measured.
    """
    terms = {k.removeprefix('train_'): v for k, v in metrics.items() if k.startswith('train_')}
    weighted = {f'train_{k}': v for k, v in weighted_terms(task, terms).items()}
    more = {} if agreement is None else {'eval_teacher_agreement': agreement}
    trackers.scalars(step, {**metrics, **weighted, **more, 'epoch': metrics['epoch'] + 1})


class TeacherAgreement:
    """How often student and teacher predict the same class on the validation images.

    The teacher's predictions are recorded when it is validated before the first epoch, so nothing is computed twice.

    Args:
        max_images: Number of images of this rank that count: later ones only pad its share to the length of the others.
            None without padding.
    """

    def __init__(self, max_images: int | None = None):
        self.max_images = max_images
        self.teacher: list[torch.Tensor] = []
        self.same, self.images = torch.tensor(0), 0
        self.percent: float | None = None

    def record(self, forward: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
        """The teacher's `forward`, which also records the predicted classes of its logits `[b, c]`, batch by batch."""

        def recorded(input: torch.Tensor) -> torch.Tensor:
            logits = forward(input)
            self.teacher.append(logits.argmax(-1))
            return logits

        return recorded

    def compare(self, forward: Callable[[torch.Tensor], Any]) -> Callable[[torch.Tensor], Any]:
        """The student's `forward`, which also counts agreement on the same batches in the same order."""
        batches = iter(self.teacher)
        self.same, self.images = torch.tensor(0), 0

        def compared(input: torch.Tensor) -> Any:
            output = forward(input)
            logits = output[0] if isinstance(output, (tuple, list)) else output
            same = logits.argmax(-1) == next(batches)
            if self.max_images is not None:
                same = same[: max(self.max_images - self.images, 0)]
            self.same, self.images = self.same + same.sum(), self.images + same.numel()
            return output

        return compared

    def finish(self, distributed: bool) -> None:
        """Set `percent` from what was counted, over all ranks."""
        counts = torch.stack([self.same, torch.full_like(self.same, self.images)])
        if distributed:
            dist.all_reduce(counts)
        same, images = counts.tolist()
        self.percent = 100 * same / images


def flat_metrics(
    epoch: int, train_metrics: Mapping[str, float], eval_metrics: Mapping[str, float], lr: float
) -> dict[str, float]:
    """One epoch's numbers under the names of summary.csv."""
    train = {f'train_{k}': v for k, v in train_metrics.items()}
    return {'epoch': epoch, **train, **{f'eval_{k}': v for k, v in eval_metrics.items()}, 'lr': lr}
