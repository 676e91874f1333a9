"""The parts of training that need no engine: schedule, keyed randomness, precision policy, records, run folders.

python -m pytest tests/train/test_trainer_parts.py
"""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from prismer import precision
from prismer.training.config import TrainConfig
from prismer.training.data import choose_texts
from prismer.training.evaluation import Knowledge, blind_guesses, collect_knowledge, scores
from prismer.training.initial_model import start_config, start_model
from prismer.training.progress import Progress, plot_metrics, read_metrics
from prismer.training.results import results_table
from prismer.training.run_folder import RunFolder, write_json, write_safetensors
from prismer.training.trainer import instance_rows, keyed_seed, learning_rate

CONFIG = TrainConfig(batch_size=32, learning_rate=1e-2, min_learning_rate=1e-4, warmup_steps=10)


def test_learning_rate():
    rates = [learning_rate(step, 110, CONFIG) for step in range(110)]
    assert rates[:10] == pytest.approx([1e-3 * (i + 1) for i in range(10)])
    assert rates[10] == pytest.approx(1e-2)
    # halfway down the cosine
    assert rates[60] == pytest.approx((1e-2 + 1e-4) / 2)
    assert rates[60] == pytest.approx(1e-4 + (1e-2 - 1e-4) * 0.5 * (1 + math.cos(math.pi * 50 / 100)))
    assert all(a > b for a, b in zip(rates[10:], rates[11:], strict=False)) and rates[-1] > 1e-4


def test_learning_rate_without_warmup():
    assert learning_rate(0, 10, replace(CONFIG, warmup_steps=0)) == 1e-2
    assert learning_rate(4, 5, CONFIG) == pytest.approx(1e-2), "a run shorter than its warm-up warms up faster"


def test_instance_rows():
    rows = instance_rows(1, 2, 128)
    assert rows.shape == (256,) and torch.equal(rows[:128], rows[128:])
    assert torch.equal(rows[:128].sort().values, torch.arange(128))
    assert torch.equal(rows, instance_rows(1, 2, 128))
    assert not torch.equal(rows, instance_rows(1, 3, 128)) and not torch.equal(rows, instance_rows(2, 2, 128))


def test_keyed_seed():
    seeds = {keyed_seed(a, b, c) for a in range(5) for b in range(5) for c in range(5)}
    assert len(seeds) == 125 and all(0 <= seed < 2**63 for seed in seeds)


@pytest.mark.parametrize(("bf16", "fp32", "chosen"), [(50.0, 40.0, "bf16"), (40.0, 40.0, "bf16"), (8.0, 130.0, "fp32")])
def test_precision_is_never_the_slower(monkeypatch, bf16, fp32, chosen):
    rates = {torch.bfloat16: bf16, torch.float32: fp32}
    monkeypatch.setattr(precision, "block_rates", lambda width: rates)
    name, why = precision.choose_precision("auto", 128, torch.device("cpu"))
    assert name == chosen
    assert "\n" not in why and f"{bf16:.0f} GFLOP/s" in why and f"{fp32:.0f} in fp32" in why


@pytest.mark.parametrize("wanted", ["bf16", "fp32"])
def test_precision_as_asked(monkeypatch, wanted):
    monkeypatch.setattr(precision, "block_rates", lambda width: pytest.fail("measured for nothing"))
    assert precision.choose_precision(wanted, 128, torch.device("cpu")) == (wanted, f"precision: {wanted}, as asked")


def test_block_rates():
    before = torch.get_num_threads()
    rates = precision.block_rates(32, seconds=0.01)
    assert set(rates) == {torch.bfloat16, torch.float32} and min(rates.values()) > 0.01
    assert torch.get_num_threads() == before


