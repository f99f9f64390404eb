"""Feature maps: the tap on them, and the term of the loss that compares them."""

import copy

import pytest
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from helpers import compiled_and_eager
from test_aims import batch, check_gradients, in_float64, naive_twin, penultimate

from timm_pe import ProjectorEnsembleTask, TeacherOutput, UsageError, create_teacher
from timm_pe.method.map_tap import MapTap, _rows_of_grid, on_grid


def make_task(student='test_resnet', teacher='test_vit', **kwargs):
    torch.manual_seed(0)
    student = timm.create_model(student, num_classes=5)
    teachers = [timm.create_model(name, num_classes=5).eval() for name in teacher.split()]
    torch.manual_seed(1)
    kwargs = {'map_weight': 2.0, **kwargs}
    return ProjectorEnsembleTask(student, teachers, verbose=False, **kwargs)


@pytest.mark.parametrize(
    ('name', 'shape'),
    [
        ('test_resnet', (2, 96, 5, 5)),
        ('test_mambaout', (2, 64, 5, 5)),  # channels last
        ('test_vit', (2, 64, 10, 10)),  # a class token in front
        ('test_vit_relpos', (2, 96, 10, 10)),  # none
        ('cifar_resnet8', (2, 64, 40, 40)),
    ],
)
def test_the_map_is_what_forward_features_returns_in_the_same_pass(name, shape):
    model = timm.create_model(name).train()
    calls, expected = [], []
    tap = MapTap(model)
    inner = tap._run

    def counting(x, *args, **kwargs):
        calls.append(x)
        expected.append(inner(x, *args, **kwargs))
        return expected[-1]

    model.__dict__['forward_features'] = counting
    model(batch(2)[0])
    found = tap.pop()
    assert found.shape == shape
    assert tap.width == shape[1]
    assert found.requires_grad
    assert len(calls) == 1
    features = expected[0]
    tokens = features.flatten(1, 2) if features.ndim == 4 and features.shape[1] != tap.width else features
    rows = tokens.flatten(2).mT if features.ndim == 4 and tokens is features else tokens[:, -shape[2] * shape[3] :]
    assert torch.equal(found.flatten(2).mT, rows)


class NoAttention(nn.Module):
    def forward(self, x, **kwargs):
        return torch.zeros_like(x)


@pytest.mark.parametrize('name', ['test_vit', 'eva02_tiny_patch14_224'])
def test_a_student_that_drops_patches_has_no_whole_map(name):
    student = timm.create_model(name, img_size=64, patch_drop_rate=0.5)
    with pytest.raises(UsageError, match='the student drops patches in training'):
        ProjectorEnsembleTask(student, timm.create_model('test_resnet'), map_weight=1.0, verbose=False)


def test_a_position_of_a_map_of_tokens_is_that_of_its_patch():
    torch.manual_seed(0)
    model = timm.create_model('test_vit', dynamic_img_size=True).eval()
    for block in model.blocks:  # without attention a token sees its own patch alone
        block.attn = NoAttention()
    tap, x = MapTap(model), torch.zeros(1, 3, 64, 96)
    model(x)
    before = tap.pop()
    x[:, :, 16:32, 48:64] = 1.0
    model(x)
    changed = (tap.pop() - before).abs().sum(1)[0] > 0
    assert changed.shape == (4, 6)
    assert changed.nonzero().tolist() == [[1, 3]]


def test_the_shape_of_a_grid_follows_the_image():
    for height, width, patch in [
        (160, 160, 16),
        (64, 96, 16),
        (224, 160, 14),
        (30, 100, 10),
        (100, 37, 8),
        (16, 16, 16),
    ]:
        rows, columns = height // patch, width // patch
        assert _rows_of_grid(rows * columns, height, width) == rows
    assert _rows_of_grid(12, 64, 64) is None
    assert _rows_of_grid(0, 64, 64) is None


def test_a_tap_leaves_the_model_as_it_was():
    model, x = timm.create_model('test_resnet').train(), batch(2)[0]
    before = copy.deepcopy(model.state_dict())
    first = MapTap(model)
    second = MapTap(model)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    model(x)
    assert torch.equal(first.pop(), second.pop())
    with pytest.raises(RuntimeError, match='ResNet has no feature map to pop: its forward has not run'):
        first.pop()
    second.remove()
    model(x)
    assert first.pop().shape == (2, 96, 5, 5)
    first.remove()
    assert 'forward_features' not in vars(model)
    assert model.forward_features.__func__ is type(model).forward_features


