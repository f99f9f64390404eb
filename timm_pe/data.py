"""Data sets and loaders on timm.data. Every draw of a map-style data set is seeded (draws.py); streams go without."""

import argparse
import copy
import difflib
import functools
import io
import logging
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
from PIL import Image
from timm.data import AugMixDataset, FastCollateMixup, ImageDataset, Mixup, create_dataset, create_loader
from timm.data.loader import MultiEpochsDataLoader, PrefetchLoader
from timm.data.model_config import resolve_input_data_config
from timm.data.naflex_loader import create_naflex_loader
from timm.data.naflex_mixup import NaFlexMixup
from timm.data.readers.reader import Reader
from timm.data.target_transforms import MultiLabelTarget
from timm.data.transforms import RandomResizedCropAndInterpolation
from timm.models.naflexvit import NaFlexVit
from timm.utils import natural_key
from torch.utils.data import DataLoader, Dataset, IterableDataset
from torchvision import transforms
from torchvision.datasets import ImageFolder, VisionDataset

from .args import resolve_dtype, resolve_smoothing, resolve_workers
from .draws import Batch, DrawBatchSampler, SeededCollate, SeededDataset, SeededErasing, ViewBatches
from .errors import RunError, UsageError, one_line
from .interrupts import ignore_in_worker
from .runtime import Runtime
from .unreadable import CountingImageDataset, forget_unreadable

_logger = logging.getLogger(__name__)


@dataclass
class Data:
    """What a run reads.

    Attributes:
        train: Training loader, batches `(input [b, ch, h, w], target [b] or [b, c])`; None where a run only evaluates.
        eval: Validation loader.
        mixup: Mixup to call on a batch, where the loader (no prefetcher) does not mix itself.
        config: timm's data config: input_size, mean, std, interpolation, crop_pct.
    """

    train: Any
    eval: Any
    mixup: Mixup | None
    config: dict[str, Any]


# Loaders over seeded draws ----------------------------------------------------------------------------------------------


def _seed_loader(loader: Any, args: argparse.Namespace, runtime: Runtime) -> Any:
    """Put a DataLoader over seeded draws in the place of timm's, under its prefetcher where there is one."""
    plain = loader.loader if isinstance(loader, PrefetchLoader) else loader
    loader_class = MultiEpochsDataLoader if args.use_multi_epochs_loader else DataLoader
    seeded = loader_class(
        SeededDataset(plain.dataset, args.seed),
        batch_sampler=DrawBatchSampler(
            plain.batch_sampler,
            args.seed,
            runtime.rank,
            runtime.world_size,
            repeated=bool(args.aug_repeats),
            views=args.teacher_cache_views if args.teacher_cache else None,
        ),
        collate_fn=SeededCollate(
            plain.collate_fn, args.seed, runtime.rank, args.mixup_off_epoch, indexed=bool(args.teacher_cache)
        ),
        num_workers=plain.num_workers,
        pin_memory=plain.pin_memory,
        worker_init_fn=plain.worker_init_fn,
        persistent_workers=plain.persistent_workers,
        generator=torch.Generator(),  # else each epoch takes its workers' seed from the run's random state
    )
    if not isinstance(loader, PrefetchLoader):
        return seeded
    loader.loader = seeded
    if loader.random_erasing is not None:
        loader.random_erasing = SeededErasing(loader.random_erasing, args.seed, runtime.rank)
    return loader


def plain_loader(loader: Any) -> Any:
    """The DataLoader under a prefetcher."""
    return loader.loader if isinstance(loader, PrefetchLoader) else loader


def set_epoch(loader: Any, epoch: int, start: int = 0) -> bool:
    """Tell all parts of a training loader which epoch comes next, and with which batch.

    Returns:
        Whether it will begin with batch `start`; a loader that cannot begins with the first.
    """
    plain = plain_loader(loader)
    batches, erasing = getattr(plain, 'batch_sampler', None), getattr(loader, 'random_erasing', None)
    multi_epochs = isinstance(plain, MultiEpochsDataLoader)
    if multi_epochs:
        # its one iterator is ahead of us and counts epochs by itself once it runs
        batches = batches.sampler if plain.iterator is None else None
    for part in (batches, getattr(loader, 'dataset', None), erasing):
        if hasattr(part, 'set_epoch'):
            part.set_epoch(epoch)
    seeks = isinstance(batches, DrawBatchSampler) and not multi_epochs
    for part in (batches, erasing) if seeks else ():
        if part is not None:
            part.set_epoch(epoch, start)
    return seeks


