"""What an analysis measures, against naive formulas, and what it makes of tiny finished runs."""

import base64
import io
import itertools
import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import load, run, summary
from PIL import Image

import train_distill
from timm_pe import analysis
from timm_pe.projectors import ProjectorEnsemble


def cosine(a, b) -> float:
    return float(np.dot(a, b) / (np.linalg.norm(a) * np.linalg.norm(b)))


# Measures --------------------------------------------------------------------------------------------------------------


def naive_hsic(k, l):  # noqa: E741
    """The U-statistic: means over all tuples of different samples."""
    n = len(k)

    def mean(size, value):
        tuples = list(itertools.permutations(range(n), size))
        return sum(value(*t) for t in tuples) / len(tuples)

    together = mean(2, lambda i, j: k[i, j] * l[i, j])
    apart = mean(4, lambda i, j, q, r: k[i, j] * l[q, r])
    crossed = mean(3, lambda i, j, q: k[i, j] * l[i, q])
    return together + apart - 2 * crossed


def test_hsic1_is_the_u_statistic():
    x, y = torch.randn(7, 3, dtype=torch.float64), torch.randn(7, 5, dtype=torch.float64)
    k, l = x @ x.T, y @ y.T  # noqa: E741
    assert analysis.hsic1(k, l).item() == pytest.approx(naive_hsic(k.numpy(), l.numpy()), rel=1e-9)


def test_cka_averages_numerator_and_denominators_over_its_batches():
    x, y = torch.randn(13, 3), torch.randn(13, 4)
    x[:, 0] = y[:, 0]
    sums = np.zeros(3)
    seen = []
    for rows in analysis._shuffled(13, 6):
        seen += rows.tolist()
        a, b = x[rows].double().numpy(), y[rows].double().numpy()
        k, l = a @ a.T, b @ b.T  # noqa: E741
        sums += [naive_hsic(k, l), naive_hsic(k, k), naive_hsic(l, l)]
    assert sorted(seen) == list(range(13))
    assert analysis.linear_cka(x, y, batch_size=6) == pytest.approx(sums[0] / math.sqrt(sums[1] * sums[2]), rel=1e-6)


def test_cka_is_blind_to_rotation_and_scale():
    torch.manual_seed(0)
    x = torch.randn(600, 16).relu()
    y = torch.cat([x[:, :8], torch.randn(600, 8)], dim=1)
    rotation = torch.linalg.qr(torch.randn(16, 16))[0]
    expected = analysis.linear_cka(x, y)
    assert 0.1 < expected < 0.9
    assert analysis.linear_cka(7 * x @ rotation, 0.01 * y) == pytest.approx(expected, abs=1e-5)
    assert analysis.linear_cka(x, 3 * x @ rotation) == pytest.approx(1, abs=1e-5)
    assert analysis.linear_cka(x + 1e4, y) == pytest.approx(expected, abs=1e-2)  # float32 keeps three places of x


def test_cka_of_unrelated_features_is_about_zero_however_wide_they_are():
    torch.manual_seed(0)
    # the biased estimator gives 0.67 here
    assert abs(analysis.linear_cka(torch.randn(1024, 512), torch.randn(1024, 512))) < 0.02


def test_cka_does_not_depend_on_the_order_of_the_classes():
    torch.manual_seed(0)
    labels = torch.arange(1000) % 10
    means = torch.randn(10, 32) * 3
    x = means[labels] + torch.randn(1000, 32)
    y = (means @ torch.randn(32, 20))[labels] + torch.randn(1000, 20)
    by_class = labels.argsort()
    assert analysis.linear_cka(x[by_class], y[by_class]) == pytest.approx(analysis.linear_cka(x, y), abs=0.02)


def test_cka_of_too_few_images_or_a_constant_feature_is_no_number():
    assert math.isnan(analysis.linear_cka(torch.randn(3, 2), torch.randn(3, 2)))
    assert math.isnan(analysis.linear_cka(torch.ones(8, 2), torch.randn(8, 2)))


