"""One HTML file that compares finished runs: numbers, curves, what is inside the networks, pictures, commands.

    python -m timm_pe.report RUN [RUN ...] [-o report.html]

The file holds all that it shows, asks the network for nothing and runs no script. Runs without an analysis.json are analysed
first (`python -m timm_pe.analysis`).
"""

import argparse
import ast
import base64
import csv
import errno
import importlib.util
import io
import json
import math
import os
import re
import shlex
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

import jinja2
import yaml
from markupsafe import Markup
from PIL import Image
from safetensors import SafetensorError, safe_open

from .args import create_parser
from .args_yaml import read_yaml
from .cli import Parser
from .errors import UsageError, one_line
from .loading import RUN_FOLDER_FILES
from .task import TARGETS
from .version import __version__

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# what two runs of one method may differ in, next to their number in the name
_OF_A_SEED = ('seed', 'experiment')
# runs of one student, which a teacher is or is not added to
_OF_A_STUDENT = ('model', 'model_kwargs')
# what two of them must share for their difference to be the teacher's, next to the data folder
_OF_A_PAIR = (
    *('dataset', 'train_split', 'val_split', 'train_num_samples', 'val_num_samples', 'input_key', 'target_key'),
    *('input_img_mode', 'in_chans', 'img_size', 'input_size', 'crop_pct', 'interpolation', 'tta'),
    *('epochs', 'stop_epoch', 'batch_size', 'grad_accum_steps', 'num_classes', 'class_map', 'seed'),
)
# what the report takes from an analysis.json
_KEYS = {'checkpoint', 'epoch', 'validation', 'class_names', 'compared_with', 'calibration', 'samples'}


# Reading ---------------------------------------------------------------------------------------------------------------


@dataclass
class Run:
    """A run folder of train_distill, as far as its report needs it.

    Attributes:
        folder: Where it is.
        name: What the report calls it: the folder's name, with its parents' where two have the same.
        args: args.yaml.
        rows: summary.csv, a dict of numbers an epoch; None where an epoch has no value.
        analysis: analysis.json, or None.
    """

    folder: Path
    name: str
    args: dict[str, Any]
    rows: list[dict[str, float | None]]
    analysis: dict[str, Any] | None = None

    @property
    def validated(self) -> list[dict[str, float | None]]:
        """The rows of epochs that were validated."""
        return [row for row in self.rows if row.get('eval_top1') is not None]

    @property
    def final(self) -> dict[str, float | None]:
        """The last validated row; empty where there is none."""
        return self.validated[-1] if self.validated else {}

    @property
    def best(self) -> dict[str, float | None]:
        """The first row of the highest top-1; empty where none was validated."""
        return max(self.validated, key=lambda row: row['eval_top1'], default={})

    @property
    def exported(self) -> dict[str, float | None]:
        """The row of the epoch that student.safetensors and model_best are: the first of the best --eval-metric; empty without one."""
        metric = f'eval_{self.args.get("eval_metric") or "top1"}'
        sign = -1 if metric == 'eval_loss' else 1
        return max(self.validated, key=lambda row: sign * (row.get(metric) or 0), default={})

    @property
    def teacher(self) -> str | None:
        """Name of its teacher's model, None for a run without one."""
        return self.args.get('teacher') or self.args.get('kd_model_name')

    @cached_property
    def seconds(self) -> float | None:
        """From the start (args.yaml is written) to the end (summary.csv is), by the files' times.

        None for a resumed run, and where the times can't be those of the run: a copy, or a clone.
        """
        if self.args.get('resume'):
            return None
        seconds = (self.folder / 'summary.csv').stat().st_mtime - (self.folder / 'args.yaml').stat().st_mtime
        speeds = [row.get('train_images_per_s') or math.inf for row in self.rows]
        return seconds if seconds > sum(self.args.get('batch_size', 1) / speed for speed in speeds) else None

    @cached_property
    def params(self) -> int | None:
        """Parameters of the student: the analysis counted them, else the tensors of student.safetensors do."""
        if self.analysis and self.analysis.get('params'):
            return self.analysis['params']
        try:
            with safe_open(self.folder / 'student.safetensors', 'pt') as f:
                names = [n for n in f.keys() if 'running_' not in n and 'num_batches_tracked' not in n]  # noqa: SIM118
                return sum(math.prod(f.get_slice(n).get_shape()) for n in names)
        except (OSError, SafetensorError):
            return None