def epoch_batches(loader: Any, epoch: int, start: int = 0) -> Iterator[tuple[int, tuple]]:
    """The batches of an epoch from number `start` on, with their numbers.

    A loader that can only begin at the beginning draws those before, and they are passed over.
    """
    first = start if set_epoch(loader, epoch, start) else 0
    for i, batch in enumerate(loader, first):
        if i >= start:
            yield i, batch


def first_batch(loader: Any) -> tuple:
    """The batch that epoch 0 will start with; the loader is as if it had not been drawn.

    Raises:
        UsageError: Its images cannot be read.
    """
    set_epoch(loader, 0)
    plain = plain_loader(loader)
    if not isinstance(plain.dataset, IterableDataset):
        # read here: workers would read ahead, and go on while the first epoch counts what cannot be read
        loader = _loader_over(loader, [next(iter(plain.batch_sampler))], num_workers=0)
    try:
        batch = next(iter(loader))
    except RunError as e:  # nothing has begun yet
        raise UsageError(one_line(e)) from e
    forget_unreadable(loader.dataset)
    if isinstance(plain, MultiEpochsDataLoader):
        plain.iterator = None
    return batch


def view_loader(loader: Any, view: int, indices: np.ndarray, batch_size: int) -> Any:
    """`loader` over one view of the images `indices` alone, in their order: the same pixels, workers and normalization."""
    return _loader_over(loader, ViewBatches(view, indices, batch_size), plain_loader(loader).num_workers)


def _loader_over(loader: Any, batches: Iterable[Batch], num_workers: int) -> Any:
    """`loader` over other batches, with the same pixels and normalization."""
    plain = plain_loader(loader)
    other = DataLoader(
        plain.dataset,
        batch_sampler=batches,
        collate_fn=plain.collate_fn,
        num_workers=num_workers,
        pin_memory=plain.pin_memory,
        worker_init_fn=plain.worker_init_fn,
        generator=torch.Generator(),
    )
    if not isinstance(loader, PrefetchLoader):
        return other
    loader = copy.copy(loader)
    loader.loader = other
    return loader


# Data sets -----------------------------------------------------------------------------------------------------------


class DigitsReader(Reader):
    """The 1,797 handwritten digits of scikit-learn (8x8, 10 classes; UCI ML hand-written digits), one half to train on.

    The split is fixed and stratified: 898 images to train, 899 to validate.

    Args:
        split: A name with 'train' in it for the training half, any other for the validation half.

    Raises:
        UsageError: scikit-learn is not installed.
    """

    def __init__(self, split: str):
        super().__init__()
        try:
            from sklearn.datasets import load_digits
            from sklearn.model_selection import train_test_split
        except ImportError as e:
            raise UsageError("--dataset sklearn/digits needs scikit-learn: pip install 'timm_pe[demo]'") from e
        digits = load_digits()
        halves = train_test_split(np.arange(len(digits.target)), test_size=0.5, stratify=digits.target, random_state=0)
        self.indices = halves[0 if 'train' in split else 1]
        images = (digits.images[self.indices] * (255 / 16)).round().astype(np.uint8)
        self.files = [_png(image) for image in images]
        self.targets = digits.target[self.indices]
        self.class_to_idx = {str(c): c for c in range(10)}

    def __getitem__(self, index: int) -> tuple[io.BytesIO, int]:
        return io.BytesIO(self.files[index]), int(self.targets[index])

    def __len__(self) -> int:
        return len(self.targets)

    def _filename(self, index: int, basename: bool = False, absolute: bool = False) -> str:
        return f'digits/{self.indices[index]}'


def _png(image: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, 'png')
    return file.getvalue()


_BUILT_IN_READERS = {'sklearn/digits': DigitsReader}
# kinds of data sets that timm reads, '<kind>/<name>'
_KINDS = ('torch', 'hfds', 'hfids', 'tfds', 'wds', 'folder')


