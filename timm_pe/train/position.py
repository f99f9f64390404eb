"""The exact position of a run: what a checkpoint holds besides timm's entries, for a bit-equal resume.

It is the entry 'run' of the saver's state. Random states are tensors and integers, so that the file still loads with
weights_only.
"""

import logging
import os
import random
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import torch
from timm.task import DistillationTeacher, TrainingTask
from timm.utils import load_checkpoint_metadata, unwrap_model

from ..config.flags import DTYPES
from ..config.run_config import RunConfig
from ..config.teachers import as_each
from ..data.datasets import class_map_of, describe_other_class
from ..data.draws import kept_rng
from ..data.epochs import plain_loader
from ..data.loaders import Data
from ..errors import UsageError, one_line
from ..method.teacher import Teacher
from ..method.weight_files import fingerprint
from ..process.runtime import Runtime

_logger = logging.getLogger(__name__)
# entries of a RunState that checkpoints of earlier commits do not have
_ADDED = {'seconds', 'meaning', 'teacher_precision'}
# buffers of norms; whatever else a module keeps in buffers is the same on all ranks
_RUNNING = ('running_mean', 'running_var', 'num_batches_tracked')


@dataclass
class RunState:
    """The exact position of a run.

    Attributes:
        epoch: The current epoch, or the last one trained.
        batch: Number of its batches that are trained; `settings['batches']` once all are.
        validated: Whether the epoch is finished, including validation and checkpoint.
        metric: The metric that ranks the epoch, if it was validated.
        train_metrics: Training metrics of the epoch once all its batches are trained.
        settings: What the number of a batch depends on, see `run_settings`.
        data: Number and hash of the training images.
        schedule: State of a plateau schedule, which the epoch does not determine.
        ranks: For each rank its random states, sums of losses, and buffers if ranks have their own.
        seconds: How long the run has trained, in all its parts; None if the checkpoint does not have it.
        meaning: What defines the run, see `run_meaning`; empty if the checkpoint does not have it.
        teacher_precision: The teacher's, see `Teacher.precision`, of several a list of theirs; None without a teacher, or if
            the checkpoint does not have it.
    """

    epoch: int
    batch: int = 0
    validated: bool = False
    metric: float | None = None
    train_metrics: dict[str, float] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    schedule: dict[str, Any] = field(default_factory=dict)
    ranks: list[dict[str, Any]] = field(default_factory=list)
    seconds: float | None = None
    meaning: dict[str, Any] = field(default_factory=dict)
    teacher_precision: str | list[str] | None = None


@dataclass(frozen=True)
class Span:
    """Which part of a run this process trains.

    Attributes:
        first: First epoch, from 0.
        schedule: Epochs of the schedule, with warmup prefix and cooldown.
        end: One past the last epoch.
        resumed: The run's exact position, None for a run that starts at the beginning of an epoch.
        seconds_before: Seconds that earlier parts of the run have trained, None if unknown.
        is_resumed: Whether there were earlier parts.
    """

    first: int
    schedule: int
    end: int
    resumed: RunState | None = None
    seconds_before: float | None = 0.0
    is_resumed: bool = False


def run_settings(config: RunConfig, num_batches: int, world_size: int) -> dict[str, Any]:
    """The settings that must be equal for batch k of an epoch to be the same batch."""
    return {
        'ranks': world_size,
        'batch_size': config.batch_size,
        'grad_accum_steps': config.grad_accum_steps,
        'batches': num_batches,
        'seed': config.seed,
    }


