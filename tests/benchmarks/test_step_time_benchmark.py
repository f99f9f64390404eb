import json
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import train_distill
from timm_pe import ProjectorEnsembleTask, Teacher
from timm_pe.data.draws import SeededDataset
from timm_pe.train.console import Progress

BENCHMARKS = Path(train_distill.__file__).parent / 'benchmarks'
READS = ('item', 'tolist', 'cpu', 'numpy', '__bool__', '__float__', '__int__', '__index__')


@pytest.fixture(scope='module')
def bench(load_script):
    return load_script('step_time')


@pytest.fixture
def case(bench):
    return bench.Case('cifar_resnet20', 'cifar_wrn_16_1', batch_size=4, image_size=32, device='cpu')


# What the benchmark stands for ---------------------------------------------------------------------------------------


@pytest.mark.parametrize('flags', [[], ['--clip-grad', '1.0', '--kd-loss-weight', '1', '--model-ema']])
def test_a_training_step_never_waits_for_the_device(bench, small_run, monkeypatch, flags):
    pair = ['--model', 'test_resnet', '--teacher', 'test_resnet', '--no-teacher-pretrained']
    trainer = bench.create_run(
        [*small_run, *pair, '--teacher-num-classes', '3', '--log-interval', '2', '-b', '6', *flags]
    )
    trainer.data.train = list(trainer.data.train)  # decoding and augmenting read tensors of the CPU
    reads, reads_before = [], []
    for name in READS:
        original = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, lambda *args, f=original, n=name: (reads.append(n), f(*args))[1])

    def update(self, done, terms=None, *_, **__):
        reads_before.append((done, terms is not None, len(reads)))

    monkeypatch.setattr(Progress, 'update', update)
    trainer.train_epoch(0)
    assert [(done, logged) for done, logged, _ in reads_before] == [(1, False), (2, True), (3, False), (4, True), (5, False), (6, True)]  # fmt: skip
    # one read at each log interval, none between
    assert [count for *_, count in reads_before] == [0, 1, 1, 2, 2, 3]
    assert len(reads) == 4  # and the epoch's means


def test_the_plain_loop_is_the_method_that_ours_is(bench, case):
    """Else comparing their times would say nothing."""
    input, target = case.batches[0]
    loop = bench.PaperLoop(case.create_model(case.student), case.create_model(case.teacher))
    task = bench.our_task(case)
    task.teacher.set_input_norm(task.teacher.mean, task.teacher.std)  # the plain loop knows of no normalization
    task.resolve_act(input)
    stacked = task.projection.projectors.fc
    stacked.weight.data = torch.cat([p.weight.data for p in loop.projectors])
    stacked.bias.data = torch.cat([p.bias.data for p in loop.projectors])
    expected = task(input, target)
    loop(input, target)
    assert loop.loss_sum / 4 == pytest.approx(expected['loss'].item(), rel=1e-4)
    assert loop.feature_sum / 4 == pytest.approx(expected['pe_loss'].item(), rel=1e-4)
    assert loop.ce_sum / 4 == pytest.approx(expected['task_loss'].item(), rel=1e-4)


def test_every_variant_runs_on_as_many_batches_as_it_is_asked_for(bench, case):
    assert list(bench.VARIANTS) == list(bench.LABELS)
    for create in bench.VARIANTS.values():
        step = create(case)
        for i in range(5):
            step(i)


def test_the_cached_step_gets_the_features_of_its_own_batch_and_runs_no_teacher(bench, case, monkeypatch):
    given, ran = [], []
    forward = ProjectorEnsembleTask.forward
    monkeypatch.setattr(ProjectorEnsembleTask, 'forward', lambda self, *a, **k: (given.append((a[0], k['teacher'])), forward(self, *a, **k))[1])  # fmt: skip
    step = bench.VARIANTS['ours_cached'](case)
    monkeypatch.setattr(Teacher, 'forward', lambda *_: ran.append(1))
    for i in range(6):
        step(i)
    assert not ran
    monkeypatch.undo()
    teacher = case.create_teacher()
    for i, (input, output) in enumerate(given):
        assert input is case.batches[i % 4][0]
        torch.testing.assert_close(output.feature, teacher(input).feature.half().float(), rtol=1e-3, atol=1e-3)


