"""All flags, one line each, in the groups that functions read. timm's keep their names, types, defaults, meanings."""

from dataclasses import dataclass
from typing import Any

from ..method.names import FEATURE_LOSSES, PROJECTORS, TARGETS, TEACHER_NORM_NAMES
from .declare import Each, flag, switch

# timm.loss.LOSS_TYPES, which would import torch
LOSS_TYPES = ('ce', 'bce', 'asl', 'poly', 'jsd', 'twoway', 'zlpr', 'db')
DTYPES = (None, 'float32', 'bfloat16', 'float16')
INTERPOLATIONS = ('', 'nearest', 'bilinear', 'bicubic', 'box', 'hamming', 'lanczos')
# larger values are taken for typing errors, which would fill the memory
MAX_SIDE, MAX_PROJECTORS, MAX_WORKERS = 16384, 1024, 1024

# flags of which one must be on for others to have an effect
_MIXING = ('mixup', 'cutmix', 'cutmix_minmax')
_CYCLIC = ('sched=cosine', 'sched=tanh', 'sched=poly')
_WEIGHTED = ('loss_pos_weight', 'loss_class_weight')

# a flag is a line
# fmt: off


@dataclass(frozen=True, kw_only=True)
class TeacherFlags:
    """Teacher."""

    teacher: Each[str | None] = flag(None, "the teacher: a timm name, 'hf-hub:OWNER/NAME' or 'local-dir:FOLDER'. Several names: all of them teach the student; --teacher-checkpoint then takes one path for each, and --teacher-num-classes, --teacher-input-size, --teacher-dtype and --teacher-tap one value for all or one for each ('-' keeps the default)", metavar='NAME', each=True, added=True)
    teacher_pretrained: bool = switch("without --teacher-checkpoint: load the weights that belong to the teacher's name, or leave the teacher random", needs='teacher', added=True, default=True, off='no')
    teacher_checkpoint: Each[str | None] = flag(None, 'weights of the teacher: a file (.safetensors, .pth, .pth.tar) or a run folder; nothing is downloaded then', metavar='PATH', needs='teacher', each=True, added=True)
    teacher_eval: bool = switch("validate the teacher before the first epoch, where its classes are the student's", needs='teacher', added=True, default=True, off='no')
    teacher_ema: bool = switch('prefer the moving average in --teacher-checkpoint, where the file has one', needs='teacher', idle_without='teacher_checkpoint', added=True, default=True, off='no')
    teacher_num_classes: Each[int | None] = flag(None, 'classes of the teacher', metavar='N', unset="the checkpoint's, or what belongs to its name", at_least=0, needs='teacher', each=True, added=True)
    teacher_input_size: Each[int | None] = flag(None, 'side in pixels that the teacher sees (bicubic)', metavar='N', unset="the student's where its architecture can take it, or be built for it in whole patches, else its own", at_least=1, at_most=MAX_SIDE, needs='teacher', each=True, added=True)
    teacher_mean: Each[list[float] | None] = flag(None, 'mean the teacher was trained with', metavar='R', unset='that of its run folder, or what belongs to its name', needs='teacher', each=True, added=True)
    teacher_std: Each[list[float] | None] = flag(None, 'standard deviation the teacher was trained with', metavar='R', unset='that of its run folder, or what belongs to its name', above=0, needs='teacher', each=True, added=True)
    teacher_dtype: Each[str | None] = flag('auto', "precision of the teacher; 'auto' is bfloat16 where the device is fast in it and the teacher's outputs on the first batch keep a cosine above 0.999 to float32, else float32, under the student's AMP", allowed=('auto', *DTYPES), needs='teacher', each=True, added=True)
    teacher_kwargs: Each[dict[str, Any]] = flag({}, "more arguments of the teacher's architecture, k=v ...", needs='teacher', each=True, added=True)
    teacher_tap: Each[str | None] = flag(None, "module whose input is the teacher's feature", metavar='PATH', unset='the classifier', needs='teacher', each=True, added=True)
    teacher_fold: bool = switch("fold the teacher's batch norms into the layers before them, where that is exact to rounding", needs='teacher', added=True, default=True, off='no')
    teacher_weights: list[float] | None = flag(None, 'how much each of several teachers counts, in any scale', metavar='R', unset='all alike', above=0, needs='teacher', added=True)
    teacher_drop: float = flag(0.0, "with several teachers: for each image, drop the loss of each teacher with this probability, except the largest one (UNIC, arXiv 2408.05088)", metavar='P', share=True, needs='teacher', added=True)


