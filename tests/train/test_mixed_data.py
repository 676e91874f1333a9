"""Proves that a run on several datasets trains on their mixture and scores each validation split by itself.

python -m pytest tests/train/test_mixed_data.py
"""

import json
from types import SimpleNamespace

import pytest
from matplotlib.axes import Axes

from prismer.dataloading.mixture.dataset import MixedDataset
from prismer.dataloading.store.shards import Sample, ShardDataset, ShardWriter
from prismer.errors import InputError
from prismer.reading import read_json
from prismer.training.config import TrainConfig
from prismer.training.data import _statistics
from prismer.training.evaluation import checkpoint_score
from prismer.training.export import _card
from prismer.training.progress import plot_metrics, read_metrics
from prismer.training.results import COLUMNS, write_results
from prismer.training.run_folder import RunFolder
from prismer.training.text_statistics import TextCounts, TextStatistics, count_texts
from tests.train.test_run_folder import put

pytestmark = pytest.mark.timeout(300)


def test_a_list_and_an_order_are_settings():
    config = TrainConfig(data=["a", "b:0.25"], order="blocks")
    assert config.data == "a,b:0.25" and [part.name for part in config.parts] == ["a", "b"]
    for given, message in (
        (dict(order="sorted"), "order is 'sorted'; choose from auto, random, blocks"),
        (dict(data=[]), "data is empty"),
        (dict(data=["a", 3]), "data holds 3; it must be a list of texts"),
        (dict(data="a,b:2"), "the weights add up to 2, which leaves nothing for a"),
    ):
        with pytest.raises(ValueError, match=message):
            TrainConfig(**given)


def test_a_run_keeps_its_order_and_names_it_only_if_it_was_chosen(tmp_path):
    """A run that leaves the order alone has the settings of earlier versions."""
    for order, stored in (("auto", False), ("blocks", True)):
        run, config = RunFolder(tmp_path / order), TrainConfig(order=order)
        run.reconcile_settings(config, lambda: "fp32")
        assert ("order" in read_json(run.path / "train_config.json")["settings"]) == stored
        put(run, 1)
        assert run.reconcile_settings(config, lambda: "fp32") == ("fp32", [])
        assert ("order" in read_json(run.path / "train_config.json")["settings"]) == stored
        with pytest.raises(InputError, match=f"was trained with order '{order}', not 'random'"):
            run.reconcile_settings(TrainConfig(order="random"), lambda: "fp32")


def test_checkpoints_are_compared_by_the_mean_of_the_splits():
    assert checkpoint_score([{"score": 0.25}, {"BLEU-1": 1.0}, {"score": 0.75}]) == 0.5
    assert checkpoint_score([{"score": 0.1}]) == 0.1 and checkpoint_score([{}]) is None


def test_classes_that_a_dataset_names_in_its_samples_are_ranked_too(tmp_path):
    for name, tables, given in (("a", {"class": ["dog", "cat"]}, [0, 1]), ("b", {}, ["cow", "cat"])):
        with ShardWriter(tmp_path / name, classes=tables, source="test") as writer:
            for i, one in enumerate(given):
                writer.write(Sample(f"s{i}", b"\xff\xd8", {}, {"class": one}))
    mixture = MixedDataset([ShardDataset(tmp_path / name) for name in "ab"], ["a", "b"])
    counts = TextCounts()
    for part in mixture.parts:
        counts.add(count_texts(part))
    model = SimpleNamespace(config=SimpleNamespace(max_positions=9), tokenizer=None)
    assert _statistics(TrainConfig(), model, mixture, counts).classes == ["dog", "cat", "cow"]


def test_every_dataset_has_its_curves(tmp_path, monkeypatch):
    rows = [dict(step=step, kind="train", loss=1.0 / step, learning_rate=1e-3) for step in (1, 2)]
    rows.append({"step": 2, "kind": "validation/a", "accuracy": 0.5, "accuracy/count": 0.5, "score": 0.5})
    rows.append({"step": 2, "kind": "validation/b/c", "CIDEr-D": 1.0, "accuracy": 0.25, "score": 0.2})
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    drawn, plot = [], Axes.plot
    monkeypatch.setattr(Axes, "plot", lambda *args, **options: drawn.append(options["label"]) or plot(*args, **options))
    plot_metrics(tmp_path)
    assert drawn[3:] == ["b/c: CIDEr-D", "a: accuracy", "a: count", "b/c: accuracy"]


