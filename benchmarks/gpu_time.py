"""What does a step cost on a GPU? Distillation against its floor and timm's own task, in every precision, interleaved.

    python benchmarks/gpu_time.py                        # `make bench-gpu`; --help lists what can be chosen

Each measurement is written into RESULTS as soon as it is there, as JSON and as a table; one that would begin after --minutes
is left out, and named. The same command goes on where it ended, on the same card and versions.

steps    medians of whole training steps, with the ratios of a round and their intervals (see step_time.py), peak memory of
         each variant, and of our step its kernel launches and the share of the time in which the GPU has nothing to do
loader   images a second of whole epochs over images that cost nothing to read, from pinned memory and from pageable one
"""

import argparse
import gc
import json
import logging
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from environment import environment, write
from step_time import (
    Same,
    create_run,
    format_interval,
    measure,
    our_epoch,
    ratio,
    read_pair,
    write_pictures,
)
from timm.task import FeatureDistillationTask, TrainingTask
from timm.utils import NativeScaler
from variants import Case, Step, create_optimizer

from timm_pe import ProjectorEnsembleTask
from timm_pe.errors import UsageError
from timm_pe.process.runtime import use_fast_kernels
from timm_pe.train.meters import LossMeter
from timm_pe.train.nonfinite import UpdateGuard

ROOT = Path(__file__).resolve().parent
SETTINGS = ('float32', 'bfloat16', 'bfloat16+channels_last', 'float16+channels_last', 'bfloat16+channels_last+compile')
# what is measured, the most telling first: part, pair, batch size, settings
PLAN = (
    ('steps', 'resnet34:resnet18', 256, ('bfloat16+channels_last', 'float32', 'float16+channels_last')),
    ('steps', 'resnet34:resnet18', 32, ('bfloat16+channels_last',)),
    ('steps', 'vit_small_patch16_224:resnet18', 256, ('bfloat16+channels_last',)),
    ('loader', 'resnet34:resnet18', 256, ('bfloat16+channels_last',)),
    ('steps', 'resnet34:resnet18', 256, ('bfloat16+channels_last+compile', 'bfloat16')),
    ('steps', 'resnet34:resnet18', 32, ('float32',)),
    ('steps', 'vit_small_patch16_224:resnet18', 256, ('float32',)),
)
# on a CPU, to try the benchmark itself
SMALL_PLAN = (
    ('steps', 'test_resnet:test_resnet', 8, SETTINGS),
    ('loader', 'test_resnet:test_resnet', 8, SETTINGS[1:2]),
)
PARTS = ('steps', 'loader')


@dataclass(frozen=True)
class Setting:
    """How a step computes.

    Attributes:
        precision: 'float32' (with TF32, as a run has it), or autocast's 'bfloat16' or 'float16', then with a loss scaler.
        channels_last: Memory format of student and images.
        compile: Compile student, projectors and teacher.
    """

    precision: str = 'float32'
    channels_last: bool = False
    compile: bool = False

    @classmethod
    def read(cls, name: str) -> 'Setting':
        """A setting by its name, such as 'bfloat16+channels_last'."""
        precision, *more = name.split('+')
        return cls(precision, 'channels_last' in more, 'compile' in more)

    @property
    def autocast_dtype(self) -> torch.dtype | None:
        """Autocast's dtype, None without."""
        return None if self.precision == 'float32' else getattr(torch, self.precision)

    def autocast(self, device: str) -> AbstractContextManager[Any]:
        """Context of a forward pass."""
        return nullcontext() if self.autocast_dtype is None else torch.autocast(device, self.autocast_dtype)


# Variants ------------------------------------------------------------------------------------------------------------


