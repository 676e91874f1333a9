"""Proves how many operators the default training step issues (tiny, 16 images, ZeRO-3 on one process), the whole step
with DeepSpeed's part: the host that issues them takes as long as their arithmetic. And proves that deterministic mode
reaches torch and survives a resume.

python -m pytest tests/train/test_step_count.py -s
"""

import json
from pathlib import Path

import pytest

from prismer.dataloading.scenes.dataset import render_dataset
from prismer.kernels.machine import native_missing
from tests.train.forks import run_ranks

pytestmark = pytest.mark.timeout(600)

# half of what a step issued when DeepSpeed handled each parameter, and the resampler each image, by itself: 3,975
# operators in fp32 with 247 casts, 4,438 in bf16 with 987, and 1,117 allocations
LIMITS = {
    "fp32": dict(operators=1900, casts=20, allocations=558, views=3000),
    "bf16": dict(operators=2000, casts=280, allocations=558, views=3000),
}


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes")
    render_dataset(folder, train=32, val=4, test=0, workers=1, progress=False)
    return folder


def count(scenes, run, precision, deterministic="no"):
    out = run.parent / "report.json"
    script = Path(__file__).with_name("count_step.py")
    run_ranks(1, [script, scenes, run, out, precision, deterministic], run.parent / "log")
    return json.loads(out.read_text())


@pytest.mark.skipif(native_missing() is not None, reason=f"the count is of native ops: {native_missing()}")
@pytest.mark.parametrize("precision", [pytest.param("fp32", marks=pytest.mark.long), "bf16"])
def test_the_default_step_issues_few_operators(scenes, tmp_path, precision):
    found = count(scenes, tmp_path / "run", precision)
    print(f"\n{precision}: {found}")
    for kind, limit in LIMITS[precision].items():
        assert found[kind] < limit, kind
    # a count of half a step would be small, too
    assert found["operators"] > 700 and found["losses"] == sorted(found["losses"])


# on a CPU every run repeats to the bit, and test_training.py proves that a resumed one does
@pytest.mark.long
def test_deterministic_mode_reaches_torch_and_survives_a_resume(scenes, tmp_path):
    started = count(scenes, tmp_path / "run", "fp32", "yes")
    assert started["deterministic"] and not started["resumed"]
    settings = json.loads((tmp_path / "run" / "train_config.json").read_text())["settings"]
    assert settings["deterministic"] is True
    resumed = count(scenes, tmp_path / "run", "fp32", "yes")
    assert resumed["deterministic"] and resumed["resumed"]
    # the step after the checkpoint again, in another process: trainer.json stores the sum of the losses before it
    assert resumed["losses"][0] == started["losses"][3]
