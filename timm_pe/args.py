"""Command line and YAML of a run: timm's flags, ours, and what can be refused before any work is done."""

import argparse
import ast
import datetime
import difflib
import functools
import operator
import os
import reprlib
import sys
import time
import unicodedata
from collections import Counter
from typing import Any, NoReturn

import torch
import yaml
from timm.optim import list_optimizers
from timm.utils import ParseKwargs, world_info_from_env

from .args_timm import add_timm_args
from .losses import FEATURE_LOSS_NAMES, TEACHER_NORMS
from .projectors import PROJECTOR_NAMES
from .recipes import find_config
from .task import TARGETS
from .trackers import is_tracked, missing_package

# a flag that only means something next to this one
_TEACHER_FLAGS = (
    'teacher_pretrained',
    'teacher_checkpoint',
    'teacher_eval',
    'teacher_ema',
    'teacher_num_classes',
    'teacher_input_size',
    'teacher_mean',
    'teacher_std',
    'teacher_dtype',
    'teacher_kwargs',
    'teacher_tap',
    'teacher_fold',
    'teacher_cache',
    'teacher_cache_views',
    'student_tap',
    'pe_projectors',
    'pe_projector',
    'pe_act',
    'pe_loss',
    'pe_target',
    'pe_teacher_norm',
    'kd_loss_weight',
)
# these mean something next to --teacher or --kd-model-name
_DISTILLATION_FLAGS = ('distill_loss_weight', 'task_loss_weight', 'kd_temperature')
# and these next to --kd-model-name alone
_KD_FLAGS = ('kd_distill_type', 'kd_loss_type', 'kd_student_feature_dim', 'kd_teacher_feature_dim', 'kd_token_distill_type')  # fmt: skip
_METRICS = {'classification': ('top1', 'top5', 'loss'), 'multilabel': ('map', 'micro_f1', 'macro_f1', 'sample_f1', 'loss')}  # fmt: skip
# prefix of flags -> the --loss they belong to
_LOSS_OF = {'asl_': 'asl', 'poly_': 'poly', 'twoway_': 'twoway', 'db_': 'db'}
_CHOICES = {
    'amp_dtype': ('float16', 'bfloat16'),
    'model_dtype': (None, 'float32', 'bfloat16', 'float16'),
    'teacher_dtype': (None, 'float32', 'bfloat16', 'float16'),
    'clip_mode': ('norm', 'value', 'agc'),
    'dist_bn': ('', 'broadcast', 'reduce'),
    'lr_base_scale': ('', 'linear', 'sqrt'),
    'mixup_mode': ('batch', 'pair', 'elem'),
    'remode': ('const', 'rand', 'pixel'),
    'train_crop_mode': (None, 'rrc', 'rkrc', 'rkrr'),
    'worker_seeding': ('all', 'part'),
    'fuser': ('', 'te', 'old', 'legacy', 'nvfuser', 'nvf'),
    'interpolation': ('', 'nearest', 'bilinear', 'bicubic', 'box', 'hamming', 'lanczos'),
    'train_interpolation': ('', 'random', 'nearest', 'bilinear', 'bicubic', 'box', 'hamming', 'lanczos'),
    'input_img_mode': (None, 'L', 'RGB', 'RGBA', 'CMYK', 'YCbCr', 'LAB', 'HSV'),  # of 8 bits
    'sched': ('cosine', 'tanh', 'step', 'multistep', 'poly', 'wsd', 'rsqrt', 'constant', 'plateau', 'none'),
}
_AT_LEAST = {
    'batch_size': 1,
    'validation_batch_size': 1,
    'grad_accum_steps': 1,
    'num_classes': 1,
    'img_size': 1,
    'in_chans': 1,
    'input_size': 1,
    'train_img_sizes': 1,
    'train_batch_sizes': 1,
    'train_size_probs': 0,
    'decay_milestones': 0,
    'color_jitter': 0,
    'epochs': 1,
    'checkpoint_hist': 1,
    'val_interval': 1,
    'log_interval': 1,
    'pe_projectors': 1,
    'train_crop_pad': 0,
    'teacher_num_classes': 0,
    'teacher_input_size': 1,
    'teacher_cache_views': 1,
    'recovery_interval': 0,
    'workers': 0,
    'seed': 0,
    'kd_loss_weight': 0,
    'warmup_epochs': 0,
    'cooldown_epochs': 0,
    'mixup_off_epoch': 0,
    'recount': 1,
    'train_num_samples': 1,
    'val_num_samples': 1,
    'epoch_repeats': 0,
    'aug_repeats': 0,
    'patience_epochs': 0,
    'warmup_lr': 0,
    'min_lr': 0,
    'decay_rate': 0,
    'start_epoch': 0,
    'lr': 0,
    'lr_base_size': 1,
    'weight_decay': 0,
    'clip_grad': 0,
    'mixup': 0,
    'cutmix': 0,
    'distill_loss_weight': 0,
    'task_loss_weight': 0,
}
# beyond these a slip of the finger fills the memory
_AT_MOST = {
    'workers': 1024,
    'pe_projectors': 1024,
    'img_size': 16384,
    'input_size': 16384,
    'train_img_sizes': 16384,
    'teacher_input_size': 16384,
}
# keys that would let a YAML file run something: whoever wants that says so on the command line
_RUN_CODE = ('device_modules', 'dataset_trust_remote_code')
# bytes of a YAML file, and values in what it gives for one flag
_MAX_YAML, _MAX_VALUES = 2**17, 10_000
_PROBABILITIES = ('hflip', 'vflip', 'reprob', 'mixup_prob', 'mixup_switch_prob', 'color_jitter_prob', 'grayscale_prob', 'gaussian_blur_prob', 'drop', 'drop_path', 'drop_block', 'smoothing', 'model_ema_decay', 'bce_target_thresh', 'layer_decay', 'multilabel_threshold')  # fmt: skip


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line, said once (by rank 0)."""

    def error(self, message: str) -> NoReturn:
        exit_with_error(message)

    def parse_args(self, args=None, namespace=None) -> argparse.Namespace:
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            known = [s for a in self._actions for s in a.option_strings]
            near = [m for u in unknown for m in difflib.get_close_matches(u.split('=')[0], known, n=1, cutoff=0.7)]
            hint = f', did you mean {", ".join(near)}?' if near else ' (--help lists the known ones)'
            self.error(f'unknown argument {" ".join(unknown)}{hint}')
        return parsed


def exit_with_error(message: str, code: int = 2) -> NoReturn:
    """Print one line on rank 0 and exit with `code`."""
    if world_info_from_env()[1] == 0:
        message = ' '.join(message.split())
        # what came from outside must neither fill the screen nor command the terminal
        message = message if len(message) <= 1200 else f'{message[:900]} ... {message[-250:]}'
        message = ''.join(c if c.isprintable() else ascii(c)[1:-1] for c in message)
        sys.stderr.write(f'train_distill: error: {message}\n')
        sys.stderr.flush()
    else:
        # a launcher stops the whole job at the first exit: leave rank 0 the time to say why
        time.sleep(5)
    raise SystemExit(code)


def create_parser() -> Parser:
    """The parser of the whole command line."""
    parser = Parser(
        prog='train_distill',
        usage='train_distill [-h] [-c FILE] [DIR] [--model NAME] [--teacher NAME] [--flag VALUE ...]',
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
    add('--evaluate', metavar='PATH', type=str, default='', help='validate the student in this checkpoint or run folder, and stop (a --teacher is not even loaded)')
# fmt: on


def parse_args(argv: list[str] | None = None) -> tuple[argparse.Namespace, str]:
    """Parse flags over YAML over defaults, and refuse what cannot work.

    Args:
        argv: Arguments; None takes those of the process.

    Returns:
        The namespace, and its YAML text as it goes into args.yaml: YAML and flags merged, before derived values.
    """
    parser = create_parser()
    config_parser = Parser(add_help=False, allow_abbrev=False)
    config_parser.add_argument('-c', '--config', type=str, default='')
    config = config_parser.parse_known_args(argv)[0].config
    if config:
        parser.set_defaults(**_read_config(parser, config))
    args = parser.parse_args(argv)
    _check_values(parser, args)
    text = yaml.safe_dump(vars(args), default_flow_style=False)
    _check(parser, args)
    return args, text


def _read_config(parser: Parser, path: str) -> dict[str, Any]:
    try:
        path = find_config(path)
        config = read_yaml(path)
    except ValueError as e:
        parser.error(f'--config: {e}')
    actions = {a.dest: a for a in parser._actions if a.dest not in ('help', 'config')}
    values = {}
    for key, value in config.items():
        dest = str(key).replace('-', '_')
        if dest == 'config':  # an args.yaml names the YAML it came from
            continue
        if (dest in _RUN_CODE and value) or (isinstance(value, str) and value.startswith('pipe:')):
            parser.error(f'--config: {key} runs code and is taken from the command line alone')
        if dest not in actions:
            near = difflib.get_close_matches(dest, actions, n=1)
            hint = f', did you mean {near[0]}?' if near else ''
            parser.error(f"--config: unknown key '{key}' in '{path}'{hint}")
        if dest in values:
            parser.error(f"--config: '{path}' gives {dest} twice, as {dest} and as {dest.replace('_', '-')}")
        values[dest] = _typed(parser, actions[dest], key, value, path)
    return values


def read_yaml(path: str) -> dict[str, Any]:
    """The 'key: value' lines of a YAML file; empty for an empty file. No tag in it makes more than plain values.

    Raises:
        ValueError: Unreadable, too large, no YAML, a key twice, or something else than 'key: value' lines.
    """
    try:
        with open(path, 'rb') as f:
            text = f.read(_MAX_YAML + 1)
    except (OSError, ValueError) as e:
        raise ValueError(f"cannot read '{path}' ({getattr(e, 'strerror', None) or e})") from e
    if len(text) > _MAX_YAML:
        raise ValueError(f"'{path}' is larger than {_MAX_YAML:,} bytes, no file of flags is")
    try:
        config = yaml.load(text, Loader=_UniqueKeyLoader)
    except Exception as e:  # YAML's own errors, and those of the Python types it makes: dates, numbers, depth
        reason = ' '.join(str(e).split())
        raise ValueError(f"'{path}' is no YAML file: {reason[:300]}") from e
    if config is None:
        return {}
    if not isinstance(config, dict):
        raise ValueError(f"'{path}' must hold 'flag: value' lines, it holds a {type(config).__name__}")
    return config


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML's safe loader, which takes the last of two equal keys in silence, without that."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        counts = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        for key, count in counts.items():
            if count > 1:
                raise yaml.YAMLError(f'it has the key {key!r} {count} times')
        return super().construct_mapping(node, deep)


def read_run_settings(path: str, what: str) -> dict[str, Any]:
    """How the args.yaml of a run folder says that its student was built and fed.

    Args:
        path: The args.yaml.
        what: What the folder was given for ('--teacher-checkpoint'), for messages.

    Returns:
        Its mean, std, in_chans, gp, model_kwargs, img_size and input_size, None where it says nothing of them. What is none of a flag's values
        ends the process with one line, as on the command line.
    """
    parser = create_parser()
    try:
        run = read_yaml(path)
    except ValueError as e:
        parser.error(f'{what}: {e}')
    if not run:
        parser.error(f"{what}: '{path}' is empty, it should say how the student was built and fed")
    settings = dict.fromkeys(('mean', 'std', 'in_chans', 'gp', 'model_kwargs', 'img_size', 'input_size'))
    for action in parser._actions:
        if action.dest in settings and run.get(action.dest) is not None:
            settings[action.dest] = _typed(parser, action, action.dest, run[action.dest], path, what)
    for key, value in settings.items():
        odd = _odd_value(value)
        if (key == 'std' and value and min(value) <= 0) or (key == 'in_chans' and value is not None and value < 1):
            odd = f'must be above 0, got {value}'
        sizes = value if key == 'input_size' else [value] if key == 'img_size' else []
        if any(v is not None and not 1 <= v <= _AT_MOST['img_size'] for v in sizes or ()):
            odd = f'must be from 1 to {_AT_MOST["img_size"]}, got {value}'
        if odd:
            parser.error(f"{what}: {key} in '{path}' {odd}")
    return settings


def _typed(parser: Parser, action: argparse.Action, key: str, value: Any, path: str, what: str = '--config') -> Any:
    """A YAML value, checked as the same words on the command line would be."""

    def refuse(expected: str) -> NoReturn:
        parser.error(f"{what}: {key} in '{path}' must be {expected}, got {reprlib.repr(value)}")

    def scalar(v: Any) -> Any:
        convert = action.type or str
        if (
            isinstance(v, bool)
            or not isinstance(v, (str, int, float, datetime.date))
            or (convert is int and isinstance(v, float) and not v.is_integer())
        ):
            refuse(f'of type {convert.__name__}')
        try:
            result = convert(v)
        except (TypeError, ValueError, OverflowError):
            refuse(f'of type {convert.__name__}')
        if action.choices and result not in action.choices:
            refuse(f'one of {", ".join(map(str, action.choices))}')
        return result

    if value is None:  # as if the flag had not been given; without a strength there is no color jitter, as in timm
        return None if action.dest == 'color_jitter' else action.default
    if value is True and action.nargs == '?' and action.const is not None:
        return action.const
    if action.nargs == 0 or isinstance(action, argparse.BooleanOptionalAction):
        return value if isinstance(value, bool) else refuse('true or false')
    if isinstance(action.default, dict):
        named = isinstance(value, dict) and all(isinstance(k, str) for k in value)
        return value if named else refuse("'key: value' lines")
    if action.nargs in ('+', '*') or isinstance(action.nargs, int):
        values = value if isinstance(value, list) else [value]
        if isinstance(action.nargs, int) and len(values) != action.nargs:
            refuse(f'a list of {action.nargs}')
        return [scalar(v) for v in values]
    return scalar(value)


def _check_values(parser: Parser, args: argparse.Namespace) -> None:
    for name, value in vars(args).items():
        odd = _odd_value(value)
        if odd:
            parser.error(f'{_flag(name)} {odd}')


def _odd_value(given: Any) -> str:
    """What makes `given` a value that no flag takes, in its lists and kwargs too; empty where nothing does."""
    rest, seen = [given], 0
    while rest:
        value, seen = rest.pop(), seen + 1
        if seen > _MAX_VALUES:  # a few aliases of YAML are enough for billions
            return f'holds more than {_MAX_VALUES:,} values'
        if isinstance(value, (list, tuple)):
            rest += value
        elif isinstance(value, dict):
            rest += [*value.keys(), *value.values()]
        elif isinstance(value, str):
            if any(unicodedata.category(c) == 'Cc' for c in value):
                return f'holds a control character: {reprlib.repr(value)}'
            if len(value) > 4096:
                return 'is longer than 4,096 characters'
        elif isinstance(value, float) and not abs(value) <= torch.finfo(torch.float32).max:
            return f'must be a finite number (of float32), got {value}'
        elif isinstance(value, int) and abs(value) >= 2**63:
            return 'must be under 2**63'
        elif not isinstance(value, (int, float, datetime.date, type(None))):
            return f'holds a {type(value).__name__}, it takes numbers, words and lists of them'
    return ''


def _check(parser: Parser, args: argparse.Namespace) -> None:
    for bounds, wrong, words in ((_AT_LEAST, operator.lt, 'or more'), (_AT_MOST, operator.gt, 'or less')):
        for name, bound in bounds.items():
            value = getattr(args, name)
            if any(v is not None and wrong(v, bound) for v in (value if isinstance(value, list) else [value])):
                parser.error(f'{_flag(name)} must be {bound} {words}, got {value}')
    for name in ('scale', 'ratio', 'cutmix_minmax'):
        value = getattr(args, name)
        if value is not None and len(value) != 2:
            parser.error(f'{_flag(name)} takes 2 values, got {len(value)}')
    for name in ('scale', 'cutmix_minmax'):
        value = getattr(args, name)
        if value is not None and not 0 <= value[0] <= value[1] <= 1:
            parser.error(f'{_flag(name)} must be two rising shares from 0 to 1, got {value[0]} {value[1]}')
    for name in ('std', 'teacher_std', 'ratio'):
        if any(v <= 0 for v in getattr(args, name) or ()):
            parser.error(f'{_flag(name)} must be above 0, got {getattr(args, name)}')
    for name in ('decay_epochs', 'lr_cycle_mul', 'lr_k_decay', 'layer_decay'):
        if getattr(args, name) is not None and getattr(args, name) <= 0:
            parser.error(f'{_flag(name)} must be above 0, got {getattr(args, name)}')
    if args.gp == '':
        parser.error('--gp must name a pooling (avg, max, ...): the classifier needs a pooled feature')
    for module in args.device_modules or ():
        if not all(part.isidentifier() for part in module.split('.')):
            parser.error(f'--device-modules takes names of modules, got {module!r}')
    if len(os.fsencode(args.experiment)) > 255:
        parser.error('--experiment is longer than 255 bytes: no folder can be called so')
    if args.seed >= 2**32:
        parser.error(f'--seed must be under 2**32, got {args.seed}')
    if args.crop_pct is not None and not 0 < args.crop_pct <= 1:
        parser.error(f'--crop-pct must be above 0 and at most 1, got {args.crop_pct}')
    for name, value in args.pretrained_cfg_overlay.items():
        share = isinstance(value, (int, float)) and 0 < value <= 1
        if (name == 'crop_pct' and not share) or (name == 'interpolation' and value not in _CHOICES[name]):
            parser.error(f'--pretrained-cfg-overlay {name} cannot be {value!r}')
    if args.cutmix_minmax is not None and args.cutmix_minmax[0] == args.cutmix_minmax[1]:
        parser.error(f'--cutmix-minmax must be two rising shares from 0 to 1, got {args.cutmix_minmax[0]} twice')
    if args.device.startswith('meta'):
        parser.error('--device meta computes nothing: give cuda or cpu')
    for name in ('train_split', 'val_split'):
        if not args.dataset and (os.path.isabs(getattr(args, name)) or '..' in getattr(args, name).split('/')):
            parser.error(f'{_flag(name)} names a folder in that of the data set, got {getattr(args, name)!r}')
    _check_compile(parser, args)
    for name in _PROBABILITIES:
        value = getattr(args, name)
        if value is not None and not 0 <= value <= 1:
            parser.error(f'{_flag(name)} must be from 0 to 1, got {value}')
    for name, choices in _CHOICES.items():
        if getattr(args, name) not in choices:
            known = ', '.join(repr(c) for c in choices if c)
            parser.error(f'{_flag(name)} must be one of {known}, got {getattr(args, name)!r}')
    _check_optimizer(parser, args)
    _check_teacher(parser, args)
    _check_cache(parser, args)
    _check_task(parser, args)
    _check_sizes(parser, args)
    _check_mixing(parser, args)
    _check_crop(parser, args)
    if not args.data and not args.data_dir and not args.dataset:
        parser.error('no data: give a folder, or --dataset NAME (try --dataset sklearn/digits)')
    args.resume_auto = args.resume == 'auto'
    if args.resume_auto and not args.experiment:
        parser.error('--resume auto needs --experiment: it continues in the folder of that name')
    if args.no_resume_opt and not args.resume:
        parser.error('--no-resume-opt needs --resume')
    if args.recovery_interval and args.evaluate:
        parser.error('--recovery-interval does not go with --evaluate')


def _check_compile(parser: Parser, args: argparse.Namespace) -> None:
    if args.torchcompile:
        import torch._dynamo

        backends = torch._dynamo.list_backends(exclude_tags=())
        if args.torchcompile not in backends:
            parser.error(f'--torchcompile: unknown backend {args.torchcompile!r}, known are {", ".join(backends)}')
    modes = (None, 'default', 'reduce-overhead', 'max-autotune', 'max-autotune-no-cudagraphs')
    if args.torchcompile_mode not in modes:
        parser.error(f'--torchcompile-mode must be one of {", ".join(modes[1:])}, got {args.torchcompile_mode!r}')


def _check_optimizer(parser: Parser, args: argparse.Namespace) -> None:
    name = args.opt.lower().removeprefix('lookahead_')
    if name not in list_optimizers():
        near = difflib.get_close_matches(name, list_optimizers(), n=4)
        parser.error(
            f"--opt: unknown optimizer '{args.opt}', "
            + (f'did you mean {", ".join(near)}?' if near else 'timm.optim.list_optimizers() lists the known ones')
        )


def _check_teacher(parser: Parser, args: argparse.Namespace) -> None:
    unset = _unset()

    def given(names: tuple[str, ...]) -> list[str]:
        return [_flag(n) for n in names if getattr(args, n) != unset.get_default(n)]

    if args.teacher and args.kd_model_name:
        parser.error("--teacher and --kd-model-name (timm's own distillation) are two of the same: give one")
    if not args.kd_model_name and given(_KD_FLAGS):
        parser.error(f'{given(_KD_FLAGS)[0]} needs --kd-model-name')
    if not args.teacher:
        if given(_TEACHER_FLAGS):
            parser.error(f'{given(_TEACHER_FLAGS)[0]} needs --teacher')
        if not args.kd_model_name and given(_DISTILLATION_FLAGS):
            parser.error(f'{given(_DISTILLATION_FLAGS)[0]} needs --teacher or --kd-model-name')
        if args.kd_model_name and args.kd_loss_type != 'kl':
            parser.error(f"--kd-loss-type: timm knows 'kl' alone, got {args.kd_loss_type!r}")
        return
    if args.kd_temperature <= 0:
        parser.error(f'--kd-temperature must be above 0, got {args.kd_temperature}')
    if args.pe_projector == 'identity' and args.pe_projectors > 1:
        parser.error(
            f'--pe-projector identity has nothing to train, {args.pe_projectors} of them are one: add --pe-projectors 1'
        )
    if args.aug_splits:
        parser.error('--aug-splits does not go with --teacher')
    if args.torchscript:
        parser.error('--torchscript does not go with --teacher: a scripted model cannot be tapped; use --torchcompile')
    if args.naflex_loader:
        parser.error('--naflex-loader does not go with --teacher: a teacher sees images, NaFlex batches are patches')
    if args.task == 'multilabel' and (args.kd_loss_weight or args.pe_target == 'logits'):
        flag = '--kd-loss-weight' if args.kd_loss_weight else '--pe-target logits'
        parser.error(f'{flag} compares softmax logits, --task multilabel has none: leave it off')
    if args.pe_target == 'logits' and args.pe_teacher_norm != 'none':
        parser.error('--pe-teacher-norm is for features, it does not go with --pe-target logits')


def _check_cache(parser: Parser, args: argparse.Namespace) -> None:
    if not args.teacher_cache:
        if args.teacher_cache_views > 1:
            parser.error('--teacher-cache-views needs --teacher-cache')
        return
    reasons = {
        'mixup': 'mixes images of the batch',
        'cutmix': 'mixes images of the batch',
        'cutmix_minmax': 'mixes images of the batch',
        'aug_repeats': 'draws an image several times an epoch',
        'train_img_sizes': 'gives an image another size in each batch',
    }
    for name, reason in reasons.items():
        if getattr(args, name):
            parser.error(f'--teacher-cache keeps one feature an image and view, {_flag(name)} {reason}: leave one out')
    if args.reprob and not args.no_prefetcher:
        parser.error(
            '--teacher-cache keeps one feature an image and view, --reprob erases batch by batch: leave one out, or add '
            '--no-prefetcher, which erases image by image'
        )


def _check_task(parser: Parser, args: argparse.Namespace) -> None:
    if args.eval_metric not in (None, *_METRICS[args.task]):
        known = ', '.join(_METRICS[args.task])
        parser.error(f'--eval-metric of --task {args.task} must be one of {known}, got {args.eval_metric!r}')
    if args.target_format and args.task != 'multilabel':
        parser.error('--target-format needs --task multilabel')
    if args.task == 'multilabel' and (args.kd_model_name or args.aug_splits):
        parser.error('--task multilabel does not go with --kd-model-name or --aug-splits')
    unset = _unset()
    loss = args.loss or ('jsd' if args.jsd_loss else 'bce' if args.bce_loss else None)
    for name in vars(args):
        needed = next((loss_of for prefix, loss_of in _LOSS_OF.items() if name.startswith(prefix)), None)
        if needed and loss != needed and getattr(args, name) != unset.get_default(name):
            parser.error(f'{_flag(name)} needs --loss {needed}')
    methods = ('neg_pos', 'inv_freq', 'effective_num')
    by_frequency = args.loss_pos_weight in methods or args.loss_class_weight in methods or loss == 'db'
    if bool(args.class_stats) != by_frequency:
        parser.error('--class-stats goes with --loss db, or with --loss-pos-weight / --loss-class-weight by a method')
    if args.loss and (args.jsd_loss or args.bce_loss):
        parser.error('--loss replaces --jsd-loss and --bce-loss: give --loss alone')
    if args.tta < 0 or (args.tta > 1 and (args.validation_batch_size or args.batch_size) % args.tta):
        parser.error(f'--tta must divide the validation batch, got {args.tta}')
    missing = missing_package(args)
    if missing:
        parser.error(missing)
    if args.evaluate and is_tracked(args):
        parser.error('--log-tb, --log-wandb and --log-trackio track a training run, --evaluate is none: leave them out')
    given = [n for n in ('wandb_project', 'wandb_tags', 'wandb_resume_id') if getattr(args, n)]
    if given and not args.log_wandb:
        parser.error(f'{_flag(given[0])} needs --log-wandb')
    if args.torchscript and args.torchcompile:
        parser.error('--torchscript does not go with --torchcompile')


def _check_sizes(parser: Parser, args: argparse.Namespace) -> None:
    sizes = args.train_img_sizes
    for name in ('train_batch_sizes', 'train_size_probs', 'train_batches_per_epoch'):
        value = getattr(args, name)
        if value is not None and not sizes:
            parser.error(f'{_flag(name)} needs --train-img-sizes')
        if isinstance(value, list) and len(value) != len(sizes):
            parser.error(f'{_flag(name)} takes one value for each of the {len(sizes)} sizes, got {len(value)}')
    if args.train_size_schedule != 'constant' and (not sizes or len(sizes) < 2):
        parser.error('--train-size-schedule progressive needs two --train-img-sizes or more')
    if args.variable_batch_loss_scale != 'none' and not args.train_batch_sizes:
        parser.error('--variable-batch-loss-scale needs --train-batch-sizes')
    if sizes and (args.naflex_loader or args.aug_splits or args.use_multi_epochs_loader):
        parser.error('--train-img-sizes does not go with --naflex-loader, --aug-splits or --use-multi-epochs-loader')
    if args.naflex_loader and (
        args.aug_repeats or args.aug_splits or args.resplit or args.torchscript or args.save_images
    ):
        parser.error(
            '--naflex-loader does not go with --aug-repeats, --aug-splits, --resplit, --torchscript or --save-images'
        )
    if not args.naflex_loader:
        unset = _unset()
        given = [n for n in vars(args) if n.startswith('naflex_') and getattr(args, n) != unset.get_default(n)]
        if given:
            parser.error(f'{_flag(given[0])} needs --naflex-loader')


def _check_crop(parser: Parser, args: argparse.Namespace) -> None:
    if not args.train_crop_pad:
        return
    unset = _unset()
    for name in ('scale', 'ratio', 'train_crop_mode'):
        if getattr(args, name) != unset.get_default(name):
            parser.error(f'{_flag(name)} is for the crop that --train-crop-pad replaces: give one of the two')
    for name in ('no_aug', 'naflex_loader', 'train_img_sizes', 'aug_splits'):
        if getattr(args, name):
            parser.error(f'--train-crop-pad does not go with {_flag(name)}')


def _check_mixing(parser: Parser, args: argparse.Namespace) -> None:
    mixing = args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax is not None
    odd = [size for size in args.train_batch_sizes or [args.batch_size] if size % 2]
    if mixing and odd and not args.naflex_loader:
        flag = '--train-batch-sizes' if args.train_batch_sizes else '--batch-size'
        parser.error(f'--mixup and --cutmix mix pairs, {flag} must be even, got {odd[0]}')
    if mixing and args.aug_splits:
        parser.error('--mixup and --cutmix do not go with --aug-splits')
    if args.aug_splits and args.no_prefetcher:
        parser.error('--aug-splits does not go with --no-prefetcher, which does not take the splits of an image apart')
    if args.aug_splits == 1 or args.aug_splits < 0:
        parser.error(f'--aug-splits must be 0, or 2 and more, got {args.aug_splits}')
    if (args.jsd_loss or args.loss == 'jsd') and not args.aug_splits:
        parser.error('the jsd loss needs --aug-splits')
    if args.split_bn and not (args.aug_splits or args.resplit):
        parser.error('--split-bn needs --aug-splits or --resplit')
    if args.jsd_loss and args.bce_loss:
        parser.error('--jsd-loss does not go with --bce-loss')
    for name in ('bce_sum', 'bce_target_thresh', 'bce_pos_weight'):
        if getattr(args, name) not in (None, False) and not (args.bce_loss or args.loss == 'bce'):
            parser.error(f'{_flag(name)} needs --loss bce')


def _flag(dest: str) -> str:
    return '--' + dest.replace('_', '-')


def resolve_lr(args: argparse.Namespace, world_size: int) -> float:
    """--lr, or --lr-base scaled by the global batch, linearly or by its square root, as timm does it."""
    if args.lr is not None:
        return args.lr
    scale = args.lr_base_scale or ('sqrt' if any(o in args.opt.lower() for o in ('ada', 'lamb')) else 'linear')
    ratio = args.batch_size * world_size * args.grad_accum_steps / args.lr_base_size
    return args.lr_base * (ratio**0.5 if scale == 'sqrt' else ratio)


def resolve_dtype(name: str | None) -> torch.dtype | None:
    """The torch dtype called `name`."""
    return getattr(torch, name) if name else None
