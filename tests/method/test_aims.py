"""Several teachers: the aims of a task, their terms and their state."""

import copy
import socket

import pytest
import timm
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from helpers import compiled_and_eager
from timm.optim import create_optimizer_v2
from torch.utils._python_dispatch import TorchDispatchMode

from timm_pe import ProjectorEnsembleTask, TeacherOutput, UsageError, create_teacher
from timm_pe.method.aims import draw_kept
from timm_pe.method.losses import average_logits
from timm_pe.method.teachers import name_teachers

TEACHERS = ('test_resnet', 'test_vit')


def networks(student='test_vit', teachers=TEACHERS, classes=5, seed=0):
    torch.manual_seed(seed)
    return (
        timm.create_model(student, num_classes=5),
        [timm.create_model(name, num_classes=classes).eval() for name in teachers],
    )


def make_task(student='test_vit', teachers=TEACHERS, classes=5, **kwargs):
    model, models = networks(student, teachers, classes)
    torch.manual_seed(1)
    return ProjectorEnsembleTask(model, models, verbose=False, **kwargs)


def batch(n=4, size=160, seed=1):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, 3, size, size, generator=g), torch.randint(0, 5, (n,), generator=g)


def in_float64(task):
    task = task.double()
    for teacher in task.teachers:
        teacher.input_dtype = torch.float64
    return task


def penultimate(model, x):
    return model.forward_head(model.forward_features(x), pre_logits=True)


def naive_distances(student, teachers, projectors, x):
    """1 - cos of each image to each teacher, [b, t]: sums and divisions by hand."""
    s, columns = penultimate(student, x), []
    for teacher, linears, act in zip(teachers, projectors, (lambda p: p.clamp(min=0), lambda p: p), strict=True):
        with torch.no_grad():
            t = penultimate(teacher, x)
        p = sum(act(linear(s)) for linear in linears) / len(linears)
        columns.append(1 - (p * t).sum(1) / ((p * p).sum(1).sqrt() * (t * t).sum(1).sqrt()))
    return torch.stack(columns, dim=1)


def as_linears(ensemble):
    """The projectors of an ensemble, as Linear layers with weights of their own."""
    fc, linears = ensemble.projectors.fc, []
    for w, b in zip(fc.weight.chunk(3), fc.bias.chunk(3), strict=True):
        linear = nn.Linear(w.shape[1], w.shape[0]).double()
        linear.weight.data.copy_(w.data)
        linear.bias.data.copy_(b.data)
        linears.append(linear)
    return nn.ModuleList(linears)


def naive_twin(task):
    """Student, teachers and projectors of a task in float64, copied."""
    student = copy.deepcopy(task.trainable_module.student)
    for module in student.modules():
        module._forward_pre_hooks.clear()
    return student, [t.model for t in task.teachers], nn.ModuleList(as_linears(p) for p in task.projectors)


def check_gradients(task, student, projectors, rtol=1e-10):
    named = dict(student.named_parameters())
    for name, p in task.trainable_module.student.named_parameters():
        torch.testing.assert_close(p.grad, named[name].grad, rtol=rtol, atol=1e-14, msg=name)
    for ensemble, linears in zip(task.projectors, projectors, strict=True):
        fc = ensemble.projectors.fc
        torch.testing.assert_close(fc.weight.grad, torch.cat([x.weight.grad for x in linears]), rtol=rtol, atol=1e-14)
        torch.testing.assert_close(fc.bias.grad, torch.cat([x.bias.grad for x in linears]), rtol=rtol, atol=1e-14)


def test_twenty_steps_with_two_teachers_equal_a_naive_rewriting():
    task = in_float64(make_task(teacher_weights=[3, 1])).train()
    task.resolve_act(batch()[0].double())
    assert [p.act for p in task.projectors] == ['relu', 'none']
    student, teachers, projectors = naive_twin(task)
    settings = {'lr': 0.001, 'momentum': 0.9}
    ours = torch.optim.SGD(task.trainable_module.parameters(), **settings)
    naive = torch.optim.SGD([*student.parameters(), *projectors.parameters()], **settings)
    for step in range(20):
        x, y = batch(seed=step)
        x = x.double()
        result = task(x, y)
        ours.zero_grad()
        result['loss'].backward()
        distances = naive_distances(student, teachers, projectors, x).mean(0)
        pe = 0.75 * distances[0] + 0.25 * distances[1]
        loss = F.cross_entropy(student(x), y) + 25 * pe
        naive.zero_grad()
        loss.backward()
        expected = [loss.item(), pe.item(), *distances.tolist()]
        actual = [result[k].item() for k in ('loss', 'pe_loss', 'pe_loss_test_resnet', 'pe_loss_test_vit')]
        assert actual == pytest.approx(expected, rel=1e-10), step
        check_gradients(task, student, projectors)
        ours.step()
        naive.step()


