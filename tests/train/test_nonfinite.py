"""NaN and infinity: named, never saved, and with --nonfinite skip passed over on the device."""

import re
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch
import torch.nn as nn
from helpers import refused, run, summary
from survive import COMMON, write_images
from timm.utils import NativeScaler
from torch.utils._python_dispatch import TorchDispatchMode

from timm_pe.method.teacher import Teacher, TeacherOutput
from timm_pe.train.meters import LossMeter
from timm_pe.train.nonfinite import NonFiniteLoss, UpdateGuard
from timm_pe.train.trainer import Trainer

NAN = float('nan')


@pytest.fixture(scope='module')
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp('nonfinite') / 'images')


@pytest.fixture
def command(images, tmp_path):
    argv = [str(images), *COMMON, '--epochs', '2', '--warmup-epochs', '0', '--output', str(tmp_path)]
    return [*argv, '--experiment', 'run']


@pytest.fixture
def poison(monkeypatch):
    """Make the images of given batches (counted over the run) NaN."""

    def at(*batches):
        to_device, count = Trainer._to_device, iter(range(10_000))

        def poisoned(*args):
            input, target = to_device(*args)
            return (input * NAN if next(count) in batches or not batches else input), target

        monkeypatch.setattr(Trainer, '_to_device', poisoned)

    return at


def test_a_run_stops_at_a_loss_that_is_not_finite_and_saves_nothing_of_it(command, tmp_path, poison, capsys):
    poison(13)
    error = refused(command, capsys, code=1)
    assert 'not finite at batch 4 of the epoch' in error
    assert 'earlier checkpoints are intact' in error
    assert [row['epoch'] for row in summary(tmp_path / 'run')] == ['0']
    student = safetensors.torch.load_file(tmp_path / 'run' / 'student.safetensors')
    assert all(torch.isfinite(v).all() for v in student.values() if v.is_floating_point())


@pytest.mark.parametrize('accumulate', ['1', '3'])
def test_skip_goes_on_with_weights_and_statistics_that_are_finite(accumulate, command, tmp_path, poison, capsys):
    poison(4, 13)
    said = run([*command, '--nonfinite', 'skip', '--grad-accum-steps', accumulate], capsys)
    assert len(re.findall(r'--nonfinite skip left out 1 of the last \d updates: .* not finite at batch 4', said)) == 2
    rows = summary(tmp_path / 'run')
    assert [row['epoch'] for row in rows] == ['0', '1']
    assert all(float(row['train_loss']) < 100 for row in rows)
    student = safetensors.torch.load_file(tmp_path / 'run' / 'student.safetensors')
    assert all(torch.isfinite(v).all() for v in student.values() if v.is_floating_point())


def test_skip_ends_a_run_of_which_nothing_is_left(command, poison, capsys):
    poison()
    error = refused([*command, '--nonfinite', 'skip'], capsys, code=1)
    assert re.search(r'not finite at batch 0 of the epoch, and so all of the last \d updates', error)


def test_skip_without_anything_to_skip_trains_the_same_weights(command, tmp_path):
    run(command)
    run([*command, '--nonfinite', 'skip', '--experiment', 'skip'])
    a, b = ((tmp_path / name / 'student.safetensors').read_bytes() for name in ('run', 'skip'))
    assert a == b


def test_weights_that_the_last_gradient_made_infinite_are_not_saved(command, tmp_path, monkeypatch, capsys):
    backward, calls = Trainer._backward, []

    def overflow(trainer, *args):
        backward(trainer, *args)
        calls.append(1)
        if len(calls) == 18:  # the last of the second epoch
            trainer.task.trainable_module.student.fc.bias.data[0] = float('inf')

    monkeypatch.setattr(Trainer, '_backward', overflow)
    error = refused([*command, '--recovery-interval', '0'], capsys, code=1)
    assert 'weights not finite after the last step' in error
    assert [row['epoch'] for row in summary(tmp_path / 'run')] == ['0']


def test_a_teacher_that_says_nan_is_refused_before_anything_is_written(command, tmp_path, monkeypatch, capsys):
    forward = Teacher.forward

    def nan(self, x):
        return TeacherOutput(forward(self, x).feature * NAN, None)

    monkeypatch.setattr(Teacher, 'forward', nan)
    for act in ('auto', 'relu'):
        error = refused([*command, '--pe-act', act], capsys)
        assert "the teacher's features on the first training batch are not finite" in error
    assert not (tmp_path / 'run').exists()


def test_the_teacher_is_suspected_where_the_loss_on_the_labels_is_finite():
    meter = LossMeter(torch.device('cpu'), distributed=False)
    meter.update({'loss': torch.tensor(NAN), 'task_loss': torch.tensor(1.0), 'pe_loss': torch.tensor(NAN)}, 4)
    with pytest.raises(NonFiniteLoss, match='pe_loss not finite at batch 0 .* look at the teacher'):
        meter.read()