def read_runs(folders: Sequence[str | os.PathLike]) -> list[Run]:
    """The runs in `folders`, in that order.

    Raises:
        UsageError: No folder given, one given twice, or one that is no run folder (see `read_run`).
    """
    paths = [Path(os.path.abspath(folder)) for folder in folders]
    for i, path in enumerate(paths):
        if path in paths[:i]:
            raise UsageError(f"RUN '{folders[i]}' is given twice: give each run once")
    return [read_run(path, name) for path, name in zip(paths, _distinct_names(paths), strict=True)]


def _distinct_names(paths: Sequence[Path]) -> list[str]:
    """As many of the last parts of each path as tell it from the others."""
    names = []
    for path in paths:
        others = [p for p in paths if p != path]
        depth = next(n for n in range(1, len(path.parts) + 1) if all(p.parts[-n:] != path.parts[-n:] for p in others))
        names.append(''.join(c if c.isprintable() else '\ufffd' for c in '/'.join(path.parts[-depth:])))
    return names


def read_run(folder: Path, name: str) -> Run:
    """A run folder's args.yaml, summary.csv and, if it is there, analysis.json.

    Raises:
        UsageError: Not a run folder, files that can't be read, a run without epochs or of multi-label data.
    """
    missing = [file for file in ('args.yaml', 'summary.csv') if not (folder / file).is_file()]
    if missing:
        raise UsageError(f"RUN '{folder}' is no run folder of train_distill: it has no {' and no '.join(missing)}")
    try:
        args = read_yaml(str(folder / 'args.yaml'))
        rows = _read_summary(folder / 'summary.csv')
        analysis = _read_analysis(folder, rows) if rows else None
    except (OSError, csv.Error, ValueError, TypeError) as e:
        raise UsageError(f"RUN '{folder}' cannot be read: {one_line(e, 160)}") from e
    if args.get('task') == 'multilabel':
        raise UsageError(f"RUN '{folder}' is of --task multilabel: the report compares top-1, which it does not have")
    if not rows:
        raise UsageError(f"RUN '{folder}': summary.csv holds no epoch yet, train at least one")
    return Run(folder, name, args, rows, analysis)


def _read_summary(path: Path) -> list[dict[str, float | None]]:
    with open(path, newline='', encoding='utf-8') as f:
        rows = [{k: float(v) if v else None for k, v in row.items()} for row in csv.DictReader(f)]
    if any(row.get('epoch') is None for row in rows):
        raise ValueError('summary.csv has rows without an epoch')
    return rows


def _read_analysis(folder: Path, rows: Sequence[Mapping[str, float | None]]) -> dict[str, Any] | None:
    """analysis.json; None where there is none, or one of another version, or of the folder's run before this one."""
    path = folder / 'analysis.json'
    if not path.is_file():
        return None
    analysis = json.loads(path.read_text(encoding='utf-8'))
    if not isinstance(analysis, dict) or not set(analysis) >= _KEYS:
        return None
    row = next((row for row in rows if row['epoch'] == analysis['epoch']), {})
    if analysis['checkpoint'] == 'last' and row is not rows[-1]:
        return None
    if path.stat().st_mtime >= (folder / 'summary.csv').stat().st_mtime:
        return analysis
    # the older file; or a copy of both, where the times say nothing but the numbers agree
    top1 = row.get('eval_top1')
    return analysis if top1 is not None and abs(top1 - analysis['validation']['top1']) < 0.05 else None


# Comparing -------------------------------------------------------------------------------------------------------------


