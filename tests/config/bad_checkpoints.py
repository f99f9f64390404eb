"""Checkpoints that no run may load: damaged, of another model, hostile. Each is one file, written by one function."""

import argparse
import functools
import gzip
import io
import json
import os
import pickle
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch

# what a hostile file would leave behind if anything in it ran; the name has no folder, so it would be in the current one
CANARY = 'canary'


class Runs:
    """Pickles into a call of `function`: what unpickling it would run."""

    def __init__(self, function: Callable, *args: Any):
        self.call = function, args

    def __reduce__(self) -> tuple:
        return self.call


@functools.cache
def _state(name: str = 'test_resnet') -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=3).state_dict()


def _with(key: str, change: Callable[[torch.Tensor], Any]) -> Callable[[], dict]:
    def state() -> dict:
        weights = _state()
        return {**weights, key: change(weights[key])}

    return state


def _poisoned(value: float) -> Callable[[], dict]:
    def poison(weight: torch.Tensor) -> torch.Tensor:
        weight = weight.clone()
        weight.view(-1)[3] = value
        return weight

    return _with('conv1.0.weight', poison)


# What stands for the weights -------------------------------------------------------------------------------------------

# name -> what is under 'state_dict', and what the error says
WEIGHTS: dict[str, tuple[Callable[[], Any], str]] = {
    'of another architecture': (lambda: _state('test_vit'), 'does not fit ResNet: '),
    'with other shapes': (_with('conv1.0.weight', lambda w: w[:5]), 'other shapes (conv1.0.weight [5, 3, 3, 3] for ['),
    'with renamed keys': (lambda: {f'backbone.{k}': v for k, v in _state().items()}, 'unexpected keys (backbone.conv1'),
    'without a layer': (
        lambda: {k: v for k, v in _state().items() if 'conv1' not in k},
        'missing keys (conv1.0.weight',
    ),
    'with a layer too many': (lambda: {**_state(), 'aux.weight': torch.zeros(3)}, '1 unexpected keys (aux.weight)'),
    'with a NaN': (_poisoned(float('nan')), 'not finite (conv1.0.weight)'),
    'with an inf': (_poisoned(float('inf')), 'not finite (conv1.0.weight)'),
    'in integers': (_with('conv1.0.weight', lambda w: w.mul(100).int()), 'torch.int32 for torch.float32'),
    'in booleans': (_with('conv1.0.weight', lambda w: w > 0), 'torch.bool for torch.float32'),
    'in complex numbers': (_with('conv1.0.weight', lambda w: w + 1j), 'torch.complex64 for torch.float32'),
    'that are sparse': (_with('fc.weight', lambda w: w.to_sparse()), 'fc.weight'),
    'that are quantized': (
        _with('fc.weight', lambda w: torch.quantize_per_tensor(w, 0.1, 0, torch.qint8)),
        'fc.weight',
    ),
    'without values': (_with('fc.weight', lambda w: w.to('meta')), 'fc.weight'),
    'in a list': (lambda: [*_state().values()], 'is no state_dict'),
    'that are None': (lambda: None, 'is no state_dict'),
    'that are a number': (lambda: 3.5, 'is no state_dict'),
    'that are a text': (lambda: 'conv1.weight', 'is no state_dict'),
    'that are none at all': (dict, 'is no state_dict: it is empty'),
    'nested without tensors': (lambda: {'a': {'b': {'c': {}}}}, 'is no state_dict: a'),
    'with a text among them': (lambda: {**_state(), 'fc.bias': 'zeros'}, 'is no state_dict: fc.bias is a str'),
    'with numbers for names': (lambda: dict(enumerate(_state().values())), 'is no state_dict'),
    'with terminal codes for names': (lambda: {'\x1b[2J\x07': torch.zeros(3)}, r'\x1b[2J\x07'),
}


def write_weights(kind: str, path: Path) -> None:
    """A training checkpoint with bad weights in it."""
    torch.save({'state_dict': WEIGHTS[kind][0](), 'epoch': 0, 'version': 2}, path)


# What is wrong with the file as such -----------------------------------------------------------------------------------


@functools.cache
def _good() -> bytes:
    file = io.BytesIO()
    torch.save({'state_dict': _state(), 'epoch': 0, 'version': 2}, file)
    return file.getvalue()


