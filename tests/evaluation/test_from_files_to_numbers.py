"""Proves that a benchmark's own files lead to its numbers.

Each dataset is written in its published schema, imported and evaluated with the two commands, and every score is
computed again from the annotation files by other means.

python -m pytest tests/evaluation/test_from_files_to_numbers.py

Captions are scored by pycocoevalcap where it and Java are installed (pip install 'prismer-vlm[eval]').
"""

import csv
import importlib.util
import json
import random
import shutil
import tarfile
from collections import defaultdict
from fractions import Fraction
from pathlib import Path

import pytest
from PIL import Image, ImageDraw

from prismer.cli.main import main
from prismer.evaluation.caption_metrics import caption_scores
from tests.data.benchmark_files import (
    URL,
    annotation,
    coco,
    downloaded,
    flickr30k,
    genome,
    imagenet,
    karpathy,
    nocaps,
    vqa,
)
from tests.data.import_sources import encode, write
from tests.evaluation.plain_vqa_accuracy import accuracy, processed
from tests.evaluation.test_toolkit import toolkit_tokens
from tests.train.conftest import Workshop

HAS_DATASETS = importlib.util.find_spec("datasets") is not None
HAS_TOOLKIT = importlib.util.find_spec("pycocoevalcap") is not None and shutil.which("java") is not None
COLOURS = ["red", "blue", "green", "yellow", "purple", "cyan"]
# close to what tiny says, with marks, contractions and numbers as people write them
CAPTIONS = [
    "A large matte {0} cylinder and a large matte {1} cone.",
    "Just one object, a {0} cylinder; it isn't a cube!",
    "a large matte {1} cylinder (matte)\nand {0} things",
    "There's a {0} object, 3/4 of it {1}",
    'The "{0}" cube... costs $1,000.50',
]
# what people answer: the same in several spellings
SAID = "red,Red,the red,red.,blue,a blue,two,2,none,0,dont know,don't know,1,000,10:30,yes,yes!,no,,left/right".split(
    ","
)
# what the model chooses from
CHOICES = ["red", "blue", "2", "two", "don't know", "yes", "No", "left right", "0"]


def texts_of(i: int, count: int = 5) -> list[str]:
    return [CAPTIONS[(i + n) % 5].format(COLOURS[i % 6], COLOURS[(i + n + 1) % 6]) for n in range(count)]


def draw_images(root: Path) -> None:
    """Replace every image below `root` by a shape of its own; some are greyscale or CMYK."""
    for n, path in enumerate(sorted(p for p in root.rglob("*") if p.suffix.lower() in (".jpg", ".jpeg"))):
        image = Image.new("RGB", (96 + 8 * (n % 3), 96), ("grey", "white", "black")[n % 3])
        pen = ImageDraw.Draw(image)
        (pen.ellipse, pen.rectangle)[n % 2]((10 + 5 * (n % 6), 24, 60, 70), fill=COLOURS[n % 6])
        path.write_bytes(encode(image.convert(("RGB", "RGB", "L", "CMYK")[n % 4])))


def command(*words: object) -> None:
    assert main([str(word) for word in words]) == 0


def numbers_of(folder: Path, name: str, importing: list, evaluating: list) -> tuple[dict, list[dict], Path]:
    """Import and evaluate: scores.json, the rows, and the folder of the results."""
    data, out = folder / f"{name}-data", folder / f"{name}-results"
    command("data", "import", *importing, "--out", data, "--label-size", 8)
    command("evaluate", "--model", "tiny", "--data", data, "--out", out, "--precision", "fp32", *evaluating)
    rows = [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]
    return json.loads((out / "scores.json").read_text()), rows, out


