"""When training must stop early: SIGTERM, SIGHUP, Ctrl-C, or a launcher that died and left its ranks behind.

A rank cannot save alone, since its peers hold the other shards; so each rank only notes the wish, the trainer
compares notes every step, and all save together.
"""

import ctypes
import os
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

LAUNCHERS = (b"deepspeed.launcher.launch", b"torchrun", b"torch.distributed.run")
_PR_SET_PDEATHSIG = 1


class StopRequest:
    """Notes signals and the death of the launcher; use as a context manager around the training loop.

    Attributes:
        reason: why to stop, in words; "" to go on.
        exit_code: 128 + signal number once there is a reason, as a shell would report it.
    """

    def __init__(self, group: dist.ProcessGroup):
        self.reason, self.exit_code = "", 0
        self._group = group
        self._interrupted_at = 0.0
        self._terminals: list[int] = []
        # a run started by hand may well outlive its shell; one started by a launcher must not outlive that
        parent = os.getppid()
        self._parent = parent if _runs(parent, LAUNCHERS) else 0
        above = _parent_of(parent)
        self._command = above if self._parent and _runs(above, (b"deepspeed",)) else 0

    def __enter__(self) -> "StopRequest":
        self._previous = {
            signal.SIGTERM: signal.signal(signal.SIGTERM, self._note),
            signal.SIGINT: signal.signal(signal.SIGINT, self._note),
        }
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
            # a run that was started with nohup goes on when its terminal closes
            self._previous[signal.SIGHUP] = signal.signal(signal.SIGHUP, self._note)
            self._terminals = [number for number in (1, 2) if os.isatty(number)]
        if self._parent and sys.platform == "linux":
            # a `kill -9` of deepspeed's launcher leaves its ranks training
            ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame) -> None:
        if number == signal.SIGINT:
            # a launcher passes Ctrl-C on at once, so the same keypress may arrive twice; a later one is impatience
            if self._interrupted_at and time.monotonic() - self._interrupted_at > 1:
                raise KeyboardInterrupt
            self._interrupted_at = time.monotonic()
        if number == signal.SIGHUP:
            # the terminal is gone, and what still is written to it would fail
            for terminal in self._terminals:
                discard(terminal)
        self.reason = self.reason or signal.Signals(number).name
        self.exit_code = self.exit_code or 128 + number

    def everywhere(self) -> bool:
        """Whether any rank has a reason to stop (a collective on the host, one number)."""
        orphaned = self._parent and os.getppid() != self._parent
        # the ranks' parent is deepspeed.launcher.launch; a SIGTERM to the `deepspeed` above it ends neither
        orphaned = orphaned or (self._command and _parent_of(self._parent) != self._command)
        if orphaned and not self.reason:
            self.reason, self.exit_code = "its launcher ended", 128 + signal.SIGTERM
        flag = torch.tensor([self.exit_code])
        dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self._group)
        if int(flag) and not self.reason:
            self.reason, self.exit_code = "another rank was told to", int(flag)
        return bool(int(flag))


def discard(number: int) -> None:
    """From now on, what is written to the file descriptor `number` goes nowhere."""
    nowhere = os.open(os.devnull, os.O_RDWR)
    # where `number` itself was closed, it may be the very one
    if nowhere != number:
        os.dup2(nowhere, number)
        os.close(nowhere)


def _parent_of(pid: int) -> int:
    try:
        # the second field is the command in parentheses, which may hold blanks
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except (OSError, ValueError, IndexError):
        return 0


def _runs(pid: int, programs: tuple[bytes, ...]) -> bool:
    """Whether `pid` is a Python running one of `programs`, as a script or as a module."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return False
    return any(os.path.basename(word) in programs for word in words[:5])
