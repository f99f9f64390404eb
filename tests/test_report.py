import json
import os
import re
import shlex
from dataclasses import asdict
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from matplotlib.figure import Figure
from report_runs import HOSTILE, analysis, make_family, make_run

from timm_pe import report
from timm_pe.config.run_config import parse_config
from timm_pe.errors import UsageError
from timm_pe.report import write_report
from timm_pe.runs import compare, plots, report_bars
from timm_pe.runs.compare import command, confidence_interval, describe_method, format_command, group_seeds
from timm_pe.runs.finished import read_runs
from timm_pe.train.position import RunState

NAME = f'{HOSTILE} & "b" \'c\' $x_$'


class Page(HTMLParser):
    """A report: its tags, its text, and the cells of its tables by the table's class."""

    def __init__(self, path: Path):
        super().__init__()
        self.source = path.read_text(encoding='utf-8')
        self.tags, self.text, self.tables, self.path = [], '', {}, []
        self.feed(self.source)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == 'table':
            self.rows = self.tables.setdefault(dict(attrs)['class'], [])
        elif tag == 'tr':
            self.rows.append([])
        elif tag in ('td', 'th'):
            self.rows[-1].append('')
            self.path.append(tag)

    def handle_endtag(self, tag):
        if tag in ('td', 'th'):
            self.path.pop()

    def handle_data(self, data):
        self.text += data
        if self.path:
            self.rows[-1][-1] = ' '.join(f'{self.rows[-1][-1]} {data}'.split())

    def column(self, table: str, head: str) -> list[str]:
        first, *rows = self.tables[table]
        return [row[first.index(head)] for row in rows]


def make(folders, tmp_path, **kwargs) -> Page:
    write_report(folders, tmp_path / 'report.html', **kwargs)
    return Page(tmp_path / 'report.html')


@pytest.fixture(scope='module')
def family(tmp_path_factory) -> Page:
    """The report of a teacher, a student alone and one with that teacher."""
    folder = tmp_path_factory.mktemp('family')
    return make(make_family(folder / 'runs'), folder)


@pytest.fixture(scope='module')
def seeds(tmp_path_factory) -> Page:
    """The same of three seeds."""
    folder = tmp_path_factory.mktemp('seeds')
    return make(make_family(folder / 'runs', seeds=3), folder)


# numbers


def test_a_run_is_a_row_of_its_last_epoch_and_its_best_one(family):
    assert family.column('runs', 'Run') == [
        'teacher cifar_resnet20, seed 42',
        'student-1 test_vit, seed 1',
        'student_pe-1 test_vit, seed 1',
    ]
    assert family.column('runs', 'Top-1 %') == ['98.50 epoch 3, which taught', '81.00', '87.00']
    assert family.column('runs', 'Best epoch') == ['3 98.50 %', '3 81.50 %', '3 87.50 %']
    assert family.column('runs', 'Parameters') == ['1,234,567'] * 3
    assert family.column('runs', 'Teacher') == ['–', '–', 'cifar_resnet20']
    assert 'means' not in family.tables


@pytest.mark.parametrize(
    ('file', 'args', 'shown'),
    [
        ('', {}, '98.50 epoch 3, which taught'),
        ('', {'eval_metric': 'loss'}, '98.50 epoch 3, which taught'),
        ('model_best.pth.tar', {}, '98.50 epoch 3, which taught'),
        ('checkpoint-0.pth.tar', {}, '68.00 epoch 1, which taught'),
        ('milestone-1.pth.tar', {}, '68.00 epoch 1, which taught'),
        ('last.pth.tar', {}, '98.00 epoch 4, which taught'),
        ('checkpoint-1.pth.tar', {}, '–'),  # was not validated
    ],
)
def test_a_teacher_is_shown_by_the_weights_that_its_students_took(file, args, shown, tmp_path):
    teacher = make_run(tmp_path, 'teacher', 98.0, model='cifar_resnet20', **args)
    (teacher / 'x').with_name(file or 'x').write_text('')
    checkpoint = {'teacher': 'cifar_resnet20', 'teacher_checkpoint': str(teacher / file)}
    page = make([teacher, make_run(tmp_path, 'taught', 85.0, **checkpoint)], tmp_path)
    assert page.column('runs', 'Top-1 %')[0] == shown
    assert page.column('runs', 'Top-1 %')[1] == '85.00'
    assert len(re.findall(rf'{shown.split()[0]} <small>%</small>', page.source)) == 1  # its tile


def test_a_difference_is_to_the_same_model_without_a_teacher_and_of_the_same_seed(seeds):
    alone = ['–'] * 4  # the teacher and the students alone
    assert seeds.column('runs', 'Difference') == [
        *alone,
        '+6.00 to student-1, as good after 3 epochs',
        '+7.00 to student-2, as good after 3 epochs',
        '+8.00 to student-3, as good after 3 epochs',
    ]


def test_the_row_of_an_exported_backbone_is_the_best_by_the_cosine_to_its_teacher(tmp_path):
    folder = make_run(tmp_path, 'backbone', teacher='resnet18', dataset='', unlabeled=['images'])
    (folder / 'summary.csv').write_text('epoch,eval_cosine\n0,0.5\n1,0.7\n2,\n3,0.6\n')
    (run,) = read_runs([folder])
    assert run.exported == {'epoch': 1, 'eval_cosine': 0.7}


def test_a_run_with_no_counterpart_has_no_difference(tmp_path):
    runs = read_runs([make_run(tmp_path, 'a', dataset='torch/cifar10'), make_run(tmp_path, 'b', teacher='resnet18')])
    assert [report.difference(run, runs) for run in runs] == [None, None]


