"""Run folders as train_distill and the analysis leave them, made up by hand: what the tests of the report read."""

import base64
import io
import json
from pathlib import Path
from typing import Any

import torch
import yaml
from PIL import Image
from safetensors.torch import save_file

from timm_pe.config.run_config import create_parser
from timm_pe.runs import plots

EPOCHS = 4
# a name that a page must show and not run
HOSTILE = '<script>alert(1)</script>'


def make_run(
    parent: Path,
    name: str,
    top1: float = 80.0,
    teacher: str | None = None,
    analysed: bool = True,
    class_names: tuple[str, ...] = ('ant', 'bee', 'cat'),
    **args: Any,
) -> Path:
    """A run folder whose top-1 is `top1` after the last epoch and 0.5 more in the epoch before."""
    folder = parent / name
    folder.mkdir(parents=True)
    values = vars(create_parser().parse_args([]))
    values.update({'model': 'test_vit', 'dataset': 'sklearn/digits', 'experiment': name, 'teacher': teacher})
    values.update({'epochs': EPOCHS, **args})
    (folder / 'args.yaml').write_text(yaml.safe_dump(values))
    terms = ['train_task_loss', 'train_pe_loss'] if teacher else []
    columns = ['epoch', 'train_loss', *terms, 'train_images_per_s', 'eval_loss', 'eval_top1', 'eval_top5', 'lr']
    lines = [','.join(columns)]
    for epoch in range(EPOCHS):
        shown = {0: top1 - 30, 2: top1 + 0.5, 3: top1}.get(epoch)  # epoch 1 was not validated
        validated = ['', '', ''] if shown is None else [f'{1 - shown / 100}', f'{shown}', '99.5']
        losses = [str(2 / (1 + epoch))] * (1 + len(terms))
        lines.append(','.join([str(epoch), *losses, '1000', *validated, '0.01']))
    (folder / 'summary.csv').write_text('\n'.join(lines) + '\n')
    buffers = {'bn.running_mean': torch.zeros(5), 'bn.num_batches_tracked': torch.tensor(3)}
    save_file({'fc.weight': torch.zeros(3, 4), 'fc.bias': torch.zeros(3), **buffers}, folder / 'student.safetensors')
    if analysed:
        result = analysis(folder.name, top1, teacher, class_names)
        (folder / 'analysis.json').write_text(json.dumps(result))
        (folder / 'figures').mkdir()
        plots.save_png(
            plots.projector_similarity([[1, 0.4], [0.4, 1]]), folder / 'figures' / 'projector_similarity.png'
        )
    return folder


def analysis(name: str, top1: float, teacher: str | None, class_names: tuple[str, ...]) -> dict[str, Any]:
    """What the analysis of a run says, on the parts that a report shows."""
    bins = [
        {'low': i / 15, 'high': (i + 1) / 15, 'count': i, 'confidence': (i + 0.5) / 15, 'accuracy': i / 15}
        for i in range(15)
    ]
    bins[0].update(confidence=None, accuracy=None)
    return {
        'run': name,
        'checkpoint': 'last',
        'epoch': EPOCHS - 1,
        'params': 1234567,
        'compared_with': 'cifar_resnet20',
        'teacher_weights': ['6a1f'],
        'class_names': list(class_names),
        'validation': {'top1': top1},
        'gap_top1': 100 - top1,
        'agreement': {'train': 96.0, 'validation': top1 - 1},
        'cosine': {'train': 0.9, 'validation': 0.85} if teacher else None,
        'cka': {'train': 0.8, 'validation': 0.75},
        'discriminability': {'linear_probe_top1': top1 + 1, 'between_over_within': 3.5},
        'calibration': {'ece': 0.05, 'bins': bins},
        'projectors': {'q': 2, 'act': 'relu', 'output_cosine': 0.4, 'ensemble_gain': -0.01} if teacher else None,
        'samples': [
            {
                'image': picture(shade),
                'label': shade % 3,
                'student': {'class': shade % 2, 'confidence': 0.6},
                'teacher': {'class': shade % 3, 'confidence': 0.9},
            }
            for shade in range(6)
        ],
    }


def picture(shade: int) -> str:
    """A small grey PNG as data URI."""
    file = io.BytesIO()
    Image.new('L', (8, 8), 40 * shade).save(file, 'png')
    return f'data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}'


def make_family(parent: Path, seeds: int = 1, **args: Any) -> list[Path]:
    """A teacher, and for each seed a student alone and one with that teacher, 5 points better."""
    teacher = make_run(parent, 'teacher', 98.0, model='cifar_resnet20', **args)
    runs = [teacher]
    for seed in range(1, seeds + 1):
        runs.append(make_run(parent, f'student-{seed}', 80.0 + seed, seed=seed, **args))
    for seed in range(1, seeds + 1):
        taught = {'teacher': 'cifar_resnet20', 'teacher_checkpoint': str(teacher)}
        runs.append(make_run(parent, f'student_pe-{seed}', 85.0 + 2 * seed, seed=seed, **taught, **args))
    return runs
