"""Does it help? A grid of methods x seeds over train_distill, resumable run by run.

    python benchmarks/accuracy.py SUITE [SUITE ...]       # benchmarks/suites/SUITE.yaml; `make bench-accuracy`

A suite (benchmarks/suites/*.yaml) names data, teacher, student, methods and seeds; a method (benchmarks/methods/*.yaml) is
a few flags; `pe_q3@5` is pe_q3 with a weight of 5. A suite with `rates` first trains the student alone at each, and every method takes the best one. A suite with a
`backbone` pretrains one for each seed, from which the methods with `starts: backbone` begin. One with `cache_views` keeps
the teacher's features for so many views in a cache for each seed. One with `like: OTHER` is the other with changes. Each run
is one `train_distill -c CONFIG` and leaves OUTPUT/SUITE/METHOD-SEED/; a finished run is not repeated, an interrupted
one is resumed. The results so far go to RESULTS as JSON and as a table after every run.
"""

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import torch
import yaml
from environment import environment, write

from timm_pe.run_folder import RunFolder
from timm_pe.runs.compare import confidence_interval
from timm_pe.runs.finished import read_run

ROOT = Path(__file__).resolve().parent
SCRIPT = ROOT.parent / 'train_distill.py'
# methods to which the others are compared: `minus_NAME` in the results
BASELINES = {'alone': 'student alone', 'kd': 'KD', 'no_projector': 'no projector'}
POWER = 0.8
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


@dataclass
class Run:
    """One call of train_distill.

    Attributes:
        name: METHOD-SEED, or 'teacher'.
        folder: Its run folder.
        flags: The content of its YAML.
        script: What runs it: train_distill.py, or ablations.py, which knows more projectors.
    """

    name: str
    folder: Path
    flags: dict[str, Any]
    script: Path = SCRIPT

    @property
    def result_file(self) -> Path:
        return self.folder / 'result.json'

    def result(self) -> dict[str, Any] | None:
        """The result, None if the run is missing, unfinished or was made with other flags."""
        if not self.result_file.exists():
            return None
        result = json.loads(self.result_file.read_text())
        return result if result['flags'] == self.flags else None


