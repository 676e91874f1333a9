"""Proves that a run with renamed scenes is validated with seen and unseen names, in answers that the model writes.

python -m pytest tests/train/test_renaming.py
"""

from dataclasses import asdict
from types import SimpleNamespace

import pytest
import torch

from prismer.config import prismer_tiny
from prismer.dataloading.scenes.dataset import render_dataset
from prismer.dataloading.scenes.exact_labels import OBJECT_CLASSES
from prismer.dataloading.scenes.names import kind_names
from prismer.errors import InputError
from prismer.files import write_json
from prismer.model import Prismer
from prismer.shipped import shipped_folder
from prismer.tokenizer import Tokenizer
from prismer.training import data, evaluation
from prismer.training.checkpoint import STATE
from prismer.training.config import TrainConfig
from prismer.training.export import export_checkpoint
from prismer.training.run_folder import SETTINGS, RunFolder
from prismer.training.text_statistics import TextStatistics
from tests.train.conftest import small_config
from tests.train.test_evaluation import AlwaysRed, OneImage

RENAMED = TrainConfig(rename_kinds=True)
SCENES = SimpleNamespace(classes={"obj_detection": OBJECT_CLASSES}, place="scenes")
OTHERS = SimpleNamespace(classes={"obj_detection": ["dog"]}, place="others")


def test_scenes_are_validated_with_their_own_with_seen_and_with_unseen_names():
    seen, held_out = kind_names()
    assert data._validation_names(RENAMED, SCENES) == {"original": None, "seen": seen, "unseen": held_out}
    assert data._validation_names(RENAMED, OTHERS) == data._validation_names(TrainConfig(), SCENES) == {"": None}


def test_a_run_trains_on_seen_names_and_is_validated_on_all(tmp_path, monkeypatch):
    render_dataset(tmp_path, train=8, val=2, test=0, size=32, label_size=32, workers=1, progress=False)
    monkeypatch.setattr(data, "dist", SimpleNamespace(get_rank=lambda: 0, get_world_size=lambda: 1))
    tokenizer = Tokenizer.from_folder(shipped_folder("names"))
    model = Prismer(small_config(vocab_size=tokenizer.vocab_size), tokenizer)
    config = TrainConfig(data=str(tmp_path), rename_kinds=True, drop_labels=0.0, loader_threads=1)
    train, val = data.open_loaders(config, model, [], 4, torch.device("cpu"))
    seen, held_out = map(set, kind_names())
    for epoch in range(3):
        for batch in train.epoch(epoch):
            assert all(set(meta["scene"]["kinds"]) <= seen for meta in batch.meta)
    for name, names in (("original", None), ("seen", seen), ("unseen", held_out)):
        (batch,) = val[name].epoch(0)
        kinds = [set(meta["scene"].get("kinds", ())) for meta in batch.meta]
        assert all(not found if names is None else found and found <= names for found in kinds)
    train, val = data.open_loaders(TrainConfig(data=str(tmp_path), loader_threads=1), model, [], 4, torch.device("cpu"))
    assert all("kinds" not in meta["scene"] for batch in train.epoch(0) for meta in batch.meta) and set(val) == {""}


def test_a_run_that_has_nothing_to_rename_is_refused():
    model = SimpleNamespace(config=prismer_tiny())
    data._check_renaming(model, SCENES)
    with pytest.raises(InputError, match="renames the shapes of rendered scenes, and others has none"):
        data._check_renaming(model, OTHERS)
    for changes in (dict(experts=()), dict(experts=("depth",), expert_text=("ocr_detection",))):
        with pytest.raises(InputError, match="needs a model that reads seg or obj_detection"):
            data._check_renaming(SimpleNamespace(config=prismer_tiny(**changes)), SCENES)
    text = prismer_tiny(experts=(), expert_text=("obj_detection",))
    data._check_renaming(SimpleNamespace(config=text), SCENES)


@pytest.mark.parametrize("rename", [None, lambda *given: given[:2]])
def test_answers_about_renamed_scenes_are_generated(monkeypatch, rename):
    given = []

    class Model(AlwaysRed):
        @staticmethod
        def answer(images, questions, candidates, **options):
            given.append(candidates)
            return AlwaysRed.answer(images, questions, candidates)

    monkeypatch.setattr(evaluation.Candidates, "answers", lambda tokenizer, texts: texts)
    loader = OneImage([{"question": "a?", "answers": []}])
    loader.rename = rename
    evaluation.predict(Model, loader, task="vqa", statistics=TextStatistics(answers=["red"]))
    assert given == [["red"] if rename is None else None]


def test_a_resumed_run_renames_as_before(tmp_path):
    run = RunFolder(tmp_path / "run")
    run.reconcile_settings(RENAMED, lambda: "fp32")
    (run.checkpoints / "step-00000001").mkdir(parents=True)
    write_json(run.checkpoints / "index.json", dict(last="step-00000001"))
    assert run.reconcile_settings(RENAMED, lambda: "fp32") == ("fp32", [])
    with pytest.raises(InputError, match="was trained with rename_kinds True, not False"):
        run.reconcile_settings(TrainConfig(), lambda: "fp32")


@pytest.mark.parametrize("renamed", [False, True])
def test_a_model_of_renamed_scenes_is_exported_without_a_list_of_answers(tmp_path, renamed):
    tokenizer = Tokenizer.from_folder(shipped_folder("names"))
    checkpoint = tmp_path / "run" / "checkpoints" / "step-00000001"
    Prismer(small_config(vocab_size=tokenizer.vocab_size), tokenizer).save_pretrained(checkpoint)
    write_json(checkpoint / STATE, {"step": 1, "loss_sum": 0.0, "loss_count": 0})
    write_json(checkpoint.parent / "index.json", {"last": checkpoint.name})
    settings = asdict(TrainConfig(rename_kinds=renamed))
    write_json(tmp_path / "run" / SETTINGS, {"precision": "fp32", "settings": settings})
    TextStatistics(answers=["red", "cube"]).save(tmp_path / "run")
    export_checkpoint(tmp_path / "run", tmp_path / "model")
    assert (tmp_path / "model" / "answers.json").is_file() != renamed
