"""What does a backbone know that was pretrained without labels? A grid of variants x seeds, resumable run by run.

    python benchmarks/backbones.py SUITE [SUITE ...]      # benchmarks/backbone_suites/SUITE.yaml

A suite names flags, variants (a few flags each) and seeds. Each run is one `train_distill --unlabeled` and leaves
OUTPUT/SUITE/VARIANT-SEED/; a finished run is not repeated, an interrupted one is resumed. Of each backbone: the weighted kNN top-1
and the top-1 of a linear probe of its features, and, in a suite with `masks`, how well a linear probe of its last feature map tells
foreground from background. Beside them the same numbers of a network of random weights, whose BatchNorm statistics are those of the
training images, of the teachers, and (of the map) of a probe that knows the position alone.
"""

import argparse
import functools
import json
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
import yaml
from accuracy import compare, format_difference
from environment import environment, write
from grid import Run, execute
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from timm_pe.method.map_tap import MapTap, on_grid
from timm_pe.train.probes import NEIGHBOURS, predict, probe

ROOT = Path(__file__).resolve().parent
SPLITS = ('train', 'validation')
MEASURES = {'knn': 'kNN top-1 %', 'linear': 'linear probe top-1 %', 'foreground': 'foreground, mean IoU %'}
MAP_IMAGES = 2000  # training images of the foreground's probe
BATCH = 128


@dataclass
class Suite:
    """Variants of one pretraining; see benchmarks/backbone_suites/."""

    name: str
    title: str
    data: str  # labelled images, for the measures
    common: dict[str, Any]
    variants: dict[str, dict[str, Any]]
    minus: list[list[str]]  # pairs of variants whose difference is told
    seeds: list[int]
    folder: Path
    masks: str | None = None  # the foreground of the pictures of `data`, under the same names

    def run(self, variant: str, seed: int) -> Run:
        """The run of one variant and seed."""
        name = f'{variant}-{seed}'
        flags = {**self.common, **self.variants[variant]['flags'], 'seed': seed}
        flags |= {'output': str(self.folder), 'experiment': name, 'resume': 'auto', 'teacher_eval': False}
        return Run(name, self.folder / name, flags)

    def teachers(self) -> list[str]:
        """The teachers of all variants."""
        all_flags = [{**self.common, **variant['flags']} for variant in self.variants.values()]
        names = [flags['teacher'] for flags in all_flags]
        return list(dict.fromkeys(n for name in names for n in (name if isinstance(name, list) else [name])))


def load_suite(name: str, output: Path) -> Suite:
    """A suite by its name."""
    content = yaml.safe_load((ROOT / 'backbone_suites' / f'{name}.yaml').read_text())
    return Suite(name=name, folder=output / name, **content)


# Images and features


class Pictures:
    """Labelled images of one size in memory.

    Args:
        folder: With SPLIT/CLASS/PICTURE.
        size: Height and width in pixels.

    Attributes:
        images: By split, bytes `[n, h, w, 3]`.
        labels: By split, `[n]`.
        paths: By split, relative to `folder`.
    """

    def __init__(self, folder: Path, size: int):
        classes = sorted(path.name for path in (folder / 'train').iterdir())
        self.images, self.labels, self.paths = {}, {}, {}
        for split in SPLITS:
            paths = [p for c in classes for p in sorted((folder / split / c).glob('*.png'))]
            pictures = [Image.open(p).convert('RGB').resize((size, size), Image.Resampling.BICUBIC) for p in paths]
            self.images[split] = torch.from_numpy(np.stack([np.asarray(p) for p in pictures]))
            self.labels[split] = torch.tensor([classes.index(p.parent.name) for p in paths])
            self.paths[split] = [p.relative_to(folder) for p in paths]

    def batches(self, split: str, cfg: dict[str, Any], size: int | None = None) -> Iterator[torch.Tensor]:
        """Normalized images `[b, 3, h, w]`, resized to `size` where that is another."""
        mean, std = (torch.tensor(cfg[key]).view(3, 1, 1) for key in ('mean', 'std'))
        for images in self.images[split].split(BATCH):
            x = images.permute(0, 3, 1, 2).float() / 255
            if size is not None and size != x.shape[-1]:
                x = F.interpolate(x, (size, size), mode='bicubic', antialias=True)  # as a teacher's images are resized
            yield (x - mean) / std


