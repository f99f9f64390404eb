import math

import pytest
import torch

from timm_pe import UsageError, create_feature_loss, kd_loss, list_feature_losses, register_feature_loss
from timm_pe.method.losses import FEATURE_LOSSES, TEACHER_NORMS, DirectionLoss, normalize_teacher


def naive_direction(p, t):
    total = 0.0
    for a, b in zip(p.tolist(), t.tolist(), strict=True):
        dot = sum(x * y for x, y in zip(a, b, strict=True))
        total += 1 - dot / math.sqrt(sum(x * x for x in a)) / math.sqrt(sum(y * y for y in b))
    return total / len(p)


def test_direction_equals_one_minus_cosine_written_out():
    torch.manual_seed(0)
    p, t = torch.randn(5, 7), torch.randn(5, 7)
    assert DirectionLoss()(p, t).item() == pytest.approx(naive_direction(p, t), abs=1e-6)


def test_direction_gradient_equals_finite_differences():
    torch.manual_seed(0)
    p, t = torch.randn(3, 4, dtype=torch.float64, requires_grad=True), torch.randn(3, 4, dtype=torch.float64)
    assert torch.autograd.gradcheck(DirectionLoss(), (p, t))


def test_direction_ignores_the_length_of_both_features():
    p, t = torch.randn(5, 7), torch.randn(5, 7)
    torch.testing.assert_close(DirectionLoss()(3 * p, 100 * t), DirectionLoss()(p, t))


def test_mse_equals_the_mean_square():
    p, t = torch.randn(5, 7), torch.randn(5, 7)
    torch.testing.assert_close(create_feature_loss('mse')(p, t), ((p - t) ** 2).sum() / 35)


@pytest.mark.parametrize('name', list_feature_losses())
@pytest.mark.parametrize('zero', ['student', 'teacher', 'both', 'one row'])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float16, torch.bfloat16])
def test_losses_and_gradients_are_finite_for_zero_features(name, zero, dtype):
    p, t = torch.randn(4, 8, dtype=dtype), torch.randn(4, 8, dtype=dtype)
    if zero in ('student', 'both'):
        p = torch.zeros_like(p)
    if zero in ('teacher', 'both'):
        t = torch.zeros_like(t)
    if zero == 'one row':
        p[1] = 0
    p.requires_grad_()
    loss = create_feature_loss(name)(p, t)
    loss.backward()
    assert loss.isfinite()
    assert p.grad.isfinite().all()
    assert p.grad.abs().max() < 10


@pytest.mark.parametrize('name', list_feature_losses())
def test_losses_compute_in_float32_under_autocast(name):
    torch.manual_seed(0)
    p, t = torch.randn(4, 64) * 300, torch.randn(4, 64) * 300  # squares overflow float16
    loss = create_feature_loss(name)
    with torch.autocast('cpu', dtype=torch.float16):
        low = loss(p, t)
        half = loss(p.half(), t.half())
    assert low.dtype == half.dtype == torch.float32
    assert torch.equal(low, loss(p, t))
    torch.testing.assert_close(half, low, rtol=1e-2, atol=1e-3)


def test_kd_loss_equals_its_formula_written_out():
    torch.manual_seed(0)
    s, t, temperature = torch.randn(4, 5), torch.randn(4, 5), 3.0
    expected = 0.0
    for a, b in zip(s.tolist(), t.tolist(), strict=True):
        ps = [math.exp(x / temperature) for x in a]
        pt = [math.exp(x / temperature) for x in b]
        ps, pt = [x / sum(ps) for x in ps], [x / sum(pt) for x in pt]
        expected += temperature**2 * sum(y * math.log(y / x) for x, y in zip(ps, pt, strict=True)) / 4
    assert kd_loss(s, t, temperature).item() == pytest.approx(expected, rel=1e-5)


def test_an_unknown_loss_is_refused_with_the_known_ones():
    with pytest.raises(UsageError, match='choose from direction, kl, logsum, mse'):
        create_feature_loss('cosine')


def test_a_registered_loss_is_found_and_its_name_is_taken():
    register_feature_loss('test_l1')(torch.nn.L1Loss)
    try:
        assert isinstance(create_feature_loss('test_l1'), torch.nn.L1Loss)
        with pytest.raises(ValueError, match='registered already'):
            register_feature_loss('test_l1')(torch.nn.L1Loss)
    finally:
        del FEATURE_LOSSES.factories['test_l1']


def test_logsum_is_the_log_of_the_sum_of_fourth_powers():
    torch.manual_seed(0)
    p, t = torch.randn(3, 5, dtype=torch.float64), torch.randn(3, 5, dtype=torch.float64)
    total = sum((x - y) ** 4 for a, b in zip(p.tolist(), t.tolist(), strict=True) for x, y in zip(a, b, strict=True))
    assert create_feature_loss('logsum')(p, t).item() == pytest.approx(math.log(total + 1e-5))
    assert torch.autograd.gradcheck(create_feature_loss('logsum'), (p.requires_grad_(), t))
    equal = torch.ones(2, 3, requires_grad=True)
    create_feature_loss('logsum')(equal, torch.ones(2, 3)).backward()
    assert torch.equal(equal.grad, torch.zeros(2, 3))


def test_the_kl_loss_is_kd_loss():
    torch.manual_seed(0)
    p, t = torch.randn(3, 5), torch.randn(3, 5)
    loss = create_feature_loss('kl')
    loss.temperature = 2.5
    assert torch.equal(loss(p, t), kd_loss(p, t, 2.5))


def test_teacher_norms_equal_their_definitions():
    torch.manual_seed(0)
    x = torch.randn(40, 6, dtype=torch.float64) @ torch.randn(6, 6, dtype=torch.float64) + 3
    assert normalize_teacher(x, 'none') is x
    for row, expected in zip(normalize_teacher(x, 'layer'), x, strict=True):
        torch.testing.assert_close(row, (expected - expected.mean()) / (expected.var(unbiased=False) + 1e-5).sqrt())
    batch = (x - x.mean(0)) / (x.var(0, unbiased=False) + 1e-5).sqrt()
    torch.testing.assert_close(normalize_teacher(x, 'batch'), batch)
    white = normalize_teacher(x, 'whiten')
    torch.testing.assert_close(torch.cov(white.T), torch.eye(6, dtype=torch.float64))
    # ZCA: the whitening that stays nearest to the features, C^(-1/2) (x - mean)
    values, vectors = torch.linalg.eigh(torch.cov(x.T))
    torch.testing.assert_close(white, (x - x.mean(0)) @ vectors @ torch.diag(values**-0.5) @ vectors.T)
    few = normalize_teacher(x[:4], 'whiten')  # 4 centred features span 3 dimensions: nothing is made up in the others
    assert torch.linalg.svdvals(few).tolist() == pytest.approx([3**0.5] * 3 + [0.0], abs=1e-5)


@pytest.mark.parametrize('norm', sorted(TEACHER_NORMS))
@pytest.mark.parametrize('x', [torch.randn(3, 8), torch.zeros(4, 8), torch.ones(1, 8)], ids=['wide', 'zero', 'single'])
def test_teacher_norms_are_finite_for_few_and_for_equal_features(norm, x):
    y = normalize_teacher(x.bfloat16(), norm)
    assert y.shape == x.shape
    assert y.isfinite().all()
    assert norm == 'none' or y.dtype == torch.float32
