"""The flags of timm's own training script: same names, types, defaults and meanings, one line each."""

import argparse

from timm.loss import LOSS_TYPES
from timm.utils import ParseKwargs

# a flag is a line
# fmt: off


def add_timm_args(parser: argparse.ArgumentParser) -> None:
    """Add timm's training flags to `parser`, in the groups of a run's stages."""
    _add_data(parser)
    _add_model(parser)
    _add_device(parser)
    _add_optimizer(parser)
    _add_schedule(parser)
    _add_augmentation(parser)
    _add_regularization(parser)
    _add_ema(parser)
    _add_misc(parser)
    _add_sizes(parser)
    _add_losses(parser)
    _add_distillation(parser)


def _add_data(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group('data').add_argument
    add('data', nargs='?', metavar='DIR', const=None, default=None, help='folder of the data set (as --data-dir)')
    add('--data-dir', metavar='DIR', default=None, help='folder of the data set (its root)')
    add('--dataset', metavar='NAME', default='', help="type and name, '<type>/<name>'; empty: an image folder or tar; 'sklearn/digits' is built in")
    add('--train-split', metavar='NAME', default='train', help='training split')
    add('--val-split', metavar='NAME', default='validation', help='validation split')
    add('--train-num-samples', metavar='N', type=int, default=None, help='images in the training split, where a stream cannot tell')
    add('--val-num-samples', metavar='N', type=int, default=None, help='images in the validation split, where a stream cannot tell')
    add('--dataset-download', action='store_true', default=False, help='let torch/ and tfds/ data sets download themselves')
    add('--class-map', metavar='FILE', type=str, default='', help='text file with one class name a line, in the order of the labels')
    add('--input-img-mode', type=str, default=None, help="PIL mode that images are converted to; None: 'RGB' for 3 channels, else 'L'")
    add('--input-key', type=str, default=None, help='name of the image column of the data set')
    add('--target-key', type=str, default=None, help='name of the label column of the data set')
    add('--target-format', choices=['indices', 'multihot'], default=None, type=str, help='multi-label targets of the data set: lists of class indices or 0/1 vectors')
    add('--dataset-trust-remote-code', action='store_true', default=False, help='let a Hugging Face data set run its own code on import')


def _add_model(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group('model').add_argument
    add('--model', metavar='NAME', type=str, default='resnet50', help='model to train, the student where there is a --teacher')
    add('--pretrained', action='store_true', default=False, help='start from the pretrained weights of the name')
    add('--pretrained-path', metavar='PATH', type=str, default=None, help='load the pretrained weights from this file')
    add('--pretrained-cfg-overlay', nargs='*', default={}, action=ParseKwargs, help='override fields of the pretrained cfg, k=v ...')
    add('--initial-checkpoint', metavar='PATH', type=str, default='', help='load these weights into the finished model')
    add('--resume', metavar='PATH', type=str, default='', help='continue from this checkpoint: weights, optimizer, scaler, EMA, epoch')
    add('--no-resume-opt', action='store_true', default=False, help='with --resume: weights only, fresh optimizer and schedule state')
    add('--num-classes', metavar='N', type=int, default=None, help="number of classes; None: the model's own")
    add('--gp', metavar='POOL', type=str, default=None, help='global pooling: fast, avg, max, avgmax, avgmaxc')
    add('--img-size', metavar='N', type=int, default=None, help='input size in pixels, both sides')
    add('--in-chans', metavar='N', type=int, default=None, help='input channels')
    add('--input-size', metavar='N', type=int, nargs=3, default=None, help='input size as channels height width')
    add('--crop-pct', metavar='R', type=float, default=None, help='share of the image that the validation center crop keeps')
    add('--mean', metavar='R', type=float, nargs='+', default=None, help='mean to normalize with, one value or one a channel')
    add('--std', metavar='R', type=float, nargs='+', default=None, help='standard deviation to normalize with')
    add('--interpolation', metavar='NAME', type=str, default='', help='resize interpolation of the validation')
    add('-b', '--batch-size', metavar='N', type=int, default=128, help='training batch on each rank')
    add('-vb', '--validation-batch-size', metavar='N', type=int, default=None, help='validation batch on each rank; None: as --batch-size')
    add('--channels-last', action='store_true', default=False, help='memory format channels_last')
    add('--fuser', type=str, default='', help="TorchScript fuser: '', 'te', 'old', 'nvfuser'")
    add('--grad-accum-steps', metavar='N', type=int, default=1, help='batches to add up before each optimizer step')
    add('--grad-checkpointing', action='store_true', default=False, help='recompute activations in the backward pass to save memory')
    add('--fast-norm', action='store_true', default=False, help="timm's fast norm layers under AMP")
    add('--model-kwargs', nargs='*', default={}, action=ParseKwargs, help='more arguments for the model, k=v ...')
    add('--head-init-scale', type=float, default=None, help='scale the initial weights of the classifier')
    add('--head-init-bias', type=float, default=None, help='initial value of the bias of the classifier')
    add('--torchscript', action='store_true', default=False, help='script the model with TorchScript (not with a teacher)')
    add('--torchcompile-mode', type=str, default=None, help='mode of torch.compile')
    add('--torchcompile', nargs='?', type=str, default=None, const='inductor', help='compile with this torch.compile backend (inductor if none is named)')


def _add_device(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group('device').add_argument
    add('--device', type=str, default='cuda', help='cuda, cuda:1, cpu, ...; falls back to the CPU where there is no cuda')
    add('--amp', action='store_true', default=False, help='mixed precision')
    add('--amp-dtype', type=str, default='float16', help='low precision of --amp: float16 or bfloat16')
    add('--model-dtype', type=str, default=None, help='dtype of the parameters: float32, bfloat16 or float16')
    add('--no-ddp-bb', action='store_true', default=False, help='DDP: do not broadcast buffers in every forward')
    add('--synchronize-step', action='store_true', default=False, help='wait for the device after each step')
    add('--device-modules', type=str, nargs='+', default=None, help='Python modules to import for the device; command line only')
    add('--local_rank', type=int, default=0, help='set by launchers')


def _add_optimizer(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group('optimizer').add_argument
    add('--opt', metavar='NAME', type=str, default='sgd', help="timm optimizer; 'sgd' is Nesterov, 'momentum' is not")
    add('--opt-eps', metavar='R', type=float, default=None, help="epsilon; None: the optimizer's own")
    add('--opt-betas', metavar='R', type=float, nargs='+', default=None, help="betas; None: the optimizer's own")
    add('--momentum', metavar='R', type=float, default=0.9, help='momentum')
    add('--weight-decay', metavar='R', type=float, default=2e-5, help='weight decay')
    add('--clip-grad', metavar='R', type=float, default=None, help='clip gradients at this; None: no clipping')
    add('--clip-mode', type=str, default='norm', help='norm, value or agc')
    add('--layer-decay', type=float, default=None, help='factor of the learning rate from each layer to the one before')
    add('--layer-decay-min-scale', type=float, default=0, help='lowest factor of --layer-decay')
    add('--layer-decay-no-opt-scale', type=float, default=None, help='freeze layers whose factor is under this')
    add('--opt-kwargs', nargs='*', default={}, action=ParseKwargs, help='more arguments for the optimizer, k=v ...')


def _add_schedule(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group('schedule').add_argument
    add('--sched', metavar='NAME', type=str, default='cosine', help='cosine, tanh, step, multistep, poly, wsd, rsqrt, constant, plateau, none')
    add('--sched-on-updates', action='store_true', default=False, help='schedule by optimizer steps, not epochs')
    add('--lr', metavar='R', type=float, default=None, help='learning rate; None: from --lr-base and the global batch')
    add('--lr-base', metavar='R', type=float, default=0.1, help='learning rate at a global batch of --lr-base-size')
    add('--lr-base-size', metavar='N', type=int, default=256, help='global batch that --lr-base is for')
    add('--lr-base-scale', type=str, default='', help='linear or sqrt; empty: by optimizer')
    add('--lr-noise', metavar='R', type=float, nargs='+', default=None, help='where in the schedule to add noise to the learning rate, as shares')
    add('--lr-noise-pct', metavar='R', type=float, default=0.67, help='limit of the noise, a share of the learning rate')
    add('--lr-noise-std', metavar='R', type=float, default=1.0, help='standard deviation of the noise')
    add('--lr-cycle-mul', metavar='R', type=float, default=1.0, help='each cycle is this much longer than the one before')
    add('--lr-cycle-decay', metavar='R', type=float, default=0.5, help='each cycle starts this much lower')
    add('--lr-cycle-limit', metavar='N', type=int, default=1, help='number of cycles')
    add('--lr-k-decay', type=float, default=1.0, help='k of k-decay (cosine, poly)')
    add('--lr-decay-fn', type=str, default=None, help='form of the decay phase (wsd, rsqrt)')
    add('--lr-stable-timescale', type=float, default=None, help='timescale in epochs (rsqrt)')
    add('--warmup-lr', metavar='R', type=float, default=1e-5, help='learning rate that warmup starts from')
    add('--min-lr', metavar='R', type=float, default=0, help='lowest learning rate')
    add('--epochs', metavar='N', type=int, default=300, help='epochs to train')
    add('--epoch-repeats', type=float, default=0.0, help='passes over the data in an epoch (streams)')
    add('--start-epoch', metavar='N', type=int, default=None, help='first epoch, overrides that of --resume')
    add('--decay-milestones', metavar='N', type=int, nargs='+', default=[90, 180, 270], help='epochs to decay at (multistep)')
    add('--decay-epochs', metavar='R', type=float, default=90, help='epochs between decays (step), length of the decay (wsd, rsqrt)')
    add('--warmup-epochs', metavar='N', type=int, default=5, help='epochs of warmup')
    add('--warmup-prefix', action='store_true', default=False, help='do not count warmup in --epochs')
    add('--stop-epoch', metavar='N', type=int, default=None, help='stop after this many epochs of the schedule, which stays as it is')
    add('--cooldown-epochs', metavar='N', type=int, default=0, help='epochs at --min-lr after the schedule')
    add('--patience-epochs', metavar='N', type=int, default=10, help='epochs without progress before a decay (plateau)')
    add('--decay-rate', '--dr', metavar='R', type=float, default=0.1, help='decay factor (step, multistep, plateau), power (poly)')


def _add_augmentation(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group('augmentation').add_argument
    add('--no-aug', action='store_true', default=False, help='no training augmentation at all')
    add('--train-crop-mode', type=str, default=None, help='rrc, rkrc or rkrr')
    add('--scale', metavar='R', type=float, nargs='+', default=[0.08, 1.0], help='area of the random resized crop')
    add('--ratio', metavar='R', type=float, nargs='+', default=[3.0 / 4.0, 4.0 / 3.0], help='aspect ratio of the random resized crop')
    add('--hflip', metavar='P', type=float, default=0.5, help='probability of a horizontal flip')
    add('--vflip', metavar='P', type=float, default=0.0, help='probability of a vertical flip')
    add('--color-jitter', metavar='R', type=float, default=0.4, help='strength of color jitter')
    add('--color-jitter-prob', metavar='P', type=float, default=None, help='probability of color jitter')
    add('--grayscale-prob', metavar='P', type=float, default=None, help='probability of a grey image')
    add('--gaussian-blur-prob', metavar='P', type=float, default=None, help='probability of a blurred image')
    add('--aa', metavar='NAME', type=str, default=None, help="AutoAugment, RandAugment, ... as in timm, e.g. 'rand-m9-mstd0.5'")
    add('--aug-repeats', type=float, default=0, help='repeated augmentation: draws of an image in an epoch (distributed training)')
    add('--aug-splits', type=int, default=0, help='number of augmentation splits, 0 or at least 2')
    add('--jsd-loss', action='store_true', default=False, help='Jensen-Shannon consistency loss over --aug-splits')
    add('--bce-loss', action='store_true', default=False, help='binary cross-entropy')
    add('--bce-sum', action='store_true', default=False, help='binary cross-entropy: sum over classes')
    add('--bce-target-thresh', type=float, default=None, help='binary cross-entropy: targets above this are 1')
    add('--bce-pos-weight', type=float, default=None, help='binary cross-entropy: weight of positive targets')
    add('--reprob', metavar='P', type=float, default=0.0, help='probability of random erasing')
    add('--remode', type=str, default='pixel', help='random erasing: const, rand or pixel')
    add('--recount', type=int, default=1, help='random erasing: boxes')
    add('--resplit', action='store_true', default=False, help='no random erasing in the first augmentation split')
    add('--mixup', metavar='R', type=float, default=0.0, help='alpha of mixup')
    add('--cutmix', metavar='R', type=float, default=0.0, help='alpha of cutmix')
    add('--cutmix-minmax', metavar='R', type=float, nargs='+', default=None, help='least and most of the side that cutmix cuts')
    add('--mixup-prob', metavar='P', type=float, default=1.0, help='probability of mixup or cutmix')
    add('--mixup-switch-prob', metavar='P', type=float, default=0.5, help='probability of cutmix where both are on')
    add('--mixup-mode', type=str, default='batch', help='batch, pair or elem')
    add('--mixup-off-epoch', metavar='N', type=int, default=0, help='no mixup and cutmix from this epoch on; 0: always on')
    add('--smoothing', type=float, default=None, help='label smoothing; None: 0.1')
    add('--train-interpolation', type=str, default='random', help='resize interpolation in training: random, bilinear, bicubic')


def _add_regularization(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group('regularization and normalization layers').add_argument
    add('--drop', metavar='R', type=float, default=0.0, help='dropout')
    add('--drop-connect', metavar='R', type=float, default=None, help='old name of --drop-path')
    add('--drop-path', metavar='R', type=float, default=None, help='stochastic depth')
    add('--drop-block', metavar='R', type=float, default=None, help='drop block')
    add('--bn-momentum', type=float, default=None, help='batch norm momentum')
    add('--bn-eps', type=float, default=None, help='batch norm epsilon')
    add('--sync-bn', action='store_true', default=False, help='batch statistics over all ranks')
    add('--dist-bn', type=str, default='reduce', help='running statistics over ranks after an epoch: broadcast, reduce or empty')
    add('--split-bn', action='store_true', default=False, help='batch norm of its own for each augmentation split')


def _add_ema(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group('moving average of the weights').add_argument
    add('--model-ema', action='store_true', default=False, help='keep, evaluate and save a moving average of the weights')
    add('--model-ema-force-cpu', action='store_true', default=False, help='keep it on the CPU (then it is not evaluated)')
    add('--model-ema-decay', type=float, default=0.9998, help='decay')
    add('--model-ema-warmup', action='store_true', default=False, help='grow the decay from 0')


def _add_misc(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group('run').add_argument
    add('--seed', metavar='N', type=int, default=42, help='random seed')
    add('--worker-seeding', type=str, default='all', help='seeding of loader workers, for data without an index: all or part')
    add('--log-interval', metavar='N', type=int, default=50, help='batches between log lines')
    add('--val-interval', metavar='N', type=int, default=1, help='epochs between validations')
    add('--recovery-interval', metavar='N', type=int, default=0, help='batches between recovery checkpoints; 0: none')
    add('--save-epochs', metavar='N', type=int, nargs='+', default=None, help='keep milestone-N.pth.tar after these numbers of epochs, and validate there')
    add('--checkpoint-hist', metavar='N', type=int, default=10, help='number of checkpoints kept')
    add('-j', '--workers', metavar='N', type=int, default=None, help="loader processes on each rank; None: this rank's share of the cores, from 1 to 4 (for streams and NaFlex, whose draws depend on the number, 4)")
    add('--save-images', action='store_true', default=False, help='save a training batch as a picture at each log interval')
    add('--pin-mem', action='store_true', default=False, help='pin host memory for faster copies')
    add('--no-prefetcher', action='store_true', default=False, help='plain DataLoader, no prefetching to the device')
    add('--use-multi-epochs-loader', action='store_true', default=False, help='keep the iterator of the training loader between epochs')
    add('--persistent-workers', action='store_true', default=True, help='keep loader processes between epochs')
    add('--no-persistent-workers', dest='persistent_workers', action='store_false', default=True, help='start new ones in every epoch')
    add('--output', metavar='DIR', type=str, default='', help="parent of the run's folder; empty: ./output/train")
    add('--experiment', metavar='NAME', type=str, default='', help="name of the run's folder; empty: date, model, size")
    add('--eval-metric', metavar='NAME', type=str, default=None, help='metric that names the best epoch; None: top1, map for multi-label')
    add('--tta', type=int, default=0, help='validation: average the outputs of this many images in a row')
    add('--log-wandb', action='store_true', default=False, help='log to Weights & Biases')
    add('--wandb-project', type=str, default=None, help='its project')
    add('--wandb-tags', type=str, nargs='+', default=[], help='its tags')
    add('--wandb-resume-id', type=str, default='', help='its run to continue')


def _add_sizes(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group('training sizes and NaFlex').add_argument
    add('--train-img-sizes', metavar='N', type=int, nargs='+', default=None, help='input sizes to train at, one a batch')
    add('--train-batch-sizes', metavar='N', type=int, nargs='+', default=None, help='batch size of each of them; None: as --batch-size')
    add('--train-size-probs', metavar='P', type=float, nargs='+', default=None, help='share of each of them; None: equal')
    add('--train-size-schedule', type=str, choices=['constant', 'progressive'], default='constant', help='mix them, or move from first to last')
    add('--train-size-schedule-spread', type=float, default=0.65, help='progressive: width of the window of sizes')
    add('--train-size-random-mix', type=float, default=0.1, help='progressive: share of random sizes')
    add('--train-batches-per-epoch', '--train-steps-per-epoch', metavar='N', type=int, default=None, help='batches in an epoch; None: as the data give')
    add('--variable-batch-loss-scale', type=str, choices=['none', 'sqrt', 'linear'], default='none', help='scale the loss by the size of a batch')
    add('--naflex-loader', action='store_true', default=False, help='NaFlex batches: patches at native aspect ratio (not with a teacher)')
    add('--naflex-train-seq-lens', metavar='N', type=int, nargs='+', default=[128, 256, 576, 784, 1024], help='sequence lengths to train at')
    add('--naflex-max-seq-len', metavar='N', type=int, default=576, help='sequence length of the validation')
    add('--naflex-patch-sizes', metavar='N', type=int, nargs='+', default=None, help='patch sizes to train at')
    add('--naflex-patch-size-probs', metavar='P', type=float, nargs='+', default=None, help='share of each of them')
    add('--naflex-loss-scale', type=str, choices=['none', 'sqrt', 'linear'], default='linear', help='scale the loss by the size of a batch')
    add('--naflex-patchify-channels-first', action='store_true', default=False, help='channels first within a patch')


def _add_losses(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group('task and task loss').add_argument
    add('--task', type=str, choices=['classification', 'multilabel'], default='classification', help='one label an image, or any number')
    add('--multilabel-threshold', type=float, default=0.5, help='probability that counts as a prediction in F1')
    add('--loss', type=str, choices=LOSS_TYPES, default=None, help='task loss; None: ce, bce for multi-label')
    add('--class-stats', metavar='FILE', type=str, default=None, help='JSON with pos_counts and num_samples, for weights by frequency')
    add('--loss-pos-weight', type=str, default=None, help='weight of positives: numbers, a file, or neg_pos')
    add('--loss-class-weight', type=str, default=None, help='weight of classes: numbers, a file, inv_freq or effective_num')
    add('--loss-weight-power', type=float, default=1.0, help='exponent of weights by frequency')
    add('--loss-weight-beta', type=float, default=0.999, help='beta of effective_num')
    add('--loss-weight-max', type=float, default=None, help='largest weight')
    add('--asl-gamma-pos', type=float, default=1.0, help='asl: focus on positives')
    add('--asl-gamma-neg', type=float, default=4.0, help='asl: focus on negatives')
    add('--asl-clip', type=float, default=0.05, help='asl: probability margin of negatives')
    add('--asl-reduction', type=str, choices=['batchmean', 'sum', 'mean'], default='batchmean', help='asl: reduction')
    add('--poly-epsilon', type=float, default=2.0, help='poly: coefficient')
    add('--poly-gamma', type=float, default=0.0, help='poly, multi-label: focus')
    add('--poly-alpha', type=float, default=None, help='poly, multi-label: balance')
    add('--twoway-tp', type=float, default=4.0, help='twoway: temperature of positives')
    add('--twoway-tn', type=float, default=1.0, help='twoway: temperature of negatives')
    add('--db-neg-scale', type=float, default=2.0, help='db: scale of negatives')
    add('--db-init-bias', type=float, default=0.05, help='db: shift by class prior')
    add('--db-focal-gamma', type=float, default=2.0, help='db: focus')


def _add_distillation(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("distillation, and timm's own tasks of it").add_argument
    add('--kd-model-name', metavar='NAME', type=str, default=None, help="teacher of timm's own distillation tasks (instead of --teacher)")
    add('--kd-distill-type', type=str, choices=['logit', 'feature', 'token'], default='logit', help='which of them')
    add('--kd-loss-type', type=str, default='kl', help='loss of logit distillation')
    add('--kd-student-feature-dim', metavar='N', type=int, default=None, help="width of the student's feature; None: found")
    add('--kd-teacher-feature-dim', metavar='N', type=int, default=None, help="width of the teacher's feature; None: found")
    add('--kd-token-distill-type', type=str, choices=['soft', 'hard'], default='soft', help='token distillation: from logits or from the predicted class')
    add('--distill-loss-weight', type=float, default=None, help='weight of the distillation loss; None with --teacher: 25')
    add('--task-loss-weight', type=float, default=None, help='weight of the task loss; None with --teacher: 1')
    add('--kd-temperature', metavar='T', type=float, default=4.0, help='temperature of logit distillation')
