"""The measurement behind a table: every implementation of a call is checked, then timed beside the others.

An implementation whose error exceeds twice that of torch's own (three times for gradients; against the definition in
float64) is left out. The others take turns on the same tensors, so that the drift of a shared machine cancels. On a CPU
they run on as many threads as torch has in this process (`torch.get_num_threads`), since one implementation may use
more of them than another. With one thread the time is the processor time of the thread, which other programs hardly
disturb; with more threads it is the time that passes. On a GPU it is device time or host time, whichever is longer,
since the longer one is what a model waits for. One of ours is taken only if it is at least 3 % faster than the
vendor's, by the median of the rounds.
"""

import functools
import gc
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from prismer.kernels import tuning
from prismer.kernels.dispatch import HOST, Op, all_ops, use_backend
from prismer.kernels.errors import MachineError
from prismer.kernels.tuning.tables import Entry

# torch's own operators and other libraries, by the names of backends
VENDORS = (HOST, "torch", "onednn", "sdpa", "eager", "flash-attn", "xformers", "ordinary", "composed")
# ours has to be faster by this factor
MARGIN = 1.03
# what comes first is measured first: the calls of other ops consist of it
_ORDER = ("linear", "layer_norm", "bias_activation", "attention", "linears")
# time of one sample of a short call
_SAMPLE_SECONDS = 2e-4
_LEAST_ROUNDS = 5
# times as many rounds where other programs disturb the time
_MORE_ROUNDS = 3

# seconds that a call takes
Timer = Callable[[Callable[[], object]], float]


def processor_seconds(call: Callable[[], object]) -> float:
    """Processor time of this thread for one call."""
    start = time.thread_time()
    call()
    return time.thread_time() - start


def passed_seconds(call: Callable[[], object]) -> float:
    """Time that passes during one call, whatever threads work for it."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def gpu_seconds(call: Callable[[], object]) -> float:
    """Device time of one call, or the time until it returned on the host if that is longer."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin = time.perf_counter()
    start.record()
    call()
    end.record()
    host = time.perf_counter() - begin
    torch.cuda.synchronize()
    return max(host, start.elapsed_time(end) / 1e3)


def in_order(keys: Iterable[tuning.Key]) -> list[tuning.Key]:
    """The keys in the order in which they have to be measured."""
    return sorted(keys, key=lambda k: (_ORDER.index(k[0]) if k[0] in _ORDER else len(_ORDER), str(k)))


@dataclass(kw_only=True)
class Measurement:
    """Measures one key after another; each takes what was chosen before it.

    Attributes:
        device: where to measure.
        timer: seconds of a call; if None, `gpu_seconds` on a GPU, `processor_seconds` on a CPU with one thread, and
            `passed_seconds` with more.
        seconds: to spend on one key.
    """

    device: torch.device
    seconds: float = 0.3
    timer: Timer | None = None

    def __post_init__(self) -> None:
        self.ops = {op.name: op for op in all_ops()}
        self.entries: list[Entry] = []
        # of the entries: a table shows what it was measured with
        self.threads = torch.get_num_threads()
        self.least_rounds = _LEAST_ROUNDS
        if self.timer is None and self.device.type == "cuda":
            self.timer = gpu_seconds
        elif self.timer is None and self.threads == 1:
            self.timer = processor_seconds
        elif self.timer is None:
            self.timer, self.least_rounds = passed_seconds, _MORE_ROUNDS * _LEAST_ROUNDS

    def run(self, keys: Mapping[tuning.Key, tuple[int, ...]]) -> Iterator[tuple[tuning.Key, Entry | None]]:
        """Measure each key on a call of its shape; yield it with its entry, or None if nothing can be chosen."""
        gc.collect()
        gc.disable()
        try:
            for key in in_order(keys):
                entry = self.measure(key, keys[key])
                if entry is not None:
                    self.entries.append(entry)
                yield key, entry
        finally:
            gc.enable()

    def measure(self, key: tuning.Key, shape: tuple[int, ...]) -> Entry | None:
        """The entry of one key, measured on a call of a shape; None if there is one implementation at most."""
        name, dtype, gradient, _ = key
        op = self.ops.get(name)
        if op is None or op.example is None or 0 in shape[:1]:
            return None
        torch.manual_seed(0)
        function, arguments = op.example(shape, dtype, self.device)
        if gradient and not _leaves(arguments):
            return None
        run = functools.partial(_with_gradient if gradient else _without_gradient, function)
        call = functools.partial(run, arguments)
        candidates = [choice for choice in self._candidates(op) if _serves(op, choice, call)]
        if len(candidates) < 2:
            return None
        with use_backend("reference"):
            exact = run(_widened(arguments))
        errors = {}
        for choice in candidates:
            with self._forcing(key, choice):
                errors[choice] = _errors(call(), exact)
        times = self._times(key, _within_limit(errors, exact, dtype, gradient), call)
        with tuning.forcing(self._chosen()), tuning.recording() as taken:
            call()
        prior = taken.get((self.device.type, key), "")
        return Entry(
            op=name,
            dtype=str(dtype).removeprefix("torch."),
            gradient=gradient,
            shape=key[3],
            choice=pick(times),
            prior=prior,
            threads=self.threads,
            microseconds={choice: round(1e6 * statistics.median(spent), 2) for choice, spent in times.items()},
        )

    def _candidates(self, op: Op) -> list[str]:
        if op.paths:
            return list(op.paths)
        return ([HOST] if op.host is not None else []) + op.usable(self.device.type)

    def _chosen(self) -> dict[tuning.Key, str]:
        return {entry.key: entry.choice for entry in self.entries}

    @contextmanager
    def _forcing(self, key: tuning.Key, choice: str) -> Iterator[None]:
        """Take this implementation for the key, forward and backward, and what was chosen before for other keys."""
        name, dtype, _, shape = key
        own = {(name, dtype, gradient, shape): choice for gradient in (False, True)}
        with tuning.forcing(self._chosen() | own):
            yield

    def _times(self, key: tuning.Key, candidates: list[str], call: Callable[[], object]) -> dict[str, list[float]]:
        """Seconds of each round; in a round every implementation runs once, in turns that go round."""
        assert self.timer is not None
        repeats = {}
        for choice in candidates:
            with self._forcing(key, choice):
                spent = self.timer(call)
                if spent < _SAMPLE_SECONDS:
                    spent = self.timer(call)
                repeats[choice] = max(1, min(1000, int(_SAMPLE_SECONDS / max(spent, 1e-7))))
        times: dict[str, list[float]] = {choice: [] for choice in candidates}
        order = list(candidates)
        end = time.perf_counter() + self.seconds
        while time.perf_counter() < end or len(times[order[0]]) < self.least_rounds:
            for choice in order:
                with self._forcing(key, choice):
                    if repeats[choice] > 1:
                        # the first call looks the choice up again, which counts only beside a short call
                        call()
                    spent = self.timer(lambda count=repeats[choice]: [call() for _ in range(count)])
                times[choice].append(spent / repeats[choice])
            order.append(order.pop(0))
        return times


