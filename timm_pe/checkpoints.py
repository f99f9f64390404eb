"""Checkpoints in timm's format, and the student as safetensors. Every file is written beside and moved into place."""

import argparse
import glob
import logging
import os
import reprlib
import shutil
from collections.abc import Callable

import torch
import torch.nn as nn
from safetensors.torch import save_file
from timm.models import clean_state_dict
from timm.task import TrainingTask, load_task_ema_checkpoint, resume_task_checkpoint
from timm.utils import CheckpointSaver, load_checkpoint_metadata, unwrap_model

from .errors import UsageError, one_line
from .loading import check_state_dict, check_weights, find_checkpoint, why_unreadable
from .runtime import Runtime

_logger = logging.getLogger(__name__)

# entries of a training checkpoint, by their kind
_ENTRIES = {
    ('optimizer', 'task_state', 'state_dict_ema', 'task_state_ema', 'saver'): dict,
    ('epoch', 'version'): int,
}


class Saver(CheckpointSaver):
    """timm's saver whose files appear whole or not at all, and which keeps the best student as safetensors.

    Args:
        folder: The run's folder.
        task: The task.
        optimizer: Its optimizer.
        args: Run arguments, stored in the checkpoints.
        scaler: AMP loss scaler or None.
        decreasing: A lower metric is better.
        evaluated_model: Gives the module whose weights were evaluated (the EMA's if on).
    """

    def __init__(
        self,
        folder: str,
        task: TrainingTask,
        optimizer: torch.optim.Optimizer,
        args: argparse.Namespace,
        scaler: object,
        decreasing: bool,
        evaluated_model: Callable[[], nn.Module],
    ):
        super().__init__(
            model=task.get_eval_model(),
            optimizer=optimizer,
            args=args,
            amp_scaler=scaler,
            task=task,
            checkpoint_dir=folder,
            recovery_dir=folder,
            decreasing=decreasing,
            max_history=args.checkpoint_hist,
        )
        self.evaluated_model = evaluated_model
        self.has_student = False

    def _replace(self, src: str, dst: str) -> None:
        os.replace(src, dst)

    def _duplicate(self, src: str, dst: str) -> None:
        beside = dst + '.tmp'
        if os.path.exists(beside):
            os.unlink(beside)
        try:
            os.link(src, beside)
        except (OSError, NotImplementedError):
            shutil.copy2(src, beside)
        os.replace(beside, dst)

    def save_checkpoint(self, epoch: int, metric: float | None = None) -> tuple[float | None, int | None]:
        """Save `last`, `checkpoint-N` and, where it is the best so far, `model_best` and `student.safetensors`."""
        best_before = self.best_metric
        best_metric, best_epoch = super().save_checkpoint(epoch, metric)
        if self.best_metric != best_before or not self.has_student:
            save_student(self.evaluated_model(), os.path.join(self.checkpoint_dir, 'student.safetensors'))
            self.has_student = True
        return best_metric, best_epoch

    def load_state_dict(self, state_dict: dict) -> None:
        """Continue a folder's history; its best student is there already."""
        super().load_state_dict(state_dict)
        self.has_student = os.path.exists(os.path.join(self.checkpoint_dir, 'student.safetensors'))
        # those of the process before us are ours to clean: keep the newest, as an undisturbed run would
        *older, self.curr_recovery_file = sorted(recovery_files(self.recovery_dir), key=os.path.getmtime) or ['']
        for path in older:
            os.unlink(path)


def save_student(model: nn.Module, path: str) -> None:
    """Write the weights of a student as safetensors that `timm.create_model(name, checkpoint_path=...)` loads."""
    tensors = {k: v.detach().cpu().contiguous().clone() for k, v in unwrap_model(model).state_dict().items()}
    save_file(tensors, path + '.tmp', metadata={'format': 'pt'})
    os.replace(path + '.tmp', path)


def recovery_files(folder: str) -> list[str]:
    """Paths of the recovery checkpoints in a run folder."""
    return glob.glob(os.path.join(glob.escape(folder), 'recovery-*.pth.tar'))