def test_class_statistics_are_those_of_loops_over_images_and_classes():
    torch.manual_seed(0)
    x, y = torch.randn(30, 4) + 1, torch.tensor([0, 0, 2, 3, 3] * 6)  # unequal classes, none is called 1
    got, matrix = analysis.class_statistics(x, y)
    features, labels = x.double().numpy(), y.numpy()
    total = features.mean(0)
    means = {c: features[labels == c].mean(0) for c in (0, 2, 3)}
    within = sum(((f - means[c]) ** 2).sum() for f, c in zip(features, labels, strict=True)) / 30
    between = sum(((means[c] - total) ** 2).sum() for c in labels) / 30
    pairs = list(itertools.combinations((0, 2, 3), 2))
    assert got['within_scatter'] == pytest.approx(within)
    assert got['between_scatter'] == pytest.approx(between)
    assert got['between_over_within'] == pytest.approx(between / within)
    centred = [cosine(means[a] - total, means[b] - total) for a, b in pairs]
    assert got['between_class_cosine'] == pytest.approx(np.mean(centred))
    assert got['between_class_cosine_raw'] == pytest.approx(np.mean([cosine(means[a], means[b]) for a, b in pairs]))
    np.testing.assert_allclose(matrix[np.triu_indices(3, 1)], centred)


def test_probes_are_fitted_on_one_split_and_scored_on_the_other():
    rng = np.random.default_rng(0)
    means = rng.normal(size=(4, 6))
    labels, val_labels = rng.integers(0, 4, 80), rng.integers(0, 4, 60)
    x, x_val = (means[y] + rng.normal(size=(len(y), 6)) for y in (labels, val_labels))
    centroids = np.stack([x[labels == c].mean(0) for c in range(4)])
    nearest = [np.argmin([((v - m) ** 2).sum() for m in centroids]) for v in x_val]
    got = analysis.probe(
        (torch.tensor(x), torch.tensor(labels)),
        (torch.tensor(x_val), torch.tensor(val_labels)),
    )
    assert got['nearest_centroid_top1'] == pytest.approx(100 * np.mean(nearest == val_labels))
    assert 50 < got['linear_probe_top1'] < 100
    far = torch.eye(4)[torch.tensor(labels)] * 100
    assert analysis.probe((far, torch.tensor(labels)), (far, torch.tensor(labels)))['linear_probe_top1'] == 100


def test_calibration_is_that_of_a_loop_over_images():
    torch.manual_seed(0)
    logits, labels = torch.randn(400, 5) * 3, torch.randint(5, (400,))
    logits[:9] = 1000 * torch.eye(5)[labels[:9]]  # a confidence of exactly 1 belongs to the last bin
    labels[:3] = (labels[:3] + 1) % 5
    bins = [[] for _ in range(15)]
    for row, label in zip(logits.double().numpy(), labels.tolist(), strict=True):
        p = np.exp(row - row.max()) / np.exp(row - row.max()).sum()
        bins[min(int(p.max() * 15), 14)].append((p.max(), p.argmax() == label))
    expected = sum(len(b) / 400 * abs(np.mean([c for c, _ in b]) - np.mean([a for _, a in b])) for b in bins if b)
    got = analysis.calibration(logits, labels)
    assert got['ece'] == pytest.approx(expected, abs=1e-5)
    assert [b['count'] for b in got['bins']] == [len(b) for b in bins]
    assert got['accuracy'] == pytest.approx(np.mean([a for b in bins for _, a in b]))
    assert got['mean_confidence'] == pytest.approx(np.mean([c for b in bins for c, _ in b]), abs=1e-5)
    for b, images in zip(got['bins'], bins, strict=True):
        if images:
            assert b['confidence'] == pytest.approx(np.mean([c for c, _ in images]), abs=1e-5)
            assert b['accuracy'] == pytest.approx(np.mean([a for _, a in images]))
        else:
            assert b['confidence'] is b['accuracy'] is None
    assert (got['bins'][0]['low'], got['bins'][-1]['high']) == (0, 1)


def test_accuracy_is_in_percent_and_top5_of_three_classes_is_all():
    logits = torch.tensor([[3.0, 1.0, 2.0], [0.0, 5.0, 1.0], [0.0, 5.0, 1.0], [9.0, 0.0, 0.0]])
    got = analysis.top_k(logits, torch.tensor([0, 1, 0, 0]))
    assert (got['top1'], got['top5']) == (75, 100)
    naive = [
        math.log(sum(math.exp(v) for v in row)) - row[c] for row, c in zip(logits.tolist(), (0, 1, 0, 0), strict=True)
    ]
    assert got['loss'] == pytest.approx(np.mean(naive), rel=1e-5)


