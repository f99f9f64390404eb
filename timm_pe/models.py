"""The student: timm's factory with the flags of the training script."""

import argparse
import logging

import torch
import torch.nn as nn
from timm.layers import convert_splitbn_model, convert_sync_batchnorm, set_fast_norm
from timm.models import resolve_model_input_args

from .checkpoints import resolve_resume
from .errors import UsageError, one_line
from .loading import check_model_name, create_timm_model, find_checkpoint, load_weights, read_state_dict
from .runtime import Runtime

_logger = logging.getLogger(__name__)


def check_names(args: argparse.Namespace) -> None:
    """Refuse models that do not exist and files that are not there, before anything is built or fetched.

    Raises:
        UsageError: See `check_model_name` and `find_checkpoint`.
    """
    check_model_name(args.model, '--model')
    if args.teacher:
        check_model_name(args.teacher, '--teacher')
    if args.kd_model_name:
        check_model_name(args.kd_model_name, '--kd-model-name')
    for flag in ('teacher_checkpoint', 'pretrained_path', 'initial_checkpoint', 'evaluate'):
        if getattr(args, flag):
            find_checkpoint(getattr(args, flag), '--' + flag.replace('_', '-'))
    args.resume = resolve_resume(args)


def create_student(args: argparse.Namespace) -> nn.Module:
    """Create the model to train, on the CPU.

    Args:
        args: Run arguments.

    Raises:
        UsageError: Unknown model, arguments it does not take, weights that can't be had.
    """
    if args.fast_norm:
        set_fast_norm()
    overlay = dict(args.pretrained_cfg_overlay)
    if args.pretrained_path:
        # num_classes -1: the file's head is taken only where it fits
        file = str(find_checkpoint(args.pretrained_path, '--pretrained-path'))
        overlay = {'file': file, 'num_classes': -1, **overlay}
    try:
        model_args = resolve_model_input_args(
            args.model,
            vars(args),
            **{**args.model_kwargs, **({'pretrained_cfg_overlay': overlay} if overlay else {})},
        )
    except ValueError as e:
        raise UsageError(f'--model {args.model}: {one_line(e)}') from e
    # given again below, by the name as the user wrote it
    model_args.pop('model_name')
    pretrained_cfg = model_args.pop('pretrained_cfg')
    for name, given in (('num_classes', args.num_classes), ('global_pool', args.gp)):
        if given is not None:  # a hub or local-dir model brings those it was saved with
            model_args[name] = given
    kwargs = {
        'drop_rate': args.drop,
        'drop_path_rate': args.drop_path if args.drop_path is not None else args.drop_connect,
        'drop_block_rate': args.drop_block,
        'bn_momentum': args.bn_momentum,
        'bn_eps': args.bn_eps,
        'scriptable': args.torchscript or None,
        **({} if ':' in args.model else {'pretrained_cfg': pretrained_cfg}),
        **model_args,
    }
    pretrained = args.pretrained or bool(args.pretrained_path)
    model = create_timm_model(args.model, '--model', pretrained=pretrained, **kwargs)
    if args.initial_checkpoint:
        state_dict = read_state_dict(args.initial_checkpoint, '--initial-checkpoint')
        load_weights(model, state_dict, '--initial-checkpoint', args.initial_checkpoint)
    _init_head(model, args.head_init_scale, args.head_init_bias)
    if args.grad_checkpointing:
        _set_grad_checkpointing(model, args.model)
    return model


def _init_head(model: nn.Module, scale: float | None, bias: float | None) -> None:
    if scale is None and bias is None:
        return
    classifier = model.get_classifier()
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
        model.set_grad_checkpointing(enable=True)
    except (AttributeError, AssertionError, NotImplementedError) as e:
        raise UsageError(f"--grad-checkpointing: '{name}' does not support it") from e


def place_student(model: nn.Module, args: argparse.Namespace, runtime: Runtime) -> nn.Module:
    """Move the student to its device, with the normalization layers and the memory format that the flags ask for."""
    if args.split_bn:
        model = convert_splitbn_model(model, max(args.aug_splits, 2))
    model = model.to(device=runtime.device, dtype=runtime.model_dtype)
    if args.channels_last:
        model = model.to(memory_format=torch.channels_last)
    if runtime.distributed and args.sync_bn:
        args.dist_bn = ''  # batch statistics are shared in every step, there is nothing left to spread
        model = convert_sync_batchnorm(model)
        _logger.info('Converted batch norm to synchronized batch norm.')
    if args.torchscript:
        try:
            model = torch.jit.script(model)
        except Exception as e:
            raise UsageError(f"--torchscript: '{args.model}' cannot be scripted: {one_line(e, 160)}") from e
    return model
