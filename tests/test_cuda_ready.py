"""What a CUDA device would stumble over, seen without one: training on fake tensors that say they are on it.

A fake tensor knows shape, dtype and device and has no numbers. To ask it for one, as `.item()` or an `if` do, raises: on a
device the host would wait there. So does an operation of tensors on two devices. A forward pass runs on `cuda`, with its
autocast; a backward pass would ask the driver for the device, so whole epochs run on `meta`.
"""

import dataclasses
import shutil
from collections import OrderedDict
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import helpers
import numpy as np
import pytest
import timm
import torch
import torch.nn as nn
from helpers import KINDS, KINDS_OF_TWO, PAIR, TWO
from PIL import Image
from timm.utils import unwrap_model
from torch._dynamo.backends.debugging import aot_eager
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from timm_pe import ProjectorEnsembleTask, create_teacher
from timm_pe.config.run_config import parse_config
from timm_pe.data.draws import IndexedTarget, LabeledTarget
from timm_pe.process.runtime import Runtime
from timm_pe.train import trainer as trainers
from timm_pe.train.meters import LossMeter, batch_scale
from timm_pe.train.nonfinite import UpdateGuard
from timm_pe.train.trainer import Trainer

CUDA, META = torch.device('cuda'), torch.device('meta')
PAIR_OR_TWO = [*((PAIR, flags) for flags in KINDS), *((TWO, flags) for flags in KINDS_OF_TWO)]
ALL_KINDS = [pytest.param(models, flags, id=flags) for models, flags in PAIR_OR_TWO]
# what a step may wait for, as docs/guide/precision.md says
WAITING = [(PAIR, '--pe-teacher-norm whiten', '_linalg_eigh'), (TWO, '--pe-projector orthogonal', 'linalg_matrix_exp')]


@pytest.fixture(autouse=True)
def autocasts(monkeypatch) -> None:
    """Autocast for `cuda` as if there were one, and none for `meta`, which knows of no autocast."""
    real = torch.autocast
    monkeypatch.setattr('torch.amp.autocast_mode.torch.cuda.amp.common.amp_definitely_not_available', lambda: False)
    monkeypatch.setattr(torch.cuda, 'is_bf16_supported', lambda *args: True)

    def autocast(device_type: str, *args: Any, **kwargs: Any) -> Any:
        return nullcontext() if device_type == 'meta' else real(device_type, *args, **kwargs)

    monkeypatch.setattr(torch, 'autocast', autocast)


def make_trainer(argv: list[str], monkeypatch) -> Trainer:
    """The trainer of a run, whose teachers have found out what they find out once: that needs numbers."""
    trainer = helpers.make_trainer(argv, monkeypatch)
    for teacher in trainer.teachers:
        with torch.no_grad():
            teacher(torch.randn(8, 3, 32, 32))
    return trainer


class Waits(TorchDispatchMode):
    """Notes operations for which the host waits on a device, though they give fake tensors without a number."""

    names = {
        *('_linalg_eigh', 'linalg_matrix_exp', 'linalg_eig', '_linalg_svd', '_linalg_check_errors', 'nonzero'),
        *('masked_select', '_unique2', 'unique_consecutive', 'unique_dim', 'repeat_interleave', 'bincount'),
    }

    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix('aten::')
        on_device = any(isinstance(x, torch.Tensor) and x.device.type != 'cpu' for x in args)
        if on_device and (name in self.names or (name == 'index' and _has_mask(args[1]))):
            self.found.add(name)
        return func(*args, **(kwargs or {}))


def _has_mask(indices: Any) -> bool:
    return any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in indices)


def put_on(device: torch.device, trainer: Trainer) -> None:
    """Put all that a step touches on a device; in a fake mode."""
    task: Any = trainer.task
    moved: dict[int, torch.Tensor] = {}

    def fake(tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) not in moved:
            twin = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
            parameter = isinstance(tensor, nn.Parameter)
            moved[id(tensor)] = nn.Parameter(twin, tensor.requires_grad) if parameter else twin
        return moved[id(tensor)]

    roots = [task, unwrap_model(task.get_trainable_module()), task.get_trainable_module(ema=True)]
    for module in {m for root in roots if root is not None for m in root.modules()}:
        for tensors in (module._parameters, module._buffers):
            tensors.update({name: fake(t) for name, t in tensors.items() if t is not None})
    for group in trainer.optimizer.param_groups:
        group['params'] = [fake(p) for p in group['params']]
    if trainer.guard is not None:
        trainer.guard = UpdateGuard(task.get_trainable_module(), scales=False)
    trainer.runtime = dataclasses.replace(trainer.runtime, device=device)
    trainer.frees_late = False
    for cache in trainer.caches:
        cache.device = device


