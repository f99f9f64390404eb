import argparse
import json
from pathlib import Path

import pytest
import torch
import yaml
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from timm.utils import ParseKwargs, world_info_from_env
from torch.utils.data import IterableDataset

from timm_pe.config import cli, rules
from timm_pe.config.declare import declared_in
from timm_pe.config.derive import learning_rate, loader_workers, pins_memory
from timm_pe.config.flags import ScheduleFlags
from timm_pe.config.run_config import RunConfig, create_parser, parse_config

FACTS = json.loads((Path(__file__).parents[1] / 'fixtures' / 'timm_train_flags.json').read_text())
ACTIONS = {s: a for a in create_parser()._actions for s in (a.option_strings or [a.dest])}
DATA = ['--dataset', 'sklearn/digits']
OURS = {'--workers': None, '--pin-mem': True}  # see loader_workers and pins_memory
TYPES = {'str': str, 'int': int, 'float': float}


def refused(argv, capsys):
    with pytest.raises(SystemExit) as e:
        parse_config(argv)
    err = capsys.readouterr().err
    assert e.value.code == 2
    assert err.startswith('train_distill: error: ')
    assert err.count('\n') == 1
    return err


@pytest.mark.parametrize('fact', FACTS, ids=lambda f: f['flags'][-1])
def test_a_flag_of_timm_has_timms_names_type_and_default(fact):
    action = ACTIONS[fact['flags'][0]]
    assert set(fact['flags']) == set(action.option_strings or [action.dest])
    assert action.default == OURS.get(fact['flags'][-1], fact['default'])
    kind = fact.get('action')
    if kind == 'parse_kwargs':
        assert (action.nargs, action.default) == ('*', {})
    elif kind in ('store_true', 'store_false'):
        assert action.nargs == 0
        assert action.const == (kind == 'store_true')
    else:
        assert (action.type or str) is TYPES[fact.get('type', 'str')]
        assert action.nargs == fact.get('nargs')
    if isinstance(fact.get('choices'), list):
        assert list(action.choices) == fact['choices']
    if 'const' in fact:
        assert action.const == fact['const']


def test_a_flag_is_marked_as_added_exactly_where_timm_has_none_of_its_name():
    declared = declared_in(RunConfig)
    timm = {ACTIONS[fact['flags'][0]].dest for fact in FACTS}
    assert {dest for dest, flag in declared.items() if not flag.added} == timm


@pytest.mark.parametrize(
    ('argv', 'message'),
    [
        ([], 'no data'),
        ([*DATA, '--pe-projectors', '0', '--teacher', 'resnet18'], '--pe-projectors must be 1 or more, got 0'),
        (
            [*DATA, '--teacher', 'resnet18', '--pe-projector', 'identity', '--pe-projectors', '5'],
            'leave --pe-projectors off',
        ),
        (
            [*DATA, '--teacher', 'resnet18', '--pe-projector', 'identity', '--pe-act', 'relu'],
            '--pe-act relu has no effect on --pe-projector identity',
        ),
        (
            [*DATA, '--train-crop-pad', '4', '--train-interpolation', 'bilinear'],
            '--train-interpolation is for the crop that --train-crop-pad replaces',
        ),
        ([*DATA, '--teacher', 'resnet18', '--pe-projector', 'lin'], "invalid choice: 'lin' (choose from"),
        ([*DATA, '--teacher', 'resnet18', '--pe-loss', 'l1'], "invalid choice: 'l1' (choose from"),
        ([*DATA, '--pe-projectors', '2'], '--pe-projectors needs --teacher'),
        ([*DATA, '--teacher-checkpoint', 'x.pth'], '--teacher-checkpoint needs --teacher'),
        ([*DATA, '--teecher', 'resnet18'], 'unknown argument --teecher, did you mean --teacher?'),
        ([*DATA, '--epochs', 'three'], "--epochs: invalid int value: 'three'"),
        ([*DATA, '--batch-size', '0'], '--batch-size must be 1 or more, got 0'),
        ([*DATA, '--mixup', '0.5', '-b', '7'], 'must be even, got 7'),
        ([*DATA, '--opt', 'sgdd'], "unknown optimizer 'sgdd', did you mean"),
        ([*DATA, '--sched', 'cos'], "--sched must be one of 'cosine'"),
        ([*DATA, '--amp-dtype', 'half'], "--amp-dtype must be one of 'float16', 'bfloat16', got 'half'"),
        ([*DATA, '--hflip', '1.5'], '--hflip must be from 0 to 1'),
        ([*DATA, '-c', '/no/such.yaml'], "cannot read '/no/such.yaml'"),
        ([*DATA, '--teacher', 'resnet18', '--kd-temperature', '0'], '--kd-temperature must be above 0'),
    ],
)
def test_a_mistake_is_one_line_with_what_came_and_what_is_allowed(argv, message, capsys):
    assert message in refused(argv, capsys)


