"""Proves that a run with odd settings or damaged files starts as configured, or refuses in one sentence.

python -m pytest tests/faults/test_run_files.py
"""

import dataclasses
import json
import math
import shutil
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from prismer.config import prismer_tiny
from prismer.files import write_checksums, write_json
from prismer.model import Prismer
from prismer.tokenizer import Tokenizer
from prismer.training.checkpoint import STATE
from prismer.training.config import TrainConfig
from prismer.training.engine_settings import complete_settings, read_config
from prismer.training.progress import Progress, read_metrics
from prismer.training.run_folder import INDEX, SETTINGS, RunFolder
from prismer.training.text_statistics import TextStatistics
from prismer.training.zero import check_settings
from tests.faults.anything import ODD_NUMBERS, anything, cases, damaged, dump, is_sentence, mutated

FIELDS = {field.name: field.default for field in dataclasses.fields(TrainConfig)}
ENGINE = {
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "bf16": {"enabled": "auto"},
    "steps_per_print": 100,
    "zero_optimization": {
        "stage": 3,
        "overlap_comm": True,
        "contiguous_gradients": True,
        "stage3_param_persistence_threshold": 1e4,
        "offload_optimizer": {"device": "none"},
    },
    "prismer": {"task": "joint", "steps": 10, "learning_rate": 1e-3, "drop_labels": 0.25, "run": "tiny"},
}


def refused(action) -> bool:
    """Whether `action` refuses; it has to do so in one sentence."""
    try:
        action()
    except ValueError as error:
        assert is_sentence(str(error)), str(error)
        return True
    return False


@cases(250)
@given(engine=mutated(ENGINE), tail=st.sampled_from([b"", b"", b"", b"}", b"\xff"]))
def test_mutated_settings_are_used_or_refused(tmp_path_factory, engine, tail):
    file = tmp_path_factory.getbasetemp() / "zero3.json"
    file.write_bytes(dump(engine) + tail)

    def start():
        config, settings = read_config(file)
        merged = complete_settings(config, settings, world_size=1, precision="fp32")
        check_settings(config, settings)
        assert merged["zero_optimization"]["stage"] == 3 and merged["bf16"]["enabled"] is False

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        refused(start)


@cases(250)
@given(name=st.sampled_from(sorted(FIELDS)), value=st.sampled_from(ODD_NUMBERS) | anything)
def test_odd_values_of_a_field_are_used_or_refused(name, value):
    """An accepted value has the field's type, is finite, and is not absurdly large."""
    if refused(lambda: TrainConfig(**{name: value})):
        return
    taken = getattr(TrainConfig(**{name: value}), name)
    assert type(taken) is type(FIELDS[name])
    if isinstance(taken, (int, float)):
        assert math.isfinite(taken) and 0 <= taken <= 2**63
    if name == "run":
        folder = TrainConfig(run=value).folder
        assert folder.name not in ("", ".", "..", "runs") or "/" in value
    if name in ("captions_per_image", "questions_per_image", "loader_threads", "batch_size", "image_size"):
        assert taken <= 2**24


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run folder with three checkpoints of a small model, as training would leave it."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    tokenizer = Tokenizer.train(["a cube"], 280)
    sizes = dict(
        image_size=16,
        label_size=32,
        vision_width=8,
        vision_depth=1,
        vision_heads=1,
        resampler_depth=1,
        resampler_heads=1,
        num_latents=2,
        text_width=8,
        text_depth=1,
        text_heads=1,
        text_mlp_width=8,
        experts=("depth",),
        vocab_size=tokenizer.vocab_size,
    )
    torch.manual_seed(0)
    model = Prismer(prismer_tiny(**sizes), tokenizer)
    RunFolder(folder).reconcile_settings(TrainConfig(), lambda: "fp32")
    TextStatistics(answers=["yes", "no"], guesses={"x": "yes"}, caption="a cube").save(folder)
    rows = [dict(step=i, kind="train", loss=1.0, learning_rate=0.1) for i in range(1, 4)]
    rows.append(dict(step=3, kind="skipped", split="train", shard="s", key="k", reason="r"))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    names = [f"step-{i:08d}" for i in (1, 2, 3)]
    for step, name in enumerate(names, 1):
        checkpoint = folder / "checkpoints" / name
        model.save_pretrained(checkpoint)
        state = dict(
            step=step,
            epoch=0,
            samples=16 * step,
            loss_sum=1.0,
            loss_count=1,
            precision="fp32",
            world_size=1,
            seed=42,
            score=0.1 * step,
        )
        write_json(checkpoint / STATE, state)
        write_checksums(checkpoint)
    write_json(folder / "checkpoints" / INDEX, dict(last=names[2], best=names[1], best_score=0.2, written=names))
    return folder


def resume(folder):
    """Do what a new start does with the files of a run before it trains."""
    run = RunFolder(folder)
    try:
        run.claim()
        run.check_files()
        run.reconcile_settings(TrainConfig(), lambda: pytest.fail("an earlier run was taken for none"))
        TextStatistics.load(folder)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = Prismer.from_pretrained(run.last())
    finally:
        if run._lock is not None:
            run._lock.close()
    read_metrics(folder)
    return run.last().name, model


def tensors_of(folder):
    return Prismer.from_pretrained(folder).state_dict()


@cases(150)
@given(data=st.data())
def test_a_run_with_a_damaged_file_resumes_or_is_refused(tmp_path_factory, whole, data):
    """It resumes at the same step from the same weights, or says what to do."""
    folder = tmp_path_factory.getbasetemp() / "damaged"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(whole, folder)
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    path = data.draw(st.sampled_from([*files, folder / "checkpoints" / INDEX, folder / SETTINGS]))
    content = path.read_bytes()
    if path.suffix == ".json" and data.draw(st.booleans()):
        path.write_bytes(dump(data.draw(mutated(json.loads(content)) | anything)))
    elif data.draw(st.sampled_from([True, False, False])):
        path.unlink()
    else:
        path.write_bytes(data.draw(damaged(content)))
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    found = []
    if refused(lambda: found.extend(resume(folder))):
        # nothing was changed, so that the whole files can still be used
        assert all(p.read_bytes() == text for p, text in before.items())
        return
    name, model = found
    index = path.parent.name == "checkpoints"
    assert name == "step-00000003" or index
    expected = tensors_of(whole / "checkpoints" / name)
    assert all(torch.equal(model.state_dict()[key], expected[key]) for key in expected)


def test_a_long_stored_setting_is_shortened_in_the_refusal(tmp_path, whole):
    run = shutil.copytree(whole, tmp_path / "run")
    stored = json.loads((run / SETTINGS).read_bytes())
    stored["settings"]["task"] = "a" * 3000
    (run / SETTINGS).write_bytes(dump(stored))
    assert refused(lambda: resume(run))


@cases(50)
@given(data=st.data())
def test_damaged_metrics_are_cut_or_refused(tmp_path_factory, data):
    folder = tmp_path_factory.getbasetemp() / "metrics"
    folder.mkdir(exist_ok=True)
    rows = [dict(step=i, kind="train", loss=1.0, learning_rate=0.1) for i in range(1, 4)]
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    (folder / "metrics.jsonl").write_bytes(data.draw(damaged(lines)))
    if not refused(lambda: read_metrics(folder)):
        before = read_metrics(folder)
        Progress(folder, 2, 4).close()
        assert read_metrics(folder) == [row for row in before if row["step"] <= 2]