# How it measures -----------------------------------------------------------------------------------------------------


def test_each_round_runs_every_step_once_in_a_random_order(bench):
    calls = []
    steps = {name: lambda i, n=name: (calls.append(n), time.sleep(0.01 if n == 'b' else 0)) for name in 'abc'}
    seconds = bench.measure(steps, 18, 'cpu')
    orders = [''.join(calls[k : k + 3]) for k in range(0, 60, 3)]
    assert set(orders) == {'abc', 'acb', 'bac', 'bca', 'cab', 'cba'}
    assert {name: len(values) for name, values in seconds.items()} == {'a': 18, 'b': 18, 'c': 18}
    assert min(seconds['b']) >= 0.01 > min(seconds['a'])


def test_the_variants_are_built_three_times_in_another_order_each(bench, case, monkeypatch):
    built, ran = [], []

    def variant(name):
        return lambda case: (built.append(name), lambda i: ran.append(name))[1]

    monkeypatch.setattr(bench, 'VARIANTS', {name: variant(name) for name in bench.VARIANTS})
    found = bench.measure_steps(case, 7)
    names = case.variants()
    orders = [built[k : k + len(names)] for k in range(0, len(built), len(names))]
    assert [sorted(order) for order in orders] == [sorted(names)] * 3
    assert orders[0] != orders[1] != orders[2]
    assert {len(values) for values in found['ms_of_rounds'].values()} == {7}
    assert len(ran) == (7 + 3 * 2) * len(names)  # two rounds after each build are not counted


def test_a_measurement_of_several_calls_is_the_time_of_one(bench):
    calls = []
    seconds = bench.measure({'a': lambda i: (calls.append(i), time.sleep(0.01))}, 2, 'cpu', repeats=4)
    assert calls == [0, 1, 2, 3] * 3 + [4, 5, 6, 7]
    assert 0.01 <= min(seconds['a']) < 0.04


def test_ratios_are_taken_within_rounds_so_a_slowing_machine_does_not_count(bench):
    slowing = np.linspace(1, 10, 31)
    found = bench.ratio(1.5 * slowing, slowing)
    assert found == pytest.approx({'ratio': 1.5, 'low': 1.5, 'high': 1.5})
    noise = np.random.default_rng(0).normal(1, 0.1, 31)
    found = bench.ratio(noise, np.ones(31))
    assert found['ratio'] == np.median(noise)
    # the order statistics that a binomial puts around the median of 31 with 95 %: the 10th and the 22nd
    assert np.sort(noise)[8] <= found['low'] <= np.sort(noise)[10] < found['ratio']
    assert found['ratio'] < np.sort(noise)[20] <= found['high'] <= np.sort(noise)[22]


def of_step(low, names=('ours', 'ours_bf16', 'ours_cached'), bfloat16=True):
    ratios = dict.fromkeys(('floor', 'timm', 'paper', 'student'), {'ratio': low + 0.1, 'low': low, 'high': low + 0.2})
    return {'steps': {'a:b': {'32': {'ratios': dict.fromkeys(names, ratios), 'environment': {'bfloat16': bfloat16}}}}}


