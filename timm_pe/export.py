"""A trained student as others want it: a folder in the layout of timm and the Hugging Face hub.

    python -m timm_pe.export RUN --output DIR [--onnx] [--push-to-hub OWNER/NAME]

DIR holds model.safetensors, config.json (as timm writes it) and README.md, a model card. Plain timm loads it:
`timm.create_model('local-dir:DIR', pretrained=True)`. The folder is loaded again and compared with the student before
it becomes DIR.
"""

import argparse
import contextlib
import importlib.util
import logging
import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import push_to_hf_hub
from timm.models._hub import generate_readme, save_for_hf

from .config.cli import Parser
from .errors import UsageError, one_line
from .runs.model_card import model_card, task_of
from .runs.student import Student, read_student
from .train.console import setup_logging

PROG = 'python -m timm_pe.export'
_ONNX = 'model.onnx'
# a folder that holds only these is an earlier export, which --overwrite may replace
_FILES = {'model.safetensors', 'config.json', 'README.md', _ONNX}
_ONNX_PACKAGES = ('onnx', 'onnxscript', 'onnxruntime')
_ONNX_TOLERANCE = 1e-4


def check_output(output: Path, overwrite: bool) -> None:
    """Refuse an output path that is in use, before any work is done.

    Raises:
        UsageError: It is a file, a folder that is not empty, or with `overwrite` a folder that is not an earlier
            export.
    """
    if output.is_symlink() or (output.exists() and not output.is_dir()):
        raise UsageError(f"--output: '{output}' is no folder: choose another place")
    names = {path.name for path in output.iterdir()} if output.exists() else set()
    if names and not overwrite:
        raise UsageError(f"--output: '{output}' is not empty: choose another folder, or add --overwrite")
    if names - _FILES:
        raise UsageError(
            f"--output: '{output}' is no earlier export, it holds '{min(names - _FILES)}': --overwrite leaves it alone"
        )


@contextlib.contextmanager
def _staged(output: Path) -> Iterator[Path]:
    """A folder beside `output` that replaces it at the end, and is removed after an error."""
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f'.{output.name}.', dir=output.parent))
    except OSError as e:
        raise UsageError(f"--output: cannot write beside '{output}' ({e.strerror})") from e
    try:
        folder = staging / 'new'  # with the usual permissions: mkdtemp's are owner-only
        folder.mkdir()
        yield folder
        if output.exists():
            os.replace(output, staging / 'old')
        os.replace(folder, output)
    except OSError as e:
        raise UsageError(f"--output: cannot write '{output}' ({e.strerror or one_line(e)})") from e
    finally:
        if (staging / 'old').exists() and not output.exists():
            os.replace(staging / 'old', output)
        shutil.rmtree(staging, ignore_errors=True)


def _save_args(student: Student, license: str) -> dict[str, Any]:
    # the architecture's own tag and licence belong to other weights
    model_config: dict[str, Any] = {'pretrained_cfg': {'tag': 'timm_pe', 'license': license}}
    if student.label_names:
        model_config['label_names'] = student.label_names
    return {'model_config': model_config, 'data_config': student.data_config, 'safe_serialization': True}


def write_folder(
    student: Student, output: str | os.PathLike[str], license: str = 'unknown', onnx: bool = False
) -> None:
    """Write the folder, whole or not at all.

    Args:
        student: What to write.
        output: The folder; `check_output` says what may be there.
        license: Identifier of the licence of the weights.
        onnx: Write model.onnx too.

    Raises:
        UsageError: It cannot be written, timm cannot save or rebuild this student, or ONNX computes something else.
    """
    with _staged(Path(output).absolute()) as folder:
        try:
            save_for_hf(student.model, str(folder), **_save_args(student, license))
        except (ValueError, TypeError, RuntimeError) as e:
            raise UsageError(f'timm cannot save {student.architecture}: {one_line(e)}') from e
        card = generate_readme(model_card(student, license, onnx), student.architecture, task_of(student))
        (folder / 'README.md').write_text(card, encoding='utf-8')
        # safetensors makes its file readable by the owner only
        (folder / 'model.safetensors').chmod((folder / 'config.json').stat().st_mode)
        _check_folder(student, folder)
        if onnx:
            write_onnx(student, folder / _ONNX)


@torch.inference_mode()
def _check_folder(student: Student, folder: Path) -> None:
    """Refuse a folder from which timm does not build the same model."""
    try:
        model = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()
        images = _images(student, 2)
        same = torch.equal(model(images), student.model(images))
    except Exception as e:  # timm may fail in any way
        raise UsageError(f'timm cannot load the exported {student.architecture}: {one_line(e)}') from e
    if not same:
        raise UsageError(f'timm makes another model of the exported {student.architecture}: it is not written')


def _images(student: Student, number: int) -> torch.Tensor:
    return torch.randn(number, *student.data_config['input_size'], generator=torch.Generator().manual_seed(number))


