import json
import math
import os
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch
import torch.nn.functional as F
import yaml

import train_distill
from timm_pe import ProjectorEnsemble, create_projector
from timm_pe.config.run_config import parse_config
from timm_pe.method import losses
from timm_pe.method.names import FEATURE_LOSSES, PROJECTORS

BENCHMARKS = Path(train_distill.__file__).parent / 'benchmarks'
METHODS = sorted(p.stem for p in (BENCHMARKS / 'methods').glob('*.yaml'))
SUITES = sorted(p.stem for p in (BENCHMARKS / 'suites').glob('*.yaml'))


@pytest.fixture(scope='module')
def accuracy(load_script):
    return load_script('accuracy')


@pytest.fixture
def ablations(load_script, monkeypatch):
    """Registers the projectors of benchmarks/ablations.py for one test."""
    for registry in (PROJECTORS, FEATURE_LOSSES):
        monkeypatch.setattr(registry, 'factories', registry.factories.copy())
    load_script('ablations')


@pytest.fixture
def tiny(accuracy, tmp_path, monkeypatch):
    """A suite of seconds in the place of the project's own."""
    suite = {
        'title': 'tiny',
        'common': {'dataset': 'sklearn/digits', 'num_classes': 10, 'img_size': 16, 'batch_size': 128, 'workers': 0, 'warmup_epochs': 0},
        'teacher': {'model': 'test_resnet', 'name': 'tiny', 'epochs': 1, 'lr': 0.05},
        'student': {'model': 'test_resnet', 'epochs': 1, 'lr': 0.05},
        'methods': ['alone', 'pe_q3', 'timm_fd'],
        'seeds': [1],
    }  # fmt: skip
    (tmp_path / 'suites').mkdir()
    (tmp_path / 'suites' / 'tiny.yaml').write_text(yaml.safe_dump(suite))
    (tmp_path / 'methods').symlink_to(BENCHMARKS / 'methods')
    monkeypatch.setattr('grid.ROOT', tmp_path)
    return ['tiny', '--output', str(tmp_path / 'out'), '--results', str(tmp_path / 'r' / 'accuracy.json'), '--device', 'cpu', '--no-analysis']  # fmt: skip


@pytest.mark.long
def test_a_grid_is_run_summarized_and_not_run_again(accuracy, tiny, tmp_path, capsys):
    accuracy.main([*tiny, '--jobs', '2'])
    said = capsys.readouterr().out
    assert said.count(' runs left') == 3
    results = json.loads((tmp_path / 'r' / 'accuracy.json').read_text())['suites']['tiny']
    assert {'cores', 'cpu', 'torch', 'timm'} <= set(results['environment'])
    alone, q3 = results['methods']['alone'], results['methods']['pe_q3']
    assert q3['minus_alone']['mean'] == pytest.approx(q3['top1'] - alone['top1'])
    assert q3['minus_kd'] is None
    run = json.loads((tmp_path / 'out' / 'tiny' / 'pe_q3-1' / 'result.json').read_text())
    assert run['flags']['teacher_checkpoint'] == str(tmp_path / 'out' / 'teachers' / 'tiny')
    assert run['top1'] == q3['top1_of_seeds'][0]
    assert '| 3 projectors | 1 |' in (tmp_path / 'r' / 'accuracy.md').read_text()

    accuracy.main(tiny)
    assert ' runs left' not in capsys.readouterr().out
    with pytest.raises(SystemExit):  # finished runs with other flags are not taken for these
        accuracy.main([*tiny, '--set', 'lr=0.1', '--replace'])
    assert 'holds a run with other flags' in capsys.readouterr().err


@pytest.mark.long
def test_every_method_takes_the_rate_that_is_best_for_the_student_alone(accuracy, tiny, tmp_path, capsys):
    file = tmp_path / 'suites' / 'tiny.yaml'
    file.write_text(
        yaml.safe_dump({**yaml.safe_load(file.read_text()), 'rates': [1e-6, 0.05], 'methods': ['alone', 'pe_q3']})
    )
    accuracy.main([*tiny, '--no-run'])
    assert '| student alone |' not in capsys.readouterr().out  # no method is summed up before the rate is known
    accuracy.main(tiny)
    tuning = json.loads((tmp_path / 'r' / 'accuracy.json').read_text())['suites']['tiny']['tuning']
    assert [t['lr'] for t in tuning] == [1e-6, 0.05]
    assert tuning[0]['top1'] < tuning[1]['top1']
    for method in ('alone', 'pe_q3'):
        flags = json.loads((tmp_path / 'out' / 'tiny' / f'{method}-1' / 'result.json').read_text())['flags']
        assert flags['lr'] == 0.05
    tuned_with = json.loads((tmp_path / 'out' / 'tiny' / 'tune-lr0.05' / 'result.json').read_text())['flags']
    assert tuned_with['seed'] != 1


