"""Loaders on timm.data. Every draw of a map-style data set is seeded (draws.py); streams go without."""

import functools
import logging
from collections.abc import Callable, Sequence, Sized
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn as nn
from timm.data import AugMixDataset, FastCollateMixup, Mixup, create_loader
from timm.data.model_config import resolve_input_data_config
from timm.data.naflex_loader import create_naflex_loader
from timm.data.naflex_mixup import NaFlexMixup
from timm.data.transforms import RandomResizedCropAndInterpolation
from timm.models.naflexvit import NaFlexVit
from torch.utils.data import Dataset, IterableDataset
from torchvision import transforms

from ..config.derive import given_classes, label_smoothing, loader_workers, mixing_active, pins_memory, torch_dtype
from ..config.rules import COLUMN_KINDS, data_kind
from ..config.run_config import RunConfig
from ..errors import UsageError, is_out_of_memory, one_line
from ..process.runtime import Runtime
from ..process.signals import ignore_in_worker
from .datasets import check_num_classes, class_map_of, count_classes, read_whole_on_each_rank
from .epochs import plain_loader, seed_loader
from .fingerprint import hash_names
from .targets import ClassTarget, MultiLabelTargets, check_columns
from .unreadable import forget_unreadable

_logger = logging.getLogger(__name__)


@dataclass
class Data:
    """The loaders of a run.

    Attributes:
        train: Training loader, batches `(input [b, ch, h, w], target [b] or [b, c])`; None if a run only evaluates.
        eval: Validation loader.
        mixup: Mixup to call on each batch if the loader does not mix (no prefetcher).
        config: timm's data config: input_size, mean, std, interpolation, crop_pct.
    """

    train: Any
    eval: Any
    mixup: Mixup | None
    config: dict[str, Any]


def check_ranks(datasets: Sequence[Dataset[Any] | None], runtime: Runtime) -> None:
    """Raise unless all ranks have the same images and the same classes, in the same order; streams have no list of images.

    Ranks with other images would wait for each other's batches, or validate on what another one trains on.

    Raises:
        UsageError: They differ: the machines have different folders.
    """
    if not runtime.distributed:
        return
    ranks = runtime.gather([class_map_of(dataset) or {} for dataset in datasets])
    for rank, maps in enumerate(ranks):
        for first, other in zip(ranks[0], maps, strict=True):
            name = next((n for n in {**first, **other} if first.get(n) != other.get(n)), None)
            if name is not None:
                raise UsageError(
                    f"rank 0 has class '{name}' as {first.get(name)}, rank {rank} has it as {other.get(name)}: all machines "
                    f'must have the same class folders, or the same --class-map'
                )
    known = [d for d in datasets if d is not None and not isinstance(d, IterableDataset)]
    images = runtime.gather([(len(cast(Sized, dataset)), hash_names(dataset)) for dataset in known])
    for rank, of_rank in enumerate(images):
        for (number, names), (other_number, other_names) in zip(images[0], of_rank, strict=True):
            if names != other_names:
                raise UsageError(
                    f'rank 0 has {number} images of hash {names}, rank {rank} {other_number} of hash {other_names}: all '
                    f'machines must have the same files, and be able to read them'
                )


def create_data(
    config: RunConfig,
    datasets: tuple[Dataset[Any] | None, Dataset[Any]],
    student: nn.Module,
    runtime: Runtime,
) -> Data:
    """Make the loaders.

    Args:
        config: Run settings.
        datasets: Training (or None) and validation split.
        student: The data must fit its classes and its input.
        runtime: Device and ranks.

    Raises:
        UsageError: Classes differ from the student's or another rank's, the loader does not support a flag, or there
            are fewer training images than one batch.
    """
    check_ranks(datasets, runtime)
    num_classes = cast(int, student.num_classes)
    if config.has_labels:
        _check_labels(config, datasets, num_classes)
    try:
        data_config = resolve_input_data_config(student, args=config.as_dict())
    except ValueError as e:
        raise UsageError(f'--model {config.model}: {one_line(e)}') from e
    _check_sizes(config, student, data_config)
    if config.naflex_loader:
        return _create_naflex_data(config, datasets, data_config, student, runtime)
    train, mixup = None, None
    if datasets[0] is not None:
        train, mixup = _create_train_loader(config, datasets[0], data_config, num_classes, runtime)
    evaluation = create_eval_loader(config, datasets[1], data_config, runtime)
    if train is not None:
        _init_workers(train)
    return Data(train, evaluation, mixup, data_config)


