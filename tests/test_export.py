"""A finished run as a folder that plain timm loads, as ONNX, on the hub, and as the teacher of the next run."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import onnxruntime
import pytest
import timm
import torch
import yaml
from helpers import CLASSES, load, run, summary
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file, save_file
from timm.models import _hub

from timm_pe import export
from timm_pe.errors import UsageError

STUDENTS = ('test_resnet', 'test_vit', 'cifar_resnet8')
PLAIN_TIMM = """
import sys
sys.modules['timm_pe'] = sys.modules['train_distill'] = None  # as if it were not installed
import timm, torch
images, logits = torch.load(sys.argv[1], weights_only=True), {}
for folder in sys.argv[3:]:
    try:
        model = timm.create_model('local-dir:' + folder, pretrained=True).eval()
        logits[folder] = model(images).detach()
    except RuntimeError as e:
        logits[folder] = str(e)
torch.save(logits, sys.argv[2])
"""


@pytest.fixture(scope='module')
def runs(image_folder, tmp_path_factory) -> dict[str, Path]:
    """A finished run of each student."""
    root = tmp_path_factory.mktemp('runs')
    common = [str(image_folder), '--num-classes', '3', '--img-size', '32', '-b', '8', '-j', '0', '--device', 'cpu']
    common += ['--epochs', '2', '--warmup-epochs', '0', '--lr', '0.02', '--output', str(root)]
    common += ['--teacher', 'test_resnet', '--no-teacher-pretrained', '--no-teacher-eval', '--scale', '0.5', '1']
    for name in STUDENTS:
        run([*common, '--model', name, '--experiment', name, '--mean', '0.4', '0.5', '0.6', '--gp', 'avg'])
    return {name: root / name for name in STUDENTS}


@pytest.fixture(scope='module')
def folders(runs, tmp_path_factory) -> dict[str, Path]:
    """Each run exported, by the command, those of timm's architectures with ONNX."""
    root = tmp_path_factory.mktemp('exported')
    for name, folder in runs.items():
        onnx = [] if name.startswith('cifar') else ['--onnx']
        export.main([str(folder), '--output', str(root / name), '--license', 'apache-2.0', *onnx])
    return {name: root / name for name in runs}


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def logits_of(name: str, folder: Path, images: torch.Tensor) -> torch.Tensor:
    """What the student of a run says, built without the export."""
    kwargs = {'img_size': 32} if name == 'test_vit' else {}
    weights = folder / 'student.safetensors'
    model = timm.create_model(name, num_classes=3, global_pool='avg', checkpoint_path=str(weights), **kwargs).eval()
    with torch.inference_mode():
        return model(images)


def refused(argv: list, capsys) -> str:
    """The one line that the command ends with."""
    with pytest.raises(SystemExit) as e:
        export.main([str(word) for word in argv])
    err = capsys.readouterr().err
    assert e.value.code == 2
    assert 'Traceback' not in err
    assert err.splitlines()[-1].startswith('python -m timm_pe.export: error: ')
    return err.splitlines()[-1]


def test_plain_timm_loads_the_folders_and_says_the_same(runs, folders, images, tmp_path):
    torch.save(images, tmp_path / 'images.pth')
    files = [str(tmp_path / 'images.pth'), str(tmp_path / 'logits.pth'), *map(str, folders.values())]
    subprocess.run([sys.executable, '-c', PLAIN_TIMM, *files], check=True, cwd=tmp_path, timeout=300)
    logits = torch.load(tmp_path / 'logits.pth', weights_only=True)
    for name in ('test_resnet', 'test_vit'):
        assert torch.equal(logits[str(folders[name])], logits_of(name, runs[name], images)), name
    # a network of the zoo is unknown there, which its card says
    assert 'Unknown model' in logits[str(folders['cifar_resnet8'])]
    card = (folders['cifar_resnet8'] / 'README.md').read_text()
    assert '\nimport timm_pe ' in card
    assert '`import timm_pe` is needed' in card
    assert 'import timm_pe' not in (folders['test_vit'] / 'README.md').read_text()
    zoo = timm.create_model(f'local-dir:{folders["cifar_resnet8"]}', pretrained=True).eval()
    with torch.inference_mode():
        assert torch.equal(zoo(images), logits_of('cifar_resnet8', runs['cifar_resnet8'], images))