def test_a_copied_and_a_saved_model_have_taps_of_their_own(tmp_path):
    model = timm.create_model('test_resnet').eval()
    pair = nn.ModuleDict({'model': model})
    pair.tap = MapTap(model)
    model(batch(1)[0])  # a tensor inside a graph
    torch.save(pair, tmp_path / 'pair.pt')
    for other in (copy.deepcopy(pair), torch.load(tmp_path / 'pair.pt', weights_only=False)):
        pair.tap._value = None
        with torch.no_grad():
            other['model'].conv1[0].weight.mul_(2)
            other['model'](batch(1)[0])
        assert pair.tap._value is None
        assert torch.equal(other.tap.pop(), type(model).forward_features(other['model'], batch(1)[0]))
        assert other.tap._model is other['model']


def test_a_map_is_pooled_to_a_smaller_grid_by_means_of_its_cells():
    x = torch.arange(32.0).view(1, 2, 4, 4)
    pooled = on_grid(x, (2, 4))
    assert pooled.shape == (1, 2, 4, 2)
    assert pooled[0, 0, 1].tolist() == [(1 + 5) / 2, (17 + 21) / 2]
    assert torch.equal(on_grid(x, (4, 4)), x.permute(0, 2, 3, 1))


def naive_terms(student, teacher, projectors, act, x, grid):
    """pe_loss and map_loss with a loop over the positions of each image."""
    s, fs = penultimate(student, x), student.forward_features(x)
    with torch.no_grad():
        t, tokens = penultimate(teacher, x), teacher.forward_features(x)
    side = int((tokens.shape[1] - 1) ** 0.5)
    terms, cell = [], side // grid

    def distance(linears, s, t):
        p = sum(act(linear(s)) for linear in linears) / len(linears)
        return 1 - (p * t).sum() / ((p * p).sum().sqrt() * (t * t).sum().sqrt())

    terms.append(sum(distance(projectors[0], s[i], t[i]) for i in range(len(x))) / len(x))
    total = 0.0
    for i in range(len(x)):
        for row in range(grid):
            for column in range(grid):
                patches = [
                    tokens[i, 1 + side * (cell * row + a) + cell * column + b] for a in range(cell) for b in range(cell)
                ]
                total = total + distance(projectors[1], fs[i, :, row, column], sum(patches) / len(patches))
    terms.append(total / (len(x) * grid * grid))
    return terms


def test_the_loss_of_maps_and_its_gradients_equal_a_naive_loop_over_positions():
    task = in_float64(make_task(act='none')).train()
    student, (teacher,), projectors = naive_twin(task)
    student.__dict__.pop('forward_features')
    teacher = copy.deepcopy(teacher)
    teacher.__dict__.pop('forward_features')
    x, y = batch(3)
    x = x.double()
    result = task(x, y)
    result['loss'].backward()
    pe, dense = naive_terms(student, teacher, projectors, lambda p: p, x, grid=5)
    assert result['pe_loss'].item() == pytest.approx(pe.item(), rel=1e-10)
    assert result['map_loss'].item() == pytest.approx(dense.item(), rel=1e-10)
    loss = F.cross_entropy(student(x), y) + 25 * pe + 2 * dense
    assert result['loss'].item() == pytest.approx(loss.item(), rel=1e-10)
    loss.backward()
    # the naive student has run three times over the batch
    check_gradients(task, student, projectors, rtol=1e-8)
    assert set(result) == {'loss', 'output', 'task_loss', 'pe_loss', 'map_loss'}


def test_the_map_changes_neither_the_other_terms_nor_the_models_outputs():
    with_map, without = make_task(act='none').train(), make_task(act='none', map_weight=0.0).train()
    with torch.no_grad():
        with_map.projectors[0].load_state_dict(without.projection.state_dict())
    a, b = with_map(*batch()), without(*batch())
    for name in ('output', 'task_loss', 'pe_loss'):
        assert torch.equal(a[name], b[name]), name
    assert without.trainable_module.map_tap is None
    assert without.teacher.map_tap is None


