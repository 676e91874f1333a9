"""The annotation files and image folders of published datasets, written by hand in each dataset's own schema."""

import json

from tests.data.import_sources import encode, gradient, make_tar, write

COCO = "COCO_{}2014_{:012d}.jpg"
TEN = ["red", "red", "dark red", "red", "maroon", "red", "red", "red", "", "dark red"]
DOMAINS = ("in-domain", "near-domain", "out-domain")
URL = "http://example.org/{}.jpg"


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


def karpathy(root, text="{} {}"):
    """dataset_coco.json with one image in each split, those of restval and val in val2014.

    `text` is a caption: its fields are the split, and 0 or 1.
    """
    images = []
    for split, folder, i in (("train", "train", 1), ("val", "val", 2), ("test", "val", 3), ("restval", "val", 4)):
        name = COCO.format(folder, i)
        write(root / f"{folder}2014/{name}", encode(gradient(i)))
        sentences = [{"tokens": ["a"], "raw": text.format(split, n), "imgid": i, "sentid": n} for n in range(2)]
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


def nocaps(root, captions=None):
    """The validation set, by default an image in each domain; `captions` has the texts of each image."""
    captions = captions or [[f"{n} of {i}" for n in range(10)] for i in range(len(DOMAINS))]
    images, annotations = [], []
    for i, texts in enumerate(captions):
        name = f"00{i}3ea2087020901"
        write(root / f"val/{name}.jpg", encode(gradient(i)))
        url = f"https://s3.amazonaws.com/nocaps/val/{name}.jpg"
        about = {"id": i, "open_images_id": name, "file_name": f"{name}.jpg", "coco_url": url}
        images.append({**about, "domain": DOMAINS[i % len(DOMAINS)]})
        annotations += [{"image_id": i, "id": 10 * i + n, "caption": text} for n, text in enumerate(texts)]
    content = {"info": {}, "licenses": [], "images": images, "annotations": annotations}
    return write(root / "nocaps_val_4500_captions.json", content)


def flickr30k(root, captions):
    """Captions by image name in results_20130124.token, and in Karpathy's file as the split test."""
    for i, name in enumerate(captions):
        write(root / "flickr30k-images" / name, encode(gradient(i)))
    lines = [f"{name}#{n}\t{text}\n" for name, texts in captions.items() for n, text in enumerate(texts)]
    images = [
        {"filename": name, "imgid": i, "split": "test", "sentences": [{"raw": text} for text in texts]}
        for i, (name, texts) in enumerate(captions.items())
    ]
    write(root / "dataset_flickr30k.json", {"images": images, "dataset": "flickr30k"})
    return write(root / "results_20130124.token", "".join(lines))


def imagenet(root, images=20):
    """The class folders of two wnids, and the names."""
    for kind in ("n01440764", "n01443537"):
        for i in range(images):
            write(root / f"train/{kind}/{i}.JPEG", encode(gradient(i)))
    write(root / "LOC_synset_mapping.txt", "n01440764 tench, Tinca tinca\nn01443537 goldfish\n")


def genome(root, with_image_data=True, phrase="a tree {}"):
    """Two images; `phrase` describes a region, its field is the id of the image."""
    for folder, i in (("VG_100K", 2), ("VG_100K_2", 1)):
        write(root / folder / f"{i}.jpg", encode(gradient(i)))
    regions = [
        {"regions": [{"region_id": 10, "image_id": i, "phrase": phrase.format(i), "x": 1, "y": 1}], "id": i}
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


def vqa(root, subtype="val2014", questions=None, annotations=None):
    """Files as published; images 42 and 43, questions 42000, 42001 and 43000."""
    for i in (42, 43):
        write(root / f"{subtype}/COCO_{subtype}_{i:012d}.jpg", encode(gradient(i)))
    asked = [(42, 42000, "What color is it?"), (42, 42001, "How many?"), (43, 43000, "Is it day?")]
    if questions is None:
        questions = [{"image_id": i, "question": text, "question_id": q} for i, q, text in asked]
    about = {"info": {}, "data_type": "mscoco", "data_subtype": subtype, "license": {}}
    paths = [
        write(
            root / f"v2_OpenEnded_mscoco_{subtype}_questions.json",
            {**about, "task_type": "Open-Ended", "questions": questions},
        )
    ]
    if annotations is None:
        annotations = [annotation(42, 42000, TEN), annotation(42, 42001, ["2"] * 10, "how many", "number")]
        annotations += [annotation(43, 43000, ["yes"] * 9 + ["no"], "is it", "yes/no")]
    if annotations:
        content = {**about, "annotations": annotations}
        paths.append(write(root / f"v2_mscoco_{subtype}_annotations.json", content))
    return paths


def annotation(image, question, answers, question_type="what color is the", answer_type="other"):
    given = [{"answer": a, "answer_confidence": "yes", "answer_id": n + 1} for n, a in enumerate(answers)]
    return {
        "question_type": question_type,
        "multiple_choice_answer": str(answers[0]),
        "answers": given,
        "image_id": image,
        "answer_type": answer_type,
        "question_id": question,
    }


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
