"""timm models by name and weights from files, with errors a user can act on. Nothing here ever unpickles code."""

import difflib
import logging
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn as nn
from timm.models import get_pretrained_cfg, is_model, load_state_dict, parse_model_name

from .errors import UsageError, one_line

_logger = logging.getLogger(__name__)

# what a run folder of train_distill holds, the evaluated student first
RUN_FOLDER_FILES = ('student.safetensors', 'model_best.pth.tar', 'last.pth.tar')


def check_model_name(name: str, what: str) -> None:
    """Raise where `name` can't be a timm model, before anything is built or fetched.

    Args:
        name: A name of timm's registry (with or without a pretrained tag), `hf-hub:...` or `local-dir:...`.
        what: What the name was given for ('--teacher'), for the message.

    Raises:
        UsageError: Unknown name (with near ones), unknown pretrained tag (with the known ones), or no such folder.
    """
    try:
        source, model_id = parse_model_name(name)
    except ValueError as e:
        raise UsageError(f'{what}: {one_line(e)}') from e
    if source == 'local-dir':
        if not (Path(model_id) / 'config.json').is_file():
            raise UsageError(f"{what} '{name}': no folder with a config.json at '{model_id}'")
        return
    if source is not None:
        return
    if not is_model(model_id):
        near = difflib.get_close_matches(model_id.split('.')[0], timm.list_models(), n=5, cutoff=0.6)
        hint = f'did you mean {", ".join(near)}?' if near else "timm.list_models('*word*') lists the known ones"
        raise UsageError(f"{what}: unknown model '{name}', {hint}")
    try:
        get_pretrained_cfg(model_id)
    except RuntimeError as e:
        tags = [t.split('.', 1)[1] for t in timm.list_models(model_id.split('.')[0], include_tags=True) if '.' in t]
        raise UsageError(f"{what}: model '{name}' has no such tag, it has {', '.join(tags) or 'none'}") from e