def test_a_run_that_fails_is_named_with_what_it_said(accuracy, tiny, capsys):
    with pytest.raises(SystemExit) as e:
        accuracy.main([*tiny, '--set', 'opt=nonsense'])
    assert e.value.code == 2
    assert "teacher ended with exit code 2: train_distill: error: --opt: unknown optimizer 'nonsense'" in (
        capsys.readouterr().err.replace('tiny ended', 'teacher ended')
    )


def test_fewer_seeds_leave_the_runs_of_the_tuning_as_they_are(accuracy, tmp_path):
    suite = accuracy.load_suite('emoji_equal', tmp_path, {})
    tuning = [run.flags for run in suite.tuning_runs().values()]
    assert {flags['seed'] for flags in tuning} == {1008}
    suite.seeds = [3]
    assert [run.flags for run in suite.tuning_runs().values()] == tuning


def test_missing_data_is_named_with_what_builds_it_before_anything_is_written(accuracy, tiny, tmp_path, capsys):
    file = tmp_path / 'suites' / 'tiny.yaml'
    suite = yaml.safe_load(file.read_text())
    suite['common'] = {'data_dir': str(tmp_path / 'nowhere'), 'num_classes': 3}
    file.write_text(yaml.safe_dump(suite))
    with pytest.raises(SystemExit) as e:
        accuracy.main(tiny)
    assert e.value.code == 2
    said = capsys.readouterr().err
    assert said == f'accuracy.py: error: {tmp_path / "nowhere"} is missing: `make data` builds it\n'
    assert not (tmp_path / 'out').exists()


def test_runs_of_an_archive_are_never_written_into(accuracy, tiny, tmp_path, capsys):
    teacher = accuracy.load_suite('tiny', tmp_path / 'out', {'device': 'cpu'}).teacher_run()
    teacher.folder.mkdir(parents=True)
    for flags, said in (({'seed': 1}, 'holds a run with other flags'), (teacher.flags, 'has results and no weights')):
        teacher.result_file.write_text(json.dumps({'flags': flags, 'top1': 50.0}))
        with pytest.raises(SystemExit):
            accuracy.main(tiny)
        assert said in capsys.readouterr().err
        assert [path.name for path in teacher.folder.iterdir()] == ['result.json']


def finish(suite, methods, seeds, top1=50.0):
    """Finished runs of a suite, without their training."""
    for method in methods:
        for seed in seeds:
            run = suite.run(method, seed)
            run.folder.mkdir(parents=True)
            (run.folder / 'args.yaml').write_text('{epochs: 1}')
            (run.folder / 'summary.csv').write_text(f'epoch,train_loss,eval_loss,eval_top1\n0,1,1,{top1 + seed}\n')
            values = {'top1': top1 + seed, 'best_top1': top1 + seed, 'seconds': 1.0, 'flags': run.flags}
            run.result_file.write_text(json.dumps(values))


def test_known_results_whose_runs_are_not_here_are_not_dropped_in_silence(accuracy, tiny, tmp_path, capsys):
    suite = accuracy.load_suite('tiny', tmp_path / 'out', {'device': 'cpu'})
    finish(suite, ['alone', 'pe_q3'], [1, 2])
    results = tmp_path / 'r' / 'accuracy.json'

    def found():
        rows = json.loads(results.read_text())['suites']['tiny']['methods']
        return {method: row['seeds'] for method, row in rows.items()}

    accuracy.main([*tiny, '--no-run', '--seeds', '1', '2'])
    assert found() == {'alone': [1, 2], 'pe_q3': [1, 2]}
    # fewer to run are no fewer to show
    accuracy.main([*tiny, '--no-run', '--methods', 'pe_q3', '--seeds', '2'])
    accuracy.main([*tiny, '--no-run'])
    assert found() == {'alone': [1, 2], 'pe_q3': [1, 2]}
    shutil.rmtree(tmp_path / 'out' / 'tiny' / 'pe_q3-2')
    before = results.read_text()
    with pytest.raises(SystemExit) as e:
        accuracy.main([*tiny, '--no-run'])
    assert e.value.code == 2
    assert 'has 1 results of tiny whose runs are not in' in capsys.readouterr().err
    assert results.read_text() == before
    accuracy.main([*tiny, '--no-run', '--seeds', '1', '2', '--replace'])
    assert found()['pe_q3'] == [1]


