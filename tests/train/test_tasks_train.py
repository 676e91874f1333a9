"""Proves that every task trains from start to end and is scored by its own metrics.

python -m pytest tests/train/test_tasks_train.py
"""

import json

import pytest

from prismer.dataloading.scenes.captions_and_questions import ATTRIBUTES
from prismer.dataloading.store.shards import Sample, ShardDataset, ShardWriter

pytestmark = pytest.mark.timeout(900)

SCORES = {
    "pretrain": {"BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "ROUGE-L", "CIDEr-D"},
    "caption": {"BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "ROUGE-L", "CIDEr-D"},
    "vqa": {"accuracy"},
    "classify": {"top-1", "top-5"},
}
FREEZE = {
    "pretrain": "freeze_lang_vision",
    "caption": "freeze_vision",
    "vqa": "freeze_vision",
    "classify": "freeze_vision",
}


@pytest.fixture(scope="module")
def classes_data(workshop):
    """The workshop's scenes, each with the shape of its first object as its class."""
    folder = workshop.folder / "classes"
    names = ATTRIBUTES["shape"]
    for split in ("train", "val"):
        source = ShardDataset(workshop.folder / "data" / split)
        tables = {**source.classes, "class": names}
        with ShardWriter(folder / split, classes=tables, source="test") as writer:
            for i in range(len(source)):
                sample = source[i]
                meta = {key: sample.meta[key] for key in ("instances", "words", "size", "source", "licence")}
                meta["class"] = names.index(sample.meta["scene"]["objects"][0]["shape"])
                writer.write(Sample(sample.key, sample.jpeg, sample.labels, meta))
    return folder


# the joint task, which other tests train, has the texts of the other two
@pytest.mark.parametrize("tasks", (("pretrain", "classify"), pytest.param(("caption", "vqa"), marks=pytest.mark.long)))
def test_every_task_trains(workshop, classes_data, tasks):
    """The runs are parallel, each on one thread."""
    runs = {}
    for task in tasks:
        data = classes_data if task == "classify" else workshop.folder / "data"
        runs[task] = workshop.launch(
            f"task-{task}",
            task=task,
            steps=4,
            data=str(data),
            precision="fp32",
            flip=0.5,
            crop_min_area=0.5,
            augment_ops=2,
        )
    for task, run in runs.items():
        assert run.end() == 0, f"{task}:\n{run.text()}"
        results = json.loads((run.folder / "results.json").read_text())
        found = {name for name in results["trained model"] if name != "score" and "/" not in name}
        assert found == SCORES[task], task
        assert sorted(run.losses()) == [1, 2, 3, 4]
        assert json.loads((run.folder / "train_config.json").read_text())["settings"]["freeze"] == FREEZE[task]
