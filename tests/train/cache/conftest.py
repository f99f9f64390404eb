"""A run with a teacher cache, and a filled cache."""

import shutil

import pytest
from cache_runs import PAIR

from timm_pe import precompute
from timm_pe.method.teacher import Teacher


@pytest.fixture
def argv(small_run, tmp_path) -> list[str]:
    """A run with a cache of two views, in `tmp_path / 'cache'`."""
    return [*small_run, *PAIR, '--teacher-cache', str(tmp_path / 'cache'), '--teacher-cache-views', '2']


@pytest.fixture
def forwards(monkeypatch) -> list[int]:
    """Batch size of each forward of the teacher."""
    sizes, forward = [], Teacher.forward

    def counting(self, x):
        sizes.append(len(x))
        return forward(self, x)

    monkeypatch.setattr(Teacher, 'forward', counting)
    return sizes


@pytest.fixture
def images(image_folder, argv, tmp_path):
    """A copy of the images, which `argv` reads from here on."""
    folder = tmp_path / 'images'
    shutil.copytree(image_folder, folder)
    argv[0] = str(folder)
    return folder


@pytest.fixture(scope='session')
def filled_cache(image_folder, tmp_path_factory):
    """The cache of the `argv` of these tests."""
    root = tmp_path_factory.mktemp('filled')
    argv = [str(image_folder), '--num-classes', '3', '--img-size', '32', '-b', '8', '-j', '0', '--device', 'cpu']
    argv += [*PAIR, '--scale', '0.5', '1.0', '--teacher-cache', str(root / 'cache'), '--teacher-cache-views', '2']
    precompute.main(argv)
    return root / 'cache'