@torch.no_grad()
def features(model: nn.Module, pictures: Pictures, size: int | None = None) -> dict[str, torch.Tensor]:
    """Features `[n, d]` by split of a network without classifier."""
    cfg = model.pretrained_cfg
    return {s: torch.cat([model(x) for x in pictures.batches(s, cfg, size)]) for s in SPLITS}


def measure_features(model: nn.Module, pictures: Pictures, size: int | None = None) -> dict[str, float]:
    """Top-1 in percent of the kNN vote and of a linear probe."""
    found, labels = features(model.eval(), pictures, size), pictures.labels
    bank, queries = (F.normalize(found[split], dim=1) for split in SPLITS)
    chosen = predict(queries, bank, labels['train'], int(labels['train'].max()) + 1, NEIGHBOURS)
    linear = probe(*((found[split], labels[split]) for split in SPLITS))['linear_probe_top1']
    return {'knn': 100 * (chosen == labels['validation']).float().mean().item(), 'linear': linear}


# Foreground


def coverage(pictures: Pictures, masks: Path, split: str, chosen: Sequence[int], grid: Sequence[int]) -> torch.Tensor:
    """Whether most of a cell of the grid is foreground `[n, rows, columns]`."""
    alphas = [np.asarray(Image.open(masks / pictures.paths[split][i])) for i in chosen]
    cells = F.adaptive_avg_pool2d(torch.from_numpy(np.stack(alphas)).float()[:, None] / 255, tuple(grid))
    return cells[:, 0] > 0.5


@torch.no_grad()
def maps(model: nn.Module, pictures: Pictures, split: str, chosen: Sequence[int]) -> torch.Tensor:
    """The last feature maps `[n, rows, columns, d]` of the chosen images."""
    tap = MapTap(model)
    try:
        found, cfg = [], model.pretrained_cfg
        for x in pictures.batches(split, cfg):
            model(x)
            found.append(tap.pop())
        whole = torch.cat(found)[torch.as_tensor(chosen)]
        return on_grid(whole, whole.shape[2:])
    finally:
        tap.remove()


def chosen_images(pictures: Pictures) -> dict[str, list[int]]:
    """The images of the foreground's probe: MAP_IMAGES of the training ones, evenly spread, and all for validation."""
    n = len(pictures.labels['train'])
    train = np.linspace(0, n - 1, min(n, MAP_IMAGES)).astype(int).tolist()
    return {'train': train, 'validation': list(range(len(pictures.labels['validation'])))}


def mean_iou(known: dict[str, torch.Tensor], truth: dict[str, torch.Tensor]) -> float:
    """Mean of the IoU of foreground and background in percent, of a linear probe of each position on validation images.

    Args:
        known: By split, `[n, rows, columns, d]`.
        truth: By split, `[n, rows, columns]`.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    x, y = ({s: part[s].flatten(0, 2).numpy() for s in SPLITS} for part in (known, truth))
    linear = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=200))
    said = linear.fit(x['train'], y['train']).predict(x['validation'])
    ious = [((said == k) & (y['validation'] == k)).sum() / ((said == k) | (y['validation'] == k)).sum() for k in (0, 1)]
    return 100 * float(np.mean(ious))


def measure_map(model: nn.Module, pictures: Pictures, masks: Path) -> dict[str, float]:
    """The foreground's mean IoU of a network, and that of its positions alone."""
    chosen = chosen_images(pictures)
    known = {s: maps(model.eval(), pictures, s, chosen[s]) for s in SPLITS}
    grid = known['train'].shape[1:3]
    truth = {s: coverage(pictures, masks, s, chosen[s], grid) for s in SPLITS}
    place = torch.eye(grid[0] * grid[1]).view(*grid, -1)
    return {
        'foreground': mean_iou(known, truth),
        'position': mean_iou({s: place.expand(len(chosen[s]), *place.shape) for s in SPLITS}, truth),
    }


