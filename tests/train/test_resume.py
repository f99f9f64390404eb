"""A run that is stopped and resumed ends bit for bit as one that was left alone."""

import contextlib
import multiprocessing
import os
import re
import resource
import shlex
import shutil
import signal
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch
import torch.distributed as dist
import yaml
from helpers import load, refused, run, stopped, summary, tensorboard_curves
from survive import COMMON, VARIANTS, compare, write_images
from timm.utils import CheckpointSaver, load_checkpoint_metadata

import train_distill
from timm_pe import ProjectorEnsembleTask
from timm_pe.config.run_config import RunConfig, parse_config
from timm_pe.data import draws
from timm_pe.errors import UsageError
from timm_pe.process.signals import Interrupted, Interrupts, ignore_in_worker, stopping_at_once
from timm_pe.run_folder import RunFolder
from timm_pe.train import checkpoints, position, start
from timm_pe.train.resumed_settings import check_same_student, describe_differences
from timm_pe.train.run import command_to_go_on
from timm_pe.train.trainer import Trainer

TESTS = Path(__file__).resolve().parents[1]


@pytest.fixture(scope='module')
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp('resume') / 'images')


@pytest.fixture(scope='module')
def alone(images, tmp_path_factory):
    """Folder and command line of a run of each variant that was left alone; made once."""
    made = {}

    def of(variant):
        if variant not in made:
            output = tmp_path_factory.mktemp('alone')
            argv = [str(images), *COMMON, *VARIANTS[variant]]
            run([*argv, '--output', str(output), '--experiment', 'run'])
            made[variant] = output / 'run', argv
        return made[variant]

    return of


@pytest.fixture
def stop_at(monkeypatch):
    """Let a signal come before the n-th time that the run looks for one."""

    def at(number, signum=signal.SIGTERM):
        asked = []

        def requested(self):
            asked.append(1)
            return signum if len(asked) == number else 0

        monkeypatch.setattr(Interrupts, 'requested', requested)
        return asked

    return at


# 9 batches an epoch: the run looks after each update but the last, after the epoch, and after each batch of validation
@pytest.mark.parametrize('number', [1, 10, *(pytest.param(n, marks=pytest.mark.long) for n in (8, 9, 12, 30))])
@pytest.mark.parametrize('variant', [v for v in VARIANTS if v != 'workers'])
def test_a_run_stopped_anywhere_ends_bit_equal_to_one_left_alone(
    variant, number, alone, tmp_path, stop_at, capsys, monkeypatch
):
    folder, argv = alone(variant)
    argv = [*argv, '--output', str(tmp_path), '--experiment', 'run', '--resume', 'auto']
    stop_at(number)
    assert 'stopped by SIGTERM' in stopped(argv, capsys)[0]
    monkeypatch.undo()
    run(argv)
    assert compare(folder, tmp_path / 'run') == []


@pytest.mark.parametrize('number', [3, 10])
def test_workers_go_on_at_the_same_batch(number, alone, tmp_path, stop_at, capsys, monkeypatch):
    folder, argv = alone('workers')
    argv = [*argv, '--output', str(tmp_path), '--experiment', 'run', '--resume', 'auto']
    stop_at(number)
    stopped(argv, capsys)
    monkeypatch.undo()
    run(argv)
    assert compare(folder, tmp_path / 'run') == []


def test_a_loader_that_cannot_begin_in_the_middle_passes_over_what_was_trained(
    images, tmp_path, stop_at, capsys, monkeypatch
):
    argv = [str(images), *COMMON, '-j', '1', '--use-multi-epochs-loader', '--reprob', '0.5', '--output', str(tmp_path)]
    run([*argv, '--experiment', 'alone'])
    stop_at(5)
    stopped([*argv, '--experiment', 'run', '--resume', 'auto'], capsys)
    monkeypatch.undo()
    run([*argv, '--experiment', 'run', '--resume', 'auto'])
    assert compare(tmp_path / 'alone', tmp_path / 'run') == []


def test_only_the_batches_that_are_left_are_read(images, tmp_path, stop_at, capsys, monkeypatch):
    argv = [str(images), *COMMON, '--epochs', '1', '--warmup-epochs', '0', '--output', str(tmp_path)]
    argv += ['--experiment', 'run', '--resume', 'auto']
    stop_at(6)
    stopped(argv, capsys)
    monkeypatch.undo()
    read, loads = [], draws.SeededDataset.__getitems__
    monkeypatch.setattr(
        draws.SeededDataset, '__getitems__', lambda self, batch: (read.append(batch.number), loads(self, batch))[1]
    )
    run(argv)
    assert read == [0, 6, 7, 8]  # the first is for a look at the teacher


@pytest.mark.parametrize(
    ('more', 'why'),
    [
        (['-b', '6'], r'batch size 8 then and 6 now'),
        (['--seed', '7'], r'seed 42 then and 7 now'),
        (['--grad-accum-steps', '3'], r'grad accum steps 1 then and 3 now'),
    ],
)
def test_where_a_batch_is_another_the_epoch_starts_again(more, why, alone, tmp_path, stop_at, capsys, monkeypatch):
    argv = [*alone('plain')[1], '--output', str(tmp_path), '--experiment', 'run', '--resume', 'auto']
    stop_at(14)
    stopped(argv, capsys)
    monkeypatch.undo()
    said = run([*argv, *more], capsys)
    assert re.search(rf'Epoch 1 starts again from its first batch: .*{why}', said)
    assert [row['epoch'] for row in summary(tmp_path / 'run')] == ['0', '1', '2', '3']


def test_a_term_added_in_mid_epoch_counts_from_there_and_that_is_said(alone, tmp_path, stop_at, capsys, monkeypatch):
    argv = [*alone('plain')[1], '--output', str(tmp_path), '--experiment', 'run', '--resume', 'auto', '--log-tb']
    stop_at(14)
    stopped(argv, capsys)
    monkeypatch.undo()
    said = run([*argv, '--teacher-num-classes', '3', '--kd-loss-weight', '1'], capsys)
    assert 'loss, task_loss, pe_loss then and loss, task_loss, pe_loss, logit_loss now' in said
    assert 'losses of this epoch are means over its batches from 2 on' in said
    row = summary(tmp_path / 'run')[0]
    terms = {k: float(row[f'train_{k}']) for k in ('loss', 'task_loss', 'pe_loss', 'logit_loss')}
    assert terms['loss'] == pytest.approx(terms['task_loss'] + 25 * terms['pe_loss'] + terms['logit_loss'], rel=1e-5)
    curves, _ = tensorboard_curves(tmp_path / 'run')
    assert len(curves['step/logit_loss']) == len(curves['step/loss']) - 6
    points = [value for _, value in curves['step/task_loss'][6:10]]  # of batches 2 and 3, 4 and 5, 6 and 7, 8
    assert terms['task_loss'] == pytest.approx(
        sum(b * p for b, p in zip((2, 2, 2, 1), points, strict=True)) / 7, rel=1e-4
    )