@pytest.mark.parametrize('act', ['relu', 'none'])
def test_projector_cosines_are_those_of_loops_over_images(act):
    torch.manual_seed(0)
    projection = ProjectorEnsemble(6, 4, num_projectors=3, act=act).eval()
    x, t = torch.randn(11, 6), torch.rand(11, 4)
    got_between, got_single, got_ensemble = analysis.projector_cosines(projection, x, t, batch_size=4)
    weight = projection.projectors.fc.weight.detach().numpy().reshape(3, 4, 6)
    bias = projection.projectors.fc.bias.detach().numpy().reshape(3, 4)
    outputs = np.einsum('kmd,nd->nkm', weight, x.numpy()) + bias
    outputs = np.maximum(outputs, 0) if act == 'relu' else outputs
    between = [[np.mean([cosine(o[a], o[b]) for o in outputs]) for a in range(3)] for b in range(3)]
    np.testing.assert_allclose(got_between, between, atol=1e-5)
    single = [np.mean([cosine(o[k], v) for o, v in zip(outputs, t.numpy(), strict=True)]) for k in range(3)]
    np.testing.assert_allclose(got_single, single, atol=1e-5)
    ensemble = np.mean([cosine(o.mean(0), v) for o, v in zip(outputs, t.numpy(), strict=True)])
    assert got_ensemble == pytest.approx(ensemble, abs=1e-5)


def test_projections_are_compared_with_the_feature_that_the_loss_saw():
    torch.manual_seed(0)
    projection = ProjectorEnsemble(4, 4, num_projectors=1, projector='identity')
    x, t = torch.randn(20, 4), torch.randn(20, 4) + 5
    normed = (t - t.mean(1, keepdim=True)) / t.std(1, keepdim=True, unbiased=False)
    naive = np.mean([cosine(a, b) for a, b in zip(x.numpy(), normed.numpy(), strict=True)])
    assert analysis.projector_cosines(projection, x, t, 'layer')[2] == pytest.approx(naive, abs=1e-4)


def test_weight_cosine_is_the_mean_over_pairs_of_linear_projectors():
    projection = ProjectorEnsemble(5, 2, num_projectors=3)
    flat = projection.projectors.fc.weight.detach().numpy().reshape(3, -1)
    naive = np.mean([cosine(a, b) for a, b in itertools.combinations(flat, 2)])
    assert analysis.weight_cosine(projection) == pytest.approx(naive, abs=1e-5)
    assert math.isnan(analysis.weight_cosine(ProjectorEnsemble(5, 2, num_projectors=1)))
    assert math.isnan(analysis.weight_cosine(ProjectorEnsemble(5, 2, num_projectors=3, projector='mlp')))


# Runs ------------------------------------------------------------------------------------------------------------------

KEYS = {
    '': 'run model teacher compared_with checkpoint epoch seed params num_classes class_names images train validation '
    'gap_top1 teacher_validation agreement cosine cosine_raw cka discriminability calibration projectors samples',
    'images': 'train validation',
    'train': 'top1 top5 loss',
    'validation': 'top1 top5 loss',
    'teacher_validation': 'top1 top5 loss',
    'agreement': 'train validation',
    'cosine': 'train validation',
    'cka': 'train validation',
    'discriminability': 'within_scatter between_scatter between_over_within between_class_cosine between_class_cosine_raw '
    'nearest_centroid_top1 linear_probe_top1',
    'calibration': 'ece mean_confidence accuracy bins',
    'projectors': 'q act output_cosine weight_cosine single_cosine ensemble_cosine ensemble_gain',
}


@pytest.fixture(scope='module')
def runs(image_folder, tmp_path_factory):
    """Finished runs of one student: 'alone' and 'distilled' by 'teacher'; and the command line that they share."""
    output = tmp_path_factory.mktemp('runs')
    argv = [
        *(str(image_folder), '--num-classes', '3', '--img-size', '32', '-b', '8', '-j', '0', '--device', 'cpu'),
        *('--epochs', '3', '--warmup-epochs', '0', '--lr', '0.02', '--output', str(output), '--scale', '0.5', '1.0'),
    ]
    teacher = ['--teacher', 'test_resnet', '--teacher-checkpoint', str(output / 'teacher')]
    run([*argv, '--model', 'test_resnet', '--experiment', 'teacher'])
    run([*argv, '--model', 'test_vit', '--experiment', 'alone'])
    run([*argv, '--model', 'test_vit', '--experiment', 'distilled', *teacher])
    return output, argv, teacher


