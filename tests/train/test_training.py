"""Proves with real launches of train.py that a run is complete, repeatable, resumable and stoppable.

A finished run has all its outputs, and its frozen towers did not change. A run that was killed and resumed has the
losses of an uninterrupted one, bit for bit. Two processes train as one does, and a checkpoint resumes at another number
of processes. SIGTERM, also to the launcher alone, ends in a checkpoint. A non-finite loss stops the run.

    python -m pytest tests/train/test_training.py
"""

import json
import signal
import time

import pytest
import torch
from safetensors.torch import load_file

from prismer.batch import ImageBatch
from prismer.freezing import freeze
from prismer.model import Prismer
from prismer.training.checkpoint import OPTIMIZER
from prismer.training.export import export_checkpoint
from prismer.training.run_folder import RunFolder

STEPS = 12

# a launch takes ten seconds on an idle machine, and minutes on a busy one
pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="session")
def whole_run(workshop):
    """`deepspeed train.py` with one process, from start to end, in fp32."""
    run = workshop.launch("whole", "deepspeed 1", steps=STEPS, precision="fp32")
    assert run.end() == 0, run.text()
    return run


def test_a_finished_run_has_all_its_outputs(whole_run):
    folder = whole_run.folder
    for name in (
        "finished.json",
        "results.json",
        "results.md",
        "loss.png",
        "samples.png",
        "answers.json",
        "guesses.json",
        "train_config.json",
        "metrics.jsonl",
        "model/model.safetensors",
        "model/config.json",
        "model/vocab.json",
        "model/answers.json",
    ):
        assert (folder / name).is_file(), name
    assert list(folder.glob("tensorboard/events*"))
    assert sorted(whole_run.losses()) == list(range(1, STEPS + 1))
    results = json.loads((folder / "results.json").read_text())
    for column in ("trained model", "most frequent", "blank images"):
        assert {"CIDEr-D", "BLEU-4", "accuracy", "accuracy/count"} <= set(results[column])
    # the baseline sees no image and is still right at times: all columns score the same questions
    assert results["most frequent"]["accuracy"] > 0.1
    assert "trainable: " in whole_run.text() and "as asked" in whole_run.text()


def test_nothing_is_pickled(whole_run):
    suffixes = {path.suffix for path in whole_run.folder.rglob("*") if path.is_file()}
    assert not suffixes & {".pt", ".bin", ".pkl", ".pth"}


def test_only_trainable_parameters_change(workshop, whole_run):
    start = Prismer.from_pretrained(workshop.folder / "model")
    freeze(start, "freeze_lang_vision")
    last = RunFolder(whole_run.folder).last()
    trained = load_file(last / "model.safetensors")
    trainable = {name for name, parameter in start.named_parameters() if parameter.requires_grad}
    for name, parameter in start.named_parameters():
        assert (trained[name] == parameter).all().item() == (name not in trainable), name
    moments = load_file(last / OPTIMIZER)
    assert {name.rpartition(".")[0] for name in moments} == trainable
    assert all(moment.any() for name, moment in moments.items() if "position" not in name), "a moment is all zero"


def test_a_run_exports_its_best_checkpoint(workshop, whole_run, tmp_path):
    checkpoint = export_checkpoint(whole_run.folder, tmp_path / "model")
    assert checkpoint == RunFolder(whole_run.folder).best()
    exported, stored = (load_file(tmp_path / "model/model.safetensors"), load_file(checkpoint / "model.safetensors"))
    assert exported.keys() == stored.keys()
    assert all((exported[name] == stored[name]).all() for name in stored)
    model = Prismer.from_pretrained(tmp_path / "model")
    side = model.config.image_size
    grey = torch.full((1, 3, side, side), 118, dtype=torch.uint8)
    images = ImageBatch.without_labels(grey, model.config.experts, model.config.label_size)
    assert isinstance(model.caption(images)[0], str)
    assert {path.suffix for path in (tmp_path / "model").iterdir()} == {".safetensors", ".json", ".txt", ".md"}


