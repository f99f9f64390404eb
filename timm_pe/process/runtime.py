"""Where and how a run computes: device, ranks, seeds, precision, and the order of compile and DDP."""

import importlib
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
import torch.nn as nn
from safetensors import SafetensorError
from timm.task import TrainingTask
from timm.utils import NativeScaler, random_seed, set_jit_fuser, world_info_from_env
from timm.utils.distributed import init_distributed_device_so

from ..config.derive import torch_dtype
from ..config.flags import DeviceFlags
from ..config.run_config import RunConfig
from ..errors import RunError, UsageError, one_line

_logger = logging.getLogger(__name__)
_T = TypeVar('_T')

# how long ranks wait for what one of them does alone, such as to allocate a cache or to delete an old run; PyTorch's own
# limits are 10 minutes (NCCL) and 30 (gloo)
HOST_TIMEOUT = timedelta(hours=1)


@dataclass
class Runtime:
    """What every stage needs to know about the machine.

    Attributes:
        device: Device of this rank.
        distributed: More than one rank.
        rank: Global rank.
        world_size: Number of ranks.
        autocast: Context of a forward pass.
        scaler: Loss scaler of float16 AMP, else None.
        model_dtype: Dtype of the parameters, None means float32.
        hosts: Gloo group of all ranks, in which they wait for each other on the host; None is the default group, where
            there is one rank or gloo cannot connect.
    """

    device: torch.device
    distributed: bool
    rank: int
    world_size: int
    autocast: Callable[[], AbstractContextManager[Any]]
    scaler: NativeScaler | None
    model_dtype: torch.dtype | None
    hosts: dist.ProcessGroup | None = None

    @property
    def is_primary(self) -> bool:
        """Whether this rank writes files and logs."""
        return self.rank == 0

    def gather(self, own: _T) -> list[_T]:
        """The value of each rank, by rank; all ranks must call it, and wait up to `HOST_TIMEOUT` for the last."""
        ranks = [own] * self.world_size
        if self.distributed:
            dist.all_gather_object(ranks, own, group=self.hosts)
        return ranks

    def share(self, own: _T) -> _T:
        """The value of rank 0; all ranks must call it, and wait up to `HOST_TIMEOUT` for rank 0."""
        shared = [own]
        if self.distributed:
            dist.broadcast_object_list(shared, src=0, group=self.hosts)
        return shared[0]


def setup_runtime(config: RunConfig) -> Runtime:
    """Choose the device, join the other ranks, seed, and set the precision.

    Without CUDA, `--device cuda` falls back to the CPU and says so; one of several ranks stops.

    Raises:
        UsageError: A device that does not exist, or a precision that does not work.
    """
    for name in config.device_modules or ():
        try:
            importlib.import_module(name)
        except ImportError as e:
            raise UsageError(f"--device-modules: cannot import '{name}': {one_line(e)}") from e
    if config.fuser:
        set_jit_fuser(config.fuser)
    name = config.device
    if name.startswith('cuda') and not torch.cuda.is_available():
        if world_info_from_env()[2] > 1:  # the other ranks may have one: they would wait for this one for hours
            raise UsageError(
                f"--device: no CUDA device for this rank, '{name}' needs one on each: --device cpu needs none"
            )
        if not config.evaluate:  # an evaluation is often of a run of this machine
            asked = f"'--device {name}', here and in timm the default," if name == 'cuda' else f"'--device {name}'"
            _logger.warning(f'No CUDA device here: {asked} falls back to the CPU.')
        name = 'cpu'
    try:
        torch.device(name)
        joined = init_distributed_device_so(name)
        device = torch.device(joined['device'])
        torch.empty(0, device=device)
    except (RuntimeError, ValueError, AssertionError) as e:
        raise UsageError(f"--device: cannot use '{name}': {one_line(e)}") from e
    use_fast_kernels(device)
    distributed, rank = joined['distributed'], joined['global_rank']
    random_seed(config.seed, rank)
    if config.sync_bn and distributed and device.type == 'cpu':
        raise UsageError('--sync-bn needs GPUs: PyTorch has no synchronized batch norm on the CPU')
    model_dtype = torch_dtype(config.model_dtype)
    if model_dtype is not None and model_dtype != torch.float32 and config.amp:
        raise UsageError(f'--amp wants float32 parameters, --model-dtype is {config.model_dtype}: drop one of them')
    amp_dtype = torch_dtype(config.amp_dtype)
    return Runtime(
        device=device,
        distributed=distributed,
        rank=rank,
        world_size=joined['world_size'],
        autocast=partial(torch.autocast, device_type=device.type, dtype=amp_dtype) if config.amp else nullcontext,
        scaler=NativeScaler(device.type)
        if config.amp and amp_dtype == torch.float16 and device.type == 'cuda'
        else None,
        model_dtype=model_dtype,
        hosts=_connect_hosts(device, joined['world_size']) if distributed else None,
    )


