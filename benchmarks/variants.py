"""Training steps to measure: distillation, its floor, timm's own task, the loop of papers."""

import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.task import FeatureDistillationTask, TrainingTask

from timm_pe import ProjectorEnsembleTask, Teacher, TeacherOutput
from timm_pe.config.run_config import parse_config
from timm_pe.process.runtime import Runtime
from timm_pe.train.meters import LossMeter
from timm_pe.train.teacher_precision import choose_precision

CLASSES = 1000

Step = Callable[[int], None]


@dataclass
class Case:
    """One pair at one batch size.

    Attributes:
        teacher: timm name of the teacher.
        student: timm name of the student.
        batch_size: Images in a batch.
        image_size: Side of the images in pixels.
        device: 'cpu' or 'cuda'.
    """

    teacher: str
    student: str
    batch_size: int
    image_size: int
    device: str

    def create_model(self, name: str) -> nn.Module:
        """A model on the device, with the same random weights each time."""
        torch.manual_seed(0)
        fixed = timm.get_pretrained_cfg(name).fixed_input_size
        with torch.device(self.device):  # to draw the weights there is faster
            return timm.create_model(name, num_classes=CLASSES, **({'img_size': self.image_size} if fixed else {}))

    def create_teacher(self, **kwargs: Any) -> Teacher:
        """A teacher without logits; batches are in the student's normalization."""
        cfg = timm.get_pretrained_cfg(self.student)
        model = self.create_model(self.teacher)
        return Teacher(model, cfg.mean, cfg.std, device=self.device, needs_logits=False, **kwargs)

    def as_command_line(self, **kwargs: Any) -> dict[str, Any]:
        """Arguments that train_distill gives its teacher, and more."""
        return {'fold': True, 'channels_last': self.device == 'cpu', **kwargs}

    def size(self) -> dict[str, int]:
        """Its batch size and image size."""
        return {'batch_size': self.batch_size, 'image_size': self.image_size}

    def variants(self) -> list[str]:
        """The variants measured for this pair; folded ones are omitted if the teacher has nothing to fold."""
        folds = self.create_teacher(fold=True).folded > 0
        return [name for name in VARIANTS if folds or not name.endswith('_folded')]

    @cached_property
    def batches(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Four random batches of images and labels on the device."""
        torch.manual_seed(1)
        shape = (self.batch_size, 3, self.image_size, self.image_size)
        images = [torch.randn(shape).to(self.device) for _ in range(4)]
        return [(x, torch.randint(CLASSES, (self.batch_size,)).to(self.device)) for x in images]


def create_optimizer(parameters: Any) -> torch.optim.Optimizer:
    """The optimizer of every variant."""
    return torch.optim.SGD(parameters, lr=0.01, momentum=0.9, weight_decay=1e-4)


def student_alone(case: Case) -> Step:
    """Forward, cross-entropy, backward and optimizer: one part of the floor."""
    student, batches = case.create_model(case.student).train(), case.batches
    optimizer = create_optimizer(student.parameters())

    def step(i: int) -> None:
        input, target = batches[i % len(batches)]
        loss = F.cross_entropy(student(input), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def teacher_alone(case: Case) -> Step:
    """The bare network up to its feature, without any wrapper: the other part of the floor."""
    network, batches = case.create_model(case.teacher).eval().requires_grad_(False), case.batches

    @torch.no_grad()
    def step(i: int) -> None:
        network.forward_head(network.forward_features(batches[i % len(batches)][0]), pre_logits=True)

    return step


def our_teacher(case: Case, **kwargs: Any) -> Step:
    """Forward of our teacher."""
    teacher, batches = case.create_teacher(**kwargs), case.batches
    return lambda i: teacher(batches[i % len(batches)][0])


def our_task(case: Case, **teacher_kwargs: Any) -> ProjectorEnsembleTask:
    """Our task, by default with the teacher of `ProjectorEnsembleTask(student, teacher)`: float32, nothing folded."""
    teacher = case.create_teacher(**teacher_kwargs)
    return ProjectorEnsembleTask(case.create_model(case.student), teacher, device=case.device, verbose=False).train()


def task_step(task: TrainingTask, case: Case, teacher: Callable[[int], TeacherOutput] | None = None) -> Step:
    """A step as the engine makes it: task, backward, optimizer, running means of the losses on the device."""
    batches, optimizer = case.batches, create_optimizer(task.trainable_module.parameters())
    meter, late_zero = LossMeter(torch.device(case.device), distributed=False), torch.device(case.device).type == 'cpu'

    def step(i: int) -> None:
        result = task(*batches[i % len(batches)], **({'teacher': teacher(i)} if teacher else {}))
        if late_zero:
            optimizer.zero_grad()
        result['loss'].backward()
        optimizer.step()
        meter.update({k: v for k, v in result.items() if k != 'output'}, case.batch_size)
        if not late_zero:
            optimizer.zero_grad()

    return step


def ours(case: Case, **teacher_kwargs: Any) -> Step:
    """Our step with the teacher's forward in it."""
    return task_step(our_task(case, **teacher_kwargs), case)


def ours_default(case: Case) -> Step:
    """Our step with the teacher of train_distill's defaults: its precision is decided on the first batch."""
    config = parse_config(['--dataset', 'sklearn/digits', '--teacher', case.teacher, '--device', case.device])
    teacher, device = case.create_teacher(**case.as_command_line()), torch.device(case.device)
    # not setup_runtime's, whose settings of the process would hold for the variants to come
    runtime = Runtime(device, False, 0, 1, autocast=nullcontext, scaler=None, model_dtype=None)
    choose_precision(config, teacher, runtime, lambda: case.batches[0])
    task = ProjectorEnsembleTask(case.create_model(case.student), teacher, device=case.device, verbose=False)
    return task_step(task.train(), case)


def ours_cached(case: Case) -> Step:
    """Our step with features from a memory-mapped float16 file instead of the teacher's forward."""
    task, batches = our_task(case), case.batches
    task.resolve_act(batches[0][0])
    features = torch.cat([task.teacher(input).feature for input, _ in batches]).cpu().numpy()
    with tempfile.NamedTemporaryFile(suffix='.npy') as file:
        np.save(file, features.astype(np.float16))
        file.flush()
        rows = np.load(file.name, mmap_mode='r')  # the mapping outlives the file's name

    def read(i: int) -> TeacherOutput:
        index = np.arange(case.batch_size) + i % len(batches) * case.batch_size
        return TeacherOutput(torch.from_numpy(rows[index]).to(case.device).float(), None)

    return task_step(task, case, read)


def ours_as_many(case: Case) -> Step:
    """Our step with as many projectors as timm's task has: one if the widths differ, else none."""
    teacher, student = case.create_teacher(), case.create_model(case.student)
    equal = teacher.model.head_hidden_size == student.head_hidden_size
    kind = 'identity' if equal else 'linear'
    task = ProjectorEnsembleTask(student, teacher, num_projectors=1, projector=kind, device=case.device, verbose=False)
    return task_step(task.train(), case)


def timm_task(case: Case) -> Step:
    """timm's FeatureDistillationTask with PEFD's weights; it has one projector if the widths differ, and MSE."""
    task = FeatureDistillationTask(
        case.create_model(case.student),
        case.create_model(case.teacher),
        distill_loss_weight=25.0,
        task_loss_weight=1.0,
        device=torch.device(case.device),
        verbose=False,
    )
    return task_step(task.train(), case)


class PaperLoop:
    """A distillation loop as published with papers: projectors one by one, a cosine written out, `.item()` in every
    step.

    Args:
        student: Student.
        teacher: Teacher, both timm models.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module):
        self.student, self.teacher = student.train(), teacher.eval()
        device = next(student.parameters()).device
        widths = student.head_hidden_size, teacher.head_hidden_size
        self.projectors = nn.ModuleList(nn.Linear(*widths) for _ in range(3)).to(device)
        self.optimizer = create_optimizer([*student.parameters(), *self.projectors.parameters()])
        self.seen = self.loss_sum = self.ce_sum = self.feature_sum = self.correct = 0.0

    def __call__(self, input: torch.Tensor, target: torch.Tensor) -> None:
        with torch.no_grad():
            t = self.teacher.forward_head(self.teacher.forward_features(input), pre_logits=True)
        maps = self.student.forward_features(input)
        s = self.student.forward_head(maps, pre_logits=True)
        logits = self.student.get_classifier()(s)
        projected = 0
        for projector in self.projectors:
            projected = projected + torch.relu(projector(s))
        projected = projected / len(self.projectors)
        cosine = (projected * t).sum(1) / (projected.norm(dim=1) * t.norm(dim=1) + 1e-8)
        feature_loss = (1 - cosine).sum() / len(input)
        ce = F.cross_entropy(logits, target)
        loss = ce + 25 * feature_loss
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.seen += len(input)
        self.loss_sum += loss.item() * len(input)
        self.ce_sum += ce.item() * len(input)
        self.feature_sum += feature_loss.item() * len(input)
        self.correct += (logits.argmax(1) == target).sum().item()


def paper_loop(case: Case) -> Step:
    """See `PaperLoop`."""
    loop, batches = PaperLoop(case.create_model(case.student), case.create_model(case.teacher)), case.batches
    return lambda i: loop(*batches[i % len(batches)])


VARIANTS: dict[str, Callable[[Case], Step]] = {
    'student': student_alone,
    'teacher': teacher_alone,
    'teacher_folded': lambda case: our_teacher(case, **case.as_command_line()),
    'teacher_bf16': lambda case: our_teacher(case, **case.as_command_line(dtype=torch.bfloat16)),
    'ours': ours,
    'ours_folded': lambda case: ours(case, **case.as_command_line()),
    'ours_bf16': lambda case: ours(case, **case.as_command_line(dtype=torch.bfloat16)),
    'ours_default': ours_default,
    'ours_cached': ours_cached,
    'ours_as_many': ours_as_many,
    'timm': timm_task,
    'paper': paper_loop,
}
LABELS = {
    'student': 'student alone',
    'teacher': 'teacher forward alone',
    'teacher_folded': 'teacher forward, folded',
    'teacher_bf16': 'teacher forward, bfloat16',
    'ours': 'ours',
    'ours_folded': 'ours, folded teacher',
    'ours_bf16': 'ours, bfloat16 teacher',
    'ours_default': 'ours as train_distill runs it by default',
    'ours_cached': 'ours, cached features',
    'ours_as_many': "ours, as many projectors as timm's task",
    'timm': "timm's FeatureDistillationTask",
    'paper': 'plain loop of papers',
}
