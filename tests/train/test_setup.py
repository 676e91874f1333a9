"""Proves which model a run starts from, and that it never trains in the slower precision.

python -m pytest tests/train/test_setup.py
"""

import pytest
import torch

from prismer import precision
from prismer.training.initial_model import build_initial_model, initial_config


@pytest.mark.parametrize(("bf16", "fp32", "chosen"), [(50.0, 40.0, "bf16"), (40.0, 40.0, "bf16"), (8.0, 130.0, "fp32")])
def test_the_faster_precision_is_chosen(monkeypatch, bf16, fp32, chosen):
    rates = {torch.bfloat16: bf16, torch.float32: fp32}
    monkeypatch.setattr(precision, "block_rates", lambda width: rates)
    name, why = precision.choose_precision("auto", 128, torch.device("cpu"))
    assert name == chosen
    assert "\n" not in why and f"{bf16:.0f} GFLOP/s" in why and f"{fp32:.0f} in fp32" in why


@pytest.mark.parametrize("wanted", ["bf16", "fp32"])
def test_a_requested_precision_is_not_measured(monkeypatch, wanted):
    monkeypatch.setattr(precision, "block_rates", lambda width: pytest.fail("the processor was measured"))
    assert precision.choose_precision(wanted, 128, torch.device("cpu")) == (wanted, f"precision: {wanted}, as asked")


def test_both_precisions_are_measured_on_one_thread():
    before = torch.get_num_threads()
    rates = precision.block_rates(32, seconds=0.01)
    assert set(rates) == {torch.bfloat16, torch.float32} and min(rates.values()) > 0.01
    assert torch.get_num_threads() == before


def test_a_run_starts_from_a_model_folder_or_a_preset(workshop):
    folder = str(workshop.folder / "model")
    model = build_initial_model(folder, image_size=96)
    assert model.config.image_size == 96 and model.tokenizer is not None
    assert initial_config(folder).vision_width == 32 and initial_config("base").vision_width == 768
    with pytest.raises(ValueError, match="'bse' is neither a model folder nor a preset"):
        initial_config("bse")
    with pytest.raises(ValueError, match="no pre-trained towers of preset 'base'"):
        build_initial_model("base")
