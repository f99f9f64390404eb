"""The student: timm's factory with the flags of the training script."""

import logging
import os
import shlex
from collections.abc import Mapping
from typing import Any, cast

import torch
import torch.nn as nn
from PIL import Image
from timm.layers import convert_splitbn_model, convert_sync_batchnorm, set_fast_norm
from timm.models import get_pretrained_cfg, is_model, model_entrypoint, resolve_model_input_args
from torch.utils.data import Dataset

from ..config.derive import given_classes
from ..config.flags import ModelFlags
from ..config.run_config import RunConfig
from ..config.teachers import teachers_of
from ..data.datasets import count_classes
from ..errors import NoPretrainedWeights, UsageError, one_line
from ..method.weight_files import (
    check_model_name,
    check_values,
    classes_in_checkpoint,
    create_timm_model,
    find_checkpoint,
    load_weights,
    read_state_dict,
    with_new_classifier,
)
from ..process.runtime import Runtime
from ..run_folder import RunFolder
from .from_run import check_teacher_run, describe_evaluation

_logger = logging.getLogger(__name__)


def check_names(config: RunConfig) -> None:
    """Refuse models and files that do not exist, before anything is built or fetched, and say what --evaluate took from
    its run.

    Raises:
        UsageError: See `check_model_name` and `find_checkpoint`.
    """
    _check_name(
        config.model,
        '--model',
        'give the name of its model, and --pretrained-path {0} for its weights or --resume {0} to go on',
    )
    teachers = teachers_of(config)
    for teacher in teachers:
        _check_name(teacher.name, '--teacher', 'give --teacher-checkpoint {0} in its place')
    if config.kd_model_name:
        check_model_name(config.kd_model_name, '--kd-model-name')
    for teacher in teachers:
        if teacher.checkpoint:
            find_checkpoint(teacher.checkpoint, '--teacher-checkpoint')
    for flag in ('pretrained_path', 'initial_checkpoint', 'evaluate'):
        if getattr(config, flag):
            find_checkpoint(getattr(config, flag), '--' + flag.replace('_', '-'))
    if config.resume not in ('', 'auto') and not os.path.isdir(config.resume):
        find_checkpoint(config.resume, '--resume')
    for flag in ('class_map', 'class_stats', 'loss_pos_weight', 'loss_class_weight'):
        path = getattr(config, flag)
        if path and os.path.exists(path) and not os.path.isfile(path):  # reading a device would never end
            raise UsageError(f"--{flag.replace('_', '-')}: '{path}' is no file")
    for teacher in teachers:
        check_teacher_run(teacher, config.input_img_mode)
    said = describe_evaluation(config)
    if said:
        _logger.info(said)


def _check_name(name: str, flag: str, instead: str) -> None:
    """Refuse what is no model's name; for a run folder the message says what takes one."""
    try:
        check_model_name(name, flag)
    except UsageError as e:
        folder = name.removeprefix('local-dir:')
        if RunFolder.around(folder) is None or not os.path.isdir(folder):
            raise
        raise UsageError(f"{flag} '{name}' is a run folder, and no model's name: {instead.format(folder)}") from e


def input_channels(config: RunConfig) -> int:
    """Input channels of the student, before it is built.

    Raises:
        UsageError: A model that cannot be looked up.
    """
    return _model_args(config, config.pretrained_cfg_overlay).get('in_chans') or 3


def choose_num_classes(config: RunConfig, dataset: Dataset[Any], weights: str, flag: str) -> int | None:
    """Number of classes of the student: --num-classes, else that of weights which must fit, else the data's.

    Args:
        config: Run settings.
        dataset: The validation split.
        weights: File of the weights, '' for none.
        flag: The flag that names the file, for messages.

    Returns:
        The number, 0 without labels; None if unknown, which keeps the model's own.

    Raises:
        UsageError: The number of labels of multi-label data is unknown.
    """
    if not config.has_labels:
        return 0
    given = given_classes(config)
    if given is not None:
        return given
    classes = classes_in_checkpoint(config.model, read_state_dict(weights, flag)) if weights else None
    classes = classes or count_classes(dataset)
    if classes is None and config.task == 'multilabel':
        raise UsageError('--task multilabel needs --num-classes: this data set does not tell how many labels there are')
    return classes


