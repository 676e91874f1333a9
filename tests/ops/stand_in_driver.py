"""A GPU's driver and compiler for Triton that do nothing: launches are looked up, counted and timed without a GPU.

For a process without TRITON_INTERPRET: what it makes Triton run are compiled kernels in name only.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import triton
from triton.backends.compiler import GPUTarget

from prismer.kernels import machine, tuning


class Compiled:
    """A compiled kernel in name only."""

    function, packed_metadata = "function", "metadata"

    def __init__(self, source: Any, **options: Any) -> None:
        self.source = source

    def launch_metadata(self, *args: Any) -> None:
        return None

    def run(self, *args: Any) -> None:
        driver = triton.runtime.driver.active
        if driver.keep:
            driver.launched.append((self, driver.device, args))


class Driver:
    """What Triton asks of a driver.

    Attributes:
        device: the current device; -1 is that of CPU tensors.
        keep: whether launches are recorded.
        launched: the kernel, the current device and the arguments of each launch.
    """

    def __init__(self) -> None:
        self.device, self.keep = -1, True
        self.launched: list[tuple[Compiled, int, tuple]] = []

    def get_current_device(self) -> int:
        return self.device

    def set_current_device(self, device: int) -> None:
        self.device = device

    def get_current_stream(self, device: int) -> int:
        return 1000 + device

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


@contextmanager
def stand_in_driver() -> Iterator[Driver]:
    """Inside the block Triton compiles and launches nothing, and its kernels serve CPU tensors."""
    driver, before = Driver(), triton.runtime.driver._active
    triton.runtime.driver.set_active(driver)
    try:
        # what a call was to run on is remembered by shape: with another driver it is looked up anew
        tuning.generation += 1
        with (
            mock.patch("triton.compiler.compile", Compiled),
            mock.patch.object(machine, "interpreting", lambda: True),
        ):
            yield driver
    finally:
        triton.runtime.driver._active = before
        tuning.generation += 1
