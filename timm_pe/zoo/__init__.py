"""The CIFAR networks that distillation papers compare on, in timm's model registry.

These are the 22 networks of the zoo published with CRD (Tian et al., arXiv 1910.10699), with its parameter names:
its checkpoints, `{'model': state_dict}`, load unchanged and strictly. Importing this package registers them.

    timm.create_model('cifar_resnet8x4', checkpoint_path='resnet8x4.pth')

A network is called `cifar_` and its name there in lower case, except

    there         here
    MobileNetV2   cifar_mobilenetv2_half    (its width multiplier is 0.5)
    ShuffleV1     cifar_shufflenetv1
    ShuffleV2     cifar_shufflenetv2

Files carry the prefix too, as timm lists models by the name of their file and has a `resnet` and a `vgg` of its own.
"""

from . import cifar_mobilenetv2, cifar_resnet, cifar_shufflenet, cifar_vgg, cifar_wrn
from .base import CIFAR100_MEAN, CIFAR100_STD, CifarNet

__all__ = [
    'CIFAR100_MEAN',
    'CIFAR100_STD',
    'CifarNet',
    'cifar_mobilenetv2',
    'cifar_resnet',
    'cifar_shufflenet',
    'cifar_vgg',
    'cifar_wrn',
]
