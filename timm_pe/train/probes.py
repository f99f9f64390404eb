"""Measures of frozen features: how well they tell classes apart, and what a loss asks of them that sees them in batches.

The votes of neighbours are those of Wu et al., CVPR 2018 (arXiv 1805.01978): exp(cosine / 0.07) each.
"""

import warnings
from collections.abc import Sequence

import numpy as np
import torch

from ..method.losses import normalize_teacher

NEIGHBOURS = 20
TEMPERATURE = 0.07


def predict(
    query: torch.Tensor, bank: torch.Tensor, labels: torch.Tensor, num_classes: int, neighbours: int
) -> torch.Tensor:
    """Classes `[b]` that the neighbours of each feature vote for.

    Args:
        query: Features `[b, d]` of length 1.
        bank: Features `[n, d]` of length 1 with known labels.
        labels: These labels `[n]`.
        num_classes: c.
        neighbours: k, at most n.
    """
    cosines, nearest = (query @ bank.T).topk(neighbours, dim=1)
    votes = torch.zeros(len(query), num_classes, device=query.device)
    return votes.scatter_add_(1, labels[nearest], (cosines / TEMPERATURE).exp()).argmax(1)


def probe(
    train: tuple[torch.Tensor, torch.Tensor], validation: tuple[torch.Tensor, torch.Tensor]
) -> dict[str, float | None]:
    """Accuracy of simple classifiers on frozen features: fitted on `train`, top-1 in percent on `validation`.

    Args:
        train: Features `[n, d]` and labels `[n]`.
        validation: The same of other images.

    Returns:
        nearest_centroid_top1 and linear_probe_top1 (multinomial logistic regression on standardized features); None if
        `train` has a single class.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.neighbors import NearestCentroid
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    (x, y), (x_val, y_val) = ([t.numpy() for t in split] for split in (train, validation))
    if len(np.unique(y)) < 2:
        return {'nearest_centroid_top1': None, 'linear_probe_top1': None}
    # features the student has trained on separate their classes without bound: keep the weights small
    linear = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=200))
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # constant channels; a fit that has not converged
        return {
            'nearest_centroid_top1': 100 * float(NearestCentroid().fit(x, y).score(x_val, y_val)),
            'linear_probe_top1': 100 * float(linear.fit(x, y).score(x_val, y_val)),
        }


def shuffled_batches(n: int, batch_size: int) -> Sequence[torch.Tensor]:
    """Row numbers in a fixed random order, in batches of almost equal size: at least `batch_size` where there are as many."""
    order = torch.randperm(n, generator=torch.Generator().manual_seed(0))
    return order.tensor_split(max(1, n // batch_size))


def normalize_in_batches(
    feature: torch.Tensor, norm: str, batch_size: int, device: torch.device | None = None
) -> torch.Tensor:
    """`normalize_teacher` over random batches, as in training, of features that may lie class by class.

    Args:
        feature: `[n, m]`.
        norm: See `normalize_teacher`.
        batch_size: That of training.
        device: Where to compute; None means where they are.

    Returns:
        `[n, m]`, where they are.
    """
    if norm == 'none':
        return feature
    normalized = torch.empty_like(feature, dtype=torch.promote_types(feature.dtype, torch.float32))
    for rows in shuffled_batches(len(feature), batch_size):
        normalized[rows] = normalize_teacher(feature[rows].to(device or feature.device), norm).to(normalized)
    return normalized
