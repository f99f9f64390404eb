"""Runs with several teachers, and with feature maps, by the command line."""

import json
import re

import pytest
import torch
import yaml
from helpers import load, make_trainer, refused, run, stopped, summary
from PIL import Image

from timm_pe import analysis, precompute
from timm_pe.config.run_config import parse_config
from timm_pe.config.teachers import teachers_of
from timm_pe.method.teacher import Teacher
from timm_pe.process.signals import Interrupts
from timm_pe.report import main as report
from timm_pe.run_folder import RunFolder
from timm_pe.runs.maps import paint
from timm_pe.runs.reopen import Options, collect, open_run
from timm_pe.train.main import fill_from_runs

TEACHERS = ('test_vit', 'test_convnext')
# at 64 pixels the maps have more than one position
TWO = ['--model', 'test_resnet', '--img-size', '64', '--no-teacher-pretrained', '--teacher', *TEACHERS]
MAPS = ['--pe-map-weight', '0.5']


def config_of(*flags):
    return parse_config(['--dataset', 'sklearn/digits', *flags])


def values(folder, column):
    return [float(row[column]) for row in summary(folder)]


# Settings ---------------------------------------------------------------------------------------------------------------


def test_a_flag_has_one_value_for_all_teachers_or_one_for_each():
    flags = ['--teacher', *TEACHERS, '--teacher-num-classes', '7', '--teacher-dtype', '-', 'float32']
    first, second = teachers_of(config_of(*flags, '--teacher-mean', '0.1', '0.2', '0.3'))
    assert (first.name, second.name) == TEACHERS
    assert (first.num_classes, second.num_classes) == (7, 7)
    assert (first.dtype, second.dtype) == ('auto', 'float32')
    assert first.mean == second.mean == [0.1, 0.2, 0.3]


def test_yaml_lists_teachers_with_settings_of_their_own(tmp_path):
    file = tmp_path / 'two.yaml'
    file.write_text(
        'teacher:\n'
        '- {name: test_vit, mean: [0.1, 0.2, 0.3], weight: 2, kwargs: {drop_rate: 0.1}}\n'
        '- {name: test_convnext, input-size: 48, dtype: float32, weight: 1}\n'
    )
    config = config_of('-c', str(file))
    first, second = teachers_of(config)
    assert (first.mean, first.kwargs, first.input_size, first.dtype) == (
        [0.1, 0.2, 0.3],
        {'drop_rate': 0.1},
        None,
        'auto',
    )
    assert (second.mean, second.kwargs, second.input_size, second.dtype) == (None, {}, 48, 'float32')
    assert config.teacher_weights == [2, 1]
    again = tmp_path / 'args.yaml'
    again.write_text(config.to_yaml())
    assert teachers_of(config_of('-c', str(again))) == [first, second]


def test_a_list_of_one_is_a_single_teacher(tmp_path):
    file = tmp_path / 'one.yaml'
    file.write_text('teacher: [{name: test_vit, tap: head}]')
    config = config_of('-c', str(file))
    assert (config.teacher, config.teacher_tap) == ('test_vit', 'head')


@pytest.mark.parametrize('flag', ['--teacher', '--teacher-input-size', '--teacher-checkpoint'])
def test_the_data_folder_may_follow_a_flag_of_the_teacher(flag, image_folder):
    value = {'--teacher': 'test_vit', '--teacher-input-size': '32', '--teacher-checkpoint': 'weights.pth'}[flag]
    teacher = [] if flag == '--teacher' else ['--teacher', 'test_vit']
    config = parse_config([*teacher, flag, value, str(image_folder)])
    assert config.data == str(image_folder)
    assert str(getattr(config, flag[2:].replace('-', '_'))) == value


def test_a_folder_of_the_name_of_a_network_is_a_teacher_and_a_path_is_data_though_it_is_not_there(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'test_resnet').mkdir()
    (tmp_path / 'pictures' / 'train').mkdir(parents=True)
    for words, teacher, data in (
        (['test_vit', 'test_resnet', '--dataset', 'sklearn/digits'], ['test_vit', 'test_resnet'], None),
        (['test_vit', 'test_resnet', '--data-dir', 'pictures'], ['test_vit', 'test_resnet'], None),
        (['test_vit', 'pictures'], 'test_vit', 'pictures'),
        (['test_vit', './test_resnet'], 'test_vit', './test_resnet'),
        (['test_vit', '/no/where'], 'test_vit', '/no/where'),
        (['test_vit', 'pictures', '--dataset', 'sklearn/digits'], ['test_vit', 'pictures'], None),
    ):
        config = parse_config(['--teacher', *words])
        assert (config.teacher, config.data) == (teacher, data), words


