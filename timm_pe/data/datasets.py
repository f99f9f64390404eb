"""Opens data sets with timm.data and checks that their classes fit the run."""

import difflib
import io
import logging
import os
from collections import Counter
from collections.abc import Mapping
from typing import Any, cast

import numpy as np
from PIL import Image
from timm.data import ImageDataset, create_dataset
from timm.data.readers.class_map import load_class_map
from timm.data.readers.img_extensions import add_img_extensions, get_img_extensions
from timm.data.readers.reader import Reader
from torch.utils.data import Dataset, IterableDataset
from torchvision.datasets import VisionDataset

from ..config.flags import DataFlags
from ..config.rules import COLUMN_KINDS, FOLDER_KINDS, data_kind
from ..config.run_config import RunConfig
from ..errors import UsageError, one_line
from .beside import BesideReader, put_beside
from .folders import FolderReader, describe_ignored, find_split, image_endings, name_some, natural_key
from .unlabeled import check_unlabeled, create_unlabeled, reader_of
from .unreadable import CountingImageDataset

_logger = logging.getLogger(__name__)


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
# the start table names classes with fewer training images
FEW_IMAGES = 5


def _create_dataset(config: RunConfig, split: str, is_training: bool, in_chans: int) -> Dataset[Any]:
    dataset = _open_dataset(config, split, is_training, in_chans)
    if isinstance(dataset, VisionDataset):
        return _ConvertedDataset(dataset, _image_mode(config, in_chans))
    return CountingImageDataset(dataset) if type(dataset) is ImageDataset else dataset


class _ConvertedDataset(Dataset[Any]):
    """A data set of torchvision whose images are converted to a PIL mode, as timm's readers do by themselves."""

    def __init__(self, dataset: VisionDataset, mode: str):
        self.dataset, self.mode = dataset, mode
        self.transform: Any = None
        self.target_transform: Any = None

    def __getitem__(self, index: int) -> tuple[Any, Any]:
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


def _image_mode(flags: DataFlags, in_chans: int) -> str:
    return flags.input_img_mode or ('RGB' if in_chans == 3 else 'L')


def _check_channels(flags: DataFlags, in_chans: int) -> None:
    if in_chans not in (1, 3) and not flags.input_img_mode:
        raise UsageError(f'the student has {in_chans} input channels: say with --input-img-mode how images become that')


def _open_dataset(config: RunConfig, split: str, is_training: bool, in_chans: int) -> Dataset[Any]:
    _check_channels(config, in_chans)
    mode = _image_mode(config, in_chans)
    if config.dataset.lower() in _BUILT_IN_READERS:
        return ImageDataset(config.root, reader=_BUILT_IN_READERS[config.dataset.lower()](split), input_img_mode=mode)
    root = config.root
    has_split_folders = _has_split_folders(config)
    if has_split_folders:
        root = find_split(root, split) or root
    # timm accepts more types for these two than its annotations say
    extra: dict[str, Any] = {'class_map': config.class_map, 'repeats': config.epoch_repeats if is_training else 0}
    if '/' in config.dataset:
        extra['trust_remote_code'] = config.dataset_trust_remote_code
    if config.target_format:
        extra['target_format'] = config.target_format
    try:
        if has_split_folders and not _is_torch_folder(config):
            endings = frozenset(filter(None, (config.input_key or '').split(';')))
            reader = FolderReader(root, config.class_map, config.class_depth, endings)
            dataset: Dataset[Any] = ImageDataset(root, reader=reader, input_img_mode=mode)
        else:
            if config.class_map and data_kind(config) in COLUMN_KINDS:
                extra['class_map'] = _ClassMap(config.class_map, load_class_map(config.class_map, root))
            add_img_extensions(sorted(image_endings() - get_img_extensions(as_set=True)))  # for tar files
            dataset = create_dataset(
                config.dataset,
                root=root,
                split=split,
                search_split=False,
                is_training=is_training,
                download=config.dataset_download,
                batch_size=config.batch_size,
                seed=config.seed,
                input_img_mode=mode,
                input_key=config.input_key,
                target_key=config.target_key,
                num_samples=config.train_num_samples if is_training else config.val_num_samples,
                **extra,
            )
    except UsageError:
        raise
    except Exception as e:
        raise UsageError(
            f"cannot open data set '{config.dataset or config.root}', split '{split}': {one_line(e)}"
        ) from e
    if data_kind(config) in FOLDER_KINDS and not config.class_map:
        _check_class_order(dataset)
    return dataset


