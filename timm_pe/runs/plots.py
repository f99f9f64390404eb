"""Figures of runs: each function draws one matplotlib Figure from plain numbers.

Backgrounds are transparent and text and axes are mid-grey, so that a figure is readable on light and dark pages.
Nothing here touches pyplot or the global style: a figure depends on its arguments only.
"""

import functools
import io
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from ..process.files import replaced

# of text, axes and grid: as far from white as from black
INK = '#7a7a7a'
COLORS = ('#3b82c4', '#e07b1a', '#3a9d5d', '#c9485b', '#9467bd', '#1f9e9e', '#b8860b', '#8c6d5a')
# index in COLORS of each role that a run can have, the same in every figure
ALONE, TAUGHT, TEACHER = 0, 1, 4
_DASHES = ('-', '--', ':', '-.')
# beyond this number the labels of a matrix are unreadable
_MAX_LABELS = 100


def learning_curves(rows: Sequence[Mapping[str, Any]], columns: Sequence[str], color: int = ALONE) -> Figure:
    """Columns of a run's summary.csv by epoch, one panel per column.

    Args:
        rows: Its rows; values may be numbers, their text, or None or '' for an epoch without one.
        columns: Columns to draw, e.g. 'eval_top1'. One that the run does not have is left out.
        color: Place in the palette of the run's role.
    """
    columns = [c for c in columns if _points(rows, c)]
    across = 2 if len(columns) == 4 else max(1, min(len(columns), 3))
    down = max(1, math.ceil(len(columns) / across))
    figure = Figure(figsize=(3.6 * across, 2.7 * down), layout='constrained')
    panels = figure.subplots(down, across, squeeze=False).ravel()
    for axes, column in zip(panels, columns, strict=False):
        points = _points(rows, column)
        # a single epoch is a line without length: it needs a marker
        axes.plot([x for x, _ in points], [y for _, y in points], **_line(color), marker='o' * (len(points) == 1))
        axes.set(title=column, xlabel='epoch')
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    for axes in panels[len(columns) :]:
        axes.set_axis_off()
    _ink(figure)
    return figure


def _points(rows: Sequence[Mapping[str, Any]], column: str) -> list[tuple[float, float]]:
    # people count epochs from 1, summary.csv from 0
    return [(float(r['epoch']) + 1, float(r[column])) for r in rows if r.get(column) not in (None, '')]


