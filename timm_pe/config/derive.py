"""Values derived from the flags: each is derived here, once, and never stored back into the settings."""

import os
from typing import Any

import torch
from torch.utils.data import Dataset, IterableDataset

from .flags import AugmentationFlags, LoaderFlags, LossFlags, ModelFlags, ProjectorFlags
from .rules import loss_type as loss_type
from .run_config import RunConfig

# loader processes
_TIMM_WORKERS = 4


def learning_rate(config: RunConfig, world_size: int) -> float:
    """--lr, or --lr-base scaled by the global batch, linearly or by its square root, as timm does it."""
    if config.lr is not None:
        return config.lr
    scale = config.lr_base_scale or ('sqrt' if any(o in config.opt.lower() for o in ('ada', 'lamb')) else 'linear')
    ratio = config.batch_size * world_size * config.grad_accum_steps / config.lr_base_size
    return config.lr_base * (ratio**0.5 if scale == 'sqrt' else ratio)


def given_classes(flags: ModelFlags) -> int | None:
    """Number of classes that the command line gives, as --num-classes or in --model-kwargs."""
    return flags.num_classes if flags.num_classes is not None else flags.model_kwargs.get('num_classes')


def number_of_projectors(flags: ProjectorFlags) -> int:
    """--pe-projectors; without any, of the kind identity, it is 1."""
    return 1 if flags.pe_projector == 'identity' else flags.pe_projectors


def label_smoothing(flags: LossFlags) -> float:
    """--smoothing, or timm's default of the task: 0.1 for one label, 0 for many."""
    if flags.smoothing is not None:
        return flags.smoothing
    return 0.0 if flags.task == 'multilabel' else 0.1


def mixing_active(flags: AugmentationFlags) -> bool:
    """Whether targets are soft, mixed by mixup or cutmix."""
    return flags.mixup > 0 or flags.cutmix > 0 or flags.cutmix_minmax is not None


def ranked_by(config: RunConfig) -> str:
    """The metric that selects the best epoch of a run; by default top-1, mAP of multi-label data, cosine without labels."""
    by_default = ('map' if config.task == 'multilabel' else 'top1') if config.has_labels else 'cosine'
    return config.eval_metric or by_default


def torch_dtype(name: str | None) -> torch.dtype | None:
    """The torch dtype called `name`."""
    dtype: torch.dtype | None = getattr(torch, name) if name else None
    return dtype


def pins_memory(flags: LoaderFlags, device_type: str) -> bool:
    """Whether loaders pin host memory: with CUDA alone, unless switched off."""
    return flags.pin_mem and device_type == 'cuda'


def loader_workers(config: RunConfig, dataset: Dataset[Any]) -> tuple[int, str]:
    """Number of loader processes on this rank, and why: --workers, or one for each core of this rank, up to timm's
    default of 4.

    What streams and NaFlex batches draw depends on the number, so for these it is 4 on every machine.
    """
    if config.workers is not None:
        return config.workers, 'as -j says'
    if config.naflex_loader or isinstance(dataset, IterableDataset):
        return _TIMM_WORKERS, 'what is drawn depends on the number; -j sets it'
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
    cores = max(1, cores // int(os.environ.get('LOCAL_WORLD_SIZE', 1)))  # torchrun's number of ranks on this machine
    return min(_TIMM_WORKERS, cores), f'of {cores} core{"s" * (cores > 1)}; -j sets it'