@dataclass
class Group:
    """Runs that differ in their seed alone, or a single run.

    Attributes:
        name: The runs' name without its number.
        runs: One or more.
        color: Its place in the palette, from 0.
    """

    name: str
    runs: list[Run]
    color: int = 0

    def mean(self, value: Callable[[Run], float | None]) -> tuple[float | None, float | None]:
        """Mean and sample standard deviation of a value over the runs that have it; None where there is none."""
        values = [v for v in map(value, self.runs) if v is not None]
        return (
            statistics.mean(values) if values else None,
            statistics.stdev(values) if len(values) > 1 else None,
        )


def group_seeds(runs: Sequence[Run]) -> list[Group]:
    """Put runs whose names end in -1, -2, ... together where they have equal arguments but for seed and name."""
    groups: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        match = re.fullmatch(r'(.+)-\d+', run.name)
        settings = {k: v for k, v in run.args.items() if k not in _OF_A_SEED}
        key = (match[1], json.dumps(settings, sort_keys=True, default=str)) if match else (run.name, '')
        groups.setdefault(key, []).append(run)
    return [
        Group(name if len(members) > 1 else members[0].name, members, color)
        for color, ((name, _), members) in enumerate(groups.items())
    ]


def baseline(run: Run, runs: Sequence[Run]) -> Run | None:
    """The run that shows what a teacher adds: the same model without one, under equal conditions (see `differing`).

    None for a run without a teacher, and where there is no such run.
    """
    return next((other for other in _without_teacher(run, runs) if not differing(run, other)), None)


def _without_teacher(run: Run, runs: Sequence[Run]) -> list[Run]:
    """The runs of the same model without a teacher; none for a run without a teacher."""
    if run.teacher is None:
        return []
    return [
        other
        for other in runs
        if other.teacher is None and all(other.args.get(k) == run.args.get(k) for k in _OF_A_STUDENT)
    ]


def differing(run: Run, other: Run) -> list[str]:
    """The conditions that two runs do not share, each with both values; numbers that one of them lacks are not compared."""
    pairs = {'data folder': (_data_folder(run), _data_folder(other))}
    defaults = create_parser()
    for name in _OF_A_PAIR:
        values = [r.args.get(name, defaults.get_default(name)) for r in (run, other)]
        pairs[name.replace('_', ' ')] = tuple('none' if value in (None, '') else value for value in values)
    known = {
        'last epoch': [r.final.get('epoch') for r in (run, other)],
        'validation images': [((r.analysis or {}).get('images') or {}).get('validation') for r in (run, other)],
    }
    pairs.update({name: (f'{a:g}', f'{b:g}') for name, (a, b) in known.items() if None not in (a, b)})
    return [f'{name} {a} and {b}' for name, (a, b) in pairs.items() if a != b]


def _data_folder(run: Run) -> str:
    folder = run.args.get('data_dir') or run.args.get('data')
    return os.path.abspath(folder) if folder else 'none'


def difference(run: Run, runs: Sequence[Run]) -> float | None:
    """Final top-1 of a run minus that of its `baseline`, in points."""
    other = baseline(run, runs)
    if other is None or not run.final or not other.final:
        return None
    return run.final['eval_top1'] - other.final['eval_top1']


def why_no_difference(run: Run, runs: Sequence[Run]) -> str:
    """What keeps a run with a teacher from having a `baseline`: the run that comes nearest, and what differs.

    Empty where it has one, and where no run is of its model without a teacher.
    """
    others = [(differing(run, other), other.name) for other in _without_teacher(run, runs)]
    if not others or baseline(run, runs):
        return ''
    differences, name = min(others, key=lambda o: len(o[0]))
    return f'none to {name}: {", ".join(differences)}'


def teaches(run: Run, runs: Sequence[Run]) -> bool:
    """Whether the teacher of another of the runs was loaded from this one's folder."""
    return taught_epoch(run, runs) is not None


