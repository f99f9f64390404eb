import os

# before torch starts its threads: each test process keeps to one core
os.environ.setdefault('OMP_NUM_THREADS', '1')
os.environ['HF_HUB_OFFLINE'] = '1'

import json
import logging
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import CLASSES
from PIL import Image

torch.set_num_threads(int(os.environ['OMP_NUM_THREADS']))


@pytest.fixture(autouse=True)
def _fresh_logging():
    """A run sets up the root logger, and a benchmark ours: give them back."""
    root, ours = logging.getLogger(), logging.getLogger('timm_pe')
    handlers, levels = list(root.handlers), (root.level, ours.level)
    yield
    root.handlers = handlers
    root.setLevel(levels[0])
    ours.setLevel(levels[1])


@pytest.fixture(scope='session', autouse=True)
def _slow_bfloat16():
    """The processor that a test runs on decides nothing: --teacher-dtype auto is float32 here."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ('_is_avx512_bf16_supported', '_is_amx_tile_supported'):
            patch.setattr(torch.cpu, name, lambda: False, raising=False)
        yield


@pytest.fixture
def fast_bfloat16():
    """A processor on which --teacher-dtype auto may be bfloat16."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cpu, '_is_avx512_bf16_supported', lambda: True, raising=False)
        yield


@pytest.fixture(scope='session')
def image_folder(tmp_path_factory) -> Path:
    """A folder of tiny real PNGs: train (12 a class) and val (4 a class), 3 classes told apart by colour."""
    root = tmp_path_factory.mktemp('images')
    rng = np.random.default_rng(0)
    for split, number in (('train', 12), ('val', 4)):
        for c, name in enumerate(CLASSES):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(number):
                pixels = rng.integers(0, 120, (40, 40, 3))
                pixels[..., c] += 100
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f'{i}.png')
    return root


@pytest.fixture
def hears_sigint():
    """SIGINT as a terminal sets it: a shell that starts tests in the background lets them ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def small_run(image_folder, tmp_path) -> list[str]:
    """The command line of a run of seconds, without its models."""
    return [
        *(str(image_folder), '--num-classes', '3', '--img-size', '32', '-b', '8', '-j', '0', '--device', 'cpu'),
        *('--epochs', '2', '--warmup-epochs', '0', '--lr', '0.02', '--output', str(tmp_path), '--experiment', 'run'),
        *('--scale', '0.5', '1.0', '--log-interval', '2'),
    ]


@pytest.fixture
def uneven_shards(image_folder, tmp_path):
    """A `wds/` data set of 36 and 12 images with targets of several kinds, in shards of several lengths."""
    webdataset = pytest.importorskip('webdataset')
    info = {}
    for split, name, lengths in (('train', 'train', [9, 9, 9, 9]), ('validation', 'val', [10, 2])):
        images, files = sorted((image_folder / name).rglob('*.png')), []
        for length in lengths:
            files.append(f'x-{split}-{len(files):04d}.tar')
            (tmp_path / 'wds').mkdir(exist_ok=True)
            with webdataset.TarWriter(str(tmp_path / 'wds' / files[-1])) as tar:
                for i, path in enumerate(images[:length]):
                    label = ('ant', 'bee', 'cat').index(path.parent.name)
                    vector = [int(c == label) for c in range(3)]
                    targets = {'several': [label, 0], 'vector': vector, 'one': label, 'none': 'ant'}
                    tar.write({'__key__': f'{i:04d}', 'png': path.read_bytes(), 'cls': label, 'json': targets})
            images = images[length:]
        number = sum(lengths)
        info[split] = {'name': split, 'filenames': files, 'shard_lengths': lengths, 'num_samples': number}
    (tmp_path / 'wds' / '_info.json').write_text(json.dumps({'splits': info}))
    return tmp_path / 'wds'
