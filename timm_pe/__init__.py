"""Projector Ensemble Feature Distillation for timm: any timm model becomes the student of any other."""

from . import zoo  # importing it registers the CIFAR networks with timm
from .errors import UsageError
from .losses import create_feature_loss, kd_loss, list_feature_losses, register_feature_loss
from .projectors import ProjectorEnsemble, create_projector, list_projectors, register_projector
from .tap import FeatureTap
from .task import ProjectorEnsembleTask
from .teacher import Teacher, TeacherOutput, create_teacher
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
