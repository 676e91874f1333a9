"""Proves `prismer plan --label`: hours and bottlenecks against arithmetic by hand, and its refusals.

Run: pytest tests/test_plan_label.py
"""

import json

import pytest

from prismer.cli.main import main
from prismer.costs.labelling import forecast, read_costs
from prismer.experts import PAPER_EXPERTS
from tests.experts.jobs import write_photos

# seconds of the whole job, 1,000 images
SECONDS = dict(read=8.0, decode=3.0, depth=10.0, edge=5.0, pack=1.0, write=2.0, all=19.8)


def setting(**changes):
    entry = dict(
        device="NVIDIA H100 80GB HBM3",
        cores=16,
        processes=2,
        workers=4,
        threads=8,
        batch_size=32,
        label_size=224,
        networks=dict(depth="deep", edge="sharp"),
        images=1000,
        bytes_read=200_000_000,
        bytes_written=300_000_000,
        seconds=dict(SECONDS),
    )
    return {**entry, **changes}


def report(tmp_path, *settings):
    path = tmp_path / "report.json"
    path.write_text(json.dumps({"records": 1000, "costs": settings or [setting()]}))
    return path


def rows(text):
    """number of devices -> the columns of its row"""
    lines = text.splitlines()
    first = next(i for i, line in enumerate(lines) if "bottleneck" in line) + 1
    found = {}
    for line in lines[first:]:
        if not line[:1].isdigit():
            break
        number, *numbers = line.split()[:5]
        found[int(number)] = [float(x.replace(",", "")) for x in numbers], line.split(maxsplit=5)[5]
    return found


def test_hours_follow_from_the_busiest_of_what_runs_at_the_same_time(tmp_path, capsys):
    command = ["plan", "--label", "depth,edge", "--seconds-per-image", str(report(tmp_path)), "--images", "9e6"]
    assert main([*command, "--gpus", "1,8,64"]) == 0
    out = capsys.readouterr().out
    # networks, packing and writing take 18 ms an image, and the job took 1.1 times that
    found = rows(out)
    assert set(found) == {1, 8, 64}
    for gpus, ((rate, hours, read, written), bottleneck) in found.items():
        assert rate == pytest.approx(gpus / 0.0198, rel=1e-3)
        assert hours == pytest.approx(9e6 * 0.0198 / gpus / 3600, rel=1e-3)
        assert (read, written) == pytest.approx((rate * 2e-4, rate * 3e-4), rel=1e-2)
        assert bottleneck == "depth (deep)"
    assert "NVIDIA H100" in out and "9,000,000 images" in out and "No limit of the storage" in out
    assert "1.1 times as long" in out and max(map(len, out.splitlines())) <= 100


@pytest.mark.parametrize(
    ("seconds", "experts", "each", "bottleneck"),
    (
        ({}, ["edge"], 0.008, "edge (sharp)"),
        ({"write": 20.0}, ["depth", "edge"], 0.036, "writing the shards"),
        ({"pack": 20.0}, ["depth", "edge"], 0.037, "packing the maps"),
        ({"read": 160.0}, ["depth", "edge"], 0.040, "reading the source"),
        ({"decode": 30.0}, ["depth", "edge"], 0.030, "decoding on the host and the GPU"),
    ),
)
def test_the_bottleneck_is_named(tmp_path, seconds, experts, each, bottleneck):
    # no slower than its busiest part
    path = report(tmp_path, setting(seconds={**SECONDS, **seconds, "all": 1.0}))
    one = forecast(read_costs(path, experts), experts, 8)
    assert (one.rate, one.bottleneck) == (pytest.approx(8 / each), bottleneck)


def test_storage_is_shared_by_all_processes(tmp_path, capsys):
    command = ["plan", "--label", "depth,edge", "--seconds-per-image", str(tmp_path), "--storage", "1"]
    report(tmp_path)
    assert main(command) == 0
    found = rows(capsys.readouterr().out)
    assert found[8][1] == "depth (deep)"
    # 500 kB an image
    assert found[64][0][0] == pytest.approx(2000) and found[64][1] == "storage bandwidth"


def test_costs_of_a_cpu_say_so(tmp_path, capsys):
    path = report(tmp_path, setting(device="CPU (some processor)"))
    assert main(["plan", "--label", "edge", "--seconds-per-image", str(path), "--gpus", "2"]) == 0
    out = capsys.readouterr().out
    assert "processes" in out and "GPUs" not in out and "say nothing about a GPU" in out
    costs = read_costs(path, ["edge"])
    assert forecast(costs, ["edge"], 1).bottleneck == "edge (sharp)"


