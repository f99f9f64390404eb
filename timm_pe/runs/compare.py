"""Finished runs side by side: which of them can be compared, and what their difference is."""

import argparse
import ast
import itertools
import json
import os
import re
import shlex
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from ..config.declare import NOT_GIVEN, declared_in, default_of, neutral_in
from ..config.flags import CacheFlags, ProjectorFlags, TeacherFlags, TimmDistillationFlags
from ..config.rules import STREAMED_KINDS
from ..config.run_config import GROUPS, RunConfig, create_parser
from ..config.teachers import as_each
from ..method.names import TARGETS
from ..method.weight_files import BEST, LAST, STUDENT
from .finished import Run

# flags in which two runs of one method may differ, besides the number in their name
_OF_A_SEED = {'seed', *neutral_in(RunConfig)}
# flags whose path may have the number of the run in it
_PATHS_OF_A_SEED = ('teacher_cache', 'pretrained_path', 'initial_checkpoint')
# flags that identify a student, whether it is trained with a teacher or without
_OF_A_STUDENT = ('model', 'model_kwargs')
# flags in which a run with a teacher and one without may differ: those of the teacher, those that do not change what is
# learnt, and those that `differing` compares by what came of them
_NOT_OF_A_PAIR = {
    *(
        name
        for group in (TeacherFlags, CacheFlags, ProjectorFlags, TimmDistillationFlags)
        for name in declared_in(group)
    ),
    *('unlabeled', 'unlabeled_ratio', 'val_fraction'),
    *neutral_in(RunConfig),
    *('val_interval', 'validation_batch_size', 'nonfinite', 'grad_checkpointing'),
    *('channels_last', 'fuser', 'torchscript', 'torchcompile', 'torchcompile_mode'),
    *('data', 'data_dir', 'num_classes'),
}
# at most so many differences are named
_NAMED = 6


@dataclass
class Group:
    """Runs that differ only in their seed, or a single run.

    Attributes:
        name: The runs' name without its number.
        runs: One or more.
        color: Its place in the palette, from 0.
    """

    name: str
    runs: list[Run]
    color: int = 0

    def mean(self, value: Callable[[Run], float | None]) -> tuple[float | None, float | None]:
        """Mean and sample standard deviation of a value over the runs that have it; None if there is none."""
        values = [v for v in map(value, self.runs) if v is not None]
        return (
            statistics.mean(values) if values else None,
            statistics.stdev(values) if len(values) > 1 else None,
        )


def group_seeds(runs: Sequence[Run]) -> list[Group]:
    """Group runs whose names end in -1, -2, ... and whose arguments are equal except for seed and name.

    Paths of `_PATHS_OF_A_SEED` are equal, or each has the number of its run.
    """
    alike: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        match = re.fullmatch(r'(.+)-\d+', run.name)
        left_out = {*(_OF_A_SEED - _learnt_from(run)), *_PATHS_OF_A_SEED, 'resume'}
        settings = {k: v for k, v in run.args.items() if k not in left_out}
        key = (match[1], json.dumps(settings, sort_keys=True, default=str)) if match else (run.name, '')
        alike.setdefault(key, []).append(run)
    groups: dict[tuple[str, ...], list[Run]] = {}
    for (name, rest), members in alike.items():
        numbered = {run.name: _paths(run, numbered=True) for run in members}
        own = len(set(numbered.values())) == 1
        for run in members:
            groups.setdefault((name, rest, numbered[run.name] if own else _paths(run)), []).append(run)
    # in the order of their first runs
    ordered = sorted(groups.items(), key=lambda item: runs.index(item[1][0]))
    return [
        Group(name if len(members) > 1 else members[0].name, members, color)
        for color, ((name, *_), members) in enumerate(ordered)
    ]


def _paths(run: Run, numbered: bool = False) -> str:
    """The paths of `_PATHS_OF_A_SEED` of a run; `numbered`: the last mention of its number in each as '#'."""
    number = re.escape(run.name.rpartition('-')[2])
    names = [*_PATHS_OF_A_SEED, *(['resume'] if run.args.get('no_resume_opt') else [])]
    paths = [str(run.args.get(name)) for name in names]
    return (
        ' '.join(re.sub(rf'(.*)(?<!\d){number}(?!\d)', r'\1#', path) for path in paths) if numbered else ' '.join(paths)
    )


def baseline(run: Run, runs: Sequence[Run]) -> Run | None:
    """The run that shows what a teacher adds: the same model without one, under equal conditions (see `differing`).

    None for a run without a teacher, and if there is no such run.
    """
    return next((other for other in _without_teacher(run, runs) if not differing(run, other)), None)


