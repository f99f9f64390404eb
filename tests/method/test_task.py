import copy
from collections import OrderedDict

import pytest
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from helpers import compiled_and_eager
from safetensors.torch import save_file
from timm.data.model_config import resolve_input_data_config
from timm.optim import create_optimizer_v2
from timm.task import DistillationTeacher, FeatureDistillationTask, resume_task_checkpoint

from timm_pe import ProjectorEnsembleTask, Teacher, UsageError, create_teacher
from timm_pe.method import losses


def make_task(student='test_resnet', teacher='test_vit', **kwargs):
    torch.manual_seed(0)
    student = timm.create_model(student, num_classes=5)
    teacher = timm.create_model(teacher, num_classes=5)
    return ProjectorEnsembleTask(student_model=student, teacher_model=teacher, verbose=False, **kwargs)


def batch(n=4, size=64, seed=1):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, 3, size, size, generator=g), torch.randint(0, 5, (n,), generator=g)


def naive_step(student, teacher, projectors, optimizer, x, y):
    """PEFD as one would write it on a board: three Linear, sums and divisions by hand."""
    feature_map = student.forward_features(x)
    s = feature_map.mean(dim=(2, 3))
    logits = s @ student.fc.weight.T + student.fc.bias
    with torch.no_grad():
        t = teacher.forward_features(x).mean(dim=(2, 3))
    p = sum(torch.clamp(projector(s), min=0) for projector in projectors) / len(projectors)
    log_prob = logits - logits.logsumexp(dim=1, keepdim=True)
    ce = -log_prob[torch.arange(len(y)), y].sum() / len(y)
    cosine = (p * t).sum(1) / ((p * p).sum(1).sqrt() * (t * t).sum(1).sqrt())
    pe = (1 - cosine).sum() / len(y)
    loss = ce + 25 * pe
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return ce.item(), pe.item(), loss.item()


