"""RunFolder: the names of a run's files, and how each is read and written (method/weight_files.py names the weights files).

args.yaml                  the settings as they were given
summary.csv                a row an epoch: loss, raw terms, metrics, learning rate, images/s
last.pth.tar               the newest whole checkpoint; model_best.pth.tar, checkpoint-N.pth.tar, milestone-N.pth.tar
recovery-E-B.pth.tar       a checkpoint within an epoch, gone once `last` is further
student.safetensors        the weights of the best epoch, without teacher and projectors
analysis.json, figures/    what the analysis found
.lock                      held by the process that trains here
"""

import csv
import glob
import itertools
import json
import logging
import os
import shlex
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from timm.utils import trim_summary, update_summary

from .config.run_config import RunConfig, parse_config
from .config.yaml_file import read_yaml
from .errors import UsageError, one_line
from .method.weight_files import BEST, LAST, STUDENT
from .process.files import replaced

_logger = logging.getLogger(__name__)

Row = dict[str, float | None]
# files of an earlier run that a fresh one would replace; args.yaml alone means that the run never began
_WEIGHTS = (LAST, BEST, STUDENT, *(f'{kind}-*.pth.tar' for kind in ('checkpoint', 'milestone', 'recovery')))
_RESULTS = (*_WEIGHTS, 'summary.csv', 'summary.csv.until-*', 'analysis.json')
# its other files
_BESIDE = ('args.yaml', 'figures', 'tensorboard', 'train-batch-*.jpg')
# parent of run folders if --output names none
DEFAULT_OUTPUT = os.path.join('output', 'train')


