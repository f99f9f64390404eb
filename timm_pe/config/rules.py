"""Checks of a run's settings before any work is done: values out of range, flags that do not go together."""

import datetime
import difflib
import importlib.util
import os
import reprlib
import unicodedata
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NoReturn, cast

from .declare import declared_in, name_of
from .flags import DataFlags, TrackerFlags
from .teachers import check_each
from .without_labels import METRICS, check_without_labels

if TYPE_CHECKING:
    from .run_config import RunConfig

Refuse = Callable[[str], NoReturn]

_METRICS = {'classification': ('top1', 'top5', 'loss'), 'multilabel': ('map', 'micro_f1', 'macro_f1', 'sample_f1', 'loss')}  # fmt: skip
# the largest number of float32
_FLOAT32_MAX = (2 - 2**-23) * 2.0**127
# most values that one flag may hold
_MAX_VALUES = 10_000


def odd_value(given: Any) -> str:
    """Why `given` is a value that no flag takes, lists and kwargs included; empty if it is acceptable."""
    rest, seen = [given], 0
    while rest:
        value, seen = rest.pop(), seen + 1
        if seen > _MAX_VALUES:  # a few YAML aliases can expand to billions
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
        elif isinstance(value, float) and not abs(value) <= _FLOAT32_MAX:
            return f'must be a finite number (of float32), got {value}'
        elif isinstance(value, int) and abs(value) >= 2**63:
            return 'must be under 2**63'
        elif not isinstance(value, (int, float, datetime.date, type(None))):
            return f'holds a {type(value).__name__}, it takes numbers, words and lists of them'
    return ''


def out_of_bounds(group: type, dest: str, value: Any) -> str:
    """Why a flag's declaration does not allow a value; empty if it does."""
    declared = declared_in(group)[dest]
    several = isinstance(value, list)
    # of several teachers, each may have a list
    parts = [part for v in value for part in (v if isinstance(v, list) else [v])] if several else [value]
    values = [part for part in parts if part is not None]
    if declared.at_least is not None and any(v < declared.at_least for v in values):
        return f'must be {declared.at_least} or more, got {value}'
    if declared.at_most is not None and any(v > declared.at_most for v in values):
        return f'must be {declared.at_most} or less, got {value}'
    if declared.above is not None and any(v <= declared.above for v in values):
        return f'must be above {declared.above}, got {value}'
    if declared.share and not all(0 <= v <= 1 for v in values):
        return f'must be from 0 to 1, got {value}'
    if declared.allowed is not None and any(v not in declared.allowed for v in (value if several else [value])):
        return f'must be one of {", ".join(repr(a) for a in declared.allowed if a)}, got {value!r}'
    return ''


def check(config: 'RunConfig', refuse: Refuse) -> None:
    """Refuse values out of range, and flags that do not go together.

    Args:
        config: The settings, defaults included.
        refuse: Reports the error and does not return.
    """
    for name, value in config.as_dict().items():
        odd = odd_value(value)
        if odd:
            refuse(f'{name_of(name)} {odd}')
    for name, value in config.as_dict().items():
        wrong = out_of_bounds(type(config), name, value)
        if wrong:
            refuse(f'{name_of(name)} {wrong}')
    _check_values(config, refuse)
    _check_needs(config, refuse)
    _check_teacher(config, refuse)
    _check_cache(config, refuse)
    check_without_labels(config, refuse)
    _check_task(config, refuse)
    _check_losses(config, refuse)
    _check_sizes(config, refuse)
    _check_mixing(config, refuse)
    _check_crop(config, refuse)
    _check_data(config, refuse)
    _check_run(config, refuse)
    # these two import torch and timm, which takes seconds
    _check_compile(config, refuse)
    _check_optimizer(config, refuse)


