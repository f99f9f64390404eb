"""Images that cannot be read are counted and named, and too many end the run."""

import re

import pytest
from helpers import refused, run, summary
from PIL import Image
from survive import COMMON, write_images
from timm.data import create_dataset

from timm_pe.errors import RunError
from timm_pe.unreadable import CountingImageDataset, describe_unreadable


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
def test_a_few_unreadable_images_are_counted_and_the_first_is_named(workers, command, images, tmp_path, capsys):
    truncate(images / 'train' / 'bee' / '3.png')
    (images / 'train' / 'cat' / '5.png').write_bytes(b'')
    said = run([*command, '-j', workers], capsys)
    assert re.search(r"2 of 72 images could not be read, the first is '\w+/\d.png': others were taken", said)
    assert len(summary(tmp_path / 'run')) == 1


def test_unreadable_images_of_the_validation_split_are_counted_too(command, images, capsys):
    truncate(images / 'val' / 'ant' / '1.png')
    assert "1 of 18 images could not be read, the first is 'ant/1.png'" in run(command, capsys)


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
    assert describe_unreadable(counting, 72, distributed=False) == ''


def test_a_count_is_told_once_and_names_the_file(images):
    truncate(images / 'train' / 'ant' / '0.png')
    dataset = CountingImageDataset(create_dataset('', root=str(images), split='train'))
    assert isinstance(dataset[0][0], Image.Image)
    assert "1 of 72 images could not be read, the first is 'ant/0.png'" in describe_unreadable(dataset, 72, False)
    assert describe_unreadable(dataset, 72, False) == ''


def test_an_error_of_a_transform_is_not_taken_for_a_file(images):
    def transform(image):
        raise RuntimeError('a bug')

    dataset = CountingImageDataset(create_dataset('', root=str(images), split='train', transform=None))
    dataset.transform = transform
    with pytest.raises(RuntimeError, match='^a bug$') as e:
        dataset[0]
    assert not isinstance(e.value, RunError)