def test_a_killed_run_resumes_exactly(workshop):
    """Runs in bf16, where the fp32 masters matter; steps after the last checkpoint run twice and must agree."""
    settings = dict(steps=500, precision="bf16", save_every=4, accumulation=2, decay_norms=False)
    run = workshop.launch("killed", "python", **settings)
    run.wait_for_step(7)
    run.process.kill()
    run.end()
    before, index = run.losses(), RunFolder(run.folder).index()
    resumed_at = json.loads((RunFolder(run.folder).last() / "trainer.json").read_text())["step"]
    assert index["last"] == f"step-{resumed_at:08d}" and 4 <= resumed_at < max(before)

    run = workshop.launch("killed", **settings)
    run.wait_for_step(max(before) + 1)
    # the folder is locked, also for a run with --fresh
    second = workshop.launch("killed", flags=("--fresh",), **settings)
    assert second.end() == 2, second.text()
    assert f"is in use by process {run.process.pid}" in second.text()
    # a terminal sends SIGHUP when it closes
    run.process.send_signal(signal.SIGHUP)
    assert run.end() == 128 + signal.SIGHUP, run.text()
    assert "Traceback" not in run.text()
    after = run.losses()
    assert f"at step {resumed_at} of 500" in run.text()
    assert {step: after[step] for step in before} == before
    # the last checkpoint is of the step at which the run stopped
    assert RunFolder(run.folder).last().name == f"step-{max(after):08d}"
    assert not (run.folder / "finished.json").exists()


def test_two_processes_stop_and_resume_as_one(workshop, whole_run):
    """Two processes have the losses of one, also with recomputed activations; SIGTERM to the launcher stops them.

    Then one process resumes the run and ends with the losses of the uninterrupted run.
    """
    settings = dict(steps=STEPS, precision="fp32", gradient_checkpointing=True)
    run = workshop.launch("pair", "deepspeed 2", **settings)
    run.wait_for_step(3)
    run.process.send_signal(signal.SIGTERM)
    assert run.end() != 0
    end = time.monotonic() + 120
    while run.ranks_alive() and time.monotonic() < end:
        time.sleep(0.1)
    assert not run.ranks_alive(), "ranks outlive their launcher"
    stopped_at = run.steps()
    assert 3 <= stopped_at < STEPS and not (run.folder / "finished.json").exists()
    last = RunFolder(run.folder).last()
    assert last.name == f"step-{stopped_at:08d}"
    assert json.loads((last / "trainer.json").read_text())["world_size"] == 2

    run = workshop.launch("pair", "torchrun 1", **settings)
    assert run.end() == 0, run.text()
    expected, found = whole_run.losses(), run.losses()
    # one rounding of these losses is 4e-6; batch norm per rank, or dropping a moment, shows as 1e-4 and more
    assert found == pytest.approx(expected, abs=4e-5)
    assert (run.folder / "finished.json").is_file()


def test_a_non_finite_loss_stops_the_run(workshop):
    """Both processes end, and one of them prints the reason."""
    run = workshop.launch(
        "diverged", "deepspeed 2", steps=20, precision="fp32", learning_rate=1e30, warmup_steps=0, gradient_clipping=0.0
    )
    assert run.end() == 2, run.text()
    assert run.text().count("not finite at step 2; the last checkpoint is of step 0") == 1
    assert "Traceback" not in run.text()
    assert RunFolder(run.folder).last() is None


def test_a_full_disk_stops_the_run(workshop):
    """The process that writes prints one sentence, nothing is left of the checkpoint, and the others do not hang.

    There is no launcher that would end them.
    """
    run = workshop.launch("full", "fork 2", largest_file=200_000, steps=20, precision="fp32")
    assert run.end() == 1, run.text()
    assert "model.safetensors cannot be written: File too large; free some space" in run.text()
    assert "Traceback" not in run.text()
    assert not list((run.folder / "checkpoints").iterdir())


def test_a_missing_dataset_ends_the_run_in_one_sentence(workshop):
    run = workshop.launch("refused", flags=("--data", "nowhere"), precision="fp32")
    assert run.end() == 2
    assert "no dataset at nowhere/train" in run.text() and "Traceback" not in run.text()