def test_the_student_of_split_batch_norms_is_its_main_ones_for_plain_timm_export_and_evaluation(
    small_run, tmp_path, capsys
):
    split = ['--model', 'test_resnet', '--aug-splits', '2', '--split-bn', '--aa', 'rand-m3', '--loss', 'jsd']
    run([*small_run, *split, '--drop', '0.1'])
    folder = tmp_path / 'run'
    rows = summary(folder)
    best = max(rows, key=lambda row: float(row['eval_top1']))
    plain = timm.create_model('test_resnet', num_classes=3, checkpoint_path=str(folder / 'student.safetensors'))
    saved = load(folder / 'model_best.pth.tar')['state_dict']
    assert sum('aux_bn' in key for key in saved) == 75  # the checkpoint stays timm's
    assert all(torch.equal(value, saved[key]) for key, value in plain.state_dict().items())
    on_cpu = ['--device', 'cpu', '-b', '8', '-j', '0']
    for file in ('student.safetensors', 'model_best.pth.tar'):
        said = run([*on_cpu, '--evaluate', str(folder / file)], capsys)
        assert f'top-1 {float(best["eval_top1"]):.3f} %' in said
        assert f'loss {float(best["eval_loss"]):.4f}' in said
        assert ('75 weights of auxiliary batch norms are left out' in said) == (file == 'model_best.pth.tar')
    # a student of before, with all of them
    save_file(saved, folder / 'student.safetensors', metadata={'format': 'pt'})
    export.main([str(folder), '--output', str(tmp_path / 'exported')])
    exported = timm.create_model(f'local-dir:{tmp_path / "exported"}', pretrained=True)
    assert all(torch.equal(value, saved[key]) for key, value in exported.state_dict().items())
    # goes on where it was, with all of them
    run([*small_run, *split, '--drop', '0.1', '--epochs', '3', '--resume', str(folder)])
    assert [row['epoch'] for row in summary(folder)] == ['0', '1', '2']


@pytest.mark.parametrize('name', STUDENTS)
def test_the_configuration_says_how_the_student_was_fed_and_names_its_classes(name, folders):
    config = json.loads((folders[name] / 'config.json').read_text())
    assert config['architecture'] == name
    assert config['num_classes'] == 3
    assert tuple(config['label_names']) == CLASSES
    assert config['pretrained_cfg']['input_size'] == [3, 32, 32]
    assert config['pretrained_cfg']['mean'] == [0.4, 0.5, 0.6]
    assert config['pretrained_cfg']['license'] == 'apache-2.0'
    model = timm.create_model(f'local-dir:{folders[name]}', pretrained=True)
    assert timm.data.resolve_model_data_config(model)['mean'] == [0.4, 0.5, 0.6]


@pytest.mark.parametrize('name', STUDENTS)
def test_the_card_says_teacher_method_data_metrics_command_and_licence(name, runs, folders):
    card = (folders[name] / 'README.md').read_text()
    head = yaml.safe_load(card.split('---')[1])
    assert head['license'] == 'apache-2.0'
    assert 'knowledge-distillation' in head['tags']
    assert '**Teacher:** `test_resnet`' in card
    assert '3 × linear' in card
    best = max(summary(runs[name]), key=lambda row: float(row['eval_top1']))
    assert f'top-1 {float(best["eval_top1"]):.3f} %' in card
    assert f'(epoch {int(best["epoch"]) + 1},' in card
    assert f'--model {name}' in card
    # the folders of this machine are nobody's business
    assert str(runs[name].parent.parent) not in card


@pytest.mark.parametrize('name', ['test_resnet', 'test_vit'])
def test_onnx_says_the_same_as_pytorch_for_any_batch(name, runs, folders, images):
    session = onnxruntime.InferenceSession(folders[name] / 'model.onnx', providers=['CPUExecutionProvider'])
    expected = logits_of(name, runs[name], images)
    for number in (1, 2, 5):
        logits = torch.from_numpy(session.run(None, {'image': images[:number].numpy()})[0])
        torch.testing.assert_close(logits, expected[:number], rtol=0, atol=1e-4)
    assert not (folders['cifar_resnet8'] / 'model.onnx').exists()


