"""The tap gives what timm calls pre_logits, from the one forward that gave the logits."""

import copy
import pickle
from dataclasses import replace

import pytest
import timm
import torch
import torchvision
from timm.models.byobnet import ByobNet, model_cfgs
from timm.utils import ModelEmaV3
from torch import nn

from timm_pe.method.tap import FeatureTap
from timm_pe.method.teacher import create_teacher


def _byobnet(**kwargs):
    """An attention pool whose projection is the classifier and sees every token."""
    return ByobNet(replace(model_cfgs['test_byobnet'], head_type='attn_abs'), img_size=64, **kwargs)


def _timm(name, size=64, **model_kwargs):
    return lambda **kwargs: (timm.create_model(name, **{**model_kwargs, **kwargs}).eval(), _images(size))


def _images(size):
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))


# one small member of each structure of classifier; name: how it is built
CLASSIFIERS = {
    'linear': _timm('test_resnet'),
    'linear after tokens': _timm('test_vit', 160, depth=1),
    'linear in a head with a norm': _timm('test_convnext'),
    'linear after a hidden layer': _timm('efficientvit_b0'),
    'linear after a head conv': _timm('test_efficientnet'),
    'linear with a norm of pooled vectors': _timm('shvit_s1'),
    'the same, in a head with more': _timm('efficientvit_m0', img_size=64),
    'two of them in one module': _timm('repvit_m0_9'),
    'mlp': _timm('test_mambaout'),
    '1x1 conv': _timm('dla46x_c'),
    'head module': _timm('sequencer2d_s', 56, layers=(1,) * 4, embed_dims=(16,) * 4, hidden_sizes=(8,) * 4),
    'head module that pools a map': _timm('samvit_base_patch16_224', img_size=64, embed_dim=32, depth=1, num_heads=2),
    'head module with a hidden layer': _timm(
        'samvit_base_patch16_224', img_size=64, embed_dim=32, depth=1, num_heads=2, head_hidden_size=24
    ),
    'attention pool': lambda **kwargs: (_byobnet(**kwargs).eval(), _images(64)),
    'two heads with one input': _timm('levit_128s', img_size=64, depth=(1, 1, 1)),
    'two heads on two tokens': _timm('deit_tiny_distilled_patch16_224', img_size=64, depth=1),
    'two heads on two pooled tokens': _timm('pit_ti_distilled_224', img_size=64, depth=(1, 1, 1)),
    'two heads, one left out': _timm('efficientformerv2_s0', img_size=64, distillation=False),
    'two heads on a map': _timm('swiftformer_xs'),
    'a head a branch': _timm(
        'crossvit_tiny_240', 240, depth=[[1, 1, 0]], embed_dim=(32, 16), num_heads=(2, 2), mlp_ratio=(1.0, 1.0, 1.0)
    ),
    'a head a stage': _timm('efficientvim_m1'),
    'two heads a stage': _timm('efficientvim_m1_dist'),
}
ENCODERS = {
    'tokens': _timm('gemma4_vit_167m_enc', 96, embed_dim=32, depth=1, num_heads=2, head_dim=16, intermediate_size=64),
    'merged tokens': _timm('qwen3_vit_88m_enc', embed_dim=32, depth=1, num_heads=2),
}
every_classifier = pytest.mark.parametrize('build', CLASSIFIERS.values(), ids=CLASSIFIERS)


class Trainable(nn.Module):
    """What a training loop wraps: the student with its tap."""

    def __init__(self, student, **kwargs):
        super().__init__()
        self.student = student
        self.tap = FeatureTap(student, **kwargs)

    def forward(self, x):
        return self.student(x), self.tap.pop()


def _randomize_norms(model):
    # as initialized, a norm in eval does almost nothing: its output would pass for its input
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d | nn.LayerNorm):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)


@every_classifier
def test_feature_equals_pre_logits_in_eval(build):
    model, x = build()
    _randomize_norms(model)
    tap = FeatureTap(model)
    model(x)
    feature = tap.pop()
    torch.testing.assert_close(feature, model.forward_head(model.forward_features(x), pre_logits=True))
    assert feature.shape == (2, tap.width)


