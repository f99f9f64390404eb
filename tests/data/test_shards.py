"""Images without labels in tar files are those of the same files in folders."""

import copy
import io
import os
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from timm_pe.config.run_config import RunConfig
from timm_pe.data.fingerprint import hash_files, list_files, stat_files
from timm_pe.data.same_files import find_same
from timm_pe.data.shards import PathInShard, open_image
from timm_pe.data.unlabeled import create_unlabeled, describe_unlabeled, find_images, hash_images, hold_out
from timm_pe.errors import UsageError


def png(seed: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (8, 8, 3)).astype(np.uint8)).save(file, 'png')
    return file.getvalue()


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


@pytest.fixture
def images() -> dict[str, bytes]:
    return {f'shard-{i % 3}.tar/{i:02d}.png': png(i) for i in range(40)}


@pytest.fixture
def shards(tmp_path, images):
    """Three shards of WebDataset's kind, with a label beside each image."""
    (tmp_path / 'shards' / 'deep').mkdir(parents=True)
    for shard in range(3):
        with tarfile.open(tmp_path / 'shards' / 'deep' / f'shard-{shard}.tar', 'w') as tar:
            for name, content in images.items():
                if name.startswith(f'shard-{shard}'):
                    add(tar, './' + name.partition('/')[2], content)
                    add(tar, name.partition('/')[2].replace('png', 'cls'), b'1')
    return tmp_path / 'shards'


@pytest.fixture
def unpacked(tmp_path, images):
    for name, content in images.items():
        path = tmp_path / 'unpacked' / 'deep' / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return tmp_path / 'unpacked'


def test_shards_are_the_folders_that_they_would_unpack_to(shards, unpacked):
    packed, files = find_images([str(shards)]), find_images([str(unpacked)])
    assert [os.path.relpath(p, shards) for p in packed.paths] == [os.path.relpath(p, unpacked) for p in files.paths]
    assert packed.ignored == {'.cls': 40}
    assert hash_files(packed.paths).tolist() == hash_files(files.paths).tolist()
    assert hold_out(hash_images(packed.paths), 0.3).tolist() == hold_out(hash_images(files.paths), 0.3).tolist()
    assert stat_files(packed.paths)[:, 0].tolist() == stat_files(files.paths)[:, 0].tolist()
    assert [open_image(a).read() == Path(b).read_bytes() for a, b in zip(packed.paths, files.paths, strict=True)]


def test_a_data_set_of_shards_gives_the_images_of_the_folder(shards, unpacked):
    from_shards, from_folder = (
        create_unlabeled(RunConfig(unlabeled=[str(folder)], teacher='t', model='m', val_fraction=0.3), 'RGB')
        for folder in (shards, unpacked)
    )
    for of_shards, of_folder in zip(from_shards, from_folder, strict=True):
        assert len(of_shards) == len(of_folder) > 10
        for i in range(len(of_folder)):
            assert of_shards[i][1] == -1
            assert of_shards[i][0].tobytes() == of_folder[i][0].tobytes()
    files = list_files(from_shards[0])
    assert files is not None and all(isinstance(path, PathInShard) for path in files)


def test_tar_files_may_be_given_one_by_one_and_beside_folders(shards, unpacked):
    tars = sorted(str(path) for path in (shards / 'deep').iterdir())
    assert find_images(tars).paths == find_images([str(shards)]).paths
    assert len(find_images([tars[0]]).paths) == 14
    assert find_images([tars[0]]).root == str(shards / 'deep')
    both = find_images([tars[0], str(unpacked)])
    assert (len(both.paths), both.repeated) == (54, 0)
    again = find_images([*tars, str(shards)])
    assert (len(again.paths), again.repeated) == (40, 40)
    os.link(tars[0], shards / 'linked.tar')
    assert find_images([str(shards)]).repeated == 14


def test_copies_are_found_between_files_and_shards(shards, unpacked):
    packed, files = find_images([str(shards)]).paths, find_images([str(unpacked)]).paths
    assert find_same(packed, files).tolist() == list(range(40))
    assert find_same(files[3:], packed).tolist() == list(range(3, 40))


def test_a_path_in_a_shard_survives_pickle_and_copy(shards):
    path = find_images([str(shards)]).paths[5]
    for again in (pickle.loads(pickle.dumps(path)), copy.copy(path), copy.deepcopy(path)):
        assert (again, again.shard, again.offset, again.size) == (path, path.shard, path.offset, path.size)