@dataclass(frozen=True, kw_only=True)
class CacheFlags:
    """Cache of the teacher."""

    teacher_cache: str | None = flag(None, "keep what the teacher says of each training image in this folder, and read it from there; timm-pe precompute fills it ahead", metavar='DIR', needs='teacher', added=True)
    teacher_cache_views: int = flag(1, 'augmented views of each image in the cache: epoch e trains on view e mod K, so give more than one', metavar='K', at_least=1, needs='teacher_cache', added=True)


@dataclass(frozen=True, kw_only=True)
class ProjectorFlags:
    """Distillation with teacher and projector ensemble."""

    student_tap: str | None = flag(None, "module whose input is the student's feature", metavar='PATH', unset='the classifier', needs='teacher', added=True)
    pe_projectors: int = flag(3, 'number of projectors; the kind identity has none', metavar='Q', at_least=1, at_most=MAX_PROJECTORS, needs='teacher', added=True)
    pe_projector: str = flag('linear', 'kind of projector', metavar='NAME', choices=PROJECTORS, needs='teacher', added=True)
    pe_act: str = flag('auto', "activation of the projectors: 'relu', 'none', or 'auto', which is 'relu' exactly when the teacher's features on the first batch, after --pe-teacher-norm, are all >= 0", choices=('auto', 'relu', 'none'), needs='teacher', added=True)
    pe_loss: str | None = flag(None, 'loss between projection and target', metavar='NAME', choices=FEATURE_LOSSES, unset="'direction' for features, 'kl' for logits", needs='teacher', added=True)
    pe_target: str = flag('feature', "what the projectors map to the teacher's: the student's 'feature', or its 'logits' (kd1proj, arXiv 2310.17183)", choices=tuple(TARGETS), needs='teacher', added=True)
    pe_teacher_norm: str = flag('none', "normalization of the teacher's feature before the loss; batch and whiten are over the batch of one rank, whiten waits for the device in each step", metavar='NAME', choices=TEACHER_NORM_NAMES, needs='teacher', added=True)
    pe_map_weight: float = flag(0.0, 'weight of a cosine (direction) loss between the last feature maps or patch tokens of student and teacher, position by position, with separate projectors', metavar='R', at_least=0, needs='teacher', added=True)
    kd_loss_weight: float = flag(0.0, 'weight of plain logit distillation next to the projectors; needs equal classes', metavar='R', at_least=0, needs='teacher', added=True)
    distill_loss_weight: float | None = flag(None, 'weight of the distillation loss', unset='with --teacher 25, for --pe-target logits 0.9', at_least=0, needs=('teacher', 'kd_model_name'))
    task_loss_weight: float | None = flag(None, 'weight of the task loss', unset='with --teacher 1, for --pe-target logits 0.1', at_least=0, needs=('teacher', 'kd_model_name'))
    kd_temperature: float = flag(4.0, 'temperature of logit distillation', metavar='T', needs=('teacher', 'kd_model_name'))