# Networks


def student_of(suite: Suite, run: Run | None) -> nn.Module:
    """The student of a finished run, in plain timm; None: one of random weights."""
    common = suite.common
    torch.manual_seed(0)
    model = timm.create_model(common['model'], num_classes=0, **common.get('model_kwargs', {}))
    if run is not None:
        model.load_state_dict(load_file(run.folder / 'student.safetensors'))
    return model


@torch.no_grad()
def calibrate(model: nn.Module, pictures: Pictures) -> nn.Module:
    """Give the BatchNorm layers the statistics of the training images."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.reset_running_stats()
            module.momentum = None  # the mean over all batches
    model.train()
    for x in pictures.batches('train', model.pretrained_cfg):
        model(x)
    return model.eval()


# Results


def cached(file: Path, on: dict[str, Any], measured: Callable[[], dict[str, float]]) -> dict[str, float]:
    """What is kept in a JSON file, measured anew if it is missing or was measured on other images."""
    kept = json.loads(file.read_text()) if file.exists() else {}
    if kept.get('on') != on:
        kept = {'on': on, 'measured': measured()}
        write(file, json.dumps(kept, indent=2) + '\n')
    return kept['measured']


def measure_suite(suite: Suite) -> dict[str, Any]:
    """Measure what is finished, each network once, and summarize it."""
    size = suite.common['img_size']
    on = {'data': suite.data, 'masks': suite.masks, 'size': size}
    pictures = functools.cache(lambda: Pictures(Path(suite.data), size))  # read when something is to be measured

    def measure_student(model: nn.Module) -> dict[str, float]:
        found = measure_features(model, pictures())
        return {**found, **(measure_map(model, pictures(), Path(suite.masks)) if suite.masks else {})}

    variants = {}
    for variant in suite.variants:
        runs = {seed: run for seed in suite.seeds if (run := suite.run(variant, seed)).result()}
        found = {}
        for seed, run in runs.items():
            network = functools.partial(student_of, suite, run)
            found[seed] = cached(run.folder / 'features.json', on, lambda make=network: measure_student(make()))
        if found:
            variants[variant] = {
                'label': suite.variants[variant]['label'],
                'flags': suite.variants[variant]['flags'],
                'of_seeds': found,
            }
    suite.folder.mkdir(parents=True, exist_ok=True)
    random = suite.folder / 'random.json'
    references = {
        'random weights': cached(random, on, lambda: measure_student(calibrate(student_of(suite, None), pictures())))
    }
    teacher_size = suite.common.get('teacher_input_size') or size
    for name in suite.teachers():
        short = name.rpartition('/')[2]
        create = functools.partial(timm.create_model, name, pretrained=True, num_classes=0)
        references[f'teacher {short}'] = cached(
            suite.folder / f'teacher_{short}.json',
            {**on, 'size': teacher_size},
            lambda make=create: measure_features(make(), pictures(), teacher_size),
        )
    return {
        'title': suite.title,
        'common': suite.common,
        'references': references,
        'variants': variants,
        'differences': [
            {'of': a, 'minus': b, **{m: difference(variants[a], variants[b], m) for m in MEASURES}}
            for a, b in suite.minus
            if a in variants and b in variants
        ],
    }


def difference(a: dict[str, Any], b: dict[str, Any], measure: str) -> dict[str, Any] | None:
    """Paired over the seeds that both have; None if it was not measured."""
    values, base = ({s: m[measure] for s, m in v['of_seeds'].items() if measure in m} for v in (a, b))
    return compare(values, base)


def format_table(summary: dict[str, Any]) -> str:
    """The Markdown of one suite."""
    rows = [({'label': name}, [of_it]) for name, of_it in summary['references'].items()]
    rows += [(v, list(v['of_seeds'].values())) for v in summary['variants'].values()]
    shown = [m for m in MEASURES if any(m in of_seed for _, found in rows for of_seed in found)]
    lines = [f'## {summary["title"]}', '', f'| | seeds | {" | ".join(MEASURES[m] for m in shown)} |']
    lines.append('|---' * (len(shown) + 2) + '|')
    for row, found in rows:
        cells = [row['label'], str(len(found)) if 'flags' in row else '']
        for m in shown:
            values = [of_seed[m] for of_seed in found if m in of_seed]
            spread = f' +- {statistics.stdev(values):.2f}' if len(values) > 1 else ''
            cells.append(f'{statistics.mean(values):.2f}{spread}' if values else '')
        lines.append(f'| {" | ".join(cells)} |')
    position = summary['references']['random weights'].get('position')
    if position is not None:
        lines += ['', f'A probe that knows the position alone has a mean IoU of {position:.2f} %.']
    for d in summary['differences']:
        labels = [summary['variants'][d[key]]['label'] for key in ('of', 'minus')]
        told = ', '.join(f'{MEASURES[m]} {format_difference(d[m])}' for m in shown if d[m])
        lines += ['', f'{labels[0]} minus {labels[1]}: {told}.']
    return '\n'.join(lines)


def write_results(summaries: dict[str, dict[str, Any]], results: Path) -> None:
    """Write the results of these suites into RESULTS; other suites there are kept."""
    known = json.loads(results.read_text()) if results.exists() else {}
    for name, summary in summaries.items():
        known[name] = {'date': f'{date.today()}', 'environment': environment('cpu'), **summary}
    results.parent.mkdir(parents=True, exist_ok=True)
    write(results, json.dumps(known, indent=2) + '\n')
    note = 'Of the last epoch, mean +- standard deviation; differences are paired by seed, with 95 % t intervals.'
    tables = '\n\n'.join(format_table(summary) for summary in known.values())
    write(results.with_suffix('.md'), f'# Backbones\n\n{note}\n\n{tables}\n')


def main(argv: list[str] | None = None) -> None:
    """Run suites.

    Args:
        argv: Command line; None takes that of the process.
    """
    suites = sorted(p.stem for p in (ROOT / 'backbone_suites').glob('*.yaml'))
    parser = argparse.ArgumentParser(prog='backbones.py', description=__doc__.splitlines()[0])
    parser.add_argument('suites', metavar='SUITE', nargs='+', choices=suites, help=f'some of {", ".join(suites)}')
    parser.add_argument('--seeds', type=int, nargs='+', help="these, not the suite's")
    parser.add_argument('--variants', nargs='+', metavar='VARIANT', help='run these alone')
    parser.add_argument('--output', type=Path, default=Path('output/backbones'), help='where runs go')
    parser.add_argument('--results', type=Path, help='summary, and a .md beside (backbones.json in --output)')
    parser.add_argument('--threads', type=int, default=1, help='CPU threads of a run')
    parser.add_argument('--no-run', action='store_true', help='run nothing, summarize what is there')
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    results, summaries = args.results or args.output / 'backbones.json', {}
    try:
        for suite in (load_suite(name, args.output) for name in args.suites):
            suite.seeds = args.seeds or suite.seeds
            unknown = set(args.variants or ()) - set(suite.variants)
            if unknown:
                parser.error(
                    f'{suite.name} has no variant {", ".join(sorted(unknown))}, it has {", ".join(suite.variants)}'
                )
            for seed in () if args.no_run else suite.seeds:
                for variant in args.variants or suite.variants:
                    done = execute(suite.run(variant, seed), args.threads)
                    print(
                        f'{suite.name}: {variant}-{seed} cosine {done["cosine"]:.4f}, {done["seconds"]:.0f} s',
                        flush=True,
                    )
            summaries[suite.name] = measure_suite(suite)
    except (RuntimeError, FileNotFoundError) as e:
        print(f'backbones.py: error: {e}', file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print('backbones.py: interrupted; the same command goes on', file=sys.stderr)
        sys.exit(130)
    write_results(summaries, results)
    print('\n\n'.join(format_table(summary) for summary in summaries.values()))
    print(f'\n{results}, {results.with_suffix(".md").name}')


if __name__ == '__main__':
    main()
