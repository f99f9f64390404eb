"""What an analysis makes of tiny finished runs."""

import base64
import io
import itertools
import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import load, run, summary
from PIL import Image
from safetensors.torch import load_file, save_file

from timm_pe import analysis
from timm_pe.run_folder import RunFolder
from timm_pe.runs import reopen
from timm_pe.runs.reopen import Options, open_run
from timm_pe.train import build

KEYS = {
    '': 'run model teacher compared_with teacher_weights checkpoint epoch seed params num_classes class_names images train validation '
    'gap_top1 teacher_validation agreement cosine cosine_raw cka map_cosine discriminability calibration projectors samples',
    'images': 'train validation',
    'train': 'top1 top5 loss',
    'validation': 'top1 top5 loss',
    'teacher_validation': 'top1 top5 loss',
    'agreement': 'train validation',
    'cosine': 'train validation',
    'cka': 'train validation',
    'discriminability': 'within_scatter between_scatter between_over_within between_class_cosine between_class_cosine_raw '
    'nearest_centroid_top1 linear_probe_top1',
    'calibration': 'ece mean_confidence accuracy bins',
    'projectors': 'q act output_cosine weight_cosine single_cosine ensemble_cosine ensemble_gain',
}


@pytest.fixture(scope='module')
def runs(image_folder, tmp_path_factory):
    """Finished runs of one student: 'alone' and 'distilled' by 'teacher'; and the command line that they share."""
    output = tmp_path_factory.mktemp('runs')
    argv = [
        *(str(image_folder), '--num-classes', '3', '--img-size', '32', '-b', '8', '-j', '0', '--device', 'cpu'),
        *('--epochs', '3', '--warmup-epochs', '0', '--lr', '0.02', '--output', str(output), '--scale', '0.5', '1.0'),
    ]
    teacher = ['--teacher', 'test_resnet', '--teacher-checkpoint', str(output / 'teacher')]
    run([*argv, '--model', 'test_resnet', '--experiment', 'teacher'])
    run([*argv, '--model', 'test_vit', '--experiment', 'alone'])
    run([*argv, '--model', 'test_vit', '--experiment', 'distilled', *teacher])
    return output, argv, teacher


@pytest.fixture(scope='module')
def analyzed(runs):
    """The analyses of 'alone' and 'distilled' in one call, and what was in their folders before."""
    output = runs[0]
    folders = [output / 'alone', output / 'distilled']
    before = {folder: {p.name: p.read_bytes() for p in folder.iterdir()} for folder in folders}
    analysis.main([*map(str, folders), '--max-train-images', '30'])
    return [json.loads((folder / 'analysis.json').read_text()) for folder in folders], before


def copy(runs, name: str, tmp_path) -> Path:
    """A run folder of one's own, not analysed yet."""
    ignored = shutil.ignore_patterns('analysis.json', 'figures')
    return Path(shutil.copytree(runs[0] / name, tmp_path / name, ignore=ignored))


def refused(argv, capsys) -> str:
    """The one line that an analysis ends with."""
    with pytest.raises(SystemExit) as e:
        analysis.main(list(map(str, argv)))
    err = capsys.readouterr().err
    assert e.value.code == 2
    assert 'Traceback' not in err
    assert len(err.splitlines()) == 1, err
    assert err.startswith('python -m timm_pe.analysis: error: ')
    return err


def test_every_number_of_the_contract_is_there(analyzed):
    result = analyzed[0][1]
    for path, keys in KEYS.items():
        assert set(result[path] if path else result) == set(keys.split()), path
    assert result['cosine_raw'] is None  # the widths differ
    assert (result['run'], result['model'], result['teacher']) == ('distilled', 'test_vit', 'test_resnet')
    assert (result['checkpoint'], result['epoch'], result['seed']) == ('last', 2, 42)
    assert (result['num_classes'], result['class_names']) == (3, ['ant', 'bee', 'cat'])
    assert result['images'] == {'train': 30, 'validation': 12}
    assert result['gap_top1'] == pytest.approx(result['train']['top1'] - result['validation']['top1'])
    assert (result['projectors']['q'], result['projectors']['act']) == (3, 'relu')
    assert result['cosine']['validation'] == result['projectors']['ensemble_cosine']
    single = result['projectors']['single_cosine']
    assert result['projectors']['ensemble_gain'] == pytest.approx(result['cosine']['validation'] - max(single))
    assert len(result['calibration']['bins']) == 15
    assert 100 * result['calibration']['accuracy'] == pytest.approx(result['validation']['top1'], rel=1e-5)