@pytest.mark.parametrize(
    'pair', [('test_resnet', 'test_vit'), ('test_vit', 'test_mambaout'), ('test_vit', 'test_resnet')]
)
def test_student_and_teacher_run_once_and_the_teachers_classifier_not_at_all(pair, monkeypatch):
    task = make_task(*pair).train()
    x, y = batch()
    task(x, y)  # settles what can be left out
    ran = {'student': 0, 'teacher': 0, 'classifier': 0}
    networks = {'student': task.trainable_module.student, 'teacher': task.teacher.model}
    for what, network in networks.items():
        method = type(network).forward_features

        def counting(*args, what=what, method=method, **kwargs):
            ran[what] += 1
            return method(*args, **kwargs)

        monkeypatch.setattr(type(network), 'forward_features', counting)
    classifier = task.teacher.model.get_classifier()
    classifier.register_forward_hook(lambda *_: ran.__setitem__('classifier', ran['classifier'] + 1))
    task(x, y)
    assert ran == {'student': 1, 'teacher': 1, 'classifier': 0}


def test_maps_of_several_teachers_have_projectors_terms_and_activations_of_their_own():
    task = make_task('test_vit2', 'test_resnet test_vit', teacher_weights=[1, 3]).train()
    result = task(*batch())
    result['loss'].backward()
    assert [aim.name for aim in task.aims] == [
        *('feature_test_resnet', 'feature_test_vit', 'map_test_resnet', 'map_test_vit')
    ]
    assert list(task.act.values()) == ['relu', 'none', 'relu', 'none']
    assert {'map_loss', 'map_loss_test_resnet', 'map_loss_test_vit'} <= set(result)
    assert all(p.grad is not None for p in task.trainable_module.projection.parameters())
    expected = 0.25 * result['map_loss_test_resnet'] + 0.75 * result['map_loss_test_vit']
    torch.testing.assert_close(result['map_loss'], expected)


def test_teacher_drop_leaves_out_the_maps_of_the_teachers_that_it_leaves_out():
    task = make_task('test_vit2', 'test_resnet test_vit', teacher_weights=[1, 3], teacher_drop=0.7).train()
    x, y = batch(6)
    outputs = [teacher(x) for teacher in task.teachers]
    task.resolve_act(x, outputs)
    torch.manual_seed(2)
    result = task(x, y, teacher=outputs)
    with torch.no_grad():
        _, *projected = task.trainable_module(x, [output.map.shape[2:] for output in outputs])
    torch.manual_seed(2)
    draws, learnt, total, dropped = torch.rand(6, 2), 0.0, 0.0, 0
    for i in range(6):
        features = [1 - F.cosine_similarity(projected[t][i], outputs[t].feature[i], dim=0).item() for t in range(2)]
        for t, weight in enumerate((0.25, 0.75)):
            if features[t] != max(features) and draws[i, t] < 0.7:
                dropped += 1
                continue
            p = projected[2 + t][i].permute(2, 0, 1)
            wanted = F.adaptive_avg_pool2d(outputs[t].map[i], p.shape[1:])
            learnt += weight * (1 - F.cosine_similarity(p, wanted, dim=0)).mean().item()
            total += weight
    assert 0 < dropped < 6
    assert result['map_loss'].item() == pytest.approx(learnt / total, rel=1e-5)


