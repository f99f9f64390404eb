"""Recipes of hparams/: each builds everything and takes two steps on tiny data, and what is called paper is the paper's."""

import re
import shlex
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torchvision
import yaml
from helpers import run, summary
from PIL import Image
from timm.data import dataset_factory
from timm.data.model_config import resolve_input_data_config
from timm.loss import BinaryCrossEntropy, SoftTargetCrossEntropy
from timm.optim import Lamb
from torch import nn

import train_distill
from timm_pe.config.derive import learning_rate
from timm_pe.config.run_config import RunConfig, parse_config
from timm_pe.data.epochs import first_batch
from timm_pe.train.trainer import Trainer

FOLDER = Path(train_distill.__file__).parent / 'hparams'
RECIPES = sorted(p.stem for p in FOLDER.glob('*.yaml'))
PAPER = [r for r in RECIPES if r.endswith('_paper')]
CIFAR = [r for r in PAPER if r.startswith('cifar100_')]
IMAGENET = [r for r in PAPER if r.startswith('imagenet_')]
A3, VIT = 'imagenet_resnet50_resnet18_a3', 'imagenet_regnety160_vit_tiny_deit'
MODERN = [A3, VIT]
# what the recipes must give, written down apart from them
LR = {r: 0.01 if 'mobilenetv2' in r else 0.05 for r in CIFAR} | dict.fromkeys(IMAGENET, 0.1) | {A3: 8e-3, VIT: 1e-3}
GLOBAL_BATCH = dict.fromkeys(CIFAR, 64) | dict.fromkeys(IMAGENET, 256) | {A3: 2048, VIT: 1024}
DECAY = dict.fromkeys(CIFAR, 5e-4) | dict.fromkeys(IMAGENET, 1e-4) | {A3: 0.02, VIT: 0.05}
# epochs, and those after which the learning rate falls to a tenth
EPOCHS = dict.fromkeys(CIFAR, (240, 150, 180, 210)) | dict.fromkeys(IMAGENET, (100, 30, 60, 90))
IMAGENET_NORM = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CIFAR_NORM = (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)
# on the command line of a run of seconds, where ImageNet recipes else get 64 pixels
SMALL = {A3: ['--img-size', '64', '--train-img-sizes', '48'], VIT: ['--img-size', '32']}


@dataclass
class Built:
    """What is kept of a recipe that was built and ran: no models.

    Attributes:
        row: The line of summary.csv.
        steps: Number of optimizer steps.
        moved: Names of the parameters that these changed.
        lrs: The learning rate of each epoch of the whole schedule.
        optimizer: Class of the optimizer.
        group_of: Settings of the optimizer for each trained parameter, with its `shape`.
        criterion: The task loss.
        projection: Settings of the projectors and weights of the loss terms.
        train_transforms: Training augmentation, empty where sizes are scheduled.
        sides: Pixels of the images in training and in validation.
    """

    row: dict[str, str]
    steps: int
    moved: set[str]
    lrs: list[float]
    optimizer: type
    group_of: dict[str, dict[str, Any]]
    criterion: nn.Module
    projection: dict[str, Any]
    train_transforms: list[Any]
    sides: tuple[int, int]


class TinyCifar100(torchvision.datasets.CIFAR100):
    """torchvision's CIFAR-100 with all its classes, and 8 + 4 images of noise in place of 60,000."""

    def __init__(self, root: str, train: bool, download: bool):
        assert download
        self.transform = self.target_transform = None
        number = 8 if train else 4
        self.data = np.random.default_rng(0).integers(0, 256, (number, 32, 32, 3)).astype(np.uint8)
        self.targets = list(range(number))
        self.class_to_idx = {str(c): c for c in range(100)}


@pytest.fixture(scope='module')
def eight_images(tmp_path_factory) -> Path:
    """A folder of 8 + 4 images of noise in 2 classes."""
    root = tmp_path_factory.mktemp('images')
    rng = np.random.default_rng(0)
    for split, number in (('train', 4), ('val', 2)):
        for name in ('ant', 'bee'):
            (root / split / name).mkdir(parents=True)
            for i in range(number):
                pixels = rng.integers(0, 256, (72, 72, 3)).astype(np.uint8)
                Image.fromarray(pixels).save(root / split / name / f'{i}.png')
    return root


