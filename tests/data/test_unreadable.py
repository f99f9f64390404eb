"""Images that cannot be read are counted and named, and too many end the run."""

import re
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from helpers import refused, run, summary
from PIL import Image
from survive import COMMON, write_images
from timm.data import ImageDataset, create_dataset

from timm_pe.config.run_config import parse_config
from timm_pe.data.datasets import create_datasets
from timm_pe.data.epochs import first_batch, plain_loader, set_epoch
from timm_pe.data.folders import FolderReader
from timm_pe.data.loaders import _check_target, create_data
from timm_pe.data.unreadable import CountingImageDataset, describe_unreadable, describe_warnings, forget_unreadable
from timm_pe.errors import RunError
from timm_pe.process.runtime import setup_runtime


def one_rank(own):
    return [own]


@pytest.fixture
def images(tmp_path):
    return write_images(tmp_path / 'images')


@pytest.fixture
def command(images, tmp_path):
    argv = [str(images), *COMMON, '--epochs', '1', '--warmup-epochs', '0', '--output', str(tmp_path)]
    return [*argv, '--experiment', 'run']


def truncate(path):
    path.write_bytes(path.read_bytes()[:200])


def break_every(number, folder):
    for path in sorted(folder.rglob('*.png'))[::number]:
        truncate(path)


@pytest.mark.parametrize('workers', ['0', '2'])
def test_a_few_unreadable_images_are_counted_and_named(workers, command, images, tmp_path, capsys):
    truncate(images / 'train' / 'bee' / '3.png')
    (images / 'train' / 'cat' / '5.png').write_bytes(b'')
    said = run([*command, '-j', workers], capsys)
    assert re.search(
        r"2 of 72 images could not be read and were replaced by other images, the first is '(bee/3|cat/5)\.png', then "
        r"'(bee/3|cat/5)\.png'\.",
        said,
    )
    assert len(summary(tmp_path / 'run')) == 1


@pytest.mark.parametrize('workers', ['0', '2'])
def test_an_unreadable_image_is_not_told_again_by_timm_in_each_epoch(workers, command, images, capfd):
    truncate(images / 'train' / 'bee' / '3.png')
    run([*command, '--epochs', '2', '-j', workers])
    said = capfd.readouterr().err
    assert 'Skipped sample' not in said
    assert said.count('1 of 72 images could not be read') == 1


def test_unreadable_images_of_the_validation_split_are_counted_too(command, images, capsys):
    truncate(images / 'val' / 'ant' / '1.png')
    assert "1 of 18 images could not be read and were replaced by other images, the first is 'ant/1.png'" in run(
        command, capsys
    )


def test_readable_images_are_not_spoken_of(command, capsys):
    assert 'could not be read' not in run(command, capsys)


@pytest.mark.parametrize('workers', ['0', '2'])
def test_nothing_but_unreadable_images_is_refused_with_the_name_of_one_and_nothing_written(
    workers, command, images, tmp_path, capsys
):
    break_every(1, images / 'train')
    error = refused([*command, '-j', workers], capsys)
    assert re.search(r"10 images in a row cannot be read, the first is '\w+/\d+.png'", error)
    assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize('workers', ['0', '2'])
def test_images_that_cannot_be_read_later_end_the_run_with_the_name_of_one(workers, command, images, capsys):
    break_every(1, images / 'val')  # which the run comes to after its first epoch
    error = refused([*command, '-j', workers], capsys, code=1)
    assert re.search(r"10 images in a row cannot be read, the first is '\w+/\d+.png'", error)


def test_more_than_a_tenth_unreadable_ends_the_run_before_its_checkpoint(command, images, tmp_path, capsys):
    break_every(4, images / 'train')
    error = refused(command, capsys, code=1)
    assert re.search(r"\d\d of 72 images cannot be read, the first is '\w+/\d+.png'", error)
    assert not (tmp_path / 'run' / 'last.pth.tar').exists()


def test_counting_changes_nothing_of_a_data_set(images):
    plain = create_dataset('', root=str(images), split='train')
    counting = CountingImageDataset(plain)
    assert len(counting) == len(plain) == 72
    assert counting.filenames() == plain.filenames()
    assert counting.reader.class_to_idx == plain.reader.class_to_idx
    for a, b in zip(counting, plain, strict=True):
        assert a[1] == b[1]
        assert a[0].tobytes() == b[0].tobytes()
    assert describe_unreadable(counting, 72, one_rank) == (0, '')


def test_a_count_is_told_once_and_names_the_file(images):
    truncate(images / 'train' / 'ant' / '0.png')
    dataset = CountingImageDataset(create_dataset('', root=str(images), split='train'))
    assert isinstance(dataset[0][0], Image.Image)
    assert (
        "1 of 72 images could not be read and were replaced by other images, the first is 'ant/0.png'"
        in describe_unreadable(dataset, 72, one_rank)[1]
    )
    assert describe_unreadable(dataset, 72, one_rank) == (0, '')