def taught_epoch(run: Run, runs: Sequence[Run]) -> dict[str, float | None] | None:
    """The row of the epoch whose weights taught the first other run that took some of this one's; None where none did.

    Empty where the epoch was not validated, or the file does not tell it.
    """
    folder = Path(os.path.realpath(run.folder))
    for other in runs:
        path = Path(os.path.realpath(other.args.get('teacher_checkpoint') or os.devnull))
        if folder not in (path, path.parent):
            continue
        file = path.name
        if path == folder:
            names = RUN_FOLDER_FILES[0 if other.args.get('teacher_ema', True) else 1 :]
            file = next((name for name in names if (folder / name).is_file()), names[0])
        if file in RUN_FOLDER_FILES[:2]:
            return run.exported
        kept = re.fullmatch(r'(checkpoint|milestone)-(\d+)\.pth\.tar', file)
        epoch = run.rows[-1]['epoch'] if file == RUN_FOLDER_FILES[2] else None
        if kept:
            epoch = int(kept[2]) - (kept[1] == 'milestone')  # named by the number of epochs done
        return next((row for row in run.validated if row['epoch'] == epoch), {})
    return None


def shown_epoch(run: Run, runs: Sequence[Run]) -> dict[str, float | None]:
    """The row that stands for a run: its last validated one; of a teacher of others, that of the weights they took."""
    taught = taught_epoch(run, runs)
    return run.final if taught is None else taught


def describe_method(run: Run) -> str:
    """How a run was taught, in words: projectors, activation, loss, weights."""
    args = run.args
    if args.get('kd_model_name'):
        return f"timm's own {args.get('kd_distill_type', 'logit')} distillation"
    if not run.teacher:
        return 'labels alone'
    target = args.get('pe_target') or 'feature'
    task_weight, distill_weight, loss = TARGETS[target]
    loss = args.get('pe_loss') or loss
    weights = [
        (args.get('task_loss_weight'), task_weight, 'task loss'),
        (args.get('distill_loss_weight'), distill_weight, loss),
        (args.get('kd_loss_weight'), 0, f'KL at T = {args.get("kd_temperature", 4):g}'),
    ]
    weights = [(default if weight is None else weight, name) for weight, default, name in weights]
    return f'{_projectors(run, target)}; {" + ".join(f"{weight:g} × {name}" for weight, name in weights if weight)}'


def _projectors(run: Run, target: str) -> str:
    args = run.args
    kind, act, norm = args.get('pe_projector'), args.get('pe_act'), args.get('pe_teacher_norm')
    if act == 'auto':
        act = ((run.analysis or {}).get('projectors') or {}).get('act') or act
    words = ['no projector' if kind == 'identity' else f'{args.get("pe_projectors")} × {kind}']
    if kind != 'identity' and target == 'feature':
        words.append({'none': 'no activation', 'auto': 'activation by the teacher'}.get(act, act))
    if target != 'feature':
        words.append(f'on {target}')
    if norm not in (None, 'none'):
        words.append(f'teacher {norm}')
    return ', '.join(words)


def command(run: Run) -> list[list[str]]:
    """The command line of a run: the flags whose values are not the parser's defaults, and no others.

    Returns:
        Words that belong together, in lists: the program with the data folder, then each flag with its values. What can
        be said in YAML alone (no colour jitter at all) is taken from args.yaml.
    """
    parser = create_parser()
    chunks = [['train-distill']]
    for action in parser._actions:
        default = parser.get_default(action.dest)
        value = run.args.get(action.dest, default)
        if action.dest in ('help', 'config') or value == default:
            continue
        if value is None:
            return [['train-distill', '-c', str(run.folder / 'args.yaml')]]
        if not action.option_strings:
            chunks[0].append(str(value))
        elif isinstance(action, argparse.BooleanOptionalAction):
            chunks.append([action.option_strings[0 if value else 1]])
        elif action.nargs == 0:
            chunks += [[action.option_strings[-1]]] if value == action.const else []
        else:
            chunks.append(_flag_words(action.option_strings, value))
    return chunks


def _flag_words(names: Sequence[str], value: Any) -> list[str]:
    flag = next(name for name in names if name.startswith('--'))
    if isinstance(value, dict):
        return [flag, *(f'{k}={_literal(v)}' for k, v in value.items())]
    if isinstance(value, list):
        return [flag, *map(str, value)]
    # a value that starts with a dash would be read as a flag
    return [f'{flag}={value}'] if str(value).startswith('-') else [flag, str(value)]


