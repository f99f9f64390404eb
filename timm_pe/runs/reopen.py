"""Reopens a finished run: its parts, its weights, and the outputs of its networks on its images."""

import base64
import contextlib
import io
import math
import os
from collections.abc import Iterable, Iterator, Sequence, Sized
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn as nn
from PIL import Image
from timm.utils import load_checkpoint_metadata
from torch.utils.data import Dataset, IterableDataset, Subset
from tqdm import tqdm

from ..config.run_config import RunConfig
from ..config.teachers import teachers_of
from ..data.datasets import class_map_of, count_classes
from ..data.loaders import create_data
from ..errors import UsageError
from ..method.tap import FeatureTap
from ..method.task import ProjectorEnsembleTask
from ..method.teacher import Teacher, TeacherOutput
from ..method.weight_files import load_weights, read_state_dict
from ..process.runtime import Runtime
from ..run_folder import RunFolder
from ..train.build import build, hint
from ..train.checkpoints import saved_args, saved_precisions
from ..train.learnt_classes import check_learnt_classes, other_class_of_teacher
from ..train.position import changed_teacher, read_run_state
from ..train.run_teachers import create_run_teachers
from ..train.student import place_student

CHECKPOINTS = ('last', 'best')
MAX_TRAIN_IMAGES = 5000
NUM_SAMPLES = 12
_SAMPLE_SIDE = 128
HINTS = {
    'data': '--data-dir PATH says where the data is now',
    'teacher': '--teacher-checkpoint PATH says where its weights are now',
}


def without_weights(config: RunConfig) -> RunConfig:
    """Settings that build the student of a run with random weights, to be replaced by those of a checkpoint."""
    return replace(
        config,
        pretrained=False,
        pretrained_path=None,
        initial_checkpoint='',
        head_init_scale=None,
        head_init_bias=None,
        torchscript=False,
        grad_checkpointing=False,
    )


@dataclass
class Options:
    """Options of an analysis; None means as in the run.

    Attributes:
        checkpoint: 'last' or 'best'.
        data_dir: Where the data is now.
        teacher_checkpoint: Where the teacher's weights are now.
        device: Where to compute.
        max_train_images: Most training images to use, the same ones in each run on the same data.
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
    """A finished run, rebuilt.

    Attributes:
        config: Its settings.
        epoch: That of the checkpoint, from 0, as in summary.csv.
        student: The student in eval mode.
        tap: Gives its penultimate feature.
        teachers: The teachers that it is compared with.
        teacher_names: Names of their models.
        same_classes: Of each, whether it has learnt the classes of the data, as far as that is known.
        task: The task with its projectors; None for a run without them.
        loaders: 'train' and 'validation', both with the transforms of validation. For a run that was taught on maps also
            'mixed': the validation images as `mixed_order` has them, in batches of the size of training.
        class_names: One per class.
        samples: Indices of some validation images, and their pictures as data URIs.
        runtime: Device and precision.
        data_config: timm's, of the images: size, mean, std.
    """

    config: RunConfig
    epoch: int
    student: nn.Module
    tap: FeatureTap
    teachers: list[Teacher]
    teacher_names: list[str]
    same_classes: list[bool]
    task: ProjectorEnsembleTask | None
    loaders: dict[str, Any]
    class_names: list[str]
    samples: list[tuple[int, str]]
    runtime: Runtime
    data_config: dict[str, Any]


@dataclass
class Split:
    """Outputs of student and teacher on the images of a split, on the CPU in float32.

    Attributes:
        feature: The student's, `[n, d]`.
        labels: `[n]`.
        logits: The student's, `[n, c]`; None for a backbone without a classifier.
        teachers: What each teacher gives: features `[n, m]`, and if it has the same classes its logits `[n, c]`.
    """

    feature: torch.Tensor
    labels: torch.Tensor
    logits: torch.Tensor | None = None
    teachers: list[TeacherOutput] = field(default_factory=list)


class _FixedSubset(Subset[Any]):
    """Some images of a data set; it passes the loader's transform on to the data set."""

    @property
    def transform(self) -> Any:
        return cast(Any, self.dataset).transform

    @transform.setter
    def transform(self, transform: Any) -> None:
        cast(Any, self.dataset).transform = transform


