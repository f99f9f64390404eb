"""The environment of a measured result, and its file."""

import os
import platform
from pathlib import Path

import timm
import torch

from timm_pe.process.files import replaced
from timm_pe.version import __version__


def environment(device: str = 'cpu') -> dict[str, str | int]:
    """Hardware and versions, as they go into every result file."""
    gpu = {'gpu': torch.cuda.get_device_name(0), 'cuda': torch.version.cuda} if device.startswith('cuda') else {}
    return {
        'device': device,
        'cpu': _cpu_name(),
        'cores': len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1,
        **gpu,
        'timm_pe': __version__,
        'torch': torch.__version__,
        'timm': timm.__version__,
        'python': platform.python_version(),
        'system': platform.system(),
    }


def write(path: Path, text: str) -> None:
    """Write a file as a whole or not at all; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replaced(path) as partial:
        Path(partial).write_text(text)


def _cpu_name() -> str:
    info = Path('/proc/cpuinfo')
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(':', 1)[1].strip() for line in lines if line.startswith('model name')]
    return names[0] if names else platform.processor() or platform.machine()
