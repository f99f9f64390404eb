"""What a grid of methods x seeds runs: suites and methods as YAML, and each run as one call of train_distill."""

import csv
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import torch
import yaml
from environment import environment, write

ROOT = Path(__file__).resolve().parent
SCRIPT = ROOT.parent / 'train_distill.py'


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

    def __post_init__(self) -> None:
        # no method has it, and it stays when fewer seeds are asked for
        self.tuning_seed = max(self.seeds) + 1000
        self.shown = (list(self.methods), sorted(self.seeds))

    def show(self, methods: Iterable[str], seeds: Iterable[int]) -> None:
        """Have these in the results too, as far as they are there."""
        self.shown = (list(dict.fromkeys([*self.shown[0], *methods])), sorted({*self.shown[1], *seeds}))

    def choose(self, methods: list[str] | None, seeds: list[int] | None) -> None:
        """Run these alone; the results still have all that is there.

        Raises:
            ValueError: A method that means something else under the suite's optimizer.
        """
        self.methods, self.seeds = methods or self.methods, seeds or self.seeds
        self.show(self.methods, self.seeds)
        settings = {'opt': 'sgd', **self.common, **self.student, **self.overrides}
        for method in self.methods:
            for name, allowed in load_method(method).get('only_with', {}).items():
                if settings.get(name) not in allowed:
                    raise ValueError(
                        f'{method} is not for {name} {settings.get(name)} of {self.name}, but for {", ".join(map(str, allowed))}'
                    )

    def finished(self) -> dict[str, dict[int, dict[str, Any]]]:
        """The results that are there, by method and seed; empty before the learning rate is tuned."""
        if self.tuned() is None:
            return {}
        methods, seeds = self.shown
        found = {m: {s: r for s in seeds if (r := self.run(m, s).result())} for m in methods}
        return {method: of_seed for method, of_seed in found.items() if of_seed}

    def finished_runs(self) -> list[Run]:
        """The runs of `finished`, and those that they rest on: teacher, learning rate, backbones."""
        shown = [self.run(method, seed) for method, of_seed in self.finished().items() for seed in of_seed]
        below = [self.teacher_run(), *self.tuning_runs().values()]
        if any('pretrained_path' in run.flags for run in shown):
            below += [self.backbone_run(seed) for seed in self.shown[1]]
        return [run for run in [*below, *shown] if run and run.result()]

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
        if kind == 'timm_pe' and self.cache_views:
            # what the teacher says depends on the seed by the augmentation; what of it is kept, on the method
            kept = '-logits' if flags.get('pe_target') == 'logits' else '-both' if flags.get('kd_loss_weight') else ''
            cache = self.folder.parent / 'caches' / f'{self.teacher["name"]}-{seed}{kept}'
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


def known_suites() -> list[str]:
    """Names of all suites."""
    return sorted(p.stem for p in (ROOT / 'suites').glob('*.yaml'))


def is_method(name: str) -> bool:
    """Whether there is a method of this name, at any weight."""
    return (ROOT / 'methods' / f'{name.partition("@")[0]}.yaml').is_file()


def load_method(name: str) -> dict[str, Any]:
    """A method's label, kind of teacher (none, timm_pe, timm) and flags; NAME@WEIGHT is NAME with another weight.

    Raises:
        ValueError: No such method, or a weight that is no number or has nothing to weigh.
    """
    base, at, weight = name.partition('@')
    if not is_method(name):
        known = sorted(p.stem for p in (ROOT / 'methods').glob('*.yaml'))
        raise ValueError(f"unknown method '{base}': choose from {', '.join(known)}")
    method = yaml.safe_load((ROOT / 'methods' / f'{base}.yaml').read_text())
    if at:
        if method['teacher'] == 'none':
            raise ValueError(f"'{name}': {base} has no teacher, so it has no weight")
        weighed = 'kd_loss_weight' if method['flags'].get('distill_loss_weight') == 0 else 'distill_loss_weight'
        method['weight'] = {weighed: float(weight)}
        method['label'] += f', weight {weight}'
    return method


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


def run_suite(suite: Suite, jobs: int, threads: int, done: Callable[[], Any]) -> None:
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