def _literal(value: Any) -> str:
    """A value of a `k=v` flag; words that would be read as a number, None or True get quotes."""
    return value if isinstance(value, str) and not _is_literal(value) else repr(value)


def _is_literal(text: str) -> bool:
    try:
        ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return False
    return True


def format_command(chunks: Sequence[Sequence[str]], width: int = 88) -> str:
    """A command for a shell, quoted, with a backslash before each line break."""
    lines = ['']
    for chunk in map(shlex.join, chunks):
        if lines[-1] and len(lines[-1]) + 1 + len(chunk) > width:
            lines.append('   ')
        lines[-1] = f'{lines[-1]} {chunk}' if lines[-1] else chunk
    return ' \\\n'.join(lines)


# Showing ---------------------------------------------------------------------------------------------------------------

_SVG, _XLINK = 'http://www.w3.org/2000/svg', 'http://www.w3.org/1999/xlink'
_CURVES = {
    'eval_top1': ('Validation top-1, %', ''),
    'eval_loss': ('Validation loss', ''),
    'train_loss': ('Training loss', 'The weighted sum that is trained on: not to be compared between methods.'),
    'train_task_loss': ('Task loss', 'Raw, on training batches: what the labels ask for.'),
    'train_pe_loss': ('Projector loss', 'Raw, on training batches: what the teacher asks for, through the projectors.'),
    'lr': ('Learning rate', ''),
}
# heading, where it is in analysis.json, digits, unit, end of the scale (None: the highest value), what it means
_MEASURES = (
    ('Agreement with the teacher', 'agreement.validation', 1, ' %', 100, 'Validation images of which both name the same class.'),
    ('CKA with the teacher', 'cka.validation', 3, '', 1, 'How alike the two feature spaces are: 0 unrelated, 1 equal up to rotation and scale.'),
    ('Projection along the teacher', 'cosine.validation', 3, '', 1, "Mean cosine between averaged projection and teacher's feature: what the loss asks for."),
    ('Linear probe', 'discriminability.linear_probe_top1', 2, ' %', 100, "Top-1 of a linear classifier fitted on the student's own features."),
    ('Classes apart', 'discriminability.between_over_within', 2, '', None, 'Scatter of the own features between classes over that within. Higher is clearer.'),
    ('Learned by heart', 'gap_top1', 2, ' points', None, 'Top-1 on training images less top-1 on validation images.'),
    ('Calibration error', 'calibration.ece', 3, '', None, 'How far confidence is from being right (ECE, 15 bins). Lower is better.'),
    ('Likeness of the projectors', 'projectors.output_cosine', 3, '', 1, 'Mean cosine between the outputs of two of them: at 1 they would be copies of one.'),
    ('Gain of the ensemble', 'projectors.ensemble_gain', 3, '', 1, "Cosine of the averaged projection with the teacher's feature, less the best single one's."),
)  # fmt: skip
_WITH_TEACHER = ('agreement', 'cka', 'cosine')
# smaller pictures are enlarged without smoothing
_FEW_PIXELS = 64


def number(value: float | None, digits: int = 2, sign: bool = False) -> str:
    """A number with so many digits; a dash for None."""
    return '–' if value is None else f'{value:{"+" if sign else ""},.{digits}f}'.replace('-', '−')


def plus_minus(mean_std: tuple[float | None, float | None], digits: int = 2, sign: bool = False) -> str:
    """Mean and, where there is one, standard deviation."""
    mean, std = mean_std
    return number(mean, digits, sign) + ('' if std is None else f' ± {number(std, digits)}')


def duration(seconds: float | None) -> str:
    """Seconds in words; a dash for None."""
    if seconds is None:
        return '–'
    minutes, s = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f'{hours} h {minutes:02d} min'
    return f'{minutes} min {s:02d} s' if minutes else f'{s} s'