def test_the_seconds_of_a_resumed_run_are_those_of_all_its_parts(alone, tmp_path, stop_at, capsys, monkeypatch):
    folder, argv = alone('plain')
    argv = [*argv, '--output', str(tmp_path), '--experiment', 'run', '--resume', 'auto']
    assert re.search(
        r'Best top-1 [\d.]+ in epoch \d of \d \(epoch \d of summary\.csv, which counts from 0\), \d+ s\. ',
        run([*argv, '--stop-epoch', '1'], capsys),
    )
    change_run(tmp_path / 'run', seconds=5000.0)
    stop_at(4)
    stopped(argv, capsys)
    monkeypatch.undo()
    assert re.search(
        r'Best top-1 [\d.]+ in epoch \d of \d \(epoch \d of summary\.csv, which counts from 0\), 50\d\d s in all\. ',
        run(argv, capsys),
    )


def test_seconds_that_a_checkpoint_does_not_know_are_not_made_up(alone, tmp_path, capsys):
    folder, argv = alone('plain')
    argv = [*argv, '--output', str(tmp_path), '--experiment', 'run', '--resume', 'auto']
    run([*argv, '--stop-epoch', '1'])
    change_run(tmp_path / 'run', seconds=None)
    for stop in ('2', '4'):  # nor by the checkpoints that follow
        said = run([*argv, '--stop-epoch', stop], capsys)
        assert re.search(
            r'Best top-1 [\d.]+ in epoch \d of \d \(epoch \d of summary\.csv, which counts from 0\), \d+ s since it was resumed\. ',
            said,
        )


def best_of(folder):
    """What a run folder says is the best: the history of `last`, and the epoch of model_best."""
    saver = load(folder / 'last.pth.tar')['saver']
    epoch, metric = saver['pending']
    kept = dict([*saver['checkpoint_files'], (f'checkpoint-{epoch}.pth.tar', metric)])
    return kept, load(folder / 'model_best.pth.tar')['epoch']


# by top-1 the best of 'plain' is epoch 1, by loss always the newest
@pytest.mark.parametrize('stop', ['2', '3', '4'])
def test_under_another_eval_metric_the_best_is_found_anew(stop, alone, tmp_path, capsys):
    folder, argv = alone('plain')
    argv = [*argv, '--output', str(tmp_path)]
    run([*argv, '--experiment', 'loss', '--eval-metric', 'loss'])
    run([*argv, '--experiment', 'run', '--stop-epoch', stop])
    said = run([*argv, '--experiment', 'run', '--resume', 'auto', '--eval-metric', 'loss'], capsys)
    assert f'--eval-metric is loss now and was top1 before: epoch {stop} is the best so far' in said
    if stop != '4':  # else nothing was left to train, and `last` is as it was
        assert best_of(tmp_path / 'run')[0] == best_of(tmp_path / 'loss')[0]
    assert best_of(tmp_path / 'run')[1] == best_of(tmp_path / 'loss')[1]
    assert best_of(tmp_path / 'run')[1] != best_of(folder)[1]
    students = [(tmp_path / name / 'student.safetensors').read_bytes() for name in ('run', 'loss')]
    assert students[0] == students[1]


def test_an_average_that_a_resume_switches_on_goes_with_another_metric(alone, tmp_path, capsys):
    argv = [*alone('plain')[1], '--output', str(tmp_path), '--experiment', 'run', '--resume', 'auto']
    run([*argv, '--stop-epoch', '2'])
    run([*argv, '--stop-epoch', '3', '--model-ema', '--eval-metric', 'loss'])
    assert summary(tmp_path / 'run')[-1]['epoch'] == '2'


def test_rows_that_were_moved_aside_are_cut_where_a_run_starts_again(tmp_path):
    folder = RunFolder(tmp_path)
    header = 'epoch,train_loss,eval_top1,lr\n'
    (tmp_path / 'summary.csv.until-20260101-000000').write_text(f'{header}0,1,50,0.1\n1,1,60,0.1\n')
    (tmp_path / 'summary.csv').write_text('epoch,train_loss,train_pe_loss,eval_top1,lr\n2,1,1,70,0.1\n')
    folder.cut_rows(1)
    assert list(folder.rows_by_epoch()) == [0]
    folder.cut_rows(0)
    assert folder.rows_by_epoch() == {}
    assert not list(tmp_path.glob('*.until-*'))


def test_settings_of_the_optimizer_that_a_resume_keeps_are_named(alone, tmp_path, capsys):
    argv = [*alone('plain')[1], '--output', str(tmp_path), '--experiment', 'run', '--resume', 'auto', '--opt', 'sgd']
    run([*argv, '--stop-epoch', '1', '--momentum', '0.9'])
    said = run([*argv, '--stop-epoch', '2', '--momentum', '0.1'], capsys)
    assert '--resume continues with --momentum 0.9 of the checkpoint, not with 0.1' in said
    assert '--resume continues with' not in run([*argv, '--stop-epoch', '3', '--momentum', '0.9'], capsys)


def test_what_a_resumed_optimizer_keeps_is_named_and_is_what_the_runs_files_say(alone, tmp_path, capsys):
    argv = [*alone('plain')[1], '--output', str(tmp_path), '--experiment', 'run', '--resume', 'auto', '--opt', 'adamw']
    then = ['--layer-decay', '0.5', '--lr', '0.02', '--weight-decay', '0.1', '--opt-kwargs', 'amsgrad=True']
    run([*argv, *then, '--stop-epoch', '1'])
    now = ['--layer-decay', '0.9', '--lr', '0.5', '--weight-decay', '0.5']
    said = run([*argv, *now, '--stop-epoch', '2'], capsys)
    assert '--resume continues with --layer-decay 0.5 of the checkpoint, not with 0.9' in said
    assert "--resume continues with --opt-kwargs {'amsgrad': True} of the checkpoint, not with {}" in said
    assert 'flags that differ' not in said
    last = load(tmp_path / 'run' / 'last.pth.tar')
    scales = {group['lr_scale'] for group in last['optimizer']['param_groups']}
    assert 0.25 in scales
    assert 0.81 not in scales
    kept = yaml.safe_load((tmp_path / 'run' / 'args.yaml').read_text())
    for settings in (kept, vars(last['args'])):
        assert (settings['layer_decay'], settings['lr'], settings['weight_decay']) == (0.5, 0.02, 0.1)
    assert '--resume continues with' not in run([*argv, *then, '--stop-epoch', '3'], capsys)