def test_the_runs_that_numbers_are_of_are_kept_in_an_archive_and_give_the_same_table_again(accuracy, tiny, tmp_path):
    finish(accuracy.load_suite('tiny', tmp_path / 'out', {'device': 'cpu'}), ['alone', 'pe_q3'], [1, 2])
    archive, results = tmp_path / 'r' / 'runs' / 'tiny.tar.xz', tmp_path / 'r' / 'accuracy.json'
    accuracy.main([*tiny, '--no-run', '--seeds', '1', '2'])
    assert 'The runs were not kept.' in results.with_suffix('.md').read_text()
    accuracy.main([*tiny, '--no-run', '--seeds', '1', '2', '--keep', str(archive)])
    told = results.with_suffix('.md').read_text()
    assert 'Settings and epochs of all runs: runs/tiny.tar.xz.' in told
    shutil.rmtree(tmp_path / 'out' / 'tiny')
    with tarfile.open(archive) as tar:
        names = tar.getnames()
        tar.extractall(tmp_path / 'out', filter='data')
    files = ('args.yaml', 'result.json', 'summary.csv')
    runs = ('alone-1', 'alone-2', 'pe_q3-1', 'pe_q3-2')
    assert set(names) >= {f'tiny/{run}/{file}' for run in runs for file in files}
    accuracy.main([*tiny, '--no-run', '--seeds', '1', '2', '--keep', str(archive)])
    assert results.with_suffix('.md').read_text() == told


def test_an_archive_has_the_weights_of_a_small_teacher_and_the_same_runs_make_the_same_file(accuracy, tiny, tmp_path):
    suite = accuracy.load_suite('tiny', tmp_path / 'out', {'device': 'cpu'})
    finish(suite, ['alone'], [1])
    teacher, archives = suite.teacher_run(), [tmp_path / f'{i}.tar.xz' for i in range(3)]
    teacher.folder.mkdir(parents=True)
    weights = teacher.folder / 'student.safetensors'
    weights.write_bytes(b'weights')
    for archive in archives[:2]:
        accuracy.keep_runs([suite], archive)
        os.utime(weights, (0, 0))
    assert archives[0].read_bytes() == archives[1].read_bytes()
    weights.write_bytes(bytes(accuracy.SMALL_WEIGHTS))
    accuracy.keep_runs([suite], archives[2])
    names = []
    for archive in archives:
        with tarfile.open(archive) as tar:
            names.append('teachers/tiny/student.safetensors' in tar.getnames())
    assert names == [True, True, False]


def test_each_number_of_the_committed_results_is_in_the_archive_that_it_names():
    results = BENCHMARKS / 'results'
    kept, checked = {}, 0
    for name, suite in json.loads((results / 'accuracy.json').read_text())['suites'].items():
        if suite['runs'] not in kept:
            with tarfile.open(results / suite['runs']) as tar:
                files = {n: tar.extractfile(n).read() for n in tar.getnames() if n.endswith('result.json')}
            kept[suite['runs']] = {n: json.loads(content).get('top1') for n, content in files.items()}
        for method, row in suite['methods'].items():
            for seed, top1 in zip(row['seeds'], row['top1_of_seeds'], strict=True):
                assert kept[suite['runs']][f'{name}/{method}-{seed}/result.json'] == top1
                checked += 1
    assert checked > 100


@pytest.mark.parametrize(
    ('method', 'setting', 'message'),
    [
        ('pe_q1_third', 'opt=adamw', 'pe_q1_third is not for opt adamw of tiny, but for sgd, momentum'),
        ('pe_q3_no_decay', 'weight_decay=0.02', 'pe_q3_no_decay is not for weight_decay 0.02 of tiny, but for 0.0005'),
    ],
)
def test_a_method_that_changes_gradients_is_refused_where_the_optimizer_makes_something_else_of_them(
    method, setting, message, accuracy, tiny, capsys
):
    with pytest.raises(SystemExit) as e:
        accuracy.main([*tiny, '--methods', method, '--set', setting])
    assert e.value.code == 2
    assert message in capsys.readouterr().err


def test_results_go_beside_the_runs_unless_said_otherwise(accuracy, tiny, tmp_path, capsys):
    without_results = [word for word in tiny if word != '--results' and not word.endswith('accuracy.json')]
    accuracy.main([*without_results, '--no-run'])
    assert (tmp_path / 'out' / 'accuracy.json').is_file()
    assert not (tmp_path / 'results').exists()


