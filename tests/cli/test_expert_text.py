"""Proves that the text of the experts reaches the model on every way that their maps take, and the settings that ask
for it.

pytest tests/cli/test_expert_text.py
"""

import dataclasses
import io
import json
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from prismer.cli import experts as show_command
from prismer.cli import plan as plan_command
from prismer.config import PrismerConfig, preset
from prismer.dataloading.experts.labeller import Labeller
from prismer.dataloading.feed.image_batch import ExpertLabels
from prismer.dataloading.store.shards import ShardDataset
from prismer.dataloading.views.expert_overview import draw_overview
from prismer.files import write_json
from prismer.model import Prismer
from prismer.training.config import TrainConfig
from prismer.training.engine_settings import read_config
from prismer.training.initial_model import build_initial_model, initial_config
from prismer.training.run_folder import RunFolder
from tests.cli.commands import assert_refused
from tests.experts.stand_ins import Brightness, Halves

BOTH = ("obj_detection", "ocr_detection")


@pytest.fixture(scope="module")
def reader(model, tmp_path_factory):
    """A model that reads no maps, only the text of objects and words."""
    folder = tmp_path_factory.mktemp("reader") / "model"
    small = Prismer.from_pretrained(model)
    Prismer(small.config.replace(experts=(), expert_text=BOTH), small.tokenizer).eval().save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def spoken(monkeypatch):
    """A caption is what the model reads as text."""

    def caption(self, images, labels=None, semantics=None, **_):
        batch = self._as_batch(images, labels, semantics)
        return [self.tokenizer.decode(ids).strip() or "nothing" for ids in batch.detections.ids]

    monkeypatch.setattr(Prismer, "caption", caption)


@pytest.fixture
def halves(monkeypatch):
    """--experts of any value loads a network that finds a thing in the left half of each image."""

    def load(*_, **given):
        return Labeller([Brightness(), Halves()], **given)

    monkeypatch.setattr(Labeller, "load", load)


def assert_names(said: str, dataset: ShardDataset, i: int) -> None:
    """A caption names all objects and words of a sample, each by its first letters, which are eight tokens."""
    meta = dataset[i].meta
    shown = {*meta["words"].values(), *(dataset.classes["obj_detection"][c] for c in meta["instances"].values())}
    assert len(set(said.split())) == len(shown)
    assert all(any(name.startswith(text) for name in shown) for text in said.split())


def test_labels_of_files_are_read_as_text(run, reader, scenes, tmp_path):
    dataset = ShardDataset(scenes / "train")
    key = dataset.key(1)
    run("data", "extract", scenes / "train", key, "--out", tmp_path)
    image, labels = tmp_path / f"{key}.jpg", tmp_path / f"{key}.labels"
    with_labels = run("caption", image, "--labels", labels, "--model", reader)
    assert with_labels.code == 0, with_labels.err
    assert_names(with_labels.out.partition(": ")[2], dataset, 1)
    assert run("caption", image, "--model", reader).out.strip().endswith("nothing")


def test_a_dataset_and_a_folder_of_labels_are_read_as_text(run, reader, scenes, tmp_path):
    dataset = ShardDataset(scenes / "val")
    done = run("caption", scenes / "val", "--out", tmp_path / "a.jsonl", "--model", reader)
    assert done.code == 0, done.err
    rows = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    for i, row in enumerate(rows):
        assert_names(row["caption"], dataset, i)
    folder = tmp_path / "images"
    run("data", "extract", scenes / "val", dataset.key(0), "--out", folder)
    done = run("caption", folder, "--labels", folder, "--out", tmp_path / "b.jsonl", "--model", reader)
    assert done.code == 0, done.err
    assert json.loads((tmp_path / "b.jsonl").read_text())["caption"] == rows[0]["caption"]


def test_an_evaluation_reads_text(run, reader, scenes, tmp_path):
    command = ("evaluate", "--model", reader, "--data", scenes, "--task", "caption")
    done = run(*command, "--out", tmp_path / "out")
    assert done.code == 0, done.err
    dataset = ShardDataset(scenes / "val")
    rows = [json.loads(line) for line in (tmp_path / "out" / "predictions.jsonl").read_text().splitlines()]
    assert_names(rows[1]["caption"], dataset, 1)