def inline_svg(figure: 'Figure', prefix: str, label: str) -> Markup:
    """A figure as an `<svg>` for a page that has others: its ids begin with `prefix`, metadata and style sheet go.

    Args:
        figure: The figure.
        prefix: What no other figure of the page has.
        label: What it shows, for who can't see it.
    """
    from . import plots

    ElementTree.register_namespace('', _SVG)
    ElementTree.register_namespace('xlink', _XLINK)
    root = ElementTree.fromstring(plots.to_svg(figure))
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag in (f'{{{_SVG}}}metadata', f'{{{_SVG}}}style'):
                parent.remove(child)
        for name, value in parent.attrib.items():
            if name == 'id':
                parent.set(name, prefix + value)
            elif '#' in value and ('url(#' in value or name == f'{{{_XLINK}}}href'):
                parent.set(name, value.replace('#', f'#{prefix}', 1))
    root.set('role', 'img')
    root.set('aria-label', label)
    return Markup(ElementTree.tostring(root, encoding='unicode'))


def draw_curves(groups: Sequence[Group]) -> list[dict[str, Any]]:
    """Curves of validation, of each loss term and of the learning rate: title, note, svg."""
    from . import plots

    columns = dict.fromkeys(c for group in groups for run in group.runs for row in run.rows for c in row)
    terms = [c for c in columns if c.startswith('train_') and c not in _CURVES and c != 'train_images_per_s']
    shown = [c for c in [*list(_CURVES)[:-1], *terms, 'lr'] if c in columns]
    curves = []
    for i, column in enumerate(shown):
        figure = plots.mean_curves([[_with_task_loss(run) for run in group.runs] for group in groups], column)
        words = column.removeprefix('train_').replace('_', ' ').capitalize()
        title, note = _CURVES.get(column, (words, 'Raw, on training batches.'))
        curves.append({'title': title, 'note': note, 'svg': inline_svg(figure, f'curve{i}-', f'{title} by epoch')})
    return curves


def _with_task_loss(run: Run) -> list[dict[str, float | None]]:
    """The rows of a run; one that learns from labels alone has no terms, its loss is the task's."""
    return run.rows if run.teacher else [{'train_task_loss': row.get('train_loss'), **row} for row in run.rows]


def draw_reliability(groups: Sequence[Group]) -> list[dict[str, Any]]:
    """Reliability diagram of the first analysed run of each group: run, ece, svg."""
    from . import plots

    found = []
    for i, run in enumerate(_analysed(groups)):
        calibration = run.analysis['calibration']
        figure = plots.reliability(calibration['bins'])
        figure.set_size_inches(3.7, 3.5)
        figure.axes[0].set_title('')
        for legend in [*figure.legends, figure.axes[0].get_legend()]:
            if legend is not None:
                legend.remove()
        svg = inline_svg(figure, f'reliability{i}-', f'Accuracy of {run.name} by its confidence')
        found.append({'run': run, 'ece': calibration['ece'], 'svg': svg})
    return found


def _analysed(groups: Sequence[Group]) -> list[Run]:
    """The first run of each group that is analysed."""
    first = [next((run for run in group.runs if run.analysis), None) for group in groups]
    return [run for run in first if run is not None]


def projector_pictures(groups: Sequence[Group]) -> list[dict[str, Any]]:
    """The analysis' picture of how alike the projectors are, for each group that has several: run, image."""
    found = []
    for run in _analysed(groups):
        path = run.folder / 'figures' / 'projector_similarity.png'
        if (_dig(run.analysis, 'projectors.q') or 0) > 1 and path.is_file():
            image = 'data:image/png;base64,' + base64.b64encode(path.read_bytes()).decode()
            found.append({'run': run, 'image': image})
    return found


def _dig(analysis: Mapping[str, Any] | None, path: str) -> Any:
    """The value under a dotted path; None where any part of it is not there."""
    value: Any = analysis
    for key in path.split('.'):
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def draw_bars(groups: Sequence[Group], path: str, end: float | None = None) -> list[dict[str, Any]]:
    """A bar a group for a number of analysis.json, mean over its seeds.

    Args:
        groups: Groups of runs.
        path: Where the number is, with dots.
        end: What a bar of full length stands for; None is the highest mean.

    Returns:
        For each group that has the number: the group, its `value` (mean, std), and `start` and `width` of its bar in
        percent of a track from 0, or the lowest mean if that is lower, to `end`.
    """
    found = [(group, group.mean(lambda run: _dig(run.analysis, path))) for group in groups]
    found = [(group, value) for group, value in found if value[0] is not None]
    means = [0.0, end or 0.0, *(mean for _, (mean, _) in found)]
    low, scale = min(means), 100 / (max(means) - min(means) or 1)
    return [
        {'group': group, 'value': (mean, std), 'start': (min(mean, 0) - low) * scale, 'width': abs(mean) * scale}
        for group, (mean, std) in found
    ]


