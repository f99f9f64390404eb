"""The environment of a measured result."""

import os
import platform
from pathlib import Path

import timm
import torch

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


def _cpu_name() -> str:
    info = Path('/proc/cpuinfo')
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(':', 1)[1].strip() for line in lines if line.startswith('model name')]
    return names[0] if names else platform.processor() or platform.machine()
