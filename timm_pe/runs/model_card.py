"""The model card of a student: what README.md says of it, for timm's `generate_readme`."""

import os
import re
from collections.abc import Iterable
from typing import Any, cast

import timm
import torch

from ..config.derive import ranked_by
from ..config.run_config import RunConfig
from ..train.checkpoints import best_epoch
from ..train.console import count_params
from ..train.evaluate import format_metrics
from ..version import __version__
from .compare import Run, command, describe_method, format_command
from .student import Student

_CITATION = """\
@inproceedings{chen2022improved,
  title={Improved Feature Distillation via Projector Ensemble},
  author={Chen, Yudong and Wang, Sen and Liu, Jiajun and Xu, Xuwei and de Hoog, Frank and Huang, Zi},
  booktitle={Advances in Neural Information Processing Systems},
  year={2022}
}"""


def model_card(student: Student, license: str) -> dict[str, Any]:
    """What timm's `generate_readme` makes the README.md of.

    What a user typed stands in code spans and code blocks, where neither Markdown nor HTML is read.

    Args:
        student: The student.
        license: Identifier of the licence of its weights.
    """
    run, args = student.run, student.run.args
    details = {
        'Architecture': f'{_code(student.architecture)}, {count_params(student.model):,} parameters',
        'Classes': str(student.model.num_classes),
        'Input': f'{"x".join(map(str, student.data_config["input_size"]))}, mean {_numbers(student.data_config["mean"])}, '
        f'std {_numbers(student.data_config["std"])}',
        'Teacher': _code(_shown(run.teacher)) if run.teacher else 'none',
        'Method': _code(describe_method(run)),
        'Data': _code(args['dataset'] or _shown(args['data'] or args['data_dir'] or '')),
        'Validation': _best_metrics(run, cast(int, student.model.num_classes)),
        'Trained with': f'timm_pe {__version__}, timm {timm.__version__}, torch {torch.__version__}',
    }
    need = '' if student.package == 'timm' else f'import {student.package}  # registers the architecture\n'
    usage = f"import timm\n{need}\nmodel = timm.create_model('local-dir:FOLDER', pretrained=True).eval()"
    notes = 'For a repository on the hub the name is `hf-hub:OWNER/NAME`.'
    if need:
        notes += f' The architecture is not one of timm: `import {student.package}` is needed before.'
    chunks = [[word if word.startswith('-') else _shown(word) for word in chunk] for chunk in command(run)]
    taught = ', taught by another network' if run.teacher else ''
    card = {
        'license': license,
        'tags': ['image-classification', 'timm', *(['knowledge-distillation'] if run.teacher else [])],
        'description': f'A student trained with timm_pe{taught}.',
        'details': details,
        'usage': f'{_block(usage, "python")}\n\n{notes}\n\n'
        f'## Training\n{_block(format_command(chunks), "sh")}\n\nAbsolute paths are shown by their last part.',
    }
    return {**card, 'citation': _CITATION} if args.get('teacher') else card


def _best_metrics(run: Run, num_classes: int) -> str:
    """Validation metrics of the epoch whose weights student.safetensors holds.

    That is the one of model_best.pth.tar. Where that file is gone: the best row, the first of equals.
    """
    name = ranked_by(RunConfig(**run.args))
    rows = [row for row in run.rows if row.get(f'eval_{name}') is not None]
    if not rows:
        return 'not validated'
    sign = -1 if name == 'loss' else 1
    best = max(rows, key=lambda row: sign * cast(float, row[f'eval_{name}']))
    of = next((row for row in rows if row['epoch'] == best_epoch(run.folder)), best)
    which = 'the best' if of[f'eval_{name}'] == best[f'eval_{name}'] else 'one'
    metrics = {k.removeprefix('eval_'): v for k, v in of.items() if k and k.startswith('eval_') and v is not None}
    last = rows[-1][f'eval_{name}']
    shown = format_metrics({'loss': float('nan'), **metrics}, num_classes).replace('  ', ', ')
    return f'{shown} (epoch {of["epoch"]:.0f}, {which} of {len(rows)} validated by {name}; the last one has {last:.3f})'


def _shown(path: str) -> str:
    """A path without the folders it lies in: they are nobody's business on a hub."""
    return os.path.basename(os.path.normpath(path)) if '/' in path and os.path.isabs(path.split(':')[-1]) else path


def _numbers(values: Iterable[float]) -> str:
    return ' '.join(f'{v:.4g}' for v in values)


def _fence(text: str, least: int) -> str:
    return '`' * max(least, 1 + max(map(len, re.findall('`+', text)), default=0))


def _code(text: str) -> str:
    text = ' '.join(text.split())
    fence = _fence(text, 1)
    return f'{fence} {text} {fence}' if '`' in text else f'{fence}{text}{fence}'


def _block(text: str, language: str) -> str:
    fence = _fence(text, 3)
    return f'{fence}{language}\n{text}\n{fence}'
