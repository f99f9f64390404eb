"""What does a step cost? Distillation against its floor, timm's own task and the loop of papers, interleaved.

    python benchmarks/step_time.py                        # `make bench-speed`; --help lists what can be chosen

Each part writes what it found into RESULTS as JSON and as a table, pair by pair: an interrupted benchmark keeps what it has,
and a part that runs again replaces its own numbers alone.

steps        medians of whole training steps; each round runs every variant once, in random order, and ratios are taken
             within a round, so that a machine that gets slower or faster in between does not count; the variants are built
             three times
memory       peak memory of each variant, in processes of its own: what the allocator gave on CUDA, else how far the resident
             set rose above the bare imports
projectors   what q projectors and their loss cost, as a share of a step
loader       whole epochs from JPEG files: ours (train_distill's loader and engine) against a plain loop over timm's loader
"""

import argparse
import copy
import gc
import itertools
import json
import logging
import multiprocessing
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from environment import environment, write
from PIL import Image
from timm.data import create_loader
from variants import LABELS, VARIANTS, Case, PaperLoop, Step, create_optimizer, our_task, task_step

from timm_pe import ProjectorEnsemble, create_feature_loss
from timm_pe.config.run_config import parse_config
from timm_pe.data.datasets import create_datasets
from timm_pe.errors import UsageError
from timm_pe.method.weight_files import check_model_name
from timm_pe.process.folder_lock import FolderLock
from timm_pe.process.runtime import has_fast_bfloat16, use_fast_kernels
from timm_pe.train.build import build as build_parts
from timm_pe.train.start import start
from timm_pe.train.trainer import Trainer

ROOT = Path(__file__).resolve().parent
# projectors of the last two have half the student's weights or more: at their usual image size they are a small part of a step
PAIRS = ('resnet34:resnet18', 'resnet50:mobilenetv1_100@224', 'vit_small_patch16_224:mobilenetv3_small_100@224')
PARTS = ('steps', 'memory', 'projectors', 'loader')
PROJECTORS = (1, 2, 3, 4, 8)
BUILDS = 3


# Measuring -----------------------------------------------------------------------------------------------------------


def measure(
    steps: Mapping[str, Step], rounds: int, device: str, repeats: int = 1, seed: int = 0
) -> dict[str, list[float]]:
    """Seconds of each step in each round; a round runs all of them, each time in another random order.

    Args:
        steps: What to run, called with the number of the call.
        rounds: Number of rounds, after two that are not counted.
        device: CUDA is waited for before and after each measurement.
        repeats: Calls in one measurement.
        seed: Seed of the orders.
    """
    wait = torch.cuda.synchronize if device.startswith('cuda') else (lambda: None)
    seconds = {name: [] for name in steps}
    names, order = list(steps), np.random.default_rng(seed)
    gc.collect()
    gc.disable()
    try:
        for r in range(-2, rounds):
            for name in order.permutation(names).tolist():
                wait()
                start = time.perf_counter()
                for k in range(repeats):
                    steps[name](max(r, 0) * repeats + k)
                wait()
                if r >= 0:
                    seconds[name].append((time.perf_counter() - start) / repeats)
    finally:
        gc.enable()
    return seconds


def ratio(numerator: Sequence[float], denominator: Sequence[float]) -> dict[str, float]:
    """Median of the ratios within a round, with a 95 % bootstrap interval of it."""
    from scipy.stats import bootstrap

    ratios = np.divide(numerator, denominator)
    if len(ratios) < 2:
        return {'ratio': float(ratios[0]), 'low': float(ratios[0]), 'high': float(ratios[0])}
    interval = bootstrap(
        (ratios,), np.median, confidence_level=0.95, method='percentile', rng=np.random.default_rng(0)
    ).confidence_interval
    return {'ratio': float(np.median(ratios)), 'low': float(interval.low), 'high': float(interval.high)}


def floor_of(seconds: Mapping[str, Sequence[float]]) -> list[float]:
    """Student alone plus teacher alone, round by round."""
    return [s + t for s, t in zip(seconds['student'], seconds['teacher'], strict=True)]


