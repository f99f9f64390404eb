"""Unreadable images: timm replaces each by the next one; here they are counted, and the first ones are named.

So are images that are read with a warning, and those of more than 8 bits, which PIL cuts off.
"""

import contextlib
import io
import multiprocessing
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

from PIL import Image
from timm.data import ImageDataset
from timm.data.readers.reader import Reader

from ..errors import RunError
from ..process.files import hash_content

# a larger share of an epoch ends the run
_MAX_SHARE = 0.1
_FEW = 10
# at most so many of them are named
_NAMED = 5
# longest warning that is kept, in bytes
_MAX_WARNING = 300
# what is counted
Kind = Literal['unreadable', 'warned', 'wide']
KINDS: tuple[Kind, ...] = get_args(Kind)
# number of images, names of the first ones, what is said of the first
Taken = tuple[int, list[str], str]
# beginnings of PIL's modes of 16-bit and 32-bit integers and of floats
_WIDE = ('I', 'F')


class _Reads(Reader):
    """A reader that records the requested indices in `asked`; with `hashes` it also hashes the content it returns, with
    `looks` it tells the PIL mode of the image in the file.
    """

    def __init__(self, reader: Any, looks: bool):
        self.reader, self.looks = reader, looks
        self.asked: list[int] = []
        self.hashes, self.source = False, 0
        self.mode = ''

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        self.asked.append(index)
        file, *rest = self.reader[index]
        if self.hashes:
            with file:
                content = file.read()
            self.source = hash_content(content)
            file = io.BytesIO(content)
        self.mode = _look_at_mode(file) if self.looks else ''
        return file, *rest

    def __len__(self) -> int:
        return len(self.reader)

    def __getattr__(self, name: str) -> Any:
        if name.startswith('__') or name == 'reader':
            raise AttributeError(name)
        return getattr(self.reader, name)

    def _filename(self, index: int, basename: bool = False, absolute: bool = False) -> str:
        return self.reader._filename(index, basename, absolute)


def _look_at_mode(file: Any) -> str:
    """PIL mode of the image in an open file, which stays at its beginning; '' if it is unreadable.

    It reads the header alone, in 10 to 80 microseconds.
    """
    mode = ''
    with contextlib.suppress(OSError):
        mode = Image.open(file).mode
    file.seek(0)
    return mode


class _Tally:
    """Counts images over all loader processes, and keeps the indices of the first ones and what is to be said of the first."""

    def __init__(self) -> None:
        # their number, then indices
        self._count = multiprocessing.Array('q', 1 + _NAMED)
        self._text: Any = multiprocessing.Array('c', _MAX_WARNING)

    def add(self, index: int, text: str = '') -> None:
        """Count the image `index`."""
        with self._count.get_lock():
            if not self._count[0]:
                self._text.value = text.encode()[: _MAX_WARNING - 1]
            self._count[0] += 1
            if self._count[0] <= _NAMED:
                self._count[self._count[0]] = index

    def take(self, filename: Callable[[int], str]) -> Taken:
        """Number of images since the last call, names of the first ones, and what is said of the first."""
        with self._count.get_lock():
            number, *indices = self._count[: 1 + min(self._count[0], _NAMED)]
            self._count[0] = 0
        if not number:
            return 0, [], ''
        return number, [filename(index) for index in dict.fromkeys(indices)], self._text.value.decode(errors='ignore')


def _list(names: Sequence[str]) -> str:
    """The first names, in words."""
    first, *others = [f"'{name}'" for name in names[:_NAMED]]
    return f'{first}, then {", ".join(others)}' if others else first


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
            reader=_Reads(dataset.reader, looks=_cuts_off(dataset)),
            load_bytes=dataset.load_bytes,
            input_img_mode=dataset.input_img_mode,
            transform=dataset.transform,
            target_transform=dataset.target_transform,
            additional_features=dataset.additional_features,
        )
        self.replaced = False
        self._tallies = {kind: _Tally() for kind in KINDS}

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
                self._tallies['warned'].add(index, str(caught[0].message))
            if self.reader.mode.startswith(_WIDE) and len(self.reader.asked) == 1:
                self._tallies['wide'].add(index, self.reader.mode)
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
                # images tried in its place are counted when they are drawn themselves
                self._tallies['unreadable'].add(index)

    def take(self, kind: Kind) -> Taken:
        """The images of a kind since the last call: their number, names of the first ones, what is said of the first.

        That is of 'warned' the warning, of 'wide' the PIL mode, of 'unreadable' nothing.
        """
        return self._tallies[kind].take(self.filename)


def _cuts_off(dataset: ImageDataset) -> bool:
    """Whether a data set converts images to a mode of 8 bits."""
    return bool(dataset.input_img_mode and not dataset.input_img_mode.startswith(_WIDE) and not dataset.load_bytes)


def _counting(dataset: Any) -> Any:
    """The counting data set inside wrappers that hold it as `.dataset`; None if there is none."""
    while not isinstance(dataset, CountingImageDataset) and hasattr(dataset, 'dataset'):
        dataset = dataset.dataset
    return dataset if isinstance(dataset, CountingImageDataset) else None


def forget_unreadable(dataset: Any) -> None:
    """Reset the counts, after images were read outside of an epoch.

    Args:
        dataset: The data set, or what wraps it as `.dataset`.
    """
    counting = _counting(dataset)
    if counting is not None:
        for kind in KINDS:
            counting.take(kind)


def _take_of_ranks(dataset: Any, kind: Kind, gather: Callable[[Taken], list[Taken]]) -> Taken:
    """What `CountingImageDataset.take` gives, over all ranks."""
    counting = _counting(dataset)
    ranks = [rank for rank in gather(counting.take(kind) if counting is not None else (0, [], '')) if rank[0]]
    names = [name for _, names, _ in ranks for name in names]
    return sum(number for number, _, _ in ranks), names, ranks[0][2] if ranks else ''


def describe_warnings(dataset: Any, images: int, gather: Callable[[Any], list[Any]]) -> tuple[int, str]:
    """Number of images of a pass over a data set that were read with a warning or have more than 8 bits, and a message.

    Arguments as below.
    """
    lines = []
    warned, names, text = _take_of_ranks(dataset, 'warned', gather)
    if warned:
        lines.append(f"{warned} of {images} images were read with a warning, the first is '{names[0]}': {text}")
    wide, names, mode = _take_of_ranks(dataset, 'wide', gather)
    if wide:
        lines.append(
            f"{wide} of {images} images have more than 8 bits, the first is '{names[0]}' (mode {mode}): their values are "
            f'cut off, not scaled, to whole numbers from 0 to 255. Convert them to 8 bits.'
        )
    return warned + wide, '\n'.join(lines)


def describe_unreadable(dataset: Any, images: int, gather: Callable[[Any], list[Any]]) -> tuple[int, str]:
    """Number of unreadable images in a pass over a data set, and a message; '' if there were none.

    Args:
        dataset: The data set, or what wraps it as `.dataset`.
        images: Number of images requested, over all ranks.
        gather: Gives the value of each rank, as `Runtime.gather`.

    Raises:
        RunError: They are more than 10, and more than a tenth.
    """
    number, names, _ = _take_of_ranks(dataset, 'unreadable', gather)
    first = _list(names) if number else ''
    if number > max(_FEW, _MAX_SHARE * images):
        raise RunError(
            f'{number} of {images} images cannot be read, the first is {first}: are the disk and the files in order?'
        )
    if not number:
        return 0, ''
    return (
        number,
        f'{number} of {images} images could not be read and were replaced by other images, the first is {first}.',
    )
