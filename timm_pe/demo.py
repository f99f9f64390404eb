"""The project in three minutes: a teacher, a student alone, and the same student with the teacher, on real digits.

    python -m timm_pe.demo [--output DIR] [--seeds N]

Runs train_distill and leaves the runs, results.json, curves.png, report.html and the distilled student in DIR.
"""

import json
import logging
import os
import platform
import shutil
import statistics
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import timm
import torch

from .config.cli import Parser
from .errors import UsageError
from .method.weight_files import STUDENT as STUDENT_FILE
from .report import write_report
from .run_folder import RunFolder
from .runs.compare import confidence_interval
from .train.main import main as train
from .version import __version__

PROG = 'python -m timm_pe.demo'
# a convolutional network teaches a small vision transformer, which learns slowly from 898 images alone
DATA = ['--dataset', 'sklearn/digits', '--num-classes', '10', '--img-size', '16', '-j', '0']
AUGMENTATION = [
    '--scale',
    '0.6',
    '1',
    '--ratio',
    '0.9',
    '1.1',
    '--hflip',
    '0',
    '--color-jitter',
    '0',
    '--smoothing',
    '0',
]
TEACHER = [
    *('--model', 'cifar_resnet20', '--epochs', '15', '--warmup-epochs', '1', '-b', '32'),
    *('--opt', 'momentum', '--lr', '0.05', '--weight-decay', '5e-4'),
]
STUDENT = [
    *('--model', 'test_vit', '--model-kwargs', 'patch_size=4', 'img_size=16'),
    *('--epochs', '30', '--warmup-epochs', '3', '-b', '64', '--val-interval', '2'),
    *('--opt', 'adamw', '--lr', '2e-3', '--weight-decay', '0.05'),
]
# files in the output folder, next to the runs; report and curves only if matplotlib is installed
FILES = ('report.html', 'results.json', 'curves.png', STUDENT_FILE)


def run(name: str, argv: list[str], output: Path) -> dict[str, Any]:
    """One run of train_distill.

    Returns:
        `top1` in percent after the last epoch, `curve` by epoch, `params`, `seconds`, and the `command`.
    """
    folder = RunFolder(output / 'runs' / name)
    device = ['--device', 'cuda' if torch.cuda.is_available() else 'cpu']
    argv = [*DATA, *AUGMENTATION, *argv, *device, '--output', str(output / 'runs'), '--experiment', name]
    start = time.perf_counter()
    train(argv, log_level=logging.WARNING)
    seconds = time.perf_counter() - start
    validated = [row for row in folder.rows() if row['eval_top1'] is not None]
    curve = {int(row['epoch'] or 0) + 1: row['eval_top1'] for row in validated}
    weights = safetensors.torch.load_file(folder.student_file)
    return {
        'top1': list(curve.values())[-1],
        'curve': curve,
        'params': sum(v.numel() for k, v in weights.items() if 'running_' not in k and 'num_batches' not in k),
        'seconds': seconds,
        'command': ' '.join(['train-distill', *argv]),
    }


def run_all(output: Path, seeds: int) -> dict[str, list[dict[str, Any]]]:
    """Train the teacher once, and for each seed the student alone and with the teacher; print a line after each run."""
    total = 1 + 2 * seeds
    runs: dict[str, list[dict[str, Any]]] = {'teacher': [], 'student': [], 'student_pe': []}

    def add(kind: str, name: str, argv: list[str]) -> None:
        result = run(name, argv, output)
        runs[kind].append(result)
        done = sum(map(len, runs.values()))
        print(f'[{done}/{total}] {name:<18} top-1 {result["top1"]:6.2f} %   {result["seconds"]:5.1f} s', flush=True)

    add('teacher', 'teacher', TEACHER)
    with_teacher = ['--teacher', TEACHER[1], '--teacher-checkpoint', str(output / 'runs' / 'teacher')]
    for seed in range(1, seeds + 1):
        add('student', f'student-{seed}', [*STUDENT, '--seed', str(seed)])
        add('student_pe', f'student_pe-{seed}', [*STUDENT, '--seed', str(seed), *with_teacher])
    return runs


