"""The frozen teacher's outputs for each training image, kept in files and read instead of running it.

Augmentation is a function of (seed, view, image), so the outputs for K views of the images are computed once: epoch e
trains on view e mod K. The folder holds `manifest.json` with all that the outputs depend on, and for each view

    view-0.feature.npy         float16 [n, m], times the row's scale; likewise, if a loss reads them, view-0.logits.npy
                               [n, c] and view-0.map.npy [n, d * h * w]
    view-0.feature_scale.npy   float32 [n], powers of two: float16 has its full precision at any scale of the features
    view-0.source.npy          uint64 [n], hash of the image's file that the row was computed from
    view-0.done.npy            uint8 [n], 1 if the row is there

If images are files, `images.npy`, int64 [n, 2], has their sizes and modification times: only files that differ in these
are read and compared with `source`.
"""

import contextlib
import io
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.distributed as dist

from ..data.draws import IndexedTarget
from ..data.fingerprint import hash_files, stat_files
from ..errors import UsageError, one_line
from ..method.teacher import TeacherOutput
from .array_files import Mode, create_array, locked, open_array, write_whole
from .cache_manifest import FILE, check_manifest

_logger = logging.getLogger(__name__)

_FLUSH_EVERY_S = 30.0
# the largest value of a row is kept between 2^14 and 2^15, the upper end of float16
_EXPONENT = 15


@dataclass
class _View:
    """The open files of one view."""

    number: int
    rows: dict[str, np.memmap]
    done: np.memmap


