"""Proves the command lines of `prismer data import` for published datasets, as docs/datasets.md has them, and that
`prismer data recipes` prints commands that its tools understand.

Run: pytest tests/cli/test_data_import.py
"""

import ast
import importlib.util
import json
import re
import shlex
import sys
from pathlib import Path

import pytest

from prismer.cli.main import build_parser
from prismer.dataloading.sources.recipes import RECIPES
from prismer.dataloading.store.shards import ShardDataset
from tests.cli.commands import assert_refused
from tests.data.import_sources import encode, gradient, write
from tests.data.test_published_datasets import coco, genome, karpathy
from tests.data.test_url_captions import URL, downloaded
from tests.data.test_vqa_annotations import vqa

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/datasets.md").read_text()
# img2dataset 1.47.0: the parameters of img2dataset.download that the recipes use, read on 2026-11-30
IMG2DATASET_OPTIONS = {
    "url_list",
    "input_format",
    "url_col",
    "caption_col",
    "output_format",
    "output_folder",
    "image_size",
    "resize_mode",
    "resize_only_if_bigger",
    "processes_count",
    "thread_count",
    "number_sample_per_shard",
    "compute_hash",
}


def make_everything(root):
    """Every folder that the page's commands name, with the smallest files in each schema."""
    coco(root / "coco")
    coco(root / "coco", "val", ids=(42,))
    karpathy(root / "coco")
    vqa(root / "vqa")
    for name in ("train2014", "val2014"):
        (root / "vqa" / name).mkdir(exist_ok=True)
    vqa(root / "vqa", "train2014")
    vqa(root / "vqa", "test2015", annotations=[])
    genome(root / "vg")
    name = "0013ea2087020901.jpg"
    write(root / "nocaps/val" / name, encode(gradient()))
    image = {"id": 0, "file_name": name, "coco_url": f"https://s3.amazonaws.com/nocaps/val/{name}"}
    captions = [{"image_id": 0, "id": 0, "caption": "a baby"}]
    content = {"images": [{**image, "domain": "near-domain"}], "annotations": captions}
    write(root / "nocaps/nocaps_val_4500_captions.json", content)
    write(root / "flickr30k/flickr30k-images/1.jpg", encode(gradient()))
    write(root / "flickr30k/results_20130124.token", "1.jpg#0\tA dog .\n")
    about = {"filename": "1.jpg", "split": "test", "sentences": [{"raw": "A dog ."}]}
    write(root / "flickr30k/dataset_flickr30k.json", {"images": [about], "dataset": "flickr30k"})
    for kind in ("n01440764", "n01443537"):
        for i in range(20):
            write(root / f"imagenet/train/{kind}/{i}.JPEG", encode(gradient(i)))
    write(root / "imagenet/LOC_synset_mapping.txt", "n01440764 tench, Tinca tinca\nn01443537 goldfish\n")
    for name in ("cc12m", "cc3m", "sbu"):
        downloaded(root / name, tars=True)
    write(root / "cc12m.tsv", f"{URL.format(0)}\tone\n")
    write(root / "Train_GCC-training.tsv", f"one\t{URL.format(0)}\n")
    write(root / "sbu-captions-all.json", {"image_urls": [URL.format(0)], "captions": ["one"]})
    for name in ("photos", "shards"):
        downloaded(root / name, tars=name == "shards", captions=("one",))


def page_commands():
    """The import commands of docs/datasets.md that need no further package."""
    found = re.findall(r"`(prismer data import [^`]+)`", PAGE)
    return [command for command in found if " hub " not in command and " parquet " not in command]


def test_every_command_of_the_page_imports_its_dataset(run, tmp_path, monkeypatch):
    make_everything(tmp_path)
    monkeypatch.chdir(tmp_path)
    commands = page_commands()
    assert len(commands) >= 12
    for number, command in enumerate(commands):
        words = shlex.split(command)[1:]
        out = words[words.index("--out") + 1]
        words[words.index("--out") + 1] = f"{number}/{out}"
        done = run(*words, "--label-size", 8)
        assert done.code == 0, (command, done.err)
        dataset = ShardDataset(tmp_path / f"{number}/{out}")
        metas = [dataset.meta(i) for i in range(len(dataset))]
        assert metas and any(m.get("captions") or m.get("questions") or m.get("class") for m in metas), command
    assert run("data", "check", "0/data/coco/train").code == 0


