"""Pretraining on images without labels: what a run leaves, says and refuses."""

import os
import re
import shutil
import subprocess
import sys
import tarfile

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from helpers import load, make_trainer, refused, run, stopped, summary, tensorboard_curves
from PIL import Image
from safetensors.torch import load_file

from timm_pe import ProjectorEnsembleTask
from timm_pe.analysis import analyze
from timm_pe.analysis import main as analysis_main
from timm_pe.data.unlabeled import find_images, hash_images, hold_out
from timm_pe.errors import UsageError
from timm_pe.export import main as export
from timm_pe.method.losses import normalize_teacher
from timm_pe.process.signals import Interrupts
from timm_pe.report import main as report
from timm_pe.runs.reopen import Options
from timm_pe.train import evaluate
from timm_pe.train.probes import normalize_in_batches
from timm_pe.train.validation import Moments

PAIR = ['--model', 'test_resnet', '--teacher', 'test_vit', '--no-teacher-pretrained']


@pytest.fixture(scope='module')
def images(tmp_path_factory):
    """40 tiny PNGs in folders whose names mean nothing."""
    root, rng = tmp_path_factory.mktemp('unlabeled') / 'images', np.random.default_rng(0)
    for i in range(40):
        folder = root / f'{i % 3}' / ('x' * (i % 2))
        folder.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 150, (36, 36, 3))
        pixels[..., i % 3] += 50
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f'{i}.png')
    return root


@pytest.fixture
def argv(images, tmp_path):
    return [
        *('--unlabeled', str(images), '--img-size', '32', '-b', '8', '-j', '0', '--device', 'cpu', '--epochs', '2'),
        *('--warmup-epochs', '0', '--lr', '0.02', '--output', str(tmp_path), '--experiment', 'run', *PAIR),
    ]


@pytest.fixture(scope='module')
def finished(images, tmp_path_factory):
    """A finished run, and what it said."""
    output = tmp_path_factory.mktemp('finished')
    argv = [
        *('--unlabeled', str(images), '--img-size', '32', '-b', '8', '-j', '0', '--device', 'cpu', '--epochs', '3'),
        *('--warmup-epochs', '0', '--lr', '0.02', '--output', str(output), '--experiment', 'run', '--log-tb', *PAIR),
    ]
    script = 'import sys; from timm_pe.train.main import main; main(sys.argv[1:])'
    out = subprocess.run([sys.executable, '-c', script, *argv], capture_output=True, text=True, check=True, timeout=300)
    return output / 'run', argv, out.stderr


@pytest.mark.parametrize(('tap', 'warns'), [('layer3', True), ('fc', False)])
def test_layers_behind_a_tap_that_nothing_trains_are_warned_of(tap, warns, argv, capsys):
    said = run([*argv, '--epochs', '1', '--student-tap', tap], capsys)
    assert (f'nothing trains the layers behind --student-tap {tap}' in said) is warns


def test_a_student_that_does_not_find_its_removed_classifier_can_be_tapped(argv, capsys):
    said = run([*argv, '--epochs', '1', '--model', 'shvit_s1', '--student-tap', 'stages.1'], capsys)
    assert 'nothing trains the layers behind --student-tap stages.1' in said


def test_the_summary_has_what_the_teacher_asks_for_and_nothing_of_labels(finished):
    rows = summary(finished[0])
    columns = 'epoch train_loss train_pe_loss train_images_per_s eval_loss eval_cosine eval_effective_rank lr'
    assert list(rows[0]) == columns.split()
    for row in rows:
        assert float(row['train_loss']) == pytest.approx(25 * float(row['train_pe_loss']), rel=1e-5)
        assert float(row['eval_loss']) == pytest.approx(1 - float(row['eval_cosine']), abs=1e-5)


def test_the_trackers_have_it_too(finished):
    curves, _ = tensorboard_curves(finished[0])
    assert 'eval_cosine' in curves
    assert not [name for name in curves if 'task' in name or 'top1' in name]


