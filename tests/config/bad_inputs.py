"""The corpus of bad inputs: each makes what it needs in an empty folder and gives the end of a command line."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import bad_checkpoints as checkpoints
import safetensors.torch
import timm
import torch
from PIL import Image


class Bad(NamedTuple):
    """One bad input.

    Attributes:
        name: What it is.
        make: Writes its files into a folder, and gives the flags that come after those of a good run.
        message: What the one line of the error has in it.
    """

    name: str
    make: Callable[[Path], list[str]]
    message: str


# Checkpoints -------------------------------------------------------------------------------------------------------------

CHECKPOINT_FLAGS = ('--teacher-checkpoint', '--initial-checkpoint', '--pretrained-path', '--resume', '--evaluate')
# timm adapts pretrained weights to the model: layers may be missing or left over (None), the rest it refuses in its words
_PRETRAINED = {
    'without a layer': None,
    'with a layer too many': None,
    'with other shapes': 'size mismatch for conv1.0.weight',
    'of another architecture': 'none of its weights was taken',
    'with renamed keys': 'none of its weights was taken',
    'with terminal codes for names': 'none of its weights was taken',
}


def _checkpoint(flag: str, write: Callable[[Path], None], name: str = 'bad.pth.tar') -> Callable[[Path], list[str]]:
    def make(folder: Path) -> list[str]:
        write(folder / name)
        # a resumed run would want its optimizer and projectors before its weights
        return [flag, str(folder / name), *(['--no-resume-opt'] if flag == '--resume' else [])]

    return make


def _bad_checkpoints() -> Iterator[Bad]:
    for flag in CHECKPOINT_FLAGS:
        for kind, (_, message) in checkpoints.WEIGHTS.items():
            if flag == '--pretrained-path':
                message = _PRETRAINED.get(kind, message)
            if message:
                yield Bad(
                    f'{flag}: weights {kind}',
                    _checkpoint(flag, lambda path, kind=kind: checkpoints.write_weights(kind, path)),
                    message,
                )
        for kind, (data, message) in checkpoints.FILES.items():
            yield Bad(f'{flag}: {kind}', _checkpoint(flag, lambda path, data=data: path.write_bytes(data())), message)
        for kind, (write, message) in checkpoints.PLACES.items():
            yield Bad(f'{flag}: {kind}', _checkpoint(flag, write), message)
    for i, (kind, data) in enumerate(checkpoints.SAFETENSORS.items()):
        flag = [f for f in CHECKPOINT_FLAGS if f != '--resume'][i % 4]
        write = _checkpoint(flag, lambda path, data=data: path.write_bytes(data()), 'bad.safetensors')
        yield Bad(f'{flag}: safetensors {kind}', write, 'bad.safetensors')
    for kind, (thing, message) in checkpoints.TRAINING.items():

        def make(folder: Path, thing: Callable = thing) -> list[str]:
            torch.save(thing(), folder / 'last.pth.tar')
            return ['--resume', str(folder)]

        yield Bad(f'--resume: {kind}', make, message)


# Flags -------------------------------------------------------------------------------------------------------------------

# the flags as one would type them, and what the error says
_FLAGS = [
    ('--epochs 0', '--epochs must be 1 or more'),
    ('--epochs -3', '--epochs must be 1 or more'),
    ('--epochs 2.5', "--epochs: invalid int value: '2.5'"),
    ('--epochs 1e3', "--epochs: invalid int value: '1e3'"),
    ('--epochs', '--epochs: expected one argument'),
    ('--epochs 99999999999999999999', '--epochs must be'),
    ('--batch-size 0', '--batch-size must be 1 or more'),
    ('--batch-size -8', '--batch-size must be 1 or more'),
    ('--batch-size 9999999', 'are fewer than one batch of 9999999'),
    ('-vb 0', '--validation-batch-size must be 1 or more'),
    ('--lr nan', '--lr must be a finite number'),
    ('--lr inf', '--lr must be'),
    ('--lr -1', '--lr must be'),
    ('--lr 1e400', '--lr must be a finite number'),
    ('--lr fast', "--lr: invalid float value: 'fast'"),
    ('--lr 0,1', "--lr: invalid float value: '0,1'"),
    ('--momentum nan', '--momentum must be a finite number'),
    ('--weight-decay inf', '--weight-decay must be a finite number'),
    ('--weight-decay -0.1', '--weight-decay must be 0 or more'),
    ('--clip-grad -1', '--clip-grad must be 0 or more'),
    ('--clip-mode median', "--clip-mode must be one of 'norm', 'value', 'agc'"),
    ('--seed -1', '--seed must be 0 or more'),
    ('--seed 4294967296', '--seed must be under 2**32'),
    ('--num-classes 0', '--num-classes must be 1 or more'),
    ('--num-classes 4', '3 classes and the student 4'),
    ('--img-size 0', '--img-size must be 1 or more'),
    ('--img-size 999999999', '--img-size must be 16384 or less'),
    ('--input-size 3 32', '--input-size: expected 3 arguments'),
    ('--input-size 3 0 32', '--input-size'),
    ('--input-size 3 -5 32', '--input-size'),
    ('--in-chans 0', '--in-chans must be 1 or more'),
    ('--class-depth 0', '--class-depth must be 1 or more'),
    ('--class-depth 1 --dataset sklearn/digits', '--class-depth has no effect on --dataset sklearn/digits'),
    ('--class-map x.txt --dataset sklearn/digits', '--class-map has no effect on --dataset sklearn/digits'),
    ('--target-key label', '--target-key has no effect on --dataset of a folder, it is for hfds/NAME'),
    ('--train-num-samples 10', '--train-num-samples has no effect'),
    ('--val-num-samples 10', '--val-num-samples has no effect'),
    ('--epoch-repeats 2', '--epoch-repeats has no effect'),
    ('--split-bn --sync-bn --resplit', '--split-bn does not go with --sync-bn'),
    ('--split-bn --resplit -b 7', '--batch-size must be even'),
    ('--split-bn --resplit --train-img-sizes 32 48 --train-batch-sizes 8 7', '--train-batch-sizes must be even, got 7'),
    ('--teacher test_vit --sync-bn --pe-projector linear_bn', 'normalizes over the batch of one rank'),
    ('--kd-temperature 2', '--kd-temperature has no effect without --kd-loss-weight'),
    ('--in-chans 7', 'the student has 7 input channels'),
    ('--mean 0.5 0.5', 'mean'),
    ('--std 0 0 0', '--std must be above 0'),
    ('--std -1', '--std must be above 0'),
    ('--crop-pct 0', '--crop-pct must be above 0'),
    ('--crop-pct 7', '--crop-pct must be'),
    ('--workers -1', '--workers must be 0 or more'),
    ('--workers 1000000', '--workers must be'),
    ('--hflip 2', '--hflip must be from 0 to 1'),
    ('--reprob -0.5', '--reprob must be from 0 to 1'),
    ('--recount 0', '--recount must be 1 or more'),
    ('--remode noise', "--remode must be one of 'const'"),
    ('--mixup -1', '--mixup must be 0 or more'),
    ('--mixup-prob 3', '--mixup-prob must be from 0 to 1'),
    ('--mixup 0.5 --batch-size 7', 'must be even'),
    ('--cutmix-minmax 0.9 0.1', '--cutmix-minmax must be two rising shares'),
    ('--smoothing 1.5', '--smoothing must be from 0 to 1'),
    ('--drop 1.5', '--drop must be from 0 to 1'),
    ('--drop-path -1', '--drop-path must be from 0 to 1'),
    ('--scale 2 3', '--scale must be two rising shares'),
    ('--scale 0.5 0.1', '--scale must be two rising shares'),
    ('--ratio 0 0', '--ratio'),
    ('--ratio -1 2', '--ratio'),
    ('--ratio 1 2 3', '--ratio takes 2 values'),
    ('--color-jitter -1', '--color-jitter must be 0 or more'),
    ('--aa nonsense-m9', 'training augmentation'),
    ('--aug-splits 1', '--aug-splits does not go with --teacher'),
    ('--aug-splits 3', '--aug-splits does not go with --teacher'),
    ('--aug-repeats 3', '--aug-repeats spreads the draws'),
    ('--log-interval 0', '--log-interval must be 1 or more'),
    ('--val-interval 0', '--val-interval must be 1 or more'),
    ('--checkpoint-hist 0', '--checkpoint-hist must be 1 or more'),
    ('--recovery-interval -1', '--recovery-interval must be 0 or more'),
    ('--grad-accum-steps 0', '--grad-accum-steps must be 1 or more'),
    ('--warmup-epochs -1', '--warmup-epochs must be 0 or more'),
    ('--decay-epochs 0', '--decay-epochs must be above 0'),
    ('--decay-milestones 0.5', '--decay-milestones: invalid int value'),
    ('--stop-epoch 99', '--stop-epoch must be from 1'),
    ('--stop-epoch 0', '--stop-epoch must be from 1'),
    ('--save-epochs 0 1', '--save-epochs must be from 1'),
    ('--start-epoch 9', 'nothing to train'),
    ('--start-epoch -1', '--start-epoch must be 0 or more'),
    ('--model-ema --model-ema-decay 2', '--model-ema-decay must be from 0 to 1'),
    ('--tta 3', '--tta must divide'),
    ('--tta -1', '--tta must divide'),
    ('--model resnet_18', "--model: unknown model 'resnet_18', did you mean resnet18"),
    ('--model resnet18.nosuch_tag', "model 'resnet18.nosuch_tag' has no such tag"),
    ('--model resnet18/../../etc', 'has no source prefix but looks like'),
    ('--model ftp:resnet18', "Unknown model source 'ftp'"),
    ('--model local-dir:', 'no model id'),
    ('--model local-dir:/no/such/folder', 'no folder with a config.json'),
    ('--model zzzz', "--model: unknown model 'zzzz', timm.list_models"),
    ('--teacher resnt34', "--teacher: unknown model 'resnt34', did you mean resnet34"),
    ('--teacher resnet18 --teacher-pretrained', 'no pretrained weights for'),
    ('--teacher-num-classes -1', '--teacher-num-classes must be 0 or more'),
    ('--teacher-input-size 0', '--teacher-input-size must be 1 or more'),
    ('--teacher-mean 0.5 0.5', '2'),
    ('--teacher-mean nan', '--teacher-mean must be a finite number'),
    ('--teacher-std 0', '--teacher-std must be above 0'),
    ('--teacher-dtype int8', "--teacher-dtype must be one of 'auto', 'float32'"),
    ('--teacher-kwargs depth', '--teacher-kwargs: takes key=value'),
    ('--teacher-kwargs nosuch=3', 'nosuch'),
    ('--teacher-kwargs depth=-1', 'depth=-1'),
    ('--teacher-tap nosuch', 'nosuch'),
    ('--student-tap fc.fc.fc', 'fc.fc.fc'),
    ('--teacher-cache-views 0', '--teacher-cache-views must be 1 or more'),
    ('--pe-projectors 0', '--pe-projectors must be 1 or more'),
    ('--pe-projectors -3', '--pe-projectors must be 1 or more'),
    ('--pe-projectors 100000000', '--pe-projectors must be'),
    ('--pe-projector nosuch', "invalid choice: 'nosuch'"),
    ('--pe-projector identity --pe-projectors 5', 'leave --pe-projectors off'),
    ('--pe-act gelu', "invalid choice: 'gelu'"),
    ('--pe-loss l1', "invalid choice: 'l1'"),
    ('--pe-target head', "invalid choice: 'head'"),
    ('--pe-teacher-norm nosuch', "invalid choice: 'nosuch'"),
    ('--kd-loss-weight -1', '--kd-loss-weight must be 0 or more'),
    ('--kd-loss-weight 1', 'the student has 3 and the teacher 1000'),
    ('--kd-temperature 0', '--kd-temperature must be above 0'),
    ('--kd-temperature nan', '--kd-temperature must be a finite number'),
    ('--kd-distill-type feature', '--kd-distill-type needs --kd-model-name'),
    ('--kd-model-name resnet18', 'are two of the same'),
    ('--distill-loss-weight -1', '--distill-loss-weight must be 0 or more'),
    ('--task-loss-weight nan', '--task-loss-weight must be a finite number'),
    ('--opt sgdd', "--opt: unknown optimizer 'sgdd'"),
    ('--opt lookahead_', '--opt: unknown optimizer'),
    ('--opt-eps nan', '--opt-eps must be a finite number'),
    ('--opt adamw --opt-betas 2 3', '--opt: cannot make optimizer'),
    ('--opt adamw --opt-betas 0.9', '--opt: cannot make optimizer'),
    ('--opt-kwargs nosuch=1', "cannot make optimizer 'sgd'"),
    ('--opt-kwargs eps', '--opt-kwargs: takes key=value'),
    ('--opt-kwargs eps=1e999', '--opt-kwargs must be a finite number'),
    ('--momentum -1', 'momentum'),
    ('--layer-decay -1', '--layer-decay'),
    ('--sched cos', "--sched must be one of 'cosine'"),
    ('--sched wsd --decay-epochs 99', 'schedule'),
    ('--sched multistep --decay-milestones -1', '--decay-milestones'),
    ('--lr-noise 0.5 nan', '--lr-noise must be a finite number'),
    ('--lr-base-size 0', '--lr-base-size must be 1 or more'),
    ('--loss focal', "invalid choice: 'focal'"),
    ('--asl-clip 0.1', '--asl-clip needs --loss asl'),
    ('--jsd-loss', 'the jsd loss needs --aug-splits'),
    ('--jsd-loss --bce-loss', '--'),
    ('--bce-target-thresh 0.2', '--bce-target-thresh needs --loss bce'),
    ('--loss-class-weight 1,2', 'loss'),
    ('--loss-class-weight nosuch.json', "--loss-class-weight: no file 'nosuch.json'"),
    ('--loss-class-weight inv_freq', '--class-stats goes with'),
    ('--loss-class-weight inv_freq --class-stats /no/stats.json', '/no/stats.json'),
    ('--loss-class-weight inv_freq --class-stats /dev/zero', '--class-stats'),
    ('--class-map /no/map.txt', 'map.txt'),
    ('--class-map /dev/zero', '--class-map'),
    ('--task detection', "invalid choice: 'detection'"),
    ('--task multilabel', 'multilabel'),
    ('--target-format multihot', '--target-format needs --task multilabel'),
    ('--eval-metric f1', '--eval-metric of --task classification must be one of'),
    ('--amp --amp-dtype half', "--amp-dtype must be one of 'float16'"),
    ('--amp --model-dtype bfloat16', '--amp wants float32 parameters'),
    ('--model-dtype float64', "--model-dtype must be one of 'float32'"),
    ('--device gpu', "--device: cannot use 'gpu'"),
    ('--device cpu:x', '--device: cannot use'),
    ('--device-modules no_such_module', "cannot import 'no_such_module'"),
    ('--device-modules ..up', '--device-modules'),
    ('--torchcompile nosuch', "unknown backend 'nosuch'"),
    ('--torchcompile-mode fast', '--torchcompile-mode must be one of'),
    ('--torchscript', '--torchscript does not go with --teacher'),
    ('--naflex-loader', '--naflex-loader does not go with --teacher'),
    ('--naflex-max-seq-len 64', '--naflex-max-seq-len needs --naflex-loader'),
    ('--train-img-sizes 0', '--train-img-sizes'),
    ('--train-img-sizes -8 32', '--train-img-sizes'),
    ('--train-batch-sizes 8', '--train-batch-sizes needs --train-img-sizes'),
    ('--train-img-sizes 32 40 --train-batch-sizes 8', 'takes one value for each of the 2 sizes'),
    ('--train-img-sizes 32 40 --train-batch-sizes 8 0', '--train-batch-sizes'),
    ('--train-img-sizes 32 40 --train-size-probs -1 2', '--train-size-probs'),
    ('--train-crop-pad -1', '--train-crop-pad must be 0 or more'),
    ('--train-crop-pad 4', '--scale is for the crop'),
    ('--train-crop-mode nosuch', "--train-crop-mode must be one of 'rrc'"),
    ('--train-interpolation nosuch', '--train-interpolation must be one of'),
    ('--gp nosuch', 'nosuch'),
    ('--model-kwargs depht=3', 'depht'),
    ('--model-kwargs =3', '--model-kwargs: takes key=value'),
    ('--model-kwargs drop_rate=1e999', '--model-kwargs must be a finite number'),
    ('--model-kwargs x=1j', '--model-kwargs'),
    ('--model-kwargs x={[]:1}', '--model-kwargs'),
    ('--model-kwargs x=...', '--model-kwargs'),
    (f'--model-kwargs x={"-" * 3000}1', '--model-kwargs'),
    (f'--model-kwargs x={"(" * 3000}', "unexpected keyword argument 'x'"),
    ('--pretrained-cfg-overlay num_classes', '--pretrained-cfg-overlay: takes key=value'),
    ('--pretrained-cfg-overlay nosuch=1', 'nosuch'),
    ('--head-init-scale nan', '--head-init-scale must be a finite number'),
    ('--split-bn', '--split-bn needs --aug-splits'),
    ('--input-img-mode XYZ', "--input-img-mode must be one of 'L', 'RGB'"),
    ('--input-img-mode F', "--input-img-mode must be one of 'L', 'RGB'"),
    ('--input-img-mode L', '--input-img-mode L does not give the 3 channels'),
    ('--input-img-mode CMYK', '--input-img-mode CMYK does not give the 3 channels'),
    ('--model-kwargs features_only=True', 'is no classifier'),
    ('--model-kwargs num_classes=0', '--model-kwargs num_classes=0: data with labels need a classifier'),
    ('--model test_vit --model-kwargs global_pool=', 'not logits [1, '),
    ('--model-kwargs in_chans=0', 'channel count must be positive'),
    ('--layer-decay 2', '--layer-decay must be from 0 to 1'),
    ('--distill-loss-weight 1e300', '--distill-loss-weight must be a finite number'),
    ('--head-init-bias 1e39', '--head-init-bias must be a finite number'),
    ('--cutmix-minmax 0.5 0.5', '--cutmix-minmax must be two rising shares'),
    ('--device meta', '--device meta computes nothing'),
    ('--train-split /', '--train-split names a folder in that of the data set'),
    ('--val-split ../..', '--val-split names a folder in that of the data set'),
    ('--warmup-lr -3', '--warmup-lr must be 0 or more'),
    ('--min-lr -1', '--min-lr must be 0 or more'),
    ('--decay-rate -1', '--decay-rate must be 0 or more'),
    ('--patience-epochs -1', '--patience-epochs must be 0 or more'),
    ('--epoch-repeats 2 --dataset wds/x', '--epoch-repeats has no effect on --dataset wds/x'),
    ('--epoch-repeats 0.5 --dataset hfids/x', '--epoch-repeats must be 0, or 1 and more, got 0.5'),
    ('--epoch-repeats -1', '--epoch-repeats must be 0 or more'),
    ('--train-num-samples 0', '--train-num-samples must be 1 or more'),
    ('--multilabel-threshold 9', '--multilabel-threshold must be from 0 to 1'),
    ('--pretrained-cfg-overlay input_size=3', "cannot build 'test_resnet'"),
    ('--pretrained-cfg-overlay mean=abc', "'str'"),
    ('--pretrained-cfg-overlay crop_pct=-4', '--pretrained-cfg-overlay crop_pct'),
    ('--pretrained-cfg-overlay interpolation=zzz', '--pretrained-cfg-overlay interpolation'),
    ('--resume auto --experiment=', '--resume auto needs --experiment'),
    ('--resume /no/last.pth.tar', "--resume: no file '/no/last.pth.tar'"),
    ('--no-resume-opt', '--no-resume-opt needs --resume'),
    ('--dataset torh/cifar10', "unknown data set 'torh/cifar10'"),
    ('--dataset torch/nosuch', "cannot open data set 'torch/nosuch'"),
    ('--dataset sklearn/digit', 'did you mean sklearn/digits'),
    ('--dataset /', "unknown data set '/'"),
    ('--data-dir /no/such/folder', "no data folder '/no/such/folder'"),
    ('--train-split nosuch', "no folder for split 'nosuch'"),
    ('--val-split nosuch', "no folder for split 'nosuch'"),
    ('--wandb-project x', '--wandb-project needs --log-wandb'),
    ('--nosuch', 'unknown argument --nosuch'),
    ('--pe-projectr 3', 'did you mean --pe-projector'),
    ('stray', 'unknown argument stray'),
    ('-c', 'expected one argument'),
    ('-c /no/such.yaml', "cannot read '/no/such.yaml'"),
]
# what cannot be typed with blanks between
_WORDS = [
    ('an empty model', ['--model', ''], '--model'),
    ('an empty teacher kwarg name', ['--teacher-kwargs', '=1'], '--teacher-kwargs: takes key=value'),
    ('an empty number', ['--lr', ''], "--lr: invalid float value: ''"),
    ('an empty pooling', ['--gp', ''], '--gp must name a pooling'),
    ('an empty optimizer', ['--opt', ''], '--opt: unknown optimizer'),
    ('an empty schedule', ['--sched', ''], '--sched must be one of'),
    ('an empty device', ['--device', ''], '--device'),
    ('a blank model', ['--model', '  '], '--model'),
    ('a model of two lines', ['--model', 'resnet18\nresnet34'], '--model holds a control character'),
    ('a model that clears the terminal', ['--model', '\x1b[2Jresnet18'], r'\x1b[2Jresnet18'),
    ('an unknown flag that clears the terminal', ['--\x1b[2J'], r'unknown argument --\x1b[2J'),
    ('an unknown flag of two lines', ['--a\nb'], 'unknown argument --a b'),
    ('a folder name with a newline', ['--experiment', 'a\nb'], '--experiment holds a control character'),
    ('a folder name with a zero', ['--experiment', 'a\0b'], '--experiment holds a control character'),
    ('a data folder with a zero', ['--data-dir', 'a\0b'], '--data-dir holds a control character'),
    ('a tag with a bell', ['--wandb-tags', 'a', 'b\x07'], '--wandb-tags holds a control character'),
    ('a kwarg with a bell', ['--model-kwargs', 'x=a\x07'], '--model-kwargs holds a control character'),
    ('a config with a zero', ['-c', 'a\0b'], "cannot read 'a\\x00b'"),
    ('a model in Greek', ['--model', 'ρεσνετ'], "unknown model 'ρεσνετ'"),
    ('a number in wide digits', ['--epochs', '１２x'], '--epochs: invalid int value'),
    ('a model of no encoding', ['--model', 'resnet\udcff'], '--model'),
    ('a very long model', ['--model', 'x' * 100_000], '--model'),
    ('a very long teacher', ['--teacher', 'resnet' * 10_000], '--teacher'),
    ('a very long checkpoint', ['--teacher-checkpoint', 'x' * 100_000], '--teacher-checkpoint'),
    ('a long checkpoint', ['--teacher-checkpoint', 'x' * 300], '--teacher-checkpoint: no file'),
    ('a long local-dir', ['--model', 'local-dir:' + 'x' * 300], '--model'),
    ('a long data folder', ['--data-dir', 'x' * 300], 'no data folder'),
    ('a long config', ['-c', 'x' * 300], '--config: cannot read'),
    ('a very long number', ['--epochs', '9' * 5000], '--epochs'),
    ('a very long real', ['--lr', '9' * 5000], '--lr must be a finite number'),
    ('a very long folder name', ['--experiment', 'x' * 5000], '--experiment'),
    ('a thousand stray words', ['a'] * 1000, 'unknown argument a a'),
    ('ten thousand milestones', ['--decay-milestones', *['x'] * 10_000], '--decay-milestones: invalid int value'),
]


def _bad_flags() -> Iterator[Bad]:
    for typed, message in _FLAGS:
        yield Bad(typed[:60], lambda folder, typed=typed: typed.split(), message)
    for name, words, message in _WORDS:
        yield Bad(name, lambda folder, words=words: list(words), message)


# YAML --------------------------------------------------------------------------------------------------------------------

_LAUGHS = 'l0: &l0 [ha, ha, ha, ha, ha, ha, ha, ha, ha, ha]\n' + ''.join(
    f'l{i}: &l{i} [{", ".join([f"*l{i - 1}"] * 10)}]\n' for i in range(1, 12)
)


def _laughing(key: str) -> str:
    """Ten to the twelve laughs of a KB of YAML, as the value of `key`."""
    *head, last = _LAUGHS.rstrip().split('\n')
    nested = '[' + ', '.join(line.split(': ', 1)[1] for line in head) + ', ' + last.split(': ', 1)[1] + ']'
    return f'{key}: {nested}\n'


# name -> text or bytes of the file, and what the error says
_YAML: dict[str, tuple[str | bytes, str]] = {
    'an open bracket': ('a: [', 'is no YAML file'),
    'a tab': ('a:\n\t- b', 'is no YAML file'),
    'an open quote': ('model: "resnet18', 'is no YAML file'),
    'an unknown alias': ('model: *nosuch', 'is no YAML file'),
    'two documents': ('a: 1\n---\nb: 2', 'is no YAML file'),
    'a bad indent': ('a: 1\n  b: 2', 'is no YAML file'),
    'a text': ('just a text', "must hold 'flag: value' lines"),
    'a list': ('- a\n- b', "must hold 'flag: value' lines"),
    'a number': ('3', "must hold 'flag: value' lines"),
    'Python': ('import os\nos.system("touch canary")', "must hold 'flag: value' lines"),
    'JSON cut off': ('{"model": "resnet18"', 'is no YAML file'),
    'TOML': ('[train]\nlr = 0.1', 'is no YAML file'),
    'binary': (bytes(range(256)), 'is no YAML file'),
    'zeros': (bytes(5000), 'is no YAML file'),
    'Latin-1': ('model: café'.encode('latin-1'), 'is no YAML file'),
    'UTF-16 by halves': (b'\xff\xfem\x00o', 'is no YAML file'),
    'a tag that calls os.system': ('model: !!python/object/apply:os.system ["touch canary"]', 'is no YAML file'),
    'a tag that calls eval': (
        "lr: !!python/object/apply:eval [\"open('canary', 'w')\"]",
        'is no YAML file',
    ),
    'a tag that makes an object': ('a: !!python/object/new:os.system [touch canary]', 'is no YAML file'),
    'a tag that names a function': ('model: !!python/name:os.system', 'is no YAML file'),
    'a tag that imports': ('model: !!python/module:os', 'is no YAML file'),
    'a tag of its own': ('model: !secret x', 'is no YAML file'),
    'a tag on a wrong value': ('epochs: !!int many', 'is no YAML file'),
    'a tag on an empty value': ('lr: !!float ""', 'is no YAML file'),
    'a tag of a wrong truth': ('amp: !!bool perhaps', 'is no YAML file'),
    'a tag of a wrong date': ('experiment: !!timestamp soon', 'is no YAML file'),
    'a date that is none': ('experiment: 2024-13-45', 'is no YAML file'),
    'bad base64': ('experiment: !!binary a', 'is no YAML file'),
    'bytes for a name': ('experiment: !!binary aGVsbG8=', 'experiment in'),
    'a set for a name': ('experiment: !!set {a, b}', 'experiment in'),
    'pairs for a name': ('experiment: !!pairs [a: 1]', 'experiment in'),
    'a billion laughs': (_LAUGHS, 'unknown key'),
    'a billion laughs for a number': (_laughing('epochs'), 'epochs in'),
    'a billion laughs for a list': (_laughing('mean'), 'mean in'),
    'a billion laughs for kwargs': (_laughing('model_kwargs'), 'model_kwargs in'),
    'a billion laughs in kwargs': (
        'model_kwargs:\n' + ''.join(f'  {line}\n' for line in _LAUGHS.splitlines()),
        '--model-kwargs holds more than',
    ),
    'kwargs that hold themselves': ('model_kwargs: &a\n  x: *a', '--model-kwargs holds more than'),
    'a list that holds itself': ('mean: &a [*a]', 'mean in'),
    'a key that is a list': ('? [a]\n: 1', 'is no YAML file'),
    'nested two thousand deep': ('a: ' + '[' * 2000, 'is no YAML file'),
    'nested two thousand deep in braces': ('{a: ' * 2000, 'is no YAML file'),
    'a hundred thousand keys': (''.join(f'k{i}: 1\n' for i in range(100_000)), 'is larger than'),
    'a key twice': ('lr: 0.1\nlr: 0.2', "key 'lr' 2 times"),
    'a key in both spellings': ('batch_size: 8\nbatch-size: 16', 'batch'),
    'a key twice in kwargs': ('model_kwargs: {a: 1, a: 2}', "key 'a' 2 times"),
    'an unknown key': ('epoch: 3', "unknown key 'epoch'"),
    'an unknown key of a teacher': ('techer: resnet34', 'did you mean teacher'),
    'an empty key': ('"": 3', "unknown key ''"),
    'a null key': ('null: 3', "unknown key 'None'"),
    'a number for a key': ('3: 3', "unknown key '3'"),
    'a key that clears the terminal': ('"\\e[2J": 3', r'\x1b[2J'),
    'help': ('help: true', "unknown key 'help'"),
    'a text for an int': ('epochs: many', 'epochs in'),
    'a real for an int': ('epochs: 2.5', 'must be of type int, got 2.5'),
    'a truth for an int': ('epochs: true', 'must be of type int, got True'),
    'a list for an int': ('epochs: [1]', 'must be of type int'),
    'a dict for an int': ('epochs: {a: 1}', 'must be of type int'),
    'inf for an int': ('epochs: .inf', 'must be of type int'),
    'a date for an int': ('epochs: 2024-01-01', 'must be of type int'),
    'a huge int': (f'log_interval: {"9" * 400}', '--log-interval must be under 2**63'),
    'an int beyond what Python reads': (f'epochs: {"9" * 5000}', 'is no YAML file'),
    'a huge int for a real': (f'lr: {"9" * 400}', 'must be of type float'),
    'nan for a real': ('lr: .nan', '--lr must be a finite number'),
    'inf for a real': ('momentum: -.inf', '--momentum must be a finite number'),
    'inf in kwargs': ('opt_kwargs: {eps: .inf}', '--opt-kwargs must be a finite number'),
    'a text for a real': ('lr: fast', 'must be of type float'),
    'a list for a real': ('lr: [0.1]', 'must be of type float'),
    'a number for a switch': ('amp: 1', 'must be true or false'),
    'a text for a switch': ("amp: 'yes'", 'must be true or false'),
    'a list for a name': ('model: [resnet18]', 'must be of type str'),
    'a truth for a name': ('model: yes', 'must be of type str'),
    'a dict for a name': ('model: {name: resnet18}', 'must be of type str'),
    'a text for kwargs': ('model_kwargs: depth=3', "must be 'key: value' lines"),
    'a list for kwargs': ('model_kwargs: [depth, 3]', "must be 'key: value' lines"),
    'numbers for names of kwargs': ('model_kwargs: {3: 4}', 'model_kwargs'),
    'bytes in kwargs': ('model_kwargs: {x: !!binary aGVsbG8=}', '--model-kwargs holds a bytes'),
    'a set in kwargs': ('model_kwargs: {x: !!set {a, b}}', '--model-kwargs holds a set'),
    'a list too short': ('input_size: [3, 32]', 'must be a list of 3'),
    'a list with a hole': ('mean: [0.5, null, 0.5]', 'must be of type float'),
    'a list of lists': ('mean: [[0.5], [0.5]]', 'must be of type float'),
    'a name that is no choice': ('pe_loss: l1', 'must be one of'),
    'a control character': ('class_map: "a\\eb"', '--class-map holds a control character'),
    'a newline in a name': ('class_map: |\n  a\n  b\n', '--class-map holds a control character'),
    'code to import': ('device_modules: [antigravity]', 'taken from the command line alone'),
    'code of a data set': ('dataset_trust_remote_code: true', 'taken from the command line alone'),
    'a shell pipe for data': ('dataset: wds/x\ndata_dir: "pipe:touch canary;"', 'taken from the command line alone'),
    'a shell pipe for a split': (
        'dataset: wds/x\nval_split: "pipe:touch canary; cat x.tar"',
        'taken from the command line alone',
    ),
    'a flag that needs another': ('pe_target: logits\npe_teacher_norm: standardize', 'pe_'),
}


def _bad_yaml() -> Iterator[Bad]:
    for name, (content, message) in _YAML.items():

        def make(folder: Path, content: str | bytes = content) -> list[str]:
            (folder / 'bad.yaml').write_bytes(content if isinstance(content, bytes) else content.encode())
            return ['-c', str(folder / 'bad.yaml')]

        yield Bad(f'YAML: {name}', make, message)
    places = {
        'a folder': (Path.mkdir, 'cannot read'),
        'a link to itself': (lambda path: path.symlink_to(path), 'cannot read'),
        'an endless device': (lambda path: path.symlink_to('/dev/zero'), 'is larger than'),
        'a file that cannot be read': (lambda path: path.symlink_to('/proc/self/mem'), 'cannot read'),
        'a sparse file of 20 GB': (checkpoints.PLACES['a sparse file of 20 GB'][0], 'is larger than'),
    }
    for name, (write, message) in places.items():

        def make_place(folder: Path, write: Callable = write) -> list[str]:
            write(folder / 'bad.yaml')
            return ['-c', str(folder / 'bad.yaml')]

        yield Bad(f'YAML: {name}', make_place, message)


# Run folders and local-dir -------------------------------------------------------------------------------------------------

# name -> args.yaml of a teacher's run folder, and what the error says
_RUNS: dict[str, tuple[str | bytes, str]] = {
    'broken': ('mean: [', 'is no YAML file'),
    'a tag that calls os.system': ('mean: !!python/object/apply:os.system ["touch canary"]', 'is no YAML file'),
    'a tag that makes an object': ('model: !!python/object/new:os.system [touch canary]', 'is no YAML file'),
    'binary': (bytes(range(256)), 'is no YAML file'),
    'a list': ('- mean', "must hold 'flag: value' lines"),
    'empty': ('', 'is empty'),
    'a text for the mean': ('mean: grey', 'mean in'),
    'a text in the mean': ('mean: [a, b, c]', 'mean in'),
    'nan for the mean': ('mean: [.nan]', 'mean in'),
    'a deviation of 0': ('std: [0.0]', 'std in'),
    'kwargs that are a list': ('model_kwargs: [depth]', 'model_kwargs in'),
    'kwargs that laugh': ('model_kwargs:\n' + ''.join(f'  {x}\n' for x in _LAUGHS.splitlines()), 'model_kwargs in'),
    'kwargs that the model does not know': ('model_kwargs: {nosuch: 1}', 'nosuch'),
    'a text for the channels': ('in_chans: three', 'in_chans in'),
    'channels below 0': ('in_chans: -3', 'in_chans in'),
    'a list for the pooling': ('gp: [avg]', 'gp in'),
    'a text for the size': ('img_size: small', 'img_size in'),
    'a size beyond all memory': ('img_size: 1000000', 'img_size in'),
    'a size of 0': ('input_size: [3, 0, 32]', 'input_size in'),
    'a pooling that is none': ('gp: nosuch', 'nosuch'),
}


def _bad_runs() -> Iterator[Bad]:
    for name, (content, message) in _RUNS.items():

        def make(folder: Path, content: str | bytes = content) -> list[str]:
            safetensors.torch.save_file(timm.create_model('test_resnet').state_dict(), folder / 'student.safetensors')
            (folder / 'args.yaml').write_bytes(content if isinstance(content, bytes) else content.encode())
            return ['--teacher-checkpoint', str(folder)]

        yield Bad(f'args.yaml of a run folder: {name}', make, message)


_GOOD_CONFIG = {'architecture': 'test_resnet', 'num_classes': 3, 'pretrained_cfg': {'classifier': 'fc'}}
# name -> config.json
_CONFIGS: dict[str, str | bytes] = {
    'empty': '',
    'no JSON': '{"architecture": ',
    'YAML': 'architecture: resnet18',
    'binary': bytes(range(256)),
    'a list': '["test_resnet"]',
    'a number': '3',
    'null': 'null',
    'empty braces': '{}',
    'an unknown architecture': json.dumps({**_GOOD_CONFIG, 'architecture': 'resnet_nosuch'}),
    'an architecture that is a list': json.dumps({**_GOOD_CONFIG, 'architecture': ['resnet18']}),
    'an architecture that is null': json.dumps({**_GOOD_CONFIG, 'architecture': None}),
    'an architecture that is a path': json.dumps({**_GOOD_CONFIG, 'architecture': '../../os.system'}),
    'arguments that are a list': json.dumps({**_GOOD_CONFIG, 'model_args': ['depth']}),
    'arguments that are a text': json.dumps({**_GOOD_CONFIG, 'model_args': 'depth=3'}),
    'arguments that the model does not know': json.dumps({**_GOOD_CONFIG, 'model_args': {'nosuch': 1}}),
    'a pretrained_cfg that is a list': json.dumps({**_GOOD_CONFIG, 'pretrained_cfg': [1]}),
    'a pretrained_cfg with unknown keys': json.dumps({**_GOOD_CONFIG, 'pretrained_cfg': {'nosuch': 1}}),
    'classes that are a text': json.dumps({**_GOOD_CONFIG, 'model_args': {'num_classes': 'three'}}),
    'nested deep': '{"a":' * 20_000,
}


def _bad_local_dirs() -> Iterator[Bad]:
    for i, (name, content) in enumerate(_CONFIGS.items()):
        flag = ('--model', '--teacher')[i % 2]

        def make(folder: Path, content: str | bytes = content, flag: str = flag) -> list[str]:
            (folder / 'config.json').write_bytes(content if isinstance(content, bytes) else content.encode())
            return [flag, f'local-dir:{folder}']

        yield Bad(f'{flag} local-dir: config.json {name}', make, flag)
    for kind in ('code: os.system', 'code: exec', 'a storage bomb', 'a text', 'cut in the middle', 'empty'):

        def weights(folder: Path, kind: str = kind) -> list[str]:
            (folder / 'config.json').write_text(json.dumps(_GOOD_CONFIG))
            (folder / 'pytorch_model.bin').write_bytes(checkpoints.FILES[kind][0]())
            return ['--model', f'local-dir:{folder}', '--pretrained']

        yield Bad(f'--model local-dir: weights that are {kind}', weights, '--model')


# Data --------------------------------------------------------------------------------------------------------------------


def _picture(path: Path, mode: str = 'RGB') -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, (40, 40)).save(path)


def _splits(folder: Path, classes: tuple[str, ...] = ('ant', 'bee', 'cat')) -> None:
    for split in ('train', 'val'):
        for name in classes:
            for i in range(4):
                _picture(folder / split / name / f'{i}.png')


def _no_images(folder: Path) -> None:
    for split in ('train', 'val'):
        (folder / split / 'ant').mkdir(parents=True)
        (folder / split / 'ant' / 'notes.txt').write_text('no picture')


def _one_split(folder: Path) -> None:
    _splits(folder)
    for path in sorted((folder / 'val').rglob('*'), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    (folder / 'val').rmdir()


def _other_classes(folder: Path) -> None:
    _splits(folder)
    (folder / 'val' / 'cat').rename(folder / 'val' / 'dog')


def _odd_classes(folder: Path) -> None:
    _splits(folder)
    (folder / 'val' / 'cat').rename(folder / 'val' / '\x1b[2J<script>')


def _corrupt(folder: Path) -> None:
    _splits(folder)
    for path in folder.rglob('*.png'):
        path.write_bytes(b'\x89PNG\r\n\x1a\n' + bytes(50))


def _text_for_images(folder: Path) -> None:
    _splits(folder)
    for path in folder.rglob('*.png'):
        path.write_text('no picture')


def _link_loops(folder: Path) -> None:
    for split in ('train', 'val'):
        (folder / split).mkdir()
        (folder / split / 'ant').symlink_to(folder / split)


def _file_for_split(folder: Path) -> None:
    _splits(folder)
    (folder / 'train').rename(folder / 'elsewhere')
    (folder / 'train').write_text('no folder')


# name -> what makes the folder, and what the error says
_DATA: dict[str, tuple[Callable[[Path], None], str]] = {
    'empty': (lambda folder: None, 'no images in'),
    'without images': (_no_images, 'no images in'),
    'of one class': (lambda folder: _splits(folder, ('ant',)), 'the data set has 1 classes and the student 3'),
    'of two classes': (lambda folder: _splits(folder, ('ant', 'bee')), 'the data set has 2 classes'),
    'without a validation split': (_one_split, "no folder for split 'validation'"),
    'with other classes to validate': (_other_classes, 'different classes'),
    'with classes that clear the terminal': (_odd_classes, r'\x1b[2J<script>'),
    'with a file in place of a split': (_file_for_split, 'train'),
    'whose folders go round': (_link_loops, 'no images in'),
    'of corrupt images': (_corrupt, 'image'),
    'of texts called images': (_text_for_images, 'image'),
}


def _bad_data() -> Iterator[Bad]:
    for name, (build, message) in _DATA.items():

        def make(folder: Path, build: Callable = build) -> list[str]:
            build(folder)
            return ['--data-dir', str(folder)]

        yield Bad(f'data {name}', make, message)
    files = {
        'a text in place of a folder': ('data.txt', b'no folder'),
        'a picture in place of a folder': ('data.png', b'\x89PNG'),
        'a tar that is none': ('data.tar', b'no tar'),
        'an empty tar': ('data.tar', bytes(10240)),
    }
    for name, (file, content) in files.items():

        def make_file(folder: Path, file: str = file, content: bytes = content) -> list[str]:
            (folder / file).write_bytes(content)
            return ['--data-dir', str(folder / file)]

        yield Bad(f'data: {name}', make_file, file)
    maps = {'x.txt': b'nosuch\n', 'x.pkl': b'cos\nsystem\n(S"touch canary"\ntR.', 'x.csv': b'ant,0\n', 'y.txt': b'\xff'}
    for file, content in maps.items():

        def make_map(folder: Path, file: str = file, content: bytes = content) -> list[str]:
            (folder / file).write_bytes(content)
            return ['--class-map', str(folder / file)]

        yield Bad(f'class map {file}', make_map, 'is of a class that' if file == 'x.txt' else 'data set')
    stats = {'no JSON': 'x', 'a list': '[1]', 'a negative count': '{"pos_counts": [-1, 2, 3], "num_samples": 3}'}
    for name, content in stats.items():

        def make_stats(folder: Path, content: str = content) -> list[str]:
            (folder / 'stats.json').write_text(content)
            return ['--class-stats', str(folder / 'stats.json'), '--loss-class-weight', 'inv_freq']

        yield Bad(f'class stats: {name}', make_stats, '--class-stats: ')


def _bad_output() -> Iterator[Bad]:
    def in_a_file(folder: Path) -> list[str]:
        (folder / 'file').write_text('no folder')
        return ['--output', str(folder / 'file')]

    def on_a_file(folder: Path) -> list[str]:
        (folder / 'run').write_text('no folder')
        return ['--output', str(folder)]

    yield Bad('--output: a file', in_a_file, '--output: cannot write into')
    yield Bad('--experiment: a file', on_a_file, '--output: cannot write into')
    yield Bad('--output: a device', lambda folder: ['--output', '/dev/null'], '--output: cannot write into')
    yield Bad('--output: where no folders can be', lambda folder: ['--output', '/proc/run'], 'cannot write into')
    yield Bad('--experiment: too long', lambda folder: ['--experiment', 'x' * 300], 'longer than 255 bytes')


CORPUS = [
    *_bad_checkpoints(),
    *_bad_flags(),
    *_bad_yaml(),
    *_bad_runs(),
    *_bad_local_dirs(),
    *_bad_data(),
    *_bad_output(),
]
