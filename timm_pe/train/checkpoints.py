"""Checkpoints in timm's format, and the student as safetensors. Files are written beside, then renamed."""

import argparse
import contextlib
import logging
import math
import os
import reprlib
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn as nn
from safetensors.torch import save_file
from timm.layers import SplitBatchNorm2d
from timm.models import clean_state_dict
from timm.task import TrainingTask, load_task_ema_checkpoint, resume_task_checkpoint
from timm.utils import CheckpointSaver, load_checkpoint_metadata, unwrap_model

from ..config.flags import OptimizerFlags, RunFlags
from ..config.run_config import RunConfig
from ..config.teachers import as_each
from ..errors import UsageError, one_line
from ..method.weight_files import LAST, check_state_dict, check_weights, find_checkpoint, why_unreadable
from ..process.files import replaced, sync_file
from ..process.runtime import Runtime
from ..run_folder import DEFAULT_OUTPUT, RunFolder
from .position import RunState, changes_of_meaning, is_precision, peek_run_state, read_run_state

_logger = logging.getLogger(__name__)

# entries of a training checkpoint, by their kind
_ENTRIES = {
    ('optimizer', 'task_state', 'state_dict_ema', 'task_state_ema', 'saver'): dict,
    ('epoch', 'version'): int,
}
# what projectors map to: if it changes, they start new
_NEW_PROJECTORS = {'target', 'teacher'}


