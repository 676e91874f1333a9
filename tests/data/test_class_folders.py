"""Proves that a folder with one sub-folder per class becomes a dataset for classification.

python -m pytest tests/data/test_class_folders.py
"""

import pytest

from prismer.dataloading.sources.class_folders import class_records
from prismer.dataloading.store.shards import ShardDataset
from tests.data.import_sources import encode, gradient, others_of, run, write


@pytest.mark.parametrize("form", ["names", "list", "indices", "none"])
def test_imagenet_folder(tmp_path, form):
    for folder in ("n01", "n02_x"):
        write(tmp_path / "val" / folder / "a.JPEG", encode(gradient()))
    write(tmp_path / "val/stray.jpg", encode(gradient()))
    classes = {
        "names": {"n01": "tench", "n02_x": "great white shark"},
        "list": ["tench", "great white shark"],
        "indices": {"n01": 1, "n02_x": 0},
        "none": None,
    }[form]
    classes = write(tmp_path / "c.json", classes) if classes else None
    names = write(tmp_path / "n.json", ["great white shark", "tench"]) if form == "indices" else None
    records = class_records(tmp_path / "val", classes=classes, names=names)
    samples, _ = run(records, tmp_path / "out")
    expected = ["n01", "n02 x"] if form == "none" else ["tench", "great white shark"]
    assert {key: sample.meta["class"] for key, sample in samples.items()} == dict(
        zip(["n01--a", "n02_x--a"], expected, strict=True)
    )
    assert ShardDataset(tmp_path / "out").classes["class"] == expected


def test_imagenet_folder_needs_all_names(tmp_path):
    write(tmp_path / "val/n01/a.jpg", encode(gradient()))
    write(tmp_path / "val/n02/a.jpg", encode(gradient()))
    for classes, message in (({"n01": "tench"}, "no name for n02"), (["tench"], "1 names for 2 folders")):
        with pytest.raises(ValueError, match=message):
            class_records(tmp_path / "val", classes=write(tmp_path / "c.json", classes))


def test_tool_folders_are_not_classes_and_deeper_images_belong_to_the_outermost_folder(tmp_path):
    for name in ("cat/a", "dog/b", "dog/more/c", ".ipynb_checkpoints/a", "@eaDir/a", "__MACOSX/a"):
        write(tmp_path / "in" / f"{name}.jpg", encode(gradient()))
    write(tmp_path / "in/loose.jpg", encode(gradient()))
    write(tmp_path / "in/cat/a.txt", "a text")
    samples, report = run(class_records(tmp_path / "in"), tmp_path / "out")
    assert {key: sample.meta["class"] for key, sample in samples.items()} == {
        "cat--a": "cat",
        "dog--b": "dog",
        "dog--more--c": "dog",
    }
    assert ShardDataset(tmp_path / "out").classes["class"] == ["cat", "dog"]
    named = others_of(report, tmp_path / "in")
    assert named.pop("cat/a.txt").startswith("the first of 1 texts")
    assert named.pop("loose.jpg") == "it lies in no class folder"
    assert set(named) == {".ipynb_checkpoints", "@eaDir", "__MACOSX"}


def test_folders_that_share_a_class_name_cause_a_warning(tmp_path):
    for name in ("n1/a.jpg", "n2/b.jpg", "n3/c.jpg"):
        write(tmp_path / "in" / name, encode(gradient()))
    classes = write(tmp_path / "c.json", {"n1": "crane", "n2": "crane", "n3": "cat"})
    with pytest.warns(UserWarning, match=r"2 folders .* n1 \(crane\), n2 \(crane\)"):
        records = class_records(tmp_path / "in", classes=classes)
    assert records.class_names == ["crane", "cat"]


@pytest.mark.parametrize(
    ("classes", "names", "message"),
    [
        ({"n1": 0, "n2": 1}, {"0": ["n01440764", "tench"], "1": ["n01443537", "goldfish"]}, "not a list of class"),
        ({"n1": 0, "n2": 1}, [["n01440764", "tench"], ["n01443537", "goldfish"]], "not a list of class"),
        ({"n1": 0, "n2": 1}, [0, 1], "not a list of class"),
        ({"n1": 0, "n2": 1}, ["tench", ""], "not a list of class"),
        ({"0": ["n1", "tench"], "1": ["n2", "goldfish"]}, None, "no name for n1"),
        ({"n1": True, "n2": 0}, ["tench", "goldfish"], "no name for n1"),
        ({"n1": 1.0, "n2": 0}, ["tench", "goldfish"], "no name for n1"),
        ({"n1": -1, "n2": 0}, ["tench", "goldfish"], "no name for n1"),
        ({"n1": [0], "n2": 0}, ["tench", "goldfish"], "no name for n1"),
        ({"n1": 0, "n2": 1}, None, "names with --names"),
        ([0, 1], None, "names with --names"),
        ([["tench"], ["goldfish"]], None, "no name for n1"),
        ("5", None, "holds one int"),
        ('"tench"', None, "holds one str"),
        ('{"n1": "a", "n1": "b", "n2": "c"}', None, "'n1' twice"),
    ],
)
def test_a_class_table_of_another_schema_is_refused(tmp_path, classes, names, message):
    for name in ("n1/a.jpg", "n2/b.jpg"):
        write(tmp_path / "in" / name, encode(gradient()))
    classes = write(tmp_path / "c.json", classes)
    names = None if names is None else write(tmp_path / "n.json", names)
    with pytest.raises(ValueError, match=message):
        class_records(tmp_path / "in", classes=classes, names=names)


def shots(folder, **options):
    """Class -> images that a draw takes."""
    found = {}
    for record in class_records(folder, **options):
        found.setdefault(record.meta["class"], set()).add(record.image.path.name)
    return found


def test_shots_are_drawn_of_each_class_whatever_the_order_of_the_files(tmp_path):
    names = [f"{kind}/{i:02d}.jpg" for kind in ("cat", "dog", "owl") for i in range(20 if kind != "owl" else 3)]
    for number, order in enumerate((names, names[::-1])):
        for name in order:
            write(tmp_path / str(number) / name, encode(gradient(number)))
    one, two = (shots(tmp_path / str(n), shots=4, seed=0) for n in (0, 1))
    assert one == two and {kind: len(found) for kind, found in one.items()} == {"cat": 4, "dog": 4, "owl": 3}
    assert shots(tmp_path / "0", shots=4, seed=1) != one, "a seed is a draw of its own"
    assert all(shots(tmp_path / "0", shots=3, seed=0)[kind] <= found for kind, found in one.items())
    # fixed, because a published number names its draw
    assert one["cat"] == {"00.jpg", "05.jpg", "06.jpg", "15.jpg"}
    records = class_records(tmp_path / "0", shots=4)
    assert len(records) == 11 == len(list(records))
    assert [other.reason for other in records.others] == [
        "4 images of each class were drawn with seed 0; 32 images are left out",
        "1 classes have fewer than 4 images, the first owl with 3",
    ]


def test_shots_have_to_be_positive(tmp_path):
    with pytest.raises(ValueError, match="shots is 0; it must be at least 1"):
        class_records(tmp_path, shots=0)
