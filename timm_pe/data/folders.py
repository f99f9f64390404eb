"""Image folders: which folder is a split, which files are images, which folder is the class, and what is left out."""

import functools
import os
import re
from collections import Counter
from typing import Any

from PIL import Image
from timm.data.readers.class_map import load_class_map
from timm.data.readers.reader import Reader

from ..errors import UsageError

# formats that PIL registers but cannot decode by itself, or that are not still images
_NOT_SHOWN = ('BUFR', 'EPS', 'GRIB', 'HDF5', 'MPEG', 'WMF')
# alternative names of a split, as in timm
_SAME_SPLIT = (('train', 'training'), ('val', 'valid', 'validation', 'eval', 'evaluation'))
# most names in a message
_MAX_NAMES = 8


@functools.cache
def image_endings() -> frozenset[str]:
    """Extensions of the files that PIL can decode, in lower case and with their dot."""
    Image.init()
    shown = (e for e, kind in Image.registered_extensions().items() if kind in Image.OPEN and kind not in _NOT_SHOWN)
    return frozenset(shown)


def find_split(root: str, split: str) -> str | None:
    """The folder of a split: by its name, else by another name that timm knows for it, else ignoring letter case.

    Args:
        root: Folder of the data set.
        split: Name of the split.

    Returns:
        Its path, or None if there is none.

    Raises:
        UsageError: Several folders differ from it only in letter case.
    """
    name = split.split('[')[0]
    names = [name, *next((names for names in _SAME_SPLIT if name.lower() in names), ())]
    for candidate in names:
        if os.path.isdir(os.path.join(root, candidate)):
            return os.path.join(root, candidate)
    if not os.path.isdir(root):
        return None
    folders = sorted(entry for entry in os.listdir(root) if os.path.isdir(os.path.join(root, entry)))
    for candidate in names:
        found = [folder for folder in folders if folder.lower() == candidate.lower()]
        if len(found) > 1:
            raise UsageError(f"'{root}' has {' and '.join(found)} for split '{split}': name the one to take")
        if found:
            return os.path.join(root, found[0])
    return None


def natural_key(name: str) -> list[int | str]:
    """timm's key to sort names by, with numbers in them as numbers.

    timm's own fails for names with digits that are no numbers, as '²1.png'.
    """
    return [int(part) if part.isdecimal() else part for part in re.split(r'(\d+)', name.lower())]


def scan_folder(root: str, endings: frozenset[str], ignored: Counter[str]) -> tuple[list[str], list[str]]:
    """Images anywhere below a folder, and folders without subfolders, both relative to it.

    Args:
        root: The folder.
        endings: Endings of images, with their dots.
        ignored: Counts the files left out, by kind.
    """
    images, innermost = [], []
    for path, subfolders, files in os.walk(root, followlinks=True):
        for name in [n for n in subfolders if n.startswith('.') or n == '__MACOSX']:
            subfolders.remove(name)
            ignored['hidden'] += sum(len(inside) for _, _, inside in os.walk(os.path.join(path, name)))
        subfolders[:] = [n for n in subfolders if not _leads_back(os.path.join(path, n))]
        folder = '' if path == root else os.path.relpath(path, root)
        if folder and not subfolders:
            innermost.append(folder)
        for name in files:
            ending = os.path.splitext(name)[1].lower()
            if name.startswith('.'):
                ignored['hidden'] += 1
            elif ending in endings:
                images.append(os.path.join(folder, name))
            else:
                ignored[ending or 'without ending'] += 1
    return images, innermost