@every_classifier
def test_feature_is_the_same_without_a_classifier(build):
    model, x = build(num_classes=0)
    tap = FeatureTap(model)
    model(x)
    feature = tap.pop()
    torch.testing.assert_close(feature, model.forward_head(model.forward_features(x), pre_logits=True))
    assert feature.shape == (2, tap.width)


@every_classifier
def test_width_and_feature_follow_a_classifier_reset_before_the_tap_is_made(build):
    model, x = build()
    width = FeatureTap(model).width
    model.reset_classifier(7)
    tap = FeatureTap(model)
    assert model(x).shape == (2, 7)
    assert tap.pop().shape == (2, tap.width) == (2, width)


@pytest.mark.parametrize('build', ENCODERS.values(), ids=ENCODERS)
def test_feature_of_an_encoder_is_its_output_averaged_over_positions(build):
    model, x = build()
    tap = FeatureTap(model)
    tokens = model(x)
    assert tokens.ndim == 3 and tap.width == tokens.shape[2]
    torch.testing.assert_close(tap.pop(), tokens.mean(1))


@pytest.mark.parametrize('name', ['test_resnet', 'test_vit', 'test_convnext', 'test_mambaout'])
def test_feature_of_a_model_that_does_not_pool_is_averaged_over_positions(name):
    model = timm.create_model(name, num_classes=0, global_pool='').eval()
    tap = FeatureTap(model)
    output = model(_images(160))
    positions = {3: (1,), 4: (2, 3) if output.shape[1] == tap.width else (1, 2)}[output.ndim]
    torch.testing.assert_close(tap.pop(), output.mean(positions))


def test_width_counts_what_pooling_doubles():
    for num_classes in (10, 0):
        model = timm.create_model('test_resnet', num_classes=num_classes, global_pool='catavgmax')
        tap = FeatureTap(model)
        model(_images(64))
        assert tap.pop().shape == (2, tap.width) == (2, 2 * 96)


def test_what_enters_a_module_that_begins_in_place_is_not_what_it_makes_of_it():
    model = nn.Sequential(nn.Flatten(), nn.Sequential(nn.Dropout(0.5, inplace=True), nn.Linear(12, 5))).train()
    tap = FeatureTap(model, '1')
    x = torch.rand(4, 3, 2, 2) + 1
    entered = x.flatten(1).clone()
    model(x)
    assert torch.equal(tap.pop(), entered)


@pytest.mark.parametrize('kind', [kind for kind in CLASSIFIERS if kind.startswith('two heads ')])
@pytest.mark.parametrize('num_classes', [10, 0])
def test_feature_in_distilled_training_is_the_one_of_eval(kind, num_classes):
    model, x = CLASSIFIERS[kind](num_classes=num_classes)
    tap = FeatureTap(model)
    model(x)
    feature = tap.pop()
    model.set_distilled_training(True)
    # eval mode but for the flag that the heads read: batch norm and drop path stay as they are
    model.training = True
    model(x)
    torch.testing.assert_close(tap.pop(), feature)


@pytest.mark.parametrize(
    'kind', [kind for kind in CLASSIFIERS if kind.startswith(('linear', 'head module')) and 'pooled' not in kind]
)
def test_logits_and_feature_share_one_dropout_mask(kind):
    torch.manual_seed(0)
    model, x = CLASSIFIERS[kind](drop_rate=0.5)
    model.train()
    classifier = model.get_classifier()
    classifier = getattr(classifier, 'fc', classifier)
    entered = []
    classifier.register_forward_pre_hook(lambda module, args: entered.append(args[0]))
    tap = FeatureTap(model)
    logits = model(x)
    feature = tap.pop()
    assert feature is entered[0]
    assert (feature == 0).float().mean() > 0.3
    torch.testing.assert_close(classifier(feature), logits)


@every_classifier
def test_feature_carries_gradient_to_the_backbone(build):
    model, x = build()
    tap = FeatureTap(model)
    model(x)
    tap.pop().square().sum().backward()
    assert any(p.grad is not None for p in model.parameters())
    with torch.no_grad():
        model(x)
    assert not tap.pop().requires_grad