def scored_by_the_toolkit(captions: list[str], references: list[list[str]], meteor: bool = True) -> dict[str, float]:
    """The scores of captions, computed by pycocoevalcap from the texts."""
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.meteor.meteor import Meteor
    from pycocoevalcap.rouge.rouge import Rouge

    found, true, differ = toolkit_tokens([[caption, *refs] for caption, refs in zip(captions, references, strict=True)])
    assert differ == {}
    bleus, _ = Bleu(4).compute_score(true, found, verbose=0)
    scores = {f"BLEU-{n + 1}": score for n, score in enumerate(bleus)}
    scores["ROUGE-L"], scores["CIDEr-D"] = (scorer.compute_score(true, found)[0] for scorer in (Rouge(), Cider()))
    if meteor:
        scores["METEOR"] = Meteor().compute_score(true, found)[0]
    return scores


def assert_caption_numbers(numbers: dict, rows: list[dict], true: dict[int | str, list[str]], by: str) -> None:
    """Captions of `true`, from the annotation file, by the field `by` of a row."""
    assert [" ".join(" ".join(text.split()) for text in row["captions"]) for row in rows] == [
        " ".join(" ".join(text.split()) for text in true[row[by]]) for row in rows
    ]
    assert sorted(row[by] for row in rows) == sorted(true), "each image once"
    rows = [row for row in rows if row["captions"]]
    captions, references = [row["caption"] for row in rows], [true[row[by]] for row in rows]
    expected = caption_scores(captions, references)
    found = dict(numbers["scores"])
    if HAS_TOOLKIT:
        expected = scored_by_the_toolkit(captions, references)
    assert found.pop("score") == found["CIDEr-D"] / 10
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=0, abs=1e-9)
    # of two images every n-gram of both has no weight
    assert expected["BLEU-1"] > 0 and (expected["CIDEr-D"] > 0 or len(rows) == 2)
    others = {name for name in found if name not in expected}
    domains = {row["domain"] for row in rows if "domain" in row}
    assert others == {f"CIDEr-D/{domain}" for domain in domains}


def assert_caption_submission(out: Path, rows: list[dict], ids: list) -> None:
    entries = json.loads((out / "submission_captions.json").read_text())
    assert all(list(entry) == ["image_id", "caption"] for entry in entries)
    found = [entry["image_id"] for entry in entries]
    assert sorted(found) == sorted(ids) and [*map(type, sorted(found))] == [*map(type, sorted(ids))]
    assert {e["image_id"]: e["caption"] for e in entries} == {row["image_id"]: row["caption"] for row in rows}


def annotated(file: Path) -> dict[int, list[str]]:
    """Image id -> captions, of an official caption file."""
    content = json.loads(file.read_text())
    true: dict[int, list[str]] = {image["id"]: [] for image in content["images"]}
    for entry in content["annotations"]:
        true[entry["image_id"]].append(entry["caption"])
    return true


def test_coco_captions_official(tmp_path):
    ids = (9, 25, 30, 34)
    file = coco(tmp_path / "coco", "val", ids, [(i, text) for n in range(5) for i in ids for text in [texts_of(i)[n]]])
    draw_images(tmp_path)
    numbers, rows, out = numbers_of(
        tmp_path, "coco", ["coco", tmp_path / "coco", "--split", "val2014"], ["--task", "caption"]
    )
    assert_caption_numbers(numbers, rows, annotated(file), "image_id")
    assert_caption_submission(out, rows, list(ids))


def test_coco_captions_of_karpathy_with_restval(tmp_path):
    file = karpathy(tmp_path / "coco", "a large matte {} cylinder and {} cones.")
    draw_images(tmp_path)
    numbers, rows, out = numbers_of(
        tmp_path,
        "karpathy",
        ["coco", tmp_path / "coco", "--split", "train+restval", "--annotations", file],
        ["--task", "caption"],
    )
    true = {
        image["cocoid"]: [sentence["raw"] for sentence in image["sentences"]]
        for image in json.loads(file.read_text())["images"]
        if image["split"] in ("train", "restval")
    }
    assert len(true) == 2
    assert_caption_numbers(numbers, rows, true, "image_id")
    assert_caption_submission(out, rows, list(true))


