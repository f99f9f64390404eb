"""The precision that --teacher-dtype auto takes, from where, and that nothing of a run depends on how it was found."""

import dataclasses
import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch
import torch.nn as nn
import yaml
from helpers import load, refused, run
from survive import compare, differences

from timm_pe import ProjectorEnsembleTask, Teacher, analysis, create_teacher, precompute
from timm_pe.config.run_config import parse_config
from timm_pe.process.runtime import Runtime, setup_runtime
from timm_pe.run_folder import RunFolder
from timm_pe.runs.reopen import Options, open_run
from timm_pe.train import checkpoints, teacher_precision
from timm_pe.train.teacher_precision import choose_precision, settle_precision

PAIR = ['--model', 'test_resnet', '--teacher', 'test_vit', '--no-teacher-pretrained', '--teacher-num-classes', '3']
AUTO = '--teacher-dtype auto is '
AMP = ['--amp', '--amp-dtype', 'bfloat16']


@pytest.fixture
def argv(small_run) -> list[str]:
    return [*small_run, *PAIR]


@pytest.fixture
def slow_bfloat16():
    """A function that makes this CPU one without bfloat16, until the end of the test."""
    with pytest.MonkeyPatch.context() as patch:
        yield lambda: patch.setattr(teacher_precision, 'has_fast_bfloat16', lambda device: False)


@pytest.fixture
def never_measured(monkeypatch):
    monkeypatch.setattr(teacher_precision, '_measure', lambda *args: pytest.fail('it was measured'))


def folder_of(argv, name, *more) -> Path:
    """The folder of a run of its own."""
    run([*argv, '--experiment', name, *more])
    return Path(argv[argv.index('--output') + 1]) / name


def precision_of(folder: Path) -> str | None:
    return load(folder / 'last.pth.tar')['saver']['run']['teacher_precision']


def assert_trained_alike(a: Path, b: Path):
    parts = ('state_dict', 'task_state', 'optimizer')
    mine, other = ({k: load(folder / 'last.pth.tar')[k] for k in parts} for folder in (a, b))
    assert differences(mine, other, '') == []


# What is decided ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    'more',
    [
        [],
        ['--teacher-input-size', '48', '--channels-last'],
        ['--teacher', 'test_resnet', '--kd-loss-weight', '1', '--model-ema', '--grad-accum-steps', '2'],
        ['--teacher', 'cifar_resnet8', '--torchcompile', 'eager', '--epochs', '1'],
        ['--model-dtype', 'bfloat16', '--epochs', '1'],
        [*AMP, '--epochs', '1'],
    ],
    ids=' '.join,
)
def test_where_bfloat16_is_fast_the_run_is_that_of_teacher_dtype_bfloat16_bit_for_bit(
    more, argv, fast_bfloat16, capsys
):
    folder = folder_of(argv, 'auto', *more)
    said = capsys.readouterr().err
    cosine = r'the lowest cosine of bfloat16 to float32 on the first batch is (0\.999\d{3}|1\.0{6})'
    assert re.search(rf'{AUTO}bfloat16: {cosine}\.\n', said)
    assert re.search(r'precision .* bfloat16 \(auto\)\n', said)
    assert precision_of(folder) == 'bfloat16'
    assert yaml.safe_load((folder / 'args.yaml').read_text())['teacher_dtype'] == 'auto'
    assert_trained_alike(folder, folder_of(argv, 'given', *more, '--teacher-dtype', 'bfloat16'))


@pytest.mark.parametrize(('more', 'precision'), [([], 'float32'), (AMP, 'AMP bfloat16')])
def test_a_cosine_that_is_too_low_leaves_the_run_as_on_a_device_that_is_not_fast(
    more, precision, argv, fast_bfloat16, slow_bfloat16, monkeypatch, capsys
):
    argv = [*argv, *more, '--epochs', '1']
    monkeypatch.setattr(teacher_precision, 'LEAST_COSINE', 1.0)
    declined = folder_of(argv, 'declined')
    assert f'{AUTO}{precision}: the lowest cosine of bfloat16 to float32 on the first batch is 0.' in (
        capsys.readouterr().err
    )
    slow_bfloat16()
    slow = folder_of(argv, 'slow')
    said = capsys.readouterr().err
    assert AUTO not in said
    assert re.search(rf'precision .* {precision}\n', said)
    assert precision_of(declined) == precision_of(slow) == precision
    assert_trained_alike(declined, slow)
    if not more:
        assert_trained_alike(slow, folder_of(argv, 'given', '--teacher-dtype', 'float32'))


