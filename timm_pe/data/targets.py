"""Labels as a data set gives them, checked where they are read: each error is one line, in a loader process too."""

from typing import Any

import torch
from timm.data.target_transforms import MultiLabelTarget

from ..errors import UsageError, one_line


class ClassTarget:
    """The label of one class, for data sets that do not tell their classes.

    Args:
        num_classes: Classes of the student.
    """

    def __init__(self, num_classes: int):
        self.num_classes = num_classes

    def __call__(self, target: Any) -> int:
        """The label as an int.

        Raises:
            UsageError: No single label, or none that the student has a class for.
        """
        try:
            label = int(target)
        except (TypeError, ValueError) as e:
            raise UsageError(
                f'an image has the target {target!r:.100}, not one label: --task multilabel takes several, --target-key '
                f'another column'
            ) from e
        if not 0 <= label < self.num_classes:
            raise UsageError(f'the data has label {label}, the student {self.num_classes} classes: see --num-classes')
        return label


class MultiLabelTargets(MultiLabelTarget):
    """timm's multi-hot vector `[c]` of an image's labels, whose errors are those of a user.

    Args:
        num_classes: c, the classes of the student.
        dense: Targets are vectors of 0 and 1 already, not class indices.
    """

    def __call__(self, target: Any) -> torch.Tensor:
        """The vector.

        Raises:
            UsageError: Labels that do not fit, or a vector of 0 and 1 where indices are expected.
        """
        try:
            found: torch.Tensor = super().__call__(target)
        except (ValueError, TypeError, RuntimeError) as e:
            raise UsageError(
                f'--task multilabel: the targets of the data set do not fit: {one_line(e)} (got {target!r:.100})'
            ) from e
        # as indices they would be class 0 and class 1 alone, each several times
        if not self.dense and self.num_classes > 2 and len(target) == self.num_classes and set(target) <= {0, 1}:
            raise UsageError(
                f'--task multilabel: an image has the target {target!r:.100}, a vector of 0 and 1: add --target-format multihot'
            )
        return found
