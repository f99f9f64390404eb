"""Images without labels: which files are found, in which order, and which of them are held out."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from timm_pe.config.run_config import RunConfig
from timm_pe.data.unlabeled import _hash_blocks, create_unlabeled, find_images, hash_images, hold_out
from timm_pe.errors import UsageError


def draw_noise(path: Path, seed: int) -> None:
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 8, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def folder(tmp_path):
    """24 images at several depths, in several formats, and files that are none."""
    rng = np.random.default_rng(0)
    for i in range(24):
        place = tmp_path / 'images' / ('', 'a', 'a/b', 'c d')[i % 4]
        place.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (8, 8, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(place / f'{i}.{("png", "jpg", "webp")[i % 3]}')
    (tmp_path / 'images' / 'notes.txt').write_text('no image')
    (tmp_path / 'images' / '.hidden.png').write_text('hidden')
    return tmp_path / 'images'


def names(found):
    return [os.path.relpath(path, found.root) for path in found.paths]


def test_images_are_found_at_any_depth_and_other_files_are_counted(folder):
    found = find_images([str(folder)])
    assert len(found.paths) == 24
    assert {os.path.dirname(name) for name in names(found)} == {'', 'a', 'a/b', 'c d'}
    assert found.ignored == {'.txt': 1, 'hidden': 1}
    assert found.repeated == 0


def test_the_order_does_not_depend_on_that_of_the_folders(folder, tmp_path):
    shutil.copytree(folder, tmp_path / 'more')
    folders = [str(folder), str(tmp_path / 'more')]
    found = find_images(folders)
    assert found.paths == find_images(folders[::-1]).paths
    # by the path within the folder, over both folders
    relative = [os.path.relpath(path, next(f for f in folders if path.startswith(f + '/'))) for path in found.paths]
    assert relative[::2] == relative[1::2] == names(find_images([str(folder)]))


def test_a_file_that_is_reached_twice_counts_once(folder, tmp_path):
    alone = find_images([str(folder)])
    (folder / 'link.png').symlink_to(folder / '0.png')
    (tmp_path / 'other').symlink_to(folder / 'a')
    found = find_images([str(folder), str(folder / 'a'), str(tmp_path / 'other'), f'{folder}/'])
    assert len(found.paths) == 24
    assert {os.path.realpath(path) for path in found.paths} == set(alone.paths)
    inside = len([name for name in names(alone) if name.startswith('a/')])
    assert found.repeated == 1 + 2 * inside
    assert found.ignored == alone.ignored
    assert os.path.lexists(found.first_repeated)


def test_hard_links_of_a_file_count_once(folder, tmp_path):
    (folder / 'b').mkdir()
    os.link(folder / '0.png', folder / 'b' / 'linked.png')
    (tmp_path / 'other').mkdir()
    os.link(folder / '0.png', tmp_path / 'other' / 'linked.png')
    found = find_images([str(folder), str(tmp_path / 'other')])
    assert (len(found.paths), found.repeated) == (24, 2)
    shutil.copy(folder / '0.png', folder / 'b' / 'copy.png')
    assert len(find_images([str(folder)]).paths) == 25


@pytest.mark.parametrize(
    ('make', 'message'),
    [
        (lambda path: None, 'does not exist'),
        (lambda path: path.write_text(''), 'is neither a folder nor a .tar file'),
        (lambda path: path.mkdir(), 'no images in'),
        (lambda path: (path.mkdir(), (path / 'x.csv').write_text('')), r'no images in .* \(1 file ignored: 1 .csv\)'),
    ],
    ids=['missing', 'file', 'empty', 'other files'],
)
def test_a_folder_without_images_is_named(folder, tmp_path, make, message):
    make(tmp_path / 'bad')
    with pytest.raises(UsageError, match=message) as e:
        find_images([str(folder), str(tmp_path / 'bad')])
    assert f"'{tmp_path / 'bad'}'" in str(e.value)


def test_files_that_are_added_or_renamed_change_nothing_for_the_others(tmp_path):
    paths = []
    for i in range(400):
        paths.append(str(tmp_path / f'{i}'))
        (tmp_path / f'{i}').write_bytes(b'%d' % i * 50)
    held_out = hold_out(hash_images(paths), 0.2)
    assert 50 < held_out.sum() < 110
    for some in (slice(300), slice(3, None)):
        assert (hold_out(hash_images(paths[some]), 0.2) == held_out[some]).all()
    os.rename(paths[0], tmp_path / 'renamed')
    assert hold_out(hash_images([str(tmp_path / 'renamed'), *paths[1:]]), 0.2).tolist() == held_out.tolist()


def test_images_are_added_to_32_over_the_fraction_without_moving_any(tmp_path):
    for salt in range(5):
        paths = [str(tmp_path / f'{i}') for i in range(2 * 160)]
        for i, path in enumerate(paths):
            Path(path).write_text(f'{salt} {i}')
        assert (hold_out(hash_images(paths[:160]), 0.2) == hold_out(hash_images(paths), 0.2)[:160]).all()


def test_of_few_images_some_are_held_out_but_never_more_than_half(folder):
    paths = find_images([str(folder)]).paths
    assert [int(hold_out(hash_images(paths[:n]), 0.01).sum()) for n in (2, 5, 24)] == [1, 2, 12]


def test_images_that_begin_alike_are_held_out_one_by_one(tmp_path):
    """As scans without compression do, below the same black border."""
    paths = [str(tmp_path / f'{i}.bmp') for i in range(200)]
    for i, path in enumerate(paths):
        pixels = np.zeros((200, 200, 3), np.uint8)
        pixels[50, 50] = i, 255 - i, 7
        Image.fromarray(pixels).save(path)
    assert 20 < hold_out(hash_images(paths), 0.2).sum() < 60


@pytest.mark.parametrize('place', [0, -1, 2**20, 2**21], ids=['first', 'last', 'a fifteenth', 'two fifteenths'])
def test_blocks_all_over_a_large_file_decide(place, tmp_path):
    content, hashes = bytearray(15 * 2**20 + 2**16), set()
    for byte in range(4):
        content[place] = byte
        (tmp_path / 'x').write_bytes(content)
        hashes.add(_hash_blocks(str(tmp_path / 'x')))
    (tmp_path / 'x').write_bytes(content + b'1')
    assert len({*hashes, _hash_blocks(str(tmp_path / 'x'))}) == 5


def test_a_byte_anywhere_in_a_file_of_a_megabyte_decides(tmp_path):
    content, hashes = bytearray(2**20), set()
    for place in (0, 70_000, 555_555, -1):
        content[place] ^= 1
        (tmp_path / 'x').write_bytes(content)
        hashes.add(_hash_blocks(str(tmp_path / 'x')))
    assert len(hashes) == 4


@pytest.mark.parametrize('fraction', [0.01, 0.2, 0.5])
@pytest.mark.parametrize('copies', [[2] * 30, [40, 1, 1], [1, 25, 20, 1, 1, 1], [9, 8, 7, 6], [3] * 200])
def test_copies_are_on_one_side_and_never_more_than_half_is_held_out(copies, fraction, tmp_path):
    for salt in range(3):
        contents = [f'{salt} {i}' for i, number in enumerate(copies) for _ in range(number)]
        paths = [str(tmp_path / f'{n}') for n in range(len(contents))]
        for path, content in zip(paths, contents, strict=True):
            Path(path).write_text(content)
        held_out = hold_out(hash_images(paths), fraction)
        assert 1 <= held_out.sum() <= len(paths) / 2
        assert not {c for c, held in zip(contents, held_out, strict=True) if held} & {
            c for c, held in zip(contents, held_out, strict=True) if not held
        }


def test_images_that_are_copies_of_one_alone_are_refused_with_the_reason(tmp_path):
    draw_noise(tmp_path / '0.png', 0)
    for i in range(1, 40):
        shutil.copy(tmp_path / '0.png', tmp_path / f'{i}.png')
    with pytest.raises(UsageError, match='none of the 40 images can be held out: more than half of them are copies'):
        create_unlabeled(RunConfig(unlabeled=[str(tmp_path)]), 'RGB')


def test_an_image_that_cannot_be_read_is_not_held_out(folder):
    paths = find_images([str(folder)]).paths
    gone = [f'{path}.gone' for path in paths[:4]]
    held_out = hold_out(hash_images([*gone, *paths]), 0.5)
    assert not held_out[:4].any()
    assert held_out.any()


def test_no_image_is_both_trained_on_and_held_out(folder):
    train, evaluation = create_unlabeled(RunConfig(unlabeled=[str(folder)]), 'RGB')
    held = {evaluation.filename(i) for i in range(len(evaluation))}
    trained = {train.filename(i) for i in range(len(train))}
    assert not held & trained
    assert len(held | trained) == 24
    image, target = train[0]
    assert (image.mode, target) == ('RGB', -1)