def test_the_start_says_what_is_held_out_and_speaks_of_no_classes(finished):
    said = finished[2]
    for pattern in (
        r'classes +none, no labels +1000',
        r'loss +25 x direction\n',
        r'regularization +none',
        r'data +24 images without labels, of /.*images',
        r'held out +16 more, chosen by their content \(--val-fraction 0.05\)',
        r'\n +so few that the best epoch is partly chance; the last one is in last.pth.tar',
        r'Teacher: on the 16 images held out .* could reach a cosine of 0\.\d+',
        r'Best cosine 0\.\d+ in epoch',
        r'Fine-tune: train-distill DATA --epochs N --img-size \d+ --model test_resnet --pretrained-path ',
    ):
        assert len(re.findall(pattern, said)) == 1, pattern
    assert re.search(r'Epoch 1/3  cosine -?0\.\d+.*effective rank \d.*val loss', said)
    assert not re.search(r'\b0 classes|top-1|task_loss|smoothing|accuracy', said)


def without(argv, flag):
    return [*argv[: argv.index(flag)], *argv[argv.index(flag) + 2 :]]


def test_the_start_gives_flags_to_start_from_in_place_of_defaults_alone(argv, tmp_path, capsys):
    bare = [*without(without(argv, '--epochs'), '--lr'), '--stop-epoch', '1']
    start = 'suggested       --opt adamw --lr 4e-3 --weight-decay 0.02 --sched-on-updates --epochs 300 ('
    assert f'{start}a pretraining of 24 images)' in run(bare, capsys)
    assert 'suggested       --sched-on-updates --epochs 300 (' in run(
        [*bare, '--lr', '0.1', '--experiment', 'lr'], capsys
    )
    given = ['--sched-on-updates', '--epochs', '2', '--weight-decay', '0.1', '--experiment', 'given']
    assert 'suggested  ' not in run([*bare, *given], capsys)


def test_the_student_is_a_backbone_that_plain_timm_loads(finished):
    folder = finished[0]
    student, best = (
        timm.create_model('test_resnet', num_classes=0, checkpoint_path=str(folder / name)).eval()
        for name in ('student.safetensors', 'model_best.pth.tar')
    )
    x = torch.randn(2, 3, 32, 32)
    assert student(x).shape == (2, 96)
    assert torch.equal(student(x), best(x))


def test_the_epoch_of_the_highest_cosine_is_kept(finished):
    rows = summary(finished[0])
    best = max(rows, key=lambda row: float(row['eval_cosine']))
    assert load(finished[0] / 'model_best.pth.tar')['epoch'] == int(best['epoch'])


def test_the_cosine_and_the_rank_are_those_of_a_naive_computation(argv, monkeypatch):
    trainer = make_trainer(argv, monkeypatch)
    metrics = trainer.validation(False, 'Test', lambda: None)
    module, teacher = trainer.task.trainable_module.eval(), trainer.task.teacher
    cosines, features = [], []
    with torch.no_grad():
        for input, _ in trainer.data.eval:
            feature = module.student(input)
            module.tap.pop()
            projections = [
                feature @ w.T + b
                for w, b in zip(
                    *(p.split(64) for p in dict(module.projection.named_parameters()).values()), strict=True
                )
            ]
            cosines.append(F.cosine_similarity(sum(projections) / 3, teacher(input).feature.float()))
            features.append(feature)
    assert metrics['cosine'] == pytest.approx(torch.cat(cosines).mean().item(), abs=1e-5)
    eigenvalues = torch.linalg.eigvalsh(torch.cat(features).double().T.cov(correction=0))
    expected = (eigenvalues.sum() ** 2 / eigenvalues.square().sum()).item()
    assert metrics['effective_rank'] == pytest.approx(expected, rel=1e-4)


def test_a_collapse_is_warned_about_once(argv, monkeypatch, capsys):
    trainer = make_trainer(argv, monkeypatch)
    for parameter in trainer.task.trainable_module.student.parameters():
        torch.nn.init.zeros_(parameter)
    for _ in range(2):
        trainer.validation(False, 'Test', lambda: None)
    assert capsys.readouterr().err.count("THE STUDENT'S FEATURES HAVE COLLAPSED") == 1


