"""Hugging Face data sets through timm's readers: local parquet files, no hub."""

import io
import re

import numpy as np
import pytest
from helpers import refused, run, summary
from PIL import Image

from timm_pe.config.run_config import parse_config
from timm_pe.data.datasets import class_map_of, create_datasets

datasets = pytest.importorskip('datasets', reason='pip install datasets')
pa = pytest.importorskip('pyarrow')
parquet = pytest.importorskip('pyarrow.parquet')

NAMES = ['zebra', 'apple', 'mouse']  # not in the order of the alphabet
MODELS = ['--model', 'test_resnet', '--teacher', 'test_vit', '--no-teacher-pretrained', '--no-teacher-eval']
COMMON = [
    *MODELS,
    *[
        '--img-size',
        '32',
        '-b',
        '4',
        '--epochs',
        '1',
        '--warmup-epochs',
        '0',
        '--device',
        'cpu',
        '-j',
        '0',
        '--experiment',
        'run',
    ],
]


def png(label: int, i: int) -> bytes:
    pixels = np.random.default_rng(10 * i + label).integers(0, 80, (32, 32, 3), dtype=np.uint8)
    pixels[:, :, label] += 150
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, 'png')
    return file.getvalue()


@pytest.fixture
def write(tmp_path):
    """Gives a function that writes a data set of 12 training and 6 validation images, and returns its flags."""

    def write_splits(kind='hfds', label=lambda split, c, i: c, image=lambda split, i, it: it, feature=None):
        features = datasets.Features(image=datasets.Image(), label=feature or datasets.ClassLabel(names=NAMES))
        (tmp_path / 'data').mkdir()
        for split, number in (('train', 12), ('validation', 6)):
            rows = [(i % 3, i) for i in range(number)]
            columns = {
                'image': [image(split, i, {'bytes': png(c, i), 'path': None}) for c, i in rows],
                'label': [label(split, c, i) for c, i in rows],
            }
            table = pa.Table.from_pydict(columns, schema=features.arrow_schema)
            parquet.write_table(table, tmp_path / 'data' / f'{split}-00000-of-00001.parquet')
        flags = [str(tmp_path / 'cache'), '--dataset', f'{kind}/{tmp_path}', '--output', str(tmp_path / 'runs')]
        stream = ['--train-num-samples', '12', '--val-num-samples', '6', '--num-classes', '3']
        return [*flags, *(stream if kind == 'hfids' else [])]

    return write_splits


def test_the_classes_are_those_of_the_label_column_in_its_order(write, tmp_path, capsys):
    flags = write()
    train, evaluation = create_datasets(parse_config(flags))
    assert class_map_of(train) == class_map_of(evaluation) == {'zebra': 0, 'apple': 1, 'mouse': 2}
    assert [train[i][1] for i in range(6)] == [0, 1, 2, 0, 1, 2]
    said = run([*flags, *COMMON], capsys)
    assert re.search(r'classes +3 \(of the data\)', said)
    assert '12 training, 6 validation images' in said
    assert len(summary(tmp_path / 'runs' / 'run')) == 1


def test_a_teacher_cache_knows_the_same_data_again_and_refuses_other(write, tmp_path, capsys):
    flags = [*write(), *COMMON, '--teacher-cache', str(tmp_path / 'rows')]
    run(flags)
    assert '12 of 12 rows there' in run([*flags, '--overwrite'], capsys)
    other = tmp_path / 'data' / 'train-00000-of-00001.parquet'
    table = parquet.read_table(other)
    parquet.write_table(table.take(list(range(11, -1, -1))), other)
    assert 'image names' in refused([*flags, '--overwrite'], capsys)


def missing(split, i, image):
    return None if (split, i) == ('train', 4) else image


