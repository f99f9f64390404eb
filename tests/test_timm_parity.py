"""The training script without our teacher is timm's: behaviours of timm's flags, on files, schedules and batches."""

import json
import sys

import pytest
import timm
import torch
from helpers import load, refused, run, summary
from timm.data import create_dataset, create_loader
from timm.loss import LOSS_TYPES
from timm.optim import create_optimizer_v2
from timm.task import ClassificationTask, DistillationTeacher

from timm_pe import ProjectorEnsembleTask
from timm_pe.config import flags as declared
from timm_pe.data.draws import derive_seed
from timm_pe.method.weight_files import read_state_dict

RESNET = ['--model', 'test_resnet']
PAIR = [*RESNET, '--teacher', 'test_vit', '--no-teacher-pretrained']


def test_the_task_losses_are_those_of_timm():
    assert tuple(LOSS_TYPES) == declared.LOSS_TYPES


def test_without_a_teacher_the_losses_are_those_of_a_plain_loop_over_timms_task_and_loader(
    image_folder, small_run, tmp_path
):
    run([*small_run, *RESNET, '--no-aug', '--seed', '5', '--sched', 'none', '--opt', 'momentum'])
    ours = [float(r['train_loss']) for r in summary(tmp_path / 'run')]

    torch.manual_seed(5)
    model = timm.create_model('test_resnet', num_classes=3)
    dataset = create_dataset('', str(image_folder), split='train')
    config = timm.data.resolve_data_config({'img_size': 32}, model=model)
    loader = create_loader(
        dataset,
        (3, 32, 32),
        8,
        is_training=True,
        no_aug=True,
        interpolation=config['interpolation'],
        mean=config['mean'],
        std=config['std'],
        num_workers=0,
        device=torch.device('cpu'),
    )
    task = ClassificationTask(model, criterion_kwargs={'smoothing': 0.1}, verbose=False).train()
    optimizer = create_optimizer_v2(model, 'momentum', lr=0.02, weight_decay=2e-5)
    plain = []
    loader.loader.sampler.generator = torch.Generator()
    for epoch in range(2):
        loader.loader.sampler.generator.manual_seed(derive_seed(5, epoch))  # the order of images, the one seeded draw
        losses = []
        for input, target in loader:
            loss = task(input, target)['loss']
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        task.eval()
        task.train()
        plain.append(sum(losses) / len(losses))
    assert ours == pytest.approx(plain, rel=1e-5)


def test_accumulation_2x8_equals_1x16_through_the_script(small_run, tmp_path):
    vit = ['--model', 'test_vit', '--teacher', 'test_resnet', '--no-teacher-pretrained']
    for name, how in (('two', ['-b', '8', '--grad-accum-steps', '2']), ('one', ['-b', '16'])):
        run([*small_run, *vit, *how, '--experiment', name])
    two, one = (load(tmp_path / n / 'last.pth.tar') for n in ('two', 'one'))
    for a, b in (
        (one['state_dict'], two['state_dict']),
        (one['task_state']['projection'], two['task_state']['projection']),
    ):
        for name in a:
            torch.testing.assert_close(a[name], b[name], rtol=1e-3, atol=1e-5, msg=name)


@pytest.fixture(scope='module')
def local_teacher(tmp_path_factory):
    """A teacher that timm's own tasks, which want pretrained weights, can load here."""
    folder = tmp_path_factory.mktemp('teacher')
    torch.manual_seed(0)
    timm.models.save_for_hf(timm.create_model('test_resnet', num_classes=3), folder, safe_serialization=True)
    return f'local-dir:{folder}'


def test_timms_own_distillation_takes_a_teacher_of_the_zoo(small_run, tmp_path):
    folder = tmp_path / 'teacher'
    timm.models.save_for_hf(timm.create_model('cifar_resnet8', num_classes=3), folder, safe_serialization=True)
    argv = ['--kd-model-name', f'local-dir:{folder}', '--kd-distill-type', 'feature', '--model', 'cifar_resnet8']
    run([*small_run, *argv, '--epochs', '1'])
    assert float(summary(tmp_path / 'run')[0]['train_kd_loss']) > 0