def test_the_results_of_one_dataset_bear_no_name(tmp_path):
    columns = [{"accuracy": 0.5, "score": 0.5}] * 3
    table = write_results(tmp_path, {"": (columns, 8)}, dict(steps=4))
    assert table.startswith("| validation, 8 images | trained model | most frequent | blank images |\n")
    expected = dict(steps=4, images=8, **dict(zip(COLUMNS, columns, strict=True)))
    assert json.loads((tmp_path / "results.json").read_text()) == expected
    assert (tmp_path / "results.md").read_text().startswith(table + "\nCIDEr-D is at most 10.")


@pytest.fixture(scope="module")
def datasets(workshop):
    """The workshop's scenes as two datasets of other class numbers, of which one has a broken sample."""
    for name in ("town", "field"):
        for split in ("train", "val"):
            source = ShardDataset(workshop.folder / "data" / split)
            tables = {table: names[::-1] if name == "field" else names for table, names in source.classes.items()}
            last = {table: len(names) - 1 for table, names in tables.items()}
            with ShardWriter(workshop.folder / name / split, classes=tables, source="test") as writer:
                for i in range(len(source) // 2):
                    sample = source[i]
                    meta, labels = dict(sample.meta), dict(sample.labels)
                    if name == "field":
                        seg = labels["seg"].copy()
                        seg[seg != 255] = last["seg"] - seg[seg != 255]
                        labels["seg"] = seg
                        objects = meta["instances"].items()
                        meta["instances"] = {n: last["obj_detection"] - index for n, index in objects}
                        answer = [{"answer": "field only", "weight": 9.0}]
                        meta["questions"] = [{"question": "where?", "kind": "place", "answers": answer}]
                    jpeg = b"\xff\xd8broken" if (name, split, i) == ("town", "train", 3) else sample.jpeg
                    writer.write(Sample(sample.key, jpeg, labels, meta))
    return f"{workshop.folder / 'town'},{workshop.folder / 'field'}:0.25"


@pytest.mark.slow
def test_a_run_on_two_datasets(workshop, datasets):
    """32 samples of the first are 75 %, so an epoch is 48 samples, or 3 batches of 16."""
    run = workshop.launch(
        "mixed", data=datasets, task="vqa", epochs=1, batch_size=16, eval_every=3, save_every=3, precision="fp32"
    )
    assert run.end() == 0, run.text()
    assert "an epoch is 48 samples: town 75.0% (1.12 passes), field 25.0% (0.38 passes)" in run.text()
    assert sorted(run.losses()) == [1, 2, 3]
    # the answers of both, and names alone tell the classes of the two apart
    statistics = TextStatistics.load(run.folder)
    assert statistics.answers[0] == "field only" and len(statistics.answers) > 2
    assert "place" in statistics.guesses and "count" in statistics.guesses

    rows = read_metrics(run.folder)
    assert [row["kind"] for row in rows if row["kind"].startswith("val")] == ["validation/town", "validation/field"]
    skipped = {(row["split"], row["shard"], row["key"]) for row in rows if row["kind"] == "skipped"}
    broken = ShardDataset(workshop.folder / "town" / "train").key(3)
    assert skipped == {("train", "town/shard-000000.tar", broken)}
    assert "step 3, town: " in run.text() and "step 3, field: " in run.text()

    results = json.loads((run.folder / "results.json").read_text())
    assert list(results["datasets"]) == ["town", "field"] and "images" not in results
    for found in results["datasets"].values():
        assert found["images"] == 4 and set(COLUMNS) < set(found)
    text = (run.folder / "results.md").read_text()
    assert "| validation of town, 4 images |" in text and "| validation of field, 4 images |" in text
    assert (run.folder / "samples-town.png").is_file() and (run.folder / "samples-field.png").is_file()
    assert "results.md, loss.png, samples-town.png, samples-field.png" in run.text()

    settings = read_json(run.folder / "train_config.json")["settings"]
    card = _card(run.folder, RunFolder(run.folder).last(), settings)
    assert card.training[0].startswith("Trained on the datasets town, field, task vqa")
    assert {"town: accuracy", "field: accuracy"} <= set(card.scores)
    assert card.scored_on == "the validation split of town, field"