def test_one_teacher_in_a_list_is_bit_equal_to_it_alone():
    tasks = []
    for wrap in (lambda t: t, lambda t: [t]):
        student, teachers = networks(teachers=['test_vit2'])
        torch.manual_seed(1)
        tasks.append(ProjectorEnsembleTask(student, wrap(teachers[0]), kd_loss_weight=0.5, verbose=False).train())
    results = [task(*batch()) for task in tasks]
    assert set(results[0]) == set(results[1]) == {'loss', 'output', 'task_loss', 'pe_loss', 'logit_loss'}
    for name, value in results[0].items():
        assert torch.equal(value, results[1][name]), name
    for result in results:
        result['loss'].backward()
    for a, b in zip(*(task.trainable_module.parameters() for task in tasks), strict=True):
        assert torch.equal(a.grad, b.grad)
    assert list(tasks[0].state_dict()) == list(tasks[1].state_dict())
    states = [task.get_task_state() for task in tasks]
    assert set(states[1]['projection']) == {'projectors.fc.weight', 'projectors.fc.bias'}
    assert {k: v for k, v in states[0].items() if k != 'projection'} == {
        k: v for k, v in states[1].items() if k != 'projection'
    }


class CountOperators(TorchDispatchMode):
    number = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.number += 1
        return func(*args, **(kwargs or {}))


def test_a_step_with_one_teacher_calls_no_operator_that_the_formula_does_not_have():
    task = make_task(teachers=['test_resnet'], act='relu').train()
    x, y = batch()
    module = task.trainable_module

    def formula():
        wanted = task.teacher(x).feature
        logits = module.student(x)
        projected = module.projection(module.tap.pop())
        return task.criterion(logits, y) * 1.0 + 25.0 * task.feature_loss(projected, wanted)

    counts = []
    for step in (formula, formula, lambda: task(x, y)['loss']):  # the first settles what a network can do
        with CountOperators() as count:
            step().backward()
        counts.append(count.number)
    assert counts[1] == counts[2] > 100


def test_teacher_drop_equals_a_naive_loop_over_images_with_the_same_random_numbers():
    task = in_float64(make_task(teacher_weights=[1, 3], teacher_drop=0.6)).train()
    x, y = batch(8)
    x = x.double()
    task.resolve_act(x)
    student, teachers, projectors = naive_twin(task)
    torch.manual_seed(5)
    result = task(x, y)
    result['loss'].backward()
    torch.manual_seed(5)
    draws = torch.rand(8, 2, dtype=torch.float64)
    distances = naive_distances(student, teachers, projectors, x)
    learnt, total, dropped = 0.0, 0.0, 0
    for i in range(8):
        worst = max(range(2), key=lambda t: distances[i, t].item())
        for t, weight in enumerate((0.25, 0.75)):
            if t != worst and draws[i, t] < 0.6:
                dropped += 1
                continue
            learnt = learnt + weight * distances[i, t]
            total += weight
    assert 0 < dropped < 8
    pe = learnt / total
    assert result['pe_loss'].item() == pytest.approx(pe.item(), rel=1e-10)
    (F.cross_entropy(student(x), y) + 25 * pe).backward()
    check_gradients(task, student, projectors)
    # what each teacher is told apart by is over all images
    assert result['pe_loss_test_vit'].item() == pytest.approx(distances[:, 1].mean().item(), rel=1e-10)


def test_teacher_drop_rests_in_evaluation_and_keeps_at_least_the_worst_matched_teacher():
    dropping, plain = make_task(teacher_drop=1.0, act='none').eval(), make_task(act='none').eval()
    assert torch.equal(dropping(*batch())['loss'], plain(*batch())['loss'])
    losses = torch.tensor([[0.1, 0.3, 0.2], [0.9, 0.3, 0.2]])
    assert draw_kept(losses, 1.0).tolist() == [[False, True, False], [True, False, False]]
    assert draw_kept(losses, 0.0).all()


