"""SIGTERM, SIGINT and SIGUSR1 as a request to stop after the step, which all ranks see at the same step."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType

import torch
import torch.distributed as dist

from .runtime import Runtime

# updates between two checks for signals if each check waits for the devices
SELDOM = 50
SIGNALS = [getattr(signal, name) for name in ('SIGTERM', 'SIGINT', 'SIGUSR1') if hasattr(signal, name)]


_masks: list[set[int]] = []  # signal masks of this thread, before each fork in progress
_entered = 0  # number of Interrupts entered


def _before_fork() -> None:
    """Block signals in a new worker: one sent to all processes must not end it before its handlers are set."""
    if _entered:
        _masks.append(signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS))


def _after_fork() -> None:
    if _masks:
        signal.pthread_sigmask(signal.SIG_SETMASK, _masks.pop())


if hasattr(os, 'register_at_fork'):
    os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_masks.clear)


class Interrupted(BaseException):
    """A run stopped by a signal; a BaseException like KeyboardInterrupt, so that `except Exception` does not catch it.

    Attributes:
        signum: The signal; the command line exits with 128 + signum, as shells do.
        of_all: Whether all ranks stop there, and none waits for another.
    """

    def __init__(self, signum: int, where: str, of_all: bool = True):
        super().__init__(f'stopped by {signal.Signals(signum).name} {where}')
        self.signum, self.of_all = signum, of_all


@contextlib.contextmanager
def stopping_at_once(where: str) -> Iterator[None]:
    """Outside of training, let each of the signals end the process with its clean-up.

    An exception out of a signal handler may come up in any code, which may take it for an error of its own (Python
    3.11 makes one in an import a RuntimeError) or drop it. So the signal is kept, and ends the process in each case.

    Raises:
        Interrupted: One came; `where` says when.
    """
    came: list[int] = []

    def stop(signum: int, frame: FrameType | None) -> None:
        came.append(signum)
        # SIGINT as Python has it: loader workers are quiet about a KeyboardInterrupt
        raise KeyboardInterrupt if signum == signal.SIGINT else Interrupted(signum, where, of_all=False)

    here = SIGNALS if threading.current_thread() is threading.main_thread() else []
    # not where the parent process ignores it, or code outside of Python handles it
    left = (signal.SIG_IGN, None)
    before = {number: signal.signal(number, stop) for number in here if signal.getsignal(number) not in left}
    try:
        yield
    except BaseException as e:
        if came:
            raise Interrupted(came[0], where, of_all=False) from e
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if came:
        raise Interrupted(came[0], where, of_all=False)


class Interrupts:
    """Inside this context the first signal is kept for `requested`; a second SIGINT stops at once.

    Args:
        runtime: Device and ranks; None for a single process.
    """

    def __init__(self, runtime: Runtime | None = None):
        self.distributed = runtime is not None and runtime.distributed
        self.device = runtime.device if runtime is not None else torch.device('cpu')
        self.signum = 0
        self.group = runtime.hosts if runtime is not None else None
        waits_for_device = self.distributed and self.group is None and self.device.type != 'cpu'
        self.every, self.asked = SELDOM if waits_for_device else 1, 0

    def __enter__(self) -> 'Interrupts':
        # Python allows only the main thread to set signal handlers
        here = SIGNALS if threading.current_thread() is threading.main_thread() else []
        self.before = {number: signal.signal(number, self._handle) for number in here}
        global _entered
        _entered += 1
        return self

    def __exit__(self, *error: object) -> None:
        global _entered
        _entered -= 1
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if self.signum and signum == signal.SIGINT:
            raise KeyboardInterrupt
        self.signum = self.signum or signum

    def requested(self) -> int:
        """The signal that any rank got, 0 for none. All ranks must call it equally often."""
        if not self.distributed:
            return self.signum
        self.asked += 1
        if self.asked % self.every:
            return 0
        signum = torch.tensor(self.signum, device=self.device if self.group is None else 'cpu')
        dist.all_reduce(signum, dist.ReduceOp.MAX, group=self.group)
        return int(signum)


def ignore_in_worker() -> None:
    """Let a loader worker survive signals that a terminal or a scheduler sends to all processes of a run.

    The main process finishes its step with the workers' batches, then ends them: a worker obeys only its SIGTERM.
    """
    for number in SIGNALS:
        if number != signal.SIGTERM:
            signal.signal(number, signal.SIG_IGN)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {number})
    if hasattr(signal, 'sigwaitinfo'):  # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()


def _end_with(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)