def _create_dataset(args: argparse.Namespace, split: str, is_training: bool, in_chans: int) -> Dataset:
    dataset = _open_dataset(args, split, is_training, in_chans)
    if isinstance(dataset, VisionDataset):
        return _ConvertedDataset(dataset, _image_mode(args, in_chans))
    return CountingImageDataset(dataset) if type(dataset) is ImageDataset else dataset


class _ConvertedDataset(Dataset):
    """A data set of torchvision whose images are converted to a PIL mode, as timm's readers do by themselves."""

    def __init__(self, dataset: VisionDataset, mode: str):
        self.dataset, self.mode = dataset, mode
        self.transform = self.target_transform = None

    def __getitem__(self, index: int) -> tuple:
        image, target = self.dataset[index]
        if image.mode != self.mode:
            image = image.convert(self.mode)
        return (
            image if self.transform is None else self.transform(image),
            target if self.target_transform is None else self.target_transform(target),
        )

    def __len__(self) -> int:
        return len(self.dataset)

    def __getattr__(self, name: str) -> Any:
        if name.startswith('__') or name == 'dataset':
            raise AttributeError(name)
        return getattr(self.dataset, name)


def _image_mode(args: argparse.Namespace, in_chans: int) -> str:
    return args.input_img_mode or ('RGB' if in_chans == 3 else 'L')


def _open_dataset(args: argparse.Namespace, split: str, is_training: bool, in_chans: int) -> Dataset:
    if in_chans not in (1, 3) and not args.input_img_mode:
        raise UsageError(f'the student has {in_chans} input channels: say with --input-img-mode how images become that')
    mode = _image_mode(args, in_chans)
    if args.dataset.lower() in _BUILT_IN_READERS:
        return ImageDataset(
            args.data_dir or args.data or '', reader=_BUILT_IN_READERS[args.dataset.lower()](split), input_img_mode=mode
        )
    root = args.data_dir or args.data
    is_folder = '/' not in args.dataset
    extra = {} if is_folder else {'trust_remote_code': args.dataset_trust_remote_code}
    if args.target_format:
        extra['target_format'] = args.target_format
    try:
        dataset = create_dataset(
            args.dataset,
            root=root,
            split=split,
            is_training=is_training,
            class_map=args.class_map,
            download=args.dataset_download,
            batch_size=args.batch_size,
            seed=args.seed,
            repeats=args.epoch_repeats if is_training else 0,
            input_img_mode=mode,
            input_key=args.input_key,
            target_key=args.target_key,
            num_samples=args.train_num_samples if is_training else args.val_num_samples,
            **extra,
        )
    except Exception as e:
        raise UsageError(f"cannot open data set '{args.dataset or root}', split '{split}': {one_line(e)}") from e
    if is_folder and not args.class_map:
        _check_class_order(dataset)
    return dataset


def _check_class_order(dataset: Dataset) -> None:
    """Refuse class folders that are equal to timm's sort: it sorts a set, so their order would be another in each process."""
    names = {}
    for name in sorted(class_map_of(dataset) or ()):
        first = names.setdefault(tuple(natural_key(name)), name)
        if first != name:
            raise UsageError(
                f"class folders '{first}' and '{name}' are equal to timm, which sorts without case and leading zeros, so their "
                f'labels would be a matter of chance: rename one of them, or give all in their order with --class-map'
            )


def check_data(args: argparse.Namespace) -> None:
    """Refuse data that can't be there, before anything is built or fetched.

    Raises:
        UsageError: No such folder, or an unknown kind of data set.
    """
    name, root = args.dataset.lower(), args.data_dir or args.data
    if name in _BUILT_IN_READERS:
        return
    if '/' not in name:
        if not root or not os.path.exists(root):
            near = (
                difflib.get_close_matches(name, [*_BUILT_IN_READERS, *(f'{k}/' for k in _KINDS)], n=1) if name else []
            )
            hint = f' (or did you mean --dataset {near[0]}?)' if near else ''
            raise UsageError(
                f"no data folder '{root or ''}': give the folder that holds the splits, e.g. DIR/train and DIR/val{hint}"
            )
        return
    if name.split('/')[0] not in _KINDS:
        near = difflib.get_close_matches(name, _BUILT_IN_READERS, n=1)
        hint = f', did you mean {near[0]}?' if near else ''
        known = ', '.join([*_BUILT_IN_READERS, *(f'{k}/NAME' for k in _KINDS)])
        raise UsageError(f"unknown data set '{args.dataset}'{hint} Known: {known}, or a folder of images")


