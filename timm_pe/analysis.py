"""Looking inside finished runs: what the student learned, from whom, and how sure it is of it.

    python -m timm_pe.analysis RUN [RUN ...]

Writes RUN/analysis.json and pictures in RUN/figures/. A run without a teacher is compared with that of another RUN on the
same data, so that a student alone and a distilled one are measured against the same teacher.
"""

import argparse
import base64
import contextlib
import csv
import importlib.util
import io
import json
import logging
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn as nn
from PIL import Image
from timm.utils import load_checkpoint_metadata
from torch.utils.data import Dataset, IterableDataset, Subset
from tqdm import tqdm

from .args import parse_args
from .cli import Parser
from .data import check_data, create_data, create_datasets
from .errors import UsageError
from .loading import load_weights, read_state_dict
from .logs import count_params, setup_logging
from .measures import (
    agreement,
    calibration,
    class_statistics,
    linear_cka,
    mean_cosine,
    mean_off_diagonal,
    probe,
    projector_cosines,
    top_k,
    weight_cosine,
)
from .models import create_student, place_student
from .runtime import Runtime, setup_runtime
from .tap import FeatureTap
from .task import ProjectorEnsembleTask
from .task_from_args import create_run_task, create_run_teacher
from .teacher import Teacher

CHECKPOINTS = {'last': 'last.pth.tar', 'best': 'model_best.pth.tar'}
MAX_TRAIN_IMAGES = 5000
NUM_SAMPLES = 12
_SAMPLE_SIDE = 128
_PACKAGES = {'sklearn': 'scikit-learn', 'torchmetrics': 'torchmetrics', 'matplotlib': 'matplotlib'}


# A run, opened again ---------------------------------------------------------------------------------------------------


@dataclass
class Options:
    """What an analysis may be told; None is as in the run.

    Attributes:
        checkpoint: 'last' or 'best'.
        data_dir: Where the data is now.
        teacher_checkpoint: Where the teacher's weights are now.
        device: Where to compute.
        max_train_images: At most so many training images are looked at, the same ones in each run on the same data.
        batch_size: Images in a forward pass.
        workers: Loader processes.
    """

    checkpoint: str = 'last'
    data_dir: str | None = None
    teacher_checkpoint: str | None = None
    device: str | None = None
    max_train_images: int = MAX_TRAIN_IMAGES
    batch_size: int | None = None
    workers: int | None = None


@dataclass
class OpenRun:
    """A finished run, built again.

    Attributes:
        args: Its arguments.
        epoch: That of the checkpoint, from 0, as in summary.csv.
        student: The student in eval mode.
        tap: Gives its penultimate feature.
        teacher: Whom it is compared with, or None.
        teacher_name: His name.
        task: The task with its projectors; None for a run without them.
        loaders: 'train' and 'validation', both as images are seen in evaluation.
        class_names: One a class.
        samples: Numbers of some validation images, and their pictures.
        runtime: Device and precision.
    """

    args: argparse.Namespace
    epoch: int
    student: nn.Module
    tap: FeatureTap
    teacher: Teacher | None
    teacher_name: str | None
    task: ProjectorEnsembleTask | None
    loaders: dict[str, Any]
    class_names: list[str]
    samples: list[tuple[int, str]]
    runtime: Runtime


@dataclass
class Split:
    """What student and teacher say of the images of a split, on the CPU in float32.

    Attributes:
        feature: The student's, `[n, d]`.
        logits: The student's, `[n, c]`.
        labels: `[n]`.
        teacher_feature: `[n, m]`, or None.
        teacher_logits: Those of a teacher with the same classes, or None.
    """

    feature: torch.Tensor
    logits: torch.Tensor
    labels: torch.Tensor
    teacher_feature: torch.Tensor | None = None
    teacher_logits: torch.Tensor | None = None


class _FixedSubset(Subset):
    """Some images of a data set; the loader gives the set its transform through it."""

    @property
    def transform(self) -> Any:
        return self.dataset.transform

    @transform.setter
    def transform(self, transform: Any) -> None:
        self.dataset.transform = transform


