"""Proves that a labelling job loses nothing when it is killed, resumed, shared, or fed with damaged images.

python -m pytest tests/experts/test_job.py
"""

import io
import json
import random
import struct
import time
import zlib

import numpy as np
import pytest
from PIL import Image

from prismer.dataloading.experts.job import label_records
from prismer.dataloading.experts.labeller import Labeller
from prismer.dataloading.experts.network import ExpertOutput
from prismer.dataloading.sources.any_source import source_records
from prismer.dataloading.sources.image_folders import folder_records
from prismer.dataloading.sources.importer import import_records
from prismer.dataloading.store.check import check_dataset
from prismer.dataloading.store.shards import ShardDataset
from prismer.dataloading.store.writer import OpenShard
from tests.experts.jobs import CONTEXT, read_files, run_job, run_watched, write_photos
from tests.experts.stand_ins import Brightness, Halves


def label(photos, out, networks=(Brightness, Halves), per_shard=8, label_size=32, **options):
    labeller = Labeller([network() for network in networks], label_size=label_size, batch_size=4)
    records, classes = source_records(photos)
    options = {"source": "photos", "progress": False, **options}
    return label_records(records, out, labeller, classes=classes, samples_per_shard=per_shard, **options)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return write_photos(tmp_path_factory.mktemp("job") / "photos", 21)


def test_samples_have_the_maps_tables_and_notes(photos, tmp_path):
    report = label(photos, tmp_path / "out", licence="CC0")
    assert (report.records, report.labelled, report.skipped) == (21, 21, [])
    assert check_dataset(tmp_path / "out", progress=False).ok
    dataset = ShardDataset(tmp_path / "out")
    assert [entry["count"] for entry in dataset.entries] == [8, 8, 5]
    assert dataset.classes == {"obj_detection": Halves.classes}
    assert dataset.about["experts"]["depth"]["version"] == "brightness-1"
    for i in (0, 7, 20):
        sample = dataset[i]
        assert sample.key == f"photo-{i:05d}"
        assert sample.jpeg == (photos / f"{sample.key}.jpg").read_bytes()
        with Image.open(io.BytesIO(sample.jpeg)) as image:
            red = np.asarray(image.convert("RGB").resize((32, 32), Image.BICUBIC))[..., 0]
        assert np.abs(sample.labels["depth"].astype(int) - red).max() <= 2
        bright = int(sample.labels["depth"].mean() > 127)
        assert sample.meta["instances"] == {"0": bright}
        assert sample.meta["boxes"] == {"obj_detection": {"0": [0.0, 0.0, 0.5, 1.0, 0.9]}}
        assert sample.meta["licence"] == "CC0"
        assert sample.meta["size"] == [image.height, image.width]


@pytest.mark.parametrize("number", (3, pytest.param(10, marks=pytest.mark.long)))
def test_a_job_killed_many_times_ends_with_the_same_bytes(tmp_path, number):
    photos = write_photos(tmp_path / "photos", 32 * number)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    run_job(photos, whole)
    moments = random.Random(2303)
    kills = 0
    while kills < number:
        started = CONTEXT.Event()
        process = CONTEXT.Process(target=run_job, args=(photos, broken), kwargs={"started": started})
        process.start()
        assert started.wait(60)
        # some kills before the first shard of an attempt is whole, others after one or two
        shards = len(list(broken.glob("shard-*.index.json"))) + moments.randint(0, 2)
        while len(list(broken.glob("shard-*.index.json"))) < shards:
            time.sleep(0.001)
        time.sleep(moments.uniform(0, 0.04))
        process.kill()
        process.join()
        assert process.exitcode == -9, "the job ended before it was killed: give it more photos"
        kills += 1
    assert not (broken / "index.json").exists()
    report = run_job(photos, broken)
    assert report.labelled == 32 * number
    assert read_files(broken) == read_files(whole)


