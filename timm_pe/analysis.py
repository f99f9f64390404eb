"""Looking inside finished runs: what the student learned, from whom, and how sure it is of it.

    python -m timm_pe.analysis RUN [RUN ...]

Writes RUN/analysis.json and pictures in RUN/figures/. A run without a teacher is compared with the teacher of another
RUN on the same data, so that a student alone and a distilled one are measured against the same teacher.
"""

import contextlib
import importlib.util
import logging
import math
import os
import statistics
import sys
import textwrap
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from timm.utils import unwrap_model

from .config.cli import Parser
from .config.teachers import as_each
from .errors import UsageError
from .method.teachers import name_teachers
from .run_folder import RunFolder
from .runs.maps import MapComparison, compare_maps, paint
from .runs.measures import (
    agreement,
    calibration,
    class_statistics,
    linear_cka,
    mean_cosine,
    mean_off_diagonal,
    projector_cosines,
    top_k,
    weight_cosine,
)
from .runs.reopen import CHECKPOINTS, MAX_TRAIN_IMAGES, OpenRun, Options, Split, collect, open_run, read_run_config
from .train.console import count_params, setup_logging
from .train.probes import probe

PROG = 'python -m timm_pe.analysis'
_PACKAGES = {'sklearn': 'scikit-learn', 'matplotlib': 'matplotlib'}


def analyze(
    folder: str | os.PathLike[str], options: Options | None = None, others: Sequence[str | os.PathLike[str]] = ()
) -> dict[str, Any]:
    """Analyse one finished run; write its analysis.json and figures/.

    Args:
        folder: Run folder.
        options: What to analyse; None means the defaults.
        others: More run folders, see `open_run`.

    Returns:
        The content of analysis.json.

    Raises:
        UsageError: A folder, file or package is missing or does not fit.
    """
    run_folder, options = RunFolder(folder), options or Options()
    _check_packages()
    with _about(folder):
        run = open_run(run_folder, options, [RunFolder(other) for other in others])
        train, validation, maps = collect(run, 'train'), collect(run, 'validation'), compare_maps(run)
        result, matrices = measure(run, train, validation, maps)
        result = _finite({'run': run_folder.path.resolve().name, 'checkpoint': options.checkpoint, **result})
        try:
            _draw(run_folder, result, matrices, [run.class_names[c] for c in validation.labels.unique()])
            _draw_maps(run_folder, run, maps)
            run_folder.write_analysis(result)
        except OSError as e:
            raise UsageError(f'cannot write into it ({e.strerror})') from e
    return result


@contextlib.contextmanager
def _about(folder: str | os.PathLike[str]) -> Iterator[None]:
    try:
        yield
    except UsageError as e:
        raise UsageError(f"RUN '{folder}': {e}") from e