def measure_steps(case: Case, rounds: int) -> dict[str, Any]:
    """Medians of all variants, and their ratios to floor, student, timm's task and the plain loop.

    The variants are built several times, each time in another order: a network's place in memory changes its time by a
    few percent, as long as it lives.
    """
    seconds: dict[str, list[float]] = {name: [] for name in case.variants()}
    for build, part in enumerate(np.array_split(np.arange(rounds), min(BUILDS, rounds))):
        order = np.random.default_rng(build).permutation(list(seconds)).tolist()
        steps = {name: VARIANTS[name](case) for name in order}
        repeats = 10 if case.device.startswith('cuda') else 1
        for name, values in measure(steps, len(part), case.device, repeats, seed=build).items():
            seconds[name] += values
        del steps
        gc.collect()
    against = {'floor': floor_of(seconds), **{name: seconds[name] for name in ('student', 'timm', 'paper')}}
    return {
        **case.size(),
        'rounds': rounds,
        'builds': min(BUILDS, rounds),
        'median_ms': {name: 1e3 * statistics.median(values) for name, values in seconds.items()},
        'floor_ms': 1e3 * statistics.median(against['floor']),
        'ratios': {
            name: {other: ratio(values, of_other) for other, of_other in against.items() if other != name}
            for name, values in seconds.items()
        },
        'ms_of_rounds': {name: [round(1e3 * v, 3) for v in values] for name, values in seconds.items()},
    }


def measure_memory(case: Case, names: Sequence[str], runs: int, steps: int = 4) -> dict[str, list[int]]:
    """Peak memory in bytes of each variant with its models, each run in a process of its own."""
    methods = multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context('forkserver' if 'forkserver' in methods else 'spawn')
    if context.get_start_method() == 'forkserver':
        context.set_forkserver_preload(
            ['scipy.stats', 'torchvision', 'timm', 'timm_pe.train.start', 'timm_pe.train.run_task']
        )
    with ProcessPoolExecutor(1, mp_context=context, max_tasks_per_child=1) as pool:
        threads = torch.get_num_threads()
        found = {name: [] for name in names}
        for _, name in itertools.product(range(runs), names):
            found[name].append(pool.submit(_peak_memory, case, name, steps, threads).result())
        return found


def _peak_memory(case: Case, name: str, steps: int, threads: int) -> int:
    torch.set_num_threads(threads)
    before = _peak_resident_set()
    step = VARIANTS[name](case)
    for i in range(steps):
        step(i)
    if case.device.startswith('cuda'):
        return torch.cuda.max_memory_allocated()
    return _peak_resident_set() - before


def _peak_resident_set() -> int:
    kilo = 1 if sys.platform == 'darwin' else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * kilo


def measure_projectors(case: Case, rounds: int) -> dict[str, Any]:
    """What q projectors, their loss, its backward and their optimizer cost, as a share of our step at q = 3."""
    task = our_task(case)
    widths, batch = (task.projection.in_dim, task.projection.out_dim), case.batch_size
    torch.manual_seed(0)
    student, teacher = (torch.rand(batch, width, device=case.device) for width in widths)
    student.requires_grad_()
    loss = create_feature_loss('direction')

    def projectors(q: int) -> Step:
        ensemble = ProjectorEnsemble(*widths, num_projectors=q).to(case.device)
        optimizer = create_optimizer(ensemble.parameters())

        def run(i: int) -> None:
            for _ in range(10):
                loss(ensemble(student), teacher).backward()
                optimizer.step()
                optimizer.zero_grad()
                student.grad = None

        return run

    seconds = measure(
        {'step': task_step(task, case), **{str(q): projectors(q) for q in PROJECTORS}}, rounds, case.device
    )
    of_q = {q: [v / 10 for v in seconds[str(q)]] for q in PROJECTORS}
    medians = {q: 1e3 * statistics.median(values) for q, values in of_q.items()}
    slope, offset = np.polyfit(list(medians), list(medians.values()), 1)
    return {
        **case.size(),
        'rounds': rounds,
        'step_ms': 1e3 * statistics.median(seconds['step']),
        'median_ms': {str(q): ms for q, ms in medians.items()},
        'share': {str(q): ratio(values, seconds['step']) for q, values in of_q.items()},
        'eightfold': ratio(of_q[8], of_q[1]),
        'fit': {
            'ms_a_projector': slope,
            'ms_without': offset,
            'largest_deviation': max(abs(offset + slope * q - ms) / ms for q, ms in medians.items()),
        },
    }


# From files ----------------------------------------------------------------------------------------------------------


