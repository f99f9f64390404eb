import copy
import os
import pickle

import pytest
import safetensors.torch
import timm
import torch
import torch.nn as nn
from timm.task import DistillationTeacher

from timm_pe import ProjectorEnsembleTask, UsageError, create_teacher


@pytest.fixture
def model():
    torch.manual_seed(0)
    return timm.create_model('test_vit', num_classes=7)


def test_the_batch_is_renormalized_from_what_the_loader_used_to_the_teachers_own():
    torch.manual_seed(0)
    model = timm.create_model('resnet10t', num_classes=3).eval()
    pixels = torch.rand(2, 3, 64, 64)
    mean, std = torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0.5, 0.6, 0.7])
    teacher = create_teacher(model, input_mean=mean.tolist(), input_std=std.tolist())
    out = teacher((pixels - mean.view(3, 1, 1)) / std.view(3, 1, 1))
    cfg = model.pretrained_cfg
    own = (pixels - torch.tensor(cfg['mean']).view(3, 1, 1)) / torch.tensor(cfg['std']).view(3, 1, 1)
    torch.testing.assert_close(out.logits, model(own), rtol=1e-4, atol=1e-5)
    feature = model.forward_head(model.forward_features(own), pre_logits=True)
    torch.testing.assert_close(out.feature, feature, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ('given', 'named'),
    [
        ({'num_classes': 7}, 'num_classes'),
        ({'in_chans': 9}, 'in_chans'),
        ({'model_kwargs': {'drop_rate': 0.1}}, 'model_kwargs'),
    ],
)
def test_a_module_is_not_made_anew_for_an_argument(model, given, named):
    with pytest.raises(UsageError, match=f'a module is given as the teacher, and {named} cannot change it'):
        create_teacher(model, **given)


@pytest.mark.parametrize(
    'given',
    [{'checkpoint': '/nope'}, {'pretrained': False}, {'use_ema': False}, {'dtype': torch.bfloat16}, {'tap': 'fc'}],
)
def test_a_teacher_that_is_made_already_takes_no_argument(model, given):
    teacher = create_teacher(model)
    assert create_teacher(teacher) is teacher
    with pytest.raises(
        UsageError, match=f'a Teacher is given as the teacher, and {next(iter(given))} cannot change it'
    ):
        create_teacher(teacher, **given)


def test_equal_normalization_leaves_the_batch_untouched(model):
    teacher = create_teacher(model, input_mean=(0.5,) * 3, input_std=(0.5,) * 3)
    x = torch.randn(2, 3, 160, 160)
    assert teacher.adapt_input(x) is x


def test_it_stays_frozen_and_in_eval_mode(model):
    teacher = create_teacher(model.train())
    teacher.train()
    assert not any(m.training for m in teacher.modules())
    out = teacher(torch.randn(2, 3, 160, 160, requires_grad=True))
    assert not out.feature.requires_grad
    assert not out.logits.requires_grad


def test_its_own_precision_is_used_under_autocast_too(model):
    teacher = create_teacher(model, dtype=torch.bfloat16)
    with torch.autocast('cpu', dtype=torch.float16):
        assert teacher(torch.randn(2, 3, 160, 160)).feature.dtype == torch.bfloat16


@pytest.mark.parametrize('form', ['safetensors', 'plain', 'state_dict', 'model', 'ddp', 'compiled', 'ema'])
def test_checkpoints_load_in_the_forms_that_users_hold(model, tmp_path, form):
    state = model.state_dict()
    path = tmp_path / ('weights.safetensors' if form == 'safetensors' else 'weights.pth.tar')
    other = {k: torch.zeros_like(v) for k, v in state.items()}
    if form == 'safetensors':
        safetensors.torch.save_file(state, path)
    else:
        content = {
            'plain': state,
            'state_dict': {'state_dict': state, 'epoch': 3},
            'model': {'model': state},
            'ddp': {'state_dict': {f'module.{k}': v for k, v in state.items()}},
            'compiled': {'state_dict': {f'_orig_mod.{k}': v for k, v in state.items()}},
            'ema': {'state_dict': other, 'state_dict_ema': state},
        }[form]
        torch.save(content, path)
    teacher = create_teacher('test_vit', checkpoint=path)
    assert teacher.num_classes == 7
    x = torch.randn(2, 3, 160, 160)
    assert torch.equal(teacher(x).logits, model.eval()(x))