@dataclass(frozen=True, kw_only=True)
class DataFlags:
    """Data."""

    data: str | None = flag(None, 'folder of the data set, as --data-dir', metavar='DIR', positional=True)
    data_dir: str | None = flag(None, 'folder of the data set', metavar='DIR')
    dataset: str = flag('', "data set as TYPE/NAME; 'sklearn/digits' is built in", metavar='NAME', unset='an image folder or tar')
    train_split: str = flag('train', 'training split', metavar='NAME')
    val_split: str = flag('validation', 'validation split', metavar='NAME')
    train_num_samples: int | None = flag(None, 'images in the training split, where a stream cannot tell', metavar='N', at_least=1, unset='as the data set says')
    val_num_samples: int | None = flag(None, 'images in the validation split, where a stream cannot tell', metavar='N', at_least=1, unset='as the data set says')
    dataset_download: bool = switch('let torch/ and tfds/ data sets download themselves', neutral=True)
    class_map: str = flag('', 'text file with one class name a line, in the order of the labels', metavar='FILE', unset='as the data set says')
    class_depth: int | None = flag(None, 'level of the folder below that of the split that is the class of an image', metavar='N', unset='the innermost folder', at_least=1, added=True)
    input_img_mode: str | None = flag(None, 'PIL mode that images are converted to', unset="'RGB' for 3 channels, else 'L'", allowed=(None, 'L', 'RGB', 'RGBA', 'CMYK', 'YCbCr', 'LAB', 'HSV'))
    input_key: str | None = flag(None, 'name of the image column of the data set', unset='by the type of the data set')
    target_key: str | None = flag(None, 'name of the label column of the data set', unset='by the type of the data set')
    target_format: str | None = flag(None, 'multi-label targets of the data set: lists of class indices or 0/1 vectors', choices=['indices', 'multihot'])
    dataset_trust_remote_code: bool = switch('let a Hugging Face data set run its own code on import', neutral=True)
    unlabeled: list[str] = flag([], 'train on images without labels too: all images in these folders, at any depth, and in .tar files within them or named here. Without a data folder the student is a backbone without a classifier, taught by the teacher alone', metavar='DIR', needs='teacher', added=True)
    val_fraction: float = flag(0.05, 'without a data folder: share of the images of --unlabeled that is held out for validation, chosen by their content', metavar='R', above=0, at_most=0.5, needs='unlabeled', added=True)
    unlabeled_ratio: float | None = flag(None, 'with a data folder: number of images without labels per labelled image in an epoch', metavar='R', above=0, unset='an epoch goes once through both', needs='unlabeled', added=True)
    knn_data: str | None = flag(None, "folder with the splits train and val of labelled images: measure after each validation how well the nearest neighbours of the student's features tell their classes (top-1, k = 20), at the end how well a linear probe does, and both of the teacher at the start", metavar='DIR', needs='teacher', added=True, neutral=True)

    @property
    def root(self) -> str:
        """Folder of the data set, '' if none is given."""
        return self.data_dir or self.data or ''

    @property
    def has_labels(self) -> bool:
        """Whether images come with labels; else the run is the pretraining of a backbone on --unlabeled."""
        return bool(self.root or self.dataset or not self.unlabeled)


@dataclass(frozen=True, kw_only=True)
class ModelFlags:
    """Model, the student where there is a teacher."""

    model: str = flag('resnet50', 'model to train, the student where there is a --teacher', metavar='NAME')
    pretrained: bool = switch('start from the pretrained weights of the name')
    pretrained_path: str | None = flag(None, 'load the pretrained weights from this file', metavar='PATH', unset='the weights of the name')
    pretrained_cfg_overlay: dict[str, Any] = flag({}, 'override fields of the pretrained cfg, k=v ...')
    initial_checkpoint: str = flag('', 'load these weights into the finished model', metavar='PATH')
    num_classes: int | None = flag(None, 'number of classes', metavar='N', unset="the data's, or the model's own where the data set does not tell", at_least=1)
    gp: str | None = flag(None, 'global pooling: fast, avg, max, avgmax, avgmaxc', metavar='POOL', unset="the model's own")
    grad_checkpointing: bool = switch('recompute activations in the backward pass to save memory')
    fast_norm: bool = switch("timm's fast norm layers under AMP")
    model_kwargs: dict[str, Any] = flag({}, 'more arguments for the model, k=v ...')
    head_init_scale: float | None = flag(None, 'scale the initial weights of the classifier', unset='unchanged')
    head_init_bias: float | None = flag(None, 'initial value of the bias of the classifier', unset='unchanged')


@dataclass(frozen=True, kw_only=True)
class InputFlags:
    """Images as the model sees them."""

    img_size: int | None = flag(None, 'input size in pixels, both sides', metavar='N', at_least=1, at_most=MAX_SIDE, unset="the model's own")
    in_chans: int | None = flag(None, 'input channels', metavar='N', at_least=1, unset="the model's own")
    input_size: list[int] | None = flag(None, 'input size as channels height width', count=3, metavar='N', at_least=1, at_most=MAX_SIDE, unset="the model's own")
    crop_pct: float | None = flag(None, 'share of the image that the validation center crop keeps', metavar='R', unset="the model's own")
    mean: list[float] | None = flag(None, 'mean to normalize with, one value or one a channel', metavar='R', unset="the model's own")
    std: list[float] | None = flag(None, 'standard deviation to normalize with', metavar='R', above=0, unset="the model's own")
    interpolation: str = flag('', 'resize interpolation of the validation', metavar='NAME', allowed=INTERPOLATIONS, unset="the model's own")
    batch_size: int = flag(128, 'training batch on each rank', metavar='N', also=('-b',), at_least=1)
    validation_batch_size: int | None = flag(None, 'validation batch on each rank', metavar='N', also=('-vb',), unset='as --batch-size', at_least=1)