@pytest.mark.parametrize(
    ('more', 'named'),
    [
        (['--mean', '0', '--std', '4'], 'mean (0.5, 0.5, 0.5), this run has (0.0, 0.0, 0.0)'),
        (['--gp', 'max'], '--gp None, this run has max'),
        (['--img-size', '48'], 'input size (3, 32, 32), this run has (3, 48, 48)'),
        (['--crop-pct', '0.5'], 'crop pct 0.95, this run has 0.5'),
    ],
)
def test_a_run_does_not_go_on_with_a_student_that_is_built_or_fed_otherwise(alone, tmp_path, capsys, more, named):
    argv = [*alone('plain')[1], '--output', str(tmp_path), '--experiment', 'run']
    run([*argv, '--stop-epoch', '2'])
    before = bytes_of(tmp_path / 'run')
    with pytest.raises(SystemExit) as e:
        train_distill.main([*argv, '--resume', 'auto', *more])
    assert e.value.code == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert f'had {named}, and the weights of the best epoch are for that of then: give the same, or' in error
    assert bytes_of(tmp_path / 'run') == before
    last = str(tmp_path / 'run' / 'last.pth.tar')
    run([*argv, '--resume', last, '--experiment', 'new', *more])
    assert bytes_of(tmp_path / 'run') == before
    assert [row['epoch'] for row in summary(tmp_path / 'new')] == ['2', '3']


@pytest.mark.long
def test_a_student_of_a_fixed_size_or_of_one_channel_resumes_as_it_was_and_not_otherwise(alone, tmp_path, capsys):
    argv = [*alone('plain')[1], '--output', str(tmp_path), '--model', 'test_vit', '--in-chans', '1', '--mean', '0.3']
    argv += ['--experiment', 'run', '--resume', 'auto']
    run([*argv, '--stop-epoch', '1'])
    run([*argv, '--stop-epoch', '2'])
    assert 'does not fit VisionTransformer' in refused([*argv, '--img-size', '48'], capsys)


def test_weights_that_fit_any_size_do_not_go_on_with_another(alone):
    swin = timm.create_model('swin_tiny_patch4_window7_224', img_size=64, depths=(1, 1, 1, 1), embed_dim=12)
    config = parse_config([*alone('plain')[1], '--model', 'swin_tiny_patch4_window7_224', '--img-size', '64'])
    check_same_student(config, {'img_size': 64}, 'last', swin)
    with pytest.raises(UsageError, match=r'had input size 32, this run has \(3, 64, 64\)'):
        check_same_student(config, {'img_size': 32}, 'last', swin)


def test_other_words_for_the_same_student_and_optimizer_are_no_difference(alone, tmp_path, capsys):
    argv = [*alone('plain')[1], '--output', str(tmp_path), '--experiment', 'run']
    built = ['--model-kwargs', 'layers=(1,1,1,1)', '--opt', 'adamw', '--opt-kwargs', 'betas=(0.8,0.9)']
    run([*argv, *built, '--mean', '0', '0', '0', '--std', '1', '1', '1', '--stop-epoch', '1'])
    same = ['-c', str(tmp_path / 'run' / 'args.yaml'), '--resume', 'auto']
    said = run([*same, '--mean', '0', '--std', '1', '--input-size', '3', '32', '32', '--stop-epoch', '2'], capsys)
    assert 'continues with' not in said
    assert 'model-kwargs' not in said.split('flags that differ')[-1].splitlines()[0]
    # a finished run is finished
    assert 'the run is finished' in run(
        [*argv, *built, '--resume', 'auto', '--stop-epoch', '2', '--crop-pct', '0.5'], capsys
    )


def test_groups_of_the_optimizer_are_those_of_the_checkpoint_whatever_is_given(alone, tmp_path, capsys):
    argv = [*alone('plain')[1], '--output', str(tmp_path), '--experiment', 'run', '--resume', 'auto', '--opt', 'adamw']
    run([*argv, '--layer-decay', '0.5', '--weight-decay', '0.1', '--stop-epoch', '1'])
    said = run([*argv, '--weight-decay', '0', '--stop-epoch', '2'], capsys)
    assert '--resume continues with --layer-decay 0.5 of the checkpoint, not with None' in said
    assert '--resume continues with weight decay 0.1 of the checkpoint, not with 0' in said
    groups = load(tmp_path / 'run' / 'last.pth.tar')['optimizer']['param_groups']
    assert len({group['lr_scale'] for group in groups}) > 2


def test_a_prefetcher_that_a_resume_switches_off_is_named(alone, tmp_path, capsys):
    argv = [*alone('plain')[1], '--output', str(tmp_path), '--experiment', 'run', '--resume', 'auto']
    run([*argv, '--stop-epoch', '1'])
    assert '--no-prefetcher False then and True now' in run([*argv, '--no-prefetcher', '--stop-epoch', '2'], capsys)


def test_a_best_epoch_whose_weights_are_gone_is_named_and_the_best_that_is_kept_counts(alone, tmp_path, capsys):
    argv = [*alone('plain')[1], '--output', str(tmp_path), '--experiment', 'run', '--checkpoint-hist', '1']
    argv += ['--resume', 'auto']
    run([*argv, '--stop-epoch', '3'])
    assert list(best_of(tmp_path / 'run')[0]) == ['checkpoint-1.pth.tar', 'checkpoint-2.pth.tar']  # the last is `last`
    rows = summary(tmp_path / 'run')
    path = tmp_path / 'run' / 'summary.csv'
    path.write_text(path.read_text().replace(rows[0]['eval_loss'], '0.001'))
    said = run([*argv, '--eval-metric', 'loss', '--stop-epoch', '3'], capsys)
    assert 'epoch 1 is the best so far, but its weights are not kept: of those that are, epoch 3 is' in said
    assert best_of(tmp_path / 'run')[1] == 2


def test_a_plateau_schedule_does_not_compare_one_metric_with_another(alone, tmp_path, capsys):
    argv = [*alone('plateau')[1], '--output', str(tmp_path), '--experiment', 'run', '--resume', 'auto']
    run([*argv, '--stop-epoch', '3'])
    said = run([*argv, '--eval-metric', 'loss'], capsys)
    assert 'the plateau schedule counts anew' in said
    plateau = load(tmp_path / 'run' / 'last.pth.tar')['saver']['run']['schedule']['plateau']
    assert plateau['mode'] == 'min'
    assert plateau['best'] == float('inf') or plateau['best'] < 2