def create_datasets(args: argparse.Namespace, in_chans: int = 3) -> tuple[Dataset | None, Dataset]:
    """Open the training split (None where the run only evaluates) and the validation split.

    Args:
        args: Run arguments.
        in_chans: Channels that the student sees: 3 reads images as RGB, 1 as grey.

    Raises:
        UsageError: No such data, no images, or splits whose classes differ.
    """
    train = None if args.evaluate else _create_dataset(args, args.train_split, True, in_chans)
    evaluation = _create_dataset(args, args.val_split, False, in_chans)
    _check_splits(train, evaluation, args)
    return train, evaluation


def _check_ranks(datasets: tuple[Dataset | None, Dataset], runtime: Runtime) -> None:
    """Raise unless all ranks have the same classes in the same order.

    Raises:
        UsageError: They do not: machines with different folders.
    """
    if not runtime.distributed:
        return
    ranks: list = [None] * runtime.world_size
    dist.all_gather_object(ranks, [class_map_of(dataset) or {} for dataset in datasets])
    for rank, maps in enumerate(ranks):
        for first, other in zip(ranks[0], maps, strict=True):
            name = next((n for n in {**first, **other} if first.get(n) != other.get(n)), None)
            if name is not None:
                raise UsageError(
                    f"rank 0 has class '{name}' as {first.get(name)}, rank {rank} has it as {other.get(name)}: all machines "
                    f'must have the same class folders, or the same --class-map'
                )


def _check_splits(train: Dataset | None, evaluation: Dataset, args: argparse.Namespace) -> None:
    if train is None:
        return
    if '/' not in args.dataset or isinstance(getattr(train, 'dataset', None), ImageFolder):
        _check_split_folders(train, evaluation, args)
    classes, eval_classes = class_map_of(train), class_map_of(evaluation)
    if not classes or not eval_classes or classes == eval_classes:
        return
    only = sorted(set(classes).symmetric_difference(eval_classes))
    moved = [n for n in classes if classes[n] != eval_classes.get(n)]
    differ = (
        f'{", ".join(only[:5])} in one of them only'
        if only
        else f'{moved[0]} is {classes[moved[0]]} in one and {eval_classes[moved[0]]} in the other'
    )
    raise UsageError(
        f'training and validation split have different classes, so their labels would not mean the same: '
        f'{differ} ({len(classes)} and {len(eval_classes)} classes)'
    )


def _check_split_folders(train: Dataset, evaluation: Dataset, args: argparse.Namespace) -> None:
    roots = [os.path.abspath(getattr(getattr(d, 'reader', d), 'root', '')) for d in (train, evaluation)]
    data_dir = os.path.abspath(args.data_dir or args.data)
    if roots[0] == roots[1] == data_dir:
        _logger.warning(f"No split folders in '{data_dir}': training and validation use the SAME images.")
    elif data_dir in roots:
        split = (args.train_split, args.val_split)[roots.index(data_dir)]
        raise UsageError(
            f"no folder for split '{split}' in '{data_dir}': it has {', '.join(sorted(os.listdir(data_dir)))}"
        )


def class_map_of(dataset: Dataset | None) -> dict[str, int] | None:
    """The class map of a data set, name -> index in the order of the indices; None where it does not tell.

    Args:
        dataset: The data set, or what wraps it as `.dataset`.
    """
    while dataset is not None:
        for part in (getattr(dataset, 'reader', None), dataset):
            # timm's reader of tar files has another name for it
            classes = getattr(part, 'class_to_idx', None) or getattr(part, 'class_name_to_idx', None)
            if classes:
                return {str(name): int(classes[name]) for name in sorted(classes, key=lambda name: classes[name])}
        dataset = getattr(dataset, 'dataset', None)
    return None