@dataclass(frozen=True, kw_only=True)
class LoaderFlags:
    """Loader."""

    worker_seeding: str = flag('all', 'seeding of loader workers, for data without an index', allowed=('all', 'part'))
    workers: int | None = flag(None, 'loader processes on each rank', unset="this rank's share of the cores, from 1 to 4; for streams and NaFlex, whose draws depend on the number, 4", metavar='N', also=('-j',), at_least=0, at_most=MAX_WORKERS, neutral=True)
    pin_mem: bool = switch('with CUDA: pin host memory, so that copies run beside the computation', default=True, off='--no-pin-mem', neutral=True)
    no_prefetcher: bool = switch('plain DataLoader, no prefetching to the device')
    use_multi_epochs_loader: bool = switch('keep the iterator of the training loader between epochs', neutral=True)
    persistent_workers: bool = switch('keep loader processes between epochs', default=True, off='--no-persistent-workers', neutral=True)


@dataclass(frozen=True, kw_only=True)
class AugmentationFlags:
    """Augmentation."""

    no_aug: bool = switch('no training augmentation at all')
    train_crop_mode: str | None = flag(None, 'kind of random crop', allowed=(None, 'rrc', 'rkrc', 'rkrr'), unset='rrc')
    scale: list[float] = flag([0.08, 1.0], 'area of the random resized crop', metavar='R')
    ratio: list[float] = flag([3.0 / 4.0, 4.0 / 3.0], 'aspect ratio of the random resized crop', metavar='R', above=0)
    hflip: float = flag(0.5, 'probability of a horizontal flip', metavar='P', share=True)
    vflip: float = flag(0.0, 'probability of a vertical flip', metavar='P', share=True)
    color_jitter: float = flag(0.4, 'strength of color jitter', metavar='R', at_least=0)
    color_jitter_prob: float | None = flag(None, 'probability of color jitter', metavar='P', share=True, unset='always')
    grayscale_prob: float | None = flag(None, 'probability of a grey image', metavar='P', share=True, unset='0')
    gaussian_blur_prob: float | None = flag(None, 'probability of a blurred image', metavar='P', share=True, unset='0')
    aa: str | None = flag(None, "AutoAugment, RandAugment, ... as in timm, e.g. 'rand-m9-mstd0.5'", metavar='NAME')
    aug_repeats: float = flag(0, 'repeated augmentation: how often each image is drawn in an epoch (distributed training)', at_least=0)
    aug_splits: int = flag(0, 'number of augmentation splits, 0 or at least 2')
    reprob: float = flag(0.0, 'probability of random erasing', metavar='P', share=True)
    remode: str = flag('pixel', 'random erasing: what it fills in', allowed=('const', 'rand', 'pixel'), idle_without='reprob')
    recount: int = flag(1, 'random erasing: number of boxes', at_least=1, idle_without='reprob')
    resplit: bool = switch('no random erasing in the first augmentation split', idle_without='reprob')
    mixup: float = flag(0.0, 'alpha of mixup', metavar='R', at_least=0)
    cutmix: float = flag(0.0, 'alpha of cutmix', metavar='R', at_least=0)
    cutmix_minmax: list[float] | None = flag(None, 'smallest and largest share of the side that cutmix cuts out', metavar='R', unset='off')
    mixup_prob: float = flag(1.0, 'probability of mixup or cutmix', metavar='P', share=True, idle_without=_MIXING)
    mixup_switch_prob: float = flag(0.5, 'probability of cutmix where both are on', metavar='P', share=True, idle_without=_MIXING)
    mixup_mode: str = flag('batch', 'what mixup and cutmix draw for: the batch, a pair, or an element', allowed=('batch', 'pair', 'elem'), idle_without=_MIXING)
    mixup_off_epoch: int = flag(0, 'no mixup and cutmix from this epoch on; 0 never stops them', metavar='N', at_least=0, idle_without=_MIXING)
    train_interpolation: str = flag('random', 'resize interpolation in training', allowed=('random', *INTERPOLATIONS))
    train_crop_pad: int = flag(0, 'instead of the random resized crop: resize to --img-size, pad by N pixels and crop at random (CIFAR recipes: 4)', metavar='N', at_least=0, added=True)


