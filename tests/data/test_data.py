import argparse
import os
import shutil
import subprocess
import sys
import tarfile
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from timm.data import create_dataset
from timm.data.distributed_sampler import RepeatAugSampler
from torch.utils.data import BatchSampler, DistributedSampler, RandomSampler

from timm_pe import UsageError
from timm_pe.config.run_config import parse_config
from timm_pe.data.datasets import (
    _check_splits,
    check_data,
    check_num_classes,
    class_map_of,
    count_classes,
    create_datasets,
)
from timm_pe.data.draws import DrawBatchSampler, derive_seed, seeded_mixup
from timm_pe.data.epochs import plain_loader, set_epoch
from timm_pe.data.loaders import create_data
from timm_pe.process.runtime import setup_runtime


def open_data(argv):
    args = parse_config([*argv, '--device', 'cpu', '--img-size', '32', *([] if '-b' in argv else ['-b', '8'])])
    runtime = setup_runtime(args)
    student = timm.create_model('test_resnet', num_classes=args.num_classes)
    return create_data(args, create_datasets(args), student, runtime)


def epoch_of(data, epoch):
    set_epoch(data.train, epoch)
    return [(x.clone(), y.clone()) for x, y in data.train]


def assert_same(a, b):
    assert len(a) == len(b) > 0
    for (xa, ya), (xb, yb) in zip(a, b, strict=True):
        assert torch.equal(xa, xb)
        assert torch.equal(ya, yb)


def folder(image_folder, *more):
    return [str(image_folder), '--num-classes', '3', *more]


HARD = ('--mixup', '0.5', '--cutmix', '0.5', '--reprob', '0.7', '--aa', 'rand-m9-mstd0.5', '--color-jitter', '0.4')


@pytest.mark.parametrize('more', [(), HARD, (*HARD, '--no-prefetcher')], ids=['plain', 'everything', 'no prefetcher'])
def test_any_number_of_workers_sees_the_same_pixels(image_folder, more):
    epochs = []
    for workers in ('0', '1', '2'):
        data = open_data(folder(image_folder, '-j', workers, *more))
        torch.manual_seed(int(workers))  # the run's own random state must not matter
        np.random.seed(int(workers))
        epochs.append((epoch_of(data, 0), epoch_of(data, 1)))
    for other in epochs[1:]:
        assert_same(epochs[0][0], other[0])
        assert_same(epochs[0][1], other[1])


def test_a_restart_at_any_epoch_sees_the_same_pixels(image_folder):
    straight, restarted = (open_data(folder(image_folder, '-j', '0', *HARD)) for _ in range(2))
    epoch_of(straight, 0)
    assert_same(epoch_of(straight, 1), epoch_of(restarted, 1))


def test_epochs_and_seeds_differ(image_folder):
    data = open_data(folder(image_folder, '-j', '0'))
    other = open_data(folder(image_folder, '-j', '0', '--seed', '7'))
    first, second, seed7 = epoch_of(data, 0), epoch_of(data, 1), epoch_of(other, 0)
    assert not torch.equal(first[0][0], second[0][0])
    assert not torch.equal(first[0][0], seed7[0][0])


def test_drawing_leaves_the_random_state_of_the_run_alone(image_folder):
    data = open_data(folder(image_folder, '-j', '0', *HARD))
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    epoch_of(data, 0)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize('workers', ['0', '2'])
def test_mixing_ends_at_the_off_epoch_in_persistent_workers_too(image_folder, workers):
    data = open_data(
        folder(image_folder, '-j', workers, '--mixup', '0.8', '--mixup-off-epoch', '2', '--smoothing', '0')
    )
    for epoch in range(4):
        hard = all(((y == 0) | (y == 1)).all() for _, y in epoch_of(data, epoch))
        assert hard == (epoch >= 2), epoch