def test_without_ema_the_plain_weights_of_a_checkpoint_are_taken(model, tmp_path):
    state = model.state_dict()
    torch.save({'state_dict': state, 'state_dict_ema': {k: v * 0 for k, v in state.items()}}, tmp_path / 'w.pth')
    teacher = create_teacher('test_vit', checkpoint=tmp_path / 'w.pth', use_ema=False)
    assert torch.equal(teacher.model.head.weight, state['head.weight'])


def test_a_local_dir_teacher_brings_its_weights_and_classes(model, tmp_path):
    timm.models.save_for_hf(model, tmp_path, safe_serialization=True)
    teacher = create_teacher(f'local-dir:{tmp_path}')
    assert teacher.num_classes == 7
    assert torch.equal(teacher.model.head.weight, model.head.weight)


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def bad_checkpoint(kind, model, tmp_path):
    path = tmp_path / 'bad.pth'
    if kind == 'missing':
        return path, 'no file'
    if kind == 'pickled code':
        torch.save({'state_dict': model.state_dict(), 'extra': Evil(str(tmp_path / 'owned'))}, path)
        return path, r'holds code \(posix.mkdir\)'
    if kind == 'bare pickle':
        path.write_bytes(pickle.dumps(Evil(str(tmp_path / 'owned'))))
        return path, 'is not a PyTorch checkpoint'
    if kind == 'other architecture':
        torch.save(timm.create_model('test_resnet').state_dict(), path)
        return path, 'does not fit VisionTransformer: .* missing keys .* unexpected keys'
    if kind == 'other width':
        state = model.state_dict()
        state['norm.weight'] = torch.zeros(3)
        torch.save(state, path)
        return path, r'1 other shapes \(norm.weight \[3\] for \[64\]\)'
    if kind == 'empty file':
        path.write_bytes(b'')
        return path, 'is empty'
    if kind == 'text file':
        path.write_text('hello')
        return path, 'is not a PyTorch checkpoint'
    if kind == 'truncated':
        torch.save(model.state_dict(), path)
        path.write_bytes(path.read_bytes()[:1000])
        return path, 'is cut off or damaged'
    if kind == 'lying safetensors':
        path = tmp_path / 'bad.safetensors'
        path.write_bytes((2**40).to_bytes(8, 'little') + b'{}')
        return path, 'cannot read'
    if kind == 'no tensors':
        torch.save({'epoch': 3}, path)
        return path, 'is no state_dict'
    if kind == 'empty folder':
        return tmp_path, 'holds no checkpoint'
    raise AssertionError(kind)


@pytest.mark.parametrize(
    'kind',
    ['missing', 'pickled code', 'bare pickle', 'other architecture', 'other width', 'empty file', 'text file', 'truncated', 'lying safetensors', 'no tensors', 'empty folder'],
)  # fmt: skip
def test_a_bad_checkpoint_is_one_line_and_runs_no_code(model, tmp_path, kind):
    path, message = bad_checkpoint(kind, model, tmp_path)
    with pytest.raises(UsageError, match=message) as e:
        create_teacher('test_vit', checkpoint=path, what='--teacher-checkpoint')
    assert '\n' not in str(e.value)
    assert not (tmp_path / 'owned').exists()


@pytest.mark.parametrize(
    ('name', 'message'),
    [
        ('resnet34d_', 'unknown model .*did you mean .*resnet34d'),
        ('zzzzzzzz', 'list_models'),
        ('resnet18.a9', 'has no such tag, it has .*a1_in1k'),
        ('local-dir:/no/such/folder', 'no folder with a config.json'),
        ('timm/resnet18', 'hf-hub:timm/resnet18'),
        ('resnet18', 'no pretrained weights .*checkpoint file'),
        ('cifar_resnet8', 'no pretrained weights'),
    ],
)
def test_a_teacher_that_cannot_be_had_is_one_line_with_a_remedy(name, message):
    with pytest.raises(UsageError, match=message) as e:
        create_teacher(name)
    assert '\n' not in str(e.value)


def test_numbers_of_channels_other_than_1_and_3_are_refused(model):
    with pytest.raises(UsageError, match='student sees 2 channels and the teacher 3'):
        create_teacher(model, input_mean=(0.5,) * 2, input_std=(0.5,) * 2)


