"""One HTML file that compares finished runs: numbers, curves, what is inside the networks, pictures, commands.

    python -m timm_pe.report RUN [RUN ...] [-o report.html]

The file is self-contained: it loads nothing from the network and runs no script. Runs without an analysis.json are
analysed first (`python -m timm_pe.analysis`).
"""

import base64
import errno
import importlib.util
import io
import itertools
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

import jinja2
import yaml
from markupsafe import Markup
from PIL import Image

from .analysis import analyze
from .config.cli import Parser
from .errors import UsageError
from .runs.compare import (
    Group,
    baseline,
    command,
    confidence_interval,
    describe_method,
    difference,
    epochs_to_baseline,
    format_command,
    group_seeds,
    shown_epoch,
    teaches,
    why_no_difference,
)
from .runs.finished import Run, read_runs
from .runs.report_bars import dig, draw_measures
from .train.console import setup_logging
from .version import __version__

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PROG = 'python -m timm_pe.report'

# Showing ---------------------------------------------------------------------------------------------------------------

_SVG, _XLINK = 'http://www.w3.org/2000/svg', 'http://www.w3.org/1999/xlink'
_CURVES = {
    'eval_top1': ('Validation top-1, %', ''),
    'eval_cosine': ('Validation cosine', "To the teacher's feature, on images held out."),
    'eval_loss': ('Validation loss', ''),
    'train_loss': ('Training loss', 'The weighted sum that is trained on: not to be compared between methods.'),
    'train_task_loss': ('Task loss', 'Raw, on training batches: what the labels ask for.'),
    'train_pe_loss': ('Projector loss', 'Raw, on training batches: what the teacher asks for, through the projectors.'),
    'lr': ('Learning rate', ''),
}
# smaller pictures are enlarged without smoothing
_FEW_PIXELS = 64


def number(value: float | None, digits: int = 2, sign: bool = False) -> str:
    """A number with `digits` decimals; a dash for None."""
    return '–' if value is None else f'{value:{"+" if sign else ""},.{digits}f}'.replace('-', '−')


def nth(epoch: float | None) -> str:
    """An epoch of summary.csv as people count, from 1; a dash for None."""
    return number(None if epoch is None else epoch + 1, 0)


def plus_minus(mean_std: tuple[float | None, float | None], digits: int = 2, sign: bool = False) -> str:
    """Mean and, if there is one, standard deviation."""
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
    """A figure as an `<svg>` for a page with several: its ids begin with `prefix`; metadata and style sheet are
    removed.

    Args:
        figure: The figure.
        prefix: Unique among the figures of the page.
        label: Description of the figure for screen readers.
    """
    from .runs import plots

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
    from .runs import plots

    columns = dict.fromkeys(c for group in groups for run in group.runs for row in run.rows for c in row)
    terms = [c for c in columns if c.startswith('train_') and c not in _CURVES and c != 'train_images_per_s']
    shown = [c for c in [*list(_CURVES)[:-1], *terms, 'lr'] if c in columns]
    curves = []
    for i, column in enumerate(shown):
        rows = [[_with_task_loss(run) for run in group.runs] for group in groups]
        figure = plots.mean_curves(rows, column, [group.color for group in groups])
        words = column.removeprefix('train_').replace('_', ' ').capitalize()
        title, note = _CURVES.get(column, (words, 'Raw, on training batches.'))
        curves.append({'title': title, 'note': note, 'svg': inline_svg(figure, f'curve{i}-', f'{title} by epoch')})
    return curves


def _with_task_loss(run: Run) -> list[dict[str, float | None]]:
    """The rows of a run; without a teacher a run has no terms, and its loss is the task loss."""
    return run.rows if run.teacher else [{'train_task_loss': row.get('train_loss'), **row} for row in run.rows]


def draw_reliability(groups: Sequence[Group]) -> list[dict[str, Any]]:
    """Reliability diagram of the first analysed run of each group: run, ece, svg."""
    from .runs import plots

    found = []
    for i, (group, run) in enumerate(_analysed(groups)):
        calibration = dig(run.analysis, 'calibration')
        if not calibration:  # a backbone
            continue
        figure = plots.reliability(calibration['bins'], color=group.color)
        figure.set_size_inches(3.7, 3.5)
        figure.axes[0].set_title('')
        for legend in [*figure.legends, figure.axes[0].get_legend()]:
            if legend is not None:
                legend.remove()
        svg = inline_svg(figure, f'reliability{i}-', f'Accuracy of {run.name} by its confidence')
        found.append({'run': run, 'ece': calibration['ece'], 'svg': svg})
    return found


