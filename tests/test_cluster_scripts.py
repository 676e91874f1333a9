"""Proves the scripts of scripts/cluster with stand-ins for Slurm's commands, and its hostfile with DeepSpeed's reader.

Run: pytest tests/test_cluster_scripts.py
"""

import json
import os
import subprocess
import time
from pathlib import Path

import pytest

CLUSTER = Path(__file__).parents[1] / "scripts" / "cluster"
# stands for srun: as many tasks as there would be, one after the other, after its own options
SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do echo "$1" >> "$LOG.srun"; shift; done
for ((task = 0; task < TASKS; task++)); do
    SLURM_PROCID=$task SLURM_LOCALID=$((task % 2)) SLURM_NTASKS=$TASKS "$@"
done
"""
# stands for prismer and torchrun: notes its arguments and its place among the processes
PROGRAM = """#!/usr/bin/env python3
import json, os, sys
names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
with open(os.environ["LOG"], "a") as log:
    print(json.dumps([os.path.basename(sys.argv[0]), sys.argv[1:], [os.environ.get(name) for name in names]]), file=log)
sys.exit(any(argument in os.environ.get("FAILING", "").split() for argument in sys.argv))
"""
SCONTROL = "#!/bin/bash\necho node-7\necho node-8\n"


@pytest.fixture
def run(tmp_path):
    """Run a script of scripts/cluster in a cluster of stand-ins: what its programs have noted."""
    programs = dict(srun=SRUN, prismer=PROGRAM, torchrun=PROGRAM, scontrol=SCONTROL)
    for name, text in programs.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)

    def run(name: str, *arguments: str, tasks: int, code: int = 0) -> list:
        slurm = dict(
            SLURM_JOB_NODELIST="node-[7-8]", SLURM_JOB_NUM_NODES="2", SLURM_JOB_ID="42", SLURM_TASKS_PER_NODE="2(x2)"
        )
        settings = dict(TASKS=str(tasks), LOG=str(tmp_path / "log"), SLURM_SUBMIT_DIR=str(tmp_path))
        settings["PATH"] = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
        environment = {**os.environ, **slurm, **settings, "SLURM_GPUS_ON_NODE": "8"}
        assert subprocess.run([CLUSTER / name, *arguments], env=environment).returncode == code
        return [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]

    return run


def test_labelling_starts_one_process_for_each_gpu(run, tmp_path):
    arguments = ["/data/my photos", "--out", "/data/out", "--licence", "it's $HOME"]
    found = run("label.slurm", *arguments, tasks=4)
    assert found == [["prismer", ["label", *arguments], [str(i), "4", str(i % 2), "2"]] for i in range(4)]
    # a dead process must not end the others, which take over its shards
    assert (tmp_path / "log.srun").read_text().split() == ["--distribution=block", "--kill-on-bad-exit=0"]


def test_training_starts_one_torchrun_on_each_node(run):
    found = run("train.slurm", "--model", "base", "--name", "my run", tasks=2)
    assert len(found) == 2 and found[0] == found[1]
    name, arguments, _ = found[0]
    text = " ".join(arguments)
    assert name == "torchrun" and "--nnodes 2 --nproc_per_node 8 --max-restarts 0" in text
    assert "--rdzv-id 42-1 --rdzv-backend c10d --rdzv-endpoint node-7:29500" in text
    script = arguments.index("train.py")
    assert arguments[script:] == ["train.py", "--config", "zero3.json", "--model", "base", "--name", "my run"]


def test_training_starts_anew_after_a_lost_process_unless_the_time_is_up(run, monkeypatch):
    def attempts(found):
        return [arguments[arguments.index("--rdzv-id") + 1] for _, arguments, _ in found]

    monkeypatch.setenv("FAILING", "42-1")
    assert attempts(run("train.slurm", tasks=1)) == ["42-1", "42-2"]
    monkeypatch.setenv("FAILING", "42-1 42-2 42-3")
    assert attempts(run("train.slurm", tasks=1, code=1))[2:] == ["42-1", "42-2", "42-3"]
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(time.time()) + 100))
    assert attempts(run("train.slurm", tasks=1, code=1))[5:] == ["42-1"]


def test_deepspeed_reads_the_hostfile():
    from deepspeed.launcher.runner import fetch_hostfile

    assert dict(fetch_hostfile(str(CLUSTER / "hostfile"))) == {"node-1": 8, "node-2": 8}