def test_onnx_that_says_something_else_is_not_written(runs, tmp_path, monkeypatch, capsys):
    exporter = torch.onnx.export

    def off_by_a_little(model, *args, **kwargs):
        with torch.no_grad():
            model.fc.bias += 0.01
        exporter(model, *args, **kwargs)
        with torch.no_grad():
            model.fc.bias -= 0.01

    monkeypatch.setattr(torch.onnx, 'export', off_by_a_little)
    error = refused([runs['test_resnet'], '--output', tmp_path / 'out', '--onnx'], capsys)
    assert 'computes something else' in error
    assert list(tmp_path.iterdir()) == []


def test_a_network_that_cannot_be_exported_is_told_by_the_reason_beneath(runs, tmp_path, monkeypatch, capsys):
    def fails(*args, **kwargs):
        try:
            raise KeyError('no ONNX function for aten.odd')
        except KeyError as e:
            raise RuntimeError('a page of advice') from e

    monkeypatch.setattr(torch.onnx, 'export', fails)
    error = refused([runs['test_resnet'], '--output', tmp_path / 'out', '--onnx'], capsys)
    assert error.endswith("--onnx: cannot export test_resnet: 'no ONNX function for aten.odd'")
    assert list(tmp_path.iterdir()) == []


def test_a_missing_onnx_package_is_named_with_its_remedy(runs, tmp_path, monkeypatch, capsys):
    find_spec = export.importlib.util.find_spec
    monkeypatch.setattr(export.importlib.util, 'find_spec', lambda n: None if n == 'onnxruntime' else find_spec(n))
    error = refused([runs['test_resnet'], '--output', tmp_path / 'out', '--onnx'], capsys)
    assert "--onnx needs onnxruntime: pip install 'timm_pe[export]'" in error


@pytest.mark.parametrize('by', ['local-dir', 'run folder'])
def test_an_exported_student_teaches_the_next_run(by, runs, folders, small_run, tmp_path, capsys):
    if by == 'local-dir':
        teacher = ['--teacher', f'local-dir:{folders["test_vit"]}']
    else:
        teacher = ['--teacher', 'test_vit', '--teacher-checkpoint', str(runs['test_vit'])]
    said = run([*small_run, '--model', 'test_resnet', '--epochs', '1', *teacher], capsys)
    best = max(float(row['eval_top1']) for row in summary(runs['test_vit']))
    assert f'Teacher: top-1 {best:.3f} %' in said
    assert '0.4 0.5 0.6' in said  # its own normalization
    assert float(summary(tmp_path / 'run')[0]['train_pe_loss']) > 0


# What users type -------------------------------------------------------------------------------------------------------


def test_a_student_that_began_as_an_exported_folder_is_exported_with_the_classes_of_its_data(
    folders, small_run, images, tmp_path
):
    flags = ['--dataset', 'sklearn/digits', *small_run[3:]]  # 10 classes, of which no flag tells, and 3 in the folder
    assert '--num-classes' not in flags
    run([*flags, '--model', f'local-dir:{folders["test_vit"]}', '--pretrained', '--epochs', '1', '--gp', 'avg'])
    export.main([str(tmp_path / 'run'), '--output', str(tmp_path / 'exported'), '--license', 'apache-2.0'])
    again = timm.create_model(f'local-dir:{tmp_path / "exported"}', pretrained=True).eval()
    assert again(images).shape[1] == again.num_classes == 10
    assert torch.equal(again.head.weight, load_file(tmp_path / 'run' / 'student.safetensors')['head.weight'])


def copy_of(folder: Path, to: Path, **settings) -> Path:
    """A run folder with other settings in its args.yaml."""
    shutil.copytree(folder, to)
    args = yaml.safe_load((to / 'args.yaml').read_text())
    (to / 'args.yaml').write_text(yaml.safe_dump({**args, **settings}))
    return to


