"""Starts scripts as forks of a process that has imported what they import, which takes most of the time of a short run.

A fork runs the file as `python FILE ARGUMENTS` does: with its own arguments, environment, folder, output, process group
and exit code. Only the imports, the seed of `hash` and the end of the interpreter are not its own, so that some tests
launch train.py for real.
"""

import atexit
import multiprocessing
import os
import resource
import runpy
import signal
import socket
import subprocess
import sys
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
CONTEXT = multiprocessing.get_context("forkserver")
if not torch.cuda.is_available():
    # what the imports start of CUDA would not survive a fork
    CONTEXT.set_forkserver_preload(["tests.train.imports"])


class Forks:
    """The ranks of a run, with the part of the interface of `subprocess.Popen` that the tests use."""

    def __init__(self, processes: list[ForkServerProcess]) -> None:
        self.processes, self.pid = processes, processes[0].pid

    def poll(self) -> int | None:
        codes = {process.exitcode for process in self.processes}
        if None in codes:
            return None
        assert len(codes) == 1, f"the ranks end with the codes {codes}"
        return codes.pop()

    def wait(self, timeout: float) -> int:
        """The exit code, which must be the same on every rank."""
        for process in self.processes:
            process.join(timeout)
            if process.exitcode is None:
                raise subprocess.TimeoutExpired(f"process {process.pid}", timeout)
        return self.poll()

    def kill(self) -> None:
        for process in self.processes:
            process.kill()

    def send_signal(self, number: int) -> None:
        for process in self.processes:
            os.kill(process.pid, number)


def start(
    command: list[object],
    log: Path,
    folder: Path,
    environment: dict[str, str],
    ranks: int = 1,
    largest_file: int = resource.RLIM_INFINITY,
) -> Forks:
    """Run a script.

    Args:
        command: the path of the script, and its arguments.
        log: where it prints.
        folder: where it starts.
        ranks: of more than one rank, each is told its number, as by a launcher.
        largest_file: a write beyond so many bytes of a file fails, as on a full disk.
    """
    group: list[dict[str, str]] = [{}]
    if ranks > 1:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            shared = dict(WORLD_SIZE=str(ranks), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(probe.getsockname()[1]))
        group = [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]
    words = [str(word) for word in command]
    processes = [
        CONTEXT.Process(target=_run, args=(words, log, folder, environment | own, largest_file)) for own in group
    ]
    for process in processes:
        process.start()
    return Forks(processes)


def run_ranks(ranks: int, command: list[object], log: Path, timeout: float = 500) -> None:
    """Run a script of the tests on so many ranks to its end, which must be without an error."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "tests" / "ops")))}
    forks = start(command, log, log.parent, environment, ranks)
    try:
        assert forks.wait(timeout) == 0, log.read_text()[-3000:]
    finally:
        forks.kill()


def _run(command: list[str], log: Path, folder: Path, environment: dict[str, str], largest_file: int) -> None:
    """What a fork does."""
    os.setsid()
    # under nohup the tests would inherit an ignored signal and pass it on
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, resource.RLIM_INFINITY))
    with open(log, "a") as file:
        for number in (1, 2):
            os.dup2(file.fileno(), number)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    torch.set_num_threads(1)
    sys.argv = list(command)
    sys.path[:0] = [str(Path(command[0]).parent), *environment.get("PYTHONPATH", "").split(os.pathsep)]
    try:
        runpy.run_path(command[0], run_name="__main__")
    finally:
        atexit._run_exitfuncs()
