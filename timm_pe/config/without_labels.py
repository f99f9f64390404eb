"""Rules of a run without labels: which flags cannot work there, and why."""

from collections.abc import Callable
from typing import TYPE_CHECKING, NoReturn

from .declare import declared_in, name_of
from .flags import LossFlags

if TYPE_CHECKING:
    from .run_config import RunConfig

# metrics that can name the best epoch
METRICS: tuple[str, ...] = ('cosine', 'loss')

_MIXES = 'mixes labels'
_OF_CLASSIFIER = 'is about a classifier, which a student without labels does not have'
_OF_DATA_SET = 'is about a labelled data set'
# flags that do not work without labels; those of LossFlags do not either
_REASONS = {
    **dict.fromkeys(('mixup', 'cutmix', 'cutmix_minmax'), _MIXES),
    'kd_loss_weight': 'compares logits, and a student without labels has no classifier that gives some',
    'task_loss_weight': 'weighs a loss of labels',
    'unlabeled_ratio': 'is a ratio to labelled images',
    **dict.fromkeys(('num_classes', 'head_init_scale', 'head_init_bias', 'drop'), _OF_CLASSIFIER),
    'tta': 'averages logits, and a student without labels has no classifier that gives some',
    **dict.fromkeys(
        ('train_split', 'val_split', 'train_num_samples', 'val_num_samples', 'epoch_repeats', 'dataset_download'),
        _OF_DATA_SET,
    ),
    **dict.fromkeys(
        ('class_map', 'class_depth', 'input_key', 'target_key', 'target_format', 'dataset_trust_remote_code'),
        _OF_DATA_SET,
    ),
}

# likewise where there are labelled images too
_BESIDE = {
    **dict.fromkeys(('mixup', 'cutmix', 'cutmix_minmax'), 'mixes labels, also with images that have none'),
    'dataset': 'names a data set that is not a folder of class folders',
    'task': 'reads labels of another kind than folders have',
    'val_fraction': 'holds images out for a validation, and the data folder has its own',
    'aug_repeats': 'gives images to ranks in its own order',
    'train_img_sizes': 'makes batches of its own',
}


def check_without_labels(config: 'RunConfig', refuse: Callable[[str], NoReturn]) -> None:
    """Refuse flags that do not go with --unlabeled.

    Args:
        config: The settings, defaults included.
        refuse: Reports the error and does not return.
    """
    if not config.unlabeled:
        return
    if config.has_labels:
        for name, reason in _BESIDE.items():
            if config.is_given(name):
                refuse(f'{name_of(name)} {reason}: leave it out with --unlabeled next to a data folder')
        return
    if config.evaluate:
        refuse('--evaluate measures a classifier on labelled images, --unlabeled has none: give a labelled data folder')
    for name in (*_REASONS, *declared_in(LossFlags)):
        if config.is_given(name):
            reason = _REASONS.get(name, 'is about a loss of labels')
            _refuse_flag(name_of(name), reason, refuse)
    if 'num_classes' in config.model_kwargs:
        _refuse_flag('--model-kwargs num_classes', _OF_CLASSIFIER, refuse)
    if config.pe_target == 'logits':
        _refuse_flag('--pe-target logits', 'maps logits, and a student without labels has none', refuse)
    if config.clip_grad is not None and config.clip_mode == 'agc':
        _refuse_flag(
            '--clip-mode agc', 'leaves out the classifier, which a student without labels does not have', refuse
        )


def _refuse_flag(flag: str, reason: str, refuse: Callable[[str], NoReturn]) -> NoReturn:
    refuse(f'{flag} {reason}: leave it out with --unlabeled, or give a labelled data folder in its place')