def test_a_torch_whose_exporter_is_too_old_is_named(runs, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch, '__version__', type(torch.__version__)('2.6.0+cpu'))
    error = refused([runs['test_resnet'], '--output', tmp_path / 'out', '--onnx'], capsys)
    assert '--onnx needs torch 2.7 or newer, this is 2.6.0' in error


def test_the_card_predicts_one_image_by_code_that_works(folders, image_folder, tmp_path, monkeypatch, capsys):
    card = (folders['test_vit'] / 'README.md').read_text()
    code = re.search(r'```python\n(import timm.*?)\n```', card, re.DOTALL)[1]
    monkeypatch.chdir(tmp_path)
    shutil.copytree(folders['test_vit'], 'FOLDER')
    Image.open(image_folder / 'val' / 'cat' / '0.png').save('image.jpg', quality=100)
    exec(compile(code, 'card', 'exec'), {})  # noqa: S102  that is the contract
    said = [line.split(': ') for line in capsys.readouterr().out.splitlines()]
    assert sorted(name for name, _ in said) == ['ant', 'bee', 'cat']
    assert sum(float(score) for _, score in said) == pytest.approx(1, abs=0.01)


def test_the_card_shows_how_to_run_onnx_where_it_is(runs):
    student = export.read_student(runs['test_resnet'])
    assert 'onnxruntime' not in export.model_card(student, 'mit')['usage']
    assert "onnxruntime.InferenceSession('FOLDER/model.onnx')" in export.model_card(student, 'mit', onnx=True)['usage']


def test_the_card_says_classes_validation_images_and_limits(folders):
    card = (folders['test_resnet'] / 'README.md').read_text()
    assert '**Classes:** 3: `ant`, `bee`, `cat`' in card
    assert '**Validated on:** split `validation`, 12 images' in card
    assert '## Limitations' in card


def test_a_hub_reads_what_was_measured_off_the_metadata(runs, folders):
    best = max(summary(runs['test_resnet']), key=lambda row: float(row['eval_top1']))
    results = ModelCard((folders['test_resnet'] / 'README.md').read_text()).data.eval_results
    assert [(r.task_type, r.metric_type, r.metric_name) for r in results] == [
        ('image-classification', 'accuracy', 'top-1')
    ]
    assert results[0].metric_value == float(best['eval_top1'])
    assert results[0].dataset_split == 'validation'
    assert str(runs['test_resnet'].parent) not in str(results)


def test_the_card_has_the_student_alone_beside_it_where_a_run_of_the_same_folder_tells(runs, small_run, tmp_path):
    taught = copy_of(runs['test_resnet'], tmp_path / 'taught')
    assert 'Student alone' not in export.model_card(export.read_student(taught), 'mit')['details']
    alone = copy_of(taught, tmp_path / 'alone', experiment='alone', teacher=None, teacher_checkpoint=None)
    rows = summary(taught)
    final = float(rows[-1]['eval_top1'])
    text = (alone / 'summary.csv').read_text().splitlines()
    at = text[0].split(',').index('eval_top1')
    cells = text[-1].split(',')
    cells[at] = str(final - 10)
    (alone / 'summary.csv').write_text('\n'.join([*text[:-1], ','.join(cells)]) + '\n')
    said = export.model_card(export.read_student(taught), 'mit')['details']['Student alone']
    assert said.startswith(
        f'top-1 {final - 10:.3f} % after its last epoch; with the teacher {final:.3f} % after the last (+10.000 points'
    )
    # of other conditions there is no difference
    copy_of(alone, tmp_path / 'other', batch_size=4)
    shutil.rmtree(alone)
    assert 'Student alone' not in export.model_card(export.read_student(taught), 'mit')['details']