def test_nocaps_by_domain(tmp_path):
    file = nocaps(tmp_path / "nocaps", [texts_of(i) for i in range(9)])
    draw_images(tmp_path)
    numbers, rows, out = numbers_of(
        tmp_path, "nocaps", ["nocaps", tmp_path / "nocaps", "--split", "val"], ["--task", "caption"]
    )
    true = annotated(file)
    assert_caption_numbers(numbers, rows, true, "image_id")
    assert_caption_submission(out, rows, list(range(9)))
    predicted = {row["image_id"]: row["caption"] for row in rows}
    for domain in ("in-domain", "near-domain", "out-domain"):
        inside = [image["id"] for image in json.loads(file.read_text())["images"] if image["domain"] == domain]
        texts = [predicted[i] for i in inside], [true[i] for i in inside]
        scores = scored_by_the_toolkit(*texts, meteor=False) if HAS_TOOLKIT else caption_scores(*texts)
        score = scores["CIDEr-D"]
        assert len(inside) == 3 and numbers["scores"][f"CIDEr-D/{domain}"] == pytest.approx(score, rel=0, abs=1e-9)


def test_flickr30k(tmp_path):
    true = {f"{1000 + i}.jpg": [text.replace("\n", " ") for text in texts_of(i)] for i in range(3)}
    flickr30k(tmp_path / "flickr30k", true)
    (tmp_path / "flickr30k/dataset_flickr30k.json").unlink()
    draw_images(tmp_path)
    numbers, rows, _ = numbers_of(tmp_path, "flickr", ["flickr30k", tmp_path / "flickr30k"], ["--task", "caption"])
    by_id = {int(name.split(".")[0]): texts for name, texts in true.items()}
    assert_caption_numbers(numbers, rows, by_id, "image_id")


def test_conceptual_captions_beside_img2dataset(tmp_path):
    downloaded(tmp_path / "cc3m", tars=False)
    lines = [(texts_of(i)[0].replace("\n", " "), URL.format(i)) for i in range(3)]
    file = write(tmp_path / "Train_GCC-training.tsv", "".join(f"{text}\t{url}\n" for text, url in lines))
    draw_images(tmp_path)
    numbers, rows, out = numbers_of(
        tmp_path, "cc3m", ["web", tmp_path / "cc3m", "--annotations", file], ["--task", "caption"]
    )
    with open(file) as source:
        by_url = {url: [text] for text, url in csv.reader(source, delimiter="\t", quoting=csv.QUOTE_NONE)}
    # img2dataset names an image by its number and keeps its address in the JSON beside it
    true = {
        f"00000--{path.stem}": by_url[json.loads(path.read_text())["url"]]
        for path in (tmp_path / "cc3m/00000").glob("*.json")
    }
    assert_caption_numbers(numbers, rows, true, "key")
    assert not (out / "submission_captions.json").exists()


def test_sbu_beside_img2dataset(tmp_path):
    downloaded(tmp_path / "sbu", tars=True)
    by_url = {URL.format(i): texts_of(i)[0].replace("\n", " ") for i in range(3)}
    file = write(tmp_path / "sbu.json", {"image_urls": [*by_url], "captions": [*by_url.values()]})
    importing = ["web", tmp_path / "sbu", "--annotations", file]
    numbers, rows, _ = numbers_of(tmp_path, "sbu", importing, ["--task", "caption"])
    with tarfile.open(next((tmp_path / "sbu").glob("*.tar"))) as tar:
        urls = {name: json.load(tar.extractfile(name))["url"] for name in tar.getnames() if name.endswith(".json")}
    # a row is named after its shard and member
    found = {row["captions"][0] for row in rows}
    assert found == {by_url[url] for url in urls.values()} and len(rows) == len(urls)
    true = {row["key"]: row["captions"] for row in rows}
    assert_caption_numbers(numbers, rows, true, "key")