def write_pictures(folder: Path, number: int, size: tuple[int, int] = (500, 400)) -> None:
    """JPEG files of ImageNet's usual size and weight (about 100 KB), in 4 classes, 4 more to validate."""
    rng = np.random.default_rng(0)
    for i in range(number + 4):
        path = folder / ('train' if i < number else 'validation') / str(i % 4) / f'{i}.jpg'
        path.parent.mkdir(parents=True, exist_ok=True)
        # light and shade over the whole picture, texture over a few pixels
        layers = [(rng.integers(0, 256, (n * 4, n * 5, 3), dtype=np.uint8), w) for n, w in ((2, 0.5), (40, 0.5))]
        images = [np.asarray(Image.fromarray(layer).resize(size, Image.Resampling.BICUBIC)) * w for layer, w in layers]
        Image.fromarray(sum(images).astype(np.uint8)).save(path, quality=92)


def create_run(argv: Sequence[str]) -> Trainer:
    """The trainer that train_distill makes of a command line, before its first epoch; its output folder is deleted."""
    with tempfile.TemporaryDirectory() as output:
        eval_of_teacher = ['--no-teacher-eval'] if '--teacher' in argv else []
        config = parse_config([*argv, '--output', output, '--experiment', 'run', *eval_of_teacher])
        with FolderLock() as lock:
            trainer = start(build_parts(config), lock)
    assert trainer is not None
    return trainer


def our_epoch(trainer: Trainer) -> Step:
    """An epoch as `fit` runs it."""

    def epoch(i: int) -> None:
        trainer.train_epoch(i)

    return epoch


def create_timm_loader(trainer: Trainer) -> Any:
    """timm's own loader over the images of a run, with the augmentation that the run has by default."""
    args, config = trainer.config, trainer.data.config
    return create_loader(
        create_datasets(args)[0],
        input_size=config['input_size'],
        batch_size=args.batch_size,
        is_training=True,
        hflip=args.hflip,
        color_jitter=args.color_jitter,
        interpolation=args.train_interpolation,
        mean=config['mean'],
        std=config['std'],
        num_workers=args.workers,
        pin_memory=args.pin_mem,
        persistent_workers=args.persistent_workers,
        device=trainer.runtime.device,
    )


def plain_epoch(loader: Any, step: Callable[[torch.Tensor, torch.Tensor], None]) -> Step:
    """An epoch of a plain loop."""

    def epoch(i: int) -> None:
        for input, target in loader:
            step(input, target)

    return epoch


def plain_student(student: nn.Module) -> Callable[[torch.Tensor, torch.Tensor], None]:
    """The student's training without a teacher, its loss read in every step."""
    optimizer = create_optimizer(student.train().parameters())
    losses = []

    def step(input: torch.Tensor, target: torch.Tensor) -> None:
        loss = F.cross_entropy(student(input), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())

    return step


def measure_loader(case: Case, rounds: int, number: int, workers: int) -> dict[str, Any]:
    """Images per second of whole epochs, and the time that seeded draws add to an image's decoding and transforms."""
    flags = ['--model', case.student, '--teacher', case.teacher, '--no-teacher-pretrained', '--num-classes', '4']
    flags += ['--img-size', str(case.image_size), '-b', str(case.batch_size), '-j', str(workers), '--smoothing', '0']
    flags += ['--opt', 'momentum', '--lr', '0.01', '--epochs', '1000', '--warmup-epochs', '0', '--device', case.device]
    if timm.get_pretrained_cfg(case.teacher).fixed_input_size:
        flags += ['--teacher-kwargs', f'img_size={case.image_size}']
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / 'pictures'
        write_pictures(folder, number)
        ours = create_run([str(folder), *flags])
        cached = create_run([str(folder), *flags, '--teacher-cache', str(Path(temporary) / 'cache')])
        alone = plain_student(case.create_model(case.student))
        paper = PaperLoop(case.create_model(case.student), case.create_model(case.teacher))
        epochs = {
            'student': plain_epoch(create_timm_loader(ours), alone),
            'paper': plain_epoch(create_timm_loader(ours), paper),
            'ours': our_epoch(ours),
            'ours_cached': our_epoch(cached),
        }
        seconds = measure(epochs, rounds, case.device)
        images = len(ours.data.train) * case.batch_size
        seeding = measure_seeding(ours, rounds)
        size = statistics.mean(path.stat().st_size for path in folder.rglob('*.jpg'))
    return {
        **case.size(),
        'workers': workers,
        'images_an_epoch': images,
        'mean_file_bytes': round(size),
        'rounds': rounds,
        'images_per_s': {name: images / statistics.median(values) for name, values in seconds.items()},
        'ratios': {
            name: {other: ratio(values, seconds[other]) for other in ('student', 'paper') if other != name}
            for name, values in seconds.items()
        },
        'seeded_augmentation': seeding,
    }