def test_a_skipping_meter_leaves_whole_batches_out():
    meter = LossMeter(torch.device('cpu'), distributed=False, skip=True)
    for pe, task, size in ((1.0, 2.0, 4), (NAN, 50.0, 4), (3.0, 4.0, 2)):
        meter.update({'task_loss': torch.tensor(task), 'pe_loss': torch.tensor(pe)}, size)
    assert meter.read() == {'task_loss': pytest.approx(16 / 6), 'pe_loss': pytest.approx(10 / 6)}
    assert meter.bad.startswith('pe_loss not finite at batch 1')
    meter.forget_bad()
    meter.update({'task_loss': torch.tensor(1.0), 'pe_loss': torch.tensor(1.0)}, 2)
    meter.read()
    assert meter.bad == ''  # what comes now is not the fault of that batch


def test_no_loss_on_labels_is_named_where_there_is_none():
    meter = LossMeter(torch.device('cpu'), distributed=False)
    meter.update({'loss': torch.tensor(NAN), 'pe_loss': torch.tensor(NAN)}, 4)
    with pytest.raises(NonFiniteLoss) as e:
        meter.read()
    assert str(e.value) == 'pe_loss not finite at batch 0 of the epoch'


def test_a_meter_goes_on_from_its_state():
    terms = [{'loss': torch.tensor(float(i))} for i in range(6)]
    whole, first, second = (LossMeter(torch.device('cpu'), distributed=False) for _ in range(3))
    for i, term in enumerate(terms):
        whole.update(term, i + 1)
        (first if i < 3 else second).update(term, i + 1) if i < 3 else None
    second.load_state(first.state())
    for i in range(3, 6):
        second.update(terms[i], i + 1)
    assert second.read() == whole.read()
    assert second.steps == 6


def test_the_guard_zeroes_gradients_and_puts_running_statistics_back():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 36, 2))
    guard = UpdateGuard(model, scales=False)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    for factor, dropped in ((NAN, 1), (1.0, 1), (float('inf'), 2)):
        guard.before_forward()
        (model(torch.randn(4, 3, 8, 8)) * factor).sum().backward()
        running = model[1].running_mean.clone()
        guard.after_backward()
        assert int(guard.dropped) == dropped
        gradients = [p.grad for p in model.parameters()]
        if factor == 1.0:
            assert any(g.abs().sum() > 0 for g in gradients)
            assert torch.equal(model[1].running_mean, running)
        else:
            assert all(torch.equal(g, torch.zeros_like(g)) for g in gradients)
            assert not torch.equal(model[1].running_mean, running)
        model.zero_grad()
    assert not torch.equal(model[1].running_mean, before['1.running_mean'])


@pytest.mark.parametrize('clip_mode', ['value', 'norm'])
def test_a_guard_next_to_a_loss_scaler_sees_gradients_before_they_are_clipped(clip_mode):
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2))
    model[0].requires_grad_(False)
    weights, guard = {k: v.clone() for k, v in model.named_parameters()}, UpdateGuard(model, scales=True)
    trainer = SimpleNamespace(
        config=SimpleNamespace(clip_grad=1.0, clip_mode=clip_mode),
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        task=SimpleNamespace(get_clip_parameters=lambda exclude_head: list(model.parameters())),
        runtime=SimpleNamespace(scaler=NativeScaler('cpu')),
        guard=guard,
    )
    guard.before_forward()
    loss = model(torch.randn(4, 3) + 1)[0].sum() * float('inf')  # one image: gradients are infinite, none is NaN
    Trainer._backward(trainer, loss, steps=True, measure=None)
    assert int(guard.dropped) == 1
    assert torch.equal(model[0].running_mean, torch.zeros(3))
    assert all(torch.equal(p, weights[k]) for k, p in model.named_parameters())


def report(guard, *updates):
    """Log after updates that are dropped (True) or not."""
    weight = guard.parameters[0]
    for dropped in updates:
        guard.before_forward()
        weight.grad = torch.full_like(weight, NAN if dropped else 1.0)
        guard.after_backward()
    guard.say('')


def test_a_loss_scale_that_finds_its_level_does_not_end_a_run(caplog):
    guard = UpdateGuard(nn.Linear(3, 2), scales=True)
    for updates in ([True], [True] * 15, [True] * 8 + [False], [True] * 32):
        report(guard, *updates)
    assert [record.message.partition(': ')[0][-24:] for record in caplog.records] == [
        f' {n} of the last {of} updates'[-24:] for n, of in ((1, 1), (15, 15), (8, 9), (32, 32))
    ]
    assert 'each halved the loss scale' in caplog.text


