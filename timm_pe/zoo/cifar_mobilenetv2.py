"""MobileNetV2 of half width for small images: a total stride of 16, and ReLU in the place of ReLU6.

Sandler et al., "MobileNetV2: Inverted Residuals and Linear Bottlenecks", arXiv 1801.04381.
"""

from typing import Any

import torch
from timm.models import generate_default_cfgs, register_model
from torch import nn

from .base import CifarNet, Stage, build_cifar_net, cifar_cfg

__all__ = ['CifarMobileNetV2']

# Stages of the paper's table 2 (expansion, channels, blocks, stride); the second one strides 1 here, 2 there.
_STAGES = ((1, 16, 1, 1), (6, 24, 2, 1), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))


def _conv_bn_relu(in_chs: int, out_chs: int, kernel_size: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    """A convolution that keeps the resolution up to its stride, batch norm, ReLU."""
    padding = kernel_size // 2
    return [
        nn.Conv2d(in_chs, out_chs, kernel_size, stride=stride, padding=padding, groups=groups, bias=False),
        nn.BatchNorm2d(out_chs),
        nn.ReLU(inplace=True),
    ]


class InvertedResidual(nn.Module):
    """Expand, filter depthwise, project linearly; a shortcut where shapes allow.

    Args:
        in_chs: Input channels.
        out_chs: Output channels.
        stride: Stride of the depthwise convolution.
        expansion: Channels of the depthwise convolution, in units of `in_chs`. An expansion by 1 keeps its
            convolution here, which the paper leaves out.
    """

    def __init__(self, in_chs: int, out_chs: int, stride: int, expansion: int) -> None:
        super().__init__()
        mid_chs = in_chs * expansion
        self.has_shortcut = stride == 1 and in_chs == out_chs
        self.conv = nn.Sequential(
            *_conv_bn_relu(in_chs, mid_chs, 1),
            *_conv_bn_relu(mid_chs, mid_chs, 3, stride=stride, groups=mid_chs),
            nn.Conv2d(mid_chs, out_chs, 1, bias=False),
            nn.BatchNorm2d(out_chs),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map `[b, in_chs, h, w]` to `[b, out_chs, h / stride, w / stride]`."""
        return x + self.conv(x) if self.has_shortcut else self.conv(x)


class CifarMobileNetV2(CifarNet):
    """MobileNetV2 with a 3x3 stem of stride 2 and a 1x1 convolution to 1280 channels on top.

    Args:
        width_factor: Scale of the channels of stem and stages; the top keeps its 1280.
        **kwargs: Arguments of `CifarNet`.
    """

    classifier_name = 'classifier.0'
    group_patterns = {'stem': r'^conv1', 'blocks': [(r'^blocks\.(\d+)\.(\d+)', None), (r'^conv2', (99999,))]}
    coarse_group_patterns = {'stem': r'^conv1', 'blocks': [(r'^blocks\.(\d+)', None), (r'^conv2', (99999,))]}

    def __init__(self, width_factor: float, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        in_chs = int(32 * width_factor)
        self.conv1 = nn.Sequential(*_conv_bn_relu(self.in_chans, in_chs, 3, stride=2))
        self.blocks = nn.Sequential()
        reduction = 2
        for i, (expansion, channels, depth, stride) in enumerate(_STAGES):
            width = int(channels * width_factor)
            first = InvertedResidual(in_chs, width, stride, expansion)
            rest = [InvertedResidual(width, width, 1, expansion) for _ in range(depth - 1)]
            self.blocks.append(Stage(first, *rest))
            reduction *= stride
            if stride > 1 or not self.feature_info:
                self.feature_info.append({})
            # The last stage of a resolution is the one to offer.
            self.feature_info[-1] = {'num_chs': width, 'reduction': reduction, 'module': f'blocks.{i}'}
            in_chs = width
        self.conv2 = nn.Sequential(*_conv_bn_relu(in_chs, 1280, 1))
        self.classifier = nn.Sequential(nn.Identity())  # published checkpoints hold the linear layer as classifier.0
        self._add_head(1280)
        self.init_convs()

    def init_classifier(self, classifier: nn.Linear) -> None:
        """Draw weights from N(0, 0.01^2), with zero biases."""
        nn.init.normal_(classifier.weight, std=0.01)
        nn.init.zeros_(classifier.bias)

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """Map images `[b, in_chans, h, w]` to `[b, 1280, h / 16, w / 16]`, after the last ReLU."""
        return self.conv2(self.blocks(self.conv1(x)))


default_cfgs = generate_default_cfgs(
    {
        'cifar_mobilenetv2_half': cifar_cfg(
            pool_size=2,
            first_conv='conv1.0',
            classifier='classifier.0',
            paper_ids='arXiv:1801.04381',
            paper_name='MobileNetV2: Inverted Residuals and Linear Bottlenecks',
        ),
    }
)


@register_model
def cifar_mobilenetv2_half(pretrained: bool = False, **kwargs: Any) -> CifarMobileNetV2:
    """MobileNetV2 with a width multiplier of 0.5."""
    return build_cifar_net(
        CifarMobileNetV2,
        'cifar_mobilenetv2_half',
        pretrained,
        num_stages=4,
        width_factor=0.5,
        **kwargs,
    )
