"""Recipes by their names: the YAML files of hparams/, which ship inside the package."""

import difflib
import os
from pathlib import Path

# in the repository, a symlink to the top-level hparams/
_FOLDER = Path(__file__).parent.parent / 'hparams'


def list_recipes() -> list[str]:
    """Names that `-c` takes, sorted."""
    return sorted(path.stem for path in _FOLDER.glob('*.yaml'))


def find_config(name: str) -> str:
    """The file that `-c` means: a path, or the name of a recipe with or without '.yaml'. An existing file takes
    precedence.

    Raises:
        ValueError: It is neither; the message suggests similar names.
    """
    recipe = name.removesuffix('.yaml')
    if os.path.lexists(name) or os.path.basename(name) != name:
        return name
    if recipe in list_recipes():
        return str(_FOLDER / f'{recipe}.yaml')
    near = difflib.get_close_matches(recipe, list_recipes(), n=3, cutoff=0.5)
    hint = f'did you mean {", ".join(near)}?' if near else f'which are {", ".join(list_recipes())}'
    raise ValueError(f"cannot read '{name}': no such file, and none of the recipes, {hint}")