def test_twenty_steps_equal_a_naive_rewriting_on_resnet34_to_resnet18():
    torch.manual_seed(0)
    student, teacher = timm.create_model('resnet18', num_classes=5), timm.create_model('resnet34', num_classes=5)
    teacher.eval()
    task = ProjectorEnsembleTask(
        student_model=copy.deepcopy(student), teacher_model=copy.deepcopy(teacher), verbose=False
    )
    projectors = nn.ModuleList(nn.Linear(512, 512) for _ in range(3))
    fc = task.projection.projectors.fc
    with torch.no_grad():
        for projector, w, b in zip(projectors, fc.weight.chunk(3), fc.bias.chunk(3), strict=True):
            projector.weight.copy_(w)
            projector.bias.copy_(b)
    # double precision: what is compared is the method, not the rounding that 20 chaotic steps amplify
    student, teacher, projectors, task = student.double(), teacher.double(), projectors.double(), task.double()
    task.teacher.input_dtype = torch.float64
    settings = {'lr': 0.02, 'momentum': 0.9, 'weight_decay': 1e-4}
    ours = torch.optim.SGD(task.trainable_module.parameters(), **settings)
    naive = torch.optim.SGD([*student.parameters(), *projectors.parameters()], **settings)
    task.train()
    student.train()
    for step in range(20):
        x, y = batch(4, 64, seed=step)
        x = x.double()
        result = task(x, y)
        ours.zero_grad()
        result['loss'].backward()
        ours.step()
        expected = naive_step(student, teacher, projectors, naive, x, y)
        actual = [result[k].item() for k in ('task_loss', 'pe_loss', 'loss')]
        assert actual == pytest.approx(expected, rel=1e-7), step
    for (name, a), b in zip(task.trainable_module.student.named_parameters(), student.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9, msg=name)
    torch.testing.assert_close(fc.weight, torch.cat([p.weight for p in projectors]), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(fc.bias, torch.cat([p.bias for p in projectors]), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize('teacher', ['test_resnet', 'test_vit'], ids=['equal dims', 'other dims'])
@pytest.mark.parametrize('projector', ['linear', 'mlp'])
def test_every_projector_parameter_changes_after_one_step(teacher, projector):
    task = make_task(teacher=teacher, projector=projector).train()
    assert (task.projection.in_dim == task.projection.out_dim) == (teacher == 'test_resnet')
    optimizer = create_optimizer_v2(task.trainable_module, 'sgd', lr=0.1)
    task.check_optimizer(optimizer)
    before = {n: p.clone() for n, p in task.projection.named_parameters()}
    task(*batch(8))['loss'].backward()
    optimizer.step()
    assert len(before) == (2 if projector == 'linear' else 12)
    for name, param in task.projection.named_parameters():
        assert not torch.equal(param, before[name]), name


def test_projectors_missing_from_the_optimizer_are_an_error():
    task = make_task()
    optimizer = torch.optim.SGD(task.trainable_module.student.parameters(), lr=0.1)
    with pytest.raises(
        UsageError, match='is in 0 groups of the optimizer, not in 1: make it from task.trainable_module.'
    ):
        task.check_optimizer(optimizer)


def test_a_projector_that_the_optimizer_would_train_twice_is_an_error():
    task = make_task()
    optimizer = torch.optim.SGD(task.trainable_module.parameters(), lr=0.1)
    optimizer.param_groups.append({**optimizer.param_groups[0], 'params': list(task.projection.parameters())})
    with pytest.raises(UsageError, match='is in 2 groups of the optimizer, not in 1'):
        task.check_optimizer(optimizer)


def test_a_projector_may_have_parameters_that_are_not_trained():
    task = make_task().train()
    frozen, *_ = parameters = list(task.projection.parameters())
    frozen.requires_grad_(False)
    optimizer = create_optimizer_v2(task.trainable_module, 'sgd', lr=0.1)
    task.check_optimizer(optimizer)
    before = [p.clone() for p in parameters]
    task(*batch(8))['loss'].backward()
    optimizer.step()
    assert [torch.equal(p, b) for p, b in zip(parameters, before, strict=True)] == [True, *[False] * (len(before) - 1)]


def test_the_teacher_never_changes_neither_weights_nor_batch_norm_statistics():
    task = make_task(teacher='test_resnet').train()
    before = {k: v.clone() for k, v in task.teacher.state_dict().items()}
    optimizer = create_optimizer_v2(task.trainable_module, 'sgd', lr=0.1)
    for _ in range(2):
        task(*batch())['loss'].backward()
        optimizer.step()
    assert any('running_mean' in k for k in before)
    for name, value in task.teacher.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert not task.teacher.model.training
    assert not any(p.requires_grad for p in task.teacher.parameters())


def test_the_teacher_is_in_no_checkpoint_no_average_and_not_in_the_trainable_module():
    task = make_task()
    task.setup_ema(decay=0.9)
    teacher_ids = {id(p) for p in task.teacher.parameters()}
    assert not teacher_ids & {id(p) for p in task.trainable_module.parameters()}
    state = {**task.get_checkpoint_state(), **task.get_checkpoint_state(ema=True)}
    assert set(state) == {'state_dict', 'task_state', 'state_dict_ema', 'task_state_ema'}
    student_keys = set(timm.create_model('test_resnet', num_classes=5).state_dict())
    assert set(state['state_dict']) == set(state['state_dict_ema']) == student_keys
    assert set(state['task_state']['projection']) == {'projectors.fc.weight', 'projectors.fc.bias'}


def test_unset_weights_mean_25_and_1_each_on_its_own():
    assert (make_task().distill_loss_weight, make_task().task_loss_weight) == (25.0, 1.0)
    task = make_task(task_loss_weight=0.3)
    assert (task.distill_loss_weight, task.task_loss_weight) == (25.0, 0.3)
    task = make_task(distill_loss_weight=0.0)
    assert (task.distill_loss_weight, task.task_loss_weight) == (0.0, 1.0)


def test_the_terms_are_raw_and_the_weights_are_in_the_loss_alone():
    task = make_task(task_loss_weight=0.5, distill_loss_weight=3.0, kd_loss_weight=0.2, kd_temperature=2.0).train()
    r = task(*batch())
    assert set(r) == {'loss', 'output', 'task_loss', 'pe_loss', 'logit_loss'}
    torch.testing.assert_close(r['loss'], 0.5 * r['task_loss'] + 3.0 * r['pe_loss'] + 0.2 * r['logit_loss'])
    torch.testing.assert_close(r['task_loss'], F.cross_entropy(r['output'], batch()[1]))
    assert 'logit_loss' not in make_task()(*batch())


@pytest.mark.parametrize(('teacher', 'act'), [('resnet10t', 'relu'), ('test_vit', 'none')])
def test_auto_activation_is_relu_exactly_for_teachers_with_non_negative_features(teacher, act):
    task = make_task(teacher=teacher)
    assert task.projection.act == 'auto'
    task.setup_ema(decay=0.9)
    task(*batch())
    assert task.projection.act == act
    assert task.get_task_state(ema=True)['act'] == act


def test_a_settled_activation_is_stored_and_not_probed_again(tmp_path):
    task = make_task()
    task(*batch())
    fresh = make_task()
    fresh.load_checkpoint_state(task.get_checkpoint_state()['state_dict'], task.get_task_state())
    assert fresh.projection.act == 'none'
    # a teacher that would now be judged otherwise
    fresh.teacher.register_forward_hook(lambda teacher, args, output: output._replace(feature=output.feature.abs()))
    fresh(*batch())
    assert fresh.projection.act == 'none'
    judged = make_task()
    judged.teacher.register_forward_hook(lambda teacher, args, output: output._replace(feature=output.feature.abs()))
    judged(*batch())
    assert judged.projection.act == 'relu'


def test_where_the_projectors_are_one_linear_layer_the_log_says_so(caplog):
    caplog.set_level('INFO')
    for settings, said in (({}, True), ({'num_projectors': 1}, False), ({'projector': 'mlp'}, False)):
        caplog.clear()
        networks = [timm.create_model(name, num_classes=5) for name in ('test_resnet', 'test_vit')]
        ProjectorEnsembleTask(*networks, **settings)(*batch())
        assert ('the mean of the 3 is one linear layer' in caplog.text) == said


def test_the_state_dict_of_a_task_has_no_teacher_and_is_loaded_beside_one():
    task, fresh = make_task(), make_task()
    around, other = nn.ModuleDict({'inner': task}), nn.ModuleDict({'inner': fresh})
    state = around.state_dict()
    assert state
    assert not any('teacher' in name for name in state)
    teacher = {name: value.clone() for name, value in fresh.teacher.state_dict().items()}
    other.load_state_dict(state)
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in state.items())
    assert all(torch.equal(value, teacher[name]) for name, value in fresh.teacher.state_dict().items())
    with pytest.raises(RuntimeError, match='Missing key'):
        fresh.load_state_dict({name: value for name, value in task.state_dict().items() if 'projection' not in name})
    # one that has them, of a commit before, is loaded too
    fresh.load_state_dict({**task.state_dict(), **{f'teacher.{k}': v for k, v in task.teacher.state_dict().items()}})
    assert torch.equal(next(fresh.teacher.parameters()), next(task.teacher.parameters()))


def test_a_released_student_is_as_before_the_task(tmp_path):
    student = timm.create_model('test_efficientnet', num_classes=5, drop_rate=0.3)
    teacher = timm.create_model('test_resnet', num_classes=5)
    task = ProjectorEnsembleTask(student, teacher, map_weight=1.0, verbose=False)
    task.setup_ema(decay=0.9)
    task(*batch())
    assert student.drop_rate == 0
    for ema in (False, True):
        released = task.release_student(ema=ema)
        assert released.drop_rate == 0.3
        assert 'forward_features' not in vars(released)
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in released.modules())
        torch.save(released, tmp_path / 'student.pt')
        assert b'timm_pe' not in (tmp_path / 'student.pt').read_bytes()
    assert task.release_student() is student
    with pytest.raises(UsageError, match='no moving average'):
        make_task().release_student(ema=True)