@pytest.mark.parametrize('kind', ['logit', 'feature', 'token'])
def test_kd_model_name_runs_timms_own_tasks(kind, small_run, tmp_path, local_teacher, capsys):
    student = ['--model', 'test_vit'] if kind != 'token' else ['--model', 'deit_tiny_distilled_patch16_224']
    argv = ['--kd-model-name', local_teacher, '--kd-distill-type', kind, '--distill-loss-weight', '2', '--epochs', '1']
    run([*small_run, *student, *argv])
    row = summary(tmp_path / 'run')[0]
    terms = float(row['train_task_loss']) + 2 * float(
        row['train_kd_loss'] if 'train_kd_loss' in row else row['train_distill_loss']
    )
    assert float(row['train_loss']) == pytest.approx(terms, rel=1e-4)


@pytest.mark.parametrize('kind', ['logit', 'feature'])
def test_the_teacher_of_timms_own_tasks_sees_the_images_in_its_own_normalization(
    kind, small_run, local_teacher, monkeypatch
):
    seen = {}
    original = DistillationTeacher.normalize_input

    def normalize_input(self, input, *student):
        own = original(self, input, *student)
        seen.setdefault('pixels', input * 0.3 + torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1))
        seen.setdefault('back', own * self.std_kd + self.mean_kd)
        return own

    monkeypatch.setattr(DistillationTeacher, 'normalize_input', normalize_input)
    argv = ['--model', 'test_vit', '--kd-model-name', local_teacher, '--kd-distill-type', kind, '--epochs', '1']
    run([*small_run, *argv, '--mean', '0.1', '0.2', '0.3', '--std', '0.3', '0.3', '0.3'])
    torch.testing.assert_close(seen['back'], seen['pixels'], rtol=1e-4, atol=1e-5)


def test_stop_epoch_stops_without_changing_the_schedule(small_run, tmp_path, capsys):
    run([*small_run, *RESNET, '--epochs', '4'])
    full = summary(tmp_path / 'run')
    run([*small_run, *RESNET, '--epochs', '4', '--stop-epoch', '2', '--experiment', 'stopped'])
    stopped = summary(tmp_path / 'stopped')
    assert [(r['epoch'], r['lr']) for r in stopped] == [(r['epoch'], r['lr']) for r in full[:2]]
    assert '--stop-epoch must be from 1 to the 4 epochs' in refused(
        [*small_run, *RESNET, '--epochs', '4', '--stop-epoch', '5'], capsys
    )


def test_save_epochs_keeps_milestones_and_validates_there(small_run, tmp_path, capsys):
    run([*small_run, *RESNET, '--epochs', '4', '--val-interval', '4', '--save-epochs', '2', '--checkpoint-hist', '1'])
    assert load(tmp_path / 'run' / 'milestone-2.pth.tar')['epoch'] == 1
    assert [bool(r['eval_top1']) for r in summary(tmp_path / 'run')] == [False, True, False, True]
    assert len(list((tmp_path / 'run').glob('checkpoint-*'))) == 1


def test_resume_auto_starts_continues_and_ends(small_run, tmp_path, capsys):
    argv = [*small_run, *PAIR, '--resume', 'auto', '--epochs', '4']
    said = run([*argv, '--stop-epoch', '2'], capsys)
    assert 'no checkpoint in' in said
    run(argv)
    assert [r['epoch'] for r in summary(tmp_path / 'run')] == ['0', '1', '2', '3']
    files = {p.name: p.stat().st_mtime_ns for p in (tmp_path / 'run').iterdir()}
    said = run(argv, capsys)
    assert 'the run is finished after 4 epochs' in said
    assert {p.name: p.stat().st_mtime_ns for p in (tmp_path / 'run').iterdir()} == files
    straight = [*small_run, *PAIR, '--epochs', '4', '--experiment', 'straight']
    run(straight)
    a, b = (load(tmp_path / n / 'last.pth.tar')['state_dict'] for n in ('run', 'straight'))
    assert all(torch.equal(a[k], b[k]) for k in a)
    no_experiment = argv.index('--experiment')
    assert '--resume auto needs --experiment' in refused(argv[:no_experiment] + argv[no_experiment + 2 :], capsys)


def test_resume_auto_passes_over_a_broken_file_and_takes_the_checkpoint_before(small_run, tmp_path, capsys):
    argv = [*small_run, *PAIR, '--resume', 'auto', '--epochs', '3']
    run([*argv, '--stop-epoch', '2'])
    (tmp_path / 'run' / 'last.pth.tar').write_bytes(b'half a file')
    said = run(argv, capsys)
    assert 'trying the one before' in said
    rows = [r['epoch'] for r in summary(tmp_path / 'run')]
    assert rows == ['0', '1', '2']