def test_runs_whose_learning_rates_differ_by_their_number_of_ranks_have_no_difference(tmp_path):
    taught, alone = read_runs([make_run(tmp_path, 'taught', teacher='resnet18'), make_run(tmp_path, 'alone')])
    assert report.difference(taught, [taught, alone]) is not None
    for run, rate in ((taught, 0.2), (alone, 0.1)):
        run.rows[0]['lr'] = rate
    assert report.difference(taught, [taught, alone]) is None
    assert report.why_no_difference(taught, [taught, alone]) == 'none to alone: highest learning rate 0.2 and 0.1'


@pytest.mark.long
@pytest.mark.parametrize(
    ('differs', 'why'),
    [
        ({'dataset': 'torch/cifar10'}, 'dataset sklearn/digits and torch/cifar10'),
        ({'data': 'others'}, 'data folder none and '),
        ({'data_dir': 'others'}, 'data folder none and '),
        ({'train_split': 'half'}, 'train split train and half'),
        ({'val_split': 'test'}, 'val split validation and test'),
        ({'val_num_samples': 100}, 'val num samples none and 100'),
        ({'crop_pct': 1.0}, 'crop pct none and 1.0'),
        ({'img_size': 96}, 'img size none and 96'),
        ({'input_size': [3, 96, 96]}, 'input size none and [3, 96, 96]'),
        ({'epochs': 10}, 'epochs 4 and 10'),
        ({'stop_epoch': 4}, 'stop epoch none and 4'),
        ({'batch_size': 32}, 'batch size 128 and 32'),
        ({'grad_accum_steps': 2}, 'grad accum steps 1 and 2'),
        ({'num_classes': 5}, 'num classes 3 and 5'),
        ({'lr': 0.5}, 'lr none and 0.5'),
        ({'opt': 'adamw'}, 'opt sgd and adamw'),
        ({'class_map': 'some.txt'}, 'class map none and some.txt'),
        ({'weight_decay': 0.1}, 'weight decay 2e-05 and 0.1'),
        ({'mixup': 0.8}, 'mixup 0.0 and 0.8'),
        ({'smoothing': 0.0}, 'smoothing none and 0.0'),
        ({'model_ema': True}, 'model ema False and True'),
        ({'amp': True}, 'amp False and True'),
        ({'seed': 7}, 'seed 42 and 7'),
        ({'seed': 7, 'epochs': 10}, 'epochs 4 and 10, seed 42 and 7'),
    ],
    ids=lambda x: ' '.join(x) if isinstance(x, dict) else '',
)
def test_runs_under_other_conditions_have_no_difference_and_the_report_names_what_differs(differs, why, tmp_path):
    folders = [make_run(tmp_path, 'taught', teacher='resnet18', num_classes=3), make_run(tmp_path, 'alone', **differs)]
    taught, alone = read_runs(folders)
    assert report.difference(taught, [taught, alone]) is None
    page = make(folders, tmp_path)
    said, other = page.column('runs', 'Difference')
    assert said.startswith(f'– none to alone: {why}')
    assert other == '–'


def test_runs_that_ended_after_other_epochs_or_saw_other_numbers_of_validation_images_have_no_difference(tmp_path):
    taught, alone = read_runs([make_run(tmp_path, 'taught', teacher='resnet18'), make_run(tmp_path, 'alone')])
    assert report.difference(taught, [taught, alone]) == 0
    alone.rows.pop()
    assert compare.differing(taught, alone) == ['last epoch 3 and 2']
    taught.rows.pop()
    for run, number in ((taught, 10), (alone, 11)):
        run.analysis = {**run.analysis, 'images': {'validation': number}}
    assert compare.differing(taught, alone) == ['validation images 10 and 11']
    alone.analysis = None
    assert report.difference(taught, [taught, alone]) == 0  # what is not known is not held against it


def test_what_a_teacher_brings_and_what_changes_nothing_that_is_learnt_may_differ(tmp_path):
    brought = {'teacher': 'resnet18', 'teacher_cache': 'cache', 'pe_projectors': 1, 'task_loss_weight': 0.5}
    machine = {'workers': 8, 'device': 'cuda', 'val_interval': 2, 'log_tb': True, 'checkpoint_hist': 3}
    taught, alone = read_runs([make_run(tmp_path, 'taught', **brought, **machine), make_run(tmp_path, 'alone')])
    assert compare.differing(taught, alone) == []


def test_of_many_differences_some_are_named_and_the_others_counted(tmp_path):
    others = {
        'drop': 0.1,
        'mixup': 0.1,
        'cutmix': 0.1,
        'reprob': 0.1,
        'epochs': 5,
        'momentum': 0.8,
        'sched': 'step',
        'seed': 1,
    }
    taught, alone = read_runs([make_run(tmp_path, 'taught', teacher='resnet18'), make_run(tmp_path, 'alone', **others)])
    why = report.why_no_difference(taught, [taught, alone])
    assert why.endswith(', 2 more')
    assert why.count(' and ') == 6


def test_runs_on_other_numbers_of_ranks_have_no_difference(tmp_path):
    """At one --lr and --batch-size, twice the ranks take half the updates."""
    taught, alone = read_runs([make_run(tmp_path, 'taught', teacher='resnet18'), make_run(tmp_path, 'alone')])
    for run, ranks in ((taught, 2), (alone, 1)):
        torch.save({'saver': {'run': asdict(RunState(0, settings={'ranks': ranks}))}}, run.folder.last_file)
    assert report.why_no_difference(taught, [taught, alone]) == 'none to alone: ranks 2 and 1'


