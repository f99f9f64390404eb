"""timm models by name and weights from files, with errors a user can act on. Nothing here unpickles code."""

import difflib
import hashlib
import logging
import os
import re
import reprlib
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import timm
import torch
import torch.nn as nn
from timm.models import get_pretrained_cfg, is_model, load_state_dict, parse_model_name

from ..errors import NoPretrainedWeights, UsageError, one_line

_logger = logging.getLogger(__name__)

# what a run folder of train_distill holds, the evaluated student first
STUDENT, BEST, LAST = RUN_FOLDER_FILES = ('student.safetensors', 'model_best.pth.tar', 'last.pth.tar')
# first bytes of a torch.save file: a zip, before torch 1.6 a pickle of this number
_ZIP, _OLD_MAGIC = b'PK\x03\x04', torch.serialization.MAGIC_NUMBER.to_bytes(10, 'little')


def check_model_name(name: str, what: str) -> None:
    """Raise if `name` can't be a timm model, before anything is built or fetched.

    Args:
        name: A name of timm's registry (with or without a pretrained tag), `hf-hub:...` or `local-dir:...`.
        what: The flag that gave the name ('--teacher'), for the message.

    Raises:
        UsageError: Unknown name (with near ones), unknown pretrained tag (with the known ones), or no such folder.
    """
    try:
        source, model_id = parse_model_name(name)
    except ValueError as e:
        raise UsageError(f'{what}: {one_line(e)}') from e
    if source == 'local-dir':
        if not os.path.isfile(os.path.join(model_id, 'config.json')):
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
        UsageError: Unknown name, arguments the architecture does not take, or weights that can't be loaded.
    """
    check_model_name(name, what)
    if pretrained:
        if not _reads_file(name, kwargs):
            announce_download(name, what)
        _check_local_dir(name, what)
    try:
        model = timm.create_model(name, pretrained=pretrained, **kwargs)
    except Exception as e:
        reason = one_line(e)
        if isinstance(e, (TypeError, NotImplementedError)):
            raise UsageError(f"{what}: cannot build '{name}' with {_given(kwargs)}: {reason}") from e
        if pretrained:
            raise NoPretrainedWeights(
                f"{what}: no pretrained weights for '{name}' ({reason}): give a checkpoint file, or 'local-dir:FOLDER'"
            ) from e
        raise UsageError(f"{what}: cannot build '{name}' with {_given(kwargs)}: {reason}") from e
    if pretrained:
        check_values(model, model.state_dict(), what, name)
    return model


def _reads_file(name: str, kwargs: dict[str, Any]) -> bool:
    """Whether timm loads the pretrained weights from a file that the cfg names."""
    cfg = {**(kwargs.get('pretrained_cfg') or {}), **(kwargs.get('pretrained_cfg_overlay') or {})}
    return bool(cfg.get('file')) and not cfg.get('source', ':' in name)


def _check_local_dir(name: str, what: str) -> None:
    source, folder = parse_model_name(name)
    if source == 'local-dir':
        for file in sorted(Path(folder).iterdir()):
            if file.suffix in ('.bin', '.pth', '.tar'):  # timm takes one of these, or safetensors
                _check_file(file, what)


def _given(kwargs: dict[str, Any]) -> str:
    given = {k: v for k, v in kwargs.items() if isinstance(v, (str, int, float, bool, tuple, list))}
    return ', '.join(
        f'{k}={reprlib.repr(v) if isinstance(v, (tuple, list)) else str(v)[:80]}' for k, v in given.items()
    )


def announce_download(name: str, what: str) -> None:
    """Log what is about to be downloaded: with an unreachable hub it takes long to fail."""
    source, model_id = parse_model_name(name)
    if source == 'local-dir':
        return
    where = model_id if source else getattr(get_pretrained_cfg(model_id), 'hf_hub_id', None)
    if where:
        _logger.info(
            f"{what}: loading pretrained weights of '{name}' from the Hugging Face hub (or its local cache). Without a "
            f'connection this gives up after about 45 s; a checkpoint file or local-dir:FOLDER needs none.'
        )


def find_checkpoint(path: str | os.PathLike[str], what: str, names: Sequence[str] = RUN_FOLDER_FILES) -> Path:
    """The checkpoint file that `path` names: a file, or the first of `names` in a run folder of train_distill.

    Raises:
        UsageError: Nothing there, or a folder that holds none of them.
    """
    found = Path(path)
    if os.path.isdir(found):  # False for invalid names, where pathlib raises
        files = [found / name for name in names if (found / name).is_file()]
        if not files:
            raise UsageError(f"{what}: folder '{path}' holds no checkpoint ({', '.join(names)})")
        found = files[0]
    if not os.path.isfile(found):
        raise UsageError(f"{what}: no file '{path}'")
    _check_file(found, what)
    return found


def _check_file(file: Path, what: str) -> None:
    """Refuse a file that is no checkpoint, by its first bytes and table of contents, before loading it."""
    try:
        with open(file, 'rb') as f:
            start = f.read(32)
    except OSError as e:
        raise UsageError(f"{what}: cannot read '{file}' ({e.strerror})") from e
    if not start:
        raise UsageError(f"{what}: '{file}' is empty")
    if file.suffix == '.safetensors':  # that library checks every length by itself
        return
    if not start.startswith(_ZIP):
        if _OLD_MAGIC not in start:
            raise UsageError(
                f"{what}: '{file}' is not a PyTorch checkpoint, it starts with {start[:16]!r} (a safetensors file must be "
                f'called .safetensors)'
            )
        return
    try:
        with zipfile.ZipFile(file) as archive:
            unpacked = sum(record.file_size for record in archive.infolist())
            is_script = any(name.endswith('/constants.pkl') for name in archive.namelist())
    except Exception as e:  # a damaged table of contents makes zipfile fail in many ways
        raise UsageError(f"{what}: '{file}' is cut off or damaged ({one_line(e, 120)})") from e
    if unpacked > 10 * file.stat().st_size:  # torch.save does not compress: this one is made to fill the memory
        raise UsageError(
            f"{what}: '{file}' is compressed and would unpack to {unpacked / 2**30:.1f} GB: it is not read"
        )
    if is_script:
        raise UsageError(f"{what}: '{file}' is a TorchScript archive, that is code: give its state_dict()")


def read_state_dict(path: str | os.PathLike[str], what: str, use_ema: bool = True) -> dict[str, torch.Tensor]:
    """The model weights of a checkpoint: tensors only, code in a pickle is refused.

    Args:
        path: `.safetensors`, or what torch.save wrote: a plain state_dict or one under `state_dict`, `model`,
            `state_dict_ema`, `model_ema`. Prefixes of DDP and torch.compile are removed. Or a run folder.
        what: What the checkpoint is for, for messages.
        use_ema: Prefer EMA weights if there are any, as timm does.

    Raises:
        UsageError: No such file, unreadable, holding code, or holding no tensors.
    """
    # student.safetensors of a run folder is the moving average if there was one
    file = find_checkpoint(path, what, RUN_FOLDER_FILES if use_ema else RUN_FOLDER_FILES[1:])
    try:
        state_dict: Any = load_state_dict(str(file), use_ema=use_ema, weights_only=True)
    except AttributeError:  # timm strips prefixes from keys that are no strings
        state_dict = None
    except Exception as e:
        raise UsageError(f'{what}: {why_unreadable(file, e)}') from e
    check_state_dict(state_dict, what, file)
    return state_dict


def check_state_dict(state_dict: Any, what: str, file: str | os.PathLike[str]) -> None:
    """Refuse anything but a state_dict of plain tensors by name.

    Raises:
        UsageError: The message names the entries that do not fit.
    """
    if not isinstance(state_dict, dict) or not all(isinstance(k, str) for k in state_dict):
        raise UsageError(f"{what}: '{file}' is no state_dict: weights by their names")
    odd = [f'{k} is {_kind(v)}' for k, v in state_dict.items() if _kind(v)]
    if odd or not state_dict:
        raise UsageError(f"{what}: '{file}' is no state_dict: {_some(odd) or 'it is empty'}")


def why_unreadable(file: str | os.PathLike[str], error: Exception) -> str:
    """A message on why torch.load or safetensors failed on `file`."""
    code = re.search(r'unsupported globals?:? (?:GLOBAL )?([\w.]+\w)', f'{error} {error.__cause__}', re.IGNORECASE)
    if code:
        return (
            f"'{file}' holds code ({code[1]}) and is not loaded, only tensors are: re-save it as safetensors or "
            f'torch.save(model.state_dict(), ...)'
        )
    # instead of timm's advice to load it anyway
    reason = 'it is damaged' if 'weights_only' in str(error) else one_line(error, 160)
    return f"cannot read '{file}' as a checkpoint ({reason})"


def _kind(value: Any) -> str:
    """Description of a `value` that is no plain tensor; empty for a plain tensor."""
    if not isinstance(value, torch.Tensor):
        return f'a {type(value).__name__}'
    if value.layout is not torch.strided or value.is_quantized or value.is_meta:
        return f'a tensor of {value.layout}, {value.dtype}, on {value.device}'
    return ''


def load_weights(model: nn.Module, state_dict: dict[str, torch.Tensor], what: str, source: str) -> None:
    """Strict `model.load_state_dict` that lists what does not fit.

    A model without split batch norms loads the main norms of a checkpoint that has them.

    Raises:
        UsageError: See `check_weights`.
    """
    state_dict = _without_auxiliary(model, state_dict, what, source)
    check_weights(model, state_dict, what, source)
    model.load_state_dict(state_dict)
    _logger.info(f"{what}: weights of '{source}' loaded.")


def _without_auxiliary(
    model: nn.Module, state_dict: dict[str, torch.Tensor], what: str, source: str
) -> dict[str, torch.Tensor]:
    """`state_dict` without the auxiliary norms of timm's --split-bn, if `model` has only the main ones."""
    own = model.state_dict()
    auxiliary = {k for k in state_dict if k not in own and re.sub(r'\.aux_bn\.\d+(?=\.\w+$)', '', k) in own}
    if auxiliary:
        _logger.info(
            f"{what}: {len(auxiliary)} weights of auxiliary batch norms are left out of '{source}': the main ones evaluate."
        )
    return {k: v for k, v in state_dict.items() if k not in auxiliary}