@dataclass
class Suite:
    """One pair on one data set; see benchmarks/suites/."""

    name: str
    title: str
    common: dict[str, Any]
    teacher: dict[str, Any]
    student: dict[str, Any]
    methods: list[str]
    seeds: list[int]
    folder: Path
    overrides: dict[str, Any] = field(default_factory=dict)
    rates: list[float] = field(default_factory=list)
    backbone: dict[str, Any] = field(default_factory=dict)
    cache_views: int | None = None
    of_methods: dict[str, dict[str, Any]] = field(default_factory=dict)

    def choose(self, methods: list[str] | None, seeds: list[int] | None) -> None:
        """Run these alone; the results still have all that is there.

        Raises:
            ValueError: A method that does nothing under the suite's optimizer.
        """
        self.known_methods = list(dict.fromkeys([*self.methods, *(methods or ())]))
        self.known_seeds = sorted({*self.seeds, *(seeds or ())})
        self.methods, self.seeds = methods or self.methods, seeds or self.seeds
        opt = {'opt': 'sgd', **self.common, **self.student, **self.overrides}['opt']
        for method in self.methods:
            needed = load_method(method).get('optimizers')
            if needed and opt not in needed:
                raise ValueError(
                    f'{method} does nothing under --opt {opt} of {self.name}: it is for {", ".join(needed)}'
                )

    def finished(self) -> dict[str, dict[int, dict[str, Any]]]:
        """The results that are there, by method and seed; empty before the learning rate is tuned."""
        if self.tuned() is None:
            return {}
        found = {m: {s: r for s in self.known_seeds if (r := self.run(m, s).result())} for m in self.known_methods}
        return {method: of_seed for method, of_seed in found.items() if of_seed}

    def __post_init__(self) -> None:
        # no method has it, and it stays when fewer seeds are asked for
        self.tuning_seed = max(self.seeds) + 1000
        self.choose(None, None)

    def tuning_runs(self) -> dict[float, Run]:
        """The student alone at each of `rates`, with a seed that no method has. Empty if the suite fixes the rate."""
        flags = {**self.student, 'seed': self.tuning_seed}
        return {r: self._run(self.folder, f'tune-lr{r:g}', {**flags, 'lr': r}) for r in self.rates}

    def tuned(self) -> dict[float, float] | None:
        """Top-1 of the student alone at each rate, best first; None if not all are known (and {} without `rates`)."""
        results = {rate: run.result() for rate, run in self.tuning_runs().items()}
        if not all(results.values()):
            return None
        return dict(sorted(((rate, r['top1']) for rate, r in results.items()), key=lambda rate_top1: -rate_top1[1]))

    def missing_data(self) -> list[str]:
        """Folders of data and weights that the runs read and that are not there."""
        model = self.teacher['model']
        named = [{**flags, **self.overrides}.get('data_dir') for flags in (self.common, self.teacher)]
        named += [model.removeprefix('local-dir:')] if model.startswith('local-dir:') else []
        return [path for path in dict.fromkeys(filter(None, named)) if not Path(path).is_dir()]

    def teacher_run(self) -> Run | None:
        """The run that trains the teacher; None if the suite takes an existing one."""
        if 'name' not in self.teacher:
            return None
        return self._run(self.folder.parent / 'teachers', self.teacher['name'], self.teacher)

    def backbone_run(self, seed: int) -> Run:
        """The run that pretrains the student of a seed without labels."""
        flags = {'model': self.student['model'], **self.backbone, **self._teacher_flags(for_timm=False), 'seed': seed}
        return self._run(self.folder.parent / 'backbones', f'{self.backbone["name"]}-{seed}', flags)

    def backbone_runs(self) -> list[Run]:
        """The backbones that the methods need, one for each seed."""
        starts = any(load_method(method).get('starts') == 'backbone' for method in self.methods)
        return [self.backbone_run(seed) for seed in self.seeds] if starts else []

    def run(self, method: str, seed: int) -> Run:
        """The run of one method and seed."""
        loaded = load_method(method)
        own = self.of_methods.get(method.partition('@')[0], {})
        flags = {**self.student, **loaded['flags'], **own, **loaded.get('weight', {}), 'seed': seed}
        tuned = self.tuned()
        if tuned is None:
            raise RuntimeError(f'{self.name}: the learning rate is not tuned yet')
        if tuned:
            flags['lr'] = next(iter(tuned))
        if loaded.get('starts') == 'backbone':
            flags['pretrained_path'] = str(self.backbone_run(seed).folder)
        kind = loaded['teacher']
        if kind != 'none':
            flags |= self._teacher_flags(for_timm=kind == 'timm')
        logits = flags.get('kd_loss_weight') or flags.get('pe_target') == 'logits'
        if kind == 'timm_pe' and self.cache_views and not logits:
            # the teacher's features depend on the seed by the augmentation, and not on the method
            cache = self.folder.parent / 'caches' / f'{self.teacher["name"]}-{seed}'
            flags |= {'teacher_cache': str(cache), 'teacher_cache_views': self.cache_views}
        run = self._run(self.folder, f'{method}-{seed}', flags)
        run.script = SCRIPT.parent / loaded.get('script', SCRIPT.name)
        return run

    def _teacher_flags(self, for_timm: bool) -> dict[str, Any]:
        made = self.teacher_run()
        checkpoint = str(made.folder) if made else None
        if for_timm:
            return {'kd_model_name': f'local-dir:{checkpoint}/local-dir' if checkpoint else self.teacher['model']}
        model = self.teacher.get('architecture', self.teacher['model'])
        flags = {'teacher': model, 'teacher_eval': False}  # it was evaluated when it was made
        return {**flags, 'teacher_checkpoint': checkpoint} if checkpoint else flags

    def _run(self, output: Path, name: str, flags: dict[str, Any]) -> Run:
        flags = {k: v for k, v in flags.items() if k not in ('name', 'architecture')}
        flags = {**self.common, **flags, **self.overrides, 'output': str(output), 'experiment': name, 'resume': 'auto'}
        return Run(name, output / name, flags)


