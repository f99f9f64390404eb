"""The teacher: any model, found, loaded, frozen and fed as it was trained."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn as nn
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.task import DistillationTeacher
from timm.utils import unwrap_model

from .errors import UsageError
from .loading import check_model_name, classes_in_checkpoint, create_timm_model, load_weights, read_state_dict
from .tap import FeatureTap


class TeacherOutput(NamedTuple):
    """What a teacher says of a batch: its penultimate feature `[b, m]` and its logits `[b, c]`."""

    feature: torch.Tensor
    logits: torch.Tensor


class Teacher(nn.Module):
    """A frozen model in eval mode that sees the student's batch as it was itself trained to see images.

    The given module is frozen and set to eval mode in place; `train()` leaves it there.

    Args:
        model: The teacher's network.
        input_mean: Mean of the normalization that the *student's* batch went through, one value a channel.
        input_std: Its standard deviation.
        mean: The teacher's own mean; None reads its `pretrained_cfg` (ImageNet's where it has none).
        std: Its own standard deviation, likewise.
        tap: Path of the module whose input is the feature, for models that are not timm's.
        device: Where it runs.
        dtype: Its own precision; None leaves the model's and follows autocast.

    Attributes:
        model: The network.
        width: Width m of its penultimate feature.
        num_classes: Number of its classes, None where the model doesn't tell.

    Shapes:
        forward: the student's batch `[b, ch, h, w]` -> `TeacherOutput`, without a graph.
    """

    def __init__(
        self,
        model: nn.Module,
        input_mean: Sequence[float] | None = None,
        input_std: Sequence[float] | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        tap: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.tap = FeatureTap(unwrap_model(model), tap)
        self.model = model.requires_grad_(False).to(device=device, dtype=dtype)
        self.dtype = dtype
        self.input_dtype = dtype or next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
        self.width = self.tap.width
        self.num_classes: int | None = getattr(unwrap_model(model), 'num_classes', None)
        cfg = getattr(unwrap_model(model), 'pretrained_cfg', None) or {}
        self.mean = tuple(mean or cfg.get('mean') or IMAGENET_DEFAULT_MEAN)
        self.std = tuple(std or cfg.get('std') or IMAGENET_DEFAULT_STD)
        self.set_input_norm(input_mean or self.mean, input_std or self.std, device)
        self.eval()

    def set_input_norm(
        self,
        mean: Sequence[float],
        std: Sequence[float],
        device: torch.device | str | None = None,
    ) -> None:
        """Say which normalization the student's batch carries: x_teacher = (x * std + mean - own mean) / own std.

        Args:
            mean: Of the student's loader, one value a channel.
            std: Likewise.
            device: Where the batches are; None keeps the model's.

        Raises:
            UsageError: Another number of channels than the teacher has.
        """
        if len(mean) != len(self.mean) or len(std) != len(self.std):
            raise UsageError(
                f'the student sees {len(mean)} channels and the teacher {len(self.mean)}: give both the same number'
            )
        self.input_mean, self.input_std = tuple(mean), tuple(std)
        device = device or next((p.device for p in self.model.parameters()), None)
        values = torch.tensor([self.input_mean, self.input_std, self.mean, self.std], dtype=torch.float64)
        input_mean, input_std, own_mean, own_std = values.view(4, 1, -1, 1, 1)
        scale, shift = input_std / own_std, (input_mean - own_mean) / own_std
        self.renormalizes = not (torch.equal(input_mean, own_mean) and torch.equal(input_std, own_std))
        self.register_buffer('scale', scale.float().to(device), persistent=False)
        self.register_buffer('shift', shift.float().to(device), persistent=False)

    def train(self, mode: bool = True) -> 'Teacher':
        """Stay in eval mode: a teacher's dropout and batch statistics never train."""
        return super().train(False)

    def adapt_input(self, x: torch.Tensor) -> torch.Tensor:
        """The student's batch in the teacher's normalization and precision, `[b, ch, h, w]` both."""
        if self.renormalizes:
            x = x.float() * self.scale + self.shift
        return x.to(self.input_dtype)

    @torch.no_grad()
    def forward(self, x: torch.Tensor) -> TeacherOutput:
        x = self.adapt_input(x.detach())
        if self.dtype is None:
            logits = self.model(x)
        else:
            with torch.autocast(x.device.type, enabled=False):
                logits = self.model(x)
        return TeacherOutput(self.tap.pop(), logits)

    def compile(self, **compile_kwargs: Any) -> 'Teacher':
        """Compile the network (arguments of torch.compile). The tap sits on it already, as it must."""
        self.model = torch.compile(self.model, **compile_kwargs)
        return self


def create_teacher(
    name_or_module: str | nn.Module,
    checkpoint: str | Path | None = None,
    pretrained: bool = True,
    num_classes: int | None = None,
    in_chans: int | None = None,
    use_ema: bool = True,
    model_kwargs: dict[str, Any] | None = None,
    what: str = 'teacher',
    **teacher_kwargs: Any,
) -> Teacher:
    """Make a `Teacher` from a timm name or from any module.

    Args:
        name_or_module: A timm name (`hf-hub:` and `local-dir:` included), a module, a `Teacher` or a timm
            `DistillationTeacher`.
        checkpoint: Weights in a file (.safetensors, .pth, .pth.tar) or a run folder; then nothing is fetched.
        pretrained: Without a checkpoint: load the weights that belong to the name, or leave random ones.
        num_classes: Its own number of classes; None takes the checkpoint's, or what the pretrained weights have.
        in_chans: Its own number of input channels; None is the architecture's default.
        use_ema: Prefer a checkpoint's EMA weights.
        model_kwargs: More arguments for `timm.create_model`.
        what: How to call it in messages.
        **teacher_kwargs: For `Teacher`.

    Raises:
        UsageError: Unknown name, weights that can't be had, read or fitted.
    """
    if isinstance(name_or_module, Teacher):
        return name_or_module
    if isinstance(name_or_module, DistillationTeacher):
        teacher_kwargs.setdefault('mean', name_or_module.mean_kd.flatten().tolist())
        teacher_kwargs.setdefault('std', name_or_module.std_kd.flatten().tolist())
        return Teacher(name_or_module.model, **teacher_kwargs)
    if isinstance(name_or_module, nn.Module):
        if checkpoint:
            load_weights(
                unwrap_model(name_or_module), read_state_dict(checkpoint, what, use_ema), what, str(checkpoint)
            )
        return Teacher(name_or_module, **teacher_kwargs)
    model = _create_named(name_or_module, checkpoint, pretrained, num_classes, in_chans, use_ema, model_kwargs, what)
    return Teacher(model, **teacher_kwargs)


def _create_named(
    name: str,
    checkpoint: str | Path | None,
    pretrained: bool,
    num_classes: int | None,
    in_chans: int | None,
    use_ema: bool,
    model_kwargs: dict[str, Any] | None,
    what: str,
) -> nn.Module:
    check_model_name(name, what)
    kwargs = dict(model_kwargs or {}, in_chans=in_chans)
    if not checkpoint:
        return create_timm_model(name, what, pretrained=pretrained, num_classes=num_classes, **kwargs)
    state_dict = read_state_dict(checkpoint, what, use_ema)
    if num_classes is None:
        num_classes = classes_in_checkpoint(name, state_dict)
    model = create_timm_model(name, what, num_classes=num_classes, **kwargs)
    load_weights(model, state_dict, what, str(checkpoint))
    return model