def test_teacher_dtype_float32_is_float32_under_amp_too(argv, fast_bfloat16, never_measured):
    assert precision_of(folder_of(argv, 'given', *AMP, '--teacher-dtype', 'float32', '--epochs', '1')) == 'float32'


def test_in_python_a_teacher_keeps_its_own_precision(fast_bfloat16):
    network = timm.create_model('test_vit', num_classes=3)
    task = ProjectorEnsembleTask(timm.create_model('test_resnet', num_classes=3), network, verbose=False)
    for teacher in (task.teacher, create_teacher('test_vit', pretrained=False)):
        assert teacher.dtype is None
        assert teacher(torch.rand(2, 3, 160, 160)).feature.dtype == torch.float32


class Network(nn.Module):
    """A network whose outputs in bfloat16 are what `odd` makes of them."""

    def __init__(self, odd=None, odd_logits=None):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.fc = nn.Conv2d(3, 8, 3), nn.Linear(8, 5)
        self.odd, self.odd_logits = odd, odd_logits

    def forward(self, x):
        low = x.dtype != torch.float32
        x = self.conv(x).mean((2, 3))
        logits = self.fc(self.odd(x) if self.odd and low else x)
        return self.odd_logits(logits) if self.odd_logits and low else logits


def settle(network, *flags, needs_logits=False, images=None, device='cpu'):
    """The teacher that `network` makes, its precision settled; and why."""
    config = parse_config(['--dataset', 'sklearn/digits', '--device', 'cpu', '--teacher', 'test_vit', *flags])
    runtime = dataclasses.replace(setup_runtime(config), device=torch.device(device))
    teacher = Teacher(network, tap='fc', needs_logits=needs_logits)
    images = torch.rand(4, 3, 8, 8) if images is None else images
    return teacher, choose_precision(config, teacher, runtime, lambda: (images, None))


def fails(x):
    raise NotImplementedError('"strange_op" not implemented for this type')


@pytest.mark.parametrize(
    ('odd', 'why'),
    [
        (fails, 'in bfloat16 it fails ("strange_op" not implemented for this type)'),
        (lambda x: x / 0, 'in bfloat16 its outputs on the first batch are not finite'),
        (lambda x: x * torch.nan, 'in bfloat16 its outputs on the first batch are not finite'),
        (lambda x: torch.cat([x[:3], -x[3:]]), 'the lowest cosine of bfloat16 to float32 on the first batch is -0.99'),
    ],
)
def test_a_network_that_bfloat16_does_not_suit_stays_in_float32(odd, why, fast_bfloat16):
    teacher, said = settle(Network(odd))
    assert said.startswith(why)
    assert teacher.precision == 'float32'
    assert {p.dtype for p in teacher.model.parameters()} == {torch.float32}
    assert teacher(torch.rand(2, 3, 8, 8)).feature.isfinite().all()


def test_logits_count_exactly_where_a_loss_reads_them(fast_bfloat16):
    assert settle(Network(odd_logits=torch.neg))[0].precision == 'bfloat16'
    assert settle(Network(odd_logits=torch.neg), needs_logits=True)[0].precision == 'float32'


def test_too_little_memory_is_no_reason_for_float32(fast_bfloat16):
    def out_of_memory(x):
        raise torch.OutOfMemoryError

    with pytest.raises(torch.OutOfMemoryError):
        settle(Network(out_of_memory))


def test_features_that_are_all_zero_in_both_precisions_are_equal(fast_bfloat16):
    network = Network()
    nn.init.zeros_(network.conv.bias)
    assert settle(network, images=torch.zeros(2, 3, 8, 8))[0].precision == 'bfloat16'


def test_a_network_without_parameters_takes_the_precision_too(fast_bfloat16):
    class Buffers(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer('scale', torch.tensor([1.0, 2.0, 3.0]))
            self.fc = nn.Identity()
            self.fc.in_features = 3

        def forward(self, x):
            return self.fc(x.mean((2, 3)) * self.scale)

    teacher, _ = settle(Buffers())
    assert teacher(torch.rand(2, 3, 8, 8)).feature.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ('flags', 'precision'), [([], 'float32'), (['--amp'], 'AMP float16'), (AMP, 'bfloat16')], ids=str
)
def test_on_cuda_it_is_that_of_amp_and_float16_only_under_autocast(flags, precision, monkeypatch):
    """A network that is all float16 may overflow in a later batch than the first."""
    monkeypatch.setattr(teacher_precision, '_measure', lambda *args: (1.0, f'{args[2]} was measured'))
    teacher, why = settle(Network(), *flags, device='cuda')
    assert teacher.precision == precision
    assert why == ('torch.bfloat16 was measured' if precision == 'bfloat16' else '')