def test_a_colour_teacher_sees_a_grey_batch_in_three_equal_channels():
    model = timm.create_model('resnet10t', num_classes=3).eval()
    pixels = torch.rand(2, 1, 64, 64)
    teacher = create_teacher(model, input_mean=(0.1,), input_std=(0.3,))
    cfg = model.pretrained_cfg
    own = (pixels.expand(-1, 3, -1, -1) - torch.tensor(cfg['mean']).view(3, 1, 1)) / torch.tensor(cfg['std']).view(
        3, 1, 1
    )
    torch.testing.assert_close(teacher.adapt_input((pixels - 0.1) / 0.3), own, rtol=1e-4, atol=1e-5)


def test_a_grey_teacher_sees_a_colour_batch_as_pil_would_convert_it():
    import numpy as np
    from PIL import Image

    array = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    grey = torch.from_numpy(np.array(Image.fromarray(array).convert('L'))) / 255
    mean, std = torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1), torch.tensor([0.5, 0.6, 0.7]).view(3, 1, 1)
    x = ((torch.from_numpy(array).permute(2, 0, 1) / 255 - mean) / std)[None]
    model = timm.create_model('cifar_resnet8', num_classes=3, in_chans=1)
    teacher = create_teacher(model, input_mean=mean.flatten().tolist(), input_std=std.flatten().tolist(), mean=(0.4,), std=(0.2,))  # fmt: skip
    own = (grey - 0.4) / 0.2
    assert teacher.adapt_input(x).shape == (1, 1, 16, 16)
    # PIL rounds to whole grey levels
    torch.testing.assert_close(teacher.adapt_input(x)[0, 0], own, rtol=0, atol=0.6 / 255 / 0.2)


def test_a_teacher_that_cannot_take_the_students_size_sees_its_own():
    fixed = create_teacher('vit_tiny_patch16_224', pretrained=False, model_kwargs={'img_size': 64})
    flexible = create_teacher('resnet10t', pretrained=False)
    asked = create_teacher('resnet10t', pretrained=False, input_size=48)
    x = torch.randn(2, 3, 32, 32)
    assert fixed.adapt_input(x).shape == (2, 3, 64, 64)
    assert flexible.adapt_input(x).shape == (2, 3, 32, 32)
    assert asked.adapt_input(x).shape == (2, 3, 48, 48)
    # decided for each size on its own, as a schedule of training sizes needs
    assert fixed.adapt_input(torch.randn(2, 3, 64, 64)).shape == (2, 3, 64, 64)
    assert fixed(x).feature.shape == (2, 192)


def test_the_resize_is_bicubic_with_antialiasing():
    import torch.nn.functional as F

    teacher = create_teacher('resnet10t', pretrained=False, input_size=24)
    x = torch.randn(2, 3, 64, 64)
    expected = F.interpolate(x, (24, 24), mode='bicubic', antialias=True, align_corners=False)
    torch.testing.assert_close(teacher.adapt_input(x), expected)


def test_a_module_that_takes_no_size_it_is_given_is_refused():
    module = torch.nn.Sequential(
        torch.nn.Flatten(), torch.nn.Linear(3 * 8 * 8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 5)
    )
    teacher = create_teacher(module, tap='3')
    assert teacher(torch.randn(2, 3, 8, 8)).feature.shape == (2, 16)
    with pytest.raises(UsageError, match='Sequential cannot take 9x9 images .* give its own input size'):
        teacher(torch.randn(2, 3, 9, 9))


def test_a_feature_that_cannot_be_told_is_not_blamed_on_the_size_of_the_images():
    model = timm.create_model('test_resnet', num_classes=0)
    model.head_hidden_size = 7
    with pytest.raises(UsageError, match='feature of ResNet is 96 wide, its structure told 7.*tap='):
        create_teacher(model)(torch.randn(2, 3, 8, 8))


def test_a_torchvision_model_teaches_through_a_named_tap():
    import torchvision

    torch.manual_seed(0)
    model = torchvision.models.resnet18(num_classes=5)
    teacher = create_teacher(model, tap='fc')
    out = teacher(torch.randn(2, 3, 64, 64))
    assert out.feature.shape == (2, 512)
    torch.testing.assert_close(model.fc(out.feature), out.logits)