def test_a_resumed_run_puts_the_best_of_its_history_in_place(alone, tmp_path):
    folder, argv = alone('plain')
    shutil.copytree(folder, tmp_path / 'run')
    shutil.copy(folder / 'checkpoint-3.pth.tar', tmp_path / 'run' / 'model_best.pth.tar')  # of a branch that is left
    run([*argv, '--output', str(tmp_path), '--experiment', 'run', '--resume', 'auto'])
    assert compare(folder, tmp_path / 'run') == []


def change_run(folder, **changes):
    """Make `last` one of which the state of the run is another; a value of None is missing, as in earlier commits."""
    checkpoint = load(folder / 'last.pth.tar')
    state = {**checkpoint['saver']['run'], **changes}
    checkpoint['saver']['run'] = {k: v for k, v in state.items() if k not in changes or v is not None}
    torch.save(checkpoint, folder / 'last.pth.tar')


def test_changed_training_images_are_warned_about(images, tmp_path, capsys):
    shutil.copytree(images, tmp_path / 'images')
    argv = [str(tmp_path / 'images'), *COMMON, '--output', str(tmp_path), '--experiment', 'run', '--resume', 'auto']
    run([*argv, '--stop-epoch', '1'])
    assert 'have changed' not in run([*argv, '--stop-epoch', '2'], capsys)
    (tmp_path / 'images' / 'train' / 'ant' / '0.png').unlink()
    said = run([*argv, '--stop-epoch', '3'], capsys)
    assert re.search(
        r'training images have changed since the checkpoint: 72 of hash \w+ then, 71 of hash \w+ now', said
    )


def test_a_recovery_checkpoint_without_a_position_trains_its_epoch_again(alone, tmp_path, stop_at, capsys, monkeypatch):
    folder, argv = alone('plain')
    argv = [*argv, '--output', str(tmp_path), '--experiment', 'run', '--resume', 'auto']
    monkeypatch.setattr(checkpoints.Saver, 'state_dict', lambda *args: CheckpointSaver.state_dict(*args))
    stop_at(14)
    stopped(argv, capsys)
    monkeypatch.undo()
    assert re.search(r'epochs +4 of 9 batches, warmup 1, 1 of them trained before', run(argv, capsys))


@pytest.mark.parametrize('name', ['kept.pth.tar', 'last.pth.tar', 'recovery-9-9.pth.tar'])
def test_where_a_run_goes_on_is_what_its_checkpoint_holds_not_how_the_file_is_called(
    name, alone, tmp_path, stop_at, capsys, monkeypatch
):
    folder, argv = alone('plain')
    argv = [*argv, '--output', str(tmp_path), '--experiment', 'run', '--save-epochs', '1', '2']
    run([*argv, '--stop-epoch', '1'])
    stop_at(4)
    stopped([*argv, '--resume', 'auto'], capsys)
    monkeypatch.undo()
    os.replace(tmp_path / 'run' / 'recovery-1-3.pth.tar', tmp_path / 'run' / name)
    run([*argv, '--resume', str(tmp_path / 'run' / name)])
    (tmp_path / 'run' / 'kept.pth.tar').unlink(missing_ok=True)
    found = compare(folder, tmp_path / 'run')
    assert sorted(found) == ['only in one: milestone-1.pth.tar', 'only in one: milestone-2.pth.tar']
    assert [load(tmp_path / 'run' / f'milestone-{n}.pth.tar')['saver']['run']['validated'] for n in (1, 2)] == [
        True
    ] * 2


def test_a_checkpoint_of_a_whole_epoch_is_one_under_the_name_of_a_recovery_file_too(alone, tmp_path, capsys):
    folder, argv = alone('plain')
    shutil.copy(folder / 'checkpoint-1.pth.tar', tmp_path / 'recovery-1-5.pth.tar')
    argv = [*argv, '--output', str(tmp_path), '--experiment', 'run', '--resume', str(tmp_path / 'recovery-1-5.pth.tar')]
    run(argv)
    assert [row['epoch'] for row in summary(tmp_path / 'run')] == ['2', '3']


def test_a_position_that_is_none_is_refused(alone, tmp_path, capsys):
    folder, argv = alone('plain')
    checkpoint = load(folder / 'last.pth.tar')
    state = checkpoint['saver']['run']
    odds = 'x', {'epoch': 1}, {**state, 'batch': -1}, {**state, 'seconds': 'x'}, {**state, 'seconds': -1.0}
    odds += tuple({**state, 'meaning': odd} for odd in ('x', {'teacher_weights': 3}, {'classes': ['ant']}))
    odds += {**state, 'lap': 3}, {**state, 'seconds': float('nan')}
    for odd in odds:
        checkpoint['saver']['run'] = odd
        torch.save(checkpoint, tmp_path / 'last.pth.tar')
        with pytest.raises(UsageError, match='is no training checkpoint'):
            position.read_run_state(load_checkpoint_metadata(str(tmp_path / 'last.pth.tar')), 'last.pth.tar')
    argv = [*argv, '--output', str(tmp_path), '--resume', str(tmp_path / 'last.pth.tar')]
    assert 'is no training checkpoint' in refused(argv, capsys)


@pytest.mark.parametrize(
    ('variant', 'of', 'name'), [('plain', 'random', 'torch'), ('narrow', 'generators', '_sr_generator cpu')]
)
def test_random_states_that_do_not_fit_are_refused_before_anything_is_written(
    variant, of, name, alone, tmp_path, capsys
):
    folder, argv = alone(variant)
    checkpoint = load(folder / 'checkpoint-1.pth.tar')
    checkpoint['saver']['run']['ranks'][0][of][name] = torch.zeros(3, dtype=torch.uint8)
    torch.save(checkpoint, tmp_path / 'c.pth.tar')
    argv = [*argv, '--output', str(tmp_path / 'out'), '--experiment', 'run', '--resume', str(tmp_path / 'c.pth.tar')]
    assert 'random states' in refused(argv, capsys)
    assert not (tmp_path / 'out').exists()


def test_a_checkpoint_with_random_states_loads_with_weights_only(alone):
    ranks = load(alone('plain')[0] / 'last.pth.tar')['saver']['run']['ranks']
    assert set(ranks[0]['random']) == {'python', 'numpy', 'torch'}


