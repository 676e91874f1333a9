"""Proves that the check lists every problem of a damaged dataset by shard and key, and none of a whole one.

python -m pytest tests/data/test_check.py
"""

import hashlib
import io
import json
import os
import tarfile

import numpy as np
import pytest
from PIL import Image

from prismer.dataloading.store import check
from prismer.dataloading.store.check import Problem, check_dataset, sample_problems
from prismer.dataloading.store.shards import Sample, ShardWriter, make_table

CLASSES = {"seg": ["ground", "sky"], "obj_detection": ["cube", "cone"]}


def make_sample(i=0, **changes):
    file = io.BytesIO()
    Image.fromarray(np.full((6, 10, 3), 20 * i, np.uint8)).save(file, "JPEG")
    objects, words = np.full((4, 4), 255, np.uint8), np.full((4, 4), 255, np.uint8)
    objects[0, :2], words[1] = (0, 1), 0
    labels = {
        "depth": np.zeros((4, 4), np.uint8),
        "seg": np.array([[0, 1, 255, 1]] * 4, np.uint8),
        "obj_detection": objects,
        "ocr_detection": words,
    }
    meta = {
        "captions": ["a cube"],
        "questions": [{"question": "what?", "answers": [{"answer": "cube", "weight": 1.0}], "kind": "x"}],
        "instances": {"0": 1, "1": 0},
        "words": {"0": "stop"},
        "size": [6, 10],
    }
    meta |= changes.pop("meta", {})
    labels |= changes.pop("labels", {})
    return Sample(f"key{i}", changes.pop("jpeg", file.getvalue()), labels, meta)


def write_dataset(folder, samples, classes=CLASSES, samples_per_shard=3):
    with ShardWriter(folder, classes=classes, source="made up", samples_per_shard=samples_per_shard) as writer:
        for sample in samples:
            writer.write(sample)
    return folder


def found(folder):
    report = check_dataset(folder, progress=False, workers=2)
    assert report.ok == (not report.problems)
    assert len(report.lines()) == 2 + len(report.problems)
    return {(p.shard, p.key): p.text for p in report.problems}


def flip(folder, shard, member):
    path = folder / shard
    with tarfile.open(path) as tar:
        position = tar.getmember(member).offset_data + 5
    data = bytearray(path.read_bytes())
    data[position] ^= 4
    path.write_bytes(data)


def change_keys(folder, shard, keys):
    """Give the samples of a shard other keys, in its index file and in `index.json`."""
    sidecar = folder / f"{shard}.index.json"
    data = json.dumps(json.loads(sidecar.read_bytes()) | {"keys": keys}).encode()
    sidecar.write_bytes(data)
    index = json.loads((folder / "index.json").read_bytes())
    for entry in index["shards"]:
        if entry["name"] == f"{shard}.tar":
            entry["index_sha256"] = hashlib.sha256(data).hexdigest()
    (folder / "index.json").write_text(json.dumps(index))
    make_table(folder)


def test_a_whole_dataset_has_no_problems(tmp_path):
    report = check_dataset(write_dataset(tmp_path, [make_sample(i) for i in range(7)]), progress=False)
    assert report.ok and report.problems == [] and report.samples == 7
    assert report.counts["captions"] == report.counts["answers"] == report.counts["words"] == 7
    assert report.counts["objects"] == 14 and report.counts["depth maps"] == 7
    assert report.counts["edge maps"] == 0 and "edge" not in report.lines()[0]
    assert report.lines()[-1] == "no problems"
    assert report.lines()[0].startswith(f"{tmp_path}: 7 samples (7 captions, 7 questions")