def _saved(thing: Any, **kwargs: Any) -> bytes:
    file = io.BytesIO()
    torch.save(thing, file, **kwargs)
    return file.getvalue()


def _hostile(*call: Any) -> dict:
    return {'state_dict': {'fc.bias': torch.zeros(3)}, 'args': Runs(*call), 'epoch': 0}


def _rezipped(change: Callable[[str, bytes], bytes]) -> bytes:
    """A small checkpoint, its records changed by `change(name, content)`."""
    file = io.BytesIO()
    weights = {'state_dict': {'fc.bias': torch.arange(4.0)}}
    with zipfile.ZipFile(io.BytesIO(_saved(weights))) as source, zipfile.ZipFile(file, 'w') as target:
        for name in source.namelist():
            target.writestr(name, change(name, source.read(name)))
    return file.getvalue()


@functools.cache
def _bomb(record: str, piece: bytes) -> bytes:
    """A checkpoint of 4 MB whose `record` unpacks to 3.75 GiB of `piece`."""
    deflate = zlib.compressobj(9, zlib.DEFLATED, -15)
    # flushed in full, compressed data can be strung together: 240 times 16 MiB, and an empty last block
    packed = deflate.compress(piece * (2**24 // len(piece))) + deflate.flush(zlib.Z_FULL_FLUSH)
    file = io.BytesIO(_rezipped(lambda name, data: packed * 240 + b'\x03\x00' if name.endswith(record) else data))
    with zipfile.ZipFile(file, 'a') as archive:
        info = next(i for i in archive.infolist() if i.filename.endswith(record))
        info.compress_type, info.file_size = zipfile.ZIP_DEFLATED, 240 * 2**24
        archive.comment = b'so that the table of contents is written again'
    return file.getvalue()


def _lying_size(size: bytes) -> bytes:
    """A checkpoint whose pickle gives its storage of 4 numbers the size `size` (a pickle opcode)."""
    return _rezipped(lambda name, data: data.replace(b'K\x04', size) if name.endswith('data.pkl') else data)


def _tar() -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode='w') as tar:
        for name in ('sys_info', 'pickle', 'storages', 'tensors'):
            data = pickle.dumps(Runs(os.system, f'touch {CANARY}'))
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return file.getvalue()


def _torchscript() -> bytes:
    file = io.BytesIO()
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), file)
    return file.getvalue()


def _zip_of_a_text() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, 'w') as z:
        z.writestr('readme.txt', 'weights are elsewhere')
    return file.getvalue()