def load_method(name: str) -> dict[str, Any]:
    """A method's label, kind of teacher (none, timm_pe, timm) and flags; NAME@WEIGHT is NAME with another weight.

    Raises:
        ValueError: No such method, or a weight that is no number or has nothing to weigh.
    """
    base, at, weight = name.partition('@')
    path = ROOT / 'methods' / f'{base}.yaml'
    if not path.is_file():
        raise ValueError(
            f"unknown method '{base}': choose from {', '.join(sorted(p.stem for p in path.parent.iterdir()))}"
        )
    method = yaml.safe_load(path.read_text())
    if at:
        if method['teacher'] == 'none':
            raise ValueError(f"'{name}': {base} has no teacher, so it has no weight")
        weighed = 'kd_loss_weight' if method['flags'].get('distill_loss_weight') == 0 else 'distill_loss_weight'
        method['weight'] = {weighed: float(weight)}
        method['label'] += f', weight {weight}'
    return method


def method_name(name: str) -> str:
    """For argparse: a name that `load_method` takes."""
    try:
        load_method(name)
    except ValueError as e:
        raise argparse.ArgumentTypeError(str(e)) from e
    return name


def read_suite(name: str) -> dict[str, Any]:
    """The content of a suite's file; of one that is `like` another, that one's with its changes."""
    suite = yaml.safe_load((ROOT / 'suites' / f'{name}.yaml').read_text())
    if 'like' not in suite:
        return suite
    other = read_suite(suite.pop('like'))
    merged = {k: {**other[k], **v} for k, v in suite.items() if isinstance(v, dict) and k in other}
    return {**other, **suite, **merged}


def load_suite(name: str, output: Path, overrides: dict[str, Any]) -> Suite:
    """A suite by its name."""
    return Suite(name=name, folder=output / name, overrides=overrides, **read_suite(name))


def execute(run: Run, threads: int) -> dict[str, Any]:
    """Run train_distill, unless the run is finished already.

    Raises:
        RuntimeError: It failed (the message has the last line of its log), or its folder holds a run with other flags.
    """
    done = run.result()
    if done:
        return done
    run.folder.mkdir(parents=True, exist_ok=True)
    config, log = run.folder / 'config.yaml', run.folder / 'log.txt'
    if run.result_file.exists() or (config.exists() and yaml.safe_load(config.read_text()) != run.flags):
        raise RuntimeError(f"'{run.folder}' holds a run with other flags: remove it, or give another --output")
    config.write_text(yaml.safe_dump(run.flags))
    given = ['-c', str(config)]
    if 'teacher' in run.flags and 'teacher_dtype' not in run.flags:
        # that of timm's own tasks and of the runs that are kept, on any machine
        given += ['--teacher-dtype', 'float32']
    command = [sys.executable, str(run.script), *given]
    start = time.perf_counter()
    with open(log, 'a') as f:
        code = subprocess.run(
            command, stdout=f, stderr=f, env={**os.environ, 'OMP_NUM_THREADS': str(threads)}
        ).returncode
    if code:
        raise RuntimeError(f'{run.name} ended with exit code {code}: {log.read_text().strip().splitlines()[-1]}')
    result = {'name': run.name, **read_summary(run.folder), 'seconds': round(time.perf_counter() - start, 1)}
    device = run.flags.get('device', 'cuda') if torch.cuda.is_available() else 'cpu'
    result['ran'] = {'date': f'{date.today()}', 'environment': environment(device)}
    result |= {'command': ' '.join(['python', str(run.script.relative_to(SCRIPT.parent)), *given]), 'flags': run.flags}
    write(run.result_file, json.dumps(result, indent=2) + '\n')
    return result


