"""Proves that `train.py --profile` writes its trace and table, and then goes on training.

python -m pytest tests/train/test_profile.py
"""

import gzip
import json
from types import SimpleNamespace

import pytest
import torch

from prismer.training.run_folder import RunFolder
from prismer.training.trainer import open_profile

pytestmark = pytest.mark.timeout(900)


def test_a_profiled_run_writes_trace_and_table(workshop):
    run = workshop.launch("profiled", flags=("--profile", "1"), steps=5, precision="fp32", save_every=1000)
    assert run.end() == 0, run.text()
    events = json.loads(gzip.decompress((run.folder / "trace.json.gz").read_bytes()))["traceEvents"]
    # one step was recorded, including its backward pass
    names = [event.get("name", "") for event in events if event.get("ph") == "X"]
    assert names.count("prismer: step") == 1 and "aten::convolution_backward" in names
    table = (run.folder / "profile.txt").read_text()
    assert table in run.text() and "host gap, in no operator" in table
    total = next(line for line in table.splitlines() if line.startswith("total"))
    assert float(total.split()[4]) > 0 and " 100.0% " in total
    # every step trained
    assert sorted(run.losses()) == [1, 2, 3, 4, 5] and (run.folder / "finished.json").is_file()


@pytest.mark.parametrize(
    ("asked", "message"), ((3, "5 steps are left, and profiling 3 takes 6"), (-1, "--profile is -1"))
)
def test_more_steps_than_are_left_cannot_be_profiled(tmp_path, asked, message):
    # the part of a Run that a profile needs, without processes and model
    run = SimpleNamespace(
        folder=RunFolder(tmp_path), device=torch.device("cpu"), precision="fp32", total_steps=9, is_rank_zero=True
    )
    with pytest.raises(ValueError, match=message):
        open_profile(run, asked, done=4)
    assert open_profile(run, 2, done=4).needed == 5