def run_meaning(config: RunConfig, task: TrainingTask, data: Data, runtime: Runtime) -> dict[str, Any]:
    """What defines a run: if one of these changes, it is another run. Call it on all ranks.

    Returns:
        The architecture of the student, the kind of task, the class map (None if unknown), what is distilled, the
        teacher's name and the hashes of its weights (none for random weights), and the size of its images.
    """
    student, teacher = unwrap_model(task.get_eval_model()), getattr(task, 'teacher', None)
    teachers: Sequence[Teacher] = getattr(task, 'teachers', ())
    hashes = hashes_of(teachers)
    if isinstance(teacher, DistillationTeacher):
        hashes = fingerprint(unwrap_model(teacher.model), config.kd_distill_type != 'feature')
    target = config.pe_target if config.teacher else config.kd_distill_type if config.kd_model_name else None
    meaning = {
        'model': (getattr(student, 'pretrained_cfg', None) or {}).get('architecture', config.model),
        'task': config.task if config.has_labels else 'pretraining without labels',
        'classes': class_map_of(getattr(plain_loader(data.train), 'dataset', None)),
        'target': target,
        'teacher': config.teacher or config.kd_model_name,
        'teacher_weights': hashes,
    }
    if teachers:
        # not compared: flags and the student's size decide it. Checkpoints without are of runs that did not build it anew
        sizes = [t.size_for(torch.empty(1, *data.config['input_size'], device=t.scale.device)) for t in teachers]
        meaning['teacher_input'] = ', '.join('x'.join(map(str, size)) for size in sizes)
    return runtime.share(meaning)  # random weights of timm's own teacher differ between ranks


def hashes_of(teachers: Sequence[Teacher]) -> dict[str, Any]:
    """Hashes of a teacher's weights, of several those of each by number; empty for random weights, and without one."""
    if len(teachers) > 1:
        return {str(number): teacher.fingerprint for number, teacher in enumerate(teachers, 1)}
    return teachers[0].fingerprint if teachers else {}


def changed_teacher(run: RunState | None, teacher: Any, teachers: Sequence[Teacher]) -> str:
    """How the teachers differ from those that taught a run, in words; '' if they are the same, or it is not known.

    Args:
        run: The position in a checkpoint of the run.
        teacher: --teacher of the run.
        teachers: What was built of it now.
    """
    if run is None or 'teacher' not in run.meaning:
        return ''
    now = {**run.meaning, 'teacher': teacher, 'teacher_weights': hashes_of(teachers)}
    return changes_of_meaning(run.meaning, now).get('teacher', '')


def precisions_of(teachers: Sequence[Teacher]) -> str | list[str] | None:
    """`Teacher.precision` of a teacher, of several a list of theirs; None without one."""
    found = [teacher.precision for teacher in teachers]
    return found if len(found) > 1 else found[0] if found else None


def is_precision(value: Any) -> bool:
    """Whether a value from a file has the form of `Teacher.precision`."""
    return isinstance(value, str) and value.removeprefix('AMP ') in DTYPES


def _is_meaning(value: Any) -> bool:
    """Whether a value from a file has the form of `run_meaning`, or is empty."""
    kinds: dict[str, type | tuple[type, ...]] = {'classes': (dict, type(None)), 'teacher_weights': dict}
    names = {'model', 'task', 'target', 'teacher', *kinds}
    return value == {} or (
        isinstance(value, dict)
        and value.keys() - {'teacher_input'} == names
        and all(isinstance(value[n], k) for n, k in kinds.items())
        and isinstance(value.get('teacher_input', ''), str)
        and all(
            isinstance(h, dict if isinstance(value['teacher'], list) else str)
            for h in value['teacher_weights'].values()
        )
    )


