"""Checks of a data set's labels, before and as they are read; each error is one line, in a loader process too."""

from typing import Any

import torch
from timm.data.target_transforms import MultiLabelTarget

from ..errors import UsageError, one_line


class ClassTarget:
    """Checks an image's single label, for data sets whose labels are not the names of folders.

    Args:
        num_classes: Classes of the student.
    """

    def __init__(self, num_classes: int):
        self.num_classes = num_classes

    def __call__(self, target: Any) -> int:
        """The label as an int.

        Raises:
            UsageError: It is not a single label, or the student has no such class.
        """
        try:
            label = int(target)
            if label != float(target):
                raise ValueError('not a whole number')
        except (TypeError, ValueError) as e:
            raise UsageError(
                f'an image has the target {target!r:.100}, not one label: --task multilabel takes several, --target-key '
                f'another column, --class-map numbers names'
            ) from e
        if label < 0:
            raise UsageError(
                f'the data has label {label}, which is no class: --train-split or --val-split without labels?'
            )
        if label >= self.num_classes:
            raise UsageError(f'the data has label {label}, the student {self.num_classes} classes: see --num-classes')
        return label


class MultiLabelTargets(MultiLabelTarget):
    """timm's multi-hot vector `[c]` of an image's labels, with errors as `UsageError`.

    Args:
        num_classes: c, the classes of the student.
        dense: Whether targets already are vectors of 0 and 1, not class indices.
    """

    def __call__(self, target: Any) -> torch.Tensor:
        """The vector.

        Raises:
            UsageError: Labels that do not fit, or a vector of 0 and 1 instead of indices.
        """
        try:
            found: torch.Tensor = super().__call__(target)
        except (ValueError, TypeError, RuntimeError) as e:
            raise UsageError(
                f'--task multilabel: the targets of the data set do not fit: {one_line(e)} (got {target!r:.100})'
            ) from e
        # read as indices, they would name only classes 0 and 1, several times
        values = torch.as_tensor(target)
        if not self.dense and self.num_classes > 2 and len(values) == self.num_classes and int(values.max()) <= 1:
            raise UsageError(
                f'--task multilabel: an image has the target {target!r:.100}, a vector of 0 and 1: add --target-format multihot'
            )
        return found


def check_columns(dataset: Any, num_classes: int | None) -> None:
    """Check the columns of a map-style Hugging Face data set, whose images need not be read for that.

    Args:
        dataset: The data set; others are left as they are.
        num_classes: Classes of the student, None for targets that are not one label.

    Raises:
        UsageError: There is no such column, an image or a label is missing, or a label is no class.
    """
    reader = getattr(dataset, 'reader', None)
    table: Any = getattr(reader, 'dataset', None)
    if reader is None or not hasattr(table, 'column_names') or table._indices is not None:
        return
    columns, where = table.column_names, f"split '{reader.split}' of the data"
    images, label = reader.image_key, reader.label_key
    missing = table.data.column(images).null_count
    if missing:
        others = ', '.join(name for name in columns if name != images)
        raise UsageError(
            f"{where} has no image in {missing} of {len(table)} rows, column '{images}': --input-key names another column "
            f'(of {others}), or leave those rows out'
        )
    if num_classes is None or reader.target_keys or '/' in label:
        return
    if label not in columns:
        raise UsageError(f"{where} has no column '{label}' but {', '.join(columns)}: --target-key names another one")
    labels = table.data.column(label)
    if labels.null_count:
        raise UsageError(f"{where} has no label in {labels.null_count} of {len(table)} rows, column '{label}'")
    if reader.remap_class or labels.type.num_fields:  # names, or lists: checked as they are read
        return
    for value in labels.unique().to_pylist():
        try:
            ClassTarget(num_classes)(value)
        except UsageError as e:
            raise UsageError(f'{where}: {e}') from e