def _without_teacher(run: Run, runs: Sequence[Run]) -> list[Run]:
    """The runs of the same model without a teacher; none for a run without a teacher."""
    if run.teacher is None:
        return []
    return [
        other
        for other in runs
        if other.teacher is None and all(other.args.get(k) == run.args.get(k) for k in _OF_A_STUDENT)
    ]


def differing(run: Run, other: Run) -> list[str]:
    """The conditions that two runs do not share, each with both values; numbers that one of them lacks are not compared."""
    known = {
        'num classes': [r.args.get('num_classes') for r in (run, other)],
        'ranks': [r.ranks for r in (run, other)],
        'highest learning rate': [r.highest_rate for r in (run, other)],
        'last epoch': [r.final.get('epoch') for r in (run, other)],
        'validation images': [((r.analysis or {}).get('images') or {}).get('validation') for r in (run, other)],
    }
    pairs: dict[str, tuple[Any, ...]] = {'data folder': (_data_folder(run), _data_folder(other))}
    pairs.update({name: (f'{a:g}', f'{b:g}') for name, (a, b) in known.items() if None not in (a, b)})
    compared = (set(declared_in(RunConfig)) - _NOT_OF_A_PAIR) | _learnt_from(run) | _learnt_from(other)
    for name in itertools.chain.from_iterable(map(declared_in, GROUPS)):
        if name in compared:
            values = [r.args.get(name, default_of(RunConfig, name)) for r in (run, other)]
            pairs[name.replace('_', ' ')] = tuple('none' if value in (None, '', [], {}) else value for value in values)
    return [f'{name} {a} and {b}' for name, (a, b) in pairs.items() if a != b]


def _learnt_from(run: Run) -> set[str]:
    """Flags that change nothing elsewhere, and do in this run."""
    args, found = run.args, set()
    if args.get('no_resume_opt'):  # it starts from weights of another run
        found |= {'resume', 'no_resume_opt'}
    if args.get('sched') == 'plateau':  # the schedule follows what is measured
        found |= {'eval_metric', 'val_interval', 'save_epochs'}
        if args.get('eval_metric') == 'knn':
            found.add('knn_data')
    if args.get('naflex_loader') or str(args.get('dataset')).lower().split('/')[0] in STREAMED_KINDS:
        found.add('workers')  # what is drawn depends on their number
    return found


def _data_folder(run: Run) -> str:
    return ' '.join(map(os.path.abspath, run.data_folders)) or 'none'


def difference(run: Run, runs: Sequence[Run]) -> float | None:
    """Final top-1 of a run minus that of its `baseline`, in points."""
    other = baseline(run, runs)
    if other is None:
        return None
    with_it, without = run.final.get('eval_top1'), other.final.get('eval_top1')
    return None if with_it is None or without is None else with_it - without


def epochs_to_baseline(run: Run, runs: Sequence[Run]) -> int | None:
    """After how many epochs a run had the final top-1 of its `baseline`; None if it has none or never had it."""
    other = baseline(run, runs)
    final = other.final.get('eval_top1') if other else None
    return None if final is None else run.epochs_to(final)


def confidence_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """The 95 % t interval of the mean of `values`; None for fewer than two."""
    if len(values) < 2:
        return None
    from scipy.stats import t

    mean, half = statistics.mean(values), t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5
    return float(mean - half), float(mean + half)


def why_no_difference(run: Run, runs: Sequence[Run]) -> str:
    """Why a run with a teacher has no `baseline`: the closest run, and what differs.

    Empty if it has one, and if no run is of its model without a teacher.
    """
    others = [(differing(run, other), other.name) for other in _without_teacher(run, runs)]
    if not others or baseline(run, runs):
        return ''
    differences, name = min(others, key=lambda o: len(o[0]))
    more = [f'{len(differences) - _NAMED} more'] if len(differences) > _NAMED else []
    return f'none to {name}: {", ".join([*differences[:_NAMED], *more])}'


def teaches(run: Run, runs: Sequence[Run]) -> bool:
    """Whether the teacher of another of the runs was loaded from this one's folder."""
    return taught_epoch(run, runs) is not None


def taught_epoch(run: Run, runs: Sequence[Run]) -> dict[str, float | None] | None:
    """The row of the epoch whose weights another run (the first such) loaded as its teacher; None if none did.

    Empty if the epoch was not validated, or cannot be told from the file.
    """
    folder = Path(os.path.realpath(run.folder.path))
    checkpoints = [(other, path) for other in runs for path in as_each(other.args.get('teacher_checkpoint')) if path]
    for other, checkpoint in checkpoints:
        path = Path(os.path.realpath(checkpoint))
        if folder not in (path, path.parent):
            continue
        file = path.name
        if path == folder:
            names = (STUDENT, BEST, LAST) if other.args.get('teacher_ema', True) else (BEST, LAST)
            file = next((name for name in names if (folder / name).is_file()), names[0])
        if file in (STUDENT, BEST):
            return run.exported
        kept = re.fullmatch(r'(checkpoint|milestone)-(\d+)\.pth\.tar', file)
        epoch = run.rows[-1]['epoch'] if file == LAST else None
        if kept:
            epoch = int(kept[2]) - (kept[1] == 'milestone')  # named by the number of epochs done
        return next((row for row in run.validated if row['epoch'] == epoch), {})
    return None