# Another run under the same name -----------------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def teachers(tmp_path_factory):
    """Weights of two teachers of one architecture."""
    folder = tmp_path_factory.mktemp('teachers')
    for name in ('a', 'b'):
        torch.manual_seed(ord(name))
        torch.save(timm.create_model('test_resnet', num_classes=3).state_dict(), folder / f'{name}.pth')
    return folder


@pytest.fixture
def begun(images, teachers, tmp_path):
    """The command line of a run with teacher a, of which an epoch is trained."""
    argv = [str(images), *COMMON, '--output', str(tmp_path), '--experiment', 'run', '--teacher-checkpoint']
    run([*argv, str(teachers / 'a.pth'), '--stop-epoch', '1'])
    return [*argv, str(teachers / 'a.pth'), '--resume', 'auto']


def bytes_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize(
    ('more', 'why'),
    [
        (['--teacher-checkpoint', 'b'], r'teacher test_resnet \(\w{16}\) then, test_resnet \(\w{16}\) now'),
        (['--teacher', 'test_vit', '--teacher-checkpoint', ''], r'teacher test_resnet \(\w{16}\) then, test_vit now'),
        (['--pe-target', 'logits', '--pe-loss', 'kl'], 'target feature then, logits now'),
        (['--model', 'test_vit'], 'model test_resnet then, test_vit now'),
    ],
)
def test_a_resume_that_makes_another_run_of_it_is_refused_and_no_resume_opt_starts_one(
    more, why, begun, teachers, tmp_path, capsys, monkeypatch
):
    more = [str(teachers / 'b.pth') if word == 'b' else word for word in more]
    before = bytes_of(tmp_path / 'run')
    said = refused([*begun, *more], capsys)
    assert re.search(f'is of another run .*{why}', said)
    assert 'add --no-resume-opt --start-epoch 0 to start a new run on its student' in said
    assert bytes_of(tmp_path / 'run') == before
    if '--model' in more:  # whose weights are no others
        return
    loaded = []
    monkeypatch.setattr(ProjectorEnsembleTask, 'load_task_state', lambda self, state, **kwargs: loaded.append(state))
    argv = [*begun, *more, '--experiment', 'new', '--resume', str(tmp_path / 'run'), '--no-resume-opt']
    said = run([*argv, '--start-epoch', '0', '--epochs', '2', '--model-ema'], capsys)
    assert re.search(f'{why}.*: its projectors start new', said)
    assert loaded == [None, None]
    assert [row['epoch'] for row in summary(tmp_path / 'new')] == ['0', '1']
    assert bytes_of(tmp_path / 'run') == before


def test_a_teacher_is_told_by_its_weights_however_they_are_called_and_run(begun, teachers, tmp_path, capsys):
    shutil.copy(teachers / 'a.pth', tmp_path / 'copy.pth')
    how = ['--teacher-checkpoint', str(tmp_path / 'copy.pth'), '--no-teacher-fold', '--teacher-dtype', 'bfloat16']
    said = run([*begun, *how, '--kd-loss-weight', '1', '--stop-epoch', '2'], capsys)
    assert '--teacher-fold True then and False now' in said
    assert [row['epoch'] for row in summary(tmp_path / 'run')] == ['1']


def test_another_class_map_is_refused(begun, tmp_path, capsys):
    shutil.copytree(begun[0], tmp_path / 'images')
    for split in ('train', 'val'):
        os.rename(tmp_path / 'images' / split / 'ant', tmp_path / 'images' / split / 'dog')
    said = refused([str(tmp_path / 'images'), *begun[1:]], capsys)
    assert "class 'ant' 0 then, of no class now" in said
    anew = ['--no-resume-opt', '--start-epoch', '0', '--experiment', 'new', '--resume', str(tmp_path / 'run')]
    said = run([str(tmp_path / 'images'), *begun[1:], *anew, '--epochs', '2'], capsys)
    assert "class 'ant' 0 then, of no class now" in said
    assert 'start new' not in said


def test_what_merely_differs_is_named_in_one_line(begun, tmp_path, capsys):
    more = ['--pe-loss', 'mse', '--pe-teacher-norm', 'layer', '--mixup', '0.2', '--epochs', '5']
    said = run([*begun, *more, '--stop-epoch', '2', '-j', '1', '--log-interval', '1'], capsys)
    (line,) = [line for line in said.splitlines() if 'flags that differ' in line]
    assert line.endswith(
        '--resume: flags that differ from those of the checkpoint: --epochs 4 then and 5 now, --mixup 0.0 then and 0.2 now, '
        "--pe-loss None then and 'mse' now, --pe-teacher-norm 'none' then and 'layer' now."
    )
    assert 'flags that differ' not in run([*begun, *more, '--stop-epoch', '3'], capsys)


@pytest.mark.parametrize(('metric', 'said'), [('knn', "--knn-data 'a' then and 'b' now"), (None, '')])
def test_other_images_of_the_knn_are_named_where_it_chooses_the_best_epoch(metric, said):
    then, now = (RunConfig(eval_metric=metric, knn_data=folder) for folder in 'ab')
    assert describe_differences(now, then.as_dict()) == said


def test_a_checkpoint_of_an_earlier_commit_is_not_asked_for_what_it_does_not_hold(begun, teachers, tmp_path, capsys):
    ranks = load(tmp_path / 'run' / 'last.pth.tar')['saver']['run']['ranks']
    del ranks[0]['generators']
    change_run(tmp_path / 'run', meaning=None, seconds=None, ranks=ranks)
    said = run([*begun, '--teacher-checkpoint', str(teachers / 'b.pth')], capsys)
    assert 'of another run' not in said
    assert [row['epoch'] for row in summary(tmp_path / 'run')] == ['0', '1', '2', '3']


# Signals -------------------------------------------------------------------------------------------------------------


def test_a_signal_is_kept_until_asked_for_and_handlers_are_given_back():
    before = [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)]
    with Interrupts() as interrupts:
        assert interrupts.requested() == 0
        signal.raise_signal(signal.SIGUSR1)
        signal.raise_signal(signal.SIGTERM)
        assert interrupts.requested() == signal.SIGUSR1
    assert [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)] == before


def test_where_hosts_cannot_connect_the_devices_ask_now_and_then(monkeypatch):
    asked = []
    monkeypatch.setattr(dist, 'all_reduce', lambda *args, **kwargs: asked.append(kwargs.get('group')))
    monkeypatch.setattr(torch, 'tensor', lambda value, device: value)
    runtime = SimpleNamespace(distributed=True, device=torch.device('cuda'), hosts=None)
    with Interrupts(runtime) as interrupts:
        signal.raise_signal(signal.SIGUSR1)
        found = [interrupts.requested() for _ in range(100)]
    assert found == [0] * 49 + [signal.SIGUSR1] + [0] * 49 + [signal.SIGUSR1]
    assert asked == [None] * 2