def test_projectors_of_another_kind_are_refused_on_load():
    state = make_task(num_projectors=2, act='none').get_task_state()
    with pytest.raises(UsageError, match='num_projectors=2, this run num_projectors=3'):
        make_task().load_task_state(state)
    with pytest.raises(UsageError, match='act=none, this run act=relu'):
        make_task(num_projectors=2, act='relu').load_task_state(state)
    with pytest.raises(UsageError, match='projectors are not those of'):
        make_task(num_projectors=2, teacher='test_resnet').load_task_state(state)


def test_given_feature_dims_are_checked_against_the_tap():
    make_task(student_feature_dim=96, teacher_feature_dim=64)
    with pytest.raises(UsageError, match='student_feature_dim is 64, but .* 96 channels'):
        make_task(student_feature_dim=64)
    with pytest.raises(UsageError, match='teacher_feature_dim is 96, but .* 64 channels'):
        make_task(teacher_feature_dim=96)


def test_it_takes_every_keyword_of_timms_feature_distillation_task():
    import inspect

    theirs = set(inspect.signature(FeatureDistillationTask.__init__).parameters)
    assert theirs <= set(inspect.signature(ProjectorEnsembleTask.__init__).parameters)
    assert issubclass(ProjectorEnsembleTask, FeatureDistillationTask)


def test_a_timm_distillation_teacher_is_accepted_with_its_normalization():
    student, teacher = timm.create_model('test_resnet', num_classes=5), timm.create_model('resnet10t', num_classes=5)
    task = ProjectorEnsembleTask(student_model=student, teacher_model=DistillationTeacher(teacher), verbose=False)
    assert task.teacher.model is teacher
    assert task.teacher.mean == pytest.approx((0.485, 0.456, 0.406))
    x, y = batch()
    feature = teacher.forward_head(teacher.forward_features((x * 0.5 + 0.5 - torch.tensor(task.teacher.mean).view(1, 3, 1, 1)) / torch.tensor(task.teacher.std).view(1, 3, 1, 1)), pre_logits=True)  # fmt: skip
    torch.testing.assert_close(task.teacher(x).feature, feature, rtol=1e-4, atol=1e-5)