@dataclass
class Place:
    """A pair at one batch size and in one setting."""

    case: Case
    setting: Setting

    def batches(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """The case's batches in the setting's memory format."""
        return [(self.placed(x), y) for x, y in self.case.batches]

    def placed(self, thing: Any) -> Any:
        """A tensor or a model in the setting's memory format."""
        return thing.to(memory_format=torch.channels_last) if self.setting.channels_last else thing

    def student(self) -> Any:
        """The student."""
        return self.placed(self.case.create_model(self.case.student)).train()

    def compiled(self, function: Any) -> Any:
        """A function, compiled if the setting says so."""
        return torch.compile(function) if self.setting.compile else function


def training_step(place: Place, forward: Callable[..., Mapping[str, Any]], module: Any, guards: bool = False) -> Step:
    """A step as a run makes it: forward, backward, loss scaler, optimizer, running means of the losses on the device."""
    device, batches, optimizer = place.case.device, place.batches(), create_optimizer(module.parameters())
    scaler = NativeScaler(device) if place.setting.precision == 'float16' and device != 'cpu' else None
    meter = LossMeter(torch.device(device), distributed=False)
    guard = UpdateGuard(module, scales=scaler is not None) if guards else None

    def step(i: int) -> None:
        if guard is not None:
            guard.before_forward()
        with place.setting.autocast(device):
            result = forward(*batches[i % len(batches)])
        if scaler is not None:
            scaler(result['loss'], optimizer)
        else:
            result['loss'].backward()
        if guard is not None:
            guard.after_backward()
        if scaler is None:
            optimizer.step()
        meter.update({k: v for k, v in result.items() if k != 'output'}, place.case.batch_size)
        optimizer.zero_grad()

    return step


def student_alone(place: Place) -> Step:
    """Forward, cross-entropy, backward and optimizer: one part of the floor."""
    student = place.student()
    network = place.compiled(student)
    return training_step(place, lambda x, y: {'loss': F.cross_entropy(network(x), y)}, student)


def teacher_alone(place: Place) -> Step:
    """The bare network up to its feature, under autocast as timm runs it: the other part of the floor."""
    network = place.placed(place.case.create_model(place.case.teacher)).eval().requires_grad_(False)
    feature = place.compiled(lambda x: network.forward_head(network.forward_features(x), pre_logits=True))
    batches = place.batches()

    @torch.no_grad()
    def step(i: int) -> None:
        with place.setting.autocast(place.case.device):
            feature(batches[i % len(batches)][0])

    return step


def timm_task(place: Place) -> Step:
    """timm's FeatureDistillationTask with PEFD's weights."""
    task = FeatureDistillationTask(
        place.student(),
        place.placed(place.case.create_model(place.case.teacher)),
        distill_loss_weight=25.0,
        task_loss_weight=1.0,
        device=torch.device(place.case.device),
        verbose=False,
    )
    return _step_of(task, place)


def ours(place: Place, guards: bool = False, **teacher: Any) -> Step:
    """Our step; the teacher as train_distill makes it, with more arguments."""
    made = place.case.create_teacher(fold=True, channels_last=place.setting.channels_last, **teacher)
    task = ProjectorEnsembleTask(place.student(), made, device=torch.device(place.case.device), verbose=False)
    with place.setting.autocast(place.case.device):
        task.resolve_act(place.batches()[0][0])
    return _step_of(task, place, guards)


def _step_of(task: TrainingTask, place: Place, guards: bool = False) -> Step:
    task.train()
    if place.setting.compile:
        task.compile()
    return training_step(place, task, task.get_trainable_module(), guards)


VARIANTS: dict[str, Callable[[Place], Step]] = {
    'student': student_alone,
    'teacher': teacher_alone,
    'ours': lambda place: ours(place, dtype=place.setting.autocast_dtype),
    'ours_guarded': lambda place: ours(place, guards=True, dtype=place.setting.autocast_dtype),
    'ours_autocast': lambda place: ours(place, autocast_dtype=place.setting.autocast_dtype),
    'ours_cast_each_step': ours,
    'ours_bfloat16': lambda place: ours(place, dtype=torch.bfloat16),
    'timm': timm_task,
}
LABELS = {
    'student': 'student alone',
    'teacher': 'teacher forward alone',
    'ours': 'ours',
    'ours_guarded': 'ours, with --nonfinite skip',
    'ours_autocast': 'ours, teacher under autocast, its weights cast once',
    'ours_cast_each_step': 'ours, teacher under autocast, its weights cast in each step',
    'ours_bfloat16': 'ours, --teacher-dtype bfloat16',
    'timm': "timm's FeatureDistillationTask",
}


def variants_of(setting: Setting) -> list[str]:
    """What is measured in a setting; each compiled variant takes a minute."""
    if setting.compile:
        return ['student', 'teacher', 'ours', 'timm']
    others = ('ours_bfloat16',) if setting.autocast_dtype else ('ours_autocast', 'ours_cast_each_step')
    return [name for name in VARIANTS if name not in others]


# Measuring -----------------------------------------------------------------------------------------------------------


def measure_steps(place: Place, rounds: int, repeats: int) -> dict[str, Any]:
    """Medians and ratios of the variants, their peak memory, and what the GPU does in our step."""
    steps, peaks, seconds_to_begin = {}, {}, {}
    for name in variants_of(place.setting):
        began = time.perf_counter()
        steps[name], peaks[name] = peak_memory(lambda n=name: VARIANTS[n](place), place.case.device)
        seconds_to_begin[name] = round(time.perf_counter() - began, 2)
    seconds = measure(steps, rounds, place.case.device, repeats)
    floor = [s + t for s, t in zip(seconds['student'], seconds['teacher'], strict=True)]
    against = {'floor': floor, 'timm': seconds['timm']}
    return {
        **place.case.size(),
        **asdict(place.setting),
        'rounds': rounds,
        'steps_a_round': repeats,
        'seconds_to_begin': seconds_to_begin,
        'median_ms': {name: 1e3 * statistics.median(values) for name, values in seconds.items()},
        'ratios': {
            name: {other: ratio(values, of_other) for other, of_other in against.items() if other != name}
            for name, values in seconds.items()
        },
        'peak_bytes': peaks,
        'profile': {
            n: profile(steps[n]) for n in ('ours', 'ours_guarded', 'timm') if n in steps and place.case.device != 'cpu'
        },
    }


def peak_memory(build: Callable[[], Step], device: str) -> tuple[Step, int | None]:
    """A step, and what the allocator gives at most in it beyond what was there before it was built; None on a CPU."""
    gc.collect()
    before = torch.cuda.memory_allocated() if device != 'cpu' else 0
    step = build()
    for i in range(6):
        if i == 3 and device != 'cpu':  # cuDNN has tried its kernels
            torch.cuda.reset_peak_memory_stats()
        step(i)
    return step, torch.cuda.max_memory_allocated() - before if device != 'cpu' else None


def profile(step: Step, number: int = 20) -> dict[str, float]:
    """Kernels (and copies) of a step, and the share of the time in which none runs."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record

    torch.cuda.synchronize()
    with record(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA], acc_events=True) as recorded:
        for i in range(number):
            step(i)
        torch.cuda.synchronize()
    events = recorded.events()
    kernels = sorted((e.time_range.start, e.time_range.end) for e in events if e.device_type.name == 'CUDA')
    busy, reached = 0.0, kernels[0][0]
    for start, end in kernels:
        busy += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return {'kernels_a_step': len(kernels) / number, 'idle_share': 1 - busy / (reached - kernels[0][0])}


def measure_loader(case: Case, rounds: int, batches: int, workers: int) -> dict[str, Any]:
    """Images a second of whole epochs with pinned and with pageable memory; reading an image costs nothing."""
    flags = ['--model', case.student, '--teacher', case.teacher, '--no-teacher-pretrained', '--num-classes', '4']
    flags += ['--img-size', str(case.image_size), '-b', str(case.batch_size), '-j', str(workers), '--channels-last']
    flags += ['--opt', 'momentum', '--lr', '0.01', '--epochs', '1000', '--warmup-epochs', '0', '--device', case.device]
    flags += ['--amp', '--amp-dtype', 'bfloat16', '--persistent-workers', '--log-interval', '1000']
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / 'pictures'
        write_pictures(folder, 4)
        _repeat_pictures(folder / 'train', case.batch_size * batches)
        epochs = {}
        for name, flag in (('pinned', '--pin-mem'), ('pageable', '--no-pin-mem')):
            trainer = create_run([str(folder), *flags, flag])
            seeded = trainer.data.train.loader.dataset
            seeded.dataset = Same(seeded.dataset[0], len(seeded.dataset))
            epochs[name] = our_epoch(trainer)
        seconds = measure(epochs, rounds, case.device)
    images = case.batch_size * batches
    return {
        **case.size(),
        'workers': workers,
        'images_an_epoch': images,
        'rounds': rounds,
        'images_per_s': {name: images / statistics.median(values) for name, values in seconds.items()},
        'pinned_over_pageable': ratio(seconds['pinned'], seconds['pageable']),
    }


def _repeat_pictures(folder: Path, number: int) -> None:
    for path in sorted(folder.rglob('*.jpg')):
        for i in range(number // 4 - 1):
            path.with_name(f'{path.stem}-{i}.jpg').symlink_to(path)


# Results -------------------------------------------------------------------------------------------------------------


def format_table(results: Mapping[str, Any]) -> str:
    """The results in Markdown."""
    e = results['environment']
    lines = ['# What a step costs on a GPU', '', f'{e.get("gpu") or e["cpu"]}; torch {e["torch"]}, timm {e["timm"]}, {results["date"]}.']  # fmt: skip
    lines += ['Ratios are medians of the ratios within a round, with 95 % bootstrap intervals. The floor is the sum of']
    lines += ['student alone and teacher forward alone, in the same precision.']
    for key, entry in results['steps'].items():
        lines += ['', f'## {key.replace(":", " -> ")}', '', '|  | ms | / floor | / timm | peak MB |', '|---' * 5 + '|']
        for name, ms in entry['median_ms'].items():
            ratios = [format_interval(of) if (of := entry['ratios'][name].get(o)) else '' for o in ('floor', 'timm')]
            peak = entry['peak_bytes'][name]
            lines.append(f'| {LABELS[name]} | {ms:.2f} | {" | ".join(ratios)} | {peak / 1e6:.0f} |' if peak else f'| {LABELS[name]} | {ms:.2f} | {" | ".join(ratios)} | |')  # fmt: skip
        for name, of in entry['profile'].items():
            lines += [
                '',
                f'{LABELS[name]}: {of["kernels_a_step"]:.0f} kernels a step, the GPU idle for {of["idle_share"]:.1%} of it.',
            ]
    for key, entry in results['loader'].items():
        speeds = ', '.join(f'{name} {speed:.0f} images/s' for name, speed in entry['images_per_s'].items())
        lines += ['', f'## From memory, {key.replace(":", " -> ")}', '', f'{speeds}; time of an epoch, pinned / pageable: {format_interval(entry["pinned_over_pageable"])}.']  # fmt: skip
    if results['left_out']:
        lines += ['', f'Not measured, for want of time: {", ".join(results["left_out"])}.']
    return '\n'.join(lines) + '\n'


def save(path: Path, results: Mapping[str, Any]) -> None:
    """Replace the JSON file and the table beside it."""
    write(path, json.dumps(results, indent=2) + '\n')
    write(path.with_suffix('.md'), format_table(results))


def read_known(path: Path, here: Mapping[str, Any]) -> dict[str, Any]:
    """What a file has of this card and these versions; anything else is replaced."""
    known = json.loads(path.read_text()) if path.exists() else {}
    same = all(known.get('environment', {}).get(name) == here.get(name) for name in ('device', 'gpu', 'torch', 'timm'))
    return known if same else {'environment': dict(here), 'date': f'{date.today()}', 'steps': {}, 'loader': {}}


def planned(args: argparse.Namespace) -> Iterator[tuple[str, str, Callable[[], dict[str, Any]]]]:
    """Part, name and measurement of all that is asked for, in order."""
    small = args.device == 'cpu'
    for part, pair, batch, settings in SMALL_PLAN if small else PLAN:
        if part not in args.parts:
            continue
        case = Case(*read_pair(pair, 0)[:2], batch, 32 if small else 224, args.device)
        if part == 'loader':
            load = (2, 4, 0) if small else (3, 20, 12)
            yield part, f'{pair}, batch {batch}', lambda c=case, n=load: measure_loader(c, *n)
            continue
        for name in settings:
            if name in args.settings:
                place, repeats = Place(case, Setting.read(name)), 1 if small else max(1, 512 // batch)
                yield (
                    part,
                    f'{pair}, batch {batch}, {name}',
                    lambda p=place, r=repeats: measure_steps(p, args.rounds, r),
                )


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark.

    Args:
        argv: Command line; None takes that of the process.
    """
    began, cuda = time.perf_counter(), torch.cuda.is_available()
    parser = argparse.ArgumentParser(
        prog='gpu_time.py', description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add('--device', default='cuda', help='cuda, or cpu to try the benchmark itself on small sizes')
    add('--settings', nargs='+', choices=SETTINGS, default=SETTINGS, help='these alone')
    add('--parts', nargs='+', choices=PARTS, default=PARTS, help='these alone')
    add('--rounds', type=int, metavar='N', default=15 if cuda else 2)
    add('--minutes', type=float, metavar='M', default=7.0, help='begin no measurement after so long')
    add('--output', type=Path, metavar='FILE', default=ROOT / 'results' / 'gpu_time.json', help='JSON; a .md beside it')
    args = parser.parse_args(argv)
    if args.device != 'cpu' and not cuda:
        parser.error('no CUDA device here: --device cpu tries the benchmark on small sizes')
    if args.rounds < 1:
        parser.error(f'--rounds must be 1 or more, got {args.rounds}')
    logging.getLogger('timm_pe').setLevel(logging.WARNING)
    use_fast_kernels(torch.device(args.device))
    results = {**read_known(args.output, environment(args.device)), 'left_out': []}
    try:
        for part, key, run in planned(args):
            if key in results[part]:
                continue
            minutes = (time.perf_counter() - began) / 60
            if minutes > args.minutes:
                results['left_out'].append(key)
                continue
            at = time.perf_counter()
            results[part][key] = run()
            torch.compiler.reset()
            seconds = round(time.perf_counter() - at, 1)
            results[part][key]['seconds'] = seconds
            print(json.dumps({part: key, 'seconds': seconds}), flush=True)
            save(args.output, results)
    except UsageError as e:
        parser.error(str(e))
    except KeyboardInterrupt:
        parser.exit(130, f'interrupted: {args.output} has what was measured before\n')
    save(args.output, results)
    print(format_table(results))


if __name__ == '__main__':
    main()