def test_what_users_typed_cannot_write_markdown_or_html(runs, tmp_path):
    hostile = 'x`` ` ```</code><script>alert(1)</script>[a](javascript:b) # h'
    folder = copy_of(runs['test_resnet'], tmp_path / 'run', experiment=hostile, data_dir=f'/a/{hostile}', data='')
    export.main([str(folder), '--output', str(tmp_path / 'out')])
    card = (tmp_path / 'out' / 'README.md').read_text()
    assert hostile in card
    outside = re.sub(r'^(`{3,})\w*\n.*?\n\1$', '', card, flags=re.DOTALL | re.MULTILINE)
    outside = re.sub(r'(?<!`)(`+)(?!`).*?(?<!`)\1(?!`)', '', outside)
    assert not re.search(r'<|\]\(|javascript:', outside)
    assert '## Training' in outside
    assert yaml.safe_load(card.split('---')[1])['license'] == 'unknown'


def test_the_names_of_the_classes_are_those_the_run_learnt_whatever_its_data_are_now(runs, image_folder, tmp_path):
    shutil.copytree(image_folder, tmp_path / 'images')
    for split in ('train', 'val'):
        shutil.copytree(tmp_path / 'images' / split / 'ant', tmp_path / 'images' / split / 'aardvark')
    folder = copy_of(runs['test_resnet'], tmp_path / 'run', data=str(tmp_path / 'images'))
    export.main([str(folder), '--output', str(tmp_path / 'out')])
    assert tuple(json.loads((tmp_path / 'out' / 'config.json').read_text())['label_names']) == CLASSES


def test_data_that_is_gone_costs_a_run_without_checkpoints_the_names_of_the_classes(
    runs, image_folder, tmp_path, capsys
):
    folder = copy_of(runs['test_resnet'], tmp_path / 'run', data=str(tmp_path / 'gone'))
    for file in folder.glob('*.pth.tar'):
        file.unlink()
    export.main([str(folder), '--output', str(tmp_path / 'out')])
    assert 'What the data tell is left out of the card' in capsys.readouterr().err
    assert 'label_names' not in json.loads((tmp_path / 'out' / 'config.json').read_text())
    export.main([str(folder), '--output', str(tmp_path / 'out'), '--overwrite', '--data-dir', str(image_folder)])
    assert tuple(json.loads((tmp_path / 'out' / 'config.json').read_text())['label_names']) == CLASSES


def test_what_is_no_run_folder_is_refused_with_what_is_missing(runs, tmp_path, capsys):
    out = tmp_path / 'out'
    (tmp_path / 'empty').mkdir()
    assert 'it has no args.yaml' in refused([tmp_path / 'nothing', '--output', out], capsys)
    assert 'it has no args.yaml' in refused([tmp_path / 'empty', '--output', out], capsys)
    for file in ('student.safetensors', 'summary.csv'):
        folder = copy_of(runs['test_resnet'], tmp_path / file)
        (folder / file).unlink()
        assert f'it has no {file}' in refused([folder, '--output', out], capsys)
    assert not out.exists()


def test_weights_that_cannot_be_read_or_do_not_fit_are_refused(runs, tmp_path, capsys):
    folder = copy_of(runs['test_resnet'], tmp_path / 'run')
    (folder / 'student.safetensors').write_bytes(b'no safetensors at all')
    assert 'cannot read' in refused([folder, '--output', tmp_path / 'out'], capsys)
    shutil.copy(runs['test_vit'] / 'student.safetensors', folder)
    assert 'does not fit ResNet' in refused([folder, '--output', tmp_path / 'out'], capsys)
    (folder / 'summary.csv').write_text('epoch,eval_top1\n0,many\n')
    shutil.copy(runs['test_resnet'] / 'student.safetensors', folder)
    assert 'summary.csv' in refused([folder, '--output', tmp_path / 'out'], capsys)
    assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize(
    ('argv', 'said'),
    [
        ([], '--output DIR, --push-to-hub OWNER/NAME, or both'),
        (['--push-to-hub', 'me/x', '--onnx'], '--onnx needs --output'),
        (['--output', 'OUT', '--private'], '--private needs --push-to-hub'),
        (['--push-to-hub', 'no_owner'], 'takes OWNER/NAME'),
        (['--push-to-hub', '../x/y'], 'takes OWNER/NAME'),
        (['--output', 'OUT', '--license', 'mit\nfoo: bar'], '--license takes an identifier'),
        (['--output', 'OUT', '--format', 'tflite'], 'unknown argument --format'),
    ],
)
def test_flags_that_cannot_work_are_refused_before_any_work(argv, said, runs, tmp_path, capsys):
    argv = [str(tmp_path / 'out') if word == 'OUT' else word for word in argv]
    assert said in refused([runs['test_resnet'], *argv], capsys)
    assert not (tmp_path / 'out').exists()