def test_another_number_of_classes_than_the_checkpoints_is_fine_where_logits_are_not_used(model, tmp_path):
    torch.save(model.state_dict(), tmp_path / 'w.pth')
    with pytest.raises(UsageError, match=r'other shapes \(head.weight \[7, 64\] for \[3, 64\]'):
        create_teacher('test_vit', checkpoint=tmp_path / 'w.pth', num_classes=3)
    teacher = create_teacher('test_vit', checkpoint=tmp_path / 'w.pth', num_classes=3, needs_logits=False)
    x = torch.randn(2, 3, 160, 160)
    assert teacher.forward_logits(x).shape == (2, 3)
    assert torch.equal(teacher(x).feature, create_teacher('test_vit', checkpoint=tmp_path / 'w.pth')(x).feature)


def test_a_checkpoint_without_a_classifier_is_a_teacher_of_features(tmp_path):
    model = timm.create_model('test_vit', num_classes=0)
    torch.save(model.state_dict(), tmp_path / 'w.pth')
    teacher = create_teacher('test_vit', checkpoint=tmp_path / 'w.pth')
    assert (teacher.num_classes, teacher.width) == (0, 64)
    x = torch.randn(2, 3, 160, 160)
    torch.testing.assert_close(teacher(x).feature, model.eval()(x))


def calls_of(module):
    calls = []
    module.register_forward_hook(lambda *_: calls.append(1))
    return calls


# a plain head, one that pools and classifies, two heads, a conv in front of the classifier, no classifier
@pytest.mark.parametrize('name', ['resnet10t', 'test_convnext', 'deit_tiny_distilled_patch16_224', 'mobilenetv3_small_050', 'cifar_resnet8'])  # fmt: skip
def test_without_logits_the_feature_is_the_same_and_the_classifier_does_not_run(name):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=3)
    teacher = create_teacher(model, needs_logits=False)
    x = torch.randn(2, 3, *teacher.own_size)
    expected = create_teacher(model)(x)
    classifier = model.get_classifier()
    calls = calls_of(classifier[0] if isinstance(classifier, tuple) else classifier)
    outputs = [teacher(x)]
    tried = len(calls)
    outputs += [teacher(x), teacher(x)]
    assert len(calls) == tried
    for out in outputs:
        assert out.logits is None
        torch.testing.assert_close(out.feature, expected.feature)
    torch.testing.assert_close(teacher.forward_logits(x), expected.logits)


class OddHead(torch.nn.Module):
    """Its pre-logits are not what enters its classifier."""

    def __init__(self, kind):
        super().__init__()
        self.kind, self.fc, self.num_features = kind, torch.nn.Linear(4, 2), 4

    def get_classifier(self):
        return self.fc

    def forward_features(self, x):
        return x.mean((2, 3)).repeat(1, 2)[:, :4]

    def forward_head(self, x, pre_logits=False):
        if pre_logits and self.kind == 'none':
            raise TypeError('no such argument')
        if pre_logits and self.kind == 'scaled':
            return x
        return self.fc(x * 1.001)

    def forward(self, x):
        return self.forward_head(self.forward_features(x))


@pytest.mark.parametrize('kind', ['scaled', 'none', 'logits'])
def test_where_the_pre_logits_are_not_what_is_tapped_the_whole_network_runs(kind):
    teacher = create_teacher(OddHead(kind), needs_logits=False)
    x = torch.randn(2, 3, 8, 8)
    for _ in range(2):
        out = teacher(x)
        assert torch.equal(out.feature, teacher.model.forward_features(x) * 1.001)
        assert out.logits is None


def test_a_named_tap_is_read_where_it_is_without_logits_too():
    model = timm.create_model('resnet10t', num_classes=3)
    teacher = create_teacher(model, tap='layer4', needs_logits=False)
    x = torch.randn(2, 3, 64, 64)
    expected = create_teacher(model, tap='layer4')(x).feature
    assert expected.shape == (2, 256)
    for _ in range(2):
        torch.testing.assert_close(teacher(x).feature, expected)


def test_a_compiled_teacher_gives_the_same_feature_without_logits(model):
    x = torch.randn(2, 3, 160, 160)
    expected = create_teacher(model)(x)
    runs = []
    backend = lambda graph, inputs: lambda *args: (runs.append(1), graph(*args))[1]  # noqa: E731
    teacher = create_teacher(model, needs_logits=False).compile(backend=backend, fullgraph=True)
    for i in range(3):
        torch.testing.assert_close(teacher(x).feature, expected.feature)
        assert len(runs) == i + 1
    torch.testing.assert_close(teacher.forward_logits(x), expected.logits)