@pytest.fixture(scope='module')
def build(eight_images, tmp_path_factory) -> Callable[[str], Built]:
    """A function that builds a recipe and runs an epoch of it, once for all tests that ask for it."""
    done: dict[str, Built] = {}

    def build_once(recipe: str) -> Built:
        if recipe not in done:
            folder = tmp_path_factory.mktemp(recipe)
            try:
                done[recipe] = _build(recipe, folder, eight_images)
            finally:
                shutil.rmtree(folder)  # the checkpoints of all recipes are more than a gigabyte
        return done[recipe]

    return build_once


def _build(recipe: str, folder: Path, images: Path) -> Built:
    argv = ['-c', path_of(recipe), '--output', str(folder), '--experiment', 'run', '--stop-epoch', '1']
    argv += ['-b', '4', '-j', '0', '--device', 'cpu']
    if recipe in CIFAR:
        # the dict around the weights is that of the zoo which the recipe names
        state_dict = timm.create_model(settings(recipe)['teacher']).state_dict()
        torch.save({'epoch': 240, 'model': state_dict}, folder / 'teacher.pth')
        argv += ['--data-dir', str(folder), '--teacher-checkpoint', str(folder / 'teacher.pth')]
    else:
        argv += [str(images), '--no-teacher-pretrained', *SMALL.get(recipe, ['--img-size', '64'])]
    if recipe in MODERN:  # their learning rate follows the batch: give that of the batch they are for
        argv += ['--lr', str(LR[recipe])]
    found, fit = {}, Trainer.fit

    def fit_and_look(trainer):
        params = dict(trainer.task.get_trainable_module().named_parameters())
        before = {name: p.detach().clone() for name, p in params.items()}
        steps = []
        trainer.optimizer.register_step_post_hook(lambda *_: steps.append(1))
        fit(trainer)
        moved = {name for name, p in params.items() if not torch.equal(p, before[name])}
        found.update(_look(trainer, params), steps=len(steps), moved=moved)

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(dataset_factory._TORCH_BASIC_DS, 'cifar100', TinyCifar100)
        patch.setattr(Trainer, 'fit', fit_and_look)
        run(argv)
    (row,) = summary(folder / 'run')
    return Built(row=row, **found)


def _look(trainer: Any, params: dict[str, nn.Parameter]) -> dict[str, Any]:
    task, data = trainer.task, trainer.data
    terms = {name: getattr(task, f'{name}_loss_weight') for name in ('task', 'distill', 'kd')}
    projection = {name: getattr(task.projection, name) for name in ('num_projectors', 'projector', 'act')}
    transform = getattr(data.train.dataset.dataset, 'transform', None)
    return {
        'group_of': _group_of(trainer.optimizer, params),
        'lrs': _lrs(trainer),
        'optimizer': type(trainer.optimizer),
        'criterion': task.criterion,
        'projection': projection | terms,
        'train_transforms': transform.transforms if transform else [],
        'sides': (first_batch(data.train)[0].shape[-1], next(iter(data.eval))[0].shape[-1]),
    }


def _group_of(optimizer: torch.optim.Optimizer, params: dict[str, nn.Parameter]) -> dict[str, dict[str, Any]]:
    """Settings of each parameter; each must be in one group."""
    name_of = {id(p): name for name, p in params.items()}
    grouped = [(name_of[id(p)], p, group) for group in optimizer.param_groups for p in group['params']]
    assert sorted(name for name, _, _ in grouped) == sorted(params)
    return {name: {'shape': p.shape, **{k: v for k, v in g.items() if k != 'params'}} for name, p, g in grouped}


def _lrs(trainer: Any) -> list[float]:
    """The learning rate in each epoch: what the loop over epochs would ask its scheduler for before that epoch."""
    lrs = []
    for epoch in range(trainer.config.epochs):
        trainer.scheduler.step(epoch)
        (lr,) = {group['lr'] for group in trainer.optimizer.param_groups}
        lrs.append(lr)
    return lrs


def path_of(recipe: str) -> str:
    return str(FOLDER / f'{recipe}.yaml')


def settings(recipe: str) -> dict[str, Any]:
    return yaml.safe_load(Path(path_of(recipe)).read_text())


def parse_head(recipe: str) -> tuple[RunConfig, int]:
    """Arguments and number of ranks of the command in the head of a recipe."""
    head = Path(path_of(recipe)).read_text().split('\nmodel:')[0]
    (command,) = re.findall(r'^#   (\S.*?(?:\\\n.*)?)$', head, re.MULTILINE)
    words = shlex.split(command.replace('\\\n#', ' '))
    if words[0] == './distributed_train.sh':
        world_size, argv = int(words[1]), words[2:]
    else:
        assert words[:2] == ['python', 'train_distill.py']
        world_size, argv = 1, words[2:]
    assert f'hparams/{recipe}.yaml' in argv
    return parse_config([word.replace('hparams', str(FOLDER)) for word in argv]), world_size