def shown_epoch(run: Run, runs: Sequence[Run]) -> dict[str, float | None]:
    """The row that represents a run: its last validated one; for a teacher of others, that of the weights they took."""
    taught = taught_epoch(run, runs)
    return run.final if taught is None else taught


def describe_method(run: Run) -> str:
    """How a run was taught, in words: projectors, activation, loss, weights."""
    args = run.args
    if args.get('kd_model_name'):
        return f"timm's own {args.get('kd_distill_type', 'logit')} distillation"
    if not run.teacher:
        return 'labels alone'
    target = args.get('pe_target') or 'feature'
    recipe = TARGETS[target]
    loss = args.get('pe_loss') or recipe.feature_loss
    given = [
        (args.get('task_loss_weight'), recipe.task_loss_weight if run.has_labels else 0, 'task loss'),
        (args.get('distill_loss_weight'), recipe.distill_loss_weight, loss),
        (args.get('pe_map_weight'), 0, 'direction of maps'),
        (args.get('kd_loss_weight'), 0, f'KL at T = {args.get("kd_temperature", 4):g}'),
    ]
    weights = [(default if weight is None else weight, name) for weight, default, name in given]
    return f'{_projectors(run, target)}; {" + ".join(f"{weight:g} × {name}" for weight, name in weights if weight)}'


def _projectors(run: Run, target: str) -> str:
    args = run.args
    kind, act, norm = args.get('pe_projector'), cast(str, args.get('pe_act')), args.get('pe_teacher_norm')
    if act == 'auto':
        act = ((run.analysis or {}).get('projectors') or {}).get('act') or act
    words = ['no projector' if kind == 'identity' else f'{args.get("pe_projectors")} × {kind}']
    if kind != 'identity' and target == 'feature':
        words.append({'none': 'no activation', 'auto': 'activation by the teacher'}.get(act, act))
    if target != 'feature':
        words.append(f'on {target}')
    if norm not in (None, 'none'):
        words.append(f'teacher {norm}')
    return ', '.join(words)


def command(run: Run) -> list[list[str]]:
    """The command line of a run: the flags whose values are not the parser's defaults, and no others.

    Returns:
        Lists of words that belong together: the program with the data folder, then each flag with its values. If a
        setting can only be given in YAML (no colour jitter at all, a mean for each teacher), the command is `-c args.yaml`.
    """
    parser = create_parser()
    chunks = [['train-distill']]
    for action in parser._actions:
        default = parser.get_default(action.dest)
        value = run.args.get(action.dest, default)
        if action.dest in ('help', 'config') or value == default:
            continue
        if value is None or (isinstance(value, list) and any(isinstance(v, (list, dict)) for v in value)):
            return [['train-distill', '-c', str(run.folder.args_file)]]
        if not action.option_strings:
            chunks[0].append(str(value))
        elif isinstance(action, argparse.BooleanOptionalAction):
            chunks.append([action.option_strings[0 if value else 1]])
        elif action.nargs == 0:
            chunks += [[action.option_strings[-1]]] if value == action.const else []
        else:
            chunks.append(_flag_words(action.option_strings, value))
    return chunks


def _flag_words(names: Sequence[str], value: Any) -> list[str]:
    flag = next(name for name in names if name.startswith('--'))
    if isinstance(value, dict):
        return [flag, *(f'{k}={_literal(v)}' for k, v in value.items())]
    if isinstance(value, list):
        return [flag, *(NOT_GIVEN if v is None else str(v) for v in value)]
    # a value that starts with a dash would be read as a flag
    return [f'{flag}={value}'] if str(value).startswith('-') else [flag, str(value)]


def _literal(value: Any) -> str:
    """A value of a `k=v` flag; words that would be read as a number, None or True get quotes."""
    return value if isinstance(value, str) and not _is_literal(value) else repr(value)


def _is_literal(text: str) -> bool:
    try:
        ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return False
    return True


def format_command(chunks: Sequence[Sequence[str]], width: int = 88) -> str:
    """A command for a shell, quoted, with a backslash before each line break."""
    lines = ['']
    for chunk in map(shlex.join, chunks):
        if lines[-1] and len(lines[-1]) + 1 + len(chunk) > width:
            lines.append('   ')
        lines[-1] = f'{lines[-1]} {chunk}' if lines[-1] else chunk
    return ' \\\n'.join(lines)