@pytest.mark.parametrize(
    ('feature', 'rank'), [(torch.eye(4), 3), (torch.arange(4.0)[:, None] * torch.ones(4), 1), (torch.ones(5, 4), 0)]
)
def test_the_effective_rank_counts_directions(feature, rank, argv, monkeypatch):
    moments = Moments(4, make_trainer(argv, monkeypatch).runtime)
    moments.add(feature)
    assert moments.effective_rank == pytest.approx(rank, abs=1e-6)


VARIANTS = {
    'plain': [],
    'average': ['--model-ema', '--model-ema-decay', '0.9', '--opt', 'adamw', '--lr', '1e-3'],
    'plateau': ['--sched', 'plateau', '--patience-epochs', '0', '--eval-metric', 'loss'],
    'workers': ['-j', '2'],
}


@pytest.mark.parametrize('variant', VARIANTS)
@pytest.mark.parametrize('number', [2, 4])
def test_a_run_that_is_stopped_and_resumed_ends_bit_equal(variant, number, argv, tmp_path, capsys, monkeypatch):
    argv = [*argv, *VARIANTS[variant]]
    run([*argv, '--experiment', 'alone'])
    asked = []
    requested = Interrupts.requested
    monkeypatch.setattr(Interrupts, 'requested', lambda self: (asked.append(1), 15 if len(asked) == number else 0)[1])
    stopped([*argv, '--resume', 'auto'], capsys)
    monkeypatch.setattr(Interrupts, 'requested', requested)
    run([*argv, '--resume', 'auto'])
    alone, resumed = (load(tmp_path / name / 'last.pth.tar') for name in ('alone', 'run'))
    for part in ('state_dict', 'state_dict_ema', 'optimizer', 'task_state'):
        assert str(alone.get(part)) == str(resumed.get(part)), part
    drop = {'train_images_per_s'}
    assert [{k: v for k, v in row.items() if k not in drop} for row in summary(tmp_path / 'alone')] == [
        {k: v for k, v in row.items() if k not in drop} for row in summary(tmp_path / 'run')
    ]


def test_other_folders_are_other_training_images(finished, argv, images, tmp_path, capsys):
    folder, _, _ = finished
    argv = [*argv, '--unlabeled', str(images / '0'), str(images / '1'), '--epochs', '4', '--resume', str(folder)]
    assert 'The training images have changed since the checkpoint' in run(argv, capsys)


def test_a_run_with_labels_does_not_go_on_from_one_without(finished, image_folder, tmp_path, capsys):
    argv = [str(image_folder), '--num-classes', '3', *finished[1][2:], '--output', str(tmp_path)]
    error = refused([*argv, '--resume', str(finished[0]), '--epochs', '5'], capsys)
    assert 'task pretraining without labels then, classification now' in error


def with_splits(folder, source, train='train', validation='val'):
    shutil.copytree(source / 'train', folder / train)
    shutil.copytree(source / 'val', folder / validation)
    return str(folder)


@pytest.mark.parametrize('names', [('train', 'val'), ('Training', 'validation')])
def test_a_folder_with_splits_that_is_used_without_labels_is_warned_about(names, argv, image_folder, tmp_path, capsys):
    data = with_splits(tmp_path / 'data', image_folder, *names)
    said = run(['--unlabeled', argv[1], data, *argv[2:]], capsys)
    assert said.count('used without labels') == 1
    assert (
        f"--unlabeled: '{data}' has the splits '{names[0]}' and '{names[1]}' of class folders, and all of its images are used "
        f'without labels. To train with its labels, give it before --unlabeled, or with --data-dir.' in said
    )


def test_folders_without_splits_of_class_folders_are_not_warned_about(argv, image_folder, tmp_path, capsys):
    with_splits(tmp_path / 'data' / 'deeper', image_folder)
    for split in ('train', 'val'):  # images at once in the splits, as of detection
        shutil.copytree(image_folder / split / 'ant', tmp_path / 'plain' / split)
    shutil.copytree(image_folder / 'train', tmp_path / 'one' / 'train')
    for split in ('train', 'Val', 'VAL'):  # whichever of the two is meant
        shutil.copytree(image_folder / split.lower(), tmp_path / 'two' / split)
    folders = [str(tmp_path / name) for name in ('data', 'plain', 'one', 'two')]
    assert 'used without labels' not in run(['--unlabeled', *folders, *argv[2:]], capsys)


