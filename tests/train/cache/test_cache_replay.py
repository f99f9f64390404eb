"""The cached teacher: what is replayed is what the online teacher says."""

import numpy as np
import pytest
import timm
import torch
from cache_runs import IMAGES, PAIR, PARTS, WIDTH, assert_replays_the_online_teacher, files, never, stages, train
from helpers import run
from timm.data.loader import fast_collate

from timm_pe import precompute
from timm_pe.data.draws import Batch, Draw, IndexedTarget, SeededCollate
from timm_pe.data.epochs import set_epoch
from timm_pe.method.teacher import Teacher, TeacherOutput
from timm_pe.train.cache import TeacherCache
from timm_pe.train.meters import LossMeter
from timm_pe.train.trainer import Trainer


@pytest.mark.parametrize(
    'more', [[], ['--no-prefetcher', '--reprob', '0.5'], ['--amp', '--amp-dtype', 'bfloat16', '--channels-last']]
)
def test_what_is_replayed_equals_the_online_teacher_with_any_number_of_workers_and_after_a_restart(argv, more):
    precompute.main([*argv, *more, '-j', '1'])
    for workers in ('0', '1', '2'):
        assert_replays_the_online_teacher([*argv, *more, '-j', workers])


def test_a_complete_cache_trains_without_a_single_forward_of_the_teacher(argv, forwards, capsys):
    precompute.main(argv)
    assert sum(forwards) == 2 * IMAGES  # all images of both views, those that an epoch of training drops too
    forwards.clear()
    said = run([*argv, '--epochs', '3'], capsys)
    assert not forwards
    assert f'teacher cache   2 views x 36 images x {WIDTH} float16, 10.2 kB in ' in said
    assert '72 of 72 rows there' in said
    assert "--pe-act auto is 'none'" in said


def test_losses_are_those_of_the_online_teacher_when_there_is_a_view_for_each_epoch(
    small_run, argv, tmp_path, monkeypatch
):
    lr = ['--lr', '1e-4']  # else training blows any difference up
    online = train([*small_run, *PAIR], tmp_path, 'online', lr)
    filled = train(argv, tmp_path, 'filled', lr)
    assert train(argv, tmp_path, 'replayed', lr) == filled  # what is computed now is rounded as what is read later
    np.testing.assert_allclose(filled, online, rtol=1e-5)
    other = train([*argv, '--teacher-cache-views', '1'], tmp_path, 'other', lr)
    assert abs(other[1][1] / online[1][1] - 1) > 1e-4

    forward = Teacher.forward
    monkeypatch.setattr(Teacher, 'forward', lambda s, x: TeacherOutput(forward(s, x).feature.half().float(), None))
    assert train([*small_run, *PAIR], tmp_path, 'rounded', lr) == filled  # the rounding is all there is


def test_validation_of_the_teacher_is_online_with_a_complete_cache_too(argv, capsys):
    argv = [*argv, '--teacher-num-classes', '3']
    precompute.main(argv)
    assert 'Teacher: top-1' in run(argv, capsys)


def test_an_epoch_trains_on_the_view_of_its_number_modulo_k_in_an_order_of_its_own(argv):
    _, _, data, _ = stages([*argv, '-b', '36'])
    epochs = []
    for epoch in range(4):
        set_epoch(data.train, epoch)
        ((input, target),) = [(x.clone(), y) for x, y in data.train]
        epochs.append((target.view, target.index, input[np.argsort(target.index)]))
    assert [view for view, _, _ in epochs] == [0, 1, 0, 1]
    assert len({tuple(index) for _, index, _ in epochs}) == 4
    assert torch.equal(epochs[0][2], epochs[2][2])
    assert torch.equal(epochs[1][2], epochs[3][2])
    assert not torch.equal(epochs[0][2], epochs[1][2])


def test_as_many_views_as_epochs_are_the_pixels_of_a_run_without_a_cache(small_run, argv):
    plain, cached = (stages(a)[2] for a in ([*small_run, *PAIR], argv))
    for epoch in range(2):
        for data in (plain, cached):
            set_epoch(data.train, epoch)
        for (x, y), (x_cached, y_cached) in zip(plain.train, cached.train, strict=True):
            assert torch.equal(x, x_cached)
            assert torch.equal(y, y_cached.target)


def test_filling_while_training_gives_what_precompute_gives(argv, tmp_path, forwards):
    run([*argv, '--epochs', '12'])
    trained = files(tmp_path / 'cache')
    assert trained['view-0.done.npy'].all()  # by then each image has been in a batch of each view
    assert sum(forwards) < 12 * IMAGES / 2
    precompute.main([*argv, '--teacher-cache', str(tmp_path / 'ahead')])
    ahead = files(tmp_path / 'ahead')
    assert (
        set(trained)
        == set(ahead)
        == {
            'images.npy',
            *(f'view-{v}.{part}.npy' for v in range(2) for part in PARTS),
        }
    )
    for name in ahead:
        np.testing.assert_allclose(trained[name], ahead[name], rtol=2**-10, atol=1e-6)