def test_records_are_cut_at_the_resumed_step(tmp_path):
    rows = [dict(step=step, kind="train", loss=1.0 / step) for step in range(1, 9)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 9, "ki')
    progress = Progress(tmp_path, 5, 20)
    progress.record(dict(step=6, kind="train", loss=0.25, learning_rate=1e-3, samples_per_s=3.0))
    progress.close()
    found = read_metrics(tmp_path)
    assert [row["step"] for row in found] == [1, 2, 3, 4, 5, 6] and found[-1]["loss"] == 0.25


@pytest.mark.parametrize("scored", [{}, {"CIDEr-D": 2.0}, {"CIDEr-D": 2.0, "accuracy": 0.5, "accuracy/yes/no": 0.7}])
def test_plot(tmp_path, scored):
    rows = [dict(step=step, kind="train", loss=1.0 / step, learning_rate=1e-3) for step in range(1, 9)]
    if scored:
        rows.append(dict(step=8, kind="validation", score=0.5, **scored))
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    plot_metrics(tmp_path)
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_write_safetensors(tmp_path):
    tensors = {
        "steps": torch.tensor(7),
        "weight": torch.randn(3, 5),
        "transposed": torch.randn(4, 2).t(),
        "empty": torch.zeros(0, 3),
        "half": torch.randn(3).bfloat16(),
    }
    header = {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}
    write_safetensors(tmp_path / "x.safetensors", header, iter(tensors.values()))
    loaded = load_file(tmp_path / "x.safetensors")
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype and torch.equal(loaded[name], tensor), name


def checkpoint(run: RunFolder, step: int) -> None:
    (run.checkpoints / f"step-{step:08d}").mkdir(parents=True)
    write_json(run.checkpoints / "index.json", dict(last=f"step-{step:08d}"))


def test_settings_of_a_resumed_run(tmp_path):
    run = RunFolder(tmp_path / "run")
    assert run.last() is None and run.best() is None
    assert run.settle(CONFIG, lambda: "fp32") == ("fp32", [])
    # before the first checkpoint there is nothing to contradict
    assert run.settle(replace(CONFIG, seed=1), lambda: "fp32") == ("fp32", [])
    checkpoint(run, 5)
    assert run.best() == run.last() == run.checkpoints / "step-00000005"
    again = replace(CONFIG, seed=1, learning_rate=0.5)
    precision, changes = run.settle(again, lambda: pytest.fail("the precision is decided once"))
    assert precision == "fp32" and changes == ["learning_rate: 0.01 -> 0.5"]
    with pytest.raises(ValueError, match="was trained with batch_size 32, not 64; .* --fresh"):
        run.settle(replace(again, batch_size=64), lambda: "fp32")
    with pytest.raises(ValueError, match="trains in fp32, not bf16"):
        run.settle(replace(again, precision="bf16"), lambda: "fp32")


def test_fresh_deletes_nothing(tmp_path):
    run = RunFolder(tmp_path / "run")
    assert run.start_afresh() is None
    for number in (1, 2):
        checkpoint(run, number)
        assert run.start_afresh() == tmp_path / f"run.{number}"
    assert not run.path.exists()
    assert (tmp_path / "run.1/checkpoints/step-00000001").is_dir()
    assert (tmp_path / "run.2/checkpoints/step-00000002").is_dir()


class Metas:
    """A training split of which only the JSON is read."""

    classes: dict = {}

    def __init__(self, metas):
        self.metas = metas

    def __len__(self):
        return len(self.metas)

    def meta(self, i):
        return self.metas[i]


def question(kind, *answers, text="what?"):
    return dict(question=text, kind=kind, answers=[dict(answer=a, weight=w) for a, w in answers])


def test_knowledge(tmp_path):
    metas = [
        dict(
            captions=["a", "b"], questions=[question("yes/no", ("yes", 1.0)), question("count", ("2", 0.3), ("3", 0.6))]
        ),
        dict(captions=["b"], questions=[question("yes/no", ("no", 1.0)), question("count", ("2", 0.5))]),
        dict(captions=[], questions=[]),
    ]
    knowledge = collect_knowledge(Metas(metas), max_answers=3)
    # no and yes are as frequent: alphabetical; 2 outweighs 3
    assert knowledge.answers == ["no", "yes", "2"]
    assert knowledge.guesses == {"count": "2", "yes/no": "no"} and knowledge.caption == "b"
    knowledge.save(tmp_path)
    assert Knowledge.load(tmp_path) == knowledge
    assert json.loads((tmp_path / "answers.json").read_text()) == knowledge.answers


def test_scores_and_guesses():
    records = [
        dict(
            key="0",
            caption="A red cube on the ground.",
            captions=["a red cube on the ground"],
            questions=[
                dict(question="?", kind="count", answers=["2"], prediction="2"),
                dict(question="?", kind="yes/no", answers=["yes"], prediction="no"),
            ],
        ),
        dict(
            key="1",
            caption="A blue sphere.",
            captions=["two green cones near a sign"],
            questions=[dict(question="?", kind="count", answers=["3"], prediction="3")],
        ),
    ]
    found = scores(records)
    assert found["accuracy"] == pytest.approx(2 / 3)
    assert (found["accuracy/count"], found["accuracy/yes/no"]) == (1.0, 0.0)
    assert found["score"] == pytest.approx((found["CIDEr-D"] / 10 + 2 / 3) / 2) and found["CIDEr-D"] > 1
    guessed = scores(blind_guesses(records, Knowledge(guesses={"count": "2", "yes/no": "yes"}, caption="a cube")))
    assert (guessed["accuracy/count"], guessed["accuracy/yes/no"]) == (0.5, 1.0)
    assert records[1]["caption"] == "A blue sphere.", "the guesses overwrote the records"
    table = results_table([found, guessed, found], 2)
    assert "| VQA accuracy, yes/no | 0.000 | 1.000 | 0.000 |" in table


def test_start(workshop):
    folder = str(workshop.folder / "model")
    model = start_model(folder, image_size=96)
    assert model.config.image_size == 96 and model.tokenizer is not None
    assert start_config(folder).vision_width == 32 and start_config("base").vision_width == 768
    with pytest.raises(ValueError, match="'bse' is neither a model folder nor a preset"):
        start_config("bse")
    with pytest.raises(ValueError, match="no pre-trained towers of preset 'base'"):
        start_model("base")


@pytest.mark.parametrize(
    ("task", "group_size", "prefix"),
    [("joint", 5, True), ("caption", 2, True), ("pretrain", 2, False), ("vqa", 3, False), ("classify", 1, False)],
)
def test_choose_texts(workshop, task, group_size, prefix):
    model = start_model(str(workshop.folder / "model"))
    model.config = model.config.replace(caption_prefix="a picture of")
    config = TrainConfig(task=task, captions_per_image=2, questions_per_image=3)
    chooser, size = choose_texts(config, model, ["cat", "dog"])
    meta = {
        "captions": ["a red cube", "a cube", "one red cube"],
        "questions": [question("count", (str(i), 1.0), text=f"how many, {i}?") for i in range(4)],
        "class": 1,
    }
    texts = chooser(meta, np.random.default_rng(0))
    assert len(texts) == size == group_size
    written = [model.tokenizer.decode(ids).lower() for ids, _, _ in texts]
    assert any(text.startswith("a picture of") for text in written) == prefix
    assert ("dog" in written[0]) == (task == "classify")
    assert sum("how many" in text for text in written) == {"joint": 3, "vqa": 3}.get(task, 0)
