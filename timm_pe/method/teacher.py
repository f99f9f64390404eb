"""The teacher: any model, created, loaded, frozen, and given its inputs as in its own training."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.data.model_config import resolve_input_data_config
from timm.task import DistillationTeacher
from timm.utils import unwrap_model

from ..errors import UsageError, is_out_of_memory, one_line
from .cast_once import cast_once
from .fold import count_batch_norms, equal_to_rounding, fold_batch_norm
from .input_size import Size, resize_network
from .map_tap import MapTap
from .tap import FeatureTap
from .teacher_output import TeacherOutput
from .weight_files import (
    check_model_name,
    classes_in_checkpoint,
    create_timm_model,
    fingerprint,
    load_weights,
    read_state_dict,
    without_classifier,
)

# weights of red, green and blue in a grey image (ITU-R BT.601), those of PIL's 'L'
LUMA = (0.299, 0.587, 0.114)


class Teacher(nn.Module):
    """A frozen model in eval mode that gets the student's batch in the input format of its own training.

    The given module is frozen and set to eval mode in place (if norms are folded, a copy of it is); `train()` does not
    change that.

    Args:
        model: The teacher's network.
        input_mean: Mean of the normalization that the *student's* batch went through, one value a channel; None takes the
            teacher's own until a task sets that of its student.
        input_std: Its standard deviation, likewise.
        input_size: Side in pixels that batches are resized to (bicubic). None keeps their size if the network can take
            it, else resizes to the network's own size.
        mean: The teacher's own mean; None reads its `pretrained_cfg` (ImageNet's if it has none).
        std: Its own standard deviation, likewise.
        tap: Path of the module whose input is the feature, for models that are not timm's.
        device: Where it runs.
        dtype: Its own precision; None leaves the model's and follows autocast.
        channels_last: Run in memory format channels_last.
        needs_logits: If False, the classifier does not run, provided that on the first batch
            `forward_head(forward_features(x), pre_logits=True)` gives the tapped feature.
        fold: Fold batch norms into the layers before them (see `fold_batch_norm`), in float32 before any cast to `dtype`.
            If that is not exact to rounding, the network is not changed.
        fingerprint: See the attribute.
        autocast_dtype: Compute under autocast in this dtype, with convolutions and linear layers cast once, not in every
            step. Only without a `dtype`.
        built_size: Height and width that the network was built for, if they are not those of its `pretrained_cfg`.

    Attributes:
        model: The network.
        fingerprint: Hashes of the weights as they were loaded, before any fold or cast (see `weight_files.fingerprint`);
            empty for random weights and for a given module.
        folded: Number of batch norms that were folded.
        width: Width m of its penultimate feature.
        map_tap: What reads its feature map, after `tap_map`.
        num_classes: Number of its classes, None if unknown.
        mean: What its images are normalized with.
        std: Likewise.
        input_norm_by: Who said what the batches are normalized with: 'caller', 'task', or 'nobody'.

    Shapes:
        forward: the student's batch `[b, ch, h, w]` -> `TeacherOutput`, without a graph. One channel becomes three, and
        three become one (luma), if the teacher has another number than the student.
    """

    scale: torch.Tensor
    shift: torch.Tensor

    def __init__(
        self,
        model: nn.Module,
        input_mean: Sequence[float] | None = None,
        input_std: Sequence[float] | None = None,
        input_size: int | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        tap: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        channels_last: bool = False,
        needs_logits: bool = True,
        fold: bool = False,
        fingerprint: Mapping[str, str] | None = None,
        autocast_dtype: torch.dtype | None = None,
        built_size: Size | None = None,
    ):
        super().__init__()
        self.fingerprint = dict(fingerprint or {})
        network = unwrap_model(model)
        self.needs_logits = needs_logits
        self._pre_logits, self._logits = self._run_to_pre_logits, self._run_to_logits
        self._compiled = False
        own = resolve_input_data_config(network) if getattr(network, 'pretrained_cfg', None) else {}
        channels = own['input_size'][0] if own else 1
        self.mean, self.std = (
            tuple(values) * (channels if len(values) == 1 else 1)
            for values in (
                mean or own.get('mean', IMAGENET_DEFAULT_MEAN),
                std or own.get('std', IMAGENET_DEFAULT_STD),
            )
        )
        for name, values in (('mean', self.mean), ('std', self.std)):
            if own and len(values) != channels:
                raise UsageError(f'the {name} of the teacher has {len(values)} values, it sees {channels} channels')
        self.built_size = built_size
        # timm resolves the size that a network is built for; its weights are for that of its cfg
        of_weights = cast(Any, network).pretrained_cfg if built_size else own
        self.own_size: Size | None = of_weights['input_size'][1:] if own else None
        self.input_size = input_size
        self.folded = 0
        if fold and model is network:
            model = network = self._fold(model, tap)
        self.tap = FeatureTap(network, tap)
        self.map_tap: MapTap | None = None
        self.channels_last = channels_last
        self.model = model.requires_grad_(False).to(device=device, dtype=dtype, memory_format=self._memory_format)  # type: ignore[call-overload]  # takes all three together
        self.input_dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
        self.width = self.tap.width
        self.num_classes: int | None = getattr(network, 'num_classes', None)
        self._size_of: dict[tuple[int, int], tuple[int, int]] = {}
        self.set_input_norm(input_mean or self.mean, input_std or self.std, device)
        self.input_norm_by = 'caller' if input_mean or input_std else 'nobody'
        self.eval()
        self.set_precision(dtype, autocast_dtype)

    @property
    def precision(self) -> str:
        """The dtype it computes in, in words: 'float32', or 'AMP float16' under an autocast of its own."""
        name = str(self.autocast_dtype or self.input_dtype).removeprefix('torch.')
        return f'AMP {name}' if self.autocast_dtype else name

    def set_precision(self, dtype: torch.dtype | None = None, autocast_dtype: torch.dtype | None = None) -> None:
        """Change the precision, before `compile`; a lower `dtype` rounds the weights for good.

        Args:
            dtype: See the class.
            autocast_dtype: See the class.
        """
        if dtype is not None:
            self.model.to(dtype)
            self.input_dtype = dtype
        self.dtype = dtype
        is_bare = self.model is unwrap_model(self.model)
        # what the network can do is found out anew. None: not known yet. The network inside a wrapper (compiled, DDP) is
        # not called around it
        self._has_pre_logits: bool | None = None if is_bare else False
        # a low dtype of its own needs no autocast, and a wrapper may keep weights of its own
        self.autocast_dtype = autocast_dtype if dtype is None and is_bare else None
        if self.autocast_dtype is not None:
            self._cast_for_autocast(self.autocast_dtype)

    def _cast_for_autocast(self, dtype: torch.dtype) -> None:
        """See `cast_once`."""
        height, width = self._some_size
        device = next(self.model.parameters()).device
        if self._try_size((height, width), device):
            return
        x = torch.rand(2, len(self.mean), height, width, generator=torch.Generator().manual_seed(0)).to(device)

        def run() -> tuple[torch.Tensor, torch.Tensor]:
            with torch.autocast(device.type, dtype=dtype):
                return self.model(x), self.tap.pop()

        cast_once(self.model, dtype, run)

    def set_input_norm(
        self,
        mean: Sequence[float],
        std: Sequence[float],
        device: torch.device | str | None = None,
    ) -> None:
        """Set the normalization of the student's batches: x_teacher = (x * std + mean - own mean) / own std.

        Args:
            mean: Of the student's loader, one value a channel.
            std: Likewise.
            device: Where the batches are; None keeps the model's.

        Raises:
            UsageError: Numbers of channels that can't be converted (1 and 3 can).
        """
        channels = len(mean), len(self.mean)
        if channels[0] != channels[1] and set(channels) != {1, 3}:
            raise UsageError(
                f'the student sees {channels[0]} channels and the teacher {channels[1]}: only 1 and 3 can be converted'
            )
        self.input_mean, self.input_std, self.input_norm_by = tuple(mean), tuple(std), 'caller'
        device = device or next((p.device for p in self.model.parameters()), None)

        def column(values: Sequence[float]) -> torch.Tensor:
            return torch.tensor(values, dtype=torch.float64).view(1, -1, 1, 1)

        scale = column(self.input_std) / column(self.std)
        shift = (column(self.input_mean) - column(self.mean)) / column(self.std)
        self.to_grey = channels == (3, 1)
        if self.to_grey:
            luma = column(LUMA)
            scale = luma * column(self.input_std) / column(self.std)
            shift = ((luma * column(self.input_mean)).sum(1, keepdim=True) - column(self.mean)) / column(self.std)
        self.renormalizes = channels[0] != channels[1] or bool((scale != 1).any() or (shift != 0).any())
        self.register_buffer('scale', scale.float().to(device), persistent=False)
        self.register_buffer('shift', shift.float().to(device), persistent=False)

    @property
    def _some_size(self) -> Size:
        """A size that the network should take."""
        return (self.input_size,) * 2 if self.input_size else self.built_size or self.own_size or (224, 224)

    @property
    def _memory_format(self) -> torch.memory_format:
        return torch.channels_last if self.channels_last else torch.preserve_format

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> 'Teacher':
        """Follow `.to()` and `.half()`; what normalizes the batch stays in float32."""
        scale, shift = self.scale, self.shift
        super()._apply(fn, recurse)
        self.scale, self.shift = scale.to(self.scale.device), shift.to(self.shift.device)
        self.input_dtype = fn(torch.empty(0, dtype=self.input_dtype)).dtype
        return self

    def _fold(self, model: nn.Module, tap: str | None) -> nn.Module:
        """`model` with its batch norms folded, or unchanged if that is not possible."""
        height, width = self._some_size
        pixels = torch.rand(2, len(self.mean), height, width, generator=torch.Generator().manual_seed(0))
        mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (self.mean, self.std))
        folded = fold_batch_norm(model, (pixels - mean) / std, tap)
        if folded is None:
            return model
        self.folded = count_batch_norms(model) - count_batch_norms(folded)
        return folded

    def train(self, mode: bool = True) -> 'Teacher':
        """Stay in eval mode: a teacher's dropout and batch statistics never train."""
        return super().train(False)

    def adapt_input(self, x: torch.Tensor) -> torch.Tensor:
        """The student's batch `[b, ch, h, w]` in the teacher's normalization, channels, size and precision."""
        size = self.size_for(x)
        if self.renormalizes:
            x = x.float() * self.scale
            x = (x.sum(1, keepdim=True) if self.to_grey else x) + self.shift
        if size != x.shape[-2:]:
            x = F.interpolate(x.float(), size, mode='bicubic', antialias=True)
        return x.to(self.input_dtype, memory_format=self._memory_format)

    def size_for(self, x: torch.Tensor) -> tuple[int, int]:
        """Height and width at which the teacher sees batches of the size of `x`; decided once for each size.

        Raises:
            UsageError: The network takes neither this size nor one of its own.
        """
        given = x.shape[-2], x.shape[-1]
        if given not in self._size_of:
            wanted = given if self.input_size is None else (self.input_size, self.input_size)
            failure = self._try_size(wanted, x.device)
            cannot = f'the teacher {type(unwrap_model(self.model)).__name__} cannot take'
            why = one_line(failure, 120) if failure else ''
            if failure and self.input_size is not None:
                raise UsageError(f'{cannot} its input size {self.input_size} ({why})')
            other = self.built_size or self.own_size
            if failure and (other is None or self._try_size(other, x.device)):
                raise UsageError(f'{cannot} {given[0]}x{given[1]} images ({why}): give its own input size')
            self._size_of[given] = other if failure and other else wanted
        return self._size_of[given]

    def _try_size(self, size: tuple[int, int], device: torch.device) -> Exception | None:
        """The network's error on images of `size`, None if it can take them."""
        x = torch.zeros(1, len(self.mean), *size, device=device, dtype=self.input_dtype)
        try:
            with torch.no_grad(), self._autocast(device):
                unwrap_model(self.model)(x)
                self.tap.pop()
        except UsageError:  # of the tap, for any size
            raise
        except (RuntimeError, AssertionError, ValueError, IndexError, TypeError) as e:
            if is_out_of_memory(e):  # it says nothing of the size
                raise
            return e
        return None

    def tap_map(self) -> MapTap:
        """Have `forward` give the last feature map too, from the same pass; before `compile`.

        Raises:
            UsageError: The network has no map (see `MapTap`).
        """
        if self.map_tap is None:
            with self._autocast(self.scale.device):
                self.map_tap = MapTap(unwrap_model(self.model))
            self.tap.pop()
        return self.map_tap

    @torch.no_grad()
    def forward(self, x: torch.Tensor) -> TeacherOutput:
        self._stay_in_eval()
        x = self.adapt_input(x.detach())
        with self._own_precision(x.device):
            if not self.needs_logits and self._can_skip_classifier(x):
                return TeacherOutput(self._kept(self._pre_logits(x)), None, self._pop_map())
            logits = self._logits(x)
        # of a network that returns more, only the feature is read
        kept = self._kept(logits) if self.needs_logits and isinstance(logits, torch.Tensor) else None
        return TeacherOutput(self._kept(self.tap.pop()), kept, self._pop_map())

    def _pop_map(self) -> torch.Tensor | None:
        return None if self.map_tap is None else self._kept(self.map_tap.pop())

    def _kept(self, x: torch.Tensor) -> torch.Tensor:
        """Copy a compiled teacher's output: with CUDA graphs the student's forward would overwrite it."""
        return x.clone() if self._compiled else x

    @torch.no_grad()
    def forward_uncompiled(self, x: torch.Tensor) -> TeacherOutput:
        """Feature and logits of the student's batch, whatever `needs_logits` is, for other batches than those of training."""
        self._stay_in_eval()
        x = self.adapt_input(x.detach())
        with self._own_precision(x.device):
            # a compiled network would meet other shapes here, and its graphs would become dynamic for training too
            logits = unwrap_model(self.model)(x)
        return TeacherOutput(self.tap.pop(), logits, self._pop_map())

    def forward_logits(self, x: torch.Tensor) -> torch.Tensor:
        """Logits `[b, c]` of the student's batch, whatever `needs_logits` is.

        Raises:
            UsageError: The network returns something else.
        """
        logits: Any = self.forward_uncompiled(x).logits
        if isinstance(logits, torch.Tensor) and logits.ndim == 2:
            return logits
        found = list(logits.shape) if isinstance(logits, torch.Tensor) else f'a {type(logits).__name__}'
        raise UsageError(
            f'the teacher {type(unwrap_model(self.model)).__name__} gives {found} in place of logits [b, c]: give one that pools '
            f'and returns one tensor'
        )

    def _stay_in_eval(self) -> None:
        """A module around both may have put the network into training mode, past `train`."""
        if unwrap_model(self.model).training:
            self.train()

    def _own_precision(self, device: torch.device) -> AbstractContextManager[Any]:
        return nullcontext() if self.dtype is None and self.autocast_dtype is None else self._autocast(device)

    def _autocast(self, device: torch.device) -> AbstractContextManager[Any]:
        dtype = self.autocast_dtype
        return torch.autocast(device.type, enabled=dtype is not None, dtype=dtype)

    def _run_to_logits(self, x: torch.Tensor) -> torch.Tensor:
        return cast(torch.Tensor, self.model(x))

    def _run_to_pre_logits(self, x: torch.Tensor) -> torch.Tensor:
        network = unwrap_model(self.model)
        return network.forward_head(network.forward_features(x), pre_logits=True)

    def _can_skip_classifier(self, x: torch.Tensor) -> bool:
        """Whether timm's pre-logits are the tapped feature; decided once, on the first batch."""
        if self._has_pre_logits is None:
            unwrap_model(self.model)(x)
            feature = self.tap.pop()
            rtol = max(1e-4, 4 * torch.finfo(feature.dtype).eps)
            try:
                self._has_pre_logits = equal_to_rounding(self._run_to_pre_logits(x), feature, rtol)
            except (AttributeError, TypeError, RuntimeError, ValueError) as e:
                if is_out_of_memory(e):
                    raise
                self._has_pre_logits = False
        return self._has_pre_logits

    def compile(self, dynamic: bool | None = False, **compile_kwargs: Any) -> 'Teacher':  # type: ignore[override]  # returns itself, nn.Module's nothing
        """Compile what `forward` runs of the network. The tap is attached already, as it must be.

        PyTorch keeps by code what shapes vary. All teachers share theirs, so one that sees another size than the first would
        get dynamic shapes, which are slower; the network's own `forward` it may share with the student, so that is not what
        is compiled.

        Args:
            dynamic: False: a graph for each shape. None leaves it to PyTorch, for batches of many sizes.
            **compile_kwargs: For torch.compile.
        """
        self._compiled = True
        self._pre_logits = torch.compile(self._run_to_pre_logits, dynamic=dynamic, **compile_kwargs)
        self._logits = torch.compile(self._run_to_logits, dynamic=dynamic, **compile_kwargs)
        return self