def test_an_error_of_a_transform_is_not_taken_for_a_file(images):
    def transform(image):
        raise RuntimeError('a bug')

    dataset = CountingImageDataset(create_dataset('', root=str(images), split='train', transform=None))
    dataset.transform = transform
    with pytest.raises(RuntimeError, match='^a bug$') as e:
        dataset[0]
    assert not isinstance(e.value, RunError)


@pytest.mark.parametrize('more', [(), ('--use-multi-epochs-loader',)], ids=['plain', 'multi epochs'])
def test_the_first_look_reads_no_image_that_an_epoch_would_count(images, more):
    args = parse_config([str(images), *COMMON, '-j', '2', *more])
    runtime = setup_runtime(args)
    student = timm.create_model('test_resnet', num_classes=3)
    loader = create_data(args, create_datasets(args), student, runtime).train
    in_first_batch = {draw.index for draw in first_batch_draws(loader)}
    dataset = loader.dataset.dataset
    for index in set(range(72)) - in_first_batch:
        if index % 3 == 0:
            truncate(Path(dataset.filename(index, absolute=True)))
    input, _ = first_batch(loader)
    time.sleep(2)  # what workers would read ahead
    assert describe_unreadable(loader.dataset, 1, one_rank) == (0, '')
    torch.testing.assert_close(input, next(iter_epoch(loader)), rtol=0, atol=0)


def first_batch_draws(loader):
    set_epoch(loader, 0)
    return next(iter(plain_loader(loader).batch_sampler))


def iter_epoch(loader):
    set_epoch(loader, 0)
    for input, _ in loader:
        yield input


@pytest.mark.parametrize('workers', ['0', '2'])
def test_each_image_that_was_drawn_and_is_unreadable_counts_once(workers, command, images, capsys):
    for name in ('ant/20', 'ant/21', 'ant/22', 'bee/0', 'cat/11'):  # neighbours: one is tried in place of the other
        truncate(images / 'train' / f'{name}.png')
    assert '5 of 72 images could not be read' in run([*command, '-j', workers], capsys)


def test_a_look_at_the_targets_is_not_counted(images):
    truncate(images / 'train' / 'ant' / '0.png')
    dataset = CountingImageDataset(create_dataset('', root=str(images), split='train'))
    _check_target(dataset)
    assert describe_unreadable(dataset, 1, one_rank) == (0, '')


@pytest.mark.parametrize('workers', ['0', '2'])
def test_warnings_of_pil_are_counted_and_said_once_in_a_run(workers, command, images, capfd):
    for name in ('ant', 'bee'):
        picture = Image.open(images / 'train' / name / '1.png').quantize(8)
        picture.save(images / 'train' / name / '1.png', transparency=bytes([10, 100]))
    said = run([*command, '-j', workers, '--epochs', '3'], capfd)
    assert said.count('Palette images with Transparency') == 1
    assert re.search(r"2 of \d+ images were read with a warning, the first is '(ant|bee)/1\.png': Palette", said)


def test_images_that_were_read_for_other_reasons_are_not_counted_with_their_warnings(images):
    picture = Image.open(images / 'train' / 'ant' / '1.png').quantize(8)
    picture.save(images / 'train' / 'ant' / '0.png', transparency=bytes([10, 100]))
    dataset = CountingImageDataset(create_dataset('', root=str(images), split='train'))
    dataset[0]
    forget_unreadable(dataset)
    assert dataset.take('warned') == (0, [], '')


def test_the_same_unreadable_images_are_said_once_in_a_run(command, images, capsys):
    (images / 'val' / 'ant' / '0.png').write_bytes(b'no image')
    assert run([*command, '--epochs', '3'], capsys).count('could not be read') == 1


WIDE = {
    'I;16.png': np.arange(900, dtype=np.uint16).reshape(30, 30) * 70,
    'I;16.tif': np.arange(900, dtype=np.uint16).reshape(30, 30) * 70,
    'I.tif': np.arange(900, dtype=np.int32).reshape(30, 30),
    'F.tif': np.linspace(0, 1, 900, dtype=np.float32).reshape(30, 30),
}


def put_wide(folder, number, kind='I;16.png'):
    for i in range(number):
        Image.fromarray(WIDE[kind]).save(folder / f'wide{i}{Path(kind).suffix}')


