"""The settings of a resumed run: those that its checkpoint decides, those that may change, and what is said about them."""

import logging
import reprlib
from dataclasses import replace
from typing import Any

import torch

from ..config.declare import name_of
from ..config.run_config import RunConfig
from ..errors import UsageError
from .checkpoints import saved_args
from .from_run import OF_ITS_STUDENT

_logger = logging.getLogger(__name__)

# flags that are in the groups of a resumed optimizer, and nowhere said by it
_KEPT = ('layer_decay', 'layer_decay_min_scale', 'layer_decay_no_opt_scale', 'opt_kwargs')
# all flags that a resumed optimizer decides
_OF_THE_OPTIMIZER = (*_KEPT, 'lr', 'lr_base', 'lr_base_size', 'lr_base_scale', 'weight_decay', 'momentum', 'opt_betas', 'opt_eps')  # fmt: skip
# flags about where and how a run is executed, or whose changes are reported elsewhere
_NOT_COMPARED = {
    *('config', 'resume', 'resume_auto', 'no_resume_opt', 'start_epoch', 'stop_epoch', 'output', 'experiment'),
    *('data', 'data_dir', 'unlabeled', 'knn_data', 'dataset_download', 'dataset_trust_remote_code'),
    *('teacher_checkpoint', 'teacher_pretrained'),
    *('pretrained', 'pretrained_path', 'initial_checkpoint', 'head_init_scale', 'head_init_bias', 'teacher_eval'),
    *('device', 'device_modules', 'local_rank', 'synchronize_step', 'no_ddp_bb', 'workers', 'pin_mem'),
    *('use_multi_epochs_loader', 'persistent_workers', 'log_interval', 'log_tb', 'log_trackio', 'log_wandb'),
    *('wandb_project', 'wandb_tags', 'wandb_resume_id', 'save_images', 'recovery_interval', 'save_epochs', 'overwrite'),
    *('checkpoint_hist', 'teacher_cache', 'evaluate', 'lr', 'weight_decay', 'opt', 'eval_metric'),
    *_KEPT,
}
# optimizer settings, besides learning rate and weight decay, that a resume takes from the checkpoint
_OF_A_STEP = ('momentum', 'dampening', 'nesterov', 'betas', 'eps', 'alpha', 'amsgrad', 'centered')


def resumed_rates(config: RunConfig, path: str, lr: float, optimizer: torch.optim.Optimizer) -> tuple[float, float]:
    """Learning rate and weight decay of a resumed optimizer, from its checkpoint; warns of flags that differ."""
    differences = describe_differences(config, path)
    if differences:
        _logger.warning(f'--resume: flags that differ from those of the checkpoint: {differences}.')
    first = optimizer.param_groups[0]
    resumed_lr = first.get('initial_lr', first['lr'])
    resumed_decay = max(group.get('weight_decay', config.weight_decay) for group in optimizer.param_groups)
    others: list[tuple[str, Any, Any]] = [('lr', resumed_lr, lr), ('weight decay', resumed_decay, config.weight_decay)]
    # `defaults` has this run's settings, the groups have those of the checkpoint
    others += [(name, first[name], optimizer.defaults[name]) for name in _OF_A_STEP if name in optimizer.defaults]
    saved = saved_args(path)
    others += [(name_of(name), saved[name], getattr(config, name)) for name in _KEPT if name in saved]
    for name, resumed, given in others:
        if resumed != given:
            _logger.warning(
                f'--resume continues with {name} {_number(resumed)} of the checkpoint, not with {_number(given)}: '
                f'--no-resume-opt starts a fresh optimizer.'
            )
    return resumed_lr, resumed_decay


def _number(value: Any) -> str:
    return f'{value:.4g}' if isinstance(value, float) else str(value)


def with_kept_settings(config: RunConfig, path: str) -> RunConfig:
    """The settings of a run whose optimizer is that of a checkpoint: what the optimizer decides is as it was then."""
    saved = saved_args(path)
    return replace(config, **{name: saved[name] for name in _OF_THE_OPTIMIZER if name in saved})


def check_same_student(config: RunConfig, path: str) -> None:
    """Refuse to go on in a run's folder with a student that is built or fed otherwise: args.yaml says it for the best one.

    Raises:
        UsageError: The message has the first such flag.
    """
    saved, now = saved_args(path), config.as_dict()
    for name in OF_ITS_STUDENT:
        if name in saved and saved[name] != now[name]:
            raise UsageError(
                f"--resume: '{path}' had {name_of(name)} {saved[name]}, this run has {now[name]}, and the weights of the best epoch "
                f'are for that of then: give the same, or go on in another folder: --resume {path} --experiment NAME'
            )


def describe_differences(config: RunConfig, path: str) -> str:
    """The flags that differ from those of a checkpoint, as far as they affect training."""
    saved, now = saved_args(path), config.as_dict()
    if saved.get('teacher_dtype', '') is None:  # of a commit before 'auto', which takes what that run had
        saved['teacher_dtype'] = 'auto'
    names = sorted(name for name in saved.keys() & now.keys() - _NOT_COMPARED if saved[name] != now[name])
    said = [f'{name_of(name)} {reprlib.repr(saved[name])} then and {reprlib.repr(now[name])} now' for name in names]
    # folders may have moved, and other images are reported elsewhere; whether there are some changes what is trained on
    there = {name: (bool(saved.get(name)), bool(now[name])) for name in ('unlabeled', 'teacher_cache')}
    said += [f'no {name_of(name)} {"now" if a else "then"}' for name, (a, b) in there.items() if a != b]
    return ', '.join(said)
