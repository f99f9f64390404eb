"""Hooks of the docs build: they draw the figures and leave out pages that do not exist."""

import csv
import json
import os
import re
import tarfile
from pathlib import Path
from textwrap import fill
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from timm_pe.runs import plots

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / 'benchmarks' / 'results'
# a chart brings its ink for a dark page along: no one grey has enough contrast to both
INK, DARK_INK, LINE, DOT = '#565d6b', '#b3bac7', '#3b82c4', '#e07b1a'
DARK = '<style>@media (prefers-color-scheme: dark) {{ text, tspan {{ fill: {ink} !important }} [style*="stroke: {was}"] {{ stroke: {ink} !important }} }}</style>'


def on_config(config: Any) -> Any:
    """Drop entries of the navigation whose page does not exist, and draw the figures of the pages."""
    docs = Path(config['docs_dir'])
    config['nav'] = _without_missing(docs, config['nav'])
    draw_accuracy(json.loads((RESULTS / 'accuracy.json').read_text()), docs / 'figures' / 'accuracy.svg')
    draw_step_time(json.loads((RESULTS / 'step_time.json').read_text()), docs / 'figures' / 'step_time.svg')
    draw_projectors(json.loads((RESULTS / 'accuracy.json').read_text()), docs / 'figures' / 'projectors.svg')
    draw_curves(RESULTS / 'runs' / 'emoji_equal.tar.xz', docs / 'figures' / 'curves.svg')
    return config


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Show the YAML files themselves below the table of recipes, and fold the tables of a step's cost.

    The line that leads from such a page to the file itself is for readers of the repository: the site has no such file.
    """
    markdown = re.sub(r'^\*On the site this page shows the file .*\n?', '', markdown, flags=re.MULTILINE)
    if page.file.src_uri == 'benchmarks/results/step_time.md':
        return fold_tables((RESULTS / 'step_time.md').read_text())  # what the page includes
    if page.file.src_uri != 'recipes.md':
        return markdown
    recipes = sorted((ROOT / 'hparams').glob('*.yaml'))
    return markdown + ''.join(f'\n## {r.stem}\n\n```yaml\n{r.read_text()}```\n' for r in recipes)


def _without_missing(docs: Path, entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    kept = []
    for entry in entries:
        (title, target), *_ = entry.items()
        if isinstance(target, list):
            kept.append({title: _without_missing(docs, target)})
        # a page under benchmarks/ shows the file of that name in the repository
        elif (docs / target).is_file() and (not target.startswith('benchmarks/') or (ROOT / target).is_file()):
            kept.append(entry)
    return kept


# a lower difference is a triangle at the edge and a number
LOWEST = -10


def draw_accuracy(results: dict[str, Any], path: Path) -> None:
    """Draw each method's gain over the student alone: a panel per suite, the mean with its 95 % interval, a dot per
    seed.

    One column, readable on a phone at full size: the label of a row stands above it.

    Args:
        results: The content of benchmarks/results/accuracy.json.
        path: The SVG to write; an unchanged one is not rewritten.
    """
    suites = [s for s in results['suites'].values() if any(m['minus_alone'] for m in s['methods'].values())]
    rows = [[m for m in s['methods'].values() if m['minus_alone']] for s in suites]
    figure, panels = _column([s['title'] for s in suites], [[m['label'] for m in r] for r in rows])
    for axes, methods in zip(panels, rows, strict=True):
        for y, method in enumerate(methods):
            difference = method['minus_alone']
            seeds = [x for x in difference['of_seeds'] if x >= LOWEST]
            if len(difference['of_seeds']) > 2:  # that of two seeds is wider than the picture
                axes.plot([difference['low'], difference['high']], [y, y], color=LINE, linewidth=2)
            axes.plot(seeds, [y] * len(seeds), '.', color=DOT, markersize=5)
            if difference['mean'] < LOWEST:
                axes.plot(LOWEST, y, '<', color=LINE, markersize=5)
                said = {'xytext': (6, -3), 'textcoords': 'offset points', 'color': INK, 'fontsize': 8}
                axes.annotate(f'{difference["mean"]:+.1f}', (LOWEST, y), **said)
            else:
                axes.plot(difference['mean'], y, 'o', color=LINE, markersize=5)
            axes.plot([0, 0], [y - 0.2, y + 0.2], color=INK, linewidth=0.8)  # not through the labels
        axes.tick_params(labelbottom=True)
        axes.xaxis.set_major_formatter(lambda x, _: f'{x:+g}' if x else 'alone')
    panels[-1].set_xlabel('points of top-1 over the student alone', color=INK, fontsize=9)
    _write(figure, path)


# method of the suite -> its label, its place in the palette, and where the label stands beside the curve
CURVES = {'alone': ('student alone', plots.ALONE, (10, -24)), 'pe_q3': ('with a teacher', plots.TAUGHT, (-80, 14))}


def draw_curves(archive: Path, path: Path) -> None:
    """Draw top-1 by epoch, without and with a teacher: the mean over the seeds in a band from the lowest to the highest.

    Args:
        archive: Kept runs of benchmarks/accuracy.py.
        path: The SVG to write.
    """
    runs: dict[str, list[list[dict[str, Any]]]] = {method: [] for method in CURVES}
    with tarfile.open(archive) as tar:
        for member in tar:
            run, name = member.name.split('/')[-2:]
            method, file = run.rpartition('-')[0], tar.extractfile(member)
            if name == 'summary.csv' and method in runs and file:
                runs[method].append(list(csv.DictReader(file.read().decode().splitlines())))
    figure = plots.mean_curves(list(runs.values()), 'eval_top1', [color for _, color, _ in CURVES.values()])
    figure.set_size_inches(4.4, 2.9)
    (axes,) = figure.axes
    text = {'textcoords': 'offset points', 'color': INK, 'fontsize': 9, 'annotation_clip': False}
    for (label, _, place), line in zip(CURVES.values(), axes.lines, strict=True):
        points = line.get_xydata()
        axes.annotate(label, points[int(0.4 * len(points))], place, **text)
        axes.annotate(f'{points[-1][1]:.1f} %', points[-1], (4, -3), **text)
    axes.set_xlim(1, len(points) * 1.12)
    axes.set_title(
        f'validation top-1 in %, mean and range of {len(runs["alone"])} seeds', color=INK, fontsize=9, loc='left'
    )
    _write(figure, path)


# method with projectors -> its label, colour, and how far its points stand beside the number of epochs
WITH_PROJECTORS = {'pe_q1': ('one projector', DOT, 0.96), 'pe_q3': ('three', LINE, 1.04)}


def draw_projectors(results: dict[str, Any], path: Path) -> None:
    """Draw what projectors add to a student that is taught without one, by the number of epochs: a panel for each pair.

    Args:
        results: The content of benchmarks/results/accuracy.json. Suites of one pair are called NAME and NAME_EPOCHS.
        path: The SVG to write.
    """
    pairs: dict[str, list[dict[str, Any]]] = {}
    for name, suite in results['suites'].items():
        if any(suite['methods'].get(m, {}).get('minus_no_projector') for m in WITH_PROJECTORS):
            pairs.setdefault(re.sub(r'_\d+$', '', name), []).append(suite)
    figure = Figure(figsize=(4.4, 2 * len(pairs) + 0.3), layout='constrained')
    shown: dict[str, Any] = {}
    ticks = sorted({suite['common']['epochs'] for suites in pairs.values() for suite in suites})
    for axes, suites in zip(
        figure.subplots(len(pairs), 1, squeeze=False, sharex=True, sharey=True)[:, 0], pairs.values(), strict=True
    ):
        for method, (label, color, aside) in WITH_PROJECTORS.items():
            for suite in suites:
                difference = suite['methods'].get(method, {}).get('minus_no_projector')
                if difference:
                    x = suite['common']['epochs'] * aside
                    axes.plot([x] * len(difference['of_seeds']), difference['of_seeds'], '.', color=color, markersize=4)
                    axes.plot([x], [difference['mean']], 'o', color=color, markersize=6, label=label)
                    if difference['low'] is not None:
                        axes.plot([x, x], [difference['low'], difference['high']], color=color, linewidth=2)
        axes.axhline(0, color=INK, linewidth=0.8)
        axes.set_xscale('log')
        axes.set_xticks(ticks, [f'{e} epochs' for e in ticks])
        axes.minorticks_off()
        axes.set_xlim(ticks[0] / 1.3, ticks[-1] * 1.3)
        title = re.sub(r', \d+ epochs(?: of)?', ',', suites[0]['title']).rstrip(',')
        axes.set_title(fill(title, 52), fontsize=9, color=INK, loc='left', fontweight='bold')
        axes.tick_params(colors=INK, labelsize=8, labelbottom=True)
        for side in axes.spines.values():
            side.set_visible(False)
        shown |= dict(zip(*axes.get_legend_handles_labels()[::-1], strict=True))
    figure.legend(
        shown.values(), shown.keys(), fontsize=8, labelcolor=INK, frameon=False, loc='outside lower center', ncols=2
    )
    figure.supylabel('points of top-1 over no projector', color=INK, fontsize=9)
    _write(figure, path)


# variant of a step -> its label; its median is compared with that of timm's own distillation task
STEPS = {'ours': 'as it comes', 'ours_bf16': 'bfloat16 teacher', 'ours_cached': "the teacher's features cached"}


def draw_step_time(results: dict[str, Any], path: Path) -> None:
    """Draw a step's cost relative to timm's feature distillation: a panel per pair, the ratio with its 95 % interval.

    Args:
        results: The content of benchmarks/results/step_time.json.
        path: The SVG to write.
    """
    titles, rows = [], []
    for pair, of_batches in results['steps'].items():
        batch, measured = max(of_batches.items(), key=lambda item: int(item[0]))
        teacher, student, size = pair.replace('@', ':').split(':')
        titles.append(f'{teacher} -> {student}, {size} px, batch {batch}')
        folded = {'ours_folded': 'batch norms of the teacher folded'} if 'ours_folded' in measured['ratios'] else {}
        variants = {'ours': STEPS['ours'], **folded, **STEPS}
        rows.append([(label, measured['ratios'][name]['timm']) for name, label in variants.items()])
    figure, panels = _column(titles, [[label for label, _ in r] for r in rows])
    for axes, of_pair in zip(panels, rows, strict=True):
        for y, (_, ratio) in enumerate(of_pair):
            axes.plot([0, ratio['ratio']], [y, y], color=LINE, linewidth=6, solid_capstyle='butt')
            axes.plot([ratio['low'], ratio['high']], [y, y], color=DOT, linewidth=2)
        axes.axvline(1, color=INK, linewidth=0.8)
        axes.set_xlim(0, 1.15)
    panels[-1].set_xlabel("time of a step, that of timm's own distillation = 1", color=INK, fontsize=9)
    _write(figure, path)


def _column(titles: list[str], labels: list[list[str]]) -> tuple[Figure, list[Any]]:
    figure = Figure(figsize=(4.4, 0.62 * len(titles) + 0.4 * sum(map(len, labels)) + 0.4), layout='constrained')
    heights = [len(of_panel) + 0.7 for of_panel in labels]
    panels = figure.subplots(len(titles), 1, squeeze=False, sharex=True, height_ratios=heights)[:, 0]
    for axes, title, of_panel in zip(panels, titles, labels, strict=True):
        axes.set_title(fill(title, 52), fontsize=9, color=INK, loc='left', fontweight='bold')
        for y, label in enumerate(of_panel):
            axes.text(0, y - 0.28, label, transform=axes.get_yaxis_transform(), color=INK, fontsize=9, va='bottom')
        axes.set_ylim(len(of_panel) - 0.6, -1)
        axes.set_yticks([])
        axes.tick_params(colors=INK, labelsize=8)
        for side in axes.spines.values():
            side.set_visible(False)
    return figure, list(panels)


def _write(figure: Figure, path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    for artist in figure.findobj():
        artist.set_clip_on(False)  # the name of a clip is a hash of places that float noise changes
    partial = path.with_suffix('.tmp')
    with matplotlib.rc_context({'svg.hashsalt': 'timm_pe', 'svg.fonttype': 'none'}):
        figure.savefig(partial, format='svg', transparent=True, metadata={'Date': None})
    text = partial.read_text().replace(plots.INK, INK)  # that of figures which the report draws too
    partial.write_text(text.replace('<defs>', DARK.format(ink=DARK_INK, was=INK) + '<defs>', 1))
    if path.exists() and path.read_bytes() == partial.read_bytes():
        partial.unlink()  # rewriting it would make `mkdocs serve` rebuild endlessly
    else:
        os.replace(partial, path)


def fold_tables(markdown: str) -> str:
    """The chart of a step's cost first, then each wide table folded under its heading."""
    chart = "![Time of a step beside that of timm's own distillation, by pair](../../figures/step_time.svg)\n\n"
    head, *sections = re.split(r'(?=^## )', markdown, flags=re.MULTILINE)
    folded = [re.sub(r'(?:^\|.*\n)+', _fold, section, flags=re.MULTILINE) for section in sections]
    return head + chart + ''.join(folded)


def _fold(table: re.Match[str]) -> str:
    return '??? note "Table"\n\n' + ''.join(f'    {line}\n' for line in table[0].splitlines()) + '\n'