@pytest.mark.parametrize("world", [2, 3])
def test_any_number_of_processes_gives_the_same_bytes(photos, tmp_path, world):
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    run_job(photos, alone, per_shard=4)
    ranks = [CONTEXT.Process(target=run_job, args=(photos, shared, rank, world, 4)) for rank in range(world)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(120)
        assert process.exitcode == 0
    assert read_files(shared) == read_files(alone)


def test_a_process_without_peers_leaves_the_shards_of_others_missing(photos, tmp_path):
    report = label(photos, tmp_path / "out", per_shard=4, rank=1, world=2, peers=())
    # shards 1, 3 and 5 of 6; the last holds one photo
    assert (report.labelled, report.shards_missing) == (4 + 4 + 1, 3)
    assert not (tmp_path / "out" / "index.json").exists()
    # another number of processes may take over
    assert label(photos, tmp_path / "out", per_shard=4).labelled == 21
    assert (tmp_path / "out" / "index.json").exists()


@pytest.mark.long
def test_memory_stays_flat_over_ten_thousand_images(tmp_path):
    photos = write_photos(tmp_path / "photos", 10_000, side=64)
    sizes = CONTEXT.Queue()
    process = CONTEXT.Process(target=run_watched, args=(photos, tmp_path / "out", sizes))
    process.start()
    seen = list(iter(sizes.get, None))
    process.join(60)
    assert process.exitcode == 0
    assert len(ShardDataset(tmp_path / "out")) == 10_000
    early = max(size for count, size in seen if 1_000 < count <= 3_000)
    late = max(size for count, size in seen if count > 8_000)
    assert late - early < 12 * 2**20, f"{(late - early) / 2**20:.1f} MB more after 8,000 images"


def bomb() -> bytes:
    """A PNG that promises 60,000 x 60,000 pixels."""
    chunks = b"\x89PNG\r\n\x1a\n"
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    for name, data in ((b"IHDR", header), (b"IDAT", zlib.compress(bytes(1000))), (b"IEND", b"")):
        chunks += struct.pack(">I", len(data)) + name + data
        chunks += struct.pack(">I", zlib.crc32(name + data))
    return chunks


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def test_unusual_images_are_labelled_and_broken_ones_reported(photos, tmp_path):
    folder = tmp_path / "strange"
    folder.mkdir()
    plain = Image.open(photos / "photo-00000.jpg").convert("RGB").resize((60, 40))
    ramp = np.linspace(0, 65535, 60 * 40).reshape(40, 60).astype(np.uint16)
    turned = Image.Exif()
    turned[0x0112] = 6
    jpeg = encoded(plain, "JPEG")
    files = {
        "animated.webp": encoded(plain, "WEBP", save_all=True, append_images=[plain.rotate(90)]),
        "cmyk.jpg": encoded(plain.convert("CMYK"), "JPEG"),
        "deep.png": encoded(Image.fromarray(ramp), "PNG"),
        "grey.jpg": encoded(plain.convert("L"), "JPEG"),
        "palette.png": encoded(plain.convert("P"), "PNG"),
        "tiny.png": encoded(plain.resize((1, 1)), "PNG"),
        "turned.jpg": encoded(plain, "JPEG", exif=turned),
        "whole.jpg": jpeg,
        "bomb.png": bomb(),
        "cut.jpg": jpeg[:-100],
        "empty.jpg": b"",
        "text.jpg": b"<html>404</html>",
    }
    for name, data in files.items():
        (folder / name).write_bytes(data)
    # the same key as whole.jpg
    (folder / "whole.png").write_bytes(encoded(plain, "PNG"))
    report = label(folder, tmp_path / "out", per_shard=5)
    reasons = {entry["image"].rpartition("/")[2]: entry["reason"] for entry in report.skipped}
    assert set(reasons) == {"bomb.png", "cut.jpg", "empty.jpg", "text.jpg", "whole.png"}
    assert "exceeds limit" in reasons["bomb.png"]
    assert "cut short" in reasons["cut.jpg"]
    assert "empty" in reasons["empty.jpg"]
    assert "whole" in reasons["whole.png"]
    assert report.records == len(files) + 1 == report.labelled + len(report.skipped)
    saved = json.loads((tmp_path / "out" / "report.json").read_text())
    assert saved["skipped"] == report.skipped
    assert check_dataset(tmp_path / "out", progress=False).ok
    dataset = ShardDataset(tmp_path / "out")
    samples = {dataset.key(i): dataset[i] for i in range(len(dataset))}
    assert samples["turned"].meta["size"] == [60, 40]
    # 16 bits keep their ramp, and the map of a rotated image is rotated
    assert samples["deep"].labels["depth"][0].mean() < 10
    assert samples["deep"].labels["depth"][-1].mean() > 240
    expected = np.rot90(samples["whole"].labels["depth"], -1).astype(int)
    assert np.abs(samples["turned"].labels["depth"] - expected).mean() < 6


def test_a_shard_without_any_readable_image_is_written_empty(tmp_path):
    photos = write_photos(tmp_path / "photos", 6)
    for i in (2, 3):
        (photos / f"photo-{i:05d}.jpg").write_bytes(b"junk")
    report = label(photos, tmp_path / "out", per_shard=2)
    assert (report.labelled, len(report.skipped)) == (4, 2)
    dataset = ShardDataset(tmp_path / "out")
    assert [entry["count"] for entry in dataset.entries] == [2, 0, 2]
    assert [dataset.key(i)[-1] for i in range(4)] == ["0", "1", "4", "5"]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"per_shard": 4}, "other about"),
        ({"licence": "CC0"}, "other licence"),
        ({"networks": (Brightness,)}, "other classes, about"),
        ({"label_size": 16}, "other about"),
    ],
)
def test_a_job_with_other_settings_is_refused(photos, tmp_path, change, message):
    label(photos, tmp_path / "out")
    with pytest.raises(ValueError, match=message):
        label(photos, tmp_path / "out", **change)


