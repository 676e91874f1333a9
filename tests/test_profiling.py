"""Proves profiles: rows against CostCounter and the clock, the roofline against given peaks, and the trace file.

Run: pytest tests/test_profiling.py
"""

import gzip
import json
import re

import pytest
import torch
from PIL import Image
from torch import nn

from prismer.cli.main import main
from prismer.costs.counting import CostCounter
from prismer.costs.profiling import OperatorCost, Peaks, StepProfile, check_trace, format_table, measure_peaks

CPU = torch.device("cpu")
PEAKS = Peaks(matrix={torch.float32: 1e9, torch.bfloat16: 4e9}, memory=1e8)


@pytest.fixture
def quick_peaks(monkeypatch):
    """Fixed peaks; only `test_measured_peaks_are_plausible` measures the machine."""
    monkeypatch.setattr("prismer.costs.profiling.measure_peaks", lambda device: PEAKS)


def test_rows_add_up_and_the_trace_is_written(tmp_path, quick_peaks):
    layer, x = nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 8)), torch.randn(50, 64)
    profile = StepProfile(tmp_path / "trace.json.gz", device=CPU, dtype=torch.float32, steps=3)
    ran = 0
    while not profile.finished:
        with profile.step():
            layer.zero_grad()
            layer(x).sum().backward()
        # between steps, so not in the profile
        torch.mm(x, x.T)
        ran += 1
    assert ran == profile.needed == 2 + 3 + 1
    rows, around, seconds = profile.rows()
    by_name = {row.name: row for row in rows}
    forward = 2 * 50 * (64 * 96 + 96 * 8)
    # the backward pass: gradients of both weights and of the tensor between the layers
    backward = forward + 2 * 50 * 96 * 8
    assert by_name["aten::addmm"].flops == forward and by_name["aten::mm"].flops == backward
    with CostCounter() as counter:
        layer.zero_grad()
        layer(x).sum().backward()
    assert sum(row.flops for row in rows) == counter.flops == forward + backward
    # timed and counted calls agree, and their times add up to less than the step's
    for name, calls, *_ in counter.rows():
        if name not in ("aten::add_", "aten::add", "aten::zero_"):
            assert by_name[name].calls == pytest.approx(calls), name
    assert all(row.seconds > 0 for row in rows if row.calls)
    assert around > 0 and around + sum(row.seconds for row in rows) < seconds
    text = profile.report()
    with gzip.open(tmp_path / "trace.json.gz") as file:
        names = [event.get("name") for event in json.load(file)["traceEvents"]]
    assert names.count("aten::addmm") == 2 * 3 and names.count("prismer: step") >= 3
    assert [path.name for path in tmp_path.iterdir()] == ["trace.json.gz"]
    shares = [float(share) for share in re.findall(r"^.{36} .{7} .{9} +([\d.]+)%", text, re.MULTILINE)]
    assert shares[-1] == 100.0 and sum(shares[:-1]) == pytest.approx(100, abs=0.05 * len(shares))
    total = next(line for line in text.splitlines() if line.startswith("total"))
    assert total.split()[4] == f"{(forward + backward) / 1e9:.3f}"


def test_the_table_is_a_roofline():
    rows = [
        OperatorCost(name="aten::mm", calls=2, seconds=0.4, flops=200_000_000, bytes=1_000_000),
        # at the memory peak it would take 0.2 s of its 0.25 s
        OperatorCost(name="aten::add", calls=5, seconds=0.25, flops=0, bytes=20_000_000),
        *(OperatorCost(name=f"aten::rest{i}", calls=1, seconds=0.001, bytes=1000) for i in range(30)),
    ]
    text = format_table(rows, 0.1, 1.0, PEAKS, torch.float32)
    lines = {line[:36].strip(): line for line in text.splitlines()}
    assert lines["aten::mm"].split()[1:] == ["2", "400.00", "40.0%", "0.200", "1.00", "50.0%", "2.5%", "matrix"]
    assert lines["aten::add"].split()[1:] == ["5", "250.00", "25.0%", "0.000", "20.00", "0.0%", "80.0%", "memory"]
    # 18 of the 32 operators have a row of their own
    assert lines["14 other operators"].split()[3:6] == ["14", "14.00", "1.4%"]
    assert lines["host gap, in no operator"].split()[-2:] == ["220.00", "22.0%"]
    assert lines["total"].split()[1:6] == ["37", "1000.00", "100.0%", "0.200", "21.03"]
    assert "attention take 40.0% of the time" in text
    assert len(lines) < 30 and max(map(len, text.splitlines())) <= 120
    # in bf16 the same products are further from their peak
    in_bf16 = format_table(rows, 0.1, 1.0, PEAKS, torch.bfloat16)
    assert "12.5%" in in_bf16.splitlines()[1] and "4 GFLOP/s in bfloat16" in in_bf16


def test_measured_peaks_are_plausible(monkeypatch):
    """Small products and copies; wide bounds, because the machine may be busy."""
    monkeypatch.setattr("prismer.costs.profiling._SIDE", 256)
    monkeypatch.setattr("prismer.costs.profiling._COPY_BYTES", 2**22)
    monkeypatch.setattr("prismer.costs.profiling._PEAK_SECONDS", 0.05)
    peaks = measure_peaks.__wrapped__(CPU)
    assert set(peaks.matrix) == {torch.float32, torch.bfloat16}
    assert 1e8 < peaks.matrix[torch.float32] < 1e13 and 1e8 < peaks.memory < 1e13


@pytest.mark.parametrize("name", ("absent/trace.json", "file/trace.json", "folder.json", "trace.txt"))
def test_a_trace_that_cannot_be_written_is_refused(tmp_path, name):
    (tmp_path / "file").touch()
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(ValueError, match=r"^(the trace .* cannot be written \(.*\)|a trace is JSON, .*); .*$"):
        check_trace(tmp_path / name)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder.json"]


def test_caption_with_a_profile_prints_the_same_caption(tmp_path, capsys, quick_peaks):
    Image.new("RGB", (64, 64), (200, 30, 30)).save(tmp_path / "red.png")
    trace = tmp_path / "trace.json.gz"
    assert main(["caption", str(tmp_path / "red.png"), "--device", "cpu", "--profile", str(trace)]) == 0
    with_profile = capsys.readouterr()
    assert "host gap" in with_profile.err and "total" in with_profile.err
    assert json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    assert main(["caption", str(tmp_path / "red.png"), "--device", "cpu"]) == 0
    assert capsys.readouterr().out == with_profile.out
    code = main(["caption", str(tmp_path / "red.png"), "--profile", str(tmp_path / "absent" / "trace.json")])
    assert code == 2 and len(capsys.readouterr().err.strip().splitlines()) == 1
