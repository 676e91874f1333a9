"""When training stops early: at SIGTERM, SIGHUP or Ctrl-C, or because the launcher died and left its ranks behind.

A rank cannot save alone, since the other ranks hold the other shards. So a rank only records the request; after every
step the ranks exchange requests, and if there is one, all save together.
"""

import ctypes
import os
import signal
import sys
import time
from pathlib import Path
from types import FrameType

import torch
import torch.distributed as dist

from prismer.training.streams import redirect_to_devnull

_LAUNCHERS = (b"deepspeed.launcher.launch", b"torchrun", b"torch.distributed.run")
_PR_SET_PDEATHSIG = 1


class StopRequest:
    """Records signals and the death of the launcher; a context manager around the training loop.

    Args:
        group: process group for tensors on the host.

    Attributes:
        reason: why to stop, in words; "" to go on.
        exit_code: 128 + signal number once there is a reason, as a shell reports it.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.reason, self.exit_code = "", 0
        self._group = group
        self._interrupted_at = 0.0
        self._terminals: list[int] = []
        # a run started by hand may outlive its shell, but a rank must not outlive its launcher
        parent = os.getppid()
        self._parent = parent if _runs(parent, _LAUNCHERS) else 0
        grandparent = _parent_of(parent)
        self._grandparent = grandparent if self._parent and _runs(grandparent, (b"deepspeed",)) else 0

    def __enter__(self) -> "StopRequest":
        self._previous = {
            signal.SIGTERM: signal.signal(signal.SIGTERM, self._record),
            signal.SIGINT: signal.signal(signal.SIGINT, self._record),
        }
        # a run that was started with nohup goes on when its terminal closes
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
            self._previous[signal.SIGHUP] = signal.signal(signal.SIGHUP, self._record)
            self._terminals = [number for number in (1, 2) if os.isatty(number)]
        if self._parent and sys.platform == "linux":
            # otherwise the ranks go on training after a `kill -9` of DeepSpeed's launcher
            ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _record(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            # a launcher forwards Ctrl-C at once, so that one keypress may arrive twice; a later one ends the process
            if self._interrupted_at and time.monotonic() - self._interrupted_at > 1:
                raise KeyboardInterrupt
            self._interrupted_at = time.monotonic()
        if number == signal.SIGHUP:
            # the terminal is closed, and writing to it would fail
            for terminal in self._terminals:
                redirect_to_devnull(terminal)
        self.reason = self.reason or signal.Signals(number).name
        self.exit_code = self.exit_code or 128 + number

    def anywhere(self) -> bool:
        """Whether any rank has a reason to stop (collective, one number on the host)."""
        orphaned = self._parent and os.getppid() != self._parent
        # a SIGTERM to the command `deepspeed` ends neither deepspeed.launcher.launch, its child, nor the ranks
        orphaned = orphaned or (self._grandparent and _parent_of(self._parent) != self._grandparent)
        if orphaned and not self.reason:
            self.reason, self.exit_code = "its launcher ended", 128 + signal.SIGTERM
        flag = torch.tensor([self.exit_code])
        dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self._group)
        if int(flag) and not self.reason:
            self.reason, self.exit_code = "another rank was told to", int(flag)
        return bool(int(flag))


def _parent_of(pid: int) -> int:
    """The parent's process id; 0 if `pid` has ended."""
    try:
        # the second field is the command in parentheses, which may contain blanks
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except (OSError, ValueError, IndexError):
        return 0


def _runs(pid: int, programs: tuple[bytes, ...]) -> bool:
    """Whether `pid` is a Python process that runs one of `programs`, as a script or as a module."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return False
    return any(os.path.basename(word) in programs for word in words[:5])