def test_feature_keeps_its_gradient_under_gradient_checkpointing():
    grads = []
    model = timm.create_model('test_vit').eval()
    tap = FeatureTap(model)
    for enable in (False, True):
        model.zero_grad()
        model.set_grad_checkpointing(enable)
        model(_images(160))
        tap.pop().square().sum().backward()
        grads.append(model.patch_embed.proj.weight.grad.clone())
    torch.testing.assert_close(*grads)
    with pytest.raises(RuntimeError):
        tap.pop()


@every_classifier
def test_deepcopy_is_independent_and_works(build):
    model, x = build()
    trainable = Trainable(model).train()
    trainable.student(x)  # leaves a feature in the tap, part of a graph
    clone = copy.deepcopy(trainable).eval()
    with pytest.raises(RuntimeError):
        clone.tap.pop()
    trainable.tap.pop()
    with torch.no_grad():
        for p in clone.student.parameters():
            p.mul_(1.5)
    feature = clone(x)[1]
    torch.testing.assert_close(feature, clone.student.forward_head(clone.student.forward_features(x), pre_logits=True))
    with pytest.raises(RuntimeError):
        trainable.tap.pop()
    clone.tap.remove()
    assert trainable(x)[1].shape == feature.shape


def test_ema_of_the_trainable_module_has_a_tap_of_its_own():
    trainable = Trainable(timm.create_model('test_resnet'))
    ema = ModelEmaV3(trainable, decay=0.5)
    with torch.no_grad():
        trainable.student.fc.weight.add_(1.0)
    ema.update(trainable)
    x = _images(64)
    logits, feature = ema.module(x)
    torch.testing.assert_close(ema.module.student.fc(feature), logits)
    with pytest.raises(RuntimeError):
        trainable.tap.pop()


def test_pickled_module_keeps_its_tap():
    trainable = Trainable(timm.create_model('test_resnet').eval())
    clone = pickle.loads(pickle.dumps(trainable))
    x = _images(64)
    torch.testing.assert_close(clone(x), trainable(x))