def test_a_task_with_maps_resumes_averages_and_is_saved_whole(tmp_path):
    task, other = make_task().train(), make_task().train()
    task(*batch())
    for each in (task, other):
        each.setup_ema(decay=0.5)
    optimizer = torch.optim.SGD(task.trainable_module.parameters(), lr=0.05)
    task(*batch())['loss'].backward()
    optimizer.step()
    task.update_ema(step=1)
    state = {**task.get_checkpoint_state(), **task.get_checkpoint_state(ema=True)}
    assert set(state['state_dict']) == set(timm.create_model('test_resnet', num_classes=5).state_dict())
    other.load_checkpoint_state(state['state_dict'], state['task_state'])
    other.load_checkpoint_state(state['state_dict_ema'], state['task_state_ema'], ema=True)
    torch.save(task, tmp_path / 'task.pt')
    whole = torch.load(tmp_path / 'task.pt', weights_only=False)
    expected = task(*batch())
    for again in (other, whole):
        assert torch.equal(again(*batch())['map_loss'], expected['map_loss'])
    averages = [each.get_trainable_module(ema=True).module.eval() for each in (task, other)]
    for a, b in zip(*(average(batch()[0], [(10, 10)]) for average in averages), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(UsageError, match='this run to a single one: give the same teachers and map_weight'):
        make_task(map_weight=0.0).load_task_state(state['task_state'])


def test_compiled_maps_and_gradients_equal_eager_ones_with_fullgraph():
    compiled_and_eager(make_task, batch, before=1)


def test_maps_in_low_precision_give_a_finite_loss_in_float32():
    task = make_task('test_vit', 'test_resnet').train()
    with torch.autocast('cpu', torch.bfloat16):
        result = task(*batch())
    assert result['map_loss'].dtype == torch.float32
    result['loss'].backward()
    assert all(p.grad.isfinite().all() for p in task.trainable_module.parameters())


def test_outputs_that_are_given_need_the_map():
    task = make_task(act='none').eval()
    x, y = batch()
    output = task.teacher(x)
    assert output.map.shape == (4, 64, 10, 10)
    assert torch.equal(task(x, y, teacher=output)['map_loss'], task(x, y)['map_loss'])
    with pytest.raises(UsageError, match="'map_loss_test_vit' compares with the teacher's map, which its output lacks"):
        task(x, y, teacher=TeacherOutput(output.feature, None))
    assert create_teacher('test_vit', pretrained=False)(x).map is None
    teacher = create_teacher('test_vit', pretrained=False)
    assert teacher.tap_map() is teacher.tap_map()
    with pytest.raises(RuntimeError, match='no feature to pop'):  # of the image that the tap was made with
        teacher.tap.pop()
    for copied in (
        copy.deepcopy(output),
        torch.utils._pytree.tree_map_only(torch.Tensor, torch.clone, output),
    ):  # as loaders and DDP move it
        assert torch.equal(copied.map, output.map)


def test_a_network_without_a_map_is_refused_in_one_line_and_left_as_it_was():
    pit = timm.create_model('pit_ti_224', num_classes=5)
    coat = timm.create_model('coat_tiny', num_classes=5)
    for model, reason in (
        (pit, 'the 0 tokens behind 1 in front are no grid over 224x224 images'),
        (coat, r'its forward_features\(\) gives a list, neither one map nor tokens'),
        (nn.Sequential(nn.Flatten(), nn.Linear(4, 2)), r'it has no forward_features\(\)'),
    ):
        with pytest.raises(UsageError, match=f'has no feature map: {reason}. Give no map weight') as e:
            MapTap(model)
        assert '\n' not in str(e.value)
        assert 'forward_features' not in vars(model)
    student = timm.create_model('test_resnet', num_classes=5)
    with pytest.raises(UsageError, match='PoolingVisionTransformer has no feature map'):
        ProjectorEnsembleTask(student, pit, map_weight=1.0, verbose=False)
    with pytest.raises(UsageError, match='PoolingVisionTransformer has no feature map'):
        ProjectorEnsembleTask(pit, student, map_weight=1.0, verbose=False)


def test_patches_of_a_naflex_loader_have_no_grid():
    model = timm.create_model('naflexvit_base_patch16_gap', depth=1, embed_dim=32, num_heads=2, num_classes=5).eval()
    tap = MapTap(model)
    patches = {'patches': torch.randn(1, 6, 768), 'patch_coord': torch.zeros(1, 6, 2, dtype=torch.long)}
    model({**patches, 'patch_valid': torch.ones(1, 6, dtype=torch.bool)})
    with pytest.raises(UsageError, match=r'its forward_features\(\) gives a dict, neither one map nor tokens'):
        tap.pop()


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
@pytest.mark.parametrize('projector', ['linear', 'mlp', 'linear_bn', 'orthogonal'])
def test_a_student_of_another_dtype_is_projected_in_it_where_its_map_is_pooled(dtype, projector):
    student = timm.create_model('test_resnet', num_classes=5)  # 4 x 4 positions at 128 px
    teacher = create_teacher('test_convnext', pretrained=False, input_size=64)  # 2 x 2
    task = ProjectorEnsembleTask(student, teacher, map_weight=1.0, projector=projector, verbose=False)
    task.trainable_module.to(dtype)
    result = task(torch.randn(2, 3, 128, 128, dtype=dtype), torch.tensor([0, 1]))
    result['loss'].backward()
    assert result['map_loss'].isfinite()
    assert all(p.grad is not None and p.grad.dtype == dtype for p in task.projectors[1].parameters())