@pytest.mark.parametrize(
    ('taught', 'alone', 'why'),
    [
        ({'resume': 'alone', 'no_resume_opt': True}, {}, ['resume', 'no resume opt']),
        ({'model_ema': True}, {'model_ema': True, 'model_ema_force_cpu': True}, ['model ema force cpu']),
        ({'eval_metric': 'loss', 'val_interval': 2}, {}, ['val interval', 'eval metric']),
        (
            {'sched': 'plateau', 'eval_metric': 'knn', 'knn_data': 'a'},
            {'sched': 'plateau', 'eval_metric': 'knn', 'knn_data': 'b'},
            ['knn data'],
        ),
        ({'knn_data': 'a'}, {'knn_data': 'b'}, []),
        ({'naflex_loader': True, 'workers': 2}, {'naflex_loader': True, 'workers': 4}, ['workers']),
        ({'dataset': 'wds/x', 'workers': 2}, {'dataset': 'wds/x', 'workers': 4}, ['workers']),
        ({'resume': 'auto'}, {'workers': 4, 'eval_metric': 'loss'}, []),
    ],
)
def test_what_changes_nothing_elsewhere_is_compared_where_it_does(taught, alone, why, tmp_path):
    plateau = {'sched': 'plateau'} if 'val interval' in why else {}
    runs = (
        make_run(tmp_path, 'taught', teacher='resnet18', **taught, **plateau),
        make_run(tmp_path, 'alone', **alone, **plateau),
    )
    said = compare.differing(*read_runs(runs))
    assert len(said) == len(why)
    assert all(any(text.startswith(name) for text in said) for name in why)


def test_an_argument_that_earlier_versions_did_not_know_is_the_default(tmp_path):
    folders = [make_run(tmp_path, 'taught', teacher='resnet18'), make_run(tmp_path, 'alone')]
    args = yaml.safe_load((folders[1] / 'args.yaml').read_text())
    del args['tta'], args['grad_accum_steps']
    (folders[1] / 'args.yaml').write_text(yaml.safe_dump(args))
    taught, alone = read_runs(folders)
    assert compare.differing(taught, alone) == []


def test_a_folder_of_data_is_the_same_in_whichever_way_it_is_named(tmp_path):
    where = {'data': 'some/images/'}, {'data_dir': 'some/images'}, {'data': os.path.abspath('some/images')}
    first, *others = read_runs([make_run(tmp_path, str(i), dataset='', **w) for i, w in enumerate(where)])
    assert [compare.differing(first, other) for other in others] == [[], []]


def test_a_mean_of_differences_needs_a_counterpart_for_each_seed(tmp_path):
    folders = [f for f in make_family(tmp_path / 'runs', seeds=3) if f.name != 'student-2']
    page = make(folders, tmp_path)
    assert page.column('means', 'Difference')[-1] == '– none to student-1: seed 2 and 1'
    assert page.column('runs', 'Difference')[-3:] == [
        '+6.00 to student-1, as good after 3 epochs',
        '– none to student-1: seed 2 and 1',
        '+8.00 to student-3, as good after 3 epochs',
    ]
    assert 'better in' not in page.text
    assert 'of 4 epochs' not in page.text


def test_runs_of_one_method_are_shown_as_mean_and_standard_deviation(seeds):
    alone, taught = np.array([81.0, 82, 83]), np.array([87.0, 89, 91])
    expected = [f'{x.mean():.2f} ± {x.std(ddof=1):.2f}' for x in (alone, taught)]
    assert seeds.column('means', 'Runs') == ['teacher', 'student', 'student_pe']
    assert seeds.column('means', 'Seeds') == ['1', '3', '3']
    assert seeds.column('means', 'Top-1 %') == ['98.50', *expected]
    difference = taught - alone
    assert seeds.column('means', 'Difference') == ['–', '–', f'+{difference.mean():.2f} ± {difference.std(ddof=1):.2f}']
    assert 'better in 3 of 3' in seeds.text


def test_a_difference_over_seeds_has_its_interval_in_the_first_tiles(tmp_path):
    html = report.render(read_runs(make_family(tmp_path, seeds=3)))
    tile = html.split('<li class="tile')[3].split('</li>')[0]
    # +6, +7 and +8: 7 ± 4.303 · 1 / √3
    assert '+7.00 points' in tile
    assert '95 % interval +4.52 to +9.48, better in 3 of 3' in tile
    # the first epoch is worse, the second was not validated
    assert 'as good after 3 of 4 epochs' in tile


def test_the_student_alone_starts_from_the_same_weights(tmp_path):
    taught, alone, finetuned, again = (
        read_runs([make_run(tmp_path, name, top1, **args)])[0]
        for name, top1, args in (
            ('taught', 80.0, {'teacher': 'test_resnet'}),
            ('alone', 70.0, {}),
            ('finetuned', 90.0, {'pretrained_path': 'backbone/student.safetensors'}),
            ('again', 91.0, {'teacher': 'test_resnet', 'pretrained_path': 'backbone/student.safetensors'}),
        )
    )
    runs = [finetuned, alone, taught, again]
    assert compare.baseline(taught, runs) is alone
    assert compare.baseline(again, runs) is finetuned
    assert compare.differing(taught, finetuned) == ['pretrained path none and backbone/student.safetensors']