@pytest.mark.parametrize('reports', [[50], [10, 10, 10, 10], [1] * 33])
def test_updates_that_are_dropped_at_any_loss_scale_end_a_run(reports):
    guard = UpdateGuard(nn.Linear(3, 2), scales=True)
    for number in reports[:-1]:
        report(guard, *[True] * number)
    with pytest.raises(
        NonFiniteLoss, match=rf'all of the last {sum(reports)} updates, though each halved the loss scale'
    ):
        report(guard, *[True] * reports[-1])


@pytest.mark.parametrize('reports', [[2], [1, 1], [1, 0, 1]])
def test_without_a_loss_scale_two_dropped_updates_in_a_row_end_a_run_however_often_it_reports(reports):
    guard = UpdateGuard(nn.Linear(3, 2), scales=False)
    for updates in ([False, True], [True], [False], [True, True, False]):
        report(guard, *updates)
    for number in reports[:-1]:
        report(guard, *[True] * number)
    with pytest.raises(NonFiniteLoss, match='all of the last 2 updates$'):
        report(guard, *[True] * reports[-1])


class Calls(TorchDispatchMode):
    """The operators that ran, without views of a tensor as another dtype: they start nothing on a device."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func not in (torch.ops.aten.view.dtype, torch.ops.aten.detach.default):
            self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize('scales', [False, True])
def test_the_guard_of_100_layers_calls_as_many_operators_as_that_of_10(scales):
    calls = []
    for layers in (10, 100):
        model = nn.Sequential(*[nn.BatchNorm1d(4) for _ in range(layers)])
        guard = UpdateGuard(model, scales)
        with Calls() as seen:
            guard.before_forward()
        model(torch.randn(4, 4)).sum().backward()
        with seen:
            guard.after_backward()
        calls.append(seen.names)
    assert calls[0] == calls[1]
    assert len(calls[0]) < 20


class Mixed(nn.Module):
    """Parameters and buffers of several dtypes, shapes and memory formats."""

    def __init__(self):
        super().__init__()
        image = torch.randn(4, 3, 5, 5).contiguous(memory_format=torch.channels_last)
        for i, tensor in enumerate((image, torch.randn(()), torch.randn(7), torch.randn(3, 4).t())):
            for dtype in (torch.float32, torch.float16, torch.bfloat16):
                name = f'{i}_{str(dtype)[6:]}'
                self.register_parameter(f'p_{name}', nn.Parameter(tensor.to(dtype)))
                self.register_buffer(f'b_{name}', tensor.to(dtype))
        self.register_buffer('count', torch.tensor(3))


@pytest.mark.parametrize('bad', [None, NAN, float('inf'), -float('inf')])
def test_the_guard_keeps_or_zeroes_each_bit_of_each_dtype(bad):
    torch.manual_seed(0)
    module = Mixed()
    guard = UpdateGuard(module, scales=False)
    before = {k: v.clone() for k, v in module.named_buffers()}
    guard.before_forward()
    for buffer in module.buffers():
        buffer.copy_(torch.full_like(buffer, 9) if bad is None or not buffer.is_floating_point() else bad)
    given = {}
    for name, parameter in module.named_parameters():
        parameter.grad = torch.full_like(parameter, -0.0) if name.startswith('p_3') else torch.randn_like(parameter)
        given[name] = parameter.grad.clone()
    if bad is not None:
        module.get_parameter('p_2_float16').grad[1] = bad
    guard.after_backward()
    assert int(guard.dropped) == (bad is not None)
    for name, parameter in module.named_parameters():
        wanted = given[name] if bad is None else torch.zeros_like(given[name])
        bits = torch.int32 if wanted.element_size() == 4 else torch.int16
        assert torch.equal(parameter.grad.view(bits), wanted.view(bits))
    for name, buffer in module.named_buffers():
        wanted = torch.full_like(buffer, 9) if bad is None or name == 'count' else before[name]
        assert torch.equal(buffer, wanted)


def test_the_guard_never_waits_for_the_device(monkeypatch):
    model = nn.Linear(3, 2)
    guard = UpdateGuard(model, scales=False)
    reads = []
    for name in ('item', '__bool__', '__int__', '__float__', 'tolist'):
        monkeypatch.setattr(torch.Tensor, name, lambda self, name=name: reads.append(name))
    guard.before_forward()
    model(torch.randn(4, 3)).sum().backward()
    guard.after_backward()
    assert not reads


def test_finite_gradients_whose_norm_float16_cannot_hold_are_kept():
    module = torch.nn.Linear(64, 64).to(torch.float16)
    guard = UpdateGuard(module, scales=False)
    guard.before_forward()
    for parameter in module.parameters():
        parameter.grad = torch.full_like(parameter, 2000)
    guard.after_backward()
    assert int(guard.dropped) == 0
    assert all((parameter.grad == 2000).all() for parameter in module.parameters())
    module.weight.grad[0, 0] = torch.inf
    guard.before_forward()
    guard.after_backward()
    assert int(guard.dropped) == 1
    assert not module.weight.grad.any()