@pytest.mark.parametrize('needs_logits', [False, True])
def test_what_a_compiled_teacher_gives_outlives_the_memory_of_its_graph(model, needs_logits):
    given = []

    def backend(graph, inputs):
        def call(*args):
            given.append(graph(*args))
            return given[-1]

        return call

    teacher = create_teacher(model, needs_logits=needs_logits).compile(backend=backend)
    x = torch.randn(2, 3, 160, 160)
    teacher(x)
    result = teacher(x)
    before = result.feature.clone()
    for output in given[-1]:
        output.zero_()  # as CUDA graphs do with the next forward of another compiled network
    assert torch.equal(result.feature, before)
    assert before.abs().sum() > 0
    assert result.logits is None or result.logits.abs().sum() > 0


def test_a_network_that_was_compiled_before_is_not_called_around_its_compilation(model):
    x = torch.randn(2, 3, 160, 160)
    expected = create_teacher(model)(x).feature
    calls = calls_of(model.head)
    teacher = create_teacher(torch.compile(model, backend='eager'), needs_logits=False)
    teacher(x)
    tried = len(calls)
    for i in range(2):
        torch.testing.assert_close(teacher(x).feature, expected)
        assert len(calls) == tried + i + 1


def test_the_precision_of_its_own_holds_without_logits(model):
    teacher = create_teacher(model, dtype=torch.bfloat16, needs_logits=False)
    x = torch.randn(2, 3, 160, 160)
    expected = create_teacher(model, dtype=torch.bfloat16)(x).feature
    with torch.autocast('cpu', dtype=torch.float16):
        for _ in range(2):
            assert torch.equal(teacher(x).feature, expected)


def task_of(teacher, **kwargs):
    student = timm.create_model('test_resnet', num_classes=3)
    return ProjectorEnsembleTask(student, teacher, verbose=False, **kwargs)


@pytest.mark.parametrize('wrap', [lambda m: m, DistillationTeacher])
def test_the_task_asks_for_logits_exactly_where_a_loss_reads_them(wrap):
    x, y = torch.randn(2, 3, 64, 64), torch.tensor([0, 2])
    for kwargs, needs in (({}, False), ({'kd_loss_weight': 1.0}, True), ({'target': 'logits'}, True)):
        task = task_of(wrap(timm.create_model('resnet10t', num_classes=3)), **kwargs)
        assert task.teacher.needs_logits == needs
        assert task(x, y)['loss'].isfinite()
        assert (task.teacher(x).logits is not None) == needs


def test_a_teacher_made_without_logits_is_refused_where_a_loss_reads_them():
    teacher = create_teacher(timm.create_model('resnet10t', num_classes=3), needs_logits=False)
    with pytest.raises(UsageError, match='made with needs_logits=False, but a loss compares logits: make it with True'):
        task_of(teacher, kd_loss_weight=1.0)


def test_a_mean_of_other_channels_than_the_teachers_own_is_refused():
    with pytest.raises(UsageError, match='the mean of the teacher has 2 values, it sees 3 channels'):
        create_teacher(timm.create_model('test_resnet'), mean=(0.5, 0.5))
    with pytest.raises(UsageError, match='the std of the teacher has 2 values'):
        create_teacher(timm.create_model('test_resnet'), std=(0.5, 0.5))


@pytest.mark.parametrize('name', ['test_resnet', 'test_vit', 'test_convnext', 'test_efficientnet', 'test_nfnet'])
def test_under_autocast_weights_are_cast_once_and_nothing_else_changes(name):
    model = (
        timm.create_model(name, num_classes=5, img_size=64) if 'vit' in name else timm.create_model(name, num_classes=5)
    )
    plain, once = (create_teacher(copy.deepcopy(model), autocast_dtype=dtype) for dtype in (None, torch.bfloat16))
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.autocast('cpu', torch.bfloat16):
        expected = plain(x)
    layers = [m for m in once.model.modules() if type(m) in (nn.Conv2d, nn.Linear)]
    assert layers
    assert {layer.weight.dtype for layer in layers} == {torch.bfloat16}
    for found in (once(x), torch.autocast('cpu', torch.bfloat16)(once)(x)):  # inside of an autocast region and outside
        assert torch.equal(found.feature, expected.feature)
        assert torch.equal(found.logits, expected.logits)
    assert once.size_for(torch.randn(1, 3, 96, 96)) == plain.size_for(torch.randn(1, 3, 96, 96))


