"""Kill a run at random moments, start the same command again until it is through, and compare with one that was left alone.

    python tests/survive.py --kills 50
    python tests/survive.py --minutes 60 --epochs 1000        # `make soak`

A killed run must never lose what was written, and must end bit for bit as the other. Runs are forked from one process
that has imported everything, so that a start takes a tenth of a second; the numbers of a run do not depend on that.
"""

import argparse
import csv
import json
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault('OMP_NUM_THREADS', '1')
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from PIL import Image
from timm.utils import load_checkpoint_metadata

import train_distill

torch.set_num_threads(1)

COMMON = ['--num-classes', '3', '--img-size', '32', '-b', '8', '-j', '0', '--device', 'cpu', '--log-interval', '2']
COMMON += ['--model', 'test_resnet', '--teacher', 'test_resnet', '--no-teacher-pretrained', '--no-teacher-eval']
COMMON += ['--epochs', '4', '--warmup-epochs', '1', '--lr', '0.02', '--drop', '0.2', '--recovery-interval', '2']
# what a run is made of, each a way to lose something on the way
VARIANTS = {
    'plain': [],
    'mixed': ['--mixup', '0.5', '--cutmix', '0.5', '--reprob', '0.5', '--sched-on-updates'],
    'averaged': ['--model-ema', '--model-ema-decay', '0.9', '--model-ema-warmup', '--grad-accum-steps', '2'],
    'bfloat16': ['--amp', '--amp-dtype', 'bfloat16', '--opt', 'adamw', '--lr', '1e-3', '--val-interval', '2'],
    'plateau': ['--sched', 'plateau', '--patience-epochs', '0', '--decay-rate', '0.5', '--checkpoint-hist', '2'],
    'narrow': ['--model-dtype', 'bfloat16', '--model-ema', '--model-ema-decay', '0.9'],
    'workers': ['-j', '2', '--persistent-workers', '--save-epochs', '2', '--mixup', '0.2'],
}
SIGNALS = (*[signal.SIGKILL] * 4, signal.SIGTERM, signal.SIGINT)


def write_images(root: Path, train: int = 24, validation: int = 6) -> Path:
    """Tiny PNGs of three classes."""
    rng = np.random.default_rng(0)
    for split, number in (('train', train), ('val', validation)):
        for c, name in enumerate(('ant', 'bee', 'cat')):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(number):
                pixels = rng.integers(0, 150, (36, 36, 3))
                pixels[..., c] += 50
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f'{i}.png')
    return root


def start(argv: list[str], said: Path) -> int:
    """Fork a run that writes what it says to a file; gives its pid."""
    pid = os.fork()
    os.setpgid(pid, pid)  # by both, so that the group is there for whichever of them is first
    if pid:
        return pid
    out = os.open(said, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(out, 1)
    os.dup2(out, 2)
    code = 0
    try:
        train_distill.main(argv)
    except SystemExit as e:
        code = e.code or 0
    except KeyboardInterrupt:  # before the run looks out for it
        code = 128 + signal.SIGINT
    except BaseException as e:
        os.write(2, f'{type(e).__name__}: {e}\n'.encode())
        code = 70
    sys.stdout.flush()
    os._exit(code)


def wait(pid: int, seconds: float | None = None) -> int | None:
    """Exit code of a child (-n for signal n), None if it still runs after `seconds`."""
    until = None if seconds is None else time.monotonic() + seconds
    while until is None or time.monotonic() < until:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    return None


def leave_alone(argv: list[str], said: Path) -> float:
    """Run a command to its end; gives its seconds."""
    began = time.monotonic()
    code = wait(start(argv, said))
    if code:
        raise SystemExit(f'{said.read_text()}\nThe run that was left alone ended with {code}.')
    return time.monotonic() - began


def disturb(argv: list[str], said: Path, seconds: float, rng: random.Random) -> dict[str, int]:
    """Start a command again and again until it is through, each time stopped at a random moment.

    Returns:
        How often each signal stopped it.
    """
    stops: dict[str, int] = {}
    while True:
        pid = start([*argv, '--resume', 'auto'], said)
        code = wait(pid, rng.uniform(0, seconds))
        if code is None:
            signum = rng.choice(SIGNALS)
            # a terminal and a scheduler signal the loader's workers too
            (os.killpg if rng.random() < 0.5 else os.kill)(pid, signum)
            code = wait(pid)
            if code != 0:
                expected = (-signal.SIGKILL,) if signum == signal.SIGKILL else (128 + signum, -signum)
                if code not in expected:
                    raise SystemExit(f'{said.read_text()}\n{signum.name} ended the run with {code}.')
                stops[signum.name] = stops.get(signum.name, 0) + 1
                continue
        if code:
            raise SystemExit(f'{said.read_text()}\nA restarted run ended with {code}.')
        return stops


def load(path: Path) -> dict:
    """A checkpoint without what depends on the clock or on the folder."""
    checkpoint = load_checkpoint_metadata(str(path))
    del checkpoint['args']
    run = checkpoint['saver']['run']
    run['train_metrics'].pop('images_per_s', None)
    run.pop('seconds', None)
    return checkpoint


def bits(tensor: torch.Tensor) -> bytes:
    """Of a tensor of any dtype, those without a counterpart in NumPy included."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def differences(a: object, b: object, where: str = '') -> list[str]:
    """Paths of all values that are not the same, bit for bit."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        same = a.dtype == b.dtype and a.shape == b.shape and bits(a) == bits(b)
        return [] if same else [where]
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        return [d for k in a for d in differences(a[k], b[k], f'{where}/{k}')]
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)) and len(a) == len(b):
        return [d for i, (x, y) in enumerate(zip(a, b, strict=True)) for d in differences(x, y, f'{where}/{i}')]
    return [] if a == b else [f'{where}: {a!r:.60} and {b!r:.60}']


