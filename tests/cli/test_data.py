"""Proves what the commands of `prismer data` write.

Run: pytest tests/cli/test_data.py
"""

import json
import shutil
from pathlib import Path

from PIL import Image

from prismer.cli.printing import print_left_out
from prismer.dataloading.store.shards import ShardDataset


def test_render_then_check_then_show(run, tmp_path):
    out = tmp_path / "scenes"
    render = ("data", "render", "--out", out, "--train", 3, "--val", 1, "--test", 0, "--size", 48, "--workers", 1)
    assert "train 3, val 1 scenes" in run(*render).out
    assert len(ShardDataset(out / "train")) == 3 and not (out / "test").exists()
    checked = run("data", "check", out)
    assert checked.code == 0 and checked.out.count("no problems") == 2
    sheet = tmp_path / "sheet.png"
    assert run("data", "show", out / "train", "--out", sheet, "--count", 2, "--start", 1).code == 0
    assert Image.open(sheet).width > 7 * 100
    assert sorted(path.name for path in tmp_path.iterdir()) == ["scenes", "sheet.png"]


def test_check_lists_every_problem(run, scenes, tmp_path):
    folder = Path(shutil.copytree(scenes / "train", tmp_path / "train"))
    dataset = ShardDataset(folder)
    tar = folder / dataset.shards[0]
    data = bytearray(tar.read_bytes())
    for i in (2, 5):
        data[data.index(dataset[i].jpeg) + 300] ^= 1
    tar.write_bytes(data)
    done = run("data", "check", folder)
    assert done.code == 1
    assert dataset.key(2) in done.out and dataset.key(5) in done.out and dataset.key(3) not in done.out


def test_index_makes_the_table_again(run, scenes, tmp_path):
    folder = Path(shutil.copytree(scenes, tmp_path / "scenes"))
    whole = (folder / "train/index.bin").read_bytes()
    (folder / "train/index.bin").write_bytes(whole[:20] + b"x" + whole[21:])
    (folder / "val/index.bin").unlink()
    checked = run("data", "check", folder / "train")
    assert checked.code == 1 and f"give the command: prismer data index {folder}/train" in checked.out
    done = run("data", "index", folder)
    counts = {split: len(ShardDataset(scenes / split)) for split in ("train", "val")}
    for split, count in counts.items():
        assert f"{folder}/{split}/index.bin: {count} samples" in done.out
        assert (folder / split / "index.bin").read_bytes() == (scenes / split / "index.bin").read_bytes()
    assert done.code == 0 and run("data", "check", f"{folder}/train/").code == 0


def test_import_reads_every_kind_of_source(run, images, tmp_path):
    source = tmp_path / "mine"
    for kind in ("cat", "dog"):
        (source / kind).mkdir(parents=True)
        shutil.copy(images[0], source / kind / "1.jpg")
    Image.open(images[1]).save(source / "cat" / "2.png")
    (source / "cat" / "3.jpg").write_bytes(b"not an image")
    (source / "cat" / "1.txt").write_text("a cat\n")
    done = run("data", "import", "folder", source, "--out", tmp_path / "folder", "--label-size", 32)
    assert done.code == 0 and "3 of 4 images imported" in done.out and "3.jpg" in done.err
    metas = [ShardDataset(tmp_path / "folder").meta(i) for i in range(3)]
    assert [meta["captions"] for meta in metas] == [["a cat"], [], []]
    assert run("data", "import", "classes", source, "--out", tmp_path / "classes").code == 0
    assert ShardDataset(tmp_path / "classes").meta(2)["class"] == "dog"
    assert run("data", "import", "tars", tmp_path / "folder", "--out", tmp_path / "tars").code == 0
    assert len(ShardDataset(tmp_path / "tars")) == 3

    captions = [{"image": "cat/1.jpg", "caption": "A cat."}, {"image": "cat/1.jpg", "caption": "One cat."}]
    questions = [{"dataset": "vqa", "image": "cat/1.jpg", "question": "A cat?", "answer": "yes", "weight": 1.0}]
    for kind, entries in (("captions", captions), ("vqa", questions)):
        (tmp_path / f"{kind}.json").write_text(json.dumps(entries))
        listed = ("data", "import", kind, tmp_path / f"{kind}.json", "--images", source, "--out", tmp_path / f"o{kind}")
        assert run(*listed).code == 0
    assert ShardDataset(tmp_path / "ocaptions").meta(0)["captions"] == ["A cat.", "One cat."]
    assert ShardDataset(tmp_path / "ovqa").meta(0)["questions"][0]["question"] == "A cat?"


def test_only_the_first_files_that_were_left_out_are_named(capsys):
    skipped = [dict(image=f"{i}.jpg" if i else "", key="k", reason="damaged") for i in range(7)]
    others = [dict(file=f".{i}", reason="hidden") for i in range(3)]
    print_left_out(skipped, others, Path("report.json"))
    assert capsys.readouterr().err.splitlines() == [
        "skipped k: damaged",
        *(f"skipped {i}.jpg: damaged" for i in range(1, 5)),
        "... and 2 more, all in report.json",
        *(f"left alone .{i}: hidden" for i in range(3)),
    ]