def test_links_hidden_and_replaced_members_are_as_when_the_shard_is_unpacked(tmp_path):
    with tarfile.open(tmp_path / 'a.tar', 'w') as tar:
        add(tar, 'x.png', png(0))
        add(tar, 'a/.hidden.png', png(1))
        add(tar, '__MACOSX/y.png', png(2))
        add(tar, 'x.png', png(3))
        add(tar, 'no ending', png(4))
        add(tar, '../up.png', png(5))
        add(tar, '/root.png', png(6))
        add(tar, 'replaced.png', png(7))
        for name, target, kind in (('link.png', '/etc/passwd', tarfile.SYMTYPE), ('hard.png', 'no ending', tarfile.LNKTYPE), ('replaced.png', 'x.png', tarfile.SYMTYPE)):  # fmt: skip
            link = tarfile.TarInfo(name)
            link.type, link.linkname = kind, target
            tar.addfile(link)
    found = find_images([str(tmp_path)])
    images = {os.path.relpath(path, tmp_path): open_image(path).read() for path in found.paths}
    assert images == {'a.tar/hard.png': png(4), 'a.tar/root.png': png(6), 'a.tar/x.png': png(3), 'up.png': png(5)}
    assert found.ignored == {'hidden': 2, 'link': 2, 'without ending': 1}


def test_a_tar_file_that_is_none_is_left_out_of_a_folder_and_counted(tmp_path):
    (tmp_path / 'a.png').write_bytes(png(0))
    torch.save({'a': 1}, tmp_path / 'checkpoint-0.pth.tar')
    with tarfile.open(tmp_path / 'backup.tar', 'w:gz') as tar:
        add(tar, 'a.png', png(0))
    found = find_images([str(tmp_path)])
    assert len(found.paths) == 1
    assert found.ignored == {'.tar that is none or is compressed': 2}


def test_images_beside_the_shard_that_holds_them_are_told_to_be_copies(shards, tmp_path, images):
    for name, content in images.items():
        (shards / name.replace('/', '-')).write_bytes(content)
    flags = RunConfig(unlabeled=[str(shards)], teacher='t', model='m')
    rows = describe_unlabeled(*create_unlabeled(flags, 'RGB'), 0.05)
    assert ('copies', '40 of the images have the content of another one, and are used as well') in rows


@pytest.mark.parametrize('damage', ['checksum', 'hole', 'cut in a header', 'two in one', 'unfinished'])
def test_a_shard_that_does_not_end_as_one_is_refused(tmp_path, damage):
    shard = tmp_path / 'x.tar'
    with tarfile.open(shard, 'w') as tar:
        for i in range(10):
            add(tar, f'{i}.png', png(i))
    with tarfile.open(shard) as tar:
        place = tar.getmembers()[4].offset
    content = bytearray(shard.read_bytes())
    if damage == 'checksum':
        content[place + 150] ^= 1
    elif damage == 'hole':
        content[place : place + 512] = bytes(512)
    elif damage == 'cut in a header':
        content = content[: place + 100]
    elif damage == 'two in one':
        content = content * 2
    else:
        content[place:] = bytes(5_000_000)
    shard.write_bytes(content)
    with pytest.raises(UsageError, match=r"cannot read '.*x.tar' .*damaged at byte \d+ of \d+"):
        find_images([str(tmp_path)])


@pytest.mark.parametrize('kind', ['compressed', 'truncated', 'no tar', 'empty'])
def test_a_tar_file_that_cannot_be_read_is_named(tmp_path, kind):
    shard = tmp_path / 'x.tar'
    with tarfile.open(shard, 'w:gz' if kind == 'compressed' else 'w') as tar:
        add(tar, 'a.png', png(0) * 50)
        add(tar, 'b.png', png(1) * 50)
    if kind == 'truncated':
        shard.write_bytes(shard.read_bytes()[:-15000])
    elif kind == 'no tar':
        shard.write_text('no tar' * 500)
    elif kind == 'empty':
        shard.write_bytes(b'')
    with pytest.raises(UsageError, match=r"cannot read '.*x.tar' as a tar file without compression"):
        find_images([str(shard)])  # by name: it is meant


def test_a_shard_of_no_images_is_named(tmp_path):
    with tarfile.open(tmp_path / 'x.tar', 'w') as tar:
        add(tar, 'a.txt', b'')
    with pytest.raises(UsageError, match=r"no images in '.*x.tar' \(1 file ignored: 1 .txt\)"):
        find_images([str(tmp_path / 'x.tar')])


def test_a_tar_file_that_cannot_be_opened_is_one_line(tmp_path):
    (tmp_path / 'a.png').write_bytes(png(0))
    (tmp_path / 'x.tar').symlink_to(tmp_path / 'gone.tar')
    with pytest.raises(UsageError, match=r"cannot read '.*x.tar' .*No such file"):
        find_images([str(tmp_path)])
