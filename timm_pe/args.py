"""Command line and YAML of a run: timm's flags and ours. What they may be is said in args_check.py."""

import argparse
import ast
import functools
import os
import reprlib
from collections.abc import Collection, Sequence
from typing import Any

import torch
import yaml
from timm.utils import ParseKwargs
from torch.utils.data import Dataset, IterableDataset

from .args_check import AT_MOST, check, check_values, odd_value
from .args_timm import add_timm_args
from .args_yaml import read_config, read_yaml, runs_code, typed_value
from .cli import Parser
from .losses import FEATURE_LOSS_NAMES, TEACHER_NORMS
from .projectors import PROJECTOR_NAMES
from .task import TARGETS

# how the args.yaml of a run says that its student was built and fed: what a teacher takes from there, ...
_OF_A_TEACHER = ('model', 'model_kwargs', 'pretrained_cfg_overlay', 'in_chans', 'gp', 'img_size', 'input_size', 'mean', 'std')  # fmt: skip
# ... and what an evaluation takes, that it computes what the run's own validation did. Of flags in one line none is taken where
# one of them is given: they say one thing together
_OF_AN_EVALUATION = (
    *((name,) for name in ('model', 'model_kwargs', 'pretrained_cfg_overlay', 'num_classes', 'in_chans', 'gp', 'bn_eps')),
    ('img_size', 'input_size'),
    *((name,) for name in ('mean', 'std', 'crop_pct', 'interpolation', 'input_img_mode', 'val_split', 'class_map')),
    ('data', 'data_dir', 'dataset', 'val_num_samples', 'input_key', 'target_key'),
    ('amp', 'amp_dtype', 'model_dtype'),
    ('naflex_loader', 'naflex_max_seq_len', 'naflex_patchify_channels_first'),
    *((name,) for name in ('task', 'target_format', 'multilabel_threshold', 'tta', 'model_ema_force_cpu')),
)  # fmt: skip
# loader processes
_TIMM_WORKERS = 4


def create_parser(prog: str = 'train_distill') -> Parser:
    """The parser of the whole command line."""
    parser = Parser(
        prog=prog,
        usage='%(prog)s [-h] [-c FILE] [DIR] [--model NAME] [--teacher NAME] [--flag VALUE ...]',
        description="timm's ImageNet training with a teacher: projector ensemble feature distillation",
        allow_abbrev=False,
        formatter_class=argparse.HelpFormatter,
    )
    parser.add_argument(
        '-c',
        '--config',
        metavar='FILE',
        type=str,
        default='',
        help='YAML file of flags, or the name of a recipe of hparams/; the command line wins',
    )
    _add_teacher_args(parser)
    add_timm_args(parser)
    for action in parser._actions:
        if isinstance(action, ParseKwargs):
            action.type = _pair
    return parser


@functools.cache
def _unset() -> Parser:
    """What flags are that were not given: the parser of a run has what YAML said as its defaults."""
    return create_parser()


def _pair(text: str) -> str:
    """A word of the form key=value, as ParseKwargs takes it apart without asking."""
    key, _, value = text.partition('=')
    if text and not (key.isidentifier() and '=' in text):
        raise argparse.ArgumentTypeError(f'takes key=value pairs, got {reprlib.repr(text)}')
    try:
        ast.literal_eval(value)
    except (ValueError, SyntaxError):
        pass  # a plain word
    except Exception as e:  # too deep, unhashable, ...
        raise argparse.ArgumentTypeError(f'cannot read {reprlib.repr(text)} ({type(e).__name__})') from e
    return text