def _check_labels(config: RunConfig, datasets: tuple[Dataset[Any] | None, Dataset[Any]], num_classes: int) -> None:
    """Refuse labels that do not fit the student, where they are known; others are checked as they are read."""
    for dataset in filter(None, datasets):
        check_columns(dataset, None if config.task == 'multilabel' else num_classes)
    if config.task == 'multilabel':
        for dataset in filter(None, datasets):
            target = MultiLabelTargets(num_classes, dense=config.target_format == 'multihot')
            cast(Any, dataset).target_transform = target
            _check_target(dataset)
        return
    check_num_classes(datasets, num_classes, given=given_classes(config) is not None)
    if datasets[0] is not None and count_classes(datasets[1]) is None and given_classes(config) is None:
        _logger.warning(
            f'The data does not tell its classes: the student has {num_classes}; --num-classes gives another number.'
        )
    for dataset in filter(None, datasets):
        if count_classes(dataset) is None or data_kind(config) in COLUMN_KINDS:  # where any number may be
            cast(Any, dataset).target_transform = ClassTarget(num_classes)


def _init_workers(loader: Any) -> None:
    plain = plain_loader(loader)
    plain.worker_init_fn = functools.partial(_init_worker, plain.worker_init_fn)


def _init_worker(init: Callable[[int], None] | None, worker: int) -> None:
    ignore_in_worker()
    if init is not None:
        init(worker)


def _check_target(dataset: Dataset[Any]) -> None:
    # a stream that is read here cannot be read by loader processes: its targets are checked later
    if not isinstance(dataset, IterableDataset):
        dataset[0]
        forget_unreadable(dataset)


def _check_sizes(config: RunConfig, student: nn.Module, data_config: dict[str, Any]) -> None:
    """Run the student on a blank image of each size, to refuse one that it cannot take before anything is written."""
    if config.naflex_loader:
        return
    channels, *size = data_config['input_size']
    training = student.training
    student.eval()
    for height, width in [size, *([s, s] for s in config.train_img_sizes or ())]:
        x = torch.zeros(1, channels, height, width, dtype=next(student.parameters()).dtype)
        try:
            with torch.no_grad():
                output = student(x)
        except (RuntimeError, AssertionError, ValueError, IndexError, TypeError) as e:
            if is_out_of_memory(e):  # it says nothing of the size
                raise
            raise UsageError(
                f'--model {config.model} cannot take {channels}x{height}x{width} images: {one_line(e, 160)}'
            ) from e
        shape = list(output.shape) if isinstance(output, torch.Tensor) else f'a {type(output).__name__}'
        if student.num_classes and shape != [1, student.num_classes]:
            raise UsageError(
                f'--model {config.model} gives {shape} for an image and not logits {[1, student.num_classes]}: does it pool?'
            )
    student.train(training)


