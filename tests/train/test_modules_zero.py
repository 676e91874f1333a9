"""Proves that a model of fused modules, and patched modules of open_clip and transformers, train under ZeRO-3 to the
losses and weights of plain training.

Run: pytest tests/train/test_modules_zero.py
"""

import json
from pathlib import Path

import pytest

from tests.train.forks import run_ranks

pytestmark = pytest.mark.timeout(600)


# one process gathers nothing that two do not
@pytest.mark.parametrize("processes", (pytest.param(1, marks=pytest.mark.long), 2))
@pytest.mark.parametrize("model", ("modules", pytest.param("patched", marks=pytest.mark.long)))
def test_modules_train_under_zero_as_without(tmp_path, model, processes):
    for package in ("open_clip", "transformers"):
        pytest.importorskip(package)
    out = tmp_path / "report.json"
    run_ranks(processes, [Path(__file__).with_name("modules_under_zero.py"), out, model], tmp_path / "log")
    report = json.loads(out.read_text())
    assert report["losses"] == pytest.approx(report["expected"], rel=1e-5)
    for name, difference in report["difference"].items():
        frozen = name.startswith("frozen")
        assert (report["step"][name] == 0) == frozen, name
        # the gradient of a key's bias is rounding, of which Adam makes steps
        if not name.endswith(("in_proj_bias", "k_proj.bias", "key.bias", "c_attn.bias")):
            assert difference <= 0.05 * report["step"][name] + 1e-6, name