def test_mixup_without_prefetcher_is_a_function_of_its_key():
    mixup = timm.data.Mixup(mixup_alpha=0.5, cutmix_alpha=0.5, num_classes=3)
    x, y = torch.rand(4, 3, 8, 8), torch.tensor([0, 1, 2, 0])
    a = seeded_mixup(mixup, x.clone(), y, 1, 2, 3, 4)
    np.random.seed(99)
    b = seeded_mixup(mixup, x.clone(), y, 1, 2, 3, 4)
    c = seeded_mixup(mixup, x.clone(), y, 1, 2, 4, 4)
    assert torch.equal(a[0], b[0])
    assert not torch.equal(a[0], c[0])


def test_near_keys_give_unrelated_seeds():
    seeds = {derive_seed(s, e, i) for s in range(4) for e in range(10) for i in range(100)}
    assert len(seeds) == 4000
    assert all(0 <= s < 2**63 for s in seeds)


def test_each_rank_of_a_repeated_image_gets_another_draw():
    from torch.utils.data import BatchSampler

    from timm_pe.data.draws import DrawBatchSampler

    draws = [
        draw
        for rank in range(2)
        for batch in DrawBatchSampler(
            BatchSampler([5, 5, 5, 5], 2, drop_last=True), seed=0, rank=rank, world_size=2, repeated=True
        )
        for draw in batch
    ]
    assert len(set(draws)) == 8


def test_digits_are_real_fixed_and_stratified():
    args = parse_config(['--dataset', 'sklearn/digits', '--num-classes', '10'])
    train, val = create_datasets(args)
    assert (len(train), len(val)) == (898, 899)
    assert count_classes(train) == 10
    assert train[0][0].mode == 'RGB'
    for part in (train, val):
        counts = np.bincount(part.reader.targets)
        assert counts.min() >= 86
        assert counts.max() <= 92
    assert not set(train.reader.indices) & set(val.reader.indices)
    grey, _ = create_datasets(parse_config(['--dataset', 'sklearn/digits']), in_chans=1)
    assert grey[0][0].mode == 'L'


def test_a_missing_or_empty_folder_is_refused(tmp_path):
    for path, message in (
        (tmp_path / 'none', 'no data folder'),
        (tmp_path, 'no images in .*: put those of each class into a folder'),
    ):
        args = parse_config([str(path), '--num-classes', '3'])
        with pytest.raises(UsageError, match=message):
            check_data(args)
            create_datasets(args)


@pytest.mark.parametrize(
    ('name', 'message'),
    [
        ('sklearn/digit', 'unknown data set .*did you mean sklearn/digits'),
        ('nonsense', 'no data folder'),
        ('torh/cifar10', 'Known: sklearn/digits, torch/NAME'),
    ],
)
def test_a_mistyped_data_set_is_refused_with_the_known_ones(name, message):
    with pytest.raises(UsageError, match=message):
        check_data(parse_config(['--dataset', name]))


def test_a_missing_split_is_refused_instead_of_validating_on_everything(image_folder, tmp_path):
    (tmp_path / 'train').symlink_to(image_folder / 'train')
    args = parse_config([str(tmp_path), '--num-classes', '3'])
    with pytest.raises(UsageError, match="no folder for split 'validation' in .*: it has train"):
        create_datasets(args)


def test_splits_with_other_classes_are_refused(image_folder, tmp_path):
    for split in ('train', 'val'):
        (tmp_path / split).mkdir()
        for name in ('ant', 'bee', 'cat') if split == 'train' else ('ant', 'cat'):
            (tmp_path / split / name).symlink_to(image_folder / split / name)
    args = parse_config([str(tmp_path)])
    with pytest.raises(UsageError, match='different classes.*: bee in one of them only'):
        create_datasets(args)


def test_classes_that_do_not_fit_the_data_are_refused(caplog):
    datasets = (None, argparse.Namespace(reader=SimpleNamespace(class_to_idx={'a': 0, 'b': 1, 'c': 2})))
    check_num_classes(datasets, 3, given=True)
    with pytest.raises(UsageError, match='3 classes and the student 10: --num-classes 3 fits, or none'):
        check_num_classes(datasets, 10, given=True)
    with pytest.raises(UsageError, match='3 classes and the student 2$'):
        check_num_classes(datasets, 2, given=False)
    check_num_classes(datasets, 1000, given=False)
    assert 'has the 1000 classes of its weights, the data set has 3' in caplog.text