def test_differences_are_paired_by_seed_with_a_t_interval(accuracy):
    d = accuracy.compare({1: 51.0, 2: 53.0, 3: 52.0, 4: 99.0}, {1: 50.0, 2: 51.0, 3: 52.0})
    assert d['of_seeds'] == [1.0, 2.0, 0.0]
    assert d['mean'] == 1.0
    # Student's t, 2 degrees of freedom, 97.5 %: 4.3027; standard deviation of the differences 1
    assert d['high'] - d['mean'] == pytest.approx(4.302653 / math.sqrt(3), rel=1e-5)
    assert d['low'] == pytest.approx(2 * d['mean'] - d['high'])
    assert accuracy.compare({1: 2.0}, {1: 1.5})['low'] is None
    assert accuracy.compare({1: 2.0}, {2: 1.5}) is None


@pytest.mark.parametrize(('spread', 'seeds'), [(1.1, 8), (0.5, 3)])
def test_a_detectable_difference_leaves_zero_out_of_its_interval_in_four_of_five_cases(accuracy, spread, seeds):
    true = accuracy.detectable(spread, seeds)
    draws = np.random.default_rng(0).normal(true, spread, (20_000, seeds))
    half = scipy.stats.t.ppf(0.975, seeds - 1) * draws.std(1, ddof=1) / seeds**0.5
    assert np.mean(draws.mean(1) - half > 0) == pytest.approx(0.8, abs=0.02)


def test_epochs_are_averaged_over_the_runs_that_came_there(accuracy):
    assert accuracy.format_epochs([3, 4, None]) == '3.5 (2 of 3)'
    assert accuracy.format_epochs([None]) == 'never'


def test_a_suite_like_another_changes_what_it_names_and_keeps_the_rest(accuracy, tiny, tmp_path):
    (tmp_path / 'suites' / 'longer.yaml').write_text('{like: tiny, title: longer, student: {epochs: 9}}')
    suite, other = (accuracy.load_suite(name, tmp_path, {}) for name in ('longer', 'tiny'))
    assert (suite.title, suite.student) == ('longer', {**other.student, 'epochs': 9})
    assert (suite.teacher, suite.methods, suite.seeds) == (other.teacher, other.methods, other.seeds)


def test_methods_of_one_seed_share_a_cache_and_no_two_seeds_do(accuracy, tiny, tmp_path):
    suite = accuracy.load_suite('tiny', tmp_path, {})
    assert 'teacher_cache' not in suite.run('pe_q3', 1).flags
    suite.cache_views = 4
    caches = {(m, s): suite.run(m, s).flags.get('teacher_cache') for m in ('alone', 'pe_q1', 'pe_q3') for s in (1, 2)}
    assert caches['pe_q1', 1] == caches['pe_q3', 1] != caches['pe_q3', 2]
    assert caches['alone', 1] is None
    of_contents = {suite.run(m, 1).flags['teacher_cache'] for m in ('pe_q3', 'kd', 'logits_q1')}
    assert len(of_contents) == 3
    assert suite.run('kd', 1).flags['teacher_cache'] == suite.run('pe_kd', 1).flags['teacher_cache']
    assert 'teacher_cache' not in suite.run('timm_fd', 1).flags


def test_ablated_projectors_start_and_learn_as_they_are_named(ablations):
    x, y = torch.randn(5, 4), torch.randn(5, 4)

    def trained(name, q=1):
        torch.manual_seed(0)
        ensemble = ProjectorEnsemble(4, 4, q, name)
        before = [p.clone() for p in ensemble.parameters()]
        (ensemble(x.clone().requires_grad_()) * y).sum().backward()
        for p in ensemble.parameters():
            if p.grad is not None:
                p.data -= 0.01 * p.grad
        return ensemble, before

    frozen, before = trained('frozen', 3)
    assert all(torch.equal(p, b) for p, b in zip(frozen.parameters(), before, strict=True))
    torch.testing.assert_close(ProjectorEnsemble(4, 4, 1, 'identity_init')(x), x.relu())
    third, start = trained('third_gradient')
    whole, same_start = trained('linear')
    for p, b, q, c in zip(third.parameters(), start, whole.parameters(), same_start, strict=True):
        assert torch.equal(b, c)
        torch.testing.assert_close(3 * (p - b), q - c)
    # three with three times the gradient each move as one projector does
    triple, start = trained('triple_gradient', 3)
    w, b = triple.projectors[0].weight, triple.projectors[0].bias
    alone = F.linear(x, start[0], start[1]).detach().requires_grad_()
    (alone.relu() * y).sum().backward()
    torch.testing.assert_close(w - start[0], -0.01 * alone.grad.T @ x)
    torch.testing.assert_close(b - start[1], -0.01 * alone.grad.sum(0))
    assert ProjectorEnsemble(4, 4, 1, 'wide').projectors[0][0].out_features == 12