def _model_args(config: RunConfig, overlay: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of timm's factory, with model_name and pretrained_cfg, for the flags that define the student."""
    more = {'pretrained_cfg_overlay': dict(overlay)} if overlay else {}
    try:
        return resolve_model_input_args(config.model, config.as_dict(), **{**config.model_kwargs, **more})
    except Exception as e:  # the config.json of a hub or local-dir model may be anything
        raise UsageError(f'--model {config.model}: {one_line(e)}') from e


def create_student(config: RunConfig, num_classes: int | None = None) -> nn.Module:
    """Create the model to train, on the CPU.

    Args:
        config: Run settings.
        num_classes: Its classes, 0 for no classifier; None takes those of the settings, or the model's own.

    Raises:
        UsageError: Unknown model, arguments it does not take, weights that can't be had.
    """
    num_classes = config.num_classes if num_classes is None else num_classes
    if config.fast_norm:
        set_fast_norm()
    overlay = dict(config.pretrained_cfg_overlay)
    if config.pretrained_path:
        file = str(find_checkpoint(config.pretrained_path, '--pretrained-path'))
        # read here first, for better errors; except the .npz of JAX that some models convert
        weights = None if file.endswith('.npz') else read_state_dict(file, '--pretrained-path')
        # timm loads a classifier of this many classes, also its default without --num-classes; for -1 none
        classes = classes_in_checkpoint(config.model, weights) if weights else None
        fits = classes and classes == (num_classes or _default_classes(config.model))
        overlay = {'file': file, 'num_classes': classes if fits else -1, **overlay}
    if overlay.get('file'):
        # a hub or local-dir model has a source, which timm would use instead of the file
        overlay.setdefault('source', '')
    kwargs = _architecture_args(config, overlay, num_classes)
    if config.pretrained_path:
        model = _create_from_file(config, kwargs)
        if weights:
            _check_taken(model, weights, config.pretrained_path)
    else:
        try:
            model = create_timm_model(config.model, '--model', pretrained=config.pretrained, **kwargs)
        except NoPretrainedWeights as e:
            raise UsageError(
                f'{e} (--pretrained-path FILE, --model local-dir:FOLDER), or leave --pretrained out'
            ) from e
    _check_classifier(model, config)
    if config.initial_checkpoint:
        state_dict = read_state_dict(config.initial_checkpoint, '--initial-checkpoint')
        _load_initial(model, state_dict, config)
    _init_head(model, config.head_init_scale, config.head_init_bias)
    if config.grad_checkpointing:
        _set_grad_checkpointing(model, config.model)
    return model


def _architecture_args(config: RunConfig, overlay: dict[str, Any], num_classes: int | None) -> dict[str, Any]:
    model_args = _model_args(config, overlay)
    # the name is given as the user wrote it
    del model_args['model_name']
    pretrained_cfg = model_args.pop('pretrained_cfg')
    for name, given in (('num_classes', num_classes), ('global_pool', config.gp)):
        if given is not None:  # a hub or local-dir model brings those it was saved with
            model_args[name] = given
    return {
        'drop_rate': config.drop,
        'drop_path_rate': config.drop_path if config.drop_path is not None else config.drop_connect,
        'drop_block_rate': config.drop_block,
        'bn_momentum': config.bn_momentum,
        'bn_eps': config.bn_eps,
        'scriptable': config.torchscript or None,
        **({'pretrained_cfg_overlay': overlay} if ':' in config.model else {'pretrained_cfg': pretrained_cfg}),
        **model_args,
    }


def _create_from_file(flags: ModelFlags, kwargs: dict[str, Any]) -> nn.Module:
    """The model with the weights of --pretrained-path, which timm loads."""
    try:
        return create_timm_model(flags.model, '--pretrained-path', pretrained=True, **kwargs)
    except UsageError as e:
        if not isinstance(e.__cause__, RuntimeError):
            raise
        raise UsageError(
            f"--pretrained-path: '{flags.pretrained_path}' does not fit {flags.model} ({one_line(e.__cause__)})"
        ) from e


def _default_classes(name: str) -> int | None:
    cfg = get_pretrained_cfg(name)
    return cfg.num_classes if cfg else None


def _load_initial(model: nn.Module, state_dict: dict[str, torch.Tensor], flags: ModelFlags) -> None:
    classes = classes_in_checkpoint(flags.model, state_dict)
    is_backbone = classes == 0 and bool(model.num_classes)
    if is_backbone:
        state_dict = with_new_classifier(model, state_dict)
    try:
        load_weights(model, state_dict, '--initial-checkpoint', flags.initial_checkpoint)
    except UsageError as e:
        if not classes or classes == model.num_classes:  # 0: a backbone, or a file of another architecture
            raise
        raise UsageError(
            f'{e}; it has {classes} classes, the model {model.num_classes}: --pretrained-path takes all but its classifier'
        ) from e
    if is_backbone:
        _logger.info(f"--initial-checkpoint: '{flags.initial_checkpoint}' is a backbone, the classifier starts new.")


def _check_classifier(model: nn.Module, config: RunConfig) -> None:
    if not hasattr(model, 'num_classes') or not hasattr(model, 'get_classifier'):
        raise UsageError(f'--model {config.model}: a {type(model).__name__} is no classifier, see --model-kwargs')
    if config.input_img_mode and len(Image.new(config.input_img_mode, (1, 1)).getbands()) != model.in_chans:
        raise UsageError(
            f'--input-img-mode {config.input_img_mode} does not give the {model.in_chans} channels of the student'
        )


def _check_taken(model: nn.Module, weights: dict[str, torch.Tensor], path: str) -> None:
    """Refuse a file of which nothing was loaded: timm adapts pretrained weights to the model and omits the rest."""
    check_values(model, weights, '--pretrained-path', path)
    own = {name: v for name, v in model.state_dict().items() if v.ndim > 1}
    by_shape: dict[torch.Size, list[torch.Tensor]] = {}
    for v in weights.values():
        by_shape.setdefault(v.shape, []).append(v)
    others = [n for n, a in own.items() if not any(torch.equal(a, b.to(a.dtype)) for b in by_shape.get(a.shape, []))]
    if len(others) == len(own):
        raise UsageError(
            f"--pretrained-path: '{path}' does not fit {type(model).__name__}: none of its weights was taken: give the --model that "
            f'they are of'
        )
    classifier = getattr(model, 'pretrained_cfg', {}).get('classifier') or ()
    heads = (classifier,) if isinstance(classifier, str) else tuple(classifier)
    of_heads = tuple(f'{head}.' for head in heads)
    said = ', the classifier starts new' if any(name.startswith(of_heads) for name in others) else ''
    _logger.info(f"--pretrained-path: weights of '{path}' loaded{said}.")
    others = [name for name in others if not name.startswith(of_heads)]
    if others:
        shown = ', '.join(others[:3]) + (', ...' if len(others) > 3 else '')
        _logger.warning(
            f"--pretrained-path: {len(others)} of the student's {len(own)} weights are not those of '{path}', but converted "
            f'or random: {shown}.'
        )


def describe_use(config: RunConfig, folder: RunFolder, num_classes: int) -> str:
    """Lines to copy after a run: its student in timm, its evaluation, its export."""
    path = shlex.quote(str(folder.path))
    then = f'Evaluate:  train-distill --evaluate {path}'
    if not num_classes:
        size = f' --img-size {config.img_size}' if config.img_size else ''
        size += f' --input-size {" ".join(map(str, config.input_size))}' if config.input_size else ''
        then = f'Fine-tune: train-distill DATA --epochs N{size} --model {shlex.quote(config.model)} --pretrained-path {path}'
    tools = f'{then}\nExport:    timm-pe export {path} --output exported'
    try:
        args = _model_args(config, {})
    except UsageError:  # the folder of a local-dir model, or the hub, is gone: the run is complete anyway
        return tools
    kwargs = {k: v for k, v in args.items() if k not in ('model_name', 'pretrained_cfg') and v is not None}
    more = {'global_pool': config.gp, 'bn_eps': config.bn_eps, 'num_classes': num_classes}
    kwargs |= {k: v for k, v in more.items() if v is not None}
    given = ', '.join(f'{name}={value!r}' for name, value in kwargs.items())
    package = model_entrypoint(config.model).__module__.split('.')[0] if is_model(config.model) else 'timm'
    need = '' if package == 'timm' else f'import {package}; '
    return (
        f"In timm:   {need}timm.create_model('{config.model}', {given}, checkpoint_path='{folder.student_file}')\n"
        f'{tools}'
    )


def _init_head(model: nn.Module, scale: float | None, bias: float | None) -> None:
    if scale is None and bias is None:
        return
    classifier = cast(Any, model).get_classifier()
    for head in classifier if isinstance(classifier, tuple) else (classifier,):
        if getattr(head, 'weight', None) is None or (bias is not None and head.bias is None):
            raise UsageError('--head-init-scale and --head-init-bias need a classifier with a weight and a bias')
        with torch.no_grad():
            if scale is not None:
                head.weight.mul_(scale)
                if head.bias is not None:
                    head.bias.mul_(scale)
            if bias is not None:
                nn.init.constant_(head.bias, bias)


def _set_grad_checkpointing(model: nn.Module, name: str) -> None:
    try:
        cast(Any, model).set_grad_checkpointing(enable=True)
    except (AttributeError, AssertionError, NotImplementedError) as e:
        raise UsageError(f"--grad-checkpointing: '{name}' does not support it") from e
    if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules()):
        _logger.warning(
            f'--grad-checkpointing runs the layers of {name} twice a step, and their batch norms count each batch twice: '
            f'their running statistics follow the last batches more closely than without it.'
        )


def place_student(model: nn.Module, config: RunConfig, runtime: Runtime) -> nn.Module:
    """Move the student to its device, with the normalization layers and the memory format that the flags ask for."""
    if config.split_bn:
        model = convert_splitbn_model(model, max(config.aug_splits, 2))
    model = model.to(device=runtime.device, dtype=runtime.model_dtype)
    if config.channels_last:
        model = model.to(memory_format=torch.channels_last)
    if runtime.distributed and config.sync_bn:
        model = convert_sync_batchnorm(model)
        _logger.info('Converted batch norm to synchronized batch norm.')
    if config.torchscript:
        try:
            model = torch.jit.script(model)
        except Exception as e:
            raise UsageError(f"--torchscript: '{config.model}' cannot be scripted: {one_line(e, 160)}") from e
    return model
