"""What loading weights found: tensors missing, unexpected, of another shape, resized, new or left out, as a table."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from torch import Size

from prismer.errors import InputError

_MOST_ROWS = 40


@dataclass(frozen=True, kw_only=True)
class LoadReport:
    """How the tensors of a file fitted a model; its `str` is a table in which one row joins the layers of a stack.

    Attributes:
        source: what was loaded.
        loaded: number of the model's tensors that the file filled.
        missing: tensors of the model that the file lacks -> their shapes.
        unexpected: tensors of the file that the model lacks -> their shapes.
        misfit: tensors of another shape -> (shape in the file, shape in the model).
        resized: tables interpolated to another resolution -> (shape in the file, shape in the model).
        new: tensors of parts that were added to the model -> their shapes; they must be trained.
        ignored: tensors of the file without meaning.
    """

    source: str
    loaded: int
    missing: Mapping[str, Size] = field(default_factory=dict)
    unexpected: Mapping[str, Size] = field(default_factory=dict)
    misfit: Mapping[str, tuple[Size, Size]] = field(default_factory=dict)
    resized: Mapping[str, tuple[Size, Size]] = field(default_factory=dict)
    new: Mapping[str, Size] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()

    @property
    def fits(self) -> bool:
        """Whether nothing is missing, unexpected or of another shape."""
        return not (self.missing or self.unexpected or self.misfit)

    @property
    def plain(self) -> bool:
        """Whether there is nothing to report: every tensor was there and was loaded unchanged."""
        return self.fits and not (self.resized or self.new or self.ignored)

    def __str__(self) -> str:
        rows: dict[tuple[str, str], list[tuple[str, str]]] = {}
        for kind, name, stored, own in self._entries():
            # the layers of a stack differ in a number
            rows.setdefault((kind, re.sub(r"\.\d+(?=\.)", ".*", name)), []).append((stored, own))
        lines = []
        for (kind, name), shapes in rows.items():
            shown = [column[0] if len(set(column)) == 1 else "various" for column in zip(*shapes, strict=True)]
            lines.append((kind, name + (f"  x{len(shapes)}" if len(shapes) > 1 else ""), *shown))
        table = [("", "tensor", "in the file", "in the model"), *lines[:_MOST_ROWS]] if lines else []
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        text = [f"{self.source}: {self.loaded} tensors loaded"]
        for row in table:
            cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
            text.append("  ".join(cells).rstrip())
        if len(lines) > _MOST_ROWS:
            text.append(f"... and {len(lines) - _MOST_ROWS} more rows")
        return "\n".join(text)

    def _entries(self) -> Iterator[tuple[str, str, str, str]]:
        """(kind, tensor, shape in the file, shape in the model)."""
        for name, shape in self.missing.items():
            yield "missing", name, "", _show(shape)
        for name, shape in self.unexpected.items():
            yield "unexpected", name, _show(shape), ""
        for kind, tensors in (("other shape", self.misfit), ("resized", self.resized)):
            for name, (stored, own) in tensors.items():
                yield kind, name, _show(stored), _show(own)
        for name, shape in self.new.items():
            yield "new", name, "", _show(shape)
        for name in self.ignored:
            yield "left out", name, "", ""


class Misfit(InputError):
    """Weights that do not fit; the message is the table, and in its last line one sentence with the remedy.

    Attributes:
        report: the table as data.
    """

    def __init__(self, sentence: str, report: LoadReport):
        super().__init__(f"{report}\n{sentence}")
        self.report = report


def _show(shape: Size) -> str:
    return "x".join(map(str, shape)) or "number"
