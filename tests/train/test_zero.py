"""Proves that ZeRO-3 training has the losses and weights of plain PyTorch, with every parameter sharded, on one process
and on two, with the decoder gathered at once (small models) and block by block (large ones); and with small parameters
that stay gathered, as by default; each for a model with expert maps alone and for one that reads detections as text.

python -m pytest tests/train/test_zero.py
"""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch

from prismer.model import Prismer
from prismer.training import zero_alone
from prismer.training.run_folder import RunFolder
from tests.train.forks import run_ranks

pytestmark = pytest.mark.timeout(900)


# one process gathers nothing that two do not
@pytest.mark.parametrize("processes", [pytest.param(1, marks=pytest.mark.long), 2])
@pytest.mark.parametrize(
    "small",
    [
        pytest.param(0, id="by-block"),
        pytest.param(20_000_000, id="whole-decoder", marks=pytest.mark.long),
        pytest.param(-1, id="gathered"),
    ],
)
def test_zero_trains_as_plain_pytorch_does(workshop, tmp_path, small, processes):
    out = tmp_path / "report.json"
    script = Path(__file__).with_name("zero_against_plain.py")
    run_ranks(processes, [script, workshop.folder / "model", small, out], tmp_path / "log")
    reports = json.loads(out.read_text())
    for report in reports.values():
        assert report["losses"] == pytest.approx(report["expected"], rel=2e-5)
        # where nothing is released, no hook has to gather it
        assert report["hooks"] == (small >= 0 or processes > 1)
        # Adam's first steps have the size of the learning rate, so that a lost gradient shows as an unchanged weight
        lost = {
            name: (difference, report["step"][name])
            for name, difference in report["difference"].items()
            if difference > 0.05 * report["step"][name] + 1e-5 and not name.endswith("key.bias")
        }
        assert not lost
        assert sum(step > 0 for step in report["step"].values()) > 100
    new = {name: step for name, step in reports["text"]["step"].items() if name not in reports["maps"]["step"]}
    assert len(new) == 7 and min(new.values()) > 0


@pytest.mark.parametrize("size", (1, 1023, 1024, 5000))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_the_norm_of_all_gradients_at_once(size, dtype):
    x = torch.randn(size).to(dtype).float()
    found = zero_alone._norm(x)
    assert found.dtype == torch.float64
    assert float(found) == pytest.approx(float(x.double().norm()), rel=2e-7)
    x[-1] = torch.nan
    assert zero_alone._norm(x).isnan()


def test_a_dead_rank_ends_the_run(workshop):
    """One of two ranks is killed: the launch ends with an error, no process survives, and the last checkpoint loads."""
    run = workshop.launch("dead", "deepspeed 2", steps=2000, save_every=2, precision="fp32")
    run.wait_for_step(4)
    ranks = subprocess.run(["pgrep", "-f", f"train.py.*{run.folder}"], capture_output=True, text=True).stdout
    workers = [int(pid) for pid in ranks.split() if "--local_rank=1\0" in Path(f"/proc/{pid}/cmdline").read_text()]
    os.kill(workers[-1], signal.SIGKILL)
    assert run.end(120) != 0
    end = time.monotonic() + 30
    while run.ranks_alive() and time.monotonic() < end:
        time.sleep(0.2)
    assert not run.ranks_alive()
    assert not (run.folder / "finished.json").exists()
    last = RunFolder(run.folder).last()
    assert last is not None
    Prismer.from_pretrained(last)