def _check_packages() -> None:
    missing = [package for module, package in _PACKAGES.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise UsageError(f"the analysis needs {' and '.join(missing)}: pip install 'timm_pe[analysis]'")


def measure(
    run: OpenRun, train: Split, validation: Split, maps: Sequence[MapComparison] = ()
) -> tuple[dict[str, Any], dict[str, torch.Tensor | None]]:
    """All numbers of a run, as they go into analysis.json, and the matrices that are drawn.

    What compares the student with its teacher is, of several teachers, the mean; that of each is under 'teachers'.
    """
    splits = {'train': train, 'validation': validation}
    scores: dict[str, dict[str, float] | None] = {
        name: None if split.logits is None else top_k(split.logits, split.labels) for name, split in splits.items()
    }
    of_train, of_validation = scores.values()
    apart, class_matrix = class_statistics(validation.feature, validation.labels)
    pairs = [_compare(run, splits, i) for i in range(len(run.teachers))]
    compared, matrices = [c for c, _ in pairs], [m for _, m in pairs]
    if maps:
        for found, of_map in zip(compared, maps, strict=True):
            found['map_cosine'] = {'validation': of_map.cosine}
    one = compared[0] if len(compared) == 1 else {}
    result = {
        'model': run.config.model,
        'teacher': _joined(as_each(run.config.teacher or run.config.kd_model_name)),
        'compared_with': _joined(run.teacher_names),
        'teacher_weights': [teacher.fingerprint.get('features') for teacher in run.teachers],
        'epoch': run.epoch,
        'seed': run.config.seed,
        'params': count_params(run.student),
        'num_classes': len(run.class_names),
        'class_names': run.class_names,
        'images': {name: len(split.labels) for name, split in splits.items()},
        **scores,
        'gap_top1': of_train['top1'] - of_validation['top1'] if of_train and of_validation else None,
        'teacher_validation': one.get('validation'),
        **{n: _mean([c[n] for c in compared]) for n in ('agreement', 'cosine', 'cosine_raw', 'cka', 'map_cosine')},
        'discriminability': {
            **apart,
            **probe((train.feature, train.labels), (validation.feature, validation.labels)),
        },
        'calibration': None if validation.logits is None else calibration(validation.logits, validation.labels),
        'projectors': one['projectors'] if one else _mean_projectors([c['projectors'] for c in compared]),
        'samples': [] if validation.logits is None else _say_samples(run.samples, validation),
    }
    if 'probe' in one:
        result['teacher_probe'] = one['probe']
    if len(compared) > 1:
        result['teachers'] = dict(zip(name_teachers(run.teachers), compared, strict=True))
    return result, {'class_cosine': class_matrix, 'projector_similarity': matrices[0] if one else None}


def _joined(names: Sequence[str | None]) -> str | None:
    return ' + '.join(filter(None, names)) or None


def _mean(parts: Sequence[Mapping[str, float] | None]) -> dict[str, float] | None:
    """The mean of what each teacher has, of each split; None if one has nothing."""
    found = [part for part in parts if part is not None]
    if not found or len(found) < len(parts):
        return None
    return {name: statistics.fmean(part[name] for part in found) for name in found[0]}


def _mean_projectors(parts: Sequence[Mapping[str, Any] | None]) -> dict[str, Any] | None:
    """What several teachers' projectors have in common, and the means of their numbers."""
    found = [part for part in parts if part is not None]
    if not found:
        return None
    mean: dict[str, Any] = {}
    for name in found[0]:
        values = [part[name] for part in found]
        numbers = [v for v in values if isinstance(v, float)]
        mean[name] = statistics.fmean(numbers) if len(numbers) == len(values) else None
    acts = {part['act'] for part in found}
    return {**mean, 'q': found[0]['q'], 'act': acts.pop() if len(acts) == 1 else None}


def _compare(run: OpenRun, splits: Mapping[str, Split], index: int) -> tuple[dict[str, Any], torch.Tensor | None]:
    """How student and one of its teachers compare, and the cosines between the outputs of its projectors `[q, q]`."""
    projectors, cosine, matrix = _measure_projectors(run, splits, index)
    outputs = {name: split.teachers[index] for name, split in splits.items()}
    # pairs (student, teacher); logits if its classes are the same
    features = {n: (splits[n].feature, output.feature) for n, output in outputs.items()}
    logits = {
        n: (own, output.logits)
        for n, output in outputs.items()
        if (own := splits[n].logits) is not None and output.logits is not None
    }
    same_width = all(own.shape[1] == of_teacher.shape[1] for own, of_teacher in features.values())
    found = {
        'model': run.teacher_names[index],
        'validation': top_k(logits['validation'][1], splits['validation'].labels) if logits else None,
        'agreement': {n: agreement(*pair) for n, pair in logits.items()} or None,
        'cosine': cosine,
        'cosine_raw': {n: mean_cosine(*pair) for n, pair in features.items()} if same_width else None,
        'cka': {n: linear_cka(*pair) for n, pair in features.items()},
        'map_cosine': None,
        'projectors': projectors,
    }
    if splits['validation'].logits is None:  # what its student can hope for
        found['probe'] = probe(*((outputs[n].feature, splits[n].labels) for n in ('train', 'validation')))
    return found, matrix


def _measure_projectors(
    run: OpenRun, splits: Mapping[str, Split], index: int
) -> tuple[dict[str, Any] | None, dict[str, float] | None, torch.Tensor | None]:
    """What analysis.json says under 'projectors' and 'cosine', and the cosines between outputs `[q, q]`."""
    if run.task is None:
        return None, None, None
    # whatever --model-dtype was: what they map has been kept in float32
    projection = unwrap_model(run.task.trainable_module).feature_projectors[index].float()
    cosines = dict.fromkeys(('output_cosine', 'weight_cosine', 'single_cosine', 'ensemble_cosine', 'ensemble_gain'))
    numbers: dict[str, Any] = {'q': projection.num_projectors, 'act': projection.act, **cosines}
    numbers['weight_cosine'] = weight_cosine(projection)
    if run.task.target == 'logits':  # they map logits: there is no feature to compare
        return numbers, None, None
    found = {
        name: projector_cosines(
            projection,
            s.feature,
            s.teachers[index].feature,
            run.task.teacher_norm,
            batch_size=run.config.batch_size,
        )
        for name, s in splits.items()
    }
    between, single, ensemble = found['validation']
    numbers.update(
        output_cosine=mean_off_diagonal(between),
        single_cosine=single.tolist(),
        ensemble_cosine=ensemble,
        ensemble_gain=ensemble - single.max().item(),
    )
    return numbers, {name: cosines[2] for name, cosines in found.items()}, between


def _say_samples(samples: Sequence[tuple[int, str]], validation: Split) -> list[dict[str, Any]]:
    def say(logits: torch.Tensor | None, i: int) -> dict[str, Any] | None:
        if logits is None:
            return None
        confidence, predicted = logits[i].softmax(0).max(0)
        return {'class': predicted.item(), 'confidence': confidence.item()}

    return [
        {
            'image': uri,
            'label': validation.labels[i].item(),
            'student': say(validation.logits, i),
            'teacher': say(validation.teachers[0].logits if len(validation.teachers) == 1 else None, i),
        }
        for i, uri in samples
    ]


def _finite(value: Any) -> Any:
    """Replace numbers that are not finite by None: JSON has no NaN."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _draw(
    folder: RunFolder, result: Mapping[str, Any], matrices: Mapping[str, torch.Tensor | None], names: list[str]
) -> None:
    from .runs import plots

    color = plots.TAUGHT if result['teacher'] else plots.ALONE
    figures = {'class_cosine': plots.class_cosine(cast(torch.Tensor, matrices['class_cosine']).tolist(), names)}
    if result['calibration']:
        figures['reliability'] = plots.reliability(result['calibration']['bins'], result['calibration']['ece'], color)
    if matrices['projector_similarity'] is not None and result['projectors']['q'] > 1:
        figures['projector_similarity'] = plots.projector_similarity(matrices['projector_similarity'].tolist())
    rows = folder.rows() if folder.summary_file.is_file() else []
    if rows:
        shown = [c for c in rows[0] if c.startswith(('train_', 'eval_')) and c != 'train_images_per_s']
        figures['curves'] = plots.learning_curves(rows, shown, color)
    folder.figures.mkdir(exist_ok=True)
    for name, figure in figures.items():
        plots.save_png(figure, folder.figures / f'{name}.png')


def _draw_maps(folder: RunFolder, run: OpenRun, maps: Sequence[MapComparison]) -> None:
    """Write figures/maps.png; one that an earlier analysis left goes if the run has no maps."""
    from .runs import plots

    path = folder.figures / 'maps.png'
    if not maps:
        path.unlink(missing_ok=True)
        return
    rows = {'image': maps[0].images.numpy()}
    for name, of_map in zip(name_teachers(run.teachers), maps, strict=True):
        of = f' {name}' if len(maps) > 1 else ''
        teacher, student = paint([of_map.teacher, of_map.student])
        rows[f'teacher{of}'] = teacher.numpy()
        rows[f'student{f" to{of}" if of else ""}'] = student.numpy()
    plots.save_png(plots.pictures(rows), path)


# Command line ----------------------------------------------------------------------------------------------------------

# column heading, path of its number in analysis.json, format
_COLUMNS = (
    ('train', ('train', 'top1'), '{:.2f}'),
    ('val', ('validation', 'top1'), '{:.2f}'),
    ('gap', ('gap_top1',), '{:.2f}'),
    ('agree', ('agreement', 'validation'), '{:.2f}'),
    ('cosine', ('cosine', 'validation'), '{:.3f}'),
    ('map cos', ('map_cosine', 'validation'), '{:.3f}'),
    ('CKA', ('cka', 'validation'), '{:.3f}'),
    ('betw/within', ('discriminability', 'between_over_within'), '{:.3f}'),
    ('centroid', ('discriminability', 'nearest_centroid_top1'), '{:.2f}'),
    ('probe', ('discriminability', 'linear_probe_top1'), '{:.2f}'),
    ('ECE', ('calibration', 'ece'), '{:.3f}'),
    ('proj cos', ('projectors', 'output_cosine'), '{:.3f}'),
    ('ens gain', ('projectors', 'ensemble_gain'), '{:+.4f}'),
)
# what is explained below the table, of the columns that it shows
_LEGEND = {
    ('train', 'val', 'centroid', 'probe'): 'top-1 %',
    ('gap',): 'train - val',
    ('agree',): '% same class as the teacher',
    ('cosine',): "projection and teacher's feature",
    ('map cos',): 'the same of feature maps',
    ('proj cos',): "between the projectors' outputs",
    ('ens gain',): 'cosine of their mean over that of the best one',
}


def format_table(results: Sequence[Mapping[str, Any]]) -> str:
    """A table with one row per run: the numbers that show what a teacher and its projectors do, without what no run has."""
    found = [(head, *(_cell(result, path, form) for result in results)) for head, path, form in _COLUMNS]
    columns = [('run', *(result['run'] for result in results)), *(c for c in found if set(c[1:]) != {'-'})]
    rows = list(zip(*columns, strict=True))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        '  '.join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]
    shown = [head for head, *_ in columns]
    said = [(', '.join(h for h in heads if h in shown), meaning) for heads, meaning in _LEGEND.items()]
    legend = '; '.join(f'{heads}: {meaning}' for heads, meaning in said if heads)
    note = ' All but train and gap on validation images.'
    return '\n'.join([*lines, '', textwrap.fill(f'{legend}.{note}', 120)])


def _cell(result: Mapping[str, Any], path: Sequence[str], form: str) -> str:
    value: Any = result
    for key in path:
        value = None if value is None else value[key]
    return '-' if value is None else form.format(value)


def create_parser(prog: str = PROG) -> Parser:
    """The parser of the command line."""
    parser = Parser(prog=prog, description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add('runs', metavar='RUN', nargs='+', type=Path, help='run folder of train_distill')
    add('--checkpoint', choices=CHECKPOINTS, default='last', help='which one (default: last)')
    add('--data-dir', metavar='DIR', help='where the data is now, if it was moved')
    add('--teacher-checkpoint', metavar='PATH', help="where the teacher's weights are now, if they were moved")
    add('--device', help="where to compute (default: the run's)")
    add(
        '--max-train-images',
        metavar='N',
        type=int,
        default=MAX_TRAIN_IMAGES,
        help=f'look at so many training images, the same in each run (default: {MAX_TRAIN_IMAGES})',
    )
    add('-b', '--batch-size', metavar='N', type=int, help="images in a forward pass (default: the run's)")
    add('-j', '--workers', metavar='N', type=int, help="loader processes (default: the run's)")
    return parser


def main(argv: list[str] | None = None, prog: str = PROG) -> None:
    """Analyse runs and print a table of them.

    Args:
        argv: Command line; None takes that of the process.
        prog: Command to name in messages.
    """
    parser = create_parser(prog)
    options = vars(parser.parse_args(argv))
    runs = options.pop('runs')
    for name, least in (('max_train_images', 1), ('batch_size', 1), ('workers', 0)):
        if options[name] is not None and options[name] < least:
            parser.error(f'--{name.replace("_", "-")} must be {least} or more, got {options[name]}')
    setup_logging(logging.WARNING)
    try:
        options = Options(**options)
        for run in runs:  # refuse a bad run before any run is analysed
            with _about(run):
                read_run_config(RunFolder(run), options)
        results = []
        for number, run in enumerate(runs, 1):
            began = time.perf_counter()
            results.append(analyze(run, options, runs))
            seconds = time.perf_counter() - began
            print(f'Analysed {number} of {len(runs)}: {run}, {seconds:.0f} s', file=sys.stderr, flush=True)
    except UsageError as e:
        parser.error(str(e))
    print(format_table(results), end='\n\n')
    for run in runs:
        print(f'{run}: {RunFolder(run).analysis_file.name}, {RunFolder(run).figures.name}/')


if __name__ == '__main__':
    main()
