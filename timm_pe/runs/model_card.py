"""The model card (README.md) of a student, for timm's `generate_readme`."""

import os
import re
from collections.abc import Mapping
from typing import Any, cast

import timm
import torch
import yaml

from ..errors import UsageError
from ..run_folder import RunFolder
from ..train.console import count_params, numbers
from ..train.evaluate import format_metrics
from ..version import __version__
from .compare import baseline, command, describe_method, difference, format_command
from .finished import Run, read_runs
from .student import Student

_CITATION = """\
@inproceedings{chen2022improved,
  title={Improved Feature Distillation via Projector Ensemble},
  author={Chen, Yudong and Wang, Sen and Liu, Jiajun and Xu, Xuwei and de Hoog, Frank and Huang, Zi},
  booktitle={Advances in Neural Information Processing Systems},
  year={2022}
}"""


# most class names in the card; config.json has all
_MAX_CLASSES = 20
_PREDICT = """\
import timm
{need}import torch
from PIL import Image

model = timm.create_model('local-dir:FOLDER', pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
images = transform(Image.open('image.jpg').convert('{mode}')).unsqueeze(0)
with torch.inference_mode():
    scores, labels = model(images).{scores}[0].topk({number})
names = model.pretrained_cfg.get('label_names')
for score, label in zip(scores.tolist(), labels.tolist()):
    print(f'{{names[label] if names else label}}: {{score:.3f}}')"""
_FEATURES = """\
import timm
{need}import torch
from PIL import Image

backbone = timm.create_model('local-dir:FOLDER', pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(backbone), is_training=False)
images = transform(Image.open('image.jpg').convert('{mode}')).unsqueeze(0)
with torch.inference_mode():
    features = backbone(images)
# to fine-tune with a new classifier of N classes, or to read its feature maps
model = timm.create_model('local-dir:FOLDER', pretrained=True, num_classes=N)
maps = timm.create_model('local-dir:FOLDER', pretrained=True, features_only=True)"""
_PREDICT_ONNX = """\
import onnxruntime

session = onnxruntime.InferenceSession('FOLDER/model.onnx')
({output},) = session.run(None, {{'image': images.numpy()}})  # `images` as above, any number of them"""


def task_of(student: Student) -> str:
    """What a student is for, as a hub names it."""
    return 'image-classification' if student.model.num_classes else 'image-feature-extraction'


def model_card(student: Student, license: str, onnx: bool = False) -> dict[str, Any]:
    """The input from which timm's `generate_readme` makes the README.md.

    User input is put into code spans and code blocks, where neither Markdown nor HTML is interpreted.

    Args:
        student: The student.
        license: Identifier of the licence of its weights.
        onnx: Whether there is a model.onnx beside them.
    """
    run, args, num_classes = student.run, student.run.args, cast(int, student.model.num_classes)
    data = args['dataset'] or ' '.join(map(_shown, run.data_folders))
    others = ' '.join(map(_shown, args['unlabeled']))
    row = run.exported
    details = {
        'Architecture': f'{_code(student.architecture)}, {count_params(student.model):,} parameters',
        'Classes': _classes(student, num_classes),
        'Input': f'{"x".join(map(str, student.data_config["input_size"]))}, mean {numbers(student.data_config["mean"])}, '
        f'std {numbers(student.data_config["std"])}',
        'Teacher': _code(_shown(run.teacher)) if run.teacher else 'none',
        'Method': _code(describe_method(run)),
        'Data': _code(data) + (f', and without labels {_code(others)}' if others and run.has_labels else ''),
        'Validated on': _validated_on(student),
        'Validation': _describe_row(run, row, num_classes) if row else 'not validated',
        **_beside_the_student_alone(run),
        'Trained with': f'timm_pe {__version__}, timm {timm.__version__}, torch {torch.__version__}',
    }
    taught = ', distilled from another network' if run.teacher else ''
    card = {
        'license': license,
        # timm writes this line unchanged, and has no field for the lines after it
        'library_name': f'timm\n{_model_index(student, data, row)}'.rstrip(),
        'tags': [
            task_of(student),
            'timm',
            *(['knowledge-distillation'] if run.teacher else []),
        ],
        'description': f'A {"student" if num_classes else "backbone"} trained with timm_pe{taught}.',
        'details': details,
        'usage': _usage(student, num_classes, onnx),
    }
    return {**card, 'citation': _CITATION} if args.get('teacher') else card


def _usage(student: Student, num_classes: int, onnx: bool) -> str:
    need = '' if student.package == 'timm' else f'import {student.package}  # registers the architecture\n'
    predict = (_PREDICT if num_classes else _FEATURES).format(
        need=need,
        mode=student.run.args['input_img_mode'] or ('RGB' if student.data_config['input_size'][0] == 3 else 'L'),
        scores='sigmoid()' if student.run.args['task'] == 'multilabel' else 'softmax(dim=1)',
        number=min(5, num_classes),
    )
    notes = 'For a repository on the hub the name is `hf-hub:OWNER/NAME`.'
    if need:
        notes += f' The architecture is not one of timm: `import {student.package}` is needed before.'
    chunks = [[word if word.startswith('-') else _shown(word) for word in chunk] for chunk in command(student.run)]
    parts = [
        _block(predict, 'python'),
        notes,
        *(
            ['In ONNX:', _block(_PREDICT_ONNX.format(output='logits' if num_classes else 'features'), 'python')]
            if onnx
            else []
        ),
        '## Limitations',
        _limitations(student, num_classes),
        f'## Training\n{_block(format_command(chunks), "sh")}',
        'Absolute paths are shown by their last part.',
    ]
    return '\n\n'.join(parts)