def pick(times: Mapping[str, list[float]]) -> str:
    """The fastest implementation; one of ours only if it is faster by `MARGIN` than the vendor's, round by round."""
    medians = {choice: statistics.median(spent) for choice, spent in times.items()}
    vendors = [choice for choice in times if choice in VENDORS]
    ours = [choice for choice in times if choice not in VENDORS]
    if not ours or not vendors:
        return min(medians, key=medians.__getitem__)
    vendor, own = (min(group, key=medians.__getitem__) for group in (vendors, ours))
    ratio = statistics.median(a / b for a, b in zip(times[vendor], times[own], strict=True))
    return own if ratio >= MARGIN else vendor


def _serves(op: Op, choice: str, call: Callable[[], object]) -> bool:
    if choice == HOST or choice in op.paths:
        return True
    try:
        with use_backend(f"{op.name}:{choice}"):
            call()
    except MachineError:
        return False
    return True


def _widened(arguments: list) -> list:
    return [
        a.detach().double().requires_grad_(a.requires_grad) if isinstance(a, Tensor) and a.is_floating_point() else a
        for a in arguments
    ]


def _leaves(arguments: list) -> list[Tensor]:
    return [a for a in arguments if isinstance(a, Tensor) and a.requires_grad]


def _tensors(output: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return output if isinstance(output, tuple) else (output,)


def _without_gradient(function: Callable, arguments: list) -> tuple[Tensor, ...]:
    with torch.no_grad():
        return _tensors(function(*arguments))


def _with_gradient(function: Callable, arguments: list) -> tuple[Tensor, ...]:
    output = _tensors(function(*arguments))[0]
    return torch.autograd.grad(output, _leaves(arguments), _output_gradient(output.shape, output.dtype, output.device))


@functools.lru_cache(maxsize=2)
def _output_gradient(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Random numbers, the same in each dtype, since 16 bits hold them; smooth ones would make gradients vanish."""
    generator = torch.Generator(device).manual_seed(0)
    return torch.randn(shape, generator=generator, device=device).bfloat16().to(dtype)


def _errors(values: tuple[Tensor, ...], exact: tuple[Tensor, ...]) -> list[float]:
    """Root mean square error of each tensor."""
    return [
        (v.double() - e).square().mean().sqrt().item() if v.numel() else 0.0 for v, e in zip(values, exact, strict=True)
    ]


def _within_limit(
    errors: Mapping[str, list[float]], exact: tuple[Tensor, ...], dtype: torch.dtype, gradient: bool
) -> list[str]:
    """The implementations whose errors are at most twice (gradients: three times) those of a vendor's."""
    yardsticks = [e for choice, e in errors.items() if choice in VENDORS] or list(errors.values())
    factor, rounding = (3 if gradient else 2), torch.finfo(dtype).eps / 2
    sizes = [e.square().mean().sqrt().item() if e.numel() else 0.0 for e in exact]
    limits = [factor * max(e) + rounding * size for *e, size in zip(*yardsticks, sizes, strict=True)]
    return [
        choice
        for choice, found in errors.items()
        if choice in VENDORS or all(e <= limit for e, limit in zip(found, limits, strict=True))
    ]
