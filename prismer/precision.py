"""Which precision a run trains in: bf16 where the processor multiplies bf16 at least as fast as fp32, else fp32.

GPUs of the last generations do. A CPU without AVX512-BF16 or AMX emulates bf16, ten to a hundred times more slowly
than fp32, and even one that has the instructions may lose at small widths; so a CPU is asked, with a stopwatch.
"""

import platform
import time
from pathlib import Path

import torch
import torch.nn.functional as F

NATIVE_BF16 = {"avx512_bf16", "amx_bf16", "avx_ne_convert", "bf16", "svebf16"}
"""Processor flags, as Linux spells them on x86-64 and Arm."""


def native_bf16_flags() -> set[str]:
    """The bf16 instructions of this processor, from /proc/cpuinfo; empty where that file is absent."""
    cpuinfo = Path("/proc/cpuinfo")
    words = cpuinfo.read_text().split() if cpuinfo.is_file() else []
    return NATIVE_BF16 & set(words)


def block_rates(width: int, seconds: float = 0.2) -> dict[torch.dtype, float]:
    """GFLOP/s of one core in bf16 and fp32: forward and backward through a pre-norm MLP block.

    Args:
        width: the model's width; the hidden layer is 4 x width.
        seconds: processor time to spend; the best repetition counts.
    """
    # as many rows as end within a second: an emulated bf16 may run at 1 GFLOP/s
    work = 4e9 if native_bf16_flags() else 0.4e9
    rows = max(32, min(2048, int(work / (3 * 2 * 2 * 4 * width * width))))

    def block(dtype: torch.dtype) -> list[torch.Tensor]:
        shapes = ((rows, width), (4 * width, width), (width, 4 * width))
        return [torch.randn(shape).mul_(0.1).to(dtype).requires_grad_() for shape in shapes]

    def step(x: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> float:
        # this thread's own time: a wall clock would judge the precisions by what else the machine does
        start = time.thread_time()
        (x + F.linear(F.gelu(F.linear(F.layer_norm(x, (width,)), up)), down)).sum().backward()
        return time.thread_time() - start

    blocks = {dtype: block(dtype) for dtype in (torch.bfloat16, torch.float32)}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        best = {dtype: step(*tensors) for dtype, tensors in blocks.items()}
        end = time.thread_time() + seconds
        while time.thread_time() < end:
            best = {dtype: min(best[dtype], step(*tensors)) for dtype, tensors in blocks.items()}
    finally:
        torch.set_num_threads(threads)
    return {
        dtype: 3 * 2 * 2 * rows * width * 4 * width / spent / 1e9 for dtype, spent in best.items()
    }


def choose_precision(wanted: str, width: int, device: torch.device) -> tuple[str, str]:
    """Decide the precision of a run.

    Args:
        wanted: "bf16" or "fp32" to force it, "auto" to measure.
        width: width of the model's matrices.
        device: where the run computes.

    Returns:
        "bf16" or "fp32", and one line that says why.

    Raises:
        ValueError: if bf16 is forced on a GPU that has none.
    """
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        if wanted == "bf16" and not native:
            raise ValueError(f"{name} has no bf16 arithmetic; set precision to auto or fp32")
        if wanted != "auto":
            return wanted, f"precision: {wanted}, as asked, on {name}"
        if native:
            return "bf16", f"precision: bf16 on {name}"
        return "fp32", f"precision: fp32, since {name} has no bf16 arithmetic"
    if wanted != "auto":
        return wanted, f"precision: {wanted}, as asked"
    rates = block_rates(width)
    bf16, fp32 = rates[torch.bfloat16], rates[torch.float32]
    flags = ", ".join(sorted(native_bf16_flags())) or "no bf16 instructions"
    chosen = "bf16" if bf16 >= fp32 else "fp32"
    return chosen, (
        f"precision: {chosen}, since this {platform.machine()} CPU ({flags}) runs a block of width {width} "
        f"at {bf16:.0f} GFLOP/s per core in bf16 and {fp32:.0f} in fp32"
    )
