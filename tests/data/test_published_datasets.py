"""Proves that COCO, Karpathy's splits, NoCaps, Visual Genome and Flickr30k import from their own files and layouts, and
that what is odd in these files is counted and named.

python -m pytest tests/data/test_published_datasets.py
"""

import json

import pytest

from prismer.dataloading.sources.published import published_records
from tests.data.import_sources import captions_of, encode, gradient, run, write

COCO = "COCO_{}2014_{:012d}.jpg"


def coco(root, split="train", ids=(9, 25), captions=None, **more):
    """The official folder: images in train2014/, captions in annotations/."""
    images = []
    for i in ids:
        name = COCO.format(split, i)
        write(root / f"{split}2014/{name}", encode(gradient(i)))
        images.append({"id": i, "file_name": name, "width": 20, "height": 12, "license": 1})
    if captions is None:
        captions = [(i, f"Caption {n} of {i}.") for n in range(2) for i in ids]
    annotations = [{"image_id": i, "id": n, "caption": text} for n, (i, text) in enumerate(captions)]
    content = {"info": {}, "licenses": [], "images": images, "annotations": annotations, **more}
    return write(root / f"annotations/captions_{split}2014.json", content)


def karpathy(root):
    """dataset_coco.json with one image in each split, those of restval and val in val2014."""
    images = []
    for split, folder, i in (("train", "train", 1), ("val", "val", 2), ("test", "val", 3), ("restval", "val", 4)):
        name = COCO.format(folder, i)
        write(root / f"{folder}2014/{name}", encode(gradient(i)))
        sentences = [{"tokens": ["a"], "raw": f"{split} {n}", "imgid": i, "sentid": n} for n in range(2)]
        images.append(
            {
                "filepath": f"{folder}2014",
                "sentids": [0, 1],
                "filename": name,
                "imgid": i,
                "split": split,
                "sentences": sentences,
                "cocoid": i,
            }
        )
    return write(root / "dataset_coco.json", {"images": images, "dataset": "coco"})


def reasons(report, file=None):
    return [other["reason"] for other in report.others if file is None or other["file"] == str(file)]


def test_coco_captions_come_from_the_official_folder(tmp_path):
    coco(tmp_path / "coco")
    coco(tmp_path / "coco", "val", ids=(42,))
    samples, report = run(published_records("coco", tmp_path / "coco", split="train"), tmp_path / "out")
    assert list(samples) == ["train2014--COCO_train2014_000000000009", "train2014--COCO_train2014_000000000025"]
    first = samples["train2014--COCO_train2014_000000000009"]
    assert first.meta["captions"] == ["Caption 0 of 9.", "Caption 1 of 9."] and first.meta["image_id"] == 9
    assert first.jpeg == (tmp_path / "coco/train2014" / COCO.format("train", 9)).read_bytes()
    assert report.skipped == report.others == []
    both, _ = run(published_records("coco", tmp_path / "coco", split="train+val"), tmp_path / "both")
    assert [sample.meta["image_id"] for sample in both.values()] == [9, 25, 42]


def test_coco_2017_finds_the_folder_by_the_address_of_an_image(tmp_path):
    images, annotations = [], []
    for i in (7, 8):
        write(tmp_path / f"val2017/{i:012d}.jpg", encode(gradient(i)))
        url = f"http://images.cocodataset.org/val2017/{i:012d}.jpg"
        images.append({"id": i, "file_name": f"{i:012d}.jpg", "coco_url": url})
        annotations.append({"id": i, "image_id": i, "caption": f"image {i}"})
    write(tmp_path / "captions_val2017.json", {"images": images, "annotations": annotations})
    samples, _ = run(published_records("coco", tmp_path, split="val"), tmp_path / "out")
    assert captions_of(samples) == {"val2017--000000000007": ["image 7"], "val2017--000000000008": ["image 8"]}


def test_named_files_and_image_folders_are_read_whatever_their_names(tmp_path):
    file = coco(tmp_path / "coco").rename(tmp_path / "mine.json")
    flat = (tmp_path / "coco/train2014").rename(tmp_path / "flat")
    records = published_records("coco", tmp_path, annotations=[file], images=flat)
    samples, _ = run(records, tmp_path / "out")
    assert [key.split("--")[0] for key in samples] == ["train2014", "train2014"], "keys do not depend on the layout"


def test_a_test_set_of_coco_has_no_captions(tmp_path):
    write(tmp_path / "test2014/COCO_test2014_000000000001.jpg", encode(gradient()))
    info = {"images": [{"id": 1, "file_name": "COCO_test2014_000000000001.jpg"}], "categories": []}
    write(tmp_path / "annotations/image_info_test2014.json", info)
    samples, _ = run(published_records("coco", tmp_path, split="test2014"), tmp_path / "out")
    (sample,) = samples.values()
    assert sample.meta["captions"] == [] and sample.meta["image_id"] == 1


