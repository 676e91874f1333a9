"""Proves that Parquet files and hub datasets import: with the package `datasets` where it is installed, and with a
stand-in that has the same functions everywhere.

python -m pytest tests/data/test_table_rows.py
"""

import builtins
import importlib.util
import itertools
import sys
import types

import pytest

from prismer.dataloading.sources import table_rows
from prismer.dataloading.sources.importer import import_records
from prismer.dataloading.sources.table_rows import table_records
from prismer.dataloading.store.check import check_dataset
from prismer.dataloading.store.shards import ShardDataset
from prismer.errors import MachineError
from tests.data.import_sources import encode, gradient, load, write

HAS_DATASETS = importlib.util.find_spec("datasets") is not None and importlib.util.find_spec("pyarrow") is not None


class Image:
    def __init__(self, decode=True):
        self.decode = decode


class ClassLabel:
    dtype = "int64"

    def __init__(self, names):
        self.names = names


class Value:
    def __init__(self, dtype):
        self.dtype = dtype


class Table:
    """A stand-in for IterableDataset: rows, their features, and images that are decoded unless cast."""

    def __init__(self, rows, features=None, splits=None):
        self.rows, self.features, self.column_names = rows, features, None
        self.info = types.SimpleNamespace(splits=splits)

    def cast_column(self, name, feature):
        return Table(self.rows, {**self.features, name: feature}, self.info.splits)

    def __iter__(self):
        for row in self.rows:
            if isinstance(row, Exception):
                raise row
            decoded = [name for name, f in (self.features or {}).items() if isinstance(f, Image) and f.decode]
            assert not decoded, "an image was decoded"
            yield row


@pytest.fixture
def hub(monkeypatch):
    """Installs the stand-in; returns its tables by name, and the calls that opened them."""
    tables, calls = {}, []

    def load_dataset(name, config=None, *, split=None, streaming=False, data_files=None):
        calls.append(dict(name=name, config=config, split=split, streaming=streaming, data_files=data_files))
        if name not in tables:
            raise FileNotFoundError(f"Dataset '{name}' doesn't exist on the Hub\nsecond line")
        return tables[name]

    fake = types.ModuleType("datasets")
    fake.Image, fake.ClassLabel, fake.load_dataset = Image, ClassLabel, load_dataset
    monkeypatch.setitem(sys.modules, "datasets", fake)
    return tables, calls


def run(records, out):
    report = import_records(records, out, source="test", progress=False, label_size=8, workers=2)
    assert report.records == report.imported + len(report.skipped)
    assert check_dataset(out, progress=False).lines()[-1] == "no problems"
    return load(out), report


JPEG = encode(gradient())


def test_captions_of_a_hub_dataset(hub, tmp_path):
    tables, calls = hub
    features = {"image": Image(), "sentids": None, "captions": None, "cocoid": Value("int64"), "domain": None}
    rows = [
        {"image": {"bytes": JPEG, "path": None}, "captions": ["A\ncat.", " "], "cocoid": 7, "domain": "in-domain"},
        {"image": {"bytes": encode(gradient(mode="L"), "PNG"), "path": "a.png"}, "captions": ["dog"], "cocoid": 8},
        {"image": None, "captions": ["no image"], "cocoid": 9},
        {"image": {"bytes": b"broken", "path": None}, "captions": ["broken"], "cocoid": 10},
    ]
    tables["who/what"] = Table(rows, features, {"val": types.SimpleNamespace(num_examples=4)})
    records = table_records("who/what", split="val", config="en")
    assert len(records) == 4
    samples, report = run(records, tmp_path / "out")
    assert calls == [dict(name="who/what", config="en", split="val", streaming=True, data_files=None)]
    one, two = samples["000000000"].meta, samples["000000001"].meta
    assert (one["captions"], one["image_id"], one["domain"]) == (["A cat."], 7, "in-domain")
    assert two["captions"] == ["dog"] and "domain" not in two and samples["000000000"].jpeg == JPEG
    assert "row 2 of who/what has null as its image" in report.skipped[0]["reason"]
    assert report.skipped[1]["image"] == "row 3 of who/what" and report.formats["greyscale PNG"]["count"] == 1
    assert any("captions have no words" in other["reason"] for other in report.others)


@pytest.mark.parametrize(
    "answers, raw",
    [
        (["red", "red", "blue", ""], ["red", "red", "blue", ""]),
        ([{"answer": "red", "answer_id": 1}, {"answer": 2, "answer_id": 2}], ["red", "2"]),
        ({"answer": ["red", "red"], "answer_id": [1, 2]}, ["red", "red"]),
        ("red", None),
        (None, None),
    ],
)
def test_questions_and_answers_of_a_row(hub, tmp_path, answers, raw):
    tables, _ = hub
    row = {"image": JPEG, "question": "What colour?", "answers": answers, "question_id": 5, "question_type": "what"}
    tables["parquet"] = Table([{**row, "answer_type": "other", "label": 3}])
    samples, _ = run(table_records(["a.parquet"]), tmp_path / "out")
    (question,) = samples["000000000"].meta["questions"]
    assert (question["question_id"], question["question_type"], question["answer_type"]) == (5, "what", "other")
    assert question.get("raw_answers") == raw and "class" not in samples["000000000"].meta
    if raw:
        assert question["answers"][0] == {"answer": "red", "weight": round(raw.count("red") / len(raw), 6)}
        assert "" not in [answer["answer"] for answer in question["answers"]]


