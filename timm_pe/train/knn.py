"""Weighted k-nearest-neighbour top-1 of features on labelled images: how well they tell classes apart, without training.

As in Wu et al., CVPR 2018 (arXiv 1805.01978): the neighbours among the training images vote with exp(cosine / 0.07).
"""

from collections.abc import Callable, Iterator, Sized
from typing import cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from timm.task import evaluation_sample_limit

from ..data.datasets import count_classes
from ..data.knn_data import open_knn_data
from ..data.loaders import check_ranks, create_eval_loader
from .build import Parts
from .console import Progress
from .evaluate import batch_to_device, say_unreadable

NEIGHBOURS = 20
TEMPERATURE = 0.07

Forward = Callable[[torch.Tensor], torch.Tensor]


class Knn:
    """The kNN top-1 of a network's features on the images of --knn-data.

    Args:
        parts: The run's parts.

    Attributes:
        neighbours: k, 20 or the number of training images.
        num_classes: Classes of the images.

    Raises:
        UsageError: See `open_knn_data`.
    """

    def __init__(self, parts: Parts):
        config, runtime, data = parts.config, parts.runtime, parts.data
        self.config, self.runtime = config, runtime
        train, evaluation = open_knn_data(config, data.config['input_size'][0])
        check_ranks((train, evaluation), runtime)
        self.num_classes = count_classes(train) or 0
        self.loaders = {
            'train': create_eval_loader(config, train, data.config, runtime),
            'validation': create_eval_loader(config, evaluation, data.config, runtime),
        }
        self.neighbours = min(NEIGHBOURS, len(cast(Sized, train)))

    @torch.no_grad()
    def __call__(self, forward: Forward, what: str, after_batch: Callable[[], None] = lambda: None) -> float:
        """Top-1 in percent, over all ranks.

        Args:
            forward: Batch `[b, ch, h, w]` -> features `[b, d]`.
            what: Whose features they are, for the progress.
            after_batch: Called after each batch.
        """
        found = list(self._features(forward, 'train', what, after_batch))
        bank, labels = (self._of_all_ranks(torch.cat(parts)) for parts in zip(*found, strict=True))
        counts, images = torch.zeros(2, device=self.runtime.device), 0
        for feature, target in self._features(forward, 'validation', what, after_batch):
            predicted = predict(feature, bank, labels, self.num_classes, self.neighbours)
            counts[0] += (predicted == target).sum()
            images += len(target)
        counts[1] = images
        if self.runtime.distributed:
            dist.all_reduce(counts)
        right, of_all = counts.tolist()
        return 100 * right / of_all

    def describe(self) -> str:
        """k and the images, in words."""
        images = [len(self.loaders[split].dataset) for split in ('train', 'validation')]
        return f"{self.neighbours}-nearest-neighbour top-1 on '{self.config.knn_data}' ({images[0]} and {images[1]} images)"

    def _features(
        self, forward: Forward, split: str, what: str, after_batch: Callable[[], None]
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Normalized features `[b, d]` and labels `[b]` of this rank's share of a split, without what only pads it."""
        loader = self.loaders[split]
        left = evaluation_sample_limit(loader)
        progress = Progress(f'{what} kNN {split}', len(loader), self.runtime.is_primary)
        try:
            for i, (input, target) in enumerate(loader):
                input, target = batch_to_device(self.config, self.runtime, input, target)
                with self.runtime.autocast():
                    feature = forward(input)
                size = len(target) if left is None else min(len(target), left)
                left = None if left is None else left - size
                yield F.normalize(feature[:size].float(), dim=1), target[:size]
                progress.update(i + 1)
                after_batch()
        finally:
            progress.close()
        say_unreadable(loader, len(loader.dataset), self.runtime)

    def _of_all_ranks(self, own: torch.Tensor) -> torch.Tensor:
        """The rows of all ranks, whose numbers may differ."""
        if not self.runtime.distributed:
            return own
        numbers = self.runtime.gather(len(own))
        padded = own.new_zeros(max(numbers), *own.shape[1:])
        padded[: len(own)] = own
        ranks = [torch.empty_like(padded) for _ in numbers]
        dist.all_gather(ranks, padded)
        return torch.cat([rows[:number] for rows, number in zip(ranks, numbers, strict=True)])


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