def test_a_dash_alone_is_the_default(small_run):
    config = config_of('--teacher', 'test_vit', '--teacher-dtype', '-', '--teacher-num-classes', '-')
    assert (config.teacher_dtype, config.teacher_num_classes) == ('auto', None)


def test_run_folders_name_those_of_several_teachers_that_have_no_name(small_run, tmp_path):
    run([*small_run, '--model', 'test_resnet', '--epochs', '1', '--experiment', 'a'])
    folder, file = str(tmp_path / 'a'), tmp_path / 'two.yaml'
    first = ['--teacher', '-', 'test_vit', '--teacher-checkpoint', folder, '-']
    second = ['--teacher', 'test_vit', '-', '--teacher-checkpoint', '-', folder]
    for flags, names in ((first, ['test_resnet', 'test_vit']), (second, ['test_vit', 'test_resnet'])):
        assert parse_config([*small_run, *flags], more=fill_from_runs).teacher == names
    for text, names in (
        (f'teacher: [{{checkpoint: {folder}}}, {{name: test_vit}}]', ['test_resnet', 'test_vit']),
        (f'teacher: [{{checkpoint: {folder}}}, {{checkpoint: {folder}}}]', ['test_resnet', 'test_resnet']),
        (f'teacher: {{checkpoint: {folder}}}', 'test_resnet'),
        (f'teacher: ["-", test_vit]\nteacher_checkpoint: [{folder}, "-"]', ['test_resnet', 'test_vit']),
    ):
        file.write_text(text)
        config = parse_config([*small_run, '-c', str(file)], more=fill_from_runs)
        assert config.teacher == names, text
        assert [teacher.checkpoint for teacher in teachers_of(config)].count(folder) == text.count(folder)


@pytest.mark.parametrize(
    ('flags', 'message'),
    [
        (['--teacher', *TEACHERS, '--teacher-checkpoint', 'x.pth'], "give one for each of 2 teachers, '-' for one without"),
        (['--teacher', '-'], "--teacher: '-' names no teacher"),
        (['--teacher', 'test_vit', 'no_such'], "--teacher: unknown model 'no_such'"),
        (['--teacher', *TEACHERS, '--teacher-num-classes', '3', '4', '5'], 'has 3 values for 2 teachers: give one for all'),
        (['--teacher', 'test_vit', '--teacher-dtype', 'float32', 'bfloat16'], 'has 2 values for one teacher'),
        (['--teacher', *TEACHERS, '--teacher-weights', '1'], '--teacher-weights has 1 values for 2 teachers'),
        (['--teacher', *TEACHERS, '--teacher-weights', '1', '0'], '--teacher-weights must be above 0'),
        (['--teacher', 'test_vit', '--teacher-drop', '0.5'], '--teacher-drop is about several teachers'),
        (['--teacher', 'test_vit', '-'], 'one of several has no name'),
        (['--teacher', *TEACHERS, '--teacher-num-classes', 'x'], "invalid int value: 'x'"),
        (['--teacher', *TEACHERS, '--teacher-dtype', 'float32', 'int3'], '--teacher-dtype must be one of'),
        (['--teacher', *TEACHERS, '--teacher-drop', '0.5', '--pe-loss', 'mse'], 'needs a loss of each image'),
        (['--pe-map-weight', '1'], '--pe-map-weight needs --teacher'),
        (['--teacher', 'test_vit', '--pe-map-weight', '-1'], '--pe-map-weight must be 0 or more'),
    ],
)  # fmt: skip
def test_what_cannot_be_meant_is_one_line_and_nothing_is_written(small_run, flags, message, capsys, tmp_path):
    argv = [*small_run, '--model', 'test_resnet', '--no-teacher-pretrained']
    argv = argv if '--teacher' in flags else [f for f in argv if f != '--no-teacher-pretrained']
    assert message in refused([*argv, *flags], capsys)
    assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize(
    ('text', 'message'),
    [
        ('teacher: [{name: test_vit, speed: 3}]', "got 'speed'"),
        ('teacher: [{name: test_vit, weight: 3}, test_convnext]', 'give a weight to each teacher'),
        ('teacher: [{name: test_vit, tap: head}]\nteacher_tap: head', 'teacher_tap is given there and by itself'),
        ('teacher: [null]', 'must be one value, or one for each teacher'),
        ('teacher: []', 'must be one value, or one for each teacher'),
        ('teacher: [[test_vit]]', 'must be one value, or one for each teacher'),
        ('teacher: [{name: test_vit, input_size: big}]', 'must be of type int'),
    ],
)
def test_a_list_of_teachers_in_yaml_is_checked(text, message, tmp_path, capsys, small_run):
    file = tmp_path / 'odd.yaml'
    file.write_text(text)
    assert message in refused([*small_run, '-c', str(file)], capsys)