@pytest.mark.skipif(not HAS_DATASETS, reason="the package datasets is not installed")
def test_parquet(tmp_path):
    import pyarrow
    from pyarrow import parquet

    captions = {i: texts_of(i) for i in range(4)}
    images = [{"bytes": encode(Image.new("RGB", (64, 64), COLOURS[i])), "path": None} for i in captions]
    table = pyarrow.table({"image": images, "captions": [*captions.values()], "image_id": [*captions]})
    parquet.write_table(table, tmp_path / "rows.parquet")
    importing = ["parquet", tmp_path / "rows.parquet"]
    numbers, rows, out = numbers_of(tmp_path, "rows", importing, ["--task", "caption"])
    assert_caption_numbers(numbers, rows, captions, "image_id")
    assert_caption_submission(out, rows, [*captions])


def test_visual_genome_captions_and_questions(tmp_path):
    genome(tmp_path / "vg", phrase="a large matte red cylinder {}")
    draw_images(tmp_path)
    importing = ["vg", tmp_path / "vg"]
    numbers, rows, _ = numbers_of(tmp_path, "vg", importing, ["--task", "caption"])
    regions = json.loads((tmp_path / "vg/region_descriptions.json").read_text())
    true = {entry["id"]: [region["phrase"] for region in entry["regions"]] for entry in regions}
    assert_caption_numbers(numbers, rows, true, "image_id")
    numbers, rows, out = numbers_of(tmp_path, "vg-vqa", importing, ["--task", "vqa", "--answers", "green,2,red"])
    asked = {
        qa["qa_id"]: (qa["question"], str(qa["answer"]).rstrip("."))
        for entry in json.loads((tmp_path / "vg/question_answers.json").read_text())
        for qa in entry["qas"]
    }
    given = {q["question_id"]: q for row in rows for q in row["questions"]}
    assert {i: q["question"] for i, q in given.items()} == {i: text for i, (text, _) in asked.items()}
    # one true answer counts as what all of ten people said
    equal = [processed(given[i]["prediction"]) == processed(answer) for i, (_, answer) in asked.items()]
    assert numbers["scores"]["accuracy"] == sum(equal) / len(equal)
    assert "distinct answers" in " ".join(numbers["notes"])
    assert {e["question_id"] for e in json.loads((out / "submission_answers.json").read_text())} == set(asked)


def vqa_files(root: Path, count: int = 40, subtype: str = "val2014") -> list[Path]:
    """Questions on two images with the answers of ten people, in all types."""
    draw = random.Random(0)
    questions, annotations = [], []
    for n in range(count):
        image, kind = 42 + n % 2, n % 4
        question_type = ("what color is the", "how many", "is it", "what")[kind]
        questions.append({"image_id": image, "question": f"{question_type} {n}?", "question_id": 1000 * image + n})
        few = draw.sample(SAID, draw.choice([1, 2, 3, 6]))
        said = [draw.choice(few) for _ in range(10)]
        answer_type = ("other", "number", "yes/no", "other")[kind]
        annotations.append(annotation(image, 1000 * image + n, said, question_type, answer_type))
    return vqa(root, subtype, questions, annotations)


def assert_vqa_numbers(numbers: dict, rows: list[dict], out: Path, questions: Path, annotations: Path) -> None:
    given = {q["question_id"]: q for row in rows for q in row["questions"]}
    asked = json.loads(questions.read_text())["questions"]
    assert {i: q["question"] for i, q in given.items()} == {q["question_id"]: q["question"] for q in asked}
    groups = defaultdict(list)
    for entry in json.loads(annotations.read_text())["annotations"]:
        people = [answer["answer"] for answer in entry["answers"]]
        one = accuracy(given[entry["question_id"]]["prediction"], people)
        for name in ("", f"/answer_type/{entry['answer_type']}", f"/question_type/{entry['question_type']}"):
            groups[f"accuracy{name}"].append(one)
    expected = {name: float(sum(values, Fraction(0)) / len(values)) for name, values in groups.items()}
    assert 0 < expected["accuracy"] < 1
    found = numbers["scores"]
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=0, abs=1e-12)
    assert set(found) - set(expected) == {"accuracy/vqa", "score"}
    assert found["score"] == found["accuracy/vqa"] == found["accuracy"] and numbers["notes"] == []
    submitted = json.loads((out / "submission_answers.json").read_text())
    assert all(list(entry) == ["question_id", "answer"] for entry in submitted)
    ids = [entry["question_id"] for entry in submitted]
    assert sorted(ids) == sorted(q["question_id"] for q in asked) and {*map(type, ids)} == {int}
    assert {e["question_id"]: e["answer"] for e in submitted} == {i: q["prediction"] for i, q in given.items()}