def use_fast_kernels(device: torch.device) -> None:
    """On CUDA, let float32 products use TF32 and let cuDNN choose its kernels by trying them, as timm's script does."""
    if device.type == 'cuda':
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.benchmark = True


def _connect_hosts(device: torch.device, world_size: int) -> dist.ProcessGroup | None:
    """Make the group of the hosts; None, and a warning, if they cannot connect.

    Waiting in it needs no device, whose own group NCCL would end after 10 minutes, with a core busy on each rank.
    """
    interface = os.environ.get('GLOO_SOCKET_IFNAME', "that of the host's name")
    _logger.info(
        f'{world_size} ranks connect by gloo, network interface: {interface} (GLOO_SOCKET_IFNAME names another).'
    )
    group, why = None, ''
    try:
        group = cast(dist.ProcessGroup, dist.new_group(backend='gloo', timeout=HOST_TIMEOUT))
    except RuntimeError as e:
        why = one_line(e)
    failed = torch.tensor(int(bool(why)), device=device)
    dist.all_reduce(failed, dist.ReduceOp.MAX)
    if not failed:
        return group
    _logger.warning(
        f'The hosts cannot connect by gloo ({why or "another rank says so"}): ranks wait for each other on the devices, and '
        f'signals are looked for now and then. GLOO_SOCKET_IFNAME names the network interface to use.'
    )
    return None


@contextmanager
def ranks_together(runtime: Runtime) -> Iterator[None]:
    """Let all ranks continue, or stop all with the error of the first rank that has one."""
    own: UsageError | RunError | None = None
    try:
        yield
    except (UsageError, RunError) as e:
        own = e
    failure = next(filter(None, runtime.gather(own)), None)
    if failure:
        raise failure


def on_primary(runtime: Runtime, write: Callable[[], None], what: str) -> None:
    """Write something on the primary rank; call it on all ranks, which all raise if it fails.

    Raises:
        RunError: It cannot be written.
    """
    with ranks_together(runtime):
        if runtime.is_primary:
            try:
                write()
            except torch.OutOfMemoryError:
                raise
            except (OSError, RuntimeError, SafetensorError) as e:  # torch's own file writer raises RuntimeError
                raise RunError(f'cannot write {what}: {_why(e)}; what was written before is whole') from e


def _why(error: BaseException) -> str:
    cause = error
    while cause.__context__ is not None and not isinstance(cause, OSError):
        cause = cause.__context__
    if isinstance(cause, OSError) and cause.strerror:
        return cause.strerror
    return f'is the disk full? ({one_line(error)})'  # the file writers of torch and safetensors keep the reason to themselves


def describe_precision(flags: DeviceFlags) -> str:
    """Precision of the student in words."""
    return f'AMP {flags.amp_dtype}' if flags.amp else (flags.model_dtype or 'float32')


def has_fast_bfloat16(device: str) -> bool:
    """Whether a device of this type is a CPU with AVX512-BF16 or AMX."""
    names = ('_is_avx512_bf16_supported', '_is_amx_tile_supported')
    return device == 'cpu' and any(getattr(torch.cpu, name, lambda: False)() for name in names)


def prepare_task(task: TrainingTask, config: RunConfig, runtime: Runtime) -> None:
    """Compile the task and its moving average, then wrap the task in DDP: what is compiled must not be wrapped yet."""
    if config.torchcompile:
        # with batches of many sizes PyTorch decides what shapes vary, for teachers too
        dynamic = {'dynamic': None} if config.train_img_sizes else {}
        task.compile(backend=config.torchcompile, mode=config.torchcompile_mode, **dynamic)
        if task.has_ema() and not config.model_ema_force_cpu:
            task.compile_ema(backend=config.torchcompile, mode=config.torchcompile_mode)
    if runtime.distributed:
        if config.no_ddp_bb:  # DDP would then not equalize them at the start either
            for buffer in cast(nn.Module, task.get_trainable_module()).buffers():
                dist.broadcast(buffer, src=0)
        device_ids = [runtime.device] if runtime.device.type == 'cuda' else None
        task.prepare_distributed(device_ids=device_ids, **({'broadcast_buffers': False} if config.no_ddp_bb else {}))
