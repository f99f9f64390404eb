"""The installed commands: `train-distill`, and `timm-pe TOOL` for the tools.

They are outside of the package because `import timm_pe` registers the CIFAR networks with timm, and timm and torch take
seconds to import. After an import of this module timm_pe/__init__.py leaves that to the command; `train-distill` reads its flags first.
"""

import difflib
import importlib
import sys
from argparse import RawDescriptionHelpFormatter

from timm_pe.config.cli import Parser, ShowVersion

TOOLS = {
    'train': 'train a model, with a teacher (as train-distill does)',
    'precompute': "fill a teacher's cache ahead of training",
    'analysis': 'look inside finished runs',
    'report': 'compare finished runs in one HTML file',
    'export': 'write a trained student for timm, ONNX or the Hugging Face hub',
    'demo': 'train a teacher, a student alone and a distilled one in minutes',
}


def train_distill() -> None:
    """The command `train-distill`."""
    from timm_pe.train.main import main

    main(prog='train-distill')


def main(argv: list[str] | None = None) -> None:
    """The command `timm-pe`: hand the arguments after its name to a tool.

    Args:
        argv: Command line; None takes that of the process.
    """
    argv = sys.argv[1:] if argv is None else argv
    parser = Parser(
        prog='timm-pe',
        usage='%(prog)s [-h] [--version] TOOL [ARGUMENT ...]',
        description='Projector ensemble feature distillation for timm.',
        epilog='\n'.join(['tools:', *(f'  {name:<12}{what}' for name, what in TOOLS.items())]),
        formatter_class=RawDescriptionHelpFormatter,
    )
    parser.add_argument('--version', action=ShowVersion)
    parser.add_argument('tool', metavar='TOOL', nargs='?', help='one of those below; TOOL --help shows its flags')
    tool = parser.parse_args(argv[:1]).tool
    if tool not in TOOLS:
        near = difflib.get_close_matches(tool or '', TOOLS, n=1)
        hint = f', did you mean {near[0]}?' if near else ':'
        what = f"unknown tool '{tool}'{hint}" if tool else 'no tool is named:'
        parser.error(f'{what} the tools are {", ".join(TOOLS)}')
    if tool != 'train':
        importlib.import_module('timm_pe.zoo')  # as `import timm_pe` does
    module = importlib.import_module('timm_pe.train.main' if tool == 'train' else f'timm_pe.{tool}')
    module.main(argv[1:], prog=f'timm-pe {tool}')
