"""ShuffleNet V1 (three groups) and V2 (1x) for small images: a 1x1 stem of stride 1, no pooling before the stages.

Zhang et al., "ShuffleNet: An Extremely Efficient Convolutional Neural Network for Mobile Devices", arXiv 1707.01083.
Ma et al., "ShuffleNet V2: Practical Guidelines for Efficient CNN Architecture Design", arXiv 1807.11164.

Neither paper says how weights start; as in the field's training code, they are PyTorch's defaults.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.models import generate_default_cfgs, register_model
from torch import nn

from .base import CifarNet, Stage, build_cifar_net, cifar_cfg

__all__ = ['CifarShuffleNetV1', 'CifarShuffleNetV2']

_STEM_WIDTH = 24
_DEPTHS = (4, 8, 4)  # blocks of each stage, the one of stride 2 included


def _shuffle_channels(x: torch.Tensor, groups: int) -> torch.Tensor:
    """Deal the channels of `[b, c, h, w]` so that each of `groups` groups holds a share of every group of `x`."""
    return x.unflatten(1, (groups, -1)).transpose(1, 2).flatten(1, 2)


def _conv1x1(in_chs: int, out_chs: int, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_chs, out_chs, 1, groups=groups, bias=False)


def _depthwise(channels: int, stride: int) -> nn.Conv2d:
    return nn.Conv2d(channels, channels, 3, stride=stride, padding=1, groups=channels, bias=False)


class V1Unit(nn.Module):
    """Grouped 1x1 convolution, channel shuffle, depthwise convolution, grouped 1x1 convolution, around a shortcut.

    With stride 2 the shortcut is an average pool whose channels are concatenated to those of the branch. Unlike the
    paper's unit, this one has a ReLU after the depthwise convolution.

    Args:
        in_chs: Input channels.
        out_chs: Output channels; `in_chs` if the stride is 1.
        stride: Stride of the depthwise convolution, 1 or 2.
        groups: Groups of the 1x1 convolutions.
    """

    def __init__(self, in_chs: int, out_chs: int, stride: int, groups: int) -> None:
        super().__init__()
        self.stride = stride
        mid_chs = out_chs // 4 if stride == 1 else (out_chs - in_chs) // 4
        # The stem's 24 channels are too few to group (section 3.2).
        self.shuffle_groups = 1 if in_chs == _STEM_WIDTH else groups
        self.conv1 = _conv1x1(in_chs, mid_chs, self.shuffle_groups)
        self.bn1 = nn.BatchNorm2d(mid_chs)
        self.conv2 = _depthwise(mid_chs, stride)
        self.bn2 = nn.BatchNorm2d(mid_chs)
        self.conv3 = _conv1x1(mid_chs, 4 * mid_chs, groups)
        self.bn3 = nn.BatchNorm2d(4 * mid_chs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map `[b, in_chs, h, w]` to `[b, out_chs, h / stride, w / stride]`."""
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = _shuffle_channels(out, self.shuffle_groups)
        out = F.relu(self.bn2(self.conv2(out)), inplace=True)
        out = self.bn3(self.conv3(out))
        if self.stride == 1:
            return F.relu(out + x, inplace=True)
        pooled = F.avg_pool2d(x, 3, stride=2, padding=1)
        return F.relu(torch.cat([out, pooled], dim=1), inplace=True)


class V2Unit(nn.Module):
    """Half of the channels pass, the other half go through 1x1, depthwise and 1x1 convolutions; then both shuffle.

    Args:
        channels: Input and output channels.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.conv1 = _conv1x1(half, half)
        self.bn1 = nn.BatchNorm2d(half)
        self.conv2 = _depthwise(half, stride=1)
        self.bn2 = nn.BatchNorm2d(half)
        self.conv3 = _conv1x1(half, half)
        self.bn3 = nn.BatchNorm2d(half)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map `[b, channels, h, w]` to the same shape."""
        passed, out = x.chunk(2, dim=1)
        out = F.relu(self.bn1(self.conv1(out)), inplace=True)
        out = self.bn2(self.conv2(out))
        out = F.relu(self.bn3(self.conv3(out)), inplace=True)
        return _shuffle_channels(torch.cat([passed, out], dim=1), 2)