class FolderReader(Reader):
    """Images anywhere below a folder, each labelled by the name of a folder above it.

    Classes and images are those of timm's ReaderImageFolder, in its order wherever that is deterministic. Hidden files
    and folders are left out.

    Args:
        root: The folder.
        class_map: File with the classes in their order, '' for the order of their names.
        class_depth: Level of the folder below `root` that is the class; None means the innermost.
        endings: Endings of images, with their dots.

    Attributes:
        samples: Path and label of each image.
        class_to_idx: Label of each class name.
        ignored: Number of files left out, by kind: an ending, 'hidden', 'of no class'.
        empty: Class folders without an image.
        is_deep: Whether the innermost folder is the class and one lies in another folder.

    Raises:
        UsageError: No images, images that lie in no class folder, or class folders that would be merged or split.
    """

    def __init__(
        self, root: str, class_map: str = '', class_depth: int | None = None, endings: frozenset[str] = frozenset()
    ):
        super().__init__()
        self.root = root
        self.ignored: Counter[str] = Counter()
        images, folders = scan_folder(root, endings or image_endings(), self.ignored)
        if not images:
            left_out = f' ({describe_ignored(self.ignored)})' if self.ignored else ''
            raise UsageError(f"no images in '{root}'{left_out}: put those of each class into a folder of its name")
        holds_images = {os.path.dirname(image) for image in images}
        label_of = {folder: _class_of(folder, class_depth) for folder in holds_images}
        named = load_class_map(class_map, root) if class_map else None
        self._check_classes(images, {f for f in holds_images if named is None or label_of[f] in named}, class_depth)
        self.is_deep = class_depth is None and any(os.path.dirname(folder) for folder in holds_images)
        self.class_to_idx = named or {n: i for i, n in enumerate(sorted(set(label_of.values()), key=natural_key))}
        self.samples: list[tuple[str, int]] = []
        for image in sorted(images, key=lambda image: (natural_key(image), image)):
            label = label_of[os.path.dirname(image)]
            if label in self.class_to_idx:
                self.samples.append((os.path.join(root, image), self.class_to_idx[label]))
            else:
                self.ignored['of no class'] += 1
        if not self.samples:
            raise UsageError(f"no image in '{root}' is of a class that '{class_map}' names")
        self.empty = sorted(folder for folder in folders if not holds_images.intersection(_with_parents(folder)))

    def _check_classes(self, images: list[str], folders: set[str], class_depth: int | None) -> None:
        if '' in folders:
            image = min(image for image in images if not os.path.dirname(image))
            raise UsageError(
                f"'{image}' in '{self.root}' lies in no class folder: put the images of each class into a folder of its name"
            )
        if class_depth is not None:
            high = sorted(folder for folder in folders if len(folder.split(os.sep)) < class_depth)
            if high:
                raise UsageError(
                    f"--class-depth {class_depth}: '{high[0]}' in '{self.root}' holds images above that level, so they have no class"
                )
            return
        by_name: dict[str, str] = {}
        for folder in sorted(folders):
            for parent in _with_parents(folder)[1:]:
                if parent in folders:
                    raise UsageError(
                        f"'{parent}' and '{folder}' in '{self.root}' both hold images, so '{os.path.basename(folder)}' would be a "
                        f'class of its own (the innermost folder is the class): --class-depth {len(parent.split(os.sep))} '
                        f"makes it '{os.path.basename(parent)}', else move the images"
                    )
            other = by_name.setdefault(os.path.basename(folder), folder)
            if other != folder:
                raise UsageError(_describe_merged(self.root, other, folder))

    def __getitem__(self, index: int) -> tuple[Any, int]:
        path, target = self.samples[index]
        return open(path, 'rb'), target

    def __len__(self) -> int:
        return len(self.samples)

    def _filename(self, index: int, basename: bool = False, absolute: bool = False) -> str:
        path = self.samples[index][0]
        if basename:
            return os.path.basename(path)
        return path if absolute else os.path.relpath(path, self.root)


def _class_of(folder: str, class_depth: int | None) -> str:
    parts = folder.split(os.sep)
    return parts[-1 if class_depth is None else min(class_depth, len(parts)) - 1]


def _with_parents(folder: str) -> list[str]:
    """A relative folder and its parents, without the root."""
    parts = folder.split(os.sep)
    return [os.sep.join(parts[:n]) for n in range(len(parts), 0, -1)]


def _leads_back(path: str) -> bool:
    """Whether a folder is a symlink to one of its parents, which would be walked endlessly."""
    if not os.path.islink(path):
        return False
    here, there = os.path.realpath(os.path.dirname(path)), os.path.realpath(path)
    return os.path.commonpath([here, there]) == there


def _describe_merged(root: str, a: str, b: str) -> str:
    parts = a.split(os.sep), b.split(os.sep)
    level = next(n for n, (x, y) in enumerate(zip(*parts, strict=False)) if x != y)
    ways = f"--class-depth {level + 1} makes '{parts[0][level]}' and '{parts[1][level]}' the classes"
    if len(parts[0]) == len(parts[1]):
        ways += f", --class-depth {len(parts[0])} makes it one '{parts[0][-1]}'"
    return f"'{a}' and '{b}' in '{root}' would be one class (the innermost folder is the class): {ways}"


def describe_ignored(ignored: Counter[str]) -> str:
    """Files that were left out, in a few words: '7 files ignored: 4 .txt, 3 hidden'."""
    number = sum(ignored.values())
    kinds = [f'{count} {kind}' for kind, count in ignored.most_common(_MAX_NAMES)]
    return f'{number} file{"s" * (number != 1)} ignored: {_listed(kinds, len(ignored))}'


def _listed(shown: list[str], number: int) -> str:
    return ', '.join(shown) + (f' and {number - len(shown)} more' if number > len(shown) else '')


def name_some(names: list[str]) -> str:
    """Names joined by commas, only the first ones if there are many."""
    return _listed(names[:_MAX_NAMES], len(names))