class _ClassMap(dict[Any, int]):
    """A class map that says what it lacks, in whichever process it is asked."""

    def __init__(self, path: str, classes: Mapping[Any, int]):
        super().__init__(classes)
        self.path = path

    def __missing__(self, label: Any) -> int:
        known = ', '.join(map(repr, list(self)[:3]))
        raise UsageError(
            f"--class-map: '{self.path}' has no class {label!r}, which the data has; its first are {known}"
        )


def _is_torch_folder(flags: DataFlags) -> bool:
    return flags.dataset.lower() in ('torch/image_folder', 'torch/folder')


def _has_split_folders(flags: DataFlags) -> bool:
    """Whether the splits of the data set are folders of class folders."""
    is_folder = data_kind(flags) in FOLDER_KINDS or _is_torch_folder(flags)
    return is_folder and os.path.isdir(flags.root)


def _check_class_order(dataset: Dataset[Any]) -> None:
    """Refuse class folders that timm's sort treats as equal: it sorts a set, so their order varies by process."""
    names: dict[tuple[Any, ...], str] = {}
    for name in sorted(class_map_of(dataset) or ()):
        first = names.setdefault(tuple(natural_key(name)), name)
        if first != name:
            raise UsageError(
                f"class folders '{first}' and '{name}' are equal to timm, which sorts without case and leading zeros, so their "
                f'labels would be a matter of chance: rename one of them, or give all in their order with --class-map'
            )


def check_data(flags: DataFlags) -> None:
    """Refuse missing data, before anything is built or fetched.

    Raises:
        UsageError: No such folder, or an unknown kind of data set.
    """
    if not flags.has_labels:
        check_unlabeled(flags.unlabeled)
        return
    name, root = flags.dataset.lower(), flags.root
    if name in _BUILT_IN_READERS:
        return
    if '/' not in name:
        if not root and not name:
            raise UsageError('no data: give a folder, or --dataset NAME (try --dataset sklearn/digits)')
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
        raise UsageError(f"unknown data set '{flags.dataset}'{hint} Known: {known}, or a folder of images")


def create_datasets(config: RunConfig, in_chans: int = 3) -> tuple[Dataset[Any] | None, Dataset[Any]]:
    """Open the training split (None if the run only evaluates) and the validation split; of --unlabeled, the part held out.

    Args:
        config: Run settings.
        in_chans: Channels that the student sees: 3 reads images as RGB, 1 as grey.

    Raises:
        UsageError: No such data, no images, or splits whose classes differ.
    """
    if not config.has_labels:
        _check_channels(config, in_chans)
        return create_unlabeled(config, _image_mode(config, in_chans))
    _check_split_folders(config)
    train = None if config.evaluate else _create_dataset(config, config.train_split, True, in_chans)
    evaluation = _create_dataset(config, config.val_split, False, in_chans)
    _check_splits(train, evaluation)
    if config.unlabeled and train is not None:
        train = put_beside(config, train, evaluation)
    return train, evaluation