def test_the_setting_of_the_most_images_with_the_experts_is_taken(tmp_path):
    many = setting(images=2000, device="A")
    other = setting(networks=dict(normal="flat"), device="B", seconds={**SECONDS, "normal": 1.0})
    path = report(tmp_path, many, setting(device="C"), other)
    assert read_costs(path, ["edge"]).device == "A"
    assert read_costs(path, ["normal"]).device == "B"


def test_a_model_stands_for_its_experts(tmp_path, capsys):
    networks = {name: f"net-{name}" for name in PAPER_EXPERTS}
    path = report(tmp_path, setting(networks=networks, seconds={**dict.fromkeys(PAPER_EXPERTS, 1.0), **SECONDS}))
    for asked in ("base", "all", ",".join(PAPER_EXPERTS)):
        assert main(["plan", "--label", asked, "--seconds-per-image", str(path)]) == 0
        out = capsys.readouterr().out
        assert all(f"{name} (net-{name})" in out for name in PAPER_EXPERTS)


@pytest.mark.parametrize(
    ("flags", "says"),
    (
        (["--label", "edge"], "prismer label FOLDER --out DIR"),
        (["--label", "edge,taste"], "--label names taste"),
        (["--label", ","], "--label names nothing"),
        (["--label", "bose"], "unknown preset 'bose'"),
        (["--label", "base-z"], "reads no experts"),
        (["--label", "seg", "--seconds-per-image", "report.json"], "has no costs of seg; label some images"),
        (["--label", "edge", "--seconds-per-image", "nowhere.json"], "nowhere.json is missing"),
        (["--label", "edge", "--seconds-per-image", "old.json"], "old.json holds no costs"),
        (["--label", "edge", "--seconds-per-image", "odd.json"], "the costs in odd.json are damaged"),
        (["--label", "edge", "--seconds-per-image", "report.json", "--gpus", "1,0"], "--gpus is 0"),
        (["--label", "edge", "--seconds-per-image", "report.json", "--storage", "-1"], "--storage is -1.0"),
        (["--gpus", "1,8"], "plan a labelling job with --label"),
    ),
)
def test_wrong_flags_are_one_sentence(tmp_path, monkeypatch, capsys, flags, says):
    monkeypatch.chdir(tmp_path)
    report(tmp_path)
    (tmp_path / "old.json").write_text("{}")
    (tmp_path / "odd.json").write_text(json.dumps({"costs": [setting(images=0)]}))
    assert main(["plan", *flags]) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1


@pytest.mark.parametrize(
    "damage", ({"seconds": {}}, {"workers": 0}, {"networks": 5}, {"images": "many"}, {"cores": None})
)
def test_damaged_costs_are_one_sentence(tmp_path, damage):
    path = report(tmp_path, setting(**damage))
    with pytest.raises(ValueError, match="are damaged"):
        read_costs(path, ["edge"])


@pytest.mark.parametrize("count", ("0", "1.5", "many", "nan", "inf"))
def test_a_wrong_number_of_images_is_refused(capsys, count):
    with pytest.raises(SystemExit):
        main(["plan", "--label", "edge", "--images", count])
    assert "whole number of at least 1" in capsys.readouterr().err


def test_a_finished_job_can_be_planned_from(tmp_path, capsys):
    photos = write_photos(tmp_path / "photos", 5)
    command = ["label", str(photos), "--out", str(tmp_path / "out"), "--experts", "edge=gradient", "--label-size", "64"]
    assert main(command) == 0
    (entry,) = json.loads((tmp_path / "out/report.json").read_text())["costs"]
    assert entry["images"] == 5 and entry["networks"] == {"edge": "gradient"}
    seconds = entry["seconds"]
    assert set(seconds) == {"read", "decode", "edge", "pack", "write", "all"} and min(seconds.values()) > 0
    assert seconds["edge"] + seconds["pack"] + seconds["write"] <= seconds["all"]
    assert entry["bytes_read"] == sum(path.stat().st_size for path in photos.iterdir())
    # less the two blocks that end a tar
    assert entry["bytes_written"] == (tmp_path / "out/shard-000000.tar").stat().st_size - 1024
    capsys.readouterr()
    assert main(["plan", "--label", "edge", "--seconds-per-image", str(tmp_path / "out")]) == 0
    assert "edge (gradient)" in capsys.readouterr().out
