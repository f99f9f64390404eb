"""Does it help? A grid of methods x seeds over train_distill, resumable run by run.

    python benchmarks/accuracy.py SUITE [SUITE ...]       # benchmarks/suites/SUITE.yaml; `make bench-accuracy`

A suite (benchmarks/suites/*.yaml) names data, teacher, student, methods and seeds; one with `like: OTHER` is the other with
changes. A method (benchmarks/methods/*.yaml) is a few flags; `pe_q3@5` is pe_q3 with a weight of 5. A suite with `rates` first
trains the student alone at each, and every method takes the best one. A suite with a `backbone` pretrains one for each seed,
from which the methods with `starts: backbone` begin. One with `cache_views` keeps the teacher's features for so many views
in a cache for each seed. Each run is one `train_distill -c CONFIG` and leaves OUTPUT/SUITE/METHOD-SEED/; a finished run is
not repeated, an interrupted one is resumed. The results so far go to RESULTS as JSON and as a table after every run.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tarfile
import threading
from datetime import date
from pathlib import Path
from typing import Any

import torch
import yaml
from environment import environment, write
from grid import SCRIPT, Run, Suite, is_method, known_suites, load_method, load_suite, run_suite

from timm_pe.run_folder import RunFolder
from timm_pe.runs.compare import confidence_interval
from timm_pe.runs.finished import read_run

# methods to which the others are compared: `minus_NAME` in the results
BASELINES = {'alone': 'student alone', 'kd': 'KD', 'no_projector': 'no projector'}
POWER = 0.8
# of each run in an archive, as far as it has them; weights of a teacher below so many bytes are added
KEPT_FILES = ('args.yaml', 'result.json', 'summary.csv', 'analysis.json')
SMALL_WEIGHTS = 3_000_000
# numbers of an analysis about the paper's claims, and their column headings
ANALYSIS = {
    'gap_top1': 'train - val',
    'agreement.validation': 'agreement',
    'cka.validation': 'CKA',
    'discriminability.between_over_within': 'between / within',
    'discriminability.nearest_centroid_top1': 'centroid',
    'discriminability.linear_probe_top1': 'probe',
    'calibration.ece': 'ECE',
    'projectors.ensemble_gain': 'ensemble gain',
}


def analyse(runs: list[Run], threads: int) -> None:
    """Look inside finished runs of train_distill that have no analysis yet (python -m timm_pe.analysis)."""
    done = [run for run in runs if run.result() and run.script == SCRIPT]
    missing = [run for run in done if not (run.folder / 'analysis.json').exists()]
    if missing:
        command = [sys.executable, '-m', 'timm_pe.analysis', *(str(run.folder) for run in missing)]
        env = {**os.environ, 'OMP_NUM_THREADS': str(threads)}
        subprocess.run([*command, '--max-train-images', '2000'], check=True, env=env, stdout=subprocess.DEVNULL)


def compare(values: dict[int, float], baseline: dict[int, float]) -> dict[str, Any] | None:
    """The paired difference to a baseline over the seeds that both have, with a 95 % t interval of its mean.

    `detectable` is the true difference that so many seeds with this spread would tell from nothing in POWER of all cases.
    """
    seeds = sorted(set(values) & set(baseline))
    if not seeds:
        return None
    differences = [values[s] - baseline[s] for s in seeds]
    mean = statistics.mean(differences)
    low, high = confidence_interval(differences) or (None, None)
    found = {'mean': mean, 'low': low, 'high': high, 'of_seeds': differences}
    return found | {'detectable': detectable(statistics.stdev(differences), len(seeds)) if len(seeds) > 1 else None}


def detectable(spread: float, seeds: int) -> float:
    """The smallest true difference whose 95 % t interval leaves out 0 with a probability of POWER.

    Args:
        spread: Standard deviation of the differences paired by seed.
        seeds: How many pairs, at least 2.
    """
    from scipy.optimize import brentq
    from scipy.stats import nct, t

    bound, root = t.ppf(0.975, seeds - 1), seeds**0.5
    return spread / root * float(brentq(lambda shift: nct.sf(bound, seeds - 1, shift) - POWER, 0, 2 * bound + 5))


def summarize(suite: Suite, results: dict[str, dict[int, dict[str, Any]]]) -> dict[str, Any]:
    """What the finished runs of a suite say; see `Suite.finished`."""
    teacher_run = suite.teacher_run()
    teacher = teacher_run.result() if teacher_run else None
    top1 = {m: {s: r['top1'] for s, r in of_seed.items()} for m, of_seed in results.items()}
    methods = {}
    for method, of_seed in results.items():
        values, loaded = list(top1[method].values()), load_method(method)
        folders = {s: suite.run(method, s).folder for s in of_seed}
        methods[method] = {
            'label': loaded['label'],
            'seeds': list(of_seed),
            'top1_of_seeds': values,
            'top1': statistics.mean(values),
            'std': statistics.stdev(values) if len(values) > 1 else None,
            'best_top1': statistics.mean(r['best_top1'] for r in of_seed.values()),
            **{
                f'minus_{b}': compare(top1[method], top1.get(b, {})) if method not in ('alone', b) else None
                for b in BASELINES
            },
            'epochs_to_alone': [
                read_run(RunFolder(folder), method).epochs_to(results['alone'][s]['top1'])
                for s, folder in folders.items()
                if method != 'alone' and s in results.get('alone', {})
            ],
            'analysis': mean_analysis(list(folders.values())),
            'flags': loaded['flags'] | loaded.get('weight', {}),
        }
    return {
        'title': suite.title,
        'teacher': {
            'model': suite.teacher.get('architecture', suite.teacher['model']),
            'top1': teacher and teacher['top1'],
        },
        'student': suite.student['model'],
        'common': {**suite.common, **suite.student, **suite.overrides},
        'tuning': [
            {'lr': rate, 'top1': result['top1']}
            for rate, run in suite.tuning_runs().items()
            if (result := run.result())
        ],
        'methods': methods,
    }


def mean_analysis(folders: list[Path]) -> dict[str, float]:
    """Means over the seeds of the analysis' numbers, for runs that have an analysis."""
    found = [json.loads((f / 'analysis.json').read_text()) for f in folders if (f / 'analysis.json').exists()]
    means = {}
    for name in ANALYSIS:
        values = [v for v in (dig(analysis, name) for analysis in found) if v is not None]
        if values:
            means[name] = statistics.mean(values)
    return means