def test_a_run_without_a_teacher_is_compared_with_that_of_the_other_run(analyzed):
    alone, distilled = analyzed[0]
    assert (alone['teacher'], alone['compared_with'], distilled['compared_with']) == (
        None,
        'test_resnet',
        'test_resnet',
    )
    assert alone['teacher_validation'] == distilled['teacher_validation']
    assert set(alone['cka']) == set(alone['agreement']) == {'train', 'validation'}
    assert alone['cosine'] is alone['projectors'] is alone['cosine_raw'] is None


def test_both_runs_show_the_same_images(analyzed, image_folder):
    alone, distilled = analyzed[0]
    assert [(s['image'], s['label']) for s in alone['samples']] == [
        (s['image'], s['label']) for s in distilled['samples']
    ]
    assert len(distilled['samples']) == 12
    sample = distilled['samples'][0]
    assert set(sample['student']) == set(sample['teacher']) == {'class', 'confidence'}
    png = base64.b64decode(sample['image'].removeprefix('data:image/png;base64,'))
    label = distilled['class_names'][sample['label']]
    originals = [np.asarray(Image.open(p)) for p in (image_folder / 'val' / label).iterdir()]
    assert any(np.array_equal(np.asarray(Image.open(io.BytesIO(png))), original) for original in originals)
    top1 = np.mean([s['student']['class'] == s['label'] for s in distilled['samples']])
    assert 100 * top1 == pytest.approx(distilled['validation']['top1'], rel=1e-5)  # these 12 are all there are


def test_validation_numbers_are_those_of_the_run_itself(analyzed, runs):
    for result in analyzed[0]:
        row = summary(runs[0] / result['run'])[result['epoch']]
        for name in ('top1', 'top5', 'loss'):
            assert result['validation'][name] == pytest.approx(float(row[f'eval_{name}']), rel=1e-5)


def test_training_images_are_seen_without_augmentation(runs, tmp_path, capsys):
    output, argv, _ = runs
    copy(runs, 'alone', tmp_path)
    result = analysis.analyze(tmp_path / 'alone')
    said = run([*argv, '--model', 'test_vit', '--val-split', 'train', '--evaluate', str(tmp_path / 'alone' / 'last.pth.tar')], capsys)  # fmt: skip
    assert result['images']['train'] == 36
    assert result['train']['top1'] == pytest.approx(float(re.search(r'top-1 ([\d.]+) %', said)[1]), abs=1e-3)
    assert result['train']['loss'] == pytest.approx(float(re.search(r'loss ([\d.]+)', said)[1]), abs=1e-3)


def test_an_analysis_leaves_its_json_and_pictures_and_nothing_else(analyzed):
    for folder, before in analyzed[1].items():
        assert {p.name for p in folder.iterdir()} == {*before, 'analysis.json', 'figures'}
        assert all((folder / name).read_bytes() == content for name, content in before.items())
        pictures = {'reliability.png', 'class_cosine.png', 'curves.png'}
        if folder.name == 'distilled':
            pictures.add('projector_similarity.png')
        assert {p.name for p in (folder / 'figures').iterdir()} == pictures
        assert all(p.read_bytes().startswith(b'\x89PNG') for p in (folder / 'figures').iterdir())


def test_the_table_has_a_row_a_run_and_says_where_it_wrote(runs, capsys):
    output = runs[0]
    analysis.main([str(output / 'distilled'), str(output / 'alone')])
    head, distilled, alone, *rest = capsys.readouterr().out.splitlines()
    result = json.loads((output / 'distilled' / 'analysis.json').read_text())
    cells = dict(zip(re.split(r'\s{2,}', head), re.split(r'\s{2,}', distilled), strict=True))
    assert cells['run'] == 'distilled'
    assert cells['val'] == f'{result["validation"]["top1"]:.2f}'
    assert cells['CKA'] == f'{result["cka"]["validation"]:.3f}'
    assert re.split(r'\s{2,}', alone)[-2:] == ['-', '-']  # no projectors
    assert any('analysis.json' in line for line in rest)


def test_a_run_alone_has_nobody_to_be_compared_with(runs, tmp_path):
    copy(runs, 'alone', tmp_path)
    result = analysis.analyze(tmp_path / 'alone')
    for name in ('compared_with', 'teacher_validation', 'agreement', 'cosine', 'cosine_raw', 'cka', 'projectors'):
        assert result[name] is None, name
    assert all(sample['teacher'] is None for sample in result['samples'])
    assert result['discriminability']['linear_probe_top1'] is not None