class Same:
    """A data set whose images cost nothing."""

    def __init__(self, item: tuple, number: int):
        self.item, self.number = item, number

    def __getitem__(self, index: int) -> tuple:
        return self.item

    def __len__(self) -> int:
        return self.number


def measure_seeding(trainer: Trainer, rounds: int) -> dict[str, Any]:
    """Time per image of seeded draws, compared with decoding and transforming it.

    The difference of two loaders' times would be lost in noise: the seeded path runs over images that cost nothing,
    with and without seeds, and this difference is compared with the time of real images.
    """
    loader = trainer.data.train.loader
    real, sampler = loader.dataset.dataset, loader.batch_sampler
    images, item = len(loader) * sampler.batch_sampler.batch_size, real[0]
    seeded, collate = copy.copy(loader.dataset), copy.copy(loader.collate_fn)
    seeded.dataset, collate.collate = Same(item, len(real)), lambda batch: (None, None)

    def with_seeds(i: int) -> None:
        for batch in sampler:
            collate(seeded.__getitems__(batch))

    def without_seeds(i: int) -> None:
        for batch in sampler.batch_sampler:
            collate.collate([seeded.dataset[index] for index in batch])

    def decode(i: int) -> None:
        for index in range(images):
            real[index]

    seconds = measure({'with': with_seeds, 'without': without_seeds, 'decode': decode}, rounds, 'cpu')
    added = np.subtract(seconds['with'], seconds['without'])
    return {
        'decode_and_transform_ms': 1e3 * statistics.median(seconds['decode']) / images,
        'seeding_ms': 1e3 * statistics.median(added) / images,
        'share': ratio(added, seconds['decode']),
    }


# Results -------------------------------------------------------------------------------------------------------------