NO_TORCH = 'is not a PyTorch checkpoint'
LFS = b'version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935\nsize 46830571\n'
# name -> bytes of the .pth.tar, and what the error says
FILES: dict[str, tuple[Callable[[], bytes], str]] = {
    'empty': (lambda: b'', 'is empty'),
    'a text': (lambda: b'hello\n' * 50, NO_TORCH),
    'a web page': (lambda: b'<!DOCTYPE html><html><body>404 Not Found</body></html>', NO_TORCH),
    'a git-lfs pointer': (lambda: LFS, NO_TORCH),
    'a JSON': (lambda: b'{"state_dict": {}}', NO_TORCH),
    'a picture': (lambda: b'\x89PNG\r\n\x1a\n' + bytes(500), NO_TORCH),
    'zeros': (lambda: bytes(10_000), NO_TORCH),
    'noise': (lambda: torch.arange(9999).mul(7919).to(torch.uint8).numpy().tobytes(), NO_TORCH),
    'gzipped': (lambda: gzip.compress(_good()), NO_TORCH),
    'a tar': (_tar, NO_TORCH),
    'cut in the middle': (lambda: (d := _good())[: len(d) // 2], 'is cut off or damaged'),
    'cut at its end': (lambda: _good()[:-10], 'is cut off or damaged'),
    'without its first bytes': (lambda: _good()[10:], NO_TORCH),
    'cut to 4 bytes': (lambda: _good()[:4], 'is cut off or damaged'),
    'a zip of a text': (_zip_of_a_text, 'cannot read'),
    'a zip without its pickle': (lambda: _rezipped(lambda n, d: b'' if n.endswith('.pkl') else d), 'cannot read'),
    'with a lying storage size': (lambda: _lying_size(b'J' + struct.pack('<i', 2**30)), 'cannot read'),
    'with a negative storage size': (lambda: _lying_size(b'J' + struct.pack('<i', -4)), 'cannot read'),
    'with a storage size beyond all memory': (lambda: _lying_size(b'\x8a\x07' + bytes(6) + b'\x01'), 'cannot read'),
    'a storage bomb': (lambda: _bomb('data/0', b'\0'), 'would unpack to 3.8 GB'),
    'a pickle bomb': (lambda: _bomb('data.pkl', b'N0'), 'would unpack to 3.8 GB'),
    'code: os.system': (lambda: _saved(_hostile(os.system, f'touch {CANARY}')), 'holds code'),
    'code: exec': (lambda: _saved(_hostile(exec, f"open('{CANARY}', 'w')")), 'holds code'),
    'code: eval': (lambda: _saved(_hostile(eval, f"open('{CANARY}', 'w')")), 'holds code'),
    'code: import': (lambda: _saved(_hostile(__import__, 'os')), 'holds code'),
    'code: open': (lambda: _saved(_hostile(open, CANARY, 'w')), 'holds code'),
    'code: among the weights': (
        lambda: _saved({'state_dict': {**_state(), 'fc.bias': Runs(os.system, f'touch {CANARY}')}}),
        'holds code',
    ),
    'code: in the old format': (
        lambda: _saved(_hostile(os.system, f'touch {CANARY}'), _use_new_zipfile_serialization=False),
        'is not loaded',
    ),
    'code: a bare pickle': (lambda: pickle.dumps(Runs(os.system, f'touch {CANARY}')), NO_TORCH),
    'code: an old bare pickle': (lambda: pickle.dumps(Runs(exec, f"open('{CANARY}', 'w')"), protocol=0), NO_TORCH),
    'a whole module': (lambda: _saved(torch.nn.Linear(2, 2)), 'holds code'),
    'a TorchScript': (_torchscript, 'is a TorchScript'),
    'a list': (lambda: _saved([torch.zeros(3)]), 'is no '),
    'a tensor': (lambda: _saved(torch.zeros(3)), 'is no '),
    'a number': (lambda: _saved(3), 'is no '),
}


# Safetensors ------------------------------------------------------------------------------------------------------------


def _tensor(shape: list, start: int, end: int, dtype: str = 'F32') -> dict:
    return {'dtype': dtype, 'shape': shape, 'data_offsets': [start, end]}


def _safe(header: Any, data: bytes = bytes(12), length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack('<Q', len(text) if length is None else length) + text + data


_BIAS = {'fc.bias': _tensor([3], 0, 12)}
# name -> bytes of the .safetensors
SAFETENSORS: dict[str, Callable[[], bytes]] = {
    'empty': lambda: b'',
    'a text': lambda: b'hello\n' * 50,
    'zeros': lambda: bytes(10_000),
    'a torch file': _good,
    'whose header is longer than the file': lambda: _safe(_BIAS, length=10_000),
    'whose header is longer than any file': lambda: _safe(_BIAS, length=2**63),
    'whose header is of length 0': lambda: _safe(_BIAS, length=0),
    'whose header is cut': lambda: _safe(_BIAS)[:20],
    'whose header is no JSON': lambda: _safe(b'{"fc.bias": {'),
    'whose header is a list': lambda: _safe([1, 2, 3]),
    'whose header is no text': lambda: _safe(b'\xff\xfe' * 20),
    'whose header nests deep': lambda: _safe(b'{"a":' * 5000),
    'with offsets outside': lambda: _safe({'fc.bias': _tensor([3], 0, 12), 'x': _tensor([1000], 12, 4012)}),
    'with offsets backwards': lambda: _safe({'fc.bias': _tensor([3], 12, 0)}),
    'with overlapping tensors': lambda: _safe({'fc.bias': _tensor([3], 0, 12), 'x': _tensor([3], 0, 12)}),
    'with a hole': lambda: _safe({'fc.bias': _tensor([2], 4, 12)}),
    'with a negative shape': lambda: _safe({'fc.bias': _tensor([-3], 0, 12)}),
    'with a shape beyond all numbers': lambda: _safe({'fc.bias': _tensor([2**62, 2**62], 0, 12)}),
    'with another size than its shape': lambda: _safe({'fc.bias': _tensor([7], 0, 12)}),
    'with an unknown dtype': lambda: _safe({'fc.bias': _tensor([3], 0, 12, 'X99')}),
    'with data missing': lambda: _safe(_BIAS, data=bytes(5)),
    'with data too much': lambda: _safe(_BIAS, data=bytes(50)),
    'without tensors': lambda: _safe({}, data=b''),
    'of another model': lambda: _safe({'head.bias': _tensor([3], 0, 12)}),
}


# What is not even a file ------------------------------------------------------------------------------------------------


def _fifo(path: Path) -> None:
    os.mkfifo(path)


def _link(target: str) -> Callable[[Path], None]:
    return lambda path: path.symlink_to(path if target == 'itself' else target)


def _huge(path: Path) -> None:
    with open(path, 'wb') as f:
        f.truncate(20 * 2**30)  # sparse: nothing of it is on the disk


def _locked(path: Path) -> None:
    path.write_bytes(_good())
    path.chmod(0)


# name -> what makes it, and what the error says
PLACES: dict[str, tuple[Callable[[Path], None], str]] = {
    'nothing': (lambda path: None, 'no file'),
    'a folder without checkpoints': (Path.mkdir, 'holds no checkpoint'),
    'a link to itself': (_link('itself'), 'no file'),
    'a link to nowhere': (_link('nowhere'), 'no file'),
    'an endless device': (_link('/dev/zero'), 'no file'),
    'an empty device': (_link('/dev/null'), 'no file'),
    'a pipe that nobody fills': (_fifo, 'no file'),
    'a file that cannot be read': (_link('/proc/self/mem'), 'cannot read'),
    'a file that may not be read': (_locked, 'cannot read'),
    'a sparse file of 20 GB': (_huge, NO_TORCH),
}


# Training checkpoints ----------------------------------------------------------------------------------------------------


def _projectors(width: int) -> dict:
    """What a run keeps of 3 linear projectors from 96 to `width`."""
    weights = {'projectors.fc.weight': torch.zeros(3 * width, 96), 'projectors.fc.bias': torch.zeros(3 * width)}
    return {'projection': weights, 'act': 'relu', 'num_projectors': 3, 'projector': 'linear'}


def _training(**changes: Any) -> Callable[[], dict]:
    """A training checkpoint of a run with a teacher, good but for `changes`."""
    return lambda: {
        'state_dict': _state(),
        'epoch': 0,
        'version': 2,
        'arch': 'test_resnet',
        'args': argparse.Namespace(model='test_resnet', opt='sgd'),
        'optimizer': {'state': {}, 'param_groups': []},
        'task_state': _projectors(96),
        **changes,
    }


# name -> what torch.save gets, and what the error says
TRAINING: dict[str, tuple[Callable[[], Any], str]] = {
    'weights alone': (_state, 'is no training checkpoint'),
    'without weights': (lambda: {'epoch': 3, 'optimizer': {}}, 'is no training checkpoint'),
    'whose epoch is a text': (_training(epoch='last'), "epoch is 'last'"),
    'whose epoch is negative': (_training(epoch=-4), 'epoch is -4'),
    'whose epoch is NaN': (_training(epoch=float('nan')), 'epoch is nan'),
    'whose epoch is a list': (_training(epoch=[1]), 'epoch is [1]'),
    'whose version is a text': (_training(version='two'), "version is 'two'"),
    'whose optimizer is a text': (_training(optimizer='sgd'), "optimizer is 'sgd'"),
    'whose optimizer is empty': (_training(optimizer={}), 'does not fit this run'),
    'whose optimizer has other groups': (_training(), 'does not fit this run'),
    'whose task state is a list': (_training(task_state=[1, 2]), 'task_state is [1, 2]'),
    'whose projectors are of another teacher': (_training(task_state=_projectors(7)), 'projectors'),
    'whose projectors are none': (_training(task_state={'projection': {}}), 'Missing key'),
    'whose optimizer has another name': (
        _training(args=argparse.Namespace(opt='adamw')),
        'was trained with --opt adamw',
    ),
    'whose optimizer has a number for a name': (_training(args=argparse.Namespace(opt=7)), 'was trained with --opt 7'),
}
