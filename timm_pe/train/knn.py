"""How well features tell the classes of labelled images apart: by their nearest neighbours, and by a linear probe."""

import importlib.util
import logging
from collections.abc import Callable, Iterator, Sized
from typing import cast

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

from ..data.datasets import count_classes
from ..data.knn_data import open_knn_data
from ..data.loaders import check_ranks, create_eval_loader
from .build import Parts
from .evaluate import eval_batches
from .probes import NEIGHBOURS, predict, probe

_logger = logging.getLogger(__name__)

# training images that a linear probe is fitted on, at most
_PROBED = 5000
Forward = Callable[[torch.Tensor], torch.Tensor]


class Knn:
    """The kNN top-1 of a network's features on the images of --knn-data, and that of a linear probe.

    Args:
        parts: The run's parts.

    Attributes:
        neighbours: k, 20 or the number of training images.
        probes: Whether scikit-learn is there, which fits a linear probe.
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
        self.probes = importlib.util.find_spec('sklearn') is not None

    @torch.no_grad()
    def __call__(
        self, forward: Forward, what: str, after_batch: Callable[[], None] = lambda: None, linear: bool = False
    ) -> dict[str, float]:
        """Top-1 in percent, over all ranks.

        Args:
            forward: Batch `[b, ch, h, w]` -> features `[b, d]`.
            what: Whose features they are, for the progress.
            after_batch: Called after each batch.
            linear: Fit a linear probe too, on up to 5,000 training images, if `probes`.

        Returns:
            'knn', and 'linear' if it was fitted.
        """
        found = list(self._features(forward, 'train', what, after_batch))
        bank, labels = (self._of_all_ranks(torch.cat(parts)) for parts in zip(*found, strict=True))
        del found
        linear = linear and self.probes
        chosen = np.sort(np.random.default_rng(0).permutation(len(labels))[: _PROBED if linear else 0])
        fitted = bank[chosen].cpu(), labels[chosen].cpu()
        bank = F.normalize(bank, dim=1, out=bank)
        counts, images = torch.zeros(2, device=self.runtime.device), 0
        queries = []
        for feature, target in self._features(forward, 'validation', what, after_batch):
            predicted = predict(F.normalize(feature, dim=1), bank, labels, self.num_classes, self.neighbours)
            counts[0] += (predicted == target).sum()
            images += len(target)
            if linear:
                queries.append((feature, target))
        counts[1] = images
        if self.runtime.distributed:
            dist.all_reduce(counts)
        right, of_all = counts.tolist()
        scores = {'knn': 100 * right / of_all}
        if linear:
            asked = [self._of_all_ranks(torch.cat(parts)).cpu() for parts in zip(*queries, strict=True)]
            top1 = self._probe(fitted, (asked[0], asked[1]))
            scores |= {} if top1 is None else {'linear': top1}
        return scores

    def _probe(
        self, train: tuple[torch.Tensor, torch.Tensor], queries: tuple[torch.Tensor, torch.Tensor]
    ) -> float | None:
        """Top-1 of a linear probe, which rank 0 fits; None for features that are not finite."""
        finite = bool(train[0].isfinite().all() and queries[0].isfinite().all())
        if not finite and self.runtime.is_primary:
            _logger.warning('No linear probe: there are features that are not finite.')
        found = probe(train, queries)['linear_probe_top1'] if finite and self.runtime.is_primary else None
        return self.runtime.share(found)

    def describe(self) -> str:
        """k and the images, in words."""
        images = [len(self.loaders[split].dataset) for split in ('train', 'validation')]
        return f"{self.neighbours}-nearest-neighbour top-1 on '{self.config.knn_data}' ({images[0]} and {images[1]} images)"

    def _features(
        self, forward: Forward, split: str, what: str, after_batch: Callable[[], None]
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Features `[b, d]` in float32 and labels `[b]` of this rank's share of a split, without what only pads it."""
        batches = eval_batches(self.loaders[split], self.runtime, self.config, f'{what} kNN {split}', after_batch)
        for input, target, size in batches:
            with self.runtime.autocast():
                feature = forward(input)
            yield feature[:size].float(), target[:size]

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
