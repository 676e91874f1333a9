"""Writes the tables of docs/performance.md and the plot docs/performance.png from the results of test_jobs.py.

    pytest benchmarks/test_jobs.py --benchmark-only --full --results benchmarks/results/jobs
    python benchmarks/performance_page.py

Everything between the two markers in the page is generated: do not edit it by hand.
"""

import csv
import sys
from pathlib import Path

BENCHMARKS = Path(__file__).resolve().parent
PAGE = BENCHMARKS.parent / "docs" / "performance.md"
BEGIN, END = "<!-- from here on written by benchmarks/performance_page.py -->", "<!-- to here -->"
OURS, BASELINE = "ours", "baseline"
TITLES = {
    "caption": "Captions: beam 3, from 4 to 20 tokens",
    "answer": "Answers ranked from a list of 3,128",
    "classify": "Classes ranked from 1,000 names",
    "encoder": "Encoder alone",
    "train": "Training steps: forward and backward",
    "labels": "Label maps to what the first convolution reads",
}

Group = dict[str, dict[str, str]]


def read(path: Path) -> dict[tuple[str, str], Group]:
    """(room, shape) -> CSV rows by contender, in the order of the file."""
    groups: dict[tuple[str, str], Group] = {}
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            groups.setdefault((row["room"], row["shape"]), {})[row["contender"]] = row
    return groups


def matrix_rate(groups: dict[tuple[str, str], Group]) -> float:
    """GFLOP/s of the plain matrix product that was timed together with the BASE encoder."""
    rates = [
        1e3 * float(row["tflop_per_s"])
        for (room, shape), group in groups.items()
        for name, row in group.items()
        if room == "encoder" and name.startswith("mm ") and shape.startswith("BASE")
    ]
    if not rates:
        raise ValueError(
            "the results hold no BASE encoder; run test_jobs.py with --full, and without a -k that leaves it out"
        )
    return rates[0]


def seconds(row: dict[str, str]) -> str:
    """The median time, and half the spread of the rounds if there were several."""
    value, spread = float(row["milliseconds"]) / 1e3, float(row["spread_ms"]) / 1e3
    digits = 3 if value < 1 else 2
    return f"{value:.{digits}f}" + (f" ± {spread / 2:.{digits}f}" if int(row["rounds"]) > 1 else "")


def table(room: str, groups: dict[tuple[str, str], Group], rate: float) -> list[str]:
    """The Markdown table of one kind of job."""
    lines = [
        "| job | way | seconds | ratio | GFLOP | operators | peak MB | GFLOP/s of the limit | in products |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for (of, shape), group in groups.items():
        if of != room:
            continue
        for name, row in sorted(group.items(), key=lambda item: item[0] != OURS):
            achieved = 1e3 * float(row["tflop_per_s"])
            counted = float(row["flops"]) > 0
            lines.append(
                f"| {shape if name == OURS else ''} | {name} | {seconds(row)} | "
                f"{'' if name == OURS else format(float(row['ratio']), '.2f') + 'x'} | "
                f"{float(row['flops']) / 1e9:,.1f} | {int(row['ops']):,} | {float(row['peak_mb']):,.0f} | "
                f"{format(achieved / rate, '.0%') if counted else '-'} | {float(row['matrix_share']):.0%} |"
            )
    return lines


def page(groups: dict[tuple[str, str], Group]) -> str:
    """Everything between the markers."""
    rate = matrix_rate(groups)
    first = next(iter(next(iter(groups.values())).values()))
    lines = [
        f"Measured on {first['date']}, {first['device']}, torch {first['torch']}, fp32. The limit is a plain "
        f"`torch.mm` of 2048 x 2048 in the same run: {rate:.0f} GFLOP/s.",
        "",
        "![times faster than the baseline, and share of the limit](performance.png)",
    ]
    for room, title in TITLES.items():
        if any(of == room for of, _ in groups):
            lines += ["", f"### {title}", "", *table(room, groups, rate)]
    return "\n".join(lines)


def draw(groups: dict[tuple[str, str], Group], path: Path) -> None:
    """Draw two panels: times faster than the baseline, and each contender's share of the matrix product's rate."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rate = matrix_rate(groups)
    found = [(f"{room} {shape}", group) for (room, shape), group in groups.items() if BASELINE in group]
    size = 12, 1.2 + 0.34 * len(found)
    figure, (faster, share) = plt.subplots(1, 2, figsize=size, sharey=True, layout="constrained")
    places = range(len(found))
    ratios = [float(group[BASELINE]["ratio"]) for _, group in found]
    faster.barh(places, [ratio - 1 for ratio in ratios], left=1, color="#4477aa")
    for place, ratio in zip(places, ratios, strict=True):
        faster.text(ratio * 1.04, place, f"{ratio:.2f}", va="center", fontsize=8)
    faster.set_xscale("log")
    faster.set_xlim(0.9, max(ratios) * 1.6)
    faster.set_xlabel("times faster than the baseline")
    faster.set_yticks(places, [name for name, _ in found], fontsize=8)
    faster.invert_yaxis()
    for offset, name, colour in ((-0.2, OURS, "#4477aa"), (0.2, BASELINE, "#ccbb44")):
        values = [1e3 * float(group[name]["tflop_per_s"]) / rate for _, group in found]
        share.barh([place + offset for place in places], values, height=0.38, color=colour, label=name)
    share.axvline(1, color="black", lw=0.8)
    share.set_xlabel("share of the plain matrix product's rate, by counted FLOPs")
    share.legend(fontsize=8)
    figure.savefig(path, dpi=110)


def main() -> None:
    results = BENCHMARKS / "results" / "jobs" / "cpu.csv"
    if not results.is_file():
        sys.exit(f"{results} does not exist; run test_jobs.py with --results benchmarks/results/jobs first")
    groups = read(results)
    text = PAGE.read_text()
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        sys.exit(f"{PAGE} has lost its markers; it needs one line {BEGIN!r} and one line {END!r}")
    before, _, rest = text.partition(BEGIN)
    after = rest.partition(END)[2]
    PAGE.write_text(f"{before}{BEGIN}\n\n{page(groups)}\n\n{END}{after}")
    draw(groups, PAGE.with_suffix(".png"))


if __name__ == "__main__":
    main()