def test_a_source_that_changed_is_refused(tmp_path):
    photos = write_photos(tmp_path / "photos", 5)
    label(photos, tmp_path / "out")
    (photos / "photo-00003.jpg").rename(photos / "photo-00009.jpg")
    with pytest.raises(ValueError, match="source now lists 5 .or others"):
        label(photos, tmp_path / "out")


def test_a_dataset_of_another_kind_is_refused_and_unchanged(photos, tmp_path):
    import_records(folder_records(photos), tmp_path / "out", source="x", progress=False)
    before = read_files(tmp_path / "out")
    with pytest.raises(ValueError, match="no labelling job began"):
        label(photos, tmp_path / "out")
    assert read_files(tmp_path / "out") == before


def hold_shard(folder, locked, release):
    shard = OpenShard(folder, 0)
    locked.set()
    release.wait(60)
    shard.abandon()


def test_two_jobs_cannot_write_the_same_shard(photos, tmp_path):
    folder = tmp_path / "out"
    label(photos, folder)
    (folder / "shard-000000.index.json").unlink()
    locked, release = CONTEXT.Event(), CONTEXT.Event()
    process = CONTEXT.Process(target=hold_shard, args=(folder, locked, release))
    process.start()
    assert locked.wait(60)
    with pytest.raises(ValueError, match="another process is writing"):
        label(photos, folder)
    release.set()
    process.join()
    assert label(photos, folder).labelled == 21


def test_the_maps_of_other_experts_are_kept(photos, tmp_path):
    label(photos, tmp_path / "objects", networks=(Halves,), label_size=48)
    report = label(tmp_path / "objects", tmp_path / "both", networks=(Brightness,), label_size=32)
    assert report.labelled == 21
    assert check_dataset(tmp_path / "both", progress=False).ok
    dataset = ShardDataset(tmp_path / "both")
    sample = dataset[3]
    assert dataset.classes == {"obj_detection": Halves.classes}
    assert sample.labels["depth"].shape == sample.labels["obj_detection"].shape == (32, 32)
    assert sample.meta["instances"] == {"0": 0}
    assert set(sample.meta["boxes"]) == {"obj_detection"}


class Nothing(Halves):
    """Objects: none in any image."""

    version = "nothing-1"

    def predict(self, images, earlier):
        plane = np.full((images.label_size,) * 2, 255, np.uint8)
        return [ExpertOutput(plane) for _ in range(len(images))]


def test_boxes_of_maps_that_are_replaced_are_gone(photos, tmp_path):
    """An image in which the new network finds nothing must not keep the boxes of the old one."""
    label(photos, tmp_path / "objects", networks=(Halves,))
    label(tmp_path / "objects", tmp_path / "none", networks=(Nothing,))
    sample = ShardDataset(tmp_path / "none")[3]
    assert sample.meta["instances"] == {} and "boxes" not in sample.meta
    assert check_dataset(tmp_path / "none", progress=False).ok


def test_captions_beside_images_are_kept(tmp_path):
    photos = write_photos(tmp_path / "photos", 2)
    (photos / "photo-00001.txt").write_text("A picture.")
    label(photos, tmp_path / "out")
    assert ShardDataset(tmp_path / "out")[1].meta["captions"] == ["A picture."]


def test_a_list_needs_the_folder_of_its_images(photos, tmp_path):
    path = tmp_path / "list.json"
    path.write_text(json.dumps([{"image": "photo-00002.jpg", "caption": "Blue."}]))
    with pytest.raises(ValueError, match="--images"):
        source_records(path)
    records, _ = source_records(path, photos)
    labeller = Labeller([Brightness()], label_size=16)
    label_records(records, tmp_path / "out", labeller, source="list", progress=False)
    assert ShardDataset(tmp_path / "out")[0].meta["captions"] == ["Blue."]


def test_a_source_that_does_not_exist_is_refused(tmp_path):
    with pytest.raises(ValueError, match="folder of images or shards"):
        source_records(tmp_path / "nothing")


def test_the_preview_is_one_sheet_for_each_shard(photos, tmp_path):
    label(photos, tmp_path / "out", preview=True)
    sheets = sorted((tmp_path / "out" / "preview").iterdir())
    assert [sheet.name for sheet in sheets] == [f"shard-{i:06d}.jpg" for i in range(3)]
    with Image.open(sheets[0]) as sheet:
        assert sheet.height > 8 * 200
