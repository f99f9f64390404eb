"""TensorBoard, Weights & Biases and trackio: what a run tells them, read back from their files."""

import contextlib
import importlib.machinery
import importlib.util
import os
import struct
import sys
import time
import types
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch
import yaml
from helpers import refused, run, summary, tensorboard_curves
from timm.task import FeatureDistillationTask, LogitDistillationTask, TokenDistillationTask
from timm.utils import NativeScaler
from torch.nn.utils import get_total_norm

from timm_pe import ProjectorEnsembleTask
from timm_pe.config.run_config import RunConfig, parse_config
from timm_pe.errors import UsageError
from timm_pe.train.trackers import (
    StepCurves,
    TeacherAgreement,
    TensorBoardTracker,
    Trackers,
    log_epoch,
    sample_grid,
    start_trackers,
    weighted_terms,
)
from timm_pe.train.trainer import Trainer

PAIR = ['--model', 'test_resnet', '--teacher', 'test_vit', '--no-teacher-pretrained']
ALL = ['--log-tb', '--log-wandb', '--log-trackio']
SECRETS = {'WANDB_API_KEY': '0123456789abcdef' * 2 + '01234567', 'HF_TOKEN': 'hf_thisIsNoTokenButLooksLikeOne'}
# 36 images in whole batches of 8: 4 updates an epoch, points after the batches 3 and 4
STEPS = [3, 4, 7, 8]
AT_STEPS = {'loss', 'task_loss', 'pe_loss', 'task_loss_weighted', 'pe_loss_weighted', 'lr', 'images_per_s', 'grad_norm'}
AT_EPOCHS = {'train_loss', 'train_task_loss', 'train_pe_loss', 'train_task_loss_weighted', 'train_pe_loss_weighted'} | {
    'train_images_per_s', 'eval_loss', 'eval_top1', 'eval_top5', 'eval_teacher_agreement', 'lr'
}  # fmt: skip


@pytest.fixture(scope='module')
def tracked(image_folder, tmp_path_factory) -> Path:
    """The folder of a run with all trackers that was stopped after one epoch and resumed for its second."""
    output = tmp_path_factory.mktemp('tracked')
    argv = [
        *(str(image_folder), '--num-classes', '3', '--img-size', '32', '-b', '8', '-j', '0', '--device', 'cpu'),
        *('--epochs', '2', '--warmup-epochs', '0', '--lr', '0.02', '--log-interval', '3', '--seed', '3', *PAIR),
        *('--teacher-num-classes', '3', '--output', str(output), '--experiment', 'run', '--resume', 'auto', *ALL),
    ]
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**SECRETS, 'WANDB_MODE': 'offline', 'WANDB_SILENT': 'true'}.items():
            patch.setenv(name, value)
        patch.delenv('TRACKIO_DIR', raising=False)
        for name in [n for n in sys.modules if n.split('.')[0] == 'trackio']:  # it remembers its folder
            patch.delitem(sys.modules, name)
        run([*argv, '--stop-epoch', '1'])
        run(argv)
    return output / 'run'


