"""Wide residual networks: three stages of pre-activation blocks.

Zagoruyko and Komodakis, "Wide Residual Networks", arXiv 1605.07146; blocks of He et al., arXiv 1603.05027.
"""

from collections import OrderedDict
from typing import Any

import torch
import torch.nn.functional as F
from timm.models import generate_default_cfgs, register_model
from torch import nn

from .base import CifarNet, Stage, build_cifar_net, cifar_cfg

__all__ = ['CifarWideResNet']


class PreActBlock(nn.Module):
    """Batch norm, ReLU and 3x3 convolution, twice, around a shortcut.

    Args:
        in_chs: Input channels.
        out_chs: Output channels.
        stride: Stride of the first convolution and of the shortcut.
    """

    def __init__(self, in_chs: int, out_chs: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_chs)
        self.conv1 = nn.Conv2d(in_chs, out_chs, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_chs)
        self.conv2 = nn.Conv2d(out_chs, out_chs, 3, padding=1, bias=False)
        # A stride without a change of width doesn't occur: stages with stride 2 double the channels.
        self.convShortcut = nn.Conv2d(in_chs, out_chs, 1, stride=stride, bias=False) if in_chs != out_chs else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map `[b, in_chs, h, w]` to `[b, out_chs, h / stride, w / stride]`, before any activation."""
        activated = F.relu(self.bn1(x), inplace=True)
        out = F.relu(self.bn2(self.conv1(activated)), inplace=True)
        shortcut = x if self.convShortcut is None else self.convShortcut(activated)
        return self.conv2(out) + shortcut


class CifarWideResNet(CifarNet):
    """WRN-`depth`-`width_factor`: stages `block1` to `block3`; the last two halve the resolution.

    The feature maps of `features_only=True` are sums of residual branches, before batch norm and ReLU.

    Args:
        depth: Number of layers, 6n + 4 for n blocks a stage.
        width_factor: Channels of the stages in units of (16, 32, 64).
        **kwargs: Arguments of `CifarNet`.
    """

    group_patterns = {'stem': r'^conv1', 'blocks': [(r'^block(\d+)\.layer\.(\d+)', None), (r'^bn1', (99999,))]}
    coarse_group_patterns = {'stem': r'^conv1', 'blocks': [(r'^block(\d+)', None), (r'^bn1', (99999,))]}

    def __init__(self, depth: int, width_factor: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        in_chs = 16
        self.conv1 = nn.Conv2d(self.in_chans, in_chs, 3, padding=1, bias=False)
        for i in range(3):
            width = 16 * 2**i * width_factor
            first = PreActBlock(in_chs, width, stride=2 if i else 1)
            rest = [PreActBlock(width, width, stride=1) for _ in range((depth - 4) // 6 - 1)]
            # Published checkpoints name the blocks of a stage block1.layer.0, block1.layer.1, ...
            self.add_module(f'block{i + 1}', nn.Sequential(OrderedDict(layer=Stage(first, *rest))))
            self.feature_info.append({'num_chs': width, 'reduction': 2**i, 'module': f'block{i + 1}'})
            in_chs = width
        self.bn1 = nn.BatchNorm2d(in_chs)
        self._add_head(in_chs)
        self.init_convs()

    def init_classifier(self, classifier: nn.Linear) -> None:
        """Keep PyTorch's default weights, with zero biases."""
        nn.init.zeros_(classifier.bias)

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """Map images `[b, in_chans, h, w]` to `[b, num_features, h / 4, w / 4]`, after the last ReLU."""
        x = self.block3(self.block2(self.block1(self.conv1(x))))  # type: ignore[operator]
        return F.relu(self.bn1(x), inplace=True)


def _create_wrn(variant: str, pretrained: bool, **kwargs: Any) -> CifarWideResNet:
    """Build a wide ResNet of the given `depth` and `width_factor`."""
    return build_cifar_net(CifarWideResNet, variant, pretrained, num_stages=3, **kwargs)


default_cfgs = generate_default_cfgs(
    {
        f'cifar_wrn_{size}': cifar_cfg(
            pool_size=8,
            first_conv='conv1',
            classifier='fc',
            paper_ids='arXiv:1605.07146',
            paper_name='Wide Residual Networks',
        )
        for size in ('16_1', '16_2', '40_1', '40_2')
    }
)


@register_model
def cifar_wrn_16_1(pretrained: bool = False, **kwargs: Any) -> CifarWideResNet:
    """WRN-16-1: 2 blocks a stage, 16 to 64 channels."""
    return _create_wrn('cifar_wrn_16_1', pretrained, depth=16, width_factor=1, **kwargs)


@register_model
def cifar_wrn_16_2(pretrained: bool = False, **kwargs: Any) -> CifarWideResNet:
    """WRN-16-2: 2 blocks a stage, 32 to 128 channels."""
    return _create_wrn('cifar_wrn_16_2', pretrained, depth=16, width_factor=2, **kwargs)


@register_model
def cifar_wrn_40_1(pretrained: bool = False, **kwargs: Any) -> CifarWideResNet:
    """WRN-40-1: 6 blocks a stage, 16 to 64 channels."""
    return _create_wrn('cifar_wrn_40_1', pretrained, depth=40, width_factor=1, **kwargs)


@register_model
def cifar_wrn_40_2(pretrained: bool = False, **kwargs: Any) -> CifarWideResNet:
    """WRN-40-2: 6 blocks a stage, 32 to 128 channels."""
    return _create_wrn('cifar_wrn_40_2', pretrained, depth=40, width_factor=2, **kwargs)