def test_logits_of_other_classes_are_refused_but_features_are_fine():
    student, teacher = timm.create_model('test_resnet', num_classes=5), timm.create_model('test_vit', num_classes=7)
    ProjectorEnsembleTask(student, teacher, verbose=False)(*batch())
    with pytest.raises(UsageError, match='student has 5 and the teacher 7'):
        ProjectorEnsembleTask(student, teacher, kd_loss_weight=1.0, verbose=False)


def test_compiled_features_and_gradients_equal_eager_ones_with_fullgraph():
    compiled, eager = compiled_and_eager(make_task, batch)
    assert set(compiled.get_checkpoint_state()['state_dict']) == set(eager.get_checkpoint_state()['state_dict'])


def test_the_average_gives_the_features_of_its_own_weights():
    task = make_task().train()
    task(*batch())
    task.setup_ema(decay=0.0)
    optimizer = create_optimizer_v2(task.trainable_module, 'sgd', lr=0.1)
    task(*batch())['loss'].backward()
    optimizer.step()
    old = task.get_trainable_module(ema=True).module
    x = batch()[0]
    task.eval()
    assert not torch.allclose(old.eval()(x)[1], task.trainable_module(x)[1])
    task.update_ema(step=1)  # decay 0: the average is now the weights
    for a, b in zip(old(x), task.trainable_module(x), strict=True):
        torch.testing.assert_close(a, b)


def test_accumulation_2x8_equals_1x16_without_batch_norm():
    grads = []
    for parts in (1, 2):
        task = make_task(student='test_vit', act='none').train()
        x, y = batch(16, 160)
        for xs, ys in zip(x.chunk(parts), y.chunk(parts), strict=True):
            (task(xs, ys)['loss'] / parts).backward()
        grads.append([p.grad for p in task.trainable_module.parameters()])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ('name', 'kwargs', 'size', 'heads'),
    [
        (
            'deit_tiny_distilled_patch16_224',
            {'img_size': 32, 'patch_size': 16},
            32,
            ('head.weight', 'head_dist.weight'),
        ),
        ('repvit_m0_9', {}, 64, ('head.head.l.weight', 'head.head_dist.l.weight')),
    ],
)
def test_a_student_in_distilled_training_learns_through_the_mean_of_its_heads(name, kwargs, size, heads):
    torch.manual_seed(0)
    student = timm.create_model(name, num_classes=5, **kwargs)
    student.set_distilled_training(True)
    task = ProjectorEnsembleTask(
        student, timm.create_model('test_vit', num_classes=5), act='none', verbose=False
    ).train()
    x, y = batch(2, size)
    result = task(x, y)
    assert result['output'].shape == (2, 5)
    result['loss'].backward()
    for head in heads:
        assert student.get_parameter(head).grad.abs().sum() > 0