def test_fewer_images_than_a_batch_is_refused(image_folder):
    with pytest.raises(UsageError, match='36 training images on 1 rank.* fewer than one batch of 64'):
        open_data(folder(image_folder, '-j', '0', '-b', '64'))


def test_the_padded_crop_of_cifar_recipes_shifts_images_and_fills_with_zeros(image_folder):
    argv = folder(image_folder, '-j', '0', '--hflip', '0', '--color-jitter', '0', '--mean', '0', '0', '0')
    argv += ['--std', '1', '1', '1', '--interpolation', 'bilinear', '--train-crop-pad', '4']
    data = open_data(argv)
    whole = {x.numpy().tobytes(): x for x, _ in _unmoved(argv)}
    shifts = set()
    for x, _ in epoch_of(data, 0):
        for image in x:
            padded = {k: torch.nn.functional.pad(w, (4, 4, 4, 4)) for k, w in whole.items()}
            found = {
                (i, j)
                for w in padded.values()
                for i in range(9)
                for j in range(9)
                if torch.equal(w[:, i : i + 32, j : j + 32], image)
            }
            assert len(found) == 1
            shifts |= found
    assert {min(i for i, _ in shifts), max(i for i, _ in shifts)} == {0, 8}
    assert {min(j for _, j in shifts), max(j for _, j in shifts)} == {0, 8}


def _unmoved(argv):
    """The training images, resized to 32 x 32 as the padded crop does it first."""
    from torchvision import transforms

    args = parse_config(argv)
    dataset, _ = create_datasets(args)
    dataset.transform = transforms.Compose([transforms.Resize((32, 32)), transforms.ToTensor()])
    return list(dataset)


@pytest.mark.parametrize(
    ('more', 'message'),
    [
        (('--scale', '0.5', '1'), '--scale is for the crop that --train-crop-pad replaces'),
        (('--train-crop-mode', 'rkrc'), '--train-crop-mode is for the crop'),
        (('--no-aug',), '--train-crop-pad does not go with --no-aug'),
    ],
)
def test_the_padded_crop_refuses_flags_of_the_other_crop(image_folder, capsys, more, message):
    with pytest.raises(SystemExit):
        parse_config([*folder(image_folder), '--train-crop-pad', '4', *more])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize('wrap', [(), ('--train-img-sizes', '24', '32'), ('--aug-splits', '2')])
@pytest.mark.parametrize('kind', ['', 'torch/image_folder'])
def test_the_class_map_of_a_data_set_is_seen_through_what_wraps_it(image_folder, kind, wrap):
    data = open_data(folder(image_folder, '-j', '0', '--dataset', kind, *wrap))
    assert class_map_of(data.train.dataset) == class_map_of(data.eval.dataset) == {'ant': 0, 'bee': 1, 'cat': 2}


def test_the_class_map_of_tar_files_is_seen(image_folder, tmp_path):
    with tarfile.open(tmp_path / 'train.tar', 'w') as tar:
        tar.add(image_folder / 'train', arcname='.')
    dataset = create_dataset('', root=str(tmp_path / 'train.tar'), search_split=False)
    assert class_map_of(dataset) == {'ant': 0, 'bee': 1, 'cat': 2}


def test_a_data_set_without_a_class_map_has_none():
    assert class_map_of(None) is None
    assert class_map_of(torch.utils.data.TensorDataset(torch.zeros(1))) is None


ORDER = """
import sys
from timm_pe import UsageError
from timm_pe.config.run_config import parse_config
from timm_pe.data.datasets import class_map_of, create_datasets
try:
    print(class_map_of(create_datasets(parse_config(sys.argv[1:]))[0]))
except UsageError as e:
    print(e)
"""


