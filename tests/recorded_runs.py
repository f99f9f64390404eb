"""Runs of the script that write down what happened inside: in this process, or on two ranks in two others.

python tests/recorded_runs.py < JOBS.json    # one rank, with torchrun's environment; a port and a job in each entry
"""

import contextlib
import hashlib
import io
import json
import os
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

os.environ.setdefault('OMP_NUM_THREADS', '1')
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from timm.utils import unwrap_model

import train_distill
from timm_pe.data.datasets import DigitsReader
from timm_pe.data.epochs import plain_loader
from timm_pe.process.signals import Interrupts
from timm_pe.train.cache import TeacherCache
from timm_pe.train.trainer import Trainer

torch.set_num_threads(1)


@dataclass
class Job:
    """A command line, and what is done to its run.

    Attributes:
        argv: The command line.
        stop: The run is asked to stop when it has looked for a signal so often, as a share of the looks of the first job of
            its list; 0 is the first look, None never.
        without_cache: The teacher is run on the batches of a cache in place of what that has kept.
    """

    argv: list[str]
    stop: float | None = None
    without_cache: bool = False


@dataclass
class Done:
    """How a run ended.

    Attributes:
        code: Exit code, of the rank with the highest; a traceback is 70.
        said: What it wrote to stderr (rank 0's, and the others' after it).
        ranks: What each rank that trained has written down: see `_record`.
    """

    code: int
    said: str
    ranks: list[dict[str, Any]]


def perform(jobs: Iterable[Job]) -> Iterator[Done]:
    """Run jobs one after the other in this process; up to the first that fails."""
    looks = 0
    for job in jobs:
        done = _perform(job, 0 if job.stop is None else max(1, round(job.stop * looks)))
        looks = looks or (done.ranks[0]['looks'] if done.ranks else 0)
        yield done
        if done.code not in (0, 128 + signal.SIGTERM):
            return


def _perform(job: Job, stop_at: int) -> Done:
    said, record, code = io.StringIO(), {}, 0
    with _recording(record, job, stop_at), contextlib.redirect_stderr(said):
        try:
            train_distill.main(job.argv)
        except SystemExit as e:
            code = e.code or 0
        except Exception:
            traceback.print_exc()
            code = 70
    return Done(code, said.getvalue(), [record] if record else [])


def perform_on_two_ranks(jobs: list[Job], folder: Path, timeout: float = 300) -> list[Done]:
    """Likewise in two processes that hash strings differently."""
    # a port for each job: a rank that is early with the next one would else join the store of the last one, and wait for ever
    text = json.dumps(
        [{'port': port, 'job': asdict(job)} for port, job in zip(_free_ports(len(jobs)), jobs, strict=True)]
    )
    ranks = []
    for rank in range(2):
        env = {**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONHASHSEED': str(rank + 1), 'MASTER_ADDR': '127.0.0.1'}
        env |= {'RANK': str(rank), 'LOCAL_RANK': str(rank), 'WORLD_SIZE': '2'}
        with open(folder / f'rank{rank}.json', 'w') as out, open(folder / f'rank{rank}.err', 'w') as err:
            command = [sys.executable, __file__]
            ranks.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=out, stderr=err, env=env, text=True))
    try:
        for process in ranks:
            process.stdin.write(text)
            process.stdin.close()
        for process in ranks:
            process.wait(timeout)
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    lines = [(folder / f'rank{rank}.json').read_text().splitlines() for rank in range(2)]
    if not all(lines):
        raise RuntimeError(''.join((folder / f'rank{rank}.err').read_text() for rank in range(2)))
    return [_together([Done(**json.loads(line)) for line in of_job]) for of_job in zip(*lines, strict=False)]


def _together(ranks: list[Done]) -> Done:
    return Done(
        max(d.code for d in ranks), ''.join(d.said for d in ranks), [record for d in ranks for record in d.ranks]
    )


def _free_ports(number: int) -> list[str]:
    with contextlib.ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(number)]
        for s in sockets:
            s.bind(('127.0.0.1', 0))
        return [str(s.getsockname()[1]) for s in sockets]


@contextlib.contextmanager
def _recording(record: dict[str, Any], job: Job, stop_at: int) -> Iterator[None]:
    looks = [0]
    train = Trainer.fit

    def requested(self: Interrupts) -> int:
        looks[0] += 1
        return signal.SIGTERM if looks[0] == stop_at else 0

    def fit(trainer: Trainer) -> None:
        before = _states(trainer)
        train(trainer)
        _record(record, trainer, before)
        record['looks'] = looks[0]

    def few_digits(self: DigitsReader, split: str) -> None:
        make_digits(self, split)
        few = slice(24 if 'train' in split else 12)
        self.indices, self.files, self.targets = self.indices[few], self.files[few], self.targets[few]

    make_digits = DigitsReader.__init__
    with contextlib.ExitStack() as patches:
        patches.enter_context(mock.patch.object(DigitsReader, '__init__', few_digits))
        patches.enter_context(mock.patch.object(Interrupts, 'requested', requested))
        patches.enter_context(mock.patch.object(Trainer, 'fit', fit))
        if job.without_cache:
            patches.enter_context(mock.patch.object(TeacherCache, '__call__', lambda self, target, compute: compute()))
        yield


def _states(trainer: Trainer) -> dict[str, dict[str, torch.Tensor]]:
    module = unwrap_model(trainer.task.get_trainable_module())
    trained = {
        which: {name: p.detach().clone() for name, p in getattr(module, which).named_parameters()}
        for which in ('student', 'projection')
    }
    # buffers too: running statistics are what a teacher in training mode would change first
    teacher = {
        f'{i}.{name}': value.cpu().clone()
        for i, teacher in enumerate(trainer.teachers)
        for name, value in unwrap_model(teacher.model).state_dict().items()
    }
    return {**trained, 'teacher': teacher}


def _record(record: dict[str, Any], trainer: Trainer, before: dict[str, dict[str, torch.Tensor]]) -> None:
    after = _states(trainer)
    for which, tensors in before.items():
        moved = [name for name, value in tensors.items() if not torch.equal(value, after[which][name])]
        record[which] = {'moved': moved, 'unmoved': sorted(set(tensors) - set(moved))}
    state = unwrap_model(trainer.task.get_trainable_module()).state_dict()
    digest = hashlib.sha256()
    for name, value in state.items():
        digest.update(name.encode() + value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    record['digest'] = digest.hexdigest()
    record['class_to_idx'] = [
        _class_to_idx(plain_loader(loader).dataset) for loader in (trainer.data.train, trainer.data.eval)
    ]


def _class_to_idx(dataset: Any) -> dict[str, int] | None:
    while not hasattr(dataset, 'reader') and hasattr(dataset, 'dataset'):
        dataset = dataset.dataset
    return getattr(getattr(dataset, 'reader', dataset), 'class_to_idx', None)


def main() -> None:
    """A rank: jobs from stdin, a line of JSON for each to stdout."""
    for done in perform(_on_its_port(json.load(sys.stdin))):
        print(json.dumps(asdict(done)), flush=True)


def _on_its_port(todo: list[dict[str, Any]]) -> Iterator[Job]:
    for entry in todo:
        os.environ['MASTER_PORT'] = entry['port']
        yield Job(**entry['job'])


if __name__ == '__main__':
    main()