def _check_values(config: 'RunConfig', refuse: Refuse) -> None:
    for name in ('scale', 'ratio', 'cutmix_minmax'):
        value = getattr(config, name)
        if value is not None and len(value) != 2:
            refuse(f'{name_of(name)} takes 2 values, got {len(value)}')
    for name in ('scale', 'cutmix_minmax'):
        value = getattr(config, name)
        if value is not None and not 0 <= value[0] <= value[1] <= 1:
            refuse(f'{name_of(name)} must be two rising shares from 0 to 1, got {value[0]} {value[1]}')
    if config.cutmix_minmax is not None and config.cutmix_minmax[0] == config.cutmix_minmax[1]:
        refuse(f'--cutmix-minmax must be two rising shares from 0 to 1, got {config.cutmix_minmax[0]} twice')
    if config.gp == '':
        refuse('--gp must name a pooling (avg, max, ...): the classifier needs a pooled feature')
    for module in config.device_modules or ():
        if not all(part.isidentifier() for part in module.split('.')):
            refuse(f'--device-modules takes names of modules, got {module!r}')
    if len(os.fsencode(config.experiment)) > 255:
        refuse('--experiment is longer than 255 bytes: no folder can be called so')
    if config.seed >= 2**32:
        refuse(f'--seed must be under 2**32, got {config.seed}')
    if config.crop_pct is not None and not 0 < config.crop_pct <= 1:
        refuse(f'--crop-pct must be above 0 and at most 1, got {config.crop_pct}')
    interpolations = declared_in(type(config))['interpolation'].allowed or ()
    for name, value in config.pretrained_cfg_overlay.items():
        share = isinstance(value, (int, float)) and 0 < value <= 1
        if (name == 'crop_pct' and not share) or (name == 'interpolation' and value not in interpolations):
            refuse(f'--pretrained-cfg-overlay {name} cannot be {value!r}')
    if config.device.startswith('meta'):
        refuse('--device meta computes nothing: give cuda or cpu')
    for name in ('train_split', 'val_split'):
        split = getattr(config, name)
        if not config.dataset and (os.path.isabs(split) or '..' in split.split('/')):
            refuse(f'{name_of(name)} names a folder in that of the data set, got {split!r}')


def _check_needs(config: 'RunConfig', refuse: Refuse) -> None:
    """Refuse two kinds of teacher, and flags whose needed flag or package is missing."""
    if config.teacher and config.kd_model_name:
        refuse("--teacher and --kd-model-name (timm's own distillation) are two of the same: give one")
    for name, declared in declared_in(type(config)).items():
        if declared.needs and config.is_given(name) and not any(getattr(config, n) for n in declared.needs):
            refuse(f'{name_of(name)} needs {" or ".join(map(name_of, declared.needs))}')
        if declared.package and config.is_given(name) and importlib.util.find_spec(declared.package[0]) is None:
            package, extra = declared.package
            refuse(f"{name_of(name)} needs the package {package}: pip install 'timm_pe[{extra}]'")


# flags that --no-aug disables
_AUGMENTATIONS = (
    *('train_crop_mode', 'scale', 'ratio', 'hflip', 'vflip', 'color_jitter', 'color_jitter_prob', 'grayscale_prob'),
    *('gaussian_blur_prob', 'aa', 'train_interpolation', 'reprob'),
)
# flags that a schedule does not read
_IDLE_IN_SCHEDULE = {
    'none': ('warmup_epochs', 'warmup_lr', 'sched_on_updates', 'cooldown_epochs', 'min_lr'),
    **dict.fromkeys(('constant', 'step', 'multistep'), ('cooldown_epochs', 'min_lr')),
    'plateau': ('cooldown_epochs',),
}