class ReadsAWeight(nn.Module):
    """A network that uses the weight of a layer outside of the layer, in full precision."""

    num_classes = 5

    def __init__(self):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 8, 3), nn.Linear(8, 5)

    def forward(self, x):
        x = self.conv(x).mean((2, 3)).float() * self.conv.weight.float().pow(2).sum((1, 2, 3)).sqrt()
        return self.fc(x)


def test_a_network_that_reads_a_weight_outside_of_its_layer_keeps_them_all():
    teacher = create_teacher(ReadsAWeight(), tap='fc', autocast_dtype=torch.bfloat16)
    assert {p.dtype for p in teacher.model.parameters()} == {torch.float32}
    assert teacher(torch.randn(2, 3, 32, 32)).feature.shape == (2, 8)


def test_validating_a_compiled_teacher_leaves_its_training_graph_alone():
    graphs = []

    def record(graph, inputs):
        graphs.append(graph)
        return graph.forward

    teacher = create_teacher(timm.create_model('test_resnet', num_classes=5)).compile(backend=record)
    x = torch.randn(4, 3, 64, 64)
    teacher(x)
    made = len(graphs)
    teacher.forward_logits(torch.randn(3, 3, 64, 64))
    teacher.forward_logits(x)
    teacher(x)
    assert len(graphs) == made > 0


def test_too_little_memory_says_nothing_of_the_size_that_a_teacher_takes(monkeypatch):
    teacher = create_teacher(timm.create_model('test_resnet', num_classes=5))

    def full(x):
        raise torch.OutOfMemoryError('out of memory')

    monkeypatch.setattr(teacher.model, 'forward', full)
    with pytest.raises(torch.OutOfMemoryError):
        teacher.size_for(torch.randn(1, 3, 48, 48))
    monkeypatch.undo()
    assert teacher.size_for(torch.randn(1, 3, 48, 48)) == (48, 48)


@pytest.mark.parametrize('fold', [False, True])
@pytest.mark.parametrize(
    'precision',
    [{'dtype': torch.bfloat16}, {'dtype': torch.float32}, {'autocast_dtype': torch.bfloat16}, {}],
    ids=lambda p: ' '.join(f'{name} {dtype}' for name, dtype in p.items()),
)
def test_a_precision_that_is_set_later_is_that_of_the_constructor(precision, fold):
    network = timm.create_model('test_resnet', num_classes=3)
    made, changed = (
        create_teacher(copy.deepcopy(network), needs_logits=False, fold=fold, **given) for given in (precision, {})
    )
    x = torch.randn(2, 3, 64, 64)
    changed(x)  # what it has learnt of the network on a batch in float32 does not count
    changed.set_precision(**precision)
    assert changed.precision == made.precision
    with torch.autocast('cpu', dtype=torch.float16, enabled='dtype' in precision):
        assert torch.equal(changed(x).feature, made(x).feature)
    state = made.model.state_dict()
    for name, value in changed.model.state_dict().items():
        assert value.dtype == state[name].dtype
        assert torch.equal(value, state[name])


def test_what_was_learnt_of_a_network_in_float32_is_not_taken_for_granted_in_another_precision(model, monkeypatch):
    teacher, head = create_teacher(model, needs_logits=False), model.forward_head

    def whole_in_bfloat16(x, pre_logits=False):
        if pre_logits and x.dtype == torch.bfloat16:
            raise NotImplementedError
        return head(x, pre_logits=pre_logits)

    monkeypatch.setattr(model, 'forward_head', whole_in_bfloat16)
    x = torch.randn(2, 3, 160, 160)
    before = teacher(x).feature
    teacher.set_precision(torch.bfloat16)
    torch.testing.assert_close(teacher(x).feature.float(), before, rtol=0.1, atol=0.1)


@pytest.mark.parametrize(
    ('given', 'said'),
    [
        ({}, 'float32'),
        ({'dtype': torch.bfloat16}, 'bfloat16'),
        ({'autocast_dtype': torch.float16}, 'AMP float16'),
        ({'dtype': torch.float32, 'autocast_dtype': torch.float16}, 'float32'),
    ],
)
def test_the_precision_is_told_in_words(given, said, model):
    assert create_teacher(model, **given).precision == said