def test_experts_on_the_fly_are_read_as_text(run, reader, scenes, images, halves, tmp_path):
    said = run("caption", images[0], "--experts", "all", "--model", reader)
    assert said.code == 0, said.err
    assert said.out.strip().endswith((": dark th", ": bright"))
    done = run("caption", images[0].parent, "--experts", "all", "--out", tmp_path / "a.jsonl", "--model", reader)
    assert done.code == 0, done.err
    rows = [json.loads(line)["caption"] for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert len(rows) == 12 and set(rows) <= {"dark th", "bright"}
    command = ("evaluate", "--model", reader, "--data", scenes, "--task", "caption", "--experts", "all")
    done = run(*command, "--out", tmp_path / "out")
    assert done.code == 0, done.err
    rows = [json.loads(line) for line in (tmp_path / "out" / "predictions.jsonl").read_text().splitlines()]
    assert {row["caption"] for row in rows} <= {"dark th", "bright"}


def test_show_lists_what_is_read_as_text(run, reader, model, images, halves, tmp_path):
    done = run("show", images[0], "--model", reader, "--out", tmp_path / "slide.png")
    assert done.code == 0, done.err
    assert done.out.splitlines()[1] in ("read as text: dark thing 0.90", "read as text: bright thing 0.90")
    assert show_command._read_as_text(Prismer.from_pretrained(model), ExpertLabels({})) == []


def test_a_slide_has_a_line_for_the_text():
    file = io.BytesIO()
    Image.new("RGB", (200, 100), (250, 250, 250)).save(file, "JPEG")
    many = [f"thing {i}" for i in range(400)]
    for caption in ("A dog.", "A dog " * 30):
        with_texts, without = (
            np.asarray(
                Image.open(io.BytesIO(draw_overview(file.getvalue(), ExpertLabels({}), caption=caption, texts=texts)))
            ).astype(int)
            for texts in (many, [])
        )
        rows = np.abs(with_texts - without).max((1, 2)).nonzero()[0]
        # below the caption, and above the small print
        assert rows.min() > 745 and rows.max() < 842


def test_a_model_without_labels_refuses_them(run, model, images, tmp_path):
    bare = tmp_path / "bare"
    small = Prismer.from_pretrained(model)
    Prismer(small.config.replace(experts=()), small.tokenizer).eval().save_pretrained(bare)
    assert_refused(run("caption", images[0], "--experts", "all", "--model", bare), "has no experts and reads no labels")


def test_a_labelling_plan_counts_the_experts_that_are_read_as_text(run, reader, tmp_path):
    assert_refused(
        run("plan", "--label", reader, "--seconds-per-image", tmp_path / "none.json"), "none.json is missing"
    )
    assert PrismerConfig(experts=("depth",), expert_text=("ocr_detection",)).label_experts == ("depth", "ocr_detection")
    assert PrismerConfig(experts=("ocr_detection", "depth")).label_experts == ("depth", "ocr_detection")


def test_a_training_plan_is_for_the_text_that_is_asked_for(run, monkeypatch):
    jobs = []

    class Stub:
        """A plan without its figures, which take long."""

        def __init__(self, job):
            jobs.append(job)
            self.job, self.weights = job, SimpleNamespace(sizes=[1], trained=[1], bytes_each=4)

    monkeypatch.setattr("prismer.costs.plan.Plan", Stub)
    fits = ("a setup", SimpleNamespace(total=0), 2)
    for name, value in (("_rows", [fits]), ("_table", []), ("_costs", [])):
        monkeypatch.setattr(plan_command, name, lambda *_, value=value: value)
    flags = ("plan", "--model", "tiny", "--batch", 2)
    assert "; texts: " in (plain := run(*flags).out) and "detection tokens" not in plain
    assert "80 image tokens and 48 detection tokens; texts" in run(*flags, "--expert-text", "obj_detection").out
    assert [job.config.expert_text for job in jobs] == [preset("tiny").expert_text, ("obj_detection",)]
    assert_refused(run(*flags, "--expert-text", "depth"), "expert_text names depth; choose from obj_detection")


@pytest.mark.parametrize(
    ("given", "experts"),
    [
        ("", None),
        ("none", ()),
        ([], ()),
        ("obj_detection", ("obj_detection",)),
        ("ocr_detection, obj_detection", BOTH[::-1]),
        (["obj_detection", "ocr_detection"], BOTH),
        ("obj_detection,obj_detection", ("obj_detection",)),
    ],
)
def test_a_run_names_the_experts_that_are_read_as_text(given, experts):
    assert TrainConfig(expert_text=given).text_experts == experts


@pytest.mark.parametrize("given", ["depth", "obj_detection,", "obj_detection,none", ["words"], [1]])
def test_other_names_are_refused(given):
    with pytest.raises(ValueError, match="expert_text names .*; choose from obj_detection, ocr_detection, or none"):
        TrainConfig(expert_text=given)
    with pytest.raises(ValueError, match="expert_text is None; it must be str"):
        TrainConfig(expert_text=None)


def test_a_run_starts_with_the_text_that_it_asks_for(tmp_path):
    path = tmp_path / "zero3.json"
    path.write_text(json.dumps({"prismer": {"expert_text": list(BOTH)}}))
    config, _ = read_config(path)
    assert config.text_experts == BOTH
    config, _ = read_config(path, expert_text="obj_detection")
    assert config.text_experts == BOTH[:1]
    assert initial_config("base", BOTH) == preset("base", expert_text=BOTH)
    assert initial_config("base-z") == preset("base-z")
    assert build_initial_model("tiny", seed=1, expert_text=BOTH).config.expert_text == BOTH
    assert build_initial_model("tiny", seed=1).config.expert_text == preset("tiny").expert_text


def test_a_resumed_run_keeps_the_text(tmp_path):
    run, config = RunFolder(tmp_path / "run"), TrainConfig(run=str(tmp_path / "run"))
    run.reconcile_settings(config, lambda: "fp32")
    # a run that leaves it alone has the file that it had before there was this setting
    assert "expert_text" not in json.loads((run.path / "train_config.json").read_text())["settings"]
    (run.checkpoints / "step-00000005").mkdir(parents=True)
    write_json(run.checkpoints / "index.json", dict(last="step-00000005"))
    assert run.reconcile_settings(config, lambda: "fp32") == ("fp32", [])
    with pytest.raises(ValueError, match="was trained with expert_text '', not 'obj_detection'"):
        run.reconcile_settings(dataclasses.replace(config, expert_text="obj_detection"), lambda: "fp32")
