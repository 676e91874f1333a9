"""Proves that ImageNet imports from the layouts of its archive, with names, and some images of each class.

python -m pytest tests/data/test_imagenet.py
"""

import pytest

from prismer.dataloading.sources.imagenet import imagenet_records
from prismer.dataloading.store.shards import ShardDataset
from tests.data.import_sources import encode, gradient, run, write


@pytest.mark.parametrize("layout", ["", "ILSVRC/Data/CLS-LOC"])
def test_imagenet_takes_its_names_from_the_mapping_of_synsets(tmp_path, layout):
    lines = ["n1 tench, Tinca tinca", "n2 maillot", "n3 maillot, tank suit", "n9 absent"]
    write(tmp_path / "LOC_synset_mapping.txt", "\n".join(lines) + "\n")
    for name in ("n1", "n2", "n3"):
        for i in range(3):
            write(tmp_path / layout / "train" / name / f"{name}_{i}.JPEG", encode(gradient()))
    records = imagenet_records(tmp_path, "train", shots=2)
    samples, _ = run(records, tmp_path / "out")
    assert len(samples) == 6
    assert {sample.meta["class"] for sample in samples.values()} == {"tench", "maillot", "maillot, tank suit"}
    assert len(imagenet_records(tmp_path, "train")) == 9


def test_imagenet_without_its_folders_is_refused(tmp_path):
    with pytest.raises(ValueError, match="has no folder of a split; name it with --split"):
        imagenet_records(tmp_path, "")
    with pytest.raises(ValueError, match="has no folder val; name it with --split"):
        imagenet_records(tmp_path, "val")
    write(tmp_path / "val/ILSVRC2012_val_00000001.JPEG", encode(gradient()))
    with pytest.raises(
        ValueError, match="has no class folders; put LOC_val_solution.csv and LOC_synset_mapping.txt into"
    ):
        imagenet_records(tmp_path, "val")
    write(tmp_path / "val/n1/a.JPEG", encode(gradient()))
    write(tmp_path / "LOC_synset_mapping.txt", "n2 tench\n")
    with pytest.raises(ValueError, match="the mapping of ImageNet gives no name for n1"):
        imagenet_records(tmp_path, "val")


def test_validation_images_of_one_folder_take_their_classes_from_the_solution(tmp_path):
    folder = tmp_path / "ILSVRC/Data/CLS-LOC/val"
    rows = ["ImageId,PredictionString"]
    for i in range(4):
        write(folder / f"ILSVRC2012_val_{i:08d}.JPEG", encode(gradient(i)))
        rows.append(f"ILSVRC2012_val_{i:08d},n{i % 2 + 1} 1 2 3 4 n{i % 2 + 1} 5 6 7 8 ")
    write(tmp_path / "LOC_synset_mapping.txt", "n1 tench, Tinca tinca\nn2 goldfish\nn3 shark\n")
    write(tmp_path / "LOC_val_solution.csv", "\n".join([*rows[:4], "ILSVRC2012_val_00000009,n7 1 2 3 4"]))
    samples, report = run(imagenet_records(tmp_path, "val"), tmp_path / "out")
    assert {key: sample.meta["class"] for key, sample in samples.items()} == {
        "ILSVRC2012_val_00000000": "tench",
        "ILSVRC2012_val_00000001": "goldfish",
        "ILSVRC2012_val_00000002": "tench",
    }
    assert ShardDataset(tmp_path / "out").classes["class"] == ["tench", "goldfish", "shark"]
    assert "line 5 of" in report.skipped[0]["reason"]
    (other,) = report.others
    assert other["reason"] == "1 images that no list names, the first ILSVRC2012_val_00000003.JPEG"
    drawn = [record.meta["class"] for record in imagenet_records(tmp_path, "val", shots=1) if not record.fault]
    assert sorted(drawn) == ["goldfish", "tench"]