def test_training_sizes_vary_by_batch_and_the_teacher_follows(small_run, tmp_path):
    sizes = ['--train-img-sizes', '32', '48', '--train-batch-sizes', '8', '4', '--variable-batch-loss-scale', 'linear']
    run([*small_run, *PAIR, *sizes])
    assert len(summary(tmp_path / 'run')) == 2
    progressive = ['--train-size-schedule', 'progressive', '--train-batches-per-epoch', '3']
    run([*small_run, *PAIR, *sizes, *progressive, '--experiment', 'progressive'])
    assert len(summary(tmp_path / 'progressive')) == 2


def test_multi_epochs_loader_sees_the_same_batches(small_run, tmp_path):
    for name, flag in (('a', []), ('b', ['--use-multi-epochs-loader'])):
        run([*small_run, *PAIR, *flag, '-j', '1', '--epochs', '3', '--experiment', name])
    a, b = (load(tmp_path / n / 'last.pth.tar')['state_dict'] for n in 'ab')
    assert all(torch.equal(a[k], b[k]) for k in a)


LOSSES = {
    'poly': ['--loss', 'poly', '--poly-epsilon', '1'],
    'asl': ['--loss', 'asl', '--asl-gamma-neg', '2'],
    'bce with weights': ['--loss', 'bce', '--loss-pos-weight', '2', '--bce-sum'],
    'jsd over splits': ['--loss', 'jsd', '--aug-splits', '2', '--aa', 'rand-m3', '--split-bn'],
}


@pytest.mark.parametrize('name', LOSSES)
def test_task_losses_of_timm_have_their_effect(name, small_run, tmp_path):
    run([*small_run, *RESNET, '--epochs', '1'])
    run([*small_run, *RESNET, '--epochs', '1', *LOSSES[name], '--experiment', 'other'])
    ours, plain = (float(summary(tmp_path / n)[0]['train_loss']) for n in ('other', 'run'))
    assert abs(ours - plain) > 1e-3


def test_class_weights_by_frequency_come_from_the_stats(small_run, tmp_path):
    (tmp_path / 'stats.json').write_text(json.dumps({'pos_counts': [12, 12, 12], 'num_samples': 36}))
    argv = ['--loss', 'bce', '--loss-pos-weight', 'neg_pos', '--class-stats', str(tmp_path / 'stats.json')]
    run([*small_run, *RESNET, '--epochs', '1', *argv])
    run([*small_run, *RESNET, '--epochs', '1', '--loss', 'bce', '--loss-pos-weight', '2', '--experiment', 'two'])
    a, b = (summary(tmp_path / n)[0]['train_loss'] for n in ('run', 'two'))
    assert float(a) == pytest.approx(float(b), rel=1e-6)  # 24 negatives to 12 positives


@pytest.fixture
def shards(image_folder, tmp_path):
    """A `wds/` data set with labels of one and of many classes."""
    webdataset = pytest.importorskip('webdataset')
    for split, name in (('train', 'train'), ('validation', 'val')):
        images = sorted((image_folder / name).rglob('*.png'))
        (tmp_path / 'wds').mkdir(exist_ok=True)
        with webdataset.TarWriter(str(tmp_path / 'wds' / f'set-{split}-0000.tar')) as tar:
            for i, path in enumerate(images):
                label = ('ant', 'bee', 'cat').index(path.parent.name)
                tar.write(
                    {'__key__': f'{i:04d}', 'png': path.read_bytes(), 'cls': label, 'json': {'labels': [label, 0]}}
                )
        info = {'splits': {s: {'name': s, 'filenames': [f'set-{s}-0000.tar'], 'shard_lengths': [n], 'num_samples': n} for s, n in (('train', 36), ('validation', 12))}}  # fmt: skip
        (tmp_path / 'wds' / '_info.json').write_text(json.dumps(info))
    return tmp_path / 'wds'


def test_a_stream_of_shards_trains_with_a_teacher(shards, small_run, tmp_path, capsys):
    said = run([str(shards), *small_run[1:], *PAIR, '--dataset', 'wds/set', '-j', '1'], capsys)
    assert 'a stream without indices' in said
    assert len(summary(tmp_path / 'run')) == 2


