"""What a build of the documents does beside rendering them: draws the figures, leaves out pages that are not there."""

import json
import os
from pathlib import Path
from textwrap import fill
from typing import Any

import matplotlib
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / 'benchmarks' / 'results' / 'accuracy.json'
# readable on a light and on a dark page
INK, LINE, DOT = '#7a7a7a', '#3b82c4', '#e07b1a'


def on_config(config: Any) -> Any:
    """Drop entries of the navigation whose page is not there, and draw the figures that pages show."""
    docs = Path(config['docs_dir'])
    config['nav'] = _without_missing(docs, config['nav'])
    draw_accuracy(json.loads(RESULTS.read_text()), docs / 'figures' / 'accuracy.svg')
    return config


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Show the YAML files themselves below the table of recipes."""
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


def draw_accuracy(results: dict[str, Any], path: Path) -> None:
    """What each method adds to the student alone: one panel per suite, the mean with its 95 % interval, one dot per seed.

    Args:
        results: The content of benchmarks/results/accuracy.json.
        path: The SVG to write; one that would not change is left alone.
    """
    suites = [s for s in results['suites'].values() if any(m['minus_alone'] for m in s['methods'].values())]
    rows = [[m for m in s['methods'].values() if m['minus_alone']] for s in suites]
    figure = Figure(figsize=(8, 0.8 * len(suites) + 0.27 * sum(map(len, rows))), layout='constrained')
    panels = figure.subplots(len(suites), 1, squeeze=False, sharex=True, height_ratios=[len(r) + 1 for r in rows])
    for axes, suite, methods in zip(panels[:, 0], suites, rows, strict=True):
        for y, method in enumerate(methods):
            difference = method['minus_alone']
            if difference.get('low') is not None:
                axes.plot([difference['low'], difference['high']], [y, y], color=LINE, linewidth=2)
            axes.plot(difference['of_seeds'], [y] * len(difference['of_seeds']), '.', color=DOT, markersize=5)
            axes.plot(difference['mean'], y, 'o', color=LINE, markersize=5)
        axes.axvline(0, color=INK, linewidth=0.8)
        axes.set_yticks(range(len(methods)), [m['label'] for m in methods])
        axes.set_ylim(len(methods) - 0.5, -0.5)
        axes.set_title(fill(suite['title'], 75), fontsize=9, color=INK, loc='left')
        axes.tick_params(colors=INK, labelsize=8)
        for side in axes.spines.values():
            side.set_visible(False)
    panels[-1, 0].set_xlabel('points of top-1 over the student alone', color=INK, fontsize=9)
    path.parent.mkdir(exist_ok=True)
    partial = path.with_suffix('.tmp')
    with matplotlib.rc_context({'svg.hashsalt': 'timm_pe', 'svg.fonttype': 'none'}):
        figure.savefig(partial, format='svg', transparent=True, metadata={'Date': None})
    if path.exists() and path.read_bytes() == partial.read_bytes():
        partial.unlink()  # a changed file would have `mkdocs serve` build again, and again
    else:
        os.replace(partial, path)
