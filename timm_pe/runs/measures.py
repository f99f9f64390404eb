"""Measures of what a student has learned, computed from features, logits and projectors, whatever their origin."""

import math
from typing import Any, cast

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.utils import accuracy

from ..method.projectors import ProjectorEnsemble
from ..train.probes import normalize_in_batches, shuffled_batches

# the same for each run, whatever it was trained with
CKA_BATCH = 256
ECE_BINS = 15


def top_k(logits: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
    """Top-1 and top-5 accuracy in percent and mean cross-entropy of logits `[n, c]`."""
    top1, top5 = accuracy(logits, labels, topk=(1, 5))
    return {'top1': float(top1), 'top5': float(top5), 'loss': F.cross_entropy(logits, labels).item()}


def agreement(a: torch.Tensor, b: torch.Tensor) -> float:
    """Percent of images for which two logits `[n, c]` name the same class."""
    return 100 * (a.argmax(1) == b.argmax(1)).float().mean().item()


def mean_cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    """Mean over rows of the cosine between `[n, d]` and `[n, d]`; a zero row counts as 0."""
    return F.cosine_similarity(a, b, dim=1).mean().item()


def hsic1(gram_x: torch.Tensor, gram_y: torch.Tensor) -> torch.Tensor:
    """Unbiased estimator of HSIC (Nguyen, Raghu, Kornblith, arXiv 2010.15327, eq. 3).

    Args:
        gram_x: Gram matrix `[n, n]`, n > 3.
        gram_y: Gram matrix `[n, n]` of the same n samples.

    Returns:
        A scalar. Its expectation is 0 if the two are independent, so single values can be negative.
    """
    n = len(gram_x)
    x, y = (gram - gram.diagonal().diag() for gram in (gram_x, gram_y))
    sum_x, sum_y = x.sum(1), y.sum(1)
    total = (x * y).sum() + sum_x.sum() * sum_y.sum() / ((n - 1) * (n - 2)) - 2 / (n - 2) * (sum_x @ sum_y)
    return total / (n * (n - 3))


def linear_cka(x: torch.Tensor, y: torch.Tensor, batch_size: int = CKA_BATCH) -> float:
    """Linear CKA in minibatches (Nguyen, Raghu, Kornblith, arXiv 2010.15327, eq. 2): how alike two feature spaces are.

    Numerator and denominators are averaged over the batches separately, which makes the value independent of the batch
    size in expectation. The batches are drawn with a fixed seed: data sets are sorted by class.

    Args:
        x: Features `[n, d]`.
        y: Features `[n, m]` of the same images.
        batch_size: Images in a batch, 4 or more.

    Returns:
        About 0 (unrelated) to 1 (equal up to rotation and scale); NaN for fewer than 4 images or a constant feature.
    """
    if len(x) < 4:
        return math.nan
    mean_x, mean_y = (f.mean(0, dtype=torch.float64) for f in (x, y))  # changes nothing but the rounding
    sums = torch.zeros(3, dtype=torch.float64)
    for rows in shuffled_batches(len(x), batch_size):
        a, b = x[rows] - mean_x, y[rows] - mean_y
        a, b = a @ a.T, b @ b.T
        sums += torch.stack([hsic1(a, b), hsic1(a, a), hsic1(b, b)])
    cross, own_x, own_y = sums.tolist()
    return cross / math.sqrt(own_x * own_y) if own_x > 0 and own_y > 0 else math.nan


def class_statistics(feature: torch.Tensor, labels: torch.Tensor) -> tuple[dict[str, float], torch.Tensor]:
    """How far classes lie apart in a feature space.

    within_scatter is the mean squared distance of a feature to the mean of its class, between_scatter that of the class
    means (weighted by their images) to the mean of all: the traces of the two matrices of Fisher's discriminant. Cosines
    between the means of classes are centred (the mean of all taken off); as centred means sum up to about 0, their mean
    cosine is -1 / (c - 1) if classes are as far apart as possible.

    Args:
        feature: `[n, d]`.
        labels: `[n]`.

    Returns:
        The numbers, and the matrix `[c, c]` of centred cosines between the classes that occur.
    """
    feature = feature.double()
    classes, index, counts = labels.unique(return_inverse=True, return_counts=True)
    means = torch.zeros(len(classes), feature.shape[1], dtype=feature.dtype).index_add_(0, index, feature)
    means /= counts[:, None]
    within = (feature - means[index]).square().sum(1).mean().item()
    centred = means - feature.mean(0)
    between = (counts / len(labels) * centred.square().sum(1)).sum().item()
    cosine = _cosine_matrix(centred)
    numbers = {
        'within_scatter': within,
        'between_scatter': between,
        'between_over_within': between / within if within > 0 else math.nan,
        'between_class_cosine': mean_off_diagonal(cosine),
        'between_class_cosine_raw': mean_off_diagonal(_cosine_matrix(means)),
    }
    return numbers, cosine


def _cosine_matrix(x: torch.Tensor) -> torch.Tensor:
    x = F.normalize(x, dim=-1)
    return x @ x.T


def mean_off_diagonal(matrix: torch.Tensor) -> float:
    """Mean of a square matrix without its diagonal; NaN for a single row."""
    q = len(matrix)
    return ((matrix.sum() - matrix.trace()) / (q * (q - 1))).item() if q > 1 else math.nan


def calibration(logits: torch.Tensor, labels: torch.Tensor) -> dict[str, Any]:
    """Calibration: are 80 of 100 predictions with confidence 80 % right? (Guo et al., arXiv 1706.04599, eq. 3)

    Args:
        logits: `[n, c]`.
        labels: `[n]`.

    Returns:
        ece, mean_confidence, accuracy, all in [0, 1], and the 15 bins, equally wide in confidence; an empty bin has
        neither confidence nor accuracy.
    """
    confidence, predicted = logits.softmax(1).max(1)
    correct = (predicted == labels).double()
    index = (torch.bucketize(confidence, torch.linspace(0, 1, ECE_BINS + 1), right=True) - 1).clamp(max=ECE_BINS - 1)
    counts, confidences, corrects = (
        torch.bincount(index, weights, minlength=ECE_BINS) for weights in (None, confidence.double(), correct)
    )
    bins = [
        {
            'low': i / ECE_BINS,
            'high': (i + 1) / ECE_BINS,
            'count': n,
            'confidence': of_confidence / n if n else None,
            'accuracy': of_correct / n if n else None,
        }
        for i, (n, of_confidence, of_correct) in enumerate(
            zip(counts.tolist(), confidences.tolist(), corrects.tolist(), strict=True)
        )
    ]
    return {
        'ece': (confidences - corrects).abs().sum().item() / len(labels),
        'mean_confidence': confidence.mean().item(),
        'accuracy': correct.mean().item(),
        'bins': bins,
    }


@torch.inference_mode()
def projector_cosines(
    projection: ProjectorEnsemble,
    feature: torch.Tensor,
    aim: torch.Tensor,
    teacher_norm: str = 'none',
    batch_size: int = CKA_BATCH,
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Cosines of the projectors' outputs with one another and with the teacher's feature, mean over images.

    Args:
        projection: The projectors, in eval mode.
        feature: The student's feature `[n, d]`.
        aim: The teacher's feature `[n, m]`.
        teacher_norm: How the loss normalized it, see `losses.normalize_teacher`.
        batch_size: Images in a batch; the norms 'batch' and 'whiten' depend on it, so take that of training.

    Returns:
        Cosines between projectors `[q, q]`, of each with the teacher `[q]`, of their mean with the teacher.
    """
    device = next((p.device for p in projection.parameters()), feature.device)
    q, ensemble = projection.num_projectors, 0.0
    between, single = torch.zeros(q, q), torch.zeros(q)
    aim = normalize_in_batches(aim, teacher_norm, batch_size, device)
    for rows in shuffled_batches(len(feature), batch_size):
        outputs = projection.project(feature[rows].to(device)).float()
        target = F.normalize(aim[rows].to(device), dim=1)
        units = F.normalize(outputs, dim=2)
        between += torch.einsum('nqm,nrm->qr', units, units).cpu()
        single += torch.einsum('nqm,nm->q', units, target).cpu()
        ensemble += F.cosine_similarity(outputs.mean(1), target, dim=1).sum().item()
    n = len(feature)
    return between / n, single / n, ensemble / n


def weight_cosine(projection: ProjectorEnsemble) -> float:
    """Mean cosine between the flattened weights of linear projectors; NaN for another kind, and for a single one."""
    if projection.projector != 'linear':
        return math.nan
    weight = cast(nn.Linear, projection.projectors.fc).weight.detach().double()
    return mean_off_diagonal(_cosine_matrix(weight.view(projection.num_projectors, -1).cpu()))