@pytest.mark.parametrize(
    "split, ids",
    [("train", [1]), ("train+restval", [1, 4]), ("restval", [4]), ("val", [2]), ("test", [3])],
)
def test_splits_of_karpathy(tmp_path, split, ids):
    karpathy(tmp_path / "in")
    samples, report = run(published_records("coco", tmp_path / "in", split=split), tmp_path / "out")
    assert [sample.meta["image_id"] for sample in samples.values()] == ids
    last = split.split("+")[-1]
    assert list(samples.values())[-1].meta["captions"] == [f"{last} 0", f"{last} 1"]
    assert report.others == [], "images of the other splits are no surprise"


def test_a_split_that_only_karpathy_has_chooses_his_file(tmp_path):
    karpathy(tmp_path)
    coco(tmp_path)
    records = published_records("coco", tmp_path, split="train+restval")
    assert [record.meta["captions"][0] for record in records] == ["train 0", "restval 0"]
    assert len(published_records("coco", tmp_path, split="train2014")) == 2


def test_flickr30k_reads_all_three_of_its_files(tmp_path):
    names = ["1000092795.jpg", "2199200615.jpg"]
    for name in names:
        write(tmp_path / "flickr30k-images" / name, encode(gradient()))
    token = "".join(f"{name}#{n}\tA dog {n} .\n" for name in names for n in range(2))
    table = "image_name| comment_number| comment\n" + "".join(f"{name}| 0| A dog 0 .\n" for name in names)
    # the published file has one line without its second bar
    table += "1000092795.jpg| 1| A dog 1 .\n2199200615.jpg| 1   A dog 1 .\n"
    sentences = [{"raw": f"A dog {n} ."} for n in range(2)]
    images = [{"filename": name, "imgid": n, "split": "test", "sentences": sentences} for n, name in enumerate(names)]
    expected = {name[:-4]: ["A dog 0 .", "A dog 1 ."] for name in names}
    for number, (name, content, split) in enumerate(
        (
            ("results_20130124.token", token, ""),
            ("results.csv", "\ufeff" + table, ""),
            ("dataset_flickr30k.json", {"images": images, "dataset": "flickr30k"}, "test"),
        )
    ):
        file = write(tmp_path / name, content)
        samples, report = run(published_records("flickr30k", tmp_path, split=split), tmp_path / f"out{number}")
        assert captions_of(samples) == expected and report.skipped == [], name
        assert [sample.meta["image_id"] for sample in samples.values()] == [1000092795, 2199200615]
        file.unlink()


def test_nocaps_keeps_ids_and_domains(tmp_path):
    images, annotations = [], []
    for i, domain in enumerate(("in-domain", "near-domain", "out-domain")):
        name = f"00{i}3ea2087020901"
        write(tmp_path / f"val/{name}.jpg", encode(gradient(i)))
        url = f"https://s3.amazonaws.com/nocaps/val/{name}.jpg"
        about = {"id": i, "open_images_id": name, "file_name": f"{name}.jpg", "coco_url": url, "domain": domain}
        images.append(about)
        annotations += [{"image_id": i, "id": 10 * i + n, "caption": f"{n} of {i}"} for n in range(10)]
    content = {"info": {}, "licenses": [], "images": images, "annotations": annotations}
    write(tmp_path / "nocaps_val_4500_captions.json", content)
    samples, _ = run(published_records("nocaps", tmp_path, split="val"), tmp_path / "out")
    metas = [sample.meta for sample in samples.values()]
    assert list(samples)[0] == "val--0003ea2087020901"
    assert [meta["image_id"] for meta in metas] == [0, 1, 2]
    assert [meta["domain"] for meta in metas] == ["in-domain", "near-domain", "out-domain"]
    assert metas[1]["open_images_id"] == "0013ea2087020901" and metas[1]["captions"][9] == "9 of 1"