def test_logits_are_compared_with_the_mean_probabilities_of_the_teachers_of_the_students_classes():
    student, teachers = networks(teachers=('test_resnet', 'test_vit', 'test_vit2'))
    teachers[1] = timm.create_model('test_vit', num_classes=7)
    task = ProjectorEnsembleTask(
        student, teachers, kd_loss_weight=2.0, kd_temperature=3.0, teacher_weights=[1, 5, 3], verbose=False
    ).eval()
    assert task.kd_teachers == [0, 2]
    x, y = batch()
    with torch.no_grad():
        result = task(x, y)
        p = 0.25 * (teachers[0](x) / 3).softmax(1) + 0.75 * (teachers[2](x) / 3).softmax(1)
        kl = 9 * (p * (p.log() - (student(x) / 3).log_softmax(1))).sum() / len(x)
    torch.testing.assert_close(result['logit_loss'], kl)
    total = result['task_loss'] + 25 * result['pe_loss'] + 2 * result['logit_loss']
    torch.testing.assert_close(result['loss'], total)
    with pytest.raises(
        UsageError, match='the student has 5 and the teacher test_resnet 7, the teacher test_vit 7: set'
    ):
        make_task(classes=7, kd_loss_weight=1.0)


def test_the_mean_of_one_teachers_logits_is_those_logits():
    logits = torch.randn(4, 5)
    assert average_logits([logits], [0.3], 4.0) is logits
    torch.testing.assert_close(average_logits([logits, logits], [1, 2], 2.0).softmax(1), logits.softmax(1))


def test_each_teacher_has_its_own_term_under_a_name_that_no_other_has():
    task = make_task(teachers=('test_vit', 'test_resnet', 'test_vit'), act='none')
    assert task.teacher_names == ['test_vit', 'test_resnet', 'test_vit_2']
    student, models = networks()
    assert len(ProjectorEnsembleTask(student, nn.ModuleList(models), verbose=False).teachers) == 2
    result = task(*batch())
    own = [result[f'pe_loss_{name}'] for name in task.teacher_names]
    torch.testing.assert_close(result['pe_loss'], torch.stack(own).mean())
    assert set(result) == {'loss', 'output', 'task_loss', 'pe_loss', *(f'pe_loss_{n}' for n in task.teacher_names)}


def test_teachers_of_one_architecture_are_named_by_the_tags_of_their_weights():
    teachers = [timm.create_model(name) for name in ('vit_tiny_patch16_224.augreg_in21k', 'vit_tiny_patch16_224.augreg_in21k_ft_in1k', 'test_vit')]  # fmt: skip
    wrapped = [create_teacher(model, input_mean=(0.5,) * 3, input_std=(0.5,) * 3) for model in teachers]
    tagged = ['vit_tiny_patch16_224_augreg_in21k', 'vit_tiny_patch16_224_augreg_in21k_ft_in1k']
    assert name_teachers(wrapped) == [*tagged, 'test_vit']
    assert name_teachers(wrapped[1:]) == ['vit_tiny_patch16_224', 'test_vit']
    same = [
        create_teacher(timm.create_model('test_vit'), input_mean=(0.5,) * 3, input_std=(0.5,) * 3) for _ in range(2)
    ]
    assert name_teachers(same) == ['test_vit', 'test_vit_2']
    # random weights, or those of a file, are not those of the tag
    random = [create_teacher(name, pretrained=False, input_mean=(0.5,) * 3, input_std=(0.5,) * 3) for name in ('vit_tiny_patch16_224.augreg_in21k', 'vit_tiny_patch16_224.augreg_in21k_ft_in1k')]  # fmt: skip
    assert name_teachers(random) == ['vit_tiny_patch16_224', 'vit_tiny_patch16_224_2']


def test_outputs_that_are_given_for_all_teachers_replace_them():
    task = make_task(kd_loss_weight=1.0).eval()
    x, y = batch()
    outputs = [teacher(x) for teacher in task.teachers]
    expected = task(x, y)
    for teacher in task.teachers:
        teacher.forward = None
    given = task(x, y, teacher=outputs)
    assert all(torch.equal(expected[name], given[name]) for name in expected)
    assert task.resolve_act(x, outputs) == {'feature_test_resnet': 'relu', 'feature_test_vit': 'none'}
    with pytest.raises(UsageError, match='1 outputs are given for 2 teachers: give one of each'):
        task(x, y, teacher=outputs[0])


