"""The settings of a resumed run: those that its checkpoint decides, those that may change, and what is said about them."""

import logging
import reprlib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.nn as nn
from timm.data.model_config import resolve_input_data_config

from ..config.declare import name_of, neutral_in
from ..config.run_config import RunConfig
from ..errors import UsageError

_logger = logging.getLogger(__name__)

# flags that a resumed optimizer decides
_RATE = ('lr', 'lr_base', 'lr_base_size', 'lr_base_scale', 'weight_decay')
_STEP = ('momentum', 'opt_betas', 'opt_eps', 'opt_kwargs', 'layer_decay', 'layer_decay_min_scale', 'layer_decay_no_opt_scale')  # fmt: skip
# flags that are not compared, as they change nothing that is learnt or their changes are reported elsewhere
_NOT_COMPARED = {
    *neutral_in(RunConfig),
    *('start_epoch', 'stop_epoch', 'data', 'data_dir', 'unlabeled', 'opt'),
    *('teacher_checkpoint', 'teacher_pretrained', 'teacher_eval', 'teacher_cache'),
    *('pretrained', 'pretrained_path', 'initial_checkpoint', 'head_init_scale', 'head_init_bias'),
    *(_RATE + _STEP),
}
# those that say how a student is built
_BUILT = ('model_kwargs', 'pretrained_cfg_overlay', 'in_chans', 'gp', 'bn_eps', 'input_img_mode')


def with_kept_settings(given: RunConfig, saved: Mapping[str, Any]) -> RunConfig:
    """The settings of a run that goes on with the optimizer of a checkpoint: what that decides is as it was then.

    Args:
        given: The settings of the command line.
        saved: Those of the checkpoint.
    """
    if str(saved.get('opt')).lower() != given.opt.lower():  # refused when it is loaded
        return given
    kept: dict[str, Any] = {name: saved[name] for name in _RATE + _STEP if name in saved}
    return replace(given, **kept)


def resumed_rates(
    given: RunConfig, saved: Mapping[str, Any], lr: float, optimizer: torch.optim.Optimizer
) -> tuple[float, float]:
    """Learning rate and weight decay of a resumed optimizer; warns of flags that differ.

    Args:
        given: The settings of the command line.
        saved: Those of the checkpoint.
        lr: The learning rate that the command line asks for.
        optimizer: That of the checkpoint.
    """
    differences = describe_differences(given, saved)
    if differences:
        _logger.warning(f'--resume: flags that differ from those of the checkpoint: {differences}.')
    first = optimizer.param_groups[0]
    resumed_lr = first.get('initial_lr', first['lr'])
    resumed_decay = max(group.get('weight_decay', given.weight_decay) for group in optimizer.param_groups)
    kept: list[tuple[str, Any, Any]] = [('lr', resumed_lr, lr), ('weight decay', resumed_decay, given.weight_decay)]
    kept += [(name_of(name), saved[name], getattr(given, name)) for name in _STEP if name in saved]
    for name, then, now in kept:
        if _plain(then) != _plain(now):
            _logger.warning(
                f'--resume continues with {name} {_number(then)} of the checkpoint, not with {_number(now)}: '
                f'--no-resume-opt starts a fresh optimizer.'
            )
    return resumed_lr, resumed_decay


def _number(value: Any) -> str:
    return f'{value:.4g}' if isinstance(value, float) else str(value)


def _plain(value: Any) -> Any:
    """A setting as YAML gives it: a checkpoint may have a tuple where args.yaml has a list."""
    if isinstance(value, dict):
        return {key: _plain(of_key) for key, of_key in value.items()}
    return [_plain(part) for part in value] if isinstance(value, (list, tuple)) else value


def check_same_student(config: RunConfig, saved: Mapping[str, Any], path: str, student: nn.Module) -> None:
    """Refuse to go on in a run's folder with a student that is built or fed otherwise: args.yaml says it for the best one.

    Args:
        config: The settings of the run.
        saved: Those of its checkpoint.
        path: The checkpoint.
        student: The student of now, before it is scripted or wrapped.

    Raises:
        UsageError: The message has the first difference.
    """
    now = config.as_dict()
    pairs: list[tuple[str, Any, Any]] = [(name_of(name), saved[name], now[name]) for name in _BUILT if name in saved]
    fed = resolve_input_data_config(student, args=now)
    try:
        fed_then = resolve_input_data_config(student, args={**now, **saved})
    except ValueError:  # the student is built for the size of now
        fed_then = {**fed, 'input_size': saved.get('input_size') or saved.get('img_size')}
    pairs += [(name.replace('_', ' '), fed_then[name], fed[name]) for name in fed]
    for name, then, of_now in pairs:
        if _plain(then) != _plain(of_now):
            raise UsageError(
                f"--resume: '{path}' had {name} {then}, this run has {of_now}, and the weights of the best epoch are for that of "
                f'then: give the same, or go on in another folder: --resume {path} --experiment NAME'
            )


def describe_differences(config: RunConfig, saved: Mapping[str, Any]) -> str:
    """The flags that differ from those of a checkpoint, as far as they affect training."""
    now = config.as_dict()
    if saved.get('teacher_dtype', '') is None:  # of a commit before 'auto', which takes what that run had
        saved = {**saved, 'teacher_dtype': 'auto'}
    # the kNN changes nothing that is learnt, but it may choose the best epoch
    left_out = _NOT_COMPARED - {'knn_data'} if config.eval_metric == 'knn' else _NOT_COMPARED
    compared = saved.keys() & now.keys() - left_out
    names = sorted(name for name in compared if _plain(saved[name]) != _plain(now[name]))
    said = [f'{name_of(name)} {reprlib.repr(saved[name])} then and {reprlib.repr(now[name])} now' for name in names]
    # folders may have moved, and other images are reported elsewhere; whether there are some changes what is trained on
    there = {name: (bool(saved.get(name)), bool(now[name])) for name in ('unlabeled', 'teacher_cache')}
    said += [f'no {name_of(name)} {"now" if a else "then"}' for name, (a, b) in there.items() if a != b]
    return ', '.join(said)