@dataclass(frozen=True, kw_only=True)
class SizeFlags:
    """Training sizes and NaFlex."""

    train_img_sizes: list[int] | None = flag(None, 'input sizes to train at, one a batch', metavar='N', at_least=1, at_most=MAX_SIDE, unset='the input size alone')
    train_batch_sizes: list[int] | None = flag(None, 'batch size at each of --train-img-sizes', metavar='N', unset='as --batch-size', at_least=1, needs='train_img_sizes')
    train_size_probs: list[float] | None = flag(None, 'share of batches at each of --train-img-sizes', metavar='P', unset='equal', at_least=0, needs='train_img_sizes')
    train_size_schedule: str = flag('constant', 'mix --train-img-sizes, or move from the first to the last', choices=['constant', 'progressive'])
    train_size_schedule_spread: float = flag(0.65, 'progressive: width of the window of sizes', idle_without='train_size_schedule=progressive')
    train_size_random_mix: float = flag(0.1, 'progressive: share of random sizes', idle_without='train_size_schedule=progressive')
    train_batches_per_epoch: int | None = flag(None, 'batches in an epoch', metavar='N', also=('--train-steps-per-epoch',), unset='as the data give', needs='train_img_sizes')
    variable_batch_loss_scale: str = flag('none', 'scale the loss by the size of a batch', choices=['none', 'sqrt', 'linear'])
    naflex_loader: bool = switch('NaFlex batches: patches at native aspect ratio (not with a teacher)')
    naflex_train_seq_lens: list[int] = flag([128, 256, 576, 784, 1024], 'sequence lengths to train at', metavar='N', needs='naflex_loader')
    naflex_max_seq_len: int = flag(576, 'sequence length of the validation', metavar='N', needs='naflex_loader')
    naflex_patch_sizes: list[int] | None = flag(None, 'patch sizes to train at', metavar='N', needs='naflex_loader', unset="the model's own")
    naflex_patch_size_probs: list[float] | None = flag(None, 'share of batches at each of --naflex-patch-sizes', metavar='P', needs='naflex_loader', unset='equal')
    naflex_loss_scale: str = flag('linear', 'scale the loss by the size of a batch', choices=['none', 'sqrt', 'linear'], needs='naflex_loader')
    naflex_patchify_channels_first: bool = switch('channels first within a patch', needs='naflex_loader')


@dataclass(frozen=True, kw_only=True)
class LossFlags:
    """Task and task loss."""

    task: str = flag('classification', 'classification: one label an image; multilabel: any number of labels', choices=['classification', 'multilabel'])
    multilabel_threshold: float = flag(0.5, 'probability that counts as a prediction in F1', share=True, idle_without='task=multilabel')
    jsd_loss: bool = switch('Jensen-Shannon consistency loss over --aug-splits')
    bce_loss: bool = switch('binary cross-entropy')
    bce_sum: bool = switch('binary cross-entropy: sum over classes', of_loss='bce')
    bce_target_thresh: float | None = flag(None, 'binary cross-entropy: targets above this are 1', share=True, of_loss='bce', unset='targets as they are')
    bce_pos_weight: float | None = flag(None, 'binary cross-entropy: weight of positive targets', of_loss='bce', unset='1')
    smoothing: float | None = flag(None, 'label smoothing', unset='0.1, for multi-label 0', share=True)
    loss: str | None = flag(None, 'task loss', choices=LOSS_TYPES, unset='ce, bce for multi-label')
    class_stats: str | None = flag(None, 'JSON with pos_counts and num_samples, for weights by frequency', metavar='FILE')
    loss_pos_weight: str | None = flag(None, 'weight of positives: numbers, a file, or neg_pos')
    loss_class_weight: str | None = flag(None, 'weight of classes: numbers, a file, inv_freq or effective_num')
    loss_weight_power: float = flag(1.0, 'exponent of weights by frequency', idle_without=_WEIGHTED)
    loss_weight_beta: float = flag(0.999, 'beta of effective_num', idle_without=('loss_class_weight=effective_num', 'loss_pos_weight=effective_num'))
    loss_weight_max: float | None = flag(None, 'largest weight', unset='no limit', idle_without=_WEIGHTED)
    asl_gamma_pos: float = flag(1.0, 'asl: focus on positives', of_loss='asl')
    asl_gamma_neg: float = flag(4.0, 'asl: focus on negatives', of_loss='asl')
    asl_clip: float = flag(0.05, 'asl: probability margin of negatives', of_loss='asl')
    asl_reduction: str = flag('batchmean', 'asl: reduction', choices=['batchmean', 'sum', 'mean'], of_loss='asl')
    poly_epsilon: float = flag(2.0, 'poly: coefficient', of_loss='poly')
    poly_gamma: float = flag(0.0, 'poly, multi-label: focus', of_loss='poly')
    poly_alpha: float | None = flag(None, 'poly, multi-label: balance', of_loss='poly', unset='no balance')
    twoway_tp: float = flag(4.0, 'twoway: temperature of positives', of_loss='twoway')
    twoway_tn: float = flag(1.0, 'twoway: temperature of negatives', of_loss='twoway')
    db_neg_scale: float = flag(2.0, 'db: scale of negatives', of_loss='db')
    db_init_bias: float = flag(0.05, 'db: shift by class prior', of_loss='db')
    db_focal_gamma: float = flag(2.0, 'db: focus', of_loss='db')