@pytest.mark.parametrize('kind', WIDE)
@pytest.mark.parametrize('mode', ['RGB', 'L'])
def test_images_of_more_than_8_bits_are_counted_and_read_as_before(kind, mode, tmp_path):
    (tmp_path / 'ant').mkdir()
    put_wide(tmp_path / 'ant', 3, kind)
    Image.new('RGB', (30, 30)).save(tmp_path / 'ant' / 'plain.jpg')
    Image.new('L', (30, 30)).save(tmp_path / 'ant' / 'plain.png')
    plain = ImageDataset(str(tmp_path), reader=FolderReader(str(tmp_path)), input_img_mode=mode)
    counting = CountingImageDataset(plain)
    for a, b in zip(counting, plain, strict=True):
        assert a[0].tobytes() == b[0].tobytes()
    names = [f'ant/wide{i}{Path(kind).suffix}' for i in range(3)]
    assert counting.take('wide') == (3, names, Path(kind).stem)
    assert counting.take('wide') == (0, [], '')
    list(counting)
    assert describe_warnings(counting, 5, one_rank) == (
        3,
        f"3 of 5 images have more than 8 bits, the first is '{names[0]}' (mode {Path(kind).stem}): their values are cut off, not "
        f'scaled, to whole numbers from 0 to 255. Convert them to 8 bits.',
    )


@pytest.mark.parametrize('mode', ['I', 'F', 'I;16', '', None])
def test_images_that_keep_their_bits_are_not_counted(mode, tmp_path):
    (tmp_path / 'ant').mkdir()
    put_wide(tmp_path / 'ant', 3)
    dataset = CountingImageDataset(create_dataset('', root=str(tmp_path), input_img_mode=mode))
    assert [image.mode for image, _ in dataset] == [mode or 'I;16'] * 3
    assert dataset.take('wide') == (0, [], '')


@pytest.mark.parametrize('workers', ['0', '2'])
def test_images_of_more_than_8_bits_are_said_once_in_a_run(workers, command, images, capfd):
    put_wide(images / 'train' / 'bee', 2)
    palette = Image.open(images / 'train' / 'ant' / '1.png').quantize(8)
    palette.save(images / 'train' / 'ant' / '1.png', transparency=bytes([10, 100]))
    argv = [*command, '-j', workers, '--epochs', '3', '-b', '2']
    said = run(argv, capfd)
    assert re.findall(r"(\d+) of \d+ images have more than 8 bits, the first is '(bee/wide)\d.png'", said) == [
        ('2', 'bee/wide')
    ]
    assert said.count('Palette images with Transparency') == 1


@pytest.mark.parametrize('workers', ['0', '2'])
def test_images_of_more_than_8_bits_without_labels_are_counted_too(workers, command, images, tmp_path, capfd):
    shutil.copytree(images / 'train' / 'ant', tmp_path / 'others')
    for path in (tmp_path / 'others').iterdir():
        path.write_bytes(path.read_bytes() + b' ')  # so that none is a copy
    put_wide(tmp_path / 'others', 8)
    flags = ['-j', workers, '--unlabeled', str(tmp_path / 'others')]
    beside = run([*command, '--drop', '0', *flags], capfd)
    assert re.findall(r"(\d+) of \d+ images have more than 8 bits, the first is '.*wide\d.png'", beside) == ['8']
    common = ['--img-size', '32', '-b', '8', '--device', 'cpu', '--model', 'test_resnet', '--teacher', 'test_resnet']
    common += ['--no-teacher-pretrained', '--epochs', '1', '--warmup-epochs', '0', '--output', str(tmp_path)]
    alone = run([*common, '--experiment', 'alone', *flags], capfd)
    # to train on and held out
    counts = re.findall(r"(\d+) of 16 images have more than 8 bits, the first is 'wide\d.png'", alone)
    assert sum(map(int, counts)) == 8


def test_images_of_more_than_8_bits_that_were_read_for_other_reasons_are_not_counted(images):
    put_wide(images / 'train' / 'bee', 2)
    dataset = CountingImageDataset(create_dataset('', root=str(images), split='train'))
    list(dataset)
    forget_unreadable(dataset)
    assert dataset.take('wide') == (0, [], '')


def test_an_image_of_more_than_8_bits_in_place_of_an_unreadable_one_is_not_counted_for_it(images):
    put_wide(images / 'train' / 'bee', 2)
    truncate(images / 'train' / 'bee' / 'wide0.png')
    dataset = CountingImageDataset(create_dataset('', root=str(images), split='train'))
    list(dataset)
    assert dataset.take('wide') == (1, ['bee/wide1.png'], 'I;16')


def test_of_several_ranks_the_first_five_of_all_are_named():
    ranks = [(1, ['a'], ''), (7, ['b', 'c', 'd', 'e', 'f'], ''), (0, [], '')]
    number, said = describe_unreadable(None, 1000, lambda own: ranks)
    assert number == 8
    assert said.endswith("the first is 'a', then 'b', 'c', 'd', 'e'.")