def _create_train_loader(
    config: RunConfig,
    dataset: Dataset[Any],
    data_config: dict[str, Any],
    num_classes: int,
    runtime: Runtime,
) -> tuple[Any, Mixup | None]:
    collate, mixup = _create_mixup(config, num_classes)
    if config.aug_repeats and not runtime.distributed:
        raise UsageError('--aug-repeats spreads the draws of an image over ranks: it needs distributed training')
    # timm gives it a transform, which torch's Dataset does not have
    images: Any = AugMixDataset(dataset, num_splits=config.aug_splits) if config.aug_splits else dataset
    interpolation = config.train_interpolation
    if config.no_aug or not interpolation:
        interpolation = data_config['interpolation']
    try:
        loader = create_loader(
            images,
            input_size=data_config['input_size'],
            batch_size=config.batch_size,
            is_training=True,
            re_split=config.resplit,
            **_augmentation_args(config),
            num_aug_repeats=config.aug_repeats,  # type: ignore[arg-type]  # timm's own flag for it is a float
            num_aug_splits=config.aug_splits,
            interpolation=interpolation,
            collate_fn=collate,
            persistent_workers=config.persistent_workers,
            input_size_choices=config.train_img_sizes,
            batch_size_choices=config.train_batch_sizes,
            batch_choice_weights=config.train_size_probs,
            batch_choice_seed=config.seed,
            batch_choice_schedule=config.train_size_schedule,
            batch_schedule_epochs=config.epochs,
            batch_schedule_spread=config.train_size_schedule_spread,
            batch_schedule_random_mix=config.train_size_random_mix,
            num_batches=config.train_batches_per_epoch,
            use_multi_epochs_loader=config.use_multi_epochs_loader and isinstance(images, IterableDataset),
            **_common_loader_args(config, images, data_config, runtime),
        )
    except (AssertionError, ValueError, TypeError, KeyError, IndexError) as e:
        raise UsageError(f'training augmentation: {one_line(e)}') from e
    if config.train_crop_pad:
        _pad_and_crop(images.transform, data_config['input_size'][1:], config.train_crop_pad)
    if isinstance(images, IterableDataset):
        if config.teacher_cache:
            raise UsageError(
                f"--teacher-cache knows images by their index, '{config.dataset}' is a stream without: leave the cache out"
            )
        _logger.info('The training data is a stream without indices: its augmentation depends on the loader workers.')
    else:
        loader = seed_loader(loader, config, runtime)
        if not len(loader):
            raise UsageError(
                f'{len(images)} training images on {runtime.world_size} rank(s) are fewer than one batch of {config.batch_size} (an '
                f'incomplete one is dropped): lower --batch-size'
            )
    return loader, mixup


def _create_mixup(config: RunConfig, num_classes: int) -> tuple[FastCollateMixup | None, Mixup | None]:
    """Mixup as the loader's collate function; without the prefetcher, as a function to call on its batches."""
    if not mixing_active(config):
        return None, None
    settings = {
        'mixup_alpha': config.mixup,
        'cutmix_alpha': config.cutmix,
        'cutmix_minmax': config.cutmix_minmax,
        'prob': config.mixup_prob,
        'switch_prob': config.mixup_switch_prob,
        'mode': config.mixup_mode,
        'label_smoothing': label_smoothing(config),
        'num_classes': num_classes,
        'multi_label': config.task == 'multilabel',
    }
    return (None, Mixup(**settings)) if config.no_prefetcher else (FastCollateMixup(**settings), None)


def _pad_and_crop(transform: transforms.Compose, size: tuple[int, int], padding: int) -> None:
    """Replace timm's random resized crop, the first transform, by the padded random crop of CIFAR recipes."""
    if not isinstance(transform.transforms[0], RandomResizedCropAndInterpolation):
        raise UsageError('--train-crop-pad: the augmentation does not start with a random resized crop to replace')
    resize = transforms.Resize(size)  # images that have this size already pass through
    transform.transforms[:1] = [resize, transforms.RandomCrop(size, padding=padding)]


def _augmentation_args(config: RunConfig) -> dict[str, Any]:
    return {
        'no_aug': config.no_aug,
        're_prob': config.reprob,
        're_mode': config.remode,
        're_count': config.recount,
        'train_crop_mode': config.train_crop_mode,
        'scale': config.scale,
        'ratio': config.ratio,
        'hflip': config.hflip,
        'vflip': config.vflip,
        'color_jitter': config.color_jitter,
        'color_jitter_prob': config.color_jitter_prob,
        'grayscale_prob': config.grayscale_prob or 0.0,
        'gaussian_blur_prob': config.gaussian_blur_prob or 0.0,
        'auto_augment': config.aa,
        'worker_seeding': config.worker_seeding,
    }


