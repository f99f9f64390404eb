"""Validation: timm's metrics of a model over a loader, over all ranks."""

import logging
from collections import OrderedDict
from collections.abc import Callable, Generator, Mapping
from contextlib import closing
from typing import Any

import torch
from timm.task import ClassificationEvaluator, MultiLabelClassificationEvaluator, evaluation_sample_limit
from torch.utils.data import IterableDataset

from ..config.flags import LossFlags
from ..config.run_config import RunConfig
from ..data.datasets import count_images
from ..data.epochs import plain_loader
from ..data.unreadable import describe_unreadable, describe_warnings
from ..errors import UsageError
from ..method.weight_files import load_weights, read_state_dict
from ..process.runtime import Runtime
from ..run_folder import RunFolder
from .build import Parts
from .console import Progress, warn_of_tta
from .learnt_classes import check_learnt_classes
from .student import place_student

_logger = logging.getLogger(__name__)

# display names
METRIC_NAMES = {
    'top1': 'top-1',
    'top5': 'top-5',
    'map': 'mAP',
    'loss': 'val loss',
    'knn': 'kNN',
    'linear': 'linear probe',
    'effective_rank': 'effective rank',
}
# metrics that are no percentages, and beginnings of their names
_NUMBERS = ('cosine', 'effective_rank')


def create_evaluator(flags: LossFlags, runtime: Runtime, loader: Any) -> ClassificationEvaluator:
    """timm's evaluator of the task: loss, top-1 and top-5, or mAP and F1 for multi-label data."""
    limit = evaluation_sample_limit(loader)
    if flags.task == 'multilabel':
        threshold = flags.multilabel_threshold
        return MultiLabelClassificationEvaluator(runtime.device, max_samples=limit, threshold=threshold)
    return ClassificationEvaluator(runtime.device, max_samples=limit)


def batch_to_device(config: RunConfig, runtime: Runtime, input: Any, target: Any) -> tuple[Any, Any]:
    """A loader's batch on the run's device, in its dtype and memory format (a prefetcher has done the first two)."""
    if config.no_prefetcher:
        input = _on_device(input, runtime.device, runtime.model_dtype or torch.float32)
        target = target.to(runtime.device)
    if config.channels_last and not isinstance(input, dict):
        input = input.contiguous(memory_format=torch.channels_last)
    return input, target


def _on_device(value: Any, device: torch.device, dtype: torch.dtype | None = None) -> Any:
    if isinstance(value, dict):
        return {k: _on_device(v, device, dtype if k == 'patches' else None) for k, v in value.items()}
    return value.to(device=device, dtype=dtype) if isinstance(value, torch.Tensor) else value


def eval_batches(
    loader: Any, runtime: Runtime, config: RunConfig, what: str, after_batch: Callable[[], None] = lambda: None
) -> Generator[tuple[Any, torch.Tensor, int]]:
    """The batches of a validation loader on the device, with their progress shown, and what was unreadable logged.

    Args:
        loader: Validation loader.
        runtime: Device, ranks, precision.
        config: Run settings.
        what: What the progress is of.
        after_batch: Called after each batch.

    Yields:
        Images `[b, ch, h, w]`, targets, and how many of them count: the others only pad this rank's share.
    """
    left, seen = evaluation_sample_limit(loader), 0
    progress = Progress(what, len(loader), runtime.is_primary)
    try:
        for i, (input, target) in enumerate(loader):
            input, target = batch_to_device(config, runtime, input, target)
            size = len(target) if left is None else min(len(target), left)
            left, seen = None if left is None else left - size, seen + size
            yield input, target, size
            progress.update(i + 1)
            after_batch()
    finally:
        progress.close()
    say_unreadable(loader, len(loader.dataset), runtime)
    if isinstance(plain_loader(loader).dataset, IterableDataset):
        _say_other_number(loader, seen)