def _limitations(student: Student, num_classes: int) -> str:
    bias = 'What its teacher and its data have of bias, it may have too.'
    if not num_classes:
        return f'It gives features, no classes: they were measured against those of its teacher, not on a task. {bias}'
    many = 'some of them, or none,' if student.run.args['task'] == 'multilabel' else 'one of them'
    return (
        f'It knows its own classes alone and gives {many} for any image. Its accuracy was measured on one split of one data '
        f'set; on images of other origin it may be lower. {bias}'
    )


def _validated_on(student: Student) -> str:
    args = student.run.args
    if not student.run.has_labels:
        return 'images held out of training, chosen by their content'
    return f'split {_code(args["val_split"])}, ' + (
        f'{student.images:,} images' if student.images else 'of unknown size'
    )


def _classes(student: Student, num_classes: int) -> str:
    if not num_classes:
        return 'none, it gives features'
    names = student.label_names or []
    if not names:
        return str(num_classes)
    shown = ', '.join(_code(name) for name in names[:_MAX_CLASSES])
    rest = f' and {num_classes - _MAX_CLASSES} more, in config.json' if num_classes > _MAX_CLASSES else ''
    return f'{num_classes}: {shown}{rest}'


def _metrics(row: Mapping[str, float | None]) -> dict[str, float]:
    return {k.removeprefix('eval_'): v for k, v in row.items() if k and k.startswith('eval_') and v is not None}


def _describe_row(run: Run, row: Mapping[str, float | None], num_classes: int) -> str:
    name, rows = run.ranking, run.ranked
    which = 'the best' if row[f'eval_{name}'] == run.highest[f'eval_{name}'] else 'one'
    shown = format_metrics({'loss': float('nan'), **_metrics(row)}, num_classes).replace('  ', ', ')
    return (
        f'{shown} (epoch {cast(float, row["epoch"]) + 1:.0f}, {which} of {len(rows)} validated by {name}; '
        f'the last one has {rows[-1][f"eval_{name}"]:.3f})'
    )


def _beside_the_student_alone(run: Run) -> dict[str, str]:
    """The result of the same student without a teacher, if there is such a run beside this one."""
    if not run.teacher:
        return {}
    folders = [
        path for path in sorted(run.folder.path.resolve().parent.iterdir()) if RunFolder(path).summary_file.exists()
    ]
    try:
        others = read_runs([path for path in folders if path != run.folder.path.resolve()])
    except UsageError:  # an unreadable run must not prevent the export
        return {}
    alone, points = baseline(run, others), difference(run, others)
    if alone is None or points is None:
        return {}
    final = cast(float, alone.final['eval_top1'])
    return {'Student alone': f'top-1 {final:.3f} % after its last epoch; with the teacher {final + points:.3f} % after the last ({points:+.3f} points, seed {run.args["seed"]})'}  # fmt: skip


def _model_index(student: Student, data: str, row: Mapping[str, float | None]) -> str:
    """The metadata from which a hub reads the metrics; '' if there are none."""
    metrics = _metrics(row)
    kinds = {'top1': ('accuracy', 'top-1'), 'map': ('mAP', 'mAP')}
    measured = [{'type': kinds[k][0], 'name': kinds[k][1], 'value': v} for k, v in metrics.items() if k in kinds]
    if not measured:
        return ''
    name = re.sub(r'[^\w .-]', '_', data)  # the hub shows it as it is
    dataset = {'name': name, 'type': name, 'split': student.run.args['val_split']}
    result = {'task': {'type': 'image-classification'}, 'dataset': dataset, 'metrics': measured}
    index = [{'name': student.architecture, 'results': [result]}]
    return yaml.safe_dump({'model-index': index}, sort_keys=False, allow_unicode=True)


def _shown(path: str) -> str:
    """An absolute path without its parent folders, which should not be public on a hub."""
    absolute = os.path.isabs(path) or os.path.isabs(path.split(':')[-1])
    return os.path.basename(os.path.normpath(path)) if '/' in path and absolute else path


def _fence(text: str, least: int) -> str:
    return '`' * max(least, 1 + max(map(len, re.findall('`+', text)), default=0))


def _code(text: str) -> str:
    text = ' '.join(text.split())
    fence = _fence(text, 1)
    return f'{fence} {text} {fence}' if '`' in text else f'{fence}{text}{fence}'


def _block(text: str, language: str) -> str:
    fence = _fence(text, 3)
    return f'{fence}{language}\n{text}\n{fence}'
