"""Where and how a run computes: device, ranks, seeds, precision, and the order of compile and DDP."""

import argparse
import importlib
import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from timm.task import TrainingTask
from timm.utils import NativeScaler, init_distributed_device, random_seed, set_jit_fuser

from .args import resolve_dtype
from .errors import RunError, UsageError, one_line

_logger = logging.getLogger(__name__)


@dataclass
class Runtime:
    """What every stage needs to know of the machine.

    Attributes:
        device: Device of this rank.
        distributed: More than one rank.
        rank: Global rank.
        world_size: Number of ranks.
        autocast: Context of a forward pass.
        scaler: Loss scaler of float16 AMP, else None.
        model_dtype: Dtype of the parameters, None is float32.
    """

    device: torch.device
    distributed: bool
    rank: int
    world_size: int
    autocast: Callable[[], AbstractContextManager]
    scaler: NativeScaler | None
    model_dtype: torch.dtype | None

    @property
    def is_primary(self) -> bool:
        """This rank writes files and talks."""
        return self.rank == 0


def setup_runtime(args: argparse.Namespace) -> Runtime:
    """Choose the device, join the other ranks, seed, and set the precision.

    `--device cuda` where there is none falls back to the CPU and says so.

    Raises:
        UsageError: A device that does not exist, or a precision that does not work.
    """
    for name in args.device_modules or ():
        try:
            importlib.import_module(name)
        except ImportError as e:
            raise UsageError(f"--device-modules: cannot import '{name}': {one_line(e)}") from e
    if args.fuser:
        set_jit_fuser(args.fuser)
    if args.device.startswith('cuda') and not torch.cuda.is_available():
        _logger.warning(f"No CUDA device here: '--device {args.device}' falls back to the CPU.")
        args.device = 'cpu'
    try:
        torch.device(args.device)
        device = init_distributed_device(args)
        torch.empty(0, device=device)
    except (RuntimeError, ValueError, AssertionError) as e:
        raise UsageError(f"--device: cannot use '{args.device}': {one_line(e)}") from e
    if device.type == 'cuda':
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.benchmark = True
    random_seed(args.seed, args.rank)
    if args.sync_bn and args.distributed and device.type == 'cpu':
        raise UsageError('--sync-bn needs GPUs: PyTorch has no synchronized batch norm on the CPU')
    model_dtype = resolve_dtype(args.model_dtype)
    if model_dtype is not None and model_dtype != torch.float32 and args.amp:
        raise UsageError(f'--amp wants float32 parameters, --model-dtype is {args.model_dtype}: drop one of them')
    amp_dtype = resolve_dtype(args.amp_dtype)
    return Runtime(
        device=device,
        distributed=args.distributed,
        rank=args.rank,
        world_size=args.world_size,
        autocast=partial(torch.autocast, device_type=device.type, dtype=amp_dtype) if args.amp else nullcontext,
        scaler=NativeScaler(device.type) if args.amp and amp_dtype == torch.float16 and device.type == 'cuda' else None,
        model_dtype=model_dtype,
    )


def on_primary(runtime: Runtime, write: Callable[[], None], what: str) -> None:
    """Let the primary rank write something; to be called on all ranks, and where it fails all of them know.

    Raises:
        RunError: It cannot be written.
    """
    failure = [None]
    if runtime.is_primary:
        try:
            write()
        except torch.OutOfMemoryError:
            raise
        except (OSError, RuntimeError, SafetensorError) as e:  # torch's own file writer raises RuntimeError
            failure = [f'cannot write {what}: {_why(e)}']
    if runtime.distributed:
        dist.broadcast_object_list(failure, src=0)
    if failure[0]:
        raise RunError(f'{failure[0]}; what was written before is whole')


def _why(error: BaseException) -> str:
    cause = error
    while cause.__context__ is not None and not isinstance(cause, OSError):
        cause = cause.__context__
    if isinstance(cause, OSError) and cause.strerror:
        return cause.strerror
    return f'is the disk full? ({one_line(error)})'  # the file writers of torch and safetensors keep the reason to themselves


def describe_precision(args: argparse.Namespace) -> str:
    """Precision of the student in words."""
    return f'AMP {args.amp_dtype}' if args.amp else (args.model_dtype or 'float32')


def describe_teacher_precision(args: argparse.Namespace, dtype: torch.dtype) -> str:
    """Precision of a teacher of this dtype in words; AMP is the student's and the teacher's, --model-dtype the student's alone."""
    return describe_precision(args) if args.amp and not args.teacher_dtype else str(dtype).removeprefix('torch.')


def prepare_task(task: TrainingTask, args: argparse.Namespace, runtime: Runtime) -> None:
    """Moving average, compile, DDP, in this order: each wraps what the one before must still see unwrapped."""
    if args.torchcompile:
        task.compile(backend=args.torchcompile, mode=args.torchcompile_mode)
        if task.has_ema() and not args.model_ema_force_cpu:
            task.compile_ema(backend=args.torchcompile, mode=args.torchcompile_mode)
    if runtime.distributed:
        if args.no_ddp_bb:  # DDP would then not even make them equal at the start
            for buffer in task.get_trainable_module().buffers():
                dist.broadcast(buffer, src=0)
        device_ids = [runtime.device] if runtime.device.type == 'cuda' else None
        task.prepare_distributed(device_ids=device_ids, **({'broadcast_buffers': False} if args.no_ddp_bb else {}))