def test_a_bound_holds_when_the_lower_end_of_its_interval_is_not_above_it(bench):
    for low, expected in ((1.0, [True, True, True, False, True]), (1.04, [False] * 4 + [True]), (0.9, [True] * 5)):
        found = bench.bounds(of_step(low))
        assert [b['limit'] for b in found] == [1.03, 1.0, 1.0, 0.9, 1.05]
        assert [b['holds'] for b in found] == expected
    assert len(bench.bounds(of_step(1.0, bfloat16=False))) == 4
    folded = bench.bounds(of_step(0.98, ('ours', 'ours_folded', 'ours_bf16', 'ours_cached')))
    assert [(b['bound'], b['limit'], b['holds']) for b in folded[3:5]] == [
        ('ours, folded / timm', 0.97, False),
        ('ours, folded / plain loop', 0.97, False),
    ]
    by_default = of_step(0.9, ('ours', 'ours_bf16', 'ours_default', 'ours_cached'))
    assert ('ours by default / timm', 0.9, True) in [
        (b['bound'], b['limit'], b['holds']) for b in bench.bounds(by_default)
    ]
    for ours, expected in (([101, 102, 103], (1.02, False)), ([99, 102, 103], (1.02, True))):
        memory = {'memory': {'a:b': {'peak_bytes': {'ours': ours, 'timm': [100] * 3}}}}
        assert [(b['ratio'], b['holds']) for b in bench.bounds(memory)] == [expected]


@pytest.mark.long
def test_peak_memory_is_that_of_the_variant_in_a_process_of_its_own(bench):
    case = bench.Case('cifar_resnet8', 'cifar_resnet8', batch_size=64, image_size=32, device='cpu')
    small = bench.measure_memory(case, ['student', 'teacher'], runs=2)
    large = bench.measure_memory(bench.Case('cifar_resnet8', 'cifar_resnet8', 256, 32, 'cpu'), ['student'], runs=1)
    assert [len(runs) for runs in small.values()] == [2, 2]
    # what a forward keeps for its backward
    activations = 256 * 32 * 32 * 16 * 4 * 8
    assert min(large['student']) - max(small['student']) > activations / 2
    assert min(small['student']) > max(small['teacher'])


def test_pictures_are_as_large_as_those_of_imagenet(bench, tmp_path):
    bench.write_pictures(tmp_path, 8)
    files = sorted((tmp_path / 'train').rglob('*.jpg'))
    assert len(files) == 8
    assert bench.Image.open(files[0]).size == (500, 400)
    assert 60_000 < np.mean([f.stat().st_size for f in files]) < 180_000


def test_what_seeding_adds_is_the_difference_that_seeds_make(bench, small_run, monkeypatch):
    trainer = bench.create_run([*small_run, '--model', 'test_resnet'])
    load = SeededDataset._load
    monkeypatch.setattr(SeededDataset, '_load', lambda self, draw: (time.sleep(0.002), load(self, draw))[1])
    found = bench.measure_seeding(trainer, 3)
    assert 2 <= found['seeding_ms'] < 20
    assert found['share']['low'] <= found['share']['ratio'] <= found['share']['high']


# The whole -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def tiny(tmp_path):
    return ['--pairs', 'cifar_resnet8:cifar_resnet8', '--rounds', '2', '--batch-sizes', '4', '--image-size', '32', '--projector-image-size', '32', '--images', '8', '--workers', '0', '--device', 'cpu', '--output', str(tmp_path / 'r' / 'step_time.json')]  # fmt: skip


def test_the_benchmark_writes_every_number_with_its_bounds_and_a_table(bench, tiny, tmp_path, capsys):
    bench.main([*tiny, '--parts', 'steps', 'projectors', 'loader'])
    results = json.loads((tmp_path / 'r' / 'step_time.json').read_text())
    pair = 'cifar_resnet8:cifar_resnet8@32'
    steps = results['steps'][pair]['4']
    assert set(steps['median_ms']) == set(bench.VARIANTS)
    assert {'cpu', 'cores', 'torch', 'timm', 'threads'} <= set(steps['environment'])
    by_hand = [o / (s + t) for o, s, t in zip(*(steps['ms_of_rounds'][n] for n in ('ours', 'student', 'teacher')), strict=True)]  # fmt: skip
    assert steps['ratios']['ours']['floor']['ratio'] == pytest.approx(np.median(by_hand), rel=0.01)
    assert set(results['projectors'][pair]['share']) == {'1', '2', '3', '4', '8'}
    loader = results['loader'][pair]
    assert set(loader['images_per_s']) == {'student', 'paper', 'ours', 'ours_cached'}
    assert loader['images_an_epoch'] == 8
    assert results['bounds'] == bench.bounds(results)
    table = (tmp_path / 'r' / 'step_time.md').read_text()
    assert table.strip() in capsys.readouterr().out
    for label in bench.LABELS.values():
        assert f'| {label} |' in table
    for bound in results['bounds']:
        assert f'| {bound["bound"]} |' in table