def labels(i: int) -> torch.Tensor:
    return torch.randint(3, (8,), device=META)


def soft_labels(i: int) -> torch.Tensor:
    return torch.rand(8, 3, device=META)


def labels_of_some(i: int) -> LabeledTarget:
    """Those of some images of the batch; the second one has none."""
    number = (5, 0, 8)[i % 3]
    return LabeledTarget(torch.randint(3, (number,), device=META), torch.arange(number, device=META))


def indexed_labels_of_some(i: int) -> IndexedTarget:
    return IndexedTarget(labels_of_some(i), np.arange(8 * i, 8 * i + 8), 0)


def fake_epoch(trainer: Trainer, monkeypatch, target: Callable[[int], Any] = labels) -> set[str]:
    """An epoch of the real loop on batches of the device; reading the meter, where a run does wait, is left out.

    Returns:
        The operations that wait.
    """
    batches = len(trainer.data.train)

    def epoch_batches(loader: Any, number: int, start: int) -> Any:
        for i in range(batches):
            yield i, (torch.randn(8, 3, 32, 32, device=META), target(i))

    with monkeypatch.context() as patch, Waits() as waits:
        patch.setattr(trainers, 'epoch_batches', epoch_batches)
        patch.setattr(LossMeter, 'read', lambda self: OrderedDict(loss=1.0))
        patch.setattr(UpdateGuard, 'say', lambda self, why: None)
        trainer.train_epoch(0)
    return waits.found


@pytest.mark.parametrize(('models', 'flags'), ALL_KINDS)
def test_an_epoch_never_waits_for_the_device_and_never_leaves_it(models, flags, small_run, monkeypatch):
    trainer = make_trainer([*small_run, *models, '--epochs', '1', *flags.split()], monkeypatch)
    with FakeTensorMode():
        put_on(META, trainer)
        assert not fake_epoch(trainer, monkeypatch)


@pytest.mark.parametrize(('models', 'flags', 'operation'), WAITING)
def test_what_waits_in_each_step_is_known(models, flags, operation, small_run, monkeypatch):
    trainer = make_trainer([*small_run, *models, '--epochs', '1', *flags.split()], monkeypatch)
    with FakeTensorMode():
        put_on(META, trainer)
        assert fake_epoch(trainer, monkeypatch) == {operation}


def test_soft_labels_do_not_wait_either(small_run, monkeypatch):
    trainer = make_trainer([*small_run, *PAIR, '--epochs', '1', '--mixup', '0.2'], monkeypatch)
    with FakeTensorMode():
        put_on(META, trainer)
        assert not fake_epoch(trainer, monkeypatch, soft_labels)


@pytest.fixture
def others(tmp_path) -> str:
    """20 images without labels."""
    (tmp_path / 'others').mkdir()
    for i in range(20):
        Image.new('RGB', (32, 32), (i, 3 * i, 7)).save(tmp_path / 'others' / f'{i}.png')
    return str(tmp_path / 'others')


@pytest.mark.parametrize('ranks', [1, 2])
def test_batches_of_which_some_images_or_none_have_a_label_do_not_wait(ranks, small_run, others, monkeypatch):
    flags = ['--unlabeled', others, '--pe-map-weight', '1', '--nonfinite', 'skip', '--grad-accum-steps', '2']
    trainer = make_trainer([*small_run, *TWO, '--epochs', '1', *flags], monkeypatch)
    trainer.task.criterion.world_size = ranks
    shared = []
    monkeypatch.setattr('torch.distributed.all_reduce', lambda t: shared.append(t.device))
    with FakeTensorMode():
        put_on(META, trainer)
        assert not fake_epoch(trainer, monkeypatch, labels_of_some)
    assert shared == [META] * (len(trainer.data.train) if ranks > 1 else 0)


def test_rows_of_caches_do_not_wait_either_and_the_teachers_do_not_run(small_run, others, tmp_path, monkeypatch):
    flags = ['--unlabeled', others, '--pe-map-weight', '1', '--kd-loss-weight', '0.5', '--teacher-cache-views', '1']
    argv = [*small_run, *TWO, '--epochs', '1', *flags, '--teacher-cache', str(tmp_path / 'cache')]
    trainer = make_trainer(argv, monkeypatch)
    trainer.train_epoch(0)  # the caches have rows of all its images
    assert all(len(cache.missing(0)) == 0 for cache in trainer.caches)
    assert len(trainer.caches) == 2
    for teacher in trainer.teachers:
        monkeypatch.setattr(teacher, 'forward', None)
    with FakeTensorMode():
        put_on(META, trainer)
        assert not fake_epoch(trainer, monkeypatch, indexed_labels_of_some)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16], ids=['float16', 'bfloat16'])
