"""The kNN top-1 of student and teacher on labelled images, beside a run's own validation."""

import importlib.util
import os
import re
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import make_trainer, refused, run, summary, tensorboard_curves
from PIL import Image

import timm_pe.train.knn as module
from timm_pe.analysis import analyze
from timm_pe.data.unlabeled import find_images, hash_images, hold_out
from timm_pe.runs.reopen import Options
from timm_pe.train.probes import TEMPERATURE, predict


@pytest.fixture
def argv(image_folder, tmp_path):
    """A run without labels, on images in folders that mean nothing."""
    rng = np.random.default_rng(1)
    (tmp_path / 'images').mkdir()
    for i in range(30):
        pixels = rng.integers(0, 120, (36, 36, 3))
        pixels[..., i % 3] += 100
        Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / 'images' / f'{i}.png')
    return [
        *('--unlabeled', str(tmp_path / 'images'), '--img-size', '32', '-b', '8', '-j', '0', '--device', 'cpu'),
        *('--model', 'test_resnet', '--teacher', 'test_vit', '--no-teacher-pretrained', '--epochs', '2'),
        *('--warmup-epochs', '0', '--lr', '0.02', '--output', str(tmp_path), '--experiment', 'run'),
        *('--knn-data', str(image_folder)),
    ]


def test_the_votes_are_those_of_scikit_learn():
    neighbors = pytest.importorskip('sklearn.neighbors')
    generator = torch.Generator().manual_seed(0)
    bank, query = (F.normalize(torch.randn(n, 6, generator=generator), dim=1) for n in (50, 30))
    labels = torch.randint(0, 4, (50,), generator=generator)
    reference = neighbors.KNeighborsClassifier(
        20, metric='cosine', algorithm='brute', weights=lambda distances: np.exp((1 - distances) / TEMPERATURE)
    )
    expected = reference.fit(bank.numpy(), labels.numpy()).predict(query.numpy())
    assert predict(query, bank, labels, 4, 20).tolist() == expected.tolist()


def test_it_is_measured_after_each_validation_and_names_the_best_epoch(argv, tmp_path, capsys):
    said = run([*argv, '--eval-metric', 'knn', '--log-tb'], capsys)
    assert re.search(
        r"Teacher: 20-nearest-neighbour top-1 on '.*' \(36 and 12 images\) \d+\.\d+ %; linear probe \d+\.\d+ %\.", said
    )
    assert re.search(r'Epoch 1/2 .* kNN \d+\.\d+ % \(best\)', said)
    rows = summary(tmp_path / 'run')
    values = [float(row['eval_knn']) for row in rows]
    assert all(value == pytest.approx(100 * round(value * 12 / 100) / 12) for value in values)
    assert f'Best kNN {max(values):.3f} in epoch' in said
    assert [value for _, value in tensorboard_curves(tmp_path / 'run')[0]['eval_knn']] == pytest.approx(values)


def test_a_linear_probe_is_fitted_after_the_last_epoch(argv, image_folder, tmp_path, capsys):
    said = run([*argv, '--log-tb'], capsys)
    first, last = summary(tmp_path / 'run')
    assert first['eval_linear'] == ''
    assert f'linear probe {float(last["eval_linear"]):.3f} %' in said
    assert len(tensorboard_curves(tmp_path / 'run')[0]['eval_linear']) == 1
    # the same by the analysis, of the same epoch
    result = analyze(tmp_path / 'run', Options(data_dir=str(image_folder)))
    assert float(last['eval_linear']) == pytest.approx(result['discriminability']['linear_probe_top1'])
    assert f'linear probe {result["teacher_probe"]["linear_probe_top1"]:.3f} %.' in said


def test_a_run_that_is_stopped_before_its_last_epoch_fits_none_until_it_is_resumed(argv, tmp_path):
    run([*argv, '--stop-epoch', '1'])
    run([*argv, '--resume', 'auto'])
    run([*argv, '--experiment', 'whole'])
    parts, whole = ([row['eval_linear'] for row in summary(tmp_path / name)] for name in ('run', 'whole'))
    assert parts == whole
    assert parts[0] == ''


def test_without_scikit_learn_there_is_no_linear_probe_and_the_run_says_so(argv, tmp_path, monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, 'find_spec', lambda name, *more: None if name == 'sklearn' else find(name, *more)
    )
    assert 'No linear probe on --knn-data: it needs scikit-learn' in run(argv, capsys)
    assert 'eval_linear' not in summary(tmp_path / 'run')[0]


def test_features_that_are_not_finite_have_no_linear_probe(argv, monkeypatch, capsys):
    knn = make_trainer(argv, monkeypatch).validation.knn
    assert set(knn(lambda input: input.mean((2, 3)), 'Test', linear=True)) == {'knn', 'linear'}
    assert set(knn(lambda input: input.mean((2, 3)) / 0, 'Test', linear=True)) == {'knn'}
    assert 'No linear probe: there are features that are not finite' in capsys.readouterr().err


