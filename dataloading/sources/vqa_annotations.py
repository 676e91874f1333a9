"""Questions and annotations as VQAv2 publishes them -> images with their questions and all ten answers."""

import re

from prismer.dataloading.sources.annotations import (
    AnnotatedImage,
    AnnotationFile,
    Findings,
    answer_text,
    entries_of,
    text_fields,
)
from prismer.dataloading.sources.json_lists import BadEntry, entry_id, same_id
from prismer.dataloading.sources.vqa_questions import add_answers, weighted
from prismer.dataloading.store.sample_json import meta_problems, show_json
from prismer.errors import InputError

_SUBTYPE = re.compile(r"[a-z]+\d{4}")


def vqa_images(sources: list[AnnotationFile], findings: Findings) -> list[AnnotatedImage]:
    """The images of VQAv2 files with their questions, in the order of the questions.

    A question keeps what each of the ten people said (`raw_answers`), its `question_id`, `question_type` and
    `answer_type`. The weight of an answer in training is the share of the people who gave it. Without annotations the
    questions have no answers (a test set).

    Args:
        sources: question files, and the annotation files of the same splits if there are any.
        findings: receives what is odd.

    Raises:
        ValueError: if there are no questions, their images cannot be told, or no annotation fits a question.
    """
    questions = [source for source in sources if source.schema == "questions"]
    if not questions:
        raise InputError(
            f"{sources[0].path} holds annotations without questions; name the file of the questions "
            f"(v2_OpenEnded_mscoco_*_questions.json) with --annotations, too"
        )
    told = _annotations([source for source in sources if source.schema == "answers"], findings)
    images: dict[str, AnnotatedImage] = {}
    seen: dict[int | str, tuple] = {}
    fitting = 0
    for source in questions:
        folder = _folder(source)
        for place, entry in entries_of(source, "questions", findings):
            try:
                question, number = _question(entry)
                key = same_id(question["question_id"])
                content = (folder, number, question["question"])
                if seen.get(key, content) != content:
                    raise BadEntry(f"has the question_id {show_json(question['question_id'])} of another question")
                if key in seen:
                    findings.count(source.path, "questions are listed twice and read once", f"question_id {key}")
                    continue
                seen[key] = content
                name = f"COCO_{folder}_{number:012d}.jpg"
                image = AnnotatedImage(folder, name, {"image_id": number, "questions": []})
                image = images.setdefault(image.path, image)
                if key in told:
                    owner, about = told.pop(key)
                    if same_id(about.pop("image_id")) != number:
                        raise BadEntry(f"has image_id {number} and another in {owner.path}")
                    question |= about
                    fitting += 1
                elif len(sources) > len(questions):
                    findings.count(source.path, "questions have no annotation", f"question_id {key}")
                image.meta["questions"].append(question)
            except BadEntry as error:
                findings.fault(source.path, place, error)
    if told and not fitting:
        question_id = next(iter(told))
        raise InputError(
            f"no annotation of {told[question_id][0].path} fits a question: it has question_id {question_id!r}, the "
            f"questions have {next(iter(seen), None)!r}; name the two files of one split"
        )
    for question_id, (source, _) in told.items():
        findings.count(source.path, "annotations belong to no question", f"question_id {question_id}")
    return [image for image in images.values() if image.meta["questions"]]


def _folder(source: AnnotationFile) -> str:
    """The folder of a file's images: "train2014", "val2014" or "test2015", for test-dev, too."""
    subtype = source.content.get("data_subtype")
    text = subtype if isinstance(subtype, str) else source.path.name
    match = _SUBTYPE.search(text.replace("-dev", ""))
    if not match:
        raise InputError(
            f"{source.path} has the data_subtype {show_json(subtype)}; expected the folder of its images, such as "
            f"train2014"
        )
    return match[0]


def _question(entry: dict) -> tuple[dict, int]:
    """A question of a sample's JSON without answers, and the number of its image."""
    if not {"question_id", "image_id", "question"} <= entry.keys():
        raise BadEntry("has no question_id, no image_id or no question")
    question = {
        "question": entry["question"],
        "answers": [],
        "kind": "vqa",
        "question_id": entry_id(entry, "question_id"),
    }
    problems = meta_problems({"questions": [question]})
    if problems:
        raise BadEntry(f"cannot be used: {problems[0]}")
    number = same_id(entry_id(entry, "image_id"))
    if not isinstance(number, int) or number < 0:
        raise BadEntry(f"has the image_id {show_json(number)}; expected a number of COCO")
    return question, number


def _annotations(sources: list[AnnotationFile], findings: Findings) -> dict[int | str, tuple[AnnotationFile, dict]]:
    """Question id -> its file and what it says about the question, with the id of the image."""
    told: dict[int | str, tuple[AnnotationFile, dict]] = {}
    for source in sources:
        for place, entry in entries_of(source, "annotations", findings):
            try:
                if not {"question_id", "image_id", "answers"} <= entry.keys() or not isinstance(entry["answers"], list):
                    raise BadEntry("has no question_id, no image_id or no list of answers")
                key, image_id = same_id(entry_id(entry, "question_id")), entry_id(entry, "image_id")
                given = [answer.get("answer") if isinstance(answer, dict) else answer for answer in entry["answers"]]
                raw = [answer_text(answer, source.path, key, findings) for answer in given]
                weights: dict[str, float] = {}
                add_answers(weights, raw)
                blank = [answer for answer in weights if not answer.strip()]
                for answer in blank:
                    del weights[answer]
                    findings.count(source.path, "questions have blank answers, which get no weight", f"question {key}")
                about = {"image_id": image_id, "answers": weighted(weights), "raw_answers": raw}
                about |= text_fields(entry, "question_type", "answer_type")
                if key in told:
                    findings.count(source.path, "annotations are listed twice; the first is used", f"of question {key}")
                told.setdefault(key, (source, about))
            except BadEntry as error:
                findings.fault(source.path, place, error)
    return told