def test_logits_are_kept_where_a_loss_compares_them_and_nothing_that_no_loss_reads(argv, tmp_path, small_run):
    kd = ['--teacher-num-classes', '3', '--kd-loss-weight', '1', '--lr', '1e-4']
    online = train([*small_run, *PAIR], tmp_path, 'online', kd)
    for name in ('filled', 'replayed'):
        np.testing.assert_allclose(train(argv, tmp_path, name, kd), online, rtol=1e-5)
    assert files(tmp_path / 'cache')['view-0.logits.npy'].shape == (IMAGES, 3)
    precompute.main([*argv, '--teacher-cache', str(tmp_path / 'logits'), '--pe-target', 'logits'])
    assert [p.name for p in sorted((tmp_path / 'logits').glob('view-0*'))] == [
        f'view-0.{part}.npy' for part in ('done', 'logits', 'logits_scale', 'source')
    ]
    assert train([*argv, '--teacher-cache', str(tmp_path / 'logits'), '--pe-target', 'logits'], tmp_path, 'kd1proj')


def test_a_step_with_a_cache_reads_nothing_from_the_device(small_run, argv, monkeypatch):
    precompute.main(argv)
    reads = {}

    def count(name):
        original = getattr(torch.Tensor, name)

        def counting(self, *args):
            reads['all'] += 1
            return original(self, *args)

        monkeypatch.setattr(torch.Tensor, name, counting)

    def measure(owner, name, what):
        original = getattr(owner, name)

        def measuring(*args):
            before = reads['all']
            try:
                return original(*args)
            finally:
                reads[what] += reads['all'] - before

        monkeypatch.setattr(owner, name, measuring)

    measure(TeacherCache, '__call__', 'cache')
    measure(TeacherCache, '_take', 'host')  # its buffer is the host's
    measure(LossMeter, 'read', 'meter')
    measure(Trainer, 'train_epoch', 'epochs')
    for name in ('item', 'tolist', '__bool__', '__float__', '__int__', 'cpu', 'numpy'):
        count(name)
    others = []
    for command in ([*small_run, *PAIR], argv):
        reads.update(all=0, cache=0, host=0, meter=0, epochs=0)
        run([*command, '-j', '1', '--log-interval', '100', '--pe-act', 'none'])  # images are drawn in another process
        assert reads['cache'] == reads['host']
        assert reads['meter'] > 0
        others.append(reads['epochs'] - reads['meter'] - reads['host'])
    assert max(others) < 8  # not one a step: the loader's, once an epoch


def test_an_indexed_target_is_pinned_and_moved_as_a_tensor_and_keeps_its_index_on_the_host(monkeypatch):
    from torch.utils.data._utils.pin_memory import pin_memory

    monkeypatch.setattr(torch.Tensor, 'pin_memory', lambda self, *device: self + 1)
    target = pin_memory(IndexedTarget(torch.zeros(2), np.array([4, 5]), 3))
    assert torch.equal(target.target, torch.ones(2))
    moved = target.to(device='meta', non_blocking=True)
    assert moved.target.device.type == 'meta'
    assert isinstance(moved.index, np.ndarray)
    assert (moved.index.tolist(), moved.view) == ([4, 5], 3)


def test_targets_of_many_labels_know_their_images_too():
    images = [(np.zeros((3, 4, 4), np.uint8), torch.tensor([0.0, 1.0, float(i)])) for i in range(2)]
    collate = SeededCollate(fast_collate, seed=0, rank=0, mixup_off_epoch=0, indexed=True)
    _, target = collate(Batch(images, 7, 0, [Draw(3, 9, 0), Draw(3, 4, 0)]))
    assert torch.equal(target.target, torch.tensor([[0.0, 1.0, 0.0], [0.0, 1.0, 1.0]]))
    assert (target.index.tolist(), target.view) == ([9, 4], 3)


def test_the_task_takes_what_the_teacher_says_from_outside(monkeypatch):
    from timm_pe import ProjectorEnsembleTask

    torch.manual_seed(0)
    student, teacher = (timm.create_model(n, num_classes=3) for n in ('test_resnet', 'test_vit'))
    task = ProjectorEnsembleTask(student, teacher, act='none', verbose=False).train()
    x, y = torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 0])
    said = task.teacher(x)
    online = task(x, y)['pe_loss']
    monkeypatch.setattr(Teacher, 'forward', lambda *_: never())
    assert torch.equal(task(x, y, teacher=said)['pe_loss'], online)
    other = task(x, y, teacher=TeacherOutput(-said.feature, None))['pe_loss']
    torch.testing.assert_close(other, 2 - online)  # 1 + cosine