def test_a_rank_keeps_its_own_running_statistics_and_nothing_that_all_ranks_have():
    student, teacher = timm.create_model('test_resnet', num_classes=3), timm.create_model('test_vit', num_classes=3)
    task = ProjectorEnsembleTask(student, teacher, projector='orthogonal', num_projectors=1, verbose=False)
    names = position._buffers(task)
    assert len(names) == 3 * sum(isinstance(m, torch.nn.BatchNorm2d) for m in student.modules()) > 0
    assert {name.rpartition('.')[2] for name in names} == {'running_mean', 'running_var', 'num_batches_tracked'}


def test_a_second_interrupt_from_the_keyboard_stops_at_once():
    with Interrupts():
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize(('signum', 'code'), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGUSR1, 138)])
def test_the_exit_code_is_128_and_the_number_of_the_signal(signum, code, images, tmp_path, stop_at, capsys):
    stop_at(1, signum)
    argv = [str(images), *COMMON, '--output', str(tmp_path), '--experiment', 'run']
    said, _ = stopped(argv, capsys, code=code)
    assert said == f'train_distill: stopped by {signum.name} after batch 1 of 9 of epoch 1 of 4; to go on:'


def test_the_command_that_a_stopped_run_names_goes_on_with_it(alone, tmp_path, stop_at, capsys, monkeypatch):
    folder, argv = alone('plain')
    argv = [*argv, '--output', str(tmp_path / 'a b'), '--overwrite']  # its folder is called by the time
    stop_at(10)
    _, command = stopped(argv, capsys)
    monkeypatch.undo()
    words = shlex.split(command)
    run(words[words.index(argv[0]) :])
    (only,) = (tmp_path / 'a b').iterdir()
    assert compare(folder, only) == []
    assert words[-3:-1] == ['auto', '--experiment']
    x = RunFolder(tmp_path / 'a b' / 'x')
    again = command_to_go_on([*argv, '--experiment', 'x', '--resume=auto'], x, str(tmp_path / 'a b'))
    assert again.count('--experiment x') == again.count('--resume auto') == again.count('--output') == 1
    anew = [
        '--resume',
        'old',
        '--no-resume-opt',
        '--start-epoch',
        '0',
        '--start-epoch=0',
    ]  # would begin again each time
    assert command_to_go_on([*argv, *anew], x) == command_to_go_on(argv, x)


@pytest.mark.parametrize('output', [True, False])
def test_a_folder_that_resume_names_goes_on_in_place_from_its_newest_checkpoint(
    output, alone, tmp_path, stop_at, capsys, monkeypatch
):
    folder, argv = alone('plain')
    where = ['--output', str(tmp_path)] if output else []
    stop_at(10)
    stopped([*argv, '--output', str(tmp_path), '--experiment', 'run'], capsys)
    assert list((tmp_path / 'run').glob('recovery-*'))
    again = [*argv, *where, '--resume', str(tmp_path / 'run')]
    stop_at(20)
    said, command = stopped(again, capsys)
    assert 'of 9 of epoch 3 of 4' in said
    words = shlex.split(command)
    assert (words[words.index('--experiment') + 1], words[words.index('--output') + 1]) == ('run', str(tmp_path))
    monkeypatch.undo()
    run(again)
    assert [path.name for path in tmp_path.iterdir()] == ['run']
    assert compare(folder, tmp_path / 'run') == []


def test_the_newest_checkpoint_of_a_folder_is_that_of_the_latest_position_whatever_the_times_of_its_files(
    alone, tmp_path
):
    folder, _ = alone('plain')
    shutil.copytree(folder, tmp_path / 'copy')
    for time, path in enumerate(sorted((tmp_path / 'copy').glob('*.pth.tar'), reverse=True)):
        os.utime(path, (time + 1, time + 1))
    assert checkpoints.find_resume(RunConfig(resume=str(tmp_path / 'copy'))) == str(tmp_path / 'copy' / 'last.pth.tar')
    (tmp_path / 'copy' / 'last.pth.tar').unlink()
    assert checkpoints.find_resume(RunConfig(resume=str(tmp_path / 'copy'))).endswith('checkpoint-3.pth.tar')


def test_a_folder_that_resume_names_goes_on_elsewhere_where_the_command_says_so(
    alone, tmp_path, stop_at, capsys, monkeypatch
):
    _, argv = alone('plain')
    stop_at(10)
    stopped([*argv, '--output', str(tmp_path), '--experiment', 'run'], capsys)
    monkeypatch.undo()
    before = files_of(tmp_path / 'run')
    for more in (['--output', str(tmp_path), '--experiment', 'new'], ['--output', str(tmp_path / 'other')]):
        said = run([*argv, *more, '--resume', str(tmp_path / 'run')], capsys)
        assert '/run/recovery-' in said
    for more in (['--no-resume-opt'], ['--start-epoch', '1']):  # another run
        run([*argv, *more, '--epochs', '5', '--output', str(tmp_path), '--resume', str(tmp_path / 'run')])
    assert files_of(tmp_path / 'run') == before
    assert len(list(tmp_path.iterdir())) == 5
    assert (tmp_path / 'new' / 'student.safetensors').exists()
    assert len(list((tmp_path / 'other').glob('*/student.safetensors'))) == 1


def taken_for_an_error(signum):
    """Let a signal come up where Python 3.11 makes a RuntimeError of it, as while it imports a module."""

    class Hears:
        def __set_name__(self, owner, name):
            signal.raise_signal(signum)

    try:
        type('Owner', (), {'hears': Hears()})
    except RuntimeError as e:  # as an opener of data sets does
        raise UsageError(f'cannot open: {e}') from e