class V2DownUnit(nn.Module):
    """Two branches over all channels, each of stride 2 and half of the output channels; then both shuffle.

    Args:
        in_chs: Input channels.
        out_chs: Output channels.
    """

    def __init__(self, in_chs: int, out_chs: int) -> None:
        super().__init__()
        half = out_chs // 2
        self.conv1 = _depthwise(in_chs, stride=2)
        self.bn1 = nn.BatchNorm2d(in_chs)
        self.conv2 = _conv1x1(in_chs, half)
        self.bn2 = nn.BatchNorm2d(half)
        self.conv3 = _conv1x1(in_chs, half)
        self.bn3 = nn.BatchNorm2d(half)
        self.conv4 = _depthwise(half, stride=2)
        self.bn4 = nn.BatchNorm2d(half)
        self.conv5 = _conv1x1(half, half)
        self.bn5 = nn.BatchNorm2d(half)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map `[b, in_chs, h, w]` to `[b, out_chs, h / 2, w / 2]`."""
        left = self.bn1(self.conv1(x))
        left = F.relu(self.bn2(self.conv2(left)), inplace=True)
        right = F.relu(self.bn3(self.conv3(x)), inplace=True)
        right = self.bn4(self.conv4(right))
        right = F.relu(self.bn5(self.conv5(right)), inplace=True)
        return _shuffle_channels(torch.cat([left, right], dim=1), 2)


class _CifarShuffleNet(CifarNet):
    """Stem and stages `layer1` to `layer3`, each opening with a unit of stride 2, as both versions have them.

    Args:
        widths: Output channels of each stage.
        **kwargs: Arguments of `CifarNet`.
    """

    classifier_name = 'linear'

    def __init__(self, widths: Sequence[int], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.conv1 = _conv1x1(self.in_chans, _STEM_WIDTH)
        self.bn1 = nn.BatchNorm2d(_STEM_WIDTH)
        in_chs = _STEM_WIDTH
        for i, (depth, width) in enumerate(zip(_DEPTHS, widths, strict=True), start=1):
            units = [self._unit(width) for _ in range(depth - 1)]
            self.add_module(f'layer{i}', Stage(self._down_unit(in_chs, width), *units))
            self.feature_info.append({'num_chs': width, 'reduction': 2**i, 'module': f'layer{i}'})
            in_chs = width

    def _unit(self, width: int) -> nn.Module:
        """A unit that keeps width and resolution."""
        raise NotImplementedError

    def _down_unit(self, in_chs: int, out_chs: int) -> nn.Module:
        """A unit of stride 2."""
        raise NotImplementedError

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """Map images `[b, in_chans, h, w]` to the last stage's `[b, c, h / 8, w / 8]`, after the last ReLU."""
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        return self.layer3(self.layer2(self.layer1(x)))  # type: ignore[operator]


class CifarShuffleNetV1(_CifarShuffleNet):
    """ShuffleNet V1 with grouped 1x1 convolutions.

    Args:
        widths: Output channels of each stage.
        groups: Groups of the 1x1 convolutions.
        **kwargs: Arguments of `CifarNet`.
    """

    group_patterns = {'stem': r'^conv1|bn1', 'blocks': r'^layer(\d+)\.(\d+)'}
    coarse_group_patterns = {'stem': r'^conv1|bn1', 'blocks': r'^layer(\d+)'}

    def __init__(self, widths: Sequence[int], groups: int, **kwargs: Any) -> None:
        self._groups = groups
        super().__init__(widths, **kwargs)
        self._add_head(widths[-1])

    def _unit(self, width: int) -> V1Unit:
        return V1Unit(width, width, stride=1, groups=self._groups)

    def _down_unit(self, in_chs: int, out_chs: int) -> V1Unit:
        return V1Unit(in_chs, out_chs, stride=2, groups=self._groups)


class CifarShuffleNetV2(_CifarShuffleNet):
    """ShuffleNet V2 with a 1x1 convolution on top of the stages.

    Args:
        widths: Output channels of each stage.
        top_width: Output channels of the last convolution.
        **kwargs: Arguments of `CifarNet`.
    """

    group_patterns = {
        'stem': r'^conv1|bn1',
        'blocks': [(r'^layer(\d+)\.(\d+)', None), (r'^conv2|bn2', (99999,))],
    }
    coarse_group_patterns = {
        'stem': r'^conv1|bn1',
        'blocks': [(r'^layer(\d+)', None), (r'^conv2|bn2', (99999,))],
    }

    def __init__(self, widths: Sequence[int], top_width: int, **kwargs: Any) -> None:
        super().__init__(widths, **kwargs)
        self.conv2 = _conv1x1(widths[-1], top_width)
        self.bn2 = nn.BatchNorm2d(top_width)
        self._add_head(top_width)

    def _unit(self, width: int) -> V2Unit:
        return V2Unit(width)

    def _down_unit(self, in_chs: int, out_chs: int) -> V2DownUnit:
        return V2DownUnit(in_chs, out_chs)

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """Map images `[b, in_chans, h, w]` to `[b, top_width, h / 8, w / 8]`, after the last ReLU."""
        x = super().forward_features(x)
        return F.relu(self.bn2(self.conv2(x)), inplace=True)


default_cfgs = generate_default_cfgs(
    {
        'cifar_shufflenetv1': cifar_cfg(
            pool_size=4,
            first_conv='conv1',
            classifier='linear',
            paper_ids='arXiv:1707.01083',
            paper_name='ShuffleNet: An Extremely Efficient Convolutional Neural Network for Mobile Devices',
        ),
        'cifar_shufflenetv2': cifar_cfg(
            pool_size=4,
            first_conv='conv1',
            classifier='linear',
            paper_ids='arXiv:1807.11164',
            paper_name='ShuffleNet V2: Practical Guidelines for Efficient CNN Architecture Design',
        ),
    }
)


@register_model
def cifar_shufflenetv1(pretrained: bool = False, **kwargs: Any) -> CifarShuffleNetV1:
    """ShuffleNet V1 1x with 3 groups: 240 to 960 channels."""
    return build_cifar_net(
        CifarShuffleNetV1,
        'cifar_shufflenetv1',
        pretrained,
        num_stages=3,
        widths=(240, 480, 960),
        groups=3,
        **kwargs,
    )


@register_model
def cifar_shufflenetv2(pretrained: bool = False, **kwargs: Any) -> CifarShuffleNetV2:
    """ShuffleNet V2 1x: 116 to 464 channels, 1024 on top."""
    return build_cifar_net(
        CifarShuffleNetV2,
        'cifar_shufflenetv2',
        pretrained,
        num_stages=3,
        widths=(116, 232, 464),
        top_width=1024,
        **kwargs,
    )