@pytest.mark.parametrize('flag', ['teacher_cache', 'pretrained_path', 'initial_checkpoint'])
@pytest.mark.parametrize(
    ('paths', 'groups'),
    [
        (['disk1/of-1/x3', 'disk1/of-2/x3'], 1),
        (['disk1/of-1/x3', 'disk1/of-1/x3'], 1),  # one for all, which has the number of one of them
        (['disk1/of-1/x3', 'disk1/of-2/x3', 'disk1/elsewhere-3/x3'], 3),
        (['lite0', 'lite2'], 2),
    ],
)
def test_seeds_with_one_path_or_each_with_its_own_are_one_group(tmp_path, flag, paths, groups):
    runs = read_runs([make_run(tmp_path, f'a-{i + 1}', seed=i + 1, **{flag: path}) for i, path in enumerate(paths)])
    assert [len(group.runs) for group in group_seeds(runs)] == [len(paths) // groups] * groups


def test_seeds_of_which_one_was_resumed_or_ran_elsewhere_are_one_group(tmp_path):
    runs = [
        make_run(tmp_path, 'a-1', seed=1),
        make_run(tmp_path, 'a-2', seed=2, resume='auto', device='cuda', workers=2),
    ]
    assert [len(group.runs) for group in group_seeds(read_runs(runs))] == [2]


def test_seeds_that_started_or_were_scheduled_otherwise_are_no_group(tmp_path):
    for number, (first, second) in enumerate(
        (
            ({'resume': 'a', 'no_resume_opt': True}, {'resume': 'b', 'no_resume_opt': True}),
            ({'resume': 'a', 'no_resume_opt': True}, {}),
            ({'sched': 'plateau', 'eval_metric': 'loss'}, {'sched': 'plateau'}),
            ({'dataset': 'wds/x', 'workers': 1}, {'dataset': 'wds/x', 'workers': 8}),
        )
    ):
        runs = [make_run(tmp_path / str(number), f'a-{i}', seed=i, **args) for i, args in ((1, first), (2, second))]
        assert len(group_seeds(read_runs(runs))) == 2


def test_the_epochs_of_a_run_whose_columns_changed_are_all_read(tmp_path):
    folder = make_run(tmp_path, 'resumed', 80.0)
    lines = (folder / 'summary.csv').read_text().splitlines()
    (folder / 'summary.csv.until-3').write_text('\n'.join(lines[:4]) + '\n')
    (folder / 'summary.csv').write_text(f'{lines[0]},train_other\n{lines[4]},1\n')
    run = read_runs([folder])[0]
    assert [row['epoch'] for row in run.rows] == [0, 1, 2, 3]
    assert (run.best['eval_top1'], run.final['eval_top1'], run.epochs_to(80.0)) == (80.5, 80.0, 3)


def test_a_run_is_finished_after_cooldown_and_warmup_prefix(tmp_path):
    for args, unfinished in (
        ({}, ''),
        ({'cooldown_epochs': 2}, '4 of 6 epochs'),
        ({'cooldown_epochs': 2, 'sched': 'multistep'}, ''),
        ({'warmup_prefix': True, 'warmup_epochs': 1, 'epochs': 3}, ''),
        ({'cooldown_epochs': 2, 'stop_epoch': 4}, ''),
        ({'lr_cycle_limit': 2}, '4 of 8 epochs'),
        ({'warmup_prefix': True, 'warmup_epochs': 1, 'sched': 'step'}, '4 of 5 epochs'),
    ):
        run = read_runs([make_run(tmp_path / str(len(list(tmp_path.iterdir()))), 'run', 80.0, **args)])[0]
        assert run.unfinished == unfinished, args


def test_a_run_counts_the_epochs_to_a_top1_from_one_and_may_never_have_it(tmp_path):
    run, worse = (read_runs([make_run(tmp_path, name, top1)])[0] for name, top1 in (('a', 80.0), ('b', 70.0)))
    assert [run.epochs_to(top1) for top1 in (50.0, 80.0, 80.5, 80.6)] == [1, 3, 3, None]
    taught = read_runs([make_run(tmp_path, 'taught', 79.0, teacher='test_resnet')])[0]
    assert compare.epochs_to_baseline(taught, [taught, run]) is None  # 79.5 at best, and 80 alone
    assert compare.epochs_to_baseline(taught, [taught, worse]) == 3
    assert compare.epochs_to_baseline(run, [run, taught]) is None


def test_one_seed_has_no_interval(tmp_path):
    assert confidence_interval([1.0]) is None
    assert '95 % interval' not in report.render(read_runs(make_family(tmp_path)))


def test_a_role_has_one_colour_in_whatever_order_the_runs_come(tmp_path):
    runs = read_runs(make_family(tmp_path, seeds=2))
    for order in (runs, runs[::-1]):
        groups = group_seeds(order)
        report.color_by_role(groups, order)
        by_name = {group.name: group.color for group in groups}
        assert by_name == {'teacher': plots.TEACHER, 'student': plots.ALONE, 'student_pe': plots.TAUGHT}


def test_two_runs_of_one_role_have_two_colours(tmp_path):
    runs = read_runs([make_run(tmp_path, name, model=name) for name in ('test_vit', 'test_resnet', 'test_convnext')])
    groups = group_seeds(runs)
    report.color_by_role(groups, runs)
    colors = [group.color for group in groups]
    assert colors[0] == plots.ALONE
    assert len({*colors, plots.TAUGHT, plots.TEACHER}) == 5


def test_each_measure_that_has_a_better_side_says_which(tmp_path):
    html = report.render(read_runs(make_family(tmp_path)))
    for title, side in (
        ('Linear probe', '↑ higher'),
        ('Generalization gap', '↓ lower'),
        ('Calibration error', '↓ lower'),
    ):
        assert re.search(rf'<figcaption>{title} <span class="better">{side} is better</span>', html)
    assert '<figcaption>Projector similarity<small>' in html


def test_commands_of_further_seeds_are_folded_away(tmp_path):
    html = report.render(read_runs(make_family(tmp_path, seeds=3)))
    commands = html.split('id="commands-h"')[1].split('All settings')[0]
    assert commands.count('<summary>2 more seeds</summary>') == 2
    assert commands.split('<details>')[0].count('<pre') == 2  # the teacher's, and that of the first seed


def test_runs_that_differ_in_more_than_their_seed_are_no_group(tmp_path):
    runs = read_runs([make_run(tmp_path, f'run-{i}', seed=i, lr=0.1 * i) for i in (1, 2)])
    assert [group.name for group in group_seeds(runs)] == ['run-1', 'run-2']


def test_runs_that_are_not_numbered_are_no_group(tmp_path):
    runs = read_runs([make_run(tmp_path, name) for name in ('a', 'b')])
    assert [group.name for group in group_seeds(runs)] == ['a', 'b']


def test_runs_of_one_name_are_told_apart_by_their_folders(tmp_path):
    runs = read_runs([make_run(tmp_path / parent, 'run') for parent in ('a', 'b')])
    assert [run.name for run in runs] == ['a/run', 'b/run']


def test_parameters_are_counted_without_buffers_where_there_is_no_analysis(tmp_path):
    assert read_runs([make_run(tmp_path, 'a', analysed=False)])[0].params == 3 * 4 + 3


def test_the_time_of_a_run_is_that_between_its_first_and_its_last_file(tmp_path):
    folder = make_run(tmp_path, 'a')
    os.utime(folder / 'args.yaml', (1000, 1000))
    os.utime(folder / 'summary.csv', (1075.4, 1075.4))
    assert read_runs([folder])[0].seconds == pytest.approx(75.4)
    assert report.duration(75.4) == '1 min 15 s'
    assert report.duration(3 * 3600 + 61) == '3 h 01 min'


@pytest.mark.parametrize('why', ['copied', 'resumed'])
def test_a_time_that_its_files_cannot_tell_is_a_dash(why, tmp_path):
    folder = make_run(tmp_path, 'a', resume='auto' if why == 'resumed' else '')
    os.utime(folder / 'args.yaml', (1000, 1000))
    # four epochs of a batch of 128 at 1000 images a second take longer
    os.utime(folder / 'summary.csv', (1000.4, 1000.4) if why == 'copied' else (1075, 1075))
    assert report.duration(read_runs([folder])[0].seconds) == '–'


def test_a_run_that_was_never_validated_has_dashes(tmp_path):
    folder = make_run(tmp_path, 'a', analysed=False)
    text = (folder / 'summary.csv').read_text().splitlines()
    (folder / 'summary.csv').write_text('\n'.join([text[0], text[2]]) + '\n')
    page = make([folder], tmp_path, analysis=False)
    assert page.column('runs', 'Top-1 %') == page.column('runs', 'Loss') == ['–']


@pytest.mark.parametrize(
    ('args', 'words'),
    [
        ({}, 'labels alone'),
        ({'teacher': 'a'}, '3 × linear, activation by the teacher; 1 × task loss + 25 × direction'),
        ({'teacher': 'a', 'pe_act': 'none'}, '3 × linear, no activation; 1 × task loss + 25 × direction'),
        (
            {'teacher': 'a', 'pe_act': 'relu', 'pe_projectors': 1, 'pe_loss': 'mse', 'task_loss_weight': 0},
            '1 × linear, relu; 25 × mse',
        ),
        (
            {'teacher': 'a', 'pe_projector': 'identity', 'kd_loss_weight': 0.5, 'distill_loss_weight': 2.0},
            'no projector; 1 × task loss + 2 × direction + 0.5 × KL at T = 4',
        ),
        ({'teacher': 'a', 'pe_target': 'logits'}, '3 × linear, on logits; 0.1 × task loss + 0.9 × kl'),
        ({'kd_model_name': 'a', 'kd_distill_type': 'feature'}, "timm's own feature distillation"),
    ],
)
def test_the_method_is_said_in_words(args, words, tmp_path):
    assert describe_method(read_runs([make_run(tmp_path, 'a', analysed=False, **args)])[0]) == words


def test_an_activation_that_the_teacher_settled_is_named(tmp_path):
    assert describe_method(read_runs([make_run(tmp_path, 'a', teacher='b')])[0]).startswith('3 × linear, relu; ')


# commands


@pytest.mark.parametrize(
    'argv',
    [
        'data --model resnet18 --teacher resnet34',
        "'my data' --experiment \"it's; rm -rf $HOME\" --lr 0.05 --scale 0.6 1 --color-jitter 0 --amp -j 0",
        'data --teacher resnet34 --no-teacher-pretrained --no-teacher-eval --pe-projectors 5 --pe-act none --seed 3',
        "data --model-kwargs a=1 b=True c=word d='[1, 2]' e=\"'5'\" f= --opt-kwargs eps=1e-08",
        'data --no-persistent-workers --mean 0.5 0.5 0.5 --decay-milestones 1 2 --torchcompile --head-init-bias=-1e-05',
        'data --dist-bn= --class-map=-odd.txt --log-interval 7',
    ],
)
def test_a_command_gives_its_arguments_again(argv, tmp_path):
    text = parse_config(shlex.split(argv)).to_yaml()
    folder = make_run(tmp_path, 'run')
    (folder / 'args.yaml').write_text(text)
    words = shlex.split(format_command(command(read_runs([folder])[0])).replace('\\\n', ' '))
    assert words[0] == 'train-distill'
    assert parse_config(words[1:]).to_yaml() == text


def test_a_command_says_only_what_is_not_the_default(tmp_path):
    args = {
        'dataset': '',
        'data': 'my data',
        'teacher': 'resnet34',
        'epochs': 300,
        'amp': True,
        'persistent_workers': False,
    }
    run = read_runs([make_run(tmp_path, 'a', **args)])[0]
    assert format_command(command(run), width=200) == (
        "train-distill 'my data' --teacher resnet34 --model test_vit --amp --no-persistent-workers --experiment a"
    )


def test_a_long_command_goes_on_after_a_backslash():
    text = format_command([['train-distill'], ['--flag', 'x' * 60], ['--other', 'y' * 60]])
    assert text.split(' \\\n    ') == ['train-distill --flag ' + 'x' * 60, '--other ' + 'y' * 60]


def test_what_only_yaml_can_say_is_taken_from_it(tmp_path):
    run = read_runs([make_run(tmp_path, 'a', color_jitter=None)])[0]
    assert command(run) == [['train-distill', '-c', str(tmp_path / 'a' / 'args.yaml')]]


# the page


def test_the_page_asks_for_nothing_and_runs_nothing(seeds):
    policy = [a['content'] for tag, a in seeds.tags if a.get('http-equiv') == 'Content-Security-Policy']
    assert policy == [
        "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
    ]
    assert not {tag for tag, _ in seeds.tags} & {
        'script',
        'iframe',
        'object',
        'embed',
        'form',
        'base',
        'video',
        'audio',
    }
    for tag, attrs in seeds.tags:
        assert not [name for name in attrs if name.startswith('on')]
        for name in ('src', 'href', 'xlink:href', 'srcset'):
            assert attrs.get(name, '#').startswith(('#', 'data:')), (tag, attrs)
    assert not re.search(r'@import|@font-face|url\((?!#)', seeds.source)


def test_the_page_suits_a_phone_and_both_colour_schemes(family):
    metas = {a['name']: a['content'] for tag, a in family.tags if tag == 'meta' and 'name' in a}
    assert metas['viewport'] == 'width=device-width, initial-scale=1'
    assert metas['color-scheme'] == 'light dark'
    assert '@media (prefers-color-scheme: dark)' in family.source
    assert '@media print' in family.source


def test_no_two_parts_of_the_page_have_one_id_and_none_is_missing(seeds):
    ids = [a['id'] for _, a in seeds.tags if 'id' in a]
    assert len(ids) == len(set(ids))
    used = re.findall(r'(?:href="|url\()#([^")]+)', seeds.source) + re.findall(r'aria-labelledby="(.*?)"', seeds.source)
    assert used
    assert set(used) <= set(ids)


def test_what_users_name_is_text(tmp_path):
    folder = make_run(
        tmp_path,
        NAME.replace('/', '_'),
        teacher=NAME,
        class_names=(NAME, 'bee', 'cat'),
        model=NAME,
        dataset=NAME,
        model_kwargs={NAME: NAME},
    )
    page = make([folder], tmp_path)
    assert 'script' not in {tag for tag, _ in page.tags}
    assert page.text.count(NAME) >= 6
    assert '<script' not in page.source


def test_a_name_that_cannot_be_printed_is_shown_with_marks(tmp_path):
    folder = make_run(tmp_path, 'a\x07\nb')
    assert 'a��b' in make([folder], tmp_path).text


def test_curves_are_drawn_of_top1_and_of_each_loss_term(family):
    labels = [a.get('aria-label') for tag, a in family.tags if tag == 'svg']
    for what in (
        'Validation top-1, %',
        'Validation loss',
        'Training loss',
        'Task loss',
        'Projector loss',
        'Learning rate',
    ):
        assert f'{what} by epoch' in labels
    assert 'rdf' not in family.source


def test_a_student_alone_has_a_line_among_the_task_losses(tmp_path, monkeypatch):
    drawn = {}
    monkeypatch.setattr(plots, 'mean_curves', lambda groups, column, colors: drawn.update({column: groups}) or Figure())
    report.draw_curves(group_seeds(read_runs(make_family(tmp_path))))
    alone = drawn['train_task_loss'][1][0]
    assert [row['train_task_loss'] for row in alone] == [2.0, 1.0, 2 / 3, 0.5]


def test_mean_curves_are_the_mean_over_seeds_with_their_range():
    seeds = [[{'epoch': e, 'x': str(v)} for e, v in enumerate(values)] for values in ([1, 2, 4], [3, 2, 8], [2, 5, 6])]
    axes = plots.mean_curves([[], seeds], 'x').axes[0]
    assert axes.lines[0].get_ydata().tolist() == [2, 3, 6]
    assert axes.lines[0].get_color() == plots.COLORS[1]  # a group without the column keeps its colour
    band = axes.collections[0].get_paths()[0].vertices
    assert {(x, y) for x, y in band.tolist()} >= {(1, 1), (1, 3), (2, 2), (2, 5), (3, 4), (3, 8)}
    assert axes.get_yscale() == 'linear'
    top1 = plots.mean_curves([[[{'epoch': 0, 'eval_top1': 1}, {'epoch': 1, 'eval_top1': 99}]]], 'eval_top1')
    assert top1.axes[0].get_yscale() == 'linear'
    wide = plots.mean_curves([[[{'epoch': 0, 'x': 1}, {'epoch': 1, 'x': 100}]]], 'x')
    assert wide.axes[0].get_yscale() == 'log'


def test_bars_start_at_zero_and_share_a_scale(tmp_path):
    runs = read_runs([make_run(tmp_path, name) for name in 'abc'])
    for run, gap in zip(runs, (4.0, -1.0, 3.0), strict=True):
        run.analysis['gap_top1'] = gap
    drawn = report_bars.draw_bars(group_seeds(runs), 'gap_top1')
    assert [(b['start'], b['width']) for b in drawn] == [(20, 80), (0, 20), (20, 60)]
    drawn = report_bars.draw_bars(group_seeds(runs)[:1], 'gap_top1', end=100)
    assert [(b['start'], b['width']) for b in drawn] == [(0, 4)]
    assert report_bars.draw_bars(group_seeds(runs), 'projectors.ensemble_gain') == []


def test_a_teacher_is_not_measured_against_itself(tmp_path):
    runs = read_runs(make_family(tmp_path))
    measures = {
        m['title']: [b['group'].name for b in m['bars']] for m in report_bars.draw_measures(group_seeds(runs), runs)
    }
    assert measures['Agreement with the teacher'] == ['student-1', 'student_pe-1']
    assert measures['Linear probe'] == ['teacher', 'student-1', 'student_pe-1']
    assert measures['Gain of the ensemble'] == ['student_pe-1']


def test_samples_show_what_teacher_and_students_say_of_each_image(tmp_path):
    runs = read_runs(make_family(tmp_path, seeds=2))
    samples = report.collect_samples(group_seeds(runs), runs)
    assert len(samples) == 6
    assert [a['who'] for a in samples[0]['answers']] == ['teacher', 'student-1', 'student_pe-1']
    assert samples[5]['label'] == 'cat'
    assert [(a['class'], a['confidence'], a['right']) for a in samples[5]['answers']] == [
        ('cat', 90.0, True),
        ('bee', 60.0, False),
        ('bee', 60.0, False),
    ]


def test_each_run_has_its_settings_whole(tmp_path):
    folder = make_run(tmp_path, 'a', lr=0.25)
    page = make([folder], tmp_path)
    assert [a for tag, a in page.tags if tag == 'details'] == [{}]  # closed
    assert yaml.safe_dump(yaml.safe_load((folder / 'args.yaml').read_text())) in page.text


# analyses


@pytest.fixture
def analysed(monkeypatch):
    """The runs that were analysed, by name, with a made-up analysis in the place of the real one."""
    from timm_pe import report as module

    names = []

    def analyze(folder, options=None, others=()):
        names.append(folder.name)
        assert len(others) == 2
        return analysis(folder.name, 80.0, None, ('ant', 'bee', 'cat'))

    monkeypatch.setattr(module, 'analyze', analyze)
    return names


def test_runs_without_an_analysis_are_analysed_first(tmp_path, analysed):
    folders = [make_run(tmp_path, 'old', 80.0), make_run(tmp_path, 'new', 81.0, analysed=False)]
    runs = read_runs(folders)
    report.analyse_missing(runs)
    assert analysed == ['new']
    assert all(run.analysis for run in runs)


@pytest.mark.parametrize('what', ['epoch', 'top1', 'version'])
def test_an_analysis_of_another_run_in_the_folder_is_made_anew(what, tmp_path, analysed):
    folders = [make_run(tmp_path, 'a', 80.0), make_run(tmp_path, 'b', 80.0)]
    path = folders[1] / 'analysis.json'
    result = json.loads(path.read_text())
    if what == 'epoch':
        result['epoch'] -= 1
    elif what == 'top1':
        result['validation']['top1'] -= 1
    else:
        del result['samples']
    path.write_text(json.dumps(result))
    if what == 'top1':
        os.utime(path, (1000, 1000))
    report.analyse_missing(read_runs(folders))
    assert analysed == ['b']


def test_a_student_alone_that_was_compared_with_another_teacher_is_analysed_anew(tmp_path, analysed, monkeypatch):
    folders = [make_run(tmp_path, 'alone', 80.0), make_run(tmp_path, 'taught', 81.0, teacher='cifar_resnet20')]
    report.analyse_missing(read_runs(folders))
    assert analysed == []
    path = folders[0] / 'analysis.json'
    path.write_text(path.read_text().replace('6a1f', 'b0b0'))
    kept = read_runs(folders)
    report.write_report(folders, tmp_path / 'r.html', analysis=False)
    assert 'Not analysed: alone' in (tmp_path / 'r.html').read_text()
    report.analyse_missing(kept)
    assert analysed == ['alone']
    assert [run.analysis['teacher_weights'] for run in kept] == [['6a1f']] * 2


def test_an_analysis_whose_copy_is_the_older_file_still_counts(tmp_path, analysed):
    folder = make_run(tmp_path, 'a', 80.0)
    os.utime(folder / 'analysis.json', (1000, 1000))
    report.analyse_missing(read_runs([folder]))
    assert analysed == []


def test_no_analysis_shows_those_there_are_and_says_how_to_get_the_others(tmp_path, analysed):
    folders = [make_run(tmp_path, 'old'), make_run(tmp_path, 'new', analysed=False)]
    page = make(folders, tmp_path, analysis=False)
    assert analysed == []
    assert 'Not analysed: new. python -m timm_pe.analysis' in page.text
    assert 'Inside the networks' in page.text
    alone = make(folders[1:], tmp_path, analysis=False)
    assert 'Not analysed: new.' in alone.text
    assert 'Inside the networks' not in alone.text
    assert 'Sample images' not in alone.text


# mistakes


def refused(argv, capsys) -> str:
    with pytest.raises(SystemExit) as e:
        report.main(argv)
    err = capsys.readouterr().err
    assert e.value.code == 2
    assert err.startswith('python -m timm_pe.report: error: ')
    assert err.count('\n') == 1
    return err


@pytest.mark.parametrize(
    ('spoil', 'said'),
    [
        (lambda run: (run / 'args.yaml').unlink(), 'is no run folder of train_distill: it has no args.yaml'),
        (lambda run: (run / 'summary.csv').unlink(), 'it has no summary.csv'),
        (lambda run: (run / 'summary.csv').write_text(''), 'summary.csv holds no epoch yet'),
        (lambda run: (run / 'summary.csv').write_text('epoch,lr\n'), 'summary.csv holds no epoch yet'),
        (
            lambda run: (run / 'summary.csv').write_text('epoch,lr\n1,many\n'),
            "could not convert string to float: 'many'",
        ),
        (lambda run: (run / 'summary.csv').write_text('lr\n1\n'), 'summary.csv has rows without an epoch'),
        (lambda run: (run / 'summary.csv').write_text('epoch\n1,2,3\n'), 'cannot be read'),
        (lambda run: (run / 'args.yaml').write_text('a: [1\n'), 'cannot be read'),
        (lambda run: (run / 'args.yaml').write_text('- 1\n'), 'it holds a list'),
        (lambda run: (run / 'args.yaml').write_text('task: multilabel\n'), 'is of --task multilabel'),
        (lambda run: (run / 'analysis.json').write_text('{'), 'cannot be read'),
    ],
)
def test_what_is_no_run_is_refused_in_one_line(spoil, said, tmp_path, capsys):
    folder = make_run(tmp_path, 'run')
    spoil(folder)
    assert said in refused([str(folder), '-o', str(tmp_path / 'report.html')], capsys)
    assert os.listdir(tmp_path) == ['run']


def test_a_folder_that_is_not_there_is_named_with_the_one_that_was_meant(tmp_path, capsys):
    make_run(tmp_path, 'alone-1')
    with pytest.raises(SystemExit):
        report.main([str(tmp_path / 'alone')])
    assert f"RUN '{tmp_path / 'alone'}': no such folder, did you mean alone-1?" in capsys.readouterr().err


def test_a_run_given_twice_is_refused(tmp_path, capsys):
    folder = str(make_run(tmp_path, 'run'))
    assert 'is given twice' in refused([folder, folder + '/', '-o', str(tmp_path / 'r.html')], capsys)


@pytest.mark.parametrize('output', ['nowhere/report.html', 'run', 'run/args.yaml/report.html'])
def test_an_output_that_cannot_be_written_is_refused_before_any_work(output, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(report, 'analyse_missing', lambda runs: pytest.fail('worked'))
    folder = make_run(tmp_path, 'run')
    assert '--output: cannot write' in refused([str(folder), '-o', str(tmp_path / output)], capsys)
    assert os.listdir(tmp_path) == ['run']


def test_a_report_that_fails_leaves_the_older_one_whole(tmp_path, monkeypatch):
    folder, path = make_run(tmp_path, 'run'), tmp_path / 'report.html'
    path.write_text('the older one')

    def render(runs):
        raise UsageError('no')

    monkeypatch.setattr(report, 'render', render)
    with pytest.raises(UsageError):
        write_report([folder], path)
    assert path.read_text() == 'the older one'
    assert sorted(os.listdir(tmp_path)) == ['report.html', 'run']


def test_without_matplotlib_a_line_says_what_to_install(tmp_path, monkeypatch, capsys):
    folder = make_run(tmp_path, 'run')
    find_spec = report.importlib.util.find_spec
    monkeypatch.setattr(
        report.importlib.util, 'find_spec', lambda name: None if name == 'matplotlib' else find_spec(name)
    )
    assert 'needs matplotlib: pip install' in refused([str(folder), '-o', str(tmp_path / 'r.html')], capsys)


def test_what_the_analysis_cannot_do_is_one_line_that_names_the_way_around(tmp_path, monkeypatch, capsys):
    from timm_pe import report as module

    def analyze(folder, options=None, others=()):
        raise UsageError("RUN 'a': it has no last.pth.tar")

    monkeypatch.setattr(module, 'analyze', analyze)
    folder = make_run(tmp_path, 'a', analysed=False)
    with pytest.raises(SystemExit):
        report.main([str(folder), '-o', str(tmp_path / 'r.html')])
    assert capsys.readouterr().err.splitlines()[-1] == (
        "python -m timm_pe.report: error: RUN 'a': it has no last.pth.tar (timm_pe.report --no-analysis goes without)"
    )
    report.main([str(folder), '-o', str(tmp_path / 'r.html'), '--no-analysis'])
    assert (tmp_path / 'r.html').is_file()


def test_a_run_that_has_not_come_to_its_end_is_marked(tmp_path):
    folders = [make_run(tmp_path, 'whole'), make_run(tmp_path, 'half', epochs=8), make_run(tmp_path, 'cut', stop_epoch=4, epochs=8)]  # fmt: skip
    assert [run.unfinished for run in read_runs(folders)] == ['', '4 of 8 epochs', '']
    assert 'unfinished: 4 of 8 epochs' in ' '.join(make(folders, tmp_path).column('runs', 'Run'))