class TeacherCache:
    """Features and logits of a teacher for n images in K views, in memory-mapped files filled on demand.

    Rows are float16, each with its own scale. A row has the same numbers when it is computed and when it is read later.

    Args:
        folder: Where the files are, or will be.
        manifest: All that the rows depend on, JSON values by name; a folder made with others is refused.
        num_images: n.
        widths: Numbers of each field of `TeacherOutput` that is kept: 'feature' m, 'logits' c, 'map' d * h * w.
        num_views: K. Views do not depend on each other: a folder may have more, or get more later.
        device: Device to which rows are moved.
        paths: The images' files, in the order of the rows; None if images are not files; changes then go unnoticed.
        map_shape: (d, h, w), if maps are kept.

    Attributes:
        counts: Number of rows of each view when the folder was last read.
        stale: Rows of each view in the folder whose image has changed since (see `find_changed`): they count as
            missing.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        manifest: Mapping[str, Any],
        num_images: int,
        widths: Mapping[str, int],
        num_views: int,
        device: torch.device,
        paths: Sequence[str] | None = None,
        map_shape: Sequence[int] = (),
    ):
        self.folder = Path(folder)
        self.manifest = json.loads(json.dumps(manifest, default=str))
        self.num_images, self.widths, self.num_views, self.device = num_images, dict(widths), num_views, device
        self.paths, self.map_shape = paths, tuple(map_shape)
        self.counts = [0] * num_views
        self.stale: dict[int, np.ndarray] = {}
        self._stats: np.ndarray | None = None
        self._mode: Mode | None = None
        self._view: _View | None = None
        self._pending: list[np.ndarray] = []
        self._flushed = time.monotonic()

    @property
    def is_complete(self) -> bool:
        """All rows of all views are there."""
        return all(count == self.num_images for count in self.counts)

    @property
    def num_bytes(self) -> int:
        """Bytes of the arrays of all views."""
        return self.num_views * sum(
            int(np.prod(shape)) * dtype.itemsize for _, shape, dtype in self._arrays(0).values()
        )

    def describe(self) -> str:
        """Sizes, place and state, on one line."""
        widths = ' + '.join(f'{w:,}' for w in self.widths.values())
        return (
            f'{self.num_views} view{"s" * (self.num_views > 1)} x {self.num_images:,} images x '
            f'{widths if len(self.widths) == 1 else f"({widths})"} float16, {_format_bytes(self.num_bytes)} in '
            f'{self.folder}, {sum(self.counts):,} of {self.num_views * self.num_images:,} rows there'
        )

    # Files --------------------------------------------------------------------------------------------------------------

    def look(self) -> None:
        """Read the state of the folder; nothing is written.

        Raises:
            UsageError: A folder that is not a cache, one of another run (each difference is named), damaged files, or
                missing rows of a cache whose rows have more than this run computes.
        """
        beyond = check_manifest(self.folder, self.manifest)
        self.counts = [self._count(view) - len(self.stale.get(view, ())) for view in range(self.num_views)]
        if self.is_complete:
            self._mode = 'r'
        elif self._mode == 'r':
            self._mode = None
        if beyond and not self.is_complete:  # a row that this run adds would have zeros for the rest
            number = self.num_views * self.num_images
            raise UsageError(
                f"--teacher-cache: '{self.folder}' keeps {' and '.join(beyond)} too, which this run does not compute, and "
                f'{number - sum(self.counts):,} of {number:,} rows are missing: fill it first with the flags that made it '
                f'(timm-pe precompute; images that it cannot read have to be mended), or give another folder'
            )

    def find_changed(self) -> None:
        """Set `stale` by comparing the contents of files whose sizes or times have changed; nothing is written.

        Raises:
            UsageError: Damaged files.
        """
        self.stale = {}
        if self.paths is None:
            return
        stats, known = stat_files(self.paths), np.full((self.num_images, 2), -1, np.int64)
        self._stats = stats
        path = self.folder / 'images.npy'
        if path.exists():
            known = open_array(path, known.shape, known.dtype, 'r', 'to have all images compared anew')
        # a file that is inaccessible now is compared when it is back
        away = stats[:, 0] < 0
        stats[away] = known[away]
        numbers = [int(p.name.split('.')[0].removeprefix('view-')) for p in self.folder.glob('view-*.done.npy')]
        views = {view: self._open_arrays(view, 'r') for view in numbers if self._has_files(view)}
        there = np.zeros(self.num_images, bool)
        for arrays in views.values():
            there |= arrays['done'] != 0
        differing = (known != stats).any(1)
        if not differing.any():
            self._stats = None  # nothing to keep
        differing = np.flatnonzero(differing & there)
        if not len(differing):
            return
        _logger.info(
            f'Teacher cache: comparing {len(differing):,} images whose files have other sizes or times than before.'
        )
        sources = hash_files([self.paths[i] for i in differing.tolist()])
        unread = differing[sources == 0]
        stats[unread] = known[unread]
        differing, sources = differing[sources != 0], sources[sources != 0]
        for view, arrays in views.items():
            changed = (arrays['done'][differing] != 0) & (arrays['source'][differing] != sources)
            if changed.any():
                self.stale[view] = differing[changed]

    def describe_stale(self) -> str:
        """How many images have changed, and the first; '' if none has."""
        if not self.stale or self.paths is None:
            return ''
        images = np.unique(np.concatenate(list(self.stale.values()))).tolist()
        first = f"the first is '{self.paths[images[0]]}'" if len(images) > 1 else f"'{self.paths[images[0]]}'"
        have = 'have' if len(images) > 1 else 'has'
        since = 'since their rows were computed' if len(images) > 1 else 'since its rows were computed'
        return f'{len(images):,} of {self.num_images:,} images {have} changed {since}, {first}'

    def _arrays(self, view: int) -> dict[str, tuple[Path, tuple[int, ...], np.dtype]]:
        """Path, shape and dtype of each file of a view, the flags last."""
        n = self.num_images
        described: dict[str, tuple[tuple[int, ...], type[np.generic]]] = {}
        for name, width in self.widths.items():
            described[name] = ((n, width), np.float16)
            described[f'{name}_scale'] = ((n,), np.float32)
        if self.paths is not None:
            described['source'] = ((n,), np.uint64)
        described['done'] = ((n,), np.uint8)
        return {
            name: (self.folder / f'view-{view}.{name}.npy', shape, np.dtype(dtype))
            for name, (shape, dtype) in described.items()
        }

    def _has_files(self, view: int) -> bool:
        return all(path.exists() for path, _, _ in self._arrays(view).values())

    def _count(self, view: int) -> int:
        if not self._has_files(view):
            return 0
        return int(np.count_nonzero(self._open_arrays(view, 'r')['done']))

    def _open_arrays(self, view: int, mode: Mode) -> dict[str, np.memmap]:
        return {name: open_array(*described, mode) for name, described in self._arrays(view).items()}

    def _open(self, view: int) -> _View:
        if self._view is None or self._view.number != view:
            self.flush()
            arrays = self._open_arrays(view, self._mode or 'r')
            self._view = _View(view, done=arrays.pop('done'), rows=arrays)
        return self._view

    def allocate(self) -> None:
        """Create the missing files at full size, so that a disk that is too small is an error before training.

        Raises:
            UsageError: They cannot be created; files that this call created are removed.
        """
        made = [] if self.folder.exists() else [self.folder]
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with locked(self.folder, made):
                self.look()  # another run may have been faster
                if not (self.folder / FILE).exists():
                    write_whole(self.folder / FILE, json.dumps(self.manifest, indent=2).encode(), made)
                for view in range(self.num_views):
                    if not self._has_files(view):
                        self._create_files(view, made)
                self._forget_stale(made)
        except OSError as e:
            if self.stale:
                raise UsageError(
                    f"--teacher-cache: {self.describe_stale()}, and '{self.folder}' cannot be written "
                    f'({e.strerror or one_line(e)}): make it writable, or give another folder'
                ) from e
            free = _free_bytes(self.folder)
            for path in reversed(made):
                with contextlib.suppress(OSError):
                    path.rmdir() if path.is_dir() else path.unlink()
            raise UsageError(
                f"--teacher-cache: cannot make the files of {_format_bytes(self.num_bytes)} in '{self.folder}' "
                f'({e.strerror or one_line(e)}; {free} free): make room, take fewer --teacher-cache-views, or give another '
                f'folder'
            ) from e

    def _create_files(self, view: int, made: list[Path]) -> None:
        arrays = self._arrays(view)
        # flags without rows would mark zeros as valid: flags are deleted first and created last
        arrays['done'][0].unlink(missing_ok=True)
        for path, shape, dtype in arrays.values():
            create_array(path, shape, dtype, made)

    def _forget_stale(self, made: list[Path]) -> None:
        """Clear the flags of the rows of changed images, and only then store the files' new sizes and times."""
        for view, rows in self.stale.items():
            done = self._open_arrays(view, 'r+')['done']
            done[rows] = 0
            done.flush()
        if self.stale:  # it has hashes of some of these images
            write_whole(self.folder / FILE, json.dumps(self.manifest, indent=2).encode(), made)
            _logger.warning(f'Teacher cache: {self.describe_stale()}: they are computed again.')
        self.keep_stats(made)
        self.stale = {}

    def keep_stats(self, made: list[Path]) -> None:
        """Keep the sizes and times of the files as `find_changed` saw them, so that they are not compared again.

        Args:
            made: Gets the file's path, for a caller that undoes what it made.

        Raises:
            OSError: It cannot be written.
        """
        if self._stats is not None:
            file = io.BytesIO()
            np.save(file, self._stats)
            write_whole(self.folder / 'images.npy', file.getvalue(), made)

    def open(self) -> None:
        """Open the cache to write missing rows (a complete cache is opened for reading).

        Raises:
            UsageError: Files that `allocate` should have made cannot be opened.
        """
        self.stale = {}  # `allocate` has unset their flags, for all ranks
        self.look()
        self._mode = self._mode or 'r+'
        self._open(0)

    # Rows ---------------------------------------------------------------------------------------------------------------

    def missing(self, view: int) -> np.ndarray:
        """Indices of the images that have no row in a view."""
        return np.flatnonzero(np.asarray(self._open(view).done) == 0)

    def __call__(self, target: IndexedTarget, compute: Callable[[], TeacherOutput]) -> TeacherOutput:
        """The teacher's output for a batch, in float32 on the device; fields that are not kept are None.

        Nothing here waits for the device unless rows are missing. Before `open` nothing is written.

        Args:
            target: Images and view. The output for an unreadable image, which shows another one, is never kept.
            compute: Runs the teacher on the batch; called if a row is missing, which is then kept.

        Raises:
            UsageError: Values that are not finite.
        """
        if self._mode is None:
            rows = {name: torch.from_numpy(values) for name, values in self._rounded(compute()).items()}
        else:
            view = self._open(target.view)
            replaced = target.index < 0
            missing = ~replaced & (np.asarray(view.done)[target.index] == 0)
            # the whole batch, for one shape (compile, cuDNN) and one rounding
            computed = self._rounded(compute()) if (missing | replaced).any() else {}
            if missing.any():
                kept = dict(computed)
                if self.paths is not None:  # an unknown hash is 0: the row is stale once its file's time changes
                    kept['source'] = np.zeros(len(missing), np.uint64) if target.sources is None else target.sources
                self._keep(view, target.index[missing], {k: v[missing] for k, v in kept.items()})
            rows = {name: self._take(array, target.index) for name, array in view.rows.items() if name != 'source'}
            for name, values in computed.items():
                rows[name][torch.from_numpy(replaced)] = torch.from_numpy(values[replaced])
        feature = cast(torch.Tensor, self._restored(rows, 'feature'))  # kept if a loss reads it
        flat = self._restored(rows, 'map')
        of_map = None if flat is None else flat.unflatten(1, self.map_shape)
        return TeacherOutput(feature, self._restored(rows, 'logits'), of_map)

    def _restored(self, rows: Mapping[str, torch.Tensor], name: str) -> torch.Tensor | None:
        """A field of the teacher's output; None if it is not kept."""
        if name not in self.widths:
            return None
        return self._to_device(rows[name]).mul_(self._to_device(rows[f'{name}_scale'])[:, None])

    def _take(self, array: np.ndarray, index: np.ndarray) -> torch.Tensor:
        """Rows of an array, copied once, for CUDA into pinned memory; below index 0 any row."""
        if self.device.type != 'cuda':
            return torch.from_numpy(np.take(np.asarray(array), index, axis=0, mode='clip'))
        dtype = torch.from_numpy(np.empty(0, array.dtype)).dtype
        out = torch.empty((len(index), *array.shape[1:]), dtype=dtype, pin_memory=True)
        np.take(np.asarray(array), index, axis=0, out=out.numpy(), mode='clip')
        return out

    def _to_device(self, rows: torch.Tensor) -> torch.Tensor:
        rows = rows.pin_memory() if self.device.type == 'cuda' else rows  # what is pinned stays as it is
        return rows.to(self.device, non_blocking=True).float()

    def _rounded(self, output: TeacherOutput) -> dict[str, np.ndarray]:
        rows = {}
        for name in self.widths:
            values = getattr(output, name).detach().float().flatten(1).cpu().numpy()
            if not np.isfinite(values).all():
                message = (
                    f"--teacher-cache: the teacher's {name} is not finite, and no run can learn from it: are the teacher's "
                    f'weights right, is --teacher-dtype wide enough?'
                )
                if dist.is_initialized() and dist.get_rank() > 0:
                    _logger.error(message)  # only this rank knows, and rank 0 prints the one-line errors
                raise UsageError(message)
            # a float32 below 2^-126 loses digits: no scale may be smaller
            exponents = np.maximum(np.frexp(np.abs(values).max(1))[1] - _EXPONENT, -126)
            rows[name] = np.ldexp(values, -exponents[:, None]).astype(np.float16)
            rows[f'{name}_scale'] = np.ldexp(np.float32(1), exponents)
        return rows

    def _keep(self, view: _View, index: np.ndarray, rows: dict[str, np.ndarray]) -> None:
        if self._mode == 'r':  # it was complete
            raise UsageError(
                f"--teacher-cache: another run has cleared {len(index)} rows of '{self.folder}' since this one began, as "
                f'their images have changed: start this one again'
            )
        for name, values in rows.items():
            view.rows[name][index] = values
        self._pending.append(index)
        if time.monotonic() - self._flushed > _FLUSH_EVERY_S:
            self.flush()

    def flush(self) -> None:
        """Write rows to the disk before setting their flags, so that no crash leaves a flag without its row."""
        self._flushed = time.monotonic()
        if not self._pending or self._view is None:
            return
        for array in self._view.rows.values():
            array.flush()
        self._view.done[np.concatenate(self._pending)] = 1
        self._view.done.flush()
        self._pending.clear()


def _format_bytes(number: float) -> str:
    units = ['B', 'kB', 'MB', 'GB', 'TB']
    while number >= 1000 and len(units) > 1:
        number /= 1000
        del units[0]
    return f'{number:.{0 if units[0] == "B" else 1}f} {units[0]}'


def _free_bytes(folder: Path) -> str:
    try:
        return _format_bytes(shutil.disk_usage(folder).free)
    except OSError:
        return 'unknown'