def test_a_folder_of_splits_beside_a_data_folder_is_not_warned_about(argv, image_folder, tmp_path, capsys):
    data = with_splits(tmp_path / 'data', image_folder)
    argv = [str(image_folder), '--num-classes', '3', '--unlabeled', argv[1], data, *argv[2:]]
    assert 'used without labels' not in run(argv, capsys)


def test_a_cache_gives_the_numbers_that_the_teacher_gives(argv, tmp_path, capsys):
    argv = [*argv, '--teacher-cache', str(tmp_path / 'cache'), '--teacher-dtype', 'float32']
    run(argv)
    said = run([*argv, '--experiment', 'again'], capsys)
    assert '24 of 24 rows there' in said
    assert [row['eval_cosine'] for row in summary(tmp_path / 'run')] == [
        row['eval_cosine'] for row in summary(tmp_path / 'again')
    ]


@pytest.fixture
def shard(images, tmp_path):
    """A tar file of the same images."""
    shard = tmp_path / 'shards' / 'images.tar'
    shard.parent.mkdir()
    with tarfile.open(shard, 'w') as tar:
        tar.add(images, '.')
    return shard


@pytest.mark.parametrize('workers', ['0', '2'])
def test_a_shard_teaches_what_its_images_in_folders_teach(workers, argv, shard, tmp_path):
    run([*argv, '-j', workers])
    run([*argv, '-j', workers, '--unlabeled', str(shard.parent), '--experiment', 'shard'])
    folder, packed = (load_file(tmp_path / name / 'student.safetensors') for name in ('run', 'shard'))
    assert all(torch.equal(folder[key], packed[key]) for key in folder)


def test_a_cache_of_a_shard_knows_when_an_image_in_it_has_changed(argv, shard, images, tmp_path, capsys):
    argv = [*argv, '--unlabeled', str(shard), '--teacher-cache', str(tmp_path / 'cache'), '--epochs', '1']
    run(argv)
    assert '24 of 24 rows there' in run([*argv, '--experiment', 'again'], capsys)
    content = shard.read_bytes()
    os.utime(shard, (1, 1))  # another time, the same images
    assert '24 of 24 rows there' in run([*argv, '--experiment', 'touched'], capsys)
    trained = np.flatnonzero(~hold_out(hash_images(find_images([str(shard)]).paths), 0.05))[0]
    image = find_images([str(shard)]).paths[trained]
    shard.write_bytes(content[: image.offset + image.size - 20] + b'x' + content[image.offset + image.size - 19 :])
    assert '23 of 24 rows there' in run([*argv, '--experiment', 'changed'], capsys)


def test_images_of_a_shard_beside_labelled_ones_are_taught_as_those_of_a_folder(argv, shard, image_folder, tmp_path):
    argv = [str(image_folder), '--num-classes', '3', *argv]
    run(argv)
    run([*argv, '--unlabeled', str(shard), '--experiment', 'shard'])
    folder, packed = (load_file(tmp_path / name / 'student.safetensors') for name in ('run', 'shard'))
    assert all(torch.equal(folder[key], packed[key]) for key in folder)


# flag -> what the error says of it
REFUSED = {
    '--mixup 0.2': '--mixup mixes labels',
    '--cutmix 1': '--cutmix mixes labels',
    '--smoothing 0.1': '--smoothing is about a loss of labels',
    '--loss bce': '--loss is about a loss of labels',
    '--task multilabel': '--task is about a loss of labels',
    '--task-loss-weight 0.5': '--task-loss-weight weighs a loss of labels',
    '--kd-loss-weight 1': '--kd-loss-weight compares logits',
    '--pe-target logits': '--pe-target logits maps logits',
    '--num-classes 3': '--num-classes is about a classifier',
    '--head-init-scale 0.1': '--head-init-scale is about a classifier',
    '--drop 0.1': '--drop is about a classifier',
    '--class-map x.txt': '--class-map is about a labelled data set',
    '--val-split test': '--val-split is about a labelled data set',
    '--tta 2': '--tta averages logits',
    '--eval-metric top1': '--eval-metric without labels must be one of cosine, loss',
    '--evaluate x': '--evaluate measures a classifier',
    '--val-fraction 0': '--val-fraction must be above 0',
    '--val-fraction 0.6': '--val-fraction must be 0.5 or less',
    '--unlabeled nowhere': "--unlabeled: 'nowhere' does not exist",
    '-b 64': 'are fewer than one batch of 64',
}


