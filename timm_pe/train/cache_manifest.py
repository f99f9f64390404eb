"""What the rows of a teacher cache depend on, and which fields they have: runs share a cache only where these agree."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from timm.data.auto_augment import RandAugment
from timm.utils import unwrap_model
from torch.utils.data import Dataset

from ..config.run_config import RunConfig
from ..config.teachers import OneTeacher
from ..data.fingerprint import hash_names, hash_pixels
from ..data.loaders import Data
from ..errors import UsageError, one_line
from ..method.teacher import Teacher
from ..method.weight_files import hash_tensors
from .from_run import teacher_settings
from .position import is_precision

FILE = 'manifest.json'
_FORMAT = 3
_PRECISION = 'teacher precision'
# entries that name a field of the rows: a run may read a cache that has more of them than it needs
_FIELDS = {'feature width': 'features', 'logits': 'logits', 'map': 'maps'}


def create_manifest(
    config: RunConfig, flags: OneTeacher, teacher: Teacher, data: Data, widths: Mapping[str, int | None]
) -> dict[str, Any]:
    """All that the teacher's outputs depend on: its weights and input, the images, their transforms and draws."""
    dataset = data.train.dataset
    size = data.config['input_size']
    height, width = teacher.size_for(torch.empty(1, *size, device=teacher.scale.device))
    return {
        'format': _FORMAT,
        'teacher': flags.name,
        'teacher arguments': teacher_settings(flags).kwargs,
        'teacher weights': hash_tensors(unwrap_model(teacher.model).state_dict()),
        'teacher input': f'{len(teacher.mean)}x{height}x{width}',
        'teacher mean': list(teacher.mean),
        'teacher std': list(teacher.std),
        'teacher norms folded': teacher.folded,
        'teacher tap': flags.tap,
        _PRECISION: teacher.precision,
        'feature width': widths['feature'],
        'logits': widths['logits'],
        'image size': list(size),
        'image precision': config.model_dtype or 'float32',
        'image mean': list(data.config['mean']),
        'image std': list(data.config['std']),
        'images': len(dataset),
        'image names': hash_names(dataset.dataset),
        'pixels': hash_pixels(dataset),
        'transform': _describe_transform(dataset.dataset),
        'seed': config.seed,
    }


def cached_precision(folder: str | None) -> str | None:
    """The teacher's precision in the cache of a folder; None if there is no cache, or none that can be read."""
    try:
        precision = json.loads((Path(folder or '') / FILE).read_text(encoding='utf-8'))[_PRECISION]
    except (OSError, ValueError, KeyError, TypeError):
        return None  # opening it says what is wrong with it
    return precision if is_precision(precision) else None


def check_manifest(folder: Path, manifest: Mapping[str, Any]) -> list[str]:
    """The fields that the rows in `folder` have beyond those of `manifest`, in words; nothing is written.

    Raises:
        UsageError: A folder that is not a cache, or one of another run (each difference is named).
    """
    path = folder / FILE
    try:
        there = json.loads(path.read_text(encoding='utf-8'))
    except FileNotFoundError:
        others = [p.name for p in sorted(folder.glob('[!.]*'))]
        if others:
            what = f'{others[0]} and no {FILE}, so it is no teacher cache: give another folder'
            if (folder / others[0] / FILE).exists():
                what = f'the caches of several teachers, {", ".join(others)}: give one of them'
            raise UsageError(f"--teacher-cache: '{folder}' holds {what}") from None
        return []
    except (OSError, ValueError) as e:
        raise UsageError(
            f"--teacher-cache: cannot read '{path}' ({one_line(e)}): give another folder, or delete it"
        ) from e
    there = there if isinstance(there, dict) else {}
    if 'format' in there and 'format' in manifest and there['format'] != manifest['format']:
        raise UsageError(
            f"--teacher-cache: '{folder}' was made by another version of timm_pe (format {there['format']}, this one: "
            f'{manifest["format"]}): give another folder, or delete it'
        )
    beyond = [name for name in _FIELDS if there.get(name) and not manifest.get(name)]
    other = {
        name
        for name, value in manifest.items()
        if name not in beyond and (name not in there or _differs(name, there[name], value))
    }
    if other & {'seed', 'transform'}:  # other pixels follow from them
        other.discard('pixels')
    differences = [
        f'{name} {_show(there.get(name), value)} there and {_show(value, there.get(name))} here'
        for name, value in manifest.items()
        if name in other
    ]
    if differences:
        raise UsageError(
            f"--teacher-cache: '{folder}' was filled by a run that differs from this one: "
            f'{"; ".join(differences)}: give another folder, or delete it'
        )
    return [_FIELDS[name] for name in beyond]


def _differs(name: str, there: Any, here: Any) -> bool:
    """Whether two values of a manifest are incompatible; pixels are only compared for files of the same bytes."""
    if name == 'pixels' and isinstance(there, list) and len(there) == len(here):
        return any(str(t).split()[:1] == h.split()[:1] and t != h for t, h in zip(there, here, strict=True))
    return there != here


def _show(value: Any, other: Any) -> str:
    """A value of a manifest for a message; of a transform only the lines that the other one lacks."""
    lines = isinstance(value, list) and isinstance(other, list) and all(isinstance(v, str) for v in [*value, *other])
    if lines and sorted(value) != sorted(other):
        return ' '.join(v for v in value if v not in other) or 'nothing'
    return str(value)


def _describe_transform(dataset: Dataset[Any]) -> list[str]:
    transform = getattr(dataset, 'transform', None)
    text = re.sub(r' at 0x[0-9a-f]+', '', repr(transform))
    lines = [line.strip() for line in text.splitlines()]
    for step in getattr(transform, 'transforms', []):
        if isinstance(step, RandAugment) and step.choice_weights is not None:  # which it does not tell
            lines.append(f'weights {list(step.choice_weights)}')
    return lines
