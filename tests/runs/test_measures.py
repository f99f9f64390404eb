"""Each number of an analysis against a naive formula of it."""

import itertools
import math

import numpy as np
import pytest
import torch

from timm_pe.method.projectors import ProjectorEnsemble
from timm_pe.runs import measures
from timm_pe.train import probes


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
    assert measures.hsic1(k, l).item() == pytest.approx(naive_hsic(k.numpy(), l.numpy()), rel=1e-9)


def test_cka_averages_numerator_and_denominators_over_its_batches():
    x, y = torch.randn(13, 3), torch.randn(13, 4)
    x[:, 0] = y[:, 0]
    sums = np.zeros(3)
    seen = []
    for rows in probes.shuffled_batches(13, 6):
        seen += rows.tolist()
        a, b = x[rows].double().numpy(), y[rows].double().numpy()
        k, l = a @ a.T, b @ b.T  # noqa: E741
        sums += [naive_hsic(k, l), naive_hsic(k, k), naive_hsic(l, l)]
    assert sorted(seen) == list(range(13))
    assert measures.linear_cka(x, y, batch_size=6) == pytest.approx(sums[0] / math.sqrt(sums[1] * sums[2]), rel=1e-6)


def test_cka_is_blind_to_rotation_and_scale():
    torch.manual_seed(0)
    x = torch.randn(600, 16).relu()
    y = torch.cat([x[:, :8], torch.randn(600, 8)], dim=1)
    rotation = torch.linalg.qr(torch.randn(16, 16))[0]
    expected = measures.linear_cka(x, y)
    assert 0.1 < expected < 0.9
    assert measures.linear_cka(7 * x @ rotation, 0.01 * y) == pytest.approx(expected, abs=1e-5)
    assert measures.linear_cka(x, 3 * x @ rotation) == pytest.approx(1, abs=1e-5)
    assert measures.linear_cka(x + 1e4, y) == pytest.approx(expected, abs=1e-2)  # float32 keeps three places of x


def test_cka_of_unrelated_features_is_about_zero_however_wide_they_are():
    torch.manual_seed(0)
    # the biased estimator gives 0.67 here
    assert abs(measures.linear_cka(torch.randn(1024, 512), torch.randn(1024, 512))) < 0.02


def test_cka_does_not_depend_on_the_order_of_the_classes():
    torch.manual_seed(0)
    labels = torch.arange(1000) % 10
    means = torch.randn(10, 32) * 3
    x = means[labels] + torch.randn(1000, 32)
    y = (means @ torch.randn(32, 20))[labels] + torch.randn(1000, 20)
    by_class = labels.argsort()
    assert measures.linear_cka(x[by_class], y[by_class]) == pytest.approx(measures.linear_cka(x, y), abs=0.02)


def test_cka_of_too_few_images_or_a_constant_feature_is_no_number():
    assert math.isnan(measures.linear_cka(torch.randn(3, 2), torch.randn(3, 2)))
    assert math.isnan(measures.linear_cka(torch.ones(8, 2), torch.randn(8, 2)))


def test_class_statistics_are_those_of_loops_over_images_and_classes():
    torch.manual_seed(0)
    x, y = torch.randn(30, 4) + 1, torch.tensor([0, 0, 2, 3, 3] * 6)  # unequal classes, none is called 1
    got, matrix = measures.class_statistics(x, y)
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
    got = probes.probe(
        (torch.tensor(x), torch.tensor(labels)),
        (torch.tensor(x_val), torch.tensor(val_labels)),
    )
    assert got['nearest_centroid_top1'] == pytest.approx(100 * np.mean(nearest == val_labels))
    assert 50 < got['linear_probe_top1'] < 100
    far = torch.eye(4)[torch.tensor(labels)] * 100
    assert probes.probe((far, torch.tensor(labels)), (far, torch.tensor(labels)))['linear_probe_top1'] == 100


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
    got = measures.calibration(logits, labels)
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
    got = measures.top_k(logits, torch.tensor([0, 1, 0, 0]))
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
    got_between, got_single, got_ensemble = measures.projector_cosines(projection, x, t, batch_size=4)
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
    assert measures.projector_cosines(projection, x, t, 'layer')[2] == pytest.approx(naive, abs=1e-4)


def test_weight_cosine_is_the_mean_over_pairs_of_linear_projectors():
    projection = ProjectorEnsemble(5, 2, num_projectors=3)
    flat = projection.projectors.fc.weight.detach().numpy().reshape(3, -1)
    naive = np.mean([cosine(a, b) for a, b in itertools.combinations(flat, 2)])
    assert measures.weight_cosine(projection) == pytest.approx(naive, abs=1e-5)
    assert math.isnan(measures.weight_cosine(ProjectorEnsemble(5, 2, num_projectors=1)))
    assert math.isnan(measures.weight_cosine(ProjectorEnsemble(5, 2, num_projectors=3, projector='mlp')))