def test_shards_without_the_target_key_are_refused_with_the_keys_that_they_have(shards, small_run, capsys):
    argv = ['--dataset', 'wds/set', '--task', 'multilabel', '--target-key', 'tags', '-j', '1']
    error = refused([str(shards), *small_run[1:], *RESNET, *argv], capsys)
    assert "--target-key: Target key(s) ['tags'] not found" in error
    assert "available keys: ['labels']" in error


@pytest.mark.parametrize(
    'teacher', [[], ['--teacher', 'test_vit', '--no-teacher-pretrained']], ids=['plain', 'teacher']
)
def test_multi_label_data_has_its_own_loss_and_metrics(teacher, shards, small_run, tmp_path):
    argv = ['--dataset', 'wds/set', '--task', 'multilabel', '--target-key', 'labels', '-j', '1', '--loss', 'asl']
    run([str(shards), *small_run[1:], *RESNET, *teacher, *argv])
    row = summary(tmp_path / 'run')[1]
    assert set(row) >= {'eval_map', 'eval_micro_f1', 'eval_macro_f1', 'eval_sample_f1'}
    assert 0 < float(row['eval_map']) <= 100


def test_naflex_batches_train_without_a_teacher(small_run, tmp_path):
    model = ['--model', 'naflexvit_base_patch16_gap', '--model-kwargs', 'embed_dim=32', 'depth=1', 'num_heads=2']
    naflex = ['--naflex-loader', '--naflex-train-seq-lens', '4', '9', '--naflex-max-seq-len', '9']
    for more in ([], ['--mixup', '0.3'], ['--naflex-patch-sizes', '8', '16', '--no-prefetcher']):
        if '--naflex-patch-sizes' in more:
            model = [*model, 'enable_patch_interpolator=True']
        run([*small_run[:3], *small_run[5:], *model, *naflex, '--epochs', '1', *more])
        assert float(summary(tmp_path / 'run')[0]['eval_loss']) > 0


def test_save_images_writes_a_picture_at_each_log_interval(small_run, tmp_path):
    run([*small_run, *PAIR, '--save-images', '--epochs', '1'])
    assert {p.name for p in (tmp_path / 'run').glob('*.jpg')} == {'train-batch-1.jpg', 'train-batch-3.jpg'}


def test_torchscript_trains_a_scripted_student(small_run, tmp_path):
    run([*small_run, '--model', 'resnet10t', '--torchscript', '--epochs', '1'])
    keys = set(timm.create_model('resnet10t', num_classes=3).state_dict())
    assert set(read_state_dict(tmp_path / 'run', 'test')) == keys


def test_device_modules_are_imported_from_the_command_line_alone(small_run, tmp_path, monkeypatch, capsys):
    (tmp_path / 'my_device_module.py').write_text('LOADED = True\n')
    monkeypatch.syspath_prepend(str(tmp_path))
    run([*small_run, *RESNET, '--epochs', '1', '--device-modules', 'my_device_module'])
    assert sys.modules['my_device_module'].LOADED
    (tmp_path / 'c.yaml').write_text('device_modules: [my_device_module]\n')
    assert 'device_modules runs code' in refused([*small_run, *RESNET, '-c', str(tmp_path / 'c.yaml')], capsys)
    assert 'cannot import' in refused([*small_run, *RESNET, '--device-modules', 'no_such_module'], capsys)