@dataclass(frozen=True, kw_only=True)
class TimmDistillationFlags:
    """Distillation by timm's own tasks."""

    kd_model_name: str | None = flag(None, "teacher of timm's own distillation tasks (instead of --teacher)", metavar='NAME')
    kd_distill_type: str = flag('logit', 'what is distilled', choices=['logit', 'feature', 'token'], needs='kd_model_name')
    kd_loss_type: str = flag('kl', 'loss of logit distillation', needs='kd_model_name')
    kd_student_feature_dim: int | None = flag(None, "width of the student's feature", metavar='N', unset='read from the model', needs='kd_model_name')
    kd_teacher_feature_dim: int | None = flag(None, "width of the teacher's feature", metavar='N', unset='read from the model', needs='kd_model_name')
    kd_token_distill_type: str = flag('soft', 'token distillation: from logits or from the predicted class', choices=['soft', 'hard'], needs='kd_model_name')


@dataclass(frozen=True, kw_only=True)
class RegularizationFlags:
    """Regularization and normalization layers."""

    drop: float = flag(0.0, 'dropout', metavar='R', share=True)
    drop_connect: float | None = flag(None, 'old name of --drop-path', metavar='R')
    drop_path: float | None = flag(None, 'stochastic depth', metavar='R', share=True, unset="the model's own")
    drop_block: float | None = flag(None, 'drop block', metavar='R', share=True, unset="the model's own")
    bn_momentum: float | None = flag(None, 'batch norm momentum', unset="the model's own")
    bn_eps: float | None = flag(None, 'batch norm epsilon', unset="the model's own")
    sync_bn: bool = switch('batch statistics over all ranks')
    dist_bn: str = flag('reduce', "batch norm statistics of ranks after an epoch; '' leaves them apart", allowed=('', 'broadcast', 'reduce'))
    split_bn: bool = switch('a separate batch norm for each augmentation split')


@dataclass(frozen=True, kw_only=True)
class OptimizerFlags:
    """Optimizer."""

    grad_accum_steps: int = flag(1, 'batches to add up before each optimizer step', metavar='N', at_least=1)
    opt: str = flag('sgd', "timm optimizer; 'sgd' is Nesterov, 'momentum' is not", metavar='NAME')
    opt_eps: float | None = flag(None, 'epsilon', metavar='R', unset="the optimizer's own")
    opt_betas: list[float] | None = flag(None, 'betas', metavar='R', unset="the optimizer's own")
    momentum: float = flag(0.9, 'momentum', metavar='R')
    weight_decay: float = flag(2e-05, 'weight decay', metavar='R', at_least=0)
    clip_grad: float | None = flag(None, 'clip gradients at this norm or value', metavar='R', unset='no clipping', at_least=0)
    clip_mode: str = flag('norm', 'how --clip-grad clips', allowed=('norm', 'value', 'agc'), idle_without='clip_grad')
    layer_decay: float | None = flag(None, 'factor of the learning rate from each layer to the one before', share=True, above=0, unset='the same rate in each')
    layer_decay_min_scale: float = flag(0, 'lowest factor of --layer-decay', idle_without='layer_decay')
    layer_decay_no_opt_scale: float | None = flag(None, 'freeze layers whose factor is under this', unset='no layer is frozen', idle_without='layer_decay')
    opt_kwargs: dict[str, Any] = flag({}, 'more arguments for the optimizer, k=v ...')