def test_a_missing_output_is_said_in_one_line():
    task = make_task(teachers=['test_resnet'], target='logits')
    x, y = batch()
    with pytest.raises(
        UsageError, match="'pe_loss_test_resnet' compares with the teacher's logits, which its output lacks"
    ):
        task(x, y, teacher=TeacherOutput(task.teacher(x).feature, None))


def test_targets_of_logits_work_with_teachers_of_other_classes():
    student, teachers = networks()
    teachers[1] = timm.create_model('test_vit', num_classes=7).eval()
    task = ProjectorEnsembleTask(student, teachers, target='logits', verbose=False).train()
    result = task(*batch())
    result['loss'].backward()
    assert [p.out_dim for p in task.projectors] == [5, 7]
    assert result['pe_loss'].item() == pytest.approx(
        (result['pe_loss_test_resnet'] + result['pe_loss_test_vit']).item() / 2
    )


def test_every_projector_of_every_teacher_trains_and_is_checked_in_the_optimizer():
    task = make_task().train()
    optimizer = create_optimizer_v2(task.trainable_module, 'sgd', lr=0.1)
    task.check_optimizer(optimizer)
    before = {n: p.clone() for n, p in task.projection.named_parameters()}
    assert set(before) == {f'feature_{n}.projectors.fc.{k}' for n in TEACHERS for k in ('weight', 'bias')}
    task(*batch())['loss'].backward()
    optimizer.step()
    for name, param in task.projection.named_parameters():
        assert not torch.equal(param, before[name]), name
    assert not any(t.model.training or p.requires_grad for t in task.teachers for p in t.parameters())


def test_state_and_average_of_several_teachers_resume_bit_for_bit(tmp_path):
    whole, second = make_task().train(), make_task().train()
    for task in (whole, second):
        task.setup_ema(decay=0.5)
    optimizer = create_optimizer_v2(whole.trainable_module, 'sgd', lr=0.05)
    whole(*batch())['loss'].backward()
    optimizer.step()
    whole.update_ema(step=1)
    state = {**whole.get_checkpoint_state(), **whole.get_checkpoint_state(ema=True)}
    assert set(state['state_dict']) == set(networks()[0].state_dict())
    torch.save(state, tmp_path / 'state.pt')
    state = torch.load(tmp_path / 'state.pt', weights_only=True)
    second.load_checkpoint_state(state['state_dict'], state['task_state'])
    second.load_checkpoint_state(state['state_dict_ema'], state['task_state_ema'], ema=True)
    assert second.act == {'feature_test_resnet': 'relu', 'feature_test_vit': 'none'}
    assert torch.equal(whole(*batch())['loss'], second(*batch())['loss'])
    x = batch()[0]
    averages = [task.get_trainable_module(ema=True).module.eval() for task in (whole, second)]
    for a, b in zip(*(average(x) for average in averages), strict=True):
        assert torch.equal(a, b)


def test_a_checkpoint_of_other_teachers_is_refused_in_one_line():
    two, one = make_task(act='none'), make_task(teachers=['test_resnet'], act='none')
    other = make_task(teachers=('test_resnet', 'test_convnext'), act='none')
    for task, state in ((one, two.get_task_state()), (two, one.get_task_state()), (two, other.get_task_state())):
        with pytest.raises(UsageError, match='the checkpoint has projectors to .*, this run to .*: give the same') as e:
            task.load_task_state(state)
        assert '\n' not in str(e.value)
    with pytest.raises(UsageError, match='act=none, this run act=relu'):
        make_task(act='relu').load_task_state(two.get_task_state())
    wider = make_task(student='test_resnet', act='none').get_task_state()
    with pytest.raises(UsageError, match="the checkpoint's projectors are not those of") as e:
        two.load_task_state(wider)
    assert '\n' not in str(e.value)


@pytest.mark.long
def test_compiled_tasks_of_several_teachers_equal_eager_ones_with_fullgraph():
    compiled, eager = compiled_and_eager(lambda: make_task(teacher_drop=0.5), batch)
    assert all(t._compiled for t in compiled.teachers)
    assert set(compiled.get_task_state()['projection']) == set(eager.get_task_state()['projection'])