@pytest.mark.parametrize(
    ('more', 'message'),
    [
        (['--teacher', 'test_vit', '--kd-model-name', 'test_vit'], 'are two of the same: give one'),
        (['--kd-distill-type', 'feature'], '--kd-distill-type needs --kd-model-name'),
        (['--distill-loss-weight', '2'], 'needs --teacher or --kd-model-name'),
        (['--teacher', 'test_vit', '--torchscript'], '--torchscript does not go with --teacher'),
        (['--teacher', 'test_vit', '--naflex-loader'], '--naflex-loader does not go with --teacher'),
        (['--teacher', 'test_vit', '--task', 'multilabel', '--kd-loss-weight', '1'], 'compares softmax logits'),
        (['--task', 'multilabel', '--kd-model-name', 'test_vit'], 'does not go with --kd-model-name'),
        (['--naflex-loader'], '--naflex-loader needs a NaFlexVit'),
        (['--naflex-max-seq-len', '9'], '--naflex-max-seq-len needs --naflex-loader'),
        (['--train-batch-sizes', '8'], '--train-batch-sizes needs --train-img-sizes'),
        (['--train-img-sizes', '32', '48', '--train-batch-sizes', '8'], 'one value for each of the 2 sizes'),
        (['--asl-clip', '0.1'], '--asl-clip needs --loss asl'),
        (['--loss', 'db'], '--class-stats goes with --loss db'),
        (['--loss', 'jsd'], 'the jsd loss needs --aug-splits'),
        (['--loss', 'twoway'], 'task loss: '),
        (['--target-format', 'multihot'], '--target-format needs --task multilabel'),
        (['--eval-metric', 'map'], '--eval-metric of --task classification must be one of top1'),
        (['--aug-repeats', '3'], '--aug-repeats spreads the draws of an image over ranks'),
        (['--mixup', '0.5', '-b', '7'], '--batch-size must be even'),
        (
            ['--mixup', '0.2', '--train-img-sizes', '24', '32', '--train-batch-sizes', '9', '4'],
            '--train-batch-sizes must be even, got 9',
        ),  # fmt: skip
        (['--task', 'multilabel'], '--task multilabel: the targets of the data set do not fit'),
        (['--model', 'test_vit', '--img-size', '33'], '--model test_vit cannot take 3x33x33 images'),
        (['--model', 'test_vit', '--train-img-sizes', '32', '33'], '--model test_vit cannot take 3x33x33 images'),
        (['--tta', '3'], '--tta must divide the validation batch'),
        (['--wandb-project', 'p'], '--wandb-project needs --log-wandb'),
        (['--kd-model-name', 'test_vit'], "--kd-model-name 'test_vit': "),
        (['--save-epochs', '9'], '--save-epochs must be from 1 to the 2 epochs'),
        (['--fuser', 'x'], "--fuser must be one of 'te'"),
    ],
)
def test_a_combination_that_cannot_work_is_refused(more, message, small_run, tmp_path, capsys):
    assert message in refused([*small_run, *RESNET, *more], capsys)
    assert not (tmp_path / 'run').exists()


def test_a_checkpoint_of_timms_own_saver_resumes_here(small_run, tmp_path, capsys):
    import argparse

    from timm.utils import CheckpointSaver

    torch.manual_seed(0)
    model = timm.create_model('test_resnet', num_classes=3)
    task = ClassificationTask(model, verbose=False)
    optimizer = create_optimizer_v2(model, 'sgd', lr=0.02, weight_decay=2e-5)
    task(torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 0]))['loss'].backward()
    optimizer.step()
    args = argparse.Namespace(model='test_resnet', opt='sgd')
    (tmp_path / 'timm').mkdir()
    CheckpointSaver(model, optimizer, args, task=task, checkpoint_dir=str(tmp_path / 'timm')).save_checkpoint(0, 50.0)
    run([*small_run, *RESNET, '--resume', str(tmp_path / 'timm' / 'last.pth.tar')])
    assert [r['epoch'] for r in summary(tmp_path / 'run')] == ['1']
    # and with a teacher: new projectors next to its student
    anew = ['--no-resume-opt', '--start-epoch', '0', '--experiment', 'pe']
    said = run([*small_run, *PAIR, '--resume', str(tmp_path / 'timm' / 'last.pth.tar'), *anew], capsys)
    assert 'holds no projectors: they start new' in said


SCHEDULES = {
    'cosine with warmup': ['--sched', 'cosine', '--warmup-epochs', '2', '--warmup-lr', '0.001', '--min-lr', '0.0001'],
    'warmup prefix and cooldown': ['--warmup-epochs', '1', '--warmup-prefix', '--cooldown-epochs', '1'],
    'multistep': ['--sched', 'multistep', '--decay-milestones', '2', '3', '--decay-rate', '0.5'],
    'step': ['--sched', 'step', '--decay-epochs', '1', '--decay-rate', '0.5'],
    'wsd': ['--sched', 'wsd', '--decay-epochs', '2', '--lr-decay-fn', 'linear'],
    'poly': ['--sched', 'poly', '--decay-rate', '2'],
    'noise': ['--sched', 'cosine', '--lr-noise', '0.2', '0.9'],
    'cycles': ['--sched', 'cosine', '--lr-cycle-limit', '2', '--lr-cycle-decay', '0.5', '--lr-cycle-mul', '1.5'],
}