def test_a_model_without_a_map_is_refused_in_one_line(small_run, capsys, tmp_path):
    argv = [*small_run, '--model', 'test_resnet', '--no-teacher-pretrained', '--teacher', 'pit_ti_224', *MAPS]
    assert 'has no feature map' in refused(argv, capsys)
    assert not (tmp_path / 'run').exists()


def test_names_on_the_command_line_do_not_take_the_settings_of_others_in_yaml(small_run, tmp_path, capsys):
    file = tmp_path / 'two.yaml'
    file.write_text('teacher: [{name: test_vit, checkpoint: w.pth}, {name: test_convnext}]')
    assert 'lists teachers with their settings' in refused(
        [*small_run, '-c', str(file), '--teacher', *TEACHERS], capsys
    )


# Runs -------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def two(image_folder, tmp_path_factory):
    """The folder of a run with two teachers and maps."""
    output = tmp_path_factory.mktemp('two')
    argv = [
        *(str(image_folder), '-b', '9', '-j', '0', '--device', 'cpu', '--epochs', '2', '--warmup-epochs', '0'),
        *('--lr', '0.02', '--output', str(output), '--experiment', 'run', *TWO, *MAPS, '--teacher-weights', '3', '1'),
    ]
    run(argv)
    return output / 'run', argv


def test_each_teacher_has_its_term_and_the_terms_are_their_weighted_mean(two):
    folder, _ = two
    for term in ('pe_loss', 'map_loss'):
        both = [values(folder, f'train_{term}_{name}') for name in TEACHERS]
        expected = [0.75 * a + 0.25 * b for a, b in zip(*both, strict=True)]
        assert values(folder, f'train_{term}') == pytest.approx(expected, rel=1e-5)
    for task, vector, of_map, loss in zip(
        *(values(folder, f'train_{name}') for name in ('task_loss', 'pe_loss', 'map_loss', 'loss')), strict=True
    ):
        assert loss == pytest.approx(task + 25 * vector + 0.5 * of_map, rel=1e-5)


def test_the_student_of_several_teachers_is_evaluated_exported_and_analysed_like_any_other(two, capsys, tmp_path):
    folder, _ = two
    out = run(['--evaluate', str(folder), '-j', '0', '--device', 'cpu'], capsys)
    assert f'top-1 {max(values(folder, "eval_top1")):.3f} %' in out
    result = analysis.analyze(folder)
    assert list(result['teachers']) == list(TEACHERS)
    each = list(result['teachers'].values())
    for name in ('cosine', 'cka'):
        mean = sum(teacher[name]['validation'] for teacher in each) / 2
        assert result[name]['validation'] == pytest.approx(mean)
    opened = open_run(RunFolder(folder), Options())
    split = collect(opened, 'validation')
    for i, teacher in enumerate(each):
        with torch.inference_mode():
            projected = opened.task.projectors[i](split.feature)
        expected = torch.nn.functional.cosine_similarity(projected, split.teachers[i].feature).mean().item()
        assert teacher['cosine']['validation'] == pytest.approx(expected, abs=1e-5)
    report([str(folder), '-o', str(tmp_path / 'report.html')])
    page = (tmp_path / 'report.html').read_text()
    for title in ('CKA with the teacher', 'CKA with test_vit', 'Projection along test_convnext', 'Maps along test_vit'):
        assert title in page
    assert page.count('alt="Feature maps of teacher and student') == 1