def genome(root, with_image_data=True):
    for folder, i in (("VG_100K", 2), ("VG_100K_2", 1)):
        write(root / folder / f"{i}.jpg", encode(gradient(i)))
    regions = [
        {"regions": [{"region_id": 10, "image_id": i, "phrase": f"a tree {i}", "x": 1, "y": 1}], "id": i}
        for i in (1, 2)
    ]
    qas = [
        {"id": 1, "qas": [{"qa_id": 98, "image_id": 1, "question": "What colour?", "answer": "Green."}]},
        {"id": 2, "qas": [{"qa_id": 99, "image_id": 2, "question": "How many?", "answer": 2}]},
    ]
    data = [
        {"image_id": i, "url": f"https://cs.stanford.edu/people/rak248/{folder}/{i}.jpg", "width": 20, "height": 12}
        for folder, i in (("VG_100K_2", 1), ("VG_100K", 2))
    ]
    write(root / "region_descriptions.json", regions)
    write(root / "question_answers.json", qas)
    if with_image_data:
        write(root / "image_data.json", data)


@pytest.mark.parametrize("with_image_data", [True, False])
def test_visual_genome_has_captions_and_questions(tmp_path, with_image_data):
    genome(tmp_path / "vg", with_image_data)
    samples, report = run(published_records("vg", tmp_path / "vg"), tmp_path / "out")
    assert captions_of(samples) == {"VG_100K_2--1": ["a tree 1"], "VG_100K--2": ["a tree 2"]}
    one, two = (sample.meta["questions"] for sample in samples.values())
    assert one == [
        {
            "question": "What colour?",
            "answers": [{"answer": "Green", "weight": 0.2}],
            "kind": "vg",
            "question_id": 98,
        }
    ]
    assert two[0]["answers"] == [{"answer": "2", "weight": 0.2}]
    (reason,) = reasons(report, tmp_path / "vg/question_answers.json")
    assert reason == "1 answers are numbers and read as texts, the first of question 99"
    only = published_records("vg", tmp_path / "vg", annotations=[tmp_path / "vg/region_descriptions.json"])
    samples, _ = run(only, tmp_path / "captions")
    assert all("questions" not in sample.meta for sample in samples.values())


def test_what_is_odd_in_captions_is_corrected_counted_and_named(tmp_path):
    captions = [
        (9, "A man\non a\r\nhorse. "),
        (9, "  "),
        (9, "..."),
        (9, None),
        (9, float("nan")),
        (25, "fine"),
        ("25", "an id as text"),
        (77, "of nobody"),
    ]
    file = coco(tmp_path / "in", ids=(9, 25, 30), captions=captions)
    content = json.loads(file.read_text())
    name = content["images"][0]["file_name"]
    content["images"] += [content["images"][0], {"id": 9, "file_name": "other.jpg"}, {"file_name": "x.jpg"}, "a text"]
    content["images"] += [{"id": 99, "file_name": "COCO_train2014_000000000099.jpg"}]
    content["annotations"] += [{"image_id": 25}, {"image_id": None, "caption": "a"}]
    write(tmp_path / "in/train2014/stray.jpg", encode(gradient()))
    file.write_text("\ufeff" + json.dumps(content))
    samples, report = run(published_records("coco", tmp_path / "in", split="train"), tmp_path / "out")
    assert [sample.meta["captions"] for sample in samples.values()] == [
        ["A man on a horse."],
        ["fine", "an id as text"],
        [],
    ]
    assert sorted(reasons(report, file)) == [
        "1 annotations belong to no image of the file, the first with image_id 77",
        "1 captions have line breaks and are joined to one line, the first of image 9",
        f"1 images are listed twice, and their captions come together, the first {name}",
        "2 captions are no text and left out, the first of image 9",
        "2 captions have no words and are left out, the first of image 9",
        "2 images have no annotation, the first train2014/COCO_train2014_000000000030.jpg",
    ]
    assert reasons(report, tmp_path / "in/train2014") == ["1 images that no list names, the first stray.jpg"]
    named = [skipped["reason"] for skipped in report.skipped]
    assert any("No such file" in reason for reason in named), "image 99 is missing"
    for words in ("image 4 of", "has the id 9 of another image", "image 5 of", "image 6 of", "annotation 8 of"):
        assert any(words in reason for reason in named), words
    assert len(named) == 6 and "annotation 9 of" in named[-1]


def test_greyscale_and_cmyk_images_become_rgb_and_are_counted(tmp_path):
    coco(tmp_path / "in", ids=(1, 2, 3, 4, 5))
    folder = tmp_path / "in/train2014"
    for i, form, mode in ((1, "JPEG", "L"), (2, "JPEG", "CMYK"), (3, "PNG", "RGB"), (4, "JPEG", "CMYK")):
        (folder / COCO.format("train", i)).write_bytes(encode(gradient(mode=mode), form))
    samples, report = run(published_records("coco", tmp_path / "in", split="train"), tmp_path / "out")
    assert len(samples) == 5 and report.re_encoded == 4
    assert {name: one["count"] for name, one in report.formats.items()} == {
        "greyscale JPEG": 1,
        "CMYK JPEG": 2,
        "PNG": 1,
    }
    assert report.formats["CMYK JPEG"]["first"] == str(folder / COCO.format("train", 2))