def test_sixteen_shots_of_imagenet(run, tmp_path):
    make_everything(tmp_path)
    command = ("data", "import", "imagenet", tmp_path / "imagenet", "--split", "train", "--shots", 16, "--seed", 0)
    done = run(*command, "--out", tmp_path / "out", "--label-size", 8)
    assert done.code == 0 and "32 of 32 images imported" in done.out
    assert "16 images of each class were drawn with seed 0; 8 images are left out" in done.err
    dataset = ShardDataset(tmp_path / "out")
    assert dataset.classes["class"] == ["tench", "goldfish"] and dataset.meta(0)["source"] == "imagenet train"


def test_images_that_were_encoded_anew_are_printed(run, tmp_path):
    coco(tmp_path / "coco", ids=(1, 2))
    first = tmp_path / "coco/train2014/COCO_train2014_000000000001.jpg"
    first.write_bytes(encode(gradient(mode="CMYK")))
    command = ("data", "import", "coco", tmp_path / "coco", "--split", "train", "--out", tmp_path / "out")
    assert "encoded anew as RGB JPEG: 1 CMYK JPEG" in run(*command).out
    assert json.loads((tmp_path / "out/import-report.json").read_text())["formats"]["CMYK JPEG"]["first"] == str(first)


@pytest.mark.parametrize(
    "words, message",
    [
        ("coco {tmp} --out {tmp}/o", "coco has several splits; name one with --split"),
        ("coco {tmp}/none --split val --out {tmp}/o", "is not a folder; name the folder of coco"),
        ("coco {tmp} --split val --out {tmp}", "is the folder to import"),
        ("imagenet {tmp} --split train --shots 0 --out {tmp}/o", "--shots is 0; it must be at least 1"),
        ("parquet {tmp}/none --out {tmp}/o", "none is no Parquet file and no folder of them"),
        ("hub a/b --columns image --out {tmp}/o", "--columns image is not WHAT=COLUMN"),
        ("hub a/b --limit 0 --out {tmp}/o", "--limit is 0"),
        ("web {tmp} --annotations {tmp}/list.tsv --out {tmp}/o", "has no line of an address and a caption"),
    ],
)
def test_bad_input_gets_one_sentence(run, tmp_path, words, message):
    (tmp_path / "list.tsv").write_text("a\tb\n")
    assert_refused(run("data", "import", *words.format(tmp=tmp_path).split()), message)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_a_script_whose_commands_are_understood(run, name):
    done = run("data", "recipes", name)
    assert done.code == 0 and done.err == ""
    recipe = RECIPES[name]
    lines = done.out.replace("\\\n", "").splitlines()
    notes = " ".join(line.removeprefix("# ") for line in lines if line.startswith("# "))
    for words in (recipe.pairs, recipe.size, recipe.licence):
        assert words in notes
    commands = [shlex.split(line) for line in lines if not line.startswith("#")]
    assert [" ".join(map(str, c)) for c in commands if c[0] == "prismer"] == [
        " ".join(shlex.split(command)) for command in recipe.imports
    ]
    for command in commands:
        if command[0] == "prismer":
            build_parser().parse_args(command[1:])
        elif command[0] == "img2dataset":
            options = [word.removeprefix("--") for word in command if word.startswith("--")]
            assert set(options) <= IMG2DATASET_OPTIONS and len(command) == 1 + 2 * len(options)
    assert any(c[0] == "img2dataset" for c in commands) == (name in ("cc12m", "cc3m", "sbu"))
    assert all(len(line) <= 118 for line in done.out.splitlines())


def test_the_list_of_recipes_names_the_published_set(run):
    done = run("data", "recipes")
    assert done.code == 0 and all(f"{name} " in done.out for name in RECIPES)
    assert "12.7 million pairs" in done.out
    done = run("data", "recipes", "laion")
    assert done.code == 2 and "invalid choice: 'laion'" in done.err


def test_a_recipe_loads_nothing_that_could_download_or_run_it(run):
    before = set(sys.modules)
    done = run("data", "recipes", "coco")
    assert done.code == 0
    assert not {"img2dataset", "requests", "urllib.request", "subprocess"} & (set(sys.modules) - before)


@pytest.mark.skipif(importlib.util.find_spec("img2dataset") is None, reason="img2dataset is not installed")
def test_the_options_are_those_of_the_installed_img2dataset():
    # read, not imported: its own dependencies may be missing
    source = Path(importlib.util.find_spec("img2dataset").origin).parent / "main.py"
    functions = [node for node in ast.parse(source.read_text()).body if isinstance(node, ast.FunctionDef)]
    (download,) = [node for node in functions if node.name == "download"]
    assert {argument.arg for argument in download.args.args} >= IMG2DATASET_OPTIONS
