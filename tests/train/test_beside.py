"""Labelled images and images without labels in one training."""

import os
import re
import shutil
from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn as nn
from helpers import load, make_trainer, refused, run, stopped, summary
from PIL import Image

from timm_pe.data.beside import BesideReader, EvenSampler
from timm_pe.data.draws import LabeledTarget
from timm_pe.data.unlabeled import reader_of
from timm_pe.export import main as export
from timm_pe.process.signals import Interrupts
from timm_pe.train.task_loss import LabeledLoss

PAIR = ['--model', 'test_resnet', '--teacher', 'test_vit', '--no-teacher-pretrained']


@pytest.fixture(scope='module')
def others(tmp_path_factory):
    """28 images without labels."""
    root, rng = tmp_path_factory.mktemp('others') / 'images', np.random.default_rng(2)
    root.mkdir()
    for i in range(28):
        Image.fromarray(rng.integers(0, 256, (36, 36, 3)).astype(np.uint8)).save(root / f'{i}.png')
    return root


@pytest.fixture
def argv(small_run, others):
    return [*small_run, *PAIR, '--unlabeled', str(others)]


def epoch_of(trainer, number=0):
    """Files and targets of the batches of an epoch."""
    trainer.data.train.loader.batch_sampler.set_epoch(number)
    dataset, found = trainer.data.train.dataset.dataset, []
    for batch in trainer.data.train.loader.batch_sampler:
        found.append([dataset.filename(draw.index) for draw in batch])
    return found


def test_an_epoch_goes_once_through_both(argv, monkeypatch):
    trainer = make_trainer(argv, monkeypatch)
    files = [name for batch in epoch_of(trainer) for name in batch]
    assert len(files) == len(set(files)) == 64
    assert sum('others' in name for name in files) == 28


def test_each_batch_has_its_share_of_labelled_images_in_an_order_of_its_epoch(argv, monkeypatch):
    trainer = make_trainer(argv, monkeypatch)
    first, second = epoch_of(trainer, 0), epoch_of(trainer, 1)
    assert first != second
    assert first == epoch_of(trainer, 0)
    for batch in first + second:
        assert 4 <= sum('others' not in name for name in batch) <= 5  # 36 of 64, in batches of 8


