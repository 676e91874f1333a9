"""Run tasks in forked processes of their own, so that none can stop, block or spoil another one or the caller."""

import ctypes
import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from multiprocessing.connection import Connection, wait

_FORK = multiprocessing.get_context("fork")
_PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """Ask Linux to kill this process when its parent ends, however it ends."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _child(task: Callable[[], Iterable[dict]], pipe: Connection) -> None:
    # a group of its own, so that stopping it stops what it has started
    os.setsid()
    die_with_parent()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        for record in task():
            pipe.send(("record", record))
        pipe.send(("done", None))
    # whatever a task raises belongs in the results
    except BaseException:
        pipe.send(("failed", traceback.format_exc()))


def in_processes(
    tasks: Mapping[str, Callable[[], Iterable[dict]]], count: int, seconds: float
) -> Iterator[tuple[str, str, dict | str | None]]:
    """Run each task in a process of its own, `count` at a time, and give what they send as it comes.

    The caller must not have initialised CUDA: a forked process cannot use it then.

    Args:
        tasks: by name; each gives records.
        seconds: for all of them; what runs then is killed, and what waits is not started.

    Returns:
        (task, "record", the record), and at the end of each task (task, "done" or "overran", None) or (task, "failed",
        the traceback, or how the process ended).
    """
    end = time.monotonic() + seconds
    waiting = list(tasks)
    running: dict[Connection, tuple[str, multiprocessing.Process]] = {}
    try:
        while waiting or running:
            while waiting and len(running) < count and time.monotonic() < end:
                name = waiting.pop(0)
                reader, writer = _FORK.Pipe(duplex=False)
                process = _FORK.Process(target=_child, args=(tasks[name], writer), daemon=False)
                process.start()
                writer.close()
                running[reader] = name, process
            left = end - time.monotonic()
            if left <= 0:
                for name in [*(name for name, _ in running.values()), *waiting]:
                    yield name, "overran", None
                return
            for reader in wait(list(running), timeout=left):
                name, process = running[reader]
                try:
                    kind, value = reader.recv()
                except EOFError:
                    process.join()
                    kind, value = "failed", f"the process ended with exit status {process.exitcode}, without a word"
                yield name, kind, value
                if kind != "record":
                    del running[reader]
                    _stop(process)
    finally:
        for _, process in running.values():
            _stop(process)


def _stop(process: multiprocessing.Process) -> None:
    """Kill a process and all that it has started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    # it has ended, or has not made its group yet
    except (ProcessLookupError, PermissionError):
        process.kill()
    process.join()
