"""Proves that img2dataset's output takes its captions from the lists of Conceptual Captions, SBU and BLIP.

python -m pytest tests/data/test_url_captions.py
"""

import json

import pytest

from prismer.dataloading.sources.url_captions import UrlCaptions, web_records
from tests.data.import_sources import captions_of, encode, gradient, make_tar, run, write

URL = "http://example.org/{}.jpg"


def downloaded(root, tars, captions=()):
    """Three images as img2dataset writes them; `captions` are beside the first of them."""
    members = []
    for i in range(3):
        about = {"url": URL.format(i), "key": f"{i:09d}", "status": "success", "width": 20, "height": 12}
        members.append((f"{i:09d}.jpg", encode(gradient(i))))
        if i < len(captions):
            about["caption"] = captions[i]
            members.append((f"{i:09d}.txt", captions[i].encode()))
        members.append((f"{i:09d}.json", json.dumps(about).encode()))
    if tars:
        make_tar(root / "00000.tar", members)
    else:
        for name, data in members:
            write(root / "00000" / name, data)
    write(root / ("00000_stats.json" if tars else "00000.parquet"), b"{}")


def texts_of(samples):
    return [captions for _, captions in sorted(captions_of(samples).items())]


@pytest.mark.parametrize("tars", [False, True], ids=["folders", "tars"])
@pytest.mark.parametrize("order", ["cc3m", "cc12m"])
def test_a_tsv_gives_the_captions_in_either_order(tmp_path, tars, order):
    downloaded(tmp_path / "in", tars)
    rows = [(URL.format(i), text) for i, text in ((2, "the third"), (0, "the first"), (7, "not downloaded"))]
    lines = ["\t".join(row if order == "cc12m" else row[::-1]) for row in rows]
    tsv = write(tmp_path / "list.tsv", "\ufeff" + "\n".join(lines) + "\n")
    samples, report = run(web_records(tmp_path / "in", [tsv]), tmp_path / "out")
    assert texts_of(samples) == [["the first"], [], ["the third"]]
    (reason,) = [o["reason"] for o in report.others if o["file"] == str(tsv)]
    assert reason == f"1 images have no caption beside them and are not in the list, the first {URL.format(1)}"


def test_a_tsv_that_was_prepared_for_img2dataset_is_read_too(tmp_path):
    downloaded(tmp_path / "in", False, ["beside"])
    rows = [f"{URL.format(1)}\tlisted", "no address", f"{URL.format(1)}\tlisted again", f"{URL.format(2)}\t  "]
    tsv = write(tmp_path / "list.tsv", "\n".join(["url\tcaption", *rows]))
    samples, report = run(web_records(tmp_path / "in", [tsv]), tmp_path / "out")
    assert texts_of(samples) == [["beside"], ["listed"], []]
    assert [o["reason"] for o in report.others if o["file"] == str(tsv)] == [
        f"1 captions have no words and are left out, the first of image {URL.format(2)}",
        "1 rows have no address and are not read, the first line 3",
    ]


@pytest.mark.parametrize("form", ["sbu", "texts", "texts reversed", "blip"])
def test_lists_of_sbu_and_blip(tmp_path, form):
    downloaded(tmp_path / "in", True)
    urls, captions = [URL.format(i) for i in (1, 0)], ["one\nline", "caf\u00e9"]
    if form == "sbu":
        files = [write(tmp_path / "sbu.json", {"image_urls": urls, "captions": captions, "user_ids": ["a", "b"]})]
    elif form == "blip":
        rows = [{"url": url, "caption": text} for url, text in zip(urls, captions, strict=True)]
        files = [write(tmp_path / "ccs.json", [*rows, {"url": float("nan"), "caption": "a"}])]
    else:
        captions = ["one line", "caf\u00e9"]
        files = [
            write(tmp_path / "SBU_captioned_photo_dataset_urls.txt", "\n".join(urls) + "\n"),
            write(tmp_path / "SBU_captioned_photo_dataset_captions.txt", "\n".join(captions) + "\n"),
        ]
        files = files if form == "texts" else files[::-1]
    samples, _ = run(web_records(tmp_path / "in", files), tmp_path / "out")
    assert texts_of(samples) == [["caf\u00e9"], ["one line"], []]


def test_captions_of_a_long_list_are_found_by_their_address(tmp_path):
    lines = [f"{URL.format(i)}\tcaption {i}" for i in range(5000)]
    captions = UrlCaptions([write(tmp_path / "list.tsv", "\r\n".join(lines))])
    assert len(captions) == 5000
    assert all(captions.get(URL.format(i)) == f"caption {i}" for i in range(5000))
    assert captions.get(URL.format(5000)) is None and captions.get("") is None


@pytest.mark.parametrize(
    "files, message",
    [
        ({"a.tsv": "one\ttwo\n"}, "has no line of an address and a caption; give a TSV"),
        ({"a.json": {"image_urls": ["http://a"], "captions": []}}, "of one length, nor a list of"),
        ({"a.json": [1, 2]}, "has no line of an address and a caption"),
        ({"u.txt": "http://a\nhttp://b\n", "c.txt": "one\n"}, "have 2 addresses and 1 captions; give two files"),
        ({"a.tsv": "", "b.tsv": "", "c.tsv": ""}, "3 lists of captions are named; give one"),
    ],
)
def test_lists_of_another_form_are_refused(tmp_path, files, message):
    downloaded(tmp_path / "in", False)
    with pytest.raises(ValueError, match=message):
        web_records(tmp_path / "in", [write(tmp_path / name, content) for name, content in files.items()])


def test_label_maps_cannot_be_joined_to_tars(tmp_path):
    downloaded(tmp_path / "in", True)
    tsv = write(tmp_path / "list.tsv", f"{URL.format(1)}\ta\n")
    with pytest.raises(ValueError, match="label maps cannot be joined; leave out --labels"):
        web_records(tmp_path / "in", [tsv], labels=tmp_path)