def dig(tree: Any, path: str) -> float | None:
    """tree['a']['b'] for 'a.b', None if any of them is missing."""
    for key in path.split('.'):
        tree = tree.get(key) if isinstance(tree, dict) else None
    return tree


def format_difference(difference: dict[str, Any] | None) -> str:
    """+1.20 [0.90, 1.50]"""
    if difference is None:
        return ''
    interval = '' if difference['low'] is None else f' [{difference["low"]:+.2f}, {difference["high"]:+.2f}]'
    return f'{difference["mean"]:+.2f}{interval}'


def format_epochs(epochs: list[int | None] | None) -> str:
    """The mean of the epochs; of how many, if some never came there."""
    came = [e for e in epochs or () if e is not None]
    if not came:
        return 'never' if epochs else ''
    return f'{statistics.mean(came):.1f}' + (f' ({len(came)} of {len(epochs)})' if len(came) < len(epochs) else '')


def format_table(summary: dict[str, Any]) -> str:
    """The Markdown tables of one suite: accuracy and analysis."""
    teacher = summary['teacher']
    of_teacher = f' (top-1 {teacher["top1"]:.2f})' if teacher['top1'] else ''
    lines = [f'## {summary["title"]}', '', f'Teacher {teacher["model"]}{of_teacher}, student {summary["student"]}.', '']
    runs = summary.get('runs')
    lines += [f'Settings and epochs of all runs: {runs}.' if runs else 'The runs were not kept.', '']
    if summary.get('tuning'):
        tried = ', '.join(f'{t["lr"]:g}: {t["top1"]:.2f}' for t in summary['tuning'])
        lines += [f'Learning rate tuned for the student alone, with a seed of its own (top-1): {tried}.', '']
    alone = summary['methods'].get('alone')
    if alone and teacher['top1'] and teacher['top1'] <= alone['top1']:
        lines += ['**The teacher is no better than the student alone: it has nothing to teach.**', '']
    rows = list(summary['methods'].values())
    baselines = [b for b in BASELINES if any(row.get(f'minus_{b}') for row in rows)]
    lines += [
        f'| {" | ".join(["method", "seeds", "top-1 %", *(f"minus {BASELINES[b]}" for b in baselines)])} | epochs |'
    ]
    lines += ['|---' * (4 + len(baselines)) + '|']
    for row in rows:
        spread = f' +- {row["std"]:.2f}' if row['std'] is not None else ''
        differences = [format_difference(row.get(f'minus_{b}')) for b in baselines]
        cells = [row['label'], str(len(row['seeds'])), f'{row["top1"]:.2f}{spread}', *differences]
        lines.append(f'| {" | ".join([*cells, format_epochs(row.get("epochs_to_alone"))])} |')
    analysed = [row for row in summary['methods'].values() if row['analysis']]
    if analysed:
        lines += ['', f'| method | {" | ".join(ANALYSIS.values())} |', '|---' * (len(ANALYSIS) + 1) + '|']
        for row in analysed:
            numbers = (row['analysis'].get(name) for name in ANALYSIS)
            lines.append(f'| {row["label"]} | {" | ".join("" if v is None else f"{v:.3f}" for v in numbers)} |')
    return '\n'.join(lines)