def test_a_method_has_another_weight_after_its_name(accuracy, tiny, tmp_path, capsys):
    suite = accuracy.load_suite('tiny', tmp_path, {})
    run, as_it_comes = suite.run('pe_q3@5', 1), suite.run('pe_q3', 1)
    changed = {k for k in run.flags if run.flags[k] != as_it_comes.flags.get(k)}
    assert (run.name, run.flags['distill_loss_weight']) == ('pe_q3@5-1', 5.0)
    assert changed == {'distill_loss_weight', 'experiment'}
    assert suite.run('kd@0.5', 1).flags['kd_loss_weight'] == 0.5
    assert suite.run('pe_kd@5', 1).flags['distill_loss_weight'] == 5.0
    suite.of_methods = {
        'pe_q3': {'epochs': 7, 'distill_loss_weight': 1}
    }  # the suite's flags for a method are for it at any weight
    of_suite = suite.run('pe_q3@5', 1).flags
    assert (of_suite['epochs'], of_suite['distill_loss_weight']) == (7, 5.0)
    assert accuracy.load_method('pe_q3@5')['label'] == '3 projectors, weight 5'
    for name, said in (('pe_q9', "unknown method 'pe_q9': choose from alone"), ('alone@1', 'has no teacher'), ('pe_q3@x', "float: 'x'")):  # fmt: skip
        with pytest.raises(SystemExit) as e:
            accuracy.main([*tiny, '--methods', name])
        assert e.value.code == 2
        assert said in capsys.readouterr().err


def test_a_projector_without_decay_moves_as_a_plain_one_whose_optimizer_has_none(ablations):
    weights = []
    for kind, decay in (('no_decay', 5e-4), ('linear', 0.0), ('linear', 5e-4)):
        torch.manual_seed(0)
        layer = create_projector(kind, 6, 4) if kind != 'linear' else torch.nn.Linear(6, 4)
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.5, momentum=0.9, nesterov=True, weight_decay=decay)
        for seed in range(20):
            x = torch.randn(8, 6, generator=torch.Generator().manual_seed(seed))
            optimizer.zero_grad()
            layer(x).square().mean().backward()
            optimizer.step()
        weights.append(layer.weight.detach())
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-4, atol=1e-6)
    assert (weights[1] - weights[2]).abs().max() > 1e-4


def test_dist_is_one_minus_correlation_over_classes_and_over_the_batch(ablations):
    pytest.importorskip('torchdistill')
    logits = torch.randn(2, 7, 5)
    student, teacher = np.exp(logits.double().numpy() / 4)
    student, teacher = (x / x.sum(1, keepdims=True) for x in (student, teacher))
    over_classes = [np.corrcoef(s, t)[0, 1] for s, t in zip(student, teacher, strict=True)]
    over_batch = [np.corrcoef(s, t)[0, 1] for s, t in zip(student.T, teacher.T, strict=True)]
    expected = 16 * (1 - np.mean(over_classes) + 1 - np.mean(over_batch))
    assert losses.create_feature_loss('dist')(*logits).item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize('name', METHODS)
def test_a_method_is_flags_that_train_distill_takes(accuracy, ablations, tmp_path, name):
    method = accuracy.load_method(name)
    if 'script' in method:
        assert (BENCHMARKS.parent / method['script']).is_file()
    teacher = {'none': {}, 'timm_pe': {'teacher': 'resnet34'}, 'timm': {'kd_model_name': 'resnet34'}}[method['teacher']]
    config = tmp_path / 'c.yaml'
    config.write_text(yaml.safe_dump({**method['flags'], **teacher}))
    args = parse_config(['data', '-c', str(config)])
    assert bool(args.teacher) == (method['teacher'] == 'timm_pe')


@pytest.mark.parametrize('name', SUITES)
def test_a_suite_names_known_methods_and_flags(accuracy, tmp_path, name, monkeypatch):
    suite = accuracy.load_suite(name, tmp_path, {})
    monkeypatch.setattr(suite, 'tuned', lambda: dict.fromkeys(suite.rates, 50.0))
    assert set(suite.methods) <= set(METHODS)
    assert len(suite.seeds) >= 3
    runs = [suite.run(method, 1) for method in suite.methods]
    for run in [*runs, *suite.tuning_runs().values(), *filter(None, [suite.teacher_run()])]:
        config = tmp_path / 'c.yaml'
        config.write_text(yaml.safe_dump(run.flags))
        parse_config(['-c', str(config)])
