"""The files of measured choices: what machine a table is for, where it lies, and when it is out of date.

The user's own table is at $PRISMER_HOME/tuned/<machine>.json, by default under ~/.cache/prismer. It holds exactly for
the processor or GPU, its instruction sets, the versions of torch and Triton and the sources of the kernels that it was
measured with. Anything else makes it stale: it is put aside with one line, and the order that each op declares decides.
A table that ships with the package (prismer/kernels/tuned/) is for a known processor or GPU. It outlives new versions:
an entry whose implementation is gone is ignored where it is looked up.
"""

import functools
import hashlib
import json
import math
import os
import platform
import re
from dataclasses import asdict, dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from prismer.kernels.errors import InputError

FORMAT = 1
PACKAGE = Path(__file__).parents[1]
SHIPPED = PACKAGE / "tuned"
# environment variables that limit the instruction sets of this package, of oneDNN and of torch
LIMITS = ("PRISMER_CPU_ISA", "ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY")
# instruction sets that decide which implementation is the fastest, as Linux names them
_BF16 = {"avx_ne_convert", "avx512_bf16", "amx_bf16", "bf16", "svebf16"}
_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_fp16", "amx_int8", "asimd", "sve", *sorted(_BF16))


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One measured choice.

    Attributes:
        op: name of the op.
        dtype: of the call, such as "bfloat16".
        gradient: the call keeps a graph, and its gradient was measured with it.
        shape: class of the shape, as the op defines it.
        choice: the implementation to take.
        prior: the one that runs without the table.
        threads: of torch, with which it was measured.
        microseconds: time of each implementation that passed the test of its errors.
    """

    op: str
    dtype: str
    gradient: bool
    shape: tuple[int, ...]
    choice: str
    prior: str
    # that of tables which do not say
    threads: int = 1
    microseconds: dict[str, float] = field(default_factory=dict)

    @property
    def key(self) -> tuple[str, torch.dtype, bool, tuple[int, ...]]:
        """As `prismer.kernels.tuning.choice` takes it."""
        return self.op, getattr(torch, self.dtype), self.gradient, self.shape

    @property
    def gain(self) -> float:
        """How many times faster the choice is than the prior; 1 if they are the same or the prior was not timed."""
        times = self.microseconds
        return times[self.prior] / times[self.choice] if {self.prior, self.choice} <= set(times) else 1.0


@dataclass(frozen=True, kw_only=True)
class Table:
    """Measured choices for one machine.

    Attributes:
        machine: what they were measured on, as `machine` describes it.
        entries: the choices.
        source: the file; "" for a table that is not from a file.
        problem: one sentence if a file was put aside, else "".
    """

    machine: dict[str, str] = field(default_factory=dict)
    entries: tuple[Entry, ...] = ()
    source: str = ""
    problem: str = ""

    def choices(self) -> dict[tuple, str]:
        """The choices by key; classes of rows near a measured one, up to four times as many or as few, take its choice.

        The first number of a shape counts rows, images or heads. Only it may differ: the widths are exact.
        """
        groups: dict[tuple, dict[int, str]] = {}
        for entry in self.entries:
            if entry.shape:
                groups.setdefault((*entry.key[:3], entry.shape[1:]), {})[entry.shape[0]] = entry.choice
        found: dict[tuple, str] = {}
        for (op, dtype, gradient, rest), measured in groups.items():
            for rows in {max(1, near) for n in measured for near in (n >> 2, n >> 1, n << 1, n << 2)}:
                nearest = min(measured, key=lambda other: (abs(math.log2(other / rows)), other))
                found[op, dtype, gradient, (rows, *rest)] = measured[nearest]
        return found | {entry.key: entry.choice for entry in self.entries}

    def to_json(self) -> str:
        """The content of the file; the same table always gives the same text."""
        content = dict(
            format=FORMAT,
            machine=dict(sorted(self.machine.items())),
            entries=[asdict(entry) for entry in sorted(self.entries, key=lambda e: str(e.key))],
        )
        return json.dumps(content, indent=1) + "\n"

    @property
    def digest(self) -> str:
        """A hash of the choices alone: two tables with the same digest take the same implementations."""
        choices = sorted((e.op, e.dtype, e.gradient, e.shape, e.choice) for e in self.entries)
        return hashlib.sha256(json.dumps(choices).encode()).hexdigest()[:16]

    @classmethod
    def from_json(cls, text: str, source: str = "") -> "Table":
        """Read the content of a file.

        Raises:
            ValueError: if it is not a table of this format.
        """
        try:
            content = json.loads(text)
            if content["format"] != FORMAT:
                raise ValueError(f"format {content['format']!r}, expected {FORMAT}")
            machine = {str(key): str(value) for key, value in content["machine"].items()}
            entries = tuple(_entry(item) for item in content["entries"])
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise InputError(f"{source or 'the text'} is not a table of measured choices ({error})") from None
        return cls(machine=machine, entries=entries, source=source)


def _entry(item: dict[str, Any]) -> Entry:
    entry = Entry(**{**item, "shape": tuple(item["shape"])})
    strings = entry.op, entry.dtype, entry.choice, entry.prior
    if not all(isinstance(s, str) for s in strings) or not isinstance(entry.gradient, bool):
        raise ValueError(f"an entry {item!r}")
    if not isinstance(getattr(torch, entry.dtype, None), torch.dtype) or not all(type(n) is int for n in entry.shape):
        raise ValueError(f"an entry for {entry.dtype} and shape {entry.shape}")
    if type(entry.threads) is not int or entry.threads < 1:
        raise ValueError(f"{entry.op} on {entry.threads!r} threads")
    if not all(isinstance(time, int | float) and time > 0 for time in entry.microseconds.values()):
        raise ValueError(f"times of {entry.op}: {entry.microseconds}")
    return entry


# the machine


def _cpu() -> dict[str, str]:
    """Name and instruction sets of the processor, as far as this process may use them."""
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text() if cpuinfo.is_file() else ""

    def first(name: str) -> str:
        found = re.search(rf"^{name}\s*:\s*(.+)$", text, re.MULTILINE)
        return found[1].strip() if found else ""

    name = " ".join(filter(None, (first("vendor_id"), first("cpu family"), first("model"), first("CPU part"))))
    words = set(first("flags").split() or first("Features").split())
    limits = [f"{variable}={os.environ[variable]}" for variable in LIMITS if os.environ.get(variable)]
    return dict(
        device=name or platform.processor() or platform.machine(),
        instructions=" ".join([*(flag for flag in _FLAGS if flag in words), *limits]),
    )


def mkl_is_slow() -> bool:
    """Is this a processor on which MKL, with which torch multiplies fp32, reaches less than half of its rate?"""
    facts = _cpu()
    return "AuthenticAMD" in facts["device"] and "avx512f" in facts["instructions"].split()


def bf16_instructions() -> set[str]:
    """The instructions with which torch multiplies bf16 here, as Linux names them.

    ONEDNN_MAX_CPU_ISA can forbid those of x86.
    """
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA", "").upper()
    if limit in ("", "ALL", "DEFAULT") or "AMX" in limit or limit.startswith("AVX10_1_512"):
        forbidden = set()
    elif limit in ("AVX512_CORE_BF16", "AVX512_CORE_FP16"):
        forbidden = {"amx_bf16"}
    elif limit == "AVX2_VNNI_2":
        forbidden = {"amx_bf16", "avx512_bf16"}
    else:
        forbidden = {"amx_bf16", "avx512_bf16", "avx_ne_convert"}
    return (_BF16 & set(_cpu()["instructions"].split())) - forbidden


def has_amx() -> bool:
    """May torch's own attention multiply in AMX tiles? ATEN_CPU_CAPABILITY can forbid that too."""
    vectors = os.environ.get("ATEN_CPU_CAPABILITY", "avx512").lower()
    return vectors in ("avx512", "amx") and "amx_bf16" in bf16_instructions()