@pytest.mark.parametrize(('other', 'precision'), [((0.9995, 'fine'), 'bfloat16'), ((0.5, 'bad'), 'float32')])
def test_ranks_decide_alike_by_the_lowest_cosine_of_all(other, precision, fast_bfloat16, monkeypatch):
    monkeypatch.setattr(Runtime, 'gather', lambda self, own: [own, other])
    teacher, why = settle(Network())
    assert (teacher.precision, why) == (precision, other[1])


def test_what_rank_0_goes_on_with_holds_for_all(monkeypatch):
    monkeypatch.setattr(Runtime, 'share', lambda self, own: ('bfloat16', 'as in the teacher cache'))
    config = parse_config(['--dataset', 'sklearn/digits', '--device', 'cpu', '--teacher', 'test_vit'])
    teacher = Teacher(Network(), tap='fc')
    parts = SimpleNamespace(config=config, runtime=setup_runtime(config), teachers=[teacher], checkpoint='')
    settle_precision(parts, {}, lambda: pytest.fail('it was measured'))
    assert teacher.precision == 'bfloat16'


# A run that goes on ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('more', [[], AMP])
def test_a_resumed_run_keeps_the_precision_on_another_device_too_and_ends_bit_equal(
    more, argv, fast_bfloat16, slow_bfloat16, monkeypatch, capsys
):
    argv = [*argv, *more]
    whole = folder_of(argv, 'whole')
    folder_of(argv, 'stopped', '--stop-epoch', '1')
    monkeypatch.setattr(teacher_precision, '_measure', lambda *args: pytest.fail('it was measured'))
    slow_bfloat16()
    capsys.readouterr()
    resumed = folder_of(argv, 'stopped', '--resume', 'auto')
    said = capsys.readouterr().err
    assert f'{AUTO}bfloat16: as in the checkpoint.' in said
    assert said.count('bfloat16 is not fast on this device: the teacher keeps it, for the same numbers.') == 1
    assert 'differ' not in said
    assert compare(whole, resumed) == []


@pytest.mark.parametrize(
    ('more', 'precision'),
    [([], 'float32'), (AMP, 'AMP bfloat16'), (['--teacher-dtype', 'float16'], 'float16')],
)
def test_a_run_of_an_earlier_commit_goes_on_in_what_it_had(
    more, precision, argv, fast_bfloat16, slow_bfloat16, never_measured, capsys
):
    of_before = ['--teacher-dtype', 'float32'] if not more else []
    argv = [*argv, *(more if precision == 'AMP bfloat16' else [])]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(teacher_precision, 'has_fast_bfloat16', lambda device: False)
        folder = folder_of(argv, 'run', '--stop-epoch', '1', *more, *of_before)
    file = folder / 'last.pth.tar'
    checkpoint = load(file)
    del checkpoint['saver']['run']['teacher_precision']
    if precision != 'float16':
        checkpoint['args'].teacher_dtype = None
    torch.save(checkpoint, file)
    capsys.readouterr()
    run([*argv, '--resume', 'auto', '--experiment', 'run'])
    said = capsys.readouterr().err
    assert f'{AUTO}{precision}: as in the checkpoint.' in said
    assert ('flags that differ' in said) == (precision == 'float16')
    assert precision_of(folder) == precision


def test_a_checkpoint_of_another_teacher_decides_nothing(argv, fast_bfloat16, capsys):
    folder = folder_of(argv, 'run', '--teacher-dtype', 'float32', '--epochs', '1')
    anew = ['--resume', str(folder), '--no-resume-opt', '--start-epoch', '0', '--epochs', '1']
    assert precision_of(folder_of(argv, 'same', *anew)) == 'float32'
    assert precision_of(folder_of(argv, 'other', *anew, '--teacher', 'test_convnext')) == 'bfloat16'


@pytest.mark.parametrize('odd', ['int8', 'AMP', 5])
def test_a_precision_that_is_none_is_refused(odd, argv, capsys):
    folder = folder_of(argv, 'run', '--stop-epoch', '1')
    checkpoint = load(folder / 'last.pth.tar')
    checkpoint['saver']['run']['teacher_precision'] = odd
    torch.save(checkpoint, folder / 'last.pth.tar')
    said = refused([*argv, '--experiment', 'run', '--resume', str(folder)], capsys)
    assert f"is no training checkpoint: the teacher's precision is {odd!r}" in said