@torch.inference_mode()
def test_maps_are_compared_position_by_position_on_all_validation_images(two):
    folder, _ = two
    result = analysis.analyze(folder)
    opened = open_run(RunFolder(folder), Options())
    task, total, number = opened.task, [0.0, 0.0], 0
    for images, _ in opened.loaders['validation']:
        outputs = [teacher(images) for teacher in opened.teachers]
        projected = task.trainable_module(images, [o.map.shape[2:] for o in outputs])[3:]
        number += len(images)
        for i in range(2):
            wanted = torch.nn.functional.adaptive_avg_pool2d(outputs[i].map, projected[i].shape[1:3])
            for b in range(len(images)):
                places = [(y, x) for y in range(wanted.shape[2]) for x in range(wanted.shape[3])]
                cosines = [torch.cosine_similarity(projected[i][b, y, x], wanted[b, :, y, x], dim=0) for y, x in places]
                total[i] += torch.stack(cosines).mean().item()
    for i, teacher in enumerate(result['teachers'].values()):
        assert teacher['map_cosine']['validation'] == pytest.approx(total[i] / number, abs=1e-5)
    assert result['map_cosine']['validation'] == pytest.approx(sum(total) / 2 / number, abs=1e-5)
    picture = Image.open(folder / 'figures' / 'maps.png')
    assert picture.width > picture.height > 100


@pytest.mark.long
@pytest.mark.parametrize('norm', ['batch', 'none'])
def test_the_cosine_of_maps_does_not_depend_on_the_batch_of_the_analysis(image_folder, tmp_path, norm):
    argv = [
        *(str(image_folder), '-b', '4', '-j', '0', '--device', 'cpu', '--epochs', '1', '--warmup-epochs', '0'),
        *('--lr', '0.02', '--output', str(tmp_path), '--experiment', 'run', *TWO, *MAPS, '--pe-teacher-norm', norm),
    ]
    run(argv)
    found = [analysis.analyze(tmp_path / 'run', Options(batch_size=size))['map_cosine'] for size in (1, 3, 12)]
    assert found[0]['validation'] == pytest.approx(found[1]['validation'], abs=1e-5)
    assert found[0]['validation'] == pytest.approx(found[2]['validation'], abs=1e-5)


def test_equal_directions_have_equal_colours_and_others_have_others():
    torch.manual_seed(0)
    teacher = torch.randn(4, 3, 3, 16)
    painted, longer, other = paint([teacher, 5 * teacher, torch.randn(4, 3, 3, 16)])
    torch.testing.assert_close(painted, longer)
    assert painted.shape == (4, 3, 3, 3) and painted.min() == 0 and painted.max() == 1
    assert (painted - other).abs().mean() > 0.1
    assert all(x.isfinite().all() for x in paint([torch.ones(2, 1, 1, 2), torch.zeros(2, 1, 1, 2)]))  # nothing varies


@pytest.mark.parametrize('more', [[], ['--teacher-drop', '0.5'], ['--amp', '--amp-dtype', 'bfloat16', '--model-ema']])
def test_a_run_that_is_stopped_in_mid_epoch_resumes_bit_for_bit(two, more, tmp_path, monkeypatch, capsys):
    argv = [*two[1], *more]
    argv[argv.index('--output') + 1] = str(tmp_path)
    whole, parts = [*argv, '--experiment', 'whole'], [*argv, '--experiment', 'parts']
    run(whole)
    asked, requested = [], Interrupts.requested
    monkeypatch.setattr(Interrupts, 'requested', lambda self: (asked.append(1), 15 if len(asked) == 6 else 0)[1])
    stopped(parts, capsys)
    monkeypatch.setattr(Interrupts, 'requested', requested)
    run([*parts, '--resume', 'auto'])
    assert_same_weights(tmp_path / 'whole', tmp_path / 'parts')


def assert_same_weights(folder, other):
    a, b = (load(f / 'last.pth.tar') for f in (folder, other))
    for key in ('state_dict', 'task_state', 'state_dict_ema', 'task_state_ema'):
        assert (key in a) == (key in b)
        for name, value in flat(a.get(key, {})):
            assert torch.equal(value, dict(flat(b[key]))[name]), (key, name)


