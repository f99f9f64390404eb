import copy

import pytest
import timm
import torch
import torch.nn as nn
import torchvision
from torch.nn.utils.parametrizations import weight_norm

from timm_pe import ProjectorEnsembleTask, create_teacher
from timm_pe.method.fold import count_batch_norms, equal_to_rounding, fold_batch_norm
from timm_pe.method.tap import FeatureTap


def trained(model):
    """As initialized, a batch norm does almost nothing: give each one numbers as training would."""
    torch.manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            for name, tensor in module.state_dict().items():
                if tensor.ndim:
                    tensor.copy_(torch.rand_like(tensor) + 0.5)
                    if name in ('bias', 'running_mean'):
                        tensor.copy_(torch.randn_like(tensor) * 0.3)
    return model


def create(name, **kwargs):
    torch.manual_seed(0)
    return trained(timm.create_model(name, num_classes=7, **kwargs))


def said(model, x, tap=None):
    tap = FeatureTap(model, tap)
    with torch.no_grad():
        output = model(x)
    feature = tap.pop()
    tap.remove()
    return feature, output


# norms that follow a convolution go; those that follow a sum, a concatenation or an activation can't
@pytest.mark.parametrize(
    ('name', 'norms', 'left'),
    [
        ('resnet34', 36, 0),
        ('mobilenetv1_100', 27, 0),
        ('densenet121', 121, 62),
        ('efficientnet_lite0', 49, 0),
        ('resnetv2_50', 49, 17),
        ('repvgg_a0', 61, 17),
        ('cifar_resnet20', 21, 0),
        ('cifar_wrn_16_2', 13, 6),
        ('cifar_vgg8', 5, 0),
        ('cifar_mobilenetv2_half', 53, 0),
        ('cifar_shufflenetv1', 49, 0),
        ('cifar_shufflenetv2', 56, 0),
    ],
)
def test_a_folded_network_says_the_same_and_the_original_is_untouched(name, norms, left):
    model = create(name)
    before = copy.deepcopy(model.state_dict())
    side = 32 if name.startswith('cifar') else 64
    folded = fold_batch_norm(model, torch.randn(2, 3, side, side))
    assert (count_batch_norms(model), count_batch_norms(folded)) == (norms, left)
    assert model.training
    assert not folded.training
    assert all(not m._forward_hooks and not m._forward_pre_hooks for net in (model, folded) for m in net.modules())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    x = torch.randn(3, 3, side, side)  # not the example
    for ours, expected in zip(said(folded, x), said(model.eval(), x), strict=True):
        assert (ours - expected).abs().max() < 1e-4 * expected.abs().max()


def test_a_convolution_carries_its_norm_as_the_formula_says():
    torch.manual_seed(0)
    model = trained(nn.Sequential(nn.Conv2d(3, 5, 3, padding=1, bias=False), nn.BatchNorm2d(5, eps=0.1), nn.Flatten(), nn.Linear(80, 2)))  # fmt: skip
    folded = fold_batch_norm(model, torch.randn(2, 3, 4, 4), tap='3')
    norm, weight = model[1], model[0].weight
    for c in range(5):
        scale = norm.weight[c] / (norm.running_var[c] + 0.1) ** 0.5
        torch.testing.assert_close(folded[0].weight[c], weight[c] * scale)
        torch.testing.assert_close(folded[0].bias[c], norm.bias[c] - norm.running_mean[c] * scale)