@pytest.mark.parametrize(
    ('data', 'flags', 'error'),
    [
        (
            {'label': lambda split, c, i: -1 if split == 'validation' else c},
            '',
            "split 'validation' of .*label -1, which is",
        ),
        ({'label': lambda split, c, i: None if i == 4 else c}, '', "'train' of the data has no label in 1 of 12 rows"),
        ({'image': missing}, '', "split 'train' of the data has no image in 1 of 12 rows, column 'image'"),
        ({}, '--input-key img', "no image in 12 of 12 rows, column 'img': --input-key .*of image, label"),
        ({}, '--target-key name', "'train' of the data has no column 'name' but image, label: --target-key"),
        (
            {'label': lambda split, c, i: NAMES[c], 'feature': datasets.Value('string')},
            '',
            "split 'train' of .*target '[a-z]+', not one label: .*--class-map numbers names",
        ),
        ({'label': lambda split, c, i: c / 2, 'feature': datasets.Value('float32')}, '', 'target 0.5, not one label'),
        (
            {'feature': datasets.Value('int64')},
            '--num-classes 2',
            "'train' of the data: .*label 2, the student 2 classes",
        ),
    ],
)
def test_rows_that_cannot_be_trained_on_are_refused_at_the_start(data, flags, error, write, tmp_path, capsys):
    said = refused([*write(**data), *COMMON, *flags.split()], capsys)
    assert re.search(error, said)
    assert not (tmp_path / 'runs').exists()


@pytest.mark.parametrize('label', [-1, None])
def test_a_stream_refuses_a_label_that_is_no_class_in_one_line(label, write, capsys):
    flags = write('hfids', label=lambda split, c, i: label if split == 'validation' else c)
    create_datasets(parse_config([flag.replace('hfids/', 'hfds/') for flag in flags[:3]]))  # it knows its classes now
    said = refused([*flags, *COMMON], capsys)
    assert str(label) in said


def test_names_get_the_numbers_of_a_class_map(write, tmp_path):
    flags = write(label=lambda split, c, i: NAMES[c], feature=datasets.Value('string'))
    (tmp_path / 'map.txt').write_text('mouse\nzebra\napple\n')
    train, _ = create_datasets(parse_config([*flags, '--class-map', str(tmp_path / 'map.txt')]))
    assert [train[i][1] for i in range(6)] == [1, 2, 0, 1, 2, 0]
    run([*flags, *COMMON, '--class-map', str(tmp_path / 'map.txt')])
    assert len(summary(tmp_path / 'runs' / 'run')) == 1


@pytest.mark.parametrize('workers', ['0', '1'])
def test_a_class_map_that_lacks_a_name_is_one_line(workers, write, tmp_path, capsys):
    (tmp_path / 'map.txt').write_text('apple\nmouse\n')
    flags = [*write(), *COMMON, '-j', workers, '--num-classes', '2', '--class-map', str(tmp_path / 'map.txt')]
    assert "has no class 'zebra', which the data has" in refused(flags, capsys)


def test_a_student_of_labels_without_classes_is_told_its_number(write, capsys):
    flags = write(feature=datasets.Value('int64'))
    known = 'The data does not tell its classes: the student has 1000; --num-classes gives another number.'
    assert known in run([*flags, *COMMON], capsys)
    assert known not in run([*flags, *COMMON, '--overwrite', '--num-classes', '3'], capsys)


def test_a_stream_counts_each_validation_image_once(write, tmp_path, capsys):
    said = run([*write('hfids'), *COMMON], capsys)
    assert '6 validation images' in said
    correct = float(summary(tmp_path / 'runs' / 'run')[0]['eval_top1']) / 100 * 6
    assert correct == pytest.approx(round(correct), abs=1e-3)


def test_a_stream_with_fewer_shards_than_loader_processes_is_refused_in_one_line(write, capsys):
    said = refused([*write('hfids'), *COMMON, '-j', '2'], capsys)
    assert re.search(r'--workers: Streaming dataset .* reports 1 shard\(s\) .* the loader has 2 workers', said)