def _analysed(groups: Sequence[Group]) -> list[tuple[Group, Run]]:
    """Each group with its first run that is analysed."""
    first = [(group, next((run for run in group.runs if run.analysis), None)) for group in groups]
    return [(group, run) for group, run in first if run is not None]


def projector_pictures(groups: Sequence[Group]) -> list[dict[str, Any]]:
    """The analysis' picture of projector similarity, for groups with several projectors: run, image, width in rem."""
    found = []
    for _, run in _analysed(groups):
        if (dig(run.analysis, 'projectors.q') or 0) > 1 and (image := _figure_of(run, 'projector_similarity')):
            # a cell of three projectors is as large as one of eight
            width = min(24.0, 7 + 2.25 * dig(run.analysis, 'projectors.q'))
            found.append({'run': run, 'image': image, 'width': width})
    return found


def map_pictures(groups: Sequence[Group]) -> list[dict[str, Any]]:
    """The analysis' picture of feature maps, for groups that were taught on maps: run, image."""
    with_maps = [run for _, run in _analysed(groups) if dig(run.analysis, 'map_cosine.validation') is not None]
    return [{'run': run, 'image': image} for run in with_maps if (image := _figure_of(run, 'maps'))]


def _figure_of(run: Run, name: str) -> str | None:
    """A figure that the analysis left, as a data URI."""
    path = run.folder.figures / f'{name}.png'
    return 'data:image/png;base64,' + base64.b64encode(path.read_bytes()).decode() if path.is_file() else None


def collect_samples(groups: Sequence[Group], runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Sample images of the analyses, each with the predictions of its teachers, then of the first run of each group.

    Returns:
        For each image: `image` (data URI), `small` (has few pixels), `label`, and `answers`: who, color (None for a
        teacher), class, confidence in percent, right.
    """
    images: dict[str, dict[str, Any]] = {}
    analysed = [run.analysis for run in runs if run.analysis and not teaches(run, runs)]
    teachers = {str(a['teacher_weights']): a['compared_with'] for a in analysed}
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
                of, name = str(run.analysis['teacher_weights']), run.analysis['compared_with']
                same_name = [weights for weights, other in teachers.items() if other == name]
                number = f' {same_name.index(of) + 1}' if len(same_name) > 1 else ''
                who = f'teacher {name}{number}' if len(teachers) > 1 else 'teacher'
                entry['teachers'][who] = _answer(who, None, sample['teacher'], label, names)
            entry['students'].append(_answer(run.name, group.color, sample['student'], label, names))
    return [{**entry, 'answers': [*entry['teachers'].values(), *entry['students']]} for entry in images.values()]


def _answer(who: str, color: int | None, said: Mapping[str, Any], label: int, names: Sequence[str]) -> dict[str, Any]:
    name, right = names[said['class']], said['class'] == label
    return {'who': who, 'color': color, 'class': name, 'confidence': 100 * said['confidence'], 'right': right}


def _is_small(data_uri: str) -> bool:
    image = Image.open(io.BytesIO(base64.b64decode(data_uri.partition(',')[2])))
    return max(image.size) < _FEW_PIXELS


def color_by_role(groups: Sequence[Group], runs: Sequence[Run]) -> None:
    """Give the first teacher, student alone and taught student the colours of their roles, and others the rest."""
    from .runs import plots

    left = iter(c for c in itertools.count() if c not in (plots.ALONE, plots.TAUGHT, plots.TEACHER))
    taken: set[int] = set()
    for group in groups:
        taught = bool(group.runs[0].teacher)
        role = (
            plots.TEACHER if any(teaches(run, runs) for run in group.runs) else plots.TAUGHT if taught else plots.ALONE
        )
        group.color = next(left) if role in taken else role
        taken.add(role)


def result_row(run: Run, runs: Sequence[Run]) -> dict[str, Any]:
    """A run's row of the result table."""
    other = baseline(run, runs)
    return {
        'run': run,
        'method': describe_method(run),
        'teaches': teaches(run, runs),
        'shown': shown_epoch(run, runs),
        'difference': difference(run, runs),
        'baseline': other.name if other else None,
        'as_good_after': epochs_to_baseline(run, runs),
        'why': why_no_difference(run, runs),
    }


def result_of_group(group: Group, runs: Sequence[Run]) -> dict[str, Any]:
    """A group's values in the tiles and the table of means; numbers are (mean, standard deviation)."""
    differences = [d for d in (difference(run, runs) for run in group.runs) if d is not None]
    paired = len(differences) == len(group.runs)  # else the mean would be over other seeds than its top-1
    reached = [e for e in (epochs_to_baseline(run, runs) for run in group.runs) if e is not None]
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
        'interval': confidence_interval(differences) if paired else None,
        'as_good_after': sum(reached) / len(reached) if len(reached) == len(group.runs) else None,
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
    from .runs import plots

    groups = group_seeds(runs)
    color_by_role(groups, runs)
    colors = {run.name: group.color for group in groups for run in group.runs}
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(number=number, nth=nth, plus_minus=plus_minus, duration=duration)
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
        maps=map_pictures(groups),
        samples=collect_samples(groups, runs),
        commands={run.name: format_command(command(run)) for run in runs},
        of_best=[run.name for run in runs if run.analysis and run.analysis['checkpoint'] != 'last'],
        configs={run.name: yaml.safe_dump(run.args, default_flow_style=False, allow_unicode=True) for run in runs},
    )


