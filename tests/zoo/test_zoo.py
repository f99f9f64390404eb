"""The CIFAR networks are those of the published checkpoints, and speak timm's model API.

tests/fixtures/crd_zoo.json says how its numbers were made ('about').
"""

import json
import math
from copy import deepcopy
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.data import resolve_data_config
from timm.models import group_parameters, list_models

import timm_pe.zoo  # noqa: F401  (registers the networks)

REFERENCE = json.loads((Path(__file__).parents[1] / 'fixtures' / 'crd_zoo.json').read_text())['models']
RENAMED = {
    'MobileNetV2': 'cifar_mobilenetv2_half',
    'ShuffleV1': 'cifar_shufflenetv1',
    'ShuffleV2': 'cifar_shufflenetv2',
}
NAMES = {key: RENAMED.get(key, f'cifar_{key.lower()}') for key in REFERENCE}
FAMILIES = ('cifar_resnet8x4', 'cifar_resnet50', 'cifar_wrn_16_2', 'cifar_vgg8', *RENAMED.values())

every_network = pytest.mark.parametrize('name', NAMES.values())
every_reference = pytest.mark.parametrize('key', NAMES)
every_family = pytest.mark.parametrize('name', FAMILIES)


def _images(batch_size=2, channels=3, height=32, width=32):
    shape = (batch_size, channels, height, width)
    return torch.randn(shape, generator=torch.Generator().manual_seed(7))


def _filled_state(model):
    """The deterministic fill of the reference: entry i is drawn from the seed 1000 + i."""
    state = model.state_dict()
    for i, (key, value) in enumerate(state.items()):
        if not value.is_floating_point():
            continue
        drawn = torch.randn(value.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1000 + i))
        if key.endswith('running_var'):
            drawn = 1 + 0.1 * drawn.abs()
        elif value.ndim <= 1:
            drawn = 1 + 0.1 * drawn if 'weight' in key else 0.1 * drawn
        else:
            drawn = drawn / math.sqrt(value[0].numel())
        state[key] = drawn.to(value.dtype)
    return state


@torch.no_grad()
def _feature(model, images):
    return model.forward_head(model.forward_features(images), pre_logits=True)


def test_timm_lists_the_22_networks():
    assert sorted(list_models('cifar_*')) == sorted(NAMES.values())
    assert len(NAMES) == 22


@every_reference
def test_state_dict_is_that_of_the_published_checkpoint(key):
    model = timm.create_model(NAMES[key])
    assert [[name, list(value.shape)] for name, value in model.state_dict().items()] == REFERENCE[key]['keys']
    assert sum(parameter.numel() for parameter in model.parameters()) == REFERENCE[key]['params']
    assert model.num_features == model.head_hidden_size == REFERENCE[key]['feat_dim']


@every_reference
def test_checkpoint_file_loads_strictly_and_gives_the_published_outputs(key, tmp_path):
    path = tmp_path / 'crd.pth'
    torch.save({'epoch': 240, 'model': _filled_state(timm.create_model(NAMES[key]))}, path)
    model = timm.create_model(NAMES[key], checkpoint_path=str(path)).eval()

    with torch.no_grad():
        logits = model(_images())
    feature = _feature(model, _images())
    assert list(feature.shape) == REFERENCE[key]['feat_shape']
    # The reference has five decimals.
    torch.testing.assert_close(logits[0, :8], torch.tensor(REFERENCE[key]['logits']), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(feature[0, :8], torch.tensor(REFERENCE[key]['feat']), rtol=1e-4, atol=1e-5)


def test_mobilenetv2_does_not_clip_activations_at_6():
    model = timm.create_model('cifar_mobilenetv2_half').eval()
    model.conv2[1].bias.data.fill_(100)
    assert _feature(model, _images()).max() > 50


@every_family
def test_checkpoint_file_adapts_to_other_classes_and_channels(name, tmp_path):
    path = tmp_path / 'crd.pth'
    state = _filled_state(timm.create_model(name))
    torch.save({'model': state}, path)
    model = timm.create_model(
        name,
        pretrained=True,
        pretrained_cfg_overlay={'file': str(path)},
        num_classes=10,
        in_chans=1,
    ).eval()
    first_conv = model.pretrained_cfg['first_conv']
    grey = state[f'{first_conv}.weight'].sum(dim=1, keepdim=True)
    torch.testing.assert_close(model.get_submodule(first_conv).weight, grey)
    assert model(_images(channels=1)).shape == (2, 10)


@every_network
def test_pretrained_weights_are_refused_by_timm(name):
    with pytest.raises(RuntimeError, match=f'No pretrained weights exist for {name}'):
        timm.create_model(name, pretrained=True)


@every_network
def test_configuration_describes_cifar_100_and_the_modules(name):
    model = timm.create_model(name)
    config = resolve_data_config(model=model)
    assert config['input_size'] == (3, 32, 32)
    assert config['mean'] == (0.5071, 0.4867, 0.4408)
    assert config['std'] == (0.2675, 0.2565, 0.2761)
    assert config['crop_pct'] == 1.0
    assert model.num_classes == model.pretrained_cfg['num_classes'] == 100
    assert model.get_classifier(name_only=True) == model.pretrained_cfg['classifier']
    assert model.get_submodule(model.pretrained_cfg['classifier']) is model.get_classifier()
    assert model.get_submodule(model.pretrained_cfg['first_conv']).in_channels == 3
    with torch.no_grad():
        assert model.forward_features(_images()).shape[2:] == model.pretrained_cfg['pool_size']


@every_network
def test_head_is_sized_reset_and_removed(name):
    model = timm.create_model(name, num_classes=10, in_chans=1).eval()
    images = _images(channels=1)
    assert model(images).shape == (2, 10)
    keys = list(model.state_dict())

    model.reset_classifier(7)
    assert model.num_classes == model.get_classifier().out_features == 7
    assert model(images).shape == (2, 7)
    assert list(model.state_dict()) == keys

    feature = _feature(model, images)
    assert feature.shape == (2, model.head_hidden_size)
    assert torch.equal(model.get_classifier()(feature), model(images))

    model.reset_classifier(0)
    assert isinstance(model.get_classifier(), torch.nn.Identity)
    assert torch.equal(model(images), feature)


@every_family
def test_network_without_classes_returns_its_feature(name):
    model = timm.create_model(name, num_classes=0).eval()
    assert torch.equal(model(_images()), _feature(model, _images()))


@every_family
def test_pooling_can_be_chosen_changed_and_removed(name):
    model = timm.create_model(name, global_pool='catavgmax').eval()
    assert model.head_hidden_size == 2 * model.num_features
    assert model(_images()).shape == (2, 100)
    assert _feature(model, _images()).shape == (2, model.head_hidden_size)

    model.reset_classifier(100, global_pool='max')
    assert model.get_classifier().in_features == model.head_hidden_size == model.num_features
    assert torch.equal(_feature(model, _images()), model.forward_features(_images()).amax(dim=(2, 3)))

    model.reset_classifier(0, global_pool='')
    assert model(_images()).ndim == 4


@every_family
def test_reset_classifier_keeps_dtype_and_mode(name):
    model = timm.create_model(name).to(torch.bfloat16).eval()
    model.reset_classifier(5)
    assert model.get_classifier().weight.dtype == torch.bfloat16
    assert not any(module.training for module in model.modules())


@every_family
def test_dropout_acts_on_the_feature_in_training_only(name):
    model = timm.create_model(name, drop_rate=0.9)
    with torch.no_grad():
        feature_map = model.forward_features(_images())
        dropped = model.forward_head(feature_map, pre_logits=True)
        kept = model.eval().forward_head(feature_map, pre_logits=True)
    assert (dropped == 0).float().mean() > 0.7
    torch.testing.assert_close(kept, feature_map.mean(dim=(2, 3)))


@every_family
def test_image_size_is_free(name):
    model = timm.create_model(name).eval()
    for height, width in ((16, 16), (40, 72)):
        with torch.no_grad():
            assert model(_images(height=height, width=width)).shape == (2, 100)


@every_network
def test_an_optimizer_step_trains_every_parameter(name):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10)
    before = {key: parameter.detach().clone() for key, parameter in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)

    loss = F.cross_entropy(model(_images(batch_size=4)), torch.arange(4))
    loss.backward()
    optimizer.step()
    assert loss.isfinite()
    # Even a bias in front of batch norm moves, by rounding: what stays is in no graph or in no parameter group.
    unmoved = [key for key, value in model.named_parameters() if value.grad is None or torch.equal(value, before[key])]
    assert not unmoved