def show_known(suite: Suite, results: Path) -> list[str]:
    """Have the suite show what RESULTS has of it; METHOD-SEED of those whose runs are not in its folder."""
    known = json.loads(results.read_text())['suites'] if results.exists() else {}
    there = known.get(suite.name, {}).get('methods', {})
    suite.show(filter(is_method, there), (s for row in there.values() for s in row['seeds']))
    here = suite.finished()
    return [f'{m}-{s}' for m, row in there.items() for s in row['seeds'] if s not in here.get(m, {})]


def keep_runs(suites: list[Suite], archive: Path) -> None:
    """Write settings, epochs, result and analysis of the runs that the results are of into ARCHIVE, a tar.xz.

    The same runs make the same file. Of a small teacher the weights are in it too: unpacked, its suite goes on anywhere.
    """
    runs = {run.folder: suite.folder.parent for suite in suites for run in suite.finished_runs()}
    files = {
        folder / name: output for folder, output in runs.items() for name in KEPT_FILES if (folder / name).exists()
    }
    for suite in suites:
        teacher = suite.teacher_run()
        weights = teacher and teacher.folder / 'student.safetensors'
        if weights and weights.exists() and weights.stat().st_size < SMALL_WEIGHTS:
            files[weights] = suite.folder.parent
    archive.parent.mkdir(parents=True, exist_ok=True)
    beside = archive.with_name(f'{archive.name}.tmp')
    with tarfile.open(beside, 'w:xz') as tar:
        for path, output in sorted(files.items()):
            member = tarfile.TarInfo(str(path.relative_to(output)))
            member.size = path.stat().st_size
            with open(path, 'rb') as file:
                tar.addfile(member, file)
    os.replace(beside, archive)


def write_results(suites: list[Suite], results: Path, device: str, archive: Path | None) -> dict[str, Any]:
    """Write the results of these suites into RESULTS, with the name of the ARCHIVE of their runs; other suites there stay."""
    known = json.loads(results.read_text()) if results.exists() else {}
    known.setdefault('suites', {})
    for suite in suites:
        finished = suite.finished()
        ran = [result['ran'] for of_seed in finished.values() for result in of_seed.values() if 'ran' in result]
        # that of the newest run; runs of before do not say it
        there = known['suites'].get(suite.name) or {'date': f'{date.today()}', 'environment': environment(device)}
        newest = max(ran, key=lambda r: r['date'], default={k: there[k] for k in ('date', 'environment')})
        runs = os.path.relpath(archive, results.parent) if archive else None
        known['suites'][suite.name] = {**newest, 'runs': runs, **summarize(suite, finished)}
    write(results, json.dumps(known, indent=2) + '\n')
    tables = '\n\n'.join(format_table(s) for s in known['suites'].values())
    note = (
        'Top-1 after the last epoch, mean +- standard deviation; differences are paired by seed, with 95 % t intervals. '
        'Epochs: after how many a run first had the final top-1 of the student alone of its seed, where it was validated.'
    )
    write(results.with_suffix('.md'), f'# Accuracy\n\n{note}\n\n{tables}\n')
    return known


