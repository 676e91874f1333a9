"""Proves that an import job skips and names bad images, resumes after a kill, and writes the same bytes each time.

python -m pytest tests/data/test_importer.py
"""

import os
import signal
import time

import pytest

from prismer.dataloading.sources import importer
from prismer.dataloading.sources.coco_captions import caption_records
from prismer.dataloading.sources.image_folders import folder_records
from prismer.dataloading.sources.importer import import_records
from prismer.dataloading.sources.records import safe_key
from prismer.dataloading.sources.webdataset_tars import tar_records
from prismer.dataloading.store.shards import ShardWriter
from tests.data.import_sources import encode, gradient, make_folder, run, write


def test_wrong_folders_are_refused(tmp_path):
    lists = write(tmp_path / "l.json", [{"image": "a.jpg"}])
    with pytest.raises(ValueError, match="not a folder"):
        caption_records(lists, tmp_path / "nowhere")
    with pytest.raises(ValueError, match="no folder of any expert"):
        caption_records(lists, tmp_path, labels=tmp_path)
    with pytest.raises(ValueError, match="not a folder"):
        folder_records(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"no \.tar files"):
        tar_records(tmp_path)
    with pytest.raises(ValueError, match="class tables"):
        import_records(folder_records(tmp_path), tmp_path / "out", source="", class_tables=lists)


def test_corrupt_images_are_skipped_counted_and_named(tmp_path):
    records = make_folder(tmp_path / "in", 12, corrupt=(0, 5, 11))
    (tmp_path / "in/00000/003.jpg").rename(tmp_path / "in/00000/003.png")
    write(tmp_path / "in/00000/003.jpg", encode(gradient()))
    samples, report = run(folder_records(tmp_path / "in"), tmp_path / "out", samples_per_shard=4)
    assert len(samples) == 9 and len(records) == 12
    reasons = {skipped["key"]: skipped["reason"] for skipped in report.skipped}
    assert set(reasons) == {"00000--000", "00000--003", "00000--005", "00001--011"}
    assert "has the key 00000--003 too" in reasons["00000--003"]


def test_a_vanished_image_is_skipped(tmp_path):
    lists = write(tmp_path / "l.json", [{"image": "gone.jpg", "caption": "a"}])
    samples, report = run(caption_records(lists, tmp_path), tmp_path / "out")
    assert samples == {} and "No such file" in report.skipped[0]["reason"]


def test_bytes_do_not_depend_on_the_number_of_threads(tmp_path):
    records = make_folder(tmp_path / "in", 15, corrupt=(4,))
    for workers in (1, 5):
        run(records, tmp_path / f"out{workers}", workers=workers, samples_per_shard=4)
    one, five = ({p.name: p.read_bytes() for p in (tmp_path / f"out{n}").iterdir()} for n in (1, 5))
    assert one == five


def test_a_killed_job_resumes_without_loss(tmp_path):
    records = make_folder(tmp_path / "in", 24, corrupt=(2, 13))
    settings = {"source": "test", "samples_per_shard": 3, "progress": False, "workers": 2}
    target, kept = tmp_path / "killed", 0
    for attempt in range(4):
        child = os.fork()
        if child == 0:
            try:
                write_sample = ShardWriter.write

                def slow_write(self, sample, write_sample=write_sample):
                    time.sleep(0.004)
                    write_sample(self, sample)

                ShardWriter.write = slow_write
                import_records(records, target, **settings)
            finally:
                os._exit(1)
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline and len(list(target.glob("*.index.json"))) <= kept:
            time.sleep(0.001)
        time.sleep(0.003 * attempt)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        assert not (target / "import-report.json").exists() or (target / "index.json").exists()
        kept = len(list(target.glob("*.index.json")))
    done = len([p for p in target.glob("shard-*.tar")])
    written = []
    write_sample = ShardWriter.write
    ShardWriter.write = lambda self, sample: (written.append(sample.key), write_sample(self, sample))
    try:
        report = import_records(records, target, **settings)
    finally:
        ShardWriter.write = write_sample
    assert (report.records, report.imported, len(report.skipped)) == (24, 22, 2)
    assert len(written) <= 22 - 3 * (done - 1), "finished shards are not done again"
    import_records(records, tmp_path / "whole", **settings)
    killed, whole = (
        {p.name: p.read_bytes() for p in folder.glob("*") if p.name != importer.REPORT_FILE}
        for folder in (target, tmp_path / "whole")
    )
    assert killed == whole


def test_different_names_get_different_keys():
    names = ["a/b", "a--b", "a-/b", "a/-b", "a.b", "a_b", "a b", "x" * 91, "x" * 92, "\N{SNOWMAN}", "a/b/c", "a//b"]
    keys = [safe_key(name) for name in names]
    assert len(set(keys)) == len(names)
    assert all(len(key) <= 90 and key.isascii() and "." not in key for key in keys)
    assert safe_key("train2014/COCO_train2014_000000000009") == "train2014--COCO_train2014_000000000009"