@pytest.mark.parametrize('flags', REFUSED)
def test_what_cannot_work_without_labels_is_one_line(flags, argv, tmp_path, capsys):
    assert REFUSED[flags] in refused([*argv, *flags.split()], capsys)
    assert not (tmp_path / 'run').exists()


def test_a_teacher_is_needed(argv, capsys):
    argv = argv[: argv.index('--teacher')]
    assert '--unlabeled needs --teacher' in refused(argv, capsys)


def test_a_run_without_labels_is_not_evaluated(finished, capsys):
    error = refused(['--evaluate', str(finished[0]), '--device', 'cpu'], capsys)
    assert 'its student has no classifier to evaluate: fine-tune it' in error


def test_an_analysis_on_labelled_images_compares_features_and_fits_a_linear_probe(finished, image_folder, tmp_path):
    pytest.importorskip('sklearn')
    folder = tmp_path / 'run'
    shutil.copytree(finished[0], folder)
    with pytest.raises(UsageError, match='is analysed on labelled images: --data-dir names a folder'):
        analyze(folder)
    result = analyze(folder, Options(data_dir=str(image_folder)))
    assert result['images'] == {'train': 36, 'validation': 12}
    assert result['class_names'] == ['ant', 'bee', 'cat']
    assert 0 <= result['discriminability']['linear_probe_top1'] <= 100
    assert 0 <= result['teacher_probe']['linear_probe_top1'] <= 100
    assert result['cosine']['validation'] == pytest.approx(float(summary(folder)[-1]['eval_cosine']), abs=0.3)
    for name in ('train', 'validation', 'gap_top1', 'agreement', 'calibration', 'teacher_validation'):
        assert result[name] is None, name
    report([str(folder), '-o', str(tmp_path / 'report.html')])
    assert 'Linear probe' in (tmp_path / 'report.html').read_text()


def test_a_run_with_images_for_neighbours_is_analysed_on_them(argv, image_folder, tmp_path, capsys):
    pytest.importorskip('sklearn')
    run([*argv, '--knn-data', str(image_folder), '--epochs', '1'])
    analysis_main([str(tmp_path / 'run')])
    assert 'probe' in capsys.readouterr().out
    assert (tmp_path / 'run' / 'figures' / 'class_cosine.png').exists()


def test_the_report_shows_its_curves(finished, tmp_path, capsys):
    pytest.importorskip('matplotlib')
    report([str(finished[0]), '-o', str(tmp_path / 'report.html')])
    assert 'Validation cosine' in (tmp_path / 'report.html').read_text()


@pytest.mark.parametrize('norm', ['batch', 'whiten'])
def test_what_a_loss_asks_for_does_not_depend_on_which_images_lie_beside_each_other(norm):
    generator = torch.Generator().manual_seed(0)
    kinds = torch.cat([torch.full((200, 4), 5.0), torch.full((200, 4), -5.0)])
    feature = kinds + torch.randn(400, 4, generator=generator)
    order = torch.randperm(400, generator=generator)
    by_kind, mixed = torch.empty(400, 4), torch.empty(400, 4)
    for place, rows in ((by_kind, torch.arange(400)), (mixed, order)):
        place[rows] = normalize_in_batches(feature[rows], norm, 40)
    naive = torch.cat([normalize_teacher(part, norm) for part in feature.split(40)])  # neighbours are of one kind

    def agreement(a, b):
        return F.cosine_similarity(a, b).mean().item()

    assert agreement(by_kind, mixed) > 0.95
    assert agreement(by_kind, naive) < 0.7


