"""Classifiers on frozen features: how well these tell classes apart.

The votes of neighbours are those of Wu et al., CVPR 2018 (arXiv 1805.01978): exp(cosine / 0.07) each.
"""

import warnings

import numpy as np
import torch

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