def test_classes_have_the_names_of_their_column(hub, tmp_path):
    tables, _ = hub
    features = {"img": Image(), "fine": ClassLabel(["cat", "dog"])}
    rows = [{"img": {"bytes": JPEG, "path": None}, "fine": value} for value in (1, 0, 5)]
    tables["cifar"] = Table(rows, features)
    samples, report = run(table_records("cifar"), tmp_path / "out")
    assert [sample.meta["class"] for sample in samples.values()] == ["dog", "cat"]
    assert ShardDataset(tmp_path / "out").classes["class"] == ["cat", "dog"]
    assert "row 2 of cifar has the class 5; expected a name" in report.skipped[0]["reason"]


def test_columns_can_be_named_and_rows_limited(hub, tmp_path):
    tables, calls = hub
    rows = [{"x": JPEG, "TEXT": f"text {i}", "text": "other"} for i in range(5)]
    tables["parquet"] = Table(rows)
    records = table_records(["a.parquet", "b.parquet"], columns={"image": "x", "captions": "TEXT"}, limit=2)
    samples, _ = run(records, tmp_path / "out")
    assert [sample.meta["captions"] for sample in samples.values()] == [["text 0"], ["text 1"]]
    assert calls[0]["data_files"] == ["a.parquet", "b.parquet"] and calls[0]["split"] == "train"


def test_an_import_that_breaks_off_is_resumed(hub, tmp_path):
    tables, _ = hub
    rows = [{"image": JPEG, "caption": f"text {i}"} for i in range(5)]
    tables["a/b"] = Table([*rows[:4], OSError("the connection was lost")])
    settings = dict(source="test", progress=False, samples_per_shard=2, workers=1)
    with pytest.raises(
        ValueError, match="a/b ends at row 4 .the connection was lost.; run the command again to resume"
    ):
        import_records(table_records("a/b"), tmp_path / "out", **settings)
    tables["a/b"] = Table(rows)
    report = import_records(table_records("a/b"), tmp_path / "out", **settings)
    assert report.imported == 5 and len(ShardDataset(tmp_path / "out")) == 5


def test_bad_input_gets_one_sentence(hub):
    tables, _ = hub
    tables["a/b"] = Table([{"image": JPEG, "x": "y"}])
    tables["a/c"] = Table([{"x": "y"}])
    with pytest.raises(ValueError, match=r"^none cannot be opened .Dataset 'none' doesn't exist on the Hub.; check"):
        table_records("none")
    with pytest.raises(ValueError, match="a/c has the columns x; name that of the images, --columns image=NAME"):
        table_records("a/c")
    with pytest.raises(ValueError, match="a/b has no column z; its columns are image, x"):
        table_records("a/b", columns={"captions": "z"})
    with pytest.raises(ValueError, match="--columns caption=x is not known; a column holds one of image, captions"):
        table_records("a/b", columns={"caption": "x"})


def test_without_the_package_the_extra_is_named(monkeypatch):
    importer = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name == "datasets":
            raise ImportError(name)
        return importer(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(MachineError, match=r"need the package datasets; run pip install 'prismer-vlm\[hub-data\]'"):
        table_records("a/b")


@pytest.mark.skipif(not HAS_DATASETS, reason="the package datasets is not installed")
@pytest.mark.parametrize("form", ["bytes", "struct", "feature"])
def test_parquet_files_are_read_by_datasets_itself(tmp_path, form):
    import datasets
    import pyarrow
    import pyarrow.parquet

    values = [encode(gradient(i)) for i in range(3)]
    rows = [data if form == "bytes" else {"bytes": data, "path": f"{i}.jpg"} for i, data in enumerate(values)]
    columns = {"image": rows, "caption": [f"text {i}" for i in range(3)], "label": [0, 1, 1]}
    file = tmp_path / "a.parquet"
    if form == "feature":
        label = datasets.ClassLabel(names=["cat", "dog"])
        kinds = {"image": datasets.Image(), "caption": datasets.Value("string"), "label": label}
        # what Dataset.to_parquet writes
        table = pyarrow.table(columns, datasets.Features(kinds).arrow_schema)
    else:
        table = pyarrow.table(columns)
    pyarrow.parquet.write_table(table, file)
    samples, report = run(table_records([file]), tmp_path / "out")
    assert [sample.jpeg for sample in samples.values()] == values and not report.re_encoded
    assert [sample.meta["captions"] for sample in samples.values()] == [["text 0"], ["text 1"], ["text 2"]]
    classes = [sample.meta.get("class") for sample in samples.values()]
    assert classes == (["cat", "dog", "dog"] if form == "feature" else [None] * 3)
    with pytest.raises(ValueError, match="cannot be opened"):
        table_records([write(tmp_path / "b.parquet", "not a table")])


def test_every_guess_is_a_known_column():
    names = list(itertools.chain.from_iterable(table_rows.COLUMNS.values()))
    assert len(names) == len(set(names)), "a column can hold only one thing"