def resolve_resume(args: argparse.Namespace) -> str:
    """The training checkpoint that --resume means.

    A path, or the `last` of a run folder. 'auto' is the newest complete checkpoint of the experiment's own folder, `last`
    or `recovery`, and '' where there is none yet.

    Raises:
        UsageError: No such checkpoint.
    """
    if args.resume != 'auto':
        return find_resume(args) if args.resume else ''
    folder = os.path.join(args.output or os.path.join('output', 'train'), args.experiment)
    files = [os.path.join(folder, 'last.pth.tar'), *recovery_files(folder)]
    for path in sorted(filter(os.path.isfile, files), key=os.path.getmtime, reverse=True):
        try:
            _read(path)
        except UsageError as e:
            _logger.warning(f'{e}: trying the one before.')
            continue
        return path
    _logger.info(f"--resume auto: no checkpoint in '{folder}' yet, a fresh run.")
    return ''


def find_resume(args: argparse.Namespace) -> str:
    """The training checkpoint that --resume names: a file, or the `last` one of a run folder."""
    return str(find_checkpoint(args.resume, '--resume', ('last.pth.tar',)))


def resume(
    args: argparse.Namespace, task: TrainingTask, optimizer: torch.optim.Optimizer, runtime: Runtime
) -> int | None:
    """Continue from `--resume`: weights, projectors, optimizer, scaler; with --no-resume-opt a fresh optimizer.

    Returns:
        The epoch to start with, None where the checkpoint names none.

    Raises:
        UsageError: No such checkpoint, unreadable, or of another model, optimizer or projectors.
    """
    path = args.resume
    checkpoint = _read(path)
    if not args.no_resume_opt:
        _check_optimizer(args, checkpoint, path)
    check_weights(unwrap_model(task.get_eval_model()), clean_state_dict(_weights(checkpoint)), '--resume', path)
    has_projectors = bool(checkpoint.get('task_state'))
    if hasattr(task, 'projection') and not has_projectors:
        if not args.no_resume_opt:
            raise UsageError(
                f"--resume: '{path}' holds no projectors, its optimizer knows none either: add --no-resume-opt to start "
                f'new ones on its student'
            )
        _logger.info(f"'{path}' holds no projectors: they start new.")
    try:
        epoch = resume_task_checkpoint(
            task,
            path,
            optimizer=None if args.no_resume_opt else optimizer,
            loss_scaler=None if args.no_resume_opt else runtime.scaler,
        )
    except UsageError as e:
        raise UsageError(f"--resume '{path}': {e}") from e
    except Exception as e:  # timm and torch trip in many ways over an optimizer or projectors of another run
        raise UsageError(f"--resume: '{path}' does not fit this run: {one_line(e)}") from e
    if epoch is not None and os.path.basename(path).startswith('recovery-'):
        epoch -= 1  # saved in the middle of that epoch: it is trained again
    return epoch


def _check_optimizer(args: argparse.Namespace, checkpoint: dict, path: str) -> None:
    trained_with = str(getattr(checkpoint.get('args'), 'opt', args.opt))
    if trained_with.lower() != args.opt.lower():
        raise UsageError(
            f"--resume: '{path}' was trained with --opt {trained_with}, this run has --opt {args.opt}: use the same, or "
            f'--no-resume-opt for a fresh optimizer'
        )


def resume_ema(args: argparse.Namespace, task: TrainingTask) -> None:
    """Load the moving average from `--resume`; a checkpoint without one starts it at its weights."""
    try:
        load_task_ema_checkpoint(task, args.resume)
    except Exception as e:
        raise UsageError(f"--resume: the moving average in '{args.resume}' does not fit: {one_line(e)}") from e


def _read(path: str) -> dict:
    """A training checkpoint that has what one has, its tensors not read yet."""
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
        raise UsageError(f"--resume: '{path}' is no training checkpoint (last.pth.tar, checkpoint-N.pth.tar)")
    check_state_dict(_weights(checkpoint), '--resume', path)
    for names, kind in _ENTRIES.items():
        for name in names:
            value = checkpoint.get(name)
            if value is not None and (not isinstance(value, kind) or (kind is int and value < 0)):
                raise UsageError(f"--resume: '{path}' is no training checkpoint: {name} is {reprlib.repr(value)}")
    return checkpoint


def _weights(checkpoint: dict) -> dict[str, torch.Tensor]:
    return checkpoint['state_dict' if 'state_dict' in checkpoint else 'model']
