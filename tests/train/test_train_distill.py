"""The training script end to end, on tiny real images, by what it leaves in its folder and says."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
import yaml
from helpers import load, refused, run, stopped, summary

import train_distill
from timm_pe import export
from timm_pe.config.declare import neutral_in
from timm_pe.config.run_config import GROUPS, RunConfig, parse_config
from timm_pe.config.teachers import teachers_of
from timm_pe.train import build
from timm_pe.train.from_run import teacher_settings
from timm_pe.train.student import create_student
from timm_pe.train.trainer import Trainer

ROOT = Path(train_distill.__file__).parent
PAIR = ['--model', 'test_resnet', '--teacher', 'test_vit', '--no-teacher-pretrained']


@pytest.fixture(scope='module')
def finished(image_folder, tmp_path_factory):
    """A finished run with a teacher, and what it said."""
    output = tmp_path_factory.mktemp('finished')
    argv = [
        *(str(image_folder), '--num-classes', '3', '--img-size', '32', '-b', '8', '-j', '0', '--device', 'cpu'),
        *('--epochs', '3', '--warmup-epochs', '0', '--lr', '0.02', '--output', str(output), '--experiment', 'run'),
        *('--scale', '0.5', '1.0', '--log-interval', '2', *PAIR),
    ]
    out = subprocess.run(
        [sys.executable, str(ROOT / 'train_distill.py'), *argv],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert out.returncode == 0, out.stderr
    return output / 'run', argv, out.stderr


def test_a_run_leaves_the_files_of_timm_and_the_student(finished):
    folder, _, _ = finished
    assert {p.name for p in folder.iterdir()} == {
        *('args.yaml', 'summary.csv', 'last.pth.tar', 'model_best.pth.tar', 'student.safetensors'),
        *(f'checkpoint-{i}.pth.tar' for i in range(3)),
        '.lock',
    }


def test_the_summary_names_every_raw_term(finished):
    rows = summary(finished[0])
    assert [r['epoch'] for r in rows] == ['0', '1', '2']
    columns = 'epoch train_loss train_task_loss train_pe_loss train_images_per_s eval_loss eval_top1 eval_top5 lr'
    assert list(rows[0]) == columns.split()
    for row in rows:
        loss = float(row['train_task_loss']) + 25 * float(row['train_pe_loss'])
        assert float(row['train_loss']) == pytest.approx(loss, rel=1e-5)
    assert float(rows[2]['lr']) < float(rows[0]['lr']) == 0.02


def test_args_yaml_repeats_the_command(finished):
    args = yaml.safe_load((finished[0] / 'args.yaml').read_text())
    assert (args['teacher'], args['pe_projectors'], args['lr'], args['distill_loss_weight']) == (
        'test_vit',
        3,
        0.02,
        None,
    )


def test_a_checkpoint_holds_the_plain_student_and_the_projectors_apart(finished):
    checkpoint = load(finished[0] / 'last.pth.tar')
    plain = timm.create_model('test_resnet', num_classes=3)
    assert {k: v.shape for k, v in checkpoint['state_dict'].items()} == {
        k: v.shape for k, v in plain.state_dict().items()
    }
    state = checkpoint['task_state']
    assert state['projection']['projectors.fc.weight'].shape == (3 * 64, 96)
    assert (state['act'], state['num_projectors'], state['projector']) == ('none', 3, 'linear')
    assert checkpoint['args'].teacher == 'test_vit'


def test_plain_timm_loads_checkpoint_and_safetensors_to_the_same_best_student(finished):
    script = (
        'import sys, timm, torch\n'
        'a, b = (timm.create_model("test_resnet", num_classes=3, checkpoint_path=p).eval() for p in sys.argv[1:])\n'
        'x = torch.randn(2, 3, 32, 32)\n'
        'assert torch.equal(a(x), b(x))\n'
        'assert not any(m.startswith("timm_pe") for m in sys.modules)\n'
    )
    paths = [str(finished[0] / name) for name in ('model_best.pth.tar', 'student.safetensors')]
    subprocess.run([sys.executable, '-c', script, *paths], check=True, timeout=120)


def test_the_start_says_every_resolved_choice_once(finished):
    said = finished[2]
    for pattern in (
        r'model +test_resnet +test_vit',
        r'parameters +0\.37 M +0\.37 M \(frozen\)',
        r'feature width +96 +64',
        r'classes +3 +1000',
        r'input +3x32x32 +3x32x32',
        r'mean +0\.5 0\.5 0\.5 +0\.5',
        r'projectors +3 x linear 96 -> 64, activation none, 18,624 parameters',
        r'loss +1 x LabelSmoothingCrossEntropy \+ 25 x direction',
        r'learning rate +0\.02 \(sgd, cosine',
        r'global batch +8 = 8 x 1 ranks x 1 steps',
        r'loader workers +0 \(as -j says\)',
        r'precision +float32 +(?:float32|bfloat16 \(auto\))\n',
        r'device +cpu, world size 1',
        r'versions +timm_pe \S+, timm 1\.\S+, torch \d\S+, Python 3\.',
    ):
        assert len(re.findall(pattern, said)) == 1, pattern
    assert 'its 1000 classes are not the 3 of the data, so its accuracy cannot be checked' in said
    why = "the teacher's features on the first batch have both signs. Without it the mean of the 3 is one linear layer."
    assert said.count(f"--pe-act auto is 'none': {why}") == 1
    assert re.search(
        r'Train 1/3 \[ +2/4 \( 50%\)\]  loss .*task_loss .*pe_loss .*lr .* images/s  waiting for data \d+%  left 0:0',
        said,
    )


def test_evaluate_gives_the_accuracy_of_the_best_epoch_again(finished, capsys):
    folder, argv, _ = finished
    best = max(float(r['eval_top1']) for r in summary(folder))
    for path in (folder, folder / 'model_best.pth.tar', folder / 'student.safetensors'):
        said = run([*argv, '--evaluate', str(path)], capsys)
        assert float(re.search(r'top-1 ([\d.]+) %', said)[1]) == pytest.approx(best, abs=1e-3)


def top1(said):
    return float(re.search(r'top-1 ([\d.]+) %', said)[1])


@pytest.mark.parametrize('more', [[], ['--no-prefetcher']])
def test_evaluate_normalizes_images_in_the_precision_that_the_run_did(more, tmp_path, capsys):
    """In a low --model-dtype the prefetcher rounds otherwise than the transforms of --no-prefetcher."""
    argv = [
        '--dataset',
        'sklearn/digits',
        '--num-classes',
        '10',
        '--model',
        'cifar_resnet8',
        '--img-size',
        '16',
        '-j',
        '0',
    ]
    argv += ['--device', 'cpu', '--epochs', '1', '--warmup-epochs', '0', '--lr', '0.2', '--mean', '0.3', '--std', '0.6']
    argv += ['--in-chans', '1', '--model-dtype', 'bfloat16', '--output', str(tmp_path), '--experiment', 'run', *more]
    run(argv)
    row = summary(tmp_path / 'run')[0]
    said = run(['--evaluate', str(tmp_path / 'run'), '-j', '0', '--device', 'cpu'], capsys)
    assert f'val loss {float(row["eval_loss"]):.4f}' in said
    assert f'top-1 {float(row["eval_top1"]):.3f} %  top-5 {float(row["eval_top5"]):.3f} %' in said


def test_data_whose_classes_are_not_those_of_the_run_is_not_evaluated(finished, image_folder, tmp_path, capsys):
    shutil.copytree(image_folder, tmp_path / 'images')
    for split in ('train', 'val'):
        (tmp_path / 'images' / split / 'cat').rename(tmp_path / 'images' / split / 'aardvark')
    argv = ['--device', 'cpu', '-j', '0', '--evaluate', str(finished[0])]
    error = refused([str(tmp_path / 'images'), *argv], capsys)
    assert "(class 'ant' 0 then, 1 now)" in error
    run([str(image_folder), *argv])


def test_evaluate_takes_from_its_run_how_the_student_was_built_and_fed(image_folder, tmp_path, capsys):
    how = ['--img-size', '24', '--crop-pct', '0.5', '--mean', '0.1', '--std', '0.9', '--in-chans', '1', '--gp', 'max']
    how += ['--model-kwargs', 'act_layer=silu', '--val-split', 'train', '--pretrained-cfg-overlay', 'crop_mode=border']
    where = ['-b', '8', '-j', '0', '--device', 'cpu']
    argv = [str(image_folder), '--model', 'test_resnet', '--num-classes', '3', *how, *where, '--warmup-epochs', '0']
    run([*argv, '--epochs', '3', '--lr', '0.02', '--output', str(tmp_path), '--experiment', 'run'])
    rows = summary(tmp_path / 'run')
    best = max(float(r['eval_top1']) for r in rows)
    for path, row in (
        (tmp_path / 'run', None),
        *((tmp_path / 'run' / f'checkpoint-{i}.pth.tar', rows[i]) for i in (0, 2)),
    ):
        said = run([*where, '--evaluate', str(path)], capsys)
        assert top1(said) == pytest.approx(float(row['eval_top1']) if row else best, abs=1e-3)
        assert row is None or f'loss {float(row["eval_loss"]):.4f}' in said
        assert re.search(r"--evaluate: from '\S+args.yaml': model test_resnet, .*img_size 24, .*crop_pct 0.5", said)


def test_evaluate_takes_the_weights_that_the_run_evaluated_where_its_average_stayed_on_the_cpu(
    small_run, tmp_path, capsys
):
    average = ['--model-ema', '--model-ema-force-cpu', '--model-ema-decay', '0.99']
    run([*small_run, '--model', 'test_resnet', *average])
    for path, i in (('checkpoint-0.pth.tar', 0), ('last.pth.tar', 1)):
        said = run(['--device', 'cpu', '-b', '8', '-j', '0', '--evaluate', str(tmp_path / 'run' / path)], capsys)
        assert f'loss {float(summary(tmp_path / "run")[i]["eval_loss"]):.4f}' in said


def test_a_flag_that_is_given_with_evaluate_wins_over_its_run_and_that_is_said(finished, tmp_path, capsys):
    folder, argv, _ = finished
    where = ['-b', '8', '-j', '0', '--device', 'cpu']
    unlike = run([*where, '--img-size', '224', '--val-split', 'train', '--evaluate', str(folder)], capsys)
    assert 'given otherwise: img_size 32' in unlike
    assert 'on 36 images' in unlike
    said = run([*where, '--input-size', '3', '32', '32', '--evaluate', str(folder)], capsys)
    assert 'img_size' not in said.split('given otherwise')[0]
    (tmp_path / 'more.yaml').write_text('crop_pct: 0.5\n')
    assert 'img_size 32' in run([*where, '-c', str(tmp_path / 'more.yaml'), '--evaluate', str(folder)], capsys)
    # a checkpoint of no run says nothing
    alone = tmp_path / 'alone.safetensors'
    alone.write_bytes((folder / 'student.safetensors').read_bytes())
    said = run([str(argv[0]), '--model', 'test_resnet', '--num-classes', '3', *where, '--evaluate', str(alone)], capsys)
    assert '--evaluate: from' not in said


def test_evaluate_of_another_model_than_its_run_is_refused(finished, capsys):
    error = refused(['--model', 'test_vit', '--device', 'cpu', '-j', '0', '--evaluate', str(finished[0])], capsys)
    assert 'does not fit VisionTransformer' in error


def test_no_run_that_is_evaluated_makes_code_run(finished, tmp_path, capsys):
    lines = yaml.safe_load((finished[0] / 'args.yaml').read_text())
    for key, value in (('data', 'pipe:touch x'), ('data_dir', 'pipe:touch x')):
        (tmp_path / 'args.yaml').write_text(yaml.safe_dump({**lines, key: value}))
        (tmp_path / 'student.safetensors').write_bytes((finished[0] / 'student.safetensors').read_bytes())
        error = refused(['--device', 'cpu', '--evaluate', str(tmp_path)], capsys)
        assert f'--evaluate: {key} in' in error
        assert 'runs code' in error


def test_resume_continues_with_projectors_optimizer_and_schedule(finished, small_run, tmp_path, capsys):
    folder, _, _ = finished
    argv = [*small_run, *PAIR, '--epochs', '3', '--resume', str(folder / 'checkpoint-1.pth.tar')]
    said = run(argv, capsys)
    assert '--pe-act auto' not in said  # taken from the checkpoint, not probed again
    rows, expected = summary(tmp_path / 'run'), summary(folder)
    assert [r['epoch'] for r in rows] == ['2']
    for name in ('train_loss', 'train_pe_loss', 'eval_loss', 'lr'):
        assert float(rows[0][name]) == pytest.approx(float(expected[2][name]), rel=1e-5), name
    ours, theirs = load(tmp_path / 'run' / 'last.pth.tar'), load(folder / 'last.pth.tar')
    for part in ('state_dict', 'task_state'):
        a, b = (c[part] if part == 'state_dict' else c[part]['projection'] for c in (ours, theirs))
        for name in a:
            torch.testing.assert_close(a[name], b[name], msg=name)


def test_resume_into_the_same_folder_keeps_history_and_summary(small_run, tmp_path, capsys):
    run([*small_run, *PAIR])
    run([*small_run, *PAIR, '--epochs', '4', '--resume', str(tmp_path / 'run')])
    assert [r['epoch'] for r in summary(tmp_path / 'run')] == ['0', '1', '2', '3']
    assert len(load(tmp_path / 'run' / 'last.pth.tar')['saver']['checkpoint_files']) == 3  # and itself
    run([*small_run, *PAIR])
    assert [r['epoch'] for r in summary(tmp_path / 'run')] == ['0', '1']


def test_resume_says_that_it_keeps_the_learning_rate_of_the_checkpoint(finished, small_run, capsys):
    resumed = ['--epochs', '3', '--resume', str(finished[0] / 'checkpoint-1.pth.tar')]
    said = run([*small_run, *PAIR, *resumed, '--lr', '0.5'], capsys)
    assert '--resume continues with lr 0.02 of the checkpoint, not with 0.5' in said
    assert re.search(r'learning rate +0\.02 ', said)


def test_a_worse_student_never_replaces_the_best_one(small_run, tmp_path, capsys):
    run([*small_run, '--model', 'test_resnet', '--epochs', '4', '--lr', '0.05'])
    best = (tmp_path / 'run' / 'student.safetensors').read_bytes()
    again = ['--no-resume-opt', '--start-epoch', '1', '--resume', str(tmp_path / 'run'), '--lr', '3']
    run([*small_run, '--model', 'test_resnet', '--epochs', '4', *again])
    ranked = load(tmp_path / 'run' / 'last.pth.tar')['saver']
    assert float(summary(tmp_path / 'run')[-1]['eval_top1']) < ranked['best_metric']
    assert (tmp_path / 'run' / 'student.safetensors').read_bytes() == best


def test_no_resume_opt_goes_on_at_the_next_epoch_with_a_fresh_optimizer(finished, small_run, tmp_path, capsys):
    argv = ['--epochs', '4', '--resume', str(finished[0]), '--no-resume-opt', '--opt', 'adamw', '--lr', '1e-4']
    run([*small_run, *PAIR, *argv])
    assert [r['epoch'] for r in summary(tmp_path / 'run')] == ['3']


def test_resume_with_another_optimizer_is_refused(finished, small_run, capsys):
    error = refused([*small_run, *PAIR, '--epochs', '4', '--resume', str(finished[0]), '--opt', 'adamw'], capsys)
    assert 'was trained with --opt sgd, this run has --opt adamw' in error


def test_other_loss_terms_after_a_resume_start_a_new_summary(small_run, tmp_path, capsys):
    kd = ['--teacher-num-classes', '3', '--kd-loss-weight', '1']
    run([*small_run, *PAIR])
    said = run([*small_run, *PAIR, '--epochs', '3', '--resume', str(tmp_path / 'run'), *kd], capsys)
    assert 'have changed: its rows so far are in' in said
    assert [(r['epoch'], 'train_logit_loss' in r) for r in summary(tmp_path / 'run')] == [('2', True)]
    assert len(list((tmp_path / 'run').glob('summary.csv.until-*'))) == 1


def test_a_teacher_whose_run_has_learnt_the_classes_in_another_order_gives_no_logits(small_run, tmp_path, capsys):
    (tmp_path / 'order.txt').write_text('cat\nant\nbee\n')
    other = ['--class-map', str(tmp_path / 'order.txt')]
    run([*small_run, '--model', 'test_resnet', '--experiment', 'teacher', '--epochs', '1', *other])
    teacher = ['--teacher', 'test_resnet', '--teacher-checkpoint', str(tmp_path / 'teacher')]
    argv = [*small_run, '--model', 'test_vit', *teacher, '--epochs', '1']
    said = refused([*argv, '--kd-loss-weight', '1'], capsys)
    assert "the teacher has learnt other classes (class 'cat' 0 then, 2 now)" in said
    said = run(argv, capsys)  # features have no order of classes
    assert "has learnt other classes than those of the data (class 'cat' 0 then, 2 now), so its accuracy" in said
    assert 'Teacher: top-1' not in said
    assert 'Teacher: top-1' in run([*argv, '--kd-loss-weight', '1', *other], capsys)
    exported = f'local-dir:{tmp_path / "exported"}'
    export.main([str(tmp_path / 'teacher'), '--output', str(tmp_path / 'exported')])
    argv = [*small_run, '--model', 'test_vit', '--teacher', exported, '--epochs', '1']
    said = refused([*argv, '--kd-loss-weight', '1'], capsys)
    assert "the teacher has learnt other classes (class 'cat' 0 then, 2 now)" in said
    assert 'Teacher: top-1' in run([*argv, '--kd-loss-weight', '1', *other], capsys)
    config = tmp_path / 'exported' / 'config.json'
    text = config.read_text()
    # one that is known, in a list and by its label; none; two of one name
    others = ('["a domestic cat", "bee", "ant"]', '{"2": "ant", "1": "bee", "0": "cat"}')
    for names in (*others, '["lion", "wasp", "termite"]', '["cat", "bee", "bee"]'):
        config.write_text(re.sub(r'"label_names": \[.*?\]', f'"label_names": {names}', text, flags=re.DOTALL))
        said = run(argv, capsys)
        assert ('it has learnt other classes' in said) == (names in others)


def test_a_student_that_starts_with_the_classifier_of_other_classes_says_so(small_run, tmp_path, capsys):
    (tmp_path / 'order.txt').write_text('cat\nbee\nant\n')
    run(
        [
            *small_run,
            '--model',
            'test_resnet',
            '--experiment',
            'before',
            '--epochs',
            '1',
            '--class-map',
            str(tmp_path / 'order.txt'),
        ]
    )
    export.main([str(tmp_path / 'before'), '--output', str(tmp_path / 'exported')])
    shutil.copy(tmp_path / 'before' / 'student.safetensors', tmp_path / 'copy.safetensors')
    argv = [*small_run, '--epochs', '1', '--overwrite', '--model']
    before, exported = str(tmp_path / 'before'), f'local-dir:{tmp_path / "exported"}'
    warned = "its weights have learnt other classes (class 'cat' 0 then, 2 now), and the student keeps their classifier"
    for start in (
        ['test_resnet', '--pretrained-path', before],
        ['test_resnet', '--initial-checkpoint', before],
        [exported, '--pretrained'],
    ):
        said = run([*argv, *start], capsys)
        assert f'{start[1] if before in start else "--model"}: {warned}' in said
    for start in (
        [exported, '--pretrained', '--head-init-scale', '0'],
        ['test_resnet', '--pretrained-path', before, '--class-map', str(tmp_path / 'order.txt')],
        [exported],
        # what is loaded last counts
        [exported, '--pretrained', '--initial-checkpoint', str(tmp_path / 'copy.safetensors')],
    ):
        assert warned not in run([*argv, *start], capsys)


@pytest.mark.parametrize(
    ('flags', 'hints'),
    [
        (['--model', 'test_convnext'], True),
        (['--model', 'test_convnext', '--pe-projector', 'identity'], False),
        (['--model', 'test_resnet'], False),  # of another width
    ],
    ids=['equal widths', 'no projector', 'another width'],
)
def test_a_short_run_at_equal_widths_hints_at_no_projector(flags, hints, small_run, capsys):
    said = run([*small_run, *flags, '--teacher', 'test_vit', '--no-teacher-pretrained', '--epochs', '1'], capsys)
    assert ('Try --pe-projector identity too' in said) is hints


@pytest.mark.parametrize(
    ('flags', 'warning'),
    [
        ('--bce-loss', 'consider --bce-sum or'),
        ('--bce-loss --bce-sum', ''),
        ('--bce-loss --distill-loss-weight 1', ''),
        ('', ''),
        ('--pe-teacher-norm whiten', 'a batch of 8 images is too small for 64 channels of a teacher'),
    ],
)
def test_a_default_weight_beside_a_mean_over_classes_and_whitening_by_few_images_are_warned_about(
    flags, warning, small_run, capsys
):
    parts = ['--model', 'test_resnet', '--teacher', 'cifar_resnet8', '--no-teacher-pretrained']
    said = run([*small_run, *parts, *flags.split(), '--epochs', '1'], capsys)
    assert warning in said
    if not warning:
        assert 'beside a cross-entropy' not in said
        assert 'equally unlike' not in said


def test_a_teacher_from_a_run_folder_is_fed_as_it_was_trained(small_run, tmp_path, capsys):
    how = ['--mean', '0.3', '--std', '0.7', '--model-kwargs', 'drop_rate=0.1']
    run([*small_run, '--model', 'test_resnet', '--experiment', 'teacher', '--epochs', '1', *how])
    teacher = ['--model', 'test_vit', '--teacher', 'test_resnet', '--teacher-checkpoint', str(tmp_path / 'teacher')]
    said = run([*small_run, *teacher, '--epochs', '1'], capsys)
    assert re.search(r'mean +0\.5 0\.5 0\.5 +0\.3 0\.3 0\.3', said)
    said = run([*small_run, *teacher, '--epochs', '1', '--teacher-mean', '0.4'], capsys)
    assert re.search(r'std +0\.5 0\.5 0\.5 +0\.7 0\.7 0\.7', said)
    assert re.search(r'mean +0\.5 0\.5 0\.5 +0\.4 0\.4 0\.4', said)


def test_a_teacher_from_a_run_folder_is_normalized_by_the_tag_and_overlay_of_its_own_model(small_run, tmp_path, capsys):
    plain = ['--epochs', '1', '--experiment']
    run([*small_run, '--model', 'resnet18d.ra4_e3600_r224_in1k', *plain, 'tag'])
    overlay = ['--pretrained-cfg-overlay', 'mean=(0.1,0.2,0.3)', 'std=(0.4,0.5,0.6)']
    run([*small_run, '--model', 'test_resnet', *overlay, *plain, 'overlay'])
    student = ['--model', 'test_convnext', '--epochs', '1']

    def said(name, path, *more):
        return run([*small_run, *student, '--teacher', name, '--teacher-checkpoint', str(path), *more], capsys)

    # the weights that the bare name means had other statistics
    assert timm.get_pretrained_cfg('resnet18d').mean == (0.485, 0.456, 0.406)
    text = said('resnet18d', tmp_path / 'tag')
    assert re.search(r'mean +\S+ \S+ \S+ +0\.5 0\.5 0\.5', text)
    assert re.search(r'std +\S+ \S+ \S+ +0\.5 0\.5 0\.5', text)
    for path in (tmp_path / 'overlay', tmp_path / 'overlay' / 'last.pth.tar'):
        text = said('test_resnet', path)
        assert re.search(r'mean +\S+ \S+ \S+ +0\.1 0\.2 0\.3', text)
        assert re.search(r'std +\S+ \S+ \S+ +0\.4 0\.5 0\.6', text)
    text = said('test_resnet', tmp_path / 'overlay', '--teacher-mean', '0.7')
    assert re.search(r'mean +\S+ \S+ \S+ +0\.7 0\.7 0\.7', text)
    assert re.search(r'std +\S+ \S+ \S+ +0\.4 0\.5 0\.6', text)


def test_an_interrupted_run_says_how_it_goes_on(small_run, capsys, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, 'fit', interrupt)
    said, command = stopped([*small_run, *PAIR], capsys, code=130)
    assert said == 'train_distill: interrupted; to go on:'
    assert command.endswith('--resume auto --experiment run')


def test_an_evaluation_of_nothing_names_its_path_and_one_without_a_run_asks_for_data(tmp_path, capsys):
    assert "--evaluate: no file 'nowhere'" in refused(['--evaluate', 'nowhere'], capsys)
    timm_weights = timm.create_model('test_resnet', num_classes=3).state_dict()
    safetensors.torch.save_file(timm_weights, tmp_path / 'plain.safetensors')
    error = refused(['--evaluate', str(tmp_path / 'plain.safetensors'), '--model', 'test_resnet'], capsys)
    assert 'no data: give a folder, or --dataset NAME' in error


def test_flags_without_effect_are_named_once(small_run, capsys):
    said = run([*small_run, *PAIR, '--model-ema-decay', '0.9', '--clip-mode', 'agc'], capsys)
    warned = 'Without effect: --model-ema-decay without --model-ema, --clip-mode without --clip-grad.'
    assert said.count(warned) == 1
    assert 'Without effect' not in run([*small_run, *PAIR, '--experiment', 'other'], capsys)


def test_checkpointing_of_batch_norms_is_warned_about(small_run, capsys):
    warned = 'their batch norms count each batch twice'
    assert warned in run([*small_run, '--model', 'test_resnet', '--grad-checkpointing', '--epochs', '1'], capsys)
    more = ['--model', 'test_vit', '--grad-checkpointing', '--epochs', '1', '--experiment', 'vit']
    assert warned not in run([*small_run, *more], capsys)


def test_a_scripted_vit_trains_after_a_validation(small_run, tmp_path):
    run([*small_run, '--model', 'test_vit', '--torchscript'])
    assert len(summary(tmp_path / 'run')) == 2


def test_an_evaluation_takes_the_fast_norms_of_its_run(small_run, tmp_path, capsys):
    run([*small_run, '--model', 'test_vit', '--amp', '--amp-dtype', 'bfloat16', '--fast-norm', '--epochs', '1'])
    said = run(['--evaluate', str(tmp_path / 'run'), '--device', 'cpu', '-j', '0'], capsys)
    assert 'fast_norm True' in said


def test_without_a_schedule_no_warmup_is_warned_about(small_run, capsys):
    said = run([*small_run, *PAIR, '--warmup-epochs', '6', '--sched', 'none', '--epochs', '1'], capsys)
    assert 'epochs are warmup' not in said
    assert 'Without effect: --warmup-epochs with --sched none.' in said


def test_warmup_longer_than_the_run_is_warned_about(small_run, capsys):
    said = run([*small_run, *PAIR, '--warmup-epochs', '5', '--epochs', '2'], capsys)
    assert 'All 2 epochs are warmup (--warmup-epochs 5): the learning rate never reaches 0.02' in said
    assert re.search(r'epochs +2 of 4 batches, warmup 5', said)


@pytest.mark.parametrize(('warmup', 'is_said'), [('2', True), ('1', False)])
def test_warmup_that_is_half_of_the_run_is_warned_about(warmup, is_said, small_run, capsys):
    said = run([*small_run, *PAIR, '--warmup-epochs', warmup, '--epochs', '3'], capsys)
    warning = f'{warmup} of 3 epochs are warmup (--warmup-epochs): few are left for a learning rate of 0.02. Lower --warmup-epochs.'
    assert (warning in said) == is_said


@pytest.mark.parametrize(
    'more', [[], ['--sched-on-updates'], ['--sched', 'none'], ['--warmup-epochs', '0']], ids=' '.join
)
def test_a_first_epoch_at_the_warmup_rate_is_said_at_the_start(more, small_run, tmp_path, capsys):
    said = run([*small_run, '--model', 'test_resnet', '--warmup-epochs', '1', '--warmup-lr', '2e-5', *more], capsys)
    rows = summary(tmp_path / 'run')
    whole = not more
    assert (float(rows[0]['lr']) == 2e-5) == whole
    phrase = (
        r'epochs +2 of 4 batches, warmup 1 \(all of epoch 0 at lr 2e-05: --sched-on-updates warms up batch by batch\)'
    )
    assert len(re.findall(phrase, said)) == whole
    if whole:
        said = run(
            [
                *small_run,
                '--model',
                'test_resnet',
                '--warmup-epochs',
                '1',
                '--epochs',
                '3',
                '--resume',
                str(tmp_path / 'run'),
            ],
            capsys,
        )
        assert 'all of epoch 0' not in said


WEIGHTS = {
    'class weights': (['--loss', 'bce', '--loss-class-weight', '1,2'], '--loss-class-weight has 2 values'),
    'positive weights': (['--loss', 'bce', '--loss-pos-weight', '1,2,3,4'], '--loss-pos-weight has 4 values'),
    'cross-entropy': (['--loss-class-weight', '1 2 3 4 5'], '--loss-class-weight has 5 values'),
    'a file': (['--loss', 'bce', '--loss-class-weight', 'FILE.txt'], '--loss-class-weight has 2 values'),
    'counts': (
        ['--loss', 'bce', '--loss-class-weight', 'inv_freq', '--class-stats', 'FILE.json'],
        '--class-stats has 2 values',
    ),
}


@pytest.mark.parametrize('known', [True, False], ids=['classes given', "the model's own"])
@pytest.mark.parametrize('name', WEIGHTS)
def test_loss_weights_of_another_number_of_classes_are_refused_with_both_numbers(
    name, known, image_folder, tmp_path, capsys, monkeypatch
):
    (tmp_path / 'FILE.txt').write_text('0.5\n2')
    (tmp_path / 'FILE.json').write_text('{"pos_counts": [3, 4], "num_samples": 7}')
    flags, said = WEIGHTS[name]
    flags = [flag.replace('FILE', str(tmp_path / 'FILE')) for flag in flags]
    if known:
        monkeypatch.setattr(build, 'create_student', None)  # refused before
    classes = ['--num-classes', '3'] if known else ['--model-kwargs', 'num_classes=3']
    run_of = ['-b', '8', '-j', '0', '--device', 'cpu', '--img-size', '32', '--model', 'test_resnet']
    error = refused([str(image_folder), *run_of, *classes, *flags, '--output', str(tmp_path / 'out')], capsys)
    assert f'{said}, the student has 3 classes' in error
    assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize('flag', ['--loss-class-weight', '--loss-pos-weight', '--class-stats'])
def test_a_missing_file_of_loss_weights_is_named_as_missing(flag, small_run, capsys):
    more = ['--loss-class-weight', 'inv_freq'] if flag == '--class-stats' else []
    error = refused([*small_run, '--model', 'test_resnet', '--loss', 'bce', *more, flag, 'gone/weights.json'], capsys)
    assert f"{flag}: no file 'gone/weights.json'" in error


def test_one_loss_weight_and_one_a_class_train(small_run, tmp_path):
    for i, weights in enumerate((['--loss-pos-weight', '2'], ['--loss-class-weight', '1,2,3'])):
        run([*small_run, '--model', 'test_resnet', '--loss', 'bce', *weights, '--epochs', '1', '--experiment', str(i)])
        assert summary(tmp_path / str(i))


def test_a_student_from_a_run_of_another_normalization_says_so(small_run, tmp_path, capsys):
    student = ['--model', 'test_resnet', '--epochs', '1', '--output', str(tmp_path)]
    run([*small_run, *student, '--experiment', 'first', '--mean', '0.1', '0.2', '0.3'])
    more = [*small_run, *student, '--experiment', 'second', '--pretrained-path', str(tmp_path / 'first')]
    capsys.readouterr()
    assert "first' was trained with --mean 0.1 0.2 0.3, this run has" in run(more, capsys)
    assert 'was trained with' not in run([*more, '--mean', '0.1', '0.2', '0.3'], capsys)


def test_an_evaluation_with_tta_says_that_its_numbers_mean_nothing(finished, capsys):
    folder, _, _ = finished
    assert 'the metrics mean nothing' in run(['--evaluate', str(folder), '--tta', '2', '--device', 'cpu'], capsys)


def test_pretrained_path_fetches_nothing_and_says_so_of_nothing(small_run, tmp_path, capsys):
    torch.save(timm.create_model('test_resnet', num_classes=10).state_dict(), tmp_path / 'ten.pth')
    argv = [*small_run, '--model', 'test_resnet', '--epochs', '1']
    said = run([*argv, '--pretrained-path', str(tmp_path / 'ten.pth')], capsys)
    assert 'Hugging Face' not in said
    said = run(
        [*argv, '--pretrained', '--pretrained-cfg-overlay', f'file={tmp_path / "ten.pth"}', 'num_classes=-1'], capsys
    )
    assert 'Hugging Face' not in said
    with pytest.raises(SystemExit):
        run([*argv, '--pretrained'], capsys)
    assert 'Hugging Face hub' in capsys.readouterr().err


def test_pretrained_path_fills_a_model_of_a_folder_from_the_file(small_run, tmp_path, capsys):
    from timm.models._hub import save_for_hf

    save_for_hf(timm.create_model('test_resnet', num_classes=3), str(tmp_path / 'model'))
    other = timm.create_model('test_resnet', num_classes=10)
    torch.save(other.state_dict(), tmp_path / 'ten.pth')
    argv = ['--model', f'local-dir:{tmp_path / "model"}', '--pretrained-path', str(tmp_path / 'ten.pth')]
    run([*small_run, *argv, '--epochs', '1', '--lr', '0'])
    saved = load(tmp_path / 'run' / 'last.pth.tar')['state_dict']
    assert torch.equal(saved['conv1.0.weight'], other.state_dict()['conv1.0.weight'])


def test_pretrained_path_takes_a_classifier_of_the_students_size(small_run, tmp_path, capsys):
    torch.manual_seed(7)
    for number in (3, 10):
        torch.save(timm.create_model('test_resnet', num_classes=number).state_dict(), tmp_path / f'{number}.pth')
        argv = [
            '--model',
            'test_resnet',
            '--pretrained-path',
            str(tmp_path / f'{number}.pth'),
            '--experiment',
            str(number),
        ]
        said = run([*small_run, *argv, '--epochs', '1', '--lr', '0', '--weight-decay', '0'], capsys)
        assert 'converted or random' not in said
        saved = load(tmp_path / str(number) / 'last.pth.tar')['state_dict']
        given = torch.load(tmp_path / f'{number}.pth')
        assert torch.equal(saved['conv1.0.weight'], given['conv1.0.weight'])
        assert torch.equal(saved['fc.weight'], given['fc.weight']) == (number == 3)


def test_pretrained_path_does_not_say_how_many_classes_there_are(tmp_path):
    for number, expected in ((10, False), (1000, True)):
        weights = timm.create_model('test_resnet', num_classes=number).state_dict()
        torch.save(weights, tmp_path / 'w.pth')
        student = create_student(
            parse_config(['data', '--model', 'test_resnet', '--pretrained-path', str(tmp_path / 'w.pth')])
        )
        assert student.num_classes == 1000
        assert torch.equal(student.fc.weight[:10], weights['fc.weight'][:10]) == expected


def test_pretrained_path_of_another_architecture_is_refused_or_says_what_stays_random(small_run, tmp_path, capsys):
    for number in (3, 10):
        torch.save(timm.create_model('cifar_resnet8', num_classes=number).state_dict(), tmp_path / f'{number}.pth')
    argv = [*small_run, '--model', 'cifar_resnet20', '--epochs', '1', '--pretrained-path']
    assert '3.pth' in refused([*argv, str(tmp_path / '3.pth')], capsys)
    said = run([*argv, str(tmp_path / '10.pth')], capsys)  # timm leaves out the classifier, and is not strict then
    assert re.search(r"--pretrained-path: \d+ of the student's \d+ weights are not those of .*10.pth', but", said)


def test_a_teacher_is_built_as_its_run_was(image_folder, small_run, tmp_path):
    shape = ['--bn-eps', '0.5', '--input-size', '1', '32', '32']
    run([*small_run, '--model', 'test_efficientnet', *shape, '--epochs', '1', '--experiment', 'teacher'])
    teacher = ['--teacher', 'test_efficientnet', '--teacher-checkpoint', str(tmp_path / 'teacher')]
    kwargs = teacher_settings(*teachers_of(parse_config([str(image_folder), *teacher]))).kwargs
    assert (kwargs['bn_eps'], kwargs['in_chans']) == (0.5, 1)
    run([*small_run, '--model', 'test_resnet', *teacher, '--epochs', '1', '--experiment', 'student'])


@pytest.mark.parametrize('flags', [['--pe-projector', 'linear_bn'], ['--pe-teacher-norm', 'batch']])
def test_a_batch_of_one_is_refused_where_something_normalizes_over_it(flags, small_run, tmp_path, capsys):
    argv = [
        *small_run,
        '--model',
        'test_resnet',
        '--teacher',
        'test_resnet',
        '--no-teacher-pretrained',
        '-b',
        '1',
        *flags,
    ]
    assert 'a batch of 1 has no spread' in refused(argv, capsys)
    assert not (tmp_path / 'run').exists()


def test_an_initial_checkpoint_of_other_classes_is_refused_with_the_flag_that_takes_it(small_run, tmp_path, capsys):
    torch.save(timm.create_model('test_resnet', num_classes=10).state_dict(), tmp_path / 'ten.pth')
    argv = [*small_run, '--model', 'test_resnet', '--epochs', '1']
    error = refused([*argv, '--initial-checkpoint', str(tmp_path / 'ten.pth')], capsys)
    assert 'fc.weight [10, 96] for [3, 96]' in error
    assert '10 classes' in error
    assert '--pretrained-path takes all but its classifier' in error
    torch.save(timm.create_model('test_vit', num_classes=10).state_dict(), tmp_path / 'vit.pth')
    error = refused([*argv, '--initial-checkpoint', str(tmp_path / 'vit.pth')], capsys)
    assert 'missing keys' in error
    assert 'classes' not in error  # which it would not know of another architecture


def test_lookahead_is_synchronized_before_validation(small_run, tmp_path):
    run([*small_run, *PAIR, '--opt', 'lookahead_momentum', '--epochs', '1'])
    checkpoint = load(tmp_path / 'run' / 'last.pth.tar')
    slow = [s['lookahead_slow_buff'] for s in checkpoint['optimizer']['state'].values() if 'lookahead_slow_buff' in s]
    weights = list(checkpoint['state_dict'].values())
    assert slow
    assert all(any(s.shape == w.shape and torch.equal(s, w) for w in weights) for s in slow[:5])


def test_resume_of_a_run_without_projectors_needs_no_resume_opt(small_run, tmp_path, capsys):
    plain = [*small_run, '--model', 'test_resnet']
    run([*plain, '--experiment', 'plain'])
    assert 'add --no-resume-opt' in refused([*small_run, *PAIR, '--resume', str(tmp_path / 'plain')], capsys)
    anew = ['--no-resume-opt', '--start-epoch', '0']
    said = run([*small_run, *PAIR, '--resume', str(tmp_path / 'plain'), *anew], capsys)
    assert 'holds no projectors: they start new' in said
    assert [r['epoch'] for r in summary(tmp_path / 'run')] == ['0', '1']


def test_the_average_is_what_is_evaluated_and_saved(small_run, tmp_path):
    run([*small_run, *PAIR, '--model-ema', '--model-ema-decay', '0.5'])
    checkpoint = load(tmp_path / 'run' / 'model_best.pth.tar')
    student = safetensors.torch.load_file(tmp_path / 'run' / 'student.safetensors')
    assert all(torch.equal(v, checkpoint['state_dict_ema'][k]) for k, v in student.items())
    assert not torch.equal(student['fc.weight'], checkpoint['state_dict']['fc.weight'])
    assert set(checkpoint['task_state_ema']['projection']) == {'projectors.fc.weight', 'projectors.fc.bias'}


def test_a_teacher_that_knows_the_classes_is_validated_first_and_warned_about_at_chance(small_run, tmp_path, capsys):
    run([*small_run, '--model', 'test_resnet', '--experiment', 'teacher', '--epochs', '8', '--lr', '0.05'])
    best = max(float(r['eval_top1']) for r in summary(tmp_path / 'teacher'))
    teacher = ['--model', 'test_vit', '--teacher', 'test_resnet', '--teacher-checkpoint', str(tmp_path / 'teacher')]
    said = run([*small_run, *teacher, '--epochs', '1', '--kd-loss-weight', '0.5'], capsys)
    assert f'Teacher: top-1 {best:.3f} %' in said
    assert said.index('Teacher: top-1') < said.index('Epoch 1/1')
    assert 'train_logit_loss' in summary(tmp_path / 'run')[0]
    zero = {k: torch.zeros_like(v) for k, v in timm.create_model('test_resnet', num_classes=3).state_dict().items()}
    torch.save(zero, tmp_path / 'zero.pth')
    said = run([*small_run, *teacher[:4], '--teacher-checkpoint', str(tmp_path / 'zero.pth'), '--epochs', '1'], capsys)
    assert 'THE TEACHER IS AT CHANCE LEVEL (top-1 33.33 % of 3 classes)' in said
    said = run([*small_run, *teacher, '--epochs', '1', '--no-teacher-eval'], capsys)
    assert 'Teacher: top-1' not in said


FLAGS = {
    'amp bfloat16': ['--amp', '--amp-dtype', 'bfloat16'],
    'channels last': ['--channels-last'],
    'compile': ['--torchcompile', 'aot_eager'],
    'compile and average': ['--torchcompile', 'aot_eager', '--model-ema'],
    'accumulation with a remainder': ['--grad-accum-steps', '3'],
    'clip norm': ['--clip-grad', '1.0'],
    'clip agc': ['--clip-grad', '0.02', '--clip-mode', 'agc'],
    'layer decay': ['--opt', 'adamw', '--layer-decay', '0.7'],
    'mixup and cutmix': ['--mixup', '0.5', '--cutmix', '0.5', '--bce-loss'],
    'no prefetcher': ['--no-prefetcher', '--mixup', '0.5'],
    'schedule on updates': ['--sched-on-updates', '--warmup-epochs', '1'],
    'workers and erasing': ['-j', '1', '--reprob', '0.5', '--recount', '2'],
    'grad checkpointing': ['--grad-checkpointing'],
    'mlp projector and mse': ['--pe-projector', 'mlp', '--pe-loss', 'mse', '--pe-act', 'relu'],
    'bfloat16 parameters': ['--model-dtype', 'bfloat16'],
    'bfloat16 orthogonal projectors': ['--model-dtype', 'bfloat16', '--pe-projector', 'orthogonal'],
    'float16 orthogonal projectors': ['--model-dtype', 'float16', '--pe-projector', 'orthogonal', '--opt-eps', '1e-4'],
    'validation every second epoch': ['--val-interval', '2'],
    'average on the cpu': ['--model-ema', '--model-ema-force-cpu', '--model-ema-warmup'],
    'head init and dropout': ['--head-init-scale', '0.1', '--head-init-bias', '-2', '--drop', '0.2'],
    'lamb': ['--opt', 'lamb', '--lr', '0.005'],
}


@pytest.mark.parametrize('name', FLAGS)
def test_training_options_work_with_a_teacher(name, small_run, tmp_path):
    run([*small_run, *PAIR, *FLAGS[name]])
    rows = summary(tmp_path / 'run')
    assert len(rows) == 2
    assert all(0 < float(r['train_loss']) < 100 for r in rows)
    assert rows[1]['eval_top1']
    assert (rows[0]['eval_top1'] == '') == (name == 'validation every second epoch')


TEACHER_FLAGS = {
    'own input size': (['--teacher-input-size', '48'], r'input +3x32x32 +3x48x48 \(bicubic\)'),
    'bfloat16': (['--teacher-dtype', 'bfloat16', '--channels-last'], r'precision +float32 +bfloat16'),
    'the student alone in bfloat16': (['--model-dtype', 'bfloat16'], r'precision +bfloat16 +float32'),
    'under AMP': (['--amp', '--amp-dtype', 'bfloat16'], r'precision +AMP bfloat16 +AMP bfloat16'),
    'classes': (['--teacher-num-classes', '9'], r'classes +3 +9'),
    'no classifier': (['--teacher-num-classes', '0'], r'classes +3 +0'),
    'arguments': (['--teacher-kwargs', 'depth=2'], r'parameters +0\.37 M +0\.20 M'),
    'grey': (['--teacher-kwargs', 'in_chans=1'], r'input +3x32x32 +1x32x32'),
    'taps': (['--student-tap', 'layer4', '--teacher-tap', 'norm'], r'feature width +192 +64'),
    'normalization of the loader': (['--mean', '0.3', '--std', '0.4'], r'mean +0\.3 0\.3 0\.3 +0\.5 0\.5 0\.5'),
}


@pytest.mark.parametrize('name', TEACHER_FLAGS)
def test_flags_of_the_teacher_have_their_effect(name, small_run, tmp_path, capsys):
    flags, expected = TEACHER_FLAGS[name]
    said = run([*small_run, *PAIR, *flags, '--epochs', '1'], capsys)
    assert re.search(expected, said)
    assert len(summary(tmp_path / 'run')) == 1


def test_plain_or_average_weights_of_a_teacher_checkpoint_are_chosen_by_flag(small_run, tmp_path, capsys):
    state = timm.create_model('test_resnet', num_classes=3).state_dict()
    zero = {k: torch.zeros_like(v) for k, v in state.items()}
    run([*small_run, '--model', 'test_resnet', '--epochs', '8', '--lr', '0.05', '--experiment', 'teacher'])
    good = load(tmp_path / 'teacher' / 'model_best.pth.tar')['state_dict']
    torch.save({'state_dict': zero, 'state_dict_ema': good}, tmp_path / 'w.pth')
    argv = [
        *small_run,
        '--model',
        'test_vit',
        '--teacher',
        'test_resnet',
        '--teacher-checkpoint',
        str(tmp_path / 'w.pth'),
    ]
    assert 'CHANCE LEVEL' not in run([*argv, '--epochs', '1'], capsys)
    assert 'CHANCE LEVEL' in run([*argv, '--epochs', '1', '--no-teacher-ema'], capsys)


def test_two_runs_of_a_command_are_equal_bit_for_bit_with_any_number_of_workers(small_run, tmp_path):
    for name, workers in (('a', '0'), ('b', '2')):
        more = ['--mixup', '0.5', '--reprob', '0.5', '--drop', '0.1', '-j', workers, '--experiment', name]
        run([*small_run, *PAIR, *more])
    a, b = (load(tmp_path / name / 'last.pth.tar')['state_dict'] for name in 'ab')
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_the_student_starts_the_same_with_and_without_a_teacher(small_run, tmp_path):
    still = ['--lr', '0', '--epochs', '1']
    run([*small_run, '--model', 'test_vit', *still, '--experiment', 'alone'])
    run([*small_run, '--model', 'test_vit', *PAIR[2:], *still])
    a, b = (load(tmp_path / name / 'last.pth.tar')['state_dict'] for name in ('alone', 'run'))
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_device_cuda_falls_back_to_the_cpu_and_says_so(small_run, tmp_path, capsys):
    if torch.cuda.is_available():
        pytest.skip('a CUDA device is here')
    said = run([*small_run, *PAIR, '--device', 'cuda', '--epochs', '1'], capsys)
    assert "No CUDA device here: '--device cuda', here and in timm the default, falls back to the CPU" in said
    assert 'cpu, world size 1' in said


@pytest.mark.parametrize(
    ('more', 'message'),
    [
        (['--model', 'resnet18x'], "--model: unknown model 'resnet18x', did you mean resnet18"),
        (['--teacher', 'resnt34'], "--teacher: unknown model 'resnt34', did you mean resnet34"),
        (['--teacher-checkpoint', '/no/file.pth'], "--teacher-checkpoint: no file '/no/file.pth'"),
        (['--teacher', 'resnet18', '--teacher-pretrained'], 'no pretrained weights for'),
        (['--num-classes', '7'], '3 classes and the student 7: --num-classes 3 fits'),
        (['--kd-loss-weight', '1'], 'the student has 3 and the teacher 1000'),
        (['--pe-projector', 'identity', '--pe-projectors', '1'], 'the student has 96 and the teacher 64'),
        (['--data-dir', '/no/such/folder'], "no data folder '/no/such/folder'"),
        (['--train-crop-mode', 'rkrc', '--aa', 'nonsense'], 'training augmentation: '),
        (['-b', '64'], 'are fewer than one batch of 64'),
        (['--resume', '/no/last.pth.tar'], "--resume: no file '/no/last.pth.tar'"),
        (['--model-kwargs', 'depht=3'], 'depht'),
        (['--opt-kwargs', 'nosuch=3'], "cannot make optimizer 'sgd'"),
        (['--gp', 'nosuch'], 'nosuch'),
        (['--gp', ''], '--gp must name a pooling'),
        (['--scale', '0.5'], '--scale takes 2 values'),
        (['--lr', 'nan'], '--lr must be a finite number'),
        (['--crop-pct', '-1'], '--crop-pct must be above 0'),
        (['--interpolation', 'nonsense'], "--interpolation must be one of 'nearest'"),
        (['--lr-base-size', '0'], '--lr-base-size must be 1 or more'),
        (['--sched', 'step', '--decay-epochs', '0'], '--decay-epochs must be above 0'),
        (['--opt', 'adan', '--opt-betas', '0.9'], "cannot make optimizer 'adan'"),
        (['--torchcompile', 'nonsense'], "--torchcompile: unknown backend 'nonsense'"),
        (['--model-kwargs', 'in_chans=4'], 'the student has 4 input channels'),
        (['--seed', '4294967296'], '--seed must be under'),
        (['--teacher', 'vit_tiny_patch16_224', '--teacher-input-size', '50'], 'cannot take its input size 50'),
        (['--dataset', 'sklearn/digit'], 'did you mean sklearn/digits'),
        (['--dataset', 'torh/cifar10'], "unknown data set 'torh/cifar10'"),
        (['--start-epoch', '5'], 'nothing to train'),
        (['--device', 'nosuch'], "cannot use 'nosuch'"),
        (['--sched', 'wsd', '--decay-epochs', '9'], 'wsd schedule requires'),
        (['--dataset', 'torch/nosuch'], "cannot open data set 'torch/nosuch'"),
    ],
)
def test_bad_input_is_one_line_before_anything_is_written(more, message, small_run, tmp_path, capsys):
    assert message in refused([*small_run, *PAIR, *more], capsys)
    assert not (tmp_path / 'run').exists()


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_checkpoint(small_run, tmp_path, capsys):
    run([*small_run, *PAIR, '--epochs', '1'])
    good = (tmp_path / 'run' / 'last.pth.tar').read_bytes()
    error = refused(
        [*small_run, *PAIR, '--resume', str(tmp_path / 'run'), '--no-resume-opt', '--start-epoch', '1', '--lr', '1e30'],
        capsys,
        code=1,
    )
    assert re.search(r'(task_loss|pe_loss).* not finite at batch \d of the epoch', error)
    assert (tmp_path / 'run' / 'last.pth.tar').read_bytes() == good


def test_the_command_line_prints_one_line_and_no_traceback_for_a_mistake(image_folder):
    argv = [sys.executable, str(ROOT / 'train_distill.py'), str(image_folder), '--teacher', 'resnt34']
    out = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=120)
    assert out.returncode == 2
    assert out.stderr.count('\n') == 1
    assert out.stderr.startswith("train_distill: error: --teacher: unknown model 'resnt34', did you mean")
    assert out.stdout == ''


def test_the_help_names_every_group():
    out = subprocess.run(
        [sys.executable, str(ROOT / 'train_distill.py'), '--help'],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
        env={**os.environ, 'COLUMNS': '120'},
    )
    assert '--pe-projectors' in out.stdout
    assert 'teacher and projector ensemble' in out.stdout
    for group in GROUPS:
        assert f'\n{group.__doc__.splitlines()[0].removesuffix(".")}:\n' in out.stdout


def test_fine_tuning_a_saved_model_gives_it_the_classes_and_pooling_of_the_flags(small_run, tmp_path):
    torch.manual_seed(0)
    folder = tmp_path / 'saved'
    saved = timm.create_model('test_resnet', num_classes=7)
    timm.models.save_for_hf(saved, folder, safe_serialization=True)
    run([*small_run, '--model', f'local-dir:{folder}', '--pretrained', '--gp', 'max', '--epochs', '1', '--lr', '1e-9'])
    state = load(tmp_path / 'run' / 'last.pth.tar')['state_dict']
    assert state['fc.weight'].shape[0] == 3
    torch.testing.assert_close(state['conv1.0.weight'], saved.state_dict()['conv1.0.weight'], atol=1e-5, rtol=0)


def test_neutral_flags_change_nothing_that_is_learnt(small_run, image_folder, tmp_path):
    """Those that the machine allows, all at once."""
    neutral = '--log-interval 1 --recovery-interval 1 --save-epochs 1 --save-images --checkpoint-hist 1 --log-tb -j 1'
    neutral += (
        f' --no-persistent-workers --no-pin-mem --use-multi-epochs-loader --eval-metric loss --knn-data {image_folder}'
    )
    flags = neutral.split()
    given, plain = (parse_config([*small_run, *PAIR, *more]).as_dict() for more in (flags, []))
    other = {name for name in given if given[name] != plain[name]}
    assert other <= neutral_in(RunConfig)
    assert len(other) >= 10
    students = []
    for name, more in (('plain', []), ('neutral', flags)):
        run([*small_run, *PAIR, '--epochs', '2', '--output', str(tmp_path), '--experiment', name, *more])
        students.append(torch.load(tmp_path / name / 'last.pth.tar', weights_only=False)['state_dict'])
    assert all(torch.equal(students[0][k], students[1][k]) for k in students[0] | students[1])
