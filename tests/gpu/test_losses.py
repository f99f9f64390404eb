"""Losses of the same steps on the device and, in float64, on the CPU."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import pytest
import timm
import torch
from conftest import DEVICE
from timm.utils import NativeScaler

from timm_pe import ProjectorEnsembleTask, create_teacher

STEPS = 20
SLOW = pytest.mark.skipif(DEVICE == 'cpu', reason='a CPU takes minutes for float16')


def losses(
    device: str,
    dtype: torch.dtype = torch.float32,
    autocast: torch.dtype | None = None,
    channels_last: bool = False,
    teacher: torch.dtype | None = None,
) -> list[float]:
    """Losses of steps whose batches and weights are the same everywhere."""
    torch.manual_seed(0)
    student = timm.create_model('test_resnet', num_classes=3)
    network = timm.create_model('test_resnet', num_classes=3)
    with torch.no_grad():  # trained networks have such statistics, fresh ones do not
        network.train()(torch.randn(32, 3, 32, 32))
    student, network = student.to(dtype), network.to(dtype)
    task = ProjectorEnsembleTask(
        student.to(device),
        create_teacher(network, device=device, dtype=teacher, channels_last=channels_last, autocast_dtype=autocast),
        act='none',
        kd_loss_weight=0.5,
        device=torch.device(device),
        dtype=dtype,
        verbose=False,
    ).train()
    optimizer = torch.optim.SGD(task.get_trainable_module().parameters(), lr=1e-3, momentum=0.9)
    scaler = NativeScaler(device) if autocast == torch.float16 and device != 'cpu' else None
    if scaler is not None:  # it begins where no update is dropped: the others drop none
        scaler._scaler = torch.amp.GradScaler(device, init_scale=64.0)
    found = []
    for i in range(STEPS):
        g = torch.Generator().manual_seed(i)
        x = torch.randn(32, 3, 32, 32, generator=g, dtype=torch.float64).to(device, dtype)
        y = torch.randint(3, (32,), generator=g).to(device)
        if channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        with torch.autocast(device, autocast) if autocast else nullcontext():
            loss = task(x, y)['loss']
        if scaler is not None:
            scaler(loss, optimizer)
        else:
            loss.backward()
            optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    if scaler is not None:
        assert scaler._scaler.get_scale() > 1
    return found


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Let CUDA round the inputs of products in float32 to 10 bits, or not; a CPU never does."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def compare(exact: list[float], found: list[float], tolerance: float, record_property) -> None:
    """Are they near each other, and has the training worked?"""
    record_property('deviation', max(abs(a - b) / a for a, b in zip(exact, found, strict=True)))
    assert exact[-1] < 0.9 * exact[0]  # it has learnt, so its gradients were right
    assert found == pytest.approx(exact, rel=tolerance)


@pytest.fixture(scope='module')
def exact() -> list[float]:
    return losses('cpu', torch.float64)


@pytest.mark.parametrize(
    ('kind', 'tolerance'),
    [
        ({}, 1e-3),
        ({'channels_last': True}, 1e-3),
        ({'autocast': torch.bfloat16}, 0.03),
        ({'autocast': torch.bfloat16, 'channels_last': True}, 0.03),
        pytest.param({'autocast': torch.float16}, 0.01, marks=SLOW),
        pytest.param({'autocast': torch.float16, 'channels_last': True, 'teacher': torch.float16}, 0.01, marks=SLOW),
        ({'teacher': torch.bfloat16}, 0.01),
    ],
    ids=lambda value: ' '.join(f'{k}={v}' for k, v in value.items()) if isinstance(value, dict) else '',
)
def test_a_precision_moves_the_losses_no_further_than_its_rounding(kind, tolerance, exact, record_property):
    with tf32(False):
        compare(exact, losses(DEVICE, **kind), tolerance, record_property)


@pytest.mark.skipif(DEVICE == 'cpu', reason='a CPU has no TF32')
def test_tf32_moves_the_losses_no_further_than_its_rounding(exact, record_property):
    with tf32(True):
        compare(exact, losses(DEVICE), 0.01, record_property)
