"""VGG networks with batch norm, and global pooling instead of hidden linear layers.

Simonyan and Zisserman, "Very Deep Convolutional Networks for Large-Scale Image Recognition", arXiv 1409.1556.
VGG-8 is the distillation field's own: one convolution a stage.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.models import generate_default_cfgs, register_model
from torch import nn

from .base import CifarNet, Stage, build_cifar_net, cifar_cfg

__all__ = ['CifarVGG']

_WIDTHS = (64, 128, 256, 512, 512)


class CifarVGG(CifarNet):
    """VGG of stages `block0` to `block4`, the first three followed by max pooling.

    The code published with CRD pools a fourth time, after `block3`, for images of exactly 64 pixels; this one doesn't.

    Args:
        depths: Number of 3x3 convolutions of each of the five stages.
        **kwargs: Arguments of `CifarNet`.
    """

    classifier_name = 'classifier'
    # One group a stage in both: by index, a convolution and its batch norm would part.
    group_patterns = coarse_group_patterns = {'stem': r'^block0\.[01]\.', 'blocks': r'^block(\d+)'}

    def __init__(self, depths: Sequence[int], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        in_chs = self.in_chans
        for i, (depth, width) in enumerate(zip(depths, _WIDTHS, strict=True)):
            layers: list[nn.Module] = []
            for _ in range(depth):
                layers += [nn.Conv2d(in_chs, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
                in_chs = width
            # The three go together: recomputing an in-place ReLU alone would find its input overwritten.
            self.add_module(f'block{i}', Stage(*layers, every=3))
            self.feature_info.append({'num_chs': width, 'reduction': 2 ** min(i, 3), 'module': f'block{i}'})
        self._add_head(in_chs)
        self.init_convs()

    def init_classifier(self, classifier: nn.Linear) -> None:
        """Draw weights from N(0, 0.01^2), with zero biases."""
        nn.init.normal_(classifier.weight, std=0.01)
        nn.init.zeros_(classifier.bias)

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """Map images `[b, in_chans, h, w]` to `[b, 512, h / 8, w / 8]`, after the last ReLU."""
        x = F.max_pool2d(self.block0(x), 2)  # type: ignore[operator]
        x = F.max_pool2d(self.block1(x), 2)  # type: ignore[operator]
        x = F.max_pool2d(self.block2(x), 2)  # type: ignore[operator]
        return self.block4(self.block3(x))  # type: ignore[operator]


def _create_vgg(variant: str, pretrained: bool, **kwargs: Any) -> CifarVGG:
    """Build a VGG with the given `depths`."""
    return build_cifar_net(CifarVGG, variant, pretrained, num_stages=5, **kwargs)


default_cfgs = generate_default_cfgs(
    {
        f'cifar_vgg{size}': cifar_cfg(
            pool_size=4,
            first_conv='block0.0',
            classifier='classifier',
            paper_ids='arXiv:1409.1556',
            paper_name='Very Deep Convolutional Networks for Large-Scale Image Recognition',
        )
        for size in (8, 11, 13, 16, 19)
    }
)


@register_model
def cifar_vgg8(pretrained: bool = False, **kwargs: Any) -> CifarVGG:
    """VGG-8: one convolution a stage."""
    return _create_vgg('cifar_vgg8', pretrained, depths=(1, 1, 1, 1, 1), **kwargs)


@register_model
def cifar_vgg11(pretrained: bool = False, **kwargs: Any) -> CifarVGG:
    """VGG-11: configuration A of the paper."""
    return _create_vgg('cifar_vgg11', pretrained, depths=(1, 1, 2, 2, 2), **kwargs)


@register_model
def cifar_vgg13(pretrained: bool = False, **kwargs: Any) -> CifarVGG:
    """VGG-13: configuration B of the paper."""
    return _create_vgg('cifar_vgg13', pretrained, depths=(2, 2, 2, 2, 2), **kwargs)


@register_model
def cifar_vgg16(pretrained: bool = False, **kwargs: Any) -> CifarVGG:
    """VGG-16: configuration D of the paper."""
    return _create_vgg('cifar_vgg16', pretrained, depths=(2, 2, 3, 3, 3), **kwargs)


@register_model
def cifar_vgg19(pretrained: bool = False, **kwargs: Any) -> CifarVGG:
    """VGG-19: configuration E of the paper."""
    return _create_vgg('cifar_vgg19', pretrained, depths=(2, 2, 4, 4, 4), **kwargs)