@functools.cache
def _sources() -> str:
    """A hash of the kernels' sources and of the native extension."""
    digest = hashlib.sha256()
    for path in sorted(
        [*PACKAGE.rglob("*.py"), *PACKAGE.parent.glob("_C*.so"), *PACKAGE.parent.glob("prismer/_C*.so")]
    ):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def device_facts(device_type: str) -> dict[str, str]:
    """The name of a device and its instruction sets."""
    if device_type != "cuda":
        return _cpu()
    major, minor = torch.cuda.get_device_capability()
    return dict(device=torch.cuda.get_device_name(), instructions=f"compute capability {major}.{minor}")


def machine(device_type: str) -> dict[str, str]:
    """What the user's own table depends on: the device, versions, sources of the kernels."""
    versions = {name: _version(name) for name in ("torch", "triton")}
    if device_type == "cuda":
        versions["cudnn"] = str(torch.backends.cudnn.version())
    return device_facts(device_type) | versions | dict(sources=_sources())


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "none"


# the files


def slug(facts: dict[str, str]) -> str:
    """The name of a machine's file, without its ending."""
    words = re.sub(r"[^a-z0-9.=]+", "-", f"{facts['device']} {facts['instructions']}".lower()).strip("-")
    # instruction sets are many: a file name must not exceed 255 bytes
    return words if len(words) <= 120 else f"{words[:100]}-{hashlib.sha256(words.encode()).hexdigest()[:12]}"


def user_path(facts: dict[str, str]) -> Path:
    """The file of the user's own table for a machine."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    home = os.environ.get("PRISMER_HOME") or Path(cache) / "prismer"
    return Path(home) / "tuned" / f"{slug(facts)}.json"


def load_table(device_type: str) -> Table:
    """The user's table for this machine, else the shipped one, else an empty one.

    A file that is damaged or out of date is put aside; `problem` of the result says so in one sentence.
    """
    facts = device_facts(device_type)
    path, shipped = user_path(facts), SHIPPED / f"{slug(facts)}.json"
    problem = ""
    if path.is_file():
        try:
            table = Table.from_json(path.read_text(encoding="utf-8"), str(path))
            stale = [name for name, value in machine(device_type).items() if table.machine.get(name) != value]
            if not stale:
                return table
            problem = f"{path} was measured with another {' and '.join(stale)}; run prismer tune to measure again"
        except (InputError, OSError, UnicodeDecodeError) as error:
            problem = f"{path} cannot be used ({error}); run prismer tune to measure again"
    table = Table.from_json(shipped.read_text(encoding="utf-8"), str(shipped)) if shipped.is_file() else Table()
    return replace(table, problem=problem)
