"""Proves which model a run starts from, and that it never trains in the slower precision.

python -m pytest tests/train/test_setup.py
"""

from pathlib import Path

import pytest
import torch

from prismer import precision
from prismer.config import prismer_tiny
from prismer.dataloading.semantics.features import TABLE_FILES
from prismer.kernels import tuning
from prismer.kernels.tuning.tables import Entry, Table
from prismer.training import setup
from prismer.training.config import TrainConfig
from prismer.training.initial_model import build_initial_model, initial_config, semantics_folder

CPU = torch.device("cpu")


def pretend(monkeypatch, bf16, fp32, flags=("avx512_bf16",)):
    monkeypatch.setattr(precision, "native_bf16_flags", lambda: set(flags))
    spent = {torch.bfloat16: bf16, torch.float32: fp32}
    monkeypatch.setattr(precision, "step_seconds", lambda config: spent)


@pytest.mark.parametrize(
    ("bf16", "fp32", "chosen"), [(0.4, 0.5, "bf16"), (0.48, 0.5, "fp32"), (0.5, 0.5, "fp32"), (4.0, 0.5, "fp32")]
)
def test_bf16_is_chosen_if_a_step_is_clearly_faster(monkeypatch, bf16, fp32, chosen):
    pretend(monkeypatch, bf16, fp32)
    name, why = precision.choose_precision("auto", prismer_tiny(), CPU)
    assert name == chosen
    assert "\n" not in why and f"{bf16:.2g} s an image in bf16 and {fp32:.2g} s in fp32" in why


@pytest.mark.parametrize("wanted", ["bf16", "fp32"])
def test_a_requested_precision_is_not_measured(monkeypatch, wanted):
    monkeypatch.setattr(precision, "step_seconds", lambda config: pytest.fail("the processor was measured"))
    assert precision.choose_precision(wanted, prismer_tiny(), CPU) == (wanted, f"precision: {wanted}, as asked")


def test_emulated_bf16_is_not_measured(monkeypatch):
    pretend(monkeypatch, 0.1, 1.0, flags=())
    monkeypatch.setattr(precision, "step_seconds", lambda config: pytest.fail("the processor was measured"))
    name, why = precision.choose_precision("auto", prismer_tiny(), CPU)
    assert name == "fp32" and why.endswith("has no bf16 instructions")


def test_the_layers_of_a_step_are_measured_in_both_precisions_on_one_thread(monkeypatch):
    """Each kind counts as often as the model has it; gradients reach what trains, and inherited weights are frozen."""
    seen, threads = [], torch.get_num_threads()

    def fastest(steps, seconds):
        for dtype, step in steps.items():
            step()
            module = step.args[0]
            trains = {name for name, p in module.named_parameters() if p.grad is not None}
            assert trains and {p.dtype for p in module.parameters()} == {dtype}
            assert not any(name.startswith(("ln_1", "mlp", "attention")) for name in trains) or len(seen) > 1
        seen.append(type(module).__name__)
        return dict.fromkeys(steps, 1.0)

    monkeypatch.setattr(precision, "_fastest", fastest)
    config = prismer_tiny(image_size=32, label_size=32, vision_width=64, text_width=64, text_mlp_width=64)
    found = precision.step_seconds(config)
    assert seen == ["VisionBlock", "DecoderLayer", "ResamplerBlock", "ExpertStem", "ExpertStem"]
    # 6 blocks, 4 + 1 layers, 2 blocks of the resampler and 6 stems, 16 images at a time
    assert found == {dtype: pytest.approx((6 + 5 + 2 + 6) / 16) for dtype in (torch.bfloat16, torch.float32)}
    assert torch.get_num_threads() == threads


def test_a_clearly_slower_precision_ends_the_measurement(monkeypatch):
    asked = []
    slow = {torch.bfloat16: 10.0, torch.float32: 1.0}
    monkeypatch.setattr(precision, "_fastest", lambda steps, seconds: asked.append(steps) or slow)
    found = precision.step_seconds(prismer_tiny())
    assert len(asked) == 1 and found[torch.bfloat16] == 10 * found[torch.float32]


def test_layers_are_really_measured():
    spent = precision.step_seconds(prismer_tiny(image_size=32, label_size=32, vision_width=64), seconds=0.0)
    assert set(spent) == {torch.bfloat16, torch.float32} and min(spent.values()) > 0


def test_a_run_starts_from_a_model_folder_or_a_preset(workshop):
    folder = str(workshop.folder / "model")
    model = build_initial_model(folder, image_size=96)
    assert model.config.image_size == 96 and model.tokenizer is not None
    assert initial_config(folder).vision_width == 32 and initial_config("base").vision_width == 768
    with pytest.raises(ValueError, match="'bse' is neither a model nor a preset"):
        initial_config("bse")


def test_a_run_reads_the_table_of_its_settings_or_of_its_first_model(tmp_path):
    assert semantics_folder("tables/clip", str(tmp_path)) == Path("tables/clip")
    assert semantics_folder("", str(tmp_path)) is None and semantics_folder("", "base") is None
    (tmp_path / TABLE_FILES[0]).write_bytes(b"")
    assert semantics_folder("", str(tmp_path)) == tmp_path


def test_every_rank_takes_the_measured_choices_of_rank_zero(monkeypatch):
    """Two ranks with different tables would run different implementations, whose sums differ."""
    entry = Entry(op="layer_norm", dtype="float32", gradient=False, shape=(8, 6, 0), choice="native", prior="host")
    of_rank_zero, own = Table(entries=(entry,)), tuning.table("cpu")
    monkeypatch.setattr(setup.zero, "start_distributed", lambda local_rank: (CPU, None))
    monkeypatch.setattr(setup.zero, "check_settings", lambda *_: None)
    monkeypatch.setattr(setup.dist, "get_rank", lambda: 1)
    monkeypatch.setattr(setup.dist, "get_world_size", lambda: 2)
    prepared = dict(precision="fp32", table=of_rank_zero.to_json())
    monkeypatch.setattr(setup.zero, "run_on_rank_zero", lambda work, group: prepared)
    monkeypatch.setattr(setup.RunFolder, "last", lambda self: (_ for _ in ()).throw(InterruptedError))
    try:
        with pytest.raises(InterruptedError):
            setup.Run(TrainConfig(batch_size=32), {})
        assert tuning.table("cpu").digest == of_rank_zero.digest != own.digest
        assert tuning.choice("cpu", entry.key) == "native"
    finally:
        tuning.use_table("cpu", own)
