"""Residual networks: three stages of basic blocks, and the four bottleneck stages of ResNet-50, both on a 3x3 stem.

He et al., "Deep Residual Learning for Image Recognition", arXiv 1512.03385 (section 4.2 for CIFAR).
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.models import generate_default_cfgs, register_model
from torch import nn

from .base import CifarNet, Stage, build_cifar_net, cifar_cfg

__all__ = ['CifarResNet', 'CifarResNet50']


def _projection(in_chs: int, out_chs: int, stride: int) -> nn.Module:
    """Shortcut of a residual block: the identity where shapes allow, else a 1x1 convolution (option B)."""
    if stride == 1 and in_chs == out_chs:
        return nn.Identity()
    return nn.Sequential(nn.Conv2d(in_chs, out_chs, 1, stride=stride, bias=False), nn.BatchNorm2d(out_chs))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions around a shortcut.

    Args:
        in_chs: Input channels.
        out_chs: Output channels.
        stride: Stride of the first convolution and of the shortcut.
    """

    def __init__(self, in_chs: int, out_chs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_chs, out_chs, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_chs)
        self.conv2 = nn.Conv2d(out_chs, out_chs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_chs)
        self.downsample = _projection(in_chs, out_chs, stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map `[b, in_chs, h, w]` to `[b, out_chs, h / stride, w / stride]`."""
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = self.bn2(self.conv2(out))
        return F.relu(out + self.downsample(x), inplace=True)


class Bottleneck(nn.Module):
    """A 3x3 convolution between two 1x1 convolutions, on a quarter of the output channels, around a shortcut.

    Args:
        in_chs: Input channels.
        out_chs: Output channels.
        stride: Stride of the 3x3 convolution and of the shortcut.
    """

    def __init__(self, in_chs: int, out_chs: int, stride: int) -> None:
        super().__init__()
        mid_chs = out_chs // 4
        self.conv1 = nn.Conv2d(in_chs, mid_chs, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(mid_chs)
        self.conv2 = nn.Conv2d(mid_chs, mid_chs, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(mid_chs)
        self.conv3 = nn.Conv2d(mid_chs, out_chs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_chs)
        self.shortcut = _projection(in_chs, out_chs, stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map `[b, in_chs, h, w]` to `[b, out_chs, h / stride, w / stride]`."""
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = F.relu(self.bn2(self.conv2(out)), inplace=True)
        out = self.bn3(self.conv3(out))
        return F.relu(out + self.shortcut(x), inplace=True)


class CifarResNet(CifarNet):
    """ResNet of stages `layer1`, `layer2`, ...; each but the first halves the resolution.

    Args:
        depths: Number of blocks of each stage.
        widths: Output channels of each stage.
        stem_width: Output channels of the 3x3 stem.
        **kwargs: Arguments of `CifarNet`.
    """

    block: type[BasicBlock] | type[Bottleneck] = BasicBlock
    group_patterns = {'stem': r'^conv1|bn1', 'blocks': r'^layer(\d+)\.(\d+)'}
    coarse_group_patterns = {'stem': r'^conv1|bn1', 'blocks': r'^layer(\d+)'}

    def __init__(self, depths: Sequence[int], widths: Sequence[int], stem_width: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.conv1 = nn.Conv2d(self.in_chans, stem_width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(stem_width)
        self.stage_names = [f'layer{i + 1}' for i in range(len(depths))]
        in_chs = stem_width
        for i, (depth, width) in enumerate(zip(depths, widths, strict=True)):
            first = self.block(in_chs, width, stride=2 if i else 1)
            rest = [self.block(width, width, stride=1) for _ in range(depth - 1)]
            self.add_module(self.stage_names[i], Stage(first, *rest))
            self.feature_info.append({'num_chs': width, 'reduction': 2**i, 'module': self.stage_names[i]})
            in_chs = width
        self._add_head(in_chs)
        self.init_convs()

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """Map images `[b, in_chans, h, w]` to `[b, num_features, h', w']`, after the last ReLU."""
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        for name in self.stage_names:
            x = getattr(self, name)(x)
        return x


class CifarResNet50(CifarResNet):
    """ResNet of bottleneck blocks, whose checkpoints call the classifier `linear`."""

    block = Bottleneck
    classifier_name = 'linear'


def _create_resnet(variant: str, pretrained: bool, depth: int, width_factor: int = 1, **kwargs: Any) -> CifarResNet:
    """Build the ResNet of `depth` = 6n + 2 layers; a width factor of 4 also doubles the stem."""
    return build_cifar_net(
        CifarResNet,
        variant,
        pretrained,
        num_stages=3,
        depths=((depth - 2) // 6,) * 3,
        widths=tuple(width * width_factor for width in (16, 32, 64)),
        stem_width=32 if width_factor > 1 else 16,
        **kwargs,
    )


_PAPER = {'paper_ids': 'arXiv:1512.03385', 'paper_name': 'Deep Residual Learning for Image Recognition'}

default_cfgs = generate_default_cfgs(
    {
        **{
            f'cifar_resnet{size}': cifar_cfg(pool_size=8, first_conv='conv1', classifier='fc', **_PAPER)
            for size in ('8', '14', '20', '32', '44', '56', '110', '8x4', '32x4')
        },
        'cifar_resnet50': cifar_cfg(pool_size=4, first_conv='conv1', classifier='linear', **_PAPER),
    }
)


@register_model
def cifar_resnet8(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """ResNet-8: 1 block a stage, 16 to 64 channels."""
    return _create_resnet('cifar_resnet8', pretrained, depth=8, **kwargs)


@register_model
def cifar_resnet14(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """ResNet-14: 2 blocks a stage, 16 to 64 channels."""
    return _create_resnet('cifar_resnet14', pretrained, depth=14, **kwargs)


@register_model
def cifar_resnet20(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """ResNet-20: 3 blocks a stage, 16 to 64 channels."""
    return _create_resnet('cifar_resnet20', pretrained, depth=20, **kwargs)


@register_model
def cifar_resnet32(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """ResNet-32: 5 blocks a stage, 16 to 64 channels."""
    return _create_resnet('cifar_resnet32', pretrained, depth=32, **kwargs)


@register_model
def cifar_resnet44(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """ResNet-44: 7 blocks a stage, 16 to 64 channels."""
    return _create_resnet('cifar_resnet44', pretrained, depth=44, **kwargs)


@register_model
def cifar_resnet56(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """ResNet-56: 9 blocks a stage, 16 to 64 channels."""
    return _create_resnet('cifar_resnet56', pretrained, depth=56, **kwargs)


@register_model
def cifar_resnet110(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """ResNet-110: 18 blocks a stage, 16 to 64 channels."""
    return _create_resnet('cifar_resnet110', pretrained, depth=110, **kwargs)


@register_model
def cifar_resnet8x4(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """ResNet-8 four times as wide: 64 to 256 channels, on a stem of 32."""
    return _create_resnet('cifar_resnet8x4', pretrained, depth=8, width_factor=4, **kwargs)


@register_model
def cifar_resnet32x4(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """ResNet-32 four times as wide: 64 to 256 channels, on a stem of 32."""
    return _create_resnet('cifar_resnet32x4', pretrained, depth=32, width_factor=4, **kwargs)


@register_model
def cifar_resnet50(pretrained: bool = False, **kwargs: Any) -> CifarResNet50:
    """ResNet-50 as on ImageNet, with its stem and pooling replaced by a 3x3 convolution of stride 1."""
    return build_cifar_net(
        CifarResNet50,
        'cifar_resnet50',
        pretrained,
        num_stages=4,
        depths=(3, 4, 6, 3),
        widths=(256, 512, 1024, 2048),
        stem_width=64,
        **kwargs,
    )
