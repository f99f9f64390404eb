"""The task loss: the loss of labels that the flags ask for, with its weights of classes."""

import os

import torch
import torch.distributed as dist
import torch.nn as nn
from timm.loss import create_classification_loss
from timm.loss.class_weights import load_class_stats, resolve_class_weights

from ..config.derive import label_smoothing, mixing_active
from ..config.flags import LossFlags
from ..config.rules import loss_type
from ..config.run_config import RunConfig
from ..data.draws import LabeledTarget
from ..errors import UsageError, one_line


class LabeledLoss(nn.Module):
    """A task loss of the labelled images of a batch that has others too; without any it is 0.

    The batch is that of all ranks. Each rank weighs its mean by its number of labelled images, so that the mean of the
    ranks, which is what DDP makes of their gradients, is the mean over all labelled images.

    Args:
        criterion: The loss of logits `[l, c]` and labels `[l]`.
        world_size: Number of ranks; all of them must call it.

    Attributes:
        images: Number of labelled images in the last batch, of all ranks.
    """

    def __init__(self, criterion: nn.Module, world_size: int = 1):
        super().__init__()
        self.criterion, self.world_size = criterion, world_size
        self.images: int | torch.Tensor = 0

    def forward(self, logits: torch.Tensor, target: LabeledTarget) -> torch.Tensor:
        """The loss of logits `[b, c]` of all images."""
        own = self.images = len(target.rows)
        if self.world_size > 1:
            self.images = torch.full((), float(own), device=logits.device)
            dist.all_reduce(self.images)
        if not own:
            return logits.sum() * 0.0  # the classifier gets a gradient of zeros: DDP waits for one
        loss: torch.Tensor = self.criterion(logits.index_select(0, target.rows), target.target)
        return loss if self.world_size == 1 else loss * (own * self.world_size / self.images)


def create_task_loss(config: RunConfig, num_classes: int, world_size: int) -> nn.Module:
    """The loss of labels that the flags ask for; beside images without labels that of those that have some."""
    criterion = _create_criterion(config, num_classes)
    return LabeledLoss(criterion, world_size) if config.unlabeled else criterion


def check_loss_weights(flags: LossFlags, num_classes: int | None) -> None:
    """Refuse weights and counts of the task loss that can't be read or don't match `num_classes` (None: not checked).

    Raises:
        UsageError: The message has the flag, and both numbers.
    """
    _load_loss_weights(flags, num_classes)


def _load_loss_weights(
    flags: LossFlags, num_classes: int | None
) -> tuple[tuple[torch.Tensor, int] | None, dict[str, float | torch.Tensor | None]]:
    """Counts of --class-stats, and weights by timm's names for them."""
    if flags.class_stats and not os.path.isfile(flags.class_stats):
        raise UsageError(f"--class-stats: no file '{flags.class_stats}'")
    try:
        stats = load_class_stats(flags.class_stats)
    except (ValueError, TypeError, OSError) as e:
        raise UsageError(f"--class-stats: cannot read '{flags.class_stats}' ({one_line(e)})") from e
    if stats is not None:
        _check_number('--class-stats', stats[0], num_classes)
    bce = flags.loss_pos_weight is None
    weights: dict[str, float | torch.Tensor | None] = {}
    for kind, flag, given in (
        (
            'pos_weight',
            '--bce-pos-weight' if bce else '--loss-pos-weight',
            flags.bce_pos_weight if bce else flags.loss_pos_weight,
        ),
        ('class_weight', '--loss-class-weight', flags.loss_class_weight),
    ):
        try:
            weights[kind] = resolve_class_weights(
                given,
                kind,
                stats,
                power=flags.loss_weight_power,
                beta=flags.loss_weight_beta,
                max_weight=flags.loss_weight_max,
            )
        except (ValueError, TypeError, OSError) as e:
            if 'could not convert' in str(e) and not os.path.exists(str(given)):
                raise UsageError(f"{flag}: no file '{given}', and no numbers") from e
            raise UsageError(f'{flag}: {one_line(e)}') from e
        _check_number(flag, weights[kind], num_classes)
    return stats, weights


def _check_number(flag: str, values: float | torch.Tensor | None, num_classes: int | None) -> None:
    if isinstance(values, torch.Tensor) and num_classes is not None and len(values) != num_classes:
        raise UsageError(f'{flag} has {len(values)} values, the student has {num_classes} classes: give one for each')


def _create_criterion(config: RunConfig, num_classes: int) -> nn.Module:
    stats, weights = _load_loss_weights(config, num_classes)
    counts, number = stats if stats is not None and loss_type(config) == 'db' else (None, None)
    try:
        return create_classification_loss(
            loss_type(config),
            multi_label=config.task == 'multilabel',
            smoothing=label_smoothing(config),
            soft_targets=mixing_active(config),
            bce_target_thresh=config.bce_target_thresh,
            bce_sum=config.bce_sum,
            asl_gamma_pos=config.asl_gamma_pos,
            asl_gamma_neg=config.asl_gamma_neg,
            asl_clip=config.asl_clip,
            asl_reduction=config.asl_reduction,
            poly_epsilon=config.poly_epsilon,
            poly_gamma=config.poly_gamma,
            poly_alpha=config.poly_alpha,
            jsd_splits=config.aug_splits,
            twoway_tp=config.twoway_tp,
            twoway_tn=config.twoway_tn,
            class_counts=counts,
            num_samples=number,
            db_neg_scale=config.db_neg_scale,
            db_init_bias=config.db_init_bias,
            db_focal_gamma=config.db_focal_gamma,
            **weights,
        )
    except (ValueError, TypeError, OSError) as e:
        raise UsageError(f'task loss: {one_line(e)}') from e