def _orders(argv):
    """What processes of different hash seeds make of a data set's classes."""
    said = set()
    for seed in range(4):  # at random, two names come in one order all four times once in eight
        env = {**os.environ, 'PYTHONHASHSEED': str(seed)}
        command = [sys.executable, '-c', ORDER, *argv]
        said.add(subprocess.run(command, capture_output=True, text=True, check=True, env=env).stdout.strip())
    return said


def _folder_of_classes(root, image_folder, *names):
    for split in ('train', 'val'):
        for name in names:
            shutil.copytree(image_folder / split / 'ant', root / split / name)
    return [str(root), '--num-classes', str(len(names))]


@pytest.mark.long
def test_class_folders_that_timm_cannot_sort_are_refused_whatever_the_hash_seed(image_folder, tmp_path):
    (said,) = _orders(_folder_of_classes(tmp_path, image_folder, 'Ant', 'bee', 'ant'))
    assert "class folders 'Ant' and 'ant'" in said


@pytest.mark.parametrize('names', [('01', '1'), ('A02B', 'a2b')])
def test_class_folders_that_timm_cannot_sort_are_named_with_the_remedy(image_folder, tmp_path, names):
    argv = _folder_of_classes(tmp_path, image_folder, *names)
    with pytest.raises(UsageError, match=f"class folders '{names[0]}' and '{names[1]}'.* rename one of them"):
        create_datasets(parse_config(argv))


def test_a_class_map_orders_what_timm_cannot_sort(image_folder, tmp_path):
    argv = _folder_of_classes(tmp_path, image_folder, '01', '1')
    (tmp_path / 'classes.txt').write_text('1\n01\n')
    args = parse_config([*argv, '--class-map', str(tmp_path / 'classes.txt')])
    assert class_map_of(create_datasets(args)[0]) == {'1': 0, '01': 1}


def test_torchvision_sorts_what_timm_cannot(image_folder, tmp_path):
    argv = _folder_of_classes(tmp_path, image_folder, '01', '1')
    args = parse_config([*argv, '--dataset', 'torch/image_folder'])
    assert class_map_of(create_datasets(args)[0]) == {'01': 0, '1': 1}


BEYOND = ('-j', '0', '--train-img-sizes', '24', '32', '--train-batches-per-epoch', '9')  # 9 x 8 draws of 36 images


def test_an_image_that_recurs_within_an_epoch_is_drawn_anew(image_folder):
    plain = plain_loader(open_data(folder(image_folder, *BEYOND)).train)
    draws = [draw for batch in plain.batch_sampler for draw in batch]
    times = Counter(draw.index[0] for draw in draws)
    assert set(times.values()) == {2}
    for image in times:
        first, second = (draw._replace(index=(image, 1)) for draw in draws if draw.index[0] == image)  # at one size
        assert (first.repeat, second.repeat) == (0, 1)
        assert not np.array_equal(plain.dataset[first][0], plain.dataset[second][0])


def test_a_resume_beyond_the_data_goes_on_with_the_same_draws(image_folder):
    loader = open_data(folder(image_folder, *BEYOND)).train
    set_epoch(loader, 1)
    whole = list(plain_loader(loader).batch_sampler)
    set_epoch(loader, 1, start=6)
    assert list(plain_loader(loader).batch_sampler) == whole[6:]


def test_a_teacher_cache_has_no_second_draw_of_an_image(image_folder, capsys):
    with pytest.raises(SystemExit):
        parse_config([*folder(image_folder, *BEYOND), '--teacher', 'test_vit', '--teacher-cache', 'cache'])
    assert '--teacher-cache keeps one feature an image and view, --train-img-sizes gives' in capsys.readouterr().err


FOLDER_KINDS = ['', 'imagenet', 'torch/image_folder']  # a name without a slash is a folder too