def _data_name(run: Run) -> str:
    names = (os.path.basename(os.path.normpath(path)) for path in run.data_folders)
    return run.args.get('dataset') or ', '.join(names)


def has_other_teacher(run: Run, runs: Sequence[Run]) -> bool:
    """Whether the analysis of a run without a teacher compared it with one that has taught none of the others."""
    of_others = [o.analysis['teacher_weights'] for o in runs if o.teacher and o.analysis]
    alone = run.analysis if run.teacher is None else None
    return bool(alone and alone['compared_with'] and of_others and alone['teacher_weights'] not in of_others)


def analyse_missing(runs: Sequence[Run]) -> None:
    """Analyse the runs that have no analysis yet, or one of another report with another teacher.

    A run without a teacher is compared with a teacher of the others.

    Raises:
        UsageError: An analysis failed; the message says how to do without it.
    """
    # those with a teacher first: the others are compared with theirs
    for run in sorted(runs, key=lambda run: run.teacher is None):
        if (run.analysis and not has_other_teacher(run, runs)) or not (run.has_labels or run.args.get('knn_data')):
            continue
        print(f'analysing {run.name}', file=sys.stderr, flush=True)
        try:
            run.analysis = analyze(run.folder.path, others=[other.folder.path for other in runs])
        except UsageError as e:
            raise UsageError(f'{e} (timm_pe.report --no-analysis goes without)') from e


def write_report(
    folders: Sequence[str | os.PathLike[str]], path: str | os.PathLike[str], analysis: bool = True
) -> None:
    """Write the report of some runs; the file appears whole or not at all.

    Args:
        folders: Run folders of train_distill.
        path: HTML file to write.
        analysis: Whether to analyse the runs that have no analysis.

    Raises:
        UsageError: No run folder, a file that can't be written, or a package that is missing.
    """
    path = Path(path)
    runs = read_runs(folders)
    beside = path.with_name(path.name + '.tmp')
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        beside.touch()  # a path that can't be written is refused before the work
    except OSError as e:
        raise UsageError(
            f"--output: cannot write '{path}' ({e.strerror}): name a file in a folder that is there"
        ) from e
    try:
        if analysis:
            analyse_missing(runs)
        for run in runs:
            if has_other_teacher(run, runs):
                run.analysis = None
        beside.write_text(render(runs), encoding='utf-8')
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def main(argv: list[str] | None = None, prog: str = PROG) -> None:
    """Write a report.

    Args:
        argv: Command line; None takes that of the process.
        prog: Command to name in messages.
    """
    parser = Parser(prog=prog, description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument('runs', metavar='RUN', nargs='+', help='run folder of train_distill')
    parser.add_argument(
        '-o', '--output', metavar='FILE', default='report.html', help='HTML file to write (report.html)'
    )
    parser.add_argument('--no-analysis', action='store_true', help='show the analyses that are there, make no new ones')
    args = parser.parse_args(argv)
    setup_logging(logging.WARNING)
    try:
        write_report(args.runs, args.output, analysis=not args.no_analysis)
    except UsageError as e:
        parser.error(str(e))
    print(args.output)


if __name__ == '__main__':
    main()