def flat(state, prefix=''):
    for name, value in state.items():
        if isinstance(value, dict):
            yield from flat(value, f'{prefix}{name}.')
        elif isinstance(value, torch.Tensor):
            yield f'{prefix}{name}', value


def test_a_checkpoint_of_other_teachers_does_not_go_on_unnoticed(two, tmp_path, capsys):
    folder, argv = two
    other = [f for f in argv if f != 'test_convnext']
    other = [
        *other[: other.index('--teacher-weights')],
        '--experiment',
        'other',
        '--resume',
        str(folder / 'last.pth.tar'),
    ]
    assert 'teacher' in refused(other, capsys)
    swapped = [
        *argv,
        '--teacher',
        *reversed(TEACHERS),
        '--experiment',
        'other',
        '--resume',
        str(folder / 'last.pth.tar'),
    ]
    assert 'teacher' in refused(swapped, capsys)


# Caches -----------------------------------------------------------------------------------------------------------------


def test_each_teacher_has_a_cache_that_replays_vector_and_map(two, tmp_path, monkeypatch):
    argv = [*two[1], '--teacher-cache', str(tmp_path / 'cache'), '--teacher-cache-views', '2']
    argv[argv.index('--output') + 1] = str(tmp_path)
    run([*argv, '--experiment', 'fills'])
    assert sorted(p.name for p in (tmp_path / 'cache').iterdir()) == sorted(TEACHERS)
    for name in TEACHERS:
        manifest = json.loads((tmp_path / 'cache' / name / 'manifest.json').read_text())
        assert len(manifest['map']) == 3
    monkeypatch.setattr(Teacher, 'forward', lambda self, x: pytest.fail('the teacher was asked again'))
    monkeypatch.setattr(
        'timm_pe.train.run_cache._map_shape', lambda teacher, data: shapes[type(teacher.model).__name__]
    )
    shapes = {
        'VisionTransformer': json.loads((tmp_path / 'cache/test_vit/manifest.json').read_text())['map'],
        'ConvNeXt': json.loads((tmp_path / 'cache/test_convnext/manifest.json').read_text())['map'],
    }
    run([*argv, '--experiment', 'reads', '--no-teacher-eval'])
    monkeypatch.undo()
    assert_same_weights(tmp_path / 'fills', tmp_path / 'reads')