def refuse_given(what: str, arguments: Mapping[str, Any]) -> None:
    """Refuse arguments that change nothing about a teacher that is made already.

    Raises:
        UsageError: One is not None, and not empty.
    """
    named = [name for name, value in arguments.items() if value is not None and value not in ('', {})]
    if named:
        raise UsageError(f'{what} is given as the teacher, and {", ".join(named)} cannot change it: leave that out')


def create_teacher(
    name_or_module: str | nn.Module,
    checkpoint: str | Path | None = None,
    pretrained: bool = True,
    num_classes: int | None = None,
    in_chans: int | None = None,
    use_ema: bool = True,
    needs_logits: bool = True,
    model_kwargs: dict[str, Any] | None = None,
    what: str = 'teacher',
    student_size: Size | None = None,
    **teacher_kwargs: Any,
) -> Teacher:
    """Make a `Teacher` from a timm name or from any module.

    Args:
        name_or_module: A timm name (`hf-hub:` and `local-dir:` included), a module, a timm `DistillationTeacher`, or a
            `Teacher`, which is returned as it is.
        checkpoint: Weights in a file (.safetensors, .pth, .pth.tar) or a run folder; nothing is downloaded then.
        pretrained: Without a checkpoint: load the pretrained weights of the name, or keep random ones.
        num_classes: Its own number of classes; None takes the checkpoint's, or what the pretrained weights have.
        in_chans: Its own number of input channels; None means the architecture's default.
        use_ema: Prefer a checkpoint's EMA weights.
        needs_logits: If False, the classifier is left out of the forward (see `Teacher`), and a checkpoint whose
            classifier does not match `num_classes` is accepted: the teacher's stays random. A given `Teacher` stays as it is.
        model_kwargs: More arguments for `timm.create_model`.
        what: Its name in messages.
        student_size: Height and width of the student's images: a network given by name that has a fixed input size is built
            for them, rounded to its patches, or for `input_size`, if its architecture can be (see `size_to_build`).
        **teacher_kwargs: For `Teacher`.

    Raises:
        UsageError: Unknown name, weights that can't be found, read or fitted, or an argument that a given module or
            `Teacher` cannot follow.
    """
    of_network = {'num_classes': num_classes, 'in_chans': in_chans, 'model_kwargs': model_kwargs}
    if isinstance(name_or_module, Teacher):
        off = {name: False for name, on in (('pretrained', pretrained), ('use_ema', use_ema)) if not on}
        refuse_given('a Teacher', {'checkpoint': checkpoint, **off, **of_network, **teacher_kwargs})
        return name_or_module
    teacher_kwargs['needs_logits'] = needs_logits
    if isinstance(name_or_module, DistillationTeacher):
        teacher_kwargs.setdefault('mean', cast(torch.Tensor, name_or_module.mean_kd).flatten().tolist())
        teacher_kwargs.setdefault('std', cast(torch.Tensor, name_or_module.std_kd).flatten().tolist())
        name_or_module = name_or_module.model
    if isinstance(name_or_module, nn.Module):
        refuse_given('a module', of_network)
        if checkpoint:
            load_weights(
                unwrap_model(name_or_module), read_state_dict(checkpoint, what, use_ema), what, str(checkpoint)
            )
        return Teacher(name_or_module, **teacher_kwargs)
    check_model_name(name_or_module, what)
    model_kwargs = dict(model_kwargs or {})
    num_classes = model_kwargs.pop('num_classes', num_classes)
    create = partial(create_timm_model, name_or_module, what, **{'in_chans': in_chans, **model_kwargs})
    if checkpoint:
        state_dict = read_state_dict(checkpoint, what, use_ema)
        classes = classes_in_checkpoint(name_or_module, state_dict)
        model = create(num_classes=classes if num_classes is None else num_classes)
        if not needs_logits and classes is not None and model.num_classes != classes:
            state_dict = without_classifier(model, state_dict)
        load_weights(model, state_dict, what, str(checkpoint))
    else:
        model = create(pretrained=pretrained, num_classes=num_classes)
    cfg = getattr(model, 'pretrained_cfg', None)
    if cfg and (checkpoint or not pretrained):  # the weights are not those that timm's tag names
        cast(Any, model).pretrained_cfg = {**cfg, 'tag': ''}
    loaded = fingerprint(model, needs_logits) if checkpoint or pretrained else None
    built = resize_network(model, create, student_size, teacher_kwargs.get('input_size'))
    return Teacher(model, fingerprint=loaded, built_size=built, **teacher_kwargs)