@pytest.fixture(scope='module')
def analyzed(runs):
    """The analyses of 'alone' and 'distilled' in one call, and what was in their folders before."""
    output = runs[0]
    folders = [output / 'alone', output / 'distilled']
    before = {folder: {p.name: p.read_bytes() for p in folder.iterdir()} for folder in folders}
    analysis.main([*map(str, folders), '--max-train-images', '30'])
    return [json.loads((folder / 'analysis.json').read_text()) for folder in folders], before


def copy(runs, name: str, tmp_path) -> Path:
    """A run folder of one's own, not analysed yet."""
    ignored = shutil.ignore_patterns('analysis.json', 'figures')
    return Path(shutil.copytree(runs[0] / name, tmp_path / name, ignore=ignored))


def refused(argv, capsys) -> str:
    """The one line that an analysis ends with."""
    with pytest.raises(SystemExit) as e:
        analysis.main(list(map(str, argv)))
    err = capsys.readouterr().err
    assert e.value.code == 2
    assert 'Traceback' not in err
    assert len(err.splitlines()) == 1, err
    return err


def test_every_number_of_the_contract_is_there(analyzed):
    result = analyzed[0][1]
    for path, keys in KEYS.items():
        assert set(result[path] if path else result) == set(keys.split()), path
    assert result['cosine_raw'] is None  # the widths differ
    assert (result['run'], result['model'], result['teacher']) == ('distilled', 'test_vit', 'test_resnet')
    assert (result['checkpoint'], result['epoch'], result['seed']) == ('last', 2, 42)
    assert (result['num_classes'], result['class_names']) == (3, ['ant', 'bee', 'cat'])
    assert result['images'] == {'train': 30, 'validation': 12}
    assert result['gap_top1'] == pytest.approx(result['train']['top1'] - result['validation']['top1'])
    assert (result['projectors']['q'], result['projectors']['act']) == (3, 'relu')
    assert result['cosine']['validation'] == result['projectors']['ensemble_cosine']
    single = result['projectors']['single_cosine']
    assert result['projectors']['ensemble_gain'] == pytest.approx(result['cosine']['validation'] - max(single))
    assert len(result['calibration']['bins']) == 15
    assert 100 * result['calibration']['accuracy'] == pytest.approx(result['validation']['top1'], rel=1e-5)


def test_a_run_without_a_teacher_is_compared_with_that_of_the_other_run(analyzed):
    alone, distilled = analyzed[0]
    assert (alone['teacher'], alone['compared_with'], distilled['compared_with']) == (
        None,
        'test_resnet',
        'test_resnet',
    )
    assert alone['teacher_validation'] == distilled['teacher_validation']
    assert set(alone['cka']) == set(alone['agreement']) == {'train', 'validation'}
    assert alone['cosine'] is alone['projectors'] is alone['cosine_raw'] is None


def test_both_runs_show_the_same_images(analyzed, image_folder):
    alone, distilled = analyzed[0]
    assert [(s['image'], s['label']) for s in alone['samples']] == [
        (s['image'], s['label']) for s in distilled['samples']
    ]
    assert len(distilled['samples']) == 12
    sample = distilled['samples'][0]
    assert set(sample['student']) == set(sample['teacher']) == {'class', 'confidence'}
    png = base64.b64decode(sample['image'].removeprefix('data:image/png;base64,'))
    label = distilled['class_names'][sample['label']]
    originals = [np.asarray(Image.open(p)) for p in (image_folder / 'val' / label).iterdir()]
    assert any(np.array_equal(np.asarray(Image.open(io.BytesIO(png))), original) for original in originals)
    top1 = np.mean([s['student']['class'] == s['label'] for s in distilled['samples']])
    assert 100 * top1 == pytest.approx(distilled['validation']['top1'], rel=1e-5)  # these 12 are all there are