def validate(
    model: Callable[[torch.Tensor], Any],
    loader: Any,
    runtime: Runtime,
    config: RunConfig,
    what: str,
    after_batch: Callable[[], None] = lambda: None,
) -> OrderedDict[str, float]:
    """Metrics (in percent) and loss of `model` over a validation loader, over all ranks.

    Args:
        model: Batch `[b, ch, h, w]` -> logits `[b, c]`; a module should be in eval mode.
        loader: See `eval_batches`.
        runtime: Device, ranks, precision.
        config: Run settings.
        what: What the progress is of.
        after_batch: Called after each batch.

    Raises:
        UsageError: Labels that the model has no class for.
    """
    evaluator = create_evaluator(config, runtime, loader)
    # a compiled model (its CUDA graphs, pytorch#135892) or a scripted one that has run under inference mode fails in training
    without_gradients = torch.no_grad if config.torchcompile or config.torchscript else torch.inference_mode
    with closing(eval_batches(loader, runtime, config, what, after_batch)) as batches:
        for i, (input, target, _) in enumerate(batches):  # the evaluator knows how many count
            with without_gradients(), runtime.autocast():
                output = model(input)
            if isinstance(output, (tuple, list)):
                output = output[0]
            if config.tta > 1:
                output = output.unfold(0, config.tta, config.tta).mean(dim=2)
                target = target[:: config.tta][: len(output)]
            if i == 0 and target.ndim == 1 and int(target.max()) >= output.shape[-1]:
                raise UsageError(f'the data has label {int(target.max())}, the model {output.shape[-1]} classes')
            evaluator.update(output, target)
    # each rank has seen the whole of a stream: see read_whole_on_each_rank
    shared = runtime.distributed and not isinstance(plain_loader(loader).dataset, IterableDataset)
    return evaluator.compute(distributed=shared)


def say_unreadable(loader: Any, images: int, runtime: Runtime) -> None:
    """Log how many images of a pass were unreadable or gave a warning, unless the pass before had the same number."""
    for describe in (describe_unreadable, describe_warnings):
        number, said = describe(loader.dataset, images, runtime.gather)
        known = loader.__dict__.setdefault('_said', {})
        if said and known.get(describe) != number:
            _logger.warning(said)
        known[describe] = number


def _say_other_number(loader: Any, images: int) -> None:
    """Log, once, that a stream gave another number of images than its description says: the metrics are of these."""
    described = count_images(loader.dataset)
    if images != described and loader.__dict__.get('_images') != images:
        _logger.warning(
            f'The validation stream gave {images:,} images, not the {described:,} that are described: what is measured is of these.'
        )
    loader.__dict__['_images'] = images


def format_metrics(metrics: Mapping[str, float], num_classes: int) -> str:
    """Metrics on one line, percentages to three places; top-5 is omitted for five classes or fewer."""
    shown = {k: v for k, v in metrics.items() if k != 'loss' and not (k == 'top5' and num_classes <= 5)}
    said = [f'{METRIC_NAMES.get(k, k)} {v:.3f}{"" if k.startswith(_NUMBERS) else " %"}' for k, v in shown.items()]
    return '  '.join([*said, f'val loss {metrics["loss"]:.4f}'])


def evaluate_checkpoint(parts: Parts) -> None:
    """Validate the weights of --evaluate, and log the metrics."""
    config, path = parts.config, parts.config.evaluate
    folder = RunFolder.around(path)
    if folder is not None:
        check_learnt_classes(folder, parts.data.eval.dataset, '--evaluate')
    # the run did not evaluate a moving average that it kept on the CPU
    state_dict = read_state_dict(path, '--evaluate', use_ema=not config.model_ema_force_cpu)
    load_weights(parts.student, state_dict, '--evaluate', path)
    student = place_student(parts.student, config, parts.runtime).eval()
    warn_of_tta(config)
    metrics = validate(student, parts.data.eval, parts.runtime, config, 'Evaluate')
    images = parts.data.eval.__dict__.get('_images', count_images(parts.data.eval.dataset))
    _logger.info(f"'{path}': {format_metrics(metrics, parts.num_classes)} on {images} images.")