def write_onnx(student: Student, path: Path) -> None:
    """Write the student as ONNX with any batch size, and compare it with PyTorch in onnxruntime.

    Raises:
        UsageError: A package is missing, the student cannot be exported, or its logits differ by more than 1e-4.
    """
    check_onnx_packages()
    import onnxruntime

    batch = {0: torch.export.Dim('batch', min=1, max=2**20)}  # torch 2.7 requires a maximum; ONNX has none
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # the exporter's, for its developers
            torch.onnx.export(
                student.model,
                (_images(student, 2),),
                str(path),
                dynamo=True,
                input_names=['image'],
                output_names=['logits' if student.model.num_classes else 'feature'],
                dynamic_shapes=(batch,),
                external_data=False,
                verbose=False,
            )
        session = onnxruntime.InferenceSession(str(path), providers=['CPUExecutionProvider'])
        for number in (1, 3):
            images = _images(student, number)
            with torch.inference_mode():
                expected = student.model(images)
            logits = torch.from_numpy(session.run(None, {'image': images.numpy()})[0])
            torch.testing.assert_close(logits, expected, rtol=_ONNX_TOLERANCE, atol=_ONNX_TOLERANCE)
    except AssertionError as e:
        raise UsageError(f'--onnx: {student.architecture} computes something else in ONNX: {one_line(e)}') from e
    except Exception as e:  # errors of exporter and runtime
        reason: BaseException = e
        while reason.__cause__:  # the exporter wraps it in pages of advice
            reason = reason.__cause__
        raise UsageError(f'--onnx: cannot export {student.architecture}: {one_line(reason)}') from e


def check_onnx_packages() -> None:
    """Refuse --onnx if a package for it is missing, or PyTorch is too old.

    Raises:
        UsageError: With the command that installs it.
    """
    # the exporter of older versions does not work with current onnxscript
    if torch.__version__ < (2, 7):  # type: ignore[operator]  # a TorchVersion compares itself with tuples
        raise UsageError(f'--onnx needs torch 2.7 or newer, this is {torch.__version__}')
    missing = [name for name in _ONNX_PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(f"--onnx needs {', '.join(missing)}: pip install 'timm_pe[export]'")


def push(student: Student, repo_id: str, license: str = 'unknown', private: bool = False) -> str:
    """Upload weights, configuration and model card through timm. huggingface_hub finds the token (HF_TOKEN).

    Args:
        student: What to upload.
        repo_id: 'OWNER/NAME', created if it does not exist. An existing model card is kept.
        license: Identifier of the licence of the weights.
        private: Whether a new repository is private.

    Returns:
        Address of the commit.

    Raises:
        UsageError: The hub cannot be reached, or refuses.
    """
    try:
        commit = push_to_hf_hub(
            student.model,
            repo_id,
            private=private,
            model_card=model_card(student, license),
            task_name=task_of(student),
            **_save_args(student, license),
        )
    except Exception as e:  # errors of network, hub or client
        raise UsageError(
            f"--push-to-hub: '{repo_id}' could not be uploaded ({one_line(e)}): is there a connection, does HF_TOKEN hold a "
            f'token that may write there?'
        ) from e
    return str(commit)


# The command -----------------------------------------------------------------------------------------------------------


def create_parser(prog: str = PROG) -> Parser:
    """The parser of the command line."""
    parser = Parser(prog=prog, description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add('run', metavar='RUN', help='run folder of train_distill')
    add('-o', '--output', metavar='DIR', help='folder to write; it must be new or empty')
    add('--overwrite', action='store_true', help='replace an earlier export in DIR')
    add('--onnx', action='store_true', help='write model.onnx too, checked in onnxruntime')
    add('--license', metavar='ID', default='unknown', help='licence of the weights in the model card, e.g. apache-2.0')
    add(
        '--push-to-hub',
        metavar='OWNER/NAME',
        help='upload it to the Hugging Face hub; the token is taken from HF_TOKEN',
    )
    add('--private', action='store_true', help='a repository that --push-to-hub makes is private')
    add('--data-dir', metavar='DIR', help='where the data is now, if it was moved (for the names of the classes)')
    return parser


def _check(args: argparse.Namespace) -> None:
    if not args.output and not args.push_to_hub:
        raise UsageError('say where to: --output DIR, --push-to-hub OWNER/NAME, or both')
    if args.push_to_hub and not re.fullmatch(r'[\w.-]+/[\w.-]{1,96}', args.push_to_hub, re.ASCII):
        raise UsageError(f"--push-to-hub takes OWNER/NAME, got '{args.push_to_hub}'")
    if args.private and not args.push_to_hub:
        raise UsageError('--private needs --push-to-hub')
    for flag in ('onnx', 'overwrite'):
        if getattr(args, flag) and not args.output:
            raise UsageError(f'--{flag} needs --output')
    if not re.fullmatch(r'[a-z0-9][a-z0-9.-]{0,63}', args.license):
        raise UsageError(
            f"--license takes an identifier such as apache-2.0, mit, other or unknown, got '{args.license}'"
        )
    if args.onnx:
        check_onnx_packages()
    if args.output:
        check_output(Path(args.output), args.overwrite)


def main(argv: list[str] | None = None, prog: str = PROG) -> None:
    """Export a run.

    Args:
        argv: Command line; None takes that of the process.
        prog: Command to name in messages.
    """
    parser = create_parser(prog)
    args = parser.parse_args(argv)
    setup_logging(logging.WARNING)
    try:
        _check(args)
        student = read_student(args.run, args.data_dir)
        if args.output:
            write_folder(student, args.output, args.license, args.onnx)
            need = '' if student.package == 'timm' else f'after import {student.package}, '
            classes = '' if student.model.num_classes else ', num_classes=N'
            print(f"{args.output}: {need}timm.create_model('local-dir:{args.output}', pretrained=True{classes})")
        if args.push_to_hub:
            print(push(student, args.push_to_hub, args.license, args.private))
    except UsageError as e:
        parser.error(str(e))


if __name__ == '__main__':
    main()