def test_validation_numbers_are_those_of_the_run_itself(analyzed, runs):
    for result in analyzed[0]:
        row = summary(runs[0] / result['run'])[result['epoch']]
        for name in ('top1', 'top5', 'loss'):
            assert result['validation'][name] == pytest.approx(float(row[f'eval_{name}']), rel=1e-5)


def test_training_images_are_seen_without_augmentation(runs, tmp_path, capsys):
    output, argv, _ = runs
    copy(runs, 'alone', tmp_path)
    result = analysis.analyze(tmp_path / 'alone')
    said = run([*argv, '--model', 'test_vit', '--val-split', 'train', '--evaluate', str(tmp_path / 'alone' / 'last.pth.tar')], capsys)  # fmt: skip
    assert result['images']['train'] == 36
    assert result['train']['top1'] == pytest.approx(float(re.search(r'top-1 ([\d.]+) %', said)[1]), abs=1e-3)
    assert result['train']['loss'] == pytest.approx(float(re.search(r'loss ([\d.]+)', said)[1]), abs=1e-3)


def test_an_analysis_leaves_its_json_and_pictures_and_nothing_else(analyzed):
    for folder, before in analyzed[1].items():
        assert {p.name for p in folder.iterdir()} == {*before, 'analysis.json', 'figures'}
        assert all((folder / name).read_bytes() == content for name, content in before.items())
        pictures = {'reliability.png', 'class_cosine.png', 'curves.png'}
        if folder.name == 'distilled':
            pictures.add('projector_similarity.png')
        assert {p.name for p in (folder / 'figures').iterdir()} == pictures
        assert all(p.read_bytes().startswith(b'\x89PNG') for p in (folder / 'figures').iterdir())


def test_the_table_has_a_row_a_run_and_says_where_it_wrote(runs, capsys):
    output = runs[0]
    analysis.main([str(output / 'distilled'), str(output / 'alone')])
    head, distilled, alone, *rest = capsys.readouterr().out.splitlines()
    result = json.loads((output / 'distilled' / 'analysis.json').read_text())
    cells = dict(zip(re.split(r'\s{2,}', head), re.split(r'\s{2,}', distilled), strict=True))
    assert cells['run'] == 'distilled'
    assert cells['val'] == f'{result["validation"]["top1"]:.2f}'
    assert cells['CKA'] == f'{result["cka"]["validation"]:.3f}'
    assert re.split(r'\s{2,}', alone)[-2:] == ['-', '-']  # no projectors
    assert any('analysis.json' in line for line in rest)


def test_a_run_alone_has_nobody_to_be_compared_with(runs, tmp_path):
    copy(runs, 'alone', tmp_path)
    result = analysis.analyze(tmp_path / 'alone')
    for name in ('compared_with', 'teacher_validation', 'agreement', 'cosine', 'cosine_raw', 'cka', 'projectors'):
        assert result[name] is None, name
    assert all(sample['teacher'] is None for sample in result['samples'])
    assert result['discriminability']['linear_probe_top1'] is not None


def test_a_teacher_of_other_data_is_nobody_to_be_compared_with(runs, tmp_path):
    copy(runs, 'alone', tmp_path)
    other = copy(runs, 'distilled', tmp_path)
    text = (other / 'args.yaml').read_text()
    (other / 'args.yaml').write_text(re.sub(r'^val_split: .*$', 'val_split: train', text, flags=re.M))
    assert analysis.analyze(tmp_path / 'alone', others=[other])['compared_with'] is None


def test_the_teacher_compared_with_itself_is_equal(runs, tmp_path):
    output = runs[0]
    copy(runs, 'teacher', tmp_path)
    options = analysis.Options(checkpoint='best')  # the weights that it teaches with
    result = analysis.analyze(tmp_path / 'teacher', options, others=[output / 'distilled'])
    assert result['checkpoint'] == 'best'
    assert result['agreement'] == {'train': 100, 'validation': 100}
    assert result['cka']['validation'] == pytest.approx(1, abs=1e-4)
    assert result['cosine_raw']['train'] == pytest.approx(1, abs=1e-4)
    assert result['teacher_validation']['top1'] == pytest.approx(result['validation']['top1'])