def read_run_args(folder: Path, options: Options) -> argparse.Namespace:
    """The arguments of a run, with what the analysis does otherwise.

    Raises:
        UsageError: Not a run folder, no such checkpoint, or a kind of run that has no top-1.
    """
    if not (folder / 'args.yaml').is_file():
        raise UsageError('it is no run folder of train_distill, which holds args.yaml and last.pth.tar')
    if not (folder / CHECKPOINTS[options.checkpoint]).is_file():
        raise UsageError(f'it has no {CHECKPOINTS[options.checkpoint]}: train at least one epoch')
    args, _ = parse_args(['-c', str(folder / 'args.yaml')])
    if args.task == 'multilabel' or args.naflex_loader:
        raise UsageError('runs with --task multilabel or --naflex-loader cannot be analysed')
    args.data_dir = options.data_dir or args.data_dir
    args.teacher_checkpoint = options.teacher_checkpoint or args.teacher_checkpoint
    args.device = options.device or args.device
    args.validation_batch_size = options.batch_size or args.validation_batch_size
    args.workers = args.workers if options.workers is None else options.workers
    # the weights are those of the checkpoint
    args.pretrained, args.pretrained_path, args.initial_checkpoint = False, '', ''
    # these change how fast a network computes, not what; the prefetcher brings batches to the device
    args.torchscript = args.channels_last = args.grad_checkpointing = args.no_prefetcher = False
    return args


def open_run(folder: Path, options: Options, others: Sequence[str | os.PathLike] = ()) -> OpenRun:
    """Build a finished run again, with the weights of its checkpoint.

    Args:
        folder: Run folder.
        options: What is otherwise now.
        others: More run folders: a run without a teacher is compared with that of the first that has one on the same data.

    Raises:
        UsageError: Anything of it that is not there any more, or does not fit.
    """
    args = read_run_args(folder, options)
    with _hint('--data-dir PATH says where the data is now'):
        check_data(args)
    # the order of a run: what is drawn (a teacher left random) is drawn again as it was
    runtime = setup_runtime(args)
    student = create_student(args)
    with _hint('--data-dir PATH says where the data is now'):
        datasets = create_datasets(args, student.in_chans)
    if any(isinstance(d, IterableDataset) for d in datasets):
        raise UsageError(
            f"'{args.dataset}' is a stream, which cannot give the same images twice: it cannot be analysed"
        )
    class_names = read_class_names(datasets[1], student.num_classes)
    samples = _draw_samples(datasets[1])
    subset = _fixed_subset(datasets[0], options.max_train_images)
    train, validation = (create_data(args, (None, d), student, runtime) for d in (subset, datasets[1]))
    teacher_args = _teacher_args(args, student.num_classes, (read_run_args(Path(f), options) for f in others))
    with _hint('--teacher-checkpoint PATH says where its weights are now'):
        teacher = create_run_teacher(teacher_args, validation, runtime) if teacher_args else None
    if teacher is not None:
        teacher.needs_logits = True  # the run may have done without them
    task = create_run_task(args, student, teacher, runtime) if args.teacher else None
    student = task.trainable_module.student if task else place_student(student, args, runtime)
    epoch = _load_checkpoint(folder / CHECKPOINTS[options.checkpoint], args, student, task)
    return OpenRun(
        args=args,
        epoch=epoch,
        student=student.eval(),
        tap=FeatureTap(student, args.student_tap),
        teacher=teacher,
        teacher_name=teacher_args.teacher if teacher else None,
        task=task.eval() if task else None,
        loaders={'train': train.eval, 'validation': validation.eval},
        class_names=class_names,
        samples=samples,
        runtime=runtime,
    )


@contextlib.contextmanager
def _hint(hint: str) -> Iterator[None]:
    try:
        yield
    except UsageError as e:
        raise UsageError(f'{e} ({hint})') from e


def _teacher_args(
    args: argparse.Namespace, num_classes: int, others: Iterable[argparse.Namespace]
) -> argparse.Namespace | None:
    """Arguments that name the teacher: the run's own, that of timm's distillation, or one of another run's."""
    if args.teacher:
        return args
    if args.kd_model_name:
        return argparse.Namespace(**{**vars(args), 'teacher': args.kd_model_name, 'teacher_num_classes': num_classes})
    for other in others:
        kept = other.teacher and (other.teacher_checkpoint or other.teacher_pretrained)
        if kept and _data_key(other) == _data_key(args):
            taught = {name: value for name, value in vars(other).items() if name.startswith('teacher')}
            return argparse.Namespace(**{**vars(args), **taught})
    return None