def test_a_network_with_nothing_to_fold_has_no_folded_variant(bench):
    case = bench.Case('test_vit', 'cifar_resnet8', 4, 64, 'cpu')
    assert set(bench.VARIANTS) - set(case.variants()) == {'teacher_folded', 'ours_folded'}
    # and one of a fixed input size is made for the size of the images
    assert case.create_teacher().adapt_input(case.batches[0][0]).shape == (4, 3, 64, 64)


def test_an_interrupted_benchmark_keeps_what_it_has_and_other_parts_stay(bench, tiny, tmp_path, monkeypatch, capsys):
    of_round = dict.fromkeys(('floor', 'timm', 'paper', 'student'), {'ratio': 1.0, 'low': 1.0, 'high': 1.0})
    found = {
        'ratios': dict.fromkeys(bench.VARIANTS, of_round),
        'median_ms': dict.fromkeys(bench.VARIANTS, 1.0),
        'rounds': 2,
    }
    measured = []

    def measure_steps(case, rounds):
        if len(measured) == 1:
            raise KeyboardInterrupt
        measured.append(case)
        return {**found, **case.size()}

    path = tmp_path / 'r' / 'step_time.json'
    path.parent.mkdir()
    path.write_text(json.dumps({'memory': {'a:b': {'peak_bytes': {'ours': [1], 'timm': [2]}, 'batch_size': 4, 'image_size': 32, 'date': 'then', 'environment': {'cpu': 'old', 'threads': 1, 'torch': '2', 'timm': '1'}}}}))  # fmt: skip
    monkeypatch.setattr(bench, 'measure_steps', measure_steps)
    with pytest.raises(SystemExit) as e:
        bench.main([*tiny, '--parts', 'steps', '--batch-sizes', '4', '8'])
    assert e.value.code == 130
    assert 'has what was measured before' in capsys.readouterr().err
    results = json.loads(path.read_text())
    assert list(results['steps']['cifar_resnet8:cifar_resnet8@32']) == ['4']
    assert results['memory']['a:b']['environment']['cpu'] == 'old'


def test_a_pair_may_name_its_image_size(bench):
    assert bench.read_pair('resnet34:resnet18@224', 96) == ('resnet34', 'resnet18', 224)
    assert bench.read_pair('resnet34:resnet18', 96) == ('resnet34', 'resnet18', 96)
    for pair in bench.PAIRS:
        bench.read_pair(pair, 96)


@pytest.mark.parametrize(
    ('argv', 'message'),
    [
        (['--pairs', 'resnet34'], "--pairs takes TEACHER:STUDENT or TEACHER:STUDENT@SIZE, got 'resnet34'"),
        (['--pairs', 'resnet34:resnet18@x'], "got 'resnet34:resnet18@x'"),
        (['--pairs', 'resnet34:resnt18'], "unknown model 'resnt18', did you mean resnet18"),
        (['--rounds', '0'], '--rounds must be 1 or more, got 0'),
        (['--batch-sizes', '0'], '--batch-sizes must be 1 or more, got 0'),
        (['--parts', 'stepz'], 'invalid choice'),
    ],
)
def test_bad_arguments_are_refused_in_one_line(bench, argv, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as e:
        bench.main([*argv, '--output', str(tmp_path / 'r.json')])
    assert e.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / 'r.json').exists()