def test_the_moving_average_is_analysed_where_it_is_what_the_run_evaluated(runs, tmp_path):
    _, argv, teacher = runs
    ema = ['--model-ema', '--model-ema-decay', '0.7', '--epochs', '1']
    run([*argv, '--model', 'test_vit', *teacher, *ema, '--output', str(tmp_path), '--experiment', 'ema'])
    result = analysis.analyze(tmp_path / 'ema')
    assert result['validation']['loss'] == pytest.approx(float(summary(tmp_path / 'ema')[-1]['eval_loss']), rel=1e-5)
    weight = load(tmp_path / 'ema' / 'last.pth.tar')['task_state_ema']['projection']['projectors.fc.weight']
    flat = weight.numpy().reshape(3, -1)
    naive = np.mean([cosine(a, b) for a, b in itertools.combinations(flat, 2)])
    assert result['projectors']['weight_cosine'] == pytest.approx(naive, abs=1e-4)


def test_projectors_of_logits_have_no_cosine_to_a_feature(runs, tmp_path):
    _, argv, teacher = runs
    logits = ['--pe-target', 'logits', '--epochs', '1', '--output', str(tmp_path), '--experiment', 'logits']
    run([*argv, '--model', 'test_vit', *teacher, *logits])
    result = analysis.analyze(tmp_path / 'logits')
    assert result['cosine'] is None
    projectors = result['projectors']
    assert projectors['q'] == 3
    for name in ('output_cosine', 'single_cosine', 'ensemble_cosine', 'ensemble_gain'):
        assert projectors[name] is None, name
    assert result['cka']['train'] is not None
    assert result['agreement']['train'] is not None


def test_one_projector_has_no_other_to_be_compared_with(runs, tmp_path):
    _, argv, teacher = runs
    one = ['--pe-projectors', '1', '--epochs', '1', '--output', str(tmp_path), '--experiment', 'one']
    run([*argv, '--model', 'test_vit', *teacher, *one])
    projectors = analysis.analyze(tmp_path / 'one')['projectors']
    assert projectors['output_cosine'] is projectors['weight_cosine'] is None
    assert (projectors['ensemble_gain'], len(projectors['single_cosine'])) == (pytest.approx(0, abs=1e-6), 1)
    assert not (tmp_path / 'one' / 'figures' / 'projector_similarity.png').exists()


def test_timms_own_distillation_has_a_teacher_and_no_projectors(runs, tmp_path):
    output, argv, _ = runs
    folder = tmp_path / 'local'
    folder.mkdir()
    shutil.copyfile(output / 'teacher' / 'student.safetensors', folder / 'model.safetensors')
    config = {'architecture': 'test_resnet', 'num_classes': 3, 'pretrained_cfg': {'num_classes': 3}}
    (folder / 'config.json').write_text(json.dumps(config))
    kd = ['--kd-model-name', f'local-dir:{folder}', '--epochs', '1', '--output', str(tmp_path), '--experiment', 'kd']
    run([*argv, '--model', 'test_vit', *kd])
    result = analysis.analyze(tmp_path / 'kd')
    assert result['teacher'] == result['compared_with'] == f'local-dir:{folder}'
    assert result['projectors'] is result['cosine'] is None
    best = max(float(row['eval_top1']) for row in summary(output / 'teacher'))
    assert result['teacher_validation']['top1'] == pytest.approx(best, abs=1e-3)


def test_a_teacher_that_was_left_random_is_drawn_again(runs, tmp_path, monkeypatch):
    _, argv, _ = runs
    teachers = []
    create = train_distill.create_run_teacher
    monkeypatch.setattr(
        train_distill, 'create_run_teacher', lambda *args: teachers.append(create(*args)) or teachers[0]
    )
    random = ['--teacher', 'test_resnet', '--no-teacher-pretrained', '--epochs', '1', '--output', str(tmp_path)]
    run([*argv, '--model', 'test_vit', *random, '--experiment', 'random', '--seed', '3'])
    again = analysis.open_run(tmp_path / 'random', analysis.Options()).teacher.state_dict()
    assert all(torch.equal(v, again[k]) for k, v in teachers[0].state_dict().items())


