"""What can be refused of a command line before any work is done: values out of range, flags that do not go together."""

import argparse
import datetime
import difflib
import operator
import os
import reprlib
import unicodedata
from typing import Any

import torch
from timm.optim import list_optimizers

from .cli import Parser
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
AT_MOST = {
    'workers': 1024,
    'pe_projectors': 1024,
    'img_size': 16384,
    'input_size': 16384,
    'train_img_sizes': 16384,
    'teacher_input_size': 16384,
}
_PROBABILITIES = ('hflip', 'vflip', 'reprob', 'mixup_prob', 'mixup_switch_prob', 'color_jitter_prob', 'grayscale_prob', 'gaussian_blur_prob', 'drop', 'drop_path', 'drop_block', 'smoothing', 'model_ema_decay', 'bce_target_thresh', 'layer_decay', 'multilabel_threshold')  # fmt: skip

# values in what is given for one flag
_MAX_VALUES = 10_000


def check_values(parser: Parser, args: argparse.Namespace) -> None:
    """Refuse values that no flag takes, wherever they came from."""
    for name, value in vars(args).items():
        odd = odd_value(value)
        if odd:
            parser.error(f'{_flag(name)} {odd}')


def odd_value(given: Any) -> str:
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


def check(parser: Parser, args: argparse.Namespace, unset: Parser) -> None:
    """Refuse values out of range, and flags that do not go together.

    Args:
        parser: Says so.
        args: What was given, defaults and all.
        unset: Knows what flags are that were not given: the parser of a run has what YAML said as its defaults.
    """
    for bounds, wrong, words in ((_AT_LEAST, operator.lt, 'or more'), (AT_MOST, operator.gt, 'or less')):
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
    _check_teacher(parser, args, unset)
    _check_cache(parser, args)
    _check_task(parser, args, unset)
    _check_sizes(parser, args, unset)
    _check_mixing(parser, args)
    _check_crop(parser, args, unset)
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


def _check_teacher(parser: Parser, args: argparse.Namespace, unset: Parser) -> None:

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


def _check_task(parser: Parser, args: argparse.Namespace, unset: Parser) -> None:
    if args.eval_metric not in (None, *_METRICS[args.task]):
        known = ', '.join(_METRICS[args.task])
        parser.error(f'--eval-metric of --task {args.task} must be one of {known}, got {args.eval_metric!r}')
    if args.target_format and args.task != 'multilabel':
        parser.error('--target-format needs --task multilabel')
    if args.task == 'multilabel' and (args.kd_model_name or args.aug_splits):
        parser.error('--task multilabel does not go with --kd-model-name or --aug-splits')
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


def _check_sizes(parser: Parser, args: argparse.Namespace, unset: Parser) -> None:
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
        given = [n for n in vars(args) if n.startswith('naflex_') and getattr(args, n) != unset.get_default(n)]
        if given:
            parser.error(f'{_flag(given[0])} needs --naflex-loader')


def _check_crop(parser: Parser, args: argparse.Namespace, unset: Parser) -> None:
    if not args.train_crop_pad:
        return
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