@pytest.mark.parametrize(('models', 'flags'), ALL_KINDS)
def test_under_cudas_autocast_a_forward_stays_on_the_device_and_its_losses_are_float32(
    models, flags, dtype, small_run, monkeypatch
):
    trainer = make_trainer([*small_run, *models, '--epochs', '1', *flags.split()], monkeypatch)
    with FakeTensorMode():
        put_on(CUDA, trainer)
        with torch.autocast('cuda', dtype):
            result = trainer.task(torch.randn(8, 3, 32, 32, device=CUDA), torch.randint(3, (8,), device=CUDA))
    assert result.pop('output').dtype == dtype  # autocast was on
    assert {(t.dtype, t.device.type) for t in result.values()} == {(torch.float32, 'cuda')}
    expected = {'loss', 'task_loss', 'pe_loss', *(['logit_loss'] if 'kd-loss' in flags else [])}
    if models is TWO:
        terms = ['pe_loss', *(['map_loss'] if 'map' in flags else [])]
        expected |= {f'{term}{of}' for term in terms for of in ('', '_test_vit', '_test_resnet')}
    assert set(result) == expected


def test_ranks_of_naflex_batches_share_without_waiting(monkeypatch):
    config = parse_config(['--dataset', 'sklearn/digits', '--naflex-loader', '--naflex-loss-scale', 'none', '-b', '8'])
    runtime = Runtime(META, True, 0, 2, nullcontext, None, None)
    monkeypatch.setattr('torch.distributed.all_reduce', lambda sizes: sizes.add_(4))
    assert batch_scale(config, runtime, 8).device == META  # a tensor of it has no number to wait for
    host = dataclasses.replace(runtime, device=torch.device('cpu'))
    assert batch_scale(config, host, 8) == pytest.approx(2 * 8 / 12)


