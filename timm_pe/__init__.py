"""Projector Ensemble Feature Distillation for timm: any timm model becomes the student of any other."""

from . import zoo  # importing it registers the CIFAR networks with timm
from .errors import UsageError
from .method.losses import create_feature_loss, kd_loss, list_feature_losses, register_feature_loss
from .method.projectors import ProjectorEnsemble, create_projector, list_projectors, register_projector
from .method.tap import FeatureTap
from .method.task import ProjectorEnsembleTask
from .method.teacher import Teacher, TeacherOutput, create_teacher
from .version import __version__

__all__ = [
    'FeatureTap',
    'ProjectorEnsemble',
    'ProjectorEnsembleTask',
    'Teacher',
    'TeacherOutput',
    'UsageError',
    '__version__',
    'create_feature_loss',
    'create_projector',
    'create_teacher',
    'kd_loss',
    'list_feature_losses',
    'list_projectors',
    'register_feature_loss',
    'register_projector',
    'zoo',
]