def test_rows_of_a_cache_are_what_the_teacher_gives_online(two, tmp_path, monkeypatch):
    argv = [*two[1], '--teacher-cache', str(tmp_path / 'cache')]
    argv[argv.index('--output') + 1] = str(tmp_path)
    run([*argv, '--epochs', '1', '--experiment', 'fills'])
    trainer = make_trainer([*argv, '--experiment', 'reads', '--overwrite'], monkeypatch)
    for cache in trainer.caches:
        assert cache.is_complete
    input, target = next(iter(trainer.data.train))
    for cache, teacher in zip(trainer.caches, trainer.teachers, strict=True):
        kept, online = cache(target, lambda: pytest.fail('a row is missing')), teacher(input)
        torch.testing.assert_close(kept.feature, online.feature, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(kept.map, online.map, rtol=1e-3, atol=1e-3 * online.map.abs().max().item())


def test_precompute_fills_the_cache_of_each_teacher(two, tmp_path, monkeypatch):
    argv = [*two[1], '--teacher-cache', str(tmp_path / 'cache')]
    argv[argv.index('--output') + 1] = str(tmp_path)
    precompute.main(argv)
    caches = make_trainer([*argv, '--experiment', 'reads'], monkeypatch).caches
    assert [cache.is_complete for cache in caches] == [True, True]


def test_a_cache_without_maps_is_refused_where_they_are_needed(small_run, tmp_path, capsys):
    argv = [*small_run, *TWO[:-1], '--img-size', '64', '--epochs', '1', '--teacher-cache', str(tmp_path / 'cache')]
    run(argv)
    assert 'map' in refused([*argv, *MAPS, '--overwrite'], capsys)


# Sources of teachers ----------------------------------------------------------------------------------------------------


def test_run_folders_name_the_teachers_and_each_is_validated(small_run, tmp_path, capsys):
    for name in ('test_resnet', 'test_vit'):
        run([*small_run, '--model', name, '--epochs', '1', '--experiment', name])
    folders = [str(tmp_path / name) for name in ('test_resnet', 'test_vit')]
    argv = [*small_run, '--model', 'test_convnext', '--teacher-checkpoint', *folders, '--kd-loss-weight', '1']
    out = run([*argv, '--epochs', '1'], capsys)
    args = yaml.safe_load((tmp_path / 'run' / 'args.yaml').read_text())
    assert args['teacher'] == ['test_resnet', 'test_vit']
    for number, name in enumerate(args['teacher'], 1):
        assert f'Teacher {number} ({name}): top-1 ' in out
    assert float(summary(tmp_path / 'run')[0]['train_logit_loss']) > 0
    result = analysis.analyze(tmp_path / 'run')
    assert result['agreement']['validation'] == pytest.approx(
        sum(teacher['agreement']['validation'] for teacher in result['teachers'].values()) / 2
    )


def test_a_teacher_of_another_number_of_classes_is_left_out_of_logit_distillation(small_run, tmp_path, capsys):
    digits = ['--dataset', 'sklearn/digits', '--num-classes', '10', *small_run[3:], '-b', '256', '--epochs', '1']
    run([*digits, '--model', 'test_vit', '--experiment', 'ten'])
    run([*small_run, '--model', 'test_resnet', '--epochs', '1', '--experiment', 'three'])
    folders = [str(tmp_path / name) for name in ('three', 'ten')]
    argv = [*small_run, '--model', 'test_convnext', '--kd-loss-weight', '1', '--epochs', '1']
    run([*argv, '--teacher-checkpoint', *folders])
    assert float(summary(tmp_path / 'run')[0]['train_logit_loss']) > 0
    assert 'has learnt other classes' in refused([*argv, '--teacher-checkpoint', folders[1], '--overwrite'], capsys)


def test_without_labels_the_cosine_to_each_teacher_is_measured(image_folder, tmp_path, capsys):
    argv = [
        *('--unlabeled', str(image_folder), '-b', '8', '-j', '0', '--device', 'cpu', '--epochs', '1', '--val-fraction', '0.3'),
        *('--output', str(tmp_path), '--experiment', 'run', *TWO, *MAPS, '--teacher-weights', '3', '1'),
        *('--knn-data', str(image_folder)),
    ]  # fmt: skip
    out = run(argv, capsys)
    row = {k: float(v) for k, v in summary(tmp_path / 'run')[0].items()}
    each = [row[f'eval_cosine_{name}'] for name in TEACHERS]
    assert row['eval_cosine'] == pytest.approx(0.75 * each[0] + 0.25 * each[1])
    assert row['eval_loss'] == pytest.approx(1 - row['eval_cosine'], abs=1e-5)
    assert re.search(
        r'cosine -?\d\.\d+ \(best\)  cosine_test_vit -?\d\.\d+  cosine_test_convnext -?\d\.\d+  effective rank', out
    )
    for number, name in enumerate(TEACHERS, 1):
        assert re.search(rf'Teacher {number} \({name}\): .*nearest-neighbour top-1 .* \d+\.\d+ %', out)
        assert f'3 x linear 96 -> 64 ({name}), activation' in out


@pytest.mark.parametrize(
    ('student', 'teacher', 'whose'),
    [
        ('test_vit', 'test_resnet', "The teacher's map (test_resnet)"),
        ('test_efficientnet', 'test_vit', "The student's map"),
    ],
)
def test_a_map_of_one_position_is_a_warning(student, teacher, whose, small_run, capsys):
    argv = [*small_run, '--model', student, '--teacher', teacher, '--no-teacher-pretrained', *MAPS, '--epochs', '1']
    assert f'{whose} has a single position' in run(argv, capsys)


def test_a_folder_of_several_caches_names_them_to_a_single_teacher(two, tmp_path, capsys):
    cached = ['--teacher-cache', str(tmp_path / 'cache'), '--output', str(tmp_path), '--overwrite']
    run([*two[1], *cached, '--epochs', '1'])
    alone = [*two[1][: two[1].index('--teacher-weights')], '--teacher', 'test_vit', *cached]
    assert 'holds the caches of several teachers, test_convnext, test_vit: give one of them' in refused(alone, capsys)