def test_an_analysis_runs_the_teacher_as_the_run_did(small_run, fast_bfloat16, slow_bfloat16):
    argv = [*small_run, '--model', 'test_resnet', '--epochs', '1']
    alone = folder_of(argv, 'alone')
    folder = folder_of(argv, 'run', '--teacher-checkpoint', str(alone))
    slow_bfloat16()
    for opened in (open_run(RunFolder(folder), Options()), open_run(RunFolder(alone), Options(), [RunFolder(folder)])):
        assert opened.teachers[0].precision == 'bfloat16'
    assert analysis.analyze(folder)['cosine']['validation']
    assert checkpoints.saved_precisions(str(folder / 'last.pth.tar'), 1) == ['bfloat16']


# A cache --------------------------------------------------------------------------------------------------------------


def manifest(folder: Path) -> dict:
    return json.loads((folder / 'manifest.json').read_text())


@pytest.mark.parametrize(
    ('filled_with', 'precision', 'read_with'),
    [
        (['--teacher-dtype', 'float32'], 'float32', []),
        (['--teacher-dtype', 'float32'], 'float32', AMP),
        ([], 'bfloat16', AMP),
        (['--teacher-dtype', 'float16'], 'float16', []),
        ([*AMP, 'slow'], 'AMP bfloat16', AMP),
        ([*AMP, 'slow'], 'AMP bfloat16', []),
    ],
)
@pytest.mark.parametrize('complete', [True, False])
def test_an_existing_cache_decides_and_its_rows_are_of_one_precision(
    filled_with, precision, read_with, complete, argv, tmp_path, fast_bfloat16, monkeypatch, capsys
):
    argv = [*argv, '--teacher-cache', str(tmp_path / 'cache'), '--epochs', '1']
    with pytest.MonkeyPatch.context() as patch:
        if 'slow' in filled_with:
            patch.setattr(teacher_precision, 'has_fast_bfloat16', lambda device: False)
        precompute.main([*argv, *(word for word in filled_with if word != 'slow')])
    before = manifest(tmp_path / 'cache')
    assert before['teacher precision'] == precision
    if not complete:
        (tmp_path / 'cache' / 'view-0.done.npy').unlink()
    monkeypatch.setattr(teacher_precision, '_measure', lambda *args: pytest.fail('it was measured'))
    capsys.readouterr()
    folder = folder_of(argv, 'run', *read_with)
    said = capsys.readouterr().err
    assert f'{AUTO}{precision}: as in the teacher cache.' in said
    assert f'{36 if complete else 0} of 36 rows there' in said
    assert precision_of(folder) == precision
    assert manifest(tmp_path / 'cache') == before


def test_precompute_decides_as_training_does(argv, tmp_path, fast_bfloat16):
    caches = tmp_path / 'of precompute', tmp_path / 'of training'
    precompute.main([*argv, '--teacher-cache', str(caches[0])])
    folder_of(argv, 'run', '--teacher-cache', str(caches[1]), '--epochs', '1')
    assert manifest(caches[0])['teacher precision'] == 'bfloat16'
    assert manifest(caches[0]) == manifest(caches[1])


def test_a_cache_of_another_precision_than_the_one_asked_for_is_refused(argv, tmp_path, fast_bfloat16, capsys):
    argv = [*argv, '--teacher-cache', str(tmp_path / 'cache')]
    precompute.main(argv)
    said = refused([*argv, '--teacher-dtype', 'float32'], capsys)
    assert 'teacher precision bfloat16 there and float32 here' in said


def test_a_resumed_run_refuses_a_cache_of_another_precision_than_its_own(argv, tmp_path, fast_bfloat16, capsys):
    folder_of(argv, 'run', '--stop-epoch', '1')
    cache = ['--teacher-cache', str(tmp_path / 'cache')]
    precompute.main([*argv, *cache, '--teacher-dtype', 'float32'])
    said = refused([*argv, *cache, '--experiment', 'run', '--resume', 'auto'], capsys)
    assert 'teacher precision float32 there and bfloat16 here' in said


@pytest.mark.parametrize('text', ['', '[]', '{"teacher precision": "int8"}'])
def test_a_manifest_that_is_none_decides_nothing(text, argv, tmp_path, capsys):
    (tmp_path / 'cache').mkdir()
    (tmp_path / 'cache' / 'manifest.json').write_text(text)
    assert '--teacher-cache: ' in refused([*argv, '--teacher-cache', str(tmp_path / 'cache')], capsys)


def test_a_stream_is_measured_on_its_first_batch_too(small_run, uneven_shards, fast_bfloat16):
    argv = [*small_run[1:], *PAIR, '--dataset', 'wds/x', '--data-dir', str(uneven_shards), '-j', '1', '--epochs', '1']
    assert precision_of(folder_of(argv, 'run')) == 'bfloat16'
