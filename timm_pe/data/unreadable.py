"""Unreadable images: timm replaces each by the next one; here they are counted, and the first is named."""

import io
import multiprocessing
import warnings
from collections.abc import Callable
from typing import Any

from timm.data import ImageDataset
from timm.data.readers.reader import Reader

from ..errors import RunError
from ..process.files import hash_content

# a larger share of an epoch ends the run
_MAX_SHARE = 0.1
_FEW = 10
# longest warning that is kept, in bytes
_MAX_WARNING = 300


class _Reads(Reader):
    """A reader that records the requested indices in `asked`; with `hashes` it also hashes the content it returns."""

    def __init__(self, reader: Any):
        self.reader = reader
        self.asked: list[int] = []
        self.hashes, self.source = False, 0

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        self.asked.append(index)
        if not self.hashes:
            return self.reader[index]
        file, *rest = self.reader[index]
        with file:
            content = file.read()
        self.source = hash_content(content)
        return io.BytesIO(content), *rest

    def __len__(self) -> int:
        return len(self.reader)

    def __getattr__(self, name: str) -> Any:
        if name.startswith('__') or name == 'reader':
            raise AttributeError(name)
        return getattr(self.reader, name)

    def _filename(self, index: int, basename: bool = False, absolute: bool = False) -> str:
        return self.reader._filename(index, basename, absolute)


class CountingImageDataset(ImageDataset):
    """timm's ImageDataset that counts the unreadable images drawn, over all loader processes.

    Args:
        dataset: The data set to read; its reader, image mode and transforms are reused.

    Attributes:
        replaced: Whether the last image requested was replaced by another one.
        source: `hash_content` of the file that the last image was read from; 0 if files are not hashed.
    """

    def __init__(self, dataset: ImageDataset):
        super().__init__(
            '',
            reader=_Reads(dataset.reader),
            load_bytes=dataset.load_bytes,
            input_img_mode=dataset.input_img_mode,
            transform=dataset.transform,
            target_transform=dataset.target_transform,
            additional_features=dataset.additional_features,
        )
        self.replaced = False
        self._count = multiprocessing.Array('q', [0, -1])  # how many, index of the first
        self._warned = multiprocessing.Array('q', [0, -1])  # likewise for those that were read with a warning
        self._warning: Any = multiprocessing.Array('c', _MAX_WARNING)

    def hash_sources(self, wanted: bool) -> None:
        """Switch the hashing of each file on or off; the reader must return open files."""
        self.reader.hashes, self.reader.source = wanted, 0

    @property
    def source(self) -> int:
        """See the class."""
        return self.reader.source

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        self.reader.asked.clear()
        try:
            with warnings.catch_warnings(record=True) as caught:  # each worker would print them anew
                image = super().__getitem__(index)
            if caught:
                self._count_warning(index, str(caught[0].message))
            return image
        except RuntimeError as e:
            if len(self.reader.asked) == 1:
                raise
            first, number = self.reader.asked[0], len(self.reader.asked)
            raise RunError(
                f"{number} images in a row cannot be read, the first is '{self.filename(first)}': are the disk and the "
                f'files in order?'
            ) from e
        finally:
            self.replaced = len(self.reader.asked) > 1
            if self.replaced:
                with self._count.get_lock():
                    self._count[1] = index if not self._count[0] else self._count[1]
                    self._count[0] += 1  # images tried in its place are counted when they are drawn themselves

    def _count_warning(self, index: int, text: str) -> None:
        with self._warned.get_lock():
            if not self._warned[0]:
                self._warned[1], self._warning.value = index, text.encode()[: _MAX_WARNING - 1]
            self._warned[0] += 1

    def take_warnings(self) -> tuple[int, str, str]:
        """Number of images read with a warning since the last call, the name of the first, and its warning."""
        with self._warned.get_lock():
            number, first = self._warned[0], self._warned[1]
            self._warned[0] = 0
        return (number, self.filename(first), self._warning.value.decode(errors='ignore')) if number else (0, '', '')

    def take_count(self) -> tuple[int, str]:
        """Number of unreadable images since the last call, and the name of the first."""
        with self._count.get_lock():
            number, first = self._count[0], self._count[1]
            self._count[0] = 0
        return number, self.filename(first) if number else ''


def _counting(dataset: Any) -> Any:
    """The counting data set inside wrappers that hold it as `.dataset`; None if there is none."""
    while not hasattr(dataset, 'take_count') and hasattr(dataset, 'dataset'):
        dataset = dataset.dataset
    return dataset if hasattr(dataset, 'take_count') else None


def forget_unreadable(dataset: Any) -> None:
    """Reset the counts, after images were read outside of an epoch.

    Args:
        dataset: The data set, or what wraps it as `.dataset`.
    """
    counting = _counting(dataset)
    if counting is not None:
        counting.take_count()
        counting.take_warnings()


def describe_warnings(
    dataset: Any, images: int, gather: Callable[[Any], list[Any]] = lambda own: [own]
) -> tuple[int, str]:
    """Number of images read with a warning in a pass over a data set, and a message; arguments as below."""
    counting = _counting(dataset)
    said = counting.take_warnings() if counting is not None else (0, '', '')
    ranks = gather(said)
    number = sum(n for n, _, _ in ranks)
    if not number:
        return 0, ''
    _, first, text = next(rank for rank in ranks if rank[0])
    return number, f"{number} of {images} images were read with a warning, the first is '{first}': {text}"


def describe_unreadable(
    dataset: Any, images: int, gather: Callable[[Any], list[Any]] = lambda own: [own]
) -> tuple[int, str]:
    """Number of unreadable images in a pass over a data set, and a message; '' if there were none.

    Args:
        dataset: The data set, or what wraps it as `.dataset`.
        images: Number of images requested, over all ranks.
        gather: Gives a value of each rank, as `Runtime.gather`, if there are several.

    Raises:
        RunError: They are more than 10, and more than a tenth.
    """
    counting = _counting(dataset)
    counts = gather(counting.take_count() if counting is not None else (0, ''))
    number, first = sum(n for n, _ in counts), next((name for n, name in counts if n), '')
    if number > max(_FEW, _MAX_SHARE * images):
        raise RunError(
            f"{number} of {images} images cannot be read, the first is '{first}': are the disk and the files in order?"
        )
    if not number:
        return 0, ''
    return (
        number,
        f"{number} of {images} images could not be read and were replaced by other images, the first is '{first}'.",
    )