@pytest.mark.usefixtures('hears_sigint')
@pytest.mark.parametrize('fate', [signal.raise_signal, taken_for_an_error])
@pytest.mark.parametrize('signum', [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_before_training_has_its_code_and_its_line_and_leaves_nothing(
    signum, fate, images, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(start, 'prepare_teachers', lambda *args: fate(signum))
    with pytest.raises(SystemExit) as e:
        train_distill.main([str(images), *COMMON, '--output', str(tmp_path), '--experiment', 'run'])
    assert e.value.code == 128 + signum
    said = capsys.readouterr().err.splitlines()[-1]
    assert said == f'train_distill: stopped by {signum.name} before training began; the same command starts again'
    assert list(tmp_path.iterdir()) == []


def test_a_signal_that_some_code_drops_stops_the_run_before_training_all_the_same():
    with pytest.raises(Interrupted), stopping_at_once('then'), contextlib.suppress(BaseException):
        signal.raise_signal(signal.SIGTERM)


def test_a_signal_that_the_parent_process_ignores_is_ignored_before_training_too():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as a shell script does for a command with `&`
    try:
        with stopping_at_once('then'):
            signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


# The same folder again --------------------------------------------------------------------------------------------------


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_the_same_command_again_moves_the_earlier_run_aside_with_all_that_is_in_its_folder(alone, tmp_path, capsys):
    _, argv = alone('plain')
    argv = [*argv, '--epochs', '1', '--output', str(tmp_path), '--experiment', 'run']
    run(argv)
    (tmp_path / 'run' / 'notes.txt').write_text('mine')
    first = files_of(tmp_path / 'run')
    said = run([*argv, '--seed', '1'], capsys)
    assert (
        f"The earlier run in '{tmp_path / 'run'}' is now '{tmp_path / 'run'}.1' (--resume auto --experiment run.1 goes on with it"
        in said
    )
    assert files_of(tmp_path / 'run.1') == first
    second = files_of(tmp_path / 'run')
    assert 'notes.txt' not in second
    run([*argv, '--seed', '2', '--resume', 'auto'])  # goes on: it is finished
    assert sorted(p.name for p in tmp_path.iterdir()) == ['run', 'run.1']
    run([*argv, '--seed', '3'])
    assert files_of(tmp_path / 'run.2') == second


def test_overwrite_deletes_what_the_earlier_run_wrote_and_nothing_else(alone, tmp_path, capsys):
    _, argv = alone('plain')
    argv = [*argv, '--output', str(tmp_path), '--experiment', 'run']
    run(argv)
    mine = {'notes.txt', 'mine.pth.tar', 'summary.csv.old'}
    for name in mine:
        (tmp_path / 'run' / name).write_text('mine')
    said = run([*argv, '--epochs', '1', '--overwrite'], capsys)
    assert f"--overwrite: the earlier run in '{tmp_path / 'run'}' is deleted." in said
    assert [p.name for p in tmp_path.iterdir()] == ['run']
    names = {p.name for p in (tmp_path / 'run').iterdir()}
    assert names >= mine
    assert 'checkpoint-3.pth.tar' not in names  # the earlier run had four epochs


def test_a_folder_that_is_none_of_a_run_is_not_touched(alone, tmp_path, capsys):
    _, argv = alone('plain')
    argv = [*argv, '--epochs', '1', '--output', str(tmp_path), '--experiment', 'mine']
    (tmp_path / 'mine').mkdir()
    (tmp_path / 'mine' / 'model_best.pth.tar').write_bytes(b'weights of something else')
    for more in ([], ['--overwrite']):
        assert 'holds model_best.pth.tar, which a run would replace, and no args.yaml' in refused(
            [*argv, *more], capsys
        )
    assert [p.name for p in (tmp_path / 'mine').iterdir()] == ['model_best.pth.tar']
    (tmp_path / 'mine' / 'model_best.pth.tar').rename(tmp_path / 'mine' / 'notes.txt')
    run(argv)  # nothing in the way
    assert (tmp_path / 'mine' / 'notes.txt').read_bytes() == b'weights of something else'


@pytest.mark.parametrize(
    'flags',
    [
        ['--teacher-checkpoint', ''],
        ['--initial-checkpoint', 'student.safetensors'],
        ['--loss-class-weight', 'weights.txt', '--loss', 'bce'],
    ],
    ids=lambda flags: flags[0],
)
def test_a_run_whose_own_folder_has_what_it_reads_is_refused(flags, alone, tmp_path, capsys):
    folder, argv = alone('plain')
    shutil.copytree(folder, tmp_path / 'run')
    (tmp_path / 'run' / 'weights.txt').write_text('1 2 1')
    before = files_of(tmp_path / 'run')
    flags = [flags[0], str(tmp_path / 'run' / flags[1]), *flags[2:]]
    argv = [*argv, *flags, '--output', str(tmp_path), '--experiment', 'run']
    assert f'{flags[0]}: ' in refused(argv, capsys)
    assert files_of(tmp_path / 'run') == before
    run([*argv[:-1], 'other', '--epochs', '1'])


def test_a_cache_in_the_folder_of_the_run_is_taken_until_an_earlier_run_there_makes_room(alone, tmp_path, capsys):
    _, argv = alone('plain')
    cache = ['--teacher-cache', str(tmp_path / 'run' / 'cache')]
    argv = [*argv, *cache, '--no-aug', '--epochs', '1', '--output', str(tmp_path), '--experiment', 'run']
    run(argv)
    (tmp_path / 'run').rename(tmp_path / 'done')
    shutil.copytree(tmp_path / 'done' / 'cache', tmp_path / 'run' / 'cache')
    run(argv)  # the cache is there, no run
    assert '--teacher-cache: ' in refused(argv, capsys)


def test_a_row_that_a_kill_left_without_its_checkpoint_is_written_again_by_resume_auto(alone, tmp_path):
    folder, argv = alone('plain')
    argv = [*argv, '--output', str(tmp_path), '--experiment', 'run', '--resume', 'auto']
    (tmp_path / 'run').mkdir()
    for name in ('args.yaml', 'summary.csv'):
        shutil.copy(folder / name, tmp_path / 'run')
    run(argv)
    assert [path.name for path in tmp_path.iterdir()] == ['run']
    assert compare(folder, tmp_path / 'run') == []


def test_the_student_may_be_read_by_whoever_may_read_the_other_files(alone):
    folder, _ = alone('plain')
    assert {path.stat().st_mode for path in folder.iterdir()} == {(folder / 'args.yaml').stat().st_mode}


# Kills ---------------------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """What a kill looks like from inside: nothing after it runs."""


WRITES = [(os, 'replace'), (os, 'link'), (os, 'unlink'), (os, 'remove'), (torch, 'save')]


@pytest.mark.long
def test_a_kill_before_any_change_of_a_file_loses_nothing(alone, tmp_path, monkeypatch, capsys):
    folder, argv = alone('plateau')
    argv = [*argv, '--resume', 'auto', '--output', str(tmp_path)]
    changes = []

    def count(change):
        def counted(*args, **kwargs):
            changes.append(change)
            if len(changes) == deadly:
                raise Killed
            return change(*args, **kwargs)

        return counted

    deadly = 0
    with monkeypatch.context() as patch:
        for module, name in WRITES:
            patch.setattr(module, name, count(getattr(module, name)))
        run([*argv, '--experiment', 'counted'])
    number = len(changes)
    assert number > 40
    for deadly in range(1, number, 3):
        name = f'killed-{deadly}'
        changes.clear()
        with monkeypatch.context() as patch:
            for module, of in WRITES:
                patch.setattr(module, of, count(getattr(module, of)))
            patch.setattr('contextlib.suppress', _nothing_after_a_kill)
            with pytest.raises(Killed):
                run([*argv, '--experiment', name])
        run([*argv, '--experiment', name])
        assert compare(folder, tmp_path / name) == [], deadly
        shutil.rmtree(tmp_path / name)
    capsys.readouterr()


class _nothing_after_a_kill:
    """In place of contextlib.suppress: what would tidy up after an error does not, as after a kill."""

    def __init__(self, *errors):
        self.errors = errors

    def __enter__(self):
        raise Killed

    def __exit__(self, *error):
        return False


def test_two_folders_that_differ_are_told_apart(alone, tmp_path):
    folder, _ = alone('plain')
    shutil.copytree(folder, tmp_path / 'copy')
    assert compare(folder, tmp_path / 'copy') == []
    checkpoint = load(tmp_path / 'copy' / 'last.pth.tar')
    name = next(iter(checkpoint['state_dict']))
    checkpoint['state_dict'][name].view(-1)[0] += 1e-7
    torch.save(checkpoint, tmp_path / 'copy' / 'last.pth.tar')
    (tmp_path / 'copy' / 'model_best.pth.tar').unlink()
    assert compare(folder, tmp_path / 'copy') == ['only in one: model_best.pth.tar', f'last.pth.tar/state_dict/{name}']


# Disks ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def full_disk():
    """Files of this process end at so many bytes: the system refuses what comes after."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(size):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))

    yield limit
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize('what', ['a recovery checkpoint', 'the checkpoint of an epoch'])
def test_a_full_disk_ends_the_run_with_one_line_and_older_files_whole(what, alone, tmp_path, full_disk, capsys):
    folder, argv = alone('plain')
    argv = [*argv, '--output', str(tmp_path), '--experiment', 'run', '--resume', 'auto']
    run([*argv, '--stop-epoch', '1'])
    before = {p.name: p.read_bytes() for p in (tmp_path / 'run').iterdir()}
    full_disk(300_000)
    without = ['--recovery-interval', '0'] if what == 'the checkpoint of an epoch' else []
    error = refused([*argv, *without], capsys, code=1)
    assert f'cannot write {what}: is the disk full?' in error
    assert 'what was written before is whole' in error
    full_disk(resource.RLIM_INFINITY)
    after = {p.name: p.read_bytes() for p in (tmp_path / 'run').iterdir()}
    ignored = {'args.yaml', 'summary.csv'}
    assert {k: v for k, v in after.items() if k not in ignored} == {k: v for k, v in before.items() if k not in ignored}
    run(argv)
    assert compare(folder, tmp_path / 'run') == []


def test_a_full_disk_under_the_summary_ends_the_run_with_the_rows_so_far(alone, tmp_path, monkeypatch, capsys):
    folder, argv = alone('plain')
    argv = [*argv, '--output', str(tmp_path), '--experiment', 'run', '--resume', 'auto']

    def full(*args, **kwargs):
        raise OSError(28, 'No space left on device')

    run([*argv, '--stop-epoch', '1'])
    with monkeypatch.context() as patch:
        patch.setattr('timm_pe.run_folder.update_summary', full)
        assert 'No space left on device' in refused(argv, capsys, code=1)
    assert [row['epoch'] for row in summary(tmp_path / 'run')] == ['0']
    run(argv)
    assert compare(folder, tmp_path / 'run') == []


# What else happens in days ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    'error', [torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2 GiB'), MemoryError()]
)
def test_out_of_memory_says_what_needs_less(error, images, tmp_path, monkeypatch, capsys):
    def train(*args, **kwargs):
        raise error

    monkeypatch.setattr(Trainer, 'train_epoch', train)
    said = refused([str(images), *COMMON, '--output', str(tmp_path)], capsys, code=1)
    assert 'out of memory: a smaller --batch-size' in said


def test_a_cpu_out_of_memory_is_out_of_memory_too(images, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Trainer, 'train_epoch', lambda *args: torch.empty(2**50, dtype=torch.float64))
    said = refused([str(images), *COMMON, '--output', str(tmp_path)], capsys, code=1)
    assert 'out of memory: a smaller --batch-size' in said


class Numbers(torch.utils.data.Dataset):
    """Data of which a worker gives its pid."""

    def __len__(self):
        return 1000

    def __getitem__(self, index):
        return os.getpid()


def _signalled_while_it_starts(worker):
    for signum in ('TERM', 'INT', 'USR1'):
        subprocess.run(['kill', f'-{signum}', str(os.getpid())], check=True)
    ignore_in_worker()


@pytest.mark.skipif(not hasattr(signal, 'sigwaitinfo'), reason='a system without sigwaitinfo')
def test_a_worker_lives_through_signals_that_come_while_it_starts():
    with Interrupts() as interrupts:
        before = multiprocessing.active_children()
        loader = torch.utils.data.DataLoader(Numbers(), num_workers=1, worker_init_fn=_signalled_while_it_starts)
        batches = iter(loader)
        (worker,) = set(multiprocessing.active_children()) - set(before)
        assert int(next(batches)) == worker.pid
        os.kill(os.getpid(), signal.SIGTERM)  # the run itself hears
        assert interrupts.requested() == signal.SIGTERM
        del batches
        assert worker.exitcode == 0
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, []) & {signal.SIGTERM, signal.SIGINT, signal.SIGUSR1}


@pytest.mark.skipif(not hasattr(signal, 'sigwaitinfo'), reason='a system without sigwaitinfo')
def test_a_worker_lives_through_signals_of_others_and_ends_with_its_run():
    loader = torch.utils.data.DataLoader(Numbers(), num_workers=1, worker_init_fn=lambda worker: ignore_in_worker())
    before = multiprocessing.active_children()  # another test's loader may still be there
    batches = iter(loader)
    (worker,) = set(multiprocessing.active_children()) - set(before)
    assert int(next(batches)) == worker.pid
    for signum in ('TERM', 'INT', 'USR1'):
        subprocess.run(['kill', f'-{signum}', str(worker.pid)], check=True)
    for _ in range(50):  # more than were fetched ahead
        next(batches)
    worker.terminate()
    worker.join(5)
    assert worker.exitcode == 0
    del batches