def count_classes(dataset: Dataset | None) -> int | None:
    """Number of classes of a data set, None where it does not tell."""
    class_to_idx = class_map_of(dataset)
    if class_to_idx:
        return max(class_to_idx.values()) + 1
    classes = getattr(dataset, 'classes', None)
    return len(classes) if classes else None


def check_num_classes(dataset: Dataset, num_classes: int, given: bool) -> None:
    """Refuse a student whose classes are not the data's.

    Args:
        dataset: The validation split.
        num_classes: The student's.
        given: --num-classes was given (then the two must be equal; else the model may have more).

    Raises:
        UsageError: They don't fit.
    """
    classes = count_classes(dataset)
    if classes is None or classes == num_classes:
        return
    if given or classes > num_classes:
        raise UsageError(
            f'the data set has {classes} classes and the student {num_classes}: use --num-classes {classes}'
        )
    _logger.warning(
        f'The student keeps the {num_classes} classes of its architecture, the data set has {classes}: '
        f'--num-classes {classes} gives it a classifier of that size.'
    )


# Loaders -------------------------------------------------------------------------------------------------------------


def create_data(
    args: argparse.Namespace,
    datasets: tuple[Dataset | None, Dataset],
    student: nn.Module,
    runtime: Runtime,
) -> Data:
    """Make the loaders.

    Args:
        args: Run arguments.
        datasets: Training (or None) and validation split.
        student: Its classes and its input are what the data must fit.
        runtime: Device and ranks.

    Raises:
        UsageError: Other classes than the student's, or than those of another rank, flags that the loader cannot do, or
            fewer training images than one batch.
    """
    _check_ranks(datasets, runtime)
    if args.task == 'multilabel':
        for dataset in filter(None, datasets):
            dataset.target_transform = MultiLabelTarget(student.num_classes, dense=args.target_format == 'multihot')
            _check_target(dataset)
    else:
        check_num_classes(datasets[1], student.num_classes, given=args.num_classes is not None)
    try:
        config = resolve_input_data_config(student, args=vars(args))
    except ValueError as e:
        raise UsageError(f'--model {args.model}: {one_line(e)}') from e
    _check_sizes(args, student, config)
    if args.naflex_loader:
        return _create_naflex_data(args, datasets, config, student, runtime)
    train, mixup = None, None
    if datasets[0] is not None:
        train, mixup = _create_train_loader(args, datasets[0], config, student.num_classes, runtime)
    evaluation = _create_eval_loader(args, datasets[1], config, runtime)
    plain_loader(
        evaluation
    ).generator = torch.Generator()  # else its workers' seed is drawn from the run's random state
    for loader in filter(None, (train, evaluation)):
        plain = plain_loader(loader)
        plain.worker_init_fn = functools.partial(_init_worker, plain.worker_init_fn)
    return Data(train, evaluation, mixup, config)


def _init_worker(init: Callable[[int], None] | None, worker: int) -> None:
    ignore_in_worker()
    if init is not None:
        init(worker)


def _check_target(dataset: Dataset) -> None:
    if isinstance(dataset, IterableDataset):
        return
    try:
        dataset[0]
    except (ValueError, TypeError) as e:
        raise UsageError(f'--task multilabel: the targets of the data set do not fit: {one_line(e)}') from e
    forget_unreadable(dataset)


def _check_sizes(args: argparse.Namespace, student: nn.Module, config: dict[str, Any]) -> None:
    """Show the student one empty image of each size, so that one it cannot take is refused before anything is written."""
    if args.naflex_loader:
        return
    channels, *size = config['input_size']
    training = student.training
    student.eval()
    for height, width in [size, *([s, s] for s in args.train_img_sizes or ())]:
        x = torch.zeros(1, channels, height, width, dtype=next(student.parameters()).dtype)
        try:
            with torch.no_grad():
                student(x)
        except (RuntimeError, AssertionError, ValueError, IndexError, TypeError) as e:
            raise UsageError(
                f'--model {args.model} cannot take {channels}x{height}x{width} images: {one_line(e, 160)}'
            ) from e
    student.train(training)


def mixing_active(args: argparse.Namespace) -> bool:
    """Whether targets are soft, mixed by mixup or cutmix."""
    return args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax is not None