def test_a_task_of_several_teachers_is_saved_whole_and_follows_to_another_dtype(tmp_path):
    task = make_task(act='none')
    torch.save(task, tmp_path / 'task.pt')
    again = torch.load(tmp_path / 'task.pt', weights_only=False)
    expected = task(*batch())['loss'].item()
    assert again(*batch())['loss'].item() == expected
    x, y = batch()
    assert task.to(torch.bfloat16)(x.bfloat16(), y)['loss'].item() == pytest.approx(expected, rel=0.05)


def distributed_step(rank, port, folder):
    dist.init_process_group('gloo', f'tcp://localhost:{port}', rank=rank, world_size=2)
    task = make_task(map_weight=3.0).train()
    task.prepare_distributed()
    x, y = (half.chunk(2)[rank] for half in batch(8))
    if rank:  # the first rank's batch decides
        for teacher in task.teachers:
            teacher.register_forward_hook(lambda m, args, out: TeacherOutput(out.feature.abs(), None, out.map.abs()))
    task.resolve_act(x)
    acts = [p.act for p in task.projectors]
    for teacher in task.teachers:
        teacher._forward_hooks.clear()
    task(x, y)['loss'].backward()
    torch.save((acts, [p.grad for p in task.trainable_module.parameters()]), f'{folder}/{rank}.pt')
    dist.destroy_process_group()


def test_two_ranks_have_the_gradients_of_the_whole_batch_and_the_first_ranks_activations(tmp_path):
    with socket.socket() as s:
        s.bind(('localhost', 0))
        port = s.getsockname()[1]
    torch.multiprocessing.spawn(distributed_step, (port, str(tmp_path)), nprocs=2)
    task = make_task(map_weight=3.0).train()
    task(*batch(8))['loss'].backward()
    expected = [p.grad for p in task.trainable_module.parameters()]
    for rank in range(2):
        acts, gradients = torch.load(tmp_path / f'{rank}.pt')
        assert acts == ['relu', 'none', 'relu', 'none']
        for a, b in zip(gradients, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ('kwargs', 'message'),
    [
        ({'teacher_weights': [1, 2, 3]}, '3 teacher_weights for 2 teachers: give one for each'),
        ({'teacher_weights': [1, 0]}, 'teacher_weights must be above 0'),
        ({'teacher_weights': [1, float('nan')]}, 'teacher_weights must be above 0'),
        ({'teachers': []}, 'the list of teachers is empty: give one or more'),
        ({'teacher_drop': 1.5}, 'teacher_drop is a probability from 0 to 1, got 1.5'),
        ({'teachers': ['test_vit'], 'teacher_drop': 0.5}, 'chooses between teachers, and there is one'),
        ({'feature_loss': 'mse', 'teacher_drop': 0.5}, "which 'mse' does not give: use the feature loss 'direction'"),
        ({'teacher_tap': 'fc'}, r'teacher_tap cannot say which of 2 teachers is meant: make each with create_teacher'),
        ({'teacher_feature_dim': 64}, 'teacher_feature_dim cannot say which of 2 teachers'),
    ],
)
def test_what_cannot_be_meant_of_several_teachers_is_refused_in_one_line(kwargs, message):
    with pytest.raises(UsageError, match=message) as e:
        make_task(**kwargs)
    assert '\n' not in str(e.value)


def test_one_network_twice_and_logits_that_a_teacher_leaves_out_are_refused():
    student, (first, second) = networks()
    with pytest.raises(UsageError, match='teachers 1 and 3 share parameters or norms: give each network once'):
        ProjectorEnsembleTask(student, [first, second, nn.Sequential(first)], verbose=False)
    with pytest.raises(UsageError, match='student and teacher share parameters'):
        ProjectorEnsembleTask(student, [first, student], verbose=False)
    teachers = [first, create_teacher(second, needs_logits=False)]
    with pytest.raises(UsageError, match='made with needs_logits=False'):
        ProjectorEnsembleTask(student, teachers, kd_loss_weight=1.0, verbose=False)
    with pytest.raises(UsageError, match='the student has 0 and the teacher test_resnet 5'):
        ProjectorEnsembleTask(timm.create_model('test_vit2', num_classes=0), [first, second], kd_loss_weight=1.0)