@pytest.mark.parametrize('world_size', [1, 2, 3])
def test_ranks_share_the_images(world_size):
    samplers = [EvenSampler(10, 31, rank, world_size) for rank in range(world_size)]
    drawn = Counter(i for sampler in samplers for i in sampler)
    assert {len(list(sampler)) for sampler in samplers} == {41 // world_size}
    assert max(drawn.values()) == 1
    assert len(drawn) == 41 // world_size * world_size


@pytest.mark.parametrize(
    ('labeled', 'others', 'world_size', 'batch_size'),
    [(40, 40, 2, 8), (1000, 7000, 8, 64), (10000, 30010, 8, 64), (5000, 5003, 2, 32), (10, 31, 3, 4), (7, 500, 3, 8)],
)
def test_each_rank_and_each_batch_has_its_share_of_labelled_images(labeled, others, world_size, batch_size):
    drawn = [list(EvenSampler(labeled, others, rank, world_size)) for rank in range(world_size)]
    counts = np.array(
        [
            [sum(i < labeled for i in order[at : at + batch_size]) for order in drawn]
            for at in range(0, len(drawn[0]) - batch_size + 1, batch_size)
        ]
    )
    share = labeled / (labeled + others) * batch_size
    assert abs(counts - share).max() <= 1.1
    assert abs(counts.sum(1) - share * world_size).max() <= 2


@pytest.mark.parametrize(('ratio', 'number'), [(0.5, 18), (2, 72)])
def test_a_ratio_says_how_many_others_an_epoch_has_for_each_labelled_image(ratio, number, argv, monkeypatch):
    trainer = make_trainer([*argv, '--unlabeled-ratio', str(ratio), '-b', '6'], monkeypatch)
    epochs = [[name for batch in epoch_of(trainer, e) for name in batch] for e in (0, 1)]
    for files in epochs:
        drawn = Counter(name for name in files if 'others' in name)
        assert sum(drawn.values()) == number
        assert max(drawn.values()) - min(drawn.values(), default=0) <= 1 or number < 28
        assert len({name for name in files if 'others' not in name}) == 36
    assert epochs[0] != epochs[1]


def test_an_image_that_an_epoch_has_twice_is_augmented_twice_on_any_rank(argv, monkeypatch):
    trainer = make_trainer([*argv, '--unlabeled-ratio', '2'], monkeypatch)
    batches = list(trainer.data.train.loader.batch_sampler)
    draws = [(draw.index, draw.repeat) for batch in batches for draw in batch]
    assert len(draws) == len(set(draws)) == 104
    assert trainer.data.train.loader.batch_sampler.repeated  # ranks differ


def test_a_ratio_that_repeats_images_does_not_go_with_a_cache(argv, tmp_path, capsys):
    cached = [*argv, '--teacher-cache', str(tmp_path / 'cache'), '--unlabeled-ratio']
    assert 'give 0.778 or less' in refused([*cached, '1'], capsys)
    run([*cached, '0.7', '--epochs', '1'])


def test_the_task_loss_of_ranks_is_the_mean_over_the_labelled_images_of_all(monkeypatch):
    monkeypatch.setattr('timm_pe.train.task_loss.dist.all_reduce', lambda count: count.fill_(5))
    logits, labels = torch.randn(8, 3, dtype=torch.float64), torch.tensor([0, 1, 2, 1, 0])
    rows = [torch.tensor([1]), torch.tensor([0, 1, 2, 3]), torch.tensor([], dtype=torch.long)]
    losses, start = [], 0
    for own, of_rank in zip(rows, (logits[:4], logits[4:], logits[:4]), strict=True):
        loss = LabeledLoss(nn.CrossEntropyLoss(), 3)
        losses.append(loss(of_rank, LabeledTarget(labels[start : start + len(own)], own)))
        start += len(own)
        assert loss.images == 5
    expected = nn.functional.cross_entropy(torch.cat([logits[1:2], logits[4:]]), labels)
    torch.testing.assert_close(sum(losses) / 3, expected)


def test_the_logged_task_loss_is_the_mean_over_labelled_images_at_any_batch_size(small_run, others, tmp_path):
    logged = []
    for batch_size in (1, 4, 16):
        argv = [
            *small_run,
            *PAIR,
            '--unlabeled',
            str(others),
            '--lr',
            '0',
            '--no-aug',
            '--epochs',
            '1',
            '--smoothing',
            '0',
        ]
        argv += ['--model', 'test_convnext', '-b', str(batch_size), '--experiment', f'b{batch_size}']
        run(argv)
        logged.append(float(summary(tmp_path / f'b{batch_size}')[0]['train_task_loss']))
    assert logged == pytest.approx([logged[-1]] * 3, rel=1e-4)


def test_a_labelled_batch_has_the_supervised_loss_and_gradient(argv, small_run, monkeypatch):
    beside = make_trainer(argv, monkeypatch).task
    alone = make_trainer([*small_run, *PAIR], monkeypatch).task
    input, target = torch.randn(6, 3, 32, 32), torch.arange(6) % 3
    for task in (beside, alone):
        task.train()
        task.teacher = alone.teacher
    beside.trainable_module.load_state_dict(alone.trainable_module.state_dict())
    results = beside(input, LabeledTarget(target, torch.arange(6))), alone(input, target)
    for name in ('loss', 'task_loss', 'pe_loss', 'output'):
        assert torch.equal(results[0][name], results[1][name]), name
    for result in results:
        result['loss'].backward()
    for a, b in zip(beside.trainable_module.parameters(), alone.trainable_module.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)


def test_images_without_labels_have_no_task_loss_and_the_teachers(argv, monkeypatch):
    task = make_trainer(argv, monkeypatch).task.eval()
    input, target = torch.randn(6, 3, 32, 32), torch.tensor([2, 0])
    rows = torch.tensor([1, 4])
    mixed, labelled = (
        task(input, LabeledTarget(target, rows)),
        task(input[rows], LabeledTarget(target, torch.arange(2))),
    )
    torch.testing.assert_close(mixed['task_loss'], labelled['task_loss'])
    none = task(input, LabeledTarget(target[:0], rows[:0]))
    assert none['task_loss'] == 0
    assert torch.equal(none['pe_loss'], mixed['pe_loss'])
    none['loss'].backward()
    assert all(p.grad is not None for p in task.trainable_module.parameters())


def test_targets_are_those_of_the_files(argv, monkeypatch):
    trainer = make_trainer(argv, monkeypatch)
    files = epoch_of(trainer)
    trainer.data.train.loader.batch_sampler.set_epoch(0)
    for names, (_, target) in zip(files, trainer.data.train, strict=True):
        labels = [('ant', 'bee', 'cat').index(name.split('/')[-2]) for name in names if 'others' not in name]
        assert target.target.tolist() == labels
        assert target.rows.tolist() == [i for i, name in enumerate(names) if 'others' not in name]


def test_a_run_says_what_it_trains_on_and_validates_by_labels(argv, tmp_path, capsys):
    said = run(argv, capsys)
    for pattern in (
        r'loss +1 x LabelSmoothingCrossEntropy of labelled images \+ 25 x direction',
        r'data +36 training, 12 validation images of 3 classes',
        r'without labels +28 images more, of /.*: 4.5 of 8 in a batch are labelled',
        r'epochs +2 of 8 batches',
    ):
        assert re.search(pattern, said), pattern
    assert {'train_task_loss', 'train_pe_loss', 'eval_top1'} <= set(summary(tmp_path / 'run')[0])


def test_labelled_images_are_left_out_of_those_without(argv, image_folder, others, monkeypatch, capsys):
    argv = [*argv, '--unlabeled', str(others), str(image_folder)]
    trainer = make_trainer(argv, monkeypatch)
    assert len(reader_of(trainer.data.train.dataset, BesideReader).found.paths) == 28
    assert (
        'counted once    48 images of --unlabeled that the data folder has with labels, 12 of them to validate'
        in capsys.readouterr().err
    )
    assert 'all of its images are labelled ones' in refused([*argv, '--unlabeled', str(image_folder)], capsys)


@pytest.mark.parametrize('place', [shutil.copy, os.link, os.symlink])
def test_copies_and_links_of_labelled_images_are_left_out_and_those_to_validate_counted(
    place, argv, image_folder, others, tmp_path, monkeypatch, capsys
):
    shutil.copytree(image_folder, tmp_path / 'data')
    shutil.copytree(others, tmp_path / 'others')
    for i, name in enumerate(('train/ant/1', 'val/bee/2', 'val/cat/0', 'val/cat/0')):
        place(tmp_path / 'data' / f'{name}.png', tmp_path / 'others' / f'0{i}.png')
    argv = [str(tmp_path / 'data'), *argv[1:], '--unlabeled', str(tmp_path / 'others')]
    trainer = make_trainer(argv, monkeypatch)
    paths = reader_of(trainer.data.train.dataset, BesideReader).found.paths
    assert {os.path.basename(path) for path in paths} == {f'{i}.png' for i in range(28)}
    number, validated = (4, 3) if place is shutil.copy else (3, 2)  # links to one image count once
    assert (
        f'counted once    {number} images of --unlabeled that the data folder has with labels, {validated} of them to '
        f'validate\n' in capsys.readouterr().err
    )


def test_an_image_that_is_in_both_splits_counts_as_one_to_validate(
    argv, image_folder, others, tmp_path, monkeypatch, capsys
):
    shutil.copytree(image_folder, tmp_path / 'data')
    for name in ('data/train/ant/new.png', 'data/val/ant/new.png', 'more/new.png'):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(others / '3.png', tmp_path / name)
    shutil.copy(others / '4.png', tmp_path / 'more')
    make_trainer([str(tmp_path / 'data'), *argv[1:], '--unlabeled', str(tmp_path / 'more')], monkeypatch)
    assert (
        '1 image of --unlabeled that the data folder has with labels, 1 of them to validate' in capsys.readouterr().err
    )


@pytest.mark.parametrize('more', ['', '-j 2 --model-ema --no-prefetcher', '--teacher-cache'])
@pytest.mark.parametrize('number', [3, 9])
def test_a_run_that_is_stopped_and_resumed_ends_bit_equal(more, number, argv, tmp_path, capsys, monkeypatch):
    alone, resumed = ([*argv, *more.split()] for _ in range(2))
    if more == '--teacher-cache':
        alone, resumed = [*alone, str(tmp_path / 'a')], [*resumed, str(tmp_path / 'b')]
    run([*alone, '--experiment', 'alone'])
    asked, requested = [], Interrupts.requested
    monkeypatch.setattr(Interrupts, 'requested', lambda self: (asked.append(1), 15 if len(asked) == number else 0)[1])
    stopped([*resumed, '--resume', 'auto'], capsys)
    monkeypatch.setattr(Interrupts, 'requested', requested)
    run([*resumed, '--resume', 'auto'])
    checkpoints = [load(tmp_path / name / 'last.pth.tar') for name in ('alone', 'run')]
    for part in ('state_dict', 'state_dict_ema', 'optimizer', 'task_state'):
        assert str(checkpoints[0].get(part)) == str(checkpoints[1].get(part)), part
    rows = [summary(tmp_path / name) for name in ('alone', 'run')]
    assert [r['eval_loss'] for r in rows[0]] == [r['eval_loss'] for r in rows[1]]
    assert [r['train_task_loss'] for r in rows[0]] == [r['train_task_loss'] for r in rows[1]]


def test_a_run_beside_is_evaluated_and_analysed_by_its_labels(argv, tmp_path, capsys):
    pytest.importorskip('matplotlib')
    from timm_pe.analysis import analyze

    run(argv)
    said = run(['--evaluate', str(tmp_path / 'run'), '--device', 'cpu', '-j', '0'], capsys)
    assert 'on 12 images' in said
    assert analyze(tmp_path / 'run')['images']['train'] == 36


@pytest.mark.parametrize(
    ('flags', 'message'),
    [
        ('--mixup 0.2', '--mixup mixes labels'),
        ('--cutmix 1', '--cutmix mixes labels'),
        ('--val-fraction 0.1', '--val-fraction holds images out for a validation'),
        ('--dataset sklearn/digits', '--dataset names a data set that is not a folder'),
        ('--task multilabel', '--task reads labels of another kind'),
        ('--train-img-sizes 32 40', '--train-img-sizes makes batches of its own'),
        ('--unlabeled-ratio 0', '--unlabeled-ratio must be above 0'),
        ('--unlabeled nowhere', "--unlabeled: 'nowhere' does not exist"),
    ],
)
def test_what_cannot_work_beside_labels_is_one_line(flags, message, argv, tmp_path, capsys):
    assert message in refused([*argv, *flags.split()], capsys)
    assert not (tmp_path / 'run').exists()


def test_a_resume_without_the_other_images_is_named(argv, tmp_path, capsys):
    run([*argv, '--epochs', '1'])
    alone = [f for f in argv if f != '--unlabeled' and 'others' not in f]
    assert 'no --unlabeled now' in run([*alone, '--resume', 'auto'], capsys)
    assert 'no --unlabeled then' in run([*argv, '--resume', 'auto', '--epochs', '3'], capsys)


def test_the_model_card_names_the_images_without_labels(argv, others, tmp_path):
    run([*argv, '--epochs', '1'])
    export([str(tmp_path / 'run'), '--output', str(tmp_path / 'exported')])
    assert f', and without labels `{others.name}`' in (tmp_path / 'exported' / 'README.md').read_text()


def test_a_tar_has_no_images_beside_it(argv, image_folder, tmp_path, capsys):
    file = shutil.make_archive(str(tmp_path / 'x'), 'tar', image_folder / 'val')
    assert 'goes beside a folder of class folders alone' in refused([file, *argv[1:]], capsys)