def without_effect(config: 'RunConfig') -> list[str]:
    """Flags that were given and do nothing, each with the reason: '--clip-mode without --clip-grad'.

    They are timm's flags, and timm accepts them: a settings file may hold all flags.
    """
    found = []
    for name, declared in declared_in(type(config)).items():
        if (
            declared.idle_without
            and config.is_given(name)
            and not any(_is_on(config, w) for w in declared.idle_without)
        ):
            wanted = ' or '.join(name_of(w).replace('=', ' ') for w in declared.idle_without)
            flag = f'--{declared.off}-{name_of(name)[2:]}' if declared.off == 'no' else name_of(name)
            found.append(f'{flag} without {wanted}')
    if config.no_aug:
        found += [f'{name_of(name)} with --no-aug' for name in _AUGMENTATIONS if config.is_given(name)]
    if not config.no_aug and config.aa and '3a' not in config.aa:
        found += [f'{name_of(n)} with --aa' for n in ('color_jitter', 'color_jitter_prob') if config.is_given(n)]
    if config.naflex_loader and (config.mixup or config.cutmix) and config.is_given('mixup_mode'):
        found.append('--mixup-mode with --naflex-loader')
    if config.lr_cycle_limit < 2 and config.sched in ('cosine', 'tanh', 'poly'):
        cycles = ('lr_cycle_mul', 'lr_cycle_decay')
        found += [f'{name_of(n)} without --lr-cycle-limit' for n in cycles if config.is_given(n)]
    if config.lr is not None:
        found += [f'{name_of(n)} with --lr' for n in ('lr_base', 'lr_base_size', 'lr_base_scale') if config.is_given(n)]
    if config.drop_path is not None and config.is_given('drop_connect'):
        found.append('--drop-connect with --drop-path')
    # the epochs of a warmup prefix are trained in any schedule
    idle = [n for n in _IDLE_IN_SCHEDULE.get(config.sched, ()) if n != 'warmup_epochs' or not config.warmup_prefix]
    found += [
        f'{name_of(name)} with --sched {config.sched}'
        for name in idle
        if config.is_given(name) and getattr(config, name)
    ]
    return [*found, *(f'{name_of(name)} with --opt {config.opt}' for name in _idle_in_optimizer(config))]


def _idle_in_optimizer(config: 'RunConfig') -> list[str]:
    from timm.optim import get_optimizer_info

    info = get_optimizer_info(config.opt.lower().removeprefix('lookahead_'))
    takes = {'momentum': info.has_momentum, 'opt_betas': info.has_betas, 'opt_eps': info.has_eps}
    return [name for name, is_taken in takes.items() if config.is_given(name) and not is_taken]


def _is_on(config: 'RunConfig', condition: str) -> bool:
    name, _, value = condition.partition('=')
    return bool(getattr(config, name) == value if value else getattr(config, name))


def _check_compile(config: 'RunConfig', refuse: Refuse) -> None:
    modes: tuple[str | None, ...] = (None, 'default', 'reduce-overhead', 'max-autotune', 'max-autotune-no-cudagraphs')
    if config.torchcompile_mode not in modes:
        known = ', '.join(filter(None, modes))
        refuse(f'--torchcompile-mode must be one of {known}, got {config.torchcompile_mode!r}')
    graphs = ('reduce-overhead', 'max-autotune')
    if config.torchcompile_mode in graphs and config.grad_accum_steps > 1 and config.device.startswith('cuda'):
        refuse(
            f'--torchcompile-mode {config.torchcompile_mode} keeps gradients in the memory of CUDA graphs, which the next of '
            f'--grad-accum-steps {config.grad_accum_steps} overwrites: use max-autotune-no-cudagraphs'
        )
    if config.torchscript and config.torchcompile:
        refuse('--torchscript does not go with --torchcompile')
    if config.torchcompile:
        import torch._dynamo

        backends = torch._dynamo.list_backends(exclude_tags=())
        if config.torchcompile not in backends:
            refuse(f'--torchcompile: unknown backend {config.torchcompile!r}, known are {", ".join(backends)}')


def _check_optimizer(config: 'RunConfig', refuse: Refuse) -> None:
    from timm.optim import list_optimizers

    name, known = config.opt.lower().removeprefix('lookahead_'), cast(list[str], list_optimizers())
    if name not in known:
        near = difflib.get_close_matches(name, known, n=4)
        hint = f'did you mean {", ".join(near)}?' if near else 'timm.optim.list_optimizers() lists the known ones'
        refuse(f"--opt: unknown optimizer '{config.opt}', {hint}")