@every_family
def test_convolutions_start_from_fan_out_except_in_shufflenets(name):
    torch.manual_seed(0)
    model = timm.create_model(name)
    for module in model.modules():
        # Standard deviations of small tensors scatter too much to tell.
        if isinstance(module, torch.nn.Conv2d) and module.weight.numel() > 4000:
            size = module.kernel_size[0] * module.kernel_size[1]
            fan_in = module.in_channels // module.groups * size
            expected = math.sqrt(2 / (module.out_channels * size))
            if 'shufflenet' in name:
                expected = math.sqrt(1 / (3 * fan_in))
            assert module.weight.std().item() == pytest.approx(expected, rel=0.1)


@every_family
def test_a_deep_copy_gives_the_same_outputs_and_shares_nothing(name):
    model = timm.create_model(name).eval()
    copied = deepcopy(model)
    with torch.no_grad():
        expected = model(_images())
        assert torch.equal(copied(_images()), expected)
        for parameter in copied.parameters():
            parameter.zero_()
        assert torch.equal(model(_images()), expected)


@every_family
def test_gradient_checkpointing_gives_the_same_gradients(name):
    model = timm.create_model(name)
    recomputed = deepcopy(model)
    recomputed.set_grad_checkpointing()
    targets = torch.arange(2)
    for network in (model, recomputed):
        F.cross_entropy(network(_images()), targets).backward()
    for parameter, other in zip(model.parameters(), recomputed.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, other.grad)


@every_network
def test_feature_maps_are_as_feature_info_says(name):
    backbone = timm.create_model(name, features_only=True).eval()
    with torch.no_grad():
        maps = backbone(_images(height=64, width=64))
    assert [x.shape[1] for x in maps] == backbone.feature_info.channels()
    assert [64 // x.shape[2] for x in maps] == backbone.feature_info.reduction()


@every_network
def test_parameter_groups_follow_the_depth(name):
    model = timm.create_model(name)
    for coarse in (False, True):
        group_of = group_parameters(model, model.group_matcher(coarse), reverse=True)
        depths = [group_of[key] for key, _ in model.named_parameters()]
        assert depths == sorted(depths)
        assert len(set(depths)) > 3
        # Only the classifier may be left to the last group, where parameters that match nothing go.
        last = {key.rpartition('.')[0] for key, depth in group_of.items() if depth == max(depths)}
        assert last == {model.get_classifier(name_only=True)}


@pytest.mark.parametrize(
    'name', ['cifar_resnet8', 'cifar_vgg8', 'cifar_wrn_16_1', 'cifar_shufflenetv2', 'cifar_mobilenetv2_half']
)
def test_a_network_is_made_on_the_device_and_in_the_precision_it_is_asked_for(name):
    model = timm.create_model(name, num_classes=3, device='meta', dtype=torch.bfloat16)
    assert {(p.device.type, p.dtype) for p in model.parameters()} == {('meta', torch.bfloat16)}