def bounds(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Each bound with what was measured; it holds when the lower end of the interval is not above it."""
    found = []

    def check(where: str, what: str, limit: float, measured: Mapping[str, float]) -> None:
        found.append({'where': where, 'bound': what, 'limit': limit, **measured, 'holds': measured['low'] <= limit})

    for pair, of_batch in results.get('steps', {}).items():
        for batch, entry in of_batch.items():
            where, ratios = f'{pair}, batch {batch}', entry['ratios']
            check(where, 'ours / floor', 1.03, ratios['ours']['floor'])
            check(where, 'ours / timm', 1.00, ratios['ours']['timm'])
            check(where, 'ours / plain loop', 1.00, ratios['ours']['paper'])
            if 'ours_folded' in ratios:
                check(where, 'ours, folded / timm', 0.97, ratios['ours_folded']['timm'])
                check(where, 'ours, folded / plain loop', 0.97, ratios['ours_folded']['paper'])
            if entry['environment']['bfloat16']:
                check(where, 'ours, bfloat16 / float32 floor', 0.90, ratios['ours_bf16']['floor'])
                if 'ours_default' in ratios:
                    check(where, 'ours by default / timm', 0.90, ratios['ours_default']['timm'])
            check(where, 'cached / student alone', 1.05, ratios['ours_cached']['student'])
    for pair, entry in results.get('memory', {}).items():
        of = entry['peak_bytes']
        for name, what in (('ours', 'ours'), ('ours_as_many', 'ours, as many projectors')):
            if name in of:
                check(pair, f'peak memory, {what} / timm', 1.00, ratio(of[name], of['timm']))
    for pair, entry in results.get('projectors', {}).items():
        check(pair, 'share of 3 projectors', 0.02, entry['share']['3'])
        check(pair, '8 projectors / 1 (linear: at most 8)', 8.0, entry['eightfold'])
    for pair, entry in results.get('loader', {}).items():
        check(pair, 'cached epoch / plain epoch of the student', 1.05, entry['ratios']['ours_cached']['student'])
        check(pair, 'seeding / decode + transform', 0.02, entry['seeded_augmentation']['share'])
    return found


def format_interval(measured: Mapping[str, float]) -> str:
    """0.981 [0.975, 0.990]"""
    return f'{measured["ratio"]:.3f} [{measured["low"]:.3f}, {measured["high"]:.3f}]'


def format_tables(results: Mapping[str, Any]) -> str:
    """The results in Markdown."""
    lines = ['# What a step costs', '']
    lines += [
        'Medians; ratios are medians of the ratios within a round, with 95 % bootstrap intervals. The floor is the sum of'
    ]
    lines += [
        'student alone and teacher forward alone. A folded and a bfloat16 teacher are as train_distill makes them.'
    ]
    for part, table in _TABLES.items():
        for key, entry in results.get(part, {}).items():
            lines += table(key, entry)
    lines += ['', '## Bounds', '', *_header('where', 'bound', 'limit', 'measured', 'holds')]
    for b in results['bounds']:
        cells = (b['where'], b['bound'], f'{b["limit"]:.2f}', format_interval(b), 'yes' if b['holds'] else 'NO')
        lines.append(_row(cells))
    return '\n'.join(lines) + '\n'


def _row(cells: Iterable[str]) -> str:
    return f'| {" | ".join(cells)} |'


def _header(*names: str) -> list[str]:
    return [_row(names), '|---' * len(names) + '|']


def _title(what: str, pair: str, entry: Mapping[str, Any], *more: str) -> list[str]:
    size, e = f'batch {entry["batch_size"]}, {entry["image_size"]} px', entry['environment']
    hardware = e.get('gpu') or f'{e["cpu"]}, {e["threads"]} threads'
    title = ', '.join([f'{what} {pair.split("@")[0].replace(":", " -> ")}', size, *more])
    return ['', f'## {title}', '', f'{hardware}; torch {e["torch"]}, timm {e["timm"]}, {entry["date"]}.', '']


def _against(ratios: Mapping[str, Any], others: Iterable[str]) -> list[str]:
    return [format_interval(ratios[other]) if other in ratios else '' for other in others]


def _steps_table(pair: str, of_batch: Mapping[str, Any]) -> list[str]:
    lines = []
    for entry in of_batch.values():
        lines += _title('Step,', pair, entry, f'{entry["rounds"]} rounds')
        lines += _header('', 'ms', '/ floor', '/ timm', '/ plain loop')
        for name, ms in entry['median_ms'].items():
            lines.append(
                _row([LABELS[name], f'{ms:.1f}', *_against(entry['ratios'][name], ('floor', 'timm', 'paper'))])
            )
    return lines


def _memory_table(pair: str, entry: Mapping[str, Any]) -> list[str]:
    peaks = entry['peak_bytes']
    rows = [
        _row([LABELS[name], f'{statistics.median(runs) / 1e6:.0f}', format_interval(ratio(runs, peaks['timm']))])
        for name, runs in peaks.items()
    ]
    title = _title('Peak memory,', pair, entry, f'{len(peaks["timm"])} processes each')
    return [*title, *_header('', 'MB, models included', '/ timm'), *rows]


def _projectors_table(pair: str, entry: Mapping[str, Any]) -> list[str]:
    rows = [_row([q, f'{ms:.2f}', format_interval(entry['share'][q])]) for q, ms in entry['median_ms'].items()]
    return [*_title('Projectors,', pair, entry), *_header('projectors', 'ms', 'share of a step'), *rows]


def _loader_table(pair: str, entry: Mapping[str, Any]) -> list[str]:
    lines = _title('From JPEG files,', pair, entry, f'{entry["workers"]} workers')
    lines += _header('', 'images/s', 'time / student alone', 'time / plain loop')
    for name, speed in entry['images_per_s'].items():
        lines.append(_row([LABELS[name], f'{speed:.1f}', *_against(entry['ratios'][name], ('student', 'paper'))]))
    s = entry['seeded_augmentation']
    lines += [
        '',
        f"Student alone and plain loop read through timm's loader. Seeded augmentation takes {s['seeding_ms']:.4f} ms",
    ]
    return [*lines, f'of an image, decoding and transforming it {s["decode_and_transform_ms"]:.2f} ms.']


_TABLES = {'steps': _steps_table, 'memory': _memory_table, 'projectors': _projectors_table, 'loader': _loader_table}


class Results:
    """The results file; each entry is written as soon as it is measured, the others are kept.

    Args:
        path: JSON file; a table goes beside it.
        device: Device of this run.
    """

    def __init__(self, path: Path, device: str):
        self.path, self.device = path, device
        self.known = json.loads(path.read_text()) if path.exists() else {}

    def add(self, keys: Sequence[str], entry: dict[str, Any]) -> None:
        """Put an entry at a path of keys."""
        here = {
            **environment(self.device),
            'threads': torch.get_num_threads(),
            'bfloat16': has_fast_bfloat16(self.device),
        }
        node = self.known
        for key in keys[:-1]:
            node = node.setdefault(key, {})
        node[keys[-1]] = {'date': f'{date.today()}', **entry, 'environment': here}
        self.known['bounds'] = bounds(self.known)
        write(self.path, json.dumps(self.known, indent=2) + '\n')
        write(self.path.with_suffix('.md'), format_tables(self.known))


def read_pair(pair: str, image_size: int) -> tuple[str, str, int]:
    """Teacher, student and image size of TEACHER:STUDENT or TEACHER:STUDENT@SIZE.

    Raises:
        UsageError: Another form, or unknown names.
    """
    names, _, size = pair.partition('@')
    if names.count(':') != 1 or (size and not size.isdecimal()) or size == '0':
        raise UsageError(f"--pairs takes TEACHER:STUDENT or TEACHER:STUDENT@SIZE, got '{pair}'")
    teacher, student = names.split(':')
    for name in (teacher, student):
        check_model_name(name, '--pairs')
    return teacher, student, int(size or image_size)


def run(args: argparse.Namespace, pairs: Sequence[tuple[str, str, int]], results: Results) -> None:
    """Measure what was asked for, part by part; projectors with the first pair only."""

    def save(part: str, case: Case, entry: dict[str, Any], *more: str) -> None:
        results.add([part, f'{case.teacher}:{case.student}@{case.image_size}', *more], entry)

    def start(part: str, teacher: str, student: str, size: int, batch: int) -> Case:
        print(f'{part}: {teacher} -> {student}, batch {batch}, {size} px', flush=True)
        return Case(teacher, student, batch, size, args.device)

    if 'steps' in args.parts:
        for pair, batch in itertools.product(pairs, args.batch_sizes):
            case = start('steps', *pair, batch)
            save('steps', case, measure_steps(case, args.rounds), str(batch))
    if 'memory' in args.parts:
        for pair in pairs:
            case = start('memory', *pair, max(args.batch_sizes))
            names = [name for name in case.variants() if not name.startswith('teacher')]
            save('memory', case, {**case.size(), 'peak_bytes': measure_memory(case, names, args.memory_runs)})
    if 'projectors' in args.parts:
        case = start('projectors', *pairs[0][:2], args.projector_image_size, min(args.batch_sizes))
        save('projectors', case, measure_projectors(case, args.rounds))
    if 'loader' in args.parts:
        for pair in pairs:
            case = start('loader', *pair, min(args.batch_sizes))
            save('loader', case, measure_loader(case, args.rounds, args.images, args.workers))


def main(argv: list[str] | None = None) -> None:
    """Run the benchmark.

    Args:
        argv: Command line; None takes that of the process.
    """
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(
        prog='step_time.py', description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add('--pairs', nargs='+', metavar='TEACHER:STUDENT[@SIZE]', default=PAIRS, help='timm names')
    add('--batch-sizes', nargs='+', type=int, metavar='N', default=[32, 256] if cuda else [16, 32])
    add(
        '--image-size',
        type=int,
        metavar='N',
        default=224 if cuda else 96,
        help='side in pixels where a pair names none',
    )
    add('--rounds', type=int, metavar='N', default=30)
    add('--memory-runs', type=int, metavar='N', default=5, help='processes of each variant in the part memory')
    add('--parts', nargs='+', choices=PARTS, default=PARTS, help='these alone')
    add('--projector-image-size', type=int, metavar='N', default=224, help='for the part projectors')
    add('--images', type=int, metavar='N', default=2048 if cuda else 64, help='JPEG files of the part loader')
    add('--workers', type=int, metavar='N', default=8 if cuda else 1, help='loader processes of the part loader')
    add('--device', default='cuda' if cuda else 'cpu')
    add(
        '--output', type=Path, metavar='FILE', default=ROOT / 'results' / 'step_time.json', help='JSON; a .md beside it'
    )
    args = parser.parse_args(argv)
    for name in ('rounds', 'memory_runs', 'batch_sizes', 'image_size', 'projector_image_size', 'images'):
        least = min(np.atleast_1d(getattr(args, name)))
        if least < 1:
            parser.error(f'--{name.replace("_", "-")} must be 1 or more, got {least}')
    logging.getLogger('timm_pe').setLevel(logging.WARNING)
    use_fast_kernels(torch.device(args.device))
    try:
        pairs = [read_pair(pair, args.image_size) for pair in args.pairs]
        run(args, pairs, Results(args.output, args.device))
    except UsageError as e:
        parser.error(str(e))
    except KeyboardInterrupt:
        parser.exit(130, f'interrupted: {args.output} has what was measured before\n')
    print(args.output.with_suffix('.md').read_text())


if __name__ == '__main__':
    main()