def create_timm_model(name: str, what: str, pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """`timm.create_model` with one-line errors.

    Args:
        name: See `check_model_name`.
        what: What the model is for ('--teacher'), for messages.
        pretrained: Load the weights that belong to the name.
        **kwargs: For `timm.create_model`; None values are left out there.

    Raises:
        UsageError: Unknown name, arguments the architecture does not take, or weights that can't be had.
    """
    check_model_name(name, what)
    if pretrained:
        announce_download(name, what)
    try:
        return timm.create_model(name, pretrained=pretrained, **kwargs)
    except Exception as e:
        reason = one_line(e)
        if isinstance(e, (TypeError, NotImplementedError)):
            raise UsageError(f"{what}: cannot build '{name}' with {_given(kwargs)}: {reason}") from e
        if pretrained:
            raise UsageError(
                f"{what}: no pretrained weights for '{name}' ({reason}): give a checkpoint file, use 'local-dir:FOLDER', "
                f'or start from random weights'
            ) from e
        raise UsageError(f"{what}: cannot build '{name}' with {_given(kwargs)}: {reason}") from e


def _given(kwargs: dict[str, Any]) -> str:
    given = {k: v for k, v in kwargs.items() if v is not None and isinstance(v, (str, int, float, bool, tuple, list))}
    return ', '.join(f'{k}={v}' for k, v in given.items()) or 'no arguments'


def announce_download(name: str, what: str) -> None:
    """Say what is about to be fetched, before a hub that cannot be reached keeps one waiting."""
    source, model_id = parse_model_name(name)
    if source == 'local-dir':
        return
    where = model_id if source else getattr(get_pretrained_cfg(model_id), 'hf_hub_id', None)
    if where:
        _logger.info(
            f"{what}: loading pretrained weights of '{name}' from the Hugging Face hub (or its local cache). Without a "
            f'connection this gives up after about 45 s; a checkpoint file or local-dir:FOLDER needs none.'
        )


def find_checkpoint(path: str | os.PathLike, what: str, names: Sequence[str] = RUN_FOLDER_FILES) -> Path:
    """The checkpoint file that `path` names: a file, or the first of `names` in a run folder of train_distill.

    Raises:
        UsageError: Nothing there, or a folder that holds none of them.
    """
    found = Path(path)
    if found.is_dir():
        for name in names:
            if (found / name).is_file():
                return found / name
        raise UsageError(f"{what}: folder '{path}' holds no checkpoint ({', '.join(names)})")
    if not found.is_file():
        raise UsageError(f"{what}: no file '{path}'")
    return found


def read_state_dict(path: str | os.PathLike, what: str, use_ema: bool = True) -> dict[str, torch.Tensor]:
    """The model weights of a checkpoint: tensors only, code in a pickle is refused.

    Args:
        path: `.safetensors`, or what torch.save wrote: a plain state_dict or one under `state_dict`, `model`,
            `state_dict_ema`, `model_ema`. Prefixes of DDP and torch.compile are removed. Or a run folder.
        what: What the checkpoint is for, for messages.
        use_ema: Prefer EMA weights where there are some, as timm does.

    Raises:
        UsageError: No such file, unreadable, holding code, or holding no tensors.
    """
    # the student of a run folder is its moving average where that was on
    file = find_checkpoint(path, what, RUN_FOLDER_FILES if use_ema else RUN_FOLDER_FILES[1:])
    try:
        state_dict = load_state_dict(str(file), use_ema=use_ema, weights_only=True)
    except Exception as e:
        if 'weights_only' in str(e):
            raise UsageError(
                f"{what}: '{file}' holds pickled code, only tensors are loaded: re-save it as "
                f'safetensors or torch.save(model.state_dict(), ...)'
            ) from e
        raise UsageError(f"{what}: cannot read '{file}' as a checkpoint ({one_line(e, 160)})") from e
    tensors = {k: v for k, v in state_dict.items() if isinstance(k, str) and isinstance(v, torch.Tensor)}
    if not tensors or len(tensors) < len(state_dict):
        raise UsageError(f"{what}: '{file}' is no state_dict: {_some(map(str, state_dict)) or 'it is empty'}")
    return tensors


def load_weights(model: nn.Module, state_dict: dict[str, torch.Tensor], what: str, source: str) -> None:
    """Strict `model.load_state_dict` that lists what does not fit.

    Raises:
        UsageError: Missing or unexpected keys, or other shapes.
    """
    own = model.state_dict()
    missing = [k for k in own if k not in state_dict]
    unexpected = [k for k in state_dict if k not in own]
    misfits = [
        f'{k} {list(state_dict[k].shape)} for {list(own[k].shape)}'
        for k in own
        if k in state_dict and state_dict[k].shape != own[k].shape
    ]
    problems = [
        f'{len(keys)} {kind} ({_some(keys)})'
        for kind, keys in (('missing keys', missing), ('unexpected keys', unexpected), ('other shapes', misfits))
        if keys
    ]
    if problems:
        raise UsageError(f"{what}: '{source}' does not fit {type(model).__name__}: {'; '.join(problems)}")
    model.load_state_dict(state_dict)


def _some(names: Iterable[str], limit: int = 4) -> str:
    names = list(names)
    return ', '.join(names[:limit]) + (', ...' if len(names) > limit else '')


def without_classifier(model: nn.Module, state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """`state_dict` with the classifier that `model` has in the place of its own."""
    classifiers = model.pretrained_cfg.get('classifier') or ()
    names = (classifiers,) if isinstance(classifiers, str) else tuple(classifiers)
    own = {k: v for k, v in model.state_dict().items() if k.startswith(tuple(f'{n}.' for n in names))}
    _logger.info(f'The classifier of the checkpoint has another size, {", ".join(names)} stays random: it is not used.')
    return {**{k: v for k, v in state_dict.items() if not k.startswith(tuple(f'{n}.' for n in names))}, **own}


def classes_in_checkpoint(name: str, state_dict: dict[str, torch.Tensor]) -> int | None:
    """Number of classes of a checkpoint of the architecture `name`, read off its classifier; None where unknown."""
    source, model_id = parse_model_name(name)
    cfg = get_pretrained_cfg(model_id) if source is None else None
    classifier = getattr(cfg, 'classifier', None)
    if not classifier:
        return None
    first = classifier if isinstance(classifier, str) else classifier[0]
    for key in (f'{first}.weight', f'{first}.fc.weight', f'{first}.bias'):
        if key in state_dict:
            return state_dict[key].shape[0]
    return 0