def _check_teacher(config: 'RunConfig', refuse: Refuse) -> None:
    check_each(config, refuse)
    if not config.teacher:
        if config.kd_model_name and config.kd_loss_type != 'kl':
            refuse(f"--kd-loss-type: timm knows 'kl' alone, got {config.kd_loss_type!r}")
        return
    if config.kd_temperature <= 0:
        refuse(f'--kd-temperature must be above 0, got {config.kd_temperature}')
    uses_temperature = config.kd_loss_weight or config.pe_target == 'logits' or config.pe_loss == 'kl'
    if config.is_given('kd_temperature') and not uses_temperature:
        refuse('--kd-temperature has no effect without --kd-loss-weight, --pe-target logits or --pe-loss kl')
    if config.pe_projector == 'identity' and config.pe_projectors > 1 and config.is_given('pe_projectors'):
        refuse(
            f'--pe-projector identity has nothing to train, {config.pe_projectors} of them are one: leave --pe-projectors off'
        )
    over_batch = '--pe-projector linear_bn' if config.pe_projector == 'linear_bn' else None
    if config.pe_teacher_norm in ('batch', 'whiten'):
        over_batch = f'--pe-teacher-norm {config.pe_teacher_norm}'
    if over_batch and 1 in (config.train_batch_sizes or [config.batch_size]):
        refuse(f'{over_batch} normalizes over the images of a batch, a batch of 1 has no spread: use 2 or more')
    if config.sync_bn and config.pe_projector == 'linear_bn':
        refuse('--pe-projector linear_bn normalizes over the batch of one rank, --sync-bn over all: leave one out')
    if config.aug_splits:
        refuse('--aug-splits does not go with --teacher')
    if config.torchscript:
        refuse('--torchscript does not go with --teacher: a scripted model cannot be tapped; use --torchcompile')
    if config.naflex_loader:
        refuse('--naflex-loader does not go with --teacher: a teacher sees images, NaFlex batches are patches')
    if config.task == 'multilabel' and (config.kd_loss_weight or config.pe_target == 'logits'):
        flag = '--kd-loss-weight' if config.kd_loss_weight else '--pe-target logits'
        refuse(f'{flag} compares softmax logits, --task multilabel has none: leave it off')
    if config.pe_projector == 'identity' and config.pe_act == 'relu':
        refuse(
            '--pe-act relu has no effect on --pe-projector identity, which gives the feature as it is: leave one out'
        )
    if config.pe_target == 'logits' and config.pe_teacher_norm != 'none':
        refuse('--pe-teacher-norm is for features, it does not go with --pe-target logits')


def _check_cache(config: 'RunConfig', refuse: Refuse) -> None:
    if not config.teacher_cache:
        return
    reasons = {
        'mixup': 'mixes images of the batch',
        'cutmix': 'mixes images of the batch',
        'cutmix_minmax': 'mixes images of the batch',
        'aug_repeats': 'draws an image several times an epoch',
        'train_img_sizes': 'gives an image another size in each batch',
    }
    for name, reason in reasons.items():
        if getattr(config, name):
            refuse(f'--teacher-cache keeps one feature an image and view, {name_of(name)} {reason}: leave one out')
    if config.reprob and not config.no_prefetcher:
        refuse(
            '--teacher-cache keeps one feature an image and view, --reprob erases batch by batch: leave one out, or add '
            '--no-prefetcher, which erases image by image'
        )