def read_run_state(checkpoint: Mapping[str, Any], path: str) -> RunState | None:
    """The position in a checkpoint, read from `path`; None if it has none.

    Raises:
        UsageError: It is not what a `Saver` writes.
    """
    run = (checkpoint.get('saver') or {}).get('run')
    if run is None:
        return None
    names = {f.name for f in fields(RunState)}
    # what later commits added may be missing
    if not isinstance(run, dict) or not names - _ADDED <= set(run) <= names:
        raise UsageError(f"--resume: '{path}' is no training checkpoint: run is {reprlib.repr(run)}")
    state = RunState(**run)
    if not (isinstance(state.epoch, int) and isinstance(state.batch, int) and min(state.epoch, state.batch) >= 0):
        raise UsageError(
            f"--resume: '{path}' is no training checkpoint: batch {state.batch!r} of epoch {state.epoch!r}"
        )
    if not _is_meaning(state.meaning):
        raise UsageError(f"--resume: '{path}' is no training checkpoint: meaning is {reprlib.repr(state.meaning)}")
    if state.seconds is not None and not (isinstance(state.seconds, float) and 0 <= state.seconds < float('inf')):
        raise UsageError(f"--resume: '{path}' is no training checkpoint: it has trained for {state.seconds!r} seconds")
    if state.teacher_precision is not None and not all(map(is_precision, as_each(state.teacher_precision))):
        raise UsageError(
            f"--resume: '{path}' is no training checkpoint: the teacher's precision is {state.teacher_precision!r}"
        )
    return state


def peek_run_state(path: str | os.PathLike[str]) -> RunState | None:
    """The position in a checkpoint file; None if it has none, or cannot be read: loading it says so."""
    try:
        return read_run_state(load_checkpoint_metadata(str(path)), str(path))
    except Exception:  # whatever it may be by now
        return None


def changes_of_meaning(then: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, str]:
    """The parts of a run's meaning that changed, each described. Parts that one of the two lacks are not compared."""
    changes = {
        name: f'{name} {then[name]} then, {now[name]} now'
        for name in ('model', 'task', 'target')
        if name in then and then[name] != now[name]
    }
    other_class = describe_other_class(then.get('classes'), now['classes'])
    if other_class:
        changes['classes'] = other_class
    if 'teacher' in then and not _is_same_teacher(then, now):
        of = [' + '.join(f'{n or "none"}{_in_brackets(h.values())}' for n, h in _teachers(run)) for run in (then, now)]
        changes['teacher'] = f'teacher {of[0]} then, {of[1]} now'
    return changes


def _is_same_teacher(then: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Compare teachers one by one: by their weights, whatever their names; if the weights are random, by name."""
    pairs = list(zip(_teachers(then), _teachers(now), strict=False))
    same = all(
        all(hashes[part] == other[part] for part in hashes.keys() & other.keys())
        if hashes and other
        else bool(hashes) == bool(other) and name == other_name
        for (name, hashes), (other_name, other) in pairs
    )
    return same and len(pairs) == len(_teachers(then)) == len(_teachers(now))


def _teachers(meaning: Mapping[str, Any]) -> list[tuple[str | None, dict[str, str]]]:
    """Name and hashes of each teacher, also of a single one and of none."""
    names, hashes = meaning['teacher'], meaning['teacher_weights']
    if not isinstance(names, list):
        return [(names, hashes)]
    return [(name, hashes.get(str(number), {})) for number, name in enumerate(names, 1)]


def _in_brackets(words: Iterable[str]) -> str:
    text = ' '.join(words)
    return f' ({text})' if text else ''


def _random_states(device: torch.device) -> dict[str, Any]:
    numpy = np.random.get_state(legacy=False)
    key = numpy['state']['key'].astype(np.int64)
    states = {
        'python': random.getstate(),
        'numpy': {**numpy, 'state': {'key': torch.from_numpy(key), 'pos': numpy['state']['pos']}},
        'torch': torch.get_rng_state(),
    }
    if device.type == 'cuda':
        states['cuda'] = torch.cuda.get_rng_state(device)
    return states


def _set_random_states(states: Mapping[str, Any], device: torch.device) -> None:
    version, internal, gauss = states['python']
    random.setstate((version, tuple(internal), gauss))
    numpy = states['numpy']
    key = numpy['state']['key'].numpy().astype(np.uint32)
    np.random.set_state({**numpy, 'state': {'key': key, 'pos': numpy['state']['pos']}})
    torch.set_rng_state(states['torch'])
    if device.type == 'cuda' and 'cuda' in states:
        torch.cuda.set_rng_state(states['cuda'], device)


def _buffers(task: TrainingTask) -> dict[str, torch.Tensor]:
    """Running statistics of the trained module and its moving average, which differ between ranks within an epoch."""
    modules = {'module': task.get_trainable_module(), 'ema': task.get_trainable_module(ema=True)}
    return {
        f'{which}.{name}': buffer
        for which, module in modules.items()
        if module is not None
        for name, buffer in unwrap_model(module).named_buffers()
        if name.rpartition('.')[2] in _RUNNING
    }


def _generators(task: TrainingTask) -> dict[str, torch.Generator]:
    """The moving average's own generators: an average in bfloat16 is rounded at random."""
    average = task.get_trainable_module(ema=True)
    made = vars(average).items() if average is not None else ()
    return {f'{name} {value.device.type}': value for name, value in made if isinstance(value, torch.Generator)}


def take_rank_state(
    task: TrainingTask, runtime: Runtime, losses: Mapping[str, Any] | None = None
) -> list[dict[str, Any]]:
    """The state of each rank, gathered from all; call it on all ranks."""
    own = {'random': _random_states(runtime.device), 'losses': dict(losses or {})}
    own['generators'] = {name: generator.get_state() for name, generator in _generators(task).items()}
    if not runtime.distributed:
        return [own]
    own['buffers'] = {name: buffer.cpu() for name, buffer in _buffers(task).items()}
    return runtime.gather(own)


def check_rank_state(state: RunState, task: TrainingTask, runtime: Runtime) -> None:
    """Refuse random states that cannot be put back, before anything is written.

    Raises:
        UsageError: They are not what `take_rank_state` gives.
    """
    try:
        if len(state.ranks) == runtime.world_size:
            own = state.ranks[runtime.rank]
            with kept_rng():
                _set_random_states(own['random'], torch.device('cpu'))
            for name, generator in _generators(task).items():
                if name in own.get('generators', {}):
                    torch.Generator(generator.device).set_state(own['generators'][name])
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, RuntimeError) as e:
        raise UsageError(f'--resume: the random states in the checkpoint do not fit: {one_line(e)}') from e