def test_a_linear_probe_is_fitted_on_no_more_than_some_images(argv, monkeypatch):
    sizes, fit = [], module.probe
    monkeypatch.setattr(module, '_PROBED', 20)
    monkeypatch.setattr(module, 'probe', lambda train, queries: (sizes.append(len(train[1])), fit(train, queries))[1])
    make_trainer(argv, monkeypatch).validation.knn(lambda input: input.mean((2, 3)), 'Test', linear=True)
    assert sizes == [20, 20]  # of the teacher at the start, and here


def test_it_goes_beside_labels_too(image_folder, small_run, tmp_path):
    pair = ['--model', 'test_resnet', '--teacher', 'test_vit', '--no-teacher-pretrained']
    run([*small_run, *pair, '--knn-data', str(image_folder)])
    columns = list(summary(tmp_path / 'run')[0])
    assert columns[columns.index('eval_top5') + 1] == 'eval_knn'


def test_features_that_tell_classes_apart_have_it_right(argv, monkeypatch):
    trainer = make_trainer(argv, monkeypatch)
    knn = trainer.validation.knn
    assert knn(lambda input: input.mean((2, 3)), 'Test') == {'knn': 100}
    noise = torch.Generator().manual_seed(0)
    assert knn(lambda input: torch.randn(len(input), 8, generator=noise), 'Test')['knn'] < 80


def test_few_images_have_fewer_neighbours(argv, image_folder, tmp_path, monkeypatch):
    for c in ('ant', 'bee'):
        shutil.copytree(image_folder / 'val' / c, tmp_path / 'few' / 'train' / c)
        shutil.copytree(image_folder / 'val' / c, tmp_path / 'few' / 'val' / c)
    trainer = make_trainer([*argv, '--knn-data', str(tmp_path / 'few')], monkeypatch)
    assert trainer.validation.knn.neighbours == 8


def write(*folders):
    def make(root, source):
        for folder in folders:
            shutil.copytree(source / 'val' / 'ant', root / folder)

    return make


BAD = {
    'missing': (lambda root, source: None, 'no folder'),
    'no validation': (write('train/a', 'train/b'), "no folder for split 'validation' in"),
    'one class': (write('train/a', 'val/a'), 'holds one class alone'),
    'other classes': (write('train/a', 'train/b', 'val/a', 'val/c'), 'different classes'),
    'no classes': (write('train', 'val'), 'lies in no class folder'),
}


@pytest.mark.parametrize('kind', BAD)
def test_images_that_cannot_measure_are_one_line(kind, argv, image_folder, tmp_path, capsys):
    make, message = BAD[kind]
    make(tmp_path / 'bad', image_folder)
    error = refused([*argv, '--knn-data', str(tmp_path / 'bad')], capsys)
    assert '--knn-data: ' in error
    assert message in error
    assert not (tmp_path / 'run').exists()


def test_the_metric_needs_the_images(argv, capsys):
    argv = argv[: argv.index('--knn-data')]
    assert '--eval-metric knn needs --knn-data' in refused([*argv, '--eval-metric', 'knn'], capsys)


@pytest.mark.parametrize('place', [shutil.copy, os.link, os.symlink])
@pytest.mark.parametrize('beside', [False, True], ids=['alone', 'beside labels'])
def test_validation_images_that_the_student_trains_on_are_warned_about_once(
    place, beside, argv, image_folder, tmp_path, capsys
):
    data = tmp_path / 'knn'
    shutil.copytree(image_folder, data)
    images = tmp_path / 'images'
    for name in ('val/bee/0', 'val/bee/2', 'val/cat/3', 'train/ant/1'):
        place(data / f'{name}.png', images / f'{name.replace("/", "-")}.png')
    held_out = hold_out(hash_images(find_images([str(images)]).paths), 0.05)
    trained = [
        path for path, held in zip(find_images([str(images)]).paths, held_out, strict=True) if beside or not held
    ]
    names = sorted(os.path.basename(path) for path in trained if 'val-' in path)
    argv = [*argv, '--knn-data', str(data)]
    if beside:
        shutil.copytree(image_folder, tmp_path / 'data')
        for path in (tmp_path / 'data').rglob('*.png'):
            path.write_bytes(path.read_bytes() + b'other')
        argv += ['--data-dir', str(tmp_path / 'data')]
    said = run(argv, capsys)
    assert said.count('validation images of --knn-data') == 1
    first = data / names[0].replace('-', '/')
    assert (
        f"{len(names)} of the 12 validation images of --knn-data are also images to train on, the first is '{first}': "
        f'the top-1 of neighbours and linear probe is measured on images that the student has seen' in said
    )


def test_images_that_only_the_other_splits_have_are_not_warned_about(argv, image_folder, tmp_path, capsys):
    for path in (image_folder / 'train').rglob('*.png'):
        shutil.copy(path, tmp_path / 'images' / f'{path.parent.name}{path.name}')
    assert 'validation images of --knn-data' not in run(argv, capsys)