def read_run_config(folder: RunFolder, options: Options) -> RunConfig:
    """The settings of a run, with the changes for the analysis.

    Raises:
        UsageError: Not a run folder, no such checkpoint, or a kind of run that has no top-1.
    """
    if folder.missing(folder.args_file):
        raise UsageError(
            f'it is no run folder of train_distill, which holds {folder.args_file.name} and {folder.last_file.name}'
        )
    missing = folder.missing(checkpoint_file(folder, options))
    if missing:
        raise UsageError(f'it has no {missing[0]}: train at least one epoch')
    config = folder.config()
    if config.task == 'multilabel' or config.naflex_loader:
        raise UsageError('runs with --task multilabel or --naflex-loader cannot be analysed')
    config = without_weights(config)
    data_dir = options.data_dir or config.data_dir
    if not config.has_labels:
        data_dir = options.data_dir or config.knn_data
        if not data_dir:
            raise UsageError(
                'a run without labels is analysed on labelled images: --data-dir names a folder with train and val'
            )
        config = replace(config, num_classes=0, train_split='train', val_split='validation')
    return replace(
        config,
        data_dir=data_dir,
        teacher_checkpoint=options.teacher_checkpoint or config.teacher_checkpoint,
        teacher_dtype=_decided_dtypes(config, checkpoint_file(folder, options)),
        unlabeled=[],  # labelled images are looked at
        device=options.device or config.device,
        validation_batch_size=options.batch_size or config.validation_batch_size,
        workers=config.workers if options.workers is None else options.workers,
        # these change how fast a network computes, not what; the prefetcher brings batches to the device
        channels_last=False,
        no_prefetcher=False,
    )


def _decided_dtypes(config: RunConfig, checkpoint: Path) -> str | list[str | None] | None:
    """--teacher-dtype of a run, with what 'auto' was in its checkpoint."""
    teachers = teachers_of(config)
    try:
        precisions = saved_precisions(str(checkpoint), len(teachers))
    except Exception:  # whatever it may be: loading it says so
        return config.teacher_dtype
    # None follows --amp; of several teachers it is 'auto', which follows it until it is settled
    decided = [None if p is None or p.startswith('AMP ') else p for p in precisions]
    dtypes = [d if flags.dtype == 'auto' else flags.dtype for flags, d in zip(teachers, decided, strict=True)]
    return dtypes if len(dtypes) > 1 else dtypes[0] if dtypes else config.teacher_dtype


def checkpoint_file(folder: RunFolder, options: Options) -> Path:
    """The checkpoint that is looked at."""
    return folder.last_file if options.checkpoint == 'last' else folder.best_file