def _create_train_loader(
    args: argparse.Namespace,
    dataset: Dataset,
    config: dict[str, Any],
    num_classes: int,
    runtime: Runtime,
) -> tuple[Any, Mixup | None]:
    collate, mixup = None, None
    if mixing_active(args):
        mixup_args = {
            'mixup_alpha': args.mixup,
            'cutmix_alpha': args.cutmix,
            'cutmix_minmax': args.cutmix_minmax,
            'prob': args.mixup_prob,
            'switch_prob': args.mixup_switch_prob,
            'mode': args.mixup_mode,
            'label_smoothing': resolve_smoothing(args),
            'num_classes': num_classes,
            'multi_label': args.task == 'multilabel',
        }
        if args.no_prefetcher:
            mixup = Mixup(**mixup_args)
        else:
            collate = FastCollateMixup(**mixup_args)
    if args.aug_repeats and not runtime.distributed:
        raise UsageError('--aug-repeats spreads the draws of an image over ranks: it needs distributed training')
    if args.aug_splits:
        dataset = AugMixDataset(dataset, num_splits=args.aug_splits)
    interpolation = args.train_interpolation
    if args.no_aug or not interpolation:
        interpolation = config['interpolation']
    try:
        loader = create_loader(
            dataset,
            input_size=config['input_size'],
            batch_size=args.batch_size,
            is_training=True,
            re_split=args.resplit,
            **_augmentation_args(args),
            num_aug_repeats=args.aug_repeats,
            num_aug_splits=args.aug_splits,
            interpolation=interpolation,
            collate_fn=collate,
            persistent_workers=args.persistent_workers,
            input_size_choices=args.train_img_sizes,
            batch_size_choices=args.train_batch_sizes,
            batch_choice_weights=args.train_size_probs,
            batch_choice_seed=args.seed,
            batch_choice_schedule=args.train_size_schedule,
            batch_schedule_epochs=args.epochs,
            batch_schedule_spread=args.train_size_schedule_spread,
            batch_schedule_random_mix=args.train_size_random_mix,
            num_batches=args.train_batches_per_epoch,
            use_multi_epochs_loader=args.use_multi_epochs_loader and isinstance(dataset, IterableDataset),
            **_common_loader_args(args, dataset, config, runtime),
        )
    except (AssertionError, ValueError, TypeError, KeyError, IndexError) as e:
        raise UsageError(f'training augmentation: {one_line(e)}') from e
    if args.train_crop_pad:
        _pad_and_crop(dataset.transform, config['input_size'][1:], args.train_crop_pad)
    if isinstance(dataset, IterableDataset):
        if args.teacher_cache:
            raise UsageError(
                f"--teacher-cache knows images by their index, '{args.dataset}' is a stream without: leave the cache out"
            )
        _logger.info('The training data is a stream without indices: its augmentation depends on the loader workers.')
    else:
        loader = _seed_loader(loader, args, runtime)
        if not len(loader):
            raise UsageError(
                f'{len(dataset)} training images on {runtime.world_size} rank(s) make no batch of {args.batch_size} (an '
                f'incomplete one is dropped): lower --batch-size'
            )
    return loader, mixup


def _pad_and_crop(transform: transforms.Compose, size: tuple[int, int], padding: int) -> None:
    """Put the padded random crop of CIFAR recipes in the place of timm's random resized crop, its first transform."""
    if not isinstance(transform.transforms[0], RandomResizedCropAndInterpolation):
        raise UsageError('--train-crop-pad: the augmentation does not start with a random resized crop to replace')
    resize = transforms.Resize(size)  # images that have this size already pass through
    transform.transforms[:1] = [resize, transforms.RandomCrop(size, padding=padding)]


def _augmentation_args(args: argparse.Namespace) -> dict[str, Any]:
    return {
        'no_aug': args.no_aug,
        're_prob': args.reprob,
        're_mode': args.remode,
        're_count': args.recount,
        'train_crop_mode': args.train_crop_mode,
        'scale': args.scale,
        'ratio': args.ratio,
        'hflip': args.hflip,
        'vflip': args.vflip,
        'color_jitter': args.color_jitter,
        'color_jitter_prob': args.color_jitter_prob,
        'grayscale_prob': args.grayscale_prob or 0.0,
        'gaussian_blur_prob': args.gaussian_blur_prob or 0.0,
        'auto_augment': args.aa,
        'worker_seeding': args.worker_seeding,
    }