def draw_measures(groups: Sequence[Group], runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Bars of each number of the analyses that some group has: title, note, digits, unit, bars."""
    students = [group for group in groups if not any(teaches(run, runs) for run in group.runs)]
    found = []
    for title, path, digits, unit, end, note in _MEASURES:
        bars = draw_bars(students if path.split('.')[0] in _WITH_TEACHER else groups, path, end)
        if bars:
            found.append({'title': title, 'note': note, 'digits': digits, 'unit': unit, 'bars': bars})
    return found


def collect_samples(groups: Sequence[Group], runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Images of the analyses, with what is said of each: by its teachers, then by the first run of each group.

    Returns:
        For each image: `image` (data URI), `small` (has few pixels), `label`, and `answers`: who, color (None for a
        teacher), class, confidence in percent, right.
    """
    images: dict[str, dict[str, Any]] = {}
    teachers = {run.analysis['compared_with'] for run in runs if run.analysis and not teaches(run, runs)}
    for group in groups:
        run = group.runs[0]
        if run.analysis is None or teaches(run, runs):
            continue
        names = run.analysis['class_names']
        for sample in run.analysis['samples']:
            uri, label = sample['image'], sample['label']
            entry = {'image': uri, 'small': _is_small(uri), 'label': names[label], 'teachers': {}, 'students': []}
            entry = images.setdefault(f'{label} {uri}', entry)
            if sample.get('teacher'):
                who = f'teacher {run.analysis["compared_with"]}' if len(teachers) > 1 else 'teacher'
                entry['teachers'][who] = _answer(who, None, sample['teacher'], label, names)
            entry['students'].append(_answer(run.name, group.color, sample['student'], label, names))
    return [{**entry, 'answers': [*entry['teachers'].values(), *entry['students']]} for entry in images.values()]


def _answer(who: str, color: int | None, said: Mapping[str, Any], label: int, names: Sequence[str]) -> dict[str, Any]:
    name, right = names[said['class']], said['class'] == label
    return {'who': who, 'color': color, 'class': name, 'confidence': 100 * said['confidence'], 'right': right}


def _is_small(data_uri: str) -> bool:
    image = Image.open(io.BytesIO(base64.b64decode(data_uri.partition(',')[2])))
    return max(image.size) < _FEW_PIXELS


def result_row(run: Run, runs: Sequence[Run]) -> dict[str, Any]:
    """What the result table says of a run."""
    other = baseline(run, runs)
    return {
        'run': run,
        'method': describe_method(run),
        'teaches': teaches(run, runs),
        'shown': shown_epoch(run, runs),
        'difference': difference(run, runs),
        'baseline': other.name if other else None,
        'why': why_no_difference(run, runs),
    }


def result_of_group(group: Group, runs: Sequence[Run]) -> dict[str, Any]:
    """What the tiles and the table of means say of a group; numbers are (mean, standard deviation)."""
    differences = [d for d in (difference(run, runs) for run in group.runs) if d is not None]
    paired = len(differences) == len(group.runs)  # else the mean would be over other seeds than its top-1
    return {
        'group': group,
        'method': describe_method(group.runs[0]),
        'teacher': group.runs[0].teacher,
        'teaches': any(teaches(run, runs) for run in group.runs),
        'top1': group.mean(lambda run: shown_epoch(run, runs).get('eval_top1')),
        'top5': group.mean(lambda run: shown_epoch(run, runs).get('eval_top5')),
        'loss': group.mean(lambda run: shown_epoch(run, runs).get('eval_loss')),
        'seconds': group.mean(lambda run: run.seconds)[0],
        'difference': group.mean(lambda run: difference(run, runs) if paired else None),
        'why': '; '.join(filter(None, (why_no_difference(run, runs) for run in group.runs))),
        'better': sum(d > 0 for d in differences),
        'compared': len(differences),
    }


# The page --------------------------------------------------------------------------------------------------------------


def render(runs: Sequence[Run]) -> str:
    """The report as HTML.

    Raises:
        UsageError: matplotlib is not installed.
    """
    if importlib.util.find_spec('matplotlib') is None:
        raise UsageError("the report needs matplotlib: pip install 'timm_pe[analysis]'")
    from . import plots

    groups = group_seeds(runs)
    colors = {run.name: group.color for group in groups for run in group.runs}
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(number=number, plus_minus=plus_minus, duration=duration)
    return environment.get_template('report_template.html').render(
        version=__version__,
        today=date.today().isoformat(),
        pairs=sorted({(run.teacher, str(run.args.get('model'))) for run in runs if run.teacher}),
        data=list(dict.fromkeys(_data_name(run) for run in runs)),
        runs=runs,
        groups=[result_of_group(group, runs) for group in groups],
        rows=[result_row(run, runs) for run in runs],
        color=colors,
        palette=plots.COLORS,
        ink=plots.INK,
        curves=draw_curves(groups),
        missing=[run for run in runs if run.analysis is None],
        measures=draw_measures(groups, runs),
        reliability=draw_reliability(groups),
        projectors=projector_pictures(groups),
        samples=collect_samples(groups, runs),
        commands={run.name: format_command(command(run)) for run in runs},
        configs={run.name: yaml.safe_dump(run.args, default_flow_style=False, allow_unicode=True) for run in runs},
    )


def _data_name(run: Run) -> str:
    folder = run.args.get('data') or run.args.get('data_dir') or ''
    return run.args.get('dataset') or os.path.basename(os.path.normpath(folder))


def analyse_missing(runs: Sequence[Run]) -> None:
    """Analyse the runs that have no analysis yet; each is compared with a teacher of the others where it has none.

    Raises:
        UsageError: What the analysis can't do, with how to go without it.
    """
    missing = [run for run in runs if run.analysis is None]
    if not missing:
        return
    from .analysis import analyze

    for run in missing:
        print(f'analysing {run.name}', file=sys.stderr, flush=True)
        try:
            run.analysis = analyze(run.folder, others=[other.folder for other in runs])
        except UsageError as e:
            raise UsageError(f'{e} (timm_pe.report --no-analysis goes without)') from e


def write_report(folders: Sequence[str | os.PathLike], path: str | os.PathLike, analysis: bool = True) -> None:
    """Write the report of some runs; the file appears whole or not at all.

    Args:
        folders: Run folders of train_distill.
        path: HTML file to write.
        analysis: Analyse the runs that have not been.

    Raises:
        UsageError: No run folder, a file that can't be written, or a package that is missing.
    """
    path = Path(path)
    runs = read_runs(folders)
    beside = path.with_name(path.name + '.tmp')
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        beside.touch()  # what can't be written is refused before the work
    except OSError as e:
        raise UsageError(
            f"--output: cannot write '{path}' ({e.strerror}): name a file in a folder that is there"
        ) from e
    try:
        if analysis:
            analyse_missing(runs)
        beside.write_text(render(runs), encoding='utf-8')
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def main(argv: list[str] | None = None) -> None:
    """Write a report.

    Args:
        argv: Command line; None takes that of the process.
    """
    parser = Parser(prog='python -m timm_pe.report', description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument('runs', metavar='RUN', nargs='+', help='run folder of train_distill')
    parser.add_argument(
        '-o', '--output', metavar='FILE', default='report.html', help='HTML file to write (report.html)'
    )
    parser.add_argument('--no-analysis', action='store_true', help='show the analyses that are there, make no new ones')
    args = parser.parse_args(argv)
    try:
        write_report(args.runs, args.output, analysis=not args.no_analysis)
    except UsageError as e:
        parser.error(str(e))
    print(args.output)


if __name__ == '__main__':
    main()