def test_it_replaces_timms_task_in_a_loop_with_checkpoint_and_resume(tmp_path):
    """A loop that reads `loss` and `output` only, saves with timm's saver and resumes with timm's helper."""
    from timm.utils import CheckpointSaver

    def loop(task, optimizer, steps):
        task.train()
        for step in steps:
            result = task(*batch(4, 64, seed=step))
            optimizer.zero_grad()
            result['loss'].backward()
            optimizer.step()
            assert result['output'].shape == (4, 5)

    whole, first, second = make_task(), make_task(), make_task()
    optimizers = [create_optimizer_v2(t.trainable_module, 'sgd', lr=0.05) for t in (whole, first, second)]
    loop(whole, optimizers[0], range(4))
    loop(first, optimizers[1], range(2))
    saver = CheckpointSaver(first.get_eval_model(), optimizers[1], task=first, checkpoint_dir=str(tmp_path))
    saver.save_checkpoint(0, metric=1.0)
    assert resume_task_checkpoint(second, str(tmp_path / 'last.pth.tar'), optimizers[2], log_info=False) == 1
    loop(second, optimizers[2], range(2, 4))
    for a, b in zip(whole.trainable_module.parameters(), second.trainable_module.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_teacher_made_once_serves_as_it_is():
    teacher = create_teacher('test_vit', pretrained=False, num_classes=5)
    task = ProjectorEnsembleTask(timm.create_model('test_resnet', num_classes=5), teacher, verbose=False)
    assert task.teacher is teacher


@pytest.mark.parametrize('num_projectors', [1, 3])
def test_logits_through_projectors_equal_a_naive_formula(num_projectors):
    torch.manual_seed(0)
    student, teacher = timm.create_model('test_resnet', num_classes=5), timm.create_model('test_vit', num_classes=7)
    student.eval()
    teacher.eval()
    task = ProjectorEnsembleTask(
        student, teacher, target='logits', num_projectors=num_projectors, kd_temperature=2.0, verbose=False
    )
    x, y = batch()
    result = task(x, y)
    with torch.no_grad():
        logits, wanted = student(x), (teacher(x) / 2).softmax(1)
        fc = task.projection.projectors.fc
        maps = zip(fc.weight.chunk(num_projectors), fc.bias.chunk(num_projectors), strict=True)
        projected = sum(logits @ w.T + b for w, b in maps) / num_projectors
        kl = 4 * (wanted * (wanted.log() - (projected / 2).softmax(1).log())).sum() / len(x)
    torch.testing.assert_close(result['pe_loss'], kl)
    assert torch.equal(result['output'], logits)
    torch.testing.assert_close(result['loss'], 0.1 * result['task_loss'] + 0.9 * result['pe_loss'])


def test_a_run_on_logits_names_what_cannot_work():
    with pytest.raises(UsageError, match="unknown target 'logit': choose from feature, logits"):
        make_task(target='logit')
    with pytest.raises(UsageError, match="unknown teacher_norm 'bn': choose from none, batch, layer, whiten"):
        make_task(teacher_norm='bn')
    with pytest.raises(UsageError, match='softmax logits'):
        make_task(target='logits', multi_label=True)
    with pytest.raises(UsageError, match="teacher_norm 'layer' is for features"):
        make_task(target='logits', teacher_norm='layer')
    headless = timm.create_model('test_vit', num_classes=0)
    with pytest.raises(UsageError, match="teacher has no logits to project .* use target 'feature'"):
        ProjectorEnsembleTask(timm.create_model('test_resnet'), headless, target='logits', verbose=False)


@pytest.mark.parametrize(
    ('projector', 'norm', 'loss'),
    [('linear_bn', 'batch', 'logsum'), ('orthogonal', 'layer', 'mse'), ('orthogonal', 'whiten', 'mse')],
)
def test_projectors_of_later_papers_train_average_and_resume(projector, norm, loss):
    kwargs = {'projector': projector, 'teacher_norm': norm, 'feature_loss': loss, 'num_projectors': 1}
    task = make_task(teacher='test_vit2', **kwargs).train()
    task.setup_ema(decay=0.5)
    optimizer = create_optimizer_v2(task.trainable_module, 'adamw', lr=0.01)
    before = {n: p.clone() for n, p in task.projection.named_parameters()}
    for step in range(2):
        result = task(*batch(8))
        optimizer.zero_grad()
        result['loss'].backward()
        optimizer.step()
        task.update_ema(step=step)
    assert task.projection.act == 'none'  # a normalized feature has both signs
    for name, param in task.projection.named_parameters():
        assert not torch.equal(param, before[name]), name
    again = make_task(teacher='test_vit2', **kwargs)
    again.load_task_state(task.get_task_state())
    x = torch.randn(6, task.projection.in_dim)
    torch.testing.assert_close(again.projection.eval()(x), task.projection.eval()(x))
    with pytest.raises(UsageError, match=f'has projector={projector}, this run projector=linear'):
        make_task(teacher='test_vit2', num_projectors=1).load_task_state(task.get_task_state())


def test_the_loss_compares_with_the_normalized_feature_of_the_teacher():
    task = make_task(teacher_norm='layer', feature_loss='mse', act='none').eval()
    x, y = batch()
    with torch.no_grad():
        feature = task.teacher(x).feature
        wanted = (feature - feature.mean(1, keepdim=True)) / (
            feature.var(1, unbiased=False, keepdim=True) + 1e-5
        ).sqrt()
        _, projected = task.trainable_module(x)
        torch.testing.assert_close(task(x, y)['pe_loss'], (projected - wanted).pow(2).mean())


@pytest.mark.parametrize(
    ('norm', 'act', 'said'),
    [('none', 'relu', "teacher's features on the first batch are"), ('layer', 'none', "teacher's normalized features")],
)
def test_the_activation_follows_the_feature_that_the_loss_sees(norm, act, said, caplog):
    task = make_task(teacher='test_resnet', teacher_norm=norm)  # its own features are all >= 0
    task.verbose = True
    with caplog.at_level('INFO'):
        assert task.resolve_act(batch()[0]) == act
    assert said in caplog.text


@pytest.mark.parametrize('name', ['distill_loss_weight', 'task_loss_weight', 'kd_loss_weight', 'map_weight'])
@pytest.mark.parametrize('weight', [-1.0, float('nan'), float('inf')])
def test_a_weight_that_is_no_number_from_0_on_is_refused(name, weight):
    with pytest.raises(UsageError, match=f'{name} must be a number from 0 on, got {weight}'):
        make_task(**{name: weight})


def test_without_a_number_there_are_three_projectors_and_one_that_is_the_identity():
    assert make_task().projectors[0].num_projectors == 3
    assert (
        make_task(teacher='test_convnext', student='test_vit', projector='identity').projectors[0].num_projectors == 1
    )


class OwnLoss(nn.Module):
    """A loss that a user might bring: the mean distance, and what `how` adds."""

    def __init__(self, how: str):
        super().__init__()
        self.how = how
        if how == 'parameter':
            self.w = nn.Parameter(torch.ones(()))
        if how == 'buffer':
            self.register_buffer('calls', torch.zeros(()))

    def forward(self, projected, teacher):
        if self.how == 'buffer':
            self.calls += 1
            return self.calls * (projected - teacher).abs().mean()
        projected = projected.detach() if self.how == 'no gradient' else projected
        distance = (projected - teacher).abs()
        return distance.mean(1) if self.how == 'vector' else distance.mean()


@pytest.fixture
def own_loss(monkeypatch):
    def use(how):
        monkeypatch.setitem(losses.FEATURE_LOSSES.factories, 'direction', lambda: OwnLoss(how))

    return use


def test_a_feature_loss_with_parameters_is_refused_because_nothing_would_train_them(own_loss):
    own_loss('parameter')
    with pytest.raises(UsageError, match='has parameters, which no optimizer trains'):
        make_task()


@pytest.mark.parametrize(
    ('how', 'message'), [('vector', r'gives \[4\], it must give one number'), ('no gradient', 'has no gradient')]
)
def test_a_feature_loss_that_cannot_teach_is_refused_at_the_first_step(how, message, own_loss):
    own_loss(how)
    task = make_task()
    with pytest.raises(UsageError, match=message):
        task(*batch())
    with torch.no_grad():  # nothing is learnt here
        assert how == 'vector' or task(*batch())['pe_loss'] > 0


def test_what_a_feature_loss_has_counted_goes_on_after_a_resume(own_loss):
    own_loss('buffer')
    task, other = make_task(), make_task()
    for _ in range(3):
        task(*batch())
    state = task.get_task_state()
    other.load_task_state(state)
    assert other.feature_loss.calls == 3
    own_loss('plain')
    with pytest.raises(UsageError, match="the checkpoint's feature loss is not 'direction'"):
        make_task().load_task_state(state)
    assert 'feature_loss' not in make_task().get_task_state()


class TwoOutputs(nn.Module):
    def __init__(self, as_dict=False):
        super().__init__()
        self.fc, self.as_dict = nn.Linear(12, 5), as_dict

    def forward(self, x):
        logits = self.fc(x.flatten(1))
        return {'logits': logits} if self.as_dict else (logits, logits.square().mean())


@pytest.mark.parametrize(('as_dict', 'kind'), [(False, 'tuple'), (True, 'dict')])
def test_a_student_or_a_teacher_that_returns_more_than_its_logits_is_refused(as_dict, kind):
    x, y = torch.randn(4, 3, 2, 2), torch.tensor([0, 1, 2, 3])
    plain = nn.Sequential(nn.Flatten(), nn.Linear(12, 5))
    kwargs = {'student_tap': 'fc', 'teacher_tap': '1', 'input_mean': [0.5] * 3, 'input_std': [0.5] * 3}
    task = ProjectorEnsembleTask(TwoOutputs(as_dict), plain, act='none', verbose=False, **kwargs).train()
    with pytest.raises(UsageError, match=f'the student TwoOutputs returns a {kind}'):
        task(x, y)
    kwargs.update(student_tap='1', teacher_tap='fc')
    plain.num_classes = 5
    task = ProjectorEnsembleTask(plain, TwoOutputs(as_dict), act='none', kd_loss_weight=1.0, verbose=False, **kwargs)
    with pytest.raises(UsageError, match='the KD loss compares logits'):
        task.train()(x, y)
    with pytest.raises(UsageError, match=f'the teacher TwoOutputs gives a {kind} in place of logits'):
        task.teachers[0].forward_logits(x)


@pytest.mark.parametrize('as_dict', [False, True])
def test_of_networks_that_return_more_than_logits_the_features_are_compared(as_dict):
    x, y = torch.randn(4, 3, 2, 2), torch.tensor([0, 1, 2, 3])
    plain = nn.Sequential(nn.Flatten(), nn.Linear(12, 5))
    norm = {'input_mean': [0.5] * 3, 'input_std': [0.5] * 3}
    given = Teacher(TwoOutputs(as_dict), tap='fc', **norm)
    task = ProjectorEnsembleTask(plain, given, student_tap='1', act='none', verbose=False).train()
    assert task(x, y)['pe_loss'] > 0
    backbone = TwoOutputs(as_dict)
    backbone.num_classes = 0
    taps = {'student_tap': 'fc', 'teacher_tap': '1', **norm}
    task = ProjectorEnsembleTask(backbone, plain, act='none', verbose=False, **taps).train()
    assert set(task(x, y)) == {'loss', 'output', 'pe_loss'}


def test_a_teacher_that_another_module_puts_into_training_mode_does_not_train():
    teacher = timm.create_model('test_resnet', num_classes=5)
    task = ProjectorEnsembleTask(timm.create_model('test_vit', num_classes=5), teacher, verbose=False).train()
    before = copy.deepcopy(teacher.state_dict())
    teacher.train()
    x, y = batch()
    task(x, y)
    assert not any(m.training for m in teacher.modules())
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())