@pytest.mark.parametrize('name', SCHEDULES)
def test_learning_rates_are_those_of_timms_scheduler(name, small_run, tmp_path):
    from timm.scheduler import create_scheduler_v2
    from timm.scheduler.scheduler_factory import scheduler_kwargs

    from timm_pe.config.run_config import parse_config

    argv = [*small_run, *PAIR, '--epochs', '4', *SCHEDULES[name]]
    run(argv)
    args = parse_config([*argv, '--eval-metric', 'top1'])
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.02)
    scheduler, num_epochs = create_scheduler_v2(optimizer, **scheduler_kwargs(args), updates_per_epoch=4)
    expected = []
    for epoch in range(num_epochs):
        expected.append(optimizer.param_groups[0]['lr'])
        scheduler.step(epoch + 1)
    assert [float(r['lr']) for r in summary(tmp_path / 'run')] == pytest.approx(expected, rel=1e-6)


def test_layer_decay_gives_projectors_the_rate_of_the_head_and_weight_decay_spares_biases(small_run, tmp_path):
    run([*small_run, *PAIR, '--epochs', '1', '--layer-decay', '0.5', '--weight-decay', '0.1', '--opt', 'adamw'])
    checkpoint = load(tmp_path / 'run' / 'last.pth.tar')
    groups = checkpoint['optimizer']['param_groups']
    assert max(g['lr_scale'] for g in groups) == 1.0
    assert min(g['lr_scale'] for g in groups) < 0.5
    assert {g['weight_decay'] for g in groups} == {0.0, 0.1}
    # student and projectors, each parameter once
    model = timm.create_model('test_resnet', num_classes=3)
    top = [g for g in groups if g['lr_scale'] == 1.0]
    assert sum(len(g['params']) for g in groups) == len(list(model.parameters())) + 2
    assert sum(len(g['params']) for g in top) >= 4  # weight and bias of the classifier and of the projectors


def test_layer_decay_of_a_student_without_layers_of_its_own_is_that_of_the_student_alone():
    student = timm.create_model('pit_ti_224', num_classes=3)
    assert not hasattr(student, 'group_matcher')
    task = ProjectorEnsembleTask(student, timm.create_model('test_vit', num_classes=3), verbose=False)
    scales = {}
    for module in (student, task.trainable_module):
        optimizer = create_optimizer_v2(module, 'adamw', lr=0.1, layer_decay=0.5)
        scales[module] = {id(p): g['lr_scale'] for g in optimizer.param_groups for p in g['params']}
    alone, taught = scales[student], scales[task.trainable_module]
    assert {key: taught[key] for key in alone} == alone
    assert len(set(alone.values())) > 5
    assert all(taught[id(p)] == 1.0 for p in task.projection.parameters())


@pytest.mark.parametrize(
    ('name', 'kwargs', 'left_out'),
    [
        ('test_resnet', {}, {'fc.weight', 'fc.bias'}),
        (
            'deit_tiny_distilled_patch16_224',
            {'depth': 1, 'img_size': 32},
            {'head.weight', 'head.bias', 'head_dist.weight', 'head_dist.bias'},
        ),
    ],
)
def test_adaptive_clipping_leaves_out_all_heads_of_the_student_and_no_projector(name, kwargs, left_out):
    student = timm.create_model(name, num_classes=3, **kwargs)
    task = ProjectorEnsembleTask(student, timm.create_model('test_vit', num_classes=3), verbose=False)
    clipped = {id(p) for p in task.get_clip_parameters(exclude_head=True)}
    assert {n for n, p in student.named_parameters() if id(p) not in clipped} == left_out
    assert all(id(p) in clipped for p in task.projection.parameters())
    assert len(list(task.get_clip_parameters())) == len(clipped) + len(left_out)


@pytest.mark.parametrize('patterns', [['fc.*'], ['fc.weight', 'student.fc.weight', 'fc.bias']])
def test_patterns_of_a_hybrid_optimizer_name_parameters_of_the_student(small_run, tmp_path, patterns):
    kwargs = ['--opt', 'muon', '--opt-kwargs', f'fallback_list={patterns}', '--epochs', '1']
    argv = [*small_run, '--model', 'test_resnet', *kwargs]
    number = {}
    for name, more in (('alone', []), ('taught', ['--teacher', 'test_vit', '--no-teacher-pretrained'])):
        run([*argv, *more, '--experiment', name])
        groups = load(tmp_path / name / 'last.pth.tar')['optimizer']['param_groups']
        number[name] = sum(len(g['params']) for g in groups if g.get('use_fallback'))
    assert number == {'alone': 2, 'taught': 2}