def test_a_teacher_of_other_data_is_nobody_to_be_compared_with(runs, tmp_path):
    copy(runs, 'alone', tmp_path)
    other = copy(runs, 'distilled', tmp_path)
    text = (other / 'args.yaml').read_text()
    (other / 'args.yaml').write_text(re.sub(r'^val_split: .*$', 'val_split: train', text, flags=re.M))
    assert analysis.analyze(tmp_path / 'alone', others=[other])['compared_with'] is None


def test_the_teacher_compared_with_itself_is_equal(runs, tmp_path):
    output = runs[0]
    copy(runs, 'teacher', tmp_path)
    options = Options(checkpoint='best')  # the weights that it teaches with
    result = analysis.analyze(tmp_path / 'teacher', options, others=[output / 'distilled'])
    assert result['checkpoint'] == 'best'
    assert result['agreement'] == {'train': 100, 'validation': 100}
    assert result['cka']['validation'] == pytest.approx(1, abs=1e-4)
    assert result['cosine_raw']['train'] == pytest.approx(1, abs=1e-4)
    assert result['teacher_validation']['top1'] == pytest.approx(result['validation']['top1'])


def test_the_moving_average_is_analysed_where_it_is_what_the_run_evaluated(runs, tmp_path):
    _, argv, teacher = runs
    ema = ['--model-ema', '--model-ema-decay', '0.7', '--epochs', '1']
    run([*argv, '--model', 'test_vit', *teacher, *ema, '--output', str(tmp_path), '--experiment', 'ema'])
    result = analysis.analyze(tmp_path / 'ema')
    assert result['validation']['loss'] == pytest.approx(float(summary(tmp_path / 'ema')[-1]['eval_loss']), rel=1e-5)
    weight = load(tmp_path / 'ema' / 'last.pth.tar')['task_state_ema']['projection']['projectors.fc.weight']
    flat = weight.numpy().reshape(3, -1)
    flat /= np.linalg.norm(flat, axis=1, keepdims=True)
    naive = np.mean([a @ b for a, b in itertools.combinations(flat, 2)])
    assert result['projectors']['weight_cosine'] == pytest.approx(naive, abs=1e-4)


def test_an_average_that_a_resume_ended_is_analysed_where_the_checkpoint_has_it_and_not_after(runs, tmp_path):
    _, argv, teacher = runs
    argv = [
        *argv,
        '--model',
        'test_vit',
        *teacher,
        '--output',
        str(tmp_path),
        '--experiment',
        'ema',
        '--save-epochs',
        '1',
    ]
    run([*argv, '--epochs', '3', '--stop-epoch', '2', '--model-ema', '--model-ema-decay', '0.7'])
    with_average = load(tmp_path / 'ema' / 'last.pth.tar')
    run([*argv, '--epochs', '3', '--resume', 'auto'])
    losses = [float(row['eval_loss']) for row in summary(tmp_path / 'ema')]
    result = analysis.analyze(tmp_path / 'ema')
    assert (result['epoch'], result['validation']['loss']) == (2, pytest.approx(losses[2], rel=1e-5))
    torch.save(with_average, tmp_path / 'ema' / 'model_best.pth.tar')  # args.yaml says nothing of an average any more
    result = analysis.analyze(tmp_path / 'ema', Options(checkpoint='best'))
    assert (result['epoch'], result['validation']['loss']) == (1, pytest.approx(losses[1], rel=1e-5))


@pytest.mark.parametrize('dtype', ['bfloat16', 'float16'])
def test_a_run_in_low_precision_is_analysed(dtype, runs, tmp_path):
    _, argv, teacher = runs
    more = ['--model', 'test_vit', '--experiment', dtype, '--output', str(tmp_path), '--epochs', '1']
    run([*argv, *teacher, *more, '--model-dtype', dtype])
    analysis.main([str(tmp_path / dtype), '--max-train-images', '12'])
    result = json.loads((tmp_path / dtype / 'analysis.json').read_text())
    own = float(summary(tmp_path / dtype)[0]['eval_top1'])
    assert result['validation']['top1'] == pytest.approx(own, abs=100 / 12 + 0.01)  # one image of rounding
    assert 0 < result['cka']['validation'] <= 1


def test_projectors_of_logits_have_no_cosine_to_a_feature(runs, tmp_path):
    _, argv, teacher = runs
    logits = ['--pe-target', 'logits', '--epochs', '1', '--output', str(tmp_path), '--experiment', 'logits']
    run([*argv, '--model', 'test_vit', *teacher, *logits])
    result = analysis.analyze(tmp_path / 'logits')
    assert result['cosine'] is None
    projectors = result['projectors']
    assert projectors['q'] == 3
    for name in ('output_cosine', 'single_cosine', 'ensemble_cosine', 'ensemble_gain'):
        assert projectors[name] is None, name
    assert result['cka']['train'] is not None
    assert result['agreement']['train'] is not None