def open_run(folder: RunFolder, options: Options, others: Sequence[RunFolder] = ()) -> OpenRun:
    """Build a finished run again, with the weights of its checkpoint.

    Args:
        folder: Run folder.
        options: Changes to the run's settings.
        others: More run folders: a run without a teacher is compared with the first teacher among them on the same
            data.

    Raises:
        UsageError: A part of the run is missing now, or does not fit.
    """
    config = read_run_config(folder, options)
    checkpoint = checkpoint_file(folder, options)
    parts = build(config, training=False, hints=HINTS, weights=str(checkpoint))
    student, teachers = parts.student, parts.teachers
    task = cast(ProjectorEnsembleTask | None, parts.task)  # what is not built to train has no other
    if any(isinstance(d, IterableDataset) for d in parts.datasets):
        raise UsageError(
            f"'{config.dataset}' is a stream, which cannot give the same images twice: it cannot be analysed"
        )
    check_learnt_classes(folder, parts.datasets[1], 'the analysis')
    subset = _fixed_subset(cast(Dataset[Any], parts.datasets[0]), options.max_train_images)
    train = create_data(config, (None, subset), student, parts.runtime)
    teacher_config = _teacher_config(config, parts.num_classes, _configs(others, options))
    if not teachers and teacher_config is not None:
        with hint(HINTS['teacher']):
            teachers = create_run_teachers(teacher_config, parts.data, parts.runtime)
    if config.teacher:
        state = read_run_state(load_checkpoint_metadata(str(checkpoint)), str(checkpoint))
        changed = changed_teacher(state, config.teacher, teachers)
        if changed:
            raise UsageError(f'its teacher has other weights than when it taught ({changed}; {HINTS["teacher"]})')
    of_teachers = teachers_of(teacher_config) if teacher_config else []
    for teacher in teachers:
        teacher.needs_logits = True  # the run may not have needed them
    student = task.trainable_module.student if task else place_student(student, config, parts.runtime)
    epoch = _load_checkpoint(checkpoint, student, task)
    loaders = {'train': train.eval, 'validation': parts.data.eval}
    if task is not None and task.map_weight:
        loaders['mixed'] = _mixed_loader(config, parts.datasets[1], student, parts.runtime)
    return OpenRun(
        config=config,
        epoch=epoch,
        student=student.eval(),
        tap=FeatureTap(student, config.student_tap),
        teachers=teachers,
        teacher_names=[flags.name for flags in of_teachers],
        same_classes=[
            not other_class_of_teacher(*of_teacher, parts.data.eval.dataset)
            for of_teacher in zip(of_teachers, teachers, strict=True)
        ],
        task=task.eval() if task else None,
        loaders=loaders,
        class_names=read_class_names(parts.datasets[1], parts.num_classes or count_classes(parts.datasets[1]) or 0),
        samples=_draw_samples(parts.datasets[1]),
        runtime=parts.runtime,
        data_config=parts.data.config,
    )


def _configs(folders: Iterable[RunFolder], options: Options) -> Iterator[RunConfig]:
    """The settings of those runs that can be analysed."""
    for folder in folders:
        with contextlib.suppress(UsageError):
            yield read_run_config(folder, options)


def _teacher_config(config: RunConfig, num_classes: int, others: Iterable[RunConfig]) -> RunConfig | None:
    """Settings that name the teacher: the run's own, that of timm's distillation, or that of another run."""
    if config.teacher:
        return config
    if config.kd_model_name:
        return replace(config, teacher=config.kd_model_name, teacher_num_classes=num_classes)
    for other in others:
        kept = other.teacher and (other.teacher_checkpoint or other.teacher_pretrained)
        if kept and _data_key(other) == _data_key(config):
            return replace(config, **{k: v for k, v in other.as_dict().items() if k.startswith('teacher')})
    return None


def _data_key(config: RunConfig) -> tuple[Any, ...]:
    root = os.path.realpath(config.root)
    return config.dataset.lower(), root, config.train_split, config.val_split, config.class_map, config.class_depth


def _load_checkpoint(path: Path, student: nn.Module, task: ProjectorEnsembleTask | None) -> int:
    """Load student and projectors (the moving average if the run evaluated that); return the epoch."""
    # from the checkpoint, not from args.yaml: a later resume may have switched the average on or off
    checkpoint = load_checkpoint_metadata(str(path))
    ema = 'state_dict_ema' in checkpoint and not saved_args(str(path)).get('model_ema_force_cpu')
    load_weights(student, read_state_dict(path, 'the checkpoint', use_ema=ema), 'the checkpoint', str(path))
    if task is not None:
        state = (checkpoint.get('task_state_ema') if ema else None) or checkpoint.get('task_state')
        if not state:
            raise UsageError(f"the checkpoint '{path}' holds no projectors")
        task.load_task_state(state)
    return int(checkpoint['epoch'])