@pytest.mark.parametrize('kind', FOLDER_KINDS)
def test_splits_whose_classes_differ_are_refused_whatever_reads_them(image_folder, tmp_path, kind):
    shutil.copytree(image_folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / 'val' / 'cat').rename(tmp_path / 'val' / 'dog')
    with pytest.raises(UsageError, match=r'different classes.*: cat, dog in one of them only \(3 and 3 classes\)'):
        create_datasets(parse_config(folder(tmp_path, '--dataset', kind)))


@pytest.mark.parametrize('kind', FOLDER_KINDS)
def test_a_folder_without_splits_is_warned_about_whatever_reads_it(image_folder, kind, caplog):
    create_datasets(parse_config(folder(image_folder / 'train', '--dataset', kind)))
    assert 'training and validation use the SAME images' in caplog.text


@pytest.mark.parametrize('kind', FOLDER_KINDS)
def test_a_split_without_a_folder_is_refused_whatever_reads_it(image_folder, kind):
    with pytest.raises(UsageError, match="no folder for split 'test' in .*: it has train, val"):
        create_datasets(parse_config(folder(image_folder, '--dataset', kind, '--val-split', 'test')))


def test_splits_that_number_the_same_classes_otherwise_are_refused():
    splits = [argparse.Namespace(class_to_idx=classes) for classes in ({'a': 0, 'b': 1}, {'b': 0, 'a': 1})]
    with pytest.raises(UsageError, match='a is 0 in one and 1 in the other'):
        _check_splits(*splits)


def test_splits_that_do_not_both_tell_their_classes_are_not_compared():
    splits = [argparse.Namespace(class_to_idx={'a': 0}), argparse.Namespace()]
    _check_splits(*splits)


def _epoch_order(sampler, seed, epoch=0):
    """The images of an epoch on two ranks, in their order."""
    ranks = []
    for rank in range(2):
        index_sampler = sampler(range(64), 2, rank)
        batches = DrawBatchSampler(BatchSampler(index_sampler, 4, True), seed, rank, 2, repeated=False)
        batches.set_epoch(epoch)
        ranks.append([draw.index for batch in batches for draw in batch])
    return ranks


@pytest.mark.parametrize('sampler', [DistributedSampler, RepeatAugSampler])
def test_the_order_of_several_ranks_follows_the_seed_and_the_epoch(sampler):
    orders = {(s, e): _epoch_order(sampler, s, e) for s in (1, 2) for e in (0, 1)}
    assert len({str(order) for order in orders.values()}) == 4
    assert orders[1, 0] == _epoch_order(sampler, 1)


def test_ranks_share_the_images_of_the_batch_that_one_process_would_take():
    first, second = _epoch_order(DistributedSampler, seed=3)
    order = BatchSampler(RandomSampler(range(64)), 8, True)
    alone = [draw.index for batch in DrawBatchSampler(order, 3, 0, 1, repeated=False) for draw in batch]
    assert alone == [index for pair in zip(first, second, strict=True) for index in pair]


@pytest.mark.parametrize('more', [[], ['--no-prefetcher']], ids=['prefetcher', 'no prefetcher'])
def test_a_torchvision_data_set_gives_images_of_the_students_channels(image_folder, more):
    argv = ['--dataset', 'torch/image_folder', '--data-dir', str(image_folder), '--val-split', 'val', '-j', '0', *more]
    argv += ['--device', 'cpu', '--img-size', '32', '-b', '8', '--num-classes', '3', '--in-chans', '1']
    args = parse_config(argv)
    student = timm.create_model('test_resnet', num_classes=3, in_chans=1)
    data = create_data(args, create_datasets(args, 1), student, setup_runtime(args))
    grey = [next(iter(loader))[0] for loader in (data.train, data.eval)]
    assert [x.shape[1] for x in grey] == [1, 1]
    as_folder = parse_config([str(image_folder), *argv[6:]])
    expected = create_data(as_folder, create_datasets(as_folder, 1), student, setup_runtime(as_folder))
    assert torch.equal(grey[1], next(iter(expected.eval))[0])