def test_a_norm_without_parameters_is_not_shared_either():
    norm = nn.BatchNorm1d(12, affine=False)
    student, teacher = (nn.Sequential(nn.Flatten(), norm, nn.Linear(12, 5)) for _ in range(2))
    with pytest.raises(UsageError, match='share parameters or norms'):
        ProjectorEnsembleTask(student, teacher, student_tap='2', teacher_tap='2', verbose=False)


def test_a_student_that_is_its_own_teacher_is_refused_before_it_is_frozen():
    student = timm.create_model('test_resnet', num_classes=5)
    for teacher in (student, nn.Sequential(student)):
        with pytest.raises(UsageError, match='share parameters'):
            ProjectorEnsembleTask(student, teacher, verbose=False)
    assert all(p.requires_grad for p in student.parameters())
    ProjectorEnsembleTask(student, copy.deepcopy(student), verbose=False)


def student_and_teacher_of_other_normalizations():
    torch.manual_seed(0)
    student = timm.create_model('test_vit', num_classes=5, img_size=32)
    teacher = timm.create_model('resnet10t', num_classes=5).eval()
    assert student.pretrained_cfg['mean'] != teacher.pretrained_cfg['mean']
    return student, teacher


def test_a_teacher_sees_the_same_images_however_it_is_given(tmp_path):
    student, teacher = student_and_teacher_of_other_normalizations()
    save_file(teacher.state_dict(), tmp_path / 'weights.safetensors')
    made = create_teacher('resnet10t', tmp_path / 'weights.safetensors')
    assert made.input_norm_by == 'nobody'
    x = torch.randn(2, 3, 32, 32)
    of_module = ProjectorEnsembleTask(student, copy.deepcopy(teacher), verbose=False).teacher(x)
    of_teacher = ProjectorEnsembleTask(student, made, verbose=False).teacher(x)
    assert made.input_norm_by == 'task'
    torch.testing.assert_close(of_teacher.feature, of_module.feature)
    mean, std = (torch.tensor(teacher.pretrained_cfg[k]).view(3, 1, 1) for k in ('mean', 'std'))
    naive = teacher.forward_head(teacher.forward_features((x * 0.5 + 0.5 - mean) / std), pre_logits=True)
    torch.testing.assert_close(of_teacher.feature, naive, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('channels', [1, 4])
def test_a_student_of_other_channels_has_the_normalization_that_timm_resolves_for_it(channels):
    student, teacher = (timm.create_model('test_efficientnet', in_chans=channels, num_classes=5) for _ in range(2))
    cfg = resolve_input_data_config(model=student)
    made = ProjectorEnsembleTask(student, teacher, verbose=False).teacher
    assert (made.input_mean, made.input_std) == (tuple(cfg['mean']), tuple(cfg['std']))
    assert len(made.input_mean) == channels
    assert not made.renormalizes


def test_two_answers_to_what_the_images_are_normalized_with_are_refused():
    student, teacher = student_and_teacher_of_other_normalizations()
    mean, std = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
    told = create_teacher(copy.deepcopy(teacher), input_mean=mean, input_std=std)
    with pytest.raises(
        UsageError, match=r'made for images of mean and std .*0.1.* the task is given .*0.7.* one of both'
    ):
        ProjectorEnsembleTask(student, told, input_mean=(0.7,) * 3, input_std=std, verbose=False)
    ProjectorEnsembleTask(student, told, input_mean=mean, input_std=std, verbose=False)
    ProjectorEnsembleTask(student, told, verbose=False)  # its maker knows better than the student's pretrained_cfg
    assert (told.input_mean, told.input_std) == (mean, std)
    shared = create_teacher(copy.deepcopy(teacher))
    ProjectorEnsembleTask(student, shared, verbose=False)
    ProjectorEnsembleTask(copy.deepcopy(student), shared, verbose=False)
    with pytest.raises(UsageError, match='make a Teacher for each'):
        ProjectorEnsembleTask(student, shared, input_mean=mean, input_std=std, verbose=False)


def test_what_the_maker_of_one_teacher_says_of_the_images_holds_for_the_others_of_the_task():
    student, teacher = student_and_teacher_of_other_normalizations()
    mean, std = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
    told = create_teacher(copy.deepcopy(teacher), input_mean=mean, input_std=std)
    others = [create_teacher(copy.deepcopy(teacher)), copy.deepcopy(teacher)]
    task = ProjectorEnsembleTask(student, [others[0], told, others[1]], verbose=False)
    assert [(t.input_mean, t.input_std) for t in task.teachers] == [(mean, std)] * 3
    otherwise = create_teacher(copy.deepcopy(teacher), input_mean=(0.7,) * 3, input_std=std)
    with pytest.raises(UsageError, match=r'teachers were made for images of mean and std .*0.1.* and .*0.7'):
        ProjectorEnsembleTask(copy.deepcopy(student), [told, otherwise], verbose=False)


def test_a_teacher_is_told_by_a_task_that_came_to_be_and_by_no_other():
    student, teacher = student_and_teacher_of_other_normalizations()
    made, own = create_teacher(teacher), tuple(teacher.pretrained_cfg['mean'])
    with pytest.raises(UsageError, match='teacher_feature_dim'):
        ProjectorEnsembleTask(student, made, teacher_feature_dim=3, verbose=False)
    assert (made.input_norm_by, made.input_mean) == ('nobody', own)
    plain = nn.Sequential(
        OrderedDict(conv=nn.Conv2d(3, 8, 3, 2), pool=nn.AdaptiveAvgPool2d(1), flat=nn.Flatten(), fc=nn.Linear(8, 5))
    )
    ProjectorEnsembleTask(plain, made, input_mean=(0.1,) * 3, student_tap='fc', verbose=False)
    assert made.input_mean == (0.1,) * 3
    assert made.input_std == tuple(teacher.pretrained_cfg['std'])
    with pytest.raises(UsageError, match='make a Teacher for each, or tell it first'):
        ProjectorEnsembleTask(student, made, verbose=False)
    made.set_input_norm((0.5,) * 3, (0.5,) * 3)
    ProjectorEnsembleTask(student, made, verbose=False)


def test_arguments_that_ask_for_nothing_are_no_arguments():
    student, teacher = student_and_teacher_of_other_normalizations()
    task = ProjectorEnsembleTask(
        student, create_teacher(teacher, model_kwargs={}), teacher_pretrained_path='', verbose=False
    )
    assert task.teacher.input_norm_by == 'task'


def test_clipping_of_a_student_that_does_not_tell_its_classifier_is_that_of_timm():
    class Untold(nn.Sequential):
        def get_classifier(self):
            raise NotImplementedError

    student = Untold(
        OrderedDict(conv=nn.Conv2d(3, 8, 3, 2), pool=nn.AdaptiveAvgPool2d(1), flat=nn.Flatten(), fc=nn.Linear(8, 5))
    )
    task = ProjectorEnsembleTask(student, timm.create_model('test_vit', num_classes=5), student_tap='fc', verbose=False)
    clipped = {id(p) for p in task.get_clip_parameters(exclude_head=True)}
    assert [n for n, p in student.named_parameters() if id(p) not in clipped] == ['fc.weight', 'fc.bias']


@pytest.mark.parametrize(
    ('create', 'given', 'named'),
    [
        (
            create_teacher,
            {'teacher_pretrained_path': 'x'},
            'a Teacher is given as the teacher, and teacher_pretrained_path',
        ),
        (create_teacher, {'teacher_tap': 'fc'}, 'teacher_tap cannot change it'),
        (nn.Identity, {'teacher_pretrained_cfg_overlay': {'mean': (0.1,) * 3}}, 'a module is given as the teacher'),
    ],
)
def test_an_argument_that_a_given_teacher_cannot_follow_is_refused(create, given, named):
    student, teacher = student_and_teacher_of_other_normalizations()
    teacher = create_teacher(teacher) if create is create_teacher else teacher
    with pytest.raises(UsageError, match=named):
        ProjectorEnsembleTask(student, teacher, verbose=False, **given)


def test_a_student_without_memory_is_not_where_the_teacher_goes():
    student, teacher = student_and_teacher_of_other_normalizations()
    assert ProjectorEnsembleTask(student.to('meta'), teacher, verbose=False).device == torch.device('cpu')
    assert all(p.device.type == 'cpu' for p in teacher.parameters())


def test_a_task_follows_to_another_dtype_as_timms_does_and_the_normalization_stays_exact():
    torch.manual_seed(0)
    task = make_task(act='none', input_mean=(0.1, 0.2, 0.3), input_std=(0.3, 0.2, 0.1)).train()
    shift = task.teacher.shift.clone()
    x, y = batch()
    expected = task(x, y)['loss'].item()
    task.to(torch.bfloat16)
    result = task(x.bfloat16(), y)
    result['loss'].backward()
    assert result['loss'].item() == pytest.approx(expected, rel=0.05)
    assert torch.equal(task.teacher.shift, shift)


def test_a_task_can_be_saved_whole(tmp_path):
    task = make_task(act='none')
    torch.save(task, tmp_path / 'task.pt')
    again = torch.load(tmp_path / 'task.pt', weights_only=False)
    assert torch.equal(again(*batch())['loss'], task(*batch())['loss'])
