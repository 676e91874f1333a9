"""Question lists of VQAv2 and Visual Genome -> records, one per image with all its questions."""

from pathlib import Path

from prismer.dataloading.sources.image_folders import count_unnamed
from prismer.dataloading.sources.json_lists import BadEntry, entry_id, read_entries
from prismer.dataloading.sources.records import DatasetPaths, ImageRecords
from prismer.dataloading.store.sample_json import meta_problems, show_json

# the field "dataset" of an entry -> the folder of its images and labels
_FOLDERS = {"vqa": "vqav2", "vg": "vg"}
# weight of a Visual Genome answer; its list gives none
VG_WEIGHT = 0.2


def vqa_records(list_files: list[str | Path], images: str | Path, *, labels: str | Path | None = None) -> ImageRecords:
    """Question lists: JSON arrays of {"dataset", "image", "question", "answer", "weight"}.

    An image has one question per `question_id` (or text), with its distinct answers and their weights. The default
    weight is 0.2 for "vg" and 1 for "vqa". A list of answers, or "answers" in the form of VQAv2
    ([{"answer": text}, ...]), shares the weight evenly and is kept as "raw_answers", what each person said. An entry
    without an answer (a test set) is a question without answers.

    Args:
        list_files: one or more lists, whose questions of one image come together.
        images, labels: as for `caption_records`; the dataset folders are "vqav2" and "vg".

    Raises:
        ValueError: if a list has another form, or no entry can be used.
    """
    paths = {name: DatasetPaths(images, labels, folder) for name, folder in _FOLDERS.items()}
    images_of: dict[tuple[str, str], dict[object, dict]] = {}

    def add_entry(image: str, entry: dict) -> None:
        dataset, text = entry.get("dataset", "vqa"), entry.get("question")
        if not isinstance(dataset, str) or dataset not in _FOLDERS or not isinstance(text, str):
            raise BadEntry(
                f"has dataset {show_json(dataset)} and question {show_json(text)}; "
                f"expected dataset vqa or vg and a question"
            )
        raw = _answers(entry)
        weight = entry.get("weight", VG_WEIGHT if dataset == "vg" else 1.0)
        answers = [{"answer": answer, "weight": weight} for answer in raw]
        problems = meta_problems({"questions": [{"question": text, "answers": answers}]})
        if problems:
            raise BadEntry(f"has a question that cannot be used: {problems[0]}")
        name = entry_id(entry, "question_id") if "question_id" in entry else text
        questions = images_of.setdefault((dataset, image), {})
        question = questions.setdefault(name, {"question": text, "answers": {}, "kind": dataset})
        if question["question"] != text:
            raise BadEntry(
                f"has the question_id {show_json(name)} of another question ({show_json(question['question'])})"
            )
        if "question_id" in entry:
            question["question_id"] = name
        # what each person said is known only if every entry of the question tells it
        is_list = isinstance(entry.get("answer", entry.get("answers")), list)
        if is_list and ("raw_answers" in question or not question["answers"]):
            question["raw_answers"] = question.get("raw_answers", []) + raw
        elif raw:
            question.pop("raw_answers", None)
        add_answers(question["answers"], raw, weight)

    faults = read_entries(list_files, add_entry)
    records = []
    for (dataset, image), questions in images_of.items():
        for question in questions.values():
            question["answers"] = weighted(question["answers"])
        records.append(paths[dataset].record(image, {"questions": list(questions.values())}))
    records += faults
    others = []
    for root in dict.fromkeys(each.images for each in paths.values()):
        named = {image for name, image in images_of if paths[name].images == root}
        # a folder of which the lists name no image belongs to another dataset
        others += count_unnamed(root, named) if named else []
    return ImageRecords(len(records), records.__iter__, others=others)


def add_answers(answers: dict[str, float], raw: list[str], weight: float = 1.0) -> None:
    """Add answers to the weights of a question's distinct answers; they share `weight` evenly."""
    for answer in raw:
        answers[answer] = round(answers.get(answer, 0) + weight / len(raw), 6)


def weighted(answers: dict[str, float]) -> list[dict]:
    """Distinct answers and their weights as a sample's JSON has them."""
    return [dict(answer=text, weight=weight) for text, weight in answers.items()]


def _answers(entry: dict) -> list[str]:
    """The answers of an entry, in their order and with repetitions."""
    if "answer" in entry and "answers" in entry:
        raise BadEntry("has 'answer' and 'answers'; give one of them")
    given = entry.get("answer", entry.get("answers", []))
    given = given if isinstance(given, list) else [given]
    # VQAv2 has {"answer", "answer_confidence", "answer_id"} for each person
    answers = [answer.get("answer") if isinstance(answer, dict) else answer for answer in given]
    if not all(isinstance(answer, str) for answer in answers):
        raise BadEntry(f"({entry.get('image')}) has an answer that is not a text")
    return answers