def test_one_projector_has_no_other_to_be_compared_with(runs, tmp_path):
    _, argv, teacher = runs
    one = ['--pe-projectors', '1', '--epochs', '1', '--output', str(tmp_path), '--experiment', 'one']
    run([*argv, '--model', 'test_vit', *teacher, *one])
    projectors = analysis.analyze(tmp_path / 'one')['projectors']
    assert projectors['output_cosine'] is projectors['weight_cosine'] is None
    assert (projectors['ensemble_gain'], len(projectors['single_cosine'])) == (pytest.approx(0, abs=1e-6), 1)
    assert not (tmp_path / 'one' / 'figures' / 'projector_similarity.png').exists()


def test_timms_own_distillation_has_a_teacher_and_no_projectors(runs, tmp_path):
    output, argv, _ = runs
    folder = tmp_path / 'local'
    folder.mkdir()
    shutil.copyfile(output / 'teacher' / 'student.safetensors', folder / 'model.safetensors')
    config = {'architecture': 'test_resnet', 'num_classes': 3, 'pretrained_cfg': {'num_classes': 3}}
    (folder / 'config.json').write_text(json.dumps(config))
    kd = ['--kd-model-name', f'local-dir:{folder}', '--epochs', '1', '--output', str(tmp_path), '--experiment', 'kd']
    run([*argv, '--model', 'test_vit', *kd])
    result = analysis.analyze(tmp_path / 'kd')
    assert result['teacher'] == result['compared_with'] == f'local-dir:{folder}'
    assert result['projectors'] is result['cosine'] is None
    best = max(float(row['eval_top1']) for row in summary(output / 'teacher'))
    assert result['teacher_validation']['top1'] == pytest.approx(best, abs=1e-3)


def test_a_teacher_that_was_left_random_is_drawn_again(runs, tmp_path, monkeypatch):
    _, argv, _ = runs
    teachers = []
    create = build.create_run_teachers

    def remember(*args, **kwargs):
        made = create(*args, **kwargs)
        teachers.extend(made)
        return made

    monkeypatch.setattr(build, 'create_run_teachers', remember)
    random = ['--teacher', 'test_resnet', '--no-teacher-pretrained', '--epochs', '1', '--output', str(tmp_path)]
    run([*argv, '--model', 'test_vit', *random, '--experiment', 'random', '--seed', '3'])
    again = open_run(RunFolder(tmp_path / 'random'), Options()).teachers[0].state_dict()
    assert all(torch.equal(v, again[k]) for k, v in teachers[0].state_dict().items())


def test_the_same_training_images_are_looked_at_in_each_run(runs):
    output = runs[0]
    options = Options(max_train_images=10)
    subsets = []
    for name in ('alone', 'distilled'):
        opened = open_run(RunFolder(output / name), options)
        subsets.append(opened.loaders['train'].dataset.indices)
    assert subsets[0] == subsets[1]
    assert len(set(subsets[0])) == 10
    assert max(subsets[0]) > 9  # drawn, not the first ten: folders are sorted by class
    whole = open_run(RunFolder(output / 'distilled'), Options())
    seen, of_all = (torch.cat([images for images, _ in r.loaders['train']]) for r in (opened, whole))
    torch.testing.assert_close(seen, of_all[subsets[0]])


def test_moved_data_and_teacher_are_named_on_the_command_line(runs, image_folder, tmp_path, capsys):
    folder = copy(runs, 'distilled', tmp_path)
    text = (folder / 'args.yaml').read_text()
    args = re.sub(r'^data: .*$', 'data: /moved', text, flags=re.M)
    (folder / 'args.yaml').write_text(
        re.sub(r'^teacher_checkpoint: .*$', 'teacher_checkpoint: /away', args, flags=re.M)
    )
    error = refused([folder], capsys)
    assert "no data folder '/moved'" in error
    assert '--data-dir PATH' in error
    error = refused([folder, '--data-dir', image_folder], capsys)
    assert "no file '/away'" in error
    assert '--teacher-checkpoint PATH' in error
    assert not (folder / 'analysis.json').exists()
    analysis.main([str(folder), '--data-dir', str(image_folder), '--teacher-checkpoint', str(runs[0] / 'teacher')])
    assert (folder / 'analysis.json').exists()


