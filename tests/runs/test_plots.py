"""Pictures from plain numbers."""

import io
import sys
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from matplotlib.colors import to_hex
from PIL import Image

from timm_pe.runs import plots

ROWS = [{'epoch': str(e), 'train_loss': str(1 / (e + 1)), 'eval_top1': '' if e % 2 else str(10 * e)} for e in range(6)]


def a_figure():
    return plots.mean_curves([[ROWS], [ROWS[:3]]], 'eval_top1')


def lines(figure):
    return [line for axes in figure.axes for line in axes.lines]


def contrast(color: str, other: float) -> float:
    """Contrast ratio of WCAG 2 between a colour and one of luminance `other`."""
    channels = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    luminance = float(np.dot(linear, (0.2126, 0.7152, 0.0722)))
    low, high = sorted((luminance, other))
    return (high + 0.05) / (low + 0.05)


def test_curves_have_a_panel_a_column():
    figure = plots.learning_curves(ROWS, ['train_loss', 'eval_top1', 'train_pe_loss'])
    assert [axes.get_title() for axes in figure.axes] == ['train_loss', 'eval_top1']  # the run has no train_pe_loss
    assert [len(axes.lines) for axes in figure.axes] == [1, 1]


def test_curves_leave_out_epochs_without_a_value():
    figure = plots.learning_curves(ROWS, ['eval_top1'])
    np.testing.assert_allclose(lines(figure)[0].get_xydata(), [(1, 0), (3, 20), (5, 40)])


def test_curves_take_numbers_and_none_as_well_as_text():
    rows = [{'epoch': 0.0, 'eval_top1': None}, {'epoch': 1.0, 'eval_top1': 7.5}]
    line = lines(plots.learning_curves(rows, ['eval_top1']))[0]
    np.testing.assert_allclose(line.get_xydata(), [(2, 7.5)])
    assert line.get_marker() == 'o'  # a single epoch can be seen


def test_more_runs_than_colours_still_differ():
    figure = plots.mean_curves([[ROWS]] * 20, 'train_loss')
    assert len({(line.get_color(), line.get_linestyle()) for line in lines(figure)}) == 20


def test_reliability_draws_accuracy_and_the_gap_to_confidence():
    bins = [
        {'low': 0.0, 'high': 0.5, 'count': 0, 'confidence': None, 'accuracy': None},
        {'low': 0.5, 'high': 0.75, 'count': 3, 'confidence': 0.7, 'accuracy': 0.6},
        {'low': 0.75, 'high': 1.0, 'count': 1, 'confidence': 0.8, 'accuracy': 1.0},
    ]
    top, bottom = plots.reliability(bins, ece=0.125).axes
    accuracy, over, under = ([bar.get_height() for bar in bars] for bars in top.containers)
    assert accuracy == [0.6, 1.0]
    assert over == pytest.approx([0.1, 0])
    assert under == pytest.approx([0, 0.2])
    assert [bar.get_height() for bar in bottom.containers[0]] == [0.75, 0.25]
    assert '0.125' in top.get_title()


def test_reliability_without_any_image_is_an_empty_picture():
    plots.to_svg(plots.reliability([]))


def test_a_small_matrix_of_projectors_has_its_numbers_in_it():
    axes = plots.projector_similarity([[1, 0.25], [0.25, 1]]).axes[0]
    assert [t.get_text() for t in axes.texts] == ['1.00', '0.25', '0.25', '1.00']
    assert not plots.projector_similarity(np.eye(16)).axes[0].texts


def test_class_names_are_drawn_where_they_can_be_read():
    names = [f'a class with quite a long name {i}' for i in range(61)]
    axes = plots.class_cosine(np.eye(61), names).axes[0]
    labels = [t.get_text() for t in axes.get_yticklabels()]
    assert len(labels) == 61
    assert max(map(len, labels)) <= 22
    axes = plots.class_cosine(np.eye(101), [str(i) for i in range(101)]).axes[0]
    assert len(axes.get_yticks()) < 20


def test_class_names_that_the_font_cannot_draw_are_shown_by_their_index():
    axes = plots.class_cosine(np.eye(3), ['ant', '蜂', 'Übung']).axes[0]
    assert [t.get_text() for t in axes.get_yticklabels()] == ['ant', '1', 'Übung']


def test_the_colour_is_that_of_the_role_and_the_gaps_are_hatched():
    bins = [{'low': 0.5, 'high': 1.0, 'count': 3, 'confidence': 0.9, 'accuracy': 0.6}]
    top, _ = plots.reliability(bins, color=plots.TAUGHT).axes
    accuracy, over = (bars[0] for bars in top.containers)
    assert to_hex(accuracy.get_facecolor()) == plots.COLORS[plots.TAUGHT]
    assert (over.get_facecolor()[3], over.get_hatch()) == (0, '////')
    line = lines(plots.learning_curves(ROWS, ['eval_top1'], plots.TEACHER))[0]
    assert line.get_color() == plots.COLORS[plots.TEACHER]


def test_a_picture_is_read_on_a_white_and_on_a_black_page(tmp_path):
    for color in (plots.INK, *plots.COLORS):
        assert contrast(color, 1.0) > 2.5, color
        assert contrast(color, 0.0) > 2.5, color
    assert min(contrast(plots.INK, 1.0), contrast(plots.INK, 0.0)) > 4
    plots.save_png(a_figure(), tmp_path / 'a.png')
    image = Image.open(tmp_path / 'a.png')
    assert image.mode == 'RGBA'
    assert image.getpixel((1, 1))[3] == 0


def test_a_png_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    plots.save_png(a_figure(), tmp_path / 'a.png')
    assert [p.name for p in tmp_path.iterdir()] == ['a.png']
    before = (tmp_path / 'a.png').read_bytes()

    def fail(self, file, **kwargs):
        with open(file, 'wb') as f:
            f.write(b'half')
        raise OSError('disk full')

    monkeypatch.setattr('matplotlib.figure.Figure.savefig', fail)
    with pytest.raises(OSError, match='disk full'):
        plots.save_png(a_figure(), tmp_path / 'a.png')
    assert (tmp_path / 'a.png').read_bytes() == before


def test_svg_is_one_element_with_its_text_and_the_same_each_time():
    svg = plots.to_svg(a_figure())
    root = ElementTree.parse(io.StringIO(svg)).getroot()
    assert root.tag.endswith('}svg')
    assert 'epoch' in ''.join(root.itertext())
    assert svg == plots.to_svg(a_figure())
    assert 'xlink:href="http' not in svg


def test_figures_leave_no_trace_in_pyplot():
    a_figure()
    pyplot = sys.modules.get('matplotlib.pyplot')
    assert pyplot is None or not pyplot.get_fignums()