def read_summary(folder: Path) -> dict[str, float | int]:
    """Numbers of the last epoch, and the best top-1 of any; of a backbone its cosine."""
    with open(folder / 'summary.csv', newline='') as f:
        rows = [row for row in csv.DictReader(f) if row['eval_loss']]
    last = rows[-1]
    if 'eval_top1' not in last:
        return {'epochs': int(last['epoch']) + 1, 'cosine': float(last['eval_cosine'])}
    return {
        'epochs': int(last['epoch']) + 1,
        'top1': float(last['eval_top1']),
        'top5': float(last['eval_top5']),
        'best_top1': max(float(row['eval_top1']) for row in rows),
        'train_loss': float(last['train_loss']),
    }


def export_for_timm(suite: Suite) -> None:
    """Export the teacher as a `local-dir:` folder, which timm's own tasks can name."""
    from safetensors.torch import load_file
    from timm import create_model
    from timm.models import save_for_hf

    import timm_pe.zoo  # noqa: F401  registers the CIFAR networks

    run = suite.teacher_run()
    folder = run.folder / 'local-dir'
    if (folder / 'config.json').exists():
        return
    state = load_file(run.folder / 'student.safetensors')
    classes = suite.common['num_classes']
    model = create_model(suite.teacher.get('architecture', suite.teacher['model']), num_classes=classes)
    model.load_state_dict(state)
    save_for_hf(model, str(folder), safe_serialization=True)


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


def summarize(suite: Suite) -> dict[str, Any]:
    """The results of the finished runs of a suite."""
    teacher_run = suite.teacher_run()
    teacher = teacher_run.result() if teacher_run else None
    results = suite.finished()
    top1 = {m: {s: r['top1'] for s, r in of_seed.items()} for m, of_seed in results.items()}
    methods = {}
    for method, of_seed in results.items():
        values = list(top1[method].values())
        methods[method] = {
            'label': load_method(method)['label'],
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
                read_run(RunFolder(suite.run(method, s).folder), method).epochs_to(results['alone'][s]['top1'])
                for s in of_seed
                if method != 'alone' and s in results.get('alone', {})
            ],
            'seconds': statistics.mean(r['seconds'] for r in of_seed.values()),
            'analysis': mean_analysis([suite.run(method, s).folder for s in of_seed]),
            'flags': load_method(method)['flags'] | load_method(method).get('weight', {}),
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


def would_lose(suites: list[Suite], results: Path) -> str:
    """What RESULTS has of these suites and the folders of runs have not, in words; '' if there is nothing.

    The suites will show what RESULTS has, as far as it is there.
    """
    known = json.loads(results.read_text())['suites'] if results.exists() else {}
    for suite in suites:
        there = known.get(suite.name, {}).get('methods', {})
        methods = (m for m in there if (ROOT / 'methods' / f'{m.partition("@")[0]}.yaml').is_file())
        suite.known_methods += [m for m in methods if m not in suite.known_methods]
        suite.known_seeds = sorted({*suite.known_seeds, *(s for row in there.values() for s in row['seeds'])})
        here = suite.finished()
        lost = [f'{m}-{s}' for m, row in there.items() for s in row['seeds'] if s not in here.get(m, {})]
        if lost:
            return (
                f'{results} has {len(lost)} results of {suite.name} whose runs are not in {suite.folder} with these flags, as '
                f'{lost[0]}: give another --results, unpack the runs, or --replace to drop them'
            )
    return ''