def _create_naflex_data(
    args: argparse.Namespace,
    datasets: tuple[Dataset | None, Dataset],
    config: dict[str, Any],
    student: nn.Module,
    runtime: Runtime,
) -> Data:
    """timm's NaFlex loaders: patches at native aspect ratio. Their draws are timm's own, seeded by epoch."""
    if not isinstance(student, NaFlexVit):
        raise UsageError(
            f'--naflex-loader needs a NaFlexVit (naflexvit_*, or --model-kwargs use_naflex=True), not {args.model}'
        )
    if args.naflex_patch_sizes and not student.embeds.enable_patch_interpolator:
        raise UsageError('--naflex-patch-sizes needs --model-kwargs enable_patch_interpolator=True')
    common = {
        'mean': config['mean'],
        'std': config['std'],
        'channels': config['input_size'][0],
        'num_workers': resolve_workers(args, datasets[1])[0],
        'distributed': runtime.distributed,
        'rank': runtime.rank,
        'world_size': runtime.world_size,
        'seed': args.seed,
        'pin_memory': args.pin_mem,
        'img_dtype': resolve_dtype(args.model_dtype) or torch.float32,
        'device': runtime.device,
        'use_prefetcher': not args.no_prefetcher,
        'persistent_workers': args.persistent_workers,
        'patchify_channels_last': not args.naflex_patchify_channels_first,
    }
    patch_size = student.embeds.patch_size
    train = None
    try:
        if datasets[0] is not None:
            train = create_naflex_loader(
                datasets[0],
                patch_size=None if args.naflex_patch_sizes else patch_size,
                patch_size_choices=args.naflex_patch_sizes,
                patch_size_choice_probs=args.naflex_patch_size_probs,
                train_seq_lens=args.naflex_train_seq_lens,
                batch_size=args.batch_size,
                is_training=True,
                mixup_fn=_create_naflex_mixup(args, student.num_classes) if mixing_active(args) else None,
                **_augmentation_args(args),
                interpolation=config['interpolation'] if args.no_aug else args.train_interpolation,
                **common,
            )
        evaluation = create_naflex_loader(
            datasets[1],
            patch_size=patch_size,
            max_seq_len=args.naflex_max_seq_len,
            batch_size=args.validation_batch_size or args.batch_size,
            is_training=False,
            interpolation=config['interpolation'],
            crop_pct=config['crop_pct'],
            **common,
        )
    except (AssertionError, ValueError, TypeError) as e:
        raise UsageError(f'NaFlex loader: {one_line(e)}') from e
    return Data(train, evaluation, None, config)


def _create_naflex_mixup(args: argparse.Namespace, num_classes: int) -> NaFlexMixup:
    return NaFlexMixup(
        num_classes=num_classes,
        mixup_alpha=args.mixup,
        cutmix_alpha=args.cutmix,
        switch_prob=args.mixup_switch_prob,
        prob=args.mixup_prob,
        label_smoothing=resolve_smoothing(args),
        mixup_off_epoch=args.mixup_off_epoch,
        multi_label=args.task == 'multilabel',
    )


def _create_eval_loader(args: argparse.Namespace, dataset: Dataset, config: dict[str, Any], runtime: Runtime) -> Any:
    return create_loader(
        dataset,
        input_size=config['input_size'],
        batch_size=args.validation_batch_size or args.batch_size,
        is_training=False,
        interpolation=config['interpolation'],
        crop_pct=config['crop_pct'],
        crop_mode=config['crop_mode'],
        persistent_workers=args.persistent_workers,
        **_common_loader_args(args, dataset, config, runtime),
    )


def _common_loader_args(
    args: argparse.Namespace, dataset: Dataset, config: dict[str, Any], runtime: Runtime
) -> dict[str, Any]:
    return {
        'mean': config['mean'],
        'std': config['std'],
        'num_workers': resolve_workers(args, dataset)[0],
        'distributed': runtime.distributed,
        'pin_memory': args.pin_mem,
        'device': runtime.device,
        'img_dtype': resolve_dtype(args.model_dtype) or torch.float32,
        'use_prefetcher': not args.no_prefetcher,
    }
