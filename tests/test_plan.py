"""Proves the planner: its bytes against real training steps and running DeepSpeed engines, its FLOPs and bytes sent
against formulas, the largest batch, and the output and refusals of `prismer plan`.

Run: pytest tests/test_plan.py
"""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from prismer import tied_embedding as tied
from prismer.cli.main import main
from prismer.config import prismer_base, prismer_tiny
from prismer.costs.fake_step import FakeTrainer, _MemoryWatch, blank_batch
from prismer.costs.plan import SETUPS, Job, Plan, Setup, ZeroSettings, texts_of
from prismer.freezing import freeze
from prismer.kernels import cross_attention
from prismer.kernels.absorbed_projection import image_slices
from prismer.kernels.dispatch import use_backend
from prismer.kernels.mlp import mlp
from prismer.kernels.resampler_attention import torch_backend as resampler_torch
from prismer.model import Prismer
from prismer.training.config import TrainConfig
from prismer.training.engine_settings import read_config
from tests.ops.live_bytes import peak_bytes
from tests.train.forks import start

HERE = Path(__file__).parent
ONE, MIXED = ((1, 30),), ((2, 12), (3, 20))
TINY = prismer_tiny(text_depth=2, vision_depth=2)


def small(**changes):
    """A config with six experts at 112 px, small in width and depth."""
    sizes = dict(
        image_size=112,
        label_size=112,
        vision_width=256,
        vision_depth=4,
        vision_heads=4,
        resampler_depth=2,
        resampler_heads=4,
        text_width=256,
        text_depth=4,
        text_heads=4,
        text_mlp_width=1024,
        vocab_size=5000,
        dropout=0.0,
    )
    return prismer_base(**{**sizes, **changes})


# one process holds nothing that two do not
WORLDS = (1, 2) if os.environ.get("PRISMER_LONG_TESTS") else (2,)


@pytest.fixture(scope="module", autouse=True)
def zero_runs(tmp_path_factory):
    """Real DeepSpeed runs of WORLDS processes, in the background of the other tests."""
    folder = tmp_path_factory.mktemp("zero")
    runs = {}
    for world in WORLDS:
        out = folder / f"{world}.json"
        command = [HERE / "plan_under_zero.py", out]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        runs[world] = start(command, folder / f"{world}.log", folder, environment, world), out
    yield runs
    for forks, _ in runs.values():
        forks.kill()


def as_on_a_cpu(x, numbers):
    """Slices of a few images, as a CPU runs the resampler; a GPU runs all images at once."""
    return image_slices(torch.empty(x.shape[0]), numbers)


@pytest.mark.parametrize(
    ("mode", "batch", "texts", "checkpointing", "dropout"),
    (
        ("freeze_lang_vision", 4, ONE, False, 0.0),
        ("freeze_lang_vision", 8, ONE, False, 0.1),
        ("freeze_vision", 4, MIXED, True, 0.0),
        pytest.param("none", 8, MIXED, False, 0.0, marks=pytest.mark.long),
        ("none", 4, ONE, True, 0.1),
    ),
)
def test_planned_bytes_match_a_real_step(monkeypatch, mode, batch, texts, checkpointing, dropout):
    config = small(dropout=dropout)
    model = Prismer(config).train()
    freeze(model, mode)
    model.set_gradient_checkpointing(checkpointing)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, fused=True)
    images = blank_batch(config, batch, texts)

    def step():
        # torch's own products write into existing memory, as those of a GPU do
        with use_backend("linear:torch"):
            model(images).backward()
        optimizer.step()
        optimizer.zero_grad()

    # the step keeps what a step on a GPU keeps
    monkeypatch.setattr(cross_attention, "cheaper_order", lambda *_: "ordinary")
    monkeypatch.setattr(tied, "on_host", lambda *_: False)
    step()
    measured = peak_bytes(step)
    monkeypatch.setattr(resampler_torch, "image_slices", as_on_a_cpu)
    planned = FakeTrainer(config, mode, "fp32").step(batch, texts, checkpointing)
    # on a CPU with dropout, torch's attention keeps its probabilities; GPU kernels do not
    assert planned.peak.total == pytest.approx(measured, rel=0.05)
    if mode == "none" and checkpointing:
        # with few activations most gradients exist at the peak, and are absent where they leave at once
        assert planned.peak_sharded.total < planned.peak.total - planned.peak.gradients // 2
        assert planned.peak.gradients > sum(p.nbytes for p in trained) // 4