@pytest.mark.parametrize(
    ('kind', 'num_classes'),
    [
        ('linear after tokens', 10),
        ('linear after tokens', 0),
        ('attention pool', 10),
        ('two heads on two tokens', 10),
        ('a head a branch', 10),
    ],
)
def test_forward_and_pop_compile_to_one_graph(kind, num_classes):
    model, x = CLASSIFIERS[kind](num_classes=num_classes)
    trainable = Trainable(model)
    expected = trainable(x)
    torch._dynamo.reset()
    compiled = torch.compile(trainable, fullgraph=True, backend='aot_eager')
    for _ in range(2):
        logits, feature = compiled(x)
        torch.testing.assert_close((logits, feature), expected)
    feature.sum().backward()
    assert any(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize('num_classes', [10, 0])
def test_model_compiled_after_its_tap_is_made_still_fires_it(num_classes):
    model, x = CLASSIFIERS['linear after tokens'](num_classes=num_classes)
    tap = FeatureTap(model)
    model(x)
    expected = tap.pop()
    torch._dynamo.reset()
    torch.compile(model, backend='aot_eager')(x)
    torch.testing.assert_close(tap.pop(), expected)


def test_feature_can_be_popped_once_per_forward():
    model = timm.create_model('test_resnet').eval()
    tap = FeatureTap(model)
    with pytest.raises(RuntimeError, match='ResNet'):
        tap.pop()
    model(_images(64))
    tap.pop()
    with pytest.raises(RuntimeError, match='ResNet'):
        tap.pop()


def test_pop_gives_the_last_of_several_forwards():
    model = timm.create_model('test_resnet').eval()
    tap = FeatureTap(model)
    first, last = _images(64), _images(64) + 1
    model(last)
    expected = tap.pop()
    model(first)
    model(last)
    assert torch.equal(tap.pop(), expected)


def test_removed_tap_leaves_the_model_without_hooks():
    model = timm.create_model('efficientvim_m1_dist').eval()
    tap = FeatureTap(model)
    assert sum(len(m._forward_pre_hooks) for m in model.modules()) == 8
    tap.remove()
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
    model(_images(64))
    with pytest.raises(RuntimeError):
        tap.pop()


def test_classifier_replaced_after_the_tap_is_made_is_an_error():
    model = timm.create_model('test_resnet')
    tap = FeatureTap(model)
    model.reset_classifier(7)
    model(_images(64))
    with pytest.raises(RuntimeError, match='replaced'):
        tap.pop()


@pytest.mark.parametrize(
    'classifier', [nn.Linear(96, 5), nn.Sequential(nn.Dropout(), nn.Linear(96, 8), nn.Linear(8, 5)), nn.Identity()]
)
def test_classifier_put_in_by_hand_is_tapped(classifier):
    for num_classes in (10, 0):
        model = timm.create_model('test_resnet', num_classes=num_classes).eval()
        model.fc = classifier
        tap = FeatureTap(model)
        x = _images(64)
        model(x)
        torch.testing.assert_close(tap.pop(), model.forward_head(model.forward_features(x), pre_logits=True))
        assert tap.width == 96


def test_classifier_of_an_unknown_kind_is_tapped():
    class Cosine(nn.Module):
        def __init__(self):
            super().__init__()
            self.prototypes = nn.Parameter(torch.randn(5, 96))

        def forward(self, x):
            return nn.functional.cosine_similarity(x[:, None], self.prototypes, dim=-1)

    model, x = timm.create_model('test_resnet').eval(), _images(64)
    model.fc = Cosine()
    trainable = Trainable(model)
    torch.testing.assert_close(trainable(x)[1], model.forward_head(model.forward_features(x), pre_logits=True))


@pytest.mark.parametrize(
    ('name', 'path', 'width'),
    [
        ('resnet18', 'fc', 512),
        ('squeezenet1_1', 'classifier.1', 512),
        ('mobilenet_v3_small', 'classifier', 576),
        ('mobilenet_v3_small', 'classifier.3', 1024),
        ('swin_t', 'head', 768),
    ],
)
def test_path_taps_the_input_of_any_module(name, path, width):
    model = torchvision.models.get_model(name).eval()
    tap = FeatureTap(model, path)
    assert tap.width == width
    entered = []
    model.get_submodule(path).register_forward_pre_hook(lambda module, args: entered.append(args[0]))
    model(_images(224))
    expected = entered[0].mean((2, 3)) if entered[0].ndim == 4 else entered[0]
    torch.testing.assert_close(tap.pop(), expected)


@pytest.mark.parametrize(
    ('name', 'path', 'size', 'positions'),
    [
        ('cifar_resnet8x4', 'layer1', 32, (2, 3)),
        ('test_efficientnet', 'blocks.1', 32, (2, 3)),
        ('test_resnet', 'conv1.1', 32, (2, 3)),
        ('test_mambaout', 'stages.1', 96, (1, 2)),
    ],
)
def test_a_map_of_as_many_columns_as_channels_is_averaged_over_its_positions(name, path, size, positions):
    model = timm.create_model(name).eval()
    entered = []
    model.get_submodule(path).register_forward_pre_hook(lambda _, args: entered.append(args[0]))
    model(_images(size))
    channels = entered[0].shape[1 if positions == (2, 3) else -1]
    side = size * channels // entered[0].shape[2]  # where the map is as wide as it has channels
    tap = FeatureTap(model, path)
    model(_images(side))
    assert entered[-1].shape[1:] == (channels,) * 3
    torch.testing.assert_close(tap.pop(), entered[-1].mean(positions))


def test_path_taps_plain_modules_called_with_a_keyword():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.out = nn.Linear(4, 3), nn.Linear(3, 2)

        def forward(self, x):
            return self.out(input=self.body(x))

    model, x = Net(), torch.randn(5, 4)
    tap = FeatureTap(model, 'out')
    model(x)
    torch.testing.assert_close(tap.pop(), model.body(x))


def test_path_taps_another_module_than_the_classifier_of_a_timm_model():
    model = timm.create_model('test_resnet').eval()
    tap = FeatureTap(model, 'layer4')
    x = _images(64)
    model(x)
    maps = model.layer3(model.layer2(model.layer1(model.maxpool(model.act1(model.bn1(model.conv1(x)))))))
    torch.testing.assert_close(tap.pop(), maps.mean((2, 3)))


@pytest.mark.parametrize(
    ('path', 'told'), [('head', 'layer4'), ('layer5', 'layer4'), ('', 'fc'), ('global', 'global_pool')]
)
def test_unknown_path_is_refused_with_names_that_exist(path, told):
    with pytest.raises(ValueError, match=f"ResNet has no module '{path}'.*{told}"):
        FeatureTap(timm.create_model('test_resnet'), path)


def test_path_whose_width_nothing_tells_is_refused_with_the_remedy():
    with pytest.raises(ValueError, match='how wide the penultimate feature of ResNet is.*path='):
        FeatureTap(torchvision.models.resnet18(), 'avgpool')


def test_model_that_is_not_timms_is_refused_with_the_remedy():
    with pytest.raises(ValueError, match="ResNet has no get_classifier.*path=.*'fc'"):
        FeatureTap(torchvision.models.resnet18())
    with pytest.raises(ValueError, match='ReLU has no get_classifier.*path='):
        FeatureTap(nn.ReLU())
    with pytest.raises(ValueError, match='FeatureListNet.*path='):
        FeatureTap(timm.create_model('test_resnet', features_only=True))


class Headed(nn.Module):
    """A module with timm's forwards and without its get_classifier()."""

    def __init__(self, num_classes=6):
        super().__init__()
        self.num_classes, self.num_features = num_classes, 6
        self.conv = nn.Conv2d(3, 6, 3)
        self.fc = nn.Linear(6, num_classes) if num_classes else nn.Identity()

    def forward_features(self, x):
        return self.conv(x)

    def forward_head(self, x, pre_logits=False):
        x = x.mean((2, 3))
        return x if pre_logits else self.fc(x)

    def forward(self, x):
        return self.forward_head(self.forward_features(x))


def test_a_classifier_that_nothing_tells_of_is_refused_with_the_remedy():
    with pytest.raises(
        ValueError, match=r"Headed has no get_classifier.*path=, of a teacher tap= or --teacher-tap.*'fc'"
    ):
        FeatureTap(Headed())
    with pytest.raises(ValueError, match='Headed has no get_classifier.*tap='):
        create_teacher(Headed(num_classes=9))
    assert create_teacher(Headed(), tap='fc').width == 6
    assert FeatureTap(Headed(num_classes=0)).width == 6  # an encoder


def test_model_that_does_not_find_its_own_classifier_is_refused_with_the_remedy():
    model = timm.create_model('shvit_s1').eval().fuse()
    with pytest.raises(ValueError, match='SHViT does not find its own classifier.*path='):
        FeatureTap(model)
    tap = FeatureTap(model, 'head')
    model(_images(64))
    assert tap.pop().shape == (2, tap.width)


def test_encoder_that_does_not_tell_its_width_is_refused_with_the_remedy():
    class Encoder(nn.Module):
        def forward_features(self, x):
            return x

    with pytest.raises(ValueError, match='how wide the penultimate feature of Encoder is.*path='):
        FeatureTap(Encoder())


def test_feature_of_another_width_than_the_structure_told_is_an_error():
    model = timm.create_model('test_resnet', num_classes=0)
    model.head_hidden_size = 7
    tap = FeatureTap(model)
    model(_images(64))
    with pytest.raises(ValueError, match='ResNet is 96 wide.*7.*path='):
        tap.pop()


def test_input_that_is_no_tensor_is_an_error_with_the_remedy():
    class Branches(nn.Linear):
        def forward(self, xs):
            return sum(super(Branches, self).forward(x) for x in xs)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.out = Branches(3, 2)

        def forward(self, x):
            return self.out([x, x])

    model = Net()
    FeatureTap(model, 'out')
    with pytest.raises(ValueError, match='not a list.*path='):
        model(torch.randn(5, 3))


def test_feature_passes_through_ddp(tmp_path):
    torch.distributed.init_process_group('gloo', init_method=f'file://{tmp_path}/store', rank=0, world_size=1)
    try:
        trainable = Trainable(timm.create_model('test_resnet').eval())
        x = _images(64)
        expected = trainable(x)
        logits, feature = nn.parallel.DistributedDataParallel(trainable)(x)
        torch.testing.assert_close((logits, feature), expected)
        (logits.sum() + feature.sum()).backward()
        assert trainable.student.fc.weight.grad is not None
    finally:
        torch.distributed.destroy_process_group()


ONE_LAYER_CLASSIFIES = [
    *('test_resnet', 'test_vit', 'test_convnext', 'test_efficientnet', 'cifar_resnet8', 'densenet121'),
    *('mambaout_femto', 'inception_next_atto', 'shvit_s1'),
]


@pytest.mark.parametrize('name', ONE_LAYER_CLASSIFIES)
def test_before_dropout_the_feature_is_whole_and_the_logits_stay_bit_for_bit(name):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5, drop_rate=0.5).train()
    images = torch.randn(4, 3, *model.pretrained_cfg['input_size'][1:])
    untouched = copy.deepcopy(model)
    torch.manual_seed(1)
    expected = untouched(images)
    tap = FeatureTap(model, before_dropout=True)
    entered = []
    classifier = model.head if name == 'shvit_s1' else model.get_classifier()  # with the norm that is a part of it
    classifier.register_forward_pre_hook(lambda _, args: entered.append(args[0].flatten(1)))
    torch.manual_seed(1)
    assert torch.equal(model(images), expected)
    feature = tap.pop()
    kept = entered[0] != 0
    assert 0.2 < kept.float().mean() < 0.8
    torch.testing.assert_close(entered[0][kept], 2 * feature[kept])
    assert (feature[~kept] != 0).float().mean() > 0.5