class Net(nn.Module):
    """Small networks in which a norm stands in special places; `fc` is the classifier."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        conv = nn.Conv2d(3, 8, 3, padding=1)
        self.conv = weight_norm(conv) if kind == 'weight norm' else conv
        self.bn = nn.BatchNorm2d(8, affine=kind != 'no affine', track_running_stats=kind != 'batch statistics')
        self.linear = nn.Linear(8, 6)
        self.bn1d = nn.BatchNorm1d(6, affine=kind != 'no affine')
        self.fc = nn.Linear(6, 2)

    def forward(self, x):
        y = self.conv(x)
        if self.kind == 'in place':
            y.mul_(2)
        z = self.bn(y)
        if self.kind == 'read twice':
            z = z + y
        if self.kind == 'repeated':
            z = self.bn(self.conv(z[:, :3]))
        if self.kind == 'norm used again':
            z = self.bn(z)
        z = self.linear(z.relu().mean((2, 3)))
        return self.fc(self.bn1d(z))


@pytest.mark.parametrize(
    ('kind', 'left'),
    [
        ('plain', 0),
        ('no affine', 0),
        ('repeated', 0),
        # only the linear layer's
        ('in place', 1),
        ('weight norm', 1),
        ('batch statistics', 1),
        # the norm has other work as well, or the layer another reader: nothing is folded, not even the linear layer's
        ('read twice', None),
        ('norm used again', None),
    ],
)
def test_norms_that_cannot_be_folded_exactly_are_left(kind, left):
    torch.manual_seed(0)
    model = trained(Net(kind))
    x = torch.randn(4, 3, 8, 8)
    folded = fold_batch_norm(model, x, tap='fc')
    assert (folded and count_batch_norms(folded)) == left
    if folded:
        for ours, expected in zip(said(folded, x, 'fc'), said(model.eval(), x, 'fc'), strict=True):
            torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


def test_a_tap_that_reads_what_a_norm_would_see_is_not_changed():
    model = trained(Net('plain'))
    assert fold_batch_norm(model, torch.randn(4, 3, 8, 8), tap='bn1d') is None


@pytest.mark.parametrize('name', ['test_vit', 'test_convnext'])
def test_a_network_without_batch_norms_is_left(name):
    assert fold_batch_norm(timm.create_model(name), torch.randn(2, 3, 160, 160)) is None


def test_a_network_that_reads_a_convolution_twice_is_left():
    # the first block of a CoAtNet normalizes the stem's convolution, and adds that to its own output
    assert fold_batch_norm(create('coatnet_nano_rw_224', img_size=64), torch.randn(1, 3, 64, 64)) is None


def test_images_that_the_network_cannot_take_leave_it():
    assert fold_batch_norm(create('resnet10t'), torch.randn(2, 4, 64, 64)) is None


def test_half_precision_is_not_folded():
    assert fold_batch_norm(create('resnet10t').bfloat16(), torch.randn(2, 3, 64, 64)) is None


def test_equality_to_rounding_is_relative_to_the_largest_value_and_never_holds_for_nothing():
    x = torch.tensor([1000.0, 0.0])
    assert equal_to_rounding(x + torch.tensor([0.05, 0.05]), x)
    assert not equal_to_rounding(x + torch.tensor([0.0, 0.2]), x)
    assert not equal_to_rounding(x, torch.tensor([[1000.0, 0.0]]))
    assert not equal_to_rounding(x * float('nan'), x)
    assert not equal_to_rounding(torch.zeros(2), torch.zeros(2))


# The teacher ---------------------------------------------------------------------------------------------------------


def test_a_teacher_folds_only_when_asked_and_on_a_copy():
    model = create('resnet10t')
    assert create_teacher(model).folded == 0
    assert create_teacher(model).model is model
    teacher = create_teacher(model, fold=True, needs_logits=True)
    assert teacher.folded == count_batch_norms(model) == 14
    assert count_batch_norms(teacher.model) == 0
    assert not any(p.requires_grad for p in teacher.parameters())
    x = torch.randn(2, 3, 64, 64)
    for ours, expected in zip(teacher(x), create_teacher(model)(x), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


def test_folding_leaves_the_module_of_the_user_as_it_was():
    model = create('resnet10t')
    before = copy.deepcopy(model.state_dict())
    create_teacher(model, fold=True, dtype=torch.bfloat16)
    assert model.training
    assert all(p.requires_grad for p in model.parameters())
    assert all(torch.equal(v, before[k]) and v.dtype == before[k].dtype for k, v in model.state_dict().items())


def test_a_folded_teacher_without_logits_follows_its_own_input_size_and_named_tap():
    model = trained(torchvision.models.resnet18(num_classes=5))
    teacher = create_teacher(model, tap='fc', fold=True, needs_logits=False)
    assert teacher.folded == 20
    x = torch.randn(2, 3, 64, 64)
    for _ in range(2):
        torch.testing.assert_close(teacher(x).feature, create_teacher(model, tap='fc')(x).feature, rtol=1e-4, atol=1e-5)


def test_a_grey_teacher_is_folded_too():
    teacher = create_teacher(create('cifar_resnet8', in_chans=1), fold=True)
    assert teacher.folded == 9
    assert teacher(torch.randn(2, 1, 32, 32)).feature.shape == (2, 64)


def test_what_cannot_be_folded_teaches_as_it_is():
    for model in (create('test_vit'), torch.compile(create('resnet10t'), backend='eager')):
        teacher = create_teacher(model, fold=True)
        assert teacher.folded == 0
        assert teacher.model is model


def test_weights_are_folded_before_they_lose_precision():
    model = create('resnet34')
    x = torch.randn(4, 3, 64, 64)
    exact = create_teacher(copy.deepcopy(model))(x).feature
    weights = {k: v.bfloat16() for k, v in create_teacher(model, fold=True).model.state_dict().items()}
    folded = create_teacher(model, fold=True, dtype=torch.bfloat16)
    plain = create_teacher(copy.deepcopy(model), dtype=torch.bfloat16)
    assert folded(x).feature.dtype == torch.bfloat16
    error, of_plain = ((t(x).feature.float() - exact).norm() for t in (folded, plain))
    assert error < 1.2 * of_plain
    assert all(torch.equal(v, weights[k]) for k, v in folded.model.state_dict().items())


def test_a_folded_teacher_compiles_runs_channels_last_and_takes_the_weights_of_another_rank():
    torch.manual_seed(0)
    ours, theirs = (create_teacher(timm.create_model('resnet10t'), fold=True, channels_last=True) for _ in range(2))
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for name, tensor in ours.state_dict().items():  # what a broadcast does
        tensor.copy_(theirs.state_dict()[name])
    x = torch.randn(2, 3, 64, 64)
    assert torch.equal(ours(x).feature, theirs(x).feature)
    expected = ours(x)
    ours.compile(backend='eager', fullgraph=True)
    torch.testing.assert_close(ours(x).feature, expected.feature)
    assert ours.model.conv1[0].weight.is_contiguous(memory_format=torch.channels_last)


def test_a_checkpoint_of_the_unfolded_network_loads(tmp_path):
    model = create('resnet10t')
    torch.save(model.state_dict(), tmp_path / 'w.pth')
    teacher = create_teacher('resnet10t', checkpoint=tmp_path / 'w.pth', fold=True)
    assert teacher.folded == 14
    x = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(teacher(x).logits, model.eval()(x), rtol=1e-4, atol=1e-5)


def test_a_student_learns_the_same_from_a_folded_teacher():
    x, y = torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 0])
    losses = []
    for fold in (False, True):
        torch.manual_seed(0)
        student = timm.create_model('cifar_resnet8', num_classes=3)
        task = ProjectorEnsembleTask(student, create_teacher(create('cifar_resnet20'), fold=fold), verbose=False)
        losses.append(task.train()(x, y)['pe_loss'].item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