def test_every_problem_is_listed_and_none_hides_another(tmp_path):
    samples = [make_sample(i) for i in range(9)]
    file = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(file, "JPEG")
    # the headers are whole, but the last pixels are missing
    samples[3] = make_sample(3, jpeg=file.getvalue()[:-400], meta={"size": [64, 64]})
    samples[4] = make_sample(4, meta={"captions": ["  ", "fine", ""], "words": {}}, jpeg=b"\xff\xd8nothing")
    write_dataset(tmp_path, samples)
    flip(tmp_path, "shard-000000.tar", "key0.jpg")
    flip(tmp_path, "shard-000000.tar", "key1.json")
    flip(tmp_path, "shard-000002.tar", "key8.labels")
    report = check_dataset(tmp_path, progress=False)
    lines = [(p.shard, p.key, p.text) for p in report.problems]
    expected = [
        ("shard-000000.tar", "", "the file fails its checksum"),
        ("shard-000000.tar", "key0", "its jpg fails the checksum"),
        ("shard-000000.tar", "key1", "its json fails the checksum"),
        ("shard-000001.tar", "key3", "the image does not decode"),
        ("shard-000001.tar", "key4", "the image is in no known format"),
        ("shard-000001.tar", "key4", "the ocr_detection map holds 1 ids"),
        ("shard-000001.tar", "key4", "caption 0 is '  '"),
        ("shard-000001.tar", "key4", "caption 2 is ''"),
        ("shard-000002.tar", "", "the file fails its checksum"),
        ("shard-000002.tar", "key8", "its labels fails the checksum"),
    ]
    assert [line[:2] for line in lines] == [line[:2] for line in expected]
    for line, wanted in zip(lines, expected, strict=True):
        assert line[2].startswith(wanted[2])
    assert report.lines()[-1] == "problems: 10"
    # samples 2, 5, 6 and 7 have no problem
    assert report.counts["captions"] == 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": {"seg": np.full((4, 4), 2, np.uint8)}}, "the seg map holds 1 ids .* 2 entries .*2 is the first"),
        ({"labels": {"seg": np.arange(4, dtype=np.uint8).reshape(2, 2)}}, "different sizes"),
        (
            {"labels": {n: np.full((4, 5), 0, np.uint8) for n in ("depth", "seg", "obj_detection", "ocr_detection")}},
            "the depth map is 4 x 5; store a square",
        ),
        ({"meta": {"instances": {"0": 1}}}, "the obj_detection map holds 1 ids .* 1 entries .*1 is the first"),
        ({"meta": {"instances": {"0": 1, "1": 2}}}, "object 1 is of class 2, the class table has 2 names"),
        ({"meta": {"instances": {"0": 1, "1": "cube"}}}, "object 1 is of class 'cube'"),
        ({"meta": {"words": {}}}, "the ocr_detection map holds 1 ids"),
        ({"meta": {"words": {"0": " "}}}, "word 0 is ' '"),
        ({"meta": {"captions": [3]}}, "caption 0 is 3"),
        ({"meta": {"captions": [""]}}, "caption 0 is ''"),
        ({"meta": {"questions": [{"question": "", "answers": []}]}}, "question 0 is ''"),
        ({"meta": {"questions": [{"question": "a?", "answers": [{"answer": "", "weight": 1}]}]}}, "the answer ''"),
        ({"meta": {"questions": [{"question": "a?", "answers": [{"answer": "b", "weight": -1}]}]}}, "weight -1"),
        ({"meta": {"questions": [{"question": "a?", "answers": 5}]}}, "has answers 5"),
        ({"meta": {"instances": [1, 0]}}, "a list of 2; expected an object"),
        ({"meta": {"captions": None}}, "captions is null"),
        ({"meta": {"size": [10, 6]}}, r"the image is \[6, 10\] \(height, width\), its json says \[10, 6\]"),
        ({"jpeg": b"\xff\xd8"}, "the image is in no known format"),
    ],
)
def test_problems_of_a_sample(tmp_path, changes, message):
    sample = make_sample(1, **changes)
    problems = found(write_dataset(tmp_path, [make_sample(0), sample, make_sample(2)]))
    assert list(problems) == [("shard-000000.tar", "key1")]
    listed = sample_problems(sample, CLASSES)
    with pytest.raises(AssertionError, match=message):
        raise AssertionError("\n".join(listed))


def test_a_grey_jpeg_is_named():
    file = io.BytesIO()
    Image.new("L", (10, 6)).save(file, "JPEG")
    assert sample_problems(make_sample(jpeg=file.getvalue()), CLASSES) == ["the image is JPEG L; expected an RGB JPEG"]


def test_a_question_needs_no_answers():
    sample = make_sample(meta={"questions": [{"question": "what?", "answers": []}]})
    assert sample_problems(sample, CLASSES) == []


def test_ids_need_class_tables(tmp_path):
    report = check_dataset(write_dataset(tmp_path, [make_sample()], classes={}), progress=False)
    texts = [problem.text for problem in report.problems]
    assert len(texts) == 3
    assert "the seg map holds 2 ids" in texts[0] and "its table of 0 entries" in texts[0]
    assert all("the class table has 0 names" in text for text in texts[1:])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "shard-000001.tar").unlink(), "cannot be read"),
        (lambda folder: (folder / "shard-000001.index.json").unlink(), "cannot be read"),
        (lambda folder: (folder / "shard-000001.index.json").write_text("{}"), "fails its checksum"),
    ],
    ids=["tar gone", "index gone", "index torn"],
)
def test_a_lost_file_is_one_line_and_the_rest_is_checked(tmp_path, damage, message):
    write_dataset(tmp_path, [make_sample(i) for i in range(8)] + [make_sample(8, meta={"captions": [""]})])
    damage(tmp_path)
    problems = found(tmp_path)
    assert list(problems) == [("shard-000001.tar", ""), ("shard-000002.tar", "key8")]
    assert message in problems["shard-000001.tar", ""]


def test_a_truncated_shard_is_named_with_its_lost_sample(tmp_path):
    write_dataset(tmp_path, [make_sample(i) for i in range(6)])
    path = tmp_path / "shard-000000.tar"
    with tarfile.open(path) as tar:
        offset = tar.getmember("key2.jpg").offset_data
    with open(path, "r+b") as file:
        file.truncate(offset + 10)
    problems = found(tmp_path)
    assert list(problems) == [("shard-000000.tar", ""), ("shard-000000.tar", "key2")]
    assert "bytes, the index says" in problems["shard-000000.tar", ""]
    assert "too early" in problems["shard-000000.tar", "key2"]