def _check_task(config: 'RunConfig', refuse: Refuse) -> None:
    metrics, of = _METRICS[config.task], f'of --task {config.task}'
    if not config.has_labels:
        metrics, of = METRICS, 'without labels'
    if config.eval_metric == 'knn' and not config.knn_data:
        refuse('--eval-metric knn needs --knn-data')
    if config.eval_metric not in (None, 'knn', *metrics):
        refuse(f'--eval-metric {of} must be one of {", ".join(metrics)}, got {config.eval_metric!r}')
    if config.target_format and config.task != 'multilabel':
        refuse('--target-format needs --task multilabel')
    if config.task == 'multilabel' and (config.kd_model_name or config.aug_splits):
        refuse('--task multilabel does not go with --kd-model-name or --aug-splits')
    if config.tta < 0 or (config.tta > 1 and (config.validation_batch_size or config.batch_size) % config.tta):
        refuse(f'--tta must divide the validation batch, got {config.tta}')


def _check_losses(config: 'RunConfig', refuse: Refuse) -> None:
    loss = loss_type(config)
    for name, declared in declared_in(type(config)).items():
        if declared.of_loss and declared.of_loss != loss and config.is_given(name):
            refuse(f'{name_of(name)} needs --loss {declared.of_loss}')
    methods = ('neg_pos', 'inv_freq', 'effective_num')
    by_frequency = config.loss_pos_weight in methods or config.loss_class_weight in methods or loss == 'db'
    if bool(config.class_stats) != by_frequency:
        refuse('--class-stats goes with --loss db, or with --loss-pos-weight / --loss-class-weight by a method')
    if config.loss and (config.jsd_loss or config.bce_loss):
        refuse('--loss replaces --jsd-loss and --bce-loss: give --loss alone')
    if config.jsd_loss and config.bce_loss:
        refuse('--jsd-loss does not go with --bce-loss')


def loss_type(config: 'RunConfig') -> str | None:
    """--loss, or the loss that timm's older flags select."""
    return config.loss or ('jsd' if config.jsd_loss else 'bce' if config.bce_loss else None)


def _check_sizes(config: 'RunConfig', refuse: Refuse) -> None:
    sizes = config.train_img_sizes
    for name in ('train_batch_sizes', 'train_size_probs'):
        value = getattr(config, name)
        if sizes and value is not None and len(value) != len(sizes):
            refuse(f'{name_of(name)} takes one value for each of the {len(sizes)} sizes, got {len(value)}')
    if config.train_size_schedule != 'constant' and (not sizes or len(sizes) < 2):
        refuse('--train-size-schedule progressive needs two --train-img-sizes or more')
    if config.variable_batch_loss_scale != 'none' and not config.train_batch_sizes:
        refuse('--variable-batch-loss-scale needs --train-batch-sizes')
    if sizes and (config.naflex_loader or config.aug_splits or config.use_multi_epochs_loader):
        refuse('--train-img-sizes does not go with --naflex-loader, --aug-splits or --use-multi-epochs-loader')
    names = ('aug_repeats', 'aug_splits', 'resplit', 'torchscript', 'save_images', 'cutmix_minmax')
    if config.naflex_loader and any(getattr(config, name) for name in names):
        refuse(
            '--naflex-loader does not go with --aug-repeats, --aug-splits, --resplit, --torchscript, --save-images or '
            '--cutmix-minmax'
        )


def _check_mixing(config: 'RunConfig', refuse: Refuse) -> None:
    mixing = config.mixup > 0 or config.cutmix > 0 or config.cutmix_minmax is not None
    odd = [size for size in config.train_batch_sizes or [config.batch_size] if size % 2]
    if mixing and odd and not config.naflex_loader:
        flag = '--train-batch-sizes' if config.train_batch_sizes else '--batch-size'
        refuse(f'--mixup and --cutmix mix pairs, {flag} must be even, got {odd[0]}')
    if mixing and config.aug_splits:
        refuse('--mixup and --cutmix do not go with --aug-splits')
    if config.aug_splits and config.no_prefetcher:
        refuse('--aug-splits does not go with --no-prefetcher, which does not take the splits of an image apart')
    if config.aug_splits == 1 or config.aug_splits < 0:
        refuse(f'--aug-splits must be 0, or 2 and more, got {config.aug_splits}')
    if loss_type(config) == 'jsd' and not config.aug_splits:
        refuse('the jsd loss needs --aug-splits')
    if config.split_bn and config.sync_bn:
        refuse('--split-bn does not go with --sync-bn, which would replace the split norms by others')
    if config.split_bn and not config.aug_splits and odd:
        flag = '--train-batch-sizes' if config.train_batch_sizes else '--batch-size'
        refuse(f'--split-bn splits a batch in two: {flag} must be even, got {odd[0]}')
    if config.split_bn and not (config.aug_splits or config.resplit):
        refuse('--split-bn needs --aug-splits or --resplit')