def _create_naflex_data(
    config: RunConfig,
    datasets: tuple[Dataset[Any] | None, Dataset[Any]],
    data_config: dict[str, Any],
    student: nn.Module,
    runtime: Runtime,
) -> Data:
    """timm's NaFlex loaders: patches at native aspect ratio. Their draws are timm's own, seeded by epoch."""
    if not isinstance(student, NaFlexVit):
        raise UsageError(
            f'--naflex-loader needs a NaFlexVit (naflexvit_*, or --model-kwargs use_naflex=True), not {config.model}'
        )
    if config.naflex_patch_sizes and not student.embeds.enable_patch_interpolator:
        raise UsageError('--naflex-patch-sizes needs --model-kwargs enable_patch_interpolator=True')
    common = {
        'mean': data_config['mean'],
        'std': data_config['std'],
        'channels': data_config['input_size'][0],
        'num_workers': loader_workers(config, datasets[1])[0],
        'distributed': runtime.distributed,
        'rank': runtime.rank,
        'world_size': runtime.world_size,
        'seed': config.seed,
        'pin_memory': pins_memory(config, runtime.device.type),
        'img_dtype': torch_dtype(config.model_dtype) or torch.float32,
        'device': runtime.device,
        'use_prefetcher': not config.no_prefetcher,
        'persistent_workers': config.persistent_workers,
        'patchify_channels_last': not config.naflex_patchify_channels_first,
    }
    patch_size = student.embeds.patch_size
    train = None
    try:
        if datasets[0] is not None:
            train = create_naflex_loader(
                datasets[0],
                patch_size=None if config.naflex_patch_sizes else patch_size,
                patch_size_choices=config.naflex_patch_sizes,
                patch_size_choice_probs=config.naflex_patch_size_probs,
                train_seq_lens=tuple(config.naflex_train_seq_lens),
                batch_size=config.batch_size,
                is_training=True,
                mixup_fn=_create_naflex_mixup(config, student.num_classes) if mixing_active(config) else None,
                **_augmentation_args(config),
                interpolation=data_config['interpolation'] if config.no_aug else config.train_interpolation,
                **common,
            )
        evaluation = create_naflex_loader(
            datasets[1],
            patch_size=patch_size,
            max_seq_len=config.naflex_max_seq_len,
            batch_size=config.validation_batch_size or config.batch_size,
            is_training=False,
            interpolation=data_config['interpolation'],
            crop_pct=data_config['crop_pct'],
            **common,
        )
    except (AssertionError, ValueError, TypeError) as e:
        raise UsageError(f'NaFlex loader: {one_line(e)}') from e
    return Data(train, evaluation, None, data_config)


def _create_naflex_mixup(config: RunConfig, num_classes: int) -> NaFlexMixup:
    return NaFlexMixup(
        num_classes=num_classes,
        mixup_alpha=config.mixup,
        cutmix_alpha=config.cutmix,
        switch_prob=config.mixup_switch_prob,
        prob=config.mixup_prob,
        label_smoothing=label_smoothing(config),
        mixup_off_epoch=config.mixup_off_epoch,
        multi_label=config.task == 'multilabel',
    )


def create_eval_loader(config: RunConfig, dataset: Dataset[Any], data_config: dict[str, Any], runtime: Runtime) -> Any:
    """A validation loader.

    Args:
        config: Run settings.
        dataset: The split; it gets the transforms.
        data_config: timm's data config of its images.
        runtime: Device and ranks.
    """
    if isinstance(dataset, IterableDataset) and runtime.distributed:
        read_whole_on_each_rank(dataset)
    loader = create_loader(
        cast(Any, dataset),
        input_size=data_config['input_size'],
        batch_size=config.validation_batch_size or config.batch_size,
        is_training=False,
        interpolation=data_config['interpolation'],
        crop_pct=data_config['crop_pct'],
        crop_mode=data_config['crop_mode'],
        persistent_workers=config.persistent_workers,
        **_common_loader_args(config, dataset, data_config, runtime),
    )
    plain_loader(loader).generator = torch.Generator()  # else its workers' seed is drawn from the run's random state
    _init_workers(loader)
    return loader


def _common_loader_args(
    config: RunConfig, dataset: Dataset[Any], data_config: dict[str, Any], runtime: Runtime
) -> dict[str, Any]:
    return {
        'mean': data_config['mean'],
        'std': data_config['std'],
        'num_workers': loader_workers(config, dataset)[0],
        'distributed': runtime.distributed,
        'pin_memory': pins_memory(config, runtime.device.type),
        'device': runtime.device,
        'img_dtype': torch_dtype(config.model_dtype) or torch.float32,
        'use_prefetcher': not config.no_prefetcher,
    }