@dataclass(frozen=True, kw_only=True)
class ScheduleFlags:
    """Schedule."""

    sched: str = flag('cosine', 'schedule of the learning rate', metavar='NAME', allowed=('cosine', 'tanh', 'step', 'multistep', 'poly', 'wsd', 'rsqrt', 'constant', 'plateau', 'none'))
    sched_on_updates: bool = switch('schedule by optimizer steps, not epochs')
    lr: float | None = flag(None, 'learning rate', metavar='R', unset='from --lr-base and the global batch', at_least=0)
    lr_base: float = flag(0.1, 'learning rate for a global batch of --lr-base-size', metavar='R')
    lr_base_size: int = flag(256, 'global batch that --lr-base is for', metavar='N', at_least=1)
    lr_base_scale: str = flag('', 'how the learning rate grows with the global batch', unset='by optimizer', allowed=('', 'linear', 'sqrt'))
    lr_noise: list[float] | None = flag(None, 'from which share of the schedule to which one to add noise to the learning rate', metavar='R', unset='no noise')
    lr_noise_pct: float = flag(0.67, 'limit of the noise, a share of the learning rate', metavar='R', idle_without='lr_noise')
    lr_noise_std: float = flag(1.0, 'standard deviation of the noise', metavar='R', idle_without='lr_noise')
    lr_cycle_mul: float = flag(1.0, 'each cycle is this much longer than the one before', metavar='R', above=0, idle_without=_CYCLIC)
    lr_cycle_decay: float = flag(0.5, 'each cycle starts this much lower', metavar='R', idle_without=_CYCLIC)
    lr_cycle_limit: int = flag(1, 'number of cycles', metavar='N', idle_without=_CYCLIC)
    lr_k_decay: float = flag(1.0, 'exponent k of k-decay (cosine, poly)', above=0, idle_without=('sched=cosine', 'sched=poly'))
    lr_decay_fn: str | None = flag(None, 'form of the decay phase (wsd, rsqrt)', unset="'1-sqrt' for wsd, 'linear' for rsqrt", idle_without=('sched=wsd', 'sched=rsqrt'))
    lr_stable_timescale: float | None = flag(None, 'timescale in epochs (rsqrt)', unset='--warmup-epochs', idle_without='sched=rsqrt')
    warmup_lr: float = flag(1e-05, 'learning rate that warmup starts from', metavar='R', at_least=0, idle_without='warmup_epochs')
    min_lr: float = flag(0, 'lowest learning rate', metavar='R', at_least=0)
    epochs: int = flag(300, 'epochs to train', metavar='N', at_least=1)
    epoch_repeats: float = flag(0.0, 'passes over the data in an epoch (hfids/, tfds/), 0 as 1', at_least=0)
    start_epoch: int | None = flag(None, 'first epoch, overrides that of --resume', metavar='N', at_least=0, unset='that of --resume, else 0')
    decay_milestones: list[int] = flag([90, 180, 270], 'epochs to decay at (multistep)', metavar='N', at_least=0, idle_without='sched=multistep')
    decay_epochs: float = flag(90, 'epochs between decays (step), length of the decay (wsd, rsqrt)', metavar='R', above=0, idle_without=('sched=step', 'sched=wsd', 'sched=rsqrt'))
    warmup_epochs: int = flag(5, 'epochs of warmup', metavar='N', at_least=0)
    warmup_prefix: bool = switch('do not count warmup in --epochs', idle_without='warmup_epochs')
    stop_epoch: int | None = flag(None, 'stop after this many epochs of the schedule, which stays as it is', metavar='N', unset='all')
    cooldown_epochs: int = flag(0, 'epochs at --min-lr after the schedule', metavar='N', at_least=0)
    patience_epochs: int = flag(10, 'validations without progress before a decay (plateau)', metavar='N', at_least=0, idle_without='sched=plateau')
    decay_rate: float = flag(0.1, 'decay factor (step, multistep, plateau), power (poly)', metavar='R', also=('--dr',), at_least=0, idle_without=('sched=step', 'sched=multistep', 'sched=plateau', 'sched=poly'))


@dataclass(frozen=True, kw_only=True)
class AverageFlags:
    """Moving average of the weights."""

    model_ema: bool = switch('keep, evaluate and save a moving average of the weights')
    model_ema_force_cpu: bool = switch('keep the average on the CPU (then it is not evaluated)', idle_without='model_ema')
    model_ema_decay: float = flag(0.9998, 'decay of the average', share=True, idle_without='model_ema')
    model_ema_warmup: bool = switch('let the decay grow from 0', idle_without='model_ema')