def test_what_is_in_the_way_is_left_alone(runs, tmp_path, capsys):
    file, folder, link = tmp_path / 'file', tmp_path / 'folder', tmp_path / 'link'
    file.write_text('mine')
    folder.mkdir()
    (folder / 'thesis.txt').write_text('mine')
    link.symlink_to(folder)
    run_folder = runs['test_resnet']
    assert 'is no folder' in refused([run_folder, '--output', file], capsys)
    assert 'is no folder' in refused([run_folder, '--output', link], capsys)
    assert 'is not empty' in refused([run_folder, '--output', folder], capsys)
    assert "holds 'thesis.txt'" in refused([run_folder, '--output', folder, '--overwrite'], capsys)
    assert 'is not empty' in refused([run_folder, '--output', run_folder], capsys)
    assert 'it holds' in refused([run_folder, '--output', run_folder, '--overwrite'], capsys)
    assert 'cannot write' in refused([run_folder, '--output', file / 'below'], capsys)
    assert (file.read_text(), (folder / 'thesis.txt').read_text()) == ('mine', 'mine')


def test_an_error_leaves_nothing_and_the_earlier_export_as_it_was(runs, folders, tmp_path, monkeypatch, capsys):
    out = tmp_path / 'out'
    shutil.copytree(folders['test_resnet'], out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}

    def fails(*args):
        raise UsageError('no luck')

    monkeypatch.setattr(export, '_check_folder', fails)
    assert 'no luck' in refused([runs['test_vit'], '--output', out, '--overwrite'], capsys)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert 'no luck' in refused([runs['test_vit'], '--output', tmp_path / 'new'], capsys)
    assert os.listdir(tmp_path) == ['out']


def test_a_move_that_fails_gives_the_earlier_export_back(runs, folders, tmp_path, monkeypatch, capsys):
    out = tmp_path / 'out'
    shutil.copytree(folders['test_resnet'], out)
    replace = os.replace

    def fails_on_the_new_one(src, dst):
        if Path(src).name == 'new':
            raise OSError(28, 'No space left on device')
        replace(src, dst)

    monkeypatch.setattr(os, 'replace', fails_on_the_new_one)
    error = refused([runs['test_vit'], '--output', out, '--overwrite'], capsys)
    assert 'No space left on device' in error
    assert json.loads((out / 'config.json').read_text())['architecture'] == 'test_resnet'
    assert os.listdir(tmp_path) == ['out']


def test_overwrite_replaces_an_earlier_export_with_all_its_files(runs, folders, tmp_path):
    out = tmp_path / 'out'
    shutil.copytree(folders['test_resnet'], out)
    export.main([str(runs['test_vit']), '--output', str(out), '--overwrite'])
    assert json.loads((out / 'config.json').read_text())['architecture'] == 'test_vit'
    assert sorted(os.listdir(out)) == ['README.md', 'config.json', 'model.safetensors']
    assert os.listdir(tmp_path) == ['out']


def test_a_folder_that_timm_makes_another_model_of_is_not_written(runs, tmp_path, monkeypatch, capsys):
    save = export.save_for_hf

    def saves_something_else(model, folder, **kwargs):
        save(model, folder, **kwargs)
        weights = load_file(Path(folder) / 'model.safetensors')
        save_file({**weights, 'fc.bias': weights['fc.bias'] + 1e-6}, Path(folder) / 'model.safetensors')

    monkeypatch.setattr(export, 'save_for_hf', saves_something_else)
    assert 'another model' in refused([runs['test_resnet'], '--output', tmp_path / 'out'], capsys)
    assert list(tmp_path.iterdir()) == []


