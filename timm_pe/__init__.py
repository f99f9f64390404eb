"""Projector Ensemble Feature Distillation for timm: any timm model becomes the student of any other."""

import sys
from typing import TYPE_CHECKING, Any

from .errors import UsageError
from .version import __version__

if TYPE_CHECKING:
    from . import zoo
    from .method.losses import create_feature_loss, kd_loss, list_feature_losses, register_feature_loss
    from .method.projectors import ProjectorEnsemble, create_projector, list_projectors, register_projector
    from .method.tap import FeatureTap
    from .method.task import ProjectorEnsembleTask
    from .method.teacher import Teacher, TeacherOutput, create_teacher

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

# importing zoo registers the CIFAR networks with timm, which takes seconds; a command does it after reading its flags
if 'timm_pe_command' not in sys.modules:
    from . import zoo


if not TYPE_CHECKING:  # else type checkers would accept every name

    def __getattr__(name: str) -> Any:
        """A public name, imported on first access: most of them need torch."""
        if name in __all__:
            from .method import losses, projectors, tap, task, teacher

            for module in (losses, projectors, tap, task, teacher):
                if hasattr(module, name):
                    return getattr(module, name)
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