# a flag is a line
# fmt: off
def _add_teacher_args(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("what this adds to timm's training: teacher and projector ensemble").add_argument
    add('--teacher', metavar='NAME', type=str, default=None, help="the teacher: a timm name, 'hf-hub:...' or 'local-dir:...'")
    add('--teacher-pretrained', action=argparse.BooleanOptionalAction, default=True, help="load the weights that belong to the teacher's name, or leave random ones")
    add('--teacher-checkpoint', metavar='PATH', type=str, default=None, help='weights of the teacher: a file (.safetensors, .pth, .pth.tar) or a run folder')
    add('--teacher-eval', action=argparse.BooleanOptionalAction, default=True, help='validate the teacher before the first epoch')
    add('--teacher-ema', action=argparse.BooleanOptionalAction, default=True, help='prefer the EMA weights of --teacher-checkpoint where it has some')
    add('--teacher-num-classes', metavar='N', type=int, default=None, help="classes of the teacher; None: the checkpoint's, or what belongs to its name")
    add('--teacher-input-size', metavar='N', type=int, default=None, help="side in pixels that the teacher sees (bicubic); None: the student's if its architecture can, else its own")
    add('--teacher-mean', metavar='R', type=float, nargs='+', default=None, help='mean the teacher was trained with; None: that of its run folder, or what belongs to its name')
    add('--teacher-std', metavar='R', type=float, nargs='+', default=None, help='its standard deviation, likewise')
    add('--teacher-dtype', type=str, default=None, help="precision of the teacher: float32, bfloat16 or float16; None: float32, under the student's AMP")
    add('--teacher-kwargs', nargs='*', default={}, action=ParseKwargs, help='more arguments for the teacher, k=v ...')
    add('--teacher-tap', metavar='PATH', type=str, default=None, help="module whose input is the teacher's feature; None: the classifier")
    add('--teacher-fold', action=argparse.BooleanOptionalAction, default=True, help="fold the teacher's batch norms into the layers before them, where that is exact to rounding")
    add('--teacher-cache', metavar='DIR', type=str, default=None, help="keep the teacher's features of each training image in this folder and read them from there; python -m timm_pe.precompute fills it ahead")
    add('--teacher-cache-views', metavar='K', type=int, default=1, help='augmented views of an image in it: epoch e trains on view e mod K')
    add('--student-tap', metavar='PATH', type=str, default=None, help="module whose input is the student's feature; None: the classifier")
    add('--pe-projectors', metavar='Q', type=int, default=3, help='number of projectors')
    add('--pe-projector', metavar='NAME', type=str, default='linear', choices=PROJECTOR_NAMES, help='kind of projector: %(choices)s')
    add('--pe-act', type=str, default='auto', choices=('auto', 'relu', 'none'), help="activation of the projectors; auto: relu exactly when the teacher's features on the first batch are all >= 0")
    add('--pe-loss', metavar='NAME', type=str, default=None, choices=FEATURE_LOSS_NAMES, help='loss between projection and target: %(choices)s; None: direction for features, kl for logits')
    add('--pe-target', type=str, default='feature', choices=TARGETS, help="what the projectors map: the student's feature to the teacher's, or its logits to the teacher's (kd1proj, arXiv 2310.17183)")
    add('--pe-teacher-norm', metavar='NAME', type=str, default='none', choices=list(TEACHER_NORMS), help=f"normalization of the teacher's feature before the loss: {', '.join(TEACHER_NORMS)}")
    add('--kd-loss-weight', metavar='R', type=float, default=0.0, help='weight of plain logit distillation next to it')
    add('--train-crop-pad', metavar='N', type=int, default=0, help='in place of the random resized crop: resize to --img-size, pad by N pixels and crop at random (CIFAR recipes: 4)')
    add('--nonfinite', type=str, default='stop', choices=('stop', 'skip'), help='what a loss or gradient that is NaN or infinite does: stop the run, or skip the update and say so')
    add('--log-tb', action='store_true', default=False, help="log to TensorBoard: RUN/tensorboard")
    add('--log-trackio', action='store_true', default=False, help='log to trackio: RUN/trackio, or TRACKIO_DIR of the environment')
    add('--evaluate', metavar='PATH', type=str, default='', help='validate the student in this checkpoint or run folder as its run did where no flag says else, and stop (a --teacher is not even loaded)')
# fmt: on


def parse_args(argv: list[str] | None = None, prog: str = 'train_distill') -> tuple[argparse.Namespace, str]:
    """Parse flags over YAML over defaults, and refuse what cannot work.

    Args:
        argv: Arguments; None takes those of the process.
        prog: Command to name in messages.

    Returns:
        The namespace, and its YAML text as it goes into args.yaml: YAML and flags merged, before derived values.
    """
    parser = create_parser(prog)
    config_parser = Parser(prog=prog, add_help=False, allow_abbrev=False)
    config_parser.add_argument('-c', '--config', type=str, default='')
    config_parser.add_argument('--evaluate', type=str)
    known = config_parser.parse_known_args(argv)[0]
    config = read_config(parser, known.config) if known.config else {}
    evaluated = config.get('evaluate') if known.evaluate is None else known.evaluate
    if evaluated and find_run_args(evaluated):
        given = {*config, *_given_flags(argv, prog)}
        parser.set_defaults(**_evaluation_settings(evaluated, given))
    parser.set_defaults(**config)
    args = parser.parse_args(argv)
    check_values(parser, args)
    text = yaml.safe_dump(vars(args), default_flow_style=False)
    check(parser, args, _unset())
    return args, text


def _given_flags(argv: list[str] | None, prog: str) -> set[str]:
    """What the command line names, at whatever value."""
    parser = create_parser(prog)
    for action in parser._actions:
        action.default = argparse.SUPPRESS
    return set(vars(parser.parse_args(argv)))


def find_run_args(path: str | None) -> str:
    """The args.yaml of a run folder, or of that in which a checkpoint file lies; empty where there is none."""
    folder = path if path and os.path.isdir(path) else os.path.dirname(path or '')
    file = os.path.join(folder, 'args.yaml')
    return file if path and os.path.isfile(file) else ''


def _evaluation_settings(path: str, given: Collection[str]) -> dict[str, Any]:
    """What an evaluation takes from the run of the checkpoint `path`, where these flags are `given`."""
    run = read_run_settings(find_run_args(path), '--evaluate', [name for names in _OF_AN_EVALUATION for name in names])
    if run['input_size'] and run['in_chans'] is None:
        run['in_chans'] = run['input_size'][0]
    taken = [name for names in _OF_AN_EVALUATION if not set(names) & set(given) for name in names]
    return {name: run[name] for name in taken if run[name] is not None}


def describe_evaluation(args: argparse.Namespace) -> str:
    """In words which flags of --evaluate are those of its run, and which that run had at another value."""
    unset = _unset()
    run = {k: v for k, v in _evaluation_settings(args.evaluate, ()).items() if v != unset.get_default(k)}
    same = [f'{name} {_shown(value)}' for name, value in run.items() if getattr(args, name) == value]
    other = [f'{name} {_shown(value)}' for name, value in run.items() if getattr(args, name) != value]
    given = f'; given otherwise: {", ".join(other)}' if other else ''
    return f"--evaluate: from '{find_run_args(args.evaluate)}': {', '.join(same) or 'nothing'}{given}."


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return ' '.join(f'{k}={v}' for k, v in value.items())
    return ' '.join(map(str, value)) if isinstance(value, list) else str(value)


def read_run_settings(path: str, what: str, names: Sequence[str] = _OF_A_TEACHER) -> dict[str, Any]:
    """How the args.yaml of a run folder says that its student was built and fed.

    Args:
        path: The args.yaml.
        what: What the folder was given for ('--teacher-checkpoint'), for messages.
        names: Flags to read.

    Returns:
        Their values, None where it says nothing of them. What is none of a flag's values ends the process with one line, as on the
        command line.
    """
    parser = create_parser()
    try:
        run = read_yaml(path)
    except ValueError as e:
        parser.error(f'{what}: {e}')
    if not run:
        parser.error(f"{what}: '{path}' is empty, it should say how the student was built and fed")
    settings = dict.fromkeys(names)
    for action in parser._actions:
        if action.dest in settings and run.get(action.dest) is not None:
            if runs_code(action.dest, run[action.dest]):
                parser.error(f"{what}: {action.dest} in '{path}' runs code and is taken from the command line alone")
            settings[action.dest] = typed_value(parser, action, action.dest, run[action.dest], path, what)
    for key, value in settings.items():
        odd = odd_value(value)
        if (key == 'std' and value and min(value) <= 0) or (key == 'in_chans' and value is not None and value < 1):
            odd = f'must be above 0, got {value}'
        sizes = value if key == 'input_size' else [value] if key == 'img_size' else []
        if any(v is not None and not 1 <= v <= AT_MOST['img_size'] for v in sizes or ()):
            odd = f'must be from 1 to {AT_MOST["img_size"]}, got {value}'
        if odd:
            parser.error(f"{what}: {key} in '{path}' {odd}")
    return settings


def resolve_lr(args: argparse.Namespace, world_size: int) -> float:
    """--lr, or --lr-base scaled by the global batch, linearly or by its square root, as timm does it."""
    if args.lr is not None:
        return args.lr
    scale = args.lr_base_scale or ('sqrt' if any(o in args.opt.lower() for o in ('ada', 'lamb')) else 'linear')
    ratio = args.batch_size * world_size * args.grad_accum_steps / args.lr_base_size
    return args.lr_base * (ratio**0.5 if scale == 'sqrt' else ratio)


def resolve_smoothing(args: argparse.Namespace) -> float:
    """--smoothing, or timm's default of the task: 0.1 for one label, 0 for many."""
    if args.smoothing is not None:
        return args.smoothing
    return 0.0 if args.task == 'multilabel' else 0.1


def resolve_workers(args: argparse.Namespace, dataset: Dataset) -> tuple[int, str]:
    """Loader processes on this rank, and why so many: --workers, or one for each core of this rank, up to timm's default of 4.

    Draws of a stream and of NaFlex batches depend on the number, so there it is 4 on every machine.
    """
    if args.workers is not None:
        return args.workers, 'as -j says'
    if args.naflex_loader or isinstance(dataset, IterableDataset):
        return _TIMM_WORKERS, 'what is drawn depends on the number; -j sets it'
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
    cores = max(1, cores // int(os.environ.get('LOCAL_WORLD_SIZE', 1)))  # torchrun's number of ranks on this machine
    return min(_TIMM_WORKERS, cores), f'of {cores} core{"s" * (cores > 1)}; -j sets it'


def resolve_dtype(name: str | None) -> torch.dtype | None:
    """The torch dtype called `name`."""
    return getattr(torch, name) if name else None