def test_a_teacher_with_other_weights_than_those_that_taught_is_refused(runs, tmp_path, capsys):
    folder = copy(runs, 'distilled', tmp_path)
    student = runs[0] / 'teacher' / 'student.safetensors'
    weights = load_file(student)
    save_file({k: v * 2 if v.is_floating_point() else v for k, v in weights.items()}, tmp_path / 'other.safetensors')
    error = refused([folder, '--teacher-checkpoint', tmp_path / 'other.safetensors'], capsys)
    assert 'its teacher has other weights than when it taught (teacher test_resnet (' in error
    assert not (folder / 'analysis.json').exists()
    shutil.copy(student, tmp_path / 'moved.safetensors')
    analysis.main([str(folder), '--teacher-checkpoint', str(tmp_path / 'moved.safetensors')])
    assert json.loads((folder / 'analysis.json').read_text())['teacher_weights'][0]


def test_what_cannot_be_analysed_is_said_in_one_line_before_anything_is_written(runs, tmp_path, capsys, monkeypatch):
    whole = copy(runs, 'alone', tmp_path)
    (whole / 'model_best.pth.tar').unlink()
    assert f"RUN '{tmp_path / 'nothing'}': it is no run folder" in refused([whole, tmp_path / 'nothing'], capsys)
    assert 'it has no model_best.pth.tar' in refused([whole, '--checkpoint', 'best'], capsys)
    assert '--max-train-images must be 1 or more' in refused([whole, '--max-train-images', '0'], capsys)
    assert "--device: cannot use 'abacus'" in refused([whole, '--device', 'abacus'], capsys)
    assert 'did you mean --checkpoint?' in refused([whole, '--chekpoint=last'], capsys)
    multilabel = Path(shutil.copytree(whole, tmp_path / 'multilabel'))
    text = (whole / 'args.yaml').read_text().replace('task: classification', 'task: multilabel')
    (multilabel / 'args.yaml').write_text(text)
    assert '--task multilabel or --naflex-loader cannot be analysed' in refused([multilabel], capsys)
    monkeypatch.setattr(analysis, '_PACKAGES', {'no_such_module': 'no-such-package'})
    assert "the analysis needs no-such-package: pip install 'timm_pe[analysis]'" in refused([whole], capsys)
    assert not (whole / 'analysis.json').exists()


def test_a_teacher_that_has_learnt_other_classes_is_not_measured_by_those_of_the_data(runs, tmp_path, monkeypatch):
    monkeypatch.setattr(reopen, 'other_class_of_teacher', lambda *of_teacher: "class 'aardvark' 0 then")
    result = analysis.analyze(copy(runs, 'distilled', tmp_path))
    assert result['teacher_validation'] is result['agreement'] is None
    assert result['cka']['validation'] > 0


def test_data_of_other_classes_than_the_run_has_learnt_is_refused(runs, image_folder, tmp_path, capsys):
    shutil.copytree(image_folder, tmp_path / 'images')
    for split in ('train', 'val'):
        (tmp_path / 'images' / split / 'cat').rename(tmp_path / 'images' / split / 'aardvark')
    said = refused([str(runs[0] / 'alone'), '--data-dir', str(tmp_path / 'images')], capsys)
    assert "(class 'ant' 0 then, 1 now)" in said


@pytest.mark.parametrize(
    ('damage', 'message'),
    [
        (lambda c: c.update(task_state=None), 'holds no projectors'),
        (lambda c: c['state_dict']['head.weight'].fill_(3e38), 'the run has diverged'),
        (lambda c: c['state_dict'].pop('head.weight'), '1 missing keys (head.weight)'),
        (
            lambda c: c['task_state'].update(num_projectors=2),
            'the checkpoint has num_projectors=2, this run num_projectors=3',
        ),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused(damage, message, runs, tmp_path, capsys):
    folder = copy(runs, 'distilled', tmp_path)
    checkpoint = load(folder / 'last.pth.tar')
    damage(checkpoint)
    torch.save(checkpoint, folder / 'last.pth.tar')
    assert message in refused([folder], capsys)
    assert not {'analysis.json', 'figures'} & {p.name for p in folder.iterdir()}


def test_no_number_of_the_json_is_nan():
    nested = {'a': math.nan, 'b': [1.0, math.inf, {'c': -math.inf}], 'd': 'nan', 'e': 3}
    assert analysis._finite(nested) == {'a': None, 'b': [1.0, None, {'c': None}], 'd': 'nan', 'e': 3}