def _data_key(args: argparse.Namespace) -> tuple:
    root = os.path.realpath(args.data_dir or args.data or '')
    return args.dataset.lower(), root, args.train_split, args.val_split, args.class_map, args.num_classes


def _load_checkpoint(
    path: Path, args: argparse.Namespace, student: nn.Module, task: ProjectorEnsembleTask | None
) -> int:
    """Load student and projectors, the moving average's where that is what the run evaluated; return the epoch."""
    ema = args.model_ema and not args.model_ema_force_cpu
    load_weights(student, read_state_dict(path, 'the checkpoint', use_ema=ema), 'the checkpoint', str(path))
    checkpoint = load_checkpoint_metadata(str(path))
    if task is not None:
        state = (checkpoint.get('task_state_ema') if ema else None) or checkpoint.get('task_state')
        if not state:
            raise UsageError(f"the checkpoint '{path}' holds no projectors")
        task.load_task_state(state)
    return int(checkpoint['epoch'])


def read_class_names(dataset: Dataset, num_classes: int) -> list[str]:
    """Names of the classes of a data set, in their order; a class without one is called by its number."""
    indices = getattr(getattr(dataset, 'reader', None), 'class_to_idx', None) or getattr(dataset, 'class_to_idx', None)
    names = {index: str(name) for name, index in (indices or {}).items()}
    return [names.get(c, str(c)) for c in range(num_classes)]


def _fixed_subset(dataset: Dataset, size: int) -> Dataset:
    """`size` images of the data set, always the same, in its order."""
    if len(dataset) <= size:
        return dataset
    return _FixedSubset(dataset, np.sort(np.random.default_rng(0).permutation(len(dataset))[:size]).tolist())


def _draw_samples(dataset: Dataset) -> list[tuple[int, str]]:
    """Numbers of some images of a data set that has no transform yet, and their pictures as data URIs."""
    indices = np.sort(np.random.default_rng(0).permutation(len(dataset))[:NUM_SAMPLES]).tolist()
    return [(i, _data_uri(dataset[i][0])) for i in indices]


def _data_uri(image: Image.Image) -> str:
    image = image.convert('L' if image.mode == 'L' else 'RGB')
    image.thumbnail((_SAMPLE_SIDE, _SAMPLE_SIDE))
    file = io.BytesIO()
    image.save(file, 'png', optimize=True)
    return f'data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}'


@torch.inference_mode()
def collect(run: OpenRun, split: str) -> Split:
    """Show student and teacher a split, image by image.

    Raises:
        UsageError: Labels that the student has no class for, or a student whose features are not finite.
    """
    parts = {name: [] for name in Split.__dataclass_fields__}
    compares_logits = run.teacher is not None and run.teacher.num_classes == len(run.class_names)
    for input, target in tqdm(run.loaders[split], desc=split, leave=False, disable=None):
        with run.runtime.autocast():
            logits = run.student(input)
            said = {'feature': run.tap.pop(), 'logits': logits[0] if isinstance(logits, (tuple, list)) else logits}
            if run.teacher is not None:
                taught = run.teacher(input)
                said['teacher_feature'] = taught.feature
                if compares_logits:
                    said['teacher_logits'] = taught.logits
        for name, value in said.items():
            parts[name].append(value.float().cpu())
        parts['labels'].append(target.cpu())
    found = Split(**{name: torch.cat(values) if values else None for name, values in parts.items()})
    if int(found.labels.max()) >= found.logits.shape[1]:
        raise UsageError(f'the data has label {int(found.labels.max())}, the student {found.logits.shape[1]} classes')
    if not (found.feature.isfinite().all() and found.logits.isfinite().all()):
        raise UsageError('the features of its student are not finite: the run has diverged')
    return found


# The analysis ----------------------------------------------------------------------------------------------------------