def _check_split_folders(config: RunConfig) -> None:
    """Refuse a data folder that has only some of its splits: the whole folder would be used for a missing one."""
    if data_kind(config) in FOLDER_KINDS and os.path.isfile(config.root) and not config.evaluate:
        _logger.warning(f"'{config.root}' is one file: training and validation use the SAME images.")
    if not _has_split_folders(config):
        return
    root, splits = config.root, [config.val_split] if config.evaluate else [config.train_split, config.val_split]
    found = {split: find_split(root, split) for split in splits}
    missing = [split for split, folder in found.items() if folder is None]
    known = [folder for name in ('train', 'validation', 'test') if (folder := find_split(root, name))]
    if len(missing) == len(splits) and not known:
        if not config.evaluate:
            path = os.path.abspath(root)
            _logger.warning(f"No split folders in '{path}': training and validation use the SAME images.")
    elif missing:
        others = [os.path.basename(folder) for folder in known if folder not in found.values()]
        flag = '--val-split' if missing[0] == config.val_split else '--train-split'
        hint = f'; {flag} {others[-1]} takes that one' if others else ''
        held = sorted(name for name in os.listdir(root) if not name.startswith('.'))
        raise UsageError(f"no folder for split '{missing[0]}' in '{root}': it has {name_some(held)}{hint}")


def _check_splits(train: Dataset[Any] | None, evaluation: Dataset[Any]) -> None:
    if train is None:
        return
    classes, eval_classes = class_map_of(train), class_map_of(evaluation)
    if not classes or not eval_classes or classes == eval_classes:
        return
    only = sorted(set(classes).symmetric_difference(eval_classes))
    moved = [n for n in classes if classes[n] != eval_classes.get(n)]
    differ = (
        f'{name_some(only)} in one of them only'
        if only
        else f'{moved[0]} is {classes[moved[0]]} in one and {eval_classes[moved[0]]} in the other'
    )
    raise UsageError(
        f'training and validation split have different classes, so their labels would not mean the same: '
        f'{differ} ({len(classes)} and {len(eval_classes)} classes){_describe_empty(train, evaluation)}'
    )


def warn_of_empty_classes(train: Dataset[Any]) -> None:
    """Name class folders of the training split that hold no image: the student does not have these classes."""
    reader = _folder_reader(train)
    lost = [name for name in reader.empty if name not in reader.class_to_idx] if reader is not None else []
    if lost:
        _logger.warning(f"No image in class folder {name_some(lost)} of '{reader.root}': it is no class.")


def _describe_empty(*datasets: Dataset[Any] | None) -> str:
    """Class folders without an image, and why, as the end of an error message; '' if there are none."""
    said = []
    for reader in filter(None, map(_folder_reader, datasets)):
        if reader.empty:
            ignored = f' ({describe_ignored(reader.ignored)})' if reader.ignored else ''
            said.append(f"no image in class folder {name_some(reader.empty)} of '{reader.root}'{ignored}")
    return ''.join(f'; {words}' for words in said)


def _folder_reader(dataset: Any) -> Any:
    """The `FolderReader` in a data set; None if it has none."""
    while dataset is not None:
        reader = getattr(dataset, 'reader', None)
        if hasattr(reader, 'ignored'):
            return reader
        dataset = getattr(dataset, 'dataset', None)
    return None


def class_sizes(dataset: Any) -> dict[str, int] | None:
    """Images of each class by its name, the smallest class first; None if that takes reading all images."""
    names = class_map_of(dataset)
    while dataset is not None:
        for part in (getattr(dataset, 'reader', None), dataset):
            targets = getattr(part, 'targets', None)
            samples = getattr(part, 'samples', None)
            if targets is None and isinstance(samples, list):
                targets = [target for _, target in samples]
            if targets is not None and names:
                counts = Counter(map(int, targets))
                sizes = {name: counts[index] for name, index in names.items()}
                return dict(sorted(sizes.items(), key=lambda item: item[1]))
        dataset = getattr(dataset, 'dataset', None)
    return None


def read_whole_on_each_rank(dataset: IterableDataset[Any]) -> None:
    """Make a stream yield all its images on each rank, instead of a share that repeats some and omits others.

    timm's readers cut each rank's share to the mean length, because shards differ in length and all ranks must have the
    same number of training batches. Validation does not need that: its metrics must count each image once.
    """
    reader = cast(Any, dataset).reader
    reader.dist_rank, reader.dist_num_replicas = 0, 1


def count_images(dataset: Any) -> int:
    """Number of images of a data set; for a stream, as described: its length is rounded for the loader processes."""
    described = getattr(getattr(dataset, 'reader', None), 'num_samples', None)
    return int(described) if described and isinstance(dataset, IterableDataset) else len(dataset)