def test_before_dropout_nothing_drops_in_eval_and_a_deepcopy_drops_on_its_own():
    model = timm.create_model('test_vit', num_classes=5, drop_rate=0.5)
    holder = nn.ModuleDict({'model': model})
    holder.tap = FeatureTap(model, before_dropout=True)
    other = copy.deepcopy(holder)
    images = torch.randn(2, 3, 160, 160)
    for each in (holder, other):
        each.eval()
        logits = each['model'](images)
        torch.testing.assert_close(each['model'].get_classifier()(each.tap.pop()), logits)
        each.train()
        assert not torch.equal(each['model'](images), each['model'](images))
        each.tap.pop()
    assert not torch.equal(holder['model'](images), holder['model'].eval()(images))


def test_removing_a_tap_gives_the_dropout_back_for_a_new_classifier_too():
    model = timm.create_model('test_resnet', num_classes=5, drop_rate=0.5)
    tap = FeatureTap(model, before_dropout=True)
    assert model.drop_rate == 0
    model.reset_classifier(7)  # which the tap does not see
    features = torch.ones(1, model.num_features, 4, 4)
    assert torch.equal(model.forward_head(features), model.forward_head(features))
    tap.remove()
    assert model.drop_rate == 0.5
    assert not torch.equal(model.forward_head(features), model.forward_head(features))


def test_a_classifier_that_drops_itself_drops_once():
    torch.manual_seed(0)
    model = timm.create_model('levit_256d', num_classes=5, drop_rate=0.5, img_size=96).train()
    images = torch.randn(2, 3, 96, 96)
    untouched = copy.deepcopy(model)
    FeatureTap(model, before_dropout=True)
    outputs = []
    for each in (untouched, model):
        torch.manual_seed(1)
        outputs.append(each(images))
    assert torch.equal(*outputs)


def test_two_heads_keep_their_dropout():
    model = timm.create_model('deit_tiny_distilled_patch16_224', num_classes=5, drop_rate=0.5).train()
    images = torch.randn(2, 3, 224, 224)
    untouched = copy.deepcopy(model)
    FeatureTap(model, before_dropout=True)
    outputs = []
    for each in (untouched, model):
        torch.manual_seed(1)
        outputs.append(each(images))
    assert torch.equal(*outputs)
