"""What does a whole run cost beside timm's own script? Seconds of the processes in pairs, each pair in another order.

    python benchmarks/script_time.py --script PYTORCH_IMAGE_MODELS/train.py

One epoch, with start and validation, of a student with its teacher: `train_distill --teacher`, with a float32 teacher, against
SCRIPT with timm's feature distillation (--kd-model-name, timm 1.0.31 or newer). timm's package has no train.py: a checkout of its
repository has. Without --script it is train_distill itself, which takes timm's flags and runs timm's task.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

import numpy as np
import timm
from environment import environment, write
from PIL import Image
from timm.models import save_for_hf

from timm_pe.runs.compare import confidence_interval

OURS = Path(__file__).resolve().parent.parent / 'train_distill.py'
CLASSES = 10


def draw_images(folder: Path, images: int, side: int) -> None:
    """Write JPEG files of noise of low frequency, a tenth of them to validate."""
    rng = np.random.default_rng(0)
    for i in range(images):
        small = Image.fromarray(rng.integers(0, 256, (8, 8, 3)).astype(np.uint8))
        split = 'validation' if i % 10 == 0 else 'train'
        path = folder / split / f'class-{i // 10 % CLASSES}' / f'{i}.jpg'
        path.parent.mkdir(parents=True, exist_ok=True)
        small.resize((side, side), Image.Resampling.BICUBIC).save(path, quality=90)


def commands(args: argparse.Namespace, folder: Path) -> dict[str, list[str]]:
    """The command lines of both, which differ in the teacher's flags alone."""
    teacher = f'local-dir:{folder}/teacher'
    common = [
        *('--data-dir', str(folder / 'data'), '--model', args.student, '--num-classes', str(CLASSES)),
        *('--img-size', str(args.size), '-b', str(args.batch_size), '-j', '0', '--epochs', '1', '--warmup-epochs', '0'),
        *('--device', args.device, '--channels-last', '--output', str(folder / 'runs')),
    ]
    ours = ['--teacher', teacher, '--teacher-dtype', 'float32']
    timms = ['--kd-model-name', teacher, '--kd-distill-type', 'feature']
    return {
        'ours': [sys.executable, str(OURS), *common, *ours],
        'timm': [sys.executable, str(args.script), *common, *timms],
    }


def run(command: list[str], threads: int) -> float:
    """Seconds of a process.

    Raises:
        RuntimeError: It failed; the message has the last line that it wrote.
    """
    begin = time.perf_counter()
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, 'OMP_NUM_THREADS': str(threads)}, check=False
    )
    if done.returncode:
        said = done.stderr.strip().rpartition('\n')[2] or 'it said nothing'
        raise RuntimeError(f'{command[1]} ended with exit code {done.returncode}: {said}')
    return time.perf_counter() - begin


def main(argv: list[str] | None = None) -> None:
    """Measure and write.

    Args:
        argv: Command line; None takes that of the process.
    """
    parser = argparse.ArgumentParser(prog='script_time.py', description=__doc__.splitlines()[0])
    parser.add_argument('--script', type=Path, default=OURS, help="timm's train.py (default: train_distill.py)")
    parser.add_argument('--teacher', default='resnet34')
    parser.add_argument('--student', default='resnet18')
    parser.add_argument('--images', type=int, default=2757, help='to train on and to validate')
    parser.add_argument('--size', type=int, default=64, help='side of the images in pixels')
    parser.add_argument('-b', '--batch-size', type=int, default=32)
    parser.add_argument('--pairs', type=int, default=3)
    parser.add_argument('--threads', type=int, default=1, help='CPU threads of each')
    parser.add_argument('--device', default='cpu')
    parser.add_argument('--output', type=Path, help='JSON file of the result')
    args = parser.parse_args(argv)
    if not args.script.is_file():
        parser.error(f"no script '{args.script}': give train.py of a checkout of timm's repository")
    seconds: dict[str, list[float]] = {'ours': [], 'timm': []}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        draw_images(folder / 'data', args.images, args.size)
        save_for_hf(timm.create_model(args.teacher, num_classes=CLASSES), folder / 'teacher', safe_serialization=True)
        lines = commands(args, folder)
        try:
            for pair in range(args.pairs):
                for name in ('ours', 'timm') if pair % 2 else ('timm', 'ours'):
                    seconds[name].append(run(lines[name], args.threads))
                print(
                    f'{pair + 1} of {args.pairs}: ours {seconds["ours"][-1]:.1f} s, timm {seconds["timm"][-1]:.1f} s',
                    flush=True,
                )
        except RuntimeError as e:
            print(f'script_time.py: error: {e}', file=sys.stderr)
            sys.exit(2)
    ratios = [ours / timms for ours, timms in zip(*seconds.values(), strict=True)]
    interval = confidence_interval(ratios)
    result = {
        'date': f'{date.today()}',
        'environment': environment(args.device),
        'settings': {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()},
        'seconds': seconds,
        'ratio': {'mean': statistics.mean(ratios), 'interval': interval, 'of_pairs': ratios},
    }
    if args.output:
        write(args.output, json.dumps(result, indent=2) + '\n')
    said = f' [{interval[0]:.3f}, {interval[1]:.3f}]' if interval else ''
    print(f'ours / timm: {result["ratio"]["mean"]:.3f}{said}, {args.pairs} pairs')


if __name__ == '__main__':
    main()