class Saver(CheckpointSaver):
    """timm's saver whose files appear whole or not at all, and which keeps the best student as safetensors.

    Args:
        folder: The run's folder.
        task: The task.
        optimizer: Its optimizer.
        config: Run settings, stored in the checkpoints as timm stores them.
        scaler: AMP loss scaler or None.
        decreasing: Whether a lower metric is better.
        evaluated_model: Gives the module whose weights were evaluated (the EMA's if on).

    Attributes:
        run: The run's position, stored in the checkpoints.
    """

    def __init__(
        self,
        folder: RunFolder,
        task: TrainingTask,
        optimizer: torch.optim.Optimizer,
        config: RunConfig,
        scaler: object,
        decreasing: bool,
        evaluated_model: Callable[[], nn.Module],
    ):
        super().__init__(
            model=task.get_eval_model(),
            optimizer=optimizer,
            args=config.as_namespace(),
            amp_scaler=scaler,
            task=task,
            checkpoint_dir=str(folder.path),
            recovery_dir=str(folder.path),
            decreasing=decreasing,
            max_history=config.checkpoint_hist,
        )
        self.folder = folder
        self.evaluated_model = evaluated_model
        self.run: RunState | None = None
        self._last_is_there = False

    def _save(self, save_path: str, epoch: int, metric: float | None = None) -> None:
        if self._last_is_there:
            return
        try:
            super()._save(save_path, epoch, metric)
            sync_file(save_path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(save_path)
            raise

    def _replace(self, src: str, dst: str) -> None:
        if not self._last_is_there:
            os.replace(src, dst)

    def _duplicate(self, src: str, dst: str) -> None:
        if os.path.exists(dst) and os.path.samefile(src, dst):
            return  # renaming one name of a file to another does nothing
        beside = dst + '.tmp'
        if os.path.exists(beside):
            os.unlink(beside)
        try:
            os.link(src, beside)
        except (OSError, NotImplementedError):
            shutil.copy2(src, beside)
        os.replace(beside, dst)

    def state_dict(self, epoch: int | None = None, metric: float | None = None) -> dict[str, Any]:
        """timm's state, and the run's position."""
        return {**super().state_dict(epoch, metric), 'run': vars(self.run) if self.run else None}

    def save_checkpoint(self, epoch: int, metric: float | None = None) -> tuple[float | None, int | None]:
        """Save `last`, `checkpoint-N` and, if it is the best so far, `model_best` and `student.safetensors`."""
        best_before = self.best_metric
        best_metric, best_epoch = super().save_checkpoint(epoch, metric)
        # without any metric the student is the newest; a fresh run replaces that of an old one
        due = self.best_metric != best_before or self.best_metric is None or not self.folder.student_file.exists()
        if due and not (self._last_is_there and self._student_is_newer()):
            save_student(self.evaluated_model(), self.folder.student_file)
        for path in self.folder.recovery_files():  # `last` is newer now
            path.unlink()
        return best_metric, best_epoch

    def _student_is_newer(self) -> bool:
        """Whether the student is newer than `last`, after which it is written."""
        student, last = self.folder.student_file, self.folder.last_file
        return student.exists() and student.stat().st_mtime_ns > last.stat().st_mtime_ns

    def continue_from(self, path: str, metrics: Mapping[int, float] | None = None) -> bool:
        """Continue the history of a folder from one of its checkpoints, whose weights are loaded.

        Args:
            path: The checkpoint.
            metrics: Metric of each epoch so far, to rank the history anew if it was ranked by another one.

        Returns:
            Whether the checkpoint is the `last` one, of a whole epoch.
        """
        checkpoint = load_checkpoint_metadata(path)
        saved = checkpoint.get('saver') or {}
        is_last = os.path.basename(path) == LAST and _is_of_whole_epoch(checkpoint, path)
        epoch, metric = saved.get('pending', (None, None))
        self.load_state_dict({**saved, 'pending': (None, None)} if is_last else saved)
        if metrics is not None:
            self._rank_anew(checkpoint['epoch'], metrics)
            metric = metrics.get(epoch)
        # clean up the recovery files of the earlier process
        for other in self.folder.recovery_files():
            if not os.path.samefile(other, path):
                other.unlink()
            else:
                self.curr_recovery_file = str(other)
        if is_last and epoch is not None:
            # repeat what follows the writing of `last`: a kill may have interrupted it
            self._last_is_there = True
            self.save_checkpoint(epoch, metric)
            self._last_is_there = False
        if metrics is None and best_epoch(self.folder) not in (None, self.best_epoch):
            self._restore_best()  # model_best is of later epochs that are discarded, or by another metric
        return is_last

    def _rank_anew(self, last: int, metrics: Mapping[int, float]) -> None:
        kept, self.checkpoint_files = [path for path, _ in self.checkpoint_files], []
        self.best_metric = self.best_epoch = None
        for epoch in range(last + 1):
            path = self._checkpoint_path(epoch)
            if path in kept:
                self._track_checkpoint(path, epoch, metrics.get(epoch), update_best_file=False)
        self._restore_best()

    def _restore_best(self) -> None:
        """Set model_best and the student to the best epoch, if its checkpoint is kept."""
        path = self._checkpoint_path(self.best_epoch)
        if not os.path.exists(path):
            return
        self._duplicate(path, str(self.folder.best_file))
        model = self.evaluated_model()
        averaged = model is self.task.get_eval_model(ema=True)
        checkpoint = load_checkpoint_metadata(path)
        # an average that was switched on at this resume is not in it
        state_dict = (checkpoint.get('state_dict_ema') if averaged else None) or checkpoint['state_dict']
        _save_weights(model, state_dict, self.folder.student_file)
        at = os.stat(path).st_mtime_ns
        os.utime(self.folder.student_file, ns=(at, at))  # as old as its weights: see `_student_is_newer`


def save_student(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write the weights of a student as safetensors that `timm.create_model(name, checkpoint_path=...)` loads."""
    _save_weights(model, unwrap_model(model).state_dict(), path)


def _save_weights(model: nn.Module, state_dict: Mapping[str, torch.Tensor], path: str | os.PathLike[str]) -> None:
    """Write a model's weights; of split batch norms only the main ones, which have plain names and are evaluated."""
    norms = (name for name, module in unwrap_model(model).named_modules() if isinstance(module, SplitBatchNorm2d))
    auxiliary = tuple(f'{name}.aux_bn.' for name in norms)
    kept = {k: v for k, v in state_dict.items() if not k.startswith(auxiliary)}
    tensors = {k: v.detach().cpu().contiguous().clone() for k, v in kept.items()}
    with replaced(path) as beside:
        with open(beside, 'wb'):
            pass
        mode = os.stat(beside).st_mode
        save_file(tensors, beside, metadata={'format': 'pt'})
        os.chmod(beside, mode)  # the usual mode: safetensors makes its file readable by the owner only


def best_epoch(folder: RunFolder) -> int | None:
    """The epoch of a run folder's model_best, whose weights the student has; None if it has no such file."""
    try:
        return load_checkpoint_metadata(str(folder.best_file)).get('epoch')
    except Exception:  # gone, or whatever it may be by now
        return None


def saved_ranks(folder: RunFolder) -> int | None:
    """Number of ranks that trained a run's newest epoch; None if it has no checkpoint that says it."""
    state = peek_run_state(folder.last_file)
    return state.settings.get('ranks') if state else None


def saved_args(path: str) -> dict[str, Any]:
    """The settings that a training checkpoint was saved with, empty if there are none, or none that can be read."""
    try:
        args = load_checkpoint_metadata(path).get('args') if path else None
    except Exception:  # whatever it may be: loading it says so
        return {}
    return vars(args) if isinstance(args, argparse.Namespace) else {}


def saved_precisions(path: str, number: int, meaning: Mapping[str, Any] | None = None) -> list[str | None]:
    """The precision of each teacher (see `Teacher.precision`) that the projectors of a training checkpoint were trained with.

    Args:
        path: The checkpoint, '' for none.
        number: Number of teachers.
        meaning: That of the run that goes on with it (see `run_meaning`); None if it is the same run.

    Returns:
        None for each if that run goes on without the projectors of the checkpoint.
    """
    checkpoint = load_checkpoint_metadata(path) if path else {}
    run = read_run_state(checkpoint, path)
    changed = changes_of_meaning(run.meaning, meaning) if run and meaning is not None else {}
    if not checkpoint.get('task_state') or changed.keys() & _NEW_PROJECTORS:
        return [None] * number
    if run and run.teacher_precision:
        saved = as_each(run.teacher_precision)
        return saved if len(saved) == number else [None] * number
    then = saved_args(path)  # of a commit before --teacher-dtype auto, or without our teacher
    found = [then.get('teacher_dtype'), f'AMP {then.get("amp_dtype")}' if then.get('amp') else None, 'float32']
    return [next(filter(is_precision, found))] * number


def keeps_teacher_size(path: str) -> bool:
    """Whether a checkpoint is of a run that left a teacher at its own input size, as all did once; False without one."""
    run = peek_run_state(path) if path else None
    return run is not None and bool(run.meaning.get('teacher')) and 'teacher_input' not in run.meaning


def named_folder(flags: RunFlags) -> str:
    """The folder of --experiment, '' without a name."""
    return os.path.join(flags.output or DEFAULT_OUTPUT, flags.experiment) if flags.experiment else ''


def continued_folder(config: RunConfig) -> str:
    """The run folder that --resume names, where a run without a name goes on if its checkpoint can be continued; else ''.

    With a fresh optimizer, from another epoch on, or with another --output, it is another run.
    """
    if config.experiment or config.no_resume_opt or config.start_epoch is not None or not os.path.isdir(config.resume):
        return ''
    folder = os.path.abspath(config.resume)
    is_here = not config.output or os.path.realpath(config.output) == os.path.realpath(os.path.dirname(folder))
    return folder if is_here else ''


def find_resume(flags: RunFlags) -> str:
    """The training checkpoint that --resume means.

    A file, or the newest complete checkpoint of a run folder. 'auto' is that of the experiment's own folder, or '' if
    there is none yet.

    Raises:
        UsageError: No such checkpoint.
    """
    if not flags.resume:
        return ''
    auto = flags.resume == 'auto'
    if not auto and not os.path.isdir(flags.resume):
        return str(find_checkpoint(flags.resume, '--resume'))
    folder = RunFolder(named_folder(flags) if auto else flags.resume)
    paths = folder.resumable()
    if not auto:
        if not paths:
            find_checkpoint(flags.resume, '--resume', (LAST,))  # raises
        # by what they hold: the times of files that were copied say nothing
        paths.sort(key=lambda path: _position(path, folder.last_file), reverse=True)
    for path in paths:
        try:
            _read(str(path))
        except UsageError as e:
            if path == paths[-1] and not auto:
                raise
            _logger.warning(f'{e}: trying the one before.')
            continue
        return str(path)
    _logger.info(f"--resume auto: no checkpoint in '{folder.path}' yet, a fresh run.")
    return ''


def _position(path: Path, last: Path) -> tuple[float, float, bool, bool]:
    """A key that sorts the checkpoints of a run by how far they are; those that cannot be read come out as the latest."""
    try:
        checkpoint = load_checkpoint_metadata(str(path))
        run = read_run_state(checkpoint, str(path))
    except Exception:  # whatever it may be: reading it says so
        return math.inf, math.inf, True, path == last
    epoch, batch = (run.epoch, run.batch) if run else (checkpoint.get('epoch') or 0, math.inf)
    return epoch, batch, run is None or run.validated, path == last


def resume(
    config: RunConfig,
    path: str,
    task: TrainingTask,
    optimizer: torch.optim.Optimizer,
    runtime: Runtime,
    meaning: Mapping[str, Any],
) -> tuple[int | None, RunState | None]:
    """Continue from `--resume`: weights, projectors, optimizer, scaler; with --no-resume-opt a fresh optimizer.

    With --no-resume-opt the run's meaning may differ (see `run_meaning`); with another teacher or target its projectors
    start new.

    Returns:
        The epoch to start with, None if the checkpoint names none; and the run's exact position, None if the checkpoint
        is not of train_distill or the optimizer is fresh.

    Raises:
        UsageError: No such checkpoint, unreadable, or of another model, class map, teacher, optimizer or projectors.
    """
    checkpoint = _read(path)
    run = read_run_state(checkpoint, path)
    changes = changes_of_meaning(run.meaning, meaning) if run else {}
    if changes:
        said = f"--resume: '{path}' is of another run ({'; '.join(changes.values())})"
        if not config.no_resume_opt:
            raise UsageError(
                f'{said}: give it the same, or add --no-resume-opt --start-epoch 0 to start a new run on its student'
            )
        _logger.warning(f'{said}{": its projectors start new" if changes.keys() & _NEW_PROJECTORS else ""}.')
    if not config.no_resume_opt:
        _check_optimizer(config, checkpoint, path)
    check_weights(unwrap_model(task.get_eval_model()), clean_state_dict(_weights(checkpoint)), '--resume', path)
    has_projectors = bool(checkpoint.get('task_state'))
    if hasattr(task, 'projection') and not has_projectors:
        if not config.no_resume_opt:
            raise UsageError(
                f"--resume: '{path}' holds no projectors, its optimizer knows none either: add --no-resume-opt to start "
                f'new ones on its student'
            )
        _logger.info(f"'{path}' holds no projectors: they start new.")
    try:
        if changes.keys() & _NEW_PROJECTORS:
            task.load_checkpoint_state(clean_state_dict(_weights(checkpoint)), None)
            epoch = checkpoint['epoch'] + 1
        else:
            epoch = resume_task_checkpoint(
                task,
                path,
                optimizer=None if config.no_resume_opt else optimizer,
                loss_scaler=None if config.no_resume_opt else runtime.scaler,
            )
    except UsageError as e:
        raise UsageError(
            f"--resume '{path}': {e}; for a new run on the student's weights alone give --initial-checkpoint in place of --resume"
        ) from e
    except Exception as e:  # timm and torch trip in many ways over an optimizer or projectors of another run
        raise UsageError(f"--resume: '{path}' does not fit this run: {one_line(e)}") from e
    if epoch is not None and not _is_of_whole_epoch(checkpoint, path):
        epoch -= 1  # saved within that epoch
    return epoch, None if config.no_resume_opt else run


def _is_of_whole_epoch(checkpoint: dict[str, Any], path: str) -> bool:
    """Whether a checkpoint was saved after its epoch, not within it; if it does not say so, by its file name."""
    run = (checkpoint.get('saver') or {}).get('run')
    return bool(run['validated']) if run else not os.path.basename(path).startswith('recovery-')


def _check_optimizer(flags: OptimizerFlags, checkpoint: dict[str, Any], path: str) -> None:
    trained_with = str(getattr(checkpoint.get('args'), 'opt', flags.opt))
    if trained_with.lower() != flags.opt.lower():
        raise UsageError(
            f"--resume: '{path}' was trained with --opt {trained_with}, this run has --opt {flags.opt}: use the same, or "
            f'--no-resume-opt for a fresh optimizer'
        )


def resume_ema(path: str, task: TrainingTask, meaning: Mapping[str, Any]) -> None:
    """Load the moving average from `--resume`; a checkpoint without one starts it at its weights."""
    checkpoint = load_checkpoint_metadata(path)
    run = read_run_state(checkpoint, path)
    try:
        if run and changes_of_meaning(run.meaning, meaning).keys() & _NEW_PROJECTORS:
            weights = checkpoint.get('state_dict_ema') or _weights(checkpoint)
            task.load_checkpoint_state(clean_state_dict(weights), None, ema=True)
        else:
            load_task_ema_checkpoint(task, path)
    except Exception as e:
        raise UsageError(f"--resume: the moving average in '{path}' does not fit: {one_line(e)}") from e


def _read(path: str) -> dict[str, Any]:
    """A checked training checkpoint, its tensors not read yet."""
    find_checkpoint(path, '--resume')
    try:
        checkpoint = load_checkpoint_metadata(path)
    except Exception as e:
        if 'mmap can only be used' in str(e):
            raise UsageError(
                f"--resume: '{path}' is in the format before torch 1.6 and is not loaded: load and save it anew"
            ) from e
        raise UsageError(f'--resume: {why_unreadable(path, e)}') from e
    if not isinstance(checkpoint, dict) or not ('state_dict' in checkpoint or 'model' in checkpoint):
        raise UsageError(f"--resume: '{path}' is no training checkpoint ({LAST}, checkpoint-N.pth.tar)")
    check_state_dict(_weights(checkpoint), '--resume', path)
    for names, kind in _ENTRIES.items():
        for name in names:
            value = checkpoint.get(name)
            if value is not None and (not isinstance(value, kind) or (kind is int and cast(int, value) < 0)):
                raise UsageError(f"--resume: '{path}' is no training checkpoint: {name} is {reprlib.repr(value)}")
    return checkpoint


def _weights(checkpoint: dict[str, Any]) -> dict[str, torch.Tensor]:
    return checkpoint['state_dict' if 'state_dict' in checkpoint else 'model']