@pytest.mark.parametrize('recipe', RECIPES)
def test_a_recipe_builds_everything_and_takes_two_steps(recipe, build):
    built = build(recipe)
    assert built.steps == 2
    terms = {k: float(v) for k, v in built.row.items()}
    assert np.isfinite(list(terms.values())).all()
    assert terms['train_loss'] == pytest.approx(terms['train_task_loss'] + 25 * terms['train_pe_loss'], rel=1e-4)
    assert terms['train_pe_loss'] > 0
    projectors = {name for name in built.group_of if name.startswith('projection.')}
    assert len(projectors) == 2  # one matrix and its bias
    assert projectors <= built.moved
    assert len(built.moved) > 0.9 * len(built.group_of)


@pytest.mark.parametrize('recipe', RECIPES)
def test_the_command_of_a_recipe_gives_its_global_batch_and_learning_rate(recipe):
    args, world_size = parse_head(recipe)
    assert args.batch_size * world_size * args.grad_accum_steps == GLOBAL_BATCH[recipe]
    assert learning_rate(args, world_size) == pytest.approx(LR[recipe], rel=1e-9)
    assert (args.dataset, bool(args.teacher_checkpoint)) == (
        ('torch/cifar100', True) if recipe in CIFAR else ('', False)
    )


@pytest.mark.parametrize('recipe', RECIPES)
def test_a_recipe_sees_images_of_the_right_size_and_normalization(recipe):
    args = parse_config(['data', '-c', path_of(recipe)])
    config = resolve_input_data_config(timm.create_model(args.model), args=args.as_dict())
    size, crop_pct, norm = 224, 0.875, IMAGENET_NORM
    if recipe in CIFAR:
        size, crop_pct, norm = 32, 1.0, CIFAR_NORM
    elif recipe == A3:
        crop_pct = 0.95
    elif recipe == VIT:
        crop_pct, norm = 0.9, ((0.5,) * 3, (0.5,) * 3)
    assert config['input_size'] == (3, size, size)
    assert config['crop_pct'] == crop_pct
    assert (tuple(config['mean']), tuple(config['std'])) == norm
    assert config['interpolation'] == ('bilinear' if recipe in IMAGENET else 'bicubic')


@pytest.mark.parametrize('recipe', PAPER)
def test_a_paper_recipe_is_plain_momentum_with_decay_on_every_parameter(recipe, build):
    built = build(recipe)
    assert built.optimizer is torch.optim.SGD
    assert {len(group['shape']) for group in built.group_of.values()} == {1, 2, 4}  # biases, norms, matrices, kernels
    for name, group in built.group_of.items():
        assert (group['momentum'], group['dampening'], group['nesterov']) == (0.9, 0, False), name
        assert group['weight_decay'] == DECAY[recipe], name


@pytest.mark.parametrize('recipe', PAPER)
def test_the_learning_rate_of_a_paper_recipe_falls_after_its_milestones_and_nowhere_else(recipe, build):
    epochs, *milestones = EPOCHS[recipe]
    expected = [LR[recipe] / 10 ** sum(epoch >= m for m in milestones) for epoch in range(epochs)]
    assert build(recipe).lrs == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize('recipe', PAPER)
def test_the_loss_of_a_paper_recipe_is_cross_entropy_and_25_times_the_direction_of_three_relu_projectors(recipe, build):
    built = build(recipe)
    assert type(built.criterion) is nn.CrossEntropyLoss
    assert built.criterion.label_smoothing == 0
    expected = {'num_projectors': 3, 'projector': 'linear', 'act': 'relu', 'task': 1, 'distill': 25, 'kd': 0}
    assert built.projection == expected
    assert float(built.row['train_pe_loss']) < 2  # 1 - cosine