def rows(path: Path) -> list[dict[str, str]]:
    """summary.csv without its timings."""
    with open(path, newline='') as f:
        return [{k: v for k, v in row.items() if k != 'train_images_per_s'} for row in csv.DictReader(f)]


def compare(a: Path, b: Path) -> list[str]:
    """All differences of two run folders: files, checkpoints, student, summary."""
    names = [sorted(p.name for p in folder.iterdir()) for folder in (a, b)]
    found = [f'only in one: {name}' for name in sorted(set(names[0]) ^ set(names[1]))]
    for name in set(names[0]) & set(names[1]):
        if name.endswith('.pth.tar'):
            found += differences(load(a / name), load(b / name), name)
        elif name == 'student.safetensors' and (a / name).read_bytes() != (b / name).read_bytes():
            found.append(name)
        elif name == 'summary.csv':
            found += differences(rows(a / name), rows(b / name), name)
    return found


def watch(argv: list[str], said: Path) -> tuple[list[int], list[int]]:
    """Resident pages and open files of a run while it lasts, every tenth of a second."""
    pid, pages, files = start(argv, said), [], []
    while (code := wait(pid, 0.1)) is None:
        pages.append(int(Path(f'/proc/{pid}/statm').read_text().split()[1]))
        files.append(len(os.listdir(f'/proc/{pid}/fd')))
    if code:
        raise SystemExit(f'{said.read_text()}\nThe run that was watched ended with {code}.')
    return pages, files


def growth(values: list[int]) -> float:
    """Median of the last quarter over that of the second; the first is for the start."""
    quarter = len(values) // 4
    return float(np.median(values[3 * quarter :]) / np.median(values[quarter : 2 * quarter]))


def survive(folder: Path, kills: int, minutes: float, seed: int, variants: list[str], epochs: int) -> dict:
    """Disturb runs until there were so many stops, or for so long; then watch one of so many epochs.

    Raises:
        SystemExit: A run did not end as the one that was left alone, or not well, or grew while it ran.
    """
    rng, images = random.Random(seed), write_images(folder / 'images')
    stops: dict[str, int] = {}
    runs, until = 0, time.monotonic() + 60 * minutes
    alone: dict[str, float] = {}
    while stops.get('SIGKILL', 0) < kills or time.monotonic() < until:
        variant = variants[runs % len(variants)]
        argv = [str(images), *COMMON, *VARIANTS[variant], '--output', str(folder)]
        if variant not in alone:
            alone[variant] = leave_alone([*argv, '--experiment', variant], folder / f'{variant}.log')
        name = f'{variant}-{runs}'
        said = folder / f'{name}.log'
        for signum, number in disturb([*argv, '--experiment', name], said, alone[variant] * 0.8, rng).items():
            stops[signum] = stops.get(signum, 0) + number
        found = compare(folder / variant, folder / name)
        if found:
            raise SystemExit(f'{said.read_text()}\n{name} is not what {variant} is: {found[:20]}')
        runs += 1
    long = [str(images), *COMMON, '-j', '1', '--output', str(folder), '--experiment', 'long']
    pages, files = watch([*long, '--epochs', str(epochs)], folder / 'long.log')
    grown = {'memory': round(growth(pages), 4), 'open_files': round(growth(files), 4)}
    # a loader's workers come and go with a few files each; one lost in each epoch would be twice as many
    if grown['memory'] > 1.03 or grown['open_files'] > 1.25:
        raise SystemExit(f'a run of {epochs} epochs grows: {grown}')
    return {
        'runs': runs,
        'stops': stops,
        'growth': grown,
        'epochs_watched': epochs,
        'seconds_of_a_run': {k: round(v, 2) for k, v in alone.items()},
    }


def main() -> None:
    """Survive, and print what there was to survive."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--kills', type=int, default=50, metavar='N', help='SIGKILLs at least')
    parser.add_argument('--minutes', type=float, default=0, metavar='N', help='at least so long')
    parser.add_argument('--epochs', type=int, default=40, metavar='N', help='of the run whose memory is watched')
    parser.add_argument('--seed', type=int, default=0, metavar='N')
    parser.add_argument('--variants', nargs='+', choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument('--folder', type=Path, metavar='DIR', help='keep the runs there')
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        print(json.dumps(survive(folder, args.kills, args.minutes, args.seed, args.variants, args.epochs)))


if __name__ == '__main__':
    main()
