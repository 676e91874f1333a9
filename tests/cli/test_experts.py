"""Proves what `prismer label`, `show` and `experts` and the option --experts do, with networks that need no weights.

Run: pytest tests/cli/test_experts.py
"""

import io
import json

import pytest
from PIL import Image, ImageDraw

from prismer.cli.main import main
from prismer.dataloading.store.check import check_dataset
from prismer.dataloading.store.shards import ShardDataset
from tests.experts.jobs import write_photos

NO_WEIGHTS = "edge=gradient"


@pytest.fixture(autouse=True)
def no_weights(monkeypatch, tmp_path):
    """A machine on which nothing has been fetched."""
    monkeypatch.setenv("PRISMER_HOME", str(tmp_path / "home"))


@pytest.fixture
def image(tmp_path):
    """A dark disc on white."""
    image = Image.new("RGB", (160, 120), "white")
    ImageDraw.Draw(image).ellipse((50, 30, 110, 90), fill=(40, 60, 200))
    image.save(tmp_path / "disc.png")
    return tmp_path / "disc.png"


def test_label_writes_a_dataset_and_resumes(tmp_path, capsys):
    photos = write_photos(tmp_path / "photos", 5)
    (photos / "photo-00002.jpg").write_bytes(b"junk")
    command = ["label", str(photos), "--out", str(tmp_path / "out"), "--experts", NO_WEIGHTS]
    command += ["--samples-per-shard", "2", "--licence", "CC0", "--preview", "--label-size", "64"]
    assert main(command) == 0
    out, err = capsys.readouterr()
    assert "4 of 5 images labelled, 1 skipped" in out and "gradient: " in out
    assert "photo-00002.jpg: the image is in no known format" in err
    assert check_dataset(tmp_path / "out", progress=False).ok
    dataset = ShardDataset(tmp_path / "out")
    assert dataset[0].labels["edge"].shape == (64, 64) and dataset[0].meta["licence"] == "CC0"
    assert len(list((tmp_path / "out" / "preview").iterdir())) == 3
    assert main(command) == 0
    assert main([*command, "--licence", "MIT"]) == 2
    assert "begun with other licence" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["label", "nowhere", "--out", "x"], "there is no file or folder nowhere"),
        (["label", ".", "--out", "x", "--experts", "taste"], "unknown expert 'taste'"),
        (["label", ".", "--out", "x", "--experts", ","], "no expert was asked for"),
        (["show", "nowhere.jpg"], "no image file nowhere.jpg"),
        (["experts", "fetch", "gradient"], "gradient needs no weights"),
        (["experts", "fetch", "rapidocr"], "run `pip install 'prismer-vlm[experts]'`"),
        (["experts", "fetch", "dpt-hybrid"], "--experts depth=dpt-hybrid@SOURCE"),
        (["experts", "fetch", "taste"], "unknown network 'taste'; choose from"),
    ],
)
def test_a_mistake_is_one_sentence(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.jpg").write_bytes(b"")
    assert main(arguments) == 2
    err = capsys.readouterr().err
    assert message in err and len(err.strip().splitlines()) == 1


def test_an_empty_folder_is_one_sentence(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert main(["label", str(tmp_path / "empty"), "--out", str(tmp_path / "out")]) == 2
    assert "lists no images" in capsys.readouterr().err


def test_show_draws_a_slide_with_a_caption(image, capsys):
    assert main(["show", str(image), "--experts", NO_WEIGHTS]) == 0
    out = capsys.readouterr().out
    path = image.with_name("disc-experts.png")
    name, _, caption = out.strip().partition(": ")
    assert name == str(path) and caption.endswith(".")
    with Image.open(path) as slide:
        assert (slide.format, slide.size) == ("PNG", (1600, 900))
        with_caption = slide.convert("L")
    plain = image.with_name("plain.png")
    assert main(["show", str(image), "--experts", NO_WEIGHTS, "--model", "none", "--out", str(plain)]) == 0
    assert capsys.readouterr().out.strip() == str(plain)
    with Image.open(plain) as slide:
        # without a caption its place is white
        strip = (0, 700, 1600, 760)
        assert slide.convert("L").crop(strip).getextrema() == (255, 255)
        assert with_caption.crop(strip).getextrema()[0] < 100


def test_caption_and_answer_label_the_image_first(image, capsys):
    assert main(["caption", str(image), "--experts", NO_WEIGHTS, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["caption"].endswith(".")
    assert main(["answer", str(image), "What colour is it?", "--experts", NO_WEIGHTS]) == 0
    assert capsys.readouterr().out.strip()
    labels = [str(image)]
    assert main(["caption", str(image), "--experts", NO_WEIGHTS, "--labels", *labels]) == 2
    assert "choose one of them" in capsys.readouterr().err


def test_expert_maps_reach_the_model(image, monkeypatch, capsys):
    from prismer.model import Prismer

    seen = []
    real = Prismer.encode

    def encode(self, images):
        seen.append(images.labels["edge"].clone())
        return real(self, images)

    monkeypatch.setattr(Prismer, "encode", encode)
    main(["caption", str(image)])
    main(["caption", str(image), "--experts", NO_WEIGHTS])
    without, with_edges = seen
    assert (without == without.flatten()[0]).all()
    # dark where the disc ends, white inside and outside
    edges = with_edges[0, 0]
    middle = edges[edges.shape[0] // 2]
    assert middle.min() < 60 and middle[0] > 200 and middle[len(middle) // 2] > 200


def test_experts_list_says_how_to_get_missing_weights(capsys):
    assert main(["experts", "list"]) == 0
    out = capsys.readouterr().out
    for name in ("nanodet-g (default)", "hed (default)", "dpt-hybrid", "mask2former-coco", "gradient"):
        assert name in out
    assert "run `prismer experts fetch nanodet-g`" in out
    assert "licence" in out


def test_experts_without_weights_are_skipped_with_a_warning(tmp_path, capsys):
    photos = write_photos(tmp_path / "photos", 1)
    asked = "edge=gradient,obj_detection"
    assert main(["label", str(photos), "--out", str(tmp_path / "out"), "--experts", asked]) == 0
    assert "prismer experts fetch nanodet-g" in capsys.readouterr().err
    assert set(ShardDataset(tmp_path / "out")[0].labels) == {"edge"}


def test_a_slide_shows_boxes_and_words():
    import numpy as np

    from prismer.dataloading.feed.image_batch import ExpertLabels
    from prismer.dataloading.views.expert_overview import draw_overview

    file = io.BytesIO()
    Image.new("RGB", (200, 100), (250, 250, 250)).save(file, "JPEG")
    plane = np.full((64, 64), 255, np.uint8)
    plane[10:30, 10:40] = 0
    labels = ExpertLabels(
        {"obj_detection": plane, "ocr_detection": plane},
        {"instances": {"0": 1}, "words": {"0": "open"}, "boxes": {"obj_detection": {"0": [0.15, 0.15, 0.6, 0.5, 0.9]}}},
        {"obj_detection": ["cat", "dog"]},
    )
    bare = ExpertLabels({"obj_detection": plane}, {"instances": {"0": 1}}, labels.classes)
    with_boxes, without = (
        np.asarray(Image.open(io.BytesIO(draw_overview(file.getvalue(), one))).convert("RGB")).astype(int)
        for one in (labels, bare)
    )
    image = np.abs(with_boxes - without)[:, :676].max(axis=2) > 30
    rows, columns = np.nonzero(image)
    # the image is fitted into 632 px: the box starts at 15 % and ends at 60 % of it
    assert abs(columns.min() - (44 + 0.15 * 632)) < 4 and abs(columns.max() - (44 + 0.6 * 632)) < 4