def analyze(
    folder: str | os.PathLike, options: Options | None = None, others: Sequence[str | os.PathLike] = ()
) -> dict[str, Any]:
    """Analyse one finished run; write its analysis.json and figures/.

    Args:
        folder: Run folder.
        options: What to look at; None is the defaults.
        others: More run folders, see `open_run`.

    Returns:
        What is in analysis.json.

    Raises:
        UsageError: A folder, file or package that is not there, or does not fit.
    """
    folder, options = Path(folder), options or Options()
    _check_packages()
    with _about(folder):
        run = open_run(folder, options, others)
        train, validation = collect(run, 'train'), collect(run, 'validation')
        result, matrices = measure(run, train, validation)
        result = _finite({'run': folder.resolve().name, 'checkpoint': options.checkpoint, **result})
        try:
            _draw(folder, result, matrices, [run.class_names[c] for c in validation.labels.unique()])
            _write_json(folder / 'analysis.json', result)
        except OSError as e:
            raise UsageError(f'cannot write into it ({e.strerror})') from e
    return result


@contextlib.contextmanager
def _about(folder: Path) -> Iterator[None]:
    try:
        yield
    except UsageError as e:
        raise UsageError(f"RUN '{folder}': {e}") from e


def _check_packages() -> None:
    missing = [package for module, package in _PACKAGES.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise UsageError(f"the analysis needs {' and '.join(missing)}: pip install 'timm_pe[analysis]'")


def measure(run: OpenRun, train: Split, validation: Split) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """All numbers of a run, as they go into analysis.json, and the matrices that are drawn."""
    splits = {'train': train, 'validation': validation}
    scores = {name: top_k(split.logits, split.labels) for name, split in splits.items()}
    apart, class_matrix = class_statistics(validation.feature, validation.labels)
    projectors, cosine, projector_matrix = _measure_projectors(run, splits)
    has_teacher, compares_logits = run.teacher is not None, validation.teacher_logits is not None
    same_width = has_teacher and train.feature.shape[1] == train.teacher_feature.shape[1]
    result = {
        'model': run.args.model,
        'teacher': run.args.teacher or run.args.kd_model_name,
        'compared_with': run.teacher_name,
        'epoch': run.epoch,
        'seed': run.args.seed,
        'params': count_params(run.student),
        'num_classes': len(run.class_names),
        'class_names': run.class_names,
        'images': {name: len(split.labels) for name, split in splits.items()},
        **scores,
        'gap_top1': scores['train']['top1'] - scores['validation']['top1'],
        'teacher_validation': top_k(validation.teacher_logits, validation.labels) if compares_logits else None,
        'agreement': {n: agreement(s.logits, s.teacher_logits) for n, s in splits.items()} if compares_logits else None,
        'cosine': cosine,
        'cosine_raw': {n: mean_cosine(s.feature, s.teacher_feature) for n, s in splits.items()} if same_width else None,
        'cka': {n: linear_cka(s.feature, s.teacher_feature) for n, s in splits.items()} if has_teacher else None,
        'discriminability': {
            **apart,
            **probe((train.feature, train.labels), (validation.feature, validation.labels)),
        },
        'calibration': calibration(validation.logits, validation.labels),
        'projectors': projectors,
        'samples': _say_samples(run.samples, validation),
    }
    return result, {'class_cosine': class_matrix, 'projector_similarity': projector_matrix}


def _measure_projectors(
    run: OpenRun, splits: Mapping[str, Split]
) -> tuple[dict | None, dict | None, torch.Tensor | None]:
    """What analysis.json says under 'projectors' and 'cosine', and the cosines between outputs `[q, q]`."""
    if run.task is None:
        return None, None, None
    projection = run.task.projection
    cosines = dict.fromkeys(('output_cosine', 'weight_cosine', 'single_cosine', 'ensemble_cosine', 'ensemble_gain'))
    numbers = {'q': projection.num_projectors, 'act': projection.act, **cosines}
    numbers['weight_cosine'] = weight_cosine(projection)
    if run.task.target == 'logits':  # they map logits: there is no feature to compare
        return numbers, None, None
    found = {
        name: projector_cosines(
            projection, s.feature, s.teacher_feature, run.task.teacher_norm, batch_size=run.args.batch_size
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
            'teacher': say(validation.teacher_logits, i),
        }
        for i, uri in samples
    ]


def _finite(value: Any) -> Any:
    """JSON knows no NaN: None where a number is not finite."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _write_json(path: Path, value: dict[str, Any]) -> None:
    beside = path.with_name(path.name + '.tmp')
    beside.write_text(json.dumps(value, indent=2, allow_nan=False) + '\n', encoding='utf-8')
    os.replace(beside, path)


def _draw(run: Path, result: Mapping[str, Any], matrices: Mapping[str, torch.Tensor | None], names: list[str]) -> None:
    from . import plots

    figures = {
        'reliability': plots.reliability(result['calibration']['bins'], result['calibration']['ece']),
        'class_cosine': plots.class_cosine(matrices['class_cosine'].tolist(), names),
    }
    if matrices['projector_similarity'] is not None and result['projectors']['q'] > 1:
        figures['projector_similarity'] = plots.projector_similarity(matrices['projector_similarity'].tolist())
    rows = _read_summary(run / 'summary.csv')
    if rows:
        shown = [c for c in rows[0] if c.startswith(('train_', 'eval_')) and c != 'train_images_per_s']
        figures['curves'] = plots.learning_curves({result['run']: rows}, shown)
    (run / 'figures').mkdir(exist_ok=True)
    for name, figure in figures.items():
        plots.save_png(figure, run / 'figures' / f'{name}.png')


def _read_summary(path: Path) -> list[dict[str, str]]:
    if not path.is_file():
        return []
    with open(path, newline='', encoding='utf-8') as f:
        return list(csv.DictReader(f))


# Command line ----------------------------------------------------------------------------------------------------------

# head of a column, where its number is, how it is written
_COLUMNS = (
    ('train', ('train', 'top1'), '{:.2f}'),
    ('val', ('validation', 'top1'), '{:.2f}'),
    ('gap', ('gap_top1',), '{:.2f}'),
    ('agree', ('agreement', 'validation'), '{:.2f}'),
    ('cosine', ('cosine', 'validation'), '{:.3f}'),
    ('CKA', ('cka', 'validation'), '{:.3f}'),
    ('betw/within', ('discriminability', 'between_over_within'), '{:.3f}'),
    ('centroid', ('discriminability', 'nearest_centroid_top1'), '{:.2f}'),
    ('probe', ('discriminability', 'linear_probe_top1'), '{:.2f}'),
    ('ECE', ('calibration', 'ece'), '{:.3f}'),
    ('proj cos', ('projectors', 'output_cosine'), '{:.3f}'),
    ('ens gain', ('projectors', 'ensemble_gain'), '{:+.4f}'),
)
_LEGEND = (
    'train, val, centroid, probe: top-1 %; gap: train - val; agree: % same class as the teacher; cosine: projection and '
    "teacher's feature;\nproj cos: between the projectors' outputs; ens gain: cosine of their mean over that of the best "
    'one. All but train and gap on validation images.'
)


def format_table(results: Sequence[Mapping[str, Any]]) -> str:
    """One row a run: the numbers that answer what a teacher and its projectors do."""
    rows = [('run', *(head for head, _, _ in _COLUMNS))]
    for result in results:
        rows.append((result['run'], *(_cell(result, path, form) for _, path, form in _COLUMNS)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        '  '.join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]
    return '\n'.join([*lines, '', _LEGEND])


def _cell(result: Mapping[str, Any], path: Sequence[str], form: str) -> str:
    value: Any = result
    for key in path:
        value = None if value is None else value[key]
    return '-' if value is None else form.format(value)


def create_parser() -> Parser:
    """The parser of the command line."""
    parser = Parser(prog='python -m timm_pe.analysis', description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add('runs', metavar='RUN', nargs='+', type=Path, help='run folder of train_distill')
    add('--checkpoint', choices=list(CHECKPOINTS), default='last', help='which one (default: last)')
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


def main(argv: list[str] | None = None) -> None:
    """Analyse runs and print a table of them.

    Args:
        argv: Command line; None takes that of the process.
    """
    parser = create_parser()
    options = vars(parser.parse_args(argv))
    runs = options.pop('runs')
    for name, least in (('max_train_images', 1), ('batch_size', 1), ('workers', 0)):
        if options[name] is not None and options[name] < least:
            parser.error(f'--{name.replace("_", "-")} must be {least} or more, got {options[name]}')
    setup_logging(logging.WARNING)
    try:
        options = Options(**options)
        for run in runs:  # refuse the last one before the first is worked on
            with _about(run):
                read_run_args(run, options)
        results = [analyze(run, options, runs) for run in runs]
    except UsageError as e:
        parser.error(str(e))
    print(format_table(results), end='\n\n')
    for run in runs:
        print(f'{run}: analysis.json, figures/')


if __name__ == '__main__':
    main()