def summarize(runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Means over the seeds, as they go into results.json."""
    results: dict[str, Any] = {}
    for kind, of_kind in runs.items():
        top1 = [r['top1'] for r in of_kind]
        results[kind] = {
            'top1': statistics.mean(top1),
            'top1_std': statistics.stdev(top1) if len(top1) > 1 else None,
            'top1_of_seeds': top1,
            'params': of_kind[0]['params'],
            'seconds': statistics.mean(r['seconds'] for r in of_kind),
            'command': of_kind[0]['command'],
        }
    differences = [b['top1'] - a['top1'] for a, b in zip(runs['student'], runs['student_pe'], strict=True)]
    results['difference'] = {
        'top1': statistics.mean(differences),
        'top1_interval': confidence_interval(differences),
        'top1_of_seeds': differences,
    }
    results['versions'] = {
        'timm_pe': __version__,
        'torch': torch.__version__,
        'timm': timm.__version__,
        'python': platform.python_version(),
    }
    results['hardware'] = {'device': 'cuda' if torch.cuda.is_available() else 'cpu', 'threads': torch.get_num_threads()}
    return results


def format_table(results: Mapping[str, Any]) -> str:
    """The final table of the demo."""
    seeds = len(results['student']['top1_of_seeds'])
    rows = [('', 'parameters', 'top-1 %')]
    for kind, label in (('teacher', 'teacher'), ('student', 'student alone'), ('student_pe', 'student + teacher')):
        r = results[kind]
        spread = f' +- {r["top1_std"]:.2f}' if r['top1_std'] is not None else ''
        rows.append((label, f'{r["params"]:,}', f'{r["top1"]:.2f}{spread}'))
    lines = [f'{a:<19}{b:>10}{c:>15}' for a, b, c in rows]
    d = results['difference']
    better = sum(x > 0 for x in d['top1_of_seeds'])
    interval = d['top1_interval']
    of = f'95 % interval\n{interval[0]:+.2f} to {interval[1]:+.2f}, {seeds} seeds' if interval else '1 seed'
    lines.append(f'The teacher adds {d["top1"]:+.2f} points ({of}, better in {better}).')
    return '\n'.join(lines)


def plot_curves(runs: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Validation top-1 by epoch: mean and range over the seeds, and the teacher's final top-1."""
    from .runs import plots

    groups = [
        [[{'epoch': epoch - 1, 'eval_top1': top1} for epoch, top1 in r['curve'].items()] for r in runs[kind]]
        for kind in ('student', 'student_pe')
    ]
    figure = plots.mean_curves(groups, 'eval_top1', [plots.ALONE, plots.TAUGHT])
    figure.set_size_inches(6, 3.8)
    axes, seeds = figure.axes[0], len(groups[0])
    axes.axhline(runs['teacher'][0]['top1'], color=plots.COLORS[plots.TEACHER], linestyle='--', linewidth=1)
    axes.set(ylabel='validation top-1, %')
    axes.set_title('Handwritten digits: one student, without and with a teacher', color=plots.INK, fontsize=10)
    of = f' (mean of {seeds} seeds)' if seeds > 1 else ''
    names = [f'student alone{of}', f'student + teacher{of}', 'teacher']
    axes.legend(axes.lines, names, loc='lower right', frameon=False, labelcolor=plots.INK)
    plots.save_png(figure, path)


def add_report(output: Path, names: list[str]) -> None:
    """Write report.html on the runs of these names, or print in one line why it cannot be made."""
    print('\nLooking inside the networks for report.html', flush=True)
    try:
        write_report([output / 'runs' / name for name in names], output / 'report.html')
    except UsageError as e:
        print(f'no report.html: {e}', file=sys.stderr)


def main(argv: list[str] | None = None, prog: str = PROG) -> None:
    """Run the demo.

    Args:
        argv: Command line; None takes that of the process.
        prog: Command to name in messages.
    """
    parser = Parser(prog=prog, description=__doc__.splitlines()[0])
    parser.add_argument('--output', type=Path, default=Path('demo_output'), help='folder to write into')
    parser.add_argument('--seeds', type=int, default=3, help='seeds to average over')
    args = parser.parse_args(argv)
    if args.seeds < 1:
        parser.error(f'--seeds must be 1 or more, got {args.seeds}')
    try:
        os.makedirs(args.output / 'runs', exist_ok=True)
    except OSError as e:
        parser.error(f"--output: cannot write into '{args.output}' ({e.strerror})")
    print(f'{TEACHER[1]} teaches {STUDENT[1]} the 1,797 digits of scikit-learn, {1 + 2 * args.seeds} runs:', flush=True)
    start = time.perf_counter()
    runs = run_all(args.output, args.seeds)
    results = summarize(runs)
    results['total_seconds'] = time.perf_counter() - start
    (args.output / 'results.json').write_text(json.dumps(results, indent=2) + '\n')
    shutil.copyfile(RunFolder(args.output / 'runs' / 'student_pe-1').student_file, args.output / STUDENT_FILE)
    try:
        plot_curves(runs, args.output / 'curves.png')
    except ImportError:
        print("no curves.png: pip install 'timm_pe[demo]' brings matplotlib", file=sys.stderr)
    print(f'\n{format_table(results)}')
    seeds = range(1, args.seeds + 1)
    add_report(args.output, ['teacher', *(f'{kind}-{seed}' for kind in ('student', 'student_pe') for seed in seeds)])
    left = [name for name in FILES if (args.output / name).is_file()]
    print(f'\n{args.output}: {", ".join(left)}, runs/')


if __name__ == '__main__':
    main()