def _check_crop(config: 'RunConfig', refuse: Refuse) -> None:
    if not config.train_crop_pad:
        return
    for name in ('scale', 'ratio', 'train_crop_mode', 'train_interpolation'):
        if config.is_given(name):
            refuse(f'{name_of(name)} is for the crop that --train-crop-pad replaces: give one of the two')
    for name in ('no_aug', 'naflex_loader', 'train_img_sizes', 'aug_splits'):
        if getattr(config, name):
            refuse(f'--train-crop-pad does not go with {name_of(name)}')


# kinds of data sets with labels in a column or a file; mostly far away
COLUMN_KINDS = ('hfds', 'hfids', 'tfds', 'wds')
# kinds of data sets that are read as a stream
STREAMED_KINDS = ('hfids', 'tfds', 'wds')
# flags that apply to some kinds of data sets only; '' is a folder of images or a tar
_ONLY_OF_KINDS = {
    'class_depth': ('', 'folder'),
    'class_map': ('', 'folder', *COLUMN_KINDS),
    'input_key': ('', 'folder', *COLUMN_KINDS),
    'target_key': COLUMN_KINDS,
    **dict.fromkeys(('train_num_samples', 'val_num_samples'), STREAMED_KINDS),
    'epoch_repeats': ('hfids', 'tfds'),  # timm's reader of wds does not read it
}


# a folder of images, or a tar
FOLDER_KINDS = ('', 'folder')


def data_kind(flags: DataFlags) -> str:
    """The kind of data set that --dataset names, 'hfds' of 'hfds/NAME'; '' if it names none."""
    return flags.dataset.lower().split('/')[0] if '/' in flags.dataset else ''


def _check_data(config: 'RunConfig', refuse: Refuse) -> None:
    kind = data_kind(config)
    if config.has_labels and config.model_kwargs.get('num_classes') == 0:
        refuse(
            '--model-kwargs num_classes=0: data with labels need a classifier, --unlabeled alone trains a backbone without'
        )
    if 0 < config.epoch_repeats < 1:
        refuse(
            f'--epoch-repeats must be 0, or 1 and more, got {config.epoch_repeats}: timm reads all of a stream at least once'
        )
    for name in ('train_split', 'val_split'):
        if '[' in getattr(config, name) and kind not in COLUMN_KINDS:
            refuse(f'{name_of(name)} {getattr(config, name)}: only hfds/NAME and tfds/NAME take a part of a split')
    for name, kinds in _ONLY_OF_KINDS.items():
        if config.is_given(name) and kind not in kinds:
            of = ', '.join(f'{k}/NAME' if k else 'a folder of images' for k in kinds if k != 'folder')
            refuse(f'{name_of(name)} has no effect on --dataset {config.dataset or "of a folder"}, it is for {of}')


def _check_run(config: 'RunConfig', refuse: Refuse) -> None:
    if (
        config.has_labels and not config.root and not config.dataset and not config.evaluate
    ):  # --evaluate takes the data from its run
        refuse('no data: give a folder, or --dataset NAME (try --dataset sklearn/digits)')
    if config.resume == 'auto' and not config.experiment:
        refuse('--resume auto needs --experiment: it continues in the folder of that name')
    if config.evaluate and config.recovery_interval:
        refuse('--recovery-interval does not go with --evaluate')
    for name in declared_in(TrackerFlags):
        if config.evaluate and getattr(config, name):
            refuse(f'{name_of(name)} is about the tracking of a training run, --evaluate is none: leave it out')