class RunFolder:
    """A run folder of train_distill, which may not exist yet.

    Args:
        path: The folder.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        self.name = self.path.name
        self.args_file = self.path / 'args.yaml'
        self.summary_file = self.path / 'summary.csv'
        self.student_file = self.path / STUDENT
        self.last_file = self.path / LAST
        self.best_file = self.path / BEST
        self.analysis_file = self.path / 'analysis.json'
        self.figures = self.path / 'figures'

    @classmethod
    def around(cls, checkpoint: str | os.PathLike[str] | None) -> 'RunFolder | None':
        """The run folder that a path names, or that holds the file; None without a path or an args.yaml."""
        if not checkpoint:
            return None
        path = Path(checkpoint)
        folder = cls(path if os.path.isdir(path) else path.parent)
        return folder if os.path.isfile(folder.args_file) else None

    def missing(self, *files: Path) -> list[str]:
        """Names of those of `files` that do not exist."""
        return [file.name for file in files if not file.is_file()]

    def results(self) -> list[Path]:
        """Existing files that a fresh run in the folder would replace."""
        return [path for pattern in _RESULTS for path in self._files(pattern)]

    def has_weights(self) -> bool:
        """Whether there is a checkpoint or a student; a kill while the first epoch is saved may leave only its row."""
        return any(self._files(pattern) for pattern in _WEIGHTS)

    def check_is_of_a_run(self) -> None:
        """Check that a fresh run replaces files of an earlier run only.

        Raises:
            UsageError: The folder holds files that a run would replace, but is not a run folder.
        """
        results = self.results()
        if results and not self.args_file.is_file():
            raise UsageError(
                f"--output: '{self.path}' holds {results[0].name}, which a run would replace, and no {self.args_file.name}: it "
                f'is no run folder and stays as it is; give another --experiment'
            )

    def make_room(self, overwrite: bool) -> None:
        """Make room for a fresh run: an earlier run in it is moved aside (`NAME.1`, `NAME.2`, ...) or deleted.

        Args:
            overwrite: Delete what the earlier run wrote, and nothing else that is in the folder.
        """
        results = self.results()
        if overwrite:
            for path in [*results, *(path for pattern in _BESIDE for path in self._files(pattern))]:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            _logger.info(f"--overwrite: the earlier run in '{self.path}' is deleted.")
            return
        number = next(n for n in itertools.count(1) if not os.path.lexists(f'{self.path}.{n}'))
        aside = f'{self.path}.{number}'
        os.rename(self.path, aside)
        self.path.mkdir()
        _logger.info(
            f"The earlier run in '{self.path}' is now '{aside}' (--resume auto --experiment {shlex.quote(os.path.basename(aside))} "
            f'goes on with it, --overwrite deletes one).'
        )

    # Settings -----------------------------------------------------------------------------------------------------------

    def args(self) -> dict[str, Any]:
        """The settings of args.yaml by their names, not checked.

        Raises:
            ValueError: Unreadable, or no 'key: value' lines.
        """
        return read_yaml(str(self.args_file))

    def config(self) -> RunConfig:
        """The settings of the run; an invalid file ends the process, as on the command line."""
        return parse_config(['-c', str(self.args_file)])

    def write_args(self, text: str) -> None:
        """Write args.yaml."""
        with replaced(self.args_file) as path:
            Path(path).write_text(text, encoding='utf-8')

    # Epochs -------------------------------------------------------------------------------------------------------------

    def rows(self) -> list[Row]:
        """The rows of summary.csv, one per epoch; missing values are None.

        Raises:
            UsageError: Unreadable, or no table of numbers with an epoch in each row.
        """
        return _read_rows(self.summary_file)

    def rows_by_epoch(self) -> dict[int, Row]:
        """The rows of all epochs by number, including those of files that were moved aside.

        Raises:
            UsageError: See `rows`.
        """
        rows = [row for file in [*self._moved_aside(), self.summary_file] for row in _read_rows(file)]
        return dict(sorted(((int(row['epoch'] or 0), row) for row in rows), key=lambda pair: pair[0]))

    def _moved_aside(self) -> list[Path]:
        return sorted(self._files(f'{self.summary_file.name}.until-*'))

    def append_row(
        self,
        epoch: int,
        train_metrics: Mapping[str, float],
        eval_metrics: Mapping[str, float | str],
        lr: float,
    ) -> None:
        """Append an epoch to summary.csv; an epoch without validation has empty metrics."""
        columns = ['epoch', *(f'train_{k}' for k in train_metrics), *(f'eval_{k}' for k in eval_metrics), 'lr']
        self._move_aside_other_columns(columns)
        with self._changed_summary() as changed:
            update_summary(epoch, dict(train_metrics), dict(eval_metrics), filename=changed, lr=lr)

    def cut_rows(self, start_epoch: int) -> None:
        """Drop the rows from an epoch on, in files that were moved aside too: a resumed run writes them again."""
        for file in self._moved_aside():
            with replaced(file) as copy:
                shutil.copyfile(file, copy)
                trim_summary(copy, start_epoch)
            if not _read_rows(file):
                file.unlink()
        if self.summary_file.exists():
            with self._changed_summary() as changed:
                trim_summary(changed, start_epoch)

    @contextmanager
    def _changed_summary(self) -> Iterator[str]:
        """A copy of summary.csv to change, which then replaces it atomically."""
        with replaced(self.summary_file) as copy:
            if self.summary_file.exists():
                shutil.copyfile(self.summary_file, copy)
            else:
                Path(copy).touch()
            yield copy

    def _move_aside_other_columns(self, columns: Sequence[str]) -> None:
        """Start a new file if a run continues with other loss terms: a CSV has one header."""
        if not self.summary_file.exists():
            return
        with open(self.summary_file, newline='', encoding='utf-8') as f:
            header = next(csv.reader(f), None)
        if header not in (None, list(columns)):
            aside = f'{self.summary_file}.until-{time.strftime("%Y%m%d-%H%M%S")}'
            os.replace(self.summary_file, aside)
            _logger.warning(f"The columns of '{self.summary_file}' have changed: its rows so far are in '{aside}'.")

    # Analysis -----------------------------------------------------------------------------------------------------------

    def write_analysis(self, result: Mapping[str, Any]) -> None:
        """Write analysis.json."""
        with replaced(self.analysis_file) as path:
            Path(path).write_text(json.dumps(result, indent=2, allow_nan=False) + '\n', encoding='utf-8')

    # Checkpoints --------------------------------------------------------------------------------------------------------

    def recovery_files(self) -> list[Path]:
        """Checkpoints within an epoch."""
        return self._files('recovery-*.pth.tar')

    def epoch_files(self) -> list[Path]:
        """Checkpoints of single epochs that are kept."""
        return self._files('checkpoint-*.pth.tar')

    def resumable(self) -> list[Path]:
        """Checkpoints from which a run can resume, newest first.

        The last epoch's is another name of `last`; the one before it is the fallback if the disk loses that file.
        """
        files = [self.last_file, *self.recovery_files(), *self.epoch_files()]
        return sorted((f for f in files if f.is_file()), key=lambda f: f.stat().st_mtime_ns, reverse=True)

    def remove_half_written(self) -> None:
        """Remove the partial files of a killed process."""
        for pattern in ('*.tmp', 'tmp.pth.tar', 'recovery_tmp.pth.tar'):
            for path in self._files(pattern):
                path.unlink()

    def _files(self, pattern: str) -> list[Path]:
        return [Path(path) for path in glob.glob(os.path.join(glob.escape(str(self.path)), pattern))]


def _read_rows(file: Path) -> list[Row]:
    try:
        with open(file, newline='', encoding='utf-8') as f:
            rows = [{k: float(v) if v else None for k, v in row.items()} for row in csv.DictReader(f)]
    except (OSError, ValueError, TypeError, AttributeError, csv.Error) as e:
        raise UsageError(f"cannot read '{file}' ({one_line(e, 160)})") from e
    if any(row.get('epoch') is None for row in rows):
        raise UsageError(f"'{file}' cannot be read: {file.name} has rows without an epoch")
    return rows