def test_the_held_out_cosine_is_that_of_training_where_images_lie_kind_by_kind(tmp_path):
    rng = np.random.default_rng(0)
    for i in range(96):
        folder = tmp_path / 'images' / f'{i % 3}'
        folder.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 60, (36, 36, 3)) + 180 * np.eye(3, dtype=int)[i % 3]
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f'{i}.png')
    run(
        [
            *(
                '--unlabeled',
                str(tmp_path / 'images'),
                '--img-size',
                '32',
                '-b',
                '12',
                '-j',
                '0',
                '--device',
                'cpu',
                *PAIR,
            ),
            *(
                '--epochs',
                '6',
                '--warmup-epochs',
                '0',
                '--lr',
                '0.05',
                '--output',
                str(tmp_path),
                '--experiment',
                'run',
            ),
            *('--pe-teacher-norm', 'batch', '--val-fraction', '0.4', '--scale', '0.9', '1'),
        ]
    )
    last = summary(tmp_path / 'run')[-1]
    assert float(last['eval_cosine']) > 1 - float(last['train_pe_loss']) - 0.2


def test_images_that_only_pad_a_batch_count_for_nothing(argv, monkeypatch):
    trainer = make_trainer([*argv, '--pe-teacher-norm', 'batch'], monkeypatch)
    validation = trainer.validation
    monkeypatch.setattr(evaluate, 'evaluation_sample_limit', lambda loader: 13)  # of 16: of the second batch of 8, five
    validation.aims, validation.constants = [], []
    validation._see('teacher', trainer.task.teacher)
    module, projected, features = trainer.task.trainable_module.eval(), [], []
    with torch.no_grad():
        for input, _ in trainer.data.eval:
            module.student(input)
            projected.append(module.projection(module.tap.pop()))
            features.append(trainer.task.teacher(input).feature.float())
    aim = normalize_teacher(torch.cat(features)[:13], 'batch')  # one batch: there is no second one of 8
    expected = F.cosine_similarity(torch.cat(projected)[:13], aim).mean().item()
    measured = validation(ema=False, what='', after_batch=lambda: None)
    assert measured['cosine'] == pytest.approx(expected, abs=1e-4)


def test_a_task_without_classifier_has_no_task_loss():
    student = timm.create_model('test_resnet', num_classes=0)
    task = ProjectorEnsembleTask(student, timm.create_model('test_vit'), verbose=False)
    result = task(torch.randn(2, 3, 160, 160), torch.full((2,), -1))
    assert set(result) == {'loss', 'output', 'pe_loss'}
    assert torch.equal(result['loss'], 25 * result['pe_loss'])
    with pytest.raises(UsageError, match='no classifier'):
        ProjectorEnsembleTask(student, timm.create_model('test_vit'), task_loss_weight=1, verbose=False)