def check_weights(model: nn.Module, state_dict: dict[str, torch.Tensor], what: str, source: str) -> None:
    """Refuse a state_dict that is not one of `model`, with a list of what does not fit.

    Raises:
        UsageError: Missing or unexpected keys, other shapes, or values that are no weights (see `check_values`).
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
    check_values(model, state_dict, what, source)


def check_values(model: nn.Module, state_dict: dict[str, torch.Tensor], what: str, source: str) -> None:
    """Refuse values that training cannot produce: integers for floats, NaN, and inf in a parameter (buffers may have
    one).

    Raises:
        UsageError: The message names them.
    """
    own, parameters = model.state_dict(), dict(model.named_parameters())
    kinds, broken = [], []
    for name, value in state_dict.items():
        if name in own and own[name].is_floating_point() and not value.is_floating_point():
            kinds.append(f'{name} {value.dtype} for {own[name].dtype}')
        elif value.is_floating_point():
            value = value.float() if value.element_size() == 1 else value  # float8 has no isnan
            if (~value.isfinite() if name in parameters else value.isnan()).any():
                broken.append(name)
    if kinds:
        raise UsageError(f"{what}: '{source}' does not fit {type(model).__name__}: {_some(kinds)}")
    if broken:
        raise UsageError(f"{what}: '{source}' has {len(broken)} weights that are not finite ({_some(broken)})")


def _some(names: Iterable[str], limit: int = 4) -> str:
    names = list(names)
    return ', '.join(names[:limit]) + (', ...' if len(names) > limit else '')


def _classifier_names(model: nn.Module) -> tuple[str, ...]:
    classifiers = cast(Any, model).pretrained_cfg.get('classifier') or ()
    return (classifiers,) if isinstance(classifiers, str) else tuple(classifiers)


def hash_tensors(state_dict: Mapping[str, torch.Tensor]) -> str:
    """Short SHA-256 of tensors: their names, dtypes, shapes and bytes."""
    digest = hashlib.sha256()
    for name, tensor in state_dict.items():
        digest.update(f'{name} {tensor.dtype} {list(tensor.shape)}\n'.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def fingerprint(model: nn.Module, with_classifier: bool) -> dict[str, str]:
    """Hashes of a timm model's weights without its classifier ('features'), and of its 'classifier' if that is used."""
    names = tuple(f'{n}.' for n in _classifier_names(model))
    weights = model.state_dict()
    hashes = {'features': hash_tensors({k: v for k, v in weights.items() if not k.startswith(names)})}
    if with_classifier:
        hashes['classifier'] = hash_tensors({k: v for k, v in weights.items() if k.startswith(names)})
    return hashes


def without_classifier(model: nn.Module, state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """`state_dict` with its classifier replaced by that of `model`."""
    names = _classifier_names(model)
    own = {k: v for k, v in model.state_dict().items() if k.startswith(tuple(f'{n}.' for n in names))}
    _logger.info(f'The classifier of the checkpoint has another size, {", ".join(names)} stays random: it is not used.')
    return {**{k: v for k, v in state_dict.items() if not k.startswith(tuple(f'{n}.' for n in names))}, **own}


def with_new_classifier(model: nn.Module, state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """`state_dict` of a backbone, with the classifier of `model` added; as it is if it has any part of a classifier."""
    names = tuple(f'{n}.' for n in _classifier_names(model))
    if any(k.startswith(names) for k in state_dict):
        return state_dict
    return {**state_dict, **{k: v for k, v in model.state_dict().items() if k.startswith(names)}}


def classes_in_checkpoint(name: str, state_dict: dict[str, torch.Tensor]) -> int | None:
    """Number of classes in a checkpoint of architecture `name`, by its classifier; 0 without one, None if unknown."""
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