def config(tmp_path, text):
    path = tmp_path / 'config.yaml'
    path.write_text(text)
    return ['-c', str(path)]


def test_yaml_sets_flags_and_the_command_line_wins(tmp_path):
    yaml_args = config(
        tmp_path, "dataset: sklearn/digits\nlr: '3e-4'\nteacher: resnet34\npe-projectors: 5\nepochs: 7\n"
    )
    args = parse_config([*yaml_args, '--epochs', '9'])
    assert (args.dataset, args.lr, args.teacher, args.pe_projectors, args.epochs) == (
        'sklearn/digits',
        3e-4,
        'resnet34',
        5,
        9,
    )


@pytest.mark.parametrize(
    ('text', 'message'),
    [
        ('epoch: 3', "unknown key 'epoch' in .*, did you mean epochs"),
        ('epochs: many', "epochs in .* must be of type int, got 'many'"),
        ('epochs: .inf', 'epochs in .* must be of type int'),
        ('epochs: 2.5', 'epochs in .* must be of type int, got 2.5'),
        ('epochs: [1]', 'must be of type int'),
        ('amp: 1', 'amp in .* must be true or false, got 1'),
        ('pe_loss: l1', 'pe_loss in .* must be one of direction, kl, logsum, mse'),
        ('input_size: [3, 32]', 'must be a list of 3'),
        ('- a\n- b', "must hold 'flag: value' lines, it holds a list"),
        ('a: [', 'is no YAML file'),
        ('!!python/object/apply:os.mkdir [/tmp/timm_pe_owned]', 'is no YAML file'),
    ],
)
def test_yaml_is_checked_like_the_command_line(tmp_path, capsys, text, message):
    import re

    assert re.search(message, refused([*DATA, *config(tmp_path, text)], capsys))
    assert not Path('/tmp/timm_pe_owned').exists()


def test_null_in_yaml_is_a_flag_that_was_not_given(tmp_path):
    text = 'drop: null\nmodel_kwargs: null\nexperiment: null\ncolor_jitter: null\ntorchcompile: true\n'
    args = parse_config([*DATA, *config(tmp_path, text)])
    assert (args.drop, args.model_kwargs, args.experiment) == (0.0, {}, '')
    assert args.color_jitter is None
    assert args.torchcompile == 'inductor'


def test_three_betas_reach_an_optimizer_that_takes_three():
    assert parse_config([*DATA, '--opt', 'adan', '--opt-betas', '0.98', '0.92', '0.99']).opt_betas == [
        0.98,
        0.92,
        0.99,
    ]


def test_a_flag_of_the_teacher_from_yaml_needs_a_teacher_too(tmp_path, capsys):
    assert '--pe-projectors needs --teacher' in refused([*DATA, *config(tmp_path, 'pe_projectors: 5')], capsys)