def restore_rank_state(state: RunState, task: TrainingTask, runtime: Runtime) -> Mapping[str, Any]:
    """Restore the random states and buffers of this rank.

    Returns:
        Its sums of losses.
    """
    if len(state.ranks) != runtime.world_size:
        _logger.warning(
            f'The checkpoint is of {len(state.ranks)} ranks, these are {runtime.world_size}: random states start anew.'
        )
        return {}
    own = state.ranks[runtime.rank]
    buffers = _buffers(task)
    with torch.no_grad():
        for name, value in own.get('buffers', {}).items():
            if name in buffers:  # the moving average may be new
                buffers[name].copy_(value)
    _set_random_states(own['random'], runtime.device)
    for name, generator in _generators(task).items():
        if name in own.get('generators', {}):  # the average may be new, or elsewhere than it was
            generator.set_state(own['generators'][name])
    return own['losses']


def is_plateau(scheduler: Any) -> bool:
    """Whether a schedule is timm's plateau one, which timm has deprecated: by its name, as an import may fail one day."""
    return type(scheduler).__name__ == 'PlateauLRScheduler'


def take_schedule(scheduler: Any) -> dict[str, Any]:
    """State of a plateau schedule; the values of any other are a function of the epoch or the update."""
    if not is_plateau(scheduler):
        return {}
    return {
        'plateau': scheduler.lr_scheduler.state_dict(),
        'restore_lr': scheduler.restore_lr,
        'lr': [group['lr'] for group in scheduler.optimizer.param_groups],
    }


def restore_schedule(scheduler: Any, schedule: Mapping[str, Any]) -> None:
    """Put back what `take_schedule` took."""
    if not schedule or not is_plateau(scheduler):
        return
    scheduler.lr_scheduler.load_state_dict(schedule['plateau'])
    scheduler.restore_lr = schedule['restore_lr']
    for group, lr in zip(scheduler.optimizer.param_groups, schedule['lr'], strict=True):
        group['lr'] = lr
