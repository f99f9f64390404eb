"""Image folders as users have them: which files are read, which folder is the class, what is said of the rest."""

import os
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import timm
import yaml
from helpers import refused, run
from PIL import Image
from timm.data.readers.reader_image_folder import ReaderImageFolder

from timm_pe import UsageError
from timm_pe.config.run_config import parse_config
from timm_pe.data.datasets import class_map_of, class_sizes, create_datasets, describe_data, warn_of_empty_classes
from timm_pe.data.folders import FolderReader, describe_ignored, find_split, image_endings, natural_key
from timm_pe.data.unlabeled import find_images


def draw(path: Path, seed: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (20, 20, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(path)


def tree(root: Path, *files: str) -> Path:
    for i, name in enumerate(files):
        draw(root / name, i)
    return root


@pytest.fixture
def command(tmp_path) -> list[str]:
    return [
        *(str(tmp_path / 'data'), '--img-size', '32', '-b', '2', '-j', '0', '--device', 'cpu', '--epochs', '1'),
        *('--output', str(tmp_path / 'output'), '--experiment', 'run', '--model', 'test_resnet'),
    ]


SMALL = [f'{split}/{name}/{i}.png' for split in ('train', 'val') for name in ('ant', 'bee') for i in range(2)]

# Files -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('ending', ['.bmp', '.webp', '.gif', '.tif', '.tiff', '.jpg', '.JPEG', '.png', '.ppm', '.tga'])
def test_an_image_of_any_ending_that_pil_shows_is_read(tmp_path, ending):
    name = f'ant/1{ending}'
    tree(tmp_path, name, 'bee/0.png')
    reader = FolderReader(str(tmp_path))
    assert [os.path.relpath(path, tmp_path) for path, _ in reader.samples] == [name, 'bee/0.png']
    with reader[0][0] as file:
        assert Image.open(file).convert('RGB').size == (20, 20)
    assert not reader.ignored


def test_no_ending_is_taken_for_an_image_that_pil_knows_by_name_alone():
    assert {'.png', '.jpg', '.jpeg', '.bmp', '.webp', '.gif', '.tif'} <= image_endings()
    assert not {'.h5', '.mpg', '.eps', '.pdf', '.grib', '.wmf'} & image_endings()


def test_files_that_are_left_out_are_counted_by_their_ending(tmp_path):
    tree(tmp_path, 'ant/0.png', 'bee/0.png', '.hidden/x.png', 'ant/.ipynb_checkpoints/0.png', '__MACOSX/ant/0.png')
    for name in ('ant/notes.txt', 'ant/b.TXT', 'bee/c.heic', 'ant/README', '.DS_Store'):
        (tmp_path / name).write_text('')
    reader = FolderReader(str(tmp_path))
    assert len(reader) == 2
    assert reader.ignored == {'.txt': 2, '.heic': 1, 'without ending': 1, 'hidden': 4}
    assert describe_ignored(reader.ignored) == '8 files ignored: 4 hidden, 2 .txt, 1 .heic, 1 without ending'


def test_images_of_a_class_that_the_class_map_does_not_name_are_counted(tmp_path):
    tree(tmp_path, 'ant/0.png', 'bee/0.png', 'cat/0.png', 'cat/1.png')
    (tmp_path / 'map.txt').write_text('bee\nant\n')
    reader = FolderReader(str(tmp_path), class_map=str(tmp_path / 'map.txt'))
    assert [label for _, label in reader.samples] == [1, 0]
    assert reader.ignored == {'of no class': 2, '.txt': 1}


def test_a_class_map_without_a_class_of_the_folder_is_refused(tmp_path):
    tree(tmp_path, 'ant/0.png')
    (tmp_path / 'map.txt').write_text('dog\n')
    with pytest.raises(UsageError, match=r'no image in .* is of a class that .*map\.txt. names'):
        FolderReader(str(tmp_path), class_map=str(tmp_path / 'map.txt'))


def test_images_and_labels_are_those_of_timm_in_its_order(tmp_path):
    names = [f'{c}/{i}.png' for c in ('class 10', 'class 9', 'Zebra', 'ant') for i in (1, 2, 10, 'a')]
    tree(tmp_path, *names, 'deep/er/bee/x.png')
    own, timms = FolderReader(str(tmp_path)), ReaderImageFolder(str(tmp_path))
    assert own.class_to_idx == timms.class_to_idx
    assert own.samples == timms.samples
    assert [own.filename(i) for i in range(len(own))] == [timms.filename(i) for i in range(len(own))]


def test_names_that_timm_cannot_sort_have_one_order(tmp_path, monkeypatch):
    tree(tmp_path, *(f'ant/{name}.png' for name in ('1', '01', '001', 'a', 'A')))
    first = FolderReader(str(tmp_path)).samples
    walk = os.walk

    def turned(*args, **kwargs):
        return ((path, folders, files[::-1]) for path, folders, files in walk(*args, **kwargs))

    monkeypatch.setattr(os, 'walk', turned)
    assert FolderReader(str(tmp_path)).samples == first


def test_a_link_to_a_folder_above_is_not_followed_and_any_other_is(tmp_path):
    tree(tmp_path, 'data/ant/0.png', 'else/1.png')
    (tmp_path / 'data/ant/loop').symlink_to(tmp_path / 'data')
    (tmp_path / 'data/bee').symlink_to(tmp_path / 'else')
    reader = FolderReader(str(tmp_path / 'data'))
    assert (len(reader), list(reader.class_to_idx)) == (2, ['ant', 'bee'])


# Classes -----------------------------------------------------------------------------------------------------------------


def test_class_folders_that_would_be_one_are_refused_with_both_ways_out(tmp_path):
    tree(tmp_path, 'fox/batch1/0.png', 'wolf/batch1/1.png')
    with pytest.raises(UsageError, match="'fox/batch1' and 'wolf/batch1' in .* would be one class") as e:
        FolderReader(str(tmp_path))
    assert "--class-depth 1 makes 'fox' and 'wolf' the classes, --class-depth 2 makes it one 'batch1'" in str(e.value)
    assert FolderReader(str(tmp_path), class_depth=1).class_to_idx == {'fox': 0, 'wolf': 1}
    assert FolderReader(str(tmp_path), class_depth=2).class_to_idx == {'batch1': 0}


def test_a_class_folder_that_would_be_split_is_refused_with_the_way_out(tmp_path):
    tree(tmp_path, 'fox/0.png', 'fox/batch1/0.png', 'wolf/1.png')
    with pytest.raises(UsageError, match=r"'fox' and 'fox/batch1' in .* --class-depth 1 makes it 'fox'"):
        FolderReader(str(tmp_path))
    reader = FolderReader(str(tmp_path), class_depth=1)
    assert reader.class_to_idx == {'fox': 0, 'wolf': 1}
    assert [label for _, label in reader.samples] == [0, 0, 1]


def test_innermost_folders_are_classes_where_that_merges_and_splits_none(tmp_path):
    tree(tmp_path, 'dogs/husky/0.png', 'dogs/poodle/0.png', 'cats/siam/0.png')
    reader = FolderReader(str(tmp_path))
    assert list(reader.class_to_idx) == ['husky', 'poodle', 'siam']
    assert reader.is_deep
    assert not FolderReader(str(tmp_path), class_depth=1).is_deep


def test_images_above_the_level_of_classes_are_refused(tmp_path):
    tree(tmp_path, 'fox/0.png', 'wolf/a/0.png')
    with pytest.raises(UsageError, match="--class-depth 2: 'fox' in .* holds images above that level"):
        FolderReader(str(tmp_path), class_depth=2)


def test_an_image_in_no_class_folder_is_refused_by_its_name(tmp_path):
    tree(tmp_path, 'fox/0.png', 'stray.png')
    for depth in (None, 1):
        with pytest.raises(UsageError, match=r"'stray\.png' in .* lies in no class folder"):
            FolderReader(str(tmp_path), class_depth=depth)


def test_class_folders_without_an_image_are_known(tmp_path):
    tree(tmp_path, 'fox/0.png', 'wolf/0.png')
    (tmp_path / 'dog').mkdir()
    (tmp_path / 'dog/a.heic').write_text('')
    (tmp_path / 'fox/notes').mkdir()
    assert FolderReader(str(tmp_path)).empty == ['dog']


# Splits ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ('folders', 'split', 'found'),
    [
        (['train'], 'train', 'train'),
        (['Train'], 'train', 'Train'),
        (['TRAINING'], 'train', 'TRAINING'),
        (['training', 'Train'], 'train', 'training'),
        (['Val'], 'validation', 'Val'),
        (['val', 'Val', 'validation'], 'validation', 'validation'),
        (['test'], 'validation', None),
        (['Test'], 'test', 'Test'),
    ],
)
def test_a_split_is_found_by_its_name_by_timms_others_and_in_other_letter_case(tmp_path, folders, split, found):
    for name in folders:
        (tmp_path / name).mkdir()
    assert find_split(str(tmp_path), split) == (found and str(tmp_path / found))


def test_splits_that_differ_in_letter_case_alone_are_refused(tmp_path):
    for name in ('Val', 'VAL'):
        (tmp_path / name).mkdir()
    with pytest.raises(UsageError, match="has VAL and Val for split 'validation': name the one to take"):
        find_split(str(tmp_path), 'validation')


def test_a_test_split_beside_the_training_split_is_named(tmp_path, command, capsys):
    tree(tmp_path / 'data', *(name.replace('val/', 'test/') for name in SMALL))
    said = refused(command, capsys)
    assert "no folder for split 'validation'" in said
    assert 'it has test, train; --val-split test takes that one' in said
    assert not (tmp_path / 'output').exists()
    run([*command, '--val-split', 'test'])


@pytest.mark.parametrize('kind', [(), ('--dataset', 'torch/image_folder')])
def test_an_evaluation_without_its_split_is_refused_and_does_not_take_training_images(tmp_path, command, capsys, kind):
    tree(tmp_path / 'data', *SMALL)
    run([*command, *kind])
    shutil.rmtree(tmp_path / 'data' / 'val')
    said = refused([*command, *kind, '--evaluate', str(tmp_path / 'output' / 'run')], capsys)
    assert "no folder for split 'validation'" in said


def test_an_evaluation_takes_a_folder_of_class_folders(tmp_path, command, capsys):
    tree(tmp_path / 'data', *SMALL)
    run(command)
    command[0] = str(tmp_path / 'data' / 'val')
    assert 'on 4 images' in run([*command, '--evaluate', str(tmp_path / 'output' / 'run')], capsys)


def test_a_class_without_an_image_in_one_split_is_named_as_such(tmp_path, command, capsys):
    tree(tmp_path / 'data', *SMALL, 'train/dog/0.png')
    (tmp_path / 'data/val/dog').mkdir()
    (tmp_path / 'data/val/dog/a.heic').write_text('')
    said = refused(command, capsys)
    assert 'dog in one of them only (3 and 2 classes); no image in class folder dog of' in said
    assert '(1 file ignored: 1 .heic)' in said


# The number of classes, and what is said ---------------------------------------------------------------------------------


def test_without_num_classes_the_student_has_those_of_the_data_and_args_yaml_stays_as_given(tmp_path, command, capsys):
    tree(tmp_path / 'data', *SMALL)
    said = run(command, capsys)
    assert 'classes         2 (of the data)' in said
    assert yaml.safe_load((tmp_path / 'output/run/args.yaml').read_text())['num_classes'] is None
    evaluated = run(['--evaluate', str(tmp_path / 'output/run'), '--device', 'cpu', '-b', '2'], capsys)
    assert 'on 4 images' in evaluated
    # and it goes on
    said = run([*command, '--epochs', '2', '--resume', 'auto'], capsys)
    assert 'classes         2 (of the data)' in said


def test_num_classes_that_do_not_fit_name_the_class_without_images_in_place_of_a_number(tmp_path, command, capsys):
    tree(tmp_path / 'data', *SMALL)
    said = refused([*command, '--num-classes', '3'], capsys)
    assert 'the data set has 2 classes and the student 3: --num-classes 2 fits, or none' in said
    for split in ('train', 'val'):
        (tmp_path / 'data' / split / 'cat').mkdir()
    said = refused([*command, '--num-classes', '3'], capsys)
    assert '2 classes and the student 3; no image in class folder cat of' in said
    assert '--num-classes' not in said


def test_an_evaluation_of_a_file_has_the_classes_of_its_weights(tmp_path, command, capsys):
    tree(tmp_path / 'data', *SMALL)
    run([*command, '--num-classes', '2'])
    weights = tmp_path / 'weights.safetensors'
    shutil.copy(tmp_path / 'output/run/student.safetensors', weights)
    assert 'on 4 images' in run([*command, '--evaluate', str(weights)], capsys)


def test_digits_have_ten_classes_without_being_told(tmp_path, capsys):
    said = run(
        [
            *('--dataset', 'sklearn/digits', '--model', 'test_resnet', '--img-size', '16', '-b', '64', '-j', '0'),
            *('--device', 'cpu', '--epochs', '1', '--output', str(tmp_path), '--in-chans', '1'),
        ],
        capsys,
    )
    assert 'classes         10 (of the data)' in said


def test_the_start_table_says_sizes_small_classes_empty_folders_and_what_is_left_out(tmp_path, caplog):
    names = [f'train/{name}/{i}.png' for name, n in (('ant', 3), ('bee', 7)) for i in range(n)]
    tree(tmp_path, *names, 'val/ant/0.png', 'val/bee/0.png')
    (tmp_path / 'train/dog').mkdir()
    (tmp_path / 'train/notes.txt').write_text('')
    datasets = create_datasets(parse_config([str(tmp_path)]))
    assert class_sizes(datasets[0]) == {'ant': 3, 'bee': 7}
    warn_of_empty_classes(datasets[0])
    assert "No image in class folder dog of '" in caplog.text
    assert dict(describe_data(*datasets)) == {
        'data': '10 training, 2 validation images of 2 classes',
        'class sizes': '3 (ant) to 7 (bee), training images',
        'fewer than 5': 'ant (3)',
        'no image in': 'dog (training)',
        'left out': '1 file ignored: 1 .txt (training)',
    }


def test_the_start_table_says_which_number_of_epochs_is_a_default(tmp_path, command, capsys):
    tree(tmp_path / 'data', *SMALL)
    at = command.index('--epochs')
    said = run([*command[:at], *command[at + 2 :], '--stop-epoch', '1'], capsys)
    assert "300 is timm's default, --epochs sets it" in said
    assert "timm's default" not in run([*command, '--experiment', 'other'], capsys)


def test_class_depth_of_a_run_holds_for_its_evaluation_too(tmp_path, command, capsys):
    names = [f'{split}/{c}/batch{b}/{b}.png' for split in ('train', 'val') for c in ('fox', 'wolf') for b in (1, 2)]
    tree(tmp_path / 'data', *names)
    assert 'would be one class' in refused(command, capsys)
    run([*command, '--class-depth', '1'])
    args = parse_config([*command, '--class-depth', '1'])
    assert class_map_of(create_datasets(args)[1]) == {'fox': 0, 'wolf': 1}
    assert 'class_depth 1' in run(['--evaluate', str(tmp_path / 'output/run'), '--device', 'cpu', '-b', '2'], capsys)


# What an independent search for wrong results found ----------------------------------------------------------------------


def test_class_folders_that_timm_cannot_sort_are_refused_under_the_name_folder_too(tmp_path):
    tree(tmp_path, 'train/Cat/0.png', 'train/cat/0.png', 'val/Cat/0.png', 'val/cat/0.png')
    with pytest.raises(UsageError, match="'Cat' and 'cat' are equal to timm"):
        create_datasets(parse_config(['--dataset', 'folder/x', '--data-dir', str(tmp_path)]))


def test_a_tar_that_both_splits_are_read_from_is_warned_about(tmp_path, caplog):
    tree(tmp_path / 'data', 'ant/0.png', 'bee/0.png')
    with tarfile.open(tmp_path / 'data.tar', 'w') as file:
        file.add(tmp_path / 'data', 'data')
    create_datasets(parse_config([str(tmp_path / 'data.tar')]))
    assert 'use the SAME images' in caplog.text


def test_a_part_of_a_split_is_refused_where_it_would_be_the_whole(tmp_path, command, capsys):
    tree(tmp_path / 'data', *SMALL)
    assert 'take a part of a split' in refused([*command, '--train-split', 'train[:1]'], capsys)


def test_a_class_map_leaves_the_checks_of_depth_and_merging_on(tmp_path):
    tree(tmp_path / 'a', 'fox/batch1/0.png', 'wolf/batch1/0.png')
    tree(tmp_path / 'b', 'dog/0.png', 'pets/cat/0.png')
    (tmp_path / 'map.txt').write_text('batch1\n')
    (tmp_path / 'pets.txt').write_text('dog\ncat\n')
    with pytest.raises(UsageError, match='would be one class'):
        FolderReader(str(tmp_path / 'a'), class_map=str(tmp_path / 'map.txt'))
    with pytest.raises(UsageError, match="--class-depth 2: 'dog' in .* holds images above that level"):
        FolderReader(str(tmp_path / 'b'), class_map=str(tmp_path / 'pets.txt'), class_depth=2)
    assert len(FolderReader(str(tmp_path / 'b'), class_map=str(tmp_path / 'pets.txt'))) == 2


def test_classes_in_model_kwargs_are_given_ones(tmp_path, command, capsys):
    tree(tmp_path / 'data', *SMALL)
    said = refused([*command, '--model-kwargs', 'num_classes=7'], capsys)
    assert 'the data set has 2 classes and the student 7' in said


# Order -------------------------------------------------------------------------------------------------------------------


def test_names_are_sorted_as_timm_sorts_them():
    letters, rng = 'aB-_. \u00e9\u06f3019', np.random.default_rng(0)
    names = [''.join(rng.choice(list(letters), rng.integers(1, 9))) for _ in range(500)]
    assert sorted(names, key=natural_key) == sorted(names, key=timm.utils.natural_key)


@pytest.mark.parametrize('name', ['\u00b21', '\u2460', '7\u2075'])
def test_digits_that_are_no_numbers_may_be_in_names(name, tmp_path):
    tree(tmp_path / 'data', *SMALL, f'train/{name}/{name}.png', f'val/{name}/{name}.png')
    train, _ = create_datasets(parse_config([str(tmp_path / 'data')]))
    assert set(class_map_of(train)) == {'ant', 'bee', name}
    assert f'{name}/{name}.png' in train.filenames()
    found = find_images([str(tmp_path / 'data' / 'train')])
    assert {os.path.relpath(path, found.root) for path in found.paths} == set(train.filenames())