def test_args_yaml_holds_yaml_and_flags_merged_and_reads_back_to_the_same_run(tmp_path):
    args = parse_config([*DATA, *config(tmp_path, 'lr: 0.3\nmodel_kwargs: {depth: 3}'), '--epochs', '4'])
    text = args.to_yaml()
    merged = yaml.safe_load(text)
    assert (merged['lr'], merged['epochs'], merged['model_kwargs']) == (0.3, 4, {'depth': 3})
    assert merged['device'] == 'cuda'  # as given, before what the machine made of it
    (tmp_path / 'args.yaml').write_text(text)
    again = parse_config(['-c', str(tmp_path / 'args.yaml')])
    assert {**again.as_dict(), 'config': ''} == {**args.as_dict(), 'config': ''}


@pytest.mark.parametrize(
    ('flags', 'world_size', 'lr'),
    [
        (['--lr', '0.3'], 4, 0.3),
        (['-b', '128'], 4, 0.1 * 512 / 256),
        (['-b', '64', '--grad-accum-steps', '8'], 1, 0.1 * 512 / 256),
        (['-b', '128', '--opt', 'adamw', '--lr-base', '0.001'], 8, 0.001 * 2),
        (['-b', '128', '--opt', 'adamw', '--lr-base', '0.001', '--lr-base-scale', 'linear'], 8, 0.001 * 4),
    ],
)
def test_the_learning_rate_follows_the_global_batch_as_in_timm(flags, world_size, lr):
    assert learning_rate(parse_config([*DATA, *flags]), world_size) == pytest.approx(lr)


@pytest.mark.parametrize(('rank', 'of_all', 'said'), [(0, False, 'cmd: error: no'), (0, True, 'cmd: error: no'), (3, False, 'cmd: error: [rank 3] no'), (3, True, '')])  # fmt: skip
def test_rank_0_speaks_first_and_others_only_for_themselves(rank, of_all, said, monkeypatch, capsys):
    waited = []
    monkeypatch.setenv('RANK', str(rank))
    monkeypatch.setattr(cli.time, 'sleep', waited.append)
    with pytest.raises(SystemExit) as e:
        cli.exit_with_error('no', 3, 'cmd', of_all)
    assert e.value.code == 3
    assert capsys.readouterr().err.strip() == said
    assert waited == [cli.RANK_0_FIRST] * (rank > 0)


@pytest.mark.parametrize('variable', [None, 'RANK', 'PMI_RANK', 'SLURM_PROCID', 'OMPI_COMM_WORLD_RANK'])
def test_the_rank_that_speaks_is_the_one_timm_reads_from_the_environment(variable, monkeypatch, capsys):
    monkeypatch.setattr(cli.time, 'sleep', lambda seconds: None)
    for name in cli._RANK_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    if variable:
        monkeypatch.setenv('OMPI_COMM_WORLD_RANK', '5')  # the last that is looked at
        monkeypatch.setenv(variable, '3')
    rank = world_info_from_env()[1]
    assert rank == (3 if variable else 0)
    with pytest.raises(SystemExit):
        cli.exit_with_error('no')
    assert ('[rank 3]' in capsys.readouterr().err) == bool(variable)


@pytest.mark.parametrize(
    'words', [[], [''], ['a=1', 'b=x', 'c=[1,2]'], ['a=1=2', 'a=', "b='q'"], ['a=(1, 2)', 'b=None', 'c=1e-3', 'd=0x1F']]
)
def test_pairs_are_read_as_timm_reads_them(words):
    timms = argparse.ArgumentParser()
    timms.add_argument('--model-kwargs', nargs='*', default={}, action=ParseKwargs)
    argv = ['--model-kwargs', *words]
    assert parse_config([*DATA, *argv]).model_kwargs == timms.parse_args(argv).model_kwargs


