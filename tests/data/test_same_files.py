"""Which files are the same image: links and copies, and what is read to tell."""

import os
from pathlib import Path

import pytest

from timm_pe.data import same_files
from timm_pe.data.same_files import find_same, identify_files


@pytest.fixture
def files(tmp_path):
    """Nine files of three sizes, and paths to them by name."""
    for size in (100, 200, 300):
        for i in range(3):
            (tmp_path / f'{size}-{i}').write_bytes(bytes([i]) * size)
    return lambda *names: [str(tmp_path / name) for name in names]


def test_links_have_the_identity_of_their_file_and_copies_their_own(files):
    link, hard, copy, file = files('link', 'hard', 'copy', '100-0')
    os.symlink(file, link)
    os.link(file, hard)
    Path(copy).write_bytes(Path(file).read_bytes())
    a, b, c, d, gone = identify_files([link, hard, file, copy, f'{file}.gone'])
    assert a == b == c
    assert len({c, d, gone}) == 3


def test_the_first_file_of_the_same_content_is_found(files):
    paths, others = (
        files('a', '200-1', 'gone', 'empty', '300-0'),
        files('300-1', 'empty', '100-2', 'b', '200-1', 'gone'),
    )
    Path(paths[0]).write_bytes(bytes([2]) * 100)
    Path(paths[3]).write_bytes(b'')
    os.link(others[2], others[3])
    assert find_same(paths, others).tolist() == [2, 4, 5, 1, -1]
    assert find_same(paths, []).tolist() == [-1] * 5
    assert find_same([], others).tolist() == []


def test_only_files_are_read_whose_size_occurs_on_both_sides(files, monkeypatch):
    read = []
    hash_files = same_files.hash_files
    monkeypatch.setattr(same_files, 'hash_files', lambda paths: (read.extend(paths), hash_files(paths))[1])
    assert find_same(files('100-0', '200-0', '300-0'), files('200-1', '300-0')).tolist() == [-1, -1, 1]
    assert sorted(read) == files('200-0', '200-1')