def test_the_same_training_images_are_looked_at_in_each_run(runs):
    output = runs[0]
    options = analysis.Options(max_train_images=10)
    subsets = []
    for name in ('alone', 'distilled'):
        opened = analysis.open_run(output / name, options)
        subsets.append(opened.loaders['train'].dataset.indices)
    assert subsets[0] == subsets[1]
    assert len(set(subsets[0])) == 10
    assert max(subsets[0]) > 9  # drawn, not the first ten: folders are sorted by class
    whole = analysis.open_run(output / 'distilled', analysis.Options())
    seen, of_all = (torch.cat([images for images, _ in r.loaders['train']]) for r in (opened, whole))
    torch.testing.assert_close(seen, of_all[subsets[0]])


def test_moved_data_and_teacher_are_named_on_the_command_line(runs, image_folder, tmp_path, capsys):
    folder = copy(runs, 'distilled', tmp_path)
    text = (folder / 'args.yaml').read_text()
    args = re.sub(r'^data: .*$', 'data: /moved', text, flags=re.M)
    (folder / 'args.yaml').write_text(
        re.sub(r'^teacher_checkpoint: .*$', 'teacher_checkpoint: /away', args, flags=re.M)
    )
    error = refused([folder], capsys)
    assert "no data folder '/moved'" in error
    assert '--data-dir PATH' in error
    error = refused([folder, '--data-dir', image_folder], capsys)
    assert "no file '/away'" in error
    assert '--teacher-checkpoint PATH' in error
    assert not (folder / 'analysis.json').exists()
    analysis.main([str(folder), '--data-dir', str(image_folder), '--teacher-checkpoint', str(runs[0] / 'teacher')])
    assert (folder / 'analysis.json').exists()


def test_what_cannot_be_analysed_is_said_in_one_line_before_anything_is_written(runs, tmp_path, capsys, monkeypatch):
    whole = copy(runs, 'alone', tmp_path)
    (whole / 'model_best.pth.tar').unlink()
    assert f"RUN '{tmp_path / 'nothing'}': it is no run folder" in refused([whole, tmp_path / 'nothing'], capsys)
    assert 'it has no model_best.pth.tar' in refused([whole, '--checkpoint', 'best'], capsys)
    assert '--max-train-images must be 1 or more' in refused([whole, '--max-train-images', '0'], capsys)
    assert "--device: cannot use 'abacus'" in refused([whole, '--device', 'abacus'], capsys)
    assert 'did you mean --checkpoint?' in refused([whole, '--chekpoint=last'], capsys)
    multilabel = Path(shutil.copytree(whole, tmp_path / 'multilabel'))
    text = (whole / 'args.yaml').read_text().replace('task: classification', 'task: multilabel')
    (multilabel / 'args.yaml').write_text(text)
    assert '--task multilabel or --naflex-loader cannot be analysed' in refused([multilabel], capsys)
    monkeypatch.setattr(analysis, '_PACKAGES', {'no_such_module': 'no-such-package'})
    assert "the analysis needs no-such-package: pip install 'timm_pe[analysis]'" in refused([whole], capsys)
    assert not (whole / 'analysis.json').exists()


@pytest.mark.parametrize(
    ('damage', 'message'),
    [
        (lambda c: c.update(task_state=None), 'holds no projectors'),
        (lambda c: c['state_dict']['head.weight'].fill_(3e38), 'the run has diverged'),
        (lambda c: c['state_dict'].pop('head.weight'), '1 missing keys (head.weight)'),
        (
            lambda c: c['task_state'].update(num_projectors=2),
            'the checkpoint has num_projectors=2, this run num_projectors=3',
        ),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused(damage, message, runs, tmp_path, capsys):
    folder = copy(runs, 'distilled', tmp_path)
    checkpoint = load(folder / 'last.pth.tar')
    damage(checkpoint)
    torch.save(checkpoint, folder / 'last.pth.tar')
    assert message in refused([folder], capsys)
    assert not {'analysis.json', 'figures'} & {p.name for p in folder.iterdir()}


def test_no_number_of_the_json_is_nan():
    nested = {'a': math.nan, 'b': [1.0, math.inf, {'c': -math.inf}], 'd': 'nan', 'e': 3}
    assert analysis._finite(nested) == {'a': None, 'b': [1.0, None, {'c': None}], 'd': 'nan', 'e': 3}