BATCHES = {
    'no augmentation': ['--no-aug'],
    'flips': ['--vflip', '1.0'],
    'color jitter': ['--color-jitter', '0.9'],
    'auto augment': ['--aa', 'rand-m9'],
    'crop mode': ['--train-crop-mode', 'rkrc'],
    'grey images': ['--grayscale-prob', '1.0'],
    'blur': ['--gaussian-blur-prob', '1.0'],
    'erasing': ['--reprob', '1.0', '--remode', 'const'],
    'interpolation': ['--train-interpolation', 'nearest'],
    'mean and std': ['--mean', '0.1', '--std', '0.9'],
    'input size': ['--img-size', '48'],
    'seed': ['--seed', '7'],
}


@pytest.mark.parametrize('name', BATCHES)
def test_flags_of_data_and_augmentation_change_the_batches(name, image_folder):
    from timm_pe.config.run_config import parse_config
    from timm_pe.data.datasets import create_datasets
    from timm_pe.data.epochs import first_batch
    from timm_pe.data.loaders import create_data
    from timm_pe.process.runtime import setup_runtime

    batches = []
    for flags in ([], BATCHES[name]):
        argv = [str(image_folder), '--num-classes', '3', '-b', '8', '-j', '0', '--device', 'cpu', '--img-size', '32']
        args = parse_config([*argv, *flags])
        student = timm.create_model('test_resnet', num_classes=3)
        batches.append(first_batch(create_data(args, create_datasets(args), student, setup_runtime(args)).train)[0])
    assert batches[0].shape != batches[1].shape or not torch.allclose(batches[0], batches[1], atol=1e-3)


PARAMETERS = {
    'head scale': (['--head-init-scale', '0.001'], lambda s: s['fc.weight'].abs().max() < 1e-3),
    'head bias': (['--head-init-bias', '-3'], lambda s: torch.equal(s['fc.bias'], torch.full((3,), -3.0))),
    'dtype': (['--model-dtype', 'bfloat16'], lambda s: s['fc.weight'].dtype == torch.bfloat16),
    'input channels': (['--in-chans', '1'], lambda s: s['conv1.0.weight'].shape[1] == 1),
    'model arguments': (['--model-kwargs', 'stem_width=8'], lambda s: s['conv1.0.weight'].shape[0] == 8),
}


@pytest.mark.parametrize('name', PARAMETERS)
def test_flags_of_the_model_change_its_parameters(name, small_run, tmp_path):
    flags, holds = PARAMETERS[name]
    run([*small_run, *RESNET, '--epochs', '1', '--lr', '0', *flags])
    assert holds(load(tmp_path / 'run' / 'last.pth.tar')['state_dict'])


def test_a_class_map_gives_the_labels_their_order(image_folder, tmp_path):
    from timm_pe.config.run_config import parse_config
    from timm_pe.data.datasets import create_datasets

    (tmp_path / 'classes.txt').write_text('cat\nbee\nant\n')
    args = parse_config([str(image_folder), '--class-map', str(tmp_path / 'classes.txt')])
    assert create_datasets(args)[0].reader.class_to_idx == {'cat': 0, 'bee': 1, 'ant': 2}


def test_the_average_follows_its_decay_and_the_projectors_are_in_it(small_run, tmp_path):
    run([*small_run, *PAIR, '--model-ema', '--model-ema-decay', '0', '--epochs', '1'])
    c = load(tmp_path / 'run' / 'last.pth.tar')
    for plain, average in ((c['state_dict'], c['state_dict_ema']), (c['task_state']['projection'], c['task_state_ema']['projection'])):  # fmt: skip
        assert all(torch.equal(plain[k], average[k]) for k in plain)


def test_checkpoint_hist_keeps_the_best_ones(small_run, tmp_path):
    run([*small_run, *PAIR, '--epochs', '4', '--checkpoint-hist', '2'])
    tops = {int(r['epoch']): float(r['eval_top1']) for r in summary(tmp_path / 'run')}
    kept = {int(p.name.split('-')[1].split('.')[0]) for p in (tmp_path / 'run').glob('checkpoint-*')}
    assert len(kept) == 2
    assert min(tops[e] for e in kept) >= max(v for e, v in tops.items() if e not in kept)