def test_vqav2(tmp_path):
    questions, annotations = vqa_files(tmp_path / "vqa")
    draw_images(tmp_path)
    choices = write(tmp_path / "answers.json", CHOICES)
    numbers, rows, out = numbers_of(
        tmp_path,
        "vqa",
        ["vqav2", tmp_path / "vqa", "--split", "val"],
        ["--task", "vqa", "--answers", choices],
    )
    assert {q["prediction"] for row in rows for q in row["questions"]} <= set(CHOICES)
    assert_vqa_numbers(numbers, rows, out, questions, annotations)


def test_imagenet_with_shots(tmp_path):
    imagenet(tmp_path / "imagenet", images=5)
    draw_images(tmp_path)
    numbers, rows, _ = numbers_of(
        tmp_path,
        "imagenet",
        ["imagenet", tmp_path / "imagenet", "--split", "train", "--shots", 3, "--seed", 0],
        ["--task", "classify", "--classes", "goldfish,red cube,cylinder,tench,blue cone,sphere,sign"],
    )
    names = {"n01440764": "tench", "n01443537": "goldfish"}
    hits, near = 0, 0
    for row in rows:
        (name,) = (name for wnid, name in names.items() if wnid in row["key"])
        assert row["class"] == name and len(set(row["ranked"])) == 5
        hits += row["prediction"] == row["ranked"][0] == name
        near += name in row["ranked"]
    assert len(rows) == 6 and sum(row["class"] == "tench" for row in rows) == 3
    assert numbers["scores"] == pytest.approx({"top-1": hits / 6, "top-5": near / 6, "score": hits / 6})


@pytest.mark.long
def test_a_model_that_was_trained_on_imported_files_is_scored_the_same(tmp_path):
    """A few steps on questions of VQAv2 and on captions of COCO, then the evaluation of each exported model."""
    shop = Workshop(tmp_path / "shop")
    questions, annotations = vqa_files(tmp_path / "vqa")
    vqa_files(tmp_path / "vqa", subtype="train2014")
    ids = (9, 25, 30, 34)
    for split in ("train", "val"):
        texts = [(i, text) for i in ids for text in texts_of(i)]
        captions = coco(tmp_path / "coco", split, ids, texts)
    draw_images(tmp_path / "vqa")
    draw_images(tmp_path / "coco")
    runs = {}
    for name, task in (("vqav2", "vqa"), ("coco", "caption")):
        for split in ("train", "val"):
            out = tmp_path / "data" / name / split
            folder = tmp_path / ("vqa" if name == "vqav2" else name)
            command("data", "import", name, folder, "--split", split, "--out", out, "--label-size", 8)
        settings = dict(model="tiny", task=task, steps=3, batch_size=2, precision="fp32")
        runs[name] = shop.launch(name, data=str(tmp_path / "data" / name), **settings)
    for name, task in (("vqav2", "vqa"), ("coco", "caption")):
        run = runs[name]
        assert run.end() == 0, run.text()
        out = tmp_path / f"{name}-results"
        settings = ["--task", task, "--out", out, "--precision", "fp32"]
        command("evaluate", "--model", run.folder / "model", "--data", tmp_path / "data" / name, *settings)
        numbers = json.loads((out / "scores.json").read_text())
        rows = [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]
        if task == "vqa":
            assert_vqa_numbers(numbers, rows, out, questions, annotations)
        else:
            assert_caption_numbers(numbers, rows, annotated(captions), "image_id")
        trained = json.loads((run.folder / "results.json").read_text())["trained model"]
        assert {key: numbers["scores"][key] for key in trained} == pytest.approx(trained, abs=1e-6)
    shop.clean_up()