def method_name(name: str) -> str:
    """For argparse: a name that `load_method` takes."""
    try:
        load_method(name)
    except ValueError as e:
        raise argparse.ArgumentTypeError(str(e)) from e
    return name


def main(argv: list[str] | None = None) -> None:
    """Run suites.

    Args:
        argv: Command line; None takes that of the process.
    """
    suites = known_suites()
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(prog='accuracy.py', description=__doc__.splitlines()[0])
    parser.add_argument(
        'suites', metavar='SUITE', nargs='+', choices=suites, help=f'one or more of {", ".join(suites)}'
    )
    parser.add_argument(
        '--methods',
        nargs='+',
        type=method_name,
        metavar='METHOD[@WEIGHT]',
        help="these alone, not the suite's; with @ and a number the loss has another weight, as pe_q3@5",
    )
    parser.add_argument('--seeds', type=int, nargs='+', help="these, not the suite's")
    parser.add_argument('--output', type=Path, default=Path('output/accuracy'), help='where runs go')
    parser.add_argument('--results', type=Path, help='summary, and a .md beside (accuracy.json in --output)')
    parser.add_argument('--jobs', type=int, default=1 if cuda else 2, help='runs at a time')
    parser.add_argument('--threads', type=int, default=8 if cuda else 1, help='CPU threads of each')
    parser.add_argument('--device', default='cuda' if cuda else 'cpu')
    parser.add_argument(
        '--set', nargs='+', default=[], metavar='FLAG=VALUE', help='flags of train_distill for every run'
    )
    parser.add_argument('--replace', action='store_true', help='drop what RESULTS has of these suites and is not here')
    parser.add_argument(
        '--keep', metavar='ARCHIVE', type=Path, help='write settings and epochs of the runs into this tar.xz'
    )
    parser.add_argument('--no-run', action='store_true', help='run nothing, summarize what is there')
    parser.add_argument('--no-analysis', action='store_true', help='do not look inside the runs')
    args = parser.parse_args(argv)
    results = args.results or args.output / 'accuracy.json'
    if any('=' not in s for s in args.set):
        parser.error(f'--set takes FLAG=VALUE, got {" ".join(args.set)}')
    overrides = {k.replace('-', '_'): yaml.safe_load(v) for k, v in (s.split('=', 1) for s in args.set)}
    chosen = [load_suite(name, args.output, {**overrides, 'device': args.device}) for name in args.suites]
    for suite in chosen:
        try:
            suite.choose(args.methods, args.seeds)
        except ValueError as e:
            parser.error(str(e))
        lost = [] if args.replace else show_known(suite, results)
        if lost:
            parser.error(
                f'{results} has {len(lost)} results of {suite.name} whose runs are not in {suite.folder} with these flags, as '
                f'{lost[0]}: give another --results, unpack the runs, or --replace to drop them'
            )

    writing = threading.Lock()

    def save() -> dict[str, Any]:
        with writing:  # parallel runs may end at the same time
            return write_results(chosen, results, args.device, args.keep)

    try:
        for suite in chosen if not args.no_run else ():
            run_suite(suite, args.jobs, args.threads, save)
        if not args.no_analysis:
            for suite in chosen:
                if suite.tuned() is not None:
                    analyse([suite.run(m, s) for m in suite.methods for s in suite.seeds], args.threads * args.jobs)
    except (RuntimeError, FileNotFoundError, subprocess.CalledProcessError) as e:
        print(f'accuracy.py: error: {e}', file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print('accuracy.py: interrupted; the same command goes on', file=sys.stderr)
        sys.exit(130)
    if args.keep:
        keep_runs(chosen, args.keep)
    known = save()
    print('\n\n'.join(format_table(known['suites'][suite.name]) for suite in chosen))
    print(f'\n{results}, {results.with_suffix(".md").name}')


if __name__ == '__main__':
    main()