def test_damage_between_the_members_is_found(tmp_path):
    """A tar header belongs to no sample, but without it no other reader opens the shard."""
    write_dataset(tmp_path, [make_sample(i) for i in range(2)])
    path = tmp_path / "shard-000000.tar"
    data = bytearray(path.read_bytes())
    data[3] ^= 1
    path.write_bytes(data)
    assert found(tmp_path) == {("shard-000000.tar", ""): "the file fails its checksum; copy it again"}


def test_a_key_in_two_shards_is_named(tmp_path):
    """Two datasets were merged by hand: each shard is whole, but both hold one key."""
    first = write_dataset(tmp_path / "a", [make_sample(i) for i in (0, 1, 2)])
    second = write_dataset(tmp_path / "b", [make_sample(i) for i in (5, 5, 5, 6, 1, 8)][3:])
    index = json.loads((first / "index.json").read_bytes())
    entry = json.loads((second / "index.json").read_bytes())["shards"][0]
    sidecar = json.loads((second / "shard-000000.index.json").read_bytes())
    data = json.dumps(sidecar | {"shard": "shard-000001.tar"}).encode()
    (first / "shard-000001.index.json").write_bytes(data)
    os.rename(second / "shard-000000.tar", first / "shard-000001.tar")
    entry |= {"name": "shard-000001.tar", "index_sha256": hashlib.sha256(data).hexdigest()}
    index["shards"].append(entry)
    index["count"] += 3
    (first / "index.json").write_text(json.dumps(index))
    make_table(first)
    assert found(first) == {("shard-000001.tar", "key1"): "the key is also in shard-000000.tar; rename one"}


def test_a_key_is_repeated_within_a_shard_too(tmp_path):
    write_dataset(tmp_path, [make_sample(i) for i in range(6)])
    change_keys(tmp_path, "shard-000001", ["key3", "key1", "key3"])
    text = "the key is also in {}; rename one"
    assert found(tmp_path) == {
        ("shard-000001.tar", "key1"): text.format("shard-000000.tar"),
        ("shard-000001.tar", "key3"): text.format("shard-000001.tar"),
    }


def test_keys_that_share_a_hash_are_compared_themselves(tmp_path, monkeypatch):
    monkeypatch.setattr(check, "hash", len, raising=False)
    write_dataset(tmp_path, [make_sample(i) for i in range(6)])
    assert found(tmp_path) == {}
    change_keys(tmp_path, "shard-000001", ["key3", "key1", "key5"])
    assert list(found(tmp_path)) == [("shard-000001.tar", "key1")]


@pytest.mark.filterwarnings("ignore:index.bin of")
def test_a_table_that_differs_from_an_index_file_is_named(tmp_path):
    write_dataset(tmp_path, [make_sample(i) for i in range(6)])
    path = tmp_path / "index.bin"
    data = bytearray(path.read_bytes())
    data[20] ^= 1
    path.write_bytes(data)
    text = f"index.bin differs from its index file; give the command: prismer data index {tmp_path}"
    assert found(tmp_path) == {("shard-000000.tar", ""): text}


def test_the_samples_of_a_lost_index_file_are_checked_by_the_table(tmp_path):
    write_dataset(tmp_path, [make_sample(0), make_sample(1, meta={"captions": [""]})])
    (tmp_path / "shard-000000.index.json").unlink()
    problems = found(tmp_path)
    assert list(problems) == [("shard-000000.tar", ""), ("shard-000000.tar", "key1")]
    assert "shard-000000.index.json cannot be read" in problems["shard-000000.tar", ""]


def test_files_that_belong_to_no_shard_are_listed(tmp_path):
    write_dataset(tmp_path, [make_sample(i) for i in range(2)])
    for name in ("shard-000007.tar", "shard-000000.tar.partial", "notes.txt"):
        (tmp_path / name).write_bytes(b"x")
    report = check_dataset(tmp_path, progress=False)
    assert [str(p).split(" belongs")[0] for p in report.problems] == ["shard-000000.tar.partial", "shard-000007.tar"]


@pytest.mark.parametrize("content", [None, b"", b"{", b"{}", b'{"format": "prismer-shards", "version": 9}'])
def test_an_unusable_index_is_the_only_problem(tmp_path, content):
    write_dataset(tmp_path, [make_sample()])
    (tmp_path / "index.json").unlink()
    if content is not None:
        (tmp_path / "index.json").write_bytes(content)
    problems = found(tmp_path)
    assert list(problems) == [("", "")] and str(tmp_path) in problems["", ""]


def test_problems_read_as_lines():
    assert str(Problem("shard-000001.tar", "key5", "it is gone")) == "shard-000001.tar: key5: it is gone"
    assert str(Problem("", "", "it is gone")) == "it is gone"
