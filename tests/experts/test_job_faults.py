"""Proves that a labelling job reports what it cannot use, as the importers do, and survives a full disk.

python -m pytest tests/experts/test_job_faults.py
"""

import errno
import io
import json
import os
import tarfile

import numpy as np
import pytest
from PIL import Image

from prismer.cli.main import main
from prismer.dataloading.experts.labeller import Labeller
from prismer.dataloading.store import writer as shard_writer
from prismer.dataloading.store.check import check_dataset
from prismer.dataloading.store.label_maps import pack_labels
from prismer.dataloading.store.shards import ShardDataset
from tests.experts.jobs import read_files, write_photos
from tests.experts.stand_ins import Brightness
from tests.experts.test_job import label


def broken_png() -> bytes:
    """Noise, of which one block in the middle is damaged."""
    rng = np.random.default_rng(0)
    file = io.BytesIO()
    Image.fromarray(rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(file, "PNG")
    data = bytearray(file.getvalue())
    data[len(data) // 2] ^= 255
    return bytes(data)


def test_a_damaged_block_is_refused_wherever_an_image_is_read(tmp_path, capsys):
    photos = write_photos(tmp_path / "photos", 2)
    (photos / "broken.png").write_bytes(broken_png())
    report = label(photos, tmp_path / "out")
    assert (report.labelled, [s["key"] for s in report.skipped]) == (2, ["broken"])
    labeller = Labeller([Brightness()], label_size=16)
    for image in (broken_png(), str(photos / "broken.png")):
        with pytest.raises(ValueError, match="cannot be labelled: the image cannot be decoded"):
            labeller([image])
    for command in (
        ["data", "import", "folder", str(photos), "--out", str(tmp_path / "imported")],
        ["label", str(photos), "--out", str(tmp_path / "labelled"), "--experts", "edge=gradient"],
    ):
        assert main(command) == 0
        assert "broken.png" in capsys.readouterr().err
    assert main(["show", str(photos / "broken.png"), "--experts", "edge=gradient", "--model", "none"]) == 2
    assert "broken.png cannot be shown: the image cannot be decoded" in capsys.readouterr().err


def test_files_that_are_not_images_are_reported_and_skipped(tmp_path):
    photos = write_photos(tmp_path / "photos", 3)
    os.mkfifo(photos / "pipe.jpg")
    (photos / "loop.jpg").symlink_to("loop.jpg")
    (photos / "up").symlink_to(photos, target_is_directory=True)
    os.mkfifo(photos / "photo-00002.txt")
    (photos / "photo-00001.json").write_text('{"caption": {"a cat": 1}}')
    (photos / "odd.xyz").write_text("")
    with open(os.fsencode(photos) + b"/\xff.jpg", "wb") as file:
        file.write(b"junk")
    report = label(photos, tmp_path / "out")
    assert (report.records, report.labelled) == (6, 1)
    assert len(report.skipped) == 5 and len(report.others) == 2
    saved = json.loads((tmp_path / "out/report.json").read_text("utf-8"))
    assert (saved["skipped"], saved["others"]) == (report.skipped, report.others)
    assert any(entry["image"].endswith(r"\udcff.jpg") for entry in report.skipped)
    assert check_dataset(tmp_path / "out", progress=False).ok
    again = label(photos, tmp_path / "out")
    assert again.skipped == report.skipped


@pytest.mark.parametrize(
    "meta",
    [
        {"captions": 5},
        {"captions": "abc"},
        {"captions": [None]},
        {"questions": [{}]},
        {"boxes": []},
        {"boxes": {"seg": 5}},
        {"class": []},
        [],
        None,
        {"captions": ["\ud800"]},
    ],
    ids=ascii,
)
def test_a_sample_with_wrong_types_is_skipped_and_reported(tmp_path, meta):
    photos = write_photos(tmp_path / "photos", 2)
    (tmp_path / "in").mkdir()
    with tarfile.open(tmp_path / "in/shard-000000.tar", "w") as tar:
        for i, notes in enumerate((meta, {"captions": ["a cube"]})):
            jpeg = (photos / f"photo-{i:05d}.jpg").read_bytes()
            for end, data in (("jpg", jpeg), ("json", json.dumps(notes).encode()), ("labels", pack_labels({}))):
                info = tarfile.TarInfo(f"k{i}.{end}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    report = label(tmp_path / "in", tmp_path / "out")
    assert (report.labelled, [s["key"] for s in report.skipped]) == (1, ["k0"])
    assert check_dataset(tmp_path / "out", progress=False).ok


@pytest.mark.parametrize("when", ["job", "tar", "sidecar", "folder", "index"])
def test_a_full_disk_leaves_whole_shards_and_the_job_resumes(tmp_path, monkeypatch, when):
    photos = write_photos(tmp_path / "photos", 9)
    out, whole = tmp_path / "out", tmp_path / "whole"
    label(photos, whole, per_shard=3)
    real, count = shard_writer.OpenShard._put, [0]

    def full(*args, **more):
        raise OSError(errno.ENOSPC, "No space left on device")

    def put(self, data):
        count[0] += 1
        if count[0] > 40:
            full()
        real(self, data)

    with monkeypatch.context() as patch:
        if when == "tar":
            patch.setattr(shard_writer.OpenShard, "_put", put)
        elif when == "sidecar":
            patch.setattr(shard_writer, "write_atomically", full)
        else:
            # each file is synced and then its folder: job.json; three times the costs, a tar and its sidecar; the costs
            # once more; then the index
            calls = []
            limit = {"job": 1, "folder": 2 + 3 * 6, "index": 2 + 3 * 6 + 2 + 1}[when]

            def sync(handle, fsync=os.fsync):
                calls.append(handle)
                if len(calls) >= limit:
                    full()
                fsync(handle)

            patch.setattr(os, "fsync", sync)
        with pytest.raises(OSError) as caught:
            label(photos, out, per_shard=3)
    assert caught.value.errno == errno.ENOSPC
    left = sorted(path.name for path in out.iterdir())
    assert not [name for name in left if name.endswith(".partial")]
    tars = {name[:12] for name in left if name.endswith(".tar")}
    assert tars == {name[:12] for name in left if name.startswith("shard") and name.endswith(".json")}
    assert label(photos, out, per_shard=3).labelled == 9
    assert read_files(out) == read_files(whole)
    assert len(ShardDataset(out)) == 9
