"""The numbers of analyses as bars of the report."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from .compare import Group, teaches
from .finished import Run

# heading, path in analysis.json, digits, unit, end of the scale (None: the highest value), meaning, and what is better:
# more ('↑'), less ('↓'), or neither ('')
_MEASURES = (
    ('Agreement with the teacher', 'agreement.validation', 1, ' %', 100, 'Validation images for which both predict the same class.', '↑'),
    ('CKA with the teacher', 'cka.validation', 3, '', 1, 'Similarity of the two feature spaces: 0 unrelated, 1 equal up to rotation and scale.', ''),
    ('Projection along the teacher', 'cosine.validation', 3, '', 1, "Mean cosine between averaged projection and teacher's feature: what the loss asks for.", '↑'),
    ('Maps along the teacher', 'map_cosine.validation', 3, '', 1, "Mean cosine between projected map and teacher's map, position by position.", '↑'),
    ('Linear probe', 'discriminability.linear_probe_top1', 2, ' %', 100, "Top-1 of a linear classifier fitted on the student's own features.", '↑'),
    ('Classes apart', 'discriminability.between_over_within', 2, '', None, 'Between-class over within-class scatter of the own features.', '↑'),
    ('Generalization gap', 'gap_top1', 2, ' points', None, 'Top-1 on training images minus top-1 on validation images.', '↓'),
    ('Calibration error', 'calibration.ece', 3, '', None, 'Mean distance between confidence and accuracy (ECE, 15 bins).', '↓'),
    ('Projector similarity', 'projectors.output_cosine', 3, '', 1, 'Mean cosine between the outputs of two projectors: at 1 they would be copies of one.', ''),
    ('Gain of the ensemble', 'projectors.ensemble_gain', 3, '', 1, "Cosine of the averaged projection with the teacher's feature, minus that of the best single projector.", '↑'),
)  # fmt: skip
_BETTER = {'↑': '↑ higher is better', '↓': '↓ lower is better', '': ''}
_WITH_TEACHER = ('agreement', 'cka', 'cosine', 'map_cosine')


def dig(analysis: Mapping[str, Any] | None, path: str) -> Any:
    """The value under a dotted path; None if any part of it is missing."""
    value: Any = analysis
    for key in path.split('.'):
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def draw_bars(groups: Sequence[Group], path: str, end: float | None = None) -> list[dict[str, Any]]:
    """One bar per group for a number of analysis.json, its mean over the seeds.

    Args:
        groups: Groups of runs.
        path: Dotted path of the number.
        end: Value of a bar of full length; None means the highest mean.

    Returns:
        For each group that has the number: the group, its `value` (mean, std), and `start` and `width` of its bar in
        percent of a track from 0, or the lowest mean if that is lower, to `end`.
    """
    means_of_all = [(group, *group.mean(lambda run: dig(run.analysis, path))) for group in groups]
    found = [(group, mean, std) for group, mean, std in means_of_all if mean is not None]
    means = [0.0, end or 0.0, *(mean for _, mean, _ in found)]
    low, scale = min(means), 100 / (max(means) - min(means) or 1)
    return [
        {'group': group, 'value': (mean, std), 'start': (min(mean, 0) - low) * scale, 'width': abs(mean) * scale}
        for group, mean, std in found
    ]


def draw_measures(groups: Sequence[Group], runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Bars of each measure that some group has: title, note, digits, unit, which way is better, bars."""
    students = [group for group in groups if not any(teaches(run, runs) for run in group.runs)]
    found = []
    for title, path, digits, unit, end, note, better in _measures_of(runs):
        bars = draw_bars(students if path.split('.')[0] in (*_WITH_TEACHER, 'teachers') else groups, path, end)
        if bars:
            found.append(
                {'title': title, 'note': note, 'digits': digits, 'unit': unit, 'better': _BETTER[better], 'bars': bars}
            )
    return found


def _measures_of(runs: Sequence[Run]) -> Iterator[tuple[Any, ...]]:
    """The measures, where runs have several teachers followed by that of each."""
    names = dict.fromkeys(name for run in runs for name in (run.analysis or {}).get('teachers', ()))
    for title, path, *rest in _MEASURES:
        yield title, path, *rest
        if path.split('.')[0] in _WITH_TEACHER:
            for name in names:
                yield title.replace('the teacher', name), f'teachers.{name}.{path}', *rest