def describe_data(train: Dataset[Any], evaluation: Dataset[Any]) -> list[tuple[str, str]]:
    """Rows of the start table about the data: its size, and what was left out.

    Args:
        train: Training split.
        evaluation: Validation split.
    """
    sizes = class_sizes(train)
    beside = reader_of(train, BesideReader)
    number = count_images(train) if beside is None else beside.num_labeled
    images = f'{number} training, {count_images(evaluation)} validation images'
    rows = [('data', f'{images} of {len(sizes)} classes' if sizes else images)]
    if sizes:
        (small, least), (large, most) = next(iter(sizes.items())), list(sizes.items())[-1]
        spread = f'{least} each' if least == most else f'{least} ({small}) to {most} ({large})'
        rows.append(('class sizes', f'{spread}, training images'))
        few = [f'{name} ({size})' for name, size in sizes.items() if size < FEW_IMAGES]
        if few:
            rows.append((f'fewer than {FEW_IMAGES}', name_some(few)))
    reader = _folder_reader(train)
    if reader is not None and reader.is_deep:
        deep = next(os.path.relpath(os.path.dirname(path), reader.root) for path, _ in reader.samples)
        rows.append(('class folders', f"the innermost ('{deep}' is one); --class-depth takes another level"))
    for split, dataset in (('training', train), ('validation', evaluation)):
        reader = _folder_reader(dataset)
        if reader is not None and reader.empty:
            rows.append(('no image in', f'{name_some(reader.empty)} ({split})'))
        if reader is not None and reader.ignored:
            rows.append(('left out', f'{describe_ignored(reader.ignored)} ({split})'))
    return rows


def class_map_of(dataset: Dataset[Any] | None) -> dict[str, int] | None:
    """The class map of a data set, name -> index in the order of the indices; None if unknown.

    Args:
        dataset: The data set, or a wrapper that holds it as `.dataset`.
    """
    while dataset is not None:
        for part in (getattr(dataset, 'reader', None), dataset):
            # timm's reader of tar files has another name for it
            classes = getattr(part, 'class_to_idx', None) or getattr(part, 'class_name_to_idx', None)
            if classes:
                return {str(name): int(classes[name]) for name in sorted(classes, key=lambda name: classes[name])}
        dataset = getattr(dataset, 'dataset', None)
    return None


def describe_other_class(then: Mapping[str, int] | None, now: Mapping[str, int] | None) -> str:
    """The first class in which two class maps differ, in words; '' if they are equal or one is unknown."""
    if not then or not now or then == now:
        return ''
    name = next(n for n in {**then, **now} if then.get(n) != now.get(n))
    return f'class {name!r} {then.get(name, "of no class")} then, {now.get(name, "of no class")} now'


def count_classes(dataset: Dataset[Any] | None) -> int | None:
    """Number of classes of a data set, None if unknown."""
    class_to_idx = class_map_of(dataset)
    if class_to_idx:
        return max(class_to_idx.values()) + 1
    classes = getattr(dataset, 'classes', None)
    return len(classes) if classes else None


def check_num_classes(datasets: tuple[Dataset[Any] | None, Dataset[Any]], num_classes: int, given: bool) -> None:
    """Refuse a student whose number of classes does not fit the data.

    Args:
        datasets: Training split or None, and validation split.
        num_classes: The student's number.
        given: Whether --num-classes was given; then the two must be equal, else the student's weights may have more.

    Raises:
        UsageError: They don't fit.
    """
    classes = count_classes(datasets[1])
    if classes is None or classes == num_classes or not num_classes:  # without a classifier any do
        return
    if given or classes > num_classes:
        advice = _describe_empty(*datasets) or (f': --num-classes {classes} fits, or none' if given else '')
        raise UsageError(f'the data set has {classes} classes and the student {num_classes}{advice}')
    _logger.warning(f'The student has the {num_classes} classes of its weights, the data set has {classes}.')