@pytest.mark.long
def test_two_ranks_measure_what_one_measures(images, image_folder, tmp_path):
    shutil.copytree(image_folder, tmp_path / 'knn')
    (tmp_path / 'knn' / 'train' / 'ant' / '3.png').unlink()
    (tmp_path / 'knn' / 'val' / 'bee' / '2.png').unlink()
    argv = [
        *('--unlabeled', str(images), '--val-fraction', '0.42', '--img-size', '32', '-j', '0', '--device', 'cpu'),
        *('--model', 'test_vit', '--teacher', 'test_vit2', '--no-teacher-pretrained', '--teacher-dtype', 'float32'),
        *('--epochs', '1', '--warmup-epochs', '0', '--lr', '0', '--output', str(tmp_path)),
        *('--knn-data', str(tmp_path / 'knn')),
    ]
    script, found = os.path.join(os.path.dirname(__file__), '..', '..', 'train_distill.py'), []
    for ranks in (1, 2):
        more = ['--experiment', f'ranks{ranks}', '-b', str(8 // ranks)]
        start = [sys.executable, '-m', 'torch.distributed.run', '--standalone', f'--nproc-per-node={ranks}']
        out = subprocess.run([*start, script, *argv, *more], check=True, timeout=300, capture_output=True, text=True)
        # an odd number: one rank has an image that only pads its share
        assert int(re.search(r'held out +(\d+) more', out.stderr)[1]) % 2
        found.append(summary(tmp_path / f'ranks{ranks}')[0])
    for name in ('eval_cosine', 'eval_loss', 'eval_effective_rank', 'eval_knn', 'eval_linear'):
        assert float(found[0][name]) == pytest.approx(float(found[1][name]), rel=1e-4), name


@pytest.mark.parametrize('flag', ['--pretrained-path', '--initial-checkpoint'])
def test_a_fine_tuning_starts_from_the_backbone_by_one_flag(
    flag, finished, image_folder, tmp_path, monkeypatch, capsys
):
    argv = [str(image_folder), *finished[1][2:], '--output', str(tmp_path), flag, str(finished[0])]
    at = argv.index('--teacher')
    trainer = make_trainer([*argv[:at], *argv[at + 3 :]], monkeypatch)
    assert 'the classifier starts new' in capsys.readouterr().err
    student = trainer.task.get_eval_model().state_dict()
    backbone = load_file(finished[0] / 'student.safetensors')
    assert set(student) - set(backbone) == {'fc.weight', 'fc.bias'}
    assert all(torch.equal(student[name], value) for name, value in backbone.items())
    assert student['fc.weight'].shape[0] == 3


def test_the_exported_backbone_takes_any_classes_and_gives_feature_maps(finished, tmp_path, capsys):
    export([str(finished[0]), '--output', str(tmp_path / 'exported')])
    assert "timm.create_model('local-dir:" in (said := capsys.readouterr().out)
    assert 'num_classes=N)' in said
    name = f'local-dir:{tmp_path / "exported"}'
    weights = load_file(finished[0] / 'student.safetensors')
    for model in (timm.create_model(name, pretrained=True, num_classes=n).eval() for n in (0, 5)):
        own = model.state_dict()
        assert all(torch.equal(own[key], value) for key, value in weights.items())
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 5)
    maps = timm.create_model(name, pretrained=True, features_only=True).eval()
    assert len(maps(torch.randn(2, 3, 32, 32))) > 1
    own = maps.state_dict()
    assert all(torch.equal(own[key], weights[key]) for key in own if key in weights)
    assert set(own) & set(weights)
    card = (tmp_path / 'exported' / 'README.md').read_text()
    assert 'none, it gives features' in card
    assert 'softmax' not in card
    assert 'pipeline_tag: image-feature-extraction' in card
    assert '**Validated on:** images held out of training, chosen by their content' in card


def test_the_report_of_a_fine_tuned_student_beside_its_backbone_is_made(finished, image_folder, tmp_path):
    pytest.importorskip('matplotlib')
    alone = ['--model', 'test_resnet', '--img-size', '32', '-b', '8', '-j', '0', '--device', 'cpu', '--epochs', '1']
    run(
        [
            str(image_folder),
            *alone,
            '--output',
            str(tmp_path),
            '--experiment',
            'tuned',
            '--pretrained-path',
            str(finished[0]),
        ]
    )
    report([str(tmp_path / 'tuned'), str(finished[0]), '-o', str(tmp_path / 'report.html')])
    assert 'tuned' in (tmp_path / 'report.html').read_text()


def test_a_fine_tuned_student_is_exported_with_its_classes(finished, image_folder, tmp_path):
    argv = [str(image_folder), *finished[1][2:], '--output', str(tmp_path), '--pretrained-path', str(finished[0])]
    run(argv)
    export([str(tmp_path / 'run'), '--output', str(tmp_path / 'exported')])
    name = f'local-dir:{tmp_path / "exported"}'
    x = torch.randn(2, 3, 32, 32)
    assert timm.create_model(name, pretrained=True)(x).shape == (2, 3)
    assert timm.create_model(name, pretrained=True, num_classes=7)(x).shape == (2, 7)
    assert len(timm.create_model(name, pretrained=True, features_only=True)(x)) > 1


def test_a_last_cosine_below_that_of_one_output_for_all_images_is_warned_about(argv, capsys):
    # of both where neither learns, of the average where it stays behind, of none where it learns
    still, behind, learns = ('--lr', '1e-9'), ('--model-ema', '--model-ema-decay', '0.999999'), ()
    for name, more, whose in (
        ('still', still, ['of the student']),
        ('behind', behind, ['of the moving average']),
        ('learns', learns, []),
    ):
        said = run([*argv, *more, '--epochs', '6', '--val-interval', '6', '--experiment', name], capsys)
        assert re.findall(r'The last cosine (of [a-z ]+), -?[\d.]+, is no higher than the [\d.]+ of one', said) == whose