@pytest.mark.parametrize('recipe', PAPER)
def test_a_paper_recipe_crops_and_flips_and_does_nothing_else(recipe, build):
    *crops, flip, jitter, to_tensor = build(recipe).train_transforms
    if recipe in CIFAR:
        resize, crop = crops
        assert resize.size == crop.size == (32, 32)  # images of 32 pixels pass through the first
        assert (crop.padding, crop.fill, crop.padding_mode) == (4, 0, 'constant')
    else:
        (crop,) = crops
        assert (crop.scale, str(crop.interpolation)) == ((0.08, 1.0), 'InterpolationMode.BILINEAR')
        assert crop.ratio == pytest.approx((3 / 4, 4 / 3))
    assert (type(flip).__name__, flip.p) == ('RandomHorizontalFlip', 0.5)
    assert {jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue} == {None}
    assert type(to_tensor).__name__ == 'MaybePILToTensor'


def test_paper_recipes_of_one_data_set_differ_in_their_pair_and_what_belongs_to_it():
    for recipes, of_the_pair in ((CIFAR, {'model', 'teacher', 'lr'}), (IMAGENET, {'model', 'teacher', 'mean', 'std'})):
        rest = [{k: v for k, v in settings(r).items() if k not in of_the_pair} for r in recipes]
        assert all(r == rest[0] for r in rest)
        assert len({(settings(r)['model'], settings(r)['teacher']) for r in recipes}) == len(recipes)


@pytest.mark.parametrize('recipe', MODERN)
def test_a_modern_recipe_warms_up_then_falls_as_a_cosine_and_decays_matrices_alone(recipe, build):
    built = build(recipe)
    epochs, start, end = {A3: (100, 1e-4, 1e-6), VIT: (300, 1e-6, 1e-5)}[recipe]
    assert len(built.lrs) == epochs
    assert built.lrs[0] == pytest.approx(start)
    cosine = [end + (LR[recipe] - end) * (1 + np.cos(np.pi * epoch / epochs)) / 2 for epoch in range(5, epochs)]
    assert built.lrs[5:] == pytest.approx(cosine, rel=1e-6)
    expected = {'num_projectors': 3, 'projector': 'linear', 'act': 'relu', 'task': 1, 'distill': 25, 'kd': 0}
    assert built.projection == expected
    for name, group in built.group_of.items():
        decays = len(group['shape']) > 1 and name.rpartition('.')[2] not in ('cls_token', 'pos_embed')
        assert group['weight_decay'] == (DECAY[recipe] if decays else 0), name


def test_a_modern_recipe_follows_another_batch_linearly_or_by_the_square_root_under_lamb():
    for recipe, expected in ((A3, 8e-3 / 8**0.5), (VIT, 1e-3 / 8)):
        args, world_size = parse_head(recipe)
        assert learning_rate(args, world_size // 8) == pytest.approx(expected)


def test_the_a3_recipe_trains_small_and_sums_binary_cross_entropy_under_lamb(build):
    built = build(A3)
    assert built.optimizer is Lamb
    assert type(built.criterion) is BinaryCrossEntropy
    assert (built.criterion.sum_classes, built.criterion.target_threshold, built.criterion.smoothing) == (True, 0.2, 0)
    assert built.sides == (48, 64)
    assert settings(A3)['train_img_sizes'] == [160]
    assert built.group_of['projection.projectors.fc.weight']['shape'] == (3 * 2048, 512)


def test_the_vit_recipe_is_adamw_with_soft_targets(build):
    built = build(VIT)
    assert built.optimizer is torch.optim.AdamW
    assert type(built.criterion) is SoftTargetCrossEntropy
    assert built.group_of['projection.projectors.fc.weight']['shape'] == (3 * 3024, 192)


def test_the_table_names_every_recipe_with_its_pair():
    rows = [line.split('|') for line in (FOLDER / 'README.md').read_text().splitlines() if line.startswith('| `')]
    table = {row[1].strip(): row[2] for row in rows}
    assert set(table) == {f'`{r}.yaml`' for r in RECIPES}
    for recipe in RECIPES:
        teacher, student = (settings(recipe)[key].split('.')[0] for key in ('teacher', 'model'))
        assert f'{teacher} -> {student}' in table[f'`{recipe}.yaml`']


@pytest.mark.parametrize('recipe', RECIPES)
def test_a_recipe_takes_the_variations_of_the_readme(recipe):
    lines = (FOLDER / 'README.md').read_text().splitlines()
    variations = [shlex.split(line, comments=True) for line in lines if line.startswith('    --')]
    assert ['--teacher', ''] in variations
    for words in variations:
        args = parse_config(['data', '-c', path_of(recipe), *words])
        assert '--teacher' not in words or args.teacher == words[words.index('--teacher') + 1]
