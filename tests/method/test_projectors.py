import pytest
import torch
import torch.nn as nn

from timm_pe import ProjectorEnsemble, UsageError, create_projector, list_projectors, register_projector
from timm_pe.method.names import PROJECTORS


def test_linear_ensemble_equals_the_mean_of_separate_projectors():
    torch.manual_seed(0)
    ensemble = ProjectorEnsemble(5, 7, num_projectors=3)
    x = torch.randn(4, 5)
    weight, bias = ensemble.projectors.fc.weight, ensemble.projectors.fc.bias
    expected = torch.zeros(4, 7)
    for k in range(3):
        w, b = weight[k * 7 : (k + 1) * 7], bias[k * 7 : (k + 1) * 7]
        expected += (x @ w.T + b).clamp(min=0) / 3
    torch.testing.assert_close(ensemble(x), expected)
    assert ensemble.project(x).shape == (4, 3, 7)


def test_linear_ensemble_starts_with_the_distribution_of_independent_projectors():
    torch.manual_seed(0)
    fc = ProjectorEnsemble(64, 96, num_projectors=3).projectors.fc.requires_grad_(False)
    single = nn.Linear(64, 96).requires_grad_(False)
    bound = single.weight.abs().max()
    assert fc.weight.abs().max() == pytest.approx(bound.item(), rel=0.01)
    thirds = fc.weight.chunk(3)
    assert not torch.equal(thirds[0], thirds[1])
    for third in thirds:
        assert third.std() == pytest.approx(single.weight.std().item(), rel=0.05)


@pytest.mark.parametrize('name', ['linear', 'mlp'])
@pytest.mark.parametrize('act', ['relu', 'none'])
def test_activation_decides_the_sign_of_the_projection(name, act):
    torch.manual_seed(0)
    out = ProjectorEnsemble(16, 8, 2, name, act)(torch.randn(64, 16))
    assert (out.min() >= 0) == (act == 'relu')


@pytest.mark.parametrize('name', ['linear', 'mlp'])
def test_auto_activation_must_be_settled_before_the_first_forward(name):
    ensemble = ProjectorEnsemble(4, 4, 2, name, 'auto')
    with pytest.raises(RuntimeError, match='undecided'):
        ensemble(torch.randn(2, 4))
    ensemble.act = 'none'
    assert ensemble(torch.randn(64, 4)).min() < 0


@pytest.mark.parametrize('name', ['linear', 'identity'])
def test_an_unknown_activation_is_refused(name):
    with pytest.raises(UsageError, match="unknown .*'gelu'"):
        ProjectorEnsemble(4, 4, 1, name, 'gelu')


@pytest.mark.parametrize('act', ['auto', 'relu', 'none'])
def test_identity_leaves_the_feature_as_it_is(act):
    x = torch.randn(3, 6)
    ensemble = ProjectorEnsemble(6, 6, 1, 'identity', act)
    if act == 'auto':
        ensemble.act = 'relu'
    assert torch.equal(ensemble(x), x)
    assert not list(ensemble.parameters())


def test_identity_refuses_unequal_widths_and_more_than_one_projector():
    with pytest.raises(UsageError, match='student has 4 and the teacher 6'):
        ProjectorEnsemble(4, 6, 1, 'identity')
    with pytest.raises(UsageError, match='use 1 projector'):
        ProjectorEnsemble(4, 4, 3, 'identity')


@pytest.mark.parametrize(
    ('kwargs', 'message'),
    [
        ({'num_projectors': 0}, '1 or more, got 0'),
        ({'projector': 'lineer'}, 'choose from identity, linear, linear_bn, mlp, orthogonal'),
        ({'act': 'gelu'}, 'choose from relu, none'),
    ],
)
def test_bad_arguments_are_refused_with_what_is_allowed(kwargs, message):
    with pytest.raises(UsageError, match=message):
        ProjectorEnsemble(4, 4, **kwargs)


def test_a_registered_projector_is_built_q_times_and_its_name_is_taken():
    @register_projector('test_scale')
    class Scale(nn.Module):
        def __init__(self, in_dim, out_dim):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(out_dim))

        def forward(self, x):
            return x * self.weight

    try:
        assert 'test_scale' in list_projectors()
        assert isinstance(create_projector('test_scale', 4, 4), Scale)
        ensemble = ProjectorEnsemble(4, 4, 3, 'test_scale', 'none')
        x = torch.randn(2, 4)
        expected = sum(x * p for p in ensemble.parameters()) / 3
        torch.testing.assert_close(ensemble(x), expected)
        auto = ProjectorEnsemble(4, 4, 3, 'test_scale', 'auto')
        auto.act = 'relu'
        assert auto(torch.randn(64, 4)).min() >= 0
        with pytest.raises(ValueError, match='registered already'):
            register_projector('test_scale')(Scale)
    finally:
        del PROJECTORS.factories['test_scale']


@pytest.mark.parametrize('weight_decay', [0, 1e-4])
@pytest.mark.parametrize(('in_dim', 'out_dim'), [(5, 9), (9, 5), (6, 6)])
def test_orthogonal_projectors_stay_orthogonal_while_they_train(in_dim, out_dim, weight_decay):
    torch.manual_seed(0)
    projector = create_projector('orthogonal', in_dim, out_dim)
    before = projector.weight.detach().clone()
    optimizer = torch.optim.SGD(projector.parameters(), lr=0.5, momentum=0.9, weight_decay=weight_decay)
    for _ in range(5):
        optimizer.zero_grad()
        (projector(torch.randn(8, in_dim)) - 3).pow(2).mean().backward()
        optimizer.step()
    weight = projector.weight.detach()
    assert not torch.allclose(weight, before, atol=1e-2)
    gram = weight.T @ weight if in_dim <= out_dim else weight @ weight.T
    torch.testing.assert_close(gram, torch.eye(min(in_dim, out_dim)), atol=1e-5, rtol=0)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(('in_dim', 'out_dim'), [(6, 6), (4, 9), (9, 4)])
def test_orthogonal_projectors_of_half_precision_train_and_stay_orthogonal_to_its_rounding(in_dim, out_dim, dtype):
    torch.manual_seed(0)
    whole = create_projector('orthogonal', in_dim, out_dim)
    half = create_projector('orthogonal', in_dim, out_dim)
    half.load_state_dict(whole.state_dict())
    half.to(dtype)
    x = torch.randn(8, in_dim)
    torch.testing.assert_close(half(x.to(dtype)).float(), whole(x), rtol=0.02, atol=0.03)
    optimizer = torch.optim.SGD(half.parameters(), lr=0.5)
    for _ in range(5):
        loss = (half(x.to(dtype)).float() - 1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and p.grad.dtype == dtype and p.grad.isfinite().all() for p in half.parameters())
        optimizer.step()
    basis = half(torch.eye(in_dim, dtype=dtype)).float()  # W transposed
    product = basis @ basis.T if in_dim <= out_dim else basis.T @ basis
    torch.testing.assert_close(product, torch.eye(min(in_dim, out_dim)), rtol=0, atol=0.03)
    assert (half(x.to(dtype)).float() - 1).square().mean() < (whole(x) - 1).square().mean()


def test_linear_bn_is_a_linear_map_standardized_over_the_batch():
    torch.manual_seed(0)
    projector = create_projector('linear_bn', 4, 3).double()
    x = torch.randn(6, 4, dtype=torch.float64)
    z = x @ projector[0].weight.T + projector[0].bias
    expected = (z - z.mean(0)) / (z.var(0, unbiased=False) + 1e-5).sqrt()
    torch.testing.assert_close(projector(x), expected)
    assert len(list(projector.parameters())) == 2