class AsksForANumber(nn.Module):
    """A feature loss that asks for a number."""

    def forward(self, projected: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        loss = (projected - teacher).square().mean()
        return loss * loss.item()


class Leaves(nn.Module):
    """A feature loss with a tensor of the host."""

    def forward(self, projected: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        return ((projected - teacher).square().mean(0) * torch.ones(projected.shape[1], device='cpu')).mean()


@pytest.mark.parametrize(
    ('loss', 'error'), [(AsksForANumber(), DataDependentOutputException), (Leaves(), RuntimeError)]
)
def test_a_step_that_waits_or_leaves_the_device_is_found(loss, error, small_run, monkeypatch):
    trainer = make_trainer([*small_run, *PAIR, '--epochs', '1'], monkeypatch)
    trainer.task.feature_loss = loss
    with FakeTensorMode(), pytest.raises(error):
        put_on(META, trainer)
        fake_epoch(trainer, monkeypatch)


class CastsOf(TorchDispatchMode):
    """Counts how often one of some tensors is cast."""

    def __init__(self, tensors: list[torch.Tensor]):
        super().__init__()
        self.watched, self.casts = {id(t) for t in tensors}, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._to_copy.default and id(args[0]) in self.watched:
            self.casts += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize('teacher', ['test_resnet', 'test_vit', 'test_efficientnet'])
def test_under_amp_the_teachers_weights_are_not_cast_again_and_losses_are_float32(teacher, small_run, monkeypatch):
    argv = [*small_run, '--model', 'test_resnet', '--teacher', teacher, *PAIR[4:], '--kd-loss-weight', '0.5']
    trainer = make_trainer([*argv, '--amp', '--amp-dtype', 'bfloat16', '--epochs', '1'], monkeypatch)
    task: Any = trainer.task
    with FakeTensorMode():
        put_on(CUDA, trainer)
        task.teacher.autocast_dtype = None  # else its own region ends with the cache of casts, and hides nothing
        layers = [m for m in task.teacher.model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
        watch = CastsOf([p for layer in layers for p in layer.parameters()])
        with watch, torch.autocast('cuda', torch.bfloat16):
            result = task(torch.randn(8, 3, 32, 32, device=CUDA), torch.randint(3, (8,), device=CUDA))
    assert result['output'].dtype == torch.bfloat16
    assert watch.casts == 0
    terms = {name: value.dtype for name, value in result.items() if name != 'output'}
    assert set(terms) == {'loss', 'task_loss', 'pe_loss', 'logit_loss'}
    assert set(terms.values()) == {torch.float32}


def compiled_task(
    backend: Any, teachers: dict[str, int | None] | None = None, needs_logits: bool = True, **kwargs: Any
) -> ProjectorEnsembleTask:
    """A task of a ResNet student; `teachers` are architectures (a '_2' is left out) and their input sizes."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    student = timm.create_model('test_resnet', num_classes=3)
    made = [
        create_teacher(
            timm.create_model(name.removesuffix('_2'), num_classes=3, **({'img_size': 32} if 'vit' in name else {})),
            input_size=size,
            needs_logits=needs_logits,
        )
        for name, size in (teachers or {'test_vit': None}).items()
    ]
    kwargs = {'kd_loss_weight': 0.5 if needs_logits else 0.0, **kwargs}
    task = ProjectorEnsembleTask(student, made, act='none', verbose=False, **kwargs).train()
    if backend is not None:
        task.compile(backend=backend)
    return task


def steps(task: ProjectorEnsembleTask, number: int) -> list[float]:
    optimizer = torch.optim.SGD(task.get_trainable_module().parameters(), lr=0.05)
    losses = []
    for i in range(number):
        g = torch.Generator().manual_seed(i)
        result = task(torch.randn(8, 3, 32, 32, generator=g), torch.randint(3, (8,), generator=g))
        optimizer.zero_grad()
        result['loss'].backward()
        optimizer.step()
        losses.append(result['loss'].item())
    return losses


def train_validate_train(task: ProjectorEnsembleTask, graphs: list) -> list[int]:
    """The number of graphs after each part; training meets batches of 8, validation of 16 and others uncompiled."""
    numbers = []
    for part in range(3):
        if part == 1:
            task.eval()
            with torch.no_grad():
                for _ in range(2):
                    task.get_eval_model()(torch.randn(16, 3, 32, 32))
                    for teacher in task.teachers:
                        teacher.forward_uncompiled(torch.randn(5, 3, 32, 32))
        else:
            steps(task.train(), 3)
        numbers.append(len(graphs))
    return numbers


@pytest.mark.parametrize(
    ('teachers', 'needs_logits', 'maps'),
    [
        ({'test_vit': None}, True, 0.0),
        ({'test_resnet': 48}, True, 0.0),  # whose code is the student's
        ({'test_vit': None, 'test_resnet': 48}, False, 1.0),
        ({'test_resnet': None, 'test_resnet_2': 48}, True, 1.0),
    ],
)
def test_each_network_has_one_graph_of_static_shapes_and_nothing_is_compiled_after_the_first_epoch(
    teachers, needs_logits, maps
):
    graphs = []

    def record(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append([x for x in inputs if isinstance(x, (int, torch.SymInt))])
        return graph.forward

    task = compiled_task(record, teachers, needs_logits, map_weight=maps)
    # the student with projectors and the teachers, the student alone in validation
    number = 1 + len(teachers)
    assert train_validate_train(task, graphs) == [number, number + 1, number + 1]
    assert graphs == [[]] * (number + 1)  # no input that is a number: dynamo has met one shape of each


@pytest.mark.parametrize(('flags', 'dynamic'), [([], False), (['--train-img-sizes', '32', '48'], None)])
def test_shapes_of_compiled_teachers_may_vary_only_where_the_batches_do(flags, dynamic, small_run, monkeypatch):
    calls = []
    monkeypatch.setattr(torch, 'compile', lambda function, **kwargs: calls.append(kwargs) or function)
    helpers.make_trainer([*small_run, *TWO, '--torchcompile', 'eager', *flags], monkeypatch)
    # the student alone and with projectors; each teacher with and without its classifier
    assert [kwargs.get('dynamic') for kwargs in calls] == [None] * 2 + [dynamic] * 4


@pytest.mark.long
@pytest.mark.skipif(shutil.which('g++') is None, reason='inductor needs g++')
def test_inductor_equals_eager():
    eager, compiled = steps(compiled_task(None), 3), steps(compiled_task('inductor'), 3)
    assert compiled == pytest.approx(eager, rel=1e-4)


@pytest.mark.long
@pytest.mark.parametrize(
    ('teachers', 'maps'), [({'test_vit': None}, 0.0), ({'test_vit': None, 'test_resnet': 48}, 1.0)]
)
def test_compiled_ranks_of_which_ddp_splits_the_graph_take_the_steps_of_an_eager_one(teachers, maps, tmp_path):
    graphs = []

    def record(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph)
        return aot_eager(graph, inputs)

    eager = steps(compiled_task(None, teachers, map_weight=maps), 3)
    task = compiled_task(record, teachers, map_weight=maps)
    with helpers.one_rank(tmp_path):
        task.prepare_distributed(bucket_cap_mb=1)
        assert steps(task, 3) == pytest.approx(eager, rel=1e-4)
    assert len(graphs) > 1 + len(teachers)  # one for each bucket of the student, and the teachers'