@dataclass(frozen=True, kw_only=True)
class DeviceFlags:
    """Device and precision."""

    device: str = flag('cuda', 'cuda, cuda:1, cpu, ...; falls back to the CPU where there is no cuda', neutral=True)
    amp: bool = switch('mixed precision')
    amp_dtype: str = flag('float16', 'low precision of --amp', allowed=('float16', 'bfloat16'), idle_without='amp')
    model_dtype: str | None = flag(None, 'dtype of the parameters', allowed=DTYPES, unset='float32')
    no_ddp_bb: bool = switch('DDP: do not broadcast buffers in every forward', neutral=True)
    synchronize_step: bool = switch('wait for the device after each step', neutral=True)
    device_modules: list[str] | None = flag(None, 'Python modules to import for the device; command line only', neutral=True)
    local_rank: int = flag(0, 'set by launchers', also=('--local_rank',), neutral=True)
    channels_last: bool = switch('memory format channels_last')
    fuser: str = flag('', 'TorchScript fuser', allowed=('', 'te', 'old', 'legacy', 'nvfuser', 'nvf'))
    torchscript: bool = switch('script the model with TorchScript (not with a teacher)')
    torchcompile_mode: str | None = flag(None, 'mode of torch.compile', unset="the backend's own", idle_without='torchcompile')
    torchcompile: str | None = flag(None, 'compile with this torch.compile backend (inductor if none is named)', const='inductor', unset='no compilation')


@dataclass(frozen=True, kw_only=True)
class TrackerFlags:
    """Trackers."""

    log_tb: bool = switch('log to TensorBoard: RUN/tensorboard', package=('tensorboard', 'tensorboard'), added=True, neutral=True)
    log_trackio: bool = switch('log to trackio: RUN/trackio, or TRACKIO_DIR of the environment', package=('trackio', 'trackio'), added=True, neutral=True)
    log_wandb: bool = switch('log to Weights & Biases', package=('wandb', 'wandb'), neutral=True)
    wandb_project: str | None = flag(None, 'project of Weights & Biases', needs='log_wandb', unset="the package's own", neutral=True)
    wandb_tags: list[str] = flag([], 'tags of Weights & Biases', needs='log_wandb', neutral=True)
    wandb_resume_id: str = flag('', 'run of Weights & Biases to continue', needs='log_wandb', unset='a new run', neutral=True)


@dataclass(frozen=True, kw_only=True)
class RunFlags:
    """Run."""

    seed: int = flag(42, 'random seed', metavar='N', at_least=0)
    log_interval: int = flag(50, 'batches between log lines', metavar='N', at_least=1, neutral=True)
    val_interval: int = flag(1, 'epochs between validations', metavar='N', at_least=1)
    recovery_interval: int = flag(0, 'batches between recovery checkpoints; 0 writes none', metavar='N', at_least=0, neutral=True)
    save_epochs: list[int] | None = flag(None, 'keep milestone-N.pth.tar after these numbers of epochs, and validate there', metavar='N', neutral=True)
    checkpoint_hist: int = flag(10, 'number of checkpoints kept', metavar='N', at_least=1, neutral=True)
    save_images: bool = switch('save a training batch as a picture at each log interval', neutral=True)
    output: str = flag('', "parent of the run's folder", metavar='DIR', unset='./output/train', neutral=True)
    experiment: str = flag('', "name of the run's folder", metavar='NAME', unset='date, model, size', neutral=True)
    overwrite: bool = switch("delete an earlier run in the run's folder; without this flag the earlier run is moved aside, to NAME.1 and so on", added=True, neutral=True)
    eval_metric: str | None = flag(None, 'metric that names the best epoch', metavar='NAME', unset='top1, map for multi-label, cosine without labels', neutral=True)
    tta: int = flag(0, 'validation: average the outputs of this many images in a row; 0 averages none')
    resume: str = flag('', "continue from this checkpoint, or the newest in this run folder, or 'auto' in the folder of --experiment: weights, optimizer, scaler, EMA, epoch", metavar='PATH', unset='a fresh run', neutral=True)
    no_resume_opt: bool = switch('with --resume: weights only, fresh optimizer and schedule state', needs='resume', neutral=True)
    nonfinite: str = flag('stop', "what a loss or gradient that is NaN or infinite does: 'stop' the run, or 'skip' the update and say so, until all updates between log lines are skipped and more than one in a row (with float16's loss scale, which first has to fall: more than 32)", choices=('stop', 'skip'), added=True)
    evaluate: str = flag('', 'validate the student in this checkpoint or run folder, and stop; model, data, sizes and normalization are those of its run unless given; a --teacher is not even loaded', metavar='PATH', added=True, neutral=True)