def wandb_records(path: Path):
    """Records of a .wandb file: protobufs in the blocks of a LevelDB log."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, block, at, parts = path.read_bytes(), 32768, 7, b''
    while at + 7 <= len(data):
        if block - at % block < 7:  # the rest of a block that holds no head is filled with zeros
            at += block - at % block
            continue
        _, length, kind = struct.unpack_from('<IHB', data, at)
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or its last part
            record = Record()
            record.ParseFromString(parts)
            yield record
            parts = b''


def wandb_curves(folder: Path):
    curves, ids = defaultdict(list), set()
    for path in sorted((folder / 'wandb').glob('offline-run-*/*.wandb')):
        for record in wandb_records(path):
            if record.WhichOneof('record_type') == 'run':
                ids.add(record.run.run_id)
            if record.WhichOneof('record_type') == 'history':
                items = {i.key or '/'.join(i.nested_key): yaml.safe_load(i.value_json) for i in record.history.item}
                for name, value in items.items():
                    if isinstance(value, (int, float)) and not name.startswith('_'):
                        curves[name].append((items['_step'], value))
    return curves, ids


def trackio_curves(folder: Path):
    from trackio.sqlite_storage import SQLiteStorage

    curves, pictures = defaultdict(list), []
    for row in SQLiteStorage.get_logs('timm_pe', folder.name):
        for name, value in row.items():
            if isinstance(value, dict):
                pictures.append(folder / 'trackio' / 'media' / value['file_path'])
            elif name not in ('step', 'timestamp'):
                curves[name].append((row['step'], value))
    return curves, pictures


def check_curves(curves, folder):
    for name in AT_STEPS:
        assert [step for step, _ in curves[f'step/{name}']] == STEPS, name
    for name in AT_EPOCHS:
        assert [step for step, _ in curves[name]] == [4, 8], name
    rows = summary(folder)
    for name in ('train_loss', 'train_pe_loss', 'eval_top1', 'eval_loss', 'lr'):
        assert [value for _, value in curves[name]] == pytest.approx([float(r[name]) for r in rows], rel=1e-4), name
    assert curves['train_pe_loss_weighted'][1][1] == pytest.approx(25 * curves['train_pe_loss'][1][1], rel=1e-5)
    assert all(value > 0 for _, value in curves['step/grad_norm'])
    assert {round(value, 4) for _, value in curves['epoch']} == {0.75, 1.0, 1.75, 2.0}
    assert all(0 <= value <= 100 for _, value in curves['eval_teacher_agreement'])


def test_tensorboards_event_files_hold_the_curves_of_both_parts_of_a_resumed_run_and_one_picture(tracked):
    curves, pictures = tensorboard_curves(tracked)
    check_curves(curves, tracked)
    assert pictures == [('first_batch', 1)]


def test_wandbs_offline_files_hold_the_curves_of_both_parts_under_one_id(tracked):
    curves, ids = wandb_curves(tracked)
    check_curves(curves, tracked)
    assert len(ids) == 1
    assert len(list((tracked / 'wandb').glob('offline-run-*/files/media/images/first_batch*.png'))) == 1


def test_trackios_data_base_holds_the_curves_of_both_parts_as_one_run(tracked):
    from trackio.sqlite_storage import SQLiteStorage

    curves, pictures = trackio_curves(tracked)
    check_curves(curves, tracked)
    assert SQLiteStorage.get_runs('timm_pe') == ['run']
    assert [p.is_file() for p in pictures] == [True]


def test_no_secret_of_the_environment_is_in_any_file_of_a_run(tracked):
    files = [p for p in tracked.rglob('*') if p.is_file()]
    assert {'tensorboard', 'wandb', 'trackio'} <= {p.name for p in tracked.iterdir()}
    for path in files:
        for name, value in SECRETS.items():
            assert value.encode() not in path.read_bytes(), f'{name} in {path}'


def test_a_run_that_starts_anew_in_its_folder_leaves_no_old_point_in_tensorboards_curves(small_run, tmp_path):
    run([*small_run, *PAIR, '--log-tb'])
    run([*small_run, *PAIR, '--log-tb', '--epochs', '1', '--log-interval', '5'])
    curves, _ = tensorboard_curves(tmp_path / 'run')
    assert [step for step, _ in curves['step/loss']] == [4]
    assert [step for step, _ in curves['eval_top1']] == [4]
    assert 'eval_teacher_agreement' not in curves  # a teacher of 1000 classes


def test_a_resumed_tensorboard_drops_what_it_is_going_to_write_again(tmp_path):
    for resumed, steps in ((False, range(1, 8)), (True, range(5, 10))):
        # files are read by their names: second, host, process, number of the file; of one second .10 is before .9
        time.sleep(1.01)
        tracker = TensorBoardTracker(SimpleNamespace(), str(tmp_path), resumed)
        for step in steps:
            tracker.scalars(step, {'x': step + 100 * resumed})
        tracker.close()
    curves, _ = tensorboard_curves(tmp_path)
    assert curves['x'] == [(1, 1), (2, 2), (3, 3), (4, 4), (5, 105), (6, 106), (7, 107), (8, 108), (9, 109)]


class Recorder:
    """A tracker that keeps what it is told."""

    def __init__(self):
        self.points, self.pictures, self.closed = [], [], []

    def config(self, values):
        self.values = values

    def scalars(self, step, values):
        self.points.append((step, dict(values)))

    def images(self, step, name, picture):
        self.pictures.append((step, name, picture))

    def close(self, failed=False):
        self.closed.append(failed)


def curves_of(trackers, task=None, optimizer=None, num_batches=10, log_interval=4, accum=1):
    return StepCurves(trackers, task, optimizer, 2, num_batches, log_interval, accum, mean=(0.5,) * 3, std=(0.25,) * 3)


@pytest.mark.parametrize('trackers', [Trackers(), Trackers([Recorder()])])
def test_steps_between_the_points_never_read_from_the_device(trackers, monkeypatch):
    model = torch.nn.Linear(3, 2)
    model(torch.randn(4, 3)).sum().backward()
    curves = curves_of(trackers, optimizer=torch.optim.SGD(model.parameters(), lr=1.0))
    for name in ('item', 'tolist', '__bool__', '__float__', '__int__', 'cpu', 'numpy'):
        monkeypatch.setattr(torch.Tensor, name, lambda *_: pytest.fail('a host sync in the step'))
    curves.keep_samples(torch.randn(4, 3, 8, 8))
    for i in range(3):
        curves.keep_samples(torch.randn(4, 3, 8, 8))
        assert not curves.wants_norm(i)
    curves.measure_norm()


def test_a_tracked_epoch_measures_and_reads_one_number_more_at_each_point_and_none_between(small_run, monkeypatch):
    reads, norms, one_epoch, item = [], [], Trainer.train_epoch, torch.Tensor.item

    def counted(*args):
        reads.append(0)
        norms.append(0)

        def read(tensor):
            reads[-1] += 1
            return item(tensor)

        def measure(gradients):
            norms[-1] += 1
            return get_total_norm(gradients)

        with monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, 'item', read)
            patch.setattr('timm_pe.train.trackers.get_total_norm', measure)
            return one_epoch(*args)

    monkeypatch.setattr(Trainer, 'train_epoch', counted)
    tracker = Recorder()
    for trackers in (Trackers(), Trackers([tracker])):
        monkeypatch.setattr('timm_pe.train.start.start_trackers', lambda *_, trackers=trackers, **__: trackers)
        run([*small_run, *PAIR, '--epochs', '1', '--log-interval', '3'])
    assert len([step for step, values in tracker.points if 'step/loss' in values]) == 2
    assert norms == [0, 2]
    assert reads[1] - reads[0] == 2


@pytest.mark.parametrize(
    ('num_batches', 'interval', 'accum'), [(10, 4, 1), (10, 4, 3), (7, 50, 2), (12, 3, 4), (9, 1, 2)]
)
def test_the_norm_is_taken_at_the_last_optimizer_step_before_each_point(num_batches, interval, accum):
    curves = curves_of(Trackers([Recorder()]), num_batches=num_batches, log_interval=interval, accum=accum)
    ends = [i for i in range(num_batches) if (i + 1) % accum == 0 or i + 1 == num_batches]
    points = [i for i in range(num_batches) if (i + 1) % interval == 0 or i + 1 == num_batches]
    last = {max(e for e in ends if e <= p) for p in points if any(e <= p for e in ends)}
    assert {e for e in ends if curves.wants_norm(e)} == last


@pytest.mark.parametrize('clip', [None, 0.01])
def test_the_norm_is_that_of_the_gradient_before_clipping(clip):
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 3)
    x = torch.randn(5, 4)
    expected = torch.cat([g.flatten() for g in torch.autograd.grad(model(x).pow(2).sum(), model.parameters())]).norm()
    trainer = SimpleNamespace(
        task=SimpleNamespace(get_clip_parameters=lambda exclude_head: model.parameters()),
        optimizer=torch.optim.SGD(model.parameters(), lr=1.0),
        config=SimpleNamespace(clip_grad=clip, clip_mode='norm'),
        runtime=SimpleNamespace(scaler=None),
        guard=None,
    )
    curves = curves_of(Trackers([Recorder()]), optimizer=trainer.optimizer)
    Trainer._backward(trainer, model(x).pow(2).sum(), steps=True, measure=curves.measure_norm)
    assert curves.norm.item() == pytest.approx(expected.item(), rel=1e-5)
    if clip:
        used = torch.cat([p.grad.flatten() for p in model.parameters()]).norm()
        assert used.item() == pytest.approx(clip, rel=1e-3)


def test_a_point_shows_the_mean_since_the_one_before():
    recorder = Recorder()
    curves = curves_of(Trackers([recorder]), SimpleNamespace(task_loss_weight=2.0))
    curves.log(3, 24, 40, 40, {'loss': 4.0, 'task_loss': 1.0}, 10.0, 0.1)
    curves.log(7, 28, 80, 80, {'loss': 3.0, 'task_loss': 1.0}, 11.0, 0.2)
    (_, first), (step, second) = recorder.points
    assert (first['step/loss'], second['step/loss'], step) == (4.0, pytest.approx(2.0), 28)
    assert (second['step/task_loss_weighted'], second['step/lr'], second['epoch']) == (2.0, 0.2, 2.8)
    assert 'step/grad_norm' not in second


def test_a_point_of_the_loss_on_labels_is_a_mean_over_the_labelled_images_since_the_one_before():
    recorder = Recorder()
    curves = curves_of(Trackers([recorder]), SimpleNamespace())
    for i, labeled, mean in ((0, 2, 3.0), (1, 2, 3.0), (2, 5, 2.4)):
        curves.log(i, i, 8 * (i + 1), labeled, {'loss': 1.0, 'task_loss': mean}, 10.0, 0.1)
    points = [values.get('step/task_loss') for _, values in recorder.points]
    assert points == [3.0, None, pytest.approx(2.0)]  # (5 x 2.4 - 2 x 3) / 3


def test_the_first_point_after_a_resume_shows_the_mean_of_the_rest_alone():
    recorder = Recorder()
    curves = curves_of(Trackers([recorder]), SimpleNamespace())
    curves.go_on({'loss': 4.0}, 40, 40)  # of batches 0 to 3
    curves.log(7, 28, 80, 80, {'loss': 3.0}, 11.0, 0.2)
    assert recorder.points[0][1]['step/loss'] == pytest.approx(2.0)


def test_the_first_batch_is_shown_once_denormalized_and_never_to_a_resumed_run():
    pixels = torch.rand(2, 3, 6, 6)
    for show in (True, False):
        recorder = Recorder()
        trackers = Trackers([recorder], show_samples=show)
        for _ in range(2):
            curves = curves_of(trackers, SimpleNamespace())
            curves.keep_samples((pixels - 0.5) / 0.25)
            curves.keep_samples(torch.zeros(2, 3, 6, 6))
            for i in (3, 7):
                curves.log(i, 24, 40, 40, {'loss': 4.0}, 10.0, 0.1)
        assert [(step, name) for step, name, _ in recorder.pictures] == [(24, 'first_batch')] * show
    grid = sample_grid((pixels - 0.5) / 0.25, (0.5,) * 3, (0.25,) * 3)
    torch.testing.assert_close(grid[:, 2:8, 2:8], pixels[0])


@pytest.mark.parametrize('channels', [1, 2, 5])
def test_images_of_any_number_of_channels_become_one_picture(channels):
    grid = sample_grid(torch.randn(5, channels, 6, 6), [0.5] * channels, [0.2] * channels)
    assert grid.shape[0] == 3
    assert 0 <= grid.min() <= grid.max() <= 1


def models():
    return timm.create_model('test_resnet', num_classes=3), timm.create_model('test_resnet', num_classes=3)


@pytest.mark.parametrize(
    'create',
    [
        lambda s, t: ProjectorEnsembleTask(s, t, kd_loss_weight=0.3, task_loss_weight=0.7, verbose=False),
        lambda s, t: ProjectorEnsembleTask(s, t, kd_loss_weight=0.3, map_weight=0.5, verbose=False),
        lambda s, t: LogitDistillationTask(s, t, distill_loss_weight=0.3, task_loss_weight=2.0, verbose=False),
        lambda s, t: FeatureDistillationTask(s, t, distill_loss_weight=3.0, task_loss_weight=0.5, verbose=False),
        lambda s, t: TokenDistillationTask(
            timm.create_model('deit_tiny_distilled_patch16_224', num_classes=3, img_size=32, depth=1),
            t,
            distill_loss_weight=0.3,
            task_loss_weight=0.7,
            verbose=False,
        ),
    ],
    ids=['ours', 'ours with maps', 'logit', 'feature', 'token'],
)
def test_the_weighted_terms_of_a_task_add_up_to_its_loss(create):
    torch.manual_seed(0)
    task = create(*models()).train()
    if isinstance(task, TokenDistillationTask):
        task.trainable_module.set_distilled_training(True)
    result = task(torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 0]))
    terms = {k: v.item() for k, v in result.items() if k != 'output'}
    told = weighted_terms(task, terms)
    assert sum(v for k, v in told.items() if k.endswith('_weighted')) == pytest.approx(terms['loss'], rel=1e-4)
    assert {k: v for k, v in told.items() if not k.endswith('_weighted')} == terms


def test_agreement_is_the_share_of_images_on_which_both_name_the_same_class():
    torch.manual_seed(0)
    batches, noise = [torch.randn(40, 3), torch.randn(24, 3)], torch.randn(64, 3)
    agreement = TeacherAgreement()
    with torch.inference_mode():
        recorded = agreement.record(lambda x: x)
        assert all(recorded(b) is b for b in batches)
        for student in (lambda x: x * 2, lambda x: (x + noise[: len(x)], None)):
            compared = agreement.compare(student)
            for b in batches:
                compared(b)
            own = [student(b) for b in batches]
            own = torch.cat([o[0] if isinstance(o, tuple) else o for o in own])
    agreement.finish(distributed=False)
    expected = (own.argmax(1) == torch.cat(batches).argmax(1)).float().mean().item()
    assert agreement.percent == pytest.approx(100 * expected)


def test_an_epoch_without_validation_has_its_training_terms_alone():
    recorder = Recorder()
    row = {'epoch': 4, 'train_loss': 3.0, 'train_pe_loss': 0.1, 'lr': 0.2}
    log_epoch(Trackers([recorder]), SimpleNamespace(loss_weights={'pe_loss': 25.0}), 50, row, None)
    assert recorder.points == [(50, {**row, 'epoch': 5, 'train_pe_loss_weighted': 2.5})]


def test_a_tracker_that_fails_is_left_out_with_one_warning_and_the_others_go_on(caplog):
    class Broken(Recorder):
        def scalars(self, step, values):
            raise OSError('no space left')

    broken, good = Broken(), Recorder()
    with contextlib.suppress(KeyError), Trackers([broken, good]) as trackers:
        trackers.scalars(1, {'x': 1.0})
        trackers.scalars(2, {'x': 1.0})
        raise KeyError
    assert [r.message for r in caplog.records] == ['Broken failed and gets nothing more: no space left']
    assert [step for step, _ in good.points] == [1, 2]
    assert (good.closed, broken.closed) == ([True], [])


def fake_wandb(monkeypatch, init):
    module = types.ModuleType('wandb')
    module.init, module.Image = init, lambda picture: picture
    module.__spec__ = importlib.machinery.ModuleSpec('wandb', None)
    monkeypatch.setitem(sys.modules, 'wandb', module)


def test_wandb_gets_timms_flags(monkeypatch, tmp_path):
    started = []
    kept = SimpleNamespace(config={}, log=lambda *_, **__: None, finish=lambda exit_code: started.append(exit_code))
    fake_wandb(monkeypatch, lambda **kwargs: started.append(kwargs) or kept)
    argv = ['data', '--log-wandb', '--wandb-project', 'p', '--wandb-tags', 'a', 'b', '--wandb-resume-id', 'x1']
    trackers = start_trackers(parse_config(argv), str(tmp_path / 'name'), resumed=False)
    trackers.close(failed=True)
    assert started[0] == {
        'project': 'p',
        'name': 'name',
        'tags': ['a', 'b'],
        'id': 'x1',
        'resume': 'must',
        'dir': str(tmp_path / 'name'),
    }
    assert started[1] == 1
    assert kept.config['epochs'] == 300
    assert not [k for k in kept.config if k.startswith('wandb')]


def test_trackio_that_was_loaded_before_says_where_it_writes(monkeypatch, tmp_path, caplog):
    calls = []
    fake = SimpleNamespace(TRACKIO_DIR='/elsewhere', init=lambda **kwargs: calls.append(kwargs), finish=lambda: None)
    monkeypatch.setitem(sys.modules, 'trackio', fake)
    monkeypatch.delenv('TRACKIO_DIR', raising=False)
    args = RunConfig(log_tb=False, log_wandb=False, log_trackio=True, seed=1)
    start_trackers(args, str(tmp_path / 'name'), resumed=True).close()
    assert "trackio was loaded before and keeps writing to '/elsewhere'" in caplog.text
    assert (calls[0]['name'], calls[0]['resume'], calls[0]['config']['seed']) == ('name', 'allow', 1)
    assert 'TRACKIO_DIR' not in os.environ
    caplog.clear()
    monkeypatch.setenv('TRACKIO_DIR', '/elsewhere')
    start_trackers(args, str(tmp_path / 'name'), resumed=False).close()
    assert caplog.text == ''
    assert calls[1]['resume'] == 'never'


def test_a_tracker_that_does_not_start_ends_the_run_with_one_line_before_it_writes_anything(
    small_run, tmp_path, monkeypatch, capsys
):
    def no_key(**kwargs):
        raise RuntimeError('No API key configured.\nUse `wandb login`')

    fake_wandb(monkeypatch, no_key)
    said = refused([*small_run, *PAIR, '--log-wandb'], capsys)
    assert '--log-wandb does not start: No API key configured. Use `wandb login` (WANDB_MODE=offline needs' in said
    assert list((tmp_path / 'run').iterdir()) == []


def test_where_one_tracker_does_not_start_those_before_it_are_closed_as_failed(monkeypatch, tmp_path):
    first = Recorder()

    def broken(*_):
        raise RuntimeError('no network')

    kinds = {'log_tb': lambda *_: first, 'log_wandb': broken}
    monkeypatch.setattr('timm_pe.train.trackers.TRACKERS', kinds)
    with pytest.raises(UsageError, match='^--log-wandb does not start: no network'):
        start_trackers(RunConfig(log_tb=True, log_wandb=True), str(tmp_path), resumed=False)
    assert first.closed == [True]


@pytest.mark.parametrize(
    ('flag', 'package', 'extra'),
    [
        ('--log-tb', 'tensorboard', 'tensorboard'),
        ('--log-wandb', 'wandb', 'wandb'),
        ('--log-trackio',) + ('trackio',) * 2,
    ],
)
def test_a_missing_package_is_named_with_its_extra_before_anything_is_written(
    flag, package, extra, small_run, tmp_path, monkeypatch, capsys
):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None if name == package else find(name))
    said = refused([*small_run, *PAIR, flag], capsys)
    assert f"{flag} needs the package {package}: pip install 'timm_pe[{extra}]'" in said
    assert list(tmp_path.iterdir()) == []


def test_evaluation_is_no_run_to_track(small_run, capsys):
    assert '--evaluate is none' in refused([*small_run, '--evaluate', 'x', '--log-tb'], capsys)


def test_the_norm_is_that_of_the_gradient_where_a_step_writes_into_it():
    torch.manual_seed(0)
    model, x = torch.nn.Linear(4, 3), torch.randn(5, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True, foreach=True)
    task = SimpleNamespace(
        get_clip_parameters=lambda exclude_head: model.parameters(), get_trainable_module=lambda: model
    )
    for scaler in (None, NativeScaler('cpu')):
        trainer = SimpleNamespace(
            config=parse_config(['--dataset', 'sklearn/digits']), optimizer=optimizer, task=task, guard=None
        )
        trainer.runtime = SimpleNamespace(scaler=scaler)
        for _ in range(2):  # the first step has no momentum yet
            optimizer.zero_grad()
            loss = model(x).pow(2).sum()
            expected = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))]).norm()
            curves = curves_of(Trackers([Recorder()]), optimizer=optimizer)
            Trainer._backward(trainer, model(x).pow(2).sum(), steps=True, measure=curves.measure_norm)
            assert curves.norm.item() == pytest.approx(expected.item(), rel=1e-4)