def write_results(suites: list[Suite], results: Path, device: str) -> dict[str, Any]:
    """Write the results of these suites into RESULTS; other suites there are kept."""
    known = json.loads(results.read_text()) if results.exists() else {}
    known.setdefault('suites', {})
    for suite in suites:
        ran = [result['ran'] for of_seed in suite.finished().values() for result in of_seed.values() if 'ran' in result]
        # that of the newest run; runs of before do not say it
        there = known['suites'].get(suite.name) or {'date': f'{date.today()}', 'environment': environment(device)}
        newest = max(ran, key=lambda r: r['date'], default={k: there[k] for k in ('date', 'environment')})
        known['suites'][suite.name] = {**newest, **summarize(suite)}
    write(results, json.dumps(known, indent=2) + '\n')
    tables = '\n\n'.join(format_table(s) for s in known['suites'].values())
    note = (
        'Top-1 after the last epoch, mean +- standard deviation; differences are paired by seed, with 95 % t intervals. '
        'Epochs: after how many a run first had the final top-1 of the student alone of its seed, where it was validated.'
    )
    write(results.with_suffix('.md'), f'# Accuracy\n\n{note}\n\n{tables}\n')
    return known


def run_suite(suite: Suite, jobs: int, threads: int, done: Any) -> None:
    """Teacher, then all methods and seeds, `jobs` at a time; `done` is called after each run."""
    if suite.missing_data():
        raise RuntimeError(f'{", ".join(suite.missing_data())} is missing: `make data` builds it')
    teacher = suite.teacher_run()
    tuning = suite.tuning_runs()
    todo = sum(run.result() is None for run in [*([teacher] if teacher else []), *tuning.values()])
    print(
        f'{suite.name}: {todo} runs of teacher and learning rate first, then {len(suite.methods) * len(suite.seeds)} of methods '
        f'and seeds, those that are finished not again; each logs to {suite.folder}/RUN/log.txt',
        flush=True,
    )
    if teacher:
        said = teacher.result() is None
        if not said and not (teacher.folder / 'student.safetensors').exists():
            raise RuntimeError(
                f"'{teacher.folder}' has results and no weights, as an archive of runs: remove it, and the teacher is trained"
            )
        result = execute(teacher, threads)
        if said:
            print(f'{suite.name}: teacher {result["top1"]:.2f} %, {result["seconds"]:.0f} s', flush=True)
        if any(load_method(m)['teacher'] == 'timm' for m in suite.methods):
            export_for_timm(suite)
    for rate, run in tuning.items():
        fresh = run.result() is None
        result = execute(run, threads)
        if fresh:
            print(
                f'{suite.name}: student alone at lr {rate:g} {result["top1"]:.2f} %, {result["seconds"]:.0f} s',
                flush=True,
            )
            done()
    runs = [suite.run(method, seed) for seed in suite.seeds for method in suite.methods]
    backbones = {str(run.folder): run for run in suite.backbone_runs()}
    pretraining = threading.Lock()

    def one(run: Run) -> None:
        backbone = backbones.get(run.flags.get('pretrained_path', ''))
        if backbone is not None:
            with pretraining:  # runs that start from one wait for it
                execute(backbone, threads)
        fresh = run.result() is None
        result = execute(run, threads)
        if fresh:
            left = sum(r.result() is None for r in runs)
            print(
                f'{suite.name}: {run.name} {result["top1"]:.2f} %, {result["seconds"]:.0f} s, {left} runs left',
                flush=True,
            )
            done()

    with ThreadPoolExecutor(jobs) as pool:
        futures = [pool.submit(one, run) for run in runs]
    for future in futures:
        future.result()


def main(argv: list[str] | None = None) -> None:
    """Run suites.

    Args:
        argv: Command line; None takes that of the process.
    """
    suites = sorted(p.stem for p in (ROOT / 'suites').glob('*.yaml'))
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
    if not args.replace and (lost := would_lose(chosen, results)):
        parser.error(lost)

    writing = threading.Lock()

    def save() -> dict[str, Any]:
        with writing:  # parallel runs may end at the same time
            return write_results(chosen, results, args.device)

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
    known = save()
    print('\n\n'.join(format_table(known['suites'][suite.name]) for suite in chosen))
    print(f'\n{results}, {results.with_suffix(".md").name}')


if __name__ == '__main__':
    main()
