"""What the networks of the zoo share: timm's model API, the CIFAR-100 configuration, stages that can be recomputed."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from timm.layers import create_classifier, get_device_dtype
from timm.models import build_model_with_cfg, checkpoint_seq
from torch import nn

CIFAR100_MEAN = (0.5071, 0.4867, 0.4408)
CIFAR100_STD = (0.2675, 0.2565, 0.2761)


def cifar_cfg(pool_size: int, first_conv: str, classifier: str, **kwargs: Any) -> dict[str, Any]:
    """Describe a network for 32x32 CIFAR-100 images in timm's terms.

    There is no `url` and no `hf_hub_id`, so `pretrained=True` is refused by timm itself.

    Args:
        pool_size: Height and width of the feature map of a 32x32 image, in pixels.
        first_conv: Module path of the convolution that sees the image.
        classifier: Module path of the classifier.
        **kwargs: Further fields of `timm.models.PretrainedCfg`.

    Returns:
        Fields for `timm.models.generate_default_cfgs`.
    """
    return {
        'num_classes': 100,
        'input_size': (3, 32, 32),
        'pool_size': (pool_size, pool_size),
        'crop_pct': 1.0,
        'interpolation': 'bicubic',
        'mean': CIFAR100_MEAN,
        'std': CIFAR100_STD,
        'first_conv': first_conv,
        'classifier': classifier,
        **kwargs,
    }


class Stage(nn.Sequential):
    """Modules run one after the other, recomputed in the backward pass when `grad_checkpointing` is set.

    Args:
        *modules: What `nn.Sequential` takes.
        every: Number of consecutive modules recomputed together.
    """

    def __init__(self, *modules: Any, every: int = 1) -> None:
        super().__init__(*modules)
        self.every = every
        self.grad_checkpointing = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map `[b, c, h, w]` to `[b, c', h', w']`."""
        if self.grad_checkpointing:
            return checkpoint_seq(self, x, every=self.every)
        return super().forward(x)


class CifarNet(nn.Module):
    """A convolutional classifier with global pooling and one linear layer, under timm's model API.

    A subclass builds its modules in the order of the published checkpoints, ends its `__init__` with `_add_head`,
    and implements `forward_features`. Networks take images of any size that leaves a pixel after their strides.

    Args:
        num_classes: Number of classes; 0 removes the classifier, and the network returns its pooled feature.
        in_chans: Number of image channels.
        global_pool: Pooling of timm's `SelectAdaptivePool2d`: 'avg', 'max', 'avgmax', 'catavgmax', or '' for none.
        drop_rate: Dropout probability of the pooled feature.
    """

    classifier_name = 'fc'
    group_patterns: dict[str, Any]  # parameter groups by block, as timm's `group_matcher` returns them
    coarse_group_patterns: dict[str, Any]  # the same by stage

    def __init__(
        self,
        num_classes: int = 100,
        in_chans: int = 3,
        global_pool: str = 'avg',
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.drop_rate = drop_rate
        self._pool_type = global_pool
        self.feature_info: list[dict[str, Any]] = []

    def _add_head(self, num_features: int) -> None:
        """Add pooling and classifier on top of `num_features` channels."""
        self.num_features = num_features
        self.reset_classifier(self.num_classes, self._pool_type)

    def init_convs(self) -> None:
        """Draw convolution weights from a normal distribution scaled by fan-out (He et al., arXiv 1502.01852)."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode='fan_out', nonlinearity='relu')
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def init_classifier(self, classifier: nn.Linear) -> None:
        """Initialize a new classifier; PyTorch's default unless a subclass says otherwise."""

    def get_classifier(self, name_only: bool = False) -> nn.Module | str:
        """Return the classifier, or its module path."""
        return self.classifier_name if name_only else self.get_submodule(self.classifier_name)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier by a new one, on the device and in the dtype of the network.

        Args:
            num_classes: Number of classes; 0 for none.
            global_pool: Another pooling; the present one if None.
        """
        self.num_classes = num_classes
        if global_pool is not None:
            self._pool_type = global_pool
        self.global_pool, classifier = create_classifier(
            self.num_features,
            num_classes,
            pool_type=self._pool_type,
            **get_device_dtype(self),
        )
        self.head_hidden_size = self.num_features * self.global_pool.feat_mult()
        if num_classes > 0:
            self.init_classifier(classifier)
        parent, _, name = self.classifier_name.rpartition('.')
        setattr(self.get_submodule(parent), name, classifier.train(self.training))
        self.global_pool.train(self.training)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return timm's patterns that group parameters by depth (layer-wise learning rates)."""
        return self.coarse_group_patterns if coarse else self.group_patterns

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the activations inside the stages in the backward pass instead of keeping them."""
        for module in self.modules():
            if isinstance(module, Stage):
                module.grad_checkpointing = enable

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """Map images `[b, in_chans, h, w]` to the last feature map `[b, num_features, h', w']`."""
        raise NotImplementedError

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Map the feature map `[b, num_features, h', w']` to logits `[b, num_classes]`.

        Args:
            x: Output of `forward_features`.
            pre_logits: Return the penultimate feature `[b, head_hidden_size]`, the classifier's input, instead.
        """
        x = self.global_pool(x)
        x = F.dropout(x, p=self.drop_rate, training=self.training)
        return x if pre_logits else self.get_submodule(self.classifier_name)(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map images `[b, in_chans, h, w]` to logits `[b, num_classes]`."""
        return self.forward_head(self.forward_features(x))


CifarNetT = TypeVar('CifarNetT', bound=CifarNet)


def build_cifar_net(
    model_cls: Callable[..., CifarNetT],
    variant: str,
    pretrained: bool,
    num_stages: int,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    **kwargs: Any,
) -> CifarNetT:
    """Build a registered network through timm's factory.

    Args:
        model_cls: Class of the network.
        variant: Name in timm's registry.
        pretrained: Refused by timm, as no weights are published under these names.
        num_stages: Number of feature maps that `features_only=True` returns by default.
        device: Where the network is to be; every architecture of timm takes this, and timm's tasks give it.
        dtype: Its precision, likewise.
        **kwargs: Arguments of `model_cls` and of `timm.models.build_model_with_cfg`.
    """
    model = build_model_with_cfg(
        model_cls,
        variant,
        pretrained,
        # Activations and pools of these networks are calls, not modules: only hooks see the stages in place.
        feature_cfg={'feature_cls': 'hook', 'out_indices': tuple(range(num_stages))},
        **kwargs,
    )
    return model.to(device=device, dtype=dtype)