# The hub ---------------------------------------------------------------------------------------------------------------


class FakeApi:
    """What timm asks of huggingface_hub when it uploads, and what it was asked."""

    asked: dict = {}

    def __init__(self, token=None, **kwargs):
        self.asked['token'] = token

    def create_repo(self, repo_id, private, exist_ok):
        self.asked['private'] = private
        return type('Repo', (), {'repo_id': repo_id})

    def file_exists(self, **kwargs):
        return False

    def upload_folder(self, repo_id, folder_path, **kwargs):
        self.asked['files'] = {path.name: path.read_bytes() for path in Path(folder_path).iterdir()}
        return f'https://hub/{repo_id}/commit/1'


def test_push_uploads_the_folder_through_timm(runs, folders, monkeypatch, capsys):
    monkeypatch.setattr(_hub, 'HfApi', FakeApi)
    argv = [str(runs['test_resnet']), '--push-to-hub', 'me/student', '--private', '--license', 'apache-2.0']
    export.main(argv)
    assert capsys.readouterr().out.strip() == 'https://hub/me/student/commit/1'
    assert FakeApi.asked['private'] is True
    assert FakeApi.asked['token'] is None  # huggingface_hub finds it in the environment
    files = FakeApi.asked['files']
    assert set(files) == {'model.safetensors', 'config.json', 'README.md'}  # nothing pickled
    for name in ('model.safetensors', 'config.json'):
        assert files[name] == (folders['test_resnet'] / name).read_bytes()
    assert b'license: apache-2.0' in files['README.md']
    assert '3 × linear' in files['README.md'].decode()


def test_timm_loads_a_folder_from_the_hub_as_it_was_written(runs, folders, images, monkeypatch):
    folder = folders['test_vit']
    monkeypatch.setattr(_hub, 'hf_hub_download', lambda repo_id, filename, **kwargs: str(folder / filename))
    model = timm.create_model('hf-hub:me/student', pretrained=True).eval()
    with torch.inference_mode():
        assert torch.equal(model(images), logits_of('test_vit', runs['test_vit'], images))


def test_a_hub_that_cannot_be_reached_is_one_line_without_the_token(runs, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv('HF_TOKEN', 'hf_secret0123456789')
    out = tmp_path / 'out'
    error = refused([runs['test_resnet'], '--output', out, '--push-to-hub', 'me/student'], capsys)
    assert "--push-to-hub: 'me/student' could not be uploaded" in error
    assert 'HF_TOKEN' in error
    assert 'secret' not in error
    assert (out / 'model.safetensors').is_file()  # what was written before is whole


def test_the_card_quotes_the_row_of_the_weights_after_terms_were_added_on_a_resume(image_folder, tmp_path):
    argv = [str(image_folder), '--num-classes', '3', '--img-size', '32', '-b', '8', '-j', '0', '--device', 'cpu']
    argv += ['--epochs', '3', '--warmup-epochs', '0', '--lr', '0.02', '--output', str(tmp_path), '--experiment', 'run']
    argv += ['--model', 'test_resnet', '--teacher', 'test_resnet', '--no-teacher-pretrained', '--no-teacher-eval']
    argv += ['--teacher-num-classes', '3', '--resume', 'auto']
    run([*argv, '--stop-epoch', '2'])
    best = max(summary(tmp_path / 'run'), key=lambda row: float(row['eval_top1']))
    # at such a rate the last epoch is the worst
    run([*argv, '--kd-loss-weight', '1', '--no-resume-opt', '--lr', '5'])
    assert [row['epoch'] for row in summary(tmp_path / 'run')] == ['2']
    last = summary(tmp_path / 'run')[0]
    assert float(last['eval_top1']) < float(best['eval_top1'])
    card = export.model_card(export.read_student(tmp_path / 'run'), 'mit')['details']['Validation']
    assert f'top-1 {float(best["eval_top1"]):.3f} %' in card
    assert (
        f'(epoch {int(best["epoch"]) + 1}, the best of 3 validated by top1; the last one has {float(last["eval_top1"]):.3f})'
        in card
    )
