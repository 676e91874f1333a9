"""Proves the GPU check without a GPU: every stage runs on stand-ins, and a stage that fails, overruns or is killed
costs no other stage its results. Run: pytest tests/test_gpu_check.py
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from prismer.kernels.tuning.tables import Table, device_facts, slug
from scripts.gpu_check import STAGES, Results, Stage, main, run_stages
from scripts.gpu_stages.processes import in_processes

ROOT = Path(__file__).parents[1]
COMMAND = [sys.executable, str(ROOT / "scripts" / "gpu_check.py")]
# what a machine with a GPU may lack
ABSENT = (
    "deepspeed nvidia.dali open_clip transformers tokenizers safetensors PIL torchvision tensorboard matplotlib "
    "zstandard tqdm pytest"
).split()


def stage(name, run, seconds=20.0):
    return Stage(name=name, run=run, seconds=seconds, about="")


def records_of(folder):
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def ends_of(folder):
    return {r["stage"]: r["status"] for r in records_of(folder) if r["kind"] == "stage"}


def count(folder, name):
    """A stage that notes each of its runs in a file."""

    def run(context):
        with (folder / "runs").open("a") as file:
            file.write(f"{name}\n")
        yield dict(answer=42)

    return stage(name, run)


@pytest.mark.long
@pytest.mark.slow
def test_every_stage_runs_on_stand_ins(tmp_path):
    """The whole command, as on the day, without any package that the machine may lack."""
    (tmp_path / "sitecustomize.py").write_text(
        "from importlib.machinery import PathFinder\n"
        "found = PathFinder.find_spec\n"
        f"absent = {ABSENT}\n"
        "PathFinder.find_spec = staticmethod(lambda name, *rest: None if name in absent else found(name, *rest))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"}
    folder = tmp_path / "out"
    command = [*COMMAND, "--device", "cpu", "--quick", "--out", str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert ends_of(folder) == {stage.name: "done" for stage in STAGES}
    records = records_of(folder)
    assert [r for r in records if not r.get("ok", True)] == []
    timed = [r for r in records if r["kind"] == "time"]
    assert {"op", "dtype", "shape", "pass", "backend", "device_us", "host_us"} <= set(timed[0])
    assert {"triton", "torch", "plain"} <= {r["backend"] for r in timed}
    checked = {r["op"] for r in records if r.get("what") == "op"}
    assert len(checked) == 14 and checked == {r["op"] for r in timed}
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["failed"] == [] and summary["machine"]["name"] == "cpu" and summary["fastest"]

    page = subprocess.run([*COMMAND, "--report", str(folder)], capture_output=True, text=True, check=True).stdout
    table = folder / f"{slug(device_facts('cpu'))}.json"
    assert Table.from_json(table.read_text()).entries
    assert "no number here is a speed of a GPU" in page and "| layer_norm | fp32 |" in page


def test_a_stage_that_fails_or_overruns_costs_no_other(tmp_path, capsys):
    def fails(context):
        yield dict(answer=1)
        raise ValueError("a planted fault")

    def overruns(context):
        yield dict(answer=2)
        time.sleep(600)

    def dies(context):
        yield dict(answer=3)
        os._exit(7)

    stages = [stage("fails", fails), stage("overruns", overruns, 1.0), stage("dies", dies), count(tmp_path, "last")]
    folder = tmp_path / "out"
    assert run_stages(stages, device="cpu", quick=True, folder=folder) == 3
    assert ends_of(folder) == dict(fails="failed", overruns="overran", dies="failed", last="done")
    ends = {r["stage"]: r for r in records_of(folder) if r["kind"] == "stage"}
    assert "a planted fault" in ends["fails"]["traceback"] and "exit status 7" in ends["dies"]["traceback"]
    # what they found before is kept
    assert [r["answer"] for r in records_of(folder) if "answer" in r] == [1, 2, 3, 42]
    assert "a planted fault" in capsys.readouterr().out
    main(["--report", str(folder)])
    assert "a planted fault" in capsys.readouterr().out


def test_a_failed_check_is_counted_and_listed(tmp_path):
    def run(context):
        yield dict(kind="check", what="sums", ok=False, error="off by one")

    assert run_stages([stage("checks", run)], device="cpu", quick=True, folder=tmp_path) == 1
    assert ends_of(tmp_path) == dict(checks="done")
    assert json.loads((tmp_path / "summary.json").read_text())["failed"][0]["error"] == "off by one"


def test_the_time_of_all_stages_is_bounded(tmp_path):
    stages = [stage("sleeps", lambda context: time.sleep(600) or [], 600.0), count(tmp_path, "late")]
    start = time.monotonic()
    assert run_stages(stages, device="cpu", quick=True, folder=tmp_path, minutes=1 / 60) == 2
    assert time.monotonic() - start < 60
    assert ends_of(tmp_path) == dict(sleeps="overran", late="overran") and not (tmp_path / "runs").exists()


def test_a_second_run_continues_and_again_starts_anew(tmp_path):
    def fails(context):
        raise ValueError("once")
        yield

    options = dict(device="cpu", quick=True, folder=tmp_path / "out")
    run_stages([count(tmp_path, "first"), stage("second", fails)], **options)
    assert run_stages([count(tmp_path, "first"), count(tmp_path, "second")], **options) == 0
    assert (tmp_path / "runs").read_text().split() == ["first", "second"]
    assert ends_of(tmp_path / "out") == dict(first="done", second="done")
    run_stages([count(tmp_path, "first")], **options, again=True)
    assert (tmp_path / "runs").read_text().split() == ["first", "second", "first"]
    assert ends_of(tmp_path / "out") == dict(first="done")
    # results of another device, version or source are no part of this run
    run_stages([count(tmp_path, "third")], **options | dict(quick=False))
    assert ends_of(tmp_path / "out") == dict(third="done")


@pytest.mark.parametrize("how", (signal.SIGKILL, signal.SIGTERM), ids=("killed", "ended"))
def test_a_run_that_is_killed_leaves_its_results_and_no_process(tmp_path, how):
    program = (
        "import os, sys, time\n"
        "from pathlib import Path\n"
        "from scripts.gpu_check import Stage, main, run_stages\n"
        "import scripts.gpu_check as check\n"
        "folder = Path(sys.argv[1])\n"
        "def first(context):\n"
        "    yield dict(answer=1)\n"
        "def waits(context):\n"
        "    yield dict(answer=2)\n"
        "    (folder / 'pid').write_text(str(os.getpid()))\n"
        "    time.sleep(600)\n"
        "check.STAGES = tuple(Stage(name=f.__name__, run=f, seconds=600, about='') for f in (first, waits))\n"
        "main(['--device', 'cpu', '--quick', '--out', str(folder)])\n"
    )
    process = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], cwd=ROOT, stdout=subprocess.DEVNULL)
    wait_until(lambda: (tmp_path / "pid").is_file() and (tmp_path / "pid").read_text())
    child = int((tmp_path / "pid").read_text())
    process.send_signal(how)
    process.wait()
    wait_until(lambda: not is_alive(child))
    assert ends_of(tmp_path) == dict(first="done")
    assert (
        run_stages([count(tmp_path, "first"), count(tmp_path, "waits")], device="cpu", quick=True, folder=tmp_path) == 0
    )
    assert (tmp_path / "runs").read_text().split() == ["waits"]


def wait_until(true):
    end = time.monotonic() + 120
    while not true():
        assert time.monotonic() < end, "it does not happen"
        time.sleep(0.02)


def is_alive(pid):
    try:
        # a zombie has no command line
        return bool(Path(f"/proc/{pid}/cmdline").read_bytes())
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_damaged_results_start_again(tmp_path, capsys):
    (tmp_path / "results.jsonl").write_text('{"stage": "run", "ki')
    run_stages([count(tmp_path, "first")], device="cpu", quick=True, folder=tmp_path)
    assert ends_of(tmp_path) == dict(first="done") and "is damaged" in capsys.readouterr().out


def test_results_are_renamed_into_place(tmp_path, monkeypatch):
    """A full disk leaves the file of before."""
    results = Results(tmp_path, dict(of="a test"))
    results.replace("first", [dict(stage="first", kind="stage", status="done", seconds=1, budget=1)])
    before = (tmp_path / "results.jsonl").read_text()

    def full(self, text):
        with self.open("w") as file:
            file.write(text[: len(text) // 2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space"):
        results.replace("second", [dict(stage="second", kind="stage", status="done", seconds=1, budget=1)])
    assert (tmp_path / "results.jsonl").read_text() == before


def test_tasks_run_beside_each_other_and_each_ends_once():
    tasks = {str(i): lambda i=i: iter([dict(i=i), dict(i=i + 10)]) for i in range(5)}
    found = list(in_processes(tasks, 2, 60))
    assert sorted(value["i"] for _, kind, value in found if kind == "record") == [*range(5), *range(10, 15)]
    assert sorted(name for name, kind, _ in found if kind == "done") == sorted(tasks)


def test_wrong_options_say_what_to_do(tmp_path, capsys):
    for options, message in (
        (["--stages", "ops,opps"], "no stage is called opps; choose machine, compile"),
        (["--report", str(tmp_path)], "holds no results.jsonl; run python scripts/gpu_check.py"),
    ):
        with pytest.raises(SystemExit):
            main(options)
        assert message in capsys.readouterr().err


def test_the_budgets_fit_ten_minutes():
    assert sum(stage.seconds for stage in STAGES) <= 9.75 * 60