def test_memory_inside_ops_is_counted():
    R, D, E = 64, 32, 256
    x, up, down = (torch.empty(shape, device="meta") for shape in ((R, D), (E, D), (D, E)))
    with use_backend("torch"), _MemoryWatch([x, up, down]) as watch:
        mlp(x, up, None, down, None, activation="quick_gelu")
    # the hidden layer before and after its activation, or the hidden layer and the output
    assert 4 * R * (E + D) <= watch.peak.total <= 4 * R * (2 * E + D)
    R, V, D = 240, 30_000, TINY.text_width
    step = FakeTrainer(TINY.replace(vocab_size=V), "none", "fp32").step(2, ((1, R // 2),))
    # all logits, and the gradients that the loss forms
    formed = 4 * (V * D + V + R * D)
    assert 4 * R * V + formed < step.logits < 2 * 4 * R * V + formed
    # all activations exist by then
    assert step.peak_sharded.total >= step.kept - formed + step.logits - 4 * 10 * R


def test_flops_of_every_product_match_a_count_by_hand():
    T, N, D, H, V = 20, 49, 128, 64, 700
    config = prismer_base(
        experts=(),
        image_size=112,
        vision_width=D,
        vision_depth=3,
        vision_heads=2,
        text_width=H,
        text_depth=2,
        text_heads=2,
        text_mlp_width=4 * H,
        vocab_size=V,
        dropout=0.0,
    )
    trainer = FakeTrainer(config, "none", "fp32")
    forward, backward = trainer.flops(((1, T),))
    block = 2 * N * 14 * D * D + 4 * N * N * D
    plain = 2 * T * 12 * H * H + 4 * T * T * H
    layer = plain + 2 * T * 4 * H * H + 2 * 2 * N * D * H + 4 * T * N * H
    stem, dense, logits = 2 * N * 3 * 16 * 16 * D, 2 * T * H * H, 2 * T * H * V
    # the loss forms its gradients with its value
    assert forward == stem + 3 * block + 2 * layer + plain + dense + 3 * logits
    # two products for each product with a weight, five for the two of attention, none for the gradient of the image
    attention = 3 * 4 * N * N * D + 3 * 4 * T * T * H + 2 * 4 * T * N * H
    assert backward == 2 * (forward - 3 * logits) - stem + attention // 2
    # recomputation ends with the last tensor that the backward pass reads
    again = trainer.flops(((1, T),), checkpointing=True)
    assert again[0] == forward
    assert 0.7 * (3 * block + 2 * layer) < again[1] - backward <= 3 * block + 2 * layer
    # a frozen tower passes gradients on, and its weights get none
    frozen = FakeTrainer(config, "freeze_vision", "fp32").flops(((1, T),))
    assert frozen == (forward, backward - 3 * 2 * N * 12 * D * D)


def job(world: int, precision: str, **changes) -> Job:
    from tests.plan_under_zero import MODE, TEXTS, ZERO, config

    zero = ZeroSettings.from_engine(dict(zero_optimization=ZERO))
    described = dict(config=config(), freeze=MODE, precision=precision, texts=TEXTS, world=world, zero=zero)
    return Job(**{**described, **changes})


@pytest.mark.parametrize("world", (pytest.param(1, marks=pytest.mark.long), 2))
def test_planned_bytes_match_what_deepspeed_holds(monkeypatch, zero_runs, world):
    from tests.plan_under_zero import BATCH, RUNS

    monkeypatch.setattr(resampler_torch, "image_slices", as_on_a_cpu)

    process, out = zero_runs[world]
    process.wait(300)
    assert out.is_file(), out.with_suffix(".log").read_text()[-3000:]
    found = json.loads(out.read_text())
    assert [(run["stage"], run["precision"]) for run in found] == list(RUNS)
    for run in found:
        name = f"ZeRO {run['stage']} in {run['precision']} on {world}"
        plan = Plan(job(world, run["precision"]))
        held = plan.weights.held(run["stage"], world, plan.job.zero)
        # DeepSpeed also holds step counters and a few flags
        assert 0 <= run["held"] - held.total <= 2048, name
        for component in ("parameters", "gradients", "optimizer"):
            if component in run:
                assert run[component] == getattr(held, component), f"{component} of {name}"
        memory = plan.memory(Setup(stage=run["stage"]), BATCH)
        assert memory.total - memory.batch == pytest.approx(run["peak"], rel=0.1), name


def test_bytes_sent_in_a_step():
    weights = Plan(job(4, "bf16")).weights
    zero = job(4, "bf16").zero
    everything, trained = 2 * sum(weights.sizes), 2 * sum(weights.trained)
    assert 0 < trained < everything
    share = 3 / 4
    assert weights.sent(0, 4, zero) == weights.sent(2, 4, zero) == pytest.approx(2 * trained * share, abs=2)
    assert weights.sent(3, 4, zero) == pytest.approx((trained + everything) * share, abs=2)
    forgetful = replace(zero, stage3_max_live_parameters=0)
    assert weights.sent(3, 4, forgetful) == pytest.approx((trained + 2 * everything) * share, abs=2)
    # a stage that keeps gradients whole sends them once a step, other stages with each micro-batch
    assert weights.sent(1, 4, zero, 3) == weights.sent(1, 4, zero)
    assert weights.sent(2, 4, zero, 3) == pytest.approx(4 * trained * share, abs=2)
    assert [weights.sent(stage, 1, zero) for stage in range(4)] == [0] * 4


def test_offload_and_checkpointing_save_memory():
    from tests.plan_under_zero import config

    # deep enough, and with images enough, that activations of blocks are what fills a GPU
    deep, images = config().replace(vision_depth=8, text_depth=8), 64
    plan = Plan(job(4, "bf16", config=deep))
    memory = {setup: plan.memory(setup, images) for setup in SETUPS}
    for setup, of in memory.items():
        if setup.offload:
            on_gpu = memory[Setup(stage=setup.stage, checkpointing=setup.checkpointing)]
            assert of.optimizer == 0 < on_gpu.optimizer and of.total < on_gpu.total
            assert plan.host(setup) >= on_gpu.optimizer
        if not setup.checkpointing:
            again = Setup(stage=setup.stage, offload=setup.offload, checkpointing=True)
            assert memory[again].kept < of.kept
    accumulating = Plan(job(4, "bf16", config=deep, accumulation=2)).memory(Setup(stage=1), images)
    assert accumulating.gradients == 2 * sum(plan.weights.trained) > memory[Setup(stage=1)].gradients


@pytest.mark.parametrize("hint", (1, 40))
def test_the_largest_batch_fills_the_memory(hint):
    zero = ZeroSettings(reduce_bucket_size=1000)
    plan = Plan(Job(config=TINY, freeze="none", precision="fp32", texts=ONE, zero=zero))
    for checkpointing in (False, True):
        setup = Setup(stage=2, checkpointing=checkpointing)
        budget = plan.memory(setup, 17).total
        found = plan.largest_batch(setup, budget, hint)
        assert plan.memory(setup, found).total <= budget < plan.memory(setup, 18).total
        assert 15 <= found <= 17
        assert plan.largest_batch(setup, plan.memory(setup, 1).total - 1, hint) == 0


def test_plan_and_training_read_the_same_settings():
    train, engine = read_config(HERE.parent / "zero3.json")
    section = json.loads((HERE.parent / "zero3.json").read_text())["zero_optimization"]
    zero = ZeroSettings.from_engine(engine)
    assert zero.reduce_bucket_size == section["reduce_bucket_size"] != ZeroSettings().reduce_bucket_size
    assert zero.overlap_comm is section["overlap_comm"] is True
    assert ZeroSettings.from_engine(dict(zero_optimization=dict(sub_group_size="auto"))) == ZeroSettings()
    with pytest.raises(ValueError, match="sub_group_size is -1; give a number"):
        ZeroSettings.from_engine(dict(zero_optimization=dict(sub_group_size=-1)))
    assert texts_of(train, prismer_base()) == ((1, 30), (9, 42))
    vqa = TrainConfig.for_task(task="vqa", questions_per_image=4)
    assert texts_of(vqa, prismer_base(max_positions=40)) == ((4, 38),)


def test_the_output_fits_one_screen(capsys, tmp_path):
    config = dict(zero_optimization=dict(stage=3, reduce_bucket_size=1000), prismer=dict(batch_size=24, freeze="none"))
    (tmp_path / "zero.json").write_text(json.dumps(config))
    flags = ["--gpus", "3", "--gpu-memory", "5", "--config", str(tmp_path / "zero.json"), "--captions", "2"]
    assert main(["plan", *flags, "--model", "tiny", "--task", "pretrain", "--offload", "--checkpointing"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 100 and len(lines) < 40
    assert lines[0] == "tiny, pretrain, 128 px, none, bf16, 3 GPUs of 5 GB"
    assert "texts: 2 of 30 tokens" in lines[1] and "micro-batch 8 images" in lines[3]
    rows = [line.split() for line in lines if line[:2].strip().isdigit()]
    assert len(rows) == len(SETUPS)
    assert [row[:4] for row in rows if "*" in row] == [["3", "*", "host", "blocks"]]
    for row in rows:
        *parts, total, fits = [float(cell.rstrip("!")) for cell in row[-10:]]
        assert sum(parts) == pytest.approx(total, abs=0.5) and fits >= 8
    text = "\n".join(lines)
    assert "of it recomputed" in text and "host memory" in text and "images/s" in text


@pytest.mark.parametrize(
    ("flags", "says"),
    (
        (["--model", "bose"], "unknown preset 'bose'"),
        (["--gpus", "0"], "--gpus is 0; it must be at least 1"),
        (["--gpu-memory", "3"], "--reserve 4.0 leaves nothing"),
        (["--efficiency", "40"], "give a share of the peak"),
        (["--freeze", "all"], "freeze is 'all'; choose from none"),
        (["--gpus", "7"], "does not divide among 7 processes"),
        (["--model", "tiny", "--batch", "500", "--gpu-memory", "4.1"], "what would fit: "),
    ),
)
def test_wrong_flags_are_refused(capsys, flags, says):
    assert main(["plan", *flags]) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1