def read_class_names(dataset: Dataset[Any], num_classes: int) -> list[str]:
    """Names of the classes of a data set, in their order; a class without one gets its number."""
    names = {index: name for name, index in (class_map_of(dataset) or {}).items()}
    return [names.get(c, str(c)) for c in range(num_classes)]


def _fixed_subset(dataset: Dataset[Any], size: int) -> Dataset[Any]:
    """`size` images of the data set, always the same, in its order."""
    number = len(cast(Sized, dataset))
    if number <= size:
        return dataset
    return _FixedSubset(dataset, np.sort(mixed_order(number)[:size]).tolist())


def mixed_order(number: int) -> np.ndarray:
    """A fixed random order of images that lie class by class."""
    return np.random.default_rng(0).permutation(number)


def _mixed_loader(config: RunConfig, dataset: Dataset[Any], student: nn.Module, runtime: Runtime) -> Any:
    """The images in `mixed_order`, in batches of almost equal size, that of training or a little more."""
    number = len(cast(Sized, dataset))
    mixed = _FixedSubset(dataset, mixed_order(number).tolist())
    size = math.ceil(number / max(1, number // config.batch_size))
    return create_data(replace(config, validation_batch_size=size), (None, mixed), student, runtime).eval


def _draw_samples(dataset: Dataset[Any]) -> list[tuple[int, str]]:
    """Indices of some images of a data set, and their pictures before any transform as data URIs."""
    images = cast(Any, dataset)
    indices = np.sort(mixed_order(len(images))[:NUM_SAMPLES]).tolist()
    transform, images.transform = images.transform, None
    try:
        return [(i, _data_uri(images[i][0])) for i in indices]
    finally:
        images.transform = transform


def _data_uri(image: Image.Image) -> str:
    image = image.convert('L' if image.mode == 'L' else 'RGB')
    image.thumbnail((_SAMPLE_SIDE, _SAMPLE_SIDE))
    file = io.BytesIO()
    image.save(file, 'png', optimize=True)
    return f'data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}'


@torch.inference_mode()
def collect(run: OpenRun, split: str) -> Split:
    """Run student and teachers on a split.

    Raises:
        UsageError: Labels that the student has no class for, or a student whose features are not finite.
    """
    names = ('feature', 'labels', *(['logits'] if cast(Any, run.student).num_classes else []))
    own: dict[str, list[torch.Tensor]] = {name: [] for name in names}
    theirs: list[tuple[list[torch.Tensor], list[torch.Tensor]]] = [([], []) for _ in run.teachers]
    for input, target in tqdm(run.loaders[split], desc=split, leave=False, disable=None):
        with run.runtime.autocast():
            logits = run.student(input)
            feature = run.tap.pop()
            outputs = [teacher(input) for teacher in run.teachers]
        logits = logits[0] if isinstance(logits, (tuple, list)) else logits
        said = {'feature': feature.float(), 'logits': logits.float(), 'labels': target}
        for name, values in own.items():
            values.append(said[name].cpu())
        of_teachers = zip(run.teachers, run.same_classes, outputs, theirs, strict=True)
        for teacher, same_classes, output, (features, its_logits) in of_teachers:
            features.append(output.feature.float().cpu())
            if same_classes and teacher.num_classes == len(run.class_names):
                its_logits.append(output.logits.float().cpu())
    taught = [TeacherOutput(torch.cat(f), torch.cat(given) if given else None) for f, given in theirs]
    found = Split(**{name: torch.cat(values) for name, values in own.items()}, teachers=taught)
    classes = len(run.class_names)
    if int(found.labels.max()) >= classes:
        raise UsageError(f'the data has label {int(found.labels.max())}, the student {classes} classes')
    if not all(values.isfinite().all() for values in (found.feature, found.logits) if values is not None):
        raise UsageError('the features of its student are not finite: the run has diverged')
    return found