def test_an_image_listed_twice_by_karpathy_is_one_sample(tmp_path):
    file = karpathy(tmp_path / "in")
    content = json.loads(file.read_text())
    again = {**content["images"][0], "sentences": [{"raw": "train 0"}, {"raw": "new"}]}
    file.write_text(json.dumps({**content, "images": [*content["images"], again, {"filename": "a.jpg", "split": 5}]}))
    samples, report = run(published_records("coco", tmp_path / "in", split="train+restval"), tmp_path / "out")
    assert samples["train2014--COCO_train2014_000000000001"].meta["captions"] == ["train 0", "train 1", "new"]
    assert "listed twice" in reasons(report, file)[0] and "image 5 of" in report.skipped[0]["reason"]


def test_label_maps_lie_in_the_published_folders(tmp_path):
    coco(tmp_path / "in", ids=(1,))
    write(tmp_path / "labels/depth/vqav2/train2014/COCO_train2014_000000000001.png", encode(gradient(mode="L"), "PNG"))
    records = published_records("coco", tmp_path / "in", split="train", labels=tmp_path / "labels")
    samples, report = run(records, tmp_path / "out")
    (sample,) = samples.values()
    assert "depth" in sample.labels and report.blank_labels.get("depth", 0) == 0


@pytest.mark.parametrize(
    "dataset, options, message",
    [
        ("coco", {}, "coco has several splits; name one with --split"),
        ("coco", {"split": "dev"}, r"no annotation file of coco for the split dev \(captions_dev.json"),
        ("coco", {"split": "train"}, "several annotation files of coco for the split train; name one"),
        ("coco", {"annotations": ["dataset_coco.json"]}, r"several splits; name .* train \(1 images\), val \(1"),
        ("coco", {"annotations": ["dataset_coco.json"], "split": "dev"}, "no split 'dev'; name some of its splits"),
        ("coco", {"annotations": ["none.json"]}, "there is no annotation file .*none.json; check the path"),
        ("coco", {"annotations": ["list.json"]}, "holds a list .*; name another file"),
        ("coco", {"annotations": ["objects.json"]}, "holds objects of COCO, without texts; name another file"),
        (
            "vqav2",
            {"annotations": ["annotations/captions_train2014.json"]},
            "import it with `prismer data import coco`",
        ),
        ("coco", {"annotations": ["annotations/captions_train2014.json"], "split": "train"}, "has no splits, but"),
        ("coco", {"split": "train2014", "images": "annotations"}, "holds none of the 2 images .*--images"),
        ("coco", {"split": "train2014", "images": "nowhere"}, "nowhere is not a folder; name .* --images"),
        ("nocaps", {"split": "val"}, "no annotation file of nocaps for the split val"),
        ("vqav2", {"split": "train"}, "no annotation file of vqav2 for the split train"),
        ("coco", {"annotations": ["half.json"]}, "is not JSON"),
        ("coco", {"annotations": ["empty.json"]}, "names no image that can be used; image 0 of .* has no id"),
        ("coco", {"annotations": ["captions.json.zip"]}, "is a zip archive; unpack it"),
        ("flickr30k", {"annotations": ["text.txt"]}, "holds no annotations that are known here; name another"),
    ],
)
def test_bad_input_gets_one_sentence(tmp_path, dataset, options, message):
    coco(tmp_path)
    karpathy(tmp_path)
    write(tmp_path / "list.json", [{"image": "a.jpg", "caption": "a"}])
    write(tmp_path / "objects.json", {"images": [{"file_name": "a"}], "annotations": [{"bbox": [], "category_id": 1}]})
    write(tmp_path / "half.json", '{"images": [')
    write(tmp_path / "empty.json", {"images": [{"file_name": "a.jpg"}], "annotations": []})
    write(tmp_path / "text.txt", "a text")
    write(tmp_path / "captions.json.zip", b"PK\x03\x04" + bytes(40))
    for name in ("annotations", "images"):
        given = options.get(name)
        if given:
            paths = [tmp_path / path for path in ([given] if isinstance(given, str) else given)]
            options = {**options, name: paths[0] if isinstance(given, str) else paths}
    with pytest.raises(ValueError, match=message) as raised:
        published_records(dataset, tmp_path, **options)
    assert "\n" not in str(raised.value)


def test_a_folder_that_is_missing_is_named(tmp_path):
    with pytest.raises(ValueError, match="none is not a folder; name the folder of coco"):
        published_records("coco", tmp_path / "none", split="val")