def _line(i: int) -> dict[str, Any]:
    return {'color': _color(i), 'linestyle': _DASHES[i // len(COLORS) % len(_DASHES)], 'linewidth': 1.5}


def reliability(bins: Sequence[Mapping[str, Any]], ece: float | None = None, color: int = ALONE) -> Figure:
    """Reliability diagram: accuracy by confidence, and below it how many images have that confidence.

    Args:
        bins: Dicts of low, high, count, confidence and accuracy, all in [0, 1] but the count; empty bins are left out.
        ece: Expected calibration error, for the title.
        color: Place in the palette of the network's role.
    """
    figure = Figure(figsize=(4.6, 4.8), layout='constrained')
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    filled = [b for b in bins if b['count']]
    total = sum(b['count'] for b in filled) or 1
    accuracy, confidence = (np.array([b[k] for b in filled]) for k in ('accuracy', 'confidence'))
    place = {
        'x': [b['low'] for b in filled],
        'width': [b['high'] - b['low'] for b in filled],
        'align': 'edge',
        'edgecolor': INK,
        'linewidth': 0.5,
    }
    over, under = np.clip(confidence - accuracy, 0, None), np.clip(accuracy - confidence, 0, None)
    top.bar(height=accuracy, color=_color(color), label='accuracy', **place)
    # the hatches are in INK: colour is for the network only
    if over.any():
        top.bar(height=over, bottom=accuracy, color='none', hatch='////', label='over-confident by', **place)
    if under.any():
        top.bar(height=under, bottom=confidence, color='none', hatch='....', label='under-confident by', **place)
    top.plot([0, 1], [0, 1], color=INK, linestyle='--', linewidth=1)
    top.set(xlim=(0, 1), ylim=(0, 1), ylabel='accuracy', title='Reliability')
    if ece is not None:
        top.set_title(f'Reliability, ECE {ece:.3f}')
    bottom.bar(height=[b['count'] / total for b in filled], color=_color(color), **place)
    bottom.set(xlabel='confidence', ylabel='share', ylim=(0, None))
    _ink(figure)
    figure.legend(loc='outside lower center', frameon=False, labelcolor=INK, fontsize='small', ncols=3)
    return figure


def projector_similarity(matrix: Sequence[Sequence[float]]) -> Figure:
    """Cosines between the outputs of the projectors, `[q, q]`, mean over images."""
    values = np.asarray(matrix, dtype=float)
    q = len(values)
    side = max(3.0, 1.6 + 0.55 * q)
    figure = Figure(figsize=(side + 0.8, side), layout='constrained')
    axes = figure.subplots()
    _heatmap(figure, axes, values, [str(k + 1) for k in range(q)])
    axes.set(title='Cosine of projector outputs', xlabel='projector', ylabel='projector')
    if q <= 12:
        for (i, j), value in np.ndenumerate(values):
            color = 'white' if abs(value) > 0.6 else 'black'
            axes.text(j, i, f'{value:.2f}', ha='center', va='center', fontsize=9, color=color)
    _ink(figure)
    return figure


def class_cosine(matrix: Sequence[Sequence[float]], names: Sequence[str]) -> Figure:
    """Cosines between the mean features of classes, `[c, c]`; names are drawn if there is room for them."""
    values = np.asarray(matrix, dtype=float)
    c = len(values)
    labels = [_label(name, i) for i, name in enumerate(names)] if c <= _MAX_LABELS else []
    side = min(max(3.6, 2.2 + 0.15 * c), 17.5) if labels else 7.0
    figure = Figure(figsize=(side + 0.8, side), layout='constrained')
    axes = figure.subplots()
    _heatmap(figure, axes, values, labels)
    axes.set_title('Cosine of class means, centred')
    if not labels:
        axes.set(xlabel='class', ylabel='class')
    if any(len(label) > 2 for label in labels):
        axes.tick_params(axis='x', labelrotation=90)
    axes.tick_params(labelsize=7 if c > 12 else 9, length=0 if labels else 3)
    _ink(figure)
    return figure


def pictures(rows: Mapping[str, np.ndarray]) -> Figure:
    """Pictures in rows, one column for each image.

    Args:
        rows: Name of a row -> RGB from 0 to 1 `[n, h, w, 3]`; n is the same in all, height and width need not be.
    """
    number = len(next(iter(rows.values())))
    figure = Figure(figsize=(1.2 * number + 1.2, 1.2 * len(rows)), layout='constrained')
    panels = figure.subplots(len(rows), number, squeeze=False)
    for (name, images), of_row in zip(rows.items(), panels, strict=True):
        for image, axes in zip(images, of_row, strict=True):
            axes.imshow(image, interpolation='nearest')
            axes.set(xticks=[], yticks=[])
        of_row[0].set_ylabel(name, rotation=0, ha='right', va='center')
    _ink(figure)
    for axes in panels.flat:
        axes.spines[:].set_visible(False)
    return figure


def _label(name: str, index: int) -> str:
    """A name, shortened to fit, or its index if the font lacks some of its letters."""
    if not _has_letters(name):
        return str(index)
    return name if len(name) <= 22 else name[:21] + '…'


def _has_letters(text: str) -> bool:
    return {ord(c) for c in text} <= _letters()


@functools.cache
def _letters() -> frozenset[int]:
    """The characters of the font that pictures are written in."""
    return frozenset(font_manager.get_font(font_manager.findfont(font_manager.FontProperties())).get_charmap())


def save_png(figure: Figure, path: str | os.PathLike[str], dpi: int = 150) -> None:
    """Write a figure as PNG with a transparent background; the file appears whole or not at all."""
    with replaced(path) as beside:
        figure.savefig(beside, format='png', dpi=dpi, transparent=True)


def to_svg(figure: Figure) -> str:
    """A figure as an `<svg>` element to put into HTML: text stays text, equal figures give equal bytes."""
    file = io.StringIO()
    with matplotlib.rc_context({'svg.fonttype': 'none', 'svg.hashsalt': 'timm_pe'}):
        figure.savefig(file, format='svg', transparent=True, metadata={'Date': None})
    text = file.getvalue()
    return text[text.index('<svg') :]


def _color(i: int) -> str:
    return COLORS[i % len(COLORS)]


def _heatmap(figure: Figure, axes: Axes, values: np.ndarray, labels: Sequence[str]) -> None:
    # the full range of a cosine, so that figures of different runs can be compared by colour
    image = axes.imshow(values, cmap='RdBu_r', vmin=-1, vmax=1, interpolation='nearest')
    if labels:
        axes.set_xticks(range(len(values)), labels)
        axes.set_yticks(range(len(values)), labels)
    bar = figure.colorbar(image, ax=axes, shrink=0.8)
    bar.ax.tick_params(colors=INK, labelsize=8)
    bar.outline.set_visible(False)


def _ink(figure: Figure) -> None:
    """Draw all that is not data in INK, on a transparent background."""
    figure.patch.set_alpha(0)
    for axes in figure.axes:
        axes.patch.set_alpha(0)
        axes.tick_params(colors=INK)
        for text in (axes.title, axes.xaxis.label, axes.yaxis.label):
            text.set_color(INK)
        axes.title.set_fontsize(10)
        for name, spine in axes.spines.items():
            spine.set_color(INK)
            spine.set_visible(name in ('left', 'bottom'))
        if not axes.images and axes.axison and axes.get_label() != '<colorbar>':
            axes.grid(color=INK, alpha=0.25, linewidth=0.6)
            axes.set_axisbelow(True)


# for the report


def mean_curves(
    groups: Sequence[Sequence[Sequence[Mapping[str, Any]]]], column: str, colors: Sequence[int] | None = None
) -> Figure:
    """A column of summary.csv by epoch: for each group of runs a line (mean) in a band (lowest to highest).

    No title and no legend: the page around it has both, as text that keeps its size on a phone. A column of positive
    numbers that spans more than a factor of 20, and is no percentage, is drawn on a logarithmic axis.

    Args:
        groups: For each group the rows of each of its runs, as in `learning_curves`.
        column: Which to draw. A group without it has no line and keeps its colour.
        colors: Place of each group in the palette; None takes them in order.
    """
    figure = Figure(figsize=(3.7, 2.5), layout='constrained')
    axes = figure.subplots()
    drawn = []
    for i, runs in zip(colors or range(len(groups)), groups, strict=True):
        curves = [dict(points) for rows in runs if (points := _points(rows, column))]
        if not curves:
            continue
        epochs = sorted(set(curves[0]).intersection(*curves[1:]))
        values = np.array([[curve[epoch] for epoch in epochs] for curve in curves])
        axes.plot(epochs, values.mean(0), **_line(i), marker='o' * (len(epochs) == 1))
        if len(curves) > 1:
            axes.fill_between(epochs, values.min(0), values.max(0), color=_color(i), alpha=0.18, linewidth=0)
        drawn += values.ravel().tolist()
    percent = column.startswith('eval_') and 'loss' not in column
    if drawn and not percent and min(drawn) > 0 and max(drawn) > 20 * min(drawn):
        axes.set_yscale('log')
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if max(drawn) < 200 * min(drawn) else (1,)))
        axes.yaxis.set_major_formatter('{x:g}')
        axes.yaxis.set_minor_locator(NullLocator())
    axes.set(xlabel='epoch')
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    _ink(figure)
    return figure
