"""What a run found: a summary for programs, and a page for people."""

from collections import defaultdict


def summarise(records: list[dict]) -> dict:
    """The machine, how each stage ended, which checks failed, and the fastest backend of each timed call."""
    stages = {r["stage"]: {k: r[k] for k in ("status", "seconds", "budget")} for r in _of(records, "stage")}
    failed = [r for r in records if not r.get("ok", True)]
    return dict(
        key=records[0].get("key"),
        date=records[0].get("date"),
        machine=next(iter(_of(records, "machine")), None),
        stages=stages,
        checks=sum("ok" in r for r in records),
        failed=failed,
        fastest=[
            {
                **key,
                "backend": best["backend"],
                "device_us": best["device_us"],
                "over_plain": _ratio(rows.get("plain"), best),
            }
            for key, rows, best in _timed(records)
        ],
    )


def _of(records: list[dict], kind: str) -> list[dict]:
    return [r for r in records if r["kind"] == kind]


def _ratio(a: dict | None, b: dict) -> float | None:
    """Device time of a over that of b."""
    return round(a["device_us"] / b["device_us"], 3) if a and b["device_us"] else None


def _timed(records: list[dict]) -> list[tuple[dict, dict[str, dict], dict]]:
    """For each call: what it is, its rows by backend, and the row with the least device time."""
    groups: dict[tuple, dict[str, dict]] = defaultdict(dict)
    for r in _of(records, "time"):
        groups[r["op"], r["dtype"], tuple(r["shape"].items()), r["pass"]][r["backend"]] = r
    found = []
    for (op, dtype, shape, part), rows in groups.items():
        # plain PyTorch is no backend
        ours = [row for name, row in rows.items() if name != "plain"]
        if ours:
            key = {"op": op, "dtype": dtype, "shape": dict(shape), "pass": part}
            found.append((key, rows, min(ours, key=lambda row: row["device_us"])))
    return found


def _table(head: list[str], rows: list[list[object]]) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(_cell(value) for value in line) + " |" for line in lines] + [""]


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:,.4g}"
    if isinstance(value, dict):
        return " ".join(f"{k} {v}" for k, v in value.items())
    return "" if value is None else str(value).replace("|", "\\|").replace("\n", " ")


def page(records: list[dict]) -> str:
    """The results as Markdown: conditions, stages, failures, and tables of times."""
    found = summarise(records)
    machine = found["machine"] or {}
    lines = [f"# GPU check: {machine.get('name', 'no machine was described')}", ""]
    versions = {k: v for k, v in machine.items() if k in ("capability", "cuda", "cudnn", "driver") and v}
    versions |= machine.get("versions", {})
    lines += [f"{found['date']}. " + ", ".join(f"{k} {v}" for k, v in versions.items()) + ".", ""]
    if machine.get("name") == "cpu":
        lines += ["**Stand-ins on a CPU: no number here is a speed of a GPU.**", ""]
    lines += _table(
        ["stage", "ended", "seconds", "budget"],
        [[name, s["status"], s["seconds"], s["budget"]] for name, s in found["stages"].items()],
    )
    for r in _of(records, "stage"):
        if "traceback" in r:
            lines += [f"`{r['stage']}` {r['status']}:", "", "```", str(r["traceback"]).strip()[-2000:], "```", ""]
    lines += [f"{found['checks']} checks, {len(found['failed'])} failed.", ""]
    for r in found["failed"][:50]:
        told = {k: v for k, v in r.items() if k not in ("stage", "kind", "ok")}
        lines.append(f"- {r['stage']}: " + "; ".join(f"{k} {_cell(v)[:300]}" for k, v in told.items()))
    lines += ["", *(f"- {r['stage']}: {r['note']}" for r in _of(records, "note")), ""]
    ceilings = _of(records, "ceiling")
    if ceilings:
        lines += ["## Ceilings", ""]
        rows = [[r["what"], r["per_second"] / 1e12, "TB/s" if "bytes" in r else "TFLOP/s"] for r in ceilings]
        lines += _table(["what", "reached", "unit"], rows)
    timed = _timed(records)
    if timed:
        lines += ["## Backends: device microseconds (host microseconds)", ""]
        names = sorted({name for _, rows, _ in timed for name in rows})
        body = []
        for key, rows, best in timed:
            cells = [f"{rows[n]['device_us']:.4g} ({rows[n]['host_us']:.3g})" if n in rows else "" for n in names]
            over = _ratio(rows.get("plain"), best)
            body.append([key["op"], key["dtype"], key["shape"], key["pass"], *cells, best["backend"], over])
        lines += _table(["op", "dtype", "shape", "pass", *names, "fastest of ours", "plain / fastest"], body)
    swept: dict[str, list[dict]] = defaultdict(list)
    for r in _of(records, "tiles"):
        if "device_us" in r:
            swept[f"{r['op']} {_cell(r['shape'])}"].append(r)
    if swept:
        lines += ["## Block shapes", ""]
        body = []
        for call, rows in swept.items():
            now = next((r for r in rows if r["tiles"] is None), None)
            best = min(rows, key=lambda r: r["device_us"])
            body.append(
                [call, now and now["device_us"], best["tiles"] or "as now", best["device_us"], _ratio(now, best)]
            )
        lines += _table(["call", "now, us", "best blocks", "best, us", "now / best"], body)
    jobs = _of(records, "job")
    if jobs:
        lines += ["## Jobs", ""]
        body = [
            [r["job"], r.get("model"), r.get("side"), r["batch"], r["contender"], r.get("device_us"), r.get("host_us")]
            for r in jobs
        ]
        lines += _table(["job", "model", "px", "batch", "contender", "device us", "host us"], body)
    return "\n".join(lines)