@pytest.mark.parametrize(('cores', 'ranks', 'workers'), [(1, 1, 1), (2, 1, 2), (64, 1, 4), (16, 8, 2), (2, 4, 1)])
def test_without_j_a_rank_has_a_loader_process_for_each_of_its_cores_up_to_four(monkeypatch, cores, ranks, workers):
    monkeypatch.setattr('os.sched_getaffinity', lambda pid: set(range(cores)), raising=False)
    monkeypatch.setenv('LOCAL_WORLD_SIZE', str(ranks))
    args = parse_config(DATA)
    text = args.to_yaml()
    share = max(1, cores // ranks)
    assert loader_workers(args, [0]) == (workers, f'of {share} core{"s" * (share > 1)}; -j sets it')
    assert yaml.safe_load(text)['workers'] is None


@pytest.mark.parametrize('given', [0, 4, 9])
def test_a_given_number_of_loader_processes_is_kept(monkeypatch, tmp_path, given):
    monkeypatch.setattr('os.sched_getaffinity', lambda pid: {0}, raising=False)
    (tmp_path / 'args.yaml').write_text(parse_config([*DATA, '-j', str(given)]).to_yaml())
    args = parse_config(['-c', str(tmp_path / 'args.yaml')])
    text = args.to_yaml()
    assert loader_workers(args, [0])[0] == given
    assert yaml.safe_load(text)['workers'] == given


@pytest.mark.parametrize('naflex', [True, False])
def test_what_is_drawn_by_worker_has_timms_number_of_them_on_any_machine(monkeypatch, naflex):
    monkeypatch.setattr('os.sched_getaffinity', lambda pid: {0}, raising=False)
    stream = type('Stream', (IterableDataset,), {'__iter__': lambda self: iter(())})()
    args = parse_config([*DATA, *(['--naflex-loader'] if naflex else [])])
    assert loader_workers(args, [0] if naflex else stream)[0] == 4


@pytest.mark.parametrize(
    ('argv', 'said'),
    [
        (['--model-ema-decay', '0.9'], '--model-ema-decay without --model-ema'),
        (['--model-ema-warmup'], '--model-ema-warmup without --model-ema'),
        (['--clip-mode', 'agc'], '--clip-mode without --clip-grad'),
        (['--opt-betas', '0.8', '0.9'], '--opt-betas with --opt sgd'),
        (['--opt-eps', '1e-3'], '--opt-eps with --opt sgd'),
        (['--opt', 'adamw', '--momentum', '0.5'], '--momentum with --opt adamw'),
        (['--aa', 'rand-m9', '--color-jitter', '0.1'], '--color-jitter with --aa'),
        (['--lr', '0.1', '--lr-base-size', '512'], '--lr-base-size with --lr'),
        (['--no-aug', '--train-interpolation', 'bicubic'], '--train-interpolation with --no-aug'),
        (['--sched', 'step', '--min-lr', '1e-4'], '--min-lr with --sched step'),
        (['--sched', 'none', '--cooldown-epochs', '3'], '--cooldown-epochs with --sched none'),
        (['--resplit'], '--resplit without --reprob'),
        (['--drop-path', '0.1', '--drop-connect', '0.2'], '--drop-connect with --drop-path'),
        (['--amp-dtype', 'bfloat16'], '--amp-dtype without --amp'),
        (['--mixup-mode', 'elem'], '--mixup-mode without --mixup or --cutmix or --cutmix-minmax'),
        (['--recount', '2'], '--recount without --reprob'),
        (['--patience-epochs', '3'], '--patience-epochs without --sched plateau'),
        (['--lr-k-decay', '2', '--sched', 'step'], '--lr-k-decay without --sched cosine or --sched poly'),
        (['--lr', '0.1', '--lr-base', '0.2'], '--lr-base with --lr'),
        (['--no-aug', '--hflip', '0'], '--hflip with --no-aug'),
        (['--no-aug', '--reprob', '0.5', '--no-prefetcher'], '--reprob with --no-aug'),
        (['--no-aug', '--reprob', '0.5'], '--reprob with --no-aug'),
        (['--lr-cycle-decay', '0.3'], '--lr-cycle-decay without --lr-cycle-limit'),
        (['--naflex-loader', '--mixup', '0.2', '--mixup-mode', 'elem'], '--mixup-mode with --naflex-loader'),
        (['--teacher', 'x', '--no-teacher-ema'], '--no-teacher-ema without --teacher-checkpoint'),
    ],
)
def test_a_flag_of_timm_that_does_nothing_is_named_with_the_reason(argv, said):
    assert rules.without_effect(parse_config([*DATA, *argv])) == [said]


def rates(argv):
    """The learning rates of a run whose metric stands still, an epoch each, as timm's schedule gives them."""
    config = parse_config(argv)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    scheduler, epochs = create_scheduler_v2(
        optimizer, **scheduler_kwargs(config, decreasing_metric=False), updates_per_epoch=4
    )
    found = []
    for epoch in range(epochs):
        found.append(optimizer.param_groups[0]['lr'])
        if scheduler is not None:
            scheduler.step(epoch + 1, 1.0)
    return found


@pytest.mark.parametrize(
    'flag', [['--cooldown-epochs', '3'], ['--min-lr', '0.06'], ['--warmup-epochs', '2']], ids=' '.join
)
@pytest.mark.parametrize('sched', declared_in(ScheduleFlags)['sched'].allowed)
def test_a_flag_is_said_to_do_nothing_in_exactly_the_schedules_that_it_does_not_change(sched, flag):
    argv = [*DATA, '--sched', sched, '--lr', '0.1', '--epochs', '8', '--warmup-epochs', '0']
    argv += {
        'plateau': ['--patience-epochs', '0'],
        'multistep': ['--decay-milestones', '3'],
        'step': ['--decay-epochs', '3'],
        'wsd': ['--decay-epochs', '3'],
        'rsqrt': ['--decay-epochs', '3', '--lr-stable-timescale', '2'],
    }.get(sched, [])
    changes = rates([*argv, *flag]) != rates(argv)
    assert (f'{flag[0]} with --sched {sched}' in rules.without_effect(parse_config([*argv, *flag]))) != changes


@pytest.mark.parametrize(
    'argv',
    [
        [],
        ['--model-ema', '--model-ema-decay', '0.9'],
        ['--clip-mode', 'agc', '--clip-grad', '0.1'],
        ['--cutmix-minmax', '0.2', '0.8', '--mixup-mode', 'elem'],
        ['--sched', 'plateau', '--patience-epochs', '3', '--decay-rate', '0.5'],
        ['--lr-cycle-limit', '2', '--lr-cycle-mul', '2', '--lr-cycle-decay', '0.3'],
    ],
)
def test_nothing_is_said_of_flags_that_do_something(argv):
    assert rules.without_effect(parse_config([*DATA, *argv])) == []


@pytest.mark.parametrize('recipe', sorted((Path(__file__).parents[2] / 'hparams').glob('*.yaml')), ids=lambda f: f.stem)
def test_no_recipe_has_a_flag_without_effect(recipe):
    assert rules.without_effect(parse_config([*DATA, '-c', str(recipe)])) == []


def test_what_a_flag_is_idle_without_are_flags():
    declared = declared_in(RunConfig)
    conditions = {c for d in declared.values() for c in d.idle_without}
    assert conditions
    assert {c.partition('=')[0] for c in conditions} <= set(declared)


@pytest.mark.parametrize('mode', ['reduce-overhead', 'max-autotune'])
def test_cuda_graphs_are_refused_beside_accumulated_gradients(mode, capsys):
    argv = [*DATA, '--torchcompile', 'eager', '--torchcompile-mode', mode, '--grad-accum-steps', '2']
    assert 'use max-autotune-no-cudagraphs' in refused(argv, capsys)
    for allowed in (
        ['--grad-accum-steps', '1'],
        ['--device', 'cpu'],
        ['--torchcompile-mode', 'max-autotune-no-cudagraphs'],
    ):
        parse_config([*argv, *allowed])


def test_memory_is_pinned_with_cuda_alone_unless_switched_off():
    assert pins_memory(parse_config(DATA), 'cuda')
    assert not pins_memory(parse_config(DATA), 'cpu')
    assert not pins_memory(parse_config([*DATA, '--no-pin-mem']), 'cuda')
